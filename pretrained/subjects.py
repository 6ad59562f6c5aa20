"""
Subjects of ptq.py: a trained model with its evaluation data and its calibration set.

    subject = load('gpt2', dev, settings)           # or Trained(path, model, tokenizer, about, dev, settings)
    subject.loss(subject.model), subject.calibration(128, seed), subject.run(model, batch)

Three classes have the same methods. Trained: language models of this project's trainers, on the validation windows of their
training. Causal: language models of transformers (a folder or an id like gpt2), on a text file. Classifier: sequence
classifiers of transformers, e.g. of finetune_cls.py, on a folder of labelled texts or a table.
"""
import contextlib
import functools
import glob
import os
import shutil
from dataclasses import asdict

import numpy as np
import torch
import torch.nn.functional as F

import common
from configurator import fail
from pretrained import adapters, hf, replace
from readers import texts, tokens

PACKED = 'packed.safetensors'    # the weights in a folder of transformers that ptq.py saved


class Trained:
    """Language model of one of our trainers, evaluated on the evaluation batches of that trainer.

    path: a checkpoint. model, tokenizer, about: from load.load(path). Attributes: name (path), model (evaluation mode, on
    `dev`), meta (dict for the header of a packed file), about, trained (the loss that the trainer recorded for the same
    batches, or None)."""
    unit, causal, accuracy = 'nats per token', True, None
    unused = {'text', 'calibration', 'text_columns', 'label_column'}           # keys of ptq.py that this class does not use

    def __init__(self, path, model, tokenizer, about, dev, s):
        self.name, self.model, self.tokenizer, self.about, self.dev = path, model, tokenizer, about, dev
        config = self.about['config']
        own = lambda key, default: s[key] or config.get(key) or default
        self.dataset, self.seed = own('dataset', ''), config.get('seed', 1337)
        if not self.dataset:
            fail(f'{self.name} does not say what it was trained on; type --dataset=... of the evaluation data')
        self.block = own('block_size', self.model.config.block_size)
        self.batch, self.iters = own('batch_size', 16), own('eval_iters', 20)
        if self.block > self.model.config.block_size:
            fail(f'block_size={self.block} is more than the {self.model.config.block_size} of {self.name}')
        self.val = self._tokens('val')
        same = all(config.get(k) == v for k, v in (('dataset', self.dataset), ('block_size', self.block),
                                                   ('batch_size', self.batch), ('eval_iters', self.iters)))
        self.trained = self.about['val_loss'] if same and os.path.basename(self.name) == 'best.pt' else None
        self.meta = {'trainer': self.about['trainer'], 'step': self.about['step'], 'task': self.about['task'],
                     'model_config': asdict(self.model.config), 'tokenizer': self.tokenizer.describe(), 'config': config}
        self.model.to(dev)

    def refuse(self, path):
        """Raises ValueError if save() cannot write to `path`, or if `path` is the file of something else."""
        if not path.endswith('.safetensors') or os.path.isdir(path):
            raise ValueError(f'save={path!r}: a packed model is a file that ends in .safetensors; type another file')
        if os.path.exists(path) and os.path.samefile(path, self.name):
            raise ValueError(f'save={path!r} is the model itself; type another file')
        if os.path.exists(path):
            with contextlib.suppress(ValueError):
                if common.read_packed(path, tensors_too=False)[0].get('quantized'):
                    return
            raise ValueError(f'save={path!r} exists and was not written by ptq.py; type another file')

    def save(self, path, described):
        """Write the packed model. Returns the size of its file in bytes. Raises OSError."""
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        return common.save_packed(self.model, path, self.meta | {'quantized': described})

    def _tokens(self, split):
        data = tokens.load(tokens.dataset_dir(self.dataset), split)
        if len(data) <= self.block:
            fail(f'{self.dataset}: {len(data)} {split} tokens, block_size={self.block} needs more')
        try:
            common.check_tokens({'tokenizer': self.tokenizer.describe()}, self.name, data.tokenizer, self.dataset)
        except ValueError as e:
            fail(f'{e}; type --dataset=... with the tokens of this model')
        return data

    def run(self, model, batch):
        model(batch)

    @torch.no_grad()
    def loss(self, model, on_training=False):
        """Mean loss per token over the evaluation batches. on_training: over as many windows of the training split instead."""
        data, step = (self.train, -3) if on_training else (self.val, -1)
        starts = common.sample_indices(self.seed, step, len(data) - self.block, self.iters * self.batch)
        total = 0.0
        for chosen in starts.reshape(-1, self.batch):
            xy = data.windows(chosen, self.block + 1).to(self.dev)
            total += model(xy[:, :-1], xy[:, 1:]).item()
        return total / self.iters

    def windows(self, n, seed, step):
        """n training windows, (n, block + 1) int64, as a pure function of (seed, step)."""
        starts = common.sample_indices(seed, step, len(self.train) - self.block, n)
        return self.train.windows(starts, self.block + 1).to(self.dev)

    @functools.cached_property
    def train(self):
        return self._tokens('train')

    def calibration(self, n, seed):
        """Calibration set: n windows of the training split, as a list of batches."""
        return list(self.windows(n, seed, -2)[:, :-1].split(8))

    def training_loss(self, model, seed, step):
        """Mean loss of one batch of the training split, for backward()."""
        xy = self.windows(self.batch, seed, step)
        return model(xy[:, :-1], xy[:, 1:])

    def ids(self, n):
        """(1, n) tokens for timings; n is at most the context length."""
        return self.val.windows([0], min(n, self.block)).to(self.dev)

    def passed(self, model, ids):
        """The forward pass that is timed, as in generation: it returns the logits of the last position."""
        model(ids)


class _Folder:
    """Base class of models of transformers: they are saved as a folder with config, tokenizer and one packed file."""

    def _packed(self):
        """(header, tensors) of the packed file in the folder, or None if there is none."""
        path = os.path.join(self.name, PACKED)
        try:
            return common.read_packed(path) if os.path.isfile(path) else None
        except ValueError as e:
            fail(f'{e}; save it again')

    def _take(self, net, packed):
        """Return net, with the layers of the packed file if there is one."""
        net, described = hf.plain_linears(net).eval(), packed[0]['quantized'] if packed else {}
        try:
            return common.load_packed(replace.restore(net, described, packed[1]), packed[1]) if packed else net
        except (ValueError, KeyError, AttributeError) as e:
            fail(f'{self.name}/{PACKED} does not fit the config.json beside it ({e}); save it again')

    def _block(self, wanted, default, batch_of, special=0):
        """Tokens per window or text: `wanted`, or as many as the model reads, up to `default`. batch_of(n): n tokens."""
        known = getattr(self.model.config, 'max_position_embeddings', None) or 0
        block = wanted or min(default, known if known > 0 else default)               # -1 or none: any number of positions
        most = min(block, known) if known > 0 else block
        # Position tables can be smaller. On a GPU an index outside of one ends the process, so it is tried before.
        if most <= special:
            fail(f'block_size={block} leaves no room for text: {special} tokens are special; type a higher --block_size')
        try:
            if self.dev.type == 'cpu' or known <= 0 or not self.causal:               # a pass of a large model takes long here
                most = hf.longest(self.model, batch_of, most, special)
        except ValueError as e:
            fail(f'{self.name}: {e}; give another model')
        if wanted > most:
            fail(f'block_size={block} is more than the {most} of {self.name}; type --block_size={most}')
        return most

    def _check_ids(self, ids):
        rows = self.model.get_input_embeddings().num_embeddings
        if (most := int(ids.max())) >= rows:
            fail(f'the tokenizer of {self.name} gives token {most:,}, its embedding has {rows:,} rows; give another model')

    def refuse(self, path):
        if os.path.exists(path) and (not os.path.isdir(path) or os.listdir(path)):
            raise ValueError(f'save={path!r} exists; a packed model of transformers is a folder, type the name of a new one')

    def save(self, path, described):
        """Write a folder with the packed model, its config and its tokenizer, atomically. Returns the size of the packed file.
        Raises OSError."""
        part = f'{path.rstrip(os.sep)}.tmp'
        for left in glob.glob(f'{glob.escape(part)}*'):                 # left by a process that was killed while writing
            shutil.rmtree(left)
        part += str(os.getpid())
        os.makedirs(part)
        try:
            self.model.config.save_pretrained(part)
            hf.save_tokenizer(self.tokenizer, part)
            size = common.save_packed(self.model, os.path.join(part, PACKED), self.meta | {'quantized': described})
            if os.path.isdir(path):
                os.rmdir(path)
            os.replace(part, path)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return size


class Causal(_Folder, Trained):
    """Language model of transformers, evaluated on consecutive windows of a text file."""
    unused = {'dataset', 'text_columns', 'label_column'}

    def __init__(self, path, dev, s):
        self.name, self.dev, self.trained = path, dev, None
        packed = self._packed()
        try:
            net, self.tokenizer = hf.load_causal(path, weights=not packed)
        except ValueError as e:
            fail(str(e))
        self.model = self._take(net, packed)
        self.about, self.meta = {'quantized': packed[0]['quantized'] if packed else {}}, {'kind': 'causal'}
        self.block = self._block(s['block_size'], 1024, self._ids)
        self.batch, self.iters = s['batch_size'] or 4, s['eval_iters']
        if not s['text']:
            fail(f'{path} has no validation data; type --text=FILE of a text to evaluate it on')
        self.val, self.calibration_file = self._read(s['text']), s['calibration']
        if s['calibration'] and os.path.realpath(s['calibration']) == os.path.realpath(s['text']):
            fail(f'{s["text"]} cannot be both the calibration set and the evaluation data; type another --calibration')
        self.model.to(dev)

    def _read(self, path):
        try:
            with open(path, encoding='utf-8') as f:
                text = f.read()
        except (OSError, ValueError) as e:
            fail(f'cannot read {path}: {getattr(e, "strerror", None) or "it is no UTF-8 text"}; type the name of a text file')
        ids = torch.tensor(self.tokenizer(text, add_special_tokens=False, verbose=False)['input_ids'])
        if len(ids) <= self.block:
            fail(f'{path}: {len(ids)} tokens, block_size={self.block} needs more; type a lower --block_size or another file')
        self._check_ids(ids)
        return ids

    @staticmethod
    def _ids(n):
        return {'input_ids': torch.zeros(1, n, dtype=torch.int64), 'use_cache': False}

    def run(self, model, batch):
        model(input_ids=batch, use_cache=False)

    @torch.no_grad()
    def loss(self, model):
        rows = (len(self.val) - 1) // self.block
        rows = min(rows, self.iters * self.batch) if self.iters else rows
        total = 0.0
        for i in range(0, rows, self.batch):
            n = min(self.batch, rows - i)
            xy = self.val[i * self.block:(i + n) * self.block + 1].to(self.dev)
            total += self._loss(model, xy[:-1].view(n, -1), xy[1:].view(n, -1)).item() * n
        return total / rows

    @staticmethod
    def _loss(model, x, y):
        return F.cross_entropy(model(input_ids=x, use_cache=False).logits.float().flatten(0, 1), y.flatten())

    def windows(self, n, seed, step):
        starts = common.sample_indices(seed, step, len(self.train) - self.block, n)
        return torch.stack([self.train[i:i + self.block + 1] for i in starts.tolist()]).to(self.dev)

    @functools.cached_property
    def train(self):
        if not self.calibration_file:
            fail(f'{self.name} has no calibration text; type --calibration=FILE, not the file of --text')
        return self._read(self.calibration_file)

    def training_loss(self, model, seed, step):
        xy = self.windows(self.batch, seed, step)
        return self._loss(model, xy[:, :-1], xy[:, 1:])

    def ids(self, n):
        return self.val[None, :min(n, self.block)].to(self.dev)

    def passed(self, model, ids):
        model(input_ids=ids, use_cache=False)


class Classifier(_Folder):
    """Sequence classifier of transformers, evaluated (loss, accuracy) on the validation split of labelled texts, or on the
    table --text, with --calibration as its training split."""
    unit, causal, trained, accuracy = 'nats per text', False, None, None

    def __init__(self, path, dev, s):
        self.name, self.dev, self.batch = path, dev, s['batch_size'] or 32
        self.dataset, self.tables = s['dataset'], {'val': s['text'], 'train': s['calibration']}
        self.columns = s['text_columns'], s['label_column']
        self.unused = {'text', 'calibration', 'text_columns', 'label_column'} if self.dataset else {'dataset'}
        if not (self.dataset or s['text']):
            fail(f'{path} is a classifier; type --dataset=... of labelled texts, e.g. sst2, or --text=FILE.csv')
        if s['calibration'] and os.path.realpath(s['calibration']) == os.path.realpath(s['text']):
            fail(f'{s["text"]} cannot be both the calibration set and the evaluation data; type another --calibration')
        packed = self._packed()
        try:
            self.names = hf.labels_of(path)
            names = texts.load(tokens.dataset_dir(self.dataset), 'val')[2] if self.dataset else self.names
            foreign = packed and {n.lower() for n in names} != {n.lower() for n in self.names}
            net, self.tokenizer, self.names, fresh = hf.load(path, names or self._labels(), weights=not packed)
        except ValueError as e:
            fail(str(e))
        if fresh and not packed or foreign:
            fail(f'{path} was not trained for the labels of {self.dataset or s["text"]} ({", ".join(names)}); type '
                 f'another --{"dataset" if self.dataset else "text"}')
        self.model = self._take(net, packed)
        self.about, self.meta = {'quantized': packed[0]['quantized'] if packed else {}}, {'kind': 'classifier'}
        sentences, _ = both = self._texts('val')
        pairs = len(sentences[0]) > 1
        self.block = self._block(s['block_size'], 128, lambda n: hf.texts_of(self.tokenizer, n, pairs),
                                 self.tokenizer.num_special_tokens_to_add(pair=pairs))
        self.limit = s['eval_iters'] * self.batch
        self.rows, self.labels = self._encoded(*both)
        self.model.to(dev)

    def _labels(self):
        """The labels of the table, for adapters that do not name theirs."""
        return texts.label_names(texts.read_table(self.tables['val'], *self.columns)[1])

    def _texts(self, split):
        """(texts, label ids) of a split."""
        try:
            if self.dataset:
                sentences, ids, names = texts.load(tokens.dataset_dir(self.dataset), split)
                return sentences, [self.names.index(names[i]) for i in ids]
            sentences, labels = texts.read_table(self.tables[split], *self.columns)
            known = {n.lower(): n for n in self.names} if len({n.lower() for n in self.names}) == len(self.names) else {}
            return sentences, texts.label_ids([known.get(w.lower(), w) for w in labels], self.names, self.tables[split])
        except ValueError as e:
            fail(str(e))

    def _encoded(self, sentences, labels):
        rows = hf.encode(self.tokenizer, sentences, self.block)
        self._check_ids(np.concatenate([row['input_ids'] for row in rows]))
        return rows, labels

    @functools.cached_property
    def train(self):
        if not (self.dataset or self.tables['train']):
            fail(f'{self.name} has no calibration texts; type --calibration=FILE.csv, not the file of --text')
        return self._encoded(*self._texts('train'))

    def _batch(self, rows):
        return {k: t.to(self.dev) for k, t in hf.collate(self.tokenizer, rows, self.block).items()}

    def run(self, model, batch):
        model(**batch)

    @torch.no_grad()
    def loss(self, model):
        rows, labels = (self.rows[:self.limit], self.labels[:self.limit]) if self.limit else (self.rows, self.labels)
        order, total, right = sorted(range(len(rows)), key=lambda i: len(rows[i]['input_ids'])), 0.0, 0
        for i in range(0, len(order), self.batch):
            chosen = order[i:i + self.batch]
            logits = model(**self._batch([rows[j] for j in chosen])).logits.float().cpu()
            wanted = torch.tensor([labels[j] for j in chosen])
            total += F.cross_entropy(logits, wanted, reduction='sum').item()
            right += (logits.argmax(1) == wanted).sum().item()
        self.accuracy = right / len(order)
        return total / len(order)

    def calibration(self, n, seed):
        """Calibration set: n texts of the training split, one per batch, because padding must not count as input."""
        rows, _ = self.train
        chosen = common.sample_indices(seed, -2, len(rows), n)
        batches = [self._batch([rows[i]]) for i in chosen]
        for batch, i in zip(batches, chosen, strict=True):
            for key in batch:                       # collate() pads to a multiple of 8
                batch[key] = batch[key][:, :len(rows[i]['input_ids'])]
        return batches

    def training_loss(self, model, seed, step):
        rows, labels = self.train
        chosen = common.sample_indices(seed, step, len(rows), self.batch)
        logits = model(**self._batch([rows[i] for i in chosen])).logits.float()
        return F.cross_entropy(logits, torch.tensor([labels[i] for i in chosen], device=logits.device))

    def ids(self, n):
        flat = np.concatenate([r['input_ids'] for r in self.rows])[:min(n, self.block)]
        if self.model.config.is_encoder_decoder:    # T5 and BART classify at the last end token
            flat[-1] = self.tokenizer.eos_token_id
        return torch.from_numpy(flat).long()[None].to(self.dev)

    def passed(self, model, ids):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))


def is_ours(path):
    """Whether `path` is a run of our trainers, or one of its files, and not a folder or an id of transformers."""
    folder = os.path.isfile(os.path.join(path, 'config.json')) or adapters.is_adapters(path)
    ours = os.path.isfile(path) or os.path.isdir(path) and not folder
    return ours or path.startswith(('out/', './', '/')) and not os.path.isdir(path)


def load(path, dev, settings):
    """Load a model of transformers as a Causal or a Classifier. path: a folder, also one saved by ptq.py, or an id.
    settings: dict with the keys dataset, text, calibration, text_columns, label_column, eval_iters, batch_size, block_size of
    ptq.py; 0 or '': default."""
    try:
        packed = os.path.join(path, PACKED)
        kind = common.read_packed(packed, tensors_too=False)[0]['kind'] if os.path.isfile(packed) else hf.kind_of(path)
    except ValueError as e:
        fail(str(e))
    return (Classifier if kind == 'classifier' else Causal)(path, dev, settings)
