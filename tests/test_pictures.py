"""report/pictures.py: what a classifier of images leaves to look at, by hand and pixel by pixel, of few classes and many."""
import csv
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from readers import images, tokens
from report import pictures

RANDOM = np.random.default_rng(0)


def test_confusion_picture(tmp_path):
    """2, 20 and 101 classes, names with $ and very long ones, a class without images, no images at all: readable sizes,
    dark on the diagonal, whole or absent on a full disk."""
    for c in (2, 20, 101):
        counts = RANDOM.integers(0, 3, (c, c)) + np.diag(RANDOM.integers(50, 99, c))
        counts[-1] = 0
        names = ['a$_{$b', 'long ' * 20, *(f'class {i}' for i in range(c - 2))]
        pictures.confusion_png(str(tmp_path / f'{c}.png'), counts, names)
        with Image.open(tmp_path / f'{c}.png') as image:
            assert image.format == 'PNG' and image.width > 14 * c + 300 and len(np.unique(np.asarray(image.convert('L')))) > 20
    pictures.confusion_png(tmp_path / 'zero.png', np.zeros((2, 2), int), ['a', 'b'])
    with pytest.raises(ValueError, match='not those of 3 classes'):
        pictures.confusion_png(tmp_path / 'x.png', np.zeros((2, 2), int), ['a', 'b', 'c'])
    with pytest.raises(OSError, match='could not write'):
        pictures.confusion_png(tmp_path / 'no' / 'x.png', np.zeros((2, 2), int), ['a', 'b'])
    assert sorted(path.name for path in tmp_path.iterdir()) == ['101.png', '2.png', '20.png', 'zero.png']


@pytest.mark.parametrize('c', (400, 1000))
def test_confusion_picture_of_many_classes(tmp_path, c):
    """In a minute, 25 inches and 400 MB beyond what the libraries take; the diagonal is there from end to end, no name is."""
    script = f"""
import resource, sys
sys.path.insert(0, {str(tokens.ROOT)!r})
import matplotlib.backends.backend_agg, matplotlib.figure
import numpy as np
from report import pictures
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
counts, before = np.eye({c}, dtype=int), peak()
pictures.confusion_png('c.png', counts, ['name'] * {c})
first = open('c.png', 'rb').read()
print(peak() - before)
pictures.confusion_png('c.png', counts, ['other'] * {c})
assert first == open('c.png', 'rb').read()
"""
    done = subprocess.run([sys.executable, '-c', script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 400
    with Image.open(tmp_path / 'c.png') as image:
        assert max(image.size) <= 120 * 25.5
        grey = np.asarray(image.convert('L'))[:, :2500]
    rows, columns = np.nonzero(grey[80:-80, 80:] < 100)             # within the margins
    assert len(rows) > 2000 and np.ptp(rows) > 2000 and np.ptp(columns) > 2000


def test_names_that_no_font_has_and_control_characters(tmp_path):
    """Neither picture warns of Chinese; a newline shows as backslash and n, a lone half of a character by its number."""
    def both(name):
        pictures.confusion_png(tmp_path / 'c.png', np.eye(2, dtype=int), [name, 'b'])
        pictures.mistakes_png(tmp_path / 'm.png', np.zeros((1, 96, 96, 3), np.uint8), [name])
        return (tmp_path / 'c.png').read_bytes(), (tmp_path / 'm.png').read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert both('\u997a\u5b50')[0] != both('a')[0]
        for name, shown, other in (('a\nb', 'a\\nb', 'a b'), ('a\x00', 'a\\x00', 'a'), ('a\udce9', 'a\\udce9', 'a')):
            assert both(name) == both(shown)
            assert both(name)[0] != both(other)[0] and both(name)[1] != both(other)[1]


def test_report_by_hand(tmp_path):
    """Six images of four classes, one of them without images, one taken for others: both tables cell by cell, both pictures;
    without any mistake, a table with its head alone."""
    pixels = RANDOM.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    names = ['a/0.png', 'a/1, "x".png', 'a/2\n.png', 'b/\udce9.png', 'b/4.png', 'c/5.png']
    data = images.Images(pixels, np.array([0, 0, 0, 1, 1, 2]), names, ['a', 'b,b', 'c', 'none'], 8, (0,) * 3, (1,) * 3, '')
    guesses, surety = np.array([0, 1, 2, 2, 1, 0]), np.array([0.9, 0.5, 0.75, 0.5, 0.99, 0.33333], np.float32)
    pictures.report(tmp_path, data, guesses, surety)
    table = lambda name: list(csv.reader(open(tmp_path / name, newline='', encoding='utf-8')))
    assert table('classes.csv') == [
        ['class', 'images', 'right', 'share', 'most often taken for', 'times'],
        ['a', '3', '1', '0.3333', 'b,b', '1'], ['b,b', '2', '1', '0.5000', 'c', '1'], ['c', '1', '0', '0.0000', 'a', '1'],
        ['none', '0', '0', '', '', '0']]
    assert table('mistakes.csv') == [
        ['image', 'class', 'taken for', 'probability'], ['a/2\n.png', 'a', 'c', '0.7500'],
        ['a/1, "x".png', 'a', 'b,b', '0.5000'], ['b/\\udce9.png', 'b,b', 'c', '0.5000'], ['c/5.png', 'c', 'a', '0.3333']]
    page = np.asarray(Image.open(tmp_path / 'mistakes.png'))
    for number, i in enumerate((2, 1, 3, 5)):               # surest first, enlarged twelvefold
        left = 8 + 104 * number
        assert (page[8:104:12, left:left + 96:12] == pixels[i]).all()
    assert Image.open(tmp_path / 'confusion.png').format == 'PNG'
    pictures.report(tmp_path, data, data.labels, surety)
    assert len(table('mistakes.csv')) == 1 and table('classes.csv')[1] == ['a', '3', '3', '1.0000', '', '0']
    assert len(list(tmp_path.iterdir())) == 4


def test_all_mistakes_are_listed_and_the_surest_shown(tmp_path):
    """Sixty mistakes: all in mistakes.csv, falling in probability, the first 40 in mistakes.png, five rows of eight."""
    n, surety = 60, RANDOM.permutation(60) / 60
    data = images.Images(RANDOM.integers(0, 256, (n, 96, 96, 3), dtype=np.uint8), np.zeros(n, int), [f'{i}' for i in range(n)],
                         ['a', 'b'], 96, (0,) * 3, (1,) * 3, '')
    pictures.report(tmp_path, data, np.ones(n, int), surety)
    rows = list(csv.reader(open(tmp_path / 'mistakes.csv', newline='')))[1:]
    assert [int(row[0]) for row in rows] == np.argsort(-surety).tolist()
    page = np.asarray(Image.open(tmp_path / 'mistakes.png'))
    height = 96 + 8 + 2 * 14                            # a caption takes two lines
    assert page.shape[:2] == (5 * height + 8, 8 * 104 + 8)
    top, left = 8 + 4 * height, 8 + 7 * 104
    assert (page[top:top + 96, left:left + 96] == data.pixels[int(rows[39][0])]).all()


def test_mistakes_picture(tmp_path):
    """Ten tiles of 12 pixels, each eightfold and with its pixels unblurred, captions below; none at all says so."""
    pixels = RANDOM.integers(0, 256, (10, 12, 12, 3), dtype=np.uint8)
    captions = ['pizza, taken for steak 87%'] * 9 + ['Ärgerlich_langes_Wort_ohne_Ende ' * 2]
    pictures.mistakes_png(tmp_path / 'a.png', pixels, captions)
    page = np.asarray(Image.open(tmp_path / 'a.png'))
    assert page.shape[1] == 8 * (96 + 8) + 8 and page.shape[0] > 2 * (96 + 8)
    assert (page[8:104:8, 8:104:8] == pixels[0]).all() and (page[15:104:8, 15:104:8] == pixels[0]).all()
    below = page[104:104 + 28, 8:104]
    assert below.min() < 100 and (page[8:104, 104:112] == 255).all()
    pictures.mistakes_png(tmp_path / 'none.png', pixels[:0], [])
    assert np.asarray(Image.open(tmp_path / 'none.png')).min() < 100
    pictures.mistakes_png(tmp_path / 'large.png', RANDOM.integers(0, 256, (1, 200, 200, 3), dtype=np.uint8), ['x'])
    assert Image.open(tmp_path / 'large.png').width == 200 + 16
