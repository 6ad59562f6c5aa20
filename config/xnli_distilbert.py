# Multilingual DistilBERT trained on English MultiNLI, tested in six languages that it saw no labels of but English.
# expected accuracy (published, DistilBERT's authors): en 78.2, es 69.1, zh 64.0, de 66.3, ar 59.1, ur 54.7; not measured here
# hardware: one GPU of 12 GB
# time: an hour or two on a GPU
# torchrun --nproc_per_node=8 finetune_cls.py config/xnli_distilbert.py     (after python data/xnli/prepare.py; or python)
out_dir = 'out/xnli_distilbert'
task = 'xnli'
method = 'full'
languages = ('en', 'es', 'zh', 'de', 'ar', 'ur')
eval_split = 'test'

batch_size = 32
epochs = 3.0
learning_rate = 2e-5
schedule = 'linear'
warmup_iters = 1000
