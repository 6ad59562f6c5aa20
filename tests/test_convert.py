"""linear(), conv2d(), convert(), pack(): models whose layers are replaced by name, their bytes, and their packed files."""
import copy
import math
import shutil

import pytest
import torch
import torch.nn as nn
from formulas import filled, fixed  # noqa: F401
from safetensors.torch import save

import layers
from common import load_packed, read_packed, save_packed
from conftest import ROOT
from layers import (BinaryConv2d, BinaryEmbedding, BinaryLinear, Conv4bit, Linear4bit, TernaryConv2d, TernaryLinear, conv2d,
                    convert, linear, model_bytes, pack)
from pretrained import replace  # its formats too are in FORMATS
from train_gpt import GPT, GPTConfig

# ------------------------------------------------------------------------------------------------------- the formats


@pytest.mark.parametrize('make, size, x, classes', [
    (linear, (5, 6), (2, 5), dict(fp=nn.Linear, bin=BinaryLinear, tern=TernaryLinear, int4=Linear4bit)),
    (conv2d, (4, 8, 3, 2, 1), (2, 4, 7, 6), dict(fp=nn.Conv2d, bin=BinaryConv2d, tern=TernaryConv2d, int4=Conv4bit))],
    ids=['linear', 'conv2d'])
def test_linear_and_conv2d_make_each_kind(make, size, x, classes):
    """They give the class of the kind; bias, act and the options of the kind reach it."""
    for kind, cls in classes.items():
        for bias in (True, False):
            layer = make(kind, *size, bias=bias)
            assert type(layer) is cls and (layer.bias is not None) == bias and layer(torch.randn(x)).shape[1] == size[1]
        assert kind == 'fp' or (make(kind, *size, act='gelu').act, layer.kind) == ('gelu', kind)
    assert make('bin', *size, alpha=0.5).alpha.eq(0.5).all()
    assert layer.packed_bytes() != make('int4', *size, bias=False, group=64).packed_bytes()


@pytest.mark.parametrize('kind', layers.FORMATS)
def test_the_table_of_formats_says_what_its_modules_are(kind):
    """A layer of each entry has its name as `kind`; act and chunks are taken where the entry says so, and only there."""
    form, model = layers.FORMATS[kind], nn.Sequential(nn.Linear(8, 6))
    options = {'group': dict(group=0), 'lowrank': dict(rank=2)}.get(kind, {})
    assert convert(model, {'0': (kind, options)}, verbose=False) == ([] if kind == 'fp' else ['0'])
    assert isinstance(model[0], form.linear) and getattr(model[0], 'kind', 'fp') == kind
    assert layers.is_linear(model[0]) == (kind != 'lora') and (kind in layers.KINDS) == form.trains
    if kind not in ('lowrank', 'lora'):
        chunked = linear(kind, 8, 6, chunks=3, **options)
        assert hasattr(chunked, 'chunks') == form.chunks and getattr(chunked, 'chunks', 3) == 3
        if form.act:
            assert linear(kind, 8, 6, act='relu', **options).act == 'relu'
        else:
            with pytest.raises(ValueError, match="act='relu'"):
                linear(kind, 8, 6, act='relu', **options)


class Tenths(layers.LowBitLinear):
    """A format of one's own: multiples of a tenth from -12.8 to 12.7, in a byte."""
    kind, bits = 'tenths', 8

    def encode(self):
        return {'code': (self.weight * 10).round().clamp(-128, 127).to(torch.int8)}

    def decode(self):
        return self.code / 10, None

    def decoder(self, dtype):
        return lambda i, j: (self.code[i:j] / 10).to(dtype)

    def look_up(self, ids):
        return self.code[ids] / 10

    def rounded(self, weight):
        return (weight * 10).round().clamp(-128, 127) / 10


def test_a_new_format_is_a_class_and_a_line_in_the_table(tmp_path, monkeypatch):
    """With an entry in FORMATS a layer is made, converted to, trained, packed, wrapped by LoRA, merged, and kept in a file."""
    monkeypatch.setitem(layers.FORMATS, 'tenths', layers.Format(Tenths, act=True))
    assert linear('tenths', 4, 3, act='gelu').act == 'gelu'
    model, x = nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 4), nn.Linear(4, 9)), torch.tensor([[0, 8], [3, 3]])
    convert(model, {'1': 'tenths', '2': ('lora', dict(rank=2, base='tenths'))}, verbose=False)
    y = model(x)
    y.sum().backward()
    assert model[1].weight.grad is not None and model[2].base.packed and torch.equal(pack(model)(x), y)
    assert model_bytes(model)[0] == 4 * 45 + (20 + 4 * 4) + (36 + 4 * 9 + 4 * 2 * (4 + 9))
    nn.init.normal_(model[2].lora_B)
    merged, damage = model[2].merge(torch.randn(3, 4), requantize=True)
    assert type(merged) is Tenths and merged.packed and damage['max'] < 0.2 * 9
    plain = lambda: nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 4))
    model = plain()
    described = {n: e for name in '01' for n, e in replace.replace(model, name, 'tenths', {}).items()}
    save_packed(model, tmp_path / 'x', {'quantized': described})
    meta, tensors = read_packed(tmp_path / 'x')
    assert torch.equal(load_packed(replace.restore(plain(), meta['quantized'], tensors), tensors)(x), model(x))


ALONE = """
import torch, layers, optim
torch.manual_seed(0)
model = torch.nn.Sequential(layers.linear('tern', 16, 32), layers.linear('bin', 32, 32, act='relu'), torch.nn.Linear(32, 4))
layers.convert(model, {'2': 'nf4'}, verbose=False)
x, target, losses = torch.randn(64, 16), torch.randint(4, (64,)), []
optimizer = optim.RSVDAdam(model.parameters(), lr=0.03, rank=8)
for _ in range(30):
    loss = torch.nn.functional.cross_entropy(model(x), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
y = model(x)
print(losses[-1] < 0.7 * losses[0], torch.equal(layers.pack(model)(x), y), *layers.model_bytes(model))
"""


def test_three_files_and_the_optimizer_work_alone(start, tmp_path):
    """layers.py, quant.py and their kernels, copied to an empty folder, train and pack three formats; optim.py too."""
    for name in ('layers.py', 'quant.py', 'kernels.c', 'kernels_triton.py', 'optim.py'):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / 'alone.py').write_text(ALONE)
    done = start('alone.py', cwd=tmp_path, real=True, PYTHONPATH='').wait()        # no other file of this project
    assert done.code == 0, done.err
    trained, same, packed, fp32 = done.out.split()
    assert (trained, same) == ('True', 'True')
    # codes, scale, gain, bias; codes, bits of the bias, alpha; codes, fp16 scales, bias
    assert int(packed) == (32 * 4 + 4 + 64 + 128) + (32 * 4 + 4 + 4) + (64 + 4 + 16)
    assert int(fp32) == 4 * (32 * 17 + 16 + 32 * 33 + 1 + 4 * 33)


# ----------------------------------------------------------------------------------------------------------- convert()


class Net(nn.Module):
    """Something of everything convert() meets: nesting, a tied head, a convolution, an embedding."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(11, 8)
        self.pos = nn.Embedding(3, 8)
        self.stem = nn.Conv2d(3, 8, (3, 1), stride=2, padding=1, groups=1, bias=False)
        self.blocks = nn.ModuleList(nn.ModuleDict({'fc': nn.Linear(8, 16), 'proj': nn.Linear(16, 8, bias=False)})
                                    for _ in range(2))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.wte.weight


def test_convert_takes_the_first_rule_that_matches(capsys):
    """Nested names, first match wins, tied weights left, weights and biases copied; prints what it did and did not."""
    model = Net().double()
    model.blocks[0].eval()
    nn.init.normal_(model.blocks[1]['fc'].bias)
    old = {n: p.detach().clone() for n, p in model.named_parameters()}
    rules = {'blocks.0.proj': 'fp', 'blocks.*.fc': ('bin', dict(alpha=0.5, chunks=2)), 'blocks.*': 'tern', '*': 'bin'}
    names = convert(model, rules)
    assert names == ['pos', 'stem', 'blocks.0.fc', 'blocks.1.fc', 'blocks.1.proj']
    assert capsys.readouterr().out.splitlines() == [
        'convert: pos -> bin', 'convert: stem -> bin', 'convert: blocks.0.fc -> bin', 'convert: blocks.1.fc -> bin',
        'convert: blocks.1.proj -> tern', 'convert: wte left (its weight is tied to another module)',
        'convert: blocks.0.proj left (fp by rule or no rule)',
        'convert: head left (its weight is tied to another module)']
    kinds = [type(model.get_submodule(n)) for n in names]
    assert kinds == [BinaryEmbedding, BinaryConv2d, BinaryLinear, BinaryLinear, TernaryLinear]
    assert model.head.weight is model.wte.weight and type(model.blocks[0]['proj']) is nn.Linear
    new = dict(model.named_parameters())
    assert all(torch.equal(new[n], p) for n, p in old.items()) and all(p.dtype == torch.float64 for p in new.values())
    assert model.blocks[1]['fc'].alpha.tolist() == [[0.5], [0.5]]
    assert not model.blocks[0]['fc'].training and model.blocks[1]['fc'].training
    assert model.stem.bias is None and model.stem(torch.randn(1, 3, 8, 8).double()).shape == (1, 8, 4, 5)


@pytest.mark.parametrize('options', [dict(kernel_size=(2, 3), padding='same', dilation=2, bias=True),
                                     dict(kernel_size=3, stride=(1, 2), padding=(1, 0), groups=2, bias=False)], ids=str)
@pytest.mark.parametrize('kind, more', [('bin', {}), ('tern', {}), ('int4', dict(format='nf4', act='gelu'))], ids=str)
def test_convert_gives_what_conv2d_makes(kind, more, options):
    """convert() copies weight, bias and geometry of a convolution, and packed=True packs it."""
    model = nn.Sequential(nn.Conv2d(4, 8, **options), nn.ReLU(inplace=True)).double()
    want = conv2d(kind, 4, 8, **options, **more).double()
    want.load_state_dict(model[0].state_dict(), strict=False)
    twin, x = copy.deepcopy(model), torch.randn(2, 4, 7, 6).double()
    assert convert(model, {'0': (kind, more)}, verbose=False) == ['0'] and type(model[0]) is type(want)
    assert convert(twin, {'0': (kind, more)}, verbose=False, packed=True) == ['0'] and twin[0].packed
    assert torch.equal(model[0](x), want(x)) and torch.equal(twin[0](x), want(x)) and not model[1].inplace
    assert (model[0].bias is None) == (not options['bias']) and model[0].weight.dtype == torch.float64


def test_convert_says_which_modules_have_no_such_form(capsys):
    """Other padding than zeros, nf4 convolutions, embeddings but binary ones and those with max_norm are left and named. One
    module under two names is left."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1, padding_mode='reflect'), nn.Linear(2, 2),
                          nn.Embedding(3, 2, max_norm=1.0), nn.Embedding(3, 2))
    assert convert(model, {'0': 'nf4', '1': 'tern', '2': 'int4', '3': 'bin', '4': 'int4'}) == ['2']
    out = capsys.readouterr().out.splitlines()
    assert out == ['convert: 2 -> int4', 'convert: 0 left (no nf4 form of Conv2d)', 'convert: 1 left (no tern form of Conv2d)',
                   'convert: 3 left (no bin form of Embedding)', 'convert: 4 left (no int4 form of Embedding)']
    assert isinstance(model[2], Linear4bit)
    assert convert(model, {'0': 'bin'}, verbose=False) == ['0'] and not capsys.readouterr().out
    model = nn.ModuleDict({'a': nn.Linear(4, 4)})
    model['b'] = model['a']                     # replacing it under one name only would part the two
    assert convert(model, {'*': 'bin'}, verbose=False) == [] and model['a'] is model['b']


@pytest.mark.parametrize('model, rules, says', [
    (Net, {'nope.*': 'bin', '*': 'fp'}, 'nope'), (Net, {'*': 'int7'}, 'int7'), (Net, {'wte': 'bin', 'blocks': 'bin'}, 'blocks'),
    (lambda: nn.Linear(4, 4), {'*': 'bin'}, 'linear')])
def test_convert_refuses_before_it_changes_anything(model, rules, says):
    """A pattern that matches nothing, an unknown kind, a bare layer: ValueError naming it, and the model is as before."""
    model = model()
    before = str(model)
    with pytest.raises(ValueError, match=says):
        convert(model, rules, verbose=False)
    assert str(model) == before


@pytest.mark.parametrize('last, says', [
    (('bin', dict(nope=1)), r"convert: 3 -> bin {'nope': 1}: .*nope"),
    (('nf4', dict(group=5)), r"convert: 3 -> nf4 {'group': 5}: .*group=5"),
    (('lora', dict(rank=0)), r"convert: 3 -> lora {'rank': 0}: .*rank=0"),
    (('lora', dict(base=('int4', dict(group=3)))), r'convert: 3 -> lora .*group=3'),
    ('half', r'convert: 3 -> half {}: HalfLinear: .*float16'),
    (('lowrank', dict(rank=99)), r"convert: 3 -> lowrank {'rank': 99}: .*rank=99"),
    ('lowrank', r'convert: 3 -> lowrank {}: .*rank')], ids=str)
def test_convert_changes_all_layers_or_none(last, says):
    """An error at the last layer is one line that names it; the layers before it, low-bit ones too, are as they were."""
    for rule in ('bin', 'lora', ('lora', dict(base='nf4')), 'half'):
        model = nn.Sequential(nn.Linear(8, 8), BinaryLinear(8, 8), nn.Identity(), nn.Linear(8, 8), nn.Linear(8, 8))
        model[2].inplace = True
        model[3].weight.data[1, 2] = 1e5
        before, text, x = copy.deepcopy(model.state_dict()), str(model), torch.randn(3, 8)
        y = model(x)
        with pytest.raises(ValueError, match=f'^{says}') as raised:
            convert(model, {'[01]': rule, '3': last, '4': rule}, verbose=False)
        assert '\n' not in str(raised.value) and str(model) == text and model[2].inplace
        assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items()) and torch.equal(model(x), y)
        assert all(p.requires_grad for p in model.parameters()) and not model[1].packed


def test_convert_refuses_numbers_that_are_not_finite():
    """half refuses weights and biases beyond its range, lowrank refuses nan; bf16 has the range."""
    for name, value, rule, fits in [('weight', 7e4, 'half', 0), ('bias', -7e4, 'half', 0), ('weight', math.nan, 'half', 0),
                                    ('weight', 7e4, ('half', dict(dtype=torch.bfloat16)), 1), ('weight', 65504, 'half', 1),
                                    ('weight', math.nan, ('lowrank', dict(rank=2)), 0),
                                    ('weight', -math.inf, ('lora', dict(base=('lowrank', dict(rank=2)))), 0)]:
        model = nn.Sequential(nn.Linear(4, 4))
        model[0].get_parameter(name).data.view(-1)[0] = value
        if fits:
            assert convert(model, {'0': rule}, verbose=False) == ['0'] and model(torch.ones(1, 4)).isfinite().all()
        else:
            with pytest.raises(ValueError, match='^convert: 0 -> .*finite'):
                convert(model, {'0': rule}, verbose=False)
            assert type(model[0]) is nn.Linear


def test_convert_puts_no_base_over_a_low_bit_layer(capsys):
    """A base is made of a full-precision layer; a low-bit layer is left and named, and wrapped where no base is asked for."""
    model = nn.Sequential(TernaryLinear(4, 4), nn.Conv2d(1, 1, 1))
    assert convert(model, {'*': ('lora', dict(base='nf4'))}) == []
    out = capsys.readouterr().out.splitlines()
    assert out == ["convert: 0 left (no lora form of TernaryLinear with base='nf4')",
                   "convert: 1 left (no lora form of Conv2d with base='nf4')"]
    assert not model[0].packed and convert(model, {'0': 'lora'}) == ['0'] and model[0].base.packed
    assert 'convert: 1 left (fp by rule or no rule)' in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ bytes and files


@pytest.mark.parametrize('n, mb', [(3, 415.2), (12, 168.4)])
def test_gpt2_with_binary_blocks_takes_the_published_bytes(n, mb):
    """GPT-2 124M, vocabulary 50,304: 497.5 MB in fp32, packed 82.3 MB less for every three binary blocks."""
    with torch.device('meta'):
        model = GPT(GPTConfig(50304, 1024, 12, 12, 768, binary_blocks=tuple(range(n))))
    assert [size / 1e6 for size in model_bytes(model)] == pytest.approx([mb, 497.5], abs=0.1)


def test_model_bytes_counts_the_same_before_and_after_packing():
    """Biases, alphas, gains and plain layers are counted, packed or not; fp32 bytes do not depend on the state."""
    low = [BinaryLinear(13, 6), BinaryEmbedding(11, 7), BinaryConv2d(3, 5, 3), TernaryLinear(13, 6, True), Linear4bit(13, 6)]
    model = nn.Sequential(nn.Linear(13, 13).bfloat16(), *low)
    want = 13 * 14 * 2 + 17 + 16 + 41 + 104 + 74, 4 * sum(p.numel() for p in model.parameters())
    assert model_bytes(model) == want
    assert pack(model) is model and model_bytes(model) == want == (sum(t.nbytes for t in model.state_dict().values()), want[1])


def gpt():
    return GPT(GPTConfig(97, 16, 2, 1, 64, bias=True, qkv_proj='bin', c_proj='tern', mlp_proj='int4', binary_blocks=(0, 1),
                         output_gains=True))


def cnn():
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), BinaryConv2d(4, 6, 3, padding=1),
                         BinaryConv2d(6, 6, 3, groups=2, act='relu'), TernaryConv2d(6, 8, 2, padding='same', act='relu'),
                         nn.BatchNorm2d(8), Conv4bit(8, 5, 1, act='relu'), Conv4bit(5, 5, (3, 1), format='fit4'))


def mixed():
    model = nn.Sequential(*(nn.Linear(48, 48) for _ in range(10)))
    rules = {'0': 'int4', '1': 'nf4', '2': ('fit4', dict(group=64)), '3': 'int8', '4': 'half', '5': ('lowrank', dict(rank=5)),
             '6': ('lora', dict(rank=3, base='nf4')), '7': 'tern', '8': 'bin', '9': ('nf4', dict(scales='8bit'))}
    assert len(convert(model, rules, verbose=False)) == 10
    nn.init.normal_(model[6].lora_B)
    return model


@pytest.mark.parametrize('make, x', [(gpt, torch.arange(18).view(2, 9)),
                                     (cnn, torch.linspace(0, 9, 486).sin().view(2, 3, 9, 9)),
                                     (mixed, torch.linspace(-9, 9, 240).sin().view(5, 48))], ids=['gpt', 'cnn', 'mixed'])
def test_a_packed_file_gives_the_same_outputs(tmp_path, make, x):
    """A file holds model_bytes() and a header. A fresh model, loaded from it or from a state_dict, gives equal outputs."""
    model, path = make().eval(), tmp_path / 'packed.safetensors'
    if make is not mixed:
        filled(model, torch.float32)
    y, foretold = model(x), model_bytes(model)
    assert not torch.equal(y, make().eval()(x)) and torch.equal(copy.deepcopy(model)(x), y)
    size = save_packed(model, path, {'step': 7, 'name': 'é'})
    assert torch.equal(model(x), y) and model_bytes(model) == foretold      # packed already, counted the same
    running = sum(b.nbytes for m in model if isinstance(m, nn.BatchNorm2d) for b in m.buffers()) if make is cnn else 0
    header = 8 + int.from_bytes(path.read_bytes()[:8], 'little')
    assert size == path.stat().st_size == foretold[0] + running + header and header < 8192
    meta, tensors = read_packed(path)
    assert meta.pop('checksum') and meta == {'step': 7, 'name': 'é'} and [p.name for p in tmp_path.iterdir()] == [path.name]
    fresh, other = load_packed(make().eval(), tensors), pack(make().eval())
    other.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), y) and torch.equal(other(x), y) and model_bytes(fresh) == foretold
    assert make is not gpt or fresh.lm_head.weight is fresh.wte.weight


@pytest.mark.parametrize('other, says', [
    (lambda: BinaryLinear(16, 6), r'0\.'), (lambda: BinaryLinear(8, 6, bias=False), r'0\.'),
    (lambda: TernaryLinear(8, 6), r'0\.'), (lambda: Linear4bit(32, 4, format='nf4', group=32, scales='8bit'), 'absmax')])
def test_load_packed_refuses_a_file_of_another_shape(tmp_path, other, says):
    """Missing names, other shapes or scales of another type raise ValueError that names one of them."""
    save_packed(nn.Sequential(BinaryLinear(8, 6) if says != 'absmax' else Linear4bit(32, 4, format='fit4')), tmp_path / 'a', {})
    with pytest.raises(ValueError, match=says):
        load_packed(nn.Sequential(other()), read_packed(tmp_path / 'a')[1])


def test_a_damaged_or_foreign_file_is_named(tmp_path):
    """A cut file, one flipped bit, no safetensors at all, another program's: ValueError with the path in it."""
    path = tmp_path / 'odd.safetensors'
    save_packed(nn.Sequential(BinaryLinear(64, 64)), path, {})
    whole = path.read_bytes()
    foreign = [save({'w': torch.ones(3)}, metadata) for metadata in (
        None, {'format': 'pt'}, {'nanobit': '{'}, {'nanobit': '[1]'})]
    for raw in (whole[:-100], whole[:-1] + bytes([whole[-1] ^ 1]), b'', b'this is not a model, it is a line of text', *foreign):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match='odd.safetensors'):
            read_packed(path)


def test_a_changed_header_is_refused(tmp_path):
    """A digit of the meta data or a name in the header changed: the checksum covers them. A file of an earlier version, which
    has only a checksum of the tensors, loads."""
    path = tmp_path / 'a.safetensors'
    save_packed(nn.Sequential(BinaryLinear(64, 64)), path, {'n_head': 4})
    whole = path.read_bytes()
    for old, new in ((b'n_head', b'n_heat'), (b'head\\": 4', b'head\\": 2'), (b'0.alpha', b'0.alphb')):
        assert whole.count(old) == 1
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(ValueError, match=r'a\.safetensors is damaged'):
            read_packed(path)
    path.write_bytes(whole.replace(b'crc32', b'other'))
    assert read_packed(path)[0]['n_head'] == 4
