"""Integer layers with a scale per group, layers of weights that are not 0, embeddings out of packed layers; models made of
them, described, kept in a file and built again."""
import copy
from functools import partial

import pytest
import torch
import torch.nn as nn
import transformers
from formulas import fixed  # noqa: F401

import common
import layers
from conftest import random_ids, tiny_bitnet, tiny_gpt
from pretrained import formats, replace
from pretrained.formats import GroupLinear, SparseLinear
from quant import GRIDS

KINDS = {'half': {}, 'int8': {}, 'int4': {'group': 16}, 'nf4': {}, 'fit4': {}, 'group': {'levels': 'int3', 'group': 16}}
IDS = random_ids(2, 16)
gpt = partial(tiny_gpt, n_embd=64, bias=True)
bitnet = partial(tiny_bitnet, 'fp', n_head=2, n_kv_head=1, n_embd=64, n_ff=128)


@pytest.mark.parametrize('levels, low, high', [('int8', .004, .007), ('int4', .085, .115), ('int3', .19, .24),
                                               ('int2', .45, .60), ('tern', .49, .53), ('bin', .59, .61)])
def test_error_on_normal_weights(levels, low, high):
    """The relative RMS error on N(0, 1) is that of a uniform grid over the range of 128 normal numbers."""
    layer = GroupLinear(1024, 256, False, levels=levels, group=128)
    w = nn.init.normal_(layer.weight).detach().clone()
    assert low < ((layer.pack_().effective_weight() - w).square().mean() / w.square().mean()).sqrt() < high


@pytest.mark.parametrize('levels', GRIDS)
@pytest.mark.parametrize('width, groups', [(24, 1), (48, 3), (84, 1)])       # 84 of 3 bits end inside of a byte
def test_packing_changes_no_output_and_counts_every_byte(levels, width, groups):
    """pack_() keeps the outputs, of few tokens too, in the bytes of packed_bytes(); gradients go through; unpack_() is near."""
    layer, x = GroupLinear(width, 10, levels=levels, group=width // groups if groups > 1 else 0), torch.randn(7, width)
    before = layer(x)
    before.sum().backward()
    assert torch.allclose(layer.weight.grad, x.sum(0).expand(10, width), atol=1e-5)
    assert torch.allclose(layer.pack_()(x.view(1, 7, width)), before, atol=1e-5)
    assert torch.allclose(x @ layer.effective_weight().T + layer.bias, before, atol=1e-5)
    for n in (1, 4):
        assert torch.allclose(layer(x[:n]), before[:n], atol=1e-5), n
    row = lambda n: 3 * -(-n // 8) if layer.bits == 3 else -(-n * layer.bits // 8)
    expected = 10 * (row(width) + 2 * groups + 4 + (row(groups) if GRIDS[levels].zero is None else 0))
    assert layer.packed_bytes() == expected == sum(t.nbytes for t in layer.state_dict().values())
    tolerance = 0.02 if levels in ('int8', 'tern', 'bin') else 0.5     # a range is not always its own
    assert torch.allclose(copy.deepcopy(layer).unpack_()(x), before, atol=tolerance)


@pytest.mark.parametrize('kind, options, autocast', [
    ('int4', {}, True), ('nf4', {'scales': '8bit'}, False), ('int8', {}, False), ('group', KINDS['group'], True)], ids=str)
def test_a_large_matrix_is_packed_in_parts(kind, options, autocast, monkeypatch):
    """The codes and scales are those of the whole matrix, under autocast too."""
    linear = nn.Linear(1024, 2100)                  # three parts
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        parts = layers.as_kind(copy.deepcopy(linear), kind, options, True).state_dict()
    for module in (layers, formats):
        monkeypatch.setattr(module, 'in_blocks', lambda encode, rows: encode(rows))
    whole = layers.as_kind(linear, kind, options, True).state_dict()
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[k], whole[k]) and parts[k].dtype == whole[k].dtype for k in parts)


def test_scaled_inputs_are_part_of_the_weight():
    """from_codes() with input scales computes the product with scaled weights, and merges with LoRA."""
    linear, x, inverse = nn.Linear(16, 4), torch.randn(5, 16), torch.rand(16).half().float() + 0.5
    codes, scale, zero = torch.randint(8, (4, 16)), torch.rand(4, 2).half().float(), torch.randint(8, (4, 2))
    layer = GroupLinear.from_codes(linear, 'int3', 8, codes, scale, zero, inverse)
    weight = ((codes.view(4, 2, 8) - zero[..., None]) * scale[..., None]).flatten(1) * inverse.half().float()
    assert torch.allclose(layer(x), x @ weight.T + linear.bias, atol=1e-5)
    assert torch.allclose(layer.effective_weight(), weight, atol=1e-6)
    lora = layers.LoRALinear(layer, rank=2)
    nn.init.normal_(lora.lora_B)
    merged, damage = lora.merge(x)
    assert damage['max'] < 1e-4 and type(merged) is nn.Linear


@pytest.mark.parametrize('options, message', [({'levels': 'int5'}, "levels='int5'"), ({'group': -1}, 'group=-1'),
                                              ({'group': 5}, 'group=5 does not divide a row of 64.*--group=64')])
def test_levels_and_groups_that_do_not_fit_are_refused(options, message):
    """ValueError names the value and a group that fits."""
    with pytest.raises(ValueError, match=message):
        GroupLinear(64, 8, **options)


def test_sparse_weights_are_the_same_weights():
    """A sparse layer has the weights and outputs of nn.Linear; a bit for each weight and the numbers that are not 0."""
    for share in (0.0, 0.5, 1.0):
        linear, x = nn.Linear(20, 12), torch.randn(7, 20)
        with torch.no_grad():
            linear.weight *= torch.rand(12, 20) >= share
        model, expected = nn.Sequential(linear), linear(x)
        layers.convert(model, {'0': 'sparse'}, verbose=False, packed=True)
        assert isinstance(model[0], SparseLinear) and torch.equal(model(x), expected)
        assert torch.equal(model[0].decode()[0], linear.weight)
        assert model[0].packed_bytes() == 12 * 3 + 4 * linear.weight.count_nonzero() + 48


# ---------------------------------------------------------------------------------------------------------------------
# models


@pytest.mark.parametrize('kind, make, skip', [(kind, (gpt, bitnet)[i % 2], '') for i, kind in enumerate(KINDS)]
                         + [('half', bitnet, 'head,embd'), ('group', gpt, 'head,embd')])
def test_a_quantized_model_comes_back_from_its_file(kind, make, skip, tmp_path):
    """Same logits, to the bit; the file is about as large as the codes; a tied embedding looks up what the head multiplies.
    Before, unfuse() changes no output."""
    model, plain, described = replace.unfuse(make()), make()(IDS), {}
    assert torch.equal(model(IDS), plain)
    for name in replace.layers_of(model, skip):
        described |= replace.replace(model, name, kind, KINDS[kind])
    assert ('lm_head' in described) == (not skip) and len(described) == 8 + (not skip) * (2 if make is gpt else 1)
    logits = model(IDS)
    assert 0 < (logits - plain).abs().max() < 0.5
    if not skip:
        weight = model.lm_head.weight.float() if kind == 'half' else model.lm_head.effective_weight()
        assert torch.equal(model.wte(IDS), weight[IDS])
    path = str(tmp_path / 'x.safetensors')
    size = common.save_packed(model, path, {'quantized': described})
    meta, tensors = common.read_packed(path)
    assert 0 < size - sum(t.nbytes for t in tensors.values()) < 12_000
    again = common.load_packed(replace.restore(make(), meta['quantized'], tensors), tensors)
    assert torch.equal(again(IDS), logits)
    assert not any(p.requires_grad for m in again.modules() if isinstance(m, layers.LowBit) for p in m.parameters())
    if skip:
        assert torch.equal(again.wte.weight, model.wte.weight)
    else:
        assert not any(isinstance(m, nn.Embedding | nn.Linear) for m in again.modules())


def test_a_file_of_another_shape_is_refused(tmp_path):
    """restore() of a wider model raises ValueError with the bytes that are there and the weights that are wanted."""
    model, path, described = gpt(), str(tmp_path / 'x.safetensors'), {}
    for name in replace.layers_of(model, 'head,embd'):
        described |= replace.replace(model, name, 'nf4', {})
    common.save_packed(model, path, {})
    with pytest.raises(ValueError, match='bytes of codes for 384 x 128 weights'):
        replace.restore(gpt(n_embd=128), described, common.read_packed(path)[1])


def test_skip_takes_words_names_and_globs():
    """head and embd, words between dots and globs leave layers out; a tied head goes with its embedding."""
    model, names = gpt(), ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')
    inside = [f'blocks.{i}.{name}' for i in (0, 1) for name in names]
    for skip, expected in (('head,embd', inside), (' embd ', inside), ('head', ['wpe', *inside]),
                           ('head,embd,blocks.0,*c_fc', [n for n in inside[4:] if 'c_fc' not in n])):
        assert list(replace.layers_of(model, skip)) == expected
    assert set(replace.layers_of(model, '')) == {'wpe', 'lm_head', *inside}
    with pytest.raises(ValueError, match="skip='nothing' .* wte, wpe, blocks.0"):
        replace.layers_of(model, 'nothing')
    with pytest.raises(ValueError, match='nothing to quantize'):
        replace.layers_of(model, 'head,embd,blocks')


def test_subclasses_and_layers_tied_to_them_are_left_alone():
    """An embedding of another class may compute something else, so it and its tied head are not replaced."""
    model = nn.ModuleDict({'embed': type('Scaled', (nn.Embedding,), {})(10, 4), 'body': nn.Linear(4, 4),
                           'head': nn.Linear(4, 10, bias=False)})
    model['head'].weight = model['embed'].weight
    assert list(replace.layers_of(model, '')) == ['body']


def test_a_packed_embedding_at_its_limits():
    """A packed embedding takes an empty batch; one whose groups go over the ends of its rows is refused."""
    for kind, options in KINDS.items():
        embedding = replace.PackedEmbedding(layers.as_kind(nn.Linear(64, 10, bias=False), kind, options, True))
        assert embedding(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 64), kind
    with pytest.raises(ValueError, match='rows of 24 weights .* groups of 64'):
        replace.replace(nn.Sequential(nn.Embedding(32, 24)), '0', 'nf4', {})


# ---------------------------------------------------------------------------------------------------------------------
# models of transformers


WIDE = {'hidden_size': 64, 'num_hidden_layers': 1, 'num_attention_heads': 2, 'num_key_value_heads': 1, 'vocab_size': 64,
        'num_experts_per_tok': 2, 'intermediate_size': 64, 'bos_token_id': 0, 'eos_token_id': 0, 'pad_token_id': 0}
EXPERTS = {'MixtralConfig': {'num_local_experts': 4}, 'Qwen2MoeConfig': {'num_experts': 4, 'moe_intermediate_size': 64},
           'GptOssConfig': {'num_local_experts': 4, 'head_dim': 32}}


def causal(name, **options):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**options)).eval()
    with torch.no_grad():
        for p in model.parameters():                # so that each part has a visible effect
            p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.mark.parametrize('name', EXPERTS)
def test_unfused_experts_compute_the_same(name):
    """Experts as nn.Linear have the outputs of the 3-D parameters: gate and up stacked or mixed, with biases or without."""
    model, ids = causal(name, **WIDE | EXPERTS[name]), IDS % 64
    with torch.no_grad():
        before = model(ids).logits
        size = sum(p.numel() for p in model.parameters())
        assert torch.allclose(replace.unfuse(model)(ids).logits, before, atol=1e-5)
    experts = [n for n in replace.layers_of(model, 'head,embd') if '.experts.' in n]
    assert len(experts) == 8 and sum(p.numel() for p in model.parameters()) == size
    assert replace.left_out(model)[1] < 0.01 and not any(p.dim() > 2 for p in model.parameters())


def test_weights_that_no_layer_covers_are_refused():
    """The error has their share of the weights in the blocks, and the --skip that leaves them in full precision."""
    model = causal('Llama4TextConfig', **WIDE | {'num_local_experts': 4, 'head_dim': 32, 'intermediate_size_mlp': 64})
    left, share = replace.left_out(replace.unfuse(model))
    block = [p for n, p in model.named_parameters() if n.startswith('model.layers.') and p.dim() > 1]
    assert share == sum(left.values()) / sum(p.numel() for p in block) and share > 0.5
    with pytest.raises(ValueError, match=rf'{share:.1%} of the weights .*type --skip=head,(\S+)') as error:
        replace.layers_of(model, 'head')
    assert all('expert' not in n or 'shared' in n for n in replace.layers_of(model, str(error.value).rpartition('skip=')[2]))


def test_layers_whose_weight_is_read_are_left_alone():
    """Mamba multiplies by dt_proj.weight itself, so dt_proj stays; T5 reads only the dtype of a weight, so that is replaced."""
    small = {'vocab_size': 64, 'num_hidden_layers': 2, 'hidden_size': 32}
    mamba, ids = causal('MambaConfig', **small, state_size=4), IDS % 64
    replace.keep_read(mamba, lambda: mamba.backbone(ids))
    assert mamba.read == {f'backbone.layers.{i}.mixer.dt_proj' for i in range(2)}
    t5 = transformers.T5Model(transformers.T5Config(vocab_size=64, d_model=32, d_ff=48, d_kv=16, num_heads=2, num_layers=1))
    replace.keep_read(t5, lambda: t5(input_ids=ids, decoder_input_ids=ids))
    assert not t5.read and all(type(m) is nn.Linear for n, m in t5.named_modules() if n.endswith('.wo'))


def test_embeddings_that_share_a_weight_are_replaced_once():
    """T5 has three embeddings with one weight: one packed layer serves all, and comes back."""
    make = lambda: transformers.T5Model(transformers.T5Config(vocab_size=64, d_model=32, d_ff=48, d_kv=16, num_heads=2,
                                                              num_layers=1)).eval()
    torch.manual_seed(0)
    model, ids, described = make(), IDS % 64, {}
    for name in replace.layers_of(model, 'relative_attention_bias'):
        described |= replace.replace(model, name, 'int8', {})
    assert sum(len(str(n).split('embed_tokens')) > 1 or n == 'shared' for n in described) == 1
    tensors = common._parameters_once(model)
    again = common.load_packed(replace.restore(make(), described, tensors), tensors)
    with torch.no_grad():
        outputs = [net(input_ids=ids, decoder_input_ids=ids).last_hidden_state for net in (model, again)]
    assert torch.equal(*outputs)
