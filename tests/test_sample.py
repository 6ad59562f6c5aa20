"""sample.py as a user runs it, on runs of seconds: a mixed binary, ternary and 4-bit GPT that knows two texts, and a
BitNet that plays tic-tac-toe badly; where it matters what a model says, on one that says it."""
import io
import json
import os
import random
import re
import runpy
import shutil
import signal
import sys
import time
import zipfile
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file

import common
import layers
import sample
from data.tictactoe import prepare as tictactoe
from engine import load
from engine.engine import Engine, library
from readers import tasks, tokens
from train_bitnet import BitNet, BitNetConfig
from train_gpt import GPT, GPTConfig

CYCLE = 'aé€ü'                # goes on for ever, in characters of 1, 2, 3 and 2 bytes
DOCUMENT = 'hi.'              # ends with end-of-text
CONTEXT = 16
GREEDY = ('--temperature=0', '--max_new_tokens=8')        # one cycle
PIPE = 'import os, sys; os.dup2(os.open("pipe", os.O_WRONLY), 1); sys.stdout = open(1, "w", encoding="utf-8")'
TYPED = 'import os, sys; os.dup2(os.open("typed", os.O_RDONLY), 0); sys.stdin = open(0, encoding="utf-8")'
UTF8 = {'PYTHONIOENCODING': 'utf-8'}


def trained(start, folder, script, *options):
    done = start(tokens.ROOT / script, f'--dataset={folder / "data"}', f'--out_dir={folder / "run"}', '--block_size=16',
                 '--n_layer=2', '--n_embd=32', '--batch_size=8', '--eval_iters=2', '--warmup_iters=10', '--learning_rate=1e-2',
                 '--device=cpu', *options, cwd=folder).wait()
    assert done.code == 0, done.err
    return folder / 'run'


@pytest.fixture(scope='module')
def run(tmp_path_factory, start):
    """The out_dir of a finished run of train_gpt.py."""
    folder = tmp_path_factory.mktemp('sample')
    tokenizer = tokens.byte()
    text = (CYCLE * 8 + '\0' + (DOCUMENT + '\0') * 12) * 40
    for split in tokens.SPLITS:
        tokens.write(folder / 'data', split, [tokenizer.encode(text)], tokenizer)
    return trained(start, folder, 'train_gpt.py', '--n_head=2', '--n_binary=2', '--qkv_proj=bin', '--c_proj=int4',
                   '--mlp_proj=tern', '--max_iters=100', '--eval_interval=100')


@pytest.fixture(scope='module')
def player(tmp_path_factory, start):
    """The out_dir of a finished run of train_bitnet.py on games of tic-tac-toe."""
    folder = tmp_path_factory.mktemp('player')
    tictactoe.main(['--games=500', '--val_games=20', f'--out_dir={folder / "data"}'])
    return trained(start, folder, 'train_bitnet.py', '--task=tictactoe', '--n_head=4', '--n_kv_head=2', '--n_ff=64',
                   '--max_iters=100', '--eval_interval=100', '--batch_size=16')


class Terminal(io.TextIOWrapper):
    def isatty(self):
        return True


@pytest.fixture
def cli(run, monkeypatch, capsys):
    """cli('--key=value', ...) -> (exit status, stdout, stderr): sample.py's command line on the run, in this process,
    which spares the seconds that importing torch takes. typed: what stands on its standard input, a pipe or a terminal."""
    def call(*options, ckpt=run, typed='', stdin=io.TextIOWrapper):
        capsys.readouterr()                     # what fixtures printed
        monkeypatch.setattr(sys, 'argv', ['sample.py', f'--ckpt={ckpt}', '--device=cpu', *map(str, options)])
        monkeypatch.setattr(sys, 'stdin', stdin(io.BytesIO(typed if isinstance(typed, bytes) else typed.encode())))
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


# ---------------------------------------------------------------------------------------------------------------------
# output


def test_command_line_from_another_folder(run, tmp_path, start):
    """stdout is prompt and text alone, also past the context of 16 tokens; the speed goes to stderr."""
    done = start(tokens.ROOT / 'sample.py', f'--ckpt={run / "best.pt"}', '--prompt=a', '--temperature=0', '--max_new_tokens=47',
                 '--device=cpu', cwd=tmp_path, **UTF8).wait()
    assert (done.code, done.out) == (0, CYCLE * 6 + '\n')                    # 48 bytes, 8 a cycle
    assert re.fullmatch(r'47 tokens in [\d.]+ s, [\d,]+ tokens/s on cpu; .*best\.pt, step 100\n', done.err)
    assert not list(tmp_path.iterdir())


def test_streams_whole_characters_and_a_closed_pipe_ends_it(run, tmp_path, start):
    """Text arrives while the program runs, never half a character; it ends without a message when its reader leaves."""
    os.mkfifo(tmp_path / 'pipe')
    job = start(tokens.ROOT / 'sample.py', f'--ckpt={run}', '--prompt=a', '--device=cpu', '--temperature=0',
                '--max_new_tokens=1000000', cwd=tmp_path, patch=PIPE, **UTF8)
    with open(tmp_path / 'pipe', 'rb', 0) as pipe:
        text = ''
        while len(text) < 40:
            text += os.read(pipe.fileno(), 1 << 16).decode()            # raises for half a character
        assert job.process.is_alive() and (CYCLE * len(text)).startswith(text)
    done = job.wait()
    assert (done.code, done.err) == (-signal.SIGPIPE, '')


def test_ctrl_c_ends_the_line(run, tmp_path, start):
    """No traceback, exit status 130."""
    job = start(tokens.ROOT / 'sample.py', f'--ckpt={run}', '--prompt=a', '--temperature=0', '--max_new_tokens=1000000',
                '--device=cpu', cwd=tmp_path, **UTF8)
    while not (job.folder / 'stdout').stat().st_size and job.process.is_alive():
        time.sleep(0.01)
    job.signal(signal.SIGINT)
    done = job.wait()
    assert (done.code, done.err) == (130, '') and done.out.endswith('\n')


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


def test_top_k_limits_the_choice(cli):
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
    status, out, err = cli('--help')
    assert status == 0 and err == '' and re.search(r'--top_k=200 +draw only from the k most likely', out)


# ---------------------------------------------------------------------------------------------------------------------
# input


@pytest.mark.parametrize('name, trainer, task, loss', [('run', 'train_gpt', '', 1), ('player', 'train_bitnet', 'tictactoe', 3)])
def test_packed_file_is_the_same_model(request, cli, name, trainer, task, loss):
    """best.pt and packed.safetensors give equal logits, bit for bit, and the same text for the same seed. Greedy text with
    cached keys and values is that of full passes."""
    folder = request.getfixturevalue(name)
    best, tokenizer, about = load.load(str(folder / 'best.pt'))
    packed, same_tokenizer, same_about = load.load(str(folder / 'packed.safetensors'))
    for seen in (about, same_about):
        assert (seen['step'], seen['trainer'], seen['task'], seen['quantized']) == (100, trainer, task, {})
    assert about['config']['max_iters'] == 100 and about['val_loss'] < loss
    assert tokenizer.describe() == same_tokenizer.describe()
    assert not best.training and not packed.training
    assert sum(isinstance(m, layers.LowBit) and m.packed for m in packed.modules()) == 8
    ids = torch.randint(256, (5, CONTEXT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for T in (1, 7, CONTEXT):
            assert torch.equal(best(ids[:, :T]), packed(ids[:, :T]))
        ids = ids[:, :3]
        for new in sample.generate(best, ids, CONTEXT - 3, 256, temperature=0):
            assert torch.equal(new, best(ids)[:, -1].argmax(-1))
            ids = torch.cat([ids, new[:, None]], 1)
    for dtype in ('float32', 'bfloat16'):
        options = (f'--dtype={dtype}', '--num_samples=2', '--temperature=2', '--max_new_tokens=40', '--top_k=0')
        texts = [cli(*options, ckpt=folder / file)[1] for file in ('best.pt', 'packed.safetensors')]
        assert texts[0] == texts[1] and len(texts[0]) > 20


def test_a_run_folder_stands_for_its_best_file(run, cli, tmp_path):
    """best.pt is read, else last.pt, else packed.safetensors; for a damaged last.pt the one before it."""
    for name in ('best.pt', 'last.pt', 'packed.safetensors'):
        shutil.copy(run / name, tmp_path)
    for name in ('best.pt', 'last.pt', 'packed.safetensors'):
        status, _, err = cli('--max_new_tokens=1', ckpt=tmp_path)
        assert status == 0 and f'{tmp_path}/{name}, step 100' in err
        (tmp_path / name).unlink()
    shutil.copy(run / 'last.pt', tmp_path / 'last.prev.pt')
    (tmp_path / 'last.pt').write_bytes(b'damaged')
    status, _, err = cli('--max_new_tokens=1', ckpt=tmp_path)
    assert status == 0 and err.startswith('warning: ') and 'last.prev.pt (step 100)' in err


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


@pytest.mark.parametrize('words, said', [
    ('--temperature=-0.5', 'temperature=-0.5'), ('--temperature=nan', 'temperature=nan'), ('--top_k=-1', 'top_k=-1'),
    ('--num_samples=0', 'num_samples=0'), ('--max_new_tokens=0', 'max_new_tokens=0'), ('--games=0', 'games=0'),
    ('--device=gpu', "device='gpu'"), ('--dtype=float8', "dtype='float8'"), ('--prompt=FILE:no.txt', "'no.txt': No such file"),
    ('--mode=talk', "'generate', 'chat', 'play'"), ('--side=x', "'X', 'O'"), ('--against=me', "'', 'random', 'perfect'"),
    ('talk', "'talk'"), ('--stop=x', 'stop '), ('chat --num_samples=2', 'num_samples '),              # of another mode
    ('play --temperature=1', 'temperature '), ('play --against=random --side=O', 'side ')])
def test_mistakes_are_one_line(cli, words, said):
    """An impossible value or an option of another mode: one line that names it, status 2, nothing on stdout."""
    status, out, err = cli(*words.split())
    assert (status, out) == (2, '') and err.startswith('error: ') and err.count('\n') == 1 and said in err


def test_unreadable_checkpoints_are_one_line(run, cli, tmp_path):
    """A missing or empty folder, another trainer's file, a cut or altered file: one line that names it."""
    best, packed = (run / 'best.pt').read_bytes(), (run / 'packed.safetensors').read_bytes()
    with zipfile.ZipFile(run / 'best.pt') as z:
        largest = max(z.infolist(), key=lambda i: i.file_size)
    altered = bytearray(best)
    altered[largest.header_offset + 500] ^= 1
    other = common.read_checkpoint(str(run / 'best.pt')) | {'trainer': 'train_cnn'}
    common.save_checkpoint(str(tmp_path / 'other.pt'), other)
    meta, tensors = common.read_packed(str(run / 'packed.safetensors'))
    meta['trainer'] = 'train_cnn'
    meta['crc32'] = common.contents_crc(tensors, meta)
    save_file(tensors, tmp_path / 'other.safetensors', {'nanobit': json.dumps(meta)})
    files = {'cut.pt': best[:5000], 'altered.pt': bytes(altered), 'text.pt': b'hello', 'none.pt': b'',
             'cut.safetensors': packed[:-9], 'text.safetensors': b'hello', 'none.safetensors': b'',
             'renamed.safetensors': packed.replace(b'n_embd', b'm_embd', 1), 'pt.safetensors': best,
             'packed.pt': packed}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / 'empty').mkdir()
    others = ('other.pt',), ('other.pt', 'play'), ('other.safetensors',)
    for name, *mode in (('no.pt',), ('empty', 'chat'), *others, *zip(files)):
        status, out, err = cli(*mode, ckpt=tmp_path / name, typed='a')
        assert (status, out) == (2, '') and err.startswith('error: ') and err.count('\n') == 1, (name, err)
        assert str(tmp_path / name) in err
        assert not name.startswith('other') or 'was written by train_cnn.py, which trains no language model' in err


# ---------------------------------------------------------------------------------------------------------------------
# chat


def test_chat_is_an_answer_a_line(run, cli, tmp_path, start):
    """Nothing else on either stream; at a terminal stderr says what to type; bytes that are no text do not end it."""
    (tmp_path / 'typed').write_text('a\n\n/reset\n\nh')
    done = start(tokens.ROOT / 'sample.py', 'chat', f'--ckpt={run}', '--device=cpu', *GREEDY, cwd=tmp_path, patch=TYPED,
                 **UTF8).wait()
    assert (done.code, done.out, done.err) == (0, 'é€üa\né€üa\nhi.\ni.\n', '')
    status, out, err = cli('chat', *GREEDY, typed='a\n', stdin=Terminal)
    assert (status, out) == (0, '> é€üa\n> \n') and err.startswith('Write') and err.count('\n') == 1
    closed = start(tokens.ROOT / 'sample.py', 'chat', f'--ckpt={run}', '--device=cpu', *GREEDY, cwd=tmp_path,
                   patch='import sys; sys.stdin = None').wait()         # as after `<&-`
    assert (closed.code, closed.out, closed.err) == (0, '', '')
    status, out, err = cli('chat', *GREEDY, typed=b'\xff\xfe\na\n')
    assert (status, err) == (0, '') and out.endswith('é€üa\n')


@pytest.mark.parametrize('options, typed, out', [
    ((), '', ''), ((), '/quit', ''), ((), '/reset\n', ''), ((), 'a\r\n', 'é€üa\n'), ((), 'a', 'é€üa\n'),
    ((), 'aé\n\n/quit\na\n', '€üaé\n€üaé\n'), ((), 'h\n\n/quit\na\n', 'i.\nhi.\n'), ((), 'aé\n/reset\n\n', '€üaé\nhi.\n'),
    ((), CYCLE * 10 + '\n\na\n', f'{CYCLE}\n{CYCLE}\né€üa\n'),               # 80 tokens in a context of 16
    (('--max_new_tokens=40',), 'a\n\n', ('é€üa' * 5 + '\n') * 2),             # a conversation that grows beyond it
    (('--stop=€',), 'a\n\na\n', 'é€\nüaé€\né€\n'), (('--stop=zzz',), 'a\n', 'é€üa\n')])
def test_chat_answers_each_line(cli, options, typed, out):
    """An answer depends on the lines before it, up to /reset, /quit ends; long input keeps its end; --stop ends an answer."""
    assert cli('chat', *GREEDY, *options, typed=typed) == (0, out, '')


def test_chat_saves_the_conversation(cli, tmp_path, monkeypatch):
    """/save writes both sides since the last /reset, by default to chat.txt; a failure costs one line only."""
    monkeypatch.chdir(tmp_path)
    status, out, err = cli('chat', *GREEDY, typed='a\n/save one two.txt\n\n/save no/file\n/save\nü\n/reset\n/save empty\n')
    assert (status, out) == (0, 'é€üa\né€üa\naé€ü\n')
    assert (tmp_path / 'one two.txt').read_text() == 'aé€üa' and (tmp_path / 'chat.txt').read_text() == 'aé€üaé€üa'
    assert (tmp_path / 'empty').read_bytes() == b'' and len(list(tmp_path.iterdir())) == 3
    assert err == ('wrote one two.txt, 9 bytes\ncould not write \'no/file\': No such file or directory; give another name\n'
                   'wrote chat.txt, 17 bytes\nwrote empty, 0 bytes\n')


def test_chat_begins_with_the_prompt(cli, tmp_path, monkeypatch):
    """--prompt comes before the first line and after /reset; /save has it too."""
    monkeypatch.chdir(tmp_path)
    status, out, _ = cli('chat', *GREEDY, '--prompt=h', typed='\n/save one\n/reset\n\n/save two\n')
    assert (status, out) == (0, 'i.\ni.\n')
    assert (tmp_path / 'one').read_text() == (tmp_path / 'two').read_text() == 'hi.\n'


# ---------------------------------------------------------------------------------------------------------------------
# a BitNet


def bitnet_file(path, task='tictactoe', **shape):
    """A checkpoint of train_bitnet.py with random weights."""
    torch.manual_seed(0)
    shape = dict(vocab_size=256, block_size=16, n_layer=1, n_head=2, n_kv_head=1, n_embd=16, n_ff=16) | shape
    model = BitNet(BitNetConfig(**shape))
    common.save_checkpoint(str(path), {
        'trainer': 'train_bitnet', 'step': 3, 'model_config': asdict(model.config), 'model': model.state_dict(),
        'tokenizer': tokens.byte().describe(), 'config': {'task': task}})
    return path


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """scripted(say, task) -> a checkpoint whose model says say(text it saw so far, bytes), and next to that the lowest byte;
    .seen: the texts."""
    def make(say, task='tictactoe', **shape):
        texts = []

        def forward(self, ids, targets=None, cache=None):
            if cache is None:
                texts[:] = []
            if cache and 'k' not in cache[0]:
                texts[:] = [b''] * len(ids)
            if cache:
                cache[0]['k'] = torch.empty(1, 1, ids.shape[1] + (cache[0]['k'].shape[2] if 'k' in cache[0] else 0), 1)
            before = texts if cache else [b''] * len(ids)
            texts[:] = [text + bytes(row) for text, row in zip(before, ids.tolist(), strict=True)]
            make.seen.extend(texts)
            logits = -torch.arange(256.0).repeat(len(ids), 1, 1) / 256
            for row, text in zip(logits, texts, strict=True):
                row[0, say(text)] = 5.0
            return logits
        monkeypatch.setattr(BitNet, 'forward', forward)
        monkeypatch.setattr('engine.load.into_engine', lambda model, *args, **options: model)      # it would not call forward
        make.seen = []
        return bitnet_file(tmp_path / 'last.pt', task, **shape)
    return make


@pytest.mark.parametrize('task, begin', [('tictactoe', b'\n'), ('arithmetic', b'\n'), ('', b'\0')])
def test_a_document_begins_as_in_training(cli, scripted, task, begin):
    """Behind a line end where lines have answers, else behind end-of-text; in a chat too, again after /reset."""
    ckpt = scripted(lambda text: ord('x'), task)
    assert cli('--max_new_tokens=2', '--temperature=0', ckpt=ckpt)[1] == 'xx\n' and scripted.seen == [begin, begin + b'x']
    scripted.seen.clear()
    assert cli('chat', '--max_new_tokens=1', '--temperature=0', ckpt=ckpt, typed='1+1=\r\n\n/reset\n2\n')[1] == 'x\nx\nx\n'
    assert scripted.seen == [begin + b'1+1=', begin + b'1+1=x', begin + b'2']


def test_chat_stops_at_a_line_end(cli, scripted):
    """--stop='\\n' as one types it: an answer ends with its line, and the next sum follows it."""
    answers = {b'12+34=': b'46\n', b'1-2=': b'-1\n'}

    def say(text):
        prompt, _, answer = text.rpartition(b'=')
        line = prompt.split(b'\n')[-1] + b'='
        return answers[line][len(answer)]
    ckpt = scripted(say, 'arithmetic', block_size=64)
    assert cli('chat', '--stop=\\n', '--temperature=0', ckpt=ckpt, typed='12+34=\n1-2=\n') == (0, '46\n-1\n', '')
    assert scripted.seen[-1] == b'\n12+34=46\n1-2=-1'


# ---------------------------------------------------------------------------------------------------------------------
# play


def best(text):
    """The choice of a perfect player, after the two letters that name the sides."""
    assert text[:1] == b'\n' and text[1:3] == (b'mr', b'rm')[(len(text) - 3) % 2]
    return ord(tasks.best_moves(text[3:].decode())[0])


def test_play_shows_the_board_after_each_move(cli, scripted):
    """Input that is no free cell, of whatever kind, is named and asked for again."""
    ckpt = scripted(best)
    typed = ['5', '5', '1', '', 'x', '12', '0', '٣', b'\xff', '9']         # 1 and 5 are taken when they come again
    typed = b'\n'.join(t if isinstance(t, bytes) else t.encode() for t in typed)
    status, out, err = cli('play', ckpt=ckpt, typed=typed)
    assert (status, err) == (0, '')
    assert out.splitlines()[:12] == [' 1 2 3', ' 4 5 6', ' 7 8 9', ' 1 2 3', ' 4 X 6', ' 7 8 9', 'the model plays 1', ' O 2 3',
                                     ' 4 X 6', ' 7 8 9', "'5' is no free cell; free are 2 3 4 6 7 8 9",
                                     "'1' is no free cell; free are 2 3 4 6 7 8 9"]
    assert [line.split(' is no')[0] for line in out.splitlines() if 'is no free' in line] == [
        "'5'", "'1'", "''", "'x'", "'12'", "'0'", "'٣'", "'\ufffd'"]
    assert out.splitlines()[-8:] == [' O 2 3', ' 4 X 6', ' 7 8 X', 'the model plays 3', ' O 2 O', ' 4 X 6', ' 7 8 X',
                                     'the game ends here']
    assert scripted.seen == [b'\nrm5', b'\nrm519']


@pytest.mark.parametrize('side, typed, result', [
    ('X', '1 2 7 6 9', 'a draw'), ('X', '1 2 4', 'the model wins'), ('O', '2 3', 'the model wins'), ('O', '5 3 4 8', 'a draw')])
def test_play_to_the_end(cli, scripted, side, typed, result):
    """As X, who begins, and as O, against a perfect model; later input is not read."""
    typed = typed.split()
    moves, mine = '', list(typed)
    while not tasks.winner(moves):
        moves += mine.pop(0) if 'XO'[len(moves) % 2] == side else tasks.best_moves(moves)[0]
    assert not mine                                 # all that is typed is played
    status, out, err = cli('play', f'--side={side}', ckpt=scripted(best), typed='\n'.join([*typed, '1', '2']))
    assert (status, err) == (0, '') and out.splitlines()[-1] == result
    cells = ['XO'[moves.index(c) % 2] if c in moves else c for c in '123456789']
    assert out.splitlines()[-4:-1] == [' ' + ' '.join(cells[i:i + 3]) for i in (0, 3, 6)]
    assert re.findall(r'the model plays (\d)', out) == list(moves[side == 'X'::2]) and 'no free cell' not in out
    assert {text[:3] for text in scripted.seen} == {b'\nrm' if side == 'X' else b'\nmr'}


def test_an_illegal_move_of_the_model_is_named(cli, scripted):
    """Its next choices count instead, and it may lose."""
    status, out, err = cli('play', ckpt=scripted(lambda text: 0xe9), typed='4\n5\n6\n')
    assert (status, err) == (0, '') and out.splitlines()[-1] == 'you win'
    assert out.count("b'\\xe9', which is no free cell") == 2
    assert re.findall(r'the model plays (\d)', out) == ['1', '2']
    out = cli('play', '--side=O', ckpt=scripted(lambda text: ord('7')), typed='4\n5\n6\n')[1]
    assert re.findall(r'the model plays (\d)', out) == ['7', '1', '2'] and out.splitlines()[-1] == 'you win'
    assert out.count("b'7', which is no free cell") == 2


def test_a_game_may_be_left(cli, scripted):
    """At the end of the input, by /quit and by q; at a terminal a person is asked for each move."""
    ckpt = scripted(best)
    for typed in ('', '5\n', '5\n/quit\n1\n', '5\nq\n1\n'):
        status, out, err = cli('play', ckpt=ckpt, typed=typed)
        assert (status, err) == (0, '') and out.splitlines()[-1] == 'the game ends here'
        assert out.count('the model plays') == len(typed[:1]) and 'your move' not in out
    status, out, err = cli('play', ckpt=ckpt, typed='5\n', stdin=Terminal)
    assert (status, err) == (0, '') and out.count('your move (X), 1 to 9: ') == 2 and out.endswith('\nthe game ends here\n')


@pytest.mark.parametrize('against', ['random', 'perfect'])
def test_other_players_play_the_model(player, cli, against):
    """The counts are those of tasks.score_games() with that seed, from best.pt as from the packed file."""
    model, _, _ = load.load(str(player / 'best.pt'))

    def predict(texts):
        with torch.no_grad():
            return model(torch.tensor([list(t) for t in texts]))[:, -1].argmax(-1).tolist()
    counts = tasks.score_games(predict, against, 25, 3)
    wins, draws, losses, (legal, n) = (counts[f'{against}_{name}'] for name in ('wins', 'draws', 'losses', 'legal'))
    assert 0 < legal < n and losses[0] > 0
    line = (f'25 games against {against} play: {wins[0]} wins, {draws[0]} draws, {losses[0]} losses; '
            f'{legal} of {n} moves legal ({legal / n:.2%})\n')
    for name in ('', 'packed.safetensors'):
        assert cli('play', f'--against={against}', '--games=25', '--seed=3', ckpt=player / name) == (0, line, '')


def test_other_players_do_not_beat_a_perfect_model(cli, scripted):
    """It loses no game, as X or as O; of 201 games it plays 101 as X."""
    out = cli('play', '--against=random', '--games=201', ckpt=scripted(best))[1]
    counts = re.fullmatch(r'201 games against random play: (\d+) wins, (\d+) draws, 0 losses; (\d+) of (\d+) moves legal '
                         r'\(100.00%\)\n', out)
    assert int(counts[1]) + int(counts[2]) == 201 and int(counts[1]) > 100 and counts[3] == counts[4]
    assert sum(text == b'\nmr' for text in scripted.seen) == 101
    assert cli('play', '--against=perfect', '--games=3', ckpt=scripted(best))[1].startswith(
        '3 games against perfect play: 0 wins, 3 draws, 0 losses; ')


def test_a_context_may_be_shorter_than_a_game(cli, tmp_path):
    """The model sees the last moves."""
    ckpt = bitnet_file(tmp_path / 'last.pt', block_size=4)
    assert cli('play', '--against=random', '--games=4', ckpt=ckpt)[1].startswith('4 games against random play: ')
    lines = [str(c) for c in random.Random(0).sample(range(1, 10), 9)] * 9
    status, out, err = cli('play', ckpt=ckpt, typed='\n'.join(lines))
    assert (status, err) == (0, '') and out.splitlines()[-1] in ('you win', 'a draw', 'the model wins')


def test_a_model_that_cannot_play_is_one_line(run, cli, tmp_path):
    """A GPT and a BitNet of another task."""
    for ckpt in (run / 'best.pt', bitnet_file(tmp_path / 'sums.pt', 'arithmetic')):
        for against in ((), ('--against=random',)):
            status, out, err = cli('play', *against, ckpt=ckpt, typed='5\n')
            assert (status, out) == (2, '') and err.count('\n') == 1
            assert f'error: {ckpt} was not trained to play; type --ckpt=... of a run of train_bitnet.py' in err


def test_engine_and_torch_write_the_same_text(cli, monkeypatch):
    """With the exact head the most likely text of engine/ is torch's, past the context too; --head and --inputs reach it."""
    made, into = [], load.into_engine
    monkeypatch.setattr(load, 'into_engine', lambda *a: made.append(into(*a)) or made[-1])
    texts = [cli('--prompt=a', '--temperature=0', '--max_new_tokens=40', *options)[1]
             for options in (('--engine=torch',), ('--engine=c', '--head=fp'), ('--engine=c',), ('--inputs=int8',))]
    assert texts == [CYCLE * 5 + 'a\n'] * 4
    assert [(e.structs[1][-1].bits, e.structs[1][0].rounded) for e in made] == [(32, 0), (8, 0), (8, 1)]


def test_without_a_compiler_torch_computes(cli, monkeypatch):
    """A note says why; --engine=c alone is an error of one line."""
    monkeypatch.setenv('NANOBIT_KERNELS', '0')
    library.cache_clear()
    try:
        done = cli('--prompt=a', *GREEDY)
        assert done[1] == CYCLE + 'a\n' and done[2].startswith('note: engine.c was not compiled (NANOBIT_KERNELS=0); unset')
        done = cli('--prompt=a', '--engine=c')
        assert done[:2] == (2, '') and re.fullmatch(r'error: engine.c was not compiled .*; type --engine=torch\n', done[2])
        done = cli('--prompt=a', '--engine=torch', '--inputs=int8')
        assert done[:2] == (2, '') and done[2].startswith('error: inputs is of the engine')
    finally:
        library.cache_clear()


def test_a_layer_that_the_engine_lacks(cli, monkeypatch):
    """The note names it, and torch writes the same text, although the engine used up the blocks; --engine=c is an error."""
    def fill(self, name, *rest, plain=Engine.fill):
        if name == 'lm_head':
            raise ValueError('lm_head: the engine has no such layer; use torch')
        plain(self, name, *rest)
    monkeypatch.setattr(Engine, 'fill', fill)
    done = cli('--prompt=a', *GREEDY)
    assert done[1] == CYCLE + 'a\n' and done[2].startswith('note: lm_head: the engine has no such layer')
    why = 'error: lm_head: the engine has no such layer; use torch; type --engine=torch\n'
    assert cli('--prompt=a', '--engine=c') == (2, '', why)
