"""
Draw what runs logged and benches measured: run folders or a file of rows to one picture or one screen of text.

    python plot.py loss out/a out/b           training and validation loss of one or more runs -> out/a/loss.png
    python plot.py status out/a --watch       how far a run is, how fast, how long it still takes
    python plot.py bars results/stats.jsonl   a bar for each row that bench.py --json wrote -> results/stats.png

Of finetune_cls.py, one task and model at a time; a RUN is the folder of a run or one above a sweep of them (out/sweep):

    python plot.py ranks RUN...               evaluation and training loss at the last epoch against rank
    python plot.py memory RUN...              what the peak memory of training is made of, a bar for each run
    python plot.py optimizer RUN...           bytes of optimizer state against rank, beside AdamW's
    python plot.py pareto RUN...              accuracy against peak memory, labelled with the ranks

Each writes COMMAND.png into the first folder typed. Seeds or folds of one method and rank are one point: their mean,
with their standard deviation as error bars.

No torch here, and matplotlib is only imported to draw: `status` answers at once, also on a machine busy training.
"""
import argparse
import ast
import csv
import itertools
import json
import math
import os
import statistics
import sys
import time

from configurator import fail

# Okabe-Ito: told apart with any common colour blindness. Markers differ too, for prints in grey.
COLORS = ['#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000']
MARKERS = ['o', 's', '^', 'D', 'v', 'P', 'X', '*']  # one more than colours: eighth and first differ

# -----------------------------------------------------------------------------
# reading a run folder


def load_log(run):
    """run folder -> (list of records, number of damaged lines). A last line still being written is neither."""
    path = os.path.join(run, 'log.jsonl')
    if not os.path.isdir(run):
        fail(f'{run} is not a folder; type the out_dir of a run, the folder that holds log.jsonl')
    if not os.path.isfile(path):
        fail(f'{run} holds no log.jsonl; type the out_dir of a run that has started')
    records, damaged = [], 0
    with open(path, encoding='utf-8', errors='replace') as f:
        for line in f:
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict) and isinstance(record.get('step'), int):
                records.append(record)
            elif line.strip() and line.endswith('\n'):  # no newline yet: the trainer is still writing it
                damaged += 1
    if not records:
        fail(f'{path} holds no record ({damaged} damaged lines); wait for the first one or restart the run')
    return records, damaged


def load_config(run):
    """run folder -> dict of the plain constants in config.py ({} without the file). Parsed, never executed."""
    path = os.path.join(run, 'config.py')
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding='utf-8') as f:
            tree = ast.parse(f.read())
    except (SyntaxError, ValueError) as e:
        fail(f'{path} is not Python ({e}); restore or delete it')
    config = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                config[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                pass  # an expression: not a constant, so not for us
    return config


def measured(records, *keys):
    """The records in which all of `keys` are finite numbers: null marks the unmeasured, nan a broken step."""
    return [r for r in records if all(isinstance(r.get(k), (int, float)) and math.isfinite(r[k]) for k in keys)]


def figures(run, name):
    """A file of a run folder -> dict: all of a yaml, {part: bytes} of a csv of those, the last row of any other csv."""
    import yaml
    path = os.path.join(run, name)
    try:
        with open(path, encoding='utf-8', newline='') as f:
            rows = list(csv.DictReader(f)) if name.endswith('.csv') else [yaml.safe_load(f)]
    except (OSError, ValueError, csv.Error, yaml.YAMLError) as e:
        fail(f"cannot read {path} ({' '.join(str(e).split())}); type runs of finetune_cls.py that have finished")
    if not rows or not isinstance(rows[-1], dict):
        fail(f'{path} holds no row or mapping; type runs of finetune_cls.py that have finished')
    return {row['part']: row['bytes'] for row in rows} if rows[-1].keys() == {'part', 'bytes'} else rows[-1]


def number(run, name, key):
    """One of the figures as a finite number; one clear line for any other."""
    found = figures(run['run'], name).get(key)
    try:
        value = float(found)  # csv gives text, and so does yaml for 1e-3
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        fail(f"{os.path.join(run['run'], name)}: {key} is {found!r}, no number; type runs that measured it")
    return value


def load_runs(paths):
    """Run folders, or folders above them -> a dict for each: results.yaml over config.py, and its folder as 'run'.

    All of one task and model. rank is None for a method that has none. Sorted: full, then by method, rank and seed.
    """
    folders = {}
    for path in paths:
        if not os.path.isdir(path):
            fail(f'{path} is not a folder; type the out_dir of a run, or a folder above several')
        found = [folder for folder, _, files in os.walk(path) if 'results.yaml' in files]
        if not found:
            fail(f'no results.yaml in or under {path}; type the out_dir of a run that has finished, or a folder above several')
        for folder in found:
            folders.setdefault(os.path.realpath(folder), folder)  # a run and the folder above it: still one run
    runs = []
    for folder in folders.values():
        run = {'fold': -1} | load_config(folder) | figures(folder, 'results.yaml') | {'run': folder}
        if missing := [key for key in ('task', 'model', 'method', 'seed') if run.get(key) is None]:
            fail(f"{folder}/results.yaml has no {', '.join(missing)}; type runs of finetune_cls.py")
        run |= {key: str(run[key]) for key in ('task', 'model', 'method', 'seed')}
        if run['method'] == 'full' or not run.get('rank'):
            run['rank'] = None
        elif not isinstance(run['rank'], int) or run['rank'] < 1:
            fail(f"{folder}/results.yaml: rank is {run['rank']!r}, no whole number; type other runs")
        runs.append(run)
    for key in ('task', 'model'):
        one, *others = {run[key]: run for run in runs}.values()
        if others:
            fail(f"two {key}s in one picture, {one[key]} ({one['run']}) and {others[0][key]} ({others[0]['run']}); "
                 f'type runs of one {key}')
    return sorted(runs, key=lambda r: (r['method'] != 'full', r['method'], r['rank'] or 0, len(r['seed']), r['seed']))


# -----------------------------------------------------------------------------
# pictures


def subplots(columns=1, size=(8, 5), grid='both', title=''):
    """-> (figure, a row of axes)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display needed, and no pyplot that keeps all figures
    from matplotlib.figure import Figure
    fig = FigureCanvasAgg(Figure(size, layout='constrained')).figure
    axes = fig.subplots(1, columns, squeeze=False)
    for ax in axes[0]:
        ax.set_title(title, fontsize=9)
        ax.grid(color='0.92', axis=grid)
        ax.set_axisbelow(True)
        ax.spines[['top', 'right']].set_visible(False)
    return fig, axes[0]


def save(fig, out, what):
    """Write the picture and say what is on it."""
    try:
        fig.savefig(out, dpi=150)
    except (OSError, ValueError) as e:
        fail(f'cannot write {out} ({e}); type --out=some/existing/folder/picture.png')
    print(f'{out}: {what}')


# -----------------------------------------------------------------------------
# loss


def smoothed(values, n):
    """Centred running mean over n values, over fewer at the two ends: follows a fast early drop without lagging."""
    sums = [0.0, *itertools.accumulate(values)]
    spans = [(max(0, i - (n - 1) // 2), min(len(values), i + n // 2 + 1)) for i in range(len(values))]
    return [(sums[b] - sums[a]) / (b - a) for a, b in spans]


def bpb_ratio(records):
    """Bits per byte of one nat per token: fixed by tokenizer and text. None if unmeasured or not one constant."""
    ratios = [r['val_bpb'] / r['val_loss'] for r in measured(records, 'val_loss', 'val_bpb')
              if min(r['val_loss'], r['val_bpb']) > 0]
    return ratios[-1] if ratios and max(ratios) <= 1.001 * min(ratios) else None  # 0.1 %: room for rounded figures


def draw_loss(logs, smooth=0):
    """{label: records} -> (figure, one line that says what is on it)."""
    from matplotlib.ticker import EngFormatter
    shown = [r for records in logs.values() for r in measured(records, 'loss') + measured(records, 'val_loss')]
    x = 'tokens' if len(measured(shown, 'tokens')) == len(shown) else 'step'
    ratios = [bpb_ratio(records) for records in logs.values()]
    one_ratio = None not in ratios and max(ratios) <= 1.001 * min(ratios)
    heights = []  # what the y axis must hold

    fig, (ax,) = subplots()
    for i, (label, records) in enumerate(logs.items()):
        color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        train, val = measured(records, 'loss'), measured(records, 'val_loss')
        train_x, val_x = [r[x] for r in train], [r[x] for r in val]
        train_y, val_y = [r['loss'] for r in train], [r['val_loss'] for r in val]
        smooth_y = smoothed(train_y, smooth or max(1, len(train) // 50))
        final = []
        if val:
            bpb = f" = {val[-1]['val_bpb']:.3f} bits/byte" if measured(val[-1:], 'val_bpb') else ''
            final.append(f'val {val_y[-1]:.3f}{bpb}' + f', best {min(val_y):.3f}' * (min(val_y) < val_y[-1]))
        if train:
            final.append(f'train {smooth_y[-1]:.3f}')
        ax.plot(train_x, train_y, color=color, lw=0.6, alpha=0.25)
        ax.plot(train_x, smooth_y, color=color, lw=1.2)
        dots = dict(marker=marker if val else '', markersize=6 if len(val) <= 50 else 3.5, mec='white', mew=0.6)
        ax.plot(val_x, val_y, ls='', color=color, zorder=3, **dots)
        ax.plot([], [], color=color, lw=1.2, label=f"{label}: {', '.join(final)}", **dots)  # one legend entry for both
        # The drop from ln(vocab) in the first 5 % of a run would flatten all that follows: it may leave at the top.
        points = list(zip(train_x + val_x, smooth_y + val_y, strict=True))
        heights += [height for at, height in points if at >= 0.05 * max(train_x + val_x)]
    pad = 0.05 * (max(heights) - min(heights)) or 0.1
    ax.set_ylim(min(heights) - pad, max(heights) + pad)
    ax.margins(x=0.02)
    ax.set_xlabel('training tokens' if x == 'tokens' else 'step')
    if x == 'tokens':
        ax.xaxis.set_major_formatter(EngFormatter())
    ax.set_ylabel('loss (nats per token)' if measured(shown, 'tokens') else 'loss (nats)')
    if one_ratio:
        right = ax.secondary_yaxis('right', functions=(lambda y: y * ratios[0], lambda y: y / ratios[0]))
        right.set_ylabel('bits per byte (validation text)')
    ax.legend(title='line: training (smoothed), markers: validation', loc='upper right', fontsize=9, title_fontsize=8)

    if one_ratio:
        note = f'1 nat per token = {ratios[0]:.4f} bits per byte'
    elif any(ratios):
        note = 'no bits-per-byte axis: not one tokenizer for all runs, so compare bits/byte, not nats'
    else:
        note = 'no bits-per-byte axis: no constant val_bpb / val_loss in the logs'
    return fig, f'loss against {x}, {note}'


def loss(args):
    if args.smooth < 0:
        fail(f'--smooth={args.smooth} is no number of records; type --smooth=1 for the raw curve')
    names = [os.path.basename(os.path.abspath(run)) for run in args.runs]
    logs = {}
    for run, name in zip(args.runs, names, strict=True):
        records, damaged = load_log(run)
        if damaged:
            print(f'{run}/log.jsonl: {damaged} damaged line(s) skipped')
        if not measured(records, 'loss') + measured(records, 'val_loss'):
            fail(f'{run}/log.jsonl has neither loss nor val_loss; type a run that has logged one')
        logs[name if names.count(name) == 1 else run] = records
    fig, what = draw_loss(logs, args.smooth)
    save(fig, args.out or os.path.join(args.runs[0], 'loss.png'), what)


# -----------------------------------------------------------------------------
# bars

# What a bar is of, by bench.py command, unless --value names another number of the rows; its last word gives the unit.
VALUES = {'stats': 'actual_bytes', 'compare': 'relative', 'fit': 'loss', 'layers': 'forward_ms', 'train': 'ms'}
UNITS = {'bytes': ('MiB', 2 ** -20), 'ms': ('milliseconds', 1), 'ratio': ('times the baseline', 1), 'loss': ('loss, nats', 1),
         'error': ('relative RMS error of weights', 1), 'relative': ('relative RMS difference of outputs', 1)}


def load_rows(path):
    """JSON lines of bench.py -> list of dicts; one clear line for a file that holds none."""
    try:
        with open(path, encoding='utf-8') as f:
            rows = [json.loads(line) for line in f if line.strip()]
    except (OSError, ValueError) as e:
        fail(f'cannot read {path} ({e}); type the file that bench.py wrote with --json=...')
    if not rows or not all(isinstance(r, dict) and 'bench' in r for r in rows):
        fail(f'{path} holds no rows of bench.py; type the file that it wrote with --json=...')
    return rows


def bars(args):
    rows = load_rows(args.rows)
    value = args.value or VALUES.get(rows[0]['bench'], '')
    every, rows = rows, [r for r in rows if r['bench'] == rows[0]['bench'] or (args.value and args.value in r)]
    rows = [r for r in rows if value not in r or r[value] is not None]                  # not measured for this one
    if missing := [r for r in rows if not isinstance(r.get(value), (int, float))]:
        numbers = sorted(k for k, v in missing[0].items() if isinstance(v, (int, float)) and not isinstance(v, bool))
        fail(f'{args.rows} has rows without a number {value!r}; type --value= and one of {", ".join(numbers)}')
    unit, factor = UNITS.get(value.rsplit('_', 1)[-1], (value, 1))
    panels = {}                                             # one for each size or dtype: only like is beside like
    for r in rows:
        size = f"{r['tokens']} tokens × {r['in']} → {r['out']}" if 'tokens' in r else r.get('dtype', '')
        panels.setdefault(size, {})[str(r.get('name', r.get('kind')))] = r[value] * factor      # a later row replaces
    most = max(map(len, panels.values()))
    fig, axes = subplots(len(panels), (2 + 4.5 * len(panels), 1 + 0.28 * most), grid='x')
    for ax, (size, found) in zip(axes, panels.items(), strict=True):
        drawn = ax.barh(list(found), list(found.values()), color=COLORS[0])
        ax.bar_label(drawn, fmt=lambda v: f'{v:.4g}', padding=3, fontsize=8)
        ax.invert_yaxis()
        ax.margins(x=0.18)
        ax.set(xlabel=unit, title=size)
    fig.suptitle(f"{rows[0]['bench']}: {value}, {rows[0].get('device', '')}", fontsize=9)
    save(fig, args.out or os.path.splitext(args.rows)[0] + '.png',
         f'{value} of {sum(map(len, panels.values()))} of {len(every)} rows')


# -----------------------------------------------------------------------------
# ranks, memory, optimizer, pareto: the runs of finetune_cls.py

MIB = 2 ** 20
PARTS = {'parameters': 'parameters', 'buffers': 'buffers', 'gradients': 'gradients', 'optimizer': 'optimizer state',
         'rest': 'activations and temporaries'}
mib = lambda value: f'{value:,.0f}' if value >= 100 else f'{value:.3g}'
titled = lambda runs: f"{runs[0]['task']}, {runs[0]['model']}"
about = lambda runs: f"{len(runs)} run{'s' * (len(runs) > 1)} of {titled(runs)}"


def grouped(runs):
    """Runs -> ({(method, rank): its seeds or folds}, {method: (colour, marker)}, what the printed line says of them)."""
    groups, seen = {}, {}
    for run in runs:
        key = run['method'], run['rank']
        twin = seen.setdefault((*key, run['seed'], run['fold']), run)
        if twin is not run:  # they differ in another setting: no two samples of one thing
            fail(f"{twin['run']} and {run['run']} are of one method, rank, seed and fold; type only one of them")
        groups.setdefault(key, []).append(run)
    methods = list(dict.fromkeys(run['method'] for run in runs))
    looks = {m: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i, m in enumerate(methods)}
    several = [method for (method, _), seeds in groups.items() if len(seeds) > 1]
    repeats = 'folds' if len({run['fold'] for run in runs}) > 1 else 'seeds'
    note = f"; mean and sd across {repeats} in {len(several)} of {len(groups)} points ({', '.join(dict.fromkeys(several))})"
    return groups, looks, f'{about(runs)}' + note * bool(several)


def lines_by_rank(ax, groups, looks, value, **line):
    """value(run) against rank, a line for each method: mean over seeds, sd as error bars. A level where there is no rank."""
    ranks = sorted({rank for _, rank in groups if rank})
    if not ranks:
        fail('none of these runs has a rank; type runs of a low-rank method too')
    for i, (method, (color, marker)) in enumerate(looks.items()):
        width = 2.25 - 1.25 * i / len(looks)  # thinner and thinner: equal methods would hide each other
        style = dict(color=color, lw=width, ms=4 * width, label='_') | line
        seeds = {rank: [value(run) for run in runs] for (m, rank), runs in groups.items() if m == method}
        points = {rank: (statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else math.nan) for rank, v in seeds.items()}
        if None in points:
            mean, sd = points.pop(None)
            ax.axhline(mean, **style)
            ax.axhspan(mean - sd, mean + sd, color=color, alpha=0.12, lw=0)  # sd nan: nothing
        if points:
            ax.errorbar(list(points), *zip(*points.values(), strict=True), marker=marker, capsize=3, **style)
        if 'ls' not in line:  # one legend entry for both lines of a method
            ax.plot([], [], marker=marker if points else '', **style | {'label': method})
    ax.set_xscale('log', base=2)
    ax.set_xticks(ranks, map(str, ranks))
    ax.minorticks_off()
    ax.set_xlabel('rank')


def draw_ranks(runs):
    """Runs -> (figure, one line that says what is on it); so do the three below."""
    groups, looks, which = grouped(runs)
    fig, (ax,) = subplots(title=titled(runs))
    lines_by_rank(ax, groups, looks, lambda r: number(r, 'epoch_loss.csv', 'eval_loss'))
    lines_by_rank(ax, groups, looks, lambda r: number(r, 'epoch_loss.csv', 'train_loss'), ls='--', mfc='white')
    for ls, label in (('-', 'evaluation'), ('--', 'training')):
        ax.plot([], [], color='0.4', lw=1.2, ls=ls, label=label)
    ax.set_ylabel('loss at the last epoch (nats)')
    fig.legend(loc='outside right upper', fontsize=9)
    return fig, f'loss at the last epoch against rank, {which}'


def draw_memory(runs):
    labels = [run['method'] + f", rank {run['rank']}" * bool(run['rank']) for run in runs]
    for more in ('seed {seed}', 'fold {fold}', '{run}'):  # only where needed to tell runs apart
        labels = [a if labels.count(a) == 1 else f'{a}, {more.format(**run)}' for a, run in zip(labels, runs, strict=True)]
    sizes = [{part: number(run, 'memory_breakdown.csv', part) / MIB for part in (*PARTS, 'peak')} for run in runs]
    for run, size in zip(runs, sizes, strict=True):
        if min(size.values()) < 0 or abs(sum(size.values()) - 2 * size['peak']) > 0.001 * size['peak']:
            fail(f"{run['run']}/memory_breakdown.csv: a part is negative, or they do not add up to the peak; type other runs")
    fig, (ax,) = subplots(size=(8, 1.3 + 0.28 * len(runs)), grid='x', title=titled(runs))
    left = [0.0] * len(runs)
    for color, (part, name) in zip(COLORS, PARTS.items(), strict=False):
        widths = [size[part] for size in sizes]
        if part != 'buffers' or any(widths):
            drawn = ax.barh(range(len(runs)), widths, left=left, color=color, ec='white', lw=0.5, label=name)
            left = [a + b for a, b in zip(left, widths, strict=True)]
    ax.bar_label(drawn, [mib(size['peak']) for size in sizes], padding=3, fontsize=8)
    ax.set_yticks(range(len(runs)), labels, fontsize=9)
    ax.set_ylim(len(runs) - 0.4, -0.6)
    ax.margins(x=0.08)
    ax.set_xlabel('peak memory of training, MiB')
    fig.legend(loc='outside lower center', ncols=5, fontsize=8, columnspacing=1.2, handlelength=1.2)
    return fig, f'parts of peak memory, {about(runs)}'


def draw_optimizer(runs):
    from matplotlib.ticker import LogLocator
    groups, looks, which = grouped(runs)
    used, adam = ([number(run, 'optimizer_memory.csv', key) / MIB for run in runs] for key in ('bytes', 'adam_bytes'))
    if min(used + adam) <= 0:  # SGD without momentum
        at = runs[min(range(len(runs)), key=lambda i: min(used[i], adam[i]))]['run']
        fail(f'{at}/optimizer_memory.csv has 0 bytes, nothing for a log axis; type other runs')
    fig, (ax,) = subplots(title=titled(runs))
    ax.set_yscale('log')
    lines_by_rank(ax, groups, looks, lambda r: number(r, 'optimizer_memory.csv', 'bytes') / MIB, mfc='none', mew=1.5)
    ends = sorted({min(adam), max(adam)})  # adapters are parameters too, so AdamW's bytes may rise with rank a little
    for end in ends:
        ax.axhline(end, color='black', ls=':', lw=1.5, label='_')
    ax.plot([], [], color='black', ls=':', lw=1.5, label=f"AdamW, all parameters:\n{' to '.join(map(mib, ends))} MiB")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(lambda value, _: mib(value))
    ax.set_ylabel('optimizer state, MiB')
    fig.legend(loc='outside right upper', fontsize=9)
    return fig, f'optimizer state against rank, beside that of AdamW, {which}'


def label_points(ax, points):
    """(x, y, low, high, text, colour): the text beside each point, near and off markers, texts and, if it can, error bars."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox
    ax.figure.draw_without_rendering()  # settles the layout: places are compared in pixels
    taken = [(4, Bbox([at, at]).padded(5)) for at in ax.transData.transform([p[:2] for p in points])]
    taken += [(1, Bbox(ax.transData.transform([(x, low), (x, high)])).padded(1)) for x, _, low, high, *_ in points]
    places = [(x * far, y * far) for far in (5, 9, 14, 20) for x, y in ((1, 1), (-1, 1), (1, -1), (-1, -1), (1, 0), (-1, 0))]
    for x, y, _, _, text, color in points:
        note = ax.annotate(text, (x, y), (0, 0), textcoords='offset points', fontsize=8, color=color,
                           bbox=dict(fc='white', ec='none', alpha=0.7, pad=0.3),
                           arrowprops=dict(arrowstyle='-', color=color, lw=0.5, shrinkA=0, shrinkB=0) if text else None)

        def cost(place, note=note):
            note.xyann = place
            note.set(ha='left' if place[0] > 0 else 'right', va=('center', 'bottom', 'top')[(place[1] > 0) - (place[1] < 0)])
            note.update_positions(ax.figure.canvas.get_renderer())
            box = Text.get_window_extent(note)  # without the line to its point
            return sum(weight * box.overlaps(other) for weight, other in taken) + max(map(abs, place)) / 9

        cost(min(places, key=cost))  # and so it is placed
        taken.append((4, Text.get_window_extent(note)))


def draw_pareto(runs):
    groups, looks, which = grouped(runs)
    fig, (ax,) = subplots(title=titled(runs))
    points, several = [], max(map(len, groups.values())) > 1
    for (method, rank), seeds in groups.items():
        color, marker = looks[method]
        x, y, low, high = (statistics.fmean(number(run, 'results.yaml', key) for run in seeds)
                           for key in ('peak_bytes', 'accuracy', 'accuracy_low', 'accuracy_high'))
        if len(seeds) > 1:
            sd = statistics.stdev(number(run, 'results.yaml', 'accuracy') for run in seeds)
            low, high = y - sd, y + sd
        ax.errorbar(x / MIB, y, [[max(0, y - low)], [max(0, high - y)]], color=color, marker=marker, ms=6, mec='white',
                    mew=0.6, elinewidth=0.7, capsize=2, ls='', label='_' if any(p[-1] == method for p in points) else method)
        points.append((x / MIB, y, low, high, f"{rank or ''}" + f' (n={len(seeds)})' * (len(seeds) > 1), method))
    front = [p[:2] for p in points if not any(q[0] <= p[0] and q[1] >= p[1] and q[:2] != p[:2] for q in points)]
    ax.step(*zip(*sorted(front), strict=True), where='post', color='0.7', lw=1, zorder=0, label='Pareto front')
    ax.set(xlabel='peak memory of training, MiB', ylabel='accuracy')
    ax.margins(x=0.06)
    title = 'number: rank\nbar: 95% interval' + '\nn runs: mean and sd' * several
    fig.legend(loc='outside right upper', fontsize=9, title=title, title_fontsize=8, alignment='left')
    label_points(ax, [(*p[:-1], looks[p[-1]][0]) for p in points])
    return fig, f'accuracy with its 95% interval against peak memory, {which}'


def draw_runs(args):
    fig, what = args.draw(load_runs(args.runs))
    save(fig, args.out or os.path.join(args.runs[0], f'{args.name}.png'), what)


# -----------------------------------------------------------------------------
# status


def duration(s):
    """Seconds as text in the two largest units."""
    s = max(0, round(s))
    if s < 60:
        return f'{s} s'
    if s < 3600:
        return f'{s // 60} min {s % 60:02d} s'
    return f'{s // 3600} h {s % 3600 // 60:02d} min' if s < 86400 else f'{s // 86400} d {s % 86400 // 3600:02d} h'


def status_text(run, now):
    """run folder, unix time -> (the screen, whether the run is finished)."""
    records, damaged = load_log(run)
    of_epochs = [r['max_iters'] for r in records if 'max_iters' in r]  # what a number of epochs comes to
    max_iters = load_config(run).get('max_iters') or (of_epochs[-1] if of_epochs else None)
    step = max(r['step'] for r in records)
    age = max(0, now - os.path.getmtime(os.path.join(run, 'log.jsonl')))  # records carry no clock; the file does
    train = [r for r in records if r.get('loss') is not None]  # nan is shown, not hidden
    val = measured(records, 'val_loss')
    # The median of the last 20 records: a compiling, evaluating or checkpointing step does not bend the forecast.
    ms, *per_s = (statistics.median([r[key] for r in measured(records, key)[-20:]] or [math.nan])
                  for key in ('ms', 'tokens_per_s', 'samples_per_s'))
    finished = max_iters is not None and step >= max_iters
    gap_s = (step - max((r['step'] for r in records if r['step'] < step), default=step)) * ms / 1000
    late = age > max(60, 5 * gap_s if math.isfinite(gap_s) else 0)  # five missed records, and never under a minute

    lines = [('run', run)]
    lines.append(('step', f'{step} of {max_iters} ({step / max(1, max_iters):.0%})' if max_iters is not None else
                  f'{step} (no max_iters in config.py or log.jsonl, so no time left)'))
    if train:
        lines.append(('loss', f"{train[-1]['loss']:.4f} at step {train[-1]['step']}"))
    if val:
        best = min(val, key=lambda r: r['val_loss'])
        lines.append(('val loss', f"last {val[-1]['val_loss']:.4f} at step {val[-1]['step']}, "
                                  f"best {best['val_loss']:.4f} at step {best['step']}"))
    speed = [f'{n:,.0f} {what}/s' for n, what in zip(per_s, ('tokens', 'samples'), strict=True) if math.isfinite(n)]
    speed += [f'{ms:,.1f} ms/step'] * math.isfinite(ms)
    lines.append(('speed', ', '.join(speed) or 'not measured yet'))
    if max_iters is not None and not finished and math.isfinite(ms):
        lines.append(('time left', f'{duration((max_iters - step) * ms / 1000)} (evaluation not counted)'))
    if finished:
        lines.append(('state', f'finished, last record {duration(age)} ago'))
    elif late:
        lines.append(('state', f'no new record for {age / 60:.0f} min: stopped, or in a long evaluation'))
    else:
        lines.append(('state', f'running, last record {duration(age)} ago'))
    if damaged:
        lines.append(('log.jsonl', f'{damaged} damaged line(s) skipped'))
    checkpoints = sorted(name for name in os.listdir(run) if name.endswith('.pt'))
    for name in checkpoints:
        try:
            stat = os.stat(os.path.join(run, name))
        except FileNotFoundError:
            continue  # renamed by the trainer between the two lines
        lines.append((name, f'{stat.st_size / 1e6:,.1f} MB, {duration(now - stat.st_mtime)} ago'))
    if not checkpoints:
        lines.append(('checkpoint', 'none yet'))
    return '\n'.join(f'{name:<13} {text}' for name, text in lines), finished


def status(args):
    if not 0 < args.interval < 86400:
        fail(f'--interval={args.interval} is no pause in seconds; type --interval=2')
    finished = False
    try:
        while not finished:
            text, finished = status_text(args.run, time.time())
            if args.watch and sys.stdout.isatty():
                print('\x1b[2J\x1b[H', end='')  # clear, home: one screen redrawn in place
            print(text, flush=True)
            if not args.watch:
                break
            if not finished:
                time.sleep(args.interval)
    except KeyboardInterrupt:
        pass  # the way out of --watch


# -----------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, like every other mistake
        fail(f'{message}; type {self.prog} --help')


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar='command')
    p = commands.add_parser('loss', help='training and validation loss of runs, as a picture')
    p.add_argument('runs', nargs='+', metavar='out/run')
    p.add_argument('--out', metavar='PNG', help='default: loss.png in the first run folder')
    p.add_argument('--smooth', type=int, default=0, metavar='N',
                   help='training records in the running mean; 1: raw; default: a fiftieth of the run')
    p.set_defaults(run_command=loss)
    p = commands.add_parser('status', help='how far a run is, how fast, how long it still takes')
    p.add_argument('run', metavar='out/run')
    p.add_argument('--watch', action='store_true', help='redraw until finished or Ctrl-C')
    p.add_argument('--interval', type=float, default=2.0, metavar='S', help='seconds between redraws')
    p.set_defaults(run_command=status)
    p = commands.add_parser('bars', help='a bar for each row that bench.py --json wrote, as a picture')
    p.add_argument('rows', metavar='PATH.jsonl')
    p.add_argument('--value', default='', help='a number of the rows, e.g. error, forward_ratio, backward_bytes')
    p.add_argument('--out', metavar='PNG', help='default: beside the rows')
    p.set_defaults(run_command=bars)
    for draw, text in ((draw_ranks, 'loss at the last epoch against rank'), (draw_memory, 'parts of the peak memory of runs'),
                       (draw_optimizer, 'bytes of optimizer state against rank'), (draw_pareto, 'accuracy against memory')):
        name = draw.__name__.removeprefix('draw_')
        p = commands.add_parser(name, help=f'{text}, as a picture')
        p.add_argument('runs', nargs='+', metavar='RUN', help='folder of a run of finetune_cls.py, or a folder above several')
        p.add_argument('--out', metavar='PNG', help=f'default: {name}.png in the first folder typed')
        p.set_defaults(run_command=draw_runs, draw=draw, name=name)
    args = parser.parse_args()
    args.run_command(args)


if __name__ == '__main__':
    main()
