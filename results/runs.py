"""
The runs behind the tables: variants of one config on the same batches, several seeds each, measured and tabulated.

    python data/text/prepare.py --file wiki.train.txt --val_file wiki.valid.txt --name=wikitext2
    python results/runs.py quality [--seeds=1,2,3] [--jobs=2] [--only=fp,bin6]     # an hour on 2 cores
    python results/runs.py depth                                                  # 12 of 12 blocks binary
    python results/runs.py blocks                                                 # which 3 of 6 blocks, after ptq.py choose
    python results/runs.py recipe                                                 # what was tried on the way, one seed
    python results/runs.py sst2                                                   # methods of finetune_cls.py
    python results/runs.py food10                                                 # kinds and normalisations of train_cnn.py
    python results/runs.py arithmetic | tictactoe | tinystories                   # train_bitnet.py beside full precision
    python results/runs.py speed                                                  # bench.py train, its table
    python results/runs.py bitnet_speed                                           # ... of train_bitnet.py's model
    python results/runs.py stats | fit | layers | optim | optim_bytes | finetune | conv   # bench.py's other commands
    python results/runs.py quality --table                                        # from the logs alone

Runs the trainer once per variant and seed (interrupted: run again, it goes on), keeps each log in results/<name>/,
writes results/<name>.md (and .png), and puts the table into README.md. No number in them is typed by hand.
"""
import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOW = '--n_binary=6 --qkv_proj={0} --c_proj={0} --mlp_proj={0}'
BIN = "--n_binary=6 --lr_scale={'bin':1.0,'alpha':1.0}"
BIN_2 = BIN + ' --learning_rate=2e-3 --min_lr=2e-4'
EXPERIMENTS = {                                     # name: config, baseline, {variant: (label, what it changes)}
    'quality': ('config/wikitext2.py', 'fp', {
        'fp': ('full precision', ''),
        'bin3': ('3 of 6 blocks binary', '--n_binary=3'),
        'bin3_fast': ('... their scales at the full learning rate', "--n_binary=3 --lr_scale={'alpha':1.0}"),
        'bin6': ('all binary', '--n_binary=6'),
        'bin6_fast': ('... their scales at the full learning rate', "--n_binary=6 --lr_scale={'alpha':1.0}"),
        'tern6': ('all ternary', LOW.format('tern')),
        'int4': ('all 4-bit', LOW.format('int4')),
    }),
    # Random halves: random.Random(0).sample(range(6), 3), and of 1, each sorted.
    'blocks': ('config/wikitext2_blocks.py', 'first', {
        'chosen': ('those that ptq.py choose took', 'results/ptq/chosen.py'),
        'first': ('the first half', '--binary_blocks=0,1,2'),
        'last': ('the last half', '--binary_blocks=3,4,5'),
        'random_a': ('a random half, 0,3,5', '--binary_blocks=0,3,5'),
        'random_b': ('another, 0,1,4', '--binary_blocks=0,1,4'),
        'fp': ('none: full precision', ''),
    }),
    'depth': ('config/pycode_bin12.py', 'fp', {
        'fp': ('12 blocks, full precision', '--n_binary=0'),
        'bin12': ('12 of 12 binary', ''),
        'bin12_alpha25': ('... and every scale starting at 0.25, as the reference',
                          "--lr_scale={'bin':1.0,'alpha':1.0} --binary_alpha=0.25 --binary_alpha_out=0.25"),
        'bin12_fast': ('... latent weights and scales at the full rate', "--lr_scale={'bin':1.0,'alpha':1.0}"),
        'bin12_lr4': ('... 4 x the learning rate', '--learning_rate=1.6e-2 --min_lr=1.6e-3'),
    }),
    # 3 of 6 blocks binary, where the recipe for all-binary models failed. Made with trials of train_gpt.py; given up early.
    'scales': ('config/wikitext2.py', 'fp', {
        'fp': ('full precision', None),
        'full': ('3 of 6 blocks binary, scales at the full rate', None),
        'a02': ('... and starting at 0.02 on the way out instead of 0.05', None),
        'fanin': ('... and full-precision blocks starting at 1/sqrt(in)', None),
        'al10': ('scales at 0.1 of the rate', None),
        'al05': ('... 0.05', None),
        'al05a25': ('... 0.05, starting at 0.25 on the way out', None),
        'al05_s05': ('... 0.05, latent weights at half the rate instead of a quarter', None),
        'al02': ('... 0.02', None),
        'al01': ('... 0.01', None),
        'al005': ('... 0.005', None),
        'exp': ('scales as exp(s), s at the full rate', None),
    }),
    # Batches of 16. Variants with None were made with options or initial values that train_gpt.py does not have (any more).
    'recipe': ('config/wikitext2.py', 'fp_4', {
        'fp_2': ('full precision, learning rate 2e-3', '--learning_rate=2e-3 --min_lr=2e-4'),
        'fp_4': ('full precision, 4e-3', ''),
        'fp_8': ('full precision, 8e-3', '--learning_rate=8e-3 --min_lr=8e-4'),
        'fp_4_s025': ('... its block matrices at a quarter of that', None),
        'tern_4': ('all ternary, 4e-3, latent weights starting at 0.02', None),
        'tern_4_s025': ('... at a quarter of the rate', None),
        'tern_4_i4': ('... starting at 0.08, at half the rate', LOW.format('tern')),
        'bin_2': ('all binary, 2e-3, scales 1 in, 0.29 out', BIN_2 + ' --binary_alpha_out=0.29'),
        'bin_2_a2': ('... scales 2, 0.29', BIN_2 + ' --binary_alpha=2 --binary_alpha_out=0.29'),
        'bin_2_a25ao05': ('... scales 0.25, 0.05', BIN_2 + ' --binary_alpha=0.25'),
        'bin_4': ('all binary, 4e-3, scales 1, 0.29', BIN + ' --binary_alpha_out=0.29'),
        'bin_4_ch': ('... one scale per output channel', None),
        'bin_4_st': ('... scales 0.25, 0.07, nothing normalised, only scaled (BitNet b1)', None),
        'bin_4_a25ao05': ('... scales 0.25, 0.05', BIN + ' --binary_alpha=0.25'),
        'bin_4_ao02': ('... scales 1, 0.02', BIN + ' --binary_alpha_out=0.02'),
        'bin_4_ao05': ('... scales 1, 0.05', BIN),
        'bin_4_ao05_s025': ('... scales 1, 0.05, latent weights at a quarter of the rate',
                            "--n_binary=6 --lr_scale={'alpha':1.0}"),
    }),
}
FAST = '--learning_rate=1e-3 --method='
CLASSIFIED = {                                      # the same of finetune_cls.py
    'sst2': ('config/sst2_scratch.py', 'full', {
        'full': ('AdamW, all weights', ''),
        'rsvd64': ('rSVD, rank 64', FAST + 'rsvd --rank=64'),
        'rsvd16': ('rSVD, rank 16', FAST + 'rsvd'),
        'rsvd4': ('rSVD, rank 4', FAST + 'rsvd --rank=4'),
        'rsvd4_8bit': ('... 8-bit moments', FAST + 'rsvd --rank=4 --state_dtype=8bit'),
        'rsvd_svt': ('rSVD, 90% of the energy, rank 4 to 64', FAST + 'rsvd_svt --energy=0.9 --rank=64'),
        'rsvd16_left': ('rSVD, rank 16, basis on the left', FAST + 'rsvd --side=left'),
        'rsvd16_left_adam': ('... embeddings by AdamW', FAST + 'rsvd --side=left --adam_for=head,embeddings'),
        'lora': ('LoRA, rank 16', FAST + 'lora'),
        'lora_topr': ('LoRA, rank 16, largest tenth of the gradient', FAST + 'lora_topr'),
        'qlora': ('QLoRA, rank 16, nf4', FAST + 'qlora'),
        'wr16': ('weight reduction, rank 16', FAST + 'weight_reduction'),
        'wr_svt16': ('... cut to 8', FAST + 'weight_reduction_svt'),
    }),
}
CNN_LAYERS = [*(f'conv{i}' for i in range(1, 11)), 'fc1', 'fc2', 'final']
REAL = '--model_config={' + ','.join(f"'{layer}':'real'" for layer in CNN_LAYERS) + '}'
BINARY = REAL.replace('real', 'binary')
# the same of train_cnn.py; first: python data/images/prepare.py --dir ... --name=food10 --size=80
PHOTOGRAPHS = {
    'food10': ('config/images_mixed.py --dataset=images/food10', 'real', {
        'real': ('all real', REAL),
        'mixed': ("the reference's five binary: conv1, conv2, fc1, fc2, final", ''),
        'mixed70': ('conv8, conv9, conv10 binary', REAL.replace("'conv8':'real','conv9':'real','conv10':'real'",
                                                                "'conv8':'binary','conv9':'binary','conv10':'binary'")),
        'bin': ('all binary', BINARY),
        'bin_spatial': ('... normalised over the pixels of each channel (the reference)', BINARY + ' --norm=spatial'),
        'bin_sample': ('... over the whole image', BINARY + ' --norm=sample'),
        'tern': ('all ternary', REAL.replace('real', 'ternary')),
        'int4': ('all 4-bit', REAL.replace('real', 'int4')),
    }),
}
PHOTOGRAPHS |= {                                    # what was tried on the way, one seed, a third of the steps
    'food10_recipe': (PHOTOGRAPHS['food10'][0] + ' --epochs=10', 'real', {
        'real': ('all real', REAL),
        'real_lr3': ('... 3 x the learning rate', REAL + ' --learning_rate=3e-3'),
        'mixed_a1': ('conv1, conv2, fc1, fc2, final binary, scales at the rate of the rest', "--lr_scale={'alpha':1.0}"),
        'mixed': ('... scales at 10 x the rate', ''),
        'mixed_b3': ('... and latent weights at 3 x', "--lr_scale={'bin':3.0}"),
        'mixed_b10': ('... at 10 x', "--lr_scale={'bin':10.0}"),
        'mixed_b3_spatial': ('... at 3 x, normalised over the pixels of each channel', "--lr_scale={'bin':3.0} --norm=spatial"),
        'mixed_b3_sample': ('... over the whole image', "--lr_scale={'bin':3.0} --norm=sample"),
        'convs_a1': ('only conv1, conv2 binary, scales at the rate of the rest',
                     REAL.replace("'conv1':'real','conv2':'real'", "'conv1':'binary','conv2':'binary'")
                     + " --lr_scale={'alpha':1.0}"),
        'fcs_a1': ('only fc1, fc2, final binary, the same',
                   REAL.replace("'fc1':'real','fc2':'real','final':'real'", "'fc1':'binary','fc2':'binary','final':'binary'")
                   + " --lr_scale={'alpha':1.0}"),
        'bin_a1': ('all binary, the same', BINARY + " --lr_scale={'alpha':1.0}"),
        'bin_a1_b025': ('... latent weights at a quarter', BINARY + " --lr_scale={'alpha':1.0,'bin':0.25}"),
        'bin_a1_lr3': ('... 3 x the learning rate', BINARY + " --lr_scale={'alpha':1.0} --learning_rate=3e-3"),
        'bin_a1_lr3_start1': ('... and scales starting at 1',
                              BINARY + " --lr_scale={'alpha':1.0} --learning_rate=3e-3 --binary_alpha=1.0"),
        'bin_a1_lr3_wd0': ('... or no weight decay',
                           BINARY + " --lr_scale={'alpha':1.0} --learning_rate=3e-3 --weight_decay=0"),
        'bin_a1_lr10': ('... 10 x the learning rate', BINARY + " --lr_scale={'alpha':1.0} --learning_rate=1e-2"),
    }),
}
# Both twins at one peak rate; the ternary one always has the second stage, which LLaMA baselines do without.
TWINS = {'tern': ('ternary', ''),
         'fp_two': ('full precision, the same rates', '--quant=fp --second_lr=1.3333e-3'),
         'fp': ('full precision, without the second stage', '--quant=fp')}
# the same of train_bitnet.py; first: python data/<name>/prepare.py, tinystories with --file where there is no network
BITNETS = {
    'arithmetic': ('config/arithmetic.py', 'fp_two', TWINS),
    'tictactoe': ('config/tictactoe.py', 'fp_two', TWINS),
    'tinystories': ('config/tinystories_small.py', 'fp_two', TWINS),
}
EXPERIMENTS |= CLASSIFIED | PHOTOGRAPHS | BITNETS
SUBWORDS = (*BITNETS, 'blocks')                    # the others' tokens are bytes
DEFAULT_SEEDS = dict.fromkeys(('quality', 'blocks', 'sst2', 'food10', 'tinystories'), '1,2,3')
DEFAULT_SEEDS |= dict.fromkeys(('recipe', 'food10_recipe', 'arithmetic', 'tictactoe'), '1337')
DEFAULT_SEEDS |= dict.fromkeys(('depth', 'scales'), '1')


def train(name, variant, seed, threads):
    """One run, resumed if it was interrupted; its log ends up in results/<name>/<variant>_s<seed>.jsonl."""
    config, _, variants = EXPERIMENTS[name]
    out = f'out/{name}/{variant}_s{seed}'
    extra = ['--batch_size=16'] if name == 'recipe' else []
    script = next((s for s, names in (('finetune_cls.py', CLASSIFIED), ('train_cnn.py', PHOTOGRAPHS),
                                      ('train_bitnet.py', BITNETS)) if name in names), 'train_gpt.py')
    command = [sys.executable, script, *config.split(), *extra, *variants[variant][1].split(),
               f'--seed={seed}', f'--out_dir={out}', '--resume=auto']
    os.makedirs(ROOT / out, exist_ok=True)
    if not finished(ROOT / out / 'log.jsonl') or name in CLASSIFIED:
        with timed(ROOT / out), open(ROOT / out / 'stdout.txt', 'a') as f:
            subprocess.run(command, cwd=ROOT, stdout=f, stderr=subprocess.STDOUT, check=True,
                           env=dict(os.environ, OMP_NUM_THREADS=str(threads)))
    log = ROOT / 'results' / name / f'{variant}_s{seed}.jsonl'
    shutil.copy(ROOT / out / 'log.jsonl', log)
    if name in CLASSIFIED:                          # what the run found at its end is one more line
        import yaml
        found = yaml.safe_load((ROOT / out / 'results.yaml').read_text())
        with open(log, 'a') as f:
            f.write(json.dumps({'step': found['steps'], 'results': found}) + '\n')
    else:                                           # the time it took, evaluations and all; None where a part was killed
        *before, last = log.read_text().splitlines()
        parts = json.loads((ROOT / out / 'seconds.json').read_text())
        last = json.loads(last) | {'seconds': None if None in parts else round(sum(parts)), 'threads': threads}
        log.write_text('\n'.join([*before, json.dumps(last)]) + '\n')
    print(f'{variant} seed {seed}: done', flush=True)


def finished(log):
    return log.exists() and 'packed_file_bytes' in json.loads(log.read_text().splitlines()[-1])


@contextlib.contextmanager
def timed(out):
    """Seconds of what stands in the with block, after those of earlier parts of the run, in out/seconds.json; a part that did
    not come to its end in any way stays None."""
    path = out / 'seconds.json'
    parts = json.loads(path.read_text()) if path.exists() else [None] * (out / 'last.pt').exists()
    path.write_text(json.dumps([*parts, None]))
    start = time.monotonic()
    try:
        yield
    finally:
        path.write_text(json.dumps([*parts, time.monotonic() - start]))


def logs(name, variant):
    """Paths of the logs of one variant, by seed."""
    return sorted(p for p in (ROOT / 'results' / name).glob('*.jsonl') if re.fullmatch(rf'{variant}_s\d+', p.stem))


def summary(name):
    """{variant: {seed: dict}} of the finished logs: val loss and bits per byte at the end, ms, memory, bytes."""
    found = {}
    for variant in EXPERIMENTS[name][2]:
        for path in logs(name, variant):
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


def table(name, found):
    """Markdown lines: mean ± sd over seeds; the gap to the baseline is paired by seed, both saw the same batches."""
    config, baseline, variants = EXPERIMENTS[name]
    base = found[baseline]
    one = next(iter(base.values()))
    token = 'of a trained BPE' if name in SUBWORDS else 'here a byte'
    lines = [f'`{config}`: {one["step"]:,} steps, {one["tokens"]:,} tokens; mean ± sd over seeds; loss in nats per token '
             f'({token}) at the last step; the gap is paired by seed; ms/step on one core, another run on the other'
             + (', × of the twin beside it.' if name in BITNETS else '.'), '',
             '| variant | val loss | bits per byte | gap | ms/step | peak resident MiB | packed file bytes |',
             '|---|---|---|---|---|---|---|']
    for variant, runs in found.items():
        both = sorted(runs.keys() & base.keys())
        gap = '-' if variant == baseline or not both else mean_sd([runs[s]['loss'] - base[s]['loss'] for s in both])
        rows = list(runs.values())
        ms = f'{statistics.median(r["ms"] for r in rows):.0f}'
        if name in BITNETS and both:                # the load of the machine changes between pairs
            ms += f' ({statistics.median(runs[s]["ms"] / base[s]["ms"] for s in both):.2f} ×)'
        lines.append(f'| {variants[variant][0]} (n={len(rows)}) | {mean_sd([r["loss"] for r in rows])} | '
                     f'{statistics.mean(r["bpb"] for r in rows):.4f} | {gap} | {ms} | '
                     f'{statistics.median(r["peak"] for r in rows) / 2 ** 20:.0f} | {rows[0]["packed"]:,} |')
    return lines


def measure_steps(name, steps=160):
    """Memory and time of a step of each variant, one after the other on one core of an idle machine, which the runs behind
    the accuracies did not have: a line for each in results/<name>/steps.jsonl."""
    import yaml
    config, _, variants = EXPERIMENTS[name]
    rows = []
    for variant in (v for v in variants if logs(name, v)):
        out = f'out/{name}/steps_{variant}'
        subprocess.run([sys.executable, 'finetune_cls.py', config, *variants[variant][1].split(), f'--max_iters={steps}',
                        f'--out_dir={out}', '--overwrite=True'], cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
                       env=dict(os.environ, OMP_NUM_THREADS='1'))
        found = yaml.safe_load((ROOT / out / 'results.yaml').read_text())
        rows.append({'variant': variant, 'steps': steps} | {k: found[k] for k in (
            'ms_per_step', 'peak_bytes', 'optimizer_bytes', 'gradient_bytes', 'basis_ranks')})
        print(rows[-1], flush=True)
    (ROOT / 'results' / name / 'steps.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))


def accuracy_table(name):
    """Markdown lines for runs of finetune_cls.py: mean ± sd over seeds, points; the gap is paired by seed."""
    config, baseline, variants = EXPERIMENTS[name]
    found = {v: {int(p.stem.rsplit('_s', 1)[1]): json.loads(open(p).readlines()[-1])['results'] for p in logs(name, v)}
             for v in variants}
    points = lambda values: f'{statistics.mean(values) * 100:.2f}' + (
        f' ± {statistics.stdev(values) * 100:.2f}' if len(values) > 1 else '')
    base = found[baseline]
    if not base:
        sys.exit(f'error: no finished run of {baseline} in results/{name}; run: python results/runs.py {name}')
    path = ROOT / 'results' / name / 'steps.jsonl'
    steps = {r['variant']: r for r in map(json.loads, open(path))} if path.exists() else {}
    full, one = steps.get(baseline), next(iter(base.values()))
    lines = [f'`{config}`: {one["parameters"]:,} parameters, {one["steps"]:,} steps, {one["n"]} sentences to evaluate; mean ± '
             'sd over seeds; accuracy in percent, the gap in points and paired by seed. Of a step, measured apart '
             f'(`--steps`), one thread: bytes of optimizer state, KiB of gradients, MiB of all tensors alive at once, '
             'milliseconds with refreshes, × those of AdamW.', '',
             '| method | accuracy | gap | evaluation loss | trained | optimizer bytes | gradients | peak | ms | × |',
             '|---|---|---|---|---|---|---|---|---|---|']
    for variant, runs in found.items():
        both, rows = sorted(runs.keys() & base.keys()), list(runs.values())
        if rows:
            gap = '-' if variant == baseline or not both else points([runs[s]['accuracy'] - base[s]['accuracy'] for s in both])
            r = steps.get(variant)
            step = ' | '.join(('-',) * 5 if r is None else (
                f'{r["optimizer_bytes"]:,}', f'{r["gradient_bytes"] / 1024:,.0f}', f'{r["peak_bytes"] / MIB:.1f}',
                f'{r["ms_per_step"]:.0f}', f'{r["ms_per_step"] / full["ms_per_step"]:.2f}'))
            lines.append(f'| {variants[variant][0]} (n={len(rows)}) | {points([r["accuracy"] for r in rows])} | {gap} | '
                         f'{mean_sd([r["eval_loss"] for r in rows])} | {rows[0]["trained_parameters"]:,} | {step} |')
    return lines


def photograph_table(name):
    """Markdown lines for runs of train_cnn.py: mean ± sd over seeds at the last step; the gap is paired by seed."""
    config, baseline, variants = EXPERIMENTS[name]
    found = {}
    for variant in variants:
        for path in logs(name, variant):
            records = [json.loads(line) for line in open(path)]
            if 'packed_file_bytes' in records[-1]:  # finished
                found.setdefault(variant, {})[int(path.stem.rsplit('_s', 1)[1])] = records[-1] | [
                    r for r in records if 'top1' in r][-1]
    base = found.get(baseline) or sys.exit(f'error: no finished run of {baseline}; run: python results/runs.py {name}')
    points = lambda values: f'{statistics.mean(values) * 100:.2f}' + (
        f' ± {statistics.stdev(values) * 100:.2f}' if len(values) > 1 else '')
    one = next(iter(base.values()))
    lines = [f'`{config}`: {one["step"]:,} steps, {one["samples"]:,} images seen; at the last step, in percent, mean ± sd over '
             'seeds; the gap in points, paired by seed; share of the parameters that are binary.', '',
             '| layers | top-1 | gap | top-5 | val loss | binary share | packed file bytes |', '|---|---|---|---|---|---|---|']
    for variant, runs in found.items():
        both, rows = sorted(runs.keys() & base.keys()), list(runs.values())
        gap = '-' if variant == baseline or not both else points([runs[s]['top1'] - base[s]['top1'] for s in both])
        lines.append(f'| {variants[variant][0]} (n={len(rows)}) | {points([r["top1"] for r in rows])} | {gap} | '
                     f'{points([r["top5"] for r in rows])} | {spread([r["val_loss"] for r in rows], 4)} | '
                     f'{rows[0]["binary_share"]:.1%} | {rows[0]["packed_file_bytes"]:,} |')
    return lines


def task_table(name):
    """Markdown lines for arithmetic and tic-tac-toe: what was right at the last step, and the time it took."""
    config, _, variants = EXPERIMENTS[name]
    shown = {'arithmetic': {'exact match of held-out problems': ['exact_match']},
             'tictactoe': {'legal moves in games': ['in_games'], '... in validation games': ['legal_moves'],
                           'all games that can happen to it: lost, ended by an illegal move': ['lines_lost', 'lines_illegal'],
                           'against random: won, drawn, lost': ['random_wins', 'random_draws', 'random_losses'],
                           'against perfect: won, drawn, lost': ['perfect_wins', 'perfect_draws', 'perfect_losses']}}
    found, curves = {}, {}
    for variant, (label, _) in variants.items():
        for path in logs(name, variant):
            if not finished(path):
                continue
            records = [json.loads(line) for line in open(path)]
            scored = [r for r in records if 'exact_match' in r or 'legal_moves' in r]
            r = records[-1] | scored[-1]
            r['in_games'] = (r.get('random_legal', 0) + r.get('perfect_legal', 0)) / 2
            r['minutes'] = None if r['seconds'] is None else r['seconds'] / 60
            found.setdefault(label, []).append(r)
            curves[f'{label}, seed {path.stem.rsplit("_s", 1)[1]}'] = {r['step']: r.get('exact_match') for r in scored}
    if not found:
        sys.exit(f'error: no finished run in results/{name}; run: python results/runs.py {name}')
    one = next(iter(found.values()))[0]
    lines = [f'`{config}`: {one["step"]:,} steps, {one["tokens"]:,} tokens; at the last step, mean ± sd over n seeds; minutes '
             f'of a run with its evaluations on {one["threads"]} thread{"s" * (one["threads"] > 1)}, some beside other work.'
             + (' Games: 200 against each, an illegal move loses.' if name == 'tictactoe' else ''), '',
             '| model | ' + ' | '.join(shown[name]) + ' | val loss | minutes | packed file bytes |',
             '|---' * (len(shown[name]) + 4) + '|']
    for label, rows in found.items():
        cells = [' '.join(spread([r[key] * 100 for r in rows], 2, '%') for key in keys) for keys in shown[name].values()]
        lines.append(f'| {label} (n={len(rows)}) | ' + ' | '.join(cells) + f' | {spread([r["val_loss"] for r in rows], 4)} | '
                     f'{spread([r["minutes"] for r in rows], 1)} | {rows[0]["packed_file_bytes"]:,} |')
    if name == 'arithmetic':
        steps = sorted({s for row in curves.values() for s in row})
        lines += ['', '| exact match at step | ' + ' | '.join(f'{s:,}' for s in steps) + ' |', '|---' * (len(steps) + 1) + '|']
        lines += [f'| {label} | ' + ' | '.join(f'{row[s]:.1%}' if s in row else '' for s in steps) + ' |'
                  for label, row in curves.items()]
    return lines


def spread(values, digits, unit=''):
    """'99.66 ± 0.12%'; - where one was not measured."""
    if None in values:
        return '-'
    sd = f' ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.{digits}f}{sd}{unit}'


def table_by_step(name):
    """Markdown lines: validation loss along each run; a run given up early ends early."""
    rows = {}
    for variant, (label, _) in EXPERIMENTS[name][2].items():
        for path in logs(name, variant):
            rows[label, path.stem] = {r['step']: r['val_loss'] for r in map(json.loads, open(path)) if 'val_loss' in r}
    steps = sorted({s for row in rows.values() for s in row if s})
    unit = 'nats' if name in PHOTOGRAPHS else 'nats per byte'
    return [f'`{EXPERIMENTS[name][0]}{" --batch_size=16" if name == "recipe" else ""}`: validation loss, {unit}, one seed.', '',
            '| variant | ' + ' | '.join(f'step {s:,}' for s in steps) + ' |', '|---' * (len(steps) + 1) + '|',
            *(f'| {label} | ' + ' | '.join(f'{row[s]:.4f}' if s in row else '' for s in steps) + ' |'
              for (label, _), row in rows.items())]


MIB = 2 ** 20


def figure(key, spec):
    """A cell of a number, - where there is none."""
    return lambda r: '-' if r.get(key) is None else format(r[key] / MIB if key.endswith('_bytes') else r[key], spec)


def step_caption(r):
    model = 'train_bitnet.py' if r.get('model') == 'bitnet' else 'train_gpt.py'
    return (f'The model of {model}, {r["n_layer"]} layers x {r["n_embd"]}, {r["batch_size"]} x {r["block_size"]} tokens, '
            f'{r["device"]}, {r["threads"]} threads, torch {r["torch"]}; × is relative to fp of the same dtype; peak memory is '
            'what is alive in tensors at once, resident what the process grew by.')


STEP_COLUMNS = {'kind': '{kind}', 'dtype': '{dtype}', 'ms/step': '{ms:.0f}', '×': '{ratio:.2f}',
                'tokens/s': '{tokens_per_s:,.0f}', 'peak MiB': lambda r: mib(r, 'peak', 0), '× ': '{peak_ratio:.2f}',
                'resident MiB': lambda r: mib(r, 'resident', 0), '×  ': '{resident_ratio:.2f}'}

# name: what bench.py is asked, a line above the table from one row, columns (header, cell from a row)
BENCHES = {
    'bitnet_speed': (['train --model=bitnet --steps=2'], step_caption, STEP_COLUMNS),
    'speed': (['train --steps=2'], step_caption, STEP_COLUMNS),
    'stats': (['stats bignet half lora int4 qlora nf4 fit4 int8 ternary binary',
               'compare half lora int4 qlora nf4 fit4 int8 ternary binary'],
              lambda r: f'BigNet, {r["device"]}, torch {r["torch"]}, batch 32; MiB but for bytes; forward and backward: most '
              'alive at once above the model itself, allocator peak; difference: of outputs from the full-precision ones, '
              'same weights, same inputs.',
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
              'makes every basis anew and is what that takes beyond a plain step; amortised: with one in '
              f'{r["interval"]} steps. full SVD: torch.linalg.svd of every matrix.',
              {'optimizer': '{name}', 'MiB': figure('optimizer_bytes', '.1f'), 'ms/step': figure('ms', '.0f'),
               '× AdamW': figure('ratio', '.2f'), '× GaLore of that rank': figure('galore_ratio', '.2f'),
               'refresh ms': figure('refresh_ms', ',.0f'), '× full SVD': figure('svd_ratio', '.3f'),
               'amortised ms': figure('amortised_ms', '.0f'), '× AdamW ': figure('amortised_ratio', '.2f')}),
    'optim_bytes': (['optim-bytes'],
                    lambda r: f'DistilBERT with 2 labels, fp32, a training step on {r["batch"]} x {r["tokens"]} tokens, '
                    f'{r["device"]}, torch {r["torch"]}; optimizer: its tensors after a step; peak: all tensors alive at once '
                    'in a step, weights and optimizer included; saved: of Adam\'s; rank of 768.',
                    {'low rank': '{scheme}', 'rank': figure('rank', 'd'), 'optimizer bytes': '{optimizer_bytes:,}',
                     'MiB': figure('optimizer_bytes', '.2f'), 'saved': figure('optimizer_saved', '.1%'),
                     'peak MiB': figure('peak_bytes', '.0f'), 'saved ': figure('peak_saved', '.1%')}),
    'finetune': (['finetune'],
                 lambda r: f'DistilBERT with 2 labels, fp32, a whole training step on {r["batch"]} x {r["tokens"]} tokens, '
                 f'dropout on, rank {r["rank"]}, {r["device"]}, {r["threads"]} threads, torch {r["torch"]}; MiB; amortised: '
                 f'with a refresh of every basis in {r["interval"]} steps; peak: most tensors alive at once in any step, also '
                 'one of a refresh; saved: kept for the backward pass; all-reduce: what ranks send in a step.',
                 {'variant': '{name}', 'ms/step': figure('ms', ',.0f'), 'amortised': figure('amortised_ms', ',.0f'),
                  '× AdamW': figure('amortised_ms_x_adamw', '.2f'), '× LoRA': figure('amortised_ms_x_lora', '.2f'),
                  'peak': figure('peak_bytes', ',.0f'), '× AdamW ': figure('peak_x_adamw', '.2f'),
                  '× LoRA ': figure('peak_x_lora', '.2f'), 'resident': figure('resident_bytes', ',.0f'),
                  'saved': figure('saved_bytes', '.0f'), 'gradients': figure('gradient_bytes', '.1f'),
                  'all-reduce': figure('sent_bytes', '.1f'), 'optimizer': figure('optimizer_bytes', '.1f')}),
    'conv': (['conv --threads=1'],
             lambda r: f'{r["batch"]} images of {r["image_size"]} pixels, {r["device"]}, {r["threads"]} thread, torch '
             f'{r["torch"]}; milliseconds and, in brackets, times real layers of the same dtype: forward and backward of one '
             '3x3 convolution with its normalisation and a ReLU, by channels x pixels of a side; then a training step of the '
             'network, the most bytes of tensors alive in it, MiB, and the bytes it packs into.',
             {'layers': '{name}', 'dtype': '{dtype}'}
             | {f'{width} x {64 >> b}': (lambda r, key=f'{width}x{64 >> b}': times(r, key) if f'{key}_ms' in r else '-')
                for b, width in enumerate((32, 64, 64, 128, 256))}
             | {'network': lambda r: times(r, 'net'), 'peak': lambda r: f'{mib(r, "peak", 0)} ({r["peak_ratio"]:.2f})',
                'packed bytes': '{packed_bytes:,}'}),
}


def times(row, what):
    return '-' if row[f'{what}_ms'] is None else f'{row[f"{what}_ms"]:.3g} ({row[f"{what}_ratio"]:.2f})'


def mib(row, key, digits=2):
    return f'{row[key + "_bytes"] / MIB:.{digits}f}'


def bench_table(name):
    """Markdown lines from the rows that bench.py wrote into results/<name>.jsonl."""
    rows = [json.loads(line) for line in open(ROOT / 'results' / f'{name}.jsonl')]
    _, head, columns = BENCHES[name]
    merged = {}                                     # rows of one variant are one, but for a layer's sizes and dtypes
    for r in rows:
        key = r.get('name', r.get('kind')), r.get('dtype') if name in ('speed', 'bitnet_speed', 'conv') else None
        if name == 'layers':
            r[f't{r["tokens"]}'] = r
        merged.setdefault(key, {}).update(r)
    columns = dict(columns)
    for t in dict.fromkeys(r['tokens'] for r in rows if name == 'layers'):
        for what in ('forward', 'both'):
            header = f'{t} token{"s" * (t > 1)}' + (', with backward' if what == 'both' else '')
            columns[header] = lambda r, t=t, what=what: times(r[f't{t}'], what)
    lines = [head(rows[0]), '', '| ' + ' | '.join(h.strip() for h in columns) + ' |', '|---' * len(columns) + '|']
    return lines + ['| ' + ' | '.join(c(r) if callable(c) else c.format(**r) for c in columns.values()) + ' |'
                    for r in merged.values()]


def write_tables(name):
    if name in BENCHES:
        return publish(name, bench_table(name))
    if name in CLASSIFIED:
        return publish(name, accuracy_table(name))
    if name in ('arithmetic', 'tictactoe'):
        return publish(name, task_table(name))
    if name == 'food10':
        return publish(name, photograph_table(name))
    if name in ('recipe', 'scales', 'food10_recipe'):
        return publish(name, table_by_step(name))
    found = summary(name)
    if EXPERIMENTS[name][1] not in found:
        sys.exit(f'error: no finished baseline run in results/{name}; run: python results/runs.py {name}')
    publish(name, table(name, found) + shown_texts(name))
    plot(name, found)


STORY = ['--prompt=Once upon a time', '--max_new_tokens=160', '--temperature=0.7']


def write_texts(name):
    """What each variant's first seed goes on with after the same words, into results/<name>/<variant>.txt."""
    for variant in EXPERIMENTS[name][2]:
        run = next(iter(sorted((ROOT / 'out' / name).glob(f'{variant}_s*'))), None)
        if run:
            words = ['sample.py', f'--ckpt={run.relative_to(ROOT)}', *STORY]
            told = subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)
            (ROOT / 'results' / name / f'{variant}.txt').write_bytes(told.stdout)


def shown_texts(name):
    """Markdown lines with the texts of write_texts(), where there are any."""
    lines = []
    for variant, (label, _) in EXPERIMENTS[name][2].items():
        path = ROOT / 'results' / name / f'{variant}.txt'
        if path.exists():
            told = path.read_text(errors='replace').strip().split('\n')
            lines += ['', f'{label}, first seed, `{shlex.join(STORY)}`:', '']
            lines += [f'> {line}'.rstrip() for line in told]
    return lines


def publish(name, lines):
    """Write results/<name>.md and the place for it in README.md, and print it."""
    text = '\n'.join(lines)
    (ROOT / 'results' / f'{name}.md').write_text(text + '\n')
    readme = (ROOT / 'README.md').read_text()
    head, mark, rest = readme.partition(f'<!-- {name} -->\n')
    if mark:
        (ROOT / 'README.md').write_text(f'{head}{mark}{text}\n<!-- end -->{rest.partition("<!-- end -->")[2]}')
    print(text)


def plot(name, found):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(9.5, 4.2), constrained_layout=True)
    for i, variant in enumerate(found):
        for n, path in enumerate(logs(name, variant)):
            curve = [(r['tokens'], r['val_loss']) for r in map(json.loads, open(path)) if 'val_loss' in r and r['step']]
            axes.plot(*zip(*curve, strict=True), color=f'C{i}', lw=1, alpha=0.7,
                      label=None if n else f'{EXPERIMENTS[name][2][variant][0]}: {curve[-1][1]:.3f}')
    token = 'token' if name in SUBWORDS else 'byte'
    axes.set(xlabel='training tokens', ylabel=f'validation loss, nats per {token}', title='one line per seed')
    axes.legend(frameon=False, title='first seed, last value', bbox_to_anchor=(1, 1), loc='upper left')
    figure.savefig(ROOT / 'results' / f'{name}.png', dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', choices=[*EXPERIMENTS, *BENCHES])
    parser.add_argument('--seeds', default='', help='e.g. 1,2,3')
    parser.add_argument('--only', default='', help='variants, separated by commas')
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time, each on its share of the cores')
    parser.add_argument('--table', action='store_true', help='train nothing')
    parser.add_argument('--steps', action='store_true', help='only memory and time of a step, of methods of finetune_cls.py')
    a = parser.parse_args()
    if a.name in BENCHES and not a.table:
        rows = ROOT / 'results' / f'{a.name}.jsonl'
        rows.unlink(missing_ok=True)
        for command in BENCHES[a.name][0]:
            subprocess.run([sys.executable, 'bench.py', *command.split(), f'--json={rows}'], cwd=ROOT, check=True)
    elif a.steps and not a.table:
        measure_steps(a.name)
    elif not a.table:
        (ROOT / 'results' / a.name).mkdir(exist_ok=True)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
        threads = max(1, cores // a.jobs)
        chosen = a.only.split(',') if a.only else [v for v, (_, o) in EXPERIMENTS[a.name][2].items() if o is not None]
        if unknown := [v for v in chosen if EXPERIMENTS[a.name][2].get(v, (0, None))[1] is None]:
            parser.error(f'{unknown[0]} is no variant that can be run')
        jobs = [(a.name, v, int(s), threads) for s in (a.seeds or DEFAULT_SEEDS[a.name]).split(',') for v in chosen]
        with ThreadPoolExecutor(a.jobs) as pool:
            list(pool.map(lambda job: train(*job), jobs))
        if a.name == 'tinystories':
            write_texts(a.name)
    write_tables(a.name)


if __name__ == '__main__':
    main()
