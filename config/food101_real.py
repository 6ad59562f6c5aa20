# Train a CNN on Food-101 with every layer real: the baseline of food101_mixed.py and food101_bin.py, on the same batches.
# expected top-1: 74.0% (reference; not measured here)
# hardware: 1 to 8 GPUs; not measured here. A BatchNorm sees one micro-batch: 32 images on 8 GPUs, 256 on one
# time: not measured here
# torchrun --nproc_per_node=8 train_cnn.py config/food101_real.py      (first: python data/food101/prepare.py)
out_dir = 'out/food101_real'
model_name = 'real'
dataset = 'food101'            # 101,000 photographs of 256 x 256 pixels, 20 GB
image_size = 224
crop_scale = (0.25, 1.0)
flip = True
eval_crop = 0.875              # 224 of 256 pixels

filter_dimension = 5           # as in the reference

batch_size = 256
eval_batch_size = 512
num_workers = 8
epochs = 200.0                 # the reference has 1,000 epochs, 64 images per step, rate 1e-4
learning_rate = 2e-3
warmup_iters = 1500
dtype = 'bfloat16'
