"""Low-bit convolutions: values and every gradient against literal formulas, memory kept, packing that changes no output."""
import copy
import math
import shutil

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from test_layers import activated, bits, check, filled, fixed, gradients, kept, normalize, off, straight_through  # noqa: F401
from torch.testing import assert_close

import layers
from common import load_packed, read_packed, save_packed
from layers import BinaryConv2d, Conv4bit, Linear4bit, TernaryConv2d, conv2d, convert, model_bytes, pack

# ------------------------------------------------------------------------------ references: formulas and plain autograd


def product(options, x, weight, bias):
    """F.conv2d with what of a layer's options F.conv2d takes, as it was given."""
    return F.conv2d(x, weight, bias, **{n: v for n, v in options.items() if n in ('stride', 'padding', 'dilation', 'groups')})


def reference_bin(layer, options, x):
    z = product(options, activated(layer, x), bits(layer.weight), None if layer.bias is None else bits(layer.bias))
    dims = {'channel': (1,), 'spatial': (2, 3), 'sample': (1, 2, 3)}[layer.norm]
    return normalize(z, layer.alpha.view(-1, 1, 1), dims, layer.eps)


def reference_tern(layer, options, x):
    a = activated(layer, x)
    s = 127 / a.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-5)
    a = straight_through(a, (a * s).round().clamp(-128, 127) / s)
    scale = layer.weight.abs().mean().clamp(min=1e-5)
    return product(options, a, straight_through(layer.weight, (layer.weight / scale).round().clamp(-1, 1) * scale), layer.bias)


def reference_int4(layer, options, x):
    n = layer.weight.numel()
    w = F.pad(layer.weight.flatten(), (0, -n % layer.group)).view(-1, layer.group)
    top = w.abs().amax(1, keepdim=True).half().to(w.dtype)
    w = straight_through(w, ((w + top) / (2 * top) * 15).round().clamp(0, 15) / 15 * 2 * top - top)
    return product(options, activated(layer, x), w.flatten()[:n].view(layer.shape), layer.bias)


KINDS = {'bin': (BinaryConv2d, reference_bin), 'tern': (TernaryConv2d, reference_tern), 'int4': (Conv4bit, reference_int4)}
every_kind = pytest.mark.parametrize('kind', KINDS)
GEOMETRY = [dict(kernel_size=3), dict(kernel_size=1), dict(kernel_size=3, stride=2, padding=1),
            dict(kernel_size=(1, 3), padding=(0, 2), dilation=(1, 2)), dict(kernel_size=(2, 4), stride=(2, 1), padding='valid'),
            dict(kernel_size=(3, 5), padding='same'), dict(kernel_size=(2, 3), padding='same'),
            dict(kernel_size=(3, 4), padding='same', dilation=(2, 3)), dict(kernel_size=2, padding='same', groups=2),
            dict(kernel_size=3, padding=1, groups=4)]


def made(kind, dtype=torch.float64, **options):
    """(layer with 4 input and 8 output channels, its reference as a function of x) with random parameters."""
    cls, reference = KINDS[kind]
    layer = filled(cls(4, 8, **dict(kernel_size=3) | options), dtype)
    return layer, lambda x, of=layer: reference(of, options, x)


def images(n=2, dtype=torch.float64):
    """Mostly positive, so that a ReLU leaves something under every kernel."""
    return (torch.randn(n, 4, 7, 6) + 1).to(dtype)


# ------------------------------------------------------------------------------------------- values and every gradient


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('act', [None, 'relu', 'gelu'])
@pytest.mark.parametrize('options', GEOMETRY, ids=str)
@every_kind
def test_convolution_is_its_formula(kind, options, act, bias):
    """Value and gradients of x, weight, bias, alpha for every geometry, activation inside or none; to 1e-6 for int4, whose
    levels are fp32. The layer is given what F.conv2d is given, padding='same' of even kernels included."""
    layer, reference = made(kind, **options, act=act, bias=bias)
    check(layer, lambda _, x: reference(x), images(), 1e-6 if kind == 'int4' else 1e-11)


@pytest.mark.parametrize('act', ['relu', 'gelu'])
@pytest.mark.parametrize('norm', ['spatial', 'sample'])
def test_binary_convolution_with_an_activation_under_other_norms(norm, act):
    """act inside is the formula under the norms over pixels and over an example as well, with groups and without."""
    for options in (dict(padding=1), dict(stride=2, groups=2, bias=False)):
        layer, reference = made('bin', norm=norm, act=act, **options)
        check(layer, lambda _, x, reference=reference: reference(x), images(3), 1e-11)


@pytest.mark.parametrize('options', [o for o in GEOMETRY if 'padding' in o], ids=str)
@pytest.mark.parametrize('kind', ['tern', 'int4'])
def test_padding_is_that_of_conv2d(kind, options):
    """On whole numbers up to 127 the output is nn.Conv2d's with the same padding and the weights of effective_weight():
    'same' adds what is odd on the right and below."""
    layer, x = made(kind, torch.float32, **options, bias=True)[0].pack_(), torch.randint(-126, 127, (2, 4, 7, 6)).float()
    conv = nn.Conv2d(4, 8, **options)
    conv.load_state_dict({'weight': layer.effective_weight(), 'bias': layer.bias})
    x[:, 1, 2, 3] = 127
    assert_close(layer(x), conv(x), rtol=1e-5, atol=1e-3)
    assert options['padding'] != 'same' or layer(x).shape[2:] == x.shape[2:]


@pytest.mark.parametrize('options', [{}, dict(group=2), dict(group=64), dict(scales='8bit'), dict(format='nf4'),
                                     dict(format='nf4', group=6, scales='fp32'), dict(format='fit4')], ids=str)
def test_conv4bit_is_linear4bit_over_patches(options):
    """The weight flattened as (out, in, h, w) has the levels and scales of Linear4bit's (out, in h w): the product with
    unfolded patches is the same, latent and packed, groups that do not divide the 216 weights included."""
    conv, line = made('int4', torch.float32, **options)[0], Linear4bit(36, 8, **options)
    line.load_state_dict({'weight': conv.weight.flatten(1), 'bias': conv.bias})
    x = images(dtype=torch.float32)
    patches = F.unfold(x, 3).transpose(1, 2)                                # (N, H' W', in h w)
    for packed in (False, True):
        assert_close(conv(x).flatten(2).transpose(1, 2), line(patches), rtol=1e-5, atol=1e-5)
        if not packed:
            conv.pack_(), line.pack_()
    for name, t in line.state_dict().items():
        assert torch.equal(conv.state_dict()[name], t), name


def test_binary_convolution_by_hand():
    """W = [.1, .4] and [.7, .0] for two inputs, mean .3: bits 0 1 and 1 0. A pixel [3, -5] gives z = [-5, 3], mean -1, std
    4 -> [-1, 1] / (1 + 1e-5 / 4); behind a ReLU [3, 0]: z = [0, 3], mean 1.5 -> [-1, 1] / (1 + 1e-5 / 1.5)."""
    for act, std in ((None, 4), ('relu', 1.5)):
        layer = BinaryConv2d(2, 2, 1, bias=False, alpha=1.0, act=act).double()
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[0.1, 0.4], [0.7, 0.0]]).view(2, 2, 1, 1))
        want = torch.tensor([-1, 1]).double() / (1 + 1e-5 / std)
        assert_close(layer(torch.tensor([3.0, -5]).double().view(1, 2, 1, 1)).flatten(), want, rtol=0, atol=1e-14)


def test_ternary_convolution_by_hand():
    """W = [1, -2, .2, 4.8] has mean|w| 2: codes 0 -1 0 1, times 2. x = [127, 2.4, 50, 99.6], its largest 127, is rounded
    to whole numbers: 2 (100 - 2) = 196; a second example of largest 12.7 to tenths: 2 (1.3 - .2) = 2.2."""
    layer = TernaryConv2d(1, 1, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1, -2, 0.2, 4.8]).view(1, 1, 2, 2))
    x = torch.tensor([[127, 2.4, 50, 99.6], [12.7, 0.24, 3, 1.26]]).view(2, 1, 2, 2)
    assert layer(x).flatten().tolist() == pytest.approx([196, 2.2], rel=1e-6)


@pytest.mark.parametrize('how', ['float32', 'bfloat16', 'autocast'])
@pytest.mark.parametrize('kind, options', [('bin', dict(act='relu')), ('bin', dict(norm='spatial', act='gelu')),
                                           ('bin', dict(norm='sample', stride=2)), ('tern', dict(act='relu', bias=True)),
                                           ('int4', dict(act='gelu', padding='same', kernel_size=2))], ids=str)
def test_lower_precision_is_near_float64(kind, options, how):
    """In fp32, in bf16 and under autocast value and gradients are within rounding of the formula in float64 on the same
    numbers, gradients in the dtype of what they belong to; a packed layer gives the same bits."""
    dtype = torch.bfloat16 if how == 'bfloat16' else torch.float32
    layer = made(kind, dtype, **options)[0]
    exact, reference = copy.deepcopy(layer).double(), KINDS[kind][1]
    x, leaves = images(3, dtype), dict(layer.named_parameters())
    with torch.autocast('cpu', torch.bfloat16, enabled=how == 'autocast'):
        v = torch.randn_like(layer(x))
        got = gradients(layer, layer, x, v)
        assert torch.equal(copy.deepcopy(layer).pack_()(x), got['value'])
    want = gradients(exact, lambda x: reference(exact, options, x), x.double(), v.double())
    assert got['value'].dtype == (torch.float32 if how == 'float32' else torch.bfloat16)
    for name in want:
        assert name == 'value' or got[name].dtype == (x if name == 'input' else leaves[name]).dtype, name
        assert off(got[name], want[name], 1) < (1e-5 if how == 'float32' else 0.03), (name, off(got[name], want[name], 1))


@pytest.mark.parametrize('kind, options', [('bin', dict(norm=norm, act=act)) for norm in ('channel', 'spatial', 'sample') for
                                           act in (None, 'relu')] + [('tern', {}), ('int4', {})], ids=str)
def test_channels_last_changes_no_value(kind, options):
    """An input in torch.channels_last gives the values and gradients of a contiguous one. Normalised over the channels the
    output is channels_last whatever came in, so a chain of such layers copies nothing; and so is the input's gradient."""
    layer, _ = made(kind, torch.float32, padding=1, **options)
    x = images(dtype=torch.float32)
    last = x.contiguous(memory_format=torch.channels_last)
    v = torch.randn_like(layer(x))
    got, want = gradients(layer, layer, last, v), gradients(layer, layer, x, v)
    for name in want:
        assert_close(got[name], want[name], rtol=1e-5, atol=1e-5 * max(1, want[name].abs().max().item()))
    if options.get('norm') == 'channel':
        for t in (got['value'], want['value'], got['input']):
            assert t.is_contiguous(memory_format=torch.channels_last)


@every_kind
def test_only_what_needs_a_gradient_gets_one(kind):
    """With any of x, weight, bias and alpha frozen, the rest get the same gradients as before: all 2^n - 1 cases."""
    for act in (None, 'relu'):
        layer, _ = made(kind, torch.float32, act=act, bias=True)
        leaves = dict(layer.named_parameters(), input=images(dtype=torch.float32).requires_grad_())
        full = dict(zip(leaves, torch.autograd.grad(layer(leaves['input']).square().sum(), leaves.values()), strict=True))
        for chosen in range(1, 2 ** len(leaves)):
            wanted = {n: p.requires_grad_(bool(chosen >> i & 1)) for i, (n, p) in enumerate(leaves.items())}
            wanted = {n: p for n, p in wanted.items() if p.requires_grad}
            y = layer(leaves['input']).square().sum()
            for name, g in zip(wanted, torch.autograd.grad(y, wanted.values()), strict=True):
                assert_close(g, full[name], rtol=1e-5, atol=1e-5 * full[name].abs().max().item(), msg=f'{wanted.keys()} {name}')


# ------------------------------------------------------------------------------------------------ equivalences and edges


@pytest.mark.parametrize('act', [None, 'relu'])
def test_zero_one_and_plus_minus_one_are_the_same_network(act):
    """Under norm='channel' {0,1} weights and biases give what {-1,1} ones give with twice the eps, padding included; with
    groups, each of which sums other inputs, they do not."""
    plus_minus, x = lambda p: torch.where(p > p.mean(), 1.0, -1.0).to(p), images()
    for groups in (1, 2):
        layer, _ = made('bin', padding='same', act=act, groups=groups)
        z = F.conv2d(activated(layer, x), plus_minus(layer.weight), plus_minus(layer.bias), padding='same', groups=groups)
        distance = off(layer(x), normalize(z, layer.alpha.view(-1, 1, 1), 1, 2e-5))
        assert distance < 1e-13 if groups == 1 else distance > 0.1


def test_a_bright_image_loses_nothing_in_bfloat16():
    """What all channels have in common is 24 times what tells them apart, over 64 channels of positive numbers: with {0,1}
    in the product bf16 would lose a tenth of it, with the {-1/2,1/2} that is used the formula's value is within 1 %."""
    layer, x = filled(BinaryConv2d(64, 8, 3), torch.bfloat16), (torch.rand(2, 64, 5, 5) + 9).bfloat16()
    want = reference_bin(copy.deepcopy(layer).double(), {}, x.double())
    z = F.conv2d(x, *(layers.straight_through(p, (p > p.float().mean()).to(p)) for p in (layer.weight, layer.bias)))
    assert off(layer(x), want) < 0.01 < 0.05 < off(normalize(z.double(), layer.alpha.double().view(-1, 1, 1), 1), want)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('value', [0, 0.3, -5])
@pytest.mark.parametrize('kind, options', [('bin', dict(norm=norm)) for norm in ('channel', 'spatial', 'sample')] +
                         [('tern', {}), ('int4', {})], ids=str)
def test_constant_images_give_finite_values_and_gradients(kind, options, value, dtype):
    """Zero variance, a largest value of 0, equal weights: no NaN or infinity forward or backward."""
    for act in (None, 'relu'):
        layer, _ = made(kind, dtype, act=act, **options)
        for weights in (None, 0.1, 0):
            if weights is not None:
                nn.init.constant_(layer.weight, weights)
            x = torch.full((2, 4, 7, 6), value, dtype=dtype)
            for name, t in gradients(layer, layer, x, torch.randn_like(layer(x))).items():
                assert t.isfinite().all(), name


@every_kind
def test_no_images_give_no_outputs(kind):
    """A batch of 0 passes, and its gradients are zeros."""
    layer, _ = made(kind, torch.float32, bias=True, act='relu')
    x = torch.zeros(0, 4, 7, 6)
    got = gradients(layer, layer, x, torch.zeros(0, 8, 5, 4))
    assert got['value'].shape == (0, 8, 5, 4) and got['input'].shape == x.shape
    assert not any(t.any() for t in got.values())


# --------------------------------------------------------------------------------------------------------- normalisation


@pytest.mark.parametrize('offset', [0, 1000])
@pytest.mark.parametrize('width', [(1,), (3,), (32,), (33,), (1000,), (5, 7), (64, 3000)], ids=str)
def test_normalize_is_a_layer_norm(width, offset):
    """alpha (z - mean) / (std + eps) in fp32 is F.layer_norm of the same numbers in float64, its eps moved from the variance
    to the std, within 1e-6; also of numbers a thousand standard deviations from 0, and of 192,000 at a time."""
    z, alpha, eps = torch.randn(6, *width) + offset, torch.randn(width[0] if len(width) == 1 else (width[0], 1)), 1e-3
    exact, dims = z.double(), tuple(range(-len(width), 0))
    std = exact.std(dims, keepdim=True, unbiased=False)
    want = alpha * F.layer_norm(exact, width, eps=1e-30) * std / (std + eps)
    got, rstd = layers._normalize(z, alpha, len(width), eps)
    assert got.dtype == torch.float32
    assert_close(got.double(), want, rtol=0, atol=1e-6 * max(1, want.abs().max().item()))
    if math.prod(width) > 1:
        assert_close(rstd.double(), 1 / std, rtol=1e-6, atol=0)


@pytest.mark.parametrize('norm', ['channel', 'spatial', 'sample'])
def test_blocks_equal_the_whole(monkeypatch, norm):
    """More than 2^18 numbers are normalised some rows at a time: output and gradients equal those of all rows at once."""
    layer, _ = made('bin', torch.float32, padding=1, norm=norm)
    x = torch.randn(7, 4, 60, 90)
    rows = layers._by_norm(layer(x), norm)
    assert rows.numel() > 2 ** 18 and len(layers._blocks(rows)) > 1
    v = torch.randn_like(layer(x))
    got = gradients(layer, layer, x, v)
    monkeypatch.setattr(layers, '_blocks', lambda x, wanted=True: [slice(None)])
    want = gradients(layer, layer, x, v)
    for name in want:                               # a sum over rows has another order
        assert_close(got[name], want[name], rtol=0, atol=1e-6 * max(1, want[name].abs().max().item()), msg=name)


# --------------------------------------------------------------------------------------------------------- memory kept


def test_a_binary_chain_keeps_one_activation_a_layer():
    """conv(act='relu') keeps its input, which the layer before keeps as its output, and a number per pixel; convolution,
    BatchNorm and in-place ReLU keep two: the same images and 8-channel outputs, counted to the byte."""
    n, pixels, depth = 2, 7 * 6, 4
    full = n * 8 * pixels * 4                                               # bytes of one activation
    x = torch.randn(n, 8, 7, 6)
    binary = nn.Sequential(*(BinaryConv2d(8, 8, 3, padding=1, act='relu') for _ in range(depth)))
    alphas = depth * 8 * 4                                                  # where they are kept away from 0: a copy
    assert kept(binary, x)[0] == full * (depth + 1) + depth * n * pixels * 4 + alphas
    nn.init.ones_(binary[0].alpha)
    real = nn.Sequential(*(m for _ in range(depth) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8),
                                                            nn.ReLU(inplace=True))))
    assert full * (2 * depth + 1) <= kept(real, x)[0] < full * (2 * depth + 1.5)


def test_threshold_behind_a_binary_layer_keeps_nothing_more():
    """F.threshold keeps its input, which is the binary layer's own output: one activation a layer, and the thresholded one
    that the next layer keeps; inside the layer it is not kept at all."""
    class Chain(nn.Sequential):
        def forward(self, x):
            for layer in self:
                x = F.threshold(layer(x), 0, 0)
            return x
    x, full = torch.randn(2, 8, 7, 6), 2 * 8 * 7 * 6 * 4
    outside = Chain(*(BinaryConv2d(8, 8, 3, padding=1) for _ in range(4)))
    inside = nn.Sequential(*(BinaryConv2d(8, 8, 3, padding=1, act='relu') for _ in range(4)))
    assert kept(outside, x)[0] - kept(inside, x)[0] == 3 * full             # the last output's is kept by no one


@pytest.mark.parametrize('kind', ['tern', 'int4'])
def test_the_others_keep_their_input_alone(kind):
    """No rounded weight or input, no activation: x, and nothing of it when there is no weight gradient to make of it."""
    layer, x = made(kind, torch.float32, act='relu')[0], images(dtype=torch.float32).requires_grad_()
    assert kept(layer, x)[0] == x.nbytes
    plain, _ = made(kind, torch.float32)
    plain.weight.requires_grad_(False)
    assert kept(plain, x)[0] == 0


# ------------------------------------------------------------------------------------------------------------- packing

# 5 x 3 x 3 x 3 = 135 weights; rows of 27
PACKABLE = {'bin': (dict(padding=1, act='relu'), 5 * 4 + 1 + 20),           # bits, bits of the bias, alpha
            'bin spatial': (dict(norm='spatial', act='gelu', bias=False), 5 * 4 + 20),
            'tern': (dict(stride=2), 5 * 7 + 4),                            # 2 bits, a scale
            'tern bias': (dict(bias=True, padding='same', act='relu'), 5 * 7 + 4 + 20),
            'int4': (dict(act='relu'), 9 * (8 + 2) + 20),                   # groups of 16, fp16; the bias
            'int4 wide': (dict(group=64, bias=False, padding=(0, 1)), 3 * (32 + 2)),
            'int4 nf4': (dict(format='nf4', scales='8bit'), 3 * (32 + 1) + 4 + 20),
            'int4 fit4': (dict(format='fit4', dilation=2), 5 * (16 + 1) + 4 + 20)}
every_packable = pytest.mark.parametrize('name', PACKABLE)


def packable(name):
    options, n_bytes = PACKABLE[name]
    return filled(conv2d(name.split()[0], 3, 5, 3, **options), torch.float32), torch.randn(2, 3, 7, 9), n_bytes


@every_packable
def test_packing_changes_no_output_and_counts_every_byte(name):
    """pack_() leaves the output the same to the bit and nothing trainable, in the bytes packed_bytes() had foretold; the
    input's gradient is that of the latent layer; bf16 and autocast give the bits of the latent layer there, too."""
    layer, x, n_bytes = packable(name)
    low = copy.deepcopy(layer).bfloat16()
    x.requires_grad_()
    y, want = layer(x), torch.autograd.grad(layer(x).square().sum(), x)[0]
    assert layer.packed_bytes() == n_bytes
    assert layer.pack_() is layer and layer.pack_().packed                  # twice is once
    assert torch.equal(layer(x), y)
    assert layer.packed_bytes() == n_bytes == sum(t.nbytes for t in layer.state_dict().values())
    assert not any(p.requires_grad for p in layer.parameters()) and layer.weight is None
    assert_close(torch.autograd.grad(layer(x).square().sum(), x)[0], want, rtol=1e-5, atol=1e-5)
    y = low(x.bfloat16())
    assert y.dtype == torch.bfloat16 and torch.equal(low.pack_()(x.bfloat16()), y)


@every_packable
def test_unpacked_is_the_same_function_and_packs_to_the_same_codes(name):
    """unpack_() gives the same outputs and gradients for every parameter, and pack_() then the same codes and weights."""
    layer, x, _ = packable(name)
    y, names = layer(x), sorted(n for n, _ in layer.named_parameters())
    codes, weight = layer.pack_().code, layer.effective_weight()
    assert layer.unpack_() is layer and not list(layer.buffers())
    assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
    layer(x).square().sum().backward()
    assert sorted(n for n, p in layer.named_parameters() if p.grad is not None) == names
    assert torch.equal(layer.pack_().code, codes)
    assert_close(layer.effective_weight(), weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize('bad', [math.inf, -math.inf, math.nan])
@every_packable
def test_numbers_that_are_not_finite_are_refused(name, bad):
    """One of them in any parameter: pack_() raises ValueError with the class in it and leaves the layer as it was."""
    for parameter, _ in packable(name)[0].named_parameters():
        layer, _, _ = packable(name)
        with torch.no_grad():
            layer.get_parameter(parameter).view(-1)[-1] = bad
        with pytest.raises(ValueError, match=f'^{type(layer).__name__}: [^\\n]*finite'):
            layer.pack_()
        assert not layer.packed and not list(layer.buffers()) and all(p.requires_grad for p in layer.parameters())


def test_4_bit_refuses_weights_beyond_fp16():
    """A weight above 65504 has no fp16 scale: packing raises; fp32 scales have one."""
    for scales in ('fp16', 'fp32'):
        layer = Conv4bit(2, 2, 3, scales=scales)
        nn.init.constant_(layer.weight, 1e5)
        if scales == 'fp32':
            assert layer.pack_().packed
        else:
            with pytest.raises(ValueError, match='^Conv4bit: .*65504'):
                layer.pack_()
            assert not layer.packed


def small_net():
    """Each kind once, and what comes between."""
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), BinaryConv2d(4, 6, 3, padding=1),
                         BinaryConv2d(6, 6, 3, groups=2, act='relu'), TernaryConv2d(6, 8, 2, padding='same', act='relu'),
                         nn.BatchNorm2d(8), Conv4bit(8, 5, 1, act='relu'), Conv4bit(5, 5, (3, 1), format='fit4')).eval()


def test_packed_file_gives_the_same_outputs(tmp_path):
    """save -> read -> load into a fresh net: equal outputs, and no byte of the file unexplained but BatchNorm's buffers."""
    model, path, x = filled(small_net(), torch.float32), tmp_path / 'packed.safetensors', torch.rand(2, 3, 9, 9)
    y, foretold = model(x), model_bytes(model)
    size = save_packed(model, path, {'step': 7})
    header = 8 + int.from_bytes(path.read_bytes()[:8], 'little')
    running = sum(b.nbytes for m in model if isinstance(m, nn.BatchNorm2d) for b in m.buffers())
    assert size == foretold[0] + running + header and model_bytes(model) == foretold
    meta, tensors = read_packed(path)
    fresh = load_packed(small_net(), tensors)
    assert meta['step'] == 7 and torch.equal(fresh(x), y) and torch.equal(model(x), y)


def test_state_dict_and_deepcopy_round_trip():
    """state_dict -> a fresh net, and deepcopy, give equal outputs, latent and packed."""
    model, x = filled(small_net(), torch.float32), torch.rand(2, 3, 9, 9)
    for packed in (False, True):
        fresh = small_net()
        if packed:
            pack(model), pack(fresh)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(x), model(x)) and torch.equal(copy.deepcopy(model)(x), model(x))


# ------------------------------------------------------------------------------ constructors, conversion and compilation


@every_kind
@pytest.mark.parametrize('options, says', [
    (dict(act='tanh'), "act='tanh'"), (dict(groups=3), 'groups=3'), (dict(groups=0), 'groups=0'),
    (dict(groups=-1), 'groups=-1'), (dict(padding='full'), "padding='full'"),
    (dict(padding='same', stride=2), r'stride=1, not \(2, 2\)'), (dict(padding='same', stride=(1, 2)), r'not \(1, 2\)')])
def test_bad_geometry_is_refused_at_construction(kind, options, says):
    """Each argument a layer cannot honour raises ValueError with the class and the value in it."""
    cls = KINDS[kind][0]
    with pytest.raises(ValueError, match=f'^{cls.__name__}: .*{says}'):
        cls(4, 8, 3, **options)


@pytest.mark.parametrize('make, says', [
    (lambda: BinaryConv2d(4, 6, 3, norm='batch'), "norm='batch'"), (lambda: BinaryConv2d(4, 6, 3, alpha=-1.0), '-1.0'),
    (lambda: Conv4bit(4, 6, 3, format='int4'), "format='int4'"), (lambda: Conv4bit(4, 6, 3, group=5), 'group=5'),
    (lambda: Conv4bit(4, 6, 3, group=-2), 'group=-2'), (lambda: Conv4bit(4, 6, 3, scales='fp8'), "scales='fp8'"),
    (lambda: Conv4bit(4, 6, 3, format='fit4', scales='fp16'), "scales='fp16'.*fit4's"),
    (lambda: Conv4bit(4, 6, 3, scales='log8'), "scales='log8'"),
    (lambda: conv2d('int8', 4, 6, 3), "kind='int8'"), (lambda: conv2d('fp', 4, 6, 3, act='relu'), 'without act')])
def test_bad_arguments_are_refused_at_construction(make, says):
    """Each argument a layer cannot honour raises ValueError with its value in it."""
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('options', [dict(kernel_size=(2, 3), padding='same', dilation=2),
                                     dict(kernel_size=3, stride=(1, 2), padding=(1, 0), groups=2)], ids=str)
@pytest.mark.parametrize('kind', [*KINDS, ('int4', dict(format='nf4', act='gelu'))], ids=str)
def test_convert_gives_what_conv2d_makes(kind, options, bias):
    """convert() copies weight, bias and geometry: the layer equals conv2d() of the kind with the same parameters, and
    packed=True packs it."""
    name, more = (kind, {}) if isinstance(kind, str) else kind
    model = nn.Sequential(nn.Conv2d(4, 8, bias=bias, **options), nn.ReLU(inplace=True)).double()
    want = conv2d(name, 4, 8, bias=bias, **options, **more).double()
    want.load_state_dict(model[0].state_dict(), strict=False)
    twin, x = copy.deepcopy(model), images()
    assert convert(model, {'0': kind}, verbose=False) == ['0'] and type(model[0]) is type(want)
    assert convert(twin, {'0': kind}, verbose=False, packed=True) == ['0'] and twin[0].packed
    assert torch.equal(model[0](x), want(x)) and torch.equal(twin[0](x), want(x)) and not model[1].inplace
    assert (model[0].bias is None) == (not bias) and model[0].weight.dtype == torch.float64


def test_conv2d_makes_each_kind():
    """conv2d(kind, ...) gives the class of the kind and passes its options; 'fp' gives nn.Conv2d."""
    for kind, cls in [('fp', nn.Conv2d), ('bin', BinaryConv2d), ('tern', TernaryConv2d), ('int4', Conv4bit)]:
        for bias in (True, False):
            layer = conv2d(kind, 4, 8, 3, stride=2, padding=1, bias=bias)
            assert type(layer) is cls and (layer.bias is not None) == bias
            assert layer(images(dtype=torch.float32)).shape == (2, 8, 4, 3)
        assert kind == 'fp' or (conv2d(kind, 4, 8, 3, act='gelu').act, layer.kind) == ('gelu', kind)
    assert conv2d('int4', 4, 8, 3, format='nf4').kind == 'nf4' and conv2d('bin', 4, 8, 3, alpha=0.5).alpha.eq(0.5).all()


@pytest.mark.skipif(not (shutil.which('g++') or shutil.which('clang++')), reason='torch.compile needs a C++ compiler')
def test_compiled_equals_eager():
    """torch.compile takes a net of the three kinds as one graph: output and gradients to 1e-5 of eager."""
    torch.compiler.reset()                          # what other tests compiled would make these shapes dynamic
    model = nn.Sequential(BinaryConv2d(3, 4, 3, act='relu'), TernaryConv2d(4, 4, 2, padding='same', act='relu'),
                          Conv4bit(4, 5, 1, act='gelu'))
    x = torch.randn(2, 3, 7, 6)
    v = torch.randn_like(model(x))
    got, want = (gradients(model, f, x, v) for f in (torch.compile(model, fullgraph=True), model))
    for name in want:
        assert_close(got[name], want[name], rtol=1e-5, atol=1e-5 * max(1, want[name].abs().max().item()), msg=name)
