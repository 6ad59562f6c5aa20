"""The pictures of ptq.py: loss against the size of the file, loss against the share of zeros, and what each layer costs."""
from common import atomic_write
from report.figure import COLORS, MARKERS, subplots


def _save(figure, path):
    atomic_write(path, lambda tmp: figure.savefig(tmp, format='png', bbox_inches='tight'))


def sizes(path, rows, title):
    """rows of ptq.jsonl, the first one the model as it was -> the rise of the loss against bytes, both on logarithmic axes; a
    line for each family of schemes. Raises OSError."""
    from matplotlib.ticker import ScalarFormatter
    figure, (axes,) = subplots(title=title)
    least = 1e-4                                    # what is better than that, or than the model itself, is drawn there
    families = {}
    for r in rows[1:]:
        families.setdefault(r['scheme'].rstrip('0123456789'), []).append(r)
    for i, members in enumerate(families.values()):
        size, rises = zip(*sorted((r['file_bytes'] / 1e6, max(r['delta'], least)) for r in members), strict=True)
        axes.plot(size, rises, color=COLORS[i % len(COLORS)], marker=MARKERS[i % len(MARKERS)], markersize=6, linewidth=1,
                  label=', '.join(r['scheme'] for r in members))
    axes.axvline(rows[0]['file_bytes'] / 1e6, color='grey', linewidth=0.8, linestyle=':', label=f'{rows[0]["scheme"]}, +0')
    axes.set(xscale='log', yscale='log', xlabel='file, MB', ylabel=f'rise of the validation loss over {rows[0]["loss"]:.4f}')
    ticks = ScalarFormatter()
    ticks.set_scientific(False)
    axes.xaxis.set_major_formatter(ticks)
    axes.xaxis.set_minor_formatter(ticks)
    axes.legend(fontsize=7)
    _save(figure, path)


def shares(path, rows, title):
    """rows of prune.jsonl, the first one the model with no zeros -> loss against the share of zeros. Raises OSError."""
    figure, (axes,) = subplots(title=title)
    for i, method in enumerate(dict.fromkeys(r['method'] for r in rows[1:])):
        points = sorted((r['zeros'], r['loss'], r['pruned_loss']) for r in rows if r['method'] == method)
        zeros, after, before = zip(*points, strict=True)
        color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        axes.plot(zeros, after, color=color, marker=marker, label=method)
        axes.plot(zeros, before, color=color, marker=marker, linestyle=':', alpha=0.5)
    axes.axhline(rows[0]['loss'], color='grey', linewidth=0.8, linestyle=':')
    axes.set(xlabel='share of zeros', ylabel='validation loss (dotted: before retraining)')
    axes.legend()
    _save(figure, path)


def heat(path, blocks, kinds, found, title):
    """found {(block, kind): difference of the loss} -> a heat map, blocks downwards. Raises OSError."""
    figure, (axes,) = subplots(title=title, grid='x', size=(2 + 1.3 * len(kinds), 2 + 0.4 * len(blocks)))
    axes.grid(False)
    grid = [[found.get((b, k), float('nan')) for k in [*kinds, 'all']] for b in [*blocks, 'all']]
    inner = [v for row in grid[:-1] for v in row[:-1] if v == v]
    image = axes.imshow(grid, cmap='viridis', vmin=min([0, *inner]), vmax=max([*inner, 1e-9]), aspect='auto')
    axes.set_xticks(range(len(kinds) + 1), [*kinds, 'all'], rotation=20, ha='right')
    axes.set_yticks(range(len(blocks) + 1), [*(b.rpartition('.')[2] for b in blocks), 'all'])
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            if value == value:
                axes.text(x, y, f'{value:+.3f}', ha='center', va='center', fontsize=7,
                          color='black' if value > 0.6 * max([*inner, 1e-9]) else 'white')
    figure.colorbar(image, ax=axes, label='rise of the validation loss', extend='max')   # by sums
    axes.set(xlabel='projection', ylabel='block')
    _save(figure, path)
