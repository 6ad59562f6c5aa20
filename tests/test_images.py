"""readers/images.py and data/{images,food101,digits}/prepare.py: modes, folders and zips, kills, full disks, one-line errors.
Real files that Pillow writes; only the Hub is replaced, by local parquet files that `datasets` streams."""
import contextlib
import fcntl
import io
import json
import os
import shutil
import signal
import struct
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import one_error
from data.digits import prepare as digits
from data.food101 import prepare as food101
from data.images.prepare import class_folders
from readers import images, tokens

RANDOM = np.random.default_rng(0)
SETTINGS = {'source': 'photos', 'revision': '1'}
# a prepare.py that takes 20 ms an image and notes its place after every second one, in all its processes
SLOW = f"""
import sys, time
sys.path.insert(0, {str(tokens.ROOT)!r})
from readers import images
from data.images import prepare
images.SAVE_S, images.BATCH, square = 0, 2, images.square
def slow(*args):
    time.sleep(0.02)
    return square(*args)
images.square = slow
if __name__ == '__main__':
    images.run(prepare.main)
"""


def noise(width=12, height=10):
    return Image.fromarray(RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rgb(source):
    return np.asarray(images.read_image(source)).tolist()


def square_of(source, size=8):
    return images.square(images.read_image(source), size)


def write_all(folder, names):
    """A different little image under each name; -> folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise().save(folder / name)
    return folder


def write_photos(folder):
    """train/ with 12 and val/ with 4 images of each of two classes; -> folder."""
    return write_all(folder, [f'{split}/{name}/{i:02d}.png' for split, n in (('train', 12), ('val', 4))
                              for name in ('cat', 'dog') for i in range(n)])


def zipped(folder, path, prefix=''):
    """The files below a folder as a .zip, without entries for folders; -> path."""
    with zipfile.ZipFile(path, 'w') as archive:
        for file in sorted(folder.rglob('*')):
            if file.is_file():
                archive.write(file, prefix + file.relative_to(folder).as_posix())
    return path


def contents(folder, *without):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name not in without}


def done_with(folder):
    """How many images an unfinished folder has done with by its own record; 99 when it is complete."""
    record = json.loads((folder / 'images.json').read_bytes()) if (folder / 'images.json').exists() else {}
    return 99 if record.get('complete') else sum(state['seen'] for state in record.get('progress', {}).values())


@pytest.fixture
def photos(tmp_path):
    return write_photos(tmp_path / 'photos')


@pytest.fixture(scope='module')
def slow(tmp_path_factory, start):
    """(slow script, its options, the files that they make when nothing stops them)"""
    folder = tmp_path_factory.mktemp('slow')
    script, options = folder / 'slow.py', ['--dir', write_photos(folder / 'photos'), '--size=8', '--out_dir', 'out']
    script.write_text(SLOW)
    done = start(script, *options, '--workers=1', cwd=folder).wait()
    assert done.code == 0, done.err
    assert len(contents(folder / 'out' / 'photos')) == 7
    return script, options, contents(folder / 'out' / 'photos')


# ------------------------------------------------------------------------------------------------------- one image


def test_every_image_mode_becomes_rgb():
    """Grey, palette, CMYK, 1 and 16 bits, by hand-written pixels; transparent pixels become white."""
    assert rgb(encoded(Image.new('CMYK', (1, 1), (255, 0, 0, 0)), 'TIFF')) == [[[0, 255, 255]]]
    assert rgb(encoded(Image.new('L', (1, 1), 77), 'BMP')) == [[[77] * 3]]
    bits = Image.fromarray(np.array([[True, False]]))
    assert bits.mode == '1' and rgb(encoded(bits, 'PNG')) == [[[255] * 3, [0] * 3]]
    palette = Image.new('P', (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 0])
    palette.putpixel((1, 0), 1)
    for kind in ('PNG', 'GIF'):
        assert rgb(encoded(palette, kind)) == [[[10, 20, 30], [200, 100, 0]]]
        assert rgb(encoded(palette, kind, transparency=1)) == [[[10, 20, 30], [255] * 3]]
    assert rgb(encoded(Image.new('LA', (1, 1), (0, 0)), 'PNG')) == [[[255] * 3]]
    assert rgb(encoded(Image.new('RGBA', (1, 1), (200, 0, 0, 51)), 'PNG')) == [[[244, 204, 204]]]     # a fifth of red
    assert rgb(encoded(Image.new('RGB', (1, 1), (1, 2, 3)), 'PNG', transparency=(1, 2, 3))) == [[[255] * 3]]
    sixteen = np.array([[0, 257 * 100, 65535]], np.uint16)
    for raw in (encoded(Image.fromarray(sixteen), 'PNG'), encoded(Image.fromarray(sixteen), 'TIFF'),
                encoded(Image.fromarray(sixteen.astype(np.int32)), 'TIFF'), b'P5 3 1 65535\n' + sixteen.byteswap().tobytes()):
        assert rgb(raw) == [[[0] * 3, [100] * 3, [255] * 3]]
    assert images.read_image(encoded(noise(), 'WEBP', lossless=True)).mode == 'RGB'


def test_exif_turns_an_image(tmp_path):
    """Orientation 6 is a quarter turn, from a path as from bytes; broken EXIF leaves the picture as it is."""
    image, exif = noise(12, 10), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / 'turned.png', exif=exif)
    turned = images.read_image(tmp_path / 'turned.png')
    assert turned.size == (10, 12) and turned.tobytes() == image.transpose(Image.Transpose.ROTATE_270).tobytes()
    assert images.read_image((tmp_path / 'turned.png').read_bytes()).tobytes() == turned.tobytes()
    raw = encoded(image, 'JPEG', exif=exif)
    assert images.read_image(raw).size == (10, 12)
    assert images.read_image(raw.replace(b'II*\0', b'XX*\0').replace(b'MM\0*', b'XX\0*')).size == (12, 10)


def test_a_file_that_is_no_image_is_one_line(tmp_path):
    """Text, an empty or cut file, huge or zero sizes, a folder, PostScript, floats; without warnings."""
    def png(width, height):
        chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
        head = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0))
        return b'\x89PNG\r\n\x1a\n' + head + chunk(b'IEND', b'')
    (tmp_path / 'text.jpg').write_text('this is no image')
    jpeg = encoded(noise(100, 100), 'JPEG')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for source, message in ((tmp_path / 'text.jpg', 'is no image'), (b'', r'is empty \(0 bytes\)'),
                                (jpeg[:len(jpeg) // 2], 'truncated'), (png(30000, 30000), '900000000 pixels'),
                                (png(10000, 10000), 'cannot be decoded'), (png(0, 5), 'is no image|cannot be'),
                                (tmp_path, 'cannot be read'),
                                (tmp_path / 'no.jpg', 'cannot be read .No such file'),
                                (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'is no image'),
                                (encoded(Image.new('F', (2, 2), 0.5), 'TIFF'), '^float image, .*; convert it to 8 bits')):
            with pytest.raises(ValueError, match=message) as error:
                images.read_image(source)
            assert '\n' not in str(error.value)


def test_square_is_the_middle_of_the_scaled_image():
    """It equals Pillow's resize and crop, up and down, wide and tall; a single pixel or a line fills the square."""
    for width, height, size in ((60, 40, 20), (40, 60, 20), (6, 4, 20), (20, 20, 20)):
        image = noise(width, height)
        short = min(width, height)
        scaled = image.resize((width * size // short, height * size // short), Image.Resampling.BILINEAR)
        left, top = (scaled.width - size) // 2, (scaled.height - size) // 2
        expected = np.asarray(scaled.crop((left, top, left + size, top + size)), dtype=int)
        result = images.square(image, size)
        assert result.shape == (size, size, 3) and result.dtype == np.uint8
        assert np.abs(result - expected).max() <= 1, (width, height, size)
    assert (images.square(Image.new('RGB', (1, 1), (1, 2, 3)), 16) == (1, 2, 3)).all()
    assert images.square(noise(3000, 1), 8).shape == (8, 8, 3)


# ---------------------------------------------------------------------------------------------------- data folders


def test_a_folder_holds_the_pixels_of_its_images(photos, tmp_path, capsys):
    """Pixels, labels, odd names, mean and deviation of each split; a second run leaves every file alone."""
    odd = ['train/cat/zeile\num "x" \\ é.PNG', 'train/dog/more/deep.png']
    write_all(photos, odd)
    classes, splits = class_folders(photos)
    assert classes == ['cat', 'dog'] and [len(splits[split]) for split in splits] == [26, 8]
    build = lambda: images.build(tmp_path / 'out', SETTINGS, splits, classes, 8, 1, [])
    build()
    assert "train: got 26 images, 13 of each of 2 classes" in capsys.readouterr().out
    train, val = (images.load(str(tmp_path / 'out'), split) for split in ('train', 'val'))
    for split, data in (('train', train), ('val', val)):
        assert len(data) == len(splits[split]) and data.size == 8 and data.classes == classes
        assert data.pixels.dtype == np.uint8 and isinstance(data.pixels, np.memmap) and not data.pixels.flags.writeable
        assert data.labels.dtype == np.int64 and data.labels.tolist() == [label for _, label, _ in splits[split]]
        for name, label, pixels in zip(data.names, data.labels, data.pixels, strict=True):
            assert (pixels == square_of(photos / name)).all() and name.split('/')[1] == classes[label]
    assert set(odd) < set(train.names)
    values = np.asarray(train.pixels).reshape(-1, 3).astype(np.float64) / 255
    assert train.mean == pytest.approx(values.mean(0), abs=1e-12) and train.std == pytest.approx(values.std(0), abs=1e-12)
    assert train.digest == images.load(tmp_path / 'out', 'train').digest != val.digest
    times = lambda: {path.name: path.stat().st_mtime_ns for path in (tmp_path / 'out').iterdir()}
    before = times()
    build()
    assert times() == before and len(before) == 7 and 'left as it is' in capsys.readouterr().out


def test_any_number_of_workers_writes_the_same_bytes(photos, tmp_path, command):
    """One process from a folder as two from its zip, a damaged image included."""
    (photos / 'train' / 'cat' / '05b.png').write_bytes(b'no')
    zipped(photos, tmp_path / 'photos.zip')
    records, files = [], []
    for source, workers in (('photos', 1), ('photos.zip', 2)):
        args = ('--dir', source, '--size=8', f'--name=x{workers}', '--out_dir', 'out', f'--workers={workers}')
        assert 'left out 1 damaged' in command('images', *args)
        files.append(contents(tmp_path / 'out' / f'x{workers}'))
        records.append(json.loads(files[-1].pop('images.json')) | {'command': 0, 'settings': 0})
    assert files[0] == files[1] and len(files[0]) == 6 and records[0] == records[1]


def test_damaged_images_are_left_out_and_listed(photos, tmp_path, capsys):
    """20 are printed with their reasons, images.json lists all; the others are unaffected. So is a damaged member of a zip."""
    whole = zipped(photos, tmp_path / 'whole.zip').read_bytes()
    (photos / 'train' / 'cat' / '00.png').write_bytes(b'')
    (photos / 'val' / 'dog' / '01.png').write_text('text')
    for i in range(30):
        (photos / 'train' / 'dog' / f'x{i}.png').write_bytes(b'')
    classes, splits = class_folders(photos)
    images.build(tmp_path / 'out', SETTINGS, splits, classes, 4, 1, [])
    out = capsys.readouterr().out
    assert 'train: left out train/cat/00.png: is empty (0 bytes)\n' in out and 'left out 32 damaged' in out
    assert "train: got 23 images, 11 ('cat') to 12 ('dog') of each of 2 classes; left out 31 damaged" in out
    assert out.count('train: left out') == images.REPORTED
    skipped = json.loads((tmp_path / 'out' / 'images.json').read_bytes())['skipped']
    assert len(skipped['train']) == 31 and skipped['val'][0][0] == 'val/dog/01.png' and 'is no image' in skipped['val'][0][1]
    assert len(images.load(tmp_path / 'out', 'train')) == 23
    assert 'val/dog/01.png' not in images.load(tmp_path / 'out', 'val').names

    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        place = archive.getinfo('train/cat/03.png')
    at = place.header_offset + 60 + place.compress_size // 2
    (tmp_path / 'flipped.zip').write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1:])
    classes, splits = class_folders(tmp_path / 'flipped.zip')
    images.build(tmp_path / 'flipped', SETTINGS, splits, classes, 8, 1, [])
    assert 'left out train/cat/03.png: is damaged inside the zip (Bad CRC-32' in capsys.readouterr().out
    assert len(images.load(tmp_path / 'flipped', 'train')) == 23


def test_a_class_without_a_readable_image_is_one_line(tmp_path, command):
    """The line names the class or split; the folder stays unfinished, also when one tries again."""
    for split, pattern, expected in (('train', 'dog/*', "class 'dog'"), ('val', '*/*', 'val: of the 8 images')):
        for path in (write_photos(tmp_path / split) / split).glob(pattern):
            path.write_text('text')
        for _ in range(2):
            assert expected in command('images', '--dir', split, '--out_dir', 'out', '--workers=1', ok=False)
        with pytest.raises(ValueError, match=f'is unfinished; type: python data/images/prepare.py --dir {split}'):
            images.load(tmp_path / 'out' / split, 'train')


def test_killed_and_continued_is_as_if_unbroken(slow, tmp_path, start):
    """SIGKILL again and again, half an image written each time: in the end the unbroken files."""
    script, options, whole = slow
    folder, kills, printed, before = tmp_path / 'out' / 'photos', 0, '', 0
    while done_with(folder) < 99:
        job = start(script, *options, '--workers=1', cwd=tmp_path)
        while job.runs() and done_with(folder) < before + 8:
            time.sleep(0.005)
        with contextlib.suppress(ProcessLookupError):
            job.signal(signal.SIGKILL)
        done = job.wait()
        printed += done.out
        before = done_with(folder)
        if done.code and before < 99:
            kills += 1
            with pytest.raises(ValueError, match='is unfinished; type: python .*slow.py --dir'):
                images.load(folder, 'train')
            for path in folder.glob('*.*'):
                if path.name != 'images.json':
                    path.open('ab').write(b'half an image')
    assert kills >= 2 and printed.count('continuing after') >= 2
    assert contents(folder) == whole


def test_two_workers_end_with_their_build(slow, tmp_path, start):
    """No process outlives a killed build; Ctrl-C is status 130 and one line; the same command then gives the unbroken files."""
    script, options, whole = slow
    folder = tmp_path / 'out' / 'photos'
    begin = lambda: start(script, *options, '--workers=2', cwd=tmp_path, real=True)

    def interrupted(number, send):
        job, before = begin(), done_with(folder)
        while job.runs() and done_with(folder) <= before:
            time.sleep(0.01)
        send(job.pid, number)
        return job.wait()

    def processes():
        for path in Path('/proc').glob('[0-9]*/cmdline'):
            with contextlib.suppress(OSError):
                yield path.read_bytes()
    assert interrupted(signal.SIGKILL, os.kill).code == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while any(str(script).encode() in words for words in processes()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    done = interrupted(signal.SIGINT, os.killpg)
    assert done.code == 130 and done.err.split('\n') == ['', 'interrupted; run the same command again', ''], done.err
    assert 'continuing after' in begin().wait().out
    assert contents(folder, 'images.json') == {name: raw for name, raw in whole.items() if name != 'images.json'}


def test_a_full_disk_is_one_line_and_can_be_continued(slow, tmp_path, start):
    """No file may grow beyond 3,000 bytes: status 2; without that limit the same command gives the unbroken files."""
    script, options, whole = slow
    run = lambda **how: start(script, *options, '--workers=1', cwd=tmp_path, **how).wait()
    full = run(patch='import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))')
    assert 'File too large; put that right' in one_error(full)
    assert 'train: continuing after 14 images' in run().out and contents(tmp_path / 'out' / 'photos') == whole


def test_other_settings_and_damage_rebuild_a_folder(photos, tmp_path, command):
    """Another --size, a new image, a flipped bit, a cut or longer file: a note, and the right files again."""
    def again(*args):
        return command('images', '--dir', 'photos', '--out_dir', 'out', '--workers=1', *args)
    folder = tmp_path / 'out' / 'photos'
    again('--size=8')
    first = contents(folder)
    assert 'left as it is' in again('--size=8', '--val_share=0.5')      # which plays no part beside a val/
    assert 'has other settings' in again('--size=6') and images.load(folder, 'val').size == 6
    assert 'has other settings' in again('--size=8') and contents(folder) == first
    for path in {*folder.glob('*.*')} - {folder / 'images.json'}:
        raw = path.read_bytes()
        for damaged, message in ((raw[:-1] + bytes([raw[-1] ^ 1]), 'does not match its checksum'), (raw[:-1], 'bytes, '),
                                 (raw + b'x', 'bytes, ')):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=f'{path.name} .*{message}.*; type: python data/images/prepare.py --dir'):
                images.load(folder, path.name.split('_')[0])
            if path.name == 'val_names.txt':
                assert f'is damaged (out/photos/{path.name}' in again('--size=8') and contents(folder) == first
        path.write_bytes(raw)
    write_all(photos, ['val/dog/new.png'])
    assert 'has other settings' in again('--size=8') and len(images.load(folder, 'val')) == 9


def test_load_tells_what_to_type(photos, tmp_path, monkeypatch):
    """No folder, an unfinished one, another version or file, an unknown split: the error says what to type."""
    with pytest.raises(ValueError, match='no images.json; type: python data/NAME/prepare.py, where NAME is digits, '):
        images.load(tmp_path / 'no', 'train')
    monkeypatch.setattr(tokens, 'ROOT', tmp_path)
    for folder, hint in (('data/images/mine', 'python data/images/prepare.py --dir PATH --name=mine'),
                         ('data/food101', 'python data/food101/prepare.py'), ('data/digits', 'python data/digits/prepare.py'),
                         ('data/pycls', 'python data/NAME/prepare.py, where NAME is digits, food101 or images')):
        with pytest.raises(ValueError, match=f'holds no images.json; type: {hint}$'):
            images.load(tmp_path / folder, 'train')
    built, (classes, splits) = tmp_path / 'built', class_folders(photos)
    images.build(built, SETTINGS, splits, classes, 8, 1, ['--dir', 'photos'])
    with pytest.raises(ValueError, match="no split 'test'; type one of: train, val"):
        images.load(built, 'test')
    record = json.loads((built / 'images.json').read_bytes())
    for changed, message in (({'version': 9}, 'format version 9, this program reads 1; type: python'),
                             ({'complete': False, 'progress': {}}, 'is unfinished; type: python .* --dir photos$')):
        (built / 'images.json').write_text(json.dumps(record | changed))
        with pytest.raises(ValueError, match=message):
            images.load(built, 'train')
    for text in ('{', '[]', '5', '{"complete": true}', '{"complete": false, "version": 1, "size": 1}'):
        (built / 'images.json').write_text(text)
        with pytest.raises(ValueError, match='prepare.py.*; remove it and type: '):
            images.load(built, 'train')


def test_files_of_others_are_not_overwritten(photos, tmp_path, command):
    """A foreign train_pixels.bin stays; a folder in use is refused, and, before decoding, one too large for the disk."""
    args = ('--dir', photos, '--out_dir', tmp_path, '--name=x', '--workers=1')
    (tmp_path / 'x').mkdir()
    (tmp_path / 'x' / 'train_pixels.bin').write_text('mine')
    assert 'no prepare.py wrote it' in command('images', *args, ok=False)
    assert (tmp_path / 'x' / 'train_pixels.bin').read_text() == 'mine'
    handle = os.open(tmp_path / 'x', os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)                 # the weakest lock there is
    assert 'another prepare.py is writing' in command('images', *args, ok=False)
    os.close(handle)
    line = command('images', *args[:4], '--name=y', '--size=1000000', ok=False)     # squares that need 96 TB
    assert '96,000,000 MB' in line and '--size' in line and not (tmp_path / 'y' / 'train_pixels.bin').exists()


# --------------------------------------------------------------------------------------------------- class folders


def test_splits_on_top_or_by_hash_from_folder_and_zip(photos, tmp_path, capsys):
    """A folder, its zip and its zip with a folder around it give the same split; without val/ it is a tenth of each class,
    chosen by the name alone, so that other classes change nothing."""
    listed = lambda path, **options: {split: [entry[:2] for entry in entries]
                                      for split, entries in class_folders(path, **options)[1].items()}
    expected = {split: [(f'{split}/{name}/{i:02d}.png', label) for label, name in enumerate(('cat', 'dog')) for i in range(n)]
                for split, n in (('train', 12), ('val', 4))}
    assert listed(photos) == listed(zipped(photos, tmp_path / 'a.zip')) == expected
    wrapped = listed(zipped(photos, tmp_path / 'b.zip', 'around/it/'))
    assert wrapped == {split: [(f'around/it/{name}', label) for name, label in entries] for split, entries in expected.items()}
    for name in ('Validation', 'test'):
        (photos / 'val').rename(photos / name)
        assert [label for _, label in listed(photos)['val']] == [label for _, label in expected['val']]
        (photos / name).rename(photos / 'val')
    flat = write_all(tmp_path / 'flat', [f'{name}/{i}.png' for name in 'abc' for i in range(30)] + ['d/1.png', 'd/2.png'])
    whole = listed(flat)
    assert whole == listed(zipped(flat, tmp_path / 'flat.zip'))
    counts = lambda splits, split: [sum(label == i for _, label in splits[split]) for i in range(4)]
    assert counts(whole, 'val') == [3, 3, 3, 1] and counts(whole, 'train') == [27, 27, 27, 1]
    assert not {name for name, _ in whole['val']} & {name for name, _ in whole['train']}
    assert counts(listed(flat, val_share=0.5), 'val') == [15, 15, 15, 1]
    shutil.rmtree(flat / 'a')
    assert {name for name, _ in listed(flat)['val']} == {name for name, _ in whole['val'] if name[0] != 'a'}
    only = write_all(tmp_path / 'only', [f'train/{name}/{i}.png' for name in 'ab' for i in range(10)])
    assert counts(listed(only), 'val')[:2] == [1, 1] and listed(only)['train'][0][0].startswith('train/a/')
    write_all(photos, ['other/cat/1.png'])
    capsys.readouterr()
    assert listed(photos) == expected and 'train and val are used, not other' in capsys.readouterr().out


def test_hidden_and_other_files_are_ignored_and_links_followed(photos, tmp_path, capsys):
    """.hidden, __MACOSX, text and dead links do not count; links to files and folders do, once."""
    before = class_folders(photos)
    write_all(photos, ['train/.hidden/1.png', 'train/cat/.2.png', '__MACOSX/train/cat/3.png', 'train/beside.png'])
    (photos / 'train' / 'cat' / 'notes.txt').write_text('x')
    (photos / 'train' / 'cat' / 'dead.png').symlink_to(tmp_path / 'nowhere')
    (photos / 'train' / 'cat' / 'circle').symlink_to(photos / 'train')
    assert class_folders(photos) == before
    assert '/train: ignored 2 files: 1 outside of a class folder, 1 .txt' in capsys.readouterr().out
    assert class_folders(zipped(photos, tmp_path / 'x.zip'))[0] == before[0]
    assert len(class_folders(tmp_path / 'x.zip')[1]['train']) == 24
    elsewhere = write_all(tmp_path / 'elsewhere', ['1.JPG', '2.jpeg'])
    for split in ('train', 'val'):
        (photos / split / 'linked').symlink_to(elsewhere)
    (photos / 'train' / 'cat' / 'link.png').symlink_to(elsewhere / '1.JPG')
    classes, splits = class_folders(photos)
    assert classes == ['cat', 'dog', 'linked'] and len(splits['train']) == 24 + 2 + 1 and len(splits['val']) == 8 + 2


def test_mistakes_in_class_folders_are_one_line(tmp_path, command):
    """No such path, no classes, one class, an empty one, classes that differ, one image, a bad zip, an odd share or name."""
    write_all(tmp_path, ['none/1.png', 'one/a/1.png', 'one/a/2.png', 'few/a/1.png', 'few/b/1.png', 'few/b/2.png',
                         *(f'empty/{split}/{name}/1.png' for split in ('train', 'val') for name in 'ab'),
                         *(f'more/{name}/1.png' for name in ('train/a', 'train/b', 'val/a', 'val/b', 'val/bird')),
                         *(f'less/{name}/1.png' for name in ('train/a', 'train/b', 'train/dog', 'val/a', 'val/b'))])
    (tmp_path / 'empty' / 'val' / 'c').mkdir()
    whole = zipped(tmp_path / 'few', tmp_path / 'whole.zip').read_bytes()
    flags = whole.index(b'PK\x01\x02') + 8
    (tmp_path / 'text.zip').write_bytes(b'text')
    (tmp_path / 'half.zip').write_bytes(whole[:len(whole) // 2])
    (tmp_path / 'secret.zip').write_bytes(whole[:flags] + b'\1' + whole[flags + 1:])
    for args, says in (('nowhere', 'nowhere'), ('none', 'none has no class folders'), ('one', "only one class, 'a'"),
                       ('few', "class 'a' of few has one image"), ('few --val_share=1', '1.0'),
                       ('more', "more has a class 'bird' in val and not in train"),
                       ('less', "less has a class 'dog' in train and not in val"), ('empty', 'empty/val/c has no images'),
                       ('text.zip', 'text.zip is no .zip, or a damaged one'), ('half.zip', 'half.zip is no .zip, or a damaged'),
                       ('secret.zip', 'secret.zip is encrypted; unpack it'), ('few --name=../up', 'no folder name'),
                       ('few --di=x', '--di')):
        assert says in command('images', '--dir', *args.split(), '--out_dir', 'out', ok=False)
    write_photos(tmp_path / 'photos')
    for option in ('--size=0', '--workers=-1'):
        assert option in command('images', '--dir', 'photos', '--out_dir', 'out', option, ok=False)
    assert not (tmp_path / 'out').exists()


def test_a_file_that_cannot_be_read_stops_the_run(photos, tmp_path):
    """A path that vanished ends the run in OSError; only damaged images are left out."""
    classes, splits = class_folders(photos)
    (photos / 'train' / 'dog' / '00.png').unlink()
    for workers in (1, 2):
        with pytest.raises(FileNotFoundError):
            images.build(tmp_path / 'out', SETTINGS, splits, classes, 8, workers, [])


def test_food10_from_its_zip(tmp_path, command):
    """5,000 photographs: 375 and 125 of each of ten dishes, none damaged, the pixels of the zip, colors of food."""
    food10 = tokens.ROOT.parent / 'shared/data/food10.zip'
    if not food10.is_file():
        pytest.skip('needs food10.zip')
    out = command('images', '--dir', food10, '--size=32', '--out_dir', tmp_path, '--workers=1')
    assert '5,000 images of 32 x 32 pixels: 15.4 MB' in out and 'damaged' not in out
    assert 'train: got 3,750 images, 375 of each of 10 classes' in out and 'val: got 1,250 images, 125 of each' in out
    train = images.load(tmp_path / 'food10', 'train')
    assert train.classes[0] == 'apple_pie' and 0.5 < train.mean[0] < 0.6 and train.mean[0] > train.mean[1] > train.mean[2]
    with zipfile.ZipFile(food10) as archive:
        for number in (0, 1999, 3749):
            assert (train.pixels[number] == square_of(archive.read(train.names[number]), 32)).all()


# --------------------------------------------------------------------------------------------------------- food101


def test_food101_from_the_unpacked_archive(tmp_path, command):
    """Images and splits are those of meta/*.txt; a missing file is named."""
    root = write_all(tmp_path / 'food-101', [f'images/{name}/{i}.jpg' for name in ('pie', 'soup') for i in range(6)])
    (root / 'meta').mkdir()
    for file, numbers in (('train', (5, 0, 3, 1)), ('test', (2, 4))):
        (root / 'meta' / f'{file}.txt').write_text(''.join(f'{name}/{i}\n' for name in ('soup', 'pie') for i in numbers))
    out = command('food101', '--dir', root, '--size=8', '--out_dir', 'a', '--workers=1')
    assert 'val: 4 images are listed, 25,250 in the published set' in out
    assert 'train: got 8 images, 4 of each of 2 classes' in out
    data = images.load(tmp_path / 'a', 'train')
    assert data.names[:5] == ['soup/5.jpg', 'soup/0.jpg', 'soup/3.jpg', 'soup/1.jpg', 'pie/5.jpg']
    assert data.classes == ['pie', 'soup'] and data.labels.tolist() == [1] * 4 + [0] * 4
    assert (data.pixels[4] == square_of(root / 'images' / 'pie' / '5.jpg')).all()
    command('food101', '--dir', tmp_path, '--size=8', '--out_dir', 'b', '--workers=1')
    assert images.load(tmp_path / 'b', 'val').digest == images.load(tmp_path / 'a', 'val').digest
    refused = lambda folder: command('food101', '--dir', folder, '--out_dir', 'c', ok=False)
    (root / 'images' / 'pie' / '3.jpg').unlink()
    assert 'images/pie/3.jpg is missing; unpack' in refused(root)
    (root / 'meta' / 'test.txt').write_text('cake/1\n')
    assert "test.txt lists 'cake/1', of no class" in refused(root)
    assert 'has no meta/train.txt; unpack' in refused(root / 'meta')


def test_food101_from_the_hub(tmp_path, monkeypatch):
    """Images come from three files a split at the pinned revision; a run whose connection broke continues in that file,
    without reading those before, and the result is that of an unbroken run."""
    import datasets
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(images, 'SAVE_S', 0)
    monkeypatch.setattr(images, 'BATCH', 2)
    monkeypatch.setattr(food101, 'EXPECTED', {'val': 5, 'train': 14})
    features = datasets.Features({'image': datasets.Image(), 'label': datasets.ClassLabel(names=['pie', 'soup', 'tea'])})
    raws, files, asked, read, broken = {}, {}, [], [], []
    for split, n in (('train', 14), ('validation', 5)):
        raws[split] = [encoded(noise(), 'PNG') for _ in range(n)]
        rows = datasets.Dataset.from_dict({'image': [{'bytes': raw, 'path': f'{i}.jpg'} for i, raw in enumerate(raws[split])],
                                           'label': [i % 3 for i in range(n)]}, features)
        files[split] = [str(tmp_path / f'{split}-{i}.parquet') for i in range(3)]
        for i, path in enumerate(files[split]):
            rows.shard(3, i, contiguous=True).to_parquet(path)
    load_dataset, shard = datasets.load_dataset, datasets.IterableDataset.shard

    def stand_in(name, *, split, revision, streaming):
        asked.append((name, split, revision, streaming))
        return load_dataset('parquet', data_files=files[split], split='train', streaming=streaming, features=features)

    def shard_or_not(self, count, number):
        read.append(number)
        if broken and read.count(2) > 1:                # the third file of train
            raise ConnectionError('no network')
        return shard(self, count, number)

    def no_network(*args, **options):
        raise ConnectionError('no network')
    monkeypatch.setattr(datasets, 'load_dataset', stand_in)
    build = lambda name: food101.main(['--size=8', '--workers=1', '--out_dir', str(tmp_path / name)])
    build('whole')
    assert asked == [(food101.HUB_ID, split, food101.REVISION, True) for split in ('validation', 'train')]
    data = images.load(tmp_path / 'whole', 'train')
    assert data.names[:4] == ['pie/0.jpg', 'soup/1.jpg', 'tea/2.jpg', 'pie/3.jpg'] and data.labels.tolist()[:4] == [0, 1, 2, 0]
    assert all((pixels == square_of(raw)).all() for pixels, raw in zip(data.pixels, raws['train'], strict=True))

    monkeypatch.setattr(datasets.IterableDataset, 'shard', shard_or_not)
    broken.append(True)
    with pytest.raises(ConnectionError):                # between two files
        build('broken')
    broken.clear()
    read.clear()
    build('broken')
    assert read == [1, 2] and contents(tmp_path / 'broken', 'images.json') == contents(tmp_path / 'whole', 'images.json')
    monkeypatch.setattr(food101, 'EXPECTED', {'val': 5, 'train': 15})
    with pytest.raises(ValueError, match='train of ethz/food101 has 14 images, expected 15'):
        build('count')
    monkeypatch.setattr(datasets, 'load_dataset', no_network)
    with pytest.raises(ValueError, match=r'from the Hub failed \(ConnectionError: no network\); run the same command again'):
        build('none')


# ---------------------------------------------------------------------------------------------------------- digits


def test_digits_counts_and_pixels(tmp_path, command):
    """1,442 + 355 images, every fifth of each digit in val; grey, with the pixels of scikit-learn."""
    from sklearn.datasets import load_digits
    out = command('digits', '--out_dir', 'large')
    assert "train: got 1,442 images, 140 ('8') to 147 ('3') of each of 10 classes" in out and 'val: got 355 images' in out
    command('digits', '--size=8', '--out_dir', 'small')
    source, numbers = load_digits(), []
    for split, n in digits.EXPECTED.items():
        large, small = images.load(tmp_path / 'large', split), images.load(tmp_path / 'small', split)
        assert len(large) == n and large.size == 16 and large.classes == list('0123456789')
        assert (large.pixels == large.pixels[..., :1]).all()
        of_split = [int(name.split('/')[1]) for name in small.names]
        assert (small.pixels[..., 0] == np.rint(source.images[of_split] * 255 / 16)).all()
        assert (small.labels == source.target[of_split]).all()
        numbers += of_split
    assert sorted(numbers) == list(range(1797))
    assert '--siz' in command('digits', '--siz=8', ok=False)
