"""The README is run: its commands, its Python, its tables and links are read from README.md itself.

The commands run in a copy of the source, in the README's order, made small by RULES; what they would download lies in
the copy. A command that no rule knows is a failure, so that none can be added untested.
"""
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image

import layers
from conftest import ROOT
from train_gpt import GPT, GPTConfig

README = (ROOT / 'README.md').read_text(encoding='utf-8')
FENCE = re.compile(r'^```(\w*)\n(.*?)^```$', re.M | re.S)
BLOCKS = FENCE.findall(README)                      # (language, text) each
SPANS = re.findall(r'`([^`]+)`', FENCE.sub('', README))
COPIED = ('*.*', 'Makefile', '[mpr]*/*.py', 'config/*.py', 'data/*/*.py', 'results/**/*')      # no tokens, runs or environment

# Sizes alone: blocks, heads, kinds and all else stay those of the config file.
TINY = ('--max_iters=3 --warmup_iters=1 --n_embd=48 --block_size=32 --batch_size=8 --micro_batch_size=0 --eval_iters=1 '
        '--eval_interval=2 --save_interval=2 --log_interval=1 --device=cpu')
BITNET = ('--n_layer=1 --n_embd=48 --n_ff=64 --block_size=32 --max_iters=3 --warmup_iters=1 --batch_size=8 --eval_iters=1 '
          '--eval_interval=3 --save_interval=3 --log_interval=1 --diag_interval=1 --vocab_size=0 --device=cpu')
BENCH = '--n_layer=1 --n_embd=32 --block_size=16 --vocab_size=64 --batch_size=2 --threads=1 --rounds=1 --steps=1'
CLASSIFIER = ('--init_from=scratch --n_layer=1 --n_head=2 --n_embd=32 --vocab_size=300 --max_len=16 --max_iters=4 --epochs=0.1 '
              '--log_interval=2 --train_samples=64 --batch_size=8 --micro_batch_size=4 --warmup_iters=1 --device=cpu')
CNN = ('--image_size=16 --channels=4,4,4,4,8 --fc=8,8 --max_iters=3 --warmup_iters=1 --batch_size=8 --micro_batch_size=0 '
       '--eval_batch_size=64 --log_interval=1 --num_workers=1 --device=cpu')
SHAPE = '--dim=24 --layers=1 --batch=2 --tokens=8 --threads=1'
RULES = [   # how a command begins; the stage it runs in, or the check it gets; what is added; what it prints, a regex
    ('python data/pycode/prepare.py', 1, '', 'wrote data/pycode'),
    ('python data/text/prepare.py', 1, '', 'wrote data/text/mine'),
    ('python data/shakespeare/prepare.py', 1, '', 'wrote data/shakespeare'),
    ('python data/arithmetic/prepare.py', 1, '--lines=2000', 'wrote data/arithmetic'),
    ('python data/tictactoe/prepare.py', 1, '--games=1000 --val_games=20', 'wrote data/tictactoe'),
    ('python data/c4/prepare.py', 1, '--file c4.jsonl', 'wrote data/c4'),
    ('python data/tinystories/prepare.py', 1, '--file stories.txt --vocab=300', 'wrote data/tinystories'),
    ('python data/fineweb95m/prepare.py', 1, '--file c4.jsonl --vocab=300', 'wrote data/fineweb95m'),
    ('python train_gpt.py --help', 2, '', r'--n_binary=0 .*\n.*--binary_blocks='),
    ('python train_gpt.py config/', 2, TINY, r'step 3: val loss[\s\S]+packed into out/'),
    ('torchrun --nproc_per_node=8 train_gpt.py config/', 2, TINY, r'2 processes[\s\S]+packed into out/'),
    ('python train_bitnet.py config/tinystories.py --estimate', 2, '--tokens_per_s=1e5 --vocab_size=0', r'time +\d'),
    ('python train_bitnet.py config/', 2, BITNET, r'step 3: val loss[\s\S]+packed into out/'),
    ('torchrun --nproc_per_node=8 train_bitnet.py config/', 2, f'{BITNET} --dataset=arithmetic',
     r'2 processes[\s\S]+packed into out/'),
    ('python bench.py train', 2, f'{BENCH} --dtypes=float32', r'fp +float32[\s\S]+tern +float32'),
    ('python bench.py stats', 2, '--batch=2 --threads=1', r'half +.* 37,826,560[\s\S]+int4 .* 11,911,168'),
    ('python bench.py compare', 2, '--batch=2 --threads=1', r'qlora +\d'),
    ('python bench.py fit', 2, '--seeds=1 --dim=256 --threads=1', r'qlora +297,729'),
    ('python bench.py layers', 2, '--rounds=1 --seconds=0.01 --shapes=2x64x64 --threads=1', r'fit4 +4\.'),
    ('python data/pycls/prepare.py', 1, '', 'wrote .*pycls'),
    ('python data/sst2/prepare.py', 1, '--file sst2.tsv --val_file sst2.tsv', 'wrote .*sst2'),
    ('python finetune_cls.py config/', 2, CLASSIFIER, r'accuracy \d'),
    ('python data/images/prepare.py', 1, '', 'wrote .*mine'),
    ('python train_cnn.py config/', 2, CNN, r'top-1 \d[\s\S]+packed into out/'),
    ('torchrun --nproc_per_node=8 train_cnn.py config/', 2, f'{CNN} --dataset=digits', r'2 processes[\s\S]+packed into out/'),
    ('python train_cnn.py --predict', 3, '', r'(?m)^ *\d+\.\d%  \d'),
    ('python bench.py conv', 2, '--image_size=16 --batch=2 --rounds=1 --steps=1 --threads=1', r'int4 +bfloat16'),
    ('python finetune_cls.py --compare', 3, '', 'McNemar exact p'),
    ('python plot.py ranks', 4, '', r'ranks\.png'),
    ('python bench.py optim-bytes', 2, f'{SHAPE} --ranks=4', r'left'),
    ('python bench.py optim', 2, '--dim=32 --layers=1 --threads=1 --rounds=1 --steps=1 --ranks=4', r'rsvd 4'),
    ('python bench.py finetune', 2, f'{SHAPE} --rank=4 --rounds=1 --steps=1', r'projected'),
    ('python bench.py bundle', 2, '', r'nanobit\.zip: \d+ files'),
    ('python plot.py bars', 3, '', r'stats\.png: actual_bytes'),
    ('python ptq.py --ckpt=out/pycode_fp --schemes=gptq4 --save', 3, '--group=16 --windows=4', r'gptq4: 5\.\d+ bits'),
    ('python sample.py --ckpt=out/pycode_fp/gptq4', 4, '--max_new_tokens=9 --device=cpu', 'tokens/s on cpu'),
    ('python ptq.py prune', 3, '--windows=4 --retrain_iters=2', r'wanda +0\.50[\s\S]+prune\.png'),
    ('python ptq.py sensitivity', 3, '--group=16', r'blocks\.0 [\s\S]+sensitivity\.png'),
    ('python ptq.py choose', 3, '--group=16', r'chosen\.py; train it with: python train_gpt\.py'),
    ('python ptq.py', 3, '--group=16 --windows=4 --time_rounds=1', r'gptq2 +3\.[\s\S]+ptq\.png'),
    ('python results/ptq.py', 2, '--table', r'\n\|---'),
    ('python results/fit4.py', 2, '--turns=1', r'FIT4 = \(-[\s\S]+blocks of 32: 4\.25 bits'),
    ('python results/runs.py', 2, '--table', r'\n\|---'),
    ('python plot.py diagnostics', 3, '', r'diagnostics\.png'),
    ('python plot.py loss', 3, '', r'loss\.png: loss against'),
    ('python plot.py status', 3, '', 'state +finished'),
    ('python sample.py chat', 3, '--device=cpu', ''),                   # at the end of its input at once
    ('python sample.py play --ckpt=out/tictactoe --against', 3, '--games=2 --device=cpu', r'^2 games against perfect'),
    ('python sample.py play', 3, '--device=cpu', 'the game ends here'),
    ('python sample.py', 3, '--max_new_tokens=9 --device=cpu', 'tokens/s on cpu'),
    ('python3 -m venv', 'make train', '', ''),
    ('pip install', 'requirements', '', ''),
    ('make ', 'make', '', ''),
]


def lines_of(block):
    return [re.sub(' +#.*', '', line) for line in block.splitlines() if line.strip()]


def commands():
    """Every command of the README once, in its order, without comments; [optional] words are left out, then taken."""
    found = list(chain(*(lines_of(block) for language, block in BLOCKS if not language)))
    found += [span for span in SPANS if re.match(r'(python3?|torchrun|make|pip) ', span)]
    found += [f'python train_gpt.py config/{name}.py' for name in re.findall(r'\bpycode_\w+', README)   # `also pycode_fp`
              if not any(f'config/{name}.py' in command for command in found)]
    return list(dict.fromkeys(chain(*((re.sub(r' \[.*?]', '', c), re.sub(r'[][]', '', c)) for c in found))))


def rule(command):
    return next((r for r in RULES if command.startswith(r[0])), None)


def call(words, cwd):
    """-> subprocess.CompletedProcess, both streams in stdout. `make test` leaves nothing of itself to what is called."""
    kept = {k: v for k, v in os.environ.items() if not re.match('MAKE|MFLAGS|PYTHON$', k)}
    return subprocess.run(words, cwd=cwd, env=kept | {'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'}, timeout=200,
                          text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run(command, cwd):
    """A README command with what its rule adds."""
    words = shlex.split(command) + rule(command)[2].split()
    if words[0] == 'torchrun':
        words[:2] = 'python -m torch.distributed.run --standalone --nproc_per_node=2'.split()
    return call([sys.executable, *words[1:]], cwd)


@pytest.fixture(scope='module')
def ran(tmp_path_factory):
    """(folder of the copy, {command: its result}). Commands of one rule run one after the other, as a reader would."""
    path = tmp_path_factory.mktemp('readme')
    for source in chain(*map(ROOT.glob, COPIED)):
        if source.is_file() and '__pycache__' not in source.parts:
            (path / source.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, path / source.relative_to(ROOT))
    text = ''.join(p.read_text(encoding='utf-8') for p in sorted(ROOT.glob('tests/*.py')))
    (path / 'a.txt').write_text(text, encoding='utf-8')
    (path / 'b.txt').write_text(README, encoding='utf-8')
    (path / 'c4.jsonl').write_text(''.join(json.dumps({'text': text[i:i + 500]}) + '\n' for i in range(0, 50_000, 500)))
    (path / 'stories.txt').write_text('<|endoftext|>'.join(text[i:i + 500] for i in range(0, 100_000, 500)))
    with open(path / 'readers/tokens.py', 'a') as f:        # GPT-2's vocabulary would be downloaded; bytes stand for it
        f.write('\n\ngpt2 = byte\n')
    (path / 'sst2.tsv').write_text('sentence\tlabel\n' + ''.join(f'{"good" if i % 3 else "bad"} film {i}\t{int(i % 3 > 0)}\n'
                                                                   for i in range(80)))
    random = np.random.default_rng(0)
    for i in range(24):                             # photographs of noise, of two classes
        (path / 'photographs' / 'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (90, 100, 3), dtype=np.uint8)).save(path / f'photographs/{"ab"[i % 2]}/{i}.jpg')
    shutil.copy(path / 'photographs/a/0.jpg', path / 'photo.jpg')
    script, play = path / 'data/shakespeare/prepare.py', path / 'b.txt'             # a download from file://
    local = repr((play.as_uri(), play.stat().st_size, sha256(play.read_bytes()).hexdigest()))
    script.write_text(script.read_text().replace('\n\nif __name', f'\nURL, SIZE, SHA256 = {local}\n\nif __name'))
    done = {}
    for stage in (1, 2, 3, 4):
        lanes = [[c for c in commands() if rule(c) is r] for r in RULES if r[1] == stage]
        with ThreadPoolExecutor(2) as pool:
            for results in pool.map(lambda lane: {c: run(c, path) for c in lane}, lanes):
                done |= results
    return path, done


def make_n(command, cwd):
    """What a make command would run where nothing is installed: its lines, with the reader's python and few options."""
    if not shutil.which('make'):
        pytest.skip('make is not installed')
    done = call([*command.split(), '-n'], cwd)
    assert done.returncode == 0, done.stdout
    return re.sub(r'"|\.venv/bin/| --(quiet|disable)\S*', '', done.stdout).splitlines()


@pytest.mark.parametrize('command', commands())
def test_command(command, ran):
    """Each command of the README runs as written, sizes aside, and does what it says; installing is what make does."""
    (path, done), known = ran, rule(command)
    assert known, f'README.md has a command that no rule here tries: {command}'
    _, kind, added, prints = known
    if kind == 'make':
        by_hand = next(lines_of(block)[1:] for _, block in BLOCKS if 'python3 -m venv' in block)
        tests = ['python -m ruff check .', 'python -m pytest -n auto --dist loadfile']
        wanted = {'make train': by_hand, 'make test': tests}[command]
        assert [line for line in make_n(command, path) if re.match('python (?!-m pip)', line)] == wanted
    elif kind == 'make train':
        by_make = '\n'.join(make_n(kind, path)).replace('python -m pip', 'pip')
        assert not [part for part in command.split(' && ') if part not in by_make and part != '. .venv/bin/activate']
    elif kind == 'requirements':
        assert re.search(rf'^(#  +)?{re.escape(command.split()[-1])}\s', (ROOT / 'requirements.txt').read_text(), re.M)
    else:
        assert done[command].returncode == 0, f'{command} {added}\n{done[command].stdout}'
        assert re.search(prints, done[command].stdout), done[command].stdout
    if 'python results/' in command:
        assert (path / 'README.md').read_text(encoding='utf-8') == README, 'its table is not what the kept runs give'
    if ' config/' in command and '--estimate' not in command:           # the run had all that the file says, but for sizes
        config = runpy.run_path(str(ROOT / re.search(r'config/\w+\.py', command)[0]))
        options = dict(re.findall(r'--(\w+)=(\S+)', f'{command} {added}'))
        used = runpy.run_path(str(path / options.get('out_dir', config['out_dir']) / 'config.py'))
        same = {k: v for k, v in config.items() if k[0] != '_' and k not in options}
        assert same and all((used[k] | v if isinstance(v, dict) else v) == used[k] for k, v in same.items())


def test_python_block():
    """The import and the Python block of the README work on a small GPT; pack() leaves its logits and takes its bits."""
    model = GPT(GPTConfig(vocab_size=64, block_size=16, n_layer=2, n_head=2, n_embd=32)).eval()
    names, ids, logits = {'model': model}, torch.arange(16)[None], []
    exec(next(span for span in SPANS if span.startswith('from layers import')), names)
    with torch.no_grad():
        for line in next(block for language, block in BLOCKS if language == 'python').splitlines():
            exec(line, names)
            logits.append(model(ids))
    convert, pack = logits
    torch.testing.assert_close(pack, convert, rtol=1e-5, atol=1e-5)
    assert isinstance(model.blocks[0].mlp.c_fc, names['TernaryLinear'])
    assert isinstance(model.blocks[0].attn.c_proj, names['BinaryLinear'])
    packed, fp32 = layers.model_bytes(model)
    assert packed < fp32 / 2


def test_adapters_block(tmp_path, monkeypatch):
    """The Python block about LoRA works line by line; only adapters train, and merging leaves no LoRA layer."""
    monkeypatch.chdir(tmp_path)
    model = GPT(GPTConfig(vocab_size=64, block_size=16, n_layer=2, n_head=2, n_embd=32)).eval()
    names = {'model': model, 'ids': torch.arange(16)[None], 'convert': layers.convert}
    block = [block for language, block in BLOCKS if language == 'python'][1]
    for line in block.splitlines():
        exec(line, names)
        if line.startswith('only_adapters'):
            assert {n.rsplit('.', 1)[1] for n, p in model.named_parameters() if p.requires_grad} == {'lora_A', 'lora_B'}
    assert len(names['damage']) == 4 and not any(isinstance(m, layers.LoRALinear) for m in model.modules())


def test_file_tree():
    """Each file of the tree exists, each script of the root and of the rooms is in it, and so is each data set."""
    tree, room, named = README.partition('\n## Files')[2].partition('```text\n')[2].partition('```')[0], '', set()
    for line in tree.splitlines():
        room = line.split()[0] if re.match(r'\w+/ ', line) else room if line.startswith('  ') else ''
        named |= {room + name if line.startswith('  ') else name for name in re.findall(r'[\w*/]+\.(?:py|c)\b', line)}
    assert not [name for name in named if not list(ROOT.glob(name))]
    ours = {p.relative_to(ROOT).as_posix() for glob in ('*.py', '*.c', '[mpr]*/*.py') for p in ROOT.glob(glob)}
    assert not {name for name in ours if not name.startswith('results/') and '__init__' not in name} - named
    sets = re.search(r'^data/.*\n(?: +`.*\n)*', tree, re.M)[0]
    assert set(re.findall(r'`(\w+)`', sets)) == {p.parent.name for p in ROOT.glob('data/*/prepare.py')}


def test_options_exist():
    """Each --option that the README names is a constant of train_gpt.py or an option of another script (or torchrun)."""
    source = ''.join(p.read_text(encoding='utf-8') for glob in ('*.py', '[mpr]*/*.py', 'data/*/*.py')
                     for p in ROOT.glob(glob))
    named = set(re.findall(r'--(\w+)', ' '.join(SPANS + [block for _, block in BLOCKS]))) - {'key'}
    named -= {'nproc_per_node', 'nnodes', 'node_rank', 'master_addr', 'master_port'}       # torchrun's
    assert not [name for name in sorted(named) if not re.search(rf"^{name} = |'--{name}'", source, re.M)]


@pytest.mark.parametrize('link', sorted(set(re.findall(r'\]\((?!https?:)([^)#]+)', README))))
def test_link(link):
    """Each link of the README into the repository leads somewhere."""
    assert (ROOT / link).exists()
