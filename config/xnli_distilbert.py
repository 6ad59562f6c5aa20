# Fine-tune multilingual DistilBERT on English MultiNLI and test it in six languages, five of them without training labels.
# expected accuracy (by DistilBERT's authors): en 78.2, es 69.1, zh 64.0, de 66.3, ar 59.1, ur 54.7; not measured here
# hardware: one GPU of 12 GB with python instead of torchrun, or several
# time: an hour or two on a GPU
# torchrun --nproc_per_node=8 finetune_cls.py config/xnli_distilbert.py     (first: python data/xnli/prepare.py)
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
