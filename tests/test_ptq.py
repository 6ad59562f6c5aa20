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
import engine.load
import layers
import ptq
from conftest import ROOT, one_error
from forked import SHORT_TIMES
from pretrained import adapters, calibrate, hf, replace, subjects
from readers import tokens
from readers.texts import load, read_table, write_table
from train_gpt import GPT, GPTConfig

QUICK = ['--group=32', '--windows=8', '--time_rounds=1']
SCHEMES = [s for s in ptq.SCHEMES if not s.startswith('bnb')]


@pytest.fixture(scope='module')
def calls(in_turn):
    """calls((words, cwd, code), ...) -> a Result of each; the first word may be another script than ptq.py."""
    def run(*commands, patch=''):
        split = [(words if str(words[0]).endswith('.py') else ['ptq.py', *words], cwd) for words, cwd, _ in commands]
        results = in_turn([(words[0], cwd, words[1:]) for words, cwd in split], patch=SHORT_TIMES + patch)
        for done, (words, _, code) in zip(results, commands, strict=True):
            assert done.code == code and 'Traceback' not in done.err, (words, done)
        return results
    return run


@pytest.fixture(scope='module')
def call(calls):
    """call(*words, cwd) -> Result of ptq.py with these words."""
    return lambda *words, cwd: calls((words, cwd, 0))[0]


def small(data, steps, *options, n_layer=2):
    """The words that train a small model."""
    return [f'--dataset={data}', f'--n_layer={n_layer}', '--n_embd=64', '--block_size=32', '--batch_size=8', '--device=cpu',
            f'--max_iters={steps}', '--warmup_iters=5', f'--eval_interval={steps}', f'--save_interval={steps}', *options]


@pytest.fixture(scope='module')
def home(call, tiny_data, tmp_path_factory):
    """A folder with out/gpt, a finished run of train_gpt.py."""
    folder = tmp_path_factory.mktemp('ptq')
    call('train_gpt.py', *small(tiny_data, 600, '--n_head=2', '--eval_iters=4', '--learning_rate=1e-2'), cwd=folder)
    return folder


def rows_of(path):
    return [json.loads(line) for line in open(path)]


@pytest.fixture(scope='module')
def table(call, home):
    """What `ptq.py` says of the run with every scheme but bitsandbytes', and its rows by scheme."""
    done = call(*QUICK, f'--schemes={",".join(SCHEMES)}', cwd=home)
    return done.out, {r['scheme']: r for r in rows_of(home / 'out/gpt/ptq.jsonl')}


def test_the_first_row_is_what_training_wrote_down(table, home):
    """The full-precision row has the best validation loss of the checkpoint; a picture is written."""
    out, rows = table
    best = common.read_checkpoint(str(home / 'out/gpt/best.pt'))['best_val_loss']
    assert rows['fp']['loss'] == pytest.approx(best, abs=1e-6) and best < 1.6
    assert f'its training wrote down {best:.4f} for the same batches' in out
    assert list(rows) == ['fp', *SCHEMES] and re.search(r'(?m)^scheme +bits/weight +val loss', out)
    assert rows['fp']['perplexity'] == pytest.approx(math.exp(best)) and rows['fp']['delta'] is None
    assert (home / 'out/gpt/ptq.png').read_bytes().startswith(b'\x89PNG')


def test_more_bits_less_loss_and_smaller_files(table):
    """Losses order as the bits do, calibration beats rounding at 2 bits, and the files have the promised bits a weight."""
    _, rows = table
    loss = lambda name: rows[name]['loss'] - rows['fp']['loss']
    assert abs(loss('half')) < 1e-3 and abs(loss('bf16')) < 5e-3 and abs(loss('int8')) < 2e-3 and abs(loss('int8a8')) < 1e-2
    assert max(loss('gptq2'), loss('awq2')) < loss('rtn2') < loss('bin')
    assert max(abs(loss(f'{m}4')) for m in ('rtn', 'awq', 'gptq')) < 0.01 < loss('rtn2')
    assert loss('bin') > 0.2 and loss('tern') > 0.1                             # destroyed, without training
    size = lambda name: rows[name]['file_bytes']
    assert size('fp') > size('half') > size('int8') > size('rtn4') > size('rtn3') > size('rtn2') > size('bin')
    assert size('gptq3') == pytest.approx(size('rtn3'), rel=0.01) and rows['rtn3']['compression'] == size('fp') / size('rtn3')
    bits = {'half': 16, 'bf16': 16, 'int8': 8 + 32 / 85.3, 'uniform16': 5, 'uniform128': 4.125, 'nf4': 4.25, 'fit4': 4.25,
            'bin': 1.5, 'rtn4': 4 + 16 / 32 + 8 / 80, 'tern': 2.5}              # zeros of rows are filled up to bytes
    assert {k: rows[k]['bits'] for k in bits} == pytest.approx(bits, rel=0.02)
    assert all(r['ms_1'] > 0 and r['ratio_many'] > 0 for r in rows.values())


SAVED = {'gptq3': 'head,embd', 'awq2': '', 'nf4dq': '', 'bf16': '', 'int8a8': 'head,embd', 'bin': 'head,embd'}  # scheme: --skip


@pytest.fixture(scope='module')
def saved(calls, home, tmp_path_factory):
    """{scheme: (path, what --save printed, what ptq.py prints of the file, what sample.py writes with it)} of SAVED."""
    commands, paths = [], {scheme: tmp_path_factory.mktemp('saved') / 'new' / 'q.safetensors' for scheme in SAVED}
    for scheme, path in paths.items():
        used = QUICK[:2] if scheme in ('gptq3', 'awq2') else QUICK[:1] if scheme == 'bin' else []
        commands += [([*used, f'--schemes={scheme}', f'--skip={SAVED[scheme]}', f'--save={path}'], home, 0),
                     ([f'--ckpt={path}', '--time_rounds=0'], home, 0),
                     (['sample.py', f'--ckpt={path}', '--prompt=one two', '--max_new_tokens=8', '--temperature=0'], home, 0)]
    printed = [done.out for done in calls(*commands)]
    return {scheme: (path, *printed[3 * i:3 * i + 3]) for i, (scheme, path) in enumerate(paths.items())}


@pytest.mark.parametrize('scheme', SAVED)
def test_a_saved_model_comes_back(saved, home, table, monkeypatch, scheme):
    """One file, with to the bit the logits of the quantized model; ptq.py prints its loss again, sample.py writes with it."""
    (path, printed, again, text), skip = saved[scheme], SAVED[scheme]
    size, loss = re.search(r'wrote .*q\.safetensors: ([\d,]+) bytes\nval loss ([\d.]+)', printed).groups()
    assert sorted(os.listdir(path.parent)) == ['q.safetensors', 'q_ptq.jsonl']
    row, = rows_of(path.with_name('q_ptq.jsonl'))
    assert os.path.getsize(path) == int(size.replace(',', '')) == row['file_bytes'] and f'{row["loss"]:.4f}' == loss
    assert not skip or row['loss'] == table[1][scheme]['loss']
    assert 'as saved' in again and text.startswith('one two') and len(text) > 8
    model, _, about = engine.load.load(str(path))
    assert about['quantized'] and (skip == '') == isinstance(model.wte, replace.PackedEmbedding)
    for key, value in {'skip': skip, 'group': 32, 'windows': 8}.items():
        monkeypatch.setattr(ptq, key, value)
    best = str(home / 'out/gpt/best.pt')
    subject = subjects.Trained(best, *engine.load.load(best), torch.device('cpu'), dict.fromkeys(ptq.config, ''))
    replace.unfuse(subject.model)
    ptq.quantize(subject, subject.model, scheme)
    ids = subject.ids(24)
    with torch.no_grad():
        assert torch.equal(model(ids)[0], subject.model(ids)[0])


def test_an_interrupted_save_leaves_the_file_as_it_was(call, home, saved, start, tmp_path):
    """Killed while it quantizes or writes, or on a full disk, --save keeps the earlier model; the next one replaces it."""
    path = tmp_path / 'q.safetensors'
    shutil.copy(saved['bin'][0], path)
    before = path.read_bytes()
    words = [*QUICK[:2], '--schemes=gptq3', f'--save={path}']
    killed = 'lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)'
    for patch in (f'import os, signal\nfrom pretrained import calibrate\ncalibrate.gptq = {killed}',
                  f'import os, signal\nos.replace = {killed}',
                  'import safetensors.torch as s\ndef f(*a, **k): raise OSError(28, "No space left")\ns.save_file = f'):
        done = start(str(ROOT / 'ptq.py'), *words, cwd=home, patch=patch).wait(300)
        assert done.code == -signal.SIGKILL or 'disk full' in one_error(done)
        assert path.read_bytes() == before
    call(*words, cwd=home)
    os.umask(mask := os.umask(0))
    assert path.read_bytes() != before and path.stat().st_mode & 0o777 == 0o666 & ~mask
    assert os.listdir(tmp_path) == ['q.safetensors'] and common.read_packed(str(path))


def test_bitnets(calls, tiny_data, tmp_path):
    """One in full precision is quantized, saved with head and embedding, and sampled; of a ternary one only these are left."""
    words, every = ['--n_ff=96', '--eval_iters=2'], ['--group=32', '--time_rounds=1', '--skip=', '--schemes=rtn4']
    *_, sampled, refused, _ = calls(
        (['train_bitnet.py', *small(tiny_data, 60, *words, '--quant=fp', '--out_dir=out/fp')], tmp_path, 0),
        (['train_bitnet.py', *small(tiny_data, 5, *words, '--out_dir=out/tern', n_layer=1)], tmp_path, 0),
        (['--ckpt=out/fp', *QUICK, '--schemes=rtn3,gptq3'], tmp_path, 0),
        (['--ckpt=out/fp', *QUICK[:2], '--schemes=gptq3', '--skip=', '--save=q.safetensors'], tmp_path, 0),
        (['sample.py', '--ckpt=q.safetensors', '--max_new_tokens=4'], tmp_path, 0),
        (['--ckpt=out/tern', *QUICK], tmp_path, 2), (['--ckpt=out/tern', *every], tmp_path, 0))
    rows = {r['scheme']: r for r in rows_of(tmp_path / 'out/fp/ptq.jsonl')}
    best = common.read_checkpoint(str(tmp_path / 'out/fp/best.pt'))['best_val_loss']
    assert rows['fp']['loss'] == pytest.approx(best, abs=1e-6) and rows['gptq3']['loss'] < rows['rtn3']['loss'] and sampled.out
    assert 'nothing to quantize: 4 layers' in one_error(refused)
    first, second = rows_of(tmp_path / 'out/tern/ptq.jsonl')
    assert (first['scheme'], second['scheme']) == ('as trained', 'rtn4') and second['file_bytes'] < first['file_bytes']


def test_quantizing_takes_little_memory_beside_the_model(monkeypatch):
    """Beside the model --save takes at most half of its largest matrix, a head, and the packed layers."""
    class Text:
        def calibration(self, n, seed):
            return [torch.arange(64).view(2, 32)]

        def run(self, model, x):
            model(x)

    monkeypatch.setattr(ptq, 'skip', '')
    monkeypatch.setattr(calibrate, 'PART', 1 << 18)
    head, rest = 4 * 50_000 * 128, 4 * 12 * 128 * 128
    for scheme in ('nf4', 'gptq3'):
        model = GPT(GPTConfig(vocab_size=50_000, block_size=32, n_layer=1, n_head=2, n_embd=128)).eval()
        with common.peak_meter(False) as peak:
            ptq.quantize(Text(), model.requires_grad_(False), scheme)
        assert peak['bytes'] < (head + rest) * 9 / 32 + head / 2, scheme


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


@pytest.fixture(scope='module')
def pruned(calls, home, tmp_path_factory):
    """(what prune printed, rows of every method, rows of global alone, rows of wanda2:4, the file in which that is saved)."""
    folder = tmp_path_factory.mktemp('prune')
    path, words = folder / 'p.safetensors', ['prune', '--retrain_iters=5', '--retrain_lr=1e-3']
    done = calls(([*words, '--windows=8', '--amounts=(0.5, 1.0)'], home, 0),
                 ([*words, '--methods=global', '--amounts=0.5', f'--out={folder}'], home, 0),
                 ([*words, '--methods=wanda2:4', '--windows=8', f'--out={folder}', f'--save={path}'], home, 0),
                 ([f'--ckpt={path}', '--time_rounds=0'], home, 0))
    files = home / 'out/gpt/prune.jsonl', folder / 'prune.prev.jsonl', folder / 'prune.jsonl'
    return done[0].out, *map(rows_of, files), path


def test_prune(pruned, home):
    """Each method prunes its share, whatever the methods before; retraining lowers the loss; zeros make the file smaller."""
    out, rows, alone, _, _ = pruned
    by = {(r['method'], r['amount']): r for r in rows}
    assert list(by) == [('none', 0.0), *((m, a) for m in ('magnitude', 'global') for a in (0.5, 1.0)), ('2:4', 0.5),
                        ('wanda', 0.5), ('wanda', 1.0), ('wanda2:4', 0.5)]
    for (_, amount), r in by.items():
        assert r['zeros'] == pytest.approx(amount, abs=1e-3)
        assert amount == 0 or r['loss'] < r['pruned_loss']                      # by the retraining
    assert by['magnitude', 0.5]['pruned_loss'] < by['magnitude', 1.0]['pruned_loss'] == by['wanda', 1.0]['pruned_loss']
    assert by['none', 0.0]['delta'] is None and re.search(r'(?m)^magnitude +1\.00 +1\.0000', out)
    assert by['magnitude', 1.0]['file_bytes'] < by['magnitude', 0.5]['file_bytes'] < by['none', 0.0]['file_bytes']
    assert alone[-1]['method'] == 'global' and alone[-1]['loss'] == by['global', 0.5]['loss']
    assert (home / 'out/gpt/prune.png').read_bytes().startswith(b'\x89PNG')


def test_a_saved_pruned_model_has_these_zeros(pruned):
    """Two of every four weights are 0 in the file, and ptq.py measures the loss that was printed."""
    *_, rows, path = pruned
    model, _, about = engine.load.load(str(path))
    for name in about['quantized']:
        weight = model.get_submodule(name).decode()[0]
        assert torch.equal((weight.unflatten(1, (-1, 4)) == 0).sum(-1).unique(), torch.tensor([2]))
    assert rows_of(path.with_name('p_ptq.jsonl'))[0]['loss'] == pytest.approx(rows[-1]['loss'], abs=1e-6)


@pytest.mark.parametrize('method', ['magnitude', 'global'])
def test_the_share_that_becomes_zero(method):
    """amount=1.0 zeros all weights, not one weight; of equal weights exactly the share becomes zero."""
    for amount, zeros, weights in ((1.0, 16, torch.arange(1.0, 17)), (0.5, 8, torch.arange(1.0, 17)), (0.5, 8, torch.ones(16)),
                                   (0.0, 0, torch.arange(1.0, 17))):
        model = torch.nn.ModuleDict({'a': torch.nn.Linear(4, 4)})
        model['a'].weight.data = weights.view(4, 4).clone()
        masks = ptq.prune_(None, model, method, amount)
        assert (~masks['a']).sum() == zeros and (model['a'].weight == 0).sum() == zeros
        assert model['a'].weight.flatten()[:zeros].eq(0).all()


def test_each_method_prunes_by_hand():
    """global zeros the smallest of all matrices, wanda the smallest |w| |x_j| of each row, 2:4 two of each four."""
    class Inputs:
        def calibration(self, n, seed):
            return [torch.tensor([[9.0, 1, 1, 1], [0, 0, 0, -1]])]

        def run(self, net, x):
            net['a'](x), net['b'](x * torch.tensor([0.0, 1, 1, 1]))

    def pruned(method):
        net = torch.nn.ModuleDict({'a': torch.nn.Linear(4, 2, bias=False), 'b': torch.nn.Linear(4, 2, bias=False)})
        net['a'].weight.data = torch.tensor([[1.0, -2, 3, -4], [8, 7, -6, 5]])
        net['b'].weight.data = 10 * net['a'].weight.data
        ptq.prune_(Inputs(), net, method, 0.5)
        return net['a'].weight.tolist(), net['b'].weight.tolist()
    assert pruned('global') == ([[0] * 4] * 2, [[10, -20, 30, -40], [80, 70, -60, 50]])
    assert pruned('2:4') == ([[0, 0, 3, -4], [8, 7, 0, 0]], [[0, 0, 30, -40], [80, 70, 0, 0]])
    # |x_j| of a: 9, 1, 1, 1.41 -> 9 2 3 5.7 and 72 7 6 7.1; of b: 0 1 1 1.41
    assert pruned('wanda') == ([[1, 0, 0, -4], [8, 0, 0, 5]], [[0, 0, 30, -40], [0, 70, 0, 50]])


# ---------------------------------------------------------------------------------------------------------------------
# sensitivity and choose


def test_sensitivity(call, home, table):
    """A row for each block and kind; all blocks together are the scheme of the table."""
    out = call('sensitivity', '--group=32', '--scheme=rtn2', cwd=home).out
    rows = {(r['block'], r['kind']): r for r in rows_of(home / 'out/gpt/sensitivity.jsonl')}
    kinds = ['attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj']
    assert set(rows) == {(b, k) for b in ('blocks.0', 'blocks.1', 'all') for k in [*kinds, 'all']}
    assert rows['all', 'all']['loss'] == pytest.approx(table[1]['rtn2']['loss'], abs=1e-6)
    assert rows['all', 'all']['delta'] > max(rows[b, k]['delta'] for b in ('blocks.0', 'blocks.1') for k in kinds) > 0
    assert rows['all', 'all']['weights'] == 2 * 12 * 64 * 64 and rows['blocks.0', 'mlp.c_fc']['weights'] == 4 * 64 * 64
    assert re.search(r'block +attn\.c_attn +attn\.c_proj +mlp\.c_fc +mlp\.c_proj +all', out)
    assert (home / 'out/gpt/sensitivity.png').read_bytes().startswith(b'\x89PNG')


def test_choose_writes_a_config_that_trains(calls, call, home):
    """choose takes the block whose loss rises least; the command it prints trains a model with that block binary."""
    out = call('choose', '--group=32', '--bits=17', cwd=home).out
    chosen = runpy.run_path(str(home / 'out/gpt/chosen.py'))
    row, = rows_of(home / 'out/gpt/choose.jsonl')
    best = min(row['losses'], key=row['losses'].get)
    assert chosen['binary_blocks'] == (int(best[-1]),) and chosen['n_binary'] == 0 and chosen['qkv_proj'] == 'bin'
    words = out.strip().split('python train_gpt.py ')[1].split()
    trained, again = calls((['train_gpt.py', *words, '--max_iters=2', '--eval_interval=2', '--save_interval=2'], home, 0),
                           (['choose', '--bits=17', '--ckpt=out/chosen'], home, 2))
    assert 'packed into out/chosen' in trained.out
    model = GPT(GPTConfig(**common.read_checkpoint(str(home / 'out/chosen/last.pt'))['model_config']))
    low = [any(isinstance(m, layers.LowBit) for m in b.modules()) for b in model.blocks]
    assert low == [best == 'blocks.0', best == 'blocks.1'] and 'no full-precision model' in one_error(again)


# ---------------------------------------------------------------------------------------------------------------------
# transformers


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """A folder with a GPT-2 and a Llama of transformers, classifiers, texts, and labelled texts."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoModelForCausalLM, GPT2Config, GraniteConfig, LlamaConfig, PreTrainedTokenizerFast
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
                         'llama': LlamaConfig(**shared_heads)}.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    sentences = [' '.join(random.choice(words, 8)) for _ in range(80)]
    write_table(home / 'rows.csv', ('sentence', 'label'), [(text, i % 2) for i, text in enumerate(sentences)])
    hf.save(*hf.small([(text,) for text in sentences], ['negative', 'positive'], n_layer=2, n_head=2, n_embd=64, dropout=0.1,
                      vocab_size=300, max_len=32), str(home / 'cls'))
    GraniteConfig(**shared_heads).save_pretrained(home / 'last_token')          # has no ...ForSequenceClassification
    tokenizer.save_pretrained(home / 'last_token')
    net, own, *_ = hf.load(str(home / 'last_token'), ['negative', 'positive'], weights=False)
    hf.save(net, own, str(home / 'last_token'))
    assert isinstance(net, hf.LastTokenClassifier)
    return home


LANGUAGE, CLASSIFIERS = ('gpt2', 'llama'), ('cls', 'last_token')
# The first save finds the disk full.
FULL_ONCE = """
import safetensors.torch as s
def full(*a, plain=s.save_file, **k):
    s.save_file = plain
    raise OSError(28, 'No space left')
s.save_file = full
"""


@pytest.fixture(scope='module')
def quantized(calls, folders):
    """{last word typed: [Result]} of every model of transformers, quantized, saved as a folder and measured again, and of three
    saves to one folder."""
    half = ['--ckpt=gpt2', '--text=val.txt', '--group=32', '--schemes=rtn3', '--save=half_q']
    prepare = ['data/sst2/prepare.py', '--file', 'rows.csv', '--val_file', 'rows.csv', '--out_dir', 'data']
    commands = [(half, 2), (prepare, 0)]
    for name in (*LANGUAGE, *CLASSIFIERS):
        words = ['--text=val.txt', '--calibration=cal.txt'] if name in LANGUAGE else [f'--dataset={folders / "data"}']
        commands += [([f'--ckpt={name}', *words, *QUICK, '--schemes=rtn3,gptq2'], 0),
                     ([f'--ckpt={name}', *words, *QUICK[:2], '--schemes=gptq2', '--skip=', f'--save={name}_q'], 0),
                     ([f'--ckpt={name}_q', words[0], '--time_rounds=0'], 0)]
        if name in CLASSIFIERS:
            words += ['--methods=wanda', '--amounts=0.5', '--windows=8', '--retrain_iters=2']
            commands.append((['prune', f'--ckpt={name}', *words], 0))
    commands += [(half, 0), (half, 2)]
    done, results = calls(*((words, folders, code) for words, code in commands), patch=FULL_ONCE), {}
    for (words, _), result in zip(commands, done, strict=True):
        results.setdefault(words[-1], []).append(result)
    return results


@pytest.mark.parametrize('name', LANGUAGE)
def test_a_language_model_of_transformers(quantized, folders, name):
    """Its loss is transformers' own; quantized, saved as a folder, it comes back the same."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    rows = {r['scheme']: r for r in rows_of(folders / name / 'ptq.jsonl')}
    net, tokenizer = AutoModelForCausalLM.from_pretrained(folders / name), AutoTokenizer.from_pretrained(folders / name)
    ids = torch.tensor(tokenizer((folders / 'val.txt').read_text())['input_ids'])
    n = (len(ids) - 1) // 32
    with torch.no_grad():
        logits = net(ids[:n * 32].view(n, 32)).logits
    assert rows['fp']['loss'] == pytest.approx(F.cross_entropy(logits.flatten(0, 1), ids[1:n * 32 + 1]).item(), abs=1e-5)
    assert len({r['loss'] for r in rows.values()}) == 3
    assert f'val loss {rows_of(folders / f"{name}_q/ptq.jsonl")[0]["loss"]:.4f}\n' in quantized[f'--save={name}_q'][0].out
    assert (folders / f'{name}_q/packed.safetensors').stat().st_size < (folders / name / 'model.safetensors').stat().st_size / 4


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_a_classifier_of_transformers(quantized, folders, name):
    """Its loss and accuracy are those of a plain pass; quantized, saved as a folder, it comes back the same."""
    rows = {r['scheme']: r for r in rows_of(folders / name / 'ptq.jsonl')}
    sentences, labels, names = load(folders / 'data', 'val')
    net, tokenizer, _, fresh = hf.load(str(folders / name), names)
    with torch.no_grad():
        logits = torch.cat([net.eval()(**hf.collate(tokenizer, hf.encode(tokenizer, [t], 32), 32)).logits for t in sentences])
    labels, row = torch.tensor(labels), rows['fp']
    assert not fresh and rows['fp']['loss'] == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-5)
    assert row['accuracy'] == (logits.argmax(1) == labels).sum().item() / len(labels) and row['perplexity'] is None
    assert len({r['loss'] for r in rows.values()}) == 3
    assert f'val loss {rows_of(folders / f"{name}_q" / "ptq.jsonl")[0]["loss"]:.4f}\n' in quantized[f'--save={name}_q'][0].out
    assert [r['method'] for r in rows_of(folders / name / 'prune.jsonl')] == ['none', 'wanda']


def test_an_interrupted_save_leaves_no_half_folder(quantized, folders, start):
    """A full disk and a kill before the folder gets its name leave no folder; the next save makes it, another refuses."""
    full, _, again = quantized['--save=half_q']
    assert 'disk full' in one_error(full) and 'half_q exists' in one_error(again).replace("'", '')
    assert {'config.json', 'packed.safetensors', 'tokenizer.json'} <= set(os.listdir(folders / 'half_q'))
    patch = """import os, signal
move = os.replace
os.replace = lambda a, b: os.kill(os.getpid(), signal.SIGKILL) if str(b).endswith('killed_q') else move(a, b)"""
    done = start(str(ROOT / 'ptq.py'), '--ckpt=gpt2', '--text=val.txt', '--group=32', '--schemes=rtn3', '--save=killed_q',
                 cwd=folders, patch=patch).wait(300)
    assert done.code == -signal.SIGKILL and not (folders / 'killed_q').exists() and not list(folders.glob('half_q.tmp*'))


# ---------------------------------------------------------------------------------------------------------------------
# mistakes


MISTAKES = [
    (['--schemes=gptq5'], "'gptq5'"), (['--schemes=gptq4', '--group=48'], 'group=48 does not divide a row of 64'),
    (['--schemes=nf4', '--skip=heads'], "skip='heads'"), (['--schemes=nf4,int8', '--save=q.safetensors'], '2 schemes'),
    (['--schemes=bnb8'], 'needs bitsandbytes'), (['--ckpt=nowhere'], 'nowhere'), (['--schemes=rtn4,rtn4'], 'twice'),
    (['--block_size=64'], 'block_size=64 is more than the 32'), (['--windows=0'], '--windows=1'), (['--damp=2'], '--damp=1'),
    (['--schemes=nf4,half'], 'group has no use for nf4, half'), (['--schemes=rtn4', '--damp=0.5'], 'damp has no use for rtn4'),
    (['--text=a.txt'], 'text has no use'), (['sensitivity', '--windows=4'], 'windows has no use for bin'),
    (['compair'], "mode='compair'"), (['prune', '--methods=global', '--windows=4'], 'windows has no use without wanda'),
    (['--schemes=rtn4', '--save=out/gpt/packed.safetensors'], 'not written by ptq.py'),
    (['--schemes=rtn4', '--save=out/gpt/best.pt'], '.safetensors'),
    (['--ckpt=out/gpt/packed.safetensors', '--schemes=rtn4', '--save=out/gpt/packed.safetensors'], 'does not say'),
    (['--schemes=rtn4', '--save=q.safetensors', '--time_rounds=1'], 'time_rounds has no use'),
    (['prune', '--damp=0.1'], 'damp has no use in prune'), (['prune', '--save=q.safetensors'], 'one model, not 11'),
    (['prune', '--amounts=(0.5, 1.5)'], '0 to 1'), (['prune', '--skip='], 'lm_head'), (['--bits=3'], 'bits has no use'),
    (['sensitivity', '--scheme=gptq7'], "scheme='gptq7'"), (['choose', '--bits=32'], 'bits=32'),
    (['choose', '--bits=0.5'], 'all 2 blocks as bin'), (['choose', '--bits=17', '--scheme=nf4'], 'bin, tern, uniform16')]


def test_a_mistake_is_one_line(calls, home, folders):
    """Options that are unknown, out of range, missing or of no use for what is asked: one line that names them."""
    mistakes = [(words if 'prune' in words else ['--group=32', *words], error) for words, error in MISTAKES
                if error != 'needs bitsandbytes' or not ptq.importlib.util.find_spec('bitsandbytes')]
    missing = [(['--ckpt=gpt2'], '--text='), (['--ckpt=gpt2', '--text=val.txt', '--schemes=gptq4', '--group=32'], '--calibr'),
               (['--ckpt=gpt2', '--text=nowhere.txt'], 'nowhere.txt'), (['--ckpt=cls'], '--dataset='),
               (['--ckpt=gpt2', '--text=val.txt', '--block_size=64'], 'block_size=64 is more than the 32'),
               (['--ckpt=nobody/nothing', '--text=val.txt'], 'nobody/nothing')]
    results = calls(*((words, home, 2) for words, _ in mistakes), *((words, folders, 2) for words, _ in missing))
    for (words, error), done in zip([*mistakes, *missing], results, strict=True):
        assert error in one_error(done), words


def test_damaged_or_missing_data_is_one_line(calls, home, tiny_data, tmp_path):
    """No validation data, no data to calibrate on, other tokens, a damaged checkpoint: each is one line."""
    for name in ('train', 'val', 'other'):          # without training data, without any, with those of another tokenizer
        shutil.copytree(tiny_data, tmp_path / name)
        for file in [*(tmp_path / name).glob('train_*'), *(tmp_path / name).glob('val_*' if name != 'train' else '-')]:
            file.unlink()
    tokens.write(tmp_path / 'other', 'val', [np.arange(3000) % 260], tokens.train_bpe(['one two three'] * 9, 260))
    damaged, packed = (home / 'out/gpt/best.pt').read_bytes()[:9000], (home / 'out/gpt/packed.safetensors').read_bytes()
    for name, content in {'b.pt': damaged, 'p.safetensors': packed[:-100] + bytes(100), 'w.safetensors': packed}.items():
        (tmp_path / name).write_bytes(content)
    words = [f'--ckpt={home / "out/gpt"}', '--group=32', '--out=o']
    errors = [([*words, '--windows=8', '--schemes=gptq4', '--dataset=./train'], 'no train tokens in'),
              ([*words, '--schemes=rtn4', '--dataset=./val'], 'no tokens in'),
              ([*words, '--schemes=rtn4', '--dataset=./other'], 'other tokens'), (['--ckpt=b.pt', *QUICK], 'b.pt'),
              (['--ckpt=p.safetensors', *QUICK], 'p.safetensors is damaged'), (['--ckpt=w.safetensors', *QUICK], '--dataset=')]
    looks_at_no_inputs = [*words, '--time_rounds=0', '--schemes=rtn4', '--dataset=./train'], tmp_path, 0
    results = calls(looks_at_no_inputs, *((words, tmp_path, 2) for words, _ in errors))
    for (words, error), done in zip(errors, results[1:], strict=True):
        assert error in one_error(done), words


def test_rows_of_an_interrupted_table_stay(calls, home, start, tmp_path):
    """Ctrl-C in the middle of a table leaves the rows that are finished, and those of the run before in ptq.prev.jsonl."""
    words = [*QUICK[:1], '--time_rounds=0', f'--out={tmp_path}']
    calls(*(([*words, f'--schemes={scheme}'], home, 0) for scheme in ('rtn3', 'rtn2')))
    job = start(str(ROOT / 'ptq.py'), *words, '--schemes=rtn4,gptq4', cwd=home,
                patch='import time\nfrom pretrained import calibrate\ncalibrate.gptq = lambda *a, **k: time.sleep(600)')
    path = tmp_path / 'ptq.jsonl'
    while job.runs() and not (path.exists() and 'rtn4' in path.read_text()):
        time.sleep(0.1)
    job.signal(signal.SIGINT)
    assert job.wait(300).code in (130, -signal.SIGINT, 1)
    assert [r['scheme'] for r in rows_of(path)] == ['fp', 'rtn4']
    assert [r['scheme'] for r in rows_of(tmp_path / 'ptq.prev.jsonl')] == ['fp', 'rtn2']


# ---------------------------------------------------------------------------------------------------------------------
# other architectures


@pytest.fixture(scope='module')
def others(folders):
    """More models in the folder `folders`: their names by what ptq.py makes of them."""
    import transformers as t
    tokenizer = t.AutoTokenizer.from_pretrained(folders / 'gpt2')
    size = {'vocab_size': len(tokenizer), 'bos_token_id': 0, 'eos_token_id': 0, 'pad_token_id': 0}
    wide = {'hidden_size': 64, 'intermediate_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 2, **size}
    encoder = wide | {'max_position_embeddings': 40, 'id2label': {0: 'neg', 1: 'pos'}, 'label2id': {'neg': 0, 'pos': 1}}
    relative = encoder | {'relative_attention': True, 'pos_att_type': 'c2p|p2c'}
    of_t5 = {'d_model': 64, 'd_ff': 64, 'd_kv': 32, 'num_layers': 1, 'num_heads': 2, 'vocab_size': len(tokenizer)}
    made = {'causal': {'mixtral': t.MixtralConfig(**wide, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2),
                       'bloom': t.BloomConfig(hidden_size=64, n_layer=1, n_head=2, **size)},
            'encoder': {'deberta': t.DebertaConfig(**relative), 'albert': t.AlbertConfig(**encoder, embedding_size=32),
                        'roberta': t.RobertaConfig(**encoder), 'mpnet': t.MPNetConfig(**encoder)},
            'refused': {'masked': (t.BertForMaskedLM, t.BertConfig(**wide)), 'bare': (t.BertModel, t.BertConfig(**wide)),
                        'xlnet': (t.XLNetLMHeadModel, t.XLNetConfig(d_model=64, d_inner=64, n_layer=1, n_head=2, **size)),
                        't5': (t.T5ForConditionalGeneration, t.T5Config(**of_t5, pad_token_id=0, decoder_start_token_id=0))}}
    torch.manual_seed(0)
    for kind, configs in made.items():
        for name, config in configs.items():
            net = (config[0](config[1]) if kind == 'refused' else t.AutoModelForCausalLM.from_config(config) if kind == 'causal'
                   else t.AutoModelForSequenceClassification.from_config(config))
            net.save_pretrained(folders / name)
            tokenizer.save_pretrained(folders / name)
    rows = [(text, ('neg', 'pos')[i % 2]) for i, text in enumerate(['one two three', 'four five', 'so not or and', 'ten'] * 8)]
    write_table(folders / 'eval.csv', ('text', 'kind'), rows[:15])
    write_table(folders / 'train.csv', ('text', 'kind'), rows[15:])
    return {kind: list(configs) for kind, configs in made.items()}


TABLES = ['--text=eval.csv', '--text_columns=text', '--label_column=kind']


def test_other_architectures_come_back(calls, folders, others):
    """Quantized with head and embeddings, saved and read again, each has the same loss, whatever its code does with weights."""
    names = ['mixtral', 'deberta', 'albert', 'mpnet']
    text = lambda name: TABLES if name in others['encoder'] else ['--text=val.txt']
    calibration = lambda name: [f'--calibration={"train.csv" if name in others["encoder"] else "cal.txt"}']
    skip = lambda name: '--skip=relative_attention_bias' if name == 'mpnet' else '--skip='
    commands = [command for name in names for command in (
        ([f'--ckpt={name}', *text(name), *calibration(name), *QUICK[:2], '--schemes=gptq4', skip(name), f'--save={name}_q'],
         folders, 0), ([f'--ckpt={name}_q', *text(name), '--time_rounds=0'], folders, 0))]
    done = calls(*commands)
    for name, saved in zip(names, done[::2], strict=True):
        assert f'val loss {rows_of(folders / f"{name}_q/ptq.jsonl")[0]["loss"]:.4f}\n' in saved.out, name
    assert float(re.search(r'layers with ([\d.]+)% of the weights', done[0].out)[1]) > 99           # the experts of Mixtral too


def test_a_classifier_is_evaluated_on_a_table(calls, folders, others):
    """--text and --calibration with columns: the loss and the accuracy are those of a plain pass."""
    calls((['--ckpt=roberta', *TABLES, '--calibration=train.csv', *QUICK[:2], '--schemes=gptq4',
            '--time_rounds=0'], folders, 0))
    row = rows_of(folders / 'roberta/ptq.jsonl')[0]
    net, tokenizer, names, _ = hf.load(str(folders / 'roberta'), ['neg', 'pos'])
    sentences, labels = read_table(folders / 'eval.csv', ('text',), 'kind')
    with torch.no_grad():
        logits = torch.cat([net.eval()(**hf.collate(tokenizer, hf.encode(tokenizer, [t], 32), 32)).logits for t in sentences])
    labels = torch.tensor([names.index(label) for label in labels])
    assert row['loss'] == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-5)
    assert row['accuracy'] == (logits.argmax(1) == labels).sum().item() / len(labels)


def test_adapters_are_merged_into_their_base(calls, folders):
    """A folder of adapters as --ckpt has the loss of the base model with the same change of its weights."""
    net, tokenizer = hf.load_causal(str(folders / 'gpt2'))
    layers.convert(hf.plain_linears(net), {'*.c_attn': ('lora', dict(rank=2))}, verbose=False)
    torch.manual_seed(0)
    for m in adapters.adapters(net).values():
        m.lora_B.data.normal_(std=0.1)
    adapters.save_adapters(net, str(folders / 'adapted'), str(folders / 'gpt2'), task_type='CAUSAL_LM')
    calls((['--ckpt=adapted', '--text=val.txt', '--schemes=half', '--time_rounds=0'], folders, 0))
    ids = torch.tensor(tokenizer((folders / 'val.txt').read_text())['input_ids'])
    n = (len(ids) - 1) // 32
    with torch.no_grad():
        loss = F.cross_entropy(net.eval()(ids[:n * 32].view(n, 32)).logits.flatten(0, 1), ids[1:n * 32 + 1])
    assert rows_of(folders / 'adapted/ptq.jsonl')[0]['loss'] == pytest.approx(loss.item(), abs=1e-5)


def test_other_models_and_windows_are_refused(calls, folders, others):
    """Masked language models, encoders, encoder-decoders; windows that a model cannot read: one line, and no folder is left."""
    text = ['--text=val.txt', '--schemes=half', '--time_rounds=0']
    cases = [([f'--ckpt={name}', '--text=val.txt', '--schemes=rtn4', '--save=refused_q'], 'finetune_cls.py --model')
             for name in others['refused']]
    cases += [(['--ckpt=bloom', *text, '--block_size=-1'], 'block_size=-1'), (['--ckpt=roberta'], '--text=FILE.csv'),
              (['--ckpt=roberta', *TABLES, '--block_size=40'], 'more than the 39 of roberta'),
              (['--ckpt=roberta', *TABLES, '--schemes=gptq4', '--group=32'], '--calibration'),
              (['--ckpt=roberta', *TABLES[:2], '--schemes=half'], "no column 'label'"),
              (['--ckpt=mpnet', *TABLES, '--schemes=rtn4', '--group=32', '--skip='], 'add relative_attention_bias to --skip'),
              (['--ckpt=gpt2', *text, '--label_column=a'], 'label_column has no use')]
    for (words, error), done in zip(cases, calls(*((words, folders, 2) for words, _ in cases)), strict=True):
        assert error in one_error(done), words
    assert not (folders / 'refused_q').exists()
    calls((['--ckpt=bloom', *text], folders, 0))
    assert rows_of(folders / 'bloom/ptq.jsonl')[0]['loss'] > 1              # windows of 1,024 tokens, not of -1
