"""
Quantize weights to codes and back: plain functions of tensors, each next to its inverse. No modules, nothing trainable.

    binarize, half_bits        {0,1} by `w > mean(w)`                          1 bit
    ternarize                  {-1,0,1} * mean|w|                              1.58 bits, stored in 2
    quantize_rows              int8 absmax per row: weights, or activations per token
    quantize4, decode4         sixteen levels times a scale per group of weights: uniform, nf4, fit4
    group_grid, to_grid        integers with a scale and a zero per group of a row, for ptq.py
    pack_bits, unpack_bits     codes of 1, 2, 3, 4 or 8 bits in bytes

On the CPU, kernels.c decodes packed weights of 1 to 4 bits. It is compiled on first use and needs a C compiler. Without one, on
other devices and under torch.compile, torch does the same arithmetic. Both give the same bits, with two exceptions: bf16
weights below 1e-38, and product4, which multiplies a few tokens without decoding first and sums in another order.
"""
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
import threading
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import kernels_triton


AS_ON_GPU = os.environ.get('NANOBIT_PATHS') == 'gpu'


def on_cpu(t):
    """True where the code paths for CPUs apply: small blocks, kernels.c, int8 products. With the environment variable
    NANOBIT_PATHS=gpu those of other devices run on a CPU as well, which tests use."""
    return t.device.type == 'cpu' and not AS_ON_GPU


def wide(t):
    """Cast t to at least fp32. Statistics are never computed in bf16."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def binarize(w, chunks=1):
    """Binarize w (out, ...) to bool of its shape: w > mean(w), strictly, one mean for each of `chunks` equal slices of dim 0.

    arXiv 2509.07025 eq. 1. The mean is in fp32. Worked by hand: [[1, 2], [3, 6]] has mean 3 -> [[0, 0], [0, 1]].
    """
    flat = wide(w.reshape(chunks, -1))
    return (flat > flat.mean(1, keepdim=True)).view(w.shape)


def half_bits(w, chunks=1, dtype=None, offset=0.5):
    """binarize(w) - offset, i.e. {-1/2, +1/2}, in `dtype` (default w's).

    The outputs of W01 and W01 - 1/2 differ by sum(x)/2 in every feature. After subtracting the mean over the output features
    they are equal, with the same standard deviation. W01 - 1/2 is more exact: no large common term hides small differences
    between features. It also equals sign(w - mean(w)) / 2, the weight of BitNet b1 (arXiv 2310.11453).
    """
    flat = wide(w.detach().reshape(chunks, -1))
    bits = torch.gt(flat, flat.mean(1, keepdim=True), out=torch.empty_like(flat))   # converting a bool tensor is slow
    return bits.sub_(offset).view(w.shape).to(dtype or w.dtype)


def ternarize(w, chunks=1, scales=None):
    """Ternarize w. Returns (codes, scales): codes int8 in {-1,0,1} of w's shape, scales fp32 (chunks,), w ~ codes * scale.

    scale = max(mean|w|, 1e-5) (arXiv 2402.17764, Tips PDF) of each slice of dim 0. chunks: the number of equal slices, or a
    tuple with the rows of each slice. scales: those of w, if they are known.
    Worked by hand: [[1, -2], [0.2, 4.8]] has mean|w| = 2 -> round(w / 2) = [[0, -1], [0, 1]].
    """
    if not isinstance(chunks, int):
        scales = [None] * len(chunks) if scales is None else scales.split(1)
        codes, scales = zip(*(ternarize(part, 1, s) for part, s in zip(w.split(chunks), scales, strict=True)), strict=True)
        return torch.cat(codes), torch.cat(scales)
    flat = wide(w.reshape(chunks, -1))
    s = flat.abs().mean(1, keepdim=True).clamp_(min=1e-5) if scales is None else scales[:, None]
    return (flat / s).round_().clamp_(-1, 1).to(torch.int8).view(w.shape), s.flatten()


def absmax_rows(x, tiny=1e-5):
    """max|x| of each row, at least `tiny`: (..., 1)."""
    return x.abs().amax(-1, keepdim=True).clamp(min=tiny)


def quantize_rows(x, tiny=1e-5, top=None):
    """Quantize each row (token) to int8 by its absmax. Returns (codes, scales): codes of x's shape, scales fp32 (..., 1).

    x ~ codes * scale, scale = max|x| / 127, max|x| at least `tiny` (arXiv 2402.17764, Tips PDF: x * 127 / max, to [-128, 127]).
    top: absmax_rows(x), if it is known.
    """
    top = absmax_rows(x, tiny) if top is None else top
    return (x * (127 / top)).round_().clamp_(-128, 127).to(torch.int8), top / 127


# ---------------------------------------------------------------------------------------------------------------------
# four bits: a code 0..15 for each weight, a scale for each group of the flattened weights; w ~ levels[code] * scale


class Format4(NamedTuple):
    """levels: 16 ascending numbers; group: default number of weights that share a scale; scales: default storage of the scales;
    high_first: the first of two weights is in the high half of the byte; bits: bits per code, at most 4."""
    levels: tuple
    group: int
    scales: str
    high_first: bool
    bits: int = 4


# u / 15 * 2n - n, in fp32 steps like those of levels4
UNIFORM = tuple((torch.arange(16.0) * (2 / 15) - 1).tolist())
# -Phi^-1(linspace(.9677083, .5, 8))[:-1], 0, Phi^-1(linspace(.5, .9677083, 9))[1:], divided by the largest (arXiv 2305.14314)
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
# Lloyd's algorithm on normally distributed weights in blocks of 32: results/fit4.py
FIT4 = (-0.9721, -0.7257, -0.5640, -0.4330, -0.3190, -0.2155, -0.1179, -0.0236,
        0.0699, 0.1651, 0.2642, 0.3699, 0.4869, 0.6213, 0.7889, 1.0)
FORMATS4 = {
    'uniform': Format4(UNIFORM, 16, 'fp16', False),     # 5 bits
    'nf4': Format4(NF4, 64, 'fp16', True),          # 4.25 bits; with scales='fp32' the bytes equal those of bitsandbytes
    'fit4': Format4(FIT4, 32, 'log8', False),       # 4.25 bits; a scale is a sign and seven bits of logarithm
}
# The same kernels decode the integers of group_grid, without their zeros, in rows of whole bytes.
CODED4 = FORMATS4 | {f'codes{b}': Format4(tuple(map(float, range(16))), 128, 'fp16', False, b) for b in (1, 2, 3, 4)}
SCALES4 = ('fp16', 'fp32', '8bit', 'log8')
# log8 scales are powers of 2 ** (1 / 14) = 1.05. The powers are the same for every tensor, so encoding a decoded tensor does
# not change it. 126 of them cover the range from the largest |w| of a tensor down to 1/500 of it.
STEPS = 14
ROOTS = tuple(2 ** (i / STEPS) for i in range(STEPS))


def group_scales(absmax, scales):
    """Store the scales: fp32 absmax (groups,) -> {'absmax': ..., ['absmax_top': ...]}.

    fp16   rounded, half to even; at most 65504
    fp32   unchanged
    8bit   uint8, in 255ths of `absmax_top`, the largest absmax of each 256 groups: 8 + 32 / 256 bits per group (double
           quantization of arXiv 2305.14314, without its mean and its dynamic code)
    """
    if scales == 'fp32':
        return {'absmax': absmax}
    if scales == '8bit':
        top = F.pad(absmax, (0, -len(absmax) % 256)).view(-1, 256).amax(1)
        each = top.clamp(min=1e-30).repeat_interleave(256)[:len(absmax)]
        return {'absmax': (absmax / each * 255).round_().to(torch.uint8), 'absmax_top': top}
    i = absmax.view(torch.int32)        # rounds to the 11 bits of fp16, half to even; compilers would drop half().float()
    return {'absmax': ((i + 0xFFF + ((i >> 13) & 1)) & -0x2000).view(torch.float32).half()}


@functools.cache
def _table(numbers, device):
    return torch.tensor(numbers, device=device, dtype=torch.float32)


def _constant(numbers, device):
    """fp32 tensor of a tuple, cached for each device, except under torch.compile."""
    return (_table.__wrapped__ if torch.compiler.is_compiling() else _table)(numbers, device)


def scales4(held):
    """Inverse of group_scales and search4: fp32 scales (groups,) from absmax and, for one-byte scales, absmax_top."""
    s, top = held['absmax'], held.get('absmax_top')
    if s.dtype == torch.uint8:
        return s.float() * (top.float() / 255).repeat_interleave(256)[:len(s)]
    if s.dtype == torch.int8:
        e = top + s.int().abs() - 127
        return torch.ldexp(_constant(ROOTS, s.device)[e % STEPS], e.div(STEPS, rounding_mode='floor')) * s.sign()
    return s.float()


def quantize4(w, format='uniform', group=0, scales=''):
    """Quantize w to 4 bits. Returns (codes, held): uint8 codes 0..15 (groups, group), and {name: tensor} of the scales.
    Flattens w and fills the last group with zeros. group=0 and scales='' choose the format's defaults.

    Codes are computed with the scale as stored, after rounding. uniform: u = round((w + n) / (2 n) * 15) with n = absmax; zero
    is not on its grid. nf4: the nearest level to w / absmax. fit4: see search4. A group of zeros decodes to zeros.
    """
    form = FORMATS4[format]
    group, scales = group or form.group, scales or form.scales
    flat = F.pad(w.detach().reshape(-1).float(), (0, -w.numel() % group)).view(-1, group)
    if scales == 'log8':
        return search4(flat, _constant(form.levels, w.device))
    held = group_scales(flat.abs().amax(1), scales)
    u = flat / scales4(held).clamp(min=1e-30)[:, None]               # a stored scale can be just below the true absmax
    if format == 'uniform':
        return ((u + 1) * 7.5).round_().clamp_(0, 15).to(torch.uint8), held
    levels = _constant(form.levels, w.device)
    return torch.bucketize(u, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8), held


def search4(flat, levels):
    """quantize4 of fp32 (groups, group) for levels (16,) with one-byte signed scales on a logarithmic grid.

    scale = sign(h) * 2 ** ((absmax_top - 127 + |h|) / 14) for an int8 h. absmax_top (int32) is 14 times the binary logarithm of
    the largest |w| of the tensor, rounded up. Candidates are five steps around the group's absmax, with either sign, and zero;
    the least squared error wins. The levels are not symmetric, so the sign of a scale is worth a bit of the codes. (A sixth
    step would reduce the error very little, and encoding a decoded tensor would change it.)
    """
    levels, middle = levels.float(), (levels[1:] + levels[:-1]).float() / 2
    top = (flat.abs().amax().clamp(min=1e-38).double().log2() * STEPS - 1e-6).ceil().clamp(max=1791).int().view(1)
    unit = {'absmax': torch.tensor([127], dtype=torch.int8, device=flat.device), 'absmax_top': top}
    flat = flat / scales4(unit)                                         # no square overflows or underflows
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=flat.device)
    absmax = torch.zeros(len(flat), dtype=torch.int8, device=flat.device)
    for rows in range(0, len(flat), 1 << 15):                           # a block of groups at a time, since the
        w = flat[rows:rows + (1 << 15)]                                 # temporaries are many times larger than the weights
        nearest = (127 + STEPS * w.abs().amax(1).log2()).round().clamp(-999, 127).int()
        best = w.square().sum(1)
        for step in range(-3, 2):
            h = (nearest + step).clamp(max=127)
            for signed in (h, -h):
                s = (((h - 127) / STEPS).exp2() * signed.sign())[:, None]
                c = torch.bucketize(w / s, middle, out_int32=True)
                off = (levels[c] * s - w).square().sum(1)
                better = (off < best) & (h >= 1)
                best = torch.where(better, off, best)
                codes[rows:rows + len(w)] = torch.where(better[:, None], c.to(torch.uint8), codes[rows:rows + len(w)])
                absmax[rows:rows + len(w)] = torch.where(better, signed.to(torch.int8), absmax[rows:rows + len(w)])
    codes[absmax == 0] = 0
    return codes, {'absmax': absmax, 'absmax_top': top}


def pack4(codes, format):
    """Pack codes of quantize4 into uint8 (n / 2,): byte = c[2j] | c[2j+1] << 4; nf4 swaps the two, as in bitsandbytes."""
    pairs = codes.view(-1, 2)
    return pack_bits(pairs.flip(1) if FORMATS4[format].high_first else pairs, 4).view(-1)


def levels4(codes, format):
    """Map codes 0..15 of any shape to fp32 levels."""
    if format == 'uniform':
        return codes.float().mul_(2 / 15).sub_(1)                       # faster than a table
    if format not in FORMATS4:
        return codes.float()
    return _constant(CODED4[format].levels, codes.device)[codes.int()]


def decode4(code, held, format, start=0, stop=None, dtype=torch.float32, out=None):
    """Decode weights start .. stop - 1 (whole groups; default: all) from `code` (uint8, from pack4) and its scales. For codes1
    to codes3 (from pack_bits, rows of whole bytes) start and stop must be at whole bytes, for codes3 at multiples of 3 bytes.

    out: a tensor from an earlier call, reused if it is large enough. Allocating new memory costs as much as decoding.
    """
    if held['absmax'].dtype == torch.uint8:         # 256 groups share a `top`, so a part of the groups cannot find its own
        held = {'absmax': scales4(held)}
    bits, weights = CODED4[format].bits, len(code) * 8 // CODED4[format].bits
    absmax, stop = held['absmax'], weights if stop is None else stop
    group = weights // len(absmax) if len(absmax) else 1
    if kernel := _kernels_for(code, absmax):
        wide = dtype if dtype == torch.bfloat16 else torch.float32
        fits = out is not None and out.dtype == wide and len(out) >= stop - start
        out = out[:stop - start] if fits else code.new_empty(stop - start, dtype=wide)
        size = absmax.element_size()
        kernel.decode(code.data_ptr() + start * bits // 8, absmax.data_ptr() + start // group * size, size, _grid(held),
                      _array(CODED4[format].levels), stop - start, group, bits, CODED4[format].high_first,
                      torch.get_num_threads(), wide == torch.bfloat16, out.data_ptr())
        return out.to(dtype)
    b = code[start * bits // 8:stop * bits // 8]
    if bits == 4:                                   # spreads the two halves of a byte over two bytes
        b = b.to(torch.int16)
        c = ((b >> 4 | b << 8) if CODED4[format].high_first else (b | b << 4)) & 0x0F0F
    else:
        c = unpack_bits(b, bits, stop - start)
    scales = scales4({**held, 'absmax': absmax[start // group:stop // group]})
    return (levels4(c.view(torch.uint8), format).view(-1, group) * scales[:, None]).view(-1).to(dtype)


def product4(x, code, held, format, out_features):
    """x (tokens, in) W^T -> fp32 (tokens, out) without the decoded W in memory. Returns None if no kernel can do it: kernels.c
    accepts up to 4 tokens, and group sizes that are multiples of 16 and divide `in`."""
    group = len(code) * 8 // CODED4[format].bits // len(held['absmax'])
    if (kernels_triton.usable(x) and 0 < len(x) <= kernels_triton.MOST_TOKENS and CODED4[format].bits == 4
            and group & group - 1 == 0 and x.shape[1] % group == 0):
        absmax = held['absmax'] if held['absmax'].is_floating_point() else scales4(held)
        levels = _constant(CODED4[format].levels, x.device)
        return kernels_triton.scaled_product(x, code, absmax, levels, out_features, group, CODED4[format].high_first)
    kernel = _kernels_for(code, held['absmax'])
    if not kernel or not 0 < len(x) <= kernel.most_tokens() or x.dtype == torch.float64 or group % 16 or x.shape[1] % group:
        return None
    if held['absmax'].dtype == torch.uint8:
        held = {'absmax': scales4(held)}
    x, absmax = x.to(torch.float32).contiguous(), held['absmax']
    y = x.new_empty(len(x), out_features)
    kernel.product(x.data_ptr(), len(x), code.data_ptr(), absmax.data_ptr(), absmax.element_size(), _grid(held),
                   _array(CODED4[format].levels), x.shape[1], out_features, group, CODED4[format].bits,
                   CODED4[format].high_first, torch.get_num_threads(), y.data_ptr())
    return y


# ---------------------------------------------------------------------------------------------------------------------
# integers: a code 0 .. steps - 1 for each weight, a scale and a zero for each group of a row; w ~ (code - zero) * scale


class Grid(NamedTuple):
    """An integer grid. bits: per code; steps: number of codes; zero: the code of 0, None if each group has its own."""
    bits: int
    steps: int
    zero: float | None


GRIDS = {'int8': Grid(8, 256, None), 'int4': Grid(4, 16, None), 'int3': Grid(3, 8, None), 'int2': Grid(2, 4, None),
         'tern': Grid(2, 3, 1.0), 'bin': Grid(1, 2, 0.5)}


def group_grid(w, levels, shrink=1.0):
    """Scale and zero of each group: w (..., group) -> (scale, zero) fp32 (..., 1), rounded as stored: to fp16, and to a code.

    int8 .. int2: from min(w, 0) to max(w, 0), both times `shrink` (GPTQ, arXiv 2210.17323: asymmetric, 0 is on the grid).
    tern: -s, 0, s with s = mean|w|; bin: -s, s. Raises ValueError if a scale is too large for fp16.
    """
    grid = GRIDS[levels]
    if grid.zero is None:
        low, high = w.amin(-1, keepdim=True).clamp(max=0) * shrink, w.amax(-1, keepdim=True).clamp(min=0) * shrink
        scale = (high - low) / (grid.steps - 1)
    else:
        scale = w.abs().mean(-1, keepdim=True) * (shrink if levels == 'tern' else 2 * shrink)
    if not scale.max() <= 65504:
        raise ValueError('weights must be finite and fit into scales of fp16')
    scale = scale.half().float().clamp(min=2.0 ** -24)
    zero = (-low / scale).round().clamp(0, grid.steps - 1) if grid.zero is None else torch.full_like(scale, grid.zero)
    return scale, zero


def to_grid(w, scale, zero, levels):
    """Round w to the nearest scale * (code - zero); returns the codes in fp32."""
    return (w / scale + zero).round_().clamp_(0, GRIDS[levels].steps - 1)


# ---------------------------------------------------------------------------------------------------------------------
# codes in bytes


def pack_bits(codes, bits):
    """Pack integer codes (..., n) in 0 .. 2**bits - 1 into uint8 (..., ceil(n * bits / 8)); bits in 1, 2, 3, 4, 8.

    The first code is in the low bits; zeros fill each row to whole bytes. For 2 bits:
        byte j :  | c[4j+3] | c[4j+2] | c[4j+1] | c[4j] |     (most significant bits left)
    3 bits: eight codes in three bytes, in the same order; zeros fill each row to a multiple of three bytes.
    """
    if bits == 3:
        c = F.pad(codes.to(torch.int32), (0, -codes.shape[-1] % 8)).unflatten(-1, (-1, 8))
        word = (c << torch.arange(0, 24, 3, dtype=torch.int32, device=c.device)).sum(-1, keepdim=True, dtype=torch.int32)
        return (word >> torch.arange(0, 24, 8, dtype=torch.int32, device=c.device) & 255).to(torch.uint8).flatten(-2)
    per = 8 // bits
    c = F.pad(codes.to(torch.uint8), (0, -codes.shape[-1] % per)).unflatten(-1, (-1, per))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=c.device)
    return (c << shifts).sum(-1, dtype=torch.uint8)


def unpack_bits(packed, bits, n):
    """Inverse of pack_bits: uint8 codes (..., n)."""
    if bits == 3:
        b = packed.unflatten(-1, (-1, 3)).to(torch.int32)
        word = b[..., :1] | b[..., 1:2] << 8 | b[..., 2:] << 16
        codes = word >> torch.arange(0, 24, 3, dtype=torch.int32, device=packed.device) & 7
        return codes.to(torch.uint8).flatten(-2)[..., :n]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & (2 ** bits - 1)).flatten(-2)[..., :n]


# ---------------------------------------------------------------------------------------------------------------------
# kernels.c


@functools.cache
def _array(numbers):
    return (ctypes.c_float * len(numbers))(*numbers)


@functools.cache
def _grid_from(top):
    places = torch.arange(-128, 128, device='cpu').clamp(min=-127).to(torch.int8)
    top = torch.tensor(top, dtype=torch.int32, device='cpu')
    return _array(tuple(scales4({'absmax': places, 'absmax_top': top}).tolist()))


def _grid(held):
    """The 256 scales of the int8 values -128 .. 127; None if the scales are not int8."""
    return _grid_from(held['absmax_top'].item()) if held['absmax'].dtype == torch.int8 else None


def _kernels_for(code, absmax):
    plain = on_cpu(code) and absmax.dtype in (torch.uint8, torch.int8, torch.float16, torch.float32)
    if not plain or torch.compiler.is_compiling() or not (code.is_contiguous() and absmax.is_contiguous()):
        return None
    return kernels()


def kernels():
    """The compiled kernels.c, or None without a C compiler (warns once) or with NANOBIT_KERNELS=0.

    The library is compiled for this processor, in ~/.cache/nanobit; its name is a hash of source, flags and processor.
    $CC names another compiler than cc. If torch contains an OpenMP library, the kernels use it and share its threads.
    """
    with _lock:
        return _compiled()


_lock = threading.Lock()


@functools.cache
def _compiled():
    if os.environ.get('NANOBIT_KERNELS') == '0':
        return None
    try:
        library = compile_c(Path(__file__).with_name('kernels.c'))
    except (OSError, RuntimeError, subprocess.SubprocessError) as e:
        why = getattr(e, 'stderr', None) or str(e)
        warnings.warn(f'kernels.c was not compiled; packed layers are slower on the CPU: {why.strip()[:200]}', stacklevel=2)
        return None
    p, n, i = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.decode.argtypes, library.decode.restype = (p, p, i, p, p, n, n, i, i, i, i, p), None
    if library.most_tokens():
        library.product.argtypes, library.product.restype = (p, i, p, p, i, p, p, n, n, n, i, i, i, p), None
    return library


def compile_c(source, options=('-march=native',)):
    """The library of a C file, compiled if the cache folder has none, as ctypes.CDLL. Raises OSError, RuntimeError or
    SubprocessError."""
    bundled = [str(p) for p in sorted((Path(torch.__file__).parent / 'lib').glob('libgomp*'))[:1]]
    compiler = os.environ.get('CC', 'cc').split()
    flags = ['-O3', *options, '-shared', '-fPIC']
    try:
        cpu = next((line for line in open('/proc/cpuinfo') if line.startswith(('flags', 'Features'))), '')
    except OSError:
        cpu = platform.processor()
    text = [p.read_bytes() for p in (source, *sorted(source.parent.glob('*.h')))]
    name = hashlib.sha256(repr((text, flags, bundled, cpu, compiler)).encode()).hexdigest()[:16]
    name = f'{source.stem}-{name}.so'
    with contextlib.ExitStack() as after:
        try:
            path = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'nanobit' / name
            if path.exists():
                return ctypes.CDLL(str(path))
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = after.enter_context(open(path.with_suffix('.lock'), 'w'))
            with contextlib.suppress(OSError):      # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)    # the ranks of a node start together; one of them compiles
            if path.exists():
                return ctypes.CDLL(str(path))
            handle, tmp = tempfile.mkstemp(dir=path.parent)
            os.close(handle)
        except (OSError, RuntimeError):             # no home folder, a read-only one, or a damaged library in it
            scratch = Path(after.enter_context(tempfile.TemporaryDirectory(prefix='nanobit-')))  # removed below: it is loaded
            path, tmp = scratch / name, str(scratch / 'tmp')
        try:
            with_openmp = [*compiler, *flags, '-fopenmp', str(source), '-o', tmp, *bundled, '-lm']
            if subprocess.run(with_openmp, capture_output=True).returncode:         # Apple's clang has no -fopenmp
                subprocess.run([*compiler, *flags, str(source), '-o', tmp, '-lm'], check=True, capture_output=True, text=True)
            os.replace(tmp, path)
        finally:
            if os.path.exists(tmp):
                os.remove(tmp)
        return ctypes.CDLL(str(path))
