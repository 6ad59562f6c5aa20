"""Shared parts of all pictures: colors and markers, run folders and their logs, seeds, axes, labels, saving."""
import ast
import json
import math
import os
import statistics

from configurator import fail

# Okabe-Ito colors: readers with any common color blindness can tell them apart. Markers and dashes are for prints in grey.
COLORS = ['#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000']
MARKERS = ['o', 's', '^', 'D', 'v', 'P', 'X', '*']  # one more than colors, so the eighth line differs from the first
DASHES = ['-', (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1.5, 1))]
# Constants that change no result but by chance, so seeds of one variant may differ in them.
ONLY_OF_A_RUN = {'seed', 'out_dir', 'resume', 'overwrite', 'wandb_log', 'wandb_project', 'wandb_run_name', 'model_name',
                 'gpu_type', 'profile'}
BAND = 'several seeds: mean, shaded from min to max'


def look(i):
    """Color, marker and dashes of line i."""
    return dict(color=COLORS[i % len(COLORS)], marker=MARKERS[i % len(MARKERS)], ls=DASHES[i % len(DASHES)])


# -----------------------------------------------------------------------------
# reading a run folder


def load_log(run):
    """Run folder -> (list of records, number of damaged lines). Ignores a last line that the trainer is still writing."""
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
    """Run folder -> dict of the plain constants in config.py, {} without the file. Parses the file, never executes it."""
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
                pass  # an expression, not a constant
    return config


def load_logs(runs, wanted, lack):
    """Run folders -> {label: [records of each seed]}. Runs whose config.py differs in the seed alone share a label.

    wanted(records): the records to draw. lack: end of the error message for a run without them. A label is the name of the
    folder, or its path where two folders share a name."""
    runs = list({os.path.realpath(run): run for run in runs}.values())      # a folder typed twice is one run
    variants, logs, names = {}, {}, [os.path.basename(os.path.realpath(run)) for run in runs]
    for run, name in zip(runs, names, strict=True):
        records, damaged = load_log(run)
        if damaged:
            print(f'{run}/log.jsonl: {damaged} damaged line(s) skipped')
        if not wanted(records):
            fail(f'{run}/log.jsonl {lack}')
        config = load_config(run)
        key, seed = repr(sorted((k, v) for k, v in config.items() if k not in ONLY_OF_A_RUN)), config.get('seed')
        if seed is None or seed in variants.get(key, {}):  # the same seed twice is no second sample
            key = run
        variants.setdefault(key, {})[seed] = name if names.count(name) == 1 else run, records
    for seeds in variants.values():
        labels, records = zip(*seeds.values(), strict=True)
        ends = {name: max(r['step'] for r in log) for name, log in seeds.values()}
        if len(set(ends.values())) > 1:
            first = min(ends, key=ends.get)
            print(f'{labels[0]} … {labels[-1]}: the mean ends at step {ends[first]} of {max(ends.values())}, with {first}')
        logs[labels[0] if len(labels) == 1 else f'{labels[0]} … {labels[-1]} ({len(labels)} seeds)'] = records
    return logs


def measured(records, *keys):
    """Records in which all of `keys` are finite numbers. null marks an unmeasured value, nan a broken step."""
    return [r for r in records if all(isinstance(r.get(k), (int, float)) and math.isfinite(r[k]) for k in keys)]


def across_seeds(curves):
    """Curves of seeds, each [(x, y), ...] -> (x, mean, lowest, highest y), at each x that all have, else any has."""
    curves = [dict(curve) for curve in curves if curve] or [{}]
    x = sorted(set.intersection(*map(set, curves)) or set.union(*map(set, curves)))
    at = [[curve[position] for curve in curves if position in curve] for position in x]
    return x, list(map(statistics.fmean, at)), list(map(min, at)), list(map(max, at))


# -----------------------------------------------------------------------------
# pictures


def subplots(columns=1, size=(8, 5), grid='both', title='', rows=1):
    """-> (figure, its axes row by row)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # needs no display; pyplot would keep all figures
    from matplotlib.figure import Figure
    fig = FigureCanvasAgg(Figure(size, layout='constrained')).figure
    axes = fig.subplots(rows, columns, squeeze=False, sharex=rows > 1).ravel()  # only the last row has x labels
    for ax in axes:
        ax.set_title(title, fontsize=9)
        ax.grid(color='0.92', axis=grid)
        ax.set_axisbelow(True)
        ax.spines[['top', 'right']].set_visible(False)
    return fig, axes


def tokens_or_step(records):
    """The x axis of records: tokens if all records have them, else step."""
    return 'tokens' if len(measured(records, 'tokens')) == len(records) else 'step'


def label_x(ax, x):
    from matplotlib.ticker import EngFormatter
    ax.margins(x=0.02)
    if ax.get_subplotspec().is_last_row():
        ax.set_xlabel(f'training {x}' if x == 'tokens' else 'training steps')
    if x == 'tokens':
        ax.xaxis.set_major_formatter(EngFormatter())


def label_points(ax, points):
    """Write the text of each point (x, y, low, high, text, color) beside it, off markers, texts and, if it can, lines."""
    import numpy as np
    from matplotlib.text import Text
    ax.figure.draw_without_rendering()  # settles the layout, because places are compared in pixels
    pixels = ax.figure.dpi / 72
    at = ax.transData.transform([p[:2] for p in points])
    taken = [(4, *(xy - 7), *(xy + 7)) for xy in at]  # (cost, left, low, right, high)
    taken += [(1, *ax.transData.transform((x, a)) - 1, *ax.transData.transform((x, b)) + 1) for x, _, a, b, *_ in points]
    for line in ax.get_lines():
        path = line.get_transform().transform_path(line.get_path()).interpolated(40)
        taken += [(0.3, *(xy - 2), *(xy + 2)) for xy in path.vertices]
    places = [(x * far, y * far) for far in (6, 10, 15, 21, 28, 36, 45)
              for x, y in ((1, 1), (-1, 1), (1, -1), (-1, -1), (1, 0), (-1, 0), (1, 0.5), (-1, -0.5))]
    for xy, (x, y, _, _, text, color) in zip(at, points, strict=True):
        note = ax.annotate(text, (x, y), (0, 0), textcoords='offset points', fontsize=8, color=color,
                           bbox=dict(fc='white', ec='none', alpha=0.7, pad=0.3),
                           arrowprops=dict(arrowstyle='-', color=color, lw=0.5, shrinkA=0, shrinkB=0) if text else None)
        size, costs = Text.get_window_extent(note).size, []  # without the line to its point
        for place in places:
            low = xy + pixels * np.array(place) - size * ((place[0] < 0), (1 - np.sign(place[1])) / 2)
            high, (cost, *edges) = low + size, np.transpose(taken)
            overlaps = (edges[0] < high[0]) & (edges[1] < high[1]) & (edges[2] > low[0]) & (edges[3] > low[1])
            beyond = (low < ax.bbox.min).any() or (high > ax.bbox.max).any()
            costs.append((cost @ overlaps + 4 * beyond + max(map(abs, place)) / 15, place, (4, *low, *high)))
        _, note.xyann, box = min(costs, key=lambda found: found[0])
        note.set(ha='left' if note.xyann[0] > 0 else 'right', va=('center', 'bottom', 'top')[int(np.sign(note.xyann[1]))])
        taken.append(box)


def save(fig, out, what):
    """Write the picture and print what it shows."""
    try:
        fig.savefig(out, dpi=150)
    except (OSError, ValueError) as e:
        fail(f'cannot write {out} ({e}); type --out=some/existing/folder/picture.png')
    print(f'{out}: {what}')
