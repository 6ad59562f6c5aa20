"""
Pictures of runs of finetune_cls.py: ranks, memory, optimizer and pareto.

Seeds or folds of one method and rank are one point: their mean, with their standard deviation as error bars.
"""
import csv
import math
import os
import statistics

from configurator import fail
from report.figure import COLORS, MARKERS, label_points, load_config, subplots

MIB = 2 ** 20
PARTS = {'parameters': 'parameters', 'buffers': 'buffers', 'gradients': 'gradients', 'optimizer': 'optimizer state',
         'rest': 'activations and temporaries'}
mib = lambda value: f'{value:,.0f}' if value >= 100 else f'{value:.3g}'
titled = lambda runs: f"{runs[0]['task']}, {runs[0]['model']}"
about = lambda runs: f"{len(runs)} run{'s' * (len(runs) > 1)} of {titled(runs)}"

# -----------------------------------------------------------------------------
# reading run folders


def figures(run, name):
    """Read a file of a run folder -> dict: a whole yaml, {part: bytes} of a csv with these columns, the last row of another."""
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
    """A value of figures() as a finite number. Anything else ends the program with one line."""
    found = figures(run['run'], name).get(key)
    try:
        value = float(found)  # csv gives text, as does yaml for 1e-3
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        fail(f"{os.path.join(run['run'], name)}: {key} is {found!r}, not a number; type runs that measured it")
    return value


def load_runs(paths):
    """Run folders, or folders above them -> a dict for each run: config.py updated by results.yaml, its folder as 'run'.

    All runs must have one task and one model. rank: None for a method without one. Order: full, then method, rank, seed."""
    folders = {}
    for path in paths:
        if not os.path.isdir(path):
            fail(f'{path} is not a folder; type the out_dir of a run, or a folder above several')
        found = [folder for folder, _, files in os.walk(path) if 'results.yaml' in files]
        if not found:
            fail(f'no results.yaml in or under {path}; type the out_dir of a run that has finished, or a folder above several')
        for folder in found:
            folders.setdefault(os.path.realpath(folder), folder)  # one run, even if both it and the folder above it are typed
    runs = []
    for folder in folders.values():
        run = {'fold': -1} | load_config(folder) | figures(folder, 'results.yaml') | {'run': folder}
        if missing := [key for key in ('task', 'model', 'method', 'seed') if run.get(key) is None]:
            fail(f"{folder}/results.yaml has no {', '.join(missing)}; type runs of finetune_cls.py")
        run |= {key: str(run[key]) for key in ('task', 'model', 'method', 'seed')}
        if run['method'] == 'full' or not run.get('rank'):
            run['rank'] = None
        elif not isinstance(run['rank'], int) or run['rank'] < 1:
            fail(f"{folder}/results.yaml: rank is {run['rank']!r}, not a whole number; type other runs")
        runs.append(run)
    for key in ('task', 'model'):
        one, *others = {run[key]: run for run in runs}.values()
        if others:
            fail(f"two {key}s in one picture, {one[key]} ({one['run']}) and {others[0][key]} ({others[0]['run']}); "
                 f'type runs of one {key}')
    return sorted(runs, key=lambda r: (r['method'] != 'full', r['method'], r['rank'] or 0, len(r['seed']), r['seed']))


# -----------------------------------------------------------------------------
# pictures: runs -> (figure, one line that says what is on it)


def grouped(runs):
    """Runs -> ({(method, rank): its seeds or folds}, {method: (color, marker)}, their part of the printed line)."""
    groups, seen = {}, {}
    for run in runs:
        key = run['method'], run['rank']
        twin = seen.setdefault((*key, run['seed'], run['fold']), run)
        if twin is not run:  # they differ in another setting, so they are not samples of one distribution
            fail(f"{twin['run']} and {run['run']} are of one method, rank, seed and fold; type only one of them")
        groups.setdefault(key, []).append(run)
    methods = list(dict.fromkeys(run['method'] for run in runs))
    looks = {m: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i, m in enumerate(methods)}
    several = [method for (method, _), seeds in groups.items() if len(seeds) > 1]
    repeats = 'folds' if len({run['fold'] for run in runs}) > 1 else 'seeds'
    note = f"; mean and sd across {repeats} in {len(several)} of {len(groups)} points ({', '.join(dict.fromkeys(several))})"
    return groups, looks, f'{about(runs)}' + note * bool(several)


def lines_by_rank(ax, groups, looks, value, **line):
    """Draw value(run) against rank, a line for each method: mean over seeds, sd as error bars. A level if it has no rank."""
    ranks = sorted({rank for _, rank in groups if rank})
    if not ranks:
        fail('none of these runs has a rank; type runs of a low-rank method too')
    for i, (method, (color, marker)) in enumerate(looks.items()):
        width = 2.25 - 1.25 * i / len(looks)  # later lines are thinner, so that equal methods show
        style = dict(color=color, lw=width, ms=4 * width, label='_') | line
        seeds = {rank: [value(run) for run in runs] for (m, rank), runs in groups.items() if m == method}
        points = {rank: (statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else math.nan) for rank, v in seeds.items()}
        if None in points:
            mean, sd = points.pop(None)
            ax.axhline(mean, **style)
            ax.axhspan(mean - sd, mean + sd, color=color, alpha=0.12, lw=0)  # draws nothing if sd is nan
        if points:
            ax.errorbar(list(points), *zip(*points.values(), strict=True), marker=marker, capsize=3, **style)
        if 'ls' not in line:  # one legend entry for both lines of a method
            ax.plot([], [], marker=marker if points else '', **style | {'label': method})
    ax.set_xscale('log', base=2)
    ax.set_xticks(ranks, map(str, ranks))
    ax.minorticks_off()
    ax.set_xlabel('rank')


def draw_ranks(runs):
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
    for more in ('seed {seed}', 'fold {fold}', '{run}'):  # added only to labels that are equal
        labels = [a if labels.count(a) == 1 else f'{a}, {more.format(**run)}' for a, run in zip(labels, runs, strict=True)]
    sizes = [{part: number(run, 'memory_breakdown.csv', part) / MIB for part in (*PARTS, 'peak')} for run in runs]
    for run, size in zip(runs, sizes, strict=True):
        if min(size.values()) < 0 or abs(sum(size.values()) - 2 * size['peak']) > 0.001 * size['peak']:
            fail(f"{run['run']}/memory_breakdown.csv: a part is negative, or they do not add up to the peak; type other runs")
    fig, (ax,) = subplots(size=(8, 1.3 + 0.28 * len(runs)), grid='x', title=titled(runs))
    left = [0.0] * len(runs)
    for color, hatch, (part, name) in zip(COLORS, ('', '//', '', '..', ''), PARTS.items(), strict=False):  # hatched: for grey
        widths = [size[part] for size in sizes]
        if part != 'buffers' or any(widths):
            drawn = ax.barh(range(len(runs)), widths, left=left, color=color, hatch=hatch, ec='white', lw=0.5, label=name)
            left = [a + b for a, b in zip(left, widths, strict=True)]
    ax.bar_label(drawn, [mib(size['peak']) for size in sizes], padding=3, fontsize=8)
    ax.set_yticks(range(len(runs)), labels, fontsize=9)
    ax.set_ylim(len(runs) - 0.4, -0.6)
    ax.margins(x=0.08)
    ax.set_xlabel('peak memory of training (MiB)')
    fig.legend(loc='outside lower center', ncols=5, fontsize=8, columnspacing=1.2, handlelength=1.2)
    return fig, f'parts of peak memory, {about(runs)}'


def draw_optimizer(runs):
    from matplotlib.ticker import LogLocator
    groups, looks, which = grouped(runs)
    used, adam = ([number(run, 'optimizer_memory.csv', key) / MIB for run in runs] for key in ('bytes', 'adam_bytes'))
    if min(used + adam) <= 0:  # SGD without momentum
        at = runs[min(range(len(runs)), key=lambda i: min(used[i], adam[i]))]['run']
        fail(f'{at}/optimizer_memory.csv has 0 bytes, which a log axis cannot show; type other runs')
    fig, (ax,) = subplots(title=titled(runs))
    ax.set_yscale('log')
    lines_by_rank(ax, groups, looks, lambda r: number(r, 'optimizer_memory.csv', 'bytes') / MIB, mfc='none', mew=1.5)
    ends = sorted({min(adam), max(adam)})  # AdamW's bytes may rise a little with rank, as adapters are parameters too
    for end in ends:
        ax.axhline(end, color='black', ls=':', lw=1.5, label='_')
    ax.plot([], [], color='black', ls=':', lw=1.5, label=f"AdamW, all parameters:\n{' to '.join(map(mib, ends))} MiB")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(lambda value, _: mib(value))
    ax.set_ylabel('optimizer state (MiB)')
    fig.legend(loc='outside right upper', fontsize=9)
    return fig, f'optimizer state against rank, beside that of AdamW, {which}'


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
        ax.errorbar(x / MIB, y, [[max(0, y - low)], [max(0, high - y)]], color=color, marker=marker, ms=7, mfc='none',
                    mew=1.3, elinewidth=0.7, capsize=2, ls='', label='_' if any(p[-1] == method for p in points) else method)
        points.append((x / MIB, y, low, high, f"{rank or ''}" + f' (n={len(seeds)})' * (len(seeds) > 1), method))
    front = [p[:2] for p in points if not any(q[0] <= p[0] and q[1] >= p[1] and q[:2] != p[:2] for q in points)]
    ax.step(*zip(*sorted(front), strict=True), where='post', color='0.7', lw=1, zorder=0, label='Pareto front')
    ax.set(xlabel='peak memory of training (MiB)', ylabel='accuracy (percent)')
    ax.yaxis.set_major_formatter(lambda share, _: f'{100 * share:.4g}')
    ax.margins(x=0.06, y=0.12)
    title = 'number: rank\nbar: 95% interval' + '\nn runs: mean and sd' * several
    fig.legend(loc='outside right upper', fontsize=9, title=title, title_fontsize=8, alignment='left')
    label_points(ax, [(*p[:-1], looks[p[-1]][0]) for p in points])
    return fig, f'accuracy with its 95% interval against peak memory, {which}'
