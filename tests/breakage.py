"""
Measures what the tests notice: breaks one line of the source at a time and runs the tests of that file.

    python tests/breakage.py [--each=6] [--only=layers.py,optim.py]

Works in a temporary copy. The lines are drawn by a hash of their text, so the same lines are drawn after unrelated edits.
A break flips a comparison, a sign or an operator, changes a number, negates a condition or deletes a statement.
"""
import argparse
import ast
import copy
import shutil
import subprocess
import sys
import tempfile
import time
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = {       # the file to break: test files in the order in which they run
    'kernels_triton.py': 'triton',
    'layers.py': 'layers quant compressed convert grouped adapters compile',
    'quant.py': 'quant layers compressed grouped compile',
    'optim.py': 'optim processes trainers finetune_cls',
    'common.py': 'common trainers train_gpt sample',
    'pretrained/calibrate.py': 'calibrate grouped ptq'}
FLIPS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
         ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
         ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.And: ast.Or, ast.Or: ast.And}
SIMPLE = (ast.Assign, ast.AugAssign, ast.Return, ast.Expr, ast.If, ast.While)


def broken(node):
    """A changed copy of an expression node, or None where this script has no change for it."""
    new = copy.deepcopy(node)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in FLIPS:
        new.ops[0] = FLIPS[type(node.ops[0])]()
    elif isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in FLIPS:
        new.op = FLIPS[type(node.op)]()
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        return new.operand
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        new.value = node.value + 1 if isinstance(node.value, int) else node.value * 2
    elif isinstance(node, ast.Constant) and type(node.value) is bool:
        new.value = not node.value
    else:
        return None
    return new


def breaks_of(source):
    """[(first line, last line, old text, new text)]: each way to break one simple statement or the head of an if."""
    found, lines = [], source.splitlines()

    def statement(node, scope):
        head = isinstance(node, ast.If | ast.While)
        last = node.test.end_lineno if head else node.end_lineno
        old = '\n'.join(lines[node.lineno - 1:last])
        if head and (last >= node.body[0].lineno or old.lstrip().startswith('elif')):
            return                                              # one line, or an elif: no statement of its own
        root, kind = node.test if head else node, type(node).__name__.lower()
        indent = ' ' * node.col_offset
        plain = f'{scope}: {ast.unparse(root)}'                     # without comments, which may be rewritten
        keep = lambda text: found.append((node.lineno, last, plain, indent + text))
        for parent in ast.walk(root):
            if isinstance(parent, ast.JoinedStr | ast.Lambda):
                continue
            for field, value in list(ast.iter_fields(parent)):
                for child in value if isinstance(value, list) else [value]:
                    new = broken(child) if isinstance(child, ast.expr) else None
                    if new is None:
                        continue
                    changed = [new if v is child else v for v in value] if isinstance(value, list) else new
                    setattr(parent, field, changed)
                    keep(f'{kind} {ast.unparse(node.test)}:' if head else ast.unparse(node).replace('\n', '\n' + indent))
                    setattr(parent, field, value)
        if head:
            keep(f'{kind} not ({ast.unparse(root)}):')
        elif isinstance(node, ast.AugAssign) or isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            keep('pass')

    def walk(node, scope):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                walk(child, f'{scope}.{child.name}'.lstrip('.'))
            elif isinstance(child, ast.stmt):
                if isinstance(child, SIMPLE) and scope:         # inside of functions and classes
                    statement(child, scope)
                walk(child, scope)
    walk(ast.parse(source), '')
    return found


def draw(name, source, each):
    """`each` breaks of a file, at most one a statement, by the hash of what they change."""
    drawn = {}
    for one in sorted(breaks_of(source), key=lambda b: sha256(f'{name} {b[2]} {b[3]}'.encode()).hexdigest()):
        drawn.setdefault(one[2], one)
    return list(drawn.values())[:each]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--each', type=int, default=6, help='breaks of each file')
    parser.add_argument('--only', default=','.join(TESTS), help='files, separated by commas')
    parser.add_argument('--list', action='store_true', help='run no test')
    a = parser.parse_args()
    noticed = total = 0
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder) / 'nanobit'
        shutil.copytree(ROOT, copied, ignore=shutil.ignore_patterns('.venv', '.git', 'out', '__pycache__', '.*cache', 'cov'))
        if (ROOT.parent / 'shared').exists():
            (Path(folder) / 'shared').symlink_to(ROOT.parent / 'shared')
        for name in a.only.split(','):
            source = (ROOT / name).read_text(encoding='utf-8')
            files = [f'tests/test_{t}.py' for t in TESTS[name].split()]
            for first, last, old, new in draw(name, source, a.each):
                lines = source.splitlines()
                print(f'{name}:{first} {old}\n    -> {new.strip()}', flush=True)
                if a.list:
                    continue
                lines[first - 1:last] = new.split('\n')
                (copied / name).write_text('\n'.join(lines) + '\n', encoding='utf-8')
                start = time.monotonic()
                try:
                    words = [sys.executable, '-m', 'pytest', '-x', '-q', '-p', 'no:cacheprovider', *files]
                    done = subprocess.run(words, cwd=copied, capture_output=True, text=True, timeout=1800)
                    failed = done.returncode != 0
                    by = next((x for x in done.stdout.splitlines() if x.startswith(('FAILED', 'ERROR'))), '')[:110]
                except subprocess.TimeoutExpired:
                    failed, by = True, 'no end'
                total, noticed = total + 1, noticed + failed
                print(f'    {"noticed" if failed else "NOT NOTICED"} {by} ({time.monotonic() - start:.0f} s)', flush=True)
            (copied / name).write_text(source, encoding='utf-8')
    if not a.list:
        print(f'{noticed} of {total} noticed')


if __name__ == '__main__':
    main()
