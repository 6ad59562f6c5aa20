# A 3.2M-parameter BitNet b1.58 learns tic-tac-toe from games of random and perfect players, and plays.
# expected: legal moves and results in results/tictactoe.md; the loss has a floor, moves at random cannot be guessed
# hardware: 1 core is enough
# time: in results/tictactoe.md
# python train_bitnet.py config/tictactoe.py           (after python data/tictactoe/prepare.py)
# python sample.py play --ckpt=out/tictactoe
out_dir = 'out/tictactoe'
dataset = 'tictactoe'
task = 'tictactoe'

batch_size = 32                # x 64 = 2,048 tokens a step, 180 games
block_size = 64

n_layer, n_head, n_kv_head = 4, 4, 2
n_embd, n_ff = 256, 768        # multiples of 256: fits the blocks of GGUF's ternary types

max_iters = 3000
learning_rate = 2e-3
warmup_iters = 100

eval_interval = 500
eval_iters = 10
save_interval = 500
