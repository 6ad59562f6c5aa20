"""readers/texts.py: tables come back as they were written, mistakes name their place, folders are whole or rebuilt."""
import csv
import gzip
import io
import json

import pytest

from readers import texts as c

TEXTS = ['plain', 'with, a comma', 'a "quoted" word', 'two\nlines', 'windows\r\nline', 'old\rmac', '', ' spaces ', "it's",
         'Zażółć 語 🎉', 'tab\there', '"', '\\n', 'x' * 200_000, '\ufeffmark']


# ---------------------------------------------------------------------------------------------------------- tables


def test_a_csv_gives_back_every_text_as_it_was(tmp_path):
    """Commas, quotes, line ends of three kinds, emptiness, Unicode and a long text survive writing and reading."""
    path = tmp_path / 'a.csv'
    rows = [(first, second, 'yes' if i % 2 else 'no') for i, (first, second) in enumerate(zip(TEXTS, TEXTS[::-1], strict=True))]
    assert c.write_table(path, ('premise', 'hypothesis', 'label'), iter(rows)) == len(TEXTS)
    texts, labels = c.read_table(path, ('premise', 'hypothesis'), 'label')
    assert texts == [row[:2] for row in rows] and labels == [row[2] for row in rows]
    assert c.read_table(path, ('hypothesis',))[0] == [(row[1],) for row in rows]
    assert c.read_table(path, ('hypothesis',), '')[1] is None
    c.write_table(tmp_path / 'one.csv', ['text'], [(text,) for text in TEXTS])
    assert c.read_table(tmp_path / 'one.csv', 'text')[0] == [(text,) for text in TEXTS]


def test_tsv_keeps_quotes_and_csv_takes_a_byte_order_mark(tmp_path):
    """GLUE's files hold single quotation marks; \\r and blank last lines do not count; columns go by name."""
    (tmp_path / 'a.tsv').write_bytes(b'label\tsentence\r\n1\t"one half of a quote\r\n0\tfine, really\r\n\r\n')
    assert c.read_table(tmp_path / 'a.tsv', ('sentence',), 'label') == (
        [('"one half of a quote',), ('fine, really',)], ['1', '0'])
    (tmp_path / 'b.csv').write_bytes('\ufefftext,label\né,a\n'.encode())
    assert c.read_table(tmp_path / 'b.csv', ('text',), 'label') == ([('é',)], ['a'])
    (tmp_path / 'z.csv').write_bytes(f'text,label\na\0{"é" * 50},b\n'.encode())             # one byte 0 is text
    assert c.read_table(tmp_path / 'z.csv', ('text',), 'label') == ([('a\0' + 'é' * 50,)], ['b'])
    (tmp_path / 'c.tsv').write_text('p\th\tx\n')
    assert c.read_table(tmp_path / 'c.tsv', ('b', 'a'), 'l', header=('a', 'b', 'l')) == ([('h', 'p')], ['x'])


@pytest.mark.parametrize('delimiter', [',', ';', '\t', '|'])
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-32'])
def test_a_csv_of_a_spreadsheet_or_of_pandas(tmp_path, delimiter, encoding):
    """Separated by commas, semicolons, tabs or bars, in encodings with a mark, packed or not; the first column, which has no
    name, is an index and never text or label."""
    rows = [('', 'text', 'label'), ('0', 'good; "fine", | film\t', 'yes'), ('1', 'ü 語', 'no')]
    written = io.StringIO(newline='')
    csv.writer(written, delimiter=delimiter).writerows(rows)
    (tmp_path / 'a.csv').write_bytes(written.getvalue().encode(encoding))
    (tmp_path / 'a.CSV.gz').write_bytes(gzip.compress(written.getvalue().encode(encoding)))
    (tmp_path / 'b.csv').write_bytes((tmp_path / 'a.CSV.gz').read_bytes())          # pandas compresses under any name
    (tmp_path / 'mac.csv').write_bytes(written.getvalue().replace('\r\n', '\r').encode(encoding))
    for name in ('a.csv', 'a.CSV.gz', 'b.csv', 'mac.csv'):
        assert c.read_table(tmp_path / name, 'text', 'label') == ([(text,) for _, text, _ in rows[1:]], ['yes', 'no'])
        assert c.read_table(tmp_path / name, 'text') == ([(text,) for _, text, _ in rows[1:]], None)


def test_json_lines_give_their_fields(tmp_path):
    """Numbers as labels become their digits, halves of surrogate pairs U+FFFD; other fields and empty lines do not count."""
    lines = '{"label": 1, "text": "one\\nline \\ud83d"}', '', '{"text": "x\u2028y", "n": 2, "label": 0}'
    (tmp_path / 'a.jsonl').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    assert c.read_table(tmp_path / 'a.jsonl', 'text', 'label') == ([('one\nline \ufffd',), ('x\u2028y',)], ['1', '0'])


def test_parquet_reads_as_csv_does(tmp_path):
    """Integer labels become their digits; a null label or a number as text is an error with the row."""
    import pyarrow as pa
    from pyarrow import parquet
    path = tmp_path / 'a.parquet'
    parquet.write_table(pa.table({'label': [1, 0], 'extra': [1.0, 2.0], 'text': TEXTS[1:3]}), path)
    assert c.read_table(path, ('text',), 'label') == ([(TEXTS[1],), (TEXTS[2],)], ['1', '0'])
    parquet.write_table(pa.table({'label': [1, None], 'text': ['a', 'b']}), path)
    for columns, message in (((('text',), 'label'), 'row 2: the label'), ((('label',), ''), "row 1: 'label' is 1, not text"),
                             ((('txt',), ''), "did you mean 'text'")):
        with pytest.raises(ValueError, match=message):
            c.read_table(path, *columns)
    path.write_bytes(b'PAR1 nothing')
    with pytest.raises(ValueError, match='cannot be read as parquet'):
        c.read_table(path, ('text',))


@pytest.mark.parametrize('name, content, message', [
    ('a.csv', b'', 'a.csv is empty'),
    ('a.csv', b'\n\n', 'has no column'),
    ('a.tsv', b'text\tlabel\n', 'no rows below its header'),
    ('a.csv', b'texts,label\na,b\n', "no column 'text'; its columns are 'texts', 'label'; did you mean 'texts'"),
    ('a.csv', b'text,label,text\na,b,c\n', "2 columns 'text'"),
    ('a.csv', b'text,label\n"two\nlines",1\nb\n', 'line 4: 1 fields where there are 2 columns'),
    ('a.tsv', b'text\tlabel\na\t1\nb\t1\t\n', 'line 3: 3 fields'),
    ('a.csv', b'text,label\n"two\nlines",1\nb, \n', r"line 4: the label \('label'\) is empty"),
    ('a.csv', b'text,label\n\xc3\xa9,1\ncaf\xe9,1\n', 'line 3: not UTF-8'),
    ('a.csv', b'text,label\na,1\n"b,1\nc,1\n', 'line 3: .*a quote that is not closed'),
    ('a.txt', b'text\na\n', 'none of .csv, .tsv, .jsonl, .parquet'),
    ('a.csv', b',text\n0,a\n', "no column 'label'; its columns are 'text'$"),
    ('a.csv', 'text,label\na,b\n'.encode('utf-16-le'), 'convert it: iconv -f UTF-16LE -t UTF-8'),
    ('a.csv', 'text,label\né,b\n'.encode('utf-16-be'), 'convert it: iconv -f UTF-16BE -t UTF-8'),
    ('a.csv.gz', b'text,label\na,b\n', 'damaged or incomplete .gz file'),
    ('a.parquet.gz', b'', 'none of .csv'),
    ('a.jsonl', b'{"text": "a", "label": 1}\n[1]\n', 'line 2: not a JSON object'),
    ('a.jsonl', b'{"text": "a", "label": 1}\n\n{"text": "a", "labl": 1}\n', "line 3 has no column 'label'.*mean 'labl'"),
    ('a.jsonl', b'[' * 100_000, 'line 1: not a JSON object'),
    ('a.jsonl', b'{"text": "a", "label": NaN}\n', 'is empty'),
    ('a.csv', b'PK\3\4 and more', 'is no text but an .xlsx'),
    ('a.jsonl', b'{"text": "a", "label": [1]}\n', r"the label \('label'\) is \[1\]"),
])
def test_a_bad_table_is_one_line_naming_the_place(tmp_path, name, content, message):
    """Each mistake is a ValueError of one line with the file's name and the line in it."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        c.read_table(tmp_path / name, 'text', 'label')
    assert '\n' not in str(error.value) and name in str(error.value)


def test_no_table_or_an_odd_number_of_text_columns_is_one_line(tmp_path):
    (tmp_path / 'folder.csv').mkdir()
    for file, columns, message in (('no.csv', 'text', 'there is no file .*no.csv'), ('folder.csv', 'text', 'there is no file'),
                                   ('no.csv', (), '0 text columns'), ('no.csv', ('a', 'b', 'c'), '3 text columns')):
        with pytest.raises(ValueError, match=message):
            c.read_table(tmp_path / file, columns, 'label')


def test_labels_are_ordered_by_number_or_alphabet():
    """10 comes after 9; ids are positions in the names; an unknown label is named."""
    assert c.label_names(['10', '9', '1', '9', '-1']) == ['-1', '1', '9', '10']
    assert c.label_names(['10', '9', 'b', 'a']) == ['10', '9', 'a', 'b']
    assert c.label_ids(['n', 'p', 'n'], ['p', 'n'], 'f') == [1, 0, 1]
    with pytest.raises(ValueError, match="f.csv, row 2: label 'q' is none of p, n"):
        c.label_ids(['n', 'q'], ['p', 'n'], 'f.csv')
    with pytest.raises(ValueError, match="the labels, 'id', are the numbers of the rows"):
        c.refuse_row_numbers(list(map(str, range(5, 26))), 'id')
    c.refuse_row_numbers([*map(str, range(30)), '3'], 'label'), c.refuse_row_numbers(list('abcdefghijklmnopqrstuvwxyz'), 'l')
    for labels in ([], ['a', 'a']):
        with pytest.raises(ValueError, match='two or more'):
            c.label_names(labels)
    assert c.named(['1', 'neg', '0'], ['neg', 'pos'], 'f') == ['pos', 'neg', 'neg']
    with pytest.raises(ValueError, match="row 1: label '2'"):
        c.named(['2'], ['neg', 'pos'], 'f')


# --------------------------------------------------------------------------------------------------- data folders

TASK = {'task': 'toy', 'labels': ('z', 'a'), 'text': ('left', 'right'), 'label': 'kind', 'source': 's', 'revision': 'r'}
ROWS = {'train': [('1', 'one', 'a'), ('2', 'two\nlines', 'z')], 'val-de': [('3', 'drei', 'z')]}


def splits(rows=ROWS):
    return {split: lambda part=part: iter(part) for split, part in rows.items()}


def test_a_data_folder_comes_back(tmp_path, capsys):
    """Texts by column, ids in the order of task.json's labels, rows counted."""
    c.build(tmp_path / 'toy', TASK, splits(), {'train': 2})
    assert c.load(tmp_path / 'toy', 'train') == ([('1', 'one'), ('2', 'two\nlines')], [1, 0], ['z', 'a'])
    assert c.load(str(tmp_path / 'toy'), 'val-de') == ([('3', 'drei')], [0], ['z', 'a'])
    record = json.loads((tmp_path / 'toy' / 'task.json').read_text())
    assert record['rows'] == {'train': 2, 'val-de': 1} and record['complete'] and record['labels'] == ['z', 'a']
    assert 'train: expected 2 rows\ntrain: got 2 rows: 1 z, 1 a\n' in capsys.readouterr().out


def test_a_damaged_data_folder_is_refused(tmp_path, monkeypatch):
    """No folder, an unfinished one, another split, a lost row, a changed label, a strange task.json."""
    folder, known = tmp_path / 'toy', tmp_path / 'data' / 'sst2'

    def refused(message, split='train', folder=folder):
        with pytest.raises(ValueError, match=message):
            c.load(folder, split)
    refused('type: python data/<name>/prepare.py --out_dir .*: imdb, pycls, sst2, xnli$')
    known.mkdir(parents=True)
    (known / 'prepare.py').write_text("texts.build(); '--held'")
    monkeypatch.setattr(c.tokens, 'ROOT', tmp_path)
    refused('type: python data/sst2/prepare.py$', folder=known)
    refused('type: python data/sst2/prepare.py --held$', folder=known / 'held')
    refused('sst2/mine, where <name> is one of: sst2$', folder=known / 'mine')
    c.build(folder, TASK, splits())
    refused("no split 'val'; it has train, val-de", 'val')
    content = (folder / 'train.csv').read_text()
    (folder / 'train.csv').write_text('\n'.join(content.split('\n')[:2]) + '\n')
    refused('has 1 rows, 2 were written')
    (folder / 'train.csv').write_text(content.replace('"a"', '"b"'))
    refused("train.csv, row 1: label 'b' is none of z, a")
    record = json.loads((folder / 'task.json').read_text())
    (folder / 'task.json').write_text(json.dumps(record | {'complete': False}))
    refused('toy is unfinished; type: python')
    (folder / 'task.json').write_text('[]')
    refused('(wrote|written)')


def test_a_whole_folder_is_kept_and_any_other_rebuilt(tmp_path, capsys):
    """Another revision, set of splits or file size rebuilds it, and old splits go."""
    folder = tmp_path / 'toy'
    c.build(folder, TASK, splits())
    c.build(folder, TASK, {split: None for split in ROWS})
    assert 'is complete with the same settings; left as it is' in capsys.readouterr().out
    (folder / 'val-de.csv').write_text('cut')
    c.build(folder, TASK, splits())
    assert 'is damaged' in capsys.readouterr().out and c.load(folder, 'val-de')[1] == [0]
    c.build(folder, TASK | {'revision': 'r2'}, splits())
    assert 'has other settings' in capsys.readouterr().out
    c.build(folder, TASK | {'revision': 'r2'}, splits({'train': ROWS['train']}))
    assert 'has other settings' in capsys.readouterr().out and not (folder / 'val-de.csv').exists()
    assert c.load(folder, 'train')[1] == [1, 0]


def test_foreign_files_and_wrong_counts_are_refused(tmp_path):
    """A user's own train.csv stays; a published set must have its count, a local one may not be empty."""
    (tmp_path / 'train.csv').write_text('mine')
    with pytest.raises(ValueError, match='train.csv is there and no prepare.py wrote it'):
        c.build(tmp_path, TASK, splits())
    assert [path.name for path in tmp_path.iterdir()] == ['train.csv'] and (tmp_path / 'train.csv').read_text() == 'mine'
    with pytest.raises(ValueError, match='train of s has 2 rows, expected 3'):
        c.build(tmp_path / 'a', TASK, splits(), {'train': 3})
    with pytest.raises(ValueError, match='is unfinished'):
        c.load(tmp_path / 'a', 'train')
    c.build(tmp_path / 'a', TASK, splits(), {'train': 3}, published=False)
    assert c.load(tmp_path / 'a', 'train')[1] == [1, 0]
    with pytest.raises(ValueError, match='has 0 rows'):
        c.build(tmp_path / 'b', TASK, splits({'train': []}))
