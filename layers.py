"""
Layers whose weights take 1, 1.58, 4, 8 or 16 bits, for training and packed for keeping; LoRA over any of them.

    kind     class            weight used in the forward pass                            packed
    bin      BinaryLinear     {0,1} by `w > mean(w)`; the output is normalised           1 bit  + alpha
    tern     TernaryLinear    {-1,0,1} * mean|w|; the input is RMSNormed, then int8      2 bits + one scale
    int4     Linear4bit       16 even levels between -absmax and absmax of 16 weights    4 bits + fp16 per group
    nf4      Linear4bit       16 normal quantiles times the absmax of 64 weights         4 bits + fp16 per group
    fit4     Linear4bit       16 fitted levels times a signed scale of 32 weights        4 bits + 8 per group
    int8     Int8Linear       255 levels between -absmax and absmax of a row             8 bits + fp32 per row
    group    GroupLinear      8, 4, 3, 2, 1.58 or 1 bits, a zero too (grouped.py)        + fp16 per group
    half     HalfLinear       fp16 or bf16                                               16 bits
    sparse   SparseLinear     a full-precision one in which many weights are 0 (same)    1 bit + 32 for what is not 0
    lowrank  LowRankLinear    A diag(c) B                                                32 bits, fewer numbers
    lora     LoRALinear       any of the above, frozen, + B A of its own                 as its base, + fp32 adapters
    fp       nn.Linear        as it is                                                   32 bits

and BinaryEmbedding; convolutions are in conv.py. The first seven keep latent full-precision weights while training and
let the gradient pass straight through the rounding (dL/dw := dL/dw_q). `layer.pack_()` drops the latent weights for
packed codes; the same forward arithmetic then runs on the unpacked codes, so packing changes no logit.

Straight-through training usually needs MORE memory than fp training, because autograd keeps the rounded weight and
every intermediate of the normalisation. Here the rounded weight is made again in the backward pass, the normalisation
is undone from its own output, the ternary layer keeps the int8 activations its weight gradient is made of, and
`act='gelu'` folds the activation in front of a layer into it, so that it is made again rather than kept. A frozen layer
keeps nothing for its backward pass and, but under torch.compile, never holds more than a block of its decoded weights.

What low-bit modules share is in lowbit.py, what turns weights into codes in quant.py, the products and their gradients
in functional.py, adapters' files in adapters.py. Read here: low-bit modules; half, low rank and
LoRA; convert() and pack(); files.
"""
import fnmatch
import json
import math
import os
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import atomic_write, checksum
from conv import BinaryConv2d, Conv4bit, TernaryConv2d, conv2d  # noqa: F401  one place to import layers from
from functional import (ACTIVATIONS, EVERY_ACTIVATION, compute_dtype, frozen_linear, has_fast_int8, normalize,
                        quantized_linear, straight_through, ternary_linear)
from lowbit import Activation, Binary, FourBit, LowBit, all_finite, in_blocks  # noqa: F401  for who imports layers
from pretrained.formats import GroupLinear, SparseLinear
from quant import decode4, half_bits, pack_bits, product4, quantize_rows, scales4, ternarize, unpack_bits, wide

# ---------------------------------------------------------------------------------------------------------------------
# modules


class BinaryLinear(Binary, nn.Module):
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

    def merged(self, delta, requantize, x):
        if not requantize:
            raise ValueError('BinaryLinear: its output is normalised, which no full-precision layer does; type requantize=True')
        return super().merged(delta, requantize, x)

    def _latent_change(self, delta, x):
        # y = alpha (z - mean z) / std z: what is to add delta x to y adds std / alpha times as much to z
        z = F.linear(self.weight_input(x).reshape(-1, self.in_features).float(), *self._weights(torch.float32))
        std = z.unflatten(-1, (self.chunks, -1)).std(-1, unbiased=False).mean(0)
        alpha = self.alpha.expand(-1, self.out_features // self.chunks)
        return (delta.unflatten(0, (self.chunks, -1)) * (std[:, None] / alpha).unsqueeze(-1)).flatten(0, 1)

    def _quantize(self, weight, bias, dtype):
        if self.packed:
            return self._weights(dtype)
        return half_bits(weight, self.chunks, dtype), None if bias is None else half_bits(bias, self.chunks, dtype)

    def forward(self, x):
        flat = x.reshape(-1, self.in_features).to(compute_dtype(x))
        y = quantized_linear(flat, self.weight, self.bias, self.alpha, self._quantize, self.act, self.eps)
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self):
        return f'{self.in_features}, {self.out_features}, chunks={self.chunks}, act={self.act}, packed={self.packed}'


class BinaryEmbedding(Binary, nn.Module):
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
            e = straight_through(rows, (wide(rows) > wide(self.weight).mean()).to(rows.dtype) - 0.5)
            if self.bias is not None:
                e = e + straight_through(self.bias, half_bits(self.bias))
        return normalize(e, self.alpha, 1, self.eps)

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
    scale per chunk, and chunks=(8, 4, 4) are 3 of these many rows. act='relu2_glu' (relu(gate)^2 * up, as b1.58-2B-4T has)
    and 'silu_glu' take x = [gate | up] (..., 2 in). Raises ValueError for chunks that do not make up `out`, an unknown
    scale or act, or in > 131071 (the fp32 product of the codes would no longer be exact).
    """
    kind, bits = 'tern', 2

    def __init__(self, in_features, out_features, bias=False, *, chunks=1, scale='mean', norm=True, act=None, eps=1e-5):
        super().__init__()
        rows = (out_features // chunks,) * chunks if isinstance(chunks, int) else tuple(chunks)
        if (sum(rows) != out_features or min(rows) < 1 or scale not in ('mean', 'median') or act not in EVERY_ACTIVATION
                or in_features >= 2 ** 17):
            raise ValueError(f'TernaryLinear({in_features}, {out_features}): chunks={chunks} must make up out_features, '
                             f"scale={scale!r} be 'mean' or 'median', act={act!r} in {list(EVERY_ACTIVATION)}, in < 131072")
        self.in_features, self.out_features, self.shape = in_features, out_features, (out_features, in_features)
        self.chunks, self.rows, self.scale, self.norm, self.act, self.eps = chunks, rows, scale, norm, act, eps
        self.weight = nn.Parameter(torch.empty(out_features, in_features).normal_(std=in_features ** -0.5))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.gain = nn.Parameter(torch.ones(in_features)) if norm else None

    def ternary(self, _=None):
        """(codes int8 (out, in), scales fp32, one for each chunk)."""
        if self.packed:
            return unpack_bits(self.code, 2, self.in_features).to(torch.int8).sub_(1), self.weight_scale
        return ternarize(self.weight.detach(), self.chunks, self.scale)

    def encode(self):
        codes, scales = self.ternary()
        return {'code': pack_bits(codes + 1, 2), 'weight_scale': scales}

    def decode(self):
        # A latent of code * scale / share has mean|W| = scale again when `share` of the codes are not 0.
        return self._latent_change(self.effective_weight()), None

    def effective_weight(self):
        codes, scales = self.ternary()
        return torch.cat([part * s for part, s in zip(codes.split(self.rows), scales, strict=True)])

    def _latent_change(self, delta, _=None):
        if self.scale == 'median':
            return delta
        shares = (part.ne(0).float().mean().clamp_(min=1e-9) for part in self.ternary()[0].split(self.rows))
        return torch.cat([part / share for part, share in zip(delta.split(self.rows), shares, strict=True)])

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

    def forward(self, x):
        weights = self.ternary if self.packed else partial(ternarize, chunks=self.chunks, scale=self.scale)
        y = ternary_linear(x.reshape(-1, x.shape[-1]), self.weight, self.bias, self.gain, weights, self.rows, self.norm,
                           self.eps, self.act, compute_dtype(x))
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self):
        return (f'{self.in_features}, {self.out_features}, chunks={self.chunks}, scale={self.scale}, norm={self.norm}, '
                f'act={self.act}, packed={self.packed}')


class Linear4bit(FourBit, nn.Module):
    """Linear layer with 4-bit weights, trained through the rounding or, after pack_(), frozen; (..., in) -> (..., out).

    format: 'uniform' (the course's BigNet: levels u / 15 * 2n - n), 'nf4' (arXiv 2305.14314), 'fit4' (quant.py; the least
    error on normal weights, at ten times the encoding time; for weights with outliers take nf4, which has a level at 0).
    `group` weights of the flattened matrix share a scale (0: 16, 64, 32), kept as scales='fp16', 'fp32', '8bit' (double
    quantization, per 256 groups) or, for fit4, 'log8'. The bias stays as it is. Packed buffers:
    code uint8, absmax, absmax_top. Raises ValueError for an unknown format or scales, a group that is not even, an
    unknown act, and in pack_() for weights that are not finite or beyond the scale's range.
    """
    def __init__(self, in_features, out_features, bias=True, *, format='uniform', group=0, scales='', act=None):
        super().__init__()
        if act not in ACTIVATIONS:
            raise ValueError(f'Linear4bit: act={act!r} must be in {list(ACTIVATIONS)}')
        self._set_format(format, group, scales)
        self.in_features, self.out_features, self.shape = in_features, out_features, (out_features, in_features)
        self.act = act
        self.weight = nn.Parameter(torch.empty(out_features, in_features).normal_(std=in_features ** -0.5))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x):
        if not self.packed:
            flat = x.reshape(-1, self.in_features).to(compute_dtype(x))
            y = quantized_linear(flat, self.weight, self.bias, None, self._quantize, self.act, 0.0)
            return y.view(*x.shape[:-1], self.out_features)
        n, dtype = self.in_features, compute_dtype(x)

        def decoder():
            held = self._held()                     # 8-bit scales are decoded once, not once for each block
            held = {'absmax': scales4(held)} if self.scales == '8bit' else held
            flat = None

            def weights(i, j):                      # rows of whole groups, but for the last, which may be filled up
                nonlocal flat
                end = -(-j * n // self.group) * self.group
                flat = decode4(self.code, held, self.format, i * n, end, dtype, flat)
                return flat[:(j - i) * n].view(j - i, n)
            return weights
        return frozen_linear(self.weight_input(x), self.bias, decoder, self.shape, self.group // math.gcd(n, self.group),
                             lambda x: product4(x, self.code, self._held(), self.format, self.out_features))

    def extra_repr(self):
        return (f'{self.in_features}, {self.out_features}, format={self.format}, group={self.group}, scales={self.scales}, '
                f'act={self.act}, packed={self.packed}')


class Int8Linear(LowBit, nn.Module):
    """Linear layer with int8 weights, one fp32 absmax / 127 per output row; (..., in) -> (..., out).

    Trained through the rounding or, after pack_(), frozen. activations='int8' rounds the input as well, to an absmax per
    token (LLM.int8, arXiv 2208.07339, without its outlier columns); packed and on a CPU with int8 instructions, the
    product then runs in int8, exactly. Raises ValueError for other activations, and in pack_() for weights that are
    not finite.
    """
    kind, bits = 'int8', 8

    def __init__(self, in_features, out_features, bias=True, *, activations=None, act=None):
        super().__init__()
        if activations not in (None, 'int8') or act not in ACTIVATIONS or in_features >= 2 ** 17:
            raise ValueError(f"Int8Linear: activations={activations!r} must be None or 'int8', act={act!r} in "
                             f'{list(ACTIVATIONS)}, in={in_features} < 131072')
        self.in_features, self.out_features, self.shape = in_features, out_features, (out_features, in_features)
        self.activations, self.act = activations, act
        self.weight = nn.Parameter(torch.empty(out_features, in_features).normal_(std=in_features ** -0.5))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def encode(self):
        def part(rows):
            return dict(zip(('code', 'weight_scale'), quantize_rows(wide(rows), tiny=1e-30), strict=True))
        return in_blocks(part, self.weight)

    def decode(self):
        return self.code * self.weight_scale, None

    def _decoder(self, dtype):
        return lambda: lambda i, j: self.code[i:j].to(self.weight_scale.dtype).mul_(self.weight_scale[i:j]).to(dtype)

    @staticmethod
    def _quantize(weight, bias, dtype):
        codes, scales = quantize_rows(wide(weight), tiny=1e-30)
        return (codes * scales).to(dtype), None if bias is None else bias.to(dtype)

    def forward(self, x):
        dtype = compute_dtype(x)
        flat = x.reshape(-1, self.in_features).to(dtype)
        if not self.packed and not self.activations:
            y = quantized_linear(flat, self.weight, self.bias, None, self._quantize, self.act, 0.0)
            return y.view(*x.shape[:-1], self.out_features)
        flat = ACTIVATIONS[self.act][0](flat)
        if self.activations:
            codes, scales = quantize_rows(wide(flat.detach()))
            no_gradient = not (torch.is_grad_enabled() and x.requires_grad)
            if self.packed and no_gradient and has_fast_int8(x.device) and min(*codes.shape, self.out_features) > 1:
                y = torch._int_mm(codes, self.code.T) * scales * self.weight_scale.T
                return (y if self.bias is None else y + self.bias).to(dtype).view(*x.shape[:-1], self.out_features)
            flat = straight_through(flat, (codes * scales).to(flat.dtype))
        if self.packed:
            y = frozen_linear(flat, self.bias, self._decoder(dtype), self.shape)
        else:
            y = quantized_linear(flat, self.weight, self.bias, None, self._quantize, None, 0.0)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self):
        return (f'{self.in_features}, {self.out_features}, activations={self.activations}, act={self.act}, '
                f'packed={self.packed}')


# ---------------------------------------------------------------------------------------------------------------------
# half precision, low rank, LoRA


class HalfLinear(nn.Module):
    """Linear layer that keeps weight and bias in fp16 or bf16 and computes in its input's dtype; (..., in) -> (..., out).

    Frozen, or trained in its own dtype with trainable=True (its gradients are fp16 or bf16 as well). Raises ValueError for
    another dtype.
    """
    kind, bits = 'half', 16

    def __init__(self, in_features, out_features, bias=True, *, dtype=torch.float16, trainable=False):
        super().__init__()
        if dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f'HalfLinear: dtype={dtype} must be torch.float16 or torch.bfloat16')
        self.in_features, self.out_features, self.trainable = in_features, out_features, trainable
        self.weight = nn.Parameter(torch.empty(out_features, in_features).normal_(std=in_features ** -0.5).to(dtype), trainable)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), trainable) if bias else None

    def _decoder(self, dtype):
        return lambda: lambda i, j: self.weight[i:j].float().to(dtype)      # from fp16 to bf16 at once is five times slower

    def forward(self, x):
        dtype = compute_dtype(x)
        if self.weight.requires_grad:
            return F.linear(x.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))
        return frozen_linear(x, self.bias, self._decoder(dtype), self.weight.shape)

    def extra_repr(self):
        return f'{self.in_features}, {self.out_features}, dtype={self.weight.dtype}, trainable={self.trainable}'


class LowRankLinear(nn.Module):
    """y = ((x B^T) * c) A^T + b with A (out, rank), c (rank,), B (rank, in), all trainable; the weight is never formed.

    from_linear() takes them from a randomized SVD of a weight (arXiv 0909.4061: torch.svd_lowrank with 8 more columns and
    2 power iterations), the "weight reduction" of the rSVD experiments. Raises ValueError for rank < 1 or > min(in, out).
    """
    kind, bits = 'lowrank', 32

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
    def from_linear(cls, linear, rank, niter=2):
        """A LowRankLinear near nn.Linear `linear`; the random draw is torch's generator's."""
        new = cls(linear.in_features, linear.out_features, linear.bias is not None, rank=rank).to(linear.weight.device)
        if not torch.isfinite(linear.weight).all():
            raise ValueError('LowRankLinear: weights must be finite')
        with torch.no_grad():
            U, c, V = torch.svd_lowrank(linear.weight.float(), q=min(rank + 8, *linear.weight.shape), niter=niter)
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
        """Keep the `rank` largest singular values of A diag(c) B ("+ SVT" there, though nothing is thresholded): QR of
        A diag(c) and of B^T, SVD of the small core. Filled up with zeros to the old rank, so that an optimizer's state
        still fits; shrink=True leaves them out (make the optimizer anew). Returns the share of the squared norm kept."""
        if not 1 <= rank <= self.rank:
            raise ValueError(f'LowRankLinear: cannot truncate rank {self.rank} to {rank}')
        Qa, Ra = torch.linalg.qr((self.A * self.c).float())
        Qb, Rb = torch.linalg.qr(self.B.T.float())
        U, c, Vh = torch.linalg.svd(Ra @ Rb.T)
        kept = (c[:rank].square().sum() / c.square().sum().clamp(min=1e-30)).item()
        fill = 0 if shrink else self.rank - rank
        self._set(F.pad(Qa @ U[:, :rank], (0, fill)), F.pad(c[:rank], (0, fill)), F.pad(Vh[:rank] @ Qb.T, (0, 0, 0, fill)))
        return kept

    def forward(self, x):
        dtype = compute_dtype(x)
        A, c, B, bias = (t if t is None else t.to(dtype) for t in (self.A, self.c, self.B, self.bias))
        return F.linear(F.linear(x.to(dtype), B) * c, A, bias)

    def extra_repr(self):
        return f'{self.in_features}, {self.out_features}, rank={self.rank}'


class LoRALinear(nn.Module):
    """y = base(x) + alpha / rank * B A dropout(x): any linear layer, frozen, with A (rank, in) and B (out, rank) trained.

    arXiv 2106.09685: A kaiming-uniform, B zero, so that nothing changes at first. A low-bit base is packed. Where the base
    works on something else than x (a ternary layer's RMSNorm, a folded activation) the adapter sees that, as the weight
    does; over a binary base it adds to the normalised output. Adapters are fp32 and compute in the input's dtype. Raises
    ValueError for a base without in_features and out_features, rank < 1 or dropout outside [0, 1).
    """
    kind = 'lora'

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
        """What is added to base(x), (..., out) in the compute dtype."""
        x = self.base.weight_input(x) if isinstance(self.base, LowBit) else x
        dtype = compute_dtype(x)
        h = F.linear(F.dropout(x, self.dropout, self.training).to(dtype), self.lora_A.to(dtype))
        return F.linear(h * (self.alpha / self.rank), self.lora_B.to(dtype))

    def forward(self, x):
        y = self.base(x)
        return y + self.adapter(x).to(y.dtype)

    @torch.no_grad()
    def merge(self, x, requantize=False):
        """(layer, damage): one layer for base and adapter, and {'max', 'mean'} of |its output - this one's| on inputs x.

        A full-precision base gives nn.Linear. A quantized one gives its decoded weights plus the adapter in fp32 (behind
        the RMSNorm of a ternary one), or with requantize=True a packed layer of the same kind, which costs what it costs:
        look at the damage. A binary base only has requantize=True, since its output is normalised; its adapter is scaled
        to what reaches the output on x. A low-rank base takes the adapter's ranks, and drops as many with requantize=True.
        """
        delta = self.lora_B @ self.lora_A * (self.alpha / self.rank)
        base = self.base
        if isinstance(base, LowBit):
            new = base.merged(delta, requantize, x)
        elif isinstance(base, LowRankLinear):
            new = LowRankLinear(self.in_features, self.out_features, base.bias is not None, rank=base.rank).to(delta.device)
            new._set(torch.cat([base.A, self.lora_B * (self.alpha / self.rank)], 1), F.pad(base.c, (0, self.rank), value=1.0),
                     torch.cat([base.B, self.lora_A]))
            if base.bias is not None:
                new.bias.copy_(base.bias)
            if requantize:
                new.truncate(base.rank, shrink=True)
        else:
            new = nn.Linear(self.in_features, self.out_features, base.bias is not None, device=x.device,
                            dtype=x.dtype if isinstance(base, HalfLinear) else base.weight.dtype)
            new.weight.copy_(base.weight + delta)
            if base.bias is not None:
                new.bias.copy_(base.bias)
            if requantize and isinstance(base, HalfLinear):
                new = as_kind(new, 'half', {'dtype': base.weight.dtype}, True)
        training, self.training = self.training, False                  # no dropout while comparing
        try:
            off = (new(x).float() - self(x).float()).abs()
        finally:
            self.training = training
        return new.requires_grad_(False), {'max': off.max().item(), 'mean': off.mean().item()}

    def extra_repr(self):
        return f'rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}'


def _copied(new, old):
    """`new` with the weight and bias of `old`."""
    with torch.no_grad():
        new.weight.copy_(old.weight)
        if getattr(old, 'bias', None) is not None:
            new.bias.copy_(old.bias)
    return new


# ---------------------------------------------------------------------------------------------------------------------
# one entry each: make a layer, convert a model, pack a model, keep it in a file

KINDS = ('fp', 'bin', 'tern', 'int4')                                       # for training from scratch
COMPRESSED = ('half', 'int8', 'nf4', 'fit4', 'group', 'sparse', 'lowrank', 'lora')      # for what was trained


def linear(kind, in_features, out_features, bias=True, *, chunks=1, act=None, **options):
    """A linear layer of one of KINDS, or half, int8, nf4, fit4, group, sparse. Options a kind has no use for are dropped only
    where they change nothing: chunks without per-matrix statistics. Raises ValueError for an unknown kind, or act with fp."""
    if kind == 'bin':
        return BinaryLinear(in_features, out_features, bias, chunks=chunks, act=act, **options)
    if kind == 'tern':
        return TernaryLinear(in_features, out_features, bias, chunks=chunks, act=act, **options)
    if kind in ('int4', 'nf4', 'fit4'):
        options.setdefault('format', 'uniform' if kind == 'int4' else kind)
        return Linear4bit(in_features, out_features, bias, act=act, **options)
    if kind == 'int8':
        return Int8Linear(in_features, out_features, bias, act=act, **options)
    if kind in ('half', 'group', 'sparse') and act is None:
        make = {'half': HalfLinear, 'group': GroupLinear, 'sparse': SparseLinear}[kind]
        return make(in_features, out_features, bias, **options)
    if kind == 'fp' and act is None and not options:
        return nn.Linear(in_features, out_features, bias)
    raise ValueError(f'kind={kind!r} must be one of {KINDS}, half, nf4, fit4, int8, group or sparse; fp takes no act or '
                     f'options (got act={act!r}, {options})')


def _rule(rule):
    return (rule, {}) if isinstance(rule, str) else rule


def as_kind(module, kind, options, packed):
    """A layer of `kind` with the weights of `module`, or what makes it of `module` itself, or None where there is none."""
    bias = getattr(module, 'bias', None) is not None
    if kind == 'lora':
        options = dict(options)
        base, base_options = _rule(options.pop('base', 'fp'))
        if base == 'fp' and isinstance(module, LINEARS):
            LoRALinear(nn.Linear(1, 1), **options)  # an error in the options, before the layer itself is frozen and packed
            return partial(LoRALinear, module, **options)
        base = None if base == 'fp' else as_kind(module, base, base_options, True)
        return LoRALinear(base, **options) if isinstance(base, LINEARS) else None
    if isinstance(module, nn.Linear) and kind == 'lowrank':
        return LowRankLinear.from_linear(module, **options)
    if isinstance(module, nn.Linear) and kind == 'half':
        with torch.device('meta'):                  # no random weights in fp32 that nobody uses
            new = HalfLinear(module.in_features, module.out_features, bias, **options)
        new = _copied(new.to_empty(device=module.weight.device), module)
        if not all_finite(new.parameters()):
            raise ValueError(f'HalfLinear: weights must be finite and fit into {new.weight.dtype}')
        return new
    if isinstance(module, nn.Linear) and packed and kind in ('int4', 'nf4', 'fit4', 'int8', 'group', 'sparse'):
        with torch.device('meta'):                  # the weight itself is encoded, not a copy
            new = linear(kind, module.in_features, module.out_features, bias, **options)
        new.weight = module.weight
        new.bias = nn.Parameter(module.bias.detach().clone()) if bias else None
        return new.pack_()
    if isinstance(module, nn.Linear):
        new = linear(kind, module.in_features, module.out_features, bias, **options)
    elif isinstance(module, nn.Conv2d) and kind in KINDS and module.padding_mode == 'zeros':
        m = module
        new = conv2d(kind, m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, m.dilation, m.groups, bias,
                     **options)
    elif isinstance(module, nn.Embedding) and kind == 'bin' and module.max_norm is module.padding_idx is None:
        new = BinaryEmbedding(module.num_embeddings, module.embedding_dim, bias=True, **options)
    else:
        return None
    new = _copied(new.to(module.weight.device, module.weight.dtype), module)
    return new.pack_() if packed else new


def convert(model, rules, verbose=True, packed=False):
    """Replace nn.Linear, nn.Conv2d and nn.Embedding modules in place, weights and biases copied; returns their names.

    rules: {glob over module names: kind or (kind, options)}, the first match decides, e.g.
    {'lm_head': 'fp', 'blocks.*.mlp.*': 'tern', '*': ('bin', dict(alpha=0.5))}. Low-bit layers are trainable until pack(),
    or packed at once with packed=True. ('lora', dict(rank=8, base='nf4')) puts LoRA over a packed nf4 layer, with no base
    over what is there, low-bit layers included; what is not wrapped stays trainable: see only_adapters(). Prints what it
    converted and what it left and why. Raises ValueError for a pattern that matches nothing or an unknown kind.
    """
    rules = {pattern: _rule(rule) for pattern, rule in rules.items()}
    inside = tuple(f'{n}.' for n, m in model.named_modules() if isinstance(m, LoRALinear))
    candidates = {n: m for n, m in model.named_modules(remove_duplicate=False)
                  if isinstance(m, (*LINEARS, nn.Conv2d, nn.Embedding)) and not n.startswith(inside)}
    if '' in candidates:
        raise ValueError('convert: a bare layer cannot be replaced in place; wrap it in nn.Sequential or use linear()')
    uses = {}
    for m in candidates.values():
        if getattr(m, 'weight', None) is not None:
            uses[id(m.weight)] = uses.get(id(m.weight), 0) + 1
    for pattern, (kind, options) in rules.items():
        for k in {kind, _rule(options.get('base', 'fp'))[0] if kind == 'lora' else kind}:
            if k not in KINDS + COMPRESSED:
                raise ValueError(f'convert: kind {k!r} of rule {pattern!r} must be one of {KINDS + COMPRESSED}')
        if not fnmatch.filter(candidates, pattern):
            raise ValueError(f'convert: rule {pattern!r} matches none of {list(candidates)}')
    converted, left, made = {}, {}, {}
    for name, module in candidates.items():
        kind, options = next((rules[p] for p in rules if fnmatch.fnmatchcase(name, p)), ('fp', {}))
        if kind == 'fp':
            left[name] = 'fp by rule or no rule'
        elif uses.get(id(getattr(module, 'weight', None)), 0) > 1:
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
                made[name], converted[name] = new, kind
    for name, new in made.items():                  # all of them or, on an error, none
        parent, _, leaf = name.rpartition('.')
        new = new() if isinstance(new, partial) else new
        setattr(model.get_submodule(parent), leaf, new.train(candidates[name].training))
    for module in model.modules():                  # low-bit layers need their output in the backward pass
        if converted and getattr(module, 'inplace', False):
            module.inplace = False
    if verbose:
        for name, kind in converted.items():
            print(f'convert: {name} -> {kind}')
        for name, why in left.items():
            print(f'convert: {name} left ({why})')
    return list(converted)


LINEARS = (nn.Linear, BinaryLinear, TernaryLinear, Linear4bit, Int8Linear, GroupLinear, SparseLinear, HalfLinear, LowRankLinear)


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
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    tensors = {name: t.contiguous().cpu() for name, t in _parameters_once(pack(model)).items()}
    meta = dict(meta, checksum=_checksum(tensors))      # safetensors has none of its own

    def write(tmp):
        try:
            save_file(tensors, tmp, {'nanobit': json.dumps(meta)})
        except SafetensorError as e:                # a full disk, for one
            raise OSError(e) from e
    atomic_write(path, write)
    return os.path.getsize(path)


def read_packed(path, tensors_too=True):
    """(meta, tensors) of a file of save_packed. Raises ValueError naming the file when it is not one. tensors_too=False: (meta,
    None) from the header alone, whose word that the tensors are whole is not checked."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, 'pt') as f:
            meta = json.loads((f.metadata() or {})['nanobit'])
            tensors = {name: f.get_tensor(name) for name in f.keys()} if tensors_too else None  # noqa: SIM118  not a dict
    except (OSError, SafetensorError, KeyError, ValueError) as e:
        raise ValueError(f'{path} is not a packed nanobit model ({type(e).__name__}: {e})') from e
    if not isinstance(meta, dict) or tensors_too and meta.get('checksum') != _checksum(tensors):
        raise ValueError(f'{path} is damaged: its tensors do not match their checksum')
    return meta, tensors


def _checksum(tensors):
    return checksum(tensors[name] for name in sorted(tensors))


def load_packed(model, tensors):
    """Put the tensors of read_packed into a freshly made model of the same shape, in place; returns it packed."""
    wanted = _parameters_once(pack(model))
    alike = lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype)
    if wrong := sorted(wanted.keys() ^ tensors.keys()) or [n for n in wanted if not alike(wanted[n], tensors[n])]:
        raise ValueError(f'packed file and model do not fit each other: {wrong[:4]}')
    for name, t in wanted.items():
        t.copy_(tensors[name])
    return model
