"""Two processes: projected gradients and frozen low-bit layers stay equal on both ranks."""
import pytest
import torch
from test_optim import make, train

from conftest import ranks, wait_all

OPTIONS = dict(rank=2, side='right', interval=10)

ADAPTERS = """
import torch, torch.nn as nn, common
from pretrained.adapters import only_adapters
from layers import convert
rank, local, world, device = common.setup_processes('cpu')
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))
convert(model, {'*': ('lora', dict(rank=4, base='nf4'))}, verbose=False)
only_adapters(model)
torch.manual_seed(rank)
for layer in (model[0], model[2]):
    nn.init.normal_(layer.lora_A)                   # apart at first, codes and scales too: DDP sends rank 0's
sent = common.checksum(model.buffers())
for buffer in model.buffers():
    buffer.copy_(buffer.roll(rank))
apart = not common.ranks_agree(common.checksum(model.buffers()))
wrapped = nn.parallel.DistributedDataParallel(model)
frozen = common.checksum(model.buffers())
start = common.checksum(p for p in model.parameters() if p.requires_grad)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
x, y, losses = torch.randn(64, 16), torch.randn(64, 8), []
for _ in range(3):
    loss = (wrapped(x) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
end = common.checksum(p for p in model.parameters() if p.requires_grad)
print(common.ranks_agree(end), start != end, common.checksum(model.buffers()) == frozen, common.ranks_agree(frozen),
      losses[-1] < losses[0], apart, frozen == sent, len(list(model.buffers())), common.ranks_agree(losses[0]))
"""

OPTIMIZER = f"""
import test_optim, torch.distributed as dist, torch.nn.functional as F
sent, plain = [], dist.all_reduce
dist.all_reduce = lambda t, *a, **k: (sent.append(t.nbytes), plain(t, *a, **k))[1]
for attached in (False, True):
    model, optimizer = test_optim.make(attached, seed=1 + rank, **{OPTIONS})    # DDP takes the weights of rank 0
    ddp = nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(100 + rank)                   # ranks that would draw other sketches from the global generator
    for step, (ids, labels) in enumerate(test_optim.batches(20)):
        sent.clear()
        for i, (part, wanted) in enumerate(zip(ids.chunk(2), labels.chunk(2))):
            ddp.require_backward_grad_sync = i == 1
            (F.cross_entropy(ddp(part[rank::world]), wanted[rank::world]) / 2).backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert common.ranks_agree(common.checksum(model.parameters())), (attached, step)
        assert step % 10 == 0 or sent == [4 * 2 * (50 + 7 + 40 + 24 + 3)] * attached, (step, sent)
    torch.save(model.state_dict(), 'out' + str(attached) + str(rank))
common.close_processes()
"""


@pytest.fixture(scope='module')
def folder(start, tmp_path_factory):
    """The folder in which two processes have run both scripts, with what each has printed in the file printed<rank>."""
    folder = tmp_path_factory.mktemp('ranks')
    (folder / 'run.py').write_text(ADAPTERS + OPTIMIZER)
    for rank, done in enumerate(wait_all([start('run.py', cwd=folder, **environment) for environment in ranks(2)])):
        assert done.code == 0, done.err[-2000:]
        (folder / f'printed{rank}').write_text(done.out)
    return folder


@pytest.mark.parametrize('rank', [0, 1])
def test_two_processes_train_the_same_adapters(folder, rank):
    """DDP, LoRA over packed nf4, other samples on each rank: after 3 steps equal adapters and rank 0's codes on both."""
    printed = (folder / f'printed{rank}').read_text()
    assert printed.split() == ['True'] * 7 + ['4', 'False'], printed


@pytest.mark.parametrize('attached', [False, True])
def test_ranks_stay_bit_identical_with_a_low_rank_optimizer(folder, attached):
    """Two ranks end near one process with the whole batch. Attached, they exchange R in one message a step, not G."""
    model, optimizer = make(attached, **OPTIONS)
    train(model, optimizer, 20, micro=2)
    for rank in (0, 1):
        state = torch.load(folder / f'out{attached}{rank}', weights_only=True)
        assert max((state[k] - t).abs().max().item() for k, t in model.state_dict().items()) < 1e-4
