"""Pictures of ptq.py: loss against file size, loss against the share of zeros, loss by layer. Each raises OSError."""
import math
import statistics

from common import atomic_write
from report.figure import label_points, look, subplots

LEAST = 1e-4        # the log axes end here; smaller or negative rises of the loss are drawn at this value
HOLLOW = dict(ms=7, mfc='none', mew=1.3, lw=1)      # markers through which neighbours show


def _save(figure, path):
    atomic_write(path, lambda tmp: figure.savefig(tmp, format='png', bbox_inches='tight'))


def _log_rise(axes, unit):
    """Make y a log axis of the rise of the loss."""
    from matplotlib.ticker import LogLocator
    axes.set(yscale='log', ylabel=f'rise of the validation loss ({unit})')
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda y, _: f'≤ {y:g}' if y <= LEAST else f'{y:g}')


def sizes(path, rows, title, unit='nats'):
    """Draw the rise of the loss against the size of the file, with a line for each family of schemes. unit: of the loss.

    rows: of ptq.jsonl, the first one of the full-precision model. A second panel enlarges schemes of nearly equal size."""
    first, families = rows[0], {}
    for r in rows[1:]:
        families.setdefault(r['scheme'].rstrip('0123456789'), []).append(
            (r['file_bytes'] / 1e6, max(r['delta'], LEAST), r['scheme']))
    points = [(x, y, y, y, scheme, look(i)['color']) for i, found in enumerate(families.values()) for x, y, scheme in found]
    middle = statistics.median([x for x, *_ in points] or [1])
    crowd = [p for p in points if abs(math.log(p[0] / middle)) < 0.07]
    crowd *= len(crowd) > 5
    figure, axes = subplots(1 + bool(crowd), size=(11 if crowd else 8, 5))
    for ax in axes:
        for i, found in enumerate(families.values()):
            x, y, _ = zip(*sorted(found), strict=True)
            ax.plot(x, y, **look(i), **HOLLOW)
        ax.set_xlabel('size of the file (MB)')
    axes[0].set_xscale('log')
    for set_format in (axes[0].xaxis.set_major_formatter, axes[0].xaxis.set_minor_formatter):
        set_format('{x:g}')
    _log_rise(axes[0], unit)
    figure.suptitle(f'{title}; {first["scheme"]}: {first["loss"]:.4f}, {first["file_bytes"] / 1e6:.1f} MB', fontsize=9)
    if crowd:
        left, right, low, high = (end(p[of] for p in crowd) for of in (0, 1) for end in (min, max))
        dx, dy = 0.06 * (right - left) or 0.1, 0.06 * (high - low) or LEAST
        axes[1].set(xlim=(left - dx, right + dx), ylim=(low - dy, high + dy), ylabel=axes[0].get_ylabel())
        axes[1].set_title('the schemes in the box, enlarged; linear axes', fontsize=9)
        axes[0].indicate_inset([left / 1.02, low / 1.25, right * 1.02 - left / 1.02, high * 1.25 - low / 1.25])
        label_points(axes[1], crowd)
    label_points(axes[0], [p for p in points if p not in crowd])
    _save(figure, path)


def shares(path, rows, title, unit='nats'):
    """Draw the rise of the loss against the share of zeros, before and after retraining.

    rows: of prune.jsonl, the first one of the model without zeros. unit: of the loss."""
    panels = [('before retraining', 'pruned_loss'), (f'after {rows[0]["retrain_iters"]} updates', 'loss')]
    panels = panels if rows[0]['retrain_iters'] else panels[:1]
    figure, axes = subplots(len(panels), size=(2.5 + 4 * len(panels), 4.8))
    for ax, (name, key) in zip(axes, panels, strict=True):
        for i, method in enumerate(dict.fromkeys(r['method'] for r in rows[1:])):
            points = sorted((r['zeros'], max(r[key] - rows[0][key], LEAST)) for r in rows if r['method'] == method)
            ax.plot(*zip(*points, strict=True), **look(i), **HOLLOW, label=method)
        ax.set_title(f'{name}; loss without zeros: {rows[0][key]:.4f}', fontsize=9)
        ax.set_xlabel('weights that are 0 (percent)')
        ax.xaxis.set_major_formatter(lambda share, _: f'{100 * share:g}')
        ax.sharey(axes[0])
    _log_rise(axes[0], unit)
    figure.suptitle(title, fontsize=9)
    figure.legend(handles=axes[0].get_lines(), loc='outside right upper', fontsize=9)
    _save(figure, path)


def heat(path, blocks, kinds, found, title, unit='nats'):
    """Draw a heat map of found, {(block, kind): rise of the loss}, blocks downwards. unit: of the loss."""
    figure, (axes,) = subplots(title=title, size=(2 + 1.3 * len(kinds), 2 + 0.4 * len(blocks)))
    axes.grid(False)
    grid = [[found.get((b, k), float('nan')) for k in [*kinds, 'all']] for b in [*blocks, 'all']]
    inner = [v for row in grid[:-1] for v in row[:-1] if v == v]
    most = max([*inner, 1e-9])
    image = axes.imshow(grid, cmap='viridis', vmin=min([0, *inner]), vmax=most, aspect='auto')
    axes.axvline(len(kinds) - 0.5, color='white', lw=4)
    axes.axhline(len(blocks) - 0.5, color='white', lw=4)
    axes.set_xticks(range(len(kinds) + 1), [*kinds, 'all'], rotation=20, ha='right')
    axes.set_yticks(range(len(blocks) + 1), [*(b.rpartition('.')[2] for b in blocks), 'all'])
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            if value == value:
                axes.text(x, y, f'{value:+.3f}', ha='center', va='center', fontsize=8,
                          color='black' if value > 0.6 * most else 'white')
    figure.colorbar(image, ax=axes, label=f'rise of the validation loss ({unit})', extend='max')    # 'all' exceeds the scale
    axes.set(xlabel='projection', ylabel='block')
    _save(figure, path)
