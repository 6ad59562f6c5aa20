"""engine/: the same tokens, logits and window as torch on models of every kind; the same bits on every instruction set and
number of threads; one line for each mistake."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import layers
import quant
import sample
from engine.engine import BATCH, Array, Engine, Linear, library
from pretrained import replace
from train_bitnet import BitNet, BitNetConfig
from train_gpt import GPT, GPTConfig

VOCAB, CONTEXT = 70, 24

def gpt(kind, width=32, **shape):
    torch.manual_seed(1)
    mixed = dict(zip(('qkv_proj', 'c_proj', 'mlp_proj'), kind.split(','), strict=True) if ',' in kind else
                 dict.fromkeys(('qkv_proj', 'c_proj', 'mlp_proj'), kind).items())
    return noisy(GPT(GPTConfig(vocab_size=VOCAB, block_size=CONTEXT, n_layer=2, n_head=2, n_embd=width, bias=True,
                               binary_blocks=(0, 1), **mixed, **shape)))


def bitnet(quant='tern', **shape):
    torch.manual_seed(1)
    return noisy(BitNet(BitNetConfig(**{'vocab_size': VOCAB, 'block_size': CONTEXT, 'n_layer': 2, 'n_head': 4, 'n_kv_head': 2,
                                        'n_embd': 48, 'n_ff': 80, 'quant': quant} | shape)))


def noisy(model):
    """Gains, biases and scales that are not 0 or 1, so that none of them goes unnoticed."""
    for p in model.parameters():
        if p.dim() == 1:
            p.data += 0.1 * torch.randn_like(p)
    return layers.pack(model.eval())


def replaced(model, kind, skip='head,embd', **options):
    """As ptq.py does it, but scales of inputs are random."""
    replace.unfuse(model)
    for name in replace.layers_of(model, skip):
        replace.replace(model, name, kind, options)
    for module in model.modules():
        if getattr(module, 'input_scale', None) is not None:
            module.input_scale.uniform_(0.5, 1.5)
    return model.eval()


MODELS = {
    **{kind: lambda kind=kind: gpt(kind) for kind in ('fp', 'bin', 'tern', 'int4', 'tern,bin,int4', 'int4,fp,tern')},
    'odd sizes': lambda: gpt('bin,tern,int4', 36), 'output gains': lambda: gpt('tern', output_gains=True),
    'bitnet': bitnet, 'silu': lambda: bitnet(act='silu', n_kv_head=1), 'bitnet fp': lambda: bitnet('fp'),
    **{kind: lambda kind=kind: replaced(gpt('fp'), kind) for kind in ('nf4', 'fit4', 'int8', 'half', 'sparse')},
    'nf4, 8-bit scales': lambda: replaced(bitnet('fp', n_embd=64), 'nf4', scales='8bit'),
    'int8 activations': lambda: replaced(gpt('fp'), 'int8', activations='int8'),
    'bf16': lambda: replaced(gpt('fp'), 'half', dtype=torch.bfloat16),
    'lowrank': lambda: replaced(gpt('fp'), 'lowrank', rank=8),
    'packed head': lambda: replaced(gpt('fp'), 'fit4', ''),
    'packed scaled head': lambda: replaced(gpt('fp'), 'group', '', levels='int4', group=16, scaled_input=True),
    **{f'group {levels}': lambda levels=levels: replaced(gpt('fp'), 'group', levels=levels, group=16, scaled_input=True)
       for levels in ('int8', 'int4', 'int3', 'int2')},
    **{f'group {levels}': lambda levels=levels: replaced(gpt('fp'), 'group', levels=levels, group=32)
       for levels in ('tern', 'bin')},
}


INT8 = ('tern', 'tern,bin,int4', 'int4,fp,tern', 'odd sizes', 'output gains', 'bitnet', 'silu', 'int8 activations')     # inputs


@pytest.fixture(scope='module')
def ids():
    return torch.randint(VOCAB, (8, CONTEXT), generator=torch.Generator().manual_seed(2))


def relative(got, want):
    """Largest difference of each row, relative to the spread of the logits."""
    return (got - want).abs().amax((1, 2)) / want.std()


@pytest.mark.parametrize('name', MODELS)
@torch.no_grad()
def test_the_same_logits_and_tokens_as_torch(name, ids):
    """Every kind of layer, packed: logits within 1e-4 of their spread, and for 8 prompts the same greedy tokens, past the
    context too. An activation next to the border of two int8 codes can fall on the other side, and rarely does."""
    model = MODELS[name]()
    engine = Engine(model, head='fp', sequences=8)
    far = torch.cat([relative(engine(ids[:, :n]), model(ids[:, :n])) for n in (1, 5, CONTEXT)])
    assert (far < 1e-4).float().mean() >= (0.85 if name in INT8 else 1) and far.max() < 0.1
    want, got = (torch.stack(list(new)) for new in (sample.generate(model, ids[:, :9], 24, VOCAB - 3, 0),
                                                    engine.generate(ids[:, :9], 24, VOCAB - 3, 0)))
    assert torch.equal(want, got)


@pytest.mark.parametrize('name', ['tern,bin,int4', 'odd sizes', 'bitnet', 'group int4', 'nf4, 8-bit scales',
                                  'int8 activations'])
@torch.no_grad()
def test_the_same_bits_everywhere(name, ids):
    """The instruction set, the number of threads and the size of the batch change no bit of the logits."""
    model = MODELS[name]()
    want = Engine(model, sequences=8, threads=1)(ids)
    for target, threads in (('native', 2), ('vnni', 1), ('avx2', 1), ('scalar', 1)):
        assert torch.equal(Engine(model, sequences=8, threads=threads, target=target)(ids), want), target
    alone = Engine(model, threads=1)
    assert torch.equal(alone(ids), want)
    for i in range(CONTEXT):
        stepped = alone.prefill(ids[:1, i:i + 1], i)
    assert torch.equal(stepped, want[0])


@pytest.mark.parametrize('inputs', ['fp32', 'int8'])
@pytest.mark.parametrize('make', [
    lambda: bitnet(n_head=10, n_kv_head=2, n_embd=720, n_ff=96, n_layer=1, block_size=90, vocab_size=200),
    lambda: gpt('bin,int4,bin', 144), lambda: replaced(gpt('fp', 64), 'group', levels='int4', group=32)])
@torch.no_grad()
def test_more_threads_and_single_tokens(make, inputs):
    """Heads of 72, groups of 5 heads, 90 positions, more threads than heads; calls of 17, 4, 2 and 1 tokens: the same bits."""
    model = make()
    ids = torch.randint(VOCAB, (1, model.config.block_size), generator=torch.Generator().manual_seed(4))
    want = Engine(model, threads=1, inputs=inputs)(ids)
    for threads, target, steps in ((3, 'native', (17, 4, 2)), (7, 'native', ()), (1, 'vnni', (17, 4)), (2, 'avx2', (3,))):
        engine, at = Engine(model, threads=threads, inputs=inputs, target=target), 0
        for n in (*steps, *[1] * (ids.shape[1] - sum(steps))) if steps else (ids.shape[1],):
            got = engine.prefill(ids[:, at:at + n], at)
            at += n
        assert torch.equal(got, want[0]), (threads, target)


@torch.no_grad()
def test_a_context_of_one():
    """Each new token stands alone."""
    model = bitnet(block_size=1)
    want, got = (list(f(torch.tensor([[5]]), 4, VOCAB, 0)) for f in (
        lambda *a: sample.generate(model, *a), lambda *a: Engine(model, 'fp').generate(*a)))
    assert want == got


@torch.no_grad()
def test_latent_weights_are_packed_on_loading(ids):
    """A model as in best.pt gives the same bits as the packed one, and keeps its latent weights."""
    torch.manual_seed(3)
    model = BitNet(BitNetConfig(VOCAB, CONTEXT, n_layer=1, n_embd=32, n_ff=48)).eval()
    before = Engine(model)(ids)
    assert not model.blocks[0].attn.o_proj.packed
    assert torch.equal(before, Engine(layers.pack(model))(ids))


@torch.no_grad()
def test_a_long_prompt_and_many_sequences_take_several_calls(ids):
    """More tokens than one call takes: the last CONTEXT tokens of each of 5 prompts count."""
    model = gpt('int4')
    engine, prompts = Engine(model, head='fp', sequences=5), ids.repeat(1, 3)[:5]
    assert prompts.numel() > BATCH
    want, got = next(sample.generate(model, prompts, 1, VOCAB, 0)), next(engine.generate(prompts, 1, VOCAB, 0))
    assert torch.equal(want, got)


@torch.no_grad()
def test_int8_head():
    """The default head is int8: logits move by a few hundredths of their spread."""
    model = gpt('bin')
    ids = torch.arange(8)[:, None]
    far = relative(Engine(model, sequences=8)(ids), Engine(model, 'fp', sequences=8)(ids))
    assert 1e-4 < far.max() < 0.1


ROUNDED = {'bin': lambda: gpt('bin,bin,fp'), 'int4': lambda: gpt('int4,int4,fp'), 'odd': lambda: gpt('bin,bin,fp', 36),
           **{f'group {levels}': lambda levels=levels: replaced(gpt('fp'), 'group', levels=levels, group=32)
              for levels in ('int4', 'int3', 'int2', 'tern', 'bin')}}


@pytest.mark.parametrize('name', ROUNDED)
@torch.no_grad()
def test_int8_inputs(name, ids):
    """inputs='int8' computes what torch does with rounded inputs, on all processors; layers with uneven levels keep theirs."""
    model = ROUNDED[name]()
    got = Engine(model, 'fp', sequences=8, inputs='int8')(ids)
    for target in ('vnni', 'avx2', 'scalar'):
        assert torch.equal(Engine(model, 'fp', sequences=8, inputs='int8', target=target)(ids), got), target
    for module in model.modules():
        if getattr(module, 'kind', '') in ('bin', 'int4', 'group'):
            module.register_forward_pre_hook(lambda m, x: (torch.mul(*quant.quantize_rows(x[0])),))
    assert (relative(got, model(ids)) < 1e-4).float().mean() >= 0.75


@torch.no_grad()
def test_sampling_follows_the_softmax_and_the_seed():
    """The same seed draws the same ids, and another seed others; shares of 4,000 draws are those of torch's softmax of the 5
    most likely ids at this temperature."""
    model = gpt('fp')
    engine = Engine(model, head='fp', sequences=200)
    logits = model(torch.tensor([[3]]))[0, 0, :VOCAB] / 0.3
    logits[logits < logits.topk(5).values[-1]] = -torch.inf
    start = torch.full((200, 1), 3)
    draw = lambda seed, n=1: torch.stack(list(engine.generate(start, n, VOCAB, 0.3, 5, seed)))
    assert torch.equal(draw(1, 3), draw(1, 3)) and not torch.equal(draw(1, 3), draw(2, 3))
    first = [next(engine.generate(start[:1], 1, VOCAB, 50.0, 0, seed)).item() for seed in range(12)]
    assert first[0] != 0 and len(set(first)) > 5    # a seed of 0 is as good as any
    counts = sum(torch.bincount(draw(seed)[0], minlength=VOCAB) for seed in range(20))
    assert (counts / 4000 - logits.softmax(0)).abs().max() < 0.03


def test_mistakes_are_one_line(ids):
    """Each names what is wrong."""
    engine = Engine(gpt('fp'))
    lora = gpt('fp')
    lora.blocks[1].attn.c_proj = layers.LoRALinear(lora.blocks[1].attn.c_proj)
    product = gpt('fp')
    product.blocks[1].mlp.c_fc = layers.BinaryLinear(32, 128, False, alpha=None)
    two_norms = gpt('fp')
    two_norms.blocks[0].attn.c_attn = layers.TernaryLinear(32, 96)
    for why, call in ((r'an id is not in 0 \.\. 69', lambda: engine(torch.tensor([[VOCAB]]))),
                      (r'an id is not in 0 \.\. 69', lambda: engine(torch.tensor([[-1]]))),
                      ('1 sequences of 25 tokens do not fit', lambda: engine(ids.repeat(1, 2)[:1, :25])),
                      ('0 tokens do not fit', lambda: engine(ids[:1, :0])),
                      ('position 5 follows 0 positions', lambda: Engine(gpt('fp')).prefill(ids[:1, :1], 5)),
                      ('needs a vocabulary, a temperature and seeds', lambda: engine.prefill(
                          ids[:1], 0, torch.empty(1).int(), known=VOCAB, temperature=1.0)),
                      ('next must be int32', lambda: engine.prefill(ids[:1], 0, torch.empty(2).int(), known=VOCAB)),
                      ('vocab_size=99 must be', lambda: next(engine.generate(ids[:1], 1, 99))),
                      ('runs the models of train_gpt.py and train_bitnet.py, not', lambda: Engine(torch.nn.Linear(2, 2))),
                      ('threads=-1 must be 1 to 1024', lambda: Engine(gpt('fp'), threads=-1)),
                      ("head='fp4' must be", lambda: Engine(gpt('fp'), head='fp4')),
                      ('blocks.1.attn.c_proj: the engine has no LoRA', lambda: Engine(lora)),
                      ('blocks.1.mlp.c_fc: the engine has no binary layers without', lambda: Engine(product)),
                      ('blocks.0.attn.c_attn: the engine does not apply two norms', lambda: Engine(two_norms))):
        with pytest.raises(ValueError, match=why) as e:
            call()
        assert '\n' not in str(e.value)


def test_c_checks_every_size():
    """Wrong structs are refused, not read: shapes, missing arrays, arrays of another size."""
    model, lib = gpt('bin'), library()
    engine = Engine(model)
    for field, value in (('in_', 31), ('out', 7), ('bits', 3), ('kind', 9), ('chunks', 0), ('alpha', Array()),
                         ('code', Array(engine.kept[0].data_ptr(), 4))):
        shape, many, made = engine.structs[0], (Linear * len(engine.structs[1]))(*engine.structs[1]), ctypes.c_void_p()
        setattr(many[0], field, value)
        assert lib.engine_new(ctypes.byref(shape), many, len(many), ctypes.byref(made)) and not made.value, field
    assert lib.engine_new(ctypes.byref(shape), engine.structs[1], 3, ctypes.byref(made))


def arrays_of(struct):
    return [getattr(struct, name) for name, kind in struct._fields_ if kind is Array]


def run_alone(engine, ids, folder, *command):
    """Logits of engine_driver.c on a copy of the engine's model: (2, prompts, vocab), before and after the last token."""
    shape, many = engine.structs
    shape, many = type(shape).from_buffer_copy(shape), type(many).from_buffer_copy(many)
    shape.sequences, shape.batch = len(ids), ids.numel()
    tail, start = b'', 24 + ctypes.sizeof(shape) + ctypes.sizeof(many) + 4 * ids.numel()
    for array in (a for struct in (shape, *many) for a in arrays_of(struct) if a.at):
        tail += b'\0' * (-(start + len(tail)) % 64)
        where = start + len(tail)
        tail += ctypes.string_at(array.at, array.bytes)
        array.at = where
    head = b''.join(n.to_bytes(8, 'little') for n in (len(many), *ids.shape))
    (folder / 'model').write_bytes(head + bytes(shape) + bytes(many) + ids.int().numpy().tobytes() + tail)
    ran = subprocess.run([*command, 'model', 'out'], cwd=folder, capture_output=True, text=True)
    assert not ran.returncode and not ran.stderr, ran.stderr
    return torch.frombuffer(bytearray((folder / 'out').read_bytes()), dtype=torch.float32).view(2, len(ids), -1)


ALONE = {'sanitizers': ('cc', '-g', '-O0', '-fsanitize=address,undefined', '-fno-sanitize-recover', '-march=native'),
         'ARM': ('aarch64-linux-gnu-gcc', '-O2', '-static', '-march=armv8.2-a+dotprod')}
RUN_WITH = {'sanitizers': (), 'ARM': ('qemu-aarch64-static',)}


@pytest.fixture(scope='module', params=ALONE)
def alone(request, tmp_path_factory):
    """Command of engine_driver.c, compiled for another processor or with sanitizers."""
    compiler, run_with = ALONE[request.param], RUN_WITH[request.param]
    if missing := [program for program in (compiler[0], *run_with) if not shutil.which(program)]:
        pytest.skip(f'needs {missing[0]}')
    program, source = tmp_path_factory.mktemp('alone') / 'alone', Path(__file__).with_name('engine_driver.c')
    subprocess.run([*compiler, '-ffp-contract=off', '-Wno-psabi', '-o', program, source, '-lm'], check=True)
    return *run_with, program


@pytest.mark.parametrize('name', ['tern,bin,int4', 'bitnet', 'group int4', 'int8 activations'])
@torch.no_grad()
def test_other_processors_and_sanitizers(name, alone, ids, tmp_path):
    """ARM's dot products (emulated) give the same bits, and the sanitizers find no wrong access and no undefined behaviour."""
    engine = Engine(MODELS[name](), sequences=8, threads=1)
    got = run_alone(engine, ids[:, :13], tmp_path, *alone)
    for step, want in enumerate((engine(ids[:, :12]), engine(ids[:, :13]))):
        assert torch.equal(got[step], want[:, 0])


def test_without_a_compiler(monkeypatch, tmp_path):
    """The message says what to install."""
    monkeypatch.setenv('CC', 'no-such-compiler')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    library.cache_clear()
    try:
        with pytest.raises(ValueError, match=r'engine\.c was not compiled \(.*no-such-compiler.*\); install a C compiler'):
            Engine(gpt('fp'))
    finally:
        library.cache_clear()
