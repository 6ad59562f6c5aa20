"""results/: what is kept of a run, and that tables, headlines and pictures are what the kept runs give."""
import os
import re
import shutil
import subprocess
import sys

import torch

import common
from conftest import ROOT

sys.path.append(str(ROOT / 'results'))
import keep  # noqa: E402


def test_tables_are_what_the_runs_give(tmp_path):
    """From the kept lines alone, in a copy without tables and pictures, come the same tables, index and README.md, and each
    picture; each headline names its rows."""
    for source in (*ROOT.glob('*.py'), *ROOT.glob('report/*.py'), *ROOT.glob('results/*.py'), *ROOT.glob('results/*.jsonl')):
        (tmp_path / source.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(source, tmp_path / source.relative_to(ROOT))
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    emptied = re.sub(r'(<!-- (?!end)\w+ -->\n).*?(?=<!-- end -->)', r'\1', readme, flags=re.S)
    (tmp_path / 'README.md').write_text(emptied, encoding='utf-8')
    assert len(emptied) < 0.9 * len(readme)
    for script in ('runs.py', 'ptq.py'):
        done = subprocess.run([sys.executable, f'results/{script}', '--table'], cwd=tmp_path, text=True, capture_output=True,
                              env=dict(os.environ, OMP_NUM_THREADS='1'))
        assert done.returncode == 0, done.stderr
    made = {p.name: p.read_text(encoding='utf-8') for p in tmp_path.glob('results/*.md')}
    assert made == {p.name: p.read_text(encoding='utf-8') for p in ROOT.glob('results/*.md') if p.name != 'negatives.md'}
    assert (tmp_path / 'README.md').read_text(encoding='utf-8') == readme
    assert {p.name for p in tmp_path.glob('results/*.png')} == {p.name for p in ROOT.glob('results/*.png')}
    assert set(made) == {f'{name}.md' for name in keep.INDEX} | {'README.md'}
    for name, (question, _, *labels) in keep.INDEX.items():
        line, = (line for line in made['README.md'].splitlines() if question in line)
        assert f'[md]({name}.md)' in line and not [label for label in labels if label not in line]


def test_condensed_by_hand():
    """Steps of 2, 30 and 4 ms are 4 ms in the median, their peak is the most; evaluations stay, and what the end says."""
    measured = ((1, 2.0, 7), (2, 30.0, 9), (3, 4.0, 8))
    steps = [{'step': step, 'loss': 1.0, 'ms': ms, 'peak_mem_bytes': peak} for step, ms, peak in measured]
    unmeasured = {'step': 4, 'loss': 1.0, 'ms': None, 'peak_mem_bytes': 99}
    diagnosis = {'step': 3, 'zero': 0.5, 'matrices': {'0.q': {}}}
    evaluations = [{'step': 0, 'val_loss': 3.0}, {'step': 4, 'val_loss': 2.0, 'top1': 0.5}]
    records = [evaluations[0], *steps, diagnosis, unmeasured, evaluations[1]]
    assert keep.condensed(records) == {'ms': 4.0, 'peak_mem_bytes': 9, 'evaluations': evaluations}
    end = {'step': 4, 'packed_file_bytes': 10, 'best_step': 4}
    assert keep.condensed([*records, end]) == {
        'ms': 4.0, 'peak_mem_bytes': 9, 'packed_file_bytes': 10, 'best_step': 4, 'evaluations': evaluations}


def test_a_run_takes_the_place_of_its_like(tmp_path, monkeypatch):
    """A variant and seed that is there already is replaced where it stands, another one is added, no other line changes."""
    (tmp_path / 'results').mkdir()
    monkeypatch.setattr(keep, 'ROOT', tmp_path)
    for variant, seed, loss in (('fp', 1, 1.5), ('bin', 1, 2.5), ('fp', 2, 3.5), ('fp', 1, 4.5)):
        keep.put('x', {'variant': variant, 'seed': seed, 'loss': loss})
    assert [(r['variant'], r['seed'], r['loss']) for r in keep.read('x')] == [('fp', 1, 4.5), ('bin', 1, 2.5), ('fp', 2, 3.5)]
    assert [p.name for p in tmp_path.glob('results/*')] == ['x.jsonl']


def test_a_run_folder_is_kept(tmp_path, monkeypatch):
    """What a trainer leaves in its folder gives a line with the versions of its checkpoint and this machine."""
    out = tmp_path / 'out'
    (tmp_path / 'results').mkdir()
    out.mkdir()
    monkeypatch.setattr(keep, 'ROOT', tmp_path)
    common.save_checkpoint(str(out / 'last.pt'), {'trainer': 'train_gpt'})
    (out / 'config.py').write_text("device = 'cpu'\n")
    for record in ({'step': 1, 'loss': 1.0, 'ms': 5.0, 'peak_mem_bytes': 6}, {'step': 1, 'val_loss': 2.0}):
        common.append_log(str(out), record)
    keep.keep_run('x', out, variant='fp', seed=1, threads=2)
    assert keep.read('x') == [{'variant': 'fp', 'seed': 1, 'threads': 2, 'versions': common.versions(), 'ms': 5.0,
                               'machine': common.device_name(torch.device('cpu')), 'peak_mem_bytes': 6,
                               'evaluations': [{'step': 1, 'val_loss': 2.0}]}]
    (out / 'results.yaml').write_text('accuracy: 0.5\n')
    keep.keep_run('x', out, variant='fp', seed=1)
    line, = keep.read('x')
    assert line['results'] == {'accuracy': 0.5}
