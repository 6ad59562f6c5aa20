"""
The products of layers.py and conv.py with their gradients by hand: autograd functions that keep as little as the exact gradient
allows, and what they share.

    straight_through(w, q)                        q forward, identity to w backward
    normalize(z, alpha, ndim, eps)                alpha * (z - mean) / (std + eps), from its own output backward
    quantized_linear(x, w, b, alpha, ...)         a product with a rounded weight, made again in the backward pass
    quantized_conv(x, w, b, alpha, ...)           the same of a convolution
    ternary_linear(x, w, b, gain, ...)            RMSNorm, int8 activations, ternary weights
    frozen_linear(x, b, decoder, ...)             a product with a decoded weight, block by block, nothing kept
"""
import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from quant import quantize_rows, wide


def compute_dtype(x):
    """What a matmul of x would run in: autocast's dtype inside autocast, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


ACTIVATIONS = {None: (lambda x: x, lambda g, x: g),
               'relu': (F.relu, lambda g, x: torch.ops.aten.threshold_backward(g, x, 0)),
               'gelu': (F.gelu, torch.ops.aten.gelu_backward)}      # name: (forward, backward(grad, input))


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


# Gated ones, of a gate and a value side by side: (..., 2 n) -> (..., n)
GATED = {'relu2_glu': (_relu2_glu, _relu2_glu_backward), 'silu_glu': (_silu_glu, _silu_glu_backward)}
EVERY_ACTIVATION = ACTIVATIONS | GATED
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
    rows = (len(x) if not wanted or x.device.type != 'cpu' or torch.compiler.is_compiling() else
            max(1024 if x.dim() == 2 else 1, 2 ** 18 // max(1, math.prod(x.shape[1:]))))  # a product wants many rows
    return [slice(i, i + rows) for i in range(0, len(x), rows)] if len(x) > rows else [slice(None)]


def _normalize(z, alpha, ndim, eps):
    """(y, rstd): y = alpha * (z - mean) / (std + eps) over the last `ndim` dimensions, population std; rstd = 1 / std."""
    if z.device.type != 'cpu':
        u, _, rstd = torch.native_layer_norm(wide(z), z.shape[-ndim:], None, None, TINY_VAR)
        return u.mul_(alpha / (1 + eps * rstd)), rstd                       # 1/(std + eps) = rstd / (1 + eps rstd)
    dims = tuple(range(-ndim, 0))                   # there layer_norm is slower, most of all for short rows
    u = wide(z)
    u = u - u[(..., *[slice(1)] * ndim)]            # else the mean of equal numbers is off by a rounding, and std far below eps
    u -= u.mean(dims, keepdim=True)
    norm = u
    for dim in reversed(dims):                      # one after the other: it sums millions of squares with an error of 1e-4
        norm = torch.linalg.vector_norm(norm, dim=dim, keepdim=True)
    rstd = norm.square_().div_(math.prod(z.shape[-ndim:])).add_(TINY_VAR).rsqrt_()
    return u.mul_(rstd / (1 + eps * rstd)).mul_(alpha), rstd


def _normalize_backward(g, y, rstd, alpha, ndim, eps):
    """(dz, dalpha) from dy and y itself, which the next operation mostly keeps anyway: z need not be kept.

    With u = y / alpha and g' = alpha * dy:  dz = (g' - mean(g') - u mean(g' u) (std + eps) / std) / (std + eps).
    """
    g, u = wide(g), wide(y) / alpha
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
        y, rstd = torch.empty_like(z), torch.empty(*z.shape[:-ndim], *[1] * ndim, dtype=wide(z[:0]).dtype, device=z.device)
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
            rstd = torch.empty(len(x), len(alpha), 1, dtype=wide(x[:0]).dtype, device=x.device)
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
        broad = wide(g[:0]).dtype
        wq, _ = ctx.quantize(w, b, x.dtype)
        gx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        gw, gb, galpha = (torch.zeros_like(t, dtype=broad) if need and t is not None else None
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
                gb += dz.sum(0, dtype=broad)
            if gw is not None:
                _add_product(gw, dz, forward(x[rows]))
            if gx is not None:
                gx[rows] = backward(dz @ wq, x[rows])                       # (rows, out) @ (out, in)
        gw, gb, galpha = (t if t is None else t.to(p.dtype) for t, p in ((gw, w), (gb, b), (galpha, alpha)))
        return gx, gw, gb, galpha, None, None, None


class _QuantizedConv(torch.autograd.Function):
    """y = conv2d(act(x), wq, bq), and _normalize of that over the channels of each pixel, the pixels of each channel or the
    whole example when alpha (out,) is given; round_input: act(x) rounded to int8 by the largest of each example, straight
    through. `wq, bq = quantize(w, b, dtype)`; conv: its stride, padding, dilation (pairs) and groups.

    Keeps x, w, b and, with alpha, y and 1 / std; wq and act(x) are made again.
    """
    @staticmethod
    def forward(ctx, x, w, b, alpha, quantize, act, round_input, norm, eps, conv):
        wq, bq = quantize(w, b, x.dtype)
        y, rstd = F.conv2d(_conv_input(x, act, round_input), wq, bq, **conv), None
        if alpha is not None:
            alpha = _away_from_zero(alpha)
            z, ndim = _by_norm(y, norm), 2 if norm == 'sample' else 1
            scale = alpha if norm == 'channel' else alpha[:, None]
            rstd = torch.empty(*z.shape[:-ndim], *[1] * ndim, dtype=wide(z[:0]).dtype, device=z.device)
            for i in _blocks(z):
                z[i], rstd[i] = _normalize(z[i], scale, ndim, eps)             # in place of the product
            y = _from_norm(z, y.shape, norm)
        keep_x = ctx.needs_input_grad[1] or act is not None and ctx.needs_input_grad[0]
        ctx.save_for_backward(x if keep_x else None, w, b, alpha, rstd, None if alpha is None else y)
        ctx.quantize, ctx.act, ctx.round_input, ctx.norm, ctx.eps, ctx.conv = quantize, act, round_input, norm, eps, conv
        ctx.x_shape, ctx.dtype = x.shape, x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, w, b, alpha, rstd, y = ctx.saved_tensors
        need_x, need_w, need_b, need_alpha = ctx.needs_input_grad[:4]
        galpha = None
        if alpha is not None:
            scale = alpha if ctx.norm == 'channel' else alpha[:, None]
            g, rows = _by_norm(g, ctx.norm), _by_norm(y, ctx.norm)
            dz, galpha = torch.empty_like(rows), torch.zeros_like(scale, dtype=rstd.dtype)
            for i in _blocks(rows):
                dz[i], part = _normalize_backward(g[i], rows[i], rstd[i], scale, 2 if ctx.norm == 'sample' else 1, ctx.eps)
                galpha += part
            g = _from_norm(dz, y.shape, ctx.norm)
            galpha = galpha.view(alpha.shape).to(alpha.dtype) if need_alpha else None
        wq, bq = ctx.quantize(w, b, ctx.dtype)
        # its layout is that of the gradient, whether or not its numbers are needed
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
    """(N, C, H, W) with what is normalised last: (N H W, C), a view of a channels_last tensor, or (N, C, H W)."""
    return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]) if norm == 'channel' else z.flatten(2)


def _from_norm(rows, shape, norm):
    return rows.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2) if norm == 'channel' else rows.view(shape)


def _add_product(total, g, x):
    """total (out, in) += g (rows, out).T @ x (rows, in), without a temporary where the dtypes allow."""
    if total.dtype == g.dtype:
        total.addmm_(g.T, x)
    else:
        total += g.T @ x


# Without the int8 dot-product instructions torch._int_mm can be slower than the float product by far. Asked once, here:
# torch.compile cannot trace the question.
FAST_INT8_CPU = getattr(torch.cpu, '_is_vnni_supported', lambda: False)()


def has_fast_int8(device):
    return device.type == 'cpu' and FAST_INT8_CPU


class _TernaryLinear(torch.autograd.Function):
    """y (N, out) = int8(gain * RMSNorm(act(x))) @ ternary(w).T * scales + b.

    x (N, in), or (N, 2 in) where act is gated. Keeps x, the int8 codes of the normalised input and per-token scalars:
    dL/dw = dy.T @ (codes * scale) exactly. `codes, scales = weights(w)` gives the ternary weight, a scale for each of
    `rows` rows. norm=False: x is normalised already.
    The product of the codes is exact in int32, and in fp32 too as long as |sum| <= 128 * in < 2**24; under autocast it is
    rounded to bf16 like any other product there.
    """
    @staticmethod
    def forward(ctx, x, w, b, gain, weights, rows, norm, eps, act, dtype):
        q = x.new_empty(len(x), x.shape[1] // (1 + (act in GATED)), dtype=torch.int8)       # (N, in)
        sx = wide(x[:, :1]).new_empty(len(x), 1)
        rstd = torch.empty_like(sx) if norm else None
        for i in _blocks(x):
            a = wide(EVERY_ACTIVATION[act][0](x[i]))
            if norm:
                rstd[i] = (torch.linalg.vector_norm(a, dim=-1, keepdim=True).square() / a.shape[-1] + eps).rsqrt()
                a = a * rstd[i] if gain is None else (a * rstd[i]).mul_(gain)
            q[i], sx[i] = quantize_rows(a)
        t, sw = weights(w)                                                  # (out, in) int8, (chunks,)
        if has_fast_int8(q.device) and min(*q.shape, len(t)) > 1:          # size-1 strides: pytorch/pytorch#195066
            z, sx_z = torch._int_mm(q, t.T), sx                             # int32 (N, out)
        else:
            shrink = 2 ** -10 if dtype == torch.float16 else 1              # fp16 ends at 65504; the sums need not
            z, sx_z = F.linear(q.to(dtype) * shrink, t.to(dtype)), sx / shrink
        y = z * (sx_z * sw) if len(sw) == 1 else (z * sx_z).mul_(_of_rows(sw, rows))
        if b is not None:
            y += b
        ctx.save_for_backward(x if norm or act else None, w, gain, q, sx, rstd)
        ctx.weights, ctx.rows, ctx.act, ctx.x_dtype, ctx.x_shape = weights, rows, act, x.dtype, x.shape
        return y.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, w, gain, q, sx, rstd = ctx.saved_tensors
        forward, backward = EVERY_ACTIVATION[ctx.act]
        need_w, need_x = ctx.needs_input_grad[1], ctx.needs_input_grad[0] or ctx.needs_input_grad[3]
        gb = g.sum(0, dtype=torch.promote_types(g.dtype, torch.float32)) if ctx.needs_input_grad[2] else None
        gx = q.new_empty(ctx.x_shape, dtype=ctx.x_dtype) if need_x else None
        gw = torch.zeros_like(w, dtype=sx.dtype) if need_w else None
        ggain = None if gain is None else torch.zeros_like(gain, dtype=sx.dtype)
        if need_x:
            t, sw = ctx.weights(w)
            wq = (t * _of_rows(sw, ctx.rows)[:, None]).to(g.dtype)
        for i in _blocks(q):
            if need_w:
                _add_product(gw, g[i], (q[i] * sx[i]).to(g.dtype))
            if need_x:
                h = wide(g[i] @ wq)                                        # gradient at the quantizer = at its input
                if rstd is not None:                                        # RMSNorm: n = gain * u, u = a * rstd
                    u = wide(forward(x[i])) * rstd[i]
                    p = h * u
                    if gain is None:
                        along = p.sum(-1, keepdim=True)
                    else:
                        ggain += p.sum(0)
                        along = (p @ gain.to(p.dtype)).unsqueeze(-1)
                        h.mul_(gain)
                    h.addcmul_(u, along, value=-1 / u.shape[-1]).mul_(rstd[i])      # (h - u mean(u h)) * rstd
                gx[i] = h if ctx.act is None else backward(h.to(ctx.x_dtype), x[i])
        gw = gw.to(w.dtype) if need_w else None
        return gx, gw, gb, ggain if gain is None else ggain.to(gain.dtype), None, None, None, None, None, None


def _of_rows(scales, rows):
    """(sum(rows),): each of the scales (len(rows),) as often as it has rows."""
    return torch.cat([s.expand(n) for s, n in zip(scales.unbind(), rows, strict=True)])


class _FrozenLinear(torch.autograd.Function):
    """y (N, out) = x (N, in) @ W.T + b for a W that is not trained: decoder() gives a function weights(i, j) for its rows
    i .. j - 1 in x's dtype.

    A block of rows at a time, so that the decoded weight never exists whole and stays in the cache. Keeps nothing, not
    even what the decoder works with.
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
            gx = g[:, i:j] @ weights(i, j)
            gx = wide(gx) if rest else gx                                   # a sum in bf16 is rounded at each block
            for i, j in rest:
                if gx.dtype == g.dtype:
                    gx.addmm_(g[:, i:j], weights(i, j))
                else:
                    gx += g[:, i:j] @ weights(i, j)
            gx = gx.to(g.dtype)
        gb = g.sum(0, dtype=wide(g[:0]).dtype).to(g.dtype) if ctx.needs_input_grad[1] else None
        return gx, gb, None, None, None


def _row_blocks(shape, x, multiple=1):
    """[(i, j), ...] over the rows of a weight of this shape; on the CPU of 1 MB for each thread."""
    rows, columns = shape
    if torch.compiler.is_compiling():
        return [(0, rows)]
    most = (min(16, torch.get_num_threads()) << 20) // x.element_size() if x.device.type == 'cpu' else 1 << 26
    step = max(1, most // columns // multiple) * multiple
    return [(i, min(i + step, rows)) for i in range(0, rows, step)]


def frozen_linear(x, bias, decoder, shape, multiple=1, product=None):
    """_FrozenLinear over x (..., in) in the compute dtype; bias is cast to it. product(x (N, in)) may give x W^T at once,
    or None."""
    dtype = compute_dtype(x)
    flat = x.reshape(-1, shape[1]).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    y = _FrozenLinear.apply(flat, bias, decoder, _row_blocks(shape, flat, multiple), product)
    return y.view(*x.shape[:-1], shape[0])


straight_through = _StraightThrough.apply
normalize = _Normalize.apply
quantized_linear = _QuantizedLinear.apply
quantized_conv = _QuantizedConv.apply
ternary_linear = _TernaryLinear.apply
