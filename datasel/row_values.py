"""What a model says of records of a token store's training split, computed once and kept on disk.

  DIRECTORY/records-DOMAIN.npy   int64, sorted record numbers of that domain; of domains computed in part alone
  DIRECTORY/NAME.npy             float32 [rows, ...]; domain after domain in the store's order, records in order
  DIRECTORY/manifest.json        what they were made from, and sha256: of the values of each shard of the store, and of
                                 every other file; written last
"""

import dataclasses
import hashlib
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

Records = np.ndarray | range  # of one domain: sorted record numbers, or all of them without a list


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
        raise ValueError(f'{directory / name} is damaged (sha256 {got[:12]}, want {wanted[:12]}); {_remedy(directory)}')
    self.directory, self.quantity = directory, quantity
    self.digest: str = workdir.digest([manifest['files'], manifest['shards']])
    self._domains = store.domains
    self._records: list[Records] = [
      np.load(directory / _records_file(name)) if _records_file(name) in manifest['files'] else range(int(size))
      for name, size in zip(store.domains, store.sizes('train'))]
    self._offset_M = _offsets(self._records)
    self._values = _mapped(directory, quantity, manifest['rows'])
    if verify:
      for name, digests in _shard_digests(self._values, store, self._records).items():
        bad = [n for n, pair in enumerate(zip(digests, manifest['shards'][name], strict=True)) if len(set(pair)) > 1]
        if bad:
          raise ValueError(f'{directory / quantity.name}.npy is damaged: the values of shard {bad[0]} of {name} '
                           f'({len(bad)} such shards of it); {_remedy(directory)}')

  def of(self, domain_B: np.ndarray, record_B: np.ndarray) -> np.ndarray:
    """float32 [B, ...]; KeyError names a record that was not computed."""
    rows_B = np.empty(len(domain_B), np.int64)
    for domain in np.unique(domain_B):
      mine_B = domain_B == domain
      wanted = record_B[mine_B]
      at, there = _places(self._records[domain], wanted)
      if not there.all():
        raise KeyError(f'{self.directory} has no {self.quantity.words} for all of {self._domains[domain]} records '
                       f'{wanted.tolist()}; delete it to compute them again')
      rows_B[mine_B] = self._offset_M[domain] + at
    return np.asarray(self._values[rows_B], np.float32)

  def by_domain(self) -> dict[str, np.ndarray]:
    """{domain: float32 [records of it, ...]}, still on disk, in the order of the sorted records."""
    ends = [*self._offset_M[1:], len(self._values)]
    return {name: self._values[first:last] for name, first, last in zip(self._domains, self._offset_M, ends)}


def compute(directory: pathlib.Path, quantity: Quantity, score: Callable[[Any, dict], jax.Array], params: Any,
            store: Store, mesh: jax.sharding.Mesh, records: list[Records], *, batch_size: int, provenance: dict,
            stage: str, progress: metrics.Progress, flops_per_row: float, rules: sharding.Rules = sharding.RULES,
            read: Callable[[np.ndarray, np.ndarray], dict] | None = None) -> RowValues:
  """Computes what is missing of `records` (one sorted array for each domain, or the range of all), resuming after a
  kill.

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
  n_rows, store, quantity = file.rows, file.store, file.quantity
  rows = sampler.process_rows(sharding.batch_sharding(mesh, rules), batch_size)
  logging.info('stage %s: the %s of %s sequences', stage, quantity.words, f'{n_rows:,}')
  began = shown = time.perf_counter()
  since = done
  with train.stop_requests(_AGREE_EVERY) as stop:
    for n, start in enumerate(range(done, n_rows, batch_size)):
      index_B = np.minimum(start + rows, n_rows - 1)
      batch = read(*file.records(index_B))
      values = jax.device_get(score(params, sharding.put(mesh, batch, rules)))
      finite_B = np.isfinite(values).reshape(len(values), -1).all(-1)
      if not finite_B.all():
        row = min(start + int(finite_B.argmin()), n_rows - 1)
        [name] = store.names(*file.records(np.array([row])))
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

  def __init__(self, directory: pathlib.Path, quantity: Quantity, store: Store, records: list[Records],
               provenance: dict):
    self.rows = sum(map(len, records))
    self.quantity, self.store = quantity, store
    self._directory, self._records, self._provenance = directory, records, provenance
    self._path = directory / f'{quantity.name}.npy'
    self._identity = workdir.digest({'store': store.digest, 'from': provenance,
                                     'records': list(map(_identity, records))})
    self._offset_M = _offsets(records)
    self._values: np.ndarray | None = None

  def records(self, index_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(domain_B, record_B) of rows."""
    domain_B = np.searchsorted(self._offset_M, index_B, side='right') - 1
    record_B = index_B - self._offset_M[domain_B]
    for domain in np.unique(domain_B):
      if not isinstance(self._records[domain], range):
        mine_B = domain_B == domain
        record_B[mine_B] = self._records[domain][record_B[mine_B]]
    return domain_B.astype(np.int32), record_B

  def open(self) -> tuple[int, bool]:
    """(rows already there, whether all is finished)."""
    directory, n_rows = self._directory, self.rows
    if (directory / _MANIFEST).exists() and workdir.read_json(directory / _MANIFEST)['identity'] == self._identity:
      return n_rows, True
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / _PARTIAL
    if partial.exists() and self._path.exists():
      left = json.loads(partial.read_text())
      if left['identity'] == self._identity:
        try:
          _mapped(directory, self.quantity, n_rows)
        except ValueError as e:
          logging.warning('begun again: %s', e)
        else:
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
    in_part = {_records_file(name): r for name, r in zip(self.store.domains, self._records) if not isinstance(r, range)}
    for name, r in in_part.items():
      with workdir.replacing(self._directory / name) as f:
        np.save(f, r)
    self._values.flush()
    workdir.write_json(self._directory / _MANIFEST, {
      'identity': self._identity, 'store': self.store.digest, 'from': self._provenance, 'rows': self.rows,
      'files': {name: workdir.digest_file(self._directory / name) for name in in_part},
      'shards': _shard_digests(self._values, self.store, self._records)})
    (self._directory / _PARTIAL).unlink(missing_ok=True)


def _remedy(directory: pathlib.Path) -> str:
  return f'delete {directory} to compute it again'


def _mapped(directory: pathlib.Path, quantity: Quantity, rows: int) -> np.ndarray:
  """The values, still on disk; ValueError where the file is missing or no array of their shape."""
  path = directory / f'{quantity.name}.npy'
  try:
    values = np.load(path, mmap_mode='r')
  except (OSError, ValueError, EOFError) as e:
    raise ValueError(f'{path} is damaged ({e if path.exists() else "no file"}); {_remedy(directory)}') from e
  if values.shape != (rows, *quantity.shape) or values.dtype != np.float32:
    raise ValueError(f'{path} is damaged ({values.dtype} {list(values.shape)}, want float32 '
                     f'{[rows, *quantity.shape]}); {_remedy(directory)}')
  return values


def _shard_digests(values: np.ndarray, store: Store, records: list[Records]) -> dict[str, list[str]]:
  """{domain: sha256 of the values of the records in each of its shards}; a store seen through a selection has no shards
  of its own: one for each domain."""
  digests, counts = {}, store.counts('train')
  for name, first, kept in zip(store.domains, _offsets(records), records):
    ends = np.cumsum([shard['records'] for shard in counts[name].get('shards', [])[:-1]], dtype=np.int64)
    inside = np.minimum(ends, len(kept)) if isinstance(kept, range) else np.searchsorted(kept, ends)
    parts = np.split(values[first:first + len(kept)], inside)
    digests[name] = [hashlib.sha256(np.ascontiguousarray(part, '<f4')).hexdigest() for part in parts]
  return digests


def _places(records: Records, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(where each of these records is among them, whether it is)."""
  if isinstance(records, range):
    return wanted, (0 <= wanted) & (wanted < len(records))
  at = np.minimum(np.searchsorted(records, wanted), max(len(records) - 1, 0))
  return at, records[at] == wanted if len(records) else np.zeros(len(wanted), bool)


def _identity(records: Records) -> str:
  return f'{len(records)} from 0' if isinstance(records, range) else hashlib.sha256(
    np.ascontiguousarray(records, '<i8')).hexdigest()


def _records_file(domain: str) -> str:
  return f'records-{domain}.npy'


def _offsets(records: list[Records]) -> np.ndarray:
  return np.concatenate([[0], np.cumsum([len(r) for r in records])[:-1]]).astype(np.int64)
