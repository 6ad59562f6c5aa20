"""Tokens from local text files: bytes, or a byte-level BPE trained on the training split.

    python data/text/prepare.py --file mytext.txt                                         -> data/text
    python data/text/prepare.py --file a.txt b.txt --val_file c.txt --vocab=8192 --name=mine  -> data/text/mine

Expects UTF-8 (byte tokens: any file without NUL). Without --val_file the last 5% of each file, cut at a line end, are the
validation split. An end-of-text token stands between two files. A single file needs none, so its number of byte tokens
is its size. The terms of the data are those of your files; nothing is downloaded. Train with --dataset=text or
--dataset=text/NAME.
"""
import argparse
import codecs
import mmap
import re
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import fail  # noqa: E402
from readers import tokens  # noqa: E402

BLOCK = 1 << 20  # bytes encoded at a time, plus the rest of the last line
VAL_FRACTION = 0.05


def open_text(path):
    """Memory map of a non-empty text file without NUL. Any other file is an error of one line."""
    try:
        with open(path, 'rb') as file:
            text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        fail(f'{path} is empty; give a text file')
    except OSError as error:
        fail(f'cannot read {path}: {error.strerror}; give a text file')
    nul = text.find(b'\0')
    if nul >= 0:
        fail(f'{path} has a NUL byte at offset {nul:,}, so it is no text file; '
             'convert UTF-16 with: iconv -f UTF-16 -t UTF-8')
    return text


def cut(text):
    """Start of the validation split, in bytes: the line end nearest to VAL_FRACTION before the end, with text on both sides.

    A text without such a line end is cut between two characters. A text of one character cannot be cut: returns None.
    """
    wanted = int(len(text) * (1 - VAL_FRACTION))
    line_ends = [text.rfind(b'\n', 0, wanted) + 1, text.find(b'\n', wanted) + 1]
    inside = [end for end in line_ends if 0 < end < len(text)]
    if inside:
        return min(inside, key=lambda end: abs(end - wanted))
    while wanted > 0 and text[wanted] & 0xC0 == 0x80:  # a continuation byte of UTF-8
        wanted -= 1
    return wanted or None


def blocks(text, start, stop):
    """Yield bytes [start, stop) in blocks of about BLOCK. Each ends at a line end, or inside a huge line between characters."""
    while start < stop:
        end = min(start + BLOCK, stop)
        if end < stop:
            line_end = text.find(b'\n', end, min(end + BLOCK, stop)) + 1
            while not line_end and end > start + 1 and text[end] & 0xC0 == 0x80:
                end -= 1
            end = line_end or end
        yield text[start:end]
        start = end


def check_utf8(path, text):
    decoder = codecs.getincrementaldecoder('utf-8')()
    for start in range(0, len(text), BLOCK):
        pending = len(decoder.getstate()[0])  # bytes of a character that began in the previous block
        try:
            decoder.decode(text[start:start + BLOCK], final=start + BLOCK >= len(text))
        except UnicodeDecodeError as error:
            fail(f'{path} is not UTF-8 at byte {start - pending + error.start:,}; convert it (iconv -t UTF-8) '
                 'or use bytes: --vocab=0')


def build(out_dir, train, val, vocab, argv):
    """Write a data folder. train, val: lists of (path, start, stop) in bytes; vocab: 0 or 256: bytes, else size of a BPE."""
    texts = {path: open_text(path) for path, _, _ in train + val}
    is_bpe = vocab not in (0, 256)
    if is_bpe:
        if vocab < 257:
            fail(f'--vocab={vocab} is impossible; type 0 for bytes, or 257 or more for a trained vocabulary')
        for path, text in texts.items():
            check_utf8(path, text)
    record = tokens.open_folder(out_dir, {
        'vocab': vocab if is_bpe else 256, 'sha256': [tokens.file_digest(path) for path in texts],
        'parts': [[list(texts).index(path), start, stop] for path, start, stop in train + val], 'val_from': len(train),
    }, argv)
    if record['complete']:
        return
    sizes = {split: sum(stop - start for _, start, stop in parts) for split, parts in (('train', train), ('val', val))}
    print(f'expected: {sizes["train"]:,} bytes of training and {sizes["val"]:,} bytes of validation text')
    if is_bpe:
        print(f'training a vocabulary of {vocab:,} tokens on the training split')
        tokenizer = tokens.train_bpe((block.decode() for path, start, stop in train
                                      for block in blocks(texts[path], start, stop)), vocab)
    else:
        tokenizer = tokens.byte()

    def pieces(split, parts):
        with tqdm(total=sizes[split], desc=split, unit='B', unit_scale=True, disable=None) as bar:
            for number, (path, start, stop) in enumerate(parts):
                if number:
                    yield [tokenizer.eot]
                for block in blocks(texts[path], start, stop):
                    yield tokenizer.encode(block.decode() if is_bpe else block)
                    bar.update(len(block))
    for split, parts in (('train', train), ('val', val)):
        tokens.write(out_dir, split, pieces(split, parts), tokenizer)
    tokens.finish(out_dir, record)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = fail  # one line instead of the usage
    parser.add_argument('--file', nargs='+', required=True, metavar='PATH', help='training text')
    parser.add_argument('--val_file', nargs='+', default=[], metavar='PATH', help='validation text')
    parser.add_argument('--vocab', type=int, default=0, help='0 or 256: bytes; else vocabulary size of a BPE to train')
    parser.add_argument('--name', default='', help='write to data/text/NAME')
    parser.add_argument('--out_dir', default=Path(__file__).resolve().parent, type=Path)
    args = parser.parse_args(argv)
    if args.name and not re.fullmatch(r'\w[\w.-]*', args.name):
        fail(f'--name={args.name} is no folder name; use letters, digits, _ - and .')

    train, val = [], [(path, 0, len(open_text(path))) for path in args.val_file]
    for path in args.file:
        text = open_text(path)
        middle = len(text) if args.val_file else cut(text)
        if middle is None:
            fail(f'{path} is too short to split; add --val_file')
        train.append((path, 0, middle))
        if not args.val_file:
            val.append((path, middle, len(text)))
    build(args.out_dir / args.name, train, val, args.vocab, argv)


if __name__ == '__main__':
    tokens.run(main)
