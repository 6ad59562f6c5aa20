"""export.py: codes and scales survive a GGUF file bit for bit; llama.cpp computes what the model does; refusals are a line."""
import errno
import json
import os
import re
import runpy
import signal
import struct
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch

import common
import layers
from conftest import ROOT, Result, one_error, tiny_bitnet, tiny_gpt
from engine import load
from measure.llama import Llama
from pretrained import ggufs
from readers import tokens

gguf = pytest.importorskip('gguf', reason='make peers installs gguf')
FOLDER = os.environ.get('NANOBIT_LLAMA', '')    # shared libraries of llama.cpp, see measure/llama.py
TEXT = "One day, a cat's kitten saw 12 birds.\n\n  They didn't fly: é, 漢字 and  € too!\tThe end. " * 40


@pytest.fixture(scope='module')
def tokenizers():
    """{name: Tokenizer}: bytes, a trained BPE of 300 tokens, the ranks of another one as GPT-2's are stored, and one for each
    other way to split a text that llama.cpp and ggufs.py know."""
    trained = tokens.train_bpe([TEXT], 300)
    ranked = tokens.train_bpe([TEXT], 290)
    pieces = [bytes([b]) for b in range(256)] + [ranked.decode_bytes([i]) for i in range(257, 290)]
    text = ''.join(f'{tokens.base64.b64encode(p).decode()} {i}\n' for i, p in enumerate(pieces))
    return {'byte': tokens.byte(), 'bpe': trained, 'gpt2': tokens.gpt2(text)} | {
        name: split_bpe(pattern) for pattern, name in ggufs.PRES.items()}


def split_bpe(pattern, **model):
    """A BPE of 320 tokens that splits a text by a regular expression and begins it with a token, as Llama 3's does."""
    lib = pytest.importorskip('tokenizers')
    made, parts = lib.Tokenizer(lib.models.BPE(**model)), lib.pre_tokenizers
    made.pre_tokenizer = parts.Sequence([parts.Split(lib.Regex(pattern), 'isolated'),
                                         parts.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = lib.decoders.ByteLevel()
    made.train_from_iterator([TEXT], lib.trainers.BpeTrainer(
        vocab_size=320, special_tokens=[tokens.EOT, '<|begin|>'], show_progress=False,
        initial_alphabet=sorted(parts.ByteLevel.alphabet())))
    made.post_processor = lib.processors.TemplateProcessing(single='<|begin|> $A', special_tokens=[('<|begin|>', 1)])
    return tokens.bpe(made.to_str())


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """cli('--key=value', ...) -> stdout of export.py in tmp_path, in this process; fails=True: the line on stderr."""
    def call(*options, fails=False):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, 'argv', ['export.py', *map(str, options)])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / 'export.py'), run_name='__main__')
        except SystemExit as e:
            code = e.code
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        done = Result(code, *capsys.readouterr())
        assert fails or done.code == 0, done.err
        return one_error(done) if fails else done.out
    return call


@pytest.fixture
def saved(tmp_path, tokenizers):
    """saved(model, tokenizer='bpe') writes the run out/x with best.pt and a validation split; returns the model. more: other
    keys of best.pt."""
    def write(model, tokenizer='bpe', **more):
        tokenizer = tokenizers[tokenizer]
        (tmp_path / 'x').mkdir(exist_ok=True)
        for split in tokens.SPLITS:
            tokens.write(tmp_path / 'data', split, [tokenizer.encode(TEXT)], tokenizer)
        common.save_checkpoint(tmp_path / 'x' / 'best.pt', {
            'trainer': 'train_bitnet' if hasattr(model.config, 'quant') else 'train_gpt', 'step': 1, 'best_val_loss': 1.0,
            'model_config': asdict(model.config), 'model': model.state_dict(), 'tokenizer': tokenizer.describe(),
            'config': {'dataset': str(tmp_path / 'data'), 'block_size': model.config.block_size}} | more)
        return model
    return write


def bitnet(**options):
    """A ternary model whose rows fill the blocks of TQ2_0; one block of codes is all zero."""
    model = tiny_bitnet(**dict(act='silu', n_embd=256, n_ff=512, vocab_size=320, block_size=32) | options)
    with torch.no_grad():
        model.wte.weight.mul_(3)
        for block in model.blocks:
            block.attn.o_proj.weight[1] = 0
            for m in (block.attn.qkv_proj, block.attn.o_proj, block.mlp.gate_up_proj, block.mlp.down_proj):
                m.gain.uniform_(0.5, 1.5)
    return model


def gpt(kind='fp', **options):
    model = tiny_gpt(kind, **dict(vocab_size=320, n_embd=64, block_size=32) | options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


# Texts that a split treats in a special way: contractions, digits, kinds of spaces and of letters, special tokens.
HARD = ["I'M we'Ll 'S' don'T they'RE", '12345678901 3.14 \u0661\u0662\u0663\u0664 \u2163 \u00b2',
        ' a   b\t\tc\n\n\n  d \r\n\r\n e\n ', '\u6f22\u5b57\u304b\u306a\u3002\ud55c\uad6d \u0e44\u0e17\u0e22',
        'e\u0301 \u00c5 \U0001f642 \U0001f1e9\U0001f1ea', '\u00a0\u3000 \u2028x\u2029 \x85y\u200bz', "'\u017f \u212a \ufb01",
        'a_b-c/d\\e!?...\n\n!!\n', '<|endoftext|> <|begin|>', '\x01\x7f' + ' ' * 30 + '\n' + ' ' * 5,
        'def f(x):\r\n\treturn [x]\n    ']
ABOUT = {'path': 'x', 'trainer': 'train_gpt', 'step': 1, 'val_loss': 1.0, 'task': '', 'config': {}, 'quantized': {}}


def packed_state(model):
    return {n: t.clone() for n, t in layers.pack(model).state_dict().items()}


# ---------------------------------------------------------------------------------------------------------------------
# round trips


@pytest.mark.parametrize('kind', ggufs.TERNARY)
def test_codes_and_scales_survive_each_type(kind, cli, saved, tmp_path):
    """nanobit -> GGUF -> nanobit: all ternary codes, scales and norms are equal, in every type; the embedding is that of the
    file."""
    model = saved(bitnet())
    cli('--ckpt=x', '--to=gguf', '--out=x.gguf', f'--type={kind}', '--head=F32')
    cli('--from=x.gguf', '--out=y')
    again, tokenizer, about = load.load(str(tmp_path / 'y'))
    ours, theirs = packed_state(model), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in ours.items())
    assert again.config == model.config and about['trainer'] == 'train_bitnet'
    assert tokenizer.describe() == load.load(str(tmp_path / 'x'))[1].describe()


@pytest.mark.parametrize('make, options', [(bitnet, ()), (bitnet, ('--type=TQ1_0', '--head=Q8_0')), (gpt, ('--type=Q8_0',))])
def test_a_second_file_is_equal(make, options, cli, saved, tmp_path):
    """Two exports of one model are equal byte by byte, and so is the export of what was read back."""
    saved(make())
    for name in 'ab':
        cli('--ckpt=x', '--to=gguf', f'--out=new/{name}.gguf', *options)
    cli('--from=new/a.gguf', '--out=y')
    cli('--ckpt=y', '--to=gguf', '--out=new/c.gguf', *options)
    one, two, three = ((tmp_path / f'new/{name}.gguf').read_bytes() for name in 'abc')
    assert one == two == three
    assert sorted(os.listdir(tmp_path)) == ['data', 'new', 'x', 'y'] and len(os.listdir(tmp_path / 'new')) == 3


@pytest.mark.parametrize('make', [bitnet, gpt])
def test_figures_survive(make, cli, saved, tmp_path):
    """Step, validation loss, task and the name of the data set come back, bit for bit; a path of this machine stays here."""
    for dataset, again in (('pycode', {'dataset': 'pycode'}), ('../x', {}), ('', {})):
        saved(make(), step=7, best_val_loss=1 / 3, task='tictactoe', config={'dataset': dataset})
        cli('--ckpt=x', '--to=gguf', f'--out={dataset[:2]}.gguf')
        cli(f'--from={dataset[:2]}.gguf', f'--out=y{dataset[:2]}')
        about = load.load(str(tmp_path / f'y{dataset[:2]}'))[2]
        assert [about[key] for key in ('step', 'val_loss', 'task', 'config')] == [7, 1 / 3, 'tictactoe', again]


def test_figures_that_nobody_knows_are_left_out(tmp_path, tokenizers):
    """A converted model has no step and no loss: its file has no key for them."""
    ggufs.write(gpt(), tokenizers['bpe'], ABOUT | {'step': None, 'val_loss': None}, str(tmp_path / 'x.gguf'))
    assert not [key for key in ggufs.opened(str(tmp_path / 'x.gguf'))[0] if key.startswith(('nanobit', 'general.desc'))]


def test_other_programs_are_told_what_to_type(cli, saved, tmp_path):
    """sample.py, ptq.py and the trainers do not read a GGUF file; the error is the command that converts it."""
    saved(gpt())
    cli('--ckpt=x', '--to=gguf', '--out=x.gguf')
    with pytest.raises(ValueError, match='first type: python export.py --from=.*x.gguf --out=out/x$'):
        load.load(str(tmp_path / 'x.gguf'))


@pytest.mark.parametrize('name', ['byte', 'bpe', 'gpt2', *ggufs.PRES.values()])
@pytest.mark.parametrize('padding', [0, 64])
def test_tokenizers_survive(name, padding, tokenizers, tmp_path):
    """Each tokenizer is read back as itself; rows of padding have distinct unused tokens; there is always a merge."""
    tokenizer = tokenizers[name]
    model = gpt(vocab_size=tokenizer.vocab_size + padding)
    ggufs.write(model, tokenizer, ABOUT, str(tmp_path / 'x.gguf'))
    assert ggufs.read(str(tmp_path / 'x.gguf'))[3].describe() == tokenizer.describe()
    fields, held = ggufs.opened(str(tmp_path / 'x.gguf'))
    get = lambda key: fields[f'tokenizer.ggml.{key}']
    assert len(set(get('tokens'))) == model.config.vocab_size and get('merges')
    assert get('add_bos_token') == bool(tokenizer.begin) and get('pre') == (name if name in ggufs.PRES.values() else 'gpt-2')
    assert get('token_type')[tokenizer.vocab_size:] == [ggufs.UNUSED] * padding
    assert get('eos_token_id') == tokenizer.eot and get('bos_token_id') == [*tokenizer.begin, tokenizer.eot][0]


@pytest.mark.parametrize('name', ['bpe', *ggufs.PRES.values()])
def test_a_file_without_tokenizer_json(name, tokenizers, tmp_path):
    """Tokens, merges and the name of the split are enough: the same ids, and the same token before a text."""
    ggufs.write(gpt(n_layer=1), tokenizers[name], ABOUT, str(tmp_path / 'x.gguf'))
    with pytest.MonkeyPatch.context() as patch:
        plain = ggufs.opened(str(tmp_path / 'x.gguf'))
        plain[0].pop('tokenizer.huggingface.json')
        patch.setattr(ggufs, 'opened', lambda path: plain)
        again = ggufs.read('x.gguf')[3]
    assert again.begin == tokenizers[name].begin and again.eot == tokenizers[name].eot
    assert all(again.encode(text).tolist() == tokenizers[name].encode(text).tolist() for text in HARD)


@pytest.mark.parametrize('pre, ignore', [('llama-bpe', False), ('gpt-2', True)])
def test_a_token_that_merges_do_not_make(pre, ignore, tmp_path, monkeypatch):
    """llama-bpe takes a whole token first, others merge. A tokenizer whose ids would differ is refused; else both are fine."""
    pattern = next(p for p, name in ggufs.PRES.items() if name == pre)
    made = split_bpe(pattern, ignore_merges=ignore)
    assert ggufs.vocabulary(made, 320)['pre'] == pre
    changed = json.loads(made.text)
    changed['model']['vocab']['zqj'] = 320
    with pytest.raises(ValueError, match=f"its tokenizer makes 'zqj' with.* merges, .* the other way with pre={pre}"):
        ggufs.vocabulary(tokens.bpe(json.dumps(changed)), 321)
    changed['model']['ignore_merges'] = not ignore
    made = tokens.bpe(json.dumps(changed))
    assert ggufs.vocabulary(made, 321)['tokens'][320] == 'zqj'
    ggufs.write(gpt(n_layer=1, vocab_size=321), made, ABOUT, str(tmp_path / 'x.gguf'))
    fields, held = ggufs.opened(str(tmp_path / 'x.gguf'))
    fields.pop('tokenizer.huggingface.json')
    monkeypatch.setattr(ggufs, 'opened', lambda path: (fields, held))
    assert ggufs.read('x.gguf')[3].encode('zqj').tolist() == made.encode('zqj').tolist()
    assert (made.encode('zqj').tolist() == [320]) == (pre == 'llama-bpe')


@pytest.mark.parametrize('change', [
    {'normalizer': {'type': 'NFC'}}, {'pre_tokenizer': {'type': 'Split', 'pattern': {'Regex': r'\s'}, 'behavior': 'Isolated',
                                                        'invert': False}},
    {'post_processor': {'type': 'BertProcessing', 'sep': ['a', 1], 'cls': ['a', 1]}}])
def test_another_split_is_refused(change, tokenizers):
    """A tokenizer for which llama.cpp has no name here is one line."""
    tokenizer = tokens.bpe(json.dumps(json.loads(tokenizers['bpe'].text) | change))
    with pytest.raises(ValueError, match='its tokenizer .*a GGUF file here'):
        ggufs.vocabulary(tokenizer, 320)


@pytest.mark.parametrize('kind, tolerance', [('F32', 0), ('F16', 2 ** -11), ('Q8_0', 1 / 127)])
@pytest.mark.parametrize('bias', [False, True])
def test_a_gpt_survives(kind, tolerance, bias, cli, saved, tmp_path):
    """A full-precision GPT comes back with the error of its type, as a checkpoint of the same shape; missing biases are zeros
    in the file and missing again."""
    model = saved(gpt(bias=bias))
    cli('--ckpt=x', '--to=gguf', '--out=x.gguf', f'--type={kind}', '--head=F32')
    assert ggufs.opened(str(tmp_path / 'x.gguf'))[1]['blk.1.ffn_up.bias'].data.any() == bias
    cli('--from=x.gguf', '--out=y')
    again = load.load(str(tmp_path / 'y'))[0]
    assert again.config.bias == bias and again.state_dict().keys() == model.state_dict().keys()
    for name, t in model.state_dict().items():
        most = tolerance * t.abs().max() if '_' in name.rpartition('.')[0] and t.dim() > 1 and 'lm' not in name else 0
        assert (again.state_dict()[name] - t).abs().max() <= most, name


def test_the_next_command_has_every_option(cli, saved, tmp_path):
    """--from prints the options that training on needs: data, and a shape other than the default."""
    saved(bitnet(quant='fp', n_layer=3))
    cli('--ckpt=x', '--to=gguf', '--out=x.gguf', '--type=F32')
    options = '--dataset=NAME --block_size=32 --n_layer=3 --n_ff=512 --act=silu --quant=fp'
    assert cli('--from=x.gguf', '--out=y').strip().endswith(f'python train_bitnet.py --init_from=y/best.pt {options}')


@pytest.mark.parametrize('options, says', [
    (('--verify=x.gguf', '--ckpt=z'), 'x.gguf has the arch bitnet, and z/best.pt is a model of train_gpt.py; type --ckpt='),
    (('--verify=z', '--llama=here', '--ckpt=x'), 'llama.cpp reads GGUF files, and z is a folder; leave --llama out'),
    (('--from=x', '--out=new'), 'x is a run already; use it: python sample.py --ckpt=x'),
    (('--from=x/best.pt', '--out=new'), 'x/best.pt is no GGUF file; type --from= and a GGUF file or the folder'),
    (('--from=data', '--out=new'), 'data/config.json cannot be used: No such file or directory'),
    (('--ckpt=x', '--to=hf', '--out=f', '--head=F16'), 'head has no use with --to=hf; leave --head out')])
def test_a_file_of_another_kind_is_one_line(cli, saved, tmp_path, options, says):
    """Each line says what the file is, and what to type."""
    saved(gpt())
    os.rename(tmp_path / 'x', tmp_path / 'z')
    saved(bitnet())
    cli('--ckpt=x', '--to=gguf', '--out=x.gguf')
    (tmp_path / 'x' / 'last.pt').touch()
    assert says in cli(*options, fails=True)


def test_training_goes_on_from_a_file(cli, saved, start, tmp_path):
    """train_gpt.py --init_from takes what --from writes."""
    saved(gpt())
    cli('--ckpt=x', '--to=gguf', '--out=x.gguf', '--type=F32')
    assert 'train_gpt.py --init_from=y/best.pt' in cli('--from=x.gguf', '--out=y')
    done = start(ROOT / 'train_gpt.py', '--init_from=y/best.pt', '--dataset=./data', '--out_dir=z', '--n_layer=2',
                 '--n_head=2', '--n_embd=64', '--block_size=32', '--max_iters=1', '--batch_size=2', '--eval_iters=1',
                 '--device=cpu', '--n_binary=0', cwd=tmp_path).wait()
    assert done.code == 0 and 'packed into' in done.out, done.err


@pytest.mark.parametrize('levels, exact', [('int3', True), ('int2', True), ('tern', True), ('int4', False)])
def test_integers_in_groups_fit_q4_0(levels, exact, tmp_path, tokenizers):
    """Integers of ptq.py within -8 .. 7 are Q4_0 without rounding; others, and full-precision matrices, are F16 and named."""
    model = gpt()
    rules = {'blocks.*': ('group', {'levels': levels, 'group': 32})}
    names = layers.convert(model, rules, verbose=False, packed=True)
    notes = ggufs.write(model, tokenizers['bpe'], ABOUT, str(tmp_path / 'x.gguf'), 'Q4_0', 'F32')
    held, state = ggufs.opened(str(tmp_path / 'x.gguf'))[1], ggufs.read(str(tmp_path / 'x.gguf'))[2]
    kinds = {t.tensor_type.name for n, t in held.items() if n.startswith('blk') and len(t.shape) == 2}
    assert kinds == {'Q4_0' if exact else 'F16'} and bool(notes) != exact
    for name in names:
        off = (state[f'{name}.weight'] - model.get_submodule(name).effective_weight()).abs().max()
        assert off <= (0 if exact else 2e-4), name
    if not exact:
        assert notes == [f'{names[0]} and 7 more: int4 dequantized, written as F16, because Q4_0 would round them']


def test_four_bit_layers_of_training_are_dequantized(cli, saved):
    """int4 layers of train_gpt.py have 16 even levels without a 0, which no type of ggml has: a note says F16."""
    model = saved(gpt('int4'))
    out = cli('--ckpt=x', '--to=gguf', '--out=x.gguf')
    assert 'note: blocks.0.attn.c_attn and 7 more: int4 dequantized, written as F16' in out
    assert 'note' in cli('--ckpt=x', '--verify=x.gguf', '--prompts=4') and model.blocks[0].attn.c_attn.kind == 'int4'


def test_the_graph_without_scales_gets_codes_times_scale(cli, saved, tmp_path):
    """bitnet-b1.58: no tensor is named .scale; codes and scales come back from F32; relu2 stays relu2."""
    model = saved(bitnet(act='relu2'))
    cli('--ckpt=x', '--to=gguf', '--out=x.gguf', '--arch=bitnet-b1.58', '--head=F32')
    fields, held = ggufs.opened(str(tmp_path / 'x.gguf'))
    assert fields['general.architecture'] == 'bitnet-b1.58' and not [n for n in held if n.endswith('scale')]
    cli('--from=x.gguf', '--out=y')
    again = load.load(str(tmp_path / 'y'))[0]
    assert again.config == model.config
    for name, t in packed_state(model).items():
        assert torch.equal(t, again.state_dict()[name]), name
    assert 'rounded to fp16' in cli('--ckpt=x', '--to=gguf', '--out=z.gguf', '--arch=bitnet-b1.58', '--type=F16')


def test_a_full_precision_bitnet(cli, saved, tmp_path):
    """--quant=fp is the arch bitnet without scales; it comes back as a checkpoint, even if one matrix happens to be ternary."""
    model = tiny_bitnet('fp', act='silu', vocab_size=320)
    with torch.no_grad():
        model.blocks[0].mlp.gate_up_proj.weight.sign_().div_(3)
    saved(model)
    cli('--ckpt=x', '--to=gguf', '--out=x.gguf', '--type=F32', '--head=F32')
    assert 'best.pt' in cli('--from=x.gguf', '--out=y')
    again = load.load(str(tmp_path / 'y'))[0]
    assert again.config == model.config
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# what a file computes


def test_verify_is_an_error_budget(cli, saved, tmp_path):
    """Packing and an F32 head change nothing, an F16 head a little: activations at a border of int8 codes cross it. The engine
    with its fp head is torch. All tensors are equal."""
    saved(bitnet())
    rows = {}
    for head in ('F32', 'F16'):
        cli('--ckpt=x', '--to=gguf', '--out=x.gguf', f'--head={head}')
        out = cli('--ckpt=x', '--verify=x.gguf', '--prompts=6', '--new_tokens=4', f'--json={head}.jsonl')
        assert re.search(r'(\d+) of \1 tensors are those of a new export of x/best.pt, bit for bit', out)
        rows[head] = {m[1]: (float(m[2]), float(m[3]), float(m[4])) for m in re.finditer(
            r'(?m)^(.*?->.*?) {2,}([\d.e+-]+) +[\d.]+ +([+-][\d.]+) +([\d.]+)%', out)}
    assert rows['F32']['trained -> packed'] == rows['F32']['packed -> file'] == (0, 0, 100) == rows['F16']['trained -> packed']
    assert 0 < rows['F16']['packed -> file'][0] < 0.2 and abs(rows['F16']['packed -> file'][1]) < 5e-3
    stored = [json.loads(line) for line in (tmp_path / 'F32.jsonl').read_text().splitlines()]
    assert {r['arrow']: (r['close'], r['windows'], r['new_tokens']) for r in stored}['packed -> file'] == (1, 6, 4)
    fp, int8 = (rows['F32'][f'file -> engine, {form} head'] for form in ('fp', 'int8'))
    assert fp[0] < int8[0] < 0.3 and abs(fp[1]) < 5e-4 and fp[2] > 99


def test_the_tanh_of_gelu_is_measured(cli, saved):
    """llama.cpp's GELU of GPT-2 is the tanh approximation; a row shows its difference, which is small and not zero."""
    saved(gpt())
    cli('--ckpt=x', '--to=gguf', '--out=x.gguf', '--type=F32')
    found = re.search(r'file -> GELU by tanh +([\d.e+-]+)', cli('--ckpt=x', '--verify=x.gguf', '--prompts=4'))
    assert 0 < float(found[1]) < 1e-3               # the two curves differ by 5e-4 at most


def test_a_file_of_another_model_is_named(cli, saved):
    """--verify ends with one line that names the first tensor that differs."""
    model = saved(bitnet())
    cli('--ckpt=x', '--to=gguf', '--out=x.gguf')
    with torch.no_grad():
        model.blocks[1].mlp.down_proj.weight[0, 0] *= -5
    saved(model)
    assert 'x.gguf differs from x/best.pt in blk.1.ffn_down' in cli('--ckpt=x', '--verify=x.gguf', fails=True)


@pytest.mark.parametrize('make, options', [(bitnet, ('--type=packed',)), (bitnet, ('--type=fp32',)), (gpt, ())])
def test_folders_are_verified_by_transformers(make, options, cli, saved, tmp_path):
    """A Hugging Face folder has the tensors of the model, transformers gives its loss, and --from brings it back. A few logits
    of a ternary model move: an activation crosses the border of two int8 codes."""
    pytest.importorskip('transformers')
    model = saved(make())
    cli('--ckpt=x', '--to=hf', '--out=f', *options)
    out = cli('--ckpt=x', '--verify=f', '--prompts=4', '--new_tokens=2')
    assert re.search(r'(\d+) of \1 tensors are those of a new export of x/best.pt, bit for bit', out)
    row = re.search(r'file -> transformers +([\d.e+-]+) +[\d.]+ +([+-][\d.]+)', out)
    assert float(row[1]) < (0.1 if make is bitnet else 1e-4) and abs(float(row[2])) < 5e-4, out
    cli('--from=f', '--out=y')
    again, ours = load.load(str(tmp_path / 'y'))[0].state_dict(), model.state_dict()
    ours = packed_state(model) if 'blocks.0.attn.qkv_proj.code' in again else ours
    assert all(torch.equal(t, again[n]) for n, t in ours.items())


@pytest.mark.skipif(not FOLDER, reason='NANOBIT_LLAMA names no folder with shared libraries of llama.cpp')
@pytest.mark.parametrize('make, tokenizer, options, logit, loss', [
    (bitnet, 'bpe', (), 0.2, 5e-3), (bitnet, 'byte', ('--type=TQ1_0', '--head=Q8_0'), 0.2, 5e-3),
    (bitnet, 'gpt2', ('--type=Q4_0',), 0.2, 5e-3), (bitnet, 'llama-bpe', ('--type=F16',), 0.2, 5e-3),
    (gpt, 'qwen2', ('--type=F32', '--head=F32'), 4e-3, 2e-4), (gpt, 'byte', ('--type=Q8_0',), 5e-2, 1e-3),
    (gpt, 'gpt2', (), 4e-3, 2e-4)])
def test_llama_cpp_computes_the_same(make, tokenizer, options, logit, loss, cli, saved):
    """Stock llama.cpp gives the same tokens for each prompt, and the logits and loss of the file in torch.

    F32 and F16 differ by keys and values in F16, 2 ** -11 of their size. Q8_0 rounds activations to int8 too, by 1/254 of the
    largest in a block. In a ternary model both sides round to int8 with other scales, or one side does not round, so codes
    differ by one. The errors of the 256 positions have both signs; the mean loss moves by about a 16th of such an error."""
    saved(make(), tokenizer)
    cli('--ckpt=x', '--to=gguf', '--out=x.gguf', *options)
    out = cli('--ckpt=x', '--verify=x.gguf', '--prompts=8', '--new_tokens=4', f'--llama={FOLDER}')
    row = re.search(r'-> llama.cpp +([\d.e+-]+) +([\d.]+) +([+-][\d.]+) +([\d.]+)%', out)
    assert float(row[1]) < logit and abs(float(row[3])) < loss and float(row[4]) > (90 if make is bitnet else 98), out
    assert '8 of 8 prompts have the same tokens in llama.cpp' in out


@pytest.mark.skipif(not FOLDER, reason='NANOBIT_LLAMA names no folder with shared libraries of llama.cpp')
@pytest.mark.parametrize('name', ['byte', 'bpe', 'gpt2', *ggufs.PRES.values()])
def test_llama_cpp_splits_hard_texts_alike(name, tokenizers, tmp_path):
    """Stock llama.cpp gives our ids for contractions, digits, spaces, scripts and special tokens inside a text."""
    ggufs.write(gpt(n_layer=1), tokenizers[name], ABOUT, str(tmp_path / 'x.gguf'))
    runner = Llama(FOLDER, str(tmp_path / 'x.gguf'), 1, 32)
    assert [runner.tokenize(text) for text in HARD] == [tokenizers[name].encode(text).tolist() for text in HARD]


# ---------------------------------------------------------------------------------------------------------------------
# refusals and damaged files


@pytest.mark.parametrize('make, options, says', [
    (lambda: bitnet(act='relu2'), (), 'act=relu2: the arch bitnet of llama.cpp computes SiLU only; type --arch=bitnet-b1.58'),
    (bitnet, ('--arch=bitnet-b1.58',), 'act=silu: the arch bitnet-b1.58 computes the square of ReLU'),
    (bitnet, ('--arch=llama',), "arch='llama' is none of bitnet, bitnet-b1.58"),
    (bitnet, ('--type=Q8_0',), "type='Q8_0' is none of TQ2_0, TQ1_0, Q4_0, F16, F32"),
    (bitnet, ('--head=TQ2_0',), "head='TQ2_0' is none of F16, F32, Q8_0"),
    (lambda: tiny_bitnet(act='silu', vocab_size=320), (),
     'blk.0.attn_q.weight has rows of 32 weights, TQ2_0 needs a multiple of 256; type --type=Q4_0, which holds codes exactly'),
    (lambda: tiny_bitnet(act='silu', vocab_size=320, n_embd=48), (), 'multiple of 256; type --type=F16'),
    (lambda: gpt('bin'), (), 'blocks.0.attn.c_attn is binary and normalizes its output, which no arch of llama.cpp computes'),
    (lambda: gpt('tern'), (), 'blocks.0.attn.c_attn is ternary and contains an RMSNorm'),
    (lambda: gpt(n_embd=48), ('--type=Q8_0',), 'rows of 48 weights, Q8_0 needs a multiple of 32; type --type=F16'),
    (gpt, ('--type=TQ2_0',), "type='TQ2_0' is none of F16, F32, Q8_0, Q4_0"),
    (lambda: gpt(vocab_size=256), (), '256 rows of the embedding')])
def test_a_model_that_does_not_fit(make, options, says, cli, saved, tmp_path):
    """What llama.cpp cannot compute or hold is one line with the reason and what would fit; no file is left."""
    saved(make())
    assert says in cli('--ckpt=x', '--to=gguf', '--out=x.gguf', *options, fails=True)
    assert not (tmp_path / 'x.gguf').exists()


@pytest.mark.parametrize('options, says', [
    ((), 'type one of --to=gguf'), (('--to=gguf', '--from=a', '--out=b'), 'type one of --to=gguf'),
    (('--to=onnx', '--out=b'), "to='onnx' is none of gguf, hf"), (('--to=gguf',), '--out is missing'),
    (('--to=gguf', '--out=b'), "out='b' is no file that ends in .gguf"), (('--from=no.gguf', '--out=b'), 'no.gguf'),
    (('--from=no.gguf', '--out=x'), 'x exists'), (('--from=no.gguf', '--out=b', '--type=F16'), 'type has no use with --from'),
    (('--verify=no.gguf', '--ckpt=x'), 'no.gguf does not exist'), (('--verify=x', '--prompts=0'), 'prompts=0 is too low'),
    (('--to=hf', '--out=b', '--head=F16'), 'head has no use'),
    (('--to=gguf', '--out=b.gguf', '--ckpt=no'), 'no does not exist')])
def test_a_wrong_command_is_one_line(options, says, cli, saved):
    saved(bitnet())
    assert says in cli(*options, fails=True)


def test_damaged_files(cli, saved, tmp_path):
    """A truncated file, wrong lengths, a name twice, a path as a name, dims that overflow: one line each, and nothing is
    written."""
    saved(gpt())
    cli('--ckpt=x', '--to=gguf', '--out=x.gguf')
    whole, name = (tmp_path / 'x.gguf').read_bytes(), b'blk.0.attn_qkv.weight'
    at = whole.index(name) + len(name) + 4          # of the dims
    put = lambda i, raw: whole[:i] + raw + whole[i + len(raw):]
    count = whole.index(b'tokenizer.ggml.tokens') + len('tokenizer.ggml.tokens') + 8
    bad = {'name twice': whole.replace(name, b'blk.1.attn_qkv.weight', 1),
           'path': whole.replace(name, b'../../../../../x.wght', 1),
           'dims overflow': put(at, struct.pack('<QQ', 2 ** 63, 2)),
           'dims wrap to 0': put(at, struct.pack('<QQ', 2 ** 32, 2 ** 32)),
           'dims swapped': put(at, struct.pack('<QQ', 192, 64)), 'zero rows': put(at, struct.pack('<QQ', 64, 0)),
           'many tokens': put(count, struct.pack('<Q', 2 ** 60)), 'many tensors': put(8, struct.pack('<Q', 2 ** 60)),
           'many keys': put(16, struct.pack('<Q', 2 ** 60)), 'offset': put(at + 20, struct.pack('<Q', 2 ** 62)),
           'type': put(at + 16, struct.pack('<I', 36)), 'magic': put(0, b'GGML'), 'version': put(4, struct.pack('<I', 99)),
           'no place': whole.replace(name, name[:-1] + b'q', 1), 'overlap': put(at + 20, struct.pack('<Q', 0)),
           'no UTF-8': whole.replace(b'general.name', b'general.nam\xff', 1), 'empty': b'',
           'big endian': whole[:4] + whole[4:8][::-1] + whole[8:]}
    bad |= {f'cut at {n}': whole[:n] for n in (1, 7, 20, 100, at, len(whole) // 2, len(whole) - 1)}
    for what, raw in bad.items():
        (tmp_path / 'bad.gguf').write_bytes(raw)
        assert 'bad.gguf' in cli('--from=bad.gguf', '--out=y', fails=True), what
    assert sorted(os.listdir(tmp_path)) == ['bad.gguf', 'data', 'x', 'x.gguf']


@pytest.mark.parametrize('scaling, fits', [({'type': 'linear', 'factor': 1.0}, True), ({'type': 'none'}, True),
                                           ({'type': 'linear', 'factor': 2.0}, False), ({'type': 'yarn'}, False)])
def test_scaled_positions(scaling, fits, tmp_path, tokenizers, monkeypatch):
    """llama.cpp's own converter writes a linear scaling by 1, which changes nothing; another one is refused."""
    ggufs.write(bitnet(n_layer=1), tokenizers['bpe'], ABOUT | {'trainer': 'train_bitnet'}, str(tmp_path / 'x.gguf'))
    fields, held = ggufs.opened(str(tmp_path / 'x.gguf'))
    fields |= {f'bitnet.rope.scaling.{key}': value for key, value in scaling.items()}
    monkeypatch.setattr(ggufs, 'opened', lambda path: (fields, held))
    if fits:
        assert ggufs.read('x.gguf')[1]['n_layer'] == 1
    else:
        with pytest.raises(ValueError, match='rotary positions'):
            ggufs.read('x.gguf')


def listed(kind, count, raw):
    """A key with a list, as bytes."""
    return struct.pack('<Q', 1) + b'a' + struct.pack('<IIQ', 9, kind, count) + raw


@pytest.mark.parametrize('keys, count', [
    (listed(8, 1 << 20, bytes(8 << 20)), 1), (listed(0, 1 << 20, bytes(1 << 20)), 1),
    (listed(9, 1, struct.pack('<IQ', 0, 0)), 1),
    (b''.join(struct.pack('<Q5sII', 5, f'{i:05}'.encode(), 4, 1) for i in range(30_000)), 30_000)])
def test_lists_that_would_fill_the_memory(keys, count, tmp_path, tokenizers):
    """A million strings or numbers, lists of lists and thousands of keys are one line, before an object is made of each."""
    path = tmp_path / 'x.gguf'
    ggufs.write(gpt(n_layer=1), tokenizers['bpe'], ABOUT, str(path))
    whole = path.read_bytes()
    path.write_bytes(whole[:16] + struct.pack('<Q', struct.unpack_from('<Q', whole, 16)[0] + count) + keys + whole[24:])
    with pytest.raises(ValueError, match='too long|keys'):
        ggufs.read(str(path))


def cut_short(number):
    """A function that gets a full disk or a signal in place of writing."""
    def write(*args, **options):
        if number == errno.ENOSPC:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.kill(os.getpid(), number)
    return write


@pytest.mark.parametrize('number, says', [(errno.ENOSPC, 'disk full'), (signal.SIGTERM, 'interrupted')])
def test_an_interrupted_write(number, says, cli, saved, tmp_path, monkeypatch):
    """The old file survives a full disk and SIGTERM, a new folder is absent, and nothing else is left."""
    saved(gpt())
    cli('--ckpt=x', '--to=gguf', '--out=x.gguf')
    whole = (tmp_path / 'x.gguf').read_bytes()
    saved(gpt(n_layer=1))
    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, 'write_tensors_to_file', cut_short(number))
        patch.setattr(torch, 'save', cut_short(number))
        assert says in cli('--ckpt=x', '--to=gguf', '--out=x.gguf', fails=True)
        assert says in cli('--from=x.gguf', '--out=y', fails=True)
    assert (tmp_path / 'x.gguf').read_bytes() == whole and sorted(os.listdir(tmp_path)) == ['data', 'x', 'x.gguf']
    (tmp_path / 'y').mkdir()
    (tmp_path / 'y' / 'best.pt.tmp99').write_bytes(b'')                 # of a process that was killed
    cli('--from=x.gguf', '--out=y')
    assert os.listdir(tmp_path / 'y') == ['best.pt']


def test_a_tokenizer_that_disagrees(tmp_path, tokenizers):
    """The library tokenizers panics on some files. tokenizer.json must be the lists of tokens, so it does not come to that."""
    about = json.loads(tokenizers['bpe'].text)
    bad = {'prefix': {'model': about['model'] | {'continuing_subword_prefix': '##'}},
           'id': {'model': about['model'] | {'vocab': about['model']['vocab'] | {'zz': 1 << 31}}},
           'template': {'post_processor': {'type': 'TemplateProcessing', 'pair': [], 'special_tokens': {},
                                           'single': [{'SpecialToken': {'id': 'q', 'type_id': 0}}]}}}
    ggufs.write(gpt(n_layer=1), tokenizers['bpe'], ABOUT, str(tmp_path / 'x.gguf'))
    plain, held = ggufs.opened(str(tmp_path / 'x.gguf'))
    for what, change in bad.items():
        with pytest.MonkeyPatch.context() as patch:
            text = json.dumps(about | change)
            patch.setattr(ggufs, 'opened', lambda path, text=text: (plain | {'tokenizer.huggingface.json': text}, held))
            with pytest.raises(ValueError, match='its tokenizer'):
                ggufs.read(what)


def test_flipped_bits_never_crash(tmp_path, tokenizers):
    """A header with any byte changed is read or refused by a ValueError of one line."""
    path = str(tmp_path / 'x.gguf')
    ggufs.write(gpt(n_layer=1), tokenizers['bpe'], ABOUT, path)
    whole, random = bytearray(open(path, 'rb').read()), np.random.default_rng(0)
    end, refused = whole.index(b'output_norm.bias') + 200, 0
    for at in random.integers(0, end, 25):
        raw = bytearray(whole)
        raw[at] ^= 1 << random.integers(8)
        (tmp_path / 'bad.gguf').write_bytes(raw)
        try:
            ggufs.read(str(tmp_path / 'bad.gguf'))
        except ValueError as e:
            refused += 1
            assert '\n' not in str(e) and 'bad.gguf' in str(e)
    assert refused > 2


@pytest.mark.parametrize('changes, says', [
    ({'general.architecture': 'llama'}, "its arch is 'llama'"), ({'tokenizer.ggml.pre': 'bert'}, "pre='bert'"),
    ({'bitnet.attention.head_count': 3}, 'heads'), ({'bitnet.block_count': 7}, 'it lacks blk.2.attn_norm.weight'),
    ({'bitnet.context_length': 2 ** 31}, 'context_length is no possible value'),
    ({'bitnet.rope.dimension_count': 32}, 'rotary positions'), ({'nanobit.step': 1 << 60}, 'nanobit.step'),
    ({'bitnet.context_length': 1 << 20}, 'context_length is no possible value'),     # its rotary table would have 2 GB
    ({'bitnet.feed_forward_length': 256}, 'blk.0.ffn_gate.weight has')])
def test_files_of_other_models(changes, says, tmp_path, tokenizers):
    """A file that does not fit the trainers names what does not fit."""
    path = tmp_path / 'x.gguf'
    plain = gguf.GGUFWriter.add_key_value
    put = lambda self, key, value, *rest: plain(self, key, changes.get(key, value), *rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, 'add_key_value', put)
        ggufs.write(bitnet(), tokenizers['bpe'], ABOUT | {'trainer': 'train_bitnet'}, str(path))
    with pytest.raises(ValueError, match=re.escape(says)):
        ggufs.read(str(path))
