"""
GGUF files of llama.cpp: write a language model of this project as one, and read one back. The package gguf does the container.

    notes = write(model, tokenizer, about, 'x.gguf', 'TQ2_0', 'F16', 'bitnet')      # as load.load() returns them
    trainer, config, state, tokenizer = read('x.gguf')

A ternary matrix is stored as its codes -1, 0 and 1, which each of TERNARY holds exactly, and its scale as a tensor of one fp32
number, so no weight is rounded. (A block's own scale is fp16.) A graph without such tensors, that of bitnet-b1.58, gets codes
times scale. Rotary positions of both BitNets pair the halves of a head, as here, so q and k keep the order of their rows.
Errors are a ValueError of one line. Files come from strangers: each length, count and place is compared with the file's size.
"""
import json
import os
import struct
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch

import common
import layers
from pretrained import folders, hf
from pretrained.formats import GroupLinear
from quant import GRIDS, pack_bits, unpack_bits
from readers import tokens

# Layers of train_bitnet.py: the norm and the matrices of GGUF that each contains. Layers and norms of train_gpt.py.
BITNET = {'attn.qkv_proj': ('attn_norm', 'attn_q', 'attn_k', 'attn_v'), 'attn.o_proj': ('attn_sub_norm', 'attn_output'),
          'mlp.gate_up_proj': ('ffn_norm', 'ffn_gate', 'ffn_up'), 'mlp.down_proj': ('ffn_sub_norm', 'ffn_down')}
GPT = {'attn.c_attn': 'attn_qkv', 'attn.c_proj': 'attn_output', 'mlp.c_fc': 'ffn_up', 'mlp.c_proj': 'ffn_down'}
GPT_NORMS = {'ln_1': 'attn_norm', 'ln_2': 'ffn_norm'}
ACTS = {'bitnet': 'silu', 'bitnet-b1.58': 'relu2'}
TERNARY = ('TQ2_0', 'TQ1_0', 'Q4_0', 'F16', 'F32')
DENSE = ('F16', 'F32', 'Q8_0')
# {(trainer, arch, whether ternary): types of the matrices, the default first}
TYPES = {('train_bitnet', 'bitnet', True): TERNARY, ('train_bitnet', 'bitnet', False): DENSE,
         ('train_bitnet', 'bitnet-b1.58', True): ('F32', 'F16'), ('train_bitnet', 'bitnet-b1.58', False): DENSE,
         ('train_gpt', 'gpt2', False): (*DENSE, 'Q4_0')}
HEADS = DENSE
WRONG_ACT = {'relu2': 'the arch bitnet of llama.cpp computes SiLU only; type --arch=bitnet-b1.58 for ik_llama.cpp, or train '
                      'with --act=silu', 'silu': 'the arch bitnet-b1.58 computes the square of ReLU; type --arch=bitnet'}
OWN = {'bin': 'binary and normalizes its output', 'tern': 'ternary and contains an RMSNorm', 'lora': 'a layer with adapters'}
FILE_TYPES = {'F32': 0, 'F16': 1, 'Q4_0': 2, 'Q8_0': 7, 'TQ1_0': 36, 'TQ2_0': 37}      # general.file_type
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5                                      # tokenizer.ggml.token_type
NO_MERGE = '\u2581 \u2581'     # never applied: no byte has this character. A list without merges does not load
# {regular expression that splits a text before merges: its name in llama.cpp, tokenizer.ggml.pre}
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PRES = {GPT2_PATTERN: 'gpt-2', _WORDS + r'\p{N}{1,3}' + _REST: 'llama-bpe', _WORDS + r'\p{N}' + _REST: 'qwen2'}
WHOLE_FIRST = ('llama-bpe',)   # with these, llama.cpp takes a piece that is a token as it is, whatever the merges
MOST = 1 << 24                 # no size in a file is larger; nor is positions * width of a head, the table of rotary positions
DEEPEST = 1024                 # no model has more blocks
FIGURES = {'step': 'nanobit.step', 'val_loss': 'nanobit.val_loss', 'task': 'nanobit.task', 'dataset': 'general.dataset.0.name'}
LONGEST_LIST = 1 << 19         # no list is longer, be it of tokens or merges


def _package():
    try:
        import gguf
        return gguf
    except ImportError:
        raise ValueError('a GGUF file needs the package gguf; type: pip install gguf') from None


# ---------------------------------------------------------------------------------------------------------------------
# tensors out


def plan(model, about, kind='', head='', arch=''):
    """(type of the matrices, type of embedding and head, arch) of a file, with defaults for ''. Raises ValueError with the
    reason if llama.cpp has nothing that computes this model, or for another type or arch."""
    trainer, c = about['trainer'], model.config
    archs = [a for t, a, _ in TYPES if t == trainer]
    if trainer == 'train_bitnet':
        arch = arch or 'bitnet'
        if ACTS.get(arch) not in (None, c.act):
            raise ValueError(f'act={c.act}: {WRONG_ACT[c.act]}')
        for name, m in _layers(model, BITNET):
            ours = isinstance(m, layers.TernaryLinear) and m.norm and m.bias is None and m.out_gain is None
            if not ours and type(m).__name__ != 'NormedLinear':
                raise ValueError(f'{name} is a {type(m).__name__}, which the arch {arch} does not compute; give the --ckpt of '
                                 'the training')
    else:
        arch = arch or 'gpt2'
        for name, m in _layers(model, GPT):
            what = OWN.get(getattr(m, 'kind', 'fp'), '' if layers.is_linear(m) else f'a {type(m).__name__}')
            if what:
                raise ValueError(f'{name} is {what}, which no arch of llama.cpp computes; blocks of fp and int4 layers fit '
                                 'gpt2, a ternary model of train_bitnet.py with --act=silu fits bitnet')
    if arch not in archs:
        known = ', '.join(dict.fromkeys(archs))
        raise ValueError(f'arch={arch!r} is none of {known}, which fit models of {trainer}.py; type --arch={archs[0]}')
    known = TYPES[trainer, arch, _is_ternary(model)]
    for key, value, fits in (('type', kind, known), ('head', head, HEADS)):
        if value and value not in fits:
            raise ValueError(f'{key}={value!r} is none of {", ".join(fits)}, which fit this model; type --{key}={fits[0]}')
    embedding = getattr(model.wte, 'layer', model.wte)
    if model.lm_head is not embedding and model.lm_head.weight is not embedding.weight:
        raise ValueError('its head is not the embedding, and the graphs of bitnet and gpt2 here have one matrix for both')
    return kind or known[0], head or HEADS[0], arch


def _layers(model, names):
    return [(f'blocks.{i}.{n}', block.get_submodule(n)) for i, block in enumerate(model.blocks) for n in names]


def _is_ternary(model):
    return hasattr(model.config, 'n_kv_head') and isinstance(model.blocks[0].attn.qkv_proj, layers.TernaryLinear)


@torch.no_grad()
def tensors(model, kind, head, arch, notes):
    """Yield (name, type of ggml, array as stored) of a model. Appends to notes what was rounded. For kinds see plan()."""
    c, numbers = model.config, lambda t: t.detach().float().contiguous().numpy()
    yield 'token_embd.weight', head, encoded('token_embd.weight', numbers(model.wte(torch.arange(c.vocab_size))), head, 'head')
    if arch == 'gpt2':
        yield 'position_embd.weight', 'F32', numbers(model.wpe(torch.arange(c.block_size)))
        yield from _layer_norm('output_norm', model.ln_f)
        left = {}
        for i, block in enumerate(model.blocks):
            for ours, theirs in GPT_NORMS.items():
                yield from _layer_norm(f'blk.{i}.{theirs}', block.get_submodule(ours))
            for ours, theirs in GPT.items():
                m, name = block.get_submodule(ours), f'blk.{i}.{theirs}'
                bias = m.bias if m.bias is not None else torch.zeros(m.out_features)
                codes = four_bits(m) if kind == 'Q4_0' else None
                own = 'F16' if kind == 'Q4_0' and codes is None else kind
                if codes is None and (getattr(m, 'kind', 'fp') != 'fp' or own != kind):
                    left.setdefault((getattr(m, 'levels', getattr(m, 'kind', 'fp')), own), []).append(f'blocks.{i}.{ours}')
                yield f'{name}.weight', own, q4_0(*codes) if codes else encoded(f'{name}.weight', numbers(dense(m)), own)
                yield f'{name}.bias', 'F32', numbers(bias)
        for (form, own), names in left.items():
            why = 'full precision' if form == 'fp' else f'{form} dequantized'
            rest = f' and {len(names) - 1} more' * (len(names) > 1)
            notes.append(f'{names[0]}{rest}: {why}, written as {own}'
                         + ', because Q4_0 would round them' * (kind == 'Q4_0'))
        return
    yield 'output_norm.weight', 'F32', numbers(model.norm.weight)
    for i, block in enumerate(model.blocks):
        for ours, (norm, *parts) in BITNET.items():
            m = block.get_submodule(ours)
            yield f'blk.{i}.{norm}.weight', 'F32', numbers(m.gain)
            rows = hf.bitnet_rows(c)[ours]
            if isinstance(m, layers.TernaryLinear):
                codes, scales = m.ternary()
            else:
                codes, scales = m.weight, [None] * len(parts)
            for part, values, scale in zip(parts, codes.split(rows), scales, strict=True):
                name, values = f'blk.{i}.{part}', numbers(values)
                if scale is not None and arch == 'bitnet':
                    yield f'{name}.weight', kind, encoded(f'{name}.weight', values, kind, codes=True)
                    yield f'{name}.scale', 'F32', numbers(scale.reshape(1))
                else:
                    values = values if scale is None else values * np.float32(scale.item())
                    yield f'{name}.weight', kind, encoded(f'{name}.weight', values, kind)
    if arch == 'bitnet-b1.58' and kind == 'F16' and _is_ternary(model):
        notes.append('scales are rounded to fp16, because the graph of bitnet-b1.58 reads no scales; --type=F32 keeps them')


def _layer_norm(name, norm):
    """A LayerNorm without a bias has one of zeros there."""
    bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
    for part, t in (('weight', norm.weight), ('bias', bias)):
        yield f'{name}.{part}', 'F32', t.detach().float().contiguous().numpy()


def dense(m):
    """fp32 weight (out, in) of a linear layer of any kind, as its forward pass uses it."""
    if getattr(m, 'kind', '') == 'lowrank':
        return m.A.float() * m.c.float() @ m.B.float()
    if hasattr(m, 'decode') and m.weight is None:
        return m.effective_weight()
    return (m.rounded(m.weight) if hasattr(m, 'rounded') else m.weight).float()


def four_bits(m):
    """(codes 0 .. 15 (rows, columns), fp16 scales (rows, columns / 32)) of a layer whose weights are (code - 8) * scale in
    groups of 32, else None: evenly spaced levels without a 0, other scales, zeros that are too far from 8."""
    fits = isinstance(m, GroupLinear) and m.packed and not m.scaled_input and m.group % 32 == 0
    if not fits or m.levels not in ('int4', 'int3', 'int2', 'tern'):
        return None
    groups = m.in_features // m.group
    codes = unpack_bits(m.code, m.bits, m.in_features).to(torch.int16)
    zero = GRIDS[m.levels].zero
    zeros = torch.full((m.out_features, groups), int(zero)) if zero is not None else unpack_bits(m.zero, m.bits, groups)
    codes = codes - zeros.to(torch.int16).repeat_interleave(m.group, 1) + 8
    if codes.min() < 0 or codes.max() > 15:
        return None
    return codes.numpy().astype(np.uint8), m.weight_scale.repeat_interleave(m.group // 32, 1).numpy()


def q4_0(codes, scales):
    """Blocks of Q4_0, uint8 (rows, bytes): the fp16 scale, then a byte for two codes, of the weights i and i + 16."""
    halves = codes.reshape(len(codes), -1, 2, 16)
    scales = np.ascontiguousarray(scales, '<f2').reshape(len(codes), -1, 1).view(np.uint8)
    return np.concatenate([scales, halves[:, :, 0] | halves[:, :, 1] << 4], -1).reshape(len(codes), -1)


def encoded(name, weight, kind, option='type', codes=False):
    """fp32 weight (rows, columns) in a type of ggml. codes: it holds -1, 0 and 1 only, and none is rounded."""
    gguf = _package()
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
    if weight.shape[1] % size:
        fits = 'Q4_0' if codes and weight.shape[1] % 32 == 0 else 'F16'
        raise ValueError(f'{name} has rows of {weight.shape[1]} weights, {kind} needs a multiple of {size}; type '
                         f'--{option}={fits}' + ', which holds codes exactly too' * codes)
    if not np.isfinite(weight).all() or kind != 'F32' and np.abs(weight).max(initial=0) > 65504:
        raise ValueError(f'{name} has weights that are not finite or do not fit into {kind}; type --{option}=F32')
    if codes and kind == 'Q4_0':                    # with gguf's own scale of a block, 1 would become 7/8
        return q4_0((weight + 8).astype(np.uint8), np.ones((len(weight), weight.shape[1] // 32)))
    return gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind])


# ---------------------------------------------------------------------------------------------------------------------
# tokenizers


def vocabulary(tokenizer, rows):
    """{key of tokenizer.ggml: value} of a tokenizer for llama.cpp: pre, tokens, token_type and merges. Each row of padding has
    a distinct unused token. Raises ValueError."""
    if tokenizer.name == 'byte':
        pre, texts, merges = 'gpt-2', dict(tokens.CHARACTER_OF), []
        types = dict.fromkeys(range(256), NORMAL) | {tokenizer.eot: CONTROL}
    else:
        pre, texts, types, merges = _of_json(tokens.as_json(tokenizer))
    unused = {i: f'[PAD{i}]' for i in range(rows) if i not in texts}
    texts, types = texts | unused, types | dict.fromkeys(unused, UNUSED)
    if len(set(texts.values())) < rows or len(texts) > rows:
        raise ValueError(f'the tokenizer has {len(set(texts.values()))} different tokens for {rows} rows of the embedding')
    return {'pre': pre, 'tokens': [texts[i] for i in range(rows)], 'token_type': [types[i] for i in range(rows)],
            'merges': merges or [NO_MERGE]}


def _of_json(text):
    """(pre, {id: text}, {id: type}, merges) of a tokenizer.json. Raises ValueError if llama.cpp splits no text in its way."""
    about = json.loads(text)
    model, added, before = about['model'], about.get('added_tokens') or [], about.get('pre_tokenizer') or {}
    *first, last = before['pretokenizers'] if before.get('type') == 'Sequence' else [before]
    pattern = last.get('use_regex', True) and GPT2_PATTERN          # ByteLevel splits as GPT-2 does, or leaves it to a Split
    if first and not pattern and first[0] | {'pattern': 0} == {
            'type': 'Split', 'pattern': 0, 'behavior': 'Isolated', 'invert': False}:
        pattern = first.pop()['pattern'].get('Regex')
    pre = PRES.get(pattern)
    if not pre or first or last.get('type') != 'ByteLevel' or last['add_prefix_space'] or model.get('type') != 'BPE' or any(
            (about.get('normalizer'), *map(model.get, ('dropout', 'byte_fallback', 'continuing_subword_prefix',
                                                       'end_of_word_suffix')))):
        raise ValueError(f'its tokenizer does not split text as {", ".join(PRES.values())} do; a GGUF file here has no name '
                         'for its way')
    after = about.get('post_processor') or {'type': 'ByteLevel'}
    for part in after['processors'] if after['type'] == 'Sequence' else [after]:
        named = {t['SpecialToken']['id'] for t in part.get('single', []) + part.get('pair', []) if 'SpecialToken' in t}
        if part['type'] not in ('ByteLevel', 'TemplateProcessing') or named - part.get('special_tokens', {}).keys():
            raise ValueError(f'its tokenizer has a post_processor {part["type"]!r}, which a GGUF file here does not hold')
    merges = [m if isinstance(m, str) else ' '.join(m) for m in model['merges']]
    if bool(model.get('ignore_merges')) != (pre in WHOLE_FIRST):    # the same ids if merges make each token anyway
        import tokenizers as lib
        by_merges = lib.models.BPE(model['vocab'], [tuple(m.split(' ')) for m in merges])
        special = {t['content'] for t in added}
        if lost := next((t for t in model['vocab'] if t not in special and len(by_merges.tokenize(t)) > 1), None):
            raise ValueError(f'its tokenizer makes {lost!r} {"with" if pre in WHOLE_FIRST else "without"} merges, and '
                             f'llama.cpp the other way with pre={pre}')
    for t in added:
        if not t['special'] and (t['lstrip'] or t['rstrip'] or t['single_word']):
            raise ValueError(f'its token {t["content"]!r} takes spaces or whole words only, which llama.cpp does not')
    texts = {i: token for token, i in model['vocab'].items()} | {t['id']: t['content'] for t in added}
    types = dict.fromkeys(texts, NORMAL) | {t['id']: CONTROL if t['special'] else USER_DEFINED for t in added}
    return pre, texts, types, merges


def _tokenizer(fields):
    """Tokenizer of a file. Raises ValueError."""
    get = lambda key, kind: _field(fields, f'tokenizer.ggml.{key}', kind)
    texts, types, merges = get('tokens', list), get('token_type', list), get('merges', list)
    eos, kind, pre = get('eos_token_id', int), get('model', str), get('pre', str)
    if kind != 'gpt2' or pre not in PRES.values():
        raise ValueError(f'its tokenizer is {kind[:20]!r} with pre={pre[:20]!r}; gpt2 with pre={", ".join(PRES.values())} '
                         'can be read')
    if len(types) != len(texts) or not 0 <= eos < len(texts) or not all(isinstance(t, str) for t in (*texts, *merges)):
        raise ValueError('its lists of tokens do not fit each other')
    known = [i for i, t in enumerate(types) if t != UNUSED]
    if known == list(range(256)) == [tokens.BYTE_OF.get(t) for t in texts[:256]] and eos == 0:
        return tokens.byte()
    begin = fields.get('tokenizer.ggml.add_bos_token', pre in WHOLE_FIRST) and texts[get('bos_token_id', int)]
    try:                                            # tokenizers itself panics on some files that _of_json() refuses
        text = fields.get('tokenizer.huggingface.json') or _to_json(pre, texts, types, merges, begin)
        if _of_json(text) != (pre, {i: texts[i] for i in known}, {i: types[i] for i in known},
                              [m for m in merges if m != NO_MERGE]):
            raise ValueError('the lists of tokens are not those of tokenizer.huggingface.json')
        made = tokens.of_json(text, eos)
    except Exception as e:                          # noqa: BLE001  tokenizers raises Exception itself
        raise ValueError(f'its tokenizer: {_line(e)}') from None
    if not all(0 <= i < made.vocab_size for i in (eos, *made.begin)):
        raise ValueError('its tokenizer has no token that begins or ends a text')
    return made


def _to_json(pre, texts, types, merges, begin):
    """tokenizer.json of a byte-level BPE. begin: the token before a text, or a false value."""
    import tokenizers as lib
    vocab = {t: i for i, t in enumerate(texts) if types[i] != UNUSED}
    pairs = [tuple(m.split(' ')) for m in merges if m != NO_MERGE]
    made = lib.Tokenizer(lib.models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre in WHOLE_FIRST))
    level, pattern = lib.pre_tokenizers.ByteLevel, next(p for p, name in PRES.items() if name == pre)
    made.decoder, made.pre_tokenizer = lib.decoders.ByteLevel(), level(add_prefix_space=False)
    if pattern != GPT2_PATTERN:
        made.pre_tokenizer = lib.pre_tokenizers.Sequence([
            lib.pre_tokenizers.Split(lib.Regex(pattern), 'isolated'), level(add_prefix_space=False, use_regex=False)])
    if begin:
        made.post_processor = lib.processors.TemplateProcessing(single=[begin, '$A'], special_tokens=[(begin, vocab[begin])])
    made.add_special_tokens([t for i, t in enumerate(texts) if types[i] == CONTROL])
    made.add_tokens([lib.AddedToken(t, normalized=False) for i, t in enumerate(texts) if types[i] == USER_DEFINED])
    return made.to_str()


# ---------------------------------------------------------------------------------------------------------------------
# files


def write(model, tokenizer, about, out, kind='', head='', arch=''):
    """Write a model of load.load() as the GGUF file `out`, atomically. Returns notes on what was rounded. Two files of one
    model are equal byte by byte. Raises ValueError, and OSError."""
    gguf = _package()
    kind, head, arch = plan(model, about, kind, head, arch)
    c, notes = model.config, []
    words = vocabulary(tokenizer, c.vocab_size)
    if len(tokenizer.begin) > 1:
        raise ValueError('its texts begin with several tokens; a GGUF file names one')
    held = list(tensors(model, kind, head, arch, notes))

    def save(tmp):
        w = gguf.GGUFWriter(tmp, arch)
        adds = [(w.add_name, f'nanobit {about["trainer"]}'), *_figures_out(w, about), (w.add_context_length, c.block_size),
                (w.add_embedding_length, c.n_embd), (w.add_block_count, c.n_layer), (w.add_head_count, c.n_head),
                (w.add_vocab_size, c.vocab_size), (w.add_file_type, FILE_TYPES[kind]), (w.add_quantization_version, 2)]
        if arch == 'gpt2':
            adds += [(w.add_feed_forward_length, 4 * c.n_embd), (w.add_head_count_kv, c.n_head),
                     (w.add_layer_norm_eps, model.ln_f.eps)]
        else:
            adds += [(w.add_feed_forward_length, c.n_ff), (w.add_head_count_kv, c.n_kv_head),
                     (w.add_layer_norm_rms_eps, c.norm_eps), (w.add_rope_freq_base, c.rope_theta),
                     (w.add_rope_dimension_count, c.n_embd // c.n_head)]
        adds += [(w.add_tokenizer_model, 'gpt2'), (w.add_tokenizer_pre, words['pre']), (w.add_token_list, words['tokens']),
                 (w.add_token_types, words['token_type']), (w.add_token_merges, words['merges']),
                 (w.add_bos_token_id, (*tokenizer.begin, tokenizer.eot)[0]), (w.add_eos_token_id, tokenizer.eot),
                 (w.add_add_bos_token, bool(tokenizer.begin)), (w.add_add_eos_token, False)]
        for add, value in adds:
            add(value)
        if tokenizer.name == 'bpe':
            w.add_string(gguf.Keys.Tokenizer.HF_JSON, tokenizer.text)
        for name, own, array in held:
            w.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[own])
        try:
            w.write_header_to_file()
            w.write_kv_data_to_file()
            w.write_tensors_to_file()
        finally:
            w.close()
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    common.atomic_write(out, save)
    return notes


def _figures_out(w, about):
    """(function of the writer, value) of the known figures of a run."""
    found = folders.told(about)
    said = [text.format(found[key]) for key, text in (('step', 'step {:,}'), ('val_loss', 'validation loss {:.4f}'))
            if key in found]
    adds = [(w.add_description, ', '.join(said)), *((partial(add, f'nanobit.{key}'), found.get(key)) for key, add in (
        ('step', w.add_uint64), ('val_loss', w.add_float64), ('task', w.add_string)))]
    if 'dataset' in found:
        adds += [(w.add_dataset_count, 1), (partial(w.add_dataset_name, 0), found['dataset'])]
    return [(add, value) for add, value in adds if value]


def opened(path):
    """({key: value}, {name: ReaderTensor}) of a GGUF file. Raises ValueError if it is damaged."""
    gguf = _package()

    class Reader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, override_order=None):
            """The package slices beyond the end of a file without an error, so a length of 2 ** 60 would loop forever. A slice
            of a memmap is a slow and large object, that of an array is not."""
            self.data = self.data.view(np.ndarray)
            if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError('it ends too early')
            return super()._get(offset, dtype, count, override_order)

        def _get_field_parts(self, offset, kind):
            """Lists without an object of the package for each number, or two for each string."""
            if kind != gguf.GGUFValueType.ARRAY:
                return super()._get_field_parts(offset, kind)
            inner, count = self._get(offset, np.uint32), int(self._get(offset + 4, np.uint64)[0])
            number, raw, parts, at = self.gguf_scalar_to_np.get(inner[0]), memoryview(self.data), [], offset + 12
            if count > LONGEST_LIST or number is None and inner[0] != gguf.GGUFValueType.STRING:
                raise ValueError('it has a list of lists or one that is too long')
            for _ in range(0 if number else count):
                end = at + 8 + int.from_bytes(raw[at:at + 8], 'little')
                if end > len(raw):
                    raise ValueError('it ends too early')
                parts.append(raw[at + 8:end])
                at = end
            if number:
                parts = [self._get(at, number, count)]
                at += parts[0].nbytes
            return at - offset, parts, [*range(len(parts))], [gguf.GGUFValueType(k) for k in (kind, inner[0])]
    try:
        if os.path.exists(path) and not os.path.isfile(path):           # reading a FIFO or a device can last for ever
            raise ValueError('it is no file')
        with open(path, 'rb') as f:
            magic, version, *counts = struct.unpack('<4sIQQ', f.read(24).ljust(24, b'\0'))
        if magic != b'GGUF':
            raise ValueError('it does not begin with GGUF')
        if version > 3 or max(counts) > 20 * DEEPEST:
            raise ValueError(f'version {version}, {counts[0]} tensors and {counts[1]} keys')
        with np.errstate(all='ignore'):
            reader = Reader(path)
            fields = {key: field.contents() for key, field in reader.fields.items()}
        held, end = {t.name: t for t in reader.tensors}, int(reader.data_offset)
        if wrong := next((t.name for t in held.values() if not 1 <= len(t.shape) <= 4 or 0 in t.shape
                          or t.n_elements > 1 << 40), None):
            raise ValueError(f'{wrong!r} has no possible shape')
        for t in reader.tensors:                    # llama.cpp asks for it too; many tensors at one place would be a bomb
            if t.data_offset != end:
                raise ValueError(f'{t.name!r} does not lie after the tensor before it')
            end += -(-t.n_bytes // int(reader.alignment)) * int(reader.alignment)
        return fields, held
    except OSError as e:
        raise ValueError(f'{path} cannot be read ({e.strerror or e})') from None
    except (ValueError, LookupError, TypeError, ArithmeticError, MemoryError, AttributeError, RuntimeError) as e:
        raise ValueError(f'{path} is damaged or no GGUF file ({_line(e)})') from None


def _line(e):
    """An error in one line without control characters, which names in a file may have."""
    line = f'{e}'.strip().split('\n')[0][:120] or type(e).__name__
    return ''.join(c if c.isprintable() else '\N{REPLACEMENT CHARACTER}' for c in line)


def _field(fields, key, kind, least=0, most=MOST):
    """The value of a key. Raises ValueError if it is missing, of another type or outside its range."""
    value = fields.get(key)
    if type(value) is not kind or kind in (int, float) and not least <= value <= most:
        raise ValueError(f'{key} is {"missing" if value is None else "no possible value"}')
    return value


def read(path):
    """Read a GGUF file of the arch bitnet, bitnet-b1.58 or gpt2: (trainer, dict for its config, state dict, Tokenizer, figures
    of its run). Ternary matrices become packed codes and scales; all others fp32. Raises ValueError."""
    fields, held = opened(path)
    try:
        arch = _field(fields, 'general.architecture', str)
        if arch not in (*ACTS, 'gpt2'):
            raise ValueError(f'its arch is {arch[:40]!r}; the archs bitnet, bitnet-b1.58 and gpt2 can be read')
        tokenizer = _tokenizer(fields)
        figures = folders.figures(**{key: fields[name] for key, name in FIGURES.items() if name in fields})
        config = _config(fields, held, arch)
        used = set()

        def take(name, *shape):
            if name not in held:
                raise ValueError(f'it lacks {name}')
            used.add(name)
            t = held[name]
            if tuple(t.shape.tolist()) != shape[::-1]:
                raise ValueError(f'{name} has the shape {tuple(t.shape.tolist()[::-1])}, needs {shape}')
            array = _package().quants.dequantize(t.data, t.tensor_type)
            if not np.isfinite(array).all():
                raise ValueError(f'{name} has weights that are not finite')
            return torch.from_numpy(np.array(array, dtype=np.float32).reshape(shape))
        table = config['vocab_size'], config['n_embd']
        if 'output.weight' in held and not torch.equal(take('output.weight', *table), take('token_embd.weight', *table)):
            raise ValueError('its head is not its embedding; the trainers have one matrix for both')
        if len(_field(fields, 'tokenizer.ggml.tokens', list)) != table[0]:
            raise ValueError(f'it has {len(fields["tokenizer.ggml.tokens"])} tokens and {table[0]} rows of the embedding')
        state = (_gpt_state if arch == 'gpt2' else _bitnet_state)(config, take, held)
        if left := sorted(held.keys() - used):
            raise ValueError(f'the model has no place for {left[0][:80]!r}')
    except (ValueError, LookupError, TypeError, ArithmeticError, MemoryError, AttributeError, RuntimeError) as e:
        raise ValueError(f'{path} cannot be used ({_line(e)})') from None
    return 'train_gpt' if arch == 'gpt2' else 'train_bitnet', config, state, tokenizer, figures


def _config(fields, held, arch):
    """Config of the trainer's model, as a dict."""
    get = lambda key, kind=int, **limits: _field(fields, f'{arch}.{key}', kind, **({'least': 1} | limits))
    decimal = lambda key: float(str(np.float32(get(key, float, least=1e-12))))          # 1e-5, not its fp32 neighbour
    if 'token_embd.weight' not in held or len(held['token_embd.weight'].shape) != 2:
        raise ValueError('it lacks token_embd.weight')
    c = {'vocab_size': int(held['token_embd.weight'].shape[1]), 'n_layer': get('block_count', most=DEEPEST),
         'n_head': get('attention.head_count'), 'n_embd': get('embedding_length')}
    c['block_size'] = get('context_length', most=MOST * c['n_head'] // c['n_embd'])
    width = 4 * c['n_embd'] if arch == 'gpt2' else get('feed_forward_length')
    groups = fields.get(f'{arch}.attention.head_count_kv', c['n_head'])
    if type(groups) is not int or not 1 <= groups <= c['n_head'] or c['n_head'] % groups or c['n_embd'] % c['n_head'] or (
            arch == 'gpt2' and (groups != c['n_head'] or fields.get('gpt2.feed_forward_length', width) != width)):
        raise ValueError('its sizes of heads and widths do not fit each other')
    if arch == 'gpt2':
        if decimal('attention.layer_norm_epsilon') != 1e-5:
            raise ValueError('train_gpt.py has attention.layer_norm_epsilon = 1e-5 only')
        return c | {'binary_blocks': ()}
    dims = c['n_embd'] // c['n_head']
    scaling = [fields.get(f'{arch}.rope.{key}', plain) for key, plain in (
        ('scaling.type', 'none'), ('scaling.factor', 1.0), ('scale_linear', 1.0), ('dimension_count', dims))]
    if dims % 2 or scaling not in (['none', 1.0, 1.0, dims], ['linear', 1.0, 1.0, dims]):
        raise ValueError('its rotary positions are not those of train_bitnet.py')
    theta = decimal('rope.freq_base') if f'{arch}.rope.freq_base' in fields else 10_000.0
    return c | {'n_kv_head': groups, 'n_ff': width, 'act': ACTS[arch], 'rope_theta': theta,
                'norm_eps': decimal('attention.layer_norm_rms_epsilon')}


def _gpt_state(c, take, held):
    e, state = c['n_embd'], {}
    state['wte.weight'] = state['lm_head.weight'] = take('token_embd.weight', c['vocab_size'], e)
    state['wpe.weight'] = take('position_embd.weight', c['block_size'], e)
    places = {'ln_f': ('output_norm', (e,))}
    for i in range(c['n_layer']):
        for ours, theirs in GPT_NORMS.items():
            places[f'blocks.{i}.{ours}'] = f'blk.{i}.{theirs}', (e,)
        for (ours, theirs), shape in zip(GPT.items(), ((3 * e, e), (e, e), (4 * e, e), (e, 4 * e)), strict=True):
            places[f'blocks.{i}.{ours}'] = f'blk.{i}.{theirs}', shape
    biases = {}
    for ours, (theirs, shape) in places.items():
        state[f'{ours}.weight'], biases[f'{ours}.bias'] = take(f'{theirs}.weight', *shape), take(f'{theirs}.bias', shape[0])
    c['bias'] = any(b.any() for b in biases.values())
    return state | biases if c['bias'] else state


def _bitnet_state(c, take, held):
    """State dict with codes if every matrix is ternary, else with weights."""
    e, ff, rows = c['n_embd'], c['n_ff'], hf.bitnet_rows(SimpleNamespace(**c))
    state, dense = {}, {}
    for i in range(c['n_layer']):
        for ours, (norm, *parts) in BITNET.items():
            name, columns = f'blocks.{i}.{ours}', ff if ours == 'mlp.down_proj' else e
            state[f'{name}.gain'], parts = take(f'blk.{i}.{norm}.weight', columns), [f'blk.{i}.{p}' for p in parts]
            weights = [take(f'{part}.weight', n, columns) for part, n in zip(parts, rows[ours], strict=True)]
            scales = [take(f'{part}.scale', 1) if f'{part}.scale' in held else torch.ones(1) for part in parts]
            sizes = [_size(weight) for weight in weights]
            if None in sizes:
                dense[f'{name}.weight'] = torch.cat([w * s for w, s in zip(weights, scales, strict=True)])
            else:                                   # at once: the fp32 weights of all layers are many times the file
                state[f'{name}.code'] = pack_bits(torch.cat(weights).sign() + 1, 2)
                state[f'{name}.weight_scale'] = torch.cat(scales) * torch.stack(sizes)
    c['quant'] = 'fp' if dense else 'tern'
    for name in [key.removesuffix('.code') for key in state if dense and key.endswith('.code')]:
        codes = unpack_bits(state.pop(f'{name}.code'), 2, len(state[f'{name}.gain'])) - 1.0
        heights = torch.tensor(rows[name.split('.', 2)[2]])
        dense[f'{name}.weight'] = codes * state.pop(f'{name}.weight_scale').repeat_interleave(heights)[:, None]
    state |= dense
    state['wte.weight'], state['norm.weight'] = take('token_embd.weight', c['vocab_size'], e), take('output_norm.weight', e)
    if c['quant'] == 'fp':
        state['lm_head.weight'] = state['wte.weight']
    return state


def _size(weight):
    """s if each weight is -s, 0 or s, else None."""
    s = weight.abs().max()
    return (s if s > 0 else torch.ones(())) if ((weight == 0) | (weight.abs() == s)).all() else None


def compare(path, model, tokenizer, about):
    """(names of the tensors of a file, those whose type, shape or bytes differ from an export of the model, notes of the
    export). Raises ValueError for a file of another model or program."""
    fields, held = opened(path)
    kinds = {number: name for name, number in FILE_TYPES.items()}
    kind, table = kinds.get(fields.get('general.file_type')), held.get('token_embd.weight')
    if not kind or table is None:
        raise ValueError(f'{path} was not written by export.py')
    arch = fields.get('general.architecture')
    if (about['trainer'], arch) not in {(trainer, known) for trainer, known, _ in TYPES}:
        raise ValueError(f'{path} has the arch {str(arch):.40}, and {about["path"]} is a model of {about["trainer"]}.py; type '
                         '--ckpt= and the model of the file')
    notes, ours = [], {}
    kind, head, arch = plan(model, about, kind, table.tensor_type.name, arch)
    for name, own, array in tensors(model, kind, head, arch, notes):
        t = held.get(name)
        ours[name] = t is not None and t.tensor_type.name == own and t.data.shape == array.shape and (
            np.ascontiguousarray(t.data).view(np.uint8) == np.ascontiguousarray(array).view(np.uint8)).all()
    same = all(fields.get(f'tokenizer.ggml.{key}') == value
               for key, value in vocabulary(tokenizer, model.config.vocab_size).items())
    wrong = [n for n, equal in ours.items() if not equal] + sorted(held.keys() - ours) + ['its tokens'] * (not same)
    return sorted(ours), wrong, notes
