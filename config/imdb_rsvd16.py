# Fine-tune all weights of DistilBERT on IMDB by Adam in 16 dimensions with the projected backward pass.
# expected: not measured here
# hardware: one GPU of 8 GB, or a CPU
# time: minutes on a GPU, much longer on a CPU
# python finetune_cls.py config/imdb_rsvd16.py          (first: python data/imdb/prepare.py)
out_dir = 'out/imdb_rsvd16'
task = 'imdb'
method = 'rsvd'
rank = 16
interval = 500
scale, rotate = 1.0, False     # as in the reference: the update is not scaled, the moments keep their values

max_len = 128                  # as in the reference: 128 texts per step, a constant rate, 10 epochs
batch_size = 128
micro_batch_size = 32
epochs = 10.0
learning_rate = 2e-4
schedule = 'constant'
