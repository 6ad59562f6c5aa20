"""
Quality at equal tokens: the same small GPT, full precision and low-bit, on the same batches, several seeds each.

    python data/text/prepare.py --file wiki.train.txt --val_file wiki.valid.txt --name=wikitext2
    python results/quality.py [--seeds=1,2,3] [--jobs=2] [--only=fp,bin6]     # an hour on 2 cores; interrupted: run again
    python results/quality.py --table                                        # the table from the logs alone

Runs train_gpt.py config/wikitext2.py once per variant and seed, keeps each log in results/quality/, writes
results/quality.md and .png, and puts the table into README.md. No number in them is typed by hand.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / 'results' / 'quality'
LOW = '--qkv_proj={0} --c_proj={0} --mlp_proj={0}'
VARIANTS = {                                        # what config/wikitext2.py is changed by
    'fp': ('full precision', ''),
    'bin3': ('3 of 6 blocks binary', '--n_binary=3'),
    'bin6': ('all binary', '--n_binary=6'),
    'tern6': ('all ternary', '--n_binary=6 ' + LOW.format('tern')),
    'int4': ('all 4-bit', '--n_binary=6 ' + LOW.format('int4')),
}


def train(variant, seed, threads):
    """One run, resumed if it was interrupted; its log ends up in results/quality/<variant>_s<seed>.jsonl."""
    out = f'out/quality/{variant}_s{seed}'
    command = [sys.executable, 'train_gpt.py', 'config/wikitext2.py', *VARIANTS[variant][1].split(),
               f'--seed={seed}', f'--out_dir={out}', '--resume=auto']
    os.makedirs(ROOT / out, exist_ok=True)
    with open(ROOT / out / 'stdout.txt', 'a') as f:
        subprocess.run(command, cwd=ROOT, stdout=f, stderr=subprocess.STDOUT, check=True,
                       env=dict(os.environ, OMP_NUM_THREADS=str(threads)))
    shutil.copy(ROOT / out / 'log.jsonl', LOGS / f'{variant}_s{seed}.jsonl')
    print(f'{variant} seed {seed}: done', flush=True)


def summary():
    """{variant: {seed: dict}} of the finished logs: val loss and bits per byte at the end, ms, memory, bytes."""
    found = {}
    for variant in VARIANTS:
        for path in sorted(LOGS.glob(f'{variant}_s*.jsonl')):
            records = [json.loads(line) for line in open(path)]
            steps = [r for r in records if 'ms' in r]
            last = [r for r in records if 'val_loss' in r][-1]
            end = records[-1]
            if 'packed_file_bytes' not in end:
                continue
            found.setdefault(variant, {})[int(path.stem.rsplit('_s', 1)[1])] = {
                'loss': last['val_loss'], 'bpb': last['val_bpb'], 'step': last['step'], 'tokens': last['tokens'],
                'ms': statistics.median(r['ms'] for r in steps), 'peak': max(r['peak_mem_bytes'] for r in steps),
                'packed': end['packed_file_bytes'], 'fp32': end['fp32_bytes']}
    return found


def mean_sd(values):
    sd = f'{statistics.stdev(values):.4f}' if len(values) > 1 else '-'
    return f'{statistics.mean(values):.4f} ± {sd}'


def table(found):
    """Markdown lines: mean ± sd over seeds; the gap to fp is paired by seed, both saw the same batches."""
    fp = found['fp']
    any_run = next(iter(fp.values()))
    lines = [f'WikiText-2, byte tokens, {any_run["step"]:,} steps, {any_run["tokens"]:,} tokens; mean ± sd over '
             f'{len(fp)} seeds; loss in nats per byte at the last step; gap to fp paired by seed.', '',
             '| variant | val loss | bits per byte | gap to fp | ms/step | peak resident MiB | packed file bytes |',
             '|---|---|---|---|---|---|---|']
    for variant, runs in found.items():
        both = sorted(runs.keys() & fp.keys())
        gap = '-' if variant == 'fp' or not both else mean_sd([runs[s]['loss'] - fp[s]['loss'] for s in both])
        rows = list(runs.values())
        lines.append(f'| {VARIANTS[variant][0]} (n={len(rows)}) | {mean_sd([r["loss"] for r in rows])} | '
                     f'{statistics.mean(r["bpb"] for r in rows):.4f} | {gap} | '
                     f'{statistics.median(r["ms"] for r in rows):.0f} | '
                     f'{statistics.median(r["peak"] for r in rows) / 2 ** 20:.0f} | {rows[0]["packed"]:,} |')
    return lines


def write_tables():
    found = summary()
    if 'fp' not in found:
        sys.exit('error: no finished fp run in results/quality; run: python results/quality.py')
    text = '\n'.join(table(found))
    (ROOT / 'results' / 'quality.md').write_text(text + '\n')
    readme = (ROOT / 'README.md').read_text()
    head, _, rest = readme.partition('<!-- quality -->\n')
    _, _, tail = rest.partition('<!-- end -->')
    (ROOT / 'README.md').write_text(f'{head}<!-- quality -->\n{text}\n<!-- end -->{tail}')
    print(text)
    plot(found)


def plot(found):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    for i, variant in enumerate(found):
        curves = []
        for path in sorted(LOGS.glob(f'{variant}_s*.jsonl')):
            records = [r for r in map(json.loads, open(path)) if 'val_loss' in r and r['step']]
            curves.append([(r['tokens'], r['val_loss']) for r in records])
            axes.plot(*zip(*curves[-1], strict=True), color=f'C{i}', lw=1, alpha=0.6,
                      label=f'{VARIANTS[variant][0]}: {curves[-1][-1][1]:.3f}' if len(curves) == 1 else None)
    axes.set(xlabel='training tokens', ylabel='validation loss, nats per byte', title='one line per seed')
    axes.legend(frameon=False, title='first seed, last value')
    figure.savefig(ROOT / 'results' / 'quality.png', dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', default='1,2,3')
    parser.add_argument('--only', default=','.join(VARIANTS))
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time, each on its share of the cores')
    parser.add_argument('--table', action='store_true', help='train nothing')
    a = parser.parse_args()
    if not a.table:
        LOGS.mkdir(exist_ok=True)
        threads = max(1, (os.cpu_count() or 1) // a.jobs)
        jobs = [(v, int(s)) for s in a.seeds.split(',') for v in a.only.split(',')]
        with ThreadPoolExecutor(a.jobs) as pool:
            list(pool.map(lambda job: train(*job, threads), jobs))
    write_tables()


if __name__ == '__main__':
    main()
