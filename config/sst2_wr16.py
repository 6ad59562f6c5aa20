# DistilBERT on SST-2, queries, keys and values replaced by factors of rank 16; they and the head are trained.
# expected accuracy: 87.3% (reference); not measured here
# hardware: one GPU of 8 GB, or a CPU with patience
# time: minutes on a GPU
# python finetune_cls.py config/sst2_wr16.py          (after python data/sst2/prepare.py)
out_dir = 'out/sst2_wr16'
task = 'sst2'
method = 'weight_reduction'
rank = 16

max_len = 128                  # the reference's: 128 texts a step, constant rate, 10 epochs
batch_size = 128
micro_batch_size = 32
epochs = 10.0
learning_rate = 2e-4
schedule = 'constant'
