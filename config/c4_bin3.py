# Train GPT-2 124M on C4 with the first 3 of 12 blocks binary; packed 415.2 MB instead of 497.5.
# expected val loss: 3.260 nats in the reference's pruning notebook; its full-precision run has 3.313; read it as noise
# not measured here; the reference has no final LayerNorm and no end-of-text token between documents
# hardware: 8 GPUs of 80 GB, or of 24 GB with --micro_batch_size=5; any number of GPUs that divides 480 / micro_batch_size
# time: not measured here; 12.3B tokens take 7.2 GPU-hours at llm.c's 475k tokens/s (full precision, one H100)
# torchrun --nproc_per_node=8 train_gpt.py config/c4_bin3.py
out_dir = 'out/c4_bin3'
wandb_log = False              # True if wandb is installed and logged in

dataset = 'c4'                 # first python data/c4/prepare.py: 12.3B tokens, 25 GB
block_size = 1024
batch_size = 480               # x 1,024 = 491,520 tokens per step
micro_batch_size = 20          # per device; 8 devices take 3 micro-steps each; other numbers of devices see the same batches

n_layer, n_head, n_embd = 12, 12, 768
bias = False
n_binary = 3

max_iters = 25_000
learning_rate = 6e-4
min_lr = learning_rate / 10
warmup_iters = 40
weight_decay = 0.1

eval_interval = 500
eval_iters = 8                 # x 480 sequences = 3.9M tokens
save_interval = 500
