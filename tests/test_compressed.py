"""Compressed layers: values and gradients against the product with a weight decoded by hand, bytes, files, processes."""
import copy
import gc
import math
import shutil

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import layers
import quant
from common import load_packed, read_packed, save_packed
from conftest import ranks, wait_all
from layers import (HalfLinear, Int8Linear, Linear4bit, LoRALinear, LowRankLinear, TernaryLinear, convert, linear,
                    model_bytes, pack)
from quant import FIT4, NF4, SCALES4


@pytest.fixture(autouse=True)
def fixed():
    torch.manual_seed(0)


def off(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()


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


def gelu(layer, x):
    return F.gelu(x) if layer.act else x


FOUR = [(format, scales, 0.2) for format in LEVELS for scales in (('',) if format == 'fit4' else ('', 'fp32', '8bit'))]
CASES = {f'{f} {s} {i}': (lambda n, m, b, f=f, s=s, o=o: Linear4bit(n, m, b, format=f, scales=s, **o), *shape, tol)
         for i, (o, shape) in enumerate([({}, ((5, 13), 6, True)), (dict(group=16, act='gelu'), ((2, 3, 24), 7, False)),
                                         (dict(group=128), ((4, 48), 9, True)), (dict(group=24), ((1,), 1, True)),
                                         (dict(group=16), ((3, 64), 7, True)), (dict(group=32, act='gelu'), ((64,), 5, False)),
                                         (dict(group=64), ((5, 128), 3, True))])
         for f, s, tol in FOUR}
CASES |= {'int8': (Int8Linear, (5, 13), 6, True, 0.01),
          'int8 act': (lambda n, m, b: Int8Linear(n, m, b, act='gelu'), (2, 3, 7), 9, False, 0.01),
          'int8 one': (Int8Linear, (1,), 1, True, 0.01), 'int8 empty': (Int8Linear, (0, 13), 6, True, 0.01),
          'fit4 empty': (lambda n, m, b: Linear4bit(n, m, b, format='fit4'), (0, 13), 6, True, 0.2),
          'nf4 empty': (lambda n, m, b: Linear4bit(n, m, b, format='nf4'), (0, 64), 6, True, 0.2),
          'half': (HalfLinear, (5, 13), 6, True, 1e-3), 'half one': (HalfLinear, (4, 1), 2, False, 1e-3),
          'half bf16': (lambda n, m, b: HalfLinear(n, m, b, dtype=torch.bfloat16), (2, 3, 7), 9, True, 4e-3),
          'int8 large': (Int8Linear, (3, 1024), 600, True, 0.01), 'half large': (HalfLinear, (3, 1024), 600, True, 1e-3),
          'nf4 large': (lambda n, m, b: Linear4bit(n, m, b, format='nf4', group=48), (3, 1000), 600, True, 0.2)}
every_case = pytest.mark.parametrize('name', CASES)


def made(name, packed=True):
    """(layer, its weight before it was rounded, input, error allowed); biases that matter."""
    make, shape, out, bias, tol = CASES[name]
    full = nn.Linear(shape[-1], out, bias)
    layer = make(shape[-1], out, bias)
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
    """Output, gradient of x and, where it is trained, of the bias; with kernels.c and without; the decoded weight is near."""
    layer, full, x, tol = made(name)
    weight, wanted = decoded(layer), [x.requires_grad_()]
    assert off(weight, full) < tol and not any(p.requires_grad for p in layer.parameters())
    if layer.bias is not None and layer.bias.dtype == torch.float32:
        wanted.append(layer.bias.requires_grad_())
    act = gelu if hasattr(layer, 'act') else lambda _, x: x
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
    """Before packing: the product with the rounded weight; the weight's gradient is the rounded weight's."""
    layer, _, x, _ = made(name, packed=False)
    if isinstance(layer, HalfLinear):
        layer = layer.requires_grad_()
        weight, bias = layer.weight.detach().float(), None if layer.bias is None else layer.bias.detach().float()
        latent = [layer.weight] + ([] if bias is None else [layer.bias])
    else:
        weight, bias = decoded(copy.deepcopy(layer).pack_()), None if layer.bias is None else layer.bias.detach()
        latent = [layer.weight] + ([] if bias is None else [layer.bias])
    rounded = [weight.requires_grad_()] + ([] if bias is None else [bias.requires_grad_()])
    v, act = torch.randn(*x.shape[:-1], len(weight)), gelu if hasattr(layer, 'act') else lambda _, x: x
    got = grads(lambda: layer(x), [x.requires_grad_(), *latent], v)
    want = grads(lambda: F.linear(act(layer, x), weight, bias), [x, *rounded], v)
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
        a = gelu(layer, x)
        s = 127 / a.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        return F.linear(a + ((a * s).round() / s - a).detach(), weight, layer.bias)
    v = torch.randn(*shape[:-1], 6)
    check(grads(lambda: layer(x), [x.requires_grad_()], v), grads(lambda: reference(x), [x], v))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('tokens', [1, 2, 40])
def test_int8_product_in_int8_equals_the_float_product(monkeypatch, tokens, bias, dtype):
    """torch._int_mm, where it is fast, gives the float product of the codes, to its rounding; it is taken for packed only."""
    layer, x, calls, int_mm = Int8Linear(200, 48, bias, activations='int8').pack_(), torch.randn(tokens, 200), [], torch._int_mm
    monkeypatch.setattr(torch, '_int_mm', lambda a, b: calls.append(a.dtype) or int_mm(a, b))
    results = []
    for fast in (False, True):
        monkeypatch.setattr(layers, 'has_fast_int8', lambda device, fast=fast: fast)
        results.append(layer(x.to(dtype)))
    assert calls == ([torch.int8] if tokens > 1 else []) and results[0].dtype == results[1].dtype == dtype
    assert off(results[1], results[0]) < (1e-6 if dtype == torch.float32 else 0.01)


# ------------------------------------------------------------------------------------------------------------- packing

KINDS = {'int4': dict(kind='int4'), 'nf4': dict(kind='nf4'), 'fit4': dict(kind='fit4'), 'int8': dict(kind='int8'),
         'nf4 8bit': dict(kind='nf4', scales='8bit'), 'int8 act': dict(kind='int8', activations='int8')}
every_kind = pytest.mark.parametrize('kind', KINDS)


@every_kind
@pytest.mark.parametrize('act', [None, 'gelu'])
@pytest.mark.parametrize('autocast', [False, True])
def test_packing_changes_no_logit(kind, act, autocast):
    """pack_() leaves outputs the same to the bit, in fp32, for bf16 inputs and under autocast, but for the rounding of the
    product that int8 activations do without; frees the latent weight."""
    layer, x = linear(in_features=37, out_features=11, act=act, **KINDS[kind]), torch.randn(6, 37)
    foretold = layer.packed_bytes()
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        y, low = layer(x), layer(x.bfloat16())
        layer.pack_()
        for got, want in ((layer(x), y), (layer(x.bfloat16()), low)):
            near = off(got, want) < (1e-6 if want.dtype == torch.float32 else 0.01) and got.dtype == want.dtype
            assert near if kind == 'int8 act' else torch.equal(got, want)
    assert y.dtype == (torch.bfloat16 if autocast else torch.float32) and low.dtype == torch.bfloat16 and off(low, y) < 0.03
    assert layer.weight is None and foretold == layer.packed_bytes() == sum(t.nbytes for t in layer.state_dict().values())


@pytest.mark.parametrize('format, scales', [('fit4', 'log8'), *((f, s) for f in ('uniform', 'nf4') for s in SCALES4[:3])])
def test_packing_once_more_changes_nothing(format, scales):
    """pack_(), unpack_(), pack_(), unpack_(): the same weights after each, also of rows that differ in size."""
    for group, size in [(16, (64, 40)), (64, (13, 128)), (0, (5, 7))]:
        layer = Linear4bit(*size, format=format, group=group, scales=scales)
        with torch.no_grad():
            layer.weight *= torch.logspace(0, -1, size[1])[:, None]
        want = layer.pack_().decode()[0]
        for _ in range(2):
            assert torch.equal(layer.unpack_().weight, want) and torch.equal(layer.pack_().decode()[0], want)


@every_kind
def test_a_packed_layer_works_under_another_default_device(kind):
    """In `with torch.device('meta')`, where new tensors have no numbers, a layer and inputs on the CPU give what they give."""
    layer = linear(in_features=64, out_features=8, **KINDS[kind]).pack_()
    for rows in (6, 2):
        x = torch.randn(rows, 64).requires_grad_()
        want = [y := layer(x), torch.autograd.grad(y.square().sum(), x)[0]]
        for cache in (quant._table, quant._grid_from):
            cache.cache_clear()
        with torch.device('meta'):
            got = [y := layer(x), torch.autograd.grad(y.square().sum(), x)[0]]
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize('dtype, tol', [(torch.bfloat16, 3e-3), (torch.float16, 4e-4), (torch.float32, 1e-6),
                                        (torch.float64, 1e-7)])
@pytest.mark.parametrize('make', [lambda *size: Linear4bit(*size, False, format='nf4').pack_(),
                                  lambda *size: HalfLinear(*size, False)], ids=['nf4', 'half'])
def test_gradient_of_many_blocks_is_as_exact_as_of_one(make, dtype, tol):
    """16384 x 256 is 8 blocks or more: the output is as of one, in 16 bits the gradient of x is not rounded at each."""
    layer, g, x = make(256, 16384), torch.randn(5, 16384).to(dtype), torch.randn(5, 256).to(dtype).requires_grad_()
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
def test_a_frozen_layer_never_holds_its_whole_weight_and_keeps_nothing(kind):
    """1024 x 1024, 5 tokens: forward and backward make no tensor of more than a quarter of the weight, and between them
    nothing is kept for the gradient of x, not even scales. What comes out is the product with the weight all the same.
    3 tokens: a packed 4-bit layer decodes nothing in its forward pass, where the processor has AVX-512."""
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
    assert 1024 * 5 <= seen.most <= 1 << 18 and held == [] and new == {y.untyped_storage().data_ptr()}
    rows = (x / x.abs().amax(-1, keepdim=True) * 127).round() * x.abs().amax(-1, keepdim=True) / 127
    assert_close(y, F.linear(rows if kind == 'int8 act' else x, weight, layer.bias.float()), rtol=1e-4, atol=1e-4)
    assert_close(x.grad, weight.sum(0).expand(5, -1), rtol=1e-4, atol=1e-4)
    if isinstance(layer, Linear4bit) and (library := quant.kernels()) and library.most_tokens():
        with Largest() as seen:
            assert_close(layer(x[:3]), y[:3], rtol=1e-4, atol=1e-5)
        assert seen.most <= 1024 * 32                                                       # scales, of 8 bits each


@pytest.mark.parametrize('bad', [math.inf, -math.inf, math.nan])
@every_kind
def test_weights_that_are_not_finite_are_refused(kind, bad):
    """pack_() raises ValueError for inf and nan and leaves the layer trainable, as it was."""
    layer = linear(in_features=8, out_features=4, **KINDS[kind])
    with torch.no_grad():
        layer.weight[1, 2] = bad
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    with pytest.raises(ValueError, match='finite'):
        layer.pack_()
    assert not layer.packed and not list(layer.buffers()) and all(p.requires_grad for p in layer.parameters())
    assert all(torch.equal(p.nan_to_num(), before[n].nan_to_num()) for n, p in layer.named_parameters())


@every_kind
def test_a_packed_layer_can_be_cast(kind):
    """.double() of a packed layer computes the same weights: the scales are still read as what they are."""
    layer, x = linear(in_features=64, out_features=8, **KINDS[kind]).pack_(), torch.randn(3, 64)
    want = layer(x)
    assert off(copy.deepcopy(layer).double()(x.double()), want) < 1e-5
    assert off(copy.deepcopy(layer).bfloat16()(x.bfloat16()), want) < 0.03


@pytest.mark.parametrize('make, says', [
    (lambda: Linear4bit(8, 6, format='nf3'), "format='nf3'"), (lambda: Linear4bit(8, 6, group=5), 'group=5'),
    (lambda: Linear4bit(8, 6, scales='fp8'), "scales='fp8'"), (lambda: Linear4bit(8, 6, format='nf4', scales='log8'), 'log8'),
    *((lambda s=s: linear('fit4', 8, 6, scales=s), f"scales='{s}'") for s in ('fp16', 'fp32', '8bit')),
    (lambda: Int8Linear(8, 6, activations='int4'), "activations='int4'"), (lambda: Int8Linear(8, 6, act='tanh'), "act='tanh'"),
    (lambda: Int8Linear(131072, 1), '131072'), (lambda: HalfLinear(8, 6, dtype=torch.float32), 'float32'),
    (lambda: LowRankLinear(8, 6, rank=7), 'rank=7'), (lambda: LowRankLinear(8, 6, rank=0), 'rank=0'),
    (lambda: LowRankLinear(8, 6, rank=3).truncate(4), 'rank 3 to 4'), (lambda: LowRankLinear(8, 6, rank=3).truncate(0), 'to 0'),
    (lambda: LoRALinear(nn.Linear(4, 4), rank=0), 'rank=0'), (lambda: LoRALinear(nn.Linear(4, 4), dropout=1.0), 'dropout=1.0'),
    (lambda: LoRALinear(nn.Embedding(4, 4)), 'Embedding'), (lambda: LoRALinear(nn.Bilinear(4, 4, 4)), 'Bilinear'),
    (lambda: LoRALinear(LoRALinear(nn.Linear(4, 4))), 'LoRALinear')])
def test_bad_arguments_are_refused_at_construction(make, says):
    """Each argument a layer cannot honour raises ValueError with its value in it."""
    with pytest.raises(ValueError, match=says):
        make()


# ------------------------------------------------------------------------------------------------------------ low rank


def factors(layer):
    return (layer.A * layer.c @ layer.B).detach()


@pytest.mark.parametrize('shape', [(24, 40), (40, 24), (16, 16)])
def test_low_rank_is_near_the_best_of_its_rank(shape):
    """from_linear: at full rank the weight itself, at rank r within 5 % of the error of the exact SVD, bias copied."""
    full = nn.Linear(*shape)
    assert_close(factors(LowRankLinear.from_linear(full, rank=min(shape))), full.weight.detach(), rtol=0, atol=1e-5)
    s = torch.linalg.svdvals(full.weight.detach())
    for rank in (1, 5, 12):
        layer = LowRankLinear.from_linear(full, rank=rank)
        assert (factors(layer) - full.weight).norm() <= s[rank:].square().sum().sqrt() * 1.05
        assert layer.A.shape == (shape[1], rank) and layer.B.shape == (rank, shape[0]) and torch.equal(layer.bias, full.bias)


@pytest.mark.parametrize('shrink', [False, True])
@pytest.mark.parametrize('rank', [1, 4, 6])
def test_truncation_is_the_svd_of_the_product(rank, shrink):
    """truncate(k): the best rank-k approximation of A diag(c) B, whatever they are; the share of the squares it returns;
    zeros in the other places, or none with shrink; then it still trains."""
    layer = LowRankLinear(10, 9, rank=6)
    nn.init.normal_(layer.c)
    layer(torch.randn(2, 10)).sum().backward()
    U, s, Vh = torch.linalg.svd(factors(layer))
    share = layer.truncate(rank, shrink)
    assert_close(factors(layer), U[:, :rank] * s[:rank] @ Vh[:rank], rtol=0, atol=1e-5)
    assert share == pytest.approx((s[:rank].square().sum() / s.square().sum()).item(), abs=1e-5)
    left = rank if shrink else 6
    assert layer.rank == left and [*layer.A.shape, *layer.c.shape, *layer.B.shape] == [9, left, left, left, 10]
    assert not layer.c[rank:].any() and not layer.A[:, rank:].any() and not layer.B[rank:].any()
    layer.zero_grad()
    layer(torch.randn(2, 10)).sum().backward()
    assert all(p.grad.shape == p.shape for p in layer.parameters())


def test_low_rank_layer_never_forms_its_weight():
    """Value and gradients of x, A, c, B and bias are those of the product; no tensor is as large as the weight."""
    layer, x = LowRankLinear(64, 80, rank=3), torch.randn(2, 5, 64).requires_grad_()
    nn.init.normal_(layer.c)
    nn.init.normal_(layer.bias)
    wanted, v = [x, *layer.parameters()], torch.randn(2, 5, 80)
    want = grads(lambda: F.linear(x, layer.A @ torch.diag(layer.c) @ layer.B, layer.bias), wanted, v)
    with Largest() as seen:
        check(grads(lambda: layer(x), wanted, v), want)
    assert seen.most < 64 * 80


# -------------------------------------------------------------------------------------------------- whole models, files


def bignet():
    """18 linears of 1024 x 1024 and 5 LayerNorms, without the time to initialize them."""
    with torch.device('meta'):
        model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(18)), *(nn.LayerNorm(1024) for _ in range(5)))
    model = model.to_empty(device='cpu')
    for p in model.parameters():
        nn.init.constant_(p, 0.5)
    return model


@pytest.mark.parametrize('kind, total', [('fp', 75_612_160), ('half', 37_826_560), ('int4', 11_911_168)])
def test_bignet_takes_the_published_bytes(kind, total):
    """BigNet in fp32, half and 4 bits: 72.109, 36.074 and 11.359 MiB, in what it says and in the tensors it holds."""
    model = bignet()
    convert(model, {'*': kind}, verbose=False, packed=True)
    assert model_bytes(model) == (total, 75_612_160) and sum(t.nbytes for t in model.state_dict().values()) == total


def mixed():
    model = nn.Sequential(*(nn.Linear(48, 48) for _ in range(10)))
    rules = {'0': 'int4', '1': 'nf4', '2': ('fit4', dict(group=64)), '3': 'int8', '4': 'half', '5': ('lowrank', dict(rank=5)),
             '6': ('lora', dict(rank=3, base='nf4')), '7': 'tern', '8': 'bin', '9': ('nf4', dict(scales='8bit'))}
    assert len(convert(model, rules, verbose=False)) == 10
    nn.init.normal_(model[6].lora_B)
    return model


def test_files_of_a_model_of_every_kind(tmp_path):
    """state_dict, save_packed and load_packed into a fresh model: equal logits; the file holds model_bytes() and a header."""
    model, x, path = mixed(), torch.randn(5, 48), tmp_path / 'm.safetensors'
    y, foretold = model(x), model_bytes(model)[0]
    size = save_packed(model, path, {'a': 1})
    assert torch.equal(model(x), y) and size == foretold + 8 + int.from_bytes(path.read_bytes()[:8], 'little')
    meta, tensors = read_packed(path)
    assert meta['a'] == 1 and torch.equal(load_packed(mixed(), tensors)(x), y)
    fresh = pack(mixed())
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), y) and torch.equal(copy.deepcopy(model)(x), y)


def test_load_packed_refuses_scales_of_another_type(tmp_path):
    """fit4 and nf4 with '8bit' scales have buffers of the same names and shapes, but the bytes mean other numbers."""
    save_packed(nn.Sequential(Linear4bit(32, 4, format='fit4')), tmp_path / 'a', {})
    other = nn.Sequential(Linear4bit(32, 4, format='nf4', group=32, scales='8bit'))
    with pytest.raises(ValueError, match='absmax'):
        load_packed(other, read_packed(tmp_path / 'a')[1])


@pytest.mark.skipif(not (shutil.which('g++') or shutil.which('clang++')), reason='torch.compile needs a C++ compiler')
def test_compiled_equals_eager():
    """One graph of LoRA over nf4 and of each other packed layer: output and gradients of x and the adapters to 1e-5."""
    torch.compiler.reset()                          # what other tests compiled would make these shapes dynamic
    others = ['int8', 'half', 'int4', 'fit4', ('nf4', dict(scales='8bit')), 'tern', 'bin']
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(8)))
    rules = {'0': ('lora', dict(rank=2, base='nf4'))} | {str(i): rule for i, rule in enumerate(others, 1)}
    convert(model, rules, verbose=False, packed=True)
    nn.init.normal_(model[0].lora_B)
    x, v = torch.randn(4, 16).requires_grad_(), torch.randn(4, 16)
    wanted = [x, model[0].lora_A, model[0].lora_B]
    check(*(grads(lambda f=f: f(x), wanted, v) for f in (torch.compile(model, fullgraph=True), model)))


DDP = """
import torch, torch.nn as nn, common
from pretrained.adapters import only_adapters
from layers import convert
rank, local, world, device = common.setup_processes('cpu')
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))
convert(model, {'*': ('lora', dict(rank=4, base='nf4'))}, verbose=False)
only_adapters(model)
torch.manual_seed(rank)
for layer in (model[0], model[2]):
    nn.init.normal_(layer.lora_A)                   # apart at first, codes and scales too: DDP sends rank 0's
sent = common.checksum(model.buffers())
for buffer in model.buffers():
    buffer.copy_(buffer.roll(rank))
apart = not common.ranks_agree(common.checksum(model.buffers()))
wrapped = nn.parallel.DistributedDataParallel(model)
frozen = common.checksum(model.buffers())
start = common.checksum(p for p in model.parameters() if p.requires_grad)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
x, y, losses = torch.randn(64, 16), torch.randn(64, 8), []
for _ in range(3):
    loss = (wrapped(x) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
end = common.checksum(p for p in model.parameters() if p.requires_grad)
print(common.ranks_agree(end), start != end, common.checksum(model.buffers()) == frozen, common.ranks_agree(frozen),
      losses[-1] < losses[0], apart, frozen == sent, len(list(model.buffers())), common.ranks_agree(losses[0]))
common.close_processes()
"""


def test_two_processes_train_the_same_adapters(start, tmp_path):
    """DDP, LoRA over packed nf4, other samples on each rank, and at first other codes and scales: after 3 steps equal
    adapters and rank 0's codes on both."""
    (tmp_path / 'ddp.py').write_text(DDP)
    for result in wait_all([start('ddp.py', cwd=tmp_path, **r) for r in ranks(2)]):
        assert result.code == 0, result.err
        assert result.out.split() == ['True'] * 7 + ['4', 'False'], result.out


def test_bfloat16_inputs_and_autocast():
    """Every kind in one model: bf16 in, bf16 out, near fp32; the same under autocast; gradients of x finite."""
    model, x = mixed(), torch.randn(4, 48)
    assert isinstance(model[7], TernaryLinear)
    for layer in model:
        want = layer(x)
        low = layer(x.bfloat16())
        assert low.dtype == torch.bfloat16 and off(low, want) < 0.03
        with torch.autocast('cpu', torch.bfloat16):
            leaf = x.clone().requires_grad_()
            got = layer(leaf)
        got.float().square().sum().backward()
        assert got.dtype == torch.bfloat16 and off(got, want) < 0.03 and leaf.grad.isfinite().all(), layer
