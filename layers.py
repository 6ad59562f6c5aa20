"""
Layers whose weights take 1, 1.58 or 4 bits, for training and packed for keeping.

    kind   class            weight used in the forward pass                         packed
    bin    BinaryLinear     {0,1} by `w > mean(w)`; the output is normalised        1 bit  + alpha
    tern   TernaryLinear    {-1,0,1} * mean|w|; the input is RMSNormed, then int8   2 bits + one scale
    int4   Int4Linear       16 levels between -absmax and absmax of each 16 weights 4 bits + fp16 per group
    fp     nn.Linear        as it is                                                32 bits

and BinaryConv2d, BinaryEmbedding. Each layer keeps latent full-precision weights while training and lets the gradient
pass straight through the rounding (dL/dw := dL/dw_q). `layer.pack_()` drops the latent weights for packed codes; the
same forward arithmetic then runs on the unpacked codes, so packing changes no logit.

Straight-through training usually needs MORE memory than fp training, because autograd keeps the rounded weight and
every intermediate of the normalisation. Here the rounded weight is made again in the backward pass, the normalisation
is undone from its own output, the ternary layer keeps the int8 activations its weight gradient is made of, and
`act='gelu'` folds the activation in front of a layer into it, so that it is made again rather than kept.

Read in this order: quantizers and packing, autograd functions, modules, convert() and pack().
"""
import fnmatch
import json
import math
import os
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from common import atomic_write, checksum

# ---------------------------------------------------------------------------------------------------------------------
# quantizers: plain functions of tensors, each beside its inverse


def _wide(t):
    """t in at least fp32: statistics are never taken in bf16."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def binarize(w, chunks=1):
    """{0,1} as bool, same shape as w (out, ...) : w > mean(w), strictly, one mean per `chunks` equal slices of dim 0.

    arXiv 2509.07025 eq. 1. The mean is taken in fp32. Worked by hand: [[1, 2], [3, 6]] has mean 3 -> [[0, 0], [0, 1]].
    """
    flat = _wide(w.reshape(chunks, -1))
    return (flat > flat.mean(1, keepdim=True)).view(w.shape)


def half_bits(w, chunks=1, dtype=None):
    """binarize(w) - 1/2, i.e. {-1/2, +1/2}, in `dtype` (default w's).

    Under a mean subtraction over the output features, W01 and W01 - 1/2 give the same result with the same standard
    deviation (they differ by sum(x)/2 in every feature), and the second does not lose small differences between
    features under a large common term. It is also sign(w - mean(w)) / 2, the weight of BitNet b1 (arXiv 2310.11453).
    """
    return binarize(w, chunks).to(dtype or w.dtype).sub_(0.5)


def ternarize(w, chunks=1, scale='mean'):
    """(codes, scales): codes int8 in {-1,0,1} of w's shape, scales fp32 (chunks,), so that w ~ codes * scale.

    scale = mean|w| (arXiv 2402.17764, Tips PDF) or median|w| (arXiv 2407.09527) of each of `chunks` slices of dim 0,
    at least 1e-5. Worked by hand: [[1, -2], [0.2, 4.8]] has mean|w| = 2 -> round(w / 2) = [[0, -1], [0, 1]].
    """
    flat = _wide(w.reshape(chunks, -1))
    s = flat.abs()
    s = (s.median(1, keepdim=True).values if scale == 'median' else s.mean(1, keepdim=True)).clamp_(min=1e-5)
    return (flat / s).round_().clamp_(-1, 1).to(torch.int8).view(w.shape), s.flatten()


def quantize_rows(x):
    """(codes, scales): int8 absmax per row (token), codes of x's shape, scales fp32 (..., 1), x ~ codes * scale.

    scale = max|x| / 127 with max|x| at least 1e-5 (arXiv 2402.17764, Tips PDF: round(x * 127 / max), to [-128, 127]).
    """
    top = x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return (x * (127 / top)).round_().clamp_(-128, 127).to(torch.int8), top / 127


def quantize_int4(w, group=16):
    """(codes, absmax): uint8 codes 0..15 (padded flat length,), fp16 absmax (groups,) of each `group` flat weights.

    u = round((w + n) / (2 n) * 15) with n = absmax of the group, rounded to fp16 before it is used. Zero is not on the
    grid: the nearest levels are -n/15 and +n/15. An all-zero group gets n = the smallest fp16 (6e-8) instead of 0/0.
    """
    flat = F.pad(w.detach().reshape(-1).float(), (0, -w.numel() % group)).view(-1, group)
    n = flat.abs().amax(1, keepdim=True)
    i = n.view(torch.int32)             # to fp16's 11 bits, half to even, in integers: compilers drop half().float()
    n = ((i + 0xFFF + ((i >> 13) & 1)) & -0x2000).view(torch.float32)
    n = n.half().clamp(min=6e-8)
    u = ((flat / n.float() + 1) * 7.5).round_().clamp_(0, 15)        # fp16 n may lie just below the true absmax
    return u.to(torch.uint8).view(-1), n.view(-1)


def dequantize_int4(codes, absmax, shape, dtype=torch.float32):
    """Inverse of quantize_int4: u / 15 * 2n - n, as `dtype` of `shape`."""
    n = absmax.float().view(-1, 1)
    w = codes.view(absmax.numel(), -1).float().mul_(2 / 15).sub_(1).mul_(n)
    return w.view(-1)[:math.prod(shape)].view(shape).to(dtype)


def pack_bits(codes, bits):
    """uint8 (..., ceil(n * bits / 8)) from integer codes (..., n) in 0 .. 2**bits - 1, bits in 1, 2, 4.

    Little-endian in the byte, each row filled up with zeros to whole bytes. For 2 bits:
        byte j :  | c[4j+3] | c[4j+2] | c[4j+1] | c[4j] |     (most significant bits left)
    """
    per = 8 // bits
    c = F.pad(codes.to(torch.uint8), (0, -codes.shape[-1] % per)).unflatten(-1, (-1, per))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=c.device)
    return (c << shifts).sum(-1, dtype=torch.uint8)


def unpack_bits(packed, bits, n):
    """Inverse of pack_bits: uint8 codes (..., n)."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & (2 ** bits - 1)).flatten(-2)[..., :n]


# ---------------------------------------------------------------------------------------------------------------------
# autograd functions. Each keeps as little as the exact gradient allows.

ACTIVATIONS = {None: (lambda x: x, lambda g, x: g),
               'gelu': (F.gelu, torch.ops.aten.gelu_backward)}      # name: (forward, backward(grad, input))
TINY_ALPHA = 1e-6    # alpha is used no closer to 0 than this, so that the normalised value can be had back from y / alpha
TINY_VAR = 1e-30     # keeps 1/std finite on constant input; the eps of the formula is added to std, not to the variance


class _StraightThrough(torch.autograd.Function):
    """q in the forward pass, identity to w in the backward pass. (w + (q - w) would round q in its last digits.)"""
    @staticmethod
    def forward(ctx, w, q):
        return q

    @staticmethod
    def backward(ctx, g):
        return g, None


def _blocks(x, wanted=True):
    """Slices of the rows of x. On the CPU some rows at a time, so that what is made on the way stays in the cache
    and never takes the memory of a whole activation; elsewhere, and under torch.compile, which fuse by themselves, one."""
    rows = len(x) if not wanted or x.device.type != 'cpu' or torch.compiler.is_compiling() else 1024
    return [slice(i, i + rows) for i in range(0, len(x), rows)] if len(x) > rows else [slice(None)]


def _normalize(z, alpha, ndim, eps):
    """(y, rstd): y = alpha * (z - mean) / (std + eps) over the last `ndim` dimensions, population std; rstd = 1 / std."""
    u, _, rstd = torch.native_layer_norm(_wide(z), z.shape[-ndim:], None, None, TINY_VAR)
    return u.mul_(alpha / (1 + eps * rstd)), rstd                           # 1/(std + eps) = rstd / (1 + eps rstd)


def _normalize_backward(g, y, rstd, alpha, ndim, eps):
    """(dz, dalpha) from dy and y itself, which the next operation mostly keeps anyway: z need not be kept.

    With u = y / alpha and g' = alpha * dy:  dz = (g' - mean(g') - u mean(g' u) (std + eps) / std) / (std + eps).
    """
    g, u = _wide(g), _wide(y) / alpha
    slack = 1 + eps * rstd                                                  # (std + eps) / std
    root = slack.sqrt()                                                     # shared between the two u's of the formula
    dz = torch.ops.aten.native_layer_norm_backward(g * alpha, u, u.shape[-ndim:], torch.zeros_like(rstd), root, None, None,
                                                   [True, False, False])[0].mul_(rstd / (slack * root))
    return dz, (g * u).sum_to_size(alpha.shape)


def _away_from_zero(alpha):
    return torch.where(alpha.abs() < TINY_ALPHA, TINY_ALPHA, alpha)


class _Normalize(torch.autograd.Function):
    """_normalize as a layer, for what is not a linear layer. Keeps y and rstd. alpha broadcasts to z, without its dim 0."""
    @staticmethod
    def forward(ctx, z, alpha, ndim, eps):
        alpha = _away_from_zero(alpha)
        y, rstd = torch.empty_like(z), torch.empty(*z.shape[:-ndim], *[1] * ndim, dtype=_wide(z[:0]).dtype, device=z.device)
        for rows in _blocks(z):
            y[rows], rstd[rows] = _normalize(z[rows], alpha, ndim, eps)
        ctx.save_for_backward(y, rstd, alpha)
        ctx.ndim, ctx.eps = ndim, eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        y, rstd, alpha = ctx.saved_tensors
        dz, galpha = torch.empty_like(y), torch.zeros_like(alpha, dtype=rstd.dtype)
        for rows in _blocks(y):
            dz[rows], part = _normalize_backward(g[rows], y[rows], rstd[rows], alpha, ctx.ndim, ctx.eps)
            galpha += part
        return dz, galpha.to(alpha.dtype), None, None


class _QuantizedLinear(torch.autograd.Function):
    """y (N, out) = act(x) (N, in) @ wq.T + bq, and _normalize of that when alpha (chunks, 1 or out / chunks) is given.

    `wq, bq = quantize(w, b, dtype)`. Keeps x, w, b and, with alpha, y and 1 / std; wq and act(x) are made again.
    """
    @staticmethod
    def forward(ctx, x, w, b, alpha, quantize, act, eps):
        wq, bq = quantize(w, b, x.dtype)
        y, rstd, blocks = None, None, _blocks(x, alpha is not None or act is not None)
        if alpha is not None:
            alpha = _away_from_zero(alpha)
            rstd = torch.empty(len(x), len(alpha), 1, dtype=_wide(x[:0]).dtype, device=x.device)
        for rows in blocks:
            z = F.linear(ACTIVATIONS[act][0](x[rows]), wq, bq)
            if alpha is not None:
                z, rstd[rows] = _normalize(z.unflatten(-1, (len(alpha), -1)), alpha, 1, eps)
                z = z.flatten(1)
            if len(blocks) == 1:
                y = z.to(x.dtype)
            else:
                y = x.new_empty(len(x), len(wq)) if y is None else y
                y[rows] = z
        ctx.save_for_backward(x, w, b, alpha, rstd, None if alpha is None else y)
        ctx.quantize, ctx.act, ctx.eps = quantize, act, eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, w, b, alpha, rstd, y = ctx.saved_tensors
        forward, backward = ACTIVATIONS[ctx.act]
        wide = _wide(g[:0]).dtype
        wq, _ = ctx.quantize(w, b, x.dtype)
        gx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        gw, gb, galpha = (torch.zeros_like(t, dtype=wide) if need and t is not None else None
                          for t, need in zip((w, b, alpha), ctx.needs_input_grad[1:4], strict=True))
        for rows in _blocks(x, alpha is not None or ctx.act is not None):
            dz = g[rows]
            if alpha is not None:
                dz, part = _normalize_backward(*(t.unflatten(-1, (len(alpha), -1)) for t in (dz, y[rows])), rstd[rows], alpha,
                                               1, ctx.eps)
                dz = dz.flatten(1).to(x.dtype)
                if galpha is not None:
                    galpha += part
            if gb is not None:
                gb += dz.sum(0, dtype=wide)
            if gw is not None:
                _add_product(gw, dz, forward(x[rows]))
            if gx is not None:
                gx[rows] = backward(dz @ wq, x[rows])                       # (rows, out) @ (out, in)
        gw, gb, galpha = (t if t is None else t.to(p.dtype) for t, p in ((gw, w), (gb, b), (galpha, alpha)))
        return gx, gw, gb, galpha, None, None, None


def _add_product(total, g, x):
    """total (out, in) += g (rows, out).T @ x (rows, in), without a temporary where the dtypes allow."""
    if total.dtype == g.dtype:
        total.addmm_(g.T, x)
    else:
        total += g.T @ x


# Without the int8 dot-product instructions torch._int_mm can be slower than the float product by far. Asked once, here:
# torch.compile cannot trace the question.
FAST_INT8_CPU = getattr(torch.cpu, '_is_vnni_supported', lambda: False)()


def _has_fast_int8(device):
    return device.type == 'cpu' and FAST_INT8_CPU


class _TernaryLinear(torch.autograd.Function):
    """y (N, out) = int8(gain * RMSNorm(act(x))) @ ternary(w).T * scales + b.

    Keeps x, the int8 codes of the normalised input and per-token scalars: dL/dw = dy.T @ (codes * scale) exactly.
    `codes, scales = weights(w)` gives the ternary weight. norm=False: x is normalised already.
    The product of the codes is exact in int32, and in fp32 too as long as |sum| <= 128 * in < 2**24; under autocast it is
    rounded to bf16 like any other product there.
    """
    @staticmethod
    def forward(ctx, x, w, b, gain, weights, norm, eps, act, dtype):
        q = torch.empty_like(x, dtype=torch.int8)                           # (N, in)
        sx = _wide(x[:, :1]).new_empty(len(x), 1)
        rstd = torch.empty_like(sx) if norm else None
        for rows in _blocks(x):
            a = _wide(ACTIVATIONS[act][0](x[rows]))
            if norm:
                rstd[rows] = (torch.linalg.vector_norm(a, dim=-1, keepdim=True).square() / a.shape[-1] + eps).rsqrt()
                a = a * rstd[rows] if gain is None else (a * rstd[rows]).mul_(gain)
            q[rows], sx[rows] = quantize_rows(a)
        t, sw = weights(w)                                                  # (out, in) int8, (chunks,)
        if _has_fast_int8(q.device) and min(*q.shape, len(t)) > 1:          # size-1 strides: pytorch/pytorch#195066
            z, sx_z = torch._int_mm(q, t.T), sx                             # int32 (N, out)
        else:
            shrink = 2 ** -10 if dtype == torch.float16 else 1              # fp16 ends at 65504; the sums need not
            z, sx_z = F.linear(q.to(dtype) * shrink, t.to(dtype)), sx / shrink
        y = (z.unflatten(-1, (len(sw), -1)) * (sx_z * sw).unsqueeze(-1)).flatten(-2)
        if b is not None:
            y += b
        ctx.save_for_backward(x if norm or act else None, w, gain, q, sx, rstd)
        ctx.weights, ctx.act, ctx.x_dtype = weights, act, x.dtype
        return y.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, w, gain, q, sx, rstd = ctx.saved_tensors
        forward, backward = ACTIVATIONS[ctx.act]
        need_w, need_x = ctx.needs_input_grad[1], ctx.needs_input_grad[0] or ctx.needs_input_grad[3]
        gb = g.sum(0, dtype=torch.promote_types(g.dtype, torch.float32)) if ctx.needs_input_grad[2] else None
        gx = torch.empty_like(q, dtype=ctx.x_dtype) if need_x else None
        gw = torch.zeros_like(w, dtype=sx.dtype) if need_w else None
        ggain = None if gain is None else torch.zeros_like(gain, dtype=sx.dtype)
        if need_x:
            t, sw = ctx.weights(w)
            wq = (t.view(len(sw), -1) * sw[:, None]).view(t.shape).to(g.dtype)
        for rows in _blocks(q):
            if need_w:
                _add_product(gw, g[rows], (q[rows] * sx[rows]).to(g.dtype))
            if need_x:
                h = _wide(g[rows] @ wq)                                     # gradient at the quantizer = at its input
                if rstd is not None:                                        # RMSNorm: n = gain * u, u = a * rstd
                    u = _wide(forward(x[rows])) * rstd[rows]
                    p = h * u
                    if gain is None:
                        along = p.sum(-1, keepdim=True)
                    else:
                        ggain += p.sum(0)
                        along = (p @ gain.to(p.dtype)).unsqueeze(-1)
                        h.mul_(gain)
                    h.addcmul_(u, along, value=-1 / u.shape[-1]).mul_(rstd[rows])   # (h - u mean(u h)) * rstd
                gx[rows] = h if ctx.act is None else backward(h.to(ctx.x_dtype), x[rows])
        gw = gw.to(w.dtype) if need_w else None
        return gx, gw, gb, ggain if gain is None else ggain.to(gain.dtype), None, None, None, None, None


# ---------------------------------------------------------------------------------------------------------------------
# modules


def _compute_dtype(x):
    """What a matmul of x would run in: autocast's dtype inside autocast, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class LowBit:
    """What the low-bit modules share: latent `weight` (and `bias`) Parameters or, after pack_(), uint8 codes.

    A subclass gives `kind`, `bits`, `encode()` -> dict of buffers that hold the quantized weight, its inverse `decode()` ->
    (weight, bias or None) and a forward() for both states.
    """
    packed = False

    def pack_(self):
        """Replace the latent weights by their codes (buffers `code`, ...), in place. Not trainable from here on."""
        if not self.packed:
            with torch.no_grad():
                buffers = self.encode()
            bias = getattr(self, 'bias', None)
            del self.weight
            if bias is not None and 'packed_bias' in buffers:
                del self.bias
                self.bias = None
            self.weight = None
            for name, value in buffers.items():
                self.register_buffer(name, value)
            for p in self.parameters(recurse=False):
                p.requires_grad_(False)
            self.packed = True
        return self

    def unpack_(self):
        """Back to a trainable layer whose weights are the quantized ones (the latent values are gone for good)."""
        if self.packed:
            with torch.no_grad():
                weight, bias = self.decode()
            for name in [n for n, _ in self.named_buffers(recurse=False)]:
                delattr(self, name)
            self.weight = nn.Parameter(weight)
            if bias is not None:
                self.bias = nn.Parameter(bias)
            for p in self.parameters(recurse=False):
                p.requires_grad_(True)
            self.packed = False
        return self

    def packed_bytes(self):
        """Bytes of this layer when packed: codes, scales and whatever it keeps in full precision."""
        with torch.no_grad():
            held = dict(self.named_buffers(recurse=False)) if self.packed else self.encode()
        dropped = {'weight'} | ({'bias'} if 'packed_bias' in held else set())
        kept = [p for n, p in self.named_parameters(recurse=False) if n not in dropped]
        return sum(t.numel() * t.element_size() for t in [*held.values(), *kept])


class _Binary(LowBit):
    """Bits of weight and bias for the three binary modules; `chunks` slices of dim 0 have their own mean each."""
    kind, bits, chunks = 'bin', 1, 1

    def _init_alpha(self, alpha, shape):
        if not alpha > 0:
            raise ValueError(f'alpha must start above 0, got {alpha}')
        self.alpha = nn.Parameter(torch.full(shape, float(alpha)))

    def encode(self):
        held = {'code': pack_bits(binarize(self.weight, self.chunks).flatten(1), 1)}
        if self.bias is not None:
            held['packed_bias'] = pack_bits(binarize(self.bias, self.chunks), 1)
        return held

    def decode(self):
        weight = self._bits('code', math.prod(self.shape[1:]), torch.float32, 0.5).view(self.shape)
        bias = self._bits('packed_bias', self.shape[0], torch.float32, 0.5) if hasattr(self, 'packed_bias') else None
        return weight, bias

    def _bits(self, name, n, dtype, offset):
        return unpack_bits(getattr(self, name), 1, n).to(dtype).sub_(offset)

    def _weights(self, dtype, offset=0.5):
        """Quantized (weight, bias) minus `offset`, differentiable straight through when not packed."""
        if self.packed:
            weight = self._bits('code', math.prod(self.shape[1:]), dtype, offset).view(self.shape)
            return weight, self._bits('packed_bias', self.shape[0], dtype, offset) if hasattr(self, 'packed_bias') else None
        pair = [None if p is None else _StraightThrough.apply(p, binarize(p, self.chunks).to(dtype).sub_(offset))
                for p in (self.weight, self.bias)]
        return pair


class BinaryLinear(_Binary, nn.Module):
    """Binary normalised linear layer (arXiv 2509.07025, alg. 1-2), (..., in) -> (..., out) in the compute dtype.

        z = W01 x + b01,  W01 = W > mean(W),  b01 = b > mean(b);   y = alpha * (z - mean(z)) / (std(z) + eps)

    mean and population std over the output features of each token; alpha is learnable (the paper has none; the
    learnable scale is from the reproduction by Dao et al.) and starts at `alpha`: one per layer (`alpha_per='layer'`)
    or one per output feature ('channel'). Computed with W01 - 1/2 (see half_bits). b starts at 0, i.e. all bits 0.

    chunks=3 treats the weight as 3 stacked matrices, each with its own mean, normalisation and alpha: a fused q, k, v
    projection equal to three BinaryLinear layers. act='gelu' applies the activation to x first, and keeps only x.
    Raises ValueError for chunks that do not divide `out`, an unknown act, or alpha <= 0.

    Worked by hand, 2 x 2, no bias, alpha 1: W = [[.1, .7], [.4, .0]] has mean .3, W01 = [[0, 1], [1, 0]];
    x = [3, 5] -> z = [5, 3], mean 4, std 1 -> y = [1, -1] / (1 + 1e-5).
    """
    def __init__(self, in_features, out_features, bias=True, *, chunks=1, alpha=0.25, alpha_per='layer', act=None,
                 eps=1e-5):
        super().__init__()
        if out_features % chunks or alpha_per not in ('layer', 'channel') or act not in ACTIVATIONS:
            raise ValueError(f'BinaryLinear({in_features}, {out_features}): chunks={chunks} must divide out_features, '
                             f"alpha_per={alpha_per!r} be 'layer' or 'channel', act={act!r} in {list(ACTIVATIONS)}")
        self.in_features, self.out_features, self.shape = in_features, out_features, (out_features, in_features)
        self.chunks, self.act, self.eps = chunks, act, eps
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        nn.init.xavier_uniform_(self.weight)
        self._init_alpha(alpha, (chunks, 1 if alpha_per == 'layer' else out_features // chunks))

    def _quantize(self, weight, bias, dtype):
        if self.packed:
            return self._weights(dtype)
        return half_bits(weight, self.chunks, dtype), None if bias is None else half_bits(bias, self.chunks, dtype)

    def forward(self, x):
        flat = x.reshape(-1, self.in_features).to(_compute_dtype(x))
        y = _QuantizedLinear.apply(flat, self.weight, self.bias, self.alpha, self._quantize, self.act, self.eps)
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self):
        return f'{self.in_features}, {self.out_features}, chunks={self.chunks}, act={self.act}, packed={self.packed}'


class BinaryConv2d(_Binary, nn.Module):
    """Binary normalised convolution (arXiv 2509.07025, alg. 3), (N, C, H, W) -> (N, out, H', W').

    As BinaryLinear with a convolution for the product; alpha is one per output channel. norm says over what z is
    normalised: 'channel' at each pixel over the channels (default; the only one for which {0,1} and {-1,1} weights are
    the same network), 'spatial' over the pixels of each (example, channel), 'sample' over all values of an example.
    Zero padding only. Raises ValueError for an unknown norm or groups that do not divide the channels.
    """
    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True, *,
                 norm='channel', alpha=0.25, eps=1e-5):
        super().__init__()
        if norm not in ('channel', 'spatial', 'sample'):
            raise ValueError(f"BinaryConv2d: norm={norm!r} must be 'channel', 'spatial' or 'sample'")
        if in_channels % groups or out_channels % groups:
            raise ValueError(f'BinaryConv2d: groups={groups} must divide {in_channels} and {out_channels} channels')
        size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        self.shape = (out_channels, in_channels // groups, *size)
        self.conv = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
        self.norm, self.eps = norm, eps
        self.weight = nn.Parameter(torch.empty(self.shape))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        nn.init.xavier_uniform_(self.weight)
        self._init_alpha(alpha, (out_channels,))

    def forward(self, x):
        dtype = _compute_dtype(x)
        # Only a mean over the channels removes the common term that subtracting 1/2 from every weight adds, and with
        # groups it is no longer common: each group sums other inputs.
        offset = 0.5 if self.norm == 'channel' and self.conv['groups'] == 1 else 0.0
        z = F.conv2d(x.to(dtype), *self._weights(dtype, offset), **self.conv)
        if self.norm == 'channel':
            y = _Normalize.apply(z.permute(0, 2, 3, 1).contiguous(), self.alpha, 1, self.eps)
            return y.permute(0, 3, 1, 2)
        y = _Normalize.apply(z.flatten(2), self.alpha[:, None], 1 if self.norm == 'spatial' else 2, self.eps)
        return y.view(z.shape)

    def extra_repr(self):
        return f'{self.shape}, {self.conv}, norm={self.norm}, packed={self.packed}'


class BinaryEmbedding(_Binary, nn.Module):
    """Binary normalised embedding (arXiv 2509.07025, alg. 4), ids (...) int -> (..., dim).

    The row of bits of each id plus the bits of a bias, normalised over dim and scaled by alpha (one per layer). Only
    the rows looked up are rounded; the mean is over the whole table.
    """
    def __init__(self, num_embeddings, embedding_dim, bias=True, *, alpha=0.25, eps=1e-5):
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.shape = num_embeddings, embedding_dim, (num_embeddings, embedding_dim)
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim))
        self.bias = nn.Parameter(torch.zeros(embedding_dim)) if bias else None
        nn.init.xavier_uniform_(self.weight)
        self._init_alpha(alpha, (1,))

    def forward(self, ids):
        if self.packed:
            e = unpack_bits(F.embedding(ids, self.code), 1, self.embedding_dim).to(self.alpha.dtype) - 0.5
            if hasattr(self, 'packed_bias'):
                e = e + self._bits('packed_bias', self.embedding_dim, e.dtype, 0.5)
        else:
            rows = F.embedding(ids, self.weight)
            e = _StraightThrough.apply(rows, (_wide(rows) > _wide(self.weight).mean()).to(rows.dtype) - 0.5)
            if self.bias is not None:
                e = e + _StraightThrough.apply(self.bias, half_bits(self.bias))
        return _Normalize.apply(e, self.alpha, 1, self.eps)

    def decode(self):
        weight = self._bits('code', self.embedding_dim, torch.float32, 0.5)
        bias = self._bits('packed_bias', self.embedding_dim, torch.float32, 0.5) if hasattr(self, 'packed_bias') else None
        return weight, bias

    def extra_repr(self):
        return f'{self.num_embeddings}, {self.embedding_dim}, packed={self.packed}'


class TernaryLinear(LowBit, nn.Module):
    """BitNet b1.58 linear layer (arXiv 2402.17764 and its Tips PDF), (..., in) -> (..., out) in the compute dtype.

        xq = int8(RMSNorm(x)) absmax per token;   wq = round(clip(W / s, -1, 1)) * s, s = mean|W|;   y = xq wq^T + b

    The RMSNorm is inside (with a learnable gain), so the layer wants an input that is NOT normalised; norm=False for
    one that is, e.g. when several layers share an input. scale='mean'|'median'; chunks and act as in BinaryLinear: one
    scale per chunk. Raises ValueError for chunks that do not divide `out`, an unknown scale or act, or in > 131071
    (the fp32 product of the codes would no longer be exact).
    """
    kind, bits = 'tern', 2

    def __init__(self, in_features, out_features, bias=False, *, chunks=1, scale='mean', norm=True, act=None, eps=1e-5):
        super().__init__()
        if out_features % chunks or scale not in ('mean', 'median') or act not in ACTIVATIONS or in_features >= 2 ** 17:
            raise ValueError(f'TernaryLinear({in_features}, {out_features}): chunks={chunks} must divide out_features, '
                             f"scale={scale!r} be 'mean' or 'median', act={act!r} in {list(ACTIVATIONS)}, in < 131072")
        self.in_features, self.out_features, self.shape = in_features, out_features, (out_features, in_features)
        self.chunks, self.scale, self.norm, self.act, self.eps = chunks, scale, norm, act, eps
        self.weight = nn.Parameter(torch.empty(out_features, in_features).normal_(std=in_features ** -0.5))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.gain = nn.Parameter(torch.ones(in_features)) if norm else None

    def _ternary(self, _=None):
        if self.packed:
            return unpack_bits(self.code, 2, self.in_features).to(torch.int8).sub_(1), self.weight_scale
        return ternarize(self.weight.detach(), self.chunks, self.scale)

    def encode(self):
        codes, scales = self._ternary()
        return {'code': pack_bits(codes + 1, 2), 'weight_scale': scales}

    def decode(self):
        # A latent of code * scale / share has mean|W| = scale again when `share` of the codes are not 0.
        codes, scales = self._ternary()
        flat = codes.view(self.chunks, -1).float()
        share = flat.abs().mean(1, keepdim=True).clamp_(min=1e-9) if self.scale == 'mean' else 1
        return (flat * scales[:, None] / share).view(self.shape), None

    def forward(self, x):
        weights = self._ternary if self.packed else partial(ternarize, chunks=self.chunks, scale=self.scale)
        y = _TernaryLinear.apply(x.reshape(-1, self.in_features), self.weight, self.bias, self.gain, weights, self.norm,
                                 self.eps, self.act, _compute_dtype(x))
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self):
        return (f'{self.in_features}, {self.out_features}, chunks={self.chunks}, scale={self.scale}, norm={self.norm}, '
                f'act={self.act}, packed={self.packed}')


class Int4Linear(LowBit, nn.Module):
    """Linear layer trained through 4-bit weights (fake quantization), (..., in) -> (..., out) in the compute dtype.

    Uniform 16 levels per `group` weights, flattened, with an fp16 absmax (see quantize_int4); the bias stays as it is.
    """
    kind, bits = 'int4', 4

    def __init__(self, in_features, out_features, bias=True, *, group=16, act=None):
        super().__init__()
        if act not in ACTIVATIONS or group < 2 or group % 2:
            raise ValueError(f'Int4Linear: act={act!r} must be in {list(ACTIVATIONS)}, group={group} even')
        self.in_features, self.out_features, self.shape = in_features, out_features, (out_features, in_features)
        self.group, self.act = group, act
        self.weight = nn.Parameter(torch.empty(out_features, in_features).normal_(std=in_features ** -0.5))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def encode(self):
        codes, absmax = quantize_int4(self.weight, self.group)
        if not torch.isfinite(absmax).all():
            raise ValueError('Int4Linear: weights must be finite and at most 65504 (fp16) in size to be packed')
        return {'code': pack_bits(codes, 4), 'absmax': absmax}

    def decode(self):
        return dequantize_int4(unpack_bits(self.code, 4, self.absmax.numel() * self.group), self.absmax, self.shape), None

    def _quantize(self, weight, bias, dtype):
        if self.packed:
            weight = self.decode()[0].to(dtype)
        else:
            weight = dequantize_int4(*quantize_int4(weight, self.group), weight.shape, dtype)
        return weight, None if bias is None else bias.to(dtype)

    def forward(self, x):
        flat = x.reshape(-1, self.in_features).to(_compute_dtype(x))
        y = _QuantizedLinear.apply(flat, self.weight, self.bias, None, self._quantize, self.act, 0.0)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self):
        return f'{self.in_features}, {self.out_features}, group={self.group}, act={self.act}, packed={self.packed}'


# ---------------------------------------------------------------------------------------------------------------------
# one entry each: make a layer, convert a model, pack a model, keep it in a file

KINDS = ('fp', 'bin', 'tern', 'int4')


def linear(kind, in_features, out_features, bias=True, *, chunks=1, act=None, **options):
    """A linear layer of one of KINDS. Options a kind has no use for are dropped only where they change nothing:
    chunks for fp and int4, which have no per-matrix statistics. Raises ValueError for an unknown kind, or act with fp.
    """
    if kind == 'bin':
        return BinaryLinear(in_features, out_features, bias, chunks=chunks, act=act, **options)
    if kind == 'tern':
        return TernaryLinear(in_features, out_features, bias, chunks=chunks, act=act, **options)
    if kind == 'int4':
        return Int4Linear(in_features, out_features, bias, act=act, **options)
    if kind == 'fp' and act is None and not options:
        return nn.Linear(in_features, out_features, bias)
    raise ValueError(f'kind={kind!r} must be one of {KINDS}; fp takes no act or options (got act={act!r}, {options})')


def _converted(module, kind, options):
    bias = getattr(module, 'bias', None) is not None
    if isinstance(module, nn.Linear):
        return linear(kind, module.in_features, module.out_features, bias, **options)
    if isinstance(module, nn.Conv2d) and kind == 'bin' and module.padding_mode == 'zeros':
        m = module
        return BinaryConv2d(m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, m.dilation, m.groups, bias,
                            **options)
    if isinstance(module, nn.Embedding) and kind == 'bin' and module.max_norm is module.padding_idx is None:
        return BinaryEmbedding(module.num_embeddings, module.embedding_dim, bias=True, **options)
    return None


def convert(model, rules, verbose=True):
    """Replace nn.Linear, nn.Conv2d and nn.Embedding modules in place, weights and biases copied; returns their names.

    rules: {glob over module names: kind or (kind, options)}, the first match decides, e.g.
    {'lm_head': 'fp', 'blocks.*.mlp.*': 'tern', '*': ('bin', dict(alpha=0.5))}. Prints what it converted and what it left
    and why. Raises ValueError for a pattern that matches nothing or an unknown kind.
    """
    rules = {pattern: (rule, {}) if isinstance(rule, str) else rule for pattern, rule in rules.items()}
    candidates = {n: m for n, m in model.named_modules(remove_duplicate=False)
                  if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding)}
    if '' in candidates:
        raise ValueError('convert: a bare layer cannot be replaced in place; wrap it in nn.Sequential or use linear()')
    uses = {}
    for m in candidates.values():
        uses[id(m.weight)] = uses.get(id(m.weight), 0) + 1
    for pattern, (kind, _) in rules.items():
        if kind not in KINDS:
            raise ValueError(f'convert: kind {kind!r} of rule {pattern!r} must be one of {KINDS}')
        if not fnmatch.filter(candidates, pattern):
            raise ValueError(f'convert: rule {pattern!r} matches none of {list(candidates)}')
    converted, left = {}, {}
    for name, module in candidates.items():
        kind, options = next((rules[p] for p in rules if fnmatch.fnmatchcase(name, p)), ('fp', {}))
        if kind == 'fp':
            left[name] = 'fp by rule or no rule'
        elif uses[id(module.weight)] > 1:
            left[name] = 'its weight is tied to another module'
        elif (new := _converted(module, kind, options)) is None:
            left[name] = f'no {kind} form of {type(module).__name__}'
        else:
            new.to(module.weight.device, module.weight.dtype).train(module.training)
            with torch.no_grad():
                new.weight.copy_(module.weight)
                if getattr(module, 'bias', None) is not None:
                    new.bias.copy_(module.bias)
            parent, _, leaf = name.rpartition('.')
            setattr(model.get_submodule(parent), leaf, new)
            converted[name] = kind
    for module in model.modules():                  # low-bit layers need their output in the backward pass
        if converted and getattr(module, 'inplace', False):
            module.inplace = False
    if verbose:
        for name, kind in converted.items():
            print(f'convert: {name} -> {kind}')
        for name, why in left.items():
            print(f'convert: {name} left ({why})')
    return list(converted)


def pack(model):
    """pack_() every low-bit layer of the model, in place; returns the model."""
    for module in model.modules():
        if isinstance(module, LowBit):
            module.pack_()
    return model


def _parameters_once(model):
    """{name: tensor} of the state_dict with tied weights under their first name only."""
    seen, unique = set(), {}
    for name, t in model.state_dict(keep_vars=True).items():
        if id(t) not in seen:
            seen.add(id(t))
            unique[name] = t.detach()
    return unique


def model_bytes(model):
    """(packed, fp32) bytes of all parameters: low-bit layers packed and the rest in their dtype; everything in fp32."""
    low = [m for m in model.modules() if isinstance(m, LowBit)]
    inside = {id(p) for m in low for p in m.parameters(recurse=False)}
    rest = [p for p in model.parameters() if id(p) not in inside]
    latent = sum(math.prod(m.shape) for m in low if m.packed)           # and the biases that are bits now
    latent += sum(m.shape[isinstance(m, BinaryEmbedding)] for m in low if hasattr(m, 'packed_bias'))
    return (sum(m.packed_bytes() for m in low) + sum(p.numel() * p.element_size() for p in rest),
            4 * (sum(p.numel() for p in model.parameters()) + latent))


def save_packed(model, path, meta):
    """Pack the model in place and write it as one safetensors file, `meta` (plain types) as JSON in its header.

    Returns the size of the file in bytes. The file is whole or absent: written beside and renamed.
    """
    from safetensors.torch import save_file
    tensors = {name: t.contiguous().cpu() for name, t in _parameters_once(pack(model)).items()}
    meta = dict(meta, checksum=_checksum(tensors))      # safetensors has none of its own
    atomic_write(path, lambda tmp: save_file(tensors, tmp, {'nanobit': json.dumps(meta)}))
    return os.path.getsize(path)


def read_packed(path):
    """(meta, tensors) of a file of save_packed. Raises ValueError naming the file when it is not one."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, 'pt') as f:
            meta = json.loads((f.metadata() or {})['nanobit'])
            tensors = {name: f.get_tensor(name) for name in f.keys()}   # noqa: SIM118  not a dict
    except (OSError, SafetensorError, KeyError, ValueError) as e:
        raise ValueError(f'{path} is not a packed nanobit model ({type(e).__name__}: {e})') from e
    if not isinstance(meta, dict) or meta.get('checksum') != _checksum(tensors):
        raise ValueError(f'{path} is damaged: its tensors do not match their checksum')
    return meta, tensors


def _checksum(tensors):
    return checksum(tensors[name] for name in sorted(tensors))


def load_packed(model, tensors):
    """Put the tensors of read_packed into a freshly made model of the same shape, in place; returns it packed."""
    wanted = _parameters_once(pack(model))
    if wrong := sorted(wanted.keys() ^ tensors.keys()) or [n for n in wanted if wanted[n].shape != tensors[n].shape]:
        raise ValueError(f'packed file and model do not fit each other: {wrong[:4]}')
    for name, t in wanted.items():
        t.copy_(tensors[name])
    return model
