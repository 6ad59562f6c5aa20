# BitNet b1.58 2B on 1,000 sentences of SST-2: ternary weights rounded anew in each pass, a head on the last token.
# expected accuracy: the reference's 92% is illustrative, its code cannot have run; not measured here
# hardware: one GPU of 80 GB; --method=lora trains adapters over the packed ternary weights on one of 16 GB
# time: minutes on a GPU
# python finetune_cls.py config/sst2_bitnet.py          (after python data/sst2/prepare.py)
out_dir = 'out/sst2_bitnet'
task = 'sst2'
model = 'microsoft/bitnet-b1.58-2B-4T-bf16'
method = 'full'
dtype = 'bfloat16'

train_samples = 1000
batch_size = 8
epochs = 3.0
learning_rate = 2e-4           # ten times a full-precision model's, as its authors advise
warmup_iters = 20
gradient_checkpointing = True
