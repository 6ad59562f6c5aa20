"""
Texts with a right answer: arithmetic and tic-tac-toe. How they are written, who plays, and how a model is scored.

    12+34=46           a problem and its answer, one a line; + - or * between whole numbers, an answer may be negative
    mr519...37X        a game, one a line: who plays X and who plays O (r at random, m by minimax), the cells in the order
                       in which they are taken (123 / 456 / 789), and who won: X, O or - for nobody

A model plays by saying what comes next. Told `mr` it has to play X as a perfect player does, whatever O may do; told `rm`,
O. Read by data/arithmetic, data/tictactoe, train_bitnet.py, which scores a model at each evaluation, and sample.py.
A predictor, below, is any function from n texts (bytes) of one length to the n likeliest next bytes.
"""
import functools
import random
import re

from configurator import fail

# ---------------------------------------------------------------------------------------------------------------------
# arithmetic

OPERATIONS = {'+': lambda a, b: a + b, '-': lambda a, b: a - b, '*': lambda a, b: a * b}
PROBLEM = re.compile(rb'(\d+)([-+*])(\d+)=(-?\d+)')


def problem(a, operation, b):
    """(12, '+', 34) -> '12+34=46'"""
    return f'{a}{operation}{b}={OPERATIONS[operation](a, b)}'


def same_problem(a, operation, b):
    """What is equal for problems of which one gives the other away: 12+34 and 34+12, 12-34 and 34-12."""
    return operation, min(a, b), max(a, b)


def read_problems(text):
    """bytes of whole lines -> list of problems, as bytes without the line end. Raises ValueError for any other line."""
    found = text.split()
    for line in found:
        match = PROBLEM.fullmatch(line)
        if not match or problem(int(match[1]), match[2].decode(), int(match[3])).encode() != line:
            raise ValueError(f'{line[:40]!r} is no solved problem')
    return found


def solve(predict, prompts, most):
    """What a predictor writes after each of the prompts (bytes), up to the end of the line or `most` characters."""
    answers = [b''] * len(prompts)
    for length in {len(p) for p in prompts}:        # no padding: those of one length together
        open_ = [i for i, p in enumerate(prompts) if len(p) == length]
        while open_ and len(answers[open_[0]]) < most:
            for i, byte in zip(open_, predict([prompts[i] + answers[i] for i in open_]), strict=True):
                answers[i] += bytes([byte])
            open_ = [i for i in open_ if answers[i][-1:] != b'\n']
    return answers


def score_arithmetic(predict, problems):
    """{name: (right, all)}: answers right to the last digit and ended there, in all and for each operation."""
    prompts = [b'\n' + line[:line.index(b'=') + 1] for line in problems]
    wanted = [line[line.index(b'=') + 1:] + b'\n' for line in problems]
    answers = solve(predict, prompts, max(map(len, wanted), default=0))
    counts = {}
    for line, answer, right in zip(problems, answers, wanted, strict=True):
        for name in ('exact_match', f'exact_match{PROBLEM.fullmatch(line)[2].decode()}'):
            hits, n = counts.get(name, (0, 0))
            counts[name] = hits + (answer == right), n + 1
    return counts


# ---------------------------------------------------------------------------------------------------------------------
# tic-tac-toe: moves are a string of cells '1' to '9', X moves first

CELLS = '123456789'
LINES = ('123', '456', '789', '147', '258', '369', '159', '357')
GAME = re.compile(rb'([rm][rm])([1-9]*)([XO-])')


def three(cells):
    return any(all(cell in cells for cell in line) for line in LINES)


def winner(moves):
    """'X' or 'O' with three in a line, '-' on a full board, '' while the game goes on."""
    if three(moves[::-2]):                          # only who moved last can have won just now
        return 'OX'[len(moves) % 2]
    return '-' if len(moves) == 9 else ''


def legal(moves):
    """Free cells, as a string; none when the game is over."""
    return '' if winner(moves) else ''.join(c for c in CELLS if c not in moves)


def best_moves(moves):
    """Cells, as a string, that are best for who is to move: a win as soon, a loss as late as can be."""
    turn = len(moves) % 2
    return _best(''.join(sorted(moves[turn::2])), ''.join(sorted(moves[1 - turn::2])))[1]


@functools.cache
def _best(mine, theirs):
    """(value, best cells) for who is to move, by the sorted cells of both: 0 is a draw, a sooner end further from it."""
    if three(theirs):
        return len(mine + theirs) - 10, ''
    values = {c: -_best(theirs, ''.join(sorted(mine + c)))[0] for c in CELLS if c not in mine + theirs}
    top = max(values.values(), default=0)
    return top, ''.join(c for c, value in values.items() if value == top)


def play(moves, kind, rng):
    """The cell that a player takes: kind 'm' one of the best, 'r' any free one."""
    return rng.choice(best_moves(moves) if kind == 'm' else legal(moves))


def game(kinds, rng):
    """A whole game between two kinds of players, as its line: ('mr', random.Random()) -> 'mr519...37X'"""
    moves = ''
    while not (won := winner(moves)):
        moves += play(moves, kinds[len(moves) % 2], rng)
    return kinds + moves + won


def read_games(text):
    """bytes of whole lines -> list of games as str. Raises ValueError for any other line."""
    found = text.split()
    for line in found:
        match = GAME.fullmatch(line)
        moves = match[2].decode() if match else ''
        if not match or any(moves[i] not in legal(moves[:i]) for i in range(len(moves))) or winner(moves) != match[3].decode():
            raise ValueError(f'{line[:40]!r} is no game that was played to its end')
    return [line.decode() for line in found]


def score_moves(predict, games):
    """{'legal_moves': (legal, all)}: of the likeliest moves at each position of these games (lines)."""
    positions = {kinds_moves[:i] for line in games for kinds_moves in [line[:-1]] for i in range(2, len(kinds_moves))}
    hits = 0
    for length in range(2, 11):
        here = sorted(p for p in positions if len(p) == length)
        said = predict([b'\n' + p.encode() for p in here]) if here else []
        hits += sum(chr(byte) in legal(p[2:]) for p, byte in zip(here, said, strict=True))
    return {'legal_moves': (hits, len(positions))}


def score_games(predict, against, n, seed):
    """n games of a predictor against 'random' or 'perfect' ('r', 'm'), half of them as X. An illegal move loses the game.

    {against_wins, against_draws, against_losses, against_legal: (count, all)}; the last of all moves made in them."""
    rng, kind = random.Random(seed), {'random': 'r', 'perfect': 'm'}[against]
    result, moves_made, legal_made = {'wins': 0, 'draws': 0, 'losses': 0}, 0, 0
    for side in (0, 1):
        kinds, moves = ('mr', 'rm')[side], [''] * (n // 2 + (n % 2 and side == 0))
        for turn in range(9):
            going = [i for i, m in enumerate(moves) if m is not None and not winner(m)]
            if turn % 2 == side:
                said = predict([b'\n' + (kinds + moves[i]).encode() for i in going]) if going else []
                for i, byte in zip(going, said, strict=True):
                    moves_made += 1
                    if chr(byte) in legal(moves[i]):
                        legal_made += 1
                        moves[i] += chr(byte)
                    else:
                        moves[i] = None
            else:
                for i in going:
                    moves[i] += play(moves[i], kind, rng)
        for m in moves:
            won = 'illegal' if m is None else winner(m)
            result['wins' if won == 'XO'[side] else 'draws' if won == '-' else 'losses'] += 1
    counts = {f'{against}_{k}': (v, n) for k, v in result.items()}
    return counts | {f'{against}_legal': (legal_made, moves_made)}


def score_lines(predict):
    """Every game that can come about when a predictor plays, whatever the other side does: as X at most 384, as O 945.

    {lines_won, lines_drawn, lines_lost, lines_illegal: (count, all)}: it can be beaten where one of the last two is not 0."""
    found = {'won': 0, 'drawn': 0, 'lost': 0, 'illegal': 0}
    for side in (0, 1):
        kinds, going = ('mr', 'rm')[side], ['']
        while going:
            if len(going[0]) % 2 == side:           # all are of one length
                said = predict([b'\n' + (kinds + moves).encode() for moves in going])
                moved = [moves + chr(byte) for moves, byte in zip(going, said, strict=True) if chr(byte) in legal(moves)]
                found['illegal'] += len(going) - len(moved)
            else:
                moved = [moves + cell for moves in going for cell in legal(moves)]
            for won in map(winner, moved):
                if won:
                    found['won' if won == 'XO'[side] else 'drawn' if won == '-' else 'lost'] += 1
            going = [moves for moves in moved if not winner(moves)]
    return {f'lines_{k}': (v, sum(found.values())) for k, v in found.items()}


# ---------------------------------------------------------------------------------------------------------------------


def next_logits(model, tokenizer, texts, device):
    """(n, vocab) fp32 logits of a byte model for what comes after each of n texts (bytes) of one length, of which it sees as
    much as fits into its context."""
    import torch  # here, so that the data scripts start without it
    with torch.no_grad():
        ids = torch.stack([torch.from_numpy(tokenizer.encode(t[-model.config.block_size:])) for t in texts]).to(device)
        return model(ids)[:, -1, :tokenizer.vocab_size].float()


TASKS = ('', 'arithmetic', 'tictactoe')
MOST = 2000     # held-out problems or games that one evaluation scores, in the random order of the validation split
READERS = {'arithmetic': read_problems, 'tictactoe': read_games}


def read(task, text, where):
    """The validation text of a data set -> its problems or games; one clear line for a data set of something else."""
    try:
        return READERS[task](text)
    except ValueError as e:
        fail(f'{where}: {e}; type --dataset={task}, or --task= for a text without right answers')


def score(task, predict, held_out, seed):
    """{name: (count, all)} of the first MOST of what read() gave; for tic-tac-toe also of all that can happen to the model in
    a game, and of 200 games against each kind of player."""
    if task == 'arithmetic':
        return score_arithmetic(predict, held_out[:MOST])
    found = score_moves(predict, held_out[:MOST]) | score_lines(predict)
    for against in ('random', 'perfect'):
        found |= score_games(predict, against, 200, seed)
    return found


def errors(scores):
    """Share of wrong answers in what score() gave, or of games lost or ended by an illegal move among all that can happen."""
    if 'exact_match' in scores:
        right, n = scores['exact_match']
        return 1 - right / n
    (lost, n), (illegal, _) = scores['lines_lost'], scores['lines_illegal']
    return (lost + illegal) / n
