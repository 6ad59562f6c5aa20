"""Games of tic-tac-toe between players at random and perfect ones, one a line: mr519...37X. Made here, no download.

    python data/tictactoe/prepare.py                       -> data/tictactoe

`m` plays by minimax, one of the best moves at random (a win as soon, a loss as late as can be), `r` any free cell. A third of
the games each are mr and rm, which show what a perfect player does about any move, a sixth each mm and rr. A tenth of all
possible games, chosen by a hash of their moves, is the validation split: none of them occurs in training, whoever plays.
GAMES games in all; a game between the same players may come more than once in training, in validation it does not. Byte
tokens. Train with --dataset=tictactoe --task=tictactoe.
"""
import argparse
import hashlib
import random
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import tasks  # noqa: E402
import tokens  # noqa: E402
from configurator import fail  # noqa: E402

GAMES = 400_000
VAL_GAMES = 2_000
VAL_PERCENT = 10
PLAYERS = ('mr', 'rm', 'mr', 'rm', 'mm', 'rr')


def is_val(line):
    return int.from_bytes(hashlib.sha256(line[2:].encode()).digest()[:8], 'big') % 100 < VAL_PERCENT


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = fail  # one line instead of the usage
    parser.add_argument('--games', type=int, default=GAMES, help=f'games to train on ({GAMES:,})')
    parser.add_argument('--val_games', type=int, default=VAL_GAMES, help=f'held-out games ({VAL_GAMES:,})')
    parser.add_argument('--out_dir', default=Path(__file__).resolve().parent, type=Path)
    args = parser.parse_args(argv)
    if args.games < 1 or not 1 <= args.val_games <= 5_000:
        fail(f'--games={args.games} must be 1 or more, --val_games={args.val_games} 1 to 5,000; type other numbers')

    record = tokens.open_folder(args.out_dir, {'games': args.games, 'val_games': args.val_games, 'players': PLAYERS,
                                               'val_percent': VAL_PERCENT}, argv)
    if record['complete']:
        return
    tokenizer, rng, val, left = tokens.byte(), random.Random(0), {}, args.games

    def train_games():
        """Games for training, a thousand at a time; what is held out goes to `val`, each once, until that is full."""
        nonlocal left
        with tqdm(total=args.games, desc='games', disable=None) as bar:
            while left or len(val) < args.val_games:
                lines = [tasks.game(PLAYERS[i % len(PLAYERS)], rng) for i in range(1000)]
                for line in filter(is_val, lines):
                    if len(val) < args.val_games:
                        val[line] = True
                mine = [line for line in lines if not is_val(line)][:left]
                left -= len(mine)
                bar.update(len(mine))
                yield tokenizer.encode(''.join(f'{line}\n' for line in mine))
    tokens.write(args.out_dir, 'train', train_games(), tokenizer)
    tokens.write(args.out_dir, 'val', [tokenizer.encode(''.join(f'{line}\n' for line in val))], tokenizer)
    print(f'{args.games:,} games to train on, {len(val):,} held out')
    tokens.finish(args.out_dir, record)


if __name__ == '__main__':
    tokens.run(main)
