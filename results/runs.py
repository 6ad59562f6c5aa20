"""
The runs behind the tables: variants of one config on the same batches, several seeds each, measured and tabulated.

    python data/text/prepare.py --file wiki.train.txt --val_file wiki.valid.txt --vocab=1024 --name=wikitext2
    python results/runs.py quality [--seeds=1,2,3] [--jobs=2] [--only=fp,bin]      # hours on 2 cores
    python results/runs.py long                                                   # ... in four times the steps
    python results/runs.py search                                                 # rates, starts, teachers; after quality
    python results/runs.py depth                                                  # 12 of 12 blocks binary
    python results/runs.py blocks                                                 # which 3 of 6 blocks, after ptq.py choose
    python results/runs.py sst2 | sst2_search                                     # methods of finetune_cls.py, their rates
    python results/runs.py sst2_base                                              # ... of a GPT from quality and export.py
    python results/runs.py food10 | cifar10 | food10_search                       # train_cnn.py: kinds of layers, their rates
    python results/runs.py arithmetic | tictactoe | tinystories                   # train_bitnet.py beside full precision
    python results/runs.py speed                                                  # bench.py train, its table
    python results/runs.py bitnet_speed                                           # ... of train_bitnet.py's model
    python results/runs.py stats | fit | layers | optim | optim_bytes | finetune | conv   # bench.py's other commands
    python results/runs.py [quality] --table                                      # one or all, from the kept runs alone

Runs the trainer once for each variant and seed in out/<name>/ (an interrupted run continues), stores each run as a line of
results/<name>.jsonl, and writes results/<name>.md and .png, its headlines in README.md and docs/, and the index
results/README.md. No number in them is typed by hand. experiments.py says what is run.
"""
import argparse
import contextlib
import json
import math
import os
import re
import runpy
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import keep
from benches import BENCHES, bench_table
from experiments import BY_STEP, EXPERIMENTS
from keep import MIB, ROOT, number, table

# ---------------------------------------------------------------------------------------------------------------------
# runs


def train(name, variant, seed, threads):
    """Make one run, or continue it, and store it in results/<name>.jsonl."""
    script, config, _, _, variants = EXPERIMENTS[name]
    out = ROOT / 'out' / name / f'{variant}_s{seed}'
    options = variants[variant][1].replace('{seed}', str(seed))
    if unfinished := [path for path in re.findall(r'out/\S+(?=/best\.pt)', options) if not finished(ROOT / path)]:
        sys.exit(f'error: {unfinished[0]} is not finished; run that variant first')
    command = [sys.executable, script, *config.split(), *options.split(), f'--seed={seed}',
               f'--out_dir={out.relative_to(ROOT)}', '--resume=auto']
    os.makedirs(out, exist_ok=True)
    if not finished(out):
        with timed(out), open(out / 'stdout.txt', 'a') as f:
            subprocess.run(command, cwd=ROOT, stdout=f, stderr=subprocess.STDOUT, check=True,
                           env=dict(os.environ, OMP_NUM_THREADS=str(threads)))
    parts = json.loads((out / 'seconds.json').read_text())
    keep.keep_run(name, out, variant=variant, seed=seed, config=config, options=options, threads=threads,
                  seconds=None if None in parts else round(sum(parts)))     # evaluations and all
    print(f'{variant} seed {seed}: done', flush=True)


def finished(out):
    log = out / 'log.jsonl'
    lines = log.read_text().splitlines() if log.exists() else []        # no lines: it was killed before its first record
    return (out / 'results.yaml').exists() or bool(lines) and 'packed_file_bytes' in json.loads(lines[-1])


@contextlib.contextmanager
def timed(out):
    """Append the seconds of the with block to out/seconds.json, after those of earlier parts of the run. A part that was killed
    stays None."""
    path = out / 'seconds.json'
    parts = json.loads(path.read_text()) if path.exists() else [None] * (out / 'last.pt').exists()
    path.write_text(json.dumps([*parts, None]))
    start = time.monotonic()
    try:
        yield
    finally:
        path.write_text(json.dumps([*parts, time.monotonic() - start]))


def measure_steps(name, steps=160):
    """Measure memory and time of a step of each variant, one after the other on one core of an idle machine, and store them as
    lines without a seed in results/<name>.jsonl. (The runs for the accuracies shared the machine.)"""
    import yaml
    config, variants = EXPERIMENTS[name].config, EXPERIMENTS[name].variants
    for variant in runs_of(name):
        out = f'out/{name}/steps_{variant}'
        subprocess.run([sys.executable, 'finetune_cls.py', config, *variants[variant][1].split(), f'--max_iters={steps}',
                        f'--out_dir={out}', '--overwrite=True'], cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
                       env=dict(os.environ, OMP_NUM_THREADS='1'))
        found = yaml.safe_load((ROOT / out / 'results.yaml').read_text())
        row = {'variant': variant, 'steps': steps} | {k: found[k] for k in (
            'ms_per_step', 'peak_bytes', 'optimizer_bytes', 'gradient_bytes', 'basis_ranks')}
        keep.put(name, row)
        print(row, flush=True)


STORY = ['--prompt=Once upon a time', '--max_new_tokens=160', '--temperature=0.7']


def keep_texts(name):
    """Store how the first seed of each model continues the same words, as the 'text' of its line. Labels that start with '...'
    are the same model in another training."""
    first_seeds = {r['variant']: r for r in sorted(keep.read(name), key=lambda r: -r['seed'])
                   if not EXPERIMENTS[name].variants[r['variant']][0].startswith('...')}
    for variant, run in first_seeds.items():
        out = f'out/{name}/{variant}_s{run["seed"]}'
        if (ROOT / out).exists():
            told = subprocess.run([sys.executable, 'sample.py', f'--ckpt={out}', *STORY], cwd=ROOT, check=True,
                                  capture_output=True).stdout.decode(errors='replace')
            keep.put(name, run | {'text': told})


def runs_of(name, given_up=False):
    """{variant: {seed: its line, with the figures of its last evaluation or of results.yaml}} of the finished runs; with
    given_up also of those that were stopped early."""
    runs = sorted((r for r in keep.read(name) if 'seed' in r), key=lambda r: r['seed'])
    whole = lambda r: given_up or 'packed_file_bytes' in r or 'results' in r
    found = {v: {r['seed']: r | r['evaluations'][-1] | pooled(r.get('results', {})) for r in runs
                 if r['variant'] == v and whole(r)} for v in EXPERIMENTS[name].variants}
    return {v: by_seed for v, by_seed in found.items() if by_seed}


def check_settings(name):
    """Exit with a message if a run was made with other values than its config file has now."""
    for r in keep.read(name):
        for path in (word for word in r.get('config', '').split() if 'settings' in r and word.endswith('.py')):
            now = {key: value for key, value in runpy.run_path(str(ROOT / path)).items() if key[0] != '_'}
            now = json.loads(json.dumps(now))                               # tuples become lists, as in the row
            for key in now.keys() - {'out_dir', *re.findall(r'--(\w+)=', f'{r["config"]} {r["options"]}')}:
                ran = r['settings'].get(key)                                # None: the option did not exist
                if (ran | now[key] if isinstance(ran, dict) else now[key]) != ran:      # a dict changes some of its keys
                    sys.exit(f'error: {name}: {r["variant"]} seed {r["seed"]} ran with {key}={ran}, but {path} has {now[key]} '
                             f'now; run it again')


def pooled(results):
    """The figures of results.yaml; if it has the sets val and held, also those of held and of the texts of both together."""
    if 'sets' not in results:
        return results
    val, held = (results['sets'][name] for name in ('val', 'held'))
    both = lambda key: (val[key] * val['n'] + held[key] * held['n']) / (val['n'] + held['n'])
    return results | {'held_accuracy': held['accuracy'], 'held_n': held['n'], 'all_accuracy': both('accuracy'),
                      'all_loss': both('eval_loss')}


# ---------------------------------------------------------------------------------------------------------------------
# tables of runs: a cell is computed from a group, i.e. the runs of a variant and their pairs with the baseline of the same seed


def spread(values, digits, unit='', alone=''):
    """'99.66 ± 0.12%', or - if one value is missing. alone: the text in place of the deviation of a single value."""
    if None in values:
        return '-'
    sd = f' ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else alone
    return f'{statistics.mean(values):.{digits}f}{sd}{unit}'


def mean(key, digits=4, scale=1, unit='', alone=''):
    return lambda g: spread([None if r[key] is None else r[key] * scale for r in g['runs']], digits, unit, alone)


def gap(key, digits=4, scale=1):
    """The mean difference to the baseline of the same seed, ± its standard error."""
    return lambda g: mean_gap([(a[key] - b[key]) * scale for a, b in g['pairs'] if a is not b], digits)


def mean_gap(gaps, digits=4):
    """'+0.0941 ± 0.0022': the mean of signed differences ± its standard error; - if there is none."""
    error = f' ± {statistics.stdev(gaps) / len(gaps) ** 0.5:.{digits}f}' if len(gaps) > 1 else ''
    return f'{statistics.mean(gaps):+.{digits}f}{error}' if gaps else '-'


def first(key, spec=','):
    return lambda g: number(key, spec)(g['runs'][0])


def apart(key, spec, scale=1):
    """A figure of the step that was measured apart from the runs."""
    return lambda g: number(key, spec, scale)(g['step'])


LOSSES = {'val loss': mean('val_loss', alone=' ± -'),
          'bits per byte': lambda g: f'{statistics.mean(r["val_bpb"] for r in g["runs"]):.4f}',
          'gap': gap('val_loss'), 'gap per byte': gap('val_bpb', scale=math.log(2)),
          'ms/step': lambda g: f'{statistics.median(r["ms"] for r in g["runs"]):.0f}',
          'peak resident MiB': lambda g: f'{statistics.median(r["peak_mem_bytes"] for r in g["runs"]) / MIB:.0f}',
          'packed file bytes': first('packed_file_bytes')}
PHOTOGRAPHS = {'top-1': mean('top1', 2, 100), 'gap': gap('top1', 2, 100), 'top-5': mean('top5', 2, 100),
               'val loss': mean('val_loss'), 'binary share': first('binary_share', '.1%'),
               'packed file bytes': first('packed_file_bytes')}
SCORES = {'accuracy': mean('accuracy', 2, 100), 'held-out accuracy': mean('held_accuracy', 2, 100),
          'gap': gap('all_accuracy', 2, 100), 'loss': mean('all_loss'), 'training loss': mean('train_loss')}
ACCURACIES = {**SCORES, 'trained': first('trained_parameters'), 'optimizer bytes': apart('optimizer_bytes', ','),
              'gradients': apart('gradient_bytes', ',.0f', 1024), 'peak': apart('peak_bytes', '.1f', MIB),
              'ms': apart('ms_per_step', '.0f'),
              '×': lambda g: f'{g["step"]["ms_per_step"] / g["base_step"]["ms_per_step"]:.2f}' if g['step'] else '-'}
percent = lambda *keys: lambda g: ' '.join(mean(key, 2, 100, '%')(g) for key in keys)
minutes = lambda g: spread([None if r['seconds'] is None else r['seconds'] / 60 for r in g['runs']], 1)
ENDS = {'val loss': mean('val_loss'), 'minutes': minutes, 'packed file bytes': first('packed_file_bytes')}
SUMS = {'exact match of held-out problems': percent('exact_match'), **ENDS}
GAMES = {'legal moves in games': lambda g: spread([50 * (r['random_legal'] + r['perfect_legal']) for r in g['runs']], 2, '%'),
         '... in validation games': percent('legal_moves'),
         'all games that can happen to it: lost, ended by an illegal move': percent('lines_lost', 'lines_illegal'),
         'against random: won, drawn, lost': percent('random_wins', 'random_draws', 'random_losses'),
         'against perfect: won, drawn, lost': percent('perfect_wins', 'perfect_draws', 'perfect_losses'), **ENDS}

SUBWORDS = ('quality', 'long', 'blocks', 'tinystories')     # the others' tokens are bytes
LOSS = ('{step:,} steps, {tokens:,} tokens; mean ± sd over seeds; loss in nats per token ({token}) at the last step; the gap '
        'is paired by seed, ± its standard error; ms/step on one core, while another run used the other.')
TRIALS = ' Rows that are marked so in the .jsonl used trial code.'
TASK = ('{step:,} steps, {tokens:,} tokens; at the last step, mean ± sd over n seeds; minutes of a run with its evaluations on '
        '{threads} thread{s}, for some runs beside other work.')
IMAGES = ('{step:,} steps, {samples:,} images seen; at the last step, in percent, mean ± sd over seeds; the gap in points, '
          'paired by seed, ± its standard error; share of the parameters that are binary.')
# header of the first column, caption, other columns
TABLES = dict.fromkeys(('long', 'blocks', 'depth'), ('variant', LOSS, LOSSES)) | dict.fromkeys(
    ('food10', 'food10_search'), ('layers', IMAGES, PHOTOGRAPHS)) | {
    'cifar10': ('layers', IMAGES + ' Rows with a teacher and rows that are "trained on" also cost the run of the first row.',
                PHOTOGRAPHS),
    'quality': ('variant', LOSS + ' Rows that are "trained on" start from the model of the first row; in low bits it is '
                'their teacher, too. These rows and rows with a teacher also cost its run.' + TRIALS, LOSSES),
    'tinystories': ('variant', LOSS + TRIALS, LOSSES),
    'sst2_search': ('method', '{parameters:,} parameters, {steps:,} steps; columns as in [sst2.md](sst2.md). '
                    'The rows with V = 0, beta2, SUMO, APOLLO and Fira used trial code.',
                    SCORES | {'optimizer bytes': first('optimizer_bytes')}),
    'sst2_base': ('method', 'From the first full-precision model of [quality.md](quality.md), a causal GPT of {parameters:,} '
                  'parameters, trained on WikiText-2; {steps:,} steps. Columns as in [sst2.md](sst2.md), whose model, '
                  'vocabulary and number of steps are others.',
                  SCORES | {'trained': first('trained_parameters'), 'optimizer bytes': first('optimizer_bytes')}),
    'sst2': ('method', '{parameters:,} parameters, {steps:,} steps. Accuracy in percent on {n} sentences and on {held_n:,} '
             'held-out texts, mean ± sd over seeds. The gap and the loss are over all of these texts; the gap in points, '
             'paired by seed, ± its standard error. Of a step, measured apart (`--steps`), one thread: bytes of optimizer '
             'state, KiB of gradients, MiB of all tensors alive at once, milliseconds with refreshes, × AdamW.', ACCURACIES),
    'arithmetic': ('model', TASK, SUMS),
    'tictactoe': ('model', TASK + ' Games: 200 against each, an illegal move loses.', GAMES)}


def run_table(name):
    """Markdown lines: a row for each variant, mean ± sd over seeds. The gap to the baseline is paired by seed: both runs of a
    pair saw the same batches."""
    _, config, baseline, _, variants = EXPERIMENTS[name]
    found, (column, caption, columns) = runs_of(name), TABLES[name]
    base = found.get(baseline) or sys.exit(f'error: no finished run of {baseline}; run: python results/runs.py {name}')
    steps = {r['variant']: r for r in keep.read(name) if 'seed' not in r}
    groups = [{'label': f'{variants[v][0]} (n={len(runs)})', 'runs': list(runs.values()),
               'pairs': [(runs[s], base[s]) for s in runs if s in base],
               'step': steps.get(v, {}), 'base_step': steps.get(baseline)} for v, runs in found.items()]
    one = next(iter(base.values()))
    caption = caption.format(**one, s='s' * ((one['threads'] or 1) > 1),
                             token='a token of a trained BPE' if name in SUBWORDS else 'a token is a byte')
    return [f'`{config}`: {caption}', '', *table({column: '{label}'} | columns, groups)]


def by_step(rows, value, first_column, column):
    """Markdown lines of (label, {step: number}), a column for each step; cells after the end of a run stay empty."""
    cell = lambda s: lambda row: value.format(row[1][s]) if s in row[1] else ''
    steps = sorted({s for _, row in rows for s in row})
    return table({first_column: lambda row: row[0]} | {column.format(s): cell(s) for s in steps}, rows)


def write_tables(name):
    _, config, _, _, variants = EXPERIMENTS.get(name, [None] * 5)
    if name in BENCHES:
        return keep.publish(name, bench_table(name))
    check_settings(name)
    if name in BY_STEP:
        rows = [(variants[v][0], {e['step']: e['val_loss'] for e in r['evaluations'] if e['step']})
                for v, runs in runs_of(name, given_up=True).items() for r in runs.values()]
        if not rows:
            return None
        return keep.publish(name, [f'`{config}`: validation loss, nats per token, one seed.', '',
                                   *by_step(rows, '{:.4f}', 'variant', 'step {:,}')])
    lines = run_table(name)
    if name == 'arithmetic':
        rows = [(f'{variants[v][0]}, seed {seed}', {e['step']: e['exact_match'] for e in r['evaluations']})
                for v, runs in runs_of(name).items() for seed, r in runs.items()]
        lines += ['', *by_step(rows, '{:.1%}', 'exact match at step', '{:,}')]
    for v, runs in runs_of(name).items():
        if text := next(iter(runs.values())).get('text'):
            lines += ['', f'{variants[v][0]}, first seed, `{shlex.join(STORY)}`:', '']
            lines += [f'> {line}'.rstrip() for line in text.strip().split('\n')]
    if TABLES[name][2] is LOSSES:
        picture(name)
    keep.publish(name, lines)


# A row of the table in README.md: model, low-bit part, name in results/layers.jsonl; experiment, variant, its baseline, column
# of its quality; bench with its training memory and time, row of the bench
GPT, FOOD = 'GPT 0.9M, WikiText-2', 'CNN 1.4M, 10 classes of Food-101'
SUMMARY = [
    (GPT, 'all blocks binary', 'binary', 'quality', 'bin', 'fp', 'val_loss', 'pareto', 'bin+ramp'),
    (GPT, '... [4 × the steps](results/long.md)', 'binary', 'long', 'bin', 'fp', 'val_loss', None, None),
    (GPT, 'all blocks ternary', 'ternary', 'quality', 'tern', 'fp', 'val_loss', 'pareto', 'tern+ramp'),
    (GPT, '... 4 × the steps', 'ternary', 'long', 'tern', 'fp', 'val_loss', None, None),
    ('BitNet 3.7M, 3,117 TinyStories', 'all block matrices ternary', 'ternary', 'tinystories', 'tern', 'fp', 'val_loss',
     'compiled', 'tern+ramp'),
    (FOOD, 'conv8 to conv10 binary', 'binary', 'food10', 'mixed70', 'real', 'top1', None, None),
    (FOOD, 'all layers binary', 'binary', 'food10', 'bin', 'real', 'top1', 'conv', 'binary'),
    ('CNN 1.4M, CIFAR-10', 'all layers binary, a ramp', 'binary', 'cifar10', 'bin_ramp', 'real', 'top1', None, None),
    ('CNN 1.4M, CIFAR-10', '... low-bit and real with a teacher', 'binary', 'cifar10', 'bin_taught', 'real_taught', 'top1',
     None, None),
    ('DistilBERT shape, 1.5M, SST-2', 'none: low-rank Adam, rank 6', None, 'sst2', 'rsvd6_columns', 'full', 'all_accuracy',
     None, None)]


def write_summary():
    """Fill the table of README.md: quality, training memory, file and time of low-bit models beside their baselines."""
    bits = {r['name']: f'{r["bits"]:.2f}' for r in keep.read('layers')}
    rows, last = [], ''
    for model, part, form, name, variant, baseline, key, bench, kind in SUMMARY:
        runs, base = (runs_of(name).get(v) for v in (variant, baseline))
        if not runs or not base:
            continue
        digits, scale, unit = (4, 1, 'nats') if 'loss' in key else (2, 100, 'points')
        group = {'runs': list(runs.values()), 'pairs': [(runs[s], base[s]) for s in runs if s in base]}
        twin = {'runs': [full for _, full in group['pairs']]}
        quality = f'{mean(key, digits, scale)(group)} against {mean(key, digits, scale)(twin)} (n={len(runs)})'
        steps, memory, ms, file = {r['variant']: r for r in keep.read(name) if 'seed' not in r}, '-', '-', '-'
        for r in keep.read(bench) if bench else ():
            if (r.get('kind') or r.get('name'), r.get('dtype')) == (kind, 'bfloat16') and r.get('step') in (None, 'muon'):
                memory, ms = f'{r["peak_ratio"]:.2f}', f'{r.get("ratio", r.get("net_ratio")):.2f}'
        if variant in steps:                        # measured apart from the runs
            step, full = steps[variant], steps[baseline]
            memory, ms = (f'{step[k] / full[k]:.2f}' for k in ('peak_bytes', 'ms_per_step'))
        if form:
            file = ' of '.join(f'{g["runs"][0]["packed_file_bytes"] / 1e6:.2f}' for g in (group, twin))
        rows.append(('' if model == last else f'[{model}](results/{name}.md)', part, bits.get(form, '32'), quality,
                     f'{gap(key, digits, scale)(group)} {unit}', memory, file, ms))
        last = model
    schemes = {r['scheme']: r for r in keep.read('ptq_schemes')}
    if {'fp', 'gptq4'} <= schemes.keys():
        fp, best = schemes['fp'], schemes['gptq4']
        rows.append(('[GPT 5.9M, WikiText-2](results/ptq_schemes.md)', 'block matrices, GPTQ', f'{best["bits"]:.2f}',
                     f'{best["loss"]:.4f} against {fp["loss"]:.4f}', f'{best["delta"]:+.4f} nats', '-',
                     f'{best["file_bytes"] / 1e6:.2f} of {fp["file_bytes"] / 1e6:.2f}', f'{best["ratio_1"]:.2f} (one token)'))
    columns = ('model and data', 'low-bit part', 'bits', 'val loss or accuracy', 'gap', 'memory, ×', 'file, MB', 'time, ×')
    keep.fill('summary', '\n'.join(table({c: lambda r, i=i: r[i] for i, c in enumerate(columns)}, rows)))


def picture(name):
    """results/<name>.png: validation loss against tokens, one line and one band over the seeds for each variant from random
    weights whose label does not start with '...'."""
    from report.plot_runs import draw_loss
    variants = EXPERIMENTS[name].variants
    logs = {f'{variants[v][0]} (n={len(runs)})': [[e for e in r['evaluations'] if e['step']] for r in runs.values()]
            for v, runs in runs_of(name).items()}
    logs = {label: log for label, log in logs.items() if not label.startswith('...') and 'trained on' not in label}
    figure, _ = draw_loss(logs)
    figure.axes[0].set_ylabel(f'validation loss (nats per {"token" if name in SUBWORDS else "byte"})')
    figure.savefig(ROOT / 'results' / f'{name}.png', dpi=100)
    keep.shrink(name)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', nargs='?', choices=[*EXPERIMENTS, *BENCHES])
    parser.add_argument('--seeds', default='', help='e.g. 1,2,3')
    parser.add_argument('--only', default='', help='variants, separated by commas')
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time, each on its share of the cores')
    parser.add_argument('--table', action='store_true', help='train nothing')
    parser.add_argument('--steps', action='store_true', help='only memory and time of a step, of methods of finetune_cls.py')
    a = parser.parse_args()
    if not a.name and not a.table:
        parser.error('which one? or --table for the tables of all')
    if a.name in BENCHES and not a.table:
        rows = ROOT / 'out' / 'bench' / f'{a.name}.jsonl'
        rows.parent.mkdir(parents=True, exist_ok=True)
        rows.unlink(missing_ok=True)
        for command in BENCHES[a.name][0]:
            subprocess.run([sys.executable, 'bench.py', *command.split(), f'--json={rows}'], cwd=ROOT, check=True)
        keep.write(f'{a.name}.jsonl', rows.read_text())
    elif a.steps and not a.table:
        measure_steps(a.name)
    elif not a.table:
        variants = EXPERIMENTS[a.name].variants
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
        threads = max(1, cores // a.jobs)
        chosen = a.only.split(',') if a.only else [v for v, (_, options) in variants.items() if options is not None]
        if unknown := [v for v in chosen if variants.get(v, (0, None))[1] is None]:
            parser.error(f'{unknown[0]} is no variant that can be run')
        jobs = [(a.name, v, int(s), threads) for s in (a.seeds or EXPERIMENTS[a.name].seeds).split(',') for v in chosen]
        after = lambda job: '{seed}' in variants[job[1]][1]             # it needs another run of its seed
        for later in (False, True):
            with ThreadPoolExecutor(a.jobs) as pool:
                list(pool.map(lambda job: train(*job), [job for job in jobs if after(job) == later]))
        if a.name == 'tinystories':
            keep_texts(a.name)
    for name in [a.name] if a.name else [*EXPERIMENTS, *BENCHES]:
        write_tables(name)
    write_summary()


if __name__ == '__main__':
    main()
