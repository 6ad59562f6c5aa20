# Train a 1.2M-parameter GPT with the first 3 of 6 blocks binary on the bytes of the Python standard library's sources.
# expected val loss: depends on the Python version, whose sources are the text; compare pycode_*.py on one machine
# hardware: a laptop with 2 cores
# time: 5 minutes
# python train_gpt.py config/pycode_bin.py          (first: python data/pycode/prepare.py)
out_dir = 'out/pycode_bin'
dataset = 'pycode'
n_binary = 3

batch_size = 16                # x 128 = 2,048 tokens per step
max_iters = 1000
optimizer = 'muon'
learning_rate = 4e-3
lr_scale = {'bin': 1.0, 'tern': 1.0, 'int4': 1.0, 'alpha': 0.02}       # Muon trains latent weights at the full rate
schedule = 'linear'
min_lr = 0.0
ramp = 0.85                    # val loss, of rounded weights, is high until the ramp ends
warmup_iters = 50

eval_interval = 250
eval_iters = 40
save_interval = 250
