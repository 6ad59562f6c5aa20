"""The layout: the list of files, and the rule which file may import which. A new file needs a line in ROOT_FILES or ROOMS."""
import ast
import subprocess
import sys
from pathlib import PurePosixPath

import pytest

from conftest import ROOT

TRAINERS = ('train_gpt', 'train_bitnet', 'train_cnn', 'finetune_cls')
TOOLS = ('ptq', 'sample', 'bench', 'plot')
ROOT_FILES = {'README.md', 'Makefile', 'requirements.txt', 'requirements-peers.txt', 'pyproject.toml', 'LICENSE', 'kernels.c',
              *(f'{name}.py' for name in ('configurator', 'common', 'layers', 'quant', 'optim', *TRAINERS, *TOOLS))}
ROOMS = {'readers': 'tokens documents texts images crops tasks',
         'pretrained': 'hf adapters formats calibrate replace subjects',
         'report': 'scores tables costs figure plot_cls plot_ptq plot_runs pictures',
         'measure': 'turns forms matrices steps optimizers convolutions'}
FOLDERS = {*ROOMS, 'config', 'data', 'docs', 'tests', 'results'}

# From the ground up. A module imports only lower floors; in rooms, data/, results/ and among the tools also its neighbours.
FLOORS = (('quant', 'configurator', 'optim'), ('layers',), ('common',), ('readers',), ('pretrained', 'report', 'data'),
          TRAINERS, ('measure',), ('tools', 'results'), ('tests',))
NEIGHBOURS = {*ROOMS, 'data', 'tools', 'results', 'tests'}
# Stricter than the floors: the only modules that a module may import, and the only users of a room or a trainer.
IMPORTS_ONLY = {'layers': {'quant'}}
IMPORTED_ONLY_BY = {'measure': {'measure', 'bench', 'ptq', 'results', 'tests'},
                    **{trainer: {'sample', 'measure', 'results', 'tests'} for trainer in TRAINERS}}


def tracked():
    """Paths of the repository's files: from git, or from the folders if there is no git."""
    git = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True)
    paths = git.stdout.split('\n') if git.returncode == 0 else [
        p.relative_to(ROOT).as_posix() for where in (ROOT, *map(ROOT.joinpath, FOLDERS))
        for p in (where.glob('*') if where == ROOT else where.rglob('*.py')) if p.is_file()]
    return [PurePosixPath(p) for p in paths if p and (ROOT / p).is_file()]


MODULES = {'.'.join(p.with_suffix('').parts).removesuffix('.__init__'): p for p in tracked() if p.suffix == '.py'}


def group(module):
    """readers.tokens -> readers, bench -> tools, layers -> layers."""
    top = module.split('.')[0]
    return 'tools' if top in TOOLS else top


def imports(module):
    """Yields (line, module) for each import of a module of the repository, wherever it is in the file."""
    path = MODULES[module]
    beside = '.'.join(path.parts[:-1])              # a script also finds the files of its own folder
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            names = [(alias.name,) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            where = '.'.join([*path.parts[:-node.level], *filter(None, [node.module])]) if node.level else node.module
            names = [(f'{where}.{alias.name}', where) for alias in node.names]
        else:
            continue
        for choices in names:
            known = [m for name in choices for m in (name, f'{beside}.{name}') if m in MODULES]
            if known:
                yield node.lineno, known[0]


ARROWS = {module: list(imports(module)) for module in MODULES if group(module) != 'config'}


def names_in(tree):
    """Names that a module defines or imports, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).split('.')[0] for alias in node.names)


def floor(module):
    return next((i for i, floor in enumerate(FLOORS) if group(module) in floor), None)


def test_the_root_and_each_room_hold_the_files_of_the_layout():
    """The root and the rooms hold exactly the files listed here. Each __init__.py holds one sentence about its room."""
    paths = [p for p in tracked() if not p.parts[0].startswith('.')]
    found = {p.name for p in paths if len(p.parts) == 1}
    assert found == ROOT_FILES, f'files of the root that ROOT_FILES lacks, or the other way round: {sorted(found ^ ROOT_FILES)}'
    assert {p.parts[0] for p in paths if len(p.parts) > 1} == FOLDERS
    for room, names in ROOMS.items():
        found, wanted = {'/'.join(p.parts[1:]) for p in paths if p.parts[0] == room}, {'__init__.py'}
        wanted |= {f'{name}.py' for name in names.split()}
        assert found == wanted, f'files of {room}/ that ROOMS lacks, or the other way round: {sorted(found ^ wanted)}'
        tree = ast.parse((ROOT / room / '__init__.py').read_text(encoding='utf-8'))
        assert len(tree.body) == 1 and ast.get_docstring(tree).count('.') == 1, f'{room}/__init__.py is not one sentence'


@pytest.mark.parametrize('module', ARROWS)
def test_imports_go_down(module):
    """tools -> measure -> trainers -> pretrained, report -> readers -> common -> layers -> quant."""
    path, own = MODULES[module], floor(module)
    assert own is not None, f'{path} is on no floor; name its group in FLOORS'
    for line, other in ARROWS[module]:
        arrow = f'{path}:{line} imports {other}'
        if group(other) == group(module):
            assert group(module) in NEIGHBOURS, f'{arrow}, itself'
        else:
            assert floor(other) is not None and floor(other) < own, (
                f'{arrow}, which is not on a lower floor ({group(module)} -> {group(other)}); '
                'move what it needs down, or let the caller hand it in')
        assert group(other) in IMPORTS_ONLY.get(module, {group(other)}), (
            f'{arrow}, but {module} may import only {", ".join(IMPORTS_ONLY[module])}')
        users = IMPORTED_ONLY_BY.get(group(other))
        assert not users or {module, group(module)} & users, (
            f'{arrow}, which only {", ".join(sorted(users))} may import; '
            + ('take the model from sample.MODELS' if other in TRAINERS else 'move what it needs to a lower floor'))


def test_no_import_leads_back():
    """No module imports itself through other modules; imports inside functions count too."""
    done = set()

    def visit(module, path):
        assert module not in path, f'{" -> ".join([*path[path.index(module):], module])} is a circle; move the common part down'
        if module not in done:
            for _, other in ARROWS.get(module, ()):
                visit(other, [*path, module])
            done.add(module)
    for module in ARROWS:
        visit(module, [])


def test_optim_works_alone(tmp_path):
    """optim.py works in a folder of its own; test_convert.py says the same of layers.py, quant.py and kernels.c."""
    (tmp_path / 'optim.py').write_bytes((ROOT / 'optim.py').read_bytes())
    work = 'import optim, torch; optim.RSVDAdam(torch.nn.Linear(8, 8).parameters(), rank=2)'
    done = subprocess.run([sys.executable, '-E', '-c', work], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_names_of_other_modules_exist():
    """Each `module.name` in the source exists in that module, also in branches that no test runs."""
    trees = {m: ast.parse((ROOT / path).read_text(encoding='utf-8')) for m, path in MODULES.items() if group(m) != 'config'}
    defined, missing = {m: set(names_in(tree)) for m, tree in trees.items()}, []
    for module, tree in trees.items():
        known = {}                                  # name in this file: module of ours
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                known |= {a.asname or a.name: a.name for a in node.names if a.name in trees}
            elif isinstance(node, ast.ImportFrom):
                inside = {a.name: f'{node.module}.{a.name}' for a in node.names}
                known |= {a.asname or a.name: inside[a.name] for a in node.names if inside[a.name] in trees}
                missing += [f'{module}:{node.lineno} {name}' for short, name in inside.items() if node.module in trees
                            and short not in defined[node.module] and name not in trees]
        missing += [f'{module}:{node.lineno} {node.value.id}.{node.attr}' for node in ast.walk(tree)
                    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known
                    and not node.attr.startswith('__') and node.attr not in defined[known[node.value.id]]]
    assert not missing
