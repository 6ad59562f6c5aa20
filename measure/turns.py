"""What every measurement of bench.py uses: a process for each variant, turns, medians, peaks, tables."""
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
    """One variant in a process of its own: ask(line) sends it a line and gives its answer, a dict."""

    def __init__(self, job):
        self.job = job
        self.process = subprocess.Popen([sys.executable, str(BENCH), 'worker', json.dumps(job)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True,
                                        env={'KINETO_LOG_LEVEL': '99', 'TORCH_CPP_LOG_LEVEL': 'ERROR',     # the profiler talks
                                             **os.environ})

    def ask(self, line=''):
        try:
            self.process.stdin.write(f'{line}\n')
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (ValueError, OSError):
            if self.process.wait() == 2:            # one clear line is there already
                sys.exit(2)
            configurator.fail(f'{self.job["name"]} failed, see above')

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def measure(names, bench, a):
    """One answer of a fresh process for each name, one after the other."""
    rows = []
    for name in names:
        worker = Worker(dict(vars(a), run=None, bench=bench, name=name))
        rows.append({'bench': bench, 'name': name, **worker.ask(), 'device': device_name(a), 'torch': torch.__version__})
        worker.close()
    return rows


def in_turns(jobs, rounds, warm_up, line):
    """[[answer, ...] of each job]: their processes live at once but work in turns, round after round, so that what else
    the machine does falls on all of them alike. Gives (workers, answers); the workers can be asked more."""
    workers = [Worker(job) for job in jobs]
    for w in workers:
        w.ask(warm_up)
    answers = [[] for _ in jobs]
    for _ in range(rounds):
        for w, found in zip(workers, answers, strict=True):
            found.append(w.ask(line))
    return workers, answers


def middle(found, key):
    """Median over rounds of a figure in their answers; None where there is none."""
    values = [r.get(key) for r in found]
    return None if None in values else statistics.median(values)


def ratio(found, base, key):
    """Median over rounds of a figure's ratio to another variant's of the same round; None where one has none."""
    pairs = [(r.get(key), b.get(key)) for r, b in zip(found, base or [{}] * len(found), strict=True)]
    return None if any(None in pair for pair in pairs) else statistics.median(m / b for m, b in pairs)


def show(rows, columns, path):
    """Print rows (dicts) as a table, columns: (key, header, format spec or function); append them to path as JSON lines."""
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
    """Milliseconds of each of n calls of step(), with before() in between, untimed."""
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
    """Median milliseconds of step(), repeated for about `seconds` and at least 3 times."""
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        times += times_ms(step, 1, cuda)
    return statistics.median(times)


def peak_bytes(model, optimizer, step, cuda):
    """Most bytes of tensors alive at once in step(), the model and what the optimizer holds before it included."""
    return sum(p.nbytes for p in model.parameters()) + optimizer_bytes(optimizer) + peak_above(step, cuda)


def resident_bytes():
    """Resident memory now (Linux), else the peak so far."""
    try:
        return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_memory_bytes()
