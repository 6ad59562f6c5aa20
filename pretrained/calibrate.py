"""
Codes found by looking at inputs: GPTQ and activation-aware scaling of a linear layer, and a model's layers one after the other
with the inputs that they have once everything before them is quantized.

    for_each_layer(model, batches, names, visit)      one block of the model in hand at a time
    gptq(weight, moments, 'int4', 128)                arXiv 2210.17323
    awq(weight, moments, 'int4', 128)                 arXiv 2306.00978

Both know the inputs x (tokens, in) of a layer only by H = x^T x (and awq by mean|x|): the squared error of the output,
|x (W' - W)^T|^2 = tr((W' - W) H (W' - W)^T), needs no more.
"""
import contextlib
import itertools
import math
from functools import partial

import torch
import torch.nn as nn

from layers import in_blocks
from quant import group_grid, to_grid

BLOCK = 128         # columns whose errors are passed on at once
PART = 1 << 22      # weights of a matrix that are in hand at once
SHRINKS = tuple(1 - i / 20 for i in range(11))      # of the range of a group, that clipping tries: 1 to 0.5
POWERS = tuple(i / 20 for i in range(21))           # of mean|x|, that awq tries as scales of its inputs


class Moments:
    """H fp32 (in, in), summed over `n` tokens, and total|x| (in,), of the inputs of a linear layer."""

    def __init__(self, in_features, device):
        self.H = torch.zeros(in_features, in_features, device=device)
        self.total, self.n = torch.zeros(in_features, device=device), 0

    def add(self, x):
        x = x.detach().reshape(-1, x.shape[-1]).float()
        self.H.addmm_(x.T, x)
        self.total += x.abs().sum(0)
        self.n += len(x)


# ---------------------------------------------------------------------------------------------------------------------
# a model, block by block


def find_blocks(model):
    """[[(name, module), ...], ...]: the model's rows of transformer blocks, e.g. those of an encoder and of a decoder: every
    nn.ModuleList with linear layers that is in no other such list, in the order of the modules."""
    rows, inside = [], ()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not f'{name}.'.startswith(inside or '\0') \
                and any(isinstance(m, nn.Linear) and m.weight.dim() == 2 for m in module.modules()):
            rows.append([(f'{name}.{i}', block) for i, block in enumerate(module)])
            inside = (*inside, f'{name}.')
    return rows


class _Enough(Exception):
    pass


class Observed:
    """Moments of the inputs of the named layers while in a with block. stop: a pass ends, by _Enough, as soon as each has been
    called, before the last of them, most often a head, makes logits that nobody looks at; further calls are not seen. Clear
    `called` before a pass."""

    def __init__(self, model, names, stop=False):
        self.model, self.names, self.stop, self.called = model, names, stop, set()

    def __enter__(self):
        found, self.hooks = {}, []
        for name in self.names:
            layer = self.model.get_submodule(name)
            found[name] = moments = Moments(layer.in_features, layer.weight.device)
            self.hooks.append(layer.register_forward_pre_hook(partial(self._add, name, moments)))
        return found

    def _add(self, name, moments, _, args):
        moments.add(args[0])
        self.called.add(name)
        if self.stop and len(self.called) == len(self.names):
            raise _Enough

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


@torch.no_grad()
def for_each_layer(model, batches, run, names, visit):
    """visit(name, moments) for each of the layers `names` (nn.Linear or whatever has in_features and weight), in the order
    of the model's blocks and then the rest.

    run(model, batch) passes a batch through, filling no cache of keys and values. When a block's layers are visited, the
    blocks before it are as earlier visits left them, so that errors do not add up unseen; inside a block all layers are
    observed in one pass. Kept are the inputs of one block for all batches (tokens x width, on the model's device) and what
    else the blocks are called with.
    """
    rows = find_blocks(model)
    blocks = [block for row in rows for block in row]
    begins = {row[0][0] for row in rows}            # blocks whose inputs come from elsewhere
    inside = {n for n in names if any(n.startswith(f'{b}.') for b, _ in blocks)}
    rest = [n for n in names if n not in inside]
    calls = {name: [] for name, _ in blocks}

    def record(name):
        def hook(_, args, kwargs):
            # A later block's inputs will be others: only what comes with them is kept.
            calls[name].append((args, kwargs) if name in begins else _with_hidden(args, kwargs, None))
            if len(blocks) > 1 and name == blocks[-1][0]:              # one block may be called several times
                raise _Enough
        return hook
    hooks = [block.register_forward_pre_hook(record(name), with_kwargs=True) for name, block in blocks]
    try:
        for batch in batches if inside else ():
            with contextlib.suppress(_Enough):
                run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    for (name, block), (following, _) in itertools.zip_longest(blocks, blocks[1:], fillvalue=('', None)) if inside else ():
        here = [n for n in names if n.startswith(f'{name}.')]
        if here:
            with Observed(model, here) as found:
                for args, kwargs in calls[name]:
                    block(*args, **kwargs)
            for n in here:
                visit(n, found.pop(n))
        if following and following not in begins:
            for at, (args, kwargs) in enumerate(calls[name]):
                y = block(*args, **kwargs)
                calls[name][at] = None
                calls[following][at] = _with_hidden(*calls[following][at], y[0] if isinstance(y, tuple) else y)
        calls.pop(name)
    if rest:
        observed = Observed(model, rest, stop=bool(blocks))           # without blocks there may be loops
        with observed as found:
            for batch in batches:
                observed.called.clear()
                with contextlib.suppress(_Enough):
                    run(model, batch)
        for n in rest:
            visit(n, found.pop(n))


def _with_hidden(args, kwargs, hidden):
    """A block's arguments with other hidden states: the first one, or the one of that name."""
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {'hidden_states': hidden})


# ---------------------------------------------------------------------------------------------------------------------
# one layer


def shrunk(groups, H, levels):
    """group_grid of groups (out, n, group) with the least error of the output among SHRINKS, each group on its own.
    H (n, group, group): the diagonal blocks."""
    best = scale = zero = None
    for shrink in SHRINKS:
        s, z = group_grid(groups, levels, shrink)
        off = to_grid(groups, s, z, levels).sub_(z).mul_(s).sub_(groups)
        error = torch.einsum('ong,ngh,onh->on', off, H, off).unsqueeze(-1)
        if best is None:
            best, scale, zero = error, s, z
        else:
            better = error < best
            best, scale, zero = (torch.where(better, a, b) for a, b in ((error, best), (s, scale), (z, zero)))
    return scale, zero


def _diagonal_blocks(H, group):
    n = len(H) // group
    return H.view(n, group, n, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def inverse_root(H, damp):
    """Upper triangular fp32 U with U^T U = (H + damp mean(diag H) I)^-1, in fp64. Damped ten times more where that is not
    positive definite, up to 1; raises ValueError beyond it, and where H is not finite."""
    mean = H.diagonal().mean().item()
    while math.isfinite(mean) and damp <= 1:
        root = H.to(torch.float64, copy=True)
        root.diagonal().add_(damp * mean)
        root, failed = torch.linalg.cholesky_ex(root)
        if not failed:
            torch.cholesky_inverse(root, out=root)
            root, failed = torch.linalg.cholesky_ex(root, upper=True)
            if not failed and root.isfinite().all():
                return root.float()
        damp = max(damp, 1e-4) * 10
    raise ValueError('the inputs are not finite' if not math.isfinite(mean) else
                     'the second moments of the inputs have no inverse, even damped by their mean')


def gptq(weight, moments, levels, group, *, act_order=True, clip=True, damp=0.01):
    """(codes uint8 (out, in), scale, zero fp32 (out, groups)) of weight (out, in): GPTQ (arXiv 2210.17323, alg. 1).

    Columns are rounded one by one, and what each leaves as error is passed on to those that are not yet rounded, by the
    inverse of H. act_order: those with the largest inputs first; the groups stay those of the row, with scales from the
    weights as they were, so that nothing has to be kept about the order. Otherwise from left to right, with a group's
    scale from its weights as the columns before have left them. clip: clipping, each group's range by the least squared error
    of its output (as AWQ searches it) and not by its largest weights. damp: share of mean(diag H) added to the diagonal.
    Columns whose input was always 0 are rounded to the nearest. group=0: a whole row. Raises ValueError where H cannot be
    inverted even when damped by its mean.
    """
    n = weight.shape[1]
    group = group or n
    H = moments.H / max(1, moments.n)               # of a wide layer it is the largest thing here: few copies of it
    dead = H.diagonal() == 0
    H.diagonal().add_(dead.float() * H.diagonal().mean().clamp(min=1e-12))
    blocks = _diagonal_blocks(H, group).clone()
    order = torch.argsort(H.diagonal(), descending=True) if act_order else torch.arange(n, device=H.device)
    H = H[order[:, None], order] if act_order else H
    U = inverse_root(H, damp)
    del H
    grid = lambda w, at: shrunk(w, blocks[at], levels) if clip else group_grid(w, levels)
    return tuple(in_blocks(lambda rows: _gptq(rows.float(), U, order, grid, levels, group, act_order), weight, PART).values())


def _gptq(weight, U, order, grid, levels, group, act_order):
    """gptq() of some rows, which know nothing of the others. U: of inverse_root(), in this order of columns; grid(groups,
    which of them)."""
    n = weight.shape[1]
    W, groups = weight.T.clone(), weight.unflatten(1, (-1, group))                       # (in, out): a column is a row now
    scale, zero = (t[..., 0].T.contiguous() for t in grid(groups, slice(None)))          # (groups, out)
    W, of_group = W[order], (order // group).tolist()
    codes = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        w, u = W[start:stop], U[start:stop, start:stop]
        errors = torch.empty_like(w)
        pivots = u.diagonal().tolist()
        for j in range(stop - start):
            g = of_group[start + j]
            if not act_order and (start + j) % group == 0:
                # Weights of the group beyond this block still lack the block's own errors; one that begins inside gets them.
                ahead = W[start + j:start + j + group].clone()
                if start + j + group > stop and j:
                    ahead[stop - start - j:] -= U[start:start + j, stop:start + j + group].T @ errors[:j]
                s, z = grid(ahead.T.unsqueeze(1), slice(g, g + 1))
                scale[g], zero[g] = s[:, 0, 0], z[:, 0, 0]
            q = to_grid(w[j], scale[g], zero[g], levels)
            codes[start + j] = q
            errors[j] = (w[j] - (q - zero[g]) * scale[g]) / pivots[j]
            if j + 1 < stop - start:
                w[j + 1:].addr_(u[j, j + 1:], errors[j], alpha=-1)
        if stop < n:
            W[stop:].addmm_(U[start:stop, stop:].T, errors, alpha=-1)
    found = torch.empty_like(codes)
    found[order] = codes
    return {'codes': found.T.contiguous(), 'scale': scale.T.contiguous(), 'zero': zero.T.contiguous()}


def awq(weight, moments, levels, group):
    """(codes uint8 (out, in), scale, zero fp32 (out, groups), input_scale fp32 (in,)) of weight (out, in): activation-aware
    weight quantization (arXiv 2306.00978).

    Columns with large inputs are made larger before they are rounded to the nearest, W s with s = mean|x|^a, and the inputs
    smaller by as much: a from POWERS, by the least squared error of the output; then ranges by the least error of a group's
    output, from SHRINKS. The paper has one s for the layers that share an input, folded into the norm before them;
    here each layer has its own.
    """
    group = group or weight.shape[1]
    H, size = moments.H, (moments.total / max(1, moments.n)).clamp(min=1e-8)

    def error_of(rows, inverse):
        rows = rows.float()
        groups = (rows / inverse).unflatten(1, (-1, group))
        scale, zero = group_grid(groups, levels)
        off = to_grid(groups, scale, zero, levels).sub_(zero).mul_(scale).flatten(1).mul_(inverse).sub_(rows)
        return {'error': (off @ H).mul_(off).sum(1)}

    best = None
    for power in POWERS:
        s = size ** power
        inverse = (1 / (s / (s.max() * s.min()).sqrt())).clamp(1e-4, 1e4).half().float()
        error = in_blocks(partial(error_of, inverse=inverse), weight, PART)['error'].sum().item()
        if best is None or error < best[0]:
            best = error, inverse
    inverse = best[1]
    each = inverse.view(-1, group)
    blocks = _diagonal_blocks(H, group) * each[:, :, None] * each[:, None]

    def rounded(rows):
        groups = (rows.float() / inverse).unflatten(1, (-1, group))
        scale, zero = shrunk(groups, blocks, levels)
        codes = to_grid(groups, scale, zero, levels).to(torch.uint8)
        return {'codes': codes.flatten(1), 'scale': scale[..., 0], 'zero': zero[..., 0]}
    return *in_blocks(rounded, weight, PART).values(), inverse
