"""
Exchange trained models with llama.cpp and Hugging Face, and prove that a file computes what the model computes.

    python export.py --ckpt=out/x --to=gguf --out=x.gguf                        # a GGUF file for llama.cpp
    python export.py --ckpt=out/x --to=hf --out=x-hf                            # a folder for transformers
    python export.py --from=x.gguf --out=out/y                                  # a run's folder from a GGUF file or a folder
    python export.py --verify=x.gguf --ckpt=out/x --llama=FOLDER                # compares file, model and llama.cpp

A file of a ternary model holds its codes and scales, bit for bit. --verify reads the file back, compares every tensor and
prints where a difference enters: in packing, in the file (types of the embedding and of GPT-2's matrices), or in the program
that runs it. A model that the other side does not compute is refused with the reason.
"""
import contextlib
import copy
import os
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

import common
import configurator
import layers
import sample
from engine import load
from engine.engine import Engine
from measure.llama import Llama
from measure.turns import show
from pretrained import folders, ggufs, hf
from readers import tokens

ckpt = 'out/gpt'               # a run's folder, a checkpoint, a packed file, or a folder of BitNetForCausalLM
to = ''                        # gguf | hf: writes the model to --out
out = ''                       # file (gguf) or new folder (hf, --from) to write
type = ''                      # gguf: TQ2_0, TQ1_0, Q4_0, Q8_0, F16, F32 | hf: fp32, bf16, packed, bitlinear | '': by model
head = ''                      # gguf: embedding and head: F16 | F32 | Q8_0; '': F16
arch = ''                      # gguf: bitnet | gpt2 | bitnet-b1.58 (ik_llama.cpp); '': by the model
source = ''                    # GGUF file or Hugging Face folder to read; --from=PATH means the same
verify = ''                    # GGUF file or Hugging Face folder to compare with --ckpt
llama = ''                     # verify: folder with the shared libraries of llama.cpp; '': llama.cpp does not run
dataset = ''                   # verify: data whose validation split has the prompts; '': that of the training
text = ''                      # verify: text file with the prompts, in place of dataset
prompts = 200                  # verify: windows of the validation split
block_size = 0                 # verify: tokens per window; 0: as in training
new_tokens = 16                # verify: tokens to generate greedily after the first half of each window
threads = 1                    # verify: threads of engine and llama.cpp
json = ''                      # verify: file to which the rows of the table are appended, one JSON line each
seed = 1337                    # verify: chooses the windows
_defaults = dict(globals())
_words = [f'--source={word[7:]}' if word.partition('=')[0] == '--from' else word for word in sys.argv[1:]]
config = configurator.override(globals(), _words, quiet=True)   # file.py ... --key=value, later wins

MODES = {'to': ('ckpt', 'out', 'type', 'head', 'arch'), 'source': ('out',),
         'verify': ('ckpt', 'llama', 'dataset', 'text', 'prompts', 'block_size', 'new_tokens', 'threads', 'seed', 'json')}


# ---------------------------------------------------------------------------------------------------------------------
# out and in


def write():
    """Mode --to: write the model to --out."""
    if to == 'gguf' and (not out.endswith('.gguf') or os.path.isdir(out)):
        raise ValueError(f'out={out!r} is no file that ends in .gguf; type --out=x.gguf')
    try:
        model, tokenizer, about = load.load(ckpt)
    except ValueError as e:
        raise ValueError(folders.ready(ckpt) or e) from None
    if to == 'hf':
        folders.write(model, tokenizer, about, out, type or ('packed' if _packed(model) else 'fp32'))
        size = sum(entry.stat().st_size for entry in os.scandir(out))
    else:
        for note in ggufs.write(model, tokenizer, about, out, type, head, arch):
            print(f'note: {note}')
        size = os.path.getsize(out)
    print(f'wrote {out}, {size:,} bytes; compare it: python export.py --verify={out} --ckpt={ckpt}')


def _packed(model):
    return any(isinstance(m, layers.LowBit) and m.packed for m in model.modules())


def built(path, pad=False):
    """(trainer, model in eval mode, Tokenizer, figures of its run) of a GGUF file or a Hugging Face folder. Layers are packed
    if it holds codes. pad: to a vocabulary as the trainers have it, a multiple of 64. Raises ValueError."""
    trainer, shape, state, tokenizer, figures = (folders if os.path.isdir(path) else ggufs).read(path)
    table, (make, shape_of) = state['wte.weight'], load.MODELS[trainer]
    if pad:
        table = folders.pad_rows(table, -(-len(table) // 64) * 64)
        state |= {key: table for key in ('wte.weight', 'lm_head.weight') if key in state}
    with torch.device('meta'):
        model = make(shape_of(**shape | {'vocab_size': len(table)})).eval()
    if any(key.endswith('.code') for key in state):
        common.load_packed(model, state)
    else:
        common.load_model_state(model, state, path, load.HEAD, assign=True)
    model.lm_head.weight = model.wte.weight
    return trainer, model, tokenizer, figures


def read():
    """Mode --from: write a packed file or, if the weights are not packed, a checkpoint into the folder --out."""
    killed = re.compile(r'(best\.pt|packed\.safetensors)\.tmp\d+')      # files of a process that was killed; overwritten
    if os.path.lexists(out) and (not os.path.isdir(out) or not all(map(killed.fullmatch, os.listdir(out)))):
        raise ValueError(f'{out} exists; type --out= and a new folder')
    if os.path.isfile(os.path.join(source, 'last.pt')) or os.path.isfile(os.path.join(source, 'packed.safetensors')):
        raise ValueError(f'{source} is a run already; use it: python sample.py --ckpt={source}')
    if os.path.isfile(source) and source.endswith(('.pt', '.safetensors')):
        raise ValueError(f'{source} is no GGUF file; type --from= and a GGUF file or the folder of a model')
    trainer, model, tokenizer, figures = built(source, pad=True)
    meta = {'trainer': trainer, 'model_config': asdict(model.config), 'tokenizer': tokenizer.describe()} | figures
    os.makedirs(out, exist_ok=True)
    try:
        if _packed(model):
            path, then = os.path.join(out, 'packed.safetensors'), f'sample.py --ckpt={out}'
            common.save_packed(model, path, meta)
        else:
            path = os.path.join(out, 'best.pt')
            then = ' '.join([f'{trainer}.py --init_from={path}', *options_of(model, figures)])
            common.save_checkpoint(path, meta | {'model': model.state_dict(), 'best_val_loss': meta.pop('val_loss')})
    except BaseException:
        with contextlib.suppress(OSError):
            os.rmdir(out)
        raise
    print(f'wrote {path}, {os.path.getsize(path):,} bytes; use it: python {then}')


def options_of(model, figures):
    """Options of the model's trainer for its data and, where it differs from the defaults, its shape."""
    c, fresh = asdict(model.config), asdict(model.config.__class__(model.config.vocab_size))
    names = 'block_size', 'n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_ff', 'act', 'rope_theta', 'quant', 'bias'
    return [f'--dataset={figures["config"].get("dataset", "NAME")}',
            *(f'--{name}={c[name]}' for name in names if name in c and c[name] != fresh[name])]


# ---------------------------------------------------------------------------------------------------------------------
# verify


class Side(NamedTuple):
    """One side of a comparison: logits(ids (B, T)) returns (B, T, vocab); greedy(ids (1, T), n), if any, yields n ids; net, if
    any, is its model in torch."""
    name: str
    logits: Callable
    greedy: Callable | None = None
    net: torch.nn.Module | None = None


@torch.no_grad()
def all_logits(model, ids):
    """(B, T, vocab) of a GPT or BitNet, which by itself computes the logits of the last position only."""
    seen = []
    norm = model.ln_f if hasattr(model, 'ln_f') else model.norm
    handle = norm.register_forward_hook(lambda module, args, normed: seen.append(normed))
    model(ids)
    handle.remove()
    return model.lm_head(seen[0]).float()


def with_tanh(model, ids):
    """all_logits() with the tanh approximation of GELU, which llama.cpp computes for gpt2."""
    exact = F.gelu
    F.gelu = partial(exact, approximate='tanh')
    try:
        return all_logits(model, ids)
    finally:
        F.gelu = exact


def windows(tokenizer, about, block):
    """(prompts, block + 1) ids: windows of the validation split, or of --text."""
    name = dataset or about['config'].get('dataset', '')
    if text:
        try:
            with open(text, 'rb') as f:
                raw = f.read()
        except OSError as e:
            raise ValueError(f'cannot read {text}: {e.strerror}') from None
        ids = torch.tensor(sample.to_ids(tokenizer, raw))
        take = lambda starts: torch.stack([ids[i:i + block + 1] for i in starts])
    elif not name:
        raise ValueError(f'{about["path"]} does not say what it was trained on; type --dataset=NAME or --text=FILE')
    else:
        ids = tokens.load(tokens.dataset_dir(name), 'val')
        common.check_tokens({'tokenizer': tokenizer.describe()}, about['path'], ids.tokenizer, name)
        take = lambda starts: ids.windows(starts, block + 1)
    if len(ids) <= block:
        raise ValueError(f'{text or name} has {len(ids)} tokens, block_size={block} needs more; type a lower --block_size')
    return take(common.sample_indices(seed, -1, len(ids) - block, prompts))


def sides_of(path, model, known):
    """([(Side before, Side after)] of the arrows, the Llama or None). known: tokens of the tokenizer."""
    side = lambda name, net: Side(name, partial(all_logits, net), net=net)
    trainer, net, *_ = built(path)
    packed, file, runner = side('packed', layers.pack(copy.deepcopy(model))), side('file', net), None
    steps = [(side('trained', model), packed)] * (not _packed(model)) + [(packed, file)]
    as_there = file
    if os.path.isdir(path):
        steps.append((file, Side('transformers', folders.runs(path))))
    elif trainer == 'train_gpt':
        as_there = Side('GELU by tanh', partial(with_tanh, net))
        steps.append((file, as_there))
    for form in ('fp', 'int8'):
        try:
            made = Engine(net, form, threads)
        except ValueError as e:
            print(f'note: {e}; the engine does not run')
            break
        steps.append((file, Side(f'engine, {form} head', partial(made, every=True), partial(by_engine, made, known))))
    if llama:
        there = in_a_thread()
        runner = there(Llama, llama, path, threads, net.config.block_size)
        if runner.vocab != net.config.vocab_size:
            raise ValueError(f'llama.cpp reads {runner.vocab} tokens from {path}, not {net.config.vocab_size}')
        stacked = lambda ids: torch.stack([torch.from_numpy(there(runner.all_logits, row)) for row in ids.tolist()])
        steps.append((as_there, Side('llama.cpp', stacked, partial(by_llama, runner, there, known))))
    return steps, runner


def in_a_thread():
    """A function that calls f(*args) in one thread of its own. llama.cpp configures AMX registers of a thread once. Other
    code of the main thread, such as torch, configures them anew; then its next product is an illegal instruction."""
    pool = ThreadPoolExecutor(1)
    return lambda f, *args: pool.submit(f, *args).result()


def by_engine(engine, known, ids, n):
    for new in engine.generate(ids, n, known, temperature=0):
        yield new.item()


def by_llama(runner, there, known, ids, n):
    ids = ids[0].tolist()
    there(runner.clear)
    for _ in range(n):
        ids = [int(there(runner.logits, ids)[:known].argmax())]
        yield ids[0]


def measured(steps, data, known):
    """(a row for each step of sides_of(), the loss of the first side). Rows have the largest difference of a logit, the share
    of positions with no difference above 1e-4 and with the same most likely token, loss and its change. known: rows of the
    embedding."""
    sides = list({id(s): s for pair in steps for s in pair}.values())
    rows = [{'arrow': f'{a.name} -> {b.name}', 'max': 0.0, 'close': 0, 'same': 0} for a, b in steps]
    loss, batch, count = dict.fromkeys(map(id, sides), 0.0), None, 0
    size = max(1, 2 ** 21 // (data.shape[1] * known))
    for xy in data.split(size):
        x, y = xy[:, :-1], xy[:, 1:]
        batch = {id(s): s.logits(x)[..., :known] for s in sides}
        for key, logits in batch.items():
            loss[key] += F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction='sum').item()
        for row, (a, b) in zip(rows, steps, strict=True):
            one, two = batch[id(a)], batch[id(b)]
            off = (one - two).abs().amax(-1)
            row['max'], row['close'] = max(row['max'], off.max().item()), row['close'] + (off <= 1e-4).sum().item()
            row['same'] += (one.argmax(-1) == two.argmax(-1)).sum().item()
        count += y.numel()
    for row, (a, b) in zip(rows, steps, strict=True):
        row['loss'], row['delta'] = loss[id(b)] / count, (loss[id(b)] - loss[id(a)]) / count
        row['same'], row['close'] = row['same'] / count, row['close'] / count
    return rows, loss[id(steps[0][0])] / count


def continued(steps, rows, data, known):
    """Add to the rows how many prompts have the greedy continuation of torch, and the tokens per second of one sequence after
    the first new token, the median over the prompts. All sides continue a prompt in turn. Returns the lengths of prompts and
    continuations."""
    half = max(1, (data.shape[1] - 1) // 2)
    n = min(new_tokens, data.shape[1] - 1 - half)
    net = next(side.net for pair in steps for side in pair if side.name == 'file')
    wanted = torch.stack(list(sample.generate(net, data[:, :half], n, known, temperature=0)), 1).tolist()
    able = [(row, side.greedy, []) for row, (_, side) in zip(rows, steps, strict=True) if side.greedy]
    for row, _, _ in able:
        row['continued'] = 0
    for ids, text in zip(data[:, :half].split(1), wanted, strict=True):
        for row, greedy, seconds in able:
            new = greedy(ids, n)
            found = [next(new)]                     # reads the prompt too
            clock = time.perf_counter()
            found += list(new)
            seconds.append(time.perf_counter() - clock)
            row['continued'] += found == text
    for row, _, seconds in able:
        row['speed'] = (n - 1) / statistics.median(seconds) if n > 1 else None
    return half, n


def compare_folder(path, model, tokenizer, about):
    """As ggufs.compare(), for a folder: it is written again."""
    stored, about_it = hf.mapped_state(path), hf.read_config(path)
    how = about_it.get('quantization_config') or {'quantization_mode': 'online'}
    form = 'bf16' if about_it.get('torch_dtype') == 'bfloat16' else 'fp32'
    if how['quantization_mode'] == 'offline':
        form = 'bitlinear' if how['linear_class'] == 'bitlinear' else 'packed'
    with tempfile.TemporaryDirectory() as temporary:
        again = os.path.join(temporary, 'x')
        folders.write(model, tokenizer, about, again, form)
        ours = hf.mapped_state(again)
        alike = lambda a, b: a.dtype == b.dtype and torch.equal(a, b)
        wrong = [n for n in ours if n not in stored or not alike(ours[n], stored[n])]
        for name in ('config.json', 'tokenizer.json'):
            with open(os.path.join(again, name), 'rb') as a, open(os.path.join(path, name), 'rb') as b:
                wrong += [name] * (a.read() != b.read())
    return sorted(ours), wrong + sorted(stored.keys() - ours), []


def check():
    """Mode --verify: compare a file with the model, tensor by tensor and by what they compute."""
    if llama and os.path.isdir(verify):
        raise ValueError(f'llama.cpp reads GGUF files, and {verify} is a folder; leave --llama out')
    model, tokenizer, about = load.load(ckpt)
    if llama and getattr(model.config, 'act', '') == 'relu2':
        raise ValueError('stock llama.cpp has no relu2; leave --llama out')
    names, wrong, notes = (compare_folder if os.path.isdir(verify) else ggufs.compare)(verify, model, tokenizer, about)
    for note in notes:
        print(f'note: {note}')
    equal = len(set(names) - set(wrong))
    print(f'{verify}, {_bytes(verify):,} bytes: {equal} of {len(names)} tensors are those of a new export of {about["path"]}, '
          'bit for bit')
    if wrong:
        configurator.fail(f'{verify} differs from {about["path"]} in {wrong[0]}'
                          + f' and {len(wrong) - 1} more' * (len(wrong) > 1) + '; export it again')
    block = block_size or about['config'].get('block_size', model.config.block_size)
    if block > model.config.block_size:
        raise ValueError(f'block_size={block} is more than the {model.config.block_size} of {ckpt}')
    data = windows(tokenizer, about, block)
    steps, runner = sides_of(verify, model, tokenizer.vocab_size)
    rows, loss = measured(steps, data, model.config.vocab_size)
    half, n = continued(steps, rows, data, tokenizer.vocab_size)
    print(f'{len(data)} windows of {data.shape[1] - 1} tokens; loss of {steps[0][0].name}: {loss:.5f}')
    about_it = {'file': verify, 'bytes': _bytes(verify), 'tensors': len(names), 'windows': len(data),
                'window': data.shape[1] - 1, 'first_loss': loss, 'prompt': half, 'new_tokens': n, 'threads': threads}
    if runner:
        texts = [tokenizer.decode(row) for row in data[:, :-1].tolist()]
        alike = sum(runner.tokenize(t) == tokenizer.encode(t).tolist() for t in texts)
        about_it |= {'tokenized_alike': alike, 'llama_cpp': runner.about}
    show([about_it | row for row in rows],
         [('arrow', 'arrow', ''), ('max', 'max |dlogit|', '.2e'), ('loss', 'loss', '.5f'), ('delta', 'dloss', '+.5f'),
          ('same', 'same next token', '.2%'), ('close', '<= 1e-4', '.2%'), ('continued', f'same {n} tokens', 'd'),
          ('speed', 'tokens/s', ',.0f')], json)
    print(f'<= 1e-4: positions where no logit differs by more; same {n} tokens: prompts of {half} tokens that torch continues '
          f'greedily in the same way; tokens/s: one sequence, {threads} thread{"s" * (threads > 1)}')
    if runner:
        print(f'{alike} of {len(texts)} prompts have the same tokens in llama.cpp; {runner.about}')


def _bytes(path):
    return sum(e.stat().st_size for e in os.scandir(path)) if os.path.isdir(path) else os.path.getsize(path)


def main():
    chosen = [key for key in MODES if globals()[key]]
    if len(chosen) != 1:
        configurator.fail('type one of --to=gguf, --to=hf, --from=PATH and --verify=PATH')
    used = {*chosen, *MODES[chosen[0]]} - ({'head', 'arch'} if to == 'hf' else set())
    for key, value in config.items():
        if value != _defaults[key] and key not in used:
            mode = f'--to={to}' if to else f'--{chosen[0]}'.replace('source', 'from')
            configurator.fail(f'{key} has no use with {mode}; leave --{key} out')
    if to not in ('', 'gguf', 'hf'):
        configurator.fail(f'to={to!r} is none of gguf, hf; type --to=gguf')
    if not verify and not out:
        configurator.fail('--out is missing; type --out=PATH')
    for key in ('prompts', 'new_tokens', 'threads'):
        if globals()[key] < 1:
            configurator.fail(f'{key}={globals()[key]} is too low; type --{key}=1 or more')
    if verify and not os.path.exists(verify):
        configurator.fail(f'{verify} does not exist; type --verify=PATH of a GGUF file or a folder')
    if verify:
        torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, signal.default_int_handler)          # as Ctrl-C: what is half-written is removed
    try:
        {'to': write, 'source': read, 'verify': check}[chosen[0]]()
    except KeyboardInterrupt:
        configurator.fail('interrupted; run the same command again')
    except ValueError as e:
        configurator.fail(str(e))
    except OSError as e:
        configurator.fail(f'{e}; type another --out' if out and not verify else str(e))


if __name__ == '__main__':
    main()
