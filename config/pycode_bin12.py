# Train a 2.4M-parameter GPT with all 12 blocks binary on the bytes of the Python standard library's sources.
# expected val loss: see results/depth.md, made by python results/runs.py depth
# hardware: a laptop with 2 cores
# time: 3 minutes on one core
# python train_gpt.py config/pycode_bin12.py          (first: python data/pycode/prepare.py)
out_dir = 'out/pycode_bin12'
dataset = 'pycode'
n_layer = 12
n_binary = 12                  # every block; the published experiment with all blocks binary diverged

batch_size = 8                 # x 128 = 1,024 tokens per step
max_iters = 600
learning_rate = 4e-3
min_lr = learning_rate / 10
warmup_iters = 50

eval_interval = 200
eval_iters = 40
save_interval = 250
