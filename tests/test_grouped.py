"""Integer layers with a scale per group, layers of weights that are not 0, embeddings out of packed layers; models made of
them, described, kept in a file and built again."""
import copy

import pytest
import torch
import torch.nn as nn
from formulas import fixed  # noqa: F401

import common
import layers
from pretrained import formats, replace
from pretrained.formats import GroupLinear, SparseLinear
from quant import GRIDS
from train_bitnet import BitNet, BitNetConfig
from train_gpt import GPT, GPTConfig

KINDS = {'half': {}, 'int8': {}, 'int4': {'group': 16}, 'nf4': {}, 'fit4': {}, 'group': {'levels': 'int3', 'group': 16}}


@pytest.mark.parametrize('levels, low, high', [('int8', .004, .007), ('int4', .085, .115), ('int3', .19, .24),
                                               ('int2', .45, .60), ('tern', .49, .53), ('bin', .59, .61)])
def test_error_on_normal_weights(levels, low, high):
    """The relative RMS error on N(0, 1) is that of a uniform grid over the range of 128 normal numbers."""
    layer = GroupLinear(1024, 256, False, levels=levels, group=128)
    w = nn.init.normal_(layer.weight).detach().clone()
    assert low < ((layer.pack_().effective_weight() - w).square().mean() / w.square().mean()).sqrt() < high


@pytest.mark.parametrize('levels', GRIDS)
@pytest.mark.parametrize('group', [0, 8])
def test_packing_changes_no_output_and_counts_every_byte(levels, group):
    """pack_() keeps the outputs; codes, scales, zeros and the bias take the bytes of packed_bytes(); gradients go through."""
    layer, x = GroupLinear(24, 10, levels=levels, group=group), torch.randn(3, 5, 24)
    before = layer(x)
    before.sum().backward()
    assert torch.allclose(layer.weight.grad, x.sum((0, 1)).expand(10, 24), atol=1e-5)
    assert torch.allclose(layer.pack_()(x), before, atol=1e-5)
    held = 10 * -(-24 * layer.bits // 8) + 10 * (24 // (group or 24)) * 2 + 10 * 4
    if GRIDS[levels].zero is None:
        held += 10 * (3 * -(-(24 // layer.group) // 8) if layer.bits == 3 else -(-(24 // layer.group) * layer.bits // 8))
    assert layer.packed_bytes() == held == sum(t.nbytes for t in layer.state_dict().values())
    assert torch.allclose(x @ layer.effective_weight().T + layer.bias, before, atol=1e-5)
    tolerance = 0.02 if levels in ('int8', 'tern', 'bin') else 0.5     # a range is not always its own
    assert torch.allclose(copy.deepcopy(layer).unpack_()(x), before, atol=tolerance)


@pytest.mark.parametrize('kind, autocast', [('int4', False), ('nf4', True), ('int8', True), ('group', False), ('group', True)])
def test_a_large_matrix_is_packed_in_parts(kind, autocast, monkeypatch):
    """The codes and scales are those of the whole matrix, under autocast too."""
    linear = nn.Linear(2048, 1100)                  # three parts
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        found = layers.as_kind(copy.deepcopy(linear), kind, KINDS[kind], True).state_dict()
    for module in (layers, formats):
        monkeypatch.setattr(module, 'in_blocks', lambda encode, rows: encode(rows))
    whole = layers.as_kind(linear, kind, KINDS[kind], True).state_dict()
    assert found.keys() == whole.keys() and all(torch.equal(found[k], whole[k]) and found[k].dtype == whole[k].dtype
                                                for k in found)


@pytest.mark.parametrize('levels', GRIDS)
@pytest.mark.parametrize('width', [48, 80, 84])     # 84 of 3 bits end inside of a byte
def test_a_few_tokens_are_multiplied_as_many_are(levels, width):
    """1, 4 and 7 tokens give the product with effective_weight()."""
    layer = GroupLinear(width, 33, levels=levels, group=width // 3 if width == 48 else 0).pack_()
    x = torch.randn(7, width)
    want = x @ layer.effective_weight().T + layer.bias
    for n in (1, 4, 7):
        assert torch.allclose(layer(x[:n]), want[:n], atol=1e-5), n


def test_scaled_inputs_are_part_of_the_weight():
    """from_codes() with input scales computes the product with scaled weights, and merges with LoRA."""
    linear, x = nn.Linear(16, 4), torch.randn(5, 16)
    inverse = torch.rand(16).half().float() + 0.5
    codes, scale, zero = torch.randint(8, (4, 16)), torch.rand(4, 2).half().float(), torch.randint(8, (4, 2))
    layer = GroupLinear.from_codes(linear, 'int3', 8, codes, scale, zero, inverse)
    weight = ((codes.view(4, 2, 8) - zero[..., None]) * scale[..., None]).flatten(1) * inverse.half().float()
    assert torch.allclose(layer(x), x @ weight.T + linear.bias, atol=1e-5)
    assert torch.allclose(layer.effective_weight(), weight, atol=1e-6)
    lora = layers.LoRALinear(layer, rank=2)
    nn.init.normal_(lora.lora_B)
    merged, damage = lora.merge(x)
    assert damage['max'] < 1e-4 and type(merged) is nn.Linear


@pytest.mark.parametrize('options, said', [
    ({'levels': 'int5'}, "levels='int5'"), ({'group': 5}, 'group=5 does not divide a row of 64'), ({'group': -1}, '--group=64'),
    ({'group': 128}, 'type --group=64, or 0')])
def test_levels_and_groups_that_do_not_fit_are_refused(options, said):
    """ValueError names the value and a group that fits."""
    with pytest.raises(ValueError, match=said):
        GroupLinear(64, 8, **options)


@pytest.mark.parametrize('share', [0.0, 0.5, 1.0])
def test_sparse_weights_are_the_same_weights(share):
    """A sparse layer has the weights and outputs of nn.Linear; a bit for each weight and the numbers that are not 0."""
    linear = nn.Linear(20, 12)
    with torch.no_grad():
        linear.weight *= torch.rand(12, 20) >= share
    model, x = nn.Sequential(linear), torch.randn(7, 20)
    before, zeros = model(x), (linear.weight == 0).sum().item()
    layers.convert(model, {'0': 'sparse'}, verbose=False, packed=True)
    assert isinstance(model[0], SparseLinear) and torch.equal(model(x), before)
    assert torch.equal(model[0].decode()[0], linear.weight) and model[0].packed_bytes() == 12 * 3 + 4 * (240 - zeros) + 48


# ---------------------------------------------------------------------------------------------------------------------
# models


def gpt():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=96, block_size=16, n_layer=2, n_head=2, n_embd=64, bias=True)).eval()


def bitnet():
    torch.manual_seed(0)
    return BitNet(BitNetConfig(vocab_size=96, block_size=16, n_layer=2, n_head=2, n_kv_head=1, n_embd=64, n_ff=128,
                               quant='fp')).eval()


IDS = torch.arange(32).view(2, 16) % 96


@pytest.mark.parametrize('kind, make, skip', [(kind, (gpt, bitnet)[(i + bool(skip)) % 2], skip) for i, kind in enumerate(KINDS)
                                              for skip in ('', 'head,embd')] + [('int4', bitnet, 'head,embd')])
def test_a_quantized_model_comes_back_from_its_file(kind, make, skip, tmp_path):
    """Same logits, to the bit; the file is about as large as the codes; a tied embedding looks up what the head multiplies."""
    model = replace.unfuse(make())
    plain = model(IDS)
    described = {}
    for name in replace.layers_of(model, skip):
        described |= replace.replace(model, name, kind, KINDS[kind])
    assert ('lm_head' in described) == (not skip) and len(described) == 8 + (not skip) * (2 if make is gpt else 1)
    logits = model(IDS)
    assert 0 < (logits - plain).abs().max() < 0.5
    if not skip:
        rows = model.wte(IDS)
        weight = model.lm_head.weight.float() if kind == 'half' else model.lm_head.effective_weight()
        assert torch.equal(rows, weight[IDS])
    path = str(tmp_path / 'x.safetensors')
    size = common.save_packed(model, path, {'quantized': described})
    meta, tensors = common.read_packed(path)
    assert sum(t.nbytes for t in tensors.values()) < size < sum(t.nbytes for t in tensors.values()) + 12_000
    again = common.load_packed(replace.restore(make(), meta['quantized'], tensors), tensors)
    assert torch.equal(again(IDS), logits) and not any(p.requires_grad for m in again.modules() if isinstance(m, layers.LowBit)
                                                       for p in m.parameters())
    assert not skip or torch.equal(again.wte.weight, model.wte.weight)
    assert skip or not any(isinstance(m, nn.Embedding | nn.Linear) for m in again.modules())


def test_a_file_of_another_shape_is_refused(tmp_path):
    """restore() of a wider model raises ValueError with the bytes that are there and the weights that are wanted."""
    model, described = gpt(), {}
    for name in replace.layers_of(model, 'head,embd'):
        described |= replace.replace(model, name, 'nf4', {})
    common.save_packed(model, str(tmp_path / 'x.safetensors'), {})
    tensors = common.read_packed(str(tmp_path / 'x.safetensors'))[1]
    wider = GPT(GPTConfig(vocab_size=96, block_size=16, n_layer=2, n_head=2, n_embd=128, bias=True))
    with pytest.raises(ValueError, match='bytes of codes for 384 x 128 weights'):
        replace.restore(wider, described, tensors)


def test_skip_takes_words_names_and_globs():
    """head and embd, words between dots and globs leave layers out; a tied head goes with its embedding."""
    model, inside = gpt(), 'blocks.0.attn.c_attn blocks.0.attn.c_proj blocks.0.mlp.c_fc blocks.0.mlp.c_proj'
    inside = inside.split() + inside.replace('blocks.0', 'blocks.1').split()
    assert list(replace.layers_of(model, 'head,embd')) == inside
    assert list(replace.layers_of(model, ' embd ')) == inside                        # a tied head goes with its embedding
    assert list(replace.layers_of(model, 'head')) == ['wpe', *inside]                # ... and the other way round
    assert set(replace.layers_of(model, '')) == {'wpe', 'lm_head', *inside}
    assert list(replace.layers_of(model, 'head,embd,blocks.0,*c_fc')) == ['blocks.1.attn.c_attn', 'blocks.1.attn.c_proj',
                                                                            'blocks.1.mlp.c_proj']
    with pytest.raises(ValueError, match="skip='nothing' names no layer; the layers are wte, wpe, blocks.0"):
        replace.layers_of(model, 'nothing')
    with pytest.raises(ValueError, match='nothing to quantize'):
        replace.layers_of(model, 'head,embd,blocks')


def test_an_unfused_model_is_the_same_function():
    """unfuse() of a full-precision BitNet changes no output and gives eight layers to quantize."""
    model = bitnet()
    apart = replace.unfuse(copy.deepcopy(model))
    assert torch.equal(apart(IDS), model(IDS)) and len(replace.layers_of(apart, 'head,embd')) == 8


def test_subclasses_and_layers_tied_to_them_are_left_alone():
    """An embedding of another class may compute something else, so it and its tied head are not replaced."""
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 8
    model = nn.Module()
    model.embed, model.body, model.head = Scaled(10, 4), nn.Linear(4, 4), nn.Linear(4, 10, bias=False)
    model.head.weight = model.embed.weight
    assert list(replace.layers_of(model, '')) == ['body']


@pytest.mark.parametrize('kind', KINDS)
def test_no_ids_are_no_rows(kind):
    """A packed embedding takes an empty batch; one whose groups go over the ends of its rows is refused."""
    embedding = replace.PackedEmbedding(layers.as_kind(nn.Linear(64, 10, bias=False), kind, KINDS[kind], True))
    assert embedding(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 64)
    if kind == 'nf4':
        with pytest.raises(ValueError, match='rows of 24 weights .* groups of 64'):
            replace.replace(nn.Sequential(nn.Embedding(32, 24)), '0', 'nf4', {})
