"""
Layers whose weights take 1, 1.58, 4, 8 or 16 bits: trained through the rounding, then packed to codes. LoRA over any of them.

    linear('bin', 256, 1024)                    creates a layer of one of FORMATS, the table at the end; conv2d() likewise
    convert(model, {'blocks.*': 'tern'})        replaces layers of a model by name
    ramp(model)                                 lets training start from full-precision weights and round them step by step
    pack(model)                                 replaces the latent weights by packed codes, in place

The formats of 8 bits and less keep latent full-precision weights during training. The gradient passes straight through the
rounding (dL/dw := dL/dw_q). `layer.pack_()` replaces the latent weights by packed codes. The forward pass then uses the
unpacked codes, so the logits stay the same.

Straight-through training usually needs MORE memory than full-precision training: autograd saves the rounded weight and every
intermediate of the normalization. These layers save fewer: the backward pass recomputes the rounded weight and needs only the
output of the normalization. The ternary layer saves int8 activations for its weight gradient; under torch.compile it
computes them again. With `act='gelu'` a layer applies the activation itself and recomputes it in the backward pass. A frozen
layer saves nothing for its backward pass. Except under torch.compile, it decodes one block of rows at a time.

This file has four parts: products with their gradients, base classes, modules, and linear(), convert() and pack(). To use it
elsewhere, copy it together with quant.py, kernels.c and kernels_triton.py; quant.py converts weights to codes.
"""
import copy
import fnmatch
import math
import os
from collections import Counter
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

import kernels_triton
from quant import (AS_ON_GPU, FORMATS4, SCALES4, absmax_rows, binarize, decode4, half_bits, levels4, on_cpu, pack4, pack_bits,
                   product4, quantize4, quantize_rows, scales4, ternarize, unpack_bits, wide)

# ---------------------------------------------------------------------------------------------------------------------
# products with their gradients: autograd functions that save as little as the exact gradient allows
#
#     straight_through(w, q)                        returns q; the gradient passes to w unchanged
#     normalize(z, alpha, eps)                      alpha * (z - mean) / (std + eps); the backward pass needs only the output
#     quantized_linear(x, w, b, alpha, ...)         a product with a rounded weight, recomputed in the backward pass
#     quantized_conv(x, w, b, alpha, ...)           the same for a convolution
#     ternary_linear(x, w, b, gain, ...)            RMSNorm, int8 activations, ternary weights
#     frozen_linear(x, b, decoder, ...)             a product with a decoded weight, block by block; saves nothing

TINY_ALPHA = 1e-6    # lower bound of |alpha|, because the backward pass divides y by alpha
TINY_VAR = 1e-30     # keeps 1/std finite on constant input; the eps of the formula is added to std, not to the variance


def compute_dtype(x):
    """The dtype of a matmul with x: autocast's dtype inside autocast, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _relu2_glu(x):
    gate, up = x.chunk(2, -1)
    return F.relu(gate).square() * up


def _relu2_glu_backward(g, x):
    gate, up = x.chunk(2, -1)
    gate = F.relu(gate)
    return torch.cat([g * up * gate * 2, g * gate.square()], -1)


def _silu_glu(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def _silu_glu_backward(g, x):
    gate, up = x.chunk(2, -1)
    return torch.cat([torch.ops.aten.silu_backward(g * up, gate), g * F.silu(gate)], -1)


# name: (forward, backward(grad, input))
ACTIVATIONS = {None: (lambda x: x, lambda g, x: g),
               'relu': (F.relu, lambda g, x: torch.ops.aten.threshold_backward(g, x, 0)),
               'gelu': (F.gelu, torch.ops.aten.gelu_backward)}
# Gated activations take a gate and a value side by side: (..., 2 n) -> (..., n)
GATED = {'relu2_glu': (_relu2_glu, _relu2_glu_backward), 'silu_glu': (_silu_glu, _silu_glu_backward)}
EVERY_ACTIVATION = ACTIVATIONS | GATED


def _later(tensor, g):
    """`tensor` (floating point), for use in a backward pass. Eager: itself. torch.compile moves what depends only on saved
    tensors into the forward pass and may save the result. A fake dependence on the gradient keeps it in the backward pass; the
    operation is fused. If the gradient starts with a NaN, all elements become NaN."""
    if tensor is None or not torch.compiler.is_compiling():
        return tensor
    return torch.where(g[(slice(1),) * g.dim()].isnan().any(), torch.nan, tensor)


def _again(quantize, w, b, dtype, g):
    """quantize(w, b, dtype) in a backward pass. w is None: a packed layer."""
    if w is not None:
        return quantize(_later(w, g), b, dtype)
    w, b = quantize(w, b, dtype)
    return _later(w, g), b


def _output(y):
    """y, as the forward pass of an autograd.Function must return it. torch.compile of torch 2.11 loses the gradient of a tensor
    that was changed in place (pytorch/pytorch#180642), but not that of a view of it."""
    return y.view_as(y) if torch.compiler.is_compiling() else y


class _StraightThrough(torch.autograd.Function):
    """Straight-through estimator: returns q and passes the gradient to w. (w + (q - w) would change the last digits of q.)"""
    @staticmethod
    def forward(ctx, w, q):
        return q

    @staticmethod
    def backward(ctx, g):
        return g, None


def _blocks(x, wanted=True):
    """Slices of the rows of x. On the CPU they are small, so that temporaries fit in the cache and stay below the size of an
    activation. A GPU and torch.compile fuse the operations, so there one slice covers all rows."""
    rows = (len(x) if not wanted or not on_cpu(x) or torch.compiler.is_compiling() else
            max(1024 if x.dim() == 2 else 1, 2 ** 18 // max(1, math.prod(x.shape[1:]))))  # matmuls are slow on few rows
    return [slice(i, i + rows) for i in range(0, len(x), rows)] if len(x) > rows else [slice(None)]


def _normalize(z, alpha, eps):
    """(y, rstd): y = alpha * (z - mean) / (std + eps) over the last dimension, population std; rstd = 1 / std."""
    u = wide(z)
    u = u - u[..., :1]                              # else 1/std amplifies the rounding error of the mean of equal inputs
    if not on_cpu(z):
        u, _, rstd = torch.native_layer_norm(u, z.shape[-1:], None, None, TINY_VAR)
        return u.mul_(alpha / (1 + eps * rstd)), rstd                       # 1/(std + eps) = rstd / (1 + eps rstd)
    u -= u.mean(-1, keepdim=True)                   # on the CPU layer_norm is slower than this, above all for short rows
    rstd = torch.linalg.vector_norm(u, dim=-1, keepdim=True).square_().div_(z.shape[-1]).add_(TINY_VAR).rsqrt_()
    return u.mul_(rstd / (1 + eps * rstd)).mul_(alpha), rstd


def _normalize_backward(g, y, rstd, alpha, eps):
    """Return (dz, dalpha) from dy and y. The next operation usually saves y anyway, so z need not be saved.

    With u = y / alpha and g' = alpha * dy:  dz = (g' - mean(g') - u mean(g' u) (std + eps) / std) / (std + eps).
    """
    g, u = wide(g), wide(y) / alpha
    slack = 1 + eps * rstd                                                  # (std + eps) / std
    root = slack.sqrt()                                                     # the formula has two factors u; each takes one root
    dz = torch.ops.aten.native_layer_norm_backward(g * alpha, u, u.shape[-1:], torch.zeros_like(rstd), root, None, None,
                                                   [True, False, False])[0].mul_(rstd / (slack * root))
    return dz, (g * u).sum_to_size(alpha.shape)


def _away_from_zero(alpha):
    return torch.where(alpha.abs() < TINY_ALPHA, TINY_ALPHA, alpha)


def _normalize_blocks(z, y, alpha, eps):
    """Write _normalize(z) to y block by block; y may be z itself. Returns rstd."""
    rstd = torch.empty(*z.shape[:-1], 1, dtype=wide(z[:0]).dtype, device=z.device)
    for rows in _blocks(z):
        y[rows], rstd[rows] = _normalize(z[rows], alpha, eps)
    return rstd


def _normalize_blocks_backward(g, y, rstd, alpha, eps):
    """_normalize_backward() block by block; dalpha is fp32."""
    dz, galpha = torch.empty_like(y), torch.zeros_like(alpha, dtype=rstd.dtype)
    for rows in _blocks(y):
        dz[rows], part = _normalize_backward(g[rows], y[rows], rstd[rows], alpha, eps)
        galpha += part
    return dz, galpha


class _Normalize(torch.autograd.Function):
    """_normalize() over the last dimension of z, for an embedding. alpha has shape (1,). Saves y and rstd."""
    @staticmethod
    def forward(ctx, z, alpha, eps):
        alpha, y = _away_from_zero(alpha), torch.empty_like(z)
        ctx.save_for_backward(y, _normalize_blocks(z, y, alpha, eps), alpha)
        ctx.eps = eps
        return _output(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        y, rstd, alpha = ctx.saved_tensors
        dz, galpha = _normalize_blocks_backward(g, y, rstd, alpha, ctx.eps)
        return dz, galpha.to(alpha.dtype), None


class _QuantizedLinear(torch.autograd.Function):
    """y (N, out) = act(x) (N, in) @ wq.T + bq. When alpha (chunks, 1) is given, _normalize() follows.

    `wq, bq = quantize(w, b, dtype)`. Saves x, w, b and, with alpha, y and 1 / std. Recomputes wq and act(x).
    """
    @staticmethod
    def forward(ctx, x, w, b, alpha, quantize, act, eps):
        wq, bq = quantize(w, b, x.dtype)
        y, rstd, blocks = None, None, _blocks(x, alpha is not None or act is not None)
        if alpha is not None:
            alpha = _away_from_zero(alpha)
            rstd = torch.empty(len(x), len(alpha), 1, dtype=wide(x[:0]).dtype, device=x.device)
        for rows in blocks:
            z = F.linear(ACTIVATIONS[act][0](x[rows]), wq, bq)
            if alpha is not None:
                z, rstd[rows] = _normalize(z.unflatten(-1, (len(alpha), -1)), alpha, eps)
                z = z.flatten(1)
            if len(blocks) == 1:
                y = z.to(x.dtype)
            else:
                y = x.new_empty(len(x), len(wq)) if y is None else y
                y[rows] = z
        ctx.save_for_backward(x, w, b, alpha, rstd, None if alpha is None else y)
        ctx.quantize, ctx.act, ctx.eps = quantize, act, eps
        return _output(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, w, b, alpha, rstd, y = ctx.saved_tensors
        forward, backward = ACTIVATIONS[ctx.act]
        x = x if ctx.act is None else _later(x, g)
        broad = wide(g[:0]).dtype
        wq, _ = _again(ctx.quantize, w, b, x.dtype, g)
        gx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        gw, gb, galpha = (torch.zeros_like(t, dtype=broad) if need and t is not None else None
                          for t, need in zip((w, b, alpha), ctx.needs_input_grad[1:4], strict=True))
        for rows in _blocks(x, alpha is not None or ctx.act is not None):
            dz = g[rows]
            if alpha is not None:
                dz, part = _normalize_backward(*(t.unflatten(-1, (len(alpha), -1)) for t in (dz, y[rows])), rstd[rows], alpha,
                                               ctx.eps)
                dz = dz.flatten(1).to(x.dtype)
                if galpha is not None:
                    galpha += part
            if gb is not None:
                gb += dz.sum(0, dtype=broad)
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


class _QuantizedConv(torch.autograd.Function):
    """y = conv2d(act(x), wq, bq). When alpha (out,) is given, _normalize() follows: over the channels of each pixel or the
    pixels of each channel. round_input rounds act(x) to int8, scaled by the largest value of each example, with
    a straight-through gradient. `wq, bq = quantize(w, b, dtype)`; conv: stride, padding, dilation (pairs) and groups.

    Saves x, w, b and, with alpha, y and 1 / std. Recomputes wq and act(x).
    """
    @staticmethod
    def forward(ctx, x, w, b, alpha, quantize, act, round_input, norm, eps, conv):
        wq, bq = quantize(w, b, x.dtype)
        y, rstd = F.conv2d(_conv_input(x, act, round_input), wq, bq, **conv), None
        if alpha is not None:
            alpha, z = _away_from_zero(alpha), _by_norm(y, norm)
            rstd = _normalize_blocks(z, z, _scale(alpha, norm), eps)           # overwrites the product
            y = _from_norm(z, y.shape, norm)
        keep_x = ctx.needs_input_grad[1] or act is not None and ctx.needs_input_grad[0]
        ctx.save_for_backward(x if keep_x else None, w, b, alpha, rstd, None if alpha is None else y)
        ctx.quantize, ctx.act, ctx.round_input, ctx.norm, ctx.eps, ctx.conv = quantize, act, round_input, norm, eps, conv
        ctx.x_shape, ctx.dtype = x.shape, x.dtype
        return _output(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, w, b, alpha, rstd, y = ctx.saved_tensors
        need_x, need_w, need_b, need_alpha = ctx.needs_input_grad[:4]
        galpha = None
        if alpha is not None:
            dz, galpha = _normalize_blocks_backward(_by_norm(g, ctx.norm), _by_norm(y, ctx.norm), rstd,
                                                    _scale(alpha, ctx.norm), ctx.eps)
            g = _from_norm(dz, y.shape, ctx.norm)
            galpha = galpha.view(alpha.shape).to(alpha.dtype) if need_alpha else None
        wq, bq = _again(ctx.quantize, w, b, ctx.dtype, g)
        x = x if ctx.act is None and not ctx.round_input else _later(x, g)
        # convolution_backward copies the memory layout of `a` and reads its values only for gw
        a = _conv_input(x, ctx.act, ctx.round_input) if need_w else g.new_empty(()).expand(ctx.x_shape) if x is None else x
        c = ctx.conv
        gx, gw, gb = torch.ops.aten.convolution_backward(
            g, a, wq, None if bq is None else [len(wq)], c['stride'], c['padding'], c['dilation'], False, [0, 0], c['groups'],
            [need_x, need_w, bq is not None and need_b])
        if need_x:
            gx = ACTIVATIONS[ctx.act][1](gx, x)
        return (gx, gw if gw is None else gw.to(w.dtype), gb if gb is None else gb.to(b.dtype), galpha, None, None, None, None,
                None, None)


def _conv_input(x, act, round_input):
    x = ACTIVATIONS[act][0](x)
    if not round_input:
        return x
    codes, scales = quantize_rows(wide(x).permute(0, 2, 3, 1).flatten(1))
    return (codes * scales).view(len(x), *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2).to(x.dtype)


def _by_norm(z, norm):
    """Reshape (N, C, H, W) so that the normalized values come last: (N H W, C), a view if channels_last, or (N, C, H W)."""
    return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]) if norm == 'channel' else z.flatten(2)


def _scale(alpha, norm):
    """alpha in a shape that broadcasts to _by_norm()."""
    return alpha if norm == 'channel' else alpha[:, None]


def _from_norm(rows, shape, norm):
    return rows.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2) if norm == 'channel' else rows.view(shape)


# Without int8 dot-product instructions torch._int_mm can be far slower than the float product. The check runs at import, since
# torch.compile cannot trace it.
FAST_INT8_CPU = getattr(torch.cpu, '_is_vnni_supported', lambda: False)() and not AS_ON_GPU


# Tensor cores multiply int8 too, but nothing has been measured on a GPU yet: off unless NANOBIT_INT8=1.
FAST_INT8_CUDA = os.environ.get('NANOBIT_INT8') == '1'


def has_fast_int8(device):
    return {'cpu': FAST_INT8_CPU, 'cuda': FAST_INT8_CUDA}.get(device.type, False)


def int8_product_pays(q, t):
    """True if torch._int_mm(q (N, in), t.T) of int8 tensors is possible and fast; t (out, in)."""
    if not has_fast_int8(q.device) or t.dtype != torch.int8:
        return False
    if q.device.type == 'cuda':                     # the shapes that cuBLASLt takes
        return len(q) > 16 and q.shape[1] % 8 == len(t) % 8 == 0
    return min(*q.shape, len(t)) > 1                # size-1 dimensions: pytorch/pytorch#195066


class _TernaryLinear(torch.autograd.Function):
    """y (N, out) = int8(gain * RMSNorm(act(x))) @ ternary(w).T * scales * out_gain + b.

    x (N, in), or (N, 2 in) if act is gated. Saves x, the int8 codes of the normalized input, per-token scalars and the weight's
    scales. The codes give dL/dw = dy.T @ (codes * scale) exactly. `codes, scales = weights(w, scales=None)` returns the ternary
    weight; scales[i] belongs to a chunk of rows[i] rows. gain=None means that x is already normalized; out_gain=None means 1.
    With V = codes * scales and E = V * out_gain, dL/dout_gain is the sum of each row of V * dL/dE, so y need not be saved.
    The product of the codes is exact in int32. In fp32 it is exact while |sum| <= 128 * in < 2**24. Autocast rounds it to bf16,
    like any other product.
    """
    @staticmethod
    def forward(ctx, x, w, b, gain, out_gain, weights, rows, eps, act, dtype, packed):
        if kernels_triton.usable(x) and act in (None, 'relu2_glu'):
            q, top, rstd = kernels_triton.norm_to_int8(x, gain, eps, act)
        else:
            q = x.new_empty(len(x), x.shape[1] // (1 + (act in GATED)), dtype=torch.int8)   # (N, in)
            top = wide(x[:, :1]).new_empty(len(x), 1)
            rstd = None if gain is None else torch.empty_like(top)
            for i in _blocks(x):
                a = wide(EVERY_ACTIVATION[act][0](x[i]))
                if gain is not None:
                    rstd[i] = (torch.linalg.vector_norm(a, dim=-1, keepdim=True).square() / a.shape[-1] + eps).rsqrt()
                    a = (a * rstd[i]).mul_(gain)
                top[i] = absmax_rows(a)
                q[i] = quantize_rows(a, top=top[i])[0]
        sx = top / 127
        few = packed and kernels_triton.usable(q) and len(q) <= kernels_triton.MOST_TOKENS
        t, sw = packed if few else weights(w)                               # (out, in) int8, or fp32 in a ramp; (chunks,)
        if few:
            z, sx_z = kernels_triton.int_product(q, t), sx
        elif int8_product_pays(q, t):
            z, sx_z = torch._int_mm(q, t.T), sx                             # int32 (N, out)
        else:
            shrink = 2 ** -10 if dtype == torch.float16 else 1              # sums can exceed 65504, the fp16 maximum
            z, sx_z = F.linear(q.to(dtype) * shrink, t.to(dtype)), sx / shrink
        per_row = _of_rows(sw, rows) if out_gain is None else _of_rows(sw, rows) * out_gain
        y = z * (sx_z * sw) if len(sw) == 1 and out_gain is None else (z * sx_z).mul_(per_row)
        if b is not None:
            y += b
        keep_x = gain is not None or act is not None
        again = keep_x and torch.compiler.is_compiling()       # the fused backward pass computes the codes from x
        ctx.save_for_backward(x if keep_x else None, w, gain, out_gain, None if again else q, top, rstd, sw)
        ctx.weights, ctx.rows, ctx.act, ctx.x_dtype, ctx.x_shape = weights, rows, act, x.dtype, x.shape
        return _output(y.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, w, gain, out_gain, q, top, rstd, sw = ctx.saved_tensors
        forward, backward = EVERY_ACTIVATION[ctx.act]
        need_x, need_out = ctx.needs_input_grad[0] or ctx.needs_input_grad[3], ctx.needs_input_grad[4]
        need_w = ctx.needs_input_grad[1] or need_out
        gb = g.sum(0, dtype=torch.promote_types(g.dtype, torch.float32)) if ctx.needs_input_grad[2] else None
        if q is None:
            x = _later(x, g)
            a = wide(forward(x))
            q, _ = quantize_rows(a if gain is None else a * rstd * gain, top=top)
        sx = top / 127
        gx = q.new_empty(ctx.x_shape, dtype=ctx.x_dtype) if need_x else None
        gw = torch.zeros_like(w, dtype=sx.dtype) if need_w else None
        ggain = None if gain is None else torch.zeros_like(gain, dtype=sx.dtype)
        if need_x or out_gain is not None:
            t, _ = ctx.weights(_later(w, g), sw)
            wq = t * _of_rows(_later(sw, g), ctx.rows)[:, None]
            scaled = (wq if out_gain is None else wq * out_gain[:, None]).to(g.dtype)
        for i in _blocks(q):
            if need_w:
                _add_product(gw, g[i], (q[i] * sx[i]).to(g.dtype))
            if need_x:
                h = wide(g[i] @ scaled)                                    # straight-through: the rounding passes it on
                if rstd is not None:                                        # RMSNorm: n = gain * u, u = a * rstd
                    u = wide(forward(x[i])) * rstd[i]
                    p = h * u
                    ggain += p.sum(0)
                    along = (p @ gain.to(p.dtype)).unsqueeze(-1)
                    h.mul_(gain)
                    h.addcmul_(u, along, value=-1 / u.shape[-1]).mul_(rstd[i])      # (h - u mean(u h)) * rstd
                gx[i] = h if ctx.act is None else backward(h.to(ctx.x_dtype), x[i])
        gout = (gw * wq).sum(1).to(out_gain.dtype) if need_out else None
        if need_w and out_gain is not None:
            gw *= out_gain[:, None]
        gw = gw.to(w.dtype) if ctx.needs_input_grad[1] else None
        return gx, gw, gb, None if gain is None else ggain.to(gain.dtype), gout, None, None, None, None, None, None


def _of_rows(scales, rows):
    """Repeat each of the scales (len(rows),) once per row of its chunk: (sum(rows),)."""
    return scales.expand(*rows) if len(rows) == 1 else torch.cat([s.expand(n) for s, n in zip(scales, rows, strict=True)])


class _FrozenLinear(torch.autograd.Function):
    """y (N, out) = x (N, in) @ W.T + b for a frozen W. decoder() returns a function weights(i, j): W[i:j] in x's dtype.

    Decodes one block of rows at a time: the block fits in the cache, and the whole decoded weight is never in memory. Saves
    nothing, not even the tensors that the decoder reads.
    """
    @staticmethod
    def forward(ctx, x, b, decoder, blocks, product):
        ctx.decoder, ctx.blocks = decoder, blocks
        if product is not None and (y := product(x)) is not None:
            return (y if b is None else y + b).to(x.dtype)
        weights = decoder()
        if len(blocks) == 1:
            return F.linear(x, weights(*blocks[0]), b)
        y = x.new_empty(len(x), blocks[-1][1])
        for i, j in blocks:
            y[:, i:j] = F.linear(x, weights(i, j), None if b is None else b[i:j])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        gx = None
        if ctx.needs_input_grad[0]:
            weights, ((i, j), *rest) = ctx.decoder(), ctx.blocks
            gx = g[:, i:j] @ _later(weights(i, j), g)
            gx = wide(gx) if rest else gx                                   # bf16 would round the sum after each block
            for i, j in rest:
                if gx.dtype == g.dtype:
                    gx.addmm_(g[:, i:j], weights(i, j))
                else:
                    gx += g[:, i:j] @ weights(i, j)
            gx = gx.to(g.dtype)
        gb = g.sum(0, dtype=wide(g[:0]).dtype).to(g.dtype) if ctx.needs_input_grad[1] else None
        return gx, gb, None, None, None


GPU_BLOCK = 1 << 25     # bytes of a weight that a GPU decodes at a time: its kernels need large blocks


def _row_blocks(shape, x, multiple=1):
    """Blocks [(i, j), ...] of the rows of a weight of this shape. On the CPU a block has 1 MB for each thread."""
    rows, columns = shape
    if torch.compiler.is_compiling():
        return [(0, rows)]
    most = (min(16, torch.get_num_threads()) << 20 if on_cpu(x) else GPU_BLOCK) // x.element_size()
    step = max(1, most // columns // multiple) * multiple
    return [(i, min(i + step, rows)) for i in range(0, rows, step)]


def frozen_linear(x, bias, decoder, shape, multiple=1, product=None):
    """_FrozenLinear over x (..., in). x and bias are cast to the compute dtype. multiple: each block begins at a multiple of
    this number of rows. product(x (N, in)): optional kernel that returns x W^T, or None if it cannot."""
    dtype = compute_dtype(x)
    flat = x.reshape(-1, shape[1]).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    y = _FrozenLinear.apply(flat, bias, decoder, _row_blocks(shape, flat, multiple), product)
    return y.view(*x.shape[:-1], shape[0])


def plain_linear(x, weight, bias):
    """F.linear in the compute dtype."""
    dtype = compute_dtype(x)
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


straight_through = _StraightThrough.apply
normalize = _Normalize.apply
quantized_linear = _QuantizedLinear.apply
quantized_conv = _QuantizedConv.apply
ternary_linear = _TernaryLinear.apply


# ---------------------------------------------------------------------------------------------------------------------
# the base classes: LowBit; LowBitLinear and LowBitConv define the product; Binary, Ternary and FourBit define the weight. Most
# modules below inherit one of each kind.


def in_blocks(encode, rows, size=1 << 20):
    """Apply encode(part) -> dict of tensors to about `size` weights of `rows` (n, ...) at a time; concatenate the results.
    Temporaries are many times larger than the codes, and the head matrix can be half of a model. Each part is a multiple of
    256 rows. Parts are larger on a GPU, where calls cost more than memory."""
    size = size if on_cpu(rows) else 1 << 24
    parts = [encode(part) for part in rows.split(max(1, size // max(1, rows[:1].numel()) // 256) * 256)]
    if len(parts) == 1:
        return parts[0]

    def whole(tensors):                             # cat() fails for fp16 under autocast on a CPU, but not with out=
        return torch.cat(tensors, out=tensors[0].new_empty(sum(map(len, tensors)), *tensors[0].shape[1:]))
    return {name: whole([part[name] for part in parts]) for name in parts[0]}


def all_finite(tensors):
    """True when all tensors are finite, or on the meta device. Copies none of them."""
    return all(torch.isfinite(torch.stack(t.aminmax())).all() for t in tensors if t.numel() and not t.is_meta)


class LowBit(nn.Module):
    """Base class of quantized layers: latent `weight` (and `bias`) Parameters or, after pack_(), uint8 codes.

    A subclass defines `kind` (its name in FORMATS), `bits` (of a code), and a forward() for both states. encode() returns a
    dict of buffers with the quantized weight; decode() is its inverse and returns (weight, bias or None). rounded(weight)
    quantizes a latent weight. Raises ValueError for an activation that is not in `acts`.
    """
    packed, acts, bias_dim = False, ACTIVATIONS, 0  # bias_dim: the bias has the size of this weight dimension
    share = None                                    # of the rounded weight in training, see ramp()

    def __init__(self, shape, bias, act=None):
        if act not in self.acts:
            raise ValueError(f'{type(self).__name__}: act={act!r} must be in {list(self.acts)}')
        super().__init__()
        self.shape, self.act, self.eps = shape, act, 0.0
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.zeros(shape[self.bias_dim])) if bias else None
        self.register_parameter('alpha', None)      # only binary modules scale their output by one number
        self.register_parameter('out_gain', None)   # only TernaryLinear scales each feature of it
        self._init_weight()

    def pack_(self):
        """Replace the latent weights by their codes (buffers `code`, ...), in place. The layer is no longer trainable."""
        if not self.packed:
            if not all_finite(self.parameters(recurse=False)):
                raise ValueError(f'{type(self).__name__}: weights must be finite to be packed')
            with torch.no_grad():
                self.hold_(self.encode())
        return self

    def hold_(self, buffers):
        """Turn this into a packed module with these buffers, as returned by encode()."""
        del self.weight
        if self.bias is not None and 'packed_bias' in buffers:
            del self.bias
            self.bias = None
        self.weight = self.share = None
        for name, value in buffers.items():
            self.register_buffer(name, value)
        for p in self.parameters(recurse=False):
            p.requires_grad_(False)
        self.packed = True
        return self

    def unpack_(self):
        """Turn a packed layer into a trainable one. Its weights are the quantized ones; the latent values are lost."""
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

    def effective_weight(self):
        """The weight of a packed layer that multiplies weight_input(x): fp32, of the weight's shape."""
        return self.decode()[0].float()

    def _quantize(self, weight, bias, dtype):
        """Return the quantized (weight, bias or None) in `dtype`: from latent values or, if packed, from the codes."""
        weight = self.effective_weight() if self.packed else self._mixed(self.rounded(weight), lambda: weight)
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    def _mixed(self, rounded, full):
        """The weight of a training step: `rounded`, with a share of full() before the end of a ramp, see ramp()."""
        if self.share is None or not self.training:
            return rounded
        latent = wide(full().detach())
        return torch.lerp(latent, rounded.to(latent.dtype), self.share.to(latent.dtype))

    def packed_bytes(self):
        """Bytes of this layer when packed: codes, scales and the parameters that stay in full precision."""
        with torch.no_grad():
            held = dict(self.named_buffers(recurse=False)) if self.packed else self.encode()
        dropped = {'weight'} | ({'bias'} if 'packed_bias' in held else set())
        kept = [p for n, p in self.named_parameters(recurse=False) if n not in dropped]
        return sum(t.numel() * t.element_size() for t in [*held.values(), *kept])


class LowBitLinear(LowBit):
    """Base class of quantized linear layers, (..., in) -> (..., out) in the compute dtype.

    A layer that is trained, or whose output is normalized, multiplies by _quantize(weight). Any other packed layer decodes one
    block of rows at a time: decoder(dtype) returns a function weights(i, j) for rows i .. j - 1. Blocks begin at multiples of
    `row_multiple`. extra_repr() shows the attributes named in `shown`.
    """
    row_multiple, shown = 1, ()

    def __init__(self, in_features, out_features, bias, act=None):
        super().__init__((out_features, in_features), bias, act)
        self.in_features, self.out_features = in_features, out_features

    def _init_weight(self):
        nn.init.normal_(self.weight, std=self.shape[1] ** -0.5)

    def forward(self, x):
        return self.product(x, self.act)

    def product(self, x, act):
        """act(x) times the weight, plus the bias; normalized if the layer has an alpha."""
        dtype = compute_dtype(x)
        if self.packed and self.alpha is None:
            return frozen_linear(ACTIVATIONS[act][0](x.to(dtype)), self.bias, lambda: self.decoder(dtype), self.shape,
                                 self.row_multiple, self.product_of_codes)
        flat = x.reshape(-1, self.in_features).to(dtype)
        y = quantized_linear(flat, self.weight, self.bias, self.alpha, self._quantize, act, self.eps)
        return y.reshape(*x.shape[:-1], self.out_features)

    def product_of_codes(self, x):
        """x (tokens, in) times the packed weight, without decoding it first; None if there is no kernel for this."""

    def weight_input(self, x):
        """The tensor that the weight multiplies, computed from the layer's input x. A LoRA adapter gets the same tensor."""
        return EVERY_ACTIVATION[self.act][0](x.to(compute_dtype(x)))

    def merged(self, delta, requantize, x):
        """A layer with weight effective_weight() + delta: of this kind and packed if requantize, else in the dtype of x."""
        if requantize:
            new = copy.deepcopy(self).unpack_()
            new.weight.add_(self._latent_change(delta, x))
            return new.pack_()
        new = full_linear(self.effective_weight() + delta, self.bias, x.device, x.dtype)
        return new if self.act is None else nn.Sequential(Activation(self.act), new)

    def _latent_change(self, delta, x):
        """The change of the latent weight that changes the effective weight by delta."""
        return delta

    def extra_repr(self):
        options = [f'{name}={getattr(self, name)}' for name in (*self.shown, 'packed')]
        return f'{self.in_features}, {self.out_features}, {", ".join(options)}'


class LowBitConv(LowBit):
    """Base class of quantized convolutions, (N, C, H, W) -> (N, out, H', W') in the compute dtype.

    Arguments as in nn.Conv2d; the padding is always zeros. act='relu' (or 'gelu') applies the activation to x inside the layer
    and saves only x. A binary layer in front saves this tensor anyway. A convolution with its normalization and activation then
    saves one tensor for the backward pass. Conv2d, BatchNorm2d and an in-place ReLU save two.

    Use torch.channels_last inputs: normalization over the channels then needs no copy.
    Raises ValueError for an unknown act or padding, and for groups that do not divide the channels.
    """
    norm, round_input = None, False

    def __init__(self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, act):
        name, pair = type(self).__name__, lambda v: (v, v) if isinstance(v, int) else tuple(v)
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f'{name}: groups={groups} must divide {in_channels} and {out_channels} channels')
        if isinstance(padding, str) and padding not in ('same', 'valid'):
            raise ValueError(f"{name}: padding={padding!r} must be 'same', 'valid' or numbers")
        size, stride, dilation, uneven = pair(kernel_size), pair(stride), pair(dilation), ()
        if padding == 'same':
            if stride != (1, 1):
                raise ValueError(f"{name}: padding='same' needs stride=1, not {stride}")
            total = [d * (k - 1) for d, k in zip(dilation, size, strict=True)]
            padding = tuple(t // 2 for t in total)
            if any(t % 2 for t in total):           # the odd zero goes right and below, as in nn.Conv2d
                uneven = (0, total[1] % 2, 0, total[0] % 2)
        padding = (0, 0) if padding == 'valid' else pair(padding)
        super().__init__((out_channels, in_channels // groups, *size), bias, act)
        self.conv, self.uneven = dict(stride=stride, padding=padding, dilation=dilation, groups=groups), uneven

    def _init_weight(self):
        nn.init.kaiming_normal_(self.weight, nonlinearity='relu')

    def forward(self, x):
        x = x.to(compute_dtype(x))
        x = F.pad(x, self.uneven) if self.uneven else x
        return quantized_conv(x, self.weight, self.bias, self.alpha, self._quantize, self.act, self.round_input, self.norm,
                              self.eps, self.conv)

    def extra_repr(self):
        norm = f'norm={self.norm}, ' if self.norm else ''
        return f'{self.shape}, {self.conv}, {norm}act={self.act}, packed={self.packed}'


class Binary(LowBit):
    """Binary weight and bias: {0,1} by `w > mean(w)`, with one mean for each of `chunks` slices of dim 0. The product uses the
    bits minus `offset`. The output is normalized and multiplied by a learnable alpha. alpha=None: it is not; put a BatchNorm
    after the layer, which then has no bias."""
    kind, bits, chunks, offset = 'bin', 1, 1, 0.5

    def _init_weight(self):
        nn.init.xavier_uniform_(self.weight)

    def _init_alpha(self, alpha, shape, eps):
        if alpha is None and self.bias is not None:
            raise ValueError('alpha=None needs bias=False: the BatchNorm after the layer has a bias, of full precision')
        if alpha is not None and not alpha > 0:
            raise ValueError(f'the initial alpha must be above 0, or None; got {alpha}')
        self.alpha, self.eps = None if alpha is None else nn.Parameter(torch.full(shape, float(alpha))), eps

    def encode(self):
        held = {'code': pack_bits(binarize(self.weight, self.chunks).flatten(1), 1)}
        if self.bias is not None:
            held['packed_bias'] = pack_bits(binarize(self.bias, self.chunks), 1)
        return held

    def decode(self):
        return self._unpacked(torch.float32, 0.5)

    def _unpacked(self, dtype, offset):
        """Return (weight, bias or None) of a packed layer: bits minus `offset`."""
        bits = lambda held, n: unpack_bits(held, 1, n).to(dtype).sub_(offset)
        bias = bits(self.packed_bias, self.shape[self.bias_dim]) if hasattr(self, 'packed_bias') else None
        return bits(self.code, math.prod(self.shape[1:])).view(self.shape), bias

    def _quantize(self, weight, bias, dtype):
        if self.packed:
            return self._unpacked(dtype, self.offset)
        bits, bias = (None if p is None else half_bits(p, self.chunks, dtype, self.offset) for p in (weight, bias))
        return self._mixed(bits, lambda: self._in_bits(weight)).to(dtype), bias

    def _in_bits(self, weight):
        """The latent weight, moved and scaled to the mean 1/2 - offset and the mean distance 1/2 from it, as its bits have."""
        flat = wide(weight.detach().reshape(self.chunks, -1))
        flat = flat - flat.mean(1, keepdim=True)
        return (flat / (2 * flat.abs().mean(1, keepdim=True)).clamp_(min=1e-30)).add_(0.5 - self.offset).view(weight.shape)


class Ternary(LowBit):
    """Ternary weight: codes round(clip(W / s, -1, 1)) times s = mean|W| of each chunk, times the row's element of out_gain, if
    there is one. chunks: a number or a tuple of rows."""
    kind, bits, chunks = 'tern', 2, 1

    @property
    def rows(self):
        """Tuple: the number of rows of each chunk."""
        return (self.shape[0] // self.chunks,) * self.chunks if isinstance(self.chunks, int) else tuple(self.chunks)

    def ternary(self, weight=None, scales=None):
        """Return (int8 codes of the weight's shape, fp32 scales, one per chunk). weight: latent, default its own. scales: those
        of `weight`, if they are known. A packed layer returns its stored codes and scales and ignores both."""
        if self.packed:
            codes = unpack_bits(self.code, 2, math.prod(self.shape[1:])).to(torch.int8).sub_(1)
            return codes.view(self.shape), self.weight_scale
        return ternarize((self.weight if weight is None else weight).detach(), self.chunks, scales)

    def encode(self):
        codes, scales = self.ternary()
        return {'code': pack_bits(codes.flatten(1) + 1, 2), 'weight_scale': scales}

    def effective_weight(self):
        return self.rounded(self.weight)

    def rounded(self, weight):
        return self._rounded(weight, self.out_gain)

    def _rounded(self, weight, out_gain):
        codes, scales = self.ternary(weight)
        scales = _of_rows(scales, self.rows)
        return (codes.flatten(1) * (scales if out_gain is None else scales * out_gain)[:, None]).view(self.shape)

    def decode(self):
        return self._restored(self._rounded(self.weight, None)), None

    def _latent_change(self, delta, _=None):
        return self._restored(delta if self.out_gain is None else delta / _away_from_zero(self.out_gain)[:, None])

    def _restored(self, delta):
        # If a share of the codes is not 0, dividing by it restores mean|W| = scale.
        shares = (part.ne(0).float().mean().clamp_(min=1e-9) for part in self.ternary()[0].split(self.rows))
        return torch.cat([part / share for part, share in zip(delta.split(self.rows), shares, strict=True)])


class FourBit(LowBit):
    """4-bit weight: codes and scales of the flattened weight, see quantize4()."""
    bits = 4

    def _set_format(self, format, group, scales):
        name = type(self).__name__
        if format not in FORMATS4 or group < 0 or group % 2:
            raise ValueError(f'{name}: format={format!r} must be in {list(FORMATS4)} and group={group} must be even')
        scales = scales or FORMATS4[format].scales
        if scales not in SCALES4 or (scales == 'log8') != (format == 'fit4'):
            raise ValueError(f"{name}: scales={scales!r} must be in {SCALES4}; use 'log8' with fit4 and only with fit4")
        self.format, self.group, self.scales = format, group or FORMATS4[format].group, scales
        self.kind = 'int4' if format == 'uniform' else format

    def encode(self):
        def part(groups):
            codes, held = quantize4(groups, self.format, self.group, self.scales)
            return {'code': pack4(codes, self.format), **held}
        # '8bit' scales depend on 256 groups, which the parts keep together; 'log8' scales depend on the whole tensor
        whole = self.scales == 'log8' or self.weight.numel() % self.group
        held = part(self.weight) if whole else in_blocks(part, self.weight.reshape(-1, self.group))
        if not all_finite([scales4({k: t for k, t in held.items() if k != 'code'})]):
            raise ValueError(f'{type(self).__name__}: weights must be at most 65504 in size for scales={self.scales!r}')
        return held

    def held_scales(self):
        """{name: buffer} of all buffers except the codes, for scales4() and decode4()."""
        return {name: t for name, t in self.named_buffers(recurse=False) if name != 'code'}

    def decode(self):
        return decode4(self.code, self.held_scales(), self.format)[:math.prod(self.shape)].view(self.shape), None

    def rounded(self, weight):
        codes, held = quantize4(weight, self.format, self.group, self.scales)
        return levels4(codes, self.format).mul_(scales4(held)[:, None]).view(-1)[:weight.numel()].view(weight.shape)


# ---------------------------------------------------------------------------------------------------------------------
# the modules: low-bit linear layers, convolutions and an embedding; then half precision, low rank and LoRA


class BinaryLinear(Binary, LowBitLinear):
    """Binary normalized linear layer (arXiv 2509.07025, alg. 1-2), (..., in) -> (..., out) in the compute dtype.

        z = W01 x + b01,  W01 = W > mean(W),  b01 = b > mean(b);   y = alpha * (z - mean(z)) / (std(z) + eps)

    Mean and population std are over the output features of each token. alpha is one learnable number that starts at `alpha`.
    The paper has no alpha; it comes from the reproduction by Dao et al. The layer computes with W01 - 1/2 (see half_bits).
    b starts at 0, so all its bits are 0. alpha=None and bias=False: y = z, for a BatchNorm after the layer.

    chunks=3 treats the weight as 3 stacked matrices, each with its own mean, normalization and alpha. A fused q, k, v
    projection then equals three BinaryLinear layers. act='gelu' applies the activation to x first, and saves only x.
    Raises ValueError for chunks that do not divide `out`, an unknown act, or alpha <= 0.

    Worked by hand, 2 x 2, no bias, alpha 1: W = [[.1, .7], [.4, .0]] has mean .3, W01 = [[0, 1], [1, 0]];
    x = [3, 5] -> z = [5, 3], mean 4, std 1 -> y = [1, -1] / (1 + 1e-5).
    """
    shown = ('chunks', 'act')

    def __init__(self, in_features, out_features, bias=True, *, chunks=1, alpha=0.25, act=None, eps=1e-5):
        if out_features % chunks:
            raise ValueError(f'BinaryLinear({in_features}, {out_features}): chunks={chunks} must divide out_features')
        super().__init__(in_features, out_features, bias, act)
        self.chunks = chunks
        self._init_alpha(alpha, (chunks, 1), eps)

    def decoder(self, dtype):
        return lambda i, j: unpack_bits(self.code[i:j], 1, self.in_features).to(dtype).sub_(self.offset)

    def merged(self, delta, requantize, x):
        if not requantize and self.alpha is not None:
            raise ValueError('BinaryLinear: its normalized output has no full-precision equivalent; type requantize=True')
        return super().merged(delta, requantize, x)

    def _latent_change(self, delta, x):
        if self.alpha is None:
            return delta
        # y = alpha (z - mean z) / std z. To add delta x to y, add std / alpha times delta x to z.
        z = F.linear(self.weight_input(x).reshape(-1, self.in_features).float(), *self.decode())
        std = z.unflatten(-1, (self.chunks, -1)).std(-1, unbiased=False).mean(0)
        return (delta.unflatten(0, (self.chunks, -1)) * (std[:, None] / self.alpha).unsqueeze(-1)).flatten(0, 1)


class TernaryLinear(Ternary, LowBitLinear):
    """BitNet b1.58 linear layer (arXiv 2402.17764 and its Tips PDF), (..., in) -> (..., out) in the compute dtype.

        xq = int8(RMSNorm(x)) absmax per token;   wq = round(clip(W / s, -1, 1)) * s, s = mean|W|;   y = xq wq^T + b

    output_gain=True multiplies each output, before the bias, by a learned number of its own (out_gain); it starts at 1.
    The layer contains the RMSNorm (with a learnable gain), so its input must NOT be normalized. Use norm=False for a normalized
    input, for example one that several layers share. act is as in BinaryLinear; each chunk has one scale, and chunks=(8, 4, 4)
    means 3 chunks of 8, 4 and 4 rows. act='relu2_glu' (relu(gate)^2 * up, used by b1.58-2B-4T) and 'silu_glu' take the input
    [gate | up] (..., 2 in). Raises ValueError for chunks that do not add up to `out`, an unknown act, or in > 131071: beyond
    that the fp32 product of the codes is no longer exact.
    """
    acts, shown = EVERY_ACTIVATION, ('chunks', 'norm', 'act')

    def __init__(self, in_features, out_features, bias=False, *, chunks=1, norm=True, act=None, eps=1e-5,
                 output_gain=False):
        rows = (out_features // chunks,) * chunks if isinstance(chunks, int) else tuple(chunks)
        if sum(rows) != out_features or min(rows) < 1 or in_features >= 2 ** 17:
            raise ValueError(f'TernaryLinear({in_features}, {out_features}): chunks={chunks} must add up to out_features, '
                             'in < 131072')
        super().__init__(in_features, out_features, bias, act)
        self.chunks, self.norm, self.eps = chunks, norm, eps
        self.gain = nn.Parameter(torch.ones(in_features)) if norm else None
        self.out_gain = nn.Parameter(torch.ones(out_features)) if output_gain else None

    def weight_input(self, x):
        x = super().weight_input(x)
        return x if not self.norm else F.rms_norm(x, (self.in_features,), self.gain.to(x.dtype), self.eps)

    def merged(self, delta, requantize, x):
        new = super().merged(delta, requantize, x)
        if requantize or not self.norm:
            return new
        norm = nn.RMSNorm(self.in_features, self.eps, device=x.device, dtype=x.dtype)
        norm.weight.copy_(self.gain)
        return nn.Sequential(*([norm, new] if self.act is None else [new[0], norm, new[1]]))

    def _codes(self, weight=None, scales=None):
        """ternary() for a training step: during a ramp the codes are fp32, and not whole numbers."""
        codes, scales = self.ternary(weight, scales)
        return self._mixed(codes, lambda: weight / _of_rows(scales, self.rows)[:, None]), scales

    def forward(self, x):
        y = ternary_linear(x.reshape(-1, x.shape[-1]), self.weight, self.bias, self.gain, self.out_gain, self._codes,
                           self.rows, self.eps, self.act, compute_dtype(x),
                           (self.code, self.weight_scale) if self.packed else None)
        return y.view(*x.shape[:-1], self.out_features)


class Linear4bit(FourBit, LowBitLinear):
    """Linear layer with 4-bit weights, trained through the rounding or, after pack_(), frozen; (..., in) -> (..., out).

    format: 'uniform' (code u and absmax n: u / 15 * 2n - n), 'nf4' (arXiv 2305.14314) or 'fit4' (see quant.py). fit4 has
    the least error on normal weights, but takes ten times as long to encode. For weights with outliers use nf4, which has a
    level at 0. `group` weights of the flattened matrix share a scale; 0 means 16, 64, 32 for the three formats. scales: 'fp16',
    'fp32', '8bit' (double quantization over 256 groups) or, for fit4, 'log8'. The bias is not quantized. Packed buffers: code
    (uint8), absmax, absmax_top. Raises ValueError for an unknown format, scales or act, and for an odd group. pack_() raises
    ValueError for weights that are not finite or too large for the scales.
    """
    shown = ('format', 'group', 'scales', 'act')

    def __init__(self, in_features, out_features, bias=True, *, format='uniform', group=0, scales='', act=None):
        super().__init__(in_features, out_features, bias, act)
        self._set_format(format, group, scales)
        self.row_multiple = self.group // math.gcd(in_features, self.group)

    def decoder(self, dtype):
        held, n, flat = self.held_scales(), self.in_features, None
        held = {'absmax': scales4(held)} if self.scales == '8bit' else held     # decode the scales once, not for each block

        def weights(i, j):                          # blocks hold whole groups; only the last group may contain padding
            nonlocal flat
            end = -(-j * n // self.group) * self.group
            flat = decode4(self.code, held, self.format, i * n, end, dtype, flat)
            return flat[:(j - i) * n].view(j - i, n)
        return weights

    def product_of_codes(self, x):
        return product4(x, self.code, self.held_scales(), self.format, self.out_features)

    def look_up(self, ids):
        code = self.code.view(self.out_features, -1)[ids].flatten()
        absmax = scales4(self.held_scales()).view(self.out_features, -1)[ids].flatten()
        return decode4(code, {'absmax': absmax}, self.format).view(len(ids), self.in_features)


class Int8Linear(LowBitLinear):
    """Linear layer with int8 weights and one fp32 scale absmax / 127 per output row; (..., in) -> (..., out).

    Trained through the rounding or, after pack_(), frozen. activations='int8' also rounds the input, scaled by the absmax of
    each token (LLM.int8, arXiv 2208.07339, without its outlier columns). When the layer is packed and the CPU has int8
    instructions, the product then runs in int8, exactly. Raises ValueError for other activations, an unknown act and
    in > 131071. pack_() raises ValueError for weights that are not finite.
    """
    kind, bits, shown = 'int8', 8, ('activations', 'act')

    def __init__(self, in_features, out_features, bias=True, *, activations=None, act=None):
        if activations not in (None, 'int8') or in_features >= 2 ** 17:
            raise ValueError(f"Int8Linear: activations={activations!r} must be None or 'int8', in={in_features} < 131072")
        super().__init__(in_features, out_features, bias, act)
        self.activations = activations

    def encode(self):
        def part(rows):
            return dict(zip(('code', 'weight_scale'), quantize_rows(wide(rows), tiny=1e-30), strict=True))
        return in_blocks(part, self.weight)

    def decode(self):
        return self.code * self.weight_scale, None

    def decoder(self, dtype):
        return lambda i, j: self.code[i:j].to(self.weight_scale.dtype).mul_(self.weight_scale[i:j]).to(dtype)

    def look_up(self, ids):
        return self.code[ids] * self.weight_scale[ids]

    def rounded(self, weight):
        codes, scales = quantize_rows(wide(weight), tiny=1e-30)
        return codes * scales

    def forward(self, x):
        if not self.activations:
            return super().forward(x)
        x = self.weight_input(x)
        codes, scales = quantize_rows(wide(x.detach()))
        flat, no_gradient = codes.reshape(-1, self.in_features), not (torch.is_grad_enabled() and x.requires_grad)
        if self.packed and no_gradient and int8_product_pays(flat, self.code):
            y = torch._int_mm(flat, self.code.T) * scales.reshape(-1, 1) * self.weight_scale.T
            return (y if self.bias is None else y + self.bias).to(x.dtype).view(*x.shape[:-1], self.out_features)
        return self.product(straight_through(x, (codes * scales).to(x.dtype)), None)


class BinaryConv2d(Binary, LowBitConv):
    """Binary normalized convolution (arXiv 2509.07025, alg. 3): like BinaryLinear, with a convolution as the product and one
    alpha per output channel. The layer normalizes its output, so do not put a BatchNorm after it, except with alpha=None, which
    computes only the product with W01 - 1/2 and needs bias=False.

    norm: 'channel' normalizes each pixel over the channels (default), 'spatial' each (example, channel) over its pixels. Only
    with 'channel' do {0,1} and {-1,1} weights give the same network.
    Raises ValueError for an unknown norm and alpha <= 0.
    """
    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True, *,
                 norm='channel', alpha=0.25, act=None, eps=1e-5):
        if norm not in ('channel', 'spatial'):
            raise ValueError(f"BinaryConv2d: norm={norm!r} must be 'channel' or 'spatial'")
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, act)
        # Subtracting 1/2 from every weight adds the same term to all output channels; a mean over the channels removes it.
        # With groups the term differs between channels, since each group sums other inputs.
        self.norm = None if alpha is None else norm
        self.offset = 0.5 if alpha is None or norm == 'channel' and groups == 1 else 0.0
        self._init_alpha(alpha, (out_channels,), eps)


class TernaryConv2d(Ternary, LowBitConv):
    """Ternary convolution with weights as in TernaryLinear (arXiv 2402.17764). The input is rounded to int8, scaled by the
    largest value of each example. Put a BatchNorm after it. It contains no RMSNorm: applied to one pixel of a photograph,
    RMSNorm keeps the hue and removes the brightness.
    """
    round_input = True

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=False, *,
                 act=None):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, act)


class Conv4bit(FourBit, LowBitConv):
    """Convolution with 4-bit weights; format, group and scales as in Linear4bit, on the weight flattened as (out, in, h, w).
    Put a BatchNorm after it. Raises ValueError like Linear4bit."""
    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True, *,
                 format='uniform', group=0, scales='', act=None):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, act)
        self._set_format(format, group, scales)


class BinaryEmbedding(Binary):
    """Binary normalized embedding (arXiv 2509.07025, alg. 4), ids (...) int -> (..., dim).

    Adds the bits of a bias to the row of bits of each id, normalizes over dim, and multiplies by alpha (one per layer). Only
    the rows of the given ids are rounded; the mean is over the whole table.
    """
    bias_dim = 1

    def __init__(self, num_embeddings, embedding_dim, bias=True, *, alpha=0.25, eps=1e-5):
        if alpha is None:
            raise ValueError('BinaryEmbedding: alpha must be a number above 0')
        super().__init__((num_embeddings, embedding_dim), bias)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self._init_alpha(alpha, (1,), eps)

    def forward(self, ids):
        if self.packed:
            e = unpack_bits(F.embedding(ids, self.code), 1, self.embedding_dim).to(self.alpha.dtype) - 0.5
            if hasattr(self, 'packed_bias'):
                e = e + (unpack_bits(self.packed_bias, 1, self.embedding_dim).to(e.dtype) - 0.5)
        else:
            rows = F.embedding(ids, self.weight)
            bits = (wide(rows) > wide(self.weight).mean()).to(rows.dtype) - 0.5
            bits = self._mixed(bits, lambda: F.embedding(ids, self._in_bits(self.weight))).to(rows.dtype)
            e = straight_through(rows, bits)
            if self.bias is not None:
                e = e + straight_through(self.bias, half_bits(self.bias))
        return normalize(e, self.alpha, self.eps)

    def extra_repr(self):
        return f'{self.num_embeddings}, {self.embedding_dim}, packed={self.packed}'


class Activation(nn.Module):
    """Module that applies one of EVERY_ACTIVATION, given by its name; gated activations included."""

    def __init__(self, act):
        super().__init__()
        self.act = act

    def forward(self, x):
        return EVERY_ACTIVATION[self.act][0](x)

    def extra_repr(self):
        return self.act


class HalfLinear(nn.Module):
    """Linear layer with weight and bias in fp16 or bf16 that computes in its input's dtype; (..., in) -> (..., out).

    dtype: torch.float16, torch.bfloat16 or their names. Frozen by default. With trainable=True it is trained in its own dtype,
    with fp16 or bf16 gradients. Raises ValueError for another dtype.
    """
    kind, bits = 'half', 16

    def __init__(self, in_features, out_features, bias=True, *, dtype=torch.float16, trainable=False):
        super().__init__()
        dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
        if dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f'HalfLinear: dtype={dtype} must be torch.float16 or torch.bfloat16')
        self.in_features, self.out_features, self.trainable = in_features, out_features, trainable
        self.weight = nn.Parameter(torch.empty(out_features, in_features).normal_(std=in_features ** -0.5).to(dtype), trainable)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), trainable) if bias else None

    @classmethod
    def from_linear(cls, linear, **options):
        """A HalfLinear with copies of weight and bias of `linear`. Raises ValueError if they are not finite in its dtype."""
        with torch.device('meta'):                  # avoids random fp32 weights that the copy would overwrite
            new = cls(linear.in_features, linear.out_features, linear.bias is not None, **options)
        new = _copied(new.to_empty(device=linear.weight.device), linear.weight, linear.bias)
        if not all_finite(new.parameters()):
            raise ValueError(f'HalfLinear: weights must be finite and fit into {new.weight.dtype}')
        return new

    def forward(self, x):
        if self.weight.requires_grad:
            return plain_linear(x, self.weight, self.bias)
        dtype = compute_dtype(x)                    # a direct cast from fp16 to bf16 is five times slower than through fp32
        return frozen_linear(x, self.bias, lambda: lambda i, j: self.weight[i:j].float().to(dtype), self.weight.shape)

    def look_up(self, ids):
        return self.weight[ids]

    def extra_repr(self):
        return f'{self.in_features}, {self.out_features}, dtype={self.weight.dtype}, trainable={self.trainable}'


class LowRankLinear(nn.Module):
    """Low-rank linear layer y = ((x B^T) * c) A^T + b, with A (out, rank), c (rank,), B (rank, in) trained. Never forms A c B.

    from_linear() computes A, c, B by a randomized SVD of a weight (arXiv 0909.4061: torch.svd_lowrank with 8 more columns and
    2 power iterations), the "weight reduction" of the rSVD experiments. Raises ValueError for rank < 1 or > min(in, out).
    """
    kind, bits = 'lowrank', 32
    weight = None                                   # as in packed layers: T5 reads the dtype of a weight if there is one

    def __init__(self, in_features, out_features, bias=True, *, rank):
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(f'LowRankLinear({in_features}, {out_features}): rank={rank} must be 1 .. '
                             f'{min(in_features, out_features)}')
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.A = nn.Parameter(torch.randn(out_features, rank) * rank ** -0.5)
        self.c = nn.Parameter(torch.ones(rank))
        self.B = nn.Parameter(torch.randn(rank, in_features) * in_features ** -0.5)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @classmethod
    def from_linear(cls, linear, rank):
        """A LowRankLinear that approximates the nn.Linear `linear`. Draws random numbers from torch's global generator."""
        new = cls(linear.in_features, linear.out_features, linear.bias is not None, rank=rank).to(linear.weight.device)
        if not torch.isfinite(linear.weight).all():
            raise ValueError('LowRankLinear: weights must be finite')
        with torch.no_grad():
            U, c, V = torch.svd_lowrank(linear.weight.float(), q=min(rank + 8, *linear.weight.shape), niter=2)
            new._set(U[:, :rank], c[:rank], V[:, :rank].T)
            if linear.bias is not None:
                new.bias.copy_(linear.bias)
        return new.to(linear.weight.dtype)

    def _set(self, A, c, B):
        for p, t in ((self.A, A), (self.c, c), (self.B, B)):
            p.data = t.to(p.dtype).contiguous()
        self.rank = len(c)

    @torch.no_grad()
    def truncate(self, rank, shrink=False):
        """Keep the `rank` largest singular values of A diag(c) B: QR of A diag(c) and of B^T, then SVD of the small core. (The
        rSVD experiments call this "+ SVT", though nothing is thresholded.) Zeros pad to the old rank, so the optimizer
        state keeps its shape. With shrink=True the rank shrinks: create a new optimizer. Returns the share of the squared norm
        that remains."""
        if not 1 <= rank <= self.rank:
            raise ValueError(f'LowRankLinear: cannot truncate rank {self.rank} to {rank}')
        Qa, Ra = torch.linalg.qr((self.A * self.c).float())
        Qb, Rb = torch.linalg.qr(self.B.T.float())
        U, c, Vh = torch.linalg.svd(Ra @ Rb.T)
        kept = (c[:rank].square().sum() / c.square().sum().clamp(min=1e-30)).item()
        fill = 0 if shrink else self.rank - rank
        self._set(F.pad(Qa @ U[:, :rank], (0, fill)), F.pad(c[:rank], (0, fill)), F.pad(Vh[:rank] @ Qb.T, (0, 0, 0, fill)))
        return kept

    def with_ranks(self, A, B):
        """A LowRankLinear whose weight is this one's plus A (out, r) B (r, in); its rank is larger by r."""
        new = LowRankLinear(self.in_features, self.out_features, self.bias is not None, rank=self.rank).to(A.device)
        new._set(torch.cat([self.A, A], 1), F.pad(self.c, (0, len(B)), value=1.0), torch.cat([self.B, B]))
        if self.bias is not None:
            new.bias.copy_(self.bias)
        return new

    def forward(self, x):
        dtype = compute_dtype(x)
        A, c, B, bias = (t if t is None else t.to(dtype) for t in (self.A, self.c, self.B, self.bias))
        return F.linear(F.linear(x.to(dtype), B) * c, A, bias)

    def extra_repr(self):
        return f'{self.in_features}, {self.out_features}, rank={self.rank}'


class LoRALinear(nn.Module):
    """LoRA adapter over any frozen linear layer: y = base(x) + alpha / rank * B A dropout(x), with A (rank, in), B (out, rank).

    arXiv 2106.09685. A starts kaiming-uniform and B zero, so at first the output is that of the base. A low-bit base is packed.
    If the base transforms x first (RMSNorm of a ternary layer, activation inside the layer), the adapter gets the transformed x
    too. Over a binary base that normalizes, the adapter adds to the normalized output. A and B are fp32 and compute in the
    input's dtype.
    Raises ValueError for a base without in_features and out_features, rank < 1 or dropout outside [0, 1).
    """
    kind, weight = 'lora', None

    def __init__(self, base, *, rank=8, alpha=16.0, dropout=0.0):
        super().__init__()
        if not hasattr(base, 'in_features') or isinstance(base, LoRALinear) or rank < 1 or not 0 <= dropout < 1:
            raise ValueError(f'LoRALinear: no LoRA over {type(base).__name__} with rank={rank}, dropout={dropout}')
        self.base = base.pack_() if isinstance(base, LowBit) else base
        for p in base.parameters():
            p.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        device = next(t.device for t in [*base.parameters(), *base.buffers()])
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def adapter(self, x):
        """The term that forward() adds to base(x): (..., out) in the compute dtype."""
        x = self.base.weight_input(x) if isinstance(self.base, LowBit) else x
        dtype = compute_dtype(x)
        h = F.linear(F.dropout(x, self.dropout, self.training).to(dtype), self.lora_A.to(dtype))
        return F.linear(h * (self.alpha / self.rank), self.lora_B.to(dtype))

    def forward(self, x):
        y = self.base(x)
        return y + self.adapter(x).to(y.dtype)

    @torch.no_grad()
    def merge(self, x, requantize=False):
        """Merge base and adapter into one layer. Returns (layer, {'max', 'mean'} of |change of the output| on inputs x).

        A full-precision base becomes an nn.Linear. A quantized base becomes its decoded weights plus the adapter in fp32; a
        ternary one keeps its RMSNorm in front. With requantize=True the result is a packed layer of the same kind, and the
        change measures the rounding. A binary base that normalizes its output needs requantize=True. Its adapter is
        rescaled to add the same output on x. A low-rank base gains the adapter's ranks; requantize=True truncates them again.
        """
        base, scale = self.base, self.alpha / self.rank
        if isinstance(base, LowRankLinear):
            new = base.with_ranks(self.lora_B * scale, self.lora_A)
            if requantize:
                new.truncate(base.rank, shrink=True)
        elif isinstance(base, LowBit):
            new = base.merged(self.lora_B @ self.lora_A * scale, requantize, x)
        else:
            half = isinstance(base, HalfLinear)
            weight = base.weight + self.lora_B @ self.lora_A * scale
            new = full_linear(weight, base.bias, x.device, x.dtype if half else base.weight.dtype)
            if requantize and half:
                new = HalfLinear.from_linear(new, dtype=base.weight.dtype)
        training, self.training = self.training, False                  # turns dropout off for the comparison
        try:
            off = (new(x).float() - self(x).float()).abs()
        finally:
            self.training = training
        return new.requires_grad_(False), {'max': off.max().item(), 'mean': off.mean().item()}

    def extra_repr(self):
        return f'rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}'


def full_linear(weight, bias, device, dtype):
    """nn.Linear with copies of weight and bias (or None)."""
    return _copied(nn.Linear(*weight.shape[::-1], bias is not None, device=device, dtype=dtype), weight, bias)


def _copied(new, weight, bias):
    """Copy weight and bias into the module `new`; returns it."""
    with torch.no_grad():
        new.weight.copy_(weight)
        if bias is not None:
            new.bias.copy_(bias)
    return new


# ---------------------------------------------------------------------------------------------------------------------
# the formats; functions that create a layer, convert a model and pack a model


class Format(NamedTuple):
    """A weight format: the modules that replace nn.Linear, nn.Conv2d and nn.Embedding (None: no replacement) and the options to
    create them with. trains: can be trained from random weights, so trainers offer it; else it needs trained weights. act: its
    modules accept act=. chunks: its modules accept chunks=, which gives each of several stacked matrices its own statistic.

    A linear module has kind (its name in FORMATS), bits, in_features and out_features. Optional methods: from_linear(linear,
    **options), if it is not created like nn.Linear; look_up(ids), which returns rows (n, in) of the packed weight."""
    linear: type
    conv: type | None = None
    embedding: type | None = None
    options: dict = {}
    trains: bool = False
    act: bool = False
    chunks: bool = False


# Every weight format, by name. Each comment gives the weight in the forward pass, then the size of a packed weight.
# pretrained/formats.py adds group and sparse.
FORMATS = {
    # full precision: 32 bits
    'fp': Format(nn.Linear, nn.Conv2d, trains=True),
    # {0,1} by `w > mean(w)`, the output is normalized: 1 bit, and alpha (if alpha=None, -1/2 or 1/2 without normalization)
    'bin': Format(BinaryLinear, BinaryConv2d, BinaryEmbedding, trains=True, act=True, chunks=True),
    # {-1,0,1} * mean|w|; the input is int8, after RMSNorm (except in a convolution): 2 bits, one scale
    'tern': Format(TernaryLinear, TernaryConv2d, trains=True, act=True, chunks=True),
    # 16 even levels between -absmax and absmax of 16 weights: 4 bits, fp16 per group
    'int4': Format(Linear4bit, Conv4bit, options=dict(format='uniform'), trains=True, act=True),
    # 16 normal quantiles times the absmax of 64 weights: 4 bits, fp16 per group
    'nf4': Format(Linear4bit, options=dict(format='nf4'), act=True),
    # 16 fitted levels times a signed scale of 32 weights: 4 bits, 8 bits per group
    'fit4': Format(Linear4bit, options=dict(format='fit4'), act=True),
    # 255 levels between -absmax and absmax of a row: 8 bits, fp32 per row
    'int8': Format(Int8Linear, act=True),
    # fp16 or bf16: 16 bits
    'half': Format(HalfLinear),
    # A diag(c) B: 32 bits, but fewer numbers
    'lowrank': Format(LowRankLinear),
    # any frozen linear layer + B A: the size of the base, and fp32 adapters
    'lora': Format(LoRALinear),
}
KINDS = tuple(name for name, form in FORMATS.items() if form.trains)


def is_linear(module):
    """True for nn.Linear and the linear modules of all formats except LoRA, which wraps them."""
    return isinstance(module, tuple(form.linear for name, form in FORMATS.items() if name != 'lora'))


def linear(kind, in_features, out_features, bias=True, *, chunks=1, act=None, **options):
    """Create a linear layer of one of FORMATS, except lowrank and lora, which need another layer. chunks is ignored for a kind
    without statistics per matrix: there it changes nothing. Raises ValueError for another kind, for act with a kind that does
    not accept it, and for options with fp."""
    made = {name: form for name, form in FORMATS.items() if name not in ('lowrank', 'lora')}
    if kind not in made or act is not None and not made[kind].act or kind == 'fp' and options:
        raise ValueError(f'kind={kind!r} must be one of {", ".join(made)}; act is for '
                         f'{", ".join(name for name in made if made[name].act)}, and fp takes no options (got act={act!r}, '
                         f'{options})')
    form = made[kind]
    inside = ({'act': act} if form.act else {}) | ({'chunks': chunks} if form.chunks else {})
    return form.linear(in_features, out_features, bias, **form.options | inside | options)


def conv2d(kind, *shape, act=None, **options):
    """Create a convolution of one of FORMATS; shape and options as in nn.Conv2d. Raises ValueError for a kind without
    convolution, or for act with fp."""
    made = {name: form for name, form in FORMATS.items() if form.conv}
    if kind not in made or act is not None and not made[kind].act:
        raise ValueError(f'kind={kind!r} must be one of {", ".join(made)}; use fp without act')
    form = made[kind]
    return form.conv(*shape, **form.options | ({'act': act} if form.act else {}) | options)


def matching(names, pattern):
    """The names that match a glob pattern."""
    return [name for name in names if fnmatch.fnmatchcase(name, pattern)]


def set_module(model, name, new):
    """Replace the module `name` by the module `new`, and give it the same mode (training or evaluation)."""
    parent, _, leaf = name.rpartition('.')
    setattr(model.get_submodule(parent), leaf, new.train(model.get_submodule(name).training))


def as_kind(module, kind, options, packed):
    """A layer of `kind` with the weights of `module`, or a function that creates it, or None if there is no such layer."""
    form, bias = FORMATS[kind], getattr(module, 'bias', None)
    if kind == 'lora':
        options = dict(options)
        base, base_options = _rule(options.pop('base', 'fp'))
        if base == 'fp' and is_linear(module):
            LoRALinear(nn.Linear(1, 1), **options)  # raises for wrong options before LoRA freezes and packs the layer
            return partial(LoRALinear, module, **options)
        base = None if base == 'fp' else as_kind(module, base, base_options, True)
        return LoRALinear(base, **options) if is_linear(base) else None
    if isinstance(module, nn.Linear):
        if hasattr(form.linear, 'from_linear'):
            return form.linear.from_linear(module, **options)
        make = partial(linear, kind, module.in_features, module.out_features, bias is not None, **options)
        if packed:
            with torch.device('meta'):
                new = make()
            if {name for name, _ in new.named_parameters()} <= {'weight', 'bias'}:
                new.weight = module.weight          # encodes the weight without copying it
                new.bias = None if bias is None else nn.Parameter(bias.detach().clone())
                return new.pack_()
    elif isinstance(module, nn.Conv2d) and form.conv and module.padding_mode == 'zeros':
        m = module
        make = partial(conv2d, kind, m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, m.dilation, m.groups,
                       bias is not None, **options)
    elif isinstance(module, nn.Embedding) and form.embedding and module.max_norm is module.padding_idx is None:
        make = partial(form.embedding, module.num_embeddings, module.embedding_dim, **form.options | options)
    else:
        return None
    new = _copied(make().to(module.weight.device, module.weight.dtype), module.weight, bias)
    return new.pack_() if packed else new


def _rule(rule):
    return (rule, {}) if isinstance(rule, str) else rule


def convert(model, rules, verbose=True, packed=False):
    """Replace nn.Linear, nn.Conv2d and nn.Embedding modules in place, with copies of the parameters; returns their names.

    rules: {glob over module names: kind or (kind, options)}; the first match decides. Example:
    {'lm_head': 'fp', 'blocks.*.mlp.*': 'tern', '*': ('bin', dict(alpha=0.5))}. Low-bit layers are trainable until pack(); with
    packed=True they are packed immediately. ('lora', dict(rank=8, base='nf4')) puts LoRA over a packed nf4 layer. Without base
    it wraps the present layer, which may be low-bit. Layers without LoRA stay trainable: see only_adapters(). Prints each
    converted layer, and each other layer with the reason. Raises ValueError for a pattern without a match or an unknown kind.
    """
    rules = {pattern: _rule(rule) for pattern, rule in rules.items()}
    inside = tuple(f'{n}.' for n, m in model.named_modules() if isinstance(m, LoRALinear))
    candidates = {n: m for n, m in model.named_modules(remove_duplicate=False)
                  if (is_linear(m) or isinstance(m, nn.Conv2d | nn.Embedding)) and not n.startswith(inside)}
    if '' in candidates:
        raise ValueError('convert: a bare layer cannot be replaced in place; wrap it in nn.Sequential or use linear()')
    rule_of = {}
    for pattern, (kind, options) in rules.items():
        for k in {kind, _rule(options.get('base', 'fp'))[0] if kind == 'lora' else kind}:
            if k not in FORMATS:
                raise ValueError(f'convert: kind {k!r} of rule {pattern!r} must be one of {tuple(FORMATS)}; group and sparse '
                                 'are added by: import pretrained.formats')
        names = matching(candidates, pattern)
        if not names:
            raise ValueError(f'convert: rule {pattern!r} matches none of {list(candidates)}')
        rule_of = dict.fromkeys(names, (kind, options)) | rule_of
    uses = Counter(id(m.weight) for m in candidates.values() if getattr(m, 'weight', None) is not None)
    made, left = {}, {}
    for name, module in candidates.items():
        kind, options = rule_of.get(name, ('fp', {}))
        if kind == 'fp':
            left[name] = 'fp by rule or no rule'
        elif uses[id(getattr(module, 'weight', None))] > 1:
            left[name] = 'its weight is tied to another module'
        else:
            try:
                new = as_kind(module, kind, options, packed)
            except (TypeError, ValueError) as e:
                raise ValueError(f'convert: {name} -> {kind} {options}: {e}') from e
            if new is None:
                base = options.get('base') if kind == 'lora' else None
                left[name] = f'no {kind} form of {type(module).__name__}' + (f' with base={base!r}' if base else '')
            else:
                made[name] = new
    for name, new in made.items():                  # only now, so that an error above leaves the model unchanged
        set_module(model, name, new() if isinstance(new, partial) else new)
    for module in model.modules():                  # an in-place activation overwrites an output that a low-bit layer saves
        if made and getattr(module, 'inplace', False):
            module.inplace = False
    if verbose:
        for name in made:
            print(f'convert: {name} -> {rule_of[name][0]}')
        for name, why in left.items():
            print(f'convert: {name} left ({why})')
    return list(made)


def pack(model):
    """Pack every low-bit layer of the model in place, see LowBit.pack_(); returns the model."""
    for module in model.modules():
        if isinstance(module, LowBit):
            module.pack_()
    return model


def ramp(model):
    """Let the low-bit layers of the model train on the mix (1 - share) W + share Q(W) of latent and rounded weights, which
    phases the rounding in (arXiv 2502.11895).

    For a binary layer W is moved and scaled to the mean and the mean deviation of its bits. The gradient of the mix passes to
    W unchanged. Biases and activations are rounded from the start, and ternary products are not in int8. In evaluation
    mode and when packed the layers use Q(W). Returns share, fp32 () on the device of the layers, at first 0: fill it before
    each step, but not between a forward pass and its backward pass. Call it when the model is converted and on its device.
    """
    low = [m for m in model.modules() if isinstance(m, LowBit) and not m.packed]
    share = torch.zeros((), device=low[0].weight.device if low else None)
    for module in low:
        module.share = share
    return share


def model_bytes(model):
    """(packed, fp32) bytes of all parameters. packed: low-bit layers packed, the rest in their dtype; fp32: all in fp32."""
    low = [m for m in model.modules() if isinstance(m, LowBit)]
    inside = {id(p) for m in low for p in m.parameters(recurse=False)}
    rest = [p for p in model.parameters() if id(p) not in inside]
    latent = sum(math.prod(m.shape) for m in low if m.packed)
    latent += sum(m.shape[m.bias_dim] for m in low if hasattr(m, 'packed_bias'))
    return (sum(m.packed_bytes() for m in low) + sum(p.numel() * p.element_size() for p in rest),
            4 * (sum(p.numel() for p in model.parameters()) + latent))
