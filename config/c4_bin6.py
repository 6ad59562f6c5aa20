# GPT-2 124M on C4, the first 6 of 12 blocks binary; packed 332.9 MB of 497.5.
# expected val loss: 3.348 nats against 3.300 for fp (reference; at its last commit n_binary=6 made all 12 blocks binary)
# (the reference has no last LayerNorm and no end-of-text between documents; not measured here)
# hardware: 8 GPUs of 80 GB; --micro_batch_size=5 for 24 GB, as many devices as divide
# 480 / micro_batch_size see the same batches
# time: 12.3B tokens: 7.2 GPU-hours at the 475k tokens/s that llm.c reports for full precision on one H100; not measured here
# torchrun --nproc_per_node=8 train_gpt.py config/c4_bin6.py
out_dir = 'out/c4_bin6'
wandb_log = False              # True when wandb is installed and logged in

dataset = 'c4'                 # python data/c4/prepare.py first: 12.3B tokens, 25 GB
block_size = 1024
batch_size = 480               # x 1,024 = 491,520 tokens a step
micro_batch_size = 20          # per device; 8 devices: 3 micro-steps each

n_layer, n_head, n_embd = 12, 12, 768
bias = False
n_binary = 6

max_iters = 25_000
learning_rate = 6e-4
min_lr = learning_rate / 10
warmup_iters = 40
weight_decay = 0.1

eval_interval = 500
eval_iters = 8                 # x 480 sequences = 3.9M tokens
save_interval = 500
