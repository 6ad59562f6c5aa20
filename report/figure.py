"""What all pictures share: colours, run folders and their logs, axes, saving."""
import ast
import json
import math
import os

from configurator import fail

# Okabe-Ito: told apart with any common colour blindness. Markers differ too, for prints in grey.
COLORS = ['#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000']
MARKERS = ['o', 's', '^', 'D', 'v', 'P', 'X', '*']  # one more than colours: eighth and first differ

# -----------------------------------------------------------------------------
# reading a run folder


def load_log(run):
    """run folder -> (list of records, number of damaged lines). A last line still being written is neither."""
    path = os.path.join(run, 'log.jsonl')
    if not os.path.isdir(run):
        fail(f'{run} is not a folder; type the out_dir of a run, the folder that holds log.jsonl')
    if not os.path.isfile(path):
        fail(f'{run} holds no log.jsonl; type the out_dir of a run that has started')
    records, damaged = [], 0
    with open(path, encoding='utf-8', errors='replace') as f:
        for line in f:
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict) and isinstance(record.get('step'), int):
                records.append(record)
            elif line.strip() and line.endswith('\n'):  # no newline yet: the trainer is still writing it
                damaged += 1
    if not records:
        fail(f'{path} holds no record ({damaged} damaged lines); wait for the first one or restart the run')
    return records, damaged


def load_config(run):
    """run folder -> dict of the plain constants in config.py ({} without the file). Parsed, never executed."""
    path = os.path.join(run, 'config.py')
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding='utf-8') as f:
            tree = ast.parse(f.read())
    except (SyntaxError, ValueError) as e:
        fail(f'{path} is not Python ({e}); restore or delete it')
    config = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                config[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                pass  # an expression: not a constant, so not for us
    return config


def load_logs(runs, wanted, lack):
    """Run folders -> {label: records}: a folder's name, the path where two have one name. lack: what to say of one whose
    wanted(records) are none."""
    names = [os.path.basename(os.path.abspath(run)) for run in runs]
    logs = {}
    for run, name in zip(runs, names, strict=True):
        records, damaged = load_log(run)
        if damaged:
            print(f'{run}/log.jsonl: {damaged} damaged line(s) skipped')
        if not wanted(records):
            fail(f'{run}/log.jsonl {lack}')
        logs[name if names.count(name) == 1 else run] = records
    return logs


def measured(records, *keys):
    """The records in which all of `keys` are finite numbers: null marks the unmeasured, nan a broken step."""
    return [r for r in records if all(isinstance(r.get(k), (int, float)) and math.isfinite(r[k]) for k in keys)]


# -----------------------------------------------------------------------------
# pictures


def subplots(columns=1, size=(8, 5), grid='both', title='', rows=1):
    """-> (figure, its axes row by row)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display needed, and no pyplot that keeps all figures
    from matplotlib.figure import Figure
    fig = FigureCanvasAgg(Figure(size, layout='constrained')).figure
    axes = fig.subplots(rows, columns, squeeze=False, sharex=rows > 1).ravel()  # x is labelled below the last row alone
    for ax in axes:
        ax.set_title(title, fontsize=9)
        ax.grid(color='0.92', axis=grid)
        ax.set_axisbelow(True)
        ax.spines[['top', 'right']].set_visible(False)
    return fig, axes


def tokens_or_step(records):
    """What every record has to be drawn against."""
    return 'tokens' if len(measured(records, 'tokens')) == len(records) else 'step'


def label_x(ax, x):
    from matplotlib.ticker import EngFormatter
    ax.margins(x=0.02)
    if ax.get_subplotspec().is_last_row():
        ax.set_xlabel('training tokens' if x == 'tokens' else 'step')
    if x == 'tokens':
        ax.xaxis.set_major_formatter(EngFormatter())


def save(fig, out, what):
    """Write the picture and say what is on it."""
    try:
        fig.savefig(out, dpi=150)
    except (OSError, ValueError) as e:
        fail(f'cannot write {out} ({e}); type --out=some/existing/folder/picture.png')
    print(f'{out}: {what}')
