"""finetune_cls.py as people run it: every method trains what it should, its figures are true, stops and resumes bit for bit,
the same on two processes, mistakes in one line."""
import csv
import itertools
import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml

import common
import layers
import optim
from conftest import CHECKSUMS, NAN_LOSS, ROOT, assert_same_state, checkpoint, flat, kill_at, log, one_error, ranks, wait_all
from forked import SWEEP_FORKS
from pretrained import adapters, hf

SCRIPT = ROOT / 'finetune_cls.py'
MEASURED = {'peak_bytes', 'resident_bytes', 'gradient_bytes'}         # more than those that log() leaves out
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
NEW = 'up', 'down'              # labels
METHODS = {'full': (), 'lora': (), 'qlora': (), 'lora_topr': ('--quant8=True',), 'rsvd': (),
           'rsvd columns': ('--column_v=True',), 'rsvd_svt': (), 'rsvd_svt energy': ('--energy=0.9',),
           'weight_reduction': (), 'weight_reduction_svt': ()}
RESUMED = {'rsvd': ('--state_dtype=8bit', '--rank_fraction=0.25'), 'lora': ('--lora_dropout=0.2',),
           'weight_reduction_svt': ('--dtype=float16',)}
COLUMNS = {'epoch_loss.csv': 'epoch,step,train_loss,eval_loss,eval_accuracy',
           'epoch_peak_memory.csv': 'epoch,peak_bytes,resident_bytes',
           'flops_profiler_stats.csv': 'module,forward_flops,backward_flops',
           'forward_pass.csv': 'texts,tokens,forward_flops,peak_bytes,ms', 'memory_breakdown.csv': 'part,bytes',
           'optimizer_memory.csv': 'optimizer,method,rank,bytes,adam_bytes,saved', 'predictions.csv': 'index,label,prediction'}
# The third epoch ruins the weights.
RUINED = """
import common
def lr_at(step, *args, plain=common.lr_at):
    return 0.5 if step >= 12 else plain(step, *args)
common.lr_at = lr_at
"""
EIGHT = '--micro_batch_size=16', '--max_iters=8', '--learning_rate=3e-3'    # at 1e-2 rounding decides after three steps
BEST = '--keep_best=True', '--micro_batch_size=0'


# ------------------------------------------------------------------------------------------------------------ fixtures


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
    tables = {'train': texts(96, 1), 'eval': texts(41, 2), 'train2': texts(96, 1, NEW),
              'eval2': texts(41, 2, NEW), 'reversed': texts(41, 2)[::-1],
              'unknown': [('good', 'positive'), ('odd', 'neither')]}
    for name, rows in tables.items():
        with open(folder / f'{name}.csv', 'w', newline='') as f:
            csv.writer(f).writerows([('sentence', 'label'), *rows])
    return folder


@pytest.fixture(scope='module')
def scratch(train, data, tmp_path_factory):
    """The folder of a run of SCRATCH."""
    cwd = tmp_path_factory.mktemp('scratch')
    (cwd / 'tiny.py').write_text(SCRATCH.format(folder=str(data)))
    assert train(cwd=cwd).err == ''
    return cwd


@pytest.fixture(scope='module')
def base(scratch):
    return scratch / 'out' / 'distilbert-scratch-csv-full'


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
    """unbroken(name of METHODS, *options) -> the folder of such a run, made once."""
    made = {}

    def run(name, *options, patch=''):
        if (name, options, patch) not in made:
            made[name, options, patch] = folder()
            train(f'--method={name.split()[0]}', *METHODS[name], *options, cwd=made[name, options, patch], patch=patch)
        return made[name, options, patch]
    return run


@pytest.fixture(scope='module')
def two_ranks(start):
    """two_ranks(*options, cwd=..., patch=...) -> the Results of rank 0 and 1 of one run."""
    def run(*options, **how):
        done = wait_all([start(SCRIPT, 'tiny.py', *options, **how, **r) for r in ranks(2)])
        assert [d.code for d in done] == [0, 0], [d.err for d in done]
        return done
    return run


@pytest.fixture(scope='module')
def runs(in_turn):
    """runs((cwd, options), ..., code=0) -> a Result of each of these runs of tiny.py, all in one process; code: of the last."""
    def run(*commands, code=0):
        done = in_turn([(SCRIPT, cwd, ['tiny.py', *options]) for cwd, options in commands])
        assert [d.code for d in done] == [0] * (len(done) - 1) + [code], [d.err for d in done]
        return done
    return run


def table(path):
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


def result(where, name='results.yaml', out='out'):
    return yaml.safe_load((where / out / name).read_text())


def predictions(where, out='out'):
    return (where / out / 'predictions.csv').read_bytes()


def model_folder(where):
    folder, = [p for p in (where / 'out').iterdir() if p.is_dir() and p.name != 'base']
    return folder


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def assert_same_run(a, b):
    """Weights, optimizer, counters, log, figures, the folder of the model: bit for bit."""
    one, two = checkpoint(a), checkpoint(b)
    scaler = ('scaler',) * (one['config']['dtype'] == 'float16')
    assert_same_state(one, two, ('step', 'model', 'optimizer', 'epoch_loss', *scaler))
    unmeasured = lambda where: [{k: v for k, v in r.items() if k not in MEASURED} for r in log(where)]
    assert unmeasured(a) == unmeasured(b)
    assert predictions(a) == predictions(b) and table(a / 'out' / 'epoch_loss.csv') == table(b / 'out' / 'epoch_loss.csv')
    assert contents(model_folder(a)) == contents(model_folder(b))


# ------------------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize('name', METHODS)
def test_every_method_learns_and_trains_what_it_should(unbroken, base, name):
    """The training loss falls; only the parameters of the method change, all others stay those of the model, bit for bit."""
    where = unbroken(name)
    losses = [float(row['train_loss']) for row in table(where / 'out' / 'epoch_loss.csv')]
    assert losses[-1] < 0.75 * losses[0] and len(losses) == 3
    trained, state = result(where)['trained_parameters'], checkpoint(where)['model']
    before = hf.load(str(base), NEW)[0].state_dict()
    if name.startswith(('full', 'rsvd')):
        assert trained == result(where)['parameters'] == sum(t.numel() for t in before.values())
        assert state.keys() == before.keys() and not any(torch.equal(state[k], before[k]) for k in state)
        return
    low, layer = 'AcB' if name.startswith('weight') else ('lora_A', 'lora_B'), 'distilbert.transformer.layer.0.attention.'
    head = {f'{part}classifier.{kind}' for part in ('', 'pre_') for kind in ('weight', 'bias')}
    assert trained == 32 * 32 + 32 + 2 * 32 + 2 + 3 * (2 * 4 * 32 + 4 * ('c' in low))
    # what is frozen is in the model's own folder
    assert state.keys() == head | {f'{layer}{key}_lin.{ab}' for key in 'qkv' for ab in low}
    if name.startswith('weight'):
        net, _, _, fresh = hf.load(str(model_folder(where)), NEW)
        after, weights = net.state_dict(), {f'{layer}{key}_lin.weight' for key in 'qkv'}
        assert not fresh and {k for k in before if not torch.equal(after[k], before[k])} == head | weights
        assert all(torch.linalg.matrix_rank(after[k], atol=1e-5) <= (2 if name.endswith('svt') else 4) for k in weights)


@pytest.mark.parametrize('name', METHODS)
def test_every_figure_of_a_run_is_true(unbroken, base, data, name):
    """All columns exist, parts of memory add up, optimizer bytes are those of real states, accuracy is that of predictions."""
    where = unbroken(name)
    out, figures, method = where / 'out', result(where), name.split()[0]
    for file, columns in COLUMNS.items():
        assert ','.join(table(out / file)[0]) == columns
    memory = {row['part']: int(row['bytes']) for row in table(out / 'memory_breakdown.csv')}
    assert list(memory) == ['parameters', 'buffers', 'gradients', 'optimizer', 'rest', 'peak']
    assert sum(memory.values()) == 2 * memory['peak'] and min(memory.values()) > 0
    assert memory['peak'] == figures['peak_bytes'] == max(int(r['peak_bytes']) for r in table(out / 'epoch_peak_memory.csv'))
    assert memory['gradients'] == figures['gradient_bytes']
    state = checkpoint(where)['optimizer']['state']
    used = sum(t.nbytes for t in flat(state).values() if torch.is_tensor(t))
    row, = table(out / 'optimizer_memory.csv')
    assert int(row['bytes']) == figures['optimizer_bytes'] == memory['optimizer'] == used and row['method'] == method
    net = hf.load(str(base), NEW)[0]
    adam = torch.optim.AdamW(net.parameters())
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    adam.step()
    assert int(row['adam_bytes']) == optim.optimizer_bytes(adam)
    expected, rows = table(data / 'eval2.csv'), table(out / 'predictions.csv')
    assert [r['label'] for r in rows] == [r['label'] for r in expected] and [int(r['index']) for r in rows] == list(range(41))
    assert figures['accuracy'] == np.mean([r['label'] == r['prediction'] for r in rows]) == log(where, 'val_accuracy')[-1]
    assert figures['n'] == 41 and figures['eval_loss'] == log(where, 'val_loss')[-1]
    assert figures['steps'] == 18 and figures['epochs'] == 3 and figures['method'] == method
    assert figures['f1_label'] == 'up' and 0 < figures['ms_per_sample'] < 1000
    bases = [s['basis'].shape[1] for s in state.values() if 'basis' in s]
    assert figures['basis_ranks'] == ([min(bases), max(bases)] if bases else None) and bool(bases) == method.startswith('rsvd')
    assert [float(r['train_loss']) for r in table(out / 'epoch_loss.csv')] == pytest.approx(
        np.mean(np.reshape(log(where, 'loss'), (3, 6)), axis=1))
    assert [r['step'] for r in log(where) if 'loss' in r] == list(range(1, 19))


def test_flops_are_those_of_a_count_by_hand(unbroken):
    """Linear layers, attention and head of the forward pass, of both micro-batches of a step, each padded to 8 or 14; the
    backward pass twice that (an embedding has a gradient, so nothing is left out), for attention 2.5 times."""
    out, n, d = unbroken('full') / 'out', 8, 32
    dense, attention = (lambda t: 2 * n * t * d * d * (4 + 8) + 2 * n * d * (d + 2)), (lambda t: 4 * n * t * t * d)
    row, = table(out / 'forward_pass.csv')
    t = int(row['tokens'])
    assert int(row['texts']) == n and t in (8, 14) and int(row['forward_flops']) == dense(t) + attention(t)
    counts = {r['module']: [int(r[key] or 0) for key in ('forward_flops', 'backward_flops')]
              for r in table(out / 'flops_profiler_stats.csv')}
    by_hand = {ts: [sum(dense(t) + attention(t) for t in ts), sum(2 * dense(t) + attention(t) * 5 // 2 for t in ts)]
               for ts in ((8, 8), (8, 14), (14, 14))}
    ts, = [ts for ts, count in by_hand.items() if count == counts['Global']]
    name = 'DistilBertForSequenceClassification.distilbert.transformer.layer.0.ffn.lin1'
    assert counts[name] == [sum(2 * n * t * d * 4 * d for t in ts), 0]


def test_projected_gradients_are_small_and_the_same_training(unbroken):
    """Against --projected=False: the losses to rounding; fewer bytes of gradients than that and than full training."""
    a, b = (unbroken('rsvd', *EIGHT, *more) for more in ((), ('--projected=False',)))
    assert log(a, 'loss') == pytest.approx(log(b, 'loss'), abs=1e-2)
    assert log(a, 'loss')[:5] == pytest.approx(log(b, 'loss')[:5], abs=1e-4)
    full = result(unbroken('full'))
    assert full['gradient_bytes'] == result(b)['gradient_bytes'] == 4 * full['parameters']
    assert max(result(where)['gradient_bytes'] for where in (a, unbroken('rsvd'))) < 0.5 * full['gradient_bytes']


def test_gradient_checkpointing_and_low_precision_hardly_change_the_training(runs, folder, unbroken):
    """Weights with recomputed activations are equal to rounding, losses in 16 bits near those in 32; what is trained stays
    float32."""
    cwds = {name: folder() for name in ('rsvd', 'lora', 'full', 'qlora')}
    options = dict.fromkeys(('rsvd', 'lora'), '--gradient_checkpointing=True') | {
        'full': '--dtype=float16', 'qlora': '--dtype=bfloat16'}
    runs(*((cwd, (f'--method={name}', options[name])) for name, cwd in cwds.items()))
    for name in ('rsvd', 'lora'):
        one, two = (checkpoint(where)['model'] for where in (unbroken(name), cwds[name]))
        assert one.keys() == two.keys() and max((one[k] - two[k]).abs().max().item() for k in one) <= 2e-5
    for name in ('full', 'qlora'):
        assert log(cwds[name], 'loss') != log(unbroken(name), 'loss')
        assert log(cwds[name], 'train_loss') == pytest.approx(log(unbroken(name), 'train_loss'), abs=0.1)
        assert {t.dtype for t in checkpoint(cwds[name])['model'].values()} == {torch.float32}


# ------------------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize('method', RESUMED)
def test_stopped_and_resumed_equals_unbroken(train, runs, folder, unbroken, method):
    """Stopped between two bases or truncations, with dropout, 8-bit moments or loss scaling; then once more when all is done.
    Seconds of training add up: the test adds ten thousand of them to a checkpoint. It may lack column_v, as older ones do."""
    cwd, whole = folder(), unbroken(method, *RESUMED[method])
    options = f'--method={method}', *RESUMED[method], '--resume=auto'
    assert 'stopped at step 7;' in train(*options, cwd=cwd, patch=kill_at(6)).out
    state = checkpoint(cwd)
    state['meter']['seconds'] += 10_000
    del state['described']['column_v']
    common.save_checkpoint(str(cwd / 'out' / 'last.pt'), state)
    done = runs((cwd, options), (cwd, options))
    assert 'resumed from out/last.pt at step 7' in done[0].out and 'step 18 of 18 is reached' in done[1].out
    assert_same_run(cwd, whole)
    assert 0 < result(whole, 'resource_usage.yaml')['training_s'] < 10_000 < result(cwd, 'resource_usage.yaml')['training_s']
    assert method != 'rsvd' or result(whole)['basis_ranks'][1] == 8         # a quarter of 32, not the 4 of --rank


def test_counting_flops_changes_nothing(train, runs, folder):
    """The FLOPs of the last step are counted in a pass before it. With a new basis in each step, dropout and a rate that does
    not end at 0, a run resumed at that step still equals an unbroken one."""
    options = ('--method=rsvd', '--dropout=0.2', '--interval=1', '--schedule=constant', '--max_iters=4', '--stagger=0')
    whole, cwd = folder(scratch=True), folder(scratch=True)
    train(*options, cwd=cwd, patch=kill_at(2))
    runs((whole, options), (cwd, (*options, '--resume=auto')))
    assert_same_run(cwd, whole)


OTHERS = [('lora', '--rank=8', 'rank (4, not 8)'), ('lora', '--lora_alpha=8', 'lora_alpha (0.0, not 8.0)'),
          ('lora', '--quant8=True', 'quant8 (False, not True)'), ('lora', '--dtype=bfloat16', 'dtype (float32, not bfloat16)'),
          ('lora', '--targets=q_lin', "targets ((), not ('q_lin',))"), ('lora', '--model={turned}', 'frozen weights'),
          ('rsvd', '--side=left', 'side (right, not left)'), ('rsvd', '--state_dtype=8bit', 'state_dtype (fp32, not 8bit)'),
          ('rsvd', '--adam_for=()', "adam_for (('head',), not ())"), ('rsvd', '--column_v=True', 'column_v (False, not True)'),
          ('rsvd', '--rank_fraction=0.1', 'rank_fraction (0.0, not 0.1)')]


def test_what_a_resume_may_not_change(refused, folder, unbroken, base, tmp_path):
    """Another rank, base or precision is refused in one line that has the old and the new value, and loses nothing."""
    from safetensors.torch import load_file, save_file
    turned, cwd = shutil.copytree(base, tmp_path / base.name), folder()
    weights = load_file(turned / 'model.safetensors')
    weights['distilbert.transformer.layer.0.ffn.lin1.weight'].neg_()
    save_file(weights, turned / 'model.safetensors', {'format': 'pt'})
    for method in ('lora', 'rsvd'):
        shutil.copytree(unbroken(method) / 'out', cwd / method)
    before = contents(cwd)
    refused('finetune_cls', [((f'--method={method}', f'--out_dir={method}', option.format(turned=turned), '--resume=auto'), why)
                             for method, option, why in OTHERS], cwd)
    assert contents(cwd) == before


# ------------------------------------------------------------------------------------------------- numbers of processes


def test_two_processes_train_rsvd_as_one_does(two_ranks, folder, unbroken):
    """The losses agree to rounding, the ranks to the bit, or the run would end with an error; figures are those of both."""
    cwd = folder()
    done = two_ranks('--method=rsvd', *EIGHT[1:], cwd=cwd)
    assert '8 x 1 micro-steps x 2 processes' in done[0].out and done[1].out == ''
    one = unbroken('rsvd', *EIGHT)
    assert log(cwd, 'loss')[:5] == pytest.approx(log(one, 'loss')[:5], abs=1e-4)
    for column in ('loss', 'val_loss'):             # Adam in a random basis makes as much of rounding as of a gradient
        assert log(cwd, column) == pytest.approx(log(one, column), abs=1e-2)
    assert min(int(row['bytes']) for row in table(cwd / 'out' / 'memory_breakdown.csv')) >= 0
    usage = result(cwd, 'resource_usage.yaml')
    assert usage['processes'] == 2 and usage['energy_j'] is None and usage['ms_per_sample'] > 0


def test_two_processes_keep_the_best_weights_as_one_does(two_ranks, unbroken, folder):
    """The third epoch ruins the weights: both ranks go back to the best ones before they share out what is reported."""
    one, two = unbroken('full', *BEST, patch=RUINED), folder()
    two_ranks(*BEST, cwd=two, patch=RUINED)
    accuracies, figures = log(one, 'val_accuracy'), [result(where) for where in (one, two)]
    best, step = max(accuracies), 6 * (1 + np.argmax(accuracies))
    assert accuracies[-1] < best - 0.2 and log(one, 'val_loss')[-1] > 1
    assert figures[0]['accuracy'] == figures[1]['accuracy'] == best
    assert figures[0]['weights'] == figures[1]['weights'] == f'best, step {step}'
    assert predictions(one) == predictions(two)
    assert figures[0]['eval_loss'] == pytest.approx(figures[1]['eval_loss'], abs=1e-3)
    assert checkpoint(one, 'best.pt')['step'] == checkpoint(two, 'best.pt')['step'] == step


# ------------------------------------------------------------------------------------------------- numbers going wrong


def test_float16_skips_a_step_that_overflows(train, folder):
    """The loss of one step is 10,000 times as large: no update in it, half the scale from then on, training goes on."""
    cwd = folder()
    patch = CHECKSUMS + NAN_LOSS.format(call=2 * 4 + 1, rank=0).replace("float('nan')", '1e4')
    train('--method=rsvd', '--dtype=float16', '--max_iters=8', cwd=cwd, patch=patch)
    sums, state, norms = (cwd / 'sums0').read_text().split(), checkpoint(cwd), log(cwd, 'grad_norm')
    assert norms[4] is None and state['step'] == len(sums) == len(norms) == 8
    assert [before == after for before, after in itertools.pairwise(sums)] == [norm is None for norm in norms[:-1]]
    assert state['scaler'] == [2.0 ** (16 - norms.count(None)), 3]
    assert log(cwd, 'loss')[4] > 1000 > log(cwd, 'loss')[5]


def test_grad_clip_bounds_the_norm(runs, folder):
    """After one step Adam's first moments are a tenth of the gradient: at most 0.005 here, and over 0.01 without clipping."""
    cwds = {method: folder() for method in ('full', 'rsvd')}
    runs(*((cwd, (f'--method={method}', '--max_iters=1', '--grad_clip=0.05', '--stagger=0')) for method, cwd in cwds.items()))
    for method, cwd in cwds.items():
        moments = [s['exp_avg'] for s in checkpoint(cwd)['optimizer']['state'].values() if 'exp_avg' in s]
        norm, without = torch.nn.utils.get_total_norm(moments).item(), log(cwd, 'grad_norm')[0] / 0.05
        assert norm <= 0.005 * 1.0001 and norm * without > 0.01, (method, norm, without)


# ---------------------------------------------------------------------------------------------- evaluation and folders


def test_evaluated_again_from_run_and_from_folder(runs, folder, unbroken):
    """eval_only of the run, or of the model folder that it wrote, has the predictions and the loss of the end of training."""
    cwds, commands = {name: folder() for name in ('full', 'weight_reduction_svt', 'lora')}, []
    for name, cwd in cwds.items():
        shutil.copytree(unbroken(name) / 'out', cwd / 'out')
        (cwd / 'out' / 'predictions.csv').unlink()
        commands.append((cwd, (f'--method={name}', '--eval_only=True')))
        if name != 'lora':
            model = f'--model={model_folder(unbroken(name))}'
            commands.append((cwd, ('--eval_only=True', model, '--train_file=', '--out_dir=again')))
    runs(*commands)
    for name, cwd in cwds.items():
        whole = unbroken(name)
        assert predictions(cwd) == predictions(whole) and result(cwd)['eval_loss'] == result(whole)['eval_loss']
        assert (cwd / 'out' / 'last.pt').read_bytes() == (whole / 'out' / 'last.pt').read_bytes()
        if name != 'lora':
            again = result(cwd, out='again')
            assert predictions(cwd, 'again') == predictions(whole) and again['optimizer_bytes'] is None
            assert again['eval_loss'] == pytest.approx(result(whole)['eval_loss'], abs=1e-5)


def test_eval_only_of_a_named_checkpoint(runs, folder, unbroken):
    """--eval_only takes the weights of the checkpoint in --resume, and those of last.pt without one."""
    ruined, other, cwds = unbroken('full', *BEST, patch=RUINED), unbroken('full') / 'out' / 'last.pt', [folder(), folder()]
    for cwd in cwds:
        shutil.copytree(ruined / 'out', cwd / 'out')
    options = ('--resume=out/best.pt',), ('--resume=out/best.pt', '--out_dir=new'), (), (f'--resume={other}',)
    done = runs(*((cwd, ('--eval_only=True', *some)) for cwd, some in zip(cwds[:1] * 2 + cwds[1:] * 2, options, strict=True)),
                code=2)
    best, last = (result(cwd)['eval_loss'] for cwd in cwds)
    assert best == result(cwds[0], out='new')['eval_loss'] == result(ruined)['eval_loss'] < 1
    assert last == log(ruined, 'val_loss')[-1] > 1 and 'out holds a run' in one_error(done[-1])


def test_labels_and_words_are_those_of_the_model(runs, folder, scratch, base, data):
    """A model with its labels in the other order gives the same predictions and F1, also after more training; so does an
    evaluation file with its labels in another order for a run from scratch, which keeps its vocabulary."""
    cwd, copy = folder(scratch=True), folder(scratch=True)
    shutil.copytree(scratch / 'out', copy / 'out')
    net, tokenizer, _, _ = hf.load(str(base), ['negative', 'positive'])
    for p in (net.classifier.weight, net.classifier.bias):
        p.data = p.data.flip(0)
    net.config.id2label, net.config.label2id = {0: 'Positive', 1: 'Negative'}, {'Positive': 0, 'Negative': 1}
    hf.save(net, tokenizer, cwd / 'turned')
    turned, only = ('--init_from=pretrained', '--model=turned'), '--eval_only=True'
    done = runs((copy, (only, f'--eval_file={data}/reversed.csv')), (cwd, (only, *turned, '--out_dir=b')),
                (cwd, (only, '--init_from=pretrained', f'--model={base}', '--out_dir=a')),
                (cwd, (*turned, '--max_iters=1', '--learning_rate=1e-5')),
                (cwd, (only, *turned, '--resume=out/last.pt', '--out_dir=again')))
    guesses = [[r['prediction'] for r in table(where / 'out' / 'predictions.csv')] for where in (scratch, copy)]
    assert guesses[0] == guesses[1][::-1] and result(copy)['accuracy'] == result(scratch)['accuracy'] > 0.9
    assert predictions(cwd, 'a') == predictions(cwd, 'b')
    figures = {out: result(cwd, out=out) for out in ('a', 'b', 'out', 'again')}
    for one, two in (('a', 'b'), ('out', 'again')):
        assert all(figures[one][key] == figures[two][key] for key in ('f1', 'f1_low', 'f1_high', 'f1_label', 'accuracy'))
        assert figures[one]['f1_label'] == 'positive' and figures[one]['accuracy'] > 0.9
    assert figures['out']['eval_loss'] == figures['again']['eval_loss']
    assert '2 labels: positive, negative' in done[3].out and ', new)' not in done[3].out
    assert json.loads((model_folder(cwd) / 'config.json').read_text())['id2label'] == {'0': 'positive', '1': 'negative'}


def test_saved_adapters_load_onto_their_base(train, folder, unbroken, base, data):
    """load_adapters() gives the logits of the trained model, and so does peft; a run from scratch saves the base as well."""
    where = folder(scratch=True)
    train('--method=lora', '--max_iters=6', cwd=where)
    at, folder, state = str(where / 'out' / 'base'), model_folder(where), checkpoint(where)
    configs = [json.loads((f / 'adapter_config.json').read_text()) for f in (folder, model_folder(unbroken('lora')))]
    assert [config['base_model_name_or_path'] for config in configs] == ['out/base', str(base)]
    assert all(config['modules_to_save'] == ['classifier', 'pre_classifier'] for config in configs)
    bare = lambda: hf.load(at, state['described']['labels'])
    trained, (net, tokenizer, _, _) = bare()[0], bare()
    layers.convert(trained, {'*.[qkv]_lin': ('lora', dict(rank=4, alpha=4.0))}, verbose=False)
    assert not trained.load_state_dict(state['model'], strict=False).unexpected_keys
    rows = hf.encode(tokenizer, [(row['sentence'],) for row in table(data / 'eval.csv')], 14)
    logits = lambda net: net.eval()(**hf.collate(tokenizer, rows, 14)).logits
    guesses = [trained.config.id2label[i] for i in logits(trained).argmax(1).tolist()]
    assert guesses == [r['prediction'] for r in table(where / 'out' / 'predictions.csv')]
    assert len(adapters.load_adapters(net, folder)) == 3 and torch.equal(logits(net), logits(trained))
    peft = pytest.importorskip('peft', reason='peer test: needs peft')
    theirs = peft.PeftModel.from_pretrained(bare()[0], folder)
    torch.testing.assert_close(logits(theirs), logits(trained), rtol=0, atol=1e-5)


def test_decoders_and_bitnet(runs, folder, base):
    """GPT-Neo trains with an int8 base, GPT-2 with rsvd, BitNet with LoRA and in full; targets that are not there are named."""
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
    config = json.loads((cwd / 'bit/config.json').read_text())
    config['quantization_config'] = {'quant_method': 'bitnet', 'linear_class': 'autobitlinear', 'quantization_mode': 'online'}
    (cwd / 'bit/config.json').write_text(json.dumps(config))
    done = runs((cwd, ('--model=neo', '--method=lora', '--quant8=True', '--max_iters=2')),
                (cwd, ('--model=gpt', '--method=rsvd', '--max_iters=2', '--out_dir=o2')),
                (cwd, ('--model=bit', '--method=lora', '--max_iters=2', '--out_dir=o3')),
                (cwd, ('--model=bit', '--method=full', '--max_iters=6', '--out_dir=o4')),
                (cwd, ('--model=o4/bit-csv-full', '--eval_only=True', '--out_dir=o5')),
                (cwd, ('--model=gpt', '--method=lora', '--targets=q_proj', '--out_dir=o6')), code=2)
    assert predictions(cwd, 'o4') == predictions(cwd, 'o5')
    assert 'is named q_proj; type --targets= and some of c_attn,c_fc,c_proj' in one_error(done[-1])
    assert not (cwd / 'o6').exists()


# ------------------------------------------------------------------------------------------------------------- lengths


def test_epochs_intervals_and_samples_are_as_asked(train, folder):
    """48 texts are 3 steps an epoch, epochs=1.6 is 5 steps; an evaluation after each epoch, each interval and the last step."""
    cwd = folder()
    train('--train_samples=48', '--epochs=1.6', '--eval_interval=2', cwd=cwd)
    records = [r for r in log(cwd) if 'val_loss' in r]
    assert [(r['step'], r['epoch'], 'train_loss' in r) for r in records] == [
        (2, 0.667, False), (3, 1.0, True), (4, 1.333, False), (5, 1.667, True)]
    assert result(cwd)['steps'] == 5 and result(cwd)['epochs'] == pytest.approx(5 / 3)


# ------------------------------------------------------------------------------------------------------------ mistakes


SMALL = '--init_from=scratch', '--model='
MISTAKES = [
    (('--text_columns=text',), "has no column 'text'"), (('--label_column=lable',), "did you mean 'label'?"),
    (('--eval_file={data}/unknown.csv',), "label 'positive' is none of down, up"),
    (('--train_file=no.csv',), 'there is no file no.csv'), (('--train_file=',), 'task=csv needs --train_file'),
    (('--model=nosuch/model',), "cannot load model 'nosuch/model'"), (('--method=rsdv',), "method='rsdv' is none of"),
    (('--dtype=int8',), "dtype='int8' is none of"), (('--schedule=linaer',), "schedule='linaer' is none of"),
    (('--max_len=99',), 'this model has 14 positions, max_len=99'), (('--quant8=True',), 'quant8 freezes the base'),
    (('--ranks=4,8',), 'full has no rank'), (('--folds=97', '--fold=0'), 'folds=97 of 96 texts'),
    (('--targets=nosuch', '--method=lora'), 'some of '), (('--targets=nosuch', '--method=lora', *SMALL), 'no linear layer'),
    (('--task=xnli', '--dataset={data}', '--languages=en'), 'data'), (('--task=xnli', '--languages=()'), 'languages=()'),
    (('--init_from=resume',), 'neither pretrained nor scratch'), (('--energy=0.5',), 'energy=0.5 is for'),
    (('--eval_only=True',), 'no head for down, up'), (('--compare=a',), 'one run cannot be compared'),
    (('--rank=0',), 'rank=0'), (('--train_samples=-1',), 'train_samples=-1 must be 0'),
    (('--epochs=0',), 'epochs=0.0, max_iters=0: nothing to train'), (('--top_fraction=0',), 'top_fraction=0.0'),
    (('--n_head=3', *SMALL), 'n_embd=32 is no multiple of n_head=3'),
]


def test_mistakes_are_one_line(refused, folder, data):
    """Each ends with exit status 2 and one line that says what is wrong, no traceback, and no out_dir."""
    refused('finetune_cls', [([o.format(data=data) for o in options], why) for options, why in MISTAKES], folder())


def test_every_language_is_evaluated_or_missed_in_one_line(runs, folder, tmp_path):
    """One language of two without a split is an error that names the split; two languages have a result each."""
    from readers.texts import build
    rows = lambda: [(text, 'also ' + text, label) for text, label in texts(40, 3)]
    task = dict(task='xnli', labels=['negative', 'positive'], text=['premise', 'hypothesis'], label='label', source='here',
                revision='1')
    build(tmp_path / 'x', task, {'train': rows, 'val-en': rows, 'val-de': lambda: rows()[::-1]})
    cwd, options = folder(), ('--task=xnli', f'--dataset={tmp_path}/x', '--max_iters=2')
    done = runs((cwd, (*options, '--languages=en,de')), (cwd, (*options, '--languages=en,fr', '--out_dir=none')), code=2)
    figures = result(cwd)
    assert figures['sets']['en']['accuracy'] == figures['sets']['de']['accuracy'] == figures['accuracy']
    assert len(table(cwd / 'out' / 'predictions.csv')) == 80
    assert "no split 'val-fr'; it has" in one_error(done[1]) and not (cwd / 'none').exists()


def test_several_splits_are_evaluated(runs, folder, tmp_path):
    """--eval_split=val,held: both have their figures, of their own rows; those of the first are also those of the run."""
    from readers.texts import build
    task = dict(task='sst2', labels=['negative', 'positive'], text=['sentence'], label='label', source='here', revision='1')
    rows = {split: texts(n, seed) for split, n, seed in (('train', 32, 3), ('val', 21, 4), ('held', 30, 5))}
    build(tmp_path / 'x', task, {split: lambda found=found: found for split, found in rows.items()})
    cwd, options = folder(scratch=True), ('--task=sst2', f'--dataset={tmp_path}/x', '--max_iters=2')
    done = runs((cwd, (*options, '--eval_split=val,held')), (cwd, (*options, '--eval_split=val,x', '--out_dir=none')), code=2)
    guesses, figures = table(cwd / 'out' / 'predictions.csv'), result(cwd)
    for split, found in figures['sets'].items():
        mine = [r for r in guesses if r['set'] == split]
        assert [r['label'] for r in mine] == [label for _, label in rows[split]]
        assert found['accuracy'] == np.mean([r['label'] == r['prediction'] for r in mine]) and found['n'] == len(rows[split])
        assert f'{split}: accuracy {found["accuracy"]:.2%}' in done[0].out
    assert list(figures['sets']) == ['val', 'held'] and figures.items() >= figures['sets']['val'].items()
    assert "no split 'x'; it has train, val, held" in one_error(done[1]) and not (cwd / 'none').exists()


# -------------------------------------------------------------------------------------------------------------- sweeps


def test_ranks_and_folds(start, folder, data):
    """A run for each rank and fold; every training text is held out in one fold of each rank; the same command again
    trains nothing."""
    cwd, outputs, tables = folder(), [], []
    for _ in range(2):
        done = start(SCRIPT, 'tiny.py', '--method=lora', '--ranks=2,4', '--folds=2', '--max_iters=2', '--eval_file=', cwd=cwd,
                     patch=SWEEP_FORKS).wait()
        assert done.code == 0 and done.err == '', done.err
        outputs.append(done.out)
        rows = table(cwd / 'out' / 'sweep.csv')
        tables.append([[row[key] for key in ('rank', 'fold', 'accuracy', 'f1', 'eval_loss')] for row in rows])
        (cwd / 'out' / 'r4' / 'fold1' / 'last.pt').unlink()
    assert tables[0] == tables[1] and [row[:2] for row in tables[0]] == [[r, f] for r in '24' for f in '01']
    labels = [r['label'] for r in table(data / 'train2.csv')]
    for rank in '24':
        rows = [r for f in '01' for r in table(cwd / 'out' / f'r{rank}' / f'fold{f}' / 'predictions.csv')]
        assert sorted(int(r['index']) for r in rows) == list(range(96))
        assert all(r['label'] == labels[int(r['index'])] for r in rows)
    assert re.search(r'lora rank 2: accuracy [\d.]+% ± [\d.]+% over 2 folds', outputs[0])
    assert '48 texts to train on, 48  to evaluate' in outputs[0]
    assert outputs[1].count('is reached: nothing to do') == 3
