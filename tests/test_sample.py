"""sample.py as a user runs it, on a run of seconds: a mixed binary, ternary and 4-bit GPT that knows two texts."""
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import asdict

import pytest
import torch

import common
import layers
import sample
import tokens
from train_gpt import GPT, GPTConfig

CYCLE = 'aé€ü'                # goes on for ever, in characters of 1, 2, 3 and 2 bytes
DOCUMENT = 'hi.'              # ends with end-of-text
CONTEXT = 16
ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONIOENCODING': 'utf-8'}
torch.set_num_threads(1)


def command(*options, script='sample.py'):
    return [sys.executable, str(tokens.ROOT / script), *map(str, options)]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The out_dir of a finished run of train_gpt.py."""
    folder = tmp_path_factory.mktemp('sample')
    tokenizer = tokens.byte()
    text = (CYCLE * 8 + '\0' + (DOCUMENT + '\0') * 12) * 40
    for split in tokens.SPLITS:
        tokens.write(folder / 'data', split, [tokenizer.encode(text)], tokenizer)
    done = subprocess.run(command(
        f'--dataset={folder / "data"}', f'--out_dir={folder / "run"}', '--block_size=16', '--n_layer=2', '--n_head=2',
        '--n_embd=32', '--n_binary=2', '--qkv_proj=bin', '--c_proj=int4', '--mlp_proj=tern', '--batch_size=16',
        '--max_iters=150', '--eval_interval=150', '--eval_iters=2', '--warmup_iters=10', '--learning_rate=1e-2',
        '--device=cpu', script='train_gpt.py'), capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder / 'run'


@pytest.fixture
def cli(run, monkeypatch, capsys):
    """cli('--key=value', ...) -> (exit status, stdout, stderr): sample.py's command line on the run, in this process,
    which spares the seconds that importing torch takes."""
    def call(*options, ckpt=run):
        monkeypatch.setattr(sys, 'argv', ['sample.py', f'--ckpt={ckpt}', '--device=cpu', *map(str, options)])
        on_pipe = signal.getsignal(signal.SIGPIPE)
        try:
            runpy.run_path(str(tokens.ROOT / 'sample.py'), run_name='__main__')
            status = 0
        except SystemExit as e:
            status = e.code
        finally:
            signal.signal(signal.SIGPIPE, on_pipe)
        return (status, *capsys.readouterr())
    return call


def start(*options):
    return subprocess.Popen(command(*options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)


# ---------------------------------------------------------------------------------------------------------------------
# what is printed


def test_command_line_from_another_folder(run, tmp_path):
    """stdout is prompt and text alone, also past the context of 16 tokens; the speed goes to stderr."""
    done = subprocess.run(command(f'--ckpt={run / "best.pt"}', '--prompt=a', '--temperature=0', '--max_new_tokens=47'),
                          capture_output=True, env=ENVIRONMENT, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == CYCLE * 6 + '\n'                    # 48 bytes, 8 a cycle
    assert re.fullmatch(r'47 tokens in [\d.]+ s, [\d,]+ tokens/s on cpu; .*best\.pt, step 150\n', done.stderr.decode())
    assert not list(tmp_path.iterdir())


def test_streams_whole_characters_and_a_closed_pipe_ends_it(run):
    """Text arrives while the program runs, never half a character; when the reader leaves it ends without a word."""
    process = start(f'--ckpt={run}', '--prompt=a', '--temperature=0', '--max_new_tokens=1000000')
    text = ''
    while len(text) < 40:
        text += os.read(process.stdout.fileno(), 1 << 16).decode()     # raises for half a character
    assert process.poll() is None and (CYCLE * len(text)).startswith(text)
    process.stdout.close()
    assert process.wait(30) == -signal.SIGPIPE and process.stderr.read() == b''
    process.stderr.close()


def test_ctrl_c(run):
    """Ctrl-C ends the line and the program: no traceback, exit status 130."""
    process = start(f'--ckpt={run}', '--prompt=a', '--temperature=0', '--max_new_tokens=1000000')
    head = os.read(process.stdout.fileno(), 4)
    process.send_signal(signal.SIGINT)
    tail, stderr = process.communicate(timeout=30)
    assert process.returncode == 130 and stderr == b'' and (head + tail).endswith(b'\n')


def test_stops_at_end_of_text_and_starts_from_it(cli):
    """A document ends at end-of-text, which counts as a token and is not shown; an empty prompt begins a document."""
    status, out, err = cli('--prompt=h', '--temperature=0')
    assert (status, out) == (0, DOCUMENT + '\n') and err.startswith('3 tokens ')     # i . end-of-text
    assert cli('--temperature=0')[1] == DOCUMENT + '\n'


def test_samples_are_separated_and_repeatable(cli):
    """Three samples, each from the prompt to its end; the same seed prints the same, another seed something else."""
    options = ('--prompt=a', '--num_samples=3', '--temperature=2', '--max_new_tokens=30')
    out = cli(*options)[1]
    assert out == cli(*options)[1] != cli(*options, '--seed=1')[1]
    samples = out.removesuffix('\n').split('\n---------------\n')
    assert len(samples) == 3 == len(set(samples)) and all(s[0] == 'a' for s in samples)
    status, out, err = cli('--prompt=h', '--num_samples=2', '--temperature=0')
    assert out == 'hi.\n---------------\nhi.\n' and err.startswith('6 tokens ')


def test_top_k(cli):
    """top_k=1 is the likeliest token whatever the temperature; a top_k above the vocabulary is all of it."""
    assert cli('--prompt=a', '--top_k=1', '--temperature=9', '--max_new_tokens=31')[1] == CYCLE * 4 + '\n'
    options = ('--prompt=a', '--temperature=2', '--max_new_tokens=20')
    assert cli(*options, '--top_k=0')[1] == cli(*options, '--top_k=256')[1] == cli(*options, '--top_k=9999')[1]


def test_prompt_file_longer_than_the_context(cli, tmp_path):
    """FILE: reads the prompt; of 80 tokens the last 16 are used and shown, with a note on stderr."""
    (tmp_path / 'p.txt').write_bytes((CYCLE * 10).encode())
    status, out, err = cli(f'--prompt=FILE:{tmp_path / "p.txt"}', '--temperature=0', '--max_new_tokens=8')
    assert (status, out) == (0, CYCLE * 3 + '\n')
    assert err.splitlines()[0] == 'note: the prompt has 80 tokens, the context 16; only the last ones are used'


def test_help_lists_the_constants(cli):
    """--help goes to stdout, with the comment beside each constant."""
    status, out, err = cli('--help')
    assert status == 0 and err == '' and re.search(r'--top_k=200 +draw from the k likeliest', out)


# ---------------------------------------------------------------------------------------------------------------------
# what is read


def test_packed_file_is_the_same_model(run, cli):
    """best.pt and packed.safetensors give equal logits, bit for bit, and so the same text for the same seed."""
    best, tokenizer, step = sample.load(str(run / 'best.pt'))
    packed, same_tokenizer, same_step = sample.load(str(run / 'packed.safetensors'))
    assert step == same_step and tokenizer.describe() == same_tokenizer.describe()
    assert not best.training and not packed.training
    assert sum(isinstance(m, layers.LowBit) and m.packed for m in packed.modules()) == 8
    ids = torch.randint(256, (5, CONTEXT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for T in (1, 7, CONTEXT):
            assert torch.equal(best(ids[:, :T]), packed(ids[:, :T]))
    for dtype in ('float32', 'bfloat16'):
        options = (f'--dtype={dtype}', '--num_samples=2', '--temperature=2', '--max_new_tokens=40', '--top_k=0')
        texts = [cli(*options, ckpt=run / name)[1] for name in ('best.pt', 'packed.safetensors')]
        assert texts[0] == texts[1] and len(texts[0]) > 20


def test_cache_is_the_full_forward(run):
    """Greedy text with the cache of keys and values is the text of a model that reads everything anew each time."""
    model, tokenizer, _ = sample.load(str(run / 'best.pt'))
    ids = torch.tensor([[1, 2, 3], [200, 100, 0]])
    with torch.no_grad():
        for new in model.generate(ids, CONTEXT - 3, 256, temperature=0):
            assert torch.equal(new, model(ids)[:, -1].argmax(-1))
            ids = torch.cat([ids, new[:, None]], 1)


def test_run_folder(run, cli, tmp_path):
    """Of a folder best.pt is read, else last.pt, else packed.safetensors; a damaged last.pt falls back."""
    for name in ('best.pt', 'last.pt', 'packed.safetensors'):
        shutil.copy(run / name, tmp_path)
    for name in ('best.pt', 'last.pt', 'packed.safetensors'):
        status, _, err = cli('--max_new_tokens=1', ckpt=tmp_path)
        assert status == 0 and f'{tmp_path}/{name}, step 150' in err
        (tmp_path / name).unlink()
    shutil.copy(run / 'last.pt', tmp_path / 'last.prev.pt')
    (tmp_path / 'last.pt').write_bytes(b'damaged')
    status, _, err = cli('--max_new_tokens=1', ckpt=tmp_path)
    assert status == 0 and err.startswith('warning: ') and 'last.prev.pt (step 150)' in err


def test_bpe_checkpoint_needs_nothing_else(cli, tmp_path):
    """The trained BPE tokenizer comes out of the checkpoint; padding of the vocabulary is never drawn."""
    tokenizer = tokens.train_bpe(['the quick brown fox ' * 9], 265)
    model = GPT(GPTConfig(vocab_size=320, block_size=8, n_layer=1, n_head=1, n_embd=16))
    common.save_checkpoint(str(tmp_path / 'last.pt'), {
        'trainer': 'train_gpt', 'step': 7, 'model_config': asdict(model.config), 'model': model.state_dict(),
        'tokenizer': tokenizer.describe()})
    status, out, err = cli('--prompt=the fox', '--temperature=9', '--max_new_tokens=200', ckpt=tmp_path)
    assert status == 0 and out.startswith('the fox') and 'last.pt, step 7' in err


# ---------------------------------------------------------------------------------------------------------------------
# mistakes


@pytest.mark.parametrize('option, said', [
    ('--temperature=-0.5', 'temperature=-0.5'), ('--temperature=nan', 'temperature=nan'), ('--top_k=-1', 'top_k=-1'),
    ('--num_samples=0', 'num_samples=0'), ('--max_new_tokens=0', 'max_new_tokens=0'),
    ('--device=gpu', "device='gpu'"), ('--device=meta', "device='meta'"), ('--dtype=float8', "dtype='float8'"),
    ('--prompt=FILE:no.txt', "'no.txt': No such file"), ('--temprature=1', 'did you mean temperature?'),
    ('--ckpt=no/best.pt', 'no/best.pt does not exist')])
def test_mistakes_are_one_line(cli, option, said):
    """A value that cannot be: one line that names it, exit status 2, nothing on stdout."""
    status, out, err = cli(option)
    assert (status, out) == (2, '') and err.startswith('error: ') and err.count('\n') == 1 and said in err


def test_unreadable_checkpoints_are_one_line(run, cli, tmp_path):
    """An empty folder, another trainer's file, and files that are cut, altered or something else: one line each."""
    best, packed = (run / 'best.pt').read_bytes(), (run / 'packed.safetensors').read_bytes()
    with zipfile.ZipFile(run / 'best.pt') as z:
        largest = max(z.infolist(), key=lambda i: i.file_size)
    altered = bytearray(best)
    altered[largest.header_offset + 500] ^= 1
    other = common.read_checkpoint(str(run / 'best.pt')) | {'trainer': 'train_cnn'}
    common.save_checkpoint(str(tmp_path / 'other.pt'), other)
    files = {'cut.pt': best[:5000], 'altered.pt': bytes(altered), 'text.pt': b'hello', 'none.pt': b'',
             'cut.safetensors': packed[:-9], 'text.safetensors': b'hello', 'none.safetensors': b'',
             'other.safetensors': packed.replace(b'train_gpt', b'train_cnn', 1),
             'renamed.safetensors': packed.replace(b'n_embd', b'm_embd', 1), 'pt.safetensors': best,
             'packed.pt': packed}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / 'empty').mkdir()
    for name in ('empty', 'other.pt', *files):
        status, out, err = cli(ckpt=tmp_path / name)
        assert (status, out) == (2, '') and err.startswith('error: ') and err.count('\n') == 1, (name, err)
        assert str(tmp_path / name) in err
        assert not name.startswith('other') or 'train_cnn.py, not train_gpt.py' in err
