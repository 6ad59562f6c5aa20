# DistilBERT on SST-2, LoRA of rank 16 on queries, keys and values.
# expected: reference's evaluation loss 0.394 after 10 epochs, its training loss 0.113; not measured here
# hardware: one GPU of 8 GB, or a CPU with patience
# time: minutes on a GPU
# python finetune_cls.py config/sst2_lora16.py          (after python data/sst2/prepare.py)
out_dir = 'out/sst2_lora16'
task = 'sst2'
method = 'lora'
rank = 16                      # lora_alpha = rank and dropout 0.1 as in the reference

max_len = 128                  # the reference's: 128 texts a step, constant rate, 10 epochs
batch_size = 128
micro_batch_size = 32
epochs = 10.0
learning_rate = 2e-4
schedule = 'constant'
