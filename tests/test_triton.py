"""kernels_triton.py in Triton's interpreter against torch, and in its compiler, each in a process of its own."""
import importlib.util

import pytest

from conftest import ROOT

pytestmark = pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='needs triton')
CHECK = """
import itertools, sys, torch
sys.path.insert(0, {root!r})
import kernels_triton, layers, quant
torch.manual_seed(0)
assert kernels_triton.usable(torch.ones(1))

for tokens, n, dtype, gated, normed in itertools.product((1, 5), (8, 100), (torch.float32, torch.bfloat16), (0, 1), (0, 1)):
    # small integers, of which sums are exact: any order gives the same bits
    x = torch.randint(-3, 4, (tokens, n * (1 + gated))).to(dtype)
    x[0] = 0
    gain = torch.rand(n) + 0.5 if normed else None
    a = quant.wide(layers._relu2_glu(x) if gated else x)
    rstd = (torch.linalg.vector_norm(a, dim=-1, keepdim=True).square() / n + 1e-5).rsqrt()
    codes, scales = quant.quantize_rows(a * rstd * gain if normed else a)
    found = kernels_triton.norm_to_int8(x, gain, 1e-5, 'relu2_glu' if gated else None)
    assert torch.equal(found[0], codes) and torch.equal(found[1] / 127, scales), (tokens, n, dtype, gated, normed)
    assert found[2] is None if gain is None else torch.equal(found[2], rstd)

x = torch.randn(6, 300)                              # other orders of the sum: a code in a thousand may differ by one
a = x * (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / 300 + 1e-5).rsqrt()
off = (kernels_triton.norm_to_int8(x, torch.ones(300), 1e-5)[0].int() - quant.quantize_rows(a)[0].int()).abs()
assert off.max() <= 1 and off.sum() <= 2
for act, gain in itertools.product((None, 'relu2_glu'), (None, torch.ones(4))):
    x = torch.ones(2, 8 if act else 4)
    x[1, 2] = torch.nan
    assert kernels_triton.norm_to_int8(x, gain, 1e-5, act)[1].isnan().tolist() == [[False], [True]]

for tokens, n, rows in ((1, 16, 16), (8, 700, 37), (3, 5, 2)):
    q, codes = torch.randint(-128, 128, (tokens, n), dtype=torch.int8), torch.randint(0, 3, (rows, n))
    assert torch.equal(kernels_triton.int_product(q, quant.pack_bits(codes, 2)).long(), q.long() @ (codes - 1).T)

for (tokens, n, rows), format in itertools.product(((1, 64, 16), (8, 128, 37)), quant.FORMATS4):
    w, x = torch.randn(rows, n), torch.randn(tokens, n).bfloat16()
    group = quant.FORMATS4[format].group
    codes, held = quant.quantize4(w, format)
    code = quant.pack4(codes, format)
    expected = x.double() @ quant.decode4(code, held, format).view(rows, n).double().T
    levels = quant.levels4(torch.arange(16), format)
    found = kernels_triton.scaled_product(x, code, quant.scales4(held), levels, rows, group, quant.FORMATS4[format].high_first)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
# the layers that use them, beside the same layers without
for act, gated in ((None, 1), ('relu2_glu', 2)):
    layer = layers.TernaryLinear(32, 24, True, act=act, chunks=3)
    for packed, tokens in ((False, 5), (True, 5), (True, 9)):
        found = []
        if packed:
            layer.pack_()
        for on in (True, False):
            kernels_triton.ON = on
            x = torch.randint(-3, 4, (tokens, 32 * gated), generator=torch.Generator().manual_seed(1)).float().requires_grad_()
            y = layer(x)
            y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
            found.append((y, x.grad))
        for ours, torchs in zip(*found):
            torch.testing.assert_close(ours, torchs, rtol=1e-6, atol=1e-6)
four, x = layers.Linear4bit(64, 24, format='nf4').pack_(), torch.randn(3, 64)
kernels_triton.ON = True
ours = four(x)
kernels_triton.ON = False
torch.testing.assert_close(ours, four(x), rtol=1e-5, atol=1e-5)
print('equal')
"""

AHEAD = """
import sys
sys.path.insert(0, {root!r})
import kernels_triton as k, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def compiled(kernel, pointers, numbers, constants, **options):
    signature = pointers | dict.fromkeys(numbers, 'i32') | dict.fromkeys(constants, 'constexpr')
    constants = {{(kernel.arg_names.index(name),): value for name, value in constants.items()}}
    source = ASTSource(kernel, {{name: signature[name] for name in kernel.arg_names}}, constants)
    assert triton.compile(source, target=GPUTarget('cuda', 90, 32), options=options).asm['cubin']

for gated, normed, block in ((True, True, 4096), (False, False, 512)):
    compiled(k._norm_to_int8, dict(x='*bf16', gain='*fp32' if normed else 'constexpr', q='*i8', tops='*fp32',
                                   rstd='*fp32' if normed else 'constexpr', eps='fp32'), ['n'],
             dict(GATED=gated, NORM=normed, BLOCK=block) | (dict() if normed else dict(gain=None, rstd=None)),
             num_warps=min(32, max(4, block // 512)), enable_fp_fusion=False)
compiled(k._int_product, dict(q='*i8', code='*u8', y='*i32'), ['n', 'rows'], dict(WIDTH=256, ROWS=16, BYTES=128))
for scale, high_first, group in (('fp16', False, 16), ('fp16', True, 64), ('fp32', True, 32)):
    compiled(k._scaled_product, dict(x='*bf16', code='*u8', absmax='*' + scale, levels='*fp32', y='*fp32'), ['rows'],
             dict(N=1024, HIGH_FIRST=high_first, GROUP=group, ROWS=16))
print('compiled')
"""


def test_triton_kernels_equal_torch(start, tmp_path):
    """Codes, scales and integer products are those of torch to the bit, 4-bit products to 1e-5; so are the layers."""
    (tmp_path / 'check.py').write_text(CHECK.format(root=str(ROOT)))
    done = start('check.py', cwd=tmp_path, real=True, TRITON_INTERPRET='1', NANOBIT_TRITON='1').wait()
    assert done.out.endswith('equal\n'), done.err


def test_triton_kernels_compile_for_a_gpu(start, tmp_path):
    """Triton's compiler, which needs no GPU, makes machine code for compute capability 9.0 from each kernel."""
    (tmp_path / 'ahead.py').write_text(AHEAD.format(root=str(ROOT)))
    done = start('ahead.py', cwd=tmp_path, real=True, NANOBIT_TRITON='1', TRITON_CACHE_DIR=str(tmp_path)).wait()
    assert done.out.endswith('compiled\n'), done.err
