# Train a small DistilBERT from random weights on SST-2, to compare methods on the same batches (results/runs.py sst2).
# expected accuracy: see results/sst2.md
# hardware: 2 CPU cores, one run on each
# time: 2 to 5 minutes per run on one core
# python finetune_cls.py config/sst2_scratch.py --method=rsvd --rank=4     (first: python data/sst2/prepare.py --held)
out_dir = 'out/sst2_scratch'
task, dataset = 'sst2', 'sst2/held'
eval_split = 'val,held'        # 872 sentences, and 6,000 sentences and phrases of the training split, see data/sst2/prepare.py
init_from = 'scratch'
n_layer, n_head, n_embd = 2, 4, 128
vocab_size = 8192

method = 'full'
learning_rate = 1e-3           # of 5e-4, 1e-3 and 2e-3, see results/sst2_search.md
warmup_iters = 100
max_len = 48                   # one in twenty evaluation sentences is longer and gets cut
batch_size = 64
epochs = 1.0                   # 959 steps
interval = 10
