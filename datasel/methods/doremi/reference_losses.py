"""The reference model's loss of every token that the proxies will see, computed once and kept on disk.

A proxy step then costs what a plain step costs: it reads 4 bytes more per token.  Which examples a run will see is
known before it starts, because the sampler is a pure function; only those are computed.

  DIRECTORY/records-DOMAIN.npy   int64, sorted record numbers of that domain
  DIRECTORY/nll.npy              float32 [rows, L], nats; domain after domain in the store's order, records in order
  DIRECTORY/manifest.json        what they were made from, and their sha256; written last
"""

import json
import logging
import os
import pathlib
import time
from typing import Any

import jax
import numpy as np

from datasel import evaluate, metrics, processes, sharding, train, workdir
from datasel.data import sampler
from datasel.data.store import Store
from datasel.objectives import TokenNLL

_AGREE_EVERY = 8  # batches between two at which several processes ask each other whether to stop
_NLL, _MANIFEST, _PARTIAL = 'nll.npy', 'manifest.json', 'partial.json'


class ReferenceLosses:
  """Finished losses, added to batches as `reference_nll_BxL`."""

  def __init__(self, directory: pathlib.Path, store: Store, *, verify: bool = True):
    """Raises ValueError for files of another store or, with `verify`, damaged ones."""
    manifest = workdir.read_json(directory / _MANIFEST)
    if manifest['store'] != store.digest:
      raise ValueError(f'{directory} holds losses of another token store than {store.path}; delete it to compute them '
                       'again')
    for name, wanted in manifest['files'].items() if verify else ():
      got = workdir.digest_file(directory / name) if (directory / name).exists() else 'no file'
      if got != wanted:
        raise ValueError(f'{directory / name} is damaged (sha256 {got[:12]}, want {wanted[:12]}); delete {directory} '
                         'to compute the reference losses again')
    self._directory = directory
    self._domains = store.domains
    self._records = [np.load(directory / _records_file(name)) for name in store.domains]
    self._offset_M = _offsets(self._records)
    self._nll = np.load(directory / _NLL, mmap_mode='r')

  def add(self, batch: dict) -> dict:
    """The batch with `reference_nll_BxL`; KeyError names an example whose loss was not computed."""
    rows_B = np.empty(len(batch['domain_B']), np.int64)
    for domain in np.unique(batch['domain_B']):
      mine_B = batch['domain_B'] == domain
      records, wanted = self._records[domain], batch['example_B'][mine_B]
      at = np.minimum(np.searchsorted(records, wanted), max(len(records) - 1, 0))
      if not len(records) or (records[at] != wanted).any():
        raise KeyError(f'{self._directory} has no reference loss for all of {self._domains[domain]} records '
                       f'{wanted.tolist()}; delete it to compute them again')
      rows_B[mine_B] = self._offset_M[domain] + at
    return batch | {'reference_nll_BxL': np.asarray(self._nll[rows_B], np.float32)}


def visited(samplers: list[sampler.Sampler], steps: int) -> list[np.ndarray]:
  """For each domain the sorted record numbers that these samplers draw in `steps` batches."""
  seen: list[list[np.ndarray]] = [[] for _ in samplers[0].sizes_M]
  for one in samplers:
    for first in range(0, steps * one.batch_size, one.block):
      domain_N, record_N = one.plan(first, min(first + one.block, steps * one.batch_size))
      for domain, records in enumerate(seen):
        records.append(np.unique(record_N[domain_N == domain]))
  return [np.unique(np.concatenate(records)) for records in seen]


def compute(directory: pathlib.Path, token_nll: TokenNLL, params: Any, store: Store, mesh: jax.sharding.Mesh,
            records: list[np.ndarray], *, batch_size: int, provenance: dict, stage: str,
            progress: metrics.Progress, flops_per_row: float,
            rules: sharding.Rules = sharding.RULES) -> ReferenceLosses:
  """Computes what is missing of the losses of `records` (one sorted array a domain), resuming after a kill.

  provenance: JSON that determines the parameters; losses left by other parameters are computed again.
  Each of several processes reads its rows, the first writes everything, and all return when that is done.
  Raises train.Interrupted after saving on SIGTERM or Ctrl-C.
  """
  file = _File(directory, store, records, provenance)
  done, finished = processes.from_lead('opening the reference losses', file.open)
  progress.skip(done * flops_per_row)
  if not finished:
    _fill(file, done, token_nll, params, store, mesh, rules, batch_size, stage, progress, flops_per_row)
    processes.from_lead('writing the reference losses', file.finish)
  # One process proves the files; each would read all of them.
  return processes.together('opening the reference losses',
                            lambda: ReferenceLosses(directory, store, verify=processes.lead()))


def _fill(file: '_File', done: int, token_nll: TokenNLL, params: Any, store: Store, mesh: jax.sharding.Mesh,
          rules: sharding.Rules, batch_size: int, stage: str, progress: metrics.Progress, flops_per_row: float) -> None:
  """Computes the rows from `done` on."""
  n_rows = len(file.record_N)
  rows = sampler.process_rows(sharding.batch_sharding(mesh, rules), batch_size)

  score = evaluate.scorer(token_nll, mesh, rules)
  logging.info('stage %s: the reference losses of %s sequences', stage, f'{n_rows:,}')
  began = shown = time.perf_counter()
  since = done
  with train.stop_requests(_AGREE_EVERY) as stop:
    for n, start in enumerate(range(done, n_rows, batch_size)):
      index_B = np.minimum(start + rows, n_rows - 1)
      batch = store.read('train', file.domain_N[index_B], file.record_N[index_B])
      values = jax.device_get(score(params, sharding.put(mesh, batch, rules)))
      finite_B = np.isfinite(values).all(-1)
      if not finite_B.all():
        row = min(start + int(finite_B.argmin()), n_rows - 1)
        raise FloatingPointError(
          f'{stage}: the reference loss of {store.domains[file.domain_N[row]]}/{file.record_N[row]} is not finite: the '
          'reference model has diverged; lower optimizer.peak_lr')
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

  def __init__(self, directory: pathlib.Path, store: Store, records: list[np.ndarray], provenance: dict):
    lengths = [len(r) for r in records]
    self.domain_N = np.repeat(np.arange(len(records), dtype=np.int32), lengths)
    self.record_N = np.concatenate(records)
    self._directory, self._store, self._records, self._provenance = directory, store, records, provenance
    self._identity = workdir.digest({'store': store.digest, 'from': provenance,
                                     'records': [workdir.digest(r.tolist()) for r in records]})
    self._nll: np.ndarray | None = None

  def open(self) -> tuple[int, bool]:
    """(rows already there, whether all is finished)."""
    directory, n_rows = self._directory, len(self.record_N)
    if (directory / _MANIFEST).exists() and workdir.read_json(directory / _MANIFEST)['identity'] == self._identity:
      return n_rows, True
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / _PARTIAL
    if partial.exists() and (directory / _NLL).exists():
      left = json.loads(partial.read_text())
      if left['identity'] == self._identity:
        self._nll = np.lib.format.open_memmap(directory / _NLL, 'r+')
        return left['rows'], False
    partial.unlink(missing_ok=True)
    (directory / _MANIFEST).unlink(missing_ok=True)
    self._nll = np.lib.format.open_memmap(directory / _NLL, 'w+', np.float32, (n_rows, self._store.length))
    if hasattr(os, 'posix_fallocate'):  # a full disk is an error here, not a bus error at some later write
      with open(directory / _NLL, 'r+b') as f:
        os.posix_fallocate(f.fileno(), 0, os.fstat(f.fileno()).st_size)
    return 0, False

  def write(self, start: int, values: np.ndarray) -> None:
    """values: float32 [B, L] of the rows from `start`; those past the end are not rows."""
    if self._nll is not None:
      self._nll[start:start + len(values)] = values[:len(self._nll) - start]

  def keep(self, rows: int) -> None:
    """From here on, a kill costs none of the first `rows`."""
    if self._nll is not None:
      self._nll.flush()
      workdir.write_json(self._directory / _PARTIAL, {'identity': self._identity, 'rows': rows})

  def finish(self) -> None:
    names = self._store.domains
    for name, r in zip(names, self._records):
      with workdir.replacing(self._directory / _records_file(name)) as f:
        np.save(f, r)
    self._nll.flush()
    files = {name: workdir.digest_file(self._directory / name) for name in [_NLL, *map(_records_file, names)]}
    workdir.write_json(self._directory / _MANIFEST, {
      'identity': self._identity, 'store': self._store.digest, 'from': self._provenance, 'rows': len(self.record_N),
      'length': self._store.length, 'files': files})
    (self._directory / _PARTIAL).unlink(missing_ok=True)


def _records_file(domain: str) -> str:
  return f'records-{domain}.npy'


def _offsets(records: list[np.ndarray]) -> np.ndarray:
  return np.concatenate([[0], np.cumsum([len(r) for r in records])[:-1]]).astype(np.int64)
