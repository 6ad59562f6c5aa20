# Fine-tune DistilBERT on SST-2: factors of rank 16 replace the query, key and value matrices; only they and the head train.
# expected accuracy: 87.3% (reference); not measured here
# hardware: one GPU of 8 GB, or a CPU
# time: minutes on a GPU, much longer on a CPU
# python finetune_cls.py config/sst2_wr16.py          (first: python data/sst2/prepare.py)
out_dir = 'out/sst2_wr16'
task = 'sst2'
method = 'weight_reduction'
rank = 16

max_len = 128                  # as in the reference: 128 texts per step, a constant rate, 10 epochs
batch_size = 128
micro_batch_size = 32
epochs = 10.0
learning_rate = 2e-4
schedule = 'constant'
