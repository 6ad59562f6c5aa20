# Train a CNN on your own images: a folder with one folder per class, or a zip of it. conv8, conv9 and conv10 are binary, the
# others real. First: python data/images/prepare.py --dir PATH --name=mine --size=80
# expected top-1: depends on the images; results/food10.md has it for ten classes of Food-101
# hardware: 2 CPU cores
# time: 8 minutes for 3,750 images
# python train_cnn.py config/images_mixed.py --dataset=images/mine
out_dir = 'out/images_mixed'
dataset = 'images/mine'        # data/images/prepare.py --dir ... --name=mine
image_size = 48
flip = True
eval_crop = 0.9
dtype = 'bfloat16'

model_config = dict(conv8='binary', conv9='binary', conv10='binary')
norm = 'batch'
optimizer = 'muon'
learning_rate = 3e-3           # see results/food10_search.md
lr_scale = dict(bin=2.0)
