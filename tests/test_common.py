"""common.py: order of samples, schedules, means over ranks, files that are whole or absent, log, signals, meters."""
import json
import math
import os
import pickle
import re
import resource
import signal
import sys
import zipfile

import numpy as np
import pytest
import torch

import common
from conftest import ranks, wait_all


def state(**more):
    return {'trainer': 'train_gpt', 'step': 3, 'model': {'w': torch.arange(6.0).view(2, 3), 'b': torch.ones(3)}} | more


def refusal(path, trainer=None, reader=common.read_checkpoint):
    """The one line of a refused checkpoint; it names the file."""
    with pytest.raises(ValueError) as error:
        reader(str(path), trainer)
    line = str(error.value)
    assert str(path) in line and '\n' not in line and len(line) < 300 + len(str(path)), line
    return line


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / 'last.pt'
    common.save_checkpoint(str(path), state())
    return path


# ------------------------------------------------------------------------------------------------ samples and schedule


def test_indices_are_pure_functions():
    """Same arguments, same indices; another seed or step gives others. Global generators are neither read nor moved."""
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    first, epoch = common.sample_indices(1, 7, 1000, 64), common.epoch_indices(0, 0, 10, 10)
    assert first.dtype == np.int64 and first.shape == (64,) and 0 <= first.min() <= first.max() < 1000
    assert np.array_equal(first[:10], common.sample_indices(1, 7, 1000, 10))
    everything = [first, *(common.sample_indices(*key, 1000, 64) for key in ((2, 7), (1, 8), (7, 1), (1, -1), (-1, 7)))]
    assert all((a == b).mean() < 0.1 for i, a in enumerate(everything) for b in everything[:i])       # chance is 0.001
    epoch[:] = 0                                                # the result may be written to
    assert sorted(common.epoch_indices(0, 0, 10, 10)) == sorted(common.epoch_indices(-1, 0, 10, 10)) == list(range(10))
    assert (np.random.get_state()[1] == before[0]).all() and torch.equal(torch.get_rng_state(), before[1])
    np.random.seed(0)
    torch.manual_seed(0)
    assert np.array_equal(first, common.sample_indices(1, 7, 1000, 64))


def test_the_order_of_samples_does_not_change_between_versions():
    """It is part of every published number: these are the first indices of seed 1337, and an epoch of seed 0."""
    assert common.sample_indices(1337, 0, 10 ** 6, 4).tolist() == [718190, 919616, 964157, 984401]
    assert common.sample_indices(1337, -1, 10 ** 6, 4).tolist() == [394873, 853529, 555477, 281319]
    assert common.epoch_indices(0, 0, 10, 10).tolist() == [4, 3, 7, 1, 5, 6, 2, 0, 9, 8]


@pytest.mark.parametrize('n, batch', [(10, 4), (7, 7), (5, 12)])
def test_epoch_indices_show_every_sample_once_an_epoch(n, batch):
    """However batches cut the epochs, each in another order; read in pieces of any size, the row is the same."""
    row = np.concatenate([common.epoch_indices(3, step * batch, n, batch) for step in range(4 * n)])
    epochs = row[:len(row) // n * n].reshape(-1, n)
    assert (np.sort(epochs, axis=1) == np.arange(n)).all() and row.dtype == np.int64
    assert len({tuple(e) for e in epochs}) > len(epochs) // 2
    assert (common.epoch_indices(3, 0, n, len(row)) == row).all()
    for start in (0, 1, n - 1, n, 2 * n + 1):
        pieces = [common.epoch_indices(3, start + i, n, 1) for i in range(n)]
        assert (np.concatenate(pieces) == row[start:start + n]).all()
    assert not (common.epoch_indices(4, 0, n, len(row)) == row).all()


def test_random_numbers_are_a_function_of_seed_step_and_process():
    """The same three give the same numbers, any other one others."""
    def draw(*key):
        common.seed_step(*key)
        return torch.rand(4).tolist()
    first = draw(1, 2, 0)
    others = [draw(1, 2, 1), draw(1, 3, 0), draw(2, 2, 0), draw(2, 1, 0)]
    assert first == draw(1, 2, 0) and first not in others and len({tuple(o) for o in others}) == 4


@pytest.mark.parametrize('schedule, by_hand', [
    # peak 1, floor 0.1, 4 warm-up steps, 13 in all; (12 - 4) / 2 = 4 steps after the warm-up is half way
    ('cosine', {0: 0.2, 3: 0.8, 4: 1.0, 6: 0.1 + 0.45 * (1 + math.sqrt(0.5)), 8: 0.55, 12: 0.1}),
    ('linear', {0: 0.2, 3: 0.8, 4: 1.0, 6: 0.775, 8: 0.55, 12: 0.1}),
    ('constant', {0: 0.2, 3: 0.8, 4: 1.0, 6: 1.0, 8: 1.0, 12: 1.0}),
    # the second stage starts at 13 // 2 = 6 on the line from 0.6 to 0.1: 0.1 + 0.5 * (1 - 2 / 8)
    ('two_stage', {0: 0.2, 3: 0.8, 4: 1.0, 5: 0.1 + 0.9 * 7 / 8, 6: 0.475, 8: 0.35, 12: 0.1}),
])
def test_lr_at_by_hand(schedule, by_hand):
    """Each schedule has the values that one computes on paper."""
    for step, expected in by_hand.items():
        assert common.lr_at(step, schedule, 1.0, 0.1, 4, 13, second_lr=0.6) == pytest.approx(expected, rel=1e-12), step


def test_lr_at_edges():
    """No warm-up starts at the peak; a run that is all warm-up, or one step, works; an unknown schedule is an error."""
    for args, expected in (((0, 'cosine', 1.0, 0.1, 0, 10), 1.0), ((9, 'linear', 1.0, 0.1, 10, 10), 10 / 11),
                           ((0, 'cosine', 1.0, 0.1, 0, 1), 1.0), ((20, 'cosine', 1.0, 0.1, 2, 10), 0.1)):
        assert common.lr_at(*args) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match='cosine, linear, two_stage, constant'):
        common.lr_at(5, 'cosin', 1.0, 0.1, 0, 10)


# ----------------------------------------------------------------------------------------------------------- processes


RANKS = """
import torch, common
rank, local, world, device = common.setup_processes('cpu')
print('mean', common.mean_over_ranks([6.0, 1.0, 0.0][rank], [3, 1, 0][rank]))
print('any', common.any_rank(rank == 1), common.any_rank(False), common.any_rank(True))
print('same', common.ranks_agree(1, 'a', 0.5), common.ranks_agree(rank), common.ranks_agree('x' if rank else 'y'))
w = torch.ones(5)
print('sums', common.ranks_agree(common.checksum([w])), end=' ')
w[4] += 1e-7 * (rank == 2)
print(common.ranks_agree(common.checksum([w])))
common.close_processes()
"""


def test_processes_agree_on_means_flags_and_checksums(start, tmp_path):
    """Of three processes: means are weighted by count, a flag on one is seen by all, one changed bit is found."""
    (tmp_path / 'ranks.py').write_text(RANKS)
    done = wait_all([start('ranks.py', cwd=tmp_path, **r) for r in ranks(3)])
    for result in done:
        assert result.code == 0, result.err
        assert result.out.splitlines() == ['mean 1.75', 'any True False True', 'same True False False', 'sums True False']


def test_one_process_agrees_with_itself():
    """Means, flags and checksums of one process; a checksum is of the bytes, however tensors divide them."""
    assert common.mean_over_ranks(7, 4) == 1.75
    assert common.any_rank(3) is True and common.any_rank('') is False
    assert common.ranks_agree(math.inf, 'x')
    a, b = torch.arange(4.0), torch.arange(4.0).bfloat16()
    assert common.checksum([a, b]) == common.checksum([a[:1], a[1:], b]) != common.checksum([b, a])


def test_one_process_without_torchrun_and_no_cuda(monkeypatch, capsys):
    """Without torchrun there is one process; --device=cuda where there is none is one line with what to type."""
    for key in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'):
        monkeypatch.delenv(key, raising=False)
    assert common.setup_processes('cpu') == (0, 0, 1, torch.device('cpu'))
    common.close_processes()
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit) as stop:
        common.setup_processes('cuda')
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith('error: ') and 'cuda' in error and 'type --device=cpu' in error


# --------------------------------------------------------------------------------------------------------------- files


def test_atomic_write_leaves_no_temporary_file(tmp_path):
    """Whatever goes wrong while writing, the old file stays and nothing else is left in the folder."""
    path = tmp_path / 'x'
    common.atomic_write(path, lambda tmp: open(tmp, 'w').write('old'))

    def breaks(error):
        def write(tmp):
            open(tmp, 'w').write('half')
            raise error
        return write
    for error in (OSError(28, 'No space left on device'), RuntimeError('enforce fail: file write failed\nmore')):
        with pytest.raises(OSError, match=f'could not write {path}: .*(disk full|write failed)$'):
            common.atomic_write(path, breaks(error))
    with pytest.raises(ZeroDivisionError):
        common.atomic_write(path, breaks(ZeroDivisionError()))
    assert path.read_text() == 'old' and os.listdir(tmp_path) == ['x']
    with pytest.raises(OSError, match='could not write'):
        common.atomic_write(tmp_path / 'no_folder' / 'x', lambda tmp: open(tmp, 'w').write('new'))


MODES = """
import os, common
plain, os.umask = os.umask, None                    # it would show 0 to every other thread for a moment
for umask in (0o077, 0o002):
    plain(umask)
    for name, write in (('open', lambda tmp: open(tmp, 'w').write('x')),
                        ('private', lambda tmp: os.close(os.open(tmp + 'x', os.O_CREAT, 0o600)) or os.replace(tmp + 'x', tmp))):
        for _ in 'ab':                              # a new file, and over an old one
            common.atomic_write(f'{name}{umask}', write)
            print(name, oct(os.stat(f'{name}{umask}').st_mode & 0o777))
"""


def test_files_have_the_mode_that_the_umask_says(start, tmp_path):
    """Also a file that its writer, like safetensors, makes private; the umask of other threads is never touched."""
    (tmp_path / 'm.py').write_text(MODES)
    done = start('m.py', cwd=tmp_path).wait()
    assert done.code == 0, done.err
    assert done.out.splitlines() == [f'{name} {mode}' for mode in ('0o600', '0o664')
                                     for name in ('open', 'private') for _ in 'ab']


def test_a_checkpoint_comes_back(saved):
    """Tensors bit for bit, plain types as they were, and the versions of the packages."""
    common.save_checkpoint(str(saved), state(more=(1, 2.5, 'x', None, {'a': [True]}), best=math.inf))
    back = common.read_checkpoint(str(saved), 'train_gpt')
    assert torch.equal(back['model']['w'], state()['model']['w']) and back['best'] == math.inf
    assert back['more'] == (1, 2.5, 'x', None, {'a': [True]}) and back['version'] == common.CHECKPOINT_VERSION
    assert back['versions']['torch'] == torch.__version__ and os.listdir(saved.parent) == ['last.pt']


def test_every_instant_of_a_save_leaves_a_whole_checkpoint(start, tmp_path):
    """A save killed before any system call leaves a last.pt and a last.prev.pt that load; the next saves clean up."""
    steps, killed_at = set(), []
    for at in range(12):
        work = tmp_path / f'k{at}'
        work.mkdir()
        last, previous = work / 'last.pt', work / 'last.prev.pt'
        save = lambda step, path=str(last), keep=True: common.save_checkpoint(path, state(step=step), keep_previous=keep)
        step_of = lambda path: common.read_checkpoint(str(path))['step']
        save(1), save(2)
        (work / 's.py').write_text('import common, torch\ncommon.save_checkpoint("last.pt", '
                                   '{"trainer": "train_gpt", "step": 3, "w": torch.ones(2000)}, True)\n')
        done = start('s.py', cwd=work, patch=DIE_AT.format(at=at)).wait()
        assert done.code in (0, -signal.SIGKILL), done.err
        steps.add(step_of(last))                                                # last.pt itself never goes missing
        assert step_of(previous) in (1, 2)
        if done.code == 0:
            assert step_of(last) == 3 and sorted(os.listdir(work)) == ['last.prev.pt', 'last.pt', 's.py']
            break
        killed_at.append(done.out.split()[-1])
        (work / f'last.pt.tmp{os.getpid()}.prev').write_bytes(b'half')          # of an older process with our number
        save(4), save(5)                                                        # the next saves work and clean up
        assert (step_of(last), step_of(previous)) == (5, 4)
        assert sorted(os.listdir(work)) == ['last.prev.pt', 'last.pt', 's.py']
        save(6, keep=False)
        assert step_of(common.previous_path(str(last))) == 4
    assert steps == {2, 3} and {'open', 'fsync', 'link', 'replace'} <= set(killed_at), killed_at


DIE_AT = """
import builtins, os, signal, torch
left = [{at}]
def counted(name, call):
    def wrapped(*args, **kwargs):
        if 'last' in str(args[0]) or name == 'fsync':
            left[0] -= 1
            if left[0] < 0:
                os.write(1, name.encode())
                os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return wrapped
for name in ('fsync', 'link', 'replace', 'remove'):
    setattr(os, name, counted(name, getattr(os, name)))
builtins.open = counted('open', builtins.open)
torch.save = counted('save', torch.save)
"""


def test_damaged_files_are_refused(saved):
    """A cut file is refused; with any byte flipped it is refused in one line, or gives exactly what was saved (padding)."""
    whole, refused = saved.read_bytes(), 0
    expected, flips = repr(common.read_checkpoint(str(saved))), range(0, len(whole), 7)
    flip = lambda at: saved.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1:])
    for size in (0, 4, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:size])
        assert 'damaged' in refusal(saved)
    for at in flips:
        flip(at)
        try:
            assert repr(common.read_checkpoint(str(saved))) == expected, at
        except ValueError as e:
            assert str(saved) in str(e) and '\n' not in str(e), (at, e)
            refused += 1
    assert refused > len(flips) * 0.2
    flip(whole.index(np.arange(6.0, dtype=np.float32).tobytes()) + 8)       # in the middle of a tensor
    assert 'checksum' in refusal(saved)


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), 'w')


def test_foreign_files_are_refused(tmp_path):
    """A missing file, a folder, another zip or pickle, another version or trainer: one line."""
    path = tmp_path / 'last.pt'
    assert 'does not exist' in refusal(path)
    assert 'is a folder; type the path of a checkpoint' in refusal(tmp_path)
    with zipfile.ZipFile(path, 'w') as z:
        z.writestr('holiday.jpg', b'x' * 100)
    assert 'damaged or no checkpoint' in refusal(path)
    for foreign, line in (({'state_dict': {}}, 'no nanobit checkpoint'), (torch.ones(2), 'no nanobit checkpoint'),
                          (state(version=99), 'version 99'), (state(version=1), 'train_gpt.py, not train_cnn.py')):
        torch.save(foreign, path)
        assert line in refusal(path, 'train_cnn')


def test_a_checkpoint_cannot_run_code(tmp_path):
    """A pickle that would create a file when loaded is refused and creates none, in any format of torch.save."""
    path, marker = tmp_path / 'last.pt', tmp_path / 'marker'
    for write in (lambda: torch.save(state(evil=Evil(marker)), path),
                  lambda: torch.save(state(evil=Evil(marker)), path, _use_new_zipfile_serialization=False),
                  lambda: path.write_bytes(pickle.dumps(Evil(marker)))):
        write()
        assert 'refused' in refusal(path) or 'no checkpoint' in refusal(path)
        assert not marker.exists()
    pickle.loads(path.read_bytes()).close()
    assert marker.exists()


def test_a_damaged_last_checkpoint_falls_back(saved, capsys):
    """The one before it is used, with a warning that names both; if both are damaged, it is an error."""
    common.save_checkpoint(str(saved), state(step=4), keep_previous=True)
    previous = saved.with_name('last.prev.pt')
    assert common.read_last_checkpoint(str(saved))['step'] == 4 and capsys.readouterr().err == ''
    saved.write_bytes(saved.read_bytes()[:-50])
    assert common.read_last_checkpoint(str(saved), 'train_gpt')['step'] == 3
    assert saved.exists() and capsys.readouterr().err       # reading changes nothing; before saving it is set aside
    assert common.read_last_checkpoint(str(saved), 'train_gpt', set_aside=True)['step'] == 3
    warning = capsys.readouterr().err
    assert warning.startswith('warning: ') and warning.count('\n') == 1
    assert f'{saved} is damaged' in warning and f'{previous} (step 3)' in warning
    assert not saved.exists() and saved.with_name('last.pt.damaged').exists()    # no save may take it for the good one
    assert common.read_last_checkpoint(str(saved))['step'] == 3
    previous.write_bytes(b'')
    refusal(previous, reader=lambda path, trainer: common.read_last_checkpoint(str(saved), trainer))
    previous.unlink()
    assert 'does not exist' in refusal(saved, reader=common.read_last_checkpoint)


def test_weights_that_do_not_fit_are_named():
    """Missing, unknown and misshapen keys: one line, model untouched; allow_missing keeps the initial values."""
    model, w, b = torch.nn.Linear(3, 2), torch.ones(2, 3), torch.ones(2)
    before, bias = common.checksum(model.parameters()), model.bias.detach().clone()
    for state_dict, missing, line in (
            ({'weight': w}, (), 'f.pt does not fit this model: it lacks bias'),
            ({}, (), 'f.pt does not fit this model: it lacks weight and 1 more'), ({'bias': b}, ('bias',), 'lacks weight'),
            ({'weight': w, 'bias': b, 'x': b}, (), 'has unknown x'),
            ({'weight': w.T, 'bias': b}, (), 'weight is (3, 2), needs (2, 3)')):
        with pytest.raises(ValueError, match=re.escape(line) + '$'):
            common.load_model_state(model, state_dict, 'f.pt', allow_missing=missing)
        assert common.checksum(model.parameters()) == before
    common.load_model_state(model, {'weight': w}, 'f.pt', allow_missing=('bias',))
    assert torch.equal(model.weight, w) and torch.equal(model.bias, bias)


# ----------------------------------------------------------------------------------------------------------------- log


def test_log_is_cut_back_to_the_resumed_step(tmp_path):
    """Training records up to the step stay, its evaluation and all later ones go; NaN becomes null."""
    for step in (0, 1, 2, 3):
        common.append_log(tmp_path, {'step': step, 'loss': 1.5 * step if step else math.nan})
        common.append_log(tmp_path, {'step': step, 'val_loss': 2.0})
    common.cut_log(tmp_path, 2)
    assert common.read_log(tmp_path) == [
        {'step': 0, 'loss': None}, {'step': 0, 'val_loss': 2.0}, {'step': 1, 'loss': 1.5}, {'step': 1, 'val_loss': 2.0},
        {'step': 2, 'loss': 3.0}]
    assert os.listdir(tmp_path) == ['log.jsonl']
    common.cut_log(tmp_path, 0)
    assert common.read_log(tmp_path) == [{'step': 0, 'loss': None}]


def test_a_half_written_log_line_costs_that_line_only(tmp_path):
    """Records that are logged after it stay."""
    assert common.read_log(tmp_path) == []
    common.append_log(tmp_path, {'step': 1, 'loss': 2.0})
    with open(tmp_path / 'log.jsonl', 'a') as f:
        f.write('{"step": 2, "lo')
    assert common.read_log(tmp_path) == [{'step': 1, 'loss': 2.0}]
    common.cut_log(tmp_path, 5)
    common.append_log(tmp_path, {'step': 2, 'loss': 1.0})
    assert [json.loads(line)['step'] for line in open(tmp_path / 'log.jsonl')] == [1, 2]


def test_a_full_disk_costs_log_lines_only(tmp_path, capsys):
    """A warning for each, no half lines; with room again the log goes on."""
    common.append_log(tmp_path, {'step': 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (5, 0):
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / 'log.jsonl').stat().st_size + room, before[1]))
        try:
            common.append_log(tmp_path, {'step': 2})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert re.fullmatch(r'warning: could not write .*/log\.jsonl: .*\n', capsys.readouterr().err)
    common.append_log(tmp_path, {'step': 3})
    assert common.read_log(tmp_path) == [{'step': 1}, {'step': 3}]


# ----------------------------------------------------------------------------------------------------- signals, meters


STOP = """
import os, signal, sys, time, common
number, now = int(sys.argv[1]), [0.0]
time.monotonic = lambda: now[0]
stopped = common.stop_flag()
print(stopped(), flush=True)
for now[0] in (5.0, 5.9, 6.1):
    os.kill(os.getpid(), number)
    print(stopped(), flush=True)
"""


def test_a_signal_asks_to_stop_and_another_one_ends_the_process(start, tmp_path):
    """The first one only sets the flag, and so does a copy within a second, as torchrun sends; a later one ends it."""
    (tmp_path / 's.py').write_text(STOP)
    for number in (signal.SIGTERM, signal.SIGINT):
        done = start('s.py', int(number), cwd=tmp_path).wait()
        assert (done.code, done.out, done.err) == (-number, 'False\nTrue\nTrue\n', '')


PEAK = """
import torch, common
cpu = torch.device('cpu')
print(common.peak_memory_bytes(cpu))
big = torch.ones(100_000_000)
print(common.peak_memory_bytes(cpu))
del big
print(common.peak_memory_bytes(cpu))
"""


def test_peak_memory_counts_bytes_and_stays(start, tmp_path):
    """It grows by a tensor of 400 MB and does not fall when that is freed."""
    (tmp_path / 'p.py').write_text(PEAK)
    done = start('p.py', cwd=tmp_path).wait()
    assert done.code == 0, done.err
    before, during, after = map(int, done.out.split())
    # The kernel counts pages per processor and sums them up now and then: a few may be missing.
    assert 30e6 < before < 8e9 and before + 350e6 < during < before + 600e6 and after > during - 4e6


def test_peak_meter_counts_and_passes_stderr_on(capfd):
    """It counts new tensors alive at once; other lines on standard error pass, also after an exception."""
    old = torch.ones(1000)
    with common.peak_meter(False) as found:
        a = torch.ones(250_000)
        b = a + 1
        del a, old
        c = torch.ones(125_000)
        os.write(2, b'first\n[W CPUAllocator.cpp:1] of no use\n')
        print('second', file=sys.stderr)
    assert found['bytes'] == pytest.approx(2 * b.nbytes, abs=100) and c.nbytes < b.nbytes
    assert sorted(capfd.readouterr().err.splitlines()) == ['first', 'second']
    with pytest.raises(KeyError), common.peak_meter(False):
        os.write(2, b'third\n')
        raise KeyError
    print('fourth', file=sys.stderr)
    assert capfd.readouterr().err == 'third\nfourth\n'


def test_energy_meter_reads_and_unwraps_rapl(tmp_path, monkeypatch):
    """Joules are the sum of two packages without their sub-zone, across a wrap of the counter; None without a counter."""
    def show(*counters):
        for name, energy in zip(('intel-rapl:0', 'intel-rapl:1', 'intel-rapl:0:0'), counters, strict=True):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / 'energy_uj').write_text(str(energy))
            (tmp_path / name / 'max_energy_range_uj').write_text('999')
    show(900, 5, 7)
    monkeypatch.setattr(common.glob, 'glob', lambda pattern: sorted(map(str, tmp_path.iterdir())))
    joules = common.energy_meter(torch.device('cpu'))
    assert joules() == 0
    show(100, 55, 500)                                  # 900 -> 999, 0 -> 100: 200 on
    assert joules() == pytest.approx(250e-6)
    monkeypatch.setattr(common.glob, 'glob', lambda pattern: [])
    assert common.energy_meter(torch.device('cpu'))() is None


def test_a_run_removes_what_a_killed_one_left(tmp_path):
    """Files that were being written go, also those that the resumed run does not write; all others stay."""
    for name in ('config.py.tmp7', 'flops.csv.tmp8', 'last.pt.tmp9.prev', 'last.pt', 'notes.tmp', 'tmp1'):
        (tmp_path / name).touch()
    common.open_run(str(tmp_path), 'train_gpt', {'overwrite': True}, 1, fresh=False)
    assert {p.name for p in tmp_path.iterdir()} == {'last.pt', 'notes.tmp', 'tmp1', 'config.py', 'log.jsonl'}


def test_attention_trains_in_fp32_on_a_cpu():
    """In bf16 the result and the gradients are those of fp32, rounded; without gradients, and in fp32, it is torch's."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 9, 8, dtype=torch.bfloat16).requires_grad_() for _ in 'qkv')
    wide = [t.detach().float().requires_grad_() for t in (q, k, v)]
    with torch.autocast('cpu', torch.bfloat16):
        out = common.attention(q, k, v, is_causal=True)
    want = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True)
    out.float().square().sum().backward()
    want.bfloat16().float().square().sum().backward()
    assert out.dtype == torch.bfloat16 and torch.equal(out, want.bfloat16())
    assert all(torch.equal(a.grad, b.grad.bfloat16()) for a, b in zip((q, k, v), wide, strict=True))
    with torch.no_grad():
        assert torch.equal(common.attention(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v))
