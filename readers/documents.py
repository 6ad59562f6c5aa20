"""Documents to token files, shard by shard; an interrupted run continues. Shared by data/c4, tinystories and fineweb95m.

A source is {split: spans}, or a function of the split. A span (read, start, stop) is one file: read() yields its documents
as str, and the documents numbered [start, stop) are used. A continued run does not read earlier files again.

Progress is saved after each shard: the number of documents in finished shards, and the number of tokens of the next
document that are in them. A continued run reads the current file up to that document and writes the rest of it.
So it writes the same shards as an uninterrupted run. A tokenizer that is trained on the documents is trained once.
progress.json stores the SHA-256 of its file. If that file is lost or changed, the tokenizer is trained again and the
shards of the old one are deleted.

Use:    see data/c4/prepare.py
"""
import argparse
import gzip
import itertools
import json
import sys
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import fail
from readers import tokens

BATCH = 1024  # documents encoded at a time, on all cores
ORDER = ('val', 'train')  # the small split first, so that mistakes show early

# -------------------------------------------------------------------------------------------------------- sources


def hub_spans(hub_id, config, split, revision):
    """Spans [(read, 0, None), ...], one per file of a split on the Hub, in order. The documents are in column "text"."""
    def from_hub(function):
        try:
            return function()
        except Exception as error:  # network errors of several libraries share no class
            fail(f'reading {hub_id} from the Hub failed ({type(error).__name__}: {str(error)[:200]}); run the same '
                 'command again to continue, or use local files: --file PATH')

    def load():
        import datasets  # imported here: it takes seconds, and --file does not need it
        return datasets.load_dataset(hub_id, config, split=split, revision=revision, streaming=True)
    dataset = from_hub(load)

    def read(number):
        rows = from_hub(lambda: iter(dataset.shard(dataset.num_shards, number)))
        while (row := from_hub(lambda: next(rows, None))) is not None:
            yield row['text']
    return [(lambda number=number: read(number), 0, None) for number in range(dataset.num_shards)]


def lines(path):
    """Yield the lines of a plain or .gz file as bytes."""
    try:
        with (gzip.open if str(path).endswith('.gz') else open)(path, 'rb') as file:
            yield from file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        fail(f'{path} is a damaged or incomplete .gz file ({error}); download it again')
    except OSError as error:
        fail(f'cannot read {path}: {error.strerror}; give the path of a file, plain or .gz')


def json_lines(path):
    """Yield (line number, bytes) for each non-empty line."""
    return ((number, line) for number, line in enumerate(lines(path), 1) if line.strip())


def json_text(path, number, line):
    try:
        text = json.loads(line)['text']
    except (ValueError, KeyError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        fail(f'{path}, line {number}: not a JSON object with a string in its field "text"; '
             'correct or delete that line')
    return text


def local_source(paths, val_docs, val_paths=(), pieces=json_lines, text=json_text):
    """Spans of local files -> ({split: spans}, settings). Validation: val_paths, else the last val_docs documents (5%).

    pieces(path) yields (number, bytes) for each document; text(path, number, bytes) decodes one to str.
    """
    def read(path):
        return (text(path, *piece) for piece in pieces(path))
    every = [*paths, *val_paths]
    counts = [sum(1 for _ in pieces(path)) for path in every]
    if not sum(counts):
        fail(f'{", ".join(map(str, every))}: no documents; give files that contain documents')
    if val_paths:
        val_docs = sum(counts[len(paths):])
    settings = {'sha256': [tokens.file_digest(path) for path in every], 'val_docs': val_docs}
    val_docs = max(1, sum(counts) // 20) if val_docs is None else val_docs
    split_at = sum(counts) - val_docs
    if val_docs < 1 or split_at < 1:
        fail(f'{sum(counts)} documents cannot be split into training documents and {val_docs} for validation; '
             'give more documents or change --val_docs')
    spans, first = {'train': [], 'val': []}, 0
    for path, count in zip(every, counts, strict=True):
        middle = min(max(split_at - first, 0), count)
        for split, start, stop in (('train', 0, middle), ('val', middle, count)):
            if start < stop:
                spans[split].append((lambda path=path: read(path), start, stop))
        first += count
    return spans, settings


def texts(spans, span=0, number=0):
    """Yield (span, number in its file, text), starting at document `number` of span `span`."""
    for index in range(span, len(spans)):
        read, start, stop = spans[index]
        first = max(start, number) if index == span else start
        for offset, text in enumerate(itertools.islice(read(), first, stop)):
            yield index, first + offset, tokens.valid(text)


# -------------------------------------------------------------------------------------------------------- writing


def trained(folder, record, spans, vocab, chars):
    """The BPE of an unfinished folder: loaded from it, else trained on the first `chars` characters and saved there."""
    path, kept = Path(folder) / tokens.TOKENIZER_FILE['bpe'], record.get('tokenizer')
    if path.is_file() and tokens.file_digest(path) == kept:
        return tokens.bpe(path.read_bytes().decode())

    def first(left):
        for *_, text in texts(spans):
            yield text[:left]
            left -= len(text)
            if left <= 0:
                return
    print(f'training a vocabulary of {vocab:,} tokens on up to {chars:,} characters of the training documents')
    tokenizer = tokens.train_bpe(first(chars), vocab)
    tokens.write_whole(path, tokenizer.text.encode())
    if tokens.file_digest(path) != kept:
        # Delete the shards before saving the record. If a crash comes in between, open_folder() sees that shards are
        # missing. In the other order, a shard of the old tokenizer could survive unnoticed.
        for shard in itertools.chain(*(Path(folder).glob(f'{split}_*.bin') for split in tokens.SPLITS)):
            shard.unlink()
        record |= {split: {} for split in tokens.SPLITS} | {'tokenizer': tokens.file_digest(path)}
        tokens.save_record(folder, record)
    return tokenizer


def encoded(stream, tokenizer):
    """Iterator of (span, number, text) -> (span, number, int64 tokens with eot at the end), encoded in batches."""
    while batch := list(itertools.islice(stream, BATCH)):
        for (span, number, _), ids in zip(batch, tokenizer.encode_batch([text for *_, text in batch]), strict=True):
            yield span, number, np.append(ids, tokenizer.eot)


def build_split(out_dir, split, spans, limit, shard_tokens, tokenizer, record):
    """Write or continue one split of at most `limit` tokens (None: all). `record` (tokens.open_folder) stores the position."""
    # span (file), number (document in it), offset (token in the document): the first token not yet in a finished shard
    place = record[split] or {'shards': 0, 'span': 0, 'number': 0, 'offset': 0, 'complete': False}
    record[split] = place
    if place['complete']:
        return
    writer = tokens.Writer(out_dir, split, tokenizer, shard_tokens, first_shard=place['shards'])
    total, offset, most = place['shards'] * shard_tokens, place['offset'], limit or sys.maxsize
    if total:
        print(f'{split}: continuing after {place["shards"]} finished shards, {total:,} tokens')
    with tqdm(total=limit, initial=total, desc=split, unit='tok', unit_scale=True, disable=None) as bar:
        for span, number, ids in encoded(texts(spans, place['span'], place['number']), tokenizer):
            if total >= most:
                break
            part = ids[offset:offset + most - total]
            writer.write(part)
            total, offset = total + len(part), 0
            bar.update(len(part))
            if writer.shards > place['shards']:  # the writer's pending tokens are the end of this document
                place |= {'shards': writer.shards, 'span': span, 'number': number, 'offset': len(ids) - writer.pending}
                tokens.save_record(out_dir, record)
    writer.close()
    if limit:
        print(f'{split}: expected {"" if total == limit else "up to "}{limit:,} tokens, got {total:,}'
              + ('' if total == limit else ', which is all there is'))
    place |= {'shards': writer.shards, 'complete': True}
    tokens.save_record(out_dir, record)


def build(args, argv, source, settings, tokenizer=None, vocab_chars=0):
    """Build or continue args.out_dir. args: from parser(). source: function split -> spans, called only if needed.

    settings: dict of everything that determines the documents. tokenizer: None trains a BPE of args.vocab tokens on the first
    vocab_chars characters of the training documents. It does not depend on --tokens, so a longer run gets the same BPE.
    """
    limits = {'train': args.tokens, 'val': args.val_tokens}
    how = {'tokenizer': tokenizer.digest.hex()} if tokenizer else {'vocab': args.vocab, 'vocab_chars': vocab_chars}
    record = tokens.open_folder(args.out_dir, {**settings, **how, 'tokens': limits, 'shard_tokens': args.shard_tokens}, argv)
    if record['complete']:
        return
    spans = {split: source(split) for split in ORDER}
    tokenizer = tokenizer or trained(args.out_dir, record, spans['train'], args.vocab, vocab_chars)
    for split in ORDER:
        build_split(args.out_dir, split, spans[split], limits[split], args.shard_tokens, tokenizer, record)
    tokens.finish(args.out_dir, record)


# --------------------------------------------------------------------------------------------------- command line


def count(text):
    """'1e9', '1_000' -> int above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not 1 <= number < 1e15 or number % 1:
        raise argparse.ArgumentTypeError(f'{text} is not a whole number above 0; type for example 1e9')
    return int(number)


def vocabulary(text):
    """'2048' -> 2048."""
    size = count(text)
    if not 257 <= size <= 1 << 24:
        raise argparse.ArgumentTypeError(f'{size:,} tokens are impossible: 256 bytes and end-of-text make 257; '
                                         'type --vocab=257 or more')
    return size


def parser(doc, script, train_tokens, val_tokens, files, vocab=None):
    """ArgumentParser with the shared options. *_tokens: default limits (None: all); files: the kind of file for --file."""
    def size(limit):
        return f'{limit:,}' if limit else 'all'
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                      allow_abbrev=False)
    options.error = fail  # one line instead of the usage
    add = options.add_argument
    add('--tokens', type=count, default=train_tokens, help=f'training tokens, e.g. 1e9 ({size(train_tokens)})')
    add('--val_tokens', type=count, default=val_tokens, help=f'validation tokens ({size(val_tokens)})')
    add('--file', nargs='+', metavar='PATH', help=f'local {files} instead of the Hub')
    add('--val_docs', type=count, help='number of validation documents (local files: the last 5%%)')
    if vocab:
        add('--vocab', type=vocabulary, default=vocab, help=f'vocabulary size of the BPE to train ({vocab:,})')
    add('--shard_tokens', type=count, default=tokens.SHARD_TOKENS, help='tokens per shard')
    add('--out_dir', default=Path(script).resolve().parent, type=Path)
    return options
