"""Tiny runs of the four trainers, what a test does to them, and how their results are compared. Used by tests and by
results/faults.py; not by pytest alone, so nothing here is a fixture."""
import csv

import numpy as np
import torch

import common
from readers import images, tokens

COMMON = """
out_dir, device = 'out', 'cpu'
max_iters, warmup_iters, eval_interval, log_interval, save_interval = 12, 2, 4, 1, 5
batch_size, micro_batch_size, learning_rate = 8, 2, 1e-3
"""
SIZE = "n_head, n_embd, block_size, eval_iters = 2, 32, 32, 2\n"
TINY = {
    'train_gpt': SIZE + "dataset, n_layer, n_binary, qkv_proj, c_proj, mlp_proj = {text!r}, 2, 1, 'bin', 'tern', 'int4'\n",
    'train_bitnet': SIZE + "dataset, n_layer, n_kv_head, n_ff, diag_interval = {text!r}, 1, 1, 64, 3\n",
    'train_cnn': "dataset, image_size, channels, fc, num_workers = {images!r}, 16, (4, 4, 8, 8, 8), (8, 8), 0\n"
                 "eval_batch_size, model_config = 5, dict(conv2='binary', conv3='ternary', conv6='int4', fc1='binary')\n",
    'finetune_cls': "task, train_file, eval_file, text_columns = 'csv', {table!r}, {table!r}, ('text',)\n"
                    "init_from, n_layer, n_head, n_embd, vocab_size, max_len, keep_best = 'scratch', 1, 2, 16, 64, 12, True\n"
                    "dropout, eval_batch_size = 0.0, 10\n",
}
TRAINERS = list(TINY)
# What depends on the step, besides the learning rate.
BY_STEP = dict.fromkeys(TRAINERS, ('--dropout=0.2', '--ramp=0.7')) | {
    'train_bitnet': ('--ramp=0.7',), 'finetune_cls': ('--dropout=0.2',)}
# Interval 11: step 10 uses the basis of step 0, step 11 another one.
OPTIMIZERS = {'train_gpt': ('--optimizer=rsvd', '--rank=4', '--interval=11', '--n_binary=0'),
              'train_bitnet': ('--optimizer=muon', '--quant=fp'),
              'train_cnn': ('--optimizer=rsvd', '--rank=4', '--interval=11')}
LAST_FILES = dict.fromkeys(TRAINERS, ['packed.safetensors']) | {'finetune_cls': ['predictions.csv', 'epoch_loss.csv']}
MEASURED = {'max_iters', 'ms', 'tokens_per_s', 'samples_per_s', 'input_samples_per_s', 'peak_mem_bytes', 'energy_j'}
WATCHED = {'samples_per_s', 'input_samples_per_s', 'peak_bytes', 'resident_bytes', 'gradient_bytes'} | MEASURED

# ---------------------------------------------------------------------------------------------------------------------
# What a test does to a running trainer, as source text run before it. Each finds the trainer by what it calls.
AT_STEP = """
import common, os, signal
def seed_step(seed, step, rank, plain=common.seed_step):
    if step == {step} and rank == {rank}:
        {action}
    plain(seed, step, rank)
common.seed_step = seed_step
"""
IN_EVALUATION = """
import common, os, signal, torch
begun = []
def seed_step(seed, step, rank, plain=common.seed_step):
    begun[:] = [step]
    plain(seed, step, rank)
def cross_entropy(*args, plain=torch.nn.functional.cross_entropy, **kwargs):
    if not torch.is_grad_enabled() and begun == [{after}] and os.environ.get('RANK', '0') == '{rank}':
        begun.append('signalled')
        os.kill(os.getpid(), signal.{signal})
    return plain(*args, **kwargs)
common.seed_step, torch.nn.functional.cross_entropy = seed_step, cross_entropy
"""
NAN_LOSS = """
import os, torch
plain, calls = torch.nn.functional.cross_entropy, []
def cross_entropy(*args, **kwargs):
    calls.extend([1] * torch.is_grad_enabled())
    bad = torch.is_grad_enabled() and len(calls) == {call} and os.environ.get('RANK', '0') == '{rank}'
    return plain(*args, **kwargs) * (float('nan') if bad else 1.0)
torch.nn.functional.cross_entropy = cross_entropy
"""
NO_PICTURES = "from report import pictures; pictures.report = lambda *args: None\n"
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


def kill_at(step, number='SIGTERM', rank=0):
    return AT_STEP.format(step=step, rank=rank, action=f'os.kill(os.getpid(), signal.{number})')


def bad_gradient(step, name, value):
    """In this step the gradient of the parameter `name` is multiplied by nan or inf."""
    return AT_STEP.format(step=step, rank=0, action=f"""
        import sys
        main = sys._getframe(1).f_locals
        parameter = (main.get('raw_model') or main.get('raw_net')).get_parameter('{name}')
        parameter.register_hook(lambda g: g * float('{value}'))""")


# ---------------------------------------------------------------------------------------------------------------------


def write_text(folder):
    """40,000 training and 4,000 validation bytes of a text a tiny model can learn something about."""
    random = np.random.default_rng(0)
    words = 'one two three four five six seven eight nine ten and or not so'.split()
    text = ' '.join(random.choice(words, 12000)).encode()
    ids = np.frombuffer(text, dtype=np.uint8)
    tokens.write(folder, 'train', [ids[:40000]], tokens.byte())
    tokens.write(folder, 'val', [ids[40000:44000]], tokens.byte())


def write_data(folder):
    """{text, images, table}: paths of data in the folder that each trainer reads."""
    random = np.random.default_rng(0)
    write_text(folder / 'text')
    pixels = random.integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    entries = [(str(i), i % 3, b'P6 16 16 255\n' + p.tobytes()) for i, p in enumerate(pixels)]
    splits = {'train': entries, 'val': entries}
    images.build(folder / 'images', dict(source='here', revision='1'), splits, list('abc'), 16, 1, [])
    with open(folder / 'table.csv', 'w', newline='') as f:
        words = ('good film', 'fine work', 'bad film', 'dull work')
        csv.writer(f).writerows([('text', 'label'), *((words[i % 4], 'np'[i % 4 < 2]) for i in range(32))])
    return {'text': str(folder / 'text'), 'images': str(folder / 'images'), 'table': str(folder / 'table.csv')}


# ---------------------------------------------------------------------------------------------------------------------


def log(where, only=None, without=MEASURED):
    """The records of a run without what is measured; only='loss' or 'val_loss': that column."""
    records = [{k: v for k, v in r.items() if k not in without} for r in common.read_log(where / 'out')]
    return records if only is None else [r[only] for r in records if only in r]


def checkpoint(where, name='last.pt'):
    return common.read_checkpoint(str(where / 'out' / name))


def flat(state, prefix=''):
    """{path: number or tensor} of nested dicts and lists."""
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else None
    if items is None:
        return {prefix: state}
    return {k: v for key, value in items for k, v in flat(value, f'{prefix}/{key}').items()}


def assert_same_state(one, two, keys=None):
    """All of two checkpoints (or some keys of them) but times, the command line and the loss scale, bit for bit."""
    some = lambda state: flat({k: state[k] for k in keys or state.keys() - {'config', 'meter', 'scaler'} if k in state})
    x, y = some(one), some(two)
    assert x.keys() == y.keys() and len(x) > 10
    wrong = [k for k in x if not (torch.equal(x[k], y[k]) if torch.is_tensor(x[k]) else x[k] == y[k])]
    assert not wrong, wrong


def assert_same_run(trainer, a, b):
    """Last and best weights, optimizer, log and the files made at the end."""
    assert_same_state(checkpoint(a), checkpoint(b))
    assert_same_state(checkpoint(a, 'best.pt'), checkpoint(b, 'best.pt'), ('step', 'model', 'best_val_loss', 'best'))
    assert log(a, without=WATCHED) == log(b, without=WATCHED)
    for name in LAST_FILES[trainer]:
        assert (a / 'out' / name).read_bytes() == (b / 'out' / name).read_bytes(), name
