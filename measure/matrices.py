"""Measurements of single linear layers for bench.py: bits, error and time of every kind, compared to nn.Linear."""
import importlib.util
import json
import re
import sys

import torch
import torch.nn as nn

import configurator
import layers
from measure.turns import device_name, in_turns, median_ms, middle, ratio, show

LAYERS = {'linear': None, 'linear trained': None, 'half': 'half', 'int8': 'int8',
          'int8 act': ('int8', dict(activations='int8')), 'int4': 'int4',
          'nf4': 'nf4', 'nf4 8bit': ('nf4', dict(scales='8bit')), 'fit4': 'fit4', 'fit4 64': ('fit4', dict(group=64)),
          'ternary': 'tern', 'binary': 'bin', 'lora half': ('lora', dict(rank=32, base='half')),
          'lora int4': ('lora', dict(rank=32, base='int4')), 'lora nf4': ('lora', dict(rank=32, base='nf4')),
          'lora fit4': ('lora', dict(rank=32, base='fit4')), 'lowrank': ('lowrank', dict(rank=64)), 'bitsandbytes nf4': None,
          'bitsandbytes nf4 8bit': None, 'bitsandbytes nf4 eval': None}


def make_layer(name, columns, rows, device, dtype):
    """Make a layer with N(0,1) weights and no bias that computes in dtype: (layer, bits per weight, relative RMS error).
    All but adapters and low-rank factors is frozen. 'bitsandbytes nf4 eval' is its layer in evaluation on a CPU with bf16
    instructions: the weights have another layout, arithmetic is in bf16 for any input, and there is no backward pass."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(columns, rows, bias=False, device=device))
    w = nn.init.normal_(model[0].weight).detach().clone()
    if name in ('linear', 'linear trained'):
        return model[0].requires_grad_(name == 'linear trained').to(dtype), 32, 0.0
    if name.startswith('bitsandbytes'):
        import bitsandbytes
        layer = bitsandbytes.nn.Linear4bit(columns, rows, bias=False, compute_dtype=dtype, quant_type='nf4',
                                           compress_statistics=name.endswith('8bit'))
        layer.load_state_dict({'weight': w.cpu()})
        layer = layer.to(device)
        state = layer.weight.quant_state
        q = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state).float()
        stored = [layer.weight, state.absmax] + ([state.state2.absmax] if state.nested else [])
        layer.train(not name.endswith('eval'))
        return layer, 8 * sum(t.nbytes for t in stored) / w.numel(), ((q - w).norm() / w.norm()).item()
    layers.convert(model, {'0': LAYERS[name]}, verbose=False, packed=True)
    layer = model[0]
    base = getattr(layer, 'base', layer)
    q = (base.effective_weight() if isinstance(base, layers.LowBit) else base.weight.float() if name != 'lowrank'
         else (base.A * base.c @ base.B).detach())
    if name == 'binary':                            # the output is normalized, so the best scale counts
        q = q * (q * w).sum() / q.square().sum()
    stored = [t for t in [*base.parameters(), *base.buffers()]]
    if name == 'ternary':
        stored.remove(base.gain)                    # belongs to the RMSNorm inside the layer
    return layer, 8 * sum(t.nbytes for t in stored) / w.numel(), ((q - w).norm() / w.norm()).item()


def layers_worker(a):
    rows = {}
    for line in sys.stdin:
        request = json.loads(line)
        tokens, columns, outs = request['shape']
        if (columns, outs) not in rows:
            rows[columns, outs] = make_layer(a.name, columns, outs, a.device, getattr(torch, a.dtype))
        layer, bits, error = rows[columns, outs]
        x = torch.randn(tokens, columns, device=a.device, dtype=getattr(torch, a.dtype))
        g = torch.randn(tokens, outs, device=a.device, dtype=x.dtype)

        def forward(layer=layer, x=x):
            with torch.inference_mode():
                layer(x)

        def both(layer=layer, x=x, g=g):
            x.grad = None
            layer.zero_grad(set_to_none=True)
            layer(x.requires_grad_()).backward(g)
        cuda = a.device == 'cuda'
        yield {'bits': bits, 'error': error, 'forward_ms': median_ms(forward, request['seconds'], cuda),
               'both_ms': None if a.name.endswith('eval') else median_ms(both, request['seconds'], cuda)}


def every_layer(a):
    """Measure every kind of layer: bits per weight, error on normal weights, time relative to a frozen nn.Linear."""
    names = a.kinds.split(',') if a.kinds else [n for n in LAYERS if 'bits' not in n
                                                or importlib.util.find_spec('bitsandbytes')]
    if unknown := [n for n in names if n not in LAYERS]:
        configurator.fail(f'{unknown[0]!r} is no kind of layer; type --kinds= with some of {",".join(LAYERS)}')
    if not re.fullmatch(r'[1-9]\d*x[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*x[1-9]\d*)*', a.shapes):
        configurator.fail(f'--shapes={a.shapes} is not tokens x in x out; type e.g. --shapes=1x1024x1024,32x1024x4096')
    shapes = [tuple(map(int, s.split('x'))) for s in a.shapes.split(',')]
    names = [n for n in names if n != 'linear']
    names.insert(0, 'linear')
    rows = []
    for shape in shapes:
        line = json.dumps({'shape': shape, 'seconds': a.seconds})
        workers, answers = in_turns([dict(vars(a), run=None, bench='layers', name=n) for n in names], a.rounds, line, line)
        for worker in workers:
            worker.close()
        base = answers[0]
        for name, mine in zip(names, answers, strict=True):
            ms = {k: middle(mine, k) for k in ('forward_ms', 'both_ms')}
            by = {k.replace('ms', 'ratio'): ratio(mine, base, k) for k in ms}
            rows.append({'bench': 'layers', 'name': name, 'bits': mine[0]['bits'], 'error': mine[0]['error'], **ms, **by,
                         'tokens': shape[0], 'in': shape[1], 'out': shape[2], 'dtype': a.dtype, 'threads': a.threads,
                         'device': device_name(a), 'torch': torch.__version__})
        one = rows[-len(names)]
        print(f'{one["tokens"]} tokens x {one["in"]} -> {one["out"]}, {a.dtype}, {a.device} ({one["device"]}), {a.threads} '
              f'threads, torch {torch.__version__}, {a.rounds} rounds')
        show(rows[-len(names):], [('name', 'layer', ''), ('bits', 'bits/weight', '.3f'), ('error', 'relative RMS', '.4f'),
                                  ('forward_ms', 'forward ms', '.3f'), ('forward_ratio', '×', '.2f'),
                                  ('both_ms', 'with backward ms', '.3f'), ('both_ratio', '×', '.2f')], a.json)
        print()
