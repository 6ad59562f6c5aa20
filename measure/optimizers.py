"""Measurements of optimizers for bench.py: time of a step and of a refresh, bytes of their state, whole fine-tuning steps."""
import argparse
import importlib.util
import logging
import re
import statistics
import sys

import torch
import torch.nn as nn

import configurator
import layers
from common import peak_memory_bytes
from measure.turns import device_name, in_turns, measure, mib, middle, peak_bytes, ratio, resident_bytes, show, times_ms
from optim import RSVDAdam, attach, memory_report, optimizer_bytes
from pretrained.adapters import only_adapters
from report import costs

# ---------------------------------------------------------------------------------------------------------------------
# a step of an optimizer

INTERVAL = 200                  # steps over which the time of a refresh is amortised
NEVER = 10 ** 9                 # interval in steps that no run reaches: no refresh
PEERS = {'galore': 'galore_torch', 'bitsandbytes': 'bitsandbytes'}


def refresh_every(optimizer, steps):
    for group in optimizer.param_groups:
        group['interval'] = steps


def block_optimizer(name, params):
    logging.getLogger('bitsandbytes').setLevel(logging.ERROR)       # it warns of missing 4-bit kernels, not needed here
    kind, _, rank = name.partition(' ')
    if kind == 'adamw':
        return torch.optim.AdamW(params, fused=True)
    if kind == 'rsvd':
        return RSVDAdam(params, rank=int(rank), side='short', interval=NEVER)
    if kind == 'galore':
        import galore_torch
        return galore_torch.GaLoreAdamW([{'params': params, 'rank': int(rank), 'update_proj_gap': NEVER, 'scale': 1.0,
                                          'proj_type': 'std'}], no_deprecation_warning=True)
    import bitsandbytes
    return bitsandbytes.optim.AdamW8bit(params)


def state_bytes(optimizer):
    """optimizer_bytes() of any optimizer. Counts GaLore's bases, which are inside objects; a shared tensor counts once."""
    tensors = [t for s in optimizer.state.values() for v in s.values() for t in (v, getattr(v, 'ortho_matrix', None))]
    return sum({t.data_ptr(): t.nbytes for t in tensors if torch.is_tensor(t)}.values())


def optim_worker(a):
    """Answer each line, a number of steps, by the median ms of a step and the additional ms of a refresh of all matrices. For
    GaLore, the first step is the refresh. full SVD: torch.linalg.svd of one matrix of each shape, times the layers."""
    cuda, first = a.device == 'cuda', None
    torch.manual_seed(0)
    shapes = [(3 * a.dim, a.dim), (a.dim, a.dim), (4 * a.dim, a.dim), (a.dim, 4 * a.dim)]
    params = [nn.Parameter(torch.randn(s, device=a.device)) for s in shapes * (1 if a.name == 'full SVD' else a.layers)]
    grads = [torch.randn_like(p) for p in params]

    def give():                                     # before each step, because RSVDAdam frees projected gradients
        for p, g in zip(params, grads, strict=True):
            p.grad = g

    def svd():
        for g in grads:
            torch.linalg.svd(g, full_matrices=False)
    for line in sys.stdin:
        if a.name == 'full SVD':
            yield {'refresh_ms': a.layers * times_ms(svd, 1, cuda)[0]}
            continue
        try:
            if first is None:
                optimizer = block_optimizer(a.name, params)
                first = times_ms(optimizer.step, 1, cuda, give)[0]
        except Exception as e:                      # noqa: BLE001  another package may not support this device
            if a.name.split()[0] not in PEERS:
                raise
            yield {'failed': str(e).split('\n')[0]}
            continue
        ms, refresh = statistics.median(times_ms(optimizer.step, int(line), cuda, give)), None
        if a.name.startswith('rsvd'):
            refresh_every(optimizer, 1)
            refresh = times_ms(optimizer.step, 1, cuda, give)[0] - ms
            refresh_every(optimizer, NEVER)
        elif a.name.startswith('galore'):
            refresh = first - ms
        yield {'ms': ms, 'refresh_ms': refresh, 'amortised_ms': ms + (refresh or 0) / INTERVAL,
               'optimizer_bytes': state_bytes(optimizer)}


def numbers_in(a, key):
    """List of the numbers of an option such as --ranks=16,128."""
    text = getattr(a, key)
    if not re.fullmatch(r'[1-9]\d*(,[1-9]\d*)*', text):
        configurator.fail(f'--{key}={text} are no numbers; type e.g. --{key}=16,128')
    return list(map(int, text.split(',')))


def block_variants(ranks):
    """Names of the optimizers to measure. Those of other packages are left out if their package is not installed."""
    names = ['adamw', *(f'{kind} {r}' for kind in ('rsvd', 'galore') for r in ranks), 'bitsandbytes 8bit', 'full SVD']
    absent = [kind for kind, package in PEERS.items() if importlib.util.find_spec(package) is None]
    return [n for n in names if n.split()[0] not in absent]


def optim(a):
    """Measure a step and a refresh of low-rank optimizers on GPT-2 124M's block matrices, and of AdamW and other packages."""
    names = block_variants(numbers_in(a, 'ranks'))
    workers, answers = in_turns([dict(vars(a), run=None, bench='optim', name=n) for n in names], a.rounds, 1, a.steps)
    for worker in workers:
        worker.close()
    answers_of = dict(zip(names, answers, strict=True))
    for name in [n for n in names if 'failed' in answers_of[n][0]]:
        print(f'left out: {name} ({answers_of.pop(name)[0]["failed"]})')
    print(f'{4 * a.layers} matrices of {a.layers} blocks of width {a.dim}, fp32, {a.device} ({device_name(a)}), {a.threads} '
          f'threads, torch {torch.__version__}, {a.rounds} rounds x {a.steps} steps;\nrefresh: of all matrices, in addition '
          f'to a plain step; amortised: one refresh in {INTERVAL} steps. full SVD: torch.linalg.svd, 4 shapes x {a.layers}')
    rows = []
    for name, mine in answers_of.items():
        peer = answers_of.get(name.replace('rsvd', 'galore')) if name.startswith('rsvd') else None
        rows.append({'bench': 'optim', 'name': name, **{k: middle(mine, k) for k in mine[0]},
                     'ratio': ratio(mine, answers_of['adamw'], 'ms'), 'galore_ratio': ratio(mine, peer, 'ms'),
                     'svd_ratio': ratio(mine, answers_of['full SVD'], 'refresh_ms'),
                     'amortised_ratio': ratio(mine, answers_of['adamw'], 'amortised_ms'), 'interval': INTERVAL, 'dim': a.dim,
                     'layers': a.layers, 'threads': a.threads, 'device': device_name(a), 'torch': torch.__version__})
    show(rows, [('name', 'optimizer', ''), ('optimizer_bytes', 'bytes', ',.0f'), ('ms', 'ms/step', '.1f'),
                ('ratio', 'x adamw', '.2f'), ('galore_ratio', 'x galore', '.2f'), ('refresh_ms', 'refresh ms', ',.0f'),
                ('svd_ratio', 'x full SVD', '.3f'), ('amortised_ms', 'amortised', '.1f'),
                ('amortised_ratio', 'x adamw', '.2f')], a.json)


# ---------------------------------------------------------------------------------------------------------------------
# DistilBERT: bytes of its optimizer state, and a step of fine-tuning


def distilbert(a):
    """DistilBERT with 2 labels and random weights, in training mode. Without transformers it is a one-line error."""
    if importlib.util.find_spec('transformers') is None:
        configurator.fail("DistilBERT's shape comes from transformers; type: pip install transformers")
    from transformers import DistilBertConfig, DistilBertForSequenceClassification
    torch.manual_seed(0)
    config = DistilBertConfig(dim=a.dim, hidden_dim=4 * a.dim, n_layers=a.layers, n_heads=max(1, a.dim // 64),
                              max_position_embeddings=max(512, a.tokens), attn_implementation=a.attention)
    return DistilBertForSequenceClassification(config).to(a.device).train()


def training(model, optimizer, a):
    """(forward, step), functions that run on a.batch rows of random tokens or, given a number of rows, on fewer."""
    ids = torch.randint(model.config.vocab_size, (a.batch, a.tokens), device=a.device)
    labels = torch.randint(2, (a.batch,), device=a.device)

    def forward(rows=a.batch):
        return model(input_ids=ids[:rows], labels=labels[:rows]).loss

    def step(rows=a.batch):
        forward(rows).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return forward, step


def shape_of(a):
    attention = '' if a.attention == 'sdpa' else f'{a.attention} attention, '
    return (f'{a.layers} layers x {a.dim}, {a.batch} x {a.tokens} tokens, {attention}fp32, {a.device} ({device_name(a)}), '
            f'{a.threads} threads, torch {torch.__version__}')


SCHEMES = {'adam': 'Adam', 'left': 'left, all matrices', 'short': 'short, all matrices',
           'blocks': 'short, embeddings and classifier on Adam'}


def optim_bytes_worker(a):
    scheme, _, rank = a.name.partition(' ')
    model = distilbert(a)
    on_adam = {n for n, _ in model.named_parameters() if scheme == 'blocks' and ('embeddings' in n or n[:10] == 'classifier')}
    groups = [{'params': [p for n, p in model.named_parameters() if n not in on_adam]},
              {'params': [p for n, p in model.named_parameters() if n in on_adam], 'rank': 0, 'rank_fraction': 0.0}]
    optimizer = (torch.optim.AdamW(model.parameters(), fused=True) if scheme == 'adam' else
                 RSVDAdam(groups, rank_fraction=int(rank) / a.dim, side='left' if scheme == 'left' else 'short'))
    _, step = training(model, optimizer, a)
    peak = max(peak_bytes(model, optimizer, step, a.device == 'cuda') for _ in range(2))    # the first step is a refresh
    yield {'scheme': SCHEMES[scheme], 'rank': int(rank) if rank else None, 'optimizer_bytes': optimizer_bytes(optimizer),
           'peak_bytes': peak}


def optim_bytes(a):
    """Measure the bytes of RSVDAdam's and Adam's state for DistilBERT after a step, and peak training memory."""
    names = ['adam', *(f'{scheme} {r}' for scheme in list(SCHEMES)[1:] for r in numbers_in(a, 'ranks'))]
    rows = measure(names, 'optim_bytes', a)
    for r in rows:
        r.update({f'{k}_saved': 1 - r[f'{k}_bytes'] / rows[0][f'{k}_bytes'] for k in ('optimizer', 'peak')},
                 batch=a.batch, tokens=a.tokens, dim=a.dim, layers=a.layers, threads=a.threads)
    print(f'DistilBERT, 2 labels: {shape_of(a)}; peak: tensors\nalive at once in a training step, weights and optimizer '
          f'included; rank: of min(m, n) = {a.dim}; saved: share of Adam\'s bytes')
    show(rows, [('scheme', 'low rank', ''), ('rank', 'rank', ''), ('optimizer_bytes', 'optimizer bytes', ','),
                ('optimizer_bytes', 'MiB', mib), ('optimizer_saved', 'saved', '.1%'), ('peak_bytes', 'peak MiB', mib),
                ('peak_saved', 'saved', '.1%')], a.json)


FINETUNES = ('adamw', 'lora', 'lora without dropout', 'rsvd', 'rsvd projected')


def finetune_model(a):
    """(model, optimizer) of a variant. RSVDAdam uses side='right', so that a linear layer need not save its input and every row
    of an embedding learns. The variant without attach() uses the same side."""
    model = distilbert(a)
    if a.name.startswith('lora'):
        rule = 'lora', dict(rank=a.rank, alpha=16.0, dropout=0.1 if a.name == 'lora' else 0.0)
        layers.convert(model, {'*.q_lin': rule, '*.k_lin': rule, '*.v_lin': rule}, verbose=False)
        only_adapters(model).pre_classifier.requires_grad_(True)
        model.classifier.requires_grad_(True)
    if not a.name.startswith('rsvd'):
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    projected = a.name.endswith('projected')
    optimizer = RSVDAdam(model.parameters(), rank=a.rank, side='right', interval=NEVER, stagger=int(projected))
    if projected:
        attach(model, optimizer, verbose=False)
    return model, optimizer


def first_bases(optimizer, step):
    """Run steps on one row each until every weight has its first basis, as in a run but with a smaller batch."""
    while any(s.get('wait') for s in optimizer.state.values()):
        step(1)


def refreshes(optimizer):
    """Make the last weight of each shape due for a refresh in the next step, one weight at a time, as stagger does. The
    backward pass reaches this weight when most tensors are alive."""
    for p in {p.shape: p for p in getattr(optimizer, 'slots', {})}.values():
        optimizer.state[p]['step'] = NEVER
        yield


def sent_bytes(model, optimizer):
    """Bytes per step that DistributedDataParallel and attach() send: fp32 gradients of trained parameters, R of the projected
    ones, and the products of their refreshes, divided by the interval."""
    n = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    for p, slot in getattr(optimizer, 'slots', {}).items():
        _, rank, sides = optimizer.low_rank(p, slot.group)
        k = min(rank + slot.group['oversample'], *sides)
        n += 4 * rank * sides[1] + 4 * k * sum(sides) * (1 + slot.group['n_iter']) // INTERVAL
    return n


def finetune_memory_worker(a):
    """Peak bytes of the first steps, of an ordinary step with all bases, and of refreshes; bytes of the tensors in them."""
    model, optimizer = finetune_model(a)
    forward, step = training(model, optimizer, a)
    peak = lambda: peak_bytes(model, optimizer, step, a.device == 'cuda')
    peaks = {'first_bytes': max(peak() for _ in range(3))}
    first_bases(optimizer, step)
    saved = costs.saved_bytes(forward, model)
    forward().backward()
    gradients = memory_report(model, optimizer, 0)['gradients']
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    peaks['ordinary_bytes'] = peak()
    if a.name == 'rsvd projected':
        peaks['refresh_bytes'] = max(peak() for _ in refreshes(optimizer))
    elif a.name == 'rsvd':
        refresh_every(optimizer, 1)
        peaks['refresh_bytes'] = peak()
    yield {**peaks, 'peak_bytes': max(peaks.values()), 'saved_bytes': saved, 'gradient_bytes': gradients,
           'sent_bytes': sent_bytes(model, optimizer), 'optimizer_bytes': optimizer_bytes(optimizer)}


def finetune_worker(a):
    """Answer each line, a number of ordinary steps, by their median ms, the additional ms of a refresh of all weights, and the
    largest growth of resident memory. The growth ends before the first such refresh, because a run staggers its refreshes."""
    cuda, resident = a.device == 'cuda', None
    distilbert(argparse.Namespace(**{**vars(a), 'dim': 64, 'layers': 1, 'device': 'cpu'}))     # imports must not count
    torch.mm(torch.ones(8, 8), torch.ones(8, 8))
    before = resident_bytes()
    model, optimizer = finetune_model(a)
    _, step = training(model, optimizer, a)
    for line in sys.stdin:
        if resident is None:
            step()
            first_bases(optimizer, step)
            for _ in refreshes(optimizer):
                step()
        ms, refresh = statistics.median(times_ms(step, int(line), cuda)), None
        resident = resident or peak_memory_bytes() - before
        if a.name.startswith('rsvd'):
            refresh_every(optimizer, 1)
            refresh = times_ms(step, 1, cuda)[0] - ms
            refresh_every(optimizer, NEVER)
        if cuda:
            torch.cuda.empty_cache()                # processes of other variants share the card
        yield {'ms': ms, 'refresh_ms': refresh, 'amortised_ms': ms + (refresh or 0) / INTERVAL, 'resident_bytes': resident}


def finetune(a):
    """Measure a training step of DistilBERT with dropout: full AdamW, LoRA, low-rank Adam with and without full gradients."""
    names = a.variants.split(',')
    if unknown := [n for n in names if n not in FINETUNES]:
        configurator.fail(f'{unknown[0]!r} is no variant; type --variants= with some of {",".join(FINETUNES)}')
    rows = measure(names, 'finetune_memory', a)
    workers, answers = in_turns([dict(vars(a), run=None, bench='finetune', name=n) for n in names], a.rounds, 1, a.steps)
    for worker in workers:
        worker.close()
    answers_of, memory = dict(zip(names, answers, strict=True)), {r['name']: r for r in rows}
    for name, r in memory.items():
        r.update({k: middle(answers_of[name], k) for k in answers_of[name][0]}, bench='finetune', rank=a.rank, batch=a.batch,
                 tokens=a.tokens, dim=a.dim, layers=a.layers, attention=a.attention,
                 threads=a.threads, interval=INTERVAL)
        for base in ('adamw', 'lora'):
            for key in ('ms', 'amortised_ms'):
                r[f'{key}_x_{base}'] = ratio(answers_of[name], answers_of.get(base), key)
            r[f'peak_x_{base}'] = r['peak_bytes'] / memory[base]['peak_bytes'] if base in memory else None
    print(f'DistilBERT, 2 labels, rank {a.rank}: {shape_of(a)}, {a.rounds} rounds x {a.steps} steps;\namortised: with one '
          f'refresh of every basis in {INTERVAL} steps; MiB; peak: tensors alive at once, in any step; saved: tensors saved '
          'for the backward pass;\nall-reduce: bytes that a process sends in a step')
    show(rows, [('name', 'variant', ''), ('ms', 'ms/step', '.0f'), ('ms_x_adamw', 'x adamw', '.2f'),
                ('ms_x_lora', 'x lora', '.2f'), ('amortised_ms', 'amortised', '.0f'), ('peak_bytes', 'peak', mib),
                ('peak_x_adamw', 'x adamw', '.3f'), ('peak_x_lora', 'x lora', '.3f'), ('resident_bytes', 'resident', mib),
                ('saved_bytes', 'saved', mib), ('gradient_bytes', 'gradients', mib), ('sent_bytes', 'all-reduce', mib),
                ('optimizer_bytes', 'optimizer', mib)], a.json)
