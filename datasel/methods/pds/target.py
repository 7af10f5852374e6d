"""The target of a selection: held-out examples whose loss J it is to lower (the paper's is LIMA)."""

import dataclasses
import json
import logging
import pathlib
import tarfile

import numpy as np

from datasel.data import demo_archives
from datasel.data.store import Store
from datasel.data.tokenizer import Tokenizer

KINDS = 'validation:DOMAIN[,DOMAIN...], demo:alpaca, or a file of JSON lines {"text"} or {"prompt", "response"}'


@dataclasses.dataclass(frozen=True)
class Target:
  """Rows of the store's length, and what became of what was read."""

  batch: dict[str, np.ndarray]  # as the store's: N x L
  cut: int  # examples longer than L, of which the beginning is used
  left_out: int  # examples without a token to predict in their first L

  def __len__(self) -> int:
    return len(self.batch['tokens_BxL'])


def load(name: str, store: Store, tokenizer: Tokenizer, *, most: int) -> Target:
  """At most `most` examples of a target, spread evenly over what there is.

  Held-out records of the run's own store; or pairs and texts of one row each, where only what follows a prompt counts.
  ValueError for what cannot be read.
  """
  if name.startswith('validation:'):
    return _held_out(name.removeprefix('validation:').split(','), store, most)
  if name == 'demo:alpaca':
    pairs = _alpaca()
  elif pathlib.Path(name).is_file():
    pairs = _read(pathlib.Path(name))
  else:
    raise ValueError(f'config.pds.target is {name!r}, and no such file is there; want {KINDS}')
  return _rows([pairs[n] for n in _spread(len(pairs), most)], store, tokenizer, name)


def _spread(there: int, most: int) -> np.ndarray:
  return np.arange(min(there, most)) * there // max(min(there, most), 1)


def _held_out(domains: list[str], store: Store, most: int) -> Target:
  if unknown := sorted(set(domains) - set(store.domains)):
    raise ValueError(f'config.pds.target: {store.path} has no domain {unknown}; it has {list(store.domains)}')
  sizes_M = store.sizes('validation')
  listed = [(m, n) for m in map(store.domains.index, sorted(set(domains))) for n in range(sizes_M[m])]
  if not listed:
    raise ValueError(f'config.pds.target: no held-out sequence of {domains} in {store.path}')
  domain_N, record_N = np.array(listed)[_spread(len(listed), most)].T
  batch = store.read('validation', domain_N, record_N)
  return Target({name: x for name, x in batch.items() if name.endswith('_BxL')}, 0, 0)


def _read(path: pathlib.Path) -> list[tuple[str, str]]:
  """(prompt, response) of each line; a text has no prompt."""
  pairs = []
  for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
    try:
      record = json.loads(line)
      pair = ('', record['text']) if 'text' in record else (record['prompt'], record['response'])
      if not all(isinstance(part, str) for part in pair):
        raise TypeError
    except (ValueError, TypeError, KeyError) as e:
      raise ValueError(f'{path}, line {number}: want JSON with the string "text", or "prompt" and "response"') from e
    pairs.append(pair)
  return pairs


def _alpaca() -> list[tuple[str, str]]:
  """A stand-in for LIMA of its size: 999 instructions and answers that come with llamafactory."""
  with tarfile.open(demo_archives.archive('llamafactory')) as tar:
    [member] = [m for m in tar.getmembers() if m.name.endswith('/data/alpaca_en_demo.json')]
    listed = json.load(tar.extractfile(member))
  return [('\n'.join(part for part in (each['instruction'], each['input'], '') if part) + '\n', each['output'])
          for each in listed]


def _rows(pairs: list[tuple[str, str]], store: Store, tokenizer: Tokenizer, name: str) -> Target:
  """Each as [bos?] prompt response [eos?], in a row of its own."""
  L = store.length
  prompts, responses = (tokenizer.encode_batch([pair[i] for pair in pairs]) for i in (0, 1))
  before, after = ([] if i is None else [i] for i in (tokenizer.bos_id, tokenizer.eos_id))
  rows, cut, left_out = [], 0, 0
  for prompt, response in zip(prompts, responses):
    ids = np.concatenate([before, prompt, response, after]).astype(np.int32)
    first = max(len(before) + len(prompt), 1)  # what is predicted: never the first token of all
    if first >= min(len(ids), L + 1):
      left_out += 1
      continue
    cut += len(ids) > L + 1
    ids = ids[:L + 1]
    row = {key: np.zeros(L, dtype) for key, dtype in (
      ('tokens_BxL', np.int32), ('targets_BxL', np.int32), ('loss_mask_BxL', np.float32), ('segment_BxL', np.int32),
      ('position_BxL', np.int32))}
    n = len(ids) - 1
    row['tokens_BxL'][:n], row['targets_BxL'][:n], row['loss_mask_BxL'][first - 1:n] = ids[:-1], ids[1:], 1
    row['segment_BxL'][:n], row['position_BxL'][:n] = 1, np.arange(n)
    rows.append(row)
  if not rows:
    raise ValueError(f'config.pds.target {name}: none of {len(pairs)} examples has a token to predict within '
                     f'{L} tokens; want longer sequences, or other examples')
  logging.info('target %s: %d examples; %d cut at %d tokens, %d left out (nothing to predict there)', name, len(rows),
               cut, L, left_out)
  return Target({key: np.stack([row[key] for row in rows]) for key in rows[0]}, cut, left_out)
