"""engine/load.py: folders of transformers' BitNetForCausalLM run here as there; little memory; one line for each bad file."""
import json
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file

import common
import layers
from conftest import ROOT, tiny_bitnet
from engine import load
from pretrained import hf
from readers import tokens

FORMS = {'packed, bitlinear': ('bitlinear', 'offline'), 'packed, autobitlinear': ('autobitlinear', 'offline'),
         'master weights': ('autobitlinear', 'online'), 'full precision': None}


def config(act='relu2', **more):
    """A small BitNetForCausalLM of transformers, with grouped key heads."""
    import transformers as t
    return t.BitNetConfig(**dict(vocab_size=300, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                                 num_key_value_heads=2, hidden_act=act, max_position_embeddings=32, bos_token_id=None,
                                 eos_token_id=256, tie_word_embeddings=True, rope_parameters={'rope_type': 'default',
                                                                                              'rope_theta': 5e4}) | more)


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


def close(got, want):
    return (got - want).abs().amax(-1) < 1e-4 * want.std()


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('act', ['relu2', 'silu'])
@torch.no_grad()
def test_bitnet_folders_run_as_in_transformers(eager, tmp_path, form, act):
    """Logits of the engine and of torch within 1e-4 of the spread of transformers', and its greedy tokens. An activation next to
    the border of two int8 codes can fall on the other side, and rarely does."""
    theirs = made(tmp_path, form, act, num_key_value_heads=2 if act == 'relu2' else 1)
    engine, tokenizer, _ = load.engine(str(tmp_path), head='fp', sequences=16)
    model = load.load(str(tmp_path))[0]
    ids = torch.randint(262, (16, 9), generator=torch.Generator().manual_seed(1))
    want = theirs(ids).logits[:, -1]
    for got in (engine(ids)[:, 0], model(ids)[:, 0]):
        assert close(got, want).float().mean() >= 0.8, form
    new = theirs.generate(ids, do_sample=False, max_new_tokens=8, pad_token_id=0, eos_token_id=None, suppress_tokens=range(262, 300))
    got = torch.stack(list(engine.generate(ids, 8, tokenizer.vocab_size, 0)), 1)
    assert (new[:, 9:] == got).all(1).float().mean() >= 0.9


@torch.no_grad()
def test_bf16_shards_and_an_untied_head(eager, tmp_path):
    """bf16 weights in two files with an index, and a head of its own."""
    theirs = made(tmp_path, 'master weights', dtype=torch.bfloat16, tie_word_embeddings=False)
    from safetensors.torch import load_file
    state = load_file(tmp_path / 'model.safetensors')
    assert state['lm_head.weight'].dtype == torch.bfloat16
    (tmp_path / 'model.safetensors').unlink()
    parts = {name: f'model-{i % 2}.safetensors' for i, name in enumerate(state)}
    for part in set(parts.values()):
        save_file({n: t for n, t in state.items() if parts[n] == part}, tmp_path / part)
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': parts}))
    engine, _, _ = load.engine(str(tmp_path), head='fp', sequences=16)
    ids = torch.randint(262, (16, 7), generator=torch.Generator().manual_seed(1))
    assert close(engine(ids)[:, 0], theirs(ids).logits[:, -1]).float().mean() >= 0.8 and not engine.tied


def test_from_bitnet_is_the_inverse(tmp_path):
    """Latent weights come back bit for bit; packed ones are those of layers.pack()."""
    model = tiny_bitnet(n_layer=2)
    theirs = hf.bitnet_state(model.state_dict(), model.config)
    again = hf.from_bitnet(theirs, model.config)
    assert not hasattr(model.blocks[0].attn.o_proj, 'code')
    plain = hf.from_bitnet(theirs, model.config, None)
    own = {n: t for n, t in model.state_dict().items() if n != 'lm_head.weight'}
    assert plain.keys() == own.keys() and all(torch.equal(plain[n], t) for n, t in own.items()) and again.keys() == plain.keys()
    how = dict(quantization_mode='online', linear_class='autobitlinear')
    packed = common._parameters_once(layers.pack(model))
    again = hf.from_bitnet(theirs, model.config, how)
    assert again.keys() == packed.keys() and all(torch.equal(again[n], t) for n, t in packed.items())
    codes = {n: t for n, t in packed.items() if n.endswith(('.code', '.weight_scale'))}
    latent = hf.from_bitnet(theirs, model.config, how, packed=False)
    fresh = tiny_bitnet(n_layer=2, seed=3) if False else tiny_bitnet(n_layer=2)
    common.load_model_state(fresh, latent, 'x', ('lm_head.weight',))
    for name, t in common._parameters_once(layers.pack(fresh)).items():
        if name in codes:
            assert torch.equal(t, codes[name]) if name.endswith('code') else torch.allclose(t, codes[name], rtol=1e-6)
