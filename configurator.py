"""
Override a trainer's constants with config files in Python and with --key=value.

A trainer keeps its settings as plain assignments at the top. One line ends that block:

    config = configurator.override(globals())  # file.py ... --key=value, later wins

The assignments declare everything: the name is the key, the type of the default is the type of the key, and the trailing
comment is the --help text. With argparse each key is written twice; a bare exec accepts typos and wrong types. Here both
are errors. A default of None is a switch: the script chooses its value unless you set it to True or False.

    python train_gpt.py config/small.py config/int4.py --learning_rate=3e-4 --betas=0.9,0.95
    python train_gpt.py --help

Config files are code and run with your rights. Read a file from a stranger before you run it.
"""
import ast
import copy
import difflib
import functools
import io
import itertools
import math
import os
import shlex
import sys
import tokenize
import traceback
import types

if isinstance(sys.stdout, io.TextIOWrapper):        # a name that the terminal cannot show is printed with escapes
    sys.stdout.reconfigure(errors='backslashreplace')


def fail(message, rank0_only=False):
    """Report a user's mistake in one line on stderr and exit.

    message: what is wrong; what to type. rank0_only: only rank 0 prints, for mistakes that are the same on all ranks.
    Never returns: raises SystemExit(2).
    """
    if _rank() == '0' or not rank0_only:
        label = 'error' if _rank() == '0' else f'error (rank {_rank()})'
        print(f'{label}: {" ".join(str(message).splitlines())}', file=sys.stderr, flush=True)
    raise SystemExit(2)


def at_home(words):
    """Words of a command line with ~ expanded in --key=~/path, which a shell leaves as it is."""
    return [f'{key}={_at_home(key, value)}' if value else word for word in words for key, _, value in (word.partition('='),)]


def _at_home(key, value):
    """A value with ~ expanded in each of its paths, which commas separate. Texts stay."""
    if isinstance(value, tuple):
        return tuple(_at_home(key, item) for item in value)
    if not isinstance(value, str) or '~/' not in value or key.lstrip('-') in ('prompt', 'stop'):
        return value
    return ','.join(os.path.expanduser(part) if part.startswith('~/') else part for part in value.split(','))


def override(namespace, argv=None, quiet=False):
    """Apply config files and --key=value to the constants of a trainer, from left to right.

    namespace: the trainer's globals(). argv: the arguments after the trainer's name, by default sys.argv[1:].
    Returns a dict of all keys in source order, and sets the same values in namespace. If the trainer is imported
    (its __name__ is not '__main__'), it sets nothing and returns the defaults.
    A mistake in argv or in a config file calls fail() and leaves namespace unchanged. --help raises SystemExit(0).
    quiet: do not print the changes, for a script whose result goes to stdout.
    """
    nodes, source = _find_keys(namespace)
    defaults = {key: namespace[key] for key in nodes}
    if namespace['__name__'] != '__main__':
        return defaults
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv:
        if _rank() == '0':
            print(_help(os.path.basename(namespace['__file__']), source, nodes, defaults))
        raise SystemExit(0)

    config, origin = dict(defaults), {}
    for i, word in enumerate(argv):
        bare = word.lstrip('-')
        if word.startswith('--'):
            label, changes = 'command line', _read_option(word[2:], argv[i + 1:i + 2], config, defaults)
        elif word.endswith('.py') and not word.startswith('-') and bare.split('=')[0] not in config:
            label, changes = word, _run_file(word, namespace['__file__'], config, defaults)
        else:
            hint = f'; did you mean --{bare}?' if bare.split('=')[0] in config else ''
            _fail(f'cannot read {word!r}: options are --key=value, config files end in .py{hint}')
        config.update(changes)
        origin.update(dict.fromkeys(changes, label))

    config = {key: _at_home(key, value) for key, value in config.items()}
    namespace.update(config)
    for key, value in config.items():
        if _differ(defaults[key], value) and _rank() == '0' and not quiet:
            print(f'{key}: {_literal(defaults[key])} -> {_literal(value)}  ({origin[key]})', flush=True)
    return config


def save(config, path, header=''):
    """Write a config as a config file that gives the same config when run again.

    config: the dict from override(). path: the .py file, replaced atomically. header: text for comment lines on top.
    Raises TypeError for a value other than bool, int, float, str, None and tuples, lists, dicts of these, and OSError if
    it cannot write. An old file at path then stays.
    """
    lines = [f'# {line}'.rstrip() for line in header.splitlines()]
    lines += [f'{key} = {_literal(value)}' for key, value in config.items()]
    temporary = f'{path}.tmp{os.getpid()}'
    try:
        # backslashreplace: a header may contain a command line with file names that are not valid text
        with open(temporary, 'w', encoding='utf-8', errors='backslashreplace') as f:
            f.write('\n'.join(lines) + '\n')
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _rank():
    return os.environ.get('RANK') or '0'


_fail = functools.partial(fail, rank0_only=True)  # every rank reads the same command line and the same files


# -----------------------------------------------------------------------------
# the three sources: the trainer, a config file, an option

def _find_keys(namespace):
    """Return ({key: ast statement that assigns it} in source order, source text) of the trainer."""
    with tokenize.open(namespace['__file__']) as f:
        source = f.read()
    nodes = {}
    for statement in ast.parse(source).body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        if any(isinstance(n, ast.Call) and getattr(n.func, 'attr', getattr(n.func, 'id', '')) == 'override'
               for n in ast.walk(statement)):
            break
        if isinstance(statement, (ast.Assign, ast.AnnAssign)):
            nodes |= {name: statement for name in _stored_names(statement)}
    # exact types, not isinstance: a torch.Size is a tuple and a numpy.float64 a float, but neither is a setting
    kinds = (bool, int, float, str, tuple, dict, type(None))
    return {k: n for k, n in nodes.items() if k[0] != '_' and type(namespace.get(k, ...)) in kinds}, source


def _stored_names(tree):
    """{name: line of its last assignment} for the plain names that tree assigns."""
    return {n.id: n.lineno for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _run_file(name, trainer, config, defaults):
    """Run the config file `name` on the values in config; return {key: new value} for the changed keys."""
    trainer_dir = os.path.dirname(os.path.abspath(trainer))
    path = next((p for p in (name, os.path.join(trainer_dir, name)) if os.path.exists(p)), None)
    if path is None:
        _fail(f'no config file {name} in {os.getcwd()} or {trainer_dir}; check the path')
    try:
        with open(path, 'rb') as f:
            tree = ast.parse(f.read(), name)
        code = compile(tree, name, 'exec')
    except OSError as e:
        _fail(f'cannot read config file {name}: {e.strerror}')
    except (SyntaxError, ValueError) as e:
        line = f' line {e.lineno}' if getattr(e, 'lineno', None) else ''  # an error for null bytes has no line
        _fail(f'{name}{line}: {getattr(e, "msg", e)}')
    # a deep copy: a file may set model_config['a'] = 'x' and fail later; the default must not change
    scope = copy.deepcopy(config) | {'__name__': '__config__', '__file__': os.path.abspath(path)}
    try:
        exec(code, scope)
    except Exception as e:
        line = [n for frame, n in traceback.walk_tb(e.__traceback__) if frame.f_code.co_filename == name][-1]
        hint = _nearest(e.name, config) if isinstance(e, NameError) else ''
        _fail(f'{name} line {line}: {type(e).__name__}: {e}{hint}')

    imported = {(a.asname or a.name).split('.')[0] for n in ast.walk(tree)
                if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
    lines = {n.id: n.lineno for n in ast.walk(tree) if isinstance(n, ast.Name)} | _stored_names(tree)
    changes = {}
    for key, value in scope.items():
        where = f'{name} line {lines[key]}: {key}' if key in lines else f'{name}: {key}'
        if key in config:
            if _differ(config[key], value):
                changes[key] = _convert(value, _pattern(defaults[key]), where, config[key])
        elif not (key.startswith('_') or key in imported
                  or isinstance(value, (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type))):
            _fail(f'{where} is not a key{_nearest(key, config)} (a scratch name starts with _)')
    return changes


def _read_option(option, following, config, defaults):
    """{key: value} of one option without its dashes. following: [the next argument] or [], for the hint."""
    key, equals, text = option.partition('=')
    if key not in config:
        _fail(f'--{key} is not a key{_nearest(key, config)}')
    if not equals:
        text = following[0] if following and not following[0].startswith('--') else ''
        if not text or text.endswith('.py'):
            text = 'True' if config[key] is None or isinstance(config[key], bool) else str(config[key])
        _fail(f'--{key} has no value; write {_option(key, text)}')
    return {key: _read(text, _pattern(defaults[key]), f'--{key}', config[key])}


# -----------------------------------------------------------------------------
# values: _read accepts text in many forms, _convert is strict with Python values, _literal is their inverse

class _Switch:
    """The type of a key whose default is None. Its values are True, False and None."""


def _pattern(default):
    """The argument `like` of _read and _convert for a key with this default. like=None there means any plain value."""
    return _Switch() if default is None else default


def _read(text, like, where, now=None):
    """Parse the text of a command-line value; like, where, now as in _convert."""
    kind, text = type(like), text if type(like) is str else text.strip()
    value = text
    if kind in (bool, _Switch):
        value = {**({'none': None} if kind is _Switch else {}), 'true': True, 'yes': True, 'on': True, '1': True,
                 'false': False, 'no': False, 'off': False, '0': False}.get(text.lower(), text)
    elif kind in (int, float):
        for number in (float, kind):  # float parses 1e5; int, if it can parse the text, keeps every digit
            try:
                value = number(text)
            except ValueError:
                pass
    elif kind is not str:
        inner = text[1:-1] if text[:1] + text[-1:] in ('()', '[]') else text
        item = _item(like) if kind is tuple else None
        if kind is tuple and text and type(item) not in (tuple, list) and not set(inner) & set('\'"([{'):
            parts = inner.removesuffix(',').split(',') if inner.strip() else []
            return tuple(_read(part.strip(), item, f'{where}[{i}]') for i, part in enumerate(parts))
        try:
            value = ast.literal_eval(text)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # all errors of literal_eval
            pass
        if kind is tuple and isinstance(value, list):
            value = tuple(value)
    return _convert(value, like, where, now)


def _convert(value, like, where, now=None):
    """Convert a Python value to the type of the default `like` (None: any plain value); a dict merges into `now`.

    Types come from the default, not from `now`: an earlier option may have emptied a tuple, which then has no element type.
    """
    kind = type(like)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind in (bool, str) and isinstance(value, kind):
        return kind(value)
    if kind is _Switch and (value is None or isinstance(value, bool)):
        return value
    if kind is int and number and (isinstance(value, int) or value.is_integer() and abs(value) <= 2**53):
        return int(value)
    if kind is float and number and (isinstance(value, float) or abs(value) < 1e308 and float(value) == value):
        return float(value)
    if kind in (tuple, list) and isinstance(value, kind):
        return kind(_convert(v, _item(like), f'{where}[{i}]') for i, v in enumerate(value))
    if kind is dict and isinstance(value, dict):
        for key in value:
            if key not in like:
                _fail(f'{where}[{key!r}] is not a key{_nearest(key, like, f"; its keys are {list(like)}")}')
        return {k: _convert(value[k], like[k], f'{where}[{k!r}]', now[k]) if k in value else now[k] for k in like}
    if like is None:
        try:
            _literal(value)
            return value
        except TypeError:
            pass
    needs = {
        bool: 'True or False',
        _Switch: 'True, False or None',
        int: f'a whole number like {like}',
        float: f'a number like {like}',
        type(None): 'a plain value (bool, int, float, str, tuple, list or dict)',
        str: f'a string: write {str(value)!r}',
        tuple: f'a tuple: write {tuple(value) if isinstance(value, list) else (value,) if number else like}',
    }
    _fail(f'{where} needs {needs.get(kind, f"a {kind.__name__} like {like}")}, not {value!r}')


def _item(like):
    """The `like` for the elements of a tuple or list; None if it is empty or its elements have several types."""
    kinds = {type(v) for v in like}
    if len(kinds) != 1 or kinds == {dict}:
        return None
    # the elements of ((1, 2), ()) have the type of (1, 2)
    return kinds.pop()(itertools.chain(*like)) if kinds <= {tuple, list} else like[0]


def _literal(value):
    """Python source of a plain value. Raises TypeError for any other value."""
    kind = type(value)
    if kind is float and not math.isfinite(value):
        return f"float('{value}')"
    if kind is dict:
        return '{' + ', '.join(f'{_literal(k)}: {_literal(v)}' for k, v in value.items()) + '}'
    if kind in (tuple, list):
        inner = ', '.join(map(_literal, value))
        return f'[{inner}]' if kind is list else f'({inner},)' if len(value) == 1 else f'({inner})'
    if value is None or kind in (bool, int, float, str):
        return repr(value)
    raise TypeError(f'{value!r} of type {kind.__name__} cannot be written as a plain Python value')


def _option(key, text):
    """--key=text as typed in a shell, in double quotes if text contains single quotes and needs no other escaping."""
    quoted = f'"{text}"' if "'" in text and not set(text) & set('"$`!\\') else shlex.quote(text)
    return f'--{key}={quoted}'


def _differ(a, b):
    return repr(a) != repr(b)  # unlike a != b, nan equals nan here, and 1 differs from True


def _nearest(name, names, otherwise='; --help lists them'):
    """A hint with the most similar of names, or `otherwise` if none is similar."""
    found = difflib.get_close_matches(str(name), map(str, names), n=1, cutoff=0.5)
    return f'; did you mean {found[0]}?' if found else otherwise


# -----------------------------------------------------------------------------
# --help

def _help(script, source, nodes, defaults):
    """The --help text: first paragraph of the docstring, then headings, keys, defaults and comments in source order."""
    comments, lines = {}, source.split('\n')  # splitlines() would also split at form feeds
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip('#').strip()
    out = [(ast.get_docstring(ast.parse(source)) or script).split('\n\n')[0],
           f'\nusage: python {script} [file.py ...] [--key=value ...]    (later wins)']
    shown = None
    for key, node in nodes.items():
        first = node.lineno
        while first - 1 in comments and lines[first - 2].startswith('#'):
            first -= 1
        heading = [comments[n] for n in range(first, node.lineno) if comments[n].strip('-=# ')]
        if heading and node is not shown:
            out += [''] + heading
        shown = node
        last = node.end_lineno
        while last + 1 in comments and lines[last].lstrip().startswith('#') and not lines[last].startswith('#'):
            last += 1  # an indented comment on the next line continues the trailing comment
        comment = ' '.join(comments[n] for n in range(node.lineno, last + 1) if comments.get(n))
        out.append(f'  {_option(key, str(defaults[key])):<38}  {comment}'.rstrip())
    return '\n'.join(out)
