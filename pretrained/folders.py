"""
Language models as Hugging Face folders: write models of train_bitnet.py and train_gpt.py, read BitNet and GPT-2 folders.

    model, tokenizer, about = load.load('out/x')                # from engine import load
    write(model, tokenizer, about, 'x-hf', 'packed')            # for AutoModelForCausalLM and AutoTokenizer of transformers
    trainer, model_config, tensors, tokenizer = read('x-hf')    # the inverse
    logits = runs('x-hf')(ids)                                  # those of transformers

A BitNet is written in one of four forms. `write` and `read` keep every code, and but for bf16 every scale, bit for bit.

    fp32, bf16   latent weights, which transformers rounds in each pass (AutoBitLinear, online)
    packed       four codes a byte, scale mean|W| (AutoBitLinear, offline), like microsoft/bitnet-b1.58-2B-4T
    bitlinear    four codes a byte, scale 1 / mean|W| (BitLinear): transformers too keeps the weights packed

A full-precision model of train_gpt.py becomes a GPT2LMHeadModel in fp32 or bf16. The folders of finetune_cls.py need nothing:
they are Hugging Face folders already.
"""
import contextlib
import glob
import json
import math
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn

import common
import layers
from pretrained import adapters, hf
from readers import tasks, tokens

FORMS = ('fp32', 'bf16', 'packed', 'bitlinear')
WEIGHTS = 'model.safetensors'
PLAIN_NAME = re.compile(r'\w[\w.-]*')     # of a data set, not a path

# ---------------------------------------------------------------------------------------------------------------------
# write


def write(model, tokenizer, about, out, form):
    """Write a model of load.load() as the Hugging Face folder `out`, which must not exist or be empty. form: see FORMS. The
    folder is complete or absent. Returns the size of its weights in bytes. Raises ValueError, in one line, for a model that
    does not fit, OSError for a full disk."""
    out = os.path.abspath(out)
    if form not in FORMS:
        raise ValueError(f'type={form!r} is none of {", ".join(FORMS)}; type --type=fp32')
    if os.path.lexists(out) and (os.path.islink(out) or not os.path.isdir(out) or os.listdir(out)):
        raise ValueError(f'{out} exists; delete it, or type another --out')
    if about['quantized']:
        name, entry = next(iter(about['quantized'].items()))
        raise ValueError(f'{name} is a packed layer ({entry["kind"]}) of ptq.py, which transformers lacks; give the model '
                         'that ptq.py read')
    make = {'train_bitnet': _bitnet, 'train_gpt': _gpt2}[about['trainer']]
    config, tensors = make(model, form)
    begin = tokenizer.begin or (tokenizer.encode('\n').tolist() if about['task'] else [tokenizer.eot])
    ends = {'bos_token_id': begin[0], 'eos_token_id': tokenizer.eot}
    config |= {'vocab_size': model.config.vocab_size, 'use_cache': True, 'pad_token_id': None, 'torch_dtype': 'bfloat16'
               if form == 'bf16' else 'float32'} | ends
    words = {'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': model.config.block_size,
             'clean_up_tokenization_spaces': False, 'split_special_tokens': True}      # as in training: a text has none
    if tokenizer.name != 'byte':
        words |= dict.fromkeys(('bos_token', 'eos_token', 'unk_token'), tokenizer.decode_bytes([tokenizer.eot]).decode())
    config['nanobit'] = told(about)
    padding = list(range(tokenizer.vocab_size, model.config.vocab_size))
    generation = ends | ({'suppress_tokens': padding} if padding else {})
    tensors = {name: t.detach().to(torch.bfloat16 if form == 'bf16' and t.is_floating_point() else t.dtype).contiguous()
               for name, t in tensors.items()}
    texts = {'config.json': _json(config), 'generation_config.json': _json(generation), 'tokenizer_config.json': _json(words),
             'tokenizer.json': tokens.as_json(tokenizer),
             'README.md': _card(os.path.basename(out), model, tokenizer, about, form, config, tensors)}
    for left in glob.glob(f'{glob.escape(out)}.tmp*'):                 # from a process that was killed while writing
        if left.removeprefix(f'{out}.tmp').isdecimal() and not os.path.islink(left):
            shutil.rmtree(left)
    folder = f'{out}.tmp{os.getpid()}'
    try:
        os.makedirs(folder)
        common.save_tensors(tensors, os.path.join(folder, WEIGHTS), {'format': 'pt'})
        for name, text in texts.items():
            common.atomic_write(os.path.join(folder, name), lambda path, text=text: Path(path).write_text(text, 'utf-8'))
        os.replace(folder, out)
    except OSError as e:
        raise OSError(str(e).replace(folder, out)) from e
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return os.path.getsize(os.path.join(out, WEIGHTS))


def told(about):
    """What a file says of the run of its model: step, val_loss, task, dataset, where they are known. A path of a data set is
    left out: it names nothing on another machine."""
    best = not os.path.basename(about['path']).startswith('last')      # last.pt has the loss of the best step, not of its own
    found = {'step': about['step'], 'val_loss': best and about['val_loss'], 'task': about['task'],
             'dataset': about['config'].get('dataset')}
    return {key: value for key, value in found.items() if value and (key != 'dataset' or PLAIN_NAME.fullmatch(value))}


def figures(step=0, val_loss=None, task='', dataset=''):
    """The inverse of told(): step, val_loss, task and config, as a packed file has them. Raises ValueError for what no run
    has."""
    if type(step) is not int or not 0 <= step < 1 << 48 or task not in tasks.TASKS or val_loss is not None and not (
            type(val_loss) is float and math.isfinite(val_loss)):
        raise ValueError('nanobit.step, val_loss or task is no possible value')
    named = isinstance(dataset, str) and PLAIN_NAME.fullmatch(dataset)
    return {'step': step, 'val_loss': val_loss, 'task': task, 'config': {'dataset': dataset} if named else {}}


def _json(table):
    return json.dumps(table, indent=2, sort_keys=True) + '\n'


def _bitnet(model, form):
    """(config, tensors) of a model of train_bitnet.py for BitNetForCausalLM."""
    c, how, exact = model.config, None, {}
    packed = form in ('packed', 'bitlinear')
    tensors = {'model.embed_tokens.weight': model.wte.weight, 'model.norm.weight': model.norm.weight}
    tied = model.lm_head.weight is model.wte.weight
    if not tied:
        tensors['lm_head.weight'] = model.lm_head.weight
    if c.quant == 'fp' and packed:
        raise ValueError(f'the model has full-precision matrices, and {form} holds ternary ones; type --type=fp32')
    for ours, norm, parts in hf.bitnet_layers(c):
        layer, rows = model.get_submodule(ours), [n for n, _ in parts.values()]
        tensors[f'{norm}.weight'] = layer.gain
        if packed:
            codes, scales = layer.ternary()
            for part, code, scale in zip(parts, codes.split(rows), scales, strict=True):
                try:
                    tensors[f'{part}.weight'] = hf.pack_rows(code)
                except ValueError as e:
                    raise ValueError(f'{part}: {e}; type --type=fp32') from None
                tensors[f'{part}.weight_scale'] = (1 / scale if form == 'bitlinear' else scale).reshape(1)
                exact[part] = scale.item()
        elif layer.weight is None:
            raise ValueError(f'{ours} has codes and no latent weights, which {form} needs; type --type=packed, or --ckpt= '
                             'and a checkpoint *.pt of the run')
        else:
            tensors |= {f'{part}.weight': hf.bf16_with_codes(w) if form == 'bf16' and c.quant == 'tern' else w
                        for part, w in zip(parts, layer.weight.detach().split(rows), strict=True)}
    if c.quant == 'tern':
        how = dict(hf.ONLINE)
        if packed:
            how |= {'quantization_mode': 'offline', 'linear_class': 'bitlinear' if form == 'bitlinear' else 'autobitlinear'}
        if form == 'bitlinear':                     # 1 / weight_scale can differ from the scale in the last bit
            how['scales'] = exact
    config = {'architectures': ['BitNetForCausalLM'], 'model_type': 'bitnet', 'max_position_embeddings': c.block_size,
              'num_hidden_layers': c.n_layer, 'num_attention_heads': c.n_head, 'num_key_value_heads': c.n_kv_head,
              'hidden_size': c.n_embd, 'intermediate_size': c.n_ff, 'hidden_act': c.act, 'rms_norm_eps': c.norm_eps,
              'rope_theta': c.rope_theta, 'rope_parameters': {'rope_type': 'default', 'rope_theta': c.rope_theta},
              'attention_bias': False, 'attention_dropout': 0.0, 'initializer_range': 0.02, 'tie_word_embeddings': tied}
    return config | ({'quantization_config': how} if how else {}), tensors


def _gpt2(model, form):
    """(config, tensors) of a full-precision model of train_gpt.py for GPT2LMHeadModel. Missing biases are zeros."""
    c = model.config
    if form not in ('fp32', 'bf16'):
        raise ValueError(f'{form} holds the ternary matrices of train_bitnet.py; type --type=fp32 or bf16 for a GPT-2')
    for name, m in model.named_modules():
        if isinstance(m, layers.LowBit) or name.endswith(('c_attn', 'c_proj', 'c_fc')) and type(m) is not nn.Linear:
            raise ValueError(f'{name} is a {getattr(m, "kind", type(m).__name__)} layer, and GPT2LMHeadModel has '
                             'full-precision ones only; train with --n_binary=0'
                             + ', or type --to=gguf' * (getattr(m, 'bits', 0) == 4))
    state, tensors = model.state_dict(), {}
    for name, shape in _gpt2_shapes(c):
        t = state[name] if name in state else torch.zeros(shape)
        tensors['transformer.' + name.replace('blocks.', 'h.')] = t.T if name.endswith(TRANSPOSED) else t
    config = {'architectures': ['GPT2LMHeadModel'], 'model_type': 'gpt2', 'n_positions': c.block_size, 'n_ctx': c.block_size,
              'n_embd': c.n_embd, 'n_layer': c.n_layer, 'n_head': c.n_head, 'initializer_range': 0.02,
              'activation_function': 'gelu'}        # exact, with erf
    return config | dict.fromkeys(('resid_pdrop', 'embd_pdrop', 'attn_pdrop'), c.dropout) | FUNCTION, tensors


def _card(name, model, tokenizer, about, form, config, tensors):
    """README.md: what the model is and the figures of its run, where its folder has them."""
    folder = about['path'] if os.path.isdir(about['path']) else os.path.dirname(about['path'])
    found = next((r for r in reversed(common.read_log(folder)) if r['step'] == about['step'] and 'val_loss' in r), {})
    about = about | {'val_loss': told(about).get('val_loss')}
    n_bytes, n_params = sum(t.nbytes for t in tensors.values()), layers.model_bytes(model)[1] // 4
    ternary = sum(math.prod(m.shape) for m in model.modules() if isinstance(m, layers.TernaryLinear))
    loss, made = found.get('val_loss', about['val_loss']), Path(folder, 'config.py')      # packed files hold no data set
    data = re.search("^dataset = '(.+)'", made.read_text('utf-8', 'replace') if made.is_file() else '', re.M)
    data = os.path.basename((about['config'].get('dataset') or data and data[1] or '').rstrip('/'))
    rows = [('trainer', about['step'] and f'{about["trainer"]}.py of nanobit'), ('data set', about['step'] and data),
            ('parameters', f'{n_params:,}'), ('of them ternary', f'{ternary:,}' if ternary else None),
            ('bytes of the weights', f'{n_bytes:,}'), ('bits per parameter', f'{n_bytes * 8 / n_params:.2f}'),
            ('training steps', about['step'] and f'{about["step"]:,}'), ('training tokens', found and f'{found["tokens"]:,}'),
            ('validation loss, nats per token', loss is not None and f'{loss:.4f}'),
            ('bits per byte of text', found and f'{found["val_bpb"]:.4f}'),
            ('context, tokens', f'{model.config.block_size:,}'),
            ('vocabulary', f'{tokenizer.vocab_size:,} tokens ({tokenizer.name}), {model.config.vocab_size:,} rows')]
    what = {'train_bitnet': 'A BitNet b1.58' if ternary else 'The full-precision baseline of a BitNet b1.58',
            'train_gpt': 'A GPT-2'}[about['trainer']]
    how = f'with {form} master weights' if ternary else f'in {form}'
    how = 'with packed codes, four a byte' if form in ('packed', 'bitlinear') else how
    padded = (' Rows of the embedding beyond the\nvocabulary are padding; `generation_config.json` suppresses them.'
              * (tokenizer.vocab_size < model.config.vocab_size))
    table = '\n'.join(f'| {key} | {value} |' for key, value in rows if value)
    needs = '      # and the package accelerate' if 'quantization_config' in config else ''
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [nanobit{", bitnet" if about["trainer"] == "train_bitnet" else ""}]
---
# {name}

{what}, {how}.{' It is a base model: it continues text.' * bool(about['step'])}

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer{needs}
tokenizer = AutoTokenizer.from_pretrained('{name}')
model = AutoModelForCausalLM.from_pretrained('{name}')
ids = tokenizer('Once upon a time', return_tensors='pt')
print(tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0]))
```

The snippet runs in the folder that holds this one. A special token inside a text is encoded as plain characters, as in
training.{padded}
"""


def ready(path):
    """A line on the folder of finetune_cls.py at `path` or inside the run there, which needs no export; '' if there is none."""
    at = path if os.path.isdir(path) else os.path.dirname(path) or '.'
    for name in ('', *sorted(set(os.listdir(at)) - {'base'})) if os.path.isdir(at) else ():
        folder = os.path.join(at, name).rstrip('/')
        with contextlib.suppress(ValueError):       # no config.json
            if adapters.is_adapters(folder) or os.path.isfile(os.path.join(folder, hf.HEAD)) or (
                    'ForSequenceClassification' in str(hf.read_config(folder).get('architectures'))):
                return f'{folder} is a Hugging Face folder already, of finetune_cls.py; copy it: cp -r {folder} x-hf'
    return ''


# ---------------------------------------------------------------------------------------------------------------------
# read


def read(path):
    """Read a folder of BitNetForCausalLM, of its kin or of GPT2LMHeadModel: (trainer, model_config, tensors, Tokenizer,
    figures of its run).

    tensors: the state dict of the trainer's model, or, for packed ternary matrices, tensors for common.load_packed(). The
    trainers pad a vocabulary to a multiple of 64; pad_rows() does. Raises ValueError, in one line, for a folder that does not
    fit."""
    about = hf.read_config(path)
    try:
        run = figures(**about.get('nanobit', {}))
    except (TypeError, ValueError) as e:
        raise ValueError(f'{path}/config.json: the table nanobit cannot be used ({str(e):.80})') from None
    if about.get('model_type') == 'gpt2':
        return *_read_gpt2(path), run
    shape, how, tokenizer, stored = hf.open_bitnet(path)
    packed = how is not None and how['quantization_mode'] == 'offline'
    try:
        tensors = hf.from_bitnet(stored, SimpleNamespace(**shape), how if packed else None)
        if 'lm_head.weight' in tensors:
            raise ValueError('its head is not the embedding, and train_bitnet.py ties them; sample.py reads the folder itself')
    except ValueError as e:
        raise ValueError(f'{path}: {e}') from None
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    return 'train_bitnet', shape, tensors, tokenizer, run


# What a GPT-2 computes and its shapes do not show, as train_gpt.py does it.
FUNCTION = {'layer_norm_epsilon': 1e-5, 'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False,
            'tie_word_embeddings': True}
TRANSPOSED = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')         # GPT-2 stores (in, out)


def check_gpt2(name, about):
    """Raises ValueError if train_gpt.py would compute another function from a GPT-2 with the config `about`. Returns what
    differs slightly, or ''."""
    about = FUNCTION | {'activation_function': 'gelu_new'} | about         # FUNCTION holds the defaults of transformers
    common.check_same(name, about, {'model_type': 'gpt2'}, 'only GPT-2 fits this trainer')
    common.check_same(name, about, FUNCTION, 'this trainer computes it in one way only')
    if about['activation_function'] not in ('gelu', 'gelu_new'):
        raise ValueError(f'{name} has activation_function={about["activation_function"]}, this trainer has GELU only')
    return (f'{name} was trained with a tanh approximation of GELU; here GELU is exact, so outputs differ slightly'
            if about['activation_function'] == 'gelu_new' else '')


def gpt2_weights(name, c):
    """Read Hugging Face GPT-2 weights for a GPT of train_gpt.py with the config c: (state dict, what differs slightly or '').
    name: gpt2, gpt2-medium, ... or a folder. Raises ValueError if the shapes differ or it would compute another function."""
    try:
        from transformers import AutoConfig, GPT2LMHeadModel
    except ImportError:
        raise ValueError(f'--init_from={name} needs transformers; type: pip install transformers') from None
    theirs = AutoConfig.from_pretrained(name).to_dict()
    note = check_gpt2(name, theirs)
    shape = {key: theirs[key] for key in ('n_layer', 'n_head', 'n_embd')} | {'bias': True}
    if any(getattr(c, key) != value for key, value in shape.items()):
        raise ValueError(f'{name} has another shape; type {" ".join(f"--{key}={value}" for key, value in shape.items())}')
    if theirs['n_positions'] < c.block_size:
        raise ValueError(f'{name} has {theirs["n_positions"]} positions; type --block_size={theirs["n_positions"]} or less')
    if theirs['vocab_size'] > c.vocab_size:
        raise ValueError(f'{name} has {theirs["vocab_size"]} tokens, the data only {c.vocab_size}; type --dataset=c4')
    try:
        source, info = GPT2LMHeadModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except Exception as e:                          # noqa: BLE001  transformers raises many types; all mean: not usable
        raise ValueError(f'cannot load the weights of {name}: {" ".join(str(e).split())[:200]}') from None
    if missing := sorted(info['missing_keys']):
        raise ValueError(f'{name} lacks the weights {missing[0]}')
    state = from_gpt2(source.state_dict())
    for key in ('wte.weight', 'lm_head.weight'):    # the trainer pads the vocabulary to a multiple of 64
        state[key] = pad_rows(state[key], c.vocab_size)
    state['wpe.weight'] = state['wpe.weight'][:c.block_size]
    return state, note


def from_gpt2(state):
    """Convert a state dict of GPT2LMHeadModel to the names and shapes of train_gpt.py's GPT."""
    out = {}
    for key, t in state.items():
        key = key.removeprefix('transformer.')
        key = 'blocks.' + key[2:] if key.startswith('h.') else key
        if key in out:
            raise ValueError(f'{key} is there twice, with and without transformer.')
        if not key.endswith(('.attn.bias', '.attn.masked_bias')):
            out[key] = t.T.contiguous() if key.endswith(TRANSPOSED) and t.dim() == 2 else t
    return out


def pad_rows(table, rows):
    """Append rows to an embedding (n, dim) up to `rows`: copies of its mean row. A row of zeros would have a logit of 0, which
    in GPT-2 is far above all others."""
    more = rows - len(table)
    return torch.cat([table, table.mean(0, keepdim=True).expand(more, -1)]) if more > 0 else table


def _gpt2_shapes(c):
    """Yield (name in train_gpt.py, shape) of all tensors of a GPT-2 with biases, but for the head."""
    e = c.n_embd
    yield from {'wte.weight': (c.vocab_size, e), 'wpe.weight': (c.block_size, e)}.items()
    yield from {'ln_f.weight': (e,), 'ln_f.bias': (e,)}.items()
    for i in range(c.n_layer):
        for name, size in (('ln_1', (e,)), ('attn.c_attn', (3 * e, e)), ('attn.c_proj', (e, e)), ('ln_2', (e,)),
                           ('mlp.c_fc', (4 * e, e)), ('mlp.c_proj', (e, 4 * e))):
            yield f'blocks.{i}.{name}.weight', size
            yield f'blocks.{i}.{name}.bias', size[:1]


def _read_gpt2(path):
    """read() of a GPT-2 folder. A model whose biases are all zero gets none."""
    about = {'vocab_size': 50257, 'n_positions': 1024, 'n_embd': 768, 'n_layer': 12, 'n_head': 12} | hf.read_config(path)
    shape = {key: about[name] for key, name in (('vocab_size', 'vocab_size'), ('block_size', 'n_positions'),
             *((key, key) for key in ('n_layer', 'n_head', 'n_embd')))}
    for key, value in shape.items():
        if type(value) is not int or not 1 <= value < 1 << 24:
            raise ValueError(f'{path}/config.json: {key}={value!r:.40} is no size')
    inner, drop = about.get('n_inner'), about.get('resid_pdrop', 0.1)
    if shape['n_embd'] % shape['n_head'] or inner not in (None, 4 * shape['n_embd']):
        raise ValueError(f'{path}/config.json: n_head={shape["n_head"]} and n_inner={inner!s:.40} do not fit '
                         f'n_embd={shape["n_embd"]}, or are not possible here')
    if type(drop) not in (int, float) or not 0 <= drop < 1:
        raise ValueError(f'{path}/config.json: resid_pdrop={drop!r:.40} is not between 0 and 1')
    if note := check_gpt2(path, about):
        print(note)
    tokenizer, state = tokens.of_folder(path, about), hf.mapped_state(path)
    try:
        state, tensors = from_gpt2(state), {}
        head = state.pop('lm_head.weight', None)
        for name, size in _gpt2_shapes(SimpleNamespace(**shape)):
            tensors[name] = hf.finite(state, name, size).float()
            del state[name]
    except ValueError as e:
        raise ValueError(f'{path}: {e}') from None
    if state or head is not None and not torch.equal(head.float(), tensors['wte.weight']):
        raise ValueError(f'{path}: the model has no place for {next(iter(state), "a head that is not the embedding")}')
    bias = any(t.any().item() for name, t in tensors.items() if name.endswith('.bias'))
    tensors = {name: t for name, t in tensors.items() if bias or not name.endswith('.bias')}
    tensors['lm_head.weight'] = tensors['wte.weight']
    return 'train_gpt', shape | {'bias': bias, 'dropout': float(drop), 'binary_blocks': (), **dict.fromkeys(
        ('qkv_proj', 'c_proj', 'mlp_proj'), 'fp')}, tensors, tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# run


def runs(path):
    """A function ids (B, T) int64 -> logits (B, T, vocab) fp32 of transformers, without torch.compile.

    from_pretrained() reads BitNet folders only with the package accelerate. Without it the model is built here from the same
    classes of transformers. Raises ValueError."""
    net = model_of(path)

    @torch.no_grad()
    def logits(ids):
        with torch.compiler.set_stance('force_eager'):                 # transformers compiles the rounding
            return net(ids).logits.float()
    return logits


def model_of(path):
    """The model of transformers in a folder, in fp32 and eval mode. Raises ValueError."""
    t, how = hf.import_transformers(), hf.read_config(path).get('quantization_config')
    try:
        config = t.AutoConfig.from_pretrained(path)
        if how is None:
            return t.AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32).eval()
        from transformers.integrations import bitnet
        del config.quantization_config
        config.dtype = torch.float32
        with torch.device('meta'):
            net = t.BitNetForCausalLM(config)
        net.model.rotary_emb = type(net.model.rotary_emb)(config)      # its table is not in the file
        bitnet.replace_with_bitnet_linear(net, ['lm_head'], t.BitNetQuantConfig(**how))
        state = hf.mapped_state(path)
        for name, w in state.items():
            if w.dtype == torch.uint8 and isinstance(net.get_submodule(name.rpartition('.')[0]), nn.Linear):
                with torch.compiler.set_stance('force_eager'):
                    state[name] = bitnet.unpack_weights(w, torch.float32)
            elif w.is_floating_point():
                state[name] = w.float()
        missing, extra = net.load_state_dict(state, strict=False, assign=True)
        if config.tie_word_embeddings:
            net.lm_head.weight = net.model.embed_tokens.weight
            missing = [name for name in missing if name != 'lm_head.weight']
        if missing or extra:
            raise ValueError(f'{(missing + extra)[0]} is missing or unknown')
        return net.eval()
    except Exception as e:                          # noqa: BLE001  transformers raises many types; all mean: not usable
        raise ValueError(f'transformers cannot use {path}: {" ".join(str(e).split())[:200]}') from None
