"""
Decode and prefill of language models by engine/, by torch and by llama.cpp, for bench.py: tokens per second, bytes, memory.

Random models are written once, as packed files and GGUF files, and each process loads its file. All processes with the
same number of threads take turns. One of them only reads memory: 512 MB, as a matrix times a vector in torch, which is
faster than a sum. A model that fits into the last cache can be read faster than that, so shares of this bandwidth above
100 % are possible. A token reads all weights, and the keys and values of the tokens before it. llama.cpp starts its threads
anew for each call, as its library does unless a program gives it a pool of threads.
"""
import copy
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import common
import configurator
import layers
from engine import load
from engine.engine import Engine
from measure import llama
from measure.turns import Worker, device_name, resident_bytes, show
from pretrained import replace
from readers import tokens

# Random models: the class in MODELS, its options. SHAPES adds the sizes.
KINDS = {'bin': ('train_gpt', dict(qkv_proj='bin', c_proj='bin', mlp_proj='bin')), 'tern': ('train_bitnet', {}),
         'int4': ('train_gpt', dict(qkv_proj='int4', c_proj='int4', mlp_proj='int4')), 'fp': ('train_bitnet', dict(quant='fp')),
         'int4g128': ('train_gpt', dict(qkv_proj='fp', c_proj='fp', mlp_proj='fp'))}        # rounded as by ptq.py
# The models of train_gpt.py ignore n_kv_head and n_ff; n_ff = 8/3 n_embd with all heads gives both the same number of weights.
SHAPES = {'1M': dict(n_layer=6, n_head=4, n_kv_head=2, n_embd=256, n_ff=768, vocab_size=256),
          '0.68B': dict(n_layer=24, n_head=24, n_kv_head=24, n_embd=1536, n_ff=4096, vocab_size=32_000),
          '2.4B': dict(n_layer=30, n_head=20, n_kv_head=5, n_embd=2560, n_ff=6912, vocab_size=128_256)}    # BitNet b1.58 2B4T
# Types of llama.cpp that are compared with a kind: of the blocks' matrices, of the tied head.
LIKE = {'tern': ('TQ2_0:F16', 'TQ2_0:Q8_0', 'TQ1_0:Q8_0'), 'int4': ('Q4_0:F16', 'Q4_0:Q8_0')}
HEADS = ('int8', 'fp', 'int8:int8', 'fp:int8')                          # head:inputs of the engine
CACHE_BYTES = {'engine': 4, 'torch': 4, 'llama.cpp': 2}                 # of a key or value of one position
AGREE_TOKENS = 64
WINDOWS = 64                                                            # of the validation split, for a loss
PROMPT = 16                                                             # tokens before those of decode

# ---------------------------------------------------------------------------------------------------------------------
# the processes


def decode_worker(a, generate):
    """Answer each line on stdin by the figures of one round; the line 'warm' warms up."""
    try:
        if a.runs == 'write':
            yield from write_worker(a)
        elif a.runs == 'read':
            yield from read_worker()
        elif a.runs == 'agree':
            yield from agree_worker(a, generate)
        elif a.runs == 'stages':
            yield from stages_worker(a)
        else:
            yield from speed_worker(a, generate)
    except ValueError as e:
        configurator.fail(f'{a.name}: {e}')


def write_worker(a):
    """Write the random models of a shape: packed files and GGUF files."""
    for _ in sys.stdin:
        for kind in a.kinds:
            write_random(Path(a.folder, f'{kind}.safetensors'), kind, SHAPES[a.shape], a.context)
        for name in a.like:
            llama.write_gguf(Path(a.folder, f'{name}.gguf'), *name.split(':'), SHAPES[a.shape], a.context)
        yield {}


def write_random(path, kind, shape, context):
    """Write a packed file of a random model. Its blocks are copies of one, so only one is ever in full precision."""
    trainer, options = KINDS[kind]
    make, config = load.MODELS[trainer]
    options = options | shape | {'block_size': context}
    if trainer == 'train_gpt':
        options = {k: v for k, v in options.items() if k not in ('n_kv_head', 'n_ff')}
        options['binary_blocks'] = tuple(range(options['n_layer']))
    torch.manual_seed(0)
    model, described = make(config(**options | {'n_layer': 1})), {}
    if kind == 'int4g128':
        replace.unfuse(model)
        for name in replace.layers_of(model, 'head,embd'):
            described |= replace.replace(model, name, 'group', {'levels': 'int4', 'group': 128})
    layers.pack(model)
    model.blocks.extend(copy.deepcopy(model.blocks[0]) for _ in range(options['n_layer'] - 1))
    described = {name.replace('.0.', f'.{i}.'): entry for i in range(options['n_layer']) for name, entry in described.items()}
    common.save_packed(model, path, {'trainer': trainer, 'step': 0, 'model_config': options,
                                     'tokenizer': tokens.byte().describe(), 'quantized': described})


def read_worker():
    """Answer each line by the bytes per second that this number of threads reads, the best of three times."""
    matrix, vector = torch.ones(1 << 15, 1 << 12), torch.ones(1 << 12)
    for _ in sys.stdin:
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            matrix @ vector
            seconds.append(time.perf_counter() - start)
        yield {'read': matrix.nbytes / min(seconds)}


def speed_worker(a, generate):
    before = resident_bytes()
    if a.runs == 'llama.cpp':
        model = llama.Llama(a.llama, a.file, a.threads, a.context)
        context, size, about = a.context, model.nbytes(), {'about': model.about}
        steps, shape = lambda ids, n: model.generate(ids, n), dict(SHAPES[a.shape])
        if a.head_of.startswith('Q4_0'):
            shape['n_kv_head'] = shape['n_head']
    else:
        head, _, inputs = a.head.partition(':')
        model = (load.engine(a.file, head, a.threads, inputs=inputs or 'fp32') if a.runs == 'engine' else load.load(a.file))[0]
        c, about = model.config, {}
        size = model.nbytes() if a.runs == 'engine' else sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        context, shape = c.block_size, vars(c) | {'n_kv_head': getattr(c, 'n_kv_head', c.n_head)}
        steps = lambda ids, n: generate(model, torch.tensor([ids]), n, c.vocab_size, 0)
    position_bytes = 2 * shape['n_layer'] * shape['n_kv_head'] * (shape['n_embd'] // shape['n_head']) * CACHE_BYTES[a.runs]
    prompt = lambda n: [i % min(shape['vocab_size'], 256) for i in range(n)]
    loaded, first = resident_bytes() - before, max(1, min(PROMPT, context // 2))
    about |= {'model_bytes': size, 'file_bytes': os.path.getsize(a.file), 'cache_bytes': context * position_bytes,
              'token_bytes': size + position_bytes * (first + min(a.tokens, context - first) // 2), 'loaded_bytes': loaded}
    rest = None
    for line in sys.stdin:
        if line.strip() == 'warm':
            list(steps(prompt(min(PROMPT, context // 2)), 2))
            yield {}
        else:
            idle = (time.process_time() - rest[0]) / max(1e-9, time.perf_counter() - rest[1]) if rest else 0.0
            figures = {f'prefill_{n}': prefill_speed(steps, prompt(n), a.seconds) for n in a.lengths if n <= context}
            figures['decode'], figures['joules'] = decode_speed(steps, prompt(first), min(a.tokens, context - first), a.seconds)
            yield figures | about | {'idle': idle, 'resident_bytes': resident_bytes() - before}
        rest = time.process_time(), time.perf_counter()


def prefill_speed(steps, ids, limit):
    """Tokens per second of a prompt, repeated for at least 0.1 s or `limit`."""
    n, start = 0, time.perf_counter()
    while not n or time.perf_counter() - start < min(0.1, limit):
        next(iter(steps(ids, 1)))
        n += len(ids)
    return n / (time.perf_counter() - start)


def decode_speed(steps, ids, most, limit):
    """(tokens per second, joules per token) of new tokens after a prompt: `most` of them or as many as take `limit` seconds;
    repeated for at least 0.3 s or `limit`. joules, of the whole machine and with the prompts, is None without a counter."""
    n, spent, joules = 0, 0.0, common.energy_meter(torch.device('cpu'))
    while spent < min(0.3, limit):
        new = steps(ids, most + 1)
        next(new)                                   # the prompt's time is not counted
        start = time.perf_counter()
        for _ in new:
            n += 1
            if time.perf_counter() - start > limit:
                break
        spent += time.perf_counter() - start
    used = joules()
    return n / spent, None if used is None else used / n


def stages_worker(a):
    """Answer each line by {'ms': milliseconds of a token by stage, 'of': the whole}, over a.stages tokens."""
    head, _, inputs = a.head.partition(':')
    model = Engine(load.load(a.file)[0], head, a.threads, inputs=inputs or 'fp32', target='stages')
    for _ in sys.stdin:
        new = model.generate(torch.zeros(1, PROMPT, dtype=torch.int64), a.stages + 1, model.config.vocab_size, 0)
        next(new)
        model.stages()
        start = time.perf_counter()
        n = sum(1 for _ in new)
        whole = (time.perf_counter() - start) / n * 1e3
        yield {'ms': {stage: seconds / n * 1e3 for stage, seconds in model.stages().items()}, 'of': whole}


@torch.no_grad()
def agree_worker(a, generate):
    """Compare engine/ with torch on prompts that the model wrote: greedy tokens, and logits after the prompts. ties: for each
    prompt with another token, the distance of the two tokens' logits over the spread of all."""
    model = load.load(a.file)[0]
    exact = Engine(model, 'fp', a.threads, sequences=a.agree)
    vocab, context = model.config.vocab_size, model.config.block_size
    length = max(1, min(PROMPT, context // 2))
    new = min(AGREE_TOKENS, context - length)
    for _ in sys.stdin:
        g = torch.Generator().manual_seed(0)
        ids = torch.randint(vocab, (a.agree, 1), generator=g)
        written = list(generate(model, ids, length - 1, vocab, 1.0, 0, g))
        ids = torch.cat([ids, *(t[:, None] for t in written)], 1)
        right, ours = model(ids)[:, -1].float(), exact(ids)[:, -1]
        theirs, mine = (torch.stack(list(generate(m, ids, new, vocab, 0)), 1) for m in (model, exact))
        ties = []
        for i in (theirs != mine).any(1).nonzero().flatten().tolist():
            at = (theirs[i] != mine[i]).nonzero()[0].item()
            logits = model(torch.cat([ids[i], theirs[i, :at]])[None])[0, -1]
            ties.append(((logits[theirs[i, at]] - logits[mine[i, at]]).abs() / logits.std()).item())
        yield {'prompts': a.agree, 'new_tokens': new, 'same': a.agree - len(ties), 'ties': ties,
               'logits_difference': ((right - ours).abs().amax(1) / right.std(1)).max().item(), **losses(model, a)}


def losses(model, a):
    """{'losses': nats per token on WINDOWS windows of the validation split of a trained model, of torch and of the engine with
    each head and kind of inputs}, or {} for a random model."""
    about = {} if a.model in KINDS else load.load(a.model)[2]['config']
    if not about:                                   # a random model, or a packed file alone
        return {}
    data, context = tokens.load(tokens.dataset_dir(about['dataset']), 'val'), model.config.block_size
    step = (len(data) - context - 1) // WINDOWS
    xy = data.windows([i * step for i in range(WINDOWS)], context + 1)
    found = {'torch': statistics.mean(model(part[:, :-1], part[:, 1:]).item() for part in xy.split(1))}
    for head, inputs in (('fp', 'fp32'), ('int8', 'fp32'), ('fp', 'int8'), ('int8', 'int8')):
        logits = Engine(model, head, a.threads, sequences=8, inputs=inputs)(xy[:, :-1], every=True)
        found[f'{head} head, {inputs} inputs'] = F.cross_entropy(logits.flatten(0, 1), xy[:, 1:].flatten()).item()
    return {'losses': found}


# ---------------------------------------------------------------------------------------------------------------------
# the parent


def decode(a):
    """tokens/s of decode and prefill: engine/, torch and llama.cpp in turns, on random or trained models"""
    try:
        a.lengths, counts = sorted(map(int, a.prefill.split(','))), list(map(int, a.threads_of.split(',')))
    except ValueError:
        configurator.fail(f'prefill={a.prefill} and threads_of={a.threads_of} must be numbers with commas, e.g. 1,2')
    names, heads = ([x for x in text.split(',') if x] for text in (a.models, a.heads))
    kinds = [name for name in names if name in KINDS]
    like = [x for x in a.llama_types.split(',') if x] or [x for kind in kinds for x in LIKE.get(kind, ())]
    if not names or not heads or min(*a.lengths, *counts) < 1 or not a.seconds > 0 or min(a.torch, a.agree, a.stages) < 0:
        configurator.fail('give a model and a head; prefill, threads_of, seconds must be above 0, the other numbers not below')
    if wrong := [h for h in heads if h not in HEADS]:
        configurator.fail(f'heads={wrong[0]!r} must be one of {", ".join(HEADS)}')
    if wrong := [x for x in like if x.partition(':')[0] not in llama.TYPES or x.partition(':')[2] not in llama.HEADS]:
        configurator.fail(f'llama_types={wrong[0]!r} must be one of {", ".join(llama.TYPES)}, a colon and F16 or Q8_0')
    if a.llama:
        try:
            llama.libraries(a.llama)
        except ValueError as e:
            configurator.fail(str(e))
        if not importlib.util.find_spec('gguf'):
            configurator.fail('--llama needs the package gguf; type: pip install gguf')
    a.kinds, a.like, a.context = kinds, like if a.llama else [], 1 << (max(a.lengths[-1], PROMPT) + a.tokens).bit_length()
    with tempfile.TemporaryDirectory(dir=a.folder or None) as a.folder:
        if kinds or a.like:
            job = dict(vars(a), run=None, bench='decode', name='write', runs='write')
            writer = Worker(job)
            writer.ask()
            writer.close()
        rows = []
        for threads in counts if not a.agree and not a.stages else []:
            rows += measure_turns(a, names, heads, threads)
        for name in names if a.agree else []:
            worker = Worker(dict(vars(a), run=None, bench='decode', name=f'{name} agree', runs='agree', model=name,
                                 file=file_of(a, name)))
            rows.append({'bench': 'decode', 'name': f'{name} agree', 'model': name, 'runs': 'agree', **worker.ask()})
            worker.close()
        for job in [j for n in counts for j in engine_jobs(a, names, heads, n)] if a.stages else []:
            worker = Worker(job | {'name': f'{job["name"]} stages', 'runs': 'stages'})
            worker.ask()
            rows.append({'bench': 'decode', **{key: job[key] for key in ('name', 'model', 'head', 'threads')}, 'runs': 'stages',
                         'shape': a.shape, **worker.ask()})
            worker.close()
    rows = [r | {'device': device_name(a), 'torch': torch.__version__} for r in rows]
    print_rows(rows, a)
    for r in rows:
        if r.get('idle', 0) > 0.05:
            print(f'note: {r["name"]} used {r["idle"]:.0%} of a core while others were measured')
        if r['runs'] == 'stages':
            print(f'{r["name"]}, {r["threads"]} threads: {r["of"]:.2f} ms a token; '
                  + ', '.join(f'{stage} {ms:.2f}' for stage, ms in r['ms'].items()))
        if r['runs'] == 'agree':
            print(f'{r["model"]}: {r["same"]} of {r["prompts"]} prompts have the same {r["new_tokens"]} greedy tokens in '
                  f'engine/ (exact head) and torch; logits differ by at most {r["logits_difference"]:.1e} of their spread'
                  + ''.join(f'; a tie of {tie:.1e}' for tie in r['ties'])
                  + ''.join(f'\n  loss, {name}: {loss:.4f}' for name, loss in r.get('losses', {}).items()))


def file_of(a, name):
    """The file of a model: random, or trained. A run's folder gives its packed file, if it has one."""
    if name in KINDS:
        return f'{a.folder}/{name}.safetensors'
    packed = Path(name, 'packed.safetensors')
    return str(packed) if packed.is_file() else name


def engine_jobs(a, names, heads, threads):
    """Jobs of the models `names` in engine/ with each head and kind of inputs that makes a difference."""
    return [dict(vars(a), run=None, bench='decode', threads=threads, head_of='', model=name, file=file_of(a, name),
                 runs='engine', name=f'{name} engine {head.replace(":", " inputs ")}', head=head)
            for name in names for head in heads if ':' not in head or name not in ('tern', 'fp')]


def measure_turns(a, names, heads, threads):
    """Rows of the models `names` in engine/ and torch and of the types a.like in llama.cpp, measured in turns. All of them stay
    loaded, each in its own process."""
    base = dict(vars(a), run=None, bench='decode', threads=threads, head_of='')
    jobs = [dict(base, name='read', runs='read')]
    for name in names:
        ours = dict(base, model=name, file=file_of(a, name))
        jobs += engine_jobs(a, [name], heads, threads)
        jobs += [dict(ours, name=f'{name} torch', runs='torch', head='')] if a.torch else []
    jobs += [dict(base, name=f'llama.cpp {x.replace(":", " ")}', runs='llama.cpp', model=x.partition(':')[0], head_of=x,
                  head=x.partition(':')[2], file=f'{a.folder}/{x}.gguf') for x in a.like]
    workers, answers = [], [[] for _ in jobs]
    for job in jobs:                                # one loads at a time: loading takes more memory than a loaded model
        workers.append(Worker(job))
        workers[-1].ask('warm')
    for turn in range(a.rounds):
        for w, mine in zip(workers, answers, strict=True):
            mine.append(w.ask('measure') if w.job['runs'] != 'torch' or turn < a.torch else {})
    rows = []
    for w, mine in zip(workers[1:], answers[1:], strict=True):
        speeds = [key for key in mine[0] if key == 'decode' or key.startswith('prefill_')]
        rounds = [{key: r[key] for key in speeds} | {'read': reading['read']} if r else None
                  for r, reading in zip(mine, answers[0], strict=True)]
        done = [r for r in rounds if r]
        rows.append({'bench': 'decode', **{key: w.job[key] for key in ('name', 'model', 'runs', 'head', 'threads')},
                     'shape': a.shape if w.job['model'] in (*KINDS, *llama.TYPES) else '', 'tokens': a.tokens}
                    | {key: statistics.median(r[key] for r in done) for key in (*speeds, 'read')}
                    | {key: value for key, value in mine[0].items() if key not in speeds and key != 'idle'}
                    | {'idle': max(r.get('idle', 0) for r in mine), 'rounds': rounds,
                       'resident_bytes': max(r['resident_bytes'] for r in mine if r),
                       'resident_ratio': mine[0]['loaded_bytes'] / (mine[0]['file_bytes'] + mine[0]['cache_bytes']),
                       'share': statistics.median(r['decode'] * mine[0]['token_bytes'] / r['read'] for r in done)})
    for w in workers:
        w.close()
    return rows


def print_rows(rows, a):
    mb = lambda n: f'{n / 1e6:,.1f}'
    speeds = [r for r in rows if r['runs'] not in ('agree', 'stages')]
    show(speeds, [('name', 'model', 's'), ('threads', 'threads', 'd'), ('decode', 'decode, tokens/s', ',.1f'),
                  *((f'prefill_{n}', f'prefill {n}', ',.0f') for n in a.lengths),
                  ('model_bytes', 'weights, MB', mb), ('share', 'of read bandwidth', '.0%'), ('read', 'that is, GB/s',
                  lambda n: f'{n / 1e9:.1f}'), ('loaded_bytes', 'resident, MB', mb),
                  ('resident_ratio', 'x file + cache', '.2f')], '')
    if a.json:
        with open(a.json, 'a') as f:
            f.writelines(json.dumps(r) + '\n' for r in rows)
