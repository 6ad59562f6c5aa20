"""
Do exported files compute what was trained? Exports two models, verifies every file, stores results/export.jsonl and .md.

    python results/export.py --llama=FOLDER         # trains the two models first, where their folders are missing
    python results/export.py --public               # only a random model of the shape of BitNet b1.58 2B4T
    python results/export.py --table                # the page alone, from the stored lines

FOLDER holds llama.cpp's shared libraries, see measure/llama.py; transformers comes with `make peers`. Data first:
python data/tinystories/prepare.py, with --file where there is no network, and python data/pycode/prepare.py. A run folder of
TRAINED that exists is not trained again, and a file whose lines are in out/bench/export.jsonl is not verified again.
"""
import argparse
import collections
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import keep
from keep import ROOT, number, table

TRAINED = {'out/tinystories_silu': 'train_bitnet.py config/tinystories_small.py --act=silu --optimizer=adamw --ramp=0.0 '
                                 '--learning_rate=2e-3 --schedule=two_stage --dtype=float32 --compile=False',
           'out/pycode_fp': 'train_gpt.py config/pycode_fp.py'}
# file: (run, options of export.py)
FILES = {'tinystories_TQ2_0.gguf': ('out/tinystories_silu', '--to=gguf --head=Q8_0'),
         'tinystories_TQ2_0_F16.gguf': ('out/tinystories_silu', '--to=gguf'),
         'tinystories_TQ1_0.gguf': ('out/tinystories_silu', '--to=gguf --type=TQ1_0 --head=Q8_0'),
         'tinystories_packed': ('out/tinystories_silu', '--to=hf --type=packed'),
         'tinystories_bitlinear': ('out/tinystories_silu', '--to=hf --type=bitlinear'),
         'tinystories_fp32': ('out/tinystories_silu', '--to=hf --type=fp32'),
         'pycode_F16.gguf': ('out/pycode_fp', '--to=gguf'),
         'pycode_Q8_0.gguf': ('out/pycode_fp', '--to=gguf --type=Q8_0 --head=Q8_0'),
         'pycode_fp32': ('out/pycode_fp', '--to=hf')}
LOG = ROOT / 'out' / 'bench' / 'export.jsonl'
PUBLIC = 'out/bench/bitnet_2b'
SHAPE = {'hidden_size': 2560, 'intermediate_size': 6912, 'num_hidden_layers': 30, 'num_attention_heads': 20,
         'num_key_value_heads': 5, 'vocab_size': 128_256, 'hidden_act': 'relu2', 'max_position_embeddings': 4096,
         'rms_norm_eps': 1e-5, 'rope_theta': 500_000.0, 'tie_word_embeddings': True, 'bos_token_id': 0, 'eos_token_id': 0}
TOLD = ('A random model of the shape of BitNet b1.58 2B4T, packed as its folder ({gb:.2f} GB): the engine loads it in '
        '{load_s:.0f} s, is {resident:.2f} GB resident and makes {tokens_per_s:.2f} tokens/s on one thread. transformers needs '
        '{transformers_load_s:.0f} s to load it. Of the {new_tokens} greedy tokens of both, the first '
        '{greedy_before_a_difference} are the same. After the same tokens, both have the same most likely token {engine[same]} '
        'of {new_tokens} times, and transformers has the same at once as token by token {itself[same]} times. The largest '
        'difference of a logit is {engine[max]:.2f} and {itself[max]:.2f}; the logits have a deviation of {deviation:.2f}.')
WORDS, NEW = 'The cat sat on the mat, and the dog', 16


def write_public(out):
    """A folder of the shape of microsoft/bitnet-b1.58-2B-4T, packed as there: random codes, scales and norms in bf16."""
    import torch
    from safetensors.torch import save_file

    from pretrained import hf
    from readers import tokens
    g, c = torch.Generator().manual_seed(0), SHAPE['hidden_size']
    fours = (torch.cartesian_prod(*[torch.arange(3)] * 4) @ torch.tensor([1, 4, 16, 64])).byte()
    state = {'model.embed_tokens.weight': (torch.randn(SHAPE['vocab_size'], c, generator=g) * 0.02).bfloat16(),
             'model.norm.weight': torch.ones(c).bfloat16()}
    shape = SimpleNamespace(n_layer=SHAPE['num_hidden_layers'], n_embd=c, n_ff=SHAPE['intermediate_size'],
                            n_head=SHAPE['num_attention_heads'], n_kv_head=SHAPE['num_key_value_heads'])
    for _, norm, parts in hf.bitnet_layers(shape):
        for part, (rows, columns) in parts.items():
            state[f'{part}.weight'] = fours[torch.randint(81, (rows // 4, columns), generator=g)]
            state[f'{part}.weight_scale'] = torch.tensor([1.2 * columns ** -0.5]).bfloat16()
        state[f'{norm}.weight'] = (torch.rand(columns, generator=g) + 0.5).bfloat16()
    out.mkdir(parents=True)
    save_file(state, out / 'model.safetensors', {'format': 'pt'})
    (out / 'tokenizer.json').write_text(tokens.train_bpe([f'{WORDS} sat on the log.'] * 9, 278).text)
    how = {'quant_method': 'bitnet', 'linear_class': 'autobitlinear', 'quantization_mode': 'offline'}
    (out / 'config.json').write_text(json.dumps(SHAPE | {
        'architectures': ['BitNetForCausalLM'], 'model_type': 'bitnet', 'torch_dtype': 'bfloat16', 'quantization_config': how}))


def public():
    """The engine's greedy tokens of that folder, and which of them transformers finds most likely after the same tokens, at
    once and token by token with its cache: a line of the log."""
    import torch

    from engine import load
    from pretrained import folders
    torch.set_num_threads(1)
    if not (ROOT / PUBLIC).exists():
        write_public(ROOT / PUBLIC)
    clock = time.perf_counter()
    engine, tokenizer, _ = load.engine(PUBLIC, head='fp', threads=1)
    row = {'file': PUBLIC, 'load_s': time.perf_counter() - clock,
           'bytes': sum(p.stat().st_size for p in (ROOT / PUBLIC).iterdir())}
    ids = tokenizer.encode(WORDS).tolist()
    at, new = [], []
    for token in engine.generate(torch.tensor([ids]), NEW, SHAPE['vocab_size'], temperature=0):
        new.append(token.item())
        at.append(time.perf_counter())
    resident = int(next(x for x in open('/proc/self/status') if x.startswith('VmRSS')).split()[1]) * 1024
    row |= {'new_tokens': NEW, 'tokens_per_s': (NEW - 1) / (at[-1] - at[0]), 'resident_bytes': resident}
    whole = torch.tensor([ids + new])
    ours = torch.stack([engine(whole[:, :n])[0, 0].clone() for n in range(len(ids), whole.shape[1])])
    del engine
    clock = time.perf_counter()
    net = folders.model_of(PUBLIC)
    row['transformers_load_s'] = time.perf_counter() - clock
    with torch.no_grad(), torch.compiler.set_stance('force_eager'):    # transformers compiles the rounding
        once, steps, cache = net(whole).logits[0, len(ids) - 1:-1], [], {}
        for part in whole[:, :-1].split([len(ids), *[1] * (NEW - 1)], 1):
            result = net(part, use_cache=True, **cache)
            key = 'cache' if getattr(result, 'cache', None) is not None else 'past_key_values'
            cache = {key: result[key]}
            steps.append(result.logits[0, -1])
    steps = torch.stack(steps)
    for name, a, b in (('engine', ours, steps), ('itself', once, steps)):
        row[name] = {'same': (a.argmax(-1) == b.argmax(-1)).sum().item(), 'max': (a - b).abs().max().item()}
    row |= {'deviation': steps.std().item(), 'greedy_before_a_difference': next(
        (i for i, (a, b) in enumerate(zip(new, steps.argmax(-1).tolist(), strict=True)) if a != b), NEW)}
    return row


def lines_of(rows):
    """Markdown lines of the page."""
    shape, rows = [r for r in rows if r['file'] == PUBLIC], [r for r in rows if r['file'] != PUBLIC]
    files = {r['file'].rpartition('/')[2]: r for r in rows}
    missing, r = FILES.keys() - files, rows[0]
    same = collections.Counter(r['arrow'] for r in rows if r['max'] == 0)
    columns = {'file': lambda r: r['file'].rpartition('/')[2], 'arrow': '{arrow}', 'MB': number('bytes', '.2f', 1e6),
               'max difference of a logit': '{max:.1e}', 'loss': '{loss:.5f}', 'dloss': '{delta:+.5f}',
               'same next token': '{same:.2%}', 'logits within 1e-4': '{close:.1%}',
               'same continuation': lambda r: f'{r["continued"]} of {r["windows"]}' if 'continued' in r else '-',
               'tokens/s': number('speed', ',.0f')}
    llama = [f for f in files.values() if 'tokenized_alike' in f]
    about = ', '.join(dict.fromkeys(f['llama_cpp'] for f in llama))
    return [f'`python results/export.py`: {r["windows"]} windows of the validation split; loss in nats per token; same '
            f'continuation: prompts of half a window that a side continues greedily by the {r["new_tokens"]} tokens of torch; '
            f'tokens/s: one sequence after its prompt, {r["threads"]} thread, all sides of a file in turns, median. Every '
            'tensor of every file equals that of a second export, bit for bit. Arrows without any difference are left out: '
            + ', '.join(f'{n} of {arrow}' for arrow, n in same.items()) + '. Tokenized by llama.cpp as here: '
            + ', '.join(f'{f["tokenized_alike"]} of {f["windows"]} ({name})' for name, f in files.items() if f in llama)
            + f'. llama.cpp: {about}.', *([f'Missing: {", ".join(sorted(missing))}.'] if missing else []), '',
            *(f'`{words}` trained {run.rpartition("/")[2]}.' for run, words in TRAINED.items()),
            'Files: ' + '; '.join(f'{name}: `{options}`' for name, (_, options) in FILES.items()) + '.', '',
            *table(columns, [r for r in rows if r['max'] > 0]),
            *(line for r in shape for line in ('', TOLD.format(**r, gb=r['bytes'] / 1e9, resident=r['resident_bytes'] / 1e9)))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--llama', default='', metavar='FOLDER', help='shared libraries of llama.cpp')
    parser.add_argument('--public', action='store_true', help='only the random model of a public shape')
    parser.add_argument('--table', action='store_true', help='run nothing')
    a = parser.parse_args()
    if a.public:
        row = public()
        keep.replace('export', [row], lambda r: r['file'] == PUBLIC)
    elif not a.table:
        if not a.llama:
            sys.exit('error: this compares with llama.cpp; type: python results/export.py --llama=FOLDER')
        call = lambda *words: subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
        LOG.parent.mkdir(parents=True, exist_ok=True)
        done = {json.loads(line)['file'] for line in LOG.read_text().splitlines()} if LOG.exists() else ()
        for name, (run, options) in FILES.items():
            path = f'out/bench/{name}'
            if path in done:
                continue
            if not (ROOT / run / 'best.pt').exists():
                call(*TRAINED[run].split(), f'--out_dir={run}', '--resume=auto')
            if not (ROOT / path).exists():
                call('export.py', f'--ckpt={run}', f'--out={path}', *options.split())
            llama = [f'--llama={a.llama}'] if name.endswith('.gguf') else []
            call('export.py', f'--ckpt={run}', f'--verify={path}', f'--json={LOG}', *llama)
        rows = [json.loads(line) for line in LOG.read_text().splitlines()]
        keep.replace('export', rows, lambda r: r['file'] != PUBLIC)
    rows = keep.read('export') or sys.exit('error: no results/export.jsonl; type: python results/export.py --llama=FOLDER')
    keep.publish('export', lines_of(rows))


if __name__ == '__main__':
    main()
