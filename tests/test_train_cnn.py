"""train_cnn.py as people run it: its steps by hand, its size, the same on any number of processes, exact resumption, every kind
of layer in every place, a photograph's classes, mistakes in one line."""
import json
import math
import os
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import common
import layers
import train_cnn
from conftest import (AT_STEP, IN_EVALUATION, MEASURED, NAN_LOSS, ROOT, checkpoint, damages, kill_at, log, one_error,
                      printed_command, ranks, torchrun, wait_all)
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

# What the trainer says it found at its end, kept as numbers, not drawn.
REPORT = PATCH = """
import numpy
from report import pictures
pictures.report = lambda out_dir, data, guesses, surety: numpy.savez(out_dir + '/report.npz', guesses=guesses, surety=surety)
"""
# The trainer's own variables in a step, found from the function that it calls there.
RATES = """
import common, json, sys
def seed_step(seed, step, rank, plain=common.seed_step):
    main = sys._getframe(1).f_locals
    names = {id(p): name for name, p in main['raw_model'].named_parameters()}
    found = [(names[id(p)], g['lr'], g['weight_decay']) for g in main['opt'].param_groups for p in g['params']]
    with open('rates', 'a') as f:
        print(json.dumps(found), file=f)
    plain(seed, step, rank)
common.seed_step = seed_step
"""
STATES = """
import common, sys, torch
def seed_step(seed, step, rank, plain=common.seed_step):
    main = sys._getframe(1).f_locals
    tensors = list(main['raw_model'].state_dict().values())
    tensors += [t for s in main['opt'].state.values() for t in s.values() if torch.is_tensor(t)]
    with open(f'sums{rank}', 'a') as f:
        print(common.checksum(tensors), file=f)
    plain(seed, step, rank)
common.seed_step = seed_step
"""
NAN_GRADIENT = AT_STEP.format(step=6, rank=0, action="""
        import sys
        parameter = sys._getframe(1).f_locals['raw_model'].get_parameter('{name}')
        parameter.register_hook(lambda g: g * float('{value}'))""")
FULL_DISK = 'resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))'


def disk(step, limit):
    """From a step on no file may grow over so many bytes."""
    action = f'import resource; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); {FULL_DISK.format(limit=limit)}'
    return AT_STEP.format(step=step, rank=0, action=action)


# ------------------------------------------------------------------------------------------------------------ fixtures


def write_pictures(folder, n, seed, colors=COLORS):
    """n images of 30 x 24 noisy pixels, one class after the other, as folder/c0/0.png, ..."""
    draw = np.random.default_rng(seed)
    for i in range(n):
        path = folder / f'c{i % len(colors)}' / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.array(colors[i % len(colors)]) + draw.normal(0, 25, (24, 30, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope='session')
def pictures(tmp_path_factory):
    """A folder of photographs, so to speak: train/c0/0.png, ... and val/."""
    folder = tmp_path_factory.mktemp('pictures')
    write_pictures(folder / 'train', N_TRAIN, 1)
    write_pictures(folder / 'val', N_VAL, 2)
    return folder


@pytest.fixture(scope='session')
def data(tmp_path_factory, start, pictures):
    """The data folder that data/images/prepare.py makes of them."""
    out = tmp_path_factory.mktemp('prepared')
    done = start(ROOT / 'data/images/prepare.py', '--dir', pictures, '--name=tiny', '--size=20', '--workers=1',
                 f'--out_dir={out}', cwd=out).wait()
    assert done.code == 0, done.err
    return out / 'tiny'


def ten_images(out, val_labels):
    """A data folder of ten images of ten classes, the same ones to train on and to evaluate."""
    pixels = np.random.default_rng(3).integers(0, 256, (10, 16, 16, 3), dtype=np.uint8)
    entries = lambda labels: [(str(i), label, b'P6 16 16 255\n' + pixels[i].tobytes()) for i, label in enumerate(labels)]
    images.build(out, dict(source='here', revision='1'), {'train': entries(range(10)), 'val': entries(val_labels)},
                 list('abcdefghij'), 16, 1, [])
    return out


@pytest.fixture(scope='session')
def other_data(tmp_path_factory):
    return ten_images(tmp_path_factory.mktemp('other'), range(10))


@pytest.fixture(scope='module')
def folder(tmp_path_factory, data):
    """folder() -> a new folder holding tiny.py, the config all runs start from."""
    def make():
        new = tmp_path_factory.mktemp('run')
        (new / 'tiny.py').write_text(TINY.format(data=str(data)))
        return new
    return make


def assert_same_state(a, b, best=True):
    """Step, every tensor of model (BatchNorm's too) and optimizer, bit for bit."""
    assert a['step'] == b['step'] and (not best or a['best'] == b['best'])
    groups = [[g | {'lr': None} for g in state['optimizer']['param_groups']] for state in (a, b)]     # each step sets its lr
    assert a['model'].keys() == b['model'].keys() and groups[0] == groups[1]
    wrong = [k for k in a['model'] if not torch.equal(a['model'][k], b['model'][k])]
    assert not wrong, wrong
    one, two = a['optimizer']['state'], b['optimizer']['state']
    assert one.keys() == two.keys() and (len(one) > 10 or not a['step'])
    assert all(one[i].keys() == two[i].keys() for i in one)
    same = lambda x, y: torch.equal(x, y) if torch.is_tensor(x) else x == y
    assert all(same(one[i][k], two[i][k]) for i in one for k in one[i])


def assert_same_run(a, b):
    assert_same_state(checkpoint(a), checkpoint(b))
    assert_same_state(checkpoint(a, 'best.pt'), checkpoint(b, 'best.pt'))
    assert log(a) == log(b)


def run_ranks(start, cwd, world, *options, patch=''):
    done = wait_all([start(SCRIPT, 'tiny.py', *options, cwd=cwd, patch=REPORT + patch, **r) for r in ranks(world)])
    assert [d.code for d in done] == [0] * world and not any(d.err for d in done), [d.err for d in done]
    return done


def assert_close_runs(a, b, columns=('loss', 'val_loss'), atol=1e-5):
    for column in columns:
        assert len(log(a, column)) > 1 and log(b, column) == pytest.approx(log(a, column), abs=atol, rel=0), column
    for column in ('top1', 'top5'):
        assert log(a, column) == log(b, column)


@torch.no_grad()
def logits(model, data, crop=1.0, size=16):
    """(n, classes) of the val split, five images at a time as in TINY."""
    split, parts = images.load(data, 'val'), []
    for at in range(0, len(split), 5):
        pixels = torch.from_numpy(np.array(split.pixels[at:at + 5]))
        x = crops.network_input(pixels, *crops.middle_boxes(len(pixels), crop), size, split.mean, split.std)
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


@pytest.mark.parametrize('optimizer', train_cnn.OPTIMIZERS)
def test_learning_rate_and_decay_of_each_parameter(train, folder, optimizer):
    """TABLE, in each step, in the optimizer that makes it: no parameter is missing or there twice."""
    cwd = folder()
    train(f'--model_config={FOUR}', f'--lr_scale={SCALES}', f'--optimizer={optimizer}', '--weight_decay=0.25', '--rank=2',
          '--max_iters=4', cwd=cwd, patch=RATES)
    steps = [json.loads(line) for line in (cwd / 'rates').read_text().splitlines()]
    assert len(steps) == 4
    for step, found in enumerate(steps):
        lr = common.lr_at(step, 'cosine', 1e-2, 0, 2, 4)
        wanted = [[name, lr * SCALES.get(kind, 1.0), 0.25 * decays] for name, (kind, decays) in TABLE.items()]
        assert sorted(found) == sorted(wanted)


def test_steps_by_hand(train, folder, other_data):
    """Four steps of Nesterov's SGD over ten images, so four epochs: random crops, two micro-batches, clipped gradients, warm-up
    and cosine, rates and decay of TABLE. Parameters and running statistics move as in this loop."""
    cwd, (seed, crop, rates) = folder(), (5, ((0.2, 0.9), 1.5, True), (0.025, 0.05, 0.0255, 0.001))
    train(f'--dataset={other_data}', f'--model_config={FOUR}', f'--lr_scale={SCALES}', '--optimizer=SGD', '--beta1=0.8',
          '--weight_decay=0.1', '--grad_clip=0.5', '--max_iters=4', '--warmup_iters=1', '--learning_rate=0.05',
          '--min_lr=0.001', f'--seed={seed}', '--crop_scale=0.2,0.9', '--crop_ratio=1.5', '--flip=True', cwd=cwd)
    split, found = images.load(other_data, 'train'), checkpoint(cwd)
    torch.manual_seed(seed)
    model = train_cnn.CNN(train_cnn.CNNConfig(**found['model_config'])).to(memory_format=torch.channels_last).train()
    parameters, running = dict(model.named_parameters()), {n: b for n, b in model.named_buffers() if 'running' in n}
    start = {name: t.clone() for name, t in model.state_dict().items()}
    velocity = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for step, lr in enumerate(rates):
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
                kind, decays = TABLE[name]
                g = p.grad * (0.5 / norm) + 0.1 * decays * p
                velocity[name] = 0.8 * velocity[name] + g
                p -= lr * SCALES.get(kind, 1.0) * (g + 0.8 * velocity[name])
                p.grad = None
    for name, wanted in (*parameters.items(), *running.items()):
        moved, off = ((t - wanted.detach()).abs().max().item() for t in (start[name], found['model'][name]))
        assert moved > 1e-6 and off < 1e-2 * moved, (name, moved, off)


@pytest.mark.parametrize('workers', [0, 2, 8])
def test_speed_of_the_input(train, folder, workers):
    """Reading takes a fifth of a second a micro-batch of four: what is printed and logged is what so many threads can do."""
    slow = """
import time
from readers import crops
crops.random_boxes = lambda *args, plain=crops.random_boxes: time.sleep(0.2) or plain(*args)
"""
    cwd = folder()
    done = train(f'--num_workers={workers}', '--max_iters=1', '--save_interval=99', cwd=cwd, patch=slow)
    found, true = int(re.search(r'input alone: ([\d,]+) images/s', done.out)[1].replace(',', '')), max(1, workers) * 4 / 0.2
    assert true / 1.6 < found < true * 1.6
    assert [round(r['input_samples_per_s']) for r in common.read_log(cwd / 'out') if 'loss' in r] == [found]


# --------------------------------------------------------------------------------------------------------------- model


def cnn(kind='binary', n_classes=101, **options):
    torch.manual_seed(0)
    return train_cnn.CNN(train_cnn.CNNConfig(n_classes, dict.fromkeys(LAYERS, kind), **options))


@pytest.mark.parametrize('channels, fc, size, count', [
    ((32, 64, 64, 128, 256), (256, 256), 3, 1_403_653), ((32, 64, 64, 128, 256), (256, 256), 5, 3_617_029),
    ((32, 64, 128, 256, 512), (512, 256), 3, 5_132_165), ((32, 64, 128, 256, 512), (512, 256), 5, 13_505_925)])
def test_parameter_counts_of_the_paper(channels, fc, size, count):
    """Weights and biases of the 13 layers, 101 classes; of both widths: as the reference code has them, and as the paper."""
    with torch.device('meta'):
        model = cnn(channels=channels, fc=fc, filter_dimension=size, residual=False)
    found = [m for m in model.modules() if isinstance(m, layers.LowBit)]
    assert len(found) == 13 and sum(p.numel() for m in found for p in (m.weight, m.bias)) == count
    rest = sum(p.numel() for p in model.parameters()) - count
    assert rest == sum(2 * c for c in channels) + 3         # scales: one a channel, and one a linear layer


def test_skips_are_real_and_only_where_asked_for():
    """1x1 convolutions where the channels change, BatchNorm behind all convolutions but binary ones."""
    model = cnn(channels=(4, 4, 8, 8, 16), fc=(8, 8))
    skips = [type(getattr(model, f'skip{b}')).__name__ for b in range(1, 6)]
    assert skips == ['Sequential', 'Identity', 'Sequential', 'Identity', 'Sequential']
    count = lambda m, kind: sum(isinstance(x, kind) for x in m.modules())
    assert count(model, torch.nn.BatchNorm2d) == 3 and count(model, torch.nn.Conv2d) == 3
    assert count(cnn('ternary', channels=(4, 4, 8, 8, 16), fc=(8, 8)), torch.nn.BatchNorm2d) == 13
    plain = cnn(channels=(4, 4, 8, 8, 16), fc=(8, 8), residual=False)
    assert count(plain, torch.nn.Conv2d) == count(plain, torch.nn.BatchNorm2d) == 0


def test_a_real_network_is_the_one_written_down():
    """Convolution, BatchNorm, ReLU, twice; plus the block's input; pooling behind four; mean; two layers; a head."""
    model, f = cnn('real', 7, channels=(4, 4, 8, 8, 16), fc=(8, 6)).eval(), torch.nn.functional
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(), m.running_var.uniform_(0.5, 2)
    x = images_seen = torch.randn(3, 3, 21, 18)
    with torch.no_grad():
        for b in range(1, 6):
            y, part = x, lambda name: model.get_submodule(name)
            for i in (2 * b - 1, 2 * b):
                y = f.relu(part(f'bn{i}')(f.conv2d(y, part(f'conv{i}').weight, padding=1)))
            x = y + part(f'skip{b}')(x)
            x = f.max_pool2d(x, 2) if b < 5 else x
        x = f.relu(model.fc2(f.relu(model.fc1(x.mean((2, 3))))))
        assert torch.allclose(model.final(x), model(images_seen), atol=1e-5)


@pytest.mark.parametrize('residual, n', [(True, 16), (False, 64)])
def test_training_memory_of_binary_and_real(residual, n):
    """Peak of a forward and backward pass of images of 32 pixels, default widths: all binary is below all real, without skips
    only from some images on, as there binary weights are held twice."""
    peaks = {}
    for kind in ('real', 'binary'):
        model = cnn(kind, residual=residual).to(memory_format=torch.channels_last)
        x, y = torch.randn(n, 3, 32, 32).to(memory_format=torch.channels_last), torch.arange(n)

        def step(model=model, x=x, y=y):
            torch.nn.functional.cross_entropy(model(x), y).backward()
        step()
        for p in model.parameters():
            p.grad.zero_()
        peaks[kind] = common.peak_above(step, False)
    assert peaks['binary'] < peaks['real'] and peaks['binary'] > 1e6, peaks


# ------------------------------------------------------------------------------------------------ every kind, every place


NAMES = list(train_cnn.KINDS)
VARIANTS = [('--norm=channel',), ('--residual=False', '--norm=channel'), ('--norm=spatial', '--filter_dimension=5'),
            ('--norm=sample', '--filter_dimension=1', '--eval_crop=0.8')]


@pytest.mark.parametrize('shift', range(4))
def test_every_kind_in_every_place_learns_and_packs_exactly(unbroken, data, shift):
    """Four networks in which each layer is of each kind once: the loss falls; the file has the size that was promised and
    logged, and its guesses are those of best.pt and those that the trainer reported; shares are the real ones."""
    options = (kinds(*NAMES[shift:], *NAMES[:shift]), *VARIANTS[shift], '--max_iters=80', '--learning_rate=0.02',
               '--batch_size=16', '--micro_batch_size=16', '--log_interval=5', '--eval_interval=25')
    where = unbroken(*options)
    losses, said, best = log(where, 'loss'), (where / 'said').read_text(), checkpoint(where, 'best.pt')
    assert np.mean(losses[-3:]) < 0.8 * losses[0], losses
    make = lambda found: train_cnn.CNN(train_cnn.CNNConfig(**found['model_config']))
    model = make(best)
    model.load_state_dict(best['model'])
    low = {kind: sum(p.numel() for m in model.modules() if isinstance(m, layers.LowBit) and m.kind == kind
                     for p in ((m.weight, m.bias) if kind == 'bin' else (m.weight,))) for kind in ('bin', 'tern', 'int4')}
    assert [type(m).__name__ for m in model.modules() if isinstance(m, layers.LowBit)].count('BinaryConv2d') in (2, 3)
    n, (packed_bytes, fp32_bytes) = sum(p.numel() for p in model.parameters()), layers.model_bytes(model)
    shares = ', '.join(f'{low[kind] / n:.1%} {name}' for kind, name in zip(low, ('binary', 'ternary', '4-bit'), strict=True))
    assert f'{n:,} parameters, {shares}; packed {packed_bytes:,} bytes, fp32 {fp32_bytes:,}' in said
    last, path = log(where)[-1], where / 'out' / 'packed.safetensors'
    assert last['packed_file_bytes'] == path.stat().st_size > packed_bytes and last['fp32_bytes'] == fp32_bytes == 4 * n
    assert last['binary_share'] == pytest.approx(low['bin'] / n)
    meta, tensors = common.read_packed(path)
    packed, crop = common.load_packed(make(meta), tensors), meta['images']['eval_crop']
    assert sum(t.numel() * t.element_size() for n, t in tensors.items()
               if not n.endswith(('running_mean', 'running_var', 'num_batches_tracked'))) == packed_bytes
    found, report = logits(packed, data, crop), np.load(where / 'out' / 'report.npz')
    assert torch.equal(found, logits(model, data, crop))
    assert (report['guesses'] == found.topk(5).indices[:, 0].numpy()).all()
    assert report['surety'] == pytest.approx(found.softmax(1).amax(1).numpy(), abs=1e-5)
    top1 = (report['guesses'] == images.load(data, 'val').labels).mean()
    assert last['packed_top1'] == meta['top1'] == last['best_top1'] == best['best'][0] == max(log(where, 'top1'))
    assert last['packed_top1'] == pytest.approx(top1) and last['best_step'] == meta['step'] == best['step'] == best['best'][1]


def test_what_is_logged(unbroken):
    """The columns of training, evaluation and packing, in units that fit together."""
    where = unbroken()
    records = common.read_log(where / 'out')
    for step, r in enumerate((r for r in records if 'loss' in r), 1):
        assert set(r) == {'step', 'samples', 'loss', 'lr', 'grad_norm'} | MEASURED - {'tokens_per_s'}
        assert r['step'] == step and r['samples'] == 8 * step and r['peak_mem_bytes'] > 50e6 and r['energy_j'] != 0
        assert r['samples_per_s'] == pytest.approx(8 / r['ms'] * 1e3) and r['input_samples_per_s'] > 100
        assert r['lr'] == common.lr_at(step - 1, 'cosine', 1e-2, 0, 2, 12)
    val = [r for r in records if 'val_loss' in r]
    assert [r['step'] for r in val] == [0, 4, 8, 12]
    for r in val:
        assert set(r) == {'step', 'samples', 'epoch', 'val_loss', 'top1', 'top5'} and 0 <= r['top1'] <= r['top5'] <= 1
        assert r['epoch'] == round(r['step'] * 8 / N_TRAIN, 3)
        assert r['top1'] * N_VAL == pytest.approx(round(r['top1'] * N_VAL), abs=1e-4)
    assert records[-1]['step'] == 12 and {'packed_file_bytes', 'packed_top1', 'packed_top5'} <= set(records[-1])
    said = (where / 'said').read_text()
    assert f'{N_TRAIN} images of 6 classes to train on, {N_VAL} to evaluate' in said
    assert '8 a step = 4 x 2 micro-steps x 1 processes; 12 steps' in said


def test_evaluation_by_hand(unbroken, data):
    """Loss, top-1 and top-5 of best.pt's weights, from the formulas."""
    where, labels = unbroken(*MIXED), torch.from_numpy(images.load(data, 'val').labels)
    best = checkpoint(where, 'best.pt')
    model = train_cnn.CNN(train_cnn.CNNConfig(**best['model_config']))
    model.load_state_dict(best['model'])
    found = logits(model, data)
    record = next(r for r in log(where) if r['step'] == best['step'] and 'top1' in r)
    assert record['val_loss'] == pytest.approx(-found.softmax(1)[torch.arange(N_VAL), labels].log().mean().item(), abs=1e-4)
    hits = found.topk(5).indices == labels[:, None]
    assert record['top1'] == pytest.approx(hits[:, 0].float().mean().item())
    assert record['top5'] == pytest.approx(hits.any(1).float().mean().item())


def test_plot_shows_a_run(start, unbroken):
    """Its status and a picture of its losses."""
    where = unbroken()
    done = start(ROOT / 'plot.py', 'status', 'out', cwd=where).wait()
    assert done.code == 0 and '12 of 12 (100%)' in done.out and 'val loss' in done.out and 'finished' in done.out, done.err
    pytest.importorskip('matplotlib', reason='plot.py loss needs matplotlib')
    done = start(ROOT / 'plot.py', 'loss', 'out', cwd=where).wait()
    assert done.code == 0 and (where / 'out' / 'loss.png').read_bytes()[:4] == b'\x89PNG', done.err


def test_model_config_merges(train, folder):
    """A config file's, then the command line's: each changes the layers that it names."""
    cwd = folder()
    with open(cwd / 'tiny.py', 'a') as f:
        f.write("model_config = dict(conv3='binary', fc1='int4')\n")
    train("--model_config={'fc1': 'ternary', 'final': 'binary'}", '--max_iters=1', cwd=cwd)
    wanted = dict.fromkeys(LAYERS, 'real') | dict(conv3='binary', fc1='ternary', final='binary')
    assert checkpoint(cwd)['model_config']['model_config'] == wanted


def test_bfloat16_trains_as_float32_does(unbroken):
    """Autocast changes the losses a little; weights stay float32."""
    exact, found = log(unbroken(), 'loss'), log(unbroken('--dtype=bfloat16'), 'loss')
    assert found != exact and found == pytest.approx(exact, abs=0.1)
    assert {t.dtype for t in checkpoint(unbroken('--dtype=bfloat16'))['model'].values()} == {torch.float32, torch.int64}


# ------------------------------------------------------------------------------------------------ numbers of processes


def test_torchrun_equals_one_process(start, folder, unbroken):
    """Real command lines, BatchNorm with micro-batches of 4: two processes log what one with two micro-steps logs. At the end
    there are a packed file, a table of classes and pictures."""
    cwd = folder()
    done = start(*torchrun(SCRIPT, 'tiny.py'), cwd=cwd, real=True).wait()
    assert done.code == 0, done.err
    assert '8 a step = 4 x 1 micro-steps x 2 processes' in done.out and 'mean over 2 processes' in done.out
    assert_close_runs(unbroken(), cwd)
    assert log(cwd, 'packed_top1') == log(unbroken(), 'packed_top1')
    files = os.listdir(cwd / 'out')
    assert {'packed.safetensors', 'classes.csv'} <= set(files) and any(name.endswith('.png') for name in files)


def test_two_processes_equal_one(start, folder, unbroken):
    """Mixed kinds with BatchNorm, dropout off: losses, evaluations and running statistics of one process; before each step the
    ranks hold bit-identical weights, statistics and optimizers."""
    cwd, options = folder(), (MIXED[0], '--learning_rate=3e-3')
    run_ranks(start, cwd, 2, *options, patch=STATES)
    assert_close_runs(unbroken(*options), cwd)
    sums = [(cwd / f'sums{rank}').read_text().split() for rank in (0, 1)]
    assert sums[0] == sums[1] and len(set(sums[0])) == 12
    one, two = checkpoint(unbroken(*options))['model'], checkpoint(cwd)['model']
    running = [name for name in one if 'running' in name]
    assert len(running) == 2 * (6 + 2) and all(torch.allclose(one[k], two[k], rtol=1e-3, atol=1e-4) for k in running)


def test_four_processes_without_batchnorm_equal_one(start, folder, unbroken):
    """All layers binary, no skips: nothing depends on the micro-batch, 4 x 2 images equal 1 x 2 x 4. With SGD: Adam's first
    step is as large for a gradient of 1e-8, which is all rounding, as for any other."""
    cwd, options = folder(), (*NO_BATCHNORM, '--max_iters=6', '--eval_interval=3', '--optimizer=SGD')
    done = run_ranks(start, cwd, 4, *options, '--micro_batch_size=2')
    assert 'BatchNorm' not in done[0].out
    assert_close_runs(unbroken(*options), cwd)


def test_ranks_stay_identical_with_dropout(start, folder):
    """Dropout differs between ranks, weights do not; rSVD too."""
    cwd = folder()
    run_ranks(start, cwd, 2, *MIXED, '--optimizer=rSVD', '--interval=4', '--rank=2', '--max_iters=8', patch=STATES)
    sums = [(cwd / f'sums{rank}').read_text().split() for rank in (0, 1)]
    assert sums[0] == sums[1] and len(set(sums[0])) == 8


@pytest.mark.parametrize('size', [3, 16, 20])
def test_evaluation_counts_each_image_once(start, folder, unbroken, size):
    """19 images on two ranks in rounds of 2 x 3 (the last has one image), 2 x 16 (not enough for the second) and 2 x 20 (none
    for it): the figures of one process that takes them by fives."""
    options, cwd = ('--max_iters=1', '--learning_rate=0', '--save_interval=99'), folder()
    run_ranks(start, cwd, 2, *options, f'--eval_batch_size={size}')
    assert_close_runs(unbroken(*options), cwd, columns=('val_loss',))
    one, two = (np.load(where / 'out' / 'report.npz') for where in (unbroken(*options), cwd))
    assert (one['guesses'] == two['guesses']).all() and one['surety'] == pytest.approx(two['surety'], abs=1e-5)


# ------------------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize('optimizer', train_cnn.OPTIMIZERS)
def test_stopped_and_resumed_equals_unbroken(train, folder, unbroken, optimizer):
    """Stopped between saves, inside of an evaluation and in front of a save: weights, statistics, optimizer, log and packed
    file of the run that was never stopped, bit for bit; mixed kinds, dropout, two micro-batches."""
    options = (*MIXED, f'--optimizer={optimizer}', '--rank=2', '--interval=5')
    if optimizer == 'SGD':
        options += ('--learning_rate=0.05',)
    whole, cwd = unbroken(*options), folder()
    for patch, step in ((kill_at(1), 2), (IN_EVALUATION.format(call=2 + 4 - 2, signal='SIGTERM'), 4), (kill_at(9), 10)):
        done = train(*options, '--resume=auto', cwd=cwd, patch=patch)
        assert printed_command(done.out)[1:] == ['out/config.py', '--resume=auto']
        assert f'stopped at step {step};' in done.out and checkpoint(cwd)['step'] == step
    assert 'resumed from out/last.pt at step 10' in train(*options, '--resume=auto', cwd=cwd).out
    assert_same_run(cwd, whole)
    assert (cwd / 'out' / 'packed.safetensors').read_bytes() == (whole / 'out' / 'packed.safetensors').read_bytes()


def test_killed_and_resumed_equals_unbroken(train, folder, unbroken):
    """SIGKILL in a step: on from the save before it. A finished run changes nothing but is packed again."""
    whole, cwd = unbroken(*MIXED), folder()
    train(*MIXED, cwd=cwd, patch=kill_at(7, 'SIGKILL'), code=-9)
    assert 'at step 5' in train(*MIXED, '--resume=auto', cwd=cwd).out
    assert_same_run(cwd, whole)
    os.remove(cwd / 'out' / 'packed.safetensors')
    assert 'step 12 of 12 is reached: nothing to train' in train('out/config.py', '--resume=auto', cwd=cwd).out
    assert_same_run(cwd, whole)
    assert (cwd / 'out' / 'packed.safetensors').read_bytes() == (whole / 'out' / 'packed.safetensors').read_bytes()


def test_a_signal_in_the_last_evaluation(train, folder, unbroken):
    """Of the packed weights, when training is over: it says how to go on, and going on ends as the unbroken run."""
    whole, cwd = unbroken(*MIXED), folder()
    done = train(*MIXED, cwd=cwd, patch=IN_EVALUATION.format(call=4 * 4 + 2, signal='SIGINT'))
    assert 'stopped at step 12; go on with' in done.out and not (cwd / 'out' / 'packed.safetensors').exists()
    train(*MIXED, '--resume=auto', cwd=cwd)
    assert_same_run(cwd, whole)


def test_a_signal_in_the_first_evaluation_leaves_nothing_to_lose(train, folder, unbroken):
    """Stopped at step 0: no checkpoint, and --resume=auto starts from the beginning."""
    cwd = folder()
    assert 'stopped at step 0;' in train(cwd=cwd, patch=IN_EVALUATION.format(signal='SIGTERM', call=2)).out
    assert not (cwd / 'out' / 'last.pt').exists()
    train('--resume=auto', cwd=cwd)
    assert_same_run(cwd, unbroken())


def test_a_signal_on_one_rank_stops_both(start, folder):
    """In a step and inside of an evaluation of rank 1, which has one batch of two there: both end, at the same step."""
    only = "if os.environ.get('RANK') == '1':\n    "
    in_evaluation = IN_EVALUATION.format(call=3, signal='SIGTERM').replace('torch.nn.functional.cross_entropy = cross',
                                                                           only + 'torch.nn.functional.cross_entropy = cross')
    for patch, step in ((kill_at(5, rank=1), 6), (in_evaluation, 4)):
        cwd = folder()
        done = run_ranks(start, cwd, 2, patch=patch)
        assert checkpoint(cwd)['step'] == step and f'stopped at step {step};' in done[0].out and done[1].out == ''


def test_epochs_means_the_total(train, folder, unbroken):
    """One epoch, then --epochs=2 on top of it: two in all, those of the run that was started with two."""
    options = ('--max_iters=0', '--eval_interval=0', '--schedule=constant', *MIXED)
    whole, cwd = unbroken(*options, '--epochs=2'), folder()
    done = train(*options, '--epochs=1', cwd=cwd)
    assert 'step 0 of 7' in done.out
    train(*options, '--epochs=2', '--resume=auto', cwd=cwd)
    assert checkpoint(cwd)['step'] == 13 == math.ceil(2 * N_TRAIN / 8)
    assert_same_run(cwd, whole)
    assert [r['step'] for r in log(cwd) if 'top1' in r] == [7, 13]


@pytest.mark.parametrize('options', [('--num_workers=0', '--eval_interval=5', '--log_interval=7'),
                                     ('--num_workers=1', '--eval_interval=0', '--save_interval=3'), ('--num_workers=3',)])
def test_what_is_watched_does_not_change_what_is_trained(train, folder, unbroken, options):
    """Threads that read ahead, evaluations, records and saves: the same weights, bit for bit, with dropout."""
    whole, cwd = unbroken(*MIXED), folder()
    train(*MIXED, *options, cwd=cwd)
    assert_same_state(checkpoint(cwd), checkpoint(whole), best=False)


def test_saved_config_repeats_the_run(start, folder, unbroken):
    """out/config.py holds every constant: run from another folder it gives the same run."""
    whole, cwd = unbroken(*MIXED), folder()
    done = start(SCRIPT, whole / 'out' / 'config.py', cwd=cwd, patch=REPORT).wait()
    assert done.code == 0, done.err
    assert_same_run(cwd, whole)


def test_resumed_hyperparameters_are_the_ones_asked_for(train, folder):
    """A constant changed on the command line of a resumed run is what the optimizer uses."""
    cwd = folder()
    train(*MIXED, cwd=cwd, patch=kill_at(3))
    train(*MIXED, '--resume=auto', '--weight_decay=0.25', '--beta2=0.9', "--lr_scale={'bin': 2.0, 'alpha': 0.5}", cwd=cwd)
    groups = checkpoint(cwd)['optimizer']['param_groups']
    assert {g['weight_decay'] for g in groups} == {0.0, 0.25} and {g['betas'] for g in groups} == {(0.9, 0.9)}
    assert sorted(g['lr_scale'] for g in groups) == [0.5, 1.0, 1.0, 1.0, 1.0, 2.0]


def test_damaged_last_falls_back_to_the_one_before(train, folder, unbroken):
    """A warning naming both files, and the end is that of the unbroken run. Without last.prev.pt: one line, exit status 2."""
    whole = unbroken(*MIXED)
    assert checkpoint(whole, 'last.prev.pt')['step'] == 10
    some = damages((whole / 'out' / 'last.pt').read_bytes())
    for what in ('truncated', 'flipped at 1/2'):
        cwd = folder()
        shutil.copytree(whole / 'out', cwd / 'out')
        (cwd / 'out' / 'last.pt').write_bytes(some[what])
        done = train(*MIXED, '--resume=auto', cwd=cwd)
        assert re.fullmatch(r'warning: out/last\.pt .*; going on from out/last\.prev\.pt \(step 10\)\n', done.err), done.err
        assert_same_run(cwd, whole)
        (cwd / 'out' / 'last.prev.pt').unlink()
        (cwd / 'out' / 'last.pt').write_bytes(some[what])
        assert one_error(train(*MIXED, '--resume=auto', cwd=cwd, code=2)).startswith('error: out/last.pt ')


def test_full_disk_costs_a_warning_not_the_run(train, folder, unbroken):
    """From step 6 on no file may grow over half a checkpoint: that of step 5 stays whole, each failed save is one warning,
    losses are those of an undisturbed run, no temporary file is left."""
    whole, cwd = unbroken(*MIXED), folder()
    half = (whole / 'out' / 'last.pt').stat().st_size // 2
    assert (whole / 'out' / 'log.jsonl').stat().st_size < half
    done = train(*MIXED, cwd=cwd, patch=disk(6, half) + kill_at(10))
    warned = re.findall(r'warning: could not write out/(\w+)\.pt: .*; the last good checkpoint stays', done.out)
    assert [name for name in warned if name != 'best'] == ['last', 'last']     # at 10, and the stop at 11
    assert 'saved only up to step 5' in done.out
    assert checkpoint(cwd)['step'] == 5 and log(cwd, 'loss') == log(whole, 'loss')[:11]
    assert not [name for name in os.listdir(cwd / 'out') if 'tmp' in name]
    assert 'at step 5' in train(*MIXED, '--resume=auto', cwd=cwd).out
    assert_same_run(cwd, whole)


def test_full_disk_at_the_end_is_one_line(train, folder, unbroken):
    """No room for the packed file: one line that says what to type, which then ends the run."""
    whole, cwd = unbroken(*MIXED), folder()
    patch = """
import common, resource, signal
def save_packed(*args, plain=common.save_packed):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    return plain(*args)
common.save_packed = save_packed
"""
    line = one_error(train(*MIXED, cwd=cwd, patch=patch, code=2))
    assert 'could not write out/packed.safetensors' in line and 'make room and type the same command with --resume=auto' in line
    train(*MIXED, '--resume=auto', cwd=cwd)
    assert_same_run(cwd, whole)


def test_a_best_that_could_not_be_saved_does_not_hide_a_later_one(train, folder):
    """best.pt fails at step 4 of a run that is best there: a later, worse evaluation is saved, and the run ends well."""
    cwd = folder()
    patch = """
import common
def save_checkpoint(path, state, *args, plain=common.save_checkpoint):
    if path.endswith('best.pt') and state['step'] < 8:
        raise OSError(f'could not write {path}: no room')
    plain(path, state, *args)
common.save_checkpoint = save_checkpoint
"""
    train('--learning_rate=0', cwd=cwd, patch=patch)        # top-1 of the first evaluation is never exceeded
    assert checkpoint(cwd, 'best.pt')['step'] == 8 == log(cwd)[-1]['best_step']


# ------------------------------------------------------------------------------------------------- numbers going wrong


def refused_nan(done, cwd, step, saved, name):
    line = one_error(done)
    assert f'at step {step};' in line and f'first non-finite gradient: {name};' in line
    assert f'the last checkpoint is of step {saved};' in line
    assert checkpoint(cwd)['step'] == saved and [r['step'] for r in log(cwd) if 'loss' in r][-1] == step


def test_nan_loss_stops_before_the_update(train, folder, unbroken):
    """In the second micro-batch of step 7: exit status 2, step and parameter named, and what was saved resumes to the weights
    of an undisturbed run."""
    cwd = folder()
    refused_nan(train(*MIXED, cwd=cwd, patch=NAN_LOSS.format(call=7 * 2 + 2, rank=0), code=2), cwd, 7, 5, 'conv1.weight')
    train(*MIXED, '--resume=auto', cwd=cwd)
    assert_same_run(cwd, unbroken(*MIXED))


@pytest.mark.parametrize('name, value', [('fc1.weight', 'nan'), ('conv5.alpha', 'inf')])
def test_the_parameter_whose_gradient_went_wrong_is_named(train, folder, name, value):
    """The loss is finite, one tensor in the middle of the network gets a NaN or an infinite gradient."""
    cwd = folder()
    patch = NAN_GRADIENT.replace('{name}', name).replace('{value}', value)
    refused_nan(train(*MIXED, '--grad_clip=0', cwd=cwd, patch=patch, code=2), cwd, 6, 5, name)


def test_nan_on_one_rank_stops_both(start, folder):
    """Only rank 1 sees the NaN: both leave with status 2 and one of them says why."""
    cwd, patch = folder(), REPORT + NAN_LOSS.format(call=7 + 1, rank=1)
    done = wait_all([start(SCRIPT, 'tiny.py', cwd=cwd, patch=patch, **r) for r in ranks(2)])
    assert [d.code for d in done] == [2, 2] and done[1].err == ''
    refused_nan(done[0], cwd, 7, 5, 'conv1.weight')


# --------------------------------------------------------------------------------------------------------- predictions


def predicted(out):
    """(classes, percentages) of the last five lines."""
    found = [re.fullmatch(r' *([\d.]+)%  (.+)', line) for line in out.split('\n')[-6:-1]]
    return [line[2] for line in found], [float(line[1]) for line in found]


def test_predict(start, unbroken, pictures, tmp_path):
    """The five likeliest of six classes in the middle of a picture, the first one first, from best.pt, from the packed file and
    without naming either; grey, CMYK and palette images as well."""
    where = unbroken('--eval_crop=0.6')
    whole, picture = Image.new('RGB', (30, 24), (40, 220, 40)), tmp_path / 'framed.png'
    whole.paste(Image.open(pictures / 'train' / 'c2' / '2.png').crop((8, 5, 22, 19)), (8, 5))
    whole.save(picture)
    ask = lambda image, *options: start(SCRIPT, f'--predict={image}', '--device=cpu', *options, cwd=where).wait()
    said = [ask(picture, *options) for options in (('--resume=out/best.pt',), ('--resume=out/packed.safetensors',),
                                                   ('--out_dir=out',), ('--out_dir=out', '--resume=auto'))]
    assert all(done.code == 0 and done.err == '' for done in said), said[0].err
    names, shares = predicted(said[0].out)
    assert [predicted(done.out) for done in said] == [(names, shares)] * 4
    assert len(set(names)) == 5 and set(names) < {f'c{i}' for i in range(6)} and shares == sorted(shares, reverse=True)
    best = checkpoint(where, 'best.pt')
    model = train_cnn.CNN(train_cnn.CNNConfig(**best['model_config']))
    model.load_state_dict(best['model'])
    seen = best['images']
    pixels = torch.from_numpy(np.array(images.square(whole, 20)))[None]
    boxes = crops.middle_boxes(1, 0.6)
    with torch.no_grad():
        wanted = model.eval()(crops.network_input(pixels, *boxes, 16, seen['mean'], seen['std']))[0].softmax(0)
        boxes = crops.middle_boxes(1, 1.0)
        uncropped = model(crops.network_input(pixels, *boxes, 16, seen['mean'], seen['std']))[0].softmax(0)
    assert names == [seen['classes'][i] for i in wanted.topk(5).indices]
    assert shares == pytest.approx((100 * wanted.topk(5).values).tolist(), abs=0.06)
    assert (wanted - uncropped).abs().max() > 0.02        # that the border would have told
    for mode, suffix in (('L', 'png'), ('CMYK', 'jpg'), ('P', 'gif')):
        path = tmp_path / f'{mode}.{suffix}'
        whole.convert(mode).save(path)
        done = ask(path, '--resume=out/packed.safetensors')
        assert done.code == 0 and done.err == '' and len(set(predicted(done.out)[0])) == 5, done.err


def test_mistakes_of_predict_are_one_line(start, unbroken, pictures, tmp_path):
    """Each names the file that is wrong."""
    where, picture = unbroken(), pictures / 'train' / 'c2' / '2.png'
    (tmp_path / 'text.jpg').write_text('not a picture')
    (tmp_path / 'text.safetensors').write_text('not a network')
    (tmp_path / 'text.pt').write_text('not a network')
    common.save_checkpoint(str(tmp_path / 'gpt.pt'), {'trainer': 'train_gpt'})
    common.save_packed(torch.nn.Linear(2, 2), str(tmp_path / 'gpt.safetensors'), {'trainer': 'train_gpt'})
    cases = [(f'{tmp_path}/text.jpg', 'out/best.pt', 'text.jpg'), ('none.jpg', 'out/best.pt', 'none.jpg'),
             (picture, 'none.pt', 'none.pt does not exist'), (picture, 'none.safetensors', 'none.safetensors'),
             (tmp_path, 'out/best.pt', str(tmp_path)), (picture, f'{tmp_path}/gpt.pt', 'gpt.pt was written by train_gpt.py'),
             (picture, f'{tmp_path}/gpt.safetensors', 'gpt.safetensors was written by train_gpt.py'),
             (picture, f'{tmp_path}/text.pt', 'text.pt'), (picture, f'{tmp_path}/text.safetensors', 'text.safetensors')]
    cases += [(picture, of, 'nosuch/best.pt does not exist') for of in ('auto', '')]
    jobs = [start(SCRIPT, f'--predict={image}', f'--resume={of}', '--out_dir=nosuch', cwd=where) for image, of, _ in cases]
    wrong = []
    for job, case in zip(jobs, cases, strict=True):
        done = job.wait()
        if done.code != 2 or done.err.count('\n') != 1 or not done.err.startswith('error: ') or case[2] not in done.err:
            wrong.append((case, done.code, done.err[-300:]))
    assert not wrong, wrong


# ------------------------------------------------------------------------------------------------ starting and refusing


def test_init_from_another_run(train, folder, unbroken, other_data, data, tmp_path):
    """Other classes: all is kept but the head, which is said to be new, also where there are as many. The same classes: all."""
    source, cwd = unbroken(*MIXED), folder()
    options = (*MIXED, f'--init_from={source}/out/best.pt', '--max_iters=1', '--learning_rate=0', '--seed=2')
    renamed = shutil.copytree(data, tmp_path / 'renamed')
    record = json.loads((renamed / 'images.json').read_text())
    record['classes'] = [f'other {name}' for name in record['classes']]
    (renamed / 'images.json').write_text(json.dumps(record))
    old, total = checkpoint(source, 'best.pt')['model'], len(checkpoint(source)['model'])
    head = ['final.bias', 'final.weight']
    for dataset, out, new in ((other_data, 'a', head), (renamed, 'b', head), (data, 'c', [])):
        done = train(*options, f'--dataset={dataset}', f'--out_dir={out}', cwd=cwd)
        assert f'{total - len(new)} of {total} tensors from {source}/out/best.pt; new: {", ".join(new) or "none"}\n' in done.out
        found = common.read_checkpoint(str(cwd / out / 'last.pt'))['model']
        assert found.keys() == old.keys()
        changed = {name for name in found if not torch.equal(found[name], old[name])}
        assert set(new) <= changed and all(name in new or 'running' in name or 'tracked' in name for name in changed)


def test_resume_from_elsewhere(train, folder, unbroken):
    """Weights, optimizer and step of another run's checkpoint, in a run of its own that ends like that one."""
    cwd, whole = folder(), unbroken(*MIXED)
    train(*MIXED, f'--resume={whole}/out/last.prev.pt', cwd=cwd)
    assert_same_state(checkpoint(cwd), checkpoint(whole), best=False)
    assert log(cwd, 'loss') == log(whole, 'loss')[10:]


def test_a_run_is_not_overwritten_by_accident(train, folder, unbroken):
    """A folder with a run is refused, untouched; with --overwrite=True nothing of the old run is left."""
    cwd = folder()
    shutil.copytree(unbroken() / 'out', cwd / 'out')
    before = {p.name: p.read_bytes() for p in (cwd / 'out').iterdir()}
    for options in (('--seed=2',), (f'--resume={unbroken(*MIXED)}/out/best.pt', *MIXED)):
        assert '--overwrite=True' in one_error(train(*options, cwd=cwd, code=2))
    assert {p.name: p.read_bytes() for p in (cwd / 'out').iterdir()} == before
    train('--overwrite=True', '--seed=2', cwd=cwd, patch=kill_at(2, 'SIGKILL'), code=-9)
    assert not {'last.pt', 'last.prev.pt', 'packed.safetensors'} & set(os.listdir(cwd / 'out'))
    assert 'resumed' not in train('--resume=auto', '--seed=2', cwd=cwd).out
    assert_same_run(cwd, unbroken('--seed=2'))


def test_resume_from_elsewhere_over_a_run(train, folder, unbroken):
    """With --overwrite=True nothing of the run that was here is left, in the folder or in the log."""
    cwd, other = folder(), unbroken(*MIXED)
    shutil.copytree(unbroken() / 'out', cwd / 'out')
    options = (*MIXED, f'--resume={other}/out/last.prev.pt', '--overwrite=True')
    train(*options, cwd=cwd, patch=kill_at(10, 'SIGKILL'), code=-9)
    assert not {'last.prev.pt', 'best.pt', 'packed.safetensors'} & set(os.listdir(cwd / 'out')) and log(cwd) == []
    assert_same_state(checkpoint(cwd), checkpoint(other, 'last.prev.pt'), best=False)      # saved before its first step
    train(*options, cwd=cwd)
    assert_same_state(checkpoint(cwd), checkpoint(other), best=False)
    assert log(cwd, 'loss') == log(other, 'loss')[10:] and [r['step'] for r in log(cwd) if 'top1' in r] == [12]
    assert checkpoint(cwd, 'best.pt')['step'] == 12 == log(cwd)[-1]['best_step']       # of its own evaluations


def test_changed_labels_are_another_data_set(train, folder, tmp_path):
    """Between a stop and --resume=auto: of the images to evaluate two classes are exchanged, all else is as it was."""
    cwd, options = folder(), (f'--dataset={tmp_path}/ten', '--max_iters=6', '--resume=auto')
    ten_images(tmp_path / 'ten', range(10))
    train(*options, cwd=cwd, patch=kill_at(2))
    before = {p.name: p.read_bytes() for p in (cwd / 'out').iterdir()}
    os.rename(tmp_path / 'ten', tmp_path / 'old')
    ten_images(tmp_path / 'ten', [1, 0, *range(2, 10)])
    line = one_error(train(*options, cwd=cwd, code=2))
    assert 'out/last.pt has another data; ' in line
    assert {p.name: p.read_bytes() for p in (cwd / 'out').iterdir()} == before


@pytest.mark.parametrize('damage', ['', 'truncated', 'flipped at 1/2'])
def test_a_lost_best_is_one_line(train, folder, unbroken, damage):
    """At the end of a run whose last evaluation was not the best: best.pt is missing or damaged. The last weights are untouched
    and can be gone on from as it says."""
    cwd, options = folder(), (*NO_BATCHNORM, '--learning_rate=0')
    shutil.copytree(unbroken(*options) / 'out', cwd / 'out')
    best, last = cwd / 'out' / 'best.pt', (cwd / 'out' / 'last.pt').read_bytes()
    best.write_bytes(damages(best.read_bytes())[damage]) if damage else best.unlink()
    line = one_error(train(*options, '--resume=auto', cwd=cwd, code=2))
    assert line.startswith('error: out/best.pt ' + ('is damaged' if damage else 'does not exist'))
    assert '--init_from=out/last.pt' in line and 'make room' not in line
    assert (cwd / 'out' / 'last.pt').read_bytes() == last
    train(*options, '--init_from=out/last.pt', '--out_dir=new', '--max_iters=1', cwd=cwd)


def test_micro_batches_of_one_image(train, folder):
    """Trained where each BatchNorm has more than one number to normalise; else one line says what is wrong, see MISTAKES."""
    some = dict.fromkeys(LAYERS[:10], 'binary')
    for options in (('--image_size=32', '--residual=True'), (f'--model_config={some}', '--residual=False'),
                    (kinds('real', 'ternary', 'int4', 'real', 'real', 'real', 'real', 'real', 'binary', 'binary'),),
                    ('--channels=4,4,8,8,4', f'--model_config={some}', '--image_size=33')):
        cwd = folder()
        train('--micro_batch_size=1', '--max_iters=1', *options, cwd=cwd)
        assert math.isfinite(log(cwd, 'loss')[0])


def test_other_checkpoints_are_refused_in_one_line(train, folder, unbroken, other_data):
    """Another trainer's, of other data, another shape, other kinds, another optimizer, a missing and a damaged one."""
    good, cwd = checkpoint(unbroken()), folder()
    bad = str(cwd / 'bad.pt')

    def line(state, *options, mode='resume'):
        torch.save(state, bad)
        return one_error(train(f'--{mode}={bad}', *options, cwd=cwd, code=2))
    for mode in ('resume', 'init_from'):
        assert f'{bad} was written by train_gpt.py, not train_cnn.py' in line(good | {'trainer': 'train_gpt'}, mode=mode)
        assert f'{bad} has checkpoint version 99' in line(good | {'version': 99}, mode=mode)
        assert f'{bad} is no nanobit checkpoint' in line({}, mode=mode)
    for option, what in (("--model_config={'fc1': 'binary'}", 'model_config'), ('--channels=4,4,8,8,4', 'channels'),
                         ('--fc=8,4', 'fc'), ('--residual=False', 'residual'), ('--image_size=20', 'size'),
                         (f'--dataset={other_data}', 'n_classes'), ('--optimizer=SGD', 'optimizer')):
        text = line(good, option)
        assert f'{bad} has another {what}; ' in text and f'--init_from={bad}' in text
    assert 'has another data; ' in line(good | {'data': 'sha256 of another'})
    assert 'does not fit this model' in line(good | {'model': {k: t for k, t in good['model'].items() if k != 'fc1.weight'}})
    assert not (cwd / 'out').exists()


MISTAKES = [
    (("--model_config={'conv11': 'binary'}",), "'conv11'"), (("--model_config={'conv1': 'bin'}",), "conv1='bin'"),
    (("--model_config={'fc1': 'reel', 'fc2': 'fp'}",), "fc1='reel', fc2='fp' is none of binary, real, ternary, int4"),
    (('--model_config=binary',), 'model_config'), (('--norm=layer',), "norm='layer' is none of channel, spatial, sample"),
    (('--crop_scale=0,1',), 'crop_scale=(0.0, 1.0)'), (('--crop_scale=0.5,0.4',), 'crop_scale=(0.5, 0.4)'),
    (('--crop_scale=0.5',), 'crop_scale=(0.5,)'), (('--crop_scale=()',), 'crop_scale=()'),
    (('--crop_scale=0.5,1.1',), 'crop_scale=(0.5, 1.1)'), (('--crop_ratio=0.9',), 'crop_ratio=0.9'),
    (('--filter_dimension=4',), 'filter_dimension=4'), (('--image_size=15',), 'image_size=15'),
    (('--channels=4,4,8,8',), 'channels=(4, 4, 8, 8)'), (('--channels=4,4,8,8,0',), 'channels=(4, 4, 8, 8, 0)'),
    (('--channels=()',), 'channels=()'), (('--fc=8',), 'fc=(8,)'), (('--eval_crop=0',), 'eval_crop=0.0'),
    (('--eval_crop=1.5',), 'eval_crop=1.5'), (('--dropout=1',), 'dropout=1.0'), (('--binary_alpha=0',), 'binary_alpha'),
    (('--optimizer=adam',), "optimizer='adam' is none of Adam, AdamW, SGD, rSVD"), (('--schedule=two_stage',), 'two_stage'),
    (('--dtype=float16',), "dtype='float16'"), (('--epochs=0', '--max_iters=0'), 'epochs=0.0'), (('--max_iters=-1',), '-1'),
    (('--batch_size=9',), 'batch_size=9 is no multiple of micro_batch_size=4 x 1 processes'),
    (('--batch_size=0',), 'batch_size=0'), (('--num_workers=-1',), 'num_workers=-1'), (('--rank=0',), 'rank=0'),
    (('--micro_batch_size=1',), 'micro_batch_size=1 at image_size=16 leaves a BatchNorm one number'),
    (('--micro_batch_size=1', kinds('binary'), '--channels=4,4,8,8,4', '--image_size=31'), 'image_size=31 leaves a'),
    (('--micro_batch_size=0', '--batch_size=1', '--residual=False'), 'micro_batch_size=1 at image_size=16'),
    (('--eval_batch_size=0',), 'eval_batch_size=0'), (('--log_interval=0',), 'log_interval=0'),
    (("--lr_scale={'bin': -1}",), 'lr_scale'), (("--lr_scale={'real': 2}",), 'real'), (('--grad_clip=-1',), 'grad_clip=-1.0'),
    (('--dataset=nosuch',), 'type: python data/'), (('--dataset=images/nosuch',), 'prepare.py --dir PATH --name=nosuch'),
    (('--device=gpu',), 'gpu'), (('--image_sise=20',), 'did you mean image_size?'),
    (('--out_dir=/proc/nosuch',), '/proc/nosuch'), (('--init_from=nosuch.pt',), 'nosuch.pt does not exist'),
    (('--resume=nosuch.pt',), 'nosuch.pt does not exist'), (('nosuch.py',), 'no config file nosuch.py'),
]


@pytest.mark.parametrize('group', range(3))
def test_mistakes_are_one_line(start, folder, group):
    """Each ends with exit status 2 and one line that says what is wrong, no traceback, and no out_dir."""
    cwd, wrong, some = folder(), [], MISTAKES[group::3]
    jobs = [start(SCRIPT, 'tiny.py', *options, cwd=cwd) for options, _ in some]
    for job, (options, said) in zip(jobs, some, strict=True):
        done = job.wait()
        lines = done.err.split('\n')
        if done.code != 2 or len(lines) != 2 or not lines[0].startswith('error: ') or said not in lines[0]:
            wrong.append((options, done.code, done.err[-400:]))
    assert not wrong and not (cwd / 'out').exists(), wrong


def test_two_ranks_make_a_mistake_in_one_line(start, folder):
    """Rank 0 says it, once; rank 1 fails too (silently, or while it joins a group that rank 0 has left already)."""
    for option, said in (('--batch_size=6', 'batch_size=6 is no multiple of micro_batch_size=4 x 2 processes'),
                         ('--dataset=nosuch', 'type: python data/')):
        done = wait_all([start(SCRIPT, 'tiny.py', option, cwd=folder(), **r) for r in ranks(2)])
        assert said in one_error(done[0])
        assert done[1].code != 0


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
    pytest.importorskip('sklearn', reason='the digits come with scikit-learn')
    for option in ('--overwrite=False', '--overwrite=True'):
        done = start(SCRIPT, *SMALL, option, cwd=empty_digits, patch=ELSEWHERE + REPORT).wait()
        assert done.code == 0 and done.err == '', done.err
        assert '1,442 images of 10 classes to train on, 355 to evaluate' in done.out
        assert common.read_log(empty_digits / 'out')[-1]['packed_file_bytes'] > 0
        made = (empty_digits / 'data' / 'digits' / 'images.json').stat().st_mtime_ns
        (empty_digits / 'data' / 'digits' / 'prepare.py').unlink(missing_ok=True)
    assert made == (empty_digits / 'data' / 'digits' / 'images.json').stat().st_mtime_ns


def test_digits_that_cannot_be_made_are_one_line(start, empty_digits):
    """What prepare.py says is all that is said."""
    (empty_digits / 'data' / 'digits' / 'prepare.py').write_text(
        'import sys\nprint("error: no scikit-learn", file=sys.stderr)\nsys.exit(2)\n')
    done = start(SCRIPT, *SMALL, cwd=empty_digits, patch=ELSEWHERE).wait()
    assert one_error(done) == 'error: no scikit-learn\n' and not (empty_digits / 'out').exists()
