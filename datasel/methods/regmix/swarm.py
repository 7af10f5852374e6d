"""The swarm of RegMix (Liu et al. 2024): one small model for each mixture, many of them trained as one program.

  WORKDIR/swarm/plan.json            which swarm this is, and how many groups and proxies at a time it was planned for
  WORKDIR/swarm/group-K/             checkpoints/ while it trains; losses-STEP.npy, float64 [its proxies, domains];
                                     manifest.json, written last
  WORKDIR/swarm/mixtures.csv         index and weight of each domain
  WORKDIR/swarm/losses.csv           index and final loss in each domain, nats per token of the validation split
  WORKDIR/swarm/losses_by_step.npz   steps [S], losses [S, proxies, domains], index, domains
  WORKDIR/swarm/manifest.json        what was trained, and the digests of these files; written last

A proxy of the swarm is the model that `build.train_stage` trains on its mixture alone: all begin at the same parameters
and read each domain's records in the same order.  What does not fit the memory is trained in groups, one after
another; a group that is done is not trained again, and one that was interrupted goes on where it was.
"""

import collections
import contextlib
import dataclasses
import logging
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from datasel import build, objectives, processes, sharding, workdir
from datasel import train as train_lib
from datasel.batch import Batch
from datasel.checkpoint import Checkpoints
from datasel.data import sampler as sampler_lib
from datasel.data.store import Store
from datasel.methods.regmix import planning, stacked, tables
from datasel.methods.regmix.planning import Plan
from datasel.methods.regmix.streams import Streams
from datasel.methods.regmix.tables import Table
from datasel.step import State

_PLAN, _MANIFEST = 'plan.json', 'manifest.json'


def cost(stage: build.Stage, proxies: int) -> build.Stage:
  """The whole swarm as one stage of a run's forecast: the training FLOPs of all proxies, the output head counted.

  stage: what each proxy trains.
  """
  return dataclasses.replace(stage, objective=None, steps=0, other_flops=proxies * stage.flops)


def train(run: build.Run, stage: build.Stage, mixtures: Table, optimizer: ml_collections.ConfigDict, *, role: str,
          init_role: str, chunk: int = 0, group: int = 0) -> Table:
  """Trains a proxy on each mixture, or finishes what was begun; returns the final losses, nats per token, by domain.

  stage: what each proxy trains; its name is the folder's.  mixtures: columns as the store's domains, in any order.
  optimizer: keys as of config.optimizer.  role and init_role name the seeds, as in `build.train_stage`.
  chunk: proxies that a device steps at the same time, and group: proxies that are trained at the same time, at most; 0:
  what fits.
  Every domain of the store is evaluated, at the steps that config.train.eval_every says.
  Raises as `train.fit` does; ValueError, before anything is written, for mixtures or domains that cannot be used, for a
  proxy that does not fit a device, and for a folder that holds another swarm.
  """
  if stage.aux != () or stage.extra_columns or stage.init_from:
    raise ValueError(f'{stage.name}: proxies begin afresh, on plain batches, with an objective that keeps no state')
  check_domains(run.store)
  swarm = _Swarm(run, stage, mixtures, optimizer, role, init_role)
  begun = processes.from_lead('opening the swarm', swarm.begun)
  if (swarm.directory / _MANIFEST).exists():
    run.progress.skip(len(mixtures.index_N) * stage.flops)
  else:
    plan, step = swarm.planned(chunk, group, begun)
    logging.info('stage %s: %s parameters each, %d steps of %d x %d tokens\n%s', stage.name,
                 f'{stage.model.n_params:,}', stage.steps, stage.batch_size, stage.length, plan.words())
    processes.from_lead('beginning the swarm', lambda: swarm.begin(plan))
    for number in range(plan.groups):
      swarm.train_group(plan, number, step)
    processes.from_lead('writing the losses of the swarm', lambda: swarm.finish(plan))
  return processes.together('reading the losses of the swarm', lambda: tables.read(swarm.directory / 'losses.csv'))


def check_domains(store: Store) -> None:
  """Every domain is a target: refuses a store that has nothing held out of one of them."""
  counts, sizes_M = store.counts('validation'), store.sizes('validation')
  empty = [name for name, size in zip(store.domains, sizes_M) if not size or not counts[name]['targets']]
  if empty:
    raise ValueError(f'{", ".join(empty)}: nothing in the validation split to measure a loss on; prepare the store '
                     'with a larger holdout or with validation files of these domains, or leave them out of the corpus')


class _Swarm:
  """What all groups share, and what of it is on disk."""

  def __init__(self, run: build.Run, stage: build.Stage, mixtures: Table, optimizer: ml_collections.ConfigDict,
               role: str, init_role: str):
    self.run, self.stage, self.directory = run, stage, run.directory / stage.name
    self.mixtures = mixtures.select(run.store.domains)
    named = lambda p: f'mixture {mixtures.index_N[p]}'
    tables.check_mixtures(self.mixtures.values_NxC, named, run.store.domains)
    self.weights_PxM = tables.normalised(self.mixtures.values_NxC)
    self.tx = build.optimizer(optimizer, stage.steps)
    self.rates = np.asarray(jax.vmap(build.learning_rate(optimizer, stage.steps))(np.arange(stage.steps)))
    self.seed, self.init_seed = (build.seed_for(run.config, name) for name in (role, init_role))
    self.one = stacked.initial(stage.model.init, self.tx)
    self.mesh = stacked.mesh(run.mesh.devices)
    eval_every, eval_sequences = run.config.train.eval_every, run.config.train.eval_sequences
    self.eval_steps = sorted({*(range(0, stage.steps, eval_every) if eval_every else ()), stage.steps})
    streams = self.streams(slice(None), len(self.weights_PxM), np.zeros(1, np.int64))
    self.identity = {
      'model': dataclasses.asdict(stage.model), 'steps': stage.steps, 'batch_size': stage.batch_size,
      'microbatches': stage.microbatches, 'optimizer': optimizer.to_dict(), 'init_seed': self.init_seed,
      'tokenizer': run.store.tokenizer['digest'], 'streams': streams.state(0)['streams'],
      'index': list(self.mixtures.index_N), 'eval_steps': self.eval_steps, 'eval_sequences': eval_sequences}
    positions_PxM = streams.counts_PxM * (stage.steps * stage.batch_size / streams.block)
    self.most_epochs_M = (positions_PxM / np.maximum(run.store.sizes('train'), 1)).max(0)

  def streams(self, group: slice, padded: int, rows: np.ndarray) -> Streams:
    return Streams(self.run.store, self.weights_PxM[group], self.stage.batch_size, seed=self.seed,
                   block=self.run.config.data.block, padded=padded, rows=rows, names=self.mixtures.index_N[group])

  def begun(self) -> dict | None:
    """plan.json of this swarm, None if it was not begun.  ValueError for another swarm, or one that is damaged."""
    path, manifest = self.directory / _PLAN, self.directory / _MANIFEST
    if not path.exists():
      return None
    plan = workdir.read_json(path)
    if plan['swarm'] != workdir.digest(self.identity):
      raise ValueError(f'{self.directory} holds another swarm: of other mixtures, steps, data, model or optimiser; '
                       'delete it, or take another workdir')
    if manifest.exists():
      _prove(self.directory)
    return plan

  def planned(self, chunk: int, group: int, begun: dict | None) -> tuple[Plan, Callable]:
    """The plan, as the swarm was begun if it was, and its compiled step."""
    stage = self.stage

    def compiled(proxies: int, chunk: int) -> Any:
      step = stacked.step(stage.objective, self.tx, self.mesh, proxies=proxies, chunk=chunk,
                          microbatches=stage.microbatches)
      batch = stacked.abstract_batch(proxies * stage.batch_size, stage.length, self.mesh)
      return step.lower(stacked.abstract_state(self.one, proxies, self.mesh), batch).compile()

    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(jax.eval_shape(self.one, jax.random.key(0))))
    proxies, devices = len(self.weights_PxM), self.mesh.size
    if begun is None:
      plan, step = planning.plan(compiled, proxies, devices, state_bytes=size, chunk=chunk, group=group)
    else:  # the same results need the same arithmetic
      plan, step = planning.plan(compiled, proxies, devices, state_bytes=size, chunk=begun['chunk'],
                                 groups=begun['groups'])
      if (plan.chunk, plan.groups) != (begun['chunk'], begun['groups']):
        raise ValueError(f'{self.directory} was begun in {begun["groups"]} group(s), {begun["chunk"]} proxies of a '
                         f'device at a time, and here it would be {plan.groups} and {plan.chunk}; finish it on devices '
                         'like those it was begun on, or delete it')
    planning.check_disk(plan, self.run.directory, self.directory, self.run.config.train.keep_checkpoints + 1)
    return plan, step

  def begin(self, plan: Plan) -> None:
    path = self.directory / _PLAN
    if not path.exists():
      workdir.write_json(path, {'swarm': workdir.digest(self.identity), **dataclasses.asdict(plan)})

  def train_group(self, plan: Plan, number: int, step: Callable) -> None:
    """Trains a group, or finishes it, and keeps its losses."""
    group, folder = plan.group(number), self.directory / f'group-{number}'
    names = self.mixtures.index_N[group]
    if (folder / _MANIFEST).exists():
      self.run.progress.skip(len(names) * self.stage.flops)
    else:
      logging.info('stage %s, group %d of %d: proxies %s to %s', self.stage.name, number + 1, plan.groups, names[0],
                   names[-1])
      self._fit(plan, group, f'{self.stage.name}/{folder.name}', folder, step)
    processes.from_lead('keeping the losses of a group', lambda: self._keep(folder))

  def _fit(self, plan: Plan, group: slice, name: str, folder: pathlib.Path, step: Callable) -> None:
    run, stage, section, names = self.run, self.stage, self.run.config.train, self.mixtures.index_N[group]
    rows = sampler_lib.process_rows(sharding.batch_sharding(self.mesh, stacked.RULES), plan.padded * stage.batch_size)
    batches = sampler_lib.batches(self.streams(group, plan.padded, rows), run.config.data.prefetch)
    watched = _Watched(step, self.mesh, names)
    losses = stacked.evaluator(
      objectives.in_microbatches(stage.model.token_nll, stage.microbatches), run.store, self.mesh, chunk=plan.chunk,
      batch_size=stage.batch_size, max_sequences=section.eval_sequences)

    def evaluate(params: Any) -> dict:
      losses_PxM = losses(params)[:len(names)]
      at = batches.get_state()['position'] // stage.batch_size  # the loop has taken a batch for every update
      if not np.isfinite(losses_PxM).all():
        p, m = np.argwhere(~np.isfinite(losses_PxM))[0]
        raise FloatingPointError(f'{name}: after step {at}, mixture {names[p]} has the held-out loss '
                                 f'{losses_PxM[p, m]} in {run.store.domains[m]}')
      if processes.lead():
        with workdir.replacing(folder / f'losses-{at}.npy') as f:
          np.save(f, losses_PxM)
      by_domain = lambda x_M: dict(zip(run.store.domains, x_M.tolist()))
      return {'nll': by_domain(losses_PxM.mean(0)), 'lowest_nll': by_domain(losses_PxM.min(0)),
              'highest_nll': by_domain(losses_PxM.max(0)), 'uniform_nll': float(losses_PxM.mean())}

    program = train_lib.Program(
      mesh=self.mesh, rules=stacked.RULES, abstract_state=stacked.abstract_state(self.one, plan.padded, self.mesh),
      init=stacked.init(self.one, plan.padded, self.mesh), step=watched)
    with (contextlib.closing(batches),
          Checkpoints(folder / 'checkpoints', keep=section.keep_checkpoints) as checkpoints):
      train_lib.fit(
        program, batches, key=jax.random.key(self.init_seed), stage=name, total_steps=stage.steps,
        checkpoints=checkpoints, writer=run.writer, log_every=section.log_every,
        checkpoint_every=section.checkpoint_every, tokens_per_step=len(names) * stage.batch_size * stage.length,
        flops_per_step=len(names) * stage.flops / stage.steps, peak_flops=run.peak_flops, progress=run.progress,
        name_examples=watched.diverged, evaluate=evaluate, eval_every=section.eval_every,
        describe=lambda at, values: {key: values[key] for key in values if not key.endswith('_P')} | {
          'learning_rate': self.rates[at - 1]},
        profile_steps=run.config.profile_steps, profile_directory=run.directory / 'profile')

  def _keep(self, folder: pathlib.Path) -> None:
    """Declares a group done; its checkpoints, large and of no more use, go."""
    if not (folder / _MANIFEST).exists():
      _declare(folder, [f'losses-{step}.npy' for step in self.eval_steps], {})
    shutil.rmtree(folder / 'checkpoints', ignore_errors=True)

  def finish(self, plan: Plan) -> None:
    """Writes the outcome of all groups."""
    folders = [self.directory / f'group-{number}' for number in range(plan.groups)]
    for folder in folders:
      _prove(folder)
    losses_SxPxM = np.stack([
      np.concatenate([np.load(folder / f'losses-{step}.npy', allow_pickle=False) for folder in folders])
      for step in self.eval_steps])
    index, domains = self.mixtures.index_N, self.run.store.domains
    tables.write(self.directory / 'mixtures.csv', Table(domains, index, self.weights_PxM))
    tables.write(self.directory / 'losses.csv', Table(domains, index, losses_SxPxM[-1]))
    with workdir.replacing(self.directory / 'losses_by_step.npz') as f:
      np.savez(f, steps=self.eval_steps, losses=losses_SxPxM, index=np.array(index), domains=np.array(domains))
    _declare(self.directory, ['mixtures.csv', 'losses.csv', 'losses_by_step.npz'], self.identity | {
      'plan': dataclasses.asdict(plan), 'flops': len(index) * self.stage.flops,
      'most_epochs': dict(zip(domains, self.most_epochs_M.tolist()))})


class _Watched:
  """The step of a group, its metrics made numbers; and which proxies' own were not finite."""

  def __init__(self, step: Callable[[State, Batch], tuple[State, dict]], mesh: jax.sharding.Mesh,
               names: tuple[str, ...]):
    self._step, self._names = step, names
    self._recent: collections.deque[dict] = collections.deque(maxlen=2)  # the loop looks at the step before the last

    def over_proxies(metrics):
      own = {name: x[:len(names)] for name, x in metrics.items()}
      loss_P, norms = own['loss'], ('grad_norm', 'update_norm', 'param_norm')
      return {'loss': loss_P.mean(), 'lowest_loss': loss_P.min(), 'highest_loss': loss_P.max(),
              'weight': own['weight'].mean(), **{name: own[name].max() for name in norms},
              'finite_P': jnp.isfinite(loss_P + own['grad_norm'] + own['update_norm'])}

    # A program of its own: what the devices tell each other here, they do not tell each other in the step.
    self._over_proxies = jax.jit(over_proxies, out_shardings=sharding.replicated(mesh))

  def __call__(self, state: State, batch: Batch) -> tuple[State, dict]:
    state, metrics = self._step(state, batch)
    metrics = self._over_proxies(metrics)
    self._recent.append(metrics)
    return state, metrics

  def diverged(self, batch: Batch) -> str:
    """Names the proxies that were the first not to be finite."""
    finite = [jax.device_get(metrics['finite_P']) for metrics in self._recent]
    finite_P = next(finite_P for finite_P in finite if not finite_P.all())
    lost = [name for name, fine in zip(self._names, finite_P) if not fine]
    return f'those of {len(lost)} of {len(self._names)} proxies, of mixture {", ".join(lost[:8])}'


def _declare(folder: pathlib.Path, names: list[str], what: dict) -> None:
  files = {name: workdir.digest_file(folder / name) for name in names}
  workdir.write_json(folder / _MANIFEST, what | {'files': files})


def _prove(folder: pathlib.Path) -> None:
  """Raises ValueError where a file is not as it was declared."""
  for name, wanted in workdir.read_json(folder / _MANIFEST)['files'].items():
    if not (folder / name).exists() or workdir.digest_file(folder / name) != wanted:
      raise ValueError(f'{folder / name} is missing or damaged; delete {folder} to train it again')
