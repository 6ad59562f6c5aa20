# DistilBERT on IMDB, all weights by Adam in 16 dimensions with the projected backward pass.
# expected: not measured here
# hardware: one GPU of 8 GB, or a CPU with patience
# time: minutes on a GPU
# python finetune_cls.py config/imdb_rsvd16.py          (after python data/imdb/prepare.py)
out_dir = 'out/imdb_rsvd16'
task = 'imdb'
method = 'rsvd'
rank = 16
interval = 500

max_len = 128                  # the reference's: 128 texts a step, constant rate, 10 epochs
batch_size = 128
micro_batch_size = 32
epochs = 10.0
learning_rate = 2e-4
schedule = 'constant'
