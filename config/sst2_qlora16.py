# Fine-tune DistilBERT on SST-2 by QLoRA: LoRA of rank 16 over frozen 4-bit (nf4) linear layers.
# expected: not measured here; close to config/sst2_lora16.py
# hardware: one GPU of 8 GB, or a CPU
# time: minutes on a GPU, much longer on a CPU
# python finetune_cls.py config/sst2_qlora16.py          (first: python data/sst2/prepare.py)
out_dir = 'out/sst2_qlora16'
task = 'sst2'
method = 'qlora'
rank = 16

max_len = 128                  # as in the reference: 128 texts per step, a constant rate, 10 epochs
batch_size = 128
micro_batch_size = 32
epochs = 10.0
learning_rate = 2e-4
schedule = 'constant'
