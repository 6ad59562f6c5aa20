"""Files that an earlier version of nanobit wrote (tests/old) mean today what they meant then.

Beside them, old.json holds what that version said of them: logits, losses, generated text. The text in tests/old/text is a
sentence of configurator.py, 40 times, as data/text/prepare.py makes tokens of it.
"""
import json
import shutil
from pathlib import Path

import pytest
import torch

import common
import train_cnn
from engine import load

ROOT = Path(__file__).resolve().parent.parent
OLD = ROOT / 'tests/old'
SAID = json.loads((OLD / 'old.json').read_text())
LANGUAGE = ['gpt_last.pt', 'gptq3.safetensors', 'bitnet_packed.safetensors']


@pytest.mark.parametrize('name', LANGUAGE)
def test_language_models_of_old_files(name):
    """A checkpoint with binary, ternary, 4-bit and full-precision layers, a file of ptq.py in groups, a packed BitNet: the same
    logits and loss. old.json has the logits of the letters a to f at the last position."""
    model, _, about = load.load(str(OLD / name))
    said = SAID[name]
    n = torch.arange(32).view(2, 16)
    ids, targets = n * n * 7 % 251, (n * n * 7 + 14 * n + 7) % 251
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[:, 0, 97:103], torch.tensor(said['logits']), rtol=1e-5, atol=1e-5)
        assert model(ids, targets).item() == pytest.approx(said['loss'], rel=1e-5)
    assert (about['trainer'], about['step']) == (said['trainer'], said['step'])


def test_old_files_generate_the_same_text(in_turn):
    options = ('--prompt=def ', '--temperature=0', '--max_new_tokens=60', '--device=cpu')
    results = in_turn([('sample.py', OLD, (f'--ckpt={name}', '--engine=torch', *options)) for name in LANGUAGE])
    assert [(result.code, result.out) for result in results] == [(0, SAID[name]['text']) for name in LANGUAGE], results


@pytest.mark.parametrize('name', ['cnn_best.pt', 'cnn_packed.safetensors'])
def test_convolutional_networks_of_old_files(name):
    """Binary, ternary, 4-bit and full-precision convolutions and linear layers: the same logits."""
    path, packed = str(OLD / name), name.endswith('.safetensors')
    meta, tensors = common.read_packed(path) if packed else (common.read_checkpoint(path, 'train_cnn'), None)
    model = train_cnn.CNN(train_cnn.CNNConfig(**meta['model_config']))
    if packed:
        common.load_packed(model, tensors)
    else:
        common.load_model_state(model, meta['model'], path)
    images = (torch.arange(2 * 3 * 16 * 16) * 0.37).sin().view(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), torch.tensor(SAID[name]['logits']), rtol=1e-5, atol=1e-5)
    assert (meta['trainer'], meta['step']) == (SAID[name]['trainer'], SAID[name]['step'])


@pytest.mark.parametrize('trainer, run', [('train_gpt', 'gpt'), ('finetune_cls', 'cls')])
def test_old_runs_go_on(start, trainer, run, tmp_path):
    """With the config.py of the old run, its data and its optimizer's state (AdamW; RSVDAdam between two refreshes): two
    further steps have the losses and gradient norms that they had then."""
    shutil.copytree(OLD / 'text', tmp_path / 'text')
    shutil.copy(OLD / 'words.csv', tmp_path)
    shutil.copy(OLD / f'{run}_config.py', tmp_path / 'old_config.py')
    (tmp_path / run).mkdir()
    shutil.copy(OLD / f'{run}_last.pt', tmp_path / run / 'last.pt')
    done = start(ROOT / f'{trainer}.py', 'old_config.py', '--resume=auto', cwd=tmp_path).wait()
    assert done.code == 0, done.err
    said = SAID[f'{run}_last.pt']
    assert f'at step {said["step"]}' in done.out
    rows = {str(r['step']): r for r in common.read_log(tmp_path / run) if 'loss' in r}
    for key, of_steps in (('loss', said['losses']), ('grad_norm', said['norms'])):
        assert {step: r[key] for step, r in rows.items()} == pytest.approx(of_steps, rel=1e-5), key
