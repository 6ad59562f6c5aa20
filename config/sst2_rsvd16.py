# Fine-tune all weights of DistilBERT on SST-2 by Adam in 16 dimensions with the projected backward pass.
# expected: not measured here; the reference has evaluation loss 0.325 and training loss 0.073 after 10 epochs
# hardware: one GPU of 8 GB, or a CPU
# time: minutes on a GPU, much longer on a CPU
# python finetune_cls.py config/sst2_rsvd16.py          (first: python data/sst2/prepare.py)
out_dir = 'out/sst2_rsvd16'
task = 'sst2'
method = 'rsvd'
rank = 16                      # --ranks=4,8,16,64,128 for the sweep, --side=left for the reference's scheme
interval = 500
scale, rotate = 1.0, False     # as in the reference: the update is not scaled, the moments keep their values

max_len = 128                  # as in the reference: 128 texts per step, a constant rate, 10 epochs
batch_size = 128
micro_batch_size = 32
epochs = 10.0
learning_rate = 2e-4
schedule = 'constant'
