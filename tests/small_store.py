"""A small token store of real text, the interpreter's own, for the tests that need one and not more."""

import json
import pathlib
import pydoc_data.topics
import sysconfig

from datasel import prepare
from datasel.data.store import Store


def make(folder: pathlib.Path, *, length: int = 32) -> Store:
  """Three domains of unequal size, 400 tokens of vocabulary."""
  stdlib = pathlib.Path(sysconfig.get_paths()['stdlib'])
  texts = {name: [path.read_text(encoding='utf-8')[:3000] for path in sorted((stdlib / name).glob('*.py'))]
           for name in ('email', 'json')}
  texts['pydocs'] = [text[:2000] for _, text in sorted(pydoc_data.topics.topics.items())]
  (folder / 'corpus/train').mkdir(parents=True)
  for name, documents in texts.items():
    lines = [json.dumps({'id': f'{name}-{i}', 'text': text}) for i, text in enumerate(documents)]
    (folder / f'corpus/train/{name}.jsonl').write_text('\n'.join(lines) + '\n', encoding='utf-8')
  prepare.train_tokenizer(folder / 'corpus', folder / 'tokenizer.json', vocab_size=400, max_bytes_per_domain=30_000)
  return prepare.prepare(folder / 'corpus', folder / 'store', folder / 'tokenizer.json', length=length, holdout=0.3)
