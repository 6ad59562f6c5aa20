"""
Stores the results of an experiment in results/: <name>.jsonl, <name>.md and, for curves, <name>.png.

A line of <name>.jsonl is one run: variant, seed, changed options, all settings, versions, machine, median milliseconds and
peak memory of its steps, the size of its packed file, its evaluations. null means unknown. typed: the options of a run that was
made before some of its `options` existed. For bench.py and ptq.py a line is one of their rows. All tables, the headlines in
README.md and docs/, and the index results/README.md are made from these lines alone.
"""
import json
import os
import re
import statistics
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MIB = 2 ** 20
sys.path.append(str(ROOT))
from report.figure import load_config  # noqa: E402

# name: question, then the headline of its table: a column and one or two rows. The index has this order.
INDEX = {
    'quality': ('What do binary and ternary blocks cost a GPT on the same batches?',
                'val loss', 'all binary', 'all ternary', 'full precision'),
    'long': ('... and in longer training?', 'gap', 'all ternary'),
    'depth': ('Do 12 of 12 binary blocks train stably?', 'val loss', '12 of 12 binary', '12 blocks, full precision'),
    'search': ('Which rates, starts and teachers do these models need?', 'step 625 = val loss',
               'all ternary, latent weights at 4 x the rate', '... at the rate', 'full precision'),
    'pareto': ('Trained in low bits, or quantized after training?', 'gap', 'ternary, trained on', 'GPTQ, 2 bits',
               'ternary, rounded'),
    'speed': ('Which time and memory does a training step of train_gpt.py take?',
              'peak MiB', 'tern+ramp, float32', 'fp, float32'),
    'arithmetic': ('Does a ternary model learn to add?',
                   'exact match of held-out problems', 'ternary', 'full precision, the same rates'),
    'tictactoe': ('Does a ternary model learn to play from games?',
                  'against perfect: won, drawn, lost', 'ternary', 'full precision, the same rates'),
    'tinystories': ('What does a ternary BitNet cost on stories?', 'val loss', 'ternary', 'full precision'),
    'bitnet_speed': ('Which time and memory does a training step of train_bitnet.py take?',
                     'peak MiB', 'tern+ramp, float32', 'fp, float32'),
    'compiled': ('What is left of the memory saving under torch.compile?', 'saved, × fp', 'gpt bin, bfloat16',
                 'gpt tern, bfloat16', 'gpt int4, bfloat16', 'bitnet tern, bfloat16'),
    'food10': ('What do binary layers cost a CNN on photographs?', 'top-1', 'conv8, conv9, conv10 binary', 'all real'),
    'cifar10': ('... and with 10,000 test images, and a teacher?', 'top-1', 'conv8, conv9, conv10 binary', 'all binary',
                'all binary, a ramp, the real network as teacher', 'all real'),
    'food10_search': ('Which learning rates and normalizations do binary convolutions need?', 'top-1',
                      '... 3e-3, latent weights at 2 x', '... 3e-3, latent weights at 5 x'),
    'conv': ('Which time and memory does a low-bit convolution take?', 'network = ms of a training step, × real',
             'binary, float32', 'binary channel, float32', 'real, float32'),
    'sst2': ('Which accuracy and memory does each fine-tuning method have?', 'gap = gap to AdamW in points',
             'rSVD, rank 6, one second moment per column', 'rSVD, rank 4', 'LoRA, rank 16'),
    'sst2_search': ('Which rates and moments does low-rank Adam need?', 'gap = gap to AdamW in points',
                    'rSVD, rank 6, 1e-3, one second moment per column',
                    'rSVD, rank 4, 1e-3, updates not scaled, moments not rotated, a basis every 50 steps'),
    'sst2_base': ('Which method suits a model that was trained here on other text?', 'gap = gap to AdamW in points',
                  'LoRA, rank 16, all linear layers, 2e-3'),
    'finetune': ('Which time and memory does a fine-tuning step of DistilBERT take?',
                 'peak = peak MiB', 'rsvd projected', 'adamw'),
    'optim': ('Which time and memory does a step of low-rank Adam take?', 'MiB = optimizer state, MiB', 'rsvd 16', 'adamw'),
    'optim_bytes': ('How much optimizer memory does low-rank Adam save?', 'optimizer bytes',
                    'short, all matrices, 16', 'Adam'),
    'stats': ('How many bytes does each form of a network take?', 'actual = MiB', 'nf4', 'bignet'),
    'fit': ('Does LoRA over low-bit weights learn?', 'loss = loss at the end', 'qlora', 'lora'),
    'layers': ('Which error and time does a single layer have?', 'error = relative RMS error', 'fit4', 'nf4'),
    'ptq_schemes': ('What does quantization without training cost?', 'difference = rise of the loss', 'gptq4', 'rtn4',
                    'gptq2', 'rtn2'),
    'ptq_prune': ('What does pruning cost?',
                  'difference = rise of the loss by share of zeros', 'wanda, 0.75', 'magnitude, 0.75'),
    'ptq_sensitivity': ('Which blocks lose most with binary weights?', 'all = rise of the loss', 'blocks.0', 'blocks.2'),
    'blocks': ('Do blocks chosen by sensitivity train better as binary?',
               'val loss', 'the half chosen by ptq.py', 'the first half'),
    'ptq_big': ('What does ptq.py need at the size of GPT-2?', 'seconds', 'gptq4', 'rtn4'),
    'decode': ('How fast does a packed model run on a CPU, next to llama.cpp?', 'measured',
               'decode, ternary, 8-bit heads, over llama.cpp TQ2_0 Q8_0, 1',
               'prefill of 512, ternary, over llama.cpp TQ2_0 Q8_0, 1',
               'decode, binary, over tern, 1'),
    'export': ('Do exported files compute what was trained, in llama.cpp and transformers?', 'dloss',
               'tinystories_TQ2_0_F16.gguf, file -> llama.cpp', 'tinystories_packed, file -> transformers'),
    'faults': ('Does a run survive kills, full disks, NaNs and damaged files?', 'as promised', 'SIGKILL', 'full disk',
               'damaged checkpoint'),
}
MORE = """
No figure on these pages was measured on a GPU. Beside them:

- [negatives.md](negatives.md): what did not work, and what did.
- [wikitext2_bpe.jsonl](wikitext2_bpe.jsonl): the training run of the model in [ptq_schemes.md](ptq_schemes.md), by
  `python train_gpt.py config/wikitext2_bpe.py`; the other ptq tables and blocks.md used an earlier run.
- [precision.txt](precision.txt): the error that the common term of {0, 1} weights causes in bf16, by
  `python results/precision.py > results/precision.txt`.
- `python results/fit4.py` computes the levels of the format fit4.
- `--table` of `python results/runs.py`, `results/ptq.py`, `results/pareto.py`, `results/decode.py`, `results/export.py` and
  `results/faults.py` makes all tables and pictures, and this page.
"""

# ---------------------------------------------------------------------------------------------------------------------
# storing runs

_lock = threading.Lock()        # runs.py stores several runs at the same time


def read(name):
    """The lines of results/<name>.jsonl as a list of dicts; [] if there is no such file."""
    path = ROOT / 'results' / f'{name}.jsonl'
    return [json.loads(line) for line in open(path, encoding='utf-8')] if path.exists() else []


def write(name, text):
    """Replace the file results/<name> atomically."""
    path = ROOT / 'results' / name
    tmp = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    tmp.write_text(text, encoding='utf-8')
    os.replace(tmp, path)


def replace(name, rows, same):
    """Replace the lines of results/<name>.jsonl for which same(line) is true by `rows`."""
    with _lock:
        old = read(name)
        at = next((i for i, r in enumerate(old) if same(r)), len(old))
        kept = [r for r in old if not same(r)]
        write(f'{name}.jsonl', ''.join(json.dumps(r) + '\n' for r in kept[:at] + rows + kept[at:]))


def put(name, run):
    """Write the line `run` into results/<name>.jsonl; it replaces the line of the same variant and seed."""
    replace(name, [run], lambda r: (r['variant'], r.get('seed')) == (run['variant'], run.get('seed')))


def condensed(records):
    """Records of a log.jsonl -> dict with the median time of a step, the peak memory, all evaluations and, for a finished run,
    its last record."""
    steps = [r for r in records if r.get('ms') is not None]
    end = records[-1] if 'packed_file_bytes' in records[-1] else {}
    return {'ms': statistics.median(r['ms'] for r in steps), 'peak_mem_bytes': max(r['peak_mem_bytes'] for r in steps),
            **{k: v for k, v in end.items() if k != 'step'}, 'evaluations': [r for r in records if 'val_loss' in r]}


def keep_run(name, out, **about):
    """Store the run in folder `out`; about: its variant, its seed and any further fields."""
    import torch

    import common
    records = common.read_log(str(out))
    settings = load_config(str(out))
    device = torch.device(settings.get('device') or ('cuda' if torch.cuda.is_available() else 'cpu'))
    state = common.read_checkpoint(str(out / 'last.pt'), mmap=True)
    run = {**about, 'settings': settings, 'versions': state['versions'], 'machine': common.device_name(device),
           **condensed(records)}
    if (out / 'results.yaml').exists():                     # finetune_cls.py writes it at its end
        import yaml
        run['results'] = yaml.safe_load((out / 'results.yaml').read_text(encoding='utf-8'))
    put(name, run)


# ---------------------------------------------------------------------------------------------------------------------
# tables


def table(columns, rows):
    """Markdown lines. columns: {header: cell(row) or format string}; trailing spaces distinguish equal headers."""
    return ['| ' + ' | '.join(h.strip() for h in columns) + ' |', '|---' * len(columns) + '|'] + [
        '| ' + ' | '.join(c(r) if callable(c) else c.format(**r) for c in columns.values()) + ' |' for r in rows]


def number(key, spec, scale=1):
    """A cell that formats row[key] / scale, or - if it is missing."""
    return lambda r: '-' if r.get(key) is None else format(r[key] / scale if scale != 1 else r[key], spec)


def publish(name, lines):
    """Write results/<name>.md, its headline in the pages of docs/ and the index of results/; print the table."""
    text = '\n'.join(lines)
    write(f'{name}.md', text + '\n')
    fill(name, f'{headline(name)}. The whole table: [results/{name}.md](../results/{name}.md).')
    write('README.md', index())
    print(text)


def fill(name, text):
    """Put `text` between <!-- name --> and <!-- end --> in README.md and the pages of docs/."""
    for page in (ROOT / 'README.md', *sorted(ROOT.glob('docs/*.md'))):
        head, mark, rest = page.read_text(encoding='utf-8').partition(f'<!-- {name} -->\n')
        if mark:
            _, end, after = rest.partition('<!-- end -->')
            if not end:
                sys.exit(f'error: {page}: <!-- {name} --> has no <!-- end -->; put it back')
            here = text.replace('](../', '](') if page.name == 'README.md' else text
            write(os.path.relpath(page, ROOT / 'results'), f'{head}{mark}{here}\n{end}{after}')


def headline(name):
    """'val loss: all binary (n=3) = 1.7591 ± 0.0024; full precision (n=3) = ...', from the table of results/<name>.md."""
    _, column, *labels = INDEX[name]
    column, _, shown = column.partition(' = ')
    lines = (ROOT / 'results' / f'{name}.md').read_text(encoding='utf-8').splitlines()
    header, _, *rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines if line.startswith('|')]
    cells = {}
    for row in rows:                                        # by the first cell, or by the first two with a comma between
        label, n = re.fullmatch(r'(.*?)( \(n=\d+\))?', row[0].replace('`', '')).groups(default='')
        figure = f'{n} = {row[header.index(column)]}'
        cells |= {f'{label}, {row[1]}': figure, **({} if label in cells else {label: figure})}
    return f'{shown or column}: ' + '; '.join(label + cells[label] for label in labels if label in cells)


def index():
    """The text of results/README.md."""
    lines = ['# Results', '', 'The commands below make all tables and this page. A line of a `.jsonl` is one run; `keep.py` '
             'tells its fields.', '',
             '| experiment | question | command | headline |', '|---|---|---|---|']
    for name, (question, *_) in INDEX.items():
        files = [p.name for p in (ROOT / 'results' / f'{name}.{end}' for end in ('md', 'jsonl', 'png')) if p.exists()]
        if f'{name}.md' in files:
            script, part = ('ptq.py', name[4:].replace('schemes', 'ptq')) if name.startswith('ptq_') else ('runs.py', name)
            command = f'python results/{script} {part}'
            if name in ('decode', 'export', 'pareto'):
                command = f'python results/{name}.py' + ' --llama=FOLDER' * (name != 'pareto')
            command = 'make faults' if name == 'faults' else command
            links = ', '.join(f'[{file.rpartition(".")[2]}]({file})' for file in files)
            lines.append(f'| {name}: {links} | {question} | `{command}` | {headline(name)} |')
    return '\n'.join(lines) + '\n' + MORE


def shrink(name):
    """Reduce results/<name>.png to 256 colors: this takes a third of the bytes."""
    from PIL import Image
    path = ROOT / 'results' / f'{name}.png'
    Image.open(path).convert('RGB').quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
