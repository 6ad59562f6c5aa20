"""Arithmetic problems, one per line: 12+34=46. Sums, differences and products of whole numbers. No download.

    python data/arithmetic/prepare.py                                    all additions of numbers below 100
    python data/arithmetic/prepare.py --operations='+-*' --digits=3      -> data/arithmetic, other problems

The validation split holds a tenth of the problems, chosen by a hash, each once. They never occur in training. If 12+34 is
held out, so is 34+12. The training text repeats the other problems, each time in a new random order, up to LINES lines.
The defaults give 10,000 problems: 9,111 for training and 889 for validation.
Byte tokens. Train with --dataset=arithmetic --task=arithmetic.
"""
import argparse
import hashlib
import itertools
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import fail  # noqa: E402
from readers import tasks, tokens  # noqa: E402

OPERATIONS = '+'
DIGITS = 2
LINES = 500_000
HELD_OUT_PERCENT = 10


def held_out(a, operation, b):
    name = '{} {} {}'.format(*tasks.same_problem(a, operation, b))
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], 'big') % 100 < HELD_OUT_PERCENT


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = fail  # one line instead of the usage
    parser.add_argument('--operations', default=OPERATIONS, help=f'some of + - * ({OPERATIONS})')
    parser.add_argument('--digits', type=int, default=DIGITS, help=f'digits of the largest numbers ({DIGITS})')
    parser.add_argument('--lines', type=int, default=LINES, help=f'training lines, with repetitions ({LINES:,})')
    parser.add_argument('--out_dir', default=Path(__file__).resolve().parent, type=Path)
    args = parser.parse_args(argv)
    if not args.operations or set(args.operations) - set(tasks.OPERATIONS):
        fail(f'--operations={args.operations} are not some of + - *; type for example --operations=+-')
    if not 1 <= args.digits <= 3 or args.lines < 1:
        fail(f'--digits={args.digits} must be 1, 2 or 3, --lines={args.lines} 1 or more; type for example --digits=2')

    splits = {split: [] for split in tokens.SPLITS}
    for operation in dict.fromkeys(args.operations):
        for a, b in itertools.product(range(10 ** args.digits), repeat=2):
            splits['val' if held_out(a, operation, b) else 'train'].append(tasks.problem(a, operation, b) + '\n')
    print(f'{len(splits["train"]):,} problems to train on, {len(splits["val"]):,} held out')
    record = tokens.open_folder(args.out_dir, {'operations': args.operations, 'digits': args.digits, 'lines': args.lines,
                                               'held_out_percent': HELD_OUT_PERCENT}, argv)
    if record['complete']:
        return
    tokenizer, rng = tokens.byte(), random.Random(0)

    def in_random_orders(problems, lines):
        while lines > 0:
            rng.shuffle(problems)
            yield tokenizer.encode(''.join(problems[:lines]))
            lines -= len(problems)
    tokens.write(args.out_dir, 'train', in_random_orders(splits['train'], args.lines), tokenizer)
    tokens.write(args.out_dir, 'val', in_random_orders(splits['val'], len(splits['val'])), tokenizer)
    tokens.finish(args.out_dir, record)


if __name__ == '__main__':
    tokens.run(main)
