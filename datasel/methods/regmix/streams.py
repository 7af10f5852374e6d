"""The batches of many proxies as one: each reads what `data.sampler.Sampler` of its own mixture gives it alone."""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from datasel import workdir
from datasel.data import sampler as sampler_lib


class Streams(grain.IterDataset):
  """Infinite batches of `padded` x B rows over one store, proxy after proxy; those past the mixtures are copies of the
  last one's.  All proxies have one seed: two of them read a domain's records in the same order, at their own speeds.

  weights_PxM: float64, one mixture a row, as `Sampler` takes it.  names: what the mixtures are called in errors.
  rows: int64, rising: the rows of the padded batch that this process reads (`sampler.process_rows`).
  """

  def __init__(self, store: Any, weights_PxM: np.ndarray, batch_size: int, *, seed: int, block: int, padded: int,
               rows: np.ndarray, names: Sequence[str]):
    super().__init__()
    self.store, self.batch_size, self.block = store, batch_size, block
    self._samplers = [_sampler(name, store, weights_M, batch_size, seed=seed, block=block)
                      for name, weights_M in zip(names, weights_PxM, strict=True)]
    self.counts_PxM = np.stack([sampler.counts_M for sampler in self._samplers])
    proxy_N = np.minimum(np.arange(padded), len(self._samplers) - 1)
    self._proxies, place_N = np.unique(proxy_N[rows // batch_size], return_inverse=True)
    self._flat_N = place_N * batch_size + rows % batch_size  # into the planned rows of these proxies
    self._identity = workdir.digest([sampler.state(0) for sampler in self._samplers])

  def __iter__(self) -> 'StreamsIterator':
    return StreamsIterator(self)

  def read(self, position: int) -> dict[str, np.ndarray]:
    """The rows at each proxy's positions position ... position + B - 1."""
    plans = [self._samplers[p].plan(position, position + self.batch_size) for p in self._proxies]
    domain_N, record_N = (np.concatenate(values)[self._flat_N] for values in zip(*plans))
    return self.store.read('train', domain_N, record_N)

  def state(self, position: int) -> dict[str, Any]:
    """What a checkpoint holds: a few JSON values, the same on every process."""
    return {'position': position, 'streams': self._identity}

  def position(self, state: dict[str, Any]) -> int:
    """The position in a saved state; ValueError if it is of other mixtures or another store, seed or block."""
    if state.get('streams') != self._identity:
      raise ValueError('the state to restore is of a swarm of other mixtures, or of another store, seed or block; use '
                       'those, or another workdir')
    return state['position']


class StreamsIterator(grain.DatasetIterator):
  """The iterator of `Streams`; its state is a position, the same for all proxies."""

  def __init__(self, streams: Streams):
    super().__init__()
    self._streams, self._position = streams, 0

  def __next__(self) -> dict[str, np.ndarray]:
    batch = self._streams.read(self._position)
    self._position += self._streams.batch_size
    return batch

  def get_state(self) -> dict[str, Any]:
    return self._streams.state(self._position)

  def set_state(self, state: dict[str, Any]) -> None:
    self._position = self._streams.position(state)


def _sampler(name: str, store: Any, weights_M: np.ndarray, batch_size: int, **options: Any) -> sampler_lib.Sampler:
  try:
    return sampler_lib.Sampler(store, 'train', weights_M, batch_size, **options)
  except ValueError as e:
    raise ValueError(f'mixture {name}: {e}') from e
