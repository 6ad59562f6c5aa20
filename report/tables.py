"""The csv and yaml files of a fine-tuning run, written from its log and measurements; comparison and sweeps of runs.

epoch_loss.csv, epoch_peak_memory.csv, flops_profiler_stats.csv, forward_pass.csv, memory_breakdown.csv, optimizer_memory.csv,
predictions.csv, results.yaml, resource_usage.yaml. Units: bytes, milliseconds, joules, FLOPs (a multiply-add counts as two).
A value that was not measured is an empty field or null.
"""
import collections
import contextlib
import itertools
import os
import platform
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
import torch.utils.flop_counter as flop_counters

import common
import optim
from configurator import fail, save
from readers import texts
from report import scores


def write_yaml(path, found):
    import yaml

    def write(tmp):
        with open(tmp, 'w', encoding='utf-8') as f:
            yaml.safe_dump(found, f, sort_keys=False, allow_unicode=True)
    common.atomic_write(path, write)


def flop_counter():
    """A FlopCounterMode that also counts attention on the CPU, which torch's own counter misses."""
    aten = torch.ops.aten
    return flop_counters.FlopCounterMode(display=False, depth=None, custom_mapping={
        aten._scaled_dot_product_flash_attention_for_cpu:
            lambda q, k, v, *args, **kwargs: flop_counters.sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward:
            lambda g, q, k, v, *args, **kwargs: flop_counters.sdpa_backward_flop_count(g, q, k, v)})


@contextlib.contextmanager
def unmeasured_if_it_fails(what, rank=0):
    """A block that only measures: if it raises an error, rank 0 prints a warning, and all go on."""
    try:
        yield
    except Exception as e:                          # noqa: BLE001  torch's meters fail in many ways; none may cost a result
        if rank == 0:
            print(f'warning: {what} are not measured ({type(e).__name__}: {" ".join(str(e).split())[:90]})')


class StepMeter:
    """Measures peak memory, gradient bytes, FLOPs, joules and seconds of training steps, on rank 0.

    CUDA: the allocator's peak over all steps. CPU: all allocations of some steps: the first and third step of a process, one
    step in the middle of each epoch and, for RSVDAdam, the first refresh of each weight that already has moments."""

    def __init__(self, net, optimizer, device, rank, world):
        self.net, self.optimizer, self.device, self.rank, self.world = net, optimizer, device, rank, world
        self.gradient_bytes, self.flops, self.disturbed, self.refreshed = 0, None, False, set()
        self.epoch_peak, self.seconds, self.joules_before, self.first_step = 0, 0.0, 0.0, None
        self.counted, self.stepped, self.used = False, False, ()        # used: joules at the end of training

    def state(self):
        return {'peak': self.peak(), 'gradient_bytes': self.gradient_bytes, 'joules': self.joules() or 0.0,
                'seconds': self.seconds + time.perf_counter() - self.began}

    def load(self, state):
        self.epoch_peak, self.gradient_bytes, self.joules_before, self.seconds = (
            state[k] for k in ('peak', 'gradient_bytes', 'joules', 'seconds'))

    def begin(self, step):
        self.first_step, self.began, self.energy = step, time.perf_counter(), common.energy_meter(self.device)
        self.reset_cuda()

    def end(self):
        """End of training: joules() and `seconds` do not change any more."""
        self.used, self.seconds = (self.joules(),), self.seconds + time.perf_counter() - self.began

    def joules(self):
        """Joules since the run began. None without an energy meter, or with several processes, whose sum is not measured."""
        if self.used:
            return self.used[0]
        used = self.energy() if self.world == 1 else None
        return None if used is None else self.joules_before + used

    def reset_cuda(self):
        if self.device.type == 'cuda':
            self.epoch_peak = self.peak()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.stepped = False

    def reset(self):
        """Start a new epoch."""
        self.epoch_peak = 0

    def peak(self):
        """Peak bytes of this epoch so far."""
        if self.device.type == 'cuda' and self.stepped:
            return max(self.epoch_peak, torch.cuda.max_memory_allocated(self.device))
        return self.epoch_peak

    def _first_refresh(self):
        if not hasattr(self.optimizer, 'due'):
            return False
        due = {p for g in self.optimizer.param_groups for p in g['params'] if self.optimizer.low_rank(p, g)
               and 'exp_avg' in self.optimizer.state[p] and self.optimizer.due(p, g)} - self.refreshed
        self.refreshed |= due
        return bool(due)

    @contextlib.contextmanager
    def step(self, step, in_middle):
        """Wrap one step, from the batch to the update. backward_done() is called inside."""
        first = step - self.first_step
        probe = self.device.type == 'cpu' and self.rank == 0 and (first in (0, 2) or self._first_refresh() or in_middle)
        self.disturbed, self.counted, self.stepped = probe or self.counted, False, True
        if probe:
            base = optim.optimizer_bytes(self.optimizer) + sum(t.nbytes for t in [*self.net.parameters(), *self.net.buffers()])
            if self.world > 1:                      # DistributedDataParallel keeps its gradient buckets between steps
                base += sum(p.nbytes for p in self.net.parameters() if p.requires_grad)
        with common.peak_meter(False) if probe else contextlib.nullcontext() as found:
            yield
        if probe:
            self.epoch_peak = max(self.epoch_peak, base + found['bytes'])

    def backward_done(self):
        if self.disturbed or not self.gradient_bytes:
            self.gradient_bytes = optim.memory_report(self.net, self.optimizer, 0)['gradients']

    def count_flops(self, losses):
        """Count the FLOPs of one step whose micro-batches give these losses. Nothing is updated, and the gradients are dropped.
        torch's counter fails on some models, and a training step must not fail with it."""
        counts = lambda: collections.Counter({name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()})
        forward, done, joules, start = collections.Counter(), collections.Counter(), self.joules(), time.perf_counter()
        with unmeasured_if_it_fails('FLOPs', self.rank), flop_counter() as counter:
            for loss in losses:
                forward += counts() - done
                loss.backward()
                done = counts()
            self.flops = {name: (forward[name], n - forward[name] if name == 'Global' else None) for name, n in done.items()}
        self.optimizer.zero_grad(set_to_none=True)
        self.counted, self.seconds = True, self.seconds - (time.perf_counter() - start)         # it is no part of the training
        self.joules_before -= (self.joules() or 0.0) - (joules or 0.0)


def forward_row(net, x, amp, cuda):
    """The row of forward_pass.csv: one forward pass in eval mode on the batch x, {name: tensor}. None: not measured."""
    net.eval()
    (texts, length), flops, peak = x['input_ids'].shape, None, None
    with torch.no_grad(), amp:
        with unmeasured_if_it_fails('FLOPs of a forward pass'):
            with flop_counter() as counter:
                net(**x)
            flops = counter.get_total_flops()
        with unmeasured_if_it_fails('peak bytes of a forward pass'):
            peak = common.peak_above(lambda: net(**x), cuda)
        start = time.perf_counter()
        net(**x).logits.cpu()
    return {'texts': texts, 'tokens': length, 'forward_flops': flops, 'peak_bytes': peak,
            'ms': (time.perf_counter() - start) * 1e3}


def write_run(out_dir, about, names, evaluated, meter, forward, adam_bytes):
    """Write all result files of a run and return the dict of results.yaml.

    about: {key: value} that describe the run (model, task, method, rank, seed, ...). names: labels in the order of the data
    set; with two labels, F1 is that of the second. evaluated: {set or '': (labels (n,), predictions (n,), rows of the
    file (n,), loss, seconds per text)}, labels and predictions as names. meter: a StepMeter after its run. forward: a row of
    forward_pass.csv. adam_bytes: size of AdamW's state for all parameters. FLOPs are those of the last step. The backward
    pass has a total only: torch counts parts of it several times in modules that share an input.
    """
    table = lambda name, columns, rows: texts.write_table(os.path.join(out_dir, name), columns, rows)
    records = common.read_log(out_dir)
    epochs, steps = [r for r in records if 'train_loss' in r], [r for r in records if r.get('ms')]
    peak = max((r['peak_bytes'] for r in epochs), default=0) or None
    table('epoch_loss.csv', ('epoch', 'step', 'train_loss', 'eval_loss', 'eval_accuracy'),
          [[r[k] for k in ('epoch', 'step', 'train_loss', 'val_loss', 'val_accuracy')] for r in epochs])
    table('epoch_peak_memory.csv', ('epoch', 'peak_bytes', 'resident_bytes'),
          [[r[k] for k in ('epoch', 'peak_bytes', 'resident_bytes')] for r in epochs])
    table('forward_pass.csv', tuple(forward), [list(forward.values())])
    if meter.flops:
        table('flops_profiler_stats.csv', ('module', 'forward_flops', 'backward_flops'), [
            (name, *meter.flops[name]) for name in sorted(meter.flops, key=lambda name: (name != 'Global', name))])
    optimizer = epochs[-1]['optimizer_bytes'] if epochs else None
    if peak:
        parts = optim.memory_report(meter.net, meter.optimizer, peak) | {'gradients': epochs[-1]['gradient_bytes']}
        parts['rest'] = peak - sum(parts[k] for k in ('parameters', 'buffers', 'gradients', 'optimizer'))
        table('memory_breakdown.csv', ('part', 'bytes'), list(parts.items()))
    table('optimizer_memory.csv', ('optimizer', 'method', 'rank', 'bytes', 'adam_bytes', 'saved'), [
        [type(meter.optimizer).__name__, about['method'], about['rank'], optimizer, adam_bytes,
         None if optimizer is None else round(1 - optimizer / adam_bytes, 6)]])
    several, rows, per_set = len(evaluated) > 1 or '' not in evaluated, [], {}
    of = {name: i for i, name in enumerate(names)}
    for name, (labels, predictions, places, loss, _) in evaluated.items():
        rows += [(*([name] if several else []), int(i), label, prediction)
                 for i, label, prediction in zip(places, labels, predictions, strict=True)]
        per_set[name] = {'eval_loss': loss, **scores.metrics(
            [of[x] for x in labels], [of[x] for x in predictions], len(names))}
        if len(names) == 2:
            per_set[name]['f1_label'] = names[1]
    table('predictions.csv', (*(['set'] if several else []), 'index', 'label', 'prediction'), rows)
    bases = [state['basis'].shape[1] for state in meter.optimizer.state.values() if 'basis' in state]
    each = sum(len(found[0]) * found[4] for found in evaluated.values()) / len(rows)
    results = {**about, **next(iter(per_set.values())), **({'sets': per_set} if several else {}),
               'train_loss': epochs[-1]['train_loss'] if epochs else None, 'peak_bytes': peak, 'optimizer_bytes': optimizer,
               'gradient_bytes': epochs[-1]['gradient_bytes'] if epochs else None,
               'basis_ranks': [min(bases), max(bases)] if bases else None,
               'ms_per_step': statistics.fmean(r['ms'] for r in steps) if steps else None,
               'ms_per_sample': each * 1e3, 'samples_per_s': 1 / each, 'energy_j': meter.joules()}
    usage = {key: results[key] for key in ('peak_bytes', 'energy_j', 'ms_per_step', 'ms_per_sample', 'samples_per_s')}
    write_yaml(os.path.join(out_dir, 'resource_usage.yaml'),
               {**usage, 'resident_bytes': common.peak_memory_bytes(), 'training_s': meter.seconds,
                'device': str(meter.device), 'processes': meter.world, 'machine': platform.machine(), 'cpus': os.cpu_count(),
                **common.versions()})
    write_yaml(os.path.join(out_dir, 'results.yaml'), results)          # last: if it exists, all other files exist
    return results


def write_predictions(folder, names, predictions, shares):
    """Write folder/predictions.csv: for each text its index, the predicted name and the probability of each name. Returns what
    to print. Raises OSError."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, 'predictions.csv')
    rows = [(i, name, *(round(x, 6) for x in row)) for i, (name, row) in enumerate(zip(predictions, shares, strict=True))]
    n = texts.write_table(path, ('index', 'prediction', *names), rows)
    return f'{n:,} texts classified; wrote {path}'


def in_words(results):
    """The results as text: one line per evaluated set, then the time per text."""
    lines = [f'{key + ": " if key else ""}accuracy {r["accuracy"]:.2%} [{r["accuracy_low"]:.2%}, {r["accuracy_high"]:.2%}], '
             f'{r["f1_kind"]} F1 {r["f1"]:.4f} [{r["f1_low"]:.4f}, {r["f1_high"]:.4f}], n = {r["n"]:,}'
             for key, r in results.get('sets', {'': results}).items()]
    return '\n'.join(lines) + f'\n{results["ms_per_sample"]:.2f} ms/text'


def compare_runs(paths):
    """Compare each run with the first by their predictions for the same texts, and print it. paths: run folders or files."""
    if len(paths) < 2:
        fail('one run cannot be compared; type for example --compare=out/a,out/b')
    paths = [p if p.lower().endswith((*texts.FORMATS, '.gz')) else os.path.join(p, 'predictions.csv') for p in paths]
    names = [os.path.relpath(os.path.dirname(p) or '.') for p in paths]
    for path, name in zip(paths[1:], names[1:], strict=True):
        try:
            labels, a, b, sets = scores.paired(paths[0], path)
        except ValueError as e:
            fail(str(e))
        parts = {'': np.full(len(labels), True)}
        if sets and len(set(sets)) > 1:
            parts |= {f'{x}: ': np.array(sets) == x for x in dict.fromkeys(sets)}
        for part, chosen in parts.items():
            r = scores.compare(*(np.array(column)[chosen] for column in (labels, a, b)), (names[0], name))
            print(f'{part}{names[0]} {r["accuracy_a"]:.2%}, {name} {r["accuracy_b"]:.2%} of {r["n"]:,}; difference '
                  f'{r["difference"] * 100:+.2f} points, 95% [{r["difference_low"] * 100:+.2f}, '
                  f'{r["difference_high"] * 100:+.2f}]; right in one only: {r["only_a"]}, {r["only_b"]}; McNemar exact p = '
                  f'{r["p"]:.3g}\n{part}{r["verdict"]}')


def sweep(config, script):
    """Run `script` once for each of config's ranks and folds, then write sweep.csv and print one line per rank. Each run is a
    process of its own, because peak memory is measured per process. The same command continues a stopped sweep."""
    import yaml
    ranks, folds, out_dir = config['ranks'], config['folds'], config['out_dir']
    if 'RANK' in os.environ:
        fail('ranks and folds start their own processes; type python in place of torchrun, or give one rank and fold at a time',
             rank0_only=True)
    if (ranks and config['method'] == 'full') or min(ranks, default=1) < 1 or folds == 1 or folds < 0:
        fail(f'ranks={ranks}, folds={folds}, method={config["method"]!r}: full has no rank; ranks are 1 or more, folds 0 or '
             'at least 2')
    os.makedirs(out_dir, exist_ok=True)
    save({**config, 'overwrite': False}, os.path.join(out_dir, 'config.py'),
         f'{os.path.basename(script)}: the runs in r* and fold*')
    rows, stopped = [], common.stop_flag()
    for rank, fold in itertools.product(ranks or (config['rank'],), range(folds) if folds else (-1,)):
        path = os.path.join(out_dir, *([f'r{rank}'] if ranks else []), *([f'fold{fold}'] if folds else []))
        keys = {**config, 'out_dir': path, 'rank': rank, 'fold': fold, 'ranks': (),
                'resume': config['resume'] or ('' if config['overwrite'] else 'auto')}
        words = [f'--{key}={value}' for key, value in keys.items() if value != '']
        print(f'{path}:', flush=True)
        child = subprocess.Popen([sys.executable, os.path.abspath(script), *words])
        while child.poll() is None:
            if stopped():                           # after Ctrl-C the child gets two signals and treats them as one
                child.terminate()
                child.wait()
            time.sleep(0.05)
        if child.returncode and not stopped():
            sys.exit(child.returncode)
        try:
            if stopped():
                raise FileNotFoundError
            with open(os.path.join(path, 'results.yaml')) as f:
                rows.append({'rank': rank, 'fold': fold} | yaml.safe_load(f))
        except FileNotFoundError:                   # a signal stopped both processes or only the child
            print('stopped; the same command goes on')
            return
    columns = ('rank', 'fold', 'accuracy', 'f1', 'eval_loss', 'peak_bytes', 'optimizer_bytes', 'ms_per_step')
    texts.write_table(os.path.join(out_dir, 'sweep.csv'), columns, [[row.get(c) for c in columns] for row in rows])
    for rank in dict.fromkeys(row['rank'] for row in rows):
        found = [row['accuracy'] for row in rows if row['rank'] == rank]
        sd = f' ± {statistics.stdev(found):.2%} over {folds} folds' if folds else ''
        print(f'{config["method"]}{"" if rank is None else f" rank {rank}"}: accuracy {statistics.mean(found):.2%}{sd}')
