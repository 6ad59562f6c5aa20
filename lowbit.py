"""
What low-bit modules share: latent weights that become codes and are weights again, and what training does to the codes. The
modules are in layers.py and conv.py.
"""
import copy
import math

import torch
import torch.nn as nn

from functional import EVERY_ACTIVATION, compute_dtype
from quant import FORMATS4, SCALES4, binarize, decode4, levels4, pack4, pack_bits, quantize4, scales4, unpack_bits


def in_blocks(encode, rows, size=1 << 20):
    """encode(part) -> dict of tensors, for about `size` weights of `rows` (n, ...) at a time, each tensor put together again:
    what is made on the way is many times the codes, and the matrix of a head may be half of a model. Parts are of whole 256
    rows; on a GPU, where calls cost more than memory, they are larger."""
    size = size if rows.device.type == 'cpu' else 1 << 26
    parts = [encode(part) for part in rows.split(max(1, size // max(1, rows[:1].numel()) // 256) * 256)]
    if len(parts) == 1:
        return parts[0]

    def whole(tensors):                             # under autocast cat() knows no fp16 on a CPU, with out= it asks nothing
        return torch.cat(tensors, out=tensors[0].new_empty(sum(map(len, tensors)), *tensors[0].shape[1:]))
    return {name: whole([part[name] for part in parts]) for name in parts[0]}


def all_finite(tensors):
    """Without a copy of any of them."""
    return all(torch.isfinite(torch.stack(t.aminmax())).all() for t in tensors if t.numel())


class Activation(nn.Module):
    """One of functional's activations by its name, gated ones included."""

    def __init__(self, act):
        super().__init__()
        self.act = act

    def forward(self, x):
        return EVERY_ACTIVATION[self.act][0](x)

    def extra_repr(self):
        return self.act


class LowBit:
    """What the low-bit modules share: latent `weight` (and `bias`) Parameters or, after pack_(), uint8 codes.

    A subclass gives `kind`, `bits`, `encode()` -> dict of buffers that hold the quantized weight, its inverse `decode()` ->
    (weight, bias or None) and a forward() for both states.
    """
    packed = False
    act = None

    def weight_input(self, x):
        """What the weight is multiplied by, given the layer's input: what an adapter beside it has to see."""
        return EVERY_ACTIVATION[self.act][0](x.to(compute_dtype(x)))

    def effective_weight(self):
        """fp32 (out, in): what weight_input(x) is multiplied by, of a packed layer."""
        return self.decode()[0].float()

    def merged(self, delta, requantize, x):
        """A layer of weight effective_weight() + delta: this kind, packed, with requantize; else in the dtype of x."""
        if requantize:
            new = copy.deepcopy(self).unpack_()
            new.weight.add_(self._latent_change(delta, x))
            return new.pack_()
        new = nn.Linear(self.in_features, self.out_features, self.bias is not None, device=x.device, dtype=x.dtype)
        new.weight.copy_(self.effective_weight() + delta)
        if self.bias is not None:
            new.bias.copy_(self.bias)
        return new if self.act is None else nn.Sequential(Activation(self.act), new)

    def _latent_change(self, delta, x):
        return delta

    def pack_(self):
        """Replace the latent weights by their codes (buffers `code`, ...), in place. Not trainable from here on."""
        if not self.packed:
            if not all_finite(self.parameters(recurse=False)):
                raise ValueError(f'{type(self).__name__}: weights must be finite to be packed')
            with torch.no_grad():
                buffers = self.encode()
            bias = getattr(self, 'bias', None)
            del self.weight
            if bias is not None and 'packed_bias' in buffers:
                del self.bias
                self.bias = None
            self.weight = None
            for name, value in buffers.items():
                self.register_buffer(name, value)
            for p in self.parameters(recurse=False):
                p.requires_grad_(False)
            self.packed = True
        return self

    def unpack_(self):
        """Back to a trainable layer whose weights are the quantized ones (the latent values are gone for good)."""
        if self.packed:
            with torch.no_grad():
                weight, bias = self.decode()
            for name in [n for n, _ in self.named_buffers(recurse=False)]:
                delattr(self, name)
            self.weight = nn.Parameter(weight)
            if bias is not None:
                self.bias = nn.Parameter(bias)
            for p in self.parameters(recurse=False):
                p.requires_grad_(True)
            self.packed = False
        return self

    def packed_bytes(self):
        """Bytes of this layer when packed: codes, scales and whatever it keeps in full precision."""
        with torch.no_grad():
            held = dict(self.named_buffers(recurse=False)) if self.packed else self.encode()
        dropped = {'weight'} | ({'bias'} if 'packed_bias' in held else set())
        kept = [p for n, p in self.named_parameters(recurse=False) if n not in dropped]
        return sum(t.numel() * t.element_size() for t in [*held.values(), *kept])


class Binary(LowBit):
    """Bits of weight and bias for the three binary modules; `chunks` slices of dim 0 have their own mean each."""
    kind, bits, chunks = 'bin', 1, 1

    def _init_alpha(self, alpha, shape):
        if not alpha > 0:
            raise ValueError(f'alpha must start above 0, got {alpha}')
        self.alpha = nn.Parameter(torch.full(shape, float(alpha)))

    def encode(self):
        held = {'code': pack_bits(binarize(self.weight, self.chunks).flatten(1), 1)}
        if self.bias is not None:
            held['packed_bias'] = pack_bits(binarize(self.bias, self.chunks), 1)
        return held

    def decode(self):
        return self._weights(torch.float32)

    def _bits(self, name, n, dtype, offset):
        return unpack_bits(getattr(self, name), 1, n).to(dtype).sub_(offset)

    def _weights(self, dtype, offset=0.5):
        """(weight, bias or None) of a packed layer: bits minus `offset`."""
        weight = self._bits('code', math.prod(self.shape[1:]), dtype, offset).view(self.shape)
        return weight, self._bits('packed_bias', self.shape[0], dtype, offset) if hasattr(self, 'packed_bias') else None


class FourBit(LowBit):
    """What Linear4bit and Conv4bit share: codes and scales of the flattened weight, see quantize4()."""
    bits = 4

    def _set_format(self, format, group, scales):
        name = type(self).__name__
        if format not in FORMATS4 or group < 0 or group % 2:
            raise ValueError(f'{name}: format={format!r} must be in {list(FORMATS4)}, group={group} even')
        scales = scales or FORMATS4[format].scales
        if scales not in SCALES4 or (scales == 'log8') != (format == 'fit4'):
            raise ValueError(f"{name}: scales={scales!r} must be in {SCALES4}; 'log8' is fit4's, and fit4's only")
        self.format, self.group, self.scales = format, group or FORMATS4[format].group, scales
        self.kind = 'int4' if format == 'uniform' else format

    def encode(self):
        def part(groups):
            codes, held = quantize4(groups, self.format, self.group, self.scales)
            return {'code': pack4(codes, self.format), **held}
        # 8-bit scales go by 256 groups; those of fit4 by the largest weight of all
        whole = self.scales == 'log8' or self.weight.numel() % self.group
        held = part(self.weight) if whole else in_blocks(part, self.weight.reshape(-1, self.group))
        if not torch.isfinite(scales4({k: t for k, t in held.items() if k != 'code'})).all():
            raise ValueError(f'{type(self).__name__}: weights must be at most 65504 in size for scales={self.scales!r}')
        return held

    def _held(self):
        return {name: t for name, t in self.named_buffers(recurse=False) if name != 'code'}

    def decode(self):
        return decode4(self.code, self._held(), self.format)[:math.prod(self.shape)].view(self.shape), None

    def _quantize(self, weight, bias, dtype):
        if self.packed:
            weight, _ = self.decode()
        else:
            codes, held = quantize4(weight, self.format, self.group, self.scales)
            weight = levels4(codes, self.format).mul_(scales4(held)[:, None]).view(-1)[:weight.numel()].view(weight.shape)
        return weight.to(dtype), None if bias is None else bias.to(dtype)


def count_codes(before, after, start_scales):
    """A log record of ternary matrices, before and after one step as {name: (codes, scale)}, and what their scales were at
    the start: shares of the codes, share that the step flipped (None without `before`), rows that are all 0, and where the
    scales went, by matrix and in all; scale_drift is the mean of |ln(scale / its start)|."""
    matrices, sizes = {}, [codes.numel() for codes, _ in after.values()]
    for name, (codes, scale) in after.items():
        share = lambda which: which.sum().item() / which.numel()
        matrices[name] = {'minus': share(codes < 0), 'zero': share(codes == 0), 'plus': share(codes > 0),
                          'flips': share(codes != before[name][0]) if before else None,
                          'dead_rows': (codes == 0).all(1).sum().item(), 'scale': scale,
                          'scale_ratio': scale / start_scales[name]}
    column = lambda key: [m[key] for m in matrices.values()]

    def of_all(key):
        values = column(key)
        return None if None in values else math.fsum(map(math.prod, zip(values, sizes, strict=True))) / sum(sizes)

    return {key: of_all(key) for key in ('minus', 'zero', 'plus', 'flips')} | {
        'dead_rows': sum(column('dead_rows')), 'matrices': matrices,
        'scale_drift': math.fsum(abs(math.log(ratio)) for ratio in column('scale_ratio')) / len(matrices)}
