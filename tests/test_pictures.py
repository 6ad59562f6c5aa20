"""report/pictures.py: what an image classifier leaves to look at: tables of classes and mistakes, and two pictures."""
import csv
import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from readers import images
from report import pictures

RANDOM = np.random.default_rng(0)


def data_of(pixels, labels, names, classes):
    return images.Images(pixels, np.array(labels), names, classes, pixels.shape[1], (0,) * 3, (1,) * 3, '')


def table(path):
    return list(csv.reader(open(path, newline='', encoding='utf-8')))


@pytest.fixture
def confusion(monkeypatch, tmp_path):
    """confusion(counts, names) -> the axes and (width, height) in inches of the picture, which is not written."""
    figures = []
    monkeypatch.setattr(Figure, 'savefig', lambda fig, *args, **options: figures.append(fig))

    def draw(counts, names):
        pictures.confusion_png(tmp_path / 'c.png', counts, names)
        return figures[-1].axes[0], figures[-1].get_size_inches()
    return draw


@pytest.mark.parametrize('c, cells, named', [(2, True, True), (20, True, True), (21, False, True), (150, False, True),
                                             (151, False, False)])
def test_confusion_by_hand(confusion, c, cells, named):
    """Colors are shares of the row. Up to 20 classes have their counts in the cells, up to 150 their names at the sides.

    A class without images is a row of zeros. A side is 25 inches at most, and large enough for each name's line."""
    counts = np.eye(c, dtype=int) * 3
    counts[0, 1], counts[-1] = 1, 0
    ax, inches = confusion(counts, ['a$_{$b', 'long ' * 20, *(f'class {i}' for i in range(c - 2))])
    shares = ax.images[0].get_array()
    assert shares[0, :2].tolist() == [0.75, 0.25] and shares[-1].max() == 0 and ax.images[0].get_clim() == (0, 1)
    assert ([text.get_text() for text in ax.texts[:2]] == ['3', '1']) == cells and len(ax.texts) == c ** 2 * cells
    names = [text.get_text() for text in ax.get_yticklabels()]
    assert len(names) == c * named and names[:2] == ['a$_{$b', 'long ' * 4 + 'lon…'] * named
    assert max(inches) <= 25.5 and (not named or min(inches) > c * 8 / 72)


def test_confusion_picture_is_whole_or_absent(tmp_path):
    """No images at all give a picture too; a full disk or a wrong shape leaves no file. Chinese names, which the font lacks,
    are drawn as boxes without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        pictures.confusion_png(tmp_path / 'zero.png', np.zeros((2, 2), int), ['\u997a\u5b50', 'b'])
    with pytest.raises(ValueError, match='3 classes'):
        pictures.confusion_png(tmp_path / 'x.png', np.zeros((2, 2), int), ['a', 'b', 'c'])
    with pytest.raises(OSError, match='could not write'):
        pictures.confusion_png(tmp_path / 'no' / 'x.png', np.zeros((2, 2), int), ['a', 'b'])
    assert [path.name for path in tmp_path.iterdir()] == ['zero.png'] and Image.open(tmp_path / 'zero.png').format == 'PNG'


MANY = """
import resource
import numpy as np
from report import pictures
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
counts, before = np.eye(1000, dtype=int), peak()
pictures.confusion_png('c.png', counts, ['name'] * 1000)
print(peak() - before)
"""


def test_confusion_picture_of_many_classes_needs_little_memory(start, tmp_path):
    """1,000 classes take less than 400 MB beyond what the libraries take."""
    (tmp_path / 'many.py').write_text(MANY)
    done = start('many.py', cwd=tmp_path).wait()
    assert done.code == 0 and int(done.out) < 400, done.err


def test_control_characters_are_escaped(tmp_path, confusion):
    """A newline shows as backslash and n, half of a surrogate pair by its number, in both pictures."""
    def mistakes(name):
        pictures.mistakes_png(tmp_path / 'm.png', np.zeros((1, 96, 96, 3), np.uint8), [name])
        return (tmp_path / 'm.png').read_bytes()
    for name, text, other in (('a\nb', 'a\\nb', 'a b'), ('a\x00', 'a\\x00', 'a'), ('a\udce9', 'a\\udce9', 'a')):
        assert confusion(np.eye(2, dtype=int), [name, 'b'])[0].get_xticklabels()[0].get_text() == text
        assert mistakes(name) == mistakes(text) != mistakes(other)


def test_report_by_hand(tmp_path):
    """Six images of four classes, one of them without images: both tables cell by cell, both pictures."""
    pixels = RANDOM.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    names = ['a/0.png', 'a/1, "x".png', 'a/2\n.png', 'b/\udce9.png', 'b/4.png', 'c/5.png']
    data = data_of(pixels, [0, 0, 0, 1, 1, 2], names, ['a', 'b,b', 'c', 'none'])
    guesses, surety = np.array([0, 1, 2, 2, 1, 0]), np.array([0.9, 0.5, 0.75, 0.5, 0.99, 0.33333], np.float32)
    pictures.report(tmp_path, data, guesses, surety)
    assert table(tmp_path / 'classes.csv') == [
        ['class', 'images', 'right', 'share', 'most often taken for', 'times'],
        ['a', '3', '1', '0.3333', 'b,b', '1'], ['b,b', '2', '1', '0.5000', 'c', '1'], ['c', '1', '0', '0.0000', 'a', '1'],
        ['none', '0', '0', '', '', '0']]
    assert table(tmp_path / 'mistakes.csv') == [
        ['image', 'class', 'taken for', 'probability'], ['a/2\n.png', 'a', 'c', '0.7500'],
        ['a/1, "x".png', 'a', 'b,b', '0.5000'], ['b/\\udce9.png', 'b,b', 'c', '0.5000'], ['c/5.png', 'c', 'a', '0.3333']]
    page = np.asarray(Image.open(tmp_path / 'mistakes.png'))
    for number, i in enumerate((2, 1, 3, 5)):               # surest first, enlarged twelvefold
        left = 8 + 104 * number
        assert all((page[8 + at:104:12, left + at:left + 96:12] == pixels[i]).all() for at in (0, 11))
        assert page[104:132, left:left + 96].min() < 100    # its caption
    pictures.report(tmp_path, data, data.labels, surety)    # no mistakes
    assert len(table(tmp_path / 'mistakes.csv')) == 1
    assert table(tmp_path / 'classes.csv')[1] == ['a', '3', '3', '1.0000', '', '0'] and len(list(tmp_path.iterdir())) == 4
    assert np.asarray(Image.open(tmp_path / 'mistakes.png')).min() < 100


def test_all_mistakes_are_listed_and_the_surest_shown(tmp_path):
    """Sixty mistakes: all in mistakes.csv, falling in probability, the first 40 in mistakes.png, five rows of eight."""
    n, surety = 60, RANDOM.permutation(60) / 60
    data = data_of(RANDOM.integers(0, 256, (n, 96, 96, 3), dtype=np.uint8), [0] * n, [f'{i}' for i in range(n)],
                   ['a', 'Ärgerlich_langes_Wort_ohne_Ende'])
    pictures.report(tmp_path, data, np.ones(n, int), surety)
    rows = table(tmp_path / 'mistakes.csv')[1:]
    assert [int(row[0]) for row in rows] == np.argsort(-surety).tolist()
    page, height = np.asarray(Image.open(tmp_path / 'mistakes.png')), 96 + 8 + 3 * 14   # a long word is cut and takes a line
    top, left = 8 + 4 * height, 8 + 7 * 104
    assert page.shape[:2] == (5 * height + 8, 8 * 104 + 8) and (page[8:height, 104:112] == 255).all()
    assert (page[top:top + 96, left:left + 96] == data.pixels[int(rows[39][0])]).all()
