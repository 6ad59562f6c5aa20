"""
Load language models of train_gpt.py and train_bitnet.py, or a Hugging Face folder of BitNetForCausalLM, as torch models or as
Engine. sample.py, ptq.py and bench.py read models here.

    engine, tokenizer, about = load.engine('out/pycode_bin')    # packed codes in C, each weight once in memory
    model, tokenizer, about = load.load('out/pycode_bin')       # torch

The tensors are mapped from the file. The model starts on the meta device, without memory for latent weights. Errors are a
ValueError of one line.
"""
import ctypes
import os
import sys
from mmap import PAGESIZE

import torch
import torch.nn as nn

import common
from engine.engine import Engine
from pretrained import hf, replace
from readers import tokens
from train_bitnet import HEAD, BitNet, BitNetConfig
from train_gpt import GPT, GPTConfig

# {trainer: (model class, config class)} of the language models
MODELS = {'train_gpt': (GPT, GPTConfig), 'train_bitnet': (BitNet, BitNetConfig)}


def find_checkpoint(path):
    """Path of a model: `path` if it is no folder, else best.pt, last.pt or packed.safetensors in it, in this order, or the
    folder itself if it has a config.json of Hugging Face. Raises ValueError."""
    if not os.path.isdir(path):
        return path
    for name in ('best.pt', 'last.pt', 'packed.safetensors'):
        if os.path.isfile(os.path.join(path, name)):
            return os.path.join(path, name)
    if os.path.isfile(os.path.join(path, 'config.json')):
        return path
    raise ValueError(f"{path} holds no best.pt, last.pt, packed.safetensors or config.json; type --ckpt= and a run's out_dir")


def load(path, as_stored=False):
    """Load a run's folder, a checkpoint or packed file of a trainer of MODELS or of ptq.py, or a folder of BitNetForCausalLM ->
    (model on the CPU in eval mode, Tokenizer, dict) with path, step or None, trainer, task, config of the training or {}, best
    val_loss or None, quantized: what ptq.py replaced or {}. as_stored: bf16 tensors of a folder stay so. Raises ValueError."""
    path = find_checkpoint(path)
    if os.path.isdir(path):
        return _load_folder(path, as_stored)
    if not os.path.isfile(path):
        raise ValueError(f"{path} does not exist; type --ckpt=... and a run's out_dir, or make one with train_gpt.py")
    try:
        packed = path.endswith('.safetensors')
        state, tensors = common.read_packed(path) if packed else (common.read_last_checkpoint(path, mmap=True), None)
        trainer = state.get('trainer', 'ptq')
        if trainer not in MODELS:
            raise ValueError(f'{path} was written by {trainer}.py, ' + (
                'for a Hugging Face model; type: python ptq.py --ckpt= and its folder' if trainer == 'ptq' else
                'which trains no language model'))
        make, shape = MODELS[trainer]
        with torch.device('meta'):
            model = make(shape(**state['model_config']))
        replaced = state.get('quantized', {}) if packed else {}
        if packed:
            common.load_packed(replace.restore(model, replaced, tensors), tensors)
        else:
            common.load_model_state(model, state['model'], path, HEAD, assign=True)
        if isinstance(model.wte, nn.Embedding):     # else the head is the packed layer inside
            model.lm_head.weight = model.wte.weight
        settings = state.get('config', {})
        about = {'path': path, 'step': state['step'], 'trainer': trainer, 'task': state.get('task', settings.get('task', '')),
                 'config': settings, 'val_loss': state.get('best_val_loss', state.get('val_loss')), 'quantized': replaced}
        return model.eval(), tokens.from_description(state['tokenizer']), about
    except OSError as e:
        raise ValueError(f'{path}: {e}') from e
    except (KeyError, TypeError) as e:              # a complete file with other metadata than this code writes
        raise ValueError(f'{path} is damaged or of another version ({type(e).__name__}: {e})') from e


def _load_folder(path, as_stored):
    """load() of a Hugging Face folder."""
    shape, how, tokenizer, stored = hf.open_bitnet(path)
    with torch.device('meta'):
        model = BitNet(BitNetConfig(**shape)).eval()
    try:
        tensors = hf.from_bitnet(stored, model.config, how, done=release)
        model.wte.to(tensors['wte.weight'].dtype)
        if 'lm_head.weight' in tensors:
            model.lm_head.weight = nn.Parameter(torch.empty_like(tensors['lm_head.weight'], device='meta'))
        common.load_model_state(model, tensors, path, HEAD, assign=True) if how is None else common.load_packed(model, tensors)
    except ValueError as e:
        raise ValueError(f'{path}: {e}') from None
    if 'lm_head.weight' not in tensors:
        model.lm_head.weight = model.wte.weight
    if not as_stored:
        for p in model.parameters():                # buffers are codes and scales
            p.data = p.data.float()
    return model, tokenizer, {'path': path, 'step': None, 'trainer': 'train_bitnet', 'task': '', 'config': {}, 'val_loss': None,
                              'quantized': {}}


def release(t):
    """Give the whole pages of a CPU tensor back. It must not be used any more."""
    start, end = -(-t.data_ptr() // PAGESIZE) * PAGESIZE, (t.data_ptr() + t.nbytes) // PAGESIZE * PAGESIZE
    if sys.platform == 'linux' and end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), 4)      # MADV_DONTNEED


def trim():
    """Let glibc give freed memory back to the system."""
    if sys.platform == 'linux':
        getattr(ctypes.CDLL(None), 'malloc_trim', int)(0)


def into_engine(model, head='int8', threads=0, sequences=1, inputs='fp32'):
    """Engine of a model of load(), whose weights are given back block by block: do not use the model any more."""
    def used(block):
        for t in (*block.parameters(), *block.buffers()):
            release(t)
        block.to('meta')
        trim()
    made = Engine(model, head, threads, sequences, inputs, used=used)
    trim()
    return made


def engine(path, head='int8', threads=0, sequences=1, inputs='fp32'):
    """(Engine, Tokenizer, dict) of a model that load() reads. Raises ValueError."""
    model, tokenizer, about = load(path, as_stored=True)
    return into_engine(model, head, threads, sequences, inputs), tokenizer, about
