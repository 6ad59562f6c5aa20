"""Food-101: 101,000 photographs of 101 dishes, streamed from the Hugging Face Hub; about 5 GB of download.

    python data/food101/prepare.py                       -> data/food101, 256 x 256 pixels: 19.9 GB
    python data/food101/prepare.py --size=64             1.2 GB, the same download
    python data/food101/prepare.py --dir food-101        the unpacked official archive instead of the Hub

Expects ethz/food101: 75,750 training images, 750 per dish, and 25,250 validation images, 250 per dish. Some training labels
are wrong; only the validation labels were cleaned. --dir takes the folder with images/<class>/<id>.jpg,
meta/train.txt and meta/test.txt. To continue an interrupted run, type the same command again. It reads only the current
file (0.5 GB) again. Source: Bossard et al., ECCV 2014. Terms: scientific fair use; the pictures belong to users of
Foodspotting. Train with --dataset=food101.
"""
import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import fail  # noqa: E402
from data.images.prepare import revision  # noqa: E402
from readers import images  # noqa: E402

HUB_ID, REVISION = 'ethz/food101', 'e06acf2a88084f04bce4d4a525165d68e0a36c38'  # MTEB pins the same one
HUB_SPLIT = {'val': 'validation', 'train': 'train'}  # the small split first, so that mistakes show early
META = {'val': 'test', 'train': 'train'}
EXPECTED = {'val': 25_250, 'train': 75_750}


def from_hub(function):
    try:
        return function()
    except Exception as e:  # network errors of several libraries share no class
        raise ValueError(f'reading {HUB_ID} from the Hub failed ({type(e).__name__}: {str(e)[:200]}); run the same '
                         'command again to continue, or use the unpacked archive: --dir PATH') from None


def hub():
    """Food-101 on the Hub -> (classes, {split: function as in images.build}). A place is [file, row in it]."""
    def load(split):
        import datasets  # imported here: it takes seconds, and --dir does not need it
        return datasets.load_dataset(HUB_ID, split=HUB_SPLIT[split], revision=REVISION, streaming=True).cast_column(
            'image', datasets.Image(decode=False))  # as bytes: the worker processes decode them
    loaded = {split: from_hub(lambda split=split: load(split)) for split in HUB_SPLIT}
    classes = loaded['train'].features['label'].names

    def read(split, place):
        first, done = place or (0, 0)
        dataset = loaded[split]
        for file in range(first, dataset.num_shards):
            start = done if file == first else 0
            rows = itertools.islice(iter(dataset.shard(dataset.num_shards, file)), start, None)
            for number in itertools.count(start):
                row = from_hub(lambda rows=rows: next(rows, None))
                if row is None:
                    break
                image, label = row['image'], row['label']
                name = image['path'] or f'{split}-{file}-{number}'
                yield [file, number + 1], f'{classes[label]}/{name}', label, image['bytes']
    return classes, {split: lambda place, split=split: read(split, place) for split in HUB_SPLIT}


def local(folder):
    """The unpacked archive, or the folder that contains it -> (classes, {split: [(name, class index, path)]})."""
    found = next((path for path in (folder, folder / 'food-101') if (path / 'meta' / 'train.txt').is_file()), None)
    if found is None:
        fail(f'{folder} has no meta/train.txt; unpack food-101.tar.gz and give its folder food-101')
    names = {split: (found / 'meta' / f'{file}.txt').read_text(encoding='utf-8').split() for split, file in META.items()}
    classes = sorted({name.split('/')[0] for name in names['train']})
    ids, splits = {name: label for label, name in enumerate(classes)}, {}
    for split, file in META.items():
        if wrong := [name for name in names[split] if name.count('/') != 1 or name.split('/')[0] not in ids]:
            fail(f'{found / "meta" / file}.txt lists {wrong[0]!r}, of no class in train.txt; unpack the archive again')
        paths = [str(found / 'images' / f'{name}.jpg') for name in names[split]]
        splits[split] = [(f'{name}.jpg', ids[name.split('/')[0]], path) for name, path in zip(names[split], paths, strict=True)]
        if missing := [path for path in paths if not Path(path).is_file()]:
            fail(f'{missing[0]} is missing' + (f' and {len(missing) - 1:,} more are' if missing[1:] else '')
                 + '; unpack the archive again')
        if len(splits[split]) != EXPECTED[split]:
            print(f'{split}: {len(splits[split]):,} images are listed, {EXPECTED[split]:,} in the published set')
    return classes, splits


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = fail  # one line instead of the usage
    parser.add_argument('--dir', type=Path, metavar='PATH', help='the unpacked food-101 instead of the Hub')
    parser.add_argument('--size', type=int, default=256, help='pixels per side (256)')
    parser.add_argument('--workers', type=int, default=0, help='decoding processes (0: one per core)')
    parser.add_argument('--out_dir', default=Path(__file__).resolve().parent, type=Path)
    args = parser.parse_args(argv)

    if args.dir:
        classes, splits = local(args.dir)
        settings, expected = {'source': 'food-101', 'revision': revision(splits)}, None
    else:
        classes, splits = hub()
        settings, expected = {'source': HUB_ID, 'revision': REVISION}, EXPECTED
    images.build(args.out_dir, settings, splits, classes, args.size, args.workers, argv, expected)


if __name__ == '__main__':
    images.run(main)
