"""
Estimates the cost of a training run before it starts: parameters, FLOPs, memory by part, hours. A trainer passes its model
and a micro-batch of any tokens. Speed and saved tensors are measured here in seconds; the rest is arithmetic.
"""
import time

import torch
import torch.nn as nn

import layers
import optim


def saved_bytes(forward, model):
    """Bytes of the tensors that forward() saves for backward. Counts each storage once and skips the model's own tensors."""
    own, saved = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}, {}

    def record(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(record, lambda t: t):
        loss = forward()                            # keeps the graph alive: a freed tensor's address would be used again
    del loss
    return sum(saved.values())


def flops_per_token(model, n_layer, n_embd, block_size):
    """FLOPs of forward and backward per token: 6 per matrix weight, including the head, plus attention over the whole context
    (PaLM, appendix B: 12 L C T, not halved for the causal mask)."""
    lookups = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1 and id(p) not in lookups)
    head = max((m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)), default=0)   # tied to the token
    return 6 * (weights + head) + 12 * n_layer * n_embd * block_size                                    # embedding


def mean_seconds(step, device, seconds=3):
    """Mean seconds per call of step(). It is called once to warm up (and compile), then for about `seconds`, at least twice."""
    sync = torch.cuda.synchronize if device.type == 'cuda' else (lambda: None)
    step()
    sync()
    n, start = 0, time.perf_counter()
    while n < 2 or time.perf_counter() - start < seconds:
        step()
        sync()
        n += 1
    return (time.perf_counter() - start) / n


def estimate(model, compiled, optimizer, x, y, amp, micro, tokens_per_step, max_iters, world, tokens_per_s, train_tokens):
    """Estimate the cost of a run -> list of lines to print. compiled: the model as it will run; x, y: (n, block_size) ids for
    the measurements, n = micro or 1 < n < micro; tokens_per_s: 0 measures it here and assumes `world` processes of the same
    speed; train_tokens: tokens of the data set, 0 if unknown."""
    c, device, mb = model.config, x.device, lambda n: f'{n / 1e6:12,.1f} MB'
    packed, fp32 = layers.model_bytes(model)
    n_params = sum(p.numel() for p in model.parameters())

    def loss(n=None, model=model):
        with amp:
            return model(x[:n], y[:n])
    saved = saved_bytes(loss, model)
    if micro > len(x):                              # extrapolate from n and 1: autocast saves its weight copies only once
        saved += (saved - saved_bytes(lambda: loss(1), model)) / (len(x) - 1) * (micro - len(x))

    def step():                                     # RSVDAdam frees each gradient after its update, so fill them in again
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.grad is None and p.requires_grad else p.grad
        optimizer.step()
    adamw, how = isinstance(optimizer, torch.optim.AdamW), 'as given'
    if not tokens_per_s:
        one = mean_seconds(lambda: loss(model=compiled).backward(), device) * micro / len(x)
        update = mean_seconds(step, device)
        tokens_per_s = tokens_per_step / (one * tokens_per_step / (micro * x.shape[1] * world) + update)
        how = f'measured here on {len(x)} x {x.shape[1]} tokens' + (
            f', for {world} processes of this speed, without the time to exchange gradients' if world > 1 else '')
    tokens = tokens_per_step * max_iters
    flops = flops_per_token(model, c.n_layer, c.n_embd, c.block_size)
    hours = tokens / tokens_per_s / 3600
    if not adamw and not optimizer.state:
        step()                                      # allocates the optimizer's state at its real size
    state = ('AdamW moments', 2 * fp32) if adamw else (type(optimizer).__name__, optim.optimizer_bytes(optimizer))
    parts = {'weights, fp32': fp32, 'gradients': fp32, state[0]: state[1],
             f'saved tensors, {micro} x {c.block_size} tokens': int(saved)}
    if world > 1:
        parts['buffers for the exchange of gradients'] = fp32
    return [f'parameters       {n_params:,}',
            f'packed           {packed:,} bytes, {packed / fp32:.1%} of fp32',
            f'a token          {flops:,} FLOPs forward and backward',
            f'tokens           {tokens:,} in {max_iters:,} steps'
            + (f', {tokens / train_tokens:.2f} times the data' if train_tokens else ''),
            f'compute          {flops * tokens:.3g} FLOPs',
            'memory of one process:', *(f'{mb(n)}  {name}' for name, n in parts.items()),
            f'{mb(sum(parts.values()))}  in all, without the temporaries of single operations',
            f'speed            {tokens_per_s:,.0f} tokens/s {how}, {flops * tokens_per_s / 1e12:.2f} TFLOP/s',
            f'time             {hours:,.1f} hours' + (f' ({hours / 24:.1f} days)' if hours > 48 else '')
            + ', without evaluations and saves']
