"""The README is run: its commands, its Python, its tables and links are read from README.md itself.

The commands run in a copy of the source, in the README's order, made small by RULES; what they would download lies in
the copy. A command that no rule knows is a failure, so that none can be added untested.
"""
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256

import pytest
import torch
from conftest import ROOT

import layers
from train_gpt import GPT, GPTConfig

README = (ROOT / 'README.md').read_text()
FENCE = re.compile(r'^```(\w*)\n(.*?)^```$', re.M | re.S)
SPANS = re.findall(r'`([^`]+)`', FENCE.sub('', README))
COPIED = ('*.*', 'Makefile', 'config/*.py', 'data/*/*.py', 'results/**/*')     # no tokens, runs or environment

# Sizes alone: blocks, heads, kinds, schedule and all else stay those of the config file.
TINY = ('--max_iters=3 --warmup_iters=1 --n_embd=48 --block_size=32 --batch_size=8 --micro_batch_size=0 --eval_iters=1 '
        '--eval_interval=2 --save_interval=2 --log_interval=1 --device=cpu')
BENCH = ('--n_layer=1 --n_embd=32 --block_size=16 --vocab_size=64 --batch_size=2 --threads=1 --rounds=1 --steps=1 '
         '--dtypes=float32')
RULES = [   # how a command begins; the stage it runs in, or the check below; what is added to it; what it then prints
    ('python data/pycode/prepare.py', 1, '', r'wrote data/pycode'),
    ('python data/text/prepare.py', 1, '', r'wrote data/text/mine'),
    ('python data/shakespeare/prepare.py', 1, '', r'wrote data/shakespeare'),
    ('python data/c4/prepare.py', 1, '--file c4.jsonl', r'wrote data/c4'),
    ('python train_gpt.py --help', 2, '', r'--n_binary=0 .*\n.*--binary_blocks='),
    ('python train_gpt.py config/', 2, TINY, r'step 3 of 3|step 3: val loss[^$]+packed into out/'),
    ('torchrun --nproc_per_node=8 train_gpt.py config/', 2, TINY, r'2 processes[^$]+packed into out/'),
    ('python bench.py train', 2, BENCH, r'tern +float32'),
    ('python results/runs.py', 2, '--table', r'\| full precision \(n='),
    ('python plot.py loss', 3, '', r'loss\.png: loss against'),
    ('python plot.py status', 3, '', r'state +finished'),
    ('python sample.py', 3, '--max_new_tokens=9 --device=cpu', r'tokens/s on cpu'),
    ('python3 -m venv', 'setup', '', ''),
    ('pip install', 'package', '', ''),
    ('make', 'make', '', ''),
]


def commands():
    """Every command of the README once, in its order, without comments; [optional] words are left out, then taken."""
    found = [line for language, block in FENCE.findall(README) if language != 'python' for line in block.splitlines()]
    found += [span for span in SPANS if re.match(r'(python3?|torchrun|make|pip) ', span)]
    found += [f'python train_gpt.py config/{name}.py' for name in re.findall(r'\bpycode_\w+', README)]  # `also pycode_fp`
    found = [re.sub(r' +#.*', '', line) for line in found if line.strip()]
    forms = [[re.sub(r' \[.*?\]', '', line), re.sub(r'[\[\]]', '', line)] for line in found]
    return list(dict.fromkeys(itertools.chain(*forms)))


def rule(command):
    return next((r for r in RULES if command.startswith(r[0])), (None, None, '', ''))


def environment():
    """This process's, less what make and the other tests put there; nothing is downloaded from a hub."""
    kept = {k: v for k, v in os.environ.items() if not re.match('MAKE|MFLAGS|PYTHON|RANK|WORLD_SIZE|LOCAL_RANK', k)}
    return kept | {'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'}


@dataclass
class Copy:
    path: object    # folder of the copied source, in which all commands have run
    done: dict      # command -> subprocess.CompletedProcess


def run(command, path):
    """Runs a README command and what its rule adds."""
    words = shlex.split(command) + rule(command)[2].split()
    if words[0] == 'torchrun':
        words[:2] = ['python', '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    return subprocess.run([sys.executable, *words[1:]], cwd=path, env=environment(), text=True, timeout=100,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    """The Copy after all of the README's commands. Those with one rule run one after the other, as a reader would."""
    path = tmp_path_factory.mktemp('readme')
    for source in itertools.chain(*map(ROOT.glob, COPIED)):
        if source.is_file() and '__pycache__' not in source.parts:
            (path / source.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, path / source.relative_to(ROOT))
    text = ''.join(p.read_text() for p in sorted(ROOT.rglob('t*.py')) if '.venv' not in p.parts)
    (path / 'a.txt').write_text(text)
    (path / 'b.txt').write_text(README)
    (path / 'c4.jsonl').write_text(''.join(json.dumps({'text': text[i:i + 500]}) + '\n' for i in range(0, 50_000, 500)))
    with open(path / 'tokens.py', 'a') as f:        # GPT-2's vocabulary would be downloaded; bytes stand for it
        f.write('\n\ngpt2 = byte\n')
    script, play = path / 'data/shakespeare/prepare.py', (path / 'b.txt').read_bytes()
    local = f'URL, SIZE, SHA256 = {(path / "b.txt").as_uri()!r}, {len(play)}, {sha256(play).hexdigest()!r}\n'
    script.write_text(script.read_text().replace("if __name__ == '__main__'", local + "if __name__ == '__main__'"))

    done = {}
    if not list((ROOT / 'results').glob('*/*.jsonl')):
        done |= {command: None for command in commands() if command.startswith('python results/runs.py')}
    for stage in (1, 2, 3):
        lanes = [[c for c in commands() if rule(c) is r and c not in done] for r in RULES if r[1] == stage]
        with ThreadPoolExecutor(2) as pool:
            for lane, results in zip(lanes, pool.map(lambda lane: [run(c, path) for c in lane], lanes), strict=True):
                done |= zip(lane, results, strict=True)
    return Copy(path, done)


def make_n(target, cwd):
    """The lines that `make target` would run where nothing is installed."""
    if not shutil.which('make'):
        pytest.skip('make is not installed')
    done = subprocess.run(['make', '-n', target], cwd=cwd, env=environment(), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize('command', commands())
def test_command(command, copy):
    """Each command of the README runs as written, sizes aside, and does what it says; installing is what make does."""
    _, kind, added, prints = rule(command)
    assert kind, f'README.md has a command that no rule here tries: {command}'
    if kind == 'make':
        lines = [line.replace('.venv/bin/', '') for line in make_n(command.split()[1], copy.path) if '-m pip' not in line]
        by_hand = [re.sub(r' +#.*', '', line) for line in FENCE.findall(README)[1][1].splitlines()[1:]]
        wanted = {'make train': by_hand, 'make test': ['python -m ruff check .', 'python -m pytest']}[command]
        assert [line for line in lines if line.startswith('python ')] == wanted
    elif kind == 'setup':
        lines = '\n'.join(make_n('train', copy.path)).replace('"', '').replace('.venv/bin/python -m pip', 'pip')
        for part in command.split(' && '):
            words = [re.escape(w) for w in shlex.split(part)]
            assert part.startswith('. ') or re.search(' (-.* )?'.join([' '.join(words[:2]), ' '.join(words[2:])]), lines)
    elif kind == 'package':
        assert re.search(rf'^(#  +)?{re.escape(command.split()[-1])}\b', (ROOT / 'requirements.txt').read_text(), re.M)
    elif copy.done[command] is None:
        pytest.skip('results/ holds no logs yet')
    else:
        done = copy.done[command]
        assert done.returncode == 0, f'{command} {added}\n{done.stdout}'
        assert re.search(prints, done.stdout), done.stdout
        if 'runs.py' in command:
            assert (copy.path / 'README.md').read_text() == README, 'the table is not what the logs give'
        if 'train_gpt.py config/' in command:
            config = runpy.run_path(str(ROOT / re.search(r'config/\w+\.py', command)[0]))
            options = dict(re.findall(r'--(\w+)=(\S+)', f'{command} {added}'))
            used = runpy.run_path(str(copy.path / options.get('out_dir', config['out_dir']) / 'config.py'))
            same = [k for k in config if k[0] != '_' and k not in options]
            assert {'dataset', 'out_dir'} - set(options) <= set(same)
            assert {k: config[k] for k in same} == {k: used[k] for k in same}


def test_python_block():
    """The import and the Python block of the README work on a small GPT; pack() leaves its logits and takes its bits."""
    model = GPT(GPTConfig(vocab_size=64, block_size=16, n_layer=2, n_head=2, n_embd=32)).eval()
    code = next(block for language, block in FENCE.findall(README) if language == 'python')
    names, ids = {'model': model}, torch.arange(16)[None]
    exec(next(span for span in SPANS if span.startswith('from layers import')), names)
    with torch.no_grad():
        for line in code.splitlines():
            before = model(ids) if line.startswith('pack') else None
            exec(line, names)
        assert before is not None
        torch.testing.assert_close(model(ids), before, rtol=1e-5, atol=1e-5)
    assert isinstance(model.blocks[0].mlp.c_fc, names['TernaryLinear'])
    assert isinstance(model.blocks[0].attn.c_proj, names['BinaryLinear'])
    packed, fp32 = layers.model_bytes(model)
    assert packed < fp32 / 2


def test_files_table():
    """Each file of the Files table exists, each script of the top folder is in it, and so is each data set."""
    rows = re.findall(r'^\| `([^`]+)` \| (.*) \|$', README.partition('## Files')[2].partition('\n## ')[0], re.M)
    assert not [name for name, _ in rows if not list(ROOT.glob(name))]
    assert {p.name for p in ROOT.glob('*.py')} <= {name for name, _ in rows}
    described = dict(rows)['data/*/prepare.py']
    assert set(re.findall(r'`(\w+)`', described)) == {p.parent.name for p in ROOT.glob('data/*/prepare.py')}


def test_options_exist():
    """Each --option that the README names is a constant of train_gpt.py or an option of another script."""
    source = ''.join(p.read_text() for pattern in ('*.py', 'data/*/*.py', 'results/*.py') for p in ROOT.glob(pattern))
    named = set(re.findall(r'--(\w+)', ' '.join(SPANS + [block for _, block in FENCE.findall(README)]))) - {'key'}
    assert not [name for name in sorted(named) if not re.search(rf"^{name} = |'--{name}'", source, re.M)]


@pytest.mark.parametrize('link', sorted(set(re.findall(r'\]\((?!https?:)([^)#]+)', README))))
def test_link(link):
    """Each link of the README into the repository leads somewhere."""
    assert (ROOT / link).exists()
