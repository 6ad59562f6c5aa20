# Train a 5.9M-parameter full-precision GPT on WikiText-2 with a trained vocabulary of 4,096, as the input for ptq.py.
# expected val loss: see results/ptq_schemes.md; the log of the run is results/wikitext2_bpe.jsonl
# hardware: 2 CPU cores
# time: 2,400 times the ms of that log
# python train_gpt.py config/wikitext2_bpe.py
out_dir = 'out/wikitext2_bpe'
# first data/text/prepare.py --file wiki.train.txt --val_file wiki.valid.txt --vocab=4096 --name=wikitext2_bpe
dataset = 'text/wikitext2_bpe'

n_layer, n_head, n_embd = 6, 4, 256
block_size = 256
batch_size = 16                # x 256 = 4,096 tokens per step
dropout = 0.1                  # a small text, seen three times
dtype = 'bfloat16'             # for processors with AVX512-BF16; use float32 on others

max_iters = 2400
learning_rate = 2e-3
min_lr = learning_rate / 10
warmup_iters = 100

eval_interval = 400
eval_iters = 20
save_interval = 200
log_interval = 25
