"""crops.py: resampling as Pillow has it, crops that depend on nothing but seed, epoch and sample, and are those asked for."""
import math

import numpy as np
import pytest
import torch
from PIL import Image

from readers import crops


def boxes(epochs, samples, seed=1337, scale=(0.35, 1.0), ratio=4 / 3, flip=True):
    return crops.random_boxes(seed, np.asarray(epochs), np.asarray(samples), scale, ratio, flip)


@pytest.mark.parametrize('side', [16, 37, 96])
def test_resample_equals_pillow(side):
    """Within 1.5 of 255 of Pillow's bilinear resize of a box, up and down: Pillow rounds to 8 bits twice."""
    draw = np.random.default_rng(side)
    pixels = draw.integers(0, 256, (12, side, side, 3), dtype=np.uint8)
    where, _ = boxes(np.arange(12), np.arange(12))
    where[:3] = [[0, 0, 1, 1], [0.5, 0, 0.5, 0.1], [0.9, 0.9, 0.05, 0.1]]
    for size in (16, 33, 64):
        x = crops.resample(torch.from_numpy(pixels), torch.from_numpy(where).float(), torch.zeros(12, dtype=bool), size)
        assert x.shape == (12, 3, size, size) and x.dtype == torch.float32
        assert x.is_contiguous(memory_format=torch.channels_last)
        for image, (left, top, width, height), found in zip(pixels, where * side, x, strict=True):
            wanted = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR,
                                                   box=(left, top, left + width, top + height))
            assert np.abs(found.permute(1, 2, 0).numpy() - np.asarray(wanted).astype(np.float32)).max() < 1.5
        turned = crops.resample(torch.from_numpy(pixels), torch.from_numpy(where).float(), torch.arange(12) % 2 == 0, size)
        assert torch.allclose(turned[::2], x[::2].flip(3), atol=1e-3) and torch.equal(turned[1::2], x[1::2])


def test_network_input_is_standardised():
    """Minus mean over std of pixels from 0 to 1, of the middle; a constant channel is divided by one level of 255."""
    pixels = torch.full((2, 20, 20, 3), 51, dtype=torch.uint8)
    x = crops.network_input(pixels, *crops.middle_boxes(2, 0.5), 16, (0.1, 0.2, 0.3), (0.5, 0.25, 0.1))
    assert torch.allclose(x[:, :, 3, 5], torch.tensor([0.2, 0.0, -1.0]), atol=1e-6)
    x = crops.network_input(pixels, *crops.middle_boxes(2, 1.0), 16, (50 / 255,) * 3, (0.0, 1e-9, 2 / 255))
    assert torch.allclose(x[0, :, 3, 5], torch.tensor([1.0, 1.0, 0.5]), atol=1e-4)
    pixels[:, 5:15, 5:15] = 0
    assert not crops.network_input(pixels, *crops.middle_boxes(2, 0.3), 16, (0., 0., 0.), (1., 1., 1.)).any()


def test_a_crop_depends_on_nothing_but_its_sample():
    """Other samples in the batch and their order do not matter; epochs, samples and seeds do."""
    epochs, samples = np.arange(40) % 3, np.arange(40) // 3
    where, mirrored = boxes(epochs, samples)
    order = np.random.default_rng(0).permutation(40)
    for some in (order, order[:7], order[:1]):
        again, turned = boxes(epochs[some], samples[some])
        assert (again == where[some]).all() and (turned == mirrored[some]).all()
    assert len(np.unique(where[:, 2])) == 40
    assert len(np.unique([boxes([0], [0], seed)[0][0, 2] for seed in (0, 1, 2, -1, 2 ** 63)])) == 5


def test_crops_have_the_area_ratio_and_place_asked_for():
    """Inside of the image, even over area, log ratio and place; half of them mirrored, with flip=False none."""
    where, mirrored = boxes(np.repeat(np.arange(4), 5000), np.tile(np.arange(5000), 4), scale=(0.1, 0.5), ratio=1.5)
    left, top, width, height = where.T
    assert where.min() >= 0 and (left + width).max() <= 1 and (top + height).max() <= 1
    even = lambda x: (np.histogram(x, 10, (0, 1))[0] == pytest.approx(len(x) / 10, rel=0.12) and 0 <= x.min() and x.max() <= 1)
    assert even((width * height - 0.1) / 0.4) and even(np.log(width / height) / math.log(1.5) / 2 + 0.5)
    assert even(left / (1 - width)) and even(top / (1 - height)) and mirrored.mean() == pytest.approx(0.5, abs=0.02)
    zeros, many = np.zeros(2000, dtype=int), np.arange(2000)
    assert not boxes(zeros, many, flip=False)[1].any()
    _, _, width, height = boxes(zeros, many, scale=(0.9, 1.0), ratio=2.0)[0].T           # few of the ratios fit
    whole = (width == 1) & (height == 1)
    assert 0 < whole.mean() < 0.5 and (width * height).min() >= 0.9 - 1e-12 and max(width.max(), height.max()) == 1
    assert (boxes([0, 1], [0, 1], scale=(1.0, 1.0), ratio=1.0)[0] == [0, 0, 1, 1]).all()


def test_random_numbers_of_crops_are_uniform():
    """Of 230,000 none comes twice, 64 bins are even, and neighbours are not correlated."""
    epochs, samples = np.repeat(np.arange(10), 1000), np.tile(np.arange(1000), 10)
    u = crops.uniform(1337, epochs, samples, 23)
    assert u.shape == (10000, 23) and u.dtype == np.float64 and 0 <= u.min() and u.max() < 1
    assert len(np.unique(u)) == u.size
    assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / u.size)
    counts, expected = np.histogram(u, 64, (0, 1))[0], u.size / 64
    assert 63 - 60 < ((counts - expected) ** 2 / expected).sum() < 63 + 60         # a mean of 63, a deviation of 11
    cube = u.reshape(10, 1000, 23) - 0.5
    for a, b in ((cube[1:], cube[:-1]), (cube[:, 1:], cube[:, :-1]), (cube[..., 1:], cube[..., :-1])):
        assert abs((a * b).mean() * 12) < 5 / math.sqrt(a.size)
    assert abs(((u - 0.5) * (crops.uniform(1338, epochs, samples, 23) - 0.5)).mean() * 12) < 5 / math.sqrt(u.size)
