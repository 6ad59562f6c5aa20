"""The formulas of the layers in plain autograd, a few lines each, and helpers that several tests of layers share."""
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from layers import BinaryEmbedding


@pytest.fixture(autouse=True)
def fixed():
    """One thread and one seed, so that a test gives the same figures alone and in any order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def straight_through(p, q):
    return p + (q - p).detach()


def ramped(layer, w, full, rounded):
    """The weight of a training step: `rounded`, with a share of `full` if the layer has one; the gradient is that of w."""
    share = 1 if layer.share is None or not layer.training else layer.share.to(w.dtype)
    return straight_through(w, full + share * (rounded - full))


def in_bits(w):
    """w, moved and scaled so that it has the mean 1/2, and 1/2 as its mean distance from that."""
    return (w - w.mean()) / (w - w.mean()).abs().mean() / 2 + 0.5


def bits(p):
    """{0,1}, literally."""
    return straight_through(p, (p > p.mean()).to(p.dtype))


def normalize(z, alpha, dims, eps=1e-5):
    return alpha * (z - z.mean(dims, keepdim=True)) / (z.std(dims, keepdim=True, unbiased=False) + eps)


def activated(layer, x):
    if layer.act in ('relu2_glu', 'silu_glu'):
        gate, up = x.chunk(2, -1)
        return (gate * gate * (gate > 0) if layer.act == 'relu2_glu' else gate / (1 + (-gate).exp())) * up
    return {None: lambda x: x, 'gelu': F.gelu, 'relu': F.relu}[layer.act](x)


def rounded(layer):
    """[(weight, bias or None)] of each chunk as the format has it; the gradient passes straight through."""
    n = getattr(layer, 'chunks', 1)
    rows, parts = [len(layer.weight) // n] * n if isinstance(n, int) else [*n], []
    biases = [None] * len(rows) if layer.bias is None else layer.bias.split(rows)
    for w, b in zip(layer.weight.split(rows), biases, strict=True):
        if layer.kind == 'bin':
            w = ramped(layer, w, in_bits(w), bits(w)) - (0.5 if layer.alpha is None else 0)
            b = None if b is None else bits(b)
        elif layer.kind == 'tern':
            s = w.abs().mean().clamp(min=1e-5)
            w = ramped(layer, w, w, (w / s).round().clamp(-1, 1) * s)
        elif layer.kind == 'int8':
            s = w.abs().amax(1, keepdim=True) / 127
            w = ramped(layer, w, w, (w / s).round() * s)
        else:
            groups = F.pad(w.flatten(), (0, -w.numel() % layer.group)).view(-1, layer.group)
            top = groups.abs().amax(1, keepdim=True).half().to(w.dtype)
            q = ((groups + top) / (2 * top) * 15).round().clamp(0, 15) / 15 * 2 * top - top
            w = ramped(layer, w, w, q.flatten()[:w.numel()].view(w.shape))
        parts.append((w, b))
    return parts


def reference(layer, x, given=None):
    """The output of a latent layer by its formula. given: the options of F.conv2d, as the layer got them."""
    if isinstance(layer, BinaryEmbedding):
        table = ramped(layer, layer.weight, in_bits(layer.weight), bits(layer.weight))
        return normalize(table[x] + (0 if layer.bias is None else bits(layer.bias)), layer.alpha, -1)
    conv = hasattr(layer, 'conv')
    a = activated(layer, x)
    if getattr(layer, 'gain', None) is not None:
        a = a / (a.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.gain
    if layer.kind == 'tern':
        s = 127 / a.abs().amax((1, 2, 3) if conv else -1, keepdim=True).clamp(min=1e-5)
        a = straight_through(a, (a * s).round().clamp(-128, 127) / s)
    parts = rounded(layer)
    if layer.out_gain is not None:
        gains = layer.out_gain.split([len(w) for w, _ in parts])
        parts = [(w * gain[:, None], b) for (w, b), gain in zip(parts, gains, strict=True)]
    z = [F.conv2d(a, w, b, **layer.conv if given is None else given) if conv else F.linear(a, w, b) for w, b in parts]
    if layer.alpha is None:
        return torch.cat(z, 1 if conv else -1)
    if conv:
        dims = {'channel': (1,), 'spatial': (2, 3)}[layer.norm]
        return normalize(z[0], layer.alpha.view(-1, 1, 1), dims, layer.eps)
    return torch.cat([normalize(z, alpha, -1, layer.eps) for z, alpha in zip(z, layer.alpha, strict=True)], -1)


def filled(layer, dtype=torch.float64, seed=1):
    """The layer with random parameters: biases and gains that matter, alphas of both signs, none of them near 0."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            r = torch.randn(p.shape, generator=g)
            p.copy_(torch.where(r > 0, r + 0.5, r - 0.5) if name in ('alpha', 'gain') else r)
    return layer.to(dtype)


def gradients(layer, function, x, v):
    """{name: tensor} of the value and the gradients of sum(value * v) for x and every parameter that is trained."""
    wanted = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    if x.is_floating_point():
        x = x.detach().requires_grad_()
        wanted = {'input': x} | wanted
    y = function(x)
    return {'value': y.detach(), **dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), v), strict=True))}


def same(got, want, tol):
    """Each tensor of `got` within tol of the one in `want`, relative to its largest entry or to 1, of its dtype and shape."""
    for name, w in want.items():
        assert got[name].dtype == w.dtype and got[name].shape == w.shape, name
        assert_close(got[name], w, rtol=0, atol=tol * max(w.abs().max().item() if w.numel() else 1, 1),
                     msg=lambda m, name=name: f'{name}: {m}')


def check(layer, x, tol, given=None):
    """Value and every gradient of the layer are those of its formula."""
    formula = lambda x: reference(layer, x, given)
    v = torch.randn_like(formula(x))
    same(gradients(layer, layer, x, v), gradients(layer, formula, x, v), tol)


def off(got, want, floor=1e-30):
    """Distance of two tensors, relative to the norm of the second or to `floor`."""
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=floor)).item()


def saved(model, x):
    """(bytes, [(dtype, numel)]) of the tensors that autograd saves of model(x): each storage once, parameters not counted."""
    own, held = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def hold(t):
        if t.untyped_storage().data_ptr() not in own:
            held[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda t: t):
        y = model(x)
    assert y.grad_fn is not None
    return sum(t.untyped_storage().nbytes() for t in held.values()), [(t.dtype, t.numel()) for t in held.values()]
