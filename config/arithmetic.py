# A 3.2M-parameter BitNet b1.58 learns to add numbers below 100 and is tested on sums that it never saw.
# expected: exact match of the held-out sums and val loss in results/arithmetic.md; 0.99 nats a byte of the loss are the numbers
# to add, which nobody can guess: ln(10,000) for the 9.3 bytes of a problem
# hardware: 1 core is enough
# time: in results/arithmetic.md
# python train_bitnet.py config/arithmetic.py          (after python data/arithmetic/prepare.py)
out_dir = 'out/arithmetic'
dataset = 'arithmetic'
task = 'arithmetic'

batch_size = 32                # x 64 = 2,048 tokens a step, 220 problems
block_size = 64

n_layer, n_head, n_kv_head = 4, 4, 2
n_embd, n_ff = 256, 768        # multiples of 256: fits the blocks of GGUF's ternary types

max_iters = 2000
learning_rate = 2e-3
warmup_iters = 100

eval_interval = 250
eval_iters = 10
save_interval = 500
