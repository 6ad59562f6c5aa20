"""Measurements of convolutions for bench.py: a training step of one layer of train_cnn.py, and of the whole network."""
import statistics
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

import configurator
import layers
from measure.turns import device_name, in_turns, mib, middle, peak_bytes, ratio, show, times_ms
from train_cnn import CNN, KINDS, CNNConfig

# name: (kind of layers.py or mixed, normalization of binary layers)
CONVS = {'real': ('fp', 'batch'), 'mixed': ('mixed', 'batch'), 'binary': ('bin', 'batch'), 'binary channel': ('bin', 'channel'),
         'binary spatial': ('bin', 'spatial'), 'ternary': ('tern', 'batch'), 'int4': ('int4', 'batch')}
NAMES = {kind: name for name, kind in KINDS.items()}
CHANNELS = (32, 64, 64, 128, 256)


def one_layer(kind, norm, channels):
    """A convolution with its normalization and one ReLU: after the real convolution, inside and before the low-bit ones."""
    if kind == 'fp':
        return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels),
                             nn.ReLU(inplace=True))
    own = norm != 'batch'
    options = dict(norm=norm) if own else dict(alpha=None) if kind == 'bin' else {}
    conv = layers.conv2d(kind, channels, channels, 3, padding=1, bias=own, act='relu', **options)
    return nn.Sequential(conv, nn.Identity() if own else nn.BatchNorm2d(channels))


def network(kind, norm):
    """The network of train_cnn.py for 101 classes. mixed: conv8, conv9 and conv10 are binary."""
    names = [f'conv{i}' for i in range(1, 11)] + ['fc1', 'fc2', 'final']
    binary = ('conv8', 'conv9', 'conv10')
    kinds = {n: NAMES['bin' if n in binary else 'fp'] if kind == 'mixed' else NAMES[kind] for n in names}
    return CNN(CNNConfig(101, kinds, CHANNELS, norm=norm))


def conv_worker(a):
    """Answer each line: a number of steps by milliseconds per step of each layer and of the network, 'memory' by bytes."""
    cuda, (kind, norm) = a.device == 'cuda', CONVS[a.name]
    amp = torch.autocast(a.device, torch.bfloat16, enabled=a.dtype == 'bfloat16')
    torch.manual_seed(0)
    steps = {}
    for b, width in enumerate(CHANNELS if kind != 'mixed' else ()):
        side = a.image_size // 2 ** b
        x = torch.randn(a.batch, width, side, side, device=a.device).to(memory_format=torch.channels_last).requires_grad_()
        layer = one_layer(kind, norm, width).to(a.device, memory_format=torch.channels_last)
        layer = torch.compile(layer) if a.compile else layer
        with torch.no_grad(), amp:
            g = torch.randn_like(layer(x))

        def step(x=x, layer=layer, g=g):
            with amp:
                y = layer(x)
            y.backward(g)
            x.grad = None
        steps[f'{width}x{side}_ms'] = step
    model = network(kind, norm).to(a.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    net = torch.compile(model) if a.compile else model
    images = torch.rand(a.batch, 3, a.image_size, a.image_size, device=a.device).to(memory_format=torch.channels_last)
    labels = torch.randint(101, (a.batch,), device=a.device)

    def train():
        with amp:
            loss = F.cross_entropy(net(images).float(), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    steps['net_ms'] = train
    for line in sys.stdin:
        if line == 'memory\n':
            yield {'peak_bytes': peak_bytes(model, optimizer, train, cuda), 'packed_bytes': layers.model_bytes(model)[0],
                   'parameters': sum(p.numel() for p in model.parameters())}
            continue
        yield {key: statistics.median(times_ms(step, int(line), cuda)) for key, step in steps.items()}


def conv(a):
    """Measure a training step of train_cnn.py's convolutions, relative to Conv2d with BatchNorm2d, and of the network."""
    variants = [(name, dtype) for dtype in a.dtypes.split(',') for name in a.variants.split(',')]
    if wrong := [v for names in variants for v in names if v not in (*CONVS, 'float32', 'bfloat16')]:
        configurator.fail(f'{wrong[0]!r} is no variant or dtype; type some of {",".join(CONVS)} and float32,bfloat16')
    if a.image_size < 16:
        configurator.fail(f'--image_size={a.image_size} is too small to be halved four times; type 16 or more')
    jobs = [dict(vars(a), run=None, bench='conv', name=n, dtype=d) for n, d in variants]
    workers, answers = in_turns(jobs, a.rounds, 2, a.steps)
    memory = {}
    for v, worker in zip(variants, workers, strict=True):
        memory[v] = worker.ask('memory')
        worker.close()
    answers_of = dict(zip(variants, answers, strict=True))
    print('forward and backward of a 3x3 convolution with normalization and ReLU (channels x pixels of a side), and a training '
          f'step of the network;\n{a.batch} images of {a.image_size} pixels, {a.device} ({device_name(a)}), '
          f'{a.threads} threads, torch {torch.__version__}, compile={a.compile}, {a.rounds} rounds x {a.steps} steps;\n'
          'peak: tensors alive at once')
    rows = []
    for name, dtype in variants:
        mine, base = answers_of[name, dtype], answers_of.get(('real', dtype))
        one, real = memory[name, dtype], memory.get(('real', dtype), {})
        row = {'bench': 'conv', 'name': name, 'dtype': dtype, **one}
        for key in mine[0]:
            row |= {key: middle(mine, key), key.replace('_ms', '_ratio'): ratio(mine, base, key)}
        rows.append({**row, 'peak_ratio': one['peak_bytes'] / real['peak_bytes'] if real else None, 'batch': a.batch,
                     'image_size': a.image_size, 'threads': a.threads, 'compile': a.compile, 'device': device_name(a),
                     'torch': torch.__version__})
    shapes = [f'{width}x{a.image_size // 2 ** b}' for b, width in enumerate(CHANNELS)]
    show(rows, [('name', 'layers', ''), ('dtype', 'dtype', ''),
                *((f'{s}_{key}', head, spec) for s in shapes for key, head, spec in (('ms', s, '.1f'), ('ratio', 'x', '.2f'))),
                ('net_ms', 'network ms', '.0f'), ('net_ratio', 'x', '.2f'), ('peak_bytes', 'peak MiB', mib),
                ('peak_ratio', 'x', '.2f'), ('packed_bytes', 'packed bytes', ',')], a.json)
