"""C4 (English) in GPT-2 tokens, streamed from the Hugging Face Hub; an interrupted run continues where it stood.

    python data/c4/prepare.py                                        12.3B tokens: 25,000 steps of 480 x 1,024
    python data/c4/prepare.py --tokens=1e9                           -> data/c4, ten training shards
    python data/c4/prepare.py --file a.json.gz b.jsonl --val_docs=500     local files instead of the Hub

Expects allenai/c4, configuration en: 364,868,892 training documents in 1,024 files of about 300 MB, of which
12.3B tokens take the first 70 or so (22 GB of download, 25 GB of shards), and 364,608 validation documents in 8 files.
Local files are JSON lines with a field "text" (plain or .gz); the last --val_docs documents, or 5%, are validation.
An end-of-text token follows each document. GPT-2's vocab.bpe and encoder.json are downloaded once by tiktoken, or
taken from data/gpt2_bpe. Terms: ODC-BY, and Common Crawl's terms of use. Train with --dataset=c4.

Progress is saved after each shard: how many documents lie in finished shards and how many tokens of the next one do.
Continuing reads the file under way up to that document, writes the rest of it, and so gives the same shards as one
unbroken run.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import tokens  # noqa: E402
from configurator import fail  # noqa: E402

HUB_ID, CONFIG = 'allenai/c4', 'en'
REVISION = '1588ec454efa1a09f29cd18ddd04fe05fc8653a2'  # the one that torchtitan pins as well
HUB_SPLIT = {'train': 'train', 'val': 'validation'}
TOKENS = 25_000 * 491_520  # the 124M run: steps x tokens per step
VAL_TOKENS = 10_000_000
BATCH = 1024  # documents encoded at a time, on all cores


# A source is a list of spans (read, start, stop): read() gives the documents of one file as str, of which those
# numbered [start, stop) count. Continuing skips inside one file, not through all of those before it.


def hub_source(split):
    """-> [(read, 0, None)] for each file of a split on the Hub, in order."""
    def from_hub(function):
        try:
            return function()
        except Exception as error:  # several libraries' network errors pass through here, with no common class
            fail(f'reading {HUB_ID} from the Hub failed ({type(error).__name__}: {str(error)[:200]}); run the same '
                 'command again to continue, or use local files: --file PATH')

    def load():
        import datasets  # takes seconds, so not for --file
        return datasets.load_dataset(HUB_ID, CONFIG, split=HUB_SPLIT[split], revision=REVISION, streaming=True)
    dataset = from_hub(load)

    def read(number):
        rows = iter(dataset.shard(dataset.num_shards, number))
        while (row := from_hub(lambda: next(rows, None))) is not None:
            yield row['text']
    return [(lambda number=number: read(number), 0, None) for number in range(dataset.num_shards)]


def local_lines(path):
    """Yields (line number, bytes) of the non-empty lines of a .jsonl or .gz file."""
    try:
        with (gzip.open if str(path).endswith('.gz') else open)(path, 'rb') as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        fail(f'{path} is a damaged or incomplete .gz file ({error}); get it again')
    except OSError as error:
        fail(f'cannot read {path}: {error.strerror}; give .jsonl or .json.gz files')


def local_documents(path):
    for number, line in local_lines(path):
        try:
            text = json.loads(line)['text']
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            fail(f'{path}, line {number}: not a JSON object with a text in its field "text"; '
                 'correct or delete that line')
        yield text


def local_source(paths, val_docs):
    """-> {split: [(read, start, stop)]}: the last val_docs documents (None: 5%) are validation, those before train."""
    counts = [sum(1 for _ in local_lines(path)) for path in paths]
    val_docs = max(1, sum(counts) // 20) if val_docs is None else val_docs
    split_at = sum(counts) - val_docs
    if val_docs < 1 or split_at < 1:
        fail(f'{sum(counts)} documents cannot be split into training and {val_docs} for validation; change --val_docs')
    spans, first = {'train': [], 'val': []}, 0
    for path, count in zip(paths, counts, strict=True):
        middle = min(max(split_at - first, 0), count)
        for split, start, stop in (('train', 0, middle), ('val', middle, count)):
            if start < stop:
                spans[split].append((lambda path=path: local_documents(path), start, stop))
        first += count
    return spans


def documents(source, span, number):
    """Yields (span, number in its file, text) from a position on."""
    for index in range(span, len(source)):
        read, start, stop = source[index]
        first = max(start, number) if index == span else start
        for offset, text in enumerate(itertools.islice(read(), first, stop)):
            yield index, first + offset, text


def encoded(stream, tokenizer):
    """(span, number, text) -> (span, number, int64 tokens and eot), encoded by the batch."""
    while batch := list(itertools.islice(stream, BATCH)):
        for (span, number, _), ids in zip(batch, tokenizer.encode_batch([text for *_, text in batch]), strict=True):
            yield span, number, np.append(ids, tokenizer.eot)


def build_split(out_dir, split, source, limit, shard_tokens, tokenizer, record):
    """Writes, or continues, one split of at most `limit` tokens; `record` (see tokens.open_folder) keeps the place."""
    # span (file), number (document in it), offset (token in that): the first token that no finished shard holds
    place = record[split] or {'shards': 0, 'span': 0, 'number': 0, 'offset': 0, 'complete': False}
    record[split] = place
    if place['complete']:
        return
    writer = tokens.Writer(out_dir, split, tokenizer, shard_tokens, first_shard=place['shards'])
    total, offset = place['shards'] * shard_tokens, place['offset']
    if total:
        print(f'{split}: continuing after {place["shards"]} finished shards, {total:,} tokens')
    with tqdm(total=limit, initial=total, desc=split, unit='tok', unit_scale=True, disable=None) as bar:
        for span, number, ids in encoded(documents(source, place['span'], place['number']), tokenizer):
            if total >= limit:
                break
            part = ids[offset:offset + limit - total]
            writer.write(part)
            total, offset = total + len(part), 0
            bar.update(len(part))
            if writer.shards > place['shards']:  # what is pending is the end of this document
                place |= {'shards': writer.shards, 'span': span, 'number': number, 'offset': len(ids) - writer.pending}
                tokens.save_record(out_dir, record)
    writer.close()
    print(f'{split}: expected {"" if total == limit else "up to "}{limit:,} tokens, got {total:,}'
          + ('' if total == limit else ', which is all there is'))
    place |= {'shards': writer.shards, 'complete': True}
    tokens.save_record(out_dir, record)


def count(text):
    """'1e9', '1_000' -> int above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not 1 <= number < 1e15 or number % 1:
        raise argparse.ArgumentTypeError(f'{text} is no whole number above 0; type for example 1e9')
    return int(number)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = fail  # one line instead of the usage
    parser.add_argument('--tokens', type=count, default=TOKENS, help=f'training tokens, e.g. 1e9 ({TOKENS:,})')
    parser.add_argument('--val_tokens', type=count, default=VAL_TOKENS, help=f'validation tokens ({VAL_TOKENS:,})')
    parser.add_argument('--file', nargs='+', metavar='PATH', help='local .jsonl or .json.gz instead of the Hub')
    parser.add_argument('--val_docs', type=count, help='with --file: validation documents (5%%)')
    parser.add_argument('--shard_tokens', type=count, default=tokens.SHARD_TOKENS, help='tokens per shard')
    parser.add_argument('--out_dir', default=Path(__file__).resolve().parent, type=Path)
    args = parser.parse_args(argv)
    if args.val_docs and not args.file:
        fail('--val_docs goes with --file; the Hub has a validation split of its own: use --val_tokens')

    if args.file:
        source = local_source(args.file, args.val_docs)
        origin = {'sha256': [tokens.file_digest(path) for path in args.file], 'val_docs': args.val_docs}
    else:
        origin = {'hub': HUB_ID, 'config': CONFIG, 'revision': REVISION}
    tokenizer = tokens.gpt2()
    limits = {'train': args.tokens, 'val': args.val_tokens}
    record = tokens.open_folder(args.out_dir, {**origin, 'tokenizer': tokenizer.digest.hex(), 'tokens': limits,
                                               'shard_tokens': args.shard_tokens}, argv)
    if record['complete']:
        return
    for split in ('val', 'train'):  # the small one first: a mistake shows early
        build_split(args.out_dir, split, source[split] if args.file else hub_source(split), limits[split],
                    args.shard_tokens, tokenizer, record)
    tokens.finish(args.out_dir, record)


if __name__ == '__main__':
    tokens.run(main)
