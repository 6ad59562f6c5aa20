"""
Replace layers of a trained model by packed ones: select them, replace each, describe them in a packed file, rebuild the model.

    unfuse(model);  layers_of(model, skip)            layers that can be replaced, by name
    replace(model, name, 'nf4', {})                   one packed layer; a tied head and embedding share it
    restore(model, described, tensors)                before common.load_packed()
"""
import torch
import torch.nn as nn

import layers
from layers import set_module
from pretrained import formats  # noqa: F401  adds its layers to FORMATS
from pretrained.calibrate import find_blocks


class PackedEmbedding(nn.Module):
    """Embedding stored as a packed linear layer (out = vocabulary, in = dim): ids (...) int -> rows (..., dim) in `dtype`.
    A tied head uses the same layer. Raises ValueError if the groups of the layer do not divide its rows."""

    def __init__(self, layer, dtype=torch.float32):
        super().__init__()
        if not hasattr(layer, 'look_up'):
            raise ValueError(f'an embedding cannot be stored as a {layer.kind} layer')
        if layer.in_features % getattr(layer, 'group', 1):
            raise ValueError(f'rows of {layer.in_features} weights are not made of groups of {layer.group}')
        self.layer, self.dtype = layer, dtype
        self.num_embeddings, self.embedding_dim = layer.out_features, layer.in_features

    def forward(self, ids):
        return self.layer.look_up(ids.flatten()).to(self.dtype).view(*ids.shape, self.embedding_dim)


def unfuse(model):
    """Replaces each module that defines unfused() by plain torch modules, so that the nn.Linear inside can be replaced; returns
    model."""
    for name, module in list(model.named_modules()):
        if hasattr(module, 'unfused'):
            set_module(model, name, module.unfused())
    return model


def tied_to(model, name):
    """Name of another nn.Linear or nn.Embedding that shares the weight of `name`, or ''."""
    own = model.get_submodule(name)
    return next((n for n, m in model.named_modules() if m is not own and isinstance(m, nn.Linear | nn.Embedding)
                 and m.weight is own.weight), '')


def layers_of(model, skip):
    """Select the layers to replace: {name: nn.Linear or nn.Embedding} in the order of the modules. Of a tied pair, the linear.

    skip: words separated by commas. `head`: the linear layers outside of the blocks. `embd`: the embeddings. Any other word:
    layers that have it between dots in their name, or whose name matches it as a glob. Raises ValueError if such a word
    matches no layer, or if no layer is left.
    """
    prefixes = tuple(f'{n}.' for row in find_blocks(model) for n, _ in row)
    # No subclasses, which compute something else, and no layers that share a weight with one.
    candidates = {n: m for n, m in model.named_modules()
                  if type(m) in (nn.Linear, nn.Embedding) and getattr(m, 'max_norm', None) is None}
    candidates = {n: m for n, m in candidates.items() if tied_to(model, n) in ('', *candidates)}
    words = [w.strip() for w in skip.split(',') if w.strip()]
    skipped = set()
    for word in words:
        matches = {*layers.matching(candidates, word), *(n for n in candidates if f'.{word}.' in f'.{n}.')}
        if word == 'embd':
            matches |= {n for n, m in candidates.items() if isinstance(m, nn.Embedding)}
        elif word == 'head' and prefixes:
            matches |= {n for n, m in candidates.items() if isinstance(m, nn.Linear) and not n.startswith(prefixes)}
        elif not matches and word != 'head':
            raise ValueError(f'skip={word!r} names no layer; the layers are {", ".join(candidates)}')
        skipped |= matches
    skipped |= {tied_to(model, n) for n in skipped} - {''}
    wanted = {n: m for n, m in candidates.items() if n not in skipped
              and not (isinstance(m, nn.Embedding) and isinstance(candidates.get(tied_to(model, n)), nn.Linear))}
    if not wanted:
        low = sum(isinstance(m, layers.LowBit) for m in model.modules())
        raise ValueError(f'there is nothing to quantize: {low} layers are low-bit already, skip={skip!r} leaves out the rest; '
                         'type another --skip' if low else
                         f'there is nothing to quantize: skip={skip!r} leaves out all layers; type another --skip')
    return wanted


def as_linear(module):
    """View a module as nn.Linear: an nn.Embedding becomes (dim) -> (vocabulary) with the same weight; nn.Linear is returned."""
    if isinstance(module, nn.Linear):
        return module
    with torch.device('meta'):
        linear = nn.Linear(module.embedding_dim, module.num_embeddings, bias=False)
    linear.weight = module.weight
    return linear


def replace(model, name, kind, options, new=None):
    """Replace the nn.Linear or nn.Embedding `name`, and the embedding tied to it, by a packed layer of `kind`, or by `new`.
    Returns {name: entry} for restore(). Raises ValueError that names the layer if the kind does not fit."""
    old, partner = model.get_submodule(name), tied_to(model, name)
    entry = {'kind': kind, 'options': options, 'bias': getattr(old, 'bias', None) is not None}
    try:
        new = new or layers.as_kind(as_linear(old), kind, options, True)
        new.requires_grad_(False)
        dtype = old.weight.dtype
        if isinstance(old, nn.Embedding):
            new, entry['embedding'] = PackedEmbedding(new, dtype), True
        elif partner:
            set_module(model, partner, PackedEmbedding(new, dtype))
            entry['tied'] = partner
    except ValueError as e:
        raise ValueError(f'{name}: {e}') from None
    set_module(model, name, new)
    return {name: entry}


def restore(model, described, tensors):
    """Put empty packed layers into a new model, in place, where replace() put them in the saved one. Returns the model.
    tensors: those of the packed file; their shapes are used. Raises ValueError if they do not fit."""
    if described:
        unfuse(model)
    for name, entry in described.items():
        try:
            old = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f'the model has no layer {name}') from None
        rows, columns = old.weight.shape
        with torch.device('meta'):
            new = layers.linear(entry['kind'], columns, rows, entry['bias'], **entry['options'])
        tied = f'{entry.get("tied")}.layer.'        # a shared tensor is stored under its first name
        own = f'{name}.layer.' if entry.get('embedding') else f'{name}.'
        prefix = tied if any(k.startswith(tied) for k in tensors) else own
        own_tensors = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        if isinstance(new, layers.LowBit):
            if own_tensors['code'].numel() * 8 < rows * columns * new.bits:
                raise ValueError(f'{name}: {own_tensors["code"].numel()} bytes of codes for {rows} x {columns} weights')
            new.hold_({key: torch.empty_like(t) for key, t in own_tensors.items() if key != 'bias'})
        new.to_empty(device='cpu').requires_grad_(False)
        if entry.get('embedding'):
            new = PackedEmbedding(new, old.weight.dtype)
        elif entry.get('tied'):
            set_module(model, entry['tied'], PackedEmbedding(new, old.weight.dtype))
        set_module(model, name, new)
    return model
