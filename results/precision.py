"""
Error of binary weights {0, 1} in bf16, from their common term: python results/precision.py > results/precision.txt

Compares the normalized output of a binary layer with float64, for products in bf16. The weights are {0, 1}, as published, or
{-1/2, 1/2}, as in layers.py; in exact arithmetic both give the same function. Inputs are GELU of a normal variable, as before
the second layer of an MLP, and normal, as after a LayerNorm.
"""
import torch
import torch.nn.functional as F

torch.manual_seed(0)
print(f'{"in":>6} {"input":>7} {"{0,1}":>9} {"+-1/2":>9}   relative RMS error in bf16, 768 outputs, 256 tokens')
for n in (768, 3072):
    bits = (torch.randn(768, n) > 0).double()
    for name, x in (('gelu', F.gelu(torch.randn(256, n))), ('normal', torch.randn(256, n))):
        x = x.bfloat16()
        exact = F.layer_norm(x.double() @ bits.T, (768,), eps=0)
        errors = []
        for offset in (0.0, 0.5):
            z = x @ (bits - offset).bfloat16().T
            errors.append((F.layer_norm(z.double(), (768,), eps=0) - exact).norm() / exact.norm())
        print(f'{n:6} {name:>7} {errors[0]:9.4f} {errors[1]:9.4f}')
