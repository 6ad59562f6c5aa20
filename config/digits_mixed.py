# Train a CNN on scikit-learn's 1,797 handwritten digits of 8x8 pixels, enlarged to 16x16. The trainer makes the data set
# without a download. The reference's default layers are binary, the others real.
# expected top-1: 98% or more
# hardware: a laptop
# time: about a minute on 2 cores
# python train_cnn.py config/digits_mixed.py
out_dir = 'out/digits_mixed'
dataset = 'digits'
image_size = 16
crop_scale = (0.7, 1.0)

model_config = dict(conv1='binary', conv2='binary', fc1='binary', fc2='binary', final='binary')

batch_size = 32
epochs = 20.0
learning_rate = 2e-3
warmup_iters = 45
