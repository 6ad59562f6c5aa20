"""The csv and yaml files that a fine-tuning run leaves, made from its log and what it measured; and runs compared.

epoch_loss.csv, epoch_peak_memory.csv, flops_profiler_stats.csv, forward_pass.csv, memory_breakdown.csv, optimizer_memory.csv,
predictions.csv, results.yaml, resource_usage.yaml. Bytes, milliseconds, joules, FLOPs (a multiply-add is two); what nobody
measured is an empty field or null.
"""
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

import classification
import common
from configurator import fail, save


def write_yaml(path, found):
    import yaml

    def write(tmp):
        with open(tmp, 'w', encoding='utf-8') as f:
            yaml.safe_dump(found, f, sort_keys=False, allow_unicode=True)
    common.atomic_write(path, write)


def flop_counter():
    """A FlopCounterMode that also knows what attention is on a CPU."""
    aten = torch.ops.aten
    return flop_counters.FlopCounterMode(display=False, depth=None, custom_mapping={
        aten._scaled_dot_product_flash_attention_for_cpu:
            lambda q, k, v, *args, **kwargs: flop_counters.sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward:
            lambda g, q, k, v, *args, **kwargs: flop_counters.sdpa_backward_flop_count(g, q, k, v)})


def write_run(out_dir, about, names, evaluated, measured, forward, memory, flops):
    """Write the files of a run and return results.yaml's dict.

    about: {key: value} that say what it is (model, task, method, rank, seed, ...). names: labels in the order of their ids.
    evaluated: {language or '': (labels (n,), predictions (n,), rows of the file (n,), loss)}, labels and predictions by
    name. measured: {'ms_per_sample', 'training_s', 'evaluation_s', 'energy_j', 'adam_bytes', ...}. forward: a row of
    forward_pass.csv. memory: {part: bytes} in the order of memory_breakdown.csv, None if nothing was trained here. flops:
    {module: (forward, backward)} of the last step's first micro-batch, or None; backward of all of it only, as torch's
    counter counts some of it several times in modules that share an input.
    """
    table = lambda name, columns, rows: classification.write_table(os.path.join(out_dir, name), columns, rows)
    records = common.read_log(out_dir)
    epochs, steps = [r for r in records if 'train_loss' in r], [r for r in records if r.get('ms')]
    table('epoch_loss.csv', ('epoch', 'step', 'train_loss', 'eval_loss', 'eval_accuracy'),
          [[r[k] for k in ('epoch', 'step', 'train_loss', 'val_loss', 'val_accuracy')] for r in epochs])
    table('epoch_peak_memory.csv', ('epoch', 'peak_bytes', 'resident_bytes'),
          [[r[k] for k in ('epoch', 'peak_bytes', 'resident_bytes')] for r in epochs])
    table('forward_pass.csv', tuple(forward), [list(forward.values())])
    if flops:
        table('flops_profiler_stats.csv', ('module', 'forward_flops', 'backward_flops'),
              [(name, *flops[name]) for name in sorted(flops, key=lambda name: (name != 'Global', name))])
    if memory:
        table('memory_breakdown.csv', ('part', 'bytes'), list(memory.items()))
    optimizer = epochs[-1]['optimizer_bytes'] if epochs else None
    adam = measured.pop('adam_bytes')
    table('optimizer_memory.csv', ('optimizer', 'method', 'rank', 'bytes', 'adam_bytes', 'saved'),
          [[measured.pop('optimizer'), about['method'], about['rank'], optimizer, adam,
            None if optimizer is None else round(1 - optimizer / adam, 6)]])
    several, rows, per_language = len(evaluated) > 1 or '' not in evaluated, [], {}
    for language, (labels, guesses, places, loss) in evaluated.items():
        rows += [(*([language] if several else []), int(i), label, guess)
                 for i, label, guess in zip(places, labels, guesses, strict=True)]
        of = {name: i for i, name in enumerate(names)}
        per_language[language] = {'eval_loss': loss, **classification.metrics(
            [of[x] for x in labels], [of[x] for x in guesses], len(names))}
    table('predictions.csv', (*(['language'] if several else []), 'index', 'label', 'prediction'), rows)
    peak = max((r['peak_bytes'] for r in epochs), default=None)
    seconds = {key: measured.pop(key) for key in ('training_s', 'evaluation_s')}
    results = {**about, **next(iter(per_language.values())), **({'languages': per_language} if several else {}),
               'train_loss': epochs[-1]['train_loss'] if epochs else None, 'peak_bytes': peak, 'optimizer_bytes': optimizer,
               'gradient_bytes': epochs[-1]['gradient_bytes'] if epochs else None,
               'ms_per_step': statistics.median(r['ms'] for r in steps) if steps else None,
               'ms_per_sample': measured['ms_per_sample'], 'samples_per_s': 1e3 / measured.pop('ms_per_sample'), **measured}
    usage = {key: results[key] for key in ('peak_bytes', 'energy_j', 'ms_per_step', 'ms_per_sample', 'samples_per_s')}
    write_yaml(os.path.join(out_dir, 'resource_usage.yaml'),
               {**usage, 'resident_bytes': common.peak_memory_bytes(), **seconds, 'machine': platform.machine(),
                'cpus': os.cpu_count(), **common.versions()})
    write_yaml(os.path.join(out_dir, 'results.yaml'), results)          # the last: who finds it finds the others
    return results


def compare_runs(paths):
    """Print how each run differs from the first one, from the predictions they left for the same texts: folders or files."""
    if len(paths) < 2:
        fail('one run cannot be compared; type --compare=out/a,out/b')
    paths = [p if os.path.splitext(p)[1] in classification.EXTENSIONS else os.path.join(p, 'predictions.csv') for p in paths]
    names = [os.path.relpath(os.path.dirname(p) or '.') for p in paths]
    for path, name in zip(paths[1:], names[1:], strict=True):
        try:
            labels, a, b, languages = classification.paired(paths[0], path)
        except ValueError as e:
            fail(str(e))
        parts = {'': np.full(len(labels), True)}
        if languages and len(set(languages)) > 1:
            parts |= {f'{x}: ': np.array(languages) == x for x in dict.fromkeys(languages)}
        for part, chosen in parts.items():
            r = classification.compare(*(np.array(column)[chosen] for column in (labels, a, b)), (names[0], name))
            print(f'{part}{names[0]} {r["accuracy_a"]:.2%}, {name} {r["accuracy_b"]:.2%} of {r["n"]:,}; difference '
                  f'{r["difference"] * 100:+.2f} points, 95% [{r["difference_low"] * 100:+.2f}, '
                  f'{r["difference_high"] * 100:+.2f}]; right in one only: {r["only_a"]}, {r["only_b"]}; McNemar exact p = '
                  f'{r["p"]:.3g}\n{part}{r["verdict"]}')


def sweep(config, script):
    """One run of `script` for each of config's ranks and folds, in a process of its own, as a peak of memory is a process's;
    then sweep.csv and a line for each rank. The same command goes on where it was stopped."""
    import yaml
    ranks, folds, out_dir = config['ranks'], config['folds'], config['out_dir']
    if 'RANK' in os.environ:
        fail('ranks and folds start processes of their own; type python in place of torchrun, or one rank and fold at a time',
             rank0_only=True)
    if (ranks and config['method'] == 'full') or min(ranks, default=1) < 1 or folds == 1 or folds < 0:
        fail(f'ranks={ranks}, folds={folds}, method={config["method"]!r}: full has no rank; ranks are 1 or more, folds 0 or 2 '
             'and more')
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
            if stopped():                           # Ctrl-C has reached it as well, which it takes for the same signal
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
        except FileNotFoundError:                   # a signal, to both or to it alone
            print('stopped; the same command goes on')
            return
    columns = ('rank', 'fold', 'accuracy', 'f1', 'eval_loss', 'peak_bytes', 'optimizer_bytes', 'ms_per_step')
    classification.write_table(os.path.join(out_dir, 'sweep.csv'), columns, [[row.get(c) for c in columns] for row in rows])
    for rank in dict.fromkeys(row['rank'] for row in rows):
        found = [row['accuracy'] for row in rows if row['rank'] == rank]
        sd = f' ± {statistics.stdev(found):.2%} over {folds} folds' if folds else ''
        print(f'{config["method"]}{"" if rank is None else f" rank {rank}"}: accuracy {statistics.mean(found):.2%}{sd}')
