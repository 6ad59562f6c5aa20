"""Measurements of whole models in compressed forms for bench.py: bytes, peak memory, error, and whether they still learn."""
import os
import re
import statistics
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

import configurator
import layers
from common import peak_above, peak_memory_bytes
from measure.turns import Worker, device_name, measure, mib, show
from pretrained import adapters, hf, replace


class BigNet(nn.Sequential):
    """Residual MLP: 6 blocks of three Linear(dim, dim) with ReLU between them, LayerNorm between blocks; 18,903,040 parameters
    for dim=1024. It is the model of a deep learning course (UT Austin), where students compress it as an exercise."""

    class Block(nn.Sequential):
        def __init__(self, dim):
            super().__init__(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))

        def forward(self, x):
            return x + super().forward(x)

    def __init__(self, dim=1024):
        super().__init__(*(m for i in range(6) for m in ([nn.LayerNorm(dim)] if i else []) + [self.Block(dim)]))


WORDS = {'tern': 'ternary', 'bin': 'binary'}        # names of forms that differ from layers.FORMATS
FORMS = {WORDS.get(kind, kind): kind for kind in layers.FORMATS if kind not in ('fp', 'lora', 'group', 'sparse')}
FORMS |= {{'half': 'lora', 'int4': 'qlora'}.get(name, f'lora-{name}'): ('lora', kind) for name, kind in FORMS.items()
          if kind != 'lowrank'}
# The course's bounds (max, mean) on the absolute difference of outputs from the full-precision ones.
BOUNDS = {'half': (1e-2, 1e-3), 'lora': (5e-3, 5e-4), 'int4': (.5, .1), 'qlora': (.5, .1)}


def base_model(a, load):
    """(model, inputs(n)) of a.base: BigNet with weights from a.seed, a Hugging Face folder, or a run, read by load(path)."""
    torch.manual_seed(a.seed)
    if a.base == 'bignet':
        model, inputs = BigNet(a.dim), lambda n: torch.randn(n, a.dim)
    elif os.path.isfile(os.path.join(a.base, 'config.json')):
        try:
            model = layers.pack(hf.plain_linears(hf.load_bare(a.base)))
            most = hf.longest(model, lambda n: reads(model, torch.zeros(1, n, dtype=torch.int64)), 64)
            replace.keep_read(model, lambda: model(**reads(model, torch.zeros(1, most, dtype=torch.int64))))
        except ValueError as e:
            configurator.fail(f'{a.base}: {e}')
        inputs = lambda n: torch.randint(model.get_input_embeddings().num_embeddings, (n, most))
    elif adapters.is_adapters(a.base):
        configurator.fail(f'{a.base} is a folder of adapters; give its base model')
    else:
        model = load(a.base)
        inputs = lambda n: torch.randint(model.config.vocab_size, (n, model.config.block_size))
    return model.to(a.device), lambda n: inputs(n).to(a.device)


def reads(model, ids):
    """The arguments of a model of transformers for ids (B, T)."""
    return {'input_ids': ids} | ({'decoder_input_ids': ids} if model.config.is_encoder_decoder else {})


def form(model, name, a):
    """Convert the nn.Linear layers of the model, except tied ones, to the form `name`. The name of a base changes nothing."""
    if name not in FORMS:
        return model
    kind, base = FORMS[name] if isinstance(FORMS[name], tuple) else (FORMS[name], None)
    options = {'lora': dict(rank=a.rank, alpha=a.alpha, base=base), 'lowrank': dict(rank=a.rank)}.get(kind, {})
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linears = {n: m for n, m in replace.unfuse(model).named_modules() if type(m) is nn.Linear
               and id(m.weight) not in embeddings and n not in getattr(model, 'read', ())}
    if not linears and any(isinstance(m, layers.LowBit) for m in model.modules()):
        configurator.fail(f'the linear layers of {a.base} are low-bit already; give another model')
    if not linears:
        others = sorted({type(m).__name__ for m in model.modules() if getattr(m, 'weight', None) is not None})
        configurator.fail(f'{a.base} has no nn.Linear to convert, only {", ".join(others)}; give another model')
    try:
        layers.convert(model, {n: (kind, options) for n in linears}, verbose=False, packed=True)
    except ValueError as e:
        configurator.fail(f'{e}; give other options')
    for m in model.modules():                       # biases stay trainable, as in the course, except under an adapter
        if isinstance(m, layers.Linear4bit | layers.Int8Linear) and base is None and m.bias is not None:
            m.bias.requires_grad_(True)
    return model


def theoretical_bytes(module):
    """Bytes of one module by the formula of its format, from its shape alone. None if the module has no formula."""
    n = getattr(module, 'in_features', 0) * getattr(module, 'out_features', 0)
    out = getattr(module, 'out_features', 0)
    bias = 0 if getattr(module, 'bias', None) is None else 4 * out
    if isinstance(module, layers.Linear4bit):
        groups = -(-n // module.group)
        scale = {'fp16': 2 * groups, 'fp32': 4 * groups, '8bit': groups + 4 * -(-groups // 256), 'log8': groups + 4}
        return groups * module.group // 2 + scale[module.scales] + bias
    if isinstance(module, layers.Int8Linear):
        return n + 4 * out + bias
    if isinstance(module, layers.HalfLinear):
        return 2 * n + bias // 2
    if isinstance(module, layers.TernaryLinear):
        gains = module.in_features * module.norm + out * (module.out_gain is not None)
        return -(-module.in_features // 4) * out + 4 * module.chunks + bias + 4 * gains
    if isinstance(module, layers.BinaryLinear):
        packed_bias = getattr(module, 'packed_bias', None)
        alphas = 0 if module.alpha is None else module.alpha.numel()
        return -(-module.in_features // 8) * out + (0 if packed_bias is None else -(-out // 8)) + 4 * alphas
    if isinstance(module, layers.LowRankLinear):
        return 4 * module.rank * (module.in_features + out + 1) + bias
    if isinstance(module, layers.LoRALinear):
        return 4 * module.rank * (module.in_features + out)             # its base is another module
    if isinstance(module, nn.Linear):
        return 4 * n + bias
    return None


def counts(model):
    """Count parameters, elements and bytes of a model. parameters: weights of the network, in any format; elements: of the
    tensors that store them. Bytes are by formula and summed over tensors. A tied weight counts once."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = layers.model_bytes(model)[1] // 4
    theory, seen = 0, set()
    for m in model.modules():
        own = {id(t) for t in [*m.parameters(recurse=False), *m.buffers(recurse=False)]}
        by_formula = theoretical_bytes(m) if not own & seen else 0
        theory += sum(tensors[i].nbytes for i in own - seen) if by_formula is None else by_formula
        seen |= own
    return {'trainable': trainable, 'frozen': total - trainable, 'parameters': total,
            'elements': sum(t.numel() for t in tensors.values()), 'theoretical_bytes': theory,
            'actual_bytes': sum(t.nbytes for t in tensors.values())}


def output(model, x):
    y = model(**reads(model, x)) if hasattr(model, 'base_model_prefix') else model(x)
    return y if torch.is_tensor(y) else y[0]


def stats_worker(a, load):
    model, inputs = base_model(a, load)
    stays = replace.left_out(replace.unfuse(model)) if a.name in FORMS else ({}, 0.0)
    model, x, outputs = form(model, a.name, a).train(), inputs(a.batch), {}
    cuda = a.device == 'cuda'

    def forward():
        outputs['y'] = output(model, x)
    try:
        y = output(model, x)                        # libraries allocate memory on first use
        y.float().square().mean().backward()
    except (AttributeError, TypeError, RuntimeError) as e:
        if not hasattr(model, 'base_model_prefix'):
            raise
        configurator.fail(f'{a.base} cannot be trained in the form {a.name} ({str(e).splitlines()[0][:80]}...); type another '
                          'form')
    model.zero_grad(set_to_none=True)
    del y
    up = peak_above(forward, cuda)
    loss = outputs.pop('y').float().square().mean()
    after = peak_above(loss.backward, cuda)
    yield {**counts(model), 'forward_bytes': up, 'backward_bytes': after, 'resident_bytes': peak_memory_bytes(),
           'left': sorted({n.removesuffix('.weight').rpartition('.')[2] for n in stays[0]}), 'left_share': stays[1]}


def stats(a):
    """Measure parameters, bytes and peak memory of a model's compressed forms."""
    names = split_names(a)
    print(f'{a.base}, batch {a.batch}, {a.device} ({device_name(a)}), torch {torch.__version__}; MiB. forward: peak of '
          'tensors above\nthe model itself; backward: the same above the tensors after the forward pass, gradients included')
    millions = lambda n: f'{n / 1e6:.2f} M'
    rows = measure(names, 'stats', a)
    show(rows,
         [('name', 'form', ''), ('trainable', 'trainable', millions), ('frozen', 'frozen', millions),
          ('parameters', 'total', millions), ('elements', 'elements', millions), ('theoretical_bytes', 'theoretical', mib),
          ('actual_bytes', 'actual', mib), ('actual_bytes', 'bytes', ','), ('forward_bytes', 'forward', mib),
          ('backward_bytes', 'backward', mib)], a.json)
    if row := next((r for r in rows if r['left']), None):
        print(f'{row["left_share"]:.1%} of the weights in the blocks stay in full precision in each form: '
              f'{", ".join(row["left"])}')


def compare_worker(a, load):
    model, inputs = base_model(a, load)
    x = inputs(a.batch)
    with torch.no_grad():
        model.eval()
        right = output(model, x).float()
        off = (output(form(model, a.name, a).eval(), x).float() - right).abs()
    bounds = BOUNDS.get(a.name, (None, None)) if a.base == 'bignet' else (None, None)
    yield {'max': off.max().item(), 'mean': off.mean().item(), 'relative': (off.norm() / right.norm()).item(),
           'max_bound': bounds[0], 'mean_bound': bounds[1]}


def compare(a):
    """Compare the outputs of compressed forms with those of the full-precision model, for the same weights and inputs."""
    names = split_names(a)
    print(f'{a.base}, batch {a.batch}, {a.device} ({device_name(a)}), torch {torch.__version__}; |output - output in full '
          'precision|; relative: its root mean square over that of the output')
    rows = measure(names, 'compare', a)
    show(rows, [('name', 'form', ''), ('max', 'max', '.2e'), ('max_bound', 'bound', '.0e'), ('mean', 'mean', '.2e'),
                ('mean_bound', 'bound', '.0e'), ('relative', 'relative', '.4f')], a.json)
    bounded = [r for r in rows if r['max_bound'] is not None]
    if over := [r['name'] for r in bounded if not (r['max'] <= r['max_bound'] and r['mean'] <= r['mean_bound'])]:
        sys.exit(f'error: the difference is over its bound: {", ".join(over)}')


def fit_worker(a):
    """Memorize noise with random binary labels: train a linear head and all parameters that the form leaves trainable."""
    for line in sys.stdin:
        seed = int(line)
        torch.manual_seed(seed)
        model = nn.Sequential(form(BigNet(a.dim).to(a.device), a.name, a), nn.Linear(a.dim, 1, device=a.device), nn.Flatten(0))
        x = torch.randn(1000, a.dim, device=a.device)
        labels = torch.randint(2, (1000,), device=a.device).float()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=a.lr)
        generator, losses, times, right = torch.Generator().manual_seed(seed), [], [], []
        for _ in range(a.steps):
            pick = torch.randint(1000, (a.batch,), generator=generator)
            start = time.perf_counter()
            logits = model(x[pick])
            loss = F.binary_cross_entropy_with_logits(logits, labels[pick])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            times.append((time.perf_counter() - start) * 1e3)
            right.append(((logits > 0) == labels[pick].bool()).float().mean().item())
        with torch.no_grad():
            logits = model(x)
            loss = F.binary_cross_entropy_with_logits(logits, labels).item()
            accuracy = ((logits > 0) == labels.bool()).float().mean().item()
        print(f'{a.name} seed {seed}: ' + ', '.join(f'step {i} loss {losses[i]:.4f} accuracy {right[i]:.0%}'
              for i in range(0, a.steps, max(1, a.steps // 4))) + f'; on all, loss {loss:.4f} accuracy {accuracy:.1%}',
              file=sys.stderr, flush=True)
        yield {'seed': seed, 'loss': loss, 'accuracy': accuracy, 'first_loss': losses[0], 'ms': statistics.median(times),
               'trainable': sum(p.numel() for p in model.parameters() if p.requires_grad)}


def fit(a):
    """Train BigNet's forms in a small loop; exit status 1 if one does not learn."""
    if not re.fullmatch(r'\d+(,\d+)*', a.seeds):
        configurator.fail(f'--seeds={a.seeds} are no numbers; type e.g. --seeds=1,2,3')
    rows = []
    for name in split_names(a):
        if a.base != 'bignet':
            configurator.fail('fit is for BigNet; type one of its forms')
        worker = Worker(dict(vars(a), run=None, bench='fit', name=name))
        answers = [worker.ask(seed) for seed in a.seeds.split(',')]
        worker.close()
        losses = [r['loss'] for r in answers]
        # The head alone reaches an accuracy of 0.89 to 0.92 in 200 steps. Adapters that learn exceed it.
        trains = name in ('bignet', 'lowrank') or 'lora' in name
        rows.append({'bench': 'fit', 'name': name, 'loss': statistics.mean(losses),
                     'sd': statistics.stdev(losses) if len(losses) > 1 else None, 'losses': losses, 'threads': a.threads,
                     'accuracy': min(r['accuracy'] for r in answers), 'wanted': .97 if trains else .8,
                     'ms': statistics.median(r['ms'] for r in answers),
                     'trainable': answers[0]['trainable'], 'steps': a.steps, 'batch': a.batch, 'lr': a.lr, 'seeds': a.seeds,
                     'device': device_name(a), 'torch': torch.__version__})
    print(f'{a.steps} steps of {a.batch} of 1,000 noise samples, AdamW {a.lr:g}, seeds {a.seeds}; loss in nats, lowest '
          f'accuracy; {a.device} ({device_name(a)}), {a.threads} threads, torch {torch.__version__}')
    show(rows, [('name', 'form', ''), ('trainable', 'trainable', ','), ('loss', 'loss', '.4f'), ('sd', 'sd', '.4f'),
                ('accuracy', 'accuracy', '.1%'), ('ms', 'ms/step', '.1f')], a.json)
    if bad := [r['name'] for r in rows if not r['accuracy'] > r['wanted']]:
        sys.exit(f'error: did not learn: {", ".join(bad)} (wanted: {bad[0]} above '
                 f'{next(r["wanted"] for r in rows if r["name"] == bad[0]):.0%})')


def split_names(a):
    """Names on the command line. A path or bignet among them becomes a.base. A name that is no form and no file is an error."""
    bases = dict.fromkeys(n for n in a.names if n not in FORMS)
    a.base = next(iter(bases), 'bignet')
    if len(bases) > 1:
        configurator.fail(f'bench.py measures one model at a time; type only one of {", ".join(bases)}')
    for name in a.names:
        if name not in (*FORMS, 'bignet') and (name != a.base or not os.path.exists(name)):
            configurator.fail(f'{name!r} is no form and no file; type one of bignet, {", ".join(FORMS)} or a checkpoint')
    return a.names
