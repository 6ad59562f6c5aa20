# ptq.py choose: blocks (1, 2, 4) of 6 of out/wikitext2_bpe/best.pt cost least as bin, 16.50 bits a weight
# python train_gpt.py out/wikitext2_bpe/config.py results/ptq/chosen.py --out_dir=out/chosen
n_binary = 0
binary_blocks = (1, 2, 4)
qkv_proj = 'bin'
c_proj = 'bin'
mlp_proj = 'bin'
