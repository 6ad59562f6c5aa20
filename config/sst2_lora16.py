# Fine-tune DistilBERT on SST-2 by LoRA of rank 16 on the query, key and value projections.
# expected: not measured here; the reference has evaluation loss 0.394 and training loss 0.113 after 10 epochs
# hardware: one GPU of 8 GB, or a CPU
# time: minutes on a GPU, much longer on a CPU
# python finetune_cls.py config/sst2_lora16.py          (first: python data/sst2/prepare.py)
out_dir = 'out/sst2_lora16'
task = 'sst2'
method = 'lora'
rank = 16                      # lora_alpha = rank and lora_dropout 0.1, as in the reference

max_len = 128                  # as in the reference: 128 texts per step, a constant rate, 10 epochs
batch_size = 128
micro_batch_size = 32
epochs = 10.0
learning_rate = 2e-4
schedule = 'constant'
