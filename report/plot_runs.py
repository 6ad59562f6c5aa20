"""Pictures of logs and of rows of bench.py: loss, diagnostics, bars.

Logs are {label: [records of each seed]}. Several seeds of a label are one line, their mean, with a band from min to max.
"""
import itertools
import math
import statistics

from report.figure import BAND, COLORS, MARKERS, across_seeds, label_x, look, measured, subplots, tokens_or_step

# -----------------------------------------------------------------------------
# loss


def smoothed(curve, n):
    """[(x, y), ...] -> the same with y a centred running mean over n values, fewer at the ends. It does not lag."""
    sums = [0.0, *itertools.accumulate(y for _, y in curve)]
    spans = [(max(0, i - (n - 1) // 2), min(len(curve), i + n // 2 + 1)) for i in range(len(curve))]
    return [(x, (sums[b] - sums[a]) / (b - a)) for (x, _), (a, b) in zip(curve, spans, strict=True)]


def bpb_ratio(records):
    """Bits per byte of one nat per token, a constant of tokenizer and text. None if unmeasured or not constant."""
    ratios = [r['val_bpb'] / r['val_loss'] for r in measured(records, 'val_loss', 'val_bpb')
              if min(r['val_loss'], r['val_bpb']) > 0]
    return ratios[-1] if ratios and max(ratios) <= 1.001 * min(ratios) else None  # 0.1 %: logs may round


def draw_band(ax, i, curves, **line):
    """Draw line i, the mean of curves, [(x, y), ...] of each seed, with a band from min to max, or bars if it has no line.

    -> across_seeds(curves)"""
    x, mean, low, high = across_seeds(curves)
    ax.plot(x, mean, **look(i) | dict(lw=1.2, ms=5.5, mec='white', mew=0.5) | line)
    if len(curves) > 1 and line.get('ls') == '':
        ax.vlines(x, low, high, color=look(i)['color'], lw=1.2)
    elif len(curves) > 1:
        ax.fill_between(x, low, high, color=look(i)['color'], alpha=0.15, lw=0)
    return x, mean, low, high


def draw_loss(logs, smooth=0):
    """Training and validation loss of logs -> (figure, one line that says what is on it). smooth: see plot.py loss --help."""
    logged = [records for seeds in logs.values() for records in seeds]
    shown = [r for records in logged for r in measured(records, 'loss') + measured(records, 'val_loss')]
    x = tokens_or_step(shown)
    ratios = [bpb_ratio(records) for records in logged]
    known = [ratio for ratio in ratios if ratio]
    equal = bool(known) and max(known) <= 1.001 * min(known)
    one_ratio = equal and len(known) == len(ratios)
    heights = []  # what the y axis must hold

    fig, (ax,) = subplots(size=(8, 5 + 0.18 * len(logs)))
    for i, (label, seeds) in enumerate(logs.items()):
        raw, val, bpb = ([[(r[x], r[key]) for r in measured(records, *keys, key)] for records in seeds]
                         for *keys, key in (['loss'], ['val_loss'], ['val_loss', 'val_bpb']))
        if len(seeds) == 1:
            ax.plot(*across_seeds(raw)[:2], color=look(i)['color'], lw=0.6, alpha=0.25)
        train = draw_band(ax, i, [smoothed(curve, smooth or max(1, len(curve) // 50)) for curve in raw], marker='')
        most = max(map(len, val))
        dots = dict(marker=look(i)['marker'] if most else '', ms=7 if most <= 50 else 3.5, mec=look(i)['color'], mew=1.2,
                    mfc='none')  # hollow, so that neighbours show
        val = draw_band(ax, i, val, zorder=3, **dots, **(dict(ls='') if train[0] else {}))
        final, (bpb_x, bpb_y, *_) = [], across_seeds(bpb)
        if val_y := val[1]:
            bits = f' = {bpb_y[-1]:.3f} bits/byte' if bpb_x[-1:] == val[0][-1:] else ''
            final.append(f'val {val_y[-1]:.3f}{bits}' + f', best {min(val_y):.3f}' * (min(val_y) < val_y[-1]))
        if train[0]:
            final.append(f'train {train[1][-1]:.3f}')
        ax.plot([], [], label=f"{label}: {', '.join(final)}", **look(i) | dots, lw=1.2)  # one legend entry for both
        # The drop from ln(vocab) in the first 5 % of a run would flatten the rest, so it may leave the picture at the top.
        for at, *ys in (*zip(*train, strict=True), *zip(*val, strict=True)):
            heights += ys * (at >= 0.05 * max(train[0] + val[0]))
    pad = 0.05 * (max(heights) - min(heights)) or 0.1
    ax.set_ylim(min(heights) - pad, max(heights) + pad)
    label_x(ax, x)
    ax.set_ylabel('loss (nats per token)' if x == 'tokens' else 'loss (nats)')
    if one_ratio:
        right = ax.secondary_yaxis('right', functions=(lambda y: y * ratios[0], lambda y: y / ratios[0]))
        right.set_ylabel('bits per byte (validation text)')
    title = 'line: training (smoothed), markers: validation' if measured(shown, 'loss') else 'validation'
    title += f'; {BAND}' * (len(logged) > len(logs))
    fig.legend(title=title, loc='outside lower center', fontsize=9, title_fontsize=8, handlelength=3)

    if one_ratio:
        note = f'1 nat per token = {ratios[0]:.4f} bits per byte'
    elif known and not equal:
        note = 'no bits-per-byte axis: the runs differ in tokenizer or text, so compare bits/byte, not nats'
    else:
        note = 'no bits-per-byte axis: not every log has a constant val_bpb / val_loss'
    return fig, f'loss against {x}, {note}'


# -----------------------------------------------------------------------------
# diagnostics

CODES = {'minus': '−1', 'zero': '0', 'plus': '+1'}
# The four panels of one run and of several: a key of the records, title, unit.
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
    """Records of train_bitnet.py with figures of its ternary matrices. Name 3.q: the matrix of the fourth layer's queries."""
    return [r for r in records if isinstance(r.get('matrices'), dict) and r['matrices']]


def series(records, x, key, kind='', combine=sum):
    """-> [(x, combined values of all matrices of a kind), ...], without a kind [(x, the overall value), ...]."""
    found = {r[x]: measured([m for name, m in r['matrices'].items() if name.endswith(f'.{kind}')] if kind else [r], key)
             for r in records}
    return [(at, combine([one[key] for one in values])) for at, values in found.items() if values]


def curve(ax, i, seeds, label):
    """Draw line i with about eight markers, in other places than those of other lines, so that equal lines show."""
    every = max(1, len(seeds[0]) // 8)
    draw_band(ax, i, seeds, markevery=(max(i, i * every // len(MARKERS)) % every, every), label=label)


def log_with_zero(ax):
    """Make y a log axis. Zeros are drawn at its foot, a decade below that of the smallest other value."""
    heights = [y for line in ax.get_lines() for y in line.get_ydata()]
    positive = [y for y in heights if y > 0]
    if positive and 0 in heights:
        foot = 10 ** math.floor(math.log10(min(positive)))
        ax.set_yscale('symlog', linthresh=foot)
        ax.set_ylim(-0.2 * foot, 1.5 * max(positive))  # automatic limits could reach decades below 0
    elif positive:
        ax.set_yscale('log')


def draw_diagnostics(logs):
    """Ternary codes of logs -> (figure, one line that says what is on it): one run by kind of matrix, several overall."""
    from matplotlib.ticker import MaxNLocator
    logs = {label: [diagnosed(records) for records in seeds] for label, seeds in logs.items()}
    logged = [records for seeds in logs.values() for records in seeds]
    x = tokens_or_step([r for records in logged for r in records])
    fig, axes = subplots(2, (11, 7.5), rows=2)
    if len(logged) == 1:
        (label,), (records,) = logs, logged
        names = list(dict.fromkeys(name for r in records for name in r['matrices']))
        panels, what = OF_KINDS, f'{len(names)} ternary matrices of {label}'
        fig.suptitle(what, fontsize=10)
        for i, (key, code) in enumerate(CODES.items()):
            curve(axes[0], i, [series(records, x, key)], code)
        for i, kind in enumerate(dict.fromkeys(name.rpartition('.')[2] for name in names)):
            for ax, (key, *_) in zip(axes[1:], OF_KINDS[1:], strict=True):
                curve(ax, i, [series(records, x, key, kind, TOGETHER[key])], kind)
            at, _, low, high = across_seeds([series(records, x, 'scale_ratio', kind, end) for end in (min, max)])
            axes[3].fill_between(at, low, high, color=look(i)['color'], alpha=0.08, lw=0)
        axes[0].legend(ncols=3, loc='lower right', bbox_to_anchor=(1, 1), borderaxespad=0, frameon=False, fontsize=9)
    else:
        panels, what = OF_RUNS, f'{len(logged)} runs'
        if len(logged) > len(logs):
            fig.suptitle(BAND, fontsize=9)
        for i, (label, seeds) in enumerate(logs.items()):
            for ax, (key, *_) in zip(axes, OF_RUNS, strict=True):
                curve(ax, i, [series(records, x, key) for records in seeds], label)
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
    fig.legend(handles=lines, loc='outside lower center', ncols=min(len(lines), columns), fontsize=9, handlelength=3)
    return fig, f'ternary codes, flips, dead rows and scales against {x}, {what}'


# -----------------------------------------------------------------------------
# bars

# Last word of a number's name: (its unit in the picture, factor from the unit in the rows).
UNITS = {'bytes': ('MiB', 2 ** -20), 'ms': ('milliseconds', 1), 'ratio': ('times the baseline', 1), 'loss': ('loss (nats)', 1),
         'error': ('relative RMS error of weights', 1), 'relative': ('relative RMS difference of outputs', 1)}


def draw_bars(rows, value):
    """Rows of bench.py and the name of a number in them -> (figure, number of its bars)."""
    unit, factor = UNITS.get(value.rsplit('_', 1)[-1], (value, 1))
    panels = {}                                             # one for each size or dtype, whose bars can be compared
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
        ax.set_xlabel(unit)
        ax.set_title(size, fontsize=9)
    fig.suptitle(f"{rows[0]['bench']}: {value}, {rows[0].get('device', '')}", fontsize=9)
    return fig, sum(map(len, panels.values()))
