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
    assert plot.load_config(str(run)) == {'max_iters': 200, 'betas': (0.9, -1)}
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
    assert min(rgb_share(image, color) for color in plot.COLORS[:2]) > 5e-4
    assert rgb_share(image, plot.COLORS[2]) == 0
    run_plot('loss', b, f'--out={tmp_path}/only b.png', '--smooth=1')
    assert rgb_share(matplotlib.image.imread(tmp_path / 'only b.png'), plot.COLORS[0]) > 5e-4


def test_smoothing_by_hand():
    """Mean of three: the ends have two neighbours' worth; of four: one before, two after."""
    assert plot.smoothed([1, 2, 3, 7], 1) == [1, 2, 3, 7]
    assert plot.smoothed([1, 2, 3, 7], 3) == [1.5, 2, 4, 5]
    assert plot.smoothed([1, 2, 3, 7], 4) == [2, 3.25, 4, 5]


def test_legend_names_final_values():
    """The legend carries the last validation loss, its bits per byte, the best one where better, and the last mean."""
    log = records()
    log[-1] |= dict(val_loss=3.0, val_bpb=1.5)
    fig, _ = plot.draw_loss({'a': log})
    (label,) = [text.get_text() for text in fig.axes[0].get_legend().get_texts()]
    assert label == 'a: val 3.000 = 1.500 bits/byte, best 2.532, train 2.024'  # 2 + 1/31 + 0.5 and 2 + 1/41


@pytest.mark.parametrize('other, valid', [(0.5, True), (0.7, False), (None, False)])
def test_bits_per_byte_axis_needs_one_tokenizer(other, valid):
    """2 nats at half a byte-bit per nat read 1 on the right axis; there is none with two ratios, or an unknown one."""
    log = records(bpb_per_nat=other or 1)
    if other is None:
        log = [{k: v for k, v in r.items() if k != 'val_bpb'} for r in log]
    fig, what = plot.draw_loss({'a': records(), 'b': log})
    right = fig.axes[0].child_axes
    assert len(right) == valid and ('no bits-per-byte axis' in what) != valid
    if valid:
        fig.canvas.draw()
        assert right[0].get_ylabel().startswith('bits per byte')
        assert right[0].get_ylim() == pytest.approx([0.5 * y for y in fig.axes[0].get_ylim()])


def test_tokens_or_steps():
    """Tokens are the axis when every record has them (40 steps are 40,000 tokens), steps otherwise."""
    fig, what = plot.draw_loss({'a': records()})
    assert fig.axes[0].dataLim.x1 == 40_000 and what.startswith('loss against tokens')
    assert fig.axes[0].get_ylabel() == 'loss (nats per token)'
    images = [{k: v for k, v in r.items() if k != 'tokens'} for r in records()]
    fig, what = plot.draw_loss({'a': records(), 'b': images})
    assert fig.axes[0].dataLim.x1 == 40 and what.startswith('loss against step')


def test_first_drop_does_not_flatten_the_rest():
    """A loss of 11 at step 0 leaves the picture at the top; a spike of 11 late in the run does not."""
    for spike_at, top in ((0, 2.2), (30, 11)):
        log = [dict(step=s, tokens=s, loss=11.0 if s == spike_at else 2 + s / 1000) for s in range(101)]
        fig, _ = plot.draw_loss({'a': log}, smooth=1)
        low, high = fig.axes[0].get_ylim()
        assert 1.5 < low < 2.1 and top - 0.2 <= high <= 1.1 * top


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
    ([], 'command'),
    (['los', 'ok'], 'los'),
])
def test_mistakes_are_one_line(tmp_path, args, says):
    """A mistake ends with exit status 2 and one line: what is wrong; what to type."""
    make_run(tmp_path / 'ok', records())
    make_run(tmp_path / 'empty', [], tail='{"step": 1, "lo')
    make_run(tmp_path / 'lossless', [dict(step=1, loss=None)])
    make_run(tmp_path / 'badconfig', records(), config='max_iters = = 3\n')
    (tmp_path / 'nolog').mkdir()
    result = subprocess.run(command(*args), capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, '')
    assert re.fullmatch(r'error: [^\n]+; [^\n]*\b(type|wait|restore)\b[^\n]*\n', result.stderr), result.stderr
    assert says in result.stderr


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
