"""torch.compile of layers and of attached models, and the compilation of kernels.c in every environment."""
import shutil
import time

import pytest
import torch
import torch.nn as nn
from formulas import fixed, gradients, same  # noqa: F401
from test_optim import distance, make, train

from layers import BinaryConv2d, BinaryLinear, Conv4bit, Linear4bit, TernaryConv2d, TernaryLinear, convert
from quant import kernels

needs_compiler = pytest.mark.skipif(not shutil.which('cc'), reason='needs a C compiler')


@pytest.fixture(autouse=True)
def fresh():
    """No shapes of an earlier test are remembered, which would make those of this one dynamic."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def linears():
    return nn.Sequential(TernaryLinear(12, 48, True, chunks=(20, 28)), TernaryLinear(24, 24, act='relu2_glu'),
                         BinaryLinear(24, 24, act='gelu', chunks=3), Linear4bit(24, 8), TernaryLinear(8, 1))


def convolutions():
    return nn.Sequential(BinaryConv2d(12, 4, 3, act='relu'), TernaryConv2d(4, 4, 2, padding='same', act='relu'),
                         Conv4bit(4, 5, 1, act='gelu'))


def packed():
    others = ['int8', 'half', 'int4', 'fit4', ('nf4', dict(scales='8bit')), 'tern', 'bin']
    model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(8)))
    rules = {'0': ('lora', dict(rank=2, base='nf4'))} | {str(i): rule for i, rule in enumerate(others, 1)}
    convert(model, rules, verbose=False, packed=True)
    nn.init.normal_(model[0].lora_B)
    return model


@pytest.mark.parametrize('make, backend', [
    (linears, 'aot_eager'), (convolutions, 'aot_eager'), (packed, 'aot_eager'),
    pytest.param(lambda: nn.Sequential(BinaryLinear(12, 12, act='gelu'), TernaryLinear(12, 8), Linear4bit(8, 4)), 'inductor',
                 marks=pytest.mark.skipif(not (shutil.which('g++') or shutil.which('clang++')), reason='needs C++'))],
    ids=['linear', 'conv', 'packed', 'inductor'])
def test_compiled_equals_eager(make, backend):
    """torch.compile takes the layers as one graph; output and gradients are those of eager mode to 1e-5."""
    model = make()
    x = torch.randn(2, 12, 7, 6) if make is convolutions else torch.randn(5, 12)
    v = torch.randn_like(model(x))
    got, want = (gradients(model, f, x, v) for f in (torch.compile(model, fullgraph=True, backend=backend), model))
    same(got, want, 1e-5)


def test_torch_compile_of_an_attached_model_computes_the_same():
    """The graph breaks at each layer with a projected backward pass; ten steps give the weights of eager mode."""
    (a, oa), (b, ob) = (make(True, rank=2, side='right') for _ in 'ab')
    train(a, oa, 10)
    train(torch.compile(b, backend='aot_eager'), ob, 10)
    assert distance(a, b) < 1e-5


# ------------------------------------------------------------------------------------------------------------ kernels.c

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
code = torch.randint(0, 256, (32768,), dtype=torch.uint8)
log8 = {'absmax': torch.randint(-127, 128, (2048,), dtype=torch.int8), 'absmax_top': torch.tensor([9], dtype=torch.int32)}
sums = [zlib.crc32(quant.decode4(code, held, f, dtype=d).float().numpy().tobytes()) for f in quant.FORMATS4
        for d in (torch.float32, torch.bfloat16) for held in ({'absmax': torch.randn(2048)}, log8)]
print(quant.kernels() is not None, sums, *said, sep='|')
"""

# A compiler without OpenMP, and one that writes down its arguments and takes the library that is there
NO_OPENMP = """#!/bin/sh
for a; do [ "$a" = -fopenmp ] && exit 1; done
exec cc "$@" -O0
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
def test_kernels_are_compiled_wherever_they_can_be(start, tmp_path):
    """No OpenMP, no home, no writable cache: compiled once, by one of 4 threads. Where that fails, one warning; all alike."""
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
    results = {k: job.wait(300) for k, job in jobs.items()}
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
    """While one process writes its library another one does not load the half of it: both work, one file is left."""
    (tmp_path / 's.py').write_text(DECODE)
    environment = {'XDG_CACHE_HOME': str(tmp_path / 'cache'), 'CC': compiler(tmp_path / 'slowcc', COPY, seconds=0.7)}
    jobs = [start('s.py', cwd=tmp_path, **environment)]
    while not list(tmp_path.glob('cache/nanobit/*')) and jobs[0].process.is_alive():
        time.sleep(0.01)
    jobs.append(start('s.py', cwd=tmp_path, **environment))
    results = [job.wait(300) for job in jobs]
    assert [(r.code, r.out[:5]) for r in results] == [(0, 'True|')] * 2, results
    assert results[0].out == results[1].out and results[0].out.count('|') == 1
    assert [p.suffix for p in tmp_path.glob('cache/nanobit/*')] == ['.so']
