"""Sixteen levels and a scale per group: literal formulas, published errors and bytes, and kernels.c against torch."""
import runpy
import shutil
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import quant
from conftest import ROOT
from quant import CODED4, FIT4, FORMATS4, NF4, SCALES4, decode4, group_scales, kernels, pack4, product4, quantize4, scales4

every_code = pytest.mark.parametrize('format', CODED4)
every_format = pytest.mark.parametrize('format', FORMATS4)
needs_compiler = pytest.mark.skipif(not shutil.which('cc'), reason='needs a C compiler')


@pytest.fixture(autouse=True)
def fixed():
    torch.manual_seed(0)


def off(got, want):
    return ((got - want).norm() / want.norm()).item()


def back(w, format, group=0, scales=''):
    """w after quantize4, pack4 and decode4, and the bits a weight that the codes and the scales take."""
    codes, held = quantize4(w, format, group, scales)
    code = pack4(codes, format)
    flat = decode4(code, held, format)
    return flat[:w.numel()].view(w.shape), 8 * (code.nbytes + sum(t.nbytes for t in held.values())) / w.numel()


def scale_of_log8(h, top):
    """The scale of a signed byte, literally."""
    return np.sign(h) * 2.0 ** ((top - 127 + abs(h)) / 14) if h else 0.0


# ------------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize('group', [2, 16, 64])
def test_uniform_is_its_formula(group):
    """u = round((w + n) / 2n * 15), w ~ u / 15 * 2n - n, with n = absmax rounded to fp16 first."""
    w = torch.randn(256, group) * torch.logspace(-3, 3, 256)[:, None]
    n = torch.from_numpy(w.abs().amax(1, keepdim=True).numpy().astype(np.float16).astype(np.float64))
    codes, held = quantize4(w, 'uniform', group)
    c, u = codes.double(), ((w.double() + n) / (2 * n) * 15).clamp(0, 15)
    assert (c - u).abs().max() <= 0.5 + 1e-5                                # nearest; with n in fp32 it would be .503 off
    assert held['absmax'].dtype == torch.float16 and torch.equal(held['absmax'].double(), n[:, 0])
    assert (back(w, 'uniform', group)[0] - (c / 15 * 2 * n - n)).abs().div(n).max() < 1e-6


@pytest.mark.parametrize('format, group, scales', [('nf4', 0, ''), ('nf4', 10, 'fp32'), ('fit4', 16, 'fp16')])
def test_nf4_is_the_nearest_level(format, group, scales):
    """Of the sixteen levels times the kept scale, each weight gets the nearest."""
    w = torch.randn(64, group or 64)
    levels = torch.tensor(NF4 if format == 'nf4' else FIT4)
    absmax = w.abs().amax(1, keepdim=True)
    grid = levels * (absmax.half().float() if scales != 'fp32' else absmax)
    want = grid.gather(1, (w.unsqueeze(-1) - grid[:, None]).abs().argmin(-1))
    torch.testing.assert_close(back(w, format, group, scales)[0], want, rtol=1e-6, atol=1e-7)


def test_nf4_levels_are_quantiles_of_the_normal_distribution():
    """Phi^-1 at 7 even steps down from and 8 up to .9677083, over the largest: the sixteen numbers to 5e-8."""
    phi = statistics.NormalDist().inv_cdf
    down, up = (torch.linspace(0.9677083, 0.5, n)[:-1].tolist() for n in (8, 9))            # fp32, as they were made
    want = sorted([*(-phi(p) for p in down), 0.0, *(phi(p) for p in up)])
    assert [x / max(want) for x in want] == pytest.approx(NF4, abs=5e-8) and len(NF4) == 16 and sorted(FIT4) == list(FIT4)


@pytest.mark.parametrize('group', [16, 32, 64])
def test_fit4_takes_the_best_scale_near_the_absmax(group):
    """No step from 3 below to 1 above the absmax, with either sign, has a smaller error; the whole grid hardly ever."""
    w, levels = torch.randn(100, group).double(), torch.tensor(FIT4).double()
    codes, held = quantize4(w, 'fit4', group)
    top = held['absmax_top'].item()
    assert 2 ** ((top - 1) / 14) < w.abs().max().item() <= 2 ** (top / 14) * (1 + 1e-6)
    scale = torch.tensor([scale_of_log8(h, top) for h in held['absmax'].tolist()])
    got = (levels[codes.long()] * scale[:, None] - w).square().sum(1)
    grid = torch.tensor([scale_of_log8(h, top) for h in range(-127, 128) if h]).double()
    errors = torch.stack([(w.unsqueeze(-1) - s * levels).abs().amin(-1).square().sum(1) for s in grid], 1)  # (groups, 254)
    steps = 14 * (grid.abs() / w.abs().amax(1, keepdim=True)).log2()
    best = errors.where((steps > -3.49) & (steps < 1.49), 1e9).amin(1)
    assert (got <= best * 1.0001).all()
    assert got.sum().sqrt() <= errors.amin(1).sum().sqrt() * 1.01 and (scale < 0).float().mean() > 0.2
    torch.testing.assert_close(back(w, 'fit4', group)[0].double(), levels[codes.long()] * scale[:, None], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('power', [-112, -80, -30, 1, 30, 80, 125])
def test_fit4_does_not_depend_on_the_size_of_the_weights(power):
    """Weights times a power of two have the same codes and places: no square of a weight overflows or vanishes."""
    w = torch.randn(64, 32)
    codes, held = quantize4(w, 'fit4')
    codes2, held2 = quantize4(w * 2.0 ** power, 'fit4')
    assert torch.equal(held2['absmax'], held['absmax']) and torch.equal(codes2, codes)
    assert held2['absmax_top'] == held['absmax_top'] + 14 * power and held2['absmax_top'].dtype == torch.int32


def test_fit4_takes_weights_up_to_the_largest_float():
    """The scale next above the largest weight is no infinity."""
    w = torch.full((2, 32), torch.finfo(torch.float32).max)
    assert off(back(w, 'fit4')[0].double(), w.double()) < 0.1


@pytest.mark.parametrize('make', [torch.randn, torch.rand, lambda n: torch.randn(n) ** 3], ids=['normal', 'even', 'outliers'])
@pytest.mark.parametrize('group', [2, 16, 32])
def test_what_fit4_decodes_is_encoded_without_a_change(group, make):
    """The scales are the same ones for every tensor: decoded weights have a code without error, wherever `top` is now."""
    once, _ = back(make(group << 14), 'fit4', group)
    assert (back(once, 'fit4', group)[0] != once).sum() == 0
    groups, largest = once.view(-1, group), once.view(-1, group).abs().amax(1)
    smaller = groups[largest < largest.median()]                                            # of another top
    assert (back(smaller, 'fit4', group)[0] != smaller).sum() == 0 < len(smaller)


def test_no_group_of_fit4_is_worse_than_zeros():
    """Rows from 1 to 1e-6: those far below the largest become zeros, none has an error above that of zeros."""
    w = torch.randn(600, 32) * torch.logspace(0, -6, 600)[:, None]
    codes, held = quantize4(w, 'fit4')
    error = (back(w, 'fit4')[0] - w).norm(dim=1) / w.norm(dim=1)
    assert (error <= 1).all() and error[:200].max() < 0.12 and (error[-100:] == 1).all()
    small = held['absmax'] == 0
    assert torch.equal(small, error == 1) and not codes[small].any() and small.float().mean() < 0.7


@pytest.mark.parametrize('format, group, scales, error, bits', [
    ('uniform', 16, '', 0.0795, 5), ('uniform', 64, '', 0.1004, 4.25), ('nf4', 16, '', 0.0808, 5), ('nf4', 32, '', 0.0873, 4.5),
    ('nf4', 64, '', 0.0920, 4.25), ('nf4', 128, '', 0.0956, 4.125), ('nf4', 64, '8bit', 0.0920, 4.127),
    ('nf4', 64, 'fp32', 0.0920, 4.5), ('fit4', 32, '', 0.0736, 4.2501)])
def test_errors_and_bits_on_gaussian_weights(format, group, scales, error, bits):
    """Relative RMS error on N(0,1), 1024 x 1024, and the bits of codes and scales: the published ones to 1 %."""
    w = torch.randn(1024, 1024)
    got, taken = back(w, format, group, scales)
    assert off(got, w) == pytest.approx(error, rel=0.01) and taken == pytest.approx(bits, abs=2e-4) and taken <= 5
    assert format != 'fit4' or (off(got, w) <= 0.075 and taken <= 4.2501)


def test_fit4_in_blocks_of_64_beats_nf4_with_8bit_scales():
    """At no more bits than nf4 with its scales quantized once more, the error is at least a tenth smaller."""
    w = torch.randn(512, 1024)
    (fit, fit_bits), (nf4, nf4_bits) = back(w, 'fit4', 64), back(w, 'nf4', 64, '8bit')
    assert off(fit, w) < 0.9 * off(nf4, w) and fit_bits <= nf4_bits


def test_levels_of_fit4_are_the_ones_its_script_finds():
    """One more turn of results/fit4.py moves no level by more than 0.006, and measures the error above."""
    error = runpy.run_path(str(ROOT / 'results' / 'fit4.py'))['error']
    found, moved = error(torch.tensor(FIT4), 32, torch.Generator().manual_seed(1), blocks=1 << 14)
    assert found == pytest.approx(0.0736, rel=0.01)
    assert (moved / moved.abs().max() - torch.tensor(FIT4)).abs().max() < 0.006
    from_uniform = error(torch.linspace(-1, 1, 16), 32, torch.Generator().manual_seed(1), blocks=1 << 12)
    assert from_uniform[0] > found * 1.05 and (from_uniform[1] - torch.linspace(-1, 1, 16)).abs().max() > 0.01


# -------------------------------------------------------------------------------------------------------- odd weights


@every_format
@pytest.mark.parametrize('scales', ['', 'fp32', '8bit'])
def test_odd_sizes_zeros_and_negative_zeros(format, scales):
    """Groups of zeros come back as zeros, one weight as itself, a length that is no multiple of the group whole."""
    for n, group in [(1, 0), (1, 2), (17, 16), (130, 64), (257 * 2, 2), (7, 6)]:
        w = torch.randn(n) * 0.02
        w[-1] = w.abs().max() * (-1 if n > 1 else 1)
        got, _ = back(w, format, group, scales)
        assert got.shape == w.shape and (got - w).abs().max() <= w.abs().max() * 0.2
        steps = format == 'fit4' and not scales                             # of 2 ** (1 / 14); what fills the group counts
        assert n > 1 or got.item() == pytest.approx(w.item(), rel=0.05 if steps else 0.003)
    w = torch.randn(4, 64)
    w[1], w[2], w[3, ::2] = 0, -0.0, -0.0
    got, _ = back(w, format, 64, scales)
    assert not got[1:3].any() and got.isfinite().all() and got[0].any() and got[3].any()
    assert not back(torch.zeros(40), format, 0, scales)[0].any() and not back(-torch.zeros(40), format, 0, scales)[0].any()
    codes = [quantize4(w, format, 64, scales)[0] for _ in range(5)]                         # nothing left to chance
    assert all(torch.equal(c, codes[0]) for c in codes) and (codes[0][1] == codes[0][1, 0]).all()
    assert format != 'nf4' or not back(w, format, 64, scales)[0][3, ::2].any()              # zero is one of its levels


def test_bytes_by_hand():
    """Weights -1 1 0 .5: uniform 0 15 8 11, nf4 0 15 7 12; the first in the low half, for nf4 in the high half."""
    w = torch.tensor([-1.0, 1, 0, 0.5])                         # uniform: (.5 + 1) * 7.5 = 11.25; nf4: .4407 < .5 < .5626
    assert pack4(quantize4(w, 'uniform', 4)[0], 'uniform').tolist() == [0xF0, 0xB8]
    assert pack4(quantize4(w, 'nf4', 4)[0], 'nf4').tolist() == [0x0F, 0x7C]
    code, held = torch.tensor([0x0F, 0x7C], dtype=torch.uint8), {'absmax': torch.tensor([2.0])}
    assert decode4(code, held, 'nf4').tolist() == pytest.approx([-2, 2, 0, 2 * NF4[12]], rel=1e-6)
    assert decode4(code, held, 'fit4').tolist() == pytest.approx([2, 2 * FIT4[0], 2 * FIT4[12], 2 * FIT4[7]], rel=1e-6)
    assert decode4(code, held, 'uniform').tolist() == pytest.approx([2, -2, 2 * 9 / 15, -2 / 15], rel=1e-6)
    codes, held = quantize4(w * 3, 'fit4', 2)                   # two groups, the first with the largest weight
    assert held['absmax'].dtype == torch.int8 and held['absmax_top'].tolist() == [23] and codes.shape == (2, 2)
    assert 2 ** (22 / 14) < 3 < 2 ** (23 / 14)


def test_scales_as_they_are_kept():
    """fp16: half to even. 8bit: within half a 255th of the largest of 256. log8: 1.05 apart, signed, 0 for zeros."""
    s = torch.cat([torch.rand(1000) * 10 ** torch.randint(-4, 4, (1000,)).float() + 1e-4, torch.tensor([2049.0, 2051, 65504])])
    want = s.numpy().astype(np.float16)
    assert (group_scales(s, 'fp16')['absmax'].numpy() == want).all() and want[1000:].tolist() == [2048, 2052, 65504]
    held = group_scales(s, '8bit')
    assert held['absmax'].dtype == torch.uint8 and len(held['absmax']) == 1003 and len(held['absmax_top']) == 4
    for i in range(0, 1003, 256):
        top = s[i:i + 256].max()
        error = (scales4(held)[i:i + 256] - s[i:i + 256]).abs().max()
        assert error <= top / 510 * 1.0001 and held['absmax_top'][i // 256] == top
    assert group_scales(s, 'fp32')['absmax'] is s
    for top in (-300, -7, 0, 5, 28):
        log8 = {'absmax': torch.arange(-127, 128).to(torch.int8), 'absmax_top': torch.tensor([top], dtype=torch.int32)}
        want = [scale_of_log8(h, top) for h in range(-127, 128)]
        assert scales4(log8).tolist() == pytest.approx(want, rel=1e-6) and scales4(log8)[127] == 0
    assert scales4(log8)[-1] == 4 and scales4(log8)[-15] == 2 and scales4(log8)[126] == -4 * 2 ** -9


@pytest.mark.parametrize('blocksize', [64, 128])
def test_nf4_has_the_bytes_of_bitsandbytes(blocksize):
    """With fp32 scales codes and absmax are bitsandbytes' to the byte, and so is what comes back."""
    bnb = pytest.importorskip('bitsandbytes', reason='peer test: needs bitsandbytes').functional
    w = torch.randn(96, 128) * 0.02
    w[0] = 0
    code, state = bnb.quantize_4bit(w, blocksize=blocksize, quant_type='nf4')
    codes, held = quantize4(w, 'nf4', blocksize, 'fp32')
    assert torch.equal(pack4(codes, 'nf4'), code.flatten()) and torch.equal(held['absmax'], state.absmax)
    torch.testing.assert_close(back(w, 'nf4', blocksize, 'fp32')[0], bnb.dequantize_4bit(code, state), rtol=1e-6, atol=1e-8)


# -------------------------------------------------------------------------------------------------------------- kernels


def kept(scales, groups):
    """Random scales as each way of keeping them would have them."""
    if scales in ('fp16', 'fp32'):
        return {'absmax': torch.randn(groups).to(torch.float16 if scales == 'fp16' else torch.float32)}
    if scales == '8bit':
        return {'absmax': torch.randint(0, 256, (groups,), dtype=torch.uint8), 'absmax_top': torch.rand(-(-groups // 256))}
    return {'absmax': torch.randint(-127, 128, (groups,), dtype=torch.int8),
            'absmax_top': torch.randint(-400, 400, (1,), dtype=torch.int32)}


@needs_compiler
@pytest.mark.parametrize('threads', [1, 2])
@pytest.mark.parametrize('scales', SCALES4)
@every_code
def test_kernel_equals_torch_bit_for_bit(monkeypatch, format, scales, threads):
    """kernels.c and the torch code give the same bits, also as bf16: groups of 2 to 64, whole tensors and parts of them, which
    are of whole bytes."""
    library, used, tried, bits = kernels(), [], 0, CODED4[format].bits
    assert library is not None, 'a C compiler is there, the kernel is not'
    torch.set_num_threads(threads)
    for group in (2, 6, 16, 24, 32, 64):
        n = 49152 // group * group                                      # above the size from which threads share the work
        code, held = torch.randint(0, 256, (n * bits // 8,), dtype=torch.uint8), kept(scales, n // group)
        assert scales4(held).shape == (n // group,)
        for start, stop in [(0, n), (0, group), (3 * group, 11 * group), (n - 5 * group, n), (group, n - group)]:
            if bits < 4 and (start % 8 or stop % 8):
                continue
            tried += 1
            with monkeypatch.context() as m:
                m.setattr(quant, 'kernels', lambda: used.append(1) or library)
                got = decode4(code, held, format, start, stop)
                m.setattr(quant, 'kernels', lambda: None)
                assert torch.equal(got, decode4(code, held, format, start, stop)), (group, start, stop)
                assert torch.equal(got, decode4(code, held, format)[start:stop])
                for dtype in (torch.bfloat16, torch.float16, torch.float64):
                    m.setattr(quant, 'kernels', lambda: library)
                    low = decode4(code, held, format, start, stop, dtype)
                    assert low.dtype == dtype and torch.equal(low, got.to(dtype)), (group, start, stop)
    torch.set_num_threads(1)
    assert len(used) == tried >= 22


@needs_compiler
def test_bfloat16_of_the_kernel_is_rounded_as_torch_rounds():
    """Ties go to even, the largest and the smallest numbers are the same as of .bfloat16()."""
    code = torch.arange(256, dtype=torch.uint8).repeat(4)
    for s in (1.0, 1 / 3, 3.3e38, 2e-36):
        for group in (8, 16):
            held = {'absmax': torch.full((2048 // group,), s)}
            for format in FORMATS4:
                assert torch.equal(decode4(code, held, format, dtype=torch.bfloat16), decode4(code, held, format).bfloat16()), s


@needs_compiler
@pytest.mark.parametrize('threads', [1, 2])
@pytest.mark.parametrize('scales', SCALES4)
@every_code
def test_product_of_codes_is_the_product_of_the_decoded_weight(format, scales, threads):
    """1 to 4 tokens, odd numbers of rows, groups of 16 to 128, also more of them than are taken at once, fp32 and bf16."""
    most = kernels().most_tokens()
    assert most == 4 or 'avx512f' not in Path('/proc/cpuinfo').read_text()
    torch.set_num_threads(threads)
    for group, n, out in [(16, 384, 87), (32, 384, 1), (48, 384, 88), (64, 384, 87), (128, 384, 5), (16, 1200, 3), (64, 64, 2)]:
        code = torch.randint(0, 256, (n * out * CODED4[format].bits // 8,), dtype=torch.uint8)
        held = kept(scales, n * out // group)
        weight = decode4(code, held, format, dtype=torch.float64).view(out, n)
        for tokens in range(1, 6):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                x = torch.randn(n, tokens).T.to(dtype)                  # not contiguous
                y, want = product4(x, code, held, format, out), x.double() @ weight.T
                if tokens > most:
                    assert y is None
                else:
                    assert y.shape == want.shape and y.dtype == torch.float32 and y.is_contiguous()
                    assert ((y - want).abs() <= 1e-5 * (x.double().abs() @ weight.T.abs()) + 1e-38).all(), (group, tokens)
    torch.set_num_threads(1)


@needs_compiler
def test_product_of_codes_is_left_to_torch_where_it_does_not_fit(monkeypatch):
    """fp64, groups that are no multiple of 16 or do not divide the row, no kernel, scales of another type: None."""
    def product(x, group=16, dtype=torch.float32):
        numel = x.shape[1] * 3
        code, held = torch.zeros(numel // 2, dtype=torch.uint8), {'absmax': torch.ones(numel // group, dtype=dtype)}
        return product4(x, code, held, 'nf4', 3)
    x = torch.ones(2, 96)
    fits = kernels().most_tokens() > 0
    assert (product(x) is not None) == (product(x, 48) is not None) == fits
    assert product(x.double()) is product(x, 24) is product(x, 6) is product(x, dtype=torch.bfloat16) is None
    assert product(torch.ones(2, 32), 48) is product(torch.ones(2, 128), 128 * 3) is None
    monkeypatch.setattr(quant, 'kernels', lambda: None)
    assert product(x) is None


@pytest.mark.parametrize('compiled', [True, False])
@every_format
def test_decoding_does_not_depend_on_the_default_device(monkeypatch, format, compiled):
    """Under torch.set_default_device('meta') and in `with torch.device('meta')` weights on the CPU are decoded there."""
    if not compiled:
        monkeypatch.setattr(quant, 'kernels', lambda: None)
    x, w = torch.randn(2, 64), torch.randn(16, 64)
    for scales in ('', '8bit'):
        codes, held = quantize4(w, format, 0, scales)
        code = pack4(codes, format)
        want, product = decode4(code, held, format), product4(x, code, held, format, 16)
        for cache in (quant._table, quant._grid_from):
            cache.cache_clear()
        with torch.device('meta'):
            again, held2 = quantize4(w, format, 0, scales)
            got, low = decode4(code, held, format), decode4(code, held, format, dtype=torch.bfloat16)
            y = product4(x, code, held, format, 16)
        assert torch.equal(got, want) and torch.equal(low, want.bfloat16()) and torch.equal(again, codes)
        assert all(torch.equal(held[n], held2[n]) for n in held) and (y is product is None or torch.equal(y, product))


@every_format
def test_decoding_does_not_depend_on_the_default_dtype(format):
    """Under torch.set_default_dtype(float64) weights get the same codes, and those decode to the same fp32 numbers."""
    w = torch.randn(16, 64)
    want, _ = back(w, format)
    quant._table.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        got, _ = back(w, format)
    finally:
        torch.set_default_dtype(torch.float32)
        quant._table.cache_clear()
    assert got.dtype == torch.float32 and torch.equal(got, want)


DECODE = """
import os, pwd, tempfile, warnings, zlib
from concurrent.futures import ThreadPoolExecutor
def nobody(uid):
    raise KeyError(uid)
if 'HOMELESS' in os.environ:
    del os.environ['HOME'], os.environ['XDG_CACHE_HOME']
    pwd.getpwuid = nobody
tempfile.tempdir = None
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter('always')
    import torch, quant
    if 'SOURCELESS' in os.environ:
        quant.__file__ = '/nowhere/quant.py'
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: quant.kernels(), range(8)))
    assert all(f is found[0] is quant.kernels() for f in found)
said = [str(w.message) for w in said if 'kernels.c' in str(w.message)]
torch.manual_seed(0)
torch.set_num_threads(2)
code = torch.randint(0, 256, (32768,), dtype=torch.uint8)
log8 = {'absmax': torch.randint(-127, 128, (2048,), dtype=torch.int8), 'absmax_top': torch.tensor([9], dtype=torch.int32)}
sums = [zlib.crc32(quant.decode4(code, held, f, dtype=d).float().numpy().tobytes()) for f in quant.FORMATS4
        for d in (torch.float32, torch.bfloat16) for held in ({'absmax': torch.randn(2048)}, log8)]
print(quant.kernels() is not None, sums, *said, sep='|')
"""

# compilers that write down their arguments; the second takes the library that is there, which is faster
NO_OPENMP = """#!/bin/sh
for a; do [ "$a" = -fopenmp ] && exit 1; done
exec cc "$@"
"""
COPY = """#!/bin/sh
for a; do [ "$last" = -o ] && out=$a && echo half > "$a"; last=$a; done
echo "$@" >> "$0.log"
sleep {seconds}
exec cp '{library}' "$out"
"""


def compiler(path, text, **words):
    path.write_text(text.format(library=kernels()._name, **words) if words else text)
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_kernels_wherever_they_can_be_compiled(start, tmp_path):
    """NANOBIT_KERNELS=0 compiles nothing and is quiet; a compiler that fails and a source that is gone are said once; no
    home, a cache that cannot be written and no OpenMP are made do with; 4 threads at first use compile once. All alike."""
    (tmp_path / 's.py').write_text(DECODE)
    (tmp_path / 'file').touch()
    (tmp_path / 'T').mkdir()
    copy = compiler(tmp_path / 'copycc', COPY, seconds=0.2)
    cases = {'with': {'CC': copy}, 'openmp': {'CC': compiler(tmp_path / 'nocc', NO_OPENMP)},
             'homeless': {'CC': copy, 'HOMELESS': '1', 'TMPDIR': str(tmp_path / 'T')},
             'unwritable': {'CC': copy, 'XDG_CACHE_HOME': str(tmp_path / 'file' / 'x'), 'TMPDIR': str(tmp_path / 'T')},
             'off': {'NANOBIT_KERNELS': '0'}, 'broken': {'CC': '/bin/false'}, 'missing': {'CC': '/no/such/cc'},
             'sourceless': {'SOURCELESS': '1'}}
    jobs = {k: start('s.py', cwd=tmp_path, **{'XDG_CACHE_HOME': str(tmp_path / k)} | v) for k, v in cases.items()}
    results = {k: job.wait() for k, job in jobs.items()}
    assert all(r.code == 0 for r in results.values()), results
    there, sums, said = zip(*((a, b, c) for a, b, *c in (r.out.strip().split('|') for r in results.values())), strict=True)
    assert there == ('True',) * 4 + ('False',) * 4 and len(set(sums)) == 1
    assert [len(words) for words in said] == [0, 0, 0, 0, 0, 1, 1, 1], said
    assert '/bin/false' in said[5][0] and '/no/such/cc' in said[6][0] and 'nowhere' in said[7][0]
    for k in ('with', 'openmp'):
        assert [p.suffix for p in (tmp_path / k / 'nanobit').iterdir()] == ['.so']
    assert not (tmp_path / 'off').exists() and len((tmp_path / 'copycc.log').read_text().splitlines()) == 3
    assert [p.suffix for p in tmp_path.glob('T/nanobit-*/*')] == ['.so'] * 2
    assert [list(p.iterdir()) for p in tmp_path.glob('[bm]*/nanobit')] == [[], []]          # no half of a library is left


@needs_compiler
def test_two_processes_compile_at_once(start, tmp_path):
    """While one process is writing its library another one does not load the half of it: both work, one file is left."""
    (tmp_path / 's.py').write_text(DECODE)
    environment = {'XDG_CACHE_HOME': str(tmp_path / 'cache'), 'CC': compiler(tmp_path / 'slowcc', COPY, seconds=0.7)}
    jobs = [start('s.py', cwd=tmp_path, **environment)]
    while not list(tmp_path.glob('cache/nanobit/*')) and jobs[0].process.is_alive():
        time.sleep(0.01)
    jobs.append(start('s.py', cwd=tmp_path, **environment))
    results = [job.wait() for job in jobs]
    assert [(r.code, r.out[:5]) for r in results] == [(0, 'True|')] * 2, results
    assert results[0].out == results[1].out and results[0].out.count('|') == 1
    assert [p.suffix for p in tmp_path.glob('cache/nanobit/*')] == ['.so']
