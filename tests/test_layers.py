"""Low-bit layers: values and every gradient against their formulas, saved bytes, and packing that changes no output."""
import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from formulas import activated, bits, check, filled, fixed, gradients, normalize, off, reference, same, saved  # noqa: F401
from torch.testing import assert_close

import common
import layers
import quant
from layers import (Activation, BinaryConv2d, BinaryEmbedding, BinaryLinear, Conv4bit, HalfLinear, Int8Linear, Linear4bit,
                    LoRALinear, LowRankLinear, TernaryConv2d, TernaryLinear, conv2d, linear)
from quant import AS_ON_GPU, binarize

# ------------------------------------------------------------------------------------------- values and every gradient

# (class, shape of x, out, options); a gated x is twice as wide as the layer
LINEAR = [
    *((BinaryLinear, *case) for case in [
        ((5, 13), 6, {}), ((2, 3, 7), 9, dict(chunks=3, act='gelu')), ((4, 1), 2, dict(bias=False)),
        ((17,), 5, dict(act='relu')), ((3, 8), 6, dict(chunks=3, bias=False, eps=1e-3)),
        ((2, 3, 7), 9, dict(chunks=3, bias=False, alpha=None, act='gelu')),
        ((2800, 100), 8, dict(chunks=2, act='gelu'))]),         # more rows than are taken at a time: a block and a rest
    *((TernaryLinear, *case) for case in [
        ((5, 13), 6, dict(bias=True, act='relu')), ((2, 3, 7), 9, dict(chunks=3, act='gelu', eps=1e-3)), ((4, 1), 2, {}),
        ((4, 2), 1, {}), ((17,), 5, dict(norm=False)), ((3, 8), 6, dict(norm=False, act='gelu', chunks=3, bias=True)),
        ((3, 8), 9, dict(chunks=[1, 7, 1], norm=False)), ((5, 26), 6, dict(act='relu2_glu')),
        ((2, 3, 7), 9, dict(output_gain=True, chunks=3, act='gelu', bias=True)), ((17,), 5, dict(output_gain=True, norm=False)),
        ((2, 3, 14), 12, dict(act='silu_glu', chunks=(6, 2, 4), bias=True)), ((34,), 5, dict(act='silu_glu', norm=False)),
        ((2800, 100), 8, dict(act='gelu', bias=True)), ((1400, 400), 4, dict(act='silu_glu'))]),
    (Linear4bit, (5, 13), 6, {}), (Linear4bit, (2, 3, 7), 9, dict(act='gelu')), (Linear4bit, (4, 1), 2, dict(bias=False)),
    (Linear4bit, (17,), 5, dict(group=2, act='relu')), (Int8Linear, (5, 13), 6, {}),
    (Int8Linear, (2, 3, 7), 9, dict(act='gelu', bias=False)), (Int8Linear, (2800, 100), 3, dict(act='relu'))]
# The geometry of a convolution, as F.conv2d takes it
GEOMETRY = [dict(kernel_size=3), dict(kernel_size=1), dict(kernel_size=3, stride=2, padding=1),
            dict(kernel_size=(1, 3), padding=(0, 2), dilation=(1, 2)), dict(kernel_size=(2, 4), stride=(2, 1), padding='valid'),
            dict(kernel_size=(3, 5), padding='same'), dict(kernel_size=(2, 3), padding='same'),
            dict(kernel_size=(3, 4), padding='same', dilation=(2, 3)), dict(kernel_size=2, padding='same', groups=2),
            dict(kernel_size=3, padding=1, groups=4)]
CONV = [((BinaryConv2d, TernaryConv2d, Conv4bit)[i % 3],
         geometry | dict(act=(None, 'relu', 'gelu')[i // 3 % 3], bias=i % 2 == 0)) for i, geometry in enumerate(GEOMETRY)]
CONV += [(BinaryConv2d, dict(kernel_size=3, alpha=None, bias=False, **options)) for options in (
    dict(padding=1, act='relu'), dict(groups=2, stride=2))]
CONV += [(BinaryConv2d, dict(kernel_size=3, norm='spatial', **options)) for options in (
    {}, dict(stride=2, padding=1, bias=False, act='relu'), dict(groups=2, act='gelu', eps=1e-3))]


@pytest.mark.parametrize('cls, shape, out, options', LINEAR)
def test_linear_layer_is_its_formula(cls, shape, out, options):
    """The output and the gradients of x, weight, bias, alpha, gain and out_gain are those of the formula."""
    layer = filled(cls(shape[-1] // (2 if 'glu' in options.get('act', '') else 1), out, **options))
    check(layer, torch.randn(shape).double(), 1e-6 if cls is Linear4bit else 1e-12)         # its levels are fp32


@pytest.mark.parametrize('cls, options', CONV, ids=str)
def test_convolution_is_its_formula(cls, options):
    """The output and every gradient are those of the formula, with the padding of F.conv2d, 'same' of even kernels included."""
    given = {n: v for n, v in options.items() if n in ('stride', 'padding', 'dilation', 'groups')}
    x = (torch.randn(2, 4, 7, 6) + 1).double()      # mostly positive, so that a ReLU leaves something under every kernel
    check(filled(cls(4, 8, **options)), x, 1e-6 if cls is Conv4bit else 1e-11, given)


@pytest.mark.parametrize('ids, bias', [([[0, 3, 3, 10]], True), ([[1, 2], [2, 9]], False), (4, True), ([[5] * 600] * 4, True)],
                         ids=['repeated', 'no bias', 'one', 'many'])
def test_binary_embedding_is_its_formula(ids, bias):
    """Bits of the row plus bits of the bias, by the mean of the whole table; the gradients of repeated ids add up."""
    check(filled(BinaryEmbedding(11, 130, bias)), torch.tensor(ids), 1e-11)


# Of each form: (layer, shape of x or None for ids, bytes when packed: codes, then bias, alpha, scales, gain)
FORMS = {'binary': (lambda: BinaryLinear(33, 12), (7, 33), 12 * 5 + 2 + 4), 'binary gelu': (
             lambda: BinaryLinear(33, 12, chunks=3, act='gelu'), (7, 33), 12 * 5 + 2 + 12),
         'ternary': (lambda: TernaryLinear(33, 12, True), (7, 33), 12 * 9 + 48 + 4 + 132),
         'gated': (lambda: TernaryLinear(33, 12, True, chunks=(7, 5), act='relu2_glu'), (7, 66), 12 * 9 + 48 + 8 + 132),
         'int4': (lambda: Linear4bit(33, 12), (7, 33), 25 * (8 + 2) + 48),   # 396 weights: 25 groups of 8 bytes and fp16
         'int8': (lambda: Int8Linear(33, 12), (7, 33), 396 + 48 + 48),
         'embedding': (lambda: BinaryEmbedding(11, 12), None, 11 * 2 + 2 + 4),
         'conv channel': (lambda: BinaryConv2d(4, 8, 3, act='relu'), (3, 4, 7, 6), 8 * 5 + 1 + 32),
         'conv spatial': (lambda: BinaryConv2d(4, 8, 3, norm='spatial', act='gelu'), (3, 4, 7, 6), 8 * 5 + 1 + 32),
         'conv product': (lambda: BinaryConv2d(4, 8, 3, bias=False, alpha=None, act='relu'), (3, 4, 7, 6), 8 * 5),
         'conv tern': (lambda: TernaryConv2d(4, 8, 3, act='relu', bias=True), (3, 4, 7, 6), 8 * 9 + 32 + 4),
         'conv int4': (lambda: Conv4bit(4, 8, 2, padding=1, act='gelu'), (3, 4, 7, 6), 8 * (8 + 2) + 32)}
PACKABLE = FORMS | {
    'binary bare': (lambda: BinaryLinear(13, 9, False, chunks=3), (2, 3, 13), 18 + 12),
    'binary product': (lambda: BinaryLinear(13, 9, False, alpha=None, act='gelu'), (2, 3, 13), 18),
    'conv groups': (lambda: BinaryConv2d(4, 6, (1, 3), bias=False, groups=2), (2, 4, 5, 9), 6 + 24),
    'embedding bare': (lambda: BinaryEmbedding(11, 9, False), None, 22 + 4),
    'ternary bare': (lambda: TernaryLinear(13, 6, norm=False, act='gelu'), (5, 13), 24 + 4),
    'ternary gated': (lambda: TernaryLinear(13, 6, chunks=(1, 5), act='silu_glu'), (5, 26), 24 + 8 + 52),
    'ternary gains': (lambda: TernaryLinear(13, 6, True, output_gain=True), (5, 13), 24 + 24 + 4 + 52 + 24),
    'int4 wide': (lambda: Linear4bit(13, 6, False, group=32, act='gelu'), (2, 3, 13), 48 + 6),
    'nf4': (lambda: Linear4bit(37, 11, format='nf4', scales='8bit', act='gelu'), (5, 37), 7 * (32 + 1) + 4 + 44),
    'fit4': (lambda: Linear4bit(37, 11, format='fit4'), (5, 37), 13 * (16 + 1) + 4 + 44),
    'conv fit4': (lambda: Conv4bit(3, 5, 3, format='fit4', dilation=2), (2, 3, 7, 9), 5 * (16 + 1) + 4 + 20),
    'int8 row': (lambda: Int8Linear(13, 6), (13,), 78 + 24 + 24),
    'int8 act': (lambda: Int8Linear(13, 6, activations='int8', act='gelu'), (5, 13), 78 + 24 + 24)}
every_form = pytest.mark.parametrize('form', FORMS)
every_packable = pytest.mark.parametrize('name', PACKABLE)
normalized = pytest.mark.parametrize('form', ['binary', 'conv channel', 'conv spatial', 'embedding'])


def made(form, dtype=torch.float32):
    """(layer, input) of PACKABLE; images are mostly positive, so that a ReLU leaves something under every kernel."""
    make, shape, _ = PACKABLE[form]
    x = torch.tensor([[0, 3, 10], [3, 5, 1]]) if shape is None else (torch.randn(shape) + (len(shape) == 4)).to(dtype)
    return filled(make(), dtype), x


@every_form
@pytest.mark.parametrize('how', ['float32', 'bfloat16', 'autocast'])
def test_lower_precision_is_near_float64(form, how):
    """In fp32, in bf16 and under autocast value and gradients are near the formula in float64; packed gives the same bits."""
    dtype = torch.bfloat16 if how == 'bfloat16' else torch.float32
    layer, x = made(form, dtype)
    exact, leaves = copy.deepcopy(layer).double(), dict(layer.named_parameters(), input=x)
    with torch.autocast('cpu', torch.bfloat16, enabled=how == 'autocast'):
        v = torch.randn_like(layer(x))
        result = gradients(layer, layer, x, v)
        assert torch.equal(copy.deepcopy(layer).pack_()(x), result['value'])
    expected = gradients(exact, lambda x: reference(exact, x), x.double() if x.is_floating_point() else x, v.double())
    rounds = how == 'bfloat16' or how == 'autocast' and form != 'embedding'                 # a look-up is no product
    assert result['value'].dtype == (torch.bfloat16 if rounds else torch.float32)
    for name, t in result.items():
        assert name == 'value' or t.dtype == leaves[name].dtype, name
        assert off(t, expected[name], 1) < (1e-5 if how == 'float32' else 0.03), (name, off(t, expected[name], 1))


@pytest.mark.parametrize('name', [name for name in PACKABLE if name != 'int8 act'])        # packed, it rounds elsewhere
def test_a_ramp_mixes_full_and_rounded_weights(name):
    """At a share of 0 and of 0.3, value and every gradient are those of the formula. At 1, in evaluation mode and packed, the
    output is to the bit the one without a ramp."""
    layer, x = made(name, torch.float64)
    y = layer(x)
    share = layers.ramp(layer)
    for value in (0, 0.3):
        share.fill_(value)
        assert off(layer(x), y) > 0.002
        if not name.endswith(('nf4', 'fit4')):                              # formulas.py does not have these
            check(layer, x, 1e-5)
            exact = layer(x)
            with torch.autocast('cpu', torch.bfloat16):
                assert off(copy.deepcopy(layer).float()(x.float() if x.is_floating_point() else x), exact) < 0.03
    assert torch.equal(layer.eval()(x), y)
    assert torch.equal(copy.deepcopy(layer.train()).pack_()(x), y)
    share.fill_(1)
    assert torch.equal(layer(x), y)


@every_form
def test_only_what_needs_a_gradient_gets_one(form):
    """With any of x, weight, bias, alpha and gain frozen, the others get the same gradients as before."""
    layer, x = made(form)
    leaves = dict(layer.named_parameters()) | ({'input': x.requires_grad_()} if x.is_floating_point() else {})
    loss = lambda: layer(x).square().sum()
    full = dict(zip(leaves, torch.autograd.grad(loss(), leaves.values()), strict=True))
    for chosen in range(1, 2 ** len(leaves)):
        wanted = {n: p.requires_grad_(bool(chosen >> i & 1)) for i, (n, p) in enumerate(leaves.items())}
        wanted = {n: p for n, p in wanted.items() if p.requires_grad}
        result = dict(zip(wanted, torch.autograd.grad(loss(), wanted.values()), strict=True))
        same(result, {n: full[n] for n in wanted}, 1e-5)


# -------------------------------------------------------------------------------------------------------- equivalences


@pytest.mark.parametrize('norm, groups, equal', [('channel', 1, True), ('channel', 2, False), ('spatial', 1, False)])
def test_zero_one_and_plus_minus_one_are_the_same_network(norm, groups, equal):
    """{0,1} weights compute what {-1,+1} weights do with twice the eps, where all outputs of a pixel share a mean."""
    plus_minus = lambda p: torch.where(p > p.mean(), 1.0, -1.0).to(p)
    layer, x = filled(BinaryConv2d(4, 6, 3, padding=1, norm=norm, groups=groups)), torch.rand(2, 4, 8, 7).double()
    z = F.conv2d(x, plus_minus(layer.weight), plus_minus(layer.bias), padding=1, groups=groups)
    expected = normalize(z, layer.alpha.view(-1, 1, 1), {'channel': 1, 'spatial': (2, 3)}[norm], 2e-5)
    assert off(layer(x), expected) < 1e-13 if equal else off(layer(x), expected) > 0.1
    layer, x = filled(BinaryLinear(13, 6, eps=1e-2)), torch.randn(5, 13).double()
    z = F.linear(x, plus_minus(layer.weight), plus_minus(layer.bias))
    assert off(layer(x), normalize(z, layer.alpha, -1, 2e-2)) < 1e-13


@pytest.mark.parametrize('cls, rows, options', [(BinaryLinear, (4, 4, 4), {}), (TernaryLinear, (4, 4, 4), dict(act='silu_glu')),
                                                (TernaryLinear, (6, 2, 4), dict(norm=False, act='gelu', output_gain=True))])
def test_chunks_are_so_many_layers(cls, rows, options):
    """A layer of three chunks computes what three layers on the same input do, and every gradient."""
    n, chunks = 14 // (2 if 'glu' in options.get('act', '') else 1), 3 if cls is BinaryLinear else rows
    fused, x, v = filled(cls(n, 12, True, chunks=chunks, **options)), torch.randn(5, 14).double(), torch.randn(5, 12).double()
    parts = nn.ModuleList(cls(n, r, True, **options).double() for r in rows)
    with torch.no_grad():
        fused.weight.mul_(torch.tensor([1.0, 10, 0.1]).repeat_interleave(torch.tensor(rows))[:, None])
    for i, part in enumerate(parts):
        for name, p in part.named_parameters():
            whole = fused.get_parameter(name).detach()
            p.data = whole.clone() if name == 'gain' else whole.split([1] * 3 if name == 'alpha' else rows)[i].clone()
    got, want = gradients(fused, fused, x, v), gradients(parts, lambda x: torch.cat([part(x) for part in parts], -1), x, v)
    joined = {name: [t for key, t in want.items() if key.split('.')[-1] == name] for name in got}
    joined = {name: sum(t) if name == 'gain' else torch.cat(t, -1 if name == 'value' else 0) for name, t in joined.items()}
    same(got, joined, 1e-12)
    if rows == (4, 4, 4):
        three = cls(n, 12, True, chunks=3, **options).double()
        three.load_state_dict(fused.state_dict())
        assert torch.equal(three(x), fused(x))


@pytest.mark.parametrize('chunks, bias', [(1, True), (3, False)])
def test_ternary_product_in_int8_equals_the_float_product(monkeypatch, chunks, bias):
    """The int8 product and the fp32 one give the same fp32 outputs to the bit, also for sums as large as 127 * in."""
    layer = filled(TernaryLinear(1031, 6, bias, chunks=chunks), torch.float32)
    with torch.no_grad():
        layer.weight[0] = layer.weight.abs().max()                         # all +1; with x = 1 the largest sum there is
        layer.gain.fill_(1)
    x, ys = torch.cat([torch.ones(1, 1031), torch.randn(4, 1031)]), []
    for fast in (True, False):
        monkeypatch.setattr(layers, 'has_fast_int8', lambda device, fast=fast: fast)
        ys.append((layer(x), layer.double()(x.double()), layer.float()(x.bfloat16()).float()))
    assert torch.equal(ys[0][0], ys[1][0]) and off(ys[0][2], ys[1][2]) < 0.01
    assert_close(ys[0][1], ys[1][1], rtol=1e-12, atol=1e-12)


def test_ternary_product_does_not_overflow_in_fp16(monkeypatch):
    """Integer sums beyond 65504 stay finite under fp16 autocast without int8 instructions, as on a GPU."""
    monkeypatch.setattr(layers, 'has_fast_int8', lambda device: False)
    layer = TernaryLinear(1024, 2, norm=False)
    nn.init.constant_(layer.weight, 0.01)
    with torch.autocast('cpu', torch.float16):
        y = layer(torch.ones(1, 1024))
    assert y.dtype == torch.float16
    assert_close(y.float(), torch.full((1, 2), 10.24), rtol=1e-3, atol=0)


# ----------------------------------------------------------------------------------------- worked by hand, and edge cases


def test_binary_layers_by_hand():
    """W = [[.1, .7], [.4, .0]] has mean .3: bits 0 1 and 1 0. Two outputs become -1 and 1 over 1 + eps / std."""
    W, by_hand = torch.tensor([[0.1, 0.7], [0.4, 0.0]]), lambda std: torch.tensor([1, -1]).double() / (1 + 1e-5 / std)
    line, embedding = BinaryLinear(2, 2, bias=False, alpha=1.0).double(), BinaryEmbedding(2, 2, bias=False, alpha=1.0).double()
    line.weight.data.copy_(W)
    assert_close(line(torch.tensor([3.0, 5]).double()), by_hand(1), rtol=0, atol=1e-15)     # z = [5, 3]
    embedding.weight.data.copy_(torch.tensor([[1.0, 2], [3, 2]]))           # mean 2, which is not above itself: 0 0 and 1 0
    assert_close(embedding(torch.tensor([0, 1])), torch.stack([0 * by_hand(1), by_hand(0.5)]), rtol=0, atol=1e-9)
    for act, x, std in ((None, [3.0, -5], 4), ('relu', [3.0, -5], 1.5)):    # z = [-5, 3], and [0, 3]
        conv = BinaryConv2d(2, 2, 1, bias=False, alpha=1.0, act=act).double()
        conv.weight.data.copy_(W.view(2, 2, 1, 1))
        assert_close(conv(torch.tensor(x).double().view(1, 2, 1, 1)).flatten(), -by_hand(std), rtol=0, atol=1e-14)


def test_ternary_convolution_by_hand():
    """W = [1, -2, .2, 4.8]: codes 0 -1 0 1 times 2. x is rounded to 127 steps of its largest number, image by image."""
    layer = TernaryConv2d(1, 1, 2)
    layer.weight.data.copy_(torch.tensor([1, -2, 0.2, 4.8]).view(1, 1, 2, 2))
    x = torch.tensor([[127, 2.4, 50, 99.6], [12.7, 0.24, 3, 1.26]]).view(2, 1, 2, 2)       # 2 (100 - 2) and 2 (1.3 - .2)
    assert layer(x).flatten().tolist() == pytest.approx([196, 2.2], rel=1e-6)


@pytest.mark.parametrize('act, want', [('relu2_glu', [0, 0, 4 * 7]),
                                       ('silu_glu', [-5 / (1 + math.e), 0, 14 / (1 + math.exp(-2))])])
def test_gated_activations_by_hand(act, want):
    """relu2_glu is relu(gate)^2 * up and silu_glu is silu(gate) * up, of gate and up side by side."""
    gate, up = torch.tensor([[-1.0, 0.0, 2.0]]), torch.tensor([[5.0, 5.0, 7.0]])
    assert Activation(act)(torch.cat([gate, up], -1)).tolist()[0] == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize('form', ['binary', 'conv channel', 'conv spatial', 'embedding'])
def test_zero_bias_is_all_zero_bits(form):
    """A fresh layer equals one without a bias, and alpha starts at 0.25."""
    layer, x = FORMS[form][0](), made(form)[1]
    assert not binarize(layer.bias).any() and set(layer.alpha.flatten().tolist()) == {0.25}
    y = layer(x)
    layer.bias = None
    assert_close(y, layer(x), rtol=1e-5, atol=1e-6)


@every_form
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_degenerate_tensors_give_finite_values_and_gradients(form, dtype):
    """Constant inputs and weights, zeros too: no NaN or infinity forward or backward."""
    whole, x = made(form, dtype)
    for value, weight in [(0, None), (0.3, None), (-5, None), (None, 0.1), (None, 0), (0.3, 0)]:
        layer, at = copy.deepcopy(whole), x if value is None or not x.is_floating_point() else torch.full_like(x, value)
        if weight is not None:
            nn.init.constant_(layer.weight, weight)
        for name, t in gradients(layer, layer, at, torch.randn_like(layer(at))).items():
            assert t.isfinite().all(), name


@every_form
def test_an_empty_batch_gives_zero_gradients(form):
    """A batch of 0 passes, and its gradients are zeros."""
    layer, x = made(form)
    result = gradients(layer, layer, x[:0], layer(x[:0]).detach())
    assert len(result['value']) == 0 and not any(t.any() for t in result.values())
    assert not x.is_floating_point() or result['input'].shape == x[:0].shape


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('value', [0, 0.1, 1000.7])
def test_gradient_of_constant_features_is_at_most_one_over_eps(dtype, value):
    """(z - mean) / (std + eps) has slopes of at most 1 / eps, and on constant z it is 0: no blow-up where std is 0."""
    z = torch.full((5, 1, 101), value, dtype=dtype, requires_grad=True)
    y = layers.normalize(z, torch.full((1,), 0.25), 1e-5)
    g = torch.randn_like(y)
    assert y.abs().max() < 1e-6
    assert torch.autograd.grad(y, z, g)[0].float().norm() < 1.01 * 0.25e5 * g.float().norm()


@pytest.mark.parametrize('alpha', [0.0, -1e-9])
@normalized
def test_alpha_crosses_zero(form, alpha):
    """With alpha at 0 the output is about 0, everything is finite, and alpha still gets its full gradient."""
    layer, x = made(form)
    nn.init.constant_(layer.alpha, alpha)
    v = torch.randn_like(layer(x))
    result, expected = (gradients(layer, f, x, v) for f in (layer, lambda x: reference(layer, x)))
    assert all(t.isfinite().all() for t in result.values()) and result['value'].abs().max() < 1e-4
    assert expected['alpha'].abs().max() > 0.1 and off(result['alpha'], expected['alpha']) < 1e-5


def test_a_bright_image_loses_nothing_in_bfloat16():
    """In bf16 a large common term costs less than 1 %, because the product is with {-1/2,1/2}; with {0,1} it costs over 5 %."""
    layer, x = filled(BinaryConv2d(64, 8, 3), torch.bfloat16), (torch.rand(2, 64, 5, 5) + 9).bfloat16()
    want = reference(copy.deepcopy(layer).double(), x.double())
    z = F.conv2d(x, *(layers.straight_through(p, (p > p.float().mean()).to(p)) for p in (layer.weight, layer.bias)))
    assert off(layer(x), want) < 0.01 < 0.05 < off(normalize(z.double(), layer.alpha.double().view(-1, 1, 1), 1), want)


@pytest.mark.parametrize('form', [name for name in FORMS if name.startswith('conv')])
def test_channels_last_changes_no_value(form):
    """Values and gradients are those of a contiguous input. Normalized over the channels, outputs are channels_last always."""
    layer, x = made(form)
    v = torch.randn_like(layer(x))
    result, expected = (gradients(layer, layer, t, v) for t in (x.contiguous(memory_format=torch.channels_last), x))
    same(result, expected, 1e-5)
    if form == 'conv channel':                      # so a chain of such layers copies nothing
        for t in (result['value'], expected['value'], result['input']):
            assert t.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('offset', [0, 1000])
@pytest.mark.parametrize('width', [1, 33, 224 * 224])
def test_normalize_is_a_layer_norm(width, offset):
    """In fp32 it is F.layer_norm in float64 with eps added to the std, within 1e-6, also a thousand deviations from 0."""
    z, alpha, eps = torch.randn(6, width) + offset, torch.randn(width), 1e-3
    exact = z.double()
    std = exact.std(-1, keepdim=True, unbiased=False)
    expected = alpha * F.layer_norm(exact, (width,), eps=1e-30) * std / (std + eps)
    result, rstd = layers._normalize(z, alpha, eps)
    assert result.dtype == torch.float32
    assert_close(result.double(), expected, rtol=0, atol=1e-6 * max(1, expected.abs().max().item()))
    if width > 1:
        assert_close(rstd.double(), 1 / std, rtol=1e-6, atol=0)


@pytest.mark.parametrize('norm, forward, both', [('channel', 2.9, 6.2), ('spatial', 2.1, 5.5)])
def test_large_images_are_normalized_in_blocks_by_the_same_formula(norm, forward, both):
    """More numbers than are taken at a time: value and every gradient are those of the formula, and temporaries stay below an
    activation (peak bytes of a pass, x the output's)."""
    layer, x = BinaryConv2d(4, 16, 3, padding=1, norm=norm), torch.randn(7, 4, 60, 90)
    with torch.no_grad(), common.peak_meter(False) as peak:
        y = layer(x)
    assert y.numel() > 2 ** 18 and (AS_ON_GPU or peak['bytes'] < forward * y.nbytes)
    with common.peak_meter(False) as peak:
        layer(x.requires_grad_()).square().sum().backward()
    assert AS_ON_GPU or peak['bytes'] < both * y.nbytes
    check(filled(layer), x.detach().double(), 1e-9)


def test_the_switch_takes_the_code_paths_of_gpus():
    """With NANOBIT_PATHS=gpu one slice covers all rows, the product is a float product and kernels.c decodes nothing."""
    x = torch.empty(5000, 100)
    assert (len(layers._blocks(x)) == 1) == AS_ON_GPU and not (AS_ON_GPU and layers.has_fast_int8(x.device))
    assert not (AS_ON_GPU and quant._kernels_for(torch.empty(8, dtype=torch.uint8), torch.empty(1)))


@pytest.mark.parametrize('rows, columns, outs, pays',
                         [(17, 16, 8, True), (16, 16, 8, False), (17, 12, 8, False), (17, 16, 9, False)])
def test_int8_products_on_cuda_need_the_shapes_of_cublas(monkeypatch, rows, columns, outs, pays):
    """More than 16 rows, other sizes multiples of 8, and only with NANOBIT_INT8=1."""
    class Cuda(torch.Tensor):
        device = torch.device('cuda')
    q, t = (torch.empty(n, columns, dtype=torch.int8) for n in (rows, outs))
    q = q.as_subclass(Cuda)
    assert not layers.int8_product_pays(q, t)
    monkeypatch.setattr(layers, 'FAST_INT8_CUDA', True)
    assert layers.int8_product_pays(q, t) == pays


# -------------------------------------------------------------------------------------------------------- saved tensors


def test_saved_tensors_of_each_layer():
    """Ternary: int8 codes, a number per token and per chunk, x for the RMSNorm. Binary: x, y, a number per token. Int4: x. No
    weights. A convolution without normalization: x, nothing without a weight gradient."""
    x = torch.randn(24, 16)
    total, tensors = saved(TernaryLinear(16, 40, True, norm=False), x)
    assert total == 24 * 16 + 24 * 4 + 4 and (torch.int8, 24 * 16) in tensors
    for chunks, options in ((1, dict(bias=True)), (3, dict(chunks=(8, 8, 24))), (1, dict(output_gain=True))):
        assert saved(TernaryLinear(16, 40, **options), x)[0] == 24 * 16 * (4 + 1) + 24 * 4 * 2 + chunks * 4
    assert saved(BinaryLinear(16, 40), x)[0] == 4 * (24 * 16 + 24 * 40 + 24 + 1)            # 1: alpha
    assert saved(Linear4bit(16, 40), x)[0] == 4 * 24 * 16
    for cls in (TernaryConv2d, Conv4bit):
        x, plain = torch.randn(2, 4, 7, 6, requires_grad=True), cls(4, 8, 3)
        plain.weight.requires_grad_(False)
        assert saved(cls(4, 8, 3, act='relu'), x)[0] == x.nbytes and saved(plain, x)[0] == 0


def test_an_activation_inside_the_layer_saves_no_tensor_of_its_own():
    """Only the input of the activation is saved, and of a ternary layer the codes; outside, its output is saved too."""
    n, c = 24, 16
    for cls in (BinaryLinear, TernaryLinear, Linear4bit):
        outside = nn.Sequential(cls(c, 4 * c), nn.GELU(), cls(4 * c, c))
        inside = nn.Sequential(cls(c, 4 * c), cls(4 * c, c, act='gelu'))
        assert saved(outside, torch.randn(n, c))[0] - saved(inside, torch.randn(n, c))[0] == n * 4 * c * 4
    for act in ('relu2_glu', 'silu_glu'):
        inside, x = TernaryLinear(c, 40, act=act), torch.randn(n, 2 * c, requires_grad=True)
        assert saved(inside, x)[0] == n * 2 * c * 4 + n * c + n * 4 * 2 + 4
        outside = nn.Sequential(Activation(act), TernaryLinear(c, 40))
        assert saved(outside, x)[0] >= saved(inside, x)[0] + n * c * 4


def test_a_chain_of_binary_convolutions_saves_one_activation_a_layer():
    """Convolution, BatchNorm and in-place ReLU save two. Outside of the layers an F.threshold saves one more."""
    n, pixels, depth = 2, 7 * 6, 4
    x, full = torch.randn(n, 8, 7, 6), n * 8 * pixels * 4                   # bytes of one activation
    binary = nn.Sequential(*(BinaryConv2d(8, 8, 3, padding=1, act='relu') for _ in range(depth)))
    inside = saved(binary, x)[0]
    assert inside == full * (depth + 1) + depth * (n * pixels + 8) * 4      # 1 / std of each pixel; alphas kept away from 0
    real = nn.Sequential(*(m for _ in range(depth) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8),
                                                            nn.ReLU(inplace=True))))
    assert full * (2 * depth + 1) <= saved(real, x)[0] < full * (2 * depth + 1.5)
    outside = nn.Sequential(*(m for _ in range(depth) for m in (BinaryConv2d(8, 8, 3, padding=1), nn.Threshold(0, 0))))
    assert saved(outside, x)[0] - inside == 3 * full


# ------------------------------------------------------------------------------------------------------------- packing


@every_packable
def test_packing_changes_no_output_and_counts_every_byte(name):
    """pack_() keeps the output to the bit, in bf16 too, and the gradient of x, in the bytes that packed_bytes() foretold."""
    (layer, x), n_bytes = made(name), PACKABLE[name][2]
    leaves = [x, x.bfloat16()] if x.is_floating_point() else [x]
    outputs = [layer(leaf) for leaf in leaves]
    if x.is_floating_point():
        assert outputs[1].dtype == torch.bfloat16 and off(outputs[1], outputs[0]) < 0.03
        gradient = lambda: gradients(layer, layer, x, outputs[0].detach())['input']
        expected = gradient()
    assert layer.packed_bytes() == n_bytes
    assert layer.pack_() is layer and layer.pack_().packed                  # twice is once
    for leaf, y in zip(leaves, outputs, strict=True):
        if name == 'int8 act':                                              # may be an int8 product now
            assert off(layer(leaf), y) < (1e-6 if y.dtype == torch.float32 else 0.01)
        else:
            assert torch.equal(layer(leaf), y)
    if x.is_floating_point():
        assert_close(gradient(), expected, rtol=1e-5, atol=1e-5)
    assert layer.packed_bytes() == n_bytes == sum(t.nbytes for t in layer.state_dict().values())
    assert not any(p.requires_grad for p in layer.parameters()) and layer.weight is None


@every_packable
def test_unpacked_and_copied_layers_are_the_same_function(name):
    """unpack_(), state_dict and deepcopy, latent and packed, give the same outputs; unpacked it trains and packs again."""
    layer, x = made(name)
    y, names = layer(x), sorted(n for n, _ in layer.named_parameters())
    for packed in (False, True):
        fresh = PACKABLE[name][0]()
        if packed:
            codes, weight = layer.pack_().code, None if 'embedding' in name else layer.effective_weight()
            fresh.pack_()
        fresh.load_state_dict(layer.state_dict())
        twin = copy.deepcopy(layer)
        assert torch.equal(fresh(x), layer(x)) and torch.equal(twin(x), layer(x))
    assert layer.unpack_() is layer and layer.unpack_() is layer and not list(layer.buffers())
    assert twin.packed and torch.equal(twin(x), fresh(x))                   # independent of the layer
    assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
    layer(x).square().sum().backward()
    assert sorted(n for n, p in layer.named_parameters() if p.grad is not None) == names
    assert torch.equal(layer.pack_().code, codes)
    assert weight is None or torch.allclose(layer.effective_weight(), weight, rtol=1e-6, atol=0)


@every_form
def test_numbers_that_are_not_finite_are_refused(form):
    """inf or nan in any parameter: pack_() raises ValueError with the class in it and leaves the layer as it was."""
    whole, x = made(form)
    for parameter in dict(whole.named_parameters()):
        for bad in (math.inf, -math.inf, math.nan):
            layer = copy.deepcopy(whole)
            layer.get_parameter(parameter).data.view(-1)[-1] = bad
            before = {n: p.detach().clone() for n, p in layer.named_parameters()}
            with pytest.raises(ValueError, match=f'^{type(layer).__name__}: [^\\n]*finite'):
                layer.pack_()
            assert not layer.packed and not list(layer.buffers()) and all(p.requires_grad for p in layer.parameters())
            assert all(torch.equal(p.nan_to_num(5), before[n].nan_to_num(5)) for n, p in layer.named_parameters())
    assert whole.pack_().packed and whole(x).isfinite().all()


@pytest.mark.parametrize('cls, size', [(Linear4bit, (4, 4)), (Conv4bit, (2, 2, 3))])
def test_4_bit_refuses_weights_beyond_fp16(cls, size):
    """A weight above 65504 has no fp16 scale: pack_() raises ValueError. fp32 scales have one."""
    layer, wide = cls(*size), cls(*size, scales='fp32')
    nn.init.constant_(layer.weight, 1e5), nn.init.constant_(wide.weight, 1e5)
    with pytest.raises(ValueError, match=f'^{cls.__name__}: .*65504'):
        layer.pack_()
    assert not layer.packed and layer.weight is not None and wide.pack_().packed


# --------------------------------------------------------------------------------------------- frozen, low rank, LoRA


@pytest.mark.parametrize('dtype, tol', [(torch.float64, 1e-12), (torch.bfloat16, 0.03)])
def test_low_rank_layer_is_its_product(dtype, tol):
    """Value and gradients of x, A, c, B and bias are those of x (A diag(c) B)^T + b; the weight itself is not saved."""
    layer, x, v = filled(LowRankLinear(64, 80, rank=3), dtype), torch.randn(2, 5, 64).to(dtype), torch.randn(2, 5, 80).to(dtype)
    exact = copy.deepcopy(layer).double()
    want = gradients(exact, lambda x: F.linear(x, exact.A @ torch.diag(exact.c) @ exact.B, exact.bias), x.double(), v.double())
    got = gradients(layer, layer, x, v)
    assert all(got[name].dtype == dtype and off(got[name], want[name]) < tol for name in want)
    assert max(n for _, n in saved(layer, x)[1]) < 64 * 80


def factors(layer):
    return (layer.A * layer.c @ layer.B).detach()


@pytest.mark.parametrize('shape', [(24, 40), (40, 24)])
def test_low_rank_is_near_the_best_of_its_rank(shape):
    """from_linear: at full rank the weight itself, at rank r within 5 % of the error of the exact SVD, bias copied."""
    full = nn.Linear(*shape)
    s = torch.linalg.svdvals(full.weight.detach())
    for rank in (1, 5, 12, 24):
        layer = LowRankLinear.from_linear(full, rank=rank)
        assert (factors(layer) - full.weight).norm() <= s[rank:].square().sum().sqrt() * 1.05 + 1e-5
        assert layer.A.shape == (shape[1], rank) and layer.B.shape == (rank, shape[0]) and torch.equal(layer.bias, full.bias)


@pytest.mark.parametrize('rank, shrink', [(1, True), (4, False), (4, True), (6, False)])
def test_truncation_is_the_svd_of_the_product(rank, shrink):
    """truncate(k) gives the best rank-k approximation of A diag(c) B, returns its share of the squares, and still trains."""
    layer = LowRankLinear(10, 9, rank=6)
    nn.init.normal_(layer.c)
    U, s, Vh = torch.linalg.svd(factors(layer))
    share = layer.truncate(rank, shrink=True) if shrink else layer.truncate(rank)
    assert_close(factors(layer), U[:, :rank] * s[:rank] @ Vh[:rank], rtol=0, atol=1e-5)
    assert share == pytest.approx((s[:rank].square().sum() / s.square().sum()).item(), abs=1e-5)
    left = rank if shrink else 6
    assert layer.rank == left and [*layer.A.shape, *layer.c.shape, *layer.B.shape] == [9, left, left, left, 10]
    assert not layer.c[rank:].any() and not layer.A[:, rank:].any() and not layer.B[rank:].any()
    layer(torch.randn(2, 10)).sum().backward()
    assert all(p.grad.shape == p.shape for p in layer.parameters())


@pytest.mark.parametrize('make, message', [
    *((lambda cls=cls: cls(8, 6, act='tanh'), "act='tanh'") for cls in (BinaryLinear, TernaryLinear, Linear4bit, Int8Linear)),
    *((lambda cls=cls: cls(8, 6, 3, act='silu_glu'), "act='silu_glu'") for cls in (      # 3: kernel_size, or a bias
        BinaryLinear, Linear4bit, Int8Linear, BinaryConv2d, TernaryConv2d, Conv4bit)),
    *((lambda option=option: TernaryConv2d(4, 8, 3, **option), f'TernaryConv2d: .*{message}') for option, message in (
        (dict(act='tanh'), "act='tanh'"), (dict(groups=3), 'groups=3'), (dict(groups=0), 'groups=0'),
        (dict(padding='full'), "padding='full'"), (dict(padding='same', stride=(1, 2)), r'\(1, 2\)'))),
    (lambda: BinaryLinear(6, 4, alpha=None), 'alpha=None needs bias=False'),
    (lambda: BinaryConv2d(6, 4, 3, groups=3), 'groups=3'), (lambda: BinaryConv2d(4, 6, 3, norm='batch'), "norm='batch'"),
    *((lambda alpha=alpha: BinaryLinear(8, 6, alpha=alpha), 'alpha') for alpha in (0, math.nan)),
    (lambda: BinaryEmbedding(4, 6, False, alpha=None), 'alpha must be a number'),
    (lambda: BinaryConv2d(4, 6, 3, alpha=0), 'alpha'), (lambda: BinaryEmbedding(4, 6, alpha=0), 'alpha'),
    (lambda: BinaryLinear(8, 7, chunks=3), 'chunks=3'), *((
        lambda chunks=chunks: TernaryLinear(8, 7, chunks=chunks), 'chunks=') for chunks in (3, (3, 2), (7, 0), (8, -1), ())),
    *((lambda option=option: Linear4bit(4, 6, **option), message) for option, message in (
        (dict(format='nf3'), "format='nf3'"), (dict(group=5), 'group=5'), (dict(group=-2), 'group=-2'),
        (dict(scales='fp8'), "scales='fp8'"), (dict(format='nf4', scales='log8'), "scales='log8'"))),
    (lambda: Conv4bit(4, 6, 3, format='fit4', scales='fp16'), "Conv4bit: scales='fp16'"),
    (lambda: TernaryLinear(131072, 1), '131072'), (lambda: Int8Linear(131072, 1), '131072'),
    (lambda: Int8Linear(8, 6, activations='int4'), "activations='int4'"),
    (lambda: HalfLinear(8, 6, dtype=torch.float32), 'float32'), (lambda: linear('binary', 8, 6), "kind='binary'"),
    (lambda: linear('fp', 8, 6, act='gelu'), "act='gelu'"), (lambda: linear('fp', 8, 6, alpha=1.0), 'alpha'),
    (lambda: linear('fit4', 8, 6, scales='8bit'), "scales='8bit'"), (lambda: conv2d('int8', 4, 6, 3), "kind='int8'"),
    (lambda: conv2d('fp', 4, 6, 3, act='relu'), 'without act'), (lambda: LowRankLinear(8, 6, rank=7), 'rank=7'),
    (lambda: LowRankLinear(8, 6, rank=0), 'rank=0'), (lambda: LowRankLinear(8, 6, rank=3).truncate(4), 'rank 3 to 4'),
    (lambda: LowRankLinear(8, 6, rank=3).truncate(0), 'to 0'), (lambda: LoRALinear(nn.Linear(4, 4), rank=0), 'rank=0'),
    (lambda: LoRALinear(nn.Linear(4, 4), dropout=1.0), 'dropout=1.0'), (lambda: LoRALinear(nn.Embedding(4, 4)), 'Embedding'),
    (lambda: LoRALinear(LoRALinear(nn.Linear(4, 4))), 'LoRALinear')])
def test_bad_arguments_are_refused_at_construction(make, message):
    """Each argument a layer cannot honor raises ValueError with its value in it."""
    with pytest.raises(ValueError, match=message):
        make()
    assert TernaryLinear(131071, 1).in_features == 131071
