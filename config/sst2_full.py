# DistilBERT on SST-2, all weights by AdamW: what the other sst2_ configs are compared with.
# expected accuracy: 91.3% (published, DistilBERT's authors; not measured here, the weights are a download)
# hardware: one GPU of 8 GB, or a CPU with patience
# time: minutes on a GPU
# python finetune_cls.py config/sst2_full.py          (after python data/sst2/prepare.py)
out_dir = 'out/sst2_full'
task = 'sst2'
method = 'full'

batch_size = 32
epochs = 3.0
learning_rate = 2e-5
schedule = 'linear'
