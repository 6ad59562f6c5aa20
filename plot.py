"""
Draw what runs logged and benches measured: run folders or a file of rows to one picture or one screen of text.

    python plot.py loss out/a out/b           training and validation loss of one or more runs -> out/a/loss.png
    python plot.py status out/a --watch       how far a run is, how fast, how long it still takes
    python plot.py bars results/stats.jsonl   a bar for each row that bench.py --json wrote -> results/stats.png

Of train_bitnet.py; a RUN is the folder of a run:

    python plot.py diagnostics RUN...         ternary codes, flips, dead rows, scales: one run by kind of matrix, or several

Of finetune_cls.py, one task and model at a time; a RUN is the folder of a run or one above a sweep of them (out/sweep):

    python plot.py ranks RUN...               evaluation and training loss at the last epoch against rank
    python plot.py memory RUN...              what the peak memory of training is made of, a bar for each run
    python plot.py optimizer RUN...           bytes of optimizer state against rank, beside AdamW's
    python plot.py pareto RUN...              accuracy against peak memory, labelled with the ranks

Each writes COMMAND.png into the first folder typed.

No torch here, and matplotlib is only imported to draw: `status` answers at once, also on a machine busy training.
"""
import argparse
import json
import math
import os
import statistics
import sys
import time

from configurator import fail
from report import plot_cls
from report.figure import load_config, load_log, load_logs, measured, save
from report.plot_runs import diagnosed, draw_bars, draw_diagnostics, draw_loss


def loss(args):
    if args.smooth < 0:
        fail(f'--smooth={args.smooth} is no number of records; type --smooth=1 for the raw curve')
    logs = load_logs(args.runs, lambda records: measured(records, 'loss') + measured(records, 'val_loss'),
                     'has neither loss nor val_loss; type a run that has logged one')
    fig, what = draw_loss(logs, args.smooth)
    save(fig, args.out or os.path.join(args.runs[0], 'loss.png'), what)


# -----------------------------------------------------------------------------
# bars

# What a bar is of, by bench.py command, unless --value names another number of the rows.
VALUES = {'stats': 'actual_bytes', 'compare': 'relative', 'fit': 'loss', 'layers': 'forward_ms', 'train': 'ms'}


def load_rows(path):
    """JSON lines of bench.py -> list of dicts; one clear line for a file that holds none."""
    try:
        with open(path, encoding='utf-8') as f:
            rows = [json.loads(line) for line in f if line.strip()]
    except (OSError, ValueError) as e:
        fail(f'cannot read {path} ({e}); type the file that bench.py wrote with --json=...')
    if not rows or not all(isinstance(r, dict) and 'bench' in r for r in rows):
        fail(f'{path} holds no rows of bench.py; type the file that it wrote with --json=...')
    return rows


def bars(args):
    rows = load_rows(args.rows)
    value = args.value or VALUES.get(rows[0]['bench'], '')
    every, rows = rows, [r for r in rows if r['bench'] == rows[0]['bench'] or (args.value and args.value in r)]
    rows = [r for r in rows if value not in r or r[value] is not None]                  # not measured for this one
    if missing := [r for r in rows if not isinstance(r.get(value), (int, float))]:
        numbers = sorted(k for k, v in missing[0].items() if isinstance(v, (int, float)) and not isinstance(v, bool))
        fail(f'{args.rows} has rows without a number {value!r}; type --value= and one of {", ".join(numbers)}')
    fig, n = draw_bars(rows, value)
    save(fig, args.out or os.path.splitext(args.rows)[0] + '.png', f'{value} of {n} of {len(every)} rows')


# -----------------------------------------------------------------------------
# diagnostics, ranks, memory, optimizer, pareto


def diagnostics(args):
    logs = load_logs(args.runs, diagnosed, 'tells of no ternary matrices; type a run of train_bitnet.py with quant=tern that '
                     'has come to diag_interval steps')
    fig, what = draw_diagnostics(logs)
    save(fig, args.out or os.path.join(args.runs[0], 'diagnostics.png'), what)


def draw_runs(args):
    fig, what = getattr(plot_cls, f'draw_{args.name}')(plot_cls.load_runs(args.runs))
    save(fig, args.out or os.path.join(args.runs[0], f'{args.name}.png'), what)


# -----------------------------------------------------------------------------
# status


def duration(s):
    """Seconds as text in the two largest units."""
    s = max(0, round(s))
    if s < 60:
        return f'{s} s'
    if s < 3600:
        return f'{s // 60} min {s % 60:02d} s'
    return f'{s // 3600} h {s % 3600 // 60:02d} min' if s < 86400 else f'{s // 86400} d {s % 86400 // 3600:02d} h'


def status_text(run, now):
    """run folder, unix time -> (the screen, whether the run is finished)."""
    records, damaged = load_log(run)
    of_epochs = [r['max_iters'] for r in records if 'max_iters' in r]  # what a number of epochs comes to
    max_iters = load_config(run).get('max_iters') or (of_epochs[-1] if of_epochs else None)
    step = max(r['step'] for r in records)
    age = max(0, now - os.path.getmtime(os.path.join(run, 'log.jsonl')))  # records carry no clock; the file does
    train = [r for r in records if r.get('loss') is not None]  # nan is shown, not hidden
    val = measured(records, 'val_loss')
    # The median of the last 20 records: a compiling, evaluating or checkpointing step does not bend the forecast.
    ms, *per_s = (statistics.median([r[key] for r in measured(records, key)[-20:]] or [math.nan])
                  for key in ('ms', 'tokens_per_s', 'samples_per_s'))
    finished = max_iters is not None and step >= max_iters
    steps = sorted({r['step'] for r in train} or {step})[-2:]  # of training alone: others come when they please
    gap_s = (steps[-1] - steps[0]) * ms / 1000
    late = age > max(60, 5 * gap_s if math.isfinite(gap_s) else 0)  # five missed records, and never under a minute

    lines = [('run', run)]
    lines.append(('step', f'{step} of {max_iters} ({step / max(1, max_iters):.0%})' if max_iters is not None else
                  f'{step} (no max_iters in config.py or log.jsonl, so no time left)'))
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
    if finished:
        lines.append(('state', f'finished, last record {duration(age)} ago'))
    elif late:
        lines.append(('state', f'no new record for {age / 60:.0f} min: stopped, or in a long evaluation'))
    else:
        lines.append(('state', f'running, last record {duration(age)} ago'))
    if damaged:
        lines.append(('log.jsonl', f'{damaged} damaged line(s) skipped'))
    checkpoints = sorted(name for name in os.listdir(run) if name.endswith('.pt'))
    for name in checkpoints:
        try:
            stat = os.stat(os.path.join(run, name))
        except FileNotFoundError:
            continue  # renamed by the trainer between the two lines
        lines.append((name, f'{stat.st_size / 1e6:,.1f} MB, {duration(now - stat.st_mtime)} ago'))
    if not checkpoints:
        lines.append(('checkpoint', 'none yet'))
    return '\n'.join(f'{name:<13} {text}' for name, text in lines), finished


def status(args):
    if not 0 < args.interval < 86400:
        fail(f'--interval={args.interval} is no pause in seconds; type --interval=2')
    finished = False
    try:
        while not finished:
            text, finished = status_text(args.run, time.time())
            if args.watch and sys.stdout.isatty():
                print('\x1b[2J\x1b[H', end='')  # clear, home: one screen redrawn in place
            print(text, flush=True)
            if not args.watch:
                break
            if not finished:
                time.sleep(args.interval)
    except KeyboardInterrupt:
        pass  # the way out of --watch


# -----------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, like every other mistake
        fail(f'{message}; type {self.prog} --help')


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar='command')
    p = commands.add_parser('loss', help='training and validation loss of runs, as a picture')
    p.add_argument('runs', nargs='+', metavar='out/run')
    p.add_argument('--out', metavar='PNG', help='default: loss.png in the first run folder')
    p.add_argument('--smooth', type=int, default=0, metavar='N',
                   help='training records in the running mean; 1: raw; default: a fiftieth of the run')
    p.set_defaults(run_command=loss)
    p = commands.add_parser('status', help='how far a run is, how fast, how long it still takes')
    p.add_argument('run', metavar='out/run')
    p.add_argument('--watch', action='store_true', help='redraw until finished or Ctrl-C')
    p.add_argument('--interval', type=float, default=2.0, metavar='S', help='seconds between redraws')
    p.set_defaults(run_command=status)
    p = commands.add_parser('bars', help='a bar for each row that bench.py --json wrote, as a picture')
    p.add_argument('rows', metavar='PATH.jsonl')
    p.add_argument('--value', default='', help='a number of the rows, e.g. error, forward_ratio, backward_bytes')
    p.add_argument('--out', metavar='PNG', help='default: beside the rows')
    p.set_defaults(run_command=bars)
    p = commands.add_parser('diagnostics', help='ternary codes of runs of train_bitnet.py, as a picture')
    p.add_argument('runs', nargs='+', metavar='RUN', help='one: by kind of matrix; several: the overall figures of each')
    p.add_argument('--out', metavar='PNG', help='default: diagnostics.png in the first run folder')
    p.set_defaults(run_command=diagnostics)
    for name, text in (('ranks', 'loss at the last epoch against rank'), ('memory', 'parts of the peak memory of runs'),
                       ('optimizer', 'bytes of optimizer state against rank'), ('pareto', 'accuracy against memory')):
        p = commands.add_parser(name, help=f'{text}, as a picture')
        p.add_argument('runs', nargs='+', metavar='RUN', help='folder of a run of finetune_cls.py, or a folder above several')
        p.add_argument('--out', metavar='PNG', help=f'default: {name}.png in the first folder typed')
        p.set_defaults(run_command=draw_runs, name=name)
    args = parser.parse_args()
    args.run_command(args)


if __name__ == '__main__':
    main()
