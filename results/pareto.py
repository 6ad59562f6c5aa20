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
# variant of `quality`: what it is called, kind of its layers and optimizer in bench.py train
TRAINED = {'fp': ('full precision', 'fp', 'muon'), 'fp_more': ('full precision, trained on', 'fp', 'muon'),
           'fp_adamw': ('full precision, AdamW', 'fp', 'adamw'),
           'fp_rsvd': ('full precision, rSVD, rank 16', 'fp', 'rsvd'),
           'half': ('2 of 4 blocks binary, chosen by ptq.py', None, None),
           'half_taught': ('2 of 4 blocks binary, trained on', None, None),
           'int4': ('int4, 16 even levels', 'int4+ramp', 'muon'), 'tern': ('ternary', 'tern+ramp', 'muon'),
           'tern_wide': ('ternary, 160 wide instead of 128', None, None),
           'tern_taught': ('ternary, trained on', None, None), 'bin': ('binary', 'bin+ramp', 'muon'),
           'bin_taught': ('binary, trained on', None, None)}
SHAPE = ['--n_layer=4', '--n_embd=128', '--block_size=128', '--vocab_size=1024', '--batch_size=16', '--dtypes=bfloat16']
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
        if not newer(OUT / f's{seed}' / 'ptq.jsonl', twin(seed)):
            command('ptq.py', f'--ckpt={twin(seed)}', f'--schemes={",".join(SCHEMES)}', '--time_rounds=0',
                    f'--out={OUT}/s{seed}')
        found += [{**r, 'part': 'quantized', 'seed': seed} for r in lines_of(OUT / f's{seed}' / 'ptq.jsonl')]
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
    for optimizer, kinds in (('muon', 'fp,bin+ramp,tern+ramp,int4+ramp'), ('adamw', 'fp'), ('rsvd', 'fp')):
        log = OUT / f'train_{optimizer}.jsonl'
        log.unlink(missing_ok=True)
        command('bench.py', 'train', *SHAPE, f'--kinds={kinds}', f'--optimizer={optimizer}', '--rounds=3', f'--json={log}')
        found += [{'part': 'step', 'optimizer': optimizer, **{k: r[k] for k in ('kind', 'peak_bytes')}} for r in lines_of(log)]
    keep.write('pareto.jsonl', ''.join(json.dumps(r) + '\n' for r in found))


def forms():
    """Dicts of every form, with the values of each seed: label, trained, losses, gaps, bytes, peak, decode."""
    rows, trained = keep.read('pareto'), runs.runs_of('quality')
    speed = {r['name']: r for r in rows if r['part'] == 'decode'}
    peak = {(r['kind'], r['optimizer']): r['peak_bytes'] for r in rows if r['part'] == 'step'}

    def decoded(name):
        if name not in speed:
            return {'decode': None, 'ratio': None, 'joules': None}
        ratios = [turn / full for turn, full in zip(speed[name]['turns'], speed['fp']['turns'], strict=True)]
        return {'decode': speed[name]['decode'], 'ratio': statistics.median(ratios), 'joules': speed[name]['joules']}

    found = []
    for variant, (label, kind, optimizer) in TRAINED.items():
        if of := trained.get(variant):
            found.append({'label': label, 'trained': True, 'losses': [r['val_loss'] for r in of.values()],
                          'gaps': [r['val_loss'] - trained['fp'][s]['val_loss'] for s, r in of.items()
                                   if s in trained['fp'] and variant != 'fp'], 'bytes': of[min(of)]['packed_file_bytes'],
                          'peak': peak.get((kind, optimizer)), **decoded(variant)})
    for scheme, label in SCHEMES.items():
        name = scheme if scheme not in TRAINED else f'ptq_{scheme}'
        if of := [r for r in rows if r['part'] == 'quantized' and r['scheme'] == scheme]:
            found.append({'label': label, 'trained': False, 'losses': [r['loss'] for r in of], 'gaps': [r['delta'] for r in of],
                          'bytes': of[0]['file_bytes'], 'peak': peak.get(('fp', 'muon')), **decoded(name)})
    first = TRAINED['fp'][0]                        # of the other rows as large only the metadata differ
    return sorted(found, key=lambda f: (f['label'] != first, -(f['bytes'] // 1000), f['label']))


def page(found):
    """Markdown lines of the table."""
    rows = keep.read('pareto')
    one = next(iter(runs.runs_of('quality')['fp'].values()))
    per_byte = one['val_bpb'] * math.log(2) / one['val_loss']
    gap = lambda scale: lambda f: runs.mean_gap([g * scale for g in f['gaps']])
    columns = {'form': '{label}', 'made': lambda f: 'training' if f['trained'] else 'afterwards',
               'val loss': lambda f: f'{runs.spread(f["losses"], 4)} (n={len(f["losses"])})', 'gap': gap(1),
               'gap per byte of text': gap(per_byte), 'file bytes': '{bytes:,}', 'MiB': number('peak', '.1f', MIB),
               'tokens/s': number('decode', ',.0f'), '× full precision': number('ratio', '.2f')}
    if any(f['joules'] for f in found):
        columns['joules per token'] = number('joules', '.2e')
    device = next(r['device'] for r in rows if r['part'] == 'decode')
    return [f'`config/wikitext2.py`, {device}. Losses in nats per token over the same validation batches, mean ± '
            'sd over n seeds; gaps to the full-precision model of the same seed in the same precision (bf16 if trained, fp32 '
            f'if quantized afterwards), ± their standard error. Trained on: for {one["step"]:,} more steps, from the weights '
            'of full precision; low-bit models have it as teacher, too. The embedding, which is also the head, stays fp32 in '
            'all forms. MiB: tensors alive at once in a training step in bf16, not compiled, of low-bit models with '
            'a ramp; for a quantized model that of its twin; `-`: not measured. tokens/s of one sequence in engine/, one '
            'thread, all models in turns, and the median of the turns, × full precision. Learning rates: '
            '[quality.md](quality.md).', '', *table(columns, found)]


NAMED = ('GPTQ, 3 bits', 'GPTQ, 2 bits', 'ternary', 'ternary, trained on', 'binary', 'binary, trained on',
         'full precision, trained on')


def sentence(found):
    """The smallest forms, trained ones in italics, and the twin that was trained on."""
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
    if not keep.read('pareto'):
        sys.exit('error: no results/pareto.jsonl; type: python results/pareto.py')
    found = forms()
    picture(found)
    keep.publish('pareto', page(found))
    keep.fill('trained', f'*Trained* in low bits or quantized afterwards? Files and rise of the loss: {sentence(found)} '
              '([pareto](../results/pareto.md)).')


if __name__ == '__main__':
    main()
