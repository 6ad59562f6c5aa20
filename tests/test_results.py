"""results/: how runs are stored, and that tables, headlines and pictures are made from the stored runs."""
import re
import shutil
import sys

import pytest
import torch

import common
from conftest import ROOT

sys.path.append(str(ROOT / 'results'))
import keep  # noqa: E402


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty folder with a folder results/, in which keep.py works."""
    (tmp_path / 'results').mkdir()
    monkeypatch.setattr(keep, 'ROOT', tmp_path)
    return tmp_path


def test_tables_are_what_the_runs_give(in_turn, tmp_path):
    """In a copy without tables and pictures, the stored runs alone give the same tables, index and pages, and every picture.
    Each headline names its rows."""
    for folder in ('results', 'docs'):
        (tmp_path / folder).mkdir()
    shutil.copytree(ROOT / 'config', tmp_path / 'config')               # runs are compared with these
    for source in (*ROOT.glob('results/*.py'), *ROOT.glob('results/*.jsonl')):
        shutil.copy(source, tmp_path / 'results')
    pages = {p.relative_to(ROOT): p.read_text(encoding='utf-8') for p in (ROOT / 'README.md', *ROOT.glob('docs/*.md'))}
    for page, text in pages.items():
        emptied = re.sub(r'(<!-- (?!end)\w+ -->\n).*?(?=<!-- end -->)', r'\1', text, flags=re.S)
        assert ('<!-- end -->' in text) == (len(emptied) < len(text))
        (tmp_path / page).write_text(emptied, encoding='utf-8')
    scripts = 'runs.py', 'pareto.py', 'ptq.py', 'decode.py', 'export.py', 'faults.py'
    commands = [(tmp_path / 'results' / script, tmp_path, ['--table']) for script in scripts]
    for done in in_turn(commands, patch=f'import sys; sys.path.insert(0, {str(tmp_path / "results")!r})'):
        assert done.code == 0, done.err
    made = {p.name: p.read_text(encoding='utf-8') for p in tmp_path.glob('results/*.md')}
    assert made == {p.name: p.read_text(encoding='utf-8') for p in ROOT.glob('results/*.md') if p.name != 'negatives.md'}
    assert pages == {page: (tmp_path / page).read_text(encoding='utf-8') for page in pages}
    assert {p.name for p in tmp_path.glob('results/*.png')} == {p.name for p in ROOT.glob('results/*.png')}
    assert set(made) == {f'{name}.md' for name in keep.INDEX} | {'README.md'}
    for name, (question, _, *labels) in keep.INDEX.items():
        line, = (line for line in made['README.md'].splitlines() if question in line)
        assert f'[md]({name}.md)' in line and not [label for label in labels if label not in line]


def test_put_replaces_the_run_of_the_same_variant_and_seed(root):
    """put() replaces the line of the same variant and seed in place, appends any other, and changes no other line."""
    for variant, seed, loss in (('fp', 1, 1.5), ('bin', 1, 2.5), ('fp', 2, 3.5), ('fp', 1, 4.5)):
        keep.put('x', {'variant': variant, 'seed': seed, 'loss': loss})
    assert [(r['variant'], r['seed'], r['loss']) for r in keep.read('x')] == [('fp', 1, 4.5), ('bin', 1, 2.5), ('fp', 2, 3.5)]
    assert [p.name for p in root.glob('results/*')] == ['x.jsonl']


def test_keep_run_stores_a_run_folder(root):
    """keep_run() stores the folder of a run as one line with the versions of its checkpoint and the name of this machine, the
    median of its step times, its highest peak, its evaluations, its last record and the results of finetune_cls.py."""
    out = root / 'out'
    out.mkdir()
    common.save_checkpoint(str(out / 'last.pt'), {'trainer': 'train_gpt'})
    (out / 'config.py').write_text("device = 'cpu'\nseed = 1\n")
    steps = [{'step': step, 'loss': 1.0, 'ms': ms, 'peak_mem_bytes': peak}
             for step, ms, peak in ((1, 2.0, 7), (2, 30.0, 9), (3, 4.0, 8), (4, None, 99))]
    diagnosis = {'step': 3, 'zero': 0.5, 'matrices': {'0.q': {}}}
    evaluations = [{'step': 0, 'val_loss': 3.0}, {'step': 4, 'val_loss': 2.0, 'top1': 0.5}]
    for record in (evaluations[0], *steps, diagnosis, evaluations[1]):
        common.append_log(str(out), record)
    keep.keep_run('x', out, variant='fp', seed=1, threads=2)
    expected = {'variant': 'fp', 'seed': 1, 'threads': 2, 'settings': {'device': 'cpu', 'seed': 1},
                'versions': common.versions(), 'ms': 4.0, 'peak_mem_bytes': 9,
                'machine': common.device_name(torch.device('cpu')), 'evaluations': evaluations}
    assert keep.read('x') == [expected]
    common.append_log(str(out), {'step': 4, 'packed_file_bytes': 10, 'best_step': 4})
    (out / 'results.yaml').write_text('accuracy: 0.5\n')
    keep.keep_run('x', out, variant='fp', seed=1, threads=2)
    assert keep.read('x') == [expected | {'packed_file_bytes': 10, 'best_step': 4, 'results': {'accuracy': 0.5}}]


def test_a_run_with_other_settings_than_its_config_file_is_refused(root, monkeypatch):
    """A changed number, a changed key of a dict and a new key refuse the table. An option of the run, and keys that only the
    trainer has, do not. A tuple is a list in the row."""
    import runs
    monkeypatch.setattr(runs, 'ROOT', root)
    (root / 'a.py').write_text("rate = 1.0\nscale = {'bin': 2.0}\nwidths = 4, 8\nout_dir = 'out/a'\n")
    run = {'variant': 'fp', 'seed': 1, 'config': 'a.py --rate=2.0', 'options': '',
           'settings': {'rate': 2.0, 'scale': {'bin': 2.0, 'tern': 1.0}, 'widths': (4, 8), 'out_dir': 'out/b', 'steps': 5}}
    keep.put('x', run)
    runs.check_settings('x')
    for change, message in (({'scale': {'bin': 1.0, 'tern': 1.0}}, 'scale=.*1.0.*, but a.py has .*2.0'),
                            ({'widths': None}, r'widths=None, but a.py has \[4, 8\]')):
        keep.put('x', run | {'settings': run['settings'] | change})
        with pytest.raises(SystemExit, match=f'x: fp seed 1 ran with {message}'):
            runs.check_settings('x')
    keep.put('x', run | {'config': 'a.py'})
    with pytest.raises(SystemExit, match='ran with rate=2.0, but a.py has 1.0 now'):
        runs.check_settings('x')


def test_the_table_of_the_readme_leaves_out_what_was_not_run(root):
    """With the stored runs of two experiments alone, README.md gets their rows, without memory and times of missing benches. A
    page without <!-- end --> is refused and stays as it is."""
    import runs
    for name, gone in (('quality', 'bin'), ('long', 'tern')):
        lines = (ROOT / f'results/{name}.jsonl').read_text(encoding='utf-8').splitlines()
        kept = (x for x in lines if f'"variant": "{gone}"' not in x)
        (root / f'results/{name}.jsonl').write_text('\n'.join(kept), encoding='utf-8')
    page = root / 'README.md'
    page.write_text('<!-- summary -->\n<!-- end -->\n', encoding='utf-8')
    runs.write_summary()
    rows = page.read_text(encoding='utf-8').splitlines()[3:-1]
    assert len(rows) == 2 and all(' | - | ' in row for row in rows)
    assert rows[0].startswith('| [GPT 0.9M') and '4 × the steps' in rows[0] and rows[1].startswith('|  | all blocks ternary')
    page.write_text('<!-- summary -->\n## The rest of the page\n', encoding='utf-8')
    with pytest.raises(SystemExit, match='has no <!-- end -->'):
        keep.fill('summary', 'a table')
    assert 'The rest' in page.read_text(encoding='utf-8')


def test_the_gap_over_two_sets_counts_every_text_once(root):
    """One text that is right and three that are wrong: 25%. Seeds whose gaps are 1 and 3 points: 2 ± 1, the standard error."""
    import runs
    sets = {'val': {'n': 1, 'accuracy': 1.0, 'eval_loss': 4.0}, 'held': {'n': 3, 'accuracy': 0.0, 'eval_loss': 0.0}}
    found = runs.pooled({'accuracy': 1.0, 'sets': sets})
    assert found['all_accuracy'] == 0.25 and found['all_loss'] == 1.0 and found['held_n'] == 3 and found['accuracy'] == 1.0
    group = {'pairs': [({'x': 0.11}, {'x': 0.10}), ({'x': 0.23}, {'x': 0.20})]}
    assert runs.gap('x', 2, 100)(group) == '+2.00 ± 1.00'


def test_the_fault_matrix_finds_a_fault(start, tmp_path):
    """Two checks with few cases: a run stopped by a NaN ends as promised; a reader that ignores checksums does not. The exit
    status is 1, and nothing is stored."""
    ignoring = 'from readers import tokens; tokens._check_tokens = lambda *args: None\n'
    before = [p.read_bytes() for p in sorted(ROOT.glob('results/faults.*'))]
    done = start(ROOT / 'results/faults.py', '--only=nan/train_gpt,damage/token file', '--scale=0.02', '--jobs=1', cwd=tmp_path,
                 patch=ignoring).wait()
    assert done.code == 1 and '| NaN | 1 of 1 |' in done.out and '- damage token file: byte ' in done.out, (done.out, done.err)
    assert before == [p.read_bytes() for p in sorted(ROOT.glob('results/faults.*'))]
