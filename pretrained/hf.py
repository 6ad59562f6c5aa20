"""
Hugging Face models with a classification head: load them, make small new ones, tokenize texts, save folders for transformers.
Also loads language models, for ptq.py.

    net, tokenizer, names, fresh = load('distilbert-base-uncased', ['negative', 'positive'])
    net, tokenizer = small(texts, names, n_layer=4, n_head=4, n_embd=128)      # no download
    rows = encode(tokenizer, texts, 128);  batch = collate(tokenizer, rows, 128)

Any encoder or decoder works that has a sequence-classification class in transformers. For other models, such as BitNet b1.58,
LastTokenClassifier puts a linear head on the last token.
"""
import collections
import json
import math
import os
import re

import numpy as np
import torch
import torch.nn as nn

import layers
from common import contents_crc, save_tensors
from pretrained import adapters
from quant import pack_bits, ternarize
from readers import tokens

os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')    # otherwise each fork after its threads start prints a warning
HEAD = 'last_token_head.safetensors'
FLOATS = (torch.float32, torch.bfloat16, torch.float16)             # of stored weights; fp8 has no arithmetic here


def import_transformers():
    """Import transformers without progress bars and warnings."""
    try:
        import transformers
    except ImportError:
        raise ValueError('Hugging Face models need transformers; type: pip install transformers') from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    from huggingface_hub.utils import logging
    logging.set_verbosity_error()                   # it logs every attempt to reach the Hub
    return transformers


class LastTokenClassifier(nn.Module):
    """Classifier with a linear head (n_labels, hidden) on the last token that is not padding; logits (B, n_labels).

    Like the ...ForSequenceClassification classes of transformers, for decoders without one. Padding must be on the right."""
    base_model_prefix = 'backbone'

    def __init__(self, backbone, n_labels):
        super().__init__()
        self.config, self.backbone = backbone.config, backbone
        self.score = nn.Linear(backbone.config.hidden_size, n_labels, bias=False)
        nn.init.normal_(self.score.weight, std=0.02)

    def forward(self, input_ids, attention_mask, **options):
        from transformers.modeling_outputs import SequenceClassifierOutput
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **options).last_hidden_state
        last = attention_mask.sum(1) - 1
        hidden, weight = hidden[torch.arange(len(last), device=last.device), last], self.score.weight
        logits = self.score(hidden if weight is None else hidden.to(weight.dtype))     # None: quantized by ptq.py
        return SequenceClassifierOutput(logits=logits)

    def get_input_embeddings(self):
        return self.backbone.get_input_embeddings()

    def gradient_checkpointing_enable(self, **options):
        self.backbone.gradient_checkpointing_enable(**options)


def function(config):
    """What a model with this config of transformers computes: its config without names, tokens, labels and dropout."""
    ignored = ('_name_or_path', 'architectures', 'transformers_version', 'dtype', 'torch_dtype', 'id2label', 'label2id',
               'use_cache', 'problem_type')
    found = {k: v for k, v in config.to_dict().items() if k not in ignored and not k.endswith('token_id') and 'drop' not in k}
    return json.loads(json.dumps(found, default=str))


ONLINE = dict(quant_method='bitnet', linear_class='autobitlinear', quantization_mode='online')   # rounds plain weights


def _bitnet(config):
    """Take the quantization of transformers out of a config, so that it loads plain layers. Returns it as a dict if it is that
    of a BitNet, and None if there is none. Raises ValueError for any other."""
    how = getattr(config, 'quantization_config', None)
    if how is None:
        return None
    how = how if isinstance(how, dict) else how.to_dict()
    how = {'quant_method': 'bitnet', 'linear_class': 'bitlinear', 'quantization_mode': 'offline'} | how     # its defaults
    if how['quant_method'] != 'bitnet' or how.get('use_rms_norm'):
        raise ValueError(f'its weights are quantized already ({how["quant_method"]}); give a model with plain weights')
    del config.quantization_config
    return how


def _stored(name, ending):
    """{key: tensor} of the weights of a Hub id or folder whose keys end with `ending`."""
    from safetensors import safe_open
    from transformers.utils import cached_file
    path = cached_file(name, 'model.safetensors.index.json', _raise_exceptions_for_missing_entries=False)
    parts = ['model.safetensors'] if path is None else sorted(set(json.load(open(path))['weight_map'].values()))
    found = {}
    for part in parts:
        with safe_open(cached_file(name, part), 'pt') as f:
            found |= {key: f.get_tensor(key) for key in f.keys() if key.endswith(ending)}       # noqa: SIM118  not a dict
    return found


def _load_plain(auto, name, config, weights, **options):
    """A model of transformers with all its weights, or random ones. The ternary layers of a BitNet are ours: they round the
    weights in each pass, and the inputs to int8. Raises ValueError if its files lack weights."""
    how = _bitnet(config)
    if not weights or how is None:
        net = _whole(auto, name, config=config, **options) if weights else auto.from_config(config).to(options['dtype'])
    else:
        net = _whole(auto, name, config=config, ignore_mismatched_sizes=True, **options)       # packed ones are set below
    if how is None:
        return net
    kept = how.get('modules_to_not_convert') or ['lm_head']
    linears = [n for n, m in net.named_modules() if type(m) is nn.Linear and not any(f'.{k}.' in f'.{n}.' for k in kept)]
    if weights and how['quantization_mode'] == 'offline':
        stored = _stored(name, '.weight_scale') | _stored(name, '_proj.weight')
        for n in linears:
            linear = net.get_submodule(n)
            key = next((k for k in (n, f'{net.base_model_prefix}.{n}') if f'{k}.weight_scale' in stored), n)
            linear.weight.data = _latent(*_ternary(stored, key, linear.weight.shape, how)).to(linear.weight.dtype)
    layers.convert(net, {n: ('tern', dict(norm=False)) for n in linears}, verbose=False)
    config.quantization_config = net.config.quantization_config = ONLINE | {'modules_to_not_convert': kept}
    return net


def _ternary(state, name, shape, how):
    """(int8 codes (rows, columns), scale) of the ternary matrix `name` in a state dict of transformers. how: see _bitnet()."""
    if how['quantization_mode'] == 'online':
        codes, scale = ternarize(finite(state, f'{name}.weight', shape))
        return codes, scale[0]
    weight, stored, codes = _get(state, f'{name}.weight'), _get(state, f'{name}.weight_scale'), torch.tensor(2)
    if weight.dtype == torch.uint8 and weight.shape == (-(-shape[0] // 4), shape[1]):      # see pack_rows()
        codes = torch.cat([(weight >> shift & 3).to(torch.int8) - 1 for shift in (0, 2, 4, 6)])[:shape[0]]
    elif weight.dtype in (torch.int8, *FLOATS) and weight.shape == shape and torch.equal(weight.to(torch.int8), weight):
        codes = weight.to(torch.int8)
    inverse = how['linear_class'] == 'bitlinear'
    scale = stored.float().flatten()[0] if stored.dtype in FLOATS and stored.numel() == 1 else torch.tensor(0.0)
    scale = 1 / scale if inverse else scale
    if not (codes.min() > -2 and codes.max() < 2 and 0 < scale.item() < math.inf):
        raise ValueError(f'{name} holds no ternary weights of {shape[0]} x {shape[1]} and one scale')
    exact = how.get('scales') if inverse else None  # 1 / (1 / s) often differs from s in the last bit
    exact = exact.get(name) if isinstance(exact, dict) else None
    return codes, torch.tensor(exact) if isinstance(exact, float) and abs(exact / scale.item() - 1) < 1e-6 else scale


def pack_rows(codes):
    """Pack ternary codes (rows, columns) as transformers does: uint8 (rows / 4, columns), the first quarter of the rows in the
    lowest bits. Raises ValueError if the rows are no multiple of 4."""
    if len(codes) % 4:
        raise ValueError(f'{len(codes)} rows are no multiple of 4')
    quarters = (codes + 1).to(torch.uint8).chunk(4)
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6


def bf16_with_codes(weight):
    """Round a latent matrix to bf16 so that its ternary codes stay. Where the nearest value has another code, the next value
    towards the border between the codes is taken."""
    codes, low = ternarize(weight)[0], weight.bfloat16()
    for _ in range(8):
        now = ternarize(low)[0]
        if torch.equal(now, codes):
            return low
        step = (codes.abs() - now.abs()).to(torch.int16)               # of the magnitude, in its last bit
        low = (low.view(torch.int16) + step).view(torch.bfloat16)
    raise ValueError('a matrix cannot be rounded to bf16 without a change of its codes; type --type=fp32')


def _latent(codes, scale):
    """Weights that TernaryLinear rounds to these codes and this scale. Divided by the share of nonzero ones, mean|w| is it."""
    return codes.float() * (scale / (codes != 0).float().mean().clamp(min=1e-9))


def _get(state, name):
    if name not in state:
        raise ValueError(f'the weights there lack {name}')
    return state[name]


def finite(state, name, shape):
    """The tensor `name` of a state dict: fp32, bf16 or fp16, of this shape, all numbers finite. Raises ValueError."""
    t = _get(state, name)
    if t.shape != shape or t.dtype not in FLOATS or not layers.all_finite([t]):
        raise ValueError(f'{name} is no finite {"matrix" if len(shape) == 2 else "vector"} of {" x ".join(map(str, shape))} '
                         'in fp32, bf16 or fp16')
    return t


def head_parameters(net):
    """{name: parameter} of the classification head: of everything outside of the backbone, and of a new pooler inside it."""
    new = getattr(net, 'new_modules', ())
    return {n: p for n, p in net.named_parameters() if not n.startswith(f'{net.base_model_prefix}.') or n.startswith(new)}


def head_modules(net):
    """Names of the modules that hold the head_parameters(), the outermost ones, as peft's modules_to_save needs them."""
    new = getattr(net, 'new_modules', ())
    return sorted({next((m.rstrip('.') for m in new if n.startswith(m)), n.partition('.')[0]) for n in head_parameters(net)})


def _whole(auto, name, **options):
    """auto.from_pretrained(), which gives random values to weights that the files lack; here this is a ValueError. A bare model
    may lack its pooler, as masked language models do."""
    net, info = auto.from_pretrained(name, output_loading_info=True, **options)
    if missing := sorted(k for k in info['missing_keys'] if not (auto.__name__ == 'AutoModel' and 'pooler.' in k)):
        raise ValueError(f'the weights there lack {missing[0]}')
    return net


def load(name, names, dtype=torch.float32, weights=True):
    """Load a sequence classifier from a Hub id or a folder. Returns (net, tokenizer, names, fresh).

    names: list of str, the labels in the order of their ids. A model trained for the same names, in any order and case, keeps
    its head and its order, in which the names are returned. Any other model gets a new head, and fresh is True. A folder of
    LoRA adapters is its base model with the adapters merged.
    weights=False: random weights from torch's generator. Raises a one-line ValueError if the model cannot be used.
    """
    t = import_transformers()
    if adapters.is_adapters(name):
        return _load_adapted(name, names, dtype, weights)
    try:
        config, tokenizer = t.AutoConfig.from_pretrained(name), t.AutoTokenizer.from_pretrained(name)
        config.use_cache = False
        # microsoft/bitnet-b1.58-2B-4T-bf16 has one, but its weights are plain bf16; our ternary layers are used below
        if (how := _bitnet(config)) and (config.model_type, how['quantization_mode']) != ('bitnet', 'online'):
            raise ValueError('its weights are quantized already; give a model with plain weights')
        own = [str(config.id2label[i]) for i in range(config.num_labels)]
        same = matched(own, names) is not None
        names = matched(own, names) or list(names)
        config.num_labels = len(names)
        config.id2label, config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
        if len(tokenizer) <= len(tokenizer.all_special_tokens):         # transformers returns an empty one if there is none
            raise ValueError('there is no tokenizer')
        if tokenizer.pad_token is None and tokenizer.eos_token is None:
            raise ValueError('its tokenizer has no padding token and no end token')
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = tokenizer.truncation_side = 'right'
        config.pad_token_id = tokenizer.pad_token_id
        if type(config) in t.AutoModelForSequenceClassification._model_mapping:
            auto, info = t.AutoModelForSequenceClassification, {}
            if weights:
                net, info = auto.from_pretrained(name, config=config, dtype=dtype, output_loading_info=True,
                                                 ignore_mismatched_sizes=True)
            else:
                net = auto.from_config(config).to(dtype)
            head = head_parameters(net)
            lost = {key if isinstance(key, str) else key[0] for kind in ('missing_keys', 'mismatched_keys')
                    for key in info.get(kind, ())}
            # A masked language model has no pooler: it becomes a new one, and part of the head.
            net.new_modules = tuple({n[:n.index('pooler') + 7] for n in lost - head.keys() if '.pooler.' in n})
            head = head_parameters(net)
            if lost - head.keys():
                raise ValueError(f'the weights there lack {sorted(lost - head.keys())[0]}')
            fresh = not weights or bool(lost) or not same
            if fresh and weights:
                for p in head.values():             # otherwise transformers would skip their initialization
                    p._is_hf_initialized = False
                for module in dict.fromkeys(n.rpartition('.')[0] for n in head):
                    net._init_weights(net.get_submodule(module))
        else:
            net = (_whole(t.AutoModel, name, config=config, dtype=dtype) if weights else
                   t.AutoModel.from_config(config).to(dtype))
            net, path = LastTokenClassifier(net, len(names)), os.path.join(name, HEAD)
            fresh = not (weights and same and os.path.isfile(path))
            if not fresh:
                from safetensors import safe_open
                with safe_open(path, 'pt') as f:
                    score, header = {'weight': f.get_tensor('weight')}, f.metadata() or {}
                if header.get('crc32', contents_crc(score)) != contents_crc(score):
                    raise ValueError(f'{path} is damaged: it does not match its checksum')
                net.score.load_state_dict(score)
    except Exception as e:                          # noqa: BLE001  transformers raises many types; all mean: not usable
        raise ValueError(f'cannot load model {name!r}: {_why(e)}; give a Hub id or a folder with config.json, tokenizer and '
                         'weights') from None
    if config.model_type == 'bitnet':               # ternary weights and int8 activations, rounded in each pass
        layers.convert(net, {'*layers.*_proj': ('tern', dict(norm=False))}, verbose=False)
    return net, tokenizer, names, fresh


def check_fits(net, tokenizer, max_len, pairs=False):
    """Raises ValueError unless `net` can read every text that `tokenizer` cuts to max_len tokens. It is tried: position tables
    of RoBERTa and its relatives hold fewer tokens than max_position_embeddings says."""
    rows, ids = _rows(net), max(tokenizer.get_vocab().values()) + 1
    if rows and ids > rows:
        raise ValueError(f'the tokenizer has {ids:,} tokens, the embedding of this model {rows:,} rows; type --resize=True')
    special = tokenizer.num_special_tokens_to_add(pair=pairs)
    if max_len <= special:
        raise ValueError(f'max_len={max_len} leaves no room for text: {special} tokens are special; type a higher --max_len')
    known = getattr(net.config, 'max_position_embeddings', None) or max_len       # None or -1: no table of positions
    if 0 < known < max_len:
        raise ValueError(f'this model has {known} positions, max_len={max_len} needs more')
    few = longest(net, lambda n: texts_of(tokenizer, n, pairs), max_len, special)
    if few < max_len:
        raise ValueError(f'this model reads {few} tokens at most, max_len={max_len} needs more')


def texts_of(tokenizer, n, pairs=False):
    """A batch of one text, or one pair, that is cut to n tokens."""
    return collate(tokenizer, encode(tokenizer, [('a b c d e f g ' * n,) * (1 + pairs)], n), n)


@torch.no_grad()
def longest(net, batch_of, most, few=0):
    """The largest n, up to `most`, for which the model runs on batch_of(n). Position tables of RoBERTa and its relatives hold
    fewer tokens than max_position_embeddings says, so it is tried. Raises ValueError if it is not above `few`."""
    mode, errors = net.training, ['']

    def runs(n):
        try:
            net.eval()(**batch_of(n))
            return True
        except (IndexError, RuntimeError, ValueError) as e:
            errors.append(_why(e))
            return False
        finally:
            net.train(mode)
    if most > few and runs(most):
        return most
    least, many = few, most                         # it can read `few` tokens, and not `many`
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if runs(middle) else (few, middle)
    if few == least or not re.search('index|size|shape|dimension|position|length', errors[1]):
        raise ValueError(f'this model cannot read these texts: {errors[1]}')
    return few


def _rows(net):
    """Number of rows of the embedding; 0 if there is no table, as in CANINE, which hashes characters."""
    try:
        return getattr(net.get_input_embeddings(), 'num_embeddings', 0)
    except NotImplementedError:
        return 0


def resize(net, tokenizer):
    """Add rows to the embedding for tokens that have none, as transformers does. Returns whether there were any."""
    bare, wanted = getattr(net, 'backbone', net), max(tokenizer.get_vocab().values()) + 1
    more = 0 < _rows(bare) < wanted
    if more:
        bare.resize_token_embeddings(wanted)
    return more


def matched(theirs, names):
    """`names` in the order of `theirs`, the labels of a model, which may differ in case. None if these are other labels."""
    fold = str.lower if len({n.lower() for n in names}) == len(names) else str
    known = {fold(n): n for n in names}
    return [known[fold(n)] for n in theirs] if sorted(map(fold, theirs)) == sorted(known) else None


def _load_adapted(folder, names, dtype, weights):
    """load() of a folder of LoRA adapters. peft does not save the names of the classes; then they are those of the base model,
    or `names` in their order."""
    base, labels, whole, kind = adapters.base_of(folder)
    own = labels_of(base)
    kept = len(own) == len(labels or names)         # then a head that the adapters lack is that of the base
    net, tokenizer, order, fresh = load(base, own if kept else names, weights=weights)
    if net.config.model_type == 'bitnet':
        raise ValueError(f'{folder}: adapters do not merge into the ternary weights of a BitNet; type --out_dir=... of its run')
    labels = labels or (order if matched(order, names) else names)
    if not matched(labels, names):
        raise ValueError(f'{folder} was trained for the labels {", ".join(labels)}, not {", ".join(names)}')
    names = matched(labels, names)
    head = head_parameters(plain_linears(net))
    for n, m in net.named_modules() if kind else ():                # the adapters were trained over quantized weights
        if layers.is_linear(m) and f'{n}.weight' not in head:
            m.weight.data = layers.as_kind(m, kind, {}, True).effective_weight()
    adapters.load_adapters(net, folder)
    adapters.merge_all(net).to(dtype)
    net.config.id2label, net.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
    return net, tokenizer, names, fresh and not head_parameters(net).keys() <= whole


def labels_of(name):
    """Names of the classes of a classifier, a Hub id or a folder; of adapters too. Raises ValueError."""
    if adapters.is_adapters(name):
        base, labels, *_ = adapters.base_of(name)
        return labels or labels_of(base)
    try:
        config = import_transformers().AutoConfig.from_pretrained(name)
    except Exception as e:                          # noqa: BLE001  see load()
        raise ValueError(f'cannot load model {name!r}: {_why(e)}') from None
    return [str(config.id2label[i]) for i in range(config.num_labels)]


def kind_of(name):
    """Whether a Hub id or folder was saved as a 'classifier' or as a 'causal' language model. Raises ValueError."""
    t = import_transformers()
    if adapters.is_adapters(name):
        base, labels, *_ = adapters.base_of(name)
        return 'classifier' if labels or adapters.task_of(name) == 'SEQ_CLS' else kind_of(base)
    try:
        config = t.AutoConfig.from_pretrained(name)
    except Exception as e:                          # noqa: BLE001  see load()
        raise ValueError(f'cannot load model {name!r}: {_why(e)}; give a run\'s folder, one of its files, a Hub id or a folder '
                         'with config.json, tokenizer and weights') from None
    saved = ' '.join(getattr(config, 'architectures', None) or [])
    return 'classifier' if 'SequenceClassification' in saved or os.path.isfile(os.path.join(name, HEAD)) else 'causal'


def _why_not_causal(t, config):
    """Why a model with this config is no causal language model, or ''."""
    saved = ' '.join(getattr(config, 'architectures', None) or []) or type(config).__name__
    if getattr(config, 'is_encoder_decoder', False):
        return f'it is an encoder-decoder ({saved})'
    masked = type(config) in t.AutoModelForMaskedLM._model_mapping and not getattr(config, 'is_decoder', False)
    if masked or 'MaskedLM' in saved:
        return f'it is a masked language model or an encoder ({saved})'
    other = re.search('For(Token|Question|Multiple|Next|Image|Audio)', saved)
    if other or type(config) not in t.AutoModelForCausalLM._model_mapping:
        return f'it is no language model ({saved})'
    return ''


@torch.no_grad()
def _sees_ahead(net):
    """Whether a logit depends on tokens after its own, as those of masked language models do."""
    ids = torch.arange(8)[None] % net.get_input_embeddings().num_embeddings
    other = torch.cat([ids[:, :-1], torch.zeros_like(ids[:, :1])], 1)
    one, two = (net.eval()(input_ids=x).logits[:, :-1].float() for x in (ids, other))
    return not torch.allclose(one, two, rtol=0, atol=1e-4 * one.std().item(), equal_nan=True)


def load_causal(name, weights=True):
    """Load a language model in fp32 and evaluation mode: (net, tokenizer). A folder of LoRA adapters is its base model with the
    adapters merged. weights=False: random weights. Raises ValueError."""
    t = import_transformers()
    if adapters.is_adapters(name):
        net, tokenizer = load_causal(adapters.base_of(name)[0], weights)
        adapters.load_adapters(plain_linears(net), name)
        return adapters.merge_all(net), tokenizer
    try:
        config = t.AutoConfig.from_pretrained(name)
        why = _why_not_causal(t, config)
        if not why:
            tokenizer = t.AutoTokenizer.from_pretrained(name)
            net = _load_plain(t.AutoModelForCausalLM, name, config, weights, dtype=torch.float32).eval()
            why = 'its logits depend on later tokens' * _sees_ahead(net)
    except Exception as e:                          # noqa: BLE001  see load()
        raise ValueError(f'cannot load model {name!r}: {_why(e)}; give a Hub id or a folder with config.json, tokenizer and '
                         'weights') from None
    if why:
        raise ValueError(f'{name} has no loss of the next token: {why}; train a classifier with finetune_cls.py '
                         f'--model={name} and type --ckpt= of that folder')
    return net, tokenizer


def load_bare(name):
    """Load any model of transformers without its head, in fp32. Raises ValueError."""
    t = import_transformers()
    try:
        return _load_plain(t.AutoModel, name, t.AutoConfig.from_pretrained(name), True, dtype=torch.float32)
    except Exception as e:                          # noqa: BLE001  see load()
        raise ValueError(f'cannot load model {name!r}: {_why(e)}; give a folder with config.json and weights') from None


def plain_linears(net):
    """Replace GPT-2's Conv1D and Falcon's FalconLinear by nn.Linear, in place, so that they can be quantized and get adapters.
    Returns net. save() writes the weights of a Conv1D as the class expects them."""
    net.transposed = getattr(net, 'transposed', ()) + tuple(
        f'{n}.weight' for n, m in net.named_modules() if type(m).__name__ == 'Conv1D')
    for path, module in list(net.named_modules()):
        name = type(module).__name__
        if name in ('Conv1D', 'FalconLinear'):
            weight = module.weight.detach().T.contiguous() if name == 'Conv1D' else module.weight.detach()
            with torch.device('meta'):
                linear = nn.Linear(weight.shape[1], weight.shape[0])
            linear.weight, linear.bias = nn.Parameter(weight), module.bias
            layers.set_module(net, path, linear)
    return net


def _why(error):
    return f'{error}'.strip().split('\n')[0][:200] or type(error).__name__


def small(texts, names, *, n_layer, n_head, n_embd, dropout, vocab_size, max_len):
    """Make a small DistilBERT with random weights, and a WordPiece tokenizer trained on texts: (net, tokenizer). texts: tuples
    of str. The vocabulary has at most vocab_size entries. The same texts give the same vocabulary."""
    from tokenizers import BertWordPieceTokenizer
    t, special = import_transformers(), ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
    wordpiece = BertWordPieceTokenizer(lowercase=True)
    parts = [part for text in texts for part in text]
    # The trainer numbers the letters inside words in the random order of a hash table, and breaks ties by these numbers.
    # Listed as special tokens, the letters get fixed numbers.
    count = collections.Counter(c for part in parts for c in wordpiece.normalize(part) if not c.isspace())
    inside = sorted(f'##{c}' for c, _ in sorted(count.items(), key=lambda item: (-item[1], item[0]))[:1000])
    wordpiece.train_from_iterator(parts, vocab_size=vocab_size, min_frequency=2, show_progress=False,
                                  special_tokens=special + inside)
    wordpiece = BertWordPieceTokenizer(wordpiece.get_vocab(), lowercase=True)
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=wordpiece._tokenizer, model_max_length=max_len, model_input_names=['input_ids', 'attention_mask'],
        **{f'{s}_token': f'[{s.upper()}]' for s in ('unk', 'sep', 'pad', 'cls', 'mask')})
    config = t.DistilBertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=max_len, n_layers=n_layer, n_heads=n_head, dim=n_embd,
        hidden_dim=4 * n_embd, dropout=dropout, attention_dropout=dropout, seq_classif_dropout=dropout,
        pad_token_id=tokenizer.pad_token_id, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})
    return t.AutoModelForSequenceClassification.from_config(config), tokenizer


def encode(tokenizer, texts, max_len):
    """Tokenize texts (tuples of one or two str) to a list of {key: int32 array}, cut to max_len, the longer of a pair first."""
    rows = []
    for i in range(0, len(texts), 1000):
        columns = [list(column) for column in zip(*texts[i:i + 1000], strict=True)]
        encoded = tokenizer(*columns, truncation=True, max_length=max_len, padding=False, return_attention_mask=False)
        rows += [{key: np.asarray(values[j], dtype=np.int32) for key, values in encoded.items()}
                 for j in range(len(columns[0]))]
    if any(len(row['input_ids']) == 0 for row in rows):             # a decoder's tokenizer returns no token for an empty text
        for row in rows:
            if len(row['input_ids']) == 0:
                row.update({key: np.zeros(1, np.int32) for key in row}, input_ids=np.int32([tokenizer.pad_token_id]))
    return rows


def collate(tokenizer, rows, max_len, pad_to_max=False):
    """Pad rows of encode() to {key: int64 (B, T)}. T: the longest, rounded up to a multiple of 8, or max_len for pad_to_max."""
    longest = max_len if pad_to_max else min(max_len, -(-max(len(row['input_ids']) for row in rows) // 8) * 8)
    batch = {}
    for key in rows[0]:
        fill = tokenizer.pad_token_id if key == 'input_ids' else 0
        batch[key] = torch.full((len(rows), longest), fill, dtype=torch.int64)
        for i, row in enumerate(rows):
            batch[key][i, :len(row[key])] = torch.from_numpy(row[key])
    lengths = torch.tensor([len(row['input_ids']) for row in rows])
    batch['attention_mask'] = (torch.arange(longest) < lengths[:, None]).long()
    return batch


def save(net, tokenizer, folder):
    """Save the model and its tokenizer as a folder for from_pretrained() and load(). LowRankLinear layers are saved as dense
    weights, with their factors in another file; ternary layers as their unrounded weights. Raises OSError."""
    from safetensors import SafetensorError
    state, factors = {}, {}
    for key, tensor in net.state_dict().items():
        module, _, leaf = key.rpartition('.')
        layer = net.get_submodule(module)
        if isinstance(layer, layers.LowRankLinear) and leaf != 'bias':
            factors[key] = tensor.cpu().contiguous()
            key, tensor = f'{module}.weight', ((layer.A * layer.c) @ layer.B).detach()
        state[key] = (tensor.T if key in getattr(net, 'transposed', ()) else tensor).cpu().contiguous()
    os.makedirs(folder, exist_ok=True)
    write = lambda name, it: save_tensors(it, os.path.join(folder, name), {'crc32': contents_crc(it)})
    bare = net.backbone if isinstance(net, LastTokenClassifier) else net
    prefix = f'{net.base_model_prefix}.' if bare is not net else ''
    if net.config.model_type == 'bitnet':           # without it, readers would not round the weights
        bare.config.quantization_config = dict(quant_method='bitnet', linear_class='autobitlinear', quantization_mode='online')
    try:
        bare.save_pretrained(folder, state_dict={k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        save_tokenizer(tokenizer, folder)
        if bare is not net:
            write(HEAD, {'weight': state['score.weight']})
        if factors:
            write('low_rank.safetensors', factors)
    except SafetensorError as e:                    # safetensors raises this for a full disk
        raise OSError(f'could not write {folder}: {e}') from None
    finally:
        bare.config.__dict__.pop('quantization_config', None)


def save_tokenizer(tokenizer, folder):
    """Save a tokenizer. Raises OSError also where the library raises another type, e.g. for a full disk."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as e:                          # noqa: BLE001  the library raises no narrower type
        raise OSError(f'could not write the tokenizer to {folder}: {e}') from None


# Layers of train_bitnet.py's block: the RMSNorm and the matrices of transformers that each contains.
BITNET = {'attn.qkv_proj': ('input_layernorm', 'self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'),
          'attn.o_proj': ('self_attn.attn_sub_norm', 'self_attn.o_proj'),
          'mlp.gate_up_proj': ('post_attention_layernorm', 'mlp.gate_proj', 'mlp.up_proj'),
          'mlp.down_proj': ('mlp.ffn_sub_norm', 'mlp.down_proj')}


def bitnet_rows(c):
    """{layer of train_bitnet.py: rows of each of its matrices}. c: BitNetConfig."""
    kv = c.n_embd // c.n_head * c.n_kv_head
    return {'attn.qkv_proj': (c.n_embd, kv, kv), 'attn.o_proj': (c.n_embd,), 'mlp.gate_up_proj': (c.n_ff, c.n_ff),
            'mlp.down_proj': (c.n_embd,)}


def bitnet_layers(c):
    """Yield (our name, name of the norm, {name of a matrix: its (rows, columns)}) for each layer. c: BitNetConfig."""
    rows = bitnet_rows(c)
    for i in range(c.n_layer):
        for name, (norm, *parts) in BITNET.items():
            at, columns = f'model.layers.{i}.', c.n_ff if name == 'mlp.down_proj' else c.n_embd
            yield f'blocks.{i}.{name}', at + norm, {at + p: (n, columns) for p, n in zip(parts, rows[name], strict=True)}


def bitnet_state(state, c):
    """Convert a state dict of train_bitnet.py's BitNet, or a dict of its gradients, to the names of transformers'
    BitNetForCausalLM. Fused tensors are split. c: BitNetConfig."""
    out = {'model.embed_tokens.weight': state['wte.weight'], 'lm_head.weight': state['wte.weight'],
           'model.norm.weight': state['norm.weight']}
    for ours, norm, parts in bitnet_layers(c):
        out[f'{norm}.weight'] = state[f'{ours}.gain']
        split = state[f'{ours}.weight'].split([rows for rows, _ in parts.values()])
        out |= {f'{part}.weight': t for part, t in zip(parts, split, strict=True)}
    return out


def from_bitnet(state, c, how=None, packed=True, done=lambda t: None):
    """Convert tensors of a BitNetForCausalLM to a state dict of train_bitnet.py's BitNet: the inverse of bitnet_state().

    how: the quantization of bitnet_config(); None: full precision. packed: ternary layers as codes and scales, bit for bit;
    else latent weights. Other tensors keep their dtype, norms become fp32. `lm_head.weight` is in the result if it is not tied.
    done(t) is called with each stored matrix that the result does not use. Raises a ValueError that names the tensor."""
    table, used = (c.vocab_size, c.n_embd), {'model.embed_tokens.weight', 'model.norm.weight', 'lm_head.weight'}
    out = {'wte.weight': finite(state, 'model.embed_tokens.weight', table),
           'norm.weight': finite(state, 'model.norm.weight', table[1:]).float()}
    if 'lm_head.weight' in state and not torch.equal(finite(state, 'lm_head.weight', table), out['wte.weight']):
        out['lm_head.weight'] = state['lm_head.weight']
    for ours, norm, parts in bitnet_layers(c):
        out[f'{ours}.gain'] = finite(state, f'{norm}.weight', parts[next(iter(parts))][1:]).float()
        used |= {f'{norm}.weight', *(f'{part}.weight' for part in parts), *(f'{part}.weight_scale' for part in parts)}
        if how is None:
            out[f'{ours}.weight'] = torch.cat([finite(state, f'{part}.weight', shape) for part, shape in parts.items()])
        elif packed:
            codes, scales = zip(*(_ternary(state, part, shape, how) for part, shape in parts.items()), strict=True)
            out |= {f'{ours}.code': pack_bits(torch.cat(codes) + 1, 2), f'{ours}.weight_scale': torch.stack(scales)}
        else:
            out[f'{ours}.weight'] = torch.cat([_latent(*_ternary(state, part, shape, how)) for part, shape in parts.items()])
        for part in parts:
            done(state[f'{part}.weight'])
    if left := sorted(k for k in state.keys() - used if not k.endswith('rotary_emb.inv_freq')):
        raise ValueError(f'the model has no place for {left[0]}')
    return out


def bitnet_config(folder):
    """Read config.json of a BitNetForCausalLM: (dict for train_bitnet.py's BitNetConfig, quantization for from_bitnet(), the
    whole config). Needs no transformers. Raises a ValueError that names what this model cannot do."""
    about = read_config(folder)
    try:
        kind, made = about.get('model_type'), (about.get('architectures') or ['BitNetForCausalLM'])[0]
        if kind == 'llama' and {'weight_bits', 'input_bits'} <= about.keys():     # like 1bitLLM/bitnet_b1_58-large
            about = dict(hidden_act='silu', rope_theta=10_000.0, rms_norm_eps=1e-6) | about | {'quantization_config': ONLINE}
            return *_bitnet_shape(about), about
        if (kind, made) == ('bitnet', 'BitNetForCausalLM'):
            return *_bitnet_shape(about), about
        if kind == 'llama' and about.get('quantization_config'):
            raise ValueError(f'{made} has no RMSNorm of its own before o_proj and down_proj, and the layers here have one')
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as e:
        raise ValueError(f'{folder}/config.json cannot be used: {_why(e)}') from None
    if kind == 'gpt2':
        name = os.path.basename(os.path.abspath(folder))
        raise ValueError(f'{folder} holds gpt2; first type: python export.py --from={folder} --out=out/{name}')
    what = ' '.join(f'{made if kind == "bitnet" else kind!s:.40}'.split())
    raise ValueError(f'{folder} holds {what}; of Hugging Face folders only BitNetForCausalLM runs here. '
                     'ptq.py reads others, and train_gpt.py --init_from those of gpt2')


def read_config(folder):
    """config.json of a folder, a dict. Raises ValueError."""
    try:
        for entry in os.scandir(folder):            # reading a FIFO or a device can last for ever
            if os.path.exists(entry) and not (os.path.isfile(entry) or os.path.isdir(entry)):
                raise ValueError(f'{entry.name} beside it is no file')
        with open(os.path.join(folder, 'config.json'), encoding='utf-8') as f:
            about = json.load(f)
        if not isinstance(about, dict):
            raise ValueError('it holds no table')
        return about
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f'{folder}/config.json cannot be used: {getattr(e, "strerror", None) or _why(e)}') from None


def open_bitnet(folder):
    """Open a folder of BitNetForCausalLM: (dict for BitNetConfig, quantization for from_bitnet(), Tokenizer, {name: mapped
    tensor}). A tied head is not among the tensors. Raises ValueError."""
    shape, how, about = bitnet_config(folder)
    tokenizer, stored = tokens.of_folder(folder, about | shape), mapped_state(folder)
    if about.get('tie_word_embeddings'):
        stored.pop('lm_head.weight', None)
    elif 'lm_head.weight' not in stored:
        raise ValueError(f'{folder} has tie_word_embeddings=False and no lm_head.weight')
    if (last := f'model.layers.{shape["n_layer"] - 1}.input_layernorm.weight') not in stored:
        raise ValueError(f'{folder}: the weights there lack {last}')       # before millions of layers are made
    return shape, how, tokenizer, stored


def _bitnet_shape(about):
    """The first two results of bitnet_config()."""
    sizes = {'vocab_size': 128_256, 'max_position_embeddings': 2048, 'num_hidden_layers': 30, 'num_attention_heads': 20,
             'hidden_size': 2560, 'intermediate_size': 6912} | about
    sizes['num_key_value_heads'] = about.get('num_key_value_heads') or sizes['num_attention_heads']
    ours = {'vocab_size': 'vocab_size', 'block_size': 'max_position_embeddings', 'n_layer': 'num_hidden_layers',
            'n_head': 'num_attention_heads', 'n_kv_head': 'num_key_value_heads', 'n_embd': 'hidden_size',
            'n_ff': 'intermediate_size'}
    shape = {key: sizes[name] for key, name in ours.items()}
    for key, value in shape.items():
        if type(value) is not int or not 1 <= value < 1 << 24:
            raise ValueError(f'{ours[key]}={value!r} is no size')
    rope, how = (about.get('rope_scaling') or {}) | (about.get('rope_parameters') or {}), about.get('quantization_config')
    act, width = about.get('hidden_act', 'relu2'), about.get('head_dim') or shape['n_embd'] // shape['n_head']
    theta, eps = float(rope.get('rope_theta', about.get('rope_theta', 500_000.0))), float(about.get('rms_norm_eps', 1e-5))
    needs = [('rope_type', rope.get('rope_type', rope.get('type', 'default')), ['default']),
             ('rope_theta', theta, [theta] * (1e-9 < theta < math.inf)), ('rms_norm_eps', eps, [eps] * (0 <= eps < math.inf)),
             ('weight_bits', about.get('weight_bits', 1), [1]), ('input_bits', about.get('input_bits', 8), [8]),
             ('max_position_embeddings', shape['block_size'], range((1 << 26) // max(1, width))),
             ('attention_bias', about.get('attention_bias', False), [False]), ('hidden_act', act, ['relu2', 'silu']),
             ('head_dim', width, [shape['n_embd'] / shape['n_head']] if width % 2 == 0 else []),
             ('num_key_value_heads', shape['n_kv_head'], [n for n in (shape['n_kv_head'],) if shape['n_head'] % n == 0])]
    if how is not None:                             # with the defaults of transformers
        how = dict(quant_method='bitnet', linear_class='bitlinear', quantization_mode='offline', use_rms_norm=False) | how
        modes = ['offline'] if how['linear_class'] == 'bitlinear' else ['offline', 'online']
        needs += [('quant_method', how['quant_method'], ['bitnet']), ('use_rms_norm', how['use_rms_norm'], [False]),
                  ('linear_class', how['linear_class'], ['bitlinear', 'autobitlinear']),
                  ('quantization_mode', how['quantization_mode'], modes),
                  ('modules_to_not_convert', how.get('modules_to_not_convert') or ['lm_head'], [['lm_head']])]
    for key, value, known in needs:
        if value not in known:
            raise ValueError(f'{key}={value!r} is not possible here')
    return shape | {'act': act, 'norm_eps': eps, 'quant': 'fp' if how is None else 'tern', 'rope_theta': theta}, how


def mapped_state(folder):
    """{name: tensor} of a folder's model.safetensors, or of the files that its index names. The tensors are mapped, not read.
    The norms of 1bitLLM's models get the names of transformers. Raises ValueError."""
    from safetensors import SafetensorError, safe_open
    named = lambda name: name.replace('.inner_attn_ln.', '.attn_sub_norm.').replace('.ffn_layernorm.', '.ffn_sub_norm.')
    index, state, part = os.path.join(folder, 'model.safetensors.index.json'), {}, 'model.safetensors.index.json'
    try:
        parts = ['model.safetensors']
        if os.path.isfile(index):
            with open(index, encoding='utf-8') as f:
                parts = sorted(set(json.load(f)['weight_map'].values()))
            if any(os.path.basename(name) != name or not name.isprintable() or len(name) > 255 for name in parts):
                raise ValueError('a path in its index')
        for part in parts:
            with safe_open(os.path.join(folder, part), 'pt') as f:
                for name in f.keys():               # noqa: SIM118  not a dict
                    if named(name) in state:
                        raise ValueError(f'{name} is there twice')
                    if not name.isprintable() or len(name) > 200:
                        raise ValueError(f'the name {name[:40]!r} is too long or not printable')
                    state[named(name)] = f.get_tensor(name)
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as e:
        raise ValueError(f'{folder}/{part} cannot be read ({_why(e)})') from None
    return state
