"""calibrate.py: GPTQ against a direct solve, coordinate descent against trying everything, activation-aware scaling against its
definition, the walk through the blocks."""
import copy
import itertools
from functools import partial

import pytest
import torch
import torch.nn as nn
from formulas import fixed  # noqa: F401
from transformers import (
    AutoModel,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from conftest import random_ids, tiny_gpt
from pretrained import calibrate
from quant import GRIDS, group_grid, to_grid


def moments(x):
    m = calibrate.Moments(x.shape[1], x.device)
    m.add(x)
    return m


def correlated(n, tokens, seed=0):
    """Inputs (tokens, n) with a decaying spectrum and a mean, as those of a network are."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=g) * torch.logspace(0, -2, n)
    return torch.randn(tokens, n, generator=g) @ mix / n ** 0.5 + 0.1 * torch.randn(n, generator=g)


def output_error(weight, quantized, moments):
    """Squared error of the outputs relative to their square, tr(D H D^T) / tr(W H W^T), D = quantized - weight."""
    off = (quantized - weight).float()
    return (((off @ moments.H) * off).sum() / ((weight.float() @ moments.H) * weight.float()).sum()).item()


def weight(out, n, seed=1):
    return torch.randn(out, n, generator=torch.Generator().manual_seed(seed)) / n ** 0.5


def decoded(codes, scale, zero):
    groups = codes.unflatten(1, (scale.shape[1], -1))
    return ((groups - zero[..., None]) * scale[..., None]).flatten(1)


def nearest(w, levels, group):
    groups = w.unflatten(1, (-1, group or w.shape[1]))
    scale, zero = group_grid(groups, levels)
    return to_grid(groups, scale, zero, levels).flatten(1), scale[..., 0], zero[..., 0]


def damped(moments, damp=0.01):
    H = moments.H / moments.n
    return H + damp * H.diagonal().mean() * torch.eye(len(H))


def errors(target, H, codes, scale, zero):
    """tr((T - Q) H (T - Q)^T) of each row, in fp64."""
    off = (target - decoded(codes, scale, zero)).double()
    return ((off @ H.double()) * off).sum(1)


def direct(w, H, scale, zero, levels, order):
    """GPTQ as it is defined, in fp64 and without any of its algebra: round a column, then give the columns that are left the
    values that minimize tr((W' - W) H (W' - W)^T) with those before held fixed, from the normal equations."""
    group, H, now, codes = w.shape[1] // scale.shape[1], H.double(), w.double().clone(), torch.zeros_like(w)
    for i, j in enumerate(order):
        g = j // group
        codes[:, j] = to_grid(now[:, j].float(), scale[:, g], zero[:, g], levels)
        now[:, j] = ((codes[:, j] - zero[:, g]) * scale[:, g]).double()
        done, left = order[:i + 1], order[i + 1:]
        if left:
            off = (now - w.double())[:, done]
            now[:, left] = w.double()[:, left] - torch.linalg.solve(H[left][:, left], H[left][:, done] @ off.T).T
    return codes


@pytest.mark.parametrize('levels, group, order', [
    ('int4', 8, list(range(24))), ('int3', 0, [*range(1, 24, 2), *range(22, -1, -2)]), ('int2', 8, [*range(23, -1, -1)]),
    ('tern', 8, list(range(24))), ('bin', 0, list(range(24)))])
def test_rounding_column_by_column_is_the_direct_solve(levels, group, order):
    """Codes are those of rounding a column and solving for the columns that are left, in fp64, without GPTQ's algebra."""
    w, m = weight(6, 24), moments(correlated(24, 200))
    _, scale, zero = nearest(w, levels, group)
    codes = calibrate.rounded(w, calibrate.inverse_root((m.H / m.n)[order][:, order], 0.01), torch.tensor(order), scale, zero,
                              levels)
    expected = direct(w, damped(m), scale, zero, levels, order)
    # A weight that lies on the middle between two levels may go either way in fp32 and fp64.
    assert (codes != expected).float().mean() <= 0.02
    error = lambda codes: output_error(w, decoded(codes, scale, zero), m)
    assert error(codes) == pytest.approx(error(expected), rel=0.1)


@pytest.mark.parametrize('levels, group', [('int4', 16), ('int3', 64), ('int2', 32), ('tern', 16), ('bin', 64)])
def test_a_sweep_never_raises_the_error_of_a_row(levels, group):
    """Sweep after sweep no row's error rises, codes and scales stay what the format can store, and in the end they rest."""
    w, m = weight(8, 64), moments(correlated(64, 500))
    codes, scale, zero = nearest(w, levels, group)
    H, seen = damped(m), []
    for _ in range(20):
        seen.append(errors(w, H, codes, scale, zero))
        before, (codes, scale) = codes, calibrate.descend(w, H, codes, scale, zero, levels)
        assert codes.min() >= 0 and codes.max() < GRIDS[levels].steps and torch.equal(codes, codes.round())
        assert scale.min() > 0 and torch.equal(scale, scale.half().float())
    assert all((b <= a * (1 + 1e-5)).all() for a, b in itertools.pairwise(seen))
    assert seen[-1].sum() < 0.8 * seen[0].sum() and torch.equal(codes, before)


def test_descent_finds_the_best_codes_of_a_small_case():
    """Rows of five 2-bit weights on weakly correlated inputs: with their scale, none of all 1,024 codes has a smaller error."""
    w, m = weight(6, 5), moments(torch.randn(300, 5, generator=torch.Generator().manual_seed(0)) @ (torch.eye(5) + 0.1))
    H, (codes, scale, zero) = damped(m), nearest(w, 'int2', 0)
    for _ in range(5):
        codes, scale = calibrate.descend(w, H, codes, scale, zero, 'int2')
    every = torch.tensor(list(itertools.product(range(4), repeat=5))).float()
    for row, s, z, error in zip(w, scale, zero, errors(w, H, codes, scale, zero), strict=True):
        assert error <= errors(row, H, every, s.expand(1024, 1), z.expand(1024, 1)).min() * (1 + 1e-6)


def test_descent_leaves_no_single_change_that_helps():
    """On correlated inputs: no other code of one weight, and no other fp16 scale of one group, lowers the error of its row."""
    w, m = weight(4, 16), moments(correlated(16, 300))
    H, (codes, scale, zero) = damped(m), nearest(w, 'int2', 8)
    for _ in range(12):
        codes, scale = calibrate.descend(w, H, codes, scale, zero, 'int2')
    least = errors(w, H, codes, scale, zero) * (1 - 1e-5)
    for j, code in itertools.product(range(16), range(4)):
        other = codes.clone()
        other[:, j] = code
        assert (errors(w, H, other, scale, zero) >= least).all()
    for g, factor in itertools.product(range(2), (0.999, 1.001)):
        other = scale.clone()
        other[:, g] *= factor
        assert (errors(w, H, codes, other, zero) >= least).all()


def test_gptq_is_deterministic_and_draws_no_random_numbers():
    w, m, state = weight(16, 32), moments(correlated(32, 200)), torch.get_rng_state()
    a, b = (calibrate.gptq(w, m, 'int2', 16) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)) and torch.equal(state, torch.get_rng_state())


def test_gptq_repairs_the_errors_of_the_layers_before():
    """The inputs have changed: with the gap, 8-bit weights give the outputs of the least-squares solution, and 2-bit weights
    half the error they have without it."""
    w, x = weight(32, 64), correlated(64, 1000)
    changed = x + 0.5 * x.std() * torch.randn(x.shape, generator=torch.Generator().manual_seed(5)) @ weight(64, 64, seed=2)
    wanted, plain, m = x @ w.T, moments(changed), moments(changed)
    m.add_gap(wanted - changed @ w.T, changed)
    error = lambda w: (changed @ w.T - wanted).square().sum().item()
    of = lambda m, levels: error(decoded(*calibrate.gptq(w, m, levels, 16, damp=1e-6)))
    assert of(m, 'int8') == pytest.approx(error(torch.linalg.lstsq(changed, wanted).solution.T), rel=0.01)
    assert of(m, 'int8') < 0.9 * of(plain, 'int8') and of(m, 'int2') < of(plain, 'int2')


@pytest.mark.parametrize('constant, size, rows', [('BLOCK', 8, 6), ('BLOCK', 7, 6), ('PART', 1, 300)])
def test_parts_are_the_whole(constant, size, rows, monkeypatch):
    """Errors passed on block by block, groups inside and across blocks, and 256 rows at a time give the codes of the whole."""
    w, m = weight(rows, 24), moments(correlated(24, 200))
    m.add_gap(correlated(rows, 200, seed=4), correlated(24, 200))
    every = lambda: [*calibrate.gptq(w, m, 'int3', 8), *calibrate.gptq(w, m, 'int2', 0), *calibrate.awq(w, m, 'int3', 8)]
    whole = every()
    monkeypatch.setattr(calibrate, constant, size)
    for a, b in zip(whole, every(), strict=True):
        assert a.dtype == b.dtype and torch.allclose(a.float(), b.float(), atol=1e-6)
    assert whole[0].dtype == torch.uint8


@pytest.mark.parametrize('levels, least, group', [('int4', 3.3, 0), ('int3', 2.95, 32), ('int2', 3.9, 128)])
def test_gptq_beats_rounding_to_the_nearest(levels, least, group):
    """On correlated inputs the squared error of the output is a third of that of rounding, or less. It needs all three: clipped
    ranges, the columns with the largest inputs first, and coordinate descent."""
    w, m = weight(64, 256), moments(correlated(256, 2000))
    plain = output_error(w, decoded(*nearest(w, levels, group)), m)
    assert output_error(w, decoded(*calibrate.gptq(w, m, levels, group)), m) < plain / least


@pytest.mark.parametrize('change', [lambda x: x[:1], lambda x: torch.cat([x[:, :1].expand(-1, 9), x[:, 9:]], 1),
                                    lambda x: x * torch.logspace(6, -12, 32), lambda x: x * (torch.arange(32) % 20 > 3)],
                         ids=['one token', 'one input many times', 'huge and tiny', 'always zero'])
def test_an_ill_conditioned_hessian(change):
    """Finite codes, no worse than rounding to the nearest, and columns that never had an input rounded to the nearest."""
    x = change(correlated(32, 500))
    w, m = weight(8, 32), moments(x)
    codes, scale, zero = calibrate.gptq(w, m, 'int4', 16, damp=1e-12)
    assert codes.isfinite().all() and codes.min() >= 0 and codes.max() <= 15
    assert output_error(w, decoded(codes, scale, zero), m) <= output_error(w, decoded(*nearest(w, 'int4', 16)), m)
    dead = ~x.any(0)
    rounded = to_grid(w, scale.repeat_interleave(16, 1), zero.repeat_interleave(16, 1), 'int4')
    assert torch.equal(codes[:, dead], rounded[:, dead])


def test_inverse_root():
    """U is upper triangular with U^T U the inverse of the damped H; no inverse and numbers that are not finite raise."""
    H = moments(correlated(20, 300)).H.double()
    for h, damp, damped_by, tolerance in ((H, 0.01, 0.01 * H.diagonal().mean(), 1e-4),
                                          (torch.ones(20, 20), 1e-20, 1e-3, 1e-3)):         # tenfold until it has an inverse
        U, eye = calibrate.inverse_root(h, damp).double(), torch.eye(20, dtype=torch.float64)
        assert torch.equal(U, U.triu()) and torch.allclose(U.T @ U @ (h + damped_by * eye), eye, atol=tolerance)
    with pytest.raises(ValueError, match='no inverse'):
        calibrate.inverse_root(-H, 0.01)
    with pytest.raises(ValueError, match='not finite'):
        calibrate.gptq(weight(2, 20), moments(torch.full((1, 20), float('nan'))), 'int4', 20)


@pytest.mark.parametrize('x', [torch.zeros(0, 32), torch.zeros(10, 32), torch.eye(32)], ids=['none', 'zeros', 'independent'])
def test_inputs_that_say_nothing_leave_rounding_to_the_nearest(x):
    """No inputs, zeros, or independent inputs of one size: gptq gives the nearest codes, and awq too where it saw nothing."""
    w, m = weight(8, 32), moments(x)
    codes, scale, zero = calibrate.gptq(w, m, 'int4', 16)
    assert torch.equal(codes, to_grid(w, scale.repeat_interleave(16, 1), zero.repeat_interleave(16, 1), 'int4'))
    assert len(x) or torch.equal(calibrate.awq(w, m, 'int4', 16)[0], nearest(w, 'int4', 16)[0])


def test_clipping_takes_the_range_with_the_least_error():
    """A large weight on an input that is nearly 0: the range of its group is clipped, and the other weights gain."""
    w, x = weight(1, 16), torch.randn(500, 16, generator=torch.Generator().manual_seed(3))
    w[0, 3], x[:, 3] = 4.0, x[:, 3] * 1e-3
    m = moments(x)
    error = lambda s, z: output_error(w, (to_grid(w, s[..., 0], z[..., 0], 'int3') - z[..., 0]) * s[..., 0], m)
    clipped, plain = calibrate.shrunk(w[:, None], m.H[None], 'int3'), group_grid(w[:, None], 'int3')
    assert clipped[0] < 0.6 * plain[0] and error(*clipped) < error(*plain) / 2
    assert all(error(*clipped) <= error(*group_grid(w[:, None], 'int3', s)) + 1e-9 for s in calibrate.SHRINKS)


def test_awq_takes_the_best_power_and_keeps_large_inputs_exact():
    """The weights of inputs that are a hundred times as large lose least; the error is a third of that of rounding."""
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(2))
    x[:, :2] *= 100
    w, m = weight(32, 64), moments(x)
    *codes, inverse = calibrate.awq(w, m, 'int3', 32)
    result, plain = decoded(*codes) * inverse, decoded(*nearest(w, 'int3', 32))
    assert output_error(w, result, m) < output_error(w, plain, m) / 3
    assert inverse[:2].max() < inverse[2:].min() / 5 and torch.equal(inverse, inverse.half().float())
    assert (result - w)[:, :2].square().mean() < (plain - w)[:, :2].square().mean() / 3


def test_moments_are_sums_over_all_tokens():
    """H is the sum of x x^T and total that of |x|, in fp32, over batches of bf16 inputs too."""
    x = torch.randn(2, 5, 7)
    m = calibrate.Moments(7, 'cpu')
    for part in x:
        m.add(part[None].bfloat16())
    flat = x.bfloat16().float().reshape(-1, 7)
    assert m.n == 10 and torch.allclose(m.H, flat.T @ flat, atol=1e-5) and torch.allclose(m.total, flat.abs().sum(0))


# ---------------------------------------------------------------------------------------------------------------------


gpt = partial(tiny_gpt, n_layer=3)


def plain_moments(model, batches, run, names):
    with calibrate.Observed(model, names) as moments_of, torch.no_grad():
        for batch in batches:
            run(model, batch)
    return moments_of


def test_each_block_sees_the_outputs_of_the_changed_blocks_before_it():
    """The walk gives each block the moments of a plain pass through a model whose earlier blocks were changed likewise."""
    model, batches = gpt(), [random_ids(2, 16, seed=i) for i in range(3)]
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    plain, seen, logits = copy.deepcopy(model), [], []
    model.lm_head.register_forward_hook(lambda *_: logits.append(1))

    def visit(name, result):
        block = name.split('.')[1] if name.startswith('blocks.') else ''
        if not any(n.startswith(f'blocks.{block}.') for n in seen):            # the first of its block
            expected = plain_moments(plain, batches, nn.Module.__call__, [name])[name]
            assert torch.allclose(result.H, expected.H, rtol=1e-4, atol=1e-4), name
            assert result.n == (6 * 16 if block else 6)                        # the head sees the last position
        seen.append(name)
        for net in (model, plain) if block else ():
            net.get_submodule(name).weight.data.mul_(0.5)

    calibrate.for_each_layer(model, batches, nn.Module.__call__, names, visit)
    assert sorted(seen) == sorted(names) and len(seen) > 10 and seen[-1] == 'lm_head'
    assert not logits                               # the largest tensors of all are never made


MODELS = {                # model, and for each layer whose output is added to something: where the sum is; out: of the block
    'ours': (gpt, {'attn.c_proj': 'ln_2', 'mlp.c_proj': 'out'}),
    'llama': (partial(LlamaConfig, intermediate_size=48, num_key_value_heads=1),
              {'self_attn.o_proj': 'post_attention_layernorm', 'mlp.down_proj': 'out'}),
    'norm after the sum': (partial(BertConfig, intermediate_size=48),
                           {'attention.output.dense': 'attention.output.LayerNorm', 'output.dense': 'output.LayerNorm'}),
    'attention beside the MLP': (partial(GPTNeoXConfig, intermediate_size=48),
                                 {'attention.dense': 'out', 'mlp.dense_4h_to_h': 'out'}),
    'flattened tokens': (partial(OPTConfig, ffn_dim=48, word_embed_proj_dim=32),
                         {'self_attn.out_proj': 'final_layer_norm', 'fc2': 'out'})}


@pytest.mark.parametrize('name', MODELS)
def test_the_gap_is_what_the_changed_model_lacks(name):
    """Each layer, also inside a block, gets inputs x from the changed layers before, and the gap (s' - s)^T x. s is the sum of
    the layer's output and what it is added to, otherwise its output; s' is that of the original model."""
    make, sums = MODELS[name]
    model = make() if make is gpt else AutoModel.from_config(make(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                                                  vocab_size=64, use_cache=False)).eval()
    original, ids, seen = copy.deepcopy(model), random_ids(2, 16), []
    block_of = lambda layer: next((b for row in calibrate.find_blocks(model) for b, _ in row if layer.startswith(f'{b}.')), '')
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear and block_of(n)]

    def at(net, layer):
        """(input of the layer, its sum or output), each (tokens, features)."""
        block, got = block_of(layer), {}
        point = sums.get(layer.removeprefix(f'{block}.'), '')
        first = lambda x: (x[0] if isinstance(x, tuple) else x).flatten(0, -2)
        hooks = [net.get_submodule(layer).register_forward_hook(lambda _, x, y: got.update(x=first(x), s=first(y)))]
        if point == 'out':
            hooks.append(net.get_submodule(block).register_forward_hook(lambda _, x, y: got.update(s=first(y))))
        elif point:
            hooks.append(net.get_submodule(f'{block}.{point}').register_forward_hook(lambda _, x, y: got.update(s=first(x))))
        with torch.no_grad():
            net(ids)
        for hook in hooks:
            hook.remove()
        return got['x'], got['s']

    def visit(layer, m):
        (x, s), (_, wanted) = at(model, layer), at(original, layer)
        expected = (wanted - s).T @ x
        assert torch.allclose(m.H, x.T @ x, rtol=1e-4, atol=1e-4 * m.H.max().item()), layer
        assert torch.allclose(m.gap, expected, rtol=1e-3, atol=1e-4 * (s.norm() * x.norm()).item()), layer
        seen.append((layer, expected.norm() > 1e-3 * s.norm() * x.norm()))
        model.get_submodule(layer).weight.data.mul_(0.5)
    calibrate.for_each_layer(model, [ids], lambda net, ids: net(ids), names, visit, repair=True)
    assert sorted(n for n, _ in seen) == sorted(names) and len(names) > 7 and sum(large for _, large in seen) > len(names) / 2


def test_a_layer_that_gets_some_of_the_tokens_has_no_gap():
    """Layers called for a part of the tokens, twice, or never, as experts are, are visited with the moments of their inputs. A
    layer that gets all tokens of the first batch and not of the second has the gap of the first."""
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.all, self.part, self.twice, self.never, self.first = (nn.Linear(8, 8) for _ in range(5))

        def forward(self, x):
            x = x + self.all(x)
            self.first(x if x.shape[1] == 5 else x[:, :1])
            return torch.cat([self.part(x[:, :3]), self.twice(self.twice(x[:, 3:]))], 1)

    def visit(n, m):
        seen[n[4:]] = m.n, m.gap
        model[0][0].all.weight.data.mul_(0.5)
    model, seen = nn.Sequential(nn.ModuleList([Block()])), {}
    names = [f'0.0.{n}' for n in ('never', 'twice', 'part', 'first', 'all')]
    calibrate.for_each_layer(model, [torch.randn(2, 5, 8), torch.randn(2, 4, 8)], lambda net, x: net[0][0](x), names, visit,
                             repair=True)
    assert {n: tokens for n, (tokens, _) in seen.items()} == {'never': 0, 'twice': 12, 'part': 12, 'first': 12, 'all': 18}
    assert all((gap is None) == (n not in ('all', 'first')) for n, (_, gap) in seen.items())


def test_a_pass_ends_when_each_layer_was_called():
    """A pass over layers outside of blocks stops at the last of them, in whatever order they are called."""
    model = nn.ModuleDict({'blocks': nn.ModuleList([nn.Linear(4, 4)]), 'a': nn.Linear(4, 4), 'b': nn.Linear(4, 4)})
    seen, done = {}, []

    def run(net, words):
        for word in words:
            net[word](torch.ones(1, 4))
        done.append(words)
    calibrate.for_each_layer(model, ['a', 'ba', 'ab'], run, ['a', 'b'], lambda n, m: seen.update({n: m.n}))
    assert seen == {'a': 3, 'b': 2} and done == ['a']


def test_blocks_are_the_outermost_lists_of_modules_with_linear_layers():
    """find_blocks() finds those of an encoder and of a decoder, and no lists of norms or lists inside of blocks."""
    model, names = nn.Module(), lambda m: [[n for n, _ in row] for row in calibrate.find_blocks(m)]
    model.encoder = nn.ModuleList(nn.ModuleList([nn.Linear(4, 4)]) for _ in range(2))
    model.norms, model.decoder = nn.ModuleList([nn.LayerNorm(4)]), nn.ModuleList([nn.Sequential(nn.Linear(8, 8))])
    assert names(model) == [['encoder.0', 'encoder.1'], ['decoder.0']]
    assert names(nn.Sequential(nn.Linear(4, 4))) == [] and names(gpt()) == [['blocks.0', 'blocks.1', 'blocks.2']]


@pytest.mark.parametrize('blocks', [True, False], ids=['an encoder and a decoder', 'no blocks'])
def test_every_layer_gets_the_moments_of_a_plain_pass(blocks):
    """Each layer of both stacks of BART, or of a model without lists of blocks, is visited once, with its own moments."""
    model, batches, run = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), [torch.randn(5, 4)], nn.Module.__call__
    if blocks:
        model = BartForConditionalGeneration(BartConfig(
            vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32)).eval()
        batches, run = [random_ids(2, 16, seed=i) for i in range(2)], lambda net, ids: net(input_ids=ids, use_cache=False)
    names, seen = [n for n, m in model.named_modules() if type(m) is nn.Linear and n != 'lm_head'], []

    def visit(name, result):
        seen.append(name)
        assert torch.allclose(result.H, expected[name].H, rtol=1e-4, atol=1e-4) and result.n == expected[name].n, name
    expected = plain_moments(model, batches, run, names)
    calibrate.for_each_layer(model, batches, run, names, visit)
    assert sorted(seen) == sorted(names)


def test_a_decoder_sees_the_outputs_of_the_changed_encoder():
    """The cross-attention of a T5 decoder gets its moments from the encoder whose layers were changed before."""
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=32, d_ff=48, d_kv=16, num_heads=2, num_layers=2)).eval()
    batches, run = [random_ids(2, 16)], lambda net, ids: net(input_ids=ids, decoder_input_ids=ids, use_cache=False)
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear and n.startswith(('encoder.', 'decoder.'))]
    found, cross = {}, 'decoder.block.0.layer.1.EncDecAttention.k'

    def visit(name, result):
        found[name] = result.H
        if name.startswith('encoder.'):
            model.get_submodule(name).weight.data.mul_(0.5)
    before = plain_moments(model, batches, run, [cross])[cross].H
    calibrate.for_each_layer(model, batches, run, names, visit)
    after = plain_moments(model, batches, run, [cross])[cross].H
    assert torch.allclose(found[cross], after, rtol=1e-4, atol=1e-4) and not torch.allclose(before, after, rtol=0.1)
