"""Starting a trainer as a shell does, without paying for the import of torch each time.

A server process imports torch, transformers and other packages once; every command is a fork of it that gets its own
folder, environment, process group and __main__, and then runs the script from its first line. What a process shows to
the world (exit status, signals, files, both streams, torchrun's environment) is the same; atexit handlers do not run. A few
tests pay for real command lines to make sure.
"""
import gc
import json
import multiprocessing
import multiprocessing.forkserver
import os
import re
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import forked
from tiny import (AT_STEP, IN_EVALUATION, MEASURED, NAN_LOSS, assert_same_state, checkpoint, flat, kill_at, log,  # noqa: F401
                  write_text)

ROOT = Path(__file__).resolve().parent.parent
if 'NANOBIT_DEVICE' in os.environ:                  # bench.py gpu: the numerics on another device
    torch.set_default_device(os.environ['NANOBIT_DEVICE'])
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:       # a job in the background: what it starts would ignore Ctrl-C too
    signal.signal(signal.SIGINT, signal.default_int_handler)
ENVIRONMENT = {'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1',
               'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])}
SERVER = multiprocessing.get_context('forkserver')
TINY = """# a GPT of two blocks that trains 20 steps in a second
dataset = {data!r}
out_dir, device, compile = 'out', 'cpu', False
n_layer, n_head, n_embd, block_size, batch_size, micro_batch_size = 2, 2, 32, 32, 8, 2
max_iters, warmup_iters, eval_interval, eval_iters, log_interval, save_interval = 20, 2, 10, 2, 1, 5
learning_rate, min_lr = 3e-3, 3e-4
"""

# One line for the weights, buffers and optimizer's state before each step, in the file sums0 of rank 0.
CHECKSUMS = """
import common, sys, torch
def seed_step(seed, step, rank, plain=common.seed_step):
    main = sys._getframe(1).f_locals
    main = main if 'opt' in main else sys._getframe(2).f_locals
    tensors = list((main.get('raw_model') or main.get('raw_net')).state_dict().values())
    tensors += [t for s in main['opt'].state.values() for t in s.values() if torch.is_tensor(t)]
    with open(f'sums{rank}', 'a') as f:
        print(common.checksum(tensors), file=f)
    plain(seed, step, rank)
common.seed_step = seed_step
"""
# The process says "holding" in a step, and goes on when a signal has arrived, whenever that is.
HOLD = AT_STEP.format(step='{step}', rank='rank', action="""
        r, w = os.pipe()
        os.set_blocking(w, False)
        signal.set_wakeup_fd(w)
        print('holding', flush=True)
        os.read(r, 1)""")
# Runs many command lines, (script, cwd, words) each, in one process; none of them may leave anything behind.
IN_TURN = """
import contextlib, io, json, os, runpy, sys, traceback
commands, done = json.load(open(sys.argv[1])), []
for script, cwd, words in commands:
    os.chdir(cwd)
    sys.argv, code = [script, *words], 0
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding='utf-8', write_through=True) for _ in 'oe')
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(script, run_name='__main__')
        except SystemExit as e:
            code = e.code or 0
        except BaseException:
            code = 1
            traceback.print_exc()
    done.append((code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode()))
json.dump(done, sys.stdout)
"""

LONGEST = '''trainers engine readme ptq bench finetune_cls export train_gpt train_cnn train_bitnet compile engine_load optim
             images hf'''.split()                 # test_*.py by seconds, see pytest --durations=0
torch.set_num_threads(1)                          # tiny tensors; more threads than idle cores would wait for each other


@dataclass
class Result:
    code: int       # exit status, -9 for SIGKILL
    out: str
    err: str


class Job:
    """A running command; its process group is its own, so that a signal can go to all of it."""

    def __init__(self, process, folder):
        self.process, self.folder, self.pid = process, folder, process.pid

    def signal(self, number):
        os.kill(self.pid, number)

    def runs(self):
        return self.process.poll() is None if isinstance(self.process, subprocess.Popen) else self.process.is_alive()

    def output(self):
        return (self.folder / 'stdout').read_text()

    def wait_for(self, text, times=1, timeout=300):
        """Until it has printed text so many times; it is an error to end before."""
        end = time.monotonic() + timeout
        while self.output().count(text) < times:
            assert self.runs() and time.monotonic() < end, (self.output(), (self.folder / 'stderr').read_text())
            time.sleep(0.01)

    def wait(self, timeout=300):
        is_popen = isinstance(self.process, subprocess.Popen)
        try:
            self.process.wait(timeout) if is_popen else self.process.join(timeout)
        except subprocess.TimeoutExpired:
            pass
        code = self.process.returncode if is_popen else self.process.exitcode
        if code is None:
            os.killpg(self.pid, signal.SIGKILL)
            raise AssertionError(f'no end after {timeout} s: {self.output()} {(self.folder / "stderr").read_text()}')
        return Result(code, self.output(), (self.folder / 'stderr').read_text())


def pytest_configure(config):
    config.option.loadscopereorder = False      # of xdist: its own order begins with the files of many tests, not with the long


def pytest_collection_modifyitems(items):
    """The longest files first, so that none of them runs alone at the end, while the other processes have no more work."""
    items.sort(key=lambda item: LONGEST.index(name) if (name := item.path.stem[5:]) in LONGEST else len(LONGEST))


def pytest_collection_finish():
    gc.collect()
    gc.freeze()             # torch and its friends are a million objects, which each collection would visit


@pytest.fixture(scope='session')
def start(tmp_path_factory):
    """start(*words, cwd, patch='', real=False, **environment) -> Job running `python words` in the folder cwd."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in ENVIRONMENT.items():
            patch.setenv(key, value)
        patch.setenv('PYTHONPATH', str(ROOT / 'tests'), prepend=os.pathsep)
        patch.setenv('BYTECODE', str(tmp_path_factory.mktemp('bytecode')))
        SERVER.set_forkserver_preload(['preload'])
        multiprocessing.forkserver.ensure_running()
    jobs = []

    def begin(*words, cwd, patch='', real=False, **environment):
        folder, words = tmp_path_factory.mktemp('job'), [str(w) for w in words]
        environment = ENVIRONMENT | environment
        for name in ('stdout', 'stderr'):
            (folder / name).touch()
        if real:
            with open(folder / 'stdout', 'w') as out, open(folder / 'stderr', 'w') as err:
                process = subprocess.Popen([sys.executable, *words], cwd=cwd, stdout=out, stderr=err,
                                           env={**os.environ, **environment}, start_new_session=True)
        else:
            process = SERVER.Process(target=forked.run, args=(words, cwd, folder, environment, patch), daemon=True)
            process.start()
        jobs.append(Job(process, folder))
        return jobs[-1]

    yield begin
    for job in jobs:
        if job.runs():
            os.killpg(job.pid, signal.SIGKILL)


@pytest.fixture(scope='module')
def train(request, start):
    """train(*options, cwd=..., code=0, patch='', ...) -> Result of one run of the module's SCRIPT: tiny.py *options. Its PATCH,
    if it has one, is run before."""
    script, before = request.module.SCRIPT, getattr(request.module, 'PATCH', '')

    def run(*options, cwd, code=0, patch='', **how):
        done = start(script, 'tiny.py', *options, cwd=cwd, patch=before + patch, **how).wait()
        assert done.code == code, (done.code, done.out, done.err)
        assert 'Traceback' not in done.err
        return done
    return run


@pytest.fixture(scope='module')
def unbroken(train, folder):
    """unbroken(*options) -> the module's folder() of a run with these options, made once; what it said is in the file said."""
    made = {}

    def run(*options):
        if options not in made:
            made[options] = folder()
            done = train(*options, cwd=made[options])
            assert done.err == ''
            (made[options] / 'said').write_text(done.out)
        return made[options]
    return run


@pytest.fixture(scope='session')
def in_turn(start, tmp_path_factory):
    """in_turn([(script, cwd, words), ...], patch='', **environment) -> a Result of each, all run in one process."""
    def run(commands, **how):
        folder = tmp_path_factory.mktemp('turns')
        (folder / 'turns.py').write_text(IN_TURN)
        lines = [(str(ROOT / script), str(cwd), [str(w) for w in words]) for script, cwd, words in commands]
        (folder / 'commands').write_text(json.dumps(lines))
        done = start('turns.py', 'commands', cwd=folder, **how).wait(900)
        assert done.code == 0, (done.out, done.err)
        return [Result(*one) for one in json.loads(done.out)]
    return run


@pytest.fixture(scope='session')
def refused(in_turn):
    """refused(trainer, [(options, what is said)], cwd): tiny.py with each of the options is a user's mistake: exit status 2
    and one line on stderr that begins with 'error: ' and has these words, no traceback, no new out_dir. All in one process."""
    def check(trainer, cases, cwd):
        there = (cwd / 'out').exists()
        found = in_turn([(f'{trainer}.py', cwd, ['tiny.py', *options]) for options, _ in cases])
        wrong = [(options, said, one.code, one.err[-600:]) for (options, said), one in zip(cases, found, strict=True)
                 if one.code != 2 or one.err.count('\n') != 1 or not one.err.startswith('error: ') or said not in one.err]
        assert not wrong and (cwd / 'out').exists() == there, wrong
    return check


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs data/<name>/prepare.py in tmp_path, in this process; -> stdout, or the single line on stderr where it must fail."""
    def run(name, *args, ok=True):
        path, code = str(ROOT / 'data' / name / 'prepare.py'), 0
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, 'argv', [path, *map(str, args)])
        try:
            runpy.run_path(path, run_name='__main__')
        except SystemExit as e:
            code = e.code
        result = Result(code, *capsys.readouterr())
        assert not ok or code == 0, result.err
        return result.out if ok else one_error(result)
    return run


def tiny_gpt(kind='fp', blocks=(0, 1), **options):
    import train_gpt
    torch.manual_seed(0)
    options = {'vocab_size': 64, 'block_size': 16, 'n_layer': 2, 'n_head': 2, 'n_embd': 32} | options
    kinds = dict.fromkeys(('qkv_proj', 'c_proj', 'mlp_proj'), kind)
    return train_gpt.GPT(train_gpt.GPTConfig(binary_blocks=blocks, **kinds, **options)).eval()


def tiny_bitnet(quant='tern', **options):
    import train_bitnet
    torch.manual_seed(0)
    options = dict(vocab_size=64, block_size=16, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_ff=64, quant=quant) | options
    return train_bitnet.BitNet(train_bitnet.BitNetConfig(**options)).eval()


@torch.no_grad()
def all_logits(model, ids):
    """(B, T, vocab) of a GPT or BitNet, from its last norm: without targets it gives the last position only."""
    seen = []
    norm = model.ln_f if hasattr(model, 'ln_f') else model.norm
    handle = norm.register_forward_hook(lambda module, args, out: seen.append(out))
    model(ids, ids)
    handle.remove()
    return seen[0] @ model.lm_head.weight.T


def random_ids(*shape, seed=1):
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed))


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


STORES = []


def ranks(world):
    """The environments that torchrun gives to its processes, one dict per rank; as there, we hold the store."""
    STORES.append(dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False))
    return [{'RANK': str(r), 'LOCAL_RANK': str(r), 'WORLD_SIZE': str(world), 'MASTER_ADDR': '127.0.0.1',
             'MASTER_PORT': str(STORES[-1].port), 'TORCHELASTIC_USE_AGENT_STORE': 'True'} for r in range(world)]


def wait_all(jobs, timeout=300):
    """The Result of each job; when one does not end, what all of them said."""
    try:
        return [job.wait(timeout) for job in jobs]
    except AssertionError as e:
        raise AssertionError([(job.output(), (job.folder / 'stderr').read_text()) for job in jobs]) from e


def torchrun(*options, nodes=1, rank=0, port=0, per_node=2):
    where = ['--standalone'] if nodes == 1 else [
        f'--nnodes={nodes}', f'--node_rank={rank}', '--rdzv_backend=c10d', '--rdzv_id=nanobit',
        f'--rdzv_endpoint=127.0.0.1:{port}', f'--rdzv_conf=is_host={int(rank == 0)}', '--local_addr=127.0.0.1']
    return ['-m', 'torch.distributed.run', *where, f'--nproc_per_node={per_node}', *options]


def one_error(done):
    """What a user's mistake looks like: one line on stderr that begins with 'error: '."""
    assert done.code == 2 and done.err.count('\n') == 1 and done.err.startswith('error: '), (done.code, done.err)
    return done.err


def printed_command(out):
    """The words after `go on with: python` on the last line."""
    last = out.strip().split('\n')[-1]
    assert re.match(r'stopped at step \d+; go on with: python ', last), out
    return shlex.split(last.split('go on with: python ')[1])


def damages(whole):
    middle = len(whole) // 2
    flip = lambda at: whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1:]
    return {'truncated': whole[:middle], 'flipped at 1/2': flip(middle), 'flipped at 1/4': flip(middle // 2),
            'flipped at 3/4': flip(middle * 3 // 2), 'empty': b'', 'foreign zip': b'PK\5\6' + bytes(18)}


@pytest.fixture(scope='session')
def tiny_data(tmp_path_factory):
    """A folder with 40,000 training and 4,000 validation bytes of a text a tiny model can learn something about."""
    folder = tmp_path_factory.mktemp('tinytext')
    write_text(folder)
    return folder
