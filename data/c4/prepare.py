"""C4 (English) in GPT-2 tokens, streamed from the Hugging Face Hub. An interrupted run continues where it stopped.

    python data/c4/prepare.py                                        12.3B tokens: 25,000 steps of 480 x 1,024
    python data/c4/prepare.py --tokens=1e9                           -> data/c4, ten training shards
    python data/c4/prepare.py --file a.json.gz b.jsonl --val_docs=500     local files instead of the Hub

Expects allenai/c4, configuration en. It has 364,868,892 training documents in 1,024 files of about 300 MB, and 364,608
validation documents in 8 files. 12.3B tokens need about the first 70 files (22 GB of download, 25 GB of shards).
Local files are JSON lines with a field "text" (plain or .gz); the last --val_docs documents, or 5%, are validation.
An end-of-text token follows each document. tiktoken downloads GPT-2's vocab.bpe and encoder.json once, or they are
read from data/gpt2_bpe. Terms: ODC-BY, and Common Crawl's terms of use. Train with --dataset=c4.

A continued run writes the same shards as an uninterrupted one; readers/documents.py explains how.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import fail  # noqa: E402
from readers import documents, tokens  # noqa: E402

HUB_ID, CONFIG = 'allenai/c4', 'en'
REVISION = '1588ec454efa1a09f29cd18ddd04fe05fc8653a2'  # torchtitan pins the same revision
HUB_SPLIT = {'train': 'train', 'val': 'validation'}
TOKENS = 25_000 * 491_520  # the 124M run: steps x tokens per step
VAL_TOKENS = 10_000_000


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = documents.parser(__doc__, __file__, TOKENS, VAL_TOKENS, '.jsonl or .json.gz').parse_args(argv)
    if args.val_docs and not args.file:
        fail('--val_docs goes with --file; the Hub has its own validation split: use --val_tokens')

    if args.file:
        spans, settings = documents.local_source(args.file, args.val_docs)
        source = spans.get
    else:
        settings = {'hub': HUB_ID, 'config': CONFIG, 'revision': REVISION}
        source = lambda split: documents.hub_spans(HUB_ID, CONFIG, HUB_SPLIT[split], REVISION)
    documents.build(args, argv, source, settings, tokens.gpt2())


if __name__ == '__main__':
    tokens.run(main)
