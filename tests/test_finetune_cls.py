"""finetune_cls.py as people run it: every method trains what it should, its figures are true, stops and resumes bit for bit,
the same on two processes, mistakes in one line."""
import csv
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
import yaml

import common
import layers
import optim
from conftest import IN_EVALUATION, NAN_LOSS, ROOT, assert_same_state, flat, kill_at, one_error, ranks, wait_all
from forked import SWEEP_FORKS
from pretrained import adapters, hf

SCRIPT = ROOT / 'finetune_cls.py'
MEASURED = {'ms', 'samples_per_s', 'peak_mem_bytes', 'energy_j', 'peak_bytes', 'resident_bytes', 'gradient_bytes'}
SCRATCH = """# a DistilBERT of one layer that learns which words are nice in three seconds
task, train_file, eval_file = 'csv', {folder!r} + '/train.csv', {folder!r} + '/eval.csv'
out_dir, init_from, device, model = 'out', 'scratch', 'cpu', ''
n_layer, n_head, n_embd, vocab_size, max_len, dropout = 1, 2, 32, 300, 14, 0.0
batch_size, micro_batch_size, epochs, learning_rate, log_interval, eval_batch_size = 16, 8, 6.0, 1e-2, 1, 10
rank, interval, stagger, lora_dropout, svt_interval = 4, 4, 2, 0.0, 5
"""
# The model that SCRATCH made, on the same texts with other labels, so with a new head.
TUNE = """init_from, model = 'pretrained', {base!r}
train_file, eval_file = train_file.replace('train', 'train2'), eval_file.replace('eval', 'eval2')
epochs = 3.0
"""
METHODS = {'full': (), 'lora': (), 'qlora': (), 'lora_topr': ('--quant8=True',), 'rsvd': (), 'rsvd_svt': (),
           'rsvd_svt energy': ('--energy=0.9',), 'rsvd_svt fraction': ('--rank_fraction=0.25',), 'weight_reduction': (),
           'weight_reduction_svt': ()}
RESUMED = {'rsvd': ('--state_dtype=8bit', '--model={wet}'), 'weight_reduction_svt': ('--dtype=float16',),
           'lora': ('--lora_dropout=0.2',)}
COLUMNS = {'epoch_loss.csv': 'epoch,step,train_loss,eval_loss,eval_accuracy',
           'epoch_peak_memory.csv': 'epoch,peak_bytes,resident_bytes',
           'flops_profiler_stats.csv': 'module,forward_flops,backward_flops',
           'forward_pass.csv': 'texts,tokens,forward_flops,peak_bytes,ms', 'memory_breakdown.csv': 'part,bytes',
           'optimizer_memory.csv': 'optimizer,method,rank,bytes,adam_bytes,saved', 'predictions.csv': 'index,label,prediction'}
STEPS = """
import torch, optim, common, os
for kind in (torch.optim.AdamW, optim.RSVDAdam):
    def step(self, *args, plain=kind.step, **kwargs):
        grads = self.gradients() if hasattr(self, 'gradients') else {p: p.grad for g in self.param_groups for p in g['params']}
        norm = torch.nn.utils.get_total_norm([g for g in grads.values() if g is not None]).item()
        result = plain(self, *args, **kwargs)
        tensors = [p for g in self.param_groups for p in g['params']]
        tensors += [v for s in self.state.values() for v in s.values() if torch.is_tensor(v)]
        with open('steps' + os.environ.get('RANK', '0'), 'a') as f:
            print(norm, common.checksum(tensors), file=f)
        return result
    kind.step = step
"""


# ------------------------------------------------------------------------------------------------------------ fixtures


def write_csv(path, rows, header=('sentence', 'label')):
    with open(path, 'w', newline='') as f:
        csv.writer(f).writerows([header, *rows])


def texts(n, seed, labels=('negative', 'positive')):
    """A few neutral words and one nice or nasty one, which is the label."""
    draw = np.random.default_rng(seed)
    nice, nasty, rest = ('good great fine happy bright'.split(), 'bad awful poor sad grim'.split(),
                         'the a film story it was of and'.split())
    rows = []
    for label in draw.integers(0, 2, n):
        words = [*draw.choice(rest, draw.integers(2, 9)), draw.choice((nasty, nice)[label])]
        rows.append((' '.join(draw.permutation(words)), labels[label]))
    return rows


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('texts')
    for name, n, seed in (('train', 96, 1), ('eval', 41, 2)):
        write_csv(folder / f'{name}.csv', texts(n, seed))
        write_csv(folder / f'{name}2.csv', texts(n, seed, ('up', 'down')))
    write_csv(folder / 'reversed.csv', texts(41, 2)[::-1])
    write_csv(folder / 'unknown.csv', [('good', 'positive'), ('odd', 'neither')])
    write_csv(folder / 'header.csv', [])
    (folder / 'empty.csv').touch()
    return folder


@pytest.fixture(scope='module')
def scratch(start, data, tmp_path_factory):
    """The folder of a run of SCRATCH."""
    cwd = tmp_path_factory.mktemp('scratch')
    (cwd / 'tiny.py').write_text(SCRATCH.format(folder=str(data)))
    done = start(SCRIPT, 'tiny.py', cwd=cwd).wait()
    assert done.code == 0 and done.err == '', done.err
    return cwd


@pytest.fixture(scope='module')
def base(scratch):
    return scratch / 'out' / 'distilbert-scratch-csv-full'


@pytest.fixture(scope='module')
def wet(base, tmp_path_factory):
    """base, with dropout."""
    new = shutil.copytree(base, tmp_path_factory.mktemp('wet') / base.name)
    said = json.loads((new / 'config.json').read_text())
    (new / 'config.json').write_text(json.dumps(said | dict.fromkeys(
        ('dropout', 'attention_dropout', 'seq_classif_dropout'), 0.2)))
    return new


@pytest.fixture(scope='module')
def folder(tmp_path_factory, data, base):
    """folder(scratch=False) -> a new folder holding tiny.py, the config all runs start from."""
    def make(scratch=False):
        new = tmp_path_factory.mktemp('run')
        text = SCRATCH.format(folder=str(data))
        (new / 'tiny.py').write_text(text if scratch else text + TUNE.format(base=str(base)))
        return new
    return make


@pytest.fixture(scope='module')
def unbroken(train, folder):
    """unbroken(name of METHODS or RESUMED, *options) -> the folder of such a run, made once."""
    made = {}

    def run(name, *options):
        if (name, options) not in made:
            made[name, options] = folder()
            method = name.split()[0]
            train(f'--method={method}', *options, cwd=made[name, options])
        return made[name, options]
    return run


def table(path):
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


def result(where, name='results.yaml'):
    return yaml.safe_load((where / 'out' / name).read_text())


def log(where, only=None):
    records = [{k: v for k, v in r.items() if k not in MEASURED} for r in common.read_log(where / 'out')]
    return records if only is None else [r[only] for r in records if only in r]


def checkpoint(where, name='last.pt'):
    return common.read_checkpoint(str(where / 'out' / name), 'finetune_cls')


def model_folder(where):
    found = [p for p in (where / 'out').iterdir() if p.is_dir() and p.name != 'base']
    assert len(found) == 1
    return found[0]


def assert_same_run(a, b):
    """Weights, optimizer, counters, log, figures: bit for bit."""
    one, two = checkpoint(a), checkpoint(b)
    scaler = ('scaler',) * (one['config']['dtype'] == 'float16')
    assert_same_state(one, two, ('step', 'model', 'optimizer', 'epoch_loss', *scaler))
    assert log(a) == log(b)
    for name in ('epoch_loss.csv', 'predictions.csv'):
        assert (a / 'out' / name).read_bytes() == (b / 'out' / name).read_bytes()


def assert_close_weights(a, b, atol):
    one, two = checkpoint(a)['model'], checkpoint(b)['model']
    assert one.keys() == two.keys()
    assert max((one[k].float() - two[k].float()).abs().max().item() for k in one) <= atol


def predict(net, tokenizer, data, name='eval2.csv', max_len=14):
    """(logits (n, labels), predicted names) of texts in a csv."""
    rows = hf.encode(tokenizer, [(row['sentence'],) for row in table(data / name)], max_len)
    with torch.no_grad():
        logits = net.eval()(**hf.collate(tokenizer, rows, max_len)).logits
    return logits, [net.config.id2label[i] for i in logits.argmax(1).tolist()]


# ------------------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize('name', METHODS)
def test_every_method_learns_and_trains_what_it_should(unbroken, base, name):
    """The training loss falls; only the parameters of the method change, all others stay those of the model, bit for bit."""
    where = unbroken(name, *METHODS[name])
    losses = [float(row['train_loss']) for row in table(where / 'out' / 'epoch_loss.csv')]
    assert losses[-1] < 0.75 * losses[0] and len(losses) == 3
    found, state, method = result(where), checkpoint(where)['model'], name.split()[0]
    head = {'pre_classifier.weight', 'pre_classifier.bias', 'classifier.weight', 'classifier.bias'}
    n_head, layer = 32 * 32 + 32 + 2 * 32 + 2, 'distilbert.transformer.layer.0.attention.'
    before = hf.load(str(base), ['up', 'down'])[0].state_dict()
    if method in ('full', 'rsvd', 'rsvd_svt'):
        assert found['trained_parameters'] == found['parameters'] == sum(t.numel() for t in before.values())
        assert state.keys() == before.keys()
        same = {k for k in state if torch.equal(state[k], before[k])}
        assert not same
        return
    low = 'AcB' if method.startswith('weight') else ('lora_A', 'lora_B')
    wanted = {f'{layer}{key}_lin.{ab}' for key in 'qkv' for ab in low}
    assert found['trained_parameters'] == n_head + 3 * (2 * 4 * 32 + 4 * ('c' in low))
    assert state.keys() == wanted | head            # what is frozen is in the model's own folder
    if method.startswith('weight'):
        net, _, order, fresh = hf.load(str(model_folder(where)), ['up', 'down'])
        assert not fresh
        after = net.state_dict()
        changed = {k for k in before if not torch.equal(after[k], before[k])}
        assert changed == head | {f'{layer}{key}_lin.weight' for key in 'qkv'}
        most = 2 if method.endswith('svt') else 4
        assert all(torch.linalg.matrix_rank(after[f'{layer}{key}_lin.weight'], atol=1e-5) <= most for key in 'qkv')


@pytest.mark.parametrize('name', METHODS)
def test_every_figure_of_a_run_is_true(unbroken, base, data, name):
    """All columns exist, parts of memory add up, optimizer bytes are those of real states, accuracy is that of predictions."""
    where = unbroken(name, *METHODS[name])
    out, found, method = where / 'out', result(where), name.split()[0]
    for file, columns in COLUMNS.items():
        assert ','.join(table(out / file)[0]) == columns
    memory = {row['part']: int(row['bytes']) for row in table(out / 'memory_breakdown.csv')}
    assert list(memory) == ['parameters', 'buffers', 'gradients', 'optimizer', 'rest', 'peak']
    assert sum(memory.values()) == 2 * memory['peak'] and min(memory.values()) > 0
    assert memory['peak'] == found['peak_bytes'] == max(int(r['peak_bytes']) for r in table(out / 'epoch_peak_memory.csv'))
    state = checkpoint(where)['optimizer']['state']
    used = sum(t.nbytes for t in flat(state).values() if torch.is_tensor(t))
    row, = table(out / 'optimizer_memory.csv')
    assert int(row['bytes']) == found['optimizer_bytes'] == memory['optimizer'] == used and row['method'] == method
    net = hf.load(str(base), ['up', 'down'])[0]
    adam = torch.optim.AdamW(net.parameters())
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    adam.step()
    assert int(row['adam_bytes']) == optim.optimizer_bytes(adam)
    assert float(row['saved']) == pytest.approx(1 - used / int(row['adam_bytes']), abs=1e-5)
    assert found['gradient_bytes'] == memory['gradients']
    wanted, rows = table(data / 'eval2.csv'), table(out / 'predictions.csv')
    assert [r['label'] for r in rows] == [r['label'] for r in wanted] and [int(r['index']) for r in rows] == list(range(41))
    assert found['accuracy'] == np.mean([r['label'] == r['prediction'] for r in rows]) == log(where, 'val_accuracy')[-1]
    assert found['n'] == 41 and found['eval_loss'] == log(where, 'val_loss')[-1]
    assert found['accuracy_low'] <= found['accuracy'] <= found['accuracy_high']
    assert found['steps'] == 18 and found['epochs'] == 3 and found['method'] == method
    assert found['f1_label'] == 'up' and 0 < found['ms_per_sample'] < 1000
    assert found['ms_per_sample'] * found['samples_per_s'] == pytest.approx(1000)
    bases = [s['basis'].shape[1] for s in state.values() if 'basis' in s]
    assert found['basis_ranks'] == ([min(bases), max(bases)] if bases else None) and bool(bases) == method.startswith('rsvd')
    assert result(where, 'resource_usage.yaml')['peak_bytes'] == memory['peak']
    assert [float(r['train_loss']) for r in table(out / 'epoch_loss.csv')] == pytest.approx(
        np.mean(np.reshape(log(where, 'loss'), (3, 6)), axis=1))
    assert [r['step'] for r in log(where) if 'loss' in r] == list(range(1, 19))


def test_flops_are_those_of_a_count_by_hand(unbroken):
    """Linear layers, attention and head of the forward pass, of both micro-batches of a step, each padded to 8 or 14; the
    backward pass twice that (an embedding has a gradient, so nothing is left out), for attention 2.5 times."""
    where, n, d = unbroken('full'), 8, 32
    linear, attention, head = (lambda t: 2 * n * t * d * d * (4 + 8)), (lambda t: 4 * n * t * t * d), 2 * n * d * (d + 2)
    row, = table(where / 'out' / 'forward_pass.csv')
    t = int(row['tokens'])
    assert int(row['texts']) == n and t in (8, 14) and int(row['forward_flops']) == linear(t) + attention(t) + head
    found = {r['module']: r for r in table(where / 'out' / 'flops_profiler_stats.csv')}
    forward = lambda ts: sum(linear(t) + attention(t) + head for t in ts)
    ts, = [ts for ts in ((8, 8), (8, 14), (14, 14)) if forward(ts) == int(found['Global']['forward_flops'])]
    assert int(found['Global']['backward_flops']) == sum(2 * (linear(t) + head) + attention(t) * 5 // 2 for t in ts)
    lin1 = found['DistilBertForSequenceClassification.distilbert.transformer.layer.0.ffn.lin1']
    assert int(lin1['forward_flops']) == sum(2 * n * t * d * 4 * d for t in ts) and lin1['backward_flops'] == ''


def test_projected_gradients_are_small_and_the_same_training(unbroken):
    """Against --projected=False: the weights to rounding, fewer bytes of gradients than full training's."""
    a, b = (unbroken('rsvd', '--micro_batch_size=16', f'--projected={on}') for on in (True, False))
    assert log(a, 'loss') == pytest.approx(log(b, 'loss'), abs=1e-2)
    assert log(a, 'loss')[:5] == pytest.approx(log(b, 'loss')[:5], abs=1e-4)
    assert result(unbroken('rsvd'))['gradient_bytes'] < 0.5 * result(unbroken('full'))['gradient_bytes']
    assert result(unbroken('full'))['gradient_bytes'] == 4 * result(unbroken('full'))['parameters']


def test_gradient_checkpointing_changes_nothing_but_memory(unbroken):
    for method in ('full', 'rsvd', 'lora'):
        assert_close_weights(unbroken(method), unbroken(method, '--gradient_checkpointing=True'), 2e-5)


# ------------------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize('method', RESUMED)
def test_stopped_and_resumed_equals_unbroken(train, folder, unbroken, wet, method):
    """Stopped between two bases, between two truncations and in an evaluation, with dropout, 8-bit moments or loss scaling;
    then once more when all is done. Seconds of training add up: the test adds a thousand of them to a checkpoint."""
    some = [option.format(wet=wet) for option in RESUMED[method]]
    options, cwd = (f'--method={method}', *some), folder()
    whole = unbroken(method, *some)
    assert 'stopped at step 3;' in train(*options, '--resume=auto', cwd=cwd, patch=kill_at(2)).out
    patch = IN_EVALUATION.format(signal='SIGTERM', after=11, rank=0)
    assert 'stopped at step 12;' in train(*options, '--resume=auto', cwd=cwd, patch=patch).out
    state = checkpoint(cwd)
    assert state['meter']['seconds'] > 0
    state['meter']['seconds'] += 10_000
    common.save_checkpoint(str(cwd / 'out' / 'last.pt'), state)
    train(*options, '--resume=auto', cwd=cwd)
    assert_same_run(cwd, whole)
    assert 0 < result(whole, 'resource_usage.yaml')['training_s'] < 10_000 < result(cwd, 'resource_usage.yaml')['training_s']
    if method == 'rsvd':
        assert json.loads((model_folder(cwd) / 'config.json').read_text())['dropout'] == 0.2
    files = lambda: {p.name: p.read_bytes() for p in [*(cwd / 'out').iterdir(), *model_folder(cwd).iterdir()] if p.is_file()}
    before = files()
    assert 'step 18 of 18 is reached' in train(*options, '--resume=auto', cwd=cwd).out
    assert_same_run(cwd, whole)
    assert result(cwd, 'resource_usage.yaml')['training_s'] > 10_000
    after = files()
    changed = {name for name in before if before[name] != after.get(name)}
    assert changed <= {'log.jsonl', 'results.yaml', 'resource_usage.yaml', 'forward_pass.csv', 'epoch_peak_memory.csv',
                       'config.py'} and before.keys() == after.keys()


OTHERS = [('lora', '--rank=8', 'rank (4, not 8)'), ('lora', '--lora_alpha=8', 'lora_alpha (0.0, not 8.0)'),
          ('lora', '--quant8=True', 'quant8 (False, not True)'), ('lora', '--dtype=bfloat16', 'dtype (float32, not bfloat16)'),
          ('lora', '--targets=q_lin', "targets ((), not ('q_lin',))"), ('lora', '--model={turned}', 'frozen weights'),
          ('rsvd', '--rank=8', 'rank (4, not 8)'), ('rsvd', '--side=left', 'side (right, not left)'),
          ('rsvd', '--state_dtype=8bit', 'state_dtype (fp32, not 8bit)'),
          ('rsvd', '--adam_for=()', "adam_for (('head',), not ())"),
          ('rsvd', '--rank_fraction=0.1', 'rank_fraction (0.0, not 0.1)')]


def test_what_a_resume_may_not_change(refused, folder, unbroken, base, tmp_path):
    """Another rank, base or precision is refused in one line that has the old and the new value, and loses nothing."""
    from safetensors.torch import load_file, save_file
    turned = shutil.copytree(base, tmp_path / base.name)
    weights = load_file(turned / 'model.safetensors')
    weights['distilbert.transformer.layer.0.ffn.lin1.weight'].neg_()
    save_file(weights, turned / 'model.safetensors', {'format': 'pt'})
    for method in ('lora', 'rsvd'):
        cwd = folder()
        shutil.copytree(unbroken(method) / 'out', cwd / 'out')
        contents = lambda cwd=cwd: {p: p.read_bytes() for p in (cwd / 'out').rglob('*') if p.is_file()}
        before = contents()
        refused('finetune_cls', [((f'--method={method}', option.format(turned=turned), '--resume=auto'), said)
                                 for of, option, said in OTHERS if of == method], cwd)
        assert contents() == before


# ------------------------------------------------------------------------------------------------- numbers of processes


@pytest.mark.parametrize('method', ['full', 'rsvd'])
def test_two_processes_equal_one(start, folder, unbroken, method):
    """The weights and predictions agree to rounding; the ranks are equal to the bit after each step."""
    cwd = folder()
    jobs = [start(SCRIPT, 'tiny.py', f'--method={method}', '--max_iters=8', cwd=cwd, patch=STEPS, **r) for r in ranks(2)]
    done = wait_all(jobs)
    assert [d.code for d in done] == [0, 0], [d.err for d in done]
    assert '8 x 1 micro-steps x 2 processes' in done[0].out and done[1].out == ''
    sums = [(cwd / f'steps{rank}').read_text().split() for rank in (0, 1)]
    assert sums[0] == sums[1] and len(set(sums[0][1::2])) == 8
    one = unbroken(method, '--micro_batch_size=16', '--max_iters=8')
    near = 1e-4
    if method == 'full':
        assert_close_weights(cwd, one, 1e-3)
        assert (cwd / 'out' / 'predictions.csv').read_bytes() == (one / 'out' / 'predictions.csv').read_bytes()
    else:                                           # Adam in a random basis makes as much of rounding as of a gradient
        near = 1e-2
        assert log(cwd, 'loss')[:5] == pytest.approx(log(one, 'loss')[:5], abs=1e-4)
    assert log(cwd, 'loss') == pytest.approx(log(one, 'loss'), abs=near)
    assert log(cwd, 'val_loss') == pytest.approx(log(one, 'val_loss'), abs=near)
    assert result(cwd)['eval_loss'] == pytest.approx(result(one)['eval_loss'], abs=near)
    memory = {row['part']: int(row['bytes']) for row in table(cwd / 'out' / 'memory_breakdown.csv')}
    assert min(memory.values()) >= 0 and sum(memory.values()) == 2 * memory['peak'] and memory['gradients'] > 0
    usage = result(cwd, 'resource_usage.yaml')
    assert usage['processes'] == 2 and usage['energy_j'] is None and usage['ms_per_sample'] > 0


RUINED = """
import common
def lr_at(step, *args, plain=common.lr_at):
    return 0.5 if step >= 12 else plain(step, *args)
common.lr_at = lr_at
"""


def test_two_processes_keep_the_best_weights_as_one_does(start, train, folder):
    """The third epoch ruins the weights: both ranks go back to the best ones before they share out what is reported."""
    one, two, options = folder(), folder(), ('--keep_best=True', '--micro_batch_size=0')
    train(*options, cwd=one, patch=RUINED)
    done = wait_all([start(SCRIPT, 'tiny.py', *options, cwd=two, patch=RUINED, **r) for r in ranks(2)])
    assert [d.code for d in done] == [0, 0], [d.err for d in done]
    best, found = max(log(one, 'val_accuracy')), [result(where) for where in (one, two)]
    assert log(one, 'val_accuracy')[-1] < best - 0.2 and log(one, 'val_loss')[-1] > 1
    assert found[0]['accuracy'] == found[1]['accuracy'] == best and found[0]['weights'] == found[1]['weights'] != 'last'
    assert (one / 'out' / 'predictions.csv').read_bytes() == (two / 'out' / 'predictions.csv').read_bytes()
    assert found[0]['eval_loss'] == pytest.approx(found[1]['eval_loss'], abs=1e-3)
    assert checkpoint(one, 'best.pt')['step'] == checkpoint(two, 'best.pt')['step'] in (6, 12)


# ------------------------------------------------------------------------------------------------- numbers going wrong


@pytest.mark.parametrize('method', ['full', 'rsvd'])
def test_float16_skips_a_step_that_overflows(train, folder, method):
    """The loss of one step is 10,000 times as large: no update in it, half the scale from then on, training goes on."""
    cwd = folder()
    patch = STEPS + NAN_LOSS.format(call=2 * 4 + 1, rank=0).replace("float('nan')", '1e4')
    train(f'--method={method}', '--dtype=float16', '--max_iters=8', cwd=cwd, patch=patch)
    steps, state = (cwd / 'steps0').read_text().splitlines(), checkpoint(cwd)
    norms = [r['grad_norm'] for r in log(cwd) if 'loss' in r]
    assert norms[4] is None and state['step'] == 8
    skipped = norms.count(None)
    assert len(steps) == 8 - skipped and state['scaler'] == [2.0 ** (16 - skipped), 3]
    assert log(cwd, 'loss')[4] > 1000 > log(cwd, 'loss')[5]


def test_bfloat16_and_float16_train_as_float32_does(unbroken):
    for method, dtype in (('full', 'bfloat16'), ('full', 'float16'), ('rsvd', 'float16'), ('lora', 'bfloat16'),
                          ('qlora', 'bfloat16')):
        exact = log(unbroken(method), 'train_loss')
        assert log(unbroken(method, f'--dtype={dtype}'), 'train_loss') == pytest.approx(exact, abs=0.1)
    kept = checkpoint(unbroken('lora', '--dtype=bfloat16'))['model']
    assert all(t.dtype == torch.float32 for t in kept.values())


def test_grad_clip_bounds_the_norm(train, folder):
    for method in ('full', 'rsvd'):
        cwd = folder()
        train(f'--method={method}', '--max_iters=6', '--grad_clip=0.05', cwd=cwd, patch=STEPS)
        norms = [float(x) for x in (cwd / 'steps0').read_text().split()[::2]]
        assert max(norms) <= 0.05 * 1.0001 and max(r['grad_norm'] for r in log(cwd) if 'loss' in r) > 0.1


# ---------------------------------------------------------------------------------------------- evaluation and folders


@pytest.mark.parametrize('name', ['full', 'weight_reduction_svt', 'rsvd', 'lora'])
def test_evaluated_again_from_run_and_from_folder(train, folder, unbroken, data, name):
    """eval_only of the run, or of the model folder that it wrote, has the predictions and the loss of the end of training."""
    whole, cwd = unbroken(name, *METHODS[name]), folder()
    shutil.copytree(whole / 'out', cwd / 'out')
    (cwd / 'out' / 'predictions.csv').unlink()
    before = checkpoint(cwd)
    train(f'--method={name}', *METHODS[name], '--eval_only=True', cwd=cwd)
    assert (cwd / 'out' / 'predictions.csv').read_bytes() == (whole / 'out' / 'predictions.csv').read_bytes()
    assert result(cwd)['eval_loss'] == result(whole)['eval_loss'] and checkpoint(cwd)['step'] == before['step']
    if name != 'lora':
        train('--eval_only=True', f'--model={model_folder(whole)}', '--train_file=', '--out_dir=again', cwd=cwd)
        assert (cwd / 'again' / 'predictions.csv').read_bytes() == (whole / 'out' / 'predictions.csv').read_bytes()
        again = yaml.safe_load((cwd / 'again' / 'results.yaml').read_text())
        assert again['eval_loss'] == pytest.approx(result(whole)['eval_loss'], abs=1e-5) and again['optimizer_bytes'] is None


def test_eval_only_of_a_named_checkpoint(train, folder, unbroken):
    """--eval_only takes the weights of the checkpoint in --resume, and those of last.pt without one."""
    cwd = folder()
    train('--keep_best=True', cwd=cwd, patch=RUINED)
    best = result(cwd)
    loss = lambda *options: (train('--eval_only=True', *options, cwd=cwd), result(cwd)['eval_loss'])[1]
    assert loss('--resume=out/best.pt') == best['eval_loss'] < 1 < loss()
    assert result(cwd)['eval_loss'] == log(cwd, 'val_loss')[-1]
    train('--eval_only=True', '--resume=out/best.pt', '--out_dir=new', cwd=cwd)
    assert yaml.safe_load((cwd / 'new' / 'results.yaml').read_text())['eval_loss'] == best['eval_loss']
    other = unbroken('full') / 'out' / 'last.pt'
    assert 'out holds a run' in one_error(train('--eval_only=True', f'--resume={other}', cwd=cwd, code=2))


def test_a_scratch_run_is_evaluated_with_its_own_vocabulary(train, folder, scratch, data):
    """Another evaluation file, with its labels in another order, has the same predictions and accuracy."""
    cwd = folder(scratch=True)
    shutil.copytree(scratch / 'out', cwd / 'out')
    train('--eval_only=True', f'--eval_file={data}/reversed.csv', cwd=cwd)
    plain, back = table(scratch / 'out' / 'predictions.csv'), table(cwd / 'out' / 'predictions.csv')
    assert [r['prediction'] for r in back] == [r['prediction'] for r in plain][::-1]
    assert result(cwd)['accuracy'] == result(scratch)['accuracy'] > 0.9


def test_labels_go_by_name(train, folder, base, data):
    """A model with the labels in the other order gives the same predictions and F1, also after more training."""
    cwd = folder(scratch=True)
    net, tokenizer, names, _ = hf.load(str(base), ['negative', 'positive'])
    for p in (net.classifier.weight, net.classifier.bias):
        p.data = p.data.flip(0)
    net.config.id2label, net.config.label2id = {0: 'Positive', 1: 'Negative'}, {'Positive': 0, 'Negative': 1}
    hf.save(net, tokenizer, cwd / 'turned')
    for model, out in ((base, 'plain'), (cwd / 'turned', 'turned_out')):
        train('--eval_only=True', '--init_from=pretrained', f'--model={model}', f'--out_dir={out}', cwd=cwd)
    assert (cwd / 'plain/predictions.csv').read_bytes() == (cwd / 'turned_out/predictions.csv').read_bytes()
    assert np.mean([r['label'] == r['prediction'] for r in table(cwd / 'plain/predictions.csv')]) > 0.9
    plain, turned = (yaml.safe_load((cwd / name / 'results.yaml').read_text()) for name in ('plain', 'turned_out'))
    for key in ('f1', 'f1_low', 'f1_high', 'f1_label', 'accuracy'):
        assert plain[key] == turned[key]
    assert plain['f1_label'] == 'positive'
    done = train('--init_from=pretrained', '--model=turned', '--max_iters=1', '--learning_rate=1e-5', cwd=cwd)
    assert '2 labels: positive, negative' in done.out and ', new)' not in done.out and result(cwd)['accuracy'] > 0.9
    assert json.loads((model_folder(cwd) / 'config.json').read_text())['id2label'] == {'0': 'positive', '1': 'negative'}
    trained = result(cwd)
    assert trained['f1_label'] == 'positive'
    train('--init_from=pretrained', '--model=turned', '--eval_only=True', cwd=cwd)
    again = result(cwd)
    assert all(again[key] == trained[key] for key in ('f1', 'f1_label', 'accuracy', 'eval_loss'))


@pytest.mark.parametrize('kind', ['pretrained', 'scratch'])
def test_saved_adapters_load_onto_their_base(train, folder, unbroken, base, data, kind):
    """load_adapters() gives the logits of the trained model, and so does peft."""
    if kind == 'scratch':
        where, names, name = folder(scratch=True), ['negative', 'positive'], 'eval.csv'
        train('--method=lora', '--max_iters=6', cwd=where)
        assert os.path.isfile(where / 'out' / 'base' / 'model.safetensors')
    else:
        where, names, name = unbroken('lora'), ['up', 'down'], 'eval2.csv'
    saved = model_folder(where)
    said = json.loads((saved / 'adapter_config.json').read_text())
    assert said['base_model_name_or_path'] == ('out/base' if kind == 'scratch' else str(base))
    assert said['modules_to_save'] == ['classifier', 'pre_classifier']
    at = str(where / 'out' / 'base' if kind == 'scratch' else base)
    # names in the order of the run
    names = checkpoint(where)['described']['labels']
    net, tokenizer, _, _ = hf.load(at, names)
    trained = hf.load(at, names)[0]
    layers.convert(trained, {'*.[qkv]_lin': ('lora', dict(rank=4, alpha=4.0))}, verbose=False)
    left = trained.load_state_dict(checkpoint(where)['model'], strict=False)
    assert not left.unexpected_keys
    wanted, labels = predict(trained, tokenizer, data, name)
    assert labels == [r['prediction'] for r in table(where / 'out' / 'predictions.csv')]
    assert len(adapters.load_adapters(net, saved)) == 3
    assert torch.equal(predict(net, tokenizer, data, name)[0], wanted)
    peft = pytest.importorskip('peft', reason='peer test: needs peft')
    theirs = peft.PeftModel.from_pretrained(hf.load(at, names)[0], saved).eval()
    torch.testing.assert_close(predict(theirs, tokenizer, data, name)[0], wanted, rtol=0, atol=1e-5)


def test_decoders_and_bitnet(train, folder, base, data, tmp_path):
    """GPT-Neo trains with an int8 base, GPT-2 with rsvd, BitNet with LoRA and in full; adapters refuse GPT-2 in one line."""
    import transformers as t
    tokenizer, cwd = hf.load(str(base), ['a', 'b'])[1], folder()
    shared = dict(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=None, pad_token_id=0)
    configs = {'neo': t.GPTNeoConfig(hidden_size=32, num_layers=1, num_heads=2, attention_types=[[['global'], 1]],
                                     max_position_embeddings=14, **shared),
               'gpt': t.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=14, **shared),
               'bit': t.BitNetConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                                     num_key_value_heads=2, max_position_embeddings=14, **shared)}
    for name, config in configs.items():
        t.AutoModelForCausalLM.from_config(config).save_pretrained(cwd / name)
        tokenizer.save_pretrained(cwd / name)
    said = json.loads((cwd / 'bit/config.json').read_text())
    said['quantization_config'] = {'quant_method': 'bitnet', 'linear_class': 'autobitlinear', 'quantization_mode': 'online'}
    (cwd / 'bit/config.json').write_text(json.dumps(said))
    train('--model=neo', '--method=lora', '--quant8=True', '--max_iters=2', cwd=cwd)
    assert 'no linear layer of this model is named' in one_error(
        train('--model=gpt', '--method=lora', '--out_dir=o2', cwd=cwd, code=2))
    assert not (cwd / 'o2').exists()
    train('--model=gpt', '--method=rsvd', '--max_iters=2', '--out_dir=o2', cwd=cwd)
    train('--model=bit', '--method=lora', '--max_iters=6', '--out_dir=o3', cwd=cwd)
    train('--model=bit', '--method=full', '--max_iters=6', '--out_dir=o4', cwd=cwd)
    train('--model=o4/bit-csv-full', '--eval_only=True', '--out_dir=o5', cwd=cwd)
    assert (cwd / 'o4/predictions.csv').read_bytes() == (cwd / 'o5/predictions.csv').read_bytes()


# ------------------------------------------------------------------------------------------------------------- lengths


def test_epochs_intervals_and_samples_are_as_asked(unbroken):
    """epochs=1.5 is 9 steps, evaluated after 6 and 9; eval_interval adds evaluations; train_samples and keep_best work."""
    a = unbroken('full', '--epochs=1.5')
    assert [r['step'] for r in log(a) if 'val_loss' in r] == [6, 9] and result(a)['epochs'] == 1.5
    b = unbroken('full', '--epochs=1.5', '--eval_interval=4')
    assert [r['step'] for r in log(b) if 'val_loss' in r] == [4, 6, 8, 9] and log(b, 'epoch')[1::2] == [1.0, 1.5]
    assert_close_weights(a, b, 0)
    c = unbroken('full', '--train_samples=40', '--epochs=2')
    assert [r['step'] for r in log(c) if 'train_loss' in r] == [3, 5] and result(c)['steps'] == 5
    d = unbroken('full', '--keep_best=True', '--learning_rate=0.05', '--schedule=constant')
    accuracies, found = log(d, 'val_accuracy'), result(d)
    assert found['accuracy'] == max(accuracies) and found['weights'] == f'best, step {6 * (1 + np.argmax(accuracies))}'
    assert checkpoint(d, 'best.pt')['step'] == 6 * (1 + np.argmax(accuracies))


# ------------------------------------------------------------------------------------------------------------ mistakes


MISTAKES = [
    (('--text_columns=text',), "has no column 'text'"), (('--label_column=lable',), "did you mean 'label'?"),
    (('--eval_file={data}/unknown.csv',), "label 'positive' is none of down, up"),
    (('--eval_file={data}/empty.csv',), 'is empty'),
    (('--train_file={data}/header.csv',), 'has no rows below its header'),
    (('--train_file=no.csv',), 'there is no file no.csv'),
    (('--train_file=',), 'task=csv needs --train_file'), (('--model=weightless',), "'weightless': "),
    (('--model=wordless',), 'there is no tokenizer'), (('--model=nosuch/model',), "cannot load model 'nosuch/model'"),
    (('--method=rsdv',), "method='rsdv' is none of"), (('--dtype=int8',), "dtype='int8' is none of"),
    (('--schedule=linaer',), "schedule='linaer' is none of"), (('--max_len=99',), 'this model has 14 positions, max_len=99'),
    (('--quant8=True',), 'quant8 freezes the base'), (('--folds=1',), 'folds=1'), (('--ranks=4,8',), 'full has no rank'),
    (('--folds=97', '--fold=0'), 'folds=97 of 96 texts'), (('--targets=nosuch', '--method=lora'), 'some of '),
    (('--targets=nosuch', '--method=lora', '--init_from=scratch', '--model='), 'no linear layer'),
    (('--task=xnli', '--dataset={data}', '--languages=en'), 'data'), (('--task=xnli', '--languages=()'), 'languages=()'),
    (('--init_from=resume',), 'neither pretrained nor scratch'), (('--batch_size=20',), 'no multiple'),
    (('--eval_only=True',), 'no head for down, up'), (('--energy=0.5',), 'energy=0.5 is for'), (('--rank=0',), 'rank=0'),
    (('--compare=a',), 'one run cannot be compared'), (('--compare=a,b',), 'there is no file a/predictions.csv'),
    (('--n_head=5', '--init_from=scratch', '--model='), 'n_head=5'), (('--compare=a.csv,b.csv',), 'there is no file a.csv'),
    (('--top_fraction=0', '--method=lora_topr'), 'top_fraction=0.0'), (('--grad_clip=-1',), 'grad_clip=-1.0 must be 0 or more'),
    (('--epochs=0',), 'epochs=0.0, max_iters=0: nothing to train'), (('--train_samples=-1',), 'train_samples=-1 must be 0'),
    (('--n_head=3', '--init_from=scratch', '--model='), 'n_embd=32 is no multiple of n_head=3'),
    (('--stagger=-1', '--method=rsvd'), 'stagger=-1 must be 0 or more'),
]


def test_mistakes_are_one_line(refused, folder, base, data):
    """Each ends with exit status 2 and one line that says what is wrong, no traceback, and no out_dir."""
    cwd = folder()
    shutil.copytree(base, cwd / 'weightless')
    (cwd / 'weightless' / 'model.safetensors').unlink()
    shutil.copytree(base, cwd / 'wordless')
    for name in ('tokenizer.json', 'tokenizer_config.json'):
        (cwd / 'wordless' / name).unlink()
    refused('finetune_cls', [([o.format(data=data) for o in options], said) for options, said in MISTAKES], cwd)


def test_every_language_is_evaluated_or_missed_in_one_line(start, folder, tmp_path):
    """One language of two without a split is an error that names the split; two languages have a result each."""
    from readers.texts import build
    rows = lambda: [(text, 'also ' + text, label) for text, label in texts(40, 3)]
    build(tmp_path / 'x', dict(task='xnli', labels=['negative', 'positive'], text=['premise', 'hypothesis'],
                                              label='label', source='here', revision='1'),
                         {'train': rows, 'val-en': rows, 'val-de': lambda: rows()[::-1]})
    cwd = folder()
    job = start(SCRIPT, 'tiny.py', '--task=xnli', f'--dataset={tmp_path}/x', '--languages=en,fr', cwd=cwd)
    assert "no split 'val-fr'; it has" in one_error(job.wait()) and not (cwd / 'out').exists()
    done = start(SCRIPT, 'tiny.py', '--task=xnli', f'--dataset={tmp_path}/x', '--languages=en,de', cwd=cwd).wait()
    assert done.code == 0, done.err
    found = result(cwd)
    assert found['languages']['en']['accuracy'] == found['languages']['de']['accuracy'] == found['accuracy']
    assert len(table(cwd / 'out' / 'predictions.csv')) == 80


# -------------------------------------------------------------------------------------------------------------- sweeps


def test_ranks_and_folds(start, folder, data):
    """A run for each rank and fold; every training text is held out in one fold of each rank; the same command again
    trains nothing."""
    cwd = folder()
    options = ('--method=lora', '--ranks=2,4', '--folds=3', '--max_iters=2', '--eval_file=')
    done = start(SCRIPT, 'tiny.py', *options, cwd=cwd, patch=SWEEP_FORKS).wait()
    assert done.code == 0 and done.err == '', done.err
    rows = table(cwd / 'out' / 'sweep.csv')
    assert [(r['rank'], r['fold']) for r in rows] == [(r, f) for r in '24' for f in '012']
    labels = [r['label'] for r in table(data / 'train2.csv')]
    for rank in '24':
        held = [r for f in '012' for r in table(cwd / 'out' / f'r{rank}' / f'fold{f}' / 'predictions.csv')]
        assert sorted(int(r['index']) for r in held) == list(range(96))
        assert all(r['label'] == labels[int(r['index'])] for r in held)
    assert re.search(r'lora rank 2: accuracy [\d.]+% ± [\d.]+% over 3 folds', done.out)
    assert '64 texts to train on, 32  to evaluate' in done.out
    sweep = (cwd / 'out' / 'sweep.csv').read_bytes()
    os.remove(cwd / 'out' / 'r4' / 'fold2' / 'last.pt')
    again = start(SCRIPT, 'tiny.py', *options, cwd=cwd, patch=SWEEP_FORKS).wait()
    assert again.code == 0 and again.out.count('is reached: nothing to do') == 5, again.err
    drop = lambda raw: [line.rsplit(b',', 3)[0] for line in raw.splitlines()]
    assert drop((cwd / 'out' / 'sweep.csv').read_bytes()) == drop(sweep)


def test_compare(start, unbroken, folder, scratch):
    """Two runs' folders; a third has another test set."""
    a, b, cwd = unbroken('full'), unbroken('lora'), folder()
    done = start(SCRIPT, f'--compare={a}/out,{b}/out', cwd=cwd).wait()
    assert done.code == 0 and 'McNemar exact p = ' in done.out and 'of 41; difference' in done.out
    assert f'{result(b)["accuracy"]:.2%}' in done.out
    assert 'not the same test set' in one_error(start(SCRIPT, f'--compare={a}/out,{scratch}/out', cwd=cwd).wait())
