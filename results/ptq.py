"""
Make the tables of ptq.py: quantization, pruning and sensitivity of one model, by the commands below.

    python data/text/prepare.py --file wiki.train.txt --val_file wiki.valid.txt --vocab=4096 --name=wikitext2_bpe
    python train_gpt.py config/wikitext2_bpe.py
    python results/ptq.py                          # all parts; prune takes longest
    python results/ptq.py sensitivity              # one part of ptq, prune, sensitivity, choose, big
    python results/ptq.py --table                  # tables from the stored rows, without a run
    python results/runs.py blocks                  # train with the blocks that `choose` selected, and with others

Rows go to results/ptq_*.jsonl, tables and pictures to the same folder and README.md. No number in them is typed by hand.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys

import keep
import runs
from keep import ROOT, number, table

CKPT = ['--ckpt=out/wikitext2_bpe', '--out=out/ptq']
# part: (command, name of the file that stores its rows)
PARTS = {'ptq': (['ptq.py', *CKPT], 'ptq_schemes'),
         'prune': (['ptq.py', 'prune', *CKPT], 'ptq_prune'),
         'sensitivity': (['ptq.py', 'sensitivity', *CKPT, '--scheme=bin'], 'ptq_sensitivity'),
         'choose': (['ptq.py', 'choose', *CKPT, '--bits=16.6'], 'ptq_sensitivity'),
         'big': (['results/ptq.py', 'gpt2-shape'], 'ptq_big')}


def of_choose(row):
    return 'taken' in row


def schemes(rows):
    r = rows[-1]
    columns = {'scheme': '`{scheme}`', 'bits/weight': number('bits', '.2f'), 'val loss': '{loss:.4f}',
               'difference': number('delta', '+.4f'), 'perplexity': '{perplexity:,.1f}', 'ms, 1 token': number('ms_1', '.2f'),
               '× fp': number('ratio_1', '.2f'), 'ms/token, many': number('ms_many', '.3f'),
               '× fp ': number('ratio_many', '.2f'), 'file bytes': '{file_bytes:,}', 'smaller': number('compression', '.2f')}
    return [f'`config/wikitext2_bpe.py`, {r["device"]}, torch {r["torch"]}; the block matrices are quantized, the head and '
            f'embeddings are not (`skip={r["skip"]}`); groups of {r["group"]}; GPTQ and AWQ saw {r["windows"]} windows of the '
            'training split; loss in nats per token of a BPE over the batches of the training\'s evaluations; times on '
            f'{r["threads"]} thread{"s" * (r["threads"] > 1)}, in turns with the full-precision model.', '',
            *table(columns, rows)]


def prune(rows):
    columns = {'method': '{method}', 'share': '{amount:.2f}', 'zeros': '{zeros:.4f}', 'val loss': '{pruned_loss:.4f}',
               'retrained': '{loss:.4f}', 'difference': number('delta', '+.4f'), 'file bytes': '{file_bytes:,}',
               'smaller': number('compression', '.2f')}
    r = rows[-1]
    return [f'`config/wikitext2_bpe.py`, trained on {r["device"]} to {rows[0]["pruned_loss"]:.4f}; AdamW {r["retrain_lr"]:g}, '
            f'{r["retrain_iters"]} updates with the zeros kept; the difference is to the model after as many updates without '
            'zeros; the file has a bit for each weight and what is not 0 in fp32.',
            '', *table(columns, rows)]


def sensitivity(rows):
    taken, rows = list(filter(of_choose, rows)), [r for r in rows if not of_choose(r)]
    deltas = {(r['block'], r['kind']): r['delta'] for r in rows}
    blocks, kinds = (list(dict.fromkeys(r[k] for r in rows)) for k in ('block', 'kind'))
    columns = {'block': '{}'.format, **{f'`{k}`' if k != 'all' else 'all': (lambda b, k=k: format(deltas[b, k], '+.4f'))
                                        for k in kinds}}
    r = rows[0]
    text = [f'`config/wikitext2_bpe.py`, trained on {r["device"]}: by how much its validation loss, {r["base_loss"]:.4f}, '
            f'rises with these layers alone as `{r["scheme"]}`, {r["bits"]:.2f} bits a weight, without any training.', '',
            *table(columns, blocks)]
    if taken:
        text += ['', '`choose` took, each time beside those before: '
                 + ', '.join(f'{r["taken"]} ({r["delta"]:+.4f})' for r in taken) + '.']
    return text


def big(rows):
    columns = {'scheme': '`{scheme}`', 'left as they are': lambda r: r['skip'] or 'none', 'seconds': '{seconds:.0f}',
               'bits/weight': '{bits:.2f}', 'most memory of the process, bytes': '{peak:,}', 'above its start': '{above:,}',
               '× fp32 model': '{ratio:.2f}', 'file bytes': '{size:,}'}
    r = rows[0]
    return [f'A GPT-2 of 124M, random weights ({r["fp32"]:,} bytes in fp32, read from a checkpoint), {r["windows"]} '
            f'calibration windows of {r["block"]} tokens, {r["device"]}, {r["threads"]} threads; `--save`, from before the '
            'model is read to the whole file.', '', *table(columns, rows)]


def tabulate(name):
    """Write the table of results/<name>.jsonl and draw its picture."""
    from report import plot_ptq
    rows, path = keep.read(name), ROOT / 'results' / f'{name}.png'
    if all(map(of_choose, rows)):                   # rows of choose appear below the table of sensitivity
        return
    title, unit = rows[-1].get('ckpt'), 'nats per token'
    if name == 'ptq_schemes':
        plot_ptq.sizes(path, rows, title, unit)
    elif name == 'ptq_prune':                       # rows without updates are only the source of `zeros_from`
        rows = [r for r in rows if r['retrain_iters']]
        plot_ptq.shares(path, rows, title, unit)
    elif name == 'ptq_sensitivity':
        cells = {(r['block'], r['kind']): r['delta'] for r in rows if not of_choose(r)}
        blocks, kinds = (list(dict.fromkeys(k for k in column if k != 'all')) for column in zip(*cells, strict=True))
        plot_ptq.heat(path, blocks, kinds, cells, f'{rows[0]["ckpt"]}: {rows[0]["scheme"]}', unit)
    if path.exists():
        keep.shrink(name)
    lines = {'ptq_schemes': schemes, 'ptq_prune': prune, 'ptq_sensitivity': sensitivity, 'ptq_big': big}[name](rows)
    keep.publish(name, lines)


def gpt2_shape():
    """Measure time and memory of `ptq.py --save` on a model of GPT-2's shape, each scheme in a fresh process."""
    import numpy as np
    import torch

    import common
    from readers import tokens
    from train_gpt import GPT, GPTConfig
    work = ROOT / 'out' / 'gpt2_shape'
    shutil.rmtree(work, ignore_errors=True)
    torch.manual_seed(0)
    tokenizer, random = tokens.byte(), np.random.default_rng(0)
    for split, n in (('train', 400_000), ('val', 20_000)):
        tokens.write(work / 'data', split, [random.integers(0, 256, n)], tokenizer)
    model = GPT(GPTConfig(vocab_size=50304, block_size=1024, n_layer=12, n_head=12, n_embd=768))
    fp32 = 4 * sum(p.numel() for p in model.parameters())
    # A checkpoint of a trainer has two moments of Adam beside the weights.
    common.save_checkpoint(str(work / 'best.pt'), {
        'trainer': 'train_gpt', 'step': 0, 'model_config': vars(model.config), 'model': model.state_dict(),
        'optimizer': {'exp_avg': torch.zeros(fp32 // 4), 'exp_avg_sq': torch.zeros(fp32 // 4)}, 'best_val_loss': 0.0,
        'config': {'dataset': str(work / 'data'), 'seed': 1, 'batch_size': 1, 'eval_iters': 1, 'block_size': 256},
        'tokenizer': tokenizer.describe()})
    del model
    rows = []
    for scheme, skip in (('rtn4', 'head,embd'), ('gptq4', 'head,embd'), ('awq4', 'head,embd'), ('rtn4', ''), ('gptq4', '')):
        subprocess.run([sys.executable, 'ptq.py', f'--ckpt={work}', f'--schemes={scheme}', f'--skip={skip}',
                        f'--save={work}/q.safetensors'], cwd=ROOT, check=True)
        row = json.loads((work / 'save.jsonl').read_text())
        rows.append(row | {'fp32': fp32, 'ratio': row['above'] / fp32})
    (ROOT / 'out' / 'ptq').mkdir(exist_ok=True)
    (ROOT / 'out' / 'ptq' / 'big.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('part', nargs='?', choices=[*PARTS, 'gpt2-shape'])
    parser.add_argument('--table', action='store_true', help='compute nothing')
    a = parser.parse_args()
    if a.part == 'gpt2-shape':
        return gpt2_shape()
    names = []
    for part in [a.part] if a.part else PARTS:
        command, name = PARTS[part]
        names.append(name)
        if not a.table:
            env = os.environ if part == 'big' else dict(os.environ, OMP_NUM_THREADS='1')     # threads for one token cost time
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True, env=env)
            new = [json.loads(line) for line in open(ROOT / 'out' / 'ptq' / f'{part}.jsonl')]
            keep.replace(name, new, lambda r, part=part: of_choose(r) == (part == 'choose'))
    for name in dict.fromkeys(names):
        tabulate(name)
    runs.write_summary()


if __name__ == '__main__':
    main()
