# Fine-tune GPT-Neo 2.7B on 10,000 pairs of MultiNLI by LoRA over frozen int8 weights and test it in English and Spanish.
# expected accuracy: none published; not measured here
# hardware: one GPU of 12 GB
# time: an hour on a GPU
# python finetune_cls.py config/xnli_gptneo_8bit.py          (first: python data/xnli/prepare.py)
out_dir = 'out/xnli_gptneo_8bit'
task = 'xnli'
model = 'EleutherAI/gpt-neo-2.7B'
method = 'lora'
rank = 16
quant8 = True
dtype = 'float16'
languages = ('en', 'es')
eval_split = 'test'

train_samples = 10_000
batch_size = 16
micro_batch_size = 4
epochs = 2.0
learning_rate = 2e-4
gradient_checkpointing = True
