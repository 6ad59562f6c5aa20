"""optim.py: the optimizer against torch's, its bytes, its resumption, and the projected backward pass against the full one."""
import copy
import io
import pickle
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from formulas import fixed, saved  # noqa: F401
from torch.utils.checkpoint import checkpoint

import common
import optim
from optim import MuonAdamW, RSVDAdam, TopRAdamW, attach, memory_report, optimizer_bytes

MODES = {
    'left': dict(rank=2), 'right': dict(rank=2, side='right'), 'short': dict(rank=2, side='short', scale=.5),
    'fraction': dict(rank_fraction=.1), 'energy': dict(energy=.8, rank_min=1, rank_max=8),
    'every step': dict(rank=2, interval=1), 'kept': dict(rank=2, rotate=False),
    'columns': dict(rank=2, side='right', column_v=True), 'columns 8bit': dict(rank=2, column_v=True, state_dtype='8bit'),
    'stagger': dict(rank=2, stagger=1), 'crowded': dict(rank=2, stagger=1, interval=2),
    'bf16': dict(rank=2, state_dtype='bf16'), '8bit': dict(rank=2, side='right', state_dtype='8bit'), 'plain': dict(rank=0)}


class Net(nn.Module):
    """An embedding with a padding row, a table of positions, two matrices and a head."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(50, 24, padding_idx=0), nn.Embedding(7, 24)
        self.up, self.down, self.head = nn.Linear(24, 40), nn.Linear(40, 24, bias=False), nn.Linear(24, 3)
        self.remat = False

    def forward(self, ids):
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        inner = lambda x: self.down(F.gelu(self.up(x)))
        x = x + (checkpoint(inner, x, use_reentrant=False) if self.remat else inner(x))
        return self.head(x.float().mean(1))


def batches(n, start=0):
    for step in range(start, n):
        g = torch.Generator().manual_seed(step)
        yield torch.randint(50, (8, 7), generator=g), torch.randint(3, (8,), generator=g)


def make(attached=False, seed=1, **options):
    torch.manual_seed(seed)
    model = Net()
    optimizer = RSVDAdam(model.parameters(), lr=1e-2, **{'interval': 7, **options})
    if attached:
        assert attach(model, optimizer, verbose=False) == {}
    return model, optimizer


def train(model, optimizer, steps, start=0, micro=1, clip=1.0, amp=False):
    for ids, labels in batches(steps, start):
        for part, wanted in zip(ids.chunk(micro), labels.chunk(micro), strict=True):
            with torch.autocast('cpu', torch.bfloat16, enabled=amp):
                loss = F.cross_entropy(model(part), wanted) / micro
            loss.backward()
        if clip:
            optimizer.clip_grad_norm_(clip)
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def distance(a, b):
    return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters(), strict=True))


def reloaded(*parts):
    """The states of modules and optimizers, as they come back from a file that is loaded with weights_only=True."""
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def alone(module, attached, **options):
    """(module, optimizer, weight, its state): a model of one layer with an RSVDAdam, attached or not."""
    model = nn.Sequential(module)
    optimizer = RSVDAdam(model.parameters(), **options)
    if attached:
        attach(model, optimizer, verbose=False)
    return model, optimizer, module.weight, optimizer.state[module.weight]


# ------------------------------------------------------------------------------------------------- functions of tensors


def spectrum(m, n, s):
    g = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(k, len(s), generator=g, dtype=torch.float64)).Q for k in (m, n))
    return u, (u * s.double() @ v.T).float()


def assert_orthonormal(basis, rank):
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank), atol=1e-5, rtol=0)


@pytest.mark.parametrize('m,n', [(96, 40), (40, 96)])
def test_range_finder_against_the_exact_svd(m, n):
    """Leading singular values and left vectors of known spectra: a gap of 100, and a slow decay with power iterations."""
    for s, n_iter, tolerance in ((torch.cat([torch.linspace(3, 2, 6), torch.full((20,), .02)]), 1, 1e-4),
                                 (.8 ** torch.arange(30.), 4, 2e-2)):
        u, G = spectrum(m, n, s)
        basis, values = optim.range_basis(lambda x, G=G: G @ x, lambda y, G=G: G.T @ y, (m, n), 6, n_iter=n_iter,
                                          generator=optim.sketch_generator(0))
        assert_orthonormal(basis, 10)
        torch.testing.assert_close(values[:6], s[:6], rtol=tolerance, atol=0)
        inside = (basis[:, :6].double().T @ u[:, :6]).square().sum(0)       # share of each true vector that is kept
        assert inside.min() > 1 - tolerance
    for G in (torch.ones(m, 3), torch.zeros(m, 3)):     # rank 1, as of a classifier's bias direction, and rank 0
        basis, values = optim.range_basis(lambda x, G=G: G @ x, lambda y, G=G: G.T @ y, (m, 3), 3, generator=None)
        assert_orthonormal(basis, 3)
        assert values[1] < 1e-4


def test_choose_rank_by_hand():
    """Squares 9, 4, 1 of 16: one keeps .5625, two .8125, three .875."""
    s = torch.tensor([3., 2., 1.])
    assert [optim.choose_rank(s, 16, e, 1, 3) for e in (.5, .56, .57, .81, .82, .99)] == [1, 1, 2, 2, 3, 3]
    assert optim.choose_rank(s, 16, .5, 2, 3) == 2 and optim.choose_rank(s, 16, .99, 1, 2) == 2


def test_rotated_moments_describe_the_same_gradient():
    """Between two bases of one space P M is the same, and so is the sum of V. In a new direction M is 0 and V the mean of its
    column. Without rotation a smaller rank keeps the leading rows."""
    old = torch.linalg.qr(torch.randn(9, 4)).Q
    old, other = old[:, :3], old[:, 3:]
    new = old @ torch.linalg.qr(torch.randn(3, 3)).Q
    M, V = torch.randn(3, 5), torch.rand(3, 5)
    rotated, second = optim.carry(M, old, new, True), optim.carry(V, old, new, True, square=True)
    torch.testing.assert_close(new @ rotated, old @ M)
    assert (second >= 0).all()
    torch.testing.assert_close(second.sum(0), V.sum(0))
    assert optim.carry(M, old, other, True).abs().max() < 1e-5
    torch.testing.assert_close(optim.carry(V, old, other, True, square=True), V.mean(0, keepdim=True))
    for rank in (2, 4):
        kept = optim.carry(M, old, torch.zeros(9, rank), False)
        assert torch.equal(kept[:3], M[:rank]) and kept.shape == (rank, 5)


@pytest.mark.parametrize('square', [False, True])
@pytest.mark.parametrize('dtype, element', [('bf16', 2), ('8bit', 1)])
def test_moments_in_fewer_bits_are_right_in_the_mean(dtype, element, square):
    """1,000 random roundings average to the number; a single one is within a step; no second moment becomes 0."""
    g = torch.Generator().manual_seed(0)
    t = torch.randn(768, generator=g)               # three blocks
    t = t.square() if square else t

    def there_and_back(t):
        state = {f'x{k}': v for k, v in optim.keep(t, dtype, square, g).items()}
        assert state['x'].element_size() == element
        return optim.held(state, 'x')
    one, largest = there_and_back(t[:700]), t.abs().max()
    assert (one - t[:700]).abs().max() < (.01 if dtype == 'bf16' else .1) * largest
    step = 2 ** -7 * t.abs() if dtype == 'bf16' else .04 * largest
    assert ((there_and_back(t.repeat(1000, 1)).mean(0) - t).abs() <= .08 * step + 1e-6).all()
    if dtype == '8bit' and square:
        assert there_and_back(torch.tensor([0., 1.]))[0].item() == pytest.approx((0.5 / 255) ** 4)  # half of the smallest code


# -------------------------------------------------------------------------------------------------------- the optimizer


@pytest.mark.parametrize('side', ['left', 'right'])
def test_a_full_basis_is_adamw_on_the_rotated_problem(side):
    """With P = I the weights are torch.optim.AdamW's; with another P those of AdamW on P^T W. Biases are AdamW's to the bit."""
    options = dict(lr=1e-2, betas=(.8, .99), eps=1e-7, weight_decay=.1)
    for P in (torch.eye(6), torch.linalg.qr(torch.randn(6, 6)).Q):
        rotate, back = ((lambda t, P=P: P.T @ t), (lambda t, P=P: P @ t)) if side == 'left' else (
            (lambda t, P=P: t @ P), (lambda t, P=P: t @ P.T))
        W0, b0, data = torch.randn(6, 6), torch.randn(6), [torch.randn(6, 6) for _ in range(30)]
        p, q, plain, b, c = map(nn.Parameter, (W0.clone(), rotate(W0).clone(), W0.clone(), b0.clone(), b0.clone()))
        ours = RSVDAdam([p, b], rank=6, side=side, interval=10 ** 6, **options)
        ours.waits(p, ours.param_groups[0])
        ours.state[p].update(basis=P, fresh_at=0, refreshes=1)
        theirs = torch.optim.AdamW([q, plain, c], fused=True, **options)
        for t in data:
            p.grad, q.grad, plain.grad = p.detach() - t, rotate(back(q.detach()) - t), plain.detach() - t
            b.grad, c.grad = ((x.detach() - t[0]) * 1e-7 for x in (b, c))    # so small that eps matters
            ours.step(), theirs.step()
        torch.testing.assert_close(rotate(p.detach()), q.detach(), atol=2e-5, rtol=0)
        assert torch.equal(b, c) and all(torch.equal(t, theirs.state[c][k]) for k, t in ours.state[b].items() if k != 'step')
        assert (p - plain).abs().max() < 1e-6 if torch.equal(P, torch.eye(6)) else (p - plain).abs().max() > 1e-3


def test_a_step_by_hand():
    """G = [[3, 0], [0, 0], [4, 0]] has the left vector (.6, 0, .8): R = (5, 0), the first Adam step is (1, 0), so W moves
    by lr (.6, 0, .8) in its first column and decays by lr wd."""
    p = nn.Parameter(torch.ones(3, 2))
    o = RSVDAdam([p], lr=.1, weight_decay=.5, rank=1, scale=1.)
    p.grad = torch.tensor([[3., 0], [0, 0], [4, 0]])
    o.step()
    torch.testing.assert_close(p.detach(), torch.tensor([[.95 - .06, .95], [.95, .95], [.95 - .08, .95]]), atol=1e-5, rtol=0)
    assert o.state[p]['exp_avg'].shape == (1, 2) and p.grad is None


@pytest.mark.parametrize('side', ['left', 'right'])
@pytest.mark.parametrize('rank', [1, 3, 12])
def test_an_update_is_as_large_as_that_of_adamw(side, rank):
    """The first step of AdamW moves each number by lr. That of any rank moves them by lr in the root mean square."""
    p = nn.Parameter(torch.zeros(12, 20))
    p.grad = torch.randn(12, 20)
    RSVDAdam([p], lr=.1, rank=rank, side=side).step()
    assert p.detach().square().mean().sqrt().item() == pytest.approx(.1, rel=1e-4)


@pytest.mark.parametrize('side', ['left', 'right'])
def test_column_moments_against_the_exact_svd(side):
    """Twelve steps with a basis every third step are those of ten lines in float64, whose bases come from torch.linalg.svd."""
    p, lr, b1, b2, m, n = nn.Parameter(torch.zeros(12, 20)), .01, .8, .9, *((12, 20) if side == 'left' else (20, 12))
    optimizer = RSVDAdam([p], lr=lr, betas=(b1, b2), weight_decay=.1, rank=3, side=side, interval=3, n_iter=8, column_v=True)
    W, M, v, P = torch.zeros(m, n).double(), torch.zeros(3, n).double(), torch.zeros(n).double(), None
    for t in range(1, 13):
        turns = (torch.linalg.qr(torch.randn(k, k)).Q for k in (12, 20))
        p.grad = next(turns) @ spectrum(12, 20, torch.tensor([3., 2.5, 2., .1, .1]))[1] @ next(turns)
        G = (p.grad if side == 'left' else p.grad.T).double()
        optimizer.step()
        if t % 3 == 1:
            new = torch.linalg.svd(G, full_matrices=False).U[:, :3]
            M, P = M if P is None else new.T @ P @ M, new
        R = P.T @ G
        M, v = b1 * M + (1 - b1) * R, b2 * v + (1 - b2) * R.square().mean(0)
        N = M / (1 - b1 ** t) / ((v / (1 - b2 ** t)).sqrt() + 1e-8)
        W = (1 - lr * .1) * W - lr * (m / 3) ** .5 * P @ N
        torch.testing.assert_close((p if side == 'left' else p.T).detach().double(), W, atol=1e-4, rtol=0)
    assert W.abs().max() > .05 and optimizer.state[p]['exp_avg_sq'].shape == (1, n)


def test_conv_kernels_and_bf16_parameters():
    """A kernel is trained as a matrix (out, rest), by updates of rank r; a bf16 weight stays bf16, with fp32 moments."""
    p, q = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.randn(16, 8).bfloat16())
    o = RSVDAdam([p, q], lr=1e-2, rank=2)
    for _ in range(3):
        p.grad, q.grad = torch.randn_like(p), torch.randn_like(q)
        before = p.detach().clone(), q.detach().clone()
        o.step()
        assert torch.linalg.matrix_rank((p - before[0] * (1 - 1e-4)).view(8, 27), atol=1e-5) == 2
        assert not torch.equal(q, before[1]) and q.dtype == torch.bfloat16
    assert o.state[p]['basis'].shape == (8, 2) and o.state[p]['exp_avg'].shape == (2, 27)
    assert o.state[q]['exp_avg'].dtype == torch.float32


@pytest.mark.parametrize('mode, attached', [
    *((mode, True) for mode in MODES), ('left', False), ('energy', False), ('8bit', False)])
def test_every_mode_resumes_to_the_bit_and_learns(mode, attached):
    """16 steps, or 5, a weights_only file, and 11 more in a new optimizer, give the same bits, refreshes included. Interval and
    rank are those of the file. 60 steps on one batch halve its loss. No step draws from the global generator."""
    model, optimizer = make(attached, **MODES[mode])
    other_rank = {'rank': 3} if MODES[mode].get('rank') else {}
    again, other = make(attached, seed=5, **MODES[mode] | {'interval': 50} | other_rank)
    global_state = torch.get_rng_state()
    train(model, optimizer, 5)
    states = reloaded(model, optimizer)
    again.load_state_dict(states[0]), other.load_state_dict(states[1])
    train(model, optimizer, 16, start=5)
    train(again, other, 16, start=5)
    assert distance(model, again) == 0
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        a, b = optimizer.state[p], other.state[q]
        assert a.keys() == b.keys()
        for x, y in ((a[key], b[key]) for key in a):
            assert torch.equal(x, y) and x.dtype == y.dtype if torch.is_tensor(x) else x == y and type(x) is type(y) is int
    losses = [train(model, optimizer, 1, clip=None) for _ in range(60 if attached else 0)]
    assert not attached or losses[-1] < losses[0] / 2
    assert torch.equal(global_state, torch.get_rng_state())


@pytest.mark.parametrize('side', ['left', 'right'])
@pytest.mark.parametrize('shape', [(300, 20), (20, 300)])
def test_energy_chooses_the_rank_of_the_full_svd(shape, side):
    """The smallest rank whose squared singular values reach the share of all of them, on tall and on wide matrices."""
    G = spectrum(*shape, .8 ** torch.arange(20.))[1]
    s = torch.linalg.svdvals(G.double()).square()
    for energy in (.3, .9, .97):
        p = nn.Parameter(torch.zeros(shape))
        o = RSVDAdam([p], energy=energy, rank_min=1, rank_max=16, side=side)
        p.grad = G.clone()
        o.step()
        assert o.state[p]['basis'].shape[1] == int((s.cumsum(0) / s.sum() < energy).sum()) + 1


@pytest.mark.parametrize('attached', [False, True])
def test_a_refresh_with_energy_is_small(attached):
    """20,000 words of 32 numbers, a basis on the side of 32: 20 MB at most; an identity of the words would be 1.6 GB."""
    model, optimizer, _, state = alone(nn.Embedding(20000, 32), attached, energy=.9, rank_max=16, side='right')
    loss = model(torch.randint(20000, (16, 8))).square().sum()
    if not attached:
        loss.backward()

    def refresh():
        if attached:
            loss.backward()
        optimizer.gradients()
    assert 1e6 < common.peak_above(refresh, False) < 20e6
    assert state['refreshes'] == 1


@pytest.mark.parametrize('shape', [(4, 1024), (1024, 4)])
@pytest.mark.parametrize('attached', [False, True])
def test_a_refresh_that_overflows_skips_the_step_and_is_repeated(shape, attached):
    """A float16 gradient in range whose products with the sketch are not: the step is left out, the next refresh is good."""
    m, n = shape
    model, optimizer, p, state = alone(nn.Linear(n, m, bias=False), attached, lr=1e-3, rank=2, interval=2)
    if not attached:
        p.data = p.data.half()

    def gradients(size):
        """Of a G whose numbers are all `size`."""
        if attached:
            with torch.autocast('cpu', torch.float16):
                y = model(torch.full((1, n), size ** .5))
            y.backward(torch.full_like(y, size ** .5))
        else:
            p.grad = torch.full_like(p, size)
        return [R.isfinite().all().item() for R in optimizer.gradients().values()]
    for step in range(3):
        before = p.detach().clone()
        for _ in range(2 if step != 1 else 0):      # the first basis, and a later one
            assert gradients(8000.) == [False] and state['step'] == step and state.get('refreshes', 0) == step // 2
            optimizer.zero_grad()
        assert torch.equal(p, before)
        assert gradients(.1) == [True] and state['refreshes'] == step // 2 + 1
        assert state['basis'].isfinite().all()
        optimizer.step()
        optimizer.zero_grad()
    assert state['step'] == 3 and p.isfinite().all()


def test_a_refresh_that_overflows_in_the_first_micro_batch_skips_the_whole_step():
    """The second micro-batch does not make a basis instead, though it could."""
    model, optimizer, _, state = alone(nn.Linear(32, 8, bias=False), True, energy=.5, rank_min=2, rank_max=6)
    for sizes in ((float('inf'), 1.), (1.,)):
        optimizer.zero_grad()
        for size in sizes:
            model(torch.ones(1, 32)).mul(size).sum().backward()
        assert all(R.isfinite().all() == (len(sizes) == 1) for R in optimizer.gradients().values())
    optimizer.step()
    assert state['basis'].shape == (8, 2)


@pytest.mark.parametrize('old,new', [('8bit', 'fp32'), ('fp32', '8bit'), ('8bit', 'bf16')])
def test_a_checkpoint_goes_on_with_moments_of_another_dtype(old, new):
    """Moments of the checkpoint's dtype are read, and from the next step on kept in the one that is asked for."""
    (model, optimizer), (again, other) = (make(True, rank=2, side='right', state_dtype=dtype) for dtype in (old, new))
    train(model, optimizer, 5)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in other.param_groups:
        group['state_dtype'] = new
    moments = lambda: [optim.held(s, name).clone() for s in other.state.values() for name in ('exp_avg', 'exp_avg_sq')]
    for step in (5, 6):
        before = moments()
        train(again, other, step + 1, start=step)
        for s in other.state.values():
            assert s['exp_avg'].dtype == {'fp32': torch.float32, 'bf16': torch.bfloat16, '8bit': torch.int8}[new]
            assert ('exp_avg_top' in s) == ('exp_avg_sq_top' in s) == (new == '8bit')
        assert all(x.isfinite().all() and not torch.equal(x, y) for x, y in zip(moments(), before, strict=True))
    train(model, optimizer, 7, start=5)             # it went the same way, up to rounding
    assert 0 < distance(model, again) < .02


def test_sketches_are_functions_of_seed_parameter_and_refresh():
    """Another seed, parameter or refresh draws other numbers; the same three draw the same."""
    draws = {n: torch.randn(4, generator=optim.sketch_generator(*n)).tolist()
             for n in ((0, 1, 2), (0, 2, 1), (1, 1, 2), (0, 1, 3))}
    assert len({tuple(d) for d in draws.values()}) == 4
    assert draws[0, 1, 2] == torch.randn(4, generator=optim.sketch_generator(0, 1, 2)).tolist()


@pytest.mark.parametrize('attached', [False, True])
def test_a_refresh_runs_in_full_precision(attached):
    """Under torch.set_float32_matmul_precision and autocast the basis is the same to the bit; both are kept as they were."""
    def basis(precision, amp):
        torch.manual_seed(0)
        model, optimizer, _, state = alone(nn.Linear(96, 128, bias=False), attached, energy=.5, rank_min=2, rank_max=16)
        out, y = model(torch.randn(64, 96)), torch.randn(64, 128)
        if not attached:
            out.backward(y)
        torch.set_float32_matmul_precision(precision)
        with torch.autocast('cpu', torch.bfloat16, enabled=amp):
            if attached:
                out.backward(y)
            optimizer.gradients()
            assert torch.is_autocast_enabled('cpu') == amp
        assert torch.get_float32_matmul_precision() == precision
        torch.set_float32_matmul_precision('highest')
        assert_orthonormal(state['basis'], state['basis'].shape[1])
        return state['basis']
    try:
        expected = basis('highest', False)
        for precision, amp in (('high', False), ('medium', False), ('highest', True)):
            result = basis(precision, amp)
            if attached or precision != 'medium':   # else G itself is a product in bf16
                assert torch.equal(result, expected), (precision, amp)
    finally:
        torch.set_float32_matmul_precision('highest')


def test_full_precision_restores_the_settings():
    """The matmul precision of each backend is as it was, after an error too, and where only one backend was set."""
    places = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    precisions = lambda: [place.fp32_precision for place in places]
    before = precisions()
    try:
        for of_all, of_one in (('medium', None), ('highest', 'tf32')):
            torch.set_float32_matmul_precision(of_all)
            places[0].fp32_precision = of_one or places[0].fp32_precision
            now = precisions()
            with pytest.raises(KeyError), optim.full_precision('cpu'):
                assert torch.get_float32_matmul_precision() == 'highest' and not {'tf32', 'bf16'} & set(precisions())
                raise KeyError
            assert precisions() == now and (of_one or torch.get_float32_matmul_precision() == of_all)
    finally:
        torch.set_float32_matmul_precision('highest')
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


def test_parameters_updated_in_parts_get_the_same_numbers(monkeypatch):
    """Of many numbers only some are updated at a time; the weights after three steps are the same to the bit."""
    (a, oa), (b, ob) = (make(rank=2) for _ in 'ab')
    train(a, oa, 3)
    monkeypatch.setattr(optim, 'CHUNK', 500)
    train(b, ob, 3)
    assert distance(a, b) == 0


@pytest.mark.parametrize('attached', [False, True])
def test_interval_and_stagger(attached):
    """interval=1 refreshes in every step; stagger=1 makes one first basis a step, and no weight is trained before its own."""
    model, optimizer = make(attached, rank=2, interval=1)
    train(model, optimizer, 5)
    assert {s['refreshes'] for p, s in optimizer.state.items() if p.dim() > 1} == {5}
    model, optimizer = make(attached, rank=2, stagger=1, interval=8)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    start = [p.detach().clone() for p in matrices]
    for step in range(len(matrices)):
        train(model, optimizer, step + 1, start=step)
        moved = [not torch.equal(p, q) for p, q in zip(matrices, start, strict=True)]
        assert moved == [i <= step for i in range(len(matrices))]
    train(model, optimizer, 10, start=len(matrices))
    assert [optimizer.state[p]['step'] for p in matrices] == [10 - i for i in range(len(matrices))]


@pytest.mark.parametrize('wrong', [dict(side='up'), dict(rank=-1), dict(energy=1.5), dict(interval=0), dict(rank_min=0),
                                   dict(state_dtype='fp8'), dict(rank_min=9, rank_max=8), dict(scale=-1.), dict(lr=-1.),
                                   dict(betas=(1., .9))])
def test_options_out_of_range(wrong):
    """The optimizer and each of its groups refuse options out of range with a ValueError."""
    p, q = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2, 2))
    for refused in (lambda: RSVDAdam([p], **wrong), lambda: RSVDAdam([p]).add_param_group({'params': [q], **wrong})):
        with pytest.raises(ValueError, match='RSVDAdam'):
            refused()


# ---------------------------------------------------------------------------------------------------------------- bytes

# {shape: how often} of DistilBERT's parameters: 66,955,010 numbers in 104 tensors
DISTILBERT = {(30522, 768): 1, (512, 768): 1, (768, 768): 25, (3072, 768): 6, (768, 3072): 6, (2, 768): 1,
              (768,): 2 + 6 * (4 + 1 + 4) + 1, (3072,): 6, (2,): 1}


@pytest.mark.parametrize('options, on_adamw, expected', [
    (dict(side='left'), (), 3_060_664), (dict(side='short'), (), 3_757_912),
    (dict(side='left', state_dtype='8bit'), (), 1_064_640), (dict(side='right', column_v=True), (), 2_656_424),
    (dict(side='short'), ((30522, 768), (512, 768), (2, 768)), 193_431_568)],
    ids=['left', 'short', '8bit', 'columns', 'tables on AdamW'])
def test_bytes_of_low_rank_moments(options, on_adamw, expected):
    """Rank 4 for DistilBERT: what the published table prints as 2.92 MB; bases on the shorter side take more, 8 bits less,
    and so does one second moment per column."""
    total = 0
    for shape, count in DISTILBERT.items():
        p = nn.Parameter(torch.zeros(shape))
        p.grad = torch.ones_like(p)
        rank = dict(rank=0) if shape in on_adamw else dict(rank_fraction=4 / 768)
        optimizer = RSVDAdam([p], n_iter=0, oversample=0, **options, **rank)
        optimizer.step()
        total += count * optimizer_bytes(optimizer)
    assert total == expected


def test_memory_report_adds_up():
    """Parameters, projected gradients, optimizer and the rest make up the measured peak."""
    model, optimizer = make(True, rank=2, side='right')
    ids, labels = next(batches(1))
    F.cross_entropy(model(ids), labels).backward()
    report = memory_report(model, optimizer, 10 ** 6)
    assert report['parameters'] == 4 * sum(p.numel() for p in model.parameters())
    assert report['gradients'] == 4 * (2 * (50 + 7 + 40 + 24 + 3) + 40 + 3)                 # 2 of each row, and two biases
    assert sum(report.values()) - report['peak'] == report['peak'] == 10 ** 6


# ------------------------------------------------------------------------------------------ the projected backward pass


@pytest.mark.parametrize('mode', [m for m in MODES if m != 'plain'])
def test_projected_backward_equals_the_full_gradient(mode):
    """15 steps with clipping and refreshes give the same weights to rounding, and no parameter has a full gradient. attach()
    changes no name in the state_dict and no output."""
    steps, apart = 4 if 'state_dtype' in MODES[mode] else 15, []        # of fewer bits a rounding decides, and they part
    for seed in (1, 2, 3, 4, 5):                    # some runs meet two singular values that a rounding orders
        (a, oa), (b, ob) = make(seed=seed, **MODES[mode]), make(True, seed=seed, **MODES[mode])
        train(a, oa, steps)
        train(b, ob, steps)
        apart.append(distance(a, b))
        if apart[-1] < 5e-6:
            break
    assert apart[-1] < 5e-6, apart
    assert all(p.grad is None for p in b.parameters())
    a.load_state_dict(b.state_dict())
    ids, _ = next(batches(1))
    with torch.no_grad():
        assert torch.equal(a(ids), b(ids))


def test_no_gradient_of_full_size_exists():
    """In a step between refreshes the allocator hands out no tensor larger than a quarter of a weight."""
    model, optimizer, *_ = alone(nn.Linear(512, 640, bias=False), True, rank=4, side='right')
    for _ in range(2):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
            model(torch.randn(16, 512)).square().mean().backward()
            optimizer.step()
    largest = max(e.nbytes() for e in p.profiler.kineto_results.events() if e.name() == '[memory]')
    assert largest < 4 * 512 * 640 / 4


def test_an_attached_layer_saves_the_projected_input():
    """Right basis: tokens x r numbers in place of tokens x in; x itself only in the step of a new basis."""
    layer, optimizer, *_ = alone(nn.Linear(64, 32), True, rank=2, side='right', interval=3)
    sizes = []
    for _ in range(4):
        sizes.append([n for _, n in saved(layer, torch.randn(10, 64))[1]])
        layer(torch.randn(10, 64)).sum().backward()
        optimizer.step()
    assert sizes == [[10 * 64], [10 * 2], [10 * 2], [10 * 64]]


def test_accumulation():
    """Four micro-batches give the step of one batch, with the same bases. A refresh sees the first one only."""
    (a, oa), (b, ob) = (make(True, rank=2, interval=1000) for _ in 'ab')
    train(a, oa, 1)
    b.load_state_dict(a.state_dict())
    ob.load_state_dict(copy.deepcopy(oa.state_dict()))
    train(a, oa, 12, start=1)
    train(b, ob, 12, start=1, micro=4)
    assert distance(a, b) < 5e-6
    c, oc = make(True, rank=2, interval=3)
    train(c, oc, 9, micro=2)
    assert {s['refreshes'] for p, s in oc.state.items() if p.dim() > 1} == {3}
    assert {s['step'] for s in oc.state.values()} == {9}


@pytest.mark.parametrize('side', ['left', 'right'])
def test_gradient_checkpointing_and_autocast(side):
    """Checkpointing changes nothing; under autocast an attached model moves as a plain one does."""
    (a, oa), (b, ob) = (make(True, rank=2, side=side) for _ in 'ab')
    b.remat = True
    train(a, oa, 12)
    train(b, ob, 12)
    assert distance(a, b) < 1e-6
    (c, oc), (d, od) = (make(attached, rank=2, side=side) for attached in (True, False))
    for _ in range(6):                              # one batch: rounding in bf16 must not decide
        train(c, oc, 1, amp=True)
        train(d, od, 1, amp=True)
    assert 0 < distance(c, d) < .03                 # each step moves a number by up to .01


def test_attach_names_the_weights_that_keep_their_full_gradients(capsys):
    """A tied, a frozen and a convolution's weight and an embedding with max_norm are named with the reason, and trained."""
    model = nn.ModuleDict({'wte': nn.Embedding(20, 8), 'head': nn.Linear(8, 20, bias=False), 'conv': nn.Conv1d(8, 8, 3),
                           'rare': nn.Embedding(20, 8, max_norm=1.0), 'frozen': nn.Linear(8, 8), 'fine': nn.Linear(8, 8)})
    tied = model['head'].weight = model['wte'].weight
    model['frozen'].weight.requires_grad_(False)
    optimizer = RSVDAdam(model.parameters(), rank=2)
    left_alone = attach(model, optimizer)
    assert set(left_alone) == {'wte.weight', 'conv.weight', 'rare.weight', 'frozen.weight'}
    assert 'head' in left_alone['wte.weight'] and 'wte.weight (shared' in capsys.readouterr().out
    assert list(optimizer.slots) == [model['fine'].weight]
    model['head'](model['fine'](model['wte'](torch.arange(5)))).square().sum().backward()
    before = tied.detach().clone()
    assert tied.grad is not None and model['fine'].weight.grad is None
    optimizer.step()
    assert not torch.equal(before, tied)


def test_a_skipped_step_with_an_infinite_norm_leaves_no_trace():
    """The norm of infinite gradients is infinite; after zero_grad() training goes on as if that step had not been."""
    (a, oa), (b, ob) = (make(True, rank=2, side='right') for _ in 'ab')
    ids, labels = next(batches(1))
    for factor in (1e38, float('inf')):
        (F.cross_entropy(a(ids), labels) * factor * 1e4).backward()
        assert not oa.clip_grad_norm_(0).isfinite()
        oa.zero_grad()
    train(a, oa, 10)
    train(b, ob, 10)
    assert distance(a, b) == 0


# ------------------------------------------------------------------------------------------------------------ MuonAdamW


def muon_groups(model, **more):
    """Two matrices on Muon, with two learning rates; tables, biases and the head on AdamW."""
    inner, other = model.up.weight, model.down.weight
    rest = [p for p in model.parameters() if p is not inner and p is not other]
    return [{'params': [inner], 'muon': True, **more}, {'params': rest, 'weight_decay': 0.0, 'lr_scale': 2.0},
            {'params': [other], 'muon': True, 'momentum': .9, 'lr_scale': .5}]


def muon_train(model, optimizers, steps, start=0):
    """Every third step is without the gradient of one matrix and one bias; the learning rate differs at each step."""
    for step, (ids, labels) in enumerate(batches(steps, start), start):
        with torch.autocast('cpu', torch.bfloat16):
            F.cross_entropy(model(ids), labels).backward()
        if step % 3 == 1:
            model.up.weight.grad = model.head.bias.grad = None
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group['lr'] = 1e-2 / (step + 1) * group.get('lr_scale', 1.0)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize('fused', [None, True])
def test_muon_adamw_is_muon_and_adamw(fused):
    """10 steps of torch's two optimizers, each on its own groups, with learning rates set at each step: the same bits. After 7
    steps everything, the options too, comes from a weights_only file."""
    (first, _), (a, _), (b, _) = make(), make(seed=5), make()
    early, ours = (MuonAdamW(muon_groups(m, momentum=momentum), 1e-2, fused=fused) for m, momentum in ((first, .8), (a, .95)))
    up, rest, down = muon_groups(b, momentum=.8)
    muon = torch.optim.Muon([{k: v for k, v in g.items() if k != 'muon'} for g in (up, down)], 1e-2, weight_decay=.1,
                            momentum=.95, adjust_lr_fn='match_rms_adamw')
    adamw = torch.optim.AdamW([rest], 1e-2, betas=(.9, .95), weight_decay=.1, fused=fused)
    muon_train(first, [early], 7)
    for part, state in zip((a, ours), reloaded(first, early), strict=True):
        part.load_state_dict(state)
    muon_train(a, [ours], 10, start=7)
    muon_train(b, [muon, adamw], 10)
    assert distance(a, b) == 0 and distance(a, Net()) > .1
    assert optimizer_bytes(ours) == memory_report(a, ours, 0)['optimizer'] == 4 * (
        2 * 24 * 40 + 2 * (24 * (50 + 7 + 3) + 40 + 3) + 5)
    assert [set(ours.state[p]) for p in (a.up.weight, a.up.bias)] == [{'momentum_buffer'}, {'step', 'exp_avg', 'exp_avg_sq'}]


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_muon_takes_a_kernel_as_a_matrix(layout):
    """(6, 5, 3, 3) is trained as (6, 45), in either memory format, which it keeps."""
    start = torch.randn(6, 5, 3, 3)
    kernel, matrix = nn.Parameter(start.clone().to(memory_format=layout)), nn.Parameter(start.view(6, 45).clone())
    optimizers = [MuonAdamW([{'params': [p], 'muon': True}], .1) for p in (kernel, matrix)]
    for _ in range(5):
        g = torch.randn(6, 5, 3, 3)
        kernel.grad, matrix.grad = g.to(memory_format=layout), g.view(6, 45)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(kernel.flatten(1), matrix) and (kernel - start).abs().max() > .1
    assert kernel.is_contiguous(memory_format=layout)
    assert optimizer_bytes(optimizers[0]) == optimizer_bytes(optimizers[1]) == kernel.nbytes


def test_muon_refuses_vectors():
    """A parameter of fewer than two dimensions on Muon, and options out of range, raise ValueError."""
    for shape in ((7,), ()):
        with pytest.raises(ValueError, match=f'MuonAdamW: .*{re.escape(str(shape))}'):
            MuonAdamW([{'params': [nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(shape))], 'muon': True}], .1)
    for wrong in (dict(lr=-1.), dict(lr=.1, momentum=-1.), dict(lr=.1, betas=(1., .9))):
        with pytest.raises(ValueError, match='(?i)rate|momentum|beta'):
            MuonAdamW([nn.Parameter(torch.zeros(3, 4))], **wrong)


# ------------------------------------------------------------------------------------------------------------ TopRAdamW


def test_top_r_by_hand():
    """A fifth of 10 entries is the two largest; ties do not give a third; at least one is kept."""
    g = torch.tensor([[1., -5, 2, 0, 3], [-4, 4, 4, .5, 0]])
    assert torch.equal(optim.keep_top_(g.clone(), .2).nonzero()[0], torch.tensor([0, 1]))
    assert (optim.keep_top_(g.clone(), .2) != 0).sum() == 2 and (optim.keep_top_(g.clone(), .01) != 0).sum() == 1
    assert torch.equal(optim.keep_top_(g.clone(), 1.0), g)
    assert torch.equal(optim.keep_top_(g.clone().T.contiguous().T, .1), torch.tensor([[0., -5, 0, 0, 0], [0] * 5]))


def test_top_r_is_adamw_on_masked_gradients():
    """Ten steps are AdamW's on gradients of which only the largest 30 % are left; the fraction is in the state."""
    p, q = (nn.Parameter(torch.ones(7, 9)) for _ in range(2))
    a, b = TopRAdamW([p], lr=1e-2, fraction=.3), torch.optim.AdamW([q], lr=1e-2)
    for _ in range(10):
        g = torch.randn(7, 9)
        p.grad, q.grad = g.clone(), g * (g.abs() >= g.abs().flatten().topk(18).values[-1])
        a.step()
        b.step()
    assert torch.equal(p, q) and a.state_dict()['param_groups'][0]['fraction'] == .3
    with pytest.raises(ValueError, match='fraction'):
        TopRAdamW([p], fraction=0)


@pytest.mark.parametrize('rank', [0, 2])
def test_weights_in_another_memory_format(rank):
    """channels_last weights, and gradients that are transposed views, train as contiguous ones do."""
    x, trained = torch.randn(4, 3, 8, 8), []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(1)
        conv, linear = nn.Conv2d(3, 6, 3).to(memory_format=layout), nn.Linear(6, 5)
        optimizer = RSVDAdam([{'params': list(conv.parameters()), 'rank': rank}, {'params': list(linear.parameters())}],
                             lr=1e-2, rank=2, side='right')
        for _ in range(5):
            linear(conv(x.to(memory_format=layout)).mean((2, 3))).square().sum().backward()
            linear.weight.grad = linear.weight.grad.T.contiguous().T
            optimizer.step()
            optimizer.zero_grad()
        trained.append([p.detach().contiguous() for p in (*conv.parameters(), *linear.parameters())])
    for a, b in zip(*trained, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', ['plain', 'attached', 'muon'])
@pytest.mark.parametrize('copied', [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=['deepcopy', 'pickle'])
def test_a_copy_of_model_and_optimizer_trains_on_alike(kind, copied):
    """copy.deepcopy() and pickle take all that an optimizer needs, and share nothing with it."""
    if kind == 'muon':
        model = Net()
        pair = model, MuonAdamW(muon_groups(model), 1e-2)
    else:
        pair = make(kind == 'attached', rank=2, interval=3)
        train(*pair, 2)
    other = copied(pair)
    for model, optimizer in (pair, other):
        muon_train(model, [optimizer], 6, start=3) if kind == 'muon' else train(model, optimizer, 6, start=2)
    assert distance(pair[0], other[0]) == 0
    assert not {id(p) for p in pair[0].parameters()} & {id(p) for g in other[1].param_groups for p in g['params']}


def test_a_gradient_scaler_works_or_is_refused():
    """torch's GradScaler reaches p.grad alone: it serves a plain RSVDAdam and is refused where gradients are projected."""
    for attached in (False, True):
        model, optimizer = make(attached, rank=2)
        scaler, (ids, labels) = torch.amp.GradScaler('cpu'), next(batches(1))
        scaler.scale(F.cross_entropy(model(ids), labels)).backward()
        if not attached:
            before = [p.clone() for p in model.parameters()]
            scaler.step(optimizer)
            assert any(not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
        else:
            with pytest.raises(RuntimeError, match='GradScaler does not reach the projected gradients'):
                scaler.step(optimizer)


# ----------------------------------------------------------------------------------- the optimizer that a trainer names


@pytest.mark.parametrize('name, cls', [('adamw', torch.optim.AdamW), ('rsvd', RSVDAdam), ('muon', MuonAdamW)])
def test_make_gives_the_named_optimizer_its_groups(name, cls):
    """Hidden matrices get low-rank moments or Muon, everything else AdamW; each group keeps its weight decay and keys."""
    model = Net()
    groups = [{'params': [p for p in model.parameters() if p.dim() > 1], 'decay': .1, 'lr_scale': .5},
              {'params': [p for p in model.parameters() if p.dim() < 2], 'decay': 0.}]
    optimizer = optim.make(name, groups, {model.up.weight, model.down.weight}, lr=.01, betas=(.8, .9), rank=3, interval=4,
                           side='left', seed=2)
    result = [(g['weight_decay'], g.get('lr_scale')) for g in optimizer.param_groups]
    assert type(optimizer) is cls and result == [(.1, .5)] * (1 if name == 'adamw' else 2) + [(0., None)]
    ids, labels = next(batches(1))
    F.cross_entropy(model(ids), labels).backward()
    optimizer.step()
    inside, outside = optimizer.state[model.up.weight], optimizer.state[model.words.weight]
    assert ('exp_avg' in inside) == (name != 'muon') and outside['exp_avg'].shape == (50, 24)
    if name == 'rsvd':
        assert inside['basis'].shape == (40, 3) and inside['exp_avg'].shape == (3, 24)
        assert (optimizer.param_groups[0]['interval'], optimizer.param_groups[0]['seed']) == (4, 2)
    with pytest.raises(KeyError):
        optim.make('sgd', groups, set(), lr=.01, betas=(.8, .9))


def test_a_state_saved_before_column_moments_loads():
    """Groups without column_v, with the scale and the unrotated moments of their time, continue to the bit."""
    def trained(steps, state=None):
        torch.manual_seed(0)
        layer = torch.nn.Linear(8, 6)
        opt = RSVDAdam(layer.parameters(), lr=1e-3, rank=2, interval=1, scale=1.0, rotate=False)
        if state:
            layer.load_state_dict(state[0])
            opt.load_state_dict(state[1])
        for _ in range(steps):
            opt.zero_grad()
            layer(torch.ones(3, 8)).square().sum().backward()
            opt.step()
        return layer.state_dict(), opt.state_dict()
    half = trained(2)
    for group in half[1]['param_groups']:
        del group['column_v']
    half[0].update({name: p.clone() for name, p in half[0].items()})
    assert torch.equal(trained(2, half)[0]['weight'], trained(4)[0]['weight'])
