"""The data/*/prepare.py scripts: real command lines, exact counts, interruptions, one-line errors. No network."""
import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data.arithmetic import prepare as arithmetic
from data.c4 import prepare as c4
from data.fineweb95m import prepare as fineweb95m
from data.pycode import prepare as pycode
from data.shakespeare import prepare as shakespeare
from data.text import prepare as text
from data.tictactoe import prepare as tictactoe
from data.tinystories import prepare as tinystories
from readers import documents, tasks, tokens

SHARED = tokens.ROOT.parent / 'shared' / 'data'
WORDS = 'the quick brown fox jumps over a lazy dog while bits become signs and signs become matrices'.split()
LINES = ''.join(f'{" ".join(WORDS[i % 7:i % 11 + 3])} {i}\n' for i in range(2000))


def command(script, *args, ok=True, cwd=None, **environment):
    """Runs data/<script>/prepare.py as a user does; -> stdout, or the single line on stderr where it must fail."""
    line = [sys.executable, str(tokens.ROOT / 'data' / script / 'prepare.py'), *map(str, args)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment}, timeout=60)
    if ok:
        assert done.returncode == 0, done.stderr
        return done.stdout
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith('error: '), (done.returncode, done.stderr)
    return lines[0]


def all_bytes(folder, split):
    """The text of a split, decoded from its tokens."""
    data = tokens.load(folder, split)
    ids = data.windows([0], len(data))[0]
    return bytes(ids.to(torch.uint8).numpy()) if data.vocab_size == 256 else data.tokenizer.decode_bytes(ids.tolist())


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob('*.bin'))}


class Crash(Exception):
    pass


def crash_and_continue(main, args, folder, monkeypatch, capsys, limits, between=lambda: None):
    """Runs `main` into a crash at the limit-th renaming of any file, for each limit where the one before stopped; then on."""
    replace, renames = os.replace, [0]

    def crash_at(limit):
        def replace_or_crash(*paths):
            renames[0] += 1
            if renames[0] >= limit:
                raise Crash
            replace(*paths)
        renames[0] = 0
        return replace_or_crash
    for limit in limits:
        monkeypatch.setattr(os, 'replace', crash_at(limit))
        try:
            main([*args, str(folder)])
        except Crash:
            if (folder / 'progress.json').exists():
                with pytest.raises(SystemExit):
                    tokens.load(folder, 'train')
                assert 'is unfinished' in capsys.readouterr().err
        monkeypatch.setattr(os, 'replace', replace)
        between()
    main([*args, str(folder)])


@pytest.fixture
def gpt2_files(monkeypatch):
    if not (SHARED / 'gpt2_bpe' / 'vocab.bpe').is_file():
        pytest.skip('needs GPT-2\'s vocab.bpe and encoder.json')
    monkeypatch.setattr(tokens, 'GPT2_BPE', SHARED / 'gpt2_bpe')


@pytest.fixture
def gpt2_cache(tmp_path):
    """TIKTOKEN_CACHE_DIR for a subprocess: tiktoken names a cached file by the SHA-1 of its address."""
    folder = tmp_path / 'tiktoken_cache'
    folder.mkdir()
    for name in tokens.GPT2_FILES:
        if not (SHARED / 'gpt2_bpe' / name).is_file():
            pytest.skip('needs GPT-2\'s vocab.bpe and encoder.json')
        key = hashlib.sha1((tokens.GPT2_URL + name).encode()).hexdigest()
        (folder / key).write_bytes((SHARED / 'gpt2_bpe' / name).read_bytes())
    return folder


@pytest.fixture
def c4_file():
    path = SHARED / 'c4' / 'c4_demo.jsonl'
    if not path.is_file():
        pytest.skip('needs the sample of C4')
    return path


def c4_texts(path):
    return [json.loads(line)['text'] for line in path.read_text(encoding='utf-8').splitlines()]


# --------------------------------------------------------------------------------------------------------- pycode


def test_pycode_writes_each_source_file_once(tmp_path):
    """From another folder: the two splits together hold every source file exactly, a NUL after each; then kept."""
    out = command('pycode', '--out_dir', tmp_path / 'py', cwd=tmp_path)
    root = Path(pycode.sysconfig.get_path('stdlib'))
    found = pycode.find(root)
    expected = {path: (root / path).read_bytes() for path in found}
    expected = {path: source for path, source in expected.items() if source and b'\0' not in source}
    for split in tokens.SPLITS:
        sources = [source for path, source in expected.items() if pycode.is_val(path) == (split == 'val')]
        assert all_bytes(tmp_path / 'py', split) == b''.join(source + b'\0' for source in sources)
        assert f'{split}: {len(sources)} files, {sum(map(len, sources)):,} bytes' in out
        assert tokens.load(tmp_path / 'py', split).n_bytes == sum(map(len, sources))
    assert 'os.py' in found and not any('/test/' in p or 'site-packages' in p or 'idlelib' in p for p in found)
    assert 0.02 < sum(map(pycode.is_val, found)) / len(found) < 0.09
    assert 'left as it is' in command('pycode', '--out_dir', tmp_path / 'py')


def test_pycode_follows_no_links_and_skips_tests(tmp_path):
    """Of a small tree only its own sources are found, in the order of their paths."""
    outside = tmp_path / 'outside'
    for path in ('lib/b.py', 'lib/a/x.py', 'lib/test/t.py', 'lib/a/tests/t.py', 'lib/site-packages/s.py', 'lib/n.txt',
                 'outside/o.py', 'lib/config-3.11-here/c.py', 'lib/_sysconfigdata_here.py'):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text('pass\n')
    (tmp_path / 'lib' / 'linked').symlink_to(outside)
    (tmp_path / 'lib' / 'o.py').symlink_to(outside / 'o.py')
    assert pycode.find(tmp_path / 'lib') == ['a/x.py', 'b.py']


# ----------------------------------------------------------------------------------------------------------- text


def test_text_in_bytes_is_the_file_cut_at_a_line_end(tmp_path):
    """Train + val is the file byte for byte, cut within a line of 95%; files are joined by one NUL."""
    (tmp_path / 'a.txt').write_text(LINES)
    (tmp_path / 'b.txt').write_bytes(b'caf\xe9 is Latin-1\n' * 100)
    out = command('text', '--file', 'a.txt', '--name=one', '--out_dir', tmp_path, cwd=tmp_path)
    train, val = all_bytes(tmp_path / 'one', 'train'), all_bytes(tmp_path / 'one', 'val')
    assert train + val == LINES.encode() and train.endswith(b'\n') and abs(len(val) / len(LINES) - 0.05) < 0.002
    assert f'expected: {len(train):,} bytes of training and {len(val):,}' in out
    command('text', '--file', 'a.txt', 'b.txt', '--val_file', 'b.txt', '--out_dir', tmp_path, cwd=tmp_path)
    assert all_bytes(tmp_path, 'train') == LINES.encode() + b'\0' + (tmp_path / 'b.txt').read_bytes()
    assert all_bytes(tmp_path, 'val') == (tmp_path / 'b.txt').read_bytes()


def test_text_bpe_is_lossless_trained_on_train_only_and_kept(tmp_path):
    """A vocabulary of 1,000 on WikiText: both splits decode exactly, a second run keeps them, another rebuilds."""
    path = SHARED / 'wikitext2' / 'test.txt'
    if not path.is_file():
        pytest.skip('needs WikiText-2')
    (tmp_path / 'val.txt').write_text('Zażółć gęślą jaźń 🎉\n' * 50)
    args = ('--file', path, '--val_file', tmp_path / 'val.txt', '--out_dir', tmp_path)
    command('text', *args, '--vocab=1000')
    val, train = tokens.load(tmp_path, 'val'), tokens.load(tmp_path, 'train')
    assert all_bytes(tmp_path, 'val') == (tmp_path / 'val.txt').read_bytes()
    assert all_bytes(tmp_path, 'train') == path.read_bytes() and train.n_bytes == path.stat().st_size
    assert train.vocab_size == 1000 and len(train) < 0.5 * train.n_bytes
    assert 'ż'.encode() not in [val.tokenizer.decode_bytes([i]) for i in range(1000)]
    before = shards(tmp_path)
    assert 'left as it is' in command('text', *args, '--vocab=1000') and shards(tmp_path) == before
    assert 'has other settings' in command('text', *args, '--vocab=256')
    assert tokens.load(tmp_path, 'train').vocab_size == 256 and not (tmp_path / 'tokenizer.json').exists()


def test_cut_and_blocks_on_awkward_texts():
    """Cuts fall between lines, else characters, and leave no side empty; blocks join to the text, each whole UTF-8."""
    import mmap

    def mapped(raw):
        memory = mmap.mmap(-1, len(raw))
        memory.write(raw)
        return memory
    assert text.cut(mapped(b'0123456789\n' * 100)) == 95 * 11
    assert text.cut(mapped(b'a\n' + b'x' * 998)) == 2
    assert text.cut(mapped(b'x' * 1000)) == 950
    assert text.cut(mapped('é'.encode() * 101)) == 190
    assert text.cut(mapped(b'x')) is None
    text.BLOCK, block = 10, text.BLOCK
    try:
        for sample in (LINES[:500], '🎉' * 50, 'é' * 33 + '\n' + '語' * 40, 'short'):
            raw = sample.encode()
            pieces = list(text.blocks(mapped(raw), 0, len(raw)))
            assert b''.join(pieces) == raw and all(piece.decode() for piece in pieces)
    finally:
        text.BLOCK = block


def test_text_mistakes_are_one_line(tmp_path):
    """Missing, empty, binary and non-UTF-8 files, a folder, impossible --vocab and --name: status 2, one line each."""
    (tmp_path / 'empty.txt').write_bytes(b'')
    (tmp_path / 'nul.txt').write_bytes(b'abc\0def')
    (tmp_path / 'latin.txt').write_bytes(b'caf\xe9\n' * 50)
    (tmp_path / 'one.txt').write_bytes(b'x')
    (tmp_path / 'a.txt').write_text(LINES)

    def refused(*args):
        return command('text', *args, '--out_dir', tmp_path / 'out', ok=False, cwd=tmp_path)
    assert 'cannot read no.txt: No such file' in refused('--file', 'no.txt')
    assert 'empty.txt is empty' in refused('--file', 'empty.txt')
    assert 'nul.txt has a NUL byte at offset 3' in refused('--file', 'nul.txt')
    assert 'latin.txt is not UTF-8 at byte 3' in refused('--file', 'latin.txt', '--vocab=300')
    assert 'one.txt is too short' in refused('--file', 'one.txt')
    assert 'cannot read' in refused('--file', '.')
    assert '--vocab=100 is impossible' in refused('--file', 'a.txt', '--vocab=100')
    assert 'yields only' in refused('--file', 'a.txt', '--vocab=50000')
    assert 'no folder name' in refused('--file', 'a.txt', '--name=../up')
    assert '--file' in refused('--vocab=0')
    assert not list(tmp_path.glob('out/*.bin'))


def test_utf8_error_position_counts_from_the_start_of_the_file(tmp_path, monkeypatch, capsys):
    """A character across a block border is fine; a bad byte in the third block is named by its offset in the file."""
    monkeypatch.setattr(text, 'BLOCK', 8)
    text.check_utf8('good', 'aéééééééééé🎉🎉'.encode())
    for offset in (7, 8, 20):
        raw = 'é'.encode() * 4 + b'x' * 30
        with pytest.raises(SystemExit):
            text.check_utf8('bad', raw[:offset] + b'\xff' + raw[offset + 1:])
        assert f'byte {6 if offset == 7 else offset}' in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- shakespeare


def test_shakespeare_checks_what_it_gets_and_splits_at_90_percent(tmp_path, monkeypatch, capsys):
    """A stand-in with a known digest comes 'down' from a file URL and is split 900 to 100; a changed one is refused."""
    raw = LINES.encode()[:1000]
    (tmp_path / 'play.txt').write_bytes(raw)
    monkeypatch.setattr(shakespeare, 'URL', (tmp_path / 'play.txt').as_uri())
    monkeypatch.setattr(shakespeare, 'SIZE', 1000)
    monkeypatch.setattr(shakespeare, 'SHA256', hashlib.sha256(raw).hexdigest())
    shakespeare.main(['--out_dir', str(tmp_path / 'out')])
    assert all_bytes(tmp_path / 'out', 'train') == raw[:900] and all_bytes(tmp_path / 'out', 'val') == raw[900:]
    shakespeare.main(['--out_dir', str(tmp_path / 'out')])
    assert 'left as it is' in capsys.readouterr().out
    (tmp_path / 'out' / 'input.txt').write_bytes(raw[::-1])
    with pytest.raises(SystemExit) as stop:
        shakespeare.main(['--out_dir', str(tmp_path / 'out')])
    assert stop.value.code == 2 and 'is not Tiny Shakespeare' in capsys.readouterr().err
    monkeypatch.setattr(shakespeare, 'URL', (tmp_path / 'nothing').as_uri())
    with pytest.raises(SystemExit) as stop:
        shakespeare.main(['--out_dir', str(tmp_path / 'new')])
    assert stop.value.code == 2 and 'type: --file PATH' in capsys.readouterr().err
    assert not list((tmp_path / 'new').iterdir())


def test_shakespeare_refuses_another_text(tmp_path):
    """--file with some other text: one line that names the script for it."""
    (tmp_path / 'a.txt').write_text(LINES)
    line = command('shakespeare', '--file', tmp_path / 'a.txt', '--out_dir', tmp_path, ok=False)
    assert 'expected 1,115,394' in line and 'data/text/prepare.py --file' in line
    assert 'there is no file' in command('shakespeare', '--file', tmp_path / 'b.txt', ok=False)


# ------------------------------------------------------------------------------------------------------------- c4


def test_c4_tokens_are_the_documents_in_order(tmp_path, c4_file, gpt2_cache):
    """300 documents, the last 15 validation, end-of-text after each, from the jsonl as from its two gzipped halves."""
    texts = c4_texts(c4_file)
    common = ('--shard_tokens=50000', '--out_dir')
    out = command('c4', '--file', c4_file, *common, tmp_path / 'a', TIKTOKEN_CACHE_DIR=str(gpt2_cache))
    for split, part in (('train', texts[:285]), ('val', texts[285:])):
        assert all_bytes(tmp_path / 'a', split).decode() == ''.join(t + tokens.EOT for t in part)
        assert tokens.load(tmp_path / 'a', split).n_bytes == sum(len(t.encode()) for t in part)
    assert 'which is all there is' in out and len(list((tmp_path / 'a').glob('train_*.bin'))) == 4
    lines = c4_file.read_bytes().splitlines(keepends=True)
    for name, half in (('1.json.gz', lines[:290]), ('2.json.gz', lines[290:])):
        (tmp_path / name).write_bytes(gzip.compress(b''.join(half)))
    command('c4', '--file', tmp_path / '1.json.gz', tmp_path / '2.json.gz', '--val_docs=15', *common, tmp_path / 'b',
            TIKTOKEN_CACHE_DIR=str(gpt2_cache))
    assert shards(tmp_path / 'a') == shards(tmp_path / 'b')


def test_c4_stops_at_the_tokens_asked_for(tmp_path, c4_file, gpt2_files):
    """--tokens=1e4 and --val_tokens=2_000 are exact, wherever a document or a shard ends."""
    c4.main(['--file', str(c4_file), '--tokens=1e4', '--val_tokens=2_000', '--shard_tokens=3000', '--out_dir',
             str(tmp_path)])
    assert len(tokens.load(tmp_path, 'train')) == 10_000 and len(tokens.load(tmp_path, 'val')) == 2_000
    assert len(list(tmp_path.glob('train_*.bin'))) == 4


@pytest.mark.parametrize('shard_tokens', [100, 2000])  # a document fills several shards; a shard holds several
def test_c4_continues_after_a_crash_at_any_point(tmp_path, c4_file, gpt2_files, monkeypatch, capsys, shard_tokens):
    """Crashed at the k-th renaming of any file and continued, the shards are the unbroken run's, byte for byte."""
    small = tmp_path / 'small.jsonl'
    small.write_bytes(b''.join(c4_file.read_bytes().splitlines(keepends=True)[:20]))
    args = ['--file', str(small), '--val_docs=2', f'--shard_tokens={shard_tokens}', '--tokens=9e3', '--out_dir']
    gpt2, folder = tokens.gpt2(), tmp_path / 'broken'
    monkeypatch.setattr(tokens, 'gpt2', lambda: gpt2)
    monkeypatch.setattr(documents, 'BATCH', 5)
    c4.main([*args, str(tmp_path / 'whole')])
    crash_and_continue(c4.main, args, folder, monkeypatch, capsys, (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 2, 10))
    assert shards(folder) == shards(tmp_path / 'whole') and len(tokens.load(folder, 'train')) > 5000
    c4.main([*args, str(folder)])
    assert 'left as it is' in capsys.readouterr().out


def test_c4_continues_after_being_killed(tmp_path, c4_file, gpt2_cache):
    """SIGKILL with some shards done: the next run says where it continues and ends with the same shards."""
    big = tmp_path / 'big.jsonl'
    big.write_bytes(c4_file.read_bytes() * 8)
    args = ['--file', str(big), '--shard_tokens=20000', '--out_dir']
    environment = {'TIKTOKEN_CACHE_DIR': str(gpt2_cache)}
    line = [sys.executable, str(tokens.ROOT / 'data' / 'c4' / 'prepare.py'), *args, str(tmp_path / 'killed')]
    run = subprocess.Popen(line, env={**os.environ, **environment}, stdout=subprocess.DEVNULL)
    deadline = time.time() + 30
    while not (tmp_path / 'killed' / 'train_000003.bin').exists() and time.time() < deadline:
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert 'finished shards' in command('c4', *args, tmp_path / 'killed', **environment)
    command('c4', *args, tmp_path / 'whole', **environment)
    assert shards(tmp_path / 'killed') == shards(tmp_path / 'whole')


def test_c4_streams_from_the_hub_file_by_file(tmp_path, c4_file, gpt2_files, monkeypatch, capsys):
    """With `datasets` reading local files in the Hub's place: id, config, revision and order are right, crashes too."""
    datasets = pytest.importorskip('datasets')
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    lines = c4_file.read_bytes().splitlines(keepends=True)
    for number in range(3):
        (tmp_path / f'{number}.jsonl').write_bytes(b''.join(lines[number * 5:number * 5 + 5]))
    (tmp_path / 'bad.jsonl').write_bytes(b'{"text": "fine"}\n{"text": oh\n')
    load_dataset, asked, failing = datasets.load_dataset, [], [False]

    def stand_in(name, config, split, revision, streaming):
        asked.append((name, config, split, revision, streaming))
        files = [str(tmp_path / f'{number}.jsonl') for number in ((2,) if split == 'validation' else (0, 1))]
        if failing[0]:
            files.append(str(tmp_path / 'bad.jsonl'))
        return load_dataset('json', data_files=files, split='train', streaming=streaming)
    monkeypatch.setattr(datasets, 'load_dataset', stand_in)
    texts = [json.loads(line)['text'] for line in lines[:15]]
    args = ['--shard_tokens=500', '--out_dir', str(tmp_path / 'out')]
    failing[0] = True
    with pytest.raises(SystemExit) as stop:
        c4.main(args)
    assert stop.value.code == 2 and 'the same command again to continue' in capsys.readouterr().err
    failing[0] = False
    c4.main(args)
    assert all_bytes(tmp_path / 'out', 'train').decode() == ''.join(t + tokens.EOT for t in texts[:10])
    assert all_bytes(tmp_path / 'out', 'val').decode() == ''.join(t + tokens.EOT for t in texts[10:])
    assert set(asked) == {('allenai/c4', 'en', split, c4.REVISION, True) for split in ('train', 'validation')}


def test_c4_mistakes_are_one_line(tmp_path, gpt2_cache):
    """A damaged line is named by file and number; so are a cut .gz, a missing file, too few documents, bad counts."""
    (tmp_path / 'bad.jsonl').write_text('{"text": "a"}\n\n{"text": "b"\n{"text": "c"}\n' + '{"text": "d"}\n' * 30)
    (tmp_path / 'list.jsonl').write_text('{"text": "a"}\n{"text": ["b"]}\n{"text": "d"}\n')
    (tmp_path / 'one.jsonl').write_text('{"text": "a"}\n')
    (tmp_path / 'cut.json.gz').write_bytes(gzip.compress(b'{"text": "a"}\n' * 9000)[:-20])

    def refused(*args):
        return command('c4', *args, '--out_dir', tmp_path / 'out', ok=False, cwd=tmp_path,
                       TIKTOKEN_CACHE_DIR=str(gpt2_cache))
    assert 'bad.jsonl, line 3: not a JSON object' in refused('--file', 'bad.jsonl')
    assert 'list.jsonl, line 2' in refused('--file', 'list.jsonl')
    assert 'cut.json.gz is a damaged' in refused('--file', 'cut.json.gz')
    assert 'cannot read no.jsonl' in refused('--file', 'no.jsonl')
    assert '1 documents cannot be split' in refused('--file', 'one.jsonl')
    assert 'type for example 1e9' in refused('--tokens=1.5') and 'type for example' in refused('--tokens=inf')
    assert 'goes with --file' in refused('--val_docs=3')


# ------------------------------------------------------------------------------------------ tinystories, fineweb95m

STORIES = [f'Story {i}.\n\nOnce, {" ".join(WORDS[i % 7:i % 11 + 5])} \u201c{i}\u201d.' for i in range(60)]


@pytest.fixture
def local(tmp_path):
    """{'tinystories': a text of 60 stories, 'fineweb95m': 60 documents as JSON lines}"""
    (tmp_path / 'a.txt').write_text(tokens.EOT.join(STORIES), encoding='utf-8')
    (tmp_path / 'a.jsonl').write_text(''.join(json.dumps({'text': story}) + '\n' for story in STORIES))
    return {'tinystories': tmp_path / 'a.txt', 'fineweb95m': tmp_path / 'a.jsonl'}


def ended(texts):
    return ''.join(text + tokens.EOT for text in texts)


def test_tinystories_of_the_sample(tmp_path):
    """3,117 stories, the last 155 validation, a BPE of 2,048 tokens made from the others alone; a second run keeps it."""
    path = SHARED / 'tinystories' / 'tinystories_a.txt'
    if not path.is_file():
        pytest.skip('needs the sample of TinyStories')
    stories = [story.strip() for story in path.read_text(encoding='utf-8').split(tokens.EOT) if story.strip()]
    args = ('--file', path, '--shard_tokens=100000', '--out_dir', tmp_path / 'out')
    out = command('tinystories', *args, cwd=tmp_path)
    assert len(stories) == 3117
    for split, part in (('train', stories[:-155]), ('val', stories[-155:])):
        data = tokens.load(tmp_path / 'out', split)
        assert all_bytes(tmp_path / 'out', split).decode() == ended(part)
        assert (data.windows([0], len(data)) == data.tokenizer.eot).sum() == len(part)
        assert data.n_bytes == len(''.join(part).encode()) and data.vocab_size == 2048
        assert 3.6 < data.n_bytes / len(data) < 3.75
        assert f'{split}: {len(data):,} tokens for {data.n_bytes:,} bytes' in out
    assert len(list((tmp_path / 'out').glob('train_*.bin'))) == 7
    assert (tmp_path / 'out' / 'tokenizer.json').read_text() == tokens.train_bpe(stories[:-155], 2048).text
    before = shards(tmp_path / 'out')
    assert 'left as it is' in command('tinystories', *args) and shards(tmp_path / 'out') == before


def test_tinystories_are_cut_at_each_mark(tmp_path):
    """Marks within and on lines, at the ends and doubled, plain or .gz; no story is lost, empty ones are not counted."""
    mark = tokens.EOT
    (tmp_path / 'a.txt').write_text(f'{mark}\none\n\nstory\n{mark}\n two{mark}three \n{mark}{mark}\n\n{mark}four\n')
    (tmp_path / 'b.txt.gz').write_bytes(gzip.compress(f'five\r\n{mark}'.encode()))
    (tmp_path / 'c.txt').write_text(f'six{mark}seven{mark}')
    common = ('--vocab=257', '--out_dir', tmp_path / 'out')
    command('tinystories', '--file', 'a.txt', 'b.txt.gz', '--val_file', 'c.txt', *common, cwd=tmp_path)
    assert all_bytes(tmp_path / 'out', 'train').decode() == ended(['one\n\nstory', 'two', 'three', 'four', 'five'])
    assert all_bytes(tmp_path / 'out', 'val').decode() == ended(['six', 'seven'])
    command('tinystories', '--file', 'a.txt', '--val_docs=2', *common, cwd=tmp_path)
    assert all_bytes(tmp_path / 'out', 'val').decode() == ended(['three', 'four'])


def test_fineweb95m_stops_at_the_tokens_asked_for(tmp_path, local):
    """--tokens=500 and --val_tokens=40 are exact, and --tokens leaves the vocabulary what it is."""
    args = ('--file', local['fineweb95m'], '--val_docs=20', '--vocab=300', '--shard_tokens=150', '--out_dir')
    command('fineweb95m', *args, tmp_path / 'a', '--tokens=500', '--val_tokens=40')
    assert len(tokens.load(tmp_path / 'a', 'train')) == 500 and len(tokens.load(tmp_path / 'a', 'val')) == 40
    assert len(list((tmp_path / 'a').glob('train_*.bin'))) == 4
    assert 'which is all there is' in command('fineweb95m', *args, tmp_path / 'b')
    for split, part in (('train', STORIES[:40]), ('val', STORIES[40:])):
        assert all_bytes(tmp_path / 'b', split).decode() == ended(part)
        assert all_bytes(tmp_path / 'b', split).startswith(all_bytes(tmp_path / 'a', split))
    assert (tmp_path / 'a' / 'tokenizer.json').read_bytes() == (tmp_path / 'b' / 'tokenizer.json').read_bytes()


@pytest.mark.parametrize('module', [tinystories, fineweb95m])
def test_a_vocabulary_is_made_from_the_first_characters(tmp_path, local, monkeypatch, module):
    """VOCAB_CHARS cuts within a document; what is behind, and validation, has no say; another number is another folder."""
    file, train = local[module.__name__.split('.')[1]], STORIES[:57]
    ends = [len(''.join(train[:number])) for number in range(58)]
    for chars in (1, 1000, 10 ** 6):
        monkeypatch.setattr(module, 'VOCAB_CHARS', chars)
        vocab = 257 if chars == 1 else 290
        module.main(['--file', str(file), f'--vocab={vocab}', '--out_dir', str(tmp_path / 'out')])
        cut = [story[:max(0, chars - end)] for story, end in zip(train, ends, strict=False)]
        assert (tmp_path / 'out' / 'tokenizer.json').read_text() == tokens.train_bpe(cut, vocab).text
        assert all_bytes(tmp_path / 'out', 'train').decode() == ended(train)


@pytest.mark.parametrize('module', [tinystories, fineweb95m])
@pytest.mark.parametrize('shard_tokens', [25, 200])  # a document fills several shards; a shard holds several
def test_trained_continues_after_a_crash_at_any_point(tmp_path, local, monkeypatch, capsys, module, shard_tokens):
    """Crashed at the k-th renaming and continued, the shards are the unbroken run's; its tokenizer is read, not made again."""
    args = ['--file', str(local[module.__name__.split('.')[1]]), '--vocab=300', f'--shard_tokens={shard_tokens}', '--out_dir']
    monkeypatch.setattr(documents, 'BATCH', 5)
    module.main([*args, str(tmp_path / 'whole')])
    train_bpe, trained = tokens.train_bpe, []
    monkeypatch.setattr(tokens, 'train_bpe', lambda *options: trained.append(1) or train_bpe(*options))
    crash_and_continue(module.main, args, tmp_path / 'broken', monkeypatch, capsys, (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 2, 10))
    assert shards(tmp_path / 'broken') == shards(tmp_path / 'whole')
    assert len(trained) == 2  # the second time, both its file and its place in the record got their names
    module.main([*args, str(tmp_path / 'broken')])
    assert 'left as it is' in capsys.readouterr().out


@pytest.mark.parametrize('lost', ['nothing', 'removed', 'changed'])
def test_a_folder_never_mixes_two_tokenizers(tmp_path, local, monkeypatch, capsys, lost):
    """Where no two trainings agree and the tokenizer gets lost between crashes, one has made all shards, if fewer."""
    train_bpe, trained, folder = tokens.train_bpe, [], tmp_path / 'out'
    path, shown = folder / 'tokenizer.json', []

    def train(texts, vocab):
        trained.append(1)
        junk = [f'{number * len(trained):x}' for number in range(1000)]  # all but the last know no word, and need more shards
        return train_bpe(texts if len(trained) == 8 else junk, vocab)

    def lose():
        shown.append(len(shards(folder)) if folder.exists() else 0)
        if lost == 'removed':
            path.unlink(missing_ok=True)
        if lost == 'changed' and path.exists():
            path.write_text(path.read_text().replace('"x', '"z', 1) + ' ')
    monkeypatch.setattr(tokens, 'train_bpe', train)
    monkeypatch.setattr(documents, 'BATCH', 5)
    args = ['--file', str(local['tinystories']), '--vocab=280', '--shard_tokens=100', '--out_dir']
    crash_and_continue(tinystories.main, args, folder, monkeypatch, capsys, (3, 4, 5, 9, 14, 2, 70), lose)
    assert lost == 'nothing' or shown[-1] > len(shards(folder)) > 5
    assert len(trained) == (2 if lost == 'nothing' else 8)
    for split, part in (('train', STORIES[:57]), ('val', STORIES[57:])):
        assert all_bytes(folder, split).decode() == ended(part)     # load() refuses shards of two tokenizers


@pytest.mark.parametrize('module', [tinystories, fineweb95m])
def test_trained_streams_from_the_hub(tmp_path, monkeypatch, capsys, module):
    """Parquet in the Hub's place: id, configuration, revision and splits are right, and it continues after a failure."""
    datasets = pytest.importorskip('datasets')
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    import pyarrow
    import pyarrow.parquet
    for number in range(3):
        table = pyarrow.table({'id': list(range(20)), 'text': STORIES[20 * number:20 * number + 20]})
        pyarrow.parquet.write_table(table, tmp_path / f'{number}.parquet', row_group_size=6)
    load_dataset, asked, failing = datasets.load_dataset, [], [True]
    fineweb = module is fineweb95m

    def stand_in(name, config, split, revision, streaming):
        asked.append((name, config, split, revision, streaming))
        numbers = (0, 1, 2) if fineweb else (2,) if split == 'validation' else (0, 1)
        files = [str(tmp_path / f'{number}.parquet') for number in numbers]
        loaded = load_dataset('parquet', data_files=files, split='train', streaming=streaming)
        assert loaded.num_shards == len(files)
        return Failing(loaded) if failing[0] else loaded

    class Failing:
        """A data set whose second file breaks off after three documents."""

        def __init__(self, dataset):
            self.dataset, self.num_shards = dataset, dataset.num_shards

        def shard(self, count, number):
            for i, row in enumerate(self.dataset.shard(count, number)):
                if number == 1 and i == 3:
                    raise ConnectionError('no route')
                yield row
    monkeypatch.setattr(datasets, 'load_dataset', stand_in)
    monkeypatch.setattr(module, 'VOCAB_CHARS', 500)
    monkeypatch.setattr(documents, 'BATCH', 5)
    args = ['--shard_tokens=100', '--vocab=280', '--out_dir', str(tmp_path / 'out')] + ['--val_docs=5'] * fineweb
    with pytest.raises(SystemExit) as stop:
        module.main(args)
    assert stop.value.code == 2 and 'the same command again to continue' in capsys.readouterr().err
    first = shards(tmp_path / 'out')
    failing[0] = False
    module.main(args)
    assert 'train: continuing after' in capsys.readouterr().out and len(first) > 5
    assert {name: shards(tmp_path / 'out')[name] for name in first} == first
    val, train = (STORIES[:5], STORIES[5:]) if fineweb else (STORIES[40:], STORIES[:40])
    assert all_bytes(tmp_path / 'out', 'train').decode() == ended(train)
    assert all_bytes(tmp_path / 'out', 'val').decode() == ended(val)
    hub = ('HuggingFaceFW/fineweb-edu', 'sample-10BT') if fineweb else ('roneneldan/TinyStories', None)
    splits = {'train'} if fineweb else {'train', 'validation'}
    assert set(asked) == {(*hub, split, module.REVISION, True) for split in splits}
    capsys.readouterr()
    monkeypatch.setattr(datasets, 'load_dataset', None)
    module.main(args)  # a finished folder needs no network
    assert 'left as it is' in capsys.readouterr().out


def test_tinystories_mistakes_are_one_line(tmp_path, local):
    """Files missing, empty, without marks or not UTF-8, vocabularies too small or large, options that do not go together."""
    (tmp_path / 'empty.txt').write_bytes(b'')
    (tmp_path / 'plain.txt').write_text(LINES)
    (tmp_path / 'one.txt').write_text('one' + tokens.EOT)
    (tmp_path / 'none.txt').write_text(f' {tokens.EOT}\n')
    (tmp_path / 'latin.txt').write_bytes(b'fine<|endoftext|> <|endoftext|>caf\xe9<|endoftext|>' * 20)

    def refused(*args):
        return command('tinystories', *args, '--out_dir', tmp_path / 'out', ok=False, cwd=tmp_path)
    assert 'cannot read no.txt: No such file' in refused('--file', 'no.txt')
    assert 'cannot read no.txt' in refused('--file', 'a.txt', '--val_file', 'no.txt')
    assert 'cannot read .: Is a directory' in refused('--file', '.')
    assert 'empty.txt is empty' in refused('--file', 'a.txt', 'empty.txt')
    assert 'no <|endoftext|> between stories' in (line := refused('--file', 'plain.txt'))
    assert line.endswith('python data/text/prepare.py --file plain.txt')
    assert '1 documents cannot be split' in refused('--file', 'one.txt')
    assert 'none.txt: no documents' in refused('--file', 'none.txt')
    assert 'latin.txt, story 3: not UTF-8' in refused('--file', 'latin.txt', '--vocab=257')
    assert refused('--file', 'a.txt', '--vocab=256').endswith('type --vocab=257 or more')
    assert 'type for example' in refused('--file', 'a.txt', '--vocab=big')
    assert 'yields only' in refused('--file', 'a.txt')  # 2,048 tokens are too many for it
    assert 'go with --file' in refused('--val_file', 'a.txt')
    assert 'leave one out' in refused('--file', 'a.txt', '--val_file', 'a.txt', '--val_docs=3')
    assert not list(tmp_path.glob('out/*.bin'))


def test_fineweb95m_mistakes_are_one_line(tmp_path, local):
    """A damaged line met in training the vocabulary is named; so are a missing file, an empty one, too few documents."""
    (tmp_path / 'bad.jsonl').write_text('{"text": "a"}\n\n{"text": "b"\n{"text": "c"}\n' + '{"text": "d"}\n' * 30)
    (tmp_path / 'empty.jsonl').write_text('')

    def refused(*args):
        return command('fineweb95m', *args, '--out_dir', tmp_path / 'out', ok=False, cwd=tmp_path)
    assert 'bad.jsonl, line 3: not a JSON object' in refused('--file', 'bad.jsonl')
    assert 'cannot read no.jsonl' in refused('--file', 'no.jsonl')
    assert 'empty.jsonl: no documents' in refused('--file', 'empty.jsonl')
    assert '60 documents cannot be split' in refused('--file', 'a.jsonl', '--val_docs=60')
    assert 'yields only' in refused('--file', 'a.jsonl')
    assert not list(tmp_path.glob('out/*.bin'))


def test_a_full_disk_or_a_file_in_the_way_is_one_line(tmp_path):
    """--out_dir below a file: no traceback."""
    (tmp_path / 'a.txt').write_text(LINES)
    assert 'Not a directory' in command('text', '--file', tmp_path / 'a.txt', '--out_dir', tmp_path / 'a.txt' / 'x',
                                        ok=False)


# ------------------------------------------------------------------------------------------- arithmetic, tictactoe


def lines_of(folder, split):
    found = all_bytes(folder, split)
    assert found.endswith(b'\n') and b'\n\n' not in found and b' ' not in found
    return found.decode().split('\n')[:-1]


def test_arithmetic_holds_problems_out_with_their_twins(tmp_path):
    """All 10,000 sums of numbers below 100: 889 held out, each there once, none in training, nor with its numbers exchanged;
    the others in one random order after another, the last one cut where 30,000 lines are full."""
    out = command('arithmetic', '--lines=30000', '--out_dir', tmp_path / 'a', cwd=tmp_path)
    train, val = (lines_of(tmp_path / 'a', split) for split in tokens.SPLITS)
    assert '9,111 problems to train on, 889 held out' in out and len(train) == 30000 and len(val) == len(set(val)) == 889
    assert set(train) | set(val) == {f'{a}+{b}={a + b}' for a in range(100) for b in range(100)} and not set(train) & set(val)
    twins = {f'{b}+{a}={c}' for a, b, c in (line.replace('=', '+').split('+') for line in val)}
    assert twins == set(val)
    orders = [train[i:i + 9111] for i in range(0, 30000, 9111)]
    assert [len(order) for order in orders] == [9111, 9111, 9111, 2667]
    assert all(len(set(order)) == len(order) for order in orders) and orders[0] != orders[1] != orders[2]
    assert orders[0] != sorted(orders[0]) and val != sorted(val)
    assert tokens.load(tmp_path / 'a', 'train').tokenizer.name == 'byte'


def test_arithmetic_of_several_operations(tmp_path, capsys):
    """Sums, differences and products of digits: every one right, negative answers among them, a tenth of each held out with
    its numbers exchanged as well; the same settings make the same bytes, others other ones."""
    args = ['--operations=*+-', '--digits=1', '--lines=1000', '--out_dir']
    for name in 'ab':
        arithmetic.main([*args, str(tmp_path / name)])
    train, val = (lines_of(tmp_path / 'a', split) for split in tokens.SPLITS)
    both = tasks.read_problems('\n'.join(train + val).encode())
    assert len(train) == 1000 and len(set(both)) == 300 and len(set(train)) + len(val) == 300 and not set(train) & set(val)
    assert {b'3-9=-6', b'9-3=6', b'7*8=56', b'0+0=0'} <= set(both)
    for operation in '+*-':
        held_out = {line.split('=')[0] for line in val if operation in line.split('=')[0]}
        assert 4 <= len(held_out) <= 20
        twins = {operation.join(line.split(operation)[::-1]) for line in held_out}
        assert twins == held_out
    assert shards(tmp_path / 'a') == shards(tmp_path / 'b')
    before = shards(tmp_path / 'a')
    capsys.readouterr()
    arithmetic.main([*args, str(tmp_path / 'a')])
    assert 'left as it is' in capsys.readouterr().out and shards(tmp_path / 'a') == before
    arithmetic.main(['--operations=-', *args[1:], str(tmp_path / 'a')])
    assert 'has other settings' in capsys.readouterr().out
    assert {line for line in lines_of(tmp_path / 'a', 'val')} == {line for line in val if '-' in line.split('=')[0]}


def test_tictactoe_games(tmp_path):
    """3,000 games to train on and 198 others, none of which is played in training by anybody; every one played to its end,
    perfect sides with best moves only, sides at random not; a third each mr and rm, a sixth each mm and rr."""
    out = command('tictactoe', '--games=3000', '--val_games=198', '--out_dir', tmp_path / 'a', cwd=tmp_path)
    train, val = (lines_of(tmp_path / 'a', split) for split in tokens.SPLITS)
    assert '3,000 games to train on, 198 held out: 66 mr, 66 rm, 33 mm, 33 rr' in out
    assert len(train) == 3000 and len(val) == len(set(val)) == 198
    assert tasks.read_games('\n'.join(train + val).encode()) == train + val
    assert not {line[2:] for line in train} & {line[2:] for line in val}
    for kinds, share in (('mr', 1 / 3), ('rm', 1 / 3), ('mm', 1 / 6), ('rr', 1 / 6)):
        games = [line for line in train if line[:2] == kinds]
        assert abs(len(games) / 3000 - share) < 0.02 and sum(line[:2] == kinds for line in val) == 198 * share
        for side, kind in enumerate(kinds):
            best = [line[2 + i] in tasks.best_moves(line[2:2 + i]) for line in games for i in range(side, len(line) - 3, 2)]
            assert all(best) if kind == 'm' else 0.3 < sum(best) / len(best) < 0.9
        assert {'mr': 'O', 'rm': 'X'}.get(kinds, '') not in {line[-1] for line in games} and len(set(games)) > len(games) / 3
    assert {line[-1] for line in train} == set('XO-')


def test_tictactoe_is_repeatable_and_counts_exactly(tmp_path, capsys):
    """The same settings make the same bytes; held out are as many as come up until the training games are
    there; a game is held out by its
    moves alone, whoever plays."""
    for name in 'ab':
        tictactoe.main(['--games=1', '--val_games=300', f'--out_dir={tmp_path / name}'])
    assert shards(tmp_path / 'a') == shards(tmp_path / 'b')
    train, val = (lines_of(tmp_path / 'a', split) for split in tokens.SPLITS)
    assert len(train) == 1 and not tictactoe.is_val(train[0])
    assert 50 < len(set(val)) == len(val) < 300 and all(map(tictactoe.is_val, val))
    assert all(tictactoe.is_val(kinds + line[2:]) for line in val for kinds in ('mr', 'rm', 'mm', 'rr'))
    capsys.readouterr()
    tictactoe.main(['--games=1', '--val_games=300', f'--out_dir={tmp_path / "a"}'])
    assert 'left as it is' in capsys.readouterr().out
    tictactoe.main(['--games=1500', '--val_games=10', f'--out_dir={tmp_path / "a"}'])
    assert 'has other settings' in capsys.readouterr().out
    more = lines_of(tmp_path / 'a', 'train')
    assert len(more) == 1500 and more[0] == train[0] and len(lines_of(tmp_path / 'a', 'val')) == 8
    assert set(lines_of(tmp_path / 'a', 'val')) <= set(val)


@pytest.mark.parametrize('module, args', [
    (arithmetic, ['--digits=1', '--lines=500', '--out_dir']), (tictactoe, ['--games=50', '--val_games=6', '--out_dir'])])
def test_what_is_made_here_goes_on_after_a_crash(tmp_path, monkeypatch, capsys, module, args):
    """Crashed at the k-th renaming of any file and started again: refused in between, in the end the unbroken run's bytes."""
    module.main([*args, str(tmp_path / 'whole')])
    crash_and_continue(module.main, args, tmp_path / 'broken', monkeypatch, capsys, (1, 2, 3, 4))
    assert shards(tmp_path / 'broken') == shards(tmp_path / 'whole') and len(shards(tmp_path / 'whole')) == 2


def test_arithmetic_and_tictactoe_mistakes_are_one_line(tmp_path):
    """Operations that there are not, numbers out of range, unknown options, a file in the way: status 2, nothing written."""
    (tmp_path / 'file').write_text('')

    def refused(script, *args, out='out'):
        return command(script, *args, '--out_dir', tmp_path / out, ok=False, cwd=tmp_path)
    for operations in ('/', '+/', '', 'plus'):
        assert f'--operations={operations} are not some of + - *' in refused('arithmetic', f'--operations={operations}')
    for option in ('--digits=0', '--digits=4', '--lines=0', '--lines=-5'):
        assert option in refused('arithmetic', option)
    assert 'unrecognized arguments: --digit=2' in refused('arithmetic', '--digit=2')
    assert 'invalid int value' in refused('arithmetic', '--lines=many')
    for option in ('--games=0', '--val_games=0', '--val_games=5', '--games=-1'):
        assert option in refused('tictactoe', option)
    assert '--game=2' in refused('tictactoe', '--game=2')
    for script in ('arithmetic', 'tictactoe'):
        assert 'Not a directory' in refused(script, out='file/x')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['file']
