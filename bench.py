"""
Measure time, memory and error of variants. Each variant runs in a fresh process; ratios are to a baseline of the same run.

    python bench.py stats bignet half lora int4 qlora          # parameters, bytes and peak memory of BigNet's compressed forms
    python bench.py compare half lora int4 qlora               # differences of their outputs from the full-precision ones
    python bench.py fit lora qlora --seeds=1,2,3               # a small training loop; exit status 1 if it does not learn
    python bench.py layers                                     # bits, error and time of every kind of layer, and of nn.Linear
    python bench.py train                                      # a training step of each kind in fp32 and bf16; 2 minutes
    python bench.py train --gpt2 --device=cuda --compile       # GPT-2 124M at 1,024 tokens on a GPU
    python bench.py train --model=bitnet                       # the model of train_bitnet.py and its full-precision twin
    python bench.py train --fineweb95m --device=cuda --compile # the same in the shape of config/fineweb95m.py
    python bench.py optim                                      # a step and a refresh of low-rank optimizers, GPT-2's blocks
    python bench.py optim-bytes                                # optimizer bytes and peak memory of DistilBERT, by rank
    python bench.py finetune                                   # DistilBERT: a training step of full, LoRA, low-rank Adam
    python bench.py conv                                       # train_cnn.py's layers, and Conv2d with BatchNorm2d
    python bench.py decode --shape=0.68B                       # tokens/s of random models, engine/ against torch
    python bench.py decode --shape=0.68B --llama=FOLDER        # and against llama.cpp, whose shared libraries are there
    python bench.py decode --models=out/pycode_bin             # a trained model
    python bench.py gpu                                        # all of it on one GPU; first data/pycode/prepare.py
    python bench.py bundle nanobit.zip                         # the sources as a zip, byte for byte the same each time

stats and compare also take a checkpoint or a Hugging Face folder instead of bignet. --json=PATH appends the rows to a file as
JSON lines; `python plot.py bars PATH` draws them.
"""
import argparse
import hashlib
import json
import os
import sys
import zipfile
from pathlib import Path

import torch

import configurator
import optim
import sample
from common import atomic_write
from engine import load
from measure import convolutions, decode, forms, gpu, matrices, optimizers, steps

BUNDLED = ('*.py', '*.c', '*.md', '*.txt', '*.toml', 'LICENSE', 'Makefile', 'readers/*.py', 'pretrained/*.py', 'report/*.py',
           'measure/*.py', 'engine/*', 'config/*.py', 'data/*/prepare.py', 'tests/*.py', 'tests/*.c', 'tests/old/**/*',
           'results/*')


def bundle(a):
    """Zip the sources with a manifest of checksums; the same sources give the same bytes."""
    root = Path(__file__).resolve().parent
    files = {p.relative_to(root).as_posix(): p.read_bytes() for glob in BUNDLED for p in root.glob(glob) if p.is_file()}
    lines = [f'{hashlib.sha256(data).hexdigest()}  {name}\n' for name, data in sorted(files.items())]
    files['MANIFEST.sha256'] = ''.join(lines).encode()

    def write(tmp):
        with zipfile.ZipFile(tmp, 'w', zipfile.ZIP_STORED) as z:        # stored: compressed bytes differ by zlib version
            for name, data in sorted(files.items()):
                entry = zipfile.ZipInfo(f'nanobit/{name}', (1980, 1, 1, 0, 0, 0))
                entry.create_system, entry.external_attr = 3, 0o644 << 16
                z.writestr(entry, data)
    try:
        atomic_write(a.path, write)
    except OSError as e:
        configurator.fail(f'{e}; type another path')
    print(f'{a.path}: {len(files)} files, {os.path.getsize(a.path):,} bytes, sha256 '
          f'{hashlib.sha256(Path(a.path).read_bytes()).hexdigest()}')
    print('to check it, unpack it and type: sha256sum -c MANIFEST.sha256')


# The generators that run in the fresh processes. measure/ imports no tool, so it gets the models as arguments.
WORKERS = {'stats': lambda a: forms.stats_worker(a, trained), 'compare': lambda a: forms.compare_worker(a, trained),
           'fit': forms.fit_worker, 'layers': matrices.layers_worker, 'train': lambda a: steps.train_worker(a, load.MODELS),
           'optim': optimizers.optim_worker, 'optim_bytes': optimizers.optim_bytes_worker,
           'finetune': optimizers.finetune_worker, 'finetune_memory': optimizers.finetune_memory_worker,
           'conv': convolutions.conv_worker,
           'decode': lambda a: decode.decode_worker(a, sample.generate)}


def trained(path):
    """Load the language model of a run's folder or of one of its files."""
    try:
        return load.load(path)[0]
    except ValueError as e:
        configurator.fail(str(e))


def worker(a):
    """Measure one variant in this process: answer each line on stdin by a line of JSON on stdout."""
    a = argparse.Namespace(**json.loads(a.job))
    torch.set_num_threads(a.threads)
    torch.set_float32_matmul_precision('high' if a.bench == 'train' else 'highest')    # no TF32 where errors count
    for answer in WORKERS[a.bench](a):
        print(json.dumps(answer), flush=True)


class Parser(argparse.ArgumentParser):
    def error(self, message):                       # in one line, like all other mistakes
        configurator.fail(f'{message}; type {self.prog} --help')


def main():
    if sys.argv[1:2] == ['worker']:
        return worker(argparse.Namespace(job=sys.argv[2]))
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar='command')

    def command(name, run, **numbers):
        p = commands.add_parser(name, help=run.__doc__.split('\n')[0])
        p.set_defaults(run=run)
        for key, default in numbers.items():
            p.add_argument(f'--{key}', type=type(default), default=default)
        if run is not bundle:
            p.add_argument('--device', default='cpu', choices=('cpu', 'cuda'))
            p.add_argument('--threads', type=int, default=torch.get_num_threads())
            p.add_argument('--json', default='', metavar='PATH', help='append the rows to this file as JSON lines')
        return p
    shape = dict(rank=32, alpha=32.0, dim=1024)
    stats = command('stats', forms.stats, **shape, batch=32, seed=0)
    compare = command('compare', forms.compare, **shape, batch=32, seed=0)
    fit = command('fit', forms.fit, **shape, batch=100, steps=200, lr=1e-3)
    for p in (stats, compare, fit):
        p.add_argument('names', nargs='+', metavar='form', help=f'bignet, a checkpoint or one of {", ".join(forms.FORMS)}')
    fit.add_argument('--seeds', default='1', help='e.g. 1,2,3')
    p = command('layers', matrices.every_layer, rounds=7, seconds=0.2)
    p.add_argument('--kinds', default='', help='default: all')
    p.add_argument('--shapes', default='1x1024x1024,32x1024x1024,512x1024x1024', help='tokens x in x out, ...')
    p.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'), help='dtype of the inputs')
    p = command('train', steps.train, n_layer=6, n_head=4, n_kv_head=2, n_embd=256, n_ff=768, block_size=256, vocab_size=256,
                batch_size=16, rounds=7, steps=3)
    p.add_argument('--model', default='gpt', choices=tuple(steps.KINDS))
    p.add_argument('--compile', action='store_true')
    p.add_argument('--optimizer', default='adamw', choices=optim.NAMES)
    p.add_argument('--kinds', default='', help='e.g. fp,bin,bin+ramp; default: plain,fp,bin,tern,int4, or fp,tern of bitnet')
    p.add_argument('--binary_blocks', default='', metavar='2,3',
                   help='only these blocks of gpt have the low-bit kind; default: all')
    p.add_argument('--output_gains', action='store_true', help='as in train_gpt.py: ternary layers have learned factors')
    p.add_argument('--dtypes', default='float32,bfloat16')
    p.add_argument('--gpt2', action='store_true', help='the shape of GPT-2 124M at 1,024 tokens')
    p.add_argument('--fineweb95m', action='store_true', help='the shape of config/fineweb95m.py')
    p = command('optim', optimizers.optim, dim=768, layers=12, rounds=5, steps=5)
    p.add_argument('--ranks', default='16,128')
    shape = dict(dim=768, layers=6, batch=16, tokens=128)
    bytes_ = command('optim-bytes', optimizers.optim_bytes, **shape)
    tune = command('finetune', optimizers.finetune, **shape, rank=16, rounds=5, steps=2)
    bytes_.add_argument('--ranks', default='4,8,16,64,128')
    for p in (bytes_, tune):
        p.add_argument('--attention', default='sdpa', choices=('sdpa', 'eager'), help='attention of transformers')
    tune.add_argument('--variants', default=','.join(optimizers.FINETUNES), help='default: all')
    p = command('conv', convolutions.conv, batch=64, image_size=64, rounds=7, steps=2)
    p.add_argument('--compile', action='store_true')
    p.add_argument('--variants', default=','.join(convolutions.CONVS), help='default: all')
    p.add_argument('--dtypes', default='float32,bfloat16')
    p = command('decode', decode.decode, tokens=32, rounds=5, torch=3, seconds=5.0)
    p.add_argument('--models', default='tern,bin,int4', help=f'{", ".join(decode.KINDS)} or runs, e.g. tern,out/pycode_bin')
    p.add_argument('--shape', default='0.68B', choices=tuple(decode.SHAPES), help='size of the random models')
    p.add_argument('--heads', default='int8', help='head:inputs of the engine, e.g. int8,fp,int8:int8')
    p.add_argument('--threads_of', default='1,2', metavar='1,2', help='numbers of threads to measure, instead of --threads')
    p.add_argument('--prefill', default='128,512', metavar='128,512', help='tokens of the prompts')
    p.add_argument('--agree', type=int, default=0, help='only this: prompts whose greedy tokens are compared')
    p.add_argument('--stages', type=int, default=0, help='only this: tokens whose time in engine/ is measured by stage')
    p.add_argument('--llama', default='', metavar='FOLDER', help='shared libraries of llama.cpp')
    p.add_argument('--llama_types', default='', metavar='TQ2_0:F16,...', help='blocks and head; default: as the models')
    p.add_argument('--folder', default='', help='where a temporary folder holds the random models')
    p = command('gpu', gpu.gpu)
    p.set_defaults(device='cuda', json='results/gpu.jsonl')
    p.add_argument('--parts', default='', help=f'default: all of {",".join(gpu.PARTS)}')
    p.add_argument('--dataset', default='pycode', help='tokens for two short trainings')
    p.add_argument('--tiny', action='store_true', help='smallest sizes, to try the command; also with --device=cpu')
    command('bundle', bundle).add_argument('path', help='the zip to write')
    a = parser.parse_args(configurator.at_home(sys.argv[1:]))
    if getattr(a, 'device', '') == 'cuda' and not torch.cuda.is_available():
        configurator.fail('there is no CUDA device here; type --device=cpu')
    for key in ('batch', 'batch_size', 'steps', 'rounds', 'rank', 'dim', 'layers', 'tokens', 'threads'):
        if getattr(a, key, 1) < 1:
            configurator.fail(f'--{key}={getattr(a, key)} must be 1 or more; type another number')
    if getattr(a, 'json', ''):
        try:
            open(a.json, 'a').close()               # fail before hours of measuring, not after
        except OSError as e:
            configurator.fail(f'cannot write {a.json} ({e.strerror}); type another --json=PATH')
    a.run(a)


if __name__ == '__main__':
    main()
