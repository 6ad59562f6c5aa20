"""train_gpt.py as people run it: torchrun, signals, kills, mistakes; its model by hand. More is in test_trainers.py."""
import math
import os
import shutil
import signal

import pytest
import torch

import common
import layers
import sample
import train_gpt
from conftest import (CHECKSUMS, HOLD, ROOT, TINY, all_logits, assert_same_state, checkpoint, free_port, kill_at, log,
                      printed_command, random_ids, ranks, tiny_gpt, torchrun, wait_all)
from readers import tokens

SCRIPT = ROOT / 'train_gpt.py'
MIXED = ('--qkv_proj=bin', '--c_proj=int4', '--mlp_proj=tern', '--n_binary=2', '--bias=True')
WET = (*MIXED, '--dropout=0.2')


@pytest.fixture(scope='module')
def folder(tmp_path_factory, tiny_data):
    """folder() -> a new folder holding tiny.py, the config all runs start from."""
    def make():
        new = tmp_path_factory.mktemp('run')
        (new / 'tiny.py').write_text(TINY.format(data=str(tiny_data)))
        return new
    return make


# ------------------------------------------------------------------------------------------------ numbers of processes


# A script that runs the trainer behind it after the source text in front; for real processes, which take no patch.
DRIVER = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def assert_same_losses(one, other):
    assert len(log(one, 'loss')) > 2 and len(log(one, 'val_loss')) > 1
    for column in ('loss', 'val_loss'):
        assert log(other, column) == pytest.approx(log(one, column), abs=1e-6, rel=0)
    assert log(other, 'grad_norm') == pytest.approx(log(one, 'grad_norm'), rel=1e-4)    # Adam would hide a factor


def test_two_nodes_equal_one(start, folder, unbroken):
    """Two torchrun agents of one process each, meeting on 127.0.0.1, log the losses of one process; their weights and
    optimizer states are equal to the bit before each of 20 steps."""
    two, port = folder(), free_port()
    (two / 'driver.py').write_text('import os' + CHECKSUMS + DRIVER)
    words = 'driver.py', SCRIPT, 'tiny.py'
    done = wait_all([start(*torchrun(*words, nodes=2, rank=r, port=port, per_node=1), cwd=two) for r in (0, 1)])
    assert [d.code for d in done] == [0, 0], [d.err for d in done]
    assert any('8 sequences a step = 2 x 2 micro-steps x 2 processes = 256 tokens' in d.out for d in done)
    assert_same_losses(unbroken(), two)
    sums = [(two / f'sums{rank}').read_text().split() for rank in (0, 1)]
    assert sums[0] == sums[1] and len(set(sums[0])) == 20


def test_four_processes_equal_one(start, folder, unbroken):
    """With other micro-batches too: training and validation see the same samples, only sums are ordered otherwise."""
    cwd = folder()
    jobs = [start(SCRIPT, 'tiny.py', '--micro_batch_size=1', '--max_iters=3', '--eval_interval=3', cwd=cwd, **r)
            for r in ranks(4)]
    assert [done.code for done in wait_all(jobs)] == [0] * 4
    assert_same_losses(unbroken('--max_iters=3', '--eval_interval=3'), cwd)


# ------------------------------------------------------------------------------------------------------------ resuming


def test_two_stage_resumes_exactly(train, folder, unbroken):
    """Killed in step 13, the run goes on from the save at step 10, and its log has the rates of lr_at for all steps. Only
    two_stage ends the decay, where its rate drops."""
    options, cwd = ('--schedule=two_stage', '--n_layer=1'), folder()
    train(*options, cwd=cwd, patch=kill_at(13, 'SIGKILL'), code=-9)
    assert 'at step 10' in train(*options, '--resume=auto', cwd=cwd).out
    for where, schedule, decays in ((cwd, 'two_stage', {0.0}), (unbroken(), 'cosine', {0.0, 0.1})):
        assert log(where, 'lr') == [common.lr_at(s, schedule, 3e-3, 3e-4, 2, 20, 2e-3) for s in range(20)]
        assert {g['weight_decay'] for g in checkpoint(where)['optimizer']['param_groups']} == decays


# ------------------------------------------------------------------------------------------------------------- signals


def test_ctrl_c_ends_in_a_checkpoint_and_a_command_that_works(start, folder, unbroken):
    """A real command line: exit status 0 in the middle of training, and the printed command ends as the unbroken run."""
    cwd = folder()
    (cwd / 'holds.py').write_text(HOLD.format(step=2) + DRIVER)
    job = start('holds.py', SCRIPT, 'tiny.py', cwd=cwd, real=True, PYTHONUNBUFFERED='1')
    job.wait_for('holding')
    job.signal(signal.SIGINT)
    done = job.wait()
    assert done.code == 0 and done.err == '', done.err
    assert 'stopped at step 3;' in done.out and checkpoint(cwd)['step'] == 3
    again = start(*printed_command(done.out), cwd=cwd).wait()
    assert again.code == 0 and again.err == '', again.err
    assert_same_state(checkpoint(cwd), checkpoint(unbroken()))
    assert log(cwd) == log(unbroken())


def test_a_signal_under_torchrun(start, folder, unbroken):
    """SIGTERM from a scheduler that sends it to every process, so that those under torchrun get it twice: a whole checkpoint,
    from which one process ends like two unbroken ones."""
    cwd = folder()
    still = 'import time, types; common.time = types.SimpleNamespace(**vars(time) | {"monotonic": lambda: 0.0})\n'
    (cwd / 'holds.py').write_text('import os; open(f"pid{os.getpid()}", "w")\n' + HOLD.format(step=7) + still + DRIVER)
    job = start(*torchrun('holds.py', SCRIPT, 'tiny.py'), cwd=cwd, PYTHONUNBUFFERED='1')
    job.wait_for('holding', times=2)
    workers = [int(path.name[3:]) for path in cwd.glob('pid*')]
    for pid in (*workers, job.pid):
        os.kill(pid, signal.SIGTERM)
    done = job.wait()
    assert 'stopped at step 8;' in done.out and len(workers) == 2, done.err
    assert checkpoint(cwd)['step'] == 8
    again = start(SCRIPT, 'tiny.py', '--resume=auto', cwd=cwd).wait()
    assert again.code == 0, again.err
    assert_same_losses(unbroken(), cwd)


# ----------------------------------------------------------------------------------------------- starting and refusing


def test_init_from_resume_and_path(train, folder, unbroken):
    """resume: the run in out_dir. A path: its weights at step 0, in a run of its own."""
    cwd, whole = folder(), unbroken()
    (cwd / 'out').mkdir()
    shutil.copy(whole / 'out' / 'last.prev.pt', cwd / 'out' / 'last.pt')
    assert 'at step 15' in train('--init_from=resume', cwd=cwd).out
    assert_same_state(checkpoint(cwd), checkpoint(whole))
    train(f'--init_from={whole}/out/best.pt', '--out_dir=new', '--max_iters=1', cwd=cwd)
    new = common.read_log(cwd / 'new')
    assert new[0]['step'] == 0 and new[0]['val_loss'] == log(whole, 'val_loss')[-1]


MISTAKES = [
    (('--dataset=nosuch',), 'data/nosuch'),
    (('--batch_size=9',), 'batch_size=9 is no multiple of micro_batch_size=2 x 1 processes'),
    (('--block_size=4000',), 'val tokens, block_size=4000 needs more'),
    (('--block_size=50000',), '40000 train tokens, block_size=50000 needs more'),
    (('--qkv_proj=binary',), "'binary' is none of 'fp', 'bin', 'tern', 'int4'"),
    (('--c_proj=fp16',), "'fp16' is none of"), (('--mlp_proj=',), "'' is none of"),
    (('--dtype=float16',), "dtype='float16'; type --dtype=float32 or --dtype=bfloat16"),
    (('--n_embd=33',), 'n_embd=33 is no multiple of n_head=2'),
    (('--n_binary=1', '--binary_blocks=1'), 'give n_binary or binary_blocks, not both'),
    (('--n_binary=3',), 'n_layer=2'), (('--n_binary=-1',), 'n_layer=2'), (('--binary_blocks=0,2',), 'n_layer=2'),
    (('--binary_blocks=-1',), 'n_layer=2'), (('--beta2=1',), 'beta2=1.0 must be at least 0 and below 1'),
    (('--learning_rat=1',), 'did you mean learning_rate?'), (('nosuch.py',), 'no config file nosuch.py'),
    (('--schedule=cosin',), 'cosin'), (('--init_from=resume',), 'out/last.pt does not exist'),
    *(((f'--{key}=0',), f'{key}=0 must be 1 or more') for key in (
        'batch_size', 'block_size', 'n_head', 'eval_interval', 'eval_iters', 'log_interval', 'save_interval')),
    (('--micro_batch_size=-2',), 'micro_batch_size'), (('--device=gpu',), 'gpu'), (('--out_dir=/proc/nosuch',), '/proc/nosuch'),
    (('--distill=1.5',), 'distill=1.5 must be from 0 to 1'), (('--teacher=nosuch.pt',), 'nosuch.pt does not exist'),
    (('--teacher={good}', '--block_size=64'), 'last.pt has 32 positions; type --block_size=32 or less'),
    (('--resume={good}', '--n_layer=3'), 'another n_layer (2, not 3)'),
    (('--resume={good}', '--n_head=4'), 'another n_head (2, not 4)'), (('--init_from={good}', '--n_embd=64'), 'last.pt'),
]


def test_mistakes_are_one_line(refused, folder, unbroken):
    """Each ends with exit status 2 and one line that says what is wrong, no traceback, and no out_dir."""
    good = unbroken() / 'out' / 'last.pt'
    refused('train_gpt', [([o.format(good=good) for o in options], words) for options, words in MISTAKES], folder())


# ------------------------------------------------------------------------------------------------------------ variants


@pytest.mark.parametrize('options', [(), WET, ('--qkv_proj=int4', '--c_proj=tern', '--mlp_proj=bin', *MIXED[3:])],
                         ids=['fp', 'mixed', 'turned'])
def test_every_kind_learns_and_packs_exactly(unbroken, options):
    """The loss falls from ln(vocab) by more than 0.8 in 20 steps, and the packed file's logits at every position equal
    best.pt's exactly, with biases too."""
    cwd = unbroken(*options)
    losses = log(cwd, 'loss')
    assert abs(losses[0] - math.log(256)) < 0.3 and losses[-1] < losses[0] - 0.8
    best = checkpoint(cwd, 'best.pt')
    model = train_gpt.GPT(train_gpt.GPTConfig(**best['model_config']))
    model.load_state_dict(best['model'])
    meta, tensors = common.read_packed(cwd / 'out' / 'packed.safetensors')
    packed = common.load_packed(train_gpt.GPT(train_gpt.GPTConfig(**meta['model_config'])), tensors)
    ids = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    assert torch.equal(all_logits(model.eval(), ids), all_logits(packed.eval(), ids))
    assert meta['step'] == best['step'] and meta['val_loss'] == min(log(cwd, 'val_loss')) == best['best_val_loss']
    assert tokens.from_description(meta['tokenizer']).decode(tokens.byte().encode('abc')) == 'abc'
    low = sum(m.packed for m in packed.modules() if isinstance(m, layers.LowBit))
    assert low == (8 if options else 0)
    assert (cwd / 'out' / 'packed.safetensors').stat().st_size < (75_000 if options else 150_000)


def test_val_loss_by_hand(unbroken, tiny_data):
    """The mean over eval_iters * batch_size = 16 windows drawn for step -1, without dropout, from the saved weights."""
    best, data = checkpoint(unbroken(*WET), 'best.pt'), tokens.load(tiny_data, 'val')
    model = train_gpt.GPT(train_gpt.GPTConfig(**best['model_config'])).eval()
    model.load_state_dict(best['model'])
    xy = data.windows(common.sample_indices(1337, -1, len(data) - 32, 16), 33)
    with torch.no_grad():
        assert model(xy[:, :-1], xy[:, 1:]).item() == pytest.approx(best['best_val_loss'], abs=1e-5)


def test_a_teacher_gives_a_share_of_the_targets(train, folder, unbroken, tiny_data):
    """The first logged loss is the cross-entropy of the new model against 0.3 true tokens + 0.7 teacher, by hand; val_loss is
    against the text alone."""
    cwd, whole = folder(), unbroken()
    done = train('--max_iters=1', '--n_binary=2', f'--teacher={whole}/out/best.pt', '--distill=0.7', cwd=cwd)
    best = checkpoint(whole, 'best.pt')
    tokens_seen = best['step'] * 8 * 32
    assert f'70% of the targets come from {whole}/out/best.pt, which was trained on {tokens_seen:,} tokens' in done.out
    teacher = train_gpt.GPT(train_gpt.GPTConfig(**best['model_config'])).eval()
    teacher.load_state_dict(best['model'])
    torch.manual_seed(1337)
    student, data = train_gpt.GPT(train_gpt.GPTConfig(**checkpoint(cwd)['model_config'])), tokens.load(tiny_data, 'train')
    xy = data.windows(common.sample_indices(1337, 0, len(data) - 32, 8), 33)
    targets = 0.3 * torch.eye(256)[xy[:, 1:]] + 0.7 * all_logits(teacher, xy[:, :-1]).softmax(-1)
    loss = -(targets * all_logits(student, xy[:, :-1]).log_softmax(-1)).sum(-1).mean().item()
    assert log(cwd, 'loss') == [pytest.approx(loss, abs=1e-5)]
    assert log(cwd, 'val_loss')[0] == log(unbroken('--n_binary=2'), 'val_loss')[0]


def test_compile(train, folder, unbroken):
    """Three steps of a compiled model have the losses of the plain one, and the checkpoint has its plain names. What is
    compiled is traced with its backward pass, but run without a C++ compiler."""
    options = ('--max_iters=3', '--eval_interval=3', *MIXED, '--n_layer=1', '--n_binary=1')
    cwd = folder()
    done = train(*options, '--compile=True', cwd=cwd, patch="""
import torch
def compile(model, plain=torch.compile, **how):
    print('compiled')
    return plain(model, backend='aot_eager', **how)
torch.compile = compile
""")
    assert 'compiled' in done.out
    assert log(cwd, 'loss') == pytest.approx(log(unbroken(*options), 'loss'), abs=1e-4)
    assert checkpoint(cwd)['model'].keys() == checkpoint(unbroken(*options))['model'].keys()


def test_the_log_has_units_that_fit_together(unbroken):
    """The columns of a training record, with units that fit together; energy is null where nothing measures it."""
    records = [r for r in common.read_log(unbroken() / 'out') if 'loss' in r]
    for step, r in enumerate(records, 1):
        assert set(r) >= {'step', 'tokens', 'loss', 'lr', 'grad_norm', 'ms', 'tokens_per_s', 'peak_mem_bytes',
                          'optimizer_bytes', 'energy_j'}
        assert r['step'] == step and r['tokens'] == step * 8 * 32 and r['peak_mem_bytes'] > 50e6
        assert r['tokens_per_s'] == pytest.approx(8 * 32 / r['ms'] * 1e3) and r['energy_j'] != 0
    val = [r for r in common.read_log(unbroken() / 'out') if 'val_loss' in r]
    assert [r['val_bpb'] for r in val] == pytest.approx([r['val_loss'] / math.log(2) for r in val])   # bytes


# --------------------------------------------------------------------------------------------------------------- model


def test_sampling_options():
    """Padding of the vocabulary is never drawn, top_k=1 is temperature 0, the same generator draws the same, a
    batch gives one id per row."""
    model, ids = tiny_gpt(), random_ids(1, 3)

    def draw(n=60, vocab=50, **options):
        return [int(t) for t in sample.generate(model, ids, n, vocab, **options)]
    seeded = lambda: torch.Generator().manual_seed(3)
    drawn = draw(generator=seeded())
    assert drawn == draw(generator=seeded()) and max(drawn) < 50 and len(set(drawn)) > 20
    assert draw(top_k=1) == draw(temperature=0)
    assert [t.shape for t in sample.generate(model, random_ids(3, 2), 2, 64)] == [(3,), (3,)]


def test_n_binary_means_exactly_that_many_blocks(monkeypatch):
    """6 of 8: blocks 0 to 5 hold four binary layers each, the others none; binary_blocks names them one by one."""
    monkeypatch.setattr(train_gpt, 'n_layer', 8)
    for n_binary, binary_blocks, low in ((0, (), ()), (6, (), range(6)), (8, (), range(8)), (0, (7, 2), (2, 7))):
        monkeypatch.setattr(train_gpt, 'n_binary', n_binary)
        monkeypatch.setattr(train_gpt, 'binary_blocks', binary_blocks)
        model = tiny_gpt('bin', blocks=train_gpt.low_bit_blocks(), n_layer=8)
        count = lambda kind, block: sum(type(m) is kind for m in block.modules())
        assert [count(layers.BinaryLinear, b) for b in model.blocks] == [4 * (i in low) for i in range(8)]
        assert [count(torch.nn.Linear, b) for b in model.blocks] == [4 * (i not in low) for i in range(8)]


def test_each_projection_takes_its_own_kind():
    model = train_gpt.GPT(train_gpt.GPTConfig(64, 16, 2, 2, 32, qkv_proj='tern', c_proj='int4', mlp_proj='bin',
                                              binary_blocks=(1,)))
    names = lambda b: [type(m).__name__ for m in (
        b.attn.c_attn, b.attn.c_proj, b.mlp.c_fc, b.mlp.c_proj, b.ln_1, b.ln_2)]
    assert names(model.blocks[0]) == ['Linear'] * 4 + ['LayerNorm'] * 2
    assert names(model.blocks[1]) == ['TernaryLinear', 'Linear4bit', 'BinaryLinear', 'BinaryLinear', 'Identity',
                                      'LayerNorm']


@pytest.mark.parametrize('std, want', [(0.0, 1 / 16), (0.05, 0.05)])
def test_initial_weights(std, want):
    """Ternary latent weights have deviation ternary_std or 1/sqrt(inputs), others 0.02; both are smaller by sqrt(2 n_layer) in
    layers that add to the residual stream."""
    torch.manual_seed(0)
    model = train_gpt.GPT(train_gpt.GPTConfig(64, 16, 2, 2, 256, qkv_proj='tern', c_proj='tern', mlp_proj='bin',
                                              binary_blocks=(0,), ternary_std=std))
    low, full = model.blocks
    for m, expected in ((low.attn.c_attn, want), (low.attn.c_proj, want / 2), (low.mlp.c_fc, 0.02), (low.mlp.c_proj, 0.01),
                        (full.attn.c_attn, 0.02), (full.attn.c_proj, 0.01)):
        assert m.weight.std().item() == pytest.approx(expected, rel=0.02)
