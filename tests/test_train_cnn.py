"""train_cnn.py as people run it: its steps by hand, its size, every kind of layer in every place, a photograph's classes,
mistakes in one line. What it shares with other trainers is in test_trainers.py."""
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import common
import layers
import train_cnn
from conftest import MEASURED, ROOT, assert_same_state, checkpoint, kill_at, log, one_error, ranks, wait_all
from readers import crops, images

SCRIPT = ROOT / 'train_cnn.py'
TINY = """# a CNN of four to eight channels that trains 12 steps in half a second
dataset, out_dir, device, compile = {data!r}, 'out', 'cpu', False
image_size, channels, fc = 16, (4, 4, 8, 8, 8), (8, 8)
batch_size, micro_batch_size, eval_batch_size = 8, 4, 5
max_iters, warmup_iters, eval_interval, log_interval, save_interval, learning_rate = 12, 2, 4, 1, 5, 1e-2
"""
COLORS = [(220, 40, 40), (40, 220, 40), (40, 40, 220), (200, 200, 30), (30, 200, 200), (120, 120, 120)]
N_TRAIN, N_VAL = 49, 19         # no multiple of a batch; images of COLORS' classes 'c0' to 'c5'
LAYERS = [*(f'conv{i}' for i in range(1, 11)), 'fc1', 'fc2', 'final']


def kinds(*names):
    """--model_config with these kinds over and over."""
    return f'--model_config={dict(zip(LAYERS, names * 13, strict=False))}'


MIXED = (kinds('real', 'int4', 'binary', 'ternary', 'binary', 'binary'), '--dropout=0.2')
NO_BATCHNORM = (kinds('binary'), '--residual=False')

# What the trainer reports at its end, as numbers, not drawn.
REPORT = PATCH = """
import numpy
from report import pictures
pictures.report = lambda out_dir, data, guesses, surety: numpy.savez(out_dir + '/report.npz', guesses=guesses, surety=surety)
"""
# The trainer's own variables in a step, taken from the function that it calls there.
RATES = """
import common, json, sys
def seed_step(seed, step, rank, plain=common.seed_step):
    main = sys._getframe(1).f_locals
    names = {id(p): name for name, p in main['raw_model'].named_parameters()}
    groups = [(names[id(p)], g['lr'], g['weight_decay']) for g in main['opt'].param_groups for p in g['params']]
    with open('rates', 'a') as f:
        print(json.dumps(groups), file=f)
    plain(seed, step, rank)
common.seed_step = seed_step
"""


# ------------------------------------------------------------------------------------------------------------ fixtures


def build(out, classes, size, **splits):
    """A data folder of {split: [(pixels, label), ...]}."""
    entries = lambda items: [(str(i), label, b'P6 %d %d 255\n' % pixels.shape[1::-1] + pixels.tobytes())
                             for i, (pixels, label) in enumerate(items)]
    images.build(out, dict(source='here', revision='1'), {split: entries(items) for split, items in splits.items()}, classes,
                 size, 1, [])
    return out


def noisy(color, draw):
    return (np.array(COLORS[color]) + draw.normal(0, 25, (24, 30, 3))).clip(0, 255).astype(np.uint8)


def ten_images(out, val_labels):
    """Ten images of ten classes, the same ones to train on and to evaluate."""
    pixels = np.random.default_rng(3).integers(0, 256, (10, 16, 16, 3), dtype=np.uint8)
    labeled = lambda labels: zip(pixels, labels, strict=True)
    return build(out, list('abcdefghij'), 16, train=labeled(range(10)), val=labeled(val_labels))


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """A data folder of noisy pictures of 30 x 24 pixels, one class after the other, stored as squares of 20."""
    draw = np.random.default_rng(1)
    some = lambda n: [(noisy(i % 6, draw), i % 6) for i in range(n)]
    return build(tmp_path_factory.mktemp('data'), [f'c{i}' for i in range(6)], 20, train=some(N_TRAIN), val=some(N_VAL))


@pytest.fixture(scope='session')
def other_data(tmp_path_factory):
    return ten_images(tmp_path_factory.mktemp('other'), range(10))


@pytest.fixture(scope='module')
def train_in_turn(in_turn):
    """train_in_turn([(cwd, options), ...], patch='') -> the Results of runs of tiny.py with these options, in one process."""
    def run(commands, patch=''):
        done = in_turn([(SCRIPT, cwd, ['tiny.py', *options]) for cwd, options in commands], patch=REPORT + patch)
        assert [result.code for result in done] == [0] * len(done), [result.err for result in done]
        return done
    return run


@pytest.fixture(scope='module')
def folder(tmp_path_factory, data):
    """folder() -> a new folder holding tiny.py, the config all runs start from."""
    def make():
        new = tmp_path_factory.mktemp('run')
        (new / 'tiny.py').write_text(TINY.format(data=str(data)))
        return new
    return make


def assert_same_run(a, b):
    assert_same_state(checkpoint(a), checkpoint(b))
    assert_same_state(checkpoint(a, 'best.pt'), checkpoint(b, 'best.pt'), ('step', 'model', 'best'))
    assert log(a) == log(b)
    assert (a / 'out' / 'packed.safetensors').read_bytes() == (b / 'out' / 'packed.safetensors').read_bytes()


def run_ranks(start, cwd, world, *options, patch=''):
    done = wait_all([start(SCRIPT, 'tiny.py', *options, cwd=cwd, patch=REPORT + patch, **r) for r in ranks(world)])
    assert [(d.code, d.err) for d in done] == [(0, '')] * world
    return done


def assert_close_runs(a, b, columns=('loss', 'val_loss')):
    for column in columns:
        assert len(log(a, column)) > 1 and log(b, column) == pytest.approx(log(a, column), abs=1e-5, rel=0), column
    for column in ('top1', 'top5'):
        assert log(a, column) == log(b, column)


def model_of(saved):
    """The network of a checkpoint, with its weights."""
    model = train_cnn.CNN(train_cnn.CNNConfig(**saved['model_config']))
    model.load_state_dict(saved['model'])
    return model.eval()


@torch.no_grad()
def logits(model, data, crop=1.0):
    """(n, classes) of the val split, five images at a time as in TINY."""
    split, parts = images.load(data, 'val'), []
    for at in range(0, len(split), 5):
        pixels = torch.from_numpy(np.array(split.pixels[at:at + 5]))
        x = crops.network_input(pixels, *crops.middle_boxes(len(pixels), crop), 16, split.mean, split.std)
        parts.append(model.eval()(x))
    return torch.cat(parts)


# ----------------------------------------------------------------------------------------------------- what is trained


LABELS = """
import os, torch
def cross_entropy(x, y, *args, plain=torch.nn.functional.cross_entropy, **kwargs):
    if torch.is_grad_enabled():
        with open('labels' + os.environ.get('RANK', '0'), 'a') as f:
            print(*y.tolist(), file=f)
    return plain(x, y, *args, **kwargs)
torch.nn.functional.cross_entropy = cross_entropy
"""


def test_order_of_samples(start, folder, other_data):
    """Each of ten images once an epoch, in another order in the next, also where a batch of 4 is in both; two ranks share
    a batch out. There is an evaluation at the end of each epoch, the first step that reaches it."""
    rows = []
    for world in (1, 2):
        cwd = folder()
        run_ranks(start, cwd, world, f'--dataset={other_data}', '--max_iters=0', '--epochs=4', '--batch_size=4',
                  '--micro_batch_size=0', '--eval_interval=0', patch=LABELS)
        rows.append([np.loadtxt(cwd / f'labels{r}', int) for r in range(world)])
        assert [r['step'] for r in log(cwd) if 'top1' in r] == [3, 5, 8, 10]
        assert log(cwd, 'epoch') == [1.2, 2.0, 3.2, 4.0]
    one, two = rows[0][0], np.hstack(rows[1])
    assert (one == two).all() and one.shape == (10, 4)
    epochs = one.reshape(4, 10)
    assert (np.sort(epochs) == np.arange(10)).all() and len(np.unique(epochs, axis=0)) == 4


FOUR = {**dict.fromkeys(LAYERS, 'real'), **dict.fromkeys(('conv1', 'conv5', 'conv9', 'final'), 'binary'),
        **dict.fromkeys(('conv3', 'conv7', 'fc1'), 'ternary'), **dict.fromkeys(('conv4', 'conv8', 'fc2'), 'int4')}
SCALES = {'bin': 2.0, 'tern': 3.0, 'int4': 0.5, 'alpha': 7.0}
# Of each parameter of FOUR: the key of lr_scale, '' where there is none, and whether it decays.
BATCHNORMS = ('bn2', 'bn3', 'bn4', 'bn6', 'bn7', 'bn8', 'bn10', 'skip1.1', 'skip3.1')
TABLE = {
    **dict.fromkeys(('conv1.weight', 'conv5.weight', 'conv9.weight', 'final.weight'), ('bin', True)),
    **dict.fromkeys(('conv3.weight', 'conv7.weight', 'fc1.weight'), ('tern', True)),
    **dict.fromkeys(('conv4.weight', 'conv8.weight', 'fc2.weight'), ('int4', True)),
    **dict.fromkeys(('conv2.weight', 'conv6.weight', 'conv10.weight', 'skip1.0.weight', 'skip3.0.weight'), ('', True)),
    **dict.fromkeys(('conv1.alpha', 'conv5.alpha', 'conv9.alpha', 'final.alpha'), ('alpha', False)),
    **dict.fromkeys(('conv1.bias', 'conv5.bias', 'conv9.bias', 'final.bias'), ('', False)),       # latent too, but biases
    **dict.fromkeys(('fc1.bias', 'fc1.gain', 'fc2.bias'), ('', False)),
    **dict.fromkeys((f'{bn}.{part}' for bn in BATCHNORMS for part in ('weight', 'bias')), ('', False))}


def test_steps_by_hand(train, folder, other_data):
    """Four steps of Nesterov's SGD over ten images, so four epochs: random crops, two micro-batches, clipped gradients, warm-up
    and cosine, rates and decay of TABLE, each parameter once. Parameters and running statistics move as in this loop."""
    cwd, (seed, crop, rates) = folder(), (5, ((0.2, 0.9), 1.5, True), (0.025, 0.05, 0.0255, 0.001))
    train(f'--dataset={other_data}', f'--model_config={FOUR}', f'--lr_scale={SCALES}', '--optimizer=SGD', '--beta1=0.8',
          '--weight_decay=0.1', '--grad_clip=0.5', '--max_iters=4', '--warmup_iters=1', '--learning_rate=0.05',
          '--min_lr=0.001', f'--seed={seed}', '--crop_scale=0.2,0.9', '--crop_ratio=1.5', '--flip=True', cwd=cwd, patch=RATES)
    split, saved = images.load(other_data, 'train'), checkpoint(cwd)
    torch.manual_seed(seed)
    model = train_cnn.CNN(train_cnn.CNNConfig(**saved['model_config'])).to(memory_format=torch.channels_last).train()
    parameters, running = dict(model.named_parameters()), {n: b for n, b in model.named_buffers() if 'running' in n}
    start = {name: t.clone() for name, t in model.state_dict().items()}
    velocity = {name: torch.zeros_like(p) for name, p in parameters.items()}
    logged = [json.loads(line) for line in (cwd / 'rates').read_text().splitlines()]
    for step, lr in enumerate(rates):
        lr_of = {name: lr * SCALES.get(kind, 1.0) for name, (kind, _) in TABLE.items()}
        assert sorted(name for name, *_ in logged[step]) == sorted(TABLE)
        assert all((rate, decay) == (pytest.approx(lr_of[name]), 0.1 * TABLE[name][1]) for name, rate, decay in logged[step])
        before, means, losses = {n: b.clone() for n, b in running.items()}, dict.fromkeys(running, 0.0), []
        places = np.arange(8 * step, 8 * step + 8).reshape(2, 4)
        for some, at in zip(common.epoch_indices(seed, 8 * step, 10, 8).reshape(2, 4), places, strict=True):
            x = crops.network_input(torch.from_numpy(split.pixels[some]), *crops.random_boxes(seed, at // 10, some, *crop), 16,
                                    split.mean, split.std)
            loss = torch.nn.functional.cross_entropy(model(x), torch.from_numpy(split.labels[some]))
            (loss / 2).backward()
            losses.append(loss.item())
            means = {name: means[name] + b / 2 for name, b in running.items()}
            model.load_state_dict(before, strict=False)
        model.load_state_dict(means, strict=False)
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in parameters.values()))
        record = log(cwd)[step + 1]                 # the first is an evaluation
        assert record['grad_norm'] == pytest.approx(norm, rel=1e-3) and norm > 0.5
        assert record['loss'] == pytest.approx(np.mean(losses), rel=1e-4) and record['lr'] == pytest.approx(lr)
        with torch.no_grad():
            for name, p in parameters.items():
                g = p.grad * (0.5 / norm) + 0.1 * TABLE[name][1] * p
                velocity[name] = 0.8 * velocity[name] + g
                p -= lr_of[name] * (g + 0.8 * velocity[name])
                p.grad = None
    for name, wanted in (*parameters.items(), *running.items()):
        moved, off = ((t - wanted.detach()).abs().max().item() for t in (start[name], saved['model'][name]))
        assert moved > 1e-6 and off < 1e-2 * moved, (name, moved, off)


def test_a_teacher_gives_a_share_of_the_loss(train, folder, unbroken, data):
    """The first logged loss is 0.4 x the cross-entropy of the new network on the labels + 0.6 x 9 x KL(teacher || it), both at
    temperature 3, by hand; val_loss is of the labels alone."""
    cwd, whole = folder(), unbroken()
    options = (kinds('binary'), '--max_iters=1')
    best = checkpoint(whole, 'best.pt')
    done = train(*options, f'--teacher={whole}/out/best.pt', '--distill=0.6', '--temperature=3', cwd=cwd)
    assert f'60% of the loss comes from {whole}/out/best.pt, which was trained on {best["step"] * 8} images' in done.out
    teacher, split = model_of(best), images.load(data, 'train')
    torch.manual_seed(1337)
    student = train_cnn.CNN(train_cnn.CNNConfig(**checkpoint(cwd)['model_config'])).to(memory_format=torch.channels_last)
    losses = []
    for some, at in zip(common.epoch_indices(1337, 0, N_TRAIN, 8).reshape(2, 4), np.arange(8).reshape(2, 4), strict=True):
        boxes = crops.random_boxes(1337, at // N_TRAIN, some, (0.35, 1.0), 4 / 3, False)
        x = crops.network_input(torch.from_numpy(split.pixels[some]), *boxes, 16, split.mean, split.std)
        with torch.no_grad():
            y, (p, q) = student(x), ((net(x) / 3).softmax(1) for net in (teacher, student))
        hard = -y.log_softmax(1)[range(4), torch.from_numpy(split.labels[some])].mean()
        losses.append(0.4 * hard + 0.6 * 9 * (p * (p.log() - q.log())).sum(1).mean())
    assert log(cwd, 'loss') == [pytest.approx(np.mean(losses), rel=1e-4)]
    alone = folder()
    train(*options, cwd=alone)
    assert log(cwd, 'val_loss')[0] == log(alone, 'val_loss')[0] and log(cwd, 'val_loss')[1] != log(alone, 'val_loss')[1]


SLOW_INPUT = """
import time
from readers import crops
clock = [0.0]
def random_boxes(*args, plain=crops.random_boxes):
    clock[0] += 0.2
    return plain(*args)
crops.random_boxes = random_boxes
time.perf_counter = lambda: clock[0]
"""
TOGETHER = """
import threading
from readers import crops
both, inside = threading.Event(), []
def random_boxes(*args, plain=crops.random_boxes):
    inside.append(1)
    if len(inside) > 1:
        both.set()
    assert both.wait(300), 'no second thread reads meanwhile'
    return plain(*args)
crops.random_boxes = random_boxes
"""


def test_speed_of_the_input(train, folder):
    """With a fifth of a second for each micro-batch of four, 20 images/s are printed and logged; two threads read at once."""
    cwd = folder()
    done = train('--num_workers=0', '--max_iters=1', '--save_interval=99', cwd=cwd, patch=SLOW_INPUT)
    assert 'input alone: 20 images/s' in done.out
    assert [round(r['input_samples_per_s']) for r in common.read_log(cwd / 'out') if 'loss' in r] == [20]
    train('--num_workers=2', '--max_iters=1', cwd=folder(), patch=TOGETHER)


# --------------------------------------------------------------------------------------------------------------- model


def cnn(kind='binary', n_classes=101, **options):
    torch.manual_seed(0)
    return train_cnn.CNN(train_cnn.CNNConfig(n_classes, dict.fromkeys(LAYERS, kind), **options))


@pytest.mark.parametrize('channels, fc, size, count', [
    ((32, 64, 64, 128, 256), (256, 256), 3, 1_403_653), ((32, 64, 128, 256, 512), (512, 256), 5, 13_505_925)])
def test_parameter_counts_of_the_paper(channels, fc, size, count):
    """Weights and biases of the 13 layers, 101 classes; of both widths: as the reference code has them, and as the paper."""
    with torch.device('meta'):
        model = cnn(channels=channels, fc=fc, filter_dimension=size, residual=False)
    low_bit = [m for m in model.modules() if isinstance(m, layers.LowBit)]
    assert len(low_bit) == 13 and sum(p.numel() for m in low_bit for p in (m.weight, m.bias)) == count
    rest = sum(p.numel() for p in model.parameters()) - count
    assert rest == sum(2 * c for c in channels) + 3         # scales: one a channel, and one a linear layer


def test_skips_are_real_and_only_where_asked_for():
    """1x1 convolutions where the channels change, BatchNorm behind all convolutions but binary ones."""
    count = lambda m, kind: sum(isinstance(x, kind) for x in m.modules())
    shape = {'channels': (4, 4, 8, 8, 16), 'fc': (8, 8)}
    model = cnn(**shape)
    skips = [type(getattr(model, f'skip{b}')).__name__ for b in range(1, 6)]
    assert skips == ['Sequential', 'Identity', 'Sequential', 'Identity', 'Sequential']
    for kind, residual, convolutions, norms in (('binary', True, 3, 3), ('ternary', True, 3, 13), ('binary', False, 0, 0)):
        model = cnn(kind, residual=residual, **shape)
        assert count(model, torch.nn.BatchNorm2d) == norms
        assert kind != 'binary' or count(model, torch.nn.Conv2d) == convolutions


@pytest.mark.parametrize('kind', ['real', 'binary'])
def test_a_network_with_batchnorm_is_the_one_written_down(kind):
    """Convolution, BatchNorm, ReLU, twice; plus the block's input; pooling behind four; mean; two layers; a head. With binary
    layers their weights are -1/2 and 1/2, and a BatchNorm follows fc1, fc2 and final too."""
    model, f = cnn(kind, 7, channels=(4, 4, 8, 8, 16), fc=(8, 6), norm='batch').eval(), torch.nn.functional
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
            m.running_mean.normal_(), m.running_var.uniform_(0.5, 2)
    sign = lambda w: w if kind == 'real' else (w > w.mean()).float() - 0.5
    assert kind == 'real' or model.fc1.bias is None
    x = images_seen = torch.randn(3, 3, 21, 18)
    with torch.no_grad():
        for b in range(1, 6):
            y, part = x, lambda name: model.get_submodule(name)
            for i in (2 * b - 1, 2 * b):
                y = f.relu(part(f'bn{i}')(f.conv2d(y, sign(part(f'conv{i}').weight), padding=1)))
            x = y + part(f'skip{b}')(x)
            x = f.max_pool2d(x, 2) if b < 5 else x
        x = x.mean((2, 3))
        for name in ('fc1', 'fc2', 'final'):
            x = part(f'{name}_bn')(f.linear(x, sign(part(name).weight), part(name).bias))
            x = f.relu(x) if name != 'final' else x
        assert torch.allclose(x, model(images_seen), atol=1e-5)


def test_training_memory_of_binary_and_real():
    """Peak of a forward and backward pass of images of 32 pixels, default widths: all binary is below all real, without skips
    only from some images on, as there binary weights exist twice."""
    for residual, n in ((True, 16), (False, 64)):
        peaks = {}
        for kind in ('real', 'binary'):
            model = cnn(kind, residual=residual).to(memory_format=torch.channels_last)
            x, y = torch.randn(n, 3, 32, 32).to(memory_format=torch.channels_last), torch.arange(n)
            step = lambda model=model, x=x, y=y: torch.nn.functional.cross_entropy(model(x), y).backward()
            step()
            model.zero_grad(set_to_none=False)
            peaks[kind] = common.peak_above(step, False)
        assert peaks['real'] > peaks['binary'] > 1e6, peaks


# ------------------------------------------------------------------------------------------------ every kind, every place


NAMES = list(train_cnn.KINDS)
VARIANTS = [('--norm=channel',), ('--residual=False', '--norm=batch'), ('--norm=spatial', '--filter_dimension=5'),
            ('--norm=batch', '--filter_dimension=1', '--eval_crop=0.8')]


@pytest.mark.parametrize('shift', range(4))
def test_every_kind_in_every_place_learns_and_packs_exactly(unbroken, data, shift):
    """Four networks in which each layer is of each kind once: the loss falls; the file has the size that was promised and
    logged, and its guesses are those of best.pt and those that the trainer reported; shares are the real ones."""
    options = (kinds(*NAMES[shift:], *NAMES[:shift]), *VARIANTS[shift], '--max_iters=64', '--learning_rate=0.02',
               '--batch_size=16', '--micro_batch_size=16', '--log_interval=5', '--eval_interval=25')
    where = unbroken(*options)
    losses, printed, best = log(where, 'loss'), (where / 'said').read_text(), checkpoint(where, 'best.pt')
    assert np.mean(losses[-3:]) < 0.8 * losses[0], losses
    model = model_of(best)
    coded = lambda m: m.weight.numel() + (m.bias.numel() if m.kind == 'bin' and m.bias is not None else 0)
    low = {kind: sum(coded(m) for m in model.modules() if isinstance(m, layers.LowBit) and m.kind == kind)
           for kind in ('bin', 'tern', 'int4')}
    assert [type(m).__name__ for m in model.modules() if isinstance(m, layers.LowBit)].count('BinaryConv2d') in (2, 3)
    n, (packed_bytes, fp32_bytes) = sum(p.numel() for p in model.parameters()), layers.model_bytes(model)
    shares = ', '.join(f'{low[kind] / n:.1%} {name}' for kind, name in zip(low, ('binary', 'ternary', '4-bit'), strict=True))
    assert f'{n:,} parameters, {shares}; packed {packed_bytes:,} bytes, fp32 {fp32_bytes:,}' in printed
    last, path = log(where)[-1], where / 'out' / 'packed.safetensors'
    assert last['packed_file_bytes'] == path.stat().st_size > packed_bytes and last['fp32_bytes'] == fp32_bytes == 4 * n
    assert last['binary_share'] == pytest.approx(low['bin'] / n)
    meta, tensors = common.read_packed(path)
    packed = common.load_packed(train_cnn.CNN(train_cnn.CNNConfig(**meta['model_config'])), tensors)
    crop = meta['images']['eval_crop']
    assert sum(t.numel() * t.element_size() for n, t in tensors.items()
               if not n.endswith(('running_mean', 'running_var', 'num_batches_tracked'))) == packed_bytes
    packed_logits, report = logits(packed, data, crop), np.load(where / 'out' / 'report.npz')
    assert torch.equal(packed_logits, logits(model, data, crop))
    assert (report['guesses'] == packed_logits.topk(5).indices[:, 0].numpy()).all()
    assert report['surety'] == pytest.approx(packed_logits.softmax(1).amax(1).numpy(), abs=1e-5)
    top1 = (report['guesses'] == images.load(data, 'val').labels).mean()
    assert last['packed_top1'] == meta['top1'] == last['best_top1'] == best['best'][0] == max(log(where, 'top1'))
    assert last['packed_top1'] == pytest.approx(top1) and last['best_step'] == meta['step'] == best['step'] == best['best'][1]


def test_what_is_logged(unbroken):
    """The columns of training, evaluation and packing, in units that fit together."""
    where = unbroken()
    records = common.read_log(where / 'out')
    for step, r in enumerate((r for r in records if 'loss' in r), 1):
        assert set(r) == {'step', 'samples', 'loss', 'lr', 'grad_norm', 'optimizer_bytes'} | MEASURED - {'tokens_per_s'}
        assert r['step'] == step and r['samples'] == 8 * step and r['peak_mem_bytes'] > 50e6 and r['energy_j'] != 0
        assert r['samples_per_s'] == pytest.approx(8 / r['ms'] * 1e3) and r['input_samples_per_s'] > 100
        assert r['lr'] == common.lr_at(step - 1, 'cosine', 1e-2, 0, 2, 12)
    val = [r for r in records if 'val_loss' in r]
    assert [(r['step'], r['epoch']) for r in val] == [(step, round(step * 8 / N_TRAIN, 3)) for step in (0, 4, 8, 12)]
    assert all(set(r) == {'step', 'samples', 'epoch', 'val_loss', 'top1', 'top5'} for r in val)
    assert records[-1]['step'] == 12 and {'packed_file_bytes', 'packed_top1', 'packed_top5'} <= set(records[-1])
    printed = (where / 'said').read_text()
    assert f'{N_TRAIN} images of 6 classes to train on, {N_VAL} to evaluate' in printed
    assert '8 a step = 4 x 2 micro-steps x 1 processes; 12 steps' in printed


def test_evaluation_by_hand(unbroken, data):
    """Loss, top-1 and top-5 of best.pt's weights, from the formulas."""
    where, labels = unbroken(*MIXED), torch.from_numpy(images.load(data, 'val').labels)
    best = checkpoint(where, 'best.pt')
    z = logits(model_of(best), data)
    record = next(r for r in log(where) if r['step'] == best['step'] and 'top1' in r)
    assert record['val_loss'] == pytest.approx(-z.softmax(1)[torch.arange(N_VAL), labels].log().mean().item(), abs=1e-4)
    hits = z.topk(5).indices == labels[:, None]
    assert record['top1'] == pytest.approx(hits[:, 0].float().mean().item())
    assert record['top5'] == pytest.approx(hits.any(1).float().mean().item())


def test_plot_shows_the_status_of_a_run(start, unbroken):
    done = start(ROOT / 'plot.py', 'status', 'out', cwd=unbroken()).wait()
    assert done.code == 0 and '12 of 12 (100%)' in done.out and 'val loss' in done.out and 'finished' in done.out, done.err


# ------------------------------------------------------------------------------------------------ numbers of processes


def test_two_processes_without_batchnorm_equal_one(start, folder, unbroken):
    """All layers binary, no skips: nothing depends on the micro-batch, 2 x 2 x 2 images equal 2 x 4, also with a teacher. With
    SGD: Adam's first step is as large for a gradient of 1e-8, which is all rounding, as for any other."""
    cwd, options = folder(), (*NO_BATCHNORM, '--max_iters=6', '--eval_interval=3', '--optimizer=SGD',
                              f'--teacher={unbroken()}/out/best.pt')
    done = run_ranks(start, cwd, 2, *options, '--micro_batch_size=2')
    assert 'BatchNorm' not in done[0].out
    assert_close_runs(unbroken(*options), cwd)


def test_evaluation_counts_each_image_once(start, folder, unbroken):
    """19 images on two ranks in rounds of 2 x 3 (the last has one) and 2 x 20 (none for the second), and on one by fives."""
    options = ('--max_iters=1', '--learning_rate=0', '--save_interval=99')
    one = unbroken(*options)
    for size in (3, 20):
        two = folder()
        run_ranks(start, two, 2, *options, f'--eval_batch_size={size}')
        assert_close_runs(one, two, columns=('val_loss',))
        a, b = (np.load(where / 'out' / 'report.npz') for where in (one, two))
        assert (a['guesses'] == b['guesses']).all() and a['surety'] == pytest.approx(b['surety'], abs=1e-5)


# ------------------------------------------------------------------------------------------------------------ resuming


def test_sgd_of_the_paper_resumes_exactly(train, folder, unbroken):
    """Stopped and resumed, with a teacher: weights, statistics, momentum, log and packed file of an unbroken run."""
    options = (*MIXED, '--optimizer=SGD', '--learning_rate=0.05', f'--teacher={unbroken()}/out/best.pt')
    whole, cwd = unbroken(*options), folder()
    train(*options, cwd=cwd, patch=kill_at(9))
    assert 'resumed from out/last.pt at step 10' in train(*options, '--resume=auto', cwd=cwd).out
    assert_same_run(cwd, whole)


def test_a_signal_while_packing(train, folder, unbroken):
    """A signal in the evaluation of the packed weights ends with the command that packs and ends as the unbroken run."""
    whole, cwd = unbroken(*MIXED), folder()
    (cwd / 'out').mkdir()
    for name, new in (('last.prev.pt', 'last.pt'), ('best.pt', 'best.pt'), ('log.jsonl', 'log.jsonl')):
        shutil.copy(whole / 'out' / name, cwd / 'out' / new)
    done = train(*MIXED, '--resume=auto', cwd=cwd, patch="""
import layers, os, signal
def pack(*args, plain=layers.pack):
    os.kill(os.getpid(), signal.SIGINT)
    return plain(*args)
layers.pack = pack
""")
    assert 'stopped at step 12; go on with' in done.out and not (cwd / 'out' / 'packed.safetensors').exists()
    assert 'step 12 of 12 is reached: nothing to train' in train(*MIXED, '--resume=auto', cwd=cwd).out
    assert_same_run(cwd, whole)


def test_epochs_means_the_total(train, folder, unbroken):
    """One epoch, then --epochs=2 on top of it: two in all, those of a run of two. With the paper's Adam."""
    options = ('--max_iters=0', '--eval_interval=0', '--schedule=constant', '--optimizer=Adam', *MIXED)
    whole, cwd = unbroken(*options, '--epochs=2'), folder()
    assert 'step 0 of 7' in train(*options, '--epochs=1', cwd=cwd).out
    train(*options, '--epochs=2', '--resume=auto', cwd=cwd)
    assert checkpoint(cwd)['step'] == 13 == math.ceil(2 * N_TRAIN / 8)
    assert_same_run(cwd, whole)
    assert [r['step'] for r in log(cwd) if 'top1' in r] == [7, 13]


# --------------------------------------------------------------------------------------------------------- predictions


def predicted(out):
    """(classes, percentages) of the last five lines."""
    lines = [re.fullmatch(r' *([\d.]+)%  (.+)', line) for line in out.split('\n')[-6:-1]]
    return [line[2] for line in lines], [float(line[1]) for line in lines]


def test_predict(in_turn, unbroken, tmp_path):
    """The five likeliest of six classes in the middle of a picture, the first one first, from best.pt, from the packed file and
    without naming either; grey, CMYK and palette images as well."""
    where = unbroken('--eval_crop=0.6')
    whole, paths = Image.new('RGB', (30, 24), (40, 220, 40)), [tmp_path / 'framed.png'] * 4
    whole.paste(Image.fromarray(noisy(2, np.random.default_rng(2))).crop((8, 5, 22, 19)), (8, 5))
    whole.save(paths[0])
    for mode, suffix in (('L', 'png'), ('CMYK', 'jpg'), ('P', 'gif')):
        paths.append(tmp_path / f'{mode}.{suffix}')
        whole.convert(mode).save(paths[-1])
    options = [['--resume=out/best.pt'], ['--resume=out/packed.safetensors'], ['--out_dir=out'],
               ['--out_dir=out', '--resume=auto'], *[['--resume=out/packed.safetensors']] * 3]
    done = in_turn([(SCRIPT, where, [f'--predict={path}', '--device=cpu', *some])
                    for path, some in zip(paths, options, strict=True)])
    assert all(result.code == 0 and result.err == '' for result in done), done[0].err
    printed = [predicted(result.out) for result in done]
    names, shares = printed[0]
    assert printed[:4] == [(names, shares)] * 4 and all(len(set(classes)) == 5 for classes, _ in printed)
    assert set(names) < {f'c{i}' for i in range(6)} and shares == sorted(shares, reverse=True)
    best = checkpoint(where, 'best.pt')
    model, seen = model_of(best), best['images']
    pixels = torch.from_numpy(np.array(images.square(whole, 20)))[None]
    with torch.no_grad():
        x = [crops.network_input(pixels, *crops.middle_boxes(1, crop), 16, seen['mean'], seen['std']) for crop in (0.6, 1.0)]
        expected, uncropped = (model(one)[0].softmax(0) for one in x)
    assert names == [seen['classes'][i] for i in expected.topk(5).indices]
    assert shares == pytest.approx((100 * expected.topk(5).values).tolist(), abs=0.06)
    assert (expected - uncropped).abs().max() > 0.02        # the border would have changed it


def test_mistakes_of_predict_are_one_line(refused, unbroken, tmp_path):
    """Each line names the file that is wrong."""
    where, picture = unbroken(), tmp_path / 'picture.png'
    Image.new('RGB', (30, 24)).save(picture)
    for name in ('text.jpg', 'text.safetensors', 'text.pt'):
        (tmp_path / name).write_text('no picture and no network')
    common.save_checkpoint(str(tmp_path / 'gpt.pt'), {'trainer': 'train_gpt'})
    common.save_packed(torch.nn.Linear(2, 2), str(tmp_path / 'gpt.safetensors'), {'trainer': 'train_gpt'})
    cases = [(image, 'out/best.pt', name) for image, name in (
        (tmp_path / 'text.jpg', 'text.jpg'), ('none.jpg', 'none.jpg'), (tmp_path, str(tmp_path)))]
    cases += [(picture, tmp_path / name, f'{name}{why}') for name, why in (
        ('none.pt', ' does not exist'), ('none.safetensors', ''), ('gpt.pt', ' was written by train_gpt.py'),
        ('gpt.safetensors', ' was written by train_gpt.py'), ('text.pt', ''), ('text.safetensors', ''))]
    cases += [(picture, of, 'nosuch/best.pt does not exist') for of in ('auto', '')]
    refused('train_cnn', [((f'--predict={image}', f'--resume={of}', '--out_dir=nosuch'), words)
                          for image, of, words in cases], where)


# ------------------------------------------------------------------------------------------------ starting and refusing


def test_init_from_another_run(train_in_turn, folder, unbroken, other_data, data, tmp_path):
    """Other classes: all stays but the head, which is said to be new, also where there are as many. The same classes: all."""
    source, cwd = unbroken(*MIXED), folder()
    options = (*MIXED, f'--init_from={source}/out/best.pt', '--max_iters=1', '--learning_rate=0', '--seed=2')
    renamed = shutil.copytree(data, tmp_path / 'renamed')
    record = json.loads((renamed / 'images.json').read_text())
    record['classes'] = [f'other {name}' for name in record['classes']]
    (renamed / 'images.json').write_text(json.dumps(record))
    old, head = checkpoint(source, 'best.pt')['model'], ['final.bias', 'final.weight']
    cases = ((other_data, 'a', head), (renamed, 'b', head), (data, 'c', []))
    done = train_in_turn([(cwd, (*options, f'--dataset={dataset}', f'--out_dir={out}')) for dataset, out, _ in cases])
    for (_, out, new), result in zip(cases, done, strict=True):
        line = f'{len(old) - len(new)} of {len(old)} tensors from {source}/out/best.pt; new: {", ".join(new) or "none"}\n'
        assert line in result.out
        last = common.read_checkpoint(str(cwd / out / 'last.pt'))['model']
        changed = {name for name in old if not torch.equal(last[name], old[name])}
        assert last.keys() == old.keys() and set(new) <= changed
        assert all(name in new or 'running' in name or 'tracked' in name for name in changed)


def test_micro_batches_of_one_image(train_in_turn, folder):
    """Trained where each BatchNorm has more than one number to normalize; else one line says what is wrong, see MISTAKES."""
    some = dict.fromkeys(LAYERS[:10], 'binary')
    cases = {folder(): options for options in (
        ('--image_size=32', '--optimizer=muon'), (f'--model_config={some}', '--residual=False'),
        (kinds('real', 'ternary', 'int4', 'real', 'real', 'real', 'real', 'real', 'binary', 'binary'),),
        ('--channels=4,4,8,8,4', f'--model_config={some}', '--image_size=33'))}
    train_in_turn([(cwd, ('--micro_batch_size=1', '--max_iters=1', *options)) for cwd, options in cases.items()])
    assert all(math.isfinite(log(cwd, 'loss')[0]) for cwd in cases)


def test_other_checkpoints_are_refused_in_one_line(refused, folder, unbroken, other_data, tmp_path):
    """Of another shape, other kinds, another optimizer, of data with two labels exchanged: the line says what differs."""
    good, ten = (f'--resume={unbroken(*options)}/out/last.pt' for options in (
        ('--max_iters=1', '--learning_rate=0', '--save_interval=99'), (f'--dataset={other_data}', '--max_iters=1')))
    cases = [((good, option), f'out/last.pt has another {what}') for option, what in (
        ("--model_config={'fc1': 'binary'}", 'model_config'), ('--channels=4,4,8,8,4', 'channels'), ('--fc=8,4', 'fc'),
        ('--residual=False', 'residual'), ('--image_size=20', 'size'), (f'--dataset={other_data}', 'n_classes'),
        ('--optimizer=SGD', 'optimizer'))]
    exchanged = ten_images(tmp_path / 'ten', [1, 0, *range(2, 10)])
    teacher = good.replace('resume', 'teacher')
    cases += [((teacher, f'--dataset={other_data}'), 'last.pt was trained on other images than those of'),
              ((teacher, '--image_size=20'), 'another image_size (16, not 20); type --image_size=16'),
              ((good, '--fc=8,4'), '--init_from='), ((ten, f'--dataset={exchanged}'), 'out/last.pt has another data; ')]
    refused('train_cnn', cases, folder())


MISTAKES = [
    (("--model_config={'conv11': 'binary'}",), "'conv11'"), (("--model_config={'conv1': 'bin'}",), "conv1='bin'"),
    (("--model_config={'fc1': 'reel', 'fc2': 'fp'}",), "fc1='reel', fc2='fp' is none of binary, real, ternary, int4"),
    (('--model_config=binary',), 'model_config'),
    (('--norm=layer',), "norm='layer' is none of 'batch', 'channel', 'spatial'"),
    (('--crop_scale=0,1',), 'crop_scale=(0.0, 1.0)'), (('--crop_scale=0.5,0.4',), 'crop_scale=(0.5, 0.4)'),
    (('--crop_scale=0.5',), 'crop_scale=(0.5,)'), (('--crop_scale=0.5,1.1',), 'crop_scale=(0.5, 1.1)'),
    (('--crop_ratio=0.9',), 'crop_ratio=0.9'),
    (('--filter_dimension=4',), 'filter_dimension=4'), (('--image_size=15',), 'image_size=15'),
    (('--channels=4,4,8,8',), 'channels=(4, 4, 8, 8)'), (('--channels=4,4,8,8,0',), 'channels=(4, 4, 8, 8, 0)'),
    (('--channels=()',), 'channels=()'), (('--fc=8',), 'fc=(8,)'), (('--eval_crop=0',), 'eval_crop=0.0'),
    (('--eval_crop=1.5',), 'eval_crop=1.5'), (('--dropout=1',), 'dropout=1.0'), (('--binary_alpha=0',), 'binary_alpha'),
    (('--optimizer=ada',), "optimizer='ada' is none of 'adamw', 'rsvd', 'muon', 'adam', 'sgd'"),
    (('--schedule=two_stage',), 'two_stage'),
    (('--dtype=float16',), "dtype='float16'"), (('--epochs=0', '--max_iters=0'), 'epochs=0.0'), (('--max_iters=-1',), '-1'),
    (('--batch_size=9',), 'batch_size=9 is no multiple of micro_batch_size=4 x 1 processes'),
    (('--batch_size=0',), 'batch_size=0'), (('--num_workers=-1',), 'num_workers=-1'), (('--rank=0',), 'rank=0'),
    (('--micro_batch_size=1',), 'micro_batch_size=1 at image_size=16 leaves a BatchNorm one number'),
    (('--micro_batch_size=1', kinds('binary'), '--channels=4,4,8,8,4', '--image_size=31'), 'image_size=31 leaves a'),
    (('--micro_batch_size=1', kinds('real', 'binary'), '--norm=batch', '--image_size=64'), 'image_size=64 leaves a'),
    (('--micro_batch_size=0', '--batch_size=1', '--residual=False'), 'micro_batch_size=1 at image_size=16'),
    (('--eval_batch_size=0',), 'eval_batch_size=0'), (('--log_interval=0',), 'log_interval=0'),
    (("--lr_scale={'bin': -1}",), 'lr_scale'), (("--lr_scale={'real': 2}",), 'real'), (('--grad_clip=-1',), 'grad_clip=-1.0'),
    (('--distill=-0.1',), 'distill=-0.1 must be from 0 to 1'), (('--teacher=nosuch.pt',), 'nosuch.pt does not exist'),
    (('--temperature=0',), 'temperature=0.0 must be above 0'),
    (('--dataset=nosuch',), 'type: python data/'), (('--dataset=images/nosuch',), 'prepare.py --dir PATH --name=nosuch'),
    (('--device=gpu',), 'gpu'), (('--out_dir=/proc/nosuch',), '/proc/nosuch'),
]


def test_mistakes_are_one_line(refused, folder):
    """Each ends with exit status 2 and one line that says what is wrong, no traceback, and no out_dir."""
    refused('train_cnn', MISTAKES, folder())


@pytest.fixture
def empty_digits(tmp_path):
    """What data/digits/prepare.py needs, and no data. The trainer is told to look for data there."""
    (tmp_path / 'data' / 'digits').mkdir(parents=True)
    for name in ('readers/__init__.py', 'readers/images.py', 'readers/tokens.py', 'configurator.py', 'data/digits/prepare.py'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


SMALL = ('--dataset=digits', '--max_iters=2', '--image_size=16', '--channels=4,4,8,8,8', '--fc=8,8', '--device=cpu',
         '--compile=False', '--out_dir=out')
ELSEWHERE = "import pathlib; from readers import tokens; tokens.ROOT = pathlib.Path('.').absolute()\n"


def test_digits_prepare_themselves(start, empty_digits):
    """A first run without data/digits makes it and trains: ten classes, 355 images to evaluate; a second one uses it."""
    record, made = empty_digits / 'data' / 'digits' / 'images.json', []
    for option, patch in (('--overwrite=False', ELSEWHERE), ('--overwrite=True', ELSEWHERE + REPORT)):
        done = start(SCRIPT, *SMALL, option, cwd=empty_digits, patch=patch).wait()
        assert done.code == 0 and done.err == '', done.err
        assert '1,442 images of 10 classes to train on, 355 to evaluate' in done.out
        assert common.read_log(empty_digits / 'out')[-1]['packed_file_bytes'] > 0
        assert (empty_digits / 'out' / 'classes.csv').exists()
        made.append(record.stat().st_mtime_ns)
        record.with_name('prepare.py').unlink(missing_ok=True)
    assert made[0] == made[1]


def test_digits_that_cannot_be_made_are_one_line(start, empty_digits):
    """The error of prepare.py is the only output."""
    (empty_digits / 'data' / 'digits' / 'prepare.py').write_text(
        'import sys\nprint("error: no scikit-learn", file=sys.stderr)\nsys.exit(2)\n')
    done = start(SCRIPT, *SMALL, cwd=empty_digits, patch=ELSEWHERE).wait()
    assert one_error(done) == 'error: no scikit-learn\n' and not (empty_digits / 'out').exists()
