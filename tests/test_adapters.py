"""LoRA over every kind of layer: values, gradients, merging and its damage, and files that peft reads and writes."""
import copy
import json

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from formulas import activated, filled, fixed, off  # noqa: F401
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from layers import Activation, LoRALinear, LowBit, TernaryLinear, convert
from pretrained.adapters import adapters, load_adapters, merge_adapters, only_adapters, save_adapters

# more than a kind alone, which stands for itself
OPTIONS = {'int8 act': dict(activations='int8', act='gelu'), 'int4 act': dict(act='relu'),
           'nf4 act': dict(act='gelu', scales='8bit'), 'tern bare': dict(norm=False),
           'tern gated': dict(act='silu_glu', chunks=(2, 4, 3)), 'bin act': dict(act='gelu', chunks=3), 'lowrank': dict(rank=5)}
every_base = pytest.mark.parametrize('name', ['fp', 'half', 'int8', 'fit4', *OPTIONS])


def lora(name, bias=True, size=(14, 9), **options):
    """A LoRALinear over the base of this name, with biases, gains and a B that matter."""
    model = nn.Sequential(nn.Linear(*size, bias))
    if name != 'fp':
        convert(model, {'0': (name.split()[0], OPTIONS.get(name, {}))}, verbose=False)
    if getattr(model[0], 'gain', None) is not None:
        nn.init.uniform_(model[0].gain, 0.5, 1.5)
    convert(model, {'0': ('lora', dict(rank=3, alpha=6.0) | options)}, verbose=False)
    nn.init.normal_(model[0].lora_B, std=0.1)
    return model[0]


def inputs(layer, *shape):
    """Random x of this shape and of the layer's width, which is twice `in` where a gate comes with it."""
    return torch.randn(*shape, 28 if 'glu' in (getattr(layer.base, 'act', None) or '') else 14)


def seen(layer, x):
    """The numbers that the weight of the base is multiplied by, literally."""
    x = activated(layer.base, x) if hasattr(layer.base, 'act') else x
    if getattr(layer.base, 'gain', None) is not None:
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.base.gain
    return x


def reference(layer, base, x):
    return base(x) + layer.alpha / layer.rank * (seen(layer, x) @ layer.lora_A.T @ layer.lora_B.T)


def loras(model):
    return [m for m in model.modules() if isinstance(m, LoRALinear)]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# ------------------------------------------------------------------------------------------------ values and gradients


@every_base
def test_lora_is_its_formula(name):
    """y = base(x) + alpha / r B A x', x' what the weight of the base sees; only x, A and B get gradients."""
    layer = lora(name)
    x = inputs(layer, *[(5,), (2, 3), ()][len(name) % 3]).requires_grad_()
    base, wanted, v = copy.deepcopy(layer.base), [x, layer.lora_A, layer.lora_B], torch.randn(*x.shape[:-1], 9)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ['lora_A', 'lora_B'] and len(base.state_dict()) > 1
    want = [reference(layer, base, x), *torch.autograd.grad(reference(layer, base, x), wanted, v)]
    for g, w in zip([layer(x), *torch.autograd.grad(layer(x), wanted, v)], want, strict=True):
        assert_close(g, w, rtol=1e-5, atol=1e-5)
    layer(x).sum().backward()
    assert all(p.grad is None for p in layer.base.parameters()) and getattr(layer.base, 'packed', True)
    nn.init.zeros_(layer.lora_B)
    assert torch.equal(layer(x), base(x))


def test_dropout_is_for_training_and_a_new_adapter_adds_nothing():
    """Evaluation has no dropout. B is zero at first, A within 1 / sqrt(in)."""
    layer, x = lora('nf4 act', dropout=0.5), torch.randn(5, 14)
    assert not torch.equal(layer.train()(x), layer(x)) and torch.equal(layer.eval()(x), layer(x))
    assert_close(layer(x), reference(layer, layer.base, x), rtol=1e-5, atol=1e-5)
    fresh = LoRALinear(nn.Linear(4000, 2))
    assert not fresh.lora_B.any() and 0.95 < fresh.lora_A.abs().max() * 4000 ** 0.5 <= 1 and fresh.lora_A.shape == (8, 4000)


# ------------------------------------------------------------------------------------------------------------- merging

# relative distance of the merged output allowed: (in full precision, requantized)
ALLOWED = {'fp': (1e-6, 1e-6), 'half': (1e-6, 2e-3), 'int8': (1e-6, 0.02), 'int8 act': (0.02, 0.03), 'int4 act': (1e-6, 0.2),
           'nf4 act': (1e-6, 0.2), 'fit4': (1e-6, 0.2), 'lowrank': (1e-5, 0.9), 'tern bare': (0.02, 1.5),
           'tern gated': (0.02, 1.5), 'bin act': (None, 1.5)}


@every_base
@pytest.mark.parametrize('requantize', [False, True])
def test_merging_and_the_damage_it_reports(name, requantize):
    """The merged layer computes base and adapter as well as its format can, and the damage says how well, on x."""
    layer = lora(name, bias=len(name) % 2 == requantize)
    x = inputs(layer, 6)
    before = copy.deepcopy(layer.state_dict())
    allowed = ALLOWED[name][requantize]
    if allowed is None:
        with pytest.raises(ValueError, match=r'^BinaryLinear: [^\n]*requantize=True$'):
            layer.merge(x)
    else:
        new, damage = layer.merge(x, requantize)
        difference = (new(x) - reference(layer, layer.base, x)).abs()
        assert damage == {'max': pytest.approx(difference.max().item(), abs=1e-6),
                          'mean': pytest.approx(difference.mean().item(), abs=1e-6)}
        assert off(new(x), layer(x)) <= allowed and (allowed < 0.01 or damage['max'] > damage['mean'] > 0)
        assert not loras(new) and not any(p.requires_grad for p in new.parameters())
        if requantize:
            assert type(new) is type(layer.base) and getattr(new, 'packed', True)
            assert sum(t.nbytes for t in new.state_dict().values()) == sum(t.nbytes for t in layer.base.state_dict().values())
        else:
            assert not any(isinstance(m, LowBit) for m in new.modules())
            if name == 'tern gated':
                assert [type(m) for m in new] == [Activation, nn.RMSNorm, nn.Linear]
    assert same(layer.state_dict(), before)


def test_a_merge_requantizes_each_chunk_by_itself():
    """Chunks of 6, 2 and 4 rows keep their scales when packed, and get new ones from the merged weights."""
    rows = (6, 2, 4)
    layer, x = filled(TernaryLinear(7, 12, chunks=rows, norm=False), torch.float32), torch.randn(5, 7)
    layer.weight.data.mul_(torch.tensor([1.0, 10.0, 0.1]).repeat_interleave(torch.tensor(rows))[:, None])
    sizes = [w.abs().mean().item() for w in layer.weight.split(rows)]
    want = torch.cat([(w / s).round().clamp(-1, 1) * s for w, s in zip(layer.weight.split(rows), sizes, strict=True)]).detach()
    assert_close(layer.pack_().effective_weight(), want, rtol=1e-6, atol=0)
    assert layer.ternary()[1].tolist() == pytest.approx(sizes, rel=1e-6)
    delta = torch.randn(12, 7) * want.abs().amax(1, keepdim=True)
    with torch.no_grad():
        plain, again = layer.merged(delta, False, x), layer.merged(delta, True, x)
    assert type(plain) is nn.Linear and torch.equal(plain.weight, layer.effective_weight() + delta)
    for i, (w, d, code) in enumerate(zip(layer.decode()[0].split(rows), delta.split(rows), layer.ternary()[0].split(rows),
                                         strict=True)):
        w = w + d / code.ne(0).float().mean()       # a scale of mean|w| takes this share from it
        assert again.ternary()[1][i].item() == pytest.approx(w.abs().mean().item(), rel=1e-6)
        assert torch.equal(again.ternary()[0].split(rows)[i], (w / w.abs().mean()).round().clamp(-1, 1).to(torch.int8))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
@pytest.mark.parametrize('name', ['fp', 'nf4', 'tern'])
def test_merging_a_model_of_another_dtype(name, dtype):
    """A bf16 or fp64 model with adapters merges to a layer that takes the same inputs."""
    model = nn.Sequential(lora(name)).to(dtype)
    x = torch.randn(6, 14).to(dtype)
    want = model(x)
    merge_adapters(model, x)
    assert model(x).dtype == dtype and off(model(x), want) < 0.03


def test_merging_over_a_binary_layer_without_normalization():
    """Its output is a plain product with -1/2 and 1/2, so base and adapter have a full-precision equivalent."""
    model = nn.Sequential(nn.Linear(14, 9, bias=False))
    convert(model, {'0': ('lora', dict(rank=3, base=('bin', dict(alpha=None))))}, verbose=False)
    nn.init.normal_(model[0].lora_B)
    x = torch.randn(5, 14)
    expected = x @ (model[0].base.effective_weight() + model[0].alpha / 3 * model[0].lora_B @ model[0].lora_A).T
    merged, damage = model[0].merge(x)
    assert set(model[0].base.effective_weight().unique().tolist()) == {-0.5, 0.5} and damage['max'] < 1e-5
    assert_close(merged(x), expected)


def test_a_failed_merge_leaves_the_layer_as_it_was():
    """Inputs that do not fit raise, and the layer still drops out in training. A bare layer cannot be replaced in place."""
    layer = lora('nf4', dropout=0.5).train()
    with pytest.raises(RuntimeError):
        layer.merge(torch.randn(2, 13))
    with pytest.raises(ValueError):
        merge_adapters(layer, torch.randn(2, 14))
    assert layer.training and not torch.equal(layer(torch.ones(4, 14)), layer(torch.ones(4, 14)))
    assert list(layer._modules) == ['base']


class Net(nn.Module):
    """Two blocks, one of them in a list, and a head that is not reached without `head`."""

    def __init__(self, width=16):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({'fc': nn.Linear(width, width), 'proj': nn.Linear(width, width)})
                                    for _ in range(2))
        self.fc = nn.Linear(width, width)

    def forward(self, x, head=True):
        for block in self.blocks:
            x = x + block['proj'](F.gelu(block['fc'](x)))
        return self.fc(x) if head else x


RULES = {'blocks.0.*': ('lora', dict(rank=4, alpha=8.0, base='nf4')), 'blocks.1.fc': ('lora', dict(rank=2, alpha=5.0)),
         'fc': ('lora', dict(rank=6, alpha=8.0, base='half'))}


def net(rules=RULES):
    model = Net()
    convert(model, rules, verbose=False)
    for m in loras(model):
        nn.init.normal_(m.lora_B, std=0.1)
    return model


def test_merge_adapters_of_a_model():
    """Every adapter is merged, no LoRA is left, the model computes the same, and each damage comes with its name."""
    model, x = net(), torch.randn(7, 16)
    model.blocks[0].eval()
    y, other = model(x), copy.deepcopy(model)
    damage = merge_adapters(model, x)
    assert list(damage) == ['blocks.0.fc', 'blocks.0.proj', 'blocks.1.fc', 'fc'] and not loras(model)
    assert max(d['max'] for d in damage.values()) < 1e-5
    assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    assert not model.blocks[0]['fc'].training and model.fc.training
    damage = merge_adapters(other, x, requantize=True)
    assert off(other(x), y) < 0.15 and damage['blocks.0.fc']['max'] > 1e-3 > 1e-5 > damage['blocks.1.fc']['max']
    for function in (merge_adapters, only_adapters):
        with pytest.raises(ValueError, match='no LoRA'):
            function(model)


@pytest.mark.parametrize('rules, head, why', [
    (RULES, False, 'reach fc'), ({'blocks.0.fc': ('lora', {}), 'fc': ('lora', dict(base='bin'))}, True, 'requantize=True')])
def test_merge_adapters_changes_nothing_on_an_error(rules, head, why):
    """An adapter that no input reaches, or one that cannot be merged: one line, and every adapter is where it was."""
    model = net(rules)
    before, text = copy.deepcopy(model.state_dict()), str(model)
    with pytest.raises(ValueError, match=why) as error:
        merge_adapters(model, torch.ones(2, 16), head)
    assert '\n' not in str(error.value) and str(model) == text and same(model.state_dict(), before)
    assert not any(m._forward_pre_hooks for m in model.modules())


class ByKeyword(Net):
    def forward(self, x):
        return self.fc(x=x)


def test_merge_adapters_of_layers_called_with_keywords():
    """merge_adapters() also sees the inputs of layers that are called as layer(x=...)."""
    model, x = ByKeyword(), torch.randn(5, 16)
    convert(model, {'fc': ('lora', dict(base='nf4'))}, verbose=False)
    nn.init.normal_(model.fc.lora_B, std=0.1)
    y = model(x)
    assert list(merge_adapters(model, x)) == ['fc'] and not loras(model) and off(model.fc(x), y) < 1e-5


@pytest.fixture
def one_process():
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize('wrapper, ran', [('compile', False), ('compile and ddp', True)])
def test_adapters_of_a_wrapped_model(one_process, tmp_path, wrapper, ran):
    """Trained parameters, names, files, loading and merging are those of the model inside, before it ran and after."""
    wrapped = lambda m: torch.compile(DistributedDataParallel(m) if 'ddp' in wrapper else m, backend='eager')
    model, x = net(), torch.randn(5, 16)
    inside = copy.deepcopy(model).eval()
    outside = only_adapters(wrapped(inside))
    assert {n.rpartition('.')[2] for n, p in inside.named_parameters() if p.requires_grad} == {'lora_A', 'lora_B'}
    with torch.no_grad():
        y = (outside if ran else model.eval())(x)
    assert list(adapters(outside)) == list(adapters(model))
    save_adapters(model, tmp_path / 'a', 'name')
    save_adapters(outside, tmp_path / 'b', 'name')
    for name in ('adapter_model.safetensors', 'adapter_config.json'):
        assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes()
    for m in loras(inside):
        nn.init.normal_(m.lora_B)
    assert load_adapters(outside, tmp_path / 'a') == list(adapters(model)) and off(outside(x), y) < 1e-6
    damage = merge_adapters(outside, x)
    assert list(damage) == ['blocks.0.fc', 'blocks.0.proj', 'blocks.1.fc', 'fc'] and not loras(inside)
    assert max(d['max'] for d in damage.values()) < 1e-5 and off(inside(x), y) < 1e-5
    assert wrapper != 'compile' or off(outside(x), y) < 1e-5                                # DDP would look for its buffers


# --------------------------------------------------------------------------------------------------------------- files


def test_files_have_the_layout_of_peft(tmp_path):
    """Tensors and config have peft's names; ranks and alphas that differ by layer are in its patterns."""
    from safetensors.torch import load_file
    model = net()
    save_adapters(model, tmp_path / 'a', 'some/model')
    assert sorted(p.name for p in (tmp_path / 'a').iterdir()) == [
        'adapter_config.json', 'adapter_model.safetensors', 'nanobit.json']         # peft ignores the last
    tensors = load_file(tmp_path / 'a' / 'adapter_model.safetensors')
    shapes = {k: tuple(t.shape) for k, t in tensors.items()}
    ranks = {'blocks.0.fc': 4, 'blocks.0.proj': 4, 'blocks.1.fc': 2, 'fc': 6}
    assert shapes == {f'base_model.model.{n}.lora_{ab}.weight': (r, 16) if ab == 'A' else (16, r)
                      for n, r in ranks.items() for ab in 'AB'}
    assert torch.equal(tensors['base_model.model.fc.lora_B.weight'], model.fc.lora_B)
    config = json.loads((tmp_path / 'a' / 'adapter_config.json').read_text())
    assert config['peft_type'] == 'LORA' and config['r'] == 4 and config['lora_alpha'] == 8.0 and config['bias'] == 'none'
    assert config['base_model_name_or_path'] == 'some/model' and sorted(config['target_modules']) == sorted(ranks)
    assert sorted(config['rank_pattern'].values()) == [2, 6] and list(config['alpha_pattern'].values()) == [5.0]


@pytest.mark.parametrize('bare', [True, False])
def test_adapters_round_trip(tmp_path, bare):
    """Ranks and alphas that differ by layer come back, into a model with LoRA or without it: equal outputs."""
    model, x = net(), torch.randn(5, 16)
    save_adapters(model, tmp_path)
    torch.manual_seed(0)
    other = net({'blocks.0.*': ('nf4', {}), 'fc': ('half', {})}) if bare else net()
    for m in loras(other):
        nn.init.normal_(m.lora_B)
        m.alpha = 1.0
    assert not torch.allclose(other(x), model(x))
    assert load_adapters(other, tmp_path) == list(adapters(model)) == list(adapters(other))
    assert torch.equal(other(x), model(x)) and {n: (m.rank, m.alpha) for n, m in adapters(other).items()} == {
        'blocks.0.fc': (4, 8.0), 'blocks.0.proj': (4, 8.0), 'blocks.1.fc': (2, 5.0), 'fc': (6, 8.0)}
    assert all(m.lora_A.requires_grad and not m.base.bias.requires_grad for m in adapters(other).values())


KEY = 'base_model.model.fc.lora_A.weight'
CONFIG = 'adapter_config.json'
# {what is wrong: (a function that changes tensors and config, or a file and its text, '' for none; part of the message)}
DAMAGE = {'missing': (lambda t, c: c.update(lora_alpha=1.0, alpha_pattern={}) or t.pop(KEY), KEY),
          'unknown': (lambda t, c: t.update({f'{KEY}x': torch.ones(2)}), f'{KEY}x'),
          'no such layer': (lambda t, c: t.update({k.replace('.fc.', '.gc.'): t[k].clone() for k in list(t)}), 'gc'),
          'wrong shape': (lambda t, c: t.update({KEY: torch.ones(6, 15)}), 'fc'),
          'wrong rank': (lambda t, c: t.update({KEY: torch.ones(5, 16)}), 'fc'),
          'no matrix': (lambda t, c: t.update({KEY: torch.ones(6)}), 'fc'),
          'other type': (lambda t, c: c.update(peft_type='IA3'), 'LoRA'),
          'rslora': (lambda t, c: c.update(use_rslora=True), 'LoRA'), 'no alpha': (lambda t, c: c.pop('lora_alpha'), 'alpha'),
          'list': ((CONFIG, '[1]'), CONFIG), 'no json': ((CONFIG, '{'), 'no LoRA'), 'no config': ((CONFIG, ''), 'no LoRA'),
          'no tensors': (('adapter_model.safetensors', 'x'), 'no LoRA')}


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    """A missing or unknown key, another shape, another kind of adapters: ValueError naming it, the model untouched."""
    from safetensors.torch import load_file, save_file
    models = [Net(), net()]
    before = [(copy.deepcopy(m.state_dict()), str(m), [p.requires_grad for p in m.parameters()]) for m in models]
    for damage, (change, why) in DAMAGE.items():
        folder = tmp_path / damage
        save_adapters(net(), folder)
        (folder / 'nanobit.json').unlink()          # its checksum would refuse what follows
        if callable(change):
            path = folder / 'adapter_model.safetensors'
            tensors, config = load_file(path), json.loads((folder / CONFIG).read_text())
            change(tensors, config)
            save_file(tensors, path)
            (folder / CONFIG).write_text(json.dumps(config))
        else:
            path = folder / change[0]
            path.write_text(change[1]) if change[1] else path.unlink()
        for model, (state, text, trained) in zip(models, before, strict=True):
            with pytest.raises(ValueError, match=why):
                load_adapters(model, folder)
            assert str(model) == text and same(model.state_dict(), state), damage
            assert [p.requires_grad for p in model.parameters()] == trained and all(m.alpha in (8.0, 5.0) for m in loras(model))


# --------------------------------------------------------------------------------------------------------- against peft


def distilbert():
    pytest.importorskip('peft', reason='peer test: needs peft')
    from transformers import DistilBertConfig, DistilBertForSequenceClassification
    config = DistilBertConfig(vocab_size=50, max_position_embeddings=16, n_layers=2, n_heads=2, dim=24, hidden_dim=40)
    return DistilBertForSequenceClassification(config).eval(), torch.randint(0, 50, (3, 9))


def test_peft_loads_our_adapters_and_we_load_them_back(tmp_path):
    """DistilBERT with our LoRA of several ranks and a trained head, saved; peft puts both onto a bare model: equal logits."""
    bare, ids = distilbert()
    ours, heads = copy.deepcopy(bare), ['classifier', 'pre_classifier']
    convert(ours, {'*.0.*.q_lin': ('lora', dict(rank=2, alpha=3.0)), '*.1.*.q_lin': ('lora', dict(rank=5)),
                   '*.v_lin': ('lora', dict(rank=4, alpha=9.0))}, verbose=False)
    for p in [*(m.lora_B for m in loras(ours)), *(ours.get_submodule(head).weight for head in heads)]:
        nn.init.normal_(p)
    save_adapters(ours, tmp_path / 'ours', 'distilbert', heads, 'SEQ_CLS')
    from peft import PeftModel
    plain, theirs = bare(ids).logits, PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path / 'ours').eval()
    assert off(ours(ids).logits, plain) > 0.01 and len(adapters(ours)) == 4
    assert off(theirs(ids).logits, ours(ids).logits) < 1e-6
    theirs.save_pretrained(tmp_path / 'theirs')
    load_adapters(bare, tmp_path / 'theirs')
    assert off(bare(ids).logits, ours(ids).logits) < 1e-6


@pytest.mark.parametrize('patterns', [dict(rank_pattern={'v_lin': 3}, alpha_pattern={'v_lin': 30}),
                                      dict(alpha_pattern={r'layer\.1\.attention\.q_lin': 30, '^distilbert.*0.*v_lin': 2})],
                         ids=['by name', 'by expression'])
def test_we_load_adapters_of_peft(tmp_path, patterns):
    """Adapters that peft saved with ranks and alphas by pattern give equal logits here."""
    bare, ids = distilbert()
    from peft import LoraConfig, get_peft_model
    config = LoraConfig(r=4, lora_alpha=6, target_modules=['q_lin', 'v_lin'], init_lora_weights=False, **patterns)
    theirs = get_peft_model(copy.deepcopy(bare), config).eval()
    theirs.save_pretrained(tmp_path)
    assert len(load_adapters(bare, tmp_path)) == 4
    assert_close(bare(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)


def test_peft_tells_apart_names_that_end_alike(tmp_path):
    """A model with `fc` and `blocks.0.fc` of different ranks and alphas: peft gives each its own."""
    peft = pytest.importorskip('peft', reason='peer test: needs peft')
    model, bare, x = Net(), Net(), torch.randn(4, 16)
    bare.load_state_dict(model.state_dict())
    convert(model, {'blocks.*.fc': ('lora', dict(rank=4)), 'fc': ('lora', dict(rank=2, alpha=3.0))}, verbose=False)
    for m in loras(model):
        nn.init.normal_(m.lora_B)
    save_adapters(model, tmp_path)
    assert_close(peft.PeftModel.from_pretrained(bare, tmp_path)(x), model(x), rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------------------------------- heads


def with_head(rank=3):
    model = nn.ModuleDict({'body': nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), 'head': nn.Sequential(nn.Linear(6, 4)),
                           'out': nn.Linear(4, 2)})
    if rank:
        convert(model, {'body.*': ('lora', dict(rank=rank))}, verbose=False)
        for m in loras(model):
            nn.init.normal_(m.lora_B)
    return model


def test_heads_are_kept_with_the_adapters(tmp_path):
    """Heads that were trained as a whole come back with the adapters, under peft's names; other weights stay."""
    from safetensors.torch import load_file
    model, other = with_head(), with_head(0)
    save_adapters(model, tmp_path, 'some/model', ['head', 'out'], 'SEQ_CLS')
    body = {k: t.clone() for k, t in other['body'].state_dict().items()}
    assert load_adapters(other, tmp_path) == ['body.0', 'body.1']
    after, expected = other.state_dict(), model.state_dict()
    assert all(torch.equal(after[k], t) for k, t in expected.items() if 'base' not in k)
    assert all(torch.equal(after[f'body.{k[0]}.base{k[1:]}'], t) for k, t in body.items())
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config['modules_to_save'] == ['head', 'out'] and config['task_type'] == 'SEQ_CLS'
    assert {k for k in load_file(tmp_path / 'adapter_model.safetensors') if 'lora' not in k} == {
        f'base_model.model.{k}' for k in ('head.0.weight', 'head.0.bias', 'out.weight', 'out.bias')}


def test_heads_that_do_not_fit_leave_the_model_alone(tmp_path):
    """Another number of labels, a head that is not there, one that the file lacks: one line, nothing changed."""
    from safetensors.torch import load_file, save_file
    save_adapters(with_head(), tmp_path, heads=['head', 'out'])
    (tmp_path / 'nanobit.json').unlink()            # its checksum would refuse what follows
    path, whole = tmp_path / 'adapter_model.safetensors', load_file(tmp_path / 'adapter_model.safetensors')
    wider, headless = with_head(0), with_head(0)
    wider['out'] = nn.Linear(4, 3)
    del headless['out']
    for model, kept in ((wider, whole), (headless, whole),
                        (with_head(0), {k: t for k, t in whole.items() if not k.endswith('out.bias')})):
        save_file(kept, path)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match='the weights of out do not fit the model'):
            load_adapters(model, tmp_path)
        assert same(model.state_dict(), before)


def test_damaged_adapters_are_refused(tmp_path):
    """One flipped bit of a weight or another class name: the file is named. Without nanobit.json, as peft leaves them, adapters
    load."""
    save_adapters(net(), tmp_path, labels=('yes', 'no'))
    for name, old, new in (('adapter_model.safetensors', b'', b'\x77'), ('nanobit.json', b'yes', b'yet')):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole.replace(old, new) if old else whole[:-1] + new)
        with pytest.raises(ValueError, match=r'adapter_model\.safetensors is damaged.*nanobit\.json'):
            load_adapters(net(), tmp_path)
        (tmp_path / name).write_bytes(whole)
    (tmp_path / 'nanobit.json').unlink()
    load_adapters(net(), tmp_path)
