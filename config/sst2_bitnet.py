# Fine-tune BitNet b1.58 2B on 1,000 sentences of SST-2. Each pass rounds the weights to ternary; a head reads the last token.
# expected accuracy: not measured here; the reference's 92% is illustrative, because its code cannot have run
# hardware: one GPU of 80 GB, or of 16 GB with --method=lora: adapters over packed ternary weights
# time: minutes on a GPU
# python finetune_cls.py config/sst2_bitnet.py          (first: python data/sst2/prepare.py)
out_dir = 'out/sst2_bitnet'
task = 'sst2'
model = 'microsoft/bitnet-b1.58-2B-4T-bf16'
method = 'full'
dtype = 'bfloat16'

train_samples = 1000
batch_size = 8
epochs = 3.0
learning_rate = 2e-4           # ten times that of a full-precision model, as BitNet's authors advise
warmup_iters = 20
gradient_checkpointing = True
