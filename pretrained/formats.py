"""
The layers that post-training quantization and pruning leave behind: integers of 8, 4, 3, 2, 1.58 or 1 bits with a scale per
group of a row; and weights of which only those that are not 0 are kept.

calibrate.py finds the codes; convert(model, {'*': ('group', dict(levels='int4'))}) rounds to the nearest.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from functional import compute_dtype, frozen_linear, quantized_linear
from lowbit import LowBit, in_blocks
from quant import GRIDS, decode4, group_grid, pack_bits, product4, to_grid, unpack_bits


class GroupLinear(LowBit, nn.Module):
    """Linear layer of integer weights, (..., in) -> (..., out); w ~ (code - zero) * scale for each `group` weights of a row.

    levels: 'int8' | 'int4' | 'int3' | 'int2' with a zero for each group, 'tern' (-s, 0, s) or 'bin' (-s, s), see
    quant.group_grid(); group=0: a whole row. Trained through the rounding or, after pack_(), frozen. Packed buffers: code
    uint8 (out, in * bits / 8), weight_scale fp16 (out, groups), zero uint8 (packed like the codes), and for activation-aware
    scaling input_scale fp16 (in,), by which the input is multiplied. Raises ValueError for unknown levels and for a group that
    does not divide `in`, in pack_() for weights that are not finite or beyond fp16.
    """
    kind = 'group'

    def __init__(self, in_features, out_features, bias=True, *, levels='int4', group=128, scaled_input=False):
        super().__init__()
        if levels not in GRIDS:
            raise ValueError(f'GroupLinear: levels={levels!r} must be in {list(GRIDS)}')
        if group < 0 or group and in_features % group:
            fits = [g for g in (32, 64, 128, 256) if in_features % g == 0] or [in_features]
            raise ValueError(f'group={group} does not divide a row of {in_features} weights; type --group={fits[-1]}, or 0 for '
                             'whole rows')
        self.in_features, self.out_features, self.shape = in_features, out_features, (out_features, in_features)
        self.levels, self.group, self.bits = levels, group or in_features, GRIDS[levels].bits
        self.scaled_input = scaled_input
        self.weight = nn.Parameter(torch.empty(out_features, in_features).normal_(std=in_features ** -0.5))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def encode(self):
        def part(rows):
            groups = rows.float().unflatten(1, (-1, self.group))
            scale, zero = group_grid(groups, self.levels)
            codes = to_grid(groups, scale, zero, self.levels).to(torch.uint8)
            return {'codes': codes.flatten(1), 'scale': scale[..., 0], 'zero': zero[..., 0]}
        ones = torch.ones(self.in_features, device=self.weight.device) if self.scaled_input else None
        return self.buffers_of(**in_blocks(part, self.weight), input_scale=ones)

    def buffers_of(self, codes, scale, zero, input_scale=None):
        """What is kept of codes (out, in), scale and zero (out, groups), input_scale (in,); any float or integer types."""
        held = in_blocks(lambda rows: {'code': pack_bits(rows, self.bits)}, codes) | {'weight_scale': scale.half()}
        if GRIDS[self.levels].zero is None:
            held['zero'] = pack_bits(zero, self.bits)
        return held if input_scale is None else held | {'input_scale': input_scale.half()}

    @classmethod
    def from_codes(cls, linear, levels, group, codes, scale, zero, input_scale=None):
        """A packed layer of these (see buffers_of) with the bias of nn.Linear `linear`."""
        with torch.device('meta'):
            new = cls(linear.in_features, linear.out_features, linear.bias is not None, levels=levels, group=group,
                      scaled_input=input_scale is not None)
        new.weight = None
        for name, value in new.buffers_of(codes, scale, zero, input_scale).items():
            new.register_buffer(name, value)
        if linear.bias is not None:
            new.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        new.packed = True
        return new.train(linear.training)

    def shifts(self, pick=slice(None)):
        """(rows, groups) fp32: zero * scale of each group."""
        zero, groups = GRIDS[self.levels].zero, self.weight_scale.shape[1]
        zero = unpack_bits(self.zero[pick], self.bits, groups).float() if zero is None else zero
        return self.weight_scale[pick].float() * zero

    def rows(self, pick, shifts, dtype):
        """Weights (rows, in), those that an input times input_scale is multiplied by, of the packed rows `pick`, a slice or a
        tensor of their numbers, and their shifts()."""
        scale = self.weight_scale[pick]
        if self._in_whole_bytes():
            code = self.code[pick].flatten()
            w = decode4(code, {'absmax': scale.flatten()}, f'codes{self.bits}').view(*scale.shape, self.group)
        else:
            codes = unpack_bits(self.code[pick], self.bits, self.in_features)
            w = codes.float().view(*scale.shape, self.group).mul_(scale.float().unsqueeze(-1))
        return w.sub_(shifts.unsqueeze(-1)).flatten(1).to(dtype)

    def _in_whole_bytes(self):
        return self.bits <= 4 and self.in_features * self.bits % 8 == 0

    def _product(self, x):
        """x (tokens, in) times the packed weight, for a few tokens at once from the codes; None where kernels.c cannot."""
        if not self._in_whole_bytes():
            return None
        held = {'absmax': self.weight_scale.view(-1)}
        y = product4(x, self.code.view(-1), held, f'codes{self.bits}', self.out_features)
        return y if y is None else y.sub_(x.float().unflatten(1, (-1, self.group)).sum(-1) @ self.shifts().T)

    def effective_weight(self):
        weight = self.rows(slice(None), self.shifts(), torch.float32)
        return weight * self.input_scale.float() if self.scaled_input else weight

    def decode(self):
        weight = self.effective_weight()
        if self.levels == 'tern':                   # mean|w| is the scale again when what is not 0 is as much larger
            groups = weight.unflatten(1, (-1, self.group))
            weight = (groups / groups.ne(0).float().mean(-1, keepdim=True).clamp(min=1e-9)).flatten(1)
        return weight, None

    def _quantize(self, weight, bias, dtype):
        groups = weight.float().unflatten(1, (-1, self.group))
        scale, zero = group_grid(groups, self.levels)
        weight = to_grid(groups, scale, zero, self.levels).sub_(zero).mul_(scale).flatten(1)
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    def forward(self, x):
        dtype = compute_dtype(x)
        if not self.packed:
            flat = x.reshape(-1, self.in_features).to(dtype)
            y = quantized_linear(flat, self.weight, self.bias, None, self._quantize, None, 0.0)
            return y.view(*x.shape[:-1], self.out_features)
        x = x.to(dtype) * self.input_scale.to(dtype) if self.scaled_input else x

        def decoder():
            shifts = self.shifts()
            return lambda i, j: self.rows(slice(i, j), shifts[i:j], dtype)
        return frozen_linear(x, self.bias, decoder, self.shape, 1, self._product)

    def extra_repr(self):
        return f'{self.in_features}, {self.out_features}, levels={self.levels}, group={self.group}, packed={self.packed}'



class SparseLinear(LowBit, nn.Module):
    """Linear layer many of whose weights are 0, (..., in) -> (..., out). Packed buffers: code uint8 (out, in / 8), a bit for
    each weight, and values (n,), those that are not 0, row by row, in the dtype that they had; the same weights as before.
    Before pack_() an nn.Linear like any other."""
    kind, bits = 'sparse', 1

    def __init__(self, in_features, out_features, bias=True):
        super().__init__()
        self.in_features, self.out_features, self.shape = in_features, out_features, (out_features, in_features)
        self.weight = nn.Parameter(torch.empty(out_features, in_features).normal_(std=in_features ** -0.5))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def encode(self):
        weight = self.weight.detach()
        return {'code': pack_bits(weight != 0, 1), 'values': weight[weight != 0]}

    def rows(self, i, j, starts, dtype):
        mask = unpack_bits(self.code[i:j], 1, self.in_features).bool()
        weight = torch.zeros(mask.shape, dtype=self.values.dtype, device=mask.device)
        return weight.masked_scatter_(mask, self.values[starts[i]:]).to(dtype)

    def starts(self):
        """Where each row's values begin; one more than rows."""
        counts = unpack_bits(self.code, 1, self.in_features).sum(1, dtype=torch.int64).cumsum(0)
        return [0, *counts.tolist()]

    def decode(self):
        return self.rows(0, self.out_features, [0], self.values.dtype), None

    def forward(self, x):
        dtype = compute_dtype(x)
        if not self.packed:
            return F.linear(x.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))

        def decoder():
            starts = self.starts()
            return lambda i, j: self.rows(i, j, starts, dtype)
        return frozen_linear(x, self.bias, decoder, self.shape)

    def extra_repr(self):
        return f'{self.in_features}, {self.out_features}, packed={self.packed}'
