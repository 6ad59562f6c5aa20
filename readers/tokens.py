"""Token files and tokenizers: from text on disk to the integers that a trainer reads.

A data folder holds the shards of two splits, at most SHARD_TOKENS tokens each, and one record of how they were made:

    data/x/train_000000.bin  train_000001.bin ...  val_000000.bin ...
    data/x/progress.json     settings, command, counts, complete or not (see open_folder)
    data/x/tokenizer.json    the tokenizer (gpt2.tiktoken for GPT-2); byte tokens need no such file

One shard, all numbers little-endian:

    offset size
         0    8  magic, 'nanobit' and a NUL
         8    4  format version
        12    4  bytes per token: 2 (vocab <= 65536) or 4
        16    8  tokens in this file
        24    8  bytes of text that these tokens encode; an end-of-text token counts 0 bytes
        32    4  vocab size
        36   32  tokenizer name, NUL-padded
        68   16  tokenizer digest, the first half of a SHA-256
        84    4  CRC-32 of the tokens; 0 in files of earlier versions
        88   36  zeros
       124    4  CRC-32 of bytes 0 to 123
       128    .  tokens, uint16 or uint32

Read:   data = tokens.load(tokens.dataset_dir('pycode'), 'train'); x = data.windows([0, 512], 128)
Write:  see any data/*/prepare.py
"""
import base64
import functools
import hashlib
import importlib
import importlib.util
import itertools
import json
import os
import re
import shlex
import struct
import sys
import zlib
from pathlib import Path

import numpy as np

from configurator import at_home, fail

ROOT = Path(__file__).resolve().parents[1]
SHARD_TOKENS = 100_000_000
SPLITS = ('train', 'val')
CHECKED_BYTES = 1 << 30  # load() compares the checksums of splits up to this size; prepare.py, of all files
MAGIC, VERSION = b'nanobit\0', 1
HEADER = struct.Struct('<8sIIQQI32s16sI36sI')

# ----------------------------------------------------------------------------------------------------- tokenizers
# One class serves three tokenizers: a table of each token's bytes decodes them all. `text` is enough to rebuild
# the tokenizer without any other file. It is saved beside the tokens and in checkpoints.

EOT = '<|endoftext|>'
GPT2_BPE = ROOT / 'data' / 'gpt2_bpe'
GPT2_FILES = {'vocab.bpe': '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
              'encoder.json': '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783'}
GPT2_URL = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/'
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
TOKENIZER_FILE = {'byte': None, 'gpt2': 'gpt2.tiktoken', 'bpe': 'tokenizer.json'}
# Byte-level BPEs write each byte as a character: a printable one as itself, the others from U+0100 on, in order.
PRINTABLE = [b for b in range(256) if chr(b).isprintable() and chr(b) != ' ']
SHIFTED = [b for b in range(256) if b not in PRINTABLE]
CHARACTER_OF = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(SHIFTED)}
BYTE_OF = {c: b for b, c in CHARACTER_OF.items()}


class Tokenizer:
    """Tokenizer with name, vocab_size, eot (id of end-of-text) and token_bytes: int64 (vocab_size,), text bytes, 0 for eot.

    encode() treats '<|endoftext|>' in a text as plain characters. Only a writer puts `eot` between documents. begin: ids that a
    Hugging Face model expects before a text; [] for models that are trained here.
    """

    def __init__(self, name, table, eot, encode_batch, text='', begin=()):
        self.name, self.eot, self.vocab_size, self.text, self.begin = name, eot, len(table), text, list(begin)
        self._table, self._encode_batch = table, encode_batch
        self.token_bytes = np.array([len(b) for b in table], dtype=np.int64)
        self.token_bytes[eot] = 0
        self.digest = hashlib.sha256(f'{name}\0{text}'.encode()).digest()[:16]

    def encode(self, text):
        """str -> int64 array (tokens,). The byte tokenizer also takes bytes."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        """List of n str -> list of n int64 arrays. gpt2 and bpe use all cores."""
        return [np.asarray(ids, dtype=np.int64) for ids in self._encode_batch(texts)]

    def decode_bytes(self, ids):
        """Iterable of ids in [0, vocab_size) -> bytes. Inverse of encode(); the eot of gpt2 and bpe becomes '<|endoftext|>'."""
        return b''.join([self._table[i] for i in ids])

    def decode(self, ids):
        """Iterable of ids -> str. Bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode('utf-8', 'replace')

    def describe(self):
        """Dict of plain str and int for a checkpoint. from_description() is the inverse."""
        return {'name': self.name, 'vocab_size': self.vocab_size, 'eot': self.eot, 'text': self.text}


def from_description(description):
    """Dict from Tokenizer.describe() -> Tokenizer."""
    name = description.get('name')
    if name not in TOKENIZER_FILE:
        fail(f'unknown tokenizer {name!r}; there are: {", ".join(TOKENIZER_FILE)}')
    text = description.get('text', '')
    return bpe(text, description.get('eot')) if name == 'bpe' else {'byte': byte, 'gpt2': gpt2}[name](text)


def byte(text=''):
    """Byte tokenizer: 256 tokens, token i is byte i, so any file round-trips. eot is NUL; accepted text files have no NUL."""
    def encode_batch(texts):  # surrogateescape: bytes from the command line stay unchanged, UTF-8 or not
        raw = (t if isinstance(t, bytes) else t.encode('utf-8', 'surrogateescape') for t in texts)
        return [np.frombuffer(r, dtype=np.uint8) for r in raw]
    return Tokenizer('byte', [bytes([i]) for i in range(256)], 0, encode_batch)


def gpt2(text=''):
    """GPT-2's tokenizer of 50,257 tokens, by tiktoken: from `text` (lines 'base64 rank'), else from GPT-2's own files."""
    tiktoken = _import('tiktoken')
    if text:
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, text.splitlines())}
    else:
        ranks = _gpt2_ranks()
        text = ''.join(f'{base64.b64encode(t).decode()} {r}\n' for t, r in sorted(ranks.items(), key=lambda x: x[1]))
    encoding = tiktoken.Encoding('gpt2', pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                 special_tokens={EOT: len(ranks)}, explicit_n_vocab=len(ranks) + 1)
    threads = os.cpu_count() or 1

    def encode_batch(texts):
        return encoding.encode_ordinary_batch(texts, num_threads=min(threads, len(texts)))
    return Tokenizer('gpt2', [*sorted(ranks, key=ranks.get), EOT.encode()], len(ranks), encode_batch, text)


def _gpt2_ranks():
    """{token bytes: rank} from the two files in data/gpt2_bpe, else from tiktoken's cache or download."""
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks as read_ranks
    local = all((GPT2_BPE / name).is_file() for name in GPT2_FILES)
    vocab, encoder = (str(GPT2_BPE / name) if local else GPT2_URL + name for name in GPT2_FILES)
    try:
        return read_ranks(vocab, encoder, *GPT2_FILES.values())
    except (OSError, ValueError) as error:  # no network, or a file with another SHA-256
        fail(f'cannot {"read" if local else "download"} GPT-2\'s tokenizer ({type(error).__name__}); '
             f'put vocab.bpe and encoder.json from {GPT2_URL} into {GPT2_BPE}')


def bpe(text, eot=None):
    """Byte-level BPE from the JSON of the `tokenizers` library. eot: id of end-of-text; None: of its <|endoftext|>."""
    model = _import('tokenizers').Tokenizer.from_str(text)
    model.encode_special_tokens = True  # encode '<|endoftext|>' inside a text as plain text
    model.no_truncation()               # published files may hold settings for batches, which transformers resets too
    model.no_padding()
    eot = model.token_to_id(EOT) if eot is None else eot
    added = {i: token.content.encode() for i, token in model.get_added_tokens_decoder().items()}
    spelled = {i: added[i] if i in added else bytes(BYTE_OF[c] for c in token) for token, i in model.get_vocab().items()}
    if max(spelled) >= 1 << 24:
        raise ValueError(f'token {max(spelled)} is beyond any vocabulary')
    first = model.encode('a')

    def encode_batch(texts):
        return [e.ids for e in model.encode_batch_fast(texts, add_special_tokens=False)]
    return Tokenizer('bpe', [spelled.get(i, b'') for i in range(max(spelled) + 1)], eot, encode_batch, text,
                     first.ids[:first.special_tokens_mask.index(0)])


def as_json(tokenizer):
    """tokenizer.json, for the `tokenizers` library, of a Tokenizer: the same ids. of_folder() is the inverse. Raises
    ValueError."""
    if tokenizer.name == 'bpe':
        return tokenizer.text
    lib = _import('tokenizers')
    table = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
    names, merges = [''.join(map(CHARACTER_OF.get, token)) for token in table], []
    if tokenizer.name == 'gpt2':
        merges = [tuple(''.join(map(CHARACTER_OF.get, part)) for part in pair)
                  for pair in _merges({token: i for i, token in enumerate(table) if i != tokenizer.eot})]
        names[tokenizer.eot] = EOT
    model = lib.Tokenizer(lib.models.BPE({name: i for i, name in enumerate(names)}, merges))
    model.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=tokenizer.name == 'gpt2')
    model.decoder = lib.decoders.ByteLevel()
    if tokenizer.name == 'gpt2':
        model.add_special_tokens([EOT])
    return model.to_str()


def _merges(ranks):
    """The list of merges, pairs of bytes, of a BPE that has ranks {bytes: rank}. Raises ValueError if a token has no pair."""
    found = []
    for token, rank in ranks.items():
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:                       # by the merges before its own
            joined = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            at = joined.index(min(joined))
            if joined[at] >= rank:
                raise ValueError(f'token {rank} of the gpt2 tokenizer is not made of two earlier ones')
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        found += [tuple(parts)] if len(parts) == 2 else []
    return found


def of_json(text, eot=None):
    """The Tokenizer of a tokenizer.json with a byte-level BPE: byte(), gpt2() or bpe(). eot: as in bpe()."""
    return _ours(text, eot) or bpe(text, eot)


def _ours(text, eot):
    """byte() or gpt2() if the tokenizer.json `text` is theirs, else None."""
    names = json.loads(text)['model']['vocab']
    plain = isinstance(names, dict) and type(eot) is int
    if not plain or (len(names), eot) != (256, 0) and (names.get(EOT), eot) != (len(names) - 1,) * 2:
        return None
    wanted = json.loads(_import('tokenizers').Tokenizer.from_str(text).to_str())       # earlier versions wrote it otherwise
    split, model = wanted['pre_tokenizer'] or {}, wanted['model']
    if model['type'] != 'BPE' or split['type'] != 'ByteLevel' or split['add_prefix_space'] or wanted['normalizer'] \
            or (wanted['post_processor'] or {'type': 'ByteLevel'})['type'] != 'ByteLevel':
        return None
    made = byte()
    if names.get(EOT) == eot and importlib.util.find_spec('tiktoken'):
        order = sorted(names, key=names.get)[:eot]
        made = gpt2(''.join(f'{base64.b64encode(bytes(BYTE_OF[c] for c in name)).decode()} {i}\n'
                            for i, name in enumerate(order)))
    same = json.loads(as_json(made))
    alike = all(same['model'][key] == model[key] for key in ('vocab', 'merges'))
    return made if alike and same['pre_tokenizer']['use_regex'] == split['use_regex'] else None


def of_folder(folder, about):
    """The Tokenizer in tokenizer.json of a Hugging Face folder: byte(), gpt2() or another byte-level BPE. about: its
    config.json. Raises ValueError."""
    path = Path(folder) / 'tokenizer.json'
    try:
        text = path.read_text(encoding='utf-8')
        it = json.loads(text)
        parts = [it.get('model', {}).get(key) for key in ('continuing_subword_prefix', 'end_of_word_suffix')]
        replaced = '"Replace"' in json.dumps(it.get('normalizer'))     # the library panics at some of these
        if '"ByteLevel"' not in json.dumps(it['decoder']) or any(parts) or replaced:
            raise ValueError('it is no byte-level BPE')
        eot = about.get('eos_token_id')
        eot = eot[0] if isinstance(eot, list) and eot else eot
        made = of_json(text, eot)
    except BaseException as e:                      # tokenizers raises Exception itself, and a panic of Rust is not even one
        if isinstance(e, KeyboardInterrupt | SystemExit):
            raise
        why = e.strerror if isinstance(e, OSError) else f'{e}'.split('\n')[0][:90]
        raise ValueError(f'{path} cannot be used ({why})') from None
    if any(type(i) is not int or not 0 <= i < made.vocab_size <= about['vocab_size'] for i in (made.eot, *made.begin)):
        raise ValueError(f'{path} does not fit config.json: eos_token_id={made.eot}, {made.vocab_size} tokens, '
                         f'vocab_size={about["vocab_size"]}')
    return made


def train_bpe(texts, vocab_size):
    """Train a byte-level BPE: iterable of str, int -> Tokenizer of exactly vocab_size tokens. Deterministic."""
    if not 257 <= vocab_size <= 1 << 24:
        fail(f'a trained vocabulary of {vocab_size} tokens is impossible: 256 bytes and end-of-text make 257; '
             'type --vocab=257 or more, or --vocab=0 for bytes')
    lib = _import('tokenizers')
    model = lib.Tokenizer(lib.models.BPE())
    model.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = lib.decoders.ByteLevel()
    model.train_from_iterator(texts, lib.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOT], show_progress=sys.stderr.isatty(),
        initial_alphabet=sorted(lib.pre_tokenizers.ByteLevel.alphabet())))
    if model.get_vocab_size() != vocab_size:
        fail(f'this text yields only {model.get_vocab_size()} tokens, not {vocab_size}; '
             f'type --vocab={model.get_vocab_size()} or less')
    return bpe(model.to_str())


def _import(package):
    try:
        return importlib.import_module(package)
    except ImportError:
        fail(f'the package {package} is not installed; run: {sys.executable} -m pip install {package}')


# -------------------------------------------------------------------------------------------------------- reading


def dataset_dir(name):
    """'pycode' -> <repo>/data/pycode, from any working directory. An absolute, ./ or ../ path stays as it is."""
    path = Path(name).expanduser()
    return path if path.is_absolute() or str(name).startswith('.') else ROOT / 'data' / path


class TokenData:
    """The shards of one split as one read-only array of len() tokens, with .vocab_size, .n_bytes (of text), .tokenizer."""

    def __init__(self, folder, paths, headers):
        self.folder, self.paths = folder, paths
        self.name, self.vocab_size, self.digest = (headers[0][key] for key in ('name', 'vocab_size', 'digest'))
        self.n_bytes = sum(header['n_bytes'] for header in headers)
        self._ends = np.cumsum([header['n_tokens'] for header in headers])
        self._shards = [np.memmap(path, f'<u{header["width"]}', 'r', HEADER.size, (header['n_tokens'],))
                        for path, header in zip(paths, headers, strict=True)]

    def __len__(self):
        return int(self._ends[-1])

    def windows(self, starts, length):
        """Starts, ints (n,) in [0, len - length] -> torch.int64 (n, length). A window may span shards. Raises IndexError."""
        import torch  # imported here, so that prepare.py starts without it
        starts = np.asarray(starts, dtype=np.int64)
        if length < 1 or len(starts) and (starts.min() < 0 or starts.max() + length > len(self)):
            raise IndexError(f'windows of {length} from {starts.min()} to {starts.max()} in {len(self)} tokens')
        out = np.empty((len(starts), length), dtype=np.int64)
        for row, start in zip(out, starts, strict=True):
            shard, filled = np.searchsorted(self._ends, start, side='right'), 0
            while filled < length:
                tokens = self._shards[shard]
                offset = start + filled - (self._ends[shard] - len(tokens))
                part = tokens[offset:offset + length - filled]
                row[filled:filled + len(part)] = part
                filled, shard = filled + len(part), shard + 1
        if out.size and out.max() >= self.vocab_size:  # on a GPU this would fail as an unclear device assert
            fail(f'{shown(self.folder)} contains token {out.max()}, but its vocabulary has {self.vocab_size}; '
                 f'the file is damaged; delete {shown(self.folder)}/*.bin and run: {_command(self.folder)}')
        return torch.from_numpy(out)

    @functools.cached_property
    def tokenizer(self):
        """The Tokenizer that made these tokens."""
        if self.name not in TOKENIZER_FILE:
            fail(f'{shown(self.paths[0])} was made with an unknown tokenizer, {self.name!r}')
        file = TOKENIZER_FILE[self.name]
        if file and not (self.folder / file).is_file():
            fail(f'{shown(self.folder / file)} is missing; run: {_command(self.folder)}')
        text = (self.folder / file).read_bytes().decode('utf-8', 'replace') if file else ''
        if hashlib.sha256(f'{self.name}\0{text}'.encode()).digest()[:16] != self.digest:
            fail(f'{shown(self.folder / file)} is not the tokenizer that made the tokens beside it; '
                 f'run: {_command(self.folder)}')
        return from_description({'name': self.name, 'text': text})


def load(folder, split):
    """Load one split of a data folder: path (see dataset_dir), 'train' or 'val' -> TokenData. Errors are one line each."""
    folder, headers = Path(folder), {}
    record = _read_record(folder)
    if record and not record['complete']:
        fail(f'{shown(folder)} is unfinished; run: {_command(folder)}')
    try:
        for path in _shard_files(folder):
            headers[path] = read_header(path)
            first_path, first = next(iter(headers.items()))
            if any(headers[path][key] != first[key] for key in ('name', 'vocab_size', 'digest')):
                raise ValueError(f'{shown(path)} and {shown(first_path)} were made with different tokenizers')
        paths = [path for path in headers if path.name.startswith(split + '_')]
        if not paths:
            fail(f'no tokens in {shown(folder)}; run: {_command(folder)}' if not headers else
                 f'no {split} tokens in {shown(folder)}; run: {_command(folder)}')
        found = {'shards': len(paths), 'tokens': sum(headers[path]['n_tokens'] for path in paths)}
        wanted = {key: record[split][key] for key in found} if record else found
        if found != wanted or [path.name for path in paths] != [_shard_name(split, i) for i in range(len(paths))]:
            raise ValueError(f'{shown(folder)} lacks some of its {split} files')
        if sum(headers[path]['n_tokens'] * headers[path]['width'] for path in paths) <= CHECKED_BYTES:
            for path in paths:
                _check_tokens(path, headers[path])
    except ValueError as error:
        fail(f'{error}; run: {_command(folder)}')
    return TokenData(folder, paths, [headers[path] for path in paths])


def read_header(path):
    """Shard -> dict of n_tokens, n_bytes, width (bytes per token), vocab_size, name, digest, crc of the tokens (0: unknown).
    Raises ValueError if the header is damaged or the file was cut."""
    with open(path, 'rb') as file:
        raw = file.read(HEADER.size)
        size = os.fstat(file.fileno()).st_size
    if not raw.startswith(MAGIC):
        raise ValueError(f'{shown(path)} is not a nanobit token file')
    if len(raw) < HEADER.size:
        raise ValueError(f'{shown(path)} is cut short ({size} bytes)')
    _, version, width, n_tokens, n_bytes, vocab_size, name, digest, tokens_crc, _, crc = HEADER.unpack(raw)
    if crc != zlib.crc32(raw[:-4]):
        raise ValueError(f'{shown(path)} has a damaged header')
    if version != VERSION:
        raise ValueError(f'{shown(path)} has format version {version}, this program reads {VERSION}')
    if n_tokens < 1 or size != HEADER.size + n_tokens * width:
        raise ValueError(f'{shown(path)} has {size:,} bytes, but its {n_tokens:,} tokens need '
                         f'{HEADER.size + n_tokens * width:,}; it was cut or damaged')
    return {'n_tokens': n_tokens, 'n_bytes': n_bytes, 'width': width, 'vocab_size': vocab_size,
            'name': name.rstrip(b'\0').decode(), 'digest': digest, 'crc': tokens_crc}


def _check_tokens(path, header):
    """Raises ValueError if the tokens of a shard do not match the checksum in its header."""
    crc = 0
    with open(path, 'rb') as file:
        file.seek(HEADER.size)
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    if header['crc'] not in (0, crc):
        raise ValueError(f'{shown(path)} is damaged: its tokens do not match their checksum')


def _shard_name(split, number):
    return f'{split}_{number:06d}.bin'


def _shard_files(folder):
    """The shards in a folder, in order; [] if the folder does not exist."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r'(train|val)_\d{6}\.bin', path.name))


def shown(path):
    """A path as a user types it: relative to the repository's root if inside it, otherwise unchanged."""
    path = Path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _command(folder):
    """The command that builds a folder: the one recorded in it, else the prepare.py in the folder or in its parent."""
    record, folder = _read_record(folder), Path(folder).absolute()
    if record:
        return record['command']
    for parent in (folder, folder.parent):
        if (parent / 'prepare.py').is_file():
            return f'python {shown(parent / "prepare.py")}' + (f' --name={folder.name}' if parent != folder else '')
    scripts = [path for path in ROOT.glob('data/*/prepare.py') if re.search(r'readers import .*tokens', path.read_text())]
    names = ', '.join(sorted(path.parent.name for path in scripts))
    return f'python data/NAME/prepare.py, where NAME is one of: {names}'


# -------------------------------------------------------------------------------------------------------- writing


class Writer:
    """Writes one split shard by shard. It does not touch the shards before `first_shard`. It keeps no tokens in memory.

    A shard is written under a temporary name. It is renamed only when it is complete and on disk, so every file with
    a shard's name is complete. `shards` counts the finished shards, `pending` the tokens in the unfinished one.
    """

    def __init__(self, folder, split, tokenizer, shard_tokens=SHARD_TOKENS, first_shard=0):
        self.folder, self.split, self.tokenizer, self.shard_tokens = Path(folder), split, tokenizer, shard_tokens
        self.shards, self.pending, self._bytes, self._crc, self._file = first_shard, 0, 0, 0, None
        self._width = 2 if tokenizer.vocab_size <= 1 << 16 else 4
        self.folder.mkdir(parents=True, exist_ok=True)
        if TOKENIZER_FILE[tokenizer.name]:
            write_whole(self.folder / TOKENIZER_FILE[tokenizer.name], tokenizer.text.encode())

    def write(self, ids):
        """Append ids, ints (tokens,) in [0, vocab_size), and start new shards as needed. Raises ValueError."""
        ids = np.asarray(ids, dtype=np.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.tokenizer.vocab_size:
            raise ValueError(f'token {ids.min()} or {ids.max()} outside [0, {self.tokenizer.vocab_size})')
        while len(ids):
            if self._file is None:
                self._file = open(_temporary(self._path()), 'wb')
                self._file.write(bytes(HEADER.size))
            part, ids = np.split(ids, [self.shard_tokens - self.pending])
            raw = part.astype(f'<u{self._width}').tobytes()
            self._file.write(raw)
            self._crc = zlib.crc32(raw, self._crc)
            self._bytes += int(self.tokenizer.token_bytes[part].sum())
            self.pending += len(part)
            if self.pending == self.shard_tokens:
                self.close()

    def close(self):
        """Finish the current shard, if there is one."""
        if self._file is None:
            return
        head = HEADER.pack(MAGIC, VERSION, self._width, self.pending, self._bytes, self.tokenizer.vocab_size,
                           self.tokenizer.name.encode(), self.tokenizer.digest, self._crc, b'', 0)[:-4]
        self._file.seek(0)
        self._file.write(head + struct.pack('<I', zlib.crc32(head)))
        _commit(self._file, self._path())
        self.shards, self.pending, self._bytes, self._crc, self._file = self.shards + 1, 0, 0, 0, None

    def _path(self):
        return self.folder / _shard_name(self.split, self.shards)


def write(folder, split, pieces, tokenizer, shard_tokens=SHARD_TOKENS):
    """Write an iterable of int arrays, one after the other, as the shards of a split."""
    writer = Writer(folder, split, tokenizer, shard_tokens)
    for ids in pieces:
        writer.write(ids)
    writer.close()


def open_folder(folder, settings, argv):
    """Start a data folder, continue it, or recognize a finished one. Returns its record, which progress.json stores.

    record = {'settings', 'command', 'complete': bool, 'train': {...}, 'val': {...}}. If the settings are equal and all
    shards are intact, returns the old record (and prints that the folder is complete, if it is). Otherwise deletes the
    old tokens. Only finish() marks a folder as complete; load() refuses all others.
    """
    folder = Path(folder)
    settings = json.loads(json.dumps({'format': VERSION, **settings}))
    record = _read_record(folder)
    if record:
        try:
            for split in SPLITS:
                for number in range(record[split].get('shards', 0)):
                    header = read_header(folder / _shard_name(split, number))
                    file = record['complete'] and TOKENIZER_FILE.get(header['name'])
                    if file and not (folder / file).is_file():
                        raise ValueError(f'{file} is missing')
                    if record['complete']:
                        _check_tokens(folder / _shard_name(split, number), header)
            damage = None
        except (ValueError, OSError) as error:
            damage = str(error)
        if record['settings'] == settings and not damage:
            if record['complete']:
                print(f'{shown(folder)} is complete with the same settings; left as it is')
            return record
        print(f'{shown(folder)} {"is damaged (" + damage + ")" if damage else "has other settings"}; rebuilding it')
    folder.mkdir(parents=True, exist_ok=True)
    for path in [*_shard_files(folder), *folder.glob('*.tmp'), *(folder / f for f in TOKENIZER_FILE.values() if f)]:
        path.unlink(missing_ok=True)
    command = shlex.join(['python', shown(Path(sys.argv[0]).resolve()), *argv])
    record = {'settings': settings, 'command': command, 'complete': False, 'train': {}, 'val': {}}
    save_record(folder, record)
    return record


def save_record(folder, record):
    """Replace progress.json atomically."""
    write_whole(Path(folder) / 'progress.json', json.dumps(record, indent=1).encode())


def finish(folder, record):
    """Count tokens and bytes of each split, mark the folder as complete and print the counts."""
    record['complete'] = True
    for split in SPLITS:
        paths = [path for path in _shard_files(Path(folder)) if path.name.startswith(split + '_')]
        headers = [read_header(path) for path in paths]
        count = {key: sum(header[f'n_{key}'] for header in headers) for key in ('tokens', 'bytes')}
        record[split] |= {'shards': len(paths), **count}
        print(f'{split}: {count["tokens"]:,} tokens for {count["bytes"]:,} bytes of text '
              f'in {len(paths)} file{"s" * (len(paths) != 1)}')
    save_record(folder, record)
    print(f'wrote {shown(folder)}')


def valid(text):
    """The text with U+FFFD for each half of a surrogate pair, which JSON may hold and UTF-8 may not; as tiktoken does."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


def run(main):
    """Run the main() of a prepare.py. A full disk, an unreadable file or Ctrl-C prints one line, not a traceback."""
    sys.argv[1:] = at_home(sys.argv[1:])
    try:
        main()
    except KeyboardInterrupt:
        print('\ninterrupted; run the same command again', file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        fail(f'{error.filename or "reading or writing"}: {error.strerror or error}; '
             'put that right and run the same command again')


def file_digest(path):
    """SHA-256 of a file as hex; reads the file in blocks."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_record(folder):
    """progress.json -> dict, or None if it is missing or unreadable."""
    try:
        record = json.loads((Path(folder) / 'progress.json').read_bytes())
    except (OSError, ValueError):
        return None
    whole = isinstance(record, dict) and {'settings', 'command', 'complete', *SPLITS} <= record.keys()
    return record if whole else None


def _temporary(path):
    return path.with_name(path.name + '.tmp')


def write_whole(path, content):
    """Write bytes to a file atomically: after a crash the old file is intact. Unlike common.atomic_write, needs no torch."""
    file = open(_temporary(path), 'wb')
    file.write(content)
    _commit(file, path)


def _commit(file, path):
    """Close a temporary file and rename it once its bytes are on disk."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(file.name, path)
