"""Python code in byte tokens: the sources of the standard library on this machine. No download.

    python data/pycode/prepare.py                            -> data/pycode

Sizes depend on the Python version. 3.11.7 has 669 files: 10,701,289 training bytes and 613,968 validation bytes. Some
systems leave out parts, so compare losses only between runs on the same Python. About 5% of the files are the
validation split, chosen by a hash of their path, so a file stays in its split when others are added or removed. A NUL
(end of text) follows each file. Terms: the Python Software Foundation License. Train with --dataset=pycode.
"""
import argparse
import hashlib
import os
import platform
import sys
import sysconfig
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import fail  # noqa: E402
from readers import tokens  # noqa: E402

# Tests are large and repetitive; installed packages differ between machines.
SKIP_DIRS = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', 'idlelib', '__pycache__'}
# Python's build writes these per machine: config-3.11-x86_64-linux-gnu/, _sysconfigdata__linux_x86_64-linux-gnu.py
SKIP_PREFIXES = ('config-', '_sysconfigdata')
VAL_PERCENT = 5


def find(root):
    """Sorted paths of the .py files in a folder, relative to it, posix style. Links are not followed."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [d for d in subfolders if d not in SKIP_DIRS and not d.startswith(SKIP_PREFIXES)]
        paths = (Path(folder, n) for n in names if n.endswith('.py') and not n.startswith(SKIP_PREFIXES))
        found += [path.relative_to(root).as_posix() for path in paths if not path.is_symlink()]
    return sorted(found)


def is_val(path):
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], 'big') % 100 < VAL_PERCENT


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = fail  # one line instead of the usage
    parser.add_argument('--out_dir', default=Path(__file__).resolve().parent, type=Path)
    args = parser.parse_args(argv)

    root = Path(sysconfig.get_path('stdlib'))
    sources = {path: (root / path).read_bytes() for path in find(root)}
    sources = {path: source for path, source in sources.items() if source and b'\0' not in source}
    splits = {split: [path for path in sources if is_val(path) == (split == 'val')] for split in tokens.SPLITS}
    if not all(splits.values()):
        fail(f'{root} has {len(sources)} Python sources, too few; use a full Python, not a zipped or stripped one')
    print(f'Python {platform.python_version()} in {root}; expected: 669 files, 11.3 MB on 3.11.7, others differ; '
          f'got: {len(sources)} files, {sum(map(len, sources.values())) / 1e6:.1f} MB')
    for split, paths in splits.items():
        print(f'{split}: {len(paths)} files, {sum(len(sources[path]) for path in paths):,} bytes')

    contents = hashlib.sha256()
    for path, source in sources.items():
        contents.update(f'{path}\0{len(source)}\0'.encode() + source)
    record = tokens.open_folder(args.out_dir, {'sha256': contents.hexdigest(), 'val_percent': VAL_PERCENT}, argv)
    if record['complete']:
        return
    tokenizer = tokens.byte()
    for split, paths in splits.items():
        tokens.write(args.out_dir, split, (tokenizer.encode(sources[path] + b'\0')
                                           for path in tqdm(paths, desc=split, unit='file', disable=None)), tokenizer)
    tokens.finish(args.out_dir, record)


if __name__ == '__main__':
    tokens.run(main)
