"""Low-bit convolutions beside nn.Conv2d and linear layers over patches; memory formats; normalization in blocks of rows."""
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from formulas import check, filled, fixed, gradients, same  # noqa: F401
from torch.testing import assert_close

import layers
from layers import BinaryConv2d, Conv4bit, Linear4bit, TernaryConv2d, conv2d


def images():
    return torch.randn(2, 4, 7, 6) + 1


@pytest.mark.parametrize('options', [
    dict(kernel_size=3, stride=2, padding=1), dict(kernel_size=(2, 4), padding='valid'),
    dict(kernel_size=(2, 3), padding='same'), dict(kernel_size=(3, 4), padding='same', dilation=2),
    dict(kernel_size=2, padding='same', groups=2)], ids=str)
@pytest.mark.parametrize('cls', [TernaryConv2d, Conv4bit])
def test_padding_is_that_of_conv2d(cls, options):
    """On whole numbers up to 127 a packed layer gives what nn.Conv2d gives with the weights of effective_weight()."""
    layer, x = filled(cls(4, 8, **options, bias=True), torch.float32).pack_(), torch.randint(-126, 127, (2, 4, 7, 6)).float()
    conv = nn.Conv2d(4, 8, **options)
    conv.load_state_dict({'weight': layer.effective_weight(), 'bias': layer.bias})
    x[:, 1, 2, 3] = 127                             # so that the rounding of the input changes nothing
    assert_close(layer(x), conv(x), rtol=1e-5, atol=1e-3)
    assert options.get('padding') != 'same' or layer(x).shape[2:] == x.shape[2:]


@pytest.mark.parametrize('options', [{}, dict(group=64), dict(scales='8bit'), dict(format='nf4', group=6, scales='fp32'),
                                     dict(format='fit4')], ids=str)
def test_conv4bit_is_linear4bit_over_patches(options):
    """The weight flattened as (out, in, h, w) has Linear4bit's codes and scales; the product with unfolded patches is equal."""
    conv, line = filled(Conv4bit(4, 8, 3, **options), torch.float32), Linear4bit(36, 8, **options)
    line.load_state_dict({'weight': conv.weight.flatten(1), 'bias': conv.bias})
    x = images()
    patches = F.unfold(x, 3).transpose(1, 2)                                # (N, H' W', in h w)
    for packed in (False, True):
        if packed:
            conv.pack_(), line.pack_()
        assert_close(conv(x).flatten(2).transpose(1, 2), line(patches), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(conv.state_dict()[name], t) for name, t in line.state_dict().items())


@pytest.mark.parametrize('kind, options', [('bin', dict(norm='channel')), ('bin', dict(norm='spatial', act='relu')),
                                           ('bin', dict(norm='sample')), ('tern', {}), ('int4', {})], ids=str)
def test_channels_last_changes_no_value(kind, options):
    """Values and gradients are those of a contiguous input. Normalized over the channels, outputs are channels_last always."""
    layer, x = filled(conv2d(kind, 4, 8, 3, padding=1, **options), torch.float32), images()
    v = torch.randn_like(layer(x))
    got = gradients(layer, layer, x.contiguous(memory_format=torch.channels_last), v)
    want = gradients(layer, layer, x, v)
    same(got, want, 1e-5)
    if options.get('norm') == 'channel':            # so a chain of such layers copies nothing
        for t in (got['value'], want['value'], got['input']):
            assert t.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('offset', [0, 1000])
@pytest.mark.parametrize('width', [(1,), (3,), (33,), (1000,), (5, 7), (64, 3000)], ids=str)
def test_normalize_is_a_layer_norm(width, offset):
    """In fp32 it is F.layer_norm in float64 with eps added to the std, within 1e-6, also a thousand deviations from 0."""
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
def test_large_images_are_normalized_in_blocks_by_the_same_formula(norm):
    """More numbers than are taken at a time: value and every gradient are those of the formula."""
    layer = filled(BinaryConv2d(4, 8, 3, padding=1, norm=norm))
    x = torch.randn(7, 4, 60, 90).double()
    assert layer(x).numel() > 2 ** 18
    check(layer, x, 1e-9)
