"""
Time and memory, measured. Every variant runs in a fresh process of its own; ratios are to a baseline of the same run.

    python bench.py train                                      # a training step of each kind, fp32 and bf16, 2 minutes
    python bench.py train --kinds=fp,bin --dtypes=float32 --n_embd=512 --rounds=15
    python bench.py train --gpt2 --device=cuda --compile       # GPT-2 124M at 1,024 tokens on a GPU
"""
import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from itertools import accumulate

import torch
import torch.nn as nn
import torch.nn.functional as F

import configurator

# Dense bf16 peak of a card without sparsity, from its data sheet, for the share of it that a model's arithmetic uses.
PEAK_FLOPS = {'H200': 989e12, 'H100': 989e12, 'A100': 312e12, 'L40S': 362e12, '4090': 165e12}


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
    from train_gpt import GPT, GPTConfig
    low = () if kind == 'fp' else tuple(range(a.n_layer))
    return GPT(GPTConfig(a.vocab_size, a.block_size, a.n_layer, a.n_head, a.n_embd, qkv_proj=kind, c_proj=kind,
                         mlp_proj=kind, binary_blocks=low))


def resident_bytes():
    """Resident memory now (Linux), else the peak so far."""
    try:
        return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_resident_bytes()


def peak_resident_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def cpu_allocator_peak(step, model, optimizer):
    """Most bytes of tensors alive at once during one step: parameters and optimizer state, which are alive before it, plus
    the peak of the running sum of what the CPU allocator hands out and takes back (as max_memory_allocated on CUDA)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
        step()
    changes = sorted((e.start_ns(), e.nbytes()) for e in p.profiler.kineto_results.events() if e.name() == '[memory]')
    state = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    return (sum(t.numel() * t.element_size() for t in [*model.parameters(), *state])
            + max(accumulate(n for _, n in changes)))


def cpu_name():
    try:
        return next(line.split(':')[1].strip() for line in open('/proc/cpuinfo') if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def worker(a):
    """One variant in this process: for each line on stdin (a number of steps) one line of JSON on stdout."""
    torch.set_num_threads(a.threads)
    torch.set_float32_matmul_precision('high')
    cuda = a.device == 'cuda'
    torch.manual_seed(0)
    ids = torch.randint(a.vocab_size, (a.batch_size, a.block_size + 1), device=a.device)
    torch.mm(torch.ones(8, 8), torch.ones(8, 8))                # the matmul library's own set-up is not the model's
    before = resident_bytes()
    model = make_model(a.kind, a).to(a.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    step_model = torch.compile(model) if a.compile else model
    sync = torch.cuda.synchronize if cuda else (lambda: None)

    def step():
        with torch.autocast(a.device, torch.bfloat16, enabled=a.dtype == 'bfloat16'):
            loss = step_model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for line in sys.stdin:
        if line == 'memory\n':
            peak = torch.cuda.max_memory_allocated() if cuda else cpu_allocator_peak(step, model, optimizer)
            print(json.dumps({'peak_bytes': peak, 'resident_bytes': peak_resident_bytes() - before}), flush=True)
            continue
        times = []
        for _ in range(int(line)):
            sync()
            start = time.perf_counter()
            step()
            sync()
            times.append((time.perf_counter() - start) * 1e3)
        if cuda:
            torch.cuda.empty_cache()                            # the other variants' processes share the card
        print(json.dumps({'ms': times, 'parameters': sum(p.numel() for p in model.parameters()),
                          'name': torch.cuda.get_device_name() if cuda else cpu_name()}),
              flush=True)


def train(a):
    """Median ms of a whole training step (forward, backward, clip, AdamW) and peak memory, per kind and dtype.

    The variants' processes live at once but work in turns, round after round, so that what else the machine does
    falls on all of them alike; the ratio is the median over rounds of the ratio within a round."""
    if a.device == 'cuda' and not torch.cuda.is_available():
        configurator.fail('torch sees no CUDA device here; type --device=cpu')
    if a.gpt2:
        a.n_layer, a.n_head, a.n_embd, a.block_size, a.vocab_size = 12, 12, 768, 1024, 50304
    shape = [f'--{k}={getattr(a, k)}' for k in ('n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size', 'batch_size',
                                                 'threads', 'device')] + ['--compile'] * a.compile
    variants = [(kind, dtype) for dtype in a.dtypes.split(',') for kind in a.kinds.split(',')]
    processes = {v: subprocess.Popen([sys.executable, __file__, 'worker', f'--kind={v[0]}', f'--dtype={v[1]}', *shape],
                                     stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for v in variants}
    answers = {v: [] for v in variants}
    for i in range(-1, a.rounds):                               # round -1 warms up (and compiles)
        for v, p in processes.items():
            p.stdin.write(f'{a.steps if i >= 0 else 3}\n')
            p.stdin.flush()
            line = p.stdout.readline()
            if not line:
                configurator.fail(f'{v[0]} in {v[1]} failed, see above')
            if i >= 0:
                answers[v].append(json.loads(line))
    memory = {}
    for v, p in processes.items():
        p.stdin.write('memory\n')
        p.stdin.close()
        memory[v] = json.loads(p.stdout.readline())
        p.wait()
    tokens = a.batch_size * a.block_size
    last = {v: answers[v][-1] for v in variants}
    flops = None
    peak = next((f for name, f in PEAK_FLOPS.items() if name in last[variants[0]]['name']), None)
    if a.device == 'cuda' and peak:
        n = last[variants[0]]['parameters'] - a.block_size * a.n_embd
        flops = tokens * (6 * n + 12 * a.n_layer * a.n_embd * a.block_size)     # PaLM appendix B, attention not halved
    print(f'training step, {a.n_layer} layers x {a.n_embd}, {a.batch_size} x {a.block_size} tokens, {a.device} '
          f'({last[variants[0]]["name"]}), {a.threads} threads, torch {torch.__version__}, compile={a.compile}, '
          f'{a.rounds} rounds x {a.steps} steps; peak: tensors alive at once; resident: of the process, above its start')
    print(f'{"kind":6} {"dtype":9} {"ms/step":>9} {"x fp":>6} {"tokens/s":>10} {"peak MiB":>9} {"x fp":>6} '
          f'{"resident":>9} {"x fp":>6}'
          + '   MFU' * bool(flops))
    rows = []
    for kind, dtype in variants:
        mine = [statistics.median(r['ms']) for r in answers[kind, dtype]]
        base = [statistics.median(r['ms']) for r in answers.get(('fp', dtype), answers[kind, dtype])]
        ms = statistics.median(mine)
        ratio = statistics.median(m / b for m, b in zip(mine, base, strict=True))
        mine_bytes, base_bytes = memory[kind, dtype], memory.get(('fp', dtype), memory[kind, dtype])
        memory_ratio, resident_ratio = (mine_bytes[k] / base_bytes[k] for k in ('peak_bytes', 'resident_bytes'))
        row = {'bench': 'train', 'kind': kind, 'dtype': dtype, 'ms': ms, 'ms_min': min(mine), 'ms_max': max(mine),
               'ratio': ratio, 'tokens_per_s': tokens / ms * 1e3, **mine_bytes,
               'peak_ratio': memory_ratio, 'resident_ratio': resident_ratio, 'mfu': flops / ms * 1e3 / peak if flops else None,
               'parameters': last[kind, dtype]['parameters'], 'batch_size': a.batch_size, 'block_size': a.block_size,
               'n_layer': a.n_layer, 'n_embd': a.n_embd, 'threads': a.threads, 'compile': a.compile,
               'device': last[kind, dtype]['name'], 'torch': torch.__version__}
        rows.append(row)
        print(f'{kind:6} {dtype:9} {ms:9.1f} {ratio:6.2f} {row["tokens_per_s"]:10,.0f} '
              f'{row["peak_bytes"] / 2 ** 20:9.1f} {memory_ratio:6.2f} '
              f'{row["resident_bytes"] / 2 ** 20:9.1f} {resident_ratio:6.2f}'
              + (f' {row["mfu"]:5.1%}' if flops else ''))
    if a.json:
        with open(a.json, 'a') as f:
            f.writelines(json.dumps(r) + '\n' for r in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    for name, run in (('train', train), ('worker', worker)):
        p = commands.add_parser(name) if name == 'worker' else commands.add_parser(name, help=run.__doc__.split('\n')[0])
        p.set_defaults(run=run)
        for key, default in (('n_layer', 6), ('n_head', 4), ('n_embd', 256), ('block_size', 256), ('vocab_size', 256),
                             ('batch_size', 16), ('threads', torch.get_num_threads()), ('rounds', 7), ('steps', 3)):
            p.add_argument(f'--{key}', type=int, default=default)
        p.add_argument('--device', default='cpu', choices=('cpu', 'cuda'))
        p.add_argument('--compile', action='store_true')
        p.add_argument('--kinds', default='plain,fp,bin,tern,int4')
        p.add_argument('--dtypes', default='float32,bfloat16')
        p.add_argument('--json', default='', help='append the rows to this file as JSON lines')
        p.add_argument('--gpt2', action='store_true', help='the shape of GPT-2 124M at 1,024 tokens')
        p.add_argument('--kind', default='fp', help=argparse.SUPPRESS)
        p.add_argument('--dtype', default='float32', help=argparse.SUPPRESS)
    a = parser.parse_args()
    a.run(a)


if __name__ == '__main__':
    main()
