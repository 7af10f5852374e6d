"""What a model says of records of a token store's training split, computed once and kept on disk.

  DIRECTORY/records-DOMAIN.npy   int64, sorted record numbers of that domain
  DIRECTORY/NAME.npy             float32 [rows, ...]; domain after domain in the store's order, records in order
  DIRECTORY/manifest.json        what they were made from, and their sha256; written last
"""

import dataclasses
import json
import logging
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from datasel import metrics, processes, sharding, train, workdir
from datasel.data import sampler
from datasel.data.store import Store

_AGREE_EVERY = 8  # batches between two at which several processes ask each other whether to stop
_MANIFEST, _PARTIAL = 'manifest.json', 'partial.json'


@dataclasses.dataclass(frozen=True)
class Quantity:
  """What is computed of each record."""

  name: str  # of its file: 'nll'
  words: str  # in messages: 'reference loss'
  shape: tuple[int, ...]  # of one record's value: (L,), or ()
  if_not_finite: str  # what is wrong then, and what to do


class RowValues:
  """Finished values."""

  def __init__(self, directory: pathlib.Path, quantity: Quantity, store: Store, *, verify: bool = True):
    """Raises ValueError for files of another store or, with `verify`, damaged ones."""
    manifest = workdir.read_json(directory / _MANIFEST)
    if manifest['store'] != store.digest:
      raise ValueError(f'{directory} holds values of another token store than {store.path}; delete it to compute them '
                       'again')
    for name, wanted in manifest['files'].items() if verify else ():
      got = workdir.digest_file(directory / name) if (directory / name).exists() else 'no file'
      if got != wanted:
        raise ValueError(f'{directory / name} is damaged (sha256 {got[:12]}, want {wanted[:12]}); delete {directory} '
                         'to compute it again')
    self.directory, self.quantity = directory, quantity
    self.digest: str = workdir.digest(manifest['files'])
    self._domains = store.domains
    self._records = [np.load(directory / _records_file(name)) for name in store.domains]
    self._offset_M = _offsets(self._records)
    self._values = np.load(directory / f'{quantity.name}.npy', mmap_mode='r')

  def of(self, domain_B: np.ndarray, record_B: np.ndarray) -> np.ndarray:
    """float32 [B, ...]; KeyError names a record that was not computed."""
    rows_B = np.empty(len(domain_B), np.int64)
    for domain in np.unique(domain_B):
      mine_B = domain_B == domain
      records, wanted = self._records[domain], record_B[mine_B]
      at = np.minimum(np.searchsorted(records, wanted), max(len(records) - 1, 0))
      if not len(records) or (records[at] != wanted).any():
        raise KeyError(f'{self.directory} has no {self.quantity.words} for all of {self._domains[domain]} records '
                       f'{wanted.tolist()}; delete it to compute them again')
      rows_B[mine_B] = self._offset_M[domain] + at
    return np.asarray(self._values[rows_B], np.float32)

  def by_domain(self) -> dict[str, np.ndarray]:
    """{domain: float32 [records of it, ...]}, still on disk, in the order of the sorted records."""
    ends = [*self._offset_M[1:], len(self._values)]
    return {name: self._values[first:last] for name, first, last in zip(self._domains, self._offset_M, ends)}


def compute(directory: pathlib.Path, quantity: Quantity, score: Callable[[Any, dict], jax.Array], params: Any,
            store: Store, mesh: jax.sharding.Mesh, records: list[np.ndarray], *, batch_size: int, provenance: dict,
            stage: str, progress: metrics.Progress, flops_per_row: float, rules: sharding.Rules = sharding.RULES,
            read: Callable[[np.ndarray, np.ndarray], dict] | None = None) -> RowValues:
  """Computes what is missing of `records` (one sorted array for each domain), resuming after a kill.

  score(params, batch) -> [B, ...], replicated over the mesh: a jitted program.  read(domain_B, record_B) gives a batch;
  default the store's own.  provenance: JSON that determines `score` and `params`; values left by others are computed
  again.  Each of several processes reads its rows, the first writes everything, and all return when that is done.
  Raises train.Interrupted after saving on SIGTERM or Ctrl-C.
  """
  file = _File(directory, quantity, store, records, provenance)
  done, finished = processes.from_lead(f'opening {directory.name}', file.open)
  progress.skip(done * flops_per_row)
  if not finished:
    read = read or (lambda domain_B, record_B: store.read('train', domain_B, record_B))
    _fill(file, done, score, params, read, mesh, rules, batch_size, stage, progress, flops_per_row)
    processes.from_lead(f'writing {directory.name}', file.finish)
  # One process proves the files; each would read all of them.
  return processes.together(f'opening {directory.name}',
                            lambda: RowValues(directory, quantity, store, verify=processes.lead()))


def _fill(file: '_File', done: int, score: Callable, params: Any, read: Callable, mesh: jax.sharding.Mesh,
          rules: sharding.Rules, batch_size: int, stage: str, progress: metrics.Progress, flops_per_row: float) -> None:
  """Computes the rows from `done` on."""
  n_rows, store, quantity = len(file.record_N), file.store, file.quantity
  rows = sampler.process_rows(sharding.batch_sharding(mesh, rules), batch_size)
  logging.info('stage %s: the %s of %s sequences', stage, quantity.words, f'{n_rows:,}')
  began = shown = time.perf_counter()
  since = done
  with train.stop_requests(_AGREE_EVERY) as stop:
    for n, start in enumerate(range(done, n_rows, batch_size)):
      index_B = np.minimum(start + rows, n_rows - 1)
      batch = read(file.domain_N[index_B], file.record_N[index_B])
      values = jax.device_get(score(params, sharding.put(mesh, batch, rules)))
      finite_B = np.isfinite(values).reshape(len(values), -1).all(-1)
      if not finite_B.all():
        row = min(start + int(finite_B.argmin()), n_rows - 1)
        [name] = store.names(file.domain_N[row:row + 1], file.record_N[row:row + 1])
        raise FloatingPointError(
          f'{stage}: the {quantity.words} of {name} is not finite: {quantity.if_not_finite}')
      file.write(start, values)
      stopping, now = stop.requested(n), time.perf_counter()
      if stopping or now - shown > 5 or start + batch_size >= n_rows:
        done = min(start + batch_size, n_rows)
        file.keep(done)
        progress.add((done - since) * flops_per_row, now - shown)
        rate = (done - since) / (now - shown)
        logging.info('%-18s %5d/%d  %.1fk tokens/s  stage %s left, run %s left', stage, done, n_rows,
                     rate * store.length / 1e3, metrics.clock((n_rows - done) / rate),
                     metrics.clock(progress.seconds_left))
        shown, since = now, done
      if stopping:
        raise train.Interrupted(f'{stage}: stopped after row {done} of {n_rows}, with all of them saved')
  logging.info('stage %s took %s', stage, metrics.clock(time.perf_counter() - began))


class _File:
  """What is on disk before the manifest is; only process 0 opens and writes it."""

  def __init__(self, directory: pathlib.Path, quantity: Quantity, store: Store, records: list[np.ndarray],
               provenance: dict):
    lengths = [len(r) for r in records]
    self.domain_N = np.repeat(np.arange(len(records), dtype=np.int32), lengths)
    self.record_N = np.concatenate(records)
    self.quantity, self.store = quantity, store
    self._directory, self._records, self._provenance = directory, records, provenance
    self._path = directory / f'{quantity.name}.npy'
    self._identity = workdir.digest({'store': store.digest, 'from': provenance,
                                     'records': [workdir.digest(r.tolist()) for r in records]})
    self._values: np.ndarray | None = None

  def open(self) -> tuple[int, bool]:
    """(rows already there, whether all is finished)."""
    directory, n_rows = self._directory, len(self.record_N)
    if (directory / _MANIFEST).exists() and workdir.read_json(directory / _MANIFEST)['identity'] == self._identity:
      return n_rows, True
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / _PARTIAL
    if partial.exists() and self._path.exists():
      left = json.loads(partial.read_text())
      if left['identity'] == self._identity:
        self._values = np.lib.format.open_memmap(self._path, 'r+')
        return left['rows'], False
    partial.unlink(missing_ok=True)
    (directory / _MANIFEST).unlink(missing_ok=True)
    self._values = np.lib.format.open_memmap(self._path, 'w+', np.float32, (n_rows, *self.quantity.shape))
    if hasattr(os, 'posix_fallocate'):  # a full disk is an error here, not a bus error at some later write
      with open(self._path, 'r+b') as f:
        os.posix_fallocate(f.fileno(), 0, os.fstat(f.fileno()).st_size)
    return 0, False

  def write(self, start: int, values: np.ndarray) -> None:
    """values: float32 [B, ...] of the rows from `start`; those past the end are not rows."""
    if self._values is not None:
      self._values[start:start + len(values)] = values[:len(self._values) - start]

  def keep(self, rows: int) -> None:
    """From here on, a kill costs none of the first `rows`."""
    if self._values is not None:
      self._values.flush()
      workdir.write_json(self._directory / _PARTIAL, {'identity': self._identity, 'rows': rows})

  def finish(self) -> None:
    names = self.store.domains
    for name, r in zip(names, self._records):
      with workdir.replacing(self._directory / _records_file(name)) as f:
        np.save(f, r)
    self._values.flush()
    written = [self._path.name, *map(_records_file, names)]
    files = {name: workdir.digest_file(self._directory / name) for name in written}
    workdir.write_json(self._directory / _MANIFEST, {
      'identity': self._identity, 'store': self.store.digest, 'from': self._provenance, 'rows': len(self.record_N),
      'files': files})
    (self._directory / _PARTIAL).unlink(missing_ok=True)


def _records_file(domain: str) -> str:
  return f'records-{domain}.npy'


def _offsets(records: list[np.ndarray]) -> np.ndarray:
  return np.concatenate([[0], np.cumsum([len(r) for r in records])[:-1]]).astype(np.int64)
