"""The data/*/prepare.py scripts: command lines, exact counts, interruptions, one-line errors. No network."""
import contextlib
import gzip
import hashlib
import json
import os
from pathlib import Path

import pytest

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
STORIES = [f'Story {i}.\n\nOnce, {" ".join(WORDS[i % 7:i % 11 + 5])} \u201c{i}\u201d.' for i in range(60)]
BAD_LINE = '{"text": "a"}\n\n{"text": "b"\n{"text": "c"}\n' + '{"text": "d"}\n' * 30     # line 3


def all_bytes(folder, split):
    """The text of a split, decoded from its tokens."""
    data = tokens.load(folder, split)
    ids = data.windows([0], len(data))[0]
    return data.tokenizer.decode_bytes(ids.tolist())


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob('*.bin'))}


def ended(texts):
    return ''.join(text + tokens.EOT for text in texts)


def crash_and_continue(main, args, folder, monkeypatch, capsys, limits, between=lambda: None):
    """Runs `main` into a crash at the limit-th renaming of any file, for each limit where the one before stopped; then on."""
    class Crash(Exception):
        pass

    def replace_or_crash(*paths, replace=os.replace):
        nonlocal left
        left -= 1
        if left <= 0:
            raise Crash
        replace(*paths)
    for left in limits:
        with monkeypatch.context() as patch:
            patch.setattr(os, 'replace', replace_or_crash)
            with contextlib.suppress(Crash):
                main([*args, str(folder)])
        if left <= 0 and (folder / 'progress.json').exists():
            with pytest.raises(SystemExit):
                tokens.load(folder, 'train')
            assert 'is unfinished' in capsys.readouterr().err
        between()
    main([*args, str(folder)])


@pytest.fixture
def gpt2_files(tmp_path, monkeypatch):
    """GPT-2's files in the cache of tiktoken, which names a file by the SHA-1 of its address."""
    cache = tmp_path / 'tiktoken_cache'
    cache.mkdir()
    for name in tokens.GPT2_FILES:
        if not (SHARED / 'gpt2_bpe' / name).is_file():
            pytest.skip('needs vocab.bpe and encoder.json of GPT-2')
        (cache / hashlib.sha1((tokens.GPT2_URL + name).encode()).hexdigest()).symlink_to(SHARED / 'gpt2_bpe' / name)
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(cache))
    gpt2 = tokens.gpt2()
    monkeypatch.setattr(tokens, 'gpt2', lambda *_: gpt2)


@pytest.fixture
def local(tmp_path):
    """Arguments for 60 documents: {'tinystories': a text with marks, 'fineweb95m' and 'c4': JSON lines}"""
    (tmp_path / 'a.txt').write_text(tokens.EOT.join(STORIES), encoding='utf-8')
    (tmp_path / 'a.jsonl').write_text(''.join(json.dumps({'text': story}) + '\n' for story in STORIES))
    return {name: ['--file', str(tmp_path / ('a.txt' if name == 'tinystories' else 'a.jsonl')),
                   *['--vocab=300'] * (name != 'c4')] for name in ('tinystories', 'fineweb95m', 'c4')}


# ------------------------------------------------------------------------------------------------- pycode, text


def test_pycode_writes_each_source_file_once(tmp_path, command, monkeypatch):
    """The two splits together hold every source file exactly, a NUL after each; a second run keeps them. No links, no tests."""
    lib = tmp_path / 'lib'
    sources = {f'a/{i:02d}.py': f'# {i}\n'.encode() for i in range(60)} | {'b.py': b'caf\xe9'}
    others = ['test/t.py', 'a/tests/t.py', 'site-packages/s.py', 'n.txt', '../outside/o.py', 'config-3.11-here/c.py',
              '_sysconfigdata_here.py']
    for path, source in {**sources, **dict.fromkeys(others, b'pass\n'), 'empty.py': b'', 'nul.py': b'a\0b'}.items():
        (lib / path).parent.mkdir(parents=True, exist_ok=True)
        (lib / path).write_bytes(source)
    (lib / 'linked').symlink_to(tmp_path / 'outside')
    (lib / 'o.py').symlink_to(tmp_path / 'outside' / 'o.py')
    assert pycode.find(lib) == [*sources, 'empty.py', 'nul.py']
    with monkeypatch.context() as patch:
        patch.setattr(pycode.sysconfig, 'get_path', {'stdlib': str(lib)}.get)
        out = command('pycode', '--out_dir', 'py')
        assert 'left as it is' in command('pycode', '--out_dir', 'py')
    for split in tokens.SPLITS:
        expected = [source for path, source in sources.items() if pycode.is_val(path) == (split == 'val')]
        assert all_bytes(tmp_path / 'py', split) == b''.join(source + b'\0' for source in expected)
        assert f'{split}: {len(expected)} files, {sum(map(len, expected)):,} bytes' in out
        assert tokens.load(tmp_path / 'py', split).n_bytes == sum(map(len, expected))
    library = pycode.find(Path(pycode.sysconfig.get_path('stdlib')))
    assert 'os.py' in library and not any('/test/' in path or 'site-packages' in path for path in library)
    assert 0.02 < sum(map(pycode.is_val, library)) / len(library) < 0.09


@pytest.mark.parametrize('raw, cut', [('0123456789\n' * 100, 95 * 11), ('a\n' + 'x' * 998, 2),
                                      ('é' * 101, 190), ('é' * 33 + '\n' + '語' * 40, 67)])
def test_text_is_cut_between_lines_or_characters(tmp_path, monkeypatch, raw, cut):
    """Neither side is empty, and both decode exactly, though the file is read in blocks of 10 bytes."""
    monkeypatch.setattr(text, 'BLOCK', 10)
    (tmp_path / 'a.txt').write_text(raw)
    text.main(['--file', str(tmp_path / 'a.txt'), '--vocab=257', '--out_dir', str(tmp_path)])
    train, val = all_bytes(tmp_path, 'train'), all_bytes(tmp_path, 'val')
    assert (train + val).decode() == raw and len(train) == cut


def test_text_in_bytes_is_the_file_cut_at_a_line_end(tmp_path, command):
    """Train + val is the file byte for byte, cut within a line of 95%; one NUL joins two files."""
    (tmp_path / 'a.txt').write_text(LINES)
    (tmp_path / 'b.txt').write_bytes(b'caf\xe9 is Latin-1\n' * 100)
    out = command('text', '--file', 'a.txt', '--name=one', '--out_dir', tmp_path)
    train, val = all_bytes(tmp_path / 'one', 'train'), all_bytes(tmp_path / 'one', 'val')
    assert train + val == LINES.encode() and train.endswith(b'\n') and abs(len(val) / len(LINES) - 0.05) < 0.002
    assert f'{len(train):,} bytes of training and {len(val):,}' in out
    command('text', '--file', 'a.txt', 'b.txt', '--val_file', 'b.txt', '--out_dir', tmp_path)
    assert all_bytes(tmp_path, 'train') == LINES.encode() + b'\0' + (tmp_path / 'b.txt').read_bytes()
    assert all_bytes(tmp_path, 'val') == (tmp_path / 'b.txt').read_bytes()


def test_text_bpe_is_lossless_trained_on_train_only_and_kept(tmp_path, command):
    """Both splits decode exactly; a second run keeps them, another vocabulary size rebuilds them."""
    (tmp_path / 'train.txt').write_text(LINES)
    (tmp_path / 'val.txt').write_text('Zażółć gęślą jaźń 🎉\n' * 50)
    args = ('text', '--file', 'train.txt', '--val_file', 'val.txt', '--out_dir', tmp_path)
    command(*args, '--vocab=400')
    val, train = tokens.load(tmp_path, 'val'), tokens.load(tmp_path, 'train')
    assert all_bytes(tmp_path, 'val') == (tmp_path / 'val.txt').read_bytes()
    assert all_bytes(tmp_path, 'train').decode() == LINES and train.n_bytes == len(LINES)
    assert train.vocab_size == 400 and len(train) < 0.5 * train.n_bytes
    assert 'ż'.encode() not in [val.tokenizer.decode_bytes([i]) for i in range(400)]
    before = shards(tmp_path)
    assert 'left as it is' in command(*args, '--vocab=400') and shards(tmp_path) == before
    assert 'has other settings' in command(*args, '--vocab=256')
    assert tokens.load(tmp_path, 'train').vocab_size == 256 and not (tmp_path / 'tokenizer.json').exists()


# ----------------------------------------------------------------------------------------------------- mistakes

MISTAKES = {
    'text': (('--file no.txt', 'cannot read no.txt: No such file'), ('--file empty', 'empty is empty'),
             ('--file nul.txt', 'NUL byte at offset 3'), ('--file latin.txt --vocab=300', 'not UTF-8 at byte 1,200,003'),
             ('--file one.txt', 'too short'), ('--file .', 'cannot read'), ('--file a.txt --vocab=100', '--vocab=100'),
             ('--file a.txt --vocab=50000', 'yields only'), ('--file a.txt --name=../up', 'no folder name'),
             ('--vocab=0', '--file'), ('--file a.txt --out_dir a.txt/x', 'Not a directory')),
    'shakespeare': (('--file a.txt', '1,115,394'), ('--file a.txt', 'data/text/prepare.py --file'), ('--file no', 'no file')),
    'c4': (('--file bad.jsonl', 'bad.jsonl, line 3'), ('--file list.jsonl', 'list.jsonl, line 2'),
           ('--file deep.jsonl', 'deep.jsonl, line 10: not a JSON object'),
           ('--file cut.json.gz', 'cut.json.gz is a damaged'), ('--file no.jsonl', 'cannot read no.jsonl'),
           ('--file one.jsonl', '1 documents'), ('--tokens=1.5', 'type for example'), ('--tokens=inf', 'type for example'),
           ('--val_docs=3', '--file')),
    'tinystories': (('--file a.txt --val_file no.txt', 'cannot read no'), ('--file .', 'cannot read .: Is a directory'),
                    ('--file a.txt empty', 'empty is empty'), ('--file plain.txt', 'no <|endoftext|>'),
                    ('--file plain.txt', 'data/text/prepare.py --file plain.txt'),
                    ('--file one.txt', '1 documents'), ('--file none.txt', 'none.txt: no documents'),
                    ('--file latins.txt --vocab=257', 'latins.txt, story 3: not UTF-8'),
                    ('--file a.txt --vocab=256', '--vocab=257'), ('--file a.txt --vocab=big', 'type for example'),
                    ('--file a.txt', 'yields only'), ('--val_file a.txt', '--file'),       # 2,048 tokens are too many for it
                    ('--file a.txt --val_file a.txt --val_docs=3', 'leave one out')),
    'fineweb95m': (('--file bad.jsonl', 'bad.jsonl, line 3'), ('--file empty', 'empty: no documents'),
                   ('--file a.jsonl --val_docs=60', '60 documents'), ('--file a.jsonl', 'yields only')),
    'arithmetic': (*((f'--operations={o}', f'--operations={o} ') for o in ('/', '+/', '', 'plus')),
                   *((o, o) for o in ('--digits=0', '--digits=4', '--lines=0', '--lines=-5', '--digit=2')),
                   ('--lines=many', 'many'), ('--out_dir a.txt/x', 'Not a directory')),
    'tictactoe': (*((o, o) for o in ('--games=0', '--val_games=0', '--val_games=5', '--games=-1', '--game=2')),
                  ('--out_dir a.txt/x', 'Not a directory'))}


@pytest.mark.parametrize('script', MISTAKES)
def test_mistakes_are_one_line(tmp_path, local, command, request, script):
    """A missing, empty, damaged or foreign file, an impossible option: status 2, one line that names it, nothing written."""
    files = {'empty': b'', 'nul.txt': b'abc\0def', 'latin.txt': 'é'.encode() * 600_000 + b'caf\xe9\n',
             'one.txt': b'x', 'plain.txt': LINES.encode(),
             'none.txt': f' {tokens.EOT}\n'.encode(), 'bad.jsonl': BAD_LINE.encode(), 'one.jsonl': b'{"text": "a"}\n',
             'latins.txt': b'fine<|endoftext|> <|endoftext|>caf\xe9<|endoftext|>' * 20,
             'list.jsonl': b'{"text": "a"}\n{"text": ["b"]}\n{"text": "d"}\n',
             'deep.jsonl': b'{"text": "a"}\n' * 9 + b'{"text": "a", "more": ' + b'[' * 100_000 + b'\n',
             'cut.json.gz': gzip.compress(b'{"text": "a"}\n' * 9000)[:-20]}
    if script == 'tinystories':
        files['one.txt'] = b'one' + tokens.EOT.encode()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    if script == 'c4':
        request.getfixturevalue('gpt2_files')
    for args, says in MISTAKES[script]:
        assert says in command(script, '--out_dir', 'out', *args.split(' '), ok=False)
        assert not list(tmp_path.glob('out/*.bin'))


# --------------------------------------------------------------------------------------------------- shakespeare


def test_shakespeare_checks_what_it_gets_and_splits_at_90_percent(tmp_path, monkeypatch, capsys):
    """A file with the expected digest is downloaded and split 900 to 100; a changed one is refused."""
    def refused(name):
        with pytest.raises(SystemExit) as stop:
            shakespeare.main(['--out_dir', str(tmp_path / name)])
        assert stop.value.code == 2
        return capsys.readouterr().err
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
    assert 'is not Tiny Shakespeare' in refused('out')
    monkeypatch.setattr(shakespeare, 'URL', (tmp_path / 'nothing').as_uri())
    assert '--file PATH' in refused('new') and not list((tmp_path / 'new').iterdir())


# ------------------------------------------------------------------------------- tinystories, fineweb95m, streaming


def test_tinystories_are_cut_at_each_mark(tmp_path, command):
    """Marks within and on lines, at the ends and doubled, plain or .gz: no story is lost, no empty one counts."""
    mark = tokens.EOT
    (tmp_path / 'a.txt').write_text(f'{mark}\none\n\nstory\n{mark}\n two{mark}three \n{mark}{mark}\n\n{mark}four\n')
    (tmp_path / 'b.txt.gz').write_bytes(gzip.compress(f'five\r\n{mark}'.encode()))
    (tmp_path / 'c.txt').write_text(f'six{mark}seven{mark}')
    common = ('--vocab=257', '--out_dir', tmp_path / 'out')
    command('tinystories', '--file', 'a.txt', 'b.txt.gz', '--val_file', 'c.txt', *common)
    assert all_bytes(tmp_path / 'out', 'train').decode() == ended(['one\n\nstory', 'two', 'three', 'four', 'five'])
    assert all_bytes(tmp_path / 'out', 'val').decode() == ended(['six', 'seven'])
    command('tinystories', '--file', 'a.txt', '--val_docs=2', *common)
    assert all_bytes(tmp_path / 'out', 'val').decode() == ended(['three', 'four'])


def test_fineweb95m_stops_at_the_tokens_asked_for(tmp_path, local, capsys):
    """--tokens=5e2 and --val_tokens=4_0 are exact, and --tokens leaves the vocabulary what it is."""
    build = lambda name, *limits: fineweb95m.main([*local['fineweb95m'], '--val_docs=20', '--shard_tokens=150', *limits,
                                                   f'--out_dir={tmp_path / name}'])
    build('a', '--tokens=5e2', '--val_tokens=4_0')
    assert len(tokens.load(tmp_path / 'a', 'train')) == 500 and len(tokens.load(tmp_path / 'a', 'val')) == 40
    assert len(list((tmp_path / 'a').glob('train_*.bin'))) == 4
    build('b')
    assert 'which is all there is' in capsys.readouterr().out
    for split, part in (('train', STORIES[:40]), ('val', STORIES[40:])):
        assert all_bytes(tmp_path / 'b', split).decode() == ended(part)
        assert all_bytes(tmp_path / 'b', split).startswith(all_bytes(tmp_path / 'a', split))
    assert (tmp_path / 'a' / 'tokenizer.json').read_bytes() == (tmp_path / 'b' / 'tokenizer.json').read_bytes()


def test_half_a_surrogate_pair_is_one_replacement_character(tmp_path):
    """JSON may hold it, UTF-8 may not; tiktoken, and so c4, reads it as U+FFFD, and so do vocabularies trained here."""
    stories = [*STORIES, 'before \ud83d after', 'a whole one: \U0001f389']
    (tmp_path / 'a.jsonl').write_text(''.join(json.dumps({'text': story}) + '\n' for story in stories))
    fineweb95m.main(['--file', str(tmp_path / 'a.jsonl'), '--vocab=300', '--val_docs=2', f'--out_dir={tmp_path}/out'])
    assert all_bytes(tmp_path / 'out', 'val').decode() == ended(['before \ufffd after', stories[-1]])


@pytest.mark.parametrize('module', [tinystories, fineweb95m])
def test_a_vocabulary_is_made_from_the_first_characters(tmp_path, local, monkeypatch, module):
    """VOCAB_CHARS cuts within a document; the rest and the validation split do not count; another number is another folder."""
    train = STORIES[:57]
    starts = [len(''.join(train[:number])) for number in range(57)]
    for chars in (1, 1000, 10 ** 6):
        monkeypatch.setattr(module, 'VOCAB_CHARS', chars)
        vocab = 257 if chars == 1 else 290
        module.main([*local[module.__name__.split('.')[1]], f'--vocab={vocab}', '--out_dir', str(tmp_path / 'out')])
        cut = [story[:max(0, chars - start)] for story, start in zip(train, starts, strict=True)]
        assert (tmp_path / 'out' / 'tokenizer.json').read_text() == tokens.train_bpe(cut, vocab).text
        assert all_bytes(tmp_path / 'out', 'train').decode() == ended(train)


@pytest.mark.parametrize('module, shard_tokens', [          # a document fills several shards; a shard holds several
    (c4, 25), (tinystories, 200), (fineweb95m, 25)])
def test_documents_continue_after_a_crash_at_any_point(tmp_path, local, monkeypatch, capsys, request, module, shard_tokens):
    """Crashed at the k-th renaming and continued, the shards are those of an unbroken run, whose tokenizer is trained once."""
    if module is c4:
        request.getfixturevalue('gpt2_files')
    args = [*local[module.__name__.split('.')[1]], f'--shard_tokens={shard_tokens}', '--out_dir']
    monkeypatch.setattr(documents, 'BATCH', 5)
    module.main([*args, str(tmp_path / 'whole')])
    train_bpe, trained = tokens.train_bpe, []
    monkeypatch.setattr(tokens, 'train_bpe', lambda *options: trained.append(1) or train_bpe(*options))
    crash_and_continue(module.main, args, tmp_path / 'broken', monkeypatch, capsys, (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 2, 10))
    assert shards(tmp_path / 'broken') == shards(tmp_path / 'whole')
    for split, part in (('train', STORIES[:57]), ('val', STORIES[57:])):
        assert all_bytes(tmp_path / 'broken', split).decode() == ended(part)
        assert tokens.load(tmp_path / 'broken', split).n_bytes == sum(len(story.encode()) for story in part)
    assert len(trained) == (0 if module is c4 else 2)  # the second time both its file and the record of it were complete
    module.main([*args, str(tmp_path / 'broken')])
    assert 'left as it is' in capsys.readouterr().out


@pytest.mark.parametrize('lost', ['removed', 'changed'])
def test_a_folder_never_mixes_two_tokenizers(tmp_path, local, monkeypatch, capsys, lost):
    """If no two trainings agree and the tokenizer gets lost between crashes, a single one has made all shards."""
    train_bpe, trained, folder = tokens.train_bpe, [], tmp_path / 'out'
    path, counts = folder / 'tokenizer.json', []

    def train(texts, vocab):
        trained.append(1)
        junk = [f'{number * len(trained):x}' for number in range(1000)]  # all but the last know no word, and need more shards
        return train_bpe(texts if len(trained) == 8 else junk, vocab)

    def lose():
        counts.append(len(shards(folder)) if folder.exists() else 0)
        if lost == 'removed':
            path.unlink(missing_ok=True)
        elif path.exists():
            path.write_text(path.read_text().replace('"x', '"z', 1) + ' ')
    monkeypatch.setattr(tokens, 'train_bpe', train)
    monkeypatch.setattr(documents, 'BATCH', 5)
    args = [*local['tinystories'], '--vocab=280', '--shard_tokens=100', '--out_dir']
    crash_and_continue(tinystories.main, args, folder, monkeypatch, capsys, (3, 4, 5, 9, 14, 2, 70), lose)
    assert counts[-1] > len(shards(folder)) > 5 and len(trained) == 8
    for split, part in (('train', STORIES[:57]), ('val', STORIES[57:])):
        assert all_bytes(folder, split).decode() == ended(part)     # load() refuses shards of two tokenizers


@pytest.mark.parametrize('module, hub', [(c4, ('allenai/c4', 'en')), (tinystories, ('roneneldan/TinyStories', None)),
                                         (fineweb95m, ('HuggingFaceFW/fineweb-edu', 'sample-10BT'))])
def test_streaming_from_the_hub(tmp_path, monkeypatch, capsys, request, module, hub):
    """With local files in the Hub's place: id, configuration, revision and splits are right; it continues after a failure."""
    import datasets
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    for number in range(3):
        (tmp_path / f'{number}.jsonl').write_text(''.join(
            json.dumps({'id': i, 'text': STORIES[i]}) + '\n' for i in range(20 * number, 20 * number + 20)))
    load_dataset, asked, failing = datasets.load_dataset, set(), [True]
    one_split = module is fineweb95m

    def stand_in(name, config, split, revision, streaming):
        asked.add((name, config, split, revision, streaming))
        numbers = (0, 1, 2) if one_split else (2,) if split == 'validation' else (0, 1)
        files = [str(tmp_path / f'{number}.jsonl') for number in numbers]
        loaded = load_dataset('json', data_files=files, split='train', streaming=streaming)
        assert loaded.num_shards == len(files)
        return Failing(loaded) if failing else loaded

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
    monkeypatch.setattr(documents, 'BATCH', 5)
    args = ['--shard_tokens=100', '--out_dir', str(tmp_path / 'out')] + ['--val_docs=5'] * one_split
    if module is c4:
        request.getfixturevalue('gpt2_files')
    else:
        monkeypatch.setattr(module, 'VOCAB_CHARS', 500)
        args.append('--vocab=280')
    with pytest.raises(SystemExit) as stop:
        module.main(args)
    assert stop.value.code == 2 and 'the same command again to continue' in capsys.readouterr().err
    first = shards(tmp_path / 'out')
    failing.clear()
    module.main(args)
    assert 'train: continuing after' in capsys.readouterr().out and len(first) > 3
    assert first.items() <= shards(tmp_path / 'out').items()
    val, train = (STORIES[:5], STORIES[5:]) if one_split else (STORIES[40:], STORIES[:40])
    for split, part in (('train', train), ('val', val)):
        assert all_bytes(tmp_path / 'out', split).decode() == ended(part)
    assert asked == {(*hub, split, module.REVISION, True) for split in ['train'] + ['validation'] * (not one_split)}
    monkeypatch.setattr(datasets, 'load_dataset', None)
    module.main(args)  # a finished folder needs no network
    assert 'left as it is' in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- arithmetic, tictactoe


def lines_of(folder, split):
    raw = all_bytes(folder, split)
    assert raw.endswith(b'\n') and b'\n\n' not in raw and b' ' not in raw
    return raw.decode().split('\n')[:-1]


def test_arithmetic_holds_problems_out_with_their_twins(tmp_path, command):
    """Of all 10,000 sums below 100, 889 are held out, with their numbers exchanged too; the others repeat in random orders."""
    out = command('arithmetic', '--lines=30000', '--out_dir', 'a')
    train, val = (lines_of(tmp_path / 'a', split) for split in tokens.SPLITS)
    assert '9,111 problems to train on, 889 held out' in out and len(train) == 30000 and len(val) == len(set(val)) == 889
    assert set(train) | set(val) == {f'{a}+{b}={a + b}' for a in range(100) for b in range(100)} and not set(train) & set(val)
    assert {f'{b}+{a}={c}' for a, b, c in (line.replace('=', '+').split('+') for line in val)} == set(val)
    orders = [train[i:i + 9111] for i in range(0, 30000, 9111)]
    assert [len(order) for order in orders] == [9111, 9111, 9111, 2667]
    assert all(len(set(order)) == len(order) for order in orders) and orders[0] != orders[1] != orders[2]
    assert orders[0] != sorted(orders[0]) and val != sorted(val)
    assert tokens.load(tmp_path / 'a', 'train').tokenizer.name == 'byte'


def test_tictactoe_games(tmp_path, command):
    """All games are complete, perfect sides play best moves only; a third each are mr and rm, a sixth mm and rr."""
    out = command('tictactoe', '--games=1500', '--val_games=90', '--out_dir', 'a')
    train, val = (lines_of(tmp_path / 'a', split) for split in tokens.SPLITS)
    assert '1,500 games to train on, 90 held out: 30 mr, 30 rm, 15 mm, 15 rr' in out
    assert len(train) == 1500 and len(val) == len(set(val)) == 90
    assert tasks.read_games('\n'.join(train + val).encode()) == train + val
    assert not {line[2:] for line in train} & {line[2:] for line in val}        # no such game by any players
    for kinds, share in (('mr', 1 / 3), ('rm', 1 / 3), ('mm', 1 / 6), ('rr', 1 / 6)):
        games = [line for line in train if line[:2] == kinds]
        assert abs(len(games) / 1500 - share) < 0.03 and sum(line[:2] == kinds for line in val) == 90 * share
        for side, kind in enumerate(kinds):
            best = [line[2 + i] in tasks.best_moves(line[2:2 + i]) for line in games for i in range(side, len(line) - 3, 2)]
            assert all(best) if kind == 'm' else 0.3 < sum(best) / len(best) < 0.9
        assert {'mr': 'O', 'rm': 'X'}.get(kinds, '') not in {line[-1] for line in games} and len(set(games)) > len(games) / 3
    assert {line[-1] for line in train} == set('XO-')


def test_arithmetic_of_several_operations(tmp_path):
    """Sums, differences and products are right; a tenth of each is held out, with their numbers exchanged too."""
    arithmetic.main(['--operations=*+-', '--digits=1', '--lines=1000', '--out_dir', str(tmp_path / 'a')])
    train, val = (lines_of(tmp_path / 'a', split) for split in tokens.SPLITS)
    both = tasks.read_problems('\n'.join(train + val).encode())
    assert len(train) == 1000 and len(set(both)) == 300 and len(set(train)) + len(val) == 300 and not set(train) & set(val)
    assert {b'3-9=-6', b'9-3=6', b'7*8=56', b'0+0=0'} <= set(both)
    for operation in '+*-':
        held_out = {line.split('=')[0] for line in val if operation in line.split('=')[0]}
        assert 4 <= len(held_out) <= 20 and {operation.join(line.split(operation)[::-1]) for line in held_out} == held_out
    arithmetic.main(['--operations=-', '--digits=1', '--lines=1000', '--out_dir', str(tmp_path / 'b')])
    assert set(lines_of(tmp_path / 'b', 'val')) == {line for line in val if '-' in line.split('=')[0]}


def test_tictactoe_games_are_held_out_by_their_moves(tmp_path):
    """Whoever plays them; as many as occur before the training games are complete, the same whatever their number."""
    for name, games in (('a', '--games=1'), ('b', '--games=700')):
        tictactoe.main([games, '--val_games=300', f'--out_dir={tmp_path / name}'])
    train, val = (lines_of(tmp_path / 'a', split) for split in tokens.SPLITS)
    assert len(train) == 1 and not tictactoe.is_val(train[0]) and 50 < len(set(val)) == len(val) < 300
    assert all(tictactoe.is_val(kinds + line[2:]) for line in val for kinds in ('mr', 'rm', 'mm', 'rr'))
    more, held_out = (lines_of(tmp_path / 'b', split) for split in tokens.SPLITS)
    assert len(more) == 700 and more[0] == train[0] and set(val) <= set(held_out)


@pytest.mark.parametrize('module, args, other', [
    (arithmetic, ['--digits=1', '--lines=500', '--out_dir'], '--lines=600'),
    (tictactoe, ['--games=50', '--val_games=6', '--out_dir'], '--games=60')])
def test_generated_data_are_repeatable_and_continue_after_a_crash(tmp_path, monkeypatch, capsys, module, args, other):
    """Crashed at the k-th renaming and started again, the bytes are those of an unbroken run; other settings rebuild."""
    module.main([*args, str(tmp_path / 'whole')])
    crash_and_continue(module.main, args, tmp_path / 'broken', monkeypatch, capsys, (1, 2, 3, 4))
    assert shards(tmp_path / 'broken') == shards(tmp_path / 'whole') and len(shards(tmp_path / 'whole')) == 2
    capsys.readouterr()
    module.main([*args, str(tmp_path / 'broken')])
    assert 'left as it is' in capsys.readouterr().out
    module.main([other, *args[1:], str(tmp_path / 'broken')])
    assert 'has other settings' in capsys.readouterr().out and shards(tmp_path / 'broken') != shards(tmp_path / 'whole')
