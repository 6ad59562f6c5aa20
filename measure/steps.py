"""Measurements of language models for bench.py: time and memory of a whole training step, for each kind of layer."""
import runpy
import statistics
import sys
from dataclasses import fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import configurator
import layers
import optim
from common import clip_, peak_memory_bytes
from measure.turns import device_name, in_turns, mib, peak_bytes, resident_bytes, show, times_ms
from report import costs

# Peak dense bf16 FLOP/s of each card, without sparsity, from its data sheet; the reference for model FLOPs utilization (MFU).
PEAK_FLOPS = {'H200': 989e12, 'H100': 989e12, 'A100': 312e12, 'L40S': 362e12, '4090': 165e12}


class PlainGPT(nn.Module):
    """The fp model of train_gpt.py in plain PyTorch. Compared to it, fp shows the cost of the low-bit code path itself."""

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


# model of train_<name>.py: its kinds, and the config that gives every matrix of the low-bit blocks this kind
KINDS = {'gpt': ('plain', *layers.KINDS), 'bitnet': ('fp', 'tern')}
RAMP = '+ramp'                                      # after a low-bit kind: its steps in a run with --ramp
ALL_OF = {'gpt': lambda kind, blocks: dict(qkv_proj=kind, c_proj=kind, mlp_proj=kind,
                                           binary_blocks=() if kind == 'fp' else blocks),
          'bitnet': lambda kind, blocks: dict(quant=kind)}


def make_model(kind, a, models):
    """The model of train_<a.model>.py in the sizes of `a`, matrices of a.binary_blocks ((): of all blocks) of `kind`.
    models: {trainer: (model, config class)}."""
    if kind == 'plain':
        return PlainGPT(a.vocab_size, a.block_size, a.n_layer, a.n_head, a.n_embd)
    make, shape = models[f'train_{a.model}']
    sizes = {f.name: getattr(a, f.name) for f in fields(shape) if hasattr(a, f.name)}
    return make(shape(**sizes | ALL_OF[a.model](kind, a.binary_blocks or tuple(range(a.n_layer)))))


def train_worker(a, models):
    """Answer each line: a number of steps by their milliseconds, 'memory' by bytes, parameters and FLOPs per token."""
    cuda = a.device == 'cuda'
    torch.manual_seed(0)
    ids = torch.randint(a.vocab_size, (a.batch_size, a.block_size + 1), device=a.device)
    torch.mm(torch.ones(8, 8), torch.ones(8, 8))                # memory for set-up of the matmul library must not count
    before = resident_bytes()
    model = make_model(a.name.removesuffix(RAMP), a, models).to(a.device)
    if a.name.endswith(RAMP):
        layers.ramp(model).fill_(0.5)                           # the layers mix at any share, also at 1
    hidden = {p for n, p in model.blocks.named_parameters() if n.endswith('weight') and p.dim() > 1}
    groups = [{'params': list(model.parameters()), 'decay': 0.1}]
    optimizer = optim.make(a.optimizer, groups, hidden, lr=1e-4, betas=(0.9, 0.95))
    if a.optimizer == 'rsvd':
        optim.attach(model, optimizer, verbose=False)
    gradients = getattr(optimizer, 'gradients', lambda: {p: p.grad for p in model.parameters()})
    step_model = torch.compile(model) if a.compile else model

    def forward():
        with torch.autocast(a.device, torch.bfloat16, enabled=a.dtype == 'bfloat16'):
            return step_model(ids[:, :-1], ids[:, 1:])

    def step():
        forward().backward()
        grads = list(gradients().values())
        clip_(grads, 1.0, nn.utils.get_total_norm(grads))
        del grads
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for line in sys.stdin:
        if line == 'memory\n':
            yield {'peak_bytes': peak_bytes(model, optimizer, step, cuda), 'saved_bytes': costs.saved_bytes(forward, model),
                   'resident_bytes': peak_memory_bytes() - before,
                   'parameters': sum(p.numel() for p in model.parameters()),
                   'flops_per_token': costs.flops_per_token(model, a.n_layer, a.n_embd, a.block_size)}
            continue
        times = times_ms(step, int(line), cuda)
        if cuda:
            torch.cuda.empty_cache()                            # processes of other variants share the card
        yield {'ms': times}


def train(a):
    """Measure a whole training step (forward, backward, clip, update) of each kind and dtype: median ms and peak memory."""
    if a.gpt2 and (a.fineweb95m or a.model == 'bitnet'):
        configurator.fail('--gpt2 is the shape of another model; type only one of --gpt2, --fineweb95m and --model=bitnet')
    if a.gpt2:
        a.n_layer, a.n_head, a.n_embd, a.block_size, a.vocab_size = 12, 12, 768, 1024, 50304
    if a.fineweb95m:
        shape = runpy.run_path(str(Path(__file__).resolve().parents[1] / 'config' / 'fineweb95m.py'))
        a.model = 'bitnet'
        for key in ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_ff', 'vocab_size', 'batch_size', 'block_size'):
            setattr(a, key, shape[key])
    words, every = a.binary_blocks.split(',') if a.binary_blocks else [], [str(i) for i in range(a.n_layer)]
    if a.model == 'bitnet' and (words or a.output_gains):
        key = 'binary_blocks' if words else 'output_gains'
        configurator.fail(f'{key} has no use for bitnet; leave --{key} out')
    if wrong := [word for word in words if word not in every]:
        configurator.fail(f'binary_blocks: {wrong[0]!r} is no block; type some of {",".join(every)}')
    a.binary_blocks = tuple(map(int, words))
    a.kinds = a.kinds or {'gpt': 'plain,fp,bin,tern,int4', 'bitnet': 'fp,tern'}[a.model]
    if words and set(a.kinds.split(',')) <= {'plain', 'fp'}:
        configurator.fail(f'binary_blocks has no use for the kinds {a.kinds}; leave --binary_blocks out')
    variants = [(kind, dtype) for dtype in a.dtypes.split(',') for kind in a.kinds.split(',')]
    kinds = (*KINDS[a.model], *(kind + RAMP for kind in KINDS[a.model] if kind not in ('plain', 'fp')))
    if wrong := [v for v in (*a.kinds.split(','), *a.dtypes.split(',')) if v not in (*kinds, 'float32', 'bfloat16')]:
        configurator.fail(f'{wrong[0]!r} is no kind or dtype; type some of {",".join(kinds)}, float32,bfloat16')
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
    some = f', low-bit blocks {",".join(words)}' * bool(words)
    print(f'training step, {a.model}{some}, {a.n_layer} layers x {a.n_embd}, {a.batch_size} x {a.block_size} tokens, '
          f'{a.device} ({name}), {a.threads} threads, torch {torch.__version__}, {a.optimizer}, compile={a.compile}, '
          f'{a.rounds} rounds x {a.steps} steps; peak: tensors alive at once; saved: those for the backward '
          'pass; resident: growth of the process')
    rows = []
    for kind, dtype in variants:
        mine, base = times[kind, dtype], times.get(('fp', dtype), times[kind, dtype])
        ms = statistics.median(mine)
        ratio = statistics.median(m / b for m, b in zip(mine, base, strict=True))
        mine_bytes, base_bytes = memory[kind, dtype], memory.get(('fp', dtype), memory[kind, dtype])
        ratios = {f'{k}_ratio': mine_bytes[f'{k}_bytes'] / base_bytes[f'{k}_bytes'] for k in ('peak', 'saved', 'resident')}
        rows.append({'bench': 'train', 'model': a.model, 'kind': kind, 'dtype': dtype, 'ms': ms, 'ms_min': min(mine),
                     'ms_max': max(mine), 'ratio': ratio, 'tokens_per_s': tokens / ms * 1e3, **mine_bytes,
                     **ratios, 'mfu': flops / ms * 1e3 / peak if flops else None,
                     'batch_size': a.batch_size, 'block_size': a.block_size, 'n_layer': a.n_layer, 'n_embd': a.n_embd,
                     'binary_blocks': [] if kind in ('plain', 'fp') else list(a.binary_blocks or range(a.n_layer)),
                     'output_gains': a.output_gains, 'threads': a.threads,
                     'optimizer': a.optimizer, 'compile': a.compile, 'device': name, 'torch': torch.__version__})
    show(rows, [('kind', 'kind', ''), ('dtype', 'dtype', ''), ('ms', 'ms/step', '.1f'), ('ratio', 'x fp', '.2f'),
                ('tokens_per_s', 'tokens/s', ',.0f'), ('peak_bytes', 'peak MiB', mib), ('peak_ratio', 'x fp', '.2f'),
                ('saved_bytes', 'saved', mib), ('saved_ratio', 'x fp', '.2f'),
                ('resident_bytes', 'resident', mib), ('resident_ratio', 'x fp', '.2f')]
         + [('mfu', 'MFU', '.1%')] * bool(flops), a.json)
