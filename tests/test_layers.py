"""Low-bit layers: values and every gradient against literal formulas, packing that changes no logit, bytes counted."""
import copy
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.testing import assert_close

import layers
from common import load_packed, read_packed, save_packed
from layers import (Activation, BinaryConv2d, BinaryEmbedding, BinaryLinear, Conv4bit, Int8Linear, Linear4bit, LoRALinear,
                    TernaryConv2d, TernaryLinear, convert, linear, model_bytes, pack)
from pretrained import formats, replace  # noqa: F401  formats adds its layers to FORMATS
from quant import binarize, decode4, pack4, pack_bits, quantize4, quantize_rows, ternarize, unpack_bits


@pytest.fixture(autouse=True)
def fixed():
    """One thread and one seed: the tests share a machine and must give the same figures in any order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------ references: formulas and plain autograd


def straight_through(p, q):
    return p + (q - p).detach()


def bits(p):
    """{0,1}, literally."""
    return straight_through(p, (p > p.mean()).to(p.dtype))


def normalize(z, alpha, dims, eps=1e-5):
    return alpha * (z - z.mean(dims, keepdim=True)) / (z.std(dims, keepdim=True, unbiased=False) + eps)


def matrices(layer):
    """(weight, bias or None) of each chunk."""
    n = getattr(layer, 'chunks', 1)
    rows = [layer.out_features // n] * n if isinstance(n, int) else [*n]
    return zip(layer.weight.split(rows), [None] * len(rows) if layer.bias is None else layer.bias.split(rows), strict=True)


def activated(layer, x):
    if layer.act in ('relu2_glu', 'silu_glu'):
        gate, up = x[..., :layer.in_features], x[..., layer.in_features:]
        return (gate * gate * (gate > 0) if layer.act == 'relu2_glu' else gate / (1 + (-gate).exp())) * up
    return {None: lambda x: x, 'gelu': F.gelu, 'relu': F.relu}[layer.act](x)


def reference_binary(layer, x):
    z = [F.linear(activated(layer, x), bits(w), None if b is None else bits(b)) for w, b in matrices(layer)]
    return torch.cat([normalize(z, alpha, -1, layer.eps) for z, alpha in zip(z, layer.alpha, strict=True)], -1)


def reference_conv(layer, x):
    z = F.conv2d(x, bits(layer.weight), None if layer.bias is None else bits(layer.bias), **layer.conv)
    dims = {'channel': (1,), 'spatial': (2, 3), 'sample': (1, 2, 3)}[layer.norm]
    return normalize(z, layer.alpha.view(-1, 1, 1), dims, layer.eps)


def reference_embedding(layer, ids):
    return normalize(bits(layer.weight)[ids] + (0 if layer.bias is None else bits(layer.bias)), layer.alpha, -1)


def reference_ternary(layer, x):
    a = activated(layer, x)
    if layer.norm:
        a = a / (a.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.gain
    s = 127 / a.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    a = straight_through(a, (a * s).round().clamp(-128, 127) / s)
    scale = lambda w: w.abs().mean().clamp(min=1e-5)
    return torch.cat([F.linear(a, straight_through(w, (w / s).round().clamp(-1, 1) * s), b)
                      for w, b in matrices(layer) for s in [scale(w)]], -1)


def reference_int4(layer, x):
    w = F.pad(layer.weight.flatten(), (0, -layer.weight.numel() % layer.group)).view(-1, layer.group)
    n = w.abs().amax(1, keepdim=True).half().to(w.dtype)
    w = straight_through(w, ((w + n) / (2 * n) * 15).round().clamp(0, 15) / 15 * 2 * n - n)
    return F.linear(activated(layer, x), w.flatten()[:layer.weight.numel()].view(layer.shape), layer.bias)


def filled(layer, dtype=torch.float64, seed=1):
    """The layer with random parameters: biases and gains that matter, alphas of both signs, none of them near 0."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            r = torch.randn(p.shape, generator=g)
            p.copy_(torch.where(r > 0, r + 0.5, r - 0.5) if name in ('alpha', 'gain') else r)
    return layer.to(dtype)


def gradients(layer, function, x, v):
    """{name: tensor} of the value and the gradients of sum(value * v) for x and every parameter."""
    names, wanted = map(list, zip(*layer.named_parameters(), strict=True))
    if x.is_floating_point():
        x = x.detach().requires_grad_()
        names, wanted = ['input', *names], [x, *wanted]
    y = function(x)
    return {'value': y.detach(), **dict(zip(names, torch.autograd.grad(y, wanted, v), strict=True))}


def check(layer, reference, x, tol):
    """Value and every gradient within tol of the reference's, relative to the largest entry of a tensor or to 1."""
    v = torch.randn_like(reference(layer, x))
    got, want = (gradients(layer, f, x, v) for f in (layer, lambda x: reference(layer, x)))
    for name in want:
        assert got[name].dtype == want[name].dtype and got[name].shape == want[name].shape, name
        assert_close(got[name], want[name], rtol=0, atol=tol * max(want[name].abs().max().item(), 1),
                     msg=lambda m, name=name: f'{name}: {m}')


def off(got, want, floor=1e-30):
    """Distance of two tensors, relative to the norm of the second or to `floor`."""
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=floor)).item()


# ------------------------------------------------------------------------------------------- values and every gradient

BINARY = [((5, 13), 6, {}), ((2, 3, 7), 9, dict(chunks=3, act='gelu')), ((4, 1), 2, dict(bias=False)), ((17,), 5, {}),
          ((2, 2, 2, 33), 31, dict(act='gelu')), ((3, 8), 6, dict(chunks=3, bias=False, eps=1e-3))]
CONV = [dict(norm=norm, **options) for norm in ('channel', 'spatial', 'sample') for options in (
    {}, dict(stride=2, padding=1, bias=False), dict(kernel_size=(1, 3), padding=(0, 2), dilation=2), dict(groups=2))]
TERNARY = [((5, 13), 6, dict(bias=True)), ((2, 3, 7), 9, dict(chunks=3, act='gelu')),
           ((4, 1), 2, {}), ((4, 2), 1, {}), ((17,), 5, dict(norm=False)), ((2, 2, 33), 31, dict(act='gelu', eps=1e-3)),
           ((3, 8), 6, dict(norm=False, act='gelu', chunks=3, bias=True)),
           ((3, 8), 6, dict(norm=False, bias=True)), ((5, 13), 12, dict(chunks=(6, 2, 4), bias=True)),
           ((3, 8), 9, dict(chunks=[1, 7, 1], norm=False)), ((5, 26), 6, dict(act='relu2_glu')),
           ((2, 3, 14), 12, dict(act='silu_glu', chunks=(6, 2, 4), bias=True)), ((34,), 5, dict(act='silu_glu', norm=False)),
           ((4, 2), 3, dict(act='relu2_glu', chunks=(2, 1), eps=1e-3))]     # gated: x is twice as wide
INT4 = [((5, 13), 6, {}), ((2, 3, 7), 9, dict(act='gelu')), ((4, 1), 2, dict(bias=False)), ((17,), 5, dict(group=2)),
        ((3, 16), 4, dict(group=64, act='gelu', bias=False))]


@pytest.mark.parametrize('shape, out, options', BINARY)
def test_binary_linear_is_its_formula(shape, out, options):
    """BinaryLinear with {0,1} weights, per-chunk means and alphas: value and gradients of x, weight, bias, alpha."""
    check(filled(BinaryLinear(shape[-1], out, **options)), reference_binary, torch.randn(shape).double(), 1e-12)


@pytest.mark.parametrize('options', CONV, ids=str)
def test_binary_conv_is_its_formula(options):
    """BinaryConv2d with {0,1} weights under each norm, stride, padding, dilation and groups, on non-negative images."""
    options = dict(kernel_size=3) | options
    check(filled(BinaryConv2d(4, 6, **options)), reference_conv, torch.rand(2, 4, 9, 8).double(), 1e-11)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('ids', [[[0, 3, 3, 10]], [[1, 2], [2, 9]], 4], ids=str)
def test_binary_embedding_is_its_formula(bias, ids):
    """BinaryEmbedding: bits of the row plus bits of the bias, mean over the whole table, repeated ids add up."""
    check(filled(BinaryEmbedding(11, 13, bias)), reference_embedding, torch.tensor(ids), 1e-12)


@pytest.mark.parametrize('shape, out, options', TERNARY)
def test_ternary_linear_is_its_formula(shape, out, options):
    """TernaryLinear, RMSNorm inside or not, chunks of any rows, gated or not: value and gradients of x, weight, bias, gain."""
    n = shape[-1] // (2 if 'glu' in options.get('act', '') else 1)
    check(filled(TernaryLinear(n, out, **options)), reference_ternary, torch.randn(shape).double(), 1e-12)


@pytest.mark.parametrize('shape, out, options', INT4)
def test_int4_linear_is_its_formula(shape, out, options):
    """Linear4bit: value and gradients of x, weight, bias; to 1e-6, its levels are fp32 whatever the weight is."""
    check(filled(Linear4bit(shape[-1], out, **options)), reference_int4, torch.randn(shape).double(), 1e-6)


FORMS = {'binary': (lambda: BinaryLinear(33, 12), reference_binary, (7, 33)),
         'conv channel': (lambda: BinaryConv2d(4, 8, 3), reference_conv, (2, 4, 9, 8)),
         'conv spatial': (lambda: BinaryConv2d(4, 8, 3, norm='spatial'), reference_conv, (2, 4, 9, 8)),
         'conv sample': (lambda: BinaryConv2d(4, 8, 3, norm='sample'), reference_conv, (2, 4, 9, 8)),
         'embedding': (lambda: BinaryEmbedding(11, 12), reference_embedding, None),
         'ternary': (lambda: TernaryLinear(33, 12, True), reference_ternary, (7, 33)),
         'gated': (lambda: TernaryLinear(33, 12, True, chunks=(7, 5), act='relu2_glu'), reference_ternary, (7, 66)),
         'int4': (lambda: Linear4bit(33, 12), reference_int4, (7, 33))}
every_form = pytest.mark.parametrize('form', FORMS)


def made(form, dtype=torch.float32):
    """(layer, reference, input) of FORMS."""
    make, reference, shape = FORMS[form]
    x = torch.tensor([[0, 3, 10], [3, 5, 1]]) if shape is None else torch.randn(shape).to(dtype)
    return filled(make(), dtype), reference, x


@every_form
@pytest.mark.parametrize('dtype, tol', [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_lower_precision_is_near_float64(form, dtype, tol):
    """In fp32 and bf16 value and gradients are within rounding of the formula in float64 on the same numbers."""
    layer, reference, x = made(form, dtype)
    exact, x64 = copy.deepcopy(layer).double(), x.double() if x.is_floating_point() else x
    v = torch.randn_like(layer(x))
    got = gradients(layer, layer, x, v)
    want = gradients(exact, lambda x: reference(exact, x), x64, v.double())
    for name in want:
        assert got[name].dtype == dtype and off(got[name], want[name], 1) < tol, (name, off(got[name], want[name], 1))


@pytest.mark.parametrize('frozen', ['weight', 'bias', 'alpha', 'gain', 'input'])
@pytest.mark.parametrize('cls', [BinaryLinear, TernaryLinear, Linear4bit])
def test_freezing_one_tensor_leaves_the_other_gradients(cls, frozen):
    """Without a gradient for one of x, weight, bias, alpha, gain, the rest get the same gradients as before."""
    x, layer = torch.randn(3, 7).requires_grad_(), filled(cls(7, 6, True), torch.float32)
    leaves = dict(layer.named_parameters(), input=x)
    full = dict(zip(leaves, torch.autograd.grad(layer(x).square().sum(), leaves.values()), strict=True))
    if frozen in leaves:
        leaves.pop(frozen).requires_grad_(False)
    for name, g in zip(leaves, torch.autograd.grad(layer(x).square().sum(), leaves.values()), strict=True):
        assert torch.equal(g, full[name]), name


# -------------------------------------------------------------------------------------------------------- equivalences


def plus_minus(p):
    return torch.where(p > p.mean(), 1.0, -1.0).to(p)


def test_binary_linear_equals_plus_minus_one_with_twice_the_eps():
    """{0,1} weights and biases give the function of {-1,+1} ones when eps doubles: z01 = z+-/2 + (sum(x) + 1)/2."""
    layer, x = filled(BinaryLinear(13, 6, eps=1e-2)), torch.randn(5, 13).double()
    z = F.linear(x, plus_minus(layer.weight), plus_minus(layer.bias))
    assert_close(layer(x), normalize(z, layer.alpha, -1, 2e-2), rtol=0, atol=1e-13)
    assert off(layer(x), normalize(z, layer.alpha, -1, 1e-2)) > 1e-4


@pytest.mark.parametrize('norm, same', [('channel', True), ('spatial', False), ('sample', False)])
def test_binary_conv_equals_plus_minus_one_only_under_channel_norm(norm, same):
    """The common term of {0,1} weights is the same for every channel of a pixel; no other norm removes it."""
    layer, x = filled(BinaryConv2d(4, 6, 3, padding=1, norm=norm)), torch.rand(2, 4, 8, 7).double()
    z = F.conv2d(x, plus_minus(layer.weight), plus_minus(layer.bias), padding=1)
    dims = {'channel': 1, 'spatial': (2, 3), 'sample': (1, 2, 3)}[norm]
    distance = off(layer(x), normalize(z, layer.alpha.view(-1, 1, 1), dims, 2e-5))
    assert distance < 1e-13 if same else distance > 0.1


@pytest.mark.parametrize('cls, options', [
    (BinaryLinear, {}), (TernaryLinear, {}), (TernaryLinear, dict(norm=False, act='gelu'))])
def test_three_chunks_are_three_layers(cls, options):
    """chunks=3 gives what three layers on the same input give, each with its own threshold or scale, and alpha."""
    fused, x = filled(cls(7, 12, True, chunks=3, **options), torch.float32), torch.randn(5, 7)
    with torch.no_grad():
        fused.weight *= torch.tensor([1.0, 10.0, 0.1]).repeat_interleave(4)[:, None]    # one shared scale would show
        fused.weight += torch.tensor([0.0, 5.0, -1.0]).repeat_interleave(4)[:, None]
        parts = [cls(7, 4, True, **options) for _ in range(3)]
        for i, part in enumerate(parts):
            for name, p in part.named_parameters():
                whole = getattr(fused, name)
                p.copy_(whole if name == 'gain' else whole.chunk(3)[i])
    assert_close(fused(x), torch.cat([part(x) for part in parts], -1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('options', [{}, dict(norm=False, act='gelu'), dict(act='silu_glu')])
def test_chunks_of_unequal_rows_are_so_many_layers(options):
    """chunks=(6, 2, 4) gives what layers of 6, 2 and 4 rows on the same input give, and every gradient, each with a scale of
    its own; chunks=(4, 4, 4) are chunks=3 to the bit."""
    x = torch.randn(5, 14).double()
    n = 7 if 'glu' in options.get('act', '') else 14
    fused = TernaryLinear(n, 12, True, chunks=(6, 2, 4), **options)
    with torch.no_grad():
        filled(fused).weight.mul_(torch.tensor([1.0, 10.0, 0.1]).repeat_interleave(torch.tensor([6, 2, 4]))[:, None])
    parts = nn.ModuleList(TernaryLinear(n, rows, True, **options).double() for rows in (6, 2, 4))
    for i, part in enumerate(parts):
        for name, p in part.named_parameters():
            whole = fused.get_parameter(name).detach()
            p.data = whole.clone() if name == 'gain' else whole.split((6, 2, 4))[i].clone()
    v = torch.randn(5, 12).double()
    got, want = gradients(fused, fused, x, v), gradients(parts, lambda x: torch.cat([part(x) for part in parts], -1), x, v)
    for name, g in got.items():
        mine = [t for key, t in want.items() if key.split('.')[-1] == name]
        assert_close(g, sum(mine) if name == 'gain' else torch.cat(mine), rtol=1e-12, atol=1e-12)
    assert len(got) == 5 - bool('norm' in options)
    equal, three = TernaryLinear(n, 12, True, chunks=(4, 4, 4), **options), TernaryLinear(n, 12, True, chunks=3, **options)
    equal.load_state_dict(three.state_dict())
    assert torch.equal(equal(x.float()), three(x.float()))


@pytest.mark.parametrize('act', ['relu2_glu', 'silu_glu'])
def test_gated_activation_inside_equals_it_outside(act):
    """Of x = [gate | up] the layer sees act(gate) * up, as Activation gives it, in value and gradients."""
    inside, x = filled(TernaryLinear(9, 6, True, act=act)), torch.randn(2, 3, 18).double()
    outside = TernaryLinear(9, 6, True).double()
    outside.load_state_dict(inside.state_dict())
    v = torch.randn(2, 3, 6).double()
    got, want = gradients(inside, inside, x, v), gradients(outside, lambda x: outside(Activation(act)(x)), x, v)
    for name in want:
        assert_close(got[name], want[name], rtol=1e-12, atol=1e-12)
    gate, up = torch.tensor([[-1.0, 0.0, 2.0]]), torch.tensor([[5.0, 5.0, 7.0]])
    by_hand = [0, 0, 4 * 7] if act == 'relu2_glu' else [-5 / (1 + math.e), 0, 14 / (1 + math.exp(-2))]
    assert Activation(act)(torch.cat([gate, up], -1)).tolist()[0] == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize('act', ['gelu', 'relu'])
@pytest.mark.parametrize('cls', [BinaryLinear, TernaryLinear, Linear4bit])
def test_activation_inside_equals_activation_outside(cls, act):
    """act='gelu' is F.gelu in front of the layer, act='relu' F.relu, in value and gradients."""
    inside, x = filled(cls(9, 6, True, act=act)), torch.randn(4, 9).double()
    outside = cls(9, 6, True).double()
    outside.load_state_dict(inside.state_dict())
    v = torch.randn(4, 6).double()
    got, want = gradients(inside, inside, x, v), gradients(outside, lambda x: outside(getattr(F, act)(x)), x, v)
    for name in want:
        assert_close(got[name], want[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('chunks', [1, 3])
def test_ternary_product_in_int8_equals_the_float_product(monkeypatch, chunks, bias):
    """The int8 product and the fp32 one give the same fp32 outputs to the bit, also for sums as large as 127 * in."""
    layer = filled(TernaryLinear(1031, 6, bias, chunks=chunks), torch.float32)
    with torch.no_grad():
        layer.weight[0] = layer.weight.abs().max()                         # all +1; with x = 1 the largest sum there is
        layer.gain.fill_(1)
    x = torch.cat([torch.ones(1, 1031), torch.randn(4, 1031)])
    ys = []
    for fast in (True, False):
        monkeypatch.setattr(layers, 'has_fast_int8', lambda device, fast=fast: fast)
        ys.append((layer(x), layer.double()(x.double()), layer.float()(x.bfloat16()).float()))
    assert torch.equal(ys[0][0], ys[1][0])
    assert_close(ys[0][1], ys[1][1], rtol=1e-12, atol=1e-12)
    assert off(ys[0][2], ys[1][2]) < 0.01


def test_ternary_product_does_not_overflow_in_fp16(monkeypatch):
    """Integer sums beyond 65504 stay finite under fp16 autocast without int8 instructions, as on a GPU."""
    monkeypatch.setattr(layers, 'has_fast_int8', lambda device: False)
    layer = TernaryLinear(1024, 2, norm=False)
    nn.init.constant_(layer.weight, 0.01)
    with torch.autocast('cpu', torch.float16):
        y = layer(torch.ones(1, 1024))
    assert y.dtype == torch.float16
    assert_close(y.float(), torch.full((1, 2), 10.24), rtol=1e-3, atol=0)


# ----------------------------------------------------------------------------------------------------------- edge cases


def test_binarize_by_hand():
    """binarize's docstring; a weight equal to the mean is 0 (strict >); each chunk has its own mean."""
    assert binarize(torch.tensor([[1.0, 2], [3, 6]])).tolist() == [[False, False], [False, True]]
    assert binarize(torch.tensor([[1.0, 2], [3, 2]])).tolist() == [[False, False], [True, False]]
    assert binarize(torch.tensor([[1.0, 2], [3, 6]]), chunks=2).tolist() == [[False, True], [False, True]]
    assert not binarize(torch.full((3, 5), 0.1)).any()
    # The mean of 1,000 ones and a 0 is 0.999; in bf16 it would be 1, and no weight above it.
    assert binarize(torch.cat([torch.ones(1000), torch.zeros(1)]).bfloat16()).sum() == 1000


def test_ternarize_by_hand():
    """ternarize's docstring, the floor of 1e-5, and half to even: |w| = scale / 2 is 0."""
    codes, scale = ternarize(torch.tensor([[1, -2], [0.2, 4.8]]))
    assert codes.tolist() == [[0, -1], [0, 1]] and codes.dtype == torch.int8
    assert_close(scale, torch.tensor([2.0]))
    assert ternarize(torch.zeros(2, 2))[1].tolist() == pytest.approx([1e-5])
    assert ternarize(torch.tensor([[1e-5, 1e-6]]))[0].tolist() == [[1, 0]]
    codes, scale = ternarize(torch.tensor([[1, -2], [1, -2], [0.2, 4.8]]), chunks=(1, 2))   # means 1.5 and 2
    assert codes.tolist() == [[1, -1], [0, -1], [0, 1]] and scale.tolist() == [1.5, 2]


def test_quantize_rows_by_hand():
    """Codes are round(127 x / max|x|) per row, half to even, at least 1e-5 under the fraction."""
    codes, scale = quantize_rows(torch.tensor([[1.0, -127, 2.5], [0, 0, 0], [1e-6, 0, 0]]))
    assert codes.tolist() == [[1, -127, 2], [0, 0, 0], [13, 0, 0]] and codes.dtype == torch.int8
    assert_close(scale, torch.tensor([[1], [1e-5 / 127], [1e-5 / 127]]))


def test_two_by_two_binary_linear_by_hand():
    """BinaryLinear's docstring: W01 = [[0, 1], [1, 0]], x = [3, 5] -> z = [5, 3] -> [1, -1] / (1 + 1e-5)."""
    layer = BinaryLinear(2, 2, bias=False, alpha=1.0).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.1, 0.7], [0.4, 0.0]]))
    assert binarize(layer.weight).tolist() == [[False, True], [True, False]]
    y = torch.tensor([1, -1]).double() / (1 + 1e-5)
    assert_close(layer(torch.tensor([3.0, 5]).double()), y, rtol=0, atol=1e-15)


def test_binary_embedding_by_hand():
    """Mean 2 of [[1, 2], [3, 2]]: bits 0 0 and, a weight equal to the mean being 0, 1 0, which normalises to 1 -1."""
    layer = BinaryEmbedding(2, 2, bias=False, alpha=1.0).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2], [3, 2]]))
    y = torch.tensor([[0, 0], [1, -1]]).double() * 0.5 / (0.5 + 1e-5)
    assert_close(layer(torch.tensor([0, 1])), y, rtol=0, atol=1e-9)


@pytest.mark.parametrize('form', ['binary', 'conv channel', 'conv spatial', 'embedding'])
def test_zero_bias_is_all_zero_bits(form):
    """A fresh bias holds no bit, so a fresh layer equals the one without it; alpha starts at 0.25."""
    layer = FORMS[form][0]()
    assert not binarize(layer.bias).any() and set(layer.alpha.flatten().tolist()) == {0.25}
    x = made(form)[2]
    y = layer(x)
    layer.bias = None
    assert_close(y, layer(x), rtol=1e-5, atol=1e-6)


@every_form
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('what', ['zero input', 'constant input', 'equal weights', 'zero weights'])
def test_degenerate_tensors_give_finite_values_and_gradients(form, dtype, what):
    """Constant x, constant z, all weights equal or 0: no NaN or infinity forward or backward."""
    layer, _, x = made(form, dtype)
    with torch.no_grad():
        if 'weights' in what:
            layer.weight.fill_(0.1 if what == 'equal weights' else 0)
        elif x.is_floating_point():
            x.fill_(0.3 if what == 'constant input' else 0)
    for name, t in gradients(layer, layer, x, torch.randn_like(layer(x))).items():
        assert t.isfinite().all(), name


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('value', [0, 0.1, -7.3, 1000.7])
def test_gradient_of_constant_features_is_at_most_one_over_eps(dtype, value):
    """(z - mean) / (std + eps) has slopes of at most 1 / eps, and on constant z it is 0: no blow-up where std is 0."""
    z = torch.full((5, 1, 101), value, dtype=dtype, requires_grad=True)
    y = layers.normalize(z, torch.full((1,), 0.25), 1e-5)
    g = torch.randn_like(y)
    assert y.abs().max() < 1e-6
    assert torch.autograd.grad(y, z, g)[0].float().norm() < 1.01 * 0.25e5 * g.float().norm()


@pytest.mark.parametrize('alpha', [0.0, 1e-9, -1e-9])
@pytest.mark.parametrize('form', ['binary', 'conv channel', 'conv spatial', 'conv sample', 'embedding'])
def test_alpha_crosses_zero(form, alpha):
    """With alpha at 0 the output is about 0, everything is finite, and alpha still gets its full gradient."""
    layer, reference, x = made(form)
    nn.init.constant_(layer.alpha, alpha)
    v = torch.randn_like(layer(x))
    got, want = (gradients(layer, f, x, v) for f in (layer, lambda x: reference(layer, x)))
    assert all(t.isfinite().all() for t in got.values()) and got['value'].abs().max() < 1e-4
    assert want['alpha'].abs().max() > 0.1 and off(got['alpha'], want['alpha']) < 1e-5


# ------------------------------------------------------------------------------------------------------ memory kept


def kept(model, x):
    """(bytes, [(dtype, numel)]) of what autograd keeps of model(x): each storage once, parameters not counted."""
    own, held = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def hold(t):
        if t.untyped_storage().data_ptr() not in own:
            held[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda t: t):
        y = model(x)
    assert y.grad_fn is not None
    return sum(t.untyped_storage().nbytes() for t in held.values()), [(t.dtype, t.numel()) for t in held.values()]


@pytest.mark.parametrize('cls', [BinaryLinear, TernaryLinear, Linear4bit])
def test_gelu_inside_keeps_one_activation_less(cls):
    """An MLP whose second layer applies the GELU keeps exactly one (tokens, 4c) fp32 tensor less than one outside."""
    n, c = 24, 16
    outside = nn.Sequential(cls(c, 4 * c), nn.GELU(), cls(4 * c, c))
    inside = nn.Sequential(cls(c, 4 * c), cls(4 * c, c, act='gelu'))
    x = torch.randn(n, c)
    assert kept(outside, x)[0] - kept(inside, x)[0] == n * 4 * c * 4


def test_what_each_layer_keeps():
    """Ternary: the int8 codes and one scalar per token. Binary: x, y and one scalar per token. Int4: x. No weights."""
    x = torch.randn(24, 16)
    total, tensors = kept(TernaryLinear(16, 40, True, norm=False), x)
    assert total == 24 * 16 + 24 * 4 and (torch.int8, 24 * 16) in tensors
    assert kept(TernaryLinear(16, 40, True), x)[0] == 24 * 16 * (4 + 1) + 24 * 4 * 2
    assert kept(TernaryLinear(16, 40, chunks=(8, 8, 24)), x)[0] == 24 * 16 * (4 + 1) + 24 * 4 * 2
    assert kept(BinaryLinear(16, 40), x)[0] == 4 * (24 * 16 + 24 * 40 + 24 + 1)             # 1: alpha
    assert kept(Linear4bit(16, 40), x)[0] == 4 * 24 * 16


@pytest.mark.parametrize('act', ['relu2_glu', 'silu_glu'])
def test_what_a_gated_layer_keeps(act):
    """Gate and up, the int8 codes of what is made of them, two scalars per token: no product of the two, no square. Outside,
    at least one (tokens, n_ff) fp32 tensor more is kept."""
    x = torch.randn(24, 32)
    layer, plain = TernaryLinear(16, 40, act=act), TernaryLinear(16, 40)
    assert kept(layer, x)[0] == 24 * 32 * 4 + 24 * 16 + 24 * 4 * 2
    outside = kept(nn.Sequential(Activation(act), plain), x.requires_grad_())[0]
    assert outside >= kept(layer, x)[0] + 24 * 16 * 4


# ------------------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize('n', [1, 2, 3, 7, 8, 9, 16, 33])
@pytest.mark.parametrize('width', [1, 2, 4])
def test_pack_bits_round_trip(width, n):
    """unpack_bits(pack_bits(c)) is c for any length; rows take ceil(n * bits / 8) bytes and are filled up with 0."""
    codes = torch.randint(0, 2 ** width, (2, 3, n), dtype=torch.uint8)
    packed = pack_bits(codes, width)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 3, math.ceil(n * width / 8))
    assert torch.equal(unpack_bits(packed, width, n), codes)
    assert not unpack_bits(packed, width, packed.shape[-1] * 8 // width)[..., n:].any()


def test_pack_bits_by_hand():
    """The first code sits in the lowest bits: 1 0 1 1 0 0 0 1 -> 0b10001101; 1 2 3 0 -> 0b00111001; 3 5 -> 0x53."""
    assert pack_bits(torch.tensor([1, 0, 1, 1, 0, 0, 0, 1, 1]), 1).tolist() == [0b10001101, 1]
    assert pack_bits(torch.tensor([1, 2, 3, 0, 2]), 2).tolist() == [0b00111001, 2]
    assert pack_bits(torch.tensor([3, 5, 15]), 4).tolist() == [0x53, 0x0F]


def quantize_int4(w, group=16):
    codes, held = quantize4(w, 'uniform', group)
    return codes.view(-1), held['absmax']


def dequantize_int4(codes, absmax, shape):
    back = decode4(pack4(codes, 'uniform'), {'absmax': absmax}, 'uniform')
    return back[:math.prod(shape)].view(shape)


def test_int4_by_hand():
    """u = round((w + n) / 2n * 15), zero -> 7.5 -> 8 -> +n/15, byte = u_even | u_odd << 4, n rounded to fp16 first."""
    w = torch.tensor([-2.0, 2, 0, 1, -1, 0.5])                              # (w + 2) * 3.75: 0 15 7.5 11.25 3.75 9.375
    codes, absmax = quantize_int4(w, group=6)
    assert codes.tolist() == [0, 15, 8, 11, 4, 9] and absmax.tolist() == [2] and absmax.dtype == torch.float16
    assert pack_bits(codes, 4).tolist() == [0xF0, 0xB8, 0x94]
    assert_close(dequantize_int4(codes, absmax, (2, 3)),
                 torch.tensor([[-2, 2, 2 / 15], [14 / 15, -14 / 15, 0.4]]), rtol=1e-6, atol=1e-7)
    # n = 0.1 is 0.099976 in fp16: 0.053325 -> 11.5004 -> 12; with the fp32 n it would be 11.4994 -> 11.
    codes, absmax = quantize_int4(torch.tensor([0.1, -0.1, 0.053325, 0.1]), group=4)
    assert codes.tolist() == [15, 0, 12, 15] and absmax.item() == torch.tensor(0.1).half().item()
    assert dequantize_int4(codes, absmax, (2,)).tolist() == pytest.approx([absmax.item(), -absmax.item()], rel=1e-6)


@pytest.mark.parametrize('group, numel', [(16, 17), (2, 9), (64, 64)])
def test_int4_pads_the_last_group_and_survives_zeros(group, numel):
    """A group of zeros is all code 8 and 0 back, no 0/0; lengths no multiple of the group come back whole."""
    w = torch.randn(numel)
    w[:group] = 0
    codes, absmax = quantize_int4(w, group)
    back = dequantize_int4(codes, absmax, w.shape)
    assert codes.numel() == math.ceil(numel / group) * group and absmax.numel() == math.ceil(numel / group)
    assert (codes[:group] == 8).all() and absmax.min() == 0
    assert back.isfinite().all() and not back[:group].any()
    assert (back - w).abs().max() <= w.abs().max() * (1 / 15 + 1e-3) + 1e-8         # half a step is n / 15


def test_int4_refuses_weights_beyond_fp16():
    """A weight above 65504 has no fp16 absmax: packing raises, and leaves the layer as it was."""
    layer = Linear4bit(4, 4)
    nn.init.constant_(layer.weight, 1e5)
    with pytest.raises(ValueError, match='65504'):
        layer.pack_()
    assert not layer.packed and layer.weight is not None


def test_errors_on_gaussian_weights():
    """On N(0,1): int4 in groups of 16 is .0795 off (RMS), ternary .513 with 31.0 % zeros."""
    w = torch.randn(1000, 1000)
    assert off(dequantize_int4(*quantize_int4(w), w.shape), w) == pytest.approx(0.0795, rel=0.01)
    codes, scale = ternarize(w)
    assert off(codes * scale, w) == pytest.approx(0.513, rel=0.01)
    assert (codes == 0).float().mean().item() == pytest.approx(0.310, abs=0.002)


def test_bignet_matrix_takes_five_bits_a_weight():
    """1024 x 1024 in int4: 524,288 bytes of codes and 131,072 of fp16 absmax; the bias stays fp32."""
    layer = Linear4bit(1024, 1024)
    assert layer.packed_bytes() == 524288 + 131072 + 4096
    layer.pack_()
    assert layer.code.nbytes == 524288 and layer.absmax.nbytes == 131072 and layer.bias.dtype == torch.float32


X = (5, 13)
PACKABLE = {'binary': (lambda: BinaryLinear(13, 6), X, 12 + 1 + 4),         # rows of ceil(13/8) bytes, bias bits, alpha
            'binary chunks': (lambda: BinaryLinear(13, 9, False, chunks=3), X, 18 + 12),
            'binary act': (lambda: BinaryLinear(13, 9, chunks=3, act='gelu'), X, 18 + 2 + 12),
            'conv': (lambda: BinaryConv2d(3, 5, 3, 2, 1), (2, 3, 7, 9), 5 * 4 + 1 + 20),
            'conv sample': (lambda: BinaryConv2d(4, 6, (1, 3), bias=False, norm='sample'), (2, 4, 5, 9), 6 * 2 + 24),
            'conv groups': (lambda: BinaryConv2d(4, 6, 3, groups=2), (2, 4, 5, 9), 6 * 3 + 1 + 24),
            'conv spatial': (lambda: BinaryConv2d(3, 5, 3, norm='spatial'), (2, 3, 7, 9), 5 * 4 + 1 + 20),
            'embedding': (lambda: BinaryEmbedding(11, 7), None, 11 + 1 + 4),
            'embedding bare': (lambda: BinaryEmbedding(11, 9, False), None, 22 + 4),
            'ternary': (lambda: TernaryLinear(13, 6, True), X, 6 * 4 + 4 + 24 + 52),    # codes, scale, bias, gain
            'ternary bare': (lambda: TernaryLinear(13, 6, norm=False, act='gelu'), X, 24 + 4),
            'ternary chunks': (lambda: TernaryLinear(13, 9, chunks=3), X, 9 * 4 + 12 + 52),
            'ternary rows': (lambda: TernaryLinear(13, 12, True, chunks=(6, 2, 4)), X, 12 * 4 + 12 + 48 + 52),
            'ternary gated': (lambda: TernaryLinear(13, 6, chunks=(1, 5), act='silu_glu'), (5, 26), 24 + 8 + 52),
            'int4': (lambda: Linear4bit(13, 6), X, 40 + 10 + 24),           # 78 weights: 5 groups of 8 bytes and fp16
            'int4 wide': (lambda: Linear4bit(13, 6, False, group=32, act='gelu'), X, 48 + 6)}
every_packable = pytest.mark.parametrize('name', PACKABLE)


def packable(name, dtype=torch.float32):
    """(layer, input, bytes when packed) of PACKABLE."""
    make, shape, n_bytes = PACKABLE[name]
    x = torch.tensor([[0, 3, 10], [3, 5, 1]]) if shape is None else torch.randn(shape).to(dtype)
    return filled(make(), dtype), x, n_bytes


@every_packable
def test_packing_changes_no_logit_and_counts_every_byte(name):
    """pack_() leaves the outputs the same to the bit, nothing trainable, and the bytes packed_bytes() had foretold."""
    layer, x, n_bytes = packable(name)
    y = layer(x)
    assert layer.packed_bytes() == n_bytes
    assert layer.pack_() is layer and layer.pack_().packed                  # twice is once
    assert torch.equal(layer(x), y)
    assert layer.packed_bytes() == n_bytes == sum(t.nbytes for t in layer.state_dict().values())
    assert not any(p.requires_grad for p in layer.parameters()) and layer.weight is None


@pytest.mark.parametrize('bad', [math.inf, -math.inf, math.nan])
@every_packable
def test_numbers_that_are_not_finite_are_refused(name, bad):
    """One of them in any parameter: pack_() raises ValueError with the class in it and leaves the layer as it was."""
    whole, x, _ = packable(name)
    for parameter, _ in whole.named_parameters():
        layer = copy.deepcopy(whole)
        with torch.no_grad():
            layer.get_parameter(parameter).view(-1)[-1] = bad
        before = {n: p.detach().clone() for n, p in layer.named_parameters()}
        with pytest.raises(ValueError, match=f'^{type(layer).__name__}: [^\\n]*finite'):
            layer.pack_()
        assert not layer.packed and not list(layer.buffers()) and all(p.requires_grad for p in layer.parameters())
        assert all(torch.equal(p.nan_to_num(5), before[n].nan_to_num(5)) for n, p in layer.named_parameters())
    assert whole.pack_().packed and whole(x).isfinite().all()


@pytest.mark.parametrize('name', [name for name in PACKABLE if 'embedding' not in name])
def test_packed_layer_passes_the_input_gradient(name):
    """A packed layer is frozen but not a wall: the gradient of its input is that of the latent layer."""
    layer, x, _ = packable(name)
    x.requires_grad_()
    want = torch.autograd.grad(layer(x).square().sum(), x)[0]
    assert_close(torch.autograd.grad(layer.pack_()(x).square().sum(), x)[0], want, rtol=1e-5, atol=1e-6)


@every_packable
def test_unpacked_layer_is_the_same_function_and_trains(name):
    """unpack_() gives a layer with the same outputs, gradients for every parameter, and the same codes when packed."""
    layer, x, _ = packable(name)
    y, names = layer(x), sorted(n for n, _ in layer.named_parameters())
    codes = layer.pack_().code
    assert layer.unpack_() is layer and layer.unpack_() is layer
    assert_close(layer(x), y, rtol=1e-5, atol=1e-6)
    layer(x).square().sum().backward()
    assert sorted(n for n, p in layer.named_parameters() if p.grad is not None) == names
    assert not list(layer.buffers()) and torch.equal(layer.pack_().code, codes)


@every_packable
def test_state_dict_and_deepcopy_round_trip(name):
    """state_dict -> a fresh layer, and deepcopy, give equal outputs, latent and packed; copies are independent."""
    layer, x, _ = packable(name)
    for packed in (False, True):
        fresh = PACKABLE[name][0]()
        if packed:
            layer.pack_()
            fresh.pack_()
        fresh.load_state_dict(layer.state_dict())
        twin = copy.deepcopy(layer)
        assert torch.equal(fresh(x), layer(x)) and torch.equal(twin(x), layer(x))
    layer.unpack_()
    assert twin.packed and torch.equal(twin(x), fresh(x))


@every_packable
def test_a_bfloat16_layer_trains_and_packs(name):
    """.to(bfloat16) before or after packing: bf16 out, near the fp32 layer; gradients in bf16, finite."""
    low, x, _ = packable(name, torch.bfloat16)
    layer = copy.deepcopy(low).float()                                      # of the same numbers
    want = layer(x.float() if x.is_floating_point() else x)
    y = low(x)
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in low.parameters())
    assert torch.equal(low.pack_()(x), y)
    for got in (y, layer.pack_().to(torch.bfloat16)(x)):
        assert got.dtype == torch.bfloat16 and off(got, want) < 0.03, off(got, want)


def test_weights_of_unequal_chunks_go_round():
    """effective_weight() of chunks (6, 2, 4) is codes times the scale of their chunk, latent, packed and unpacked again, where
    the latent weights of each chunk have that scale; merged() adds to it, and requantizes each chunk by itself."""
    layer, x = filled(TernaryLinear(7, 12, chunks=(6, 2, 4), norm=False), torch.float32), torch.randn(5, 7)
    with torch.no_grad():
        layer.weight.mul_(torch.tensor([1.0, 10.0, 0.1]).repeat_interleave(torch.tensor([6, 2, 4]))[:, None])
    sizes = [w.abs().mean().item() for w in layer.weight.split((6, 2, 4))]
    want = torch.cat([(w / s).round().clamp(-1, 1) * s for w, s in zip(layer.weight.split((6, 2, 4)), sizes, strict=True)])
    for step in (lambda: layer, layer.pack_, layer.unpack_, layer.pack_):
        assert step() is layer
        assert_close(layer.effective_weight(), want.detach(), rtol=1e-6, atol=0)
        assert layer.ternary()[1].tolist() == pytest.approx(sizes, rel=1e-6) and layer.ternary()[0].dtype == torch.int8
    delta = torch.randn(12, 7) * layer.effective_weight().abs().amax(1, keepdim=True)
    with torch.no_grad():
        plain, again = layer.merged(delta, False, x), layer.merged(delta, True, x)
    assert type(plain) is nn.Linear and torch.equal(plain.weight, layer.effective_weight() + delta)
    latent, _ = layer.decode()
    moved = latent.split((6, 2, 4)), delta.split((6, 2, 4)), layer.ternary()[0].split((6, 2, 4))
    for i, (w, d, codes) in enumerate(zip(*moved, strict=True)):
        w = w + d / codes.ne(0).float().mean()      # what a scale of mean|w| takes from it
        s = w.abs().mean()
        assert again.ternary()[1][i].item() == pytest.approx(s.item(), rel=1e-6)
        assert torch.equal(again.ternary()[0].split((6, 2, 4))[i], (w / s).round().clamp(-1, 1).to(torch.int8))
    assert again.packed and again.rows == (6, 2, 4)


@pytest.mark.parametrize('act', ['relu2_glu', 'silu_glu'])
def test_lora_over_a_gated_layer_by_hand(act):
    """y = base(x) + alpha / r B A x', x' the RMSNorm of act(gate) * up: output, gradients of x, A and B, and merged."""
    base, x = filled(TernaryLinear(9, 6, True, chunks=(2, 4), act=act), torch.float32), torch.randn(5, 18)
    layer = LoRALinear(base, rank=3, alpha=6.0)
    nn.init.normal_(layer.lora_B, std=0.1)

    def reference(x):
        a = activated(base, x)
        a = a / (a.square().mean(-1, keepdim=True) + 1e-5).sqrt() * base.gain
        return base(x) + 2 * (a @ layer.lora_A.T @ layer.lora_B.T)
    wanted, v = [x.requires_grad_(), layer.lora_A, layer.lora_B], torch.randn(5, 6)
    got, want = ([y, *torch.autograd.grad(y, wanted, v)] for y in (layer(x), reference(x)))
    assert (layer.in_features, layer.out_features) == (9, 6) and base.packed
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, rtol=1e-5, atol=1e-5)
    plain, damage = layer.merge(x.detach())
    assert [type(m) for m in plain] == [Activation, nn.RMSNorm, nn.Linear]
    assert off(plain(x), want[0]) < 0.02 and damage['max'] < 0.1 * want[0].abs().max()      # its input is not rounded
    low, damage = layer.merge(x.detach(), requantize=True)
    assert isinstance(low, TernaryLinear) and low.packed and low.act == act and off(low(x), want[0]) < 1
    assert damage['mean'] == pytest.approx((low(x) - want[0]).abs().mean().item(), rel=1e-4)


# ------------------------------------------------------------------------------------------------ autocast and compile


@every_form
def test_autocast_computes_in_bfloat16(form):
    """Under autocast the output is bf16 and near the fp32 one, gradients are finite and of the parameters' dtype."""
    layer, _, x = made(form)
    want, leaves = layer(x), [*layer.parameters(), *([x.requires_grad_()] if x.is_floating_point() else [])]
    with torch.autocast('cpu', torch.bfloat16):
        y = layer(x)
        packed = copy.deepcopy(layer).pack_()(x)
    assert y.dtype == (torch.float32 if form == 'embedding' else torch.bfloat16)            # a look-up is no product
    assert off(y, want) < 0.02 and torch.equal(packed, y)
    for p, g in zip(leaves, torch.autograd.grad(y.float().square().sum(), leaves), strict=True):
        assert g.dtype == p.dtype and g.isfinite().all()


@pytest.mark.skipif(not (shutil.which('g++') or shutil.which('clang++')), reason='torch.compile needs a C++ compiler')
def test_compiled_equals_eager():
    """torch.compile takes a gated ternary, binary and int4 MLP as one graph: outputs and gradients to 1e-5 of eager."""
    torch.compiler.reset()                          # what other tests compiled would make these shapes dynamic
    model = nn.Sequential(TernaryLinear(12, 48, True, chunks=(20, 28)), TernaryLinear(24, 24, act='relu2_glu'),
                          BinaryLinear(24, 24, act='gelu', chunks=3), Linear4bit(24, 8), TernaryLinear(8, 1))
    x = torch.randn(5, 12)
    v = torch.randn_like(model(x))
    got, want = (gradients(model, f, x, v) for f in (torch.compile(model, fullgraph=True), model))
    for name in want:
        assert_close(got[name], want[name], rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f'{name}: {m}')


# ----------------------------------------------------------------------------------------- constructors and conversion


@pytest.mark.parametrize('make, says', [
    (lambda: BinaryLinear(8, 7, chunks=3), 'chunks=3'),
    (lambda: BinaryLinear(8, 6, act='tanh'), "act='tanh'"),
    (lambda: BinaryLinear(8, 6, alpha=0), 'alpha'),
    (lambda: BinaryLinear(8, 6, alpha=-1.0), 'alpha'),
    (lambda: BinaryLinear(8, 6, alpha=math.nan), 'alpha'),
    (lambda: BinaryConv2d(4, 6, 3, norm='batch'), "norm='batch'"),
    (lambda: BinaryConv2d(4, 6, 3, groups=3), 'groups=3'),
    (lambda: BinaryConv2d(6, 4, 3, groups=3), 'groups=3'),
    (lambda: BinaryConv2d(4, 6, 3, alpha=0), 'alpha'),
    (lambda: BinaryEmbedding(4, 6, alpha=0), 'alpha'),
    (lambda: TernaryLinear(8, 7, chunks=3), 'chunks=3'),
    (lambda: TernaryLinear(8, 6, act='tanh'), "act='tanh'"),
    (lambda: TernaryLinear(131072, 1), '131072'),
    (lambda: TernaryLinear(8, 6, act='relu2'), "act='relu2'"),
    *((lambda chunks=chunks: TernaryLinear(8, 6, chunks=chunks), re.escape(f'chunks={chunks}')) for chunks in (
        (3, 2), (6, 0), (7, -1), (), (3, 3, 3), [5])),
    *((lambda cls=cls, act=act: cls(8, 6, 3, act=act), f"act='{act}'") for act in ('relu2_glu', 'silu_glu') for cls in (
        BinaryLinear, Linear4bit, Int8Linear, BinaryConv2d, TernaryConv2d, Conv4bit)),      # 3: kernel_size, or a bias
    (lambda: Linear4bit(8, 6, group=3), 'group=3'),
    (lambda: Linear4bit(8, 6, group=-2), 'group=-2'),
    (lambda: Linear4bit(8, 6, act='tanh'), "act='tanh'"),
    (lambda: linear('binary', 8, 6), "kind='binary'"),
    (lambda: linear('fp', 8, 6, act='gelu'), "act='gelu'"),
    (lambda: linear('fp', 8, 6, alpha=1.0), 'alpha')])
def test_bad_arguments_are_refused_at_construction(make, says):
    """Each argument a layer cannot honour raises ValueError with its value in it."""
    with pytest.raises(ValueError, match=says):
        make()


def test_linear_makes_each_kind():
    """linear(kind, ...) gives the class of the kind; chunks and act reach it where they mean something."""
    for kind, cls in [('fp', nn.Linear), ('bin', BinaryLinear), ('tern', TernaryLinear), ('int4', Linear4bit)]:
        for bias in (True, False):
            layer = linear(kind, 5, 6, bias, chunks=3)
            assert type(layer) is cls and (layer.bias is not None) == bias and layer(torch.randn(2, 5)).shape == (2, 6)
            assert getattr(layer, 'chunks', 3) == 3
        assert kind == 'fp' or linear(kind, 5, 6, act='gelu').act == 'gelu'
    assert linear('bin', 5, 6, alpha=0.5).alpha.item() == 0.5


@pytest.mark.parametrize('kind', layers.FORMATS)
def test_the_table_of_formats_says_what_its_modules_are(kind):
    """A layer of each entry has its name as `kind`; act and chunks are taken where the entry says so, and only there."""
    form, model = layers.FORMATS[kind], nn.Sequential(nn.Linear(8, 6))
    options = {'group': dict(group=0), 'lowrank': dict(rank=2)}.get(kind, {})
    assert convert(model, {'0': (kind, options)}, verbose=False) == ([] if kind == 'fp' else ['0'])
    assert isinstance(model[0], form.linear) and getattr(model[0], 'kind', 'fp') == kind
    assert layers.is_linear(model[0]) == (kind != 'lora') and (kind in layers.KINDS) == form.trains
    if kind not in ('lowrank', 'lora'):
        assert hasattr(linear(kind, 8, 6, chunks=3, **options), 'chunks') == form.chunks
        if form.act:
            assert linear(kind, 8, 6, act='relu', **options).act == 'relu'
        else:
            with pytest.raises(ValueError, match="act='relu'"):
                linear(kind, 8, 6, act='relu', **options)


class Tenths(layers.LowBitLinear):
    """A format of one's own: multiples of a tenth from -12.8 to 12.7, in a byte."""
    kind, bits = 'tenths', 8

    def encode(self):
        return {'code': (self.weight * 10).round().clamp(-128, 127).to(torch.int8)}

    def decode(self):
        return self.code / 10, None

    def decoder(self, dtype):
        return lambda i, j: (self.code[i:j] / 10).to(dtype)

    def look_up(self, ids):
        return self.code[ids] / 10

    def rounded(self, weight):
        return (weight * 10).round().clamp(-128, 127) / 10


def test_a_new_format_is_a_class_and_a_line_in_the_table(tmp_path, monkeypatch):
    """With an entry in FORMATS a layer can be made, converted to, trained, packed, looked up, wrapped by LoRA and merged, and
    kept in a file, by everything that knows formats by name."""
    monkeypatch.setitem(layers.FORMATS, 'tenths', layers.Format(Tenths, act=True))
    assert linear('tenths', 4, 3, act='gelu').act == 'gelu'
    model, x = nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 4), nn.Linear(4, 9)), torch.tensor([[0, 8], [3, 3]])
    convert(model, {'1': 'tenths', '2': ('lora', dict(rank=2, base='tenths'))}, verbose=False)
    y = model(x)
    y.sum().backward()
    assert model[1].weight.grad is not None and model[2].base.packed and torch.equal(pack(model)(x), y)
    assert model_bytes(model)[0] == 4 * 45 + (20 + 4 * 4) + (36 + 4 * 9 + 4 * 2 * (4 + 9))
    nn.init.normal_(model[2].lora_B)
    merged, damage = model[2].merge(torch.randn(3, 4), requantize=True)
    assert type(merged) is Tenths and merged.packed and damage['max'] < 0.2 * 9
    plain = lambda: nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 4))
    model = plain()
    described = {n: e for name in '01' for n, e in replace.replace(model, name, 'tenths', {}).items()}
    save_packed(model, tmp_path / 'x', {'quantized': described})
    meta, tensors = read_packed(tmp_path / 'x')
    assert torch.equal(load_packed(replace.restore(plain(), meta['quantized'], tensors), tensors)(x), model(x))


ALONE = """
import sys, torch, layers
torch.manual_seed(0)
model = torch.nn.Sequential(layers.linear('tern', 16, 32), layers.linear('bin', 32, 32, act='relu'), torch.nn.Linear(32, 4))
layers.convert(model, {'2': 'nf4'}, verbose=False)
x, target, losses = torch.randn(64, 16), torch.randint(4, (64,)), []
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
for _ in range(30):
    loss = torch.nn.functional.cross_entropy(model(x), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
y = model(x)
print(losses[-1] < 0.7 * losses[0], torch.equal(layers.pack(model)(x), y), *layers.model_bytes(model))
"""


def test_three_files_work_alone(tmp_path):
    """layers.py, quant.py and kernels.c, copied to an empty folder: a model of three formats trains and packs in a fresh
    process that finds no other file of this project."""
    for name in ('layers.py', 'quant.py', 'kernels.c'):
        shutil.copy(Path(layers.__file__).with_name(name), tmp_path)
    (tmp_path / 'alone.py').write_text(ALONE)
    environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    done = subprocess.run([sys.executable, 'alone.py'], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    trained, same, packed, fp32 = done.stdout.split()
    assert (trained, same) == ('True', 'True')
    # codes, scale, gain, bias; codes, bits of the bias, alpha; codes, fp16 scales, bias
    assert int(packed) == (32 * 4 + 4 + 64 + 128) + (32 * 4 + 4 + 4) + (64 + 4 + 16)
    assert int(fp32) == 4 * (32 * 17 + 16 + 32 * 33 + 1 + 4 * 33)


class Net(nn.Module):
    """Something of everything convert() meets: nesting, a tied head, a convolution, an embedding."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(11, 8)
        self.pos = nn.Embedding(3, 8)
        self.stem = nn.Conv2d(3, 8, (3, 1), stride=2, padding=1, groups=1, bias=False)
        self.blocks = nn.ModuleList(nn.ModuleDict({'fc': nn.Linear(8, 16), 'proj': nn.Linear(16, 8, bias=False)})
                                    for _ in range(2))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.wte.weight


def test_convert_takes_the_first_rule_that_matches(capsys):
    """Nested names, first match wins, tied weights left, weights and biases copied; prints what it did and did not."""
    model = Net().double()
    model.blocks[0].eval()
    old = {n: p.detach().clone() for n, p in model.named_parameters()}
    nn.init.normal_(model.blocks[1]['fc'].bias)
    old['blocks.1.fc.bias'] = model.blocks[1]['fc'].bias.detach().clone()
    rules = {'blocks.0.proj': 'fp', 'blocks.*.fc': ('bin', dict(alpha=0.5, chunks=2)), 'blocks.*': 'tern', '*': 'bin'}
    names = convert(model, rules)
    assert names == ['pos', 'stem', 'blocks.0.fc', 'blocks.1.fc', 'blocks.1.proj']
    assert capsys.readouterr().out.splitlines() == [
        'convert: pos -> bin', 'convert: stem -> bin', 'convert: blocks.0.fc -> bin', 'convert: blocks.1.fc -> bin',
        'convert: blocks.1.proj -> tern', 'convert: wte left (its weight is tied to another module)',
        'convert: blocks.0.proj left (fp by rule or no rule)',
        'convert: head left (its weight is tied to another module)']
    kinds = [type(model.get_submodule(n)) for n in names]
    assert kinds == [BinaryEmbedding, BinaryConv2d, BinaryLinear, BinaryLinear, TernaryLinear]
    assert model.head.weight is model.wte.weight and type(model.blocks[0]['proj']) is nn.Linear
    new = dict(model.named_parameters())
    assert all(torch.equal(new[n], p) for n, p in old.items()) and all(p.dtype == torch.float64 for p in new.values())
    assert model.blocks[1]['fc'].alpha.tolist() == [[0.5], [0.5]]
    assert not model.blocks[0]['fc'].training and model.blocks[1]['fc'].training
    assert model.stem.bias is None and model.stem(torch.randn(1, 3, 8, 8).double()).shape == (1, 8, 4, 5)


def test_convert_says_what_has_no_such_form(capsys):
    """Only a convolution with zero padding has low-bit forms, and only KINDS; an embedding only a binary one, without
    max_norm; verbose=False prints nothing."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1, padding_mode='reflect'), nn.Linear(2, 2),
                          nn.Embedding(3, 2, max_norm=1.0), nn.Embedding(3, 2))
    assert convert(model, {'0': 'nf4', '1': 'tern', '2': 'int4', '3': 'bin', '4': 'int4'}) == ['2']
    out = capsys.readouterr().out.splitlines()
    assert out == ['convert: 2 -> int4', 'convert: 0 left (no nf4 form of Conv2d)', 'convert: 1 left (no tern form of Conv2d)',
                   'convert: 3 left (no bin form of Embedding)', 'convert: 4 left (no int4 form of Embedding)']
    assert isinstance(model[2], Linear4bit)
    assert convert(model, {'0': 'bin'}, verbose=False) == ['0'] and not capsys.readouterr().out


@pytest.mark.parametrize('rules, says', [({'nope.*': 'bin', '*': 'fp'}, 'nope'), ({'*': 'int7'}, 'int7'),
                                         ({'wte': 'bin', 'blocks': 'bin'}, 'blocks')])
def test_convert_refuses_before_it_changes_anything(rules, says):
    """A pattern that matches nothing or an unknown kind raises ValueError naming it, and the model is as before."""
    model = Net()
    before = str(model)
    with pytest.raises(ValueError, match=says):
        convert(model, rules, verbose=False)
    assert str(model) == before


ERRORS = {'unknown option': (('bin', dict(nope=1)), r"convert: 3 -> bin {'nope': 1}: .*nope"),
          'bad value': (('nf4', dict(group=5)), r"convert: 3 -> nf4 {'group': 5}: .*group=5"),
          'scales': (('fit4', dict(scales='fp16')), r"convert: 3 -> fit4 {'scales': 'fp16'}: .*fit4's only"),
          'option of lora': (('lora', dict(rank=0)), r"convert: 3 -> lora {'rank': 0}: .*rank=0"),
          'option of a base': (('lora', dict(base=('int4', dict(group=3)))), r'convert: 3 -> lora .*group=3'),
          'beyond fp16': ('half', r'convert: 3 -> half {}: HalfLinear: .*float16'),
          'rank': (('lowrank', dict(rank=99)), r"convert: 3 -> lowrank {'rank': 99}: .*rank=99"),
          'no rank': ('lowrank', r'convert: 3 -> lowrank {}: .*rank')}


@pytest.mark.parametrize('rule', ['bin', 'lora', ('lora', dict(base='nf4')), 'half'], ids=str)
@pytest.mark.parametrize('error', ERRORS)
def test_convert_changes_all_layers_or_none(error, rule):
    """An error at the last layer, in one line that names it: those before, low-bit ones too, are what they were."""
    model = nn.Sequential(nn.Linear(8, 8), BinaryLinear(8, 8), nn.Identity(), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].inplace = True
    with torch.no_grad():
        model[3].weight[1, 2] = 1e5
    (last, says), x = ERRORS[error], torch.randn(3, 8)
    before, text, y = copy.deepcopy(model.state_dict()), str(model), model(x)
    with pytest.raises(ValueError, match=f'^{says}') as raised:
        convert(model, {'[01]': rule, '3': last, '4': rule}, verbose=False)
    assert '\n' not in str(raised.value) and str(model) == text and model[2].inplace
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items()) and torch.equal(model(x), y)
    assert all(p.requires_grad for p in model.parameters()) and not model[1].packed


def test_convert_refuses_what_would_not_be_finite():
    """half of weights and biases beyond its range, lowrank of nan: ValueError; bf16 has the range."""
    for name, value, rule, fits in [('weight', 7e4, 'half', 0), ('bias', -7e4, 'half', 0), ('weight', math.nan, 'half', 0),
                                    ('weight', 7e4, ('half', dict(dtype=torch.bfloat16)), 1), ('weight', 65504, 'half', 1),
                                    ('weight', math.nan, ('lowrank', dict(rank=2)), 0),
                                    ('weight', -math.inf, ('lora', dict(base=('lowrank', dict(rank=2)))), 0)]:
        model = nn.Sequential(nn.Linear(4, 4))
        with torch.no_grad():
            model[0].get_parameter(name).view(-1)[0] = value
        if fits:
            assert convert(model, {'0': rule}, verbose=False) == ['0'] and model(torch.ones(1, 4)).isfinite().all()
        else:
            with pytest.raises(ValueError, match='^convert: 0 -> .*finite'):
                convert(model, {'0': rule}, verbose=False)
            assert type(model[0]) is nn.Linear


def test_convert_puts_no_base_over_a_low_bit_layer(capsys):
    """A base is made of a full-precision layer; over a low-bit one it is left and said, without a base it is wrapped."""
    model = nn.Sequential(TernaryLinear(4, 4), nn.Conv2d(1, 1, 1))
    assert convert(model, {'*': ('lora', dict(base='nf4'))}) == []
    out = capsys.readouterr().out.splitlines()
    assert out == ["convert: 0 left (no lora form of TernaryLinear with base='nf4')",
                   "convert: 1 left (no lora form of Conv2d with base='nf4')"]
    assert not model[0].packed and convert(model, {'0': 'lora'}) == ['0'] and model[0].base.packed
    assert 'convert: 1 left (fp by rule or no rule)' in capsys.readouterr().out


def test_convert_leaves_a_module_that_is_used_twice():
    """One module under two names is tied to itself: replacing it under one name only would part the two."""
    model = nn.ModuleDict({'a': nn.Linear(4, 4)})
    model['b'] = model['a']
    assert convert(model, {'*': 'bin'}, verbose=False) == [] and model['a'] is model['b']


def test_convert_refuses_a_bare_layer():
    """The root cannot be replaced in place: it is not said to be converted."""
    with pytest.raises(ValueError, match='linear'):
        convert(nn.Linear(4, 4), {'*': 'bin'}, verbose=False)


# --------------------------------------------------------------------------------------------------------- whole models


def gpt(n_layer, n_embd, vocab, block_size, **options):
    from train_gpt import GPT, GPTConfig
    return GPT(GPTConfig(vocab, block_size, n_layer, n_embd // 64, n_embd, **options))


def small_gpt():
    return gpt(2, 64, 97, 16, bias=True, qkv_proj='bin', c_proj='tern', mlp_proj='int4', binary_blocks=(0, 1)).eval()


def test_packed_file_gives_the_same_outputs(tmp_path):
    """save -> read -> load into a fresh model: equal logits, meta back, the head still tied, no byte unexplained."""
    model, path, ids = small_gpt(), tmp_path / 'packed.safetensors', torch.randint(0, 97, (2, 9))
    filled(model, torch.float32)
    y, foretold = model(ids), model_bytes(model)
    size = save_packed(model, path, {'step': 7, 'name': 'é'})
    header = 8 + int.from_bytes(path.read_bytes()[:8], 'little')
    assert size == path.stat().st_size == foretold[0] + header and header < 4096
    assert model_bytes(model) == foretold                                   # packed already, counted the same
    meta, tensors = read_packed(path)
    fresh = load_packed(small_gpt(), tensors)
    assert meta.pop('checksum') and meta == {'step': 7, 'name': 'é'}
    assert torch.equal(fresh(ids), y) and torch.equal(model(ids), y)
    assert fresh.lm_head.weight is fresh.wte.weight and model_bytes(fresh) == foretold
    assert [p.name for p in tmp_path.iterdir()] == ['packed.safetensors']


def test_load_packed_refuses_another_shape(tmp_path):
    """Missing names or other shapes raise ValueError that names some of them."""
    save_packed(nn.Sequential(BinaryLinear(8, 6)), tmp_path / 'a', {})
    tensors = read_packed(tmp_path / 'a')[1]
    for other in (BinaryLinear(16, 6), BinaryLinear(8, 6, bias=False), TernaryLinear(8, 6)):
        with pytest.raises(ValueError, match=r'fit each other.*0\.'):
            load_packed(nn.Sequential(other), tensors)


@pytest.mark.parametrize('damage', ['truncated', 'flipped', 'empty', 'text', 'foreign', 'other metadata', 'not json',
                                    'no dict'])
def test_a_damaged_or_foreign_file_is_named(tmp_path, damage):
    """A cut file, one flipped bit, no safetensors at all, another program's: ValueError with the path in it."""
    from safetensors.torch import save_file
    path, tensors = tmp_path / 'odd.safetensors', {'w': torch.ones(3)}
    if damage in ('truncated', 'flipped'):
        save_packed(nn.Sequential(BinaryLinear(64, 64)), path, {})
        raw = path.read_bytes()
        path.write_bytes(raw[:-100] if damage == 'truncated' else raw[:-1] + bytes([raw[-1] ^ 1]))
    elif damage in ('empty', 'text'):
        path.write_bytes(b'' if damage == 'empty' else b'this is not a model, it is a line of text')
    else:
        metadata = {'foreign': None, 'other metadata': {'format': 'pt'}, 'not json': {'nanobit': '{'},
                    'no dict': {'nanobit': '[1]'}}
        save_file(tensors, path, metadata[damage])
    with pytest.raises(ValueError, match='odd.safetensors'):
        read_packed(path)


def test_model_bytes_counts_the_same_before_and_after_packing():
    """Biases, alphas, gains and plain layers are counted, packed or not; fp32 bytes do not depend on the state."""
    model = nn.Sequential(nn.Linear(13, 13).bfloat16(), *(make() for make, _, _ in PACKABLE.values()))
    want = 13 * 14 * 2 + sum(n for _, _, n in PACKABLE.values()), 4 * sum(p.numel() for p in model.parameters())
    assert model_bytes(model) == want
    assert pack(model) is model
    assert model_bytes(model) == want


@pytest.mark.parametrize('n, mb', [(3, 415.2), (6, 332.9), (9, 250.7), (12, 168.4)])
def test_gpt2_with_binary_blocks_takes_the_published_bytes(n, mb):
    """GPT-2 124M, vocabulary 50,304: 497.5 MB in fp32, packed 82.3 MB less for every three binary blocks."""
    with torch.device('meta'):
        model = gpt(12, 768, 50304, 1024, binary_blocks=tuple(range(n)))
    packed, full = (size / 1e6 for size in model_bytes(model))
    assert packed == pytest.approx(mb, abs=0.1) and full == pytest.approx(497.5, abs=0.1)
