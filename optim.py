"""
Memory-saving optimizers: Adam with moments and, optionally, gradients projected to r dimensions; Muon together with AdamW.

    opt = RSVDAdam(model.parameters(), lr=2e-5, rank=16)  # moments of the projected gradient (GaLore, arXiv 2403.03507)
    attach(model, opt)                                    # backward pass without the full gradients of linear layers
    TopRAdamW(model.parameters(), fraction=0.1)           # AdamW on the largest tenth of each gradient
    MuonAdamW([{'params': matrices, 'muon': True}, {'params': others}], lr=1e-3)
    optimizer_bytes(opt), memory_report(model, opt, peak_bytes)

The orthonormal columns of P (m, r) are the leading left singular vectors of a gradient G (m, n). A randomized SVD (Halko,
Martinsson, Tropp, arXiv 0909.4061) recomputes P every `interval` steps:

    R = P^T G;  M = b1 M + (1 - b1) R;  V = b2 V + (1 - b2) R^2;  W = (1 - lr wd) W - lr scale P (M^ / (sqrt V^ + eps))

M^ and V^ are bias-corrected. The moments take r n numbers instead of m n. scale = sqrt(m / r) makes the update as large as
AdamW's, for one learning rate at all ranks. The parts of this file: functions of tensors, the optimizer, the projected
backward pass, TopRAdamW, MuonAdamW, reports.
"""
import contextlib
import functools
import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.optim.adamw import adamw

# ---------------------------------------------------------------------------------------------------------------------
# functions of tensors


def sketch_generator(seed, *numbers, device='cpu'):
    """A random generator that depends only on the arguments: equal on every rank, independent of the global generator."""
    for number in numbers:
        seed = (seed * 6_364_136_223_846_793_005 + number + 1_442_695_040_888_963_407) % 2 ** 64
    return torch.Generator(device).manual_seed(seed >> 1)


@contextlib.contextmanager
def full_precision(device_type):
    """Context in which products of fp32 matrices run in fp32: no TF32 or bf16 from torch.set_float32_matmul_precision, and no
    autocast. TF32 makes the columns of a basis orthonormal to 5e-4 instead of 4e-7. The setting affects all threads."""
    places = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [place.fp32_precision for place in places]
    try:
        of_all = torch.get_float32_matmul_precision()
    except RuntimeError:                            # the backends have different settings
        of_all = 'highest'
    torch.set_float32_matmul_precision('highest')
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(of_all)
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


def range_basis(multiply, multiply_t, shape, rank, *, oversample=4, n_iter=1, generator=None):
    """Randomized SVD of an m x n matrix G that is given only by its products. Returns (U, s): orthonormal leading left singular
    vectors U (m, k), singular values s (k,), k = min(rank + oversample, m, n); fp32, on the generator's device.

    multiply(X (n, k)) = G X and multiply_t(Y (m, k)) = G^T Y. Halko et al., algorithms 4.4 and 5.1: Q spans the range of G
    Omega, refined by n_iter power iterations with orthonormalization. The SVD of Q^T G uses the eigenvectors of its k x k Gram
    matrix in fp64. Returns None if a product is not finite. Call it inside full_precision().
    """
    m, n = shape
    k = min(rank + oversample, m, n)
    omega = torch.randn(n, k, generator=generator, device=generator.device if generator else None)
    y = multiply(omega)
    if not y.isfinite().all():
        return None
    q = torch.linalg.qr(y).Q
    for _ in range(n_iter):
        q = torch.linalg.qr(multiply(torch.linalg.qr(multiply_t(q)).Q)).Q
    b = multiply_t(q)                                                   # (Q^T G)^T, (n, k)
    if not b.isfinite().all():
        return None
    values, vectors = torch.linalg.eigh((b.T @ b).double())
    return q @ vectors.flip(1).float(), values.flip(0).clamp(min=0).sqrt().float()


def choose_rank(s, total, energy, rank_min, rank_max):
    """The smallest k with s_1^2 + ... + s_k^2 >= energy * total, limited to rank_min .. rank_max; rank_max if there is none."""
    reached = (s.double().square().cumsum(0) >= energy * float(total)).nonzero()
    return max(rank_min, min(rank_max, int(reached[0]) + 1 if len(reached) else rank_max))


def project(G, basis, left):
    """Project a gradient G (m, n): fp32 R (r, n) = P^T G for a left basis P (m, r), R (r, m) = (G Q)^T for a right Q (n, r)."""
    b = basis.to(G.dtype)
    return (b.T @ G if left else b.T @ G.T).float()


def project_back_(W, basis, N, left, decay, size):
    """W (m, n) <- decay W + size P N, or decay W + size (Q N)^T, in one pass over W and without a temporary of its size."""
    b, N = basis.to(W.dtype), N.to(W.dtype)
    return W.addmm_(b, N, beta=decay, alpha=size) if left else W.addmm_(N.T, b.T, beta=decay, alpha=size)


def fused_adamw_(params, grads, Ms, Vs, t, b1, b2, lr, weight_decay, eps):
    """Step t = 1, 2, ... of torch's fused AdamW on lists of fp32 tensors on one device: one pass, no large temporaries."""
    steps = torch.full((len(params),), t - 1.0, device=params[0].device).unbind()      # adamw() adds 1
    adamw(list(params), list(grads), list(Ms), list(Vs), [], steps, fused=True, amsgrad=False, beta1=b1, beta2=b2, lr=lr,
          weight_decay=weight_decay, eps=eps, maximize=False)


def column_update(R, M, V, t, b1, b2, eps):
    """Step t = 1, 2, ... of Adam on R (r, n) with one second moment for each column, as in Adam-mini (arXiv 2406.16793):
    V (1, n) <- b2 V + (1 - b2) mean(R^2). Changes M (r, n) and V in place and returns -M^ / (sqrt V^ + eps)."""
    M.lerp_(R, 1 - b1)
    V.lerp_(R.square().mean(0, keepdim=True), 1 - b2)
    return (M / (b1 ** t - 1)).div_((V / (1 - b2 ** t)).sqrt_().add_(eps))


def carry(t, old, new, rotate, square=False):
    """Carry a moment t (r, n), fp32, to a new basis. With C = new^T old, rotate gives M <- C M, as in LDAdam (arXiv
    2410.16103), and with square=True V <- S V + (1 - S 1) mean(V), S = C * C. Row i of S sums to the share of the new
    direction i that the old basis contains. For the rest V takes the mean of the column, since with 0 the next updates would
    be several times too long. Without rotate, moments keep their values, as in GaLore, cut or zero-padded to the new rank."""
    if rotate:
        C = new.float().T @ old.float()
        return C.square_() @ t + (1 - C.sum(1, keepdim=True)).clamp_(min=0) * t.mean(0) if square else C @ t
    return F.pad(t, (0, 0, 0, max(0, new.shape[1] - len(t))))[:new.shape[1]]


# Moments in fewer bits, with stochastic rounding: the mean of the rounded values is the exact value. With b2 = 0.999 a step
# changes V by a thousandth. Rounding to nearest would lose this change in every step.

STATE_DTYPES = ('fp32', 'bf16', '8bit')
BLOCK = 256                     # numbers that share a scale


def keep(t, dtype, square, generator):
    """Store fp32 t in `dtype`: {suffix: tensor}; held() is the inverse. 8bit stores one maximum per 256 numbers and one byte
    per number. It encodes sqrt(M) or, with square=True, V^(1/4), so that small numbers keep digits."""
    if dtype == 'fp32':
        return {'': t}
    noise = torch.rand(t.shape, generator=generator, device=t.device)
    if dtype == 'bf16':
        bits = t.contiguous().view(torch.int32) + (noise * 2 ** 16).int()       # a carry increments the upper 16 bits
        return {'': (bits & -2 ** 16).view(torch.float32).bfloat16()}
    flat = F.pad(t.flatten(), (0, -t.numel() % BLOCK)).view(-1, BLOCK)
    top = flat.abs().amax(1, keepdim=True)
    u = (flat.abs() / top.clamp(min=1e-38)).flatten()[:t.numel()].view(t.shape)
    low = (u.sqrt().sqrt() * 255 if square else u.sqrt() * 127).floor_()
    value = (lambda c: _fourth(c / 255)) if square else (lambda c: (c / 127).square())
    below = value(low)
    code = low.add_(noise * (value(low + 1) - below) < u - below).clamp_(max=255 if square else 127)
    return {'': code.to(torch.uint8) if square else (code * t.sign()).to(torch.int8), '_top': top.view(-1)}


def held(state, name):
    """The fp32 tensor that keep() stored in state under `name`."""
    t, top = state[name], state.get(f'{name}_top')
    if top is None:
        return t.float()
    square = t.dtype == torch.uint8
    # A second moment must not be 0: the update divides by it, and the first moment may be nonzero.
    u = _fourth(t.float().clamp_(min=0.5).div_(255)) if square else t.float().abs_().div_(127).square_()
    u = F.pad(u.flatten(), (0, -t.numel() % BLOCK)).view(-1, BLOCK).mul_(top[:, None]).flatten()[:t.numel()].view(t.shape)
    return u if square else u.mul_(t.sign())


def _fourth(t):
    return t.square().square_()


# ---------------------------------------------------------------------------------------------------------------------
# the optimizer

CHUNK = 2 ** 22                 # numbers per update, so that the temporaries stay small


class RSVDAdam(torch.optim.Optimizer):
    """AdamW on gradients projected to r dimensions. Any option may differ by parameter group.

    rank            dimensions; 0 or None: ordinary AdamW, as for every parameter of one dimension
    rank_fraction   > 0: rank = max(1, int(rank_fraction * min(m, n))) instead; in the reference it is rank / 768
    energy          > 0: each refresh chooses the smallest rank in rank_min .. rank_max that keeps this share of |G|_F^2 (the
                    reference calls this SVT, but thresholds nothing)
    interval        steps between refreshes of the basis
    scale           factor of the update, GaLore's alpha; 0: sqrt(m / r), which gives the update the RMS of AdamW's
    side            left: R = P^T G for every shape (the reference); right: R = G Q; short: the shorter side (GaLore)
    rotate          rotate the moments into a new basis instead of keeping their values (GaLore), see carry()
    column_v        one second moment for each column of R instead of one for each number, see column_update(): (r + 1) n
                    numbers instead of 2 r n. With a right basis a column belongs to a neuron or a word
    oversample, n_iter     of the randomized SVD
    stagger         > 0: about this many weights get a new basis per step. A weight starts to train when it has its first
                    basis, in step 0, 1, 2, ... 0: all weights in the same step
    state_dtype     fp32 | bf16 | 8bit for the moments; the basis is fp32 for fp32, else bf16
    seed            of sketches and stochastic rounding, combined with the index of the parameter and the refresh or step

    A weight of more than two dimensions counts as (shape[0], rest). Give rank 0 to a matrix of one row or column, such as
    stacked scales: it has a single direction to project on. The state consists of tensors and numbers. Gradients may have any
    dtype. A step reads p.grad of a low-rank weight and sets it to None. Raises ValueError for options out of range.
    """

    def __init__(self, params, lr=2e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, *, rank=16, rank_fraction=0.0,
                 energy=0.0, rank_min=4, rank_max=128, interval=200, scale=0.0, side='left', rotate=True, column_v=False,
                 oversample=4, n_iter=1, stagger=0, state_dtype='fp32', seed=0):
        self.slots = {}                             # {parameter: slot} of parameters that attach() serves
        self.projected = {}                         # {parameter: R (r, n) fp32} of this step
        self.failed = set()                         # parameters whose refresh overflowed in this step
        super().__init__(params, dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, rank=rank, rank_fraction=rank_fraction, energy=energy,
            rank_min=rank_min, rank_max=rank_max, interval=interval, scale=scale, side=side, rotate=rotate,
            column_v=column_v, oversample=oversample, n_iter=n_iter, stagger=stagger, state_dtype=state_dtype, seed=seed))

    def add_param_group(self, group):
        g = {**self.defaults, **group}
        for right, what in (
                (g['lr'] >= 0 and g['eps'] >= 0 and all(0 <= b < 1 for b in g['betas']), 'lr, eps >= 0, betas in [0, 1)'),
                (g['side'] in ('left', 'right', 'short'), 'side is left, right or short'),
                (g['state_dtype'] in STATE_DTYPES, f'state_dtype is one of {", ".join(STATE_DTYPES)}'),
                ((g['rank'] or 0) >= 0 and 0 <= g['rank_fraction'] <= 1 and 0 <= g['energy'] <= 1,
                 'rank >= 0, rank_fraction and energy 0 to 1'),
                (1 <= g['rank_min'] <= g['rank_max'], '1 <= rank_min <= rank_max'),
                (g['interval'] >= 1 and all(g[k] >= 0 for k in ('scale', 'oversample', 'n_iter', 'stagger')),
                 'interval >= 1; scale, oversample, n_iter, stagger >= 0')):
            if not right:
                raise ValueError(f'RSVDAdam: {what}; got ' + ', '.join(f'{k}={v!r}' for k, v in g.items() if k != 'params'))
        super().add_param_group(group)
        every = [p for g in self.param_groups for p in g['params']]
        self._index = {p: i for i, p in enumerate(every)}               # equal on every rank and after a resume
        self._order = {p: i for i, p in enumerate(p for g in self.param_groups for p in g['params'] if self.low_rank(p, g))}

    @property
    def _step_supports_amp_scaling(self):
        """torch's GradScaler.step() reads this. Its unscale_() sees p.grad alone, so R would stay scaled without a word."""
        if self.slots:
            raise RuntimeError('RSVDAdam: GradScaler does not reach the projected gradients of attach(); multiply the loss and '
                               'divide optimizer.gradients() yourself, or leave attach() out')
        return False

    def __getstate__(self):
        """What copy.deepcopy() and pickle take; torch's version leaves out all attributes of a subclass."""
        return super().__getstate__() | {k: getattr(self, k) for k in ('slots', 'projected', 'failed', '_index', '_order')}

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault('column_v', False)     # states that were saved before it existed

    def load_state_dict(self, state_dict):
        """Load the state, keeping the dtype of each tensor. torch's version casts it to the parameter's dtype."""
        super().load_state_dict(state_dict)
        ids = [i for g in state_dict['param_groups'] for i in g['params']]
        for i, p in zip(ids, self._index, strict=True):
            for key, t in state_dict['state'].get(i, {}).items():
                self.state[p][key] = t.to(p.device, copy=True) if torch.is_tensor(t) else t
        for group in self.param_groups:             # torch replaced the dicts of the groups
            for p in self.slots.keys() & set(group['params']):
                self.slots[p].group = group

    @staticmethod
    def low_rank(p, group):
        """Return (left, requested rank, shape (m, n) with the side of the basis first), or None for ordinary AdamW."""
        if p.dim() < 2 or not (group['rank'] or group['rank_fraction'] or group['energy']):
            return None
        m, n = p.shape[0], p[0].numel()
        left = m <= n if group['side'] == 'short' else group['side'] == 'left'
        rank = (group['rank_max'] if group['energy'] else max(1, int(group['rank_fraction'] * min(m, n)))
                if group['rank_fraction'] else group['rank'])
        return left, min(rank, m, n), (m, n) if left else (n, m)

    # -- the basis

    def waits(self, p, group):
        """Steps until p gets its first basis. Initializes the state of p."""
        state = self.state[p]
        if 'step' not in state:
            turn = self._order[p] // group['stagger'] if group['stagger'] else 0
            turns = -(-len(self._order) // group['stagger']) if group['stagger'] else 1
            # With more turns than steps in an interval, turns share a step, so that all are done within one interval.
            state.update(step=0, wait=turn if turns <= group['interval'] else turn * group['interval'] // turns)
        return state['wait']

    def due(self, p, group):
        """True if the current step of p has a refresh, even if the refresh is already done."""
        return not self.waits(p, group) and self.state[p]['step'] % group['interval'] == 0

    @torch.no_grad()
    def refresh(self, p, group, multiply, multiply_t):
        """Compute a new basis from products with the gradient, and carry the moments over. Does nothing if none is due."""
        state = self.state[p]
        if not self.due(p, group) or state.get('fresh_at') == state['step'] or p in self.failed:
            return
        with full_precision(p.device.type):
            _, rank, shape = self.low_rank(p, group)
            generator = sketch_generator(group['seed'], self._index[p], state.get('refreshes', 0), device=p.device)
            old = state.get('basis')
            found = range_basis(multiply, multiply_t, shape, rank, oversample=group['oversample'], n_iter=group['n_iter'],
                                generator=generator)
            if found is None:                           # not finite: R becomes nan, so that the trainer skips the step
                self.failed.add(p)
                if old is None:
                    state['basis'] = torch.full((shape[0], rank), math.nan, device=p.device)
                return
            basis, s = found
            if group['energy']:
                n, product = min((shape[1], multiply), (shape[0], multiply_t), key=lambda one: one[0])
                total = 0.0                             # |G|^2 from products with unit vectors, 256 at a time
                for i in range(0, n, 256):
                    block = torch.zeros(n, min(256, n - i), device=p.device)
                    block[i:i + 256].fill_diagonal_(1.0)
                    total = total + product(block).square().sum()
                rank = choose_rank(s, total, group['energy'], min(group['rank_min'], rank), rank)
            basis = basis[:, :rank].contiguous()
            if group['state_dtype'] != 'fp32':
                basis = basis.bfloat16()
            if 'exp_avg' in state and (group['rotate'] or rank != old.shape[1]):
                M, V = (held(state, name) for name in ('exp_avg', 'exp_avg_sq'))
                M = carry(M, old, basis, group['rotate'])
                self._keep(p, group, M, V if group['column_v'] else carry(V, old, basis, group['rotate'], square=True))
            state.update(basis=basis, refreshes=state.get('refreshes', 0) + 1, fresh_at=state['step'])

    def _keep(self, p, group, M, V):
        state = self.state[p]
        generator = None
        if group['state_dtype'] != 'fp32':
            generator = sketch_generator(group['seed'], self._index[p], state['step'], 1, device=M.device)
        for name, t, square in (('exp_avg', M, False), ('exp_avg_sq', V, True)):
            state.pop(f'{name}_top', None)          # may remain from another state_dtype before a resume
            for suffix, part in keep(t, group['state_dtype'], square, generator).items():
                state[name + suffix] = part

    # -- a step

    @torch.no_grad()
    def gradients(self):
        """{parameter: gradient for the step}: R (r, n) for a low-rank weight, else p.grad. Frees the full gradients of low-rank
        weights. Averages each R from attach() over processes. Change it in place to clip or unscale."""
        for group in self.param_groups:
            for p in group['params']:
                low = self.low_rank(p, group)
                if p.grad is None or low is None or p in self.slots:
                    continue
                if not self.waits(p, group):
                    G = p.grad.reshape(p.shape[0], -1)
                    A = G if low[0] else G.T
                    self.refresh(p, group, lambda X, A=A: (A @ X.to(A.dtype)).float(),
                                 lambda Y, A=A: (A.T @ Y.to(A.dtype)).float())
                    self.projected[p] = project(G, self.state[p]['basis'], low[0])
                else:
                    self.projected[p] = None
                p.grad = None
        if waiting := [p for p, slot in self.slots.items() if slot.R is not None]:
            if dist.is_initialized() and dist.get_world_size() > 1:
                flat = torch.cat([self.slots[p].R.flatten() for p in waiting])
                dist.all_reduce(flat)
                for p, part in zip(waiting, flat.div_(dist.get_world_size()).split([self.slots[p].R.numel() for p in waiting]),
                                   strict=True):
                    self.slots[p].R.copy_(part.view_as(self.slots[p].R))
            for p in waiting:
                self.projected[p], self.slots[p].R = self.slots[p].R, None
        for p, slot in self.slots.items():
            if self.waits(p, slot.group):
                self.projected[p] = None
        for p in self.failed:
            if self.projected.get(p) is not None:
                self.projected[p].fill_(math.nan)
        return {p: self.projected.get(p) if p in self.projected else p.grad for p in self._index
                if self.projected.get(p) is not None or p.grad is not None}

    def clip_grad_norm_(self, max_norm):
        """Scale gradients() in place to a global norm of at most max_norm; returns the norm before. The norm of R = P^T G is at
        most that of G, since R is the part of the gradient that the step uses."""
        grads = list(self.gradients().values())
        norm = torch.nn.utils.get_total_norm(grads)
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        grads = self.gradients()
        for group in self.param_groups:
            batches = {}                            # {(step, low rank, dtypes, device): [[(p, gradient), ...], ...]}
            for p in group['params']:
                state = self.state[p]
                if p in self.projected and self.projected[p] is None:
                    state['wait'] -= 1
                if p not in grads:
                    continue
                state['step'] = state.get('step', 0) + 1
                low = self.low_rank(p, group)
                if 'exp_avg' not in state:
                    state['exp_avg'], state['exp_avg_sq'] = (torch.zeros_like(
                        part, dtype=torch.float32, memory_format=torch.contiguous_format)
                        for part in (grads[p], grads[p][:1] if low and group['column_v'] else grads[p]))
                some = batches.setdefault((state['step'], low is not None, p.dtype, grads[p].dtype, p.device), [[]])
                if sum(q.numel() for q, _ in some[-1]) > CHUNK:
                    some.append([])
                some[-1].append((p, grads[p]))
            for (t, low, *_), some in batches.items():
                for pairs in some:
                    self._update(group, t, low, *zip(*pairs, strict=True))
        self.projected.clear()
        self.failed.clear()
        return loss

    def _update(self, group, t, low, params, grads):
        """One Adam step of several parameters that have taken the same number of steps."""
        (b1, b2), lr = group['betas'], group['lr']
        full = group['state_dtype'] == 'fp32' and all(self.state[p]['exp_avg'].dtype == torch.float32 for p in params)
        Ms, Vs = ([held(self.state[p], name) for p in params] for name in ('exp_avg', 'exp_avg_sq'))
        plain = not low and full and params[0].dtype == grads[0].dtype == torch.float32
        if plain and all(t.is_contiguous() for t in (*params, *grads)):                 # the kernel ignores strides
            fused_adamw_(params, grads, Ms, Vs, t, b1, b2, lr, group['weight_decay'], group['eps'])
            return
        grads, decay = [g.float().contiguous() for g in grads], 1 - lr * group['weight_decay']
        if low and group['column_v']:
            Ns = [column_update(*tensors, t, b1, b2, group['eps']) for tensors in zip(grads, Ms, Vs, strict=True)]
        else:
            Ns = [torch.zeros_like(g) for g in grads]           # a fused AdamW step on zeros writes the update into Ns
            fused_adamw_(Ns, grads, Ms, Vs, t, b1, b2, 1.0, 0.0, group['eps'])
        for p, M, V, N in zip(params, Ms, Vs, Ns, strict=True):
            if not full:
                self._keep(p, group, M, V)
            if low:
                W = p.flatten(1)                    # a copy if the weight of a convolution is channels_last
                left, _, (m, _) = self.low_rank(p, group)
                size = group['scale'] or math.sqrt(m / len(N))          # the RMS of P N is sqrt(r / m) times that of N
                project_back_(W, self.state[p]['basis'], N, left, decay, lr * size)
                if W.data_ptr() != p.data_ptr():
                    p.copy_(W.view_as(p))
            else:
                p.mul_(decay).add_(N.to(p.dtype), alpha=lr)

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        self.projected.clear()
        self.failed.clear()
        for slot in self.slots.values():
            slot.R = None


# ---------------------------------------------------------------------------------------------------------------------
# the projected backward pass: R without G


class _Slot:
    """Link from a layer's backward pass to the optimizer: the basis, whether a refresh is due, and R."""

    def __init__(self, optimizer, p, group, sketch_group):
        self.optimizer, self.p, self.group, self.sketch_group, self.R = optimizer, p, group, sketch_group, None
        self.left = optimizer.low_rank(p, group)[0]
        self.anchor = torch.zeros((), device=p.device, requires_grad=True)

    def waits(self):
        return self.optimizer.waits(self.p, self.group)

    def due(self):
        return self.optimizer.due(self.p, self.group)

    def basis(self, dtype):
        return self.optimizer.state[self.p]['basis'].to(dtype)

    def refresh(self, multiply, multiply_t):
        """Refresh the basis from this micro-batch's products with G, averaged over ranks. Does nothing if already done."""
        def mean(t):
            t = t.float()
            if dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(t, group=self.sketch_group)
                t.div_(dist.get_world_size())
            return t
        sides = (multiply, multiply_t) if self.left else (multiply_t, multiply)
        self.optimizer.refresh(self.p, self.group, *(lambda X, f=f: mean(f(X)) for f in sides))

    def add(self, R):
        self.R = R.float() if self.R is None else self.R.add_(R)


class _ProjectedLinear(torch.autograd.Function):
    """y = x W^T + b. Backward: the usual dx and db, and R instead of dW = dY^T x. A right basis Q (in, r) gives R = (x Q)^T dY
    and saves x Q (tokens, r) instead of x. A left basis P (out, r) gives R = (dY P)^T x. A step with a new basis saves x. A
    weight without a basis yet saves nothing. W requires no gradient, so DDP sends nothing for it. The slot's anchor, a scalar
    that requires a gradient, makes autograd run this backward pass."""
    @staticmethod
    def forward(ctx, x, W, b, slot, anchor):
        flat = x.reshape(-1, x.shape[-1])
        ctx.slot, ctx.has_bias, ctx.waits, ctx.full = slot, b is not None, slot.waits(), slot.left or slot.due()
        kept = flat[:0] if ctx.waits else flat if ctx.full else flat @ slot.basis(flat.dtype)
        ctx.save_for_backward(kept.clone() if ctx.waits else kept, W)
        ctx.shape = x.shape
        return F.linear(x, W.to(x.dtype), None if b is None else b.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        kept, W = ctx.saved_tensors
        slot, g = ctx.slot, g.reshape(-1, g.shape[-1])
        if not ctx.waits:
            if slot.due():
                slot.refresh(lambda X: g.T @ (kept @ X.to(kept.dtype)), lambda Y: kept.T @ (g @ Y.to(g.dtype)))
            if not ctx.full:
                slot.add(kept.T @ g)
            elif slot.left:
                slot.add((g @ slot.basis(g.dtype)).T @ kept)
            else:
                slot.add((kept @ slot.basis(kept.dtype)).T @ g)
        gx = (g @ W.to(g.dtype)).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return gx, None, g.sum(0) if ctx.has_bias else None, None, None


class _ProjectedEmbedding(torch.autograd.Function):
    """W[ids]. The gradient G of the table sums the rows of dY by id, so R = P^T G = P[ids]^T dY. With a right basis, (G Q)^T
    sums the rows of dY Q by id. Neither needs a matrix of the table's size."""
    @staticmethod
    def forward(ctx, ids, W, slot, padding, anchor):
        ctx.save_for_backward(ids)
        ctx.slot, ctx.padding, ctx.rows = slot, padding, len(W)
        return F.embedding(ids, W)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        ids, slot = ctx.saved_tensors[0].flatten(), ctx.slot
        if slot.waits():
            return (None,) * 5
        g = g.reshape(-1, g.shape[-1])
        if ctx.padding is not None:
            g = g.masked_fill((ids == ctx.padding)[:, None], 0)

        def by_id(t):
            return t.new_zeros(ctx.rows, t.shape[1]).index_add_(0, ids, t)
        if slot.due():
            slot.refresh(lambda X: by_id(g @ X.to(g.dtype)), lambda Y: g.T @ Y[ids].to(g.dtype))
        basis = slot.basis(g.dtype)
        slot.add(basis[ids].T @ g if slot.left else by_id(g @ basis).T)
        return (None,) * 5


@torch.compiler.disable                             # the backward pass uses the optimizer, so the graph breaks here
def projected_linear(m, x):
    """x (..., in) W^T + b with the weight, the bias (if any) and the slot of module m."""
    bias = getattr(m, 'bias', None)
    if not torch.is_grad_enabled():
        return F.linear(x, m.weight, bias)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    with torch.autocast(x.device.type, enabled=False):
        return _ProjectedLinear.apply(x, m.weight, bias, m.slot, m.slot.anchor)


class ProjectedLinear(nn.Linear):
    """nn.Linear after attach(): same weights and state_dict, another backward pass."""

    def forward(self, x):
        return projected_linear(self, x)


class ProjectedEmbedding(nn.Embedding):
    """nn.Embedding after attach(): same weights and state_dict, another backward pass."""

    @torch.compiler.disable
    def forward(self, ids):
        if not torch.is_grad_enabled():
            return super().forward(ids)
        return _ProjectedEmbedding.apply(ids, self.weight, self.slot, self.padding_idx, self.slot.anchor)


PROJECTED = {nn.Linear: ProjectedLinear, nn.Embedding: ProjectedEmbedding}


def attach(model, optimizer, verbose=True):
    """Replace the backward pass of layers with low-rank weights in this RSVDAdam: it computes R = P^T G or G Q exactly, and
    never forms the full gradient G. Serves nn.Linear, nn.Embedding, and modules with a method multiply(x) = x W^T. Returns
    {name of a low-rank weight that it cannot serve: reason}; these weights keep their full gradients.

    The weights no longer require a gradient: p.grad stays None. Use optimizer.gradients() for norms and clipping, since
    torch.nn.utils only sees p.grad. Call attach() before DistributedDataParallel, on all ranks. A step first averages R over
    ranks and so sends r n numbers instead of m n. A refresh uses only the gradient of the first micro-batch of its step. Works
    with gradient accumulation (one step() after any number of backward passes), autocast, gradient checkpointing, and
    torch.compile, whose graph breaks at each such layer. Does not work with FSDP or second derivatives.
    """
    options = {p: g for g in optimizer.param_groups for p in g['params'] if optimizer.low_rank(p, g)}
    owners = {}                                     # {weight: [(module, name of the module, name of the weight in it)]}
    for name, m in model.named_modules():
        for key, p in m.named_parameters(recurse=False):
            if p in options:
                owners.setdefault(p, []).append((m, name, key))
    sketch_group = dist.new_group() if dist.is_initialized() and dist.get_world_size() > 1 else None    # DDP uses the default
    left_alone = {}
    for p, places in owners.items():
        m, name, key = places[0]
        served = key == 'weight' and (type(m) in PROJECTED or hasattr(m, 'multiply'))
        odd = isinstance(m, nn.Embedding) and (m.sparse or m.scale_grad_by_freq or m.max_norm is not None)
        why = (f'shared with {places[1][1]}' if len(places) > 1 else f'of a {type(m).__name__}' if not served else
               'frozen' if not p.requires_grad else 'its embedding is sparse, scaled or renormalized' if odd else '')
        if why:
            left_alone[f'{name}.{key}'.lstrip('.')] = why
            continue
        if type(m) in PROJECTED:
            m.__class__ = PROJECTED[type(m)]
        else:
            m.multiply = functools.partial(projected_linear, m)
        m.slot = optimizer.slots[p] = _Slot(optimizer, p, options[p], sketch_group)
        p.requires_grad_(False)
    if verbose:
        print(f'projected backward pass: {len(optimizer.slots)} weights'
              + (f'; with full gradients: {", ".join(f"{n} ({why})" for n, why in left_alone.items())}' if left_alone else ''))
    return left_alone


# ---------------------------------------------------------------------------------------------------------------------
# AdamW on the largest entries


class TopRAdamW(torch.optim.AdamW):
    """AdamW on the max(1, int(fraction * numel)) entries of each gradient with the largest magnitude. The other entries are set
    to zero, in place, so their moments decay. `fraction` may differ by parameter group. The state is as large as AdamW's.
    Raises ValueError unless 0 < fraction <= 1."""

    def __init__(self, params, lr=2e-4, *, fraction=0.1, **options):
        super().__init__(params, lr=lr, **options)
        for group in self.param_groups:
            group.setdefault('fraction', fraction)
            if not 0 < group['fraction'] <= 1:
                raise ValueError(f'TopRAdamW: fraction must be above 0 and at most 1, got {group["fraction"]}')

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group['params']:
                if p.grad is not None:
                    keep_top_(p.grad, group['fraction'])
        super().step()
        return loss


def keep_top_(t, fraction):
    """Zero all but the max(1, int(fraction * numel)) entries of t with the largest magnitude, in place; returns t."""
    k = max(1, int(fraction * t.numel()))
    flat = t.view(-1) if t.is_contiguous() else t.reshape(-1)
    top = flat.abs().topk(k, sorted=False).indices
    kept = flat[top]
    return t.zero_().view(-1).index_copy_(0, top, kept).view_as(t) if t.is_contiguous() else t.copy_(
        torch.zeros_like(flat).index_copy_(0, top, kept).view_as(t))


# ---------------------------------------------------------------------------------------------------------------------
# Muon together with AdamW


class MuonAdamW(torch.optim.Optimizer):
    """One optimizer of two: torch.optim.Muon for the groups with 'muon': True, torch.optim.AdamW for the others.

    Muon orthogonalises the momentum of each matrix (Newton-Schulz in bf16). Its update has the RMS of AdamW's (match_rms_adamw,
    arXiv 2502.16982), so both use the same learning rate. Its state is one tensor per matrix instead of two. Use it for the
    matrices inside a network, and AdamW for embeddings, the head, biases and gains. A weight (out, in, h, w) counts as
    (out, in h w), in any memory format. A group may have any option of its optimizer (momentum, betas, eps, ...) and other
    keys. Raises ValueError for a muon parameter of fewer than two dimensions. Both optimizers raise for options out of range.
    """

    def __init__(self, groups, lr, *, betas=(0.9, 0.95), momentum=0.95, weight_decay=0.1, fused=None):
        # Both start without parameters; step() passes them the groups and the state.
        self._muon = torch.optim.Muon([{'params': []}], lr, weight_decay, momentum, adjust_lr_fn='match_rms_adamw')
        self._adamw = torch.optim.AdamW([{'params': []}], lr, betas, weight_decay=weight_decay, fused=fused)
        super().__init__(groups, {'muon': False})

    def __getstate__(self):
        return super().__getstate__() | {'_muon': self._muon, '_adamw': self._adamw}         # see RSVDAdam

    def add_param_group(self, group):
        muon = group.setdefault('muon', False)
        super().add_param_group({**(self._muon if muon else self._adamw).defaults, **group})
        for p in self.param_groups[-1]['params'] if muon else ():
            if p.dim() < 2:
                raise ValueError(f'MuonAdamW: Muon is for matrices, not for a parameter of shape {tuple(p.shape)}')

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        # The groups and the state may have changed since the last step, so pass the current ones.
        self._adamw.param_groups, self._adamw.state = [g for g in self.param_groups if not g['muon']], self.state
        self._muon.param_groups, self._muon.state, copies = [], {}, []
        for group in self.param_groups:
            if group['muon']:
                matrices = []
                for p in group['params']:
                    if p.grad is not None:
                        W = p.detach().flatten(1)   # a copy if the weight of a convolution is channels_last
                        W.grad = p.grad.flatten(1)
                        self._muon.state[W] = self.state[p]
                        matrices.append(W)
                        if W.data_ptr() != p.data_ptr():
                            copies.append((p, W))
                self._muon.param_groups.append({**group, 'params': matrices})
        self._adamw.step()
        self._muon.step()
        for p, W in copies:
            p.copy_(W.view_as(p))
        self._muon.param_groups, self._muon.state = [], {}         # so that zero_grad() frees the gradients
        return loss


# ---------------------------------------------------------------------------------------------------------------------
# the optimizer of a trainer's constant `optimizer`

NAMES = ('adamw', 'rsvd', 'muon')
SIDES = ('left', 'right', 'short')


def make(name, groups, hidden, *, lr, betas, rank=16, interval=200, side='right', seed=0):
    """Create the optimizer `name`. groups: dicts with params, decay (the weight decay) and any keys of the trainer.

    hidden: set of the matrices between embedding and head. rsvd gives them moments of `rank` dimensions; muon orthogonalises
    their updates; AdamW takes the rest. Raises KeyError for a name not in NAMES and ValueError for options out of range.
    """
    inside, outside = {'adamw': ({}, {}), 'rsvd': ({'rank': rank}, {'rank': 0}), 'muon': ({'muon': True}, {})}[name]
    parts = []
    for g in groups:
        among = hidden if inside else ()            # AdamW needs no separate groups
        for options, params in ((outside, [p for p in g['params'] if p not in among]),
                                (inside, [p for p in g['params'] if p in among])):
            if params:
                parts.append({**g, **options, 'params': params, 'weight_decay': g['decay']})
    fused = parts[0]['params'][0].device.type in ('cpu', 'cuda')
    if name == 'rsvd':
        return RSVDAdam(parts, lr, betas, interval=interval, side=side, seed=seed)
    if name == 'muon':
        return MuonAdamW(parts, lr, betas=betas, fused=fused)
    return torch.optim.AdamW(parts, lr, betas, fused=fused)


# ---------------------------------------------------------------------------------------------------------------------
# reports


def optimizer_bytes(optimizer):
    """Bytes of the tensors in an optimizer's state: the memory that it uses between steps."""
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))


def memory_report(model, optimizer, peak_bytes):
    """Report memory in bytes: {parameters, buffers, gradients, optimizer, rest, peak}. Shared tensors count once. rest is the
    remainder of the measured peak: activations and temporaries. Call it after backward and before zero_grad."""
    slots = getattr(optimizer, 'slots', {})
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    grads += [r for r in getattr(optimizer, 'projected', {}).values() if r is not None]
    grads += [s.R for s in slots.values() if s.R is not None]
    report = {'parameters': sum(p.nbytes for p in model.parameters()), 'buffers': sum(b.nbytes for b in model.buffers()),
              'gradients': sum(g.nbytes for g in grads), 'optimizer': optimizer_bytes(optimizer)}
    return {**report, 'rest': peak_bytes - sum(report.values()), 'peak': peak_bytes}
