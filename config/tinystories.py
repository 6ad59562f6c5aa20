# Train a 12.8M-parameter BitNet b1.58 on TinyStories, about as large as the reference's model.
# expected: not measured here; the reference reports a loss of 1.5 to 2.0, but neither which loss nor after how many steps
# hardware, time: run python train_bitnet.py config/tinystories.py --estimate=True
# python train_bitnet.py config/tinystories.py         (first: python data/tinystories/prepare.py)
# python sample.py chat --ckpt=out/tinystories
out_dir = 'out/tinystories'
dataset = 'tinystories'
vocab_size = 2048

batch_size = 64                # x 256 = 16,384 tokens per step
block_size = 256

n_layer, n_head, n_kv_head = 6, 8, 4
n_embd, n_ff = 512, 768        # multiples of 256 fit the blocks of GGUF's ternary types; the reference's 384 and 1,152 do not

max_iters = 15_000             # 246M tokens, half of the data
learning_rate = 1.5e-3
second_lr = 1e-3
warmup_iters = 250

eval_interval = 500
eval_iters = 20
save_interval = 500
