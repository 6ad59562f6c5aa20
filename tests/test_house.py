"""The layout: the list of files, and the rule which file may import which. A new file needs a line in ROOT_FILES or ROOMS."""
import ast
import subprocess
from graphlib import TopologicalSorter
from pathlib import PurePosixPath

import pytest

from conftest import ROOT

TRAINERS = ('train_gpt', 'train_bitnet', 'train_cnn', 'finetune_cls')
TOOLS = ('ptq', 'sample', 'bench', 'plot', 'export')
ROOT_FILES = {'README.md', 'Makefile', 'requirements.txt', 'requirements-peers.txt', 'pyproject.toml', 'LICENSE', 'kernels.c',
              'kernels_triton.py',
              *(f'{name}.py' for name in ('configurator', 'common', 'layers', 'quant', 'optim', *TRAINERS, *TOOLS))}
ROOMS = {'readers': 'tokens documents texts images crops tasks',
         'pretrained': 'hf adapters folders ggufs formats calibrate replace subjects',
         'report': 'scores tables costs figure plot_cls plot_ptq plot_runs pictures',
         'engine': 'engine load engine.c lanes.h',
         'measure': 'turns forms matrices steps optimizers convolutions decode llama gpu'}
FOLDERS = {*ROOMS, 'config', 'data', 'docs', 'tests', 'results'}

# From the ground up. A module imports only lower floors; in rooms, data/, results/ and among the tools also its neighbours.
FLOORS = (('kernels_triton',), ('quant', 'configurator', 'optim'), ('layers',), ('common',), ('readers',),
          ('pretrained', 'report', 'engine', 'data'), TRAINERS, ('engine.load',), ('measure',), ('tools', 'results'),
          ('tests',))
NEIGHBOURS = {*ROOMS, 'data', 'tools', 'results', 'tests'}
# Stricter than the floors: the only modules that a module may import, and the only users of a room or a trainer.
IMPORTS_ONLY = {'layers': {'quant', 'kernels_triton'}, 'quant': {'kernels_triton'}, 'optim': set()}
IMPORTED_ONLY_BY = {'measure': {'measure', 'bench', 'ptq', 'export', 'results', 'tests'},
                    **{trainer: {'engine.load', 'measure', 'results', 'tests'} for trainer in TRAINERS}}


def tracked():
    """Paths of the repository's files: from git, or from the folders if there is no git."""
    git = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True)
    paths = git.stdout.split('\n') if git.returncode == 0 else [
        p.relative_to(ROOT).as_posix() for where in (ROOT, *map(ROOT.joinpath, FOLDERS))
        for p in (where.glob('*') if where == ROOT else where.rglob('*.py')) if p.is_file()]
    return [PurePosixPath(p) for p in paths if p and (ROOT / p).is_file()]


def group(module):
    """readers.tokens -> readers, bench -> tools, layers -> layers. engine/load.py stands above the trainers, alone."""
    top = module.split('.')[0]
    return 'tools' if top in TOOLS else module if module == 'engine.load' else top


@pytest.fixture(scope='module')
def modules():
    """{module: (its path, all nodes of its syntax tree)}."""
    return {'.'.join(p.with_suffix('').parts).removesuffix('.__init__'):
            (p, list(ast.walk(ast.parse((ROOT / p).read_text(encoding='utf-8')))))
            for p in tracked() if p.suffix == '.py'}


@pytest.fixture(scope='module')
def arrows(modules):
    """{module: [(line, module that it imports)]} of the modules of the repository, wherever the import is in the file."""
    def imports(path, nodes):
        beside = '.'.join(path.parts[:-1])              # a script also finds the files of its own folder
        for node in nodes:
            names = []
            if isinstance(node, ast.Import):
                names = [(alias.name,) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                where = '.'.join([*path.parts[:-node.level], *filter(None, [node.module])]) if node.level else node.module
                names = [(f'{where}.{alias.name}', where) for alias in node.names]
            for choices in names:
                known = [m for name in choices for m in (name, f'{beside}.{name}') if m in modules]
                if known:
                    yield node.lineno, known[0]
    return {module: list(imports(*parsed)) for module, parsed in modules.items() if group(module) != 'config'}


def names_in(node):
    """Names that a node of a syntax tree defines or imports."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [(alias.asname or alias.name).split('.')[0] for alias in node.names]
    return []


def floor(module):
    return next((i for i, floor in enumerate(FLOORS) if group(module) in floor), None)


def test_the_root_and_each_room_hold_the_files_of_the_layout():
    """The root and the rooms hold exactly the files listed here. Each __init__.py holds one sentence about its room."""
    paths = [p for p in tracked() if not p.parts[0].startswith('.')]
    there = {p.name for p in paths if len(p.parts) == 1}
    assert there == ROOT_FILES, f'files of the root that ROOT_FILES lacks, or the other way round: {sorted(there ^ ROOT_FILES)}'
    assert {p.parts[0] for p in paths if len(p.parts) > 1} == FOLDERS
    for room, names in ROOMS.items():
        there = {'/'.join(p.parts[1:]) for p in paths if p.parts[0] == room}
        wrong = there ^ {'__init__.py', *(name if '.' in name else f'{name}.py' for name in names.split())}
        assert not wrong, f'files of {room}/ that ROOMS lacks, or the other way round: {sorted(wrong)}'
        tree = ast.parse((ROOT / room / '__init__.py').read_text(encoding='utf-8'))
        assert len(tree.body) == 1 and ast.get_docstring(tree).count('.') == 1, f'{room}/__init__.py is not one sentence'


def test_imports_go_down(arrows):
    """tools -> measure -> engine.load -> trainers -> pretrained, report -> readers -> common -> layers -> quant; optim."""
    homeless = [module for module in arrows if floor(module) is None]
    assert not homeless, f'{homeless} are on no floor; name their groups in FLOORS'
    for module, line, other in ((module, *arrow) for module, several in arrows.items() for arrow in several):
        arrow = f'{module}:{line} imports {other}'
        if group(other) == group(module):
            assert group(module) in NEIGHBOURS, f'{arrow}, itself'
        else:
            assert floor(other) is not None and floor(other) < floor(module), (
                f'{arrow}, which is not on a lower floor ({group(module)} -> {group(other)}); '
                'move what it needs down, or let the caller hand it in')
        assert group(other) in IMPORTS_ONLY.get(module, {group(other)}), f'{arrow}; see IMPORTS_ONLY'
        users = IMPORTED_ONLY_BY.get(group(other))
        assert not users or {module, group(module)} & users, (
            f'{arrow}, which only {", ".join(sorted(users))} may import; '
            + ('take the model from load.MODELS' if other in TRAINERS else 'move what it needs to a lower floor'))


def test_no_import_leads_back(arrows):
    """No module imports itself through other modules; imports inside functions count too."""
    TopologicalSorter({module: [other for _, other in several] for module, several in arrows.items()}).prepare()


def test_names_of_other_modules_exist(modules):
    """Each `module.name` in the source exists in that module, also in branches that no test runs."""
    defined = {module: {name for node in nodes for name in names_in(node)} for module, (_, nodes) in modules.items()}
    missing = []
    for module, (_, nodes) in modules.items():
        known, used = {}, []                        # {name in this file: module of ours}, [(line, module, name)]
        for node in nodes:
            if isinstance(node, ast.Import):
                known |= {a.asname or a.name: a.name for a in node.names if a.name in modules}
            elif isinstance(node, ast.ImportFrom):
                inside = {a.name: f'{node.module}.{a.name}' for a in node.names}
                known |= {a.asname or a.name: inside[a.name] for a in node.names if inside[a.name] in modules}
                used += [(node.lineno, node.module, short) for short, name in inside.items()
                         if node.module in modules and name not in modules]
        used += [(node.lineno, known[node.value.id], node.attr) for node in nodes
                 if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known
                 and not node.attr.startswith('__')]
        missing += [f'{module}:{line} {other}.{name}' for line, other, name in used if name not in defined[other]]
    assert not missing
