"""report/tables.py: files of a run, comparisons, sweeps over ranks and folds with a stand-in for the trainer."""
import csv
import os
import signal
import time
import types

import pytest
import torch
import yaml

import common
from readers import texts
from report import tables

CONFIG = {'out_dir': 'out', 'method': 'lora', 'rank': 16, 'fold': -1, 'ranks': (4, 8), 'folds': 0, 'resume': '',
          'overwrite': False, 'texts': ('a', 'b'), 'rate': 2e-5, 'empty': ''}
# A trainer that writes down its options, is as accurate as its rank is large, and is slow or fails on demand.
TRAINER = """
import os, signal, sys, time
options = dict(word[2:].split('=', 1) for word in sys.argv[1:])
where = options['out_dir']
stopped = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: stopped.append(1))
os.makedirs(where, exist_ok=True)
print(sorted(options.items()), file=open('calls', 'a'), flush=True)
if os.path.exists('fail'):
    sys.exit(2)
for _ in range(9000 * os.path.exists('slow')):
    time.sleep(0.01)
    if stopped:
        open('stopped', 'a').write('saved')
        sys.exit(0)
accuracy = int(options['rank']) / 100 + int(options['fold']) / 1000
open(where + '/results.yaml', 'w').write(f'accuracy: {accuracy}\\nf1: 0.5\\nrank: {options["rank"]}\\n')
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('RANK', raising=False)
    (tmp_path / 'trainer.py').write_text(TRAINER)
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    yield tmp_path
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
        signal.signal(number, handler)


def table(path):
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


def calls():
    with open('calls') as f:
        return [dict(eval(line)) for line in f]


def test_a_sweep_runs_every_rank_or_fold_and_passes_every_option(here, capsys):
    """Each run has its own folder and continues where it stopped, or begins anew with overwrite; sweep.csv has a row for
    each; the accuracy over folds is a mean with its deviation."""
    tables.sweep(CONFIG, 'trainer.py')
    assert [(c['rank'], c['out_dir']) for c in calls()] == [('4', 'out/r4'), ('8', 'out/r8')]
    assert {(c['ranks'], c['resume'], c['fold'], c['texts'], c['rate'], c['overwrite']) for c in calls()} == {
        ('()', 'auto', '-1', "('a', 'b')", '2e-05', 'False')} and 'empty' not in calls()[0]
    rows = table('out/sweep.csv')
    assert [(r['rank'], float(r['accuracy']), r['peak_bytes']) for r in rows] == [('4', 0.039, ''), ('8', 0.079, '')]
    tables.sweep({**CONFIG, 'ranks': (), 'folds': 3, 'overwrite': True}, 'trainer.py')
    assert [(c['out_dir'], c['fold'], c['rank']) for c in calls()[2:]] == [(f'out/fold{i}', str(i), '16') for i in range(3)]
    assert all(c['overwrite'] == 'True' and 'resume' not in c for c in calls()[2:])
    out = capsys.readouterr().out
    assert 'accuracy 3.90%' in out and 'accuracy 16.10% ± 0.10% over 3 folds' in out
    assert [r['fold'] for r in table('out/sweep.csv')] == ['0', '1', '2']


def test_failed_and_impossible_sweeps(here, capsys, monkeypatch):
    """A method without a rank, a rank of 0, one fold, several processes: one line before anything is written. A run that
    fails ends the sweep: no further run and no table."""
    for change in ({'method': 'full'}, {'ranks': (4, 0)}, {'folds': 1}, {'folds': -2}, {}):
        if not change:
            monkeypatch.setenv('RANK', '0')
        with pytest.raises(SystemExit) as e:
            tables.sweep(CONFIG | change, 'trainer.py')
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.count('\n') == 1 and ('torchrun' in err or change) and not (here / 'out').exists()
    monkeypatch.delenv('RANK')
    (here / 'fail').touch()
    with pytest.raises(SystemExit) as e:
        tables.sweep(CONFIG, 'trainer.py')
    assert e.value.code == 2 and len(calls()) == 1 and not (here / 'out' / 'sweep.csv').exists()


@pytest.mark.parametrize('number, everyone', [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_stopped_sweep_lets_its_run_save_and_goes_on(here, number, everyone, start):
    """After SIGTERM to the sweep or Ctrl-C to both, the run in progress saves; the same command goes on."""
    (here / 'slow').touch()
    (here / 's.py').write_text(f'from report import tables; tables.sweep({CONFIG!r}, "trainer.py")')
    job = start('s.py', cwd=here)
    while not (here / 'calls').exists() and job.process.is_alive():
        time.sleep(0.02)
    (os.killpg if everyone else os.kill)(job.pid, number)
    done = job.wait()
    assert (done.code, done.err) == (0, '') and done.out.endswith('stopped; the same command goes on\n')
    assert (here / 'stopped').read_text() == 'saved' and len(calls()) == 1
    (here / 'slow').unlink()
    tables.sweep(CONFIG, 'trainer.py')
    assert len(calls()) == 3 and len(table('out/sweep.csv')) == 2


# -------------------------------------------------------------------------------------------------------- comparisons


def test_runs_are_compared_by_folder_or_file_and_by_set(here, capsys):
    """Accuracies, their difference and the rows that only one has right, of all rows and of each set."""
    for name, guesses in (('a', 'yyyyyyyy'), ('b', 'yynnyynn')):
        (here / name).mkdir()
        texts.write_table(here / name / 'predictions.csv', ('index', 'label', 'prediction', 'set'),
                          zip(range(8), 'yynnyynn', guesses, ['en', 'de'] * 4, strict=True))
    tables.compare_runs(['a', 'b'])
    out = capsys.readouterr().out
    assert 'a 50.00%, b 100.00% of 8; difference +50.00 points' in out and 'right in one only: 0, 4' in out
    assert 'en: a 50.00%, b 100.00% of 4' in out and 'de: ' in out and 'too small to tell' in out
    tables.compare_runs(['a/predictions.csv', 'b/', 'a'])
    assert capsys.readouterr().out.count('of 8;') == 2
    for paths, why in ((['a'], 'one run cannot be compared'), (['a', 'no'], 'there is no file no/predictions.csv')):
        with pytest.raises(SystemExit) as e:
            tables.compare_runs(paths)
        err = capsys.readouterr().err
        assert e.value.code == 2 and why in err and err.count('\n') == 1


# --------------------------------------------------------------------------------------------------------------- files


def write(folder, records=(), flops=None, evaluated=None, names=('n', 'y'), state=None):
    for record in records:
        common.append_log(str(folder), record)
    net = torch.nn.Linear(2, 1)                     # 12 bytes
    optimizer = torch.optim.AdamW(net.parameters())
    optimizer.state.update({i: s for i, s in enumerate(state or ())})
    meter = types.SimpleNamespace(net=net, optimizer=optimizer, flops=flops, seconds=1.0, device=torch.device('cpu'), world=1,
                                  joules=lambda: None)
    return tables.write_run(str(folder), {'method': 'lora', 'rank': 4}, list(names),
                            evaluated or {'': (['y', 'n'], ['y', 'y'], range(2), 0.5, 2e-3)}, meter, {'texts': 2, 'ms': 1.5},
                            1000)


def test_files_of_a_run(tmp_path):
    """Means over steps, peaks, optimizer bytes, FLOPs, parts of memory and predictions are those of the log."""
    epoch = {'step': 2, 'epoch': 1.0, 'train_loss': 0.7, 'val_loss': 0.6, 'val_accuracy': 0.5, 'peak_bytes': 70,
             'resident_bytes': 900, 'gradient_bytes': 7, 'optimizer_bytes': 250}
    steps = [{'step': step, 'loss': 1.0, 'ms': ms} for step, ms in ((1, None), (2, 4.0), (2, 8.0))]
    result = write(tmp_path, [*steps, epoch], {'a': (5, None), 'Global': (5, 6)})
    assert result.items() >= {'ms_per_step': 6.0, 'accuracy': 0.5, 'ms_per_sample': 2.0, 'samples_per_s': 500.0,
                              'peak_bytes': 70, 'optimizer_bytes': 250, 'train_loss': 0.7}.items()
    assert yaml.safe_load((tmp_path / 'results.yaml').read_text()) == result
    assert table(tmp_path / 'optimizer_memory.csv') == [{'optimizer': 'AdamW', 'method': 'lora', 'rank': '4', 'bytes': '250',
                                                         'adam_bytes': '1000', 'saved': '0.75'}]
    assert [r['module'] for r in table(tmp_path / 'flops_profiler_stats.csv')] == ['Global', 'a']
    assert {r['part']: int(r['bytes']) for r in table(tmp_path / 'memory_breakdown.csv')} == {
        'parameters': 12, 'buffers': 0, 'gradients': 7, 'optimizer': 0, 'rest': 51, 'peak': 70}
    assert table(tmp_path / 'epoch_loss.csv')[0]['eval_accuracy'] == '0.5'
    assert table(tmp_path / 'predictions.csv')[1] == {'index': '1', 'label': 'n', 'prediction': 'y'}
    usage = yaml.safe_load((tmp_path / 'resource_usage.yaml').read_text())
    assert usage.items() >= {'energy_j': None, 'training_s': 1.0, 'device': 'cpu', 'processes': 1, 'ms_per_sample': 2.0}.items()


def test_f1_ranks_of_bases_and_a_run_without_training(tmp_path):
    """F1 is of the second label: one y is found in two predictions, 2/3; of n 0; of three labels it is macro. Sets are
    scored one by one, ms are per text. Without a log nothing is claimed of the training."""
    result = write(tmp_path, state=[{'basis': torch.zeros(9, 3)}, {'basis': torch.zeros(5, 4)}, {'exp_avg': torch.zeros(2)}])
    assert result['f1'] == pytest.approx(2 / 3) and result['f1_label'] == 'y' and result['basis_ranks'] == [3, 4]
    result = write(tmp_path, names=('y', 'n'))
    assert result['f1'] == 0 and result['f1_label'] == 'n' and 'f1_label' not in write(tmp_path, names=('n', 'y', 'z'))
    assert tables.in_words(result).endswith('\n2.00 ms/text') and 'accuracy 50.00%' in tables.in_words(result)
    result = write(tmp_path, evaluated={'en': (['y'], ['y'], range(1), 0.5, 1.0),
                                        'de': (['y'] * 3, ['n'] * 3, range(3), 0.9, 3.0)})
    german = result['sets']['de']
    assert result['accuracy'] == 1 and german['accuracy'] == 0 and german['eval_loss'] == 0.9
    assert result['ms_per_sample'] == 2500
    assert [r['set'] for r in table(tmp_path / 'predictions.csv')] == ['en', 'de', 'de', 'de']
    assert result['optimizer_bytes'] is result['peak_bytes'] is result['ms_per_step'] is result['basis_ranks'] is None
    assert table(tmp_path / 'optimizer_memory.csv')[0]['saved'] == '' and not (tmp_path / 'memory_breakdown.csv').exists()


def test_time_and_energy_add_up_over_a_resume(monkeypatch):
    """Seconds and joules go on where they were and stop at the end; joules of several processes are unknown."""
    net, now = torch.nn.Linear(8, 8), [100.0]
    monkeypatch.setattr(tables.time, 'perf_counter', lambda: now[0])
    monkeypatch.setattr(common, 'energy_meter', lambda device: lambda start=now[0]: 2 * (now[0] - start))
    make = lambda world=1: tables.StepMeter(net, torch.optim.SGD(net.parameters()), torch.device('cpu'), 0, world)
    one, two, many = make(), make(), make(2)
    one.begin(0)
    now[0] += 5
    assert one.state() == {'peak': 0, 'gradient_bytes': 0, 'joules': 10.0, 'seconds': 5.0}
    two.load(one.state() | {'peak': 9, 'gradient_bytes': 7})
    now[0] += 100
    two.begin(3)
    many.begin(3)
    now[0] += 1
    two.end()
    now[0] += 50
    assert two.seconds == 6 and two.joules() == 12 and two.peak() == 9 and two.gradient_bytes == 7
    assert many.joules() is None and many.state()['joules'] == 0
    two.reset()
    assert two.peak() == 0


def test_some_steps_are_measured_in_full():
    """The first and third step and one in each epoch: peak memory, gradients, FLOPs of all micro-batches. With several
    processes DistributedDataParallel's buckets, as large as the weights, are added."""
    peaks, weights = [], 4 * (64 + 1) * 32
    for world in (1, 2):
        net = torch.nn.Linear(64, 32)
        optimizer = torch.optim.SGD(net.parameters())
        meter, seen = tables.StepMeter(net, optimizer, torch.device('cpu'), 0, world), []
        meter.begin(4)
        for step, middle in ((4, False), (5, False), (6, False), (7, True), (8, False)):
            meter.reset()
            if step == 8:
                meter.count_flops(net(torch.ones(10, 64)).sum() for _ in range(2))
                assert net.weight.grad is None
            with meter.step(step, middle):
                for _ in range(2):
                    y = net(torch.ones(10, 64))
                    y.sum().backward()
                meter.backward_done()
                optimizer.zero_grad()
            del y                                   # freed in the next step it would be taken off there, by chance or not
            seen.append((meter.peak(), meter.disturbed))
        assert [(peak > 0, is_slow) for peak, is_slow in seen] == [
            (True, True), (False, False), (True, True), (True, True), (False, True)]
        assert meter.gradient_bytes == weights and meter.flops['Global'] == (2 * 2 * 10 * 64 * 32,) * 2     # none of the input
        peaks.append(seen[0][0])
    assert 2 * weights < peaks[0] < 2 * weights + 40_000 and peaks[1] == peaks[0] + weights


def test_flops_of_attention_count_on_a_cpu():
    """Forward two products, backward five, which torch counts as none on some versions."""
    q = torch.randn(2, 3, 8, 16, requires_grad=True)
    with tables.flop_counter() as counter:
        y = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward == 2 * 2 * 2 * 3 * 8 * 8 * 16 and counter.get_total_flops() == forward * 7 // 2
