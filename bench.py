"""
Time, memory and error, measured. Every variant runs in a fresh process of its own; ratios are to a baseline of the same run.

    python bench.py stats bignet half lora int4 qlora          # parameters, bytes, peaks of BigNet's compressed forms
    python bench.py compare half lora int4 qlora               # how far their outputs are from the full-precision ones
    python bench.py fit lora qlora --seeds=1,2,3               # a small training loop; exit status 1 if it does not learn
    python bench.py layers                                     # every kind: bits, error, time beside nn.Linear
    python bench.py train                                      # a training step of each kind, fp32 and bf16, 2 minutes
    python bench.py train --gpt2 --device=cuda --compile       # GPT-2 124M at 1,024 tokens on a GPU
    python bench.py train --model=bitnet                       # train_bitnet.py's model beside its full-precision twin
    python bench.py train --fineweb95m --device=cuda --compile # ... in the shape of config/fineweb95m.py
    python bench.py optim                                      # a step and a refresh of low-rank optimizers, GPT-2's blocks
    python bench.py optim-bytes                                # optimizer bytes and peak memory of DistilBERT, by rank
    python bench.py finetune                                   # DistilBERT: a training step of full, LoRA, low-rank Adam
    python bench.py conv                                       # train_cnn.py's layers beside Conv2d and BatchNorm2d
    python bench.py bundle nanobit.zip                         # the sources, byte for byte the same zip each time

stats and compare take a run's checkpoint or a Hugging Face folder in place of bignet. --json=PATH appends the rows as JSON
lines; `python plot.py bars PATH` draws them.
"""
import argparse
import hashlib
import importlib.util
import json
import os
import re
import runpy
import statistics
import sys
import time
import zipfile
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import configurator
import layers
from common import peak_above, peak_memory_bytes
from measure import convolutions, optimizers
from measure.turns import (Worker, device_name, in_turns, measure, median_ms, mib, middle, peak_bytes, ratio,
                           resident_bytes, show, times_ms)
from report import costs

# Dense bf16 peak of a card without sparsity, from its data sheet, for the share of it that a model's arithmetic uses.
PEAK_FLOPS = {'H200': 989e12, 'H100': 989e12, 'A100': 312e12, 'L40S': 362e12, '4090': 165e12}

# ---------------------------------------------------------------------------------------------------------------------
# BigNet, its compressed forms, or those of a checkpoint


class BigNet(nn.Sequential):
    """6 residual blocks of three Linear(dim, dim), ReLU between, LayerNorm between blocks: 18,903,040 parameters at 1,024.
    The model of a course on deep learning (UT Austin), whose compressed forms are a common first exercise."""

    class Block(nn.Sequential):
        def __init__(self, dim):
            super().__init__(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))

        def forward(self, x):
            return x + super().forward(x)

    def __init__(self, dim=1024):
        super().__init__(*(m for i in range(6) for m in ([nn.LayerNorm(dim)] if i else []) + [self.Block(dim)]))


WORDS = {'tern': 'ternary', 'bin': 'binary'}        # what a format is called here, where not as in layers.FORMATS
FORMS = {WORDS.get(kind, kind): kind for kind in layers.FORMATS if kind not in ('fp', 'lora', 'group', 'sparse')}
FORMS |= {{'half': 'lora', 'int4': 'qlora'}.get(name, f'lora-{name}'): ('lora', kind) for name, kind in FORMS.items()
          if kind != 'lowrank'}
# The course's bounds, max and mean, on the distance of outputs from the full-precision ones.
BOUNDS = {'half': (1e-2, 1e-3), 'lora': (5e-3, 5e-4), 'int4': (.5, .1), 'qlora': (.5, .1)}


def base_model(base, seed, device, dim=1024):
    """(model, inputs): BigNet with weights of `seed`, or what a checkpoint or a Hugging Face folder holds."""
    torch.manual_seed(seed)
    if base == 'bignet':
        model, inputs = BigNet(dim), lambda n: torch.randn(n, dim)
    elif os.path.isfile(os.path.join(base, 'config.json')):
        try:
            from transformers import AutoModel
        except ImportError:
            configurator.fail(f'{base} is a Hugging Face folder; type: pip install transformers')
        model = AutoModel.from_pretrained(base, local_files_only=True, dtype=torch.float32)
        inputs = lambda n: torch.randint(model.config.vocab_size, (n, 64))
    else:
        import sample
        model, _, _ = sample.load(sample.find_checkpoint(base))
        inputs = lambda n: torch.randint(model.config.vocab_size, (n, model.config.block_size))
    return model.to(device), lambda n: inputs(n).to(device)


def form(model, name, a):
    """The model with its nn.Linear layers, but for tied ones, in the form `name`; unchanged for a base's own name."""
    if name not in FORMS:
        return model
    kind, base = FORMS[name] if isinstance(FORMS[name], tuple) else (FORMS[name], None)
    options = {'lora': dict(rank=a.rank, alpha=a.alpha, base=base), 'lowrank': dict(rank=a.rank)}.get(kind, {})
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linears = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and id(m.weight) not in embeddings}
    if not linears:
        others = sorted({type(m).__name__ for m in model.modules() if getattr(m, 'weight', None) is not None})
        configurator.fail(f'{a.base} has no nn.Linear to convert, only {", ".join(others)}; give another model')
    try:
        layers.convert(model, {n: (kind, options) for n in linears}, verbose=False, packed=True)
    except ValueError as e:
        configurator.fail(f'{e}; give other options')
    for m in model.modules():                       # biases stay trainable, as in the course; under an adapter they do not
        if isinstance(m, layers.Linear4bit | layers.Int8Linear) and base is None and m.bias is not None:
            m.bias.requires_grad_(True)
    return model


def theoretical_bytes(module):
    """Bytes of one module by the formula of its format, from its shape alone; None for a module without one."""
    n = getattr(module, 'in_features', 0) * getattr(module, 'out_features', 0)
    out = getattr(module, 'out_features', 0)
    bias = 0 if getattr(module, 'bias', None) is None else 4 * out
    if isinstance(module, layers.Linear4bit):
        groups = -(-n // module.group)
        scale = {'fp16': 2 * groups, 'fp32': 4 * groups, '8bit': groups + 4 * -(-groups // 256), 'log8': groups + 4}
        return groups * module.group // 2 + scale[module.scales] + bias
    if isinstance(module, layers.Int8Linear):
        return n + 4 * out + bias
    if isinstance(module, layers.HalfLinear):
        return 2 * n + bias // 2
    if isinstance(module, layers.TernaryLinear):
        return -(-module.in_features // 4) * out + 4 * module.chunks + bias + 4 * module.in_features * module.norm
    if isinstance(module, layers.BinaryLinear):
        held = getattr(module, 'packed_bias', None)
        return -(-module.in_features // 8) * out + (0 if held is None else -(-out // 8)) + 4 * module.alpha.numel()
    if isinstance(module, layers.LowRankLinear):
        return 4 * module.rank * (module.in_features + out + 1) + bias
    if isinstance(module, layers.LoRALinear):
        return 4 * module.rank * (module.in_features + out)             # and its base, a module of its own
    if isinstance(module, nn.Linear):
        return 4 * n + bias
    return None


def counts(model):
    """{parameters: as numbers of the network, whatever holds them; elements: of the tensors that do; bytes, by formula
    and summed over tensors}. A tied weight counts once."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = layers.model_bytes(model)[1] // 4
    theory, seen = 0, set()
    for m in model.modules():
        own = {id(t) for t in [*m.parameters(recurse=False), *m.buffers(recurse=False)]}
        by_formula = theoretical_bytes(m) if not own & seen else 0
        theory += sum(tensors[i].nbytes for i in own - seen) if by_formula is None else by_formula
        seen |= own
    return {'trainable': trainable, 'frozen': total - trainable, 'parameters': total,
            'elements': sum(t.numel() for t in tensors.values()), 'theoretical_bytes': theory,
            'actual_bytes': sum(t.nbytes for t in tensors.values())}


def output(model, x):
    y = model(x)
    return y if torch.is_tensor(y) else y[0]


def stats_worker(a):
    model, inputs = base_model(a.base, a.seed, a.device, a.dim)
    model, x, held = form(model, a.name, a).train(), inputs(a.batch), {}
    cuda = a.device == 'cuda'

    def forward():
        held['y'] = output(model, x)
    y = output(model, x)                            # libraries set themselves up on first use
    y.float().square().mean().backward()
    model.zero_grad(set_to_none=True)
    del y
    up = peak_above(forward, cuda)
    loss = held.pop('y').float().square().mean()
    after = peak_above(loss.backward, cuda)
    yield {**counts(model), 'forward_bytes': up, 'backward_bytes': after, 'resident_bytes': peak_memory_bytes()}


def stats(a):
    """Parameters, bytes and peaks of a model's compressed forms."""
    names = split_names(a)
    print(f'{a.base}, batch {a.batch}, {a.device} ({device_name(a)}), torch {torch.__version__}; MiB. forward: most alive '
          'at once above\nthe model itself; backward: the same above what the forward pass left, gradients included')
    millions = lambda n: f'{n / 1e6:.2f} M'
    show(measure(names, 'stats', a),
         [('name', 'form', ''), ('trainable', 'trainable', millions), ('frozen', 'frozen', millions),
          ('parameters', 'total', millions), ('elements', 'elements', millions), ('theoretical_bytes', 'theoretical', mib),
          ('actual_bytes', 'actual', mib), ('actual_bytes', 'bytes', ','), ('forward_bytes', 'forward', mib),
          ('backward_bytes', 'backward', mib)], a.json)


def compare_worker(a):
    model, inputs = base_model(a.base, a.seed, a.device, a.dim)
    x = inputs(a.batch)
    with torch.no_grad():
        model.eval()
        right = output(model, x).float()
        off = (output(form(model, a.name, a).eval(), x).float() - right).abs()
    bounds = BOUNDS.get(a.name, (None, None)) if a.base == 'bignet' else (None, None)
    yield {'max': off.max().item(), 'mean': off.mean().item(), 'relative': (off.norm() / right.norm()).item(),
           'max_bound': bounds[0], 'mean_bound': bounds[1]}


def compare(a):
    """Distance of the outputs of compressed forms from those of the full-precision model, same weights, same inputs."""
    names = split_names(a)
    print(f'{a.base}, batch {a.batch}, {a.device} ({device_name(a)}), torch {torch.__version__}; |output - output in full '
          'precision|, and the root mean square of it over that of the output')
    rows = measure(names, 'compare', a)
    show(rows, [('name', 'form', ''), ('max', 'max', '.2e'), ('max_bound', 'bound', '.0e'), ('mean', 'mean', '.2e'),
                ('mean_bound', 'bound', '.0e'), ('relative', 'relative', '.4f')], a.json)
    bounded = [r for r in rows if r['max_bound'] is not None]
    if over := [r['name'] for r in bounded if not (r['max'] <= r['max_bound'] and r['mean'] <= r['mean_bound'])]:
        sys.exit(f'error: over its bound: {", ".join(over)}')


def fit_worker(a):
    """Noise with random binary labels, learnt by heart: a linear head is trained with whatever the form leaves trainable."""
    for line in sys.stdin:
        seed = int(line)
        model, _ = base_model('bignet', seed, a.device, a.dim)
        model = nn.Sequential(form(model, a.name, a), nn.Linear(a.dim, 1, device=a.device), nn.Flatten(0))
        x = torch.randn(1000, a.dim, device=a.device)
        labels = torch.randint(2, (1000,), device=a.device).float()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=a.lr)
        generator, losses, times, right = torch.Generator().manual_seed(seed), [], [], []
        for _ in range(a.steps):
            pick = torch.randint(1000, (a.batch,), generator=generator)
            start = time.perf_counter()
            logits = model(x[pick])
            loss = F.binary_cross_entropy_with_logits(logits, labels[pick])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            times.append((time.perf_counter() - start) * 1e3)
            right.append(((logits > 0) == labels[pick].bool()).float().mean().item())
        with torch.no_grad():
            logits = model(x)
            loss = F.binary_cross_entropy_with_logits(logits, labels).item()
            accuracy = ((logits > 0) == labels.bool()).float().mean().item()
        print(f'{a.name} seed {seed}: ' + ', '.join(f'step {i} loss {losses[i]:.4f} accuracy {right[i]:.0%}'
              for i in range(0, a.steps, max(1, a.steps // 4))) + f'; on all, loss {loss:.4f} accuracy {accuracy:.1%}',
              file=sys.stderr, flush=True)
        yield {'seed': seed, 'loss': loss, 'accuracy': accuracy, 'first_loss': losses[0], 'ms': statistics.median(times),
               'trainable': sum(p.numel() for p in model.parameters() if p.requires_grad)}


def fit(a):
    """A small training loop on BigNet's forms; exit status 1 if one does not learn."""
    if not re.fullmatch(r'\d+(,\d+)*', a.seeds):
        configurator.fail(f'--seeds={a.seeds} are no numbers; type e.g. --seeds=1,2,3')
    rows = []
    for name in split_names(a):
        if a.base != 'bignet':
            configurator.fail('fit is for BigNet; type one of its forms')
        worker = Worker(dict(vars(a), run=None, bench='fit', name=name))
        answers = [worker.ask(seed) for seed in a.seeds.split(',')]
        worker.close()
        losses = [r['loss'] for r in answers]
        # The head alone, everything else frozen, reaches 0.89 to 0.92 in 200 steps: adapters that learn do better.
        trains = name in ('bignet', 'lowrank') or 'lora' in name
        rows.append({'bench': 'fit', 'name': name, 'loss': statistics.mean(losses),
                     'sd': statistics.stdev(losses) if len(losses) > 1 else None, 'losses': losses, 'threads': a.threads,
                     'accuracy': min(r['accuracy'] for r in answers), 'wanted': .97 if trains else .8,
                     'ms': statistics.median(r['ms'] for r in answers),
                     'trainable': answers[0]['trainable'], 'steps': a.steps, 'batch': a.batch, 'lr': a.lr, 'seeds': a.seeds,
                     'device': device_name(a), 'torch': torch.__version__})
    print(f'{a.steps} steps of {a.batch} of 1,000 noise samples, AdamW {a.lr:g}, seeds {a.seeds}; loss in nats, lowest '
          f'accuracy; {a.device} ({device_name(a)}), {a.threads} threads, torch {torch.__version__}')
    show(rows, [('name', 'form', ''), ('trainable', 'trainable', ','), ('loss', 'loss', '.4f'), ('sd', 'sd', '.4f'),
                ('accuracy', 'accuracy', '.1%'), ('ms', 'ms/step', '.1f')], a.json)
    if bad := [r['name'] for r in rows if not r['accuracy'] > r['wanted']]:
        sys.exit(f'error: did not learn: {", ".join(bad)} (wanted: {bad[0]} above '
                 f'{next(r["wanted"] for r in rows if r["name"] == bad[0]):.0%})')


def split_names(a):
    """The forms asked for; a path or bignet among them becomes the base. One line for a name that is neither."""
    bases = dict.fromkeys(n for n in a.names if n not in FORMS)
    a.base = next(iter(bases), 'bignet')
    if len(bases) > 1:
        configurator.fail(f'one model at a time; type only one of {", ".join(bases)}')
    for name in a.names:
        if name not in (*FORMS, 'bignet') and (name != a.base or not os.path.exists(name)):
            configurator.fail(f'{name!r} is no form and no file; type one of bignet, {", ".join(FORMS)} or a checkpoint')
    return a.names


# ---------------------------------------------------------------------------------------------------------------------
# single layers

LAYERS = {'linear': None, 'linear trained': None, 'half': 'half', 'int8': 'int8',
          'int8 act': ('int8', dict(activations='int8')), 'int4': 'int4',
          'nf4': 'nf4', 'nf4 8bit': ('nf4', dict(scales='8bit')), 'fit4': 'fit4', 'fit4 64': ('fit4', dict(group=64)),
          'ternary': 'tern', 'binary': 'bin', 'lora half': ('lora', dict(rank=32, base='half')),
          'lora int4': ('lora', dict(rank=32, base='int4')), 'lora nf4': ('lora', dict(rank=32, base='nf4')),
          'lora fit4': ('lora', dict(rank=32, base='fit4')), 'lowrank': ('lowrank', dict(rank=64)), 'bitsandbytes nf4': None,
          'bitsandbytes nf4 8bit': None, 'bitsandbytes nf4 eval': None}


def make_layer(name, columns, rows, device, dtype):
    """(layer, bits per weight, relative RMS error) of a layer with N(0,1) weights, no bias, frozen but for adapters and
    low rank, computing in dtype. 'bitsandbytes nf4 eval' is what its layer becomes in evaluation on a CPU with bf16
    instructions: another arrangement of the weights, arithmetic in bf16 whatever the input, no backward pass."""
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
        held = [layer.weight, state.absmax] + ([state.state2.absmax] if state.nested else [])
        layer.train(not name.endswith('eval'))
        return layer, 8 * sum(t.nbytes for t in held) / w.numel(), ((q - w).norm() / w.norm()).item()
    layers.convert(model, {'0': LAYERS[name]}, verbose=False, packed=True)
    layer = model[0]
    base = getattr(layer, 'base', layer)
    q = (base.effective_weight() if isinstance(base, layers.LowBit) else base.weight.float() if name != 'lowrank'
         else (base.A * base.c @ base.B).detach())
    if name == 'binary':                            # its output is normalised: the scale that fits best is the layer's
        q = q * (q * w).sum() / q.square().sum()
    held = [t for t in [*base.parameters(), *base.buffers()]]
    if name == 'ternary':
        held.remove(base.gain)                      # of the RMSNorm that it has inside
    return layer, 8 * sum(t.nbytes for t in held) / w.numel(), ((q - w).norm() / w.norm()).item()


def layers_worker(a):
    rows = {}
    for line in sys.stdin:
        ask = json.loads(line)
        tokens, columns, outs = ask['shape']
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
        yield {'bits': bits, 'error': error, 'forward_ms': median_ms(forward, ask['seconds'], cuda),
               'both_ms': None if a.name.endswith('eval') else median_ms(both, ask['seconds'], cuda)}


def bench_layers(a):
    """Every kind of layer: bits per weight, error on normal weights, time beside a frozen nn.Linear."""
    names = a.kinds.split(',') if a.kinds else [n for n in LAYERS if 'bits' not in n
                                                or importlib.util.find_spec('bitsandbytes')]
    if unknown := [n for n in names if n not in LAYERS]:
        configurator.fail(f'{unknown[0]!r} is no kind of layer; type --kinds= and some of {",".join(LAYERS)}')
    if not re.fullmatch(r'[1-9]\d*x[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*x[1-9]\d*)*', a.shapes):
        configurator.fail(f'--shapes={a.shapes} is not tokens x in x out; type e.g. --shapes=1x1024x1024,32x1024x4096')
    shapes = [tuple(map(int, s.split('x'))) for s in a.shapes.split(',')]
    names = [n for n in names if n != 'linear']
    names.insert(0, 'linear')
    rows = []
    for shape in shapes:
        ask = json.dumps({'shape': shape, 'seconds': a.seconds})
        workers, answers = in_turns([dict(vars(a), run=None, bench='layers', name=n) for n in names], a.rounds, ask, ask)
        for worker in workers:
            worker.close()
        base = answers[0]
        for name, found in zip(names, answers, strict=True):
            ms = {k: middle(found, k) for k in ('forward_ms', 'both_ms')}
            by = {k.replace('ms', 'ratio'): ratio(found, base, k) for k in ms}
            rows.append({'bench': 'layers', 'name': name, 'bits': found[0]['bits'], 'error': found[0]['error'], **ms, **by,
                         'tokens': shape[0], 'in': shape[1], 'out': shape[2], 'dtype': a.dtype, 'threads': a.threads,
                         'device': device_name(a), 'torch': torch.__version__})
        one = rows[-len(names)]
        print(f'{one["tokens"]} tokens x {one["in"]} -> {one["out"]}, {a.dtype}, {a.device} ({one["device"]}), {a.threads} '
              f'threads, torch {torch.__version__}, {a.rounds} rounds')
        show(rows[-len(names):], [('name', 'layer', ''), ('bits', 'bits/weight', '.3f'), ('error', 'relative RMS', '.4f'),
                                  ('forward_ms', 'forward ms', '.3f'), ('forward_ratio', '×', '.2f'),
                                  ('both_ms', 'with backward ms', '.3f'), ('both_ratio', '×', '.2f')], a.json)
        print()


# ---------------------------------------------------------------------------------------------------------------------
# a training step


class PlainGPT(nn.Module):
    """The fp model of train_gpt.py in plain PyTorch, for knowing what its low-bit frame costs when nothing is low-bit."""

    def __init__(self, vocab_size, block_size, n_layer, n_head, n_embd):
        super().__init__()
        self.n_head, d = n_head, n_embd
        self.wte, self.wpe = nn.Embedding(vocab_size, d), nn.Embedding(block_size, d)
        self.blocks = nn.ModuleList(nn.ModuleDict({
            'ln_1': nn.LayerNorm(d, bias=False), 'qkv': nn.Linear(d, 3 * d, bias=False), 'out': nn.Linear(d, d, bias=False),
            'ln_2': nn.LayerNorm(d, bias=False), 'up': nn.Linear(d, 4 * d, bias=False), 'down': nn.Linear(4 * d, d, bias=False),
        }) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(d, bias=False)

    def forward(self, ids, targets):
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for b in self.blocks:
            q, k, v = b['qkv'](b['ln_1'](x)).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + b['out'](y.transpose(1, 2).flatten(2))
            x = x + b['down'](F.gelu(b['up'](b['ln_2'](x))))
        return F.cross_entropy(F.linear(self.ln_f(x), self.wte.weight).flatten(0, 1), targets.flatten())


def make_model(kind, a):
    if kind == 'plain':
        return PlainGPT(a.vocab_size, a.block_size, a.n_layer, a.n_head, a.n_embd)
    if a.model == 'bitnet':
        from train_bitnet import BitNet, BitNetConfig
        return BitNet(BitNetConfig(a.vocab_size, a.block_size, a.n_layer, a.n_head, a.n_kv_head, a.n_embd, a.n_ff, quant=kind))
    from train_gpt import GPT, GPTConfig
    low = () if kind == 'fp' else tuple(range(a.n_layer))
    return GPT(GPTConfig(a.vocab_size, a.block_size, a.n_layer, a.n_head, a.n_embd, qkv_proj=kind, c_proj=kind,
                         mlp_proj=kind, binary_blocks=low))


def train_worker(a):
    """For each line (a number of steps, or memory) one answer."""
    cuda = a.device == 'cuda'
    torch.manual_seed(0)
    ids = torch.randint(a.vocab_size, (a.batch_size, a.block_size + 1), device=a.device)
    torch.mm(torch.ones(8, 8), torch.ones(8, 8))                # the matmul library's own set-up is not the model's
    before = resident_bytes()
    model = make_model(a.name, a).to(a.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    step_model = torch.compile(model) if a.compile else model

    def step():
        with torch.autocast(a.device, torch.bfloat16, enabled=a.dtype == 'bfloat16'):
            loss = step_model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for line in sys.stdin:
        if line == 'memory\n':
            yield {'peak_bytes': peak_bytes(model, optimizer, step, cuda),
                   'resident_bytes': peak_memory_bytes() - before,
                   'parameters': sum(p.numel() for p in model.parameters()),
                   'flops_per_token': costs.flops_per_token(model, a.n_layer, a.n_embd, a.block_size)}
            continue
        times = times_ms(step, int(line), cuda)
        if cuda:
            torch.cuda.empty_cache()                            # the other variants' processes share the card
        yield {'ms': times}


def train(a):
    """Median ms of a whole training step (forward, backward, clip, AdamW) and peak memory, per kind and dtype."""
    if a.gpt2 and (a.fineweb95m or a.model == 'bitnet'):
        configurator.fail('--gpt2 is the shape of another model; type one of --gpt2, --fineweb95m and --model=bitnet')
    if a.gpt2:
        a.n_layer, a.n_head, a.n_embd, a.block_size, a.vocab_size = 12, 12, 768, 1024, 50304
    if a.fineweb95m:
        shape = runpy.run_path(str(Path(__file__).with_name('config') / 'fineweb95m.py'))
        a.model = 'bitnet'
        for key in ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_ff', 'vocab_size', 'batch_size', 'block_size'):
            setattr(a, key, shape[key])
    a.kinds = a.kinds or {'gpt': 'plain,fp,bin,tern,int4', 'bitnet': 'fp,tern'}[a.model]
    variants = [(kind, dtype) for dtype in a.dtypes.split(',') for kind in a.kinds.split(',')]
    known = (*(('fp', 'tern') if a.model == 'bitnet' else ('plain', *layers.KINDS)), 'float32', 'bfloat16')
    if wrong := [v for v in (*a.kinds.split(','), *a.dtypes.split(',')) if v not in known]:
        configurator.fail(f'{wrong[0]!r} is no kind or dtype; type some of {",".join(known[:-2])}, float32,bfloat16')
    workers, answers = in_turns([dict(vars(a), run=None, bench='train', name=kind, dtype=dtype) for kind, dtype in variants],
                                a.rounds, 3, a.steps)            # 3 steps to warm up (and compile)
    memory = {}
    for v, worker in zip(variants, workers, strict=True):
        memory[v] = worker.ask('memory')
        worker.close()
    times = {v: [statistics.median(r['ms']) for r in found] for v, found in zip(variants, answers, strict=True)}
    tokens, name = a.batch_size * a.block_size, device_name(a)
    peak = next((f for card, f in PEAK_FLOPS.items() if card in name), None) if a.device == 'cuda' else None
    flops = tokens * memory[variants[0]]['flops_per_token'] if peak else None
    print(f'training step, {a.model}, {a.n_layer} layers x {a.n_embd}, {a.batch_size} x {a.block_size} tokens, '
          f'{a.device} ({name}), {a.threads} threads, torch {torch.__version__}, compile={a.compile}, '
          f'{a.rounds} rounds x {a.steps} steps; peak: tensors alive at once; resident: of the process, above its start')
    rows = []
    for kind, dtype in variants:
        mine, base = times[kind, dtype], times.get(('fp', dtype), times[kind, dtype])
        ms = statistics.median(mine)
        ratio = statistics.median(m / b for m, b in zip(mine, base, strict=True))
        mine_bytes, base_bytes = memory[kind, dtype], memory.get(('fp', dtype), memory[kind, dtype])
        memory_ratio, resident_ratio = (mine_bytes[k] / base_bytes[k] for k in ('peak_bytes', 'resident_bytes'))
        rows.append({'bench': 'train', 'model': a.model, 'kind': kind, 'dtype': dtype, 'ms': ms, 'ms_min': min(mine),
                     'ms_max': max(mine), 'ratio': ratio, 'tokens_per_s': tokens / ms * 1e3, **mine_bytes,
                     'peak_ratio': memory_ratio, 'resident_ratio': resident_ratio,
                     'mfu': flops / ms * 1e3 / peak if flops else None,
                     'batch_size': a.batch_size, 'block_size': a.block_size, 'n_layer': a.n_layer, 'n_embd': a.n_embd,
                     'threads': a.threads, 'compile': a.compile, 'device': name, 'torch': torch.__version__})
    show(rows, [('kind', 'kind', ''), ('dtype', 'dtype', ''), ('ms', 'ms/step', '.1f'), ('ratio', 'x fp', '.2f'),
                ('tokens_per_s', 'tokens/s', ',.0f'), ('peak_bytes', 'peak MiB', mib), ('peak_ratio', 'x fp', '.2f'),
                ('resident_bytes', 'resident', mib), ('resident_ratio', 'x fp', '.2f')]
         + [('mfu', 'MFU', '.1%')] * bool(flops), a.json)


# ---------------------------------------------------------------------------------------------------------------------
# a zip of the sources


BUNDLED = ('*.py', '*.c', '*.md', '*.txt', '*.toml', 'LICENSE', 'Makefile', 'config/*.py', 'data/*/prepare.py', 'tests/*.py',
           'results/*.py', 'results/*/*.py')


def bundle(a):
    """A zip of the sources with a manifest of checksums, byte for byte the same from the same sources."""
    root = Path(__file__).resolve().parent
    files = {p.relative_to(root).as_posix(): p.read_bytes() for glob in BUNDLED for p in root.glob(glob) if p.is_file()}
    lines = [f'{hashlib.sha256(data).hexdigest()}  {name}\n' for name, data in sorted(files.items())]
    files['MANIFEST.sha256'] = ''.join(lines).encode()

    def write(tmp):
        with zipfile.ZipFile(tmp, 'w', zipfile.ZIP_STORED) as z:        # stored: what zlib makes of it differs by version
            for name, data in sorted(files.items()):
                entry = zipfile.ZipInfo(f'nanobit/{name}', (1980, 1, 1, 0, 0, 0))
                entry.create_system, entry.external_attr = 3, 0o644 << 16
                z.writestr(entry, data)
    from common import atomic_write
    try:
        atomic_write(a.path, write)
    except OSError as e:
        configurator.fail(f'{e}; type another path')
    print(f'{a.path}: {len(files)} files, {os.path.getsize(a.path):,} bytes, sha256 '
          f'{hashlib.sha256(Path(a.path).read_bytes()).hexdigest()}')
    print('unpack it and type: sha256sum -c MANIFEST.sha256')


# ---------------------------------------------------------------------------------------------------------------------

WORKERS = {'stats': stats_worker, 'compare': compare_worker, 'fit': fit_worker, 'layers': layers_worker, 'train': train_worker,
           'optim': optimizers.optim_worker, 'optim_bytes': optimizers.optim_bytes_worker,
           'finetune': optimizers.finetune_worker, 'finetune_memory': optimizers.finetune_memory_worker,
           'conv': convolutions.conv_worker}


def worker(a):
    """This process is one variant's: a line of JSON on stdout for each line on stdin."""
    a = argparse.Namespace(**json.loads(a.job))
    torch.set_num_threads(a.threads)
    torch.set_float32_matmul_precision('high' if a.bench == 'train' else 'highest')    # no TF32 in what is compared
    for answer in WORKERS[a.bench](a):
        print(json.dumps(answer), flush=True)


class Parser(argparse.ArgumentParser):
    def error(self, message):                       # one line, like every other mistake
        configurator.fail(f'{message}; type {self.prog} --help')


def main():
    if sys.argv[1:2] == ['worker']:
        return worker(argparse.Namespace(job=sys.argv[2]))
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar='command')

    def command(name, run, **numbers):
        p = commands.add_parser(name, help=run.__doc__.split('\n')[0])
        p.set_defaults(run=run)
        for key, default in numbers.items():
            p.add_argument(f'--{key}', type=type(default), default=default)
        if run is not bundle:
            p.add_argument('--device', default='cpu', choices=('cpu', 'cuda'))
            p.add_argument('--threads', type=int, default=torch.get_num_threads())
            p.add_argument('--json', default='', metavar='PATH', help='append the rows to this file as JSON lines')
        return p
    for name, run, numbers in (('stats', stats, dict(batch=32, seed=0)), ('compare', compare, dict(batch=32, seed=0)),
                               ('fit', fit, dict(batch=100, steps=200, lr=1e-3))):
        p = command(name, run, rank=32, alpha=32.0, dim=1024, **numbers)
        p.add_argument('names', nargs='+', metavar='form', help=f'bignet or a checkpoint, {", ".join(FORMS)}')
        if run is fit:
            p.add_argument('--seeds', default='1', help='e.g. 1,2,3')
    p = command('layers', bench_layers, rounds=7, seconds=0.2)
    p.add_argument('--kinds', default='', help='default: all')
    p.add_argument('--shapes', default='1x1024x1024,32x1024x1024,512x1024x1024', help='tokens x in x out, ...')
    p.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'), help='of the inputs')
    p = command('train', train, n_layer=6, n_head=4, n_kv_head=2, n_embd=256, n_ff=768, block_size=256, vocab_size=256,
                batch_size=16, rounds=7, steps=3)
    p.add_argument('--model', default='gpt', choices=('gpt', 'bitnet'))
    p.add_argument('--compile', action='store_true')
    p.add_argument('--kinds', default='', help='default: all of the model')
    p.add_argument('--dtypes', default='float32,bfloat16')
    p.add_argument('--gpt2', action='store_true', help='the shape of GPT-2 124M at 1,024 tokens')
    p.add_argument('--fineweb95m', action='store_true', help='the shape of config/fineweb95m.py')
    p = command('optim', optimizers.optim, dim=768, layers=12, rounds=5, steps=5)
    p.add_argument('--ranks', default='16,128')
    shape = dict(dim=768, layers=6, batch=16, tokens=128)
    bytes_ = command('optim-bytes', optimizers.optim_bytes, **shape)
    tune = command('finetune', optimizers.finetune, **shape, rank=16, rounds=5, steps=2)
    bytes_.add_argument('--ranks', default='4,8,16,64,128')
    for p in (bytes_, tune):
        p.add_argument('--attention', default='sdpa', choices=('sdpa', 'eager'), help="transformers' name of it")
    tune.add_argument('--variants', default=','.join(optimizers.FINETUNES), help='some of them')
    p = command('conv', convolutions.conv, batch=64, image_size=64, rounds=7, steps=2)
    p.add_argument('--compile', action='store_true')
    p.add_argument('--variants', default=','.join(convolutions.CONVS), help='some of them')
    p.add_argument('--dtypes', default='float32,bfloat16')
    command('bundle', bundle).add_argument('path', help='the zip to write')
    a = parser.parse_args()
    if getattr(a, 'device', '') == 'cuda' and not torch.cuda.is_available():
        configurator.fail('torch sees no CUDA device here; type --device=cpu')
    for key in ('batch', 'batch_size', 'steps', 'rounds', 'rank', 'dim', 'layers', 'tokens', 'threads'):
        if getattr(a, key, 1) < 1:
            configurator.fail(f'--{key}={getattr(a, key)} must be 1 or more; type another number')
    if getattr(a, 'json', ''):
        try:
            open(a.json, 'a').close()               # before hours of measuring, not after
        except OSError as e:
            configurator.fail(f'cannot write {a.json} ({e.strerror}); type another --json=PATH')
    a.run(a)


if __name__ == '__main__':
    main()
