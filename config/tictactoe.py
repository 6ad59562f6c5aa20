# Train a 3.2M-parameter BitNet b1.58 to play tic-tac-toe, on games of random and perfect players.
# expected: legal moves and results as in results/tictactoe.md; random moves cannot be predicted, so the loss stays above 0
# hardware: 1 CPU core
# time: see results/tictactoe.md
# python train_bitnet.py config/tictactoe.py           (first: python data/tictactoe/prepare.py)
# python sample.py play --ckpt=out/tictactoe
out_dir = 'out/tictactoe'
dataset = 'tictactoe'
task = 'tictactoe'

batch_size = 32                # x 64 = 2,048 tokens per step, 180 games
block_size = 64

n_layer, n_head, n_kv_head = 4, 4, 2
n_embd, n_ff = 256, 768        # multiples of 256 fit the blocks of GGUF's ternary types

max_iters = 3000
learning_rate = 2e-3
warmup_iters = 100

eval_interval = 500
eval_iters = 10
save_interval = 500
