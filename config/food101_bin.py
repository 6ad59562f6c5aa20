# Food-101, every layer binary but for the 1x1 skips.
# expected top-1: 68.6% for the paper's plain network of twice the width (arXiv 2509.07025, table 2; not measured here)
# hardware: a GPU; not measured here. A BatchNorm sees the images of one micro-batch: 32 with 8 GPUs, 256 with one
# time: not measured here
# torchrun --nproc_per_node=8 train_cnn.py config/food101_bin.py      (after python data/food101/prepare.py)
out_dir = 'out/food101_bin'
model_name = 'bin'
dataset = 'food101'            # 101,000 photographs of 256 pixels, 20 GB
image_size = 224
crop_scale = (0.25, 1.0)
flip = True
eval_crop = 0.875              # 224 of 256 pixels

filter_dimension = 5           # the reference's
model_config = dict(
    conv1='binary', conv2='binary', conv3='binary', conv4='binary', conv5='binary', conv6='binary', conv7='binary',
    conv8='binary', conv9='binary', conv10='binary', fc1='binary', fc2='binary', final='binary')

batch_size = 256
eval_batch_size = 512
num_workers = 8
epochs = 200.0                 # the reference: 1,000 at 64 images and 1e-4
learning_rate = 2e-3
warmup_iters = 1500
dtype = 'bfloat16'
