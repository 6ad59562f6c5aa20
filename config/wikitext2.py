# Train a 1.2M-parameter GPT on the bytes of WikiText-2, to compare kinds of layers at equal tokens (results/runs.py quality).
# expected val loss: see results/quality.md
# hardware: 2 CPU cores, one run on each
# time: 5 to 7 minutes per run on one core
# python train_gpt.py config/wikitext2.py --n_binary=3
out_dir = 'out/wikitext2'
dataset = 'text/wikitext2'     # from data/text/prepare.py --file wiki.train.txt --val_file wiki.valid.txt --name=wikitext2

n_layer, n_head, n_embd = 6, 4, 128
block_size = 128
batch_size = 12                # x 128 = 1,536 tokens per step

max_iters = 1500
learning_rate = 4e-3
min_lr = learning_rate / 10
warmup_iters = 100

eval_interval = 500
eval_iters = 100
save_interval = 500
log_interval = 25
