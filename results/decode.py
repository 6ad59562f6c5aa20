"""
Decode and prefill by engine/, torch and llama.cpp: runs bench.py decode, stores results/decode.jsonl and results/decode.md.

    python results/decode.py --llama=FOLDER         # 25 minutes on two idle cores
    python results/decode.py --table                # the page alone, from the stored lines

FOLDER holds llama.cpp's shared libraries, see measure/llama.py. The models of TRAINED must exist: train_gpt.py
config/pycode_bin.py and config/pycode_tern.py, and ptq.py --ckpt=out/pycode_bin --schemes=gptq4 --group=128
--save=out/pycode_g4.safetensors. Each command has its own log in out/bench; one that exists is not measured again. All figures
of the page are computed from the logs. A ratio is the median of the ratios within rounds.
"""
import argparse
import statistics
import subprocess
import sys

import keep
from keep import ROOT, table

TRAINED = ('out/pycode_bin', 'out/pycode_tern', 'out/pycode_g4.safetensors')
COMMANDS = {'small': '--models=out/pycode_bin --heads=int8,fp,int8:int8 --threads_of=1 --prefill=64 --tokens=60 --rounds=9 '
                     '--torch=9',
            '0.68B': '--shape=0.68B --models=tern,bin,int4,int4g128 --heads=int8,int8:int8 --torch=1 '
                     '--llama_types=TQ2_0:F16,TQ2_0:Q8_0,TQ1_0:Q8_0,Q4_0:Q8_0',
            '2.4B': '--shape=2.4B --models=tern,bin,int4g128 --heads=int8,int8:int8 --prefill=128 --tokens=16 --rounds=3 '
                    '--torch=0 --llama_types=TQ2_0:Q8_0,TQ1_0:Q8_0,Q4_0:Q8_0',
            'stages': '--shape=0.68B --models=tern,bin,int4,int4g128 --heads=int8,int8:int8 --stages=64',
            'agree': f'--models={",".join(TRAINED)} --threads_of=1 --agree=200'}
SMALL = TRAINED[0]
TERN, BIN, INT4 = 'tern engine int8', 'bin engine int8', 'int4 engine int8'
BIN8, G128 = 'bin engine int8 inputs int8', 'int4g128 engine int8 inputs int8'
# label, threads, figure, at least, of which row, over which row
RATIOS = [('decode, ternary, 8-bit heads', 1, 'decode', 1.4, TERN, 'llama.cpp TQ2_0 Q8_0'),
          ('decode, ternary, 8-bit heads', 2, 'decode', 1.4, TERN, 'llama.cpp TQ2_0 Q8_0'),
          ('decode, ternary, int8 head and F16 head', 2, 'decode', 1.4, TERN, 'llama.cpp TQ2_0 F16'),
          ('prefill of 512, ternary', 1, 'prefill_512', 2.4, TERN, 'llama.cpp TQ2_0 Q8_0'),
          ('prefill of 512, ternary', 2, 'prefill_512', 2.4, TERN, 'llama.cpp TQ2_0 Q8_0'),
          ('prefill of 512, ternary', 1, 'prefill_512', 4, TERN, 'llama.cpp TQ1_0 Q8_0'),
          ('prefill of 512, ternary', 2, 'prefill_512', 4, TERN, 'llama.cpp TQ1_0 Q8_0'),
          *(row for threads in (1, 2) for row in [
              ('decode, binary', threads, 'decode', 1.5, BIN, TERN),
              ('decode, binary with int8 inputs', threads, 'decode', 1.5, BIN8, TERN),
              ('decode, 4 bits in groups of 16', threads, 'decode', 1.1, INT4, 'llama.cpp Q4_0 Q8_0'),
              ('decode, 4 bits in groups of 128, int8 inputs', threads, 'decode', 1.1, G128, 'llama.cpp Q4_0 Q8_0')])]

FALLS_SHORT = (
    'What falls short. Binary: the table look-ups and the loops with eight fields keep a core busier than its memory, see '
    'the share of read bandwidth and the stages; the head, the attention and the inputs cost as much as in a ternary model. '
    'Tried: int8 inputs (above), huge pages and prefetching (in all rows). 4 bits in groups of 16: an fp32 multiply-add and '
    'a table look-up for each weight keep a core busier than its memory, and a scale for 16 weights is a fifth of the '
    'bytes. So this aim is missed. Tried: int8 inputs, which Q4_0 has too, and groups of 128, another format than the '
    'groups of 32 of Q4_0. Ternary logits: an input at the border of two int8 codes may fall on the other side, and every '
    'later position with it; where a greedy token differs, the two best logits are a tie of at most the given size. The '
    'fastest round of a row is faster than its slowest by {median:.0%} in the median row, by '
    '{most:.0%} at most. The stages were measured at another time, and so were greedy tokens, logits and losses, with '
    'models of the same shape that were trained anew. llama.cpp starts its threads anew for each token, as its library does '
    'without a pool of threads. Small models have a fixed cost in memory.')


def spread(rows):
    """By how much the fastest round of a row is faster than its slowest: the median over rows, and the most."""
    speeds = [[x['decode'] for x in r['rounds'] if x] for r in rows if r.get('rounds')]
    found = [max(s) / min(s) - 1 for s in speeds if len(s) > 1]
    return {'median': statistics.median(found), 'most': max(found)}


def paired(row, base, key):
    """Median over the rounds that both rows have of the ratio of a figure; None if there is none."""
    pairs = zip(row['rounds'], base['rounds'], strict=True) if row and base else ()
    ratios = [r[key] / b[key] for r, b in pairs if r and b and key in r]
    return statistics.median(ratios) if ratios else None


def targets(rows):
    """[{measure, threads, must, measured, reached}]. A target whose runs are not in the log shows a dash."""
    find = lambda name, threads, shape='0.68B': next(
        (r for r in rows if (r['name'], r.get('threads'), r.get('shape')) == (name, threads, shape)), None)

    def line(measure, threads, must, value, shown, reached):
        none = value is None
        return {'measure': measure, 'threads': threads, 'must': must, 'measured': '-' if none else shown(value),
                'reached': '-' if none else 'yes' if reached(value) else '**no**'}
    found = []
    for label, threads, key, least, name, base in RATIOS:
        found.append(line(f'{label}, over {base.removesuffix(" int8").removesuffix(" engine")}', threads, f'≥ {least} ×',
                          paired(find(name, threads), find(base, threads), key), '{:.2f} ×'.format,
                          lambda v, least=least: v >= least))
    tern, small = find(TERN, 2), find(f'{SMALL} engine int8', 1, '')
    engines = [r for r in rows if r['runs'] == 'engine' and r['shape']]
    resident = lambda r: r['resident_bytes'] / (r['file_bytes'] + r['cache_bytes']) if r else None   # after the longest prompt
    worst = max(engines, key=resident, default=None) or {}
    share = lambda r: statistics.median(x['decode'] * r['token_bytes'] / x['read'] for x in r['rounds'])
    return found + [
        line('decode, ternary, share of the measured read bandwidth', 2, '≥ 85%', tern and share(tern), '{:.0%}'.format,
             lambda v: v >= 0.85),
        line('decode, 1.2M model of config/pycode_bin.py, tokens/s', 1, '≥ 5,000', small and small['decode'], '{:,.0f}'.format,
             lambda v: v >= 5000),
        *(line(f'greedy tokens as torch\'s, exact head, prompts, {r["model"]}', '', 'all', r['same'],
               lambda v, r=r: f'{v} of {r["prompts"]}' + f', ties up to {max(r["ties"], default=0):.0e}' * bool(r['ties']),
               lambda v, r=r: v == r['prompts']) for r in rows if r['runs'] == 'agree'),
        *(line(f'logits, exact head: difference from torch\'s over their spread, {r["model"]}', '', '≤ 1e-4',
               r['logits_difference'], '{:.0e}'.format, lambda v: v <= 1e-4) for r in rows if r['runs'] == 'agree'),
        line('resident memory after the longest prompt over packed file and cache, the most of the random models',
             worst.get('threads', ''), '≤ 1.15 ×', resident(worst), '{:.2f} ×'.format, lambda v: v <= 1.15)]


def lines_of(rows):
    """Markdown lines of the page."""
    speeds, losses = [r for r in rows if r['runs'] not in ('agree', 'stages')], [r for r in rows if r.get('losses')]
    stages = [r for r in rows if r['runs'] == 'stages']
    number = lambda key, spec, scale=1: lambda r: '-' if r.get(key) is None else format(r[key] / scale, spec)
    columns = {'model': lambda r: f'{r["shape"]} {r["name"]}'.strip(), 'threads': '{threads}',
               'decode': number('decode', ',.1f'), 'prefill 64': number('prefill_64', ',.0f'),
               'prefill 128': number('prefill_128', ',.0f'), 'prefill 512': number('prefill_512', ',.0f'),
               'MB a token': number('token_bytes', ',.1f', 1e6),
               'of read bandwidth': number('share', '.0%'), 'MB after loading': number('loaded_bytes', ',.0f', 1e6),
               '× file + cache': number('resident_ratio', '.2f')}
    about = ', '.join(dict.fromkeys(r['about'] for r in speeds if r.get('about')))
    read = {n: statistics.median(r['read'] for r in speeds if r['threads'] == n) / 1e9 for n in (1, 2)
            if any(r['threads'] == n for r in speeds)}
    read = ', '.join(f'{v:.1f} GB/s on {n} thread{"s" * (n > 1)}' for n, v in read.items())
    r = rows[-1]
    return [f'`python results/decode.py`: {r["device"]}, torch {r["torch"]}; tokens/s, medians over rounds in turns; ratios '
            f'are medians of ratios within rounds. Read bandwidth: {read}, a matrix of 512 MB '
            'times a vector in torch. A smaller model that lies in the last cache can exceed it.', '',
            *table({'target': '{measure}', 'threads': '{threads}', 'must': '{must}', 'measured': '{measured}',
                    'reached': '{reached}'}, targets(rows)), '',
            FALLS_SHORT.format(**spread(rows)), '',
            'Random models, but for the trained one; 0.68B: 24 layers, 1536 wide, vocabulary 32,000; 2.4B: the shape of '
            f'BitNet b1.58 2B4T. bin and int4 are GPTs, tern is a BitNet. llama.cpp: {about}.', '', *table(columns, speeds), '',
            'Milliseconds of a token by stage, 0.68B, the waiting of the first thread included:', '',
            *table({'model': '{name}', 'threads': '{threads}', **{s: f'{{ms[{s}]:.2f}}' for s in stages[0]['ms']},
                    'whole': '{of:.2f}'}, stages), '',
            'Loss of trained models, nats per token, 64 windows of the validation split:', '',
            *table({'model': '{model}', **{name: f'{{losses[{name}]:.4f}}' for name in losses[0]['losses']}}, losses)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--llama', default='', metavar='FOLDER', help='shared libraries of llama.cpp')
    parser.add_argument('--table', action='store_true', help='run nothing')
    a = parser.parse_args()
    if not a.table:
        if not a.llama or not all((ROOT / run).exists() for run in TRAINED):
            sys.exit(f'error: this compares with llama.cpp and runs {", ".join(TRAINED)}; train them and type: '
                     'python results/decode.py --llama=FOLDER')
        logs = {name: ROOT / 'out' / 'bench' / f'decode_{name}.jsonl' for name in COMMANDS}
        for name, command in COMMANDS.items():
            if not logs[name].exists():
                logs[name].parent.mkdir(parents=True, exist_ok=True)
                llama = [f'--llama={a.llama}'] if '--llama_types' in command else []
                words = *command.split(), *llama, f'--json={logs[name]}'
                subprocess.run([sys.executable, 'bench.py', 'decode', *words], cwd=ROOT, check=True)
        keep.write('decode.jsonl', ''.join(log.read_text() for log in logs.values()))
    rows = keep.read('decode') or sys.exit('error: no results/decode.jsonl; type: python results/decode.py --llama=FOLDER')
    keep.publish('decode', lines_of(rows))


if __name__ == '__main__':
    main()
