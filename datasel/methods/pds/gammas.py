"""The scores of proxy records by the solver, from several checkpoints of the proxy model.

  WORKDIR/pmp/checkpoint-STEP/     the solver's progress from that checkpoint, its trace.json, and in the end gamma.npy
                                   with a manifest.json
  WORKDIR/pmp/gammas.npz           domain_N, record_N, gamma_N: which records, and their mean scores
  WORKDIR/pmp/manifest.json        its digest; written last
"""

import functools
import logging
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from datasel import build, metrics, objectives, processes, sharding, workdir
from datasel.checkpoint import Checkpoints
from datasel.data import mixture as mixture_lib
from datasel.data import sampler as sampler_lib
from datasel.data.store import Store
from datasel.methods.pds import pmp
from datasel.methods.pds.target import Target

_KEYS = ('tokens_BxL', 'targets_BxL', 'loss_mask_BxL', 'segment_BxL', 'position_BxL')


def drawn(seed: int, store: Store, n: int) -> tuple[np.ndarray, np.ndarray]:
  """(domain_N, record_N) of n records of the training split in random order, none of them twice, all as likely."""
  sizes_M = store.sizes('train')
  total = int(sizes_M.sum())
  if n > total:
    raise ValueError(f'config.pds.proxies is {n}, but {store.path} has {total} sequences to train on; want at most '
                     'that many')
  flat_N = sampler_lib.permuted(np.arange(n), total, np.full(n, seed, np.uint64))
  domain_N = np.searchsorted(np.cumsum(sizes_M), flat_N, side='right')
  return domain_N, flat_N - (np.cumsum(sizes_M) - sizes_M)[domain_N]


def compute(run: build.Run, proxy: build.Stage, target: Target, stage: build.Stage) -> dict[str, np.ndarray]:
  """Scores of config.pds.proxies records, a mean over the proxy's kept checkpoints; done once, resumed after a kill."""
  config, section, store = run.config, run.config.pds, run.store
  folder = run.directory / stage.name
  domain_N, record_N = drawn(build.seed_for(config, 'pmp-proxies'), store, section.proxies)
  if not (folder / 'manifest.json').exists():
    total_N, steps = np.zeros(section.proxies), checkpoint_steps(section)
    losses = objectives.per_example(proxy.model.token_nll)  # one function: one compiled program for all of them
    for step in steps:
      total_N += _from_checkpoint(run, losses, proxy, stage, step, target, domain_N, record_N)
    processes.from_lead('writing the scores', lambda: _write(folder, domain_N, record_N, total_N / len(steps), steps))
  else:
    run.progress.skip(stage.flops)
  with np.load(_proven(folder / 'gammas.npz'), allow_pickle=False) as kept:
    return {name: kept[name] for name in ('domain_N', 'record_N', 'gamma_N')}


def _proven(path: pathlib.Path) -> pathlib.Path:
  """A file that the manifest beside it lists; ValueError where it is missing or another."""
  if not path.exists() or workdir.digest_file(path) != workdir.read_json(path.parent / 'manifest.json')['sha256']:
    raise ValueError(f'{path} is {"damaged" if path.exists() else "missing"}; delete {path.parent} to compute it again')
  return path


def checkpoint_steps(section: Any) -> list[int]:
  """The proxy's steps that are solved from."""
  every = section.steps // section.checkpoints
  return [every * (n + 1) for n in range(section.checkpoints)]


def _write(folder: pathlib.Path, domain_N: np.ndarray, record_N: np.ndarray, gamma_N: np.ndarray,
           steps: list[int]) -> None:
  with workdir.replacing(folder / 'gammas.npz') as f:
    np.savez(f, domain_N=domain_N, record_N=record_N, gamma_N=gamma_N)
  workdir.write_json(folder / 'manifest.json', {
    'sha256': workdir.digest_file(folder / 'gammas.npz'), 'proxies': len(gamma_N), 'checkpoints': steps})


def _from_checkpoint(run: build.Run, losses: pmp.PerExampleLoss, proxy: build.Stage, stage: build.Stage, step: int,
                     target: Target, domain_N: np.ndarray, record_N: np.ndarray) -> np.ndarray:
  """gamma_N of one initial state, kept in a file of its own when it is done."""
  config, section, store, mesh, rules = run.config, run.config.pds, run.store, run.mesh, build.rules(run.config)
  folder = run.directory / stage.name / f'checkpoint-{step}'
  share = stage.flops / section.checkpoints
  if (folder / 'manifest.json').exists():
    run.progress.skip(share)
    return np.load(_proven(folder / 'gamma.npy'), allow_pickle=False)
  logging.info('stage %s: %d steps from step %d of the proxy, scoring %s sequences', stage.name, section.horizon, step,
               f'{section.proxies:,}')
  abstract = build.stage_program(proxy, config, mesh).abstract_state.params
  with Checkpoints(run.directory / proxy.name / 'checkpoints', keep=2) as checkpoints:
    params = checkpoints.restore_params(abstract, step)

  weights_M = mixture_lib.by_examples(store).for_domains(store.domains)  # as the proxy was trained
  plan = sampler_lib.Sampler(store, 'train', weights_M, section.batch_size, block=config.data.block,
                             seed=build.seed_for(config, f'pmp-{step}')).plan(0, section.horizon * section.batch_size)
  place = functools.partial(put, mesh, rules)
  train = place(_stacked(store, *plan, section.batch_size))
  dev = [place({k: x[first:first + section.batch_size] for k, x in target.batch.items()})
         for first in range(0, len(target), section.batch_size)]
  shown = time.perf_counter()

  def report(values: dict) -> None:
    nonlocal shown
    if not len(values['step']):
      return
    now, since, shown = time.perf_counter(), shown, time.perf_counter()
    if processes.lead():
      _keep_trace(folder / 'trace.json', values)
    run.progress.add(share * len(values['step']) / (section.horizon + 1), now - since)
    logging.info('%-18s back to step %d of %d  J %.4f  |costate| %.3g  run %s left', stage.name,
                 values['step'].min(), section.horizon, values['dev_loss'][0], values['costate_norm'][0],
                 metrics.clock(run.progress.seconds_left))

  proxies = _Proxies(store, domain_N, record_N, section.score_batch, place)
  try:
    with sharding.use(mesh, rules):
      gamma_N = pmp.solve(
        losses, params, train, proxies, dev, learning_rate=section.learning_rate, score_stride=section.stride,
        normalize=section.normalize, microbatches=section.microbatches, directory=folder / 'progress', report=report)
  except FloatingPointError as e:
    raise FloatingPointError(
      f'stage {stage.name}, from step {step} of the proxy: {e}; delete {folder.parent} and lower '
      f'config.pds.learning_rate, which is {section.learning_rate}') from e

  def keep() -> None:
    with workdir.replacing(folder / 'gamma.npy') as f:
      np.save(f, gamma_N)
    workdir.write_json(folder / 'manifest.json', {'sha256': workdir.digest_file(folder / 'gamma.npy')})
    shutil.rmtree(folder / 'progress')

  processes.from_lead('keeping the scores', keep)
  return gamma_N


def _keep_trace(path: pathlib.Path, values: dict) -> None:
  """{step: {dev_loss, costate_norm}}, with these added."""
  kept = workdir.read_json(path) if path.exists() else {}
  of = lambda name: np.asarray(values[name], np.float64).tolist()
  kept |= {str(t): {'dev_loss': J, 'costate_norm': norm} for t, J, norm in
           zip(values['step'].tolist(), of('dev_loss'), of('costate_norm'))}
  workdir.write_json(path, dict(sorted(kept.items(), key=lambda item: int(item[0]))))


class _Proxies:
  """Batches of the records in their order, read and placed as they are asked for."""

  def __init__(self, store: Store, domain_N: np.ndarray, record_N: np.ndarray, batch_size: int, put: Any):
    self._store, self._domain_N, self._record_N = store, domain_N, record_N
    self._batch_size, self._put = batch_size, put

  def __iter__(self) -> Iterator[dict]:
    for first in range(0, len(self._record_N), self._batch_size):
      rows = slice(first, first + self._batch_size)
      batch = self._store.read('train', self._domain_N[rows], self._record_N[rows])
      yield self._put({key: batch[key] for key in _KEYS})


def _stacked(store: Store, domain_N: np.ndarray, record_N: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
  """T x B x L."""
  batch = store.read('train', domain_N, record_N)
  return {key: batch[key].reshape(-1, batch_size, *batch[key].shape[1:]) for key in _KEYS}


def put(mesh: jax.sharding.Mesh, rules: sharding.Rules, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """Whole host arrays, B x L or T x B x L, the same on every process -> global arrays, rows over the batch's axes where
  they divide."""
  shards, axes = sharding.batch_shards(mesh, rules), sharding.spec(('batch',), rules)
  lead = next(iter(batch.values())).ndim - 2
  rows = next(iter(batch.values())).shape[lead]
  placed = NamedSharding(mesh, PartitionSpec(*([None] * lead), *axes) if rows % shards == 0 else PartitionSpec())
  with jax.transfer_guard('allow'):
    return {name: jax.make_array_from_callback(x.shape, placed, lambda index, x=x: x[index])
            for name, x in batch.items()}
