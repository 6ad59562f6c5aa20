"""What a fork of the server in conftest.py runs; a module of its own, so that a fork does not import conftest.py."""
import gc
import io
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
import types

# Patches for start(): the scripts that start Pythons start forks instead. A few tests start real ones.
BENCH_FORKS = 'import forked; forked.bench_in_forks()\n'
SWEEP_FORKS = 'import forked; forked.sweep_in_forks()\n'
PARTS_FORKS = 'import forked; forked.parts_in_forks()\n'
# A patch for ptq.py: it times each model for 0.01 s instead of 0.2 s.
SHORT_TIMES = """
from measure import turns
def median_ms(run, seconds, *rest, plain=turns.median_ms):
    return plain(run, 0.01, *rest)
turns.median_ms = median_ms
"""


def settle(cwd, folder, environment, patch):
    """In a fork: a session of its own, the folder cwd, its streams as files in folder; then the source text `patch` runs."""
    gc.freeze()             # else each collection visits, and so copies, all that the server has imported
    os.setsid()
    for number, name in ((1, 'stdout'), (2, 'stderr')):
        os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(environment)
    os.chdir(cwd)
    if patch:
        exec(patch, {'__name__': 'patch'})


def run(words, cwd, folder, environment, patch):
    """The forked process: `python words`, after settle()."""
    settle(cwd, folder, environment, patch)
    sys.argv = [words[0], *words[1:]]
    if words[0] == '-m':
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name='__main__', alter_sys=True)
    else:
        sys.path[:0] = [os.path.dirname(os.path.abspath(words[0]))]
        runpy.run_path(words[0], run_name='__main__')


class Child:
    """subprocess.Popen([python, script, *words]) as a fork of this process, or [python, '-m', module, *words]; begin() runs
    first in it."""

    def __init__(self, words, begin=lambda: None):
        sys.stdout.flush()
        self.returncode, self.pid = None, os.fork()
        if not self.pid:
            code = 1
            try:
                begin()
                if words[1] == '-m':
                    sys.argv = words[2:]
                    runpy.run_module(words[2], run_name='__main__', alter_sys=True)
                else:
                    sys.argv = words[1:]
                    runpy.run_path(words[1], run_name='__main__')
                code = 0
            except SystemExit as e:
                code = e.code or 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(code)

    def poll(self, flags=os.WNOHANG):
        pid, status = os.waitpid(self.pid, flags) if self.returncode is None else (0, 0)
        if pid:
            self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self):
        return self.poll(0)


class End(io.FileIO):
    """Our end of a pipe to a child; OPEN has those that later children must close."""
    OPEN = []

    def close(self):
        if self in End.OPEN:
            End.OPEN.remove(self)
        super().close()


class Worker(Child):
    """A child with pipes to its stdin and stdout."""

    def __init__(self, words, **_):
        (stdin, mine), (theirs, stdout) = os.pipe(), os.pipe()
        ends = End(mine, 'w'), End(theirs)
        End.OPEN.extend(ends)
        self.stdin, self.stdout = io.TextIOWrapper(io.BufferedWriter(ends[0])), io.TextIOWrapper(io.BufferedReader(ends[1]))

        def begin():
            for end in End.OPEN:
                os.close(end.fileno())
            os.dup2(stdin, 0), os.dup2(stdout, 1)
            sys.stdin = open(0)
        super().__init__(words, begin)
        os.close(stdin), os.close(stdout)


def sweep_in_forks():
    subprocess.Popen = Child


def bench_in_forks():
    from measure import turns
    turns.subprocess = types.SimpleNamespace(Popen=Worker, PIPE=None)


def parts_in_forks():
    from measure import gpu
    gpu.subprocess = types.SimpleNamespace(run=run_in_fork, PIPE=None, STDOUT=None, TimeoutExpired=TimeoutError)


def run_in_fork(words, cwd, env, **_):
    """subprocess.run() with both streams as one text, of a script or module that starts Pythons itself; no time limit."""
    with tempfile.TemporaryFile('w+') as said:
        def begin():
            os.dup2(said.fileno(), 1), os.dup2(said.fileno(), 2)
            os.environ.update(env)
            os.chdir(cwd)
            bench_in_forks()
        code = Child(words, begin).wait()
        said.seek(0)
        return types.SimpleNamespace(stdout=said.read(), returncode=code)
