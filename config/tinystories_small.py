# Train a 3.7M-parameter BitNet b1.58 on a sample of TinyStories; its full-precision baseline on the same tokens has its own
# learning rate: --quant=fp --learning_rate=4e-3
# data of the stored runs: 3,117 stories, 2.5 MB; 650,193 training tokens and 33,657 validation tokens
# expected val loss: see results/tinystories.md
# hardware: 2 CPU cores with AVX512-BF16, one run on each, and a C++ compiler; without: --dtype=float32 --compile=False
# time: 1,000 times the ms/step of results/tinystories.md
# python train_bitnet.py config/tinystories_small.py   (first: python data/tinystories/prepare.py --file stories.txt)
out_dir = 'out/tinystories_small'
dataset = 'tinystories'
vocab_size = 2048

batch_size = 16                # x 128 = 2,048 tokens per step
block_size = 128

n_layer, n_head, n_kv_head = 4, 4, 2
n_embd, n_ff = 256, 768        # multiples of 256 fit the blocks of GGUF's ternary types

max_iters = 1000
optimizer = 'muon'
learning_rate = 8e-3           # see results/tinystories.md
ramp = 0.85
schedule = 'linear'
warmup_iters = 100

eval_interval = 250
eval_iters = 40
save_interval = 500

dtype = 'bfloat16'
compile = True
