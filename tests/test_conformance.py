"""All trainers alike where they must be: keys, comments, section markers, imports without effects, configs."""
import ast
import io
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import torch

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


def test_there_is_a_trainer():
    assert ROOT / 'train_gpt.py' in TRAINERS


def test_shared_keys_have_one_name_and_type(trainer):
    """The keys of DESIGN in every trainer, with these types; what only some have, has one type where it is."""
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


def test_importing_a_trainer_does_nothing(tmp_path):
    """One process imports every trainer with other words on its command line: no output, no files, default constants,
    the random state untouched."""
    code = ('import sys, torch; torch.manual_seed(5); before = torch.get_rng_state()\n'
            f'sys.path.insert(0, {str(ROOT)!r}); sys.argv[1:] = ["--seed=5", "nosuch.py"]\n'
            f'for name in {[p.stem for p in TRAINERS]}:\n'
            '    module = __import__(name)\n'
            '    assert module.config["seed"] == module.seed != 5\n'
            'assert torch.equal(before, torch.get_rng_state()) and not torch.distributed.is_initialized()\n')
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                          env={**os.environ, 'PYTHONDONTWRITEBYTECODE': '1'})
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '') and not list(tmp_path.iterdir())


def trainer_of(config):
    """The first trainer or tool that the header of a config names in a command."""
    named = re.search(r'\b([a-z]\w*\.py)\s+config/' + re.escape(config.name), config.read_text())
    assert named, f'the header has no command `... .py config/{config.name}`'
    return ROOT / named[1]


@pytest.mark.parametrize('config', CONFIGS, ids=lambda p: p.name)
def test_every_config_loads_and_says_what_it_is_for(config, monkeypatch):
    """It begins with a comment that holds the command to run it, and sets only keys of that trainer, of their types,
    at least one of them to another value."""
    assert config.read_text().startswith('# '), 'begin with a comment: what it reproduces, hardware, time, command'
    path = trainer_of(config)
    code = ('import sys, configurator\n'
            f'source = open({str(path)!r}).read()\n'
            f'scope = {{"__name__": "__main__", "__file__": {str(path)!r}}}\n'
            'import ast\n'
            'tree = ast.parse(source)\n'
            'tree.body = [n for n in tree.body if isinstance(n, ast.Assign)]\n'
            'end = next(i for i, n in enumerate(tree.body) if "override" in ast.dump(n))\n'
            'import torch\n'
            'scope |= {"configurator": configurator, "torch": torch}\n'
            'tree.body = tree.body[:end + 1]\n'
            'exec(compile(tree, "constants", "exec"), scope)\n')
    done = subprocess.run([sys.executable, '-c', code, str(config)], cwd=ROOT, capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 0, done.stderr
    assert ' -> ' in done.stdout and done.stderr == ''
