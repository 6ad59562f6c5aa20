"""
Random and middle crops of image batches in plain torch, on the device of the network; used by train_cnn.py.

    x = network_input(pixels, *random_boxes(seed, epochs, samples, (0.35, 1.0), 4 / 3, True), 64, mean, std)
    x = network_input(pixels, *middle_boxes(len(pixels), 0.9), 64, mean, std)

A crop is a pure function of (seed, epoch, sample). It depends neither on its batch nor on the number of processes.
"""
import numpy as np
import torch


def uniform(seed, epochs, samples, count):
    """Uniform random numbers in [0, 1), float64 (n, count): a pure function of the seed, and of the epoch and number of each
    sample, arrays (n,). Applies the mixing function of splitmix64 (Steele et al. 2014) for epoch, sample and column."""
    def mix(x):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xbf58476d1ce4e5b9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94d049bb133111eb)
        return x ^ (x >> np.uint64(31))
    step, x = np.uint64(0x9e3779b97f4a7c15), np.array([seed % 2 ** 64], dtype=np.uint64)
    with np.errstate(over='ignore'):
        for part in (epochs[:, None], samples[:, None], np.arange(count)[None]):
            x = mix(x + step * (part.astype(np.uint64) + np.uint64(1)))
    return (x >> np.uint64(11)) / 2.0 ** 53


def random_boxes(seed, epochs, samples, scale, ratio, flip):
    """Random crops for training -> (boxes (n, 4), mirrored (n,) bool). A box is left, top, width, height in shares of the
    side. epochs, samples: int (n,).

    This is torchvision's random resized crop. It draws ten areas, scale[0] to scale[1], and ten ratios of width to height,
    1 / ratio to ratio. The first pair that fits, else the whole image, gets a random place. `flip` mirrors half the images."""
    u = uniform(seed, epochs, samples, 23)
    area = scale[0] + (scale[1] - scale[0]) * u[:, :10]
    ratios = ratio ** (2 * u[:, 10:20] - 1)
    size = np.sqrt(np.stack([area * ratios, area / ratios], -1))                # (n, 10, 2)
    fits = (size <= 1).all(-1)
    size = np.where(fits.any(1)[:, None], size[np.arange(len(u)), fits.argmax(1)], 1.0)
    return np.concatenate([u[:, 20:22] * (1 - size), size], 1), flip & (u[:, 22] < 0.5)


def resample(pixels, boxes, mirrored, size):
    """Cut out boxes and scale them: uint8 (n, s, s, 3), boxes (n, 4), mirrored (n,) -> fp32 (n, 3, size, size), 0 to 255, in
    channels_last. Bilinear with antialiasing, as in Pillow: the triangle is as wide as a pixel of the coarser grid. Each
    image is multiplied by one (size, s) matrix for its columns and one for its rows."""
    n, s = pixels.shape[:2]

    def weights(start, length):
        scale = (length * (s / size))[:, None, None]                           # image pixels per pixel of the result
        middle = (start * s)[:, None, None] + (torch.arange(size, device=pixels.device)[:, None] + 0.5) * scale
        w = 1 - (torch.arange(s, device=pixels.device) + 0.5 - middle).abs() / scale.clamp(min=1)
        w = w.clamp_(min=0)
        return w / w.sum(-1, keepdim=True)                                     # (n, size, s)
    left, top, width, height = boxes.unbind(1)
    across = weights(left, width)
    across = torch.where(mirrored[:, None, None], across.flip(1), across)
    x = pixels.permute(0, 2, 1, 3).float().reshape(n, s, s * 3)                # columns, rows x channels
    x = (across @ x).view(n, size, s, 3).permute(0, 2, 1, 3).reshape(n, s, size * 3)
    return (weights(top, height) @ x).view(n, size, size, 3).permute(0, 3, 1, 2)


def middle_boxes(n, share):
    """Middle crops for evaluation -> (boxes, mirrored): `share` of the side, no image mirrored."""
    return np.tile([(1 - share) / 2, (1 - share) / 2, share, share], (n, 1)), np.zeros(n, dtype=bool)


def network_input(pixels, boxes, mirrored, size, mean, std):
    """Crop and normalize uint8 images -> network input: resample(), then (x - mean) / std. mean, std: 3 channels in 0..1;
    tensors on the device of the pixels are not copied."""
    boxes, mirrored = (torch.as_tensor(t, dtype=d).to(pixels.device, non_blocking=True)
                       for t, d in ((boxes, torch.float32), (mirrored, torch.bool)))
    x = resample(pixels, boxes, mirrored, size)
    mean, std = (torch.as_tensor(t, device=x.device).view(3, 1, 1) * 255 for t in (mean, std))
    return (x - mean) / std.clamp(min=1)             # 1 is one level of 255; the std of a constant channel is 0
