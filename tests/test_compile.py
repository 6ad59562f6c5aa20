"""torch.compile of layers and of attached models, and the compilation of kernels.c in every environment."""
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from formulas import fixed, gradients, same  # noqa: F401
from test_optim import distance, make, train

from layers import BinaryConv2d, BinaryLinear, Conv4bit, Linear4bit, TernaryConv2d, TernaryLinear, convert, ramp
from measure import steps
from quant import kernels
from report import costs
from train_bitnet import BitNet, BitNetConfig
from train_gpt import GPT, GPTConfig


@pytest.fixture(autouse=True)
def fresh():
    """No shapes of an earlier test are remembered, which would make those of this one dynamic."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def packed():
    kinds = [('lora', dict(rank=2, base='nf4')), 'int8', 'half', 'int4', 'fit4', ('nf4', dict(scales='8bit')), 'tern', 'bin']
    model = nn.Sequential(*(nn.Linear(12, 12) for _ in kinds))
    convert(model, {str(i): kind for i, kind in enumerate(kinds)}, verbose=False, packed=True)
    nn.init.normal_(model[0].lora_B)
    return model


def ramped(model):
    ramp(model).fill_(0.3)
    return model


# name: (backend, shape of the input, model)
MODELS = {
    'linear': ('aot_eager', (5, 12), lambda: nn.Sequential(
        TernaryLinear(12, 48, True, chunks=(20, 28)), TernaryLinear(24, 24, act='relu2_glu'),
        BinaryLinear(24, 24, act='gelu', chunks=3), Linear4bit(24, 8), TernaryLinear(8, 1))),
    'ramp': ('aot_eager', (5, 12), lambda: ramped(nn.Sequential(
        TernaryLinear(12, 24, act='gelu', output_gain=True), BinaryLinear(24, 24, act='gelu', chunks=3), Linear4bit(24, 8)))),
    'conv': ('aot_eager', (2, 12, 7, 6), lambda: nn.Sequential(
        BinaryConv2d(12, 4, 3, act='relu'), TernaryConv2d(4, 4, 2, padding='same', act='relu'), Conv4bit(4, 5, 1, act='gelu'))),
    'packed': ('aot_eager', (5, 12), packed),
    'inductor': ('inductor', (5, 12), lambda: nn.Sequential(
        BinaryLinear(12, 12, act='gelu'), TernaryLinear(12, 8), Linear4bit(8, 4)))}


@pytest.mark.parametrize('name', MODELS)
def test_compiled_equals_eager(name):
    """torch.compile takes the layers as one graph; output and gradients are those of eager mode to 1e-5."""
    backend, shape, build = MODELS[name]
    if backend == 'inductor' and not (shutil.which('g++') or shutil.which('clang++')):
        pytest.skip('needs C++')
    model, x = build(), torch.randn(shape)
    v, compiled = torch.randn_like(model(x)), torch.compile(model, fullgraph=True, backend=backend)
    same(gradients(model, compiled, x, v), gradients(model, model, x, v), 1e-5)


@pytest.mark.parametrize('model, most', [('gpt', {'bin': 0.75, 'int4': 0.7, 'tern': 0.65}), ('bitnet', {'tern': 0.6})],
                         ids=('gpt', 'bitnet'))
def test_the_memory_saving_survives_torch_compile(model, most):
    """A model of a trainer in bf16 is one graph, and torch's partitioner keeps neither rounded weights nor what the backward
    pass can compute from the inputs of the layers. most: bytes saved for the backward pass, x full precision."""
    sizes = SimpleNamespace(model=model, n_layer=1, n_head=4, n_kv_head=2, n_embd=256, n_ff=768, vocab_size=64, block_size=256,
                            binary_blocks=())
    ids, models = torch.randint(64, (2, 256)), {'train_gpt': (GPT, GPTConfig), 'train_bitnet': (BitNet, BitNetConfig)}
    saved = {}
    for kind in ('fp', *most):
        net = steps.make_model(kind, sizes, models)
        compiled = torch.compile(net, fullgraph=True, backend='aot_eager_decomp_partition')
        with torch.autocast('cpu', torch.bfloat16):
            saved[kind] = costs.saved_bytes(lambda compiled=compiled: compiled(ids, ids), net)
    ratios = {kind: saved[kind] / saved['fp'] for kind in most}
    assert all(ratios[kind] <= most[kind] for kind in most), ratios


@pytest.mark.parametrize('base', ['nf4', 'int8', 'half'])
def test_frozen_weights_are_decoded_again_under_torch_compile(base):
    """Adapters over packed layers save what they save in eager mode: no decoded weight."""
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), torch.randn(8, 64)
    convert(model, {'*': ('lora', dict(rank=2, base=base))}, verbose=False, packed=True)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager_decomp_partition')
    with torch.autocast('cpu', torch.bfloat16):
        eager, found = (costs.saved_bytes(lambda f=f: f(x).float().sum(), model) for f in (model, compiled))
    assert found <= eager


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
        libraries = list(pool.map(lambda _: quant.kernels(), range(8)))
    assert all(x is libraries[0] is quant.kernels() for x in libraries)
said = [str(w.message) for w in said if 'kernels.c' in str(w.message)]
torch.manual_seed(0)
code = torch.randint(0, 256, (32768,), dtype=torch.uint8)
log8 = {'absmax': torch.randint(-127, 128, (2048,), dtype=torch.int8), 'absmax_top': torch.tensor([9], dtype=torch.int32)}
sums = [zlib.crc32(quant.decode4(code, scales, f, dtype=d).float().numpy().tobytes()) for f in quant.FORMATS4
        for d in (torch.float32, torch.bfloat16) for scales in ({'absmax': torch.randn(2048)}, log8)]
print(quant.kernels() is not None, sums, *said, sep='|')
"""

NO_OPENMP = """#!/bin/sh
for a; do [ "$a" = -fopenmp ] && exit 1; done
exec cc "$@" -O0
"""
COPY = """#!/bin/sh
for a; do [ "$last" = -o ] && out=$a && echo half > "$a"; last=$a; done
echo "$@" >> "$0.log"
sleep 0.7
exec cp '{library}' "$out"
"""


@pytest.mark.skipif(not shutil.which('cc'), reason='needs a C compiler')
def test_kernels_are_compiled_wherever_they_can_be(start, tmp_path):
    """No OpenMP, no home, no writable cache: compiled once, by one of 4 threads. Where that fails, one warning; all alike.
    A process that starts while another one writes the library does not load the half of it."""
    copy = COPY.format(library=kernels()._name)     # a compiler that notes its arguments and takes the library that is there
    for name, text in {'s.py': DECODE, 'nocc': NO_OPENMP, 'copycc': copy, 'slowcc': copy}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / 'T').mkdir()
    slow, copies, elsewhere = {'CC': f'{tmp_path}/slowcc'}, {'CC': f'{tmp_path}/copycc'}, {'TMPDIR': f'{tmp_path}/T'}
    cases = {'slow': slow, 'with': copies, 'openmp': {'CC': f'{tmp_path}/nocc'},
             'homeless': {'HOMELESS': '1'} | copies | elsewhere,
             'unwritable': {'XDG_CACHE_HOME': f'{tmp_path}/s.py/x'} | copies | elsewhere, 'off': {'NANOBIT_KERNELS': '0'},
             'broken': {'CC': '/bin/false'}, 'missing': {'CC': '/no/such/cc'}, 'sourceless': {'SOURCELESS': '1'}}
    begin = lambda name: start('s.py', cwd=tmp_path, **{'XDG_CACHE_HOME': f'{tmp_path}/{name}'} | cases[name])
    jobs = {name: begin(name) for name in cases}
    while not list(tmp_path.glob('slow/nanobit/*')) and jobs['slow'].runs():
        time.sleep(0.01)
    results = [job.wait(300) for job in [begin('slow'), *jobs.values()]]
    assert all(r.code == 0 for r in results), results
    there, sums, warned = zip(*((a, b, c) for a, b, *c in (r.out.strip().split('|') for r in results)), strict=True)
    assert there == ('True',) * 6 + ('False',) * 4 and len(set(sums)) == 1
    assert [len(messages) for messages in warned] == [0] * 7 + [1] * 3, warned
    assert '/bin/false' in warned[7][0] and '/no/such/cc' in warned[8][0] and 'nowhere' in warned[9][0]
    for name in ('slow', 'with', 'openmp'):
        assert sorted(p.suffix for p in (tmp_path / name / 'nanobit').iterdir()) == ['.lock', '.so']
    assert not (tmp_path / 'off').exists() and len((tmp_path / 'copycc.log').read_text().splitlines()) == 3
    assert not list((tmp_path / 'T').iterdir())     # a loaded library needs no file
    left = [p.suffix for name in ('broken', 'missing') for p in (tmp_path / name / 'nanobit').iterdir()]
    assert left == ['.lock', '.lock']               # no half of a library
