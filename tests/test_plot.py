"""plot.py as a user runs it, on logs written here, whose figures can be worked out by hand."""
import json
import os
import re
import signal
import sys
import time
from itertools import combinations

import pytest
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

import plot
from conftest import ROOT
from report import figure, plot_cls, plot_ptq, plot_runs

MIB = 2 ** 20


@pytest.fixture
def typed(tmp_path, monkeypatch, capsys):
    """typed(words) -> (exit status, stdout, stderr) of `plot.py words` in tmp_path, in this process."""
    monkeypatch.chdir(tmp_path)

    def run(words):
        monkeypatch.setattr(sys, 'argv', ['plot.py', *words.split()])
        try:
            code = plot.main() or 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()
    return run


@pytest.fixture
def shown(monkeypatch):
    """List of the (figure, path) of each picture, which is not written."""
    pictures = []
    monkeypatch.setattr(Figure, 'savefig', lambda fig, path, **options: pictures.append((fig, path)))
    return pictures


def make_run(path, records, config='max_iters = 100\n', tail=''):
    path.mkdir(parents=True)
    (path / 'config.py').write_text(config)
    (path / 'log.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records) + tail)
    return path


def records(last=40, every=10, loss=2.0, bpb_per_nat=0.5, leave_out=()):
    """Training records at 0, every, ..., last: loss + 1 / (step + 1); an evaluation 0.5 above beside each."""
    out = []
    for step in range(0, last + 1, every):
        at, value = dict(step=step, tokens=step * 1000), loss + 1 / (step + 1)
        out.append(at | dict(loss=value, val_loss=None, ms=2000.0, tokens_per_s=500.0, energy_j=None))
        out.append(at | dict(val_loss=value + 0.5, val_bpb=(value + 0.5) * bpb_per_nat))
    return [{k: v for k, v in r.items() if k not in leave_out} for r in out]


def diagnosis(step, flips=(0.002, 0.004), dead=(1, 2), ratios=(1.0, 4.0)):
    """A record of train_bitnet.py with two layers: q as given; down with half of the flips, no dead row, 1/8 of the ratio."""
    kinds = {'q': (1, 1, 1), 'down': (0.5, 0, 0.125)}
    matrices = {f'{layer}.{kind}': dict(minus=0.5, zero=0.2, plus=0.3, flips=flips[layer] and flips[layer] * f, scale=0.1,
                                        dead_rows=dead[layer] * d, scale_ratio=ratios[layer] and ratios[layer] * r)
                for layer in (0, 1) for kind, (f, d, r) in kinds.items()}
    shares = dict(minus=0.3 - step / 1e4, zero=0.4, plus=0.3 + step / 1e4, flips=0.003, dead_rows=7, scale_drift=0.25)
    return dict(step=step, tokens=step * 1000, matrices=matrices) | shares


def screen(run, age=0):
    """What plot.py status shows of a run, `age` seconds after its last record: {name: text}."""
    lines = plot.status_text(str(run), os.path.getmtime(run / 'log.jsonl') + age)[0].splitlines()
    return dict(re.match(r'(\S+(?: \S+)*)\s{2,}(.*)', line).groups() for line in lines)


def texts(shown):
    return [text.get_text() for text in shown]


def legend(fig):
    return texts(fig.legends[0].get_texts())


def curves(ax):
    """{label: its points} of the lines of a panel."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines}


UNITS = r'nats|percent|MiB|MB|milliseconds|share|rows|times|tokens|steps|bits|rank|scale|block|projection'


def check_layout(fig):
    """Legends are beside the axes, panels and texts do not cover each other, all is on the paper; each axis has its unit."""
    fig.draw_without_rendering()
    outer = [thing.get_tightbbox() for thing in (*fig.axes, *fig.legends, *fig.texts)]
    assert all(min(*box.min, *(fig.bbox.max - box.max)) >= 0 for box in outer)
    for ax in fig.axes:
        key, labels = ax.get_legend(), [label for label in (ax.get_xlabel(), ax.get_ylabel()) if label]
        assert key is None or not key.get_tightbbox().overlaps(ax.bbox.padded(-1))
        assert labels and all(re.search(UNITS, label) for label in labels)
    notes = [(ax, text.get_bbox_patch().get_window_extent()) for ax in fig.axes for text in ax.texts if text.get_bbox_patch()]
    assert all(min(*(box.min - ax.bbox.min), *(ax.bbox.max - box.max)) > -2 for ax, box in notes)
    assert not [(a, b) for boxes in (outer, [box for _, box in notes]) for a, b in combinations(boxes, 2) if a.overlaps(b)]


def bands(ax, at):
    """The lowest and highest y of each shaded band of a panel at each x."""
    bands = [band.get_paths()[0].vertices for band in ax.collections if isinstance(band, PolyCollection)]
    return [end(v[v[:, 0] == x, 1]) for v in bands for x in at for end in (min, max)]


# ---- status ----


def test_status_figures_by_hand(tmp_path, typed):
    """Step 40 of 100 at 2 s a step: 60 x 2 s = 2 min left, though compiling made the first step take 90 s."""
    log = records()
    log[0]['ms'] = 90_000.0
    log[3]['val_loss'] = 1.25  # the best evaluation is not the last one
    run = make_run(tmp_path / 'a', log)
    assert screen(run)['checkpoint'] == 'none yet'
    (run / 'last.pt').write_bytes(bytes(1_500_000))
    os.utime(run / 'last.pt', (time.time() - 7500,) * 2)
    code, out, _ = typed('status a')
    for text in ('40 of 100 (40%)', '2.0244 at step 40', 'last 2.5244 at step 40, best 1.2500 at step 10',  # 2 + 1/41
                 '500 tokens/s, 2,000.0 ms/step', '2 min 00 s (', 'running', '1.5 MB, 2 h 05 min ago'):
        assert f' {text}' in out and code == 0


def test_status_reports_a_run_without_new_records(tmp_path, typed):
    """Records 10 steps of 2 s apart are late after five times 20 s: not at 90 s, but at 10 minutes; never at max_iters."""
    going, done = make_run(tmp_path / 'a', records(40)), make_run(tmp_path / 'b', records(100))
    for run, age, state in ((going, 90, 'running, last record 1 min 30 s ago'), (going, 600, 'no new record for 10 min'),
                            (done, 90_000, 'finished, last record 1 d 01 h ago')):
        result = screen(run, age)
        assert result['state'].startswith(state) and ('time left' in result) == (run is going)
    assert typed('status b --watch --interval=60')[0] == 0    # ends at once


def test_diagnostics_do_not_disturb_status(tmp_path):
    """Their records count as steps, but loss, speed, time left and delays are those of training records."""
    log = records()
    assert screen(make_run(tmp_path / 'a', [*log[:-2], diagnosis(39), *log[-2:]]), 90)['state'].startswith('running')
    result = screen(make_run(tmp_path / 'b', [*log, *map(diagnosis, (41, 42, 43))]))
    assert result['step'] == '43 of 100 (43%)' and result['loss'] == '2.0244 at step 40'
    assert result['val loss'].startswith('last 2.5244 at step 40') and result['time left'].startswith('1 min 54 s')
    result = screen(make_run(tmp_path / 'c', [diagnosis(1)]))
    assert result['state'].startswith('running') and 'loss' not in result and result['speed'] == 'not measured yet'


@pytest.mark.parametrize('end', ['finished', 'ctrl-c'])
def test_status_watch_ends(start, tmp_path, end):
    """--watch redraws until the last record arrives, or until Ctrl-C: exit status 0 and no traceback either way. It loads
    neither torch nor matplotlib, so it answers at once on a busy machine."""
    run = make_run(tmp_path / 'a', records())
    words = ['-X', 'importtime', ROOT / 'plot.py', 'status', run, '--watch', '--interval=0.1']
    watch = start(*words, cwd=tmp_path, real=True)
    watch.wait_for('state ', times=2)
    if end == 'finished':
        with open(run / 'log.jsonl', 'a') as f:
            f.write('{"step": 100, "tokens": 100000, "loss": 1.5}\n')
    else:
        watch.signal(signal.SIGINT)
    done = watch.wait()
    loaded = {line.split()[-1] for line in done.err.splitlines()}
    assert done.code == 0 and done.err.count('\n') == done.err.count('import time:')
    assert done.out.startswith('run') and ('finished' in done.out) == (end == 'finished')
    assert 'configurator' in loaded and not {'torch', 'matplotlib', 'numpy'} & loaded


def test_half_written_line_is_no_damage(tmp_path, typed, shown):
    """The line being written is ignored without a word; broken lines in the middle are counted and reported."""
    assert 'log.jsonl' not in screen(make_run(tmp_path / 'a', records(), tail='{"step": 50, "lo'))
    tail = '{"step": 3\n\0\0\0\n[1, 2]\n{"loss": 1.0}\n{"step": 45, "loss": 1.75}\n'
    result = screen(make_run(tmp_path / 'b', records(), tail=tail))
    assert result['log.jsonl'] == '4 damaged line(s) skipped' and result['loss'] == '1.7500 at step 45'
    assert '4 damaged line(s) skipped' in typed('loss b')[1]


def test_config_is_read_not_run(tmp_path):
    """Constants are taken, expressions ignored, nothing is executed; without max_iters there is no time left."""
    config = f'import os\nopen({str(tmp_path / "trap")!r}, "w")\nmax_iters = 200\nmin_lr = max_iters / 10\nbetas = (0.9, -1)\n'
    run = make_run(tmp_path / 'a', records(), config)
    assert figure.load_config(str(run)) == {'max_iters': 200, 'betas': (0.9, -1)} and not (tmp_path / 'trap').exists()
    assert screen(run)['step'] == '40 of 200 (20%)'
    (run / 'config.py').unlink()
    assert screen(run)['step'].startswith('40 (no max_iters') and 'time left' not in screen(run)


# ---- loss ----


def test_smoothing_and_means_by_hand():
    """Mean of three: fewer values at the ends; of four: one before, two after. A seed at step 20 ends the mean there."""
    for n, means in ((1, [1, 2, 3, 7]), (3, [1.5, 2, 4, 5]), (4, [2, 3.25, 4, 5])):
        assert plot_runs.smoothed([(0, 1), (1, 2), (2, 3), (3, 7)], n) == list(enumerate(means))
    assert figure.across_seeds([[(0, 1.0), (20, 2.0), (40, 5.0)], [(0, 3.0), (20, 4.0)], []]) == (
        [0, 20], [2.0, 3.0], [1.0, 2.0], [3.0, 4.0])


def test_seeds_of_a_variant_are_one_line_and_a_band(tmp_path, typed, shown):
    """Training losses of 2, 3 and 7 are a line at 4 in a band from 2 to 7. Their configs differ in seed and paths alone.

    Another variant, the same seed again and runs without a seed are lines of their own, with their raw values behind."""
    for name, loss, config in (('fp_s1', 2, 'seed = 1'), ('fp_s2', 3, 'seed = 2'), ('bin', 1, 'seed = 1\nn_binary = 6'),
                               ('fp_s3', 7, 'seed = 3'), ('again', 5, 'seed = 1'), ('bare', 5, ''), ('bare2', 5, '')):
        make_run(tmp_path / name, records(loss=loss), f'out_dir = {name!r}\n{config}\n')
    assert typed('loss fp_s1 fp_s2 bin fp_s3 again bare bare2 --smooth=1')[0] == 0
    fig, path = shown[0]
    names = [text.partition(':')[0] for text in legend(fig)]
    assert names == ['fp_s1 … fp_s3 (3 seeds)', 'bin', 'again', 'bare', 'bare2'] and path == 'fp_s1/loss.png'
    assert legend(fig)[0].endswith('val 4.524 = 2.262 bits/byte, train 4.024')
    at = [0, 10_000, 20_000, 30_000, 40_000]
    mean = [4 + 1 / (x / 1000 + 1) for x in at]
    assert (at, pytest.approx(mean)) in curves(fig.axes[0]).values()
    assert bands(fig.axes[0], at) == pytest.approx([end for y in mean for end in (y - 2, y + 3)])
    assert 'min to max' in fig.legends[0].get_title().get_text()
    assert sum(line.get_alpha() == 0.25 for line in fig.axes[0].lines) == 4


def test_a_seed_that_ends_early_is_named(tmp_path, typed, shown):
    """The mean of two seeds ends where the shorter one does, and plot.py says so; a folder typed twice is one run."""
    for name, seed, last in (('s1', 1, 40), ('s2', 2, 20)):
        make_run(tmp_path / name, records(last=last), f'seed = {seed}\nwandb_run_name = {name!r}\n')
    assert 's1 … s2: the mean ends at step 20 of 40, with s2' in typed('loss s1 s2 ./s1/')[1]
    assert [text.partition(':')[0] for text in legend(shown[0][0])] == ['s1 … s2 (2 seeds)']


@pytest.mark.parametrize('other, valid, why, x', [
    (dict(), True, '1 nat per token = 0.5000 bits per byte', 'tokens'), (dict(leave_out=['tokens']), True, '', 'step'),
    (dict(bpb_per_nat=0.7), False, 'differ in tokenizer', 'tokens'),
    (dict(leave_out=['val_bpb']), False, 'not every log', 'tokens')])
def test_axes_of_the_loss(other, valid, why, x):
    """2 nats at half a bit per nat read 1 on the right axis; there is none with two ratios, or an unknown one. Tokens are the
    axis when every record of a loss has them, diagnostics aside: 40 steps are 40,000 tokens. The legend has the last values."""
    log = records()
    log[-1] |= dict(val_loss=3.0, val_bpb=1.5)
    without_tokens = {k: v for k, v in diagnosis(5).items() if k != 'tokens'}
    fig, what = plot_runs.draw_loss({'a': [[*log, diagnosis(100), without_tokens]], 'b': [records(**other)]})
    ax, right = fig.axes[0], fig.axes[0].child_axes
    assert len(right) == valid and ('no bits-per-byte axis' in what) != valid and why in what
    assert what.startswith(f'loss against {x},') and ax.dataLim.x1 == (40_000 if x == 'tokens' else 40)
    assert ('per token' if x == 'tokens' else '(nats)') in ax.get_ylabel()
    assert legend(fig)[0] == 'a: val 3.000 = 1.500 bits/byte, best 2.532, train 2.024'  # 2 + 1/31 + 0.5 and 2 + 1/41
    if valid:
        fig.draw_without_rendering()
        assert right[0].get_ylabel().startswith('bits per byte')
        assert right[0].get_ylim() == pytest.approx([0.5 * y for y in ax.get_ylim()])


@pytest.mark.parametrize('spike_at, top', [(0, 2.1), (30, 11)])
def test_first_drop_does_not_flatten_the_rest(spike_at, top):
    """A loss of 11 at step 0 leaves the picture at the top; a spike of 11 late in the run does not. From step 5 on the
    losses are 2.005 to 2.1 or to the spike, and the axis ends a twentieth of that beyond."""
    log = [dict(step=s, tokens=s, loss=11.0 if s == spike_at else 2 + s / 1000) for s in range(101)]
    pad = 0.05 * (top - 2.005)
    assert plot_runs.draw_loss({'a': [log]}, 1)[0].axes[0].get_ylim() == pytest.approx((2.005 - pad, top + pad))


# ---- diagnostics ----


def test_diagnostics_by_hand(tmp_path, typed, shown):
    """Flips of 0.002 and 0.004 are 0.003 in the mean, 1 and 2 dead rows 3; scales of 1 and 4 times their start are 2 times
    it, in a band from 1 to 4. down has half of the flips, no dead row, an eighth of the scales."""
    log = [*records(), diagnosis(100), diagnosis(200, flips=(0.01, 0.03), dead=(0, 5), ratios=(2.0, 8.0))]
    make_run(tmp_path / 'a', log)
    what, fig = typed('diagnostics a')[1], shown[0][0]
    at = [100_000, 200_000]
    shares, flips, dead, scale = map(curves, fig.axes)
    assert shares == {'−1': (at, pytest.approx([0.29, 0.28])), '0': (at, [0.4, 0.4]), '+1': (at, pytest.approx([0.31, 0.32]))}
    assert flips == {'q': (at, pytest.approx([0.003, 0.02])), 'down': (at, pytest.approx([0.0015, 0.01]))}
    assert dead == {'q': (at, [3, 5]), 'down': (at, [0, 0])}
    assert scale == {'q': (at, pytest.approx([2, 4])), 'down': (at, pytest.approx([0.25, 0.5]))}
    assert bands(fig.axes[3], at) == [1, 4, 2, 8, 0.125, 0.5, 0.25, 1]
    assert legend(fig) == ['q', 'down'] and texts(fig.axes[0].get_legend().get_texts()) == ['−1', '0', '+1']
    assert fig.get_suptitle() == '4 ternary matrices of a' and what.endswith('tokens, 4 ternary matrices of a\n')
    check_layout(fig)


@pytest.mark.parametrize('more, heights, scale', [
    ([(0.0, 0.0), (2e-6, 4e-6)], [0, 3e-6], 'symlog'), ([(0.004, 0.008)], [0.006], 'log'), ([(None, None)], [], 'log')])
def test_flips_of_zero(more, heights, scale):
    """The axis is logarithmic. A zero is drawn at its foot, with a label; null is not drawn."""
    log = [diagnosis(step, flips=flips) for step, flips in enumerate([*more, (0.002, 0.004)], 1)]
    fig, _ = plot_runs.draw_diagnostics({'a': [log]})
    ax = fig.axes[1]
    assert curves(ax)['q'] == ([1000 * r['step'] for r in log[-len(heights) - 1:]], pytest.approx([*heights, 0.003]))
    low, high = ax.get_ylim()
    assert ax.get_yscale() == scale and 0.003 < high < 0.01 + max(heights, default=0)
    if scale == 'symlog':  # the smallest is half of 3e-6, of down
        assert [tick for tick in ax.get_yticks() if low <= tick <= high] == pytest.approx([0, 1e-6, 1e-5, 1e-4, 1e-3])
        foot, *decades = ax.transData.transform([(0, y) for y in (0, 1e-6, 1e-5, 1e-4)])[:, 1]
        assert -1e-6 < low < 0 and decades[0] - foot == pytest.approx(decades[2] - decades[1], rel=0.2)
    else:
        assert 0 < low < 0.0015
    # All flips and dead rows 0: lines at 0, in whole rows. A matrix of zeros has scale 0, not an error.
    log = [diagnosis(s, flips=(0, 0), dead=(0, 0), ratios=(0.0, 4.0)) for s in (1, 2)]
    fig, _ = plot_runs.draw_diagnostics({'a': [log]})
    assert [curves(ax)['q'][1] for ax in fig.axes[1:]] == [[0, 0], [0, 0], [0, 0]]
    assert [tick for tick in fig.axes[2].get_yticks() if 0 <= tick <= 1] == [0, 1]


def test_diagnostics_of_several_runs():
    """A line for each variant, of overall figures, with a band over its seeds; against steps where a run has no tokens."""
    a = [diagnosis(100), diagnosis(200) | dict(zero=0.5, flips=0.001, dead_rows=9, scale_drift=0.5)]
    a[0].pop('tokens')
    fig, what = plot_runs.draw_diagnostics({'a': [a], 'b': [[diagnosis(100) | dict(zero=zero)] for zero in (0.1, 0.3)]})
    assert [curves(ax) for ax in fig.axes] == [
        {'a': ([100, 200], first), 'b': ([100], second)} for first, second in (
            ([0.4, 0.5], [0.2]), ([0.003, 0.001], [0.003]), ([7, 9], [7]), ([0.25, 0.5], [0.25]))]
    assert bands(fig.axes[0], [100]) == [0.1, 0.3] and 'min to max' in fig.get_suptitle()
    assert legend(fig) == ['a', 'b'] and what.endswith('against step, 3 runs')


def test_equal_lines_are_told_apart_in_grey():
    """Lines of seven kinds of matrix that are equal have markers of their own shape; with room, each in its own place."""
    for steps in (20, 64):
        log = [diagnosis(s) for s in range(steps)]
        for record in log:
            record['matrices'] = {f'0.{kind}': record['matrices']['0.q'] for kind in ('q', 'k', 'v', 'o', 'gate', 'up', 'down')}
        lines = plot_runs.draw_diagnostics({'a': [log]})[0].axes[1].lines
        places = [set(range(steps)[line.get_markevery()[0]::line.get_markevery()[1]]) for line in lines]
        assert len({line.get_marker() for line in lines}) == 7 and not places[0] & places[1]
    assert not any(a & b for a, b in combinations(places, 2))


def test_bars_by_hand(tmp_path, typed, shown):
    """A bar for each row of bench.py, as long as its number in its unit, a panel for each size."""
    rows = [{'bench': 'layers', 'name': n, 'tokens': t, 'in': 4, 'out': 4, 'forward_ms': t * len(n)}
            for t in (1, 8) for n in ('a', 'bb')]
    (tmp_path / 'rows.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    assert typed('bars rows.jsonl')[1] == 'rows.png: forward_ms of 4 of 4 rows\n'
    one, eight = shown[0][0].axes
    assert (one.get_title(), eight.get_title()) == ('1 tokens × 4 → 4', '8 tokens × 4 → 4')
    assert [[bar.get_width() for bar in ax.patches] for ax in (one, eight)] == [[1, 2], [8, 16]]
    assert texts(one.get_yticklabels()) == ['a', 'bb'] and one.get_xlabel() == 'milliseconds'
    check_layout(one.figure)


# ---- ranks, memory, optimizer, pareto ----


def tuned(path, method='rsvd', rank=4, seed=42, files=(), eval_loss=None, **results):
    """A run folder of finetune_cls.py. Eval loss 1/rank, 0.5 for full; 8 + rank MiB of optimizer of 100 + rank in all."""
    size = 0 if method == 'full' else rank
    results = dict(accuracy=0.9, accuracy_low=0.88, accuracy_high=0.93, peak_bytes=(100 + size) * MIB, method=method, rank=rank,
                   seed=seed, task='sst2', model='tiny') | results
    parts = dict(parameters=40, buffers=0, gradients=30, optimizer=8 + size, rest=22, peak=100 + size)
    eval_loss = eval_loss or 1 / (size or 2)
    path.mkdir(parents=True)
    for name, text in ({
            'config.py': f'method = {method!r}\nrank = {rank}\n', 'results.yaml': json.dumps(results),
            'epoch_loss.csv': f'epoch,train_loss,eval_loss\n0,,9\n1,{eval_loss / 2},{eval_loss}\n',
            'memory_breakdown.csv': 'part,bytes\n' + ''.join(f'{part},{n * MIB}\n' for part, n in parts.items()),
            'optimizer_memory.csv': f'bytes,adam_bytes\n{(8 + size) * MIB},{80 * MIB}\n'} | dict(files)).items():
        (path / name).write_text(text)
    return path


@pytest.fixture
def sweep(tmp_path):
    """Folders at two depths: full; lora at rank 4; rsvd at 16 and 4, its rank 4 with the seeds 42 and 43."""
    tuned(tmp_path / 'full', 'full', rank=16, accuracy=0.91)
    tuned(tmp_path / 'lora' / 'r4', 'lora')
    tuned(tmp_path / 'rsvd' / 'r16', rank=16, accuracy=0.92)
    tuned(tmp_path / 'rsvd' / 'r4' / 'a', eval_loss=0.2, accuracy=0.89)
    tuned(tmp_path / 'rsvd' / 'r4' / 'b', eval_loss=0.4, accuracy=0.93, seed=43)
    return tmp_path


def draw(name, folder):
    return getattr(plot_cls, f'draw_{name}')(plot_cls.load_runs([str(folder)]))


def drawn(bars):
    """Container of errorbar -> (x, y, half lengths of the bars, 0 without one)."""
    line, _, (bars,) = bars.lines
    return *map(list, line.get_data()), [(ends[1][1] - ends[0][1]) / 2 if len(ends) else 0 for ends in bars.get_segments()]


def test_runs_are_found_and_ordered(sweep):
    """At any depth under a folder, each once; full first and without rank, though its config holds one; then by number."""
    runs = plot_cls.load_runs(list(map(str, (sweep / 'rsvd', sweep, sweep / 'full'))))
    assert [(r['method'], r['rank'], r['seed'], os.path.relpath(r['run'], sweep)) for r in runs] == [
        ('full', None, '42', 'full'), ('lora', 4, '42', 'lora/r4'), ('rsvd', 4, '42', 'rsvd/r4/a'),
        ('rsvd', 4, '43', 'rsvd/r4/b'), ('rsvd', 16, '42', 'rsvd/r16')]


def test_ranks_by_hand(sweep):
    """Mean and sd of the last epoch's losses over two seeds: 0.2 and 0.4 give 0.3 and 0.2 / sqrt(2); training is half."""
    fig, what = draw('ranks', sweep)
    ax, sd = fig.axes[0], 0.02 ** 0.5
    lora, rsvd, _, train = [drawn(bars) for bars in ax.containers]
    assert lora == ([4], [0.25], [0]) and rsvd == ([4, 16], pytest.approx([0.3, 1 / 16]), pytest.approx([sd, 0]))
    assert train[1] == pytest.approx([0.15, 1 / 32])
    assert [bars.lines[0].get_linestyle() for bars in ax.containers] == ['-', '-', '--', '--']
    levels = {line.get_ydata()[0]: line.get_linestyle() for line in ax.lines if list(line.get_xdata()) == [0, 1]}
    assert levels == {0.5: '-', 0.25: '--'} and texts(ax.get_xticklabels()) == ['4', '16'] and ax.get_xscale() == 'log'
    assert legend(fig) == ['full', 'lora', 'rsvd', 'evaluation', 'training'] and ax.get_title() == 'sst2, tiny'
    assert what.endswith('5 runs of sst2, tiny; mean and sd across seeds in 1 of 4 points (rsvd)')
    check_layout(fig)
    tuned(sweep / 'full2', 'full', seed=43, eval_loss=0.5 + 2 * sd)     # a method without rank: a band of one sd to either side
    ax = draw('ranks', sweep)[0].axes[0]
    band = ax.patches[0].get_extents().transformed(ax.transData.inverted())
    assert (band.y0, band.y1) == pytest.approx((0.5 + sd - 2 ** 0.5 * sd, 0.5 + sd + 2 ** 0.5 * sd))


def test_folds_are_repeats(tmp_path):
    """Two folds of one seed, told apart by config.py: one point of two runs."""
    for fold in (0, 1):
        tuned(tmp_path / f'fold{fold}', eval_loss=0.2 + 0.2 * fold, files={'config.py': f'fold = {fold}\n'})
    fig, what = draw('ranks', tmp_path)
    assert drawn(fig.axes[0].containers[0])[1] == pytest.approx([0.3])
    assert what.endswith('mean and sd across folds in 1 of 1 points (rsvd)')
    labels = texts(draw('memory', tmp_path)[0].axes[0].get_yticklabels())
    assert labels == ['rsvd, rank 4, seed 42, fold 0', 'rsvd, rank 4, seed 42, fold 1']


def test_memory_by_hand(sweep, monkeypatch):
    """The parts end to end, the peak as text. Labels of equal runs get the seed, then the fold, then the folder."""
    tuned(sweep / 'again', 'full')
    monkeypatch.chdir(sweep)                        # the labels have the folder, as it was typed
    fig, what = draw('memory', '.')
    ax = fig.axes[0]
    again, full, *labels = texts(ax.get_yticklabels())
    assert {again, full} == {f"full, seed 42, fold -1, ./{name}" for name in ('again', 'full')}
    assert labels == ['lora, rank 4', 'rsvd, rank 4, seed 42', 'rsvd, rank 4, seed 43', 'rsvd, rank 16']
    assert legend(fig) == ['parameters', 'gradients', 'optimizer state', 'activations and temporaries']
    assert [(bars[-1].get_x(), bars[-1].get_width()) for bars in ax.containers] == [(0, 40), (40, 30), (70, 24), (94, 22)]
    assert texts(ax.texts) == ['100', '100', '104', '104', '104', '116'] and what.endswith('6 runs of sst2, tiny')
    breakdown = 'part,bytes\nparameters,4\nbuffers,1\ngradients,4\noptimizer,8\nrest,3\npeak,20\n'
    tuned(sweep / 'buffered', rank=64, files={'memory_breakdown.csv': breakdown})
    fig, _ = draw('memory', '.')
    assert 'buffers' in legend(fig)
    check_layout(fig)


def test_optimizer_by_hand(sweep):
    """8 + rank MiB against rank on a log axis, and one line for AdamW's 80 MiB; a range where adapters add to the model."""
    fig, _ = draw('optimizer', sweep)
    ax = fig.axes[0]
    assert [drawn(bars)[:2] for bars in ax.containers] == [([4], [12]), ([4, 16], [12, 24])]
    assert [line.get_ydata()[0] for line in ax.lines if list(line.get_xdata()) == [0, 1]] == [8, 80]
    assert ax.get_yscale() == 'log' and legend(fig) == ['full', 'lora', 'rsvd', 'AdamW, all parameters:\n80 MiB']
    tuned(sweep / 'larger', 'lora', 64, files={'optimizer_memory.csv': f'bytes,adam_bytes\n{MIB},{100 * MIB}\n'})
    fig, _ = draw('optimizer', sweep)
    assert legend(fig)[-1].endswith('80 to 100 MiB')
    check_layout(fig)


def test_pareto_by_hand(sweep):
    """95% intervals of single runs, mean and sd of seeds; on the front no smaller run is as accurate."""
    fig, what = draw('pareto', sweep)
    ax, sd = fig.axes[0], 0.04 / 2 ** 0.5
    points = {(bars.get_label(), *drawn(bars)[0]): (drawn(bars)[1][0], *bars.lines[2][0].get_segments()[0][:, 1])
              for bars in ax.containers}
    assert list(points) == [('full', 100), ('lora', 104), ('rsvd', 104), ('_', 116)]
    assert points['lora', 104] == pytest.approx((0.9, 0.88, 0.93))
    assert points['rsvd', 104] == pytest.approx((0.91, 0.91 - sd, 0.91 + sd))
    assert texts(ax.texts) == ['', '4', '4 (n=2)', '16'] and legend(fig)[1:] == ['full', 'lora', 'rsvd']
    assert 'n runs: mean and sd' in fig.legends[0].get_title().get_text() and '1 of 4 points (rsvd)' in what
    tuned(sweep / 'as large', 'lora', rank=16, accuracy=0.915)  # more than full at 100 MiB, less than rsvd at the same 116
    for axes in (ax, draw('pareto', sweep)[0].axes[0]):
        assert curves(axes)['Pareto front'] == ([100, 116], [0.91, 0.92])


# ---- ptq.py ----


def test_schemes_in_one_place_are_told_apart(tmp_path, shown):
    """Schemes of one size and loss have hollow markers of their own shape, and each scheme has its name, in one panel.

    Many of nearly one size have a second panel. A rise below 0.0001 is drawn there, with a tick that says so."""
    schemes = [dict(scheme=name, file_bytes=size * 1e6, delta=delta, loss=3.8) for name, size, delta in (
        ('fp', 24, None), ('half', 14, -1e-7), ('gptq4', 7.14, 0.0015), ('fit4', 7.14, 0.0015), ('nf4', 7.14, 0.0015),
        ('nf4dq', 7.12, 0.0023), ('rtn4', 7.14, 0.0033), ('uniform32', 7.3, 0.003), ('rtn2', 6, 0.14))]
    for rows in (schemes, schemes[:4], schemes[:1]):
        plot_ptq.sizes(tmp_path / 'a.png', rows, 'a.pt', 'nats per token')
    fig = shown[0][0]
    assert [len(fig.axes) for fig, _ in shown] == [2, 1, 1] and '3.8000' in fig.get_suptitle()
    three = [line for line in fig.axes[1].lines if line.get_xydata().tolist() == [[7.14, 0.0015]]]
    assert len({line.get_marker() for line in three}) == 3 and {line.get_markerfacecolor() for line in three} == {'none'}
    assert sorted(texts([*fig.axes[0].texts, *fig.axes[1].texts])) == sorted(r['scheme'] for r in schemes[1:])
    ticks = fig.axes[0].yaxis.get_major_formatter()
    assert ([14], [1e-4]) in curves(fig.axes[0]).values() and (ticks(1e-4, 0), ticks(0.01, 0)) == ('≤ 0.0001', '0.01')
    check_layout(fig)


def test_pruning_by_hand(tmp_path, shown):
    """The rise over the model without zeros, before and after retraining, if there was any. Equal points differ in shape."""
    for updates in (200, 0):
        plot_ptq.shares(tmp_path / 'a.png', [
            dict(method=method, zeros=zeros, loss=3.8 + zeros / 9, pruned_loss=3.9 + zeros / 8, retrain_iters=updates)
            for method, zeros in (('none', 0.0), ('wanda', 0.25), ('global', 0.25), ('global', 0.5))], 'a.pt')
    both, alone = (fig.axes for fig, _ in shown)
    assert [curves(ax)['global'] for ax in both] == [([0.25, 0.5], pytest.approx([1 / (2 * n), 1 / n])) for n in (16, 18)]
    assert len(alone) == 1 and '200' in both[1].get_title() and len({line.get_marker() for line in both[1].lines}) == 2
    check_layout(both[0].figure)


def test_heat_map_by_hand(tmp_path, shown):
    """A cell for each block and kind, with its number; the scale ends at the largest single cell, which sums exceed."""
    cells = {(block, kind): rise for block, rise in (('b.0', 0.1), ('b.1', 0.3), ('all', 0.5)) for kind in ('q', 'all')}
    plot_ptq.heat(tmp_path / 'a.png', ['b.0', 'b.1'], ['q'], cells, 'a.pt')
    ax = shown[0][0].axes[0]
    assert ax.images[0].get_array().tolist() == [[0.1, 0.1], [0.3, 0.3], [0.5, 0.5]] and ax.images[0].get_clim() == (0, 0.3)
    assert texts(ax.texts) == ['+0.100'] * 2 + ['+0.300'] * 2 + ['+0.500'] * 2
    assert texts(ax.get_yticklabels()) == ['0', '1', 'all']
    check_layout(ax.figure)


# ---- all pictures ----


def test_nothing_overlaps_in_crowded_pictures(tmp_path):
    """Nine variants with long names; twelve runs of three methods, three each in the very same place."""
    for i in range(12):
        tuned(tmp_path / str(i), 'abc'[i % 3], 2 ** (i // 3), accuracy=0.9 + i // 3 * 0.002, peak_bytes=(100 + i // 3) * MIB)
    codes = [[diagnosis(step) for step in range(100, 1100, 100)]]
    losses = {f'a long name of a run, number {i}': [records(loss=i), records(loss=i + 1)] for i in range(9)}
    for fig, _ in (plot_runs.draw_loss(losses), plot_runs.draw_diagnostics({str(i) * 30: codes for i in range(9)}),
                   draw('pareto', tmp_path)):
        check_layout(fig)


@pytest.mark.parametrize('words, file', [('loss a --out=x.pdf', 'x.pdf'), ('memory b c', 'b/memory.png')])
def test_pictures_are_written(tmp_path, typed, words, file):
    """Into the first folder typed or to --out, whose ending is the format; the printed line names the file."""
    make_run(tmp_path / 'a', records())
    tuned(tmp_path / 'b')
    tuned(tmp_path / 'c', 'full')
    assert typed(words)[1].startswith(f'{file}: ')
    assert (tmp_path / file).read_bytes().startswith(b'%PDF' if file.endswith('pdf') else b'\x89PNG\r\n\x1a\n')


# ---- mistakes ----


def mistake(result, text):
    """Exit status 2 and one line: what is wrong; what to type."""
    code, out, err = result
    assert (code, out) == (2, '') and re.fullmatch(r'error: [^\n]+; [^\n]*\b(type|wait|restore)\b[^\n]*\n', err), err
    assert text in err


def test_mistakes_are_one_line(tmp_path, typed):
    """A folder, file, figure or argument that is missing or wrong."""
    make_run(tmp_path / 'ok', records())
    make_run(tmp_path / 'bit', [diagnosis(100)])
    make_run(tmp_path / 'fp', [dict(step=100, matrices={}), dict(step=200, matrices=3)])
    make_run(tmp_path / 'empty', [], tail='{"step": 1, "lo')
    make_run(tmp_path / 'lossless', [dict(step=1, loss=None)])
    make_run(tmp_path / 'badconfig', records(), config='max_iters = = 3\n')
    (tmp_path / 'nolog').mkdir()
    (tmp_path / 'rows.jsonl').write_text('{"bench": "fit", "loss": 1, "ms": null}\n')
    tuned(tmp_path / 'full', 'full')
    (tuned(tmp_path / 'bare') / 'epoch_loss.csv').unlink()
    (tmp_path / 'sub' / 'deep').mkdir(parents=True)
    for words, text in (
            ('loss ok nowhere', 'nowhere is not a folder'), ('status nolog', 'holds no log.jsonl'),
            ('loss empty', 'holds no record'), ('loss lossless', 'neither loss nor val_loss'),
            ('status badconfig', 'is not Python'), ('loss ok --out=no/a.png', 'cannot write'),
            ('loss ok --out=a.doc', 'cannot write'), ('loss ok --smooth=-1', '--smooth=-1'),
            ('status ok --watch --interval=0', '=0'), ('bars ok/log.jsonl', 'no rows'), ('bars empty/log.jsonl', 'cannot read'),
            ('diagnostics bit fp', 'fp/log.jsonl has no figures of ternary matrices'), ('bars rows.jsonl --value=x', 'loss'),
            ('bars rows.jsonl --value=ms', 'loss'), ('diagnostics', 'RUN'), ('', 'command'),
            ('memory sub', 'no results.yaml in or under sub'), ('ranks full', 'none of these runs has a rank'),
            ('ranks bare', 'cannot read bare/epoch_loss.csv'), ('ranks nowhere', 'nowhere is not a folder')):
        mistake(typed(words), text)


def test_mistakes_in_runs_are_one_line(tmp_path, typed):
    """Two runs, the second wrong or not comparable with the first."""
    tuned(tmp_path / 'z', rank=4)
    epochs, parameters = 'epoch,train_loss,eval_loss\n', 'part,bytes\nparameters,4\n'
    parts = f'{parameters}buffers,0\ngradients,4\noptimizer,8\npeak,10\nrest,'
    for i, (name, other, text) in enumerate([
            ('ranks', dict(task='cola'), 'two tasks in one picture, cola ('),
            ('ranks', dict(), 'one method, rank, seed and fold'),
            ('pareto', dict(model='bert'), 'two models in one picture, bert ('), ('optimizer', dict(seed=None), 'has no seed'),
            ('optimizer', dict(rank=2.5), 'rank is 2.5'), ('pareto', dict(rank=8, peak_bytes=None), 'peak_bytes is None'),
            ('ranks', {'epoch_loss.csv': epochs}, 'no row'),
            ('ranks', {'epoch_loss.csv': epochs + '1,0.5,1.2.3\n'}, "eval_loss is '1.2.3'"),
            ('ranks', {'epoch_loss.csv': epochs + '1,nan,1.2\n'}, "train_loss is 'nan'"),
            ('memory', {'memory_breakdown.csv': parts + '-6\n'}, 'add up'),
            ('memory', {'memory_breakdown.csv': parts + '6\n'}, 'add up'),
            ('memory', {'memory_breakdown.csv': parameters}, 'buffers is None'),
            ('optimizer', {'optimizer_memory.csv': 'bytes,adam_bytes\n0,8\n'}, '/optimizer_memory.csv has 0'),
            ('optimizer', {'results.yaml': '- 1\n'}, 'no row or mapping'),
            ('pareto', {'results.yaml': 'a: [\n'}, 'cannot read')]):
        tuned(tmp_path / str(i), **({'seed': 1, 'files': other} if any('.' in key for key in other) else other))
        mistake(typed(f'{name} {i} z'), text)
