"""FineWeb-Edu in a BPE of 32,000 tokens, for a model of 95M parameters. Streamed; an interrupted run continues.

    python data/fineweb95m/prepare.py                                3.28B tokens: 400,000 steps of 32 x 256
    python data/fineweb95m/prepare.py --tokens=1e9                   -> data/fineweb95m, ten training shards
    python data/fineweb95m/prepare.py --file a.json.gz b.jsonl --val_docs=500     local files instead of the Hub

Expects HuggingFaceFW/fineweb-edu, configuration sample-10BT: 9,672,101 web pages chosen for their educational value, in
14 files of about 2 GB, 9.97B GPT-2 tokens. 3.28B tokens need about a third (10 GB of download, 6.6 GB of shards).
It has no validation split: its first --val_docs pages (10,000) are validation, the others training. Local files are JSON
lines with a field "text" (plain or .gz); their last --val_docs pages, or 5%, are validation. An end-of-text token
follows each page. Terms: ODC-BY, and Common Crawl's terms of use. Train with --dataset=fineweb95m.

The byte-level BPE is trained on the first 200,000,000 characters of the training pages, or on all if there are fewer.
This reads those pages of the Hub twice. The vocabulary has the size of Llama 2's, which the published run used and whose
files need permission. The tokens differ, so compare losses per byte of text, not per token.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from readers import documents, tokens  # noqa: E402

HUB_ID, CONFIG = 'HuggingFaceFW/fineweb-edu', 'sample-10BT'
REVISION = '87f09149ef4734204d70ed1d046ddc9ca3f2b8f9'
TOKENS = 400_000 * 32 * 256  # the 95M run: steps x sequences x tokens per sequence
VAL_TOKENS = 5_000_000
VAL_DOCS = 10_000  # twice what VAL_TOKENS needs, at about 1,000 tokens per page
VOCAB = 32_000
VOCAB_CHARS = 200_000_000  # characters of training pages that train the BPE


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = documents.parser(__doc__, __file__, TOKENS, VAL_TOKENS, '.jsonl or .json.gz', VOCAB).parse_args(argv)

    if args.file:
        spans, settings = documents.local_source(args.file, args.val_docs)
        source = spans.get
    else:
        val_docs = args.val_docs or VAL_DOCS
        settings = {'hub': HUB_ID, 'config': CONFIG, 'revision': REVISION, 'val_docs': val_docs}

        def source(split):
            (read, *_), *others = documents.hub_spans(HUB_ID, CONFIG, 'train', REVISION)
            return [(read, 0, val_docs)] if split == 'val' else [(read, val_docs, None), *others]
    documents.build(args, argv, source, settings, vocab_chars=VOCAB_CHARS)


if __name__ == '__main__':
    tokens.run(main)
