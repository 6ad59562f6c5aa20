"""
Draw pictures of training runs and of rows of bench.py, or print how far a run is.

    python plot.py loss RUN...                training and validation loss; runs that differ in the seed alone are one line
    python plot.py status out/a --watch       how far a run is, how fast, how long it still takes
    python plot.py bars results/stats.jsonl   a bar for each row that bench.py --json wrote -> results/stats.png
    python plot.py diagnostics RUN...         ternary codes, flips, dead rows, scales (train_bitnet.py), of one run by kind

Of runs of finetune_cls.py with one task and one model; a RUN is the folder of a run or a folder above several (out/sweep):

    python plot.py ranks RUN...               evaluation and training loss at the last epoch against rank
    python plot.py memory RUN...              parts of the peak memory of training, a bar for each run
    python plot.py optimizer RUN...           bytes of optimizer state against rank, beside AdamW's
    python plot.py pareto RUN...              accuracy against peak memory, labelled with the ranks

Each writes COMMAND.png into the first folder typed. plot.py never imports torch, and imports matplotlib only to draw, so that
`status` answers at once on a busy machine.
"""
import argparse
import json
import math
import os
import statistics
import sys
import time

from configurator import at_home, fail
from report import plot_cls
from report.figure import load_config, load_log, load_logs, measured, save
from report.plot_runs import diagnosed, draw_bars, draw_diagnostics, draw_loss


def save_picture(args, fig, what):
    """Write a picture of runs to --out or into the first run folder."""
    save(fig, args.out or os.path.join(args.runs[0], f'{args.name}.png'), what)


def loss(args):
    if args.smooth < 0:
        fail(f'--smooth={args.smooth} is not a number of records; type --smooth=1 for the raw curve')
    logs = load_logs(args.runs, lambda records: measured(records, 'loss') + measured(records, 'val_loss'),
                     'has neither loss nor val_loss; type a run that has logged one')
    save_picture(args, *draw_loss(logs, args.smooth))


def diagnostics(args):
    save_picture(args, *draw_diagnostics(load_logs(args.runs, diagnosed, 'has no figures of ternary matrices; type a run of '
                                                   'train_bitnet.py with quant=tern that has reached diag_interval steps')))


def draw_runs(args):
    save_picture(args, *getattr(plot_cls, f'draw_{args.name}')(plot_cls.load_runs(args.runs)))


# -----------------------------------------------------------------------------
# bars

# The number that a bar shows, by bench.py command, unless --value names another.
VALUES = {'stats': 'actual_bytes', 'compare': 'relative', 'fit': 'loss', 'layers': 'forward_ms', 'train': 'ms',
          'finetune': 'ms', 'conv': 'net_ms', 'optim_bytes': 'optimizer_bytes'}


def bars(args):
    try:
        with open(args.rows, encoding='utf-8') as f:
            every = [json.loads(line) for line in f if line.strip()]
    except (OSError, ValueError) as e:
        fail(f'cannot read {args.rows} ({e}); type the file that bench.py wrote with --json=...')
    if not every or not all(isinstance(r, dict) and 'bench' in r for r in every):
        fail(f'{args.rows} holds no rows of bench.py; type the file that bench.py wrote with --json=...')
    bench = every[0]['bench']
    value = args.value or VALUES.get(bench, '')
    rows = [r for r in every if r['bench'] == bench or (args.value and args.value in r)]
    rows = [r for r in rows if value not in r or r[value] is not None]      # null: not measured
    missing = [r for r in rows if not isinstance(r.get(value), (int, float))]
    if missing or not rows:
        numbers = sorted(k for k, v in (missing or every)[0].items() if isinstance(v, (int, float)) and not isinstance(v, bool))
        fail(f'{args.rows} has rows without a number {value!r}; type --value= and one of {", ".join(numbers)}')
    fig, n = draw_bars(rows, value)
    save(fig, args.out or os.path.splitext(args.rows)[0] + '.png', f'{value} of {n} of {len(every)} rows')


# -----------------------------------------------------------------------------
# status


def duration(s):
    """Seconds as text in their two largest units."""
    s = max(0, round(s))
    m, h, d = s // 60, s // 3600, s // 86400
    return f'{d} d {h % 24:02d} h' if d else f'{h} h {m % 60:02d} min' if h else f'{m} min {s % 60:02d} s' if m else f'{s} s'


def status_text(run, now):
    """Run folder, unix time -> (text of the screen, whether the run is finished)."""
    records, damaged = load_log(run)
    of_epochs = [r['max_iters'] for r in records if 'max_iters' in r]  # of runs whose length is in epochs
    max_iters = load_config(run).get('max_iters') or (of_epochs[-1] if of_epochs else None)
    step = max(r['step'] for r in records)
    age = max(0, now - os.path.getmtime(os.path.join(run, 'log.jsonl')))  # records hold no time, but the file does
    train = [r for r in records if r.get('loss') is not None]  # nan is shown
    val = measured(records, 'val_loss')
    # The median of the last 20 records: a step that compiles, evaluates or saves does not change the forecast.
    ms, *per_s = (statistics.median([r[key] for r in measured(records, key)[-20:]] or [math.nan])
                  for key in ('ms', 'tokens_per_s', 'samples_per_s'))
    finished = max_iters is not None and step >= max_iters
    steps = sorted({r['step'] for r in train} or {step})[-2:]  # of training alone, as other records have other intervals
    gap_s = (steps[-1] - steps[0]) * ms / 1000
    late = not finished and age > max(60, 5 * gap_s if math.isfinite(gap_s) else 0)  # five missed records, at least a minute

    lines = [('run', run), ('step', f'{step} of {max_iters} ({step / max(1, max_iters):.0%})' if max_iters is not None else
                                    f'{step} (no max_iters in config.py or log.jsonl, so no time left)')]
    if train:
        lines.append(('loss', f"{train[-1]['loss']:.4f} at step {train[-1]['step']}"))
    if val:
        best = min(val, key=lambda r: r['val_loss'])
        lines.append(('val loss', f"last {val[-1]['val_loss']:.4f} at step {val[-1]['step']}, "
                                  f"best {best['val_loss']:.4f} at step {best['step']}"))
    speed = [f'{n:,.0f} {what}/s' for n, what in zip(per_s, ('tokens', 'samples'), strict=True) if math.isfinite(n)]
    speed += [f'{ms:,.1f} ms/step'] * math.isfinite(ms)
    lines.append(('speed', ', '.join(speed) or 'not measured yet'))
    if max_iters is not None and not finished and math.isfinite(ms):
        lines.append(('time left', f'{duration((max_iters - step) * ms / 1000)} (evaluation not counted)'))
    lines.append(('state', f'no new record for {age / 60:.0f} min: stopped, or in a long evaluation' if late else
                  f"{'finished' if finished else 'running'}, last record {duration(age)} ago"))
    if damaged:
        lines.append(('log.jsonl', f'{damaged} damaged line(s) skipped'))
    checkpoints = sorted(name for name in os.listdir(run) if name.endswith('.pt'))
    for name in checkpoints:
        try:
            stat = os.stat(os.path.join(run, name))
        except FileNotFoundError:
            continue  # the trainer has renamed it meanwhile
        lines.append((name, f'{stat.st_size / 1e6:,.1f} MB, {duration(now - stat.st_mtime)} ago'))
    if not checkpoints:
        lines.append(('checkpoint', 'none yet'))
    return '\n'.join(f'{name:<13} {text}' for name, text in lines), finished


def status(args):
    if not 0 < args.interval < 86400:
        fail(f'--interval={args.interval} is not a pause in seconds; type --interval=2')
    finished = False
    try:
        while not finished:
            text, finished = status_text(args.run, time.time())
            if args.watch and sys.stdout.isatty():
                print('\x1b[2J\x1b[H', end='')  # clear the screen and redraw it
            print(text, flush=True)
            if not args.watch:
                break
            if not finished:
                time.sleep(args.interval)
    except KeyboardInterrupt:
        pass  # Ctrl-C ends --watch


# -----------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):  # in one line, like every mistake
        fail(f'{message}; type {self.prog} --help')


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar='command')

    def command(name, run_command, text, typed, metavar, out='', **how):
        p = commands.add_parser(name, help=text)
        p.add_argument(typed, metavar=metavar, **how)
        if out:
            p.add_argument('--out', metavar='PNG', help=f'default: {out}')
        p.set_defaults(run_command=run_command, name=name)
        return p

    p = command('loss', loss, 'training and validation loss of runs, as a picture', 'runs', 'RUN',
                'loss.png in the first run folder', nargs='+', help='folder of a run; seeds of one variant become one line')
    p.add_argument('--smooth', type=int, default=0, metavar='N',
                   help='training records in the running mean; 1: raw; default: a fiftieth of the run')
    p = command('status', status, 'how far a run is, how fast, how long it still takes', 'run', 'RUN')
    p.add_argument('--watch', action='store_true', help='redraw until the run is finished or Ctrl-C')
    p.add_argument('--interval', type=float, default=2.0, metavar='S', help='seconds between redraws')
    p = command('bars', bars, 'a bar for each row that bench.py --json wrote, as a picture', 'rows', 'PATH.jsonl',
                'beside the rows')
    p.add_argument('--value', default='', help='a number of the rows, e.g. error, forward_ratio, backward_bytes')
    command('diagnostics', diagnostics, 'ternary codes of runs of train_bitnet.py, as a picture', 'runs', 'RUN',
            'diagnostics.png in the first run folder', nargs='+', help='one: by kind of matrix; several: overall')
    for name, text in (('ranks', 'loss at the last epoch against rank'), ('memory', 'parts of the peak memory of runs'),
                       ('optimizer', 'bytes of optimizer state against rank'), ('pareto', 'accuracy against memory')):
        command(name, draw_runs, f'{text}, as a picture', 'runs', 'RUN', f'{name}.png in the first folder typed', nargs='+',
                help='folder of a run of finetune_cls.py, or a folder above several')
    args = parser.parse_args(at_home(sys.argv[1:]))
    args.run_command(args)


if __name__ == '__main__':
    main()
