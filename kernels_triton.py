"""
Triton kernels for NVIDIA GPUs, beside kernels.c for CPUs; Triton comes with torch's CUDA builds.

    norm_to_int8(x, gain, eps, act)         RMSNorm and int8 codes of each token, in one pass; act: None or 'relu2_glu'
    int_product(q, code)                    1 to 8 tokens of int8 times packed ternary codes, exact
    scaled_product(x, code, absmax, ...)    1 to 8 tokens times packed 4-bit codes with a scale for each group

They are off unless NANOBIT_TRITON=1, because nothing has been measured on a GPU yet, and under torch.compile. With
TRITON_INTERPRET=1 they run on a CPU, slowly: this is how the tests check them.
"""
import os

import torch

ON = os.environ.get('NANOBIT_TRITON') == '1'
if ON:
    import triton
    import triton.language as tl
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
MOST_TOKENS = 8                                     # a token more costs another pass over the codes


def usable(t):
    """True if the kernels are on and can read this tensor."""
    return ON and (t.is_cuda or INTERPRETED) and t.dtype != torch.float64 and not torch.compiler.is_compiling()


if ON:
    @triton.jit
    def _norm_to_int8(x, gain, q, tops, rstd, n, eps, GATED: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr):
        row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        inside = i < n
        first = x + row * n * (2 if GATED else 1) + i
        a = tl.load(first, mask=inside, other=0.0).to(tl.float32)
        if GATED:                                   # each step rounds to the dtype of x, as in torch
            a = tl.where(a < 0, 0.0, a)             # keeps NaN, which maximum() drops
            a = (a * a).to(x.dtype.element_ty).to(tl.float32)
            up = tl.load(first + n, mask=inside, other=0.0).to(tl.float32)
            a = (a * up).to(x.dtype.element_ty).to(tl.float32)
        if NORM:
            norm = tl.sqrt_rn(tl.sum(a * a, 0))
            r = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(norm * norm, tl.full((), n, tl.float32)) + eps))
            tl.store(rstd + row, r)
            a = a * r * tl.load(gain + i, mask=inside, other=0.0).to(tl.float32)
        top = tl.maximum(tl.max(tl.abs(a), 0), 1e-5)
        top = tl.where(tl.sum((a != a).to(tl.int32), 0) > 0, float('nan'), top)
        a = a * tl.div_rn(127.0, top)
        a = (a + 12582912.0) - 12582912.0           # 1.5 * 2^23: rounds to the nearest integer, halves to even
        a = tl.minimum(tl.maximum(a, -128.0), 127.0)
        tl.store(q + row * n + i, a.to(tl.int8), mask=inside)
        tl.store(tops + row, top)

    # Widths are constexpr, so each compiles a kernel: with NumPy 2.4, Triton 3.6's interpreter takes no other in range().
    @triton.jit
    def _int_product(q, code, y, n, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr):
        token = tl.program_id(1)
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        total = tl.zeros((ROWS,), dtype=tl.int32)
        for start in range(0, WIDTH, BYTES):
            byte = start + tl.arange(0, BYTES)
            held = tl.load(code + row[:, None].to(tl.int64) * WIDTH + byte[None, :],
                           mask=(row[:, None] < rows) & (byte[None, :] < WIDTH), other=0).to(tl.int32)
            for j in tl.static_range(4):
                column = byte * 4 + j
                x = tl.load(q + token * n + column, mask=column < n, other=0).to(tl.int32)
                total += tl.sum((((held >> (2 * j)) & 3) - 1) * x[None, :], 1)
        tl.store(y + token * rows + row, total, mask=row < rows)

    @triton.jit
    def _scaled_product(x, code, absmax, levels, y, rows, N: tl.constexpr, HIGH_FIRST: tl.constexpr, GROUP: tl.constexpr,
                        ROWS: tl.constexpr):
        token, half = tl.program_id(1), tl.arange(0, GROUP // 2)
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        inside, first = (row < rows)[:, None], row.to(tl.int64) * N
        total = tl.zeros((ROWS,), dtype=tl.float32)
        for start in range(0, N, GROUP):
            held = tl.load(code + (first[:, None] + start) // 2 + half[None, :], mask=inside, other=0).to(tl.int32)
            low, high = tl.load(levels + (held & 15)), tl.load(levels + (held >> 4))
            even = tl.load(x + token * N + start + 2 * half).to(tl.float32)[None, :]
            odd = tl.load(x + token * N + start + 2 * half + 1).to(tl.float32)[None, :]
            part = high * even + low * odd if HIGH_FIRST else low * even + high * odd
            scale = tl.load(absmax + (first + start) // GROUP, mask=row < rows, other=0).to(tl.float32)
            total += tl.sum(part, 1) * scale
        tl.store(y + token * rows + row, total, mask=row < rows)


def norm_to_int8(x, gain, eps, act=None):
    """x (N, n), or (N, 2 n) for act='relu2_glu' -> (int8 codes (N, n), absmax (N, 1), rstd (N, 1) or None): the codes of
    quant.quantize_rows(gain * RMSNorm(act(x))) and their absmax_rows(); gain None: no RMSNorm."""
    x, n = x.contiguous(), x.shape[1] // (2 if act else 1)
    q, tops = x.new_empty(len(x), n, dtype=torch.int8), x.new_empty(len(x), 1, dtype=torch.float32)
    rstd = None if gain is None else torch.empty_like(tops)
    if len(x):
        block = triton.next_power_of_2(n)
        with torch.cuda.device_of(x):               # no fusion: a product and a sum in one instruction round otherwise
            _norm_to_int8[len(x),](x, gain, q, tops, rstd, n, eps, GATED=act is not None, NORM=gain is not None, BLOCK=block,
                                   num_warps=min(32, max(4, block // 512)), enable_fp_fusion=False)
    return q, tops, rstd


def int_product(q, code):
    """q int8 (tokens, n) times codes (rows, bytes) of pack_bits(codes, 2), which mean c - 1 -> int32 (tokens, rows), exact."""
    y = q.new_empty(len(q), len(code), dtype=torch.int32)
    grid = triton.cdiv(len(code), 16), len(q)
    with torch.cuda.device_of(q):
        _int_product[grid](q.contiguous(), code, y, q.shape[1], len(code), WIDTH=code.shape[1], ROWS=16, BYTES=128)
    return y


def scaled_product(x, code, absmax, levels, rows, group, high_first):
    """x (tokens, n) times 4-bit codes of pack4 and a scale for each `group` (a power of two that divides n) -> fp32
    (tokens, rows)."""
    y = x.new_empty(len(x), rows, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _scaled_product[triton.cdiv(rows, 16), len(x)](x.contiguous(), code, absmax, levels, y, rows, N=x.shape[1],
                                                       HIGH_FIRST=high_first, GROUP=group, ROWS=16)
    return y
