"""Your own images: a folder with one folder per class, or a .zip of it.

    python data/images/prepare.py --dir photos                           -> data/images/photos
    python data/images/prepare.py --dir food.zip --size=80 --name=mine   -> data/images/mine

    photos/cat/1.jpg  photos/dog/2.png ...               --val_share of each class becomes the validation split
    photos/train/cat/1.jpg  photos/val/cat/2.png ...     or you choose the split; val may be called validation or test

Reads jpg, png, bmp, gif, webp, tiff and ppm in any mode and size. Each image is turned upright. Its shorter side is scaled to
--size, and the middle is cut out. Damaged images are listed and left out. An image takes 3 x size x size bytes: 12 kB at 64,
197 kB at 256. To continue an interrupted run, type the same command again. The terms of the data are those of your files;
nothing is downloaded. Train with --dataset=images/NAME.
"""
import argparse
import collections
import hashlib
import json
import os
import re
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import fail  # noqa: E402
from readers import images  # noqa: E402

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.gif', '.webp', '.tif', '.tiff', '.ppm')
VAL_NAMES = ('val', 'validation', 'valid', 'test')      # the first of these beside train/ is the validation split


def class_folders(path, val_share=0.1):
    """List a folder or .zip with a folder per class -> (classes, {'train': [(name, class index, source)], 'val': ...}).

    If train/ and val/ (or validation/, valid/, test/) are at the top, they are the splits. Otherwise val_share of each class,
    at least one image, goes to val, chosen by a hash of the name. Hidden files and files without an image suffix are
    ignored. Raises ValueError, one line.
    """
    path = Path(path).expanduser()
    if not 0 < val_share < 1:
        raise ValueError(f'a validation share of {val_share} is impossible; type for example --val_share=0.1')
    if not path.exists():
        raise ValueError(f'there is no {path}; give a folder of class folders, or a .zip of one')
    files, folders = _in_zip(path) if path.is_file() else _in_folder(path)
    below = lambda names, head: {name[1:] for name in names if name[0] == head and len(name) > 1}
    tops, prefix = sorted({name[0] for name in folders}), ()
    # skip a single outer folder, which archives often have, or a train/ without val/
    while len(tops) == 1 and below(folders, tops[0]) and not any(_is_image(name) for name in files if len(name) < 3):
        prefix += (tops[0],)
        files, folders = {name[1:]: source for name, source in files.items() if len(name) > 1}, below(folders, tops[0])
        tops = sorted({name[0] for name in folders})
    find = lambda names: next((top for name in names for top in tops if top.lower() == name), None)
    heads = {'train': find(['train']), 'val': find(VAL_NAMES)}
    if all(heads.values()):
        if others := [top for top in tops if top not in heads.values()]:
            print(f'{path}: {" and ".join(heads.values())} are used, not {", ".join(others)}')
        found = {split: _classes({name[1:]: source for name, source in files.items() if name[0] == head and len(name) > 1},
                                 below(folders, head), '/'.join((str(path), *prefix, head))) for split, head in heads.items()}
        for name in sorted(found['train'].keys() ^ found['val'].keys()):
            here, there = list(heads.values())[::1 if name in found['train'] else -1]
            raise ValueError(f'{path} has a class {name!r} in {here} and not in {there}; both need the same class folders')
    else:
        heads, found = {}, {'train': {}, 'val': {}}
        for name, members in _classes(files, folders, '/'.join((str(path), *prefix))).items():
            if len(members) < 2:
                raise ValueError(f'class {name!r} of {path} has one image; a split needs two or more, add some')
            order = sorted(members, key=lambda image: hashlib.sha256(json.dumps([name, image]).encode()).digest())     # noqa: B023
            n_val = min(max(1, round(val_share * len(order))), len(order) - 1)
            found['val'][name] = {image: members[image] for image in order[:n_val]}
            found['train'][name] = {image: members[image] for image in order[n_val:]}
    classes = sorted(found['train'])
    above = {split: (*prefix, heads[split]) if heads else prefix for split in found}
    return classes, {split: [('/'.join((*above[split], name, image)), label, source) for label, name in enumerate(classes)
                             for image, source in sorted(found[split][name].items())] for split in found}


def _classes(files, folders, where):
    """{class: {name in its folder: source}} for the class folders below the folder `where`."""
    found, ignored = {name[0]: {} for name in folders}, collections.Counter()
    for name, source in files.items():
        if _is_image(name) and len(name) > 1:
            found[name[0]]['/'.join(name[1:])] = source
        else:
            ignored['outside of a class folder' if _is_image(name) else os.path.splitext(name[-1])[1] or 'without suffix'] += 1
    if ignored:
        kinds = ', '.join(f'{n:,} {what}' for what, n in ignored.most_common(5))
        print(f'{where}: ignored {ignored.total():,} file{"s" * (ignored.total() > 1)}: {kinds}')
    if not found:
        raise ValueError(f'{where} has no class folders; put the images of each class into a folder named after the class')
    for name in sorted(found):
        if not found[name]:
            raise ValueError(f'{where}/{name} has no images ({", ".join(SUFFIXES)}); add some, or remove it')
    if len(found) < 2:
        raise ValueError(f'{where} has only one class, {min(found)!r}; a classifier needs two or more, add class folders')
    return found


def _is_image(name):
    return os.path.splitext(name[-1])[1].lower() in SUFFIXES


def _is_hidden(name):
    return name.startswith('.') or name == '__MACOSX'


def _in_folder(path):
    """Walk a folder -> ({file name, as a tuple of its parts: path}, {folder name}). Links are followed, loops are not."""
    files, folders = {}, set()

    def walk(folder, parts, above):
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            name = (*parts, entry.name)
            if _is_hidden(entry.name):
                continue
            if entry.is_file():
                files[name] = entry.path
            elif entry.is_dir() and (real := os.path.realpath(entry.path)) not in above:
                folders.add(name)
                walk(entry.path, name, above | {real})
    walk(str(path), (), {os.path.realpath(path)})
    return files, folders


def _in_zip(path):
    """Like _in_folder(), for a .zip. The value of a file is (path, member)."""
    files, folders = {}, set()
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError) as e:
        raise ValueError(f'{path} is no .zip, or a damaged one ({e}); give a folder of class folders, or its .zip') from None
    for member in members:
        name = tuple(part for part in member.filename.replace('\\', '/').split('/') if part not in ('', '.'))
        if member.flag_bits & 1:
            raise ValueError(f'{path} is encrypted; unpack it and give the folder')
        if not name or any(map(_is_hidden, name)) or member.external_attr >> 28 == 0xA:         # 0xA: a symbolic link
            continue
        if not member.is_dir():
            files[name] = (str(path), member.filename)
        folders |= {name[:n] for n in range(1, len(name) + member.is_dir())}
    return files, folders


def revision(splits):
    """Revision of the files of splits (as from class_folders): 'sha256:...' over each file's name, size and modification time;
    in a zip, over name, size and checksum."""
    zips, digest = {}, hashlib.sha256()
    for split, entries in splits.items():
        for name, label, source in entries:
            if isinstance(source, tuple):
                if source[0] not in zips:
                    with zipfile.ZipFile(source[0]) as archive:
                        zips[source[0]] = {member.filename: [member.file_size, member.CRC] for member in archive.infolist()}
                mark = zips[source[0]][source[1]]
            else:
                mark = [os.stat(source).st_size, os.stat(source).st_mtime_ns]
            digest.update(json.dumps([split, name, label, *mark]).encode())
    return f'sha256:{digest.hexdigest()}'


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = fail  # one line instead of the usage
    parser.add_argument('--dir', required=True, type=Path, metavar='PATH', help='folder of class folders, or a .zip of it')
    parser.add_argument('--name', help='write to data/images/NAME (default: the name of the folder or .zip)')
    parser.add_argument('--size', type=int, default=64, help='pixels per side (64)')
    parser.add_argument('--val_share', type=float, default=0.1, help='share for validation if there is no val/ (0.1)')
    parser.add_argument('--workers', type=int, default=0, help='decoding processes (0: one per core)')
    parser.add_argument('--out_dir', default=Path(__file__).resolve().parent, type=Path)
    args = parser.parse_args(argv)
    name = args.name if args.name is not None else args.dir.resolve().stem if args.dir.is_file() else args.dir.resolve().name
    if not re.fullmatch(r'\w[\w.-]*', name):
        fail(f'--name={name} is no folder name; use letters, digits, _ - and .')

    classes, splits = class_folders(args.dir, args.val_share)
    settings = {'source': str(args.dir.resolve().name), 'revision': revision(splits)}
    images.build(args.out_dir / name, settings, splits, classes, args.size, args.workers, argv)


if __name__ == '__main__':
    images.run(main)
