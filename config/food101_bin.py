# Train a CNN on Food-101 with every layer binary except the 1x1 skips.
# expected top-1: not measured here; 68.6% for the paper's plain network, twice as wide (arXiv 2509.07025, table 2)
# hardware: 1 to 8 GPUs; not measured here. A BatchNorm sees one micro-batch: 32 images on 8 GPUs, 256 on one
# time: not measured here
# torchrun --nproc_per_node=8 train_cnn.py config/food101_bin.py      (first: python data/food101/prepare.py)
out_dir = 'out/food101_bin'
model_name = 'bin'
dataset = 'food101'            # 101,000 photographs of 256 x 256 pixels, 20 GB
image_size = 224
crop_scale = (0.25, 1.0)
flip = True
eval_crop = 0.875              # 224 of 256 pixels

filter_dimension = 5           # as in the reference
model_config = dict(
    conv1='binary', conv2='binary', conv3='binary', conv4='binary', conv5='binary', conv6='binary', conv7='binary',
    conv8='binary', conv9='binary', conv10='binary', fc1='binary', fc2='binary', final='binary')

batch_size = 256
eval_batch_size = 512
num_workers = 8
epochs = 200.0                 # the reference has 1,000 epochs, 64 images per step, rate 1e-4
learning_rate = 2e-3
warmup_iters = 1500
dtype = 'bfloat16'
