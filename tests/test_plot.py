"""plot.py as a user runs it: command lines on logs written here, whose figures can be worked out by hand."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

import plot
from report import figure, plot_cls, plot_runs

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def command(*args):
    return [sys.executable, os.path.join(ROOT, 'plot.py'), *map(str, args)]


def run_plot(*args):
    result = subprocess.run(command(*args), capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


def make_run(path, records, config='max_iters = 100\n', tail=''):
    path.mkdir(parents=True)
    (path / 'config.py').write_text(config)
    (path / 'log.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records) + tail)
    return path


def records(last=40, every=10, loss=2.0, bpb_per_nat=0.5, tokens_per_step=1000):
    """Training records at 0, every, ..., last: loss + 1 / (step + 1); an evaluation 0.5 above beside each."""
    out = []
    for step in range(0, last + 1, every):
        at = dict(step=step, tokens=step * tokens_per_step)
        value = loss + 1 / (step + 1)
        out.append(at | dict(loss=value, val_loss=None, ms=2000.0, tokens_per_s=500.0, energy_j=None))
        out.append(at | dict(val_loss=value + 0.5, val_bpb=(value + 0.5) * bpb_per_nat))
    return out


def diagnosis(step, flips=(0.002, 0.004), dead=(1, 2), ratios=(1.0, 4.0)):
    """A record of train_bitnet.py with two layers: q as given; down with half of the flips, no dead row, 1/8 of the ratio."""
    kinds = {'q': (1, 1, 1), 'down': (0.5, 0, 0.125)}
    matrices = {f'{layer}.{kind}': dict(minus=0.5, zero=0.2, plus=0.3, flips=flips[layer] and flips[layer] * f, scale=0.1,
                                        dead_rows=dead[layer] * d, scale_ratio=ratios[layer] and ratios[layer] * r)
                for layer in (0, 1) for kind, (f, d, r) in kinds.items()}
    shares = dict(minus=0.3 - step / 1e4, zero=0.4, plus=0.3 + step / 1e4, flips=0.003, dead_rows=7, scale_drift=0.25)
    return dict(step=step, tokens=step * 1000, **shares, matrices=matrices)


def fields(text):
    """Screen of plot.py status -> {name: text}."""
    return dict(re.match(r'(\S+(?: \S+)*)\s{2,}(.*)', line).groups() for line in text.splitlines())


# -----------------------------------------------------------------------------
# status


def test_status_figures_by_hand(tmp_path):
    """Step 40 of 100 at 2 s a step: 60 x 2 s = 2 min left, though compiling made the first step take 90 s."""
    log = records()
    log[0]['ms'] = 90_000.0
    log[3]['val_loss'] = 1.25  # the best evaluation is not the last one
    run = make_run(tmp_path / 'a', log)
    (run / 'last.pt').write_bytes(bytes(1_500_000))
    os.utime(run / 'last.pt', (time.time() - 7500,) * 2)
    screen = fields(run_plot('status', run))
    assert screen['step'] == '40 of 100 (40%)'
    assert screen['loss'] == '2.0244 at step 40'  # 2 + 1/41
    assert screen['val loss'] == 'last 2.5244 at step 40, best 1.2500 at step 10'
    assert screen['speed'] == '500 tokens/s, 2,000.0 ms/step'
    assert screen['time left'].startswith('2 min 00 s')
    assert screen['state'].startswith('running')
    assert screen['last.pt'] == '1.5 MB, 2 h 05 min ago'


def test_status_says_when_nothing_comes(tmp_path):
    """Records 10 steps of 2 s apart are late after five times 20 s: not at 90 s, but at 10 minutes."""
    run = make_run(tmp_path / 'a', records())
    for age, said in ((90, 'running, last record 1 min 30 s ago'), (600, 'no new record for 10 min')):
        os.utime(run / 'log.jsonl', (time.time() - age,) * 2)
        text, finished = plot.status_text(str(run), time.time())
        assert fields(text)['state'].startswith(said) and not finished
    assert fields(text)['checkpoint'] == 'none yet'


def test_status_is_of_training_records(tmp_path):
    """Records of diagnostics count as steps, not as training: loss, speed and time left are those of training records, and
    one at step 39, a step before the last of these, makes nothing late: 90 s are still within five times 10 steps of 2 s."""
    log = records()
    run = make_run(tmp_path / 'a', [*log[:-2], diagnosis(39), *log[-2:]])
    os.utime(run / 'log.jsonl', (time.time() - 90,) * 2)
    assert fields(plot.status_text(str(run), time.time())[0])['state'] == 'running, last record 1 min 30 s ago'
    screen = fields(run_plot('status', make_run(tmp_path / 'b', [*log, *map(diagnosis, (41, 42, 43))])))
    assert screen['step'] == '43 of 100 (43%)' and screen['loss'] == '2.0244 at step 40'
    assert screen['val loss'].startswith('last 2.5244 at step 40')
    assert screen['speed'] == '500 tokens/s, 2,000.0 ms/step' and screen['time left'].startswith('1 min 54 s')
    screen = fields(run_plot('status', make_run(tmp_path / 'c', [diagnosis(1)])))
    assert screen['state'].startswith('running') and 'loss' not in screen and screen['speed'] == 'not measured yet'


def test_status_finished(tmp_path):
    """At max_iters a run is finished, however old its log: no time left, and --watch ends at once."""
    run = make_run(tmp_path / 'a', records(last=100))
    os.utime(run / 'log.jsonl', (0, 0))
    screen = fields(run_plot('status', run, '--watch', '--interval=60'))
    assert screen['state'].startswith('finished') and 'time left' not in screen
    assert screen['step'] == '100 of 100 (100%)'


@pytest.mark.parametrize('end', ['finished', 'ctrl-c'])
def test_status_watch_ends(tmp_path, end):
    """--watch redraws until the last record arrives, or until Ctrl-C: exit status 0 and no traceback either way."""
    run = make_run(tmp_path / 'a', records())
    watch = subprocess.Popen(command('status', run, '--watch', '--interval=0.1'), stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
    try:
        assert watch.stdout.readline().startswith('run')
        if end == 'finished':
            with open(run / 'log.jsonl', 'a') as f:
                f.write('{"step": 100, "tokens": 100000, "loss": 1.5}\n')
        else:
            watch.send_signal(signal.SIGINT)
        out, err = watch.communicate(timeout=30)
    finally:
        watch.kill()
    assert (watch.returncode, err) == (0, '')
    assert ('finished' in out) == (end == 'finished')


def test_half_written_line_is_no_damage(tmp_path):
    """The line being written is ignored without a word; broken lines in the middle are counted and said."""
    log = records()
    run = make_run(tmp_path / 'a', log, tail='{"step": 50, "lo')
    assert 'damaged' not in run_plot('status', run)
    broken = '{"step": 3\n\0\0\0\n[1, 2]\n{"loss": 1.0}\n{"step": 45, "loss": 1.75}\n'
    run = make_run(tmp_path / 'b', log, tail=broken)
    screen = fields(run_plot('status', run))
    assert screen['log.jsonl'] == '4 damaged line(s) skipped'
    assert screen['loss'] == '1.7500 at step 45'
    assert '4 damaged line(s) skipped' in run_plot('loss', run)


def test_config_is_read_not_run(tmp_path):
    """Constants are taken, expressions left alone, nothing executed; without max_iters no time is promised."""
    trap = tmp_path / 'trap'
    config = f'import os\nopen({str(trap)!r}, "w")\nmax_iters = 200\nmin_lr = max_iters / 10\nbetas = (0.9, -1)\n'
    run = make_run(tmp_path / 'a', records(), config)
    assert figure.load_config(str(run)) == {'max_iters': 200, 'betas': (0.9, -1)}
    assert fields(run_plot('status', run))['step'] == '40 of 200 (20%)'
    assert not trap.exists()
    (run / 'config.py').unlink()
    screen = fields(run_plot('status', run))
    assert screen['step'].startswith('40 (no max_iters') and 'time left' not in screen


# -----------------------------------------------------------------------------
# loss


def rgb_share(image, color):
    """Share of the pixels that have exactly this #rrggbb."""
    target = [int(color[i:i + 2], 16) for i in (1, 3, 5)]
    return ((image[..., :3] * 255).round() == target).all(-1).mean()


def test_loss_picture(tmp_path):
    """Two runs give one 1200 x 750 PNG in the first folder that shows both colours and is mostly paper."""
    import matplotlib.image
    a, b = make_run(tmp_path / 'a', records()), make_run(tmp_path / 'b', records(loss=3.0))
    assert '1 nat per token = 0.5000 bits per byte' in run_plot('loss', a, b)
    assert not (b / 'loss.png').exists()
    assert (a / 'loss.png').read_bytes().startswith(b'\x89PNG\r\n\x1a\n')
    image = matplotlib.image.imread(a / 'loss.png')
    assert image.shape[:2] == (750, 1200)
    assert 0.7 < rgb_share(image, '#ffffff') < 0.99
    assert min(rgb_share(image, color) for color in figure.COLORS[:2]) > 5e-4
    assert rgb_share(image, figure.COLORS[2]) == 0
    run_plot('loss', b, f'--out={tmp_path}/only b.png', '--smooth=1')
    assert rgb_share(matplotlib.image.imread(tmp_path / 'only b.png'), figure.COLORS[0]) > 5e-4


def test_smoothing_by_hand():
    """Mean of three: the ends have two neighbours' worth; of four: one before, two after."""
    assert plot_runs.smoothed([1, 2, 3, 7], 1) == [1, 2, 3, 7]
    assert plot_runs.smoothed([1, 2, 3, 7], 3) == [1.5, 2, 4, 5]
    assert plot_runs.smoothed([1, 2, 3, 7], 4) == [2, 3.25, 4, 5]


def test_legend_names_final_values():
    """The legend carries the last validation loss, its bits per byte, the best one where better, and the last mean."""
    log = records()
    log[-1] |= dict(val_loss=3.0, val_bpb=1.5)
    fig, _ = plot_runs.draw_loss({'a': log})
    (label,) = [text.get_text() for text in fig.axes[0].get_legend().get_texts()]
    assert label == 'a: val 3.000 = 1.500 bits/byte, best 2.532, train 2.024'  # 2 + 1/31 + 0.5 and 2 + 1/41


@pytest.mark.parametrize('other, valid', [(0.5, True), (0.7, False), (None, False)])
def test_bits_per_byte_axis_needs_one_tokenizer(other, valid):
    """2 nats at half a byte-bit per nat read 1 on the right axis; there is none with two ratios, or an unknown one."""
    log = records(bpb_per_nat=other or 1)
    if other is None:
        log = [{k: v for k, v in r.items() if k != 'val_bpb'} for r in log]
    fig, what = plot_runs.draw_loss({'a': records(), 'b': log})
    right = fig.axes[0].child_axes
    assert len(right) == valid and ('no bits-per-byte axis' in what) != valid
    if valid:
        fig.canvas.draw()
        assert right[0].get_ylabel().startswith('bits per byte')
        assert right[0].get_ylim() == pytest.approx([0.5 * y for y in fig.axes[0].get_ylim()])


def test_tokens_or_steps():
    """Tokens are the axis when every record has them (40 steps are 40,000 tokens), steps otherwise."""
    fig, what = plot_runs.draw_loss({'a': records()})
    assert fig.axes[0].dataLim.x1 == 40_000 and what.startswith('loss against tokens')
    assert fig.axes[0].get_ylabel() == 'loss (nats per token)'
    images = [{k: v for k, v in r.items() if k != 'tokens'} for r in records()]
    fig, what = plot_runs.draw_loss({'a': records(), 'b': images})
    assert fig.axes[0].dataLim.x1 == 40 and what.startswith('loss against step')


def test_first_drop_does_not_flatten_the_rest():
    """A loss of 11 at step 0 leaves the picture at the top; a spike of 11 late in the run does not. From step 5 on the
    losses are 2.005 to 2.1 or to the spike, and the axis ends a twentieth of that beyond."""
    for spike_at, top in ((0, 2.1), (30, 11)):
        log = [dict(step=s, tokens=s, loss=11.0 if s == spike_at else 2 + s / 1000) for s in range(101)]
        fig, _ = plot_runs.draw_loss({'a': log}, smooth=1)
        pad = 0.05 * (top - 2.005)
        assert fig.axes[0].get_ylim() == pytest.approx((2.005 - pad, top + pad))


def test_diagnostics_are_no_loss():
    """Records of diagnostics, without a loss or tokens, change nothing in the picture of the losses."""
    fig, what = plot_runs.draw_loss({'a': records()})
    other = {k: v for k, v in diagnosis(5).items() if k != 'tokens'}
    with_them, same = plot_runs.draw_loss({'a': [*records(), diagnosis(100), other]})
    assert same == what
    assert [line.get_xydata().tolist() for line in with_them.axes[0].lines] \
        == [line.get_xydata().tolist() for line in fig.axes[0].lines]


# -----------------------------------------------------------------------------
# mistakes


@pytest.mark.parametrize('args, says', [
    (['status', 'nowhere'], 'nowhere is not a folder'),
    (['loss', 'ok', 'nowhere'], 'nowhere is not a folder'),
    (['status', 'nolog'], 'holds no log.jsonl'),
    (['loss', 'empty'], 'holds no record'),
    (['loss', 'lossless'], 'neither loss nor val_loss'),
    (['status', 'badconfig'], 'is not Python'),
    (['loss', 'ok', '--out=no/such/folder.png'], 'cannot write'),
    (['loss', 'ok', '--out=picture.doc'], 'cannot write'),
    (['loss', 'ok', '--smooth=-1'], '--smooth=-1'),
    (['status', 'ok', '--watch', '--interval=0'], '--interval=0'),
    (['loss'], 'out/run'),
    (['diagnostics', 'ok'], 'ok/log.jsonl tells of no ternary matrices'),
    (['diagnostics', 'bit', 'fp'], 'fp/log.jsonl tells of no ternary matrices'),
    (['diagnostics', 'bit', 'nowhere'], 'nowhere is not a folder'),
    (['diagnostics', 'bit', '--out=no/such/folder.png'], 'cannot write'),
    (['diagnostics'], 'RUN'),
    ([], 'command'),
    (['los', 'ok'], 'los'),
])
def test_mistakes_are_one_line(tmp_path, args, says):
    """A mistake ends with exit status 2 and one line: what is wrong; what to type."""
    make_run(tmp_path / 'ok', records())
    make_run(tmp_path / 'bit', [diagnosis(100)])
    make_run(tmp_path / 'fp', [dict(step=100, matrices={}), dict(step=200, matrices=3)])
    make_run(tmp_path / 'empty', [], tail='{"step": 1, "lo')
    make_run(tmp_path / 'lossless', [dict(step=1, loss=None)])
    make_run(tmp_path / 'badconfig', records(), config='max_iters = = 3\n')
    (tmp_path / 'nolog').mkdir()
    result = subprocess.run(command(*args), capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, '')
    assert re.fullmatch(r'error: [^\n]+; [^\n]*\b(type|wait|restore)\b[^\n]*\n', result.stderr), result.stderr
    assert says in result.stderr


# -----------------------------------------------------------------------------
# diagnostics


def curves(ax):
    """{label: its points} of the lines of a panel."""
    return {line.get_label(): (line.get_xdata().tolist(), line.get_ydata().tolist()) for line in ax.lines}


def test_diagnostics_by_hand():
    """Flips of 0.002 and 0.004 are 0.003 in the mean, 1 and 2 dead rows 3; scales of 1 and 4 times their start are 2 times
    it, in a band from 1 to 4. down has half of the flips, no dead row, an eighth of the scales."""
    log = [*records(), diagnosis(100), diagnosis(200, flips=(0.01, 0.03), dead=(0, 5), ratios=(2.0, 8.0))]
    fig, what = plot_runs.draw_diagnostics({'a': log})
    at = [100_000, 200_000]
    shares, flips, dead, scale = map(curves, fig.axes)
    assert shares == {'−1': (at, pytest.approx([0.29, 0.28])), '0': (at, [0.4, 0.4]), '+1': (at, pytest.approx([0.31, 0.32]))}
    assert flips == {'q': (at, pytest.approx([0.003, 0.02])), 'down': (at, pytest.approx([0.0015, 0.01]))}
    assert dead == {'q': (at, [3, 5]), 'down': (at, [0, 0])}
    assert scale == {'q': (at, pytest.approx([2, 4])), 'down': (at, pytest.approx([0.25, 0.5]))}
    bands = [band.get_paths()[0].vertices for band in fig.axes[3].collections]
    assert [[(min(v[v[:, 0] == x, 1]), max(v[v[:, 0] == x, 1])) for x in at] for v in bands] \
        == [[(1, 4), (2, 8)], [(0.125, 0.5), (0.25, 1)]]
    assert [line.get_color() for line in fig.axes[0].lines] == figure.COLORS[:3]
    assert legend(fig) == ['q', 'down'] and fig.get_suptitle() == '4 ternary matrices of a'
    assert [text.get_text() for text in fig.axes[0].get_legend().get_texts()] == ['−1', '0', '+1']
    assert [ax.get_xlabel() for ax in fig.axes] == ['', '', 'training tokens', 'training tokens']
    assert what == 'ternary codes, flips, dead rows and scales against tokens, 4 ternary matrices of a'


@pytest.mark.parametrize('more, heights, scale', [
    ([(0.0, 0.0), (2e-6, 4e-6)], [0, 3e-6], 'symlog'), ([(0.004, 0.008)], [0.006], 'log'), ([(None, None)], [], 'log')])
def test_flips_of_zero(more, heights, scale):
    """A log axis as long as all flips are above 0. A zero is on it all the same, at its foot and labelled; null is nowhere,
    and changes nothing in the tokens that a panel is drawn against, which are those of the others."""
    log = [diagnosis(step, flips=flips) for step, flips in enumerate([*more, (0.002, 0.004)], 1)]
    fig, _ = plot_runs.draw_diagnostics({'a': log})
    ax = fig.axes[1]
    assert curves(ax)['q'] == ([1000 * r['step'] for r in log[-len(heights) - 1:]], pytest.approx([*heights, 0.003]))
    assert ax.get_yscale() == scale and len({ax.get_xlim() for ax in fig.axes}) == 1
    fig.canvas.draw()
    low, high = ax.get_ylim()
    assert 0.003 < high < 0.01 + max(heights, default=0)
    if scale == 'symlog':  # the smallest is half of 3e-6, of down
        assert [tick for tick in ax.get_yticks() if low <= tick <= high] == pytest.approx([0, 1e-6, 1e-5, 1e-4, 1e-3])
        foot, *decades = ax.transData.transform([(0, y) for y in (0, 1e-6, 1e-5, 1e-4)])[:, 1]
        assert -1e-6 < low < 0 and decades[0] - foot == pytest.approx(decades[2] - decades[1], rel=0.2)
    else:
        assert 0 < low < 0.0015


def test_nothing_flips_or_dies():
    """All flips and dead rows 0: lines at 0, in whole rows, without a warning. A matrix of zeros has scale 0, not an error."""
    fig, _ = plot_runs.draw_diagnostics({'a': [diagnosis(s, flips=(0, 0), dead=(0, 0), ratios=(0.0, 4.0)) for s in (1, 2)]})
    fig.canvas.draw()
    assert [curves(ax)['q'][1] for ax in fig.axes[1:]] == [[0, 0], [0, 0], [0, 0]]
    assert [tick for tick in fig.axes[2].get_yticks() if 0 <= tick <= 1] == [0, 1]


def test_diagnostics_of_several_runs():
    """One colour for each run, its overall figures; against steps where one has no tokens."""
    a = [diagnosis(100), diagnosis(200) | dict(zero=0.5, flips=0.001, dead_rows=9, scale_drift=0.5)]
    b = [{k: v for k, v in diagnosis(100).items() if k != 'tokens'} | dict(zero=0.1)]
    fig, what = plot_runs.draw_diagnostics({'a': a, 'b': b})
    assert [curves(ax) for ax in fig.axes] == [
        {'a': ([100, 200], first), 'b': ([100], second)} for first, second in (
            ([0.4, 0.5], [0.1]), ([0.003, 0.001], [0.003]), ([7, 9], [7]), ([0.25, 0.5], [0.25]))]
    assert [[line.get_color() for line in ax.lines] for ax in fig.axes] == [figure.COLORS[:2]] * 4
    assert legend(fig) == ['a', 'b'] and fig.axes[3].get_xlabel() == 'step' and what.endswith('against step, 2 runs')


def test_diagnostics_in_grey():
    """No two of seven lines have their markers in the same place, so those that are equal are still seen."""
    log = [diagnosis(s) for s in range(64)]
    for record in log:
        record['matrices'] = {f'0.{kind}': record['matrices']['0.q'] for kind in ('q', 'k', 'v', 'o', 'gate', 'up', 'down')}
    fig, _ = plot_runs.draw_diagnostics({'a': log})
    marked = [tuple(range(64)[line.get_markevery()[0]::line.get_markevery()[1]]) for line in fig.axes[1].lines]
    assert len(sum(marked, ())) == len(set(sum(marked, ()))) == 56
    assert len({line.get_marker() for line in fig.axes[1].lines}) == 7


def test_diagnostics_picture(tmp_path):
    """Into the first folder typed or to --out; no panel or legend on another one or beyond the paper."""
    import matplotlib.image
    log = [diagnosis(step) for step in range(100, 1100, 100)]
    a, b = make_run(tmp_path / 'a', log), make_run(tmp_path / 'b', [r | dict(zero=0.1, flips=0.1) for r in log])
    assert run_plot('diagnostics', a, b).startswith(f'{a}/diagnostics.png: ')
    image = matplotlib.image.imread(a / 'diagnostics.png')
    assert image.shape[:2] == (1125, 1650) and min(rgb_share(image, color) for color in figure.COLORS[:2]) > 1e-4
    assert run_plot('diagnostics', b, f'--out={tmp_path}/x.pdf').startswith(f'{tmp_path}/x.pdf: ')
    for runs in (['a'], [str(i) * 30 for i in range(9)]):
        fig, _ = plot_runs.draw_diagnostics(dict.fromkeys(runs, log))
        fig.canvas.draw()
        boxes = [thing.get_tightbbox() for thing in (*fig.axes, *fig.legends, *fig.texts)]
        assert all(0 <= box.x0 and 0 <= box.y0 and box.x1 <= 1100 and box.y1 <= 750 for box in boxes)
        assert not [(p, q) for i, p in enumerate(boxes) for q in boxes[:i] if p.overlaps(q)]
        if key := fig.axes[0].get_legend():  # beside the title, not on it
            title, = fig.axes[0].findobj(lambda thing: getattr(thing, 'get_text', str)() == 'codes of all matrices')
            assert not key.get_tightbbox().overlaps(title.get_tightbbox())


# -----------------------------------------------------------------------------
# bars


def test_bars_by_hand(tmp_path, monkeypatch):
    """A bar for each row of bench.py, as long as its number in its unit, a panel for each size."""
    rows = [dict(bench='layers', name=n, tokens=t, out=4, forward_ms=t * len(n), device='x', **{'in': 4}) for t in (1, 8)
            for n in ('a', 'bb')]
    (tmp_path / 'rows.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    monkeypatch.setattr(sys, 'argv', ['plot.py', 'bars', str(tmp_path / 'rows.jsonl')])
    import matplotlib.figure
    seen = []
    monkeypatch.setattr(matplotlib.figure.Figure, 'savefig', lambda fig, *a, **k: seen.append((fig, a)))
    plot.main()
    (fig, (out,)), = seen
    assert out == str(tmp_path / 'rows.png')
    assert [(ax.get_title(), [p.get_width() for p in ax.patches]) for ax in fig.axes] \
        == [('1 tokens × 4 → 4', [1, 2]), ('8 tokens × 4 → 4', [8, 16])]
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ['a', 'bb'] and fig.axes[0].get_xlabel() == 'milliseconds'


@pytest.mark.parametrize('text, args, says', [('', (), 'no rows'), ('{"step": 1}', (), 'no rows'), ('{', (), 'cannot read'),
                                              ('{"bench": "fit", "loss": 1}', ('--value=x',), 'loss')])
def test_bars_mistakes(tmp_path, text, args, says):
    """A file without rows or a number that they do not have: one line, exit status 2."""
    (tmp_path / 'rows.jsonl').write_text(text)
    result = subprocess.run(command('bars', tmp_path / 'rows.jsonl', *args), capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and result.stderr.startswith('error: ') and result.stderr.count('\n') == 1
    assert says in result.stderr


# -----------------------------------------------------------------------------
# ranks, memory, optimizer, pareto

MIB = 2 ** 20


def tuned(path, method='rsvd', rank=4, seed=42, task='sst2', model='tiny', files=(), **results):
    """A run folder of finetune_cls.py. Eval loss 1/rank, 0.5 for full; 8 + rank MiB of optimizer of 100 + rank in all."""
    size = 0 if method == 'full' else rank
    results = dict(accuracy=0.9, accuracy_low=0.88, accuracy_high=0.93, peak_bytes=(100 + size) * MIB, method=method, rank=rank,
                   seed=seed, task=task, model=model) | results
    parts = dict(parameters=40, buffers=0, gradients=30, optimizer=8 + size, rest=22, peak=100 + size)
    eval_loss = results.pop('eval_loss', 1 / (size or 2))
    losses = f'0,0,,9,0.5\n1,7,{eval_loss / 2},{eval_loss},0.9\n'
    texts = {'config.py': f'method = {method!r}\nrank = {rank}\ntask = {task!r}\n', 'results.yaml': json.dumps(results),
             'epoch_loss.csv': 'epoch,step,train_loss,eval_loss,eval_accuracy\n' + losses,
             'memory_breakdown.csv': 'part,bytes\n' + ''.join(f'{part},{n * MIB}\n' for part, n in parts.items()),
             'optimizer_memory.csv': f'optimizer,method,rank,bytes,adam_bytes,saved\nx,x,4,{(8 + size) * MIB},{80 * MIB},1\n'}
    path.mkdir(parents=True)
    for name, text in (texts | dict(files)).items():
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


def drawn(bars):
    """Container of errorbar -> (x, y, half lengths of the bars, 0 without one)."""
    line, _, (bars,) = bars.lines
    halves = [(ends[1][1] - ends[0][1]) / 2 if len(ends) else 0 for ends in bars.get_segments()]
    return line.get_xdata().tolist(), line.get_ydata().tolist(), halves


def legend(fig):
    return [text.get_text() for text in fig.legends[0].get_texts()]


def test_runs_are_found_and_ordered(sweep):
    """At any depth under a folder, each once; full first and without rank, though its config holds one; then by number."""
    runs = plot_cls.load_runs([str(sweep / 'rsvd'), str(sweep), str(sweep / 'full')])
    assert [(r['method'], r['rank'], r['seed']) for r in runs] == [
        ('full', None, '42'), ('lora', 4, '42'), ('rsvd', 4, '42'), ('rsvd', 4, '43'), ('rsvd', 16, '42')]
    assert os.path.samefile(runs[-1]['run'], sweep / 'rsvd' / 'r16')


def test_ranks_by_hand(sweep):
    """Mean and sd of the last epoch's losses over two seeds: 0.2 and 0.4 give 0.3 and 0.2 / sqrt(2); training is half."""
    fig, what = plot_cls.draw_ranks(plot_cls.load_runs([str(sweep)]))
    ax = fig.axes[0]
    lora, rsvd, _, train = [drawn(bars) for bars in ax.containers]
    assert lora[:2] == ([4], [0.25])
    assert rsvd[0] == [4, 16] and rsvd[1] == pytest.approx([0.3, 1 / 16])
    assert rsvd[2] == pytest.approx([0.02 ** 0.5, 0]) and lora[2] == [0]
    assert train[1] == pytest.approx([0.15, 1 / 32])
    assert [bars.lines[0].get_linestyle() for bars in ax.containers] == ['-', '-', '--', '--']
    levels = {line.get_ydata()[0]: line.get_linestyle() for line in ax.lines if list(line.get_xdata()) == [0, 1]}
    assert levels == {0.5: '-', 0.25: '--'}
    assert [text.get_text() for text in ax.get_xticklabels()] == ['4', '16'] and ax.get_xscale() == 'log'
    assert legend(fig) == ['full', 'lora', 'rsvd', 'evaluation', 'training'] and ax.get_title() == 'sst2, tiny'
    assert what == ('loss at the last epoch against rank, 5 runs of sst2, tiny; '
                    'mean and sd across seeds in 1 of 4 points (rsvd)')
    looks = {(bars.lines[0].get_color(), bars.lines[0].get_marker()) for bars in ax.containers}
    assert len({color for color, _ in looks}) == len({marker for _, marker in looks}) == 2


def test_seeds_of_a_method_without_rank_are_a_band(tmp_path):
    """0.2 and 0.4: a level at 0.3 and a band of one sd to either side."""
    for seed, loss in ((1, 0.2), (2, 0.4)):
        tuned(tmp_path / str(seed), 'full', seed=seed, eval_loss=loss)
    tuned(tmp_path / 'rsvd')
    fig, _ = plot_cls.draw_ranks(plot_cls.load_runs([str(tmp_path)]))
    band = fig.axes[0].patches[0].get_extents().transformed(fig.axes[0].transData.inverted())
    assert (band.y0, band.y1) == pytest.approx((0.3 - 0.02 ** 0.5, 0.3 + 0.02 ** 0.5))


def test_folds_are_repeats(tmp_path):
    """Two folds of one seed, told apart by config.py: one point of two runs."""
    for fold in (0, 1):
        tuned(tmp_path / f'fold{fold}', eval_loss=0.2 + 0.2 * fold, files={'config.py': f'fold = {fold}\n'})
    runs = plot_cls.load_runs([str(tmp_path)])
    fig, what = plot_cls.draw_ranks(runs)
    assert drawn(fig.axes[0].containers[0])[1] == pytest.approx([0.3])
    assert what.endswith('mean and sd across folds in 1 of 1 points (rsvd)')
    labels = [text.get_text() for text in plot_cls.draw_memory(runs)[0].axes[0].get_yticklabels()]
    assert labels == ['rsvd, rank 4, seed 42, fold 0', 'rsvd, rank 4, seed 42, fold 1']


def test_memory_by_hand(sweep):
    """The parts end to end, the peak as text; the seed only where two runs would be called the same, then the folder."""
    tuned(sweep / 'again', 'full')
    fig, what = plot_cls.draw_memory(plot_cls.load_runs([str(sweep)]))
    ax = fig.axes[0]
    labels = [text.get_text() for text in ax.get_yticklabels()]
    assert sorted(labels[:2]) == [f"full, seed 42, fold -1, {sweep / name}" for name in ('again', 'full')]
    assert labels[2:] == ['lora, rank 4', 'rsvd, rank 4, seed 42', 'rsvd, rank 4, seed 43', 'rsvd, rank 16']
    assert legend(fig) == ['parameters', 'gradients', 'optimizer state', 'activations and temporaries']
    assert [[(bar.get_x(), bar.get_width()) for bar in bars][-1] for bars in ax.containers] == [
        (0, 40), (40, 30), (70, 24), (94, 22)]
    assert [text.get_text() for text in ax.texts] == ['100', '100', '104', '104', '104', '116']
    assert what == 'parts of peak memory, 6 runs of sst2, tiny'
    breakdown = 'part,bytes\nparameters,4\nbuffers,1\ngradients,4\noptimizer,8\nrest,3\npeak,20\n'
    tuned(sweep / 'buffered', rank=64, files={'memory_breakdown.csv': breakdown})
    assert 'buffers' in legend(plot_cls.draw_memory(plot_cls.load_runs([str(sweep)]))[0])


def test_optimizer_by_hand(sweep):
    """8 + rank MiB against rank on a log axis, and one line for AdamW's 80 MiB; a range where adapters add to the model."""
    fig, _ = plot_cls.draw_optimizer(plot_cls.load_runs([str(sweep)]))
    ax = fig.axes[0]
    assert [drawn(bars)[:2] for bars in ax.containers] == [([4], [12]), ([4, 16], [12, 24])]
    assert [line.get_ydata()[0] for line in ax.lines if list(line.get_xdata()) == [0, 1]] == [8, 80]
    assert ax.get_yscale() == 'log' and legend(fig) == ['full', 'lora', 'rsvd', 'AdamW, all parameters:\n80 MiB']
    tuned(sweep / 'larger', 'lora', 64, files={'optimizer_memory.csv': f'bytes,adam_bytes\n{MIB},{100 * MIB}\n'})
    assert legend(plot_cls.draw_optimizer(plot_cls.load_runs([str(sweep)]))[0])[-1].endswith('80 to 100 MiB')


def test_pareto_by_hand(sweep):
    """95% intervals of single runs, mean and sd of seeds; the front is what nothing smaller is as accurate as."""
    fig, what = plot_cls.draw_pareto(plot_cls.load_runs([str(sweep)]))
    ax = fig.axes[0]
    found = {(bars.get_label(), *drawn(bars)[0]): (drawn(bars)[1][0], *bars.lines[2][0].get_segments()[0][:, 1])
             for bars in ax.containers}
    sd = 0.04 / 2 ** 0.5
    assert list(found) == [('full', 100), ('lora', 104), ('rsvd', 104), ('_', 116)]
    assert found['lora', 104] == pytest.approx((0.9, 0.88, 0.93))
    assert found['rsvd', 104] == pytest.approx((0.91, 0.91 - sd, 0.91 + sd))
    assert [text.get_text() for text in ax.texts] == ['', '4', '4 (n=2)', '16']
    front, = [line for line in ax.lines if line.get_label() == 'Pareto front']
    assert front.get_xydata().tolist() == [[100, 0.91], [116, 0.92]]
    assert legend(fig)[1:] == ['full', 'lora', 'rsvd'] and 'n runs: mean and sd' in fig.legends[0].get_title().get_text()
    assert what.endswith('5 runs of sst2, tiny; mean and sd across seeds in 1 of 4 points (rsvd)')
    tuned(sweep / 'as large', 'lora', rank=16, accuracy=0.915)  # more than full at 100 MiB, less than rsvd at the same 116
    ax = plot_cls.draw_pareto(plot_cls.load_runs([str(sweep)]))[0].axes[0]
    tied = [line for line in ax.lines if line.get_label() == 'Pareto front']
    assert tied[0].get_xydata().tolist() == front.get_xydata().tolist()
    _, what = plot_cls.draw_pareto(plot_cls.load_runs([str(sweep / 'full'), str(sweep / 'rsvd' / 'r16')]))
    assert what == 'accuracy with its 95% interval against peak memory, 2 runs of sst2, tiny'


def test_pareto_labels_keep_apart(tmp_path):
    """Twelve points in a heap, three each in the very same place: no text on another one."""
    from matplotlib.text import Text
    for i in range(12):
        at = dict(accuracy=0.9 + i // 3 * 0.002, peak_bytes=(100 + i // 3) * MIB)
        tuned(tmp_path / str(i), 'abc'[i % 3], 2 ** (i // 3), **at)
    fig, _ = plot_cls.draw_pareto(plot_cls.load_runs([str(tmp_path)]))
    fig.canvas.draw()
    boxes = [Text.get_window_extent(text) for text in fig.axes[0].texts]
    assert len(boxes) == 12
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]


@pytest.mark.parametrize('name', ['ranks', 'memory', 'optimizer', 'pareto'])
def test_run_pictures_are_saved(sweep, name):
    """Into the first folder typed or to --out, and the printed line names the file."""
    import matplotlib.image
    assert run_plot(name, sweep / 'rsvd', sweep / 'lora').startswith(f"{sweep / 'rsvd' / name}.png: ")
    image = matplotlib.image.imread(sweep / 'rsvd' / f'{name}.png')
    assert image.shape[1] == 1200 and 0.5 < rgb_share(image, '#ffffff') < 0.99
    used = [0, 2, 3] if name == 'memory' else [0, 1]  # no buffers here
    assert min(rgb_share(image, figure.COLORS[i]) for i in used) > 1e-4
    assert run_plot(name, sweep, f'--out={sweep}/x.pdf').startswith(f'{sweep}/x.pdf: ')


@pytest.mark.parametrize('name, other, says', [
    ('ranks', dict(task='cola'), 'two tasks in one picture, cola ('),
    ('pareto', dict(model='bert'), 'two models in one picture, bert ('),
    ('ranks', dict(), 'one method, rank, seed and fold'),
    ('optimizer', dict(seed=None), 'has no seed'),
    ('optimizer', dict(rank=2.5), 'rank is 2.5'),
    ('ranks', dict(seed=1, files={'epoch_loss.csv': 'epoch,step,train_loss,eval_loss,eval_accuracy\n'}), 'no row'),
    ('ranks', dict(seed=1, files={'epoch_loss.csv': 'epoch,train_loss,eval_loss\n1,0.5,1.2.3\n'}), "eval_loss is '1.2.3'"),
    ('ranks', dict(seed=1, files={'epoch_loss.csv': 'epoch,train_loss,eval_loss\n1,nan,1.2\n'}), "train_loss is 'nan'"),
    ('ranks', dict(seed=1, files={'epoch_loss.csv': 'epoch,train_loss\n1,1\n'}), 'eval_loss is None'),
    ('memory', dict(files={'memory_breakdown.csv': ''}), 'no row'),
    ('memory', dict(files={'memory_breakdown.csv': 'part,bytes\nparameters,\n'}), "parameters is ''"),
    ('memory', dict(files={'memory_breakdown.csv': 'part,bytes\nparameters,4\n'}), 'buffers is None'),
    ('memory', dict(files={'memory_breakdown.csv': 'part,bytes\nparameters,4\nbuffers,0\ngradients,4\noptimizer,8\n'
                                                   'rest,-6\npeak,10\n'}), 'do not add up'),
    ('memory', dict(files={'memory_breakdown.csv': 'part,bytes\nparameters,4\nbuffers,0\ngradients,4\noptimizer,8\n'
                                                   'rest,6\npeak,10\n'}), 'do not add up'),
    ('optimizer', dict(seed=1, files={'optimizer_memory.csv': 'bytes,adam_bytes\n0,8\n'}), 'b/optimizer_memory.csv has 0'),
    ('optimizer', dict(files={'results.yaml': '- 1\n'}), 'no row or mapping'),
    ('pareto', dict(files={'results.yaml': 'a: [\n'}), 'cannot read'),
    ('pareto', dict(rank=8, peak_bytes=None), 'peak_bytes is None'),
    ('pareto', dict(rank=8, files={'config.py': 'rank = = 3\n'}), 'is not Python'),
])
def test_run_mistakes(tmp_path, monkeypatch, capsys, name, other, says):
    """Two runs, the second wrong or not to be beside the first: exit status 2, and one line that says so."""
    tuned(tmp_path / 'z', rank=4)
    tuned(tmp_path / 'b', **other)
    mistake(tmp_path, monkeypatch, capsys, [name, 'b', 'z'], says)


@pytest.mark.parametrize('args, says', [
    (['ranks', 'nowhere'], 'nowhere is not a folder'),
    (['memory', 'sub'], 'no results.yaml in or under sub'),
    (['ranks', 'full'], 'none of these runs has a rank'),
    (['ranks', 'bare'], 'cannot read bare/epoch_loss.csv'),
    (['pareto', 'full', '--out=no/such/folder.png'], 'cannot write'),
    (['pareto'], 'RUN'),
])
def test_run_folder_mistakes(tmp_path, monkeypatch, capsys, args, says):
    """A folder, file or argument that is missing: one line as well."""
    tuned(tmp_path / 'full', 'full')
    (tuned(tmp_path / 'bare') / 'epoch_loss.csv').unlink()
    (tmp_path / 'sub' / 'deep').mkdir(parents=True)
    mistake(tmp_path, monkeypatch, capsys, args, says)


def mistake(folder, monkeypatch, capsys, args, says):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, 'argv', ['plot.py', *args])
    with pytest.raises(SystemExit) as end:
        plot.main()
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, '')
    assert re.fullmatch(r'error: [^\n]+; [^\n]*\b(type|restore)\b[^\n]*\n', err), err
    assert says in err
