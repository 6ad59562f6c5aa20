"""What a fork of the server in conftest.py runs; a module of its own, so that a fork does not import conftest.py."""
import gc
import os
import runpy
import sys


def run(words, cwd, folder, environment, patch):
    """The forked process: `python words` in the folder cwd, after the source text `patch`; its streams are files in folder."""
    gc.freeze()             # else each collection visits, and so copies, all that the server has imported
    os.setsid()
    for number, name in ((1, 'stdout'), (2, 'stderr')):
        os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = [words[0], *words[1:]]
    if patch:
        exec(patch, {'__name__': 'patch'})
    if words[0] == '-m':
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name='__main__', alter_sys=True)
    else:
        sys.path[:0] = [os.path.dirname(os.path.abspath(words[0]))]
        runpy.run_path(words[0], run_name='__main__')
