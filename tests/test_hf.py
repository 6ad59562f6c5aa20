"""hf.py: vocabularies that come out the same, texts to batches, heads by the names of labels, BitNet, folders."""
import json
import os
import resource
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import common
import layers
import train_gpt
from conftest import ROOT, all_logits, one_error, random_ids, tiny_bitnet, tiny_gpt
from pretrained import folders, hf

TEXTS = [('the good film',), ('a bad, sad story',), ('the film was nice & good',), ('',)] * 5
TINY = dict(n_layer=1, n_head=2, n_embd=32, dropout=0.0, vocab_size=120, max_len=12)


@pytest.fixture(scope='module', autouse=True)
def offline():
    """transformers has read it when it was imported; here it is imported now."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('HF_HUB_OFFLINE', '1')
        import huggingface_hub.constants as constants
        patch.setattr(constants, 'HF_HUB_OFFLINE', True)
        yield


def small(seed=0, names=('no', 'yes')):
    torch.manual_seed(seed)
    return hf.small(TEXTS, list(names), **TINY)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp('model')
    hf.save(*small(), folder)
    return folder


def logits(net, tokenizer, texts=TEXTS, max_len=12, pad=False):
    with torch.no_grad():
        return net.eval()(**hf.collate(tokenizer, hf.encode(tokenizer, texts, max_len), max_len, pad)).logits


def test_the_same_texts_give_the_same_vocabulary(saved, start, tmp_path):
    """Also in another process, whose hashes are others, and so are new heads; a saved tokenizer comes back."""
    (tmp_path / 's.py').write_text(
        f'import common, torch; from pretrained import hf; t = hf.small({TEXTS!r}, ["no", "yes"], **{TINY!r})[1]\n'
        f'torch.manual_seed(0); head = hf.head_parameters(hf.load({str(saved)!r}, ["a", "b"])[0])\n'
        'print((t.get_vocab(), common.checksum(head.values())))')
    elsewhere = start('s.py', cwd=tmp_path, real=True, PYTHONHASHSEED='7').wait()
    vocabulary = small()[1].get_vocab()
    assert len(vocabulary) <= 120 and {'[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'film'} <= vocabulary.keys()
    assert vocabulary == small(1)[1].get_vocab() == hf.load(str(saved), ['no', 'yes'])[1].get_vocab()
    torch.manual_seed(0)
    head = hf.head_parameters(hf.load(str(saved), ['a', 'b'])[0])
    assert eval(elsewhere.out) == (vocabulary, common.checksum(head.values())), elsewhere.err


def test_encode_pairs_long_and_empty_texts():
    """A pair is separated, a long text is cut, an empty one keeps its marks; a decoder's empty text is one padding token."""
    tokenizer = small()[1]
    cls, sep, word = (tokenizer.get_vocab()[w] for w in ('[CLS]', '[SEP]', 'film'))
    rows = hf.encode(tokenizer, [('film', 'film film'), ('', ''), ('film ' * 50, 'film')], 8)
    assert [row['input_ids'].tolist() for row in rows] == [
        [cls, word, sep, word, word, sep], [cls, sep, sep], [cls, *[word] * 4, sep, word, sep]]
    assert [row['input_ids'].tolist() for row in hf.encode(tokenizer, [('',), ('film',)], 8)] == [[cls, sep], [cls, word, sep]]
    assert len(hf.encode(tokenizer, [('film',)] * 2001, 8)) == 2001 and hf.encode(tokenizer, [], 8) == []

    class Bare:                                     # a decoder's: nothing around the words
        pad_token_id = 3

        def __call__(self, texts, **_):
            return {'input_ids': [[9] * len(text.split()) for text in texts]}
    assert [r['input_ids'].tolist() for r in hf.encode(Bare(), [('a b',), ('',)], 8)] == [[9, 9], [3]]


def test_batches_are_padded_to_a_multiple_of_8():
    """A batch is as wide as its longest row, rounded up, but not above max_len; pad_to_max makes it max_len wide."""
    tokenizer = small()[1]
    rows = hf.encode(tokenizer, [('film',), ('film film film',)], 12)
    batch = hf.collate(tokenizer, rows, 12)
    assert batch['input_ids'].shape == (2, 8) and batch['input_ids'].dtype == torch.int64
    assert batch['attention_mask'].tolist() == [[1] * 3 + [0] * 5, [1] * 5 + [0] * 3]
    assert (batch['input_ids'][0, 3:] == tokenizer.pad_token_id).all()
    for more, wide in (((6,), 6), ((20, True), 20)):
        assert hf.collate(tokenizer, rows, *more)['input_ids'].shape == (2, wide)
    assert hf.collate(tokenizer, hf.encode(tokenizer, [('film ' * 50,)], 12), 12)['input_ids'].shape == (1, 12)
    assert torch.isfinite(logits(*small(), texts=[('film ' * 50,)])).all()


def test_a_head_is_kept_for_the_same_labels_only(saved, tmp_path):
    """The same names in another order or case keep head and order; other names give a new head, the same for a seed."""
    net = small()[0]
    before = dict(net.named_parameters())
    for asked, order in ((['no', 'yes'], ['no', 'yes']), (['yes', 'no'], ['no', 'yes']), (['YES', 'No'], ['No', 'YES'])):
        loaded, _, names, fresh = hf.load(str(saved), asked)
        assert (names, fresh) == (order, False) and loaded.config.id2label == dict(enumerate(order))
        assert torch.equal(loaded.classifier.weight, net.classifier.weight)
    for asked in (['a', 'b'], ['a', 'b', 'c'], ['no', 'No'], ['no']):
        torch.manual_seed(3)
        loaded, _, names, fresh = hf.load(str(saved), asked)
        assert fresh and names == asked and loaded.classifier.weight.shape == (len(asked), 32)
        assert not any(torch.equal(p, before[n]) for n, p in hf.head_parameters(loaded).items() if p.dim() > 1)
        assert 0.01 < loaded.pre_classifier.weight.std() < 0.03
        assert torch.equal(loaded.get_input_embeddings().weight, net.get_input_embeddings().weight)
        torch.manual_seed(3)
        again = hf.load(str(saved), asked)[0]
        assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), again.parameters(), strict=True))
    random, _, _, fresh = hf.load(str(saved), ['no', 'yes'], weights=False)
    assert fresh and not torch.equal(random.classifier.weight, net.classifier.weight)
    hf.save(*small(names=('a', 'A')), tmp_path)     # names that differ in case only are two labels
    assert hf.load(str(tmp_path), ['A', 'a'])[2:] == (['a', 'A'], False)


def test_a_damaged_folder_is_one_line(saved, tmp_path):
    """Missing or cut weights, no tokenizer, no config, quantized weights, no such model: an error that names the folder."""
    about = json.loads((saved / 'config.json').read_text())
    about['quantization_config'] = {'quant_method': 'bitnet', 'quantization_mode': 'offline'}
    less = {k: v for k, v in load_file(saved / 'model.safetensors').items() if 'q_lin.weight' not in k}
    cases = [('no file named model.safetensors', lambda folder: (folder / 'model.safetensors').unlink()),
             ('there is no tokenizer', lambda folder: [path.unlink() for path in folder.glob('tokenizer*')]),
             ('tokenizer', lambda folder: (folder / 'tokenizer.json').unlink()),
             ('model_type', lambda folder: (folder / 'config.json').unlink()),
             ('header', lambda folder: os.truncate(folder / 'model.safetensors', 5000)),
             ('quantized already', lambda folder: (folder / 'config.json').write_text(json.dumps(about))),
             ('lack distilbert.transformer.layer.0.attention.q_lin.weight',
              lambda folder: save_file(less, folder / 'model.safetensors', {'format': 'pt'}))]
    for i, (words, damage) in enumerate(cases):
        damage(folder := shutil.copytree(saved, tmp_path / str(i)))
        with pytest.raises(ValueError) as error:
            hf.load(str(folder), ['no', 'yes'])
        text = str(error.value)
        assert words in text and str(folder) in text and '\n' not in text and len(text) < 500
    for name in ('nosuch/model', 'nosuch'):
        with pytest.raises(ValueError, match=f"cannot load model '{name}'") as error:
            hf.load(name, ['no', 'yes'])
        assert '\n' not in str(error.value)


def test_a_full_disk_is_an_os_error(tmp_path):
    """Whether the weights or the tokenizer find no room."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    net, tokenizer = small()
    try:
        for limit, saved in ((30_000, lambda: hf.save(net, tokenizer, tmp_path)),
                             (900, lambda: hf.save_tokenizer(tokenizer, tmp_path))):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            with pytest.raises(OSError, match=f'could not write.*{tmp_path}'):
                saved()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_low_rank_layers_are_saved_dense(saved, tmp_path):
    """A folder with low-rank layers loads as a plain model with the same logits; the factors are in a file of their own."""
    net, tokenizer, _, _ = hf.load(str(saved), ['no', 'yes'])
    torch.manual_seed(0)
    layers.convert(net, {'*.[qkv]_lin': ('lowrank', dict(rank=3))}, verbose=False)
    hf.save(net, tokenizer, tmp_path)
    again, words, names, fresh = hf.load(str(tmp_path), ['no', 'yes'])
    assert not fresh and not any(isinstance(m, layers.LowRankLinear) for m in again.modules())
    assert_close(logits(again, words), logits(net, tokenizer), rtol=0, atol=1e-6)
    factors = load_file(tmp_path / 'low_rank.safetensors')
    assert len(factors) == 9 and all(torch.equal(t, net.state_dict()[k]) for k, t in factors.items())


# --------------------------------------------------------------------------------------------------------- decoders


@pytest.mark.parametrize('kind', ['gpt2', 'bitnet'])
def test_decoders_do_not_see_padding_and_come_back(tmp_path, kind):
    """Logits are those of the last token, however much padding follows; saved and loaded they are the same. Every projection
    of a BitNet is ternary, here and, by its config.json, for other readers."""
    import transformers as t
    tokenizer, online = small()[1], {'quant_method': 'bitnet', 'linear_class': 'autobitlinear', 'quantization_mode': 'online'}
    shared = dict(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=None, pad_token_id=0)
    torch.manual_seed(0)
    t.AutoModelForCausalLM.from_config(
        t.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=16, **shared) if kind == 'gpt2' else
        t.BitNetConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                       max_position_embeddings=16, **shared)).save_pretrained(tmp_path / 'a')
    tokenizer.save_pretrained(tmp_path / 'a')
    if kind == 'bitnet':                            # as in microsoft/bitnet-b1.58-2B-4T-bf16
        about = json.loads((tmp_path / 'a/config.json').read_text()) | {'quantization_config': online}
        (tmp_path / 'a/config.json').write_text(json.dumps(about))
    net, tokenizer, names, fresh = hf.load(str(tmp_path / 'a'), ['no', 'yes'])
    assert fresh and names == ['no', 'yes'] and hf.head_parameters(net).keys() == {'score.weight'}
    ternary = {n for n, m in net.named_modules() if isinstance(m, layers.TernaryLinear) and not m.norm}
    assert ternary == {n for n, _ in net.named_modules() if n.endswith('_proj') and kind == 'bitnet'}
    plain = logits(net, tokenizer, TEXTS[:3])
    assert plain.shape == (3, 2) and plain.std() > 0
    assert_close(logits(net, tokenizer, TEXTS[:3], 16, True), plain, rtol=0, atol=1e-6)
    assert_close(torch.cat([logits(net, tokenizer, [text]) for text in TEXTS[:3]]), plain, rtol=0, atol=1e-6)
    for _ in range(2):                              # saving leaves nothing behind that the next one would trip over
        hf.save(net, tokenizer, tmp_path / 'b')
        assert getattr(net.config, 'quantization_config', None) is None
    again, words, names, fresh = hf.load(str(tmp_path / 'b'), ['yes', 'no'])
    assert not fresh and names == ['no', 'yes'] and torch.equal(logits(again, words, TEXTS[:3]), plain)
    assert hf.load(str(tmp_path / 'b'), ['x', 'y'])[3]
    about = json.loads((tmp_path / 'b' / 'config.json').read_text())
    assert about.get('quantization_config') == (online if kind == 'bitnet' else None)
    if kind == 'bitnet':
        head = tmp_path / 'b' / hf.HEAD
        head.write_bytes(head.read_bytes()[:-1] + b'\x77')
        with pytest.raises(ValueError, match='damaged'):
            hf.load(str(tmp_path / 'b'), ['yes', 'no'])


@pytest.fixture
def uncompiled(monkeypatch):
    """transformers compiles the rounding of its AutoBitLinear, which takes seconds here."""
    from transformers.integrations import bitnet
    for kind in (bitnet.WeightQuant, bitnet.ActQuant):
        if plain := getattr(kind.forward, '_torchdynamo_orig_callable', None):
            monkeypatch.setattr(kind, 'forward', staticmethod(plain))


@pytest.mark.parametrize('quant, act', [('tern', 'relu2'), ('fp', 'silu')])
def test_our_bitnet_is_that_of_transformers(uncompiled, quant, act):
    """BitNetForCausalLM with our weights has the same logits, loss and gradients, ternary or in full precision."""
    import transformers as t
    from transformers.integrations import bitnet
    model = tiny_bitnet(quant, n_layer=3, n_ff=48, act=act)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.rand_like(p) + 0.5) if name.endswith('gain') else p.mul_(3 if name == 'wte.weight' else 1)
    theirs = t.BitNetForCausalLM(t.BitNetConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        hidden_act=act, max_position_embeddings=16, rms_norm_eps=1e-5, rope_theta=10_000.0, tie_word_embeddings=True,
        attn_implementation='eager')).eval()
    for name, module in list(theirs.named_modules()) if quant == 'tern' else ():
        if isinstance(module, torch.nn.Linear) and name != 'lm_head':
            shape = module.in_features, module.out_features
            theirs.set_submodule(name, bitnet.AutoBitLinear(*shape, bias=False, online_quant=True))
    ours, tol = dict(model.named_parameters()), 1e-4 if quant == 'fp' else 1e-2     # somewhere a code may be rounded otherwise
    theirs.load_state_dict(hf.bitnet_state(model.state_dict(), model.config))
    ids = random_ids(2, 17)
    want = theirs(ids[:, :-1]).logits
    assert_close(all_logits(model, ids[:, :-1]), want.detach(), rtol=0, atol=tol * want.abs().max().item())
    loss = model(ids[:, :-1], ids[:, 1:])
    same = torch.nn.functional.cross_entropy(want.flatten(0, 1), ids[:, 1:].flatten())
    assert_close(loss, same, rtol=tol, atol=0)
    loss.backward()
    same.backward()
    got = hf.bitnet_state({name: p.grad for name, p in ours.items()}, model.config)
    want = {name: p.grad for name, p in theirs.named_parameters()}
    assert got.keys() - {'lm_head.weight'} == want.keys() and len(want) == 2 + 3 * 11
    for name, g in want.items():
        assert_close(got[name], g, rtol=0, atol=tol * g.abs().max().item(), msg=lambda m, name=name: f'{name}: {m}')
        assert g.abs().max() > 1e-5
    assert sum(t.numel() for t in got.values()) - got['lm_head.weight'].numel() == sum(p.numel() for p in ours.values())


# ------------------------------------------------------------------------------------------------ GPT-2 in train_gpt.py


def test_gpt2_weights_give_gpt2_logits(tmp_path, tiny_data, start):
    """A GPT-2 folder of transformers has the same logits here; --init_from refuses other tokens, names a missing package."""
    import transformers
    torch.manual_seed(0)
    source = transformers.GPT2LMHeadModel(transformers.GPT2Config(      # its GELU is the tanh one, ours the exact one
        vocab_size=250, n_positions=24, n_embd=32, n_layer=2, n_head=2, activation_function='gelu', bos_token_id=None,
        eos_token_id=None)).eval()
    with torch.no_grad():
        for p in source.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    source.save_pretrained(tmp_path / 'gpt2-tiny')
    model = tiny_gpt(vocab_size=256, bias=True)
    train_gpt.load_weights(model, folders.gpt2_weights(str(tmp_path / 'gpt2-tiny'), model.config)[0], 'gpt2-tiny')
    ids = random_ids(2, 16)
    ours, theirs = all_logits(model, ids), source(ids).logits.detach()
    assert_close(ours[..., :250], theirs, rtol=0, atol=1e-4)
    assert_close(ours[..., 250:], theirs.mean(-1, keepdim=True).expand(-1, -1, 6), rtol=0, atol=1e-4)
    shape = ('--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=16', '--bias=True', '--device=cpu')
    done = start(ROOT / 'train_gpt.py', '--init_from=gpt2-tiny', f'--dataset={tiny_data}', *shape, cwd=tmp_path).wait()
    assert done.code == 2 and 'error: gpt2-tiny needs GPT-2 tokens' in done.err          # below transformers' progress bar
    assert 'pip install transformers' in one_error(start(
        ROOT / 'train_gpt.py', '--init_from=gpt2', f'--dataset={tiny_data}', '--device=cpu', cwd=tmp_path,
        patch='import sys; sys.modules["transformers"] = None').wait())


@pytest.mark.parametrize('linear_class, mode', [('autobitlinear', 'online'), ('bitlinear', 'offline'),
                                                ('autobitlinear', 'offline')])
def test_bitnet_folders_give_the_logits_of_transformers(uncompiled, monkeypatch, tmp_path, linear_class, mode):
    """Plain weights that are rounded in each pass, and packed ones with either meaning of weight_scale, in load_causal()."""
    import transformers as t
    from transformers.integrations import bitnet
    for owner, name in ((bitnet, 'unpack_weights'), (bitnet.BitLinear, 'activation_quant'),
                        (bitnet.BitLinear, 'post_quant_process')):
        plain = getattr(getattr(owner, name), '_torchdynamo_orig_callable', None)
        if plain:
            monkeypatch.setattr(owner, name, plain)
    tokenizer, how = small()[1], {'quant_method': 'bitnet', 'linear_class': linear_class, 'quantization_mode': mode}
    torch.manual_seed(0)
    config = t.BitNetConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16, bos_token_id=None,
                            eos_token_id=None, pad_token_id=0)
    theirs = t.AutoModelForCausalLM.from_config(config).eval()
    state = {n: p.detach() for n, p in theirs.named_parameters()}
    bitnet.replace_with_bitnet_linear(theirs, ['lm_head'],
                                      t.BitNetQuantConfig(linear_class=linear_class, quantization_mode=mode))
    for key, w in list(state.items()):
        layer = theirs.get_submodule(key.rpartition('.')[0])
        if isinstance(layer, bitnet.AutoBitLinear | bitnet.BitLinear):
            scale = w.abs().mean()
            codes = (w / scale).round().clamp(-1, 1)
            if mode == 'offline':
                state[key], held = bitnet.pack_weights(codes.clone()), codes if linear_class == 'autobitlinear' else None
                layer.weight_scale = state[f'{key}_scale'] = (scale if held is not None else 1 / scale).reshape(1)
                layer.weight = state[key] if held is None else torch.nn.Parameter(held)
            else:
                layer.weight = torch.nn.Parameter(w)
    (tmp_path / 'config.json').write_text(json.dumps(config.to_dict() | {
        'architectures': ['BitNetForCausalLM'], 'quantization_config': how}))
    save_file(state, tmp_path / 'model.safetensors', {'format': 'pt'})
    tokenizer.save_pretrained(tmp_path)
    ids = random_ids(2, 16)
    with torch.no_grad():
        want, got = theirs(ids).logits, hf.load_causal(str(tmp_path))[0](ids).logits
    assert_close(got, want, rtol=0, atol=1e-2 * want.abs().max().item())       # somewhere a code may be rounded otherwise
