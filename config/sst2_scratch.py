# Train a small DistilBERT from random weights on SST-2, to compare methods on the same batches (results/runs.py sst2).
# expected accuracy: see results/sst2.md
# hardware: 2 CPU cores, one run on each
# time: 2 to 5 minutes per run on one core
# python finetune_cls.py config/sst2_scratch.py --method=rsvd --learning_rate=1e-3     (first: python data/sst2/prepare.py)
out_dir = 'out/sst2_scratch'
task = 'sst2'
init_from = 'scratch'
n_layer, n_head, n_embd = 2, 4, 128
vocab_size = 8192

method = 'full'
learning_rate = 5e-4           # the better of 5e-4 and 1e-3 for full; 1e-3 for the methods with fewer dimensions
warmup_iters = 100
max_len = 48                   # one in twenty evaluation sentences is longer and gets cut
batch_size = 64
epochs = 1.0                   # 1,053 steps
interval = 50
