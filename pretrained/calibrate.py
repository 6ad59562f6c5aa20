"""
Post-training quantization with a calibration set: GPTQ and activation-aware scaling (AWQ) of linear layers.
Layers are quantized one after the other, each with the inputs it gets from the quantized layers before it.

    for_each_layer(model, batches, run, names, visit)     one block at a time
    gptq(weight, moments, 'int4', 128)                    arXiv 2210.17323
    awq(weight, moments, 'int4', 128)                     arXiv 2306.00978

Both see the inputs x (tokens, in) of a layer only as H = x^T x; awq also uses mean|x|. H is enough for the squared error of the
output, |x (W' - W)^T|^2 = tr((W' - W) H (W' - W)^T).
"""
import contextlib
import itertools
import math
from functools import partial

import torch
import torch.nn as nn

from layers import LowBitLinear, in_blocks
from quant import group_grid, to_grid

BLOCK = 128         # columns whose errors reach the later columns in one product
PART = 1 << 22      # weights per block of rows; a larger one needs larger temporaries
SHRINKS = tuple(1 - i / 20 for i in range(11))      # factors of a group's range that clipping tries, 1 to 0.5
POWERS = tuple(i / 20 for i in range(21))           # powers of mean|x| that awq tries as scales


class Moments:
    """Statistics of a linear layer's inputs: sums over `n` tokens of x^T x, H fp32 (in, in), and of |x|, total fp32 (in,)."""

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
    """Find the stacks of transformer blocks of a model, e.g. encoder and decoder: [[(name, module), ...], ...]. A stack is an
    nn.ModuleList with linear layers that is inside no other such list. Stacks are in the order of the modules."""
    rows, inside = [], ()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not f'{name}.'.startswith(inside or '\0') and any(
                isinstance(m, LowBitLinear) or isinstance(m, nn.Linear) and m.weight.dim() == 2 for m in module.modules()):
            rows.append([(f'{name}.{i}', block) for i, block in enumerate(module)])
            inside = (*inside, f'{name}.')
    return rows


class _Enough(Exception):
    pass


class Observed:
    """Context manager that collects Moments of the inputs of the named layers. stop: end a pass by _Enough when all of them
    have been called. The last one, mostly a head, then need not compute its output; later calls are not seen. Clear `called`
    before each pass."""

    def __init__(self, model, names, stop=False):
        self.model, self.names, self.stop, self.called = model, names, stop, set()

    def __enter__(self):
        moments_of, self.hooks = {}, []
        for name in self.names:
            layer = self.model.get_submodule(name)
            moments_of[name] = moments = Moments(layer.in_features, layer.weight.device)
            self.hooks.append(layer.register_forward_pre_hook(partial(self._add, name, moments)))
        return moments_of

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
    """Call visit(name, moments) for each layer in `names`: first block by block, then the layers outside of the blocks.

    names: nn.Linear layers, or any with in_features and weight. run(model, batch) runs the model and must not fill a cache of
    keys and values. visit() may replace the layer: later blocks then get the inputs that the replaced layers produce, and so
    account for their errors. The layers of one block are observed in one pass. Memory: the inputs of one block for all batches
    (tokens x width, on the model's device), and the other arguments of all blocks of one stack. Each stack begins with a pass
    of its own, so a decoder gets the outputs of the replaced encoder.
    """
    rows = find_blocks(model)
    inside = {n for n in names if any(n.startswith(f'{b}.') for row in rows for b, _ in row)}
    rest = [n for n in names if n not in inside]
    for row in rows:
        if any(n.startswith(f'{b}.') for n in names for b, _ in row):
            _walk(model, batches, run, row, names, visit)
    if rest:
        observed = Observed(model, rest, stop=bool(rows))           # without blocks a layer may be called in a loop
        with observed as moments_of:
            for batch in batches:
                observed.called.clear()
                with contextlib.suppress(_Enough):
                    run(model, batch)
        for n in rest:
            visit(n, moments_of.pop(n))


def _walk(model, batches, run, row, names, visit):
    """for_each_layer() of the blocks of one stack."""
    calls = {name: [] for name, _ in row}

    def record(name):
        def hook(_, args, kwargs):
            # The hidden states of a later block are recomputed. Only its other arguments are stored.
            calls[name].append((args, kwargs) if name == row[0][0] else _with_hidden(args, kwargs, None))
            if len(row) > 1 and name == row[-1][0]:                    # one block may be called in a loop
                raise _Enough
        return hook
    hooks = [block.register_forward_pre_hook(record(name), with_kwargs=True) for name, block in row]
    try:
        for batch in batches:
            with contextlib.suppress(_Enough):
                run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    for (name, block), (following, _) in itertools.zip_longest(row, row[1:], fillvalue=('', None)):
        inner = [n for n in names if n.startswith(f'{name}.')]
        if inner:
            with Observed(model, inner) as moments_of:
                for args, kwargs in calls[name]:
                    block(*args, **kwargs)
            for n in inner:
                visit(n, moments_of.pop(n))
        if following:
            for at, (args, kwargs) in enumerate(calls[name]):
                y = block(*args, **kwargs)
                calls[name][at] = None
                calls[following][at] = _with_hidden(*calls[following][at], y[0] if isinstance(y, tuple) else y)
        calls.pop(name)


def _with_hidden(args, kwargs, hidden):
    """The arguments of a block with other hidden states: its first argument, or hidden_states=."""
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {'hidden_states': hidden})


# ---------------------------------------------------------------------------------------------------------------------
# one layer


def shrunk(groups, H, levels):
    """(scale, zero) fp32 (out, n, 1) of groups (out, n, group): group_grid() with the shrink factor of SHRINKS that gives the
    least squared error of the output, for each group separately. H (n, group, group): diagonal blocks of the second moments."""
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
    """Upper triangular fp32 U with U^T U = (H + damp mean(diag H) I)^-1, computed in fp64. If the sum is not positive definite,
    damp grows tenfold, up to 1. Raises ValueError if that fails or if H is not finite."""
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
    """GPTQ (arXiv 2210.17323, alg. 1): (codes uint8 (out, in), scale, zero fp32 (out, groups)) of weight (out, in).

    Columns are rounded one by one. The inverse of H spreads the error of each over the columns not yet rounded.
    act_order: round the columns with the largest inputs first. Groups stay consecutive in the row, and their scales come from
    the original weights, so the order need not be stored. Without it, columns go from left to right, and the scale of a group
    comes from its weights after the corrections by earlier columns.
    clip: the range of each group minimizes the squared error of its output, as in AWQ; otherwise its largest weights set it.
    damp: share of mean(diag H) that is added to the diagonal. Columns whose input is always 0 are rounded to the nearest.
    group=0: one group per row. Raises ValueError if H cannot be inverted even with damp=1.
    """
    n = weight.shape[1]
    group = group or n
    H = moments.H / max(1, moments.n)               # the largest tensor here if the layer is wide, so few copies
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
    """gptq() of a block of rows; rows are independent. U: from inverse_root(), with columns in `order`. grid(groups, index)
    returns (scale, zero)."""
    n = weight.shape[1]
    W, groups = weight.T.clone(), weight.unflatten(1, (-1, group))                       # W (in, out): columns are its rows
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
                # W beyond this block is corrected only after the block. The group may reach there, so correct a copy here.
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
    in_order = torch.empty_like(codes)
    in_order[order] = codes
    return {'codes': in_order.T.contiguous(), 'scale': scale.T.contiguous(), 'zero': zero.T.contiguous()}


def awq(weight, moments, levels, group):
    """Activation-aware weight quantization (arXiv 2306.00978): (codes uint8 (out, in), scale, zero fp32 (out, groups),
    input_scale fp32 (in,)) of weight (out, in).

    Columns with large inputs are multiplied by s = mean|x|^a before rounding to the nearest, and the inputs are divided by s.
    a is the power in POWERS with the least squared error of the output. Then each group takes the factor in SHRINKS with the
    least error of its output. Deviation: the paper shares one s among layers with the same input and folds it into the norm
    before them. Here each layer has its own s.
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
