"""
Tasks with a right answer, arithmetic and tic-tac-toe: text formats, players, and the scoring of a model.

    12+34=46           a problem and its answer per line: + - or * between whole numbers; an answer may be negative
    mr519...37X        a game per line: the players of X and of O (r: random, m: minimax), the cells in the order
                       in which they are taken (123 / 456 / 789), and the winner: X, O or - for a draw

A model plays by predicting the next character. After `mr` it must play X like a perfect player against any O. After `rm`
it must play O. Used by data/arithmetic, data/tictactoe, sample.py and train_bitnet.py, which scores at each evaluation.
Below, a predictor is any function from n texts (bytes) of equal length to the n most likely next bytes.
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
    """A key that is equal for problems that reveal each other's answer: 12+34 and 34+12, 12-34 and 34-12."""
    return operation, min(a, b), max(a, b)


def read_problems(text):
    """Bytes of whole lines -> list of problems as bytes, without line ends. Raises ValueError for any other line."""
    found = text.split()
    for line in found:
        match = PROBLEM.fullmatch(line)
        if not match or problem(int(match[1]), match[2].decode(), int(match[3])).encode() != line:
            raise ValueError(f'{line[:40]!r} is no solved problem')
    return found


def solve(predict, prompts, most):
    """A predictor's answer to each prompt (bytes), up to the end of the line or `most` characters."""
    answers = [b''] * len(prompts)
    for length in {len(p) for p in prompts}:        # prompts of equal length form one batch, so none needs padding
        open_ = [i for i, p in enumerate(prompts) if len(p) == length]
        while open_ and len(answers[open_[0]]) < most:
            for i, byte in zip(open_, predict([prompts[i] + answers[i] for i in open_]), strict=True):
                answers[i] += bytes([byte])
            open_ = [i for i in open_ if answers[i][-1:] != b'\n']
    return answers


def score_arithmetic(predict, problems):
    """{name: (right, all)}, over all problems and per operation. A right answer has every digit and then ends the line."""
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
    """'X' or 'O' with three in a line, '-' for a draw on a full board, '' for an unfinished game."""
    if three(moves[::-2]):                          # only the player of the last move can have won now
        return 'OX'[len(moves) % 2]
    return '-' if len(moves) == 9 else ''


def legal(moves):
    """Free cells as a string; '' when the game is over."""
    return '' if winner(moves) else ''.join(c for c in CELLS if c not in moves)


def best_moves(moves):
    """The best cells for the player to move, as a string: win as soon as possible, lose as late as possible."""
    turn = len(moves) % 2
    return _best(''.join(sorted(moves[turn::2])), ''.join(sorted(moves[1 - turn::2])))[1]


@functools.cache
def _best(mine, theirs):
    """(value, best cells) for the player to move, from the sorted cells of both. 0 is a draw; earlier ends are larger."""
    if three(theirs):
        return len(mine + theirs) - 10, ''
    values = {c: -_best(theirs, ''.join(sorted(mine + c)))[0] for c in CELLS if c not in mine + theirs}
    top = max(values.values(), default=0)
    return top, ''.join(c for c, value in values.items() if value == top)


def play(moves, kind, rng):
    """The next move of a player, one cell: kind 'm' takes one of the best cells, 'r' any free cell."""
    return rng.choice(best_moves(moves) if kind == 'm' else legal(moves))


def game(kinds, rng):
    """A whole game between two kinds of players, as one line: ('mr', random.Random()) -> 'mr519...37X'"""
    moves = ''
    while not (won := winner(moves)):
        moves += play(moves, kinds[len(moves) % 2], rng)
    return kinds + moves + won


def read_games(text):
    """Bytes of whole lines -> list of games as str. Raises ValueError for any other line."""
    found = text.split()
    for line in found:
        match = GAME.fullmatch(line)
        moves = match[2].decode() if match else ''
        if not match or any(moves[i] not in legal(moves[:i]) for i in range(len(moves))) or winner(moves) != match[3].decode():
            raise ValueError(f'{line[:40]!r} is no game that was played to its end')
    return [line.decode() for line in found]


def score_moves(predict, games):
    """{'legal_moves': (legal, all)}: how many of the most likely moves are legal, one for each position of these games."""
    positions = {kinds_moves[:i] for line in games for kinds_moves in [line[:-1]] for i in range(2, len(kinds_moves))}
    hits = 0
    for length in range(2, 11):
        here = sorted(p for p in positions if len(p) == length)
        said = predict([b'\n' + p.encode() for p in here]) if here else []
        hits += sum(chr(byte) in legal(p[2:]) for p, byte in zip(here, said, strict=True))
    return {'legal_moves': (hits, len(positions))}


def score_games(predict, against, n, seed):
    """Play n games of a predictor against 'random' or 'perfect', half of them as X. An illegal move loses the game.

    Returns {<against>_wins, _draws, _losses: (count, n), <against>_legal: (legal moves, all moves of the predictor)}."""
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
    """Play a predictor against every possible sequence of opponent moves: at most 384 games as X, 945 as O.

    Returns {lines_won, lines_drawn, lines_lost, lines_illegal: (count, all)}. It is unbeatable if the last two are 0."""
    found = {'won': 0, 'drawn': 0, 'lost': 0, 'illegal': 0}
    for side in (0, 1):
        kinds, going = ('mr', 'rm')[side], ['']
        while going:
            if len(going[0]) % 2 == side:           # all games have the same length
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
    """Next-byte logits of a byte model, fp32 (n, vocab), for n texts (bytes) of equal length. The model sees as much of the
    end of each text as fits into its context."""
    import torch  # imported here, so that the data scripts start without it
    with torch.no_grad():
        ids = torch.stack([torch.from_numpy(tokenizer.encode(t[-model.config.block_size:])) for t in texts]).to(device)
        return model(ids)[:, -1, :tokenizer.vocab_size].float()


TASKS = ('', 'arithmetic', 'tictactoe')
MOST = 2000     # held-out problems or games per evaluation, the first ones of the (shuffled) validation split
READERS = {'arithmetic': read_problems, 'tictactoe': read_games}


def read(task, text, where):
    """Validation text of a data set -> its problems or games. Another kind of data set is an error of one line."""
    try:
        return READERS[task](text)
    except ValueError as e:
        fail(f'{where}: {e}; type --dataset={task}, or --task= for a text without right answers')


def score(task, predict, held_out, seed):
    """Score a predictor on the first MOST items of read() -> {name: (count, all)}. For tic-tac-toe also score_lines(), and
    200 games against each kind of player."""
    if task == 'arithmetic':
        return score_arithmetic(predict, held_out[:MOST])
    found = score_moves(predict, held_out[:MOST]) | score_lines(predict)
    for against in ('random', 'perfect'):
        found |= score_games(predict, against, 200, seed)
    return found


def errors(scores):
    """Error rate from score(): the share of wrong answers, or of all possible games lost or ended by an illegal move."""
    if 'exact_match' in scores:
        right, n = scores['exact_match']
        return 1 - right / n
    (lost, n), (illegal, _) = scores['lines_lost'], scores['lines_illegal']
    return (lost + illegal) / n
