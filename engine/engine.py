"""
Engine(model): a GPT of train_gpt.py or a BitNet of train_bitnet.py on the CPU, computed by engine.c from its packed codes.

    engine, tokenizer, about = load.engine('out/pycode_bin')    # Engine(model) for a model in memory
    for new in engine.generate(ids, 100, tokenizer.vocab_size, temperature=0.8, top_k=200, seed=1): ...
    logits = engine(ids)                                        # (B, T) -> (B, 1, vocab), like the model

Layers of all kinds may be mixed, packed or not. The codes are copied once, into the tiles of engine.c; then the model can be
deleted. A kind without a kernel (sparse, lowrank, odd groups) is decoded to fp32. engine.c is compiled on first use and needs
a C compiler. Engine() raises ValueError, in one line, for a model that it cannot run and without a compiler.
"""
import ctypes
import functools
import math
import os
import subprocess
import threading
from pathlib import Path

import torch
import torch.nn.functional as F

from quant import CODED4, GRIDS, ROOTS, compile_c, quantize_rows, scales4, unpack_bits

CODES, BIN, TERN, INT8 = range(4)
ACTS = {None: 0, 'relu': 1, 'gelu': 2, 'relu2_glu': 3, 'silu_glu': 4}
NO_NORM, LAYER_NORM, RMS_NORM = range(3)
ARENA = 1 << 26                # bytes of memory that arrays share
SEEDS = 0x2545F4914F6CDD1D, 0x5851F42D4C957F2D, 0x1E3779B97F4A7C15     # odd numbers: all seeds, rows and steps differ
BATCH = 96                     # most tokens in one call: a longer prompt takes several
STAGES = 'embedding', 'inputs', 'products', 'normalization', 'attention', 'head'         # as in engine.c
# What the compiler may use; the results are the same bits. Only tests use vnni, avx2 and scalar: they compile faster with -O2.
# stages: with clocks.
TARGETS = {'native': ('-march=native',), 'vnni': ('-O2', '-march=native', '-mno-amx-int8'),
           'avx2': ('-O2', '-march=native', '-mno-amx-int8', '-mno-avx512f'), 'scalar': ('-O2',),
           'stages': ('-march=native', '-DSTAGES')}


class Array(ctypes.Structure):
    _fields_ = [('at', ctypes.c_void_p), ('bytes', ctypes.c_int64)]


class Linear(ctypes.Structure):
    _fields_ = ([(name, ctypes.c_int32) for name in 'kind act norm chunks in_ out bits group scale_bytes rounded'.split()]
                + [(name, ctypes.c_float) for name in ('eps', 'out_eps', 'zero')] + [('levels', ctypes.c_float * 16)]
                + [(name, Array) for name in 'code scale zeros grid gain shift input_scale bias alpha sums'.split()])


class Shape(ctypes.Structure):
    _fields_ = ([(name, ctypes.c_int32) for name in
                 'n_layer n_head n_kv_head head_dim n_embd vocab context sequences batch threads tied'.split()]
                + [(name, Array) for name in ('positions', 'cos', 'sin')])


@functools.cache
def library(target='native'):
    """The compiled engine.c. Raises ValueError with the reason if it cannot be compiled."""
    with _lock:
        try:
            if os.environ.get('NANOBIT_KERNELS') == '0':
                raise OSError('NANOBIT_KERNELS=0')
            lib = compile_c(Path(__file__).with_name('engine.c'), (*TARGETS[target], '-ffp-contract=off', '-Wno-psabi'))
        except (OSError, RuntimeError, subprocess.SubprocessError) as e:
            lines = (getattr(e, 'stderr', None) or str(e)).strip().split('\n')
            why = next((line for line in lines if 'error' in line), lines[0])[:150]
            what = 'unset it' if 'NANOBIT_KERNELS' in why else 'install a C compiler, or set CC to one'
            raise ValueError(f'engine.c was not compiled ({why}); {what}') from e
    p, i = ctypes.c_void_p, ctypes.c_int
    lib.engine_new.argtypes, lib.engine_new.restype = (p, p, i, p), ctypes.c_char_p
    lib.engine_run.argtypes = (p, i, p, p, p, p, p, p, i, ctypes.c_float, i, p)
    lib.engine_run.restype = ctypes.c_char_p
    lib.engine_free.argtypes, lib.engine_free.restype = (p,), None
    lib.engine_advise.argtypes, lib.engine_advise.restype = (p, ctypes.c_int64), None
    lib.engine_sizes.restype = ctypes.c_int64
    if target == 'stages':
        lib.engine_stages.argtypes, lib.engine_stages.restype = (p,), None
    if (lib.engine_sizes(0), lib.engine_sizes(1)) != (ctypes.sizeof(Linear), ctypes.sizeof(Shape)):
        raise ValueError('engine.c and engine.py are of different versions')
    return lib


_lock = threading.Lock()


class Engine:
    """A model in tiles of codes, with caches for `sequences` sequences of config.block_size tokens. threads=0: as torch.
    head='int8' rounds a full-precision head and embedding to int8 per row; head='fp' keeps them: the same logits as the model,
    up to rounding. inputs='int8' rounds the inputs of binary layers and of those with evenly spaced levels to int8 per token,
    as ternary layers do: faster, but not what they were trained with. used(block): called when its weights are copied. One
    thread at a time may use an Engine. Raises ValueError for what the engine does not do."""

    def __init__(self, model, head='int8', threads=0, sequences=1, inputs='fp32', target='native', used=lambda block: None):
        name, threads = type(model).__name__, threads or torch.get_num_threads()
        if name not in ('GPT', 'BitNet'):
            raise ValueError(f'the engine runs the models of train_gpt.py and train_bitnet.py, not {name}')
        if head not in ('int8', 'fp'):
            raise ValueError(f"head={head!r} must be 'int8' or 'fp'")
        if inputs not in ('fp32', 'int8'):
            raise ValueError(f"inputs={inputs!r} must be 'fp32' or 'int8'")
        if not 1 <= threads <= 1024 or not 1 <= sequences <= 1 << 16:
            raise ValueError(f'threads={threads} must be 1 to 1024, sequences={sequences} 1 to 65536')
        if not all(p.device.type == 'cpu' for p in (*model.parameters(), *model.buffers())):
            raise ValueError('the engine runs on the CPU only')
        self.lib, self.kept, self.at, self.sequences, self.config = library(target), [], None, sequences, model.config
        self.filled = 0                                         # positions in the cache
        self.rounded, self.arena = inputs == 'int8', torch.empty(0, dtype=torch.uint8)
        c, layers = model.config, []
        with torch.no_grad():
            for i, block in enumerate(model.blocks):
                steps = gpt_steps(block) if name == 'GPT' else bitnet_steps(block)
                layers += [self.linear(f'blocks.{i}.{part}', *steps[part]) for part in steps]
                used(block)
            norm = (model.ln_f, None) if name == 'GPT' else (model.norm, None)
            embedding = getattr(model.wte, 'layer', model.wte)         # the packed layer, or nn.Embedding
            tied = embedding is model.lm_head or embedding.weight is not None and embedding.weight is model.lm_head.weight
            layers.append(self.linear('lm_head', [*norm, model.lm_head], head == 'int8'))
            if not tied:
                layers.append(self.linear('wte', [embedding], head == 'int8'))
            shape = Shape(c.n_layer, c.n_head, getattr(c, 'n_kv_head', c.n_head), c.n_embd // c.n_head, c.n_embd, c.vocab_size,
                          c.block_size, sequences, max(BATCH, min(sequences, 256)), threads, tied)
            if name == 'GPT':
                shape.positions = self.array(model.wpe(torch.arange(c.block_size)).float())
            else:
                shape.cos, shape.sin = self.array(model.cos), self.array(model.sin)
        self.batch = shape.batch
        made, self.structs = ctypes.c_void_p(), (shape, (Linear * len(layers))(*layers))
        why = self.lib.engine_new(ctypes.byref(shape), self.structs[1], len(layers), ctypes.byref(made))
        if why:
            raise ValueError(f'the engine cannot run this model: {why.decode()}; use torch')
        self.at = made

    def __del__(self):
        if getattr(self, 'at', None):
            self.lib.engine_free(self.at)

    def nbytes(self):
        """Bytes of the codes, scales and other arrays."""
        return sum(t.nbytes for t in self.kept)

    def stages(self):
        """{stage: seconds since the last call} with target='stages'."""
        spent = torch.empty(len(STAGES), dtype=torch.float64)
        self.lib.engine_stages(spent.data_ptr())
        return dict(zip(STAGES, spent.tolist(), strict=True))

    # -----------------------------------------------------------------------------------------------------------------
    # layers to structs

    def room(self, shape, dtype):
        """An empty tensor that is kept. Many share one piece of memory, so that huge pages can hold them."""
        n = math.prod(shape) * dtype.itemsize
        if len(self.arena) < n:
            self.arena = torch.empty(max(n, ARENA) + 64, dtype=torch.uint8)
            self.arena = self.arena[-self.arena.data_ptr() % 64:]
            self.lib.engine_advise(self.arena.data_ptr(), self.arena.nbytes)
        self.kept.append(self.arena[:n].view(dtype).view(shape))
        self.arena = self.arena[-(-n // 64) * 64:]
        return self.kept[-1]

    def array(self, t, rows=0):
        """Array of a copy of t; with `rows` zeros pad it to this length."""
        kept = self.room((rows or len(t), *t.shape[1:]), t.dtype)
        kept[:len(t)] = t.detach()
        kept[len(t):] = 0
        return Array(kept.data_ptr(), kept.nbytes)

    def tiles(self, t):
        """Array of t (rows, n), with the n-th values of 16 rows next to each other, see engine.c."""
        rows, n = t.shape
        kept = self.room((-(-rows // 16), n, 16), t.dtype)
        whole = rows // 16
        kept[:whole] = t[:whole * 16].view(-1, 16, n).transpose(1, 2)
        if whole < len(kept):
            kept[whole] = F.pad(t[whole * 16:], (0, 0, 0, 16 - rows % 16)).T
        return Array(kept.data_ptr(), kept.nbytes)

    def words(self, code):
        """Tiles of code (rows, bytes): its words of 32 bits."""
        code = code.view(torch.uint8) if code.element_size() == 1 else code.contiguous().view(torch.uint8)
        code = F.pad(code, (0, -code.shape[1] % 4)) if code.shape[1] % 4 else code          # pad() always copies
        return self.tiles(code.contiguous().view(torch.int32))

    def linear(self, name, steps, to_int8=False):
        """Linear of [norm, activation, ..., layer], in this order. Raises ValueError that names the layer."""
        *before, layer = [s for s in steps if s is not None and not isinstance(s, torch.nn.Identity)]
        out = Linear(chunks=1, bits=32)
        for step in before:
            if isinstance(step, str):
                if out.norm or out.act:
                    raise ValueError(f'{name}: the engine applies one activation, before a norm; use torch')
                out.act = ACTS[step]
            else:
                self.norm(name, out, step)
        self.fill(name, out, layer, to_int8)
        return out

    def norm(self, name, out, norm):
        if out.norm:
            raise ValueError(f'{name}: the engine does not apply two norms; use torch')
        out.norm, out.eps = (LAYER_NORM if isinstance(norm, torch.nn.LayerNorm) else RMS_NORM), norm.eps
        out.gain = self.array(norm.weight.float())
        if getattr(norm, 'bias', None) is not None:
            out.shift = self.array(norm.bias.float())

    def fill(self, name, out, m, to_int8):
        """Fill in the weights of the layer m."""
        kind = 'fp' if isinstance(m, torch.nn.Linear | torch.nn.Embedding) or not hasattr(m, 'kind') else m.kind
        if kind == 'lora':
            raise ValueError(f'{name}: the engine has no LoRA adapters; merge them, or use torch')
        if kind in ('fp', 'half', 'lowrank', 'sparse'):
            held = {}
        else:
            held = dict(m.named_buffers(recurse=False)) if m.packed else m.encode()
        rows, columns = (m.out_features, m.in_features) if hasattr(m, 'out_features') else m.weight.shape
        out.out, out.in_, full = rows, columns, -(-rows // 16) * 16
        if getattr(m, 'bias', None) is not None and 'packed_bias' not in held:
            out.bias = self.array(m.bias.float(), full)
        if kind == 'bin':
            if m.alpha is None:
                raise ValueError(f'{name}: the engine has no binary layers without normalization; use torch')
            out.kind, out.bits, out.rounded, out.chunks, out.out_eps = BIN, 1, self.rounded, m.chunks, m.eps
            out.code, out.alpha = self.words(held['code']), self.array(m.alpha.float())
            if 'packed_bias' in held:
                out.bias = self.array(unpack_bits(held['packed_bias'], 1, rows).float() - 0.5, full)
        elif kind == 'tern':
            out.kind, out.bits, out.rounded, out.chunks = TERN, 2, True, len(m.rows)
            scale = torch.cat([s.expand(n) for s, n in zip(held['weight_scale'], m.rows, strict=True)])
            if m.out_gain is not None:
                scale, out.chunks = scale * m.out_gain, max(2, out.chunks)      # 1 chunk: a scale of the whole layer
            out.code, out.scale = self.words(held['code']), self.array(scale.float(), full)
        elif kind == 'int8' and m.activations:
            self.int8(out, held['code'], held['weight_scale'], full)
        elif kind == 'int8' and columns % 4 == 0:
            out.bits, out.group, out.scale_bytes, out.zero = 8, columns, 4, 128
            out.code, out.scale = self.words(held['code'].view(torch.uint8) ^ 128), self.tiles(held['weight_scale'].float())
        elif kind in ('int4', 'nf4', 'fit4'):
            self.four_bits(out, m, held, rows, columns)
        elif kind == 'group':
            self.groups(out, m, held, rows, columns)
        elif to_int8 and kind == 'fp':
            codes, scale = torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows, 1)
            for parts in zip(m.weight.split(1 << 10), codes.split(1 << 10), scale.split(1 << 10), strict=True):
                for to, new in zip(parts[1:], quantize_rows(parts[0].float(), tiny=1e-30), strict=True):
                    to.copy_(new)
            self.int8(out, codes, scale, full)
        else:
            self.full(out, m, rows, columns)

    def full(self, out, m, rows, columns):
        """Full precision: fp32, or bf16 for a layer that is stored so."""
        if getattr(m, 'kind', '') == 'lowrank':
            weight = m.A.float() * m.c.float() @ m.B.float()
        elif hasattr(m, 'decode') and m.weight is None:
            weight = m.effective_weight()
        else:
            weight = m.rounded(m.weight) if hasattr(m, 'rounded') else m.weight
        half = weight.dtype == torch.bfloat16 and columns % 2 == 0
        out.kind, out.bits, out.group, out.scale_bytes, out.zero = CODES, 16 if half else 32, columns, 0, 0
        out.zeros = out.scale = out.grid = out.input_scale = Array()
        out.code = self.words(weight if half else weight.float())

    def int8(self, out, codes, scale, full):
        out.kind, out.bits, out.rounded = INT8, 8, True
        out.code, out.scale = self.words(codes), self.array(scale.flatten().float(), full)
        out.sums = self.array(torch.cat([part.sum(1, dtype=torch.int32) for part in codes.split(1 << 10)]), full)

    def four_bits(self, out, m, held, rows, columns):
        group = math.gcd(columns, m.group)                      # a group may go on in the next row
        if group % 8:
            return self.full(out, m, rows, columns)
        form, code = CODED4[m.format], held['code'].flatten()[:rows * columns // 2].view(rows, -1)
        if form.high_first:
            code = code >> 4 | code << 4
        scale = held['absmax']
        if scale.dtype == torch.int8:
            e = held['absmax_top'].item() + torch.arange(-128, 128).abs().clamp(max=127) - 127
            grid = torch.ldexp(torch.tensor(ROOTS)[e % len(ROOTS)], e.div(len(ROOTS), rounding_mode='floor'))
            out.grid = self.array(grid * torch.arange(-128, 128).sign())
        elif scale.dtype == torch.uint8:
            scale = scales4({k: t for k, t in held.items() if k != 'code'})
        scale = scale.repeat_interleave(m.group // group)[:rows * columns // group].view(rows, -1)
        out.bits, out.group, out.scale_bytes, out.levels = 4, group, scale.element_size(), tuple(form.levels)
        out.rounded = self.rounded and m.format == 'uniform'
        out.code, out.scale = self.words(code), self.tiles(scale.view(torch.int16) if out.scale_bytes == 2 else scale)

    def groups(self, out, m, held, rows, columns):
        code, bits, zero = held['code'], m.bits, GRIDS[m.levels].zero
        if bits == 3:                                           # 3 bits do not divide a word
            codes, bits = unpack_bits(code, 3, columns), 4
            code = F.pad(codes, (0, columns % 2))
            code = code[:, ::2] | code[:, 1::2] << 4
        if m.group % (32 // bits):
            self.full(out, m, rows, columns)
        else:
            out.bits, out.group, out.scale_bytes, out.rounded = bits, m.group, 2, self.rounded and bits < 8
            out.levels = tuple(float(i % (1 << bits)) - (zero or 0) for i in range(16))
            out.code, out.scale = self.words(code), self.tiles(held['weight_scale'].view(torch.int16))
            if zero is None:
                out.zeros = self.tiles(unpack_bits(held['zero'], m.bits, columns // m.group))
            if m.scaled_input:
                out.input_scale = self.array(held['input_scale'].float())

    # -----------------------------------------------------------------------------------------------------------------
    # running

    def calls(self, ids, sequences, positions, wanted, logits=None, next=None, known=0, temperature=0.0, top_k=0, seeds=None):
        """Calls of engine.c for n tokens, at most `batch` in each, as functions without arguments; they read and write the
        tensors in place. ids, sequences, positions int32 (n,), wanted uint8 (n,), logits (wanted, vocab) or next (wanted,)."""
        at, made, done = lambda t, i: t[i:].data_ptr() if t is not None else None, [], 0
        for i in range(0, len(ids), self.batch):
            n, rows = min(self.batch, len(ids) - i), [at(t, i) for t in (ids, sequences, positions, wanted)]
            made.append(functools.partial(self.lib.engine_run, self.at, n, *rows, at(logits, done), at(next, done), known,
                                          temperature, top_k, at(seeds, done)))
            done += int(wanted[i:i + n].sum())
        return made

    @staticmethod
    def run(calls):
        """Make the calls. Raises ValueError."""
        for call in calls:
            if why := call():
                raise ValueError(why.decode())

    def places(self, B, T, first, every=False):
        """sequences, positions and wanted of B sequences of T tokens from position `first`; the last of each is wanted, or
        every one."""
        positions = torch.arange(first, first + T, dtype=torch.int32).repeat(B)
        sequences = torch.arange(B, dtype=torch.int32).repeat_interleave(T)
        return sequences, positions, (positions >= (0 if every else first + T - 1)).to(torch.uint8)

    def prefill(self, ids, first, next=None, every=False, **sampling):
        """Feed ids (B, T) at positions first .. first + T - 1. Returns the logits (B, vocab) fp32 after the last position, with
        `every` (B * T, vocab) after each. With `next` and `sampling`, writes an id of each row to next (B,) int32."""
        B, T = ids.shape
        if not 1 <= B <= self.sequences or not 1 <= T or not 0 <= first <= self.config.block_size - T:
            raise ValueError(f'{B} sequences of {first + T} tokens do not fit into {self.sequences} of '
                             f'{self.config.block_size}')
        flat = ids.to(torch.int64).flatten()
        if flat.min() < 0 or flat.max() >= self.config.vocab_size:
            raise ValueError(f'an id is not in 0 .. {self.config.vocab_size - 1}')
        if first > self.filled:
            raise ValueError(f'position {first} follows {self.filled} positions in the cache')
        for t, dtype in ((next, torch.int32), (sampling.get('seeds'), torch.int64)):
            if t is not None and (t.dtype != dtype or t.shape != (B,) or not t.is_contiguous()):
                raise ValueError(f'next must be int32 and seeds int64, each with {B} values')
        self.filled = first + T
        logits = torch.empty(B * T if every else B, self.config.vocab_size) if next is None else None
        flat, where = flat.to(torch.int32), self.places(B, T, first, every)
        self.run(self.calls(flat, *where, logits, next, **sampling))
        return logits

    def __call__(self, ids, every=False):
        """ids (B, T) -> logits (B, 1, vocab) after the last position, like the model's; every=True: (B, T, vocab)."""
        parts = [self.prefill(part, 0, every=every) for part in ids.split(self.sequences)]
        return torch.cat(parts).view(len(ids), -1, self.config.vocab_size)

    def generate(self, ids, max_new_tokens, vocab_size, temperature=1.0, top_k=0, seed=0):
        """Yield the next ids (B,) int64, one step at a time, like sample.generate(). The same seed gives the same ids; each row
        draws its own numbers. When the context is full, its second half fills the cache anew."""
        if not 1 <= vocab_size <= self.config.vocab_size or not temperature >= 0 or top_k < 0:
            raise ValueError(f'vocab_size={vocab_size} must be 1 to {self.config.vocab_size}; temperature={temperature} and '
                             f'top_k={top_k} at least 0')
        B, most, at, parts = len(ids), self.config.block_size, None, [ids]      # at: tokens in the cache
        new, first = torch.empty(B, dtype=torch.int32), (seed * SEEDS[0] + 2 ** 63) % 2 ** 64 - 2 ** 63
        seeds = torch.arange(B) * SEEDS[1] + first
        sampling = dict(known=vocab_size, temperature=max(temperature, 1e-6) if temperature else 0, seeds=seeds,
                        top_k=min(top_k, vocab_size))
        sequences, positions, wanted = self.places(B, 1, most)
        one_more = self.calls(new, sequences, positions, wanted, next=new, **sampling)      # reads `new`, then overwrites it
        for _ in range(max_new_tokens):
            if at in (None, most):
                parts = [torch.cat(parts, 1)[:, -(max(1, most // 2) if at else most):]]
                self.prefill(parts[0], 0, new, **sampling)
                at = parts[0].shape[1]
            else:
                positions.fill_(at)
                self.run(one_more)
                at = self.filled = at + 1
            parts.append(new[:, None].to(torch.int64))
            yield parts[-1][:, 0]
            seeds += SEEDS[2]


def flat_steps(module):
    """[activation, norm, layer] of a module of train_bitnet.py."""
    if isinstance(module, torch.nn.Sequential):
        return [getattr(m, 'act', m) if type(m).__name__ == 'Activation' else m for m in module]
    if type(module).__name__ == 'NormedLinear':
        return [*flat_steps(module.unfused())]
    return with_own_steps(module)


def with_own_steps(layer, *before):
    """[*before, the activation and the RMSNorm that the layer contains, layer]."""
    norm = None
    if getattr(layer, 'gain', None) is not None:
        norm = torch.nn.RMSNorm(layer.in_features, layer.eps)
        norm.weight = layer.gain
    return [*before, getattr(layer, 'act', None), norm, layer]


def gpt_steps(block):
    attn, mlp = block.attn, block.mlp
    return {'attn.c_attn': (with_own_steps(attn.c_attn, block.ln_1),), 'attn.c_proj': (with_own_steps(attn.c_proj),),
            'mlp.c_fc': (with_own_steps(mlp.c_fc, block.ln_2),),
            'mlp.c_proj': (with_own_steps(mlp.c_proj, None if mlp.folded else 'gelu'),)}


def bitnet_steps(block):
    return {'attn.qkv_proj': (flat_steps(block.attn.qkv_proj),), 'attn.o_proj': (flat_steps(block.attn.o_proj),),
            'mlp.gate_up_proj': (flat_steps(block.mlp.gate_up_proj),), 'mlp.down_proj': (flat_steps(block.mlp.down_proj),)}
