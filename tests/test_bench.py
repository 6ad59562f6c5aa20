"""bench.py: BigNet's published bytes, differences by hand, the commands' exits, a bundle that is always the same."""
import argparse
import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import torch.nn as nn

import bench
import common
import layers
from conftest import ROOT
from engine.load import MODELS
from measure import decode, forms, gpu, llama, optimizers, steps
from readers import tokens
from forked import BENCH_FORKS, PARTS_FORKS
from train_gpt import GPT, GPTConfig

OPTIONS = argparse.Namespace(rank=32, alpha=32.0, base='bignet', dim=1024, seed=0, device='cpu', batch=4, threads=1)


@pytest.fixture
def rows(start, tmp_path):
    """rows(*words) -> ({name: row of --json}, stdout) of bench.py with forks for its processes."""
    def run(*words, patch=''):
        words = *words, '--threads=1', '--json=rows.jsonl'
        done = start(ROOT / 'bench.py', *words, cwd=tmp_path, patch=patch + BENCH_FORKS).wait()
        assert done.code == 0, done.err
        return {r['name']: r for r in map(json.loads, open(tmp_path / 'rows.jsonl'))}, done.out
    return run


def formed(name, dim=1024):
    torch.manual_seed(0)
    return forms.form(forms.BigNet(dim), name, OPTIONS)


@pytest.mark.parametrize('name, n_bytes, trainable, elements', [
    ('bignet', 75_612_160, 18_903_040, 18_903_040),             # 72.11 MiB
    ('half', 37_826_560, 10_240, 18_903_040),                   # 36.07
    ('int4', 11_911_168, 28_672, 10_645_504),                   # 11.36
    ('lora', 42_545_152, 1_189_888, 20_082_688),                # 40.574: rank 32, fp32 adapters
    ('qlora', 16_629_760, 1_189_888, 11_825_152)])              # 15.859
def test_bignet_to_the_byte(name, n_bytes, trainable, elements):
    """Bytes, trainable numbers and elements of BigNet's forms are those published or derived."""
    c = forms.counts(formed(name))
    assert (c['actual_bytes'], c['theoretical_bytes'], c['trainable'], c['elements']) == (n_bytes, n_bytes, trainable, elements)
    assert c['parameters'] == 18_903_040 + (1_179_648 if 'lora' in name else 0) == c['trainable'] + c['frozen']


def test_bytes_by_formula_are_those_of_the_tensors():
    """The formula, from shapes alone, is exact in every form, also for an odd width."""
    for name in forms.FORMS:
        c, adapters = forms.counts(formed(name, 72)), 18 * 2 * 4 * 72 * 32 if 'lora' in name else 0
        assert c['theoretical_bytes'] == c['actual_bytes'] < 4 * (18 * 72 * 73 + 5 * 2 * 72) + adapters, name


def test_compare_by_hand():
    """max and mean difference of a form's outputs are those of two models with the same weights and inputs."""
    a = argparse.Namespace(**vars(OPTIONS) | {'name': 'half', 'dim': 256})
    answer = next(forms.compare_worker(a, None))
    model, inputs = forms.base_model(a, None)
    x = inputs(4)
    with torch.no_grad():
        right = model(x)
        for m in model.modules():
            if isinstance(m, nn.Linear):
                m.half().float()                    # rounds the weight and the bias
        off = (model(x) - right).abs()
    for key, figure in (('max', off.max()), ('mean', off.mean())):
        assert answer[key] == pytest.approx(figure.item(), rel=1e-3) and answer[key] <= answer[f'{key}_bound']


def test_stats_of_a_checkpoint(rows, tmp_path):
    """The table names each form with its bytes, --json appends the same rows; a checkpoint can stand for BigNet."""
    config = GPTConfig(vocab_size=256, block_size=16, n_layer=1, n_head=2, n_embd=32)
    common.save_checkpoint(tmp_path / 'best.pt', {'trainer': 'train_gpt', 'step': 1, 'model': GPT(config).state_dict(),
                                                  'model_config': vars(config), 'tokenizer': tokens.byte().describe()})
    table, out = rows('stats', tmp_path, 'nf4', '--batch=2')
    full, nf4 = table.values()
    assert full['actual_bytes'] == 4 * full['parameters'] == layers.model_bytes(GPT(config))[1]
    assert full['parameters'] == nf4['parameters'] and nf4['actual_bytes'] < full['actual_bytes'] / 2
    assert f'{nf4["actual_bytes"]:,}' in out and full['forward_bytes'] > 0 and nf4['backward_bytes'] > 0
    assert nf4['backward_bytes'] < full['backward_bytes']                       # no gradients of frozen weights


def test_fit_learns_or_fails(rows, start, tmp_path):
    """fit exits with 0 when the form learns the noise by heart, and with 1 and its name when it does not."""
    assert rows('fit', 'qlora', '--dim=128', '--steps=120', '--lr=3e-3')[0]['qlora']['accuracy'] > 0.97
    done = start(ROOT / 'bench.py', 'fit', 'half', '--dim=64', '--steps=2', cwd=tmp_path,
                 patch=BENCH_FORKS).wait()
    assert done.code == 1 and 'error: did not learn: half (wanted: half above 80%)' in done.err


def test_layers_of_every_kind(rows):
    """One row a kind and shape, ratios to nn.Linear, bits as the format says, errors in the published order."""
    table, _ = rows('layers', '--rounds=1', '--seconds=0.01', '--shapes=2x256x128', '--kinds=int4,nf4,fit4,int8')
    assert list(table) == ['linear', 'int4', 'nf4', 'fit4', 'int8'] and table['linear']['both_ratio'] == 1
    assert (table['int4']['bits'], table['nf4']['bits']) == (5, 4.25) and table['fit4']['bits'] == pytest.approx(4.25, abs=.01)
    assert table['int8']['error'] < table['fit4']['error'] < table['int4']['error'] < table['nf4']['error']
    assert (table['nf4']['tokens'], table['nf4']['in'], table['nf4']['out']) == (2, 256, 128)


# --------------------------------------------------------------------------------------------------------- optimizers


def asked(worker, monkeypatch, name, lines=1, **options):
    """A worker's answers, in this process."""
    monkeypatch.setattr('sys.stdin', io.StringIO('1\n' * lines))
    return list(worker(argparse.Namespace(**{'device': 'cpu', 'name': name, **options})))


def test_optim_of_blocks(rows):
    """One row an optimizer, bytes as the formats say, times relative to AdamW and the full SVD."""
    table, out = rows('optim', '--dim=32', '--layers=2', '--rounds=2', '--steps=2', '--ranks=4')
    assert {'adamw', 'rsvd 4', 'full SVD'} <= set(table) and 'rsvd 4' in out
    assert table['adamw']['optimizer_bytes'] == 2 * (8 * 32 * 32 * 12 + 4 * 4) and table['adamw']['ratio'] == 1
    low = table['rsvd 4']
    assert low['optimizer_bytes'] == 2 * 4 * 4 * (4 * 32 + 2 * 32 * (3 + 1 + 4 + 4)) and table['full SVD']['svd_ratio'] == 1
    assert low['svd_ratio'] is not None and table['adamw']['refresh_ms'] is None and table['full SVD'].get('ms') is None


def test_peers_are_optional(monkeypatch):
    """Packages that are not installed are left out; one that does not work says why, and the others are measured."""
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    assert optimizers.block_variants([4, 8]) == ['adamw', 'rsvd 4', 'rsvd 8', 'full SVD']
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name)
    assert optimizers.block_variants([4]) == ['adamw', 'rsvd 4', 'galore 4', 'bitsandbytes 8bit', 'full SVD']

    def broken(name, params):
        raise RuntimeError('no kernel here\nreally')
    monkeypatch.setattr(optimizers, 'block_optimizer', broken)
    answers = asked(optimizers.optim_worker, monkeypatch, 'bitsandbytes 8bit', 2, dim=8, layers=1)
    assert answers == [{'failed': 'no kernel here'}] * 2
    with pytest.raises(RuntimeError):
        asked(optimizers.optim_worker, monkeypatch, 'rsvd 4', dim=8, layers=1)


def test_galore_is_counted_whole():
    """GaLore keeps its basis in an object; a tensor that several weights share counts once."""
    basis, shared, optimizer = torch.zeros(3, 4), torch.zeros(5), torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    for p in torch.zeros(2):
        optimizer.state[p] = {'exp_avg': torch.zeros(7), 'map': shared, 'step': 1}
    optimizer.state[p]['projector'] = argparse.Namespace(ortho_matrix=basis)
    assert optimizers.state_bytes(optimizer) == 4 * (12 + 5 + 2 * 7)


SMALL = dict(dim=64, layers=1, attention='sdpa')        # DistilBERT's matrices, the numbers in its vectors and in both
MATRICES = [(30522, 64), (512, 64), *[(64, 64)] * 5, (256, 64), (64, 256), (2, 64)]
VECTORS = 2 * 64 + 4 * 64 + 2 * 64 + 256 + 64 + 2 * 64 + 64 + 2
WEIGHTS = VECTORS + sum(m * n for m, n in MATRICES)


def test_optimizer_bytes_by_hand(monkeypatch):
    """Adam holds two numbers a weight; a matrix of rank 4 holds a basis of one side and two moments of 4 times the other."""
    adam, left, short, blocks = (asked(optimizers.optim_bytes_worker, monkeypatch, name, batch=1, tokens=4, **SMALL)[0]
                                 for name in ('adam', 'left 4', 'short 4', 'blocks 4'))
    low = lambda pairs: 8 * VECTORS + 4 * sum(min(4, m // 2, n // 2) * (m + 2 * n) for m, n in pairs)
    tables = [(30522, 64), (512, 64), (2, 64)]
    assert adam['optimizer_bytes'] == 8 * WEIGHTS + 4 * 24 and left['optimizer_bytes'] == low(MATRICES)
    assert short['optimizer_bytes'] == low(map(sorted, MATRICES))
    assert blocks['optimizer_bytes'] == low(sorted(p) for p in MATRICES if p not in tables) + 8 * sum(m * n for m, n in tables)
    assert all(r['peak_bytes'] > r['optimizer_bytes'] + 2 * 4 * WEIGHTS for r in (adam, left, short, blocks))


def test_finetune_memory_by_hand(monkeypatch):
    """Gradients, all-reduced bytes, tensors saved for the backward pass and peaks of four ways to train a small model."""
    full, lora, plain, projected = (asked(optimizers.finetune_memory_worker, monkeypatch, name, batch=4, tokens=32, rank=4,
                                          **SMALL)[0] for name in ('adamw', 'lora', 'rsvd', 'rsvd projected'))
    assert full['gradient_bytes'] == full['sent_bytes'] == plain['gradient_bytes'] == 4 * WEIGHTS
    assert full['optimizer_bytes'] == 2 * full['gradient_bytes'] + 4 * 24
    assert lora['gradient_bytes'] == lora['sent_bytes'] == 4 * (3 * 2 * 4 * 64 + 64 * 64 + 64 + 2 * 64 + 2)
    R = 4 * (30522 + 512 + 4 * 64 + 256 + 64 + 64) + 2 * 2   # rank x the side without a basis
    assert projected['gradient_bytes'] == 4 * (R + VECTORS)
    assert projected['gradient_bytes'] < projected['sent_bytes'] < plain['sent_bytes'] / 10
    assert projected['saved_bytes'] < plain['saved_bytes'] and plain['optimizer_bytes'] == projected['optimizer_bytes']
    for row in (full, lora, plain, projected):
        assert row['peak_bytes'] == max(v for k, v in row.items() if k in ('first_bytes', 'ordinary_bytes', 'refresh_bytes'))
    assert 'refresh_bytes' in plain and 'refresh_bytes' in projected and projected['peak_bytes'] < plain['peak_bytes']


def test_finetune_of_distilbert(rows):
    """Ratios are to AdamW and to LoRA, where these are measured; amortised time has a refresh in 200 steps."""
    table, _ = rows('finetune', '--dim=64', '--layers=1', '--batch=2', '--tokens=8', '--rounds=1', '--steps=1', '--rank=4',
                    '--variants=adamw,rsvd projected', patch='import transformers.models.distilbert.modeling_distilbert\n')
    full, low = table['adamw'], table['rsvd projected']
    assert full['bench'] == 'finetune' and full['refresh_ms'] is None
    assert full['ms_x_adamw'] == full['peak_x_adamw'] == 1 and full['ms_x_lora'] is None and low['peak_x_adamw'] < 1
    assert low['amortised_ms'] == pytest.approx(low['ms'] + low['refresh_ms'] / 200)


def test_train_in_a_ramp_and_in_some_blocks(monkeypatch):
    """int4+ramp measures a model that trains on weights halfway between latent and rounded ones; int4 has no ramp. With
    --binary_blocks=1 the other blocks are full precision."""
    made, make = [], steps.make_model
    monkeypatch.setattr(steps, 'make_model', lambda *given: made.append(make(*given)) or made[-1])
    options = dict(model='gpt', n_layer=2, n_head=2, n_embd=32, block_size=8, vocab_size=16, batch_size=2, optimizer='adamw',
                   dtype='float32', compile=False)
    for name, share, blocks in (('int4', None, ()), ('int4+ramp', 0.5, (1,))):
        asked(lambda a: steps.train_worker(a, MODELS), monkeypatch, name, **options, binary_blocks=blocks)
        low = {n: m for n, m in made.pop().named_modules() if isinstance(m, layers.LowBit)}
        assert low and all(m.training and m.share == share for m in low.values())
        assert {n.split('.')[1] for n in low} == {str(i) for i in blocks or (0, 1)}


# ------------------------------------------------------------------------------------------------------------- decode

QUICKLY = "from engine.engine import TARGETS\nTARGETS['stages'] += ('-O1',)\n"       # -O3 compiles 8 s longer
DECODE = ('decode', '--shape=1M', '--threads_of=1', '--prefill=8,40', '--tokens=4', '--seconds=0.02')


def test_decode_of_random_models(rows):
    """One row for each model, head and library. Bytes are those of the shape; ratios and shares follow from the rounds."""
    table, out = rows(*DECODE, '--models=tern,bin', '--heads=int8,fp', '--rounds=2', '--torch=1')
    assert list(table) == [f'{kind} {what}' for kind in ('tern', 'bin') for what in ('engine int8', 'engine fp', 'torch')]
    blocks, head = 6 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 768), 256 * 256
    tern, exact, torch_ = table['tern engine int8'], table['tern engine fp'], table['tern torch']
    assert tern['model_bytes'] == pytest.approx(blocks / 4 + head, rel=0.5)
    assert exact['model_bytes'] - tern['model_bytes'] == pytest.approx(3 * head, rel=0.05)
    assert tern['cache_bytes'] == 64 * 2 * 6 * 128 * 4 and tern['file_bytes'] > blocks / 4
    assert tern['token_bytes'] == tern['model_bytes'] + (16 + 2) * tern['cache_bytes'] / 64
    for r in table.values():
        first = r['rounds'][0]
        assert r['decode'] > 0 and r['prefill_8'] > 0 and r['prefill_40'] > 0 and r['read'] > 0 and r['name'] in out
        assert r['loaded_bytes'] <= r['resident_bytes'] and 0 <= r['idle']
        assert (r['rounds'][1] is None) == (r['runs'] == 'torch')
        if r is torch_:
            assert r['share'] == first['decode'] * r['token_bytes'] / first['read']


def test_decode_of_a_trained_model(rows, tmp_path):
    """A run's packed file is measured; lengths beyond its context are left out. Greedy tokens are compared with torch's. The
    stages of a token add up to its time, but for Python's part."""
    config = GPTConfig(vocab_size=256, block_size=32, n_layer=1, n_head=2, n_embd=32, binary_blocks=(0,))
    torch.manual_seed(1)
    size = common.save_packed(GPT(config), tmp_path / 'packed.safetensors', {
        'trainer': 'train_gpt', 'step': 1, 'model_config': vars(config), 'tokenizer': tokens.byte().describe()})
    (speed,) = rows(*DECODE, f'--models={tmp_path}', '--rounds=1', '--torch=0')[0].values()
    table, out = rows(*DECODE, f'--models={tmp_path}', '--agree=5', '--stages=8', '--heads=int8,int8:int8', patch=QUICKLY)
    (agree,), stages = ([r for r in table.values() if r['runs'] == runs] for runs in ('agree', 'stages'))
    assert speed['file_bytes'] == size and speed['prefill_8'] > 0 and 'prefill_40' not in speed and speed['decode'] > 0
    assert agree['prompts'] == 5 and agree['new_tokens'] == 16 and agree['same'] + len(agree['ties']) == 5
    assert agree['logits_difference'] < 1e-4 and max(agree['ties'], default=0) < 1e-3
    assert f'{agree["same"]} of 5 prompts have the same 16 greedy tokens' in out
    for r in stages:
        assert 0 < r['ms']['products'] < sum(r['ms'].values()) < r['of'] and r['ms']['head'] > 0 < r['ms']['normalization']


FOLDER = os.environ.get('NANOBIT_LLAMA', '')    # shared libraries of llama.cpp, see measure/llama.py


@pytest.mark.skipif(not FOLDER, reason='NANOBIT_LLAMA names no folder with shared libraries of llama.cpp')
def test_decode_of_llama_cpp(rows, tmp_path):
    """llama.cpp loads each random GGUF file; its weights have the bits of their types. Threads do not change the tokens."""
    pytest.importorskip('gguf', reason='make peers installs gguf')
    table, _ = rows(*DECODE, '--models=tern,int4', '--rounds=1', '--torch=0', f'--llama={FOLDER}')
    blocks, wide, head = 6 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 768), 6 * 12 * 256 * 256, 256 * 256
    for name, bits, weights, head_bits in (('TQ2_0 F16', 2.0625, blocks, 16), ('TQ2_0 Q8_0', 2.0625, blocks, 8.5),
                                           ('TQ1_0 Q8_0', 1.6875, blocks, 8.5), ('Q4_0 Q8_0', 4.5, wide, 8.5)):
        r = table[f'llama.cpp {name}']
        vectors = 64 * 256 * 4 if 'Q4' in name else 0         # learned positions
        assert r['model_bytes'] == pytest.approx((bits * weights + head_bits * head) / 8 + vectors, rel=0.06), name
        assert r['decode'] > 0 and r['prefill_40'] > 0 and r['about']
    path = tmp_path / 'x.gguf'
    llama.write_gguf(path, 'TQ1_0', 'F16', decode.SHAPES['1M'], 64)
    one, two = (list(llama.Llama(FOLDER, path, threads, 64).generate([1, 2, 3], 9)) for threads in (1, 2))
    assert one == two and len(set(one)) > 1
    (tmp_path / 'bad.gguf').write_bytes(b'GGUF' + bytes(99))
    with pytest.raises(ValueError, match='cannot load .*bad.gguf'):
        llama.Llama(FOLDER, tmp_path / 'bad.gguf', 1, 64)


def test_ternary_codes_are_valid():
    """A byte of TQ2_0 holds four codes 0, 1 and 2, equally often; every row ends with the block's scale."""
    pytest.importorskip('gguf', reason='make peers installs gguf')
    blocks = llama.random_blocks(np.random.default_rng(0), 'TQ2_0', 64, 512).reshape(-1, 66)
    codes = blocks[:, :64, None] >> np.array([0, 2, 4, 6]) & 3
    assert np.bincount(codes.flatten()) / codes.size == pytest.approx([1 / 3] * 3, abs=0.02)
    assert np.unique(blocks[:, 64:].copy().view(np.float16)) == pytest.approx(512 ** -0.5 / 0.8, rel=1e-3)
    with pytest.raises(ValueError, match='multiple of 256'):
        llama.random_blocks(np.random.default_rng(0), 'TQ2_0', 64, 128)


def test_targets_are_computed_from_rounds():
    """A ratio is the median of the ratios within rounds; rounds without a figure and runs that are missing do not count."""
    sys.path.append(str(ROOT / 'results'))
    import decode as page
    row = lambda name, *speeds, **more: {'name': name, 'threads': 1, 'shape': '0.68B', 'runs': 'engine', 'resident_bytes': 12,
                                         'file_bytes': 6, 'cache_bytes': 4,
                                         'rounds': [None if s is None else {'decode': s} for s in speeds]} | more
    found = page.targets([row(page.TERN, 30, 10, 40), row('llama.cpp TQ2_0 Q8_0', 10, 10, 20, runs='llama.cpp'),
                          row(page.BIN, 90, None, 40)])
    shown = {(r['measure'], r['threads']): (r['measured'], r['reached']) for r in found}
    assert shown['decode, ternary, 8-bit heads, over llama.cpp TQ2_0 Q8_0', 1] == ('2.00 ×', 'yes')
    assert shown['decode, ternary, 8-bit heads, over llama.cpp TQ2_0 Q8_0', 2] == ('-', '-')
    assert shown['decode, binary, over tern', 1] == ('2.00 ×', 'yes')
    memory = 'resident memory after the longest prompt over packed file and cache, the most of the random models'
    assert shown[memory, 1] == ('1.20 ×', '**no**')


# ----------------------------------------------------------------------------------------------------- mistakes, bundle


def test_mistakes_are_one_line(monkeypatch, capsys):
    """A mistake ends with exit status 2 and one line that names it; without transformers that says what to install."""
    def mistake(says, call):
        with pytest.raises(SystemExit) as e:
            call()
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.startswith('error: ') and err.count('\n') == 1 and says in err, (says, err)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    for args, says in [
            ('stats bignet nope', 'nope'), ('compare half out/none', 'out/none'), ('layers --kinds=int3', 'int3'),
            ('stats bignet --device=cuda', 'CUDA'), ('bundle /nonexistent/x.zip', '/nonexistent/x.zip'), ('', 'command'),
            ('layers --shapes=4x8', '4x8'), ('fit lora --seeds=a', 'seeds'), ('train --kinds=foo', 'foo'),
            ('train --kinds=fp+ramp', 'fp+ramp'), ('train --binary_blocks=0,6', "'6'"), ('train --binary_blocks=2x', "'2x'"),
            ('train --model=bitnet --binary_blocks=0', 'bitnet'), ('train --model=bitnet --output_gains', 'output_gains'),
            ('train --kinds=fp --binary_blocks=0', 'kinds fp'),
            ('optim-bytes --ranks=0', 'ranks'), ('finetune --variants=foo', 'foo'), ('finetune --tokens=0', 'tokens'),
            ('decode --heads=x', 'heads'), ('decode --prefill=a', 'prefill'), ('decode --models=', 'model'),
            ('decode --threads_of=0', 'threads_of'), ('decode --llama=/nonexistent/x', '/nonexistent/x'),
            ('decode --llama_types=Q3:F16', 'Q3'), ('stats bignet --json=/nonexistent/x', '/nonexistent/x'),
            ('stats bignet tests half', 'one model')]:
        monkeypatch.setattr('sys.argv', ['bench.py', *args.split()])
        mistake(says, bench.main)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    mistake('pip install transformers', lambda: optimizers.distilbert(argparse.Namespace(dim=64)))


# Modules come from the current folder: those of the repository are forgotten.
ELSEWHERE = f"""
import os, sys
sys.path = [os.getcwd(), *(p for p in sys.path if p != {str(ROOT)!r})]
for name, module in list(sys.modules.items()):
    path = getattr(module, '__file__', None) or ''
    if path.startswith({str(ROOT)!r}) and 'site-packages' not in path:
        del sys.modules[name]
"""


def test_gpu_keeps_the_rows_of_the_other_parts_when_one_fails(tmp_path, start):
    """On a CPU, in the smallest sizes: steps are measured, a training without its data has a row that says why, status 2."""
    done = start(ROOT / 'bench.py', 'gpu', '--tiny', '--device=cpu', '--parts=training fp,bitnet', '--dataset=missing',
                 f'--json={tmp_path}/gpu.jsonl', cwd=tmp_path, patch=PARTS_FORKS).wait()
    rows = [json.loads(line) for line in open(tmp_path / 'gpu.jsonl')]
    assert done.code == 2 and done.err == 'error: 1 parts failed: training fp\n', done.err
    assert [r['part'] for r in rows] == ['environment', 'training fp', 'bitnet']
    assert rows[0]['torch'] == torch.__version__
    assert 'missing' in rows[1]['failed'] and rows[2]['kind'] == 'tern' and rows[2]['ms'] > 0 and rows[2]['saved_bytes'] > 0


def test_gpu_runs_whole_on_a_cpu(tmp_path, start):
    """--tiny: every part that a CPU can run gives its rows: passed numerics, times of steps, losses of two trainings, the
    loss of a quantized model. The parts without a tiny command are those of kernels that only a GPU has."""
    tokens.write(tmp_path / 'data', 'train', [np.arange(4000) % 50], tokens.byte())
    tokens.write(tmp_path / 'data', 'val', [np.arange(400) % 50], tokens.byte())
    done = start(ROOT / 'bench.py', 'gpu', '--tiny', '--device=cpu', f'--dataset={tmp_path}/data',
                 f'--json={tmp_path}/gpu.jsonl', cwd=tmp_path, patch=PARTS_FORKS).wait()
    assert done.code == 0, done.out + done.err
    rows = [json.loads(line) for line in open(tmp_path / 'gpu.jsonl')]
    assert list(dict.fromkeys(r['part'] for r in rows)) == ['environment', *(
        part for part in gpu.PARTS if part not in ('packed triton', 'int8 products'))]
    measured = {r['part']: r for r in rows}
    assert 'passed' in measured['numerics']['tests'] and measured['cnn']['net_ms'] > 0
    assert all(measured[part]['ms'] > 0 for part in ('eager', 'compiled', 'bitnet', 'finetune'))
    assert all(4 < measured[f'training {kind}'][of] < 7 for kind in ('fp', 'bin') for of in ('first_loss', 'last_loss'))
    assert measured['gptq']['scheme'] == 'gptq4' and 4 < measured['gptq']['bits'] < 4.5 and measured['gptq']['delta'] < 0.1


def test_bundle_is_reproducible_and_runs(tmp_path, start):
    """Two bundles are the same bytes; the manifest has the checksum of every file; unpacked, it runs."""
    for name in ('a.zip', 'b.zip'):
        bench.bundle(argparse.Namespace(path=str(tmp_path / name)))
    assert (tmp_path / 'a.zip').read_bytes() == (tmp_path / 'b.zip').read_bytes()
    with zipfile.ZipFile(tmp_path / 'a.zip') as z:
        sums = dict(reversed(line.split('  ')) for line in z.read('nanobit/MANIFEST.sha256').decode().splitlines())
        assert {f'nanobit/{n}' for n in sums} | {'nanobit/MANIFEST.sha256'} == set(z.namelist())
        assert all(hashlib.sha256(z.read(f'nanobit/{n}')).hexdigest() == s for n, s in sums.items())
        z.extractall(tmp_path)
    tracked = subprocess.run(['git', 'ls-files', '*.py', '*.c'], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert not [n for n in tracked if n not in sums]
    done = start('train_gpt.py', '--help', cwd=tmp_path / 'nanobit', patch=ELSEWHERE).wait()
    assert done.code == 0 and '--n_binary=0' in done.out


def test_forms_of_models_of_transformers(tmp_path):
    """GPT-2's Conv1D and the experts of Mixtral are converted; of Mamba the rest is named; T5 gets tokens for its decoder."""
    import transformers as t
    size = {'vocab_size': 64, 'hidden_size': 32, 'num_hidden_layers': 1, 'bos_token_id': 0, 'eos_token_id': 0,
            'pad_token_id': 0}
    heads = {'num_attention_heads': 2, 'num_key_value_heads': 1, 'intermediate_size': 64, 'num_local_experts': 2}
    models = {'gpt2': t.GPT2Model(t.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2)),
              'mixtral': t.MixtralModel(t.MixtralConfig(**size, **heads)), 'mamba': t.MambaModel(t.MambaConfig(**size)),
              't5': t.T5Model(t.T5Config(vocab_size=64, d_model=32, d_ff=48, d_kv=16, num_heads=2, num_layers=1)),
              'deberta': t.DebertaModel(t.DebertaConfig(**size, num_attention_heads=2, intermediate_size=64,
                                                        relative_attention=True, pos_att_type='c2p|p2c'))}
    left = {}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        for kind in ('int4', 'lora'):
            a = argparse.Namespace(**vars(OPTIONS) | {'name': kind, 'base': str(tmp_path / name), 'batch': 2, 'rank': 2})
            row = next(forms.stats_worker(a, None))
        assert row['actual_bytes'] == row['theoretical_bytes'] < 4 * sum(p.numel() for p in model.parameters()), name
        left[name] = set(row['left'])
    assert left == {'gpt2': set(), 't5': set(), 'deberta': set(), 'mixtral': {'gate'}, 'mamba': {'A_log', 'conv1d', 'dt_proj'}}
