# What results/runs.py sst2_adapt runs: methods from a small model that AdamW has trained on 20,000 of SST-2's sentences.
# python finetune_cls.py config/sst2_scratch.py --train_samples=20000 --seed=9 --out_dir=out/sst2_base     makes that model
# expected accuracy: in results/sst2_adapt.md
# hardware: 2 cores, one run on each
# time: 2 to 5 minutes a run on one core
# python finetune_cls.py config/sst2_adapt.py --method=lora --learning_rate=1e-3
out_dir = 'out/sst2_adapt'
task = 'sst2'
model = 'out/sst2_base/distilbert-scratch-sst2-full'

method = 'full'
learning_rate = 5e-4           # 1e-3 for what has fewer dimensions
warmup_iters = 100
max_len = 48
batch_size = 64
epochs = 1.0                   # 1,053 steps
interval = 50
