"""
Train a residual CNN on images, each of its layers binary, ternary, 4-bit or real.

    python train_cnn.py config/digits_mixed.py                          # handwritten digits, nothing to download, a minute
    torchrun --nproc_per_node=8 train_cnn.py config/food101_mixed.py    # Food-101 (python data/food101/prepare.py first)
    python train_cnn.py --predict=image.jpg --resume=out/x/best.pt      # the five likeliest classes of a photograph

Constants, model, images, then main() from top to bottom. Stop it with Ctrl-C at any time and go on with --resume=auto.
"""
import collections
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import common
import configurator
import layers
import optim
from readers import crops, images, tokens
from report import pictures

# run
out_dir = 'out/cnn'            # config.py, log.jsonl, last.pt, best.pt, packed.safetensors and pictures go here
model_name = ''                # for your records, in the log and wandb
gpu_type = ''                  # for your records, in the log; '': the name of the device
seed = 1337                    # weights, order of samples, crops, dropout, sketches
init_from = 'scratch'          # scratch | a checkpoint whose weights to start from, as far as they fit
resume = ''                    # auto: continue the run in out_dir, or start if there is none | a checkpoint to continue from
overwrite = False              # start over in an out_dir that holds a run, and delete that run
predict = ''                   # an image: only print its classes, by the checkpoint or packed file in `resume`
# data
dataset = 'digits'             # folder under data/: digits, food101, images/<name>, made by data/*/prepare.py
image_size = 64                # pixels of a side that the network sees
crop_scale = (0.35, 1.0)       # training: a random part of the image, so much of its area
crop_ratio = 4 / 3             # ... and at most so much wider than high, or higher than wide
flip = False                   # ... mirrored at random; not for digits or letters
eval_crop = 1.0                # evaluation: the middle, so much of the side
batch_size = 64                # images per optimizer step, over all devices and micro-steps
micro_batch_size = 0           # images per device at a time; 0: its whole share. Lower: less memory, more micro-steps
eval_batch_size = 128          # ... in evaluation
num_workers = 2                # threads of each process that read images ahead; 0: none
# model
channels = (32, 64, 64, 128, 256)      # of the five blocks; the paper counts (32, 64, 128, 256, 512)
fc = (256, 256)                # widths of fc1 and fc2; the paper counts (512, 256)
filter_dimension = 3           # side of the kernels: 3 or 5
residual = True                # False: blocks without the real 1x1 skip, as the paper has them
model_config = dict(           # binary | real | ternary | int4, each; all but binary convolutions have a BatchNorm
    conv1='real', conv2='real', conv3='real', conv4='real', conv5='real', conv6='real', conv7='real', conv8='real',
    conv9='real', conv10='real', fc1='real', fc2='real', final='real')
norm = 'channel'               # of binary convolutions, over: channel (at each pixel) | spatial (each channel) | sample (all)
binary_alpha = 0.25            # starting scale of binary layers
binary_alpha_final = 1.0       # ... of a binary head, whose logits have this standard deviation
dropout = 0.0                  # after fc1 and fc2
# optimizer
optimizer = 'adamw'            # adamw | rsvd: Adam in `rank` dimensions | muon: on matrices and kernels | adam | sgd
rank = 16                      # rsvd: dimensions of the moments of matrices and kernels
interval = 200                 # rsvd: steps between two updates of the basis
side = 'left'                  # ... of the basis: left | right | short
projected = False              # ... a backward pass that makes no full gradients of real fc layers
epochs = 30.0                  # times each training image is seen in all, also for a resumed run
max_iters = 0                  # optimizer steps in total; 0: `epochs` decides
learning_rate = 1e-3           # peak
lr_scale = {'bin': 1.0, 'tern': 1.0, 'int4': 1.0, 'alpha': 10.0}    # times the rate: latent weights (not biases), binary scales
min_lr = 0.0                   # learning rate at the last step
schedule = 'cosine'            # cosine | linear | constant
warmup_iters = 100             # steps of linear warm-up
weight_decay = 0.05            # on weights, not on gains, biases and scales; inside the gradient for adam and sgd
beta1 = 0.9                    # sgd: its momentum; muon's is 0.95 on matrices and kernels
beta2 = 0.999
grad_clip = 1.0                # largest global gradient norm; 0: no clipping
# evaluation, saving and logging
eval_interval = 0              # steps; 0: at the end of each epoch. The last step always has one
log_interval = 20              # steps between log records
save_interval = 500            # steps between writes of last.pt; best.pt follows the evaluations
wandb_log = False              # also log to Weights & Biases; install wandb and log in first
wandb_project = 'nanobit'
wandb_run_name = ''            # '': model_name, or else the name of out_dir
# system
device = ''                    # '': cuda if available, else cpu
dtype = ''                     # float32 | bfloat16 (autocast); '': bfloat16 on cuda, float32 on cpu
compile = None                 # torch.compile; None: on cuda only. On a CPU it pays off only in long runs
profile = False                # profile steps 5 to 7 with torch.profiler; prints a table and writes trace.json to out_dir
config = configurator.override(globals())   # file.py ... --key=value, later wins

WORDS = {'binary': 'bin', 'real': 'fp', 'ternary': 'tern'}     # in model_config: kind of layers.py; others have one name
KINDS = WORDS | {kind: kind for kind in layers.KINDS if kind not in WORDS.values()}
OPTIMIZERS = (*optim.NAMES, 'adam', 'sgd')


# ---------------------------------------------------------------------------------------------------------------------
# model


@dataclass
class CNNConfig:
    """Shape of a CNN. It has only plain types, because checkpoints store it."""
    n_classes: int
    model_config: dict
    channels: tuple = (32, 64, 64, 128, 256)
    fc: tuple = (256, 256)
    filter_dimension: int = 3
    residual: bool = True
    norm: str = 'channel'
    binary_alpha: float = 0.25
    binary_alpha_final: float = 1.0
    dropout: float = 0.0


class CNN(nn.Module):
    """Five blocks of two convolutions: convolution, normalisation, ReLU, twice, plus the block's input through a real 1x1
    convolution where the channels change; 2x2 max-pooling behind the first four; the mean over pixels; fc1, fc2, final.
    images (N, 3, H, W), sides of 16 pixels or more, best in torch.channels_last -> logits (N, n_classes).
    """

    def __init__(self, c):
        super().__init__()
        self.config = c
        widths = [3, *(width for width in c.channels for _ in (1, 2))]
        for i in range(1, 11):
            kind, size = KINDS[c.model_config[f'conv{i}']], c.filter_dimension
            options = dict(norm=c.norm, alpha=c.binary_alpha) if kind == 'bin' else {}
            # The ReLU between two convolutions is inside the second: a low-bit one keeps only what is in front of it.
            folded = dict(act='relu') if i % 2 == 0 and kind != 'fp' else {}
            self.add_module(f'conv{i}', layers.conv2d(kind, *widths[i - 1:i + 1], size, padding=size // 2,
                                                      bias=kind == 'bin', **folded, **options))
            self.add_module(f'bn{i}', nn.Identity() if kind == 'bin' else nn.BatchNorm2d(widths[i]))
        for b in range(5 * c.residual):
            before, after = widths[2 * b], widths[2 * b + 2]
            self.add_module(f'skip{b + 1}', nn.Identity() if before == after else nn.Sequential(
                nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after)))
        for name, before, after in (('fc1', widths[-1], c.fc[0]), ('fc2', *c.fc), ('final', c.fc[1], c.n_classes)):
            kind, alpha = KINDS[c.model_config[name]], c.binary_alpha_final if name == 'final' else c.binary_alpha
            self.add_module(name, layers.linear(kind, before, after, **({'alpha': alpha} if kind == 'bin' else {})))

    def forward(self, x):
        for b in range(1, 6):
            first, second = getattr(self, f'conv{2 * b - 1}'), getattr(self, f'conv{2 * b}')
            y = getattr(self, f'bn{2 * b - 1}')(first(x))
            y = getattr(self, f'bn{2 * b}')(second(y if isinstance(second, layers.LowBit) else relu(first, y)))
            x = relu(second, y) + getattr(self, f'skip{b}')(x) if self.config.residual else relu(second, y)
            x = F.max_pool2d(x, 2) if b < 5 else x
        x = x.mean((2, 3))
        for layer in (self.fc1, self.fc2):
            x = F.dropout(F.relu(layer(x)), self.config.dropout, self.training)
        return self.final(x)


def relu(conv, y):
    """ReLU behind a convolution and its normalisation: a binary layer keeps y, so the gradient is taken from y as well and not
    from another tensor, as F.relu would; a BatchNorm does not, so that y can be overwritten."""
    return F.threshold(y, 0, 0) if isinstance(conv, layers.BinaryConv2d) else F.relu(y, inplace=True)


def predict_image():
    """Print the five likeliest classes of the image `predict`, computed in fp32."""
    path = os.path.join(out_dir, 'best.pt') if resume in ('', 'auto') else resume
    try:
        if resume.endswith('.safetensors'):
            meta, tensors = common.read_packed(path)
        else:
            meta = common.read_checkpoint(path, 'train_cnn')
        if meta.get('trainer') != 'train_cnn':
            raise ValueError(f'{path} was written by {meta.get("trainer")}.py, not train_cnn.py')
        model = CNN(CNNConfig(**meta['model_config']))
        if resume.endswith('.safetensors'):
            common.load_packed(model, tensors)
        else:
            common.load_model_state(model, meta['model'], path)
        seen = meta['images']
    except ValueError as e:
        configurator.fail(str(e))
    try:
        pixels = images.square(images.read_image(predict), seen['stored_size'])
    except ValueError as e:
        configurator.fail(f'{predict} {e}')
    pixels = torch.from_numpy(pixels.copy())[None]
    x = crops.network_input(pixels, *crops.middle_boxes(1, seen['eval_crop']), seen['size'], seen['mean'], seen['std'])
    with torch.no_grad():
        shares = model.eval()(x)[0].float().softmax(0)
    for share, i in zip(*shares.topk(min(5, len(shares))), strict=True):
        print(f'{share:6.1%}  {pictures.escaped(seen["classes"][i])}')


# ---------------------------------------------------------------------------------------------------------------------


def main():
    if predict:
        return predict_image()
    # ------------------------------------------------------------------------------------------------------- set-up
    rank_here, local_rank, world, dev = common.setup_processes(device)
    stopped = common.stop_flag()
    say = print if rank_here == 0 else (lambda *a, **k: None)
    fail = lambda why: configurator.fail(why, rank0_only=True)
    wrong_kinds = [f'{layer}={kind!r}' for layer, kind in model_config.items() if kind not in KINDS]
    common.check_config(
        config | {'optimizer': optimizer.lower()},                     # AdamW, rSVD, ... as torch and papers write them
        {'schedule': ('cosine', 'linear', 'constant'), 'optimizer': OPTIMIZERS, 'side': optim.SIDES,
         'norm': ('channel', 'spatial', 'sample')},
        dict.fromkeys(('batch_size', 'eval_batch_size', 'log_interval', 'save_interval', 'rank', 'interval'), 1)
        | dict.fromkeys(('learning_rate', 'min_lr', 'weight_decay', 'grad_clip', 'warmup_iters', 'micro_batch_size',
                         'eval_interval', 'num_workers'), 0))
    for wrong, why in (
            (not (0 <= beta1 < 1 and 0 <= beta2 < 1), f'beta1={beta1}, beta2={beta2} must be at least 0 and below 1'),
            (wrong_kinds, f'model_config: {", ".join(wrong_kinds)} is none of {", ".join(KINDS)}'),
            (len(channels) != 5 or len(fc) != 2 or min(channels + fc) < 1, f'channels={channels}, fc={fc}: not 5 and 2 widths'),
            (filter_dimension not in (1, 3, 5, 7), f'filter_dimension={filter_dimension} is no odd number up to 7'),
            (len(crop_scale) != 2 or not 0 < crop_scale[0] <= crop_scale[1] <= 1 or crop_ratio < 1,
             f'crop_scale={crop_scale}, crop_ratio={crop_ratio}: shares from 0 to 1, the smaller one first, and 1 or more'),
            (not 0 < eval_crop <= 1, f'eval_crop={eval_crop} is a share above 0 and at most 1'),
            (image_size < 16, f'image_size={image_size} leaves nothing after four halvings; type --image_size=16 or more'),
            (min(lr_scale.values()) < 0, f'lr_scale={lr_scale} is 0 or more'),
            (not 0 <= dropout < 1, f'dropout={dropout} is a share below 1'),
            (min(binary_alpha, binary_alpha_final) <= 0, 'binary_alpha and binary_alpha_final start above 0'),
            (min(epochs, max_iters or 1) <= 0, f'epochs={epochs}, max_iters={max_iters}: nothing to train')):
        if wrong:
            fail(why)
    amp = common.autocast(dev, dtype)
    torch.set_float32_matmul_precision('high')
    torch.backends.cudnn.benchmark = True
    micro, accumulation = common.split_batch(batch_size, micro_batch_size, world)
    has_norm = {model_config['conv9'], model_config['conv10']} != {'binary'} or residual and channels[3] != channels[4]
    if micro == 1 and image_size < 32 and has_norm:             # the fifth block, of which one pixel is left
        fail(f'micro_batch_size=1 at image_size={image_size} leaves a BatchNorm one number to normalise; type a larger one')
    last_path, best_path, resume_path, elsewhere = common.find_run(out_dir, resume, overwrite)

    # --------------------------------------------------------------------------------------------------------- data
    folder = tokens.dataset_dir(dataset)
    if rank_here == 0 and dataset == 'digits' and not (folder / 'images.json').exists():       # made in a second, no download
        if subprocess.run([sys.executable, str(folder / 'prepare.py')], stdout=subprocess.DEVNULL).returncode:
            raise SystemExit(2)                     # it has said why
    common.any_rank(False)                          # the others wait for it
    try:
        train_data, val_data = images.load(folder, 'train'), images.load(folder, 'val')
    except ValueError as e:
        configurator.fail(str(e))
    seen = {'classes': train_data.classes, 'mean': list(train_data.mean), 'std': list(train_data.std), 'size': image_size,
            'stored_size': train_data.size, 'eval_crop': eval_crop}
    total_iters = max_iters or math.ceil(epochs * len(train_data) / batch_size)
    epoch_of = lambda step: step * batch_size / len(train_data)

    def load(number):
        """Of micro-batch `number`, counted from the start of training: pixels, labels, boxes, mirrored, on the CPU."""
        step, i = divmod(number, accumulation)
        where = np.arange(step * batch_size, (step + 1) * batch_size).reshape(accumulation, world, micro)[i, rank_here]
        chosen = common.epoch_indices(seed, step * batch_size, len(train_data), batch_size)
        chosen = chosen.reshape(accumulation, world, micro)[i, rank_here]
        pixels = torch.from_numpy(train_data.pixels[chosen])
        pixels = pixels.pin_memory() if dev.type == 'cuda' else pixels
        boxes = crops.random_boxes(seed, where // len(train_data), chosen, crop_scale, crop_ratio, flip)
        return pixels, torch.from_numpy(train_data.labels[chosen]), *boxes

    def batches(number):
        """Inputs and labels from a micro-batch on, on the device; num_workers threads read ahead."""
        while True:
            while len(ahead) <= num_workers:
                ahead.append(readers.submit(load, number) if num_workers else number)
                number += 1
            pixels, labels, boxes, mirrored = ahead.popleft().result() if num_workers else load(ahead.popleft())
            pixels, labels = pixels.to(dev, non_blocking=True), labels.to(dev)
            yield crops.network_input(pixels, boxes, mirrored, image_size, seen['mean'], seen['std']), labels
    readers, ahead = ThreadPoolExecutor(max(1, num_workers)), collections.deque()

    # -------------------------------------------------------------------------------------------------------- model
    net_config = CNNConfig(len(train_data.classes), model_config, channels, fc, filter_dimension, residual, norm, binary_alpha,
                           binary_alpha_final, dropout)
    torch.manual_seed(seed)                                            # same weights on every rank
    model = CNN(net_config)
    if not resume_path and init_from != 'scratch':
        try:
            state = common.read_checkpoint(init_from, 'train_cnn')
        except ValueError as e:
            configurator.fail(str(e))
        own, same = model.state_dict(), state['images']['classes'] == train_data.classes
        taken = {k: t for k, t in state['model'].items()
                 if k in own and t.shape == own[k].shape and (same or not k.startswith('final.'))}
        model.load_state_dict(own | taken)
        say(f'{len(taken)} of {len(own)} tensors from {init_from}; new: {", ".join(sorted(own.keys() - taken)) or "none"}')
    model.to(dev, memory_format=torch.channels_last)
    low_bit = [m for m in model.modules() if isinstance(m, layers.LowBit)]
    packed_bytes, fp32_bytes = layers.model_bytes(model)
    n_params = sum(p.numel() for p in model.parameters())
    in_bits = lambda m: m.weight.numel() + (m.bias.numel() if m.kind == 'bin' else 0)      # the others' biases are fp32
    shares = {kind: sum(in_bits(m) for m in low_bit if m.kind == kind) / n_params for kind in layers.KINDS[1:]}
    say(f'{n_params:,} parameters, {shares["bin"]:.1%} binary, {shares["tern"]:.1%} ternary, {shares["int4"]:.1%} 4-bit; '
        f'packed {packed_bytes:,} bytes, fp32 {fp32_bytes:,}')
    say(f'{len(train_data):,} images of {len(train_data.classes)} classes to train on, {len(val_data):,} to evaluate; '
        f'{batch_size} a step = {micro} x {accumulation} micro-steps x {world} processes; {total_iters} steps')

    # ---------------------------------------------------------------------------------------------------- optimizer
    matrices = {id(p): p for n, p in model.named_parameters() if p.dim() > 1 and not n.endswith('alpha')}
    scalars = {n: p for n, p in model.named_parameters() if p.dim() < 2 and not n.endswith('alpha')}
    alphas = [p for n, p in model.named_parameters() if n.endswith('alpha')]
    groups = [{'params': [matrices.pop(id(m.weight)) for m in low_bit if m.kind == kind],
               'decay': weight_decay, 'lr_scale': lr_scale.get(kind, 1.0)} for kind in layers.KINDS[1:]]
    groups += [{'params': list(matrices.values()), 'decay': weight_decay, 'lr_scale': 1.0},
               {'params': list(scalars.values()), 'decay': 0.0, 'lr_scale': 1.0},
               {'params': alphas, 'decay': 0.0, 'lr_scale': lr_scale['alpha']}]
    name = optimizer.lower()
    if name in optim.NAMES:
        hidden = {p for n, p in model.named_parameters() if p.dim() > 1 and not n.endswith('alpha')
                  and not (name == 'muon' and n in ('conv1.weight', 'final.weight'))}       # input and output are AdamW's
        opt = optim.make(name, groups, hidden, lr=learning_rate, betas=(beta1, beta2), rank=rank, interval=interval, side=side,
                         seed=seed)
    else:
        groups = [{**g, 'weight_decay': g['decay']} for g in groups if g['params']]
        if name == 'sgd':
            opt = torch.optim.SGD(groups, lr=learning_rate, momentum=beta1, nesterov=beta1 > 0)
        else:
            opt = torch.optim.Adam(groups, lr=learning_rate, betas=(beta1, beta2), fused=dev.type in ('cpu', 'cuda'))
    if name == 'rsvd' and projected:
        optim.attach(model, opt, verbose=rank_here == 0)
    gradients = getattr(opt, 'gradients', lambda: {p: p.grad for p in raw_model.parameters() if p.grad is not None})

    # ------------------------------------------------------------------------------------------------------- resume
    step, best, wandb_id = 0, [-1.0, 0], None       # best: top-1 and its step
    digests = [train_data.digest, val_data.digest]
    described = {**asdict(net_config), **seen, 'data': digests, 'optimizer': name}
    described |= {'rank': rank, 'side': side} if name == 'rsvd' else {}
    if resume_path:
        try:
            state = common.read_last_checkpoint(resume_path, 'train_cnn', set_aside=rank_here == 0)
            was = {'side': 'left', **state['config'], **state['model_config'], **state['images'], 'data': state['data']}
            was['optimizer'] = was['optimizer'].lower()
            common.check_same(resume_path, was, described, f'resume with {out_dir}/config.py, or start from its weights alone '
                              f'with --init_from={resume_path}')
            common.load_model_state(model, state['model'], resume_path)
            common.load_optimizer(opt, state['optimizer'])
        except ValueError as e:
            configurator.fail(str(e))
        step, wandb_id = state['step'], state['wandb_id']
        best = best if elsewhere else state['best']
        del state
        say(f'resumed from {resume_path} at step {step}')
    if not common.ranks_agree(step, *digests, common.checksum(model.parameters())):
        configurator.fail('the ranks start from different steps, data or weights; do all nodes see the same files?')
    if rank_here == 0:
        common.open_run(out_dir, 'train_cnn', config, step, not resume_path or elsewhere)
    run = None
    if wandb_log and rank_here == 0:
        run = common.start_wandb(wandb_project, wandb_run_name or model_name, out_dir, config, wandb_id)
        wandb_id = run.id if run else wandb_id

    # --------------------------------------------------------------------------------------------------------- loop
    raw_model = model
    if compile or (compile is None and dev.type == 'cuda'):
        model = torch.compile(model)
    if world > 1:
        model = common.distributed(model, dev, local_rank)
    # A BatchNorm normalises by the images of one micro-batch on one rank. Its running statistics, which evaluation uses and
    # checkpoints hold, are the mean over micro-batches and ranks: 2 processes equal 1 with 2 micro-steps.
    statistics = [b for n, b in raw_model.named_buffers() if n.endswith(('running_mean', 'running_var'))]
    shared = bool(statistics) and world * accumulation > 1
    if world > 1 and statistics:
        say(f'BatchNorm: each process normalises by its own {micro} images; what is saved is the mean over {world} processes')

    @torch.no_grad()
    def evaluate(net):
        """(mean loss, shares right in the first and among the first five guesses, ids (n, 5), probability of the first (n,)) of
        the whole val split, shared out over ranks; None if stopped."""
        n, most = len(val_data), min(5, len(val_data.classes))
        guesses, surety, total = torch.full((n, most), -1), torch.zeros(n), 0.0
        net.eval()
        for i in range(rank_here * eval_batch_size, -(-n // (eval_batch_size * world)) * eval_batch_size * world,
                       eval_batch_size * world):
            if common.any_rank(stopped()):
                break
            rows = slice(min(i, n), min(i + eval_batch_size, n))           # none for some ranks in the last round
            if rows.start < rows.stop:
                pixels = torch.from_numpy(np.array(val_data.pixels[rows])).to(dev)
                boxes = crops.middle_boxes(len(pixels), eval_crop)
                x = crops.network_input(pixels, *boxes, image_size, seen['mean'], seen['std'])
                with amp:
                    logits = net(x).float().cpu()
                total += F.cross_entropy(logits, torch.from_numpy(val_data.labels[rows]), reduction='sum').item()
                surety[rows], guesses[rows] = logits.softmax(1).amax(1), logits.topk(most).indices
        net.train()
        if common.any_rank(stopped()):
            return None
        loss = common.mean_over_ranks(total, (guesses[:, 0] >= 0).sum().item())
        if world > 1:
            guesses, surety = guesses.to(dev), surety.to(dev)
            dist.all_reduce(guesses, dist.ReduceOp.MAX)
            dist.all_reduce(surety)
            guesses, surety = guesses.cpu(), surety.cpu()
        hits = guesses == torch.from_numpy(np.array(val_data.labels))[:, None]
        return loss, hits[:, 0].float().mean().item(), hits.any(1).float().mean().item(), guesses, surety

    def log(record):
        if rank_here == 0:
            common.append_log(out_dir, record, run)

    def save(path, keep_previous=False):
        return rank_here == 0 and common.save_or_warn(path, {
            'trainer': 'train_cnn', 'step': step, 'model_config': asdict(net_config), 'model': raw_model.state_dict(),
            'optimizer': opt.state_dict(), 'best': best, 'config': config, 'images': seen, 'data': digests,
            'wandb_id': wandb_id}, keep_previous)

    input_speed = 0.0
    if step < total_iters:                          # what reading, cropping and scaling alone can do
        reading, timed = batches(step * accumulation), 0
        for _ in range(num_workers + 1):            # whatever is read ahead is not timed
            next(reading)[1].cpu()
        clock = time.perf_counter()
        while timed < 2 * num_workers + 4 and time.perf_counter() - clock < 2:
            next(reading)[1].cpu()                  # of CUDA's queue all is done
            timed += 1
        input_speed = timed * micro * world / (time.perf_counter() - clock)
        for left in ahead if num_workers else ():
            left.cancel()
        ahead.clear()
        say(f'input alone: {input_speed:,.0f} images/s')
    profiler = common.step_profiler(out_dir, dev) if profile and rank_here == 0 else None
    joules = common.energy_meter(dev)              # since this process started
    failure, stop = '', False
    clock, timed_steps, saved_step = time.perf_counter(), 0, step if resume_path == last_path else -1
    say(f'step {step} of {total_iters}' + ('' if step < total_iters else ' is reached: nothing to train'))
    reading = batches(step * accumulation)
    model.train()

    while True:
        last_step = step >= total_iters
        epoch_done = step > 0 and int(epoch_of(step)) > int(epoch_of(step - 1))
        stop = common.any_rank(stopped())
        if (step != saved_step and (step % save_interval == 0 or last_step or stop)) and step > 0:
            if save(last_path, keep_previous=True):
                saved_step = step
            clock, timed_steps = time.perf_counter(), 0
        if not stop and (last_step or (step % eval_interval == 0 if eval_interval else epoch_done)):
            found = evaluate(raw_model)
            stop = found is None
            if not stop:
                say(f'step {step}, epoch {epoch_of(step):.2f}: val loss {found[0]:.4f}, top-1 {found[1]:.2%}, top-5 '
                    f'{found[2]:.2%}', flush=True)
                log({'step': step, 'samples': step * batch_size, 'epoch': round(epoch_of(step), 3), 'val_loss': found[0],
                     'top1': found[1], 'top5': found[2]})
                if found[1] > best[0]:
                    before, best = best, [found[1], step]
                    if not common.any_rank(save(best_path)):           # if the save fails, best.pt is still the old one
                        best = before
            elif step != saved_step and step > 0 and save(last_path, keep_previous=True):
                saved_step = step
            clock, timed_steps = time.perf_counter(), 0
        if stop or last_step:
            break

        # TRAINING SECTION BEGIN
        lr = common.lr_at(step, schedule, learning_rate, min_lr, warmup_iters, total_iters)
        for group in opt.param_groups:
            group['lr'] = lr * group['lr_scale']
        common.seed_step(seed, step, rank_here)
        loss_sum = torch.zeros((), device=dev)
        sums, before = ([torch.zeros_like(b) for b in statistics], [b.clone() for b in statistics]) if shared else ([], [])
        for i in range(accumulation):
            x, y = next(reading)
            if world > 1:                           # DDP reads this flag in the forward pass
                model.require_backward_grad_sync = i == accumulation - 1
            with amp:
                loss = F.cross_entropy(model(x).float(), y)
            loss_sum += loss.detach()
            (loss / accumulation).backward()
            if shared:
                torch._foreach_add_(sums, statistics)
                torch._foreach_copy_(statistics, before)
        if shared:
            flat = torch.cat(sums)
            if world > 1:
                dist.all_reduce(flat)
            torch._foreach_copy_(statistics, list((flat / (world * accumulation)).split([len(b) for b in statistics])))
        grads = gradients()
        grad_norm = nn.utils.get_total_norm(list(grads.values())).item()
        loss = common.mean_over_ranks(loss_sum.item(), accumulation)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            culprits = [n for n, p in raw_model.named_parameters() if p in grads and not grads[p].isfinite().all()]
            failure = common.not_finite(loss, grad_norm, step, culprits, saved_step)
            break
        if grad_clip:
            common.clip_(grads.values(), grad_clip, grad_norm)
        opt.step()
        opt.zero_grad(set_to_none=True)
        del grads                                   # free the gradients before the next forward pass
        # TRAINING SECTION END

        step, timed_steps = step + 1, timed_steps + 1
        if profiler:
            profiler.step()
        if step % log_interval == 0 or step == total_iters:
            ms = (time.perf_counter() - clock) / timed_steps * 1e3
            clock, timed_steps = time.perf_counter(), 0
            record = {'step': step, 'max_iters': total_iters, 'samples': step * batch_size, 'loss': loss, 'lr': lr,
                      'grad_norm': grad_norm, 'ms': ms, 'samples_per_s': batch_size / ms * 1e3,
                      'input_samples_per_s': input_speed, 'peak_mem_bytes': common.peak_memory_bytes(dev),
                      'optimizer_bytes': optim.optimizer_bytes(opt), 'energy_j': joules()}
            say(f'step {step}: loss {loss:.4f}, lr {lr:.2e}, norm {grad_norm:.2f}, {ms:.0f} ms, '
                f'{record["samples_per_s"]:,.0f} images/s', flush=True)
            log(record)

    # ---------------------------------------------------------------------------------------------------------- end
    readers.shutdown(wait=False, cancel_futures=True)
    if not failure and not stop:
        common.any_rank(False)                      # all wait for the last save
        try:
            state = common.read_best(best_path, 'train_cnn', best[0] >= 0)
            common.load_model_state(raw_model, state['model'], best_path)
        except OSError as e:
            failure = f'{e}; make room and type the same command with --resume=auto'
        except ValueError as e:                     # best.pt is lost, last.pt is not
            failure = f'{e}; type --init_from={last_path} and another --out_dir to go on from the last weights'
        if not common.any_rank(bool(failure)):      # on one rank: the others must not wait for it in the evaluation
            layers.pack(raw_model)                  # what is reported from here on is of the packed weights
            found = evaluate(raw_model)
            stop = found is None
            if rank_here == 0 and not stop:
                path = os.path.join(out_dir, 'packed.safetensors')
                meta = {'trainer': 'train_cnn', 'step': state['step'], 'model_config': asdict(net_config), 'images': seen}
                try:
                    size = common.save_packed(raw_model, path, meta | {'top1': found[1]})
                    log({'step': step, 'model_name': model_name, 'gpu_type': gpu_type or common.device_name(dev),
                         'packed_file_bytes': size, 'fp32_bytes': fp32_bytes, 'binary_share': shares['bin'],
                         'best_step': state['step'], 'best_top1': state['best'][0], 'packed_top1': found[1],
                         'packed_top5': found[2]})
                    pictures.report(out_dir, val_data, found[3][:, 0].numpy(), found[4].numpy())
                    say(f'best top-1 {state["best"][0]:.2%} at step {state["step"]}, chosen on the images it is judged on; '
                        f'packed into {path}: {size:,} bytes, top-1 {found[1]:.2%}; pictures and classes.csv in {out_dir}')
                except OSError as e:
                    failure = f'{e}; make room and type the same command with --resume=auto'
    common.close_processes()
    if run:
        run.finish(exit_code=1 if failure else 0)
    if failure:
        fail(failure)
    if stop:
        say(common.how_to_go_on([sys.argv[0], os.path.join(out_dir, 'config.py'), '--resume=auto'], step, saved_step))


if __name__ == '__main__':
    main()
