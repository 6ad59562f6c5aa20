"""data/{sst2,imdb,xnli,pycls}/prepare.py: command lines on local files, counts, labels, interruptions, the Hub's fields."""
import ast
import collections
import csv
import json
import os
import re

import pytest

from conftest import one_error
from data.imdb import prepare as imdb
from data.pycls import prepare as pycls
from data.sst2 import prepare as sst2
from data.xnli import prepare as xnli
from readers import texts, tokens

SHARED = tokens.ROOT.parent / 'shared' / 'data'


def shared(*names):
    paths = [SHARED / name for name in names]
    if not all(path.exists() for path in paths):
        pytest.skip(f'needs {", ".join(names)}')
    return paths


@pytest.fixture
def written(tmp_path, capsys, monkeypatch):
    """written(module, *args) -> what the main() of a prepare.py prints, run in tmp_path with --out_dir out."""
    monkeypatch.chdir(tmp_path)

    def run(module, *args):
        module.main([*map(str, args), '--out_dir', 'out'])
        return capsys.readouterr().out
    return run


@pytest.fixture
def small(tmp_path):
    """Arguments for a little SST-2 in tables of two kinds, columns in another order and labels by name and by id."""
    (tmp_path / 'a.tsv').write_text('label\tsentence\n1\tgood "one\n0\tbad one \n1\tfine\n')
    (tmp_path / 'b.csv').write_text('sentence,label\n"well, no",negative\nyes,positive\n')
    return '--file', 'a.tsv', '--val_file', 'b.csv'


def hub(monkeypatch, tmp_path, contents):
    """`datasets` reading local files in the Hub's place. contents: {(id, config, split): rows}; -> list of what was asked."""
    import datasets
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    load_dataset, asked = datasets.load_dataset, []

    def stand_in(name, config=None, *, split, revision, streaming):
        asked.append((name, config, split, revision, streaming))
        path = tmp_path / f'{len(asked)}.jsonl'
        path.write_text(''.join(json.dumps(row) + '\n' for row in contents[name, config, split]))
        return load_dataset('json', data_files=str(path), split='train', streaming=streaming)
    monkeypatch.setattr(datasets, 'load_dataset', stand_in)
    return asked


# ----------------------------------------------------------------------------------------------------------- sst2


def test_sst2_from_glue_files(tmp_path, written):
    """Each of 67,349 and 872 rows has the sentence and label of its line."""
    train, dev = shared('sst2/train.tsv', 'sst2/dev.tsv')
    out = written(sst2, '--file', train, '--val_file', dev)
    assert 'train: got 67,349 rows: 29,780 negative, 37,569 positive' in out and 'val: got 872 rows: 428 negative' in out
    for split, path in (('train', train), ('val', dev)):
        rows, ids, names = texts.load(tmp_path / 'out', split)
        lines = [line.split('\t') for line in path.read_text(encoding='utf-8').splitlines()[1:]]
        assert [(int(label), text.strip()) for label, text in lines] == list(zip(ids, [text for text, in rows], strict=True))
        assert names == ['negative', 'positive']


def test_sst2_holds_out_sentences_with_their_phrases(tmp_path, written):
    """Of the first 3,000 rows of GLUE 300 or a few more are held out, with their labels, and none is part of a training text.
    By hand: each of two sentences goes with its own phrases, both times that they occur; what both contain stays."""
    lines = shared('sst2/train.tsv')[0].read_text(encoding='utf-8').splitlines()[:3001]
    (tmp_path / 'a.tsv').write_text('\n'.join(lines), encoding='utf-8')
    written(sst2, '--file', 'a.tsv', '--val_file', 'a.tsv', '--held', '300')
    (train, a, _), (held, b, _), (val, c, _) = (texts.load(tmp_path / 'out', split) for split in ('train', 'held', 'val'))
    both = sorted(zip(train + held, a + b, strict=True))
    assert 300 <= len(held) < 330 and both == sorted(zip(val, c, strict=True)) and len(val) == 3000
    padded = [f' {text} ' for text, in train]
    assert not [text for text, in held if any(f' {text} ' in other for other in padded)]
    assert held == [row for row in val if row in set(held)]             # in the order of the file
    one = [('a fine film', 1), ('fine', 1), ('film', 0), ('a fine', 1), ('fine', 1)]
    two = [('no film at all', 0), ('at all', 0)]
    assert sst2.hold_out(one + two, 1) == (one, two)
    with pytest.raises(ValueError, match='--held=3 leaves no row of 7 to train on'):
        sst2.hold_out(one + two, 3)


def test_sst2_takes_names_and_ids_and_notices_a_changed_file(tmp_path, small, written):
    """csv and tsv; label 1 and positive are the same; other contents under the same name rebuild the folder."""
    written(sst2, *small)
    assert texts.load(tmp_path / 'out', 'train')[:2] == ([('good "one',), ('bad one',), ('fine',)], [1, 0, 1])
    assert texts.load(tmp_path / 'out', 'val')[:2] == ([('well, no',), ('yes',)], [0, 1])
    (tmp_path / 'b.csv').write_text('sentence,label\nyes,positive\n')
    assert 'has other settings' in written(sst2, *small)
    assert texts.load(tmp_path / 'out', 'val')[:2] == ([('yes',)], [1])


def test_sst2_interrupted_at_any_point(tmp_path, small, written, monkeypatch):
    """Crashed at the k-th renaming of a file: never loadable before the last one, whole after one more run."""
    class Crash(Exception):
        pass

    def replace_or_crash(*paths, plain=os.replace):
        renamed.append(paths)
        if len(renamed) == limit:
            raise Crash
        plain(*paths)
    folder = tmp_path / 'out'
    for limit in range(1, 5):                       # task, train, val, task
        renamed = []
        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(os, 'replace', replace_or_crash)
            written(sst2, *small)
        with pytest.raises(ValueError, match='is unfinished|holds no task.json'):
            texts.load(folder, 'train')
        (folder / 'train.csv.tmp999').write_text('"sentence","label"\n"ha')     # what a kill leaves
        assert not [path for path in folder.glob('*.csv') if not list(csv.reader(path.open()))[1:]]
        assert ('was not finished' in written(sst2, *small)) == (limit > 1) and len(renamed) == limit
        assert texts.load(folder, 'val')[1] == [0, 1]
        assert {path.name for path in folder.iterdir()} == {'train.csv', 'val.csv', 'task.json'}
        for path in folder.iterdir():
            path.unlink()


@pytest.mark.parametrize('module, field, config, val', [(sst2, 'sentence', None, 'validation'),
                                                        (imdb, 'text', 'plain_text', 'test')])
def test_streaming_from_the_hub(tmp_path, written, monkeypatch, module, field, config, val):
    """Texts and labels come from the pinned revision; another count than the published one is refused."""
    rows = [{'idx': i, field: f'text {i}', 'label': i % 2} for i in range(9)]
    asked = hub(monkeypatch, tmp_path, {(module.HUB_ID, config, 'train'): rows, (module.HUB_ID, config, val): rows[1:3]})
    with pytest.raises(ValueError, match=f'train of {module.HUB_ID} has 9 rows, expected {module.EXPECTED["train"]}'):
        written(module)
    monkeypatch.setattr(module, 'EXPECTED', {'train': 9, 'val': 2})
    asked.clear()
    written(module)
    assert asked == [(module.HUB_ID, config, split, module.REVISION, True) for split in ('train', val)]
    rows, ids, _ = texts.load(tmp_path / 'out', 'train')
    assert sorted(zip(rows, ids, strict=True)) == [((f'text {i}',), i % 2) for i in range(9)]
    assert texts.load(tmp_path / 'out', 'val')[:2] == ([('text 1',), ('text 2',)], [1, 0])
    record = json.loads((tmp_path / 'out' / 'task.json').read_text())
    assert (record['source'], record['revision']) == (module.HUB_ID, module.REVISION)
    written(module)                                 # nothing is asked for again
    assert len(asked) == 2 and (sst2.HUB_ID, imdb.HUB_ID) == ('stanfordnlp/sst2', 'stanfordnlp/imdb')


def test_a_hub_that_fails_is_one_line(tmp_path, monkeypatch, capsys):
    """An exception of the library, here for a field that is not there: status 2 and what to do instead."""
    hub(monkeypatch, tmp_path, {(sst2.HUB_ID, None, 'train'): [{'text': 'a', 'label': 1}]})
    with pytest.raises(SystemExit) as stop:
        texts.run(lambda: sst2.main(['--out_dir', str(tmp_path / 'out')]))
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and line.startswith('error: reading stanfordnlp/sst2 (train) from the Hub failed (KeyError')
    assert 'or use local files' in line and not list((tmp_path / 'out').glob('*.csv*'))


# ----------------------------------------------------------------------------------------------------------- imdb


def test_imdb_shuffles_the_training_rows_only(tmp_path, written):
    """Each review is there once under its label: training in a fixed mixed order, validation neg, then pos, by number."""
    acl = tmp_path / 'aclImdb'
    for split, count in (('train', 120), ('test', 12)):
        for label in ('neg', 'pos', 'unsup'):
            (acl / split / label).mkdir(parents=True)
            for i in range(count):
                (acl / split / label / f'{i}_{i % 5 + 1}.txt').write_text(f'{split} {label} {i}, "so"<br /><br />été')
    assert 'train: got 240 rows: 120 neg, 120 pos' in written(imdb, '--dir', acl)
    rows, ids, names = texts.load(tmp_path / 'out', 'train')
    made = [f'train {label} {i}, "so"<br /><br />été' for label in ('neg', 'pos') for i in range(120)]
    assert sorted(text for text, in rows) == sorted(made) and [text for text, in rows] != made and names == ['neg', 'pos']
    assert all(text.startswith(f'train {names[i]} ') for (text,), i in zip(rows, ids, strict=True))
    assert 35 < sum(ids[:100]) < 65                 # sorted by label it would be 0
    rows, ids, _ = texts.load(tmp_path / 'out', 'val')
    assert [text.split(',')[0] for text, in rows] == [f'test {label} {i}' for label in ('neg', 'pos') for i in range(12)]
    assert ids == [0] * 12 + [1] * 12
    os.rename(tmp_path / 'out', tmp_path / 'before')
    written(imdb, '--dir', acl)
    assert (tmp_path / 'out' / 'train.csv').read_bytes() == (tmp_path / 'before' / 'train.csv').read_bytes()
    (acl / 'test' / 'pos' / '3_4.txt').write_bytes(b'caf\xe9')
    for folder, why in ((acl, '3_4.txt is not UTF-8 at byte 3'), (acl / 'train', r'has no train/neg/\*.txt')):
        with pytest.raises(ValueError, match=why):
            written(imdb, '--dir', folder)


# ----------------------------------------------------------------------------------------------------------- xnli


def test_xnli_from_local_files(tmp_path, written):
    """MultiNLI's slice and four languages: counts, both texts in order, ids 0 1 2 for entailment neutral contradiction."""
    train, dev, folder = shared('mnli/train.tsv', 'mnli/dev.tsv', 'xnli')
    args, order = ('--file', train, '--val_file', dev, '--xnli_dir', folder), ['entailment', 'neutral', 'contradiction']
    assert 'train: got 8,999 rows: 3,061 entailment, 2,980 neutral, 2,958 contradiction' in written(xnli, *args)
    for split, path, skip in (('train', train, 1), ('val', dev, 1), *((f'val-{x}', folder / f'dev-{x}.tsv', 0)
                                                                     for x in ('de', 'en', 'es', 'zh'))):
        rows, ids, names = texts.load(tmp_path / 'out', split)
        lines = [tuple(line.split('\t')) for line in path.read_text(encoding='utf-8').split('\n')[skip:] if line]
        assert names == order and [(*text, order[i]) for text, i in zip(rows, ids, strict=True)] == [
            (premise.strip(), hypothesis.strip(), label) for premise, hypothesis, label in lines]


PAIRS = '--file a.tsv --val_file a.tsv --xnli_dir XNLI'


@pytest.fixture
def pairs(tmp_path):
    """Arguments for four training pairs, two of them without a label, and two languages, one with a test file."""
    (tmp_path / 'XNLI').mkdir()
    (tmp_path / 'a.tsv').write_text('hypothesis\tpremise\tlabel\nh\tp\tentailment\nx\ty\t-\nx\ty\t-1\nhh\tpp\t2\n')
    for name, label in (('dev-de', 'neutral'), ('dev-ur', 'contradiction'), ('test-de', 'entailment')):
        (tmp_path / 'XNLI' / f'{name}.tsv').write_text(f'{name} p\t{name} h\t{label}\n')
    return PAIRS.split()


def test_xnli_leaves_out_pairs_without_a_label(tmp_path, pairs, written):
    """Rows labelled - and -1 are counted and left out; columns go by name; a test file is taken where there is one."""
    out = written(xnli, *pairs)
    assert 'train: left out 2 pairs without a label' in out and 'train: got 2 rows: 1 entailment, 0 neutral, 1 contra' in out
    assert texts.load(tmp_path / 'out', 'train')[:2] == ([('p', 'h'), ('pp', 'hh')], [0, 2])
    assert texts.load(tmp_path / 'out', 'val-ur')[:2] == ([('dev-ur p', 'dev-ur h')], [2])
    assert texts.load(tmp_path / 'out', 'test-de')[:2] == ([('test-de p', 'test-de h')], [0])
    splits = lambda: sorted(path.stem for path in (tmp_path / 'out').glob('*.csv'))
    assert splits() == ['test-de', 'train', 'val', 'val-de', 'val-ur'] and 'left as it is' in written(xnli, *pairs)
    assert 'has other settings' in written(xnli, *pairs, '--languages', 'ur') and splits() == ['train', 'val', 'val-ur']


MISTAKES = [
    ('sst2', '--file empty.tsv --val_file b.csv', 'empty.tsv is empty'), ('sst2', '--file no.tsv --val_file b.csv', 'no.tsv'),
    ('sst2', '--file label.tsv --val_file b.csv', "label.tsv, row 2: label '2' is none of 0, 1, negative, positive"),
    ('sst2', '--held=-1', '--held=-1 must be 1 or more'),
    ('sst2', '--file a.tsv', 'go together'), ('sst2', '--fil a.tsv', '--fil'),
    ('sst2', '--file train.csv --val_file b.csv --out_dir .', 'train.csv'),
    ('xnli', '--languages en,it', "XNLI has no 'it'; it has ar, bg, de"), ('xnli', f'{PAIRS} --languages en,en', 'once'),
    ('xnli', f'{PAIRS} --languages de,fr', 'XNLI/dev-fr.tsv'), ('xnli', '--file a.tsv --val_file a.tsv', 'go together'),
    ('xnli', f'{PAIRS} --xnli_dir none', 'no folder none'), ('xnli', f'{PAIRS} --xnli_dir .', 'dev-<language>.tsv'),
    ('xnli', f'{PAIRS} --xnli_dir bad', 'dev-ur.tsv, line 1: 2 fields where there are 3 columns'),
    *((name, '--outdir=x', '--outdir') for name in ('sst2', 'imdb', 'xnli', 'pycls'))]


def test_mistakes_are_one_line(tmp_path, in_turn, pairs):
    """A wrong label, file, folder, language or option: one line that names it; the user's own files stay; --help works."""
    files = {'empty.tsv': '', 'label.tsv': 'label\tsentence\n1\ta\n2\tb\n', 'b.csv': 'sentence,label\nyes,positive\n',
             'train.csv': 'sentence,label\nmine,1\n', 'bad/dev-ur.tsv': 'only\ttwo\n'}
    (tmp_path / 'bad').mkdir()
    for file, content in files.items():
        (tmp_path / file).write_text(content)
    commands = [(name, ['--out_dir', 'x', *args.split()]) for name, args, _ in MISTAKES]
    commands += [(name, ['--help']) for name in ('sst2', 'imdb', 'xnli', 'pycls')]
    done = in_turn([(f'data/{name}/prepare.py', tmp_path, words) for name, words in commands])
    for (name, args, why), result in zip(MISTAKES, done, strict=False):
        assert why in one_error(result), (name, args)
    for (name, _), result in zip(commands[-4:], done[-4:], strict=True):
        assert result.code == 0 and f'python data/{name}/prepare.py' in result.out
    assert (tmp_path / 'train.csv').read_text() == files['train.csv']


def test_xnli_from_the_hub(tmp_path, written, monkeypatch):
    """MultiNLI's train and validation_matched, XNLI's validation and test of each language asked for, each pinned; the counts
    that are expected are 392,702 and 9,815 English pairs, and 15 times 2,490 and 5,010."""
    assert sum(xnli.EXPECTED.values()) == 392_702 + 9_815 + 15 * (2_490 + 5_010) and len(xnli.EXPECTED) == 32
    row = lambda name, label: {'premise': f'{name} p', 'hypothesis': f'{name} h', 'label': label, 'genre': 'x'}
    contents = {(xnli.MNLI_ID, None, 'train'): [row('a', 2), row('b', -1), row('c', 1)],
                (xnli.MNLI_ID, None, 'validation_matched'): [row('d', 0)]}
    contents |= {(xnli.XNLI_ID, language, split): [row(f'{language} {split}', 1)] for language in ('de', 'en')
                 for split in ('validation', 'test')}
    asked = hub(monkeypatch, tmp_path, contents)
    names = ['train', 'val', 'val-en', 'val-de', 'test-en', 'test-de']
    monkeypatch.setattr(xnli, 'EXPECTED', dict.fromkeys(names, 1) | {'train': 2})
    written(xnli, '--languages', 'en,de')
    mnli = [('nyu-mll/multi_nli', None, split, xnli.MNLI_REVISION, True) for split in ('train', 'validation_matched')]
    assert asked == mnli + [('facebook/xnli', language, split, xnli.XNLI_REVISION, True)
                            for split in ('validation', 'test') for language in ('en', 'de')]
    assert texts.load(tmp_path / 'out', 'train')[:2] == ([('a p', 'a h'), ('c p', 'c h')], [2, 1])
    assert texts.load(tmp_path / 'out', 'test-de') == ([('de test p', 'de test h')], [1], list(xnli.LABELS))
    assert list(json.loads((tmp_path / 'out' / 'task.json').read_text())['rows']) == names


# ---------------------------------------------------------------------------------------------------------- pycls

SOURCE = '''
import asyncio
from xml import sax  # xml

class Pool:
    """Of the asyncio package."""

    def fill(self):
        """Fills it with XML."""
        import logging
        from json import dumps
        return [
            sax.parse(asyncio.run(1)),  # asyncio
            self.asyncio_future, my_xml, 'an Email', HTTPServer, xmlns, asyncio2]

    def short(self): return 1

    def only_doc(self):
        """Nothing else."""

    @property
    def outer(self):
        def inner():
            """Inner."""
            a = 1
            return a
        return inner

try:
    pass
except ImportError:
    async def fallback():
        a = 1
        return a
'''
FILL = """def fill(self):
    return [sax.parse(package.run(1)), self.package_future, my_package, 'an package', HTTPServer, xmlns, asyncio2]"""


def test_pycls_texts_do_not_name_their_package():
    """By hand: no docstring, comment, import or package name; methods and functions, but none from inside another."""
    texts = {name: pycls.text(node) for name, node in pycls.functions(ast.parse(SOURCE))}
    assert list(texts) == ['Pool.fill', 'Pool.short', 'Pool.only_doc', 'Pool.outer', 'fallback']
    assert texts['Pool.fill'] == FILL and texts['Pool.only_doc'] == 'def only_doc(self):\n    pass'
    assert texts['Pool.outer'] == ('@property\ndef outer(self):\n\n    def inner():\n        a = 1\n        return a\n'
                                   '    return inner')
    assert texts['fallback'] == 'async def fallback():\n    a = 1\n    return a'


def test_pycls_of_this_python(tmp_path, written):
    """Thousands of functions, about 10% for validation, none twice, and none with the name of a package."""
    assert 'expected: 2,650' in written(pycls)
    parts = {split: texts.load(tmp_path / 'out', split) for split in ('train', 'val')}
    written = [text for part in parts.values() for text, in part[0]]
    names, total = parts['train'][2], len(written)
    assert 4 <= len(names) and set(names) <= set(pycls.PACKAGES) and parts['val'][2] == names
    assert total > 1500 and 0.07 < len(parts['val'][0]) / total < 0.13 and len(set(written)) == total
    counts = collections.Counter(names[i] for part in parts.values() for i in part[1])
    assert min(counts.values()) >= 20 and max(counts.values()) <= 500 and set(counts) == set(names)
    assert set(parts['val'][1]) == set(parts['train'][1]) and len(set(parts['train'][1][:60])) > 3    # mixed
    word = re.compile(r'\b(?:' + '|'.join(pycls.PACKAGES) + r')\b', re.IGNORECASE)
    for text in written:
        assert not word.search(text) and text.count('\n') >= 2, text
        assert '\nimport ' not in text and ast.parse(text)


def test_pycls_with_packages_missing(tmp_path, written, monkeypatch, capsys):
    """Each missing package is a label less, duplicates count once, and three packages are too few."""
    monkeypatch.setattr(pycls, 'MIN_FUNCTIONS', 2)
    monkeypatch.setattr(pycls, 'MAX_FUNCTIONS', 30)
    for package in pycls.PACKAGES[:5]:
        (tmp_path / 'lib' / package / 'test').mkdir(parents=True)
        body = ''.join(f'def f{i}(a):\n    a += "{"" if i == 0 else package[::-1]}"\n    return a\n' for i in range(40))
        (tmp_path / 'lib' / package / 'a.py').write_text(body + body)
        (tmp_path / 'lib' / package / 'test' / 'b.py').write_text(body.replace('f', 'g'))
        (tmp_path / 'lib' / package / 'broken.py').write_text('def f(:')
    functions = pycls.collect(tmp_path / 'lib')
    assert list(functions) == list(pycls.PACKAGES[:5]) and list(map(len, functions.values())) == [40, 39, 39, 39, 39]
    rows = pycls.split_rows(functions)
    assert collections.Counter(row[1] for part in rows.values() for row in part) == dict.fromkeys(pycls.PACKAGES[:5], 30)
    monkeypatch.setattr(pycls.sysconfig, 'get_path', lambda name: str(tmp_path / 'lib'))
    assert 'not there: multiprocessing' in written(pycls)
    assert texts.load(tmp_path / 'out', 'train')[2] == list(pycls.PACKAGES[:5])
    for package in pycls.PACKAGES[3:5]:
        (tmp_path / 'lib' / package / 'a.py').unlink()
    with pytest.raises(SystemExit):
        written(pycls)
    assert 'has no sources of importlib, logging, multi' in capsys.readouterr().err
