"""pretrained/folders.py: transformers computes the same from our folders, and all bits come back; one line for bad files."""
import json
import os
import resource
import shutil
import signal
import struct
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

import common
import layers
from conftest import all_logits, random_ids, tiny_bitnet, tiny_gpt
from engine import load
from pretrained import folders, hf
from quant import quantize_rows
from readers import tokens
from train_gpt import GPT, GPTConfig

TEXTS = ['', ' ', '\n\n \t', 'plain text', "it's  we'll don't", 'naïve café Ā', '日本語のテキスト', '🎉👩\u200d👧 e\u0301',
         '<|endoftext|>', 'a<|endoftext|>b', '\u202e rtl \u00ad \ufeff', 'xy' * 700, 'tab\tcr\r\nlf  123 4567 ...!?',
         'the cat sat on the mat, and the dog sat on the log.']
NONE = {'step': None, 'trainer': 'train_bitnet', 'task': '', 'config': {}, 'val_loss': None, 'quantized': {}, 'path': 'x'}
FORMS = ('fp32', 'packed', 'bitlinear')


@pytest.fixture(scope='module')
def bpe():
    return tokens.train_bpe(TEXTS * 3, 310)


@pytest.fixture(scope='module')
def gpt2(bpe):
    """A small tokenizer of GPT-2's kind: the bytes and the merges of a trained one, with end-of-text as the last id."""
    import base64
    order = [bytes([b]) for b in range(256)] + [bpe.decode_bytes([i]) for i in range(257, 310)]
    return tokens.gpt2(''.join(f'{base64.b64encode(t).decode()} {i}\n' for i, t in enumerate(order)))


def bitnet(quant='tern', **more):
    """A BitNet with random gains whose attention and logits differ between tokens."""
    model = tiny_bitnet(quant, **dict(vocab_size=320, block_size=24) | more)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.rand_like(p) + 0.5) if name.endswith(('gain', 'norm.weight')) else p.mul_(3 if 'wte' in name else 1)
    return model


def gpt(**more):
    """A full-precision GPT with random biases."""
    model = tiny_gpt('fp', (), **dict(vocab_size=320, block_size=24, bias=True) | more)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def written(model, out, form, tokenizer=None, **about):
    folders.write(model, tokenizer or tokens.byte(), NONE | about, str(out), form)
    return str(out)


def read_model(folder):
    """The model that read() gives, packed or not."""
    trainer, config, tensors, *_ = folders.read(folder)
    make, shape = load.MODELS[trainer]
    model = make(shape(**config)).eval()
    if any(name.endswith('.code') for name in tensors):
        return common.load_packed(model, tensors)
    common.load_model_state(model, tensors, folder, ('lm_head.weight',))
    return model


def same_ternary(one, two):
    """Share of the codes that are equal, and whether all scales are."""
    pairs = [(a.ternary(), b.ternary()) for a, b in zip(one.modules(), two.modules(), strict=True)
             if isinstance(a, layers.TernaryLinear)]
    codes = torch.cat([(a[0] == b[0]).flatten() for a, b in pairs])
    assert len(codes) > 1000
    return codes.float().mean().item(), all(torch.equal(a[1], b[1]) for a, b in pairs)


def files(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


# ---------------------------------------------------------------------------------------------------------------------
# the same function


def assert_alike(model, folder, ids):
    """transformers computes what the model does, up to the first int8 code of a sequence that differs.

    Sums in another order move an activation by less than 1e-5 of its row's largest. So a code differs by 1, and only where the
    border of two codes lies between both activations. It changes that position and later ones. All others, which are most,
    have the same codes in all layers, and the same logits."""
    ours, theirs, net = [], [], folders.model_of(folder)
    for name, module in net.named_modules():
        if name.endswith(('q_proj', 'o_proj', 'gate_proj', 'down_proj')):
            module.register_forward_pre_hook(lambda module, args: theirs.append(args[0].clone()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, 'quantize_rows',
                      lambda a, top: ours.append(a.view(*ids.shape, -1).clone()) or quantize_rows(a, top=top))
        logits = all_logits(model, ids)
    with torch.no_grad(), torch.compiler.set_stance('force_eager'):
        wanted = net(ids).logits
    same = torch.ones(ids.shape, dtype=torch.bool)
    assert len(ours) == 4 * model.config.n_layer
    for a, b in zip(ours, theirs, strict=True):
        off = quantize_rows(a)[0].int() - quantize_rows(b)[0].int()
        assert ((a - b).abs() / b.abs().amax(-1, keepdim=True))[same].max() < 1e-5 and off[same].abs().max() <= 1
        same &= ((off != 0).any(-1).cumsum(1) == 0)
    assert same.float().mean() > 0.75
    assert (logits - wanted)[same].abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize('act, kv', [('relu2', 2), ('silu', 1)])
@pytest.mark.parametrize('form', FORMS)
def test_transformers_computes_our_bitnet(tmp_path, form, act, kv):
    """From latent weights and from both packed forms, with a tied head and grouped keys. The model that read() gives has the
    same logits, bit for bit."""
    model, ids = bitnet(act=act, n_kv_head=kv), random_ids(16, 20)
    assert_alike(model, written(model, tmp_path / 'x', form), ids)
    assert torch.equal(all_logits(read_model(tmp_path / 'x'), ids), all_logits(model, ids))


def test_the_baseline_is_a_bitnet_without_rounding(tmp_path):
    """--quant=fp becomes a BitNetForCausalLM without quantization, with the same logits and weights."""
    model, ids = bitnet('fp'), random_ids(4, 20)
    theirs = folders.runs(written(model, tmp_path / 'x', 'fp32'))(ids)
    assert (all_logits(model, ids) - theirs).abs().max() < 1e-4 * theirs.std()
    back = read_model(tmp_path / 'x').state_dict()
    assert all(torch.equal(t, back[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize('bias', [True, False])
def test_gpt2lmheadmodel_computes_our_gpt(tmp_path, bias):
    """Full-precision models of train_gpt.py: the exact GELU, transposed matrices, zeros for missing biases. All weights come
    back bit for bit, and a model without biases has none again."""
    model, ids = gpt(bias=bias, dropout=0.1), random_ids(4, 20)
    folder = written(model, tmp_path / 'x', 'fp32', trainer='train_gpt')
    theirs = folders.runs(folder)(ids)
    assert (all_logits(model, ids) - theirs).abs().max() < 1e-4 * theirs.std()
    trainer, config, tensors, *_ = folders.read(folder)
    assert (trainer, GPTConfig(**config)) == ('train_gpt', GPTConfig(**asdict(model.config) | dict.fromkeys(
        ('qkv_proj', 'c_proj', 'mlp_proj'), 'fp')))
    assert tensors.keys() == model.state_dict().keys()
    assert all(torch.equal(t, tensors[name]) for name, t in model.state_dict().items())


def test_packed_folders_load_with_from_pretrained(tmp_path):
    """from_pretrained() gives the logits of runs(); it needs the package accelerate."""
    pytest.importorskip('accelerate')
    import transformers as t
    ids = random_ids(2, 20)
    for form in FORMS:
        folder = written(bitnet(), tmp_path / form, form)
        with torch.no_grad(), torch.compiler.set_stance('force_eager'):
            got = t.AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        assert torch.equal(got, folders.runs(folder)(ids)), form


def test_1bitllm_models_fit(tmp_path):
    """A LLaMA with 1bitLLM's names of the inner norms is a BitNet with SiLU; a LLaMA without them is refused by name."""
    model = bitnet(act='silu', n_kv_head=4, rope_theta=10_000.0)
    folder = tmp_path / 'x'
    written(model, folder, 'fp32')
    about = json.loads((folder / 'config.json').read_text())
    for key in ('quantization_config', 'hidden_act', 'rope_theta', 'rope_parameters'):
        del about[key]
    llama = about | {'model_type': 'llama', 'architectures': ['BitnetForCausalLM'], 'weight_bits': 1, 'input_bits': 8,
                     'rope_scaling': None}
    (folder / 'config.json').write_text(json.dumps(llama))
    state = {name.replace('attn_sub_norm', 'inner_attn_ln').replace('ffn_sub_norm', 'ffn_layernorm'): t
             for name, t in load_file(folder / 'model.safetensors').items()}
    assert 'model.layers.1.mlp.ffn_layernorm.weight' in state
    save_file(state, folder / 'model.safetensors')
    back = read_model(str(folder))
    assert same_ternary(model, back) == (1, True) and back.config == model.config
    assert torch.equal(all_logits(back, random_ids(2, 20)), all_logits(model, random_ids(2, 20)))
    for more, words in (({'weight_bits': 2}, 'weight_bits=2'), ({'input_bits': None}, 'input_bits=None'),
                        ({'rope_scaling': {'type': 'linear', 'factor': 2.0}}, "rope_type='linear'"),
                        ({'attention_bias': True}, 'attention_bias=True'), ({'hidden_act': 'gelu'}, "hidden_act='gelu'")):
        (folder / 'config.json').write_text(json.dumps(llama | more))
        assert words in said(folder)
    plain = {'model_type': 'llama', 'architectures': ['LlamaForCausalLM'], 'quantization_config': dict(hf.ONLINE)}
    (folder / 'config.json').write_text(json.dumps(about | plain))
    assert 'LlamaForCausalLM has no RMSNorm of its own before o_proj' in said(folder)
    (folder / 'config.json').write_text(json.dumps(llama))
    (folder / 'tokenizer.json').unlink()            # SentencePiece
    assert 'tokenizer.json cannot be used (No such file or directory)' in said(folder)


# ---------------------------------------------------------------------------------------------------------------------
# the same bits


@pytest.mark.parametrize('form', FORMS)
def test_codes_and_scales_come_back(tmp_path, form):
    """All of them, from latent weights and from a packed file. fp32 gives back the latent weights."""
    model = bitnet(n_layer=8)
    again = written(model, tmp_path / 'latent', form)
    back = read_model(again)
    assert same_ternary(model, back) == (1, True)
    if form == 'fp32':
        assert all(torch.equal(t, back.state_dict()[name]) for name, t in model.state_dict().items())
        return
    common.save_packed(model, tmp_path / 'x.safetensors', {
        'trainer': 'train_bitnet', 'step': 1, 'model_config': asdict(model.config), 'tokenizer': tokens.byte().describe()})
    packed, tokenizer, _ = load.load(str(tmp_path / 'x.safetensors'))
    assert files(tmp_path / 'latent') == files(tmp_path / written(packed, tmp_path / 'y' / 'latent', form, tokenizer))
    own = common._parameters_once(packed)
    assert all(torch.equal(t, own[name]) for name, t in folders.read(again)[2].items())


def test_a_scale_survives_its_inverse(tmp_path):
    """bitlinear stores 1 / scale. Where its inverse is another float32, the config holds the scale; a wrong one is ignored."""
    model = bitnet(n_layer=8)
    folder = tmp_path / 'x'
    written(model, folder, 'bitlinear')
    state = load_file(folder / 'model.safetensors')
    inverse = {name.removesuffix('.weight_scale'): (1 / t).item() for name, t in state.items() if name.endswith('_scale')}
    about = json.loads((folder / 'config.json').read_text())
    exact = about['quantization_config']['scales']
    assert exact.keys() == inverse.keys() and exact != inverse
    about['quantization_config']['scales'] = {name: scale * 2 for name, scale in exact.items()}
    (folder / 'config.json').write_text(json.dumps(about))
    found = torch.cat([m.weight_scale for m in read_model(folder).modules() if isinstance(m, layers.TernaryLinear)])
    assert sorted(found.tolist()) == sorted(inverse.values())


def test_bf16_keeps_all_codes(tmp_path):
    """Latent weights next to the border of two codes are rounded to the side of their code; scales change by less than 1e-3."""
    model = bitnet(n_embd=128, n_ff=256)
    back = read_model(written(model, tmp_path / 'x', 'bf16'))
    plain = [(w.bfloat16(), w) for m in model.modules() if isinstance(m, layers.TernaryLinear) for w in m.weight.split(m.rows)]
    assert any((hf.ternarize(low)[0] != hf.ternarize(w)[0]).any() for low, w in plain)
    assert same_ternary(model, back)[0] == 1
    for a, b in zip(model.modules(), back.modules(), strict=True):
        if isinstance(a, layers.TernaryLinear):
            torch.testing.assert_close(a.ternary()[1], b.ternary()[1], rtol=1e-3, atol=0)
            assert ((a.weight - b.weight).abs() <= a.weight.abs() * 2 ** -7).all()
    state = load_file(tmp_path / 'x' / 'model.safetensors')
    assert {t.dtype for t in state.values()} == {torch.bfloat16}


@pytest.mark.parametrize('form', folders.FORMS)
def test_two_writes_give_equal_files(tmp_path, bpe, form):
    """And nothing but the folder is there afterwards."""
    for place in 'ab':
        (tmp_path / place).mkdir()
        written(bitnet(), tmp_path / place / 'x', form, bpe)
    assert files(tmp_path / 'a' / 'x') == files(tmp_path / 'b' / 'x')
    assert os.listdir(tmp_path / 'a') == ['x']
    assert set(os.listdir(tmp_path / 'a' / 'x')) == {
        'config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json', 'README.md'}


def test_padded_rows_have_the_mean_logit(tmp_path, bpe):
    """pad_rows() makes the vocabulary of a trainer from one that is no multiple of 64. The other logits stay."""
    model, ids = bitnet(vocab_size=310), random_ids(2, 20)
    shape, tensors = folders.read(written(model, tmp_path / 'x', 'packed', bpe))[1:3]
    tensors['wte.weight'] = folders.pad_rows(tensors['wte.weight'], 320)
    back = common.load_packed(bitnet(**shape | {'vocab_size': 320}), tensors)
    ours, more = all_logits(model, ids), all_logits(back, ids)
    torch.testing.assert_close(more[..., :310], ours, rtol=0, atol=1e-5)
    torch.testing.assert_close(more[..., 310:], ours.mean(-1, keepdim=True).expand(-1, -1, 10), rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# tokenizers, generation, card


@pytest.mark.parametrize('name', ['byte', 'bpe', 'gpt2'])
def test_autotokenizer_gives_our_ids(tmp_path, request, name):
    """On texts with spaces, other scripts, emoji and the words of special tokens, and back to the same text. read() returns
    the tokenizer itself, so a run can go on."""
    import transformers as t
    ours = tokens.byte() if name == 'byte' else request.getfixturevalue(name)
    for kind, model in (('train_bitnet', bitnet()), ('train_gpt', gpt())):
        folder = written(model, tmp_path / kind, 'fp32', ours, trainer=kind)
        theirs = t.AutoTokenizer.from_pretrained(folder)
        for text in TEXTS:
            ids = ours.encode(text).tolist()
            assert theirs(text)['input_ids'] == ids and theirs.decode(ids) == text, text
        back = folders.read(folder)[3]
        assert back.describe() == ours.describe() and back.digest == ours.digest
        theirs.save_pretrained(tmp_path / 'again')
        shutil.copy(tmp_path / 'again' / 'tokenizer.json', folder)
        assert folders.read(folder)[3].encode_batch(TEXTS[1:4])[2].tolist() == ours.encode(TEXTS[3]).tolist()


def test_a_gpt2_tokenizer_as_published_is_recognized(gpt2):
    """Files of the Hub write merges as one string and leave out use_regex."""
    text = json.loads(tokens.as_json(gpt2))
    text['model']['merges'] = [' '.join(pair) for pair in text['model']['merges']]
    del text['pre_tokenizer']['use_regex']
    assert tokens._ours(json.dumps(text), gpt2.eot).digest == gpt2.digest
    text['model']['merges'] = text['model']['merges'][::-1]
    assert tokens._ours(json.dumps(text), gpt2.eot) is None


def test_published_gpt2_merges_are_recovered(tmp_path):
    """The merges of the published GPT-2 come from its ranks."""
    from test_tokens import SHARED
    if not (SHARED / 'gpt2_bpe' / 'vocab.bpe').is_file():
        pytest.skip('needs GPT-2\'s vocab.bpe and encoder.json')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, 'GPT2_BPE', SHARED / 'gpt2_bpe')
        made = json.loads(tokens.as_json(tokens.gpt2()))['model']
    lines = (SHARED / 'gpt2_bpe' / 'vocab.bpe').read_text(encoding='utf-8').split('\n')[1:-1]
    assert [' '.join(pair) for pair in made['merges']] == lines
    assert made['vocab'] == json.loads((SHARED / 'gpt2_bpe' / 'encoder.json').read_text(encoding='utf-8'))


def test_generate_draws_no_padding_and_ends(tmp_path, bpe):
    """generation_config.json suppresses the rows without a token. Without a prompt a document starts behind its end token, and
    behind a line end if the run has a task."""
    import transformers as t
    model = gpt()
    with torch.no_grad():
        model.wte.weight[310:] *= 100               # by far the highest and lowest logits
    folder = written(model, tmp_path / 'x', 'fp32', bpe, trainer='train_gpt')
    net, config = t.GPT2LMHeadModel.from_pretrained(folder), t.GenerationConfig.from_pretrained(folder)
    assert net(torch.tensor([[5]])).logits.argmax() >= 310
    ids = net.generate(torch.arange(16)[:, None], do_sample=False, max_new_tokens=4, pad_token_id=0)
    assert ids.shape == (16, 5) and ids.max() < 310
    assert (config.bos_token_id, config.eos_token_id) == (bpe.eot, bpe.eot)
    written(bitnet(), tmp_path / 'y', 'packed', task='arithmetic')
    about = json.loads((tmp_path / 'y' / 'config.json').read_text())
    assert (about['bos_token_id'], about['eos_token_id'], about['vocab_size']) == (10, 0, 320)


def test_the_card_has_the_figures_of_the_run(tmp_path):
    """Steps, tokens, loss and bits from the log and the checkpoint; parameters and bytes of the files; no path. The data set of
    a packed file comes from config.py of its run. The loss of last.pt is that of its own step or none."""
    for record in ({'step': 5, 'tokens': 320, 'val_loss': 4.0, 'val_bpb': 5.5},
                   {'step': 9, 'tokens': 1640, 'val_loss': 3.25, 'val_bpb': 4.6875}, {'step': 9, 'loss': 1.0}):
        common.append_log(tmp_path, record)
    (tmp_path / 'config.py').write_text("seed = 1\ndataset = '/data/wikitext2/'\n")
    about = {'step': 9, 'val_loss': 3.25, 'path': str(tmp_path / 'best.pt'), 'config': {'dataset': 'wikitext2'}}
    model, card = bitnet(), tmp_path / 'x' / 'README.md'

    def table(form, **more):
        written(model, tmp_path / 'x', form, **about | more)
        lines = [line for line in card.read_text().split('\n') if line.startswith('| ') and len(line) > 6]
        return dict(line[2:-2].split(' | ') for line in lines)

    for step, loss in ((9, '3.2500'), (7, None)):
        assert table('fp32', path=str(tmp_path / 'last.pt'), step=step).get('validation loss, nats per token') == loss
        shutil.rmtree(tmp_path / 'x')
    assert not {'trainer', 'data set', 'training steps'} & table('fp32', step=None, val_loss=None, config={}).keys()
    shutil.rmtree(tmp_path / 'x')
    for form, found, more in (('fp32', 'fp32 master weights', {}), ('packed', 'packed codes', {'config': {}})):
        rows = table(form, **more)
        n, size = sum(p.numel() for p in model.parameters()), sum(t.nbytes for t in load_file(
            tmp_path / 'x' / 'model.safetensors').values())
        assert (rows['training steps'], rows['training tokens']) == ('9', '1,640') and found in card.read_text()
        assert (rows['validation loss, nats per token'], rows['bits per byte of text']) == ('3.2500', '4.6875')
        assert (rows['parameters'], rows['bytes of the weights']) == (f'{n:,}', f'{size:,}') and rows['data set'] == 'wikitext2'
        assert rows['of them ternary'] == f'{2 * (32 * 64 + 32 * 32 + 3 * 32 * 64):,}'
        assert rows['bits per parameter'] == f'{8 * size / n:.2f}' and str(tmp_path) not in card.read_text()
        shutil.rmtree(tmp_path / 'x')


# ---------------------------------------------------------------------------------------------------------------------
# mistakes


def said(path):
    """The one line of the ValueError of a folder that cannot be read."""
    with pytest.raises(ValueError) as error:
        folders.read(str(path))
    assert '\n' not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


def test_what_does_not_fit_is_refused(tmp_path):
    """One line that names the layer or form and what to type; no file is written."""
    packed, tern = layers.pack(bitnet()), tiny_gpt('tern', (1,), vocab_size=320)
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'a').touch()
    (tmp_path / 'link').symlink_to(tmp_path / 'none')
    cases = [(packed, 'fp32', {}, 'blocks.0.attn.qkv_proj has codes and no latent weights, which fp32 needs; type'),
             (bitnet('fp'), 'packed', {}, 'full-precision matrices, and packed holds ternary ones; type --type=fp32'),
             (bitnet(), 'int4', {}, "type='int4' is none of fp32, bf16, packed, bitlinear"),
             (bitnet(n_ff=66), 'packed', {}, 'model.layers.0.mlp.gate_proj: 66 rows are no multiple of 4; type --type=fp32'),
             (tern, 'fp32', {'trainer': 'train_gpt'}, 'blocks.1.attn.c_attn is a tern layer, and GPT2LMHeadModel has'),
             (gpt(), 'packed', {'trainer': 'train_gpt'}, 'type --type=fp32 or bf16 for a GPT-2'),
             (gpt(), 'fp32', {'trainer': 'train_gpt', 'quantized': {'lm_head': {'kind': 'int8'}}},
              'lm_head is a packed layer (int8) of ptq.py')]
    before = sorted(os.listdir(tmp_path))
    for model, form, about, words in cases:
        with pytest.raises(ValueError) as error:
            written(model, tmp_path / 'x', form, **about)
        assert words in str(error.value) and '\n' not in str(error.value)
    for place in ('full', 'link', 'full/a'):
        with pytest.raises(ValueError, match='exists; delete it, or type another --out'):
            written(bitnet(), tmp_path / place, 'fp32')
    assert sorted(os.listdir(tmp_path)) == before and os.listdir(tmp_path / 'full') == ['a']


def test_a_full_disk_leaves_no_folder(tmp_path):
    """It is an OSError that names the file; the next write works."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    model = bitnet()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        with pytest.raises(OSError, match=f'could not write {tmp_path}/x'):
            written(model, tmp_path / 'x', 'packed')
        assert not os.listdir(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    written(model, tmp_path / 'x', 'packed')
    assert os.listdir(tmp_path) == ['x']


def test_a_killed_write_leaves_no_folder(tmp_path, monkeypatch):
    """SIGTERM in the middle leaves a temporary folder, which the next write deletes. It deletes no other folder beside it."""
    (tmp_path / 'x.tmp1-notes').mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', lambda *paths: os.kill(os.getpid(), signal.SIGTERM))
        if not (pid := os.fork()):
            written(bitnet(), tmp_path / 'x', 'packed')
            os._exit(0)                             # not reached
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
    assert sorted(os.listdir(tmp_path)) == ['x.tmp1-notes', f'x.tmp{pid}']
    written(bitnet(), tmp_path / 'x', 'packed')
    assert sorted(os.listdir(tmp_path)) == ['x', 'x.tmp1-notes']


def header(table, data=b''):
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack('<Q', len(text)) + text + data


def test_malformed_safetensors_are_one_line(tmp_path):
    """Cut short, wrong sizes, overlaps, a name twice, dims that overflow, a path as a name, deep nesting."""
    written(bitnet(), tmp_path / 'x', 'packed')
    written(gpt(), tmp_path / 'g', 'fp32', trainer='train_gpt')
    one = lambda **more: {'dtype': 'F32', 'shape': [4], 'data_offsets': [0, 16]} | more
    name, data = b'"model.norm.weight"', json.dumps(one()).encode()
    bad = {'empty': b'', 'short': b'\1', 'no header': struct.pack('<Q', 1 << 60), 'text': b'hello there, this is no model',
           'list': header([]), 'cut': header({'a': one()}, bytes(8)), 'long': header({'a': one()}, bytes(32)),
           'wrong size': header({'a': one(shape=[5])}, bytes(16)), 'negative': header({'a': one(shape=[-4])}, bytes(16)),
           'overflow': header({'a': one(shape=[1 << 62, 1 << 62])}, bytes(16)),
           'overlap': header({'a': one(), 'b': one()}, bytes(16)), 'dtype': header({'a': one(dtype='X')}, bytes(16)),
           'backwards': header({'a': one(data_offsets=[16, 0])}, bytes(16)), 'path': header({'../../a': one()}, bytes(16)),
           'twice': header(b'{' + name + b': ' + data + b', ' + name + b': ' + data + b'}', bytes(16)),
           'deep': header(b'[' * 100_000)}
    for kind in 'xg':
        for what, content in bad.items():
            (tmp_path / kind / 'model.safetensors').write_bytes(content)
            assert str(tmp_path / kind) in said(tmp_path / kind), what
    (tmp_path / 'x' / 'config.json').write_text('[' * 100_000)
    assert 'config.json cannot be used' in said(tmp_path / 'x')
    assert sorted(os.listdir(tmp_path)) == ['g', 'x']


Q, E, N = 'model.layers.0.self_attn.q_proj', 'model.embed_tokens.weight', 'model.norm.weight'
ONES = torch.ones(32, 32)


@pytest.mark.parametrize('form, name, wrong', [
    *[('packed', f'{Q}.weight', t) for t in (
        torch.full((8, 32), 255, dtype=torch.uint8), torch.zeros(9, 32, dtype=torch.uint8), torch.tensor(0, dtype=torch.uint8),
        torch.zeros(0), torch.full((32, 32), -128, dtype=torch.int8), ONES * -2, ONES / 0, ONES.bool(), ONES.double(),
        ONES.to(torch.float8_e4m3fn), ONES.to(torch.complex64), ONES.to(torch.uint16))],
    *[('bitlinear', f'{Q}.weight_scale', t) for t in (
        *map(torch.tensor, ([torch.nan], [torch.inf], [0.0], [-1.0], [1e-40], [1.0, 1.0], [1])), torch.zeros(0))],
    *[('fp32', name, t.expand(size)) for name, size in ((E, (320, 32)), (N, (32,)), (f'{Q}.weight', (32, 32))) for t in (
        torch.tensor(torch.nan), torch.tensor(1e300, dtype=torch.float64), torch.tensor(1, dtype=torch.uint8),
        torch.tensor(1.0).to(torch.float8_e5m2))],
    ('fp32', 'a\nb', torch.ones(1)), ('fp32', 'a' * 5000, torch.ones(1))])
def test_wrong_tensors_are_one_line(tmp_path, form, name, wrong):
    """Code 3, codes and scales of another shape, sign, size or type, numbers that are not finite. The line names the tensor."""
    folder = written(bitnet(), tmp_path / 'x', form)
    state = load_file(tmp_path / 'x' / 'model.safetensors')
    save_file(state | {name: wrong.contiguous()}, tmp_path / 'x' / 'model.safetensors')
    assert (name.removesuffix('_scale').removesuffix('.weight') if name in state else 'not printable') in said(folder)


@pytest.mark.parametrize('damage', [
    lambda it: it['model']['vocab'].update(zz=2 ** 31 - 1), lambda it: it['model']['vocab'].update(zz=400),
    lambda it: it['model'].update(end_of_word_suffix='z'), lambda it: it.update(decoder=None), lambda it: it.update(model=[]),
    lambda it: it.update(normalizer={'type': 'Replace', 'pattern': {'String': ''}, 'content': 'a'}),
    lambda it: it.update(post_processor={
        'type': 'TemplateProcessing', 'pair': [], 'single': [{'SpecialToken': {'id': 'z', 'type_id': 0}}, {'Sequence': {
            'id': 'A', 'type_id': 0}}], 'special_tokens': {'z': {'id': 'z', 'ids': [99999], 'tokens': ['z']}}})])
def test_a_damaged_tokenizer_is_one_line(tmp_path, bpe, capfd, damage):
    """An id beyond the vocabulary takes no memory, and the library prints no panic."""
    folder = written(bitnet(), tmp_path / 'x', 'packed', bpe)
    text = json.loads((tmp_path / 'x' / 'tokenizer.json').read_text())
    damage(text)
    (tmp_path / 'x' / 'tokenizer.json').write_text(json.dumps(text))
    assert f'{folder}/tokenizer.json' in said(folder) and not ''.join(capfd.readouterr())


def test_a_tokenizer_neither_cuts_nor_pads(tmp_path, bpe):
    """A tokenizer.json can hold settings for batches; transformers resets them too."""
    text = json.loads(tokens.as_json(bpe)) | {
        'truncation': {'direction': 'Right', 'max_length': 3, 'strategy': 'LongestFirst', 'stride': 0},
        'padding': {'strategy': {'Fixed': 999}, 'direction': 'Right', 'pad_to_multiple_of': None, 'pad_id': 0, 'pad_type_id': 0,
                    'pad_token': 'a'}}
    assert tokens.bpe(json.dumps(text)).encode(TEXTS[3] * 3).tolist() == bpe.encode(TEXTS[3] * 3).tolist()


def test_a_folder_with_a_fifo_is_refused(tmp_path):
    """Opening it would wait for ever."""
    folder = written(bitnet(), tmp_path / 'x', 'packed')
    os.remove(tmp_path / 'x' / 'tokenizer.json')
    os.mkfifo(tmp_path / 'x' / 'tokenizer.json')
    assert 'tokenizer.json beside it is no file' in said(folder)


def test_a_run_of_finetune_cls_needs_no_export(tmp_path):
    """The run, its checkpoint and its folder give one line with the folder. Other runs give none."""
    (tmp_path / 'cls' / 'base').mkdir(parents=True)
    net, tokenizer = hf.small([('a b',)], ['no', 'yes'], n_layer=1, n_head=1, n_embd=4, dropout=0.0, vocab_size=50, max_len=8)
    for folder in ('base', 'small-sst2-full'):
        hf.save(net, tokenizer, str(tmp_path / 'cls' / folder))
    for path in ('', 'last.pt', 'small-sst2-full'):
        line = folders.ready(str(tmp_path / 'cls' / path))
        assert line.startswith(f'{tmp_path}/cls/small-sst2-full is a Hugging Face folder already') and '\n' not in line
    written(bitnet(), tmp_path / 'run' / 'x', 'packed')
    assert folders.ready(str(tmp_path / 'run')) == folders.ready(str(tmp_path / 'none')) == ''


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    """Which of the two is meant is unknown."""
    written(bitnet(), tmp_path / 'x', 'packed')
    shutil.copy(tmp_path / 'x' / 'model.safetensors', tmp_path / 'x' / 'other.safetensors')
    (tmp_path / 'x' / 'model.safetensors.index.json').write_text(json.dumps({
        'weight_map': {'a': 'model.safetensors', 'b': 'other.safetensors'}}))
    assert 'is there twice' in said(tmp_path / 'x')
    written(gpt(), tmp_path / 'g', 'fp32', trainer='train_gpt')
    state = load_file(tmp_path / 'g' / 'model.safetensors')
    save_file(state | {'wte.weight': state['transformer.wte.weight'].clone()}, tmp_path / 'g' / 'model.safetensors')
    assert 'wte.weight is there twice, with and without transformer.' in said(tmp_path / 'g')


@pytest.mark.parametrize('more, words', [
    ({'model_type': 'mamba'}, 'holds mamba; of Hugging Face folders'), ({'n_head': 3}, 'n_head=3'),
    ({'n_layer': 0}, 'n_layer=0'), ({'n_embd': 1 << 30}, 'is no size'), ({'n_inner': 7}, 'n_inner=7'),
    ({'n_layer': 3}, 'the weights there lack blocks.2.ln_1.weight'),
    ({'n_layer': 1}, 'no place for blocks.1.'), ({'vocab_size': 330}, 'wte.weight is no finite matrix of 330 x 32'),
    ({'resid_pdrop': None}, 'resid_pdrop=None'), ({'n_head': 'x' * 9999}, 'n_head='),
    ({'activation_function': 'relu'}, 'activation_function=relu'), ({'layer_norm_epsilon': 1}, 'another layer_norm_epsilon'),
    ({'eos_token_id': 999}, 'tokenizer.json cannot be used')])
def test_a_gpt2_that_does_not_fit_is_one_line(tmp_path, more, words):
    """Each names what this trainer does not do, or the tensor."""
    folder = written(gpt(), tmp_path / 'x', 'fp32', trainer='train_gpt')
    path = tmp_path / 'x' / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    assert words in said(folder)


@pytest.mark.parametrize('more, words', [
    ({'rope_parameters': {'rope_theta': float('inf')}}, 'rope_theta=inf'),
    ({'rope_parameters': {'rope_theta': 1e-300}}, 'rope_theta=1e-300'),
    ({'rms_norm_eps': -1}, 'rms_norm_eps=-1.0'),
    ({'max_position_embeddings': 1 << 23, 'head_dim': None, 'num_attention_heads': 1}, 'max_position_embeddings=8388608'),
    ({'tie_word_embeddings': False}, 'tie_word_embeddings=False and no lm_head.weight')])
def test_a_bitnet_that_does_not_fit_is_one_line(tmp_path, more, words):
    """Numbers that no model has would take all memory or give no number."""
    folder = written(bitnet(n_embd=64), tmp_path / 'x', 'packed')
    path = tmp_path / 'x' / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    assert words in said(folder)


def test_an_untied_head_is_written_and_not_read(tmp_path):
    """transformers has such models; train_bitnet.py ties its head. load.load() reads the folder as it is."""
    model = bitnet()
    model.lm_head.weight = torch.nn.Parameter(torch.randn(320, 32))        # largest logit: 25
    folder = written(model, tmp_path / 'x', 'packed')
    assert 'its head is not the embedding' in said(folder)
    assert_alike(load.load(folder)[0], folder, random_ids(8, 20))


def test_a_gpt2_of_transformers_comes_in(tmp_path, gpt2, capsys):
    """Also without the prefix of its names, with the masks that early files hold, and with its tanh GELU, which read() says."""
    import transformers as t
    torch.manual_seed(0)
    theirs = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=310, n_positions=24, n_embd=32, n_layer=2, n_head=2, eos_token_id=309,
                                            bos_token_id=309)).eval()
    theirs.save_pretrained(tmp_path)
    (tmp_path / 'tokenizer.json').write_text(tokens.as_json(gpt2))
    state = {name.removeprefix('transformer.'): p for name, p in load_file(tmp_path / 'model.safetensors').items()}
    state |= {f'h.{i}.attn.bias': torch.ones(1, 1, 24, 24) for i in range(2)}
    save_file(state, tmp_path / 'model.safetensors', {'format': 'pt'})
    model, ids = read_model(tmp_path), random_ids(4, 20)
    assert 'a tanh approximation of GELU' in capsys.readouterr().out and isinstance(model, GPT)
    want = theirs(ids).logits
    assert (all_logits(model, ids) - want).abs().max() < 2e-3 * want.std()
    assert folders.read(tmp_path)[3].describe() == gpt2.describe()


def test_figures_of_the_run_come_back(tmp_path):
    """config.json holds step, loss, task and the name of the data set; a path of one, and the loss of another step, are left
    out. Figures that no run has are one line."""
    about = {'step': 7, 'val_loss': 1.5, 'task': 'arithmetic', 'config': {'dataset': 'arithmetic'}}
    folder = written(bitnet(), tmp_path / 'x', 'packed', **about)
    assert folders.read(folder)[4] == about
    about = {'step': 7, 'val_loss': 1.5, 'path': 'run/last.pt', 'config': {'dataset': '/home/me/text'}}
    assert folders.read(written(gpt(), tmp_path / 'y', 'fp32', trainer='train_gpt', **about))[4] == {
        'step': 7, 'val_loss': None, 'task': '', 'config': {}}
    path = tmp_path / 'x' / 'config.json'
    for wrong in ({'step': -1}, {'task': 'chess'}, {'val_loss': 'low'}, {'name': 1}, ['step']):
        path.write_text(json.dumps(json.loads((tmp_path / 'y' / 'config.json').read_text()) | {'nanobit': wrong}))
        assert 'the table nanobit cannot be used' in said(folder)
