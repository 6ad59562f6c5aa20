"""
Train a residual CNN on images; each of its layers is binary, ternary, 4-bit or real (full precision).

    python train_cnn.py config/digits_mixed.py                          # handwritten digits, nothing to download, a minute
    torchrun --nproc_per_node=8 train_cnn.py config/food101_mixed.py    # Food-101; first python data/food101/prepare.py
    python train_cnn.py --predict=image.jpg --resume=out/x/best.pt      # the five most likely classes of an image

model_config names the kind of each layer. A low-bit layer trains latent full-precision weights and rounds them in each pass.
Ctrl-C saves and stops the run; --resume=auto continues it.
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
out_dir = 'out/cnn'            # folder for config.py, log.jsonl, last.pt, best.pt, packed.safetensors and pictures
model_name = ''                # a name for your records, written to the log and wandb
gpu_type = ''                  # a device name for your records, written to the log; '': detected
seed = 1337                    # sets the initial weights, the order of samples, crops, dropout and rsvd's random sketches
init_from = 'scratch'          # scratch | a checkpoint: use its weights where name and shape match
resume = ''                    # auto: continue the run in out_dir, or start if there is none | a checkpoint to continue from
overwrite = False              # start over in an out_dir that holds a run; deletes its checkpoints and log
predict = ''                   # path of an image: only print its classes, with the checkpoint or packed file in `resume`
# data
dataset = 'digits'             # folder under data/: digits, food101 or images/<name>; its prepare.py makes it
image_size = 64                # side of the network's input, in pixels
crop_scale = (0.35, 1.0)       # training: area of the random crop, as a share of the image: (least, most)
crop_ratio = 4 / 3             # training: largest ratio between the sides of the crop
flip = False                   # training: mirror images at random; not for digits or letters
eval_crop = 1.0                # evaluation: side of the centre crop, as a share of the image's side
batch_size = 64                # images per optimizer step, over all devices and micro-steps
micro_batch_size = 0           # images per device at a time; 0: its whole share. Lower: less memory, more micro-steps
eval_batch_size = 128          # images per device at a time in evaluation
num_workers = 2                # threads per process that read images in advance; 0: none
# model
channels = (32, 64, 64, 128, 256)      # output channels of the five blocks; the paper has (32, 64, 128, 256, 512)
fc = (256, 256)                # widths of fc1 and fc2; the paper has (512, 256)
filter_dimension = 3           # side of the kernels: 3 or 5
residual = True                # False: blocks without the real 1x1 skip, as in the paper
model_config = dict(           # binary | real | ternary | int4 for each layer
    conv1='real', conv2='real', conv3='real', conv4='real', conv5='real', conv6='real', conv7='real', conv8='real',
    conv9='real', conv10='real', fc1='real', fc2='real', final='real')
norm = 'channel'               # of binary layers: batch (a BatchNorm follows, as after other convolutions) | their own, over
                               # the channels of each pixel (channel) or the pixels of each channel (spatial); fc: over outputs
binary_alpha = 0.25            # initial scale of binary layers with their own normalization
binary_alpha_final = 1.0       # the same of `final`: the standard deviation of the logits
dropout = 0.0                  # after fc1 and fc2
# optimizer
optimizer = 'adamw'            # adamw | rsvd: Adam in `rank` dimensions | muon: for matrices and kernels | adam | sgd
rank = 16                      # rsvd: dimensions of the moments of matrices and kernels
interval = 200                 # rsvd: steps between two updates of the basis
side = 'left'                  # rsvd: side of the basis: left | right | short (the shorter side)
projected = False              # rsvd: real fc layers form no full gradients in the backward pass
epochs = 30.0                  # passes over the training images in total, including those before a resume
max_iters = 0                  # optimizer steps in total; 0: `epochs` decides
learning_rate = 1e-3           # peak, at the end of warm-up
lr_scale = {'bin': 1.0, 'tern': 1.0, 'int4': 1.0, 'alpha': 10.0}   # rate factors: latent weights (not biases), binary scales
ramp = 0.0                     # share of the steps over which low-bit weights turn from latent to rounded; evaluations round
teacher = ''                   # checkpoint of a CNN on the same images: its predictions are targets beside the labels
distill = 0.5                  # share of the teacher in the logged loss; val_loss is of the labels alone
temperature = 4.0              # of the teacher and of the network in that part of the loss
min_lr = 0.0                   # learning rate at the last step
schedule = 'cosine'            # cosine | linear | constant
warmup_iters = 100             # steps of linear warm-up
weight_decay = 0.05            # on weights, not on gains, biases and scales; adam and sgd add it to the gradient
beta1 = 0.9                    # with sgd, the momentum; with muon, for AdamW only; Muon's own momentum is 0.95
beta2 = 0.999
grad_clip = 1.0                # largest global gradient norm; 0: no clipping
# evaluation, saving and logging
eval_interval = 0              # steps between evaluations; 0: one after each epoch. There is always one after the last step
log_interval = 20              # steps between log records
save_interval = 500            # steps between saves of last.pt; best.pt has the highest top-1
wandb_log = False              # also log to Weights & Biases; install wandb and log in first
wandb_project = 'nanobit'
wandb_run_name = ''            # '': model_name, or the name of out_dir if that is empty too
# system
device = ''                    # '': cuda if available, else cpu
dtype = ''                     # float32 | bfloat16 (autocast); '': bfloat16 on cuda, float32 on cpu
compile = None                 # torch.compile; None: on cuda only. On a CPU it pays off only in long runs
profile = False                # profile steps 5 to 7 with torch.profiler; prints a table and writes trace.json to out_dir
config = configurator.override(globals())   # file.py ... --key=value, later wins

WORDS = {'binary': 'bin', 'real': 'fp', 'ternary': 'tern'}     # name in model_config: kind in layers.py, where they differ
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
    """Residual CNN: images (N, 3, H, W), H and W 16 or more, best in torch.channels_last -> logits (N, n_classes).
    Each of five blocks applies convolution, normalization and ReLU twice and adds its input, through a real 1x1 convolution if
    the channels change. 2x2 max-pooling follows the first four. Then come the mean over pixels, fc1, fc2 and final."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        widths = [3, *(width for width in c.channels for _ in (1, 2))]
        for i in range(1, 11):
            kind, size = KINDS[c.model_config[f'conv{i}']], c.filter_dimension
            own = kind == 'bin' and c.norm != 'batch'       # normalizes its output itself
            options = dict(norm=c.norm, alpha=c.binary_alpha) if own else dict(alpha=None) if kind == 'bin' else {}
            # A low-bit second convolution applies the preceding ReLU itself and saves only the ReLU's input.
            folded = dict(act='relu') if i % 2 == 0 and kind != 'fp' else {}
            self.add_module(f'conv{i}', layers.conv2d(kind, *widths[i - 1:i + 1], size, padding=size // 2,
                                                      bias=own, **folded, **options))
            self.add_module(f'bn{i}', nn.Identity() if own else nn.BatchNorm2d(widths[i]))
        for b in range(5 * c.residual):
            before, after = widths[2 * b], widths[2 * b + 2]
            self.add_module(f'skip{b + 1}', nn.Identity() if before == after else nn.Sequential(
                nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after)))
        for name, before, after in (('fc1', widths[-1], c.fc[0]), ('fc2', *c.fc), ('final', c.fc[1], c.n_classes)):
            kind, alpha = KINDS[c.model_config[name]], c.binary_alpha_final if name == 'final' else c.binary_alpha
            batch = kind == 'bin' and c.norm == 'batch'
            options = {'alpha': None if batch else alpha} if kind == 'bin' else {}
            self.add_module(name, layers.linear(kind, before, after, not batch, **options))
            self.add_module(f'{name}_bn', nn.BatchNorm1d(after) if batch else nn.Identity())

    def forward(self, x):
        for b in range(1, 6):
            first, second = getattr(self, f'conv{2 * b - 1}'), getattr(self, f'conv{2 * b}')
            y = getattr(self, f'bn{2 * b - 1}')(first(x))
            y = getattr(self, f'bn{2 * b}')(second(y if isinstance(second, layers.LowBit) else relu(first, y)))
            x = relu(second, y) + getattr(self, f'skip{b}')(x) if self.config.residual else relu(second, y)
            x = F.max_pool2d(x, 2) if b < 5 else x
        x = x.mean((2, 3))
        for layer, bn in ((self.fc1, self.fc1_bn), (self.fc2, self.fc2_bn)):
            x = F.dropout(F.relu(bn(layer(x))), self.config.dropout, self.training)
        return self.final_bn(self.final(x))


def relu(conv, y):
    """ReLU after a convolution and its normalization. A layer that normalizes y saves it, so threshold() reuses y for its
    gradient, where F.relu would save another tensor. A BatchNorm does not save y, so the ReLU overwrites it."""
    own = isinstance(conv, layers.BinaryConv2d) and conv.alpha is not None
    return F.threshold(y, 0, 0) if own else F.relu(y, inplace=True)


def load_teacher(digests):
    """The frozen CNN of the checkpoint `teacher`, and the number of images it saw. digests: of the training and the evaluation
    images. Raises ValueError if it cannot teach this run."""
    state = common.read_checkpoint(teacher, 'train_cnn', mmap=True)
    if state['data'] != digests:
        raise ValueError(f'{teacher} was trained on other images than those of {dataset}')
    size = state['images']['size']
    common.check_same(teacher, {'image_size': size}, {'image_size': image_size})
    net = CNN(CNNConfig(**state['model_config']))
    common.load_model_state(net, state['model'], teacher)
    return net.eval().requires_grad_(False), state['step'] * state['config']['batch_size']


def mixed_loss(logits, y, guess):
    """Cross-entropy of the labels y; with the teacher's logits `guess` (N, n_classes) also, with the share `distill`,
    T^2 KL(teacher || student), both at temperature T. T^2 keeps the size of its gradient as T changes (arXiv 1503.02531)."""
    loss = F.cross_entropy(logits, y)
    if guess is None:
        return loss
    found, wanted = ((t / temperature).log_softmax(1) for t in (logits, guess))
    soft = F.kl_div(found, wanted, log_target=True, reduction='batchmean')
    return (1 - distill) * loss + distill * temperature ** 2 * soft


def predict_image():
    """Print the five most likely classes of the image `predict`, computed in fp32."""
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
        config | {'optimizer': optimizer.lower()},                     # AdamW, rSVD, ... are accepted too
        {'schedule': ('cosine', 'linear', 'constant'), 'optimizer': OPTIMIZERS, 'side': optim.SIDES,
         'norm': ('batch', 'channel', 'spatial')},
        dict.fromkeys(('batch_size', 'eval_batch_size', 'log_interval', 'save_interval', 'rank', 'interval'), 1)
        | dict.fromkeys(('learning_rate', 'min_lr', 'weight_decay', 'grad_clip', 'warmup_iters', 'micro_batch_size',
                         'eval_interval', 'num_workers'), 0))
    for wrong, why in (
            (not (0 <= beta1 < 1 and 0 <= beta2 < 1), f'beta1={beta1}, beta2={beta2} must be at least 0 and below 1'),
            (wrong_kinds, f'model_config: {", ".join(wrong_kinds)} is none of {", ".join(KINDS)}'),
            (len(channels) != 5 or len(fc) != 2 or min(channels + fc) < 1, f'channels={channels}, fc={fc} need 5 and 2 widths'),
            (filter_dimension not in (1, 3, 5, 7), f'filter_dimension={filter_dimension} must be 1, 3, 5 or 7'),
            (len(crop_scale) != 2 or not 0 < crop_scale[0] <= crop_scale[1] <= 1 or crop_ratio < 1,
             f'crop_scale={crop_scale}, crop_ratio={crop_ratio}: type two shares up to 1, smaller first, and a ratio from 1'),
            (not 0 < eval_crop <= 1, f'eval_crop={eval_crop} must be above 0 and at most 1'),
            (image_size < 16, f'image_size={image_size} is too small for four poolings; type --image_size=16 or more'),
            (min(lr_scale.values()) < 0, f'lr_scale={lr_scale} must be 0 or more'),
            (not 0 <= ramp < 1, f'ramp={ramp} must be at least 0 and below 1'),
            (not 0 <= dropout < 1, f'dropout={dropout} must be at least 0 and below 1'),
            (not 0 <= distill <= 1, f'distill={distill} must be from 0 to 1'),
            (temperature <= 0, f'temperature={temperature} must be above 0'),
            (min(binary_alpha, binary_alpha_final) <= 0, 'binary_alpha and binary_alpha_final must be above 0'),
            (min(epochs, max_iters or 1) <= 0, f'epochs={epochs}, max_iters={max_iters}: nothing to train')):
        if wrong:
            fail(why)
    amp = common.autocast(dev, dtype)
    torch.set_float32_matmul_precision('high')
    torch.backends.cudnn.benchmark = True
    micro, accumulation = common.split_batch(batch_size, micro_batch_size, world)
    kinds = lambda *names: {model_config[name] for name in names}
    has_norm = norm == 'batch' or kinds('conv9', 'conv10') != {'binary'} or residual and channels[3] != channels[4]
    one_pixel = image_size < 32 and has_norm        # of the fifth block
    if micro == 1 and (one_pixel or norm == 'batch' and 'binary' in kinds('fc1', 'fc2', 'final')):
        fail(f'micro_batch_size=1 at image_size={image_size} leaves a BatchNorm one number to normalize; type a larger one')
    last_path, best_path, resume_path, elsewhere = common.find_run(out_dir, resume, overwrite)

    # --------------------------------------------------------------------------------------------------------- data
    folder = tokens.dataset_dir(dataset)
    if rank_here == 0 and dataset == 'digits' and not (folder / 'images.json').exists():       # takes a second, no download
        if subprocess.run([sys.executable, str(folder / 'prepare.py')], stdout=subprocess.DEVNULL).returncode:
            raise SystemExit(2)                     # prepare.py printed the reason
    common.any_rank(False)                          # barrier: other ranks wait for the data
    try:
        train_data, val_data = images.load(folder, 'train'), images.load(folder, 'val')
    except ValueError as e:
        configurator.fail(str(e))
    seen = {'classes': train_data.classes, 'mean': list(train_data.mean), 'std': list(train_data.std), 'size': image_size,
            'stored_size': train_data.size, 'eval_crop': eval_crop}
    digests = [train_data.digest, val_data.digest]
    total_iters = max_iters or math.ceil(epochs * len(train_data) / batch_size)
    epoch_of = lambda step: step * batch_size / len(train_data)

    def load(number):
        """Pixels, labels, crop boxes and mirror flags of micro-batch `number` (0 is the first of training), on the CPU; pinned
        for CUDA."""
        step, i = divmod(number, accumulation)
        where = np.arange(step * batch_size, (step + 1) * batch_size).reshape(accumulation, world, micro)[i, rank_here]
        chosen = common.epoch_indices(seed, step * batch_size, len(train_data), batch_size)
        chosen = chosen.reshape(accumulation, world, micro)[i, rank_here]
        boxes = crops.random_boxes(seed, where // len(train_data), chosen, crop_scale, crop_ratio, flip)
        found = [torch.from_numpy(t) for t in (train_data.pixels[chosen], train_data.labels[chosen], *boxes)]
        return [t.pin_memory() for t in found] if dev.type == 'cuda' else found

    def batches(number):
        """Yield inputs and labels on the device, from micro-batch `number` on; num_workers threads read in advance."""
        while True:
            while len(ahead) <= num_workers:
                ahead.append(readers.submit(load, number) if num_workers else number)
                number += 1
            pixels, labels, boxes, mirrored = ahead.popleft().result() if num_workers else load(ahead.popleft())
            pixels, labels = (t.to(dev, non_blocking=True) for t in (pixels, labels))
            yield crops.network_input(pixels, boxes, mirrored, image_size, mean, std), labels
    mean, std = (torch.tensor(seen[key], device=dev) for key in ('mean', 'std'))
    readers, ahead = ThreadPoolExecutor(max(1, num_workers)), collections.deque()

    # -------------------------------------------------------------------------------------------------------- model
    net_config = CNNConfig(len(train_data.classes), model_config, channels, fc, filter_dimension, residual, norm, binary_alpha,
                           binary_alpha_final, dropout)
    torch.manual_seed(seed)                                            # same weights on every rank
    model = CNN(net_config)
    if not resume_path and init_from != 'scratch':
        try:
            state = common.read_checkpoint(init_from, 'train_cnn')
            was = state['model_config']             # the shapes do not show `norm`, which binary convolutions have
            if 'binary' in was['model_config'].values() and 'binary' in model_config.values():
                common.check_same(init_from, was, {'norm': norm})
        except ValueError as e:
            configurator.fail(str(e))
        own, same = model.state_dict(), state['images']['classes'] == train_data.classes
        taken = {k: t for k, t in state['model'].items()
                 if k in own and t.shape == own[k].shape and (same or not k.startswith('final'))}
        model.load_state_dict(own | taken)
        if other := [key for key in ('mean', 'std') if not np.allclose(state['images'][key], seen[key])]:
            say(f'{init_from} was trained on images of another {" and ".join(other)}; these are scaled by their own')
        if state['model_config']['residual'] != residual:
            say(f'{init_from} has residual={not residual}; the function differs until it is trained on')
        say(f'{len(taken)} of {len(own)} tensors from {init_from}; new: {", ".join(sorted(own.keys() - taken)) or "none"}')
    try:
        guide, taught = load_teacher(digests) if teacher else (None, 0)
    except ValueError as e:
        configurator.fail(str(e))
    if teacher:
        guide.to(dev, memory_format=torch.channels_last)
        say(f'{distill:.0%} of the loss comes from {teacher}, which was trained on {taught:,} images')
    model.to(dev, memory_format=torch.channels_last)
    low_bit = [m for m in model.modules() if isinstance(m, layers.LowBit)]
    share = layers.ramp(model) if ramp else None
    packed_bytes, fp32_bytes = layers.model_bytes(model)
    n_params = sum(p.numel() for p in model.parameters())
    in_bits = lambda m: m.weight.numel() + (m.bias.numel() if m.kind == 'bin' and m.bias is not None else 0)  # others are fp32
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
                  and not (name == 'muon' and n in ('conv1.weight', 'final.weight'))}       # AdamW trains these two
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
    lost = None                                     # (value, step) of a better evaluation that best.pt lacks: the disk was full
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
        lost = None if elsewhere else state.get('lost')
        del state
        say(f'resumed from {resume_path} at step {step}')
    if not common.ranks_agree(step, *digests, common.checksum([*model.parameters(), *(guide.parameters() if teacher else ())])):
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
        model, guide = torch.compile(model), guide and torch.compile(guide)
    if world > 1:
        model = common.distributed(model, dev, local_rank)
    # A BatchNorm normalizes by the images of one micro-batch on one rank. Evaluation and checkpoints use the mean of its
    # running statistics over micro-batches and ranks, so 2 processes equal 1 process with 2 micro-steps.
    statistics = [b for n, b in raw_model.named_buffers() if n.endswith(('running_mean', 'running_var'))]
    shared = bool(statistics) and world * accumulation > 1
    if world > 1 and statistics:
        say(f'BatchNorm: each process normalizes by its own {micro} images; checkpoints store the mean over {world} processes')

    @torch.no_grad()
    def evaluate(net):
        """(mean loss, top-1, top-5, ids of the five most likely classes (n, 5), probability of the first (n,)) on the whole val
        split, divided among ranks; None if the run is stopped."""
        n, most = len(val_data), min(5, len(val_data.classes))
        guesses, confidence, total = torch.full((n, most), -1), torch.zeros(n), 0.0
        net.eval()
        for i in range(rank_here * eval_batch_size, -(-n // (eval_batch_size * world)) * eval_batch_size * world,
                       eval_batch_size * world):
            if common.any_rank(stopped()):
                break
            rows = slice(min(i, n), min(i + eval_batch_size, n))           # empty on some ranks in the last round
            if rows.start < rows.stop:
                pixels = torch.from_numpy(np.array(val_data.pixels[rows])).to(dev)
                boxes = crops.middle_boxes(len(pixels), eval_crop)
                x = crops.network_input(pixels, *boxes, image_size, mean, std)
                with amp:
                    logits = net(x).float().cpu()
                total += F.cross_entropy(logits, torch.from_numpy(val_data.labels[rows]), reduction='sum').item()
                confidence[rows], guesses[rows] = logits.softmax(1).amax(1), logits.topk(most).indices
        net.train()
        if common.any_rank(stopped()):
            return None
        loss = common.mean_over_ranks(total, (guesses[:, 0] >= 0).sum().item())
        if world > 1:
            guesses, confidence = guesses.to(dev), confidence.to(dev)
            dist.all_reduce(guesses, dist.ReduceOp.MAX)
            dist.all_reduce(confidence)
            guesses, confidence = guesses.cpu(), confidence.cpu()
        hits = guesses == torch.from_numpy(np.array(val_data.labels))[:, None]
        return loss, hits[:, 0].float().mean().item(), hits.any(1).float().mean().item(), guesses, confidence

    def log(record):
        if rank_here == 0:
            common.append_log(out_dir, record, run)

    def save(path, keep_previous=False):
        return rank_here == 0 and common.save_or_warn(path, {
            'trainer': 'train_cnn', 'step': step, 'model_config': asdict(net_config), 'model': raw_model.state_dict(),
            'optimizer': opt.state_dict(), 'best': best, 'lost': lost, 'config': config, 'images': seen, 'data': digests,
            'wandb_id': wandb_id}, keep_previous)

    input_speed = 0.0
    if step < total_iters:                          # measure reading, cropping and scaling alone
        reading, timed = batches(step * accumulation), 0
        for _ in range(num_workers + 1):            # images read in advance are not timed
            next(reading)[1].cpu()
        clock = time.perf_counter()
        while timed < 2 * num_workers + 4 and time.perf_counter() - clock < 2:
            next(reading)[1].cpu()                  # waits until CUDA is done
            timed += 1
        input_speed = timed * micro * world / (time.perf_counter() - clock)
        for left in ahead if num_workers else ():
            left.cancel()
        ahead.clear()
        say(f'input alone: {input_speed:,.0f} images/s')
    profiler = common.step_profiler(out_dir, dev) if profile and rank_here == 0 else None
    joules = common.energy_meter(dev)              # since this process started
    failure, stop, unsaved, upcoming = '', False, False, None
    clock, timed_steps, saved_step = time.perf_counter(), 0, step if resume_path == last_path else -1
    say(f'step {step} of {total_iters}' + ('' if step < total_iters else ' is reached: nothing to train'))
    reading = batches(step * accumulation)
    model.train()

    while True:
        last_step = step >= total_iters
        epoch_done = step > 0 and int(epoch_of(step)) > int(epoch_of(step - 1))
        evaluating = last_step or (step % eval_interval == 0 if eval_interval else epoch_done)
        stop = stop or world == 1 and stopped()     # several processes agree in each step
        if step > 0 and step != saved_step and (step % save_interval == 0 or last_step or stop or evaluating and unsaved):
            unsaved = not save(last_path, keep_previous=True)
            saved_step = saved_step if unsaved else step
            clock, timed_steps = time.perf_counter(), 0
        if not stop and evaluating:
            found = evaluate(raw_model)
            stop = found is None
            if not stop:
                say(f'step {step}, epoch {epoch_of(step):.2f}: val loss {found[0]:.4f}, top-1 {found[1]:.2%}, top-5 '
                    f'{found[2]:.2%}', flush=True)
                log({'step': step, 'samples': step * batch_size, 'epoch': round(epoch_of(step), 3), 'val_loss': found[0],
                     'top1': found[1], 'top5': found[2]})
                if found[1] > best[0]:
                    before, best = best, [found[1], step]
                    if not common.any_rank(save(best_path)):           # best.pt is still the old one
                        best, lost = before, (found[1], step)
                    elif lost and best[0] >= lost[0]:
                        lost = None
            elif step != saved_step and step > 0 and save(last_path, keep_previous=True):
                saved_step = step
            clock, timed_steps = time.perf_counter(), 0
        if stop or last_step:
            break

        # TRAINING SECTION BEGIN
        lr = common.lr_at(step, schedule, learning_rate, min_lr, warmup_iters, total_iters)
        for group in opt.param_groups:
            group['lr'] = lr * group['lr_scale']
        if ramp:
            share.fill_(min(1.0, step / (ramp * total_iters)))
        common.seed_step(seed, step, rank_here)
        loss_sum = torch.zeros((), device=dev)
        sums, before = ([torch.zeros_like(b) for b in statistics], [b.clone() for b in statistics]) if shared else ([], [])
        for i in range(accumulation):
            (x, y), upcoming = upcoming or next(reading), None
            if world > 1:                           # DDP reads this flag in the forward pass
                model.require_backward_grad_sync = i == accumulation - 1
            guess = None
            if teacher:
                with amp, torch.no_grad():
                    guess = guide(x).float()
            with amp:
                loss = mixed_loss(model(x).float(), y, guess)
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
        total_norm = nn.utils.get_total_norm(list(grads.values()))
        upcoming = next(reading) if step + 1 < total_iters else None       # cropped while the device computes
        loss, grad_norm, stop = common.step_totals(loss_sum, accumulation, total_norm, stopped())
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            culprits = [n for n, p in raw_model.named_parameters() if p in grads and not grads[p].isfinite().all()]
            failure = common.not_finite(loss, grad_norm, step, culprits, saved_step)
            break
        if grad_clip:
            common.clip_(grads.values(), grad_clip, total_norm)
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
        common.any_rank(False)                      # barrier: all ranks wait for the last save
        try:
            state = common.read_best(best_path, 'train_cnn', best[0] >= 0)
            common.load_model_state(raw_model, state['model'], best_path)
        except OSError as e:
            failure = f'{e}; make room and type the same command with --resume=auto'
        except ValueError as e:                     # best.pt is lost, last.pt is not
            failure = f'{e}; type --init_from={last_path} and another --out_dir to go on from the last weights'
        if not common.any_rank(bool(failure)):      # if one rank failed, the others must not wait for it in evaluate()
            layers.pack(raw_model)                  # everything reported below is of the packed weights
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
                    failure = common.not_kept(step, saved_step, lost)
                    say(f'best top-1 {state["best"][0]:.2%} at step {state["step"]}, selected on these same images; '
                        f'packed into {path}: {size:,} bytes, top-1 {found[1]:.2%}; pictures and classes.csv in {out_dir}')
                except OSError as e:
                    failure = f'{e}; make room and type the same command with --resume=auto'
    common.close_processes()
    if run:
        run.finish(exit_code=1 if failure else 0)
    if failure:
        fail(failure)
    if stop and rank_here == 0:
        common.say_stopped([sys.argv[0], os.path.join(out_dir, 'config.py'), '--resume=auto'], step, saved_step)


if __name__ == '__main__':
    main()
