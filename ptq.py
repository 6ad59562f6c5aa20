"""
Post-training quantization, pruning and sensitivity of a trained model.

    python ptq.py --ckpt=out/x                                  # the model, then each scheme: one table, ptq.jsonl, ptq.png
    python ptq.py --ckpt=out/x --schemes=rtn4,gptq4 --skip=     # these two, of the head and the embedding too
    python ptq.py --ckpt=out/x --schemes=gptq4 --save=out/x/gptq4.safetensors     # really packed; sample.py and ptq.py read it
    python ptq.py prune --ckpt=out/x --methods=wanda --amounts=0.5
    python ptq.py sensitivity --ckpt=out/x --scheme=bin         # one block, one kind of projection at a time
    python ptq.py choose --ckpt=out/x --bits=16.5               # which blocks to train as binary, as a config of train_gpt.py

--ckpt is a run of train_gpt.py or train_bitnet.py, on its own validation data; or a language model of transformers (a folder,
or an id like gpt2) with --text=FILE and --calibration=FILE; or a classifier of transformers with --dataset=sst2.

    half          fp16                             int8, int8a8   absmax per row; a8: int8 inputs too
    uniform16 ..  16 even levels, groups of 16 ..  nf4, nf4dq     16 normal quantiles; dq: scales of 8 bits
    fit4          16 fitted levels                 rtn4 .. rtn2   integers with a zero per group, to the nearest
    awq4 .. awq2  the same, inputs scaled          gptq4 .. gptq2 the same, each column making up for those before
    tern, bin     mean|w| times -1, 0, 1 or -1, 1: what needs training   bnb8, bnb_nf4, bnb_nf4dq   bitsandbytes', if installed
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
import sample
from measure.turns import median_ms, resident_bytes, show
from pretrained import calibrate, replace, subjects
from pretrained.formats import GroupLinear
from report import plot_ptq

mode = 'compare'               # compare | prune | sensitivity | choose; also without --mode=, as the first word
ckpt = 'out/gpt'               # a run's folder or one of its files | a folder or id of transformers
out = ''                       # folder for tables and pictures; '': the run's
dataset = ''                   # '': what the model was trained on | for a classifier: labelled texts, e.g. sst2
text = ''                      # a language model of transformers: text file to evaluate it on
calibration = ''               # ... and one to look at its inputs with
eval_iters = 0                 # batches to evaluate on; 0: those of the training, or all of the text
batch_size = 0                 # windows in one; 0: as in the training
block_size = 0                 # tokens in one; 0: as in the training
# quantization
schemes = ''                   # names from the head of this file, separated by commas; '': all
skip = 'head,embd'             # layers to leave as they are: head, embd or words of names; '': none
group = 128                    # weights of a row that share a scale in rtn, awq, gptq, tern and bin; 0: the whole row
windows = 128                  # calibration windows of block_size tokens, or texts
act_order = True               # gptq: columns with large inputs first
clip = True                    # gptq: clipping, ranges by the error of the output
damp = 0.01                    # gptq: added to the diagonal of H, times its mean
save = ''                      # with one scheme or one pruning: where to write the packed model
time_rounds = 5                # passes that are timed, in turns with the model as it was; 0: none
# prune
methods = 'magnitude,global,2:4,wanda,wanda2:4'     # of these, what to prune by
amounts = (0.25, 0.5, 0.75)    # share of the weights that becomes 0, 1.0: all; 2:4 is one half
retrain_iters = 200            # updates with the zeros kept
retrain_lr = 1e-5              # AdamW
# sensitivity and choose
scheme = 'bin'                 # what a block or kind of projection becomes
bits = 0.0                     # choose: bits per weight that the blocks may take on average, a full-precision one 32
seed = 1337                    # calibration windows, order of samples
device = ''                    # '': cuda where there is one, else cpu
_MODES = ('compare', 'prune', 'sensitivity', 'choose')
_defaults = dict(globals())
_words = [f'--mode={word}' if word.isalpha() else word for word in sys.argv[1:]]
config = configurator.override(globals(), _words)   # file.py ... --key=value, later wins
_changed = {key for key in config if config[key] != _defaults[key]}

# name: (method, kind or levels, options)
SCHEMES = {'half': ('', 'half', {}), 'int8': ('', 'int8', {}), 'int8a8': ('', 'int8', {'activations': 'int8'}),
           **{f'uniform{g}': ('', 'int4', {'group': g}) for g in (16, 32, 64, 128)},
           'nf4': ('', 'nf4', {}), 'nf4dq': ('', 'nf4', {'scales': '8bit'}), 'fit4': ('', 'fit4', {}),
           **{f'{method}{n}': (method, f'int{n}', {}) for n in (4, 3, 2) for method in ('rtn', 'awq', 'gptq')},
           'tern': ('rtn', 'tern', {}), 'bin': ('rtn', 'bin', {}),
           'bnb8': ('bnb', 'int8', {}), 'bnb_nf4': ('bnb', 'nf4', {}), 'bnb_nf4dq': ('bnb', 'nf4dq', {})}
# method of a scheme: the options that it looks at; with a group it leaves grouped codes behind
METHODS = {'': (), 'bnb': (), 'rtn': ('group',), 'awq': ('group', 'windows'),
           'gptq': ('group', 'windows', 'act_order', 'clip', 'damp')}
# a method that looks at inputs -> (codes, scale, zero) of a weight, and a scale of the inputs where it has one
CALIBRATED = {'awq': lambda weight, moments, levels: calibrate.awq(weight, moments, levels, group),
              'gptq': lambda weight, moments, levels: calibrate.gptq(weight, moments, levels, group, act_order=act_order,
                                                                     clip=clip, damp=damp)}
OPTIONS = ('skip', *dict.fromkeys(key for keys in METHODS.values() for key in keys))
PRUNING = ('magnitude', 'global', '2:4', 'wanda', 'wanda2:4')


# ---------------------------------------------------------------------------------------------------------------------
# quantization


def rule(name):
    """(kind, options) of the layers that scheme `name` leaves behind."""
    method, kind, options = SCHEMES[name]
    return ('group', {'levels': kind, 'group': group}) if 'group' in METHODS[method] else (kind, options)


def quantize(subject, model, name, alone=False):
    """Replace layers of `model` by scheme `name`, one after the other, in place. Returns ({name: entry} for restore(), bits per
    replaced weight with all that comes with the codes, biases aside). Raises ValueError, naming the layer.

    alone: calibrated layers get the inputs of a model in which nothing else is quantized."""
    method, levels, _ = SCHEMES[name]
    kind, options = rule(name)
    wanted, described, counts, later = replace.layers_of(model, skip), {}, [0, 0], {}

    def put(n, new=None, options=options):
        weights = model.get_submodule(n).weight.numel()
        described.update(replace.replace(model, n, kind, options, new))
        held = model.get_submodule(n).state_dict()
        counts[0] += sum(t.nbytes for key, t in held.items() if key != 'bias' and isinstance(t, torch.Tensor))
        counts[1] += weights

    def visit(n, moments):
        layer = model.get_submodule(n)
        weight = layer.weight.detach()
        try:
            found = CALIBRATED[method](weight, moments, levels)
        except ValueError as e:
            raise ValueError(f'{n}: {e}') from None
        later[n] = GroupLinear.from_codes(layer, levels, group, *found), options | {'scaled_input': len(found) > 3}
        if not alone:
            put(n, *later.pop(n))

    if method in CALIBRATED:
        linears = [n for n, m in wanted.items() if isinstance(m, nn.Linear)]
        calibrate.for_each_layer(model, subject.calibration(windows, seed), subject.run, linears, visit)
        for n, found in later.items():
            put(n, *found)
    for n, module in wanted.items():
        if method == 'bnb' and isinstance(module, nn.Linear) and not replace.tied_to(model, n):
            put(n, bitsandbytes_layer(module, levels))
        elif method != 'bnb' and n not in described:                    # embeddings have no inputs to look at
            put(n)
    if not counts[1]:
        raise ValueError(f'{name} has no layer to replace; bitsandbytes has linear layers only')
    return described, counts[0] * 8 / counts[1]


def bitsandbytes_layer(linear, kind):
    """Their int8 layer, columns with outliers above 6.0 apart, or their nf4 layer, with the weights of `linear`."""
    import bitsandbytes as bnb
    logging.getLogger('bitsandbytes').setLevel(logging.ERROR)           # it says at each pass that it computes in fp16
    rows, columns, bias = linear.out_features, linear.in_features, linear.bias is not None
    new = bnb.nn.Linear8bitLt(columns, rows, bias, has_fp16_weights=False, threshold=6.0) if kind == 'int8' else \
        bnb.nn.Linear4bit(columns, rows, bias, quant_type='nf4', compute_dtype=torch.float32,
                          compress_statistics=kind == 'nf4dq')
    new.load_state_dict(linear.state_dict())
    return new.to(linear.weight.device)


def check(subject, names):
    """Raises ValueError for what is wrong with the request, before anything is computed."""
    if twice := [n for n in names if names.count(n) > 1]:
        raise ValueError(f'{twice[0]} is asked for twice')
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
                    raise ValueError(f'scheme {name} does not fit {n}: {e}') from None
    refuse_unused(names, ', '.join(names))
    if any(SCHEMES[name][0] in CALIBRATED for name in names):
        subject.calibration(1, seed)


def refuse_unused(names, what):
    """Raises ValueError for an option that was given and none of the schemes `names` looks at."""
    for key in OPTIONS:
        if key in _changed and not any(key == 'skip' or key in METHODS[SCHEMES[name][0]] for name in names):
            raise ValueError(f'{key} has no use for {what}; leave --{key} out')


def file_bytes(subject, model, described):
    """Size of the packed model as a file, with all that it takes to load it; bitsandbytes' tensors are kept as they are."""
    with tempfile.TemporaryDirectory() as folder:
        return common.save_packed(model, os.path.join(folder, 'packed.safetensors'), subject.meta | {'quantized': described})


def share_of(described, model):
    """Share of the model's weights that are in the layers of `described`."""
    return sum(model.get_submodule(n).weight.numel() for n in described) / sum(p.numel() for p in model.parameters())


def timings(subject, model, base):
    """{'ms_1', 'ms_many', 'ratio_1', 'ratio_many'}: milliseconds a token, one alone and a whole context at once; ratios to
    `base`, None for the model as it was. In each of time_rounds rounds both work for a fifth of a second, in turns, first one
    and then the other first; the medians over rounds. {} with time_rounds=0."""
    row, nets = {}, (model,) if base is None else (model, base)
    for key, n in (('1', 1), ('many', 10 ** 6)) if time_rounds else ():
        ids, found = subject.ids(n), [[] for _ in nets]
        with torch.no_grad():
            for i in range(time_rounds):
                for k in sorted(range(len(nets)), reverse=i % 2):
                    ms = median_ms(lambda net=nets[k], ids=ids: subject.passed(net, ids), 0.2, ids.device.type == 'cuda')
                    found[k].append(ms / ids.shape[1])
        row[f'ms_{key}'] = statistics.median(found[0])
        row[f'ratio_{key}'] = 1.0 if base is None else statistics.median(m / b for m, b in zip(*found, strict=True))
    return row


COLUMNS = [('scheme', 'scheme', ''), ('bits', 'bits/weight', '.3f'), ('loss', 'val loss', '.4f'),
           ('perplexity', 'perplexity', '.3f'), ('delta', 'difference', '+.4f'), ('accuracy', 'accuracy', '.4f'),
           ('ms_1', 'ms, 1 token', '.2f'), ('ratio_1', 'x fp', '.2f'), ('ms_many', 'ms/token, many', '.3f'),
           ('ratio_many', 'x fp', '.2f'), ('file_bytes', 'bytes', ',d'), ('compression', 'smaller', '.2f')]


def evaluated(subject, model, name, first, described, **row):
    """A row of the table; first: that of the model as it was, or None; described: by replace()."""
    loss = subject.loss(model)
    row |= {'scheme': name, 'loss': loss, 'perplexity': math.exp(min(loss, 700)) if subject.causal else None,
            'accuracy': subject.accuracy, 'delta': first and loss - first['loss'],
            'file_bytes': file_bytes(subject, model, described)}
    row['compression'] = first and first['file_bytes'] / row['file_bytes']
    return row | {'ckpt': subject.name, 'group': group, 'skip': skip, 'windows': windows, 'act_order': act_order, 'clip': clip,
                  'seed': seed, 'torch': torch.__version__, 'device': common.device_name(subject.dev)}


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
    if done:                                        # its row goes not in the place of the table that it was chosen from
        name = f'{os.path.splitext(os.path.basename(subject.name))[0]}_ptq' if os.path.isfile(subject.name) else 'ptq'
        show(rows, columns(rows), None)
        print(f'wrote {write_rows(folder, name, rows)}')
        return
    for name in names:
        new, start = copy.deepcopy(model), time.perf_counter()
        described, bits_each = quantize(subject, new, name)
        rows.append(evaluated(subject, new, name, rows[0], described, bits=bits_each, quantize_s=time.perf_counter() - start,
                              share=share_of(described, model), **timings(subject, new, model)))
        print(f'{name}: val loss {rows[-1]["loss"]:.4f}', flush=True)
        path = write_rows(folder, 'ptq', rows)
    show(rows, columns(rows), None)
    print(f'bits/weight are of {rows[-1]["share"]:.1%} of the weights, the rest stays as it is (skip={skip!r}); smaller: '
          'than the first row')
    plot_ptq.sizes(os.path.join(folder, 'ptq.png'), rows, f'{subject.name}: {subject.unit}')
    print(f'wrote {path} and {folder}/ptq.png')


def save_quantized(subject, folder, start, before):
    """--save: quantize in place, layer by layer, so that one full-precision model is all that is ever held. start, before:
    time and resident bytes before the model was loaded."""
    names = chosen(schemes, [], [n for n in SCHEMES if SCHEMES[n][0] != 'bnb'])
    if len(names) != 1:
        raise ValueError(f'--save keeps one model, {len(names)} schemes were asked for; type e.g. --schemes=gptq4')
    if subject.about['quantized']:
        raise ValueError(f'{subject.name} is quantized already')
    name, = names
    check(subject, names)
    described, bits_each = quantize(subject, subject.model, name)
    size = subject.save(save, described)
    row = {'scheme': name, 'skip': skip, 'bits': bits_each, 'seconds': time.perf_counter() - start, 'size': size,
           'peak': common.peak_memory_bytes(), 'above': common.peak_memory_bytes() - before, 'windows': windows,
           'block': subject.block, 'threads': torch.get_num_threads(), 'device': common.device_name(subject.dev),
           'torch': torch.__version__}
    print(f'{name}: {bits_each:.3f} bits per weight of {len(described)} layers, {row["seconds"]:.1f} s, most memory '
          f'{row["peak"]:,} bytes, {row["above"]:,} above the start; wrote {save}: {size:,} bytes')
    row['loss'] = subject.loss(subject.model)
    write_rows(folder, 'save', [row])
    print(f'val loss {row["loss"]:.4f}')


def chosen(words, default, known):
    """The names in `words`, or for '' the default; a ValueError for one that is not known, or none of them."""
    names = [w.strip() for w in words.split(',')] if words else list(default)
    if unknown := [n for n in names if n not in known]:
        raise ValueError(f'{unknown[0]!r} is none of {", ".join(known)}')
    return names


_written = set()


def write_rows(folder, name, rows):
    """rows as JSON lines in folder/name.jsonl, whole or not at all; what an earlier call of ptq.py left there is kept as
    name.prev.jsonl. Returns the path."""
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
    """Mask of all but the k smallest in the last dimension, exactly, ties by position."""
    mask = torch.ones_like(scores, dtype=torch.bool)
    return mask.scatter_(-1, scores.argsort(dim=-1, stable=True)[..., :k], False)


def prune_(subject, model, method, amount):
    """Set weights of the linear layers to 0 in place; returns {name: mask of those that stay}.

    magnitude: the smallest |w| of each matrix; global: of all of them; wanda: the smallest |w| |x_j| of each row, with the
    norm of the j-th input over the calibration windows (arXiv 2306.11695); 2:4: of each four weights in a row two."""
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
    """retrain_iters updates of all weights with AdamW; those that are 0 stay 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=retrain_lr)
    torch.manual_seed(seed)                         # dropout: the same updates for all
    model.train()
    for step in range(retrain_iters):
        loss = subject.training_loss(model, seed, step)
        if not torch.isfinite(loss):
            raise ValueError(f'loss {loss.item()} at step {step} of the retraining; try a lower --retrain_lr')
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
        raise ValueError(f'methods={methods!r}, amounts={amounts}: give methods, and shares from 0 to 1, where 1.0 is all')
    if save and len(jobs) != 1:
        raise ValueError(f'--save keeps one model, not {len(jobs)}; type one of --methods and one of --amounts')
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
            raise ValueError(f'2:4 does not fit {n}: rows of {module.in_features} weights are no fours')
    rows = []
    for method, amount in [('none', 0.0), *jobs]:   # the model as it was gets the same updates
        start = time.perf_counter()
        model = copy.deepcopy(subject.model)
        masks = prune_(subject, model, method, amount) if method != 'none' else {}
        pruned_loss = subject.loss(model)
        retrain(subject, model, masks)
        weights = [model.get_submodule(n).weight for n in masks]
        zeros = sum((w == 0).sum().item() for w in weights) / max(1, sum(w.numel() for w in weights))
        described = {}
        for n in masks:                             # a bit for each weight, and those that are not 0
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
    plot_ptq.shares(os.path.join(folder, 'prune.png'), rows, f'{subject.name}: {subject.unit}, {retrain_iters} updates')
    print(f'wrote {folder}/prune.jsonl and {folder}/prune.png')


# ---------------------------------------------------------------------------------------------------------------------
# sensitivity


def quantized_copy(subject):
    """(a copy of the model whose block layers are all quantized by `scheme`, its bits per weight, {block name: {kind of
    projection: layer name}})."""
    if scheme not in SCHEMES:
        raise ValueError(f'scheme={scheme!r} is none of {", ".join(SCHEMES)}')
    check(subject, [scheme])
    blocks, model = {b: {} for row in calibrate.find_blocks(subject.model) for b, _ in row}, subject.model
    for n, module in replace.layers_of(model, skip).items():
        inside = next((b for b in blocks if n.startswith(f'{b}.')), None)
        if inside and isinstance(module, nn.Linear):
            blocks[inside][n.removeprefix(f'{inside}.')] = n
    if not any(blocks.values()):
        raise ValueError(f'{subject.name} has no blocks with linear layers to take apart')
    other = copy.deepcopy(model)
    _, bits_each = quantize(subject, other, scheme, alone=True)
    return other, bits_each, blocks


def loss_with(subject, other, names, **where):
    """Loss of the model with the layers `names` of `other` in the place of its own."""
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
    found = {(r['block'], r['kind']): r['delta'] for r in rows}
    table = [{'block': b, **{k: found.get((b, k)) for k in [*kinds, 'all']}} for b in [*blocks, 'all']]
    print(f'{subject.name}: {base:.4f} {subject.unit}; its rise with these layers alone as {scheme}, {bits_each:.3f} bits')
    show(table, [('block', 'block', ''), *((k, k, '+.4f') for k in [*kinds, 'all'])], None)
    plot_ptq.heat(os.path.join(folder, 'sensitivity.png'), list(blocks), kinds, found,
                  f'{subject.name}: {scheme}, {subject.unit}')
    print(f'wrote {folder}/sensitivity.jsonl and {folder}/sensitivity.png')


# scheme: kind of a layer of train_gpt.py
TRAINABLE = {kind: kind for kind in layers.KINDS if kind in SCHEMES} | {'uniform16': 'int4'}


def choose(subject, folder):
    """Take blocks one by one, each time the one that costs least beside those taken, until the rest fits the budget. What they
    cost is measured on windows of the training split: what is chosen is judged on the other."""
    if scheme not in TRAINABLE:
        raise ValueError(f'scheme={scheme!r}: train_gpt.py trains {", ".join(TRAINABLE)} of these; type --scheme=bin')
    if subject.meta.get('trainer') != 'train_gpt' or any(isinstance(m, layers.LowBit) for m in subject.model.modules()):
        raise ValueError(f'{subject.name} is no full-precision model of train_gpt.py, for which this writes a config')
    kind, c = TRAINABLE[scheme], subject.model.config
    other, _, blocks = quantized_copy(subject)
    sizes = [subject.model.get_submodule(n).weight.shape for n in next(iter(blocks.values())).values()]
    weights = sum(math.prod(s) for s in sizes)
    low = sum(layers.linear(kind, s[1], s[0], False).packed_bytes() for s in sizes) * 8 / weights
    of = lambda k: (k * low + (len(blocks) - k) * 32) / len(blocks)
    need = next((k for k in range(len(blocks) + 1) if of(k) <= bits), None)
    if not need:
        raise ValueError(f'bits={bits:g}: with all {len(blocks)} blocks as {kind} it is {low:.3f} bits, with none 32; type '
                         f'--bits={math.ceil(100 * of(len(blocks) // 2)) / 100:g} for half of them')
    taken, rows, base = [], [], subject.loss(subject.model, on_training=True)
    print(f'{subject.name}: {base:.4f} {subject.unit} on windows of its training split, by which the blocks are chosen')
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
    said = (f'ptq.py choose: blocks {numbers} of {c.n_layer} of {subject.name} cost least as {scheme}, {of(need):.2f} bits a '
            'weight')
    base_config = os.path.join(os.path.dirname(subject.name), 'config.py')
    command = f'python train_gpt.py {base_config} {path} --out_dir=out/chosen'
    configurator.save({'n_binary': 0, 'binary_blocks': numbers, 'qkv_proj': kind, 'c_proj': kind, 'mlp_proj': kind}, path,
                      f'{said}\n{command}')
    print(f'{said}\nwith --init_from={subject.name} training goes on from this model\n'
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
        path = sample.find_checkpoint(ckpt)
        subject = subjects.Trained(path, *sample.load(path), dev, config)
    else:
        subject = subjects.load(ckpt, dev, config)
    for key in sorted(_changed & subject.unused):
        configurator.fail(f'{key} has no use for {subject.name}; leave --{key} out')
    replace.unfuse(subject.model).requires_grad_(mode == 'prune')
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
