"""Tic-tac-toe games between random and perfect players, one per line: mr519...37X. No download.

    python data/tictactoe/prepare.py                       -> data/tictactoe

`m` plays by minimax: one of the best moves at random (win as soon, lose as late as possible). `r` takes any free cell. mr and
rm are a third of the games each; they show a perfect player's answer to any move. mm and rr are a sixth each. A tenth of all
possible games, chosen by a hash of their moves, is held out: with any players, they never occur in training. The training
split has GAMES games, with repetitions. The validation split has no repetitions and the same shares of the pairings, as far
as there are enough different games: 666 mr, 589 rm, 333 mm, 333 rr. Byte tokens. Train with
--dataset=tictactoe --task=tictactoe.
"""
import argparse
import hashlib
import random
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import fail  # noqa: E402
from readers import tasks, tokens  # noqa: E402

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
    parser.add_argument('--games', type=int, default=GAMES, help=f'training games ({GAMES:,})')
    parser.add_argument('--val_games', type=int, default=VAL_GAMES, help=f'held-out games ({VAL_GAMES:,})')
    parser.add_argument('--out_dir', default=Path(__file__).resolve().parent, type=Path)
    args = parser.parse_args(argv)
    if args.games < 1 or args.val_games < len(PLAYERS):
        fail(f'--games={args.games} must be 1 or more, --val_games={args.val_games} {len(PLAYERS)} or more; type other numbers')

    record = tokens.open_folder(args.out_dir, {'games': args.games, 'val_games': args.val_games, 'players': PLAYERS,
                                               'val_percent': VAL_PERCENT, 'val_players': 'as in training'}, argv)
    if record['complete']:
        return
    tokenizer, rng, left = tokens.byte(), random.Random(0), args.games
    val = {kinds: {} for kinds in PLAYERS}          # dicts used as ordered sets

    def train_games():
        """Yield training games in batches of about a thousand. Held-out games go to `val`, each once, up to their share."""
        nonlocal left
        with tqdm(total=args.games, desc='games', disable=None) as bar:
            while left:
                lines = [tasks.game(PLAYERS[i % len(PLAYERS)], rng) for i in range(1020)]
                for line in filter(is_val, lines):
                    if len(val[line[:2]]) < args.val_games * PLAYERS.count(line[:2]) // len(PLAYERS):
                        val[line[:2]][line] = True
                mine = [line for line in lines if not is_val(line)][:left]
                left -= len(mine)
                bar.update(len(mine))
                yield tokenizer.encode(''.join(f'{line}\n' for line in mine))
    tokens.write(args.out_dir, 'train', train_games(), tokenizer)
    held_out = [line for lines in val.values() for line in lines]
    rng.shuffle(held_out)
    tokens.write(args.out_dir, 'val', [tokenizer.encode(''.join(f'{line}\n' for line in held_out))], tokenizer)
    print(f'{args.games:,} games to train on, {len(held_out):,} held out: '
          + ', '.join(f'{len(lines)} {kinds}' for kinds, lines in val.items()))
    tokens.finish(args.out_dir, record)


if __name__ == '__main__':
    tokens.run(main)
