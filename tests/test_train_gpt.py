"""train_gpt.py as people run it: same losses on any number of processes, exact resumption, crashes, mistakes."""
import contextlib
import importlib.util
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import time

import pytest
import torch

import common
import layers
import sample
import train_gpt
from conftest import (AT_STEP, CHECKSUMS, IN_EVALUATION, NAN_LOSS, ROOT, TINY, assert_same_state, checkpoint, damages,
                      free_port, kill_at, log, one_error, printed_command, ranks, torchrun, wait_all)
from readers import tokens

SCRIPT = ROOT / 'train_gpt.py'
MIXED = ('--qkv_proj=bin', '--c_proj=int4', '--mlp_proj=tern', '--n_binary=1')
BINARY, TERNARY = ('--n_binary=2',), ('--n_binary=2', '--qkv_proj=tern', '--c_proj=tern', '--mlp_proj=tern')

NAN_GRADIENT = """
import torch
plain, calls = torch.optim.AdamW.__init__, []
def init(self, *args, **kwargs):
    plain(self, *args, **kwargs)
    second = [p for g in self.param_groups for p in g['params'] if p.shape == (128, 32)][1]
    second.register_hook(lambda g: calls.append(1) or g * ({value} if len(calls) == {call} else 1.0))
torch.optim.AdamW.__init__ = init
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory, tiny_data):
    """folder() -> a new folder holding tiny.py, the config all runs start from."""
    def make():
        new = tmp_path_factory.mktemp('run')
        (new / 'tiny.py').write_text(TINY.format(data=str(tiny_data)))
        return new
    return make


# ------------------------------------------------------------------------------------------------ numbers of processes


DRIVER = CHECKSUMS + """
import runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def assert_same_losses(one, other):
    assert len(log(one, 'loss')) == 20 and len(log(one, 'val_loss')) == 3
    for column in ('loss', 'val_loss'):
        assert log(other, column) == pytest.approx(log(one, column), abs=1e-6, rel=0)
    assert log(other, 'grad_norm') == pytest.approx(log(one, 'grad_norm'), rel=1e-4)    # Adam would hide a factor


def test_two_processes_equal_one(start, folder, unbroken):
    """torchrun with 2 processes and accumulation 2 logs the losses of 1 process and accumulation 4, and its ranks hold
    bit-identical weights and optimizer states after every one of 20 steps."""
    two = folder()
    (two / 'driver.py').write_text(DRIVER)
    done = start(*torchrun('driver.py', SCRIPT, 'tiny.py', '--binary_blocks=1'), cwd=two, real=True).wait()
    assert done.code == 0, done.err
    assert '8 sequences a step = 2 x 2 micro-steps x 2 processes = 256 tokens' in done.out
    assert_same_losses(unbroken('--binary_blocks=1'), two)
    sums = [(two / f'sums{rank}').read_text().split() for rank in (0, 1)]
    assert sums[0] == sums[1] and len(set(sums[0])) == 20


def test_two_nodes_equal_one(start, folder, unbroken):
    """Two torchrun agents of one process each, meeting on 127.0.0.1, log the losses of one process."""
    two, port = folder(), free_port()
    jobs = [start(*torchrun(SCRIPT, 'tiny.py', '--binary_blocks=1', nodes=2, rank=r, port=port, per_node=1), cwd=two,
                  real=True) for r in (0, 1)]
    done = wait_all(jobs)
    assert [d.code for d in done] == [0, 0], [d.err for d in done]
    assert_same_losses(unbroken('--binary_blocks=1'), two)


@pytest.mark.parametrize('world, micro', [(2, 0), (4, 1)])
def test_batches_do_not_depend_on_world_size(start, folder, unbroken, world, micro):
    """Also with other micro-batches: training and validation see the same samples, only sums are ordered otherwise."""
    cwd = folder()
    jobs = [start(SCRIPT, 'tiny.py', f'--micro_batch_size={micro}', '--max_iters=3', '--eval_interval=3', cwd=cwd, **r)
            for r in ranks(world)]
    assert [done.code for done in wait_all(jobs)] == [0] * world
    one = unbroken('--max_iters=3', '--eval_interval=3')
    assert log(cwd, 'loss') == pytest.approx(log(one, 'loss'), abs=2e-6, rel=0)
    assert log(cwd, 'val_loss') == pytest.approx(log(one, 'val_loss'), abs=2e-6, rel=0)
    assert log(cwd, 'grad_norm') == pytest.approx(log(one, 'grad_norm'), rel=1e-4)


def test_ranks_stay_identical_with_dropout(start, folder):
    """Dropout differs between ranks, weights do not; binary, ternary and 4-bit layers together."""
    cwd = folder()
    jobs = [start(SCRIPT, 'tiny.py', *MIXED, '--dropout=0.3', cwd=cwd, patch=CHECKSUMS, **r) for r in ranks(2)]
    assert [done.code for done in wait_all(jobs)] == [0, 0]
    sums = [(cwd / f'sums{rank}').read_text().split() for rank in (0, 1)]
    assert sums[0] == sums[1] and len(set(sums[0])) == 20


# ------------------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize('options', [BINARY, TERNARY, MIXED], ids=['bin', 'tern', 'mixed'])
def test_stopped_and_resumed_equals_unbroken(train, folder, unbroken, options):
    """Stopped between saves, again at a save with an evaluation, and once more; dropout on. Weights, optimizer and log
    are those of the run that was never stopped, bit for bit."""
    options = (*options, '--dropout=0.2')
    whole, cwd = unbroken(*options), folder()
    for step in (2, 9, 16):                         # the signal arrives in this step, which is still finished
        done = train(*options, '--resume=auto', cwd=cwd, patch=kill_at(step))
        assert f'stopped at step {step + 1};' in done.out and checkpoint(cwd)['step'] == step + 1
    assert 'resumed from out/last.pt at step 17' in train(*options, '--resume=auto', cwd=cwd).out
    assert_same_state(checkpoint(cwd), checkpoint(whole))
    assert_same_state(checkpoint(cwd, 'best.pt'), checkpoint(whole, 'best.pt'))
    assert log(cwd) == log(whole)


@pytest.mark.parametrize('schedule', ['two_stage', 'linear', 'constant'])
def test_schedules_resume_exactly(train, folder, unbroken, schedule):
    """Killed without warning in step 13: the run goes on from the save at step 10 (two_stage: after its drop), and its
    log shows the rates of lr_at."""
    options = (f'--schedule={schedule}', '--dropout=0.1', *BINARY)
    whole, cwd = unbroken(*options), folder()
    assert train(*options, cwd=cwd, patch=kill_at(13, 'SIGKILL'), code=-9)
    assert 'at step 10' in train(*options, '--resume=auto', cwd=cwd).out
    assert_same_state(checkpoint(cwd), checkpoint(whole))
    assert log(cwd) == log(whole)
    assert log(cwd, 'lr') == [common.lr_at(s, schedule, 3e-3, 3e-4, 2, 20, 2e-3) for s in range(20)]
    decays = {g['weight_decay'] for g in checkpoint(cwd)['optimizer']['param_groups']}
    assert decays == ({0.0} if schedule == 'two_stage' else {0.0, 0.1})


def test_what_is_watched_does_not_change_what_is_trained(train, folder, unbroken):
    """Other eval_interval, eval_iters, log_interval and save_interval: the same weights, bit for bit, with dropout."""
    options = (*BINARY, '--dropout=0.2')
    whole, cwd = unbroken(*options), folder()
    train(*options, '--eval_interval=3', '--eval_iters=5', '--log_interval=7', '--save_interval=9', cwd=cwd)
    a, b = checkpoint(cwd), checkpoint(whole)
    assert_same_state(a, b | {'best_val_loss': a['best_val_loss']})
    assert [r['step'] for r in log(cwd) if 'loss' in r] == [7, 14, 20]
    assert [r['step'] for r in log(cwd) if 'val_loss' in r] == [0, 3, 6, 9, 12, 15, 18, 20]
    assert a['best_val_loss'] != b['best_val_loss']


def test_saved_config_repeats_the_run(start, folder, unbroken):
    """out/config.py holds every constant: run from another folder it gives the same losses and weights."""
    whole, cwd = unbroken(*MIXED, '--dropout=0.2'), folder()
    done = start(SCRIPT, whole / 'out' / 'config.py', cwd=cwd).wait()
    assert done.code == 0, done.err
    assert log(cwd) == log(whole)
    assert_same_state(checkpoint(cwd), checkpoint(whole))


def test_resumed_hyperparameters_are_the_ones_asked_for(train, folder):
    """A constant changed on the command line of a resumed run is what the optimizer uses, as config.py will say."""
    cwd = folder()
    train(cwd=cwd, patch=kill_at(4))
    train('--resume=auto', '--weight_decay=0.25', '--beta2=0.9', "--lr_scale={'bin': 2.0}", cwd=cwd)
    groups = checkpoint(cwd)['optimizer']['param_groups']
    assert {g['weight_decay'] for g in groups} == {0.0, 0.25} and {g['betas'] for g in groups} == {(0.9, 0.9)}


# --------------------------------------------------------------------------------------------------------- checkpoints


def test_killed_while_saving_every_step(start, train, folder, unbroken):
    """SIGKILL at arbitrary moments of a run that saves after every step, six times: what is left always resumes without
    a warning, and the run ends with the weights of one that was never killed."""
    cwd, options, codes = folder(), ('--save_interval=1', '--resume=auto'), []
    for i in range(6):
        job = start(SCRIPT, 'tiny.py', *options, cwd=cwd)
        first = time.monotonic() + 20
        while 'step ' not in job.output() and time.monotonic() < first:
            time.sleep(0.005)
        time.sleep(0.03 + 0.02 * i)
        with contextlib.suppress(ProcessLookupError):   # it had few steps to go and is done
            job.signal(signal.SIGKILL)
        codes.append(job.wait().code)
        if (cwd / 'out' / 'last.pt').exists():
            assert checkpoint(cwd)['step'] >= 1
    assert -9 in codes and set(codes) <= {0, -9}
    done = train(*options, cwd=cwd)
    assert done.err == '' and 'warning' not in done.out and not [n for n in os.listdir(cwd / 'out') if 'tmp' in n]
    whole = unbroken()
    assert_same_state(checkpoint(cwd), checkpoint(whole))
    assert log(cwd) == log(whole)


def test_killed_between_writing_and_renaming(train, folder):
    """Killed when the new file is whole but not yet renamed: last.pt is the save before it, and resumes."""
    cwd = folder()
    patch = """
import os, signal
plain, calls = os.replace, []
def replace(a, b):
    calls.extend([1] * str(b).endswith('last.pt'))
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    plain(a, b)
os.replace = replace
"""
    train(cwd=cwd, patch=patch, code=-9)            # saves at 5, 10, 15
    assert checkpoint(cwd)['step'] == checkpoint(cwd, 'last.prev.pt')['step'] == 10
    assert 'at step 10' in train('--resume=auto', '--max_iters=11', cwd=cwd).out


def test_damaged_last_falls_back_to_the_one_before(train, folder, unbroken):
    """Damage of each kind to last.pt: a warning naming both files, and the end is that of the unbroken run. Without
    last.prev.pt: one line naming the file, exit status 2."""
    whole = unbroken()
    assert checkpoint(whole, 'last.prev.pt')['step'] == 15
    for what, data in damages((whole / 'out' / 'last.pt').read_bytes()).items():
        cwd = folder()
        shutil.copytree(whole / 'out', cwd / 'out')
        (cwd / 'out' / 'last.pt').write_bytes(data)
        done = train('--resume=auto', cwd=cwd)
        assert re.fullmatch(r'warning: out/last\.pt .*; going on from out/last\.prev\.pt \(step 15\)\n',
                            done.err), (what, done.err)
        assert_same_state(checkpoint(cwd), checkpoint(whole))
        assert log(cwd) == log(whole)
        (cwd / 'out' / 'last.prev.pt').unlink()
        (cwd / 'out' / 'last.pt').write_bytes(data)
        assert one_error(train('--resume=auto', cwd=cwd, code=2)).startswith('error: out/last.pt ')


def test_after_a_fallback_the_good_file_outlives_the_damaged_one(train, folder):
    """Resumed from last.prev.pt because last.pt is damaged, killed while renaming at the next save: one of the two
    must still be whole. (Keeping the damaged file as the previous one would leave none.)"""
    cwd = folder()
    train(cwd=cwd, patch=kill_at(12))
    (cwd / 'out' / 'last.pt').write_bytes(b'')
    patch = """
import os, signal
plain = os.replace
def replace(a, b):
    if str(b).endswith('/last.pt') and 'tmp' in str(a):
        os.kill(os.getpid(), signal.SIGKILL)
    plain(a, b)
os.replace = replace
"""
    train('--resume=auto', cwd=cwd, patch=patch, code=-9)
    assert common.read_last_checkpoint(str(cwd / 'out' / 'last.pt'))['step'] == 10


def test_other_checkpoints_are_refused_in_one_line(train, folder, unbroken):
    """Another version, another trainer, another shape, code inside, not there: one line naming the file."""
    good, cwd = checkpoint(unbroken()), folder()
    bad = str(cwd / 'bad.pt')

    def line(state=None, *options, mode='resume'):
        if state:
            torch.save(state, bad)
        return one_error(train(f'--{mode}={bad}', *options, cwd=cwd, code=2))
    for mode in ('resume', 'init_from'):
        assert f'{bad} does not exist' in line(mode=mode)
        assert f'{bad} has checkpoint version 99, this code reads 1' in line(good | {'version': 99}, mode=mode)
        other = good | {'trainer': 'train_cnn'}
        assert f'{bad} was written by train_cnn.py, not train_gpt.py' in line(other, mode=mode)
        assert bad in line(good, '--n_embd=64', mode=mode)
        evil = good | {'evil': Evil(cwd / 'marker')}
        assert f'{bad} holds more than tensors and plain types' in line(evil, mode=mode)
        os.remove(bad)
    assert 'another n_layer (2, not 3)' in line(good, '--n_layer=3')
    assert 'another n_head (2, not 4)' in line(good, '--n_head=4')
    less = {k: v for k, v in good['model'].items() if k != 'blocks.1.mlp.c_fc.weight'}
    assert 'lacks blocks.1.mlp.c_fc.weight' in line(good | {'model': less})
    assert not (cwd / 'marker').exists() and not (cwd / 'out').exists()


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), 'w')


def test_full_disk_costs_a_warning_not_the_run(train, folder, unbroken):
    """From step 10 on no file may grow over 100 kB (the log may): the checkpoint of step 5 stays whole, every failed
    save is one warning, training ends with the losses of an undisturbed run, and no temporary file is left."""
    whole, cwd = unbroken(), folder()
    limit = 100_000
    assert (whole / 'out' / 'last.pt').stat().st_size > 2 * limit
    action = (f'import resource; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); '
              f'resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {resource.RLIM_INFINITY}))')
    stop = AT_STEP.format(step=8, rank=0, action=action) + AT_STEP.format(
        step=17, rank=0, action='os.kill(os.getpid(), signal.SIGTERM)')
    done = train(cwd=cwd, patch=stop)
    warned = re.findall(r'warning: could not write out/(\w+)\.pt: .*; the last good checkpoint stays', done.out)
    assert warned == ['last', 'best', 'last', 'last']       # at 10, its evaluation, 15, and the stop at 18
    assert checkpoint(cwd)['step'] == 5
    assert log(cwd, 'loss') == log(whole, 'loss')[:18]
    assert not [name for name in os.listdir(cwd / 'out') if 'tmp' in name]
    assert 'at step 5' in train('--resume=auto', cwd=cwd).out
    assert_same_state(checkpoint(cwd), checkpoint(whole))
    assert log(cwd) == log(whole)


# ------------------------------------------------------------------------------------------------- numbers going wrong


def refused_nan(done, cwd, step, saved, name):
    line = one_error(done)
    assert f'at step {step};' in line and f'first non-finite gradient: {name};' in line
    assert f'the last checkpoint is of step {saved};' in line
    assert checkpoint(cwd)['step'] == saved and [r['step'] for r in log(cwd) if 'loss' in r][-1] == step


def test_nan_loss_stops_before_the_update(train, folder, unbroken):
    """A NaN in the third micro-batch of step 7: exit status 2, step and parameter named, last.pt is that of step 5 and
    resumes to the weights of an undisturbed run."""
    cwd = folder()
    refused_nan(train(cwd=cwd, patch=NAN_LOSS.format(call=7 * 4 + 3, rank=0), code=2), cwd, 7, 5, 'wte.weight')
    train('--resume=auto', cwd=cwd)
    assert_same_state(checkpoint(cwd), checkpoint(unbroken()))


@pytest.mark.parametrize('value', ["float('nan')", "float('inf')"])
@pytest.mark.parametrize('clip', [1.0, 0.0])
def test_the_parameter_whose_gradient_went_wrong_is_named(train, folder, value, clip):
    """The loss is finite, one matrix in the middle of the model gets a NaN or an infinite gradient: it is named, not
    the first one of the model."""
    cwd = folder()
    done = train(f'--grad_clip={clip}', cwd=cwd, patch=NAN_GRADIENT.format(value=value, call=7 * 4 + 2), code=2)
    refused_nan(done, cwd, 7, 5, 'blocks.1.mlp.c_fc.weight')


def test_nan_on_one_rank_stops_both(start, folder):
    """Only rank 1 sees the NaN: both leave with status 2 and one of them says why."""
    cwd = folder()
    patch = NAN_LOSS.format(call=7 * 2 + 1, rank=1)
    done = wait_all([start(SCRIPT, 'tiny.py', cwd=cwd, patch=patch, **r) for r in ranks(2)])
    assert [d.code for d in done] == [2, 2] and done[1].err == ''
    refused_nan(done[0], cwd, 7, 5, 'wte.weight')


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize('number, real', [('SIGTERM', False), ('SIGINT', True)])
def test_a_signal_ends_in_a_checkpoint_and_a_command_that_works(start, folder, unbroken, number, real):
    """Sent from outside in the middle of training: exit status 0, a checkpoint of the step that it says, and the printed
    command, typed where the first one was typed, ends as the unbroken run. SIGINT with real command lines."""
    cwd = folder()
    (cwd / 'slow.py').write_text(SLOW.replace('0.03', '0.5 * (step > 0)') + DRIVER)
    job = start('slow.py', SCRIPT, 'tiny.py', cwd=cwd, real=real, PYTHONUNBUFFERED='1')
    deadline = time.monotonic() + 60
    while 'step 1:' not in job.output() and time.monotonic() < deadline:
        time.sleep(0.002)
    job.signal(getattr(signal, number))
    done = job.wait()
    assert done.code == 0 and done.err == '', done.err
    assert checkpoint(cwd)['step'] == int(re.search(r'stopped at step (\d+);', done.out)[1]) in range(1, 20)
    again = start(*printed_command(done.out), cwd=cwd, real=real).wait()
    assert again.code == 0 and again.err == '', again.err
    assert_same_state(checkpoint(cwd), checkpoint(unbroken()))
    assert log(cwd) == log(unbroken())


SLOW = AT_STEP.format(step='step', rank='rank', action='__import__("time").sleep(0.03)')


@pytest.mark.parametrize('number', ['SIGTERM', 'SIGINT'])
def test_a_signal_during_evaluation(train, folder, unbroken, number):
    """In the evaluation of step 10, where nothing is saved otherwise: it is cut short, the checkpoint is of step 10,
    and the resumed run makes the whole evaluation again."""
    cwd = folder()
    options = ('--eval_iters=4', '--save_interval=1000')
    done = train(*options, cwd=cwd, patch=IN_EVALUATION.format(signal=number, call=4 * 4 + 5))
    assert printed_command(done.out)[1:] == ['out/config.py', '--resume=auto'] and checkpoint(cwd)['step'] == 10
    assert [r['step'] for r in log(cwd) if 'val_loss' in r] == [0]
    train(*options, '--resume=auto', cwd=cwd)
    whole = unbroken(*options)
    assert_same_state(checkpoint(cwd), checkpoint(whole))
    assert log(cwd) == log(whole)


def test_a_signal_in_the_first_evaluation_leaves_nothing_to_lose(train, folder, unbroken):
    """Stopped at step 0: no checkpoint, and --resume=auto starts from the beginning."""
    cwd = folder()
    train('--resume=auto', cwd=cwd, patch=IN_EVALUATION.format(signal='SIGTERM', call=2))
    assert not (cwd / 'out' / 'last.pt').exists()
    train('--resume=auto', cwd=cwd)
    assert_same_state(checkpoint(cwd), checkpoint(unbroken()))
    assert log(cwd) == log(unbroken())


@pytest.mark.parametrize('number, everyone', [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_signals_under_torchrun(start, folder, unbroken, number, everyone):
    """Ctrl-C, which reaches torchrun only, and SIGTERM from a scheduler that sends it to every process, so that those
    under torchrun get it twice: a whole checkpoint, from which one process ends like two unbroken ones."""
    cwd = folder()
    slow = SLOW.replace('0.03', '0.5 * (step > 6)')
    (cwd / 'slow.py').write_text('print("pid", __import__("os").getpid())\n' + slow + DRIVER)
    job = start(*torchrun('slow.py', SCRIPT, 'tiny.py'), cwd=cwd, real=True, PYTHONUNBUFFERED='1')
    deadline = time.monotonic() + 60
    while 'step 7:' not in job.output() and time.monotonic() < deadline:
        time.sleep(0.01)
    for pid in [*map(int, re.findall(r'pid (\d+)', job.output()))] * everyone + [job.pid]:
        os.kill(pid, number)
    done = job.wait()
    assert 'stopped at step' in done.out, done.err
    stopped = int(re.search(r'stopped at step (\d+)', done.out)[1])
    assert checkpoint(cwd)['step'] == stopped == 8 and done.out.count('pid ') == 2
    again = start(SCRIPT, 'tiny.py', '--resume=auto', cwd=cwd).wait()
    assert again.code == 0, again.err
    assert_same_losses(unbroken(), cwd)


def test_a_signal_on_one_rank_stops_both(start, folder):
    """Only rank 1 gets the signal, in the middle of step 6, before an evaluation or in one: both save at one step, end."""
    only = "if os.environ.get('RANK') == '1':\n    torch.nn"
    in_evaluation = IN_EVALUATION.format(call=4 + 2, signal='SIGTERM').replace('\ntorch.nn', f'\n{only}')
    for patch, step in ((kill_at(6, rank=1), 7), (kill_at(9, rank=1), 10), (in_evaluation, 10)):
        cwd = folder()
        jobs = [start(SCRIPT, 'tiny.py', cwd=cwd, patch=patch, **r) for r in ranks(2)]
        done = wait_all(jobs)
        assert [d.code for d in done] == [0, 0], [d.err for d in done]
        assert checkpoint(cwd)['step'] == step and f'stopped at step {step};' in done[0].out and done[1].out == ''
        assert 10 not in [r['step'] for r in log(cwd) if 'val_loss' in r]


# ----------------------------------------------------------------------------------------------- starting and refusing


def test_resume_auto_starts_or_goes_on(train, folder, unbroken):
    """Without a run it starts one; with one it goes on; with a finished one it changes nothing."""
    cwd = folder()
    assert 'resumed' not in train('--resume=auto', cwd=cwd, patch=kill_at(6)).out
    assert 'resumed from out/last.pt at step 7' in train('--resume=auto', cwd=cwd).out
    done = train('--resume=auto', cwd=cwd)
    assert 'nothing to do: step 20 of 20 is reached' in done.out
    assert_same_state(checkpoint(cwd), checkpoint(unbroken()))
    assert log(cwd) == log(unbroken())


def test_init_from_resume_and_path(train, folder, unbroken):
    """resume: the run in out_dir, which must exist. A path: its weights at step 0, in a run of its own. resume=path:
    weights, optimizer and step."""
    cwd, whole = folder(), unbroken()
    assert 'out/last.pt does not exist' in one_error(train('--init_from=resume', cwd=cwd, code=2))
    train(cwd=cwd, patch=kill_at(6))
    train('--init_from=resume', cwd=cwd)
    assert_same_state(checkpoint(cwd), checkpoint(whole))
    source = str(whole / 'out' / 'best.pt')
    train(f'--init_from={source}', '--out_dir=new', '--max_iters=1', cwd=cwd)
    new = common.read_log(cwd / 'new')
    assert new[0]['step'] == 0 and new[0]['val_loss'] == log(whole, 'val_loss')[-1]
    train(f'--resume={whole / "out" / "last.prev.pt"}', '--out_dir=branch', cwd=cwd)
    branch = common.read_checkpoint(str(cwd / 'branch' / 'last.pt'))
    assert_same_state(branch | {'best_val_loss': checkpoint(whole)['best_val_loss']}, checkpoint(whole))   # best of its own


def test_resume_from_elsewhere_over_a_run(train, folder, unbroken):
    """With --overwrite=True nothing of the run that was here is left, in the folder or in the log."""
    cwd, other = folder(), unbroken()
    shutil.copytree(unbroken('--seed=2') / 'out', cwd / 'out')
    shutil.copy(cwd / 'out' / 'best.pt', cwd / 'out' / 'packed.safetensors')
    options = (f'--resume={other}/out/last.prev.pt', '--overwrite=True')
    train(*options, cwd=cwd, patch=kill_at(15, 'SIGKILL'), code=-9)
    assert not {'last.prev.pt', 'packed.safetensors'} & set(os.listdir(cwd / 'out'))
    assert checkpoint(cwd)['step'] == 15 and log(cwd, 'loss') == []
    train(*options, cwd=cwd)
    assert [r for r in log(cwd) if 'loss' in r] == [r for r in log(other) if 'loss' in r][15:]


def test_a_run_is_not_overwritten_by_accident(train, folder, unbroken):
    """A folder with a run is refused, untouched. With --overwrite=True nothing of the old run is left: stopped before
    its first save, the new one leaves nothing to resume, not the old weights."""
    cwd = folder()
    shutil.copytree(unbroken(), cwd, dirs_exist_ok=True)
    before = {p.name: p.read_bytes() for p in (cwd / 'out').iterdir()}
    assert '--resume=auto' in one_error(train('--seed=2', cwd=cwd, code=2))
    os.rename(cwd / 'out' / 'last.pt', cwd / 'last.pt')     # the previous one alone is a run as well
    assert '--overwrite=True' in one_error(train('--seed=2', cwd=cwd, code=2))
    os.rename(cwd / 'last.pt', cwd / 'out' / 'last.pt')
    assert {p.name: p.read_bytes() for p in (cwd / 'out').iterdir()} == before
    train('--overwrite=True', '--seed=2', cwd=cwd, patch=kill_at(3, 'SIGKILL'), code=-9)
    done = train('--resume=auto', '--seed=2', cwd=cwd)
    assert 'resumed' not in done.out
    assert_same_state(checkpoint(cwd), checkpoint(unbroken('--seed=2')))


MISTAKES = [
    (('--dataset=nosuch',), 'data/nosuch'),
    (('--batch_size=9',), 'batch_size=9 is no multiple of micro_batch_size=2 x 1 processes'),
    (('--batch_size=0',), 'batch_size=0'),
    (('--block_size=4000',), 'val tokens, block_size=4000 needs more'),
    (('--block_size=50000',), '40000 train tokens, block_size=50000 needs more'),
    (('--qkv_proj=binary',), "'binary' is none of 'fp', 'bin', 'tern', 'int4'"),
    (('--c_proj=fp16',), "'fp16' is none of"), (('--mlp_proj=',), "'' is none of"),
    (('--dtype=float16',), "dtype='float16'; type --dtype=float32 or --dtype=bfloat16"),
    (('--n_embd=33',), 'n_embd=33 is no multiple of n_head=2'),
    (('--n_binary=1', '--binary_blocks=1'), 'give n_binary or binary_blocks, not both'),
    (('--n_binary=3',), 'n_layer=2'), (('--n_binary=-1',), 'n_layer=2'), (('--binary_blocks=0,2',), 'n_layer=2'),
    (('--binary_blocks=-1',), 'n_layer=2'),
    (('--learning_rat=1',), 'did you mean learning_rate?'), (('nosuch.py',), 'no config file nosuch.py'),
    (('--schedule=cosin',), 'cosin'),
    (('--init_from=nosuch.pt',), 'nosuch.pt does not exist'), (('--resume=nosuch.pt',), 'nosuch.pt does not exist'),
    (('--eval_interval=0',), 'eval_interval'), (('--eval_iters=0',), 'eval_iters'),
    (('--log_interval=0',), 'log_interval'),
    (('--save_interval=0',), 'save_interval'), (('--n_head=0',), 'n_head'), (('--block_size=0',), 'block_size'),
    (('--micro_batch_size=-2',), 'micro_batch_size'), (('--device=gpu',), 'gpu'),
    (('--out_dir=/proc/nosuch',), '/proc/nosuch'),
]


@pytest.mark.parametrize('group', range(3))
def test_mistakes_are_one_line(start, folder, group):
    """Each ends with exit status 2 and one line that says what is wrong, no traceback, and no out_dir."""
    cwd = folder()
    jobs = [(start(SCRIPT, 'tiny.py', *options, cwd=cwd), said, options) for options, said in MISTAKES[group::3]]
    wrong = []
    for job, said, options in jobs:
        done = job.wait()
        lines = done.err.split('\n')
        if done.code != 2 or len(lines) != 2 or not lines[0].startswith('error: ') or said not in lines[0]:
            wrong.append((options, done.code, done.err[-400:]))
    assert not wrong and not (cwd / 'out').exists(), wrong


def test_two_ranks_make_a_mistake_in_one_line(start, folder):
    """Rank 0 says it, once; rank 1 fails too (silently, or while it joins a group that rank 0 has left already)."""
    done = wait_all([start(SCRIPT, 'tiny.py', '--batch_size=6', cwd=folder(), **r) for r in ranks(2)])
    assert 'batch_size=6 is no multiple of micro_batch_size=2 x 2 processes' in one_error(done[0])
    assert done[1].code != 0 and 'multiple' not in done[1].err


# ------------------------------------------------------------------------------------------------------------ variants


@pytest.mark.parametrize('kind', layers.KINDS)
def test_every_kind_learns_and_packs_exactly(train, folder, unbroken, kind):
    """All blocks of one kind, with biases: the loss falls from ln(vocab) by more than 0.8 in 20 steps, and the packed
    file's logits at every position equal best.pt's exactly."""
    options = ('--n_binary=2', '--bias=True', f'--qkv_proj={kind}', f'--c_proj={kind}', f'--mlp_proj={kind}')
    cwd = unbroken(*options)
    losses = log(cwd, 'loss')
    assert abs(losses[0] - math.log(256)) < 0.3 and losses[-1] < losses[0] - 0.8
    best = checkpoint(cwd, 'best.pt')
    model = train_gpt.GPT(train_gpt.GPTConfig(**best['model_config']))
    model.load_state_dict(best['model'])
    meta, tensors = common.read_packed(cwd / 'out' / 'packed.safetensors')
    packed = common.load_packed(train_gpt.GPT(train_gpt.GPTConfig(**meta['model_config'])), tensors)
    ids = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    assert torch.equal(all_logits(model.eval(), ids), all_logits(packed.eval(), ids))
    assert meta['step'] == best['step'] and meta['val_loss'] == min(log(cwd, 'val_loss')) == best['best_val_loss']
    assert tokens.from_description(meta['tokenizer']).decode(tokens.byte().encode('abc')) == 'abc'
    low = sum(m.packed for m in packed.modules() if isinstance(m, layers.LowBit))
    assert low == (0 if kind == 'fp' else 8)
    assert (cwd / 'out' / 'packed.safetensors').stat().st_size < (150_000 if kind == 'fp' else 75_000)


def test_val_loss_by_hand(unbroken, tiny_data):
    """The mean over eval_iters * batch_size = 16 windows drawn for step -1, without dropout, from the saved weights."""
    best, data = checkpoint(unbroken(*MIXED, '--dropout=0.2'), 'best.pt'), tokens.load(tiny_data, 'val')
    model = train_gpt.GPT(train_gpt.GPTConfig(**best['model_config'])).eval()
    model.load_state_dict(best['model'])
    xy = data.windows(common.sample_indices(1337, -1, len(data) - 32, 16), 33)
    with torch.no_grad():
        assert model(xy[:, :-1], xy[:, 1:]).item() == pytest.approx(best['best_val_loss'], abs=1e-5)


def test_bfloat16_bias_and_dropout_train(unbroken):
    """Autocast to bfloat16 changes the losses a little, not the course; weights stay float32."""
    cwd, plain = unbroken(*MIXED, '--dtype=bfloat16', '--bias=True', '--dropout=0.1'), unbroken(
        *MIXED, '--bias=True', '--dropout=0.1')
    a, b = log(cwd, 'loss'), log(plain, 'loss')
    assert a != b and a == pytest.approx(b, abs=0.1) and a[-1] < a[0] - 0.8
    assert {t.dtype for t in checkpoint(cwd)['model'].values()} == {torch.float32}


def test_profile_writes_a_trace_and_prints_a_table(train, folder, unbroken):
    """Eight steps are enough; the weights are those of a run that was not watched."""
    cwd = folder()
    done = train('--profile=True', cwd=cwd)
    assert 'Self CPU time total' in done.out and 'aten::' in done.out
    assert len(json.loads((cwd / 'out' / 'trace.json').read_text())['traceEvents']) > 100
    assert_same_state(checkpoint(cwd), checkpoint(unbroken()))


@pytest.mark.skipif(not any(map(shutil.which, ('g++', 'clang++', 'c++'))), reason='torch.compile needs a C++ compiler')
def test_compile(train, folder, unbroken):
    """Three steps of a compiled model have the losses of the plain one, and the checkpoint has its plain names."""
    options = ('--max_iters=3', '--eval_interval=3', '--n_layer=1')
    cwd = folder()
    train(*options, '--compile=True', cwd=cwd, TORCHINDUCTOR_COMPILE_THREADS='1')
    assert log(cwd, 'loss') == pytest.approx(log(unbroken(*options), 'loss'), abs=1e-4)
    assert checkpoint(cwd)['model'].keys() == checkpoint(unbroken(*options))['model'].keys()


def test_log_says_what_design_promises(unbroken):
    """The columns of a training record, with units that fit together; energy is null where nothing measures it."""
    records = [r for r in common.read_log(unbroken() / 'out') if 'loss' in r]
    for step, r in enumerate(records, 1):
        assert set(r) >= {'step', 'tokens', 'loss', 'lr', 'grad_norm', 'ms', 'tokens_per_s', 'peak_mem_bytes',
                          'optimizer_bytes', 'energy_j'}
        assert r['step'] == step and r['tokens'] == step * 8 * 32 and r['peak_mem_bytes'] > 50e6
        assert r['tokens_per_s'] == pytest.approx(8 * 32 / r['ms'] * 1e3) and r['energy_j'] != 0
    val = [r for r in common.read_log(unbroken() / 'out') if 'val_loss' in r]
    assert [r['val_bpb'] for r in val] == pytest.approx([r['val_loss'] / math.log(2) for r in val])   # bytes


# --------------------------------------------------------------------------------------------------------------- model


def tiny_gpt(kind='fp', blocks=(0, 1), **options):
    torch.manual_seed(0)
    options = {'vocab_size': 64, 'block_size': 16, 'n_layer': 2, 'n_head': 2, 'n_embd': 32} | options
    kinds = dict.fromkeys(('qkv_proj', 'c_proj', 'mlp_proj'), kind)
    return train_gpt.GPT(train_gpt.GPTConfig(binary_blocks=blocks, **kinds, **options)).eval()


@torch.no_grad()
def all_logits(model, ids):
    """(B, T, vocab): forward without targets gives the last position only, so the head is listened to."""
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out))
    model(ids, targets=ids)
    handle.remove()
    return seen[0]


def random_ids(*shape, seed=1):
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize('kind', layers.KINDS)
def test_a_later_token_changes_no_earlier_logit(kind):
    model, ids = tiny_gpt(kind), random_ids(2, 16)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)                               # away from the small initial weights
    before = all_logits(model, ids)
    for at in (0, 5, 15):
        changed = ids.clone()
        changed[:, at] = (ids[:, at] + 7) % 64
        after = all_logits(model, changed)
        assert torch.allclose(after[:, :at], before[:, :at], atol=1e-6, rtol=0)
        moved = (after[:, at:] - before[:, at:]).abs().amax(-1) > 1e-5
        # each later one does change; only int8 activations may swallow it here and there
        assert moved.all() if kind != 'tern' else moved[:, 0].all() and moved.float().mean() > 0.9


@pytest.mark.parametrize('kind', layers.KINDS)
def test_first_loss_is_that_of_guessing(kind):
    """ln(vocab) within 0.1 before any step, whatever the weights are made of."""
    model, ids = tiny_gpt(kind, vocab_size=256), random_ids(8, 17)
    assert model(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(math.log(256), abs=0.1)


def test_loss_is_the_mean_cross_entropy_of_the_logits():
    """Against the formula: mean over positions of log sum exp z - z[target]; the last position's logits agree."""
    model, ids = tiny_gpt('bin'), random_ids(3, 17)
    z = all_logits(model, ids[:, :-1]).double()
    targets = ids[:, 1:]
    by_hand = (z.exp().sum(-1).log() - z.gather(-1, targets[..., None])[..., 0]).mean()
    assert model(ids[:, :-1], targets).item() == pytest.approx(by_hand.item(), abs=1e-5)
    assert torch.allclose(model(ids[:, :-1])[:, 0], z[:, -1].float(), atol=1e-6)


@pytest.mark.parametrize('kind, prompt', list(itertools.product(layers.KINDS, (1, 5, 16, 40))))
def test_cached_generation_equals_the_plain_one(kind, prompt):
    """Temperature 0, 40 tokens, far across block_size 16, from prompts shorter and longer than it. The window by hand:
    it starts at the last 16 tokens and grows; when it holds 16, it starts again from the later 8."""
    model, ids = tiny_gpt(kind, binary_alpha_out=0.5), random_ids(1, prompt)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
    cached = [int(t) for t in sample.generate(model, ids, 40, 64, temperature=0)]
    plain, begin = ids, max(0, prompt - 16)
    for i in range(40):
        if i and plain.shape[1] - 1 - begin == 16:  # what is in the cache when the next token is to be fed
            begin = plain.shape[1] - 8
        with torch.no_grad():
            logits = all_logits(model, plain[:, begin:])[0, -1]
        assert int(logits.argmax()) == cached[i], i
        plain = torch.cat([plain, logits.argmax()[None, None]], 1)
    assert len(cached) == 40 and len(set(cached)) > 1


def test_sampling_options():
    """Padding of the vocabulary is never drawn, top_k=1 is temperature 0, the same generator draws the same, a
    batch gives one id per row."""
    model, ids = tiny_gpt(), random_ids(1, 3)

    def draw(n=60, vocab=50, **options):
        return [int(t) for t in sample.generate(model, ids, n, vocab, **options)]
    seeded = lambda: torch.Generator().manual_seed(3)
    drawn = draw(generator=seeded())
    assert drawn == draw(generator=seeded()) and max(drawn) < 50 and len(set(drawn)) > 20
    assert draw(top_k=1) == draw(temperature=0)
    assert [t.shape for t in sample.generate(model, random_ids(3, 2), 2, 64)] == [(3,), (3,)]


@pytest.mark.parametrize('options, low', [
    ({'n_binary': 0}, ()), ({'n_binary': 1}, (0,)), ({'n_binary': 6}, (0, 1, 2, 3, 4, 5)), ({'n_binary': 8}, range(8)),
    ({'binary_blocks': (7, 2)}, (2, 7))])
def test_n_binary_means_exactly_that_many_blocks(monkeypatch, options, low):
    """6 of 8: blocks 0 to 5 hold four binary layers each, the others none; binary_blocks names them one by one."""
    for key, value in ({'n_layer': 8, 'n_binary': 0, 'binary_blocks': ()} | options).items():
        monkeypatch.setattr(train_gpt, key, value)
    model = tiny_gpt('bin', blocks=train_gpt.low_bit_blocks(), n_layer=8)
    counts = [sum(isinstance(m, layers.BinaryLinear) for m in block.modules()) for block in model.blocks]
    assert counts == [4 * (i in low) for i in range(8)]
    plain = [sum(type(m) is torch.nn.Linear for m in block.modules()) for block in model.blocks]
    assert plain == [4 - n for n in counts]


def test_each_projection_takes_its_own_kind():
    model = train_gpt.GPT(train_gpt.GPTConfig(64, 16, 2, 2, 32, qkv_proj='tern', c_proj='int4', mlp_proj='bin',
                                              binary_blocks=(1,)))
    names = lambda b: [type(m).__name__ for m in (
        b.attn.c_attn, b.attn.c_proj, b.mlp.c_fc, b.mlp.c_proj, b.ln_1, b.ln_2)]
    assert names(model.blocks[0]) == ['Linear'] * 4 + ['LayerNorm'] * 2
    assert names(model.blocks[1]) == ['TernaryLinear', 'Linear4bit', 'BinaryLinear', 'BinaryLinear', 'Identity',
                                      'LayerNorm']


def test_gpt2_weights_give_gpt2_logits(tmp_path, monkeypatch):
    """A small GPT2LMHeadModel saved by transformers, loaded here: the same logits (its GELU is the tanh one, ours the
    exact one, so they are compared with ours put in)."""
    transformers = pytest.importorskip('transformers', reason='loading GPT-2 needs transformers')
    torch.manual_seed(0)
    source = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=60, n_positions=24, n_embd=32, n_layer=2, n_head=2, activation_function='gelu')).eval()
    with torch.no_grad():
        for p in source.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    source.save_pretrained(tmp_path / 'gpt2')
    model = tiny_gpt(blocks=(), bias=True)
    train_gpt.load_gpt2(model, str(tmp_path / 'gpt2'))
    ids = random_ids(2, 16) % 60
    with torch.no_grad():
        assert torch.allclose(all_logits(model, ids)[..., :60], source(ids).logits, atol=1e-4)
    assert not all_logits(model, ids)[..., 60:].any()


def test_gpt2_without_transformers_is_one_line(start, folder):
    if importlib.util.find_spec('transformers'):
        pytest.skip('transformers is installed')
    assert 'needs transformers; type: pip install transformers' in one_error(
        start(SCRIPT, 'tiny.py', '--init_from=gpt2', cwd=folder()).wait())
