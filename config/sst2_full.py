# Fine-tune all weights of DistilBERT on SST-2 by AdamW: the baseline of the other sst2_ configs.
# expected accuracy: 91.3% (published by DistilBERT's authors); not measured here, because the weights need a download
# hardware: one GPU of 8 GB, or a CPU
# time: minutes on a GPU, much longer on a CPU
# python finetune_cls.py config/sst2_full.py          (first: python data/sst2/prepare.py)
out_dir = 'out/sst2_full'
task = 'sst2'
method = 'full'

batch_size = 32
epochs = 3.0
learning_rate = 2e-5
schedule = 'linear'
