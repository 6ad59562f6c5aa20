# Fine-tune DistilBERT on SST-2 with factors of rank 16, cut to rank 8 every 50 steps and at the end of each epoch.
# expected accuracy: 84.9% (reference); not measured here
# hardware: one GPU of 8 GB, or a CPU
# time: minutes on a GPU, much longer on a CPU
# python finetune_cls.py config/sst2_wr_svt16.py          (first: python data/sst2/prepare.py)
out_dir = 'out/sst2_wr_svt16'
task = 'sst2'
method = 'weight_reduction_svt'
rank = 16
svt_interval = 50

max_len = 128                  # as in the reference: 128 texts per step, a constant rate, 10 epochs
batch_size = 128
micro_batch_size = 32
epochs = 10.0
learning_rate = 2e-4
schedule = 'constant'
