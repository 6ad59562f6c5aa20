"""Compressed layers: values and gradients against the product with a weight decoded by hand, and memory."""
import copy
import gc
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from formulas import activated, fixed, off  # noqa: F401
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import layers
import quant
from layers import HalfLinear, Int8Linear, Linear4bit, convert, linear
from quant import FIT4, NF4

LEVELS = {'uniform': torch.linspace(-1, 1, 16), 'nf4': torch.tensor(NF4), 'fit4': torch.tensor(FIT4)}


def decoded(layer):
    """fp32 weight of a packed or half layer, from its bytes, literally."""
    if isinstance(layer, HalfLinear):
        return layer.weight.detach().float()
    if isinstance(layer, Int8Linear):
        return layer.code.float() * layer.weight_scale
    low, high = layer.code.long() & 15, layer.code.long() >> 4
    codes = torch.stack((high, low) if layer.format == 'nf4' else (low, high), 1).view(-1, layer.group)
    s = layer.absmax.float()
    if layer.scales == '8bit':
        s = s / 255 * layer.absmax_top.repeat_interleave(256)[:len(s)]
    elif layer.scales == 'log8':
        s = s.sign() * 2 ** ((layer.absmax_top.item() - 127 + s.abs()) / 14)
    return (LEVELS[layer.format][codes] * s[:, None]).flatten()[:math.prod(layer.shape)].view(layer.shape)


# kind, options, shape of x, out_features, bias
CASES = [('int4', {}, (5, 13), 6, True), ('int4', dict(scales='fp32', group=16), (3, 64), 7, True),
         ('int4', dict(scales='8bit', group=16, act='gelu'), (2, 3, 24), 7, False),
         ('nf4', {}, (5, 13), 6, True), ('nf4', dict(group=128), (4, 48), 9, True),
         ('nf4', dict(scales='8bit', group=64), (5, 128), 3, True), ('nf4', dict(scales='fp32', group=24), (1,), 1, True),
         ('nf4', dict(group=48), (3, 1000), 600, True),
         ('fit4', dict(group=16, act='gelu'), (2, 3, 24), 7, False), ('fit4', dict(group=32), (64,), 5, True),
         ('fit4', {}, (0, 13), 6, True),
         ('int8', {}, (5, 13), 6, True), ('int8', {}, (1,), 1, True), ('int8', {}, (0, 13), 6, True),
         ('int8', dict(act='gelu'), (2, 3, 7), 9, False), ('half', {}, (5, 13), 6, True), ('half', {}, (4, 1), 2, False),
         ('half', dict(dtype=torch.bfloat16), (2, 3, 7), 9, True)]


def compare(layer, x, reference, latent, exact, tol=1e-5):
    """Value and gradients of x and `latent` are those of reference(x), with `exact` in the place of `latent`, within tol."""
    x, v = x.requires_grad_(), torch.randn(*x.shape[:-1], layer.out_features)
    got, want = ([y := function(x), *torch.autograd.grad(y, [x, *wanted], v)]
                 for function, wanted in ((layer, latent), (reference, exact)))
    assert got[0].dtype == got[1].dtype == x.dtype
    for g, w in zip(got, want, strict=True):
        assert_close(g, w.to(g.dtype), rtol=0, atol=tol * max(1, w.abs().max().item() if w.numel() else 1))


# ------------------------------------------------------------------------------------------------ values and gradients


@pytest.mark.parametrize('kind, options, shape, out, bias', CASES)
def test_a_layer_is_the_product_with_its_decoded_weight(monkeypatch, kind, options, shape, out, bias):
    """So are its gradients. In training they pass straight through; frozen it is the same with kernels.c and without."""
    layer, x = linear(kind, shape[-1], out, bias, **options).requires_grad_(), torch.randn(shape)
    full, tol = nn.Linear(shape[-1], out).weight.detach(), {'int8': 0.01, 'half': 4e-3 if options else 1e-3}.get(kind, 0.2)
    layer.weight.data.copy_(full)
    if bias:
        nn.init.normal_(layer.bias)
    exact = [decoded(layer if kind == 'half' else copy.deepcopy(layer).pack_()).requires_grad_()]
    exact += [layer.bias.detach().float().requires_grad_()] if bias else []
    reference = lambda x: F.linear(activated(layer, x) if hasattr(layer, 'act') else x, *exact)
    assert off(exact[0], full) < tol
    compare(layer, x, reference, list(layer.parameters()), exact,
            {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[layer.weight.dtype])
    if kind == 'half':                              # a bias of 16 bits stays frozen
        compare(layer.requires_grad_(False), x, reference, [], [])
    else:
        assert not any(p.requires_grad for p in layer.pack_().parameters())
        compare(layer, x, reference, [layer.bias.requires_grad_()] if bias else [], exact[1:])
    with torch.no_grad():
        y = layer(x)
        monkeypatch.setattr(quant, 'kernels', lambda: None)
        assert_close(y, reference(x), rtol=1e-5, atol=1e-5)
        few = len(x.view(-1, x.shape[-1])) <= 4 and isinstance(layer, Linear4bit)            # summed in another order
        assert_close(layer(x), y, rtol=0, atol=1e-5 * few, msg='kernels.c and torch do not agree')


@pytest.mark.parametrize('shape, act', [((5, 13), None), ((2, 3, 13), 'gelu'), ((13,), None)])
def test_int8_activations_are_rounded_per_token(shape, act):
    """activations='int8': round(127 x / max|x|) of each token, gradient straight through; a row of zeros is no 0/0."""
    layer, x = Int8Linear(13, 6, activations='int8', act=act), torch.randn(shape)
    x.view(-1, 13)[0] *= 0 if len(shape) > 1 else 100
    nn.init.normal_(layer.bias)
    weight = decoded(copy.deepcopy(layer).pack_())

    def reference(x):
        a = activated(layer, x)
        s = 127 / a.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        return F.linear(a + ((a * s).round() / s - a).detach(), weight, layer.bias)
    compare(layer, x, reference, [], [])
    compare(layer.pack_(), x, reference, [], [])


@pytest.mark.parametrize('tokens, dtype', [(1, torch.float32), (2, torch.bfloat16), (40, torch.float32)])
def test_int8_product_in_int8_equals_the_float_product(monkeypatch, tokens, dtype):
    """A packed layer gives the same with int8 instructions and without, to the rounding of the float product."""
    layer, x, results = Int8Linear(200, 48, tokens > 1, activations='int8').pack_(), torch.randn(tokens, 200), []
    for fast in (False, True):
        monkeypatch.setattr(layers, 'has_fast_int8', lambda device, fast=fast: fast)
        results.append(layer(x.to(dtype)))
    assert results[0].dtype == results[1].dtype == dtype
    assert off(results[1], results[0]) < (1e-6 if dtype == torch.float32 else 0.01)


# -------------------------------------------------------------------------------------------------------- packed layers

KINDS = {'int4': dict(kind='int4'), 'nf4': dict(kind='nf4'), 'fit4': dict(kind='fit4'), 'int8': dict(kind='int8'),
         'nf4 8bit': dict(kind='nf4', scales='8bit'), 'int8 act': dict(kind='int8', activations='int8'),
         'half': dict(kind='half')}


def packed(n, out, bias=True, kind=None, **options):
    layer = linear(kind, n, out, bias, **options)
    return layer if kind == 'half' else layer.pack_()


@pytest.mark.parametrize('kind', KINDS)
def test_a_packed_layer_works_in_another_dtype_and_under_another_default_device(kind):
    """.double() and .bfloat16() compute the same weights. Under `with torch.device('meta')` a CPU layer works too."""
    layer = packed(64, 8, **KINDS[kind])
    for rows in (6, 2):
        x = torch.randn(rows, 64).requires_grad_()
        want = [y := layer(x), torch.autograd.grad(y.square().sum(), x)[0]]
        for cache in (quant._table, quant._grid_from):
            cache.cache_clear()
        with torch.device('meta'):
            got = [y := layer(x), torch.autograd.grad(y.square().sum(), x)[0]]
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert off(copy.deepcopy(layer).double()(x.double()), want[0]) < 1e-5
    assert off(copy.deepcopy(layer).bfloat16()(x.bfloat16()), want[0]) < 0.03


@pytest.mark.parametrize('kind', ['fit4', 'int8', 'half', ('lowrank', dict(rank=5)), 'tern', 'bin',
                                  ('lora', dict(rank=3, base='nf4'))], ids=str)
def test_bfloat16_inputs_and_autocast_give_bfloat16(kind):
    """Every kind gives bf16 for bf16 inputs and under autocast, near fp32, and finite gradients of x."""
    model, x = nn.Sequential(nn.Linear(48, 48)), torch.randn(4, 48)
    convert(model, {'0': kind}, verbose=False)
    want, low = model(x), model(x.bfloat16())
    with torch.autocast('cpu', torch.bfloat16):
        got = model(x.requires_grad_())
    got.float().square().sum().backward()
    assert low.dtype == got.dtype == torch.bfloat16 and off(low, want) < 0.03 and off(got, want) < 0.03
    assert x.grad.isfinite().all()


@pytest.mark.parametrize('kind', ['nf4', 'half'])
def test_gradient_of_many_blocks_is_as_exact_as_of_one(kind):
    """Of 8192 x 256 weights, several blocks, the gradient of x is not rounded to 16 bits at each."""
    layer = packed(256, 8192, False, kind=kind)
    for dtype, tol in ((torch.bfloat16, 3e-3), (torch.float16, 4e-4), (torch.float32, 1e-6), (torch.float64, 1e-7)):
        x, g, weight = torch.randn(5, 256).to(dtype), torch.randn(5, 8192).to(dtype), decoded(layer).to(dtype).double()
        y = layer(x.requires_grad_())
        y.backward(g)
        assert y.dtype == x.grad.dtype == dtype
        assert off(y, x.double() @ weight.T) < tol and off(x.grad, g.double() @ weight) < tol


class Largest(TorchDispatchMode):
    """The most elements of a floating-point tensor that any operation has made."""
    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point():
            self.most = max(self.most, out.numel())
        return out


@pytest.mark.parametrize('kind', KINDS)
def test_a_frozen_layer_never_holds_its_whole_weight_and_saves_nothing(monkeypatch, kind):
    """1024 x 1024: no operation makes more than a quarter of the weight, and nothing is saved for the gradient of x."""
    monkeypatch.setattr(layers, 'GPU_BLOCK', 1 << 20)
    layer = packed(1024, 1024, **KINDS[kind])
    weight, x, saved = decoded(layer), torch.randn(5, 1024).requires_grad_(), []
    layer(x)                                                                            # tables that are made once
    gc.freeze()
    with Largest() as seen, torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
        gc.collect()
        new = {o.untyped_storage().data_ptr() for o in gc.get_objects() if type(o) is torch.Tensor}
        gc.unfreeze()
        y.sum().backward()
    assert 1024 * 5 <= seen.most <= 1 << 18 and saved == [] and new == {y.untyped_storage().data_ptr()}      # not even scales
    rows = (x / x.abs().amax(-1, keepdim=True) * 127).round() * x.abs().amax(-1, keepdim=True) / 127
    assert_close(y, F.linear(rows if kind == 'int8 act' else x, weight, layer.bias.float()), rtol=1e-4, atol=1e-4)
    assert_close(x.grad, weight.sum(0).expand(5, -1), rtol=1e-4, atol=1e-4)
    if isinstance(layer, Linear4bit) and not quant.AS_ON_GPU and (library := quant.kernels()) and library.most_tokens():
        with Largest() as seen:                     # few tokens, with AVX-512: nothing is decoded
            assert_close(layer(x[:3]), y[:3], rtol=1e-4, atol=1e-5)
        assert seen.most <= 1024 * 32                                                       # scales, of 8 bits each
