"""All trainers alike where they must be: keys, comments, section markers, imports without effects, configs."""
import ast
import importlib
import io
import re
import tokenize

import pytest

import configurator
from conftest import ROOT

TRAINERS = sorted([*ROOT.glob('train_*.py'), *ROOT.glob('finetune_*.py')])
CONFIGS = sorted(ROOT.glob('config/*.py'))

# Same name, type and meaning in every trainer that has them.
SHARED = {
    str: 'out_dir dataset init_from resume device dtype wandb_project wandb_run_name',
    int: 'seed max_iters eval_interval eval_iters log_interval save_interval batch_size micro_batch_size block_size '
         'warmup_iters n_layer n_head n_embd',
    float: 'learning_rate min_lr weight_decay beta1 beta2 grad_clip dropout',
    bool: 'bias compile profile wandb_log'}
# A CNN has no heads, an evaluation of a whole split no eval_iters.
NOT_EVERYWHERE = {'block_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias', 'eval_iters', 'beta1', 'beta2',
                  'min_lr', 'warmup_iters', 'grad_clip'}
SWEEPS = {'ranks', 'folds'}     # the values of rank and fold that are run one after the other
SELF_EXPLAINING = {'n_layer', 'n_head', 'n_embd', 'beta1', 'beta2', 'wandb_project'}
MARKERS = ['set-up', 'data', 'model', 'optimizer', 'resume', 'loop', 'TRAINING SECTION BEGIN', 'TRAINING SECTION END', 'end']


class Trainer:
    """keys: {name: default}; lines: {name: its line}; comments: {line: text}; block_end: line of the override() call."""

    def __init__(self, path):
        self.name, self.source = path.name, path.read_text()
        self.keys, self.tree = importlib.import_module(path.stem).config, ast.parse(self.source)
        assigned = [n for n in self.tree.body if isinstance(n, ast.Assign)]
        self.block_end = next(n.end_lineno for n in assigned if 'override' in ast.dump(n))
        self.lines = {n.targets[0].id: n.lineno for n in assigned if n.lineno < self.block_end}     # one constant a line
        self.comments = {t.start[0]: t.string for t in tokenize.generate_tokens(io.StringIO(self.source).readline)
                         if t.type == tokenize.COMMENT}


@pytest.fixture(scope='module', params=TRAINERS, ids=lambda p: p.name)
def trainer(request):
    return Trainer(request.param)


def test_keys_have_one_name_and_one_type():
    """Trainers spell a key alike and give it one type; each has all shared keys, but for those that mean nothing there."""
    kinds, spellings = {key: kind for kind, keys in SHARED.items() for key in keys.split()}, {}
    shared = set(kinds)
    for trainer in map(Trainer, TRAINERS):
        assert not shared - trainer.keys.keys() - (NOT_EVERYWHERE if trainer.name != 'train_gpt.py' else set()), trainer.name
        for key, value in trainer.keys.items():
            kind = bool if value is None else type(value)       # None: a switch that the trainer decides itself
            assert kind is kinds.setdefault(key, kind), f'{trainer.name}: {key} = {value!r} must be {kinds[key]}'
            if key not in SWEEPS:
                spellings.setdefault(key.replace('_', '').rstrip('s'), set()).add(key)
    assert not [names for names in spellings.values() if len(names) > 1]


def test_every_constant_is_read_and_none_is_assigned_again(trainer):
    """After the block no variable hides a constant and no global statement names one; parameters and fields may share one."""
    fields, read = {id(n.target) for n in ast.walk(trainer.tree) if isinstance(n, ast.AnnAssign)}, set()
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
    assert not [key for key in trainer.keys.keys() - SELF_EXPLAINING if trainer.lines[key] not in trainer.comments]
    assert trainer.source.split('\n')[trainer.block_end - 1].startswith('config = configurator.override(globals())')


def test_sections_are_marked_in_order(trainer):
    """The markers of the loop, each once, in one order, so that a diff of two trainers reads as a description."""
    names = [text.strip('# -') for text in trainer.comments.values() if re.match('# (---|TRAINING)', text)]
    assert [name for name in names if name in MARKERS] == MARKERS


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


@pytest.mark.parametrize('config', CONFIGS, ids=lambda p: p.name)
def test_every_config_loads_and_says_what_it_is_for(config, monkeypatch, capsys):
    """Its header has the command to run it; it sets only keys of that script, of their types, one at least to a new value."""
    text = config.read_text()
    assert text.startswith('# '), 'begin with a comment: what it reproduces, hardware, time, command'
    script = re.search(r'\b([a-z]\w*)\.py\s+config/' + re.escape(config.name), text)
    assert script, f'the header has no command `... .py config/{config.name}`'
    monkeypatch.chdir(ROOT)
    configurator.override(vars(importlib.import_module(script[1])) | {'__name__': '__main__'}, [str(config)])
    printed = capsys.readouterr()
    assert ' -> ' in printed.out and printed.err == ''
