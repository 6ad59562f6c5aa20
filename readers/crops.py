"""
Crops of images on the device that the network is on, many at once, in plain torch: what train_cnn.py feeds to it.

    x = network_input(pixels, *random_boxes(seed, epochs, samples, (0.35, 1.0), 4 / 3, True), 64, mean, std)
    x = network_input(pixels, *middle_boxes(len(pixels), 0.9), 64, mean, std)

A crop is a pure function of (seed, epoch, sample): it depends neither on the batch it is in nor on the number of processes.
"""
import numpy as np
import torch


def uniform(seed, epochs, samples, count):
    """float64 (n, count) in [0, 1), a pure function of the seed and of each sample's epoch and number, arrays (n,): no crop
    depends on the batch it is in. The mixing function of splitmix64 (Steele et al. 2014), once for each of them."""
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
    """(boxes (n, 4), mirrored (n,) bool) for training: left, top, width, height in shares of the side; int (n,)
    of epochs and samples.

    The random resized crop of torchvision: of ten areas, from scale[0] to scale[1], and ratios of width to height, from
    1 / ratio to ratio, the first that fits, else the whole image; then a place; mirrored, with flip, every other time."""
    u = uniform(seed, epochs, samples, 23)
    area = scale[0] + (scale[1] - scale[0]) * u[:, :10]
    ratios = ratio ** (2 * u[:, 10:20] - 1)
    size = np.sqrt(np.stack([area * ratios, area / ratios], -1))                # (n, 10, 2)
    fits = (size <= 1).all(-1)
    size = np.where(fits.any(1)[:, None], size[np.arange(len(u)), fits.argmax(1)], 1.0)
    return np.concatenate([u[:, 20:22] * (1 - size), size], 1), flip & (u[:, 22] < 0.5)


def resample(pixels, boxes, mirrored, size):
    """uint8 (n, s, s, 3), boxes (n, 4), mirrored (n,) -> fp32 (n, 3, size, size) from 0 to 255 in channels_last: the boxes cut
    out and scaled, bilinear with antialiasing (a triangle as wide as a pixel of the coarser grid, as in Pillow), as one
    product with a matrix (size, s) for the columns and one for the rows of each image."""
    n, s = pixels.shape[:2]

    def weights(start, length):
        scale = (length * (s / size))[:, None, None]                           # pixels of the image for one of the result
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
    """(boxes, mirrored) for evaluation: the middle, `share` of the side, none mirrored."""
    return np.tile([(1 - share) / 2, (1 - share) / 2, share, share], (n, 1)), np.zeros(n, dtype=bool)


def network_input(pixels, boxes, mirrored, size, mean, std):
    """What the network sees of uint8 images: resample(), then minus mean over std, three channels of a range of 0 to 1."""
    boxes, mirrored = (torch.from_numpy(t).to(pixels.device) for t in (boxes.astype(np.float32), mirrored))
    x = resample(pixels, boxes, mirrored, size)
    mean, std = (torch.tensor(t, device=x.device).view(3, 1, 1) * 255 for t in (mean, std))
    return (x - mean) / std.clamp(min=1)             # one level of 255: a channel may be constant
