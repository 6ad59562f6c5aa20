# Train a 95M-parameter BitNet b1.58 on FineWeb-Edu: the reference's largest experiment, with the same model shape.
# expected val loss: none published (the authors write that the text was not yet coherent); not measured here
# hardware, time: not measured here; run python train_bitnet.py config/fineweb95m.py --estimate=True, even before the download
# torchrun --nproc_per_node=8 train_bitnet.py config/fineweb95m.py       (first: python data/fineweb95m/prepare.py)
out_dir = 'out/fineweb95m'
dataset = 'fineweb95m'
vocab_size = 32_000

batch_size = 32                # x 256 = 8,192 tokens per step
block_size = 256

n_layer, n_head, n_kv_head = 8, 12, 6
n_embd, n_ff = 768, 3072       # multiples of 256 fit the blocks of GGUF's ternary types

max_iters = 400_000            # 3.3B tokens
learning_rate = 1.5e-3
second_lr = 1e-3
warmup_iters = 375

eval_interval = 2000
eval_iters = 100               # x 32 sequences = 0.8M tokens
log_interval = 50
diag_interval = 1000
save_interval = 2000
