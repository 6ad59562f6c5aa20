"""train_bitnet.py as people run it: figures of codes and answers by hand, its twin, estimates, mistakes."""
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn as nn

import common
import layers
import train_bitnet
from conftest import ROOT, all_logits, checkpoint, log, ranks, tiny_bitnet, wait_all
from data.tictactoe import prepare as tictactoe
from readers import tasks, tokens
from report import costs

SCRIPT = ROOT / 'train_bitnet.py'
TINY = """# a BitNet of two blocks that trains 20 steps in half a second
dataset, task = {data!r}, 'arithmetic'
out_dir, device, compile = 'out', 'cpu', False
n_layer, n_head, n_kv_head, n_embd, n_ff, block_size, batch_size, micro_batch_size = 2, 4, 2, 32, 64, 16, 4, 2
max_iters, warmup_iters, eval_interval, eval_iters, log_interval, save_interval, diag_interval = 20, 2, 10, 2, 1, 5, 3
learning_rate, second_lr, min_lr = 1e-2, 5e-3, 1e-3
"""
LEARNED = ('--n_layer=1', '--batch_size=16', '--micro_batch_size=0', '--max_iters=40', '--eval_interval=20',
           '--schedule=constant', '--learning_rate=2e-2')
FP = ('--quant=fp',)

# What a test looks at in a running trainer, as source text run before it.
BATCHES = """
import os
from readers import tokens
def windows(self, starts, length, plain=tokens.TokenData.windows):
    if length == 17:
        with open(self.paths[0].name[:5] + os.environ.get('RANK', '0'), 'a') as f:
            print(*starts, file=f)
    return plain(self, starts, length)
tokens.TokenData.windows = windows
"""
GROUPS = """
import common, json, sys
def seed_step(seed, step, rank, plain=common.seed_step):
    groups = sys._getframe(1).f_locals['opt'].param_groups
    with open('groups', 'a') as f:
        print(json.dumps([[g['lr'], g['weight_decay'], [p.dim() for p in g['params']]] for g in groups]), file=f)
    plain(seed, step, rank)
common.seed_step = seed_step
"""
@pytest.fixture(scope='session')
def sums(tmp_path_factory):
    """A data folder of problems like 34-34=0, of which a tiny model soon gets the answer; of the 13 held out two are others."""
    folder, tokenizer = tmp_path_factory.mktemp('sums'), tokens.byte()
    problems = [tasks.problem(a, '-', a) for a in range(1, 100) if a % 10]
    held_out = [*problems[::9], '12-11=1', '3+4=7']
    rest = [p for p in problems if p not in held_out]
    for split, lines in (('train', np.random.default_rng(0).choice(rest, 1000)), ('val', held_out)):
        tokens.write(folder, split, [tokenizer.encode(''.join(f'{line}\n' for line in lines))], tokenizer)
    return folder


@pytest.fixture(scope='session')
def games(tmp_path_factory):
    folder = tmp_path_factory.mktemp('games')
    tictactoe.main(['--games=300', '--val_games=20', f'--out_dir={folder}'])
    return folder


@pytest.fixture(scope='session')
def pairs(tmp_path_factory):
    """A data folder of another tokenizer."""
    folder, text = tmp_path_factory.mktemp('pairs'), 'the quick brown fox ' * 40
    tokenizer = tokens.train_bpe([text], 265)
    for split in tokens.SPLITS:
        tokens.write(folder, split, [tokenizer.encode(text)], tokenizer)
    return folder


@pytest.fixture(scope='module')
def folder(tmp_path_factory, sums):
    """folder() -> a new folder holding tiny.py, the config all runs start from."""
    def make():
        new = tmp_path_factory.mktemp('run')
        (new / 'tiny.py').write_text(TINY.format(data=str(sums)))
        return new
    return make


def model_of(state, **changes):
    model = train_bitnet.BitNet(train_bitnet.BitNetConfig(**state['model_config'] | changes))
    model.load_state_dict(state['model'])
    return model.eval()


@torch.no_grad()
def val_loss(model, data):
    """The mean over eval_iters * batch_size = 8 windows drawn for step -1."""
    data = tokens.load(data, 'val')
    xy = data.windows(common.sample_indices(1337, -1, len(data) - 16, 8), 17)
    return model(xy[:, :-1], xy[:, 1:]).item()


# ------------------------------------------------------------------------------------------------ numbers of processes


def test_two_processes_equal_one(start, train, folder):
    """Training and evaluation take the same samples in the same order, and the scores are those of one process."""
    options = ('--max_iters=4', '--eval_interval=2')
    one, two = folder(), folder()
    train(*options, cwd=one, patch=BATCHES)
    done = wait_all([start(SCRIPT, 'tiny.py', *options, cwd=two, patch=BATCHES, **r) for r in ranks(2)])
    assert [d.code for d in done] == [0, 0] and done[1].out == '', [d.err for d in done]
    for split, n in (('train', 8), ('val_0', 12)):
        seen = [(two / f'{split}{rank}').read_text().splitlines() for rank in (0, 1)]
        taken = [line for both in zip(*seen, strict=True) for line in both]
        assert taken == (one / f'{split}0').read_text().splitlines() and len(taken) == n
    assert log(two, 'val_loss') == pytest.approx(log(one, 'val_loss'), abs=1e-4, rel=0)
    assert log(two, 'exact_match') == log(one, 'exact_match') and len(log(two, 'exact_match')) == 3


# -------------------------------------------------------------------------------------------------- rates and decay


@pytest.mark.parametrize('options, schedule, decays', [
    (('--max_iters=13', "--lr_scale={'tern': 3.0}"), 'two_stage', [0.1] * 6 + [0.0] * 7),
    ((*FP, '--max_iters=8'), 'two_stage', [0.1] * 8),
    (('--max_iters=8', '--schedule=cosine', '--weight_decay=0.3'), 'cosine', [0.3] * 8)], ids=['tern', 'fp', 'cosine'])
def test_two_stage_lets_the_decay_end_where_the_rate_drops(train, folder, options, schedule, decays):
    """Weight decay of matrices and of the embedding, step by step: 0 from the middle on for ternary weights, as before for
    the baseline and for other schedules. Gains have none. The rate is that of lr_at with this decay's middle; that of latent
    weights is lr_scale times as high."""
    cwd = folder()
    train(*options, cwd=cwd, patch=GROUPS)
    rates = [common.lr_at(step, schedule, 1e-2, 1e-3, 2, len(decays), 5e-3) for step in range(len(decays))]
    assert log(cwd, 'lr') == rates
    parts = [[1.0, 9]] if FP[0] in options else [[1.0, 1], [3.0 if len(decays) == 13 else 1.0, 8]]      # with latent weights
    assert [json.loads(line) for line in (cwd / 'groups').read_text().splitlines()] == [
            [*([lr * scale, decay, [2] * n] for scale, n in parts), [lr, 0.0, [1] * 9]]
            for lr, decay in zip(rates, decays, strict=True)]
    middle = len(decays) // 2
    assert (rates[middle] < 0.7 * rates[middle - 1]) == (schedule == 'two_stage')


RATES = [(('--learning_rate=0', '--second_lr=0'), 1.5e-3, 1e-3), ((*FP, '--learning_rate=0', '--second_lr=0'), 2.5e-4, 2.5e-4),
         (('--learning_rate=0', '--second_lr=7e-4'), 1.5e-3, 7e-4), (('--learning_rate=6e-3', '--second_lr=0'), 6e-3, 4e-3)]


def test_rates_that_are_not_given_are_the_published_ones(in_turn, folder):
    """Peaks of the first and of the second half: those of the Tips PDF, or what was given; 2/3 of a first one that was."""
    folders = [folder() for _ in RATES]
    more = '--max_iters=4', '--warmup_iters=0', '--min_lr=0', '--eval_interval=9', '--n_layer=1'
    done = in_turn([(SCRIPT, cwd, ['tiny.py', *options, *more]) for cwd, (options, *_) in zip(folders, RATES, strict=True)])
    assert [result.code for result in done] == [0] * 4, done[0].err
    for cwd, (_, first, second) in zip(folders, RATES, strict=True):
        assert log(cwd, 'lr') == pytest.approx([first, first * 2 / 3, second / 3, 0], rel=1e-6)


# ------------------------------------------------------------------------------------------------------ counts of codes


def matrices(state):
    """{'0.q': (codes, scale), ...} of the weights of a checkpoint, literally."""
    result, kv = {}, 16
    for i in range(state['model_config']['n_layer']):
        for layer, rows in (('attn.qkv_proj', {'q': 32, 'k': kv, 'v': kv}), ('attn.o_proj', {'o': 32}),
                            ('mlp.gate_up_proj', {'gate': 64, 'up': 64}), ('mlp.down_proj', {'down': 32})):
            parts = state['model'][f'blocks.{i}.{layer}.weight'].split([*rows.values()])
            result |= {f'{i}.{name}': ((w / w.abs().mean()).round().clamp(-1, 1), w.abs().mean().item())
                      for name, w in zip(rows, parts, strict=True)}
    return result


def test_counts_of_codes_by_hand(train, folder, unbroken):
    """Shares of -1, 0 and 1, the codes that step 6 flipped, rows of zeros, scales and how far they went from the start: those
    of the checkpoints of steps 5 and 6 and of the weights begun with, for each matrix and for all of them; a run that goes on
    counts from the same start."""
    cwd = folder()
    begun = checkpoint(unbroken(*FP), 'best.pt')
    begun['model']['blocks.1.mlp.gate_up_proj.weight'][[3, 5]] = 0
    begun['model']['blocks.0.attn.qkv_proj.weight'][40] = 0                 # of k
    common.save_checkpoint(str(cwd / 'begun.pt'), begun)
    train('--init_from=begun.pt', '--max_iters=6', '--save_interval=1', '--learning_rate=5e-3', cwd=cwd)
    records = [r for r in log(cwd) if 'matrices' in r]
    assert [(r['step'], r['tokens']) for r in records] == [(3, 192), (6, 384)]
    first, before, after = (matrices(s) for s in (begun, checkpoint(cwd, 'last.prev.pt'), checkpoint(cwd)))
    assert checkpoint(cwd, 'last.prev.pt')['step'] == 5
    assert records[1]['matrices'].keys() == after.keys() and len(after) == 14
    sums = dict.fromkeys(('minus', 'zero', 'plus', 'flips', 'n', 'dead'), 0)
    for name, (codes, scale) in after.items():
        logged, n = records[1]['matrices'][name], codes.numel()
        here = {'minus': (codes == -1).sum().item(), 'zero': (codes == 0).sum().item(), 'plus': (codes == 1).sum().item(),
                'flips': (codes != before[name][0]).sum().item()}
        assert {k: logged[k] for k in here} == {k: count / n for k, count in here.items()}
        assert logged['dead_rows'] == {'1.gate': 2, '0.k': 1}.get(name, 0) == (codes.abs().amax(1) == 0).sum()
        assert logged['scale'] == pytest.approx(scale, rel=1e-6)
        assert logged['scale_ratio'] == pytest.approx(scale / first[name][1], rel=1e-5)
        for key, count in (here | {'n': n, 'dead': logged['dead_rows']}).items():
            sums[key] += count
    assert sums['n'] == 18432 and sums['flips'] > 10
    assert {k: records[1][k] for k in here} == pytest.approx({k: sums[k] / sums['n'] for k in here}, rel=1e-12)
    assert records[1]['dead_rows'] == sums['dead'] == 3
    drift = [abs(math.log(after[name][1] / first[name][1])) for name in after]
    assert records[1]['scale_drift'] == pytest.approx(sum(drift) / 14, rel=1e-3) and min(drift) > 1e-5
    start = checkpoint(cwd)['start_scales']
    assert start == pytest.approx({name: scale for name, (_, scale) in first.items()}, rel=1e-6)
    train('--init_from=begun.pt', '--max_iters=9', '--resume=auto', cwd=cwd)            # goes on counting from there
    record, after = [r for r in log(cwd) if 'matrices' in r][-1], matrices(checkpoint(cwd))
    assert record['step'] == 9 and checkpoint(cwd)['start_scales'] == start
    assert {name: m['scale_ratio'] for name, m in record['matrices'].items()} == pytest.approx(
        {name: scale / first[name][1] for name, (_, scale) in after.items()}, rel=1e-5)


def test_a_step_of_rate_zero_flips_nothing(train, folder):
    """The last step of a schedule that ends at 0: flips are unknown rather than 0, as if the codes had settled."""
    cwd = folder()
    train('--min_lr=0', '--max_iters=6', cwd=cwd)
    half, last = (r for r in log(cwd) if 'matrices' in r)
    assert (half['step'], last['step']) == (3, 6) and half['flips'] > 0 and last['flips'] is None
    assert {m['flips'] for m in last['matrices'].values()} == {None} and last['zero'] > 0


def test_codes_are_counted_where_asked_for_and_there_are_some(unbroken):
    """None with diag_interval=0 or full-precision weights."""
    for options, steps in (((), [3, 6, 9, 12, 15, 18]), (FP, []), (('--diag_interval=0', '--max_iters=3'), [])):
        assert [r['step'] for r in log(unbroken(*options)) if {'matrices', 'flips', 'scale_drift'} & r.keys()] == steps


# -------------------------------------------------------------------------------------------------------------- scores


def score(model, task, folder):
    """tasks.score of a model's likeliest next bytes on the validation split of a data folder."""
    def predict(texts):
        with torch.no_grad():
            return model(torch.tensor([list(t) for t in texts]))[:, -1].argmax(-1).tolist()
    data = tokens.load(folder, 'val')
    text = bytes(data.windows([0], len(data))[0].tolist())
    return tasks.score(task, predict, text.decode().split() if task == 'tictactoe' else text.split(), 1337)


def test_logged_scores_are_those_of_the_saved_weights(unbroken, sums, games):
    """The record of an evaluation, and what was printed, is what tasks.score gives for best.pt. Arithmetic: most of the 11
    differences of the validation split, and not the sum, which no training problem was like. Games: legal moves on the held-out
    ones and 200 games against each kind of player."""
    scores = {}
    play = '--task=tictactoe', f'--dataset={games}'
    for task, data, options in (('arithmetic', sums, LEARNED), ('tictactoe', games, play)):
        cwd = unbroken(*options)
        best = checkpoint(cwd, 'best.pt')
        record = next(r for r in log(cwd) if r['step'] == best['step'] and 'val_loss' in r)
        scores |= (of_task := score(model_of(best), task, data))
        assert {name: record[name] for name in of_task} == {name: hits / n for name, (hits, n) in of_task.items()}
        printed = ', '.join(f'{name} {hits:,} of {n:,}' for name, (hits, n) in of_task.items())
        assert printed in (cwd / 'said').read_text()
    hits = scores['exact_match'][0]
    assert scores['exact_match'] == (hits, 12) and 3 < hits < 11
    assert scores['exact_match-'] == (hits, 11) and scores['exact_match+'] == (0, 1) and len(scores) == 3 + 13
    assert 0.2 < record['legal_moves'] < 1 and 0 < record['random_legal'] < 1
    assert log(unbroken(*LEARNED), 'exact_match')[0] == 0


@pytest.mark.parametrize('kernels, scored', [('1', 'Engine'), ('0', 'BitNet')])
def test_tasks_are_scored_in_evaluation_mode(train, folder, kernels, scored):
    """Every answer comes from the engine or, without a compiler, from the model in evaluation, and from what a context shorter
    than the problems shows of them; it trains on in training mode."""
    cwd = folder()
    train('--max_iters=2', '--block_size=4', cwd=cwd, NANOBIT_KERNELS=kernels, patch=f"""
from readers import tasks
def next_logits(model, *args, plain=tasks.next_logits):
    assert type(model).__name__ == {scored!r} and not getattr(model, 'training', False)
    return plain(model, *args)
tasks.next_logits = next_logits
import common, sys
def seed_step(seed, step, rank, plain=common.seed_step):
    assert sys._getframe(1).f_locals['raw_model'].training
    plain(seed, step, rank)
common.seed_step = seed_step
""")
    assert log(cwd, 'exact_match') == [0.0, 0.0]


def test_a_text_without_answers_has_none(train, folder, tiny_data):
    cwd = folder()
    train('--task=', f'--dataset={tiny_data}', '--max_iters=2', cwd=cwd)
    assert {frozenset(r) for r in log(cwd) if 'val_loss' in r} == {frozenset(('step', 'tokens', 'val_loss', 'val_bpb'))}


# --------------------------------------------------------------------------------------------- logs and checkpoints


def test_log_and_validation_loss_by_hand(unbroken, sums):
    """The columns of a training record, with units that fit together; the validation loss of best.pt, also in bits a byte."""
    cwd = unbroken()
    records = [r for r in common.read_log(cwd / 'out') if 'loss' in r]
    for step, r in enumerate(records, 1):
        assert set(r) == {'step', 'tokens', 'loss', 'lr', 'grad_norm', 'ms', 'tokens_per_s', 'peak_mem_bytes',
                          'optimizer_bytes', 'energy_j'}
        assert r['step'] == step and r['tokens'] == step * 64 and r['tokens_per_s'] == pytest.approx(64 / r['ms'] * 1e3)
    assert len(records) == 20 and records[-1]['loss'] < records[0]['loss'] - 1
    best = checkpoint(cwd, 'best.pt')
    assert val_loss(model_of(best), sums) == pytest.approx(best['best_val_loss'], abs=1e-5)
    scored = [(1 - r['exact_match'], r['val_loss'], r['step']) for r in log(cwd) if 'val_loss' in r]
    assert min(scored) == (best['best_errors'], best['best_val_loss'], best['step'])
    assert log(cwd, 'val_bpb') == pytest.approx([v / math.log(2) for v in log(cwd, 'val_loss')])


@pytest.mark.parametrize('options', [(), FP, ('--act=silu', '--n_kv_head=4', '--learning_rate=1', '--schedule=constant')],
                         ids=['tern', 'fp', 'worse'])
def test_packed_file_is_the_same_model(unbroken, options):
    """best.pt and packed.safetensors give equal logits at every position, bit for bit; eight ternary layers take 2 bits a
    weight and 14 scales, the rest fp32, and the log says so. Also where training ends with worse weights."""
    cwd = unbroken(*options)
    best = checkpoint(cwd, 'best.pt')
    model, path = model_of(best), cwd / 'out' / 'packed.safetensors'
    meta, tensors = common.read_packed(path)
    packed = common.load_packed(train_bitnet.BitNet(train_bitnet.BitNetConfig(**meta['model_config'])), tensors).eval()
    ids = torch.randint(0, 256, (3, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(all_logits(model, ids), all_logits(packed, ids))
    assert (best['step'] < 20) == ('--learning_rate=1' in options)
    assert meta['step'] == best['step'] and meta['val_loss'] == best['best_val_loss'] and meta['task'] == 'arithmetic'
    assert sum(isinstance(m, layers.LowBit) and m.packed for m in packed.modules()) == (0 if options == FP else 8)
    qkv = 32 + 2 * (32 if '--n_kv_head=4' in options else 16)
    bare, weights = 4 * (256 * 32 + 2 * 160 + 32), 2 * 32 * (qkv + 32 + 128 + 64)
    expected = bare + (weights * 4 if options == FP else weights // 4 + 14 * 4)
    assert sum(t.nbytes for t in tensors.values()) == layers.model_bytes(model)[0] == expected
    last = log(cwd)[-1]
    assert last['packed_file_bytes'] == path.stat().st_size == pytest.approx(expected, abs=4000)
    assert last['fp32_bytes'] == bare + weights * 4 and last['best_step'] == best['step']
    assert last['best_val_loss'] == best['best_val_loss']


def test_the_twin_sees_the_same_batches(train, folder):
    """The same command line with --quant=fp: the same samples, parameters of the same names and sizes, none of them ternary,
    and it learns. Another seed takes other samples."""
    seen, states = [], []
    for more in ((), FP, ('--seed=5',)):
        cwd = folder()
        done = train('--max_iters=8', '--eval_interval=8', *more, cwd=cwd, patch=BATCHES)
        assert f'26,976 parameters, {0 if more == FP else "18,432"} of them ternary' in done.out
        seen.append([(cwd / f'{split}0').read_text() for split in ('train', 'val_0')])
        states.append(checkpoint(cwd)['model'])
        assert log(cwd, 'loss')[-1] < log(cwd, 'loss')[0] - 0.5
    assert seen[0] == seen[1] and seen[0][0] != seen[2][0]
    assert {k: t.shape for k, t in states[0].items()} == {k: t.shape for k, t in states[1].items()} and len(states[0]) == 19


@pytest.mark.parametrize('first, then', [(FP, ()), ((), FP)], ids=['fp to tern', 'tern to fp'])
def test_twins_start_from_each_other(train, folder, unbroken, sums, first, then):
    """--init_from takes the weights of the twin, nothing else: step 0, its validation loss that of the other kind's product
    with the same numbers, a new optimizer, scales counted from here."""
    cwd, given = folder(), checkpoint(unbroken(*first), 'best.pt')
    train(*then, f'--init_from={unbroken(*first) / "out" / "best.pt"}', '--max_iters=1', cwd=cwd)
    model = model_of(given, quant='fp' if then == FP else 'tern')
    assert log(cwd, 'val_loss')[0] == pytest.approx(val_loss(model, sums), abs=1e-5)
    assert abs(log(cwd, 'val_loss')[0] - given['best_val_loss']) > 1e-3                 # not the other's
    last = checkpoint(cwd)
    assert last['step'] == 1 and {s['step'].item() for s in last['optimizer']['state'].values()} == {1}
    expected = {} if then == FP else {name: scale for name, (_, scale) in matrices(given).items()}
    assert last['start_scales'] == pytest.approx(expected, rel=1e-6)


# -------------------------------------------------------------------------------------------------- what it would cost


def estimated(done):
    """{'parameters': [26976.0], ...}: the numbers of each line by what stands before or, for memory, behind them."""
    number, result = r'\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?', {}
    for line in re.findall(r'^(?:(?:parameters|packed|a token|tokens|compute|speed|time) |\s).*', done.out, re.MULTILINE):
        name = line.split(' MB  ')[1] if ' MB  ' in line else re.match(r'[a-z ]+?(?=  |$)', line)[0]
        result[name] = [float(n.replace(',', '')) for n in re.findall(number, line.split(' MB  ')[0])]
    return result


def test_estimate_by_hand(train, folder, unbroken):
    """Parameters, bytes, tokens, FLOPs and hours of the tiny shape, worked out here; nothing is written, though out_dir holds
    a run, and that run stays as it is."""
    cwd = folder()
    options = ('--estimate=True', '--max_iters=1_000_000', '--tokens_per_s=100')
    result = estimated(train(*options, cwd=cwd))
    assert [p.name for p in cwd.iterdir()] == ['tiny.py']
    matrices = 2 * (32 * 64 + 32 * 32 + 32 * 128 + 64 * 32)                 # qkv, o, gate and up, down
    n_params = matrices + 256 * 32 + 2 * (3 * 32 + 64) + 32
    packed = matrices // 4 + 14 * 4 + (256 * 32 + 2 * (3 * 32 + 64) + 32) * 4
    flops = 6 * (matrices + 256 * 32) + 12 * 2 * 32 * 16
    assert result['parameters'] == [n_params]
    assert result['packed'] == [packed, pytest.approx(100 * packed / (4 * n_params), abs=0.05), 32]    # bytes, %, of fp32
    assert result['a token'] == [flops]
    train_tokens = len(tokens.load(checkpoint(unbroken())['config']['dataset'], 'train'))
    assert result['tokens'] == [64e6, 1e6, pytest.approx(64e6 / train_tokens, abs=0.01)]
    assert result['compute'] == [pytest.approx(64e6 * flops, rel=5e-3)]
    assert result['speed'] == [100, pytest.approx(flops * 100 / 1e12, abs=0.01)]
    assert result['time'] == [177.8, 7.4]                                    # hours, days
    assert result['weights, fp32'] == result['gradients'] == [0.1] and result['AdamW moments'] == [0.2]
    shutil.copytree(unbroken() / 'out', cwd / 'out')
    before = {p.name: p.read_bytes() for p in (cwd / 'out').iterdir()}
    assert estimated(train(*options, '--resume=auto', cwd=cwd)) == result
    assert {p.name: p.read_bytes() for p in (cwd / 'out').iterdir()} == before


def test_estimate_of_memory(train, folder):
    """Activations are those that the model keeps for all sequences that a process holds at once, in either precision, though
    four are measured; the parts add up."""
    ids = torch.zeros(1024, 17, dtype=torch.int64)
    for quant, batch, micro, dtype in (('tern', 2048, 1024, 'float32'), ('fp', 1024, 0, 'float32'),
                                       ('tern', 1024, 0, 'bfloat16')):
        options = (f'--quant={quant}', f'--batch_size={batch}', f'--micro_batch_size={micro}', f'--dtype={dtype}')
        result = estimated(train(*options, '--estimate=True', '--tokens_per_s=1', cwd=folder()))
        model = tiny_bitnet(quant, vocab_size=256)
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'bfloat16'):
            saved = costs.saved_bytes(lambda model=model: model(ids[:, :-1], ids[:, 1:]), model)
        activations = result['saved tensors, 1024 x 16 tokens'][0]
        assert activations == pytest.approx(saved / 1e6, rel=2e-3) and activations > 50
        parts = [v[0] for name, v in result.items() if name in ('weights, fp32', 'gradients', 'AdamW moments')]
        total = result['in all, without the temporaries of single operations'][0]
        assert total == pytest.approx(sum(parts) + activations, abs=0.3) and len(parts) == 3


def test_estimate_needs_no_data_where_the_vocabulary_is_known(train, refused, folder):
    """The head is rounded up to a multiple of 64; without vocab_size, or with another than the data have, one line."""
    cwd, nosuch = folder(), '--dataset=./nosuch'
    options = ('--estimate=True', '--tokens_per_s=1000')
    result = estimated(train(*options, nosuch, '--vocab_size=1000', cwd=cwd))
    assert result['parameters'] == [26976 + (1024 - 256) * 32] and result['tokens'] == [1280, 20]
    refused('train_bitnet', [((*options, nosuch), 'no tokens in'), ((nosuch, '--vocab_size=1000'), 'no tokens in'),
                             ((*options, '--vocab_size=1000'), 'has a vocabulary of 256, not of vocab_size=1000')], cwd)
    assert [p.name for p in cwd.iterdir()] == ['tiny.py']


def test_estimate_measures_the_speed(start, train, folder):
    """Of one process, and of two as fast as this one: micro-steps, then one update; hours are those of the tokens of all steps
    at that speed. With two, buffers for the exchange of gradients take memory as well."""
    options, exchange = ('--estimate=True', '--max_iters=1_000_000'), 'buffers for the exchange of gradients'
    done = train(*options, cwd=folder(), patch='from report import costs; costs.mean_seconds.__defaults__ = (0.05,)')
    measured = estimated(done)
    assert 'tokens/s measured here on 2 x 16 tokens,' in done.out and measured['speed'][0] > 10
    assert measured['time'][0] == pytest.approx(64e6 / measured['speed'][0] / 3600, abs=0.051, rel=1e-3)
    known = """
from report import costs
costs.mean_seconds = lambda step, device: (step(), 0.004 if 'step' in getattr(step, '__name__', '') else 0.01)[1]
"""
    one = train(*options, cwd=folder(), patch=known)
    two = wait_all([start(SCRIPT, 'tiny.py', *options, cwd=folder(), patch=known, **r) for r in ranks(2)])
    assert [d.code for d in two] == [0, 0] and two[1].out == '', two[0].err
    assert 'measured here on 2 x 16 tokens, for 2 processes' in two[0].out
    assert exchange in two[0].out and exchange not in one.out
    one, two = estimated(one), estimated(two[0])
    assert two['speed'][0] == round(64 / (0.01 + 0.004)) and two['tokens'] == measured['tokens']       # one micro-step of each
    assert one['speed'][0] == round(64 / (2 * 0.01 + 0.004)) and one['time'] == [round(64e6 / 64 * 0.024 / 3600, 1)]


def test_mean_seconds_by_hand(monkeypatch):
    """A step of 2 seconds, after one that is not counted: 3 of them fill 5 seconds; never fewer than 2."""
    durations = []
    step = lambda: durations.append(2.0 if durations else 100.0)
    monkeypatch.setattr(costs.time, 'perf_counter', lambda: sum(durations))
    assert costs.mean_seconds(step, torch.device('cpu'), seconds=5) == 2.0 and len(durations) == 4
    assert costs.mean_seconds(step, torch.device('cpu'), seconds=0) == 2.0 and len(durations) == 7


def test_saved_bytes_by_hand():
    """What a small module keeps: its input for one product, the exponential once though it is used twice, the whole storage
    of what is seen through a slice; no weights and buffers. A freed tensor of the forward pass is not counted."""
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6, 6))
            self.register_buffer('mask', torch.ones(6))

        def forward(self, x):
            e = (x @ self.a).exp()              # keeps x (5, 8) and e (5, 6)
            e = e * e.view(5, 6) * self.mask    # keeps e, under two names, and the mask, which is the module's
            e = (e + 1) * 2                     # nothing
            return (e @ self.b).sum()           # keeps e (5, 6) anew
    model, x = Small(), torch.randn(5, 8)
    assert costs.saved_bytes(lambda: model(x), model) == 4 * (5 * 8 + 5 * 6 + 5 * 6)
    wide = torch.randn(5, 20)
    assert costs.saved_bytes(lambda: model(wide[:, :8]), model) == 4 * (5 * 20 + 5 * 6 + 5 * 6)
    with torch.no_grad():
        assert costs.saved_bytes(lambda: model(x), model) == 0


# -------------------------------------------------------------------------------------------------------------- refusing


MISTAKES = [
    (('--quant=ternary',), "quant='ternary' is none of 'tern', 'fp'"),
    (('--act=gelu',), "act='gelu' is none of 'relu2', 'silu'"),
    (('--task=chess',), "task='chess' is none of '', 'arithmetic', 'tictactoe'"),
    (('--schedule=two',), "schedule='two' is none of"), (('--dtype=float16',), "dtype='float16'; type"),
    (('--device=gpu',), "device='gpu'"), (('--n_embd=12',), 'n_embd=12 must be a multiple of 2 x n_head=4'),
    (('--n_kv_head=3',), 'n_head=4, and n_head of n_kv_head=3'),
    *(((f'--{key}=0',), f'{key}=0 must be 1 or more') for key in (
        'batch_size', 'n_layer', 'n_kv_head', 'n_embd', 'n_ff', 'eval_interval', 'save_interval')),
    *(((f'--{key}=-1',), 'must be 0 or more') for key in ('learning_rate', 'second_lr', 'diag_interval', 'tokens_per_s')),
    (('--beta1=-1',), 'beta1=-1.0, beta2=0.95 must be at least 0 and below 1'),
    (('--beta2=1',), 'beta2=1.0 must be at least 0 and below 1'), (('--rope_theta=0',), 'rope_theta=0.0 must be above 0'),
    (("--lr_scale={{'tern': -1}}",), 'lr_scale'),
    (('--batch_size=9',), 'batch_size=9 is no multiple of micro_batch_size=2 x 1 processes'),
    (('--micro_batch_size=-2',), 'batch_size=4 is no multiple of micro_batch_size=-2'),
    (('--block_size=100',), 'val tokens, block_size=100 needs more'), (('--dataset=nosuch',), 'data/nosuch'),
    (('--vocab_size=512',), 'has a vocabulary of 256, not of vocab_size=512; type --vocab_size=0'),
    (('--task=tictactoe',), 'is no game that was played to its end; type --dataset=tictactoe'),
    (('--dataset={tiny_data}',), 'is no solved problem; type --dataset=arithmetic, or --task='),
    (('--dataset={games}',), 'is no solved problem; type --dataset=arithmetic'),
    (('--dataset={pairs}',), 'task=arithmetic is scored in bytes'),
    (('--out_dir=/proc/nosuch',), '/proc/nosuch')]


def test_mistakes_are_one_line(refused, folder, tiny_data, games, pairs):
    """Each ends with exit status 2 and one line that says what is wrong, no traceback, and no out_dir."""
    names = {'tiny_data': tiny_data, 'games': games, 'pairs': pairs}
    refused('train_bitnet', [([o.format(**names) for o in options], words) for options, words in MISTAKES], folder())


def test_other_checkpoints_are_refused_in_one_line(refused, folder, unbroken, pairs):
    """Of other tokens, of another shape, or of the twin where a run is to go on: one line with what differs."""
    good, cwd = checkpoint(unbroken()), folder()
    other = tokens.load(pairs, 'train').tokenizer.describe()
    for name, state in (('good', good), ('other', good | {'tokenizer': other})):
        common.save_checkpoint(str(cwd / f'{name}.pt'), state)
    cases = [((f'--{mode}=other.pt',), 'other.pt was trained on other tokens') for mode in ('init_from', 'resume')]
    cases += [(('--init_from=good.pt', option), words) for option, words in (                          # no tensor tells
        ('--n_kv_head=4', 'another n_kv_head (2, not 4); type --n_kv_head=2'), ('--act=silu', 'type --act=relu2'))]
    cases += [(('--resume=good.pt', option), words) for option, words in (
        ('--quant=fp', 'another quant (tern, not fp)'), ('--n_head=8', 'another n_head (4, not 8)'),
        ('--act=silu', 'another act (relu2, not silu)'), ('--rope_theta=5e5', 'another rope_theta'))]
    refused('train_bitnet', cases, cwd)
