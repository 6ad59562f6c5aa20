"""XNLI: does a premise entail a hypothesis, contradict it, or neither? English training data, tests in 15 languages.

    python data/xnli/prepare.py                                -> data/xnli; downloads about 60 MB, takes minutes
    python data/xnli/prepare.py --languages en,de
    python data/xnli/prepare.py --file train.tsv --val_file dev.tsv --xnli_dir XNLI      local files instead of the Hub

Writes train.csv (MultiNLI's 392,702 English pairs), val.csv (its 9,815 matched validation pairs), and for each language
val-<language>.csv (2,490) and test-<language>.csv (5,010), human translations of the same pairs. The labels entailment,
neutral, contradiction have the ids 0, 1, 2 (not alphabetical). Pairs without a majority among the annotators, label - or
-1, are left out and counted.
Local files: --file and --val_file are tables with the columns premise, hypothesis and label (a name or an id). --xnli_dir
contains dev-<language>.tsv and optionally test-<language>.tsv, with the same three columns and no header.
Terms: MultiNLI's are mixed (OANC, CC BY, CC BY-SA), XNLI is CC BY-NC. Train with --dataset=xnli.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import fail  # noqa: E402
from readers import texts  # noqa: E402

MNLI_ID, MNLI_REVISION = 'nyu-mll/multi_nli', 'da70db2af9d09693783c3320c4249840212ee221'
XNLI_ID, XNLI_REVISION = 'facebook/xnli', 'b8dd5d7af51114dbda02c0e3f6133f332186418e'
LANGUAGES = ('ar', 'bg', 'de', 'el', 'en', 'es', 'fr', 'hi', 'ru', 'sw', 'th', 'tr', 'ur', 'vi', 'zh')
HUB_SPLIT = {'train': 'train', 'val': 'validation_matched'}
XNLI_SPLIT = {'val': 'validation', 'test': 'test'}
XNLI_FILE = {'val': 'dev', 'test': 'test'}
LABELS = ('entailment', 'neutral', 'contradiction')  # ids 0, 1, 2
TEXT = ('premise', 'hypothesis')
EXPECTED = {'train': 392_702, 'val': 9_815} | {f'{split}-{language}': count for language in LANGUAGES
                                               for split, count in (('val', 2_490), ('test', 5_010))}


def labelled(rows, split):
    """Yield (premise, hypothesis, label name) for each row with a label. Prints the number of rows without one."""
    dropped = 0
    for premise, hypothesis, label in rows:
        if label in ('-', '-1', -1):
            dropped += 1
        else:
            yield premise.strip(), hypothesis.strip(), LABELS[label] if isinstance(label, int) else label
    if dropped:
        print(f'{split}: left out {dropped:,} pairs without a label')


def hub(split):
    name, _, language = split.partition('-')
    source = (XNLI_ID, language, XNLI_SPLIT[name], XNLI_REVISION) if language else (MNLI_ID, None, HUB_SPLIT[name],
                                                                                    MNLI_REVISION)
    return labelled(texts.hub_rows(*source, TEXT, 'label'), split)


def local(path, split):
    """The labelled rows of a local table. The table of a language split has no header."""
    found, labels = texts.read_table(path, TEXT, 'label', header=(*TEXT, 'label') if '-' in split else ())
    is_known = [label not in ('-', '-1') for label in labels]
    names = iter(texts.named([label for label, known in zip(labels, is_known, strict=True) if known], LABELS, path))
    return labelled(((*text, next(names) if known else '-') for text, known in zip(found, is_known, strict=True)), split)


def languages_in(text):
    """'en,de' -> ['en', 'de']. A language that XNLI does not have is an error of one line."""
    languages = [language for language in text.replace(' ', '').split(',') if language]
    for language in languages:
        if language not in LANGUAGES:
            fail(f'--languages: XNLI has no {language!r}; it has {", ".join(LANGUAGES)}')
    if not languages or len(set(languages)) < len(languages):
        fail(f'--languages={text}: name each language once, for example --languages=en,de')
    return languages


def local_files(args):
    """{split: path} of the local files. Without --languages, all languages in --xnli_dir; with it, each file must exist."""
    if not args.xnli_dir.is_dir():
        fail(f'there is no folder {args.xnli_dir}; give as --xnli_dir the folder of dev-<language>.tsv')
    languages = languages_in(args.languages) if args.languages else [
        language for language in LANGUAGES if (args.xnli_dir / f'dev-{language}.tsv').is_file()]
    if not languages:
        fail(f'{args.xnli_dir} holds no dev-<language>.tsv; use a language of XNLI: {", ".join(LANGUAGES)}')
    files = {'train': Path(args.file), 'val': Path(args.val_file)}
    for split, name in XNLI_FILE.items():
        for language in languages:
            path = args.xnli_dir / f'{name}-{language}.tsv'
            if split == 'val' or path.is_file():
                files[f'{split}-{language}'] = path
    return files


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = fail  # one line instead of the usage
    parser.add_argument('--languages', default='', metavar='en,de', help='languages to test on (all)')
    parser.add_argument('--file', metavar='PATH', help='local training table (.tsv, .csv, .parquet)')
    parser.add_argument('--val_file', metavar='PATH', help='local validation table')
    parser.add_argument('--xnli_dir', type=Path, metavar='DIR', help='local folder with dev-<language>.tsv')
    parser.add_argument('--out_dir', default=Path(__file__).resolve().parent, type=Path)
    args = parser.parse_args(argv)
    given = [bool(args.file), bool(args.val_file), bool(args.xnli_dir)]
    if any(given) != all(given):
        fail('--file, --val_file and --xnli_dir go together; give all three, or none for the download')

    task = {'task': 'xnli', 'labels': LABELS, 'text': TEXT, 'label': 'label'}
    if args.file:
        files = local_files(args)
        task |= {'source': ', '.join(path.name for path in files.values()),
                 'revision': texts.file_revision(files.values())}
        splits = {split: lambda split=split, path=path: local(path, split) for split, path in files.items()}
    else:
        languages = languages_in(args.languages or ','.join(LANGUAGES))
        names = [*HUB_SPLIT, *(f'{split}-{language}' for split in XNLI_SPLIT for language in languages)]
        task |= {'source': f'{MNLI_ID}, {XNLI_ID}', 'revision': f'{MNLI_REVISION}, {XNLI_REVISION}'}
        splits = {split: lambda split=split: hub(split) for split in names}
    texts.build(args.out_dir, task, splits, EXPECTED, published=not args.file)


if __name__ == '__main__':
    texts.run(main)
