"""
Layers for post-training quantization and pruning: GroupLinear stores integers of 8, 4, 3, 2, 1.58 or 1 bits with a scale per
group of a row, SparseLinear only the nonzero weights. Importing this module adds both to layers.FORMATS.

calibrate.py computes codes from a calibration set. convert(model, {'*': ('group', dict(levels='int4'))}) rounds to the nearest.
"""
import torch
import torch.nn as nn

from layers import FORMATS, Format, LowBitLinear, compute_dtype, in_blocks, plain_linear
from quant import GRIDS, decode4, group_grid, pack_bits, product4, to_grid, unpack_bits


class GroupLinear(LowBitLinear):
    """Linear layer with integer weights and a scale per group, (..., in) -> (..., out); w ~ (code - zero) * scale.

    levels: 'int8' | 'int4' | 'int3' | 'int2' with a zero for each group, 'tern' (-s, 0, s) or 'bin' (-s, s), see
    quant.group_grid(). group: weights of a row that share a scale; 0: the whole row. Gradients pass straight through the
    rounding; after pack_() the layer is frozen. Packed buffers: code uint8 (out, in * bits / 8), weight_scale fp16 (out,
    groups), zero uint8 (packed like the codes), and with scaled_input also input_scale fp16 (in,), a factor of the input.
    Raises ValueError for unknown levels or a group that does not divide `in`; pack_() for weights not finite or beyond fp16.
    """
    kind, shown = 'group', ('levels', 'group')

    def __init__(self, in_features, out_features, bias=True, *, levels='int4', group=128, scaled_input=False):
        if levels not in GRIDS:
            raise ValueError(f'GroupLinear: levels={levels!r} must be in {list(GRIDS)}')
        if group < 0 or group and in_features % group:
            fits = [g for g in (32, 64, 128, 256) if in_features % g == 0] or [in_features]
            raise ValueError(f'group={group} does not divide a row of {in_features} weights; type --group={fits[-1]}, or 0 for '
                             'whole rows')
        super().__init__(in_features, out_features, bias)
        self.levels, self.group, self.bits = levels, group or in_features, GRIDS[levels].bits
        self.scaled_input = scaled_input

    def encode(self):
        def part(rows):
            groups = rows.float().unflatten(1, (-1, self.group))
            scale, zero = group_grid(groups, self.levels)
            codes = to_grid(groups, scale, zero, self.levels).to(torch.uint8)
            return {'codes': codes.flatten(1), 'scale': scale[..., 0], 'zero': zero[..., 0]}
        ones = torch.ones(self.in_features, device=self.weight.device) if self.scaled_input else None
        return self.buffers_of(**in_blocks(part, self.weight), input_scale=ones)

    def buffers_of(self, codes, scale, zero, input_scale=None):
        """Packed buffers of codes (out, in), scale and zero (out, groups), input_scale (in,); any float or integer dtypes."""
        buffers = in_blocks(lambda rows: {'code': pack_bits(rows, self.bits)}, codes) | {'weight_scale': scale.half()}
        if GRIDS[self.levels].zero is None:
            buffers['zero'] = pack_bits(zero, self.bits)
        return buffers if input_scale is None else buffers | {'input_scale': input_scale.half()}

    @classmethod
    def from_codes(cls, linear, levels, group, codes, scale, zero, input_scale=None):
        """Packed layer from codes, scale and zero (see buffers_of), with the bias of nn.Linear `linear`."""
        with torch.device('meta'):
            new = cls(linear.in_features, linear.out_features, linear.bias is not None, levels=levels, group=group,
                      scaled_input=input_scale is not None)
        new.hold_(new.buffers_of(codes, scale, zero, input_scale))
        if linear.bias is not None:
            new.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        return new.train(linear.training)

    def shifts(self, pick=slice(None)):
        """(rows, groups) fp32: zero * scale of each group."""
        zero, groups = GRIDS[self.levels].zero, self.weight_scale.shape[1]
        zero = unpack_bits(self.zero[pick], self.bits, groups).float() if zero is None else zero
        return self.weight_scale[pick].float() * zero

    def rows(self, pick, shifts, dtype):
        """Dequantize weights (rows, in) of the packed rows `pick` (slice or tensor of row numbers), without input_scale.
        shifts: shifts() of the same rows."""
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

    def product_of_codes(self, x):
        if not self._in_whole_bytes():
            return None
        scales = {'absmax': self.weight_scale.view(-1)}
        y = product4(x, self.code.view(-1), scales, f'codes{self.bits}', self.out_features)
        return y if y is None else y.sub_(x.float().unflatten(1, (-1, self.group)).sum(-1) @ self.shifts().T)

    def look_up(self, ids):
        weight = self.rows(ids, self.shifts(ids), torch.float32)
        return weight * self.input_scale.float() if self.scaled_input else weight

    def effective_weight(self):
        return self.look_up(slice(None))

    def decode(self):
        weight = self.effective_weight()
        if self.levels == 'tern':                   # divide by the nonzero share, so that mean|w| is the scale again
            groups = weight.unflatten(1, (-1, self.group))
            weight = (groups / groups.ne(0).float().mean(-1, keepdim=True).clamp(min=1e-9)).flatten(1)
        return weight, None

    def rounded(self, weight):
        groups = weight.float().unflatten(1, (-1, self.group))
        scale, zero = group_grid(groups, self.levels)
        return to_grid(groups, scale, zero, self.levels).sub_(zero).mul_(scale).flatten(1)

    def forward(self, x):
        dtype = compute_dtype(x)
        return super().forward(x.to(dtype) * self.input_scale.to(dtype) if self.packed and self.scaled_input else x)

    def decoder(self, dtype):
        shifts = self.shifts()
        return lambda i, j: self.rows(slice(i, j), shifts[i:j], dtype)


class SparseLinear(LowBitLinear):
    """Linear layer with many zero weights, (..., in) -> (..., out). Before pack_() it computes what nn.Linear does. Packing is
    exact. Packed buffers: code uint8 (out, in / 8), one bit per weight, and values (n,), the nonzero weights row by row in the
    dtype of the weight."""
    kind, bits = 'sparse', 1

    def __init__(self, in_features, out_features, bias=True):
        super().__init__(in_features, out_features, bias)

    def encode(self):
        weight = self.weight.detach()
        return {'code': pack_bits(weight != 0, 1), 'values': weight[weight != 0]}

    def rows(self, i, j, starts, dtype):
        mask = unpack_bits(self.code[i:j], 1, self.in_features).bool()
        weight = torch.zeros(mask.shape, dtype=self.values.dtype, device=mask.device)
        return weight.masked_scatter_(mask, self.values[starts[i]:]).to(dtype)

    def starts(self):
        """Index of the first value of each row, and of the end: a list of out + 1 int."""
        counts = unpack_bits(self.code, 1, self.in_features).sum(1, dtype=torch.int64).cumsum(0)
        return [0, *counts.tolist()]

    def decode(self):
        return self.rows(0, self.out_features, [0], self.values.dtype), None

    def decoder(self, dtype):
        starts = self.starts()
        return lambda i, j: self.rows(i, j, starts, dtype)

    def forward(self, x):
        return super().forward(x) if self.packed else plain_linear(x, self.weight, self.bias)


FORMATS['group'], FORMATS['sparse'] = Format(GroupLinear), Format(SparseLinear)
