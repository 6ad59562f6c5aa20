"""Image data folders: decodes image files into the uint8 arrays that train_cnn.py reads.

A data folder holds three files per split. images.json records their settings, sizes and checksums:

    data/digits/train_pixels.bin  val_pixels.bin    uint8, n x size x size x 3, one image after the other, RGB
    data/digits/train_labels.bin  val_labels.bin    int64, little endian: the position of each image's class in `classes`
    data/digits/train_names.txt   val_names.txt     the source of each image, one per line, escaped as in JSON
    data/digits/images.json                         {"version", "size", "classes", "settings": {"source", "revision", ...},
                                                     "rows", "skipped": [[name, why]], "bytes", "crc32": {split: ...},
                                                     "mean", "std": of the training pixels in 0..1, "command", "complete"}

Read:   data = images.load(tokens.dataset_dir('digits'), 'train'); data.pixels[7], data.labels[7], data.classes
Write:  see data/{digits,food101,images}/prepare.py

Pixels are stored at the size that training uses, so no epoch decodes a JPEG again. A step reads its images through a memory
map. The price is disk space: Food-101 at 256 x 256 takes 19.9 GB, 4 times its download.
"""
import collections
import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import threading
import time
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from configurator import fail
from readers import tokens

VERSION = 1
FILES = ('pixels.bin', 'labels.bin', 'names.txt')
FORMATS = ('JPEG', 'PNG', 'BMP', 'GIF', 'WEBP', 'TIFF', 'PPM')     # Pillow would also try EPS, which starts Ghostscript
BATCH = 16              # images per message between processes; fewer if they are large
SAVE_S = 5              # seconds between two saves of the progress; a killed run repeats at most that much work
REPORTED = 20           # damaged images per split to print; images.json lists all
CHECKED_BYTES = 1 << 30  # load() checks the checksums of files up to this size (about a second); prepare.py checks all files

# ---------------------------------------------------------------------------------------------------------------------
# one image


def read_image(source):
    """Decode a JPEG, PNG, BMP, GIF, WebP, TIFF or PPM, path or bytes -> PIL image, RGB, turned upright by its EXIF data.

    Transparent pixels become white. Only the first frame of several is used. 16-bit grey is scaled to 8 bits. Raises
    ValueError, one line: not an image, cut short, too large, or of floats.
    """
    try:
        raw = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as e:
        raise ValueError(f'cannot be read ({e.strerror or e})') from None
    if not raw:
        raise ValueError('is empty (0 bytes)')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')             # odd EXIF and palettes; a size that Pillow refuses is still an error
            with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
                image.load()
                if image.mode != 'F':
                    return _rgb(image)
    except Image.UnidentifiedImageError:
        raise ValueError(f'is no image: none of {", ".join(FORMATS)}') from None
    except MemoryError:
        raise
    except Exception as e:                              # noqa: BLE001  each decoder raises other classes for damaged files
        raise ValueError(f'cannot be decoded ({" ".join(str(e).split())[:120] or type(e).__name__})') from None
    raise ValueError('float image, its range is unknown; convert it to 8 bits, or to 16-bit grey')


def _rgb(image):
    with contextlib.suppress(Exception):                # an image with damaged EXIF is still usable
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I'):                      # modes I;16 (any byte order) and I: Pillow's conversion would clip
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert('RGB')


def square(image, size):
    """Scale and crop a PIL RGB image to a square -> uint8 (size, size, 3). The shorter side is scaled to `size` (bilinear,
    averaging when it shrinks); of the longer side the middle is kept."""
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))


# ---------------------------------------------------------------------------------------------------------------------
# data folders: reading


@dataclass
class Images:
    """One split of images. pixels: uint8 (n, size, size, 3), a read-only memory map; labels: int64 (n,); names: source of
    each image; classes: name of each label; mean, std: per channel of the training pixels in 0..1; digest: of the contents."""
    pixels: np.memmap
    labels: np.ndarray
    names: list
    classes: list
    size: int
    mean: tuple
    std: tuple
    digest: str

    def __len__(self):
        return len(self.labels)


def load(folder, split):
    """Load one split, 'train' or 'val', of a folder written by build() -> Images. Raises ValueError, one line that ends with
    the command to type: the folder is missing, unfinished or of another version, the split unknown, or a file changed."""
    folder = Path(folder)
    record = _read_record(folder)
    wrong = ('holds no images.json' if record is None else
             f'has format version {record["version"]}, this program reads {VERSION}' if record['version'] != VERSION else
             'is unfinished' if not record['complete'] else '')
    if wrong:
        raise ValueError(f'{folder} {wrong}; type: {_command(folder, record)}')
    if split not in record['rows']:
        raise ValueError(f'{folder} has no split {split!r}; type one of: {", ".join(record["rows"])}')
    if damage := _damage(folder, split, record['bytes'][split], record['crc32'][split], CHECKED_BYTES):
        raise ValueError(f'{damage}; it was cut or damaged; type: {_command(folder, record)}')
    n, size, classes = record['rows'][split], record['size'], record['classes']
    pixels, labels, names = (folder / f'{split}_{name}' for name in FILES)
    what = json.dumps([size, classes, n, record['bytes'][split], record['crc32'][split]])
    return Images(np.memmap(pixels, np.uint8, 'r', shape=(n, size, size, 3)), np.fromfile(labels, '<i8').astype(np.int64),
                  [json.loads(f'"{name}"') for name in names.read_text(encoding='ascii').split('\n')[:-1]], classes, size,
                  tuple(record['mean']), tuple(record['std']), hashlib.sha256(what.encode()).hexdigest())


def _damage(folder, split, sizes, crcs=None, checked_bytes=math.inf):
    """Describe the damage to the files of a split; '' if there is none. crcs: the recorded checksums, compared for files of
    up to checked_bytes. Without crcs a file may be too long: an interrupted run leaves such files."""
    for i, size in enumerate(sizes):
        path = folder / f'{split}_{FILES[i]}'
        found = path.stat().st_size if path.is_file() else 0
        if found < size or found > size and crcs:
            return f'{path} has {found:,} bytes, {size:,} were written'
        if crcs and size <= checked_bytes:
            with open(path, 'rb') as file:
                crc = 0
                while block := file.read(1 << 20):
                    crc = zlib.crc32(block, crc)
            if crc != crcs[i]:
                return f'{path} does not match its checksum'
    return ''


def _read_record(folder):
    """images.json as a dict, or None if it is missing. Raises ValueError for a file that no prepare.py wrote."""
    try:
        record = json.loads((folder / 'images.json').read_bytes())
        if {'version', 'settings', 'command', 'complete'} <= set(record):
            return record
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError):
        pass
    raise ValueError(f'{folder / "images.json"} was not written by a prepare.py; remove it and type: {_command(folder)}')


def _command(folder, record=None):
    """The command that builds a folder: the one in its record, else the prepare.py that writes there."""
    data, folder = tokens.ROOT / 'data', folder.absolute()
    if record:
        return record['command']
    if folder in (data / 'digits', data / 'food101'):
        return f'python data/{folder.name}/prepare.py'
    if folder.parent == data / 'images':
        return f'python data/images/prepare.py --dir PATH --name={shlex.quote(folder.name)}'
    return 'python data/NAME/prepare.py, where NAME is digits, food101 or images'


# ---------------------------------------------------------------------------------------------------------------------
# data folders: writing


def build(folder, settings, splits, classes, size, workers=0, argv=None, expected=None):
    """Build an image data folder, continue an interrupted one, or recognize a finished one.

    settings: {'source', 'revision', ...}. The result depends only on settings, `classes` and `size`; a folder with others is
    rebuilt. splits: {'train': entries, 'val': entries}. Entries are a sequence of (name, class index, source), or a function
    place -> iterable of (next place, name, class index, source); a place is a JSON value, None at the start. A source is an
    image's bytes, its path, or (path of a zip, member). workers: decoding processes, 0: one per core. argv: the command line,
    for messages. expected: {split: images of the published set}. Raises ValueError for another count, a split without
    readable images or a class without a training image, and OSError for a full disk. Damaged images are reported and
    left out. The files do not depend on the number of workers or interruptions.
    """
    folder, expected = Path(folder), expected or {}
    if size < 1 or workers < 0:
        raise ValueError(f'--size={size} with --workers={workers} is impossible; type for example --size=64 --workers=0')
    totals = {split: len(entries) if hasattr(entries, '__len__') else expected.get(split) for split, entries in splits.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        record = _open(folder, settings, splits, classes, size, sys.argv[1:] if argv is None else argv)
        if record['complete']:
            print(f'{folder} is complete with the same settings; left as it is')
            return
        if None not in totals.values():
            _check_space(folder, record, sum(totals.values()))
        for split, entries in splits.items():
            _build_split(folder, split, entries, record, totals[split], workers)
            if not record['progress'][split]['done']:
                _check_split(folder, split, record, expected.get(split))
        states = record['progress']
        n, sums, squares = states['train']['bytes'][0] // 3, states['train']['sum'], states['train']['squares']
        record |= {key: {split: state[key] for split, state in states.items()} for key in ('rows', 'skipped', 'bytes', 'crc32')}
        # var = E[x^2] - E[x]^2 as one fraction of exact integers, which avoids cancellation
        record |= {'mean': [total / n / 255 for total in sums],
                   'std': [math.sqrt(n * square - total ** 2) / n / 255 for total, square in zip(sums, squares, strict=True)],
                   'complete': True}
        del record['progress']
        _save(folder, record)
    skipped = sum(map(len, record['skipped'].values()))
    print(f'wrote {folder}' + f'; left out {skipped:,} damaged, listed in its images.json' * bool(skipped))


@contextlib.contextmanager
def _locked(folder):
    """Lock `folder`, so that no other process builds in it. The lock ends with its process, even if that is killed."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(f'another prepare.py is writing to {folder}; wait for it to end') from None
    except OSError:                                     # a network drive without locks
        pass
    try:
        yield
    finally:
        os.close(handle)


def _open(folder, settings, splits, classes, size, argv):
    """Start a data folder, continue it, or recognize a finished one. Returns its record."""
    wanted = json.loads(json.dumps({'version': VERSION, 'size': size, 'classes': list(classes), 'settings': settings}))
    old = _read_record(folder)
    if old:
        why = 'has other settings'
        if all(old.get(key) == value for key, value in wanted.items()):
            damage = [_damage(folder, split, old['bytes'][split], old['crc32'][split]) if old['complete'] else
                      _damage(folder, split, old['progress'][split]['bytes']) for split in splits]
            if not any(damage):
                return old
            why = f'is damaged ({next(filter(None, damage))})'
        print(f'{folder} {why}; rebuilding it', flush=True)
    files = [path for split in tokens.SPLITS for name in FILES if (path := folder / f'{split}_{name}').exists()]
    if files and not old:
        raise ValueError(f'{files[0]} is there and no prepare.py wrote it; move it, or give another --out_dir')
    script = tokens.shown(Path(sys.argv[0]).resolve())
    record = wanted | {'command': shlex.join(['python', script, *map(str, argv)]), 'complete': False, 'progress': {
        split: {'place': None, 'seen': 0, 'rows': 0, 'bytes': [0] * 3, 'crc32': [0] * 3, 'sum': [0] * 3, 'squares': [0] * 3,
                'skipped': [], 'done': False} for split in splits}}
    _save(folder, record)                               # before deleting files: a killed run must still recognize them as ours
    for path in files:
        path.unlink()
    return record


def _check_space(folder, record, n):
    """Print the size of n images. Raises ValueError if the disk has no room for the missing part."""
    total, free = 3 * record['size'] ** 2 * n, shutil.disk_usage(folder).free
    print(f'{n:,} images of {record["size"]} x {record["size"]} pixels: {total / 1e6:,.1f} MB', flush=True)
    missing = total - sum(state['bytes'][0] for state in record['progress'].values())
    if missing > free:
        raise ValueError(f'{folder} needs {missing / 1e6:,.0f} MB more and its disk has {free / 1e6:,.0f} MB; make room, '
                         'choose a smaller --size, or choose another disk with --out_dir')


def _save(folder, record, files=()):
    """Replace images.json atomically, after the files that it describes are on disk."""
    for file in files:
        os.fsync(file.fileno())
    # not common.atomic_write: importing torch takes longer than building data/digits
    tokens.write_whole(folder / 'images.json', json.dumps(record, indent=1).encode())


def _build_split(folder, split, entries, record, total, workers):
    """Write or continue one split. record['progress'][split] stores its position, and the file contents up to there."""
    state = record['progress'][split]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(folder / f'{split}_{name}', 'ab', buffering=0)) for name in FILES]
        for file, size in zip(files, state['bytes'], strict=True):
            file.truncate(size)                         # drop everything that a killed run wrote after its last save
        if state['done']:
            return
        if state['seen']:
            print(f'{split}: continuing after {state["seen"]:,} images', flush=True)
        elif total:
            print(f'{split}: expected {total:,} images', flush=True)
        bar = stack.enter_context(tqdm(total=total, initial=state['seen'], desc=split, unit='img', disable=None))
        if hasattr(entries, '__len__'):
            rest = ((i + 1, *entries[i]) for i in range(state['place'] or 0, len(entries)))
        else:
            rest = entries(state['place'])
        decoded = stack.enter_context(contextlib.closing(_decoded(rest, record['size'], workers, total)))
        saved, plus = time.monotonic(), lambda key, more: [a + b for a, b in zip(state[key], more, strict=True)]
        for batch, (pixels, sums, squares, errors) in decoded:
            kept = [(name, label) for (_, name, label, _), error in zip(batch, errors, strict=True) if not error]
            parts = (pixels, np.array([label for _, label in kept], '<i8').tobytes(),
                     ''.join(json.dumps(name)[1:-1] + '\n' for name, _ in kept).encode())
            for file, part in zip(files, map(memoryview, parts), strict=True):
                while part:                             # an unbuffered write may write only a part
                    part = part[file.write(part):]
            for (_, name, _, _), error in zip(batch, errors, strict=True):
                if error:
                    state['skipped'].append([name, error])
                    if len(state['skipped']) <= REPORTED:
                        tqdm.write(f'{split}: left out {json.dumps(name)[1:-1]}: {error}')
            state |= {'place': batch[-1][0], 'seen': state['seen'] + len(batch), 'rows': state['rows'] + len(kept),
                      'crc32': [zlib.crc32(part, crc) for crc, part in zip(state['crc32'], parts, strict=True)],
                      'bytes': plus('bytes', map(len, parts)), 'sum': plus('sum', sums), 'squares': plus('squares', squares)}
            bar.update(len(batch))
            if time.monotonic() - saved >= SAVE_S:
                _save(folder, record, files)
                saved = time.monotonic()
        _save(folder, record, files)


def _check_split(folder, split, record, expected):
    """Print the counts of a split. ValueError: another count than published, no readable image, or a class without one."""
    state, classes, source = record['progress'][split], record['classes'], record['settings']['source']
    if expected not in (None, state['seen']):
        raise ValueError(f'{split} of {source} has {state["seen"]:,} images, expected {expected:,}; download the source again')
    if not state['rows']:
        raise ValueError(f'{split}: of the {state["seen"]:,} images of {source} none can be read; see the reasons in '
                         f'{folder / "images.json"} under "skipped"')
    counts = np.bincount(np.fromfile(folder / f'{split}_labels.bin', '<i8'), minlength=len(classes))
    low, high = int(counts.argmin()), int(counts.argmax())
    if split == 'train' and not counts[low]:
        raise ValueError(f'class {classes[low]!r} of {source} has no training image that can be read; repair its images, '
                         'or remove the class')
    each = (f'{counts[low]:,}' if counts[low] == counts[high] else
            f'{counts[low]:,} ({classes[low]!r}) to {counts[high]:,} ({classes[high]!r})')
    print(f'{split}: got {state["rows"]:,} images, {each} of each of {len(classes)} classes'
          + f'; left out {len(state["skipped"]):,} damaged' * bool(state['skipped']), flush=True)
    state['done'] = True
    _save(folder, record)


def _decoded(entries, size, workers, total):
    """Yield (entries, result of _decode()) per batch, in the order of the entries. At most four batches per process are
    queued, so memory does not grow with the number of images."""
    batch_size = max(1, min(BATCH, (1 << 24) // (3 * size * size)))
    batches = iter(lambda: list(itertools.islice(entries, batch_size)), [])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    workers = min(workers or cores, math.inf if total is None else math.ceil(total / batch_size))
    sources = lambda batch: [source for *_, source in batch]
    pool, queue = None, collections.deque()
    try:
        if workers <= 1:
            yield from ((batch, _decode(sources(batch), size)) for batch in batches)
            return
        # no plain fork: the libraries that stream from the Hub run threads, and a fork of a threaded process can hang
        method = 'forkserver' if 'forkserver' in multiprocessing.get_all_start_methods() else 'spawn'
        pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context(method), _start_worker)
        for batch in itertools.chain(batches, itertools.repeat(None, 4 * workers)):
            if batch:
                queue.append((batch, pool.submit(_decode, sources(batch), size)))
            if queue and (not batch or len(queue) >= 4 * workers):
                batch, future = queue.popleft()
                yield batch, future.result()
    except (concurrent.futures.BrokenExecutor, MemoryError):
        raise ValueError('a decoding process died, perhaps for lack of memory; run the same command again with --workers=1 '
                         'to continue') from None
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


def _start_worker():
    """Set up a worker: the parent alone handles Ctrl-C, and the worker exits when its parent is killed."""
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def _decode(sources, size):
    """Decode n sources -> (pixels of the readable images as bytes, sum and sum of squares per channel as ints, and n error
    messages, '' for a readable image)."""
    kept, errors = [], []
    for source in sources:
        try:
            kept.append(square(read_image(_raw(source)), size))
            errors.append('')
        except ValueError as e:
            errors.append(str(e))
    pixels = np.array(kept, np.uint8).reshape(-1, 3)
    total = lambda values: [int(n) for n in values.sum(0, dtype=np.int64)]      # exact: a batch stays below 1e12
    return pixels.tobytes(), total(pixels), total(np.square(pixels, dtype=np.uint16)), errors


def _raw(source):
    """Read the bytes of a source. A damaged member of a zip raises ValueError and is left out like a damaged image. A disk
    or permission error raises OSError and ends the run."""
    if isinstance(source, bytes):
        return source
    if isinstance(source, str | Path):
        return Path(source).read_bytes()
    path, member = source
    try:
        return _zip(path, os.stat(path).st_mtime_ns).read(member)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as e:
        raise ValueError(f'is damaged inside the zip ({" ".join(str(e).split())[:120]})') from None


@functools.lru_cache(2)
def _zip(path, changed):
    """An open zip file, cached per process. `changed` is its modification time."""
    return zipfile.ZipFile(path)


def run(main):
    """tokens.run() that also prints a ValueError as one line."""
    try:
        tokens.run(main)
    except ValueError as e:
        fail(e)
