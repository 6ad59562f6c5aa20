"""
Loss against bytes: GPTs that results/runs.py quality trained in low bits, beside their full-precision twins quantized after
training, on the same batches and seeds.

    python results/runs.py quality                 # first: it trains them
    python results/pareto.py                       # quantizes, decodes and measures a training step, on one core
    python results/pareto.py --table               # the page and the picture alone, from the stored rows

Stores results/pareto.jsonl and writes results/pareto.md, results/pareto.png and one sentence in README.md. No number in them is
typed by hand.
"""
import argparse
import json
import math
import os
import statistics
import subprocess
import sys

import keep
import runs
from keep import MIB, ROOT, number, table

SCHEMES = {'half': 'fp16', 'bf16': 'bf16', 'int8': 'int8', 'uniform16': 'int4, 16 even levels', 'nf4': 'nf4',
           'fit4': 'fit4', 'gptq4': 'GPTQ, 4 bits', 'gptq3': 'GPTQ, 3 bits', 'gptq2': 'GPTQ, 2 bits',
           'tern': 'ternary, rounded', 'bin': 'binary, rounded'}
# bench.py train: name, options; the shape, optimizer and compiler of the runs
STEPS = {'muon': '--kinds=fp,bin+ramp,tern+ramp,int4+ramp --optimizer=muon --output_gains',
         'adamw': '--kinds=fp --optimizer=adamw', 'rsvd': '--kinds=fp --optimizer=rsvd',
         'half': '--kinds=fp,bin+ramp --optimizer=muon --binary_blocks=2,3',
         'wide': '--kinds=tern+ramp --optimizer=muon --output_gains --n_embd=160'}
# variant of `quality`: what it is called; name in STEPS and kind of its training step (None: not measured)
TRAINED = {'fp': ('full precision', 'muon', 'fp'), 'fp_more': ('full precision, trained on', 'muon', 'fp'),
           'fp_adamw': ('full precision, AdamW', 'adamw', 'fp'), 'fp_rsvd': ('full precision, rSVD, rank 16', 'rsvd', 'fp'),
           'half': ('2 of 4 blocks binary: 2 and 3', 'half', 'bin+ramp'),
           'half_taught': ('2 of 4 blocks binary, trained on', None, None),
           'int4': ('int4, 16 even levels', 'muon', 'int4+ramp'), 'tern': ('ternary', 'muon', 'tern+ramp'),
           'tern_wide': ('ternary, 160 wide instead of 128', 'wide', 'tern+ramp'),
           'tern_taught': ('ternary, trained on', None, None), 'bin': ('binary', 'muon', 'bin+ramp'),
           'bin_taught': ('binary, trained on', None, None)}
SHAPE = ['--n_layer=4', '--n_embd=128', '--block_size=128', '--vocab_size=1024', '--batch_size=16', '--dtypes=bfloat16',
         '--compile']
OUT = ROOT / 'out' / 'pareto'


def command(*words):
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, env=dict(os.environ, OMP_NUM_THREADS='1'))


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def measure():
    """Rows of every part: losses of quantized models, tokens/s, memory of a training step."""
    found, seeds = [], sorted(runs.runs_of('quality').get('fp', ()))
    twin = lambda seed: f'out/quality/fp_s{seed}'
    if not seeds or any(not runs.finished(ROOT / twin(seed)) for seed in seeds):
        sys.exit('error: the models are not there; type: python results/runs.py quality')
    OUT.mkdir(parents=True, exist_ok=True)
    newer = lambda path, run: path.exists() and path.stat().st_mtime > (ROOT / run / 'best.pt').stat().st_mtime
    for seed in seeds:
        path = OUT / f's{seed}' / 'ptq.jsonl'
        if not newer(path, twin(seed)) or {r['scheme'] for r in lines_of(path)} != {'fp', *SCHEMES}:
            command('ptq.py', f'--ckpt={twin(seed)}', f'--schemes={",".join(SCHEMES)}', '--time_rounds=0',
                    f'--out={OUT}/s{seed}')
        found += [{**r, 'part': 'quantized', 'seed': seed} for r in lines_of(path)]
    # half of the blocks, as the variant `half` trains
    command('ptq.py', 'choose', f'--ckpt={twin(seeds[0])}', '--bits=17', f'--out={OUT}/choose')
    found += [{**r, 'part': 'choose'} for r in lines_of(OUT / 'choose' / 'choose.jsonl')]
    files = {v: f'out/quality/{v}_s{seeds[0]}' for v in TRAINED if runs.finished(ROOT / f'out/quality/{v}_s{seeds[0]}')}
    for scheme in SCHEMES:
        path = OUT / f'{scheme}.safetensors'
        files[scheme if scheme not in TRAINED else f'ptq_{scheme}'] = str(path)
        if not newer(path, twin(seeds[0])):
            command('ptq.py', f'--ckpt={twin(seeds[0])}', f'--schemes={scheme}', f'--save={path}')
    log = OUT / 'decode.jsonl'
    log.unlink(missing_ok=True)
    command('bench.py', 'decode', f'--models={",".join(files.values())}', '--threads_of=1', '--heads=fp', '--torch=0',
            '--prefill=64', '--tokens=60', '--rounds=7', f'--json={log}')
    names = {path: name for name, path in files.items()}
    found += [{'part': 'decode', 'name': names[r['model']], **{k: r[k] for k in ('decode', 'joules', 'device')},
               'turns': [turn['decode'] for turn in r['rounds']]} for r in lines_of(log)]
    for name, options in STEPS.items():
        log = OUT / f'step_{name}.jsonl'
        log.unlink(missing_ok=True)
        command('bench.py', 'train', *SHAPE, *options.split(), f'--json={log}')
        keys = ['kind', 'dtype', 'peak_bytes', 'ms', 'ms_min', 'ms_max'] + ['peak_ratio', 'ratio'] * ('=fp,' in options)
        found += [{'part': 'step', 'step': name, **{k: r[k] for k in keys}} for r in lines_of(log)]
    keep.write('pareto.jsonl', ''.join(json.dumps(r) + '\n' for r in found))


def forms():
    """Dicts of every form, with the values of each seed: label, trained, losses, gaps, bytes, peak, decode."""
    rows, trained = keep.read('pareto'), runs.runs_of('quality')
    speed = {r['name']: r for r in rows if r['part'] == 'decode'}
    steps = {(r['step'], r['kind']): r for r in rows if r['part'] == 'step'}
    twin = steps['muon', 'fp']

    def decoded(name):
        if name not in speed:
            return {'decode': None, 'ratio': None, 'joules': None}
        ratios = [turn / full for turn, full in zip(speed[name]['turns'], speed['fp']['turns'], strict=True)]
        return {'decode': speed[name]['decode'], 'ratio': statistics.median(ratios), 'joules': speed[name]['joules']}

    def gaps(variant, baseline):
        return [r['val_loss'] - trained[baseline][seed]['val_loss'] for seed, r in trained[variant].items()
                if variant != baseline and seed in trained.get(baseline, ())]

    found = []
    for variant, (label, name, kind) in TRAINED.items():
        if of := trained.get(variant):
            step = steps[name, kind] if name else {'peak_bytes': None}
            found.append({'label': label, 'trained': True, 'losses': [r['val_loss'] for r in of.values()],
                          'gaps': gaps(variant, 'fp'), 'gaps_more': gaps(variant, 'fp_more') if 'taught' in variant else [],
                          'bytes': of[min(of)]['packed_file_bytes'], 'peak': step['peak_bytes'],
                          'step_ratio': step.get('ratio'),          # in turns with full precision
                          **decoded(variant)})
    for scheme, label in SCHEMES.items():
        if of := [r for r in rows if r['part'] == 'quantized' and r['scheme'] == scheme]:
            found.append({'label': label, 'trained': False, 'losses': [r['loss'] for r in of], 'gaps': [r['delta'] for r in of],
                          'gaps_more': [], 'bytes': of[0]['file_bytes'], 'peak': twin['peak_bytes'], 'step_ratio': None,
                          **decoded(scheme if scheme not in TRAINED else f'ptq_{scheme}')})
    first = TRAINED['fp'][0]                        # of the other rows as large only the metadata differ
    return sorted(found, key=lambda f: (f['label'] != first, -(f['bytes'] // 1000), f['label']))


def page(found):
    """Markdown lines of the table."""
    rows = keep.read('pareto')
    one = next(iter(runs.runs_of('quality')['fp'].values()))
    per_byte = one['val_bpb'] * math.log(2) / one['val_loss']
    gap = lambda scale, key='gaps': lambda f: runs.mean_gap([g * scale for g in f[key]])
    columns = {'form': '{label}', 'made': lambda f: 'training' if f['trained'] else 'afterwards',
               'val loss': lambda f: f'{runs.spread(f["losses"], 4)} (n={len(f["losses"])})', 'gap': gap(1),
               'gap, both trained on': gap(1, 'gaps_more'), 'gap per byte of text': gap(per_byte), 'file bytes': '{bytes:,}',
               'MiB': number('peak', '.1f', MIB), 'step, ×': number('step_ratio', '.2f'),
               'tokens/s': number('decode', ',.0f'), '× full precision': number('ratio', '.2f')}
    if any(f['joules'] for f in found):
        columns['joules per token'] = number('joules', '.2e')
    blocks = ' and '.join(sorted(r['taken'].rpartition('.')[2] for r in rows if r['part'] == 'choose'))
    device = next(r['device'] for r in rows if r['part'] == 'decode')
    return [f'`config/wikitext2.py`, {device}. Losses in nats per token over the same validation batches, mean ± '
            'sd over n seeds; gaps to the full-precision model of the same seed in the same precision (bf16 if trained, fp32 '
            f'if quantized afterwards), ± their standard error. Trained on: for {one["step"]:,} more steps, from the weights '
            'of full precision; low-bit models have it as teacher, too. "Both trained on": the gap to full precision that is '
            'trained on as well. The embedding, which is also the head, stays fp32 in '
            f'all forms. `ptq.py choose` takes the blocks {blocks} for the first seed; the runs of all seeds use these. MiB: '
            'tensors alive at once in a compiled training step in bf16, of low-bit models with a ramp; for a quantized model '
            'that of its twin. Step: its time, × '
            'full precision in turns; `-`: not measured. tokens/s of one sequence in engine/, one '
            'thread, all models in turns, and the median of the turns, × full precision. Learning rates: '
            '[quality.md](quality.md).', '', *table(columns, found)]


NAMED = ('GPTQ, 3 bits', 'GPTQ, 2 bits', 'ternary', 'binary')


def sentence(found):
    """The smallest forms, trained ones in italics."""
    name = lambda f: ('*{}*' if f['trained'] else '{}').format(f['label'].replace(',', ''))
    return ', '.join(f'{name(f)} {f["bytes"] / 1e6:.2f} MB {statistics.mean(f["gaps"]):+.2f}' for f in found
                     if f['label'] in NAMED and f['gaps'])


def picture(found):
    """results/pareto.png: rise of the loss against the size of the file, trained and quantized afterwards."""
    from report.figure import label_points, look, subplots
    from report.plot_ptq import HOLLOW, LEAST
    figure, (ax,) = subplots(size=(9, 5.5))
    points = []
    for i, (name, kind) in enumerate((('trained in this form', True), ('quantized after training', False))):
        mine = sorted((f['bytes'] / 1e6, max(statistics.mean(f['gaps']), LEAST), f['label']) for f in found
                      if f['trained'] == kind and f['gaps'] and not f['label'].startswith('full precision'))
        ax.plot(*list(zip(*mine, strict=True))[:2], **look(i) | {'ls': 'none'}, **HOLLOW, label=name)
        points += [(x, y, y, y, label, look(i)['color']) for x, y, label in mine]
    ax.set(xscale='log', yscale='log', xlabel='file (MB)',
           ylabel=f'rise of the validation loss (nats per token; at {LEAST:g}: that or less)')
    for set_format in (ax.xaxis.set_major_formatter, ax.xaxis.set_minor_formatter):
        set_format('{x:g}')
    ax.legend(frameon=False)
    label_points(ax, points)
    figure.savefig(ROOT / 'results' / 'pareto.png', dpi=100)
    keep.shrink('pareto')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--table', action='store_true', help='measure nothing')
    if not parser.parse_args().table:
        measure()
    if not {'quantized', 'choose', 'decode', 'step'} <= {r['part'] for r in keep.read('pareto')}:
        sys.exit('error: results/pareto.jsonl lacks rows; type: python results/pareto.py')
    found = forms()
    picture(found)
    keep.publish('pareto', page(found))
    keep.fill('trained', f'*Trained* in low bits or quantized afterwards? Files and rise of the loss: {sentence(found)} '
              '([pareto](../results/pareto.md)).')


if __name__ == '__main__':
    main()
