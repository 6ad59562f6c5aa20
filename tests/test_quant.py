"""Sixteen levels and a scale per group: literal formulas, published errors and bytes, and kernels.c against torch."""
import runpy
import shutil
import statistics
import time

import numpy as np
import pytest
import torch

import quant
from conftest import ROOT
from quant import FIT4, FORMATS4, NF4, SCALES4, decode4, group_scales, kernels, pack4, quantize4, scales4

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


def levels_of_log8(h, top):
    """The scale of a signed byte, literally."""
    return np.sign(h) * top * 2.0 ** ((abs(h) - 127) / 14) if h else 0.0


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
    """No step from 3 below to 2 above the absmax, with either sign, has a smaller error; the whole grid hardly ever."""
    w, levels = torch.randn(100, group).double(), torch.tensor(FIT4).double()
    codes, held = quantize4(w, 'fit4', group)
    scale = torch.tensor([levels_of_log8(h, w.abs().max().item()) for h in held['absmax'].tolist()])
    got = (levels[codes.long()] * scale[:, None] - w).square().sum(1)
    grid = torch.tensor([levels_of_log8(h, w.abs().max().item()) for h in range(-127, 128) if h]).double()
    errors = torch.stack([(w.unsqueeze(-1) - s * levels).abs().amin(-1).square().sum(1) for s in grid], 1)  # (groups, 254)
    steps = 14 * (grid.abs() / w.abs().amax(1, keepdim=True)).log2()
    best = errors.where((steps > -3.49) & (steps < 1.51) | (steps.abs() < 0.5), 1e9).amin(1)
    assert (got <= best * 1.0001).all()
    assert got.sum().sqrt() <= errors.amin(1).sum().sqrt() * 1.01 and (scale < 0).float().mean() > 0.2
    torch.testing.assert_close(back(w, 'fit4', group)[0].double(), levels[codes.long()] * scale[:, None], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('factor', [2.0 ** -80, 2.0 ** -30, 2.0 ** 30, 2.0 ** 80], ids='{:.0e}'.format)
def test_fit4_does_not_depend_on_the_size_of_the_weights(factor):
    """Weights times a power of two have the same codes and the same steps: no square of a weight overflows or vanishes."""
    w = torch.randn(64, 32)
    codes, held = quantize4(w, 'fit4')
    codes2, held2 = quantize4(w * factor, 'fit4')
    assert torch.equal(held2['absmax'], held['absmax']) and torch.equal(codes2, codes)


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
        assert n > 1 or got.item() == pytest.approx(w.item(), rel=0.003)
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
    assert held['absmax'].dtype == torch.int8 and held['absmax_top'].tolist() == [3] and codes.shape == (2, 2)


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
    log8 = {'absmax': torch.arange(-128, 128).to(torch.int8), 'absmax_top': torch.tensor([5.0])}
    want = [levels_of_log8(h, 5.0) for h in range(-128, 128)]
    assert scales4(log8).tolist() == pytest.approx(want, rel=1e-6) and scales4(log8)[128] == 0 and scales4(log8)[-1] == 5


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
    return {'absmax': torch.randint(-127, 128, (groups,), dtype=torch.int8), 'absmax_top': torch.rand(1)}


@needs_compiler
@pytest.mark.parametrize('threads', [1, 2])
@pytest.mark.parametrize('scales', SCALES4)
@every_format
def test_kernel_equals_torch_bit_for_bit(monkeypatch, format, scales, threads):
    """kernels.c and the torch code give the same bits: groups of 2 to 64, whole tensors and sub-ranges of groups."""
    library, used = kernels(), []
    assert library is not None, 'a C compiler is there, the kernel is not'
    torch.set_num_threads(threads)
    for group in (2, 6, 16, 24, 32, 64):
        n = 49152 // group * group                                      # above the size from which threads share the work
        code, held = torch.randint(0, 256, (n // 2,), dtype=torch.uint8), kept(scales, n // group)
        assert scales4(held).shape == (n // group,)
        for start, stop in [(0, n), (0, group), (3 * group, 11 * group), (n - 5 * group, n), (group, n - group)]:
            with monkeypatch.context() as m:
                m.setattr(quant, 'kernels', lambda: used.append(1) or library)
                got = decode4(code, held, format, start, stop)
                m.setattr(quant, 'kernels', lambda: None)
                assert torch.equal(got, decode4(code, held, format, start, stop)), (group, start, stop)
                assert torch.equal(got, decode4(code, held, format)[start:stop])
    torch.set_num_threads(1)
    assert len(used) == 30


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
import warnings, zlib
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter('always')
    import torch, quant
    quant.kernels(), quant.kernels()
said = [str(w.message) for w in said if 'kernels.c' in str(w.message)]
torch.manual_seed(0)
code, held = torch.randint(0, 256, (512,), dtype=torch.uint8), {'absmax': torch.randn(32)}
sums = [zlib.crc32(quant.decode4(code, held, f).numpy().tobytes()) for f in quant.FORMATS4]
print(quant.kernels() is not None, sums, *said, sep='|')
"""


@needs_compiler
def test_without_kernels_the_results_are_the_same(start, tmp_path):
    """NANOBIT_KERNELS=0 compiles nothing and is quiet; a compiler that fails is said once; all three decode alike."""
    (tmp_path / 's.py').write_text(DECODE)
    cases = {'with': {}, 'off': {'NANOBIT_KERNELS': '0'}, 'broken': {'CC': '/bin/false'}}
    jobs = {k: start('s.py', cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path / k), **v) for k, v in cases.items()}
    results = {k: job.wait() for k, job in jobs.items()}
    assert all(r.code == 0 for r in results.values()), results
    there, sums, *said = zip(*(r.out.strip().split('|')[:2] for r in results.values()), strict=True)
    assert there == ('True', 'False', 'False') and len(set(sums)) == 1
    said = {k: r.out.strip().split('|')[2:] for k, r in results.items()}
    assert said['with'] == said['off'] == [] and len(said['broken']) == 1 and '/bin/false' in said['broken'][0]
    assert len(list((tmp_path / 'with' / 'nanobit').iterdir())) == 1 and not (tmp_path / 'off').exists()


SLOW_CC = """#!/bin/sh
for a; do [ "$last" = -o ] && echo half > "$a"; last=$a; done
sleep 0.7
exec cc "$@"
"""


@needs_compiler
def test_two_processes_compile_at_once(start, tmp_path):
    """While one process is writing its library another one does not load the half of it: both work, one file is left."""
    (tmp_path / 's.py').write_text(DECODE)
    (tmp_path / 'slowcc').write_text(SLOW_CC)
    (tmp_path / 'slowcc').chmod(0o755)
    environment = {'XDG_CACHE_HOME': str(tmp_path / 'cache'), 'CC': str(tmp_path / 'slowcc')}
    jobs = [start('s.py', cwd=tmp_path, **environment)]
    while not list(tmp_path.glob('cache/nanobit/*')) and jobs[0].process.is_alive():
        time.sleep(0.01)
    jobs.append(start('s.py', cwd=tmp_path, **environment))
    results = [job.wait() for job in jobs]
    assert [(r.code, r.out[:5]) for r in results] == [(0, 'True|')] * 2, results
    assert results[0].out == results[1].out and results[0].out.count('|') == 1
    assert [p.suffix for p in tmp_path.glob('cache/nanobit/*')] == ['.so']
