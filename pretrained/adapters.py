"""
LoRA adapters of a model: train them alone, merge them, save and load them in peft's folder layout.

    convert(model, {'*attn*': ('lora', dict(rank=8, base='nf4'))})          # layers.py
    only_adapters(model)
    ...                                                                     # train
    save_adapters(model, 'out/adapters')                                    # load_adapters(model, 'out/adapters')
    damage = merge_adapters(model, ids)
"""
import json
import os
import re

import torch
from torch.nn.parallel import DistributedDataParallel

from common import atomic_write, contents_crc
from layers import LoRALinear, is_linear, set_module

PEFT = 'base_model.model.'      # peft's prefix of a module's name
ABOUT = 'nanobit.json'          # beside peft's files: labels and a checksum, which peft has no place for


def adapters(model):
    """{name: LoRALinear} of a model, also inside torch.compile or DistributedDataParallel. Raises ValueError if it has none."""
    model = bare(model)
    loras = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    if not loras or '' in loras:
        raise ValueError('the model has no LoRA layers inside; convert() it with a lora rule first')
    return loras


def bare(model):
    while isinstance(model, DistributedDataParallel) or hasattr(model, '_orig_mod'):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
    return model


def only_adapters(model):
    """Freeze all parameters but the adapters, as peft does. Returns the model."""
    trained = {id(p) for m in adapters(model).values() for p in (m.lora_A, m.lora_B)}
    for p in model.parameters():
        p.requires_grad_(id(p) in trained)
    return model


def merge_adapters(model, *inputs, requantize=False):
    """Merge every adapter into its base layer, in place. Returns {name: damage} of LoRALinear.merge().

    model(*inputs) runs once in evaluation mode and gives each adapter its input, for the damage. Raises ValueError."""
    seen, loras, training = {}, adapters(model), {m: m.training for m in model.modules()}
    hooks = [m.register_forward_pre_hook(lambda _, args, kwargs, name=name: seen.update(
             {name: next(iter([*args, *kwargs.values()])).detach()}), with_kwargs=True) for name, m in loras.items()]
    try:
        with torch.no_grad():
            bare(model).eval()(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for m, was in training.items():
            m.training = was
    if unseen := loras.keys() - seen.keys():
        raise ValueError(f'merge_adapters: these inputs do not reach {sorted(unseen)[0]}')
    merged = {name: m.merge(seen[name], requantize) for name, m in loras.items()}       # an error changes nothing
    places = {id(m): name for name, m in loras.items()}
    model = bare(model)
    for name, m in list(model.named_modules(remove_duplicate=False)):               # a layer may have several names
        if id(m) in places:
            set_module(model, name, merged[places[id(m)]][0])
    return {name: damage for name, (_, damage) in merged.items()}


def is_adapters(folder):
    """Whether `folder` holds adapters of save_adapters() or peft, and no whole model."""
    there = lambda name: os.path.isfile(os.path.join(folder, name))
    return there('adapter_config.json') and not there('config.json')


def base_of(folder):
    """(base model of the adapters in `folder`, a path or an id; names of their classes or []; names of the tensors that replace
    those of the base; kind of the quantized layers under the adapters or ''). Raises ValueError."""
    from safetensors import SafetensorError, safe_open
    labels, kind = [], ''
    try:
        with open(os.path.join(folder, 'adapter_config.json')) as f:
            base = json.load(f)['base_model_name_or_path']
        if not isinstance(base, str) or not base:
            raise ValueError('it names no base model')
        if os.path.isfile(path := os.path.join(folder, ABOUT)):
            with open(path) as f:
                about = json.load(f)
            labels, kind = about['labels'], about.get('base', '')
        with safe_open(os.path.join(folder, 'adapter_model.safetensors'), 'pt') as f:
            whole = {key.removeprefix(PEFT) for key in f.keys() if '.lora_' not in key}         # noqa: SIM118  not a dict
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as e:
        raise ValueError(f'{folder} has no LoRA adapters ({type(e).__name__}: {e})') from None
    moved = os.path.join(os.path.dirname(os.path.abspath(folder)), os.path.basename(str(base)))     # the run folder was moved
    return moved if not os.path.exists(base) and os.path.isdir(moved) else base, labels, whole, kind


def task_of(folder):
    """peft's task_type of the adapters in `folder`, e.g. SEQ_CLS, or None."""
    with open(os.path.join(folder, 'adapter_config.json')) as f:
        return json.load(f).get('task_type')


def merge_all(model):
    """Merge every adapter into its base layer, in place, where the bases are full-precision. Returns the model."""
    for name, m in adapters(model).items():
        set_module(model, name, m.merge(torch.zeros(1, m.in_features))[0])
    return model


def save_adapters(model, folder, base_model='', heads=(), task_type=None, labels=(), kind=''):
    """Save the adapters alone in peft's layout: adapter_model.safetensors and adapter_config.json in `folder`.

    base_model: name or path of their Hugging Face model, for peft. heads: names of fully trained modules that are saved too,
    e.g. a classifier (peft's modules_to_save). task_type: peft's task_type, e.g. SEQ_CLS. labels: names of the classes, which
    peft has no place for; they are in a file of their own, with the kind of the quantized layers under the adapters. Raises
    OSError if writing fails."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    loras = adapters(model)
    first = next(iter(loras.values()))
    # peft matches a name in a list against the end of module names. A single string and pattern keys are regular expressions.
    longer = {name: {n for n, _ in bare(model).named_modules() if n.endswith(f'.{name}')} for name in loras}
    ranks, alphas = ({f'^{re.escape(name)}' if longer[name] else name: getattr(m, key) for name, m in loras.items()
                      if getattr(m, key) != getattr(first, key)} for key in ('rank', 'alpha'))
    targets = '|'.join(map(re.escape, loras)) if set().union(*longer.values()) - loras.keys() else list(loras)
    config = {'peft_type': 'LORA', 'base_model_name_or_path': base_model, 'r': first.rank, 'lora_alpha': first.alpha,
              'lora_dropout': first.dropout, 'target_modules': targets, 'rank_pattern': ranks, 'alpha_pattern': alphas,
              'bias': 'none', 'fan_in_fan_out': False, 'task_type': task_type, 'inference_mode': True,
              'modules_to_save': list(heads) or None}
    tensors = {f'{PEFT}{name}.lora_{ab}.weight': getattr(m, f'lora_{ab}').detach().cpu().contiguous()
               for name, m in loras.items() for ab in 'AB'}
    for head in heads:
        for key, t in bare(model).get_submodule(head).state_dict().items():
            tensors[f'{PEFT}{head}.{key}'] = t.detach().cpu().contiguous()
    os.makedirs(folder, exist_ok=True)
    try:
        atomic_write(os.path.join(folder, 'adapter_model.safetensors'), lambda tmp: save_file(tensors, tmp, {'format': 'pt'}))
    except SafetensorError as e:                    # safetensors raises this for a full disk
        raise OSError(f'could not write {folder}: {e}') from None

    about = {'labels': list(labels), 'base': kind, 'crc32': contents_crc(tensors, list(labels))}
    for name, content in (('adapter_config.json', config), (ABOUT, about)):
        def write(tmp, content=content):
            with open(tmp, 'w') as f:
                json.dump(content, f, indent=2)
        atomic_write(os.path.join(folder, name), write)


def load_adapters(model, folder):
    """Load adapters of save_adapters() or peft into the model, in place. Other linear layers become LoRALinear. Returns names.

    Raises ValueError if the file is damaged, or if a tensor is missing, unknown or of another shape, and then names the tensor.
    The model is then unchanged. Files of peft have no checksum."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    model, path, about = bare(model), os.path.join(folder, 'adapter_model.safetensors'), {}
    try:
        with open(os.path.join(folder, 'adapter_config.json')) as f:
            config = json.load(f)
        if os.path.isfile(own := os.path.join(folder, ABOUT)):
            with open(own) as f:
                about = json.load(f)
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError) as e:
        raise ValueError(f'{folder} has no LoRA adapters ({type(e).__name__}: {e})') from e
    if not isinstance(about, dict) or 'crc32' in about and about['crc32'] != contents_crc(tensors, about.get('labels')):
        raise ValueError(f'{path} is damaged: it does not match the checksum in {ABOUT}; if another program wrote it since, '
                         f'delete {own}')
    if not isinstance(config, dict) or not isinstance(config.get('lora_alpha'), int | float):
        raise ValueError(f'{folder}/adapter_config.json has no lora_alpha')
    if config.get('peft_type') != 'LORA' or any(config.get(key) for key in ('use_dora', 'use_rslora')):
        raise ValueError(f'{folder}: only plain LoRA adapters can be loaded')
    present = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    # peft matches the ends of names, inside a word too ('classifier' is also DistilBERT's pre_classifier), and lists names that
    # no module has.
    heads = {}
    for head in config.get('modules_to_save') or ():
        heads |= {f'{PEFT}{n}.': n for n in [n for n, _ in model.named_modules() if n.endswith(head)] or [head]}
    heads = {key: n for key, n in heads.items() if not any(n.startswith(f'{other}.') for other in heads.values())}
    saved = {k: tensors.pop(k) for k in list(tensors) if k.startswith(tuple(heads)) and '.lora_' not in k}
    names = list(dict.fromkeys([*present, *(k.removeprefix(PEFT).rsplit('.lora_', 1)[0] for k in tensors)]))
    wanted = {f'{PEFT}{name}.lora_{ab}.weight' for name in names for ab in 'AB'}
    if wrong := sorted(wanted ^ tensors.keys()):
        raise ValueError(f'{path} {"lacks" if wrong[0] in wanted else "has unknown"} {wrong[0]}')
    own, ready = model.state_dict(), {}
    for key, head in heads.items():
        wanted = {k: t for k, t in own.items() if k.startswith(f'{head}.')}
        got = {k.removeprefix(PEFT): t for k, t in saved.items() if k.startswith(key)}
        if wanted.keys() != got.keys() or any(got[k].shape != wanted[k].shape for k in wanted):
            raise ValueError(f'{path}: the weights of {head} do not fit the model')
    for name in names:
        A, B = (tensors[f'{PEFT}{name}.lora_{ab}.weight'] for ab in 'AB')
        try:
            layer = present.get(name) or model.get_submodule(name)
        except AttributeError:
            raise ValueError(f'{path} has adapters for {name}, which the model lacks') from None
        shape = (*A.shape, *B.shape)
        if not (is_linear(layer) or name in present) \
                or shape != (layer.rank if name in present else len(A), layer.in_features, layer.out_features, len(A)):
            raise ValueError(f'{path}: adapters {tuple(A.shape)}, {tuple(B.shape)} do not fit {name}, {layer}')
        alpha = next((v for key, v in (config.get('alpha_pattern') or {}).items() if re.match(rf'(.*\.)?({key})$', name)),
                     config['lora_alpha'])
        ready[name] = layer, A, B, alpha
    for name, (layer, A, B, alpha) in ready.items():
        if name not in present:
            layer = LoRALinear(layer, rank=len(A), dropout=config.get('lora_dropout', 0.0))
            set_module(model, name, layer)
        layer.alpha = alpha
        with torch.no_grad():
            layer.lora_A.copy_(A)
            layer.lora_B.copy_(B)
    with torch.no_grad():
        for key, t in saved.items():
            own[key.removeprefix(PEFT)].copy_(t)
    return names
