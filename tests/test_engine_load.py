"""engine/load.py: folders of transformers' BitNetForCausalLM run here as there; little memory; one line for each bad file."""
import json
import os
import runpy
import shutil
import signal
import sys
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

import common
import layers
from conftest import ROOT, damages, tiny_bitnet
from engine import load
from pretrained import hf
from readers import tokens
from train_bitnet import BitNet, BitNetConfig

FORMS = {'packed, bitlinear': ('bitlinear', 'offline'), 'packed, autobitlinear': ('autobitlinear', 'offline'),
         'master weights': ('autobitlinear', 'online'), 'full precision': None}


def config(act='relu2', **more):
    """A small BitNetForCausalLM of transformers, with grouped key heads."""
    import transformers as t
    return t.BitNetConfig(**dict(vocab_size=300, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
                                 num_attention_heads=4, num_key_value_heads=2, hidden_act=act,
                                 max_position_embeddings=32, bos_token_id=None,
                                 eos_token_id=256, tie_word_embeddings=True,
                                 rope_parameters={'rope_type': 'default', 'rope_theta': 5e4}) | more)


def made(folder, form='packed, bitlinear', act='relu2', dtype=torch.float32, **more):
    """Write a folder with random weights and a tokenizer of 257 to 300 tokens. Returns the model of transformers in fp32."""
    import transformers as t
    from transformers.integrations import bitnet
    torch.manual_seed(0)
    theirs = t.BitNetForCausalLM(config(act, **more)).eval()
    for name, p in theirs.named_parameters():
        p.data = (torch.rand_like(p) + 0.5 if p.dim() == 1 else p * (3 if 'embed' in name else 1)).to(dtype).float()
    state = {n: p.detach().to(dtype) for n, p in theirs.named_parameters()}
    about = theirs.config.to_dict() | {'architectures': ['BitNetForCausalLM']}
    if FORMS[form]:
        linear_class, mode = FORMS[form]
        about['quantization_config'] = {'quant_method': 'bitnet', 'linear_class': linear_class, 'quantization_mode': mode}
        for name, module in list(theirs.named_modules()):
            if isinstance(module, torch.nn.Linear) and name != 'lm_head':
                w = module.weight.detach()
                scale = w.abs().mean()
                codes = (w / scale).round().clamp(-1, 1)
                new = bitnet.AutoBitLinear(module.in_features, module.out_features, False, online_quant=mode == 'online')
                new.weight.data = codes if mode == 'offline' else w
                if mode == 'offline':
                    new.weight_scale = scale.reshape(1)
                    state |= {f'{name}.weight': bitnet.pack_weights(codes.clone()),
                              f'{name}.weight_scale': (1 / scale if linear_class == 'bitlinear' else scale).reshape(1)}
                theirs.set_submodule(name, new)
    folder.mkdir(exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(about))
    (folder / 'tokenizer.json').write_text(tokens.train_bpe(['a cat sat on a mat'] * 9, 262).text)
    save_file(state, folder / 'model.safetensors', {'format': 'pt'})
    return theirs


@pytest.fixture
def eager(monkeypatch):
    """The rounding of transformers without torch.compile."""
    from transformers.integrations import bitnet
    for kind in (bitnet.WeightQuant, bitnet.ActQuant):
        plain = getattr(kind.forward, '_torchdynamo_orig_callable', None)
        if plain:
            monkeypatch.setattr(kind, 'forward', staticmethod(plain))


def greedy(theirs, ids, n):
    """The n most likely next tokens of transformers' generate(); ids from 262 on are no tokens."""
    return theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n, eos_token_id=None,
                           suppress_tokens=list(range(262, 300)))[:, ids.shape[1]:]


def close(got, want):
    return (got - want).abs().amax(-1) < 1e-4 * want.std()


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('act', ['relu2', 'silu'])
@torch.no_grad()
def test_bitnet_folders_run_as_in_transformers(eager, tmp_path, form, act):
    """Logits of the engine and of torch within 1e-4 of the spread of transformers', and its greedy tokens. An activation next
    to the border of two int8 codes can fall on the other side, and rarely does."""
    theirs = made(tmp_path, form, act, num_key_value_heads=2 if act == 'relu2' else 1)
    engine, tokenizer, _ = load.engine(str(tmp_path), head='fp', sequences=16)
    model = load.load(str(tmp_path))[0]
    ids = torch.randint(262, (16, 9), generator=torch.Generator().manual_seed(1))
    want = theirs(ids).logits[:, -1]
    for got in (engine(ids)[:, 0], model(ids)[:, 0]):
        assert close(got, want).float().mean() >= 0.8, form
    new = greedy(theirs, ids, 8)
    got = torch.stack(list(engine.generate(ids, 8, tokenizer.vocab_size, 0)), 1)
    assert (new == got).all(1).float().mean() >= 0.9


@torch.no_grad()
def test_bf16_shards_and_an_untied_head(eager, tmp_path):
    """bf16 weights in two files with an index, and a head of its own."""
    theirs = made(tmp_path, 'master weights', dtype=torch.bfloat16, tie_word_embeddings=False)
    state = load_file(tmp_path / 'model.safetensors')
    assert state['lm_head.weight'].dtype == torch.bfloat16
    (tmp_path / 'model.safetensors').unlink()
    parts = {name: f'model-{i % 2}.safetensors' for i, name in enumerate(state)}
    for part in set(parts.values()):
        save_file({n: t for n, t in state.items() if parts[n] == part}, tmp_path / part)
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': parts}))
    engine, _, _ = load.engine(str(tmp_path), head='fp', sequences=16)
    ids = torch.randint(262, (16, 7), generator=torch.Generator().manual_seed(1))
    assert close(engine(ids)[:, 0], theirs(ids).logits[:, -1]).float().mean() >= 0.8


def test_from_bitnet_is_the_inverse():
    """Latent weights come back bit for bit; codes and scales are those of layers.pack(), also through latent weights."""
    model = tiny_bitnet()
    theirs, own = hf.bitnet_state(model.state_dict(), model.config), common._parameters_once(model)
    how = {'quantization_mode': 'online', 'linear_class': 'autobitlinear'}
    plain, codes, latent = (hf.from_bitnet(theirs, model.config, *options) for options in ((), (how,), (how, False)))
    assert plain.keys() == own.keys() and all(torch.equal(plain[n], t) for n, t in own.items())
    packed = common._parameters_once(layers.pack(model))
    assert codes.keys() == packed.keys() and all(torch.equal(codes[n], t) for n, t in packed.items())
    fresh = tiny_bitnet()
    common.load_model_state(fresh, latent, 'x', ('lm_head.weight',))
    for name, t in common._parameters_once(layers.pack(fresh)).items():
        torch.testing.assert_close(t, packed[name], rtol=1e-6, atol=0)


def test_sample_writes_with_a_folder(eager, tmp_path, monkeypatch, capsys):
    """sample.py continues a prompt like transformers, behind the token that the tokenizer puts before a text."""
    from tokenizers import Tokenizer, processors
    theirs = made(tmp_path)
    words = Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
    first = words.token_to_id('<|endoftext|>')
    words.post_processor = processors.TemplateProcessing(single='<|endoftext|> $A', special_tokens=[('<|endoftext|>', first)])
    words.save(str(tmp_path / 'tokenizer.json'))
    ids = torch.tensor([words.encode('a cat').ids])
    assert ids[0, 0] == first
    want = words.decode(greedy(theirs, ids, 9)[0].tolist())
    for more in (('--head=fp',), ('--engine=torch',)):
        monkeypatch.setattr(sys, 'argv', ['sample.py', f'--ckpt={tmp_path}', '--prompt=a cat', '--temperature=0',
                                          '--max_new_tokens=9', '--device=cpu', *more])
        on_pipe = signal.getsignal(signal.SIGPIPE)
        try:
            runpy.run_path(str(ROOT / 'sample.py'), run_name='__main__')
        finally:
            signal.signal(signal.SIGPIPE, on_pipe)
        assert capsys.readouterr().out == f'a cat{want}\n'


RESIDENT = """
import gc, os, sys
from engine import load
from engine.engine import library
from measure.turns import resident_bytes
import safetensors, torch
library()
gc.collect()
before = resident_bytes()
engine, _, _ = load.engine(sys.argv[1], head='fp')
engine.prefill(torch.zeros(1, engine.config.block_size, dtype=torch.long), 0)
print(resident_bytes() - before)
"""


@pytest.mark.skipif(not ROOT.joinpath('/proc/self/statm').exists(), reason='needs /proc')
def test_resident_memory_is_the_packed_file(tmp_path, start):
    """After loading and a full context, at most 1.15 times the file and the cache of keys and values are resident."""
    shape = BitNetConfig(8192, 64, n_layer=24, n_head=16, n_kv_head=4, n_embd=1536, n_ff=4096)
    with torch.device('meta'):
        model = BitNet(shape)
    model.lm_head.weight = model.wte.weight
    tensors = {n: torch.full_like(t, 0b01_10_00_01 if t.dtype == torch.uint8 else 0.1, device='cpu')
               for n, t in common._parameters_once(layers.pack(model)).items()}
    meta = {'trainer': 'train_bitnet', 'step': 1, 'model_config': asdict(shape), 'tokenizer': tokens.byte().describe()}
    meta['checksum'] = common._named_checksum(tensors)
    path = tmp_path / 'x.safetensors'
    save_file(tensors, path, {'nanobit': json.dumps(meta)})
    (tmp_path / 's.py').write_text(RESIDENT)
    done = start('s.py', path, cwd=tmp_path, real=True).wait()       # a fork would count pages that it copies
    cache = 2 * shape.n_layer * shape.block_size * shape.n_kv_head * shape.n_embd // shape.n_head * 4
    assert 0.9 < int(done.out) / (path.stat().st_size + cache) < 1.15, (done, path.stat().st_size, cache)


# ---------------------------------------------------------------------------------------------------------------------
# mistakes


def said(path):
    """The one line of the ValueError of a model that cannot be loaded."""
    with pytest.raises(ValueError) as error:
        load.engine(str(path))
    assert '\n' not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


def test_bad_files_are_one_line(tmp_path):
    """No file, no model, another version or trainer, cut short, a flipped byte in the header or the tensors."""
    model, describe = tiny_bitnet(), tokens.byte().describe()
    meta = {'trainer': 'train_bitnet', 'step': 1, 'model_config': asdict(model.config), 'tokenizer': describe}
    pt, packed = tmp_path / 'best.pt', tmp_path / 'packed.safetensors'
    common.save_checkpoint(pt, meta | {'model': model.state_dict(), 'config': {}})
    common.save_packed(model, packed, meta)
    assert load.engine(str(tmp_path))[2]['path'] == str(pt) and load.engine(str(packed))[2]['step'] == 1
    for path in (pt, packed):
        whole = path.read_bytes()
        for damage in (*damages(whole).values(), b'hello', whole[:60], *(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1:]
                                                                         for i in range(0, len(whole), len(whole) // 40))):
            bad = tmp_path / f'bad{path.suffix}'
            bad.write_bytes(damage)
            try:
                load.engine(str(bad))               # a byte that nothing reads, such as padding, may have changed
            except ValueError as e:
                assert str(bad) in str(e) and '\n' not in str(e)
            else:
                assert len(damage) == len(whole)
        for at in (whole.index(b'model_config') + 1, len(whole) // 2):
            bad.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1:])
            assert str(bad) in said(bad)
    torch.save(torch.load(pt, weights_only=True) | {'version': 99}, bad := tmp_path / 'new.pt')
    assert 'has checkpoint version 99, this code reads 1' in said(bad)
    for trainer, words in (('train_cnn', 'written by train_cnn.py, which trains no language model'), ('ptq', 'python ptq.py')):
        common.save_packed(tiny_bitnet(), bad := tmp_path / 'x.safetensors', meta | {'trainer': trainer})
        assert words in said(bad)
    common.save_packed(tiny_bitnet(), bad, {k: v for k, v in meta.items() if k != 'model_config'})
    assert "is damaged or of another version (KeyError: 'model_config')" in said(bad)
    assert 'does not exist' in said(tmp_path / 'none')
    (tmp_path / 'empty').mkdir()
    assert 'holds no best.pt' in said(tmp_path / 'empty')


def in_config(**more):
    def damage(folder):
        path = folder / 'config.json'
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    return damage


def in_weights(change):
    def damage(folder):
        state = load_file(folder / 'model.safetensors')
        change(state)
        save_file(state, folder / 'model.safetensors')
    return damage


def other_text(name, text):
    return lambda folder: (folder / name).write_text(text)


Q, GAIN = 'model.layers.1.self_attn.q_proj.weight', 'model.layers.0.mlp.ffn_sub_norm.weight'
ONLINE = {'quant_method': 'bitnet', 'linear_class': 'autobitlinear', 'quantization_mode': 'online'}
FOLDERS = [
    ('holds gpt2; first type: python export.py --from=', in_config(model_type='gpt2')),
    ('holds opt; of Hugging Face folders only BitNetForCausalLM runs here', in_config(model_type='opt')),
    ('holds BitNetModel; of', in_config(architectures=['BitNetModel'])),
    ("rope_type='yarn' is not possible", in_config(rope_scaling={'rope_type': 'yarn'}, rope_parameters=None)),
    ('attention_bias=True', in_config(attention_bias=True)), ("hidden_act='gelu'", in_config(hidden_act='gelu')),
    ('head_dim=16', in_config(head_dim=16)), ('num_key_value_heads=3', in_config(num_key_value_heads=3)),
    ("hidden_size='x' is no size", in_config(hidden_size='x')), ('num_attention_heads=0', in_config(num_attention_heads=0)),
    ("quant_method='gptq'", in_config(quantization_config={'quant_method': 'gptq'})),
    ("modules_to_not_convert=['q_proj']", in_config(quantization_config=ONLINE | {'modules_to_not_convert': ['q_proj']})),
    ('config.json cannot be used', in_config(rope_scaling=[1])), ('config.json cannot be used', other_text('config.json', '{')),
    ('does not fit config.json: eos_token_id=256, 262 tokens, vocab_size=200', in_config(vocab_size=200)),
    ('tokenizer.json cannot be used', in_config(eos_token_id=999)), ('tokenizer.json', in_config(eos_token_id='x')),
    ('no finite matrix of 300 x 64', in_config(hidden_size=64)), ('of 100 x 48', in_config(intermediate_size=100)),
    ('lack model.layers.2.input_layernorm', in_config(num_hidden_layers=3)),
    ('no place for model.layers.1.', in_config(num_hidden_layers=1)),
    ('tie_word_embeddings=False and no lm_head.weight', in_config(tie_word_embeddings=False)),
    ('tokenizer.json cannot be used (No such file', lambda folder: (folder / 'tokenizer.json').unlink()),
    ('it is no byte-level BPE', other_text('tokenizer.json', '{"decoder": {"type": "WordPiece"}}')),
    ('tokenizer.json cannot be used', other_text('tokenizer.json', '{"decoder": "ByteLevel"}')),
    ('a path in its index', other_text('model.safetensors.index.json', '{"weight_map": {"a": "../model.safetensors"}}')),
    ('index.json cannot be read', other_text('model.safetensors.index.json', '[]')),
    ('model.safetensors cannot be read', lambda folder: (folder / 'model.safetensors').unlink()),
    ('model.safetensors cannot be read', lambda folder: os.truncate(folder / 'model.safetensors', 5000)),
    (f'lack {Q}', in_weights(lambda state: state.pop(Q))),
    (f'lack {Q}_scale', in_weights(lambda state: state.pop(f'{Q}_scale'))),
    (f'no place for {Q[:-6]}bias', in_weights(lambda state: state.update({f'{Q[:-6]}bias': torch.ones(48)}))),
    ('q_proj holds no ternary weights of 48 x 48', in_weights(lambda state: state[Q].fill_(255))),
    ('q_proj holds no ternary weights', in_weights(lambda state: state.update({Q: torch.rand(48, 48)}))),
    ('q_proj holds no ternary weights', in_weights(lambda state: state.update({Q: torch.zeros(11, 48, dtype=torch.uint8)}))),
    ('and one scale', in_weights(lambda state: state[f'{Q}_scale'].fill_(torch.nan))),
    ('and one scale', in_weights(lambda state: state.update({f'{Q}_scale': torch.ones(2)}))),
    (f'{GAIN} is no finite vector of 96', in_weights(lambda state: state[GAIN].fill_(torch.inf))),
    ('embed_tokens.weight is no finite', in_weights(lambda state: state['model.embed_tokens.weight'].fill_(torch.nan)))]


def test_bad_folders_are_one_line(tmp_path):
    """Each names what the model here does not do, or which tensor is wrong. A flipped byte cannot crash it."""
    made(tmp_path / 'whole')
    for i, (words, damage) in enumerate(FOLDERS):
        damage(folder := shutil.copytree(tmp_path / 'whole', tmp_path / str(i)))
        assert words in (text := said(folder)) and str(folder) in text, (words, text)
    path, whole = folder / 'model.safetensors', (tmp_path / 'whole' / 'model.safetensors').read_bytes()
    for at in range(0, len(whole), len(whole) // 30):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1:])
        try:
            load.engine(str(folder))[0](torch.tensor([[1, 2]]))
        except ValueError as e:
            assert '\n' not in str(e)
