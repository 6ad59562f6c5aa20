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


def act(layer, x):
    return activated(layer, x) if hasattr(layer, 'act') else x


SHAPES = [({}, ((5, 13), 6, True)), (dict(group=16, act='gelu'), ((2, 3, 24), 7, False)), (dict(group=128), ((4, 48), 9, True)),
          (dict(group=24), ((1,), 1, True)), (dict(group=16), ((3, 64), 7, True)),
          (dict(group=32, act='gelu'), ((64,), 5, False)), (dict(group=64), ((5, 128), 3, True))]
# name: (make(in, out, bias), (shape of x, out, bias), largest relative error of the weight)
CASES = {f'{f} {s} {i}': (lambda n, m, b, f=f, s=s, o=o: Linear4bit(n, m, b, format=f, scales=s, **o), shape, 0.2)
         for i, (o, shape) in enumerate(SHAPES) for j, (f, s) in enumerate([
             ('uniform', ''), ('nf4', ''), ('fit4', ''), ('uniform', 'fp32'), ('nf4', '8bit'), ('uniform', '8bit'),
             ('nf4', 'fp32')]) if j < 3 or (i + j) % 2}
CASES |= {'int8': (Int8Linear, ((5, 13), 6, True), 0.01), 'int8 one': (Int8Linear, ((1,), 1, True), 0.01),
          'int8 act': (lambda n, m, b: Int8Linear(n, m, b, act='gelu'), ((2, 3, 7), 9, False), 0.01),
          'int8 empty': (Int8Linear, ((0, 13), 6, True), 0.01),
          'fit4 empty': (lambda n, m, b: Linear4bit(n, m, b, format='fit4'), ((0, 13), 6, True), 0.2),
          'half': (HalfLinear, ((5, 13), 6, True), 1e-3), 'half one': (HalfLinear, ((4, 1), 2, False), 1e-3),
          'half bf16': (lambda n, m, b: HalfLinear(n, m, b, dtype=torch.bfloat16), ((2, 3, 7), 9, True), 4e-3),
          'int8 large': (Int8Linear, ((3, 1024), 600, True), 0.01), 'half large': (HalfLinear, ((3, 1024), 600, True), 1e-3),
          'nf4 large': (lambda n, m, b: Linear4bit(n, m, b, format='nf4', group=48), ((3, 1000), 600, True), 0.2)}
every_case = pytest.mark.parametrize('name', CASES)


def made(name, packed=True):
    """(layer, its weight before it was rounded, input, error allowed); biases that matter."""
    make, (shape, out, bias), tol = CASES[name]
    full, layer = nn.Linear(shape[-1], out, bias), make(shape[-1], out, bias)
    with torch.no_grad():
        layer.weight.copy_(full.weight)
        if bias:
            layer.bias.copy_(torch.randn(out))
    return (layer.pack_() if packed and hasattr(layer, 'pack_') else layer), full.weight.detach(), torch.randn(shape), tol


def grads(function, wanted, v):
    y = function()
    return [y.detach(), *torch.autograd.grad(y, wanted, v)]


def check(got, want, tol=1e-5):
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape and g.dtype == w.dtype
        assert_close(g, w, rtol=0, atol=tol * max(1, w.abs().max().item() if w.numel() else 1))


# ------------------------------------------------------------------------------------------------ values and gradients


@every_case
def test_frozen_layer_is_the_product_with_its_decoded_weight(monkeypatch, name):
    """The output and the gradients of x and bias are those of the decoded weight, with kernels.c and without."""
    layer, full, x, tol = made(name)
    weight, wanted = decoded(layer), [x.requires_grad_()]
    assert off(weight, full) < tol and not any(p.requires_grad for p in layer.parameters())
    if layer.bias is not None and layer.bias.dtype == torch.float32:
        wanted.append(layer.bias.requires_grad_())
    bias = None if layer.bias is None else layer.bias.float()
    v = torch.randn(*x.shape[:-1], len(weight))
    check(grads(lambda: layer(x), wanted, v), grads(lambda: F.linear(act(layer, x), weight, bias), wanted, v))
    with torch.no_grad():
        y = layer(x)
        monkeypatch.setattr(quant, 'kernels', lambda: None)
        assert_close(y, F.linear(act(layer, x), weight, bias), rtol=1e-5, atol=1e-5)
        few = len(x.view(-1, x.shape[-1])) <= 4 and isinstance(layer, Linear4bit)            # summed in another order
        assert_close(layer(x), y, rtol=0, atol=1e-5 * few, msg='kernels.c and torch do not agree')


@every_case
def test_training_passes_the_gradient_straight_through(name):
    """Before packing the layer multiplies by the rounded weight, and its weight gets the gradient of the rounded one."""
    layer, _, x, _ = made(name, packed=False)
    layer.requires_grad_()
    weight = decoded(layer if isinstance(layer, HalfLinear) else copy.deepcopy(layer).pack_()).requires_grad_()
    bias = [] if layer.bias is None else [layer.bias.detach().float().requires_grad_()]
    latent, v = [layer.weight, *([layer.bias] if bias else [])], torch.randn(*x.shape[:-1], len(weight))
    got = grads(lambda: layer(x), [x.requires_grad_(), *latent], v)
    want = grads(lambda: F.linear(act(layer, x), weight, *bias), [x, weight, *bias], v)
    check(got, [w.to(g.dtype) for g, w in zip(got, want, strict=True)],
          {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[latent[0].dtype])


@pytest.mark.parametrize('act', [None, 'gelu'])
@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('shape', [(5, 13), (2, 3, 13), (13,)])
def test_int8_activations_are_rounded_per_token(shape, packed, act):
    """activations='int8': round(127 x / max|x|) of each token, gradient straight through; a row of zeros is no 0/0."""
    layer, x = Int8Linear(13, 6, activations='int8', act=act), torch.randn(shape)
    x.view(-1, 13)[0] *= 0 if len(shape) > 1 else 100
    nn.init.normal_(layer.bias)
    weight = decoded(copy.deepcopy(layer).pack_())
    if packed:
        layer.pack_()

    def reference(x):
        a = activated(layer, x)
        s = 127 / a.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        return F.linear(a + ((a * s).round() / s - a).detach(), weight, layer.bias)
    v = torch.randn(*shape[:-1], 6)
    check(grads(lambda: layer(x), [x.requires_grad_()], v), grads(lambda: reference(x), [x], v))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('tokens', [1, 2, 40])
def test_int8_product_in_int8_equals_the_float_product(monkeypatch, tokens, bias, dtype):
    """A packed layer gives the same with int8 instructions and without, to the rounding of the float product."""
    layer, x, results = Int8Linear(200, 48, bias, activations='int8').pack_(), torch.randn(tokens, 200), []
    for fast in (False, True):
        monkeypatch.setattr(layers, 'has_fast_int8', lambda device, fast=fast: fast)
        results.append(layer(x.to(dtype)))
    assert results[0].dtype == results[1].dtype == dtype
    assert off(results[1], results[0]) < (1e-6 if dtype == torch.float32 else 0.01)


# -------------------------------------------------------------------------------------------------------- packed layers

KINDS = {'int4': dict(kind='int4'), 'nf4': dict(kind='nf4'), 'fit4': dict(kind='fit4'), 'int8': dict(kind='int8'),
         'nf4 8bit': dict(kind='nf4', scales='8bit'), 'int8 act': dict(kind='int8', activations='int8')}
every_kind = pytest.mark.parametrize('kind', KINDS)


@pytest.mark.parametrize('format, scales', [('fit4', 'log8'), ('uniform', 'fp16'), ('uniform', '8bit'), ('nf4', 'fp32'),
                                            ('nf4', '8bit')])
def test_packing_once_more_changes_nothing(format, scales):
    """pack_(), unpack_(), pack_(), unpack_(): the same weights after each, also of rows that differ in size."""
    for group, size in [(16, (64, 40)), (64, (13, 128)), (0, (5, 7))]:
        layer = Linear4bit(*size, format=format, group=group, scales=scales)
        layer.weight.data *= torch.logspace(0, -1, size[1])[:, None]
        want = layer.pack_().decode()[0]
        for _ in range(2):
            assert torch.equal(layer.unpack_().weight, want) and torch.equal(layer.pack_().decode()[0], want)


@every_kind
def test_a_packed_layer_works_in_another_dtype_and_under_another_default_device(kind):
    """.double() and .bfloat16() compute the same weights. Under `with torch.device('meta')` a CPU layer works too."""
    layer = linear(in_features=64, out_features=8, **KINDS[kind]).pack_()
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


@pytest.mark.parametrize('kind', ['int4', 'nf4', 'fit4', 'int8', 'half', ('lowrank', dict(rank=5)), 'tern', 'bin',
                                  ('lora', dict(rank=3, base='nf4')), ('nf4', dict(scales='8bit'))], ids=str)
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


@pytest.mark.parametrize('dtype, tol', [(torch.bfloat16, 3e-3), (torch.float16, 4e-4), (torch.float32, 1e-6),
                                        (torch.float64, 1e-7)])
@pytest.mark.parametrize('make', [lambda *size: Linear4bit(*size, False, format='nf4').pack_(),
                                  lambda *size: HalfLinear(*size, False)], ids=['nf4', 'half'])
def test_gradient_of_many_blocks_is_as_exact_as_of_one(make, dtype, tol):
    """Of 8192 x 256 weights, several blocks, the gradient of x is not rounded to 16 bits at each."""
    layer, g, x = make(256, 8192), torch.randn(5, 8192).to(dtype), torch.randn(5, 256).to(dtype).requires_grad_()
    y, weight = layer(x), decoded(layer).to(dtype).double()
    y.backward(g)
    assert y.dtype == x.grad.dtype == dtype and off(y, x.double() @ weight.T) < tol and off(x.grad, g.double() @ weight) < tol


class Largest(TorchDispatchMode):
    """The most elements of a floating-point tensor that any operation has made."""
    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point():
            self.most = max(self.most, out.numel())
        return out


@pytest.mark.parametrize('kind', [*KINDS, 'half'])
def test_a_frozen_layer_never_holds_its_whole_weight_and_saves_nothing(kind):
    """1024 x 1024: no operation makes more than a quarter of the weight, and nothing is saved for the gradient of x."""
    layer = HalfLinear(1024, 1024) if kind == 'half' else linear(in_features=1024, out_features=1024, **KINDS[kind]).pack_()
    weight, x, held = decoded(layer), torch.randn(5, 1024).requires_grad_(), []
    layer(x)                                                                            # tables that are made once
    gc.freeze()
    with Largest() as seen, torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        y = layer(x)
        gc.collect()
        new = {o.untyped_storage().data_ptr() for o in gc.get_objects() if type(o) is torch.Tensor}
        gc.unfreeze()
        y.sum().backward()
    assert 1024 * 5 <= seen.most <= 1 << 18 and held == [] and new == {y.untyped_storage().data_ptr()}      # not even scales
    rows = (x / x.abs().amax(-1, keepdim=True) * 127).round() * x.abs().amax(-1, keepdim=True) / 127
    assert_close(y, F.linear(rows if kind == 'int8 act' else x, weight, layer.bias.float()), rtol=1e-4, atol=1e-4)
    assert_close(x.grad, weight.sum(0).expand(5, -1), rtol=1e-4, atol=1e-4)
    if isinstance(layer, Linear4bit) and (library := quant.kernels()) and library.most_tokens():
        with Largest() as seen:                     # few tokens, with AVX-512: nothing is decoded
            assert_close(layer(x[:3]), y[:3], rtol=1e-4, atol=1e-5)
        assert seen.most <= 1024 * 32                                                       # scales, of 8 bits each
