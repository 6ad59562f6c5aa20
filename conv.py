"""
Convolutions with binary, ternary and 4-bit weights, (N, C, H, W) -> (N, out, H', W'), trained through the rounding and packed
as the linear layers of layers.py are.

    bin      BinaryConv2d     {0,1} by `w > mean(w)`; the output is normalised: no BatchNorm behind it
    tern     TernaryConv2d    {-1,0,1} * mean|w|, inputs int8 per example; put a BatchNorm behind it
    int4     Conv4bit         4-bit levels, as Linear4bit; put a BatchNorm behind it

act='relu' (or 'gelu') applies the activation in front of the layer inside of it and keeps only the activation's input, which
the layer before it keeps anyway where that is binary: then a convolution, its normalisation and its activation leave one
tensor for the backward pass, where Conv2d, BatchNorm2d and an in-place ReLU leave two.

With inputs in torch.channels_last the normalisation over the channels is one over adjacent numbers; others are copied.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from functional import ACTIVATIONS, compute_dtype, quantized_conv
from lowbit import Binary, FourBit, LowBit
from quant import half_bits, pack_bits, ternarize, unpack_bits


class _Conv:
    """Geometry and product of the three. `_quantize(weight, bias, dtype)` gives what the product is made of."""
    norm, eps, round_input = None, 0.0, False

    def _geometry(self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, act):
        name, pair = type(self).__name__, lambda v: (v, v) if isinstance(v, int) else tuple(v)
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f'{name}: groups={groups} must divide {in_channels} and {out_channels} channels')
        if act not in ACTIVATIONS:
            raise ValueError(f'{name}: act={act!r} must be in {list(ACTIVATIONS)}')
        if isinstance(padding, str) and padding not in ('same', 'valid'):
            raise ValueError(f"{name}: padding={padding!r} must be 'same', 'valid' or numbers")
        size, stride, dilation, self.uneven = pair(kernel_size), pair(stride), pair(dilation), ()
        if padding == 'same':
            if stride != (1, 1):
                raise ValueError(f"{name}: padding='same' needs stride=1, not {stride}")
            total = [d * (k - 1) for d, k in zip(dilation, size, strict=True)]
            padding = tuple(t // 2 for t in total)
            if any(t % 2 for t in total):           # one more on the right and below, as nn.Conv2d has it
                self.uneven = (0, total[1] % 2, 0, total[0] % 2)
        padding = (0, 0) if padding == 'valid' else pair(padding)
        self.conv = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
        self.shape, self.act = (out_channels, in_channels // groups, *size), act
        self.weight = nn.Parameter(torch.empty(self.shape))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.register_parameter('alpha', None)      # only a binary one has scales of its output

    def forward(self, x):
        x = x.to(compute_dtype(x))
        x = F.pad(x, self.uneven) if self.uneven else x
        return quantized_conv(x, self.weight, self.bias, self.alpha, self._quantize, self.act, self.round_input, self.norm,
                              self.eps, self.conv)

    def extra_repr(self):
        norm = f'norm={self.norm}, ' if self.norm else ''
        return f'{self.shape}, {self.conv}, {norm}act={self.act}, packed={self.packed}'


class BinaryConv2d(_Conv, Binary, nn.Module):
    """Binary normalised convolution (arXiv 2509.07025, alg. 3), (N, C, H, W) -> (N, out, H', W').

    As BinaryLinear with a convolution for the product; alpha is one per output channel. norm says over what z is
    normalised: 'channel' at each pixel over the channels (default; the only one for which {0,1} and {-1,1} weights are
    the same network), 'spatial' over the pixels of each (example, channel), 'sample' over all values of an example.
    Zero padding only. Raises ValueError for an unknown norm, act or padding, alpha <= 0 or groups that do not divide the
    channels.
    """
    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True, *,
                 norm='channel', alpha=0.25, act=None, eps=1e-5):
        super().__init__()
        if norm not in ('channel', 'spatial', 'sample'):
            raise ValueError(f"BinaryConv2d: norm={norm!r} must be 'channel', 'spatial' or 'sample'")
        self._geometry(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, act)
        self.norm, self.eps = norm, eps
        nn.init.xavier_uniform_(self.weight)
        self._init_alpha(alpha, (out_channels,))

    def _quantize(self, weight, bias, dtype):
        # Only a mean over the channels removes the common term that subtracting 1/2 from every weight adds, and with
        # groups it is no longer common: each group sums other inputs.
        offset = 0.5 if self.norm == 'channel' and self.conv['groups'] == 1 else 0.0
        if self.packed:
            return self._weights(dtype, offset)
        return tuple(None if p is None else half_bits(p, 1, dtype, offset) for p in (weight, bias))


class TernaryConv2d(_Conv, LowBit, nn.Module):
    """Ternary convolution: codes round(clip(W / s, -1, 1)) times s = mean|W| of the tensor, as TernaryLinear has them (arXiv
    2402.17764), on inputs rounded to int8 by the largest of each example. No RMSNorm inside: at one pixel of a photograph
    it would leave the hue and take the brightness. Raises ValueError as BinaryConv2d.
    """
    kind, bits, round_input = 'tern', 2, True

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=False, *,
                 act=None):
        super().__init__()
        self._geometry(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, act)
        nn.init.kaiming_normal_(self.weight, nonlinearity='relu')

    def ternary(self):
        if self.packed:
            codes = unpack_bits(self.code, 2, math.prod(self.shape[1:])).to(torch.int8).sub_(1)
            return codes.view(self.shape), self.weight_scale
        return ternarize(self.weight.detach())

    def _quantize(self, weight, bias, dtype):
        codes, scale = self.ternary()
        return (codes * scale).to(dtype), None if bias is None else bias.to(dtype)

    def encode(self):
        codes, scale = self.ternary()
        return {'code': pack_bits(codes.flatten(1) + 1, 2), 'weight_scale': scale}

    def effective_weight(self):
        codes, scale = self.ternary()
        return codes * scale

    def decode(self):
        weight = self.effective_weight()            # so that mean|W| is the scale again, whatever the share of zeros
        return weight / weight.ne(0).float().mean().clamp_(min=1e-9), None


class Conv4bit(_Conv, FourBit, nn.Module):
    """Convolution with 4-bit weights; format, group and scales as in Linear4bit, over the weight flattened as (out, in, h, w).
    Raises ValueError as Linear4bit and BinaryConv2d."""
    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True, *,
                 format='uniform', group=0, scales='', act=None):
        super().__init__()
        self._set_format(format, group, scales)
        self._geometry(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, act)
        nn.init.kaiming_normal_(self.weight, nonlinearity='relu')


def conv2d(kind, *shape, act=None, **options):
    """A convolution of one of layers.KINDS. Raises ValueError for an unknown kind, or act with fp."""
    made = {'bin': BinaryConv2d, 'tern': TernaryConv2d, 'int4': Conv4bit}
    if kind == 'fp' and act is None:
        return nn.Conv2d(*shape, **options)
    if kind not in made:
        raise ValueError(f'kind={kind!r} must be fp (without act) or one of {list(made)}')
    return made[kind](*shape, act=act, **options)
