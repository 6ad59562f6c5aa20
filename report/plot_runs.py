"""The pictures of logs and rows that plot.py draws on request: loss, diagnostics and bars. Those of logs: {label: records} ->
(figure, one line that says what is on it)."""
import itertools
import math
import statistics

from report.figure import COLORS, MARKERS, label_x, measured, subplots, tokens_or_step

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


# -----------------------------------------------------------------------------
# bars

# By the last word of a number's name: its unit, and a factor that makes it so.
UNITS = {'bytes': ('MiB', 2 ** -20), 'ms': ('milliseconds', 1), 'ratio': ('times the baseline', 1), 'loss': ('loss, nats', 1),
         'error': ('relative RMS error of weights', 1), 'relative': ('relative RMS difference of outputs', 1)}


def draw_bars(rows, value):
    """Rows of bench.py, the name of one of their numbers -> (figure, number of its bars)."""
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
    return fig, sum(map(len, panels.values()))
