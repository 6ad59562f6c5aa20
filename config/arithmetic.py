# Train a 3.2M-parameter BitNet b1.58 to add numbers below 100. The test sums do not occur in the training data.
# expected: exact match on the test sums and val loss as in results/arithmetic.md. The loss stays above 0.99 nats per byte,
# because the numbers to add are random: ln(10,000) nats per problem of 9.3 bytes
# hardware: 1 CPU core
# time: see results/arithmetic.md
# python train_bitnet.py config/arithmetic.py          (first: python data/arithmetic/prepare.py)
out_dir = 'out/arithmetic'
dataset = 'arithmetic'
task = 'arithmetic'

batch_size = 32                # x 64 = 2,048 tokens per step, 220 problems
block_size = 64

n_layer, n_head, n_kv_head = 4, 4, 2
n_embd, n_ff = 256, 768        # multiples of 256 fit the blocks of GGUF's ternary types

max_iters = 2000
learning_rate = 2e-3
warmup_iters = 100

eval_interval = 250
eval_iters = 10
save_interval = 500
