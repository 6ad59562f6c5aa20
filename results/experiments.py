"""
What runs.py runs: a script with a config, and what each variant changes. Data only, in the order of the tables.
"""
import collections

import keep


def chosen_blocks():
    """The option with the blocks that `ptq.py choose` took in results/ptq_sensitivity.jsonl; None before that run."""
    taken = sorted(int(r['taken'].rpartition('.')[2]) for r in keep.read('ptq_sensitivity') if 'taken' in r)
    return f'--binary_blocks={",".join(map(str, taken))}' if taken else None


LOW = '--n_binary=4 --qkv_proj={0} --c_proj={0} --mlp_proj={0}'
BIN, TERN = LOW.format('bin'), LOW.format('tern') + ' --output_gains=True'
TWIN = '--{}=out/quality/fp_s{{seed}}/best.pt'.format     # {seed}: of the same seed, which must be trained first
TAUGHT = f" {TWIN('init_from')} {TWIN('teacher')}"
PLAIN = ' --ramp=0.0 --ternary_std=0.0'
RATE = " --lr_scale={{'{}':{}}}".format                        # of one kind of parameters, × the learning rate
TERN4 = TERN + RATE('tern', 4.0)
Experiment = collections.namedtuple('Experiment', 'script config baseline seeds variants')  # variant: (label, what it changes)
# An option None: made by trial code that is gone.
EXPERIMENTS = {
    'quality': Experiment('train_gpt.py', 'config/wikitext2.py', 'fp', '1,2,3', {
        'fp': ('full precision', ''),
        'fp_more': ('... trained on for as many steps again', TWIN('init_from')),
        'fp_4': ('... learning rate 4e-3 instead of 8e-3', '--learning_rate=4e-3'),
        'fp_16': ('... learning rate 1.6e-2', '--learning_rate=1.6e-2'),
        'fp_adamw': ('... AdamW instead of Muon, 4e-3', '--optimizer=adamw --learning_rate=4e-3'),
        'fp_rsvd': ('... rSVD, rank 16, 8e-3', '--optimizer=rsvd'),
        'fp_rsvd_2': ('... rSVD, rank 16, 2e-3', '--optimizer=rsvd --learning_rate=2e-3'),
        'fp_rsvd_10': ('... rSVD, rank 16, 8e-3, a basis every 10 steps instead of 200', '--optimizer=rsvd --interval=10'),
        'fp_qk': ('... q and k normalized, with a gain for each head', None),
        # what python ptq.py choose --ckpt=out/quality/fp_s1 --bits=17 takes
        'half': ('2 of 4 blocks binary: 2 and 3', '--binary_blocks=2,3'),
        'half_plain': ('... rounded from the start', '--binary_blocks=2,3' + PLAIN),
        'half_taught': ('2 of 4 blocks binary, trained on from full precision, its teacher',
                        '--binary_blocks=2,3' + TAUGHT + RATE('alpha', 1.0) + PLAIN),
        'half_taught_slow': ('... latent weights at half the rate',
                             "--binary_blocks=2,3 --lr_scale={'bin':0.5,'alpha':1.0}" + TAUGHT + PLAIN),
        'bin': ('all binary', BIN),
        'bin_kd': ('... with full precision as teacher', f"{BIN} {TWIN('teacher')}"),
        'bin_16': ('... learning rate 1.6e-2', BIN + ' --learning_rate=1.6e-2'),
        'bin_plain': ('... rounded from the start', BIN + PLAIN),
        'bin_wd0': ('... no weight decay, a ramp over 75 %', BIN + ' --weight_decay=0.0 --ramp=0.75'),
        'bin_ramp75': ('... a ramp over 75 % of the steps instead of 85 %', BIN + ' --ramp=0.75'),
        'bin_ramp90': ('... over 90 %', BIN + ' --ramp=0.9'),
        'bin_full': ('... latent weights never rounded', None),
        'bin_gain': ('... a learned factor for each output', None),
        'bin_release': ('... scales at the rate of all others from step 300, outputs of branches at 0.3 times it', None),
        'bin_taught': ('all binary, trained on from full precision, its teacher', BIN + TAUGHT + RATE('alpha', 1.0) + PLAIN),
        'bin_taught_ramp': ('... with a ramp over 85 % of the steps', BIN + TAUGHT + RATE('alpha', 1.0)),
        'tern': ('all ternary', TERN),
        'tern_kd': ('... with full precision as teacher', f"{TERN} {TWIN('teacher')}"),
        'tern_16': ('... learning rate 1.6e-2', TERN + ' --learning_rate=1.6e-2'),
        'tern_wide': ('... 160 wide instead of 128', TERN + ' --n_embd=160'),
        'tern_plain': ('... rounded from the start, at 2 x the rate, from 1/sqrt(inputs)',
                       TERN + RATE('tern', 2.0) + PLAIN),
        'tern_small': ('... rounded from the start, from the same initial weights', TERN + ' --ramp=0.0'),
        'tern_large': ('... a ramp over 75 % of the steps, from 1/sqrt(inputs)', TERN + ' --ramp=0.75 --ternary_std=0.0'),
        'tern_qk': ('... q and k normalized, with a gain for each head', None),
        'tern_group': ('... one scale for 128 weights', None),
        'tern_signs': ('... one scale for 1 and one for -1', None),
        'tern_tequila': ('... latent weights that round to 0 in the bias, as in Tequila', None),
        'tern_taught': ('all ternary, trained on from full precision, its teacher', TERN + TAUGHT + RATE('tern', 0.5) + PLAIN),
        'tern_taught_ramp': ('... with a ramp over 85 % of the steps', TERN + TAUGHT + RATE('tern', 0.5)),
        'int4': ('all 4-bit', LOW.format('int4')),
    }),
    # four times the steps: 22 tokens per parameter
    'long': Experiment('train_gpt.py', 'config/wikitext2.py --max_iters=10000 --eval_interval=2500', 'fp', '1,2,3', {
        'fp': ('full precision', ''),
        'half': ('2 of 4 blocks binary: 2 and 3', '--binary_blocks=2,3'),
        'bin': ('all binary', BIN),
        'tern': ('all ternary', TERN),
    }),
    # A quarter of the steps, without a ramp.
    'search': Experiment('train_gpt.py', 'config/wikitext2.py --learning_rate=4e-3 --max_iters=625 --eval_interval=625'
                         + PLAIN, 'fp', '1', {
        'fp': ('full precision', ''),
        'fp_2': ('... learning rate 2e-3 instead of 4e-3', '--learning_rate=2e-3'),
        'fp_8': ('... 8e-3', '--learning_rate=8e-3'),
        'fp_16': ('... 1.6e-2', '--learning_rate=1.6e-2'),
        'fp_32': ('... 3.2e-2', '--learning_rate=3.2e-2'),
        'fp_cosine': ('... cosine to a tenth instead of linear to 0', '--schedule=cosine --min_lr=4e-4'),
        'fp_decay': ('... no weight decay', '--weight_decay=0'),
        'fp_adamw': ('... AdamW, 4e-3', '--optimizer=adamw'),
        'fp_adamw_8': ('... AdamW, 8e-3', '--optimizer=adamw --learning_rate=8e-3'),
        'fp_adamw_2': ('... AdamW, 2e-3', '--optimizer=adamw --learning_rate=2e-3'),
        'tern': ('all ternary, latent weights at 4 x the rate', TERN4),
        'tern_8e3': ('... at 4 x, learning rate 8e-3', TERN4 + ' --learning_rate=8e-3'),
        'tern_8e3_2': ('... at 2 x, learning rate 8e-3', TERN + RATE('tern', 2.0) + ' --learning_rate=8e-3'),
        'tern_1': ('... at the rate', TERN + RATE('tern', 1.0)),
        'tern_2': ('... at 2 x', TERN + RATE('tern', 2.0)),
        'tern_8': ('... at 8 x', TERN + RATE('tern', 8.0)),
        'tern_plain': ('... at 4 x, no learned factor for each output', LOW.format('tern') + RATE('tern', 4.0)),
        'tern_late': ('... full precision until 70 % of the steps', None),
        'tern_kd': ('... a teacher, from random weights', TERN4 + f" {TWIN('teacher')}"),
        'tern_kd50': ('... a teacher for half of the targets, from random weights',
                      TERN4 + f" {TWIN('teacher')} --distill=0.5"),
        'tern_init': ('... trained on from 2,500 steps of full precision at half the rate, no teacher',
                      TERN + RATE('tern', 0.5) + f" {TWIN('init_from')}"),
        'tern_taught': ('... trained on from 2,500 steps of full precision, with it as teacher', TERN4 + TAUGHT),
        'tern_taught_1': ('... the same, latent weights at the rate', TERN + TAUGHT + RATE('tern', 1.0)),
        'tern_taught_half': ('... the same, at half the rate', TERN + TAUGHT + RATE('tern', 0.5)),
        'tern_taught_2': ('... the same, all at half the rate',
                          TERN + TAUGHT + RATE('tern', 1.0) + ' --learning_rate=2e-3'),
        'tern_taught_8e3': ('... the same, at half the rate, learning rate 8e-3',
                            TERN + TAUGHT + RATE('tern', 0.5) + ' --learning_rate=8e-3'),
        'bin': ('all binary', BIN),
        'bin_8e3': ('... learning rate 8e-3', BIN + ' --learning_rate=8e-3'),
        'bin_4': ('... latent weights at 4 x the rate', BIN + RATE('bin', 4.0)),
        'bin_scales': ('... scales at the rate of all others', BIN + RATE('alpha', 1.0)),
        'bin_kd': ('... a teacher, from random weights', f"{BIN} {TWIN('teacher')}"),
        'bin_taught': ('... trained on from 2,500 steps of full precision, with it as teacher', BIN + TAUGHT),
        'bin_taught_half': ('... the same, latent weights at half the rate', BIN + TAUGHT + RATE('bin', 0.5)),
        'bin_taught_scales': ('... the same, scales at the rate of all others', BIN + TAUGHT + RATE('alpha', 1.0)),
        'bin_taught_8e3': ('... the same, learning rate 8e-3',
                           BIN + TAUGHT + RATE('alpha', 1.0) + ' --learning_rate=8e-3'),
        'half': ('blocks 1 and 2 of 0 to 3 binary', '--binary_blocks=1,2'),
        'half_first': ('... 0 and 1', '--binary_blocks=0,1'),
        'half_last': ('... 2 and 3', '--binary_blocks=2,3'),
        'half_scales': ('... 1 and 2, scales at the rate of all others',
                        '--binary_blocks=1,2' + RATE('alpha', 1.0)),
    }),
    # Random halves: random.Random(0).sample(range(6), 3), and of 1, each sorted.
    'blocks': Experiment('train_gpt.py', 'config/wikitext2_blocks.py', 'first', '1,2,3', {
        'chosen': ('the half chosen by ptq.py', chosen_blocks()),
        'first': ('the first half', '--binary_blocks=0,1,2'),
        'last': ('the last half', '--binary_blocks=3,4,5'),
        'random_a': ('a random half: 0, 3, 5', '--binary_blocks=0,3,5'),
        'random_b': ('another random half: 0, 1, 4', '--binary_blocks=0,1,4'),
        'fp': ('no block: full precision', ''),
    }),
    'depth': Experiment('train_gpt.py', 'config/pycode_bin12.py', 'fp', '1', {
        'fp': ('12 blocks, full precision', '--n_binary=0'),
        'bin12': ('12 of 12 binary', ''),
        'bin12_alpha25': ('... and every scale starting at 0.25, as the reference',
                          "--lr_scale={'bin':1.0,'alpha':1.0} --binary_alpha=0.25 --binary_alpha_out=0.25"),
        'bin12_fast': ('... latent weights and scales at the full rate', "--lr_scale={'bin':1.0,'alpha':1.0}"),
        'bin12_lr4': ('... 4 x the learning rate', '--learning_rate=1.6e-2 --min_lr=1.6e-3'),
    }),
}
AS_BEFORE = '--scale=1 --interval=50 --rotate=False'    # GaLore without its factor
# first: python data/sst2/prepare.py --held
EXPERIMENTS |= {
    'sst2': Experiment('finetune_cls.py', 'config/sst2_scratch.py', 'full', '1,2,3,4,5,6', {
        'full': ('AdamW, all weights', ''),
        'rsvd64': ('rSVD, rank 64', '--method=rsvd --rank=64'),
        'rsvd16': ('rSVD, rank 16', '--method=rsvd'),
        'rsvd4': ('rSVD, rank 4', '--method=rsvd --rank=4'),
        'rsvd4_before': ('... updates not scaled, moments not rotated, a basis every 50 steps',
                         f'--method=rsvd --rank=4 {AS_BEFORE}'),
        'rsvd6_columns': ('rSVD, rank 6, one second moment per column', '--method=rsvd --rank=6 --column_v=True'),
        'rsvd6_columns_8bit': ('... 8-bit moments', '--method=rsvd --rank=6 --column_v=True --state_dtype=8bit'),
        'rsvd_svt': ('rSVD, 90% of the energy, rank 4 to 64', '--method=rsvd_svt --energy=0.9 --rank=64'),
        'lora': ('LoRA, rank 16', '--method=lora'),
        'lora_topr': ('LoRA, rank 16, largest tenth of the gradient', '--method=lora_topr'),
        'qlora': ('QLoRA, rank 16, nf4', '--method=qlora'),
        'wr16': ('weight reduction, rank 16', '--method=weight_reduction'),
        'wr_svt16': ('... cut to 8', '--method=weight_reduction_svt'),
    }),
    # Half of the steps. The variants with None used trial versions of optim.py, the others its code with other defaults.
    'sst2_search': Experiment('finetune_cls.py', 'config/sst2_scratch.py --max_iters=480', 'full_10', '1', {
        'full_10': ('AdamW, all weights, 1e-3', ''),
        'full_5': ('... 5e-4', '--learning_rate=5e-4'),
        'full_20': ('... 2e-3', '--learning_rate=2e-3'),
        'full_10_cos': ('... 1e-3, cosine', '--schedule=cosine'),
        'full_10_wd': ('... 1e-3, weight decay 0.1', '--weight_decay=0.1'),
        'rsvd4_10': ('rSVD, rank 4, 1e-3, updates not scaled, moments not rotated, a basis every 50 steps',
                     f'--method=rsvd --rank=4 {AS_BEFORE}'),
        'rsvd4_10_s4': ('... updates x 4', '--method=rsvd --rank=4 --scale=4 --interval=50 --rotate=False'),
        'rsvd4_10_auto': ('... updates x sqrt(m / r)', '--method=rsvd --rank=4 --interval=50 --rotate=False'),
        'rsvd4_10_int10': ('... and a basis every 10 steps', '--method=rsvd --rank=4 --rotate=False'),
        'rsvd4_10_rot50': ('... every 50 steps, moments rotated, V = 0 in new directions', None),
        'rsvd4_10_rot_auto': ('... every 10 steps', None),
        'rsvd4_5_rot': ('... 5e-4', None),
        'rsvd4_20_rot': ('... 2e-3', None),
        'b99_10': ('... 1e-3, beta2 = 0.99', None),
        'fill4_10': ('rSVD, rank 4, 1e-3, scaled, rotated, every 10 steps, V = mean(V) there', '--method=rsvd --rank=4'),
        'fill4_20': ('... 2e-3', '--method=rsvd --rank=4 --learning_rate=2e-3'),
        'col4_auto': ('rSVD, rank 4, 1e-3, one second moment per column', '--method=rsvd --rank=4 --column_v=True'),
        'col6_auto': ('rSVD, rank 6, 1e-3, one second moment per column', '--method=rsvd --rank=6 --column_v=True'),
        'col6_20': ('... 2e-3', '--method=rsvd --rank=6 --column_v=True --learning_rate=2e-3'),
        'left16': ('rSVD, rank 16, 1e-3, basis on the left', '--method=rsvd --side=left'),
        'left16_before': ('... updates not scaled, moments not rotated, a basis every 50 steps',
                          f'--method=rsvd --side=left {AS_BEFORE}'),
        'left16_adam': ('rSVD, rank 16, 1e-3, basis on the left, embeddings by AdamW',
                        '--method=rsvd --side=left --adam_for=head,embeddings'),
        'sumo6_s1': ('SUMO, rank 6, 1e-3; embeddings by rSVD, rank 4', None),
        'sumo6_s3': ('... orthogonal updates x 3', None),
        'apollo4': ('APOLLO, rank 4, 1e-3, with full gradients', None),
        'fira4': ('Fira, rank 4, 1e-3, with full gradients, updates not scaled', None),
        'fira4_auto': ('... updates x sqrt(m / r)', None),
    }),
}
# first: python results/runs.py quality --only=fp --seeds=1
#        python export.py --ckpt=out/quality/fp_s1/best.pt --to=hf --out=out/wikitext2_hf
LORA = "--method=lora --targets=('c_attn','c_proj','c_fc') --learning_rate="
EXPERIMENTS |= {
    'sst2_base': Experiment('finetune_cls.py', 'config/sst2_scratch.py --init_from=pretrained --model=out/wikitext2_hf '
                            '--max_iters=480 --max_len=128', 'full', '1,2,3', {
        'full': ('AdamW, all weights, 1e-3', ''),
        'full_5': ('... 5e-4', '--learning_rate=5e-4'),
        'full_20': ('... 2e-3', '--learning_rate=2e-3'),
        'lora_2': ('LoRA, rank 16, all linear layers, 2e-3', LORA + '2e-3'),
        'lora_1': ('... 1e-3', LORA + '1e-3'),
        'lora_5': ('... 5e-3', LORA + '5e-3'),
        'lora': ('... 1e-2', LORA + '1e-2'),
        'lora_attention': ('LoRA, rank 16, attention alone, 2e-3',
                           "--method=lora --targets=('c_attn',) --learning_rate=2e-3"),
        'rsvd6_columns': ('rSVD, rank 6, one second moment per column, 1e-3', '--method=rsvd --rank=6 --column_v=True'),
    }),
}
CNN_LAYERS = [*(f'conv{i}' for i in range(1, 11)), 'fc1', 'fc2', 'final']
REAL = '--model_config={' + ','.join(f"'{layer}':'real'" for layer in CNN_LAYERS) + '}'
BINARY = REAL.replace('real', 'binary')
ENDS_REAL = BINARY.replace("'conv1':'binary'", "'conv1':'real'").replace("'final':'binary'", "'final':'real'")
ADAMW_CNN = " --optimizer=adamw --lr_scale={'bin':1.0}"
RAMP = ' --ramp=0.85'
NETS = {'real': ('all real', REAL),
        'mixed70': ('conv8, conv9, conv10 binary', ''),
        'mixed70_ramp': ('... a ramp over 85 % of the steps', RAMP),
        'bin': ('all binary', BINARY),
        'bin_ramp': ('... a ramp over 85 % of the steps', BINARY + RAMP)}
TEACHER, START = (f' --{key}=out/cifar10/real_s{{seed}}/best.pt' for key in ('teacher', 'init_from'))
# first: python data/images/prepare.py --dir ... --name=food10 --size=80; cifar10: --size=32, a folder with train/ and test/
EXPERIMENTS |= {
    'food10': Experiment('train_cnn.py', 'config/images_mixed.py --dataset=images/food10', 'real', '1,2,3,4,5', NETS),
    # CIFAR-10 as a folder of class folders: 10,000 test images
    'cifar10': Experiment('train_cnn.py', 'config/images_mixed.py --dataset=images/cifar10 --image_size=32 --eval_crop=1.0 '
                          '--epochs=2', 'real', '1,2,3', NETS | {
        'bin_ends': ('all binary but conv1 and final, a ramp', ENDS_REAL + RAMP),
        'real_taught': ('all real, the real network as teacher', REAL + TEACHER),
        'mixed70_taught': ('conv8, conv9, conv10 binary, the real network as teacher', TEACHER),
        'bin_taught': ('all binary, a ramp, the real network as teacher', BINARY + RAMP + TEACHER),
        'real_more': ('all real, trained on from the real network', REAL + START),
        'bin_from': ('all binary, trained on from the real network, a ramp', BINARY + RAMP + START)}),
    # A third of the steps.
    'food10_search': Experiment('train_cnn.py', 'config/images_mixed.py --dataset=images/food10 --epochs=10', 'real_3', '1', {
        'real': ('all real, learning rate 1e-3', REAL + ' --learning_rate=1e-3'),
        'real_3': ('... 3e-3', REAL),
        'real_10': ('... 1e-2', REAL + ' --learning_rate=1e-2'),
        'real_adamw': ('... AdamW, 1e-3', REAL + ADAMW_CNN + ' --learning_rate=1e-3'),
        'real_adamw_3': ('... AdamW, 3e-3', REAL + ADAMW_CNN),
        'mixed70': ('conv8, conv9, conv10 binary, 1e-3, latent weights at 5 x the rate',
                    RATE('bin', 5.0) + ' --learning_rate=1e-3'),
        'mixed70_lr3_2': ('... 3e-3, at 2 x', ''),
        'mixed70_lr3': ('... 3e-3, at the rate', RATE('bin', 1.0)),
        'bin': ('all binary, a BatchNorm after each layer, 1e-3, latent weights at 5 x the rate',
                BINARY + RATE('bin', 5.0) + ' --learning_rate=1e-3'),
        'bin_lr3': ('... 3e-3, latent weights at the rate', BINARY + RATE('bin', 1.0)),
        'bin_lr3_2': ('... 3e-3, latent weights at 2 x', BINARY),
        'bin_lr3_5': ('... 3e-3, latent weights at 5 x', BINARY + RATE('bin', 5.0)),
        'bin_channel': ("... 3e-3, at 2 x, the layers' own normalization, over channels", BINARY + ' --norm=channel'),
        'bin_channel_adamw': ('... the same, AdamW, 1e-3, at the rate',
                              BINARY + ADAMW_CNN + ' --norm=channel --learning_rate=1e-3'),
    }),
}
# Both twins have one peak rate. The ternary one always has the second stage; LLaMA baselines have none.
TWINS = {'tern': ('ternary', ''),
         'fp_two': ('full precision, the same rates', '--quant=fp --second_lr=1.3333e-3'),
         'fp': ('full precision, without the second stage', '--quant=fp')}
# first: python data/<name>/prepare.py, tinystories with --file where there is no network
EXPERIMENTS |= {
    'arithmetic': Experiment('train_bitnet.py', 'config/arithmetic.py', 'fp_two', '1337', TWINS),
    'tictactoe': Experiment('train_bitnet.py', 'config/tictactoe.py', 'fp_two', '1337', TWINS),
    'tinystories': Experiment('train_bitnet.py', 'config/tinystories_small.py', 'fp', '1,2,3', {
        'fp': ('full precision', '--quant=fp --learning_rate=4e-3'),
        'fp_2': ('... learning rate 2e-3 instead of 4e-3', '--quant=fp --learning_rate=2e-3'),
        'fp_8': ('... 8e-3', '--quant=fp'),
        'fp_small': ('... 2e-3, from a deviation of 0.02 instead of 1/sqrt(inputs)', None),
        'tern': ('ternary', ''),
        'tern_16e3': ('... learning rate 1.6e-2 instead of 8e-3', '--learning_rate=1.6e-2'),
        'tern_4e3': ('... 4e-3', '--learning_rate=4e-3'),
        'tern_4e3_2': ('... 4e-3, latent weights at 2 x the rate', '--learning_rate=4e-3' + RATE('tern', 2.0)),
        'tern_2e3': ('... 2e-3', '--learning_rate=2e-3'),
        'tern_2e3_2': ('... 2e-3, latent weights at 2 x the rate', '--learning_rate=2e-3' + RATE('tern', 2.0)),
        'tern_2e3_4': ('... 2e-3, latent weights at 4 x the rate', '--learning_rate=2e-3' + RATE('tern', 4.0)),
        'tern_2e3_small': ('... 2e-3, from a deviation of 0.02 instead of 1/sqrt(inputs)', None),
        'tern_plain': ('... 2e-3, at 4 x, rounded from the start', '--learning_rate=2e-3 --ramp=0.0' + RATE('tern', 4.0)),
    }),
}
BY_STEP = ('search',)                            # losses along the run, also of runs that were stopped early
