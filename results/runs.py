"""
The runs behind the tables: variants of one config on the same batches, several seeds each, measured and tabulated.

    python data/text/prepare.py --file wiki.train.txt --val_file wiki.valid.txt --vocab=1024 --name=wikitext2
    python results/runs.py quality [--seeds=1,2,3] [--jobs=2] [--only=fp,bin]      # hours on 2 cores
    python results/runs.py search                                                 # rates, starts, teachers; after quality
    python results/runs.py depth                                                  # 12 of 12 blocks binary
    python results/runs.py blocks                                                 # which 3 of 6 blocks, after ptq.py choose
    python results/runs.py sst2 | sst2_search                                     # methods of finetune_cls.py, their rates
    python results/runs.py food10 | food10_search                                 # kinds of layers of train_cnn.py, their rates
    python results/runs.py arithmetic | tictactoe | tinystories                   # train_bitnet.py beside full precision
    python results/runs.py speed                                                  # bench.py train, its table
    python results/runs.py bitnet_speed                                           # ... of train_bitnet.py's model
    python results/runs.py stats | fit | layers | optim | optim_bytes | finetune | conv   # bench.py's other commands
    python results/runs.py [quality] --table                                      # one or all, from the kept runs alone

Runs the trainer once for each variant and seed in out/<name>/ (an interrupted run continues), stores each run as a line of
results/<name>.jsonl, and writes results/<name>.md and .png, its headlines in README.md and docs/, and the index
results/README.md. No number in them is typed by hand.
"""
import argparse
import collections
import contextlib
import json
import math
import os
import re
import runpy
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import keep
from benches import BENCHES, bench_table
from keep import MIB, ROOT, number, table


def chosen_blocks():
    """The option with the blocks that `ptq.py choose` took in results/ptq_sensitivity.jsonl; None before that run."""
    taken = sorted(int(r['taken'].rpartition('.')[2]) for r in keep.read('ptq_sensitivity') if 'taken' in r)
    return f'--binary_blocks={",".join(map(str, taken))}' if taken else None


LOW = '--n_binary=4 --qkv_proj={0} --c_proj={0} --mlp_proj={0}'
BIN, TERN = LOW.format('bin'), LOW.format('tern') + ' --output_gains=True'
TWIN = '--{}=out/quality/fp_s{{seed}}/best.pt'.format     # {seed}: of the same seed, which must be trained first
TAUGHT = f" {TWIN('init_from')} {TWIN('teacher')}"
PLAIN = ' --ramp=0.0 --ternary_std=0.0'
RATE = " --lr_scale={{'{}':{}}}".format                        # of one kind of parameters, × the learning rate
TERN4 = TERN + RATE('tern', 4.0)
Experiment = collections.namedtuple('Experiment', 'script config baseline seeds variants')  # variant: (label, what it changes)
EXPERIMENTS = {
    # The variants with None used a trial version of layers.py.
    'quality': Experiment('train_gpt.py', 'config/wikitext2.py', 'fp', '1,2,3', {
        'fp': ('full precision', ''),
        'fp_more': ('... trained on for as many steps again', TWIN('init_from')),
        'fp_4': ('... learning rate 4e-3 instead of 8e-3', '--learning_rate=4e-3'),
        'fp_16': ('... learning rate 1.6e-2', '--learning_rate=1.6e-2'),
        'fp_adamw': ('... AdamW instead of Muon', '--optimizer=adamw'),
        'fp_rsvd': ('... rSVD, rank 16', '--optimizer=rsvd'),
        # what python ptq.py choose --ckpt=out/quality/fp_s1 --bits=17 takes
        'half': ('2 of 4 blocks binary: 2 and 3', '--binary_blocks=2,3'),
        'bin': ('all binary', BIN),
        'bin_plain': ('... rounded from the start', BIN + PLAIN),
        'bin_wd0': ('... no weight decay, a ramp over 75 %', None),
        'bin_ramp75': ('... a ramp over 75 % of the steps instead of 85 %', None),
        'bin_ramp90': ('... over 90 %', None),
        'bin_full': ('... latent weights never rounded', None),
        'bin_taught': ('all binary, trained on from full precision, its teacher', BIN + TAUGHT + RATE('alpha', 1.0) + PLAIN),
        'bin_taught_ramp': ('... with a ramp over 85 % of the steps', None),
        'tern': ('all ternary', TERN),
        'tern_plain': ('... rounded from the start, at 2 x the rate, from 1/sqrt(inputs)',
                       TERN + RATE('tern', 2.0) + PLAIN),
        'tern_small': ('... rounded from the start, from the same initial weights', TERN + ' --ramp=0.0'),
        'tern_large': ('... a ramp over 75 % of the steps, from 1/sqrt(inputs)', None),
        'tern_taught': ('all ternary, trained on from full precision, its teacher', TERN + TAUGHT + RATE('tern', 0.5) + PLAIN),
        'tern_taught_ramp': ('... with a ramp over 85 % of the steps', None),
        'int4': ('all 4-bit', LOW.format('int4')),
    }),
    # A quarter of the steps, without a ramp. The variant with None used an option that is gone.
    'search': Experiment('train_gpt.py', 'config/wikitext2.py --learning_rate=4e-3 --max_iters=625 --eval_interval=625'
                         + PLAIN, 'fp', '1', {
        'fp': ('full precision', ''),
        'fp_2': ('... learning rate 2e-3 instead of 4e-3', '--learning_rate=2e-3'),
        'fp_8': ('... 8e-3', '--learning_rate=8e-3'),
        'fp_16': ('... 1.6e-2', '--learning_rate=1.6e-2'),
        'fp_32': ('... 3.2e-2', '--learning_rate=3.2e-2'),
        'fp_cosine': ('... cosine to a tenth instead of linear to 0', '--schedule=cosine --min_lr=4e-4'),
        'fp_decay': ('... no weight decay', '--weight_decay=0'),
        'fp_adamw': ('... AdamW, 4e-3', '--optimizer=adamw'),
        'fp_adamw_8': ('... AdamW, 8e-3', '--optimizer=adamw --learning_rate=8e-3'),
        'fp_adamw_2': ('... AdamW, 2e-3', '--optimizer=adamw --learning_rate=2e-3'),
        'tern': ('all ternary, latent weights at 4 x the rate', TERN4),
        'tern_8e3': ('... at 4 x, learning rate 8e-3', TERN4 + ' --learning_rate=8e-3'),
        'tern_8e3_2': ('... at 2 x, learning rate 8e-3', TERN + RATE('tern', 2.0) + ' --learning_rate=8e-3'),
        'tern_1': ('... at the rate', TERN + RATE('tern', 1.0)),
        'tern_2': ('... at 2 x', TERN + RATE('tern', 2.0)),
        'tern_8': ('... at 8 x', TERN + RATE('tern', 8.0)),
        'tern_plain': ('... at 4 x, no learned factor for each output', LOW.format('tern') + RATE('tern', 4.0)),
        'tern_late': ('... full precision until 70 % of the steps', None),
        'tern_kd': ('... a teacher, from random weights', TERN4 + f" {TWIN('teacher')}"),
        'tern_kd50': ('... a teacher for half of the targets, from random weights',
                      TERN4 + f" {TWIN('teacher')} --distill=0.5"),
        'tern_init': ('... trained on from 2,500 steps of full precision at half the rate, no teacher',
                      TERN + RATE('tern', 0.5) + f" {TWIN('init_from')}"),
        'tern_taught': ('... trained on from 2,500 steps of full precision, with it as teacher', TERN4 + TAUGHT),
        'tern_taught_1': ('... the same, latent weights at the rate', TERN + TAUGHT + RATE('tern', 1.0)),
        'tern_taught_half': ('... the same, at half the rate', TERN + TAUGHT + RATE('tern', 0.5)),
        'tern_taught_2': ('... the same, all at half the rate',
                          TERN + TAUGHT + RATE('tern', 1.0) + ' --learning_rate=2e-3'),
        'tern_taught_8e3': ('... the same, at half the rate, learning rate 8e-3',
                            TERN + TAUGHT + RATE('tern', 0.5) + ' --learning_rate=8e-3'),
        'bin': ('all binary', BIN),
        'bin_8e3': ('... learning rate 8e-3', BIN + ' --learning_rate=8e-3'),
        'bin_4': ('... latent weights at 4 x the rate', BIN + RATE('bin', 4.0)),
        'bin_scales': ('... scales at the rate of all others', BIN + RATE('alpha', 1.0)),
        'bin_kd': ('... a teacher, from random weights', f"{BIN} {TWIN('teacher')}"),
        'bin_taught': ('... trained on from 2,500 steps of full precision, with it as teacher', BIN + TAUGHT),
        'bin_taught_half': ('... the same, latent weights at half the rate', BIN + TAUGHT + RATE('bin', 0.5)),
        'bin_taught_scales': ('... the same, scales at the rate of all others', BIN + TAUGHT + RATE('alpha', 1.0)),
        'bin_taught_8e3': ('... the same, learning rate 8e-3',
                           BIN + TAUGHT + RATE('alpha', 1.0) + ' --learning_rate=8e-3'),
        'half': ('blocks 1 and 2 of 0 to 3 binary', '--binary_blocks=1,2'),
        'half_first': ('... 0 and 1', '--binary_blocks=0,1'),
        'half_last': ('... 2 and 3', '--binary_blocks=2,3'),
        'half_scales': ('... 1 and 2, scales at the rate of all others',
                        '--binary_blocks=1,2' + RATE('alpha', 1.0)),
    }),
    # Random halves: random.Random(0).sample(range(6), 3), and of 1, each sorted.
    'blocks': Experiment('train_gpt.py', 'config/wikitext2_blocks.py', 'first', '1,2,3', {
        'chosen': ('the half chosen by ptq.py', chosen_blocks()),
        'first': ('the first half', '--binary_blocks=0,1,2'),
        'last': ('the last half', '--binary_blocks=3,4,5'),
        'random_a': ('a random half: 0, 3, 5', '--binary_blocks=0,3,5'),
        'random_b': ('another random half: 0, 1, 4', '--binary_blocks=0,1,4'),
        'fp': ('no block: full precision', ''),
    }),
    'depth': Experiment('train_gpt.py', 'config/pycode_bin12.py', 'fp', '1', {
        'fp': ('12 blocks, full precision', '--n_binary=0'),
        'bin12': ('12 of 12 binary', ''),
        'bin12_alpha25': ('... and every scale starting at 0.25, as the reference',
                          "--lr_scale={'bin':1.0,'alpha':1.0} --binary_alpha=0.25 --binary_alpha_out=0.25"),
        'bin12_fast': ('... latent weights and scales at the full rate', "--lr_scale={'bin':1.0,'alpha':1.0}"),
        'bin12_lr4': ('... 4 x the learning rate', '--learning_rate=1.6e-2 --min_lr=1.6e-3'),
    }),
}
AS_BEFORE = '--scale=1 --interval=50 --rotate=False'    # GaLore without its factor
# first: python data/sst2/prepare.py --held
EXPERIMENTS |= {
    'sst2': Experiment('finetune_cls.py', 'config/sst2_scratch.py', 'full', '1,2,3,4,5,6', {
        'full': ('AdamW, all weights', ''),
        'rsvd64': ('rSVD, rank 64', '--method=rsvd --rank=64'),
        'rsvd16': ('rSVD, rank 16', '--method=rsvd'),
        'rsvd4': ('rSVD, rank 4', '--method=rsvd --rank=4'),
        'rsvd4_before': ('... updates not scaled, moments not rotated, a basis every 50 steps',
                         f'--method=rsvd --rank=4 {AS_BEFORE}'),
        'rsvd6_columns': ('rSVD, rank 6, one second moment per column', '--method=rsvd --rank=6 --column_v=True'),
        'rsvd6_columns_8bit': ('... 8-bit moments', '--method=rsvd --rank=6 --column_v=True --state_dtype=8bit'),
        'rsvd_svt': ('rSVD, 90% of the energy, rank 4 to 64', '--method=rsvd_svt --energy=0.9 --rank=64'),
        'lora': ('LoRA, rank 16', '--method=lora'),
        'lora_topr': ('LoRA, rank 16, largest tenth of the gradient', '--method=lora_topr'),
        'qlora': ('QLoRA, rank 16, nf4', '--method=qlora'),
        'wr16': ('weight reduction, rank 16', '--method=weight_reduction'),
        'wr_svt16': ('... cut to 8', '--method=weight_reduction_svt'),
    }),
    # Half of the steps. The variants with None used trial versions of optim.py, the others its code with other defaults.
    'sst2_search': Experiment('finetune_cls.py', 'config/sst2_scratch.py --max_iters=480', 'full_10', '1', {
        'full_10': ('AdamW, all weights, 1e-3', ''),
        'full_5': ('... 5e-4', '--learning_rate=5e-4'),
        'full_20': ('... 2e-3', '--learning_rate=2e-3'),
        'full_10_cos': ('... 1e-3, cosine', '--schedule=cosine'),
        'full_10_wd': ('... 1e-3, weight decay 0.1', '--weight_decay=0.1'),
        'rsvd4_10': ('rSVD, rank 4, 1e-3, updates not scaled, moments not rotated, a basis every 50 steps',
                     f'--method=rsvd --rank=4 {AS_BEFORE}'),
        'rsvd4_10_s4': ('... updates x 4', '--method=rsvd --rank=4 --scale=4 --interval=50 --rotate=False'),
        'rsvd4_10_auto': ('... updates x sqrt(m / r)', '--method=rsvd --rank=4 --interval=50 --rotate=False'),
        'rsvd4_10_int10': ('... and a basis every 10 steps', '--method=rsvd --rank=4 --rotate=False'),
        'rsvd4_10_rot50': ('... every 50 steps, moments rotated, V = 0 in new directions', None),
        'rsvd4_10_rot_auto': ('... every 10 steps', None),
        'rsvd4_5_rot': ('... 5e-4', None),
        'rsvd4_20_rot': ('... 2e-3', None),
        'b99_10': ('... 1e-3, beta2 = 0.99', None),
        'fill4_10': ('rSVD, rank 4, 1e-3, scaled, rotated, every 10 steps, V = mean(V) there', '--method=rsvd --rank=4'),
        'fill4_20': ('... 2e-3', '--method=rsvd --rank=4 --learning_rate=2e-3'),
        'col4_auto': ('rSVD, rank 4, 1e-3, one second moment per column', '--method=rsvd --rank=4 --column_v=True'),
        'col6_auto': ('rSVD, rank 6, 1e-3, one second moment per column', '--method=rsvd --rank=6 --column_v=True'),
        'col6_20': ('... 2e-3', '--method=rsvd --rank=6 --column_v=True --learning_rate=2e-3'),
        'left16': ('rSVD, rank 16, 1e-3, basis on the left', '--method=rsvd --side=left'),
        'left16_before': ('... updates not scaled, moments not rotated, a basis every 50 steps',
                          f'--method=rsvd --side=left {AS_BEFORE}'),
        'left16_adam': ('rSVD, rank 16, 1e-3, basis on the left, embeddings by AdamW',
                        '--method=rsvd --side=left --adam_for=head,embeddings'),
        'sumo6_s1': ('SUMO, rank 6, 1e-3; embeddings by rSVD, rank 4', None),
        'sumo6_s3': ('... orthogonal updates x 3', None),
        'apollo4': ('APOLLO, rank 4, 1e-3, with full gradients', None),
    }),
}
CNN_LAYERS = [*(f'conv{i}' for i in range(1, 11)), 'fc1', 'fc2', 'final']
REAL = '--model_config={' + ','.join(f"'{layer}':'real'" for layer in CNN_LAYERS) + '}'
BINARY = REAL.replace('real', 'binary')
ADAMW_CNN = " --optimizer=adamw --lr_scale={'bin':1.0}"
# first: python data/images/prepare.py --dir ... --name=food10 --size=80
EXPERIMENTS |= {
    'food10': Experiment('train_cnn.py', 'config/images_mixed.py --dataset=images/food10', 'real', '1,2,3,4,5', {
        'real': ('all real', REAL),
        'mixed70': ('conv8, conv9, conv10 binary', ''),
        'bin': ('all binary', BINARY),
    }),
    # A third of the steps.
    'food10_search': Experiment('train_cnn.py', 'config/images_mixed.py --dataset=images/food10 --epochs=10', 'real_3', '1', {
        'real': ('all real, learning rate 1e-3', REAL + ' --learning_rate=1e-3'),
        'real_3': ('... 3e-3', REAL),
        'real_10': ('... 1e-2', REAL + ' --learning_rate=1e-2'),
        'real_adamw': ('... AdamW, 1e-3', REAL + ADAMW_CNN + ' --learning_rate=1e-3'),
        'real_adamw_3': ('... AdamW, 3e-3', REAL + ADAMW_CNN),
        'mixed70': ('conv8, conv9, conv10 binary, 1e-3, latent weights at 5 x the rate',
                    RATE('bin', 5.0) + ' --learning_rate=1e-3'),
        'mixed70_lr3_2': ('... 3e-3, at 2 x', ''),
        'mixed70_lr3': ('... 3e-3, at the rate', RATE('bin', 1.0)),
        'bin': ('all binary, a BatchNorm after each layer, 1e-3, latent weights at 5 x the rate',
                BINARY + RATE('bin', 5.0) + ' --learning_rate=1e-3'),
        'bin_lr3': ('... 3e-3, latent weights at the rate', BINARY + RATE('bin', 1.0)),
        'bin_lr3_2': ('... 3e-3, latent weights at 2 x', BINARY),
        'bin_lr3_5': ('... 3e-3, latent weights at 5 x', BINARY + RATE('bin', 5.0)),
        'bin_channel': ("... 3e-3, at 2 x, the layers' own normalization, over channels", BINARY + ' --norm=channel'),
        'bin_channel_adamw': ('... the same, AdamW, 1e-3, at the rate',
                              BINARY + ADAMW_CNN + ' --norm=channel --learning_rate=1e-3'),
    }),
}
# Both twins have one peak rate. The ternary one always has the second stage; LLaMA baselines have none.
TWINS = {'tern': ('ternary', ''),
         'fp_two': ('full precision, the same rates', '--quant=fp --second_lr=1.3333e-3'),
         'fp': ('full precision, without the second stage', '--quant=fp')}
# first: python data/<name>/prepare.py, tinystories with --file where there is no network
EXPERIMENTS |= {
    'arithmetic': Experiment('train_bitnet.py', 'config/arithmetic.py', 'fp_two', '1337', TWINS),
    'tictactoe': Experiment('train_bitnet.py', 'config/tictactoe.py', 'fp_two', '1337', TWINS),
    'tinystories': Experiment('train_bitnet.py', 'config/tinystories_small.py', 'fp_two', '1,2,3', TWINS),
}
BY_STEP = ('search',)                            # losses along the run, also of runs that were stopped early

# ---------------------------------------------------------------------------------------------------------------------
# runs


def train(name, variant, seed, threads):
    """Make one run, or continue it, and store it in results/<name>.jsonl."""
    script, config, _, _, variants = EXPERIMENTS[name]
    out = ROOT / 'out' / name / f'{variant}_s{seed}'
    options = variants[variant][1].replace('{seed}', str(seed))
    if unfinished := [path for path in re.findall(r'out/\S+(?=/best\.pt)', options) if not finished(ROOT / path)]:
        sys.exit(f'error: {unfinished[0]} is not finished; run that variant first')
    command = [sys.executable, script, *config.split(), *options.split(), f'--seed={seed}',
               f'--out_dir={out.relative_to(ROOT)}', '--resume=auto']
    os.makedirs(out, exist_ok=True)
    if not finished(out):
        with timed(out), open(out / 'stdout.txt', 'a') as f:
            subprocess.run(command, cwd=ROOT, stdout=f, stderr=subprocess.STDOUT, check=True,
                           env=dict(os.environ, OMP_NUM_THREADS=str(threads)))
    parts = json.loads((out / 'seconds.json').read_text())
    keep.keep_run(name, out, variant=variant, seed=seed, config=config, options=options, threads=threads,
                  seconds=None if None in parts else round(sum(parts)))     # evaluations and all
    print(f'{variant} seed {seed}: done', flush=True)


def finished(out):
    log = out / 'log.jsonl'
    lines = log.read_text().splitlines() if log.exists() else []        # no lines: it was killed before its first record
    return (out / 'results.yaml').exists() or bool(lines) and 'packed_file_bytes' in json.loads(lines[-1])


@contextlib.contextmanager
def timed(out):
    """Append the seconds of the with block to out/seconds.json, after those of earlier parts of the run. A part that was killed
    stays None."""
    path = out / 'seconds.json'
    parts = json.loads(path.read_text()) if path.exists() else [None] * (out / 'last.pt').exists()
    path.write_text(json.dumps([*parts, None]))
    start = time.monotonic()
    try:
        yield
    finally:
        path.write_text(json.dumps([*parts, time.monotonic() - start]))


def measure_steps(name, steps=160):
    """Measure memory and time of a step of each variant, one after the other on one core of an idle machine, and store them as
    lines without a seed in results/<name>.jsonl. (The runs for the accuracies shared the machine.)"""
    import yaml
    config, variants = EXPERIMENTS[name].config, EXPERIMENTS[name].variants
    for variant in runs_of(name):
        out = f'out/{name}/steps_{variant}'
        subprocess.run([sys.executable, 'finetune_cls.py', config, *variants[variant][1].split(), f'--max_iters={steps}',
                        f'--out_dir={out}', '--overwrite=True'], cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
                       env=dict(os.environ, OMP_NUM_THREADS='1'))
        found = yaml.safe_load((ROOT / out / 'results.yaml').read_text())
        row = {'variant': variant, 'steps': steps} | {k: found[k] for k in (
            'ms_per_step', 'peak_bytes', 'optimizer_bytes', 'gradient_bytes', 'basis_ranks')}
        keep.put(name, row)
        print(row, flush=True)


STORY = ['--prompt=Once upon a time', '--max_new_tokens=160', '--temperature=0.7']


def keep_texts(name):
    """Store how each variant's first seed continues the same words, as the 'text' of its line."""
    first_seeds = {r['variant']: r for r in sorted(keep.read(name), key=lambda r: -r['seed'])}
    for variant, run in first_seeds.items():
        out = f'out/{name}/{variant}_s{run["seed"]}'
        if (ROOT / out).exists():
            told = subprocess.run([sys.executable, 'sample.py', f'--ckpt={out}', *STORY], cwd=ROOT, check=True,
                                  capture_output=True).stdout.decode(errors='replace')
            keep.put(name, run | {'text': told})


def runs_of(name, given_up=False):
    """{variant: {seed: its line, with the figures of its last evaluation or of results.yaml}} of the finished runs; with
    given_up also of those that were stopped early."""
    runs = sorted((r for r in keep.read(name) if 'seed' in r), key=lambda r: r['seed'])
    whole = lambda r: given_up or 'packed_file_bytes' in r or 'results' in r
    found = {v: {r['seed']: r | r['evaluations'][-1] | pooled(r.get('results', {})) for r in runs
                 if r['variant'] == v and whole(r)} for v in EXPERIMENTS[name].variants}
    return {v: by_seed for v, by_seed in found.items() if by_seed}


def check_settings(name):
    """Exit with a message if a run was made with other values than its config file has now."""
    for r in keep.read(name):
        for path in (word for word in r.get('config', '').split() if 'settings' in r and word.endswith('.py')):
            now = {key: value for key, value in runpy.run_path(str(ROOT / path)).items() if key[0] != '_'}
            now = json.loads(json.dumps(now))                               # tuples become lists, as in the row
            for key in now.keys() - {'out_dir', *re.findall(r'--(\w+)=', f'{r["config"]} {r["options"]}')}:
                ran = r['settings'].get(key)                                # None: the option did not exist
                if (ran | now[key] if isinstance(ran, dict) else now[key]) != ran:      # a dict changes some of its keys
                    sys.exit(f'error: {name}: {r["variant"]} seed {r["seed"]} ran with {key}={ran}, but {path} has {now[key]} '
                             f'now; run it again')


def pooled(results):
    """The figures of results.yaml; if it has the sets val and held, also those of held and of the texts of both together."""
    if 'sets' not in results:
        return results
    val, held = (results['sets'][name] for name in ('val', 'held'))
    both = lambda key: (val[key] * val['n'] + held[key] * held['n']) / (val['n'] + held['n'])
    return results | {'held_accuracy': held['accuracy'], 'held_n': held['n'], 'all_accuracy': both('accuracy'),
                      'all_loss': both('eval_loss')}


# ---------------------------------------------------------------------------------------------------------------------
# tables of runs: a cell is computed from a group, i.e. the runs of a variant and their pairs with the baseline of the same seed


def spread(values, digits, unit='', alone=''):
    """'99.66 ± 0.12%', or - if one value is missing. alone: the text in place of the deviation of a single value."""
    if None in values:
        return '-'
    sd = f' ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else alone
    return f'{statistics.mean(values):.{digits}f}{sd}{unit}'


def mean(key, digits=4, scale=1, unit='', alone=''):
    return lambda g: spread([None if r[key] is None else r[key] * scale for r in g['runs']], digits, unit, alone)


def gap(key, digits=4, scale=1):
    """The mean difference to the baseline of the same seed, ± its standard error."""
    return lambda g: mean_gap([(a[key] - b[key]) * scale for a, b in g['pairs'] if a is not b], digits)


def mean_gap(gaps, digits=4):
    """'+0.0941 ± 0.0022': the mean of signed differences ± its standard error; - if there is none."""
    error = f' ± {statistics.stdev(gaps) / len(gaps) ** 0.5:.{digits}f}' if len(gaps) > 1 else ''
    return f'{statistics.mean(gaps):+.{digits}f}{error}' if gaps else '-'


def first(key, spec=','):
    return lambda g: format(g['runs'][0][key], spec)


def apart(key, spec, scale=1):
    """A figure of the step that was measured apart from the runs."""
    return lambda g: number(key, spec, scale)(g['step'])


def ms_cell(g):
    text = f'{statistics.median(r["ms"] for r in g["runs"]):.0f}'
    if g['paired_ms'] and g['pairs']:               # the load of the machine differs between pairs
        text += f' ({statistics.median(a["ms"] / b["ms"] for a, b in g["pairs"]):.2f} ×)'
    return text


LOSSES = {'val loss': mean('val_loss', alone=' ± -'),
          'bits per byte': lambda g: f'{statistics.mean(r["val_bpb"] for r in g["runs"]):.4f}',
          'gap': gap('val_loss'), 'gap per byte': gap('val_bpb', scale=math.log(2)), 'ms/step': ms_cell,
          'peak resident MiB': lambda g: f'{statistics.median(r["peak_mem_bytes"] for r in g["runs"]) / MIB:.0f}',
          'packed file bytes': first('packed_file_bytes')}
PHOTOGRAPHS = {'top-1': mean('top1', 2, 100), 'gap': gap('top1', 2, 100), 'top-5': mean('top5', 2, 100),
               'val loss': mean('val_loss'), 'binary share': first('binary_share', '.1%'),
               'packed file bytes': first('packed_file_bytes')}
SCORES = {'accuracy': mean('accuracy', 2, 100), 'held-out accuracy': mean('held_accuracy', 2, 100),
          'gap': gap('all_accuracy', 2, 100), 'loss': mean('all_loss'), 'training loss': mean('train_loss')}
ACCURACIES = {**SCORES, 'trained': first('trained_parameters'), 'optimizer bytes': apart('optimizer_bytes', ','),
              'gradients': apart('gradient_bytes', ',.0f', 1024), 'peak': apart('peak_bytes', '.1f', MIB),
              'ms': apart('ms_per_step', '.0f'),
              '×': lambda g: f'{g["step"]["ms_per_step"] / g["base_step"]["ms_per_step"]:.2f}' if g['step'] else '-'}
percent = lambda *keys: lambda g: ' '.join(mean(key, 2, 100, '%')(g) for key in keys)
minutes = lambda g: spread([None if r['seconds'] is None else r['seconds'] / 60 for r in g['runs']], 1)
ENDS = {'val loss': mean('val_loss'), 'minutes': minutes, 'packed file bytes': first('packed_file_bytes')}
SUMS = {'exact match of held-out problems': percent('exact_match'), **ENDS}
GAMES = {'legal moves in games': lambda g: spread([50 * (r['random_legal'] + r['perfect_legal']) for r in g['runs']], 2, '%'),
         '... in validation games': percent('legal_moves'),
         'all games that can happen to it: lost, ended by an illegal move': percent('lines_lost', 'lines_illegal'),
         'against random: won, drawn, lost': percent('random_wins', 'random_draws', 'random_losses'),
         'against perfect: won, drawn, lost': percent('perfect_wins', 'perfect_draws', 'perfect_losses'), **ENDS}

SUBWORDS = ('quality', 'blocks', 'tinystories')     # the others' tokens are bytes
LOSS = ('{step:,} steps, {tokens:,} tokens; mean ± sd over seeds; loss in nats per token ({token}) at the last step; the gap '
        'is paired by seed, ± its standard error; ms/step on one core, while another run used the other{pairs}.')
TASK = ('{step:,} steps, {tokens:,} tokens; at the last step, mean ± sd over n seeds; minutes of a run with its evaluations on '
        '{threads} thread{s}, for some runs beside other work.')
IMAGES = ('{step:,} steps, {samples:,} images seen; at the last step, in percent, mean ± sd over seeds; the gap in points, '
          'paired by seed, ± its standard error; share of the parameters that are binary.')
# header of the first column, caption, other columns
TABLES = dict.fromkeys(('blocks', 'depth', 'tinystories'), ('variant', LOSS, LOSSES)) | dict.fromkeys(
    ('food10', 'food10_search'), ('layers', IMAGES, PHOTOGRAPHS)) | {
    'quality': ('variant', LOSS + ' Rows that are "trained on" start from the model of the first row, which is also the '
                'teacher. With its run they cost twice the steps.', LOSSES),
    'sst2_search': ('method', '{parameters:,} parameters, {steps:,} steps; columns as in [sst2.md](sst2.md). '
                    'The rows with V = 0, beta2, SUMO and APOLLO used trial code.',
                    SCORES | {'optimizer bytes': first('optimizer_bytes')}),
    'sst2': ('method', '{parameters:,} parameters, {steps:,} steps. Accuracy in percent on {n} sentences and on {held_n:,} '
             'held-out texts, mean ± sd over seeds. The gap and the loss are over all of these texts; the gap in points, '
             'paired by seed, ± its standard error. Of a step, measured apart (`--steps`), one thread: bytes of optimizer '
             'state, KiB of gradients, MiB of all tensors alive at once, milliseconds with refreshes, × AdamW.', ACCURACIES),
    'arithmetic': ('model', TASK, SUMS),
    'tictactoe': ('model', TASK + ' Games: 200 against each, an illegal move loses.', GAMES)}


def run_table(name):
    """Markdown lines: a row for each variant, mean ± sd over seeds. The gap to the baseline is paired by seed: both runs of a
    pair saw the same batches."""
    _, config, baseline, _, variants = EXPERIMENTS[name]
    found, (column, caption, columns) = runs_of(name), TABLES[name]
    base = found.get(baseline) or sys.exit(f'error: no finished run of {baseline}; run: python results/runs.py {name}')
    steps = {r['variant']: r for r in keep.read(name) if 'seed' not in r}
    paired = EXPERIMENTS[name].script == 'train_bitnet.py'
    groups = [{'label': f'{variants[v][0]} (n={len(runs)})', 'runs': list(runs.values()), 'paired_ms': paired,
               'pairs': [(runs[s], base[s]) for s in runs if s in base],
               'step': steps.get(v, {}), 'base_step': steps.get(baseline)} for v, runs in found.items()]
    one = next(iter(base.values()))
    caption = caption.format(**one, s='s' * ((one['threads'] or 1) > 1), pairs=', × of the twin beside it' * paired,
                             token='a token of a trained BPE' if name in SUBWORDS else 'a token is a byte')
    return [f'`{config}`: {caption}', '', *table({column: '{label}'} | columns, groups)]


def by_step(rows, value, first_column, column):
    """Markdown lines of (label, {step: number}), a column for each step; cells after the end of a run stay empty."""
    cell = lambda s: lambda row: value.format(row[1][s]) if s in row[1] else ''
    steps = sorted({s for _, row in rows for s in row})
    return table({first_column: lambda row: row[0]} | {column.format(s): cell(s) for s in steps}, rows)


def write_tables(name):
    _, config, _, _, variants = EXPERIMENTS.get(name, [None] * 5)
    if name in BENCHES:
        return keep.publish(name, bench_table(name))
    check_settings(name)
    if name in BY_STEP:
        rows = [(variants[v][0], {e['step']: e['val_loss'] for e in r['evaluations'] if e['step']})
                for v, runs in runs_of(name, given_up=True).items() for r in runs.values()]
        if not rows:
            return None
        return keep.publish(name, [f'`{config}`: validation loss, nats per token, one seed.', '',
                                   *by_step(rows, '{:.4f}', 'variant', 'step {:,}')])
    lines = run_table(name)
    if name == 'arithmetic':
        rows = [(f'{variants[v][0]}, seed {seed}', {e['step']: e['exact_match'] for e in r['evaluations']})
                for v, runs in runs_of(name).items() for seed, r in runs.items()]
        lines += ['', *by_step(rows, '{:.1%}', 'exact match at step', '{:,}')]
    for v, runs in runs_of(name).items():
        if text := next(iter(runs.values())).get('text'):
            lines += ['', f'{variants[v][0]}, first seed, `{shlex.join(STORY)}`:', '']
            lines += [f'> {line}'.rstrip() for line in text.strip().split('\n')]
    if TABLES[name][2] is LOSSES:
        picture(name)
    keep.publish(name, lines)


# A row of the table in README.md: model, low-bit part, name in results/layers.jsonl; experiment, variant, column of its
# quality; bench with its training memory and time, row of the bench
SUMMARY = [
    ('GPT 0.9M, WikiText-2', 'all blocks binary', 'binary', 'quality', 'bin', 'val_loss', 'speed', 'bin'),
    ('GPT 0.9M, WikiText-2', '... trained on from fp32', 'binary', 'quality', 'bin_taught', 'val_loss', None, None),
    ('GPT 0.9M, WikiText-2', 'all blocks ternary', 'ternary', 'quality', 'tern', 'val_loss', 'speed', 'tern'),
    ('GPT 0.9M, WikiText-2', '... trained on from fp32', 'ternary', 'quality', 'tern_taught', 'val_loss', None, None),
    ('BitNet 3.7M, 3,117 TinyStories', 'all block matrices ternary', 'ternary', 'tinystories', 'tern',
     'val_loss', 'bitnet_speed', 'tern'),
    ('CNN 1.4M, 10 classes of Food-101', 'conv8 to conv10 binary', 'binary', 'food10', 'mixed70', 'top1', None, None),
    ('CNN 1.4M, 10 classes of Food-101', 'all layers binary', 'binary', 'food10', 'bin', 'top1', 'conv', 'binary'),
    ('DistilBERT shape, 1.5M, SST-2', 'none: low-rank Adam, rank 6', None, 'sst2', 'rsvd6_columns', 'all_accuracy',
     None, None)]


def write_summary():
    """Fill the table of README.md: quality, training memory, file and time of low-bit models beside their baselines."""
    bits = {r['name']: f'{r["bits"]:.2f}' for r in keep.read('layers')}
    rows, last = [], ''
    for model, part, form, name, variant, key, bench, kind in SUMMARY:
        runs, base = (runs_of(name).get(v) for v in (variant, EXPERIMENTS[name].baseline))
        if not runs or not base:
            continue
        digits, scale, unit = (4, 1, 'nats') if 'loss' in key else (2, 100, 'points')
        group = {'runs': list(runs.values()), 'pairs': [(runs[s], base[s]) for s in runs if s in base]}
        twin = {'runs': list(base.values())}
        quality = f'{mean(key, digits, scale)(group)} against {mean(key, digits, scale)(twin)} (n={len(runs)})'
        steps, memory, ms, file = {r['variant']: r for r in keep.read(name) if 'seed' not in r}, '-', '-', '-'
        for r in keep.read(bench) if bench else ():
            if (r.get('kind') or r['name'], r['dtype']) == (kind, 'float32'):
                memory, ms = f'{r["peak_ratio"]:.2f}', f'{r.get("ratio", r.get("net_ratio")):.2f}'
        if variant in steps:                        # measured apart from the runs
            step, full = steps[variant], steps[EXPERIMENTS[name].baseline]
            memory, ms = (f'{step[k] / full[k]:.2f}' for k in ('peak_bytes', 'ms_per_step'))
        if form:
            file = ' of '.join(f'{g["runs"][0]["packed_file_bytes"] / 1e6:.2f}' for g in (group, twin))
        rows.append(('' if model == last else f'[{model}](results/{name}.md)', part, bits.get(form, '32'), quality,
                     f'{gap(key, digits, scale)(group)} {unit}', memory, file, ms))
        last = model
    schemes = {r['scheme']: r for r in keep.read('ptq_schemes')}
    if {'fp', 'gptq4'} <= schemes.keys():
        fp, best = schemes['fp'], schemes['gptq4']
        rows.append(('[GPT 5.9M, WikiText-2](results/ptq_schemes.md)', 'block matrices, GPTQ', f'{best["bits"]:.2f}',
                     f'{best["loss"]:.4f} against {fp["loss"]:.4f}', f'{best["delta"]:+.4f} nats', '-',
                     f'{best["file_bytes"] / 1e6:.2f} of {fp["file_bytes"] / 1e6:.2f}', f'{best["ratio_1"]:.2f} (one token)'))
    columns = ('model and data', 'low-bit part', 'bits', 'val loss or accuracy', 'gap', 'memory, ×', 'file, MB', 'time, ×')
    keep.fill('summary', '\n'.join(table({c: lambda r, i=i: r[i] for i, c in enumerate(columns)}, rows)))


def picture(name):
    """results/<name>.png: validation loss against tokens, one line and one band over the seeds for each variant with the most
    seeds."""
    from report.plot_runs import draw_loss
    labels, whole = {}, ''
    for variant, (label, _) in EXPERIMENTS[name].variants.items():      # '...' continues the last label without it
        whole = whole if label.startswith('...') else label
        labels[variant] = label.replace('...', f'{whole},')
    found = runs_of(name)
    most = max(map(len, found.values()), default=0)
    logs = {f'{labels[v]} (n={len(runs)})': [[e for e in r['evaluations'] if e['step']] for r in runs.values()]
            for v, runs in found.items() if len(runs) == most}
    figure, _ = draw_loss(logs)
    figure.axes[0].set_ylabel(f'validation loss (nats per {"token" if name in SUBWORDS else "byte"})')
    figure.savefig(ROOT / 'results' / f'{name}.png', dpi=100)
    keep.shrink(name)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', nargs='?', choices=[*EXPERIMENTS, *BENCHES])
    parser.add_argument('--seeds', default='', help='e.g. 1,2,3')
    parser.add_argument('--only', default='', help='variants, separated by commas')
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time, each on its share of the cores')
    parser.add_argument('--table', action='store_true', help='train nothing')
    parser.add_argument('--steps', action='store_true', help='only memory and time of a step, of methods of finetune_cls.py')
    a = parser.parse_args()
    if not a.name and not a.table:
        parser.error('which one? or --table for the tables of all')
    if a.name in BENCHES and not a.table:
        rows = ROOT / 'out' / 'bench' / f'{a.name}.jsonl'
        rows.parent.mkdir(parents=True, exist_ok=True)
        rows.unlink(missing_ok=True)
        for command in BENCHES[a.name][0]:
            subprocess.run([sys.executable, 'bench.py', *command.split(), f'--json={rows}'], cwd=ROOT, check=True)
        keep.write(f'{a.name}.jsonl', rows.read_text())
    elif a.steps and not a.table:
        measure_steps(a.name)
    elif not a.table:
        variants = EXPERIMENTS[a.name].variants
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
        threads = max(1, cores // a.jobs)
        chosen = a.only.split(',') if a.only else [v for v, (_, options) in variants.items() if options is not None]
        if unknown := [v for v in chosen if variants.get(v, (0, None))[1] is None]:
            parser.error(f'{unknown[0]} is no variant that can be run')
        jobs = [(a.name, v, int(s), threads) for s in (a.seeds or EXPERIMENTS[a.name].seeds).split(',') for v in chosen]
        after = lambda job: '{seed}' in variants[job[1]][1]             # it needs another run of its seed
        for later in (False, True):
            with ThreadPoolExecutor(a.jobs) as pool:
                list(pool.map(lambda job: train(*job), [job for job in jobs if after(job) == later]))
        if a.name == 'tinystories':
            keep_texts(a.name)
    for name in [a.name] if a.name else [*EXPERIMENTS, *BENCHES]:
        write_tables(name)
    write_summary()


if __name__ == '__main__':
    main()
