"""All trainers alike where they must be: keys, comments, section markers, imports without effects, configs."""
import ast
import functools
import io
import re
import tokenize
from pathlib import Path

import pytest
import torch

import configurator

ROOT = Path(__file__).resolve().parent.parent
TRAINERS = sorted([*ROOT.glob('train_*.py'), *ROOT.glob('finetune_*.py')])
CONFIGS = sorted(ROOT.glob('config/*.py'))

# Same name, type and meaning in every trainer that has them.
SHARED = {
    'out_dir': str, 'seed': int, 'dataset': str, 'init_from': str, 'resume': str, 'max_iters': int,
    'eval_interval': int, 'eval_iters': int, 'log_interval': int, 'save_interval': int, 'batch_size': int,
    'micro_batch_size': int, 'block_size': int, 'learning_rate': float, 'min_lr': float, 'warmup_iters': int,
    'weight_decay': float, 'beta1': float, 'beta2': float, 'grad_clip': float, 'n_layer': int, 'n_head': int,
    'n_embd': int, 'dropout': float, 'bias': bool, 'device': str, 'dtype': str, 'compile': bool | None, 'profile': bool,
    'wandb_log': bool, 'wandb_project': str, 'wandb_run_name': str}
# A CNN has no heads, an evaluation of a whole split no eval_iters.
NOT_EVERYWHERE = {'block_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias', 'eval_iters', 'beta1', 'beta2',
                  'min_lr', 'warmup_iters', 'grad_clip'}
SWEEPS = {'ranks', 'folds'}     # the values of rank and fold that are run one after the other
SELF_EXPLAINING = {'n_layer', 'n_head', 'n_embd', 'beta1', 'beta2', 'wandb_project'}
MARKERS = ['set-up', 'data', 'model', 'optimizer', 'resume', 'loop', 'TRAINING SECTION BEGIN', 'TRAINING SECTION END',
           'end']


class Trainer:
    """keys: {name: default}; comments: {line: text}; block_end: line of the override() call; tree, source."""

    def __init__(self, path):
        self.path, self.source = path, path.read_text()
        self.tree, self.keys, self.lines = ast.parse(self.source), {}, {}
        for node in self.tree.body:
            if isinstance(node, ast.Assign):
                names = [n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)]
                if names == ['config']:
                    self.block_end = node.end_lineno
                    break
                assert len(names) == 1, f'{path.name}:{node.lineno}: one constant a line'
                if not names[0].startswith('_'):
                    self.keys[names[0]] = eval(ast.unparse(node.value), {'torch': torch})    # a default may ask for a GPU
                    self.lines[names[0]] = node.lineno
        self.comments = {t.start[0]: t.string for t in tokenize.generate_tokens(io.StringIO(self.source).readline)
                         if t.type == tokenize.COMMENT}


@pytest.fixture(scope='module', params=TRAINERS, ids=lambda p: p.name)
def trainer(request):
    return Trainer(request.param)


def test_shared_keys_have_one_name_and_type(trainer):
    """Every trainer has them, but for those that mean nothing there, with these types."""
    for key, value in trainer.keys.items():
        if key in SHARED:
            assert isinstance(value, SHARED[key]) and (type(value) is not bool or SHARED[key] in (bool, bool | None)), \
                f'{key} = {value!r} must be {SHARED[key]}'
    missing = [key for key in SHARED if key not in trainer.keys and key not in NOT_EVERYWHERE]
    assert not missing
    if trainer.path.name == 'train_gpt.py':
        assert not SHARED.keys() - trainer.keys.keys()


def test_other_keys_agree_between_trainers():
    """A name that two trainers use has the same type in both."""
    kinds = {}
    for path in TRAINERS:
        for key, value in Trainer(path).keys.items():
            kind = 'bool' if value is None else type(value).__name__           # a switch that the trainer decides itself
            kinds.setdefault(key, {}).setdefault(kind, []).append(path.name)
    assert not {key: found for key, found in kinds.items() if len(found) > 1}


def test_no_two_spellings_of_one_key():
    """Names that differ only in underscores or a plural s are one concept spelt twice."""
    spellings = {}
    for path in TRAINERS:
        for key in Trainer(path).keys.keys() - SWEEPS:
            spellings.setdefault(key.replace('_', '').rstrip('s'), set()).add(key)
    assert not [names for names in spellings.values() if len(names) > 1]


def test_every_constant_is_read_and_none_is_assigned_again(trainer):
    """After the block each constant is used, and none is assigned, not even as a local variable or loop variable
    (which would silently hide it), nor named in a global statement. Parameters and dataclass fields may share one."""
    fields = {id(n.target) for c in ast.walk(trainer.tree) if isinstance(c, ast.ClassDef) for n in c.body
              if isinstance(n, ast.AnnAssign)}
    read = set()
    for node in ast.walk(trainer.tree):
        if isinstance(node, ast.Global):
            assert not set(node.names) & trainer.keys.keys(), f'line {node.lineno}: global {node.names}'
        if isinstance(node, ast.Name) and node.lineno > trainer.block_end and node.id in trainer.keys:
            if isinstance(node.ctx, ast.Load):
                read.add(node.id)
            else:
                assert id(node) in fields, f'line {node.lineno}: {node.id} is assigned again'
    assert not trainer.keys.keys() - read


def test_every_constant_is_explained(trainer):
    """A comment on its line (or in an indented line below), but for the few whose name says it all."""
    bare = [key for key, line in trainer.lines.items() if line not in trainer.comments and key not in SELF_EXPLAINING]
    assert not bare
    below = trainer.source.split('\n')[trainer.block_end - 1]
    assert below.startswith('config = configurator.override(globals())'), below


def test_sections_are_marked_in_order(trainer):
    """The markers of the loop, each once, in one order, so that a diff of two trainers reads as a description."""
    found = []
    for text in trainer.comments.values():
        name = text.strip('# -')
        if name in MARKERS and (re.fullmatch(r'# -{3,} ?[\w-]+', text) or name.startswith('TRAINING')):
            found.append(name)
    assert found == MARKERS


def test_importing_a_trainer_does_nothing(start, tmp_path):
    """With other words on the command line: no output, no files, default constants, the random state untouched."""
    (tmp_path / 's.py').write_text(f"""
import sys, torch
torch.manual_seed(5)
before = torch.get_rng_state()
sys.dont_write_bytecode = True
sys.path.insert(0, {str(ROOT)!r})
for name in {[p.stem for p in TRAINERS]}:
    module = __import__(name)
    assert module.config['seed'] == module.seed != 5
assert torch.equal(before, torch.get_rng_state()) and not torch.distributed.is_initialized()
""")
    done = start('s.py', '--seed=5', 'nosuch.py', cwd=tmp_path).wait()
    assert (done.code, done.out, done.err) == (0, '', '') and [p.name for p in tmp_path.iterdir()] == ['s.py']


def test_a_fork_finds_packages_imported(start, tmp_path):
    """The server of conftest.py has imported what tests/preload.py names; a fork would pay seconds for it, in silence."""
    (tmp_path / 's.py').write_text('import sys; print(*sys.modules)')
    found = start('s.py', cwd=tmp_path).wait().out.split()
    assert {'torch._dynamo', 'transformers', 'sklearn.metrics', 'matplotlib.figure', 'optim'} <= set(found)
    assert not {'train_gpt', 'conftest'} & set(found)


@functools.cache
def constants(path):
    """The names and values that a script has when it calls override()."""
    tree, scope = ast.parse(path.read_text()), {'__name__': '__main__', '__file__': str(path), 'torch': torch}
    assigned = [n for n in tree.body if isinstance(n, ast.Assign)]
    tree.body = assigned[:next(i for i, n in enumerate(assigned) if 'override' in ast.dump(n))]
    exec(compile(tree, 'constants', 'exec'), scope)
    return scope


@pytest.mark.parametrize('config', CONFIGS, ids=lambda p: p.name)
def test_every_config_loads_and_says_what_it_is_for(config, monkeypatch, capsys):
    """Its header has the command to run it; it sets only keys of that script, of their types, one at least to a new value."""
    text = config.read_text()
    assert text.startswith('# '), 'begin with a comment: what it reproduces, hardware, time, command'
    named = re.search(r'\b([a-z]\w*\.py)\s+config/' + re.escape(config.name), text)
    assert named, f'the header has no command `... .py config/{config.name}`'
    monkeypatch.chdir(ROOT)
    configurator.override(dict(constants(ROOT / named[1])), [str(config)])
    said = capsys.readouterr()
    assert ' -> ' in said.out and said.err == ''
