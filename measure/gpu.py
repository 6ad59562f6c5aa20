"""bench.py gpu: numerics, steps of the models of all trainers, GPTQ, packed products, two short trainings, in one command."""
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import common
import configurator
from measure.turns import show

ROOT = Path(__file__).resolve().parents[1]
NUMERICS = ' '.join(f'tests/test_{name}.py' for name in ('layers', 'quant', 'optim', 'compressed'))
SMALL = '--n_layer=1 --n_head=2 --n_embd=64 --block_size=32'
TRAINING = '--dataset={dataset} --seed=1 --device={device} --out_dir={out}/{kind} --overwrite=True --save_interval=100000'
SHAPE = ('--n_layer=12 --n_head=12 --n_embd=768 --block_size=1024 --batch_size=32 --max_iters=200 --warmup_iters=40 '
         '--eval_iters=4')
TINY_SHAPE = f'{SMALL} --batch_size=4 --max_iters=4 --log_interval=2 --eval_iters=1'
MOST_SECONDS = 480      # of all parts together; not yet tried on a GPU
# part: (seconds it may take, command, the same with --tiny). gpu() fills in {…}; NAME=value in front sets the environment.
PARTS = {
    'numerics': (120, f'NANOBIT_DEVICE={{device}} pytest {NUMERICS}',
                 'NANOBIT_DEVICE={device} pytest tests/test_optim.py -k sketch'),
    'eager': (60, 'bench.py train --gpt2 --kinds=fp,bin,tern,int4 --dtypes=bfloat16 --batch_size=16 --rounds=3 --steps=5',
              f'bench.py train {SMALL} --kinds=fp,bin --dtypes=bfloat16 --batch_size=2 --rounds=1 --steps=1'),
    'compiled': (120, 'bench.py train --gpt2 --compile --kinds=fp,bin,tern,int4 --dtypes=bfloat16 --batch_size=32 --rounds=3 '
                 '--steps=5',
                 f'bench.py train {SMALL} --compile --kinds=fp --dtypes=bfloat16 --batch_size=2 --rounds=1 --steps=1'),
    'bitnet': (60, 'bench.py train --fineweb95m --compile --dtypes=bfloat16 --rounds=3 --steps=5',
               f'bench.py train --model=bitnet {SMALL} --kinds=tern --dtypes=bfloat16 --batch_size=2 --rounds=1 --steps=1'),
    'finetune': (60, 'bench.py finetune --batch=64 --rounds=3 --steps=5',
                 'bench.py finetune --variants=adamw --dim=64 --layers=1 --batch=2 --tokens=8 --rounds=1 --steps=1'),
    'cnn': (40, 'bench.py conv --variants=real,binary,ternary --dtypes=bfloat16 --batch=256 --rounds=3 --steps=3',
            'bench.py conv --variants=real --dtypes=bfloat16 --batch=2 --image_size=16 --rounds=1 --steps=1'),
    'packed': (20, 'bench.py layers --kinds=ternary,binary,int4,nf4 --shapes=1x4096x4096,8x4096x4096 --dtype=bfloat16 '
               '--rounds=3',
               'bench.py layers --kinds=ternary --shapes=1x64x64 --rounds=1 --seconds=0.01'),
    'packed triton': (20, 'NANOBIT_TRITON=1 bench.py layers --kinds=ternary,int4,nf4 --shapes=1x4096x4096,8x4096x4096 '
                      '--dtype=bfloat16 --rounds=3', ''),
    'int8 products': (40, 'NANOBIT_INT8=1 bench.py train --gpt2 --kinds=fp,tern --dtypes=bfloat16 --batch_size=16 --rounds=3 '
                      '--steps=5', ''),
    **{f'training {kind}': (90, *(f'train_gpt.py {TRAINING} {shape} --n_binary={n}'.replace('{kind}', kind)
                                  for shape, n in ((SHAPE, 12 * (kind == 'bin')), (TINY_SHAPE, int(kind == 'bin')))))
       for kind in ('fp', 'bin')},
    'gptq': (60, *(f'ptq.py --ckpt={{out}}/fp --schemes=gptq4 --time_rounds=0 --group={group} --device={{device}} --out={{out}}'
                   for group in (128, 64))),
}


def environment():
    """Versions of what the figures depend on, and the card."""
    found = {'part': 'environment', **common.versions(), 'device': common.device_name(torch.device('cpu'))}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found |= {'device': card.name, 'memory_bytes': card.total_memory, 'cuda': torch.version.cuda}
    return found


def run_part(name, words, seconds, rows):
    """Run one part and return its rows: those that it wrote to the file `rows`, or one that says how it ended."""
    setting, words = (words[:1], words[1:]) if '=' in words[0] else ([], words)
    command = [sys.executable, *(['-m'] if words[0] == 'pytest' else []), *words]
    rows.unlink(missing_ok=True)
    start = time.perf_counter()
    try:
        done = subprocess.run(command + [f'--json={rows}'] * (words[0] == 'bench.py'), cwd=ROOT, text=True, timeout=seconds,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env=dict(os.environ, **dict(s.split('=', 1) for s in setting)))
        said, failed = done.stdout, f'exit status {done.returncode}' if done.returncode else ''
    except subprocess.TimeoutExpired as e:
        said, failed = (e.stdout or b'').decode(errors='replace'), f'stopped after {seconds:.0f} s'
    print(f'--- {name}\n{said}', flush=True)
    about = {'part': name, 'seconds': round(time.perf_counter() - start, 1)}
    if failed:
        return [about | {'failed': f'{failed}: {(said.strip().splitlines() or ["no output"])[-1]}'}]
    if words[0] == 'pytest':
        about['tests'] = said.strip().splitlines()[-1]
    kept = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    return [about | row for row in kept] or [about]


def of_training(folder):
    """The first and last loss of a short run, and its median tokens per second."""
    records = common.read_log(str(folder))
    losses, rates = ([r[key] for r in records if key in r] for key in ('loss', 'tokens_per_s'))
    return {'first_loss': losses[0], 'last_loss': losses[-1], 'falls': losses[-1] < losses[0],
            'tokens_per_s': sorted(rates)[len(rates) // 2]}


def gpu(a):
    """Measure everything that needs a GPU, part by part, within MOST_SECONDS; a part that fails costs only its row."""
    unknown = [p for p in a.parts.split(',') if p and p not in PARTS]
    if unknown:
        configurator.fail(f'{unknown[0]!r} is no part; type --parts= with some of {",".join(PARTS)}')
    found, end = [environment()], time.monotonic() + MOST_SECONDS
    with tempfile.TemporaryDirectory() as out:
        for name in a.parts.split(',') if a.parts else PARTS:
            seconds, real, tiny = PARTS[name]
            seconds = 600 if a.tiny else min(seconds, max(1, end - time.monotonic()))      # a slow CPU proves nothing
            words = (tiny if a.tiny else real).format(device=a.device, out=out, dataset=a.dataset).split()
            if not words:
                continue
            if 'bench.py' in words:
                words.append(f'--device={a.device}')
            rows = run_part(name, words, seconds, Path(out) / 'rows.jsonl')
            if name.startswith('training') and 'failed' not in rows[0]:
                rows[0] |= of_training(Path(out) / name.split()[1])
            if name == 'gptq' and 'failed' not in rows[0]:
                rows = [rows[0] | json.loads(line) for line in open(f'{out}/ptq.jsonl')]
            found += rows
            with open(a.json or os.devnull, 'w') as f:          # whole after each part
                f.writelines(json.dumps(r) + '\n' for r in found)
    columns = {'part': '', 'kind': '', 'name': '', 'scheme': '', 'ms': '.2f', 'ratio': '.2f', 'tokens_per_s': ',.0f',
               'mfu': '.1%', 'peak_ratio': '.2f', 'saved_ratio': '.2f', 'first_loss': '.3f', 'last_loss': '.3f',
               'delta': '.4f', 'tests': '', 'failed': ''}
    show(found, [(key, key.replace('_', ' '), spec) for key, spec in columns.items()], '')
    if failed := [r['part'] for r in found if 'failed' in r]:
        configurator.fail(f'{len(failed)} parts failed: {", ".join(failed)}')
