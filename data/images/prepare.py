"""Images of your own: a folder with a folder per class, or a .zip of it.

    python data/images/prepare.py --dir photos                           -> data/images/photos
    python data/images/prepare.py --dir food.zip --size=80 --name=mine   -> data/images/mine

    photos/cat/1.jpg  photos/dog/2.png ...               --val_share of each class is set aside for validation
    photos/train/cat/1.jpg  photos/val/cat/2.png ...     or the split is yours; val may be called validation or test

Takes jpg, png, bmp, gif, webp, tiff and ppm in any mode and size. Each image is turned upright, its shorter side scaled to
--size and the middle cut out; damaged ones are listed and left out. An image takes 3 x size x size bytes: 12 kB at 64, 197 kB
at 256. A run that was interrupted continues when the same command is given again. The terms of the data are those of your
files; nothing is downloaded. Train with --dataset=images/NAME.
"""
import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import images  # noqa: E402
from configurator import fail  # noqa: E402


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = fail  # one line instead of the usage
    parser.add_argument('--dir', required=True, type=Path, metavar='PATH', help='folder of class folders, or a .zip of it')
    parser.add_argument('--name', help='write to data/images/NAME (the name of the folder or .zip)')
    parser.add_argument('--size', type=int, default=64, help='pixels of a side (64)')
    parser.add_argument('--val_share', type=float, default=0.1, help='for validation, where there is no val/ (0.1)')
    parser.add_argument('--workers', type=int, default=0, help='processes that decode (0: one per core)')
    parser.add_argument('--out_dir', default=Path(__file__).resolve().parent, type=Path)
    args = parser.parse_args(argv)
    name = args.name if args.name is not None else args.dir.resolve().stem if args.dir.is_file() else args.dir.resolve().name
    if not re.fullmatch(r'\w[\w.-]*', name):
        fail(f'--name={name} is no folder name; use letters, digits, _ - and .')

    classes, splits = images.class_folders(args.dir, args.val_share)
    settings = {'source': str(args.dir.resolve().name), 'revision': images.revision(splits)}
    images.build(args.out_dir / name, settings, splits, classes, args.size, args.workers, argv)


if __name__ == '__main__':
    images.run(main)
