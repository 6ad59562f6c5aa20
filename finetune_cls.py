"""
Fine-tune a Hugging Face encoder or decoder to classify texts: all weights, adapters, or Adam in a few dimensions.

    python finetune_cls.py config/sst2_rsvd16.py                       # DistilBERT on SST-2; first python data/sst2/prepare.py
    python finetune_cls.py config/cls_offline.py                       # nothing to download: a small model, two minutes
    torchrun --nproc_per_node=8 finetune_cls.py config/xnli_distilbert.py
    python finetune_cls.py --compare=out/a,out/b                       # is b better than a? reads only their predictions

All methods share one loop and the same batches, so their figures can be compared: csv and yaml files in out_dir. Ctrl-C saves
and stops the run; --resume=auto continues it.
"""
import contextlib
import copy
import importlib.util
import math
import os
import sys
import time
import zlib

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import common
import configurator
import layers
import optim
from pretrained import adapters, hf
from readers import texts, tokens
from report import tables

# run
out_dir = 'out/cls'            # folder for config.py, log.jsonl, last.pt, the csv and yaml files and the model folder
seed = 42                      # sets the new head, adapters, the order of samples, dropout and rsvd's random sketches
init_from = 'pretrained'       # pretrained: weights of `model` | scratch: random weights
resume = ''                    # auto: continue the run in out_dir, or start if there is none | a checkpoint to continue from
overwrite = False              # start over in an out_dir that holds a run; deletes its checkpoints and log
eval_only = False              # only evaluate the run in out_dir, or `model` if there is no run
predict = ''                   # only classify the texts of this table, which needs no labels: writes predictions.csv
ranks = ()                     # e.g. (4, 8, 16, 64, 128): one run per rank, one after the other, in out_dir/r4, ...
folds = 0                      # cross-validation: parts of the training set; one run per part, in out_dir/fold0, ...
fold = -1                      # the part that this run evaluates on; -1: `folds` starts a run for each part
compare = ''                   # out/a,out/b: only compare the saved predictions of two or more runs by paired statistics
# data
task = 'sst2'                  # sst2 | imdb | xnli | pycls, each made by data/<task>/prepare.py | csv: your own files
dataset = ''                   # folder under data/, or a path; '': the name of the task
train_file = ''                # csv: training file, .csv, .tsv, .jsonl (each also .gz) or .parquet, with a header
eval_file = ''                 # csv: evaluation file, with the same columns
text_columns = ('sentence',)   # csv: one or two columns with the texts
label_column = 'label'         # csv: column with the labels
eval_split = 'val'             # split to evaluate on, or several: val,held; xnli: val or test, of each of `languages`
languages = ('en',)            # xnli: languages to evaluate at the end; training is in English
train_samples = 0              # number of training texts, drawn at random; 0: all
max_len = 128                  # tokens per text or pair; longer ones are cut
pad_to_max = False             # True: pad each batch to max_len, as the reference does; False: to its longest text
batch_size = 32                # texts per optimizer step, over all devices and micro-steps
micro_batch_size = 0           # texts per device at a time; 0: its whole share. Lower: less memory, more micro-steps
# model
model = ''                     # Hub id, folder, or folder of LoRA adapters; '': DistilBERT, for xnli the multilingual one
n_layer = 4                    # size of the DistilBERT that init_from='scratch' makes if `model` is ''
n_head = 4
n_embd = 128
dropout = 0.1                  # dropout of that DistilBERT
resize = False                 # add rows to the embedding of `model` if its tokenizer has more tokens than rows
vocab_size = 8192              # size of its WordPiece vocabulary, trained on the training texts
gradient_checkpointing = False   # recompute activations in the backward pass: less memory, slower
# method
method = 'full'                # full | lora | qlora | lora_topr | rsvd | rsvd_svt | weight_reduction | weight_reduction_svt
rank = 16                      # rank of the adapters, of rsvd, of the factors of weight_reduction
targets = ()                   # adapters, weight_reduction: last part of the layers' names; (): queries, keys and values
lora_alpha = 0.0               # the adapters' scale is lora_alpha / rank; 0: lora_alpha = rank, a scale of 1
lora_dropout = 0.1             # dropout before the adapters
quant8 = False                 # lora, lora_topr: store the frozen layers in int8
top_fraction = 0.1             # lora_topr: share of each gradient to keep, the largest entries
rank_fraction = 0.0            # rsvd, rsvd_svt: rank = rank_fraction * min(rows, columns); 0: `rank`
energy = 0.0                   # rsvd_svt: smallest rank that keeps this share of the gradient; 0: `rank`, 4 to 128
interval = 200                 # rsvd: steps between two updates of the basis
scale = 0.0                    # rsvd: multiplies the update; 0: so that it is as large as that of `full` at the same rate
side = 'right'                 # rsvd: side of the basis: left (the reference) | right (saves the fewest activations) | short
rotate = True                  # rsvd: rotate the moments into each new basis
column_v = False               # rsvd: one second moment per column of a projected gradient; side=right: per neuron or word
projected = True               # rsvd: the backward pass forms no full gradients
stagger = 4                    # rsvd: number of layers that update their basis in the same step; 0: all
adam_for = ('head',)           # rsvd: parameters that use ordinary AdamW: head, embeddings
state_dtype = 'fp32'           # rsvd: precision of the moments: fp32 | bf16 | 8bit
svt_interval = 50              # weight_reduction_svt: steps between truncations to half of the rank
# optimizer
epochs = 3.0                   # passes over the training texts in total, including those before a resume
max_iters = 0                  # optimizer steps in total; 0: `epochs` decides
learning_rate = 0.0            # peak, at the end of warm-up; 0: 2e-5 for full and rsvd, 2e-4 for the other methods
min_lr = 0.0                   # learning rate at the last step
schedule = 'linear'            # linear | cosine | constant
warmup_iters = 0               # steps of linear warm-up
weight_decay = 0.01            # on matrices and embeddings, not on gains and biases
grad_clip = 1.0                # largest global gradient norm; 0: no clipping
# evaluation, saving and logging
eval_interval = 0              # steps between extra evaluations; 0: none. There is always one after each epoch
eval_batch_size = 64           # texts per device at a time in evaluation
keep_best = False              # report and keep the best evaluation; optimistic, because the same texts select and judge it
log_interval = 10              # steps between log records
save_interval = 500            # steps between saves of last.pt
wandb_log = False              # also log to Weights & Biases; install wandb and log in first
wandb_project = 'nanobit'
wandb_run_name = ''            # '': the name of out_dir
# system
device = ''                    # '': cuda if available, else cpu
dtype = 'float32'              # autocast to float32 | bfloat16 | float16 (with loss scaling); frozen weights are stored in it
compile = False                # torch.compile; set pad_to_max too, or it recompiles for each text length
profile = False                # profile steps 5 to 7 with torch.profiler; prints a table and writes trace.json to out_dir
config = configurator.override(globals())   # file.py ... --key=value, later wins
no_training = eval_only or bool(predict)

METHODS = ('full', 'lora', 'qlora', 'lora_topr', 'rsvd', 'rsvd_svt', 'weight_reduction', 'weight_reduction_svt')
ADAPTERS = ('lora', 'qlora', 'lora_topr')
WHOLE = ('full', 'rsvd', 'rsvd_svt')            # they train all weights
# Names of the query, key and value projections in transformers.
ATTENTION = ('q_lin', 'k_lin', 'v_lin', 'q_proj', 'k_proj', 'v_proj', 'query', 'key', 'value', 'query_key_value', 'qkv_proj',
             'c_attn', 'Wqkv', 'query_proj', 'key_proj', 'value_proj', 'in_proj', 'q', 'k', 'v')


# ---------------------------------------------------------------------------------------------------------------------
# methods


def adapt(net, head):
    """Apply the method to a model: replace layers and choose the trained parameters. Raises ValueError if it does not fit."""
    if method in WHOLE:
        return
    linears = [n for n, m in net.named_modules() if layers.is_linear(m) and f'{n}.weight' not in head]
    chosen = [n for n in linears if n.rpartition('.')[2] in (targets or ATTENTION)]
    if not chosen:
        found = ','.join(sorted({n.rpartition('.')[2] for n in linears})) or '(it has none)'
        raise ValueError(f'no linear layer of this model is named {" or ".join(targets or ATTENTION)}; type --targets= and '
                         f'some of {found}')
    if method.startswith('weight_reduction'):
        rules = {n: ('lowrank', dict(rank=min(rank, *net.get_submodule(n).weight.shape))) for n in chosen}
    else:
        base = 'nf4' if method == 'qlora' else 'int8' if quant8 else ''
        lora = dict(rank=rank, alpha=lora_alpha or rank, dropout=lora_dropout) | ({'base': base} if base else {})
        rules = {n: ('lora', lora) for n in chosen} | {n: base for n in linears if base and n not in chosen}
    net.requires_grad_(False)
    left = rules.keys() - layers.convert(net, rules, verbose=False, packed=True)
    if left:
        raise ValueError(f'method={method!r} cannot be put into {sorted(left)[0]} of this model; type another --method')
    for m in net.modules():
        if isinstance(m, layers.LoRALinear | layers.LowRankLinear):
            for n, p in m.named_parameters(recurse=False):
                p.requires_grad_(n != 'bias')
    for p in hf.head_parameters(net).values():
        p.requires_grad_(True)


def make_optimizer(net, head):
    """The method's optimizer for the trained parameters. Weight decay applies to matrices, not to vectors."""
    trained = {n: p for n, p in net.named_parameters() if p.requires_grad}
    matrices = {n: p for n, p in trained.items() if p.dim() > 1}
    groups = [{'params': list(matrices.values()), 'weight_decay': weight_decay},
              {'params': [p for n, p in trained.items() if n not in matrices], 'weight_decay': 0.0}]
    if method == 'lora_topr':
        return optim.TopRAdamW(groups, lr=1.0, fraction=top_fraction)
    if not method.startswith('rsvd'):
        return torch.optim.AdamW(groups, lr=1.0, fused=True)
    low = dict(rank=rank, rank_fraction=rank_fraction)
    if method == 'rsvd_svt' and energy:
        low = dict(energy=energy, rank_min=min(4, rank), rank_max=rank)
    elif method == 'rsvd_svt':                      # as in the reference: no threshold; a wider sketch is cut to the rank
        low = dict(rank=min(max(rank, 4), 128), rank_fraction=rank_fraction, oversample=rank + 4)
    tables = {n for n, p in net.named_parameters() if any(p is m.weight for m in net.modules() if isinstance(m, nn.Embedding))}
    plain = {n for n in matrices if n in head and 'head' in adam_for or n in tables and 'embeddings' in adam_for}
    groups = [{'params': [p for n, p in matrices.items() if n not in plain], 'side': side, **low},
              {'params': [p for n, p in matrices.items() if n in plain], 'rank': 0}, groups[1]]
    return optim.RSVDAdam([g for g in groups if g['params']], lr=1.0, weight_decay=weight_decay, interval=interval,
                          scale=scale, rotate=rotate, column_v=column_v, stagger=stagger, state_dtype=state_dtype, seed=seed)


def kept_state(net):
    """State dict that a checkpoint stores: all tensors except frozen weights that come from `model`."""
    frozen = set() if init_from == 'scratch' else {n for n, p in net.named_parameters() if not p.requires_grad}
    frozen -= {f'{n}.weight' for n, m in net.named_modules() if isinstance(m, tuple(optim.PROJECTED.values()))}
    if method in ADAPTERS and init_from != 'scratch':
        frozen |= {n for n, _ in net.named_buffers()}               # codes and scales of packed layers
    return {n: t for n, t in net.state_dict().items() if n not in frozen}


# ---------------------------------------------------------------------------------------------------------------------
# data and figures


def read_data(names=None):
    """(training texts, their label ids, {set: (texts, label names, row numbers)} to evaluate on, label names). A set is one of
    several languages or splits, or ''. names: the label names of a trained model, or None. With `predict` there are no label
    names to evaluate on."""
    read = lambda path: texts.read_table(path, text_columns, label_column)
    if predict and not (names or model):
        raise ValueError(f'{out_dir} has no run; type its --out_dir=..., or --model=FOLDER of a trained classifier')
    if predict and (model or init_from != 'scratch'):               # a model from scratch trains its tokenizer on its texts
        sentences, names = texts.read_table(predict, text_columns)[0], names or hf.labels_of(model)
        unknown = names[:1] * len(sentences)
        return sentences, [0] * len(sentences), {'': (sentences, unknown, range(len(sentences)))}, names
    if task == 'csv':
        path = train_file or eval_file              # also to evaluate: a model from scratch trains its tokenizer on it
        sentences, labels = read(path)
        known = {label.lower() for label in labels}                    # a file to evaluate on may have one class of several
        trained = hf.labels_of(model) if no_training and model and not names else []
        absent = [name for name in trained if name.lower() not in known]
        if not no_training:
            texts.refuse_row_numbers(labels, label_column)
        names = names or texts.label_names(labels + absent * (known <= {name.lower() for name in trained}))
        ids = texts.label_ids(labels, names, path)
        found = {'': read(eval_file)} if not (folds or predict) else {}
        for _, labels in found.values():            # reports an unknown label now, not after training
            texts.label_ids(labels, names, eval_file)
    else:
        folder = tokens.dataset_dir(dataset or task)
        sentences, ids, names = texts.load(folder, 'train')
        splits = {key: f'{eval_split}-{key}' for key in languages} if task == 'xnli' else {
            split * (',' in eval_split): split for split in eval_split.split(',')}
        found = {key: texts.load(folder, split)[:2] for key, split in splits.items() if not folds}
        found = {key: (part, [names[i] for i in labels]) for key, (part, labels) in found.items()}
    rows = np.random.default_rng([seed, 1]).permutation(len(sentences))
    if folds > len(sentences):
        raise ValueError(f'folds={folds} of {len(sentences)} texts; type a lower --folds')
    if folds:
        held, rows = rows[fold::folds], np.delete(rows, np.s_[fold::folds])
        found = {'': ([sentences[i] for i in held], [names[ids[i]] for i in held])}
    if predict:
        found = {'': (part := texts.read_table(predict, text_columns)[0], names[:1] * len(part))}
    sets = {key: (*both, held if folds and not predict else range(len(both[0]))) for key, both in found.items()}
    rows = rows[:train_samples or None]
    return [sentences[i] for i in rows], [ids[i] for i in rows], sets, names


def base_name():
    return os.path.basename((model or ('distilbert-scratch' if init_from == 'scratch' else default_model())).rstrip('/'))


def default_model():
    return 'distilbert-base-multilingual-cased' if task == 'xnli' else 'distilbert-base-uncased'


# ---------------------------------------------------------------------------------------------------------------------


def main():
    if compare:
        return tables.compare_runs(compare.split(','))
    if predict and (ranks or folds):
        configurator.fail('predict is for one run; type --out_dir=... of one of them, --ranks= and --folds=0')
    if ranks or (folds and fold < 0):
        return tables.sweep(config, __file__)
    # ------------------------------------------------------------------------------------------------------- set-up
    rank_here, local_rank, world, dev = common.setup_processes(device)
    stopped = common.stop_flag()
    say = print if rank_here == 0 else (lambda *a, **k: None)
    fail = lambda why: configurator.fail(why, rank0_only=True)
    missing = [n for n in ('transformers', 'sklearn', 'scipy', 'yaml') if importlib.util.find_spec(n) is None]
    dtypes = {'float32': None, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
    common.check_config(
        config, {'schedule': ('linear', 'cosine', 'constant'), 'dtype': dtypes, 'method': METHODS, 'side': optim.SIDES},
        dict.fromkeys(('batch_size', 'eval_batch_size', 'max_len', 'log_interval', 'save_interval', 'rank', 'interval',
                       'svt_interval', 'n_layer', 'n_head', 'n_embd', 'vocab_size'), 1)
        | dict.fromkeys(('learning_rate', 'min_lr', 'weight_decay', 'grad_clip', 'warmup_iters', 'micro_batch_size',
                         'max_iters', 'eval_interval', 'train_samples', 'stagger'), 0))
    for wrong, why in (
            (missing, f'{missing} cannot be imported; type: pip install -r requirements.txt'),
            (init_from not in ('pretrained', 'scratch'), f'init_from={init_from!r} is neither pretrained nor scratch; '
             'a model of your own is --model=FOLDER, a checkpoint --resume=auto or --resume=PATH'),
            (quant8 and method not in ('lora', 'lora_topr'), f'quant8 freezes the base; type --method=lora, not {method!r}'),
            (energy and method != 'rsvd_svt', f'energy={energy} is for --method=rsvd_svt only'),
            (task == 'csv' and not (predict or (train_file or no_training) and (eval_file or folds)), 'task=csv needs '
             '--train_file=... and --eval_file=... (or --folds=5)'),
            (task == 'csv' and not label_column and not predict, 'label_column is empty; type --label_column= and a name'),
            (not {'head', 'embeddings'}.issuperset(adam_for), f'adam_for={adam_for} may contain only head and embeddings'),
            (folds and not 0 <= fold < folds, f'fold={fold} must be 0 or more and below folds={folds}'),
            (task == 'xnli' and not languages, 'languages=() leaves nothing to evaluate; type --languages=en'),
            (min(epochs, max_iters or 1) <= 0, f'epochs={epochs}, max_iters={max_iters}: nothing to train'),
            (n_embd % max(1, n_head), f'n_embd={n_embd} is no multiple of n_head={n_head}'),
            (not 0 < top_fraction <= 1, f'top_fraction={top_fraction} must be above 0 and at most 1')):
        if wrong:
            fail(why)
    amp_dtype = dtypes[dtype]
    amp = torch.autocast(dev.type, amp_dtype, enabled=amp_dtype is not None)
    torch.set_float32_matmul_precision('high')
    micro, accumulation = common.split_batch(batch_size, micro_batch_size, world)
    last_path, best_path, resume_path, elsewhere = common.find_run(
        out_dir, resume or ('auto' if no_training else ''), overwrite)

    # --------------------------------------------------------------------------------------------------------- data
    try:
        known = no_training and resume_path and common.read_last_checkpoint(resume_path, 'finetune_cls')['described']
        sentences, ids, eval_sets, names = read_data(known and known['names_of_data'])
    except ValueError as e:
        configurator.fail(str(e))

    # -------------------------------------------------------------------------------------------------------- model
    torch.manual_seed(seed)                                            # same head and adapters on every rank
    try:
        if init_from == 'scratch' and not model:
            net, tokenizer = hf.small(sentences, names, n_layer=n_layer, n_head=n_head, n_embd=n_embd, dropout=dropout,
                                      vocab_size=vocab_size, max_len=max_len)
            fresh, order = True, names
        else:
            frozen = method not in WHOLE
            net, tokenizer, order, fresh = hf.load(model or default_model(), names,
                                                   amp_dtype if frozen and amp_dtype else torch.float32, init_from != 'scratch')
        resized = resize and hf.resize(net, tokenizer)
        hf.check_fits(net, tokenizer, max_len, pairs=len(sentences[0]) > 1)
        if method not in WHOLE:
            hf.plain_linears(net)
        ids = [order.index(names[i]) for i in ids]                     # by name: the model may order its labels differently
        names, names_of_data = order, names
        head = hf.head_parameters(net)
        adam_bytes = sum(8 * p.numel() + 4 for p in net.parameters())  # state of torch's AdamW for all weights
        # No other folder holds the weights under these adapters.
        own_base = method in ADAPTERS and (init_from == 'scratch' or resized or adapters.is_adapters(model))
        whole = copy.deepcopy(net) if own_base and not (resume_path or no_training) else None
        adapt(net, head)
        net.to(dev)
        for p in filter(lambda p: p.requires_grad, net.parameters()):
            p.data = p.data.float()
        if gradient_checkpointing:
            net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})
    except (ValueError, OSError) as e:
        configurator.fail(f'{e}')
    if no_training and fresh and not resume_path:
        fail(f'{model or default_model()} has no head for {", ".join(names)} and {out_dir} has no checkpoint; train first')
    samples = hf.encode(tokenizer, sentences, max_len)
    eval_rows = {key: hf.encode(tokenizer, found[0], max_len) for key, found in eval_sets.items()}
    n_params, n_head_params = layers.model_bytes(net)[1] // 4, sum(p.numel() for p in head.values())
    n_trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    peak_rate = learning_rate or (2e-5 if method in WHOLE else 2e-4)
    total_iters = max_iters or math.ceil(epochs * len(samples) / batch_size)
    say(f'{type(net).__name__}: {n_params:,} parameters, {n_trained:,} trained ({n_head_params:,} in the head'
        f'{", new" if fresh else ""}); {len(names)} labels: {", ".join(names[:9])}{" ..." * (len(names) > 9)}')
    say(f'{len(eval_rows[""]):,} texts to classify' if predict else
        f'{len(samples):,} texts to train on, {", ".join(f"{len(r):,} {key}" for key, r in eval_rows.items())} to evaluate; '
        f'{batch_size} a step = {micro} x {accumulation} micro-steps x {world} processes; {total_iters} steps')

    # ---------------------------------------------------------------------------------------------------- optimizer
    try:
        opt = make_optimizer(net, head)
    except ValueError as e:
        configurator.fail(str(e))
    if method.startswith('rsvd') and projected:
        optim.attach(net, opt, verbose=rank_here == 0)
    gradients = getattr(opt, 'gradients', lambda: {p: p.grad for p in raw_net.parameters() if p.grad is not None})
    loss_scale, good_steps = (2.0 ** 16, 0) if dtype == 'float16' else (1.0, 0)

    # ------------------------------------------------------------------------------------------------------- resume
    step, best, epoch_loss, wandb_id, run = 0, [-1.0, 0], [0.0, 0], None, None
    lost = None                                     # (value, step) of a better evaluation that best.pt lacks: the disk was full
    meter = tables.StepMeter(net, opt, dev, rank_here, world)
    # A resumed run must have equal values of these. Frozen weights are among them, because checkpoints do not store them.
    kept = kept_state(net)
    frozen = [t for n, t in net.state_dict().items() if n not in kept]
    described = {'model': base_name(), 'labels': list(names), 'names_of_data': list(names_of_data), 'samples': len(samples),
                 'vocabulary': zlib.crc32(repr(sorted(tokenizer.get_vocab().items())).encode())}
    described |= {key: config[key] for key in ('method', 'rank', 'rank_fraction', 'energy', 'targets', 'lora_alpha', 'quant8',
                                               'side', 'column_v', 'adam_for', 'state_dtype', 'dtype', 'folds', 'fold')}
    function = hf.function(net.config)              # what shapes do not show, e.g. the number of heads
    described['checksum of the frozen weights'] = common.checksum(frozen)       # last: an option explains more
    if resume_path:
        try:
            state = common.read_last_checkpoint(resume_path, 'finetune_cls', set_aside=rank_here == 0)
            state['described'].setdefault('column_v', False)           # older files lack it
            ours = {k: v for k, v in described.items() if not (no_training and k in ('samples', 'folds', 'fold'))}
            common.check_same(resume_path, state['described'], ours, f'resume with {out_dir}/config.py')
            was = state.get('function', {})         # versions of transformers differ in their keys
            common.check_same(resume_path, was, {k: v for k, v in function.items() if k in was}, 'the model has changed')
            common.load_model_state(net, state['model'], resume_path, [k for k in net.state_dict() if k not in kept])
            common.load_optimizer(opt, state['optimizer'])
        except ValueError as e:
            configurator.fail(str(e))
        step, epoch_loss, wandb_id = (state[k] for k in ('step', 'epoch_loss', 'wandb_id'))
        best = best if elsewhere else state['best']
        meter.load(state['meter'])
        loss_scale, good_steps = state['scaler'] if dtype == 'float16' else (1.0, 0)
        lost = None if elsewhere else state.get('lost')
        del state
        say(f'resumed from {resume_path} at step {step}')
    if not common.ranks_agree(step, len(samples), described['vocabulary'], common.checksum(kept_state(net).values())):
        configurator.fail('the ranks start from different steps, data or weights; do all nodes see the same files?')
    if rank_here == 0:
        if not no_training:
            common.open_run(out_dir, 'finetune_cls', config, step, not resume_path or elsewhere)
        try:
            os.makedirs(out_dir, exist_ok=True)
            if whole:
                hf.save(whole, tokenizer, os.path.join(out_dir, 'base'))   # adapters need their base model
            if not no_training:
                old = ('results.yaml', *(('predictions.csv', 'flops_profiler_stats.csv') if step == 0 else ()))
                for name in old:                    # their figures are out of date until the run ends
                    with contextlib.suppress(FileNotFoundError):
                        os.remove(os.path.join(out_dir, name))
        except OSError as e:
            configurator.fail(f'cannot write to {out_dir}: {e}; type --out_dir=... for another folder')
    if wandb_log and rank_here == 0 and not no_training:
        run = common.start_wandb(wandb_project, wandb_run_name, out_dir, config, wandb_id)
        wandb_id = run.id if run else wandb_id

    # --------------------------------------------------------------------------------------------------------- loop
    raw_net = net
    if compile:
        net = torch.compile(net)
    if world > 1:
        net = common.distributed(net, dev, local_rank)

    def batch(rows):
        found = hf.collate(tokenizer, rows, max_len, pad_to_max)
        return {key: common.to_device(t, dev) for key, t in found.items()}

    def batches(step):
        """The micro-batches of a step on this rank: inputs and labels."""
        rows = common.epoch_indices(seed, step * batch_size, len(samples), batch_size).reshape(accumulation, world, micro)
        return [(batch([samples[j] for j in some]), common.to_device(torch.tensor([ids[j] for j in some]), dev))
                for some in rows[:, rank_here]]

    def loss_of(x, y):
        """Mean cross-entropy of training texts."""
        with amp:
            return F.cross_entropy(net(**x).logits.float(), y)

    @torch.no_grad()
    def evaluate(key):
        """(mean loss, label ids (n,), seconds per text, probabilities (n, labels)) on the evaluation set `key`, divided among
        ranks; None if stopped. The loss of texts without labels means nothing."""
        encoded, labels = eval_rows[key], torch.tensor([names.index(label) for label in eval_sets[key][1]])
        by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i]['input_ids']))    # for little padding
        chunks = [by_length[i:i + eval_batch_size] for i in range(0, len(by_length), eval_batch_size)]
        predictions, total, times = torch.full((len(encoded),), -1), 0.0, []
        shares = torch.zeros(len(encoded), len(names) if predict else 0)
        raw_net.eval()
        for i in range(rank_here, -(-len(chunks) // world) * world, world):
            if common.any_rank(stopped()):
                break
            for chosen in chunks[i:i + 1]:          # empty on some ranks in the last round
                x, start = batch([encoded[j] for j in chosen]), time.perf_counter()
                with amp:
                    logits = raw_net(**x).logits.float().cpu()
                times.append((time.perf_counter() - start, len(chosen)))
                total += F.cross_entropy(logits, labels[chosen], reduction='sum').item()
                predictions[chosen] = logits.argmax(1)
                if predict:
                    shares[chosen] = logits.softmax(1)
        raw_net.train()
        meter.reset_cuda()                          # the reported peak is that of training
        if common.any_rank(stopped()):
            return None
        loss = common.mean_over_ranks(total, (predictions >= 0).sum().item())
        if world > 1:
            predictions, shares = predictions.to(dev), shares.to(dev)
            dist.all_reduce(predictions, dist.ReduceOp.MAX)
            dist.all_reduce(shares, dist.ReduceOp.MAX)
        seconds, n = (sum(x) for x in zip(*(times[1:] or times or [(0, 1)]), strict=True))      # without the first: warm-up
        return loss, predictions.tolist(), seconds / n, shares.tolist()

    def log(record):
        if rank_here == 0:
            common.append_log(out_dir, record, run)

    def save(path, keep_previous=False):
        return rank_here == 0 and common.save_or_warn(path, {
            'trainer': 'finetune_cls', 'step': step, 'described': described, 'function': function, 'model': kept_state(raw_net),
            'optimizer': opt.state_dict(), 'best': best, 'epoch_loss': epoch_loss, 'lost': lost, 'config': config,
            'meter': meter.state(), 'scaler': [loss_scale, good_steps], 'wandb_id': wandb_id}, keep_previous)

    profiler = common.step_profiler(out_dir, dev) if profile and rank_here == 0 else None
    failure, stop, unsaved, upcoming = '', False, False, []
    clock, timed_steps, saved_step = time.perf_counter(), 0, step if resume_path == last_path else -1
    meter.begin(step)
    epoch_of = lambda step: step * batch_size / len(samples)
    if not no_training:
        say(f'step {step} of {total_iters}' + (' is reached: nothing to do' if step >= total_iters else ''))
    net.train()

    while not no_training:
        last_step, seen = step >= total_iters, epoch_of(step)
        epoch_done = step > 0 and int(seen) > int(epoch_of(step - 1))
        evaluating = step > 0 and (epoch_done or last_step or (eval_interval and step % eval_interval == 0))
        stop = stop or world == 1 and stopped()     # several processes agree in each step
        if step > 0 and step != saved_step and (step % save_interval == 0 or last_step or stop or evaluating and unsaved):
            unsaved = not save(last_path, keep_previous=True)
            saved_step = saved_step if unsaved else step
            clock, timed_steps = time.perf_counter(), 0
        if not stop and evaluating:
            key, epoch_peak = next(iter(eval_sets)), meter.peak()      # the first of several sets
            found = evaluate(key)
            stop = found is None
            if not stop:
                accuracy = np.mean([names[i] == label for i, label in zip(found[1], eval_sets[key][1], strict=True)]).item()
                record = {'step': step, 'samples': step * batch_size, 'epoch': round(seen, 3), 'val_loss': found[0],
                          'val_accuracy': accuracy}
                if epoch_done or last_step:
                    record |= {'train_loss': epoch_loss[0] / max(1, epoch_loss[1]), 'peak_bytes': epoch_peak,
                               'resident_bytes': common.peak_memory_bytes(), 'gradient_bytes': meter.gradient_bytes,
                               'optimizer_bytes': optim.optimizer_bytes(opt)}
                    epoch_loss = [0.0, 0]
                    meter.reset()
                say(f'step {step}, epoch {seen:.2f}: val loss {found[0]:.4f}, accuracy {accuracy:.2%}', flush=True)
                log(record)
                if keep_best and accuracy > best[0]:
                    before, best = best, [accuracy, step]
                    if not common.any_rank(save(best_path)):           # best.pt is still the old one
                        best, lost = before, (accuracy, step)
                    elif lost and best[0] >= lost[0]:
                        lost = None
            elif step != saved_step and save(last_path, keep_previous=True):
                saved_step = step
            clock, timed_steps = time.perf_counter(), 0
        if stop or last_step:
            break

        # TRAINING SECTION BEGIN
        lr = common.lr_at(step, schedule, peak_rate, min_lr, warmup_iters, total_iters)
        for group in opt.param_groups:
            group['lr'] = lr
        current = upcoming or batches(step)
        common.seed_step(seed, step, rank_here)
        if step == total_iters - 1 and not compile:
            if world > 1:
                net.require_backward_grad_sync = False
            with torch.random.fork_rng():           # the same dropout as in the step: rsvd may refresh a basis here
                meter.count_flops(loss_of(x, y) for x, y in current)
        loss_sum = torch.zeros((), device=dev)
        middle = not profile and int(seen + 0.5) > int(epoch_of(step - 1) + 0.5)
        with meter.step(step, in_middle=middle):
            for i, (x, y) in enumerate(current):
                if world > 1:                       # DDP reads this flag in the forward pass
                    net.require_backward_grad_sync = i == accumulation - 1
                loss = loss_of(x, y)
                loss_sum += loss.detach()
                (loss * (loss_scale / accumulation)).backward()
            meter.backward_done()
            grads = gradients()
            if loss_scale != 1:
                torch._foreach_mul_(list(grads.values()), 1 / loss_scale)
            total_norm = nn.utils.get_total_norm(list(grads.values()))
            upcoming = batches(step + 1) if step + 1 < total_iters else []     # read while the device computes
            loss, grad_norm, stop = common.step_totals(loss_sum, accumulation, total_norm, stopped())
            overflow = dtype == 'float16' and math.isfinite(loss) and not math.isfinite(grad_norm) and loss_scale > 2 ** -10
            if not overflow and not (math.isfinite(loss) and math.isfinite(grad_norm)):
                culprits = [n for n, p in raw_net.named_parameters() if p in grads and not grads[p].isfinite().all()]
                failure = common.not_finite(loss, grad_norm, step, culprits, saved_step)
            elif overflow:                          # skip the step and halve the loss scale
                loss_scale, good_steps = loss_scale / 2, 0
            else:
                if grad_clip:
                    common.clip_(grads.values(), grad_clip, total_norm)
                opt.step()
                good_steps += 1
                if dtype == 'float16' and good_steps % 2000 == 0:
                    loss_scale *= 2
            opt.zero_grad(set_to_none=True)
            del grads                               # free the gradients before the next forward pass
        if failure:
            break
        if method == 'weight_reduction_svt' and ((step + 1) % svt_interval == 0 or step + 1 == total_iters
                                                 or int(epoch_of(step + 1)) > int(seen)):
            for m in raw_net.modules():
                if isinstance(m, layers.LowRankLinear):
                    m.truncate(max(1, m.rank // 2))
        # TRAINING SECTION END

        step, timed_steps = step + 1, timed_steps + 1
        epoch_loss = [epoch_loss[0] + loss, epoch_loss[1] + 1]
        if meter.disturbed:                         # a measured step is slower: restart the clock
            clock, timed_steps = time.perf_counter(), 0
        if profiler:
            profiler.step()
        if step % log_interval == 0 or step == total_iters:
            ms = (time.perf_counter() - clock) / timed_steps * 1e3 if timed_steps else None
            clock, timed_steps = time.perf_counter(), 0
            record = {'step': step, 'max_iters': total_iters, 'samples': step * batch_size, 'loss': loss, 'lr': lr,
                      'grad_norm': grad_norm, 'ms': ms, 'samples_per_s': ms and batch_size / ms * 1e3,
                      'peak_mem_bytes': common.peak_memory_bytes(dev), 'energy_j': meter.joules()}
            say(f'step {step}: loss {loss:.4f}, lr {lr:.2e}, norm {grad_norm:.2f}'
                + (f', {ms:.0f} ms, {record["samples_per_s"]:,.0f} texts/s' if ms else ''), flush=True)
            log(record)

    # ---------------------------------------------------------------------------------------------------------- end
    evaluated, folder = {}, ''
    meter.end()
    if not failure and not stop:
        if world > 1 and not common.ranks_agree(common.checksum(kept_state(raw_net).values())):    # also a barrier for the save
            configurator.fail('the weights of the ranks differ: the run is broken, please report it')
        if keep_best and best[1]:
            try:
                state = common.read_checkpoint(best_path, 'finetune_cls')
                kept = kept_state(raw_net)
                common.load_model_state(raw_net, state['model'], best_path, [k for k in raw_net.state_dict() if k not in kept])
            except ValueError as e:                 # best.pt is lost, last.pt is not
                failure = f'{e}; type --keep_best=False --resume=auto for the figures of the last weights'
        broken = common.any_rank(bool(failure))     # if one rank failed, the others must not wait for it in evaluate()
        for key, (_, labels, rows) in eval_sets.items() if not broken else ():
            found = evaluate(key)
            stop = found is None
            if stop:
                break
            evaluated[key] = labels, [names[i] for i in found[1]], rows, found[0], found[2]
    if predict and rank_here == 0 and evaluated and not stop:
        folder = os.path.join(out_dir, f'predict-{os.path.basename(predict).partition(".")[0]}')
        try:
            say(tables.write_predictions(folder, names, evaluated[''][1], found[3]))
        except OSError as e:
            failure = f'{e}; make room and type the same command'
    elif rank_here == 0 and evaluated and not stop:
        about = {'model': model or ('scratch' if init_from == 'scratch' else default_model()), 'task': task, 'method': method,
                 'rank': rank if method != 'full' else None, 'seed': seed, 'epochs': epoch_of(step), 'steps': step,
                 'parameters': n_params, 'trained_parameters': n_trained,
                 'weights': f'best, step {best[1]}' if keep_best and best[1] else 'last'}
        try:
            forward = tables.forward_row(raw_net, batch(samples[:micro]), amp, dev.type == 'cuda')
            results = tables.write_run(out_dir, about, names_of_data, evaluated, meter, forward, adam_bytes)
            if not no_training:
                # {model}-{task}-{method}-r{rank}, as the reference names its folders; full has no rank
                folder = os.path.join(out_dir, f'{base_name()}-{task}-{method}' + (f'-r{rank}' if method != 'full' else ''))
                if method in ADAPTERS:
                    base = os.path.join(os.path.dirname(resume_path) if elsewhere else out_dir, 'base')
                    adapters.save_adapters(raw_net, folder, base if own_base else model or default_model(),
                                           hf.head_modules(raw_net), 'SEQ_CLS', names,
                                           'nf4' if method == 'qlora' else 'int8' if quant8 else '')
                    hf.save_tokenizer(tokenizer, folder)
                else:
                    hf.save(raw_net, tokenizer, folder)
            if not no_training:
                failure = common.not_kept(step, saved_step, lost)
            say(tables.in_words(results) + f'; figures in {out_dir}' + (f', model in {folder}' if folder else ''))
        except OSError as e:
            failure = f'{e}; make room and type the same command with --resume=auto'
    common.close_processes()
    if run:
        run.finish(exit_code=1 if failure else 0)
    if failure:
        fail(failure)
    if stop and rank_here == 0:
        words = sys.argv if no_training else [sys.argv[0], os.path.join(out_dir, 'config.py'), '--resume=auto']
        common.say_stopped(words, step, step if no_training else saved_step)


if __name__ == '__main__':
    main()
