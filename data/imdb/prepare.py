"""IMDB: whole film reviews, negative or positive. Downloads about 42 MB, takes a minute.

    python data/imdb/prepare.py                    -> data/imdb
    python data/imdb/prepare.py --dir aclImdb      from the unpacked aclImdb_v1.tar.gz: train/neg/*.txt, train/pos/*.txt,
                                                   test/neg/*.txt, test/pos/*.txt

Writes train.csv (25,000 rows) and val.csv (25,000 rows, the published test split; there is no validation split). The source
has all negative reviews before all positive ones, so train.csv is shuffled with a fixed seed. Line breaks stay <br />, as in
the source. Terms: the source states none. Train with --dataset=imdb.
"""
import argparse
import hashlib
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import fail  # noqa: E402
from readers import texts  # noqa: E402

HUB_ID, REVISION = 'stanfordnlp/imdb', 'e6281661ce1c48d982bc483cf8a173c1bbeb5d31'
CONFIG = 'plain_text'
HUB_SPLIT = {'train': 'train', 'val': 'test'}
LABELS = ('neg', 'pos')  # ids 0 and 1
EXPECTED = {'train': 25_000, 'val': 25_000}
SEED = 1337


def hub(split):
    rows = texts.hub_rows(HUB_ID, CONFIG, HUB_SPLIT[split], REVISION, ('text',), 'label')
    return [(text, LABELS[label]) for text, label in rows]


def local(folder, split):
    """The reviews of one split of an aclImdb folder. Files are sorted by number: 10_9.txt comes after 9_8.txt."""
    rows = []
    for label in LABELS:
        paths = list((Path(folder) / HUB_SPLIT[split] / label).glob('*.txt'))
        if not paths:
            raise ValueError(f'{folder} has no {HUB_SPLIT[split]}/{label}/*.txt; --dir is the folder aclImdb, unpacked')
        for path in sorted(paths, key=lambda path: (len(path.stem.split('_')[0]), path.stem)):
            try:
                rows.append((path.read_text(encoding='utf-8'), label))
            except UnicodeDecodeError as e:
                raise ValueError(f'{path} is not UTF-8 at byte {e.start}') from None
    return rows


def shuffled(rows):
    return [rows[i] for i in np.random.default_rng(SEED).permutation(len(rows))]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = fail  # one line instead of the usage
    parser.add_argument('--dir', metavar='DIR', help='local folder aclImdb instead of the download')
    parser.add_argument('--out_dir', default=Path(__file__).resolve().parent, type=Path)
    args = parser.parse_args(argv)

    task = {'task': 'imdb', 'labels': LABELS, 'text': ('text',), 'label': 'label', 'seed': SEED}
    if args.dir:
        rows = {split: local(args.dir, split) for split in HUB_SPLIT}
        digest = hashlib.sha256()
        for text, label in rows['train'] + rows['val']:
            digest.update(hashlib.sha256(text.encode()).digest() + label.encode())
        task |= {'source': Path(args.dir).resolve().name, 'revision': f'sha256:{digest.hexdigest()}'}
        read = rows.get
    else:
        task |= {'source': HUB_ID, 'revision': REVISION}
        read = hub
    splits = {'train': lambda: shuffled(read('train')), 'val': lambda: read('val')}
    texts.build(args.out_dir, task, splits, EXPECTED, published=not args.dir)


if __name__ == '__main__':
    texts.run(main)
