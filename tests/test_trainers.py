"""What all trainers promise alike: a claim a test, a trainer a parameter. What one of them does alone is in its own file."""
import functools
import math
import os
import re
import shutil
import statistics

import pytest
import torch

import common
import layers
import sample
import tiny
from conftest import (CHECKSUMS, ROOT, all_logits, one_error, printed_command, random_ids, ranks, tiny_bitnet, tiny_gpt,
                      wait_all)
from tiny import (AT_STEP, COMMON, DISK, BY_STEP, IN_EVALUATION, LAST_FILES, NAN_LOSS, NO_PICTURES, OPTIMIZERS, TINY, TRAINERS,
                  assert_same_run, assert_same_state, bad_gradient, checkpoint, kill_at, write_data)

log = functools.partial(tiny.log, without=tiny.WATCHED)
DIE_BEFORE_RENAMING = """
import os, signal
def replace(a, b, plain=os.replace):
    if str(b).endswith('last.pt'):
        os.kill(os.getpid(), signal.SIGKILL)
    plain(a, b)
os.replace = replace
"""

# Prints before each step which share of the low-bit weights is rounded.
PRINT_SHARE = """
import common, layers
held = []
def ramp(model, plain=layers.ramp):
    held[:] = [plain(model)]
    return held[0]
def seed_step(seed, step, rank, plain=common.seed_step):
    print('share', held[0].item())
    plain(seed, step, rank)
layers.ramp, common.seed_step = ramp, seed_step
"""

# Prints before each step how often the host has waited for numbers of the device so far. transformers looks at the padding of
# each micro-batch, which is not counted.
COUNT_WAITS = """
import common, torch, traceback
from torch.utils._python_dispatch import TorchDispatchMode
waits = []
class Noting(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal):
            if not any('masking_utils' in f.filename for f in traceback.extract_stack()):
                waits.append(function)
        return function(*args, **kwargs or {})
def fetched(t, plain=common.fetched):
    waits.append(plain)
    return plain(t)
def seed_step(seed, step, rank, plain=common.seed_step):
    print('before step', step, len(waits))
    plain(seed, step, rank)
common.fetched, common.seed_step = fetched, seed_step
Noting().__enter__()
"""

every_trainer = pytest.mark.parametrize('trainer', TRAINERS)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """{text, images, table}: paths of data that each trainer reads."""
    return write_data(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def folder_of(tmp_path_factory, data):
    """folder_of(trainer) -> a new folder holding tiny.py, a config of a dozen steps."""
    def make(trainer):
        new = tmp_path_factory.mktemp(trainer)
        (new / 'tiny.py').write_text(COMMON + TINY[trainer].format(**data))
        return new
    return make


@pytest.fixture(scope='module')
def run_of(start):
    """run_of(trainer, *options, cwd=..., code=0, patch='') -> Result of one run; words: other ones than trainer.py tiny.py."""
    def run(trainer, *options, cwd, code=0, patch='', words=None):
        words = words or (ROOT / f'{trainer}.py', 'tiny.py')
        done = start(*words, *options, cwd=cwd, patch=NO_PICTURES * (trainer == 'train_cnn') + patch).wait()
        assert done.code == code and 'Traceback' not in done.err, (done.code, done.out, done.err)
        return done
    return run


@pytest.fixture(scope='module')
def two_ranks(start):
    """two_ranks(trainer, *options, cwd=..., code=0, patch='') -> the Results of rank 0 and 1 of one run."""
    def run(trainer, *options, cwd, code=0, **how):
        done = wait_all([start(ROOT / f'{trainer}.py', 'tiny.py', *options, cwd=cwd, **how, **r) for r in ranks(2)])
        assert [d.code for d in done] == [code, code], [(d.out, d.err) for d in done]
        assert done[1].out == '' and 'Traceback' not in done[0].err + done[1].err
        return done
    return run


@pytest.fixture(scope='module')
def unbroken_of(run_of, folder_of):
    """unbroken_of(trainer, *options) -> the folder of a run with these options, made once."""
    made = {}

    def run(trainer, *options):
        if (trainer, options) not in made:
            made[trainer, options] = folder_of(trainer)
            assert run_of(trainer, *options, cwd=made[trainer, options]).err == ''
        return made[trainer, options]
    return run


def evaluated(where):
    return [r['step'] for r in log(where) if 'val_loss' in r]


def same_sums(where, steps):
    """Two ranks have the same weights, statistics and optimizer state before each of so many steps."""
    sums = [(where / f'sums{rank}').read_text().split() for rank in (0, 1)]
    assert sums[0] == sums[1] and len(set(sums[0])) == steps


# ------------------------------------------------------------------------------------------------ stopping and resuming


@every_trainer
def test_stopped_and_resumed_equals_unbroken(run_of, folder_of, unbroken_of, trainer):
    """Stopped in the first evaluation, in a step and in a later evaluation, killed, each time resumed: the same run to the bit.

    SIGTERM and SIGINT end with status 0, a checkpoint of that step and the command that goes on. A SIGKILL when the new file is
    whole but not yet renamed costs the steps since the last save. An evaluation that was cut short is not recorded, and made
    whole later. A finished run stays as it is.
    """
    options = *BY_STEP[trainer], '--resume=auto'
    whole, cwd = unbroken_of(trainer, *BY_STEP[trainer]), folder_of(trainer)
    if 0 in evaluated(whole):
        done = run_of(trainer, *options, cwd=cwd, patch=IN_EVALUATION.format(after='', rank=0, signal='SIGTERM'))
        assert 'stopped at step 0;' in done.out and not (cwd / 'out' / 'last.pt').exists()
    done = run_of(trainer, *options, cwd=cwd, patch=kill_at(2))
    assert 'resumed' not in done.out
    in_evaluation = IN_EVALUATION.format(after=7, rank=0, signal='SIGINT')
    for step, patch, code in ((3, in_evaluation, 0), (8, DIE_BEFORE_RENAMING, -9)):
        assert f'stopped at step {step};' in done.out and checkpoint(cwd)['step'] == step
        words = printed_command(done.out)
        assert words[1:] == ['out/config.py', '--resume=auto'] and 8 not in evaluated(cwd)
        done = run_of(trainer, cwd=cwd, words=words, patch=patch, code=code)
        assert f'resumed from out/last.pt at step {step}' in done.out, done.err
    assert checkpoint(cwd)['step'] == checkpoint(cwd, 'last.prev.pt')['step'] == 8 and log(cwd)[-1]['step'] == 10
    for _ in range(2):
        done = run_of(trainer, cwd=cwd, words=words)
        assert done.err == ''
        assert_same_run(trainer, cwd, whole)
    assert 'step 12 of 12 is reached' in done.out


@pytest.mark.parametrize('trainer', ['train_gpt', 'train_bitnet', 'train_cnn'])
def test_a_ramp_starts_from_full_precision(run_of, folder_of, unbroken_of, trainer):
    """--ramp=0.4 of 12 steps: before step i the share of the rounded weights is i / 4.8, at most 1. The losses of the first
    steps are others than without a ramp; the evaluation before them is the same."""
    cwd, plain = folder_of(trainer), unbroken_of(trainer)
    done = run_of(trainer, '--ramp=0.4', cwd=cwd, patch=PRINT_SHARE)
    shares = [float(line.split()[1]) for line in done.out.splitlines() if line.startswith('share ')]
    assert shares == pytest.approx([min(1, i / 4.8) for i in range(12)])
    ramped, rounded = ([r['loss'] for r in log(where) if 'loss' in r] for where in (cwd, plain))
    assert all(a != b for a, b in zip(ramped, rounded, strict=True))
    before, after = ({r['step']: r['val_loss'] for r in log(where) if 'val_loss' in r} for where in (cwd, plain))
    assert before.get(0) == after.get(0) and before[12] != after[12]


@every_trainer
def test_what_is_watched_does_not_change_what_is_trained(run_of, folder_of, unbroken_of, trainer):
    """out/config.py run from another folder, with other intervals of evaluations, records and saves, a profile, threads that
    read ahead: the same weights to the bit."""
    more = {'train_gpt': ['--eval_iters=5'], 'train_bitnet': ['--eval_iters=5', '--diag_interval=0'],
            'train_cnn': ['--num_workers=3'], 'finetune_cls': []}[trainer]
    profile = trainer in ('train_gpt', 'finetune_cls')
    more += ['--profile=True'] * profile + ['--eval_interval=3', '--log_interval=7', '--save_interval=9']
    whole, cwd = unbroken_of(trainer, *BY_STEP[trainer]), folder_of(trainer)
    done = run_of(trainer, *more, cwd=cwd, words=(ROOT / f'{trainer}.py', whole / 'out' / 'config.py'))
    assert_same_state(checkpoint(cwd), checkpoint(whole), ('step', 'model', 'optimizer'))
    assert [r['step'] for r in log(cwd) if 'loss' in r] == [7, 12] and checkpoint(cwd, 'last.prev.pt')['step'] == 9
    epochs = {4, 8} if trainer == 'finetune_cls' else {0}           # it evaluates at the end of each epoch as well
    assert evaluated(cwd) == sorted({3, 6, 9, 12} | epochs)
    assert not profile or 'Self CPU time total' in done.out and (cwd / 'out' / 'trace.json').stat().st_size > 10_000


@pytest.mark.parametrize('trainer', ['train_gpt', 'train_cnn', 'train_bitnet'])
def test_resumed_hyperparameters_are_the_ones_asked_for(run_of, folder_of, unbroken_of, trainer):
    """A constant changed on the command line of a resumed run is what the optimizer uses, as config.py will say."""
    cwd, source = folder_of(trainer), unbroken_of(trainer, *BY_STEP[trainer]) / 'out' / 'last.prev.pt'
    kind = 'tern' if trainer == 'train_bitnet' else 'bin'
    changed = '--weight_decay=0.25', '--beta2=0.9', f"--lr_scale={{'{kind}': 2.0}}", '--schedule=constant'
    run_of(trainer, *BY_STEP[trainer], *changed, f'--resume={source}', cwd=cwd)
    groups, first = (checkpoint(where)['optimizer']['param_groups'] for where in (cwd, source.parent.parent))
    assert {g['weight_decay'] for g in groups} == {0.0, 0.25} != {g['weight_decay'] for g in first}
    assert {g['betas'][1] for g in groups} == {0.9}
    assert all(g['lr'] == 1e-3 * g['lr_scale'] for g in groups)
    assert {g['lr_scale'] for g in groups} >= {1.0, 2.0}


@every_trainer
def test_resume_from_elsewhere_over_a_run(run_of, folder_of, unbroken_of, trainer):
    """--resume=PATH --overwrite=True ends as the run that PATH is of, with rsvd between two bases, with muon or with dropout,
    and leaves nothing of the run that was in out_dir."""
    options, cwd = OPTIMIZERS.get(trainer, BY_STEP[trainer]), folder_of(trainer)
    other = unbroken_of(trainer, *options)
    shutil.copytree(unbroken_of(trainer) / 'out', cwd / 'out')
    options += (f'--resume={other}/out/last.prev.pt', '--overwrite=True')
    run_of(trainer, *options, cwd=cwd, patch=kill_at(10, 'SIGKILL'), code=-9)
    left = {'last.prev.pt', 'best.pt', 'packed.safetensors'} & set(os.listdir(cwd / 'out'))
    assert not left and log(cwd) == [] and checkpoint(cwd)['step'] == 10           # saved before its first step
    run_of(trainer, *options, cwd=cwd)
    assert_same_state(checkpoint(cwd), checkpoint(other), ('step', 'model', 'optimizer'))
    assert log(cwd, 'loss') == log(other, 'loss')[10:] and evaluated(cwd) == [12]


@every_trainer
def test_a_run_is_not_overwritten_by_accident(run_of, folder_of, unbroken_of, trainer):
    """A folder with a run is refused, untouched. With --overwrite=True nothing of the old run is left to resume."""
    cwd = folder_of(trainer)
    shutil.copytree(unbroken_of(trainer) / 'out', cwd / 'out')
    contents = lambda: {p: p.read_bytes() for p in (cwd / 'out').rglob('*') if p.is_file()}
    before = contents()
    line = one_error(run_of(trainer, '--seed=2', cwd=cwd, code=2))
    assert 'out holds a run' in line and '--resume=auto' in line and '--overwrite=True' in line
    assert contents() == before
    os.rename(cwd / 'out' / 'last.pt', cwd / 'last.pt')             # the previous one alone is a run as well
    assert '--overwrite=True' in one_error(run_of(trainer, '--seed=2', cwd=cwd, code=2))
    run_of(trainer, '--overwrite=True', '--seed=2', cwd=cwd, patch=kill_at(2, 'SIGKILL'), code=-9)
    left = {'last.pt', 'last.prev.pt', 'packed.safetensors'} & set(os.listdir(cwd / 'out'))
    assert not left and len(log(cwd, 'loss')) == 2
    assert 'resumed' not in run_of(trainer, '--resume=auto', '--seed=2', '--max_iters=1', cwd=cwd).out


# ------------------------------------------------------------------------------------------------ damaged and full disks


@every_trainer
def test_damaged_last_falls_back_to_the_one_before(run_of, folder_of, unbroken_of, trainer):
    """A warning names both files, and the end is that of the unbroken run. Without last.prev.pt: one line, exit status 2."""
    whole, cwd = unbroken_of(trainer, *BY_STEP[trainer]), folder_of(trainer)
    shutil.copytree(whole / 'out', cwd / 'out')
    half = (whole / 'out' / 'last.pt').read_bytes()[:-20_000]
    (cwd / 'out' / 'last.pt').write_bytes(half)
    done = run_of(trainer, *BY_STEP[trainer], '--resume=auto', cwd=cwd)
    assert re.fullmatch(r'warning: out/last\.pt .*; continuing from out/last\.prev\.pt \(step 10\)\n', done.err), done.err
    assert_same_run(trainer, cwd, whole)
    assert (cwd / 'out' / 'last.pt.damaged').exists()      # no save took it for the one before
    (cwd / 'out' / 'last.prev.pt').unlink()
    (cwd / 'out' / 'last.pt').write_bytes(half)
    assert one_error(run_of(trainer, *BY_STEP[trainer], '--resume=auto', cwd=cwd, code=2)).startswith('error: out/last.pt ')


@every_trainer
def test_a_full_disk_at_the_end_is_one_line(run_of, folder_of, trainer):
    """The last file does not fit: exit status 2, one line that says what to do, and doing it ends the run."""
    cwd, file = folder_of(trainer), LAST_FILES[trainer][0]
    done = run_of(trainer, '--max_iters=1', cwd=cwd, code=2, patch=DISK.format(where=f"path.endswith('{file}')"))
    assert re.search(rf'could not write out/{file}: .*make room and type the same command with --resume=auto', one_error(done))
    run_of(trainer, '--max_iters=1', '--resume=auto', cwd=cwd)
    assert (cwd / 'out' / file).exists()


@every_trainer
def test_a_save_that_failed_is_tried_again_at_the_next_evaluation(run_of, folder_of, trainer):
    """The save of step 5 meets a full disk, that of the evaluation at step 8 does not: a kill after it costs no more. A run
    whose last.pt cannot be saved at all ends with status 2 and says so; its results are there."""
    cwd = folder_of(trainer)
    patch = DISK.format(where="path.endswith('last.pt') and done.count(path) == 1") + kill_at(9, 'SIGKILL')
    done = run_of(trainer, cwd=cwd, code=-9, patch=NO_PICTURES + patch)
    assert 'could not write out/last.pt: ' in done.out and 'there is none yet, training goes on' in done.out
    assert checkpoint(cwd)['step'] == 8
    patch = NO_PICTURES + DISK.format(where="path.endswith('last.pt')")
    done = run_of(trainer, '--max_iters=2', '--overwrite=True', cwd=cwd, code=2, patch=patch)
    assert 'last.pt could not be saved; make room and type' in one_error(done)
    assert all((cwd / 'out' / name).exists() for name in LAST_FILES[trainer])


def test_a_better_best_that_was_lost_is_told_at_the_end(run_of, folder_of):
    """From the second best.pt on the disk is full: the first is packed, the status is 2, the lost step is named, also when the
    run was stopped and resumed in between. The last step is evaluated again when there is room."""
    cwd, full = folder_of('train_gpt'), DISK.format(where="path.endswith('best.pt') and done.count(path) > 1")
    run_of('train_gpt', cwd=cwd, patch=full + kill_at(5))
    assert checkpoint(cwd)['step'] == 6 and checkpoint(cwd)['lost'][1] == 4
    done = run_of('train_gpt', '--resume=auto', '--schedule=constant', '--learning_rate=1', cwd=cwd, code=2)
    assert 'the best evaluation, of step 4, could not be saved; its weights are gone\n' in one_error(done)
    cwd = folder_of('train_gpt')
    done = run_of('train_gpt', cwd=cwd, code=2, patch=full)
    assert 'error: the best evaluation, of step 12, could not be saved; make room' in one_error(done)
    assert common.read_packed(str(cwd / 'out/packed.safetensors'))[0]['step'] == checkpoint(cwd, 'best.pt')['step'] == 0
    run_of('train_gpt', '--resume=auto', cwd=cwd)
    assert common.read_packed(str(cwd / 'out/packed.safetensors'))[0]['step'] == checkpoint(cwd, 'best.pt')['step'] == 12


@every_trainer
def test_a_best_that_was_not_saved_does_not_count(two_ranks, folder_of, trainer):
    """The first best.pt meets a full disk on rank 0, the only one that writes: on both, the next evaluation is the best."""
    cwd = folder_of(trainer)
    done = two_ranks(trainer, '--learning_rate=1e-30', '--min_lr=0', '--max_iters=2', '--eval_interval=1', cwd=cwd,
                     patch=DISK.format(where="path.endswith('best.pt') and done.count(path) == 1"))
    assert done[0].out.count('could not write out/best.pt') == 1
    assert checkpoint(cwd, 'best.pt')['step'] > evaluated(cwd)[0]           # with an equal loss


@pytest.mark.parametrize('trainer, advice', [
    ('train_cnn', '--init_from=out/last.pt'), ('finetune_cls', '--keep_best=False --resume=auto')])
def test_a_lost_best_is_one_line(run_of, folder_of, unbroken_of, trainer, advice):
    """best.pt is cut or lost when the run ends: one line says how to go on with the last weights, which are untouched."""
    cwd = folder_of(trainer)
    shutil.copytree(unbroken_of(trainer) / 'out', cwd / 'out')
    best, last = cwd / 'out' / 'best.pt', cwd / 'out' / 'last.pt'
    before = last.read_bytes()
    for size, problem in ((9000, 'is damaged'), (0, 'does not exist')):
        best.write_bytes(best.read_bytes()[:size]) if size else best.unlink()
        line = one_error(run_of(trainer, '--resume=auto', cwd=cwd, code=2))
        assert line.startswith(f'error: out/best.pt {problem}') and f'type {advice}' in line and 'make room' not in line
        assert last.read_bytes() == before
    run_of(trainer, *advice.split(), *(('--out_dir=new', '--max_iters=1') if trainer == 'train_cnn' else ()), cwd=cwd)


# -------------------------------------------------------------------------------------------------- numbers going wrong


FIRST = {'train_cnn': 'conv1.weight', 'finetune_cls': 'distilbert.embeddings.word_embeddings.weight'}
SOME = {'train_gpt': ('blocks.1.mlp.c_fc.weight', 'nan', 1.0), 'train_bitnet': ('blocks.0.mlp.down_proj.gain', 'nan', 0.0),
        'train_cnn': ('conv2.alpha', 'inf', 0.0), 'finetune_cls': ('pre_classifier.bias', 'inf', 1.0)}


@every_trainer
def test_nan_and_a_full_disk_cost_no_step(run_of, folder_of, unbroken_of, trainer):
    """A NaN in one micro-batch of step 7, then one tensor with a NaN or an infinite gradient, clipped or not: status 2, step
    and parameter named. Then no file may grow: each failed save is a warning, training goes on. With room: the unbroken run."""
    options, resume = BY_STEP[trainer], (*BY_STEP[trainer], '--resume=auto')
    whole, cwd = unbroken_of(trainer, *options), folder_of(trainer)
    line = one_error(run_of(trainer, *options, cwd=cwd, code=2, patch=NAN_LOSS.format(call=7 * 4 + 3, rank=0)))
    assert 'at step 7;' in line and f'first non-finite gradient: {FIRST.get(trainer, "wte.weight")};' in line
    assert 'the last checkpoint is of step 5;' in line and checkpoint(cwd)['step'] == 5
    assert log(cwd, 'loss') == log(whole, 'loss')[:7]

    name, value, clip = SOME[trainer]
    line = one_error(run_of(trainer, *resume, f'--grad_clip={clip}', cwd=cwd, patch=bad_gradient(6, name, value), code=2))
    assert f'at step 6; first non-finite gradient: {name};' in line and checkpoint(cwd)['step'] == 5

    limit = (whole / 'out' / 'last.pt').stat().st_size // 2
    assert (whole / 'out' / 'log.jsonl').stat().st_size < limit
    action = (f'import resource; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); '
              f'resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))')
    done = run_of(trainer, *resume, cwd=cwd, code=2, patch=AT_STEP.format(step=6, rank=0, action=action) + kill_at(10))
    warned = re.findall(r'warning: could not write out/(\w+)\.pt: .*; the last good checkpoint stays', done.out)
    assert [name for name in warned if name != 'best'] == ['last', 'last']         # at 10, and the stop at 11
    assert 'stopped at step 11, saved only up to step 5; make room and go on with' in one_error(done)
    assert checkpoint(cwd)['step'] == 5 and log(cwd, 'loss') == log(whole, 'loss')[:11]
    assert not [path for path in (cwd / 'out').rglob('*') if 'tmp' in path.name]

    assert 'at step 5' in run_of(trainer, *resume, cwd=cwd).out
    assert_same_run(trainer, cwd, whole)


@every_trainer
def test_nan_on_one_rank_stops_both(two_ranks, folder_of, trainer):
    """Only rank 1 sees the NaN: both leave with status 2, one says why, and names no checkpoint before the first one."""
    cwd = folder_of(trainer)
    done = two_ranks(trainer, cwd=cwd, code=2, patch=NAN_LOSS.format(call=2 + 1, rank=1))
    line = one_error(done[0])
    assert 'at step 1;' in line and 'the last checkpoint is not made yet' in line and done[1].err == ''
    assert not (cwd / 'out' / 'last.pt').exists()


@every_trainer
def test_on_the_cpu_gradients_are_freed_and_nothing_is_compiled(run_of, folder_of, trainer):
    """All gradients of a step are freed before the next one begins; else the peak would hold a copy of all. Where there is a
    GPU --device=cpu does not compile; config.py does not carry one machine's decision to another."""
    cwd = folder_of(trainer)
    run_of(trainer, '--max_iters=2', cwd=cwd, patch="""
import common, torch, weakref
alive = []
def get_total_norm(tensors, plain=torch.nn.utils.get_total_norm):
    alive.extend(weakref.ref(t) for t in tensors)
    return plain(tensors)
torch.nn.utils.get_total_norm = get_total_norm
def seed_step(seed, step, rank, plain=common.seed_step):
    assert not step or alive, 'the norm was taken of nothing'
    assert not any(t() is not None for t in alive), f'gradients of the step before {step} are alive'
    plain(seed, step, rank)
common.seed_step = seed_step
torch.cuda.is_available = lambda: True
def compile(*args, **kwargs):
    raise RuntimeError('compiled')
torch.compile = compile
""")
    assert 'compile = None' in (cwd / 'out' / 'config.py').read_text() or trainer == 'finetune_cls'


@pytest.mark.parametrize('trainer', TRAINERS[:3])
def test_bfloat16_trains_as_float32_does(run_of, folder_of, unbroken_of, trainer):
    """Autocast changes the losses a little, not the course; weights stay float32."""
    exact, cwd = log(unbroken_of(trainer), 'loss'), folder_of(trainer)
    run_of(trainer, '--dtype=bfloat16', '--max_iters=6', cwd=cwd)
    seen = log(cwd, 'loss')[:4]                     # after them the rates of a run of 6 steps are others
    assert seen != exact[:4] and seen == pytest.approx(exact[:4], abs=0.2)
    assert {t.dtype for t in checkpoint(cwd)['model'].values()} <= {torch.float32, torch.int64}


# ------------------------------------------------------------------------------------------------- numbers of processes


@pytest.mark.parametrize('trainer, optimizer', [*((trainer, 'adamw') for trainer in TRAINERS),
                                                ('train_gpt', 'rsvd'), ('train_bitnet', 'muon')])
def test_two_processes_train_as_one(unbroken_of, two_ranks, folder_of, trainer, optimizer):
    """The same records, the same losses to rounding; ranks are equal to the bit before each step."""
    options = () if optimizer == 'adamw' else OPTIMIZERS[trainer]
    one, two = unbroken_of(trainer, *options), folder_of(trainer)
    done = two_ranks(trainer, *options, cwd=two, patch=CHECKSUMS)
    assert ' = 2 x 2 micro-steps x 2 processes' in done[0].out
    same_sums(two, 12)
    tolerance = {'train_cnn': 0.05}.get(trainer, 5e-3)      # a BatchNorm normalizes by the images of one process
    for column in ('loss', 'val_loss'):
        assert log(two, column) == pytest.approx(log(one, column), rel=tolerance)
    if optimizer != 'rsvd':                                 # Adam would hide a factor; a projection makes much of rounding
        assert log(two, 'grad_norm')[:2] == pytest.approx(log(one, 'grad_norm')[:2], rel=tolerance)
    assert [(r['step'], r.keys()) for r in log(two)] == [(r['step'], r.keys()) for r in log(one)]


@every_trainer
def test_a_signal_on_one_rank_stops_both(two_ranks, folder_of, trainer):
    """In a step and, resumed, in an evaluation: both save at one step and end. With dropout, which differs, the ranks stay
    equal."""
    cwd = folder_of(trainer)
    for step, patch in ((2, kill_at(1, rank=1)), (4, IN_EVALUATION.format(after=3, rank=1, signal='SIGTERM'))):
        done = two_ranks(trainer, *BY_STEP[trainer], '--resume=auto', cwd=cwd, patch=patch + CHECKSUMS)
        assert checkpoint(cwd)['step'] == step and f'stopped at step {step};' in done[0].out
        assert step not in evaluated(cwd)
    same_sums(cwd, 4)


def test_two_ranks_make_a_mistake_in_one_line(start, folder_of):
    """Rank 0 says it, once; rank 1 fails too."""
    cwd = folder_of('train_gpt')
    done = wait_all([start(ROOT / 'train_gpt.py', 'tiny.py', '--batch_size=6', cwd=cwd, **r) for r in ranks(2)])
    assert 'batch_size=6 is no multiple of micro_batch_size=2 x 2 processes' in one_error(done[0])
    assert done[1].code != 0 and 'multiple' not in done[1].err and not (cwd / 'out').exists()


BUFFERS = """
import common, torch
rank, local_rank, world, dev = common.setup_processes('cpu')
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
model.register_buffer('table', torch.zeros(4))
ddp = common.distributed(model, dev, local_rank)
model.table.fill_(rank + 1)
ddp(torch.ones(2, 8)).sum().backward()
assert model.table[0] == rank + 1, 'a buffer was sent'
a, b = (model[i].weight.grad.untyped_storage().data_ptr() for i in (0, 1))
assert a == b, 'each gradient exists a second time, in the bucket'
common.close_processes()
"""


def test_distributed_sends_no_buffers_and_keeps_one_copy_of_gradients(start, tmp_path):
    """Rotary tables and BatchNorm statistics stay where they are; gradients are views into the buckets that are sent."""
    (tmp_path / 'buffers.py').write_text(BUFFERS)
    done = wait_all([start('buffers.py', cwd=tmp_path, **r) for r in ranks(2)])
    assert [(d.code, d.err) for d in done] == [(0, '')] * 2


# ------------------------------------------------------------------------------------------------------------- refusing


# Options that change what a model computes, but not its shapes.
FUNCTION = {'train_gpt': ('init_from', '--n_head=4', 'good.pt has another n_head (2, not 4); type --n_head=2'),
            'train_bitnet': ('init_from', '--rope_theta=5e5', 'another rope_theta (10000.0, not 500000.0); type --rope_theta='),
            'train_cnn': ('init_from', '--norm=spatial', "another norm (channel, not spatial); type --norm=channel"),
            'finetune_cls': ('resume', '--n_head=1', 'another n_heads (2, not 1); the model has changed')}


@every_trainer
def test_foreign_checkpoints_are_refused_in_one_line(refused, folder_of, unbroken_of, trainer):
    """Not there, of another trainer, without a tensor, of another size, function or optimizer: each line names the file."""
    good, cwd = checkpoint(unbroken_of(trainer)), folder_of(trainer)
    lost = list(good['model'])[3]
    other = next(t for t in TRAINERS if t != trainer)
    files = {'other': good | {'trainer': other}, 'good': good,
             'less': good | {'model': {k: v for k, v in good['model'].items() if k != lost}}}
    for name, state in files.items():
        torch.save(state, cwd / f'{name}.pt')
    modes = ('resume', 'init_from') if trainer != 'finetune_cls' else ('resume',)
    cases = [((f'--{mode}={name}.pt',), words) for mode in modes for name, words in (
        ('nosuch', 'nosuch.pt does not exist'), ('other', f'other.pt was written by {other}.py, not {trainer}.py'))]
    cases += [(('--resume=less.pt',), f'less.pt does not fit this model: it lacks {lost}'),
              (('--resume=good.pt', '--channels=4,4,8,8,4' if trainer == 'train_cnn' else '--n_embd=64'), 'good.pt')]
    mode, option, words = FUNCTION[trainer]
    cases += [((f'--{mode}=good.pt', option), words)]
    if trainer in OPTIMIZERS:
        optimizer, *others = OPTIMIZERS[trainer]
        name, resume = optimizer.split('=')[1], f'--resume={unbroken_of(trainer, *OPTIMIZERS[trainer])}/out/last.pt'
        cases += [((resume, *others), f'out/last.pt has another optimizer ({name}, not adamw)')]
        cases += [((resume, optimizer, *others, '--rank=3'), 'another rank (4, not 3)')] * (name == 'rsvd')
    refused(trainer, cases, cwd)


# -------------------------------------------------------------------------------------------------------------- details


@pytest.mark.parametrize('trainer', ['train_gpt', 'train_bitnet'])
def test_the_projected_backward_pass_changes_no_loss(run_of, folder_of, trainer):
    """With the whole batch in one micro-step the losses are those of full gradients, to rounding, in fewer bytes of them."""
    options, losses = ('--optimizer=rsvd', '--rank=4', '--interval=5', '--micro_batch_size=8'), []
    options += ('--c_proj=fp', '--qkv_proj=bin', '--mlp_proj=bin') if trainer == 'train_gpt' else ('--quant=fp',)
    for projected in (True, False):
        cwd = folder_of(trainer)
        done = run_of(trainer, *options, f'--projected={projected}', cwd=cwd)
        printed = re.search(r'projected backward pass: (\d+) weights', done.out)
        assert int(printed[1]) == {'train_gpt': 5, 'train_bitnet': 4}[trainer] if projected else not printed
        losses.append(log(cwd, 'loss'))
    assert losses[0][:6] == pytest.approx(losses[1][:6], rel=1e-5)      # the second basis multiplies roundings
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize('trainer, key', [
    ('train_gpt', 'exp_avg_sq'), ('train_gpt', 'basis'), ('train_bitnet', 'momentum_buffer')])
def test_optimizer_bytes_in_the_log_are_those_of_the_checkpoint(unbroken_of, trainer, key):
    """The log has the sum over the saved tensors; rsvd and muon keep less than AdamW's two numbers a weight."""
    cwd = unbroken_of(trainer, *(() if key == 'exp_avg_sq' else OPTIMIZERS[trainer]))
    state = checkpoint(cwd)
    assert any(key in s for s in state['optimizer']['state'].values())
    saved = sum(t.nbytes for s in state['optimizer']['state'].values() for t in s.values() if torch.is_tensor(t))
    assert log(cwd, 'optimizer_bytes')[-1] == saved
    parameters = sum(t.numel() for n, t in state['model'].items() if n != 'lm_head.weight')
    assert (saved > 8 * parameters) if key == 'exp_avg_sq' else (saved < 7 * parameters)


# ------------------------------------------------------------------------------------------------------ language models


LANGUAGE = [*(('gpt', kind) for kind in layers.KINDS), ('bitnet', 'tern'), ('bitnet', 'fp')]
every_language_model = pytest.mark.parametrize('family, kind', LANGUAGE)


def language_model(family, kind, times=1, **options):
    """A GPT or BitNet of random weights, times a factor that takes it away from its small initial weights."""
    model = (tiny_gpt if family == 'gpt' else tiny_bitnet)(kind, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(times)
    return model


@every_language_model
def test_a_later_token_changes_no_earlier_logit(family, kind):
    model, ids = language_model(family, kind, times=3 if family == 'gpt' else 1), random_ids(2, 16)
    before = all_logits(model, ids)
    for at in (0, 5, 15):
        changed = ids.clone()
        changed[:, at] = (ids[:, at] + 7) % 64
        after = all_logits(model, changed)
        assert torch.allclose(after[:, :at], before[:, :at], atol=1e-6, rtol=0)
        moved = (after[:, at:] - before[:, at:]).abs().amax(-1) > 1e-5
        # each later one does change; only int8 activations may swallow it here and there
        assert moved.all() if kind != 'tern' else moved[:, 0].all() and moved.float().mean() > 0.9


@every_language_model
def test_first_loss_is_that_of_guessing(family, kind):
    """ln(vocab) within 0.1 before any step, whatever the weights are made of, however deep."""
    ids = random_ids(8, 17)
    for n_layer in (1, 8):
        more = {'blocks': range(n_layer)} if family == 'gpt' else {}
        model = language_model(family, kind, vocab_size=256, n_layer=n_layer, **more)
        assert model(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(math.log(256), abs=0.1)


@pytest.mark.parametrize('family, kind', [('gpt', 'bin'), ('bitnet', 'tern')])
def test_loss_is_the_mean_cross_entropy_of_the_logits(family, kind):
    """Against the formula: mean over positions of log sum exp z - z[target]; the last position's logits agree."""
    model, ids = language_model(family, kind), random_ids(3, 17)
    z = all_logits(model, ids[:, :-1]).double()
    by_hand = (z.exp().sum(-1).log() - z.gather(-1, ids[:, 1:, None])[..., 0]).mean()
    assert model(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(by_hand.item(), abs=1e-5)
    assert torch.allclose(model(ids[:, :-1])[:, 0], z[:, -1].float(), atol=1e-6)


@pytest.mark.parametrize('family, kind, prompt, options', [
    *(('gpt', kind, prompt, {'binary_alpha_out': 0.5}) for kind, prompt in (
        ('fp', 5), ('bin', 40), ('tern', 16), ('int4', 1))),
    *(('bitnet', kind, prompt, {'n_kv_head': n}) for kind, n, prompt in (('tern', 1, 5), ('tern', 4, 40), ('fp', 2, 16)))])
def test_cached_generation_equals_the_plain_one(family, kind, prompt, options):
    """Temperature 0, 40 tokens, far across block_size 16, from prompts shorter and longer than it, with fewer heads of keys.

    The window by hand: it starts at the last 16 tokens and grows; when it holds 16, it starts again from the later 8."""
    model, ids = language_model(family, kind, times=4, **options), random_ids(1, prompt)
    cached = [int(t) for t in sample.generate(model, ids, 40, 64, temperature=0)]
    plain, begin = ids, max(0, prompt - 16)
    for i in range(40):
        if i and plain.shape[1] - 1 - begin == 16:      # in the cache when the next token is to be fed
            begin = plain.shape[1] - 8
        logits = all_logits(model, plain[:, begin:])[0, -1]
        assert int(logits.argmax()) == cached[i], i
        plain = torch.cat([plain, logits.argmax()[None, None]], 1)
    assert len(cached) == 40 and len(set(cached)) > 1


# ------------------------------------------------------------------------------------------------ waiting for the device


@every_trainer
def test_a_step_waits_once_for_the_device(run_of, folder_of, trainer):
    """Loss, gradient norm and stop flag come in one vector; nothing else in a step between evaluations reads the device."""
    quiet = ['--diag_interval=0'] * (trainer == 'train_bitnet')
    done = run_of(trainer, '--eval_interval=100', '--save_interval=100', '--grad_clip=0.5', *quiet, cwd=folder_of(trainer),
                  patch=COUNT_WAITS)
    waits = [int(n) for n in re.findall(r'before step \d+ (\d+)', done.out)]
    found = [b - a for a, b in zip(waits, waits[1:], strict=False)]
    assert len(found) > 5 and statistics.median(found) == min(found) == 1, found
    assert trainer == 'finetune_cls' or set(found) == {1}, found        # an epoch of fine-tuning also measures
