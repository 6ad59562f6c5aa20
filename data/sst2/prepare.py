"""SST-2: phrases and sentences from film reviews, negative or positive. Downloads about 3 MB, takes seconds.

    python data/sst2/prepare.py                                       -> data/sst2
    python data/sst2/prepare.py --file train.tsv --val_file dev.tsv   GLUE's files instead of the Hub
    python data/sst2/prepare.py --held                                -> data/sst2/held, with a second evaluation set

Writes train.csv (67,349 rows) and val.csv, the published validation split (872 rows). The labels of the test split are
not public. Local files are tables with the columns sentence and label. A label is a name, or 0 (negative) or 1 (positive).
Terms: the source states none. Train with --dataset=sst2.

872 rows cannot show a difference of 0.3 points. --held moves 6,000 training rows to held.csv (see hold_out()): train with
--dataset=sst2/held --eval_split=val,held.
"""
import argparse
import collections
import functools
import itertools
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import fail  # noqa: E402
from readers import texts  # noqa: E402

HUB_ID, REVISION = 'stanfordnlp/sst2', '8d51e7e4887a4caaa95b3fbebbf53c0490b58bbb'
HUB_SPLIT = {'train': 'train', 'val': 'validation'}
LABELS = ('negative', 'positive')  # ids 0 and 1
EXPECTED = {'train': 67_349, 'val': 872}


def hub(split):
    for sentence, label in texts.hub_rows(HUB_ID, None, HUB_SPLIT[split], REVISION, ('sentence',), 'label'):
        yield sentence.strip(), LABELS[label]


def local(path):
    found, labels = texts.read_table(path, ('sentence',), 'label')
    for (sentence,), label in zip(found, texts.named(labels, LABELS, path), strict=True):
        yield sentence.strip(), label


def hold_out(rows, n):
    """Divide rows (sentence, label) into (rows to train on, n or a few more rows to evaluate on).

    Most rows are phrases of other rows. A row that is part of no other row is a whole sentence. Whole sentences are held out in
    the order of a hash, each with its phrases. A phrase that a sentence in training also contains stays in training. So no
    held-out text is part of a training text, but texts of both share words and short phrases, as any two texts do. Raises
    ValueError if no row is left to train on.
    """
    count, within, phrases = collections.Counter(text for text, _ in rows), collections.Counter(), {}
    for whole in sorted(count, key=lambda text: (-text.count(' '), text)):
        if not within[whole]:
            words = whole.split(' ')
            parts = (' '.join(words[i:j]) for i, j in itertools.combinations(range(len(words) + 1), 2))
            phrases[whole] = {part for part in parts if part in count}
            within.update(phrases[whole])           # the number of whole sentences that contain it
    held, size = set(), 0
    for whole in sorted(phrases, key=lambda text: (zlib.crc32(text.encode()), text)):
        if size >= n:
            break
        within.subtract(phrases[whole])
        alone = {part for part in phrases[whole] if not within[part]}
        held, size = held | alone, size + sum(count[part] for part in alone)
    if held == count.keys():
        raise ValueError(f'--held={n} leaves no row of {len(rows):,} to train on; type a lower number')
    return [row for row in rows if row[0] not in held], [row for row in rows if row[0] in held]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = fail  # one line instead of the usage
    parser.add_argument('--file', metavar='PATH', help='local training table (.tsv, .csv, .parquet)')
    parser.add_argument('--val_file', metavar='PATH', help='local validation table')
    parser.add_argument('--held', metavar='N', type=int, nargs='?', const=6000, default=0,
                        help='hold out N training rows (6,000 without a number) as the split held')
    parser.add_argument('--out_dir', metavar='PATH', type=Path,
                        help='default: the folder of this script; with --held its folder held')
    args = parser.parse_args(argv)
    here = Path(__file__).resolve().parent
    if bool(args.file) != bool(args.val_file):
        fail('--file and --val_file go together; give both, or neither for the download')
    if args.held < 0:
        fail(f'--held={args.held} must be 1 or more; give the number of rows, or --held alone for 6,000')

    task = {'task': 'sst2', 'labels': LABELS, 'text': ('sentence',), 'label': 'label'}
    if args.file:
        files = {'train': args.file, 'val': args.val_file}
        task |= {'source': ', '.join(Path(path).name for path in files.values()),
                 'revision': texts.file_revision(files.values())}
        splits = {split: lambda path=path: local(path) for split, path in files.items()}
    else:
        task |= {'source': HUB_ID, 'revision': REVISION}
        splits = {split: lambda split=split: hub(split) for split in HUB_SPLIT}
    expected = EXPECTED
    if args.held:
        divided = functools.cache(lambda read=splits['train']: hold_out(list(read()), args.held))
        task, expected = task | {'held': args.held}, {'val': EXPECTED['val']}
        splits = {'train': lambda: divided()[0], 'held': lambda: divided()[1], 'val': splits['val']}
    texts.build(args.out_dir or (here / 'held' if args.held else here), task, splits, expected, published=not args.file)


if __name__ == '__main__':
    texts.run(main)
