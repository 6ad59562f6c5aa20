# Train a 0.9M-parameter GPT on WikiText-2 in a BPE of 1,024 tokens, to compare kinds of layers on the same batches
# (results/runs.py quality).
# expected val loss: see results/quality.md
# hardware: 1 CPU core with AVX512-BF16; on others add --dtype=float32
# time: 2,500 times the ms/step of results/quality.md
# python train_gpt.py config/wikitext2.py --n_binary=4 --qkv_proj=tern --c_proj=tern --mlp_proj=tern --output_gains=True
out_dir = 'out/wikitext2'
# first data/text/prepare.py --file wiki.train.txt --val_file wiki.valid.txt --vocab=1024 --name=wikitext2
dataset = 'text/wikitext2'

n_layer, n_head, n_embd = 4, 4, 128
block_size = 128
batch_size = 16                # x 128 = 2,048 tokens per step
dtype = 'bfloat16'
compile = True

optimizer = 'muon'
max_iters = 2500
learning_rate = 8e-3           # see results/search.md
lr_scale = {'bin': 1.0, 'tern': 1.0, 'int4': 1.0, 'alpha': 0.02}
ramp, ternary_std = 0.85, 0.02
schedule, min_lr = 'linear', 0.0
warmup_iters = 100

eval_interval = 500
eval_iters = 200
save_interval = 250
log_interval = 25
