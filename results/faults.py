"""
The fault matrix: kills, stops, NaNs, full disks, damaged files, malicious files and a lost network, tried on the four trainers.

    python results/faults.py                                        # 10 minutes on 2 cores
    python results/faults.py --scale=0.1 --only=kill,disk/train_cnn     # a tenth of the cases of some checks; stores nothing
    python results/faults.py --table                                # the table alone, from the stored lines

Each case runs real command lines on small generated data in a temporary folder. The processes are forks of this one, which has
imported torch. A line of results/faults.jsonl is a check of one trainer or file format: what was done, what came out, the
machine. results/faults.md has the table. The exit status is 1 if a case does not end as promised.
"""
import argparse
import contextlib
import functools
import importlib
import io
import json
import math
import os
import pickle
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace

os.environ['OMP_NUM_THREADS'] = '1'
for key in ('HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE', 'RANK', 'WORLD_SIZE'):
    os.environ.pop(key, None)
import keep  # noqa: E402
import torch  # noqa: E402

from keep import ROOT, table  # noqa: E402

sys.path.append(str(ROOT / 'tests'))
import forked  # noqa: E402
import tiny  # noqa: E402
from tiny import BY_STEP, IN_EVALUATION, LAST_FILES, NAN_LOSS, OPTIMIZERS, TRAINERS, checkpoint, kill_at  # noqa: E402

import common  # noqa: E402

STEPS = 20
SECOND = OPTIMIZERS | {'finetune_cls': ('--method=rsvd', '--rank=4', '--interval=11')}     # second pass of `resume`
TOLERANCE = dict.fromkeys(TRAINERS, 5e-3) | {'train_cnn': 0.05}         # of losses; rounding flips binary signs
SEED, DATA = 1, {}                                                      # DATA: {text, images, table}, see tiny.write_data()
WORK = Path()                                                           # the temporary folder

# Source text that runs in a trainer before its script.
SAVING = """
import os, signal, torch
calls = []
def moment(name, path, cut=None):
    calls.append(name)
    print('saving:', name, os.path.basename(str(path)), flush=True)
    if len(calls) == {call}:
        if cut is not None and {share} is not None:     # as if the write had come this far
            os.truncate(path, int(os.path.getsize(path) * {share}))
        os.kill(os.getpid(), signal.{signal})
def before(name):
    plain = getattr(os, name)
    def call(*args, **options):
        moment(name, args[-1])
        return plain(*args, **options)
    setattr(os, name, call)
for name in ('fsync', 'replace', 'link', 'chmod', 'remove'):
    before(name)
def save(state, path, plain=torch.save):
    moment('open', path)
    plain(state, path)
    moment('write', path, cut=True)
torch.save = save
"""
TIMED = """
import os, time
def kill(pid, number, plain=os.kill):
    with open('signalled', 'w') as f:
        f.write(str(time.monotonic()))
    plain(pid, number)
os.kill = kill
"""
FULL = """
import common, errno, os
writes = []
def atomic_write(path, write, plain=common.atomic_write):
    writes.append(path)
    print('writing', path, flush=True)
    def half(tmp):
        write(tmp)
        os.truncate(tmp, os.path.getsize(tmp) // 2)
        raise OSError(errno.ENOSPC, 'No space left on device', tmp)
    plain(path, half if {where} else write)
common.atomic_write = atomic_write
"""
LIMIT = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.RLIM_INFINITY))
"""
NO_NETWORK = """
import errno, os, socket
path = os.path.join(os.getcwd(), 'tried')
def refuse(what):
    with open(path, 'a') as f:
        f.write(f'{what}\\n')
    raise OSError(errno.ENETUNREACH, 'Network is unreachable')
def guarded(plain):
    def connect(self, address, *rest):
        if self.family != socket.AF_UNIX and address[0] not in ('127.0.0.1', '::1', 'localhost'):
            refuse(address)
        return plain(self, address, *rest)
    return connect
for name in ('connect', 'connect_ex'):
    setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
def getaddrinfo(host, *rest, plain=socket.getaddrinfo, **options):
    if host not in (None, '', '127.0.0.1', '::1', 'localhost', socket.gethostname()):
        refuse(host)
    return plain(host, *rest, **options)
socket.getaddrinfo = getaddrinfo
"""

# ---------------------------------------------------------------------------------------------------------------------
# runs


def begin(script, *words, cwd, patch='', **environment):
    """Start `python script words` in the folder cwd, as a fork. Its streams go to files."""
    streams = Path(tempfile.mkdtemp(dir=WORK, prefix='streams'))

    def settle():
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        forked.settle(cwd, streams, environment, patch)
    child = forked.Child(['python', str(ROOT / script), *map(str, words)], settle)
    child.streams = streams
    return child


def end(child, timeout=300):
    """Wait for it. Returns code (-9 for SIGKILL), out, err and the time of its end. timeout only ends a hang."""
    limit = time.monotonic() + timeout
    while child.poll() is None:
        if time.monotonic() > limit:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            raise AssertionError(f'no end after {timeout} s')
        time.sleep(0.002)
    at = time.monotonic()
    out, err = ((child.streams / name).read_text(errors='replace') for name in ('stdout', 'stderr'))
    shutil.rmtree(child.streams)
    return SimpleNamespace(code=child.returncode, out=out, err=err, at=at)


def run(script, *words, code=None, **how):
    """Run it to its end. code: the exit status that it must have."""
    done = end(begin(script, *words, **how))
    expect(code is None or done.code == code, f'exit status {done.code}, not {code}: {last_line(done)}')
    return done


def train(trainer, *options, cwd, patch='', code=0, start=run, **how):
    """One run of the trainer with the tiny config in the folder cwd, continued if there is one."""
    pictures = tiny.NO_PICTURES * (trainer == 'train_cnn')
    if start is run:
        how['code'] = code
    return start(f'{trainer}.py', 'tiny.py', f'--max_iters={STEPS}', '--resume=auto', *options, cwd=cwd,
                 patch=pictures + patch, **how)


def expect(condition, problem):
    if not condition:
        raise AssertionError(problem)


def last_line(done):
    return (done.err.strip() or done.out.strip() or '(no output)').split('\n')[-1][:300]


def one_error(done):
    """The line of a mistake: exit status 2, no traceback, the last line of stderr begins with 'error: '."""
    expect(done.code == 2 and 'Traceback' not in done.err, f'exit status {done.code}: {last_line(done)}')
    expect(last_line(done).startswith('error: '), f'no error line: {last_line(done)}')
    return last_line(done)


def fresh(trainer):
    """A new folder with the config tiny.py of the trainer."""
    folder = Path(tempfile.mkdtemp(dir=WORK, prefix=trainer))
    (folder / 'tiny.py').write_text(tiny.COMMON + tiny.TINY[trainer].format(**DATA))
    return folder


@functools.cache
def whole(trainer, *options):
    """(folder of an unbroken run with these options, its seconds), made once in this process."""
    folder, start = fresh(trainer), time.monotonic()
    train(trainer, *options, cwd=folder)
    return folder, time.monotonic() - start


def same_run(trainer, a, b):
    """Raises AssertionError unless both folders have the same last and best checkpoint, log and packed file or model folder, to
    the bit, but for what is measured. No temporary file may be left."""
    tiny.assert_same_run(trainer, a, b)
    models = [sorted(where.glob('out/*/*.safetensors')) for where in (a, b)]
    expect([p.name for p in models[0]] == [p.name for p in models[1]], 'the model folders differ')
    for one, two in zip(*models, strict=True):
        expect(one.read_bytes() == two.read_bytes(), f'{one.name} differs')
    no_left_overs(a)


def no_left_overs(folder):
    left = sorted(p.name for p in (folder / 'out').rglob('*') if '.tmp' in p.name)
    expect(not left, f'left over: {left[:3]}')


def in_fork(function, *args):
    """The result of function(*args), which runs in a fork of this process and returns what JSON can hold."""
    path = Path(tempfile.mkdtemp(dir=WORK, prefix='fork')) / 'result'
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            path.write_text(json.dumps(function(*args)))
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    expect(status == 0, f'the reading process ended with {status}')
    return json.loads(path.read_text())


class Tally:
    """Counts the cases of one check. done: what was done; measured: what came out; wrong: what did not end as promised."""

    def __init__(self, name):
        self.name, self.cases, self.bad, self.done, self.measured, self.wrong = name, 0, 0, [], {}, []
        self.start = self.told = time.monotonic()

    @contextlib.contextmanager
    def case(self, *what, times=1):
        """A block that raises if the case does not end as promised. Some blocks are several cases."""
        self.cases, problem = self.cases + times, ''
        try:
            yield
        except (Exception, SystemExit) as e:
            problem = ' '.join(f'{type(e).__name__}: {e}'.split())[:400]
            self.bad += times
            self.wrong.append(f'{" ".join(map(str, what))}: {problem}')
        self.done.append(' '.join(map(str, what)))
        if problem or time.monotonic() - self.told > 20:
            self.told = time.monotonic()
            print(f'  {self.name}: {self.cases} cases, {self.told - self.start:.0f} s {problem}', flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# checks: functions of (tally, trainer or format, number of cases, random.Random)


def kill(tally, trainer, n, draw):
    """Runs that are killed up to five times, at any time or in a save, and resumed each time."""
    options = BY_STEP[trainer]
    reference, seconds = whole(trainer, *options)
    counting = SAVING.format(call=0, share=None, signal='SIGKILL')
    calls = train(trainer, *options, cwd=fresh(trainer), patch=counting).out.count('saving: ')
    tally.measured['in a save'] = 0
    while tally.cases < n:
        cwd, moments, in_saves = fresh(trainer), [], 0
        for _ in range(min(5, n - tally.cases)):
            patch, delay = '', draw.uniform(0, seconds / 2)
            if in_save := draw.random() < 0.4:
                patch = SAVING.format(call=draw.randint(1, calls), share=draw.random(), signal='SIGKILL')
            child = train(trainer, *options, cwd=cwd, patch=patch, start=begin)
            if not in_save:
                time.sleep(delay)
                os.kill(child.pid, signal.SIGKILL)
            done = end(child)
            if done.code == 0:                      # it was faster
                break
            moments.append(done.out.strip().split('\n')[-1].removeprefix('saving: ') if in_save else f'{delay:.2f} s')
            in_saves += in_save
            if done.code != -signal.SIGKILL:
                break
        if moments:
            tally.measured['in a save'] += in_saves
            with tally.case(', '.join(moments), times=len(moments)):
                expect(done.code in (0, -signal.SIGKILL), f'exit status {done.code}: {last_line(done)}')
                train(trainer, *options, cwd=cwd)
                same_run(trainer, cwd, reference)


def resume(tally, trainer, n, draw):
    """Stopped in a step and resumed, again and again: one pass with dropout, one with another optimizer."""
    for options in (BY_STEP[trainer], SECOND[trainer]):
        (reference, _), cwd = whole(trainer, *options), fresh(trainer)
        stops = sorted(draw.sample(range(STEPS), min(STEPS, max(1, n // 2))))
        for step in stops:
            with tally.case('step', step + 1, *options):
                done = train(trainer, *options, cwd=cwd, patch=kill_at(step))
                expect(f'stopped at step {step + 1};' in done.out, last_line(done))
                expect(checkpoint(cwd)['step'] == step + 1, f'the checkpoint is of step {checkpoint(cwd)["step"]}')
                if step == stops[-1]:
                    train(trainer, *options, cwd=cwd)
                    same_run(trainer, cwd, reference)


def sigterm(tally, trainer, n, draw):
    """A SIGTERM in a step, in an evaluation, in a save, or at any time after the first step."""
    options, waits = BY_STEP[trainer], []
    reference, seconds = whole(trainer, *options)
    calls = train(trainer, *options, cwd=fresh(trainer), patch=SAVING.format(call=0, share=None, signal='SIGTERM')).out
    first = calls[:calls.index('step 1:')].count('saving: ')            # those before training: of config.py and the log
    calls = calls.count('saving: ')
    while tally.cases < n:
        where, cwd = ('training', 'evaluation', 'saving', 'any time')[tally.cases % 4], fresh(trainer)
        step, call = draw.randrange(1, STEPS), draw.randint(first + 1, calls)
        patch = {'training': kill_at(step), 'any time': '',
                 'evaluation': IN_EVALUATION.format(after=(step + 3) // 4 * 4 - 1, rank=0, signal='SIGTERM'),
                 'saving': SAVING.format(call=call, share=None, signal='SIGTERM')}[where]
        child = train(trainer, *options, cwd=cwd, patch=TIMED + patch, start=begin)
        if where == 'any time':
            out = child.streams / 'stdout'
            while not (out.exists() and 'step 1:' in out.read_text()) and child.poll() is None:
                time.sleep(0.002)
            time.sleep(draw.uniform(0, seconds / 2))
            if child.poll() is not None:            # it was faster
                end(child)
                continue
            signalled = time.monotonic()
            os.kill(child.pid, signal.SIGTERM)
        done = end(child)
        with tally.case(where, step if where != 'saving' else f'call {call}'):
            if where != 'any time':
                signalled = float((cwd / 'signalled').read_text())
            waits.append(done.at - signalled)
            expect(done.code == 0, f'exit status {done.code}: {last_line(done)}')
            told, step = re.search(r'stopped at step (\d+);', done.out), checkpoint(cwd)['step']
            expect(step == (int(told[1]) if told else STEPS), f'the checkpoint is of step {step}: {last_line(done)}')
            train(trainer, *options, cwd=cwd)
            same_run(trainer, cwd, reference)
        tally.measured['longest wait, s'] = round(max(waits, default=0), 2)


def processes(tally, trainer, n, draw):
    """The same global batches as 1 process x 4 micro-batches, 2 x 2 and 4 x 1: losses of the log."""
    losses = {}
    for world in (1, 2, 4):
        cwd = fresh(trainer)
        with tally.case(f'{world} x {4 // world}'):
            with socket.socket() as s:
                s.bind(('127.0.0.1', 0))
                port = s.getsockname()[1]
            ranks = [dict(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(world), MASTER_ADDR='127.0.0.1',
                          MASTER_PORT=str(port)) for r in range(world if world > 1 else 0)]
            children = [train(trainer, cwd=cwd, start=begin, **rank) for rank in ranks or [{}]]
            for done in map(end, children):
                expect(done.code == 0, f'exit status {done.code}: {last_line(done)}')
            losses[world] = [r.get('loss', r.get('val_loss')) for r in tiny.log(cwd) if 'loss' in r or 'val_loss' in r]
            off = [abs(a - b) / abs(b) for a, b in zip(losses[world], losses[1], strict=True)]
            tally.measured[f'{world} x {4 // world}'] = {'first 5': max(off[:5]), 'all': max(off)}
            expect(max(off) <= TOLERANCE[trainer], f'losses differ by {max(off):.2g}')


def nan(tally, trainer, n, draw):
    """A NaN in one micro-batch's loss, or a NaN or an infinite number as gradient of one parameter, in a random step."""
    options = BY_STEP[trainer]
    reference, _ = whole(trainer, *options)
    names = [k for k, t in checkpoint(reference)['model'].items()
             if t.is_floating_point() and 'running_' not in k and k != 'lm_head.weight']
    for i in range(n):
        step, name, value = draw.randrange(STEPS - 1), draw.choice(names), draw.choice(['nan', 'inf'])
        what, patch = ((f'loss of micro-batch {i % 4}', NAN_LOSS.format(call=4 * step + i % 4 + 1, rank=0)) if i % 2 else
                       (f'{value} in {name}', tiny.bad_gradient(step, name, value)))
        with tally.case(f'step {step}:', what):
            cwd = fresh(trainer)
            line = one_error(train(trainer, *options, cwd=cwd, patch=patch, code=None))
            expect(f'at step {step};' in line, line)
            train(trainer, *options, cwd=cwd)
            same_run(trainer, cwd, reference)


@contextlib.contextmanager
def small_disk(folder, size):
    """A tmpfs of so many bytes as `folder`; yields a function that makes room on it, or None where mounting is not allowed."""
    folder.mkdir(exist_ok=True)
    mount = lambda *words: subprocess.run(['mount', '-t', 'tmpfs', *words, 'none', folder], capture_output=True).returncode == 0
    try:
        mounted = mount('-o', f'size={size}')
    except FileNotFoundError:
        mounted = False
    try:
        yield (lambda: mount('-o', 'remount,size=64m')) if mounted else None
    finally:
        if mounted:
            subprocess.run(['umount', '-l', folder], check=True)


def disk(tally, trainer, n, draw):
    """A disk that is full early or late, once or for good: an error at a write, a small tmpfs, a limit of file sizes."""
    options = BY_STEP[trainer]
    reference, _ = whole(trainer, *options)
    writes = train(trainer, *options, cwd=fresh(trainer), patch=FULL.format(where='False')).out.count('writing ')
    begun = fresh(trainer)
    train(trainer, *options, cwd=begun, patch=kill_at(6))
    size_of = lambda where: sum(-(-p.stat().st_size // 4096) * 4096 for p in where.rglob('*') if p.is_file())
    largest, total, first = (reference / 'out/last.pt').stat().st_size, size_of(reference / 'out'), size_of(begun / 'out')
    for i in range(n):
        kind, continued = ('write', 'tmpfs', 'limit')[i % 3], draw.random() < 0.5
        call, once, size = draw.randint(1, writes), draw.random() < 0.5, int(draw.uniform(0.05, 1.1) * largest)
        space = first * continued + int(draw.uniform(0.05, 1) * (total + largest - first * continued))
        cwd = fresh(trainer)
        with contextlib.ExitStack() as stack:
            room = stack.enter_context(small_disk(cwd / 'out', space)) if kind == 'tmpfs' else None
            if kind == 'tmpfs' and not room:
                kind = 'limit'
            patch, what = {'write': (FULL.format(where=f'len(writes) {"==" if once else ">="} {call}'),
                                     f'write {call}' + ' and all later ones' * (not once)),
                           'limit': (LIMIT.format(size=size), f'files of at most {size:,} bytes'),
                           'tmpfs': ('', f'tmpfs of {space:,} bytes')}[kind]
            if continued:
                shutil.copytree(begun / 'out', cwd / 'out', dirs_exist_ok=True)
            tally.measured[kind] = tally.measured.get(kind, 0) + 1
            with tally.case(what, '(resumed)' * continued):
                full_disk(tally, trainer, options, cwd, patch, room, reference, 7 * continued)


def full_disk(tally, trainer, options, cwd, patch, room, reference, saved):
    """One case of disk(). saved: step of the checkpoint that was there before."""
    state = lambda: tiny.assert_same_state(checkpoint(cwd), checkpoint(reference), ('step', 'model', 'optimizer'))
    done = train(trainer, *options, cwd=cwd, patch=patch, code=None)
    if done.code:
        one_error(done)
    else:                                           # all was kept
        state()
        tiny.assert_same_state(checkpoint(cwd, 'best.pt'), checkpoint(reference, 'best.pt'), ('step', 'model'))
        for name in LAST_FILES[trainer]:
            expect((cwd / 'out' / name).read_bytes() == (reference / 'out' / name).read_bytes(), f'{name} differs')
    key = 'finished' if done.code == 0 else 'refused'
    tally.measured[key] = tally.measured.get(key, 0) + 1
    no_left_overs(cwd)
    for name in ('best.pt', 'last.pt') if saved else ():
        expect(checkpoint(cwd, name), name)
    expect(not saved or checkpoint(cwd)['step'] >= saved, 'an older checkpoint is lost')
    if room:
        room()
    train(trainer, *options, cwd=cwd)
    state()
    checkpoint(cwd, 'best.pt')


# ---------------------------------------------------------------------------------------------------------------------
# damaged files


def damageable(kind):
    """(path of a good file, a function that reads it from there, a trainer, the command that reads it)."""
    from pretrained import hf
    from readers import tokens
    from train_gpt import GPT, GPTConfig
    place, new = Path(tempfile.mkdtemp(dir=WORK, prefix='damaged')), ('tiny.py', '--out_dir=new', '--max_iters=1')
    if kind == 'token file':
        shutil.copytree(DATA['text'], place / 'text')

        def read():
            data = tokens.load(place / 'text', 'train')
            return [data.windows([0], len(data)), data.n_bytes, data.tokenizer.describe()]
        return place / 'text/train_000000.bin', read, 'train_gpt', ('train_gpt.py', *new, f'--dataset={place}/text')
    if kind == 'adapters':
        lora = whole('finetune_cls', '--method=lora', '--rank=2')[0]
        shutil.copytree(lora / 'out' / 'base', place / 'base')
        shutil.copytree(next(lora.glob('out/*lora*')), place / 'lora')

        def read():
            net, _, names, fresh = hf.load(str(place / 'lora'), ['n', 'p'])
            return [net.state_dict(), names, fresh]
        return (place / 'lora/adapter_model.safetensors', read, 'finetune_cls',
                ('finetune_cls.py', *new, '--init_from=pretrained', f'--model={place}/lora'))
    path = place / {'checkpoint': 'last.pt', 'packed file': 'packed.safetensors'}[kind]
    shutil.copy(whole('train_gpt')[0] / 'out' / path.name, path)
    if kind == 'checkpoint':
        return path, lambda: common.read_checkpoint(str(path)), 'train_gpt', ('train_gpt.py', *new, f'--resume={path}')

    def read():
        meta, tensors = common.read_packed(str(path))
        model = common.load_packed(GPT(GPTConfig(**meta['model_config'])), tensors)
        return [model.state_dict(), *(meta[key] for key in ('trainer', 'step', 'model_config', 'tokenizer', 'val_loss'))]
    return path, read, 'train_gpt', ('sample.py', f'--ckpt={path}', '--max_new_tokens=1', '--device=cpu')


def damage(tally, kind, n, draw):
    """A file cut at ten places, read by a command, and with one byte changed, read by the function that all commands use."""
    path, read, trainer, command = damageable(kind)
    good, cwd = path.read_bytes(), fresh(trainer)
    run(*command, '--overwrite=True' if 'tiny.py' in command else '--seed=1', cwd=cwd, code=0)
    shutil.rmtree(cwd / 'new', ignore_errors=True)
    cuts = [0, len(good) - 1, *(draw.randrange(len(good)) for _ in range(8))][:max(1, n // 100)]
    for cut in cuts:
        with tally.case(f'cut to {cut} bytes'):
            path.write_bytes(good[:cut])
            line = one_error(run(*command, cwd=cwd))
            expect(path.name in line or str(path.parent) in line, line)
    path.write_bytes(good)
    flips = []
    for i in range(n):                              # half of them where the headers are
        edge, end_too = draw.randrange(min(4096, len(good))), draw.random() < 0.5
        at = draw.randrange(len(good)) if i % 2 else len(good) - 1 - edge if end_too else edge
        flips.append((at, draw.randrange(1, 256)))
    found = in_fork(read_all, path, good, read, flips)
    path.write_bytes(good)
    tally.cases += len(flips)
    tally.done.append(f'{len(flips)} bytes changed of {len(good)}')
    counts = {key: sum(what == key for what, _ in found) for key in ('refused', 'harmless')}
    tally.measured |= {'cut': len(cuts), 'bytes': len(good), **counts}
    wrong = [f'byte {at} ^ {by}: {problem}' for (at, by), (what, problem) in zip(flips, found, strict=True) if what == 'wrong']
    tally.bad += len(wrong)
    tally.wrong += wrong


def read_all(path, good, read, flips):
    """[what happened, problem] for each changed byte: refused by a line that names the file, harmless (all that is loaded is
    bit-equal), or wrong."""
    warnings.simplefilter('ignore')
    expected, found = tiny.flat(read()), []
    for at, by in flips:
        path.write_bytes(good[:at] + bytes([good[at] ^ by]) + good[at + 1:])
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                got = tiny.flat(read())
            same = got.keys() == expected.keys() and all(
                torch.equal(got[k], t) and got[k].dtype == t.dtype if torch.is_tensor(t) else got[k] == t
                for k, t in expected.items())
            found.append(('harmless', '') if same else ('wrong', 'loaded other values'))
        except (ValueError, SystemExit) as e:
            line = said.getvalue() or str(e)
            named = path.name in line or str(path.parent) in line
            found.append(('refused', '') if named and line.strip().count('\n') == 0 else ('wrong', f'says {line[:200]}'))
        except Exception as e:                      # noqa: BLE001  that is what the check looks for
            found.append(('wrong', f'{type(e).__name__}: {e}'[:200]))
    return found


@functools.cache
def sentences():
    """A folder of labelled texts, for ptq.py."""
    from readers import texts
    folder = Path(tempfile.mkdtemp(dir=WORK, prefix='sentences'))
    rows = [(f'{word} film', 'np'[word == 'good']) for word in ('good', 'bad') * 8]
    task = {'task': 'films', 'labels': ['n', 'p'], 'text': ['text'], 'label': 'label', 'source': 'here', 'revision': '1'}
    with contextlib.redirect_stdout(io.StringIO()):
        texts.build(folder, task, {split: lambda: iter(rows) for split in ('train', 'val')})
    return folder


class Bomb:
    """An object whose unpickling makes the folder `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def pickles(tally, _, n, draw):
    """A pickle that would make a folder, raw and in a file of torch.save(), wherever a command takes a file. Code in a model
    folder."""
    place, mark = Path(tempfile.mkdtemp(dir=WORK, prefix='pickles')), WORK / 'unpickled'
    (place / 'raw.pt').write_bytes(pickle.dumps(Bomb(str(mark))))
    about = {'version': common.CHECKPOINT_VERSION, 'trainer': 'train_gpt', 'step': 1}
    torch.save(about | {'model': Bomb(str(mark))}, place / 'zip.pt')
    pickle.loads((place / 'raw.pt').read_bytes())    # our own bytes: without an effect they prove nothing
    expect(mark.is_dir(), 'the pickle does nothing')
    mark.rmdir()
    model = whole('finetune_cls')[0] / 'out' / 'distilbert-scratch-csv-full'
    lora, = whole('finetune_cls', '--method=lora', '--rank=2')[0].glob('out/*lora*')
    image = place / 'image.ppm'
    image.write_bytes(b'P6 16 16 255\n' + bytes(768))

    def folder(name, source, gone, new, content):
        shutil.copytree(source, place / name)
        (place / name / gone).unlink()
        (place / name / new).write_bytes(content)
        return place / name
    cases = []
    for raw in ('raw', 'zip'):
        bomb, content = place / f'{raw}.pt', (place / f'{raw}.pt').read_bytes()
        shutil.copy(bomb, place / f'{raw}.safetensors')
        cases += [(f'{trainer}.py', trainer, 'tiny.py', f'--resume={bomb}') for trainer in TRAINERS]
        cases += [(f'{trainer}.py', trainer, 'tiny.py', f'--init_from={bomb}') for trainer in TRAINERS[:3]]
        for end in ('pt', 'safetensors'):
            cases += [('sample.py', 'train_gpt', f'--ckpt={place}/{raw}.{end}', '--device=cpu'),
                      ('ptq.py', 'train_gpt', f'--ckpt={place}/{raw}.{end}', '--device=cpu'),
                      ('train_cnn.py', 'train_cnn', f'--predict={image}', f'--resume={place}/{raw}.{end}')]
        shutil.copytree(DATA['text'], place / f'text_{raw}')
        (place / f'text_{raw}/train_000000.bin').write_bytes(content)
        cases += [('train_gpt.py', 'train_gpt', 'tiny.py', f'--dataset={place}/text_{raw}')]
        whole_model = folder(f'model_{raw}', model, 'model.safetensors', 'pytorch_model.bin', content)
        gpt2 = folder(f'gpt2_{raw}', model, 'model.safetensors', 'pytorch_model.bin', content)
        (gpt2 / 'config.json').write_text(json.dumps({'model_type': 'gpt2', 'n_layer': 2, 'n_head': 2, 'n_embd': 32,
                                                      'architectures': ['GPT2LMHeadModel'], 'vocab_size': 250}))
        adapted = [folder(f'lora_{raw}_{new}', lora, 'adapter_model.safetensors', new, content)
                   for new in ('adapter_model.safetensors', 'adapter_model.bin')]
        for where in (whole_model, *adapted):
            cases += [('finetune_cls.py', 'finetune_cls', 'tiny.py', '--init_from=pretrained', f'--model={where}'),
                      ('ptq.py', 'finetune_cls', f'--ckpt={where}', f'--dataset={sentences()}', '--device=cpu')]
        cases += [('bench.py', 'train_gpt', 'stats', 'half', where, '--threads=1') for where in (bomb, whole_model)]
        cases += [('ptq.py', 'train_gpt', f'--ckpt={gpt2}', f'--text={DATA["table"]}', '--device=cpu'),
                  ('train_gpt.py', 'train_gpt', 'tiny.py', f'--init_from=gpt2_{raw}', '--bias=True')]
    code = f'import os\nos.mkdir({str(mark)!r})\n'.encode()
    for kind in ('own', 'distilbert'):              # a model class in the folder, of a new or of a known type of model
        where = folder(f'code_{kind}', model, 'tokenizer_config.json', 'evil.py', code)
        config = json.loads((where / 'config.json').read_text())
        (where / 'config.json').write_text(json.dumps(config | {'model_type': kind, 'auto_map': {
            'AutoConfig': 'evil.Config', 'AutoModelForSequenceClassification': 'evil.Model'}}))
        (where / 'tokenizer_config.json').write_text(json.dumps({'auto_map': {'AutoTokenizer': ['evil.T', None]}}))
        cases += [('finetune_cls.py', 'finetune_cls', 'tiny.py', '--init_from=pretrained', f'--model={where}')]
    for script, trainer, *words in draw.sample(cases, min(n, len(cases))) if n < len(cases) else cases:
        with tally.case(script, *(str(word).replace(f'{place}/', '').replace(f'{WORK}/', '') for word in words)):
            cwd = fresh(trainer)
            for raw in ('raw', 'zip'):
                (cwd / f'gpt2_{raw}').symlink_to(place / f'gpt2_{raw}')
            done = run(script, *words, cwd=cwd)
            ran = mark.exists()
            mark.is_dir() and mark.rmdir()
            expect(not ran, 'THE CODE RAN')
            if 'code_distilbert' not in words[-1]:  # its weights are plain; only the code is not used
                one_error(done)


def network(tally, trainer, n, draw):
    """Runs with HF_HUB_OFFLINE unset, in which every connection but a local one fails."""
    reference, gpt = whole(trainer)[0], whole('train_gpt')[0]
    out, tried = reference / 'out', []
    cases = [(f'{trainer}.py',)]
    if trainer in ('train_gpt', 'train_bitnet'):
        cases += [('sample.py', f'--ckpt={out}', '--max_new_tokens=2', '--device=cpu')]
        if trainer == 'train_gpt':
            cases += [('ptq.py', f'--ckpt={out}', '--schemes=rtn4', '--group=16', '--time_rounds=1', '--device=cpu')]
    elif trainer == 'train_cnn':
        (gpt / 'image.ppm').write_bytes(b'P6 16 16 255\n' + bytes(768))
        cases += [('train_cnn.py', f'--predict={gpt}/image.ppm', f'--resume={out}/best.pt')]
    else:
        lora, = whole(trainer, '--method=lora', '--rank=2')[0].glob('out/*lora*')
        new = ('finetune_cls.py', 'tiny.py', '--max_iters=2', '--init_from=pretrained')
        cases += [(*new, f'--model={out}/distilbert-scratch-csv-full'), (*new, f'--model={lora}'),
                  (*new, f'--model={out}/distilbert-scratch-csv-full', '--eval_only=True'),
                  ('ptq.py', f'--ckpt={out}/distilbert-scratch-csv-full', f'--dataset={sentences()}', '--schemes=rtn4',
                   '--group=16', '--time_rounds=1', '--device=cpu')]
    for script, *words in cases:
        cwd = fresh(trainer)
        with tally.case(script, *(word.replace(f'{WORK}/', '') for word in words)):
            if words:
                run(script, *words, cwd=cwd, patch=forked.SHORT_TIMES * (script == 'ptq.py') + NO_NETWORK, code=0)
            else:
                train(trainer, cwd=cwd, patch=NO_NETWORK)
                same_run(trainer, cwd, reference)
            tried += (cwd / 'tried').read_text().splitlines() if (cwd / 'tried').exists() else []
    tally.measured['connections tried'] = len(tried)
    tally.done += sorted(set(tried))


# ---------------------------------------------------------------------------------------------------------------------
# the matrix and its table


def total(rows, key):
    return sum(r['measured'].get(key, 0) for r in rows)


def of_processes(rows):
    text = []
    for r in rows:
        off = [v for k, v in r['measured'].items() if k != '1 x 4']
        first, most = (max((v[key] for v in off), default=math.nan) for key in ('first 5', 'all'))
        text.append(f'{r["of"]} {"bit-equal" if most == 0 else f"{most:.1g}"}'
                    + (f' ({first:.1g} in the first five records)' if most else ''))
    return 'largest relative difference of a loss: ' + ', '.join(text)


def of_damage(rows):
    r, = rows
    m = {'cut': 0, 'bytes': 0, 'refused': 0, 'harmless': 0} | r['measured']
    return (f'cut at {m["cut"]} places; {r["cases"] - m["cut"]:,} times one byte of {m["bytes"]:,} changed, half of them in '
            f'the first or last 4 KiB: {m["refused"]} refused, {m["harmless"]} harmless')


# name: (fault, what must come out, function, [what of], cases for each, text of what was measured)
FIFTY = dict(zip(TRAINERS, (13, 13, 12, 12), strict=True))
CHECKS = {
    'kill': ('SIGKILL', 'the resumed run ends bit-equal to the unbroken one', kill, dict.fromkeys(TRAINERS, 50),
             lambda rows: f'{total(rows, "in a save")} of the kills in a save; last.pt, best.pt, log and packed file compared'),
    'resume': ('stop after each step', 'status 0, a checkpoint of that step; bit-equal end', resume,
               dict.fromkeys(TRAINERS, 40),
               lambda rows: '20 steps, one pass with AdamW and dropout, one with rSVD or Muon'),
    'sigterm': ('SIGTERM', 'status 0, a checkpoint of its step; bit-equal end', sigterm, FIFTY,
                lambda rows: 'in training, evaluation and saving; longest wait for the end '
                             f'{max(r["measured"].get("longest wait, s", 0) for r in rows)} s'),
    'processes': ('1 x 4, 2 x 2, 4 x 1', 'processes x micro-batches of one global batch: the same losses', processes,
                  dict.fromkeys(TRAINERS, 3), of_processes),
    'nan': ('NaN', 'status 2, the step is named; the resumed run ends bit-equal', nan, dict.fromkeys(TRAINERS, 5),
            lambda rows: 'in the loss of a micro-batch or in the gradient of one parameter'),
    'disk': ('full disk', 'no traceback; older checkpoints stay; status 0 only if all was kept; resumed, the same weights',
             disk, dict.fromkeys(TRAINERS, 20),
             lambda rows: f'{total(rows, "write")} failed writes, {total(rows, "tmpfs")} small file systems, '
                          f'{total(rows, "limit")} limits of file sizes; {total(rows, "finished")} ended with status 0'),
    'damage': ('damaged', 'refused, and the file named; or all that is loaded is bit-equal', damage,
               dict.fromkeys(('checkpoint', 'packed file', 'token file', 'adapters'), 1000), of_damage),
    'pickles': ('malicious pickle', 'its code never runs; one line', pickles, {'every loader': 100},
                lambda rows: 'given to --resume, --init_from, --ckpt, --predict, --dataset, --model and bench.py, in folders '
                             'of models and adapters, raw and in a file of torch.save(); code beside a model'),
    'network': ('no network', 'all runs work', network, dict.fromkeys(TRAINERS, 1),
                lambda rows: f'HF_HUB_OFFLINE unset; {total(rows, "connections tried")} connections tried'),
}


def labelled(rows):
    """[(label of a row of the table, its lines)] in the order of CHECKS; a file format is a row, trainers share one."""
    for name, (fault, *_) in CHECKS.items():
        found = [r for r in rows if r['check'] == name]
        if name == 'damage':
            yield from ((f'{fault} {r["of"]}', [r]) for r in found)
        elif found:
            yield fault, found


def lines_of(rows):
    columns = {'fault': lambda x: x[0], 'as promised': lambda x: f'{sum(r["good"] for r in x[1]):,} of '
               f'{sum(r["cases"] for r in x[1]):,}', 'promise': lambda x: CHECKS[x[1][0]['check']][1],
               'what was done and measured': lambda x: CHECKS[x[1][0]['check']][4](x[1])}
    r = rows[-1]
    minutes = sum(x['seconds'] for x in rows) / 60
    lines = [f'`make faults`: {sum(x["cases"] for x in rows):,} cases on the four trainers, runs of {STEPS} steps on small '
             f'data; {r["machine"]}, Python {r["python"]}, torch {r["torch"]}; the checks took {minutes:.0f} minutes together, '
             'beside other work.', '', *table(columns, labelled(rows)), '',
             'A changed byte is harmless where it means nothing: padding, a date in a zip, an unused entry of a header. The '
             'tokens of a split are compared with their checksums if it has at most 1 GiB. Files of earlier versions, adapters '
             'of peft and the `model.safetensors` of a whole Hugging Face folder, which transformers writes, have no checksum.']
    if wrong := [f'- {r["check"]} {r["of"]}: {line}' for r in rows for line in r['wrong']]:
        lines += ['', 'Not as promised:', '', *wrong]
    return lines


def check(name, of, scale):
    """Run one check; the line for the log."""
    tally = Tally(f'{name} {of}')
    _, _, function, counts, _ = CHECKS[name]
    start = time.monotonic()
    try:
        function(tally, of, max(1, round(counts[of] * scale)), random.Random(f'{SEED} {name} {of}'))
    except BaseException as e:                      # noqa: BLE001  the check failed, the others go on
        traceback.print_exc()
        tally.cases, tally.bad = tally.cases + 1, tally.bad + 1
        tally.wrong.append(f'the check ended: {type(e).__name__}: {e}')
    return {'check': name, 'of': of, 'cases': tally.cases, 'good': tally.cases - tally.bad, 'measured': tally.measured,
            'wrong': tally.wrong[:20], 'done': tally.done, 'seed': SEED, 'scale': scale,
            'seconds': round(time.monotonic() - start, 1), 'machine': common.device_name(torch.device('cpu')),
            'python': platform.python_version(), 'torch': torch.__version__}


def chosen(only):
    """[(check, trainer or format)] of --only: names of checks, or check/of."""
    pairs = [(name, of) for name, spec in CHECKS.items() for of in spec[3]]
    wanted = only.split(',') if only else list(CHECKS)
    if unknown := [w for w in wanted if w not in CHECKS and tuple(w.split('/')) not in pairs]:
        sys.exit(f'error: --only={unknown[0]} is none of {", ".join(CHECKS)}, nor one of them with /train_gpt or the like')
    return [pair for pair in pairs if pair[0] in wanted or '/'.join(pair) in wanted]


def run_all(pairs, scale, jobs):
    """The lines of these checks; so many at a time, each in a fork."""
    global WORK
    importlib.import_module('preload')
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix='faults') as folder:
        WORK = Path(folder)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            DATA.update(in_fork(tiny.write_data, WORK))     # its decoders start threads
        waiting, running, rows = list(pairs), {}, []
        while waiting or running:
            while waiting and len(running) < jobs:
                pair = waiting.pop(0)
                sys.stdout.flush()
                pid = os.fork()
                if not pid:
                    (WORK / '_'.join(pair)).write_text(json.dumps(check(*pair, scale)))
                    sys.stdout.flush()
                    os._exit(0)
                running[pid] = pair
            pair = running.pop(os.wait()[0])
            rows.append(json.loads((WORK / '_'.join(pair)).read_text()))
            print(f'{len(rows)}/{len(pairs)} {" ".join(pair)}: {rows[-1]["good"]} of {rows[-1]["cases"]} as promised, '
                  f'{rows[-1]["seconds"]:.0f} s', flush=True)
    return sorted(rows, key=lambda r: pairs.index((r['check'], r['of'])))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default='', help='checks, separated by commas: ' + ', '.join(CHECKS))
    parser.add_argument('--scale', type=float, default=1.0, help='share of the cases; below 1 nothing is stored')
    parser.add_argument('--jobs', type=int, default=2, help='checks at a time')
    parser.add_argument('--table', action='store_true', help='run nothing')
    a = parser.parse_args()
    new = [] if a.table else run_all(chosen(a.only), a.scale, a.jobs)
    if new and a.scale != 1:
        print('\n'.join(lines_of(new)))
    else:
        rows = {(r['check'], r['of']): r for r in [*keep.read('faults'), *new]}
        order = [pair for pair in chosen('') if pair in rows] or sys.exit('error: no results/faults.jsonl; type: make faults')
        if new:
            keep.write('faults.jsonl', ''.join(json.dumps(rows[pair]) + '\n' for pair in order))
        keep.publish('faults', lines_of([rows[pair] for pair in order]))
    sys.exit(any(r['good'] < r['cases'] for r in new))


if __name__ == '__main__':
    main()
