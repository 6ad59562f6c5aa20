"""
Draw what runs logged and benches measured: run folders or a file of rows to one picture or one screen of text.

    python plot.py loss out/a out/b           training and validation loss of one or more runs -> out/a/loss.png
    python plot.py status out/a --watch       how far a run is, how fast, how long it still takes
    python plot.py bars results/stats.jsonl   a bar for each row that bench.py --json wrote -> results/stats.png

Of train_bitnet.py; a RUN is the folder of a run:

    python plot.py diagnostics RUN...         ternary codes, flips, dead rows, scales: one run by kind of matrix, or several

Of finetune_cls.py, one task and model at a time; a RUN is the folder of a run or one above a sweep of them (out/sweep):

    python plot.py ranks RUN...               evaluation and training loss at the last epoch against rank
    python plot.py memory RUN...              what the peak memory of training is made of, a bar for each run
    python plot.py optimizer RUN...           bytes of optimizer state against rank, beside AdamW's
    python plot.py pareto RUN...              accuracy against peak memory, labelled with the ranks

Each writes COMMAND.png into the first folder typed.

No torch here, and matplotlib is only imported to draw: `status` answers at once, also on a machine busy training.
"""
import argparse
import itertools
import json
import math
import os
import statistics
import sys
import time

from configurator import fail
from report import plot_cls
from report.figure import COLORS, MARKERS, label_x, load_config, load_log, load_logs, measured, save, subplots, tokens_or_step


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
    shown = [r for records in logs.values() for r in measured(records, 'loss') + measured(records, 'val_loss')]
    x = tokens_or_step(shown)
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
    label_x(ax, x)
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
    logs = load_logs(args.runs, lambda records: measured(records, 'loss') + measured(records, 'val_loss'),
                     'has neither loss nor val_loss; type a run that has logged one')
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
# diagnostics

CODES = {'minus': '−1', 'zero': '0', 'plus': '+1'}
# The four panels of one run and of several: what is drawn, its title, its unit.
OF_KINDS = [('zero', 'codes of all matrices', 'share of the weights'),
            ('flips', 'codes changed in one step, mean over layers', 'share of the weights'),
            ('dead_rows', 'dead rows (all codes 0), sum over layers', 'rows'),
            ('scale_ratio', 'scale, mean |W|, geometric mean over layers; band: their range', 'times its start')]
OF_RUNS = [('zero', 'codes that are 0', 'share of the weights'),
           ('flips', 'codes changed in one step', 'share of the weights'),
           ('dead_rows', 'dead rows (all codes 0)', 'rows'),
           ('scale_drift', 'drift of the scales (mean |W|), mean over matrices', '|ln(scale / its start)|')]
TOGETHER = {'flips': statistics.fmean, 'dead_rows': sum,  # the layers of a kind
            'scale_ratio': lambda values: statistics.geometric_mean(values) if min(values) > 0 else 0.0}


def diagnosed(records):
    """The records of train_bitnet.py that tell of its ternary matrices, by name: 3.q makes the fourth layer's queries."""
    return [r for r in records if isinstance(r.get('matrices'), dict) and r['matrices']]


def series(records, x, key, kind=''):
    """-> (where, what) of the records that tell `key`: a list for each, of every matrix of a kind or of the overall figure."""
    told = {r[x]: measured([m for name, m in r['matrices'].items() if name.endswith(f'.{kind}')] if kind else [r], key)
            for r in records}
    return [at for at in told if told[at]], [[one[key] for one in found] for found in told.values() if found]


def curve(ax, i, x, y, label):
    """Line i: a colour, and markers at eight points or so, not those of the other lines: told apart in grey too."""
    every = max(1, len(x) // 8)
    ax.plot(x, y, color=COLORS[i % len(COLORS)], lw=1.2, marker=MARKERS[i % len(MARKERS)], ms=5.5, mec='white', mew=0.5,
            markevery=(i * every // len(MARKERS) % every, every), label=label)


def log_with_zero(ax):
    """A log axis; zeros, if there are any, stand at its foot, a decade below that of the smallest other value."""
    heights = [y for line in ax.get_lines() for y in line.get_ydata()]
    positive = [y for y in heights if y > 0]
    if positive and 0 in heights:
        foot = 10 ** math.floor(math.log10(min(positive)))
        ax.set_yscale('symlog', linthresh=foot)
        ax.set_ylim(-0.2 * foot, 1.5 * max(positive))  # limits that it chose could reach decades below 0
    elif positive:
        ax.set_yscale('log')


def draw_diagnostics(logs):
    """{label: records} -> (figure, one line that says what is on it): one run by kind of matrix, several overall."""
    from matplotlib.ticker import MaxNLocator
    logs = {label: diagnosed(records) for label, records in logs.items()}
    x = tokens_or_step([r for records in logs.values() for r in records])
    fig, axes = subplots(2, (11, 7.5), rows=2)
    if len(logs) == 1:
        (label, records), = logs.items()
        names = list(dict.fromkeys(name for r in records for name in r['matrices']))
        panels, what = OF_KINDS, f'{len(names)} ternary matrices of {label}'
        fig.suptitle(what, fontsize=10)
        for i, (key, code) in enumerate(CODES.items()):
            at, found = series(records, x, key)
            curve(axes[0], i, at, [value for value, in found], code)
        for i, kind in enumerate(dict.fromkeys(name.rpartition('.')[2] for name in names)):
            for ax, (key, *_) in zip(axes[1:], OF_KINDS[1:], strict=True):
                at, found = series(records, x, key, kind)
                curve(ax, i, at, list(map(TOGETHER[key], found)), kind)
            low, high = list(map(min, found)), list(map(max, found))
            axes[3].fill_between(at, low, high, color=COLORS[i % len(COLORS)], alpha=0.08, lw=0)
        axes[0].legend(ncols=3, loc='lower right', bbox_to_anchor=(1, 1), borderaxespad=0, frameon=False, fontsize=9)
    else:
        panels, what = OF_RUNS, f'{len(logs)} runs'
        for i, (label, records) in enumerate(logs.items()):
            for ax, (key, *_) in zip(axes, OF_RUNS, strict=True):
                at, found = series(records, x, key)
                curve(ax, i, at, [value for value, in found], label)
    for ax, (_, title, unit) in zip(axes, panels, strict=True):
        ax.set_title(title, loc='left', fontsize=9)
        ax.set_ylabel(unit)
        label_x(ax, x)
    log_with_zero(axes[1])
    axes[2].yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes[2].yaxis.set_major_formatter('{x:,.0f}')
    axes[2].set_ylim(top=max(1, axes[2].get_ylim()[1]))
    lines = axes[1].get_lines()
    columns = max(1, 120 // (8 + max(len(line.get_label()) for line in lines)))
    fig.legend(handles=lines, loc='outside lower center', ncols=min(len(lines), columns), fontsize=9)
    return fig, f'ternary codes, flips, dead rows and scales against {x}, {what}'


def diagnostics(args):
    logs = load_logs(args.runs, diagnosed, 'tells of no ternary matrices; type a run of train_bitnet.py with quant=tern that '
                     'has come to diag_interval steps')
    fig, what = draw_diagnostics(logs)
    save(fig, args.out or os.path.join(args.runs[0], 'diagnostics.png'), what)


# -----------------------------------------------------------------------------
# ranks, memory, optimizer, pareto


def draw_runs(args):
    fig, what = getattr(plot_cls, f'draw_{args.name}')(plot_cls.load_runs(args.runs))
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
    steps = sorted({r['step'] for r in train} or {step})[-2:]  # of training alone: others come when they please
    gap_s = (steps[-1] - steps[0]) * ms / 1000
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
    p = commands.add_parser('diagnostics', help='ternary codes of runs of train_bitnet.py, as a picture')
    p.add_argument('runs', nargs='+', metavar='RUN', help='one: by kind of matrix; several: the overall figures of each')
    p.add_argument('--out', metavar='PNG', help='default: diagnostics.png in the first run folder')
    p.set_defaults(run_command=diagnostics)
    for name, text in (('ranks', 'loss at the last epoch against rank'), ('memory', 'parts of the peak memory of runs'),
                       ('optimizer', 'bytes of optimizer state against rank'), ('pareto', 'accuracy against memory')):
        p = commands.add_parser(name, help=f'{text}, as a picture')
        p.add_argument('runs', nargs='+', metavar='RUN', help='folder of a run of finetune_cls.py, or a folder above several')
        p.add_argument('--out', metavar='PNG', help=f'default: {name}.png in the first folder typed')
        p.set_defaults(run_command=draw_runs, name=name)
    args = parser.parse_args()
    args.run_command(args)


if __name__ == '__main__':
    main()
