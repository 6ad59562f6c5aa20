"""Classify Python functions by their package. Uses the standard library on this machine. No download.

    python data/pycls/prepare.py                             -> data/pycls

Sizes depend on the Python version. 3.11.7 gives 2,650 training functions of nine packages and 294 validation functions;
3.10 to 3.13 are within 2% of that. So compare figures only between runs on the same Python. A package that is missing on a
system is one label less; at least four packages are needed.

A row is a function or method of at least three lines. Anything that would reveal the answer is removed: docstrings, comments
and imports. Each package name that stands as a word becomes `package`. The code and its other names remain: a linear model
on a bag of words gets 92% right, the most common label 20%. Exact duplicates are kept once. At most 500 functions per
package are used. val.csv gets 10%, chosen by a hash of path and qualified name, so a function stays in its split when
others are added or removed. Terms: the Python Software Foundation License. Train with --dataset=pycls.
"""
import argparse
import ast
import hashlib
import platform
import re
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import fail  # noqa: E402
from data.pycode.prepare import find  # noqa: E402
from readers import texts  # noqa: E402

# packages in every Python from 3.10 to 3.14, with some hundred functions each; tkinter has the most, but is often missing
PACKAGES = ('asyncio', 'email', 'http', 'importlib', 'logging', 'multiprocessing', 'unittest', 'urllib', 'xml')
MIN_PACKAGES, MIN_FUNCTIONS, MAX_FUNCTIONS = 4, 20, 500
VAL_PERCENT = 10
# matches a package name as a word, also within names like http_open, but not in HTTPResponse
NAMES = re.compile(rf'(?<![a-z0-9])(?:{"|".join(PACKAGES)})(?![a-z0-9])', re.IGNORECASE)
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


class Strip(ast.NodeTransformer):
    """Removes imports and docstrings, at any depth."""

    def visit_Import(self, node):
        return None

    visit_ImportFrom = visit_Import

    def generic_visit(self, node):
        if isinstance(node, (*FUNCTION, ast.ClassDef)) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
        super().generic_visit(node)
        if isinstance(getattr(node, 'body', None), list) and not node.body:  # a block needs a statement
            node.body = [ast.Pass()]
        return node


def functions(tree, prefix=''):
    """Yield (qualified name, node) for each function. A nested function is part of the text of its outer function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, FUNCTION):
            yield prefix + node.name, node
        elif isinstance(node, ast.stmt | ast.ExceptHandler):  # a function may also be inside `if` or `try`
            yield from functions(node, f'{prefix}{node.name}.' if isinstance(node, ast.ClassDef) else prefix)


def text(node):
    """Source of a function as str, without comments, docstrings, imports and package names."""
    return NAMES.sub('package', ast.unparse(Strip().visit(node)))


def collect(root):
    """Library folder -> {package: {text: key}}. key: hash of path and qualified name. Each text occurs only once in all."""
    seen, found = set(), {}
    for package in PACKAGES:
        found[package] = {}
        for path in find(root / package):
            try:
                tree = ast.parse((root / package / path).read_bytes())
            except (SyntaxError, ValueError):  # some systems ship files for another Python version
                continue
            for name, node in functions(tree):
                function = text(node)
                if function.count('\n') >= 2 and function not in seen:
                    seen.add(function)
                    key = hashlib.sha256(f'{package}/{path}:{name}'.encode()).digest()
                    found[package][function] = int.from_bytes(key[:8], 'big')
    return {package: functions for package, functions in found.items() if len(functions) >= MIN_FUNCTIONS}


def split_rows(found):
    """{package: {text: key}} -> {'train': [(text, package)], 'val': ...}, sorted by key, which is a random order."""
    kept = [(key, function, package) for package, functions in found.items()
            for key, function in sorted((key, function) for function, key in functions.items())[:MAX_FUNCTIONS]]
    rows = {'train': [], 'val': []}
    for key, function, package in sorted(kept):
        rows['val' if key % 100 < VAL_PERCENT else 'train'].append((function, package))
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = fail  # one line instead of the usage
    parser.add_argument('--out_dir', default=Path(__file__).resolve().parent, type=Path)
    args = parser.parse_args(argv)

    root = Path(sysconfig.get_path('stdlib'))
    found = collect(root)
    missing = [package for package in PACKAGES if package not in found]
    if len(found) < MIN_PACKAGES:
        fail(f'{root} has no sources of {", ".join(missing)}; use a full Python, not a zipped or stripped one')
    rows = split_rows(found)
    print(f'Python {platform.python_version()} in {root}' + (f'; not there: {", ".join(missing)}' if missing else ''))
    print('expected: 2,650 and 294 rows on 3.11.7, others differ')
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()
    task = {'task': 'pycls', 'labels': list(found), 'text': ('function',), 'label': 'package',
            'source': 'the standard library', 'revision': f'Python {platform.python_version()}, sha256:{digest}'}
    texts.build(args.out_dir, task, {split: lambda split=split: rows[split] for split in rows})


if __name__ == '__main__':
    texts.run(main)
