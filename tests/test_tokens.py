"""Token files and tokenizers: exact round trips, windows against plain arrays, damage refused in one line."""
import json
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from readers import tokens

SHARED = tokens.ROOT.parent / 'shared' / 'data'
ODD = ['', ' ', '\n\n \t', 'plain text', "it's  we'll", 'naïve café', '日本語のテキスト', '🎉👩\u200d👧 e\u0301',
       '<|endoftext|>', 'a<|endoftext|>b', '\u202e rtl \u00ad \ufeff', 'x' * 3000, 'tab\tnul\0cr\r\nlf',
       '\U0010ffff\ud7ff']


@pytest.fixture(scope='session')
def gpt2():
    """GPT-2's tokenizer from the two local files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, 'GPT2_BPE', SHARED / 'gpt2_bpe')
        if not (SHARED / 'gpt2_bpe' / 'vocab.bpe').is_file():
            pytest.skip('needs GPT-2\'s vocab.bpe and encoder.json')
        return tokens.gpt2()


def train_small_bpe(vocab=400):
    return tokens.train_bpe(['the cat sat on the mat, and the dog sat on the log.\n' * 3, *ODD,
                             ''.join(map(chr, range(32, 2000)))], vocab)


@pytest.fixture(scope='session')
def bpe():
    return train_small_bpe()


def error_of(capsys, function, *args):
    """What a user sees: one line on stderr, exit status 2."""
    with pytest.raises(SystemExit) as stop:
        function(*args)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith('error: '), lines
    return lines[0]


# ----------------------------------------------------------------------------------------------------- tokenizers


def test_byte_tokenizer_is_lossless_for_any_bytes():
    """encode() and decode_bytes() return 5,000 random bytes and each of the 256 values; 'Aé' by hand."""
    tokenizer, raw = tokens.byte(), random.Random(0).randbytes(5000) + bytes(range(256))
    assert tokenizer.decode_bytes(tokenizer.encode(raw)) == raw
    assert tokenizer.encode('Aé').tolist() == [0x41, 0xC3, 0xA9]
    assert tokenizer.decode([0x41, 0xC3]) == 'A\ufffd'
    smuggled = raw.decode('utf-8', 'surrogateescape')  # how a terminal's odd bytes reach a Python program
    assert tokenizer.decode_bytes(tokenizer.encode(smuggled)) == raw


@pytest.mark.parametrize('name', ['byte', 'gpt2', 'bpe'])
def test_every_tokenizer_round_trips_odd_unicode(name, request):
    """decode(encode(x)) == x; token_bytes adds up to the text; describe() as JSON gives an equal tokenizer."""
    tokenizer = tokens.byte() if name == 'byte' else request.getfixturevalue(name)
    description = json.loads(json.dumps(tokenizer.describe()))
    assert {type(v) for v in description.values()} <= {str, int}
    again = tokens.from_description(description)
    for text, batched in zip(ODD, tokenizer.encode_batch(ODD), strict=True):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int64 and all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.decode(ids) == text and tokenizer.decode_bytes(torch.tensor(ids)) == text.encode()
        assert ids.tolist() == batched.tolist() == again.encode(text).tolist()
        if '\0' not in text or name != 'byte':
            assert tokenizer.eot not in ids and tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert again.digest == tokenizer.digest and again.eot == tokenizer.eot and again.name == tokenizer.name == name


def test_gpt2_is_the_published_one(gpt2):
    """Known ids and sizes; other ids equal those of tiktoken's own pattern on odd text."""
    assert gpt2.encode('Hello world').tolist() == [15496, 995]
    assert (gpt2.vocab_size, gpt2.eot) == (50257, 50256)
    assert gpt2.decode([gpt2.eot]) == tokens.EOT
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str
    ranks = {gpt2.decode_bytes([i]): i for i in range(50256)}
    reference = tiktoken.Encoding('reference', pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    for text in ODD:
        assert gpt2.encode(text).tolist() == reference.encode_ordinary(text)


def test_bpe_training_is_deterministic_and_exact(bpe, capsys):
    """Two trainings give the same JSON; the vocabulary has the size asked for, 257 up to what the text yields."""
    assert train_small_bpe().text == bpe.text
    assert train_small_bpe(300).vocab_size == 300
    smallest = tokens.train_bpe(['aaaa'], 257)
    assert len(smallest.encode('aaaa')) == 4 and smallest.decode(smallest.encode('é')) == 'é'
    assert '--vocab=257' in error_of(capsys, tokens.train_bpe, ['abc'], 256)
    assert '--vocab=259 or less' in error_of(capsys, tokens.train_bpe, ['abc'], 5000)
    assert 'there are: byte, gpt2, bpe' in error_of(capsys, tokens.from_description, {'name': 'spm'})


def test_gpt2_without_its_files_says_which_and_where(capsys, monkeypatch, tmp_path):
    """Without network, or with a damaged file, one line names both files and their folder."""
    monkeypatch.setattr(tokens, 'GPT2_BPE', tmp_path)
    monkeypatch.setattr(tokens, 'GPT2_URL', str(tmp_path / 'nothing') + '/')
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path / 'cache'))
    line = error_of(capsys, tokens.gpt2)
    assert 'vocab.bpe and encoder.json' in line and str(tmp_path) in line and 'cannot download' in line
    for name in tokens.GPT2_FILES:
        (tmp_path / name).write_text('{}')
    assert 'cannot read' in error_of(capsys, tokens.gpt2)


# ---------------------------------------------------------------------------------------------------- token files


def write_byte_shards(folder, n_tokens=1000, shard_tokens=64, seed=0):
    """Random bytes 1..255 in pieces of random length, as train and val; -> the train array."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, 256, n_tokens)
    cuts = np.sort(rng.integers(0, n_tokens, 17))
    tokens.write(folder, 'train', np.split(ids, cuts), tokens.byte(), shard_tokens)
    tokens.write(folder, 'val', [ids[:10]], tokens.byte(), shard_tokens)
    return ids


@pytest.mark.parametrize('shard_tokens', [7, 64, 999, 1000, 5000])
def test_windows_equal_slices_of_the_concatenated_array(tmp_path, shard_tokens):
    """Any start and length, straddling one or many shards, gives the int64 slice of the plain array."""
    ids = write_byte_shards(tmp_path, 1000, shard_tokens)
    data = tokens.load(tmp_path, 'train')
    assert len(data) == 1000 and data.n_bytes == 1000 and len(tokens.load(tmp_path, 'val')) == 10
    for length in (1, 2, 65, 1000):
        starts = np.random.default_rng(length).integers(0, 1000 - length + 1, 20)
        for form in (starts, starts.tolist(), torch.tensor(starts)):
            windows = data.windows(form, length)
            assert windows.dtype == torch.int64 and windows.tolist() == [ids[s:s + length].tolist() for s in starts]
    assert data.windows([], 5).shape == (0, 5)
    for starts, length in (([-1], 5), ([996], 5), ([0], 1001), ([0], 0)):
        with pytest.raises(IndexError, match='1000 tokens'):
            data.windows(starts, length)


def test_a_shard_is_laid_out_as_drawn(tmp_path):
    """128 bytes of header, then 2 or 4 a token, by hand; an id outside of the vocabulary is refused."""
    tokens.write(tmp_path, 'train', [[65, 66, 0]], tokens.byte())
    raw = (tmp_path / 'train_000000.bin').read_bytes()
    assert raw[:8] == b'nanobit\0' and raw[128:] == bytes([65, 0, 66, 0, 0, 0])
    assert struct.unpack_from('<IIQQI', raw, 8) == (1, 2, 3, 2, 256) and raw[36:41] == b'byte\0'
    with pytest.raises(ValueError, match='256'):
        tokens.write(tmp_path / 'no', 'train', [[1, 256]], tokens.byte())
    assert not list(tmp_path.glob('no/*.bin'))
    big = tokens.Tokenizer('byte', [b'x'] * 70_000, 0, None)                    # above 65,536 ids take four bytes
    tokens.write(tmp_path / 'big', 'train', [[69_999, 5, 65_536]], big, 2)
    data = tokens.load(tmp_path / 'big', 'train')
    assert data.windows([0], 3).tolist() == [[69_999, 5, 65_536]] and data.vocab_size == 70_000
    assert (tmp_path / 'big' / 'train_000000.bin').stat().st_size == 128 + 2 * 4


def test_the_tokenizer_travels_with_the_tokens(tmp_path, bpe, gpt2, monkeypatch, capsys):
    """TokenData.tokenizer decodes what was written with nothing else on disk; another tokenizer's file is refused."""
    monkeypatch.setattr(tokens, 'GPT2_BPE', tmp_path / 'none')
    monkeypatch.setattr(tokens, '_gpt2_ranks', None)
    for tokenizer, file in ((bpe, 'tokenizer.json'), (gpt2, 'gpt2.tiktoken')):
        folder = tmp_path / tokenizer.name
        tokens.write(folder, 'train', [tokenizer.encode(text) for text in ODD], tokenizer)
        data = tokens.load(folder, 'train')
        assert data.tokenizer.decode(data.windows([0], len(data))[0]) == ''.join(ODD)
        assert data.n_bytes == len(''.join(ODD).encode())
        (folder / file).write_text((folder / file).read_text() + '\n')
        assert f'{file} is not the tokenizer' in error_of(capsys, lambda f=folder: tokens.load(f, 'train').tokenizer)
        (folder / file).unlink()
        assert f'{file} is missing' in error_of(capsys, lambda f=folder: tokens.load(f, 'train').tokenizer)


def test_damaged_shards_are_refused(tmp_path, capsys):
    """Each bit flip in a header, a cut shard, an extra byte, another program's file, a token above the vocabulary: one line."""
    write_byte_shards(tmp_path, 100, 64)
    path = tmp_path / 'train_000001.bin'
    whole = path.read_bytes()
    with open(path, 'r+b', 0) as file:
        for bit in range(1024):
            at = bit // 8
            os.pwrite(file.fileno(), bytes([whole[at] ^ 1 << bit % 8]), at)
            with pytest.raises(ValueError, match='train_000001.bin'):
                tokens.read_header(path)
            os.pwrite(file.fileno(), whole[at:at + 1], at)
    assert path.read_bytes() == whole
    for content, word in ((whole[:-1], 'cut'), (whole + b'x', 'cut'), (whole[:50], 'cut short'), (b'', 'not a nanobit'),
                          (b'PK\x03\x04' + bytes(300), 'not a nanobit')):
        path.write_bytes(content)
        line = error_of(capsys, tokens.load, tmp_path, 'train')
        assert str(path) in line and word in line and 'run: python data/NAME/prepare.py' in line
    path.write_bytes(whole[:129] + b'\x80' + whole[130:])
    assert f'{path} is damaged: its tokens do not match their checksum' in error_of(capsys, tokens.load, tmp_path, 'train')


def test_tokens_of_an_earlier_version_have_no_checksum(tmp_path, capsys):
    """Such a file has zeros in its place and loads. A token above the vocabulary is refused when it is read, which on a GPU
    would be a device assert."""
    ids = write_byte_shards(tmp_path, 100)
    for path in tmp_path.glob('train*.bin'):
        head, body = path.read_bytes()[:84] + bytes(40), path.read_bytes()[128:]
        path.write_bytes(head + struct.pack('<I', zlib.crc32(head)) + body)
    assert tokens.load(tmp_path, 'train').windows([0], 100).tolist() == [ids.tolist()]
    path.write_bytes(path.read_bytes()[:129] + b'\x80' + body[2:])
    assert 'its vocabulary has 256' in error_of(capsys, tokens.load(tmp_path, 'train').windows, [0], 100)


def test_shards_of_different_tokenizers_or_with_a_gap_are_refused(tmp_path, capsys, bpe):
    """A folder mixed from two runs does not load, nor one that lacks a shard."""
    write_byte_shards(tmp_path)
    tokens.write(tmp_path, 'val', [[1, 2]], bpe)
    assert 'different tokenizers' in error_of(capsys, tokens.load, tmp_path, 'train')
    write_byte_shards(tmp_path)
    (tmp_path / 'train_000003.bin').unlink()
    assert 'lacks some of its train files' in error_of(capsys, tokens.load, tmp_path, 'train')


def test_a_missing_or_unfinished_folder_says_what_to_type(tmp_path, capsys):
    """The prepare.py to run, with --name for a sub-folder; after an interruption the same command."""
    def message(name):
        return error_of(capsys, tokens.load, tokens.dataset_dir(name), 'train')
    assert message('text/nowhere') == ('error: no tokens in data/text/nowhere; '
                                       'run: python data/text/prepare.py --name=nowhere')
    assert message('nowhere').startswith('error: no tokens in data/nowhere; run: python data/NAME/prepare.py')
    listed = message('nowhere').partition('one of: ')[2].split(', ')
    assert {'c4', 'fineweb95m', 'pycode', 'shakespeare', 'text', 'tinystories'} <= set(listed) and 'sst2' not in listed
    record = tokens.open_folder(tmp_path, {'a': 1}, ['--file', 'my text.txt'])
    tokens.write(tmp_path, 'train', [[1, 2]], tokens.byte())
    line = error_of(capsys, tokens.load, tmp_path, 'train')
    assert 'is unfinished' in line and line.endswith("--file 'my text.txt'")
    tokens.finish(tmp_path, record)
    assert len(tokens.load(tmp_path, 'train')) == 2
    assert 'no val tokens' in error_of(capsys, tokens.load, tmp_path, 'val')


def test_dataset_dir_does_not_depend_on_the_working_directory(tmp_path, monkeypatch):
    """Names are folders of the repository's data/; absolute and ./ paths stay what they are."""
    monkeypatch.chdir(tmp_path)
    assert tokens.dataset_dir('text/wikitext2') == tokens.ROOT / 'data' / 'text' / 'wikitext2'
    assert tokens.dataset_dir(str(tmp_path)) == tmp_path and tokens.dataset_dir('./here') == Path('./here')


def test_a_folder_is_kept_for_equal_settings_only(tmp_path, capsys):
    """Other settings, a lost, a cut or a changed shard remove the old tokens; foreign files stay."""
    def build(settings):
        record = tokens.open_folder(tmp_path, settings, [])
        if not record['complete']:
            write_byte_shards(tmp_path)
            tokens.finish(tmp_path, record)
        return capsys.readouterr().out
    build({'n': (1, 2)})
    (tmp_path / 'train_000099.bin.tmp').write_bytes(b'left over')
    (tmp_path / 'keep.txt').write_text('mine')
    assert 'left as it is' in build({'n': (1, 2)})
    assert 'has other settings' in build({'n': 3}) and not (tmp_path / 'train_000099.bin.tmp').exists()
    (tmp_path / 'train_000002.bin').unlink()
    assert 'is damaged' in build({'n': 3})
    path = tmp_path / 'val_000000.bin'
    path.write_bytes(path.read_bytes()[:-1] + b'\1')
    assert 'is damaged' in build({'n': 3})
    path.write_bytes(b'nanobit')
    assert 'is damaged' in build({'n': 3}) and 'left as it is' in build({'n': 3})
    (tmp_path / 'progress.json').write_text('{"complete":')
    assert 'train: 1,000 tokens' in build({'n': 3}) and (tmp_path / 'keep.txt').exists()
