# A 2.4M-parameter GPT on the Python standard library's sources, byte tokens: 12 blocks, all of them binary.
# expected val loss: in results/depth.md, which python results/runs.py depth makes
# hardware: a laptop, 2 cores
# time: 3 minutes on one core
# python train_gpt.py config/pycode_bin12.py          (after python data/pycode/prepare.py)
out_dir = 'out/pycode_bin12'
dataset = 'pycode'
n_layer = 12
n_binary = 12                  # every block; the published experiment diverged at this

batch_size = 8                 # x 128 = 1,024 tokens a step
max_iters = 600
learning_rate = 4e-3
min_lr = learning_rate / 10
warmup_iters = 50

eval_interval = 200
eval_iters = 40
save_interval = 250
