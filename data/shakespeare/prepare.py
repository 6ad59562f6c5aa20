"""Tiny Shakespeare: 1,115,394 bytes (characters) of plays, byte tokens. Downloads 1.1 MB, takes seconds.

    python data/shakespeare/prepare.py                       -> data/shakespeare
    python data/shakespeare/prepare.py --file input.txt      from a local copy

Expects the file with digest SHA256. Its first 90% are 1,003,854 training tokens, the rest 111,540 validation tokens.
This is nanoGPT's split, so losses per character are comparable. The plays are in the public domain. The file comes
from karpathy/char-rnn. Train with --dataset=shakespeare.
"""
import argparse
import sys
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import fail  # noqa: E402
from data.text.prepare import build  # noqa: E402
from readers import tokens  # noqa: E402

# The URL pins the commit; the digest verifies the content.
URL = ('https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e'
       '/data/tinyshakespeare/input.txt')
SIZE = 1_115_394  # bytes
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def download(path):
    """Download URL to path atomically."""
    print(f'downloading {URL}')
    temporary = path.with_name(path.name + '.tmp')
    try:
        with urllib.request.urlopen(URL, timeout=60) as answer:
            temporary.write_bytes(answer.read())
    except OSError as error:  # includes URLError
        fail(f'cannot download {URL} ({error}); get it by other means and type: --file PATH')
    temporary.replace(path)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = fail  # one line instead of the usage
    parser.add_argument('--file', type=Path, metavar='PATH', help='local input.txt instead of the download')
    parser.add_argument('--vocab', type=int, default=0, help='0 or 256: bytes; else vocabulary size of a BPE to train')
    parser.add_argument('--out_dir', default=Path(__file__).resolve().parent, type=Path)
    args = parser.parse_args(argv)

    path = args.file or args.out_dir / 'input.txt'
    if not path.is_file():
        if args.file:
            fail(f'there is no file {path}; without --file it is downloaded')
        args.out_dir.mkdir(parents=True, exist_ok=True)
        download(path)
    if path.stat().st_size != SIZE or tokens.file_digest(path) != SHA256:
        fail(f'{path} is not Tiny Shakespeare ({path.stat().st_size:,} bytes; expected {SIZE:,} of a certain SHA-256); '
             + (f'for another text: python data/text/prepare.py --file {path}' if args.file else f'type: rm {path}'))
    middle = int(SIZE * 0.9)
    build(args.out_dir, [(path, 0, middle)], [(path, middle, SIZE)], args.vocab, argv)


if __name__ == '__main__':
    tokens.run(main)
