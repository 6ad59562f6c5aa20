"""Models that people have: small random ones of many architectures through finetune_cls.py, peft and back."""
import csv
import json
import re
import shutil

import pytest
import torch
from torch.testing import assert_close

from pretrained import folders, hf
from test_hf import TEXTS, offline, small  # noqa: F401

SHAPE = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, max_position_embeddings=34)
DISENTANGLED = dict(relative_attention=True, pos_att_type=['c2p', 'p2c'])
T5 = dict(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, eos_token_id=3, decoder_start_token_id=0)
# name: class, more of its config, default LoRA targets of finetune_cls.py
MODELS = {
    'Bert': ('ForMaskedLM', {}, 'query key value'), 'Albert': ('ForMaskedLM', {'embedding_size': 16}, 'query key value'),
    'Roberta': ('ForMaskedLM', {}, 'query key value'), 'MPNet': ('ForMaskedLM', {}, 'q k v'),
    'Deberta': ('ForMaskedLM', DISENTANGLED, 'in_proj'),
    'DebertaV2': ('ForMaskedLM', DISENTANGLED, 'query_proj key_proj value_proj'),
    'ModernBert': ('ForMaskedLM', dict(bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3), 'Wqkv'),
    'GPT2': ('LMHeadModel', dict(n_embd=32, n_layer=1, n_head=2, n_positions=34, bos_token_id=2, eos_token_id=3), 'c_attn'),
    'T5': ('ForConditionalGeneration', T5, 'q k v')}
LABELS = ['no', 'yes']
every_model = pytest.mark.parametrize('name', MODELS)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """made(name) -> the folder of a pretrained model with random weights and a tokenizer of its own."""
    import transformers as t
    tokenizer, folders = small()[1], {}
    tokenizer.add_special_tokens({'eos_token': '[SEP]', 'bos_token': '[CLS]'})

    def make(name):
        if name not in folders:
            kind, more, _ = MODELS[name]
            torch.manual_seed(0)
            shape = {} if name in ('GPT2', 'T5') else SHAPE
            config = getattr(t, f'{name}Config')(vocab_size=len(tokenizer), pad_token_id=0, **shape, **more)
            folders[name] = tmp_path_factory.mktemp(name)
            getattr(t, f'{name}{kind}')(config).save_pretrained(folders[name])
            tokenizer.save_pretrained(folders[name])
        return folders[name]
    return make


@pytest.fixture(scope='module')
def table(tmp_path_factory):
    """A csv of texts and labels as pandas writes it, with an index without a name; one text is longer than any max_len here."""
    path = tmp_path_factory.mktemp('table') / 'train.csv'
    rows = [(text, LABELS[i % 2]) for i, (text,) in enumerate([*TEXTS, ('good ' * 60,)])]
    with open(path, 'w', newline='') as f:
        csv.writer(f).writerows([('', 'text', 'label'), *((i, *row) for i, row in enumerate(rows))])
    return path


@pytest.fixture(scope='module')
def tuned(made, table, in_turn, tmp_path_factory):
    """The out_dir of a LoRA run of each model, all trained in one process, and what each printed."""
    cwd = tmp_path_factory.mktemp('tuned')
    options = ('--task=csv', f'--train_file={table}', f'--eval_file={table}', '--text_columns=text', '--device=cpu',
               '--max_len=16', '--max_iters=2', '--batch_size=8', '--learning_rate=1e-2', '--method=lora', '--rank=4')
    lines = [('finetune_cls.py', cwd, [*options, f'--model={made(name)}', f'--out_dir={name}']) for name in MODELS]
    done = dict(zip(MODELS, in_turn(lines), strict=True))
    assert {name: one.code for name, one in done.items()} == dict.fromkeys(MODELS, 0), done
    return {name: (cwd / name, done[name].out) for name in MODELS}


def logits_of(net, tokenizer):
    with torch.no_grad():
        return net.eval()(**hf.collate(tokenizer, hf.encode(tokenizer, TEXTS[:3], 16), 16)).logits


@every_model
def test_every_architecture_is_tuned_by_default_targets(tuned, name):
    """Masked and other language models get a head, a new pooler included; adapters are on queries, keys and values."""
    out, printed = tuned[name]
    folder, = out.glob('*-lora-r4')
    config = json.loads((folder / 'adapter_config.json').read_text())
    assert {target.rpartition('.')[2] for target in config['target_modules']} == set(MODELS[name][2].split())
    assert 'accuracy' in printed and (out / 'results.yaml').exists()


@every_model
def test_peft_and_this_project_load_the_same_adapters(made, tuned, tmp_path, name):
    """A run's adapter folder gives in peft the logits that it gives here, and the run's predictions; a folder of peft, on a
    classifier of transformers, gives here the logits that it gives in peft, with its head and those of the base."""
    peft, t = pytest.importorskip('peft', reason='make peers installs peft'), pytest.importorskip('transformers')
    folder, = tuned[name][0].glob('*-lora-r4')
    ours, tokenizer, names, fresh = hf.load(str(folder), LABELS)
    base = t.AutoModelForSequenceClassification.from_pretrained(made(name), num_labels=2, pad_token_id=0)
    theirs = logits_of(peft.PeftModel.from_pretrained(base, folder), tokenizer)
    assert (names, fresh) == (LABELS, False) and theirs.std() > 0
    assert_close(logits_of(ours, tokenizer), theirs, rtol=1e-4, atol=1e-6)
    written = [row['prediction'] for row in csv.DictReader(open(tuned[name][0] / 'predictions.csv'))]
    assert [LABELS[i] for i in theirs.argmax(1)] == written[:3]

    base = t.AutoModelForSequenceClassification.from_pretrained(made(name), num_labels=2, pad_token_id=0)
    base.save_pretrained(tmp_path / 'base')
    tokenizer.save_pretrained(tmp_path / 'base')
    base = t.AutoModelForSequenceClassification.from_pretrained(tmp_path / 'base')
    config = peft.LoraConfig(task_type='SEQ_CLS', r=4, init_lora_weights=False, target_modules=MODELS[name][2].split()[:2])
    net = peft.get_peft_model(base, config)
    with torch.no_grad():
        for key, p in net.named_parameters():
            if 'modules_to_save' in key:            # heads that training has changed
                p.add_(torch.randn_like(p) * 0.1)
    net.save_pretrained(tmp_path / 'adapters')
    ours, _, names, fresh = hf.load(str(tmp_path / 'adapters'), LABELS)
    assert (names, fresh) == (LABELS, False)
    assert_close(logits_of(ours, tokenizer), logits_of(net, tokenizer), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match='trained for the labels|do not fit'):
        hf.load(str(folder), ['a', 'b', 'c'])


def test_adapters_over_other_bases(made, table, tuned, in_turn, tmp_path):
    """Adapters that were trained over nf4 weights come back over these; a base in bfloat16 is merged in fp32 and cast. Folders
    without a base model or with damaged files are one line."""
    options = ['--task=csv', f'--train_file={table}', f'--eval_file={table}', '--text_columns=text', '--device=cpu',
               '--max_len=16', '--rank=4', '--learning_rate=0.1']
    predict = ['--text_columns=text', '--device=cpu', '--max_len=16', f'--predict={table}']
    done = in_turn([('finetune_cls.py', tmp_path, [*options, f'--model={made("Roberta")}', '--method=qlora', '--max_iters=3',
                                                   '--out_dir=q']),
                    ('finetune_cls.py', tmp_path, ['q/config.py', *predict]),
                    ('finetune_cls.py', tmp_path, [*predict, '--model=q/Roberta0-csv-qlora-r4', '--out_dir=again']),
                    ('finetune_cls.py', tmp_path, [*options, '--model=q/Roberta0-csv-qlora-r4', '--method=lora',
                                                   '--max_iters=1', '--dtype=bfloat16', '--out_dir=more'])])
    assert [one.code for one in done] == [0] * 4, done
    shares = [[float(row['yes']) for row in csv.DictReader(open(tmp_path / out / 'predict-train/predictions.csv'))]
              for out in ('q', 'again')]
    assert shares[0] == pytest.approx(shares[1], abs=2e-5) and abs(shares[0][0] - 0.5) > 0.1
    folder, = tuned['Roberta'][0].glob('*-lora-r4')
    net, *_ = hf.load(str(folder), LABELS, torch.bfloat16)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    for change, words in (({'base_model_name_or_path': None}, 'names no base model'), ({'r': 8}, None)):
        config = json.loads((folder / 'adapter_config.json').read_text()) | change
        shutil.copytree(folder, other := tmp_path / str(len(change) + len(words or '')))
        (other / 'adapter_config.json').write_text(json.dumps(config))
        if words:
            with pytest.raises(ValueError, match=words):
                hf.load(str(other), LABELS)
    (other / 'nanobit.json').unlink()               # as peft writes it: the names are those of the base, or the caller's
    assert hf.load(str(other), LABELS)[2:] == (LABELS, False) and hf.labels_of(str(other)) == ['LABEL_0', 'LABEL_1']


def test_a_meter_that_fails_costs_no_result(made, table, in_turn, tmp_path):
    """torch's counter of FLOPs fails on a DeBERTa: a warning, an empty field, all other results."""
    done, = in_turn([('finetune_cls.py', tmp_path, [
        '--task=csv', f'--train_file={table}', f'--eval_file={table}', '--text_columns=text', '--device=cpu', '--max_len=16',
        '--max_iters=1', '--batch_size=8', f'--model={made("DebertaV2")}'])])
    assert done.code == 0 and 'warning: FLOPs of a forward pass are not measured' in done.out, done.err
    row, = csv.DictReader(open(tmp_path / 'out/cls/forward_pass.csv'))
    assert row['forward_flops'] == '' and int(row['peak_bytes']) > 0 and (tmp_path / 'out/cls/results.yaml').exists()


def test_a_model_that_cannot_read_the_texts_is_refused_before_training(made, refused, in_turn, table, tmp_path):
    """RoBERTa's table has one position less than it says; a tokenizer with more tokens than rows; max_len without room for
    a word. With --resize=True the rows are added, and adapters get a base of their own."""
    import transformers as t
    more = tmp_path / 'more'
    t.AutoModelForMaskedLM.from_pretrained(made('Bert')).save_pretrained(more)
    tokenizer = t.AutoTokenizer.from_pretrained(made('Bert'))
    tokenizer.add_tokens(['zebra', 'yak'])
    tokenizer.save_pretrained(more)
    options = ('--task=csv', f'--train_file={table}', f'--eval_file={table}', '--text_columns=text', '--device=cpu')
    (tmp_path / 'tiny.py').write_text('')
    rows = len(tokenizer)
    refused('finetune_cls', [((*options, *rest), words) for rest, words in [
        ((f'--model={made("Roberta")}', '--max_len=34'), 'this model reads 33 tokens at most, max_len=34 needs more'),
        ((f'--model={made("Bert")}', '--max_len=35'), 'this model has 34 positions'),
        ((f'--model={made("Bert")}', '--max_len=1'), 'max_len=1 leaves no room for text: 2 tokens are special'),
        ((f'--model={more}',), f'{rows} tokens, the embedding of this model {rows - 2} rows; type --resize=True'),
        ((f'--model={made("Bert")}', '--max_len=16', f'--predict={table}'), 'has no head for')]], tmp_path)
    options = *options, '--max_iters=1', '--batch_size=8'
    done = in_turn([('finetune_cls.py', tmp_path, [*options, *more]) for more in [
        (f'--model={more}', '--max_len=16', '--resize=True', '--method=lora', '--rank=4'),
        (f'--model={made("Roberta")}', '--max_len=33', '--out_dir=r')]])
    assert [one.code for one in done] == [0, 0], done
    folder, = (tmp_path / 'out/cls').glob('*-lora-r4')
    assert hf.load(str(folder), LABELS)[0].get_input_embeddings().num_embeddings == rows


@pytest.mark.parametrize('name', ['GPT2', 'Bert'])
def test_texts_without_labels_are_classified(tuned, in_turn, tmp_path, name):
    """--predict writes the probabilities of each text, from a run or from its folder; the predictions of the run stay."""
    out, _ = tuned[name]
    folder, = out.glob('*-lora-r4')
    with open(tmp_path / 'new.csv', 'w', newline='') as f:
        csv.writer(f).writerows([('text',), *TEXTS[:3]])
    before = (out / 'predictions.csv').read_bytes()
    options = f'--predict={tmp_path}/new.csv', '--text_columns=text', '--device=cpu', '--max_len=16'
    done = in_turn([('finetune_cls.py', out.parent, [out / 'config.py', *options]),
                    ('finetune_cls.py', tmp_path, [*options, f'--model={folder}', '--out_dir=here'])])
    assert [one.code for one in done] == [0, 0], done
    found = [list(csv.DictReader(open(where / 'predict-new/predictions.csv'))) for where in (out, tmp_path / 'here')]
    assert [row['prediction'] for row in found[0]] == [row['prediction'] for row in found[1]] and len(found[0]) == 3
    net, tokenizer, _, _ = hf.load(str(folder), LABELS)
    wanted = logits_of(net, tokenizer).softmax(1)
    for rows in found:
        assert_close(torch.tensor([[float(row[label]) for label in LABELS] for row in rows]), wanted, rtol=0, atol=2e-6)
    assert (out / 'predictions.csv').read_bytes() == before


def test_a_file_with_one_class_is_evaluated(tuned, in_turn, tmp_path):
    """The labels are those of the model, not those that the file happens to have."""
    folder, = tuned['Roberta'][0].glob('*-lora-r4')
    (tmp_path / 'one.csv').write_text('text;label\n' + 'good film;yes\n' * 4)
    options = '--task=csv', '--eval_file=one.csv', '--text_columns=text', '--device=cpu', '--max_len=16', '--eval_only=True'
    done, = in_turn([('finetune_cls.py', tmp_path, [*options, f'--model={folder}'])])
    assert done.code == 0 and re.search(r'accuracy (0|100)\.00%', done.out), done.err


def test_conv1d_of_gpt2_comes_back_from_weight_reduction(made, table, in_turn, tmp_path):
    """A Conv1D stores its weight transposed; a saved GPT-2 with low-rank layers is one that transformers reads."""
    options = ['--task=csv', f'--train_file={table}', f'--eval_file={table}', '--text_columns=text', '--device=cpu',
               '--max_len=16', '--max_iters=1', '--batch_size=8', '--method=weight_reduction', '--rank=40',
               f'--model={made("GPT2")}', '--targets=c_attn,c_proj']
    done, = in_turn([('finetune_cls.py', tmp_path, options)])
    assert done.code == 0, done.err
    folder, = (tmp_path / 'out/cls').glob('*weight_reduction*')
    net, tokenizer, _, fresh = hf.load(str(folder), LABELS)
    written = [row['prediction'] for row in csv.DictReader(open(tmp_path / 'out/cls/predictions.csv'))]
    assert not fresh and [LABELS[i] for i in logits_of(net, tokenizer).argmax(1)] == written[:3]
    assert 'transformer.h.0.attn.c_attn.weight' in net.state_dict()


GPT2 = dict(vocab_size=250, n_positions=24, n_embd=32, n_layer=2, n_head=2, activation_function='gelu', bos_token_id=None,
            eos_token_id=None)


@pytest.mark.parametrize('change, words', [
    (dict(n_head=4), 'type --n_layer=2 --n_head=4 --n_embd=32 --bias=True'),
    (dict(layer_norm_epsilon=1e-6), 'layer_norm_epsilon'),
    (dict(activation_function='relu'), 'activation_function=relu'), (dict(tie_word_embeddings=False), 'tie_word_embeddings'),
    (dict(scale_attn_by_inverse_layer_idx=True), 'scale_attn_by'), (dict(n_positions=8), '--block_size=8 or less'),
    (dict(vocab_size=300), 'has 300 tokens, the data only 256')])
def test_a_gpt2_of_another_function_is_refused(tmp_path, change, words):
    """What its shapes do not show: heads, epsilon, activation, scaling of attention, an untied head; and too few positions."""
    import train_gpt
    import transformers as t
    t.GPT2LMHeadModel(t.GPT2Config(**{**GPT2, **change})).save_pretrained(tmp_path / 'gpt2-x')
    model = train_gpt.GPT(train_gpt.GPTConfig(vocab_size=256, block_size=16, n_layer=2, n_head=2, n_embd=32, bias=True))
    with pytest.raises(ValueError, match=words):
        folders.gpt2_weights(str(tmp_path / 'gpt2-x'), model.config)


def test_weights_that_a_folder_lacks_are_not_made_up(tmp_path):
    """transformers would fill them with random numbers, in GPT-2, decoders and language models."""
    import train_gpt
    import transformers as t
    from safetensors.torch import load_file, save_file
    t.GPT2LMHeadModel(t.GPT2Config(**GPT2)).save_pretrained(folder := tmp_path / 'gpt2-x')
    small()[1].save_pretrained(folder)
    tensors = load_file(folder / 'model.safetensors')
    tensors = {k: v for k, v in tensors.items() if 'h.1.mlp.c_fc.weight' not in k}
    save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})
    model = train_gpt.GPT(train_gpt.GPTConfig(vocab_size=256, block_size=16, n_layer=2, n_head=2, n_embd=32, bias=True))
    for load in (lambda: folders.gpt2_weights(str(folder), model.config), lambda: hf.load_causal(str(folder)),
                 lambda: hf.load(str(folder), LABELS)):
        with pytest.raises(ValueError, match=r'lack.*h\.1\.mlp\.c_fc\.weight'):
            load()


def test_weights_of_a_gpt2_that_cannot_be_read_are_one_line(tmp_path):
    """A cut file, and a pickle, whose code does not run: ValueError that names the folder."""
    import train_gpt
    import transformers as t
    t.GPT2LMHeadModel(t.GPT2Config(**GPT2)).save_pretrained(folder := tmp_path / 'gpt2-x')
    model = train_gpt.GPT(train_gpt.GPTConfig(vocab_size=256, block_size=16, n_layer=2, n_head=2, n_embd=32, bias=True))
    (folder / 'model.safetensors').write_bytes((folder / 'model.safetensors').read_bytes()[:-9])
    for _ in range(2):
        with pytest.raises(ValueError, match='cannot load the weights of .*gpt2-x'):
            folders.gpt2_weights(str(folder), model.config)
        (folder / 'model.safetensors').unlink(missing_ok=True)
        (folder / 'pytorch_model.bin').write_bytes(b'cposix\nmkdir\n(V%b\ntR.' % str(tmp_path / 'ran').encode())
    assert not (tmp_path / 'ran').exists()
