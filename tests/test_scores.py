"""report/scores.py against sklearn, slow bootstraps and sums on paper; predictions of two runs matched by their rows."""
import csv
import math

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from report import scores


def noisy(seed, n, k, share):
    """Labels (n,) of k kinds and predictions of them, `share` kept and the others drawn at random."""
    random = np.random.default_rng(seed)
    labels = random.choice(k, n, p=np.arange(1, k + 1) / sum(range(1, k + 1)))      # unequal, so that f1 kinds differ
    return labels, np.where(random.random(n) < share, labels, random.integers(0, k, n))


@pytest.mark.parametrize('k', [2, 7])
def test_metrics_are_those_of_sklearn_and_of_resampled_rows(k):
    """Accuracy and F1 to the last digit; interval ends within 0.006 of a bootstrap that draws rows."""
    labels, predictions = noisy(k, 400, k, 0.7)
    result = scores.metrics(labels.tolist(), predictions.tolist(), k)
    kind = 'binary' if k == 2 else 'macro'
    assert result['f1_kind'] == kind and result['n'] == 400
    assert result['accuracy'] == metrics.accuracy_score(labels, predictions)
    assert result['f1'] == metrics.f1_score(labels, predictions, average=kind)
    if k == 2:                                      # of label 1, not of label 0
        assert result['f1'] != pytest.approx(metrics.f1_score(labels, predictions, pos_label=0), abs=0.01)
    random, drawn = np.random.default_rng(1), []
    for _ in range(4000):
        rows = random.integers(0, 400, 400)
        y, p = labels[rows], predictions[rows]
        f1 = [2 * ((y == i) & (p == i)).sum() / ((y == i).sum() + (p == i).sum()) for i in range(k)]
        drawn.append(((y == p).mean(), f1[1] if k == 2 else np.mean(f1)))
    slow = np.percentile(drawn, (2.5, 97.5), axis=0)
    fast = [[result['accuracy_low'], result['f1_low']], [result['accuracy_high'], result['f1_high']]]
    assert np.abs(slow - fast).max() < 0.006
    assert result['accuracy_low'] < result['accuracy'] < result['accuracy_high'] and result['f1_low'] < result['f1']


def test_metrics_by_hand_and_at_the_edges():
    """2 true and 1 false positive, 1 false and 2 true negatives: accuracy 4/6, F1 4/6; edge cases; bad ids."""
    result = scores.metrics([1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0], 2)
    assert result['accuracy'] == result['f1'] == pytest.approx(4 / 6)
    result = scores.metrics([0, 0, 1, 1], [0, 1, 1, 1], 5)                # F1 of label 0: 2/3; of label 1: 4/5
    assert result['f1'] == pytest.approx((2 / 3 + 4 / 5) / 2) and result['f1_kind'] == 'macro'
    assert scores.metrics([0, 0], [0, 0], 2)['f1'] == 0 and scores.metrics([0, 0], [0, 0], 2)['f1_high'] == 0
    assert scores.metrics([0, 1, 2], [0, 1, 2], 3)['accuracy_low'] == 1
    assert scores.metrics([0, 1, 2], [1, 2, 0], 3)['f1_high'] == 0
    for labels, predictions in (([0, 2], [0, 1]), ([0, 1], [0, -1]), ([0], [0, 1]), ([], [])):
        with pytest.raises(ValueError):
            scores.metrics(labels, predictions, 2)


def test_metrics_of_many_labels_in_several_pieces():
    """For 51 labels the interval is that of the binomial, within 0.003."""
    labels, predictions = noisy(0, 2500, 51, 0.6)
    result = scores.metrics(labels, predictions, 51)
    half = 1.96 * math.sqrt(result['accuracy'] * (1 - result['accuracy']) / 2500)
    assert result['accuracy_low'] == pytest.approx(result['accuracy'] - half, abs=0.003)
    assert result['accuracy_high'] == pytest.approx(result['accuracy'] + half, abs=0.003)


def compare(only_a, only_b):
    """scores.compare() of 100 rows, of which so many are right in one model only and 60 in both."""
    neither = 40 - only_a - only_b
    return scores.compare([1] * 100, [1] * only_a + [0] * only_b + [1] * 60 + [0] * neither,
                          [0] * only_a + [1] * only_b + [1] * 60 + [0] * neither, names=('int8', 'nf4'))


def test_compare_by_hand():
    """2 against 10: p = 2 (1 + 12 + 66) / 2^12; 3 against 9: 2 (1 + 12 + 66 + 220) / 2^12, inconclusive."""
    better, worse, unclear = compare(2, 10), compare(10, 2), compare(3, 9)
    assert better['p'] == pytest.approx(158 / 4096) and [better[k] for k in ('only_a', 'only_b', 'n')] == [2, 10, 100]
    assert (better['accuracy_a'], better['accuracy_b']) == (0.62, 0.7) and better['difference'] == pytest.approx(0.08)
    assert better['verdict'].startswith('nf4 is better than int8 by 8.00 points')
    assert 0 < better['difference_low'] < 0.08 < better['difference_high']
    assert worse['verdict'].startswith('nf4 is worse than int8 by 8.00') and worse['difference'] == pytest.approx(-0.08)
    assert unclear['p'] == pytest.approx(598 / 4096) and unclear['difference_low'] < 0 < unclear['difference_high']
    assert unclear['verdict'] == ('the test set is too small to tell: n = 100, differences under '
                                  f'{unclear["detectable"] * 100:.2f} points cannot be seen')
    same = scores.compare(['y', 'n'], ['y', 'y'], ['y', 'y'])
    assert same['p'] == 1 and same['difference'] == same['difference_low'] == 0 and 'too small' in same['verdict']
    with pytest.raises(ValueError, match='not as many'):
        scores.compare([1, 0], [1, 0], [1])


def test_compare_pairs_the_rows():
    """The interval is that of resampled rows, narrower than that of two independent runs."""
    labels, a = noisy(3, 500, 3, 0.8)
    b = np.where(np.arange(500) % 25 == 0, labels, a)
    result = scores.compare(labels, a, b)
    random, gain = np.random.default_rng(0), (b == labels).astype(int) - (a == labels)
    slow = np.percentile([gain[random.integers(0, 500, 500)].mean() for _ in range(4000)], (2.5, 97.5))
    assert [result['difference_low'], result['difference_high']] == pytest.approx(slow, abs=0.0025)


@pytest.mark.parametrize('n, discordant', [(5010, 0.2), (872, 0.0), (100, 0.02)])
def test_a_detectable_difference_is_found_four_times_in_five(n, discordant):
    """With that difference the exact test rejects in 70% to 84% of drawn test sets; with half of it, far fewer."""
    random = np.random.default_rng(0)

    def power(difference):
        share = max(discordant, difference)
        drawn = random.multinomial(n, [(share - difference) / 2, (share + difference) / 2, 1 - share], 20_000)
        p = 2 * stats.binom.cdf(drawn[:, :2].min(1), drawn[:, :2].sum(1), 0.5)
        return (p < 0.05).mean()
    difference = scores.detectable(n, discordant)
    assert 0.70 < power(difference) < 0.84 and power(difference / 2) < 0.45
    share = max(discordant, difference)
    needed = (1.959964 * share ** 0.5 + 0.841621 * (share - difference ** 2) ** 0.5) ** 2 / difference ** 2
    assert needed == pytest.approx(n, rel=1e-6)
    values = [scores.detectable(rows, discordant) for rows in (1, 2, 5, 20, 100, 1000, 100_000)]       # more rows detect more
    assert values == sorted(values, reverse=True) and max(values) <= 1 and min(values) > 0
    assert difference <= scores.detectable(n, discordant + 0.1)


# ---------------------------------------------------------------------------------------------------- predictions


@pytest.fixture
def write(tmp_path):
    """write(name, rows, header) -> path of such a predictions file."""
    def make(name, rows, header=('index', 'label', 'prediction', 'p_0', 'set')):
        with open(tmp_path / name, 'w', newline='') as f:
            csv.writer(f).writerows([header, *rows])
        return tmp_path / name
    return make


def test_paired_predictions_follow_the_rows_not_their_order(write):
    """Rows are matched by set and index, without a column of sets by index alone."""
    a = write('a.csv', [(0, 'x', 'y', .1, 'de'), (1, 'y', 'y', .2, 'de'), (0, 'x', 'x', .3, 'en')])
    b = write('b.csv', [(0, 'x', 'z', .1, 'en'), (1, 'y', 'x', .2, 'de'), (0, 'x', 'x', .3, 'de')])
    assert scores.paired(a, b) == (['x', 'y', 'x'], ['y', 'y', 'x'], ['x', 'x', 'z'], ['de', 'de', 'en'])
    plain = write('c.csv', [('1', '0', 5), ('0', '1', 6)], ('prediction', 'label', 'index'))
    assert scores.paired(plain, plain) == (['0', '1'], ['1', '0'], ['1', '0'], None)


def test_predictions_of_other_rows_are_refused(write):
    """A missing row, another label, an index twice, a missing column: one line with the place."""
    rows = [(0, 'x', 'y', .1, 'de'), (1, 'y', 'y', .2, 'de')]
    a, short, twice = write('a.csv', rows), write('short.csv', rows[:1]), write('twice.csv', [*rows, rows[0]])
    other = write('other.csv', [rows[0], (1, 'x', 'y', .2, 'de')])
    lacking = write('lacking.csv', [(1, 2)], ('index', 'label'))
    for first, second, message in ((a, short, r'index 1 de is in .*a.csv but not in .*short.csv'),
                                   (short, a, r'index 1 de is in .*a.csv but not in .*short.csv'),
                                   (a, other, "index 1 de has label 'y' in .* and 'x' in"),
                                   (a, twice, 'twice.csv, line 4: index 0 de is there twice'),
                                   (lacking, a, "lacking.csv has no column 'prediction'")):
        with pytest.raises(ValueError, match=message):
            scores.paired(first, second)
