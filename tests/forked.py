"""What a fork of the server in conftest.py runs; a module of its own, so that a fork does not import conftest.py."""
import gc
import os
import runpy
import sys

# A patch for bench.py: it starts a Python for each variant, here each is a fork. One test of bench.py starts real ones.
BENCH_FORKS = """
import io, os, runpy, subprocess, sys
ends = []
class End(io.FileIO):
    def close(self):
        if self in ends:
            ends.remove(self)
        super().close()
class Fork:
    def __init__(self, words, env, **_):
        (stdin, mine), (theirs, stdout) = os.pipe(), os.pipe()
        ends.extend((End(mine, 'w'), End(theirs)))
        self.stdin, self.stdout = io.TextIOWrapper(io.BufferedWriter(ends[-2])), io.TextIOWrapper(io.BufferedReader(ends[-1]))
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            for end in ends:
                os.close(end.fileno())
            os.dup2(stdin, 0), os.dup2(stdout, 1)
            sys.stdin, sys.argv, code = open(0), words[1:], 0
            try:
                runpy.run_path(words[1], run_name='__main__')
            except SystemExit as e:
                code = e.code
            sys.stdout.flush()
            os._exit(code)
        os.close(stdin), os.close(stdout)
    def wait(self):
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
from measure import turns
turns.subprocess = type(sys)('forks')
turns.subprocess.Popen, turns.subprocess.PIPE = Fork, None
"""

# A patch for a sweep of finetune_cls.py, which starts a Python for each run.
SWEEP_FORKS = """
import os, runpy, subprocess, sys
class Popen:
    def __init__(self, words):
        sys.stdout.flush()
        self.returncode, self.pid = None, os.fork()
        if not self.pid:
            sys.argv, code = words[1:], 0
            try:
                runpy.run_path(words[1], run_name='__main__')
            except SystemExit as e:
                code = e.code or 0
            sys.stdout.flush()
            os._exit(code)
    def poll(self):
        pid, status = os.waitpid(self.pid, os.WNOHANG) if self.returncode is None else (0, 0)
        if pid:
            self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode
subprocess.Popen = Popen
"""

# A patch for ptq.py: it times each model for 0.01 s instead of 0.2 s.
SHORT_TIMES = """
from measure import turns
def median_ms(run, seconds, *rest, plain=turns.median_ms):
    return plain(run, 0.01, *rest)
turns.median_ms = median_ms
"""


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
