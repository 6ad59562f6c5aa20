"""Report of an image classifier: tables of its classes and mistakes, the confusion matrix and the most confident mistakes."""
import csv
import os
import warnings

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common import atomic_write

MISTAKES = 40           # mistakes shown in mistakes.png, the most confident ones
COLUMNS = 8             # of mistakes.png
INCHES = 25             # longest side of confusion.png in inches: 3,000 pixels
LABELLED = 150          # confusion.png shows class names up to this number of classes; more do not fit


def report(out_dir, data, guesses, surety):
    """Write classes.csv, mistakes.csv, confusion.png and mistakes.png into out_dir. data: images.Images; guesses: int (n,),
    the predicted class of each image; surety: float (n,), the probability of that class. Raises OSError."""
    classes, c = data.classes, len(data.classes)
    counts = np.zeros((c, c), dtype=np.int64)
    np.add.at(counts, (data.labels, guesses), 1)
    rows = [('class', 'images', 'right', 'share', 'most often taken for', 'times')]
    for i, name in enumerate(classes):
        wrong = counts[i] * (np.arange(c) != i)
        n, right, most = counts[i].sum(), counts[i, i], wrong.argmax()
        rows.append((name, n, right, f'{right / n:.4f}' if n else '', classes[most] if wrong[most] else '', wrong[most]))
    _write_csv(os.path.join(out_dir, 'classes.csv'), rows)
    wrong = np.flatnonzero(guesses != data.labels)
    wrong = wrong[np.argsort(-surety[wrong], kind='stable')]
    _write_csv(os.path.join(out_dir, 'mistakes.csv'), [('image', 'class', 'taken for', 'probability')] + [
        (data.names[i], classes[data.labels[i]], classes[guesses[i]], f'{surety[i]:.4f}') for i in wrong])
    confusion_png(os.path.join(out_dir, 'confusion.png'), counts, classes)
    wrong = wrong[:MISTAKES]
    captions = [f'{classes[data.labels[i]]}, taken for {classes[guesses[i]]} {surety[i]:.0%}' for i in wrong]
    mistakes_png(os.path.join(out_dir, 'mistakes.png'), data.pixels[wrong], captions)


def _write_csv(path, rows):
    def write(tmp):                                     # backslashreplace, because file names need not be UTF-8
        with open(tmp, 'w', newline='', encoding='utf-8', errors='backslashreplace') as f:
            csv.writer(f).writerows(rows)
    atomic_write(path, write)


def escaped(text):
    """Escape the control characters of a text: a newline becomes \\n."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


def confusion_png(path, counts, classes):
    """Draw a confusion matrix. counts: ints (c, c), rows true and columns predicted classes. Colors show shares of the row.

    Cells show their counts for up to 20 classes; the axes show names for up to LABELLED classes. Raises OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    counts, c = np.asarray(counts), len(classes)
    if counts.shape != (c, c):
        raise ValueError(f'counts {counts.shape} are not those of {c} classes')
    shares = np.float32(counts / np.maximum(counts.sum(1, keepdims=True), 1))
    inches = min(3 + c * (0.45 if c <= 20 else 0.18), INCHES)      # 0.18: one line of 8-point text with space around it
    fig = FigureCanvasAgg(Figure((inches + 0.5, inches), dpi=120, layout='constrained')).figure
    ax = fig.subplots()
    # For 1,000 classes, interpolating colors instead of data would take 600 MB.
    image = ax.imshow(shares, cmap='Blues', vmin=0, vmax=1, interpolation='nearest', interpolation_stage='data')
    fig.colorbar(image, ax=ax, fraction=0.03, label='share of the true class')
    names = [name if len(name) <= 24 else f'{name[:23]}…' for name in map(escaped, classes)] if c <= LABELLED else []
    ax.set_xticks(range(len(names)), names, rotation=90, fontsize=8, parse_math=False)
    ax.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
    ax.set(xlabel='predicted', ylabel='true')
    ax.set_title(f'top-1 {np.trace(counts) / max(1, counts.sum()):.2%} of {counts.sum():,} images')
    for (row, column), n in np.ndenumerate(counts) if c <= 20 else ():
        color = 'white' if shares[row, column] > 0.5 else '0.2'
        ax.text(column, row, f'{n:,}', ha='center', va='center', fontsize=7, color=color)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph .* missing')      # a letter missing in the font is drawn as a box
        atomic_write(path, lambda tmp: fig.savefig(tmp, format='png'))


def mistakes_png(path, pixels, captions):
    """Draw a grid of images, uint8 (n, s, s, 3), with a caption below each. Images under 96 pixels are enlarged by a whole
    factor, so that their pixels stay square. Without images, the picture reads "no mistakes". Raises OSError."""
    import matplotlib  # for its font: Pillow's own font has only Latin letters
    font = ImageFont.truetype(os.path.join(matplotlib.get_data_path(), 'fonts', 'ttf', 'DejaVuSans.ttf'), 11)
    if not len(captions):
        page = Image.new('RGB', (240, 96), 'white')
        ImageDraw.Draw(page).text((120, 48), 'no mistakes', 'black', font, anchor='mm')
    else:
        scale = -(-96 // pixels.shape[1])
        side, gap, line = scale * pixels.shape[1], 8, 14
        lines = [_wrapped(escaped(caption), font, side) for caption in captions]
        width, height = side + gap, side + gap + line * max(map(len, lines))
        columns = min(COLUMNS, len(captions))
        page = Image.new('RGB', (columns * width + gap, -(-len(captions) // columns) * height + gap), 'white')
        draw = ImageDraw.Draw(page)
        for number, (image, words) in enumerate(zip(pixels, lines, strict=True)):
            x, y = gap + number % columns * width, gap + number // columns * height
            page.paste(Image.fromarray(np.asarray(image).repeat(scale, 0).repeat(scale, 1)), (x, y))
            draw.multiline_text((x, y + side + 1), '\n'.join(words), 'black', font, spacing=1)
    atomic_write(path, lambda tmp: page.save(tmp, 'PNG'))


def _wrapped(text, font, width):
    """Wrap a text into lines of at most `width` pixels. A single word that is wider is cut."""
    lines = ['']
    for word in text.split():
        while font.getlength(word) > width:
            word = word[:-2] + '…'
        fits = font.getlength(f'{lines[-1]} {word}'.strip()) <= width
        lines[-1:] = [f'{lines[-1]} {word}'.strip()] if fits else [lines[-1], word]
    return lines
