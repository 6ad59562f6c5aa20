"""The pictures of ptq.py: loss against the size of the file, loss against the share of zeros, and what each layer costs."""
from common import atomic_write
from plot import COLORS, MARKERS, subplots


def _save(figure, path):
    atomic_write(path, lambda tmp: figure.savefig(tmp, format='png', bbox_inches='tight'))


def sizes(path, rows, title):
    """rows of ptq.jsonl, the first one the model as it was -> loss against bytes. Raises OSError."""
    figure, (axes,) = subplots(title=title)
    best = rows[0]['loss']
    worst = best + max(4 * (sorted(r['loss'] for r in rows)[len(rows) // 2] - best), 0.05)     # what is destroyed is cut off
    families = list(dict.fromkeys(r['scheme'].rstrip('0123456789') for r in rows))
    for r in rows:
        i = families.index(r['scheme'].rstrip('0123456789'))
        cut = r['loss'] > worst
        axes.plot(r['file_bytes'] / 1e6, min(r['loss'], worst), color=COLORS[i % len(COLORS)], linestyle='none',
                  marker='^' if cut else MARKERS[i % len(MARKERS)], markersize=6)
        axes.annotate(f'{r["scheme"]} {r["loss"]:.2f}' if cut else r['scheme'], (r['file_bytes'] / 1e6, min(r['loss'], worst)),
                      textcoords='offset points', xytext=(4, 4), fontsize=7)
    axes.axhline(best, color='grey', linewidth=0.8, linestyle=':')
    axes.set(xscale='log', xlabel='file, MB', ylabel='validation loss')
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
    figure.colorbar(image, ax=axes, label='gain in validation loss')
    axes.set(xlabel='projection', ylabel='block')
    _save(figure, path)
