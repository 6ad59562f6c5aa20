# Train a 1.2M-parameter GPT in full precision, the baseline, on the bytes of the Python standard library's sources.
# expected val loss: depends on the Python version, whose sources are the text; compare pycode_*.py on one machine
# hardware: a laptop with 2 cores
# time: 4 to 5 minutes
# python train_gpt.py config/pycode_fp.py          (first: python data/pycode/prepare.py)
out_dir = 'out/pycode_fp'
dataset = 'pycode'
n_binary = 0

batch_size = 16                # x 128 = 2,048 tokens per step
max_iters = 1000
optimizer = 'muon'
learning_rate = 4e-3
lr_scale = {'bin': 1.0, 'tern': 1.0, 'int4': 1.0, 'alpha': 0.02}       # Muon trains latent weights at the full rate
schedule = 'linear'
min_lr = 0.0
warmup_iters = 50

eval_interval = 250
eval_iters = 40
save_interval = 250
