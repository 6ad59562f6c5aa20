"""Tables of bench.py for results/runs.py: the commands, captions and columns of each table."""
import keep
from keep import MIB, number, table


def figure(key, spec):
    """Function that formats a number of a row as a cell; bytes in MiB."""
    return number(key, spec, MIB if key.endswith('_bytes') else 1)


def step_caption(r):
    model = 'train_bitnet.py' if r.get('model') == 'bitnet' else 'train_gpt.py'
    return (f'The model of {model}, {r["n_layer"]} layers x {r["n_embd"]}, {r["batch_size"]} x {r["block_size"]} tokens, '
            f'{r["device"]}, {r["threads"]} threads, torch {r["torch"]}; {r["optimizer"]}; ms: median of '
            'the rounds (least to most); × is relative to fp of the same dtype; peak memory is the most bytes of tensors alive '
            'at once, resident the growth of the process; +ramp: a step of a run with --ramp.')


STEP_COLUMNS = {'kind': '{kind}', 'dtype': '{dtype}', 'ms/step': '{ms:.0f} ({ms_min:.0f} to {ms_max:.0f})', '×': '{ratio:.2f}',
                'tokens/s': '{tokens_per_s:,.0f}', 'peak MiB': lambda r: mib(r, 'peak', 0), '× ': '{peak_ratio:.2f}',
                'resident MiB': lambda r: mib(r, 'resident', 0), '×  ': '{resident_ratio:.2f}'}

BY_DTYPE = 'speed', 'bitnet_speed', 'compiled', 'conv'
# name: (arguments of bench.py, caption from one row, {header: cell from a row})
BENCHES = {
    'bitnet_speed': (['train --model=bitnet --steps=2 --kinds=fp,tern,tern+ramp'], step_caption, STEP_COLUMNS),
    'speed': (['train --steps=2 --kinds=plain,fp,bin,bin+ramp,tern,tern+ramp,int4,int4+ramp'], step_caption, STEP_COLUMNS),
    'compiled': (['train --compile --steps=2', 'train --model=bitnet --compile --steps=2 --kinds=fp,tern,tern+ramp'],
                 lambda r: 'Under torch.compile. ' + step_caption(r).replace('model of train_gpt.py', 'models of the trainers')
                 + ' Saved: tensors for the backward pass.',
                 {'model': '{model} {kind}'}
                 | {k: v for k, v in STEP_COLUMNS.items() if k not in ('kind', 'resident MiB', '×  ')}
                 | {'saved MiB': lambda r: mib(r, 'saved'), 'saved, × fp': '{saved_ratio:.2f}'}),
    'stats': (['stats bignet half lora int4 qlora nf4 fit4 int8 ternary binary',
               'compare half lora int4 qlora nf4 fit4 int8 ternary binary'],
              lambda r: f'BigNet, {r["device"]}, torch {r["torch"]}, batch 32; MiB, except for the column bytes; forward and '
              'backward: peak of the allocator above the model itself; difference: between these outputs and the '
              'full-precision ones, same weights, same inputs.',
              {'form': '{name}', 'trainable': '{trainable:,}', 'frozen': '{frozen:,}',
               'by formula': lambda r: mib(r, 'theoretical'), 'actual': lambda r: mib(r, 'actual'),
               'bytes': '{actual_bytes:,}', 'forward': lambda r: mib(r, 'forward'), 'backward': lambda r: mib(r, 'backward'),
               'max difference': lambda r: f'{r["max"]:.1e}' if 'max' in r else '-',
               'mean': lambda r: f'{r["mean"]:.1e}' if 'mean' in r else '-'}),
    'fit': (['fit lora qlora lora-nf4 lora-fit4 lora-ternary lora-binary half int4 --seeds=1,2,3'],
            lambda r: f'BigNet under a linear head, 1,000 samples of noise with random labels, {r["steps"]} steps of '
            f'{r["batch"]}, AdamW {r["lr"]:g}, rank 32, seeds {r["seeds"]}, {r["device"]}, {r["threads"]} threads; loss in '
            'nats over all samples at the end, mean ± sd.',
            {'form': '{name}', 'trainable': '{trainable:,}', 'loss': '{loss:.4f} ± {sd:.4f}',
             'lowest accuracy': '{accuracy:.1%}', 'ms/step': '{ms:.0f}'}),
    'layers': (['layers --threads=1'],
               lambda r: f'{r["in"]:,} x {r["out"]:,} weights, {r["device"]}, {r["threads"]} threads, torch {r["torch"]}, '
               f'{r["dtype"]} inputs; milliseconds and, in brackets, times a frozen nn.Linear in the same run; error: relative '
               'RMS on N(0,1).',
               {'layer': '{name}', 'bits/weight': '{bits:.3f}', 'error': '{error:.4f}'}),
    'optim': (['optim'],
              lambda r: f'The {4 * r["layers"]} block matrices of {r["layers"]} blocks of width {r["dim"]}, fp32, '
              f'{r["device"]}, {r["threads"]} threads, torch {r["torch"]}; MiB of optimizer state, milliseconds; a refresh '
              'recomputes every basis, its time is what it adds to a plain step; amortised: with one refresh in '
              f'{r["interval"]} steps. full SVD: torch.linalg.svd of every matrix.',
              {'optimizer': '{name}', 'MiB': figure('optimizer_bytes', '.1f'), 'ms/step': figure('ms', '.0f'),
               '× AdamW': figure('ratio', '.2f'), '× GaLore of that rank': figure('galore_ratio', '.2f'),
               'refresh ms': figure('refresh_ms', ',.0f'), '× full SVD': figure('svd_ratio', '.3f'),
               'amortised ms': figure('amortised_ms', '.0f'), '× AdamW ': figure('amortised_ratio', '.2f')}),
    'optim_bytes': (['optim-bytes'],
                    lambda r: f'DistilBERT with 2 labels, fp32, a training step on {r["batch"]} x {r["tokens"]} tokens, '
                    f'{r["device"]}, torch {r["torch"]}; optimizer: its tensors after a step; peak: most bytes of tensors '
                    'alive at once in a step, weights and optimizer included; saved: share of Adam\'s bytes; rank: out of 768.',
                    {'low rank': '{scheme}', 'rank': figure('rank', 'd'), 'optimizer bytes': '{optimizer_bytes:,}',
                     'MiB': figure('optimizer_bytes', '.2f'), 'saved': figure('optimizer_saved', '.1%'),
                     'peak MiB': figure('peak_bytes', '.0f'), 'saved ': figure('peak_saved', '.1%')}),
    'finetune': (['finetune'],
                 lambda r: f'DistilBERT with 2 labels, fp32, a whole training step on {r["batch"]} x {r["tokens"]} tokens, '
                 f'dropout on, rank {r["rank"]}, {r["device"]}, {r["threads"]} threads, torch {r["torch"]}; MiB; amortised: '
                 f'with a refresh of every basis in {r["interval"]} steps; peak: most bytes of tensors alive at once in any '
                 'step, refreshes included; saved: tensors saved for the backward pass; all-reduce: sent by each process in a '
                 'step.',
                 {'variant': '{name}', 'ms/step': figure('ms', ',.0f'), 'amortised': figure('amortised_ms', ',.0f'),
                  '× AdamW': figure('amortised_ms_x_adamw', '.2f'), '× LoRA': figure('amortised_ms_x_lora', '.2f'),
                  'peak': figure('peak_bytes', ',.0f'), '× AdamW ': figure('peak_x_adamw', '.2f'),
                  '× LoRA ': figure('peak_x_lora', '.2f'), 'resident': figure('resident_bytes', ',.0f'),
                  'saved': figure('saved_bytes', '.0f'), 'gradients': figure('gradient_bytes', '.1f'),
                  'all-reduce': figure('sent_bytes', '.1f'), 'optimizer': figure('optimizer_bytes', '.1f')}),
    'conv': (['conv --threads=1'],
             lambda r: f'{r["batch"]} images of {r["image_size"]} pixels, {r["device"]}, {r["threads"]} thread, torch '
             f'{r["torch"]}; milliseconds and, in brackets, times real layers of the same dtype: forward and backward of one '
             '3x3 convolution with its normalization and a ReLU, by channels x pixels of a side; then a training step of the '
             'network, the most bytes of tensors alive in it, MiB, and the bytes it packs into.',
             {'layers': '{name}', 'dtype': '{dtype}'}
             | {f'{width} x {64 >> b}': (lambda r, key=f'{width}x{64 >> b}': times(r, key) if f'{key}_ms' in r else '-')
                for b, width in enumerate((32, 64, 64, 128, 256))}
             | {'network': lambda r: times(r, 'net'), 'peak': lambda r: f'{mib(r, "peak", 0)} ({r["peak_ratio"]:.2f})',
                'packed bytes': '{packed_bytes:,}'}),
}


def times(row, key):
    return '-' if row[f'{key}_ms'] is None else f'{row[f"{key}_ms"]:.3g} ({row[f"{key}_ratio"]:.2f})'


def mib(row, key, digits=2):
    return f'{row[key + "_bytes"] / MIB:.{digits}f}'


def bench_table(name):
    """Markdown lines of a caption and a table, from the rows of bench.py in results/<name>.jsonl."""
    rows, (_, head, columns) = keep.read(name), BENCHES[name]
    merged = {}                                     # one row per variant (and dtype); sizes of `layers` are columns
    for r in rows:
        key = r.get('name', r.get('kind')), r.get('model'), r.get('dtype') if name in BY_DTYPE else None
        if name == 'layers':
            r[f't{r["tokens"]}'] = r
        merged.setdefault(key, {}).update(r)
    columns = dict(columns)
    for t in dict.fromkeys(r['tokens'] for r in rows if name == 'layers'):
        for what in ('forward', 'both'):
            header = f'{t} token{"s" * (t > 1)}' + (', with backward' if what == 'both' else '')
            columns[header] = lambda r, t=t, what=what: times(r[f't{t}'], what)
    return [head(rows[0]), '', *table(columns, merged.values())]
