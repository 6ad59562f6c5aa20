"""configurator.py on the command line of a small trainer: keys, types, config files, mistakes, saved configs, --help."""
import math
import os
import runpy
import subprocess
import sys

import pytest

import configurator
from conftest import ROOT

TRAINER = '''"""
Train a tiny thing.
On one machine.

Details nobody wants in --help.
"""
import os
from math import pi, inf
from string import digits
import configurator

# -----------------------------------------------------------------------------
# where things go
out_dir = 'out'  # a new folder
resume = ''
# optimizer
learning_rate = 1e-3  # peak; the '#' here is not the end
min_lr = 1e-4  # \x0c
betas = (0.9, 0.95)  # AdamW
max_iters = 5_000  # steps,
                   # not epochs
clip: float = inf
# shape
n_layer, n_head = 12, 6  # depth, width

# layers
compile = True
blocks = (
    1,  # which layers
    2,
)
names = ('q', 'k')
free = ()
grid = ((1, 2), (3, 4))
mixed = (1, 'a')
stages = ({'w': 1}, {'w': 2})
model_config = {  # per-layer choices
    'a': 'fp', 'rank': 8, 'scale': 0.5, 'tied': True, 'sub': {'x': 1}, 'list': [1, 2], 'any': None,
}
_private = 3
switch = None  # decided later
def function():
    local = 1
    return local
if True:
    inside = 1
config = configurator.override(globals())  # file.py ... --key=value, later wins
after = 1

if __name__ == '__main__':
    assert all(globals()[key] == value or value != value for key, value in config.items())
    print('CONFIG', repr(config))
'''
MODEL_CONFIG = "{'a': 'fp', 'rank': 8, 'scale': 0.5, 'tied': True, 'sub': {'x': 1}, 'list': [1, 2], 'any': None}"
KEYS = ('out_dir resume learning_rate min_lr betas max_iters clip n_layer n_head compile blocks names free grid mixed '
        'stages model_config switch').split()


@pytest.fixture
def trainer(tmp_path, monkeypatch, capsys):
    """A call run(*words) of the trainer that returns (config, the lines printed before it), or the line on stderr."""
    (tmp_path / 'train.py').write_text(TRAINER)

    def run(*words, files=None, cwd=tmp_path, rank=''):
        for name, text in (files or {}).items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.chdir(cwd)
        monkeypatch.setenv('RANK', rank)
        monkeypatch.setattr(sys, 'argv', ['train.py', *words])
        code = 0
        try:
            runpy.run_path(str(tmp_path / 'train.py'), run_name='__main__')
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        if code:
            assert (code, out) == (2, '') and (rank == '1' or err.startswith('error: ') and err.count('\n') == 1), err
            return err
        printed, _, config = out.partition('CONFIG ')
        assert err == ''
        return eval(config or 'None', {'inf': math.inf, 'nan': math.nan}), printed
    return run


@pytest.fixture
def direct(trainer):
    """As trainer, but without what is printed."""
    def run(*words, **how):
        result = trainer(*words, **how)
        return result if isinstance(result, str) else result[0]
    return run


# -----------------------------------------------------------------------------
# keys and the two ways of loading a trainer

def test_keys_are_plain_top_level_assignments(trainer):
    """Keys are the public plain names assigned above the call, in source order; imports and nested names are not."""
    config, printed = trainer()
    assert list(config) == KEYS and printed == ''
    assert config['clip'] == math.inf and config['n_head'] == 6 and config['max_iters'] == 5000


def test_import_changes_nothing(tmp_path, monkeypatch):
    """An imported trainer ignores the command line and returns its defaults."""
    (tmp_path / 'train.py').write_text(TRAINER)
    monkeypatch.setattr(sys, 'argv', ['other.py', '--learning_rate=5', '--help', 'junk'])
    namespace = runpy.run_path(str(tmp_path / 'train.py'), run_name='train')
    assert namespace['learning_rate'] == 1e-3 and list(namespace['config']) == KEYS


def test_a_bare_call_ends_the_constants(tmp_path):
    """A function named override above it does not."""
    path = tmp_path / 't.py'
    path.write_text('def f():\n    override()\na = 1\nconfigurator.override(globals())\nb = 2\n')
    assert configurator.override({'__name__': 't', '__file__': str(path), 'a': 1, 'b': 2}) == {'a': 1}


# -----------------------------------------------------------------------------
# text on the command line

@pytest.mark.parametrize('word, value', [
    ('--out_dir=123', '123'), ('--out_dir=a=b', 'a=b'), ('--out_dir=', ''), ('--out_dir= x ', ' x '),
    ('--out_dir=None', 'None'), ('--out_dir="q"', '"q"'), ('--out_dir=a.py', 'a.py'),
    ('--learning_rate=1', 1.0), ('--learning_rate=3e-4', 3e-4), ('--learning_rate=-inf', -math.inf),
    ('--max_iters=1e5', 100000), ('--max_iters=1_000', 1000), ('--max_iters=2.0', 2), ('--max_iters=-1', -1),
    ('--max_iters=9007199254740993', 2**53 + 1),
    ('--compile=false', False), ('--compile=no', False), ('--compile=OFF', False), ('--compile=0', False),
    ('--compile=True', True), ('--compile=yes', True), ('--compile=on', True), ('--compile=1', True),
    ('--betas=0.9,0.99', (0.9, 0.99)), ('--betas=[0, 1e-1,]', (0.0, 0.1)), ('--betas=inf', (math.inf,)),
    ('--blocks=3', (3,)), ('--blocks=()', ()), ('--blocks=(1e1,)', (10,)),
    ('--names=v,1', ('v', '1')), ('--names=(v, o)', ('v', 'o')), ('--names=("a,b", "c")', ('a,b', 'c')),
    ('--free=a,1,0.5', ('a', 1, 0.5)), ('--free=(1,(2,))', (1, (2,))), ('--free=[(1,),2]', ((1,), 2)),
    ('--mixed=2,b', (2, 'b')), ('--grid=((5,6),)', ((5, 6),)), ('--grid=(5,6),(7,)', ((5, 6), (7,))),
    ('--grid=((1e1,),())', ((10,), ())), ("--stages=({'v': 0.5},)", ({'v': 0.5},)),
])
def test_text_takes_the_type_of_the_default(direct, word, value):
    """Exactly, also for tuples and dicts."""
    result = direct(word)[word[2:].split('=')[0]]
    assert repr(result) == repr(value)


@pytest.mark.parametrize('word, says', [
    ('--max_iters=1.5', '--max_iters needs a whole number like 5000, not 1.5'),
    ('--max_iters=1e30', 'whole number'), ('--max_iters=inf', 'whole number'), ('--max_iters=nan', 'whole number'),
    ('--max_iters=True', "not 'True'"), ('--learning_rate=fast', "--learning_rate needs a number like 0.001, not 'fast'"),
    ('--compile=maybe', "--compile needs True or False, not 'maybe'"), ('--compile=', 'True or False'),
    ('--betas=0.9,x', "--betas[1] needs a number like 0.9, not 'x'"), ('--betas=0.9,,1', '--betas[1]'),
    ('--betas=', 'a tuple: write (0.9, 0.95)'), ('--grid=1,2', '--grid[0] needs a tuple: write (1,)'),
    ('--grid=((1,"a"),)', '--grid[0][1] needs a whole number'),
    ('--model_config=a:1', "--model_config needs a dict like {'a'"), ('--model_config={[]: 1}', 'needs a dict'),
    ("--model_config={'ranks': 1}", "--model_config['ranks'] is not a key; did you mean rank?"),
    ("--model_config={'sub': {'y': 1}}", "--model_config['sub']['y'] is not a key; its keys are ['x']"),
    ('--learning-rate=1', 'did you mean learning_rate?'), ('--zzz=1', '--zzz is not a key; --help lists them'),
    ('--pi=3', '--pi is not a key'), ('--after=1', 'is not a key'), ('--', 'is not a key'),
    ('-lr=1', "cannot read '-lr=1': options are --key=value"), ('notes.txt', 'config files end in .py'),
    ('-max_iters=3', 'did you mean --max_iters=3?'), ('out_dir=a.py', 'did you mean --out_dir=a.py?'), ('', "cannot read ''"),
    (['--compile'], 'write --compile=True'), (['--learning_rate', '3e-4'], 'write --learning_rate=3e-4'),
    (['--learning_rate', '--max_iters=3'], 'write --learning_rate=5'), (['--max_iters', 'small.py'], 'write --max_iters=5000'),
    (['--out_dir', 'my runs'], "write --out_dir='my runs'"), (['--betas'], "write --betas='(0.9, 0.95)'"),
    (['--learning_rat', '1'], 'did you mean learning_rate?'),
])
def test_command_line_mistakes(direct, word, says):
    """Each mistake is one line that says what to type."""
    words = [word] if isinstance(word, str) else word
    assert says in direct('--learning_rate=5', 'good.py', *words, files={'good.py': 'compile = False'})


def test_types_come_from_the_default(direct):
    """An earlier word does not change the type: an emptied tuple keeps it, a free one stays free."""
    assert 'whole number' in direct('--blocks=()', '--blocks=a')
    assert direct('--free=1', '--free=a')['free'] == ('a',)
    words = ["--model_config={'any': 1}", "--model_config={'any': 'x', 'list': []}", "--model_config={'rank': 2}"]
    merged = direct(*words)['model_config']
    assert (merged['any'], merged['list'], merged['rank']) == ('x', [], 2)
    assert 'whole number' in direct("--model_config={'list': []}", "--model_config={'list': ['a']}")


# -----------------------------------------------------------------------------
# config files

def test_a_home_folder_is_expanded(direct, monkeypatch):
    """A shell expands ~ only where a word begins. Elsewhere in a value it is what it is."""
    monkeypatch.setenv('HOME', '/home/me')
    assert direct('--out_dir=~/x', '--resume=a~/x')['out_dir'] == '/home/me/x'
    assert direct('--out_dir=a~/x')['out_dir'] == 'a~/x' and direct('--names=~,q')['names'] == ('~', 'q')
    assert direct('c.py', '--names=~/a,~/b', files={'c.py': "out_dir = '~/zz'"})['out_dir'] == '/home/me/zz'
    assert direct('--names=~/a,b')['names'] == ('/home/me/a', 'b')
    assert configurator.at_home(['--compare=~/a,~/b']) == ['--compare=/home/me/a,/home/me/b']
    assert configurator.at_home(['--prompt=~/x', '~/x', '--file', 'x']) == ['--prompt=~/x', '~/x', '--file', 'x']


def test_names_that_a_terminal_lacks_are_escaped(tmp_path):
    """With PYTHONIOENCODING=ascii a folder of another script is printed, in a change and in an error."""
    (tmp_path / 'train.py').write_text(TRAINER)
    for words, code in ((['--out_dir=données/語'], 0), (['--données=1'], 2)):
        done = subprocess.run([sys.executable, 'train.py', *words], cwd=tmp_path, capture_output=True,
                              env={**os.environ, 'PYTHONIOENCODING': 'ascii', 'PYTHONPATH': str(ROOT)})
        assert done.returncode == code and b'donn\\xe9es' in done.stdout + done.stderr, done.stderr


def test_a_default_of_none_is_a_switch(direct):
    """None, True and False, in files and as text; anything else is an error."""
    for words, value in (((), None), (('--switch=true',), True), (('--switch=0',), False),
                         (('--switch=on', '--switch=None'), None)):
        assert direct(*words)['switch'] is value
    for value in (False, None):
        assert direct('a.py', files={'a.py': f'switch = {value}'})['switch'] is value
    assert 'a.py line 1: switch needs True, False or None' in direct('a.py', files={'a.py': 'switch = 1'})
    assert '--switch needs True, False or None' in direct('--switch=maybe')


def test_a_file_sees_the_values_before_it(direct):
    """Those of the trainer, of other files and of the command line."""
    files = {'a.py': 'learning_rate = 0.5', 'b.py': 'min_lr = learning_rate / 10'}
    for words, value in ((['b.py'], 1e-4), (['a.py', 'b.py'], 0.05), (['b.py', 'a.py'], 1e-4),
                         (['--learning_rate=2', 'b.py'], 0.2)):
        assert direct(*words, files=files)['min_lr'] == value


def test_later_files_and_options_win(trainer):
    """Only changed keys are printed, each with its last source."""
    files = {'config/a.py': 'max_iters = 1\nn_layer = 2\nn_head = 6', 'config/b.py': 'max_iters = 3; out_dir = "out"'}
    config, printed = trainer('config/a.py', '--max_iters=2', 'config/b.py', '--clip=1', files=files)
    assert config['max_iters'] == 3 and config['n_layer'] == 2
    assert printed == ("max_iters: 5000 -> 3  (config/b.py)\nclip: float('inf') -> 1.0  (command line)\n"
                       'n_layer: 12 -> 2  (config/a.py)\n')
    assert trainer('config/a.py', 'config/b.py', '--max_iters=2', '--max_iters=4')[0]['max_iters'] == 4
    assert trainer('--max_iters=7', '--max_iters=5000') == trainer()
    config, printed = trainer('nan.py', '--clip=nan', files={'nan.py': 'clip = float("nan")'})
    assert math.isnan(config['clip']) and printed.count('->') == 1                    # nan over nan is no change


@pytest.mark.parametrize('text, key, value', [
    ('max_iters = 1e5', 'max_iters', 100000), ('betas = (1, 0.5)', 'betas', (1.0, 0.5)), ('free = ("x", 1)', 'free', ('x', 1)),
    ('blocks = tuple(range(3))', 'blocks', (0, 1, 2)),
    ('clip = 10**18', 'clip', 1e18), ('max_iters += 1', 'max_iters', 5001), ('del max_iters', 'max_iters', 5000),
    ('import math\nfrom math import pi, e as euler\nfrom string import capwords\n_h = 2\nmin_lr = pi * _h',
     'min_lr', math.pi * 2),
    ('def double(x):\n    y = 2 * x\n    return y\nn_head = double(n_head)', 'n_head', 12),
    ('import os\nout_dir = os.path.basename(__file__)', 'out_dir', 'c.py'),
])
def test_config_file_values(direct, text, key, value):
    """A file holds Python; exact numbers convert; private names, imports and functions are no keys."""
    assert repr(direct('c.py', files={'c.py': text})[key]) == repr(value)


@pytest.mark.parametrize('text, says', [
    ('out_dir = 123', "c.py line 1: out_dir needs a string: write '123', not 123"),
    ('\nblocks = [1, 2]', 'c.py line 2: blocks needs a tuple: write (1, 2), not [1, 2]'),
    ('blocks = 3', 'write (3,)'), ('blocks = (1, "a")', "blocks[1] needs a whole number like 1, not 'a'"),
    ('blocks = (True,)', 'blocks[0] needs a whole number'), ('max_iters = True', 'whole number like 5000, not True'),
    ('max_iters = "3"', 'whole number'), ('compile = 1', 'compile needs True or False, not 1'),
    ('compile = "no"', 'True or False'), ('learning_rate = True', 'a number like 0.001, not True'),
    ('learning_rate = 2**53 + 1', 'a number'), ('learning_rate = 10**400', 'a number'), ('resume = None', 'a string'),
    ('free = ({1},)', 'free[0]'),
    ('n_layer = 1\nlearnin_rate = 1\nmin_lr = learnin_rate / 10',
     'c.py line 2: learnin_rate is not a key; did you mean learning_rate?'),
    ('for i in range(2): pass', 'c.py line 1: i is not a key; --help lists them (a scratch name starts with _)'),
    ('min_lr = learnin_rate / 10', "c.py line 1: NameError: name 'learnin_rate' is not defined; did you mean"),
    ('x = 1\n\ndef f():\n    return 1 / 0\nn_head = f()', 'c.py line 4: ZeroDivisionError: division by zero'),
    ('raise ValueError("two\\nlines")', 'ValueError: two lines'), ('n_head = = 1', 'c.py line 1: invalid syntax'),
    ('\nreturn', "c.py line 2: 'return' outside function"), ('n_head = 1\0', 'null bytes'),
    ('model_config["b"] = 1', "c.py line 1: model_config['b'] is not a key"),
    ('model_config["a"] = 1', "model_config['a'] needs a string: write '1'"),
    ('model_config["any"] = {1}', "model_config['any']"), ('model_config = 1', 'needs a dict like'),
])
def test_config_file_mistakes(direct, text, says):
    """Files are strict, and each mistake names the file, the line and what to write."""
    assert says in direct('c.py', files={'c.py': text})


def test_dicts_merge(direct):
    """Into the value so far, recursively, in the order and types of the default; None takes any plain value."""
    files = {'a.py': "model_config = {'scale': 1, 'a': 'bin'}", 'b.py': "model_config['sub'] = {'x': 2}",
             'c.py': "model_config['list'].append(3)\nmodel_config['any'] = (1, None)\ndel model_config['tied']"}
    assert list(direct('b.py', 'a.py', files=files)['model_config'].items()) == [
        ('a', 'bin'), ('rank', 8), ('scale', 1.0), ('tied', True), ('sub', {'x': 2}), ('list', [1, 2]), ('any', None)]
    merged = direct('a.py', 'c.py', "--model_config={'rank': 1e1, 'sub': {}}")['model_config']
    assert merged == {'a': 'bin', 'rank': 10, 'scale': 1.0, 'tied': True, 'sub': {'x': 1}, 'list': [1, 2, 3],
                      'any': (1, None)}


@pytest.mark.parametrize('words', [['a.py', '--zzz=1'], ['--max_iters=3', 'a.py', 'b.py']])
def test_a_mistake_leaves_the_constants_as_they_were(tmp_path, capsys, words):
    """Also those before it set nothing, nor does a file that changes a dict in place."""
    (tmp_path / 'train.py').write_text(TRAINER)
    for name, last in (('a', ''), ('b', '1 / 0')):
        (tmp_path / f'{name}.py').write_text("model_config['list'][0] = 9\nmodel_config['sub']['x'] = 5\n" + last)
    namespace = runpy.run_path(str(tmp_path / 'train.py'), run_name='imported') | {'__name__': '__main__'}
    before = repr(namespace)
    with pytest.raises(SystemExit):
        configurator.override(namespace, words)
    assert repr(namespace) == before and capsys.readouterr().err.startswith(('error: --zzz', 'error: b.py line 3'))
    namespace['config'] = configurator.override(namespace, ['a.py'])
    assert namespace['model_config']['sub'] == {'x': 5}


def test_configs_are_found_from_another_directory(trainer, tmp_path):
    """In the current directory first, then beside the trainer."""
    elsewhere = tmp_path / 'elsewhere'
    files = {'config/a.py': 'n_layer = 2', 'elsewhere/local.py': 'n_head = 3'}
    config, printed = trainer('config/a.py', 'local.py', files=files | {'local.py': 'n_head = 1'})
    assert (config['n_layer'], config['n_head']) == (2, 1)
    config, printed = trainer('config/a.py', 'local.py', cwd=elsewhere)
    assert (config['n_layer'], config['n_head']) == (2, 3) and '(config/a.py)' in printed
    assert f'no config file missing.py in {elsewhere} or {tmp_path};' in trainer('missing.py', cwd=elsewhere)


def test_unreadable_config_file(direct, tmp_path):
    """A folder whose name ends in .py, or a file that is not text, is one clear line."""
    (tmp_path / 'bytes.py').write_bytes(b'n_head = 1\nout_dir = "\xff"\n')
    (tmp_path / 'folder.py').mkdir()
    assert 'bytes.py' in direct('bytes.py')
    assert 'cannot read config file folder.py: Is a directory' in direct('folder.py')


# -----------------------------------------------------------------------------
# saved configs, --help, ranks

def test_a_saved_config_is_the_same_config(trainer, tmp_path):
    """Also inf, nan, quotes, newlines, tuples, nested dicts and unicode."""
    files = {'a.py': r"""
out_dir = 'it\'s "q" \\ \u00e9\n# x'
clip, learning_rate = float('nan'), -float('inf')
betas, names, free = (), ("a'b",), (float('inf'), 'x', (), (1,))
model_config['any'] = [None, {'k': 1e400}]
"""}
    config, _ = trainer('a.py', '--min_lr=0.1', '--compile=no', files=files)
    configurator.save(config, tmp_path / 'saved.py', header='first line\n\ntrain.py a.py \udcff')
    again, _ = trainer('saved.py')
    assert repr(again) == repr(config)
    configurator.save(again, tmp_path / 'again.py', header='first line\n\ntrain.py a.py \udcff')
    saved = (tmp_path / 'saved.py').read_text()
    assert saved == (tmp_path / 'again.py').read_text()
    assert saved.startswith('# first line\n#\n# train.py a.py \\udcff\nout_dir = ')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.py', 'again.py', 'saved.py', 'train.py']


def test_failed_save_keeps_the_old_file(tmp_path):
    """A value without a literal or an OSError leaves the old file and no other."""
    path = tmp_path / 'config.py'
    configurator.save({'a': 1}, path)
    with pytest.raises(TypeError, match='set'):
        configurator.save({'a': {1, 2}}, path)
    (tmp_path / 'folder.py').mkdir()
    with pytest.raises(OSError):
        configurator.save({'a': 2}, tmp_path / 'folder.py')
    assert path.read_text() == 'a = 1\n' and sorted(os.listdir(tmp_path)) == ['config.py', 'folder.py']


def test_help_lists_keys_defaults_and_comments(trainer):
    """The docstring's first paragraph comes first; the exit status is 0."""
    assert trainer('--zzz=1', '--help') == trainer('-h') == (None, f'''Train a tiny thing.
On one machine.

usage: python train.py [file.py ...] [--key=value ...]    (later wins)

where things go
  {'--out_dir=out':<38}  a new folder
  --resume=''

optimizer
  {'--learning_rate=0.001':<38}  peak; the '#' here is not the end
  --min_lr=0.0001
  {"--betas='(0.9, 0.95)'":<38}  AdamW
  {'--max_iters=5000':<38}  steps, not epochs
  --clip=inf

shape
  {'--n_layer=12':<38}  depth, width
  {'--n_head=6':<38}  depth, width

layers
  --compile=True
  {"--blocks='(1, 2)'":<38}  which layers
  --names="('q', 'k')"
  --free='()'
  --grid='((1, 2), (3, 4))'
  --mixed="(1, 'a')"
  --stages="({{'w': 1}}, {{'w': 2}})"
  --model_config="{MODEL_CONFIG}"  per-layer choices
  {'--switch=None':<38}  decided later
''')


def test_only_process_0_prints(trainer):
    """Changes, --help and errors; the other processes exit with the same status silently."""
    for rank, change, error in (('', 'max_iters: 5000 -> 3  (command line)\n', 'error: --max_iters needs a whole number'),
                                ('0', 'max_iters: 5000 -> 3  (command line)\n', 'error: --max_iters'), ('1', '', '')):
        config, printed = trainer('--max_iters=3', rank=rank)
        assert config['max_iters'] == 3 and printed == change
        assert trainer('--max_iters=x', rank=rank)[:len(error) or None] == error
    assert trainer('--help', rank='1') == (None, '')


def test_an_error_names_its_process(monkeypatch, capsys):
    """fail() prints one line, naming the process unless it is 0, and exits with status 2."""
    for rank, rank0_only, line in (('', False, 'error: a b\n'), ('0', True, 'error: a b\n'),
                                   ('3', False, 'error (rank 3): a b\n'), ('3', True, '')):
        monkeypatch.setenv('RANK', rank)
        with pytest.raises(SystemExit) as stopped:
            configurator.fail('a\nb', rank0_only=rank0_only)
        assert stopped.value.code == 2 and capsys.readouterr().err == line
