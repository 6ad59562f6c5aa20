# Fine-tune DistilBERT on SST-2 by LoRA of rank 16; AdamW uses only the largest tenth of each gradient.
# expected: not measured here
# hardware: one GPU of 8 GB, or a CPU
# time: minutes on a GPU, much longer on a CPU
# python finetune_cls.py config/sst2_lora_topr.py          (first: python data/sst2/prepare.py)
out_dir = 'out/sst2_lora_topr'
task = 'sst2'
method = 'lora_topr'
rank = 16
top_fraction = 0.1             # the reference also uses 0.3 and 0.5

max_len = 128                  # as in the reference: 128 texts per step, a constant rate, 10 epochs
batch_size = 128
micro_batch_size = 32
epochs = 10.0
learning_rate = 2e-4
schedule = 'constant'
