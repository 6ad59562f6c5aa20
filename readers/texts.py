"""Labelled texts for classification: reads tables and builds the data folders of data/*/prepare.py.

A data folder holds one csv per split, and task.json, which describes the columns and labels:

    data/sst2/train.csv  val.csv     a column for each text and one for the label, by name
    data/sst2/task.json              {"task", "labels": names in the order of their ids, "text": columns, "label": column,
                                      "source", "revision", "rows": {split: n}, "bytes": {split: n}, "complete": true}

    texts, ids, names = load(tokens.dataset_dir('sst2'), 'train')
"""
import codecs
import collections
import csv
import difflib
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from pathlib import Path

from tqdm import tqdm

from common import atomic_write
from configurator import fail
from readers import tokens

FORMATS = ('.csv', '.tsv', '.jsonl', '.parquet')         # the first three also as .gz

# ---------------------------------------------------------------------------------------------------------------------
# tables


def _format(path):
    """'.csv', ... of a path. ValueError for any other."""
    ending = Path(str(path).lower().removesuffix('.gz')).suffix
    if ending not in FORMATS or str(path).lower().endswith('.parquet.gz'):
        raise ValueError(f'{path} is none of {", ".join(FORMATS)} (or .gz of the first three); rename or convert the file')
    return ending


def _decoded(path):
    """The text of a file, plain or .gz, in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark."""
    with open(path, 'rb') as f:
        raw = f.read()
    if raw[:2] == b'\x1f\x8b' or str(path).lower().endswith('.gz'):    # pandas compresses under any name
        try:
            raw = gzip.decompress(raw)
        except (EOFError, gzip.BadGzipFile, zlib.error) as e:
            raise ValueError(f'{path} is a damaged or incomplete .gz file ({e}); make it again') from None
    if raw[:4] in (b'PK\3\4', b'PAR1'):
        raise ValueError(f'{path} is no text but an .xlsx, .zip or parquet file; export it as .csv')
    marks = {codecs.BOM_UTF32_LE: 'utf-32', codecs.BOM_UTF32_BE: 'utf-32', codecs.BOM_UTF16_LE: 'utf-16',
             codecs.BOM_UTF16_BE: 'utf-16'}
    encoding = next((name for mark, name in marks.items() if raw.startswith(mark)), 'utf-8-sig')   # spreadsheets write a mark
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as e:
        line = raw.count(b'\n', 0, e.start) + 1
        raise ValueError(f'{path}, line {line}: not {encoding.removesuffix("-sig").upper()}; convert it: '
                         f'iconv -f {_guess(raw)} -t UTF-8') from None
    if '\0' in text and _guess(raw) != 'LATIN1':
        raise ValueError(f'{path} holds zero bytes, as UTF-16 does; convert it: iconv -f {_guess(raw)} -t UTF-8')
    return text


def _guess(raw):
    """The likely encoding of bytes that are no UTF-8. In UTF-16 every other byte of most texts is 0."""
    odd, even = raw[1::2].count(0), raw[::2].count(0)
    return ('UTF-16LE' if odd > even else 'UTF-16BE') if odd + even > len(raw) / 20 else 'LATIN1'


def _records(path, kind, wanted):
    """Yield (line, fields) of a .csv or .tsv without its blank lines. In a .tsv quotes are plain characters, as in GLUE. A .csv
    is separated by commas, or by the semicolons, tabs or bars that give its first line the wanted columns."""
    text = _decoded(path)
    if kind == '.tsv':
        lines = ((number, line.rstrip('\r')) for number, line in enumerate(text.split('\n'), 1))
        yield from ((number, line.split('\t')) for number, line in lines if line)
        return
    csv.field_size_limit(2 ** 31 - 1)               # the default of 131,072 characters is too small for some documents
    first = io.StringIO(text[:10_000].lstrip('\r\n'), newline=None).readline()
    split = {d: next(csv.reader([first], delimiter=d), []) for d in ',;\t|'}
    delimiter = max(split, key=lambda d: (set(wanted) <= set(split[d]), len(split[d]) if wanted else d == ','))
    reader, line = csv.reader(io.StringIO(text, newline=''), delimiter=delimiter, strict=True), 1
    try:
        for fields in reader:
            if fields:
                yield line, fields
            line = reader.line_num + 1              # the first line of the next row: a quoted field may span lines
    except csv.Error as e:
        raise ValueError(f'{path}, line {line}: {e}; a quote that is not closed, or one that is not doubled?') from None


def _choose(path, header, wanted):
    """Position in header of each wanted column. A column without a name is an index of rows, and is never chosen."""
    named = [name for name in header if name]
    for name in wanted:
        if name not in named:
            nearest = difflib.get_close_matches(name, named, 1, 0.4)
            hint = f'; did you mean {nearest[0]!r}?' if nearest else ''
            raise ValueError(f'{path} has no column {name!r}; its columns are {", ".join(map(repr, named))}{hint}')
        if header.count(name) > 1:
            raise ValueError(f'{path} has {header.count(name)} columns {name!r}; rename one')
    return [header.index(name) for name in wanted]


def _read_parquet(path, wanted):
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f'{path} needs pyarrow; type: pip install pyarrow, or write it as .csv') from None
    try:
        with parquet.ParquetFile(path) as file:
            _choose(path, file.schema_arrow.names, wanted)
            table = file.read(columns=list(wanted))
    except (pyarrow.ArrowException, OSError) as e:
        raise ValueError(f'{path} cannot be read as parquet ({str(e).splitlines()[0][:120]})') from None
    return [table.column(name).to_pylist() for name in wanted]


def _read_json(path, wanted):
    """(line numbers, columns) of a file with one JSON object a line."""
    places, columns = [], [[] for _ in wanted]
    for number, line in enumerate(_decoded(path).split('\n'), 1):      # not splitlines(): JSON may hold other line ends
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ValueError(f'{path}, line {number}: not a JSON object; each line must hold one')
        try:
            _choose(f'{path}, line {number}:', list(row), wanted)
        except ValueError as e:
            raise ValueError(str(e).replace(': has no column', ' has no column')) from None
        places.append(number)
        for column, name in zip(columns, wanted, strict=True):
            column.append(tokens.valid(row[name]) if isinstance(row[name], str) else row[name])
    return places, columns


def read_columns(path, wanted, header=(), optional=''):
    """Read columns of a table -> (unit, places, columns). columns[i] has the values of column wanted[i]; places[j] is
    where row j begins, counted in `unit`, 'line' or 'row'. header: column names for a .csv or .tsv without a header line.
    optional: a column of a .csv or .tsv that is added as the last one if the file has it. Raises ValueError."""
    kind = _format(path)
    if not Path(path).is_file():
        raise ValueError(f'there is no file {path}')
    try:
        if kind == '.parquet':
            columns, unit = _read_parquet(path, wanted), 'row'
            places = range(1, len(columns[0]) + 1)
        elif not Path(path).stat().st_size:
            raise ValueError(f'{path} is empty')
        elif kind == '.jsonl':
            unit, (places, columns) = 'line', _read_json(path, wanted)
        else:
            rows, unit, places = _records(path, kind, () if header else wanted), 'line', []
            header = list(header) or next(rows, (1, []))[1]
            chosen = _choose(path, header, [*wanted, *([optional] if optional and optional in header else [])])
            columns = [[] for _ in chosen]
            for line, fields in rows:
                if len(fields) != len(header):
                    raise ValueError(f'{path}, line {line}: {len(fields)} fields where there are {len(header)} columns')
                places.append(line)
                for column, i in zip(columns, chosen, strict=True):
                    column.append(fields[i])
    except OSError as e:
        raise ValueError(f'cannot read {path}: {e.strerror or e}') from None
    if not places:
        raise ValueError(f'{path} has no rows below its header' if unit == 'line' else f'{path} has no rows')
    return unit, places, columns


def read_table(path, text, label='', header=()):
    """Read a table of texts and labels -> (texts, labels).

    texts: a list of tuples with one str per column in `text`. labels: a list of str, or None if `label` is ''. path: .csv
    (separated by comma, semicolon, tab or bar), .tsv (tab, no quoting), .jsonl (one object a line), each also as .gz, or
    .parquet; UTF-8, or UTF-16 with a byte-order mark; blank lines are skipped. text: names of one or two columns. header:
    column names for a file without a header line. Raises ValueError: one line that names the file and the line in it.
    """
    text = (text,) if isinstance(text, str) else tuple(text)
    if not 1 <= len(text) <= 2:
        raise ValueError(f'{len(text)} text columns; name one column, or two for pairs')
    unit, places, columns = read_columns(path, text + ((label,) if label else ()), header)
    for name, values in zip(text, columns, strict=False):
        wrong = next((i for i, value in enumerate(values) if not isinstance(value, str)), None)
        if wrong is not None:
            raise ValueError(f'{path}, {unit} {places[wrong]}: {name!r} is {values[wrong]!r}, not text')
    if not label:
        return list(zip(*columns, strict=True)), None
    given = columns[len(text)]
    labels = ['' if value is None or value != value else str(value) for value in given]     # a NaN is none
    wrong = next((i for i, value in enumerate(labels) if not value.strip() or isinstance(given[i], list | dict)), None)
    if wrong is not None:
        raise ValueError(f'{path}, {unit} {places[wrong]}: the label ({label!r}) is {labels[wrong].strip() or "empty"}')
    return list(zip(*columns[:len(text)], strict=True)), labels


def write_table(path, columns, rows):
    """Write a csv atomically. columns: names; rows: iterable of tuples of str and numbers. Returns the number of rows.

    Every str is quoted, so that commas, quotes, line ends and empty texts survive the round trip. Raises OSError."""
    count = 0

    def write(temporary):
        nonlocal count
        with open(temporary, 'w', encoding='utf-8', newline='') as f:
            writer = csv.writer(f, quoting=csv.QUOTE_NONNUMERIC, lineterminator='\n')
            writer.writerow(columns)
            for row in rows:
                writer.writerow(row)
                count += 1
    atomic_write(path, write)
    return count


def _listed(names):
    return ', '.join(names[:12]) + (f' and {len(names) - 12} more' if len(names) > 12 else '')


def label_names(labels):
    """Label names in the order of their ids, from a list of str: sorted as numbers if all are integers, else as text."""
    names = set(labels)
    if len(names) < 2:
        raise ValueError(f'all {len(labels)} labels are {_listed(sorted(names)) or "missing"}; two or more are needed')
    is_integer = all(re.fullmatch(r'-?[0-9]+', name) for name in names)
    return sorted(names, key=lambda name: (int(name), name)) if is_integer else sorted(names)


def refuse_row_numbers(labels, column):
    """Raises ValueError if the labels, a list of str, are consecutive numbers: those of the rows."""
    if len(labels) > 20 and all(re.fullmatch('[0-9]+', label) for label in labels):
        numbers = [int(label) for label in labels]
        if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            raise ValueError(f'the labels, {column!r}, are the numbers of the rows; type --label_column=... of the labels')


def label_ids(labels, names, path):
    """Label ids, a list of int: the position of each label in `names`. ValueError, naming `path`, for an unknown label."""
    ids = {name: i for i, name in enumerate(names)}
    for row, label in enumerate(labels, 1):
        if label not in ids:
            raise ValueError(f'{path}, row {row}: label {label!r} is none of {_listed(list(names))}')
    return [ids[label] for label in labels]


# ---------------------------------------------------------------------------------------------------------------------
# data folders


def _read_task(folder):
    """task.json as a dict, or None if it is missing. Raises ValueError for a file that no prepare.py wrote."""
    path = Path(folder) / 'task.json'
    try:
        task = json.loads(path.read_bytes())
        if {'task', 'labels', 'text', 'label', 'rows', 'complete'} <= task.keys():
            return task
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError):
        pass
    raise ValueError(f'{path} was not written by a prepare.py; remove it and run the prepare.py again')


def _save_task(folder, task):
    atomic_write(folder / 'task.json', lambda path: Path(path).write_text(json.dumps(task, indent=1), encoding='utf-8'))


def load(folder, split):
    """Load one split of a folder written by build() -> (texts, ids, names): texts as in read_table, ids a list of int,
    names the labels. Raises ValueError for a missing or unfinished folder, an unknown split or changed rows."""
    folder = Path(folder)
    task = _read_task(folder)
    if task is None or not task['complete']:
        # only the scripts that write labelled texts, not tokens
        scripts = {path.parent.name: text for path in sorted(tokens.ROOT.glob('data/*/prepare.py'))
                   if 'texts.build(' in (text := path.read_text(encoding='utf-8'))}
        name, _, option = Path(os.path.relpath(folder, tokens.ROOT / 'data')).as_posix().partition('/')
        own = name in scripts and (not option or f"'--{option}'" in scripts[name])      # --held writes sst2/held
        command = (f'python data/{name}/prepare.py{option and " --" + option}' if own else
                   f'python data/<name>/prepare.py --out_dir {folder}, where <name> is one of: {", ".join(scripts)}')
        raise ValueError(f'{folder} {"is unfinished" if task else "holds no task.json"}; type: {command}')
    if split not in task['rows']:
        raise ValueError(f'{folder} has no split {split!r}; it has {_listed(list(task["rows"]))}')
    path = folder / f'{split}.csv'
    texts, labels = read_table(path, task['text'], task['label'])
    if len(texts) != task['rows'][split]:
        raise ValueError(f'{path} has {len(texts):,} rows, {task["rows"][split]:,} were written; run the prepare.py again')
    return texts, label_ids(labels, task['labels'], path), list(task['labels'])


def build(folder, task, splits, expected=None, published=True):
    """Build a data folder of labelled texts, or recognize a finished one. An interrupted build starts again.

    task: {'task', 'labels', 'text', 'label', 'source', 'revision'} as in task.json. splits: {split: function without
    arguments that yields rows (text, ..., label name)}. expected: {split: rows of the published set}. Another count raises
    ValueError; with published=False (local files) the counts are only printed. If a finished folder has the same `task`,
    splits and file sizes, nothing is written. Raises ValueError rather than replace a csv that build() did not write.
    """
    folder, expected = Path(folder), expected or {}
    task = json.loads(json.dumps(task))
    sizes = lambda names: {s: (folder / f'{s}.csv').stat().st_size for s in names if (folder / f'{s}.csv').is_file()}
    old = _read_task(folder)
    same = old is not None and all(old.get(key) == value for key, value in task.items()) and list(old['rows']) == list(splits)
    if same and old['complete'] and old.get('bytes') == sizes(splits):
        print(f'{folder} is complete with the same settings; left as it is')
        return
    if old:
        why = 'was not finished' if not old['complete'] else 'is damaged' if same else 'has other settings'
        print(f'{folder} {why}; rebuilding it')
    foreign = sorted(sizes(set(splits) - set(old['rows'] if old else ())))
    if foreign:
        raise ValueError(f'{folder / foreign[0]}.csv is there and no prepare.py wrote it; move it, or give another --out_dir')
    folder.mkdir(parents=True, exist_ok=True)
    # The union of old and new splits: if this run is killed, the next one can still recognize all our files.
    _save_task(folder, {**task, 'rows': dict.fromkeys([*splits, *(old['rows'] if old else ())]), 'complete': False})
    for split in old['rows'] if old else ():
        for path in folder.glob(f'{split}.csv*'):
            path.unlink()
    rows = {}
    for split, read in splits.items():
        if split in expected:
            print(f'{split}: expected {expected[split]:,} rows' + ('' if published else ' in the published set'), flush=True)
        seen = collections.Counter()
        counted = ((seen.update([row[-1]]), row)[1] for row in tqdm(read(), desc=split, unit='row', disable=None))
        rows[split] = write_table(folder / f'{split}.csv', [*task['text'], task['label']], counted)
        print(f'{split}: got {rows[split]:,} rows: ' + ', '.join(f'{seen[name]:,} {name}' for name in task['labels']))
        if rows[split] == 0 or published and rows[split] != expected.get(split, rows[split]):
            raise ValueError(f'{split} of {task["source"]} has {rows[split]:,} rows, expected {expected.get(split, "some")}')
    _save_task(folder, {**task, 'rows': rows, 'bytes': sizes(splits), 'complete': True})
    print(f'wrote {folder}')


def named(labels, names, path):
    """Labels given as names or as ids ('0', '1', ...) -> list of names. ValueError, naming `path`, for an unknown label."""
    known = {str(i): name for i, name in enumerate(names)} | {name: name for name in names}
    return [known[list(known)[i]] for i in label_ids(labels, list(known), path)]


def hub_rows(hub_id, config, split, revision, text, label):
    """Yield (text, ..., label id) for one split of a data set on the Hugging Face Hub. text, label: names of its fields.

    Streams the split, because otherwise all splits are downloaded. Raises ValueError if the Hub cannot be read."""
    try:
        import datasets
        rows = datasets.load_dataset(hub_id, config, split=split, revision=revision, streaming=True)
        for row in rows:
            yield (*(row[field] for field in text), row[label])
    except Exception as e:                          # noqa: BLE001  network errors of several libraries share no class
        raise ValueError(f'reading {hub_id} ({split}) from the Hub failed ({type(e).__name__}: {str(e)[:200]}); '
                         'run the same command again, or use local files (see --help)') from None


def file_revision(paths):
    """Revision of local files, in place of a Hub revision: 'sha256:...' over their contents, in order. ValueError."""
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f'there is no file {path}')
    return 'sha256:' + hashlib.sha256(''.join(map(tokens.file_digest, paths)).encode()).hexdigest()


def run(main):
    """tokens.run() that also prints a ValueError as one line."""
    try:
        tokens.run(main)
    except ValueError as e:
        fail(e)
