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

from datasel import metrics, sharding, workdir
from datasel.data import sampler
from datasel.data.store import Store
from datasel.objectives import TokenNLL

_NLL, _MANIFEST, _PARTIAL = 'nll.npy', 'manifest.json', 'partial.json'


class ReferenceLosses:
  """Finished losses, added to batches as `reference_nll_BxL`."""

  def __init__(self, directory: pathlib.Path, store: Store):
    """Raises ValueError for files that are damaged or of another store."""
    manifest = workdir.read_json(directory / _MANIFEST)
    if manifest['store'] != store.digest:
      raise ValueError(f'{directory} holds losses of another token store than {store.path}; delete it to compute them '
                       'again')
    for name, wanted in manifest['files'].items():
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
            progress: metrics.Progress, flops_per_row: float) -> ReferenceLosses:
  """Computes what is missing of the losses of `records` (one sorted array a domain), resuming after a kill.

  provenance: JSON that determines the parameters; losses left by other parameters are computed again.
  """
  lengths = [len(r) for r in records]
  identity = workdir.digest({'store': store.digest, 'from': provenance,
                             'records': [workdir.digest(r.tolist()) for r in records]})
  if (directory / _MANIFEST).exists() and workdir.read_json(directory / _MANIFEST)['identity'] == identity:
    progress.skip(sum(lengths) * flops_per_row)
    return ReferenceLosses(directory, store)

  n_rows = sum(lengths)
  domain_N = np.repeat(np.arange(len(records), dtype=np.int32), lengths)
  record_N = np.concatenate(records)
  lead = jax.process_index() == 0
  done, nll = 0, None
  if lead:
    done, nll = _open(directory, identity, n_rows, store.length)
  first, last = sampler.process_rows(sharding.batch_sharding(mesh), batch_size)

  def whole(params, batch):
    with sharding.use(mesh):
      return token_nll(params, batch)

  whole = jax.jit(whole, out_shardings=sharding.replicated(mesh))
  logging.info('stage %s: the reference losses of %s sequences', stage, f'{n_rows:,}')
  began = shown = time.perf_counter()
  since = done
  for start in range(done, n_rows, batch_size):
    index_B = np.minimum(np.arange(start + first, start + last), n_rows - 1)
    batch = store.read('train', domain_N[index_B], record_N[index_B])
    values = jax.device_get(whole(params, sharding.put(mesh, batch)))
    finite_B = np.isfinite(values).all(-1)
    if not finite_B.all():
      row = min(start + int(finite_B.argmin()), n_rows - 1)
      raise FloatingPointError(f'{stage}: the reference loss of {store.domains[domain_N[row]]}/{record_N[row]} is not '
                               'finite: the reference model has diverged; lower optimizer.peak_lr')
    if lead:
      nll[start:start + batch_size] = values[:n_rows - start]
    now = time.perf_counter()
    if now - shown > 5 or start + batch_size >= n_rows:
      done = min(start + batch_size, n_rows)
      if lead:
        nll.flush()
        workdir.write_json(directory / _PARTIAL, {'identity': identity, 'rows': done})
      progress.add((done - since) * flops_per_row, now - shown)
      rate = (done - since) / (now - shown)
      logging.info('%-18s %5d/%d  %.1fk tokens/s  stage %s left, run %s left', stage, done, n_rows,
                   rate * store.length / 1e3, metrics.clock((n_rows - done) / rate),
                   metrics.clock(progress.seconds_left))
      shown, since = now, done
  logging.info('stage %s took %s', stage, metrics.clock(time.perf_counter() - began))
  if lead:
    for name, r in zip(store.domains, records):
      with workdir.replacing(directory / _records_file(name)) as f:
        np.save(f, r)
    nll.flush()
    files = {name: workdir.digest_file(directory / name) for name in [_NLL, *map(_records_file, store.domains)]}
    workdir.write_json(directory / _MANIFEST, {
      'identity': identity, 'store': store.digest, 'from': provenance, 'rows': n_rows, 'length': store.length,
      'files': files})
    (directory / _PARTIAL).unlink(missing_ok=True)
  return ReferenceLosses(directory, store)


def _open(directory: pathlib.Path, identity: str, n_rows: int, length: int) -> tuple[int, np.ndarray]:
  """(rows already there, the file open for writing)."""
  directory.mkdir(parents=True, exist_ok=True)
  partial = directory / _PARTIAL
  if partial.exists() and (directory / _NLL).exists():
    left = json.loads(partial.read_text())
    if left['identity'] == identity:
      return left['rows'], np.lib.format.open_memmap(directory / _NLL, 'r+')
  partial.unlink(missing_ok=True)
  (directory / _MANIFEST).unlink(missing_ok=True)
  nll = np.lib.format.open_memmap(directory / _NLL, 'w+', np.float32, (n_rows, length))
  if hasattr(os, 'posix_fallocate'):  # a full disk is an error here, not a bus error at some later write
    with open(directory / _NLL, 'r+b') as f:
      os.posix_fallocate(f.fileno(), 0, os.fstat(f.fileno()).st_size)
  return 0, nll


def _records_file(domain: str) -> str:
  return f'records-{domain}.npy'


def _offsets(records: list[np.ndarray]) -> np.ndarray:
  return np.concatenate([[0], np.cumsum([len(r) for r in records])[:-1]]).astype(np.int64)
