"""Accuracy and F1 of a classifier with confidence intervals, and a paired test of whether one model beats another.

    metrics(ids, predictions, len(names)),  compare(ids, predictions_a, predictions_b),  paired(path_a, path_b)
"""
import numpy as np

from readers.texts import read_columns

SEED, DRAWS = 42, 10_000        # of the bootstrap that gives each interval


def metrics(labels, predictions, n_labels):
    """Accuracy and F1 of predictions (n,) against labels (n,), both ids in [0, n_labels), with 95% intervals.

    Returns a dict: accuracy, accuracy_low, accuracy_high, f1, f1_low, f1_high, f1_kind, n. f1_kind is 'binary' for two
    labels (the F1 of label 1), otherwise 'macro' (mean over the labels that occur). The intervals are bootstrap
    percentiles. If all predictions are right, the interval has width 0 and means little. ValueError for ids out of range.

    The scores of a resample depend only on its count of each (label, prediction) pair. For n rows drawn with replacement,
    these counts are multinomial: n draws, with the observed shares as probabilities. So the counts are drawn directly, in
    one call. The distribution is the same as with rows, without n random numbers per draw.
    """
    from sklearn.metrics import accuracy_score, f1_score
    labels, predictions = np.asarray(labels, dtype=np.int64), np.asarray(predictions, dtype=np.int64)
    n = len(labels)
    if not n or labels.shape != predictions.shape or labels.ndim != 1:
        raise ValueError(f'labels {labels.shape} and predictions {predictions.shape} are empty or not as many')
    for name, ids in (('labels', labels), ('predictions', predictions)):
        if ids.min() < 0 or ids.max() >= n_labels:
            raise ValueError(f'{name} are {ids.min()} to {ids.max()}, but ids of {n_labels} labels are 0 to {n_labels - 1}')
    is_binary = n_labels == 2
    cells, counts = np.unique(labels * n_labels + predictions, return_counts=True)
    rows, columns = np.eye(n_labels)[cells // n_labels], np.eye(n_labels)[cells % n_labels]         # (cells, n_labels)
    generator, drawn, step = np.random.default_rng(SEED), [], max(1, 5_000_000 // (len(cells) + n_labels))
    for first in range(0, DRAWS, step):
        table = generator.multinomial(n, counts / n, min(step, DRAWS - first)).astype(float)        # (draws, cells)
        hits, marked = table @ (rows * columns), table @ (rows + columns)       # TP and 2 TP + FP + FN, per label
        with np.errstate(invalid='ignore'):
            f1 = 2 * hits / marked                                              # 0 / 0: the label does not occur
        f1 = np.nan_to_num(f1[:, 1]) if is_binary else np.nanmean(f1, axis=1)
        drawn.append((hits.sum(1) / n, f1))
    intervals = np.percentile(np.concatenate(drawn, axis=1), (2.5, 97.5), axis=1).T.tolist()
    kind = 'binary' if is_binary else 'macro'
    return {'accuracy': float(accuracy_score(labels, predictions)), 'accuracy_low': intervals[0][0],
            'accuracy_high': intervals[0][1], 'f1': float(f1_score(labels, predictions, average=kind, zero_division=0)),
            'f1_low': intervals[1][0], 'f1_high': intervals[1][1], 'f1_kind': kind, 'n': n}


def detectable(n, discordant):
    """The smallest difference in accuracy that McNemar's test at 5% detects with 80% power on n rows. `discordant` is the
    share of rows that exactly one of the two models gets right. Returns a share, at most 1.

    Miettinen 1968, Connor 1987 (Biometrics 43, p. 207): n = (z_a sqrt(s) + z_b sqrt(s - d^2))^2 / d^2 with s the
    discordant share, d the difference, z_a = 1.960, z_b = 0.842. This is a quadratic in d, with the solution
    d = sqrt(s) (z_a sqrt(n) + z_b sqrt(n + z_b^2 - z_a^2)) / (n + z_b^2). The difference cannot exceed s. If the solution
    does, s = d is used: all discordant rows favor one model. The formula is for the large-sample test; the exact test in
    compare() detects slightly less.
    """
    z_a, z_b = 1.959964, 0.841621
    root = z_b * max(0.0, n + z_b ** 2 - z_a ** 2) ** 0.5
    difference = discordant ** 0.5 * (z_a * n ** 0.5 + root) / (n + z_b ** 2)
    if 0 < difference <= discordant:
        return difference
    low, high = 0.0, 1.0
    for _ in range(50):                             # s = d: solve n d = (z_a + z_b sqrt(1 - d))^2 by bisection
        middle = (low + high) / 2
        low, high = (low, middle) if n * middle > (z_a + z_b * (1 - middle) ** 0.5) ** 2 else (middle, high)
    return high


def compare(labels, a, b, names=('a', 'b')):
    """Test whether model b beats model a. labels, a, b: (n,) labels and both models' predictions, all ids or all names.

    Returns a dict: n, accuracy_a, accuracy_b, difference (b - a) with its 95% interval difference_low, difference_high;
    only_a, only_b (rows that only this model gets right); p (McNemar's exact test, two-sided: is b's share of the
    only_a + only_b rows one half?); detectable (see detectable()); verdict (a sentence with `names`). Accuracies are shares,
    not percent. The interval resamples rows, drawn as the counts of three kinds of row. ValueError for unequal shapes.
    """
    from scipy.stats import binomtest
    labels, a, b = np.asarray(labels), np.asarray(a), np.asarray(b)
    n = len(labels)
    if not n or not labels.shape == a.shape == b.shape:
        raise ValueError(f'labels {labels.shape}, a {a.shape} and b {b.shape} are empty or not as many')
    right_a, right_b = a == labels, b == labels
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    p = float(binomtest(only_b, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0
    kinds = np.array([only_a, only_b, n - only_a - only_b]) / n
    drawn = np.random.default_rng(SEED).multinomial(n, kinds, DRAWS)
    low, high = np.percentile((drawn[:, 1] - drawn[:, 0]) / n, (2.5, 97.5)).tolist()
    difference, smallest = (only_b - only_a) / n, detectable(n, (only_a + only_b) / n)
    if p < 0.05:
        verdict = (f'{names[1]} is {"better" if difference > 0 else "worse"} than {names[0]} by {abs(difference) * 100:.2f} '
                   f'points (McNemar p = {p:.2g})')
    else:
        verdict = f'the test set is too small to tell: n = {n:,}, differences under {smallest * 100:.2f} points cannot be seen'
    return {'n': n, 'accuracy_a': float(right_a.mean()), 'accuracy_b': float(right_b.mean()), 'difference': difference,
            'difference_low': low, 'difference_high': high, 'only_a': only_a, 'only_b': only_b, 'p': p,
            'detectable': smallest, 'verdict': verdict}


def _keyed_predictions(path):
    """Read a predictions file -> ({(set or '', index): (label, prediction)} in file order, has a column of sets)."""
    unit, places, columns = read_columns(path, ['index', 'label', 'prediction'], optional='set')
    found = {}
    for place, index, label, prediction, *which in zip(places, *columns, strict=True):
        key = (which[0] if which else '', index)
        if key in found:
            raise ValueError(f'{path}, {unit} {place}: {" ".join(["index", index, *which])} is there twice')
        found[key] = label, prediction
    return found, len(columns) > 3


def paired(path_a, path_b):
    """Pair two predictions files of the same rows -> (labels, a, b, sets), lists of str in the order of path_a.

    sets: None without such a column. ValueError if a row is in one file only or its label differs: other test sets."""
    (a, has_sets), (b, _) = _keyed_predictions(path_a), _keyed_predictions(path_b)
    row = lambda key: ' '.join(['index', key[1], *filter(None, key[:1])])
    for one, other, path, other_path in ((a, b, path_a, path_b), (b, a, path_b, path_a)):
        alone = next((key for key in one if key not in other), None)
        if alone:
            raise ValueError(f'{row(alone)} is in {path} but not in {other_path}; both need the same rows to be compared')
    for key, (label, _) in a.items():
        if label != b[key][0]:
            raise ValueError(f'{row(key)} has label {label!r} in {path_a} and {b[key][0]!r} in {path_b}; not the same test set')
    return ([label for label, _ in a.values()], [guess for _, guess in a.values()], [b[key][1] for key in a],
            [which for which, _ in a] if has_sets else None)
