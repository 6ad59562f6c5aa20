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
import os

import numpy as np
import torch
import torch.nn as nn

import layers
from common import atomic_write

os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')    # otherwise each fork after its threads start prints a warning
HEAD = 'last_token_head.safetensors'


def _transformers():
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

    def gradient_checkpointing_enable(self, **options):
        self.backbone.gradient_checkpointing_enable(**options)


def function(config):
    """What a model with this config of transformers computes, as text: the config without names, tokens and labels."""
    ignored = ('_name_or_path', 'architectures', 'transformers_version', 'dtype', 'torch_dtype', 'id2label', 'label2id',
               'use_cache', 'problem_type')
    return json.dumps({k: v for k, v in config.to_dict().items() if k not in ignored
                       and not k.endswith('token_id') and 'dropout' not in k},
                      sort_keys=True, default=str)


def head_parameters(net):
    """{name: parameter} of the classification head, that is, of everything outside of the backbone."""
    return {n: p for n, p in net.named_parameters() if not n.startswith(f'{net.base_model_prefix}.')}


def load(name, names, dtype=torch.float32, weights=True):
    """Load a sequence classifier from a Hub id or a folder. Returns (net, tokenizer, names, fresh).

    names: list of str, the labels in the order of their ids. A model trained for the same names, in any order and case, keeps
    its head and its order, in which the names are returned. Any other model gets a new head, and fresh is True.
    weights=False: random weights from torch's generator. Raises a one-line ValueError if the model cannot be used.
    """
    t = _transformers()
    try:
        config, tokenizer = t.AutoConfig.from_pretrained(name), t.AutoTokenizer.from_pretrained(name)
        config.use_cache = False
        if getattr(config, 'quantization_config', None) is not None:
            # microsoft/bitnet-b1.58-2B-4T-bf16 has one, but its weights are plain bf16; our ternary layers are used below
            if config.model_type != 'bitnet' or config.quantization_config.get('quantization_mode') != 'online':
                raise ValueError('its weights are quantized already; give a model with plain weights')
            del config.quantization_config
        own = [str(config.id2label[i]) for i in range(config.num_labels)]
        fold = str.lower if len({n.lower() for n in names}) == len(names) else str
        known = {fold(n): n for n in names}
        same = sorted(map(fold, own)) == sorted(known)
        names = [known[fold(n)] for n in own] if same else list(names)
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
            if lost - head.keys():
                raise ValueError(f'the weights there lack {sorted(lost - head.keys())[0]}')
            fresh = not weights or bool(lost) or not same
            if fresh and weights:
                for p in head.values():             # otherwise transformers would skip their initialization
                    p._is_hf_initialized = False
                for module in dict.fromkeys(n.rpartition('.')[0] for n in head):
                    net._init_weights(net.get_submodule(module))
        else:
            net = t.AutoModel.from_pretrained(name, config=config, dtype=dtype) if weights \
                else t.AutoModel.from_config(config).to(dtype)
            net, path = LastTokenClassifier(net, len(names)), os.path.join(name, HEAD)
            fresh = not (weights and same and os.path.isfile(path))
            if not fresh:
                from safetensors.torch import load_file
                net.score.load_state_dict(load_file(path))
    except Exception as e:                          # noqa: BLE001  transformers raises many types; all mean: not usable
        raise ValueError(f'cannot load model {name!r}: {_why(e)}; give a Hub id or a folder with config.json, tokenizer and '
                         'weights') from None
    if config.model_type == 'bitnet':               # ternary weights and int8 activations, rounded in each pass
        layers.convert(net, {'*layers.*_proj': ('tern', dict(norm=False))}, verbose=False)
    return net, tokenizer, names, fresh


def kind_of(name):
    """Whether a Hub id or folder was saved as a 'classifier' or as a 'causal' language model. Raises ValueError."""
    t = _transformers()
    try:
        config = t.AutoConfig.from_pretrained(name)
    except Exception as e:                          # noqa: BLE001  see load()
        raise ValueError(f'cannot load model {name!r}: {_why(e)}; give a run\'s folder, one of its files, a Hub id or a folder '
                         'with config.json, tokenizer and weights') from None
    saved = ' '.join(getattr(config, 'architectures', None) or [])
    return 'classifier' if 'SequenceClassification' in saved or os.path.isfile(os.path.join(name, HEAD)) else 'causal'


def load_causal(name, weights=True):
    """Load a language model in fp32 and evaluation mode: (net, tokenizer). weights=False: random weights. Raises ValueError."""
    t = _transformers()
    try:
        tokenizer = t.AutoTokenizer.from_pretrained(name)
        net = (t.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) if weights else
               t.AutoModelForCausalLM.from_config(t.AutoConfig.from_pretrained(name)).float())
    except Exception as e:                          # noqa: BLE001  see load()
        raise ValueError(f'cannot load model {name!r}: {_why(e)}; give a Hub id or a folder with config.json, tokenizer and '
                         'weights') from None
    return net.eval(), tokenizer


def plain_linears(net):
    """Replace GPT-2's Conv1D and Falcon's FalconLinear by nn.Linear, in place, so that they can be quantized. Returns net."""
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
    t, special = _transformers(), ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
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
    from safetensors.torch import save_file
    state, factors = {}, {}
    for key, tensor in net.state_dict().items():
        module, _, leaf = key.rpartition('.')
        layer = net.get_submodule(module)
        if isinstance(layer, layers.LowRankLinear) and leaf != 'bias':
            factors[key] = tensor.cpu().contiguous()
            key, tensor = f'{module}.weight', ((layer.A * layer.c) @ layer.B).detach()
        state[key] = tensor.cpu().contiguous()
    os.makedirs(folder, exist_ok=True)
    write = lambda name, it: atomic_write(os.path.join(folder, name), lambda tmp: save_file(it, tmp, {'format': 'pt'}))
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


def bitnet_state(state, c):
    """Convert a state dict of train_bitnet.py's BitNet, or a dict of its gradients, to the names of transformers'
    BitNetForCausalLM. Fused tensors are split. c: BitNetConfig."""
    kv, out = c.n_embd // c.n_head * c.n_kv_head, {'model.embed_tokens.weight': state['wte.weight']}
    out |= {'lm_head.weight': state['wte.weight'], 'model.norm.weight': state['norm.weight']}
    for i in range(c.n_layer):
        one = {k.removeprefix(f'blocks.{i}.'): t for k, t in state.items() if k.startswith(f'blocks.{i}.')}
        q, k, v = one['attn.qkv_proj.weight'].split((c.n_embd, kv, kv))
        gate, up = one['mlp.gate_up_proj.weight'].chunk(2)
        layer = {'input_layernorm': one['attn.qkv_proj.gain'], 'post_attention_layernorm': one['mlp.gate_up_proj.gain'],
                 'self_attn.q_proj': q, 'self_attn.k_proj': k, 'self_attn.v_proj': v,
                 'self_attn.attn_sub_norm': one['attn.o_proj.gain'], 'self_attn.o_proj': one['attn.o_proj.weight'],
                 'mlp.gate_proj': gate, 'mlp.up_proj': up, 'mlp.ffn_sub_norm': one['mlp.down_proj.gain'],
                 'mlp.down_proj': one['mlp.down_proj.weight']}
        out |= {f'model.layers.{i}.{name}.weight': t for name, t in layer.items()}
    return out
