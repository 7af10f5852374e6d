"""Sampling from a mixture of domains: the example at global position p is a pure function of (seed, p).

Positions are cut into blocks.  In every block domain j is drawn exactly n_j times (`block_counts`), its draws spread
evenly over the block (a random time in each n_j-th of it), so that short runs see the mixture too.  The k-th draw of
domain j, counted over all blocks, reads record perm_epoch(k mod size_j) with epoch = k // size_j: a domain is read
without repetition until it is used up, then again in another order.

Nothing is carried from batch to batch, so resuming costs nothing, and processes that read different rows of a batch
agree on it without talking.  Randomness is keyed by domain *name*: adding a domain leaves the reading order of the
others as it was (only where their draws fall changes, with their counts).
"""

import hashlib
import json
import math
import operator
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from datasel import workdir

_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 16  # with 8, the permutations of 5 or 6 records are visibly not uniform


class Sampler(grain.IterDataset):
  """Infinite batches drawn from `store` by a mixture; a grain dataset whose elements are whole batches.

  store: a `datasel.data.store.Store`, or anything with its `domains`, `digest`, `sizes` and `read`.
  weights_M: float64, in the order of `store.domains`, summing to 1; a domain of weight 0 is never drawn.
  batch_size: examples of the global batch.
  rows: int64, rising: the rows of the global batch that this process reads (`process_rows`); default all of them.
  block: positions in which the mixture is met exactly (largest remainder).
  """

  def __init__(self, store: Any, split: str, weights_M: Sequence[float] | np.ndarray, batch_size: int, *, seed: int,
               block: int = 65536, rows: np.ndarray | None = None):
    super().__init__()
    # Plain integers: what is counted with them goes into JSON.
    batch_size, block, seed = (operator.index(number) for number in (batch_size, block, seed))
    if batch_size < 1 or block < 1 or seed < 0:
      raise ValueError(f'batch_size {batch_size} and block {block} must be at least 1 and seed {seed} at least 0')
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    if rows.ndim != 1 or not rows.size or rows[0] < 0 or rows[-1] >= batch_size or (np.diff(rows) < 1).any():
      raise ValueError(f'rows {rows} are not rows of a batch of {batch_size}; want rising numbers from 0 to '
                       f'{batch_size - 1}')
    self.store, self.split, self.batch_size, self.rows, self.block = store, split, batch_size, rows, block
    self.counts_M = block_counts(weights_M, block, store.domains)
    self.sizes_M = np.asarray(store.sizes(split), np.int64)
    empty = [name for name, count, size in zip(store.domains, self.counts_M, self.sizes_M) if count and not size]
    if empty:
      raise ValueError(f'domains {empty} have a positive weight but no sequence in split {split!r}; set it to 0')
    self._seed = seed
    self._identity = {
        'seed': seed, 'block': block, 'split': split, 'store': store.digest[:16],
        'mixture': workdir.digest(dict(zip(store.domains, self.counts_M.tolist())))[:16]}
    self._planned: tuple[int, np.ndarray, np.ndarray] = (-1, np.zeros(0, np.int32), np.zeros(0, np.int64))

  def __iter__(self) -> 'SamplerIterator':
    return SamplerIterator(self)

  def plan(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """(domain_N int32, record_N int64) read at global positions first..last-1.  Costs one sort per block touched."""
    if not 0 <= first <= last:
      raise ValueError(f'positions {first} to {last} are not a range; want 0 <= first <= last')
    parts = [(np.zeros(0, np.int32), np.zeros(0, np.int64))]
    while first < last:
      block, start = divmod(first, self.block)
      stop = min(self.block, start + last - first)
      parts.append(tuple(values_N[start:stop] for values_N in self._plan_block(block)))
      first += stop - start
    domain_N, record_N = (np.concatenate(values) for values in zip(*parts))
    return domain_N, record_N

  def epochs(self, position: int) -> np.ndarray:
    """float64 [M]: how many times each domain has been read through when `position` examples have been drawn."""
    block, rest = divmod(position, self.block)
    domain_N, _ = self.plan(position - rest, position)
    draws_M = block * self.counts_M + np.bincount(domain_N, minlength=len(self.counts_M))
    return draws_M / np.maximum(self.sizes_M, 1)

  def state(self, position: int) -> dict[str, Any]:
    """What a checkpoint holds: a few JSON values, the same on every process."""
    return {'position': position, **self._identity}

  def position(self, state: dict[str, Any]) -> int:
    """The position in a saved state; ValueError if it is of another store, split, mixture, block or seed."""
    differ = [f'{key} {state.get(key)!r} (this run: {value!r})'
              for key, value in self._identity.items() if state.get(key) != value]
    if differ:
      raise ValueError(f'the sampler state to restore is of another run: {", ".join(differ)}; '
                       'use that data, mixture and seed, or start a new run')
    position = state.get('position')
    if not isinstance(position, int) or position < 0:
      raise ValueError(f'sampler state has position {position!r}, want an integer >= 0')
    return position

  def _plan_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
    planned, domain_N, record_N = self._planned
    if planned != block:
      times, records = zip(*(self._draws(j, block) for j in range(len(self.counts_M))))
      order_N = np.argsort(np.concatenate(times), kind='stable')
      domain_N = np.repeat(np.arange(len(times), dtype=np.int32), self.counts_M)[order_N]
      record_N = np.concatenate(records)[order_N]
      # One assignment: the prefetch thread and the caller of `epochs` may both be here.
      self._planned = (block, domain_N, record_N)
    return domain_N, record_N

  def _draws(self, j: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(time_N in [0, 1), record_N) of the draws of domain j in a block, in order of time."""
    name, count, size = self.store.domains[j], int(self.counts_M[j]), int(self.sizes_M[j])
    # Raw words, not Generator.random: numpy promises the same raw words in every release.
    words_N = np.random.Philox(key=np.array([_key('time', self._seed, name), block], np.uint64)).random_raw(count)
    time_N = (np.arange(count) + (words_N >> 11) * 2.0**-53) / max(count, 1)
    epoch_N, index_N = np.divmod(block * count + np.arange(count, dtype=np.int64), max(size, 1))
    key_N = _mixed(_key('record', self._seed, name) + epoch_N.astype(np.uint64) * _GOLDEN)
    return time_N, permuted(index_N, size, key_N)


class SamplerIterator(grain.DatasetIterator):
  """The iterator of a `Sampler`; its state is a position."""

  def __init__(self, sampler: Sampler):
    super().__init__()
    self._sampler, self._position = sampler, 0

  def __next__(self) -> dict[str, np.ndarray]:
    sampler = self._sampler
    domain_B, record_B = sampler.plan(self._position, self._position + sampler.batch_size)
    batch = sampler.store.read(sampler.split, domain_B[sampler.rows], record_B[sampler.rows])
    self._position += sampler.batch_size
    return batch

  def get_state(self) -> dict[str, Any]:
    return self._sampler.state(self._position)

  def set_state(self, state: dict[str, Any]) -> None:
    self._position = self._sampler.position(state)


def batches(sampler: grain.IterDataset, prefetch: int = 2) -> grain.DatasetIterator:
  """The iterator a training loop uses: `prefetch` batches are read ahead by a thread.

  `get_state` and `set_state` speak of the batches the caller has taken, never of those read ahead.  Call `close` when
  done (`contextlib.closing` does), or the thread lives until the interpreter ends.
  """
  return iter(grain.experimental.ThreadPrefetchIterDataset(sampler, prefetch_buffer_size=prefetch))


def process_rows(batch_sharding: Any, batch_size: int) -> np.ndarray:
  """int64, rising: the rows of the global batch that the devices of this process hold, for `Sampler(rows=...)`.

  batch_sharding: the jax sharding of a [batch_size] array.  Not computed from the process index: two processes that
  share a data-parallel shard (tensor parallelism across hosts) must be fed the same rows, and a mesh that follows the
  wires of a pod may give a process shards that are not neighbours.
  """
  held = batch_sharding.addressable_devices_indices_map((batch_size,)).values()
  return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held]))


def block_counts(weights_M: Sequence[float] | np.ndarray, block: int, domains: Sequence[str]) -> np.ndarray:
  """int64 [M] summing to `block`: largest-remainder rounding of block * weights, ties to the earlier domain.

  Raises ValueError for weights that are not a mixture, or when a positive weight rounds to no draw at all.
  """
  weights_M = np.asarray(weights_M, np.float64)
  if weights_M.shape != (len(domains),):
    raise ValueError(f'weights have shape {weights_M.shape}, want one for each of the {len(domains)} domains '
                     f'{list(domains)}')
  if not (np.isfinite(weights_M).all() and (weights_M >= 0).all() and abs(math.fsum(weights_M) - 1) <= 1e-6):
    raise ValueError(f'weights must be finite, >= 0 and sum to 1, got {dict(zip(domains, weights_M.tolist()))}; '
                     'datasel.data.mixture.normalised makes them so')
  # Rounded to 1e-9 of a draw, so that floating-point noise neither moves a whole number down nor breaks a tie.
  quota_M = np.round(block * (weights_M / math.fsum(weights_M)), 9)
  counts_M = np.floor(quota_M).astype(np.int64)
  by_remainder_M = np.argsort(-np.round(quota_M - counts_M, 9), kind='stable')
  counts_M[by_remainder_M[:block - counts_M.sum()]] += 1
  lost = [f'{domains[j]} {weights_M[j]:.3g}' for j in np.flatnonzero((weights_M > 0) & (counts_M == 0))]
  if lost:
    raise ValueError(f'in a block of {block} positions these domains would never be drawn: {", ".join(lost)}; raise '
                     f'`block` to {math.ceil(1 / weights_M[weights_M > 0].min())}, or set their weights to 0')
  return counts_M


def permuted(index_N: np.ndarray, size: int, key_N: np.ndarray) -> np.ndarray:
  """Where each index goes under the bijection of range(size) chosen by its key; any index alone, at O(1) cost.

  index_N: integers in [0, size).  key_N: uint64.  Returns int64 [N].
  A Feistel network on the cells of the smallest near-square table with at least `size` cells; an index that lands in
  one of the few cells too many walks on until it leaves them.
  """
  columns = math.isqrt(max(size - 1, 0)) + 1
  rows = -(-size // columns)
  cell_N = _scrambled(np.asarray(index_N).astype(np.uint64), rows, columns, key_N)
  while (outside := np.flatnonzero(cell_N >= size)).size:
    cell_N[outside] = _scrambled(cell_N[outside], rows, columns, key_N[outside])
  return cell_N.astype(np.int64)


def _scrambled(cell_N: np.ndarray, rows: int, columns: int, key_N: np.ndarray) -> np.ndarray:
  """One pass of the network: in turn, rows are shifted by a hash of the column and columns by a hash of the row."""
  here_N, there_N = np.divmod(cell_N, np.uint64(columns))
  moduli = (rows, columns)
  for r in range(_ROUNDS):
    modulus = moduli[r % 2]
    hash_N = _mixed(key_N + (there_N * _ROUNDS + r) * _GOLDEN)
    here_N = here_N + ((hash_N >> 32) * modulus >> 32)  # a number below the modulus, which is below 2**32
    here_N -= (here_N >= modulus) * np.uint64(modulus)
    here_N, there_N = there_N, here_N
  return here_N * columns + there_N


def _mixed(x_N: np.ndarray) -> np.ndarray:
  """SplitMix64's finaliser (Steele et al. 2014): every output bit depends on every input bit."""
  x_N = (x_N ^ (x_N >> 30)) * 0xBF58476D1CE4E5B9
  x_N = (x_N ^ (x_N >> 27)) * 0x94D049BB133111EB
  return x_N ^ (x_N >> 31)


def _key(role: str, seed: int, domain: str) -> int:
  return int.from_bytes(hashlib.blake2b(json.dumps([role, seed, domain]).encode(), digest_size=8).digest(), 'little')
