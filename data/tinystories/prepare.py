"""TinyStories in a BPE of 2,048 tokens, streamed from the Hugging Face Hub. An interrupted run continues.

    python data/tinystories/prepare.py                                                  -> data/tinystories
    python data/tinystories/prepare.py --file TinyStories-train.txt --val_file TinyStories-valid.txt

Short stories in the words of a small child, written by GPT-3.5 and GPT-4 (Eldan and Li, arXiv 2305.07759). Expects
roneneldan/TinyStories: 2,119,719 training stories in 4 files (1.0 GB of download, 1.9 GB of text) and 21,990 validation
stories. Local files are plain text (or .gz). <|endoftext|> separates the stories, as in the data set's own .txt files.
White space around a story is removed. Without --val_file the last 5% of the stories, or --val_docs, are validation. An
end-of-text token follows each story.

The byte-level BPE is trained on the first 100,000,000 characters of the training stories, or on all if there are fewer.
This reads those stories of the Hub twice. Expect 3.7 bytes per token with 2,048 tokens, 4.0 with --vocab=4096, so about
520 million tokens and 1 GB of shards. Terms: CDLA-Sharing-1.0. Train with --dataset=tinystories.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import fail  # noqa: E402
from readers import documents, tokens  # noqa: E402

HUB_ID = 'roneneldan/TinyStories'
REVISION = 'f54c09fd23315a6f9c86f9dc80f725de7d8f9c64'  # head of main since August 2024; the data files are older
HUB_SPLIT = {'train': 'train', 'val': 'validation'}
VOCAB = 2048
VOCAB_CHARS = 100_000_000  # characters of training stories that train the BPE


def stories(path):
    """Yield (number, bytes) for each non-empty story of a file. The numbers count empty stories too."""
    mark, number, story = tokens.EOT.encode(), 0, []
    for line in documents.lines(path):
        *ends, rest = line.split(mark)
        for end in ends:
            whole, story = b''.join([*story, end]).strip(), []
            number += 1
            if whole:
                yield number, whole
        story.append(rest)
    last = b''.join(story).strip()
    if not number:
        fail(f'{path} has no {tokens.EOT} between stories; put one after each, or for plain text type: '
             f'python data/text/prepare.py --file {path}' if last else f'{path} is empty; give a file with stories')
    if last:
        yield number + 1, last


def story_text(path, number, story):
    try:
        return story.decode()
    except UnicodeDecodeError:
        fail(f'{path}, story {number}: not UTF-8; convert the file: iconv -t UTF-8')


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = documents.parser(__doc__, __file__, None, None, 'text, stories separated by <|endoftext|>,', VOCAB)
    parser.add_argument('--val_file', nargs='+', default=[], metavar='PATH', help='with --file: validation stories')
    args = parser.parse_args(argv)
    if (args.val_docs or args.val_file) and not args.file:
        fail('--val_docs and --val_file go with --file; the Hub has its own validation split: use --val_tokens')
    if args.val_docs and args.val_file:
        fail('--val_docs and --val_file both choose the validation stories; leave one out')

    if args.file:
        spans, settings = documents.local_source(args.file, args.val_docs, args.val_file, stories, story_text)
        source = spans.get
    else:
        settings = {'hub': HUB_ID, 'revision': REVISION}
        source = lambda split: documents.hub_spans(HUB_ID, None, HUB_SPLIT[split], REVISION)
    documents.build(args, argv, source, settings, vocab_chars=VOCAB_CHARS)


if __name__ == '__main__':
    tokens.run(main)
