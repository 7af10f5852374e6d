"""A token store of real text, made in a second without a download, and what the tests of whole runs read from disk."""

import json
import pathlib
import pydoc_data.topics
import sysconfig

from datasel import metrics, prepare

LENGTH, VOCAB = 32, 400


def make_store(folder: pathlib.Path, *, length: int = LENGTH, vocab_size: int = VOCAB) -> pathlib.Path:
  """FOLDER/store of two domains, 'code' and 'pydocs'; FOLDER/tokenizer.json."""
  stdlib = pathlib.Path(sysconfig.get_paths()['stdlib'])
  modules = [*(stdlib / 'json').glob('*.py'), *(stdlib / 'email').glob('*.py')]
  domains = {'code': {path.name: path.read_text(encoding='utf-8') for path in modules},
             'pydocs': dict(list(pydoc_data.topics.topics.items())[:60])}
  for domain, texts in domains.items():
    path = folder / 'corpus' / 'train' / f'{domain}.jsonl'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps({'id': id, 'text': text}) + '\n' for id, text in sorted(texts.items())))
  prepare.train_tokenizer(folder / 'corpus', folder / 'tokenizer.json', vocab_size=vocab_size,
                          max_bytes_per_domain=30_000)
  prepare.prepare(folder / 'corpus', folder / 'store', folder / 'tokenizer.json', length=length, holdout=0.2)
  return folder / 'store'


def timeless(directory: pathlib.Path) -> list[dict]:
  """The lines of metrics.jsonl without what a clock measured: what a repeated or resumed run must repeat."""
  return [{k: v for k, v in line.items() if not k.startswith('time/')} for line in metrics.read(directory)]


CONFIG = '''
from datasel import config as config_lib

def get_config(arg=''):
  config = config_lib.base('pretrain')
  config.pretrain = config_lib.pretrain()
  config.data.store = {store!r}
  config.data.length, config.data.block = {length}, 4096
  config.model = config_lib.model('smoke')
  config.model.vocab_size, config.model.n_layers, config.model.d_model, config.model.d_ff = {vocab}, 1, 16, 32
  config.train.steps, config.train.batch_size = 6, 8
  config.train.log_every, config.train.checkpoint_every = 1, 2
  config.train.eval_every, config.train.eval_sequences = 3, 4
  return config_lib.finish(config, arg)
'''


def write_config(path: pathlib.Path, store: pathlib.Path) -> pathlib.Path:
  """A config file of plain pre-training on `store`: 6 steps of a model of a few thousand parameters."""
  path.write_text(CONFIG.format(store=str(store), length=LENGTH, vocab=VOCAB))
  return path
