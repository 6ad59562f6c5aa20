"""What all trainers promise alike: a claim a test, a trainer a parameter. What one of them does alone is in its own file."""
import csv
import re

import numpy as np
import pytest
import torch

import common
from conftest import NAN_LOSS, ROOT, assert_same_state, kill_at, log, one_error, ranks, wait_all
from readers import images

COMMON = """
out_dir, device = 'out', 'cpu'
max_iters, warmup_iters, eval_interval, log_interval, save_interval = 12, 2, 4, 1, 4
batch_size, micro_batch_size, learning_rate = 8, 2, 3e-3
"""
SIZE = "n_layer, n_head, n_embd, block_size, eval_iters = 2, 2, 32, 32, 2\n"
TINY = {
    'train_gpt': SIZE + "dataset, n_binary, c_proj = {text!r}, 1, 'tern'\n",
    'train_bitnet': SIZE + "dataset, n_kv_head, n_ff, quant = {text!r}, 1, 64, 'fp'\n",
    'train_cnn': "dataset, image_size, channels, fc, num_workers = {images!r}, 16, (4, 4, 8, 8, 8), (8, 8), 0\n"
                 "model_config = dict(conv2='binary', conv3='ternary', fc1='binary')\n",
    'finetune_cls': "task, train_file, eval_file, text_columns = 'csv', {table!r}, {table!r}, ('text',)\n"
                    "init_from, n_layer, n_head, n_embd, vocab_size, max_len, keep_best = 'scratch', 1, 2, 16, 64, 12, True\n",
}
TRAINERS = list(TINY)
# A write that fails as on a full disk: `where` is a condition on path, a str, and on done, the paths written before.
DISK = """
import common
done = []
def atomic_write(path, write, plain=common.atomic_write):
    path = str(path)
    done.append(path)
    if {where}:
        raise OSError(f'could not write {{path}}: No space left on device')
    plain(path, write)
common.atomic_write = atomic_write
"""
CHECKSUMS = """
import common, sys, torch
def seed_step(seed, step, rank, plain=common.seed_step):
    main = sys._getframe(1).f_locals
    tensors = list(main['raw_model'].parameters())
    tensors += [t for s in main['opt'].state.values() for t in s.values() if torch.is_tensor(t)]
    with open(f'sums{rank}', 'a') as f:
        print(common.checksum(tensors), file=f)
    plain(seed, step, rank)
common.seed_step = seed_step
"""


@pytest.fixture(scope='module')
def data(tmp_path_factory, tiny_data):
    """{text, images, table}: paths of data that each trainer reads."""
    folder, random = tmp_path_factory.mktemp('data'), np.random.default_rng(0)
    pixels = random.integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    entries = [(str(i), i % 3, b'P6 16 16 255\n' + p.tobytes()) for i, p in enumerate(pixels)]
    splits = {'train': entries, 'val': entries}
    images.build(folder / 'images', dict(source='here', revision='1'), splits, list('abc'), 16, 1, [])
    with open(folder / 'table.csv', 'w', newline='') as f:
        words = ('good film', 'fine work', 'bad film', 'dull work')
        csv.writer(f).writerows([('text', 'label'), *((words[i % 4], 'np'[i % 4 < 2]) for i in range(32))])
    return {'text': str(tiny_data), 'images': str(folder / 'images'), 'table': str(folder / 'table.csv')}


@pytest.fixture
def folder(tmp_path_factory, data):
    """folder(trainer) -> a new folder holding tiny.py, a config of a dozen steps."""
    def make(trainer):
        new = tmp_path_factory.mktemp(trainer)
        (new / 'tiny.py').write_text(COMMON + TINY[trainer].format(**data))
        return new
    return make


@pytest.fixture
def train(start):
    """train(trainer, *options, cwd=..., code=0, patch='') -> Result of one run."""
    def run(trainer, *options, cwd, code=0, **how):
        done = start(ROOT / f'{trainer}.py', 'tiny.py', *options, cwd=cwd, **how).wait()
        assert done.code == code and 'Traceback' not in done.err, (done.code, done.out, done.err)
        return done
    return run


def best_of(cwd):
    return common.read_checkpoint(str(cwd / 'out' / 'best.pt'))


@pytest.mark.parametrize('trainer', TRAINERS)
def test_a_best_that_was_not_saved_does_not_count(train, folder, trainer):
    """The first best.pt meets a full disk. The next evaluation finds the same loss, and it is the best on disk."""
    cwd = folder(trainer)
    done = train(trainer, '--learning_rate=1e-30', '--min_lr=0', cwd=cwd,
                 patch=DISK.format(where="path.endswith('best.pt') and done.count(path) == 1"))
    assert done.out.count('could not write out/best.pt') == 1
    first = min(r['step'] for r in log(cwd) if 'val_loss' in r)
    assert best_of(cwd)['step'] >= first + 4


@pytest.mark.parametrize('trainer', TRAINERS)
def test_two_processes_agree_on_a_best_that_was_not_saved(start, folder, trainer):
    """Only rank 0 writes and meets the full disk; both take the next evaluation for the best and end alike."""
    cwd = folder(trainer)
    patch = DISK.format(where="path.endswith('best.pt') and done.count(path) == 1")
    done = wait_all([start(ROOT / f'{trainer}.py', 'tiny.py', '--learning_rate=1e-30', '--min_lr=0', cwd=cwd, patch=patch, **r)
                     for r in ranks(2)], timeout=100)
    assert [d.code for d in done] == [0, 0], done[0].err + done[1].err
    assert best_of(cwd)['step'] >= min(r['step'] for r in log(cwd) if 'val_loss' in r) + 4


@pytest.mark.parametrize('trainer', TRAINERS)
def test_no_gradient_lives_through_the_next_forward_pass(train, folder, trainer):
    """Every gradient that a step was made of is freed before the next one begins: else a copy of all lies in the peak."""
    cwd = folder(trainer)
    train(trainer, '--max_iters=3', cwd=cwd, patch="""
import common, torch, weakref
alive, seen = [], []
def get_total_norm(tensors, plain=torch.nn.utils.get_total_norm):
    alive.extend(weakref.ref(t) for t in tensors)
    return plain(tensors)
torch.nn.utils.get_total_norm = get_total_norm
def seed_step(seed, step, rank, plain=common.seed_step):
    assert not step or alive, 'the norm was taken of nothing'
    assert not any(t() is not None for t in alive), f'gradients of the step before {step} are alive'
    alive.clear()
    plain(seed, step, rank)
common.seed_step = seed_step
""")


def test_a_lost_best_of_a_classifier_is_one_line(train, folder):
    """best.pt of keep_best is gone when the figures are made: one line says how to get those of the last weights."""
    cwd = folder('finetune_cls')
    train('finetune_cls', cwd=cwd)
    (cwd / 'out' / 'best.pt').unlink()
    line = one_error(train('finetune_cls', '--resume=auto', cwd=cwd, code=2))
    assert 'out/best.pt does not exist; type --keep_best=False --resume=auto' in line
    (cwd / 'out' / 'predictions.csv').unlink()
    train('finetune_cls', '--keep_best=False', '--resume=auto', cwd=cwd)
    assert (cwd / 'out' / 'predictions.csv').exists()


@pytest.mark.parametrize('trainer, file', [('train_gpt', 'packed.safetensors'), ('train_bitnet', 'packed.safetensors'),
                                           ('train_cnn', 'packed.safetensors'), ('finetune_cls', 'predictions.csv')])
def test_a_full_disk_at_the_end_is_one_line(train, folder, trainer, file):
    """What is written last does not fit: exit status 2, one line that says what to do, and doing it ends the run."""
    cwd = folder(trainer)
    done = train(trainer, cwd=cwd, code=2, patch=DISK.format(where=f"path.endswith('{file}')"))
    assert re.search(rf'could not write out/{file}: .*make room and type the same command with --resume=auto', one_error(done))
    train(trainer, '--resume=auto', cwd=cwd)
    assert (cwd / 'out' / file).exists()


@pytest.mark.parametrize('trainer', TRAINERS)
def test_a_loss_that_is_nan_before_the_first_checkpoint(train, folder, trainer):
    """Step 1 of 12: there is no checkpoint yet, and the message does not name one."""
    cwd = folder(trainer)
    line = one_error(train(trainer, cwd=cwd, code=2, patch=NAN_LOSS.format(call=4 + 1, rank=0)))
    assert 'at step 1;' in line and 'the last checkpoint is not made yet' in line


@pytest.mark.parametrize('trainer', TRAINERS)
def test_compile_is_decided_where_the_run_is(train, folder, trainer):
    """On a machine with a GPU --device=cpu does not compile; config.py does not carry one machine's decision to another."""
    cwd = folder(trainer)
    train(trainer, '--max_iters=2', cwd=cwd, patch="""
import torch
torch.cuda.is_available = lambda: True
def compile(*args, **kwargs):
    raise RuntimeError('compiled')
torch.compile = compile
""")
    assert 'compile = None' in (cwd / 'out' / 'config.py').read_text() or trainer == 'finetune_cls'


OPTIMIZERS = [(trainer, name) for trainer in TRAINERS[:3] for name in ('rsvd', 'muon')]


@pytest.mark.parametrize('trainer, name', OPTIMIZERS)
def test_every_optimizer_resumes_exactly(train, folder, trainer, name):
    """Stopped between two bases of rsvd and resumed: the weights, the state and the log of an unbroken run."""
    options = f'--optimizer={name}', '--rank=4', '--interval=5'
    whole, cwd = folder(trainer), folder(trainer)
    train(trainer, *options, cwd=whole)
    assert 'stopped at step 8' in train(trainer, *options, cwd=cwd, patch=kill_at(7)).out
    assert 'resumed from' in train(trainer, *options, '--resume=auto', cwd=cwd).out
    a, b = (common.read_checkpoint(str(c / 'out' / 'last.pt')) for c in (cwd, whole))
    assert_same_state(*({'best_val_loss': None} | state for state in (a, b)))
    assert log(cwd) == log(whole)
    kinds = {tuple(sorted(s)) for s in b['optimizer']['state'].values()}
    assert {'rsvd': any('basis' in k for k in kinds), 'muon': ('momentum_buffer',) in kinds}[name]


@pytest.mark.parametrize('trainer, name', OPTIMIZERS)
def test_every_optimizer_trains_alike_on_two_processes(train, start, folder, trainer, name):
    """Two processes see the same batches as one: the same losses to rounding, and bit-equal ranks after every step."""
    options = f'--optimizer={name}', '--rank=4', '--interval=5', '--learning_rate=1e-3'
    one, two = folder(trainer), folder(trainer)
    train(trainer, *options, cwd=one)
    for done in wait_all([start(ROOT / f'{trainer}.py', 'tiny.py', *options, cwd=two, patch=CHECKSUMS, **r) for r in ranks(2)]):
        assert done.code == 0, done.err
    sums = [(two / f'sums{r}').read_text().split() for r in (0, 1)]
    assert sums[0] == sums[1] and len(set(sums[0])) == 12
    tolerance = {'train_cnn': 0.05}.get(trainer, 5e-3)       # a BatchNorm normalises by the images of one process
    assert log(two, 'loss') == pytest.approx(log(one, 'loss'), rel=tolerance)


@pytest.mark.parametrize('trainer', ['train_gpt', 'train_bitnet'])
def test_the_projected_backward_pass_changes_no_loss(train, folder, trainer):
    """With the whole batch in one micro-step the losses are those of full gradients, to rounding, in fewer bytes of them."""
    options, losses = ('--optimizer=rsvd', '--rank=4', '--interval=5', '--micro_batch_size=8', '--c_proj=fp'), []
    options = options if trainer == 'train_gpt' else options[:-1]
    for projected in (True, False):
        cwd = folder(trainer)
        done = train(trainer, *options, f'--projected={projected}', cwd=cwd)
        found = re.search(r'projected backward pass: (\d+) weights', done.out)
        assert int(found[1]) == {'train_gpt': 5, 'train_bitnet': 8}[trainer] if projected else not found
        losses.append(log(cwd, 'loss'))
    assert losses[0][:6] == pytest.approx(losses[1][:6], rel=1e-5)      # the second basis multiplies roundings
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize('trainer, name', OPTIMIZERS)
def test_a_checkpoint_of_another_optimizer_is_refused(train, folder, trainer, name):
    cwd = folder(trainer)
    train(trainer, '--max_iters=4', f'--optimizer={name}', '--rank=4', cwd=cwd)
    line = one_error(train(trainer, '--resume=auto', cwd=cwd, code=2))
    assert f'another optimizer ({name}, not adamw)' in line
    if name == 'rsvd':
        line = one_error(train(trainer, '--resume=auto', '--optimizer=rsvd', '--rank=3', cwd=cwd, code=2))
        assert 'another rank (4, not 3)' in line


@pytest.mark.parametrize('name', ['adamw', 'rsvd', 'muon'])
def test_optimizer_bytes_in_the_log_are_those_of_the_checkpoint(train, folder, name):
    """What the log says is the sum over the saved tensors; rsvd and muon keep less than AdamW's two numbers a weight."""
    cwd = folder('train_gpt')
    train('train_gpt', f'--optimizer={name}', '--rank=4', '--interval=5', cwd=cwd)
    state = common.read_checkpoint(str(cwd / 'out' / 'last.pt'))
    saved = sum(t.nbytes for s in state['optimizer']['state'].values() for t in s.values() if torch.is_tensor(t))
    assert log(cwd, 'optimizer_bytes')[-1] == saved
    parameters = sum(t.numel() for n, t in state['model'].items() if n != 'lm_head.weight')
    assert (saved > 8 * parameters) if name == 'adamw' else (saved < 7 * parameters)


BUFFERS = """
import common, os, torch
import torch.distributed as dist
rank, local_rank, world, dev = common.setup_processes('cpu')
torch.manual_seed(0)
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
    assert [d.code for d in done] == [0, 0], [d.err for d in done]


def test_tasks_are_scored_in_evaluation_mode(train, folder, tmp_path):
    """Every answer of train_bitnet.py comes from a model in evaluation; it trains on in training mode."""
    from readers import tasks, tokens
    lines = ''.join(f'{tasks.problem(a, "-", a)}\n' for a in range(1, 100))
    for split in tokens.SPLITS:
        tokens.write(tmp_path / 'sums', split, [tokens.byte().encode(lines)], tokens.byte())
    cwd = folder('train_bitnet')
    train('train_bitnet', f'--dataset={tmp_path / "sums"}', '--task=arithmetic', cwd=cwd, patch="""
from readers import tasks
def next_logits(model, *args, plain=tasks.next_logits):
    assert not model.training
    open('scored', 'a').write('x')
    return plain(model, *args)
tasks.next_logits = next_logits
import common
def seed_step(seed, step, rank, plain=common.seed_step):
    import sys
    assert sys._getframe(1).f_locals['raw_model'].training
    plain(seed, step, rank)
common.seed_step = seed_step
""")
    assert (cwd / 'scored').exists()
