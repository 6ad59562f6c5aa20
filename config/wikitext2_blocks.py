# Train the model of config/wikitext2_bpe.py further, some blocks binary. Choose them by --binary_blocks or another config.
# expected val loss: see results/blocks.md, made by python results/runs.py blocks
# hardware: 2 CPU cores, one run on each
# time: 211 to 320 s per run, from the logs
# python train_gpt.py config/wikitext2_blocks.py --binary_blocks=0,1,2     (first: config/wikitext2_bpe.py)
out_dir = 'out/wikitext2_blocks'
init_from = 'out/wikitext2_bpe/best.pt'
dataset = 'text/wikitext2_bpe'

n_layer, n_head, n_embd = 6, 4, 256
qkv_proj = c_proj = mlp_proj = 'bin'
block_size = 256
batch_size = 16                # x 256 = 4,096 tokens per step
dropout = 0.1
dtype = 'bfloat16'

max_iters = 150
learning_rate = 1e-3
min_lr = learning_rate / 10
warmup_iters = 20

eval_interval = 50
eval_iters = 20
save_interval = 150
log_interval = 10
