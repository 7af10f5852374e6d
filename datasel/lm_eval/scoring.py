"""Log-likelihoods of many (tokens, targets) on a mesh: few compiled programs, no logits but those asked for."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from datasel import sharding

_AUTO_TOKENS = 4096  # of a batch on one shard, when the number of rows is left to us
_HEAD_POSITIONS = 1024  # of a shard whose logits exist at one time


@dataclasses.dataclass
class Row:
  """Tokens that are read once, and everything that is asked about them.

  asked: (name of a question, position of its first target, its targets): the logits at the position are those of the
  target.  Several questions may ask about one row: answers A, B, C, D to one prompt cost as much as one.
  """
  tokens: tuple[int, ...]
  asked: list[tuple[Any, int, tuple[int, ...]]] = dataclasses.field(default_factory=list)

  @property
  def n_targets(self) -> int:
    return sum(len(targets) for _, _, targets in self.asked)


def length_bucket(n: int, least: int = 32) -> int:
  """The smallest of 32, 48, 64, 96, 128, 192, ... that is not below n: at most half of a row is padding."""
  size = least
  while size < n:
    size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
  return size


def targets_bucket(n: int) -> int:
  """The smallest of 4, 16, 64, 256, ... that is not below n."""
  size = 4
  while size < n:
    size *= 4
  return size


class Scorer:
  """score(rows) -> for each batch, [(name, log-likelihood in nats, whether greedy decoding gives the targets)].

  batch_size: rows of a batch, or None for as many as make 4,096 tokens on each shard, at most `most_rows`.
  """

  def __init__(self, model: Any, params: dict, mesh: jax.sharding.Mesh, *, batch_size: int | None = None,
               most_rows: int = 256, rules: sharding.Rules = sharding.RULES):
    self._model, self._params, self._mesh, self._rules = model, params, mesh, rules
    self._shards = sharding.batch_shards(mesh, rules)
    self._batch_size, self._most_rows = batch_size, most_rows
    self._compiled = jax.jit(self._scores, out_shardings=sharding.replicated(mesh))

  def __call__(self, rows: Sequence[Row]) -> Iterator[list[tuple[Any, float, bool]]]:
    """Longest first, so that the first batch meets any lack of memory; ties by the tokens, so batches are repeated."""
    rows = sorted(rows, key=lambda row: (-len(row.tokens), row.tokens))
    done = 0
    while done < len(rows):
      length = length_bucket(len(rows[done].tokens))
      batch = rows[done:done + self._rows(length)]
      done += len(batch)
      yield self._answers(batch, self._rows(length), length)

  def _rows(self, length: int) -> int:
    wanted = self._batch_size or min(max(1, _AUTO_TOKENS // length) * self._shards, self._most_rows)
    return -(-wanted // self._shards) * self._shards

  def _answers(self, rows: Sequence[Row], n_rows: int, length: int) -> list[tuple[Any, float, bool]]:
    n_targets = targets_bucket(max(row.n_targets for row in rows))
    tokens_BxL = np.zeros((n_rows, length), np.int32)
    at_BxS, targets_BxS = (np.zeros((n_rows, n_targets), np.int32) for _ in range(2))
    for b, row in enumerate(rows):
      tokens_BxL[b, :len(row.tokens)] = row.tokens
      s = 0
      for _, first, targets in row.asked:
        at_BxS[b, s:s + len(targets)] = np.arange(first, first + len(targets))
        targets_BxS[b, s:s + len(targets)] = targets
        s += len(targets)
    batch = sharding.put(self._mesh, {'tokens_BxL': tokens_BxL, 'at_BxS': at_BxS, 'targets_BxS': targets_BxS},
                         self._rules)
    nll_BxS, greedy_BxS = jax.device_get(self._compiled(self._params, batch))
    answers = []
    for b, row in enumerate(rows):
      s = 0
      for name, _, targets in row.asked:
        own = slice(s, s + len(targets))
        answers.append((name, -float(nll_BxS[b, own].sum(dtype=np.float64)), bool(greedy_BxS[b, own].all())))
        s += len(targets)
    return answers

  def _scores(self, params: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
    """Nats of each target, and whether it is the most likely token, B x S."""
    with sharding.use(self._mesh, self._rules):
      at_BxS, targets_BxS = batch['at_BxS'], batch['targets_BxS']
      hidden_BxLxD = self._model.hidden(params, batch['tokens_BxL'])
      hidden_BxSxD = jnp.take_along_axis(hidden_BxLxD, at_BxS[..., None], axis=1)
      B, S, D = hidden_BxSxD.shape
      chunk = min(S, self._model.loss_chunk, max(1, _HEAD_POSITIONS * self._shards // B))
      n_chunks = -(-S // chunk)
      split = lambda x: jnp.pad(x, ((0, 0), (0, n_chunks * chunk - S)) + ((0, 0),) * (x.ndim - 2)).reshape(
        B, n_chunks, chunk, *x.shape[2:]).swapaxes(0, 1)
      of_chunk = functools.partial(_target_scores, functools.partial(self._model.logits, params))
      scores = jax.lax.map(of_chunk, (split(hidden_BxSxD), split(targets_BxS)))
      return tuple(x.swapaxes(0, 1).reshape(B, n_chunks * chunk)[:, :S] for x in scores)


def _target_scores(logits: Callable[[jax.Array], jax.Array],
                   pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
  hidden_BxCxD, targets_BxC = pair
  logits_BxCxV = logits(hidden_BxCxD)
  target_BxC = jnp.take_along_axis(logits_BxCxV, targets_BxC[..., None], axis=-1)[..., 0]
  nll_BxC = jax.nn.logsumexp(logits_BxCxV, axis=-1) - target_BxC
  return nll_BxC, jnp.argmax(logits_BxCxV, axis=-1) == targets_BxC
