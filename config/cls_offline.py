# Classify functions of the Python standard library by package, without any download: a small DistilBERT from random weights, a
# WordPiece vocabulary trained on the texts, Adam in 16 dimensions.
# expected accuracy: about 80%; it depends on the Python version, whose sources are the texts
# hardware: a laptop
# time: 1 to 2 minutes
# python finetune_cls.py config/cls_offline.py          (first: python data/pycls/prepare.py)
out_dir = 'out/cls_offline'
task = 'pycls'
init_from = 'scratch'
n_layer = 2
n_head = 4
n_embd = 128
vocab_size = 8192

method = 'rsvd'
rank = 16
interval = 20

max_len = 64
batch_size = 32
epochs = 10.0
learning_rate = 1e-3
warmup_iters = 50
