"""Shared parts of all measurements of bench.py: one process per variant, turns, medians, peak memory, tables."""
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import common
import configurator
from common import peak_above, peak_memory_bytes
from optim import optimizer_bytes

MIB = 2 ** 20
BENCH = Path(__file__).resolve().parents[1] / 'bench.py'


class Worker:
    """One variant in a fresh process. ask(line) sends a line to it and returns its answer, a dict."""

    def __init__(self, job):
        self.job = job
        self.process = subprocess.Popen([sys.executable, str(BENCH), 'worker', json.dumps(job)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True,
                                        env={'KINETO_LOG_LEVEL': '99', 'TORCH_CPP_LOG_LEVEL': 'ERROR',     # silent profiler
                                             **os.environ})

    def ask(self, line=''):
        try:
            self.process.stdin.write(f'{line}\n')
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (ValueError, OSError):
            if self.process.wait() == 2:            # the process printed its one-line error
                sys.exit(2)
            configurator.fail(f'{self.job["name"]} failed; see the traceback above')

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def measure(names, bench, a):
    """Measure each name in a fresh process, one after the other. Returns a row for each: answer, device, torch version."""
    rows = []
    for name in names:
        worker = Worker(dict(vars(a), run=None, bench=bench, name=name))
        rows.append({'bench': bench, 'name': name, **worker.ask(), 'device': device_name(a), 'torch': torch.__version__})
        worker.close()
    return rows


def in_turns(jobs, rounds, warm_up, line):
    """Measure jobs in turns: only one process works at a time, so that other load on the machine affects all jobs alike.
    Returns (workers, [[answer of each round] of each job]); the workers still accept lines."""
    workers = [Worker(job) for job in jobs]
    for w in workers:
        w.ask(warm_up)
    answers = [[] for _ in jobs]
    for _ in range(rounds):
        for w, mine in zip(workers, answers, strict=True):
            mine.append(w.ask(line))
    return workers, answers


def middle(answers, key):
    """Median over rounds of a figure in the answers; None if an answer lacks it."""
    values = [r.get(key) for r in answers]
    return None if None in values else statistics.median(values)


def ratio(answers, base, key):
    """Median over rounds of the ratio of a figure to that of another variant in the same round; None if an answer lacks it."""
    pairs = [(r.get(key), b.get(key)) for r, b in zip(answers, base or [{}] * len(answers), strict=True)]
    return None if any(None in pair for pair in pairs) else statistics.median(m / b for m, b in pairs)


def show(rows, columns, path):
    """Print rows (dicts) as a table and append them to path as JSON lines. columns: (key, header, format spec or function)."""
    cells = [[h for _, h, _ in columns]]
    for r in rows:
        cells.append(['-' if r.get(k) is None else f(r[k]) if callable(f) else format(r[k], f) for k, _, f in columns])
    width = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        print('  '.join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, width, strict=True))))
    if path:
        with open(path, 'a') as f:
            f.writelines(json.dumps(r) + '\n' for r in rows)


def mib(n):
    return f'{n / MIB:.2f}'


def device_name(a):
    return common.device_name(torch.device(a.device))


def times_ms(step, n, cuda, before=lambda: None):
    """Milliseconds of each of n calls of step(). before() runs before each call and is not timed."""
    sync, times = torch.cuda.synchronize if cuda else (lambda: None), []
    for _ in range(n):
        before()
        sync()
        start = time.perf_counter()
        step()
        sync()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def median_ms(step, seconds, cuda):
    """Median milliseconds of step(), which is repeated for about `seconds`, at least 3 times."""
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        times += times_ms(step, 1, cuda)
    return statistics.median(times)


def peak_bytes(model, optimizer, step, cuda):
    """Peak bytes of tensors alive at once in step(), including the model and the optimizer state from before it."""
    return sum(p.nbytes for p in model.parameters()) + optimizer_bytes(optimizer) + peak_above(step, cuda)


def resident_bytes():
    """Resident memory of this process in bytes: now on Linux, elsewhere the peak so far."""
    try:
        return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_memory_bytes()
