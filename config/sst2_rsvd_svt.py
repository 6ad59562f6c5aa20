# DistilBERT on SST-2, Adam in as many dimensions as keep 90% of a gradient, 4 to 128, chosen anew with each basis.
# --energy=0 --rank=16 or --energy=0 --rank_fraction=0.05 for the reference's fixed rank and rank fractions
# expected: not measured here
# hardware: one GPU of 8 GB, or a CPU with patience
# time: minutes on a GPU
# python finetune_cls.py config/sst2_rsvd_svt.py          (after python data/sst2/prepare.py)
out_dir = 'out/sst2_rsvd_svt'
task = 'sst2'
method = 'rsvd_svt'
energy = 0.9
rank = 128                     # at most
interval = 500

max_len = 128                  # the reference's: 128 texts a step, constant rate, 10 epochs
batch_size = 128
micro_batch_size = 32
epochs = 10.0
learning_rate = 2e-4
schedule = 'constant'
