"""Decode and prefill of language models by engine/ and by torch, for bench.py: tokens per second, memory, read bandwidth."""
import statistics
import sys
import time

import torch

import configurator
import layers
from engine.engine import Engine
from measure.turns import device_name, in_turns, middle, ratio, resident_bytes, show

# Random models: the class in MODELS, its options. `shape` in decode_worker adds the sizes.
KINDS = {'bin': ('train_gpt', dict(qkv_proj='bin', c_proj='bin', mlp_proj='bin')), 'tern': ('train_bitnet', {}),
         'int4': ('train_gpt', dict(qkv_proj='int4', c_proj='int4', mlp_proj='int4')), 'fp': ('train_bitnet', dict(quant='fp'))}
SHAPES = {'1M': dict(n_layer=6, n_head=4, n_kv_head=2, n_embd=128, n_ff=384, vocab_size=256),
          '0.2B': dict(n_layer=6, n_head=24, n_kv_head=6, n_embd=1536, n_ff=4096, vocab_size=32_000),
          '0.7B': dict(n_layer=24, n_head=24, n_kv_head=6, n_embd=1536, n_ff=4096, vocab_size=32_000),
          '2.4B': dict(n_layer=30, n_head=20, n_kv_head=5, n_embd=2560, n_ff=6912, vocab_size=128_256)}


def random_model(kind, shape, context, models):
    """A packed model with random weights. The models of train_gpt.py ignore n_kv_head and n_ff."""
    trainer, options = KINDS[kind]
    make, config = models[trainer]
    options = options | SHAPES[shape] | {'block_size': context}
    if trainer == 'train_gpt':
        options = {k: v for k, v in options.items() if k not in ('n_kv_head', 'n_ff')}
        options['binary_blocks'] = tuple(range(options['n_layer']))
    torch.manual_seed(0)
    return layers.pack(make(config(**options)).eval())


def decode_worker(a, models, load, generate):
    """Answer each line with the speed of `tokens` new ones after a prompt of `prefill` tokens; an empty line warms up."""
    before = resident_bytes()
    context = 1 << (a.prefill + a.tokens).bit_length()
    model = random_model(a.model, a.shape, context, models) if a.model in KINDS else load(a.model)
    vocab = model.config.vocab_size
    prefill = max(1, min(a.prefill, model.config.block_size - 2))
    if a.runs == 'engine':
        engine = Engine(model, a.head, a.threads)
        model = engine
    size = engine.nbytes() if a.runs == 'engine' else sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    ids = torch.randint(min(vocab, 256), (1, prefill), generator=torch.Generator().manual_seed(0))
    buffer = torch.ones(1 << 25)                                # 128 MB: more than most caches hold
    for _ in sys.stdin:
        start = time.perf_counter()
        buffer.sum()
        read = buffer.nbytes / (time.perf_counter() - start)
        steps = generate(model, ids, min(a.tokens + 1, model.config.block_size - prefill), vocab, 0)
        start = time.perf_counter()
        next(steps)
        first = time.perf_counter()
        n = sum(1 for _ in steps)
        seconds = max(time.perf_counter() - first, 1e-9)
        yield {'prefill': prefill / (first - start), 'decode': n / seconds, 'model_bytes': size,
               'bytes_per_s': n * size / seconds, 'read': read, 'resident': resident_bytes() - before - buffer.nbytes}


def decode(a):
    """tokens/s of decode and prefill: engine/ and torch in turns, on random or trained models"""
    names = [name for name in a.models.split(',') if name]
    runs = ['engine', *(['torch'] if a.torch else [])]
    jobs = [dict(vars(a), run=None, bench='decode', name=f'{name} {run}', model=name, runs=run, threads=threads)
            for name in names for threads in map(int, a.threads_of.split(',')) for run in runs]
    if not jobs or a.shape not in SHAPES or any(job['threads'] < 1 for job in jobs):
        configurator.fail(f'shape={a.shape!r} must be one of {", ".join(SHAPES)}; give a model and at least 1 thread')
    rows = []
    for i in range(0, len(jobs), len(runs)):
        workers, answers = in_turns(jobs[i:i + len(runs)], a.rounds, '', '')
        for w, mine in zip(workers, answers, strict=True):
            w.close()
            rows.append({'bench': 'decode', 'name': w.job['name'], 'threads': w.job['threads'], 'device': device_name(a)}
                        | {key: middle(mine, key) for key in ('decode', 'prefill', 'model_bytes', 'resident', 'read')}
                        | {f'{key}_ratio': ratio(mine, answers[-1] if a.torch else None, key) for key in ('decode', 'prefill')}
                        | {'share': statistics.median(r['bytes_per_s'] / r['read'] for r in mine)})
    mb = lambda n: f'{n / 1e6:,.1f}'
    show(rows, [('name', 'model', 's'), ('threads', 'threads', 'd'), ('decode', 'decode, tokens/s', ',.1f'),
                ('decode_ratio', 'x torch', '.1f'), ('prefill', f'prefill {a.prefill}, tokens/s', ',.0f'),
                ('prefill_ratio', 'x torch', '.2f'), ('model_bytes', 'arrays, MB', mb), ('resident', 'resident, MB', mb),
                ('share', 'of read bandwidth', '.0%')], a.json)
