"""
Compute the sixteen levels of quant.py's `fit4` by Lloyd's algorithm on blocks of normally distributed weights.

    python results/fit4.py            # prints FIT4 and its error; two minutes

Each turn draws new blocks of 32. Each block gets the scale and codes with the least squared error, as in quant.py. Then every
level moves to the mean of the values rounded to it, weighted by the squared scale. Because scale and sign are searched, the
extremes are not exactly -1 and 1, and the two sides differ.
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import quant  # noqa: E402


def error(levels, group, generator, blocks):
    """Quantize `blocks` new blocks: (relative RMS error, levels moved to the means of their values)."""
    w = torch.randn(blocks, group, generator=generator)
    codes, scales = quant.search4(w, levels)
    s = quant.scales4(scales)[:, None]
    off = (levels[codes.long()] * s - w).square().sum() / w.square().sum()
    weight = (s * s).expand_as(w).flatten()
    total = torch.zeros(16).scatter_add_(0, codes.long().flatten(), (w / s).flatten() * weight)
    return off.sqrt().item(), total / torch.zeros(16).scatter_add_(0, codes.long().flatten(), weight)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--turns', type=int, default=200)
    parser.add_argument('--blocks', type=int, default=1 << 15, help='in each turn')
    a = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    levels = torch.tensor(quant.NF4)
    for _ in range(a.turns):
        _, levels = error(levels, 32, generator, a.blocks)
        levels = levels / levels.abs().max()        # a common factor belongs to the scale
    print('FIT4 = (' + ', '.join(f'{x:.4f}' for x in levels.tolist()) + ')')
    levels = torch.tensor([round(x, 4) for x in levels.tolist()])
    for group in (16, 32, 64, 128):
        off, _ = error(levels, group, generator, a.blocks)
        print(f'blocks of {group}: {4 + 8 / group:g} bits, relative RMS error {off:.4f}')


if __name__ == '__main__':
    main()
