"""
Train a GPT-2 whose linear layers are full-precision, binary, ternary or 4-bit, in any mix.

    python train_gpt.py config/pycode_bin.py                            # a laptop, minutes
    torchrun --nproc_per_node=8 train_gpt.py config/c4_bin6.py          # a node with 8 GPUs
    python train_gpt.py config/pycode_bin.py --n_binary=6 --seed=2      # --key=value sets any constant below

A low-bit layer trains latent full-precision weights and rounds them in each pass. All kinds of layers share this trainer and
its batches, so their losses can be compared. Ctrl-C saves and stops the run; --resume=auto continues it.
"""
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
from pretrained import folders
from readers import tokens

# run
out_dir = 'out/gpt'            # folder for config.py, log.jsonl, last.pt, best.pt, packed.safetensors
seed = 1337                    # sets the initial weights, the order of samples and dropout
init_from = 'scratch'          # scratch | resume: continue out_dir | a checkpoint: use its weights | gpt2, gpt2-medium, ...
resume = ''                    # auto: continue the run in out_dir, or start if there is none | a checkpoint to continue from
overwrite = False              # start over in an out_dir that holds a run; deletes its checkpoints and log
# data
dataset = 'pycode'             # folder under data/; data/<name>/prepare.py makes it
batch_size = 32                # sequences per optimizer step, over all devices and micro-steps
micro_batch_size = 0           # sequences per device at a time; 0: its whole share. Lower: less memory, more micro-steps
block_size = 128               # tokens per sequence
# model
n_layer = 6
n_head = 4
n_embd = 128
dropout = 0.0                  # 0 for pre-training, 0.1 or more for small data sets
bias = False                   # biases in Linear and LayerNorm, as in GPT-2
qkv_proj = 'bin'               # fp | bin | tern | int4: kind of the q, k and v projections in low-bit blocks
c_proj = 'bin'                 # kind of the attention's output projection in low-bit blocks
mlp_proj = 'bin'               # kind of both MLP matrices in low-bit blocks
n_binary = 0                   # number of low-bit blocks, from the first one on; 0: none, 6: exactly 6
binary_blocks = ()             # low-bit blocks by number, e.g. (0, 3, 5), instead of n_binary; the first block is 0
binary_alpha = 1.0             # initial scale of binary q, k, v and MLP input layers
binary_alpha_out = 0.05        # initial scale of binary layers that add to the residual stream; embeddings start at 0.02
output_gains = False           # ternary layers multiply each output by a learned number
ternary_std = 0.0              # initial deviation of ternary latent weights; 0: 1/sqrt(inputs). Use 0.02 with a ramp
# optimizer
optimizer = 'adamw'            # adamw | rsvd: Adam in `rank` dimensions | muon; both train the blocks' matrices, AdamW the rest
rank = 16                      # rsvd: dimensions of the moments of the blocks' matrices
interval = 200                 # rsvd: steps between two updates of the basis
side = 'right'                 # rsvd: side of the basis: left | right (saves the fewest activations) | short (the shorter side)
projected = True               # rsvd: full-precision layers form no full gradients in the backward pass; low-bit layers do
max_iters = 2000               # optimizer steps in total, including those before a resume
learning_rate = 1e-3           # peak, at the end of warm-up
lr_scale = {'bin': 0.25, 'tern': 0.5, 'int4': 1.0, 'alpha': 0.02}   # rate factors: latent weights (not biases), binary scales
ramp = 0.0                     # share of the steps over which low-bit weights turn from latent to rounded; evaluations round
min_lr = 1e-4                  # learning rate at the last step
second_lr = 0.0                # two_stage: step-0 value of the second half's line; 0: 2/3 of learning_rate
schedule = 'cosine'            # cosine | linear | constant | two_stage (BitNet: at half, the rate drops and weight decay ends)
warmup_iters = 100             # steps of linear warm-up
weight_decay = 0.1             # on matrices and embeddings, not on gains, biases and scales
beta1 = 0.9                    # with muon, for AdamW only; Muon's own momentum is 0.95
beta2 = 0.95
grad_clip = 1.0                # largest global gradient norm; 0: no clipping
teacher = ''                   # checkpoint of a GPT on the same tokens: its predictions are targets beside the next tokens
distill = 0.9                  # share of the teacher in the targets; the logged loss is against these, val_loss never is
# evaluation, saving and logging
eval_interval = 250            # steps between evaluations
eval_iters = 50                # batches of batch_size sequences from the val split; every evaluation uses the same ones
log_interval = 10              # steps between log records
save_interval = 250            # steps between saves of last.pt; best.pt has the lowest val loss
wandb_log = False              # also log to Weights & Biases; install wandb and log in first
wandb_project = 'nanobit'
wandb_run_name = ''            # '': the name of out_dir
# system
device = ''                    # '': cuda if available, else cpu
dtype = ''                     # float32 | bfloat16 (autocast); '': bfloat16 on cuda, float32 on cpu
compile = None                 # torch.compile; None: on cuda only. On a CPU it pays off only in long runs
profile = False                # profile steps 5 to 7 with torch.profiler; prints a table and writes trace.json to out_dir
config = configurator.override(globals())   # file.py ... --key=value, later wins


# ---------------------------------------------------------------------------------------------------------------------
# model


@dataclass
class GPTConfig:
    """Shape of a GPT. It has only plain types, because checkpoints store it."""
    vocab_size: int
    block_size: int = 128
    n_layer: int = 6
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0
    bias: bool = False
    qkv_proj: str = 'bin'
    c_proj: str = 'bin'
    mlp_proj: str = 'bin'
    binary_blocks: tuple = ()
    binary_alpha: float = 1.0
    binary_alpha_out: float = 0.05
    output_gains: bool = False
    ternary_std: float = 0.0


class CausalSelfAttention(nn.Module):
    def __init__(self, c, qkv_kind, out_kind):
        super().__init__()
        self.n_head, self.dropout = c.n_head, c.dropout
        # One product of three stacked matrices. As in the papers, q, k and v each have their own threshold or scale.
        self.c_attn = layers.linear(qkv_kind, c.n_embd, 3 * c.n_embd, c.bias, chunks=3, **scale_in(c, qkv_kind))
        self.c_proj = layers.linear(out_kind, c.n_embd, c.n_embd, c.bias, **scale_out(c, out_kind))
        self.resid_dropout = nn.Dropout(c.dropout)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in self.c_attn(x).split(C, dim=2))   # B, H, T, C/H
        if cache is not None:                       # keys and values of earlier tokens; a new token attends to all of them
            assert T == 1 or 'k' not in cache, 'only an empty cache accepts several tokens at once'
            if 'k' in cache:
                k, v = torch.cat([cache['k'], k], 2), torch.cat([cache['v'], v], 2)
            cache['k'], cache['v'] = k, v
        y = common.attention(q, k, v, is_causal=T > 1, dropout_p=self.dropout if self.training else 0.0)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    def __init__(self, c, kind):
        super().__init__()
        self.c_fc = layers.linear(kind, c.n_embd, 4 * c.n_embd, c.bias, **scale_in(c, kind))
        self.folded = kind != 'fp'                  # a low-bit layer applies the GELU itself and saves only its input
        self.c_proj = layers.linear(kind, 4 * c.n_embd, c.n_embd, c.bias, act='gelu' if self.folded else None,
                                    **scale_out(c, kind))
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x):
        x = self.c_fc(x)
        return self.dropout(self.c_proj(x if self.folded else F.gelu(x)))


# A binary layer's output has standard deviation alpha, whatever its weights and input. If all alphas are equal, the first
# steps add noise 2 n_layer times as large as the embeddings to the residual stream. A small scale_out avoids this.
def scale_in(c, kind):
    return {'alpha': c.binary_alpha} if kind == 'bin' else {'output_gain': c.output_gains} if kind == 'tern' else {}


def scale_out(c, kind):
    return {'alpha': c.binary_alpha_out} if kind == 'bin' else scale_in(c, kind)


class Block(nn.Module):
    def __init__(self, c, low_bit):
        super().__init__()
        qkv, out, mlp = (c.qkv_proj, c.c_proj, c.mlp_proj) if low_bit else ('fp', 'fp', 'fp')
        # A ternary layer contains an RMSNorm; a LayerNorm before it would normalize twice.
        self.ln_1 = nn.Identity() if qkv == 'tern' else nn.LayerNorm(c.n_embd, bias=c.bias)
        self.attn = CausalSelfAttention(c, qkv, out)
        self.ln_2 = nn.Identity() if mlp == 'tern' else nn.LayerNorm(c.n_embd, bias=c.bias)
        self.mlp = MLP(c, mlp)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2: pre-norm, learned positions, tied head. ids (B, T) int64 -> last logits (B, 1, vocab), or the mean loss in nats;
    targets: ids (B, T) or probabilities (B, T, vocab)."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.wpe = nn.Embedding(c.block_size, c.n_embd)
        self.drop = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c, i in c.binary_blocks) for i in range(c.n_layer))
        self.ln_f = nn.LayerNorm(c.n_embd, bias=c.bias)
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        for name, m in self.named_modules():        # std 0.02 as in GPT-2, less for layers that add to the residual stream
            if isinstance(m, nn.Linear | nn.Embedding | layers.LowBit):
                # A ternary layer's scale is mean|W|. With AdamW, whose latent weights learn slowly, it must not start at 0.02.
                std = 0.02 if not isinstance(m, layers.TernaryLinear) else c.ternary_std or m.in_features ** -0.5
                nn.init.normal_(m.weight, std=std / math.sqrt(2 * c.n_layer) if name.endswith('c_proj') else std)

    def hidden(self, ids, cache=None):
        """Normalized output of the last block, (B, T, n_embd)."""
        past = cache[0]['k'].shape[2] if cache and 'k' in cache[0] else 0
        positions = torch.arange(past, past + ids.shape[1], device=ids.device)
        x = self.drop(self.wte(ids) + self.wpe(positions))
        for i, block in enumerate(self.blocks):
            x = block(x, cache[i] if cache else None)
        return self.ln_f(x)

    def forward(self, ids, targets=None, cache=None):
        x = self.hidden(ids, cache)
        if targets is None:
            return self.lm_head(x[:, [-1]])         # generation needs only the last position
        return F.cross_entropy(self.lm_head(x).flatten(0, 1), targets.flatten(0, 1))    # of ids or of probabilities

    def predict(self, ids, targets, share):
        """Targets for a student, (B, T, vocab) fp32: this model's probabilities times `share`, the rest on the true tokens."""
        p = self.lm_head(self.hidden(ids)).float().softmax(-1).mul_(share)
        return p.scatter_add_(2, targets[..., None], p.new_full((1, 1, 1), 1 - share).expand(*targets.shape, 1))


def load_weights(model, state, path):
    """Load the state dict of a GPT with other kinds of layers, read from `path`. A ternary layer stores the LayerNorm of its
    input as a gain. Scales that `model` does not use are dropped. Scales missing from `state` keep their initial values."""
    own, out = model.state_dict(), {}
    moved = {'ln_1.weight': 'attn.c_attn.gain', 'ln_2.weight': 'mlp.c_fc.gain'}
    for key, t in state.items():
        for old, new in [*moved.items(), *((v, k) for k, v in moved.items())]:
            if key not in own and key.endswith(old):
                key = key.removesuffix(old) + new
        if key in own or not key.endswith(('alpha', 'gain', 'ln_1.bias', 'ln_2.bias')):
            out[key] = t
    common.load_model_state(model, out, path, allow_missing=('alpha', 'gain'))


def load_teacher(tokenizer):
    """The GPT of the checkpoint `teacher`, and the tokens it was trained on. Raises ValueError if it cannot teach this run."""
    state = common.read_checkpoint(teacher, 'train_gpt')
    common.check_tokens(state, teacher, tokenizer, dataset)
    c = GPTConfig(**state['model_config'])
    if c.block_size < block_size:
        raise ValueError(f'{teacher} has {c.block_size} positions; type --block_size={c.block_size} or less')
    net = GPT(c)
    common.load_model_state(net, state['model'], teacher)
    return net.eval().requires_grad_(False), state['step'] * state['config']['batch_size'] * state['config']['block_size']


def low_bit_blocks():
    """Numbers of the low-bit blocks: binary_blocks, or the first n_binary. Exits with a message if one does not exist."""
    if n_binary and binary_blocks:
        configurator.fail('give n_binary or binary_blocks, not both; type --n_binary=0 to use binary_blocks', rank0_only=True)
    chosen = tuple(binary_blocks) or tuple(range(n_binary))
    if not 0 <= n_binary <= n_layer or any(not 0 <= i < n_layer for i in chosen):
        configurator.fail(f'blocks {chosen or n_binary} are not all in 0 .. {n_layer - 1} (n_layer={n_layer})', rank0_only=True)
    return chosen


# ---------------------------------------------------------------------------------------------------------------------


def main():
    # ------------------------------------------------------------------------------------------------------- set-up
    rank_here, local_rank, world, dev = common.setup_processes(device)
    stopped = common.stop_flag()
    say = print if rank_here == 0 else (lambda *a, **k: None)
    fail = lambda why: configurator.fail(why, rank0_only=True)
    common.check_config(
        config, {'schedule': common.SCHEDULES, 'optimizer': optim.NAMES, 'side': optim.SIDES, 'qkv_proj': layers.KINDS,
                 'c_proj': layers.KINDS, 'mlp_proj': layers.KINDS},
        dict.fromkeys(('batch_size', 'block_size', 'n_layer', 'n_head', 'n_embd', 'eval_interval', 'eval_iters', 'log_interval',
                       'save_interval', 'rank', 'interval'), 1)
        | dict.fromkeys(('learning_rate', 'second_lr', 'min_lr', 'weight_decay', 'grad_clip', 'warmup_iters',
                         'ternary_std'), 0))
    for wrong, why in (
            (not (0 <= beta1 < 1 and 0 <= beta2 < 1), f'beta1={beta1}, beta2={beta2} must be at least 0 and below 1'),
            (n_embd % n_head, f'n_embd={n_embd} is no multiple of n_head={n_head}'),
            (min(lr_scale.values()) < 0, f'lr_scale={lr_scale} must be 0 or more'),
            (not 0 <= ramp < 1, f'ramp={ramp} must be at least 0 and below 1'),
            (not 0 <= distill <= 1, f'distill={distill} must be from 0 to 1')):
        if wrong:
            fail(why)
    amp = common.autocast(dev, dtype)
    torch.set_float32_matmul_precision('high')
    micro, accumulation = common.split_batch(batch_size, micro_batch_size, world)
    last_path, best_path, resume_path, elsewhere = common.find_run(
        out_dir, os.path.join(out_dir, 'last.pt') if init_from == 'resume' else resume, overwrite)

    # --------------------------------------------------------------------------------------------------------- data
    folder = tokens.dataset_dir(dataset)
    train_data, val_data = tokens.load(folder, 'train'), tokens.load(folder, 'val')
    for split, data in (('train', train_data), ('val', val_data)):
        if len(data) <= block_size:
            fail(f'{dataset} has {len(data)} {split} tokens, block_size={block_size} needs more; type a lower --block_size')
    tokenizer = train_data.tokenizer
    bits_per_byte = len(val_data) / val_data.n_bytes / math.log(2)     # nats per token -> bits per byte of text

    # -------------------------------------------------------------------------------------------------------- model
    model_config = GPTConfig(vocab_size=-(-tokenizer.vocab_size // 64) * 64, block_size=block_size, n_layer=n_layer,
                             n_head=n_head, n_embd=n_embd, dropout=dropout, bias=bias, qkv_proj=qkv_proj, c_proj=c_proj,
                             mlp_proj=mlp_proj, binary_blocks=low_bit_blocks(), binary_alpha=binary_alpha,
                             binary_alpha_out=binary_alpha_out, output_gains=output_gains, ternary_std=ternary_std)
    torch.manual_seed(seed)                                            # same weights on every rank
    try:
        model = GPT(model_config)
        if not resume_path and init_from.startswith('gpt2') and not os.path.isfile(init_from):
            state, note = folders.gpt2_weights(init_from, model_config)
            load_weights(model, state, init_from)
            if note:
                say(note)
            if tokenizer.name != 'gpt2':
                raise ValueError(f'{init_from} needs GPT-2 tokens, {dataset} has {tokenizer.name} tokens; type --dataset=c4')
        elif not resume_path and init_from != 'scratch':
            state = common.read_checkpoint(init_from, 'train_gpt')
            common.check_tokens(state, init_from, tokenizer, dataset)
            common.check_same(init_from, state['model_config'], {'n_head': n_head})
            load_weights(model, state['model'], init_from)
        guide, seen = load_teacher(tokenizer) if teacher else (None, 0)
    except (ValueError, OSError) as e:
        configurator.fail(str(e))
    model.to(dev)
    low_bit = [m for m in model.modules() if isinstance(m, layers.LowBit)]
    share = layers.ramp(model) if ramp else None
    packed_bytes, fp32_bytes = layers.model_bytes(model)
    n_params = sum(p.numel() for p in model.parameters())
    say(f'{n_params:,} parameters, {sum(m.weight.numel() for m in low_bit):,} of them low-bit; '
        f'packed {packed_bytes:,} bytes ({packed_bytes / 1e6:.1f} MB), fp32 {fp32_bytes:,} ({fp32_bytes / 1e6:.1f} MB)')
    if teacher:
        say(f'{distill:.0%} of the targets come from {teacher}, which was trained on {seen:,} tokens')
    say(f'{batch_size} sequences a step = {micro} x {accumulation} micro-steps x {world} processes '
        f'= {batch_size * block_size:,} tokens; {tokenizer.name} tokens, {len(train_data):,} train, {len(val_data):,} val')

    # ---------------------------------------------------------------------------------------------------- optimizer
    matrices = {id(p): p for n, p in model.named_parameters() if n.endswith('weight') and p.dim() > 1}
    scalars = {n: p for n, p in model.named_parameters() if id(p) not in matrices}
    # A binary branch is noise at first, and later full-precision blocks do not need it. At the full learning rate its scale
    # reaches 0 within a dozen steps, and its weights never learn.
    alphas = [scalars.pop(n) for n in list(scalars) if n.endswith('alpha')]
    groups = [{'params': [matrices.pop(id(m.weight)) for m in low_bit if m.kind == kind],
               'decay': weight_decay, 'lr_scale': lr_scale.get(kind, 1.0)} for kind in layers.KINDS[1:]]
    groups += [{'params': list(matrices.values()), 'decay': weight_decay, 'lr_scale': 1.0},
               {'params': list(scalars.values()), 'decay': 0.0, 'lr_scale': 1.0},
               {'params': alphas, 'decay': 0.0, 'lr_scale': lr_scale['alpha']}]
    hidden = {p for n, p in model.blocks.named_parameters() if n.endswith('weight') and p.dim() > 1}
    opt = optim.make(optimizer, groups, hidden, lr=learning_rate, betas=(beta1, beta2), rank=rank, interval=interval, side=side,
                     seed=seed)
    if optimizer == 'rsvd' and projected:
        optim.attach(model, opt, verbose=rank_here == 0)
    gradients = getattr(opt, 'gradients', lambda: {p: p.grad for p in raw_model.parameters() if p.grad is not None})

    # ------------------------------------------------------------------------------------------------------- resume
    step, best_val_loss, wandb_id = 0, math.inf, None
    lost = None                                     # (value, step) of a better evaluation that best.pt lacks: the disk was full
    described = {**asdict(model_config), 'optimizer': optimizer} | ({'rank': rank, 'side': side} if optimizer == 'rsvd' else {})
    if resume_path:
        try:
            state = common.read_last_checkpoint(resume_path, 'train_gpt', set_aside=rank_here == 0)
            common.check_tokens(state, resume_path, tokenizer, dataset)
            common.check_same(resume_path, {'optimizer': 'adamw', 'output_gains': False, 'ternary_std': 0.0,
                                             **state['config'], **state['model_config']}, described,
                              f'resume with {out_dir}/config.py')
            common.load_model_state(model, state['model'], resume_path)
            common.load_optimizer(opt, state['optimizer'])
        except ValueError as e:
            configurator.fail(str(e))
        step, wandb_id = state['step'], state['wandb_id']
        best_val_loss = math.inf if elsewhere else state['best_val_loss']
        lost = None if elsewhere else state.get('lost')
        del state
        say(f'resumed from {resume_path} at step {step}')
    if not common.ranks_agree(step, best_val_loss, len(train_data), common.checksum(model.parameters())):
        configurator.fail('the ranks start from different steps, data or weights; do all nodes see the same files?')
    if rank_here == 0:
        common.open_run(out_dir, 'train_gpt', config, step, not resume_path or elsewhere)
    run = None
    if wandb_log and rank_here == 0:
        run = common.start_wandb(wandb_project, wandb_run_name, out_dir, config, wandb_id)
        wandb_id = run.id if run else wandb_id

    # --------------------------------------------------------------------------------------------------------- loop
    raw_model, predict = model, guide.to(dev).predict if teacher else None
    if compile or (compile is None and dev.type == 'cuda'):
        model, predict = torch.compile(model), torch.compile(predict) if teacher else None
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

    def log(record):
        if rank_here == 0:
            common.append_log(out_dir, record, run)

    def save(path, keep_previous=False):
        return rank_here == 0 and common.save_or_warn(path, {
            'trainer': 'train_gpt', 'step': step, 'model_config': asdict(model_config), 'model': raw_model.state_dict(),
            'optimizer': opt.state_dict(), 'best_val_loss': best_val_loss, 'lost': lost, 'config': config,
            'tokenizer': tokenizer.describe(), 'wandb_id': wandb_id}, keep_previous)

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
                log({'step': step, 'tokens': step * batch_size * block_size, 'val_loss': val_loss,
                     'val_bpb': val_loss * bits_per_byte})
                if val_loss < best_val_loss:
                    before, best_val_loss = best_val_loss, val_loss
                    if not common.any_rank(save(best_path)):           # best.pt is still the old one
                        best_val_loss, lost = before, (val_loss, step)
                    elif lost and best_val_loss <= lost[0]:
                        lost = None
            elif step != saved_step and step > 0 and save(last_path, keep_previous=True):
                saved_step = step
            clock, timed_steps = time.perf_counter(), 0
        if stop or last_step:
            break

        # TRAINING SECTION BEGIN
        lr = common.lr_at(step, schedule, learning_rate, min_lr, warmup_iters, max_iters, second_lr or learning_rate * 2 / 3)
        decays = schedule != 'two_stage' or step < max_iters // 2
        for group in opt.param_groups:
            group['lr'], group['weight_decay'] = lr * group['lr_scale'], group['decay'] * decays
        if ramp:
            share.fill_(min(1.0, step / (ramp * max_iters)))
        common.seed_step(seed, step, rank_here)
        loss_sum = torch.zeros((), device=dev)
        for i, (x, y) in enumerate(upcoming or batches(step)):
            if world > 1:                           # DDP reads this flag in the forward pass
                model.require_backward_grad_sync = i == accumulation - 1
            if teacher:
                with amp, torch.no_grad():
                    y = predict(x, y, distill)
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
        opt.step()
        opt.zero_grad(set_to_none=True)
        del grads                                   # free the gradients before the next forward pass
        # TRAINING SECTION END

        step, timed_steps = step + 1, timed_steps + 1
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
            state = common.read_best(best_path, 'train_gpt', best_val_loss < math.inf)
            common.load_model_state(raw_model, state['model'], best_path)
            meta = {'trainer': 'train_gpt', 'step': state['step'], 'model_config': asdict(model_config),
                    'tokenizer': tokenizer.describe(), 'val_loss': state['best_val_loss']}
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
