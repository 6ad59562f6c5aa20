"""readers/tasks.py: tic-tac-toe against a solver of its own on every position, players, scores of known predictors, damage."""
import functools
import itertools
import random

import pytest

from readers import tasks

CELLS = '123456789'
MAGIC = dict(zip(CELLS, (2, 7, 6, 9, 5, 1, 4, 3, 8), strict=True))      # three in a line sum to 15, others do not


# ---------------------------------------------------------------------------------------- a solver that shares no line


def won(cells):
    return any(sum(MAGIC[c] for c in some) == 15 for some in itertools.combinations(cells, 3))


def moved(x, o):
    return {c: (x | {c}, o) if len(x) == len(o) else (x, o | {c}) for c in sorted(set(CELLS) - x - o)}


@functools.cache
def reachable():
    """Every position that a game can come to, as (cells of X, cells of O), sets of str."""
    found, now = set(), {(frozenset(), frozenset())}
    while now:
        found |= now
        now = {after for x, o in now if not (won(x) or won(o)) for after in moved(x, o).values()}
    return found


@functools.cache
def outcome(x, o):
    """(1, 0 or -1 for X, moves until the end) where X ends soonest what it wins and latest what it loses, and O likewise."""
    if won(x) or won(o) or len(x | o) == 9:
        return won(x) - won(o), 0
    ahead = [outcome(*after) for after in moved(x, o).values()]
    return max(((won_by, 1 + n) for won_by, n in ahead), key=lambda r: wish(r, len(x) == len(o)))


def wish(result, x_moves):
    """Larger is better for the side to move: a win before a draw before a loss, a sooner win, a later loss."""
    value = result[0] if x_moves else -result[0]
    return value, -value * result[1]


def test_best_moves_are_those_of_another_solver():
    """On all 5,478 positions a perfect player wins as soon and loses as late as possible; winner and legal moves are right."""
    rng, n_over = random.Random(0), 0
    assert len(reachable()) == 5478
    for x, o in reachable():                        # with some order of their moves
        order = rng.sample(sorted(x), len(x)), rng.sample(sorted(o), len(o))
        moves = ''.join(c for pair in itertools.zip_longest(*order, fillvalue='') for c in pair)
        over = 'X' if won(x) else 'O' if won(o) else '-' if len(moves) == 9 else ''
        assert tasks.winner(moves) == over and tasks.legal(moves) == ('' if over else ''.join(sorted(set(CELLS) - x - o)))
        if over:
            n_over += 1
            assert tasks.best_moves(moves) == ''
            continue
        after = {c: wish(outcome(*position), len(x) == len(o)) for c, position in moved(x, o).items()}
        assert tasks.best_moves(moves) == ''.join(c for c in after if after[c] == max(after.values())), moves
    assert n_over == 958 and tasks.best_moves('') == CELLS and tasks.best_moves('1') == '5'


# -------------------------------------------------------------------------------------------------------------- players


def lines_of(choose, side):
    """The results of all games in which one side plays choose(moves) and the other one everything."""
    def go(moves):
        if over := tasks.winner(moves):
            return [over]
        cells = [choose(moves)] if len(moves) % 2 == side else tasks.legal(moves)
        return ['illegal'] if cells[0] not in tasks.legal(moves) else [r for cell in cells for r in go(moves + cell)]
    return go('')


@pytest.mark.parametrize('kinds, ends', [('rm', 'O-'), ('mm', '-'), ('rr', 'XO-')])
def test_games_between_players(kinds, ends):
    """A perfect side (m) plays best moves, a random one (r) not always; games end as they must, the same for a seed."""
    play = lambda: [tasks.game(kinds, rng) for rng in [random.Random(1)] for _ in range(150)]
    lines = play()
    assert tasks.read_games(''.join(f'{line}\n' for line in lines).encode()) == lines == play()
    assert {line[-1] for line in lines} == set(ends) and {line[:2] for line in lines} == {kinds}
    assert len(set(lines)) > (20 if kinds == 'mm' else 60)
    for side, kind in enumerate(kinds):
        best = [cell in tasks.best_moves(line[2:2 + i]) for line in lines for i, cell in enumerate(line[2:-1]) if i % 2 == side]
        assert all(best) == (kind == 'm')


# -------------------------------------------------------------------------------------------------------------- scoring


def predictor(choose, seen=None):
    """One that answers choose(moves), a str of one character, after checking its inputs."""
    def predict(texts):
        assert texts and len({len(t) for t in texts}) == 1
        for text in texts:
            assert text[:1] == b'\n' and text[1:3] == (b'mr', b'rm')[(len(text) - 3) % 2]
        if seen is not None:
            seen.extend(texts)
        return [ord(choose(t[3:].decode())) for t in texts]
    return predict


def best(moves):
    return tasks.best_moves(moves)[0]


def first(moves):
    return tasks.legal(moves)[0]


@pytest.mark.parametrize('against', ['random', 'perfect'])
def test_a_perfect_predictor_loses_no_game(against):
    """As X and as O all its moves are legal; perfect play against it draws, random play mostly loses."""
    counts = tasks.score_games(predictor(best), against, 61, 5)
    wins, draws, losses, legal = (counts[f'{against}_{name}'] for name in ('wins', 'draws', 'losses', 'legal'))
    assert len(counts) == 4 and losses == (0, 61) and wins[1] == draws[1] == 61 == wins[0] + draws[0]
    assert wins[0] == 0 if against == 'perfect' else wins[0] > 40
    assert legal[0] == legal[1] > 3 * 61


@pytest.mark.parametrize('choose, n, counts', [
    (first, 5, [(3, 5), (0, 5), (2, 5), (3 * 3 + 2 * 2, 13)]),          # X wins in three moves, O loses after two
    (lambda moves: '5', 4, [(0, 4), (0, 4), (4, 4), (4, 8)]),           # loses with its second move
    (lambda moves: '\n', 4, [(0, 4), (0, 4), (4, 4), (0, 4)]),
    (lambda moves: ('398746521', '968751423')[len(moves) % 2][len(moves)], 2, [(0, 2), (2, 2), (0, 2), (9, 9)])])
def test_games_by_hand(monkeypatch, choose, n, counts):
    """Against a player of the last free cell: half of the games as X and as O, the odd one as X; an illegal move loses."""
    monkeypatch.setattr(tasks, 'play', lambda moves, kind, rng: tasks.legal(moves)[-1])
    seen = []
    scores = tasks.score_games(predictor(choose, seen), 'random', n, 0)
    assert [scores[f'random_{name}'] for name in ('wins', 'draws', 'losses', 'legal')] == counts
    assert len(seen) == scores['random_legal'][1]


def always(choice, asked):
    def predict(texts):
        assert texts and len({len(t) for t in texts}) == 1 and all(t[:1] == b'\n' for t in texts)
        asked.extend(t[1:].decode() for t in texts)
        return [ord(choice)] * len(texts)
    return predict


def test_legal_moves_by_hand():
    """Each position of the games counts once, however many of them reach it; the one after the last move does not."""
    games = ['mr14273X', 'mr14253X', 'mr14273X']        # mr, mr1, mr14, mr142 and two more
    for choice, legal in (('9', 6), ('X', 0), ('2', 3), ('7', 5)):
        asked = []
        assert tasks.score_moves(always(choice, asked), games)['legal_moves'] == (legal, 6)
        assert sorted(asked) == sorted({g[:i] for g in games for i in range(2, len(g) - 1)})
    assert tasks.score_moves(None, [])['legal_moves'] == (0, 0)
    assert tasks.score_moves(always('9', []), [*games, 'rr14273X'])['legal_moves'] == (11, 11)


@pytest.mark.parametrize('choose', [best, first, lambda moves: 'x'])
def test_all_lines_of_play(choose):
    """score_lines() goes through every game that the other side can make of it, as X and as O; a perfect player loses none."""
    x, o = lines_of(choose, 0), lines_of(choose, 1)
    ends = {'won': x.count('X') + o.count('O'), 'drawn': x.count('-') + o.count('-'), 'lost': x.count('O') + o.count('X'),
            'illegal': x.count('illegal') + o.count('illegal')}
    assert tasks.score_lines(predictor(choose)) == {f'lines_{k}': (v, len(x + o)) for k, v in ends.items()}
    assert len(x) <= 384 and len(o) <= 945 and (choose('') != 'x' or ends['illegal'] == 1 + 9 == len(x + o))
    assert choose is not best or ends['lost'] == ends['illegal'] == 0 and ends['won'] > len(x + o) / 2


def test_an_evaluation_scores_a_task_as_a_whole(monkeypatch):
    """tictactoe: held-out positions, all lines, 200 games by seed against each player; at most MOST items count."""
    nine = predictor(lambda moves: '9')
    say = always('9', [])
    assert tasks.score('tictactoe', say, ['mr14273X'], 3) == {'legal_moves': (5, 5)} | tasks.score_lines(nine) \
        | tasks.score_games(nine, 'random', 200, 3) | tasks.score_games(nine, 'perfect', 200, 3)
    assert tasks.score_games(nine, 'random', 200, 3) != tasks.score_games(nine, 'random', 200, 4)
    monkeypatch.setattr(tasks, 'MOST', 2)
    assert tasks.score('tictactoe', say, ['mr14273X', 'mr14273X', 'mr14253X'], 3)['legal_moves'] == (5, 5)
    problems = [b'1+1=2', b'2+2=4', b'3-3=0']
    said = {b'\n' + p[:4]: p[4:] + b'\n' for p in problems}
    assert tasks.score('arithmetic', writer(said), problems, 3) == {'exact_match': (2, 2), 'exact_match+': (2, 2)}


# ----------------------------------------------------------------------------------------------------------- arithmetic


def writer(said, asked=None):
    """A predictor that writes said[prompt] after each of these prompts, byte by byte."""
    def predict(texts):
        assert texts and len({len(t) for t in texts}) == 1
        if asked is not None:
            asked.extend(texts)
        prompts = [next(p for p in said if text.startswith(p) and said[p].startswith(text[len(p):])) for text in texts]
        return [said[prompt][len(text) - len(prompt)] for text, prompt in zip(texts, prompts, strict=True)]
    return predict


def test_prompts_of_several_lengths_are_solved_together():
    """Answers keep the order of the prompts, up to the line's end or 4 characters; a finished one is not asked again."""
    said, asked = {b'1+1=': b'2\n', b'12+34=': b'46\n', b'5*5=': b'25\n', b'9-9=': b'0000000', b'x': b'\n'}, []
    answers = tasks.solve(writer(said, asked), list(said), 4)
    assert answers == [b'2\n', b'46\n', b'25\n', b'0000', b'\n']
    assert len(asked) == 2 + 3 + 3 + 4 + 1 and len(set(asked)) == len(asked)
    assert tasks.solve(writer(said), [b'1+1=', b'1+1='], 4) == [b'2\n', b'2\n'] and tasks.solve(None, [], 4) == []


def test_an_answer_is_right_to_its_end():
    """A wrong digit, one too many or too few, a number that goes on and a missing sign are all wrong."""
    right = {b'\n12+34=': b'46\n', b'\n3-5=': b'-2\n', b'\n5*5=': b'25\n', b'\n5-5=': b'0\n', b'\n99+1=': b'100\n'}
    problems = [p[1:] + a[:-1] for p, a in right.items()]

    def score(**wrong):
        said = right | {prompt: answer for prompt in right for key, answer in wrong.items() if prompt[1:-1].decode() == key}
        return [tasks.score_arithmetic(writer(said), problems)[f'exact_match{o}'] for o in ('', '+', '-', '*')]
    assert score() == [(5, 5), (2, 2), (2, 2), (1, 1)]
    for name, answer in (('12+34', b'47\n'), ('12+34', b'466\n'), ('12+34', b'4\n'), ('12+34', b'46 \n'), ('12+34', b'\n'),
                         ('99+1', b'1000\n'), ('99+1', b'10\n'), ('12+34', b'46' * 9)):
        assert score(**{name: answer}) == [(4, 5), (1, 2), (2, 2), (1, 1)], answer
    assert score(**{'3-5': b'2\n', '5-5': b'-0\n', '5*5': b'10\n'}) == [(2, 5), (2, 2), (0, 2), (0, 1)]
    assert tasks.score_arithmetic(writer(right), []) == {}


def test_a_problem_and_the_one_with_its_numbers_exchanged_are_the_same():
    for o in '+-*':
        assert tasks.same_problem(12, o, 34) == tasks.same_problem(34, o, 12) != tasks.same_problem(12, o, 33)
    assert len({tasks.same_problem(1, o, 1) for o in '+-*'}) == 3


# --------------------------------------------------------------------------------------------------------------- damage


def test_whole_texts_are_read():
    """Each line is a problem or a game, as written."""
    assert tasks.read_problems(b'12+34=46\n3-5=-2\n0*7=0\n') == [b'12+34=46', b'3-5=-2', b'0*7=0']
    assert tasks.read_games(b'mr14273X\nrr921538O\nmm125437698-\n') == ['mr14273X', 'rr921538O', 'mm125437698-']
    assert tasks.read('arithmetic', b'1+1=2\n', 'here') == [b'1+1=2'] and tasks.problem(12, '-', 34) == '12-34=-22'


@pytest.mark.parametrize('read, lines', [
    (tasks.read_problems, [b'12+34=47', b'12+34=', b'+1=1', b'01+1=2', b'1+1=2x', b'x1+1=2', b'1/1=1', b'1*0=-0', b'1+1=02',
                           '١+١=٢'.encode(), b'mr14273X', b'1+1=2\x000+1=1']),
    (tasks.read_games, [b'mr14273O', b'mr1427X', b'mr1427-', b'r14273X', b'xr14273X', b'mr142738X', b'mr14272X', b'mr04273X',
                        b'mr14273XX', b'mr-', b'MR14273X', b'mr1427\xff3X', b'mr12543769-', b'14273X', b'mr1427385X'])])
def test_a_damaged_line_is_refused(read, lines):
    """A wrong answer or end, moves after it, a cell taken twice or off the board: a ValueError that shows the line."""
    good = b'1+1=2\n' if read is tasks.read_problems else b'mr14273X\n'
    for line in lines:
        with pytest.raises(ValueError) as error:
            read(good + line + b'\n' + good)
        assert repr(line[:40]) in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('task', ['arithmetic', 'tictactoe'])
def test_a_text_of_another_kind_is_one_line(capsys, task):
    """The line names the data set and says what to type."""
    with pytest.raises(SystemExit) as stop:
        tasks.read(task, b'Once upon a time\n' * 9, 'stories')
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count('\n') == 1 and said.startswith("error: stories: b'Once'")
    assert f'--dataset={task}' in said and '--task=' in said
