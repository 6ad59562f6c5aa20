# DistilBERT on SST-2, LoRA of rank 16 by AdamW on the largest tenth of each gradient.
# expected: not measured here
# hardware: one GPU of 8 GB, or a CPU with patience
# time: minutes on a GPU
# python finetune_cls.py config/sst2_lora_topr.py          (after python data/sst2/prepare.py)
out_dir = 'out/sst2_lora_topr'
task = 'sst2'
method = 'lora_topr'
rank = 16
top_fraction = 0.1              # the reference also has 0.3 and 0.5

max_len = 128                  # the reference's: 128 texts a step, constant rate, 10 epochs
batch_size = 128
micro_batch_size = 32
epochs = 10.0
learning_rate = 2e-4
schedule = 'constant'
