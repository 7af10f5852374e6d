"""Supervised examples as rows of tokens: several to a row, each a segment of its own, the loss on the answer alone."""

import dataclasses
import hashlib
import re
from collections.abc import Sequence

import numpy as np

from datasel.batch import Batch
from datasel.data import sampler
from datasel.methods.prox.examples import Example
from datasel.methods.prox.grammar import Grammar, accepts
from datasel.methods.prox.templates import Prompt, Prompts

_SURROGATE = re.compile('[\ud800-\udfff]')
_OPEN = 64  # rows that are looked through for room


@dataclasses.dataclass(frozen=True, slots=True)
class Encoded:
  """Examples that a model can be trained on, and how many it can't be and why.

  examples, prompts, answers: in one order; an answer is int32 with end of text.  left_out: by reason.  truncated:
  documents that are longer than what is read.
  """
  examples: list[Example]
  prompts: list[Prompt]
  answers: list[np.ndarray]
  left_out: dict[str, int]
  truncated: int

  def __len__(self) -> int:
    return len(self.examples)


def encode(examples: Sequence[Example], prompts: Prompts, grammar: Grammar) -> Encoded:
  """The examples in tokens.  Left out and counted are those with a program that the grammar does not have, of more
  than max_new_tokens, or with a prompt longer than the model reads: none of them is cut; and those with a program that
  the tokenizer changes, or with half a surrogate pair, which no UTF-8 has."""
  whole = [one for one in examples if not _SURROGATE.search(one.text + one.program)]
  texts = [one.text for one in whole]
  found = prompts.documents(texts) if prompts.task == 'document' else prompts.chunks(
    texts, [one.start for one in whole])
  kept, left_out = [], {'prompt too long': 0, 'program too long': 0, 'not in the grammar': 0,
                        'changed by the tokenizer': len(examples) - len(whole)}
  for example, prompt, answer in zip(whole, found, prompts.answers([one.program for one in whole])):
    span = example.start, example.start + example.text.count('\n') + 1
    if prompt.tokens > prompts.max_tokens:
      left_out['prompt too long'] += 1
    elif answer is None:
      left_out['changed by the tokenizer'] += 1
    elif len(answer) > prompts.max_new_tokens:
      left_out['program too long'] += 1
    elif not accepts(grammar, answer, span):
      left_out['not in the grammar'] += 1
    else:
      kept.append((example, prompt, answer))
  columns = [list(column) for column in zip(*kept)] or [[], [], []]
  return Encoded(*columns, left_out, sum(prompt.truncated for prompt in columns[1]))


def pack(lengths: Sequence[int], length: int, *, seed: int) -> list[list[int]]:
  """Which examples each row has: as many as fit in `length`, in a random order of the examples.

  Every example is in one row.  ValueError for one that is longer than a row.
  """
  if max(lengths, default=0) > length:
    raise ValueError(f'an example of {max(lengths)} tokens for rows of {length}; want no longer ones')
  n = len(lengths)
  order_N = np.argsort(sampler.permuted(np.arange(n), n, np.full(n, seed, np.uint64)), kind='stable')
  done: list[list[int]] = []
  opened: list[tuple[int, list[int]]] = []  # tokens that are free, and the examples
  for i in order_N.tolist():
    fit = next((place for place, (free, _) in enumerate(opened) if free >= lengths[i]), None)
    free, row = (length, []) if fit is None else opened.pop(fit)
    opened.append((free - lengths[i], [*row, i]))
    if len(opened) > _OPEN:
      fullest = min(range(len(opened)), key=lambda place: opened[place][0])
      done.append(opened.pop(fullest)[1])
  return done + [row for _, row in opened]


class Rows:
  """Packed examples as a store of one domain, for `sampler.Sampler`: an epoch is a pass over its rows."""

  domains = ('examples',)

  def __init__(self, encoded: Encoded, length: int, *, seed: int):
    self.encoded, self.length = encoded, length
    # The last token of an answer is a target alone.
    lengths = [len(prompt.ids) + len(answer) - 1 for prompt, answer in zip(encoded.prompts, encoded.answers)]
    self.packed = pack(lengths, length, seed=seed)

  def __len__(self) -> int:
    return len(self.packed)

  @property
  def digest(self) -> str:
    """sha256 (hex) of all that the batches depend on."""
    found = hashlib.sha256(f'{self.length} {self.packed}'.encode())
    for prompt, answer in zip(self.encoded.prompts, self.encoded.answers):
      found.update(prompt.ids.astype('<i4').tobytes() + b'|' + answer.astype('<i4').tobytes() + b';')
    return found.hexdigest()

  def sizes(self, split: str) -> np.ndarray:
    return np.array([len(self.packed)])

  def read(self, split: str, domain_B: np.ndarray, index_B: np.ndarray) -> Batch:
    """The batch of these rows; an example's segment is its place in the row, from 1."""
    B, L = len(index_B), self.length
    batch = {name: np.zeros((B, L), np.int32) for name in ('tokens_BxL', 'targets_BxL', 'segment_BxL', 'position_BxL')}
    batch['loss_mask_BxL'] = np.zeros((B, L), np.float32)
    for b, index in enumerate(index_B):
      at = 0
      for segment, i in enumerate(self.packed[int(index)], 1):
        prompt, answer = self.encoded.prompts[i].ids, self.encoded.answers[i]
        ids = np.concatenate([prompt, answer])
        place = np.s_[b, at:at + len(ids) - 1]
        batch['tokens_BxL'][place], batch['targets_BxL'][place] = ids[:-1], ids[1:]
        batch['segment_BxL'][place], batch['position_BxL'][place] = segment, np.arange(len(ids) - 1)
        batch['loss_mask_BxL'][b, at + len(prompt) - 1:at + len(ids) - 1] = 1
        at += len(ids) - 1
    return batch | {'domain_B': np.asarray(domain_B, np.int32), 'example_B': np.asarray(index_B, np.int64)}

  def names(self, index_B: np.ndarray) -> str:
    """The ids of the examples of these rows."""
    return ', '.join(self.encoded.examples[i].id for index in index_B for i in self.packed[int(index)])
