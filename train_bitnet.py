"""
Train a BitNet b1.58: every matrix but the embedding has weights -1, 0 and 1 and one scale; activations are int8.

    python train_bitnet.py config/arithmetic.py                         # one core, 20 minutes: it learns to add
    python train_bitnet.py config/tictactoe.py --quant=fp               # the full-precision baseline
    torchrun --nproc_per_node=8 train_bitnet.py config/fineweb95m.py    # a node with 8 GPUs
    python train_bitnet.py config/fineweb95m.py --estimate=True         # print the cost of a run, train nothing

A ternary matrix trains latent full-precision weights and rounds them in each pass. The baseline, --quant=fp, is the same model
without rounding, on the same batches. The model is BitNetForCausalLM of transformers (microsoft/bitnet-b1.58-2B-4T);
hf.bitnet_state() converts the tensors. Ctrl-C saves and stops the run; --resume=auto continues it.
"""
import contextlib
import math
import os
import sys
import time
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import configurator
import layers
import optim
from engine.engine import Engine
from readers import tasks, tokens
from report import costs

# run
out_dir = 'out/bitnet'         # folder for config.py, log.jsonl, last.pt, best.pt, packed.safetensors
seed = 1337                    # sets the initial weights and the order of samples
init_from = 'scratch'          # scratch | resume: continue out_dir | a checkpoint: use its weights
resume = ''                    # auto: continue the run in out_dir, or start if there is none | a checkpoint to continue from
overwrite = False              # start over in an out_dir that holds a run; deletes its checkpoints and log
# data
dataset = 'arithmetic'         # folder under data/; data/<name>/prepare.py makes it
vocab_size = 0                 # expected vocabulary size of the tokenizer; 0: any. If it is set, estimate needs no data
task = ''                      # arithmetic | tictactoe: each evaluation also scores answers or games; '': plain text
batch_size = 32                # sequences per optimizer step, over all devices and micro-steps
micro_batch_size = 0           # sequences per device at a time; 0: its whole share. Lower: less memory, more micro-steps
block_size = 128               # tokens per sequence
# model
n_layer = 4
n_head = 4                     # query heads
n_kv_head = 2                  # key and value heads; n_head / n_kv_head query heads share each
n_embd = 256                   # multiples of 256, also for n_ff, fit the blocks of GGUF's ternary types
n_ff = 768                     # width of the gated MLP
act = 'relu2'                  # activation of the MLP's gate: relu2 (b1.58-2B-4T) | silu (LLaMA, the first BitNets)
rope_theta = 10_000.0          # base of the rotary positions; 500,000 in the 2B model
quant = 'tern'                 # tern | fp: the same model with full-precision matrices, the baseline
# optimizer
optimizer = 'adamw'            # adamw | rsvd: Adam in `rank` dimensions | muon; both train the blocks' matrices, AdamW the rest
rank = 16                      # rsvd: dimensions of the moments of the blocks' matrices
interval = 200                 # rsvd: steps between two updates of the basis
side = 'right'                 # rsvd: side of the basis: left | right (saves the fewest activations) | short (the shorter side)
projected = True               # rsvd: full-precision layers form no full gradients in the backward pass; low-bit layers do
max_iters = 2000               # optimizer steps in total, including those before a resume
learning_rate = 0.0            # peak, at the end of warm-up; 0: from PEAK_RATES, by model size and quant
lr_scale = {'tern': 1.0}       # rate factor of ternary latent weights
ramp = 0.0                     # share of the steps over which low-bit weights turn from latent to rounded; evaluations round
second_lr = 0.0                # two_stage: step-0 value of the second half's line; 0: 2/3 of learning_rate, with fp all of it
min_lr = 0.0                   # learning rate at the last step
schedule = 'two_stage'         # cosine | linear | constant | two_stage (BitNet: at half, the rate drops and weight decay ends)
warmup_iters = 100             # steps of linear warm-up
weight_decay = 0.1             # on matrices and embeddings, not on gains; 0 in the second half of two_stage with tern
beta1 = 0.9                    # with muon, for AdamW only; Muon's own momentum is 0.95
beta2 = 0.95
grad_clip = 1.0                # largest global gradient norm; 0: no clipping
# evaluation, saving and logging
eval_interval = 250            # steps between evaluations
eval_iters = 50                # batches of batch_size sequences from the val split; every evaluation uses the same ones
log_interval = 10              # steps between log records
diag_interval = 100            # steps between log records of codes, flips and dead rows; 0: none
save_interval = 250            # steps between saves of last.pt; best.pt has the fewest wrong answers, then the lowest val loss
wandb_log = False              # also log to Weights & Biases; install wandb and log in first
wandb_project = 'nanobit'
wandb_run_name = ''            # '': the name of out_dir
# system
device = ''                    # '': cuda if available, else cpu
dtype = ''                     # float32 | bfloat16 (autocast); '': bfloat16 on cuda, float32 on cpu
compile = None                 # torch.compile; None: on cuda only. On a CPU it pays off only in long runs
estimate = False               # only print the cost of the run: parameters, FLOPs, memory, hours
tokens_per_s = 0.0             # speed that estimate assumes; 0: measured over a few steps
profile = False                # profile steps 5 to 7 with torch.profiler; prints a table and writes trace.json to out_dir
config = configurator.override(globals())   # file.py ... --key=value, later wins


# ---------------------------------------------------------------------------------------------------------------------
# model

# (parameters up to, first peak, second peak). tern: BitNet b1.58 Tips PDF, table 2, batches of 1M tokens. fp: its LLaMA
# baselines. The table starts at 700M. Smaller models need more (2.4e-3 at 125M in the b1 paper), so configs set their rates.
PEAK_RATES = {'tern': ((1.0e9, 1.5e-3, 1.0e-3), (math.inf, 1.2e-3, 8e-4)),
              'fp': ((1.0e9, 2.5e-4, 2.5e-4), (math.inf, 2.0e-4, 2.0e-4))}
HEAD = ('lm_head.weight',)      # the tied embedding under its second name; early checkpoints lack it


@dataclass
class BitNetConfig:
    """Shape of a BitNet. It has only plain types, because checkpoints store it."""
    vocab_size: int
    block_size: int = 128
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 2
    n_embd: int = 256
    n_ff: int = 768
    act: str = 'relu2'
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    quant: str = 'tern'


class NormedLinear(nn.Module):
    """Full-precision baseline of TernaryLinear, with the same parameter names: RMSNorm(act(x)) times a matrix."""

    def __init__(self, in_features, out_features, act, eps):
        super().__init__()
        self.in_features, self.eps = in_features, eps
        self.weight = nn.Parameter(torch.empty(out_features, in_features).normal_())    # same random draws as TernaryLinear
        self.gain = nn.Parameter(torch.ones(in_features))
        self.act = layers.Activation(act) if act else nn.Identity()

    def forward(self, x):
        x = self.act(x)                             # rms_norm sums in fp32 for any dtype of x
        return self.multiply(F.rms_norm(x, (self.in_features,), self.gain.to(x.dtype), self.eps))

    def multiply(self, x):                          # optim.attach() replaces its backward pass
        return F.linear(x, self.weight)

    def unfused(self):
        """Return the same layer as plain torch modules with shared tensors, for tools that replace linear layers."""
        with torch.device('meta'):
            norm, linear = nn.RMSNorm(self.in_features, self.eps), nn.Linear(self.in_features, len(self.weight), bias=False)
        norm.weight, linear.weight = self.gain, self.weight
        return nn.Sequential(self.act, norm, linear)


def bitlinear(c, in_features, rows, act=None):
    """One RMSNorm followed by several stacked matrices. rows: the height of each matrix; each is rounded with its own scale."""
    if c.quant == 'fp':
        return NormedLinear(in_features, sum(rows), act, c.norm_eps)
    return layers.TernaryLinear(in_features, sum(rows), chunks=tuple(rows), act=act, eps=c.norm_eps)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c.n_embd // c.n_head
        self.kv = c.n_kv_head * self.head_dim
        self.groups = c.n_head // c.n_kv_head
        self.qkv_proj = bitlinear(c, c.n_embd, (c.n_embd, self.kv, self.kv))        # contains input_layernorm
        self.o_proj = bitlinear(c, c.n_embd, (c.n_embd,))                           # contains attn_sub_norm

    def forward(self, x, rotary, cache=None):
        B, T, C = x.shape
        q, k, v = (t.unflatten(2, (-1, self.head_dim)).transpose(1, 2)              # B, heads, T, head_dim
                   for t in self.qkv_proj(x).split((C, self.kv, self.kv), 2))
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:                       # keys and values of earlier tokens; a new token attends to all of them
            assert T == 1 or 'k' not in cache, 'only an empty cache accepts several tokens at once'
            if 'k' in cache:
                k, v = torch.cat([cache['k'], k], 2), torch.cat([cache['v'], v], 2)
            cache['k'], cache['v'] = k, v
        y = common.attention(q, k, v, is_causal=T > 1, enable_gqa=self.groups > 1)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


def rotate(x, cos, sin):
    """Rotary positions (arXiv 2104.09864) in the half-and-half layout of transformers; x (B, heads, T, head_dim)."""
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)     # under autocast the products are fp32


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_up_proj = bitlinear(c, c.n_embd, (c.n_ff, c.n_ff))                # contains post_attention_layernorm
        self.down_proj = bitlinear(c, c.n_ff, (c.n_embd,), f'{c.act}_glu')          # contains ffn_sub_norm

    def forward(self, x):
        return self.down_proj(self.gate_up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attn, self.mlp = Attention(c), MLP(c)

    def forward(self, x, rotary, cache=None):
        x = x + self.attn(x, rotary, cache)
        return x + self.mlp(x)


class BitNet(nn.Module):
    """BitNet b1.58: rotary positions, tied head. ids (B, T) int64 -> last logits (B, 1, vocab), or mean loss in nats."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = nn.RMSNorm(c.n_embd, c.norm_eps)
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False, device='meta')     # draws no random numbers
        self.lm_head.weight = self.wte.weight
        head_dim = c.n_embd // c.n_head
        cpu = torch.device('cpu')                   # also of a model whose weights are on the meta device
        turns = c.rope_theta ** (-torch.arange(0, head_dim, 2, device=cpu) / head_dim)      # radians per position
        angles = torch.outer(torch.arange(c.block_size, device=cpu), torch.cat([turns, turns]))
        self.register_buffer('cos', angles.cos(), persistent=False)                 # (block_size, head_dim)
        self.register_buffer('sin', angles.sin(), persistent=False)
        nn.init.normal_(self.wte.weight, std=0.02)  # the head is the same matrix, so the first loss is ln(vocab)
        for name, m in self.named_modules():
            if isinstance(m, NormedLinear | layers.TernaryLinear):
                std = m.in_features ** -0.5         # less for layers that add to the residual stream, as in GPT-2
                nn.init.normal_(m.weight, std=std / math.sqrt(2 * c.n_layer) if name.endswith(('o_proj', 'down_proj')) else std)

    def forward(self, ids, targets=None, cache=None):
        past = cache[0]['k'].shape[2] if cache and 'k' in cache[0] else 0
        rotary = self.cos[past:past + ids.shape[1]], self.sin[past:past + ids.shape[1]]
        x = self.wte(ids)
        for i, block in enumerate(self.blocks):
            x = block(x, rotary, cache[i] if cache else None)
        x = self.norm(x)
        if targets is None:
            return self.lm_head(x[:, [-1]])         # generation needs only the last position
        return F.cross_entropy(self.lm_head(x).flatten(0, 1), targets.flatten())


@torch.no_grad()
def ternary_matrices(model):
    """Codes and scales of all ternary matrices, {'0.q': (int8 (rows, in), scale)} for layer.{q, k, v, o, gate, up, down}."""
    found = {}
    for i, block in enumerate(model.blocks):
        for names, m in (('q k v', block.attn.qkv_proj), ('o', block.attn.o_proj), ('gate up', block.mlp.gate_up_proj),
                         ('down', block.mlp.down_proj)):
            codes, scales = m.ternary()
            found |= {f'{i}.{name}': (part, scale)
                      for name, part, scale in zip(names.split(), codes.split(m.rows), scales.tolist(), strict=True)}
    return found


def count_codes(before, after, start_scales):
    """Log record of the ternary matrices before and after one step, each and in total: shares of -1, 0 and 1; share of codes
    that the step changed (None without `before`); rows of zeros only; change of the scales since the start. before, after:
    {name: (codes, scale)}. scale_drift is the mean of |ln(scale / start scale)|."""
    matrices, sizes = {}, [codes.numel() for codes, _ in after.values()]
    for name, (codes, scale) in after.items():
        share = lambda which: which.sum().item() / which.numel()
        matrices[name] = {'minus': share(codes < 0), 'zero': share(codes == 0), 'plus': share(codes > 0),
                          'flips': share(codes != before[name][0]) if before else None,
                          'dead_rows': (codes == 0).all(1).sum().item(), 'scale': scale,
                          'scale_ratio': scale / start_scales[name]}
    column = lambda key: [m[key] for m in matrices.values()]

    def of_all(key):
        values = column(key)
        return None if None in values else math.fsum(map(math.prod, zip(values, sizes, strict=True))) / sum(sizes)

    return {key: of_all(key) for key in ('minus', 'zero', 'plus', 'flips')} | {
        'dead_rows': sum(column('dead_rows')), 'matrices': matrices,
        'scale_drift': math.fsum(abs(math.log(ratio)) for ratio in column('scale_ratio')) / len(matrices)}


# ---------------------------------------------------------------------------------------------------------------------


def main():
    # ------------------------------------------------------------------------------------------------------- set-up
    rank_here, local_rank, world, dev = common.setup_processes(device)
    stopped = common.stop_flag()
    say = print if rank_here == 0 else (lambda *a, **k: None)
    fail = lambda why: configurator.fail(why, rank0_only=True)
    common.check_config(
        config, {'schedule': common.SCHEDULES, 'optimizer': optim.NAMES, 'side': optim.SIDES, 'quant': ('tern', 'fp'),
                 'act': ('relu2', 'silu'), 'task': tasks.TASKS},
        dict.fromkeys(('batch_size', 'block_size', 'n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_ff', 'eval_interval',
                       'eval_iters', 'log_interval', 'save_interval', 'rank', 'interval'), 1)
        | dict.fromkeys(('learning_rate', 'second_lr', 'min_lr', 'weight_decay', 'grad_clip', 'warmup_iters', 'diag_interval',
                         'tokens_per_s', 'vocab_size'), 0))
    for wrong, why in (
            (not (0 <= beta1 < 1 and 0 <= beta2 < 1), f'beta1={beta1}, beta2={beta2} must be at least 0 and below 1'),
            (not rope_theta > 0, f'rope_theta={rope_theta} must be above 0'),
            (min(lr_scale.values()) < 0, f'lr_scale={lr_scale} must be 0 or more'),
            (not 0 <= ramp < 1, f'ramp={ramp} must be at least 0 and below 1'),
            (n_embd % (2 * n_head) or n_head % n_kv_head,
             f'n_embd={n_embd} must be a multiple of 2 x n_head={n_head}, and n_head of n_kv_head={n_kv_head}')):
        if wrong:
            fail(why)
    amp = common.autocast(dev, dtype)
    torch.set_float32_matmul_precision('high')
    micro, accumulation = common.split_batch(batch_size, micro_batch_size, world)
    last_path, best_path, resume_path, elsewhere = common.find_run(
        out_dir, os.path.join(out_dir, 'last.pt') if init_from == 'resume' else resume, overwrite or estimate)

    # --------------------------------------------------------------------------------------------------------- data
    folder = tokens.dataset_dir(dataset)
    no_data = estimate and vocab_size > 0 and not list(folder.glob('*.bin'))          # estimates work before the download
    held_out, train_tokens, n_vocab = [], 0, vocab_size
    if not no_data:
        train_data, val_data = tokens.load(folder, 'train'), tokens.load(folder, 'val')
        for split, data in (('train', train_data), ('val', val_data)):
            if len(data) <= block_size:
                fail(f'{dataset} has {len(data)} {split} tokens, block_size={block_size} needs more; type a lower --block_size')
        tokenizer = train_data.tokenizer
        bits_per_byte = len(val_data) / val_data.n_bytes / math.log(2)     # nats per token -> bits per byte of text
        train_tokens, n_vocab = len(train_data), tokenizer.vocab_size
        if vocab_size not in (0, n_vocab):
            fail(f'{dataset} has a vocabulary of {n_vocab}, not of vocab_size={vocab_size}; type --vocab_size=0, or run '
                 'its prepare.py again')
        if task and tokenizer.name != 'byte':
            fail(f'task={task} is scored in bytes, {dataset} has {tokenizer.name} tokens; type --dataset={task}')
        if task:
            held_out = tasks.read(task, tokenizer.decode_bytes(val_data.windows([0], len(val_data))[0].tolist()), dataset)

    # -------------------------------------------------------------------------------------------------------- model
    model_config = BitNetConfig(vocab_size=-(-n_vocab // 64) * 64, block_size=block_size, n_layer=n_layer,
                                n_head=n_head, n_kv_head=n_kv_head, n_embd=n_embd, n_ff=n_ff, act=act, rope_theta=rope_theta,
                                quant=quant)
    torch.manual_seed(seed)                                            # same weights on every rank
    try:
        model = BitNet(model_config)
        if not (resume_path or no_data) and init_from != 'scratch':
            state = common.read_checkpoint(init_from, 'train_bitnet')
            common.check_tokens(state, init_from, tokenizer, dataset)
            function = ('n_head', 'n_kv_head', 'act', 'rope_theta', 'norm_eps')         # the shapes do not show these
            wanted = {key: getattr(model_config, key) for key in function}
            common.check_same(init_from, state['model_config'], wanted)
            if state['model_config']['quant'] != quant:
                say(f'{init_from} has quant={state["model_config"]["quant"]}; its latent weights become those of quant={quant}')
            common.load_model_state(model, state['model'], init_from, HEAD)
    except ValueError as e:
        configurator.fail(str(e))
    model.to(dev)
    low_bit = [m for m in model.modules() if isinstance(m, layers.LowBit)]
    share = layers.ramp(model) if ramp else None
    packed_bytes, fp32_bytes = layers.model_bytes(model)
    n_params = sum(p.numel() for p in model.parameters())
    rates = next(rates for most, *rates in PEAK_RATES[quant] if n_params <= most)
    first_lr = learning_rate or rates[0]
    last_lr = second_lr or (learning_rate * (2 / 3 if quant == 'tern' else 1) or rates[1])
    say(f'{n_params:,} parameters, {sum(m.weight.numel() for m in low_bit):,} of them ternary; '
        f'packed {packed_bytes:,} bytes ({packed_bytes / 1e6:.1f} MB), fp32 {fp32_bytes:,} ({fp32_bytes / 1e6:.1f} MB)')
    say(f'{batch_size} sequences a step = {micro} x {accumulation} micro-steps x {world} processes '
        f'= {batch_size * block_size:,} tokens' + ('' if no_data else
        f'; {tokenizer.name} tokens, {len(train_data):,} train, {len(val_data):,} val'))

    # ---------------------------------------------------------------------------------------------------- optimizer
    latent = {m.weight for m in low_bit}
    others = [p for p in model.parameters() if p not in latent]
    groups = [{'params': [p for p in others if p.dim() > 1], 'decay': weight_decay, 'lr_scale': 1.0},
              {'params': [m.weight for m in low_bit], 'decay': weight_decay, 'lr_scale': lr_scale['tern']},
              {'params': [p for p in others if p.dim() == 1], 'decay': 0.0, 'lr_scale': 1.0}]
    hidden = {p for p in model.blocks.parameters() if p.dim() > 1}
    opt = optim.make(optimizer, groups, hidden, lr=first_lr, betas=(beta1, beta2), rank=rank, interval=interval, side=side,
                     seed=seed)
    if estimate:
        ids = torch.randint(n_vocab, (micro if dev.type == 'cuda' else min(micro, 4), block_size + 1), device=dev)
        timed = torch.compile(model) if compile or (compile is None and dev.type == 'cuda') else model
        for line in costs.estimate(model, timed, opt, ids[:, :-1], ids[:, 1:], amp, micro, batch_size * block_size, max_iters,
                                   world, tokens_per_s, train_tokens):
            say(line)
        return common.close_processes()
    if optimizer == 'rsvd' and projected:
        optim.attach(model, opt, verbose=rank_here == 0)
    gradients = getattr(opt, 'gradients', lambda: {p: p.grad for p in raw_model.parameters() if p.grad is not None})

    # ------------------------------------------------------------------------------------------------------- resume
    step, best, wandb_id = 0, (math.inf, math.inf), None               # share of wrong answers (0 without a task), val loss
    lost = None                                     # (value, step) of a better evaluation that best.pt lacks: the disk was full
    start_scales = {name: scale for name, (_, scale) in ternary_matrices(model).items()} if quant == 'tern' else {}
    described = {**asdict(model_config), 'optimizer': optimizer} | ({'rank': rank, 'side': side} if optimizer == 'rsvd' else {})
    if resume_path:
        try:
            state = common.read_last_checkpoint(resume_path, 'train_bitnet', set_aside=rank_here == 0)
            common.check_tokens(state, resume_path, tokenizer, dataset)
            common.check_same(resume_path, {'optimizer': 'adamw', **state['config'], **state['model_config']}, described,
                              f'resume with {out_dir}/config.py')
            common.load_model_state(model, state['model'], resume_path, HEAD)
            common.load_optimizer(opt, state['optimizer'])
        except ValueError as e:
            configurator.fail(str(e))
        step, wandb_id = state['step'], state['wandb_id']
        best = best if elsewhere else (state['best_errors'], state['best_val_loss'])
        start_scales = state['start_scales']
        lost = None if elsewhere else state.get('lost')
        del state
        say(f'resumed from {resume_path} at step {step}')
    if not common.ranks_agree(step, *best, len(train_data), common.checksum(model.parameters())):
        configurator.fail('the ranks start from different steps, data or weights; do all nodes see the same files?')
    if rank_here == 0:
        common.open_run(out_dir, 'train_bitnet', config, step, not resume_path or elsewhere)
    run = None
    if wandb_log and rank_here == 0:
        run = common.start_wandb(wandb_project, wandb_run_name, out_dir, config, wandb_id)
        wandb_id = run.id if run else wandb_id

    # --------------------------------------------------------------------------------------------------------- loop
    raw_model = model
    if compile or (compile is None and dev.type == 'cuda'):
        model = torch.compile(model)
    if world > 1:
        model = common.distributed(model, dev, local_rank)

    def batch(data, starts):
        xy = common.to_device(data.windows(starts, block_size + 1), dev)
        return xy[:, :-1], xy[:, 1:]

    def batches(step):
        """The micro-batches of a step on this rank."""
        starts = common.sample_indices(seed, step, len(train_data) - block_size, batch_size).reshape(accumulation, world, micro)
        return [batch(train_data, starts[i, rank_here]) for i in range(accumulation)]

    @torch.no_grad()
    def evaluate():
        """Mean loss over eval_iters fixed batches of the val split, divided among ranks; None if the run is stopped."""
        starts = common.sample_indices(seed, -1, len(val_data) - block_size, eval_iters * batch_size).reshape(-1, micro)
        raw_model.eval()
        total = n = 0
        for i in range(0, len(starts), world):      # len(starts) is a multiple of world
            if common.any_rank(stopped()):
                return None
            x, y = batch(val_data, starts[i + rank_here])
            with amp:
                total, n = total + raw_model(x, y).item() * y.numel(), n + y.numel()
        raw_model.train()
        return common.mean_over_ranks(total, n)

    def predictor():
        """A function from n texts of equal length to the most likely next byte of each. On a CPU engine/ is the faster one."""
        scored = raw_model
        if dev.type == 'cpu' and dtype != 'bfloat16':
            with contextlib.suppress(ValueError):   # no compiler, or a shape that it cannot run
                scored = Engine(raw_model, head='fp', sequences=64)

        def predict(texts):
            with amp:
                return tasks.next_logits(scored, tokenizer, texts, dev).argmax(-1).tolist()
        return predict

    def log(record):
        if rank_here == 0:
            common.append_log(out_dir, record, run)

    def save(path, keep_previous=False):
        return rank_here == 0 and common.save_or_warn(path, {
            'trainer': 'train_bitnet', 'step': step, 'model_config': asdict(model_config), 'model': raw_model.state_dict(),
            'optimizer': opt.state_dict(), 'best_errors': best[0], 'best_val_loss': best[1], 'lost': lost, 'config': config,
            'tokenizer': tokenizer.describe(), 'wandb_id': wandb_id, 'start_scales': start_scales}, keep_previous)

    profiler = common.step_profiler(out_dir, dev) if profile and rank_here == 0 else None
    joules = common.energy_meter(dev)              # since this process started
    failure, stop, unsaved, upcoming = '', False, False, []
    clock, timed_steps, saved_step = time.perf_counter(), 0, step if resume_path == last_path else -1
    say(f'step {step} of {max_iters}' if step < max_iters else f'nothing to do: step {step} of {max_iters} is reached')
    model.train()

    while True:
        last_step = step >= max_iters
        evaluating = step % eval_interval == 0 or last_step
        stop = stop or world == 1 and stopped()     # several processes agree in each step
        if step > 0 and step != saved_step and (step % save_interval == 0 or last_step or stop or evaluating and unsaved):
            unsaved = not save(last_path, keep_previous=True)
            saved_step = saved_step if unsaved else step
            clock, timed_steps = time.perf_counter(), 0
        if not stop and evaluating:
            val_loss = evaluate()
            stop = val_loss is None
            if not stop:
                say(f'step {step}: val loss {val_loss:.4f} nats, {val_loss * bits_per_byte:.4f} bits per byte')
                record = {'step': step, 'tokens': step * batch_size * block_size, 'val_loss': val_loss,
                          'val_bpb': val_loss * bits_per_byte}
                errors = 0.0
                if task and rank_here == 0:
                    raw_model.eval()
                    scores = tasks.score(task, predictor(), held_out, seed)
                    raw_model.train()
                    say(', '.join(f'{name} {hits:,} of {n:,}' for name, (hits, n) in scores.items()))
                    record |= {name: hits / n for name, (hits, n) in scores.items()}
                    errors = tasks.errors(scores)
                errors = common.mean_over_ranks(errors, rank_here == 0)            # all ranks get rank 0's errors
                log(record)
                if math.isfinite(val_loss) and (errors, val_loss) < best:
                    before, best = best, (errors, val_loss)
                    if not common.any_rank(save(best_path)):           # best.pt is still the old one
                        best, lost = before, ((errors, val_loss), step)
                    elif lost and best <= lost[0]:
                        lost = None
            elif step != saved_step and step > 0 and save(last_path, keep_previous=True):
                saved_step = step
            clock, timed_steps = time.perf_counter(), 0
        if stop or last_step:
            break

        # TRAINING SECTION BEGIN
        lr = common.lr_at(step, schedule, first_lr, min_lr, warmup_iters, max_iters, last_lr)
        decays = schedule != 'two_stage' or step < max_iters // 2 or quant == 'fp'     # baselines decay to the end (Tips PDF)
        for group in opt.param_groups:
            group['lr'], group['weight_decay'] = lr * group['lr_scale'], group['decay'] * decays
        if ramp:
            share.fill_(min(1.0, step / (ramp * max_iters)))
        common.seed_step(seed, step, rank_here)
        loss_sum = torch.zeros((), device=dev)
        for i, (x, y) in enumerate(upcoming or batches(step)):
            if world > 1:                           # DDP reads this flag in the forward pass
                model.require_backward_grad_sync = i == accumulation - 1
            with amp:
                loss = model(x, y)
            loss_sum += loss.detach()
            (loss / accumulation).backward()
        grads = gradients()
        total_norm = nn.utils.get_total_norm(list(grads.values()))
        upcoming = batches(step + 1) if step + 1 < max_iters else []       # read while the device computes
        loss, grad_norm, stop = common.step_totals(loss_sum, accumulation, total_norm, stopped())
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            culprits = [n for n, p in raw_model.named_parameters() if p in grads and not grads[p].isfinite().all()]
            failure = common.not_finite(loss, grad_norm, step, culprits, saved_step)
            break
        if grad_clip:
            common.clip_(grads.values(), grad_clip, total_norm)
        counted = quant == 'tern' and diag_interval and (step + 1) % diag_interval == 0 and rank_here == 0
        codes = ternary_matrices(raw_model) if counted and lr else None        # a step with rate 0 changes no codes
        opt.step()
        opt.zero_grad(set_to_none=True)
        del grads                                   # free the gradients before the next forward pass
        # TRAINING SECTION END

        step, timed_steps = step + 1, timed_steps + 1
        if counted:
            log({'step': step, 'tokens': step * batch_size * block_size}
                | count_codes(codes, ternary_matrices(raw_model), start_scales))
            del codes
        if profiler:
            profiler.step()
        if step % log_interval == 0 or step == max_iters:
            ms = (time.perf_counter() - clock) / timed_steps * 1e3
            clock, timed_steps = time.perf_counter(), 0
            record = {'step': step, 'tokens': step * batch_size * block_size, 'loss': loss, 'lr': lr,
                      'grad_norm': grad_norm, 'ms': ms, 'tokens_per_s': batch_size * block_size / ms * 1e3,
                      'peak_mem_bytes': common.peak_memory_bytes(dev), 'optimizer_bytes': optim.optimizer_bytes(opt),
                      'energy_j': joules()}
            say(f'step {step}: loss {loss:.4f}, lr {lr:.2e}, norm {grad_norm:.2f}, {ms:.0f} ms, '
                f'{record["tokens_per_s"]:,.0f} tokens/s', flush=True)
            log(record)

    # ---------------------------------------------------------------------------------------------------------- end
    if not failure and not stop and rank_here == 0:
        try:
            state = common.read_best(best_path, 'train_bitnet', best[1] < math.inf)
            common.load_model_state(raw_model, state['model'], best_path)
            meta = {'trainer': 'train_bitnet', 'step': state['step'], 'model_config': asdict(model_config),
                    'tokenizer': tokenizer.describe(), 'val_loss': state['best_val_loss'], 'task': task}
            path = os.path.join(out_dir, 'packed.safetensors')
            size = common.save_packed(raw_model, path, meta)
            log({'step': step, 'packed_file_bytes': size, 'fp32_bytes': fp32_bytes, 'best_step': state['step'],
                 'best_val_loss': state['best_val_loss']})
            failure = common.not_kept(step, saved_step, lost)
            say(f'best val loss {state["best_val_loss"]:.4f} at step {state["step"]}; packed into {path}: {size:,} bytes')
        except OSError as e:
            failure = f'{e}; make room and type the same command with --resume=auto'
        except ValueError as e:                     # best.pt is lost, last.pt is not
            failure = f'{e}; type --init_from={last_path} and another --out_dir to go on from the last weights'
    common.close_processes()
    if run:
        run.finish(exit_code=1 if failure else 0)
    if failure:
        fail(failure)
    if stop and rank_here == 0:
        common.say_stopped([sys.argv[0], os.path.join(out_dir, 'config.py'), '--resume=auto'], step, saved_step)


if __name__ == '__main__':
    main()
