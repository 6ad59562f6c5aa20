"""
Generate text with what train_gpt.py has trained: best.pt, last.pt or packed.safetensors, on the CPU or a GPU.

    python sample.py --ckpt=out/pycode_bin --prompt='def main'                       # streams as it is generated
    python sample.py --ckpt=out/pycode_bin/packed.safetensors --num_samples=3        # the same weights, 1 bit each
    python sample.py --ckpt=out/pycode_bin --prompt=FILE:start.txt > story.txt       # stdout is the text alone

Model and tokenizer are in the checkpoint; nothing else is read. All samples are generated as one batch: a token costs
mostly the fixed price of a pass through the layers, so ten samples take hardly longer than one.
"""
import codecs
import os
import signal
import sys
import time

import torch

import common
import configurator
import layers
import tokens
from train_gpt import GPT, GPTConfig

ckpt = 'out/gpt'               # a run's folder (its best.pt, else last.pt, else packed.safetensors) or one of its files
prompt = ''                    # text to go on from | FILE:path of such a text | '': a document's beginning
num_samples = 1                # one is shown as it grows, several at the end
max_new_tokens = 500           # per sample; it is shorter when the model ends the text
temperature = 0.8              # below 1: likelier text; above 1: more surprising; 0: always the likeliest token
top_k = 200                    # draw from the k likeliest tokens only; 0: from all
seed = 1337                    # the same seed and number of samples give the same text
device = ''                    # '': cuda where there is one, else cpu
dtype = ''                     # float32 | bfloat16 (autocast); '': bfloat16 on cuda, float32 on cpu
config = configurator.override(globals(), quiet=True)   # file.py ... --key=value, later wins; stdout is the text alone


def find_checkpoint(path):
    """A file as it is; of a run's folder best.pt, else last.pt, else packed.safetensors."""
    if not os.path.isdir(path):
        return path
    for name in ('best.pt', 'last.pt', 'packed.safetensors'):
        if os.path.isfile(os.path.join(path, name)):
            return os.path.join(path, name)
    configurator.fail(f"{path} holds no best.pt, last.pt or packed.safetensors; type --ckpt=... and a run's out_dir")


def load(path):
    """Checkpoint or packed file of train_gpt.py -> (GPT on the CPU, set to evaluation, Tokenizer, training step)."""
    if not os.path.isfile(path):
        configurator.fail(f"{path} does not exist; type --ckpt=... and a run's out_dir, or make one with train_gpt.py")
    try:
        if path.endswith('.safetensors'):
            state, tensors = layers.read_packed(path)
            if state['trainer'] != 'train_gpt':
                raise ValueError(f'{path} was written by {state["trainer"]}.py, not train_gpt.py')
            model = layers.load_packed(GPT(GPTConfig(**state['model_config'])), tensors)
        else:
            state = common.read_last_checkpoint(path, 'train_gpt')
            model = GPT(GPTConfig(**state['model_config']))
            common.load_model_state(model, state['model'], path)
        return model.eval(), tokens.from_description(state['tokenizer']), state['step']
    except (OSError, ValueError) as e:
        configurator.fail(f'{e}; give another --ckpt')
    except (KeyError, TypeError) as e:              # whole, but its description is not what this code writes
        configurator.fail(f'{path} is damaged or of another version ({type(e).__name__}: {e}); give another --ckpt')


def read_prompt(prompt):
    """The prompt as bytes; FILE:path stands for the contents of that file."""
    if not prompt.startswith('FILE:'):
        return prompt.encode('utf-8', 'surrogateescape')               # bytes of the command line as they were typed
    try:
        with open(prompt[5:], 'rb') as f:
            return f.read()
    except OSError as e:
        configurator.fail(f'cannot read {prompt[5:]!r}: {e.strerror}; type --prompt=FILE:path of a text')


def pick_device(device, dtype):
    """(torch.device, autocast context) of the two constants; one clear line for what this machine does not have."""
    dev = common.setup_processes(device)[-1]
    if dtype not in ('', 'float32', 'bfloat16'):
        configurator.fail(f'dtype={dtype!r}; type --dtype=float32 or --dtype=bfloat16')
    low = dtype == 'bfloat16' or (dtype == '' and dev.type == 'cuda')
    return dev, torch.autocast(dev.type, torch.bfloat16, enabled=low)


def main():
    for key, value, least in (('num_samples', num_samples, 1), ('max_new_tokens', max_new_tokens, 1),
                              ('temperature', temperature, 0), ('top_k', top_k, 0)):
        if not value >= least:                      # nan is no number to compare with
            configurator.fail(f'{key}={value} makes no sense; type --{key}={least} or more')
    dev, amp = pick_device(device, dtype)
    text, path = read_prompt(prompt), find_checkpoint(ckpt)
    model, tokenizer, step = load(path)
    model.to(dev)

    given = tokenizer.encode(text if tokenizer.name == 'byte' else text.decode('utf-8', 'replace')).tolist()
    if len(given) > model.config.block_size:
        print(f'note: the prompt has {len(given):,} tokens, the context {model.config.block_size:,}; '
              'only the last ones are used', file=sys.stderr)
        given = given[-model.config.block_size:]
    ids = torch.tensor([given or [tokenizer.eot]] * num_samples, device=dev)
    rows, live = [[] for _ in range(num_samples)], set(range(num_samples))

    decoder = codecs.getincrementaldecoder('utf-8')('replace')         # holds back a character until it is whole
    streaming = num_samples == 1
    sys.stdout.reconfigure(errors='replace')        # a character that the terminal lacks becomes ?
    if streaming:
        print(decoder.decode(tokenizer.decode_bytes(given)), end='', flush=True)
    clock, n_tokens = time.perf_counter(), 0
    with amp:
        for new in model.generate(ids, max_new_tokens, tokenizer.vocab_size, temperature, top_k,
                                  torch.Generator(dev).manual_seed(seed % 2 ** 63)):
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
    seconds = time.perf_counter() - clock
    if streaming:
        print(decoder.decode(b'', final=True))
    else:
        print('\n---------------\n'.join(tokenizer.decode(given + row) for row in rows))
    sys.stdout.flush()
    print(f'{n_tokens:,} tokens in {seconds:.1f} s, {n_tokens / seconds:,.0f} tokens/s on {dev}; {path}, step {step}',
          file=sys.stderr)


if __name__ == '__main__':
    if hasattr(signal, 'SIGPIPE'):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)                  # `| head` ends this as quietly as it ends cat
    try:
        main()
    except KeyboardInterrupt:
        print(flush=True)
        sys.exit(130)
