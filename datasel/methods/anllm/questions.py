"""Multiple choice after demonstrations whose cache is really evicted, beside a full cache of the same weights.

A prompt is worded as in lm_eval/local_tasks.py.  All questions of a set have the same demonstrations before them: they
are read once, evicted, and every question goes on from what is left.
"""

import dataclasses
import json
import logging
import math
import os
import pathlib
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from datasel import sharding
from datasel.data import demo_archives
from datasel.data import questions as packaged
from datasel.data.tokenizer import Tokenizer
from datasel.methods.anllm.contexts import unmasked
from datasel.methods.anllm.generate import AnchorGenerator, Prefix
from datasel.models.mistral import Mistral

_log = logging.getLogger(__name__)
_AT_ONCE = 32  # batches between two lines of the log


@dataclasses.dataclass(frozen=True)
class Questions:
  """asked, demonstrations: {question, choices, gold}, gold being the number of the right choice.

  after: what follows a question in the prompt."""

  name: str
  asked: Sequence[dict]
  demonstrations: Sequence[dict]
  after: str = '\nAnswer:'


@dataclasses.dataclass(frozen=True)
class Prompts:
  """Questions as tokens, int32.

  prefix: what all of them begin with, nothing without demonstrations.  prompts: of each question, what follows it, up
  to its options; options: the tokens of each option, which follow the prompt.  sizes: bytes of each option.  gold: the
  number of the right one.
  """

  name: str
  prefix: np.ndarray
  prompts: list[np.ndarray]
  options: list[list[np.ndarray]]
  sizes: list[np.ndarray]
  gold: list[int]

  @property
  def whole(self) -> list[np.ndarray]:
    """The prompts with the prefix before each."""
    return [np.concatenate([self.prefix, prompt]) for prompt in self.prompts]

  @property
  def longest(self) -> int:
    """Tokens of the longest question with its prefix and an option."""
    return len(self.prefix) + max(len(prompt) + max(map(len, options))
                                  for prompt, options in zip(self.prompts, self.options))


def load(names: Iterable[str | os.PathLike], shots: Iterable[int] = ()) -> list[Questions]:
  """Sets of `datasel.data.questions` ('socialiqa'), or .jsonl files of {question, choices, gold} a line.

  One question in 20 is kept for demonstrations, always the same ones.  ValueError for what is no set and no such file,
  for a set that can't be had here, and for one with fewer demonstrations than one of `shots`.
  """
  most = max(shots, default=0)
  return [_load(name, most) for name in names]


def encode(questions: Questions, tokenizer: Tokenizer, *, shots: int, limit: int = 0, seed: int = 0) -> Prompts:
  """The questions after `shots` demonstrations, which are drawn by `seed`; fewer are the first of more.

  limit: so many questions, spread evenly over those that are asked; 0: all.  As training has it, a prompt begins with
  the tokenizer's bos, where it has one; where it has an anchor token, that stands between sentences, and so after each
  demonstration (paper, 4.3).
  """
  n = len(questions.asked)
  order = np.random.default_rng(seed).permutation(len(questions.demonstrations))[:shots]
  asking = lambda r: f'Question: {r["question"]}{questions.after}'
  answered = lambda r: f'{asking(r)} {r["choices"][r["gold"]]}'
  shown = '\n\n'.join(answered(questions.demonstrations[i]) for i in order)
  before = f'{shown}\n\n' if shots else ''
  records = [questions.asked[i * n // min(n, limit or n)] for i in range(min(n, limit or n))]

  contexts = _encoded(tokenizer, [before + asking(r) for r in records])
  wholes = iter(_encoded(tokenizer, [f'{before}{asking(r)} {choice}' for r in records for choice in r['choices']]))
  options_of = [[next(wholes) for _ in r['choices']] for r in records]
  # A tokenizer may write the end of a context otherwise where an option follows: that is part of the options then.
  ends = [_common([context, *options]) for context, options in zip(contexts, options_of)]
  start = 0
  if shots:
    own = len(_encoded(tokenizer, [shown])[0])
    shared = _common(tokens[:end] for tokens, end in zip(contexts, ends))
    own += own < shared and contexts[0][own] == tokenizer.anchor_id  # the last demonstration's
    start = min(own, shared, min(ends) - 1)
  return Prompts(
    name=f'{questions.name}, {shots} shots',
    prefix=contexts[0][:start],
    prompts=[context[start:end] for context, end in zip(contexts, ends)],
    options=[[tokens[end:] for tokens in options] for options, end in zip(options_of, ends)],
    sizes=[np.array([len(choice.encode()) for choice in r['choices']]) for r in records],
    gold=[r['gold'] for r in records])


def generators(model: Mistral, params: Any, *, batch_size: int, mesh: jax.sharding.Mesh | None = None,
               rules: sharding.Rules = sharding.RULES) -> dict[str, AnchorGenerator]:
  """{cache: what reads and scores with it}, on one copy of the parameters; 'full' alone for a model without anchors."""
  full = AnchorGenerator(unmasked(model), params, mesh=mesh, rules=rules, batch_size=batch_size)
  if model.anchors is None:
    return {'full': full}
  masked = AnchorGenerator(model, full.params, mesh=mesh, rules=rules, batch_size=batch_size)
  return {'evicted': masked, 'full': full}


def evaluate(arm: str, model: Mistral, params: Any, tokenizer: Tokenizer, *, sets: Iterable[str | os.PathLike],
             shots: Sequence[int], limit: int = 0, seed: int = 0, batch_size: int = 8,
             mesh: jax.sharding.Mesh | None = None, rules: sharding.Rules = sharding.RULES) -> list[dict]:
  """A row for each set of `load`, number of demonstrations, and cache.

    arm, cache, set, shots, n     cache: 'evicted', under the anchor mask, then 'full', without it; a model without
                                  anchors has 'full' alone.  n: questions asked, the same ones in all rows of a set
    accuracy, stderr              the right option has the largest summed log-likelihood
    accuracy_norm                 ... the largest per byte of the option
    chance                        the accuracy of guessing
    prefix_tokens, live           of the demonstrations: tokens read, and cache entries that are left of them
    allocated_bytes               ... of the buffers that hold these
    longest                       tokens of the longest question with demonstrations and option: nothing is cut
    seconds                       for the row, compilation included: no measure of speed, that is `speed.measure`

  The numbers do not depend on the batch size and the mesh.
  """
  readers, rows = generators(model, params, batch_size=batch_size, mesh=mesh, rules=rules), []
  for questions in load(sets, shots):
    for k in shots:
      prompts = encode(questions, tokenizer, shots=k, limit=limit, seed=seed)
      for cache, reader in readers.items():
        began = time.perf_counter()
        scores, prefix = score(reader, prompts)
        row = {'arm': arm, 'cache': cache, 'set': questions.name, 'shots': k, **accuracy(scores, prompts),
               'prefix_tokens': len(prompts.prefix), 'live': prefix.live if prefix else 0,
               'allocated_bytes': prefix.allocated_bytes if prefix else 0, 'longest': prompts.longest,
               'seconds': time.perf_counter() - began}
        _log.info('%s, %s, cache %s: accuracy %.4f (per byte %.4f) of %d', arm, prompts.name, cache, row['accuracy'],
                  row['accuracy_norm'], row['n'])
        rows.append(row)
  return rows


def score(generator: AnchorGenerator, prompts: Prompts) -> tuple[list[np.ndarray], Prefix | None]:
  """(summed log-likelihood in nats of each option of each question, the prefix that was read once for all)."""
  prefix = generator.read(prompts.prefix) if len(prompts.prefix) else None
  scores, step = [], _AT_ONCE * generator.batch_size
  for start in range(0, len(prompts.prompts), step):
    part = slice(start, start + step)
    found = generator.score(prompts.prompts[part], prompts.options[part], prefix=prefix)
    scores += [np.array([logprobs.sum(dtype=np.float64) for logprobs in options]) for options in found]
    _log.info('%s: %d of %d questions', prompts.name, len(scores), len(prompts.prompts))
  return scores, prefix


def accuracy(scores: Sequence[np.ndarray], prompts: Prompts) -> dict[str, float]:
  """{'n', 'accuracy', 'stderr', 'accuracy_norm', 'chance'}; stderr: of the mean over the questions asked."""
  for n, of_options in enumerate(scores):
    if not np.isfinite(of_options).all():
      raise FloatingPointError(f'question {n}: the log-likelihoods of its options are {of_options.tolist()}')
  mean = lambda values: float(np.mean(values))
  right = [int(np.argmax(x)) == gold for x, gold in zip(scores, prompts.gold)]
  right_norm = [int(np.argmax(x / size)) == gold for x, size, gold in zip(scores, prompts.sizes, prompts.gold)]
  p = mean(right)
  return {'n': len(right), 'accuracy': p, 'stderr': math.sqrt(p * (1 - p) / max(len(right) - 1, 1)),
          'accuracy_norm': mean(right_norm), 'chance': mean([1 / len(size) for size in prompts.sizes])}


def _encoded(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
  """Of texts that go on: without an anchor at the end, which their last sentence has not reached."""
  begin = np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], np.int32)
  whole = [np.concatenate([begin, tokens]) for tokens in tokenizer.encode_batch(texts)]
  return [tokens[:-1] if tokens[-1] == tokenizer.anchor_id else tokens for tokens in whole]


def _common(rows: Iterable[np.ndarray]) -> int:
  """How many tokens all of them begin with."""
  first, *others = rows
  common = len(first)
  for other in others:
    common = min(common, len(other))
    differs = np.flatnonzero(first[:common] != other[:common])
    common = int(differs[0]) if len(differs) else common
  return common


def _load(name_or_path: str | os.PathLike, shots: int) -> Questions:
  path = pathlib.Path(name_or_path)
  if path.suffix == '.jsonl':
    name, records, after = path.stem, _records(path), Questions.after
  elif (name := str(name_or_path)) in packaged.SETS:
    try:
      records, after = packaged.load(name)[0], packaged.SETS[name].after
    except demo_archives.Unavailable as e:
      raise ValueError(f'the questions of {name} cannot be had: {e}') from e
  else:
    raise ValueError(f'unknown set of questions {name!r}; known: {", ".join(sorted(packaged.SETS))}, or a .jsonl file')
  found = Questions(name, [r for n, r in enumerate(records) if n % packaged.SHOTS], records[::packaged.SHOTS], after)
  if not found.asked or shots > len(found.demonstrations):
    raise ValueError(f'questions {name_or_path}: {len(found.asked)} to ask, and {len(found.demonstrations)} kept for '
                     f'{shots} demonstrations before each (one in {packaged.SHOTS} of all); want more questions or '
                     'fewer demonstrations')
  return found


def _records(path: pathlib.Path) -> list[dict]:
  """ValueError names the line that is no question."""
  if not path.is_file():
    raise ValueError(f'questions {path}: no such file')
  records = []
  for n, line in enumerate(path.read_bytes().splitlines(), start=1):
    try:
      record = json.loads(line)
      question, choices, gold = (record[key] for key in ('question', 'choices', 'gold'))
      fits = (isinstance(question, str) and isinstance(choices, list) and type(gold) is int
              and all(isinstance(choice, str) and choice.strip() for choice in choices)
              and len(set(choices)) == len(choices) > 1 and gold in range(len(choices)))
    except (ValueError, KeyError, TypeError):
      fits = False
    if not fits:
      raise ValueError(f'{path}, line {n}: want a JSON object of question (text), choices (at least two different '
                       f'texts) and gold (the number of the right one, from 0), got {line[:200]!r}')
    records.append({'question': question, 'choices': choices, 'gold': gold})
  return records
