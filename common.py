"""
Functions that all trainers share: processes, order of samples, learning rate, means over tokens and ranks, checkpoints,
packed files, the run folder and its log, stop signals, memory and energy meters.

They take plain arguments and depend on no trainer, model or constants block. If two trainers had different copies of one of
them, a published number could be wrong. Everything else belongs in the trainers.
"""
import contextlib
import errno
import functools
import glob
import json
import math
import os
import pickle
import platform
import resource
import shlex
import shutil
import signal
import stat
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from datetime import timedelta
from itertools import accumulate

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from configurator import fail, save
from layers import pack

CHECKPOINT_VERSION = 1

# ---------------------------------------------------------------------------------------------------------------------
# processes


def setup_processes(device=''):
    """Join the process group of torchrun (nccl for CUDA, else gloo). Returns (rank, local_rank, world_size, torch.device).
    Without torchrun there is one process and no group. device '' means CUDA if available, else the CPU."""
    rank, local_rank, world = (int(os.environ.get(k, d)) for k, d in (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))
    kind = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        name = f'cuda:{local_rank}' if kind == 'cuda' else kind
        device = torch.device(name)
        torch.zeros(1, device=device).item()        # torch.device() also accepts devices that cannot compute
    except (RuntimeError, AssertionError):
        fail(f'torch cannot use device={name!r} in process {local_rank}; type --device=cpu, or run no more processes than GPUs')
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    if 'RANK' in os.environ and not dist.is_initialized():
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo', timeout=timedelta(minutes=30))
        any_rank(False)                             # all have joined: a rank that fails now breaks no other's connection
    return rank, local_rank, world, device


def close_processes():
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        # A gloo thread frees the tensors of the last collective shortly after its result arrives, and needs the GIL for it.
        # destroy_process_group() waits for that thread while it holds the GIL. Without this pause one run in 20 hangs here.
        time.sleep(0.1)
        dist.destroy_process_group()


def autocast(device, dtype):
    """The autocast context for a trainer's key `dtype`: float32, bfloat16, or '' for bfloat16 on CUDA and float32 elsewhere."""
    if dtype not in ('', 'float32', 'bfloat16'):
        fail(f'dtype={dtype!r}; type --dtype=float32 or --dtype=bfloat16', rank0_only=True)
    low = dtype == 'bfloat16' or not dtype and device.type == 'cuda'
    return torch.autocast(device.type, torch.bfloat16, enabled=low)


def attention(q, k, v, **options):
    """F.scaled_dot_product_attention of (..., T, head) tensors. On a CPU, training in bf16 computes up to 128 tokens in fp32:
    the backward pass of bf16 takes several times as long there (torch 2.13). Longer contexts gain little, and fp32 keeps twice
    the bytes."""
    if q.device.type == 'cpu' and q.dtype == torch.bfloat16 and q.shape[-2] <= 128 and torch.is_grad_enabled():
        with torch.autocast('cpu', enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, **options)


def distributed(model, device, local_rank):
    """Wrap `model` in DistributedDataParallel. Gradients are views into its buckets, not copies. Forward passes do not send
    buffers: rotary tables are constant, and train_cnn.py averages its BatchNorm statistics itself."""
    ddp = torch.nn.parallel.DistributedDataParallel(model, device_ids=[local_rank] if device.type == 'cuda' else None,
                                                    gradient_as_bucket_view=True)
    ddp.broadcast_buffers = False                   # torch deprecates the argument of this name
    return ddp


def split_batch(batch_size, micro_batch_size, world):
    """Split the global batch. Returns (samples in one micro-batch of a process, micro-batches per step and process).
    micro_batch_size=0: one micro-batch holds the whole share of a process."""
    micro = micro_batch_size or batch_size // world
    if micro < 1 or batch_size % (micro * world):
        fail(f'batch_size={batch_size} is no multiple of micro_batch_size={micro} x {world} processes', rank0_only=True)
    return micro, batch_size // (micro * world)


def check_config(config, known, at_least):
    """Call fail() if a config[key] is not in known[key], or is less than at_least[key] or nan."""
    for key, values in known.items():
        if config[key] not in values:
            fail(f'{key}={config[key]!r} is none of {", ".join(map(repr, values))}', rank0_only=True)
    for key, least in at_least.items():
        if not config[key] >= least:
            fail(f'{key}={config[key]} must be {least} or more', rank0_only=True)


def _gathered(values):
    """Gather one list of numbers from each rank: float64 tensor (world_size, len(values))."""
    mine = torch.tensor(values, dtype=torch.float64)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return mine[None]
    mine = mine.cuda() if dist.get_backend() == 'nccl' else mine
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    return torch.stack(every).cpu()


def mean_over_ranks(total, count):
    """Sum of `total` over ranks / sum of `count` over ranks, in float64: the mean per token, even if counts differ by rank."""
    totals, counts = _gathered([float(total), float(count)]).sum(0).tolist()
    return totals / counts


def clip_(grads, max_norm, norm):
    """Scale gradients in place to a norm of at most max_norm, like torch.nn.utils.clip_grad_norm_. norm: theirs, a tensor."""
    torch._foreach_mul_(list(grads), (max_norm / (norm + 1e-6)).clamp(max=1.0))


def step_totals(loss_sum, count, norm, stopped):
    """(mean loss over `count` losses of each rank, gradient norm, True if any rank is stopped). loss_sum and norm: scalars on
    the device. A step waits for the device only here (transformers also looks at the padding of each micro-batch), and all
    ranks get the same three values."""
    mine = torch.stack([loss_sum, norm.to(loss_sum), loss_sum.new_full((), stopped)])
    every = [mine]
    if dist.is_initialized() and dist.get_world_size() > 1:
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(every, mine)
    losses, norms, flags = fetched(torch.stack(every, 1))
    return sum(losses) / (len(every) * count), norms[0], any(flags)


def fetched(t):
    """The numbers of a tensor as a list; waits for the device."""
    return t.tolist()


def to_device(t, device):
    """Copy a tensor from the CPU to the device without waiting for it."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' else t.to(device)


def any_rank(flag):
    """True on every rank if `flag` is true on any rank. Ranks use it to stop together."""
    return bool(_gathered([float(bool(flag))]).any())


def ranks_agree(*values):
    """True if every rank has the same numbers or strings, such as a step, a count or a checksum."""
    numbers = [float(zlib.crc32(v.encode())) if isinstance(v, str) else float(v) for v in values]
    every = _gathered(numbers)
    return bool((every == every[0]).all())


def checksum(tensors):
    """crc32 over the bytes of the tensors, in order. Equal parameters give equal checksums."""
    crc = 0
    for t in tensors:
        crc = zlib.crc32(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), crc)
    return crc


# ---------------------------------------------------------------------------------------------------------------------
# samples and schedule


def sample_indices(seed, step, n, count):
    """Draw the samples of a step with replacement: int64 array (count,) of indices in [0, n), a pure function of (seed, step).

    Every rank draws the whole global batch and takes its slice. So the batch does not depend on the world size, and a resumed
    run needs no saved state. Evaluation uses negative steps, which training never reaches.
    """
    key = np.array([seed % 2 ** 64, step % 2 ** 64], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).integers(0, n, count)


def epoch_indices(seed, start, n, count):
    """Draw samples without replacement: items start .. start + count - 1, int64, of an endless sequence of permutations of
    range(n), one per epoch. A pure function of its arguments. Each epoch has each sample once, for any batch size."""
    found = []
    while count:
        epoch, at = divmod(start, n)
        found.append(_permutation(seed, epoch, n)[at:at + count])
        start, count = start + len(found[-1]), count - len(found[-1])
    return np.concatenate(found)


@functools.lru_cache(2)
def _permutation(seed, epoch, n):
    # 2 ** 63 is far from the steps of sample_indices, so the two never share a key
    key = np.array([seed % 2 ** 64, 2 ** 63 + epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(n)


def seed_step(seed, step, rank):
    """Seed torch's generators for one step of one rank. Dropout then is a function of (seed, step, rank) too."""
    torch.manual_seed(int(np.random.SeedSequence([seed % 2 ** 64, step, rank]).generate_state(1, np.uint64)[0] >> 1))


SCHEDULES = ('cosine', 'linear', 'two_stage', 'constant')


def lr_at(step, schedule, learning_rate, min_lr, warmup_iters, max_iters, second_lr=None):
    """Learning rate of step 0 .. max_iters - 1: linear warm-up over `warmup_iters`, then

    cosine     half a cosine from learning_rate to min_lr at the last step (nanoGPT)
    linear     a line to min_lr
    two_stage  the same line in the first half of the run; in the second half the line that starts at second_lr in step 0
               (BitNet b1.58 Tips PDF, which also ends the weight decay there)
    constant   learning_rate
    """
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    done = min(1.0, (step - warmup_iters) / max(1, max_iters - 1 - warmup_iters))
    if schedule == 'cosine':
        return min_lr + (learning_rate - min_lr) * 0.5 * (1 + math.cos(math.pi * done))
    if schedule == 'linear':
        return min_lr + (learning_rate - min_lr) * (1 - done)
    if schedule == 'two_stage':
        peak = learning_rate if step < max_iters // 2 else second_lr
        return min_lr + (peak - min_lr) * (1 - done)
    if schedule == 'constant':
        return learning_rate
    raise ValueError(f'schedule {schedule!r} is none of {", ".join(SCHEDULES)}')


# ---------------------------------------------------------------------------------------------------------------------
# atomic files and checkpoints


def atomic_write(path, write):
    """Write a file atomically: call write(temporary path) in the same folder, flush to disk, rename to `path`. The old file
    stays until then. On an error (disk full, no permission, ...) removes the temporary file and raises OSError with `path`.
    """
    for left in glob.glob(f'{glob.escape(str(path))}.tmp*'):    # from a process that was killed while writing
        os.remove(left)
    tmp = f'{path}.tmp{os.getpid()}'
    try:
        # safetensors writes files that only their owner can read. Reading the umask changes it for all threads.
        # So an empty file is created, and the written file gets its mode.
        os.close(os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        mode = stat.S_IMODE(os.stat(tmp).st_mode)
        write(tmp)
        with open(tmp, 'rb') as f:
            os.fsync(f.fileno())
        os.chmod(tmp, mode)
        os.replace(tmp, path)
    except (OSError, RuntimeError) as e:            # torch.save raises RuntimeError
        raise OSError(f'could not write {path}: {_cause(e, tmp)}') from e
    finally:
        if os.path.exists(tmp):
            os.remove(tmp)
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _cause(error, path):
    """Why writing `path` failed, in a few words. torch and safetensors do not pass on the number of the error: torch.save says
    'unexpected pos 44992' when the disk is full. So a further write asks for the cause."""
    try:
        if getattr(error, 'errno', None) is None:
            with open(path, 'ab') as f:
                f.write(bytes(1 << 20))
    except OSError as e:
        error = e
    if getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT):
        return 'disk full'
    return getattr(error, 'strerror', None) or _first_line(error)


def _first_line(error):
    return f'{error}'.split('\n')[0] or type(error).__name__


def previous_path(path):
    """out/x/last.pt -> out/x/last.prev.pt"""
    root, ext = os.path.splitext(path)
    return f'{root}.prev{ext}'


def save_checkpoint(path, state, keep_previous=False):
    """Write `state` (tensors and plain types only) to `path`. With keep_previous the old file stays as *.prev.pt, and at every
    moment one of the two files is complete. Raises OSError; the old files are then unchanged."""
    def write(tmp):
        torch.save(dict(state, version=CHECKPOINT_VERSION, versions=versions()), tmp)
        previous = previous_path(path)
        # After a kill between the two renames both names are the same file, and renaming one to the other would do nothing.
        if keep_previous and os.path.exists(path) and not (os.path.exists(previous) and os.path.samefile(path, previous)):
            link = f'{tmp}.prev'
            try:
                os.link(path, link)                 # a second name, so that `path` itself always exists
            except OSError:                         # the file system has no hard links
                shutil.copyfile(path, link)
            os.replace(link, previous)
    atomic_write(path, write)


def read_checkpoint(path, trainer=None, mmap=False):
    """Read a checkpoint of save_checkpoint. Checks the CRC of every record, and executes no code from the file.

    mmap: the file is mapped and each tensor is read on first use, so reading only the weights does not load the optimizer
    state. Raises ValueError with one line that names the file if it is missing, damaged, not a checkpoint, of another version,
    or (if `trainer` is given) of another trainer.
    """
    if os.path.isdir(path):
        inside = sorted(glob.glob(os.path.join(glob.escape(path), '*.pt')))
        raise ValueError(f'{path} is a folder; type {" or ".join(inside) or "the path of a checkpoint in a run folder"}')
    if str(path).endswith('.gguf') and os.path.isfile(path):
        name = os.path.basename(path).removesuffix('.gguf')
        raise ValueError(f'{path} is a GGUF file; first type: python export.py --from={path} --out=out/{name}')
    if str(path).endswith('.safetensors') and os.path.isfile(path):
        raise ValueError(f'{path} is a packed file, whose codes cannot be trained; type the path of a checkpoint *.pt')
    try:
        with zipfile.ZipFile(path) as z:
            # torch treats a record with the DOS folder bit as empty and leaves its tensor uninitialized
            bad = z.testzip() or next((i.filename for i in z.infolist() if i.external_attr & 0x10), None)
        state = bad or torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise ValueError(f'{path} does not exist') from None
    except pickle.UnpicklingError as e:
        raise ValueError(f'{path} holds more than tensors and plain types; refused ({type(e).__name__})') from None
    except (MemoryError, PermissionError) as e:
        raise ValueError(f'{path} cannot be read ({_first_line(e)[:90]})') from None
    except Exception as e:                          # noqa: BLE001  a damaged zip raises many types of error
        raise ValueError(f'{path} is damaged or no checkpoint ({_first_line(e)[:90]})') from None
    if bad:
        raise ValueError(f'{path} is damaged: record {bad} does not match its checksum')
    if not isinstance(state, dict) or 'version' not in state or 'trainer' not in state:
        raise ValueError(f'{path} is no nanobit checkpoint')
    if state['version'] != CHECKPOINT_VERSION:
        raise ValueError(f'{path} has checkpoint version {state["version"]}, this code reads {CHECKPOINT_VERSION}')
    if trainer and state['trainer'] != trainer:
        raise ValueError(f'{path} was written by {state["trainer"]}.py, not {trainer}.py')
    return state


def read_best(path, trainer, was_saved):
    """read_checkpoint() for best.pt at the end of a run. Raises OSError if no save of it succeeded."""
    if not was_saved:
        raise OSError(f'{path} could not be saved')
    return read_checkpoint(path, trainer)


def read_last_checkpoint(path, trainer=None, set_aside=False, mmap=False):
    """read_checkpoint(path). If `path` is damaged or missing, warns and reads its *.prev.pt. Raises ValueError if both fail.

    set_aside: rename a damaged file to *.pt.damaged. A run that saves to `path` again needs this: its next save would otherwise
    make the damaged file the previous one and lose the good one."""
    try:
        return read_checkpoint(path, trainer, mmap)
    except ValueError as e:
        previous = previous_path(path)
        if not os.path.exists(previous):
            raise
        state = read_checkpoint(previous, trainer, mmap)
        if set_aside and 'damaged' in str(e):
            with contextlib.suppress(OSError):      # another rank already renamed it, or the folder is read-only
                os.replace(path, f'{path}.damaged')
        print(f'warning: {e}; continuing from {previous} (step {state["step"]})', file=sys.stderr)
        return state


def save_or_warn(path, state, keep_previous=False):
    """save_checkpoint(); returns whether it succeeded. A full disk does not stop the run, and an old file stays."""
    try:
        save_checkpoint(path, state, keep_previous)
        return True
    except OSError as e:
        old = 'the last good checkpoint stays' if os.path.exists(path) else 'there is none yet'
        print(f'warning: {e}; {old}, training goes on', flush=True)
        return False


def load_optimizer(optimizer, saved):
    """Load the optimizer state of a checkpoint, but keep the hyperparameters of this run. The parameters must have the same
    order; their groups may differ. Raises ValueError if the number of parameters differs."""
    groups = optimizer.state_dict()['param_groups']
    order = [i for g in saved['param_groups'] for i in g['params']]
    if len(order) != sum(len(g['params']) for g in groups):
        raise ValueError(f'the optimizer of the checkpoint has {len(order)} parameters, not '
                         f'{sum(len(g["params"]) for g in groups)}')
    optimizer.load_state_dict({'state': {new: saved['state'][old] for new, old in enumerate(order) if old in saved['state']},
                               'param_groups': groups})


def load_model_state(model, state, path, allow_missing=(), assign=False):
    """Load a state dict after checking every key and shape. Raises ValueError with one line and leaves the model unchanged.

    Keys that end in one of `allow_missing` may be absent: they keep their initial values. assign: the model uses the tensors
    themselves instead of copies, which unties tied weights; tie them again."""
    own = model.state_dict()
    missing = [k for k in own if k not in state and not k.endswith(tuple(allow_missing))]
    extra = [k for k in state if k not in own]
    shapes = [f'{k} is {tuple(state[k].shape)}, needs {tuple(own[k].shape)}'
              for k in own if k in state and state[k].shape != own[k].shape]
    for what, found in (('lacks', missing), ('has unknown', extra), ('has other shapes:', shapes)):
        if found:
            raise ValueError(f'{path} does not fit this model: it {what} {found[0]}'
                             + (f' and {len(found) - 1} more' if len(found) > 1 else ''))
    model.load_state_dict(state, strict=False, assign=assign)


def check_same(path, saved, wanted, advice=''):
    """Raises ValueError for the first key of the dict `wanted` with another value in the dict `saved`, read from `path`. The
    default advice is to type the saved value."""
    for key, value in wanted.items():
        if saved.get(key) != value:
            both = f'{saved.get(key)}, not {value}'                     # left out if long: a digest or a whole table
            advice = advice or f'type --{key}={saved.get(key)}'
            raise ValueError(f'{path} has another {key}{f" ({both})" * (len(both) < 80)}; {advice}')


def check_tokens(state, path, tokenizer, dataset):
    """Raises ValueError unless the checkpoint `state`, read from `path`, was trained on the tokens of this data set."""
    if state['tokenizer'] != tokenizer.describe():
        raise ValueError(f'{path} was trained on other tokens than those of {dataset}')


def versions():
    return {'python': platform.python_version(), 'torch': str(torch.__version__), 'numpy': np.__version__}


# ---------------------------------------------------------------------------------------------------------------------
# packed files: a model with packed low-bit layers in one safetensors file


def save_packed(model, path, meta):
    """Pack the model in place and write it to one safetensors file, with `meta` (plain types) as JSON in its header.

    Returns the size of the file in bytes. The write is atomic: the file is complete or absent.
    """
    tensors = {name: t.contiguous().cpu() for name, t in _parameters_once(pack(model)).items()}
    # The safetensors format has no checksum. Earlier versions read `checksum`, which does not cover the header.
    meta = json.loads(json.dumps(dict(meta, checksum=_named_checksum(tensors))))
    meta['crc32'] = contents_crc(tensors, meta)
    save_tensors(tensors, path, {'nanobit': json.dumps(meta)})          # safetensors writes several keys in random order
    return os.path.getsize(path)


def save_tensors(tensors, path, header):
    """Write {name: contiguous tensor} and header {str: str} to a safetensors file, complete or absent. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    def write(tmp):
        try:
            save_file(tensors, tmp, header)
        except SafetensorError as e:                # a full disk, for one
            raise OSError(e) from e
    atomic_write(path, write)


def read_packed(path, tensors_too=True):
    """Read a file of save_packed: (meta, tensors). Raises ValueError with the file name if it is not one or is damaged.
    tensors_too=False reads only the header and returns (meta, None); it does not verify the checksum of the tensors."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, 'pt') as f:
            meta = json.loads((f.metadata() or {})['nanobit'])
            tensors = {name: f.get_tensor(name) for name in f.keys()} if tensors_too else None  # noqa: SIM118  not a dict
    except (OSError, SafetensorError, KeyError, ValueError) as e:
        raise ValueError(f'{path} is not a packed nanobit model ({type(e).__name__}: {e})') from e
    if not isinstance(meta, dict) or tensors_too and meta.get('checksum') != _named_checksum(tensors):
        raise ValueError(f'{path} is damaged: its tensors do not match their checksum')
    crc = meta.pop('crc32', None)                   # files of earlier versions have none
    if tensors_too and crc not in (None, contents_crc(tensors, meta)):
        raise ValueError(f'{path} is damaged: its header does not match its checksum')
    return meta, tensors


def contents_crc(tensors, about=None):
    """Checksum of the contents of a safetensors file as 8 hex digits: the JSON of `about`, and the name, dtype, shape and bytes
    of each tensor."""
    header = json.dumps([about, [(n, str(tensors[n].dtype), list(tensors[n].shape)) for n in sorted(tensors)]])
    return f'{zlib.crc32(header.encode(), _named_checksum(tensors)):08x}'


def load_packed(model, tensors):
    """Copy the tensors of read_packed into a new model of the same shape, in place; returns it packed. A model on the meta
    device uses the tensors themselves, which unties tied weights; tie them again. Raises ValueError if they do not fit."""
    wanted = _parameters_once(pack(model))
    alike = lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype)
    if wrong := sorted(wanted.keys() ^ tensors.keys()) or [n for n in wanted if not alike(wanted[n], tensors[n])]:
        raise ValueError(f'packed file and model do not fit each other: {wrong[:4]}')
    if any(t.is_meta for t in wanted.values()):
        model.load_state_dict(tensors, strict=False, assign=True)
        return model
    for name, t in wanted.items():
        t.copy_(tensors[name])
    return model


def _parameters_once(model):
    """{name: tensor} of the state_dict, with each tied weight under its first name only."""
    seen, unique = set(), {}
    for name, t in model.state_dict(keep_vars=True).items():
        if id(t) not in seen:
            seen.add(id(t))
            unique[name] = t.detach()
    return unique


def _named_checksum(tensors):
    return checksum(tensors[name] for name in sorted(tensors))


# ---------------------------------------------------------------------------------------------------------------------
# run folder and log


def append_log(out_dir, record, run=None):
    """Append a record to out_dir/log.jsonl as one line of JSON, and to the run of start_wandb().

    Non-finite numbers become null. If the disk is full, warns and leaves out the line. Errors of wandb do not stop the run."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    line = (json.dumps(clean) + '\n').encode()
    try:
        with open(os.path.join(out_dir, 'log.jsonl'), 'ab', buffering=0) as f:
            start = f.tell()
            if f.write(line) < len(line):
                f.truncate(start)
                raise OSError('no room for a whole line')
    except OSError as e:
        print(f'warning: could not write {out_dir}/log.jsonl: {e}', file=sys.stderr)
    if run:
        try:
            run.log(record, step=record['step'])
        except Exception as e:                      # noqa: BLE001  any error of wandb
            print(f'warning: wandb: {e}')


def start_wandb(project, name, out_dir, config, run_id):
    """Start a wandb run, or continue the one with run_id. On any error, warns and returns None, and training continues."""
    try:
        import wandb
        return wandb.init(project=project, name=name or os.path.basename(out_dir), config=config, id=run_id, resume='allow')
    except Exception as e:                          # noqa: BLE001  not installed, not logged in, no network, ...
        print(f'warning: wandb is off: {e}')


def read_log(out_dir):
    """The list of records in out_dir/log.jsonl, without lines that a crash left incomplete. [] if there is no log."""
    path, records = os.path.join(out_dir, 'log.jsonl'), []
    for line in open(path, errors='replace') if os.path.exists(path) else []:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get('step'), int):
                records.append(record)
    return records


def find_run(out_dir, resume, overwrite):
    """Return (last_path, best_path, resume_path, elsewhere). The run saves to the first two. resume_path: the checkpoint to
    resume from, or ''; elsewhere: another run wrote it. resume: '', 'auto' or a path. Calls fail() rather than lose a run."""
    last_path, best_path = os.path.join(out_dir, 'last.pt'), os.path.join(out_dir, 'best.pt')
    has_run = os.path.exists(last_path) or os.path.exists(previous_path(last_path))
    resume_path = (last_path if has_run else '') if resume == 'auto' else resume
    if os.path.isdir(resume_path):                  # the folder of a run
        resume_path = os.path.join(resume_path, 'last.pt')
    elsewhere = bool(resume_path) and os.path.realpath(os.path.dirname(resume_path)) != os.path.realpath(out_dir)
    if has_run and (elsewhere or not resume_path) and not overwrite:
        fail(f'{out_dir} holds a run; type --resume=auto to continue it, --out_dir=... for another folder, or '
             '--overwrite=True to delete its checkpoints and log', rank0_only=True)
    return last_path, best_path, resume_path, elsewhere


STALE = {'last.pt', 'last.prev.pt', 'best.pt', 'packed.safetensors', 'log.jsonl'}


def open_run(out_dir, trainer, config, step, fresh):
    """Create the run folder, write config.py, and delete what a killed process was writing. fresh: delete the files of an
    overwritten run, so that nothing resumes or packs them; else cut the log back to `step`. Calls fail() if it cannot write."""
    try:
        os.makedirs(out_dir, exist_ok=True)
        for name in STALE & set(os.listdir(out_dir)) if fresh else ():
            os.remove(os.path.join(out_dir, name))
        for left in glob.glob(os.path.join(glob.escape(out_dir), '*.tmp[0-9]*')):       # from a process that was killed
            os.remove(left)
        save(config | {'overwrite': False}, os.path.join(out_dir, 'config.py'), f'{trainer}.py: every constant of this run')
        cut_log(out_dir, step)
    except OSError as e:
        fail(f'cannot write to {out_dir}: {e}; type --out_dir=... for another folder')


def cut_log(out_dir, step):
    """Delete the log records that a resumed run writes again: those after `step`, and the evaluation at `step`.
    The log then equals that of an uninterrupted run."""
    kept = ''.join(json.dumps(r) + '\n' for r in read_log(out_dir)
                   if r['step'] < step or (r['step'] == step and ('loss' in r or 'matrices' in r)))

    def write(tmp):
        with open(tmp, 'w') as f:
            f.write(kept)
    atomic_write(os.path.join(out_dir, 'log.jsonl'), write)


def launched(words):
    """The command line of a script and its arguments, with this process's launcher: python or torchrun."""
    world = os.environ.get('WORLD_SIZE', '1')
    launcher = 'python' if world == '1' else f'torchrun --nproc_per_node={os.environ.get("LOCAL_WORLD_SIZE", world)}'
    return f'{launcher} {shlex.join(words)}'


def not_finite(loss, grad_norm, step, culprits, saved_step):
    """Error message for a skipped step, in one line. culprits: names of the parameters with non-finite gradients."""
    first = culprits[0] if culprits else 'none, their sum overflows'
    last = f'of step {saved_step}' if saved_step > 0 else 'not made yet'
    return (f'loss {loss}, gradient norm {grad_norm} at step {step}; first non-finite gradient: {first}; the weights of step '
            f'{step} were not touched, the last checkpoint is {last}; try a lower --learning_rate')


def not_kept(step, saved_step, lost):
    """What a full disk has cost a finished run, as an error message, or ''. lost: (value, step) of a better evaluation that
    could not be saved, or None."""
    parts, again = [], step not in (0, saved_step)
    if lost:
        parts.append(f'the best evaluation, of step {lost[1]}, could not be saved'
                     + '; its weights are gone' * (lost[1] < min(step, saved_step)))
        again |= lost[1] >= min(step, saved_step)
    if step not in (0, saved_step):
        parts.append(f'last.pt is of step {saved_step}, not {step}' if saved_step > 0 else 'last.pt could not be saved')
    return ', and '.join(parts) + '; make room and type the same command with --resume=auto' * again


def say_stopped(words, step, saved_step):
    """Print the last line of a stopped run. words: the command that resumes it. Calls fail() if `step` could not be saved."""
    go_on = f'go on with: {launched(words)}'
    if step not in (0, saved_step):
        fail(f'stopped at step {step}, saved only up to step {max(saved_step, 0)}; make room and {go_on}', rank0_only=True)
    print(f'stopped at step {step}; {go_on}')


def stop_flag():
    """Return a function that is True once SIGTERM or SIGINT has arrived. A signal more than a second later has its default
    effect. An earlier one counts as the same signal: a scheduler sends it to all processes, and torchrun sends it again."""
    seen = []

    def note(number, frame):
        seen.append(time.monotonic())
        if seen[-1] - seen[0] > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return lambda: bool(seen)


# ---------------------------------------------------------------------------------------------------------------------
# meters


def device_name(device):
    """The name of the GPU or of this machine's processor."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    try:
        return next(line.split(':')[1].strip() for line in open('/proc/cpuinfo') if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_memory_bytes(device=None):
    """Peak memory of this process so far, in bytes. CUDA: of the allocator. CPU: resident, Python and torch included."""
    if device and device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    try:                                            # on Linux ru_maxrss starts at the value of the parent process
        return next(int(line.split()[1]) << 10 for line in open('/proc/self/status') if line.startswith('VmHWM:'))
    except (OSError, StopIteration):
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def step_profiler(out_dir, device):
    """Start torch.profiler for steps 5 to 7. Call its step() after each step. Prints a table and writes out_dir/trace.json."""
    def show(p):
        print(p.key_averages().table(sort_by=f'self_{device.type}_time_total', row_limit=20))
        p.export_chrome_trace(os.path.join(out_dir, 'trace.json'))
    profiler = torch.profiler.profile(schedule=torch.profiler.schedule(wait=3, warmup=2, active=3, repeat=1),
                                      on_trace_ready=show)
    profiler.start()
    return profiler


def peak_above(step, cuda):
    """Peak bytes of live tensors during step(), above those before it. CPU: the running sum of allocations and frees in the
    profiler. CUDA: max_memory_allocated."""
    with peak_meter(cuda) as found:
        step()
    return found['bytes']


@contextlib.contextmanager
def peak_meter(cuda):
    """Measure peak_above() of a with block. After the block, found['bytes'] holds the result."""
    found = {}
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        torch.cuda.synchronize()
        found['bytes'] = torch.cuda.max_memory_allocated() - before
        return
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')         # silences the profiler
    with _without_lines(b'CPUAllocator.cpp'), \
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
        yield found
    changes = sorted((e.start_ns(), e.nbytes()) for e in p.profiler.kineto_results.events() if e.name() == '[memory]')
    found['bytes'] = max(accumulate((n for _, n in changes), initial=0))


@contextlib.contextmanager
def _without_lines(word):
    """Remove lines with `word` from standard error. torch warns once per process about a block older than the profiler. The
    warning comes from C++, so Python's warning filters do not apply."""
    with tempfile.TemporaryFile() as kept:
        sys.stderr.flush()
        before = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            kept.seek(0)
            os.write(2, b''.join(line for line in kept if word not in line))
            os.close(before)


def energy_meter(device):
    """Return a function that gives the joules used since this call, or None if nothing measures them.

    CUDA: the counter of the card; needs nvidia-ml-py. CPU: the RAPL package counters, if readable. They cover the whole machine
    and wrap around after minutes. Call the function at least once per wrap. An error of a counter gives None, not a stop.
    """
    try:
        read = _energy_counter(device)
    except Exception as e:                          # noqa: BLE001  no NVML, an old card, a file that cannot be read, ...
        if not isinstance(e, ImportError | OSError):
            warnings.warn(f'energy is not measured: {e}', stacklevel=2)
        return lambda: None

    def joules():
        try:
            return read()
        except Exception:                           # noqa: BLE001  the counter is lost during the run
            return None
    return joules


def _energy_counter(device):
    if device.type == 'cuda':
        import pynvml
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f'GPU-{torch.cuda.get_device_properties(device).uuid}')
        start = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        return lambda: (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - start) / 1e3
    zones = []
    for zone in glob.glob('/sys/class/powercap/intel-rapl:[0-9]*'):
        if zone.count(':') == 1:                    # packages, which include their sub-zones
            read = lambda z=zone, f='energy_uj': int(open(f'{z}/{f}').read())     # noqa: SIM115
            zones.append([read, read(), 0, read(f='max_energy_range_uj')])

    def joules():
        for zone in zones:
            now = zone[0]()
            zone[2] += (now - zone[1]) % (zone[3] + 1)
            zone[1] = now
        return sum(zone[2] for zone in zones) / 1e6
    return joules if zones else lambda: None
