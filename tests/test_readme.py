"""README.md and the pages of docs/ are run: their commands, Python blocks, options, links and file tree.

The commands run in a copy of the source, in the order of the pages. RULES makes them small; the copy holds local files in
place of downloads. A command without a rule fails, so that no command is added untested.
"""
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image

import layers
from conftest import ROOT, ranks, wait_all
from forked import BENCH_FORKS, SHORT_TIMES, SWEEP_FORKS
from train_gpt import GPT, GPTConfig

PAGES = {p.relative_to(ROOT).as_posix(): p.read_text(encoding='utf-8')
         for p in (ROOT / 'README.md', *sorted(ROOT.glob('docs/*.md')))}
FENCE = re.compile(r'^```(\w*)\n(.*?)^```$', re.M | re.S)
COPIED = ('*.*', 'Makefile', '[mpr]*/*.py', 'config/*.py', 'data/*/*.py', 'results/**/*', 'docs/*')        # no data, no runs
# A fork of conftest's server may have modules of this checkout; the copy imports its own.
FRESH = f"""
import sys
for name, module in list(sys.modules.items()):
    if (getattr(module, '__file__', None) or '').startswith({str(ROOT)!r} + '/') and '.venv' not in module.__file__:
        del sys.modules[name]
"""

# Sizes alone: blocks, heads, kinds and all else stay those of the config file.
TINY = ('--max_iters=3 --warmup_iters=1 --n_embd=96 --block_size=32 --batch_size=8 --micro_batch_size=0 --eval_iters=1 '
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
    ('python data/text/prepare.py', 1, '', 'wrote data/text/(mine|wikitext2)'),
    ('python data/shakespeare/prepare.py', 1, '', 'wrote data/shakespeare'),
    ('python data/arithmetic/prepare.py', 1, '--lines=2000', 'wrote data/arithmetic'),
    ('python data/tictactoe/prepare.py', 1, '--games=1000 --val_games=20', 'wrote data/tictactoe'),
    ('python data/c4/prepare.py', 1, '--file c4.jsonl', 'wrote data/c4'),
    ('python data/tinystories/prepare.py', 1, '--file stories.txt --vocab=300', 'wrote data/tinystories'),
    ('python data/fineweb95m/prepare.py', 1, '--file c4.jsonl --vocab=300', 'wrote data/fineweb95m'),
    ('python data/digits/prepare.py', 1, '', r'wrote .*digits'),
    ('python data/food101/prepare.py', 1, '--dir food-101 --size=16 --workers=1', 'wrote .*food101'),
    ('python data/imdb/prepare.py', 1, '--dir aclImdb', 'wrote .*imdb'),
    ('python data/xnli/prepare.py', 1, '--file mnli.tsv --val_file mnli.tsv --xnli_dir XNLI --languages=de', 'wrote .*xnli'),
    ('python train_gpt.py --help', 2, '', r'--n_binary=0 .*\n.*--binary_blocks='),
    ('python train_gpt.py config/', 2, TINY, r'step 3: val loss[\s\S]+packed into out/'),
    ('torchrun --nproc_per_node=8 train_gpt.py config/', 2, TINY, r'2 processes[\s\S]+packed into out/'),
    ('python train_bitnet.py config/tinystories.py --estimate', 2, '--tokens_per_s=1e5 --vocab_size=0', r'time +\d'),
    ('python train_bitnet.py config/', 2, BITNET, r'step 3: val loss[\s\S]+packed into out/'),
    ('torchrun --nproc_per_node=8 train_bitnet.py config/', 2, f'{BITNET} --dataset=arithmetic',
     r'2 processes[\s\S]+packed into out/'),
    ('python bench.py train', 2, f'{BENCH} --dtypes=float32', r'fp +float32[\s\S]+tern +float32'),
    ('python bench.py stats', 2, '--dim=256 --batch=2 --threads=1', r'half +[\s\S]+int4 +'),
    ('python bench.py compare', 2, '--dim=256 --batch=2 --threads=1', r'qlora +\d'),
    ('python bench.py fit', 2, '--seeds=1 --dim=256 --batch=64 --threads=1 --steps=100 --lr=3e-3', r'qlora +297,729'),
    ('python bench.py layers', 2, '--rounds=1 --seconds=0.01 --shapes=2x64x64 --threads=1', r'fit4 +4\.'),
    ('python data/pycls/prepare.py', 1, '', 'wrote .*pycls'),
    ('python data/sst2/prepare.py --held', 1, '--held=20 --file sst2.tsv --val_file sst2.tsv', r'held: got \d+ rows'),
    ('python data/sst2/prepare.py', 1, '--file sst2.tsv --val_file sst2.tsv', 'wrote .*sst2'),
    ('python finetune_cls.py config/', 2, CLASSIFIER, r'accuracy \d'),
    ('python data/images/prepare.py', 1, '--workers=1', 'wrote .*(mine|cifar10)'),
    ('python train_cnn.py config/', 2, CNN, r'top-1 \d[\s\S]+packed into out/'),
    ('torchrun --nproc_per_node=8 train_cnn.py config/', 2, f'{CNN} --dataset=digits', r'2 processes[\s\S]+packed into out/'),
    ('python train_cnn.py --predict', 3, '', r'(?m)^ *\d+\.\d%  \d'),
    ('python bench.py conv', 2, '--image_size=16 --batch=2 --rounds=1 --steps=1 --threads=1 --dtypes=float32',
     r'int4 +float32'),
    ('python finetune_cls.py --compare', 3, '', 'McNemar exact p'),
    ('python plot.py ranks', 4, '', r'ranks\.png'),
    ('python bench.py optim-bytes', 2, f'{SHAPE} --ranks=4', r'left'),
    ('python bench.py optim', 2, '--dim=32 --layers=1 --threads=1 --rounds=1 --steps=1 --ranks=4', r'rsvd 4'),
    ('python bench.py finetune', 2, f'{SHAPE} --rank=4 --rounds=1 --steps=1', r'projected'),
    ('python bench.py decode --models=out/pycode_bin --agree', 3, '--agree=5 --threads_of=1', r'\d of 5 prompts have the same'),
    ('python bench.py decode', 3, '--shape=1M --rounds=1 --prefill=4 --tokens=3 --torch=0 --threads_of=1 --seconds=0.1',
     r'engine int8 +1 +[\d,]+'),
    ('python bench.py bundle', 2, '', r'nanobit\.zip: \d+ files'),
    ('python plot.py bars', 3, '', r'stats\.png: actual_bytes'),
    ('python export.py --ckpt=', 3, '', r'wrote out/\w+\.gguf'),
    ('python export.py --from=', 4, '', r'wrote .*best\.pt'),
    ('python export.py --verify=', 4, '--prompts=4 --new_tokens=2', r'bit for bit[\s\S]+file -> GELU by tanh'),
    ('python ptq.py --ckpt=out/pycode_fp --schemes=gptq4 --save', 3, '--group=16 --windows=4', r'gptq4: 5\.\d+ bits'),
    ('python sample.py --ckpt=out/pycode_fp/gptq4', 4, '--max_new_tokens=9 --device=cpu', 'tokens/s on cpu'),
    ('python ptq.py prune', 3, '--windows=4 --retrain_iters=2', r'wanda +0\.50[\s\S]+prune\.png'),
    ('python ptq.py sensitivity', 3, '--group=16', r'blocks\.0 [\s\S]+sensitivity\.png'),
    ('python ptq.py choose', 3, '--group=16', r'chosen\.py; train it with: python train_gpt\.py'),
    ('python ptq.py', 3, '--group=16 --windows=4 --time_rounds=1 --schemes=nf4,fit4,gptq2,bin', r'gptq2 +3\.[\s\S]+ptq\.png'),
    ('python results/ptq.py', 2, '--table', r'\n\|---'),
    ('python results/fit4.py', 2, '--turns=1 --blocks=1024', r'FIT4 = \(-[\s\S]+blocks of 32: 4\.25 bits'),
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
    """Every command of the pages once, without comments; [optional] words are left out, then included."""
    found = []
    for text in PAGES.values():
        found += chain(*(lines_of(block) for language, block in FENCE.findall(text) if not language))
        spans = re.findall(r'`([^`]+)`', FENCE.sub('', text))
        found += [span for span in spans if re.match(r'(python3?|torchrun|make|pip) ', span)]
        found += [f'python train_gpt.py config/{name}.py' for name in re.findall(r'\bpycode_\w+', text)   # `also pycode_fp`
                  if not any(f'config/{name}.py' in command for command in found)]
    return list(dict.fromkeys(chain(*((re.sub(r' \[.*?]', '', c), re.sub(r'[][]', '', c)) for c in found))))


def rule(command):
    return next((r for r in RULES if command.startswith(r[0])), None)


@pytest.fixture(scope='module')
def copied(tmp_path_factory):
    """A copy of the source with small local files in place of downloads."""
    path = tmp_path_factory.mktemp('readme')
    for source in chain(*map(ROOT.glob, COPIED)):
        if source.is_file() and '__pycache__' not in source.parts:
            (path / source.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, path / source.relative_to(ROOT))
    text = ''.join(p.read_text(encoding='utf-8') for p in sorted(ROOT.glob('tests/*.py')))[:400_000]
    (path / 'a.txt').write_text(text, encoding='utf-8')
    (path / 'b.txt').write_text(PAGES['docs/layers.md'], encoding='utf-8')
    for name in ('train', 'valid'):
        (path / f'wiki.{name}.txt').write_text(text, encoding='utf-8')
    (path / 'c4.jsonl').write_text(''.join(json.dumps({'text': text[i:i + 500]}) + '\n' for i in range(0, 50_000, 500)))
    (path / 'stories.txt').write_text('<|endoftext|>'.join(text[i:i + 500] for i in range(0, 100_000, 500)))
    with open(path / 'readers/tokens.py', 'a') as f:        # bytes replace GPT-2's vocabulary, which would be downloaded
        f.write('\n\ngpt2 = byte\n')
    pairs = [(f'{"good" if i % 3 else "bad"} film {i}', i % 3) for i in range(80)]
    (path / 'sst2.tsv').write_text('sentence\tlabel\n' + ''.join(f'{t}\t{int(label > 0)}\n' for t, label in pairs))
    (path / 'mnli.tsv').write_text('premise\thypothesis\tlabel\n' + ''.join(f'{t}\tso it is\t{label}\n' for t, label in pairs))
    (path / 'XNLI').mkdir()
    (path / 'XNLI/dev-de.tsv').write_text(''.join(f'{t}\tso ist es\t{label}\n' for t, label in pairs))
    for i in range(40):
        review = path / f'aclImdb/{("train", "test")[i % 2]}/{("neg", "pos")[i // 2 % 2]}/{i}.txt'
        review.parent.mkdir(parents=True, exist_ok=True)
        review.write_text(f'film {i}')
    random = np.random.default_rng(0)
    for i in range(24):                             # photographs of noise, in two classes
        for photo in (f'photographs/{"ab"[i % 2]}/{i}.jpg', f'food-101/images/{"ab"[i % 2]}/{i}.jpg',
                      f'cifar10/{("train", "test")[i // 2 % 2]}/{"ab"[i % 2]}/{i}.jpg'):
            (path / photo).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (90, 100, 3), dtype=np.uint8)).save(path / photo)
    (path / 'food-101/meta').mkdir()
    for split, ids in (('train', range(16)), ('test', range(16, 24))):
        (path / f'food-101/meta/{split}.txt').write_text(''.join(f'{"ab"[i % 2]}/{i}\n' for i in ids))
    shutil.copy(path / 'photographs/a/0.jpg', path / 'photo.jpg')
    script, play = path / 'data/shakespeare/prepare.py', path / 'b.txt'             # downloads from file://
    local = repr((play.as_uri(), play.stat().st_size, sha256(play.read_bytes()).hexdigest()))
    script.write_text(script.read_text().replace('\n\nif __name', f'\nURL, SIZE, SHA256 = {local}\n\nif __name'))
    return path


@pytest.fixture(scope='module')
def ran(copied, start):
    """{command: its Result}. Commands of one rule run one after the other."""
    def run(command):
        words, world = shlex.split(command) + rule(command)[2].split(), 1
        if words[:2] == ['torchrun', '--nproc_per_node=8']:     # two ranks get what it gives them; test_train_gpt.py starts it
            words, world = words[1:], 2
        faster = {'bench.py': BENCH_FORKS, 'finetune_cls.py': SWEEP_FORKS, 'ptq.py': SHORT_TIMES}.get(words[1], '')
        patch = f'{FRESH}sys.path.insert(0, {str(copied)!r})\n{faster}'
        environments = ranks(world) if world > 1 else [{}]
        return wait_all([start(*words[1:], cwd=copied, patch=patch, **e) for e in environments])[0]

    done = {}
    for stage in (1, 2, 3, 4):
        lanes = [[c for c in commands() if rule(c) is r] for r in RULES if r[1] == stage]
        with ThreadPoolExecutor(2) as pool:
            for results in pool.map(lambda lane: {c: run(c) for c in lane}, lanes):
                done |= results
    return done


def make_n(command, cwd):
    """The commands that make would run where nothing is installed, with the reader's python."""
    if not shutil.which('make'):
        pytest.skip('make is not installed')
    outside = {k: v for k, v in os.environ.items() if not re.match('MAKE|MFLAGS|PYTHON$', k)}        # this may run under make
    done = subprocess.run([*command.split(), '-n'], cwd=cwd, env=outside, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return re.sub(r'"|\.venv/bin/| --(quiet|disable)\S*', '', done.stdout).splitlines()


TRITON = "python -c 'import triton' 2>/dev/null || python -m pip install triton || true"
NUMERICS = 'tests/test_layers.py tests/test_quant.py tests/test_optim.py tests/test_compressed.py'
MADE = {'make train': None,
        'make test': [TRITON, 'python -m ruff check .', 'python -m pytest -n auto --dist loadfile',
                      'NANOBIT_PATHS=gpu python -m pytest -n auto --dist loadfile tests/test_layers.py '
                      'tests/test_compressed.py'],
        'make faults': ['python results/faults.py'],
        'make check': [f'python -m pytest {NUMERICS}', f'NANOBIT_PATHS=gpu python -m pytest {NUMERICS}']}


@pytest.mark.parametrize('command', [c for c in commands() if not rule(c) or isinstance(rule(c)[1], int)])
def test_command_runs(command, ran, copied):
    """Each command of the pages runs as written, with smaller sizes, and prints what its rule expects."""
    if '.gguf' in command:
        pytest.importorskip('gguf', reason='make peers installs gguf')
    assert rule(command), f'no rule here tries the command: {command}'
    _, _, added, prints = rule(command)
    done = ran[command]
    assert done.code == 0, f'{command} {added}\n{done.out}{done.err}'
    assert re.search(prints, done.out + done.err), done.out + done.err
    if 'python results/' in command:
        for page, text in PAGES.items():
            assert (copied / page).read_text(encoding='utf-8') == text, f'the stored runs give another {page}'
    if ' config/' in command and '--estimate' not in command:           # the run used the whole config, sizes aside
        config = runpy.run_path(str(ROOT / re.search(r'config/\w+\.py', command)[0]))
        options = dict(re.findall(r'--(\w+)=(\S+)', f'{command} {added}'))
        used = runpy.run_path(str(copied / options.get('out_dir', config['out_dir']) / 'config.py'))
        same = {k: v for k, v in config.items() if k[0] != '_' and k not in options}
        assert same and all((used[k] | v if isinstance(v, dict) else v) == used[k] for k, v in same.items())


@pytest.mark.parametrize('command', [c for c in commands() if rule(c) and not isinstance(rule(c)[1], int)])
def test_installation_command(command, copied):
    """make runs the commands that the README gives for use without make, and pip installs what a requirements file names."""
    kind = rule(command)[1]
    if kind == 'make':
        blocks = FENCE.findall(PAGES['README.md'])
        by_hand = next(lines_of(block)[1:] for _, block in blocks if 'python3 -m venv' in block)
        wanted = MADE[command] or by_hand
        assert [line for line in make_n(command, copied) if re.match(r'(\w+=\w+ )?python (?!-m pip)', line)] == wanted
    elif kind == 'make train':
        by_make = '\n'.join(make_n(kind, copied)).replace('python -m pip', 'pip')
        assert not [part for part in command.split(' && ') if part not in by_make and part != '. .venv/bin/activate']
    else:
        listed = ''.join((ROOT / name).read_text() for name in ('requirements.txt', 'requirements-peers.txt'))
        assert re.search(rf'^(#  +)?{re.escape(command.split()[-1])}\s', listed, re.M)


@pytest.mark.parametrize('page', [page for page, text in PAGES.items() if '```python' in text])
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """The Python blocks of a page work line by line on a small GPT: pack() keeps the logits, merging leaves no LoRA layer."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=64, block_size=16, n_layer=2, n_head=2, n_embd=32)).eval()
    names, logits = {'model': model, 'ids': torch.arange(16)[None], 'convert': layers.convert}, None
    for block in (block for language, block in FENCE.findall(PAGES[page]) if language == 'python'):
        for line in block.splitlines():
            if line.startswith('norm ='):
                model(names['ids']).square().mean().backward()
            exec(line, names)
            if line.startswith('convert(model, {\'lm_head'):
                logits = model(names['ids']).detach()
                assert isinstance(model.blocks[0].mlp.c_fc, layers.TernaryLinear)
                assert isinstance(model.blocks[0].attn.c_proj, layers.BinaryLinear)
            elif line.startswith('pack(model)'):
                torch.testing.assert_close(model(names['ids']), logits, rtol=1e-5, atol=1e-5)
                packed, fp32 = layers.model_bytes(model)
                assert packed < fp32 / 2
                model = names['model'] = GPT(model.config).eval()       # the next block starts from a plain model
            elif line.startswith('only_adapters'):
                assert {n.rsplit('.', 1)[1] for n, p in model.named_parameters() if p.requires_grad} == {'lora_A', 'lora_B'}
            elif line.startswith('damage ='):
                assert len(names['damage']) == 4 and not any(isinstance(m, layers.LoRALinear) for m in model.modules())
            elif line.startswith('norm ='):
                assert names['norm'] > 0 and model.blocks[0].mlp.c_fc.weight.grad is None       # attach(): no full gradient


def test_file_tree():
    """The tree of the README names each script of the root and of the rooms once. docs/data.md names each data set."""
    tree, room, named = PAGES['README.md'].partition('\n## Files')[2].partition('```text\n')[2].partition('```')[0], '', []
    for line in tree.splitlines():
        room = line.split()[0] if re.match(r'\w+/ ', line) else room if line.startswith('  ') else ''
        first = line.split()[0]
        named += [room + first] if line.startswith('  ') else [first] if re.search(r'\.(py|c)$', first) else []
        assert (ROOT / first.partition('*')[0]).exists() or room
    named.remove('data/*/prepare.py')
    ours = {p.relative_to(ROOT).as_posix() for glob in ('*.py', '*.c', '[empr]*/*.py', 'engine/*.c') for p in ROOT.glob(glob)}
    assert sorted(named) == sorted(name for name in ours if not name.startswith('results/') and '__init__' not in name)
    sets = set(re.findall(r'^\| `python data/(\w+)/prepare', PAGES['docs/data.md'], re.M))
    assert sets == {p.parent.name for p in ROOT.glob('data/*/prepare.py')}


NO_OPTION = {'help', 'key', 'nproc_per_node', 'nnodes', 'node_rank', 'master_addr', 'master_port'}      # torchrun's


@pytest.mark.parametrize('page', PAGES)
def test_options_exist(page):
    """Each --option of a page is an option of the script that its sentence names, or else of the script of the page."""
    default = {'README': 'train_gpt', 'layers': 'bench', 'optim': 'bench', 'engine': 'sample', 'data': 'data/text/prepare'}
    default = f'{default.get(page.rpartition("/")[2][:-3], page.rpartition("/")[2][:-3])}.py'
    text = PAGES[page]
    sentences = [line for _, block in FENCE.findall(text) for line in lines_of(block)]
    prose = FENCE.sub('\n\n', text)
    sentences += re.findall(r'^\|.*', prose, re.M) + re.split(r'(?<=[.;:]) |\n\n|\n(?=-)', re.sub(r'(?m)^\|.*', '', prose))
    for sentence in sentences:
        named = [x for x in re.findall(r'[\w/]+\.py\b', sentence) if (ROOT / x).exists() and not x.startswith('config/')]
        for part in re.findall(r'`([^`]+)`', sentence) or [sentence]:
            scripts = [x for x in named if x in part][:1] or [*named, default]
            parsers = 'measure/*.py' if 'bench.py' in scripts else 'readers/documents.py' if 'data/' in scripts[0] else ''
            files = [ROOT / x for x in scripts] + (list(ROOT.glob(parsers)) if parsers else [])
            source = ''.join(p.read_text(encoding='utf-8') for p in files)
            for name in set(re.findall(r'--(\w+)', part)) - NO_OPTION:
                assert re.search(rf"^{name} = |'--{name}'", source, re.M), f'--{name} is no option of {scripts}: {sentence}'


@pytest.mark.parametrize('page,link', [(page, link) for page, text in PAGES.items()
                                       for link in sorted(set(re.findall(r'\]\((?!https?:)([^)#]+)', text)))])
def test_link_leads_to_a_file(page, link):
    assert ((ROOT / page).parent / link).exists()


@pytest.mark.parametrize('page', PAGES)
def test_page_is_short(page):
    """The README has at most 10 KB, each page of docs/ at most 6 KB."""
    assert len(PAGES[page].encode()) <= (10_240 if page == 'README.md' else 6 * 1024)
