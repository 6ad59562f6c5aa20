"""
Replace layers of a trained model by packed ones: select them, replace each, describe them in a packed file, rebuild the model.

    unfuse(model);  keep_read(model, run)             before the others
    layers_of(model, skip)                            layers that can be replaced, by name
    replace(model, name, 'nf4', {})                   one packed layer; a tied head and embedding share it
    restore(model, described, tensors)                before common.load_packed()
"""
import re

import torch
import torch.nn as nn

import layers
from layers import set_module
from pretrained import formats  # noqa: F401  adds its layers to FORMATS
from pretrained.calibrate import find_blocks

MOST_LEFT = 0.01    # share of the weights in the blocks that may stay in full precision unasked, e.g. routers of experts


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

    @property
    def weight(self):
        """The dequantized table (vocabulary, dim): DeBERTa reads the weight of its embedding of relative positions."""
        return self(torch.arange(self.num_embeddings, device=next(iter(self.layer.state_dict().values())).device))


class Experts(nn.Module):
    """The experts of a mixture of experts of transformers, whose weights are 3-D parameters, as nn.Linear layers with the same
    outputs. fused: any module of a class that transformers decorates with use_experts_implementation()."""

    def __init__(self, fused):
        super().__init__()

        def linears(name):
            weights, biases = getattr(fused, name), getattr(fused, f'{name}_bias', None)
            weights = weights.detach().transpose(1, 2) if fused.is_transposed else weights.detach()
            with torch.device('meta'):
                made = nn.ModuleList(nn.Linear(weights.shape[2], weights.shape[1], biases is not None) for _ in weights)
            for i, linear in enumerate(made):
                linear.weight = nn.Parameter(weights[i].contiguous())
                linear.bias = None if biases is None else nn.Parameter(biases.detach()[i])
                linear.requires_grad_(getattr(fused, name).requires_grad)
            return made
        name = 'gate_up_proj' if fused.has_gate else 'up_proj'
        self.up, self.down, self.rest = linears(name), linears('down_proj'), fused
        for key in (name, f'{name}_bias', 'down_proj', 'down_proj_bias'):
            fused._parameters.pop(key, None)        # the rest: activation, gate, norm

    def forward(self, hidden, chosen, weights):
        """hidden (tokens, width), chosen and weights (tokens, experts per token) -> (tokens, width)."""
        y = torch.zeros_like(hidden)
        for i in chosen.unique().tolist():
            tokens, place = torch.where(chosen == i)
            inner = self.up[i](hidden[tokens])
            out = self.down[i](self.rest._apply_gate(inner) if self.rest.has_gate else self.rest.act_fn(inner))
            out = self.rest.post_expert_norm(out) if self.rest.has_post_expert_norm else out
            y.index_add_(0, tokens, (out * weights[tokens, place, None]).to(y.dtype))
        return y


def unfuse(model):
    """Replaces each module that defines unfused(), and the experts of transformers, by plain torch modules, so that the
    nn.Linear inside can be replaced; returns model."""
    for name, module in list(model.named_modules()):
        if hasattr(module, 'unfused'):
            set_module(model, name, module.unfused())
        elif hasattr(module, '_apply_gate') and hasattr(module, 'has_gate') and hasattr(module, 'down_proj'):
            set_module(model, name, Experts(module))
    return model


@torch.no_grad()
def keep_read(model, run):
    """Find the nn.Linear layers whose weight other code needs, which a packed layer lacks, and keep layers_of() from them, as
    model.read. Mamba multiplies by dt_proj.weight, for one. run(): a forward pass of the model. Returns the model."""
    linears = {m: n for n, m in model.named_modules() if type(m) is nn.Linear}
    kind = lambda module: re.sub(r'\d+', '*', linears[module])
    inside, last, read = [], [], set()

    class Hidden(nn.Linear):
        """Has a weight only in its own forward pass."""
        def forward(self, x):
            inside.append(self)
            try:
                return super().forward(x)
            finally:
                inside.pop()

        def __getattribute__(self, key):
            if key == 'weight' and not inside and kind(self) not in read:
                last[:] = [self]
                return None
            return super().__getattribute__(key)
    for m in linears:
        m.__class__ = Hidden
    try:
        while True:
            last.clear()
            try:
                run()
                break
            except (AttributeError, TypeError, RuntimeError):
                if not last:                        # another error, for which the caller has words
                    raise
                read.add(kind(last[0]))             # the same layer of every block
    finally:
        for m in linears:
            m.__class__ = nn.Linear
    model.read = {n for n in linears.values() if re.sub(r'\d+', '*', n) in read}
    return model


def left_out(model, skip=''):
    """({name: size} of the weights in the blocks that layers_of() cannot replace, their share of the weights in the blocks).
    Weights have 2 or more dimensions. skip: words as in layers_of(); what they name does not count."""
    prefixes = tuple(f'{n}.' for row in find_blocks(model) for n, _ in row) or ('',)
    covered = {id(m.weight) for n, m in _candidates(model).items()}
    covered |= {id(t) for m in model.modules() if isinstance(m, layers.LowBit | nn.Embedding) for t in m.parameters()}
    sizes = {n: p.numel() for n, p in model.named_parameters() if p.dim() > 1 and n.startswith(prefixes)}
    left = {n: size for n, size in sizes.items() if id(model.get_parameter(n)) not in covered
            and not any(_names(word, n) or _names(word, n.rpartition('.')[0]) for word in _words(skip))}
    return left, sum(left.values()) / max(1, sum(sizes.values()))


def _words(skip):
    return [w.strip() for w in skip.split(',') if w.strip()]


def _names(word, name):
    return bool(layers.matching([name], word)) or f'.{word}.' in f'.{name}.'


def _candidates(model):
    """{name: nn.Linear or nn.Embedding} that can be replaced."""
    # No subclasses, which compute something else, and no layers that share a weight with one or with another linear layer.
    found = {n: m for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Embedding)
             and getattr(m, 'max_norm', None) is None and n not in getattr(model, 'read', ())}
    tied = {n: [n, *tied_to(model, n)] for n in found}
    return {n: m for n, m in found.items() if found.keys() >= set(tied[n])
            and sum(isinstance(found[other], nn.Linear) for other in tied[n]) < 2}


def tied_to(model, name):
    """Names of the other nn.Linear and nn.Embedding that share the weight of `name`. In T5 three embeddings share one."""
    own = model.get_submodule(name)
    return [n for n, m in model.named_modules() if m is not own and isinstance(m, nn.Linear | nn.Embedding)
            and m.weight is own.weight]


def layers_of(model, skip):
    """Select the layers to replace: {name: nn.Linear or nn.Embedding} in the order of the modules. Of tied ones, the linear or
    the first.

    skip: words separated by commas. `head`: the linear layers outside of the blocks. `embd`: the embeddings. Any other word:
    layers that have it between dots in their name, or whose name matches it as a glob. Raises ValueError if such a word
    matches no layer, if no layer is left, or if more than MOST_LEFT of the weights in the blocks are in no layer that can be
    replaced and are not named in `skip`.
    """
    prefixes = tuple(f'{n}.' for row in find_blocks(model) for n, _ in row)
    candidates, others = _candidates(model), left_out(model)[0]
    skipped = set()
    for word in _words(skip):
        matches = {n for n in candidates if _names(word, n)}
        if word == 'embd':
            matches |= {n for n, m in candidates.items() if isinstance(m, nn.Embedding)}
        elif word == 'head' and prefixes:
            matches |= {n for n, m in candidates.items() if isinstance(m, nn.Linear) and not n.startswith(prefixes)}
        elif not matches and word != 'head' and not any(_names(word, n) or _names(word, n.rpartition('.')[0]) for n in others):
            more = f' and {len(candidates) - 20} more' * (len(candidates) > 20)
            raise ValueError(f'skip={word!r} names no layer; the layers are {", ".join(list(candidates)[:20])}{more}')
        skipped |= matches
    skipped |= {other for n in skipped for other in tied_to(model, n)}
    wanted, order = {}, sorted(candidates, key=lambda n: isinstance(candidates[n], nn.Embedding))
    for n in order:
        if n not in skipped and not wanted.keys() & set(tied_to(model, n)):
            wanted[n] = candidates[n]
    wanted = {n: m for n, m in candidates.items() if n in wanted}
    if not wanted:
        low = sum(isinstance(m, layers.LowBit) for m in model.modules())
        raise ValueError(f'there is nothing to quantize: {low} layers are low-bit already, skip={skip!r} leaves out the rest; '
                         'type another --skip' if low else
                         f'there is nothing to quantize: skip={skip!r} leaves out all layers; type another --skip')
    left, share = left_out(model, skip)
    if share > MOST_LEFT:
        words = list(dict.fromkeys(n.removesuffix('.weight').rpartition('.')[2] for n in left))
        raise ValueError(f'{share:.1%} of the weights in the blocks are in no layer that can be replaced: {", ".join(words)}; '
                         f'to leave them in full precision, type --skip={",".join([*_words(skip), *words])}')
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
    """Replace the nn.Linear or nn.Embedding `name`, and the embeddings tied to it, by a packed layer of `kind`, or by `new`.
    Returns {name: entry} for restore(). Raises ValueError that names the layer if the kind does not fit."""
    old, partners = model.get_submodule(name), tied_to(model, name)
    entry = {'kind': kind, 'options': options, 'bias': getattr(old, 'bias', None) is not None}
    try:
        new = new or layers.as_kind(as_linear(old), kind, options, True)
        new.requires_grad_(False)
        dtype = old.weight.dtype
        if isinstance(old, nn.Embedding):
            entry['embedding'] = True
        embedding = PackedEmbedding(new, dtype) if partners or isinstance(old, nn.Embedding) else None
    except ValueError as e:
        raise ValueError(f'{name}: {e}') from None
    if partners:                                    # one name in the files of earlier versions
        entry['tied'] = partners[0] if len(partners) == 1 else partners
    for partner in partners:
        set_module(model, partner, embedding)
    set_module(model, name, embedding if isinstance(old, nn.Embedding) else new)
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
        tied = entry.get('tied') or []
        tied = [tied] if isinstance(tied, str) else tied
        own = f'{name}.layer.' if entry.get('embedding') else f'{name}.'
        # a shared tensor is stored under its first name
        prefix = next((f'{t}.layer.' for t in tied if any(k.startswith(f'{t}.layer.') for k in tensors)), own)
        own_tensors = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        if isinstance(new, layers.LowBit):
            if own_tensors['code'].numel() * 8 < rows * columns * new.bits:
                raise ValueError(f'{name}: {own_tensors["code"].numel()} bytes of codes for {rows} x {columns} weights')
            new.hold_({key: torch.empty_like(t, device='meta') for key, t in own_tensors.items() if key != 'bias'})
        new.to_empty(device=old.weight.device).requires_grad_(False)
        embedding = PackedEmbedding(new, old.weight.dtype) if tied or entry.get('embedding') else None
        for partner in tied:
            set_module(model, partner, embedding)
        set_module(model, name, embedding if entry.get('embedding') else new)
    return model
