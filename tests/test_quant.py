"""Codes and scales: worked examples, literal formulas, published errors and bytes, and kernels.c against torch."""
import math
import runpy
import shutil
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from formulas import fixed, off  # noqa: F401

import quant
from conftest import ROOT
from quant import (AS_ON_GPU, CODED4, FIT4, FORMATS4, GRIDS, NF4, SCALES4, binarize, decode4, group_grid, group_scales,
                   half_bits, kernels, pack4, pack_bits, product4, quantize4, quantize_rows, scales4, ternarize, to_grid,
                   unpack_bits)

every_format = pytest.mark.parametrize('format', FORMATS4)
every_code = pytest.mark.parametrize('format, scales', [(format, scales) for i, format in enumerate(CODED4)
                                                        for j, scales in enumerate(SCALES4) if (i + j) % 2 == 0])
needs_compiler = pytest.mark.skipif(AS_ON_GPU or not shutil.which('cc'), reason='needs a C compiler, and kernels.c in use')


def back(w, format, group=0, scales=''):
    """w after quantize4, pack4 and decode4, and the bits a weight that the codes and the scales take."""
    codes, held = quantize4(w, format, group, scales)
    code = pack4(codes, format)
    flat = decode4(code, held, format)
    return flat[:w.numel()].view(w.shape), 8 * (code.nbytes + sum(t.nbytes for t in held.values())) / w.numel()


def scale_of_log8(h, top):
    """The scale of a signed byte, literally."""
    return np.sign(h) * 2.0 ** ((top - 127 + abs(h)) / 14) if h else 0.0


# ------------------------------------------------------------------------------------------------------ 1, 1.58, 8 bits


def test_binarize_by_hand():
    """Bits are w > mean(w), strictly, in each chunk; half_bits are -1/2 and 1/2. The mean of bf16 weights is taken in fp32."""
    assert binarize(torch.tensor([[1.0, 2], [3, 6]])).tolist() == [[False, False], [False, True]]
    assert binarize(torch.tensor([[1.0, 2], [3, 2]])).tolist() == [[False, False], [True, False]]
    assert binarize(torch.tensor([[1.0, 2], [3, 6]]), chunks=2).tolist() == [[False, True], [False, True]]
    assert half_bits(torch.tensor([[1.0, 2], [3, 6]]), 2).tolist() == [[-0.5, 0.5], [-0.5, 0.5]]
    assert not binarize(torch.full((3, 5), 0.1)).any()
    for of in (binarize, lambda w: half_bits(w, offset=0.0)):               # the mean .999 would be 1 in bf16
        assert of(torch.cat([torch.ones(1000), torch.zeros(1)]).bfloat16()).sum() == 1000


def test_ternarize_by_hand():
    """Codes are round(w / mean|w|), half to even, the mean at least 1e-5 and one for each chunk."""
    codes, scale = ternarize(torch.tensor([[1, -2], [0.2, 4.8]]))
    assert codes.tolist() == [[0, -1], [0, 1]] and codes.dtype == torch.int8 and scale.tolist() == [2.0]
    assert ternarize(torch.zeros(2, 2))[1].tolist() == pytest.approx([1e-5])
    assert ternarize(torch.tensor([[1e-5, 1e-6]]))[0].tolist() == [[1, 0]]
    codes, scale = ternarize(torch.tensor([[1, -2], [1, -2], [0.2, 4.8]]), chunks=(1, 2))   # means 1.5 and 2
    assert codes.tolist() == [[1, -1], [0, -1], [0, 1]] and scale.tolist() == [1.5, 2]


def test_quantize_rows_by_hand():
    """Codes are round(127 x / max|x|) per row, half to even; max|x| counts as at least 1e-5."""
    codes, scale = quantize_rows(torch.tensor([[1.0, -127, 2.5], [0, 0, 0], [1e-6, 0, 0]]))
    assert codes.tolist() == [[1, -127, 2], [0, 0, 0], [13, 0, 0]] and codes.dtype == torch.int8
    torch.testing.assert_close(scale, torch.tensor([[1], [1e-5 / 127], [1e-5 / 127]]))


@pytest.mark.parametrize('width, codes, packed', [
    (1, [1, 0, 1, 1, 0, 0, 0, 1, 1], [0b10001101, 1]), (2, [1, 2, 3, 0, 2], [0b00111001, 2]), (4, [3, 5, 15], [0x53, 0x0F]),
    (3, [1, 2, 3, 4, 5, 6, 7, 0], [0b11010001, 0b01011000, 0b00011111]), (8, [3, 255], [3, 255])])
def test_packed_bits_come_back(width, codes, packed):
    """The first code sits in the lowest bits of the first byte. unpack_bits(pack_bits(c)) is c for any length; rows are filled
    up with zeros to whole bytes, of 3 bits to threes."""
    assert pack_bits(torch.tensor(codes), width).tolist() == packed
    for n in (1, 2, 3, 7, 8, 9, 16, 24, 33):
        codes = torch.randint(0, 2 ** width, (2, 3, n), dtype=torch.uint8)
        packed = pack_bits(codes, width)
        n_bytes = 3 * math.ceil(n / 8) if width == 3 else math.ceil(n * width / 8)
        assert packed.dtype == torch.uint8 and packed.shape == (2, 3, n_bytes)
        assert torch.equal(unpack_bits(packed, width, n), codes)
        assert not unpack_bits(packed, width, n_bytes * 8 // width)[..., n:].any()


def test_group_grids_by_hand():
    """int2 of [-1, 0.1, 0.6, 2]: steps of 1 from -1, zero at code 1; the others by mean|w| = 0.925."""
    w = torch.tensor([[-1.0, 0.1, 0.6, 2.0]])
    for levels, scale, zero, codes in (('int2', 1, 1, [0, 1, 2, 3]), ('tern', 0.925, 1, [0, 1, 2, 2]),
                                       ('bin', 1.85, 0.5, [0, 1, 1, 1])):
        s, z = group_grid(w, levels)
        assert (s.item(), z.item()) == (pytest.approx(scale, rel=1e-3), zero) and to_grid(w, s, z, levels).tolist() == [codes]
    scale, zero = group_grid(torch.tensor([[0.5, 1.0]]), 'int2')            # 0 is on the grid of positive weights too
    assert (scale.item() * 3, zero.item()) == (pytest.approx(1.0, rel=1e-3), 0.0)
    for levels in ('int4', 'tern', 'bin'):          # shrunk: each scale in proportion
        assert group_grid(w, levels, 0.5)[0].item() == pytest.approx(group_grid(w, levels)[0].item() / 2, rel=1e-3)
    for bad in (float('nan'), 7e6):
        with pytest.raises(ValueError, match='fp16'):
            group_grid(torch.tensor([[bad, 1.0]]), 'int4')
    assert all(grid.steps <= 2 ** grid.bits for grid in GRIDS.values())


# --------------------------------------------------------------------------------------------------------------- 4 bits


def test_four_bits_by_hand():
    """uniform: round((w + n) / 2n * 15), n in fp16. The first of two weights is in the low half, for nf4 the high."""
    w = torch.tensor([-2.0, 2, 0, 1, -1, 0.5])                              # (w + 2) * 3.75: 0 15 7.5 11.25 3.75 9.375
    codes, held = quantize4(w, 'uniform', 6)
    assert codes.tolist() == [[0, 15, 8, 11, 4, 9]] and held['absmax'].tolist() == [2] and held['absmax'].dtype == torch.float16
    assert pack4(codes, 'uniform').tolist() == [0xF0, 0xB8, 0x94]
    assert back(w, 'uniform', 6)[0].tolist() == pytest.approx([-2, 2, 2 / 15, 14 / 15, -14 / 15, 0.4], rel=1e-6)
    # n = 0.1 is 0.099976 in fp16: 0.053325 -> 11.5004 -> 12; with the fp32 n it would be 11.4994 -> 11.
    codes, held = quantize4(torch.tensor([0.1, -0.1, 0.053325, 0.1]), 'uniform', 4)
    assert codes.tolist() == [[15, 0, 12, 15]] and held['absmax'].item() == torch.tensor(0.1).half().item()
    w = torch.tensor([-1.0, 1, 0, 0.5])                                     # nf4: .4407 < .5 < .5626
    assert pack4(quantize4(w, 'nf4', 4)[0], 'nf4').tolist() == [0x0F, 0x7C]
    code, held = torch.tensor([0x0F, 0x7C], dtype=torch.uint8), {'absmax': torch.tensor([2.0])}
    assert decode4(code, held, 'nf4').tolist() == pytest.approx([-2, 2, 0, 2 * NF4[12]], rel=1e-6)
    assert decode4(code, held, 'fit4').tolist() == pytest.approx([2, 2 * FIT4[0], 2 * FIT4[12], 2 * FIT4[7]], rel=1e-6)
    assert decode4(code, held, 'uniform').tolist() == pytest.approx([2, -2, 2 * 9 / 15, -2 / 15], rel=1e-6)
    codes, held = quantize4(w * 3, 'fit4', 2)                               # two groups, the first with the largest weight
    assert held['absmax'].dtype == torch.int8 and held['absmax_top'].tolist() == [23] and codes.shape == (2, 2)
    assert 2 ** (22 / 14) < 3 < 2 ** (23 / 14)


@pytest.mark.parametrize('group', [2, 64])
def test_uniform_is_its_formula(group):
    """u = round((w + n) / 2n * 15), w ~ u / 15 * 2n - n, with n = absmax rounded to fp16 first."""
    w = torch.randn(256, group) * torch.logspace(-3, 3, 256)[:, None]
    n = torch.from_numpy(w.abs().amax(1, keepdim=True).numpy().astype(np.float16).astype(np.float64))
    codes, held = quantize4(w, 'uniform', group)
    c, u = codes.double(), ((w.double() + n) / (2 * n) * 15).clamp(0, 15)
    assert (c - u).abs().max() <= 0.5 + 1e-5                                # nearest; with n in fp32 it would be .503 off
    assert held['absmax'].dtype == torch.float16 and torch.equal(held['absmax'].double(), n[:, 0])
    assert (back(w, 'uniform', group)[0] - (c / 15 * 2 * n - n)).abs().div(n).max() < 1e-6


def test_nf4_is_the_nearest_level():
    """Of the sixteen levels times the kept scale, each weight gets the nearest."""
    for format, table, group, scales in (('nf4', NF4, 64, ''), ('nf4', NF4, 10, 'fp32'), ('fit4', FIT4, 16, 'fp16')):
        w, levels = torch.randn(64, group), torch.tensor(table)
        absmax = w.abs().amax(1, keepdim=True)
        grid = levels * (absmax if scales == 'fp32' else absmax.half().float())
        expected = grid.gather(1, (w.unsqueeze(-1) - grid[:, None]).abs().argmin(-1))
        torch.testing.assert_close(back(w, format, group, scales)[0], expected, rtol=1e-6, atol=1e-7)


def test_nf4_levels_are_quantiles_of_the_normal_distribution():
    """Phi^-1 at 7 even steps down from and 8 up to .9677083, over the largest: the sixteen numbers to 5e-8."""
    phi = statistics.NormalDist().inv_cdf
    down, up = (torch.linspace(0.9677083, 0.5, n)[:-1].tolist() for n in (8, 9))            # fp32, as they were made
    want = sorted([*(-phi(p) for p in down), 0.0, *(phi(p) for p in up)])
    assert [x / max(want) for x in want] == pytest.approx(NF4, abs=5e-8) and len(NF4) == 16 and sorted(FIT4) == list(FIT4)


def test_fit4_takes_the_best_scale_near_the_absmax():
    """No step from 3 below to 1 above the absmax, with either sign, has a smaller error; the whole grid hardly ever."""
    w, levels = torch.randn(100, 32).double(), torch.tensor(FIT4).double()
    codes, held = quantize4(w, 'fit4', 32)
    top = held['absmax_top'].item()
    assert 2 ** ((top - 1) / 14) < w.abs().max().item() <= 2 ** (top / 14) * (1 + 1e-6)
    scale = torch.tensor([scale_of_log8(h, top) for h in held['absmax'].tolist()])
    result = (levels[codes.long()] * scale[:, None] - w).square().sum(1)
    grid = torch.tensor([scale_of_log8(h, top) for h in range(-127, 128) if h]).double()
    errors = torch.stack([(w.unsqueeze(-1) - s * levels).abs().amin(-1).square().sum(1) for s in grid], 1)  # (groups, 254)
    steps = 14 * (grid.abs() / w.abs().amax(1, keepdim=True)).log2()
    best = errors.where((steps > -3.49) & (steps < 1.49), 1e9).amin(1)
    assert (result <= best * 1.0001).all()
    assert result.sum().sqrt() <= errors.amin(1).sum().sqrt() * 1.01 and (scale < 0).float().mean() > 0.2
    torch.testing.assert_close(back(w, 'fit4', 32)[0].double(), levels[codes.long()] * scale[:, None], rtol=1e-5, atol=1e-6)


def test_fit4_does_not_depend_on_the_size_of_the_weights():
    """Weights times a power of two have the same codes and places, up to the largest float."""
    w = torch.randn(64, 32)
    codes, held = quantize4(w, 'fit4')
    for power in (-112, -30, 1, 80, 125):
        codes2, held2 = quantize4(w * 2.0 ** power, 'fit4')
        assert torch.equal(held2['absmax'], held['absmax']) and torch.equal(codes2, codes)
        assert held2['absmax_top'] == held['absmax_top'] + 14 * power and held2['absmax_top'].dtype == torch.int32
    w = torch.full((2, 32), torch.finfo(torch.float32).max)                 # the scale next above it is no infinity
    assert off(back(w, 'fit4')[0], w) < 0.1


@pytest.mark.parametrize('make, groups, group', [
    (torch.randn, 4_000, 32), (torch.rand, 40_000, 2), (lambda n: torch.randn(n) ** 3, 4_000, 16)],
    ids=['normal', 'even, encoded in two parts', 'outliers'])
def test_decoded_fit4_weights_are_encoded_without_a_change(groups, group, make):
    """Decoded weights have a code without error, also as a part of a tensor whose largest weight is another."""
    once = back(make(groups * group), 'fit4', group)[0].view(-1, group)
    largest = once.abs().amax(1)
    for t in (once, once[largest < largest.median()]):
        assert len(t) and torch.equal(back(t, 'fit4', group)[0], t)


def test_no_group_of_fit4_is_worse_than_zeros():
    """Rows from 1 to 1e-6: those far below the largest become zeros, none has an error above that of zeros."""
    w = torch.randn(600, 32) * torch.logspace(0, -6, 600)[:, None]
    codes, held = quantize4(w, 'fit4')
    error = (back(w, 'fit4')[0] - w).norm(dim=1) / w.norm(dim=1)
    assert (error <= 1).all() and error[:200].max() < 0.12 and (error[-100:] == 1).all()
    small = held['absmax'] == 0
    assert torch.equal(small, error == 1) and not codes[small].any() and small.float().mean() < 0.7


def test_errors_and_bits_on_gaussian_weights():
    """Relative RMS error on N(0,1), and the bits of codes and scales, are the published ones to 1 %. 31 % of ternary weights
    are zeros."""
    w = torch.randn(256, 1024)
    for format, group, scales, error, bits in (
            ('uniform', 16, '', 0.0795, 5), ('uniform', 64, '', 0.1004, 4.25), ('nf4', 16, '', 0.0808, 5),
            ('nf4', 64, '', 0.0920, 4.25), ('nf4', 128, '', 0.0956, 4.125), ('nf4', 64, '8bit', 0.0920, 4.127),
            ('nf4', 64, 'fp32', 0.0920, 4.5), ('fit4', 32, '', 0.0736, 4.2501), ('fit4', 64, '', 0.0811, 4.1251)):
        result, taken = back(w, format, group, scales)
        assert off(result, w) == pytest.approx(error, rel=0.01), (format, group)
        assert taken == pytest.approx(bits, abs=2e-4), (format, group)
    codes, scale = ternarize(w)
    assert off(codes * scale, w) == pytest.approx(0.513, rel=0.01)
    assert (codes == 0).float().mean().item() == pytest.approx(0.310, abs=0.003)


def test_levels_of_fit4_are_the_ones_its_script_finds():
    """One more turn of results/fit4.py moves no level by more than 0.006; even levels are worse and move further."""
    turn = runpy.run_path(str(ROOT / 'results' / 'fit4.py'))['error']
    even = torch.linspace(-1, 1, 16)
    error, moved = turn(torch.tensor(FIT4), 32, torch.Generator().manual_seed(1), blocks=1 << 13)
    assert error == pytest.approx(0.0736, rel=0.01)
    assert (moved / moved.abs().max() - torch.tensor(FIT4)).abs().max() < 0.006
    error_of_even, moved = turn(even, 32, torch.Generator().manual_seed(1), blocks=1 << 12)
    assert error_of_even > error * 1.05 and (moved - even).abs().max() > 0.01


@every_format
@pytest.mark.parametrize('scales', ['', 'fp32', '8bit'])
def test_odd_sizes_zeros_and_negative_zeros(format, scales):
    """Groups of zeros come back as zeros, one weight as itself, a length that is no multiple of the group whole."""
    for n, group in [(1, 0), (1, 2), (17, 16), (130, 64), (257 * 2, 2), (7, 6)]:
        w = torch.randn(n) * 0.02
        w[-1] = w.abs().max() * (-1 if n > 1 else 1)
        result, _ = back(w, format, group, scales)
        assert result.shape == w.shape and (result - w).abs().max() <= w.abs().max() * 0.2
        steps = format == 'fit4' and not scales                             # of 2 ** (1 / 14); what fills the group counts
        assert n > 1 or result.item() == pytest.approx(w.item(), rel=0.05 if steps else 0.003)
    w = torch.randn(4, 64)
    w[1], w[2], w[3, ::2] = 0, -0.0, -0.0
    result, _ = back(w, format, 64, scales)
    assert not result[1:3].any() and result.isfinite().all() and result[0].any() and result[3].any()
    assert format != 'nf4' or not result[3, ::2].any()                      # zero is one of its levels
    assert not any(back(zeros, format, 0, scales)[0].any() for zeros in (torch.zeros(40), -torch.zeros(40)))
    codes, again = (quantize4(w, format, 64, scales)[0] for _ in range(2))
    assert torch.equal(codes, again) and (codes[1] == codes[1, 0]).all()    # nothing left to chance


def test_kept_scales():
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
    """With fp32 scales codes, absmax and decoded weights are those of bitsandbytes, to the byte."""
    bnb = pytest.importorskip('bitsandbytes', reason='peer test: needs bitsandbytes').functional
    w = torch.randn(96, 128) * 0.02
    w[0] = 0
    code, state = bnb.quantize_4bit(w, blocksize=blocksize, quant_type='nf4')
    codes, held = quantize4(w, 'nf4', blocksize, 'fp32')
    assert torch.equal(pack4(codes, 'nf4'), code.flatten()) and torch.equal(held['absmax'], state.absmax)
    torch.testing.assert_close(back(w, 'nf4', blocksize, 'fp32')[0], bnb.dequantize_4bit(code, state), rtol=1e-6, atol=1e-8)


# -------------------------------------------------------------------------------------------------------------- kernels


def random_scales(kind, groups):
    """Random scales as each way of keeping them would have them."""
    if kind in ('fp16', 'fp32'):
        return {'absmax': torch.randn(groups).to(torch.float16 if kind == 'fp16' else torch.float32)}
    if kind == '8bit':
        return {'absmax': torch.randint(0, 256, (groups,), dtype=torch.uint8), 'absmax_top': torch.rand(-(-groups // 256))}
    return {'absmax': torch.randint(-127, 128, (groups,), dtype=torch.int8),
            'absmax_top': torch.randint(-400, 400, (1,), dtype=torch.int32)}


@needs_compiler
@every_code
def test_kernel_equals_torch_bit_for_bit(monkeypatch, format, scales):
    """kernels.c and torch decode whole tensors and parts of whole bytes to the same bits, for one thread and two."""
    library, used, tried, bits = kernels(), [], 0, CODED4[format].bits
    assert library is not None, 'a C compiler is there, the kernel is not'
    for group, n in ((2, 4096), (6, 6000), (16, 8192), (24, 6000), (64, 49152)):       # threads share the work of the last
        torch.set_num_threads(2 if group == 64 and format == 'nf4' else 1)
        n = n // group * group
        code, held = torch.randint(0, 256, (n * bits // 8,), dtype=torch.uint8), random_scales(scales, n // group)
        with monkeypatch.context() as m:
            m.setattr(quant, 'kernels', lambda: None)
            expected = decode4(code, held, format)
            for start, stop in [(0, n), (0, group), (3 * group, 11 * group), (n - 5 * group, n), (group, n - group)]:
                if bits < 4 and (start % 8 or stop % 8):
                    continue
                tried += 1
                m.setattr(quant, 'kernels', lambda: None)
                assert torch.equal(decode4(code, held, format, start, stop), expected[start:stop]), (group, start, stop)
                m.setattr(quant, 'kernels', lambda: used.append(1) or library)
                for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                    result = decode4(code, held, format, start, stop, dtype)
                    assert result.dtype == dtype and torch.equal(result, expected[start:stop].to(dtype)), (group, start, stop)
    assert len(used) == 4 * tried >= 60


@needs_compiler
@every_format
def test_bfloat16_of_the_kernel_is_rounded_as_torch_rounds(format):
    """Ties go to even; the largest and the smallest numbers are those of .bfloat16()."""
    code = torch.arange(256, dtype=torch.uint8).repeat(4)
    for s in (1.0, 1 / 3, 3.3e38, 2e-36):
        for group in (8, 16):
            held = {'absmax': torch.full((2048 // group,), s)}
            assert torch.equal(decode4(code, held, format, dtype=torch.bfloat16), decode4(code, held, format).bfloat16()), s


@needs_compiler
@every_code
def test_product_of_codes_is_the_product_of_the_decoded_weight(format, scales):
    """1 to 4 tokens, odd numbers of rows, groups of 16 to 128, fp32, bf16 and fp16, one thread and two."""
    most = kernels().most_tokens()
    processor = Path('/proc/cpuinfo')
    assert most == 4 or not processor.exists() or 'avx512f' not in processor.read_text()
    for group, n, out in [(16, 384, 87), (32, 384, 1), (48, 384, 8), (128, 384, 5), (16, 1200, 3), (64, 64, 2)]:
        torch.set_num_threads(2 if (group, format) == (16, 'nf4') else 1)
        code = torch.randint(0, 256, (n * out * CODED4[format].bits // 8,), dtype=torch.uint8)
        held = random_scales(scales, n * out // group)
        weight = decode4(code, held, format, dtype=torch.float64).view(out, n)
        for tokens, dtype in enumerate((torch.float32, torch.bfloat16, torch.float32, torch.float16, torch.float32), 1):
            x = torch.randn(n, tokens).T.to(dtype)                          # not contiguous
            y, expected = product4(x, code, held, format, out), x.double() @ weight.T
            if tokens > most:
                assert y is None
            else:
                assert y.shape == expected.shape and y.dtype == torch.float32 and y.is_contiguous()
                error, terms = (y - expected).abs(), x.double().abs() @ weight.T.abs()
                assert (error <= 1e-5 * terms + 1e-38).all(), (group, tokens)


@needs_compiler
@pytest.mark.parametrize('strided', ['code', 'absmax'])
def test_codes_and_scales_may_be_views(strided):
    """The kernels read memory in a row. Every other number of a larger tensor is decoded by torch instead."""
    code, absmax = torch.randint(0, 256, (96,), dtype=torch.uint8), torch.rand(12)
    views = {'code': code, 'absmax': absmax}
    views[strided] = torch.stack([views[strided], torch.zeros_like(views[strided])], 1)[:, 0]
    held = {'absmax': views['absmax']}
    assert product4(torch.ones(1, 64), views['code'], held, 'nf4', 3) is None
    assert torch.equal(decode4(views['code'], held, 'nf4'), decode4(code, {'absmax': absmax}, 'nf4'))


@needs_compiler
def test_torch_multiplies_where_the_product_of_codes_does_not_fit(monkeypatch):
    """fp64, groups that are no multiple of 16 or do not divide the row, no kernel, scales of another type: None."""
    def product(x, group=16, dtype=torch.float32):
        numel = x.shape[1] * 3
        code, held = torch.zeros(numel // 2, dtype=torch.uint8), {'absmax': torch.ones(numel // group, dtype=dtype)}
        return product4(x, code, held, 'nf4', 3)
    x = torch.ones(2, 96)
    fits = kernels().most_tokens() > 0
    assert (product(x) is not None) == (product(x, 48) is not None) == fits
    assert product(x.double()) is product(x, 24) is product(x, 6) is product(x, dtype=torch.bfloat16) is None
    assert product(torch.ones(2, 32), 48) is product(torch.ones(2, 128), 128 * 3) is product(x[:0]) is None
    monkeypatch.setattr(quant, 'kernels', lambda: None)
    assert product(x) is None


@pytest.mark.parametrize('compiled', [True, False])
@every_format
def test_decoding_does_not_depend_on_default_device_and_dtype(monkeypatch, format, compiled):
    """Under `with torch.device('meta')` and torch.set_default_dtype(float64) CPU weights code and decode alike."""
    if not compiled:
        monkeypatch.setattr(quant, 'kernels', lambda: None)
    x, w = torch.randn(2, 64), torch.randn(16, 64)

    def everything(scales):
        for cache in (quant._table, quant._grid_from):
            cache.cache_clear()
        codes, held = quantize4(w, format, 0, scales)
        code = pack4(codes, format)
        return [codes, *held.values(), decode4(code, held, format), decode4(code, held, format, dtype=torch.bfloat16),
                product4(x, code, held, format, 16)]
    for scales in ('', '8bit'):
        expected = everything(scales)
        assert expected[-3].dtype == torch.float32 and torch.equal(expected[-2], expected[-3].bfloat16())
        for device, dtype in (('meta', torch.float32), ('cpu', torch.float64)):
            torch.set_default_dtype(dtype)
            try:
                with torch.device(device):
                    result = everything(scales)
            finally:
                torch.set_default_dtype(torch.float32)
                everything('')                      # leaves tables made without these settings
            for a, b in zip(result, expected, strict=True):
                assert a is b is None or torch.equal(a, b) and a.dtype == b.dtype


@needs_compiler
def test_processes_that_start_together_compile_once(monkeypatch, tmp_path):
    """The others wait for the first one's library. flock() keeps threads with their own file apart as it does processes."""
    (tmp_path / 'one.c').write_text('int one(void) { return 1; }')
    compiler = tmp_path / 'compiler'
    compiler.write_text(f'#!/bin/sh\necho once >> {tmp_path}/log\nsleep 0.2\nexec cc "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv('CC', str(compiler))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda _: quant.compile_c(tmp_path / 'one.c', ()), range(3)))
    assert [m.one() for m in made] == [1, 1, 1] and (tmp_path / 'log').read_text() == 'once\n'
