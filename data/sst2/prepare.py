"""SST-2: phrases and sentences from film reviews, negative or positive. Downloads about 3 MB, takes seconds.

    python data/sst2/prepare.py                                       -> data/sst2
    python data/sst2/prepare.py --file train.tsv --val_file dev.tsv   GLUE's files instead of the Hub

Writes train.csv (67,349 rows) and val.csv, the published validation split (872 rows). The labels of the test split are
not public. Local files are tables with the columns sentence and label. A label is a name, or 0 (negative) or 1 (positive).
Terms: the source states none. Train with --dataset=sst2.
"""
import argparse
import sys
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


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = fail  # one line instead of the usage
    parser.add_argument('--file', metavar='PATH', help='local training table (.tsv, .csv, .parquet)')
    parser.add_argument('--val_file', metavar='PATH', help='local validation table')
    parser.add_argument('--out_dir', default=Path(__file__).resolve().parent, type=Path)
    args = parser.parse_args(argv)
    if bool(args.file) != bool(args.val_file):
        fail('--file and --val_file go together; give both, or neither for the download')

    task = {'task': 'sst2', 'labels': LABELS, 'text': ('sentence',), 'label': 'label'}
    if args.file:
        files = {'train': args.file, 'val': args.val_file}
        task |= {'source': ', '.join(Path(path).name for path in files.values()),
                 'revision': texts.file_revision(files.values())}
        splits = {split: lambda path=path: local(path) for split, path in files.items()}
    else:
        task |= {'source': HUB_ID, 'revision': REVISION}
        splits = {split: lambda split=split: hub(split) for split in HUB_SPLIT}
    texts.build(args.out_dir, task, splits, EXPECTED, published=not args.file)


if __name__ == '__main__':
    texts.run(main)
