# Fine-tune DistilBERT on SST-2 by Adam in 4 to 128 dimensions; each new basis chooses as many as keep 90% of the gradient.
# The reference has a fixed rank or rank fraction: --energy=0 --rank=16 or --energy=0 --rank_fraction=0.05
# expected: not measured here
# hardware: one GPU of 8 GB, or a CPU
# time: minutes on a GPU, much longer on a CPU
# python finetune_cls.py config/sst2_rsvd_svt.py          (first: python data/sst2/prepare.py)
out_dir = 'out/sst2_rsvd_svt'
task = 'sst2'
method = 'rsvd_svt'
energy = 0.9
rank = 128                     # the largest rank
interval = 500
scale, rotate = 1.0, False     # as in the reference: the update is not scaled, the moments keep their values

max_len = 128                  # as in the reference: 128 texts per step, a constant rate, 10 epochs
batch_size = 128
micro_batch_size = 32
epochs = 10.0
learning_rate = 2e-4
schedule = 'constant'
