"""
Generate text with a model of train_gpt.py or train_bitnet.py, chat with it, or play tic-tac-toe against it.

    python sample.py --ckpt=out/pycode_bin --prompt='def main'                       # prints the text as it grows
    python sample.py --ckpt=out/pycode_bin/packed.safetensors --num_samples=3        # the packed weights
    python sample.py --ckpt=out/pycode_bin --prompt=FILE:start.txt > story.txt       # stdout gets only the text
    python sample.py chat --ckpt=out/tinystories                                     # it continues your text; also in a pipe
    python sample.py chat --ckpt=out/arithmetic --stop='\\n' --temperature=0          # type 12+34=
    python sample.py play --ckpt=out/tictactoe                                       # you against the model
    python sample.py play --ckpt=out/tictactoe --against=perfect --games=200         # a perfect player against it

best.pt, last.pt and packed.safetensors each contain the model and its tokenizer. --ckpt may also be a Hugging Face folder of
BitNetForCausalLM, like microsoft/bitnet-b1.58-2B-4T. All samples are one batch: most of the time
is the fixed cost of a pass through the layers, so ten samples take little longer than one. Runs on the CPU or a GPU. On a CPU
engine/ computes from the packed codes; it needs a C compiler.
"""
import codecs
import math
import os
import signal
import sys
import time

import torch

import common
import configurator
from engine import load
from engine.engine import Engine
from readers import tasks

mode = 'generate'              # generate | chat | play; the word alone, without --mode=, works too
ckpt = 'out/gpt'               # folder of a run (best.pt, else last.pt, else packed.safetensors) or a file in it | see above
prompt = ''                    # text to continue, also in chat | FILE:path of a text file | '': the start of a document
num_samples = 1                # one is printed as it grows, several at the end
max_new_tokens = 500           # tokens per sample or answer; fewer if the model ends the text
temperature = 0.8              # below 1: more likely text; above 1: more varied; 0: always the most likely token
top_k = 200                    # draw only from the k most likely tokens; 0: from all
stop = ''                      # chat: an answer also ends after this text; \n is a line end
side = 'X'                     # play: your side, X (moves first) or O
against = ''                   # play: random | perfect: the player that replaces you
games = 200                    # play: number of games with `against`; the model begins half of them
seed = 1337                    # the same seed and number of samples give the same text
device = ''                    # '': cuda if available, else cpu
dtype = ''                     # float32 | bfloat16 (autocast); '': bfloat16 on cuda, float32 on cpu
engine = ''                    # c: engine/engine.c, on the CPU | torch; '': c where it can run the model
head = 'int8'                  # c: int8 | fp: int8 rounds a full-precision head and embedding to 8 bits
inputs = 'fp32'                # c: fp32 | int8: int8 rounds the inputs of binary and some 4-bit layers per token; faster
_MODES = ('generate', 'chat', 'play')
_defaults = dict(globals())
_words = [f'--mode={word}' if word in _MODES else word for word in sys.argv[1:]]
config = configurator.override(globals(), _words, quiet=True)   # file.py ... --key=value, later wins; stdout is only for text


def read_prompt(prompt):
    """The prompt as bytes; FILE:path means the contents of that file."""
    if not prompt.startswith('FILE:'):
        return prompt.encode('utf-8', 'surrogateescape')               # the bytes that were typed
    try:
        with open(prompt[5:], 'rb') as f:
            return f.read()
    except OSError as e:
        configurator.fail(f'cannot read {prompt[5:]!r}: {e.strerror}; type --prompt=FILE:path of a text')


@torch.no_grad()
def generate(model, ids, max_new_tokens, vocab_size, temperature=1.0, top_k=0, generator=None):
    """Yield the next ids (B,) int64, one step at a time, after the prompt ids (B, T >= 1). Caches keys and values.

    model(ids, cache=[{} for each of model.blocks]) returns logits. Ids >= vocab_size are padding and are never drawn.
    temperature 0 takes the most likely id. When the context is full, its second half fills a new cache. An Engine draws its own
    random numbers, from a seed that `generator` draws."""
    if isinstance(model, Engine):
        draws = torch.randint(2 ** 62, (1,), generator=generator).item()
        yield from model.generate(ids, max_new_tokens, vocab_size, temperature, top_k, draws)
        return
    cache, fed, most = None, 0, model.config.block_size
    for _ in range(max_new_tokens):
        if cache is None or cache[0]['k'].shape[2] == most:
            keep = most if cache is None else max(1, most // 2)
            cache, fed = [{} for _ in model.blocks], max(0, ids.shape[1] - keep)
        logits = model(ids[:, fed:], cache=cache)[:, -1, :vocab_size].float()
        fed = ids.shape[1]
        if temperature == 0:
            new = logits.argmax(-1)
        else:
            logits = logits / max(temperature, 1e-6)
            if top_k:
                logits[logits < logits.topk(min(top_k, vocab_size)).values[:, [-1]]] = -math.inf
            new = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        yield new
        ids = torch.cat([ids, new[:, None]], 1)


def to_ids(tokenizer, text):
    """bytes -> list of ids. Invalid UTF-8 is replaced, except with a byte tokenizer."""
    return tokenizer.encode(text if tokenizer.name == 'byte' else text.decode('utf-8', 'replace')).tolist()


def write(model, tokenizer, dev, generator, begin):
    """Mode generate: print the prompt with one or several continuations. Returns the number of generated tokens."""
    given = to_ids(tokenizer, read_prompt(prompt))
    if len(given) > model.config.block_size:
        print(f'note: the prompt has {len(given):,} tokens, the context {model.config.block_size:,}; '
              'only the last ones are used', file=sys.stderr)
        given = given[-model.config.block_size:]
    ids = torch.tensor([tokenizer.begin + given or begin] * num_samples, device=dev)
    rows, live, n_tokens = [[] for _ in range(num_samples)], set(range(num_samples)), 0
    decoder = codecs.getincrementaldecoder('utf-8')('replace')         # waits for all bytes of a character
    streaming = num_samples == 1
    if streaming:
        print(decoder.decode(tokenizer.decode_bytes(given)), end='', flush=True)
    for new in generate(model, ids, max_new_tokens, tokenizer.vocab_size, temperature, top_k, generator):
        for i, token in enumerate(new.tolist()):
            n_tokens += i in live
            if token == tokenizer.eot:
                live.discard(i)
            elif i in live:
                rows[i].append(token)
                if streaming:
                    print(decoder.decode(tokenizer.decode_bytes([token])), end='', flush=True)
        if not live:
            break
    if streaming:
        print(decoder.decode(b'', final=True))
    else:
        print('\n---------------\n'.join(tokenizer.decode(given + row) for row in rows))
    sys.stdout.flush()
    return n_tokens


def ask(what):
    """Read a line (bytes) from a terminal or pipe; None at the end of input. Only a terminal shows the question `what`."""
    if sys.stdin.isatty():
        print(what, end='', flush=True)
    line = sys.stdin.buffer.readline()
    if not line and sys.stdin.isatty():
        print()
    return line.rstrip(b'\r\n') if line else None


def chat(model, tokenizer, dev, generator, begin):
    """Mode chat: add each input line to the text; the model continues it. An answer stops at a text's end, at `stop` or
    after max_new_tokens. Tokens that no longer fit into the context are dropped. Returns the number of generated tokens."""
    ending, n_tokens = stop.encode('utf-8', 'surrogateescape').replace(b'\\n', b'\n'), 0
    said = read_prompt(prompt)
    history = begin = begin + to_ids(tokenizer, said)
    if sys.stdin.isatty():
        print('Write text, and the model continues it; an empty line continues too. /reset clears the text, /save FILE '
              'saves it, /quit or Ctrl-D ends.', file=sys.stderr)
    while (line := ask('> ')) not in (None, b'/quit'):
        if line == b'/reset':
            history, said = begin, read_prompt(prompt)
            continue
        if line.split(b' ')[0] == b'/save':
            path = os.fsdecode(line[6:].strip()) or 'chat.txt'
            try:
                with open(path, 'wb') as f:
                    f.write(said)
                print(f'wrote {path}, {len(said):,} bytes', file=sys.stderr)
            except (OSError, ValueError) as e:      # does not end the chat
                print(f'could not write {path!r}: {getattr(e, "strerror", e)}; give another name', file=sys.stderr)
            continue
        history, said = history + to_ids(tokenizer, line), said + line
        decoder, answer = codecs.getincrementaldecoder('utf-8')('replace'), b''
        ids = torch.tensor([history], device=dev)
        for new in generate(model, ids, max_new_tokens, tokenizer.vocab_size, temperature, top_k, generator):
            history, n_tokens = history + new.tolist(), n_tokens + 1
            if history[-1] == tokenizer.eot:
                break
            piece = tokenizer.decode_bytes(new.tolist())
            answer += piece
            print(decoder.decode(piece), end='', flush=True)
            if ending and answer.endswith(ending):
                break
        print(decoder.decode(b'', final=True), end='' if answer.endswith(b'\n') else '\n', flush=True)
        said += answer + b'\n' * (history[-1] == tokenizer.eot)         # the next line starts another text
        history = history[-model.config.block_size:]
    return n_tokens


def board(moves):
    """The board as three lines: X, O and the numbers of free cells."""
    cells = [' XO'[1 + moves.index(c) % 2] if c in moves else c for c in tasks.CELLS]
    return '\n'.join(' ' + ' '.join(cells[i:i + 3]) for i in (0, 3, 6))


def play_at_terminal(logits_of):
    """Play one game against the user. An illegal move of either side prints a message; the same side moves again."""
    mine, moves, kinds = side == 'X', '', 'rm' if side == 'X' else 'mr'
    print(board(moves))
    while not tasks.winner(moves):
        if mine:
            line = ask(f'your move ({side}), 1 to 9: ')
            if line in (None, b'/quit', b'q'):
                return print('the game ends here')
            cell = line.decode('utf-8', 'replace').strip()
            if len(cell) != 1 or cell not in tasks.legal(moves):
                print(f'{cell!r} is no free cell; free are {" ".join(tasks.legal(moves))}')
                continue
        else:
            order = logits_of([b'\n' + (kinds + moves).encode()])[0].argsort(descending=True).tolist()
            if chr(order[0]) not in tasks.legal(moves):
                print(f'the model chose {bytes(order[:1])!r}, which is no free cell; its next choice counts')
            cell = next(c for c in map(chr, order) if c in tasks.legal(moves))
            print(f'the model plays {cell}')
        moves, mine = moves + cell, not mine
        print(board(moves))
    won = tasks.winner(moves)
    print('a draw' if won == '-' else 'you win' if won == side else 'the model wins')


def play(model, tokenizer, dev, about, path):
    """Mode play: at the terminal, or `games` games with `against`. The model must be trained on tic-tac-toe."""
    if about['task'] != 'tictactoe' or tokenizer.name != 'byte':
        configurator.fail(f'{path} was not trained to play; type --ckpt=... of a run of train_bitnet.py config/tictactoe.py')

    logits_of = lambda texts: tasks.next_logits(model, tokenizer, texts, dev)
    if not against:
        return play_at_terminal(logits_of)
    counts = tasks.score_games(lambda texts: logits_of(texts).argmax(-1).tolist(), against, games, seed)
    hits, n = counts.pop(f'{against}_legal')
    found = ', '.join(f'{count} {name.split("_")[1]}' for name, (count, _) in counts.items())
    print(f'{games} games against {against} play: {found}; {hits:,} of {n:,} moves legal ({hits / max(1, n):.2%})')


def read(path, dev):
    """(Engine or, where it cannot be used, the model on the device, Tokenizer, dict of load.load). Says why it cannot, unless
    the user asked for torch."""
    wanted = engine != 'torch' and (engine or dev.type == 'cpu' and dtype != 'bfloat16')
    try:
        model, tokenizer, about = load.load(path, as_stored=wanted)
        if not wanted:
            return model.to(dev), tokenizer, about
        try:
            if dev.type != 'cpu' or dtype == 'bfloat16':
                raise ValueError('the engine computes on the CPU in float32')
            return load.into_engine(model, head, 0, 64 if mode == 'play' else num_samples, inputs), tokenizer, about
        except ValueError as e:
            if engine:
                configurator.fail(f'{e}; type --engine=torch')
            print(f'note: {e}; torch computes instead, slowly, without --head and --inputs', file=sys.stderr)
            return load.load(path)[0].to(dev), tokenizer, about        # the engine used up the first one
    except ValueError as e:
        configurator.fail(f'{e}; give another --ckpt')


def main():
    sys.stdin = sys.stdin or open(os.devnull)       # noqa: SIM115  None if it is closed: its end is reached
    sys.stdout = sys.stdout or open(os.devnull, 'w')     # noqa: SIM115
    for key, value, least in (('num_samples', num_samples, 1), ('max_new_tokens', max_new_tokens, 1),
                              ('temperature', temperature, 0), ('top_k', top_k, 0), ('games', games, 1)):
        if not value >= least:                      # true for nan too
            configurator.fail(f'{key}={value} is too low; type --{key}={least} or more')
    for key, value, known in (('mode', mode, _MODES), ('side', side, ('X', 'O')), ('engine', engine, ('', 'c', 'torch')),
                              ('head', head, ('int8', 'fp')), ('inputs', inputs, ('int8', 'fp32')),
                              ('against', against, ('', 'random', 'perfect'))):
        if value not in known:
            configurator.fail(f'{key}={value!r} is none of {", ".join(map(repr, known))}; type --{key}={known[-1]}')
    others = {'generate': ('stop', 'side', 'against', 'games'), 'chat': ('num_samples', 'side', 'against', 'games'),
              'play': ('prompt', 'num_samples', 'max_new_tokens', 'temperature', 'top_k', 'stop')}[mode]
    for key in (*others, 'side') if against else others:
        if globals()[key] != _defaults[key]:
            configurator.fail(f'{key} has no use in {mode}{" --against" * bool(against)}; leave --{key} out')
    dev = common.setup_processes(device)[-1]
    for key in ('head', 'inputs') if engine == 'torch' or dev.type != 'cpu' or dtype == 'bfloat16' else ():
        if globals()[key] != _defaults[key]:
            configurator.fail(f'{key} is of the engine, which computes on the CPU in float32; leave --{key} out')
    amp = common.autocast(dev, dtype)
    if mode != 'play':
        read_prompt(prompt)                         # reports a mistake before the model is loaded
    model, tokenizer, about = read(ckpt, dev)
    path = about['path']
    sys.stdout.reconfigure(errors='replace')        # replaces characters that the terminal lacks by ?
    clock, generator = time.perf_counter(), torch.Generator(dev).manual_seed(seed % 2 ** 63)
    with amp:
        if mode == 'play':
            return play(model, tokenizer, dev, about, path)
        # Start of a document as in training: the end of the text before it, or a line end if each line has an answer.
        begin = to_ids(tokenizer, b'\n') if about['task'] else tokenizer.begin or [tokenizer.eot]
        n_tokens = {'generate': write, 'chat': chat}[mode](model, tokenizer, dev, generator, begin)
    seconds = time.perf_counter() - clock
    if mode == 'generate':
        print(f'{n_tokens:,} tokens in {seconds:.1f} s, {n_tokens / seconds:,.0f} tokens/s on {dev}; {path}'
              + (f', step {about["step"]}' if about['step'] is not None else ''), file=sys.stderr)


if __name__ == '__main__':
    if hasattr(signal, 'SIGPIPE'):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)                  # `| head` ends it without an error
    try:
        main()
    except KeyboardInterrupt:
        print(flush=True)
        sys.exit(130)
