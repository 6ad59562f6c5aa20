"""calibrate.py: GPTQ against a direct solve, activation-aware scaling against its definition, the walk through the blocks."""
import copy

import pytest
import torch
import torch.nn as nn
from formulas import fixed  # noqa: F401
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from pretrained import calibrate
from quant import group_grid, to_grid
from train_gpt import GPT, GPTConfig


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


def direct(w, H, levels, group, damp, order=None):
    """GPTQ as it is defined, in fp64 and without any of its algebra: round a column, then give the columns that are left the
    values that minimise tr((W' - W) H (W' - W)^T) with those before held fixed, from the normal equations."""
    n, scale, zero = w.shape[1], *nearest(w, levels, group)[1:]
    H = H.double() + damp * H.double().diagonal().mean() * torch.eye(n, dtype=torch.float64)
    order = list(range(n)) if order is None else order
    now, codes = w.double().clone(), torch.zeros_like(w)
    for i, j in enumerate(order):
        g = j // (group or n)
        codes[:, j] = to_grid(now[:, j].float(), scale[:, g], zero[:, g], levels)
        now[:, j] = ((codes[:, j] - zero[:, g]) * scale[:, g]).double()
        done, left = order[:i + 1], order[i + 1:]
        if left:
            off = (now - w.double())[:, done]
            now[:, left] = w.double()[:, left] - torch.linalg.solve(H[left][:, left], H[left][:, done] @ off.T).T
    return codes, scale, zero


@pytest.mark.parametrize('levels, group, act_order', [
    ('int4', 0, False), ('int4', 8, True), ('int3', 0, True), ('int3', 8, True), ('int2', 0, False), ('int2', 0, True),
    ('tern', 8, True), ('tern', 0, False), ('bin', 0, True)])                # (8, False): test_scales_follow_the_weights
def test_gptq_is_the_direct_solve(levels, group, act_order):
    """Codes are those of rounding a column and solving for the columns that are left, in fp64, without GPTQ's algebra."""
    w, m = weight(6, 24), moments(correlated(24, 200))
    found = calibrate.gptq(w, m, levels, group, act_order=act_order, clip=False, damp=0.01)
    H = m.H / m.n
    order = torch.argsort(H.diagonal(), descending=True).tolist() if act_order else None
    codes, scale, zero = direct(w, H, levels, group, 0.01, order)
    assert torch.equal(found[1], scale) and torch.equal(found[2], zero)
    # A weight that lies on the middle between two levels may go either way in fp32 and fp64.
    assert (found[0] != codes).float().mean() <= 0.02
    error = lambda c, s, z: output_error(w, decoded(c, s, z), m)
    assert error(*found) == pytest.approx(error(codes, scale, zero), rel=0.1)


@pytest.mark.parametrize('block', [8, 7])
def test_blocks_of_columns_change_nothing(block, monkeypatch):
    """Errors that are passed on block by block give the codes and scales of one block, for groups inside and across them."""
    w, m = weight(6, 24), moments(correlated(24, 200))
    whole = calibrate.gptq(w, m, 'int3', 8, act_order=False)
    monkeypatch.setattr(calibrate, 'BLOCK', block)
    parts = calibrate.gptq(w, m, 'int3', 8, act_order=False)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole, parts, strict=True))


def test_scales_follow_the_weights():
    """From left to right, the second group's scale is that of its weights after the first group's errors came to them."""
    w, m = weight(6, 16), moments(correlated(16, 200))
    codes, scale, zero = calibrate.gptq(w, m, 'int3', 8, act_order=False, clip=False)
    first = decoded(codes[:, :8], scale[:, :1], zero[:, :1])
    H = m.H.double() / m.n
    H += 0.01 * H.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    moved = w.double()[:, 8:] - torch.linalg.solve(H[8:, 8:], H[8:, :8] @ (first.double() - w[:, :8].double()).T).T
    expected = group_grid(moved.float(), 'int3')
    assert torch.allclose(scale[:, 1:], expected[0], rtol=2e-3)
    assert not torch.allclose(scale[:, 1:], group_grid(w[:, 8:], 'int3')[0])


@pytest.mark.parametrize('levels, least, group', [('int4', 2, 0), ('int3', 2, 32), ('int2', 1.8, 128), ('int4', 2, 128)])
def test_gptq_beats_rounding_to_the_nearest(levels, least, group):
    """On correlated inputs the squared error of the output is about half of that of rounding, or less."""
    w, m = weight(64, 256), moments(correlated(256, 2000))
    plain = output_error(w, decoded(*nearest(w, levels, group)), m)
    for options in ({}, {'act_order': False}, {'clip': False}):
        assert output_error(w, decoded(*calibrate.gptq(w, m, levels, group, **options)), m) < plain / least


@pytest.mark.parametrize('what', ['fewer tokens than inputs', 'one input many times', 'huge and tiny', 'always zero',
                                  'one token'])
def test_an_ill_conditioned_hessian(what):
    """Finite codes, no worse than rounding to the nearest, and columns that never had an input rounded to the nearest."""
    x = correlated(32, 500)
    if what == 'fewer tokens than inputs':
        x = x[:5]
    elif what == 'one input many times':
        x[:, 1:9] = x[:, :1]
    elif what == 'huge and tiny':
        x = x * torch.logspace(6, -12, 32)
    elif what == 'always zero':
        x[:, 3], x[:, 20:] = 0, 0
    else:
        x = x[:1]
    w, m = weight(8, 32), moments(x)
    codes, scale, zero = calibrate.gptq(w, m, 'int4', 16, damp=1e-12)
    assert codes.isfinite().all() and codes.min() >= 0 and codes.max() <= 15
    error = lambda *found: output_error(w, decoded(*found), m)
    assert error(codes, scale, zero) <= error(*nearest(w, 'int4', 16))
    if what == 'always zero':
        dead = [3, *range(20, 32)]
        expected = to_grid(w, scale.repeat_interleave(16, 1), zero.repeat_interleave(16, 1), 'int4')
        assert torch.equal(codes[:, dead], expected[:, dead])


def test_inverse_root():
    """U is upper triangular with U^T U the inverse of the damped H; no inverse and numbers that are not finite raise."""
    H = moments(correlated(20, 300)).H.double()
    singular = torch.ones(20, 20)                   # damped ten times more, until it has an inverse
    U = calibrate.inverse_root(singular, 1e-20).double()
    damped = singular.double() + 1e-3 * torch.eye(20)
    assert torch.allclose(U.T @ U @ damped, torch.eye(20, dtype=torch.float64), atol=1e-3)
    U = calibrate.inverse_root(H, 0.01).double()
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(20, dtype=torch.float64)
    assert torch.equal(U, U.triu()) and torch.allclose(U.T @ U @ damped, torch.eye(20, dtype=torch.float64), atol=1e-4)
    with pytest.raises(ValueError, match='no inverse'):
        calibrate.inverse_root(-H, 0.01)
    with pytest.raises(ValueError, match='not finite'):
        calibrate.gptq(weight(2, 20), moments(torch.full((1, 20), float('nan'))), 'int4', 20)


@pytest.mark.parametrize('x', [torch.zeros(0, 32), torch.zeros(10, 32), torch.eye(32)], ids=['none', 'zeros', 'independent'])
def test_inputs_that_say_nothing_leave_rounding_to_the_nearest(x):
    """No inputs, zeros, or independent inputs of one size: gptq gives the nearest codes, and awq too where it saw nothing."""
    w, m = weight(8, 32), moments(x)
    found = calibrate.gptq(w, m, 'int4', 16, clip=False)
    assert all(torch.equal(a, b) for a, b in zip(found, nearest(w, 'int4', 16), strict=True))
    if not len(x):
        assert torch.equal(calibrate.awq(w, m, 'int4', 16)[0], nearest(w, 'int4', 16)[0])


def test_clipping_takes_the_range_with_the_least_error():
    """A large weight on an input that is nearly 0: the range of its group is clipped, and the other weights gain."""
    w, x = weight(1, 16), torch.randn(500, 16, generator=torch.Generator().manual_seed(3))
    w[0, 3], x[:, 3] = 4.0, x[:, 3] * 1e-3
    m = moments(x)
    scale, zero = (t[..., 0] for t in calibrate.shrunk(w[:, None], m.H[None], 'int3'))
    plain = group_grid(w[:, None], 'int3')[0][..., 0]
    assert scale < 0.6 * plain
    error = lambda s, z: output_error(w, (to_grid(w, s, z, 'int3') - z) * s, m)
    assert error(scale, zero) < error(*(t[..., 0] for t in group_grid(w[:, None], 'int3'))) / 2
    for shrink in calibrate.SHRINKS:
        assert error(scale, zero) <= error(*(t[..., 0] for t in group_grid(w[:, None], 'int3', shrink))) + 1e-9


@pytest.mark.parametrize('act_order, clip', [(True, True), (False, False)])
def test_rows_in_parts_are_rows_in_one(act_order, clip, monkeypatch):
    """Taking 256 rows at a time changes no code and no scale, of gptq and of awq."""
    w, m = weight(300, 64), moments(correlated(64, 500))
    every = lambda: [*calibrate.gptq(w, m, 'int3', 32, act_order=act_order, clip=clip), *calibrate.awq(w, m, 'int3', 32)]
    whole = every()
    monkeypatch.setattr(calibrate, 'PART', 1)       # 256 rows, 44
    for a, b in zip(whole, every(), strict=True):
        assert a.dtype == b.dtype and torch.allclose(a.float(), b.float(), rtol=1e-6)
    assert whole[0].dtype == torch.uint8


def test_awq_takes_the_best_power_and_keeps_large_inputs_exact():
    """The weights of inputs that are a hundred times as large lose least; the error is a third of that of rounding."""
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(2))
    x[:, :2] *= 100
    w, m = weight(32, 64), moments(x)
    codes, scale, zero, inverse = calibrate.awq(w, m, 'int3', 32)
    found = decoded(codes, scale, zero) * inverse
    plain = decoded(*nearest(w, 'int3', 32))
    assert output_error(w, found, m) < output_error(w, plain, m) / 3
    assert inverse[:2].max() < inverse[2:].min() / 5 and torch.equal(inverse, inverse.half().float())
    assert (found - w)[:, :2].square().mean() < (plain - w)[:, :2].square().mean() / 3


def test_moments_are_sums_over_all_tokens():
    """H is the sum of x x^T and total that of |x|, in fp32, over batches of bf16 inputs too."""
    x = torch.randn(2, 5, 7)
    m = calibrate.Moments(7, 'cpu')
    for part in x:
        m.add(part[None].bfloat16())
    flat = x.bfloat16().float().reshape(-1, 7)
    assert m.n == 10 and torch.allclose(m.H, flat.T @ flat, atol=1e-5) and torch.allclose(m.total, flat.abs().sum(0))


# ---------------------------------------------------------------------------------------------------------------------


def gpt():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=64, block_size=16, n_layer=3, n_head=2, n_embd=32)).eval()


def neo():
    torch.manual_seed(0)
    return GPTNeoForCausalLM(GPTNeoConfig(
        vocab_size=64, bos_token_id=0, eos_token_id=0, max_position_embeddings=16, hidden_size=32, num_layers=3, num_heads=2,
        attention_types=[[['global', 'local', 'global'], 1]], window_size=4)).eval()


@pytest.mark.parametrize('make', [gpt, neo])
def test_each_block_sees_the_outputs_of_the_changed_blocks_before_it(make):
    """The walk gives each block the moments of a plain pass through a model whose earlier blocks were changed likewise."""
    model, run = make(), lambda net, ids: net(ids) if make is gpt else net(input_ids=ids, use_cache=False)
    batches = [torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    blocks = [n for row in calibrate.find_blocks(model) for n, _ in row]
    assert len(blocks) == 3 and len(names) > 10
    plain, seen, logits = copy.deepcopy(model), [], []
    model.lm_head.register_forward_hook(lambda *_: logits.append(1))

    def visit(name, found):
        block = next((b for b in blocks if name.startswith(f'{b}.')), '')
        if not any(n.startswith(f'{block}.') for n in seen) or not block:      # the first of its block
            with calibrate.Observed(plain, [name]) as expected, torch.no_grad():
                for ids in batches:
                    run(plain, ids)
            assert torch.allclose(found.H, expected[name].H, rtol=1e-4, atol=1e-4), name
            assert found.n == (6 * 16 if make is neo or block else 6)                  # GPT's head sees the last position
        seen.append(name)
        if block:
            model.get_submodule(name).weight.data.mul_(0.5)
            plain.get_submodule(name).weight.data.mul_(0.5)

    calibrate.for_each_layer(model, batches, run, names, visit)
    assert sorted(seen) == sorted(names) and seen[-1] == 'lm_head'
    assert not logits                               # the largest tensors of all are never made


def test_a_pass_ends_when_each_layer_was_called():
    """A pass over layers outside of blocks stops at the last of them, in whatever order they are called."""
    model = nn.ModuleDict({'blocks': nn.ModuleList([nn.Linear(4, 4)]), 'a': nn.Linear(4, 4), 'b': nn.Linear(4, 4)})
    seen, done = {}, []

    def run(net, words):
        for word in words:
            net[word](torch.ones(1, 4))
        done.append(words)
    calibrate.for_each_layer(model, ['a', 'ba', 'ab'], run, ['a', 'b'], lambda n, found: seen.update({n: found.n}))
    assert seen == {'a': 3, 'b': 2} and done == ['a']


def test_blocks_are_the_outermost_lists_of_modules_with_linear_layers():
    """find_blocks() finds those of an encoder and of a decoder, and no lists of norms or lists inside of blocks."""
    model, names = nn.Module(), lambda m: [[n for n, _ in row] for row in calibrate.find_blocks(m)]
    model.encoder = nn.ModuleList(nn.ModuleList([nn.Linear(4, 4)]) for _ in range(2))
    model.norms, model.decoder = nn.ModuleList([nn.LayerNorm(4)]), nn.ModuleList([nn.Sequential(nn.Linear(8, 8))])
    assert names(model) == [['encoder.0', 'encoder.1'], ['decoder.0']]
    assert names(nn.Sequential(nn.Linear(4, 4))) == [] and names(gpt()) == [['blocks.0', 'blocks.1', 'blocks.2']]


def test_an_encoder_and_a_decoder():
    """BART: every layer of both is visited once, each with the moments of a plain pass."""
    from transformers import BartConfig, BartForConditionalGeneration
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32)).eval()
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear and n != 'lm_head']
    batches, seen = [torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(i)) for i in range(2)], {}
    run = lambda net, ids: net(input_ids=ids, use_cache=False)
    with calibrate.Observed(model, names) as expected, torch.no_grad():
        for ids in batches:
            run(model, ids)
    calibrate.for_each_layer(model, batches, run, names, lambda n, m: seen.update({n: m}))
    assert list(seen) and sorted(seen) == sorted(names)
    assert all(torch.allclose(seen[n].H, expected[n].H, rtol=1e-4, atol=1e-4) for n in names)


def test_a_model_without_blocks_is_observed_as_a_whole():
    """Each layer of a model without lists of blocks gets its own moments."""
    model, seen = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), {}
    x = torch.randn(5, 4)
    calibrate.for_each_layer(model, [x], lambda net, b: net(b), ['0', '2'], lambda n, m: seen.update({n: m}))
    assert torch.allclose(seen['0'].H, x.T @ x, atol=1e-5) and seen['2'].n == 5
