# Train a 1.2M-parameter GPT with all 6 blocks ternary (BitNet b1.58) on the bytes of the Python standard library's sources.
# expected val loss: depends on the Python version, whose sources are the text; compare pycode_*.py on one machine
# hardware: a laptop with 2 cores
# time: 4 to 5 minutes
# python train_gpt.py config/pycode_tern.py          (first: python data/pycode/prepare.py)
out_dir = 'out/pycode_tern'
dataset = 'pycode'
n_binary = 6
qkv_proj = c_proj = mlp_proj = 'tern'

batch_size = 16                # x 128 = 2,048 tokens per step
max_iters = 1000
optimizer = 'muon'
learning_rate = 4e-3
lr_scale = {'bin': 1.0, 'tern': 1.0, 'int4': 1.0, 'alpha': 0.02}       # Muon trains latent weights at the full rate
schedule = 'linear'
min_lr = 0.0
ramp, ternary_std = 0.85, 0.02  # val loss, of rounded weights, is high until the ramp ends
warmup_iters = 50

eval_interval = 250
eval_iters = 40
save_interval = 250
