"""Seconds a question with the anchor cache, with a full cache, and with none: in turns, in one run."""

import logging
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from datasel import sharding
from datasel.data.tokenizer import Tokenizer
from datasel.methods.anllm import questions
from datasel.models.mistral import Mistral

_log = logging.getLogger(__name__)
_ROUNDS = 3  # that count, after one that compiles


def measure(arm: str, model: Mistral, params: Any, tokenizer: Tokenizer, *, sets: Iterable[str | os.PathLike],
            shots: Sequence[int], timed: int, seed: int = 0, batch_size: int = 8,
            mesh: jax.sharding.Mesh | None = None, rules: sharding.Rules = sharding.RULES) -> list[dict]:
  """A row for each set and number of demonstrations but 0: arm, set, shots, prefix_tokens, and seconds a question

    no_cache       the demonstrations are read again with every question, under the anchor mask
    full_cache     they were read once and are all kept, under full attention
    anchor_cache   they were read once and evicted

  Of `timed` questions, batch_size at a time; all options of a question after one reading of its prompt.  The three take
  turns; medians, without compilation and without the one reading of the demonstrations.  ValueError for a model
  without anchors.
  """
  if model.anchors is None:
    raise ValueError(f'{arm}: the speed of an anchor cache is asked of a model without anchors')
  readers, rows = questions.generators(model, params, batch_size=batch_size, mesh=mesh, rules=rules), []
  for found in questions.load(sets, shots):
    for k in filter(None, shots):
      prompts = questions.encode(found, tokenizer, shots=k, limit=timed, seed=seed)
      contenders = {'no_cache': (readers['evicted'], prompts.whole, None)}
      for name, cache in (('full_cache', 'full'), ('anchor_cache', 'evicted')):
        contenders[name] = readers[cache], prompts.prompts, readers[cache].read(prompts.prefix)
      taken = {name: [] for name in contenders}
      for _ in range(1 + _ROUNDS):
        for name, (reader, asked, prefix) in contenders.items():
          began = time.perf_counter()
          reader.score(asked, prompts.options, prefix=prefix)
          taken[name].append(time.perf_counter() - began)
      seconds = {name: statistics.median(times[1:]) / len(prompts.prompts) for name, times in taken.items()}
      _log.info('%s, %s: %s s a question', arm, prompts.name,
                ', '.join(f'{name} {x:.4f}' for name, x in seconds.items()))
      rows.append({'arm': arm, 'set': found.name, 'shots': k, 'prefix_tokens': len(prompts.prefix), **seconds})
  return rows
