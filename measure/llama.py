"""
Stock llama.cpp for bench.py decode: random GGUF files of the shape of our random models, and its shared libraries by ctypes.

    write_gguf('x.gguf', 'TQ2_0', 'Q8_0', SHAPES['1M'], 256)        # needs the package gguf
    llama = Llama('folder with libllama.so', 'x.gguf', threads=1, context=256)
    for id in llama.generate([1, 2, 3], 10): ...

Any folder with libllama*, libggml* and libggml-cpu* of one build will do, e.g. bins/linux-x64 of the npm package
@node-llama-cpp/linux-x64, which has a library for every generation of CPUs. The structs of llama.cpp change with its
versions. So this code sets only the first fields of the context's parameters, and only if they hold their known defaults. The
rest of each struct stays as the library itself fills it.
"""
import ctypes
import platform
from pathlib import Path

import numpy as np

# Matrices of a block: (rows, columns) as functions of the width, of keys and values, and of the MLP. Head: rows = vocabulary.
TERNARY = {'attn_q': 'ee', 'attn_k': 'ke', 'attn_v': 'ke', 'attn_output': 'ee', 'ffn_gate': 'fe', 'ffn_up': 'fe',
           'ffn_down': 'ef'}
GPT2 = {'attn_qkv': '3e', 'attn_output': 'ee', 'ffn_up': 'fe', 'ffn_down': 'ef'}
TYPES = {'TQ2_0': 'bitnet', 'TQ1_0': 'bitnet', 'Q4_0': 'gpt2'}          # type of the blocks' matrices: architecture
HEADS = ('F16', 'Q8_0')                                                 # type of the tied head and embedding
SCALE_FIRST = ('Q4_0', 'Q8_0')                                          # where a block has its fp16 scale: first or last


def random_blocks(rng, kind, rows, columns):
    """Random codes of a (rows, columns) matrix in a type of ggml, uint8 (rows, bytes); F16: float16. Weights have a standard
    deviation of about columns ** -0.5."""
    import gguf
    if kind == 'F16':
        return ((rng.random((rows, columns), np.float32) - 0.5) * (3.4 * columns ** -0.5)).astype(np.float16)
    size, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    if columns % size:
        raise ValueError(f'{kind} needs rows of a multiple of {size} weights, not {columns}')
    blocks = rng.integers(0, 256, (rows * columns // size, n_bytes), np.uint8)
    if kind == 'TQ2_0':                             # four codes 0, 1, 2 a byte, not 3
        fours = np.arange(81) // [[1], [3], [9], [27]] % 3
        blocks = (fours << [[0], [2], [4], [6]]).sum(0).astype(np.uint8)[rng.integers(0, 81, blocks.shape, np.uint8)]
    deviation = {'TQ2_0': 0.8, 'TQ1_0': 0.8, 'Q4_0': 4.6, 'Q8_0': 74}[kind]
    at = slice(0, 2) if kind in SCALE_FIRST else slice(-2, None)
    blocks[:, at] = np.array([columns ** -0.5 / deviation], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def write_gguf(path, kind, head, shape, context):
    """Write a random model with blocks of type `kind` and a tied head of type `head`. shape: as in decode.SHAPES. All layers
    hold the same random codes, at different places of the file. Raises ValueError without gguf and for widths that do not
    fit."""
    try:
        import gguf
    except ImportError:
        raise ValueError('a GGUF file needs the package gguf; type: pip install gguf') from None
    arch, rng, types = TYPES[kind], np.random.default_rng(0), gguf.GGMLQuantizationType
    e, ff, vocab = shape['n_embd'], shape['n_ff'] if TYPES[kind] == 'bitnet' else 4 * shape['n_embd'], shape['vocab_size']
    kv_heads = shape['n_kv_head'] if arch == 'bitnet' else shape['n_head']
    sizes = {'e': e, 'k': e // shape['n_head'] * kv_heads, 'f': ff, '3': 3 * e}
    w = gguf.GGUFWriter(str(path), arch)
    for add, value in ((w.add_context_length, context), (w.add_embedding_length, e), (w.add_block_count, shape['n_layer']),
                       (w.add_feed_forward_length, ff), (w.add_head_count, shape['n_head']), (w.add_head_count_kv, kv_heads),
                       (w.add_vocab_size, vocab), (w.add_tokenizer_model, 'no_vocab'),
                       (w.add_layer_norm_rms_eps if arch == 'bitnet' else w.add_layer_norm_eps, 1e-5)):
        add(value)
    ones, zeros = lambda n: np.ones(n, np.float32), lambda n: np.zeros(n, np.float32)
    w.add_tensor('token_embd.weight', random_blocks(rng, head, vocab, e), raw_dtype=types[head])
    w.add_tensor('output_norm.weight', ones(e))
    if arch == 'gpt2':
        w.add_tensor('output_norm.bias', zeros(e))
        w.add_tensor('position_embd.weight', rng.standard_normal((context, e), np.float32) * np.float32(0.02))
    matrices = {name: random_blocks(rng, kind, *map(sizes.get, rows_columns))
                for name, rows_columns in (TERNARY if arch == 'bitnet' else GPT2).items()}
    norms = {'attn_norm': e, 'ffn_norm': e, **({'attn_sub_norm': e, 'ffn_sub_norm': ff} if arch == 'bitnet' else {})}
    for i in range(shape['n_layer']):
        for name, blocks in matrices.items():
            w.add_tensor(f'blk.{i}.{name}.weight', blocks, raw_dtype=types[kind])
            if arch == 'gpt2':
                w.add_tensor(f'blk.{i}.{name}.bias', zeros(len(blocks)))
        for name, n in norms.items():
            w.add_tensor(f'blk.{i}.{name}.weight', ones(n))
            if arch == 'gpt2':
                w.add_tensor(f'blk.{i}.{name}.bias', zeros(n))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


class Params(ctypes.Structure):
    """A struct of llama.cpp of unknown layout. It is passed in memory; a callee reads and writes only the part it knows."""
    _fields_ = [('words', ctypes.c_uint32 * 128)]


class Batch(ctypes.Structure):
    """llama_batch and, for later versions, room after it."""
    _fields_ = [('n_tokens', ctypes.c_int32), ('arrays', ctypes.c_void_p * 30)]


LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
POINTER, INT = ctypes.c_void_p, ctypes.c_int
FUNCTIONS = {                                       # name: (result, arguments)
    'llama_log_set': (None, [LOG, POINTER]), 'llama_backend_init': (None, []),
    'llama_model_default_params': (Params, []), 'llama_context_default_params': (Params, []),
    'llama_model_load_from_file': (POINTER, [ctypes.c_char_p, Params]), 'llama_init_from_model': (POINTER, [POINTER, Params]),
    'llama_set_n_threads': (None, [POINTER, INT, INT]), 'llama_n_ctx': (ctypes.c_uint32, [POINTER]),
    'llama_n_ubatch': (ctypes.c_uint32, [POINTER]), 'llama_n_threads': (INT, [POINTER]),
    'llama_model_size': (ctypes.c_uint64, [POINTER]), 'llama_model_get_vocab': (POINTER, [POINTER]),
    'llama_vocab_n_tokens': (INT, [POINTER]),
    'llama_tokenize': (INT, [POINTER, ctypes.c_char_p, INT, ctypes.POINTER(ctypes.c_int32), INT, ctypes.c_bool, ctypes.c_bool]),
    'llama_batch_get_one': (Batch, [POINTER, ctypes.c_int32]),
    'llama_decode': (INT, [POINTER, Batch]), 'llama_get_logits_ith': (ctypes.POINTER(ctypes.c_float), [POINTER, INT]),
    'llama_get_memory': (POINTER, [POINTER]), 'llama_memory_clear': (None, [POINTER, ctypes.c_bool]),
    'llama_print_system_info': (ctypes.c_char_p, []), 'llama_free': (None, [POINTER]), 'llama_model_free': (None, [POINTER])}
CONTEXT_DEFAULTS = [512, 2048, 512, 1]              # n_ctx, n_batch, n_ubatch, n_seq_max


def libraries(folder):
    """(ggml-base or None, ggml, llama): the paths of the libraries in the folder. Raises ValueError if it has none."""
    end = {'Darwin': '.dylib', 'Windows': '.dll'}.get(platform.system(), '.so')
    files = sorted(p for p in Path(folder).glob('*') if end in p.name)
    first = lambda stem: next((p for p in files if p.name.removeprefix('lib').split('.')[0] == stem), None)
    found = first('ggml-base'), first('ggml'), first('llama')
    if None in found[1:]:
        raise ValueError(f'{folder} holds no shared libraries ggml and llama of llama.cpp; type --llama=FOLDER of a build')
    return found


class Llama:
    """A model of llama.cpp and a context for one sequence. about: the version, the library of the CPU and its instructions.
    Raises ValueError, in one line, if the folder, a function or the file is not as expected."""

    def __init__(self, folder, path, threads, context):
        self.model = self.context = None
        said, cpu = [], []

        @LOG
        def listen(level, text, _):
            text = (text or b'').decode('utf-8', 'replace').strip()
            said.extend([text] if level >= 4 and text else [])          # 4: an error
            cpu.extend(Path(text.split()[-1]).name for _ in [0] if 'loaded CPU backend' in text)
        self.listen = listen                        # llama.cpp calls it as long as it lives
        try:
            *ggml, llama = (ctypes.CDLL(str(p), ctypes.RTLD_GLOBAL) for p in libraries(folder) if p)
            for name, (result, arguments) in FUNCTIONS.items():
                function = getattr(llama, name)
                function.restype, function.argtypes = result, arguments
            load = ggml[-1].ggml_backend_load_all_from_path
        except (OSError, AttributeError) as e:
            raise ValueError(f'cannot use llama.cpp in {folder} ({str(e).splitlines()[0]}); give another --llama') from None
        self.lib = llama
        llama.llama_log_set(listen, None)
        load.argtypes, load.restype = [ctypes.c_char_p], None
        load(str(folder).encode())                  # chooses the library for this CPU
        llama.llama_backend_init()
        params = llama.llama_context_default_params()
        if params.words[:4] != CONTEXT_DEFAULTS:
            raise ValueError(f'llama.cpp in {folder} has other context parameters ({params.words[:4]} instead of '
                             f'{CONTEXT_DEFAULTS}) than this code knows; give another --llama')
        params.words[:3] = [max(context, 512), max(context, 512), 512]     # llama-bench's batch, at least
        self.model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
        self.context = llama.llama_init_from_model(self.model, params) if self.model else None
        if not self.context:
            raise ValueError(f'llama.cpp in {folder} cannot load {path} ({(said or ["no reason given"])[-1][:150]})')
        llama.llama_set_n_threads(self.context, threads, threads)
        here = llama.llama_n_ctx(self.context), llama.llama_n_ubatch(self.context), llama.llama_n_threads(self.context)
        if here[0] < max(context, 512) or here[1:] != (512, threads):
            raise ValueError(f'llama.cpp in {folder} made a context of {here} tokens, batch and threads instead of '
                             f'{(max(context, 512), 512, threads)}; give another --llama')
        self.vocab_at = llama.llama_model_get_vocab(self.model)
        self.vocab = llama.llama_vocab_n_tokens(self.vocab_at)
        version = getattr(llama, 'llama_version', None)
        if version:
            version.restype = ctypes.c_char_p
        system = llama.llama_print_system_info().decode().split('|')
        self.about = ', '.join([(version() if version else b'llama.cpp').decode(), *cpu[:1],
                                ' '.join(x.split(' = ')[0].split(':')[-1].strip() for x in system if '= 1' in x)])

    def nbytes(self):
        """Bytes of the weights."""
        return self.lib.llama_model_size(self.model)

    def logits(self, ids):
        """Append the ids to the sequence. Returns the logits after the last, fp32 (vocab,), valid until the next call."""
        array = (ctypes.c_int32 * len(ids))(*ids)
        if code := self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(array, len(ids))):
            raise ValueError(f'llama_decode failed with {code}')
        return np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, -1), (self.vocab,))

    def clear(self):
        """Empty the context."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def all_logits(self, ids):
        """Logits (tokens, vocab) after each of the ids, in an empty context of at least as many tokens."""
        self.clear()
        array, wanted = (ctypes.c_int32 * len(ids))(*ids), (ctypes.c_int8 * len(ids))(*[1] * len(ids))
        batch = self.lib.llama_batch_get_one(array, len(ids))
        if batch.n_tokens != len(ids) or batch.arrays[:6] != [ctypes.addressof(array), *[None] * 5]:
            raise ValueError('this llama.cpp has another llama_batch than this code knows; give another --llama')
        batch.arrays[5] = ctypes.addressof(wanted)  # the flags of the tokens whose logits are wanted
        if code := self.lib.llama_decode(self.context, batch):
            raise ValueError(f'llama_decode failed with {code}')
        rows = [self.lib.llama_get_logits_ith(self.context, i) for i in range(len(ids))]
        if not all(rows):
            raise ValueError('this llama.cpp gives the logits of the last token only; give another --llama')
        return np.stack([np.ctypeslib.as_array(row, (self.vocab,)) for row in rows])

    def tokenize(self, text):
        """Ids of a text, without ids that the model puts before or after it. Special tokens in it are plain text."""
        raw = text.encode()
        ids = (ctypes.c_int32 * (len(raw) + 1))()
        n = self.lib.llama_tokenize(self.vocab_at, raw, len(raw), ids, len(ids), False, False)
        if n < 0:
            raise ValueError(f'llama_tokenize failed with {n}')
        return ids[:n]

    def generate(self, ids, most):
        """Yield `most` ids, greedily, after the prompt `ids` in an empty context."""
        self.clear()
        for _ in range(most):
            ids = [int(self.logits(ids).argmax())]
            yield ids[0]

    def __del__(self):
        if self.context:
            self.lib.llama_free(self.context)
        if self.model:
            self.lib.llama_model_free(self.model)
