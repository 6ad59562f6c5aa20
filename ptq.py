"""
Post-training quantization, pruning and sensitivity of a trained model.

    python ptq.py --ckpt=out/x                                  # compare all schemes: prints a table, writes ptq.jsonl, ptq.png
    python ptq.py --ckpt=out/x --schemes=rtn4,gptq4 --skip=     # two schemes; quantizes the head and the embedding too
    python ptq.py --ckpt=out/x --schemes=gptq4 --save=out/x/gptq4.safetensors     # writes a packed file for sample.py, ptq.py
    python ptq.py prune --ckpt=out/x --methods=wanda --amounts=0.5
    python ptq.py sensitivity --ckpt=out/x --scheme=bin         # quantizes one block or one kind of projection at a time
    python ptq.py choose --ckpt=out/x --bits=17               # chooses blocks to train as binary; a config for train_gpt.py

--ckpt is one of: a run of train_gpt.py or train_bitnet.py, evaluated on its own validation data; a language model of
transformers (a folder or an id) with --text=FILE and --calibration=FILE; one of its classifiers with --dataset=sst2, or with
--text=eval.csv and --calibration=train.csv. A folder of LoRA adapters is its base model with the adapters merged.

    half, bf16    fp16, bfloat16                     int8, int8a8   absmax scale per row; a8: the inputs are int8 too
    uniform16 ..  16 even levels, groups of 16 ..    nf4, nf4dq     16 normal quantiles; dq: 8-bit scales
    fit4          16 fitted levels                   rtn4 .. rtn2   integers with a zero per group, rounded to the nearest
    awq4 .. awq2  like rtn, with scaled inputs       gptq4 .. gptq2 like rtn; columns and layers repair errors of earlier ones
    tern, bin     mean|w| times {-1, 0, 1}, {-1, 1}; need training    bnb8, bnb_nf4, bnb_nf4dq   bitsandbytes, if installed
"""
import copy
import importlib.util
import json
import logging
import math
import os
import statistics
import sys
import tempfile
import time

import torch
import torch.nn as nn

import common
import configurator
import layers
from engine import load
from measure.turns import median_ms, resident_bytes, show
from pretrained import calibrate, replace, subjects
from pretrained.formats import GroupLinear
from report import plot_ptq

mode = 'compare'               # compare | prune | sensitivity | choose; can be the first word, without --mode=
ckpt = 'out/gpt'               # folder of a run or one of its files | folder or id of transformers
out = ''                       # folder for tables and pictures; '': the folder of the model, or out/ptq_ID for an id
dataset = ''                   # '': the training data of the model | for a classifier: labelled texts, e.g. sst2
text = ''                      # transformers: text file to evaluate a language model on | table for a classifier, e.g. eval.csv
calibration = ''               # transformers: another file of the same form, for the calibration set
text_columns = ('sentence',)   # classifier with --text: one or two columns with the texts
label_column = 'label'         # classifier with --text: column with the labels
eval_iters = 0                 # evaluation batches; 0: as in training, or the whole text
batch_size = 0                 # windows (for a classifier: texts) per batch; 0: as in training, or 4 windows, 32 texts
block_size = 0                 # tokens per window; 0: as in training, or up to 1024 of a language model, 128 of a classifier
# quantization
schemes = ''                   # names from the top of this file, separated by commas; '': all
skip = 'head,embd'             # layers that stay unchanged: head, embd or words of layer names, with commas; '': none
group = 128                    # weights of a row that share a scale in rtn, awq, gptq, tern and bin; 0: the whole row
windows = 128                  # size of the calibration set: windows of block_size tokens, or texts of a classifier
damp = 0.01                    # gptq: adds damp * mean(diag H) to the diagonal of H, the Gram matrix of the inputs; 0 to 1
save = ''                      # file or new folder for the packed model; needs one scheme, or one pruning method and amount
time_rounds = 5                # timing rounds, in turns with the original model; 0: no timing
# prune
methods = 'magnitude,global,2:4,wanda,wanda2:4'     # pruning methods, separated by commas; the default is all of them
amounts = (0.25, 0.5, 0.75)    # shares of the weights to set to 0; 1.0: all. 2:4 always prunes one half
retrain_iters = 200            # AdamW steps after pruning; pruned weights stay 0
retrain_lr = 1e-5              # learning rate of these steps
# sensitivity and choose
scheme = 'bin'                 # scheme by which a block or a kind of projection is quantized
bits = 0.0                     # choose: mean bits per weight that the blocks may have; a full-precision block has 32
seed = 1337                    # seed of the calibration set and of the order of samples
device = ''                    # '': cuda if there is one, else cpu
_MODES = ('compare', 'prune', 'sensitivity', 'choose')
_defaults = dict(globals())
_words = [f'--mode={word}' if word.isalpha() else word for word in sys.argv[1:]]
config = configurator.override(globals(), _words)   # file.py ... --key=value, later wins
_changed = {key for key in config if config[key] != _defaults[key]}

# name: (method, kind or levels, options)
SCHEMES = {'half': ('', 'half', {}), 'bf16': ('', 'half', {'dtype': 'bfloat16'}),
           'int8': ('', 'int8', {}), 'int8a8': ('', 'int8', {'activations': 'int8'}),
           **{f'uniform{g}': ('', 'int4', {'group': g}) for g in (16, 32, 64, 128)},
           'nf4': ('', 'nf4', {}), 'nf4dq': ('', 'nf4', {'scales': '8bit'}), 'fit4': ('', 'fit4', {}),
           **{f'{method}{n}': (method, f'int{n}', {}) for n in (4, 3, 2) for method in ('rtn', 'awq', 'gptq')},
           'tern': ('rtn', 'tern', {}), 'bin': ('rtn', 'bin', {}),
           'bnb8': ('bnb', 'int8', {}), 'bnb_nf4': ('bnb', 'nf4', {}), 'bnb_nf4dq': ('bnb', 'nf4dq', {})}
# method of a scheme: the options that it uses. A method with the option group makes GroupLinear layers.
METHODS = {'': (), 'bnb': (), 'rtn': ('group',), 'awq': ('group', 'windows'),
           'gptq': ('group', 'windows', 'damp')}
# calibrated method -> (codes, scale, zero) of a weight; awq also returns the scale of the inputs
CALIBRATED = {'awq': lambda weight, moments, levels: calibrate.awq(weight, moments, levels, group),
              'gptq': lambda weight, moments, levels: calibrate.gptq(weight, moments, levels, group, damp)}
OPTIONS = ('skip', *dict.fromkeys(key for keys in METHODS.values() for key in keys))
PRUNING = ('magnitude', 'global', '2:4', 'wanda', 'wanda2:4')


# ---------------------------------------------------------------------------------------------------------------------
# quantization


def rule(name):
    """(kind, options) of the layers that scheme `name` makes."""
    method, kind, options = SCHEMES[name]
    return ('group', {'levels': kind, 'group': group}) if 'group' in METHODS[method] else (kind, options)


def quantize(subject, model, name, alone=False):
    """Quantize the layers of `model` by scheme `name`, one after the other, in place.

    Returns ({name: entry} for restore(), bits per weight). The bits count everything stored in the replaced layers but biases.
    alone: calibrate each layer in a model in which nothing else is quantized. Raises ValueError that names the layer."""
    method, levels, _ = SCHEMES[name]
    kind, options = rule(name)
    wanted, described, counts, later = replace.layers_of(model, skip), {}, [0, 0], {}

    def put(n, new=None, options=options):
        weights = model.get_submodule(n).weight.numel()
        described.update(replace.replace(model, n, kind, options, new))
        state = model.get_submodule(n).state_dict()
        counts[0] += sum(t.nbytes for key, t in state.items() if key != 'bias' and isinstance(t, torch.Tensor))
        counts[1] += weights

    def visit(n, moments):
        layer = model.get_submodule(n)
        weight = layer.weight.detach()
        try:
            quantized = CALIBRATED[method](weight, moments, levels)
        except ValueError as e:
            raise ValueError(f'{n}: {e}') from None
        later[n] = GroupLinear.from_codes(layer, levels, group, *quantized), options | {'scaled_input': len(quantized) > 3}
        if not alone:
            put(n, *later.pop(n))

    if method in CALIBRATED:
        linears = [n for n, m in wanted.items() if isinstance(m, nn.Linear)]
        calibrate.for_each_layer(model, subject.calibration(windows, seed), subject.run, linears, visit,
                                 repair=method == 'gptq' and not alone)
        for n, quantized in later.items():
            put(n, *quantized)
    for n, module in wanted.items():
        if method == 'bnb' and isinstance(module, nn.Linear) and not replace.tied_to(model, n):
            put(n, bitsandbytes_layer(module, levels))
        elif method != 'bnb' and n not in described:                    # embeddings have no inputs to calibrate on
            put(n)
    if not counts[1]:
        raise ValueError(f'{name} has no layer to replace, because bitsandbytes has linear layers only; type other --schemes')
    return described, counts[0] * 8 / counts[1]


@torch.no_grad()
def check_runs(subject, model):
    """Raises ValueError if the quantized model does not run: the code of a model can need what packed layers lack."""
    try:
        subject.passed(model, subject.ids(1))
    except (AttributeError, TypeError, RuntimeError) as e:
        raise ValueError(f'the quantized model does not run ({type(e).__name__}: {str(e).splitlines()[0]}); type another '
                         '--skip') from None


def bitsandbytes_layer(linear, kind):
    """bitsandbytes layer with the weights of `linear`: nf4, or int8 that treats columns of outliers above 6.0 separately."""
    import bitsandbytes as bnb
    logging.getLogger('bitsandbytes').setLevel(logging.ERROR)           # it logs in each pass that it computes in fp16
    rows, columns, bias = linear.out_features, linear.in_features, linear.bias is not None
    new = bnb.nn.Linear8bitLt(columns, rows, bias, has_fp16_weights=False, threshold=6.0) if kind == 'int8' else \
        bnb.nn.Linear4bit(columns, rows, bias, quant_type='nf4', compute_dtype=torch.float32,
                          compress_statistics=kind == 'nf4dq')
    new.load_state_dict(linear.state_dict())
    return new.to(linear.weight.device)


def check(subject, names):
    """Check the options before anything is computed. Raises ValueError."""
    if twice := [n for n in names if names.count(n) > 1]:
        raise ValueError(f'{twice[0]} is given twice; type it once')
    if save:
        subject.refuse(save)
    wanted = replace.layers_of(subject.model, skip)
    for name in names:
        kind, options = rule(name)
        if SCHEMES[name][0] == 'bnb':
            if not importlib.util.find_spec('bitsandbytes'):
                raise ValueError(f'scheme {name} needs bitsandbytes; type: pip install bitsandbytes')
            continue
        for n, module in wanted.items():
            with torch.device('meta'):
                columns, embeds = replace.as_linear(module).in_features, not isinstance(module, nn.Linear)
                try:
                    layer = layers.linear(kind, columns, 8, **options)
                    if embeds or replace.tied_to(subject.model, n):
                        replace.PackedEmbedding(layer)
                except ValueError as e:
                    word = f'; or add {n.rpartition(".")[2]} to --skip' * embeds
                    raise ValueError(f'scheme {name} does not fit {n}: {e}{word}') from None
    refuse_unused(names, ', '.join(names))
    if any(SCHEMES[name][0] in CALIBRATED for name in names):
        subject.calibration(1, seed)


def refuse_unused(names, what):
    """Raises ValueError if an option is set that no scheme of `names` uses."""
    for key in OPTIONS:
        if key in _changed and not any(key == 'skip' or key in METHODS[SCHEMES[name][0]] for name in names):
            raise ValueError(f'{key} has no use for {what}; leave --{key} out')


def file_bytes(subject, model, described):
    """Bytes of the packed model as a file that can be loaded. The tensors of bitsandbytes are stored unchanged."""
    with tempfile.TemporaryDirectory() as folder:
        return common.save_packed(model, os.path.join(folder, 'packed.safetensors'), subject.meta | {'quantized': described})


def share_of(described, model):
    """Share of the model's weights that are in the layers of `described`."""
    return sum(model.get_submodule(n).weight.numel() for n in described) / sum(p.numel() for p in model.parameters())


def timings(subject, model, base):
    """Milliseconds per token for one token ('ms_1') and for a full context ('ms_many'), with ratios to `base` ('ratio_1',
    'ratio_many'). base=None: `model` is the original. Each of time_rounds rounds runs each model for 0.2 s, in alternating
    order. Figures are medians over rounds. {} with time_rounds=0."""
    row, nets = {}, (model,) if base is None else (model, base)
    for key, n in (('1', 1), ('many', 10 ** 6)) if time_rounds else ():
        ids, times = subject.ids(n), [[] for _ in nets]
        with torch.no_grad():
            for i in range(time_rounds):
                for k in sorted(range(len(nets)), reverse=i % 2):
                    ms = median_ms(lambda net=nets[k], ids=ids: subject.passed(net, ids), 0.2, ids.device.type == 'cuda')
                    times[k].append(ms / ids.shape[1])
        row[f'ms_{key}'] = statistics.median(times[0])
        row[f'ratio_{key}'] = 1.0 if base is None else statistics.median(m / b for m, b in zip(*times, strict=True))
    return row


COLUMNS = [('scheme', 'scheme', ''), ('bits', 'bits/weight', '.3f'), ('loss', 'val loss', '.4f'),
           ('perplexity', 'perplexity', '.3f'), ('delta', 'difference', '+.4f'), ('accuracy', 'accuracy', '.4f'),
           ('ms_1', 'ms, 1 token', '.2f'), ('ratio_1', 'x fp', '.2f'), ('ms_many', 'ms/token, many', '.3f'),
           ('ratio_many', 'x fp', '.2f'), ('file_bytes', 'bytes', ',d'), ('compression', 'smaller', '.2f')]


def evaluated(subject, model, name, first, described, **row):
    """Evaluate the model; returns a row of the table. first: row of the original model, or None. described: by replace()."""
    loss = subject.loss(model)
    row |= {'scheme': name, 'loss': loss, 'perplexity': math.exp(min(loss, 700)) if subject.causal else None,
            'accuracy': subject.accuracy, 'delta': first and loss - first['loss'],
            'file_bytes': file_bytes(subject, model, described)}
    row['compression'] = first and first['file_bytes'] / row['file_bytes']
    return row | {'ckpt': subject.name, 'group': group, 'skip': skip, 'windows': windows, 'seed': seed,
                  'torch': torch.__version__, 'threads': torch.get_num_threads(), 'device': common.device_name(subject.dev)}


def compare(subject, folder):
    model, done = subject.model, subject.about['quantized']
    every = [n for n in SCHEMES if SCHEMES[n][0] != 'bnb' or importlib.util.find_spec('bitsandbytes')]
    names = chosen(schemes, every, SCHEMES)
    if done and schemes:
        raise ValueError(f'{subject.name} is quantized already; leave --schemes out to evaluate it')
    if done:
        refuse_unused([], subject.name)
    else:
        check(subject, names)
    columns = lambda rows: [c for c in COLUMNS if any(r.get(c[0]) is not None for r in rows)]
    low_bit = any(isinstance(m, layers.LowBit) for m in model.modules())
    first = 'as saved' if done else 'as trained' if low_bit else 'fp'
    rows = [evaluated(subject, model, first, None, done, **timings(subject, model, None))]
    if subject.trained is not None:
        print(f'val loss {rows[0]["loss"]:.4f}; its training wrote down {subject.trained:.4f} for the same batches')
    if done:                                        # a separate file; the comparison table stays
        name = f'{os.path.splitext(os.path.basename(subject.name))[0]}_ptq' if os.path.isfile(subject.name) else 'ptq'
        show(rows, columns(rows), None)
        print(f'wrote {write_rows(folder, name, rows)}')
        return
    for name in names:
        new, start = copy.deepcopy(model), time.perf_counter()
        described, bits_each = quantize(subject, new, name)
        check_runs(subject, new)
        rows.append(evaluated(subject, new, name, rows[0], described, bits=bits_each, quantize_s=time.perf_counter() - start,
                              share=share_of(described, model), **timings(subject, new, model)))
        print(f'{name}: val loss {rows[-1]["loss"]:.4f}', flush=True)
        path = write_rows(folder, 'ptq', rows)
    show(rows, columns(rows), None)
    print(f'bits/weight: of the {rows[-1]["share"]:.1%} of the weights that are quantized (skip={skip!r}); smaller: compared '
          'to the first row')
    plot_ptq.sizes(os.path.join(folder, 'ptq.png'), rows, subject.name, subject.unit)
    print(f'wrote {path} and {folder}/ptq.png')


def save_quantized(subject, folder, start, before):
    """--save: quantize in place, layer by layer, so that there is never a second full-precision model in memory. start, before:
    time and resident bytes before the model was loaded."""
    names = chosen(schemes, [], [n for n in SCHEMES if SCHEMES[n][0] != 'bnb'])
    if len(names) != 1:
        raise ValueError(f'--save writes one model, but {len(names)} schemes are given; type e.g. --schemes=gptq4')
    if subject.about['quantized']:
        raise ValueError(f'{subject.name} is quantized already; type --ckpt=... of a full-precision model')
    name, = names
    check(subject, names)
    share = share_of(replace.layers_of(subject.model, skip), subject.model)
    described, bits_each = quantize(subject, subject.model, name)
    check_runs(subject, subject.model)
    size = subject.save(save, described)
    row = {'scheme': name, 'skip': skip, 'bits': bits_each, 'seconds': time.perf_counter() - start, 'size': size,
           'peak': common.peak_memory_bytes(), 'above': common.peak_memory_bytes() - before, 'windows': windows,
           'block': subject.block, 'threads': torch.get_num_threads(), 'device': common.device_name(subject.dev),
           'torch': torch.__version__}
    print(f'{name}: {bits_each:.3f} bits per weight of {len(described)} layers with {share:.1%} of the weights, '
          f'{row["seconds"]:.1f} s, peak memory {row["peak"]:,} bytes, {row["above"]:,} above the start; wrote {save}: '
          f'{size:,} bytes')
    row['loss'] = subject.loss(subject.model)
    write_rows(folder, 'save', [row])
    print(f'val loss {row["loss"]:.4f}')


def chosen(words, default, known):
    """List of the names in `words`, separated by commas; '': the default. Raises ValueError for a name not in `known`."""
    names = [w.strip() for w in words.split(',')] if words else list(default)
    if unknown := [n for n in names if n not in known]:
        raise ValueError(f'{unknown[0]!r} is none of {", ".join(known)}')
    return names


_written = set()


def write_rows(folder, name, rows):
    """Write rows as JSON lines to folder/name.jsonl, atomically; returns the path. A file of an earlier run of ptq.py becomes
    name.prev.jsonl."""
    def write(tmp):
        with open(tmp, 'w') as f:
            f.writelines(json.dumps(r) + '\n' for r in rows)
    path = os.path.join(folder, f'{name}.jsonl')
    if path not in _written and os.path.exists(path):
        os.replace(path, common.previous_path(path))
    _written.add(path)
    common.atomic_write(path, write)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# pruning


def smallest(scores, k):
    """Mask that is False for exactly the k smallest scores in the last dimension, ties by position, and True elsewhere."""
    mask = torch.ones_like(scores, dtype=torch.bool)
    return mask.scatter_(-1, scores.argsort(dim=-1, stable=True)[..., :k], False)


def prune_(subject, model, method, amount):
    """Set weights of the linear layers to 0 in place. Returns {name: mask of the weights that stay}.

    magnitude: the smallest |w| of each matrix. global: the smallest |w| of all matrices. wanda: the smallest |w| |x_j| of each
    row; |x_j| is the norm of input j over the calibration set (arXiv 2306.11695). 2:4: two of every four weights of a row."""
    names, masks = [n for n, m in replace.layers_of(model, skip).items() if isinstance(m, nn.Linear)], {}
    weight = lambda n: model.get_submodule(n).weight.detach()

    def keep(n, scores):
        if method.endswith('2:4'):
            masks[n] = smallest(scores.unflatten(1, (-1, 4)), 2).flatten(1)
        elif method == 'wanda':
            masks[n] = smallest(scores, round(amount * scores.shape[1]))
        else:
            masks[n] = smallest(scores.flatten(), round(amount * scores.numel())).view(scores.shape)
        weight(n).mul_(masks[n])

    if method == 'global':
        every = torch.cat([weight(n).abs().flatten() for n in names])
        flat = smallest(every, round(amount * len(every)))
        for n, mask in zip(names, flat.split([weight(n).numel() for n in names]), strict=True):
            masks[n] = mask.view(weight(n).shape)
            weight(n).mul_(masks[n])
    elif method.startswith('wanda'):
        calibrate.for_each_layer(model, subject.calibration(windows, seed), subject.run, names,
                                 lambda n, moments: keep(n, weight(n).abs() * moments.H.diagonal().sqrt()))
    else:
        for n in names:
            keep(n, weight(n).abs())
    return masks


def retrain(subject, model, masks):
    """Train all weights for retrain_iters steps of AdamW; pruned weights stay 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=retrain_lr)
    torch.manual_seed(seed)                         # the same dropout for every method
    model.train()
    for step in range(retrain_iters):
        loss = subject.training_loss(model, seed, step)
        if not torch.isfinite(loss):
            raise ValueError(f'loss {loss.item()} at step {step} of the retraining; type a lower --retrain_lr')
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for n, mask in masks.items():
                model.get_submodule(n).weight.mul_(mask)
    model.eval()


PRUNED = [('method', 'method', ''), ('amount', 'share', '.2f'), ('zeros', 'zeros', '.4f'), ('pruned_loss', 'val loss', '.4f'),
          ('loss', 'retrained', '.4f'), ('delta', 'difference', '+.4f'), ('accuracy', 'accuracy', '.4f'),
          ('file_bytes', 'bytes', ',d'), ('compression', 'smaller', '.2f')]


def prune(subject, folder):
    jobs = [(m, a) for m in chosen(methods, [], PRUNING) for a in ((0.5,) if m.endswith('2:4') else amounts)]
    if not jobs or any(not 0 <= a <= 1 for _, a in jobs):
        raise ValueError(f'methods={methods!r}, amounts={amounts}: type --methods, and --amounts as shares from 0 to 1')
    if save and len(jobs) != 1:
        raise ValueError(f'--save writes one model, not {len(jobs)}; type one of --methods and one of --amounts')
    if any(m.startswith('wanda') for m, _ in jobs):
        subject.calibration(1, seed)
    elif 'windows' in _changed:
        raise ValueError('windows has no use without wanda; leave --windows out')
    if save:
        subject.refuse(save)
    for n, module in replace.layers_of(subject.model, skip).items():
        if isinstance(module, nn.Linear) and replace.tied_to(subject.model, n):
            raise ValueError(f'{n} is an embedding too, which is not pruned; type --skip=head,embd')
        if isinstance(module, nn.Linear) and module.in_features % 4 and any(m.endswith('2:4') for m, _ in jobs):
            raise ValueError(f'2:4 does not fit {n}: 4 does not divide a row of {module.in_features}; type other --methods')
    rows = []
    for method, amount in [('none', 0.0), *jobs]:   # the original model gets as many updates
        start = time.perf_counter()
        model = copy.deepcopy(subject.model)
        masks = prune_(subject, model, method, amount) if method != 'none' else {}
        pruned_loss = subject.loss(model)
        retrain(subject, model, masks)
        weights = [model.get_submodule(n).weight for n in masks]
        zeros = sum((w == 0).sum().item() for w in weights) / max(1, sum(w.numel() for w in weights))
        described = {}
        for n in masks:                             # stored as one bit per weight and the nonzero values
            described |= replace.replace(model, n, 'sparse', {})
        row = evaluated(subject, model, method, rows[0] if rows else None, described)
        rows.append(row | {'method': method, 'amount': amount, 'zeros': zeros, 'pruned_loss': pruned_loss,
                           'retrain_iters': retrain_iters, 'retrain_lr': retrain_lr})
        print(f'{method} {amount}: val loss {pruned_loss:.4f}, {row["loss"]:.4f} after {retrain_iters} updates; '
              f'{time.perf_counter() - start:.0f} s, {len(jobs) + 1 - len(rows)} to go', flush=True)
        write_rows(folder, 'prune', rows)
    if save:
        subject.model = model
        print(f'wrote {save}: {subject.save(save, described):,} bytes')
    show(rows, [c for c in PRUNED if any(r.get(c[0]) is not None for r in rows)], None)
    plot_ptq.shares(os.path.join(folder, 'prune.png'), rows, subject.name, subject.unit)
    print(f'wrote {folder}/prune.jsonl and {folder}/prune.png')


# ---------------------------------------------------------------------------------------------------------------------
# sensitivity


def quantized_copy(subject):
    """Copy the model and quantize the linear layers of its blocks by `scheme`. Returns (copy, bits per weight, {block name:
    {kind of projection: layer name}})."""
    if scheme not in SCHEMES:
        raise ValueError(f'scheme={scheme!r} is none of {", ".join(SCHEMES)}')
    check(subject, [scheme])
    blocks, model = {b: {} for row in calibrate.find_blocks(subject.model) for b, _ in row}, subject.model
    for n, module in replace.layers_of(model, skip).items():
        inside = next((b for b in blocks if n.startswith(f'{b}.')), None)
        if inside and isinstance(module, nn.Linear):
            blocks[inside][n.removeprefix(f'{inside}.')] = n
    if not any(blocks.values()):
        raise ValueError(f'{subject.name} has no blocks with linear layers; type another --ckpt or --skip')
    other = copy.deepcopy(model)
    _, bits_each = quantize(subject, other, scheme, alone=True)
    check_runs(subject, other)
    return other, bits_each, blocks


def loss_with(subject, other, names, **where):
    """Loss of the model when its layers `names` are those of `other`. The model is unchanged afterwards."""
    model = subject.model
    own = {n: model.get_submodule(n) for n in names}
    for n in names:
        layers.set_module(model, n, other.get_submodule(n))
    try:
        return subject.loss(model, **where)
    finally:
        for n, layer in own.items():
            layers.set_module(model, n, layer)


def sensitivity(subject, folder):
    other, bits_each, blocks = quantized_copy(subject)
    base, rows = subject.loss(subject.model), []
    kinds = list(dict.fromkeys(k for inside in blocks.values() for k in inside))
    of_kind = lambda kind: [inside[kind] for inside in blocks.values() if kind in inside]
    cells = [(block, kind, [inside[kind]]) for block, inside in blocks.items() for kind in kinds if kind in inside]
    cells += [(block, 'all', list(inside.values())) for block, inside in blocks.items() if inside]
    cells += [('all', kind, of_kind(kind)) for kind in kinds] + [('all', 'all', [n for k in kinds for n in of_kind(k)])]
    for block, kind, names in cells:
        loss = loss_with(subject, other, names)
        rows.append({'block': block, 'kind': kind, 'scheme': scheme, 'bits': bits_each, 'weights':
                     sum(subject.model.get_submodule(n).weight.numel() for n in names), 'base_loss': base, 'loss': loss,
                     'delta': loss - base, 'ckpt': subject.name, 'group': group, 'device': common.device_name(subject.dev)})
        write_rows(folder, 'sensitivity', rows)
    deltas = {(r['block'], r['kind']): r['delta'] for r in rows}
    table = [{'block': b, **{k: deltas.get((b, k)) for k in [*kinds, 'all']}} for b in [*blocks, 'all']]
    print(f'{subject.name}: {base:.4f} {subject.unit}; increase with only these layers as {scheme}, {bits_each:.3f} bits')
    show(table, [('block', 'block', ''), *((k, k, '+.4f') for k in [*kinds, 'all'])], None)
    plot_ptq.heat(os.path.join(folder, 'sensitivity.png'), list(blocks), kinds, deltas,
                  f'{subject.name}: {scheme}', subject.unit)
    print(f'wrote {folder}/sensitivity.jsonl and {folder}/sensitivity.png')


# scheme: the kind of layer that train_gpt.py trains for it
TRAINABLE = {kind: kind for kind in layers.KINDS if kind in SCHEMES} | {'uniform16': 'int4'}


def choose(subject, folder):
    """Choose blocks to quantize until the model fits the budget of `bits`. Each round takes the block that adds the least loss
    to the blocks already taken. The loss is on the training split, because the result is judged on the validation split."""
    if scheme not in TRAINABLE:
        raise ValueError(f'scheme={scheme!r}: train_gpt.py trains {", ".join(TRAINABLE)} of these; type --scheme=bin')
    if subject.meta.get('trainer') != 'train_gpt' or any(isinstance(m, layers.LowBit) for m in subject.model.modules()):
        raise ValueError(f'{subject.name} is no full-precision model of train_gpt.py; type --ckpt=... of one')
    kind, c = TRAINABLE[scheme], subject.model.config
    other, _, blocks = quantized_copy(subject)
    sizes = [subject.model.get_submodule(n).weight.shape for n in next(iter(blocks.values())).values()]
    weights = sum(math.prod(s) for s in sizes)
    low = sum(layers.linear(kind, s[1], s[0], False).packed_bytes() for s in sizes) * 8 / weights
    of = lambda k: (k * low + (len(blocks) - k) * 32) / len(blocks)
    need = next((k for k in range(len(blocks) + 1) if of(k) <= bits), None)
    if not need:
        raise ValueError(f'bits={bits:g}: with all {len(blocks)} blocks as {kind} it is {low:.3f} bits per weight, with none '
                         f'32; type --bits={math.ceil(100 * of(len(blocks) // 2)) / 100:g} for half of the blocks')
    taken, rows, base = [], [], subject.loss(subject.model, on_training=True)
    print(f'{subject.name}: {base:.4f} {subject.unit} on the training split; this loss decides which blocks are chosen')
    while len(taken) < need:
        losses = {b: loss_with(subject, other, [n for t in [*taken, b] for n in blocks[t].values()], on_training=True)
                  for b in blocks if b not in taken}
        best = min(losses, key=losses.get)
        taken.append(best)
        rows.append({'taken': best, 'bits': of(len(taken)), 'base_loss': base, 'loss': losses[best],
                     'delta': losses[best] - base, 'losses': losses, 'scheme': scheme, 'ckpt': subject.name})
        print(f'{best}: loss {losses[best]:.4f} ({losses[best] - base:+.4f}), {of(len(taken)):.2f} bits', flush=True)
        write_rows(folder, 'choose', rows)
    numbers = tuple(sorted(list(blocks).index(b) for b in taken))
    path = os.path.join(folder, 'chosen.py')
    summary = (f'ptq.py choose: of the {c.n_layer} blocks of {subject.name}, {numbers} add the least loss as {scheme}, '
               f'{of(need):.2f} bits per weight')
    base_config = os.path.join(os.path.dirname(subject.name), 'config.py')
    command = f'python train_gpt.py {base_config} {path} --out_dir=out/chosen'
    configurator.save({'n_binary': 0, 'binary_blocks': numbers, 'qkv_proj': kind, 'c_proj': kind, 'mlp_proj': kind}, path,
                      f'{summary}\n{command}')
    print(f'{summary}\nto start from the weights of this model, add --init_from={subject.name}\n'
          f'wrote {folder}/choose.jsonl and {path}; train it with: {command}')


# ---------------------------------------------------------------------------------------------------------------------


def main():
    if mode not in _MODES:
        configurator.fail(f'mode={mode!r} is none of {", ".join(_MODES)}')
    for key, least in (('eval_iters', 0), ('batch_size', 0), ('block_size', 0), ('group', 0), ('windows', 1), ('damp', 0),
                       ('time_rounds', 0), ('retrain_iters', 0), ('retrain_lr', 0)):
        if not globals()[key] >= least:
            configurator.fail(f'{key}={globals()[key]} makes no sense; type --{key}={least} or more')
    if damp > 1:
        configurator.fail(f'damp={damp} makes no sense; type --damp=1 or less')
    used = {'compare': {'schemes', 'save', 'time_rounds', *OPTIONS}, 'sensitivity': {'scheme', *OPTIONS},
            'prune': {'methods', 'amounts', 'retrain_iters', 'retrain_lr', 'save', 'skip', 'windows'},
            'choose': {'scheme', 'bits', *OPTIONS}}
    for key in sorted(_changed & set.union(*used.values()) - used[mode]):
        configurator.fail(f'{key} has no use in {mode}; leave --{key} out')
    if save and 'time_rounds' in _changed:
        configurator.fail('time_rounds has no use with --save; leave it out')
    start, before = time.perf_counter(), resident_bytes()
    dev = common.setup_processes(device)[-1]
    if subjects.is_ours(ckpt):
        try:
            model, tokenizer, about = load.load(ckpt)
        except ValueError as e:
            configurator.fail(f'{e}; give another --ckpt')
        subject = subjects.Trained(about['path'], model, tokenizer, about, dev, config)
    else:
        subject = subjects.load(ckpt, dev, config)
    for key in sorted(_changed & subject.unused):
        configurator.fail(f'{key} has no use for {subject.name}; leave --{key} out')
    replace.unfuse(subject.model).requires_grad_(mode == 'prune')
    if not subjects.is_ours(ckpt) and not subject.about['quantized']:
        replace.keep_read(subject.model, lambda: subject.passed(subject.model, subject.ids(8)))
    folder = out or (os.path.dirname(subject.name) if os.path.isfile(subject.name) else subject.name if
                     os.path.isdir(subject.name) else os.path.join('out', f'ptq_{os.path.basename(subject.name)}'))
    try:
        os.makedirs(folder, exist_ok=True)
        if mode == 'compare' and save:
            save_quantized(subject, folder, start, before)
        else:
            {'compare': compare, 'prune': prune, 'sensitivity': sensitivity, 'choose': choose}[mode](subject, folder)
    except (ValueError, OSError) as e:
        configurator.fail(str(e))


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
