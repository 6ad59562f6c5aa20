"""ptq.py as a user runs it, on a GPT that has learnt something in seconds, a full-precision BitNet, models of transformers."""
import json
import math
import os
import re
import runpy
import shutil
import signal
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import layers
import ptq
import sample
from conftest import ROOT, damages, one_error
from pretrained import calibrate, hf, replace, subjects
from readers import tokens
from readers.texts import load, write_table
from train_gpt import GPT

QUICK = ['--group=32', '--windows=8', '--time_rounds=1']
SCHEMES = [s for s in ptq.SCHEMES if not s.startswith('bnb')]


@pytest.fixture(scope='module')
def call(start):
    """call(*words, cwd, code=0) -> Result of ptq.py with these words."""
    def run(*words, cwd, code=0, script='ptq.py', **how):
        done = start(str(ROOT / script), *words, cwd=cwd, **how).wait()
        assert done.code == code, (done.code, done.out, done.err)
        assert 'Traceback' not in done.err
        return done
    return run


@pytest.fixture(scope='module')
def home(call, tiny_data, tmp_path_factory):
    """A folder with out/gpt, a finished run of train_gpt.py."""
    folder = tmp_path_factory.mktemp('ptq')
    call(f'--dataset={tiny_data}', '--n_layer=2', '--n_head=2', '--n_embd=64', '--block_size=32', '--batch_size=8',
         '--max_iters=600', '--warmup_iters=10', '--eval_interval=600', '--eval_iters=4', '--save_interval=600',
         '--learning_rate=1e-2', '--device=cpu', cwd=folder, script='train_gpt.py')
    return folder


def mask():
    os.umask(now := os.umask(0))
    return now


def rows_of(path):
    return [json.loads(line) for line in open(path)]


@pytest.fixture(scope='module')
def table(call, home):
    """What `ptq.py` says of the run with every scheme but bitsandbytes', and its rows by scheme."""
    done = call(*QUICK, f'--schemes={",".join(SCHEMES)}', cwd=home)
    return done.out, {r['scheme']: r for r in rows_of(home / 'out/gpt/ptq.jsonl')}


def test_the_first_row_is_what_training_wrote_down(table, home):
    out, rows = table
    best = common.read_checkpoint(str(home / 'out/gpt/best.pt'))['best_val_loss']
    assert rows['fp']['loss'] == pytest.approx(best, abs=1e-6) and best < 1.6
    assert f'its training wrote down {best:.4f} for the same batches' in out
    assert list(rows) == ['fp', *SCHEMES] and re.search(r'(?m)^scheme +bits/weight +val loss', out)
    assert rows['fp']['perplexity'] == pytest.approx(math.exp(best)) and rows['fp']['delta'] is None
    assert (home / 'out/gpt/ptq.png').read_bytes().startswith(b'\x89PNG')


def test_more_bits_less_loss_and_smaller_files(table):
    _, rows = table
    loss = lambda name: rows[name]['loss'] - rows['fp']['loss']
    assert abs(loss('half')) < 1e-3 and abs(loss('int8')) < 2e-3 and abs(loss('int8a8')) < 1e-2
    assert max(loss('gptq2'), loss('awq2')) < loss('rtn2') < loss('bin')
    assert max(abs(loss(f'{m}4')) for m in ('rtn', 'awq', 'gptq')) < 0.01 < loss('rtn2')
    assert loss('bin') > 0.2 and loss('tern') > 0.1                             # destroyed, without training
    size = lambda name: rows[name]['file_bytes']
    assert size('fp') > size('half') > size('int8') > size('rtn4') > size('rtn3') > size('rtn2') > size('bin')
    assert size('gptq3') == pytest.approx(size('rtn3'), rel=0.01) and rows['rtn3']['compression'] == size('fp') / size('rtn3')
    bits = {'half': 16, 'int8': 8 + 32 / 85.3, 'uniform16': 5, 'uniform128': 4.125, 'nf4': 4.25, 'fit4': 4.25, 'bin': 1.5,
            'rtn4': 4 + 16 / 32 + 8 / 80, 'tern': 2.5}                          # zeros of rows are filled up to bytes
    assert {k: rows[k]['bits'] for k in bits} == pytest.approx(bits, rel=0.02)
    assert all(r['ms_1'] > 0 and r['ratio_many'] > 0 for r in rows.values())


def test_codes_are_those_of_the_definition(home):
    """rtn3 in the table is rounding to the nearest of every block matrix, computed here by hand."""
    model, tokenizer, about = sample.load(str(home / 'out/gpt/best.pt'))
    for name, m in model.named_modules():
        if type(m) is torch.nn.Linear and name != 'lm_head':
            w = m.weight.data.view(len(m.weight), -1, 32)
            low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
            scale = ((high - low) / 7).half().float()
            zero = (-low / scale).round().clamp(0, 7)
            m.weight.data = (((w / scale + zero).round().clamp(0, 7) - zero) * scale).view_as(m.weight)
    c = about['config']
    val = tokens.load(c['dataset'], 'val')
    starts = common.sample_indices(c['seed'], -1, len(val) - c['block_size'], c['eval_iters'] * c['batch_size'])
    xy = val.windows(starts, c['block_size'] + 1)
    with torch.no_grad():
        loss = model(xy[:, :-1], xy[:, 1:]).item()
    assert {r['scheme']: r['loss'] for r in rows_of(home / 'out/gpt/ptq.jsonl')}['rtn3'] == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize('scheme', ['gptq3', 'awq2', 'nf4dq', 'int8a8', 'half', 'bin'])
@pytest.mark.parametrize('skip', ['', 'head,embd'])
def test_save_and_load(call, home, tmp_path, monkeypatch, scheme, skip):
    """The file is one, its logits are to the bit those of the model that was quantized, ptq.py says the same of it, sample.py
    writes."""
    path = tmp_path / 'new' / 'q.safetensors'
    used = QUICK[:2] if scheme[:4] in ('gptq', 'awq2') else QUICK[:1] if scheme == 'bin' else []
    said = call(*used, f'--schemes={scheme}', f'--skip={skip}', f'--save={path}', cwd=home).out
    size, loss = re.search(r'wrote .*q\.safetensors: ([\d,]+) bytes\nval loss ([\d.]+)', said).groups()
    assert os.listdir(path.parent) == ['q.safetensors'] and os.path.getsize(path) == int(size.replace(',', ''))
    again = call(f'--ckpt={path}', '--time_rounds=0', cwd=home)
    row = rows_of(path.with_name('q_ptq.jsonl'))
    assert len(row) == 1 and f'{row[0]["loss"]:.4f}' == loss and row[0]['file_bytes'] == os.path.getsize(path)
    assert 'as saved' in again.out
    text = call(f'--ckpt={path}', '--prompt=one two', '--max_new_tokens=8', '--temperature=0', cwd=home, script='sample.py').out
    assert text.startswith('one two') and len(text) > 8
    model, _, about = sample.load(str(path))
    assert about['quantized'] and (skip == '') == isinstance(model.wte, replace.PackedEmbedding)
    for key, value in {'skip': skip, 'group': 32, 'windows': 8}.items():
        monkeypatch.setattr(ptq, key, value)
    subject = subjects.load(str(home / 'out/gpt'), torch.device('cpu'), dict.fromkeys(ptq.config, ''))
    replace.unfuse(subject.model)
    ptq.quantize(subject, subject.model, scheme)
    ids = subject.ids(24)
    with torch.no_grad():
        assert torch.equal(model(ids)[0], subject.model(ids)[0])


def test_the_saved_model_is_the_one_of_the_table(call, home, table, tmp_path):
    call(*QUICK[:2], '--schemes=gptq3', f'--save={tmp_path / "q.safetensors"}', cwd=home)
    call(f'--ckpt={tmp_path / "q.safetensors"}', '--time_rounds=0', cwd=home)
    assert rows_of(tmp_path / 'q_ptq.jsonl')[0]['loss'] == table[1]['gptq3']['loss']


def test_an_interrupted_save_leaves_no_half_file(home, start, tmp_path):
    """Killed while it quantizes, and while it writes: what was there before, an earlier model of ptq.py, stays."""
    path = tmp_path / 'q.safetensors'
    assert start(str(ROOT / 'ptq.py'), '--schemes=rtn4', '--group=32', f'--save={path}', cwd=home).wait().code == 0
    before = path.read_bytes()
    words = [str(ROOT / 'ptq.py'), *QUICK[:2], '--schemes=gptq3', f'--save={path}']
    killed = 'lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)'
    for patch in (f'import os, signal\nfrom pretrained import calibrate\ncalibrate.gptq = {killed}',
                  f'import os, signal\nos.replace = {killed}',
                  'import safetensors.torch as s\ndef f(*a, **k): raise OSError(28, "No space left")\ns.save_file = f'):
        done = start(*words, cwd=home, patch=patch).wait()
        assert done.code == -signal.SIGKILL or 'No space left' in one_error(done)
        assert path.read_bytes() == before
    assert start(*words, cwd=home).wait().code == 0
    assert path.read_bytes() != before and path.stat().st_mode & 0o777 == 0o666 & ~mask()
    assert os.listdir(tmp_path) == ['q.safetensors'] and common.read_packed(str(path))


def test_a_full_precision_bitnet(call, tiny_data, tmp_path):
    call(f'--dataset={tiny_data}', '--quant=fp', '--n_layer=2', '--n_embd=64', '--n_ff=96', '--block_size=32', '--batch_size=8',
         '--max_iters=60', '--warmup_iters=5', '--eval_interval=60', '--eval_iters=2', '--save_interval=60', '--device=cpu',
         cwd=tmp_path, script='train_bitnet.py')
    call('--ckpt=out/bitnet', *QUICK, '--schemes=rtn3,gptq3', cwd=tmp_path)
    rows = {r['scheme']: r for r in rows_of(tmp_path / 'out/bitnet/ptq.jsonl')}
    best = common.read_checkpoint(str(tmp_path / 'out/bitnet/best.pt'))['best_val_loss']
    assert rows['fp']['loss'] == pytest.approx(best, abs=1e-6) and rows['gptq3']['loss'] < rows['rtn3']['loss']
    call('--ckpt=out/bitnet', *QUICK[:2], '--schemes=gptq3', '--skip=', '--save=q.safetensors', cwd=tmp_path)
    assert call('--ckpt=q.safetensors', '--max_new_tokens=4', cwd=tmp_path, script='sample.py').out


def test_a_ternary_bitnet_has_only_its_embedding_left(call, tiny_data, tmp_path):
    call(f'--dataset={tiny_data}', '--n_layer=1', '--n_embd=64', '--n_ff=96', '--block_size=32', '--batch_size=8',
         '--max_iters=5', '--warmup_iters=1', '--eval_interval=5', '--eval_iters=2', '--save_interval=5', '--device=cpu',
         cwd=tmp_path, script='train_bitnet.py')
    assert 'there is nothing to quantize: 4 layers are low-bit already' in one_error(
        call('--ckpt=out/bitnet', *QUICK, cwd=tmp_path, code=2))
    call('--ckpt=out/bitnet', '--group=32', '--time_rounds=1', '--skip=', '--schemes=rtn4', cwd=tmp_path)
    rows = rows_of(tmp_path / 'out/bitnet/ptq.jsonl')
    assert [r['scheme'] for r in rows] == ['as trained', 'rtn4'] and rows[1]['file_bytes'] < rows[0]['file_bytes']


def test_what_is_made_on_the_way(monkeypatch):
    """--save holds one model: beside it, at most half of what the largest matrix, a head, takes, and all packed layers."""
    class Text:
        def calibration(self, n, seed):
            return [torch.arange(64).view(2, 32)]

        def run(self, model, x):
            model(x)

    monkeypatch.setattr(ptq, 'skip', '')
    monkeypatch.setattr(calibrate, 'PART', 1 << 19)
    head, rest = 4 * 80_000 * 256, 4 * 12 * 2 * 256 * 256
    for scheme in ('rtn4', 'nf4', 'int8', 'gptq3', 'awq3'):
        model = GPT(sample.GPTConfig(vocab_size=80_000, block_size=32, n_layer=2, n_head=2, n_embd=256)).eval()
        with common.peak_meter(False) as found:
            ptq.quantize(Text(), model.requires_grad_(False), scheme)
        assert found['bytes'] < (head + rest) * 9 / 32 + head / 2, scheme


def test_bitsandbytes_beside_ours(call, home, tmp_path):
    """Its nf4 is ours: the same codes, with scales of fp32 where ours are of fp16; its int8 is absmax of rows."""
    pytest.importorskip('bitsandbytes')
    call('--time_rounds=1', '--schemes=int8a8,nf4,nf4dq,bnb8,bnb_nf4,bnb_nf4dq', f'--out={tmp_path}', cwd=home)
    rows = {r['scheme']: r for r in rows_of(tmp_path / 'ptq.jsonl')}
    for ours, theirs in (('int8a8', 'bnb8'), ('nf4', 'bnb_nf4'), ('nf4dq', 'bnb_nf4dq')):
        assert rows[theirs]['loss'] == pytest.approx(rows[ours]['loss'], abs=2e-3) and rows[theirs]['delta'] != 0
    assert rows['bnb_nf4']['bits'] > rows['nf4']['bits'] and rows['bnb8']['file_bytes'] < rows['fp']['file_bytes']


# ---------------------------------------------------------------------------------------------------------------------
# prune


def test_prune(call, home):
    out = call('prune', '--windows=8', '--amounts=(0.5, 1.0)', '--retrain_iters=5', '--retrain_lr=1e-3', cwd=home).out
    rows = rows_of(home / 'out/gpt/prune.jsonl')
    by = {(r['method'], r['amount']): r for r in rows}
    assert list(by) == [('none', 0.0), *((m, a) for m in ('magnitude', 'global') for a in (0.5, 1.0)), ('2:4', 0.5),
                        ('wanda', 0.5), ('wanda', 1.0), ('wanda2:4', 0.5)]
    for (_, amount), r in by.items():
        assert r['zeros'] == pytest.approx(amount, abs=1e-3)
        assert amount == 0 or r['loss'] < r['pruned_loss']                      # what the retraining is for
    assert by['magnitude', 0.5]['pruned_loss'] < by['magnitude', 1.0]['pruned_loss'] == by['wanda', 1.0]['pruned_loss']
    assert by['none', 0.0]['delta'] is None and re.search(r'(?m)^magnitude +1\.00 +1\.0000', out)
    assert by['magnitude', 1.0]['file_bytes'] < by['magnitude', 0.5]['file_bytes'] < by['none', 0.0]['file_bytes']
    assert (home / 'out/gpt/prune.png').read_bytes().startswith(b'\x89PNG')


def test_a_saved_pruned_model_has_these_zeros(call, home, tmp_path):
    call('prune', '--methods=wanda2:4', '--windows=8', '--retrain_iters=2', f'--save={tmp_path / "p.safetensors"}', cwd=home)
    model, _, about = sample.load(str(tmp_path / 'p.safetensors'))
    for name in about['quantized']:
        weight = model.get_submodule(name).decode()[0]
        assert torch.equal((weight.unflatten(1, (-1, 4)) == 0).sum(-1).unique(), torch.tensor([2]))
    call(f'--ckpt={tmp_path / "p.safetensors"}', '--time_rounds=0', cwd=home)
    assert not (tmp_path / 'ptq.jsonl').exists()
    saved = [r for r in rows_of(home / 'out/gpt/prune.jsonl') if r['method'] == 'wanda2:4'][0]
    assert rows_of(tmp_path / 'p_ptq.jsonl')[0]['loss'] == pytest.approx(saved['loss'], abs=1e-6)


@pytest.mark.parametrize('amount, zeros', [('1', 16), ('1.0', 16), ('0.5', 8), ('0', 0)])
def test_the_share_that_becomes_zero(amount, zeros, monkeypatch):
    """amount=1 is all of them (not one weight, as with torch's pruning and an int)."""
    model = torch.nn.ModuleDict({'a': torch.nn.Linear(4, 4)})
    model['a'].weight.data = torch.arange(1.0, 17).view(4, 4)
    for method in ('magnitude', 'global'):
        masks = ptq.prune_(None, model, method, float(amount))
        assert (~masks['a']).sum() == zeros and (model['a'].weight == 0).sum() == zeros
        assert not zeros or model['a'].weight.flatten()[:zeros].eq(0).all()


def test_what_is_pruned_worked_by_hand():
    """global: the smallest of both matrices, which are all of one; wanda: in each row the smallest |w| |x_j|; 2:4 of |w|."""
    def model():
        net = torch.nn.ModuleDict({'a': torch.nn.Linear(4, 2, bias=False), 'b': torch.nn.Linear(4, 2, bias=False)})
        net['a'].weight.data = torch.tensor([[1.0, -2, 3, -4], [8, 7, -6, 5]])
        net['b'].weight.data = 10 * net['a'].weight.data
        return net
    net = model()
    ptq.prune_(None, net, 'global', 0.5)
    assert net['a'].weight.abs().tolist() == [[0] * 4, [0] * 4] and (net['b'].weight != 0).all()
    net = model()
    ptq.prune_(None, net, '2:4', 0.5)
    assert net['a'].weight.tolist() == [[0, 0, 3, -4], [8, 7, 0, 0]]

    class Inputs:
        def calibration(self, n, seed):
            return [torch.tensor([[9.0, 1, 1, 1], [0, 0, 0, -1]])]

        def run(self, net, x):
            net['a'](x), net['b'](x * torch.tensor([0.0, 1, 1, 1]))
    net = model()
    ptq.prune_(Inputs(), net, 'wanda', 0.5)         # |x_j| of a: 9, 1, 1, 1.41 -> 9 2 3 5.7 and 72 7 6 7.1; of b: 0 1 1 1.41
    assert net['a'].weight.tolist() == [[1, 0, 0, -4], [8, 0, 0, 5]]
    assert net['b'].weight.tolist() == [[0, 0, 30, -40], [0, 70, 0, 50]]


def test_every_method_gets_the_same_updates(call, home, tmp_path):
    """What a pruning gives does not depend on what is pruned before it."""
    words = ['prune', '--amounts=0.5', '--retrain_iters=3', f'--out={tmp_path}']
    call(*words, '--methods=global', cwd=home)
    alone = rows_of(tmp_path / 'prune.jsonl')[-1]['loss']
    call(*words, '--methods=magnitude,global', cwd=home)
    assert rows_of(tmp_path / 'prune.jsonl')[-1]['loss'] == alone


def test_smallest_keeps_exactly_as_many():
    mask = ptq.smallest(torch.tensor([[1.0, 1.0, 1.0, 1.0], [4.0, 1.0, 3.0, 2.0]]), 2)
    assert mask.tolist() == [[False, False, True, True], [True, False, True, False]]


# ---------------------------------------------------------------------------------------------------------------------
# sensitivity and choose


def test_sensitivity(call, home, table):
    out = call('sensitivity', '--group=32', '--scheme=rtn2', cwd=home).out
    rows = {(r['block'], r['kind']): r for r in rows_of(home / 'out/gpt/sensitivity.jsonl')}
    kinds = ['attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj']
    assert set(rows) == {(b, k) for b in ('blocks.0', 'blocks.1', 'all') for k in [*kinds, 'all']}
    assert rows['all', 'all']['loss'] == pytest.approx(table[1]['rtn2']['loss'], abs=1e-6)
    assert rows['all', 'all']['delta'] > max(rows[b, k]['delta'] for b in ('blocks.0', 'blocks.1') for k in kinds) > 0
    assert rows['all', 'all']['weights'] == 2 * 12 * 64 * 64 and rows['blocks.0', 'mlp.c_fc']['weights'] == 4 * 64 * 64
    assert re.search(r'block +attn\.c_attn +attn\.c_proj +mlp\.c_fc +mlp\.c_proj +all', out)
    assert (home / 'out/gpt/sensitivity.png').read_bytes().startswith(b'\x89PNG')


def test_choose_writes_a_config_that_trains(call, home, tmp_path):
    out = call('choose', '--group=32', '--bits=17', cwd=home).out
    chosen = runpy.run_path(str(home / 'out/gpt/chosen.py'))
    row, = rows_of(home / 'out/gpt/choose.jsonl')
    best = min(row['losses'], key=row['losses'].get)
    assert chosen['binary_blocks'] == (int(best[-1]),) and chosen['n_binary'] == 0 and chosen['qkv_proj'] == 'bin'
    words = out.strip().split('train it with: python train_gpt.py ')[1].split()
    done = call(*words, '--max_iters=2', '--eval_interval=2', '--save_interval=2', cwd=home, script='train_gpt.py')
    assert 'packed into out/chosen' in done.out
    model = GPT(sample.GPTConfig(**common.read_checkpoint(str(home / 'out/chosen/last.pt'))['model_config']))
    low = [any(isinstance(m, layers.LowBit) for m in b.modules()) for b in model.blocks]
    assert low == [best == 'blocks.0', best == 'blocks.1']
    said = one_error(call('choose', '--bits=17', '--ckpt=out/chosen', cwd=home, code=2))
    assert 'out/chosen/best.pt is no full-precision model of train_gpt.py' in said


# ---------------------------------------------------------------------------------------------------------------------
# transformers


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """A folder with a GPT-2, an OPT and a Llama of transformers, classifiers, texts, and labelled texts."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoModelForCausalLM, GPT2Config, GraniteConfig, LlamaConfig, OPTConfig, PreTrainedTokenizerFast
    home = tmp_path_factory.mktemp('hf')
    random = np.random.default_rng(0)
    words = 'one two three four five six seven eight nine ten and or not so'.split()
    texts = [' '.join(random.choice(words, 3000)) for _ in range(2)]
    for name, text in zip(('val.txt', 'cal.txt'), texts, strict=True):
        (home / name).write_text(text)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=300, special_tokens=['<|endoftext|>'], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token='<|endoftext|>')
    torch.manual_seed(0)
    size = {'vocab_size': len(tokenizer), 'bos_token_id': 0, 'eos_token_id': 0, 'pad_token_id': 0}
    shared_heads = {'hidden_size': 64, 'intermediate_size': 96, 'num_hidden_layers': 2, 'num_attention_heads': 2,
                    'num_key_value_heads': 1, 'max_position_embeddings': 32, 'tie_word_embeddings': False, **size}
    for name, config in {'gpt2': GPT2Config(n_positions=32, n_embd=64, n_layer=2, n_head=2, **size),
                         'opt': OPTConfig(hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=2,
                                          max_position_embeddings=32, word_embed_proj_dim=64, **size),
                         'llama': LlamaConfig(**shared_heads)}.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    rows = [((' '.join(random.choice(words, 8)),), i % 2) for i in range(80)]
    write_table(home / 'rows.csv', ('sentence', 'label'), [(text, i) for (text,), i in rows])
    net, own = hf.small([t for t, _ in rows], ['negative', 'positive'], n_layer=2, n_head=2, n_embd=64, dropout=0.1,
                        vocab_size=300, max_len=32)
    hf.save(net, own, str(home / 'cls'))
    for name, config in {'conv1d': GPT2Config(n_positions=32, n_embd=64, n_layer=2, n_head=2, **size),
                         'last_token': GraniteConfig(**shared_heads)}.items():      # no ...ForSequenceClassification
        config.save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
        net, own, *_ = hf.load(str(home / name), ['negative', 'positive'], weights=False)
        hf.save(net, own, str(home / name))
    assert isinstance(net, hf.LastTokenClassifier)
    return home


@pytest.mark.parametrize('name', ['gpt2', 'opt', 'llama'])
def test_a_language_model_of_transformers(call, folders, name):
    """Its loss is transformers' own; quantized, saved as a folder, it comes back the same."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    texts = [f'--text={folders / "val.txt"}', f'--calibration={folders / "cal.txt"}']
    call(f'--ckpt={name}', *texts, *QUICK, '--schemes=rtn3,gptq3', cwd=folders)
    rows = {r['scheme']: r for r in rows_of(folders / name / 'ptq.jsonl')}
    net, tokenizer = AutoModelForCausalLM.from_pretrained(folders / name), AutoTokenizer.from_pretrained(folders / name)
    ids = torch.tensor(tokenizer((folders / 'val.txt').read_text())['input_ids'])
    n = (len(ids) - 1) // 32
    with torch.no_grad():
        logits = net(ids[:n * 32].view(n, 32)).logits
    assert rows['fp']['loss'] == pytest.approx(F.cross_entropy(logits.flatten(0, 1), ids[1:n * 32 + 1]).item(), abs=1e-5)
    assert rows['rtn3']['loss'] != rows['gptq3']['loss'] != rows['fp']['loss']
    saved = call(f'--ckpt={name}', *texts, *QUICK[:2], '--schemes=gptq3', '--skip=', f'--save={name}_q', cwd=folders).out
    call(f'--ckpt={name}_q', texts[0], '--time_rounds=0', cwd=folders)
    assert f'val loss {rows_of(folders / f"{name}_q/ptq.jsonl")[0]["loss"]:.4f}\n' in saved
    assert (folders / f'{name}_q/packed.safetensors').stat().st_size < (folders / name / 'model.safetensors').stat().st_size / 4


@pytest.mark.parametrize('name', ['cls', 'conv1d', 'last_token'])
def test_a_classifier_of_transformers(call, folders, name):
    """Its loss and accuracy are those of a plain pass; quantized, saved as a folder, it comes back the same."""
    call('--file', folders / 'rows.csv', '--val_file', folders / 'rows.csv', '--out_dir', folders / 'data', cwd=folders,
         script='data/sst2/prepare.py')
    words = [f'--dataset={folders / "data"}', *QUICK]
    call(f'--ckpt={name}', *words, '--schemes=rtn3,gptq2', cwd=folders)
    rows = {r['scheme']: r for r in rows_of(folders / name / 'ptq.jsonl')}
    sentences, labels, names = load(folders / 'data', 'val')
    net, tokenizer, _, fresh = hf.load(str(folders / name), names)
    with torch.no_grad():
        logits = torch.cat([net.eval()(**hf.collate(tokenizer, hf.encode(tokenizer, [t], 32), 32)).logits for t in sentences])
    labels = torch.tensor(labels)
    assert not fresh and rows['fp']['loss'] == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-5)
    assert rows['fp']['accuracy'] == (logits.argmax(1) == labels).sum().item() / 80 and rows['fp']['perplexity'] is None
    assert len({r['loss'] for r in rows.values()}) == 3
    saved = call(f'--ckpt={name}', *words[:3], '--schemes=gptq2', '--skip=', f'--save={name}_q', cwd=folders).out
    call(f'--ckpt={name}_q', words[0], '--time_rounds=0', cwd=folders)
    assert f'val loss {rows_of(folders / f"{name}_q" / "ptq.jsonl")[0]["loss"]:.4f}\n' in saved
    call('prune', f'--ckpt={name}', words[0], '--methods=wanda', '--amounts=0.5', '--windows=8', '--retrain_iters=2',
         cwd=folders)
    assert [r['method'] for r in rows_of(folders / name / 'prune.jsonl')] == ['none', 'wanda']


def test_an_interrupted_save_leaves_no_half_folder(call, folders, start):
    """Killed before the folder gets its name, and on a full disk: there is no folder, and the next save makes it."""
    words = [str(ROOT / 'ptq.py'), '--ckpt=gpt2', '--text=val.txt', '--group=32', '--schemes=rtn3', '--save=half_q']
    for patch in ('import os, signal\nmove = os.replace\ndef f(a, b):\n'
                  '    os.kill(os.getpid(), signal.SIGKILL) if str(b).endswith("half_q") else move(a, b)\nos.replace = f',
                  'import safetensors.torch as s\ndef f(*a, **k): raise OSError(28, "No space left")\ns.save_file = f'):
        done = start(*words, cwd=folders, patch=patch).wait()
        assert done.code == -signal.SIGKILL or 'No space left' in one_error(done)
        assert not (folders / 'half_q').exists()
    call(*words[1:], cwd=folders)
    assert {'config.json', 'packed.safetensors', 'tokenizer.json'} <= set(os.listdir(folders / 'half_q'))
    assert not list(folders.glob('half_q.tmp*'))
    assert 'half_q exists' in one_error(call(*words[1:], cwd=folders, code=2)).replace("'", '')


@pytest.mark.parametrize('words, said', [
    (['--ckpt=gpt2'], 'gpt2 brings no validation data; type --text=FILE'),
    (['--ckpt=gpt2', '--text=val.txt', '--schemes=gptq4', '--group=32'], 'gpt2 brings no calibration text; type --calibr'),
    (['--ckpt=gpt2', '--text=nowhere.txt'], 'cannot read nowhere.txt'),
    (['--ckpt=gpt2', '--text=val.txt', '--block_size=64'], 'block_size=64 is more than the 32 of gpt2'),
    (['--ckpt=cls'], 'cls is a classifier; type --dataset=...'),
    (['--ckpt=nobody/nothing', '--text=val.txt'], "cannot load model 'nobody/nothing'")])
def test_what_is_missing_for_transformers(call, folders, words, said):
    assert said in one_error(call(*words, cwd=folders, code=2, HF_HUB_OFFLINE='1'))


# ---------------------------------------------------------------------------------------------------------------------
# mistakes


@pytest.mark.parametrize('words, said', [
    (['--schemes=gptq5'], "'gptq5' is none of half, int8"),
    (['--schemes=gptq4', '--group=48'],
     'scheme gptq4 does not fit blocks.0.attn.c_attn: group=48 does not divide a row of 64 weights'),
    (['--schemes=nf4', '--skip=heads'], "skip='heads' names no layer; the layers are wte"),
    (['--schemes=nf4,int8', '--save=q.safetensors'], '--save keeps one model, 2 schemes were asked for'),
    (['--schemes=bnb8'], 'scheme bnb8 needs bitsandbytes'),
    (['--ckpt=nowhere'], 'nowhere'),
    (['--block_size=64'], 'block_size=64 is more than the 32'),
    (['--windows=0'], 'windows=0 makes no sense; type --windows=1 or more'),
    (['--damp=-1'], 'damp=-1.0 makes no sense'),
    (['--damp=2'], 'damp=2.0 makes no sense; type --damp=1 or less'),
    (['--schemes=rtn4,rtn4'], 'rtn4 is asked for twice'),
    (['--schemes=,'], "'' is none of"),
    (['--schemes=nf4,half'], 'group has no use for nf4, half; leave --group out'),
    (['--schemes=rtn4', '--damp=0.5'], 'damp has no use for rtn4'),
    (['--schemes=awq4', '--clip=False'], 'clip has no use for awq4'),
    (['sensitivity', '--windows=4'], 'windows has no use for bin'),
    (['prune', '--methods=global', '--windows=4'], 'windows has no use without wanda'),
    (['compair'], "mode='compair' is none of compare, prune"),
    (['--schemes=rtn4', '--save=out/gpt/packed.safetensors'], 'is there and not by ptq.py; type another file'),
    (['--text=a.txt'], 'text has no use for out/gpt/best.pt'),
    (['--schemes=rtn4', '--save=out/gpt/best.pt'], 'a packed model is a file that ends in .safetensors'),
    (['--ckpt=out/gpt/packed.safetensors', '--schemes=rtn4', '--save=out/gpt/packed.safetensors'], 'does not say what it was'),
    (['--schemes=rtn4', '--save=q.safetensors', '--time_rounds=1'], 'time_rounds has no use with --save'),
    (['prune', '--skip='], 'lm_head is an embedding too, which is not pruned'),
    (['prune', '--damp=0.1'], 'damp has no use in prune'),
    (['choose', '--bits=32'], 'bits=32: with all 2 blocks as bin it is'),
    (['--bits=3'], 'bits has no use in compare'),
    (['prune', '--amounts=(0.5, 1.5)'], 'shares from 0 to 1'),
    (['prune', '--methods=random'], "'random' is none of magnitude"),
    (['prune', '--schemes=nf4'], 'schemes has no use in prune'),
    (['prune', '--save=q.safetensors'], '--save keeps one model, not 11'),
    (['sensitivity', '--scheme=gptq7'], "scheme='gptq7' is none of"),
    (['choose', '--bits=0.5'], 'with all 2 blocks as bin it is'),
    (['choose', '--bits=17', '--scheme=nf4'], 'train_gpt.py trains bin, tern, uniform16'),
    (['--mode=tune'], "mode='tune' is none of compare, prune, sensitivity, choose")])
def test_a_mistake_is_one_line(call, home, words, said):
    if words == ['--schemes=bnb8'] and ptq.importlib.util.find_spec('bitsandbytes'):
        pytest.skip('bitsandbytes is installed')
    groups = [] if 'prune' in words else ['--group=32']
    assert said in one_error(call(*groups, *words, cwd=home, code=2, HF_HUB_OFFLINE='1'))


def test_what_is_wrong_with_the_data(call, home, tiny_data, tmp_path):
    """No validation data, no training data to calibrate on, other tokens, a damaged checkpoint: each is one line."""
    data = tmp_path / 'data'
    shutil.copytree(tiny_data, data)
    words = [f'--ckpt={home / "out/gpt"}', f'--dataset={data}', '--group=32', f'--out={tmp_path / "o"}']
    for file in data.glob('train_*'):
        file.unlink()
    assert 'no train tokens in' in one_error(call(*words, '--schemes=gptq4', cwd=tmp_path, code=2))
    call(*words, '--schemes=rtn4', cwd=tmp_path)                                # which looks at nothing
    for file in data.glob('val_*'):
        file.unlink()
    assert 'no tokens in' in one_error(call(*words, '--schemes=rtn4', cwd=tmp_path, code=2))
    tokens.write(data, 'val', [np.arange(3000) % 260], tokens.train_bpe(['one two three'] * 9, 260))
    assert 'was trained on other tokens than those of' in one_error(call(*words, '--schemes=rtn4', cwd=tmp_path, code=2))
    whole = (home / 'out/gpt/best.pt').read_bytes()
    for name, damaged in damages(whole).items():
        (tmp_path / 'best.pt').write_bytes(damaged)
        assert 'best.pt' in one_error(call(f'--ckpt={tmp_path / "best.pt"}', *QUICK, cwd=tmp_path, code=2)), name
    packed = (home / 'out/gpt/packed.safetensors').read_bytes()
    (tmp_path / 'p.safetensors').write_bytes(packed[:-100] + bytes(100))
    assert 'p.safetensors is damaged' in one_error(call(f'--ckpt={tmp_path / "p.safetensors"}', *QUICK, cwd=tmp_path, code=2))
    shutil.copy(home / 'out/gpt/packed.safetensors', tmp_path / 'p.safetensors')
    assert 'does not say what it was trained on; type --dataset=' in one_error(
        call(f'--ckpt={tmp_path / "p.safetensors"}', *QUICK, cwd=tmp_path, code=2))


def test_earlier_rows_are_kept(call, home, tmp_path):
    words = ['--group=32', '--time_rounds=0', f'--out={tmp_path}']
    for scheme in ('rtn4', 'rtn3', 'rtn2'):
        call(*words, f'--schemes={scheme}', cwd=home)
    assert [r['scheme'] for r in rows_of(tmp_path / 'ptq.jsonl')] == ['fp', 'rtn2']
    assert [r['scheme'] for r in rows_of(tmp_path / 'ptq.prev.jsonl')] == ['fp', 'rtn3']


def test_rows_of_an_interrupted_table_stay(home, start, tmp_path):
    job = start(str(ROOT / 'ptq.py'), *QUICK, '--schemes=rtn4,gptq4', f'--out={tmp_path}', cwd=home,
                patch='import time\nfrom pretrained import calibrate\ncalibrate.gptq = lambda *a, **k: time.sleep(100)')
    path, end = tmp_path / 'ptq.jsonl', time.time() + 60
    while not path.exists() and time.time() < end:
        time.sleep(0.1)
    job.signal(signal.SIGINT)
    assert job.wait().code in (130, -signal.SIGINT, 1)
    assert [r['scheme'] for r in rows_of(path)] == ['fp', 'rtn4']
