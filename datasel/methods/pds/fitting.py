"""Fits the scorer to the solver's scores of some records, watched on others that it does not see.

  WORKDIR/scorer/stage.json      what was fitted on what
  WORKDIR/scorer/checkpoints/    the states of the fit: the newest, and every epoch's last
  WORKDIR/scorer/epochs.json     what each epoch came to on the held-out proxies; written last of an epoch
  WORKDIR/scorer/held_out.npz    the held-out records with their true and the best epoch's predicted scores
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import pathlib
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
from scipy import stats

from datasel import build, metrics, objectives, processes, sharding, train, workdir
from datasel import evaluate as evaluate_lib
from datasel.batch import Batch
from datasel.checkpoint import Checkpoints
from datasel.data import sampler as sampler_lib
from datasel.methods.pds.scorer import Scorer, objective

STAGE = 'scorer'
_HELD_OUT, _EPOCHS = 'held_out.npz', 'epochs.json'

# (domain_B, record_B) -> the batch that the scorer sees of these records, with domain_B and example_B.
Read = Callable[[np.ndarray, np.ndarray], Batch]


@dataclasses.dataclass(frozen=True)
class Fitted:
  """A fitted scorer.  score(params, batch) -> score_B is jitted, its result whole on every device."""

  params: dict  # of the best epoch, on the run's mesh
  score: Callable[[dict, Batch], jax.Array]
  read: Read
  digest: str  # of what it was fitted on, and of how well: equal for equal parameters
  held_out: dict  # as `held_out` reads it


def fit(run: build.Run, section: ml_collections.ConfigDict, scorer: Scorer, backbone: Callable[[], dict] | None,
        rows: tuple[np.ndarray, np.ndarray], target_N: np.ndarray, read: Read) -> Fitted:
  """Fits the scorer, or finishes a fit that was begun.

  section: epochs, patience, batch_size, microbatches, held_out, loss, optimizer (keys as of config.optimizer).
  backbone: () -> the parameters to start from, read only when the fit begins; None: fresh ones.
  rows: domain_N and record_N of the proxies; target_N their `targets`; read: what the scorer sees of records.

  `held_out` of the proxies, chosen by the run's seed, are left out of the training.  Each epoch is ceil(N / batch_size)
  batches of passes over the others, every pass in another order.  After each the held-out proxies are scored; the
  epoch of the highest Spearman correlation is taken, and `patience` epochs without a higher one end the fit.
  Raises as `train.fit` does, and ValueError where the folder holds another fit.
  """
  domain_N, record_N, target_N = (np.asarray(x) for x in (*rows, target_N))
  check(section, len(target_N))
  # By a permutation of our own: numpy may change its own in any release.
  seed_N = np.full(len(target_N), build.seed_for(run.config, f'{STAGE}-split'), np.uint64)
  order_N = sampler_lib.permuted(np.arange(len(target_N)), len(target_N), seed_N)
  held, fitted = (_Rows(domain_N[n], record_N[n], target_N[n], read)
                  for n in (np.sort(order_N[:section.held_out]), np.sort(order_N[section.held_out:])))
  whole = _Fit(run, section, scorer, held, fitted)
  identity = processes.from_lead('beginning the scorer', whole.begin)
  epochs = whole.train(backbone)
  with Checkpoints(whole.directory / 'checkpoints', keep=2) as checkpoints:
    params = checkpoints.restore_params(whole.program.abstract_state.params, epochs[_best(epochs) - 1]['step'])
  whole.ensure_held_out(params, epochs)
  return Fitted(params, whole.score, read, workdir.digest([identity, epochs]), held_out(whole.directory))


def check(section: ml_collections.ConfigDict, n_proxies: int) -> None:
  """ValueError for settings that `fit` cannot use; the mesh is seen to where the stage is."""
  for key in ('epochs', 'patience', 'batch_size', 'microbatches'):
    if section[key] < 1:
      raise ValueError(f'config.pds.scorer.{key} is {section[key]}; want at least 1')
  if section.batch_size % section.microbatches:
    raise ValueError(f'config.pds.scorer.microbatches {section.microbatches} does not divide '
                     f'config.pds.scorer.batch_size {section.batch_size}; choose a divisor of it')
  if not 2 <= section.held_out < n_proxies:
    raise ValueError(f'config.pds.scorer.held_out is {section.held_out}; want at least 2, and fewer than the '
                     f'{n_proxies} proxies')
  objective(lambda params, batch: batch['target_B'], section.loss)
  try:
    build.optimizer(section.optimizer, section.epochs * -(-(n_proxies - section.held_out) // section.batch_size))
  except ValueError as e:
    raise ValueError(f'config.pds.scorer.optimizer: {e}') from e


def held_out(directory: pathlib.Path) -> dict:
  """{'true': [...], 'predicted': [...], 'spearman': float} of the folder of a finished fit, to be plotted."""
  with np.load(directory / _HELD_OUT, allow_pickle=False) as saved:
    true_N, predicted_N = saved['true'], saved['predicted']
  return {'true': true_N.tolist(), 'predicted': predicted_N.tolist(), 'spearman': spearman(true_N, predicted_N)}


def spearman(true_N: np.ndarray, predicted_N: np.ndarray) -> float:
  """Spearman's rank correlation, ties sharing their ranks; 0 where one side is constant and so orders nothing."""
  if min(np.ptp(true_N), np.ptp(predicted_N)) == 0:
    return 0.0
  return float(stats.spearmanr(true_N, predicted_N).statistic)


@dataclasses.dataclass(frozen=True)
class _Rows:
  """Proxies as a store of one domain, to be sampled: an epoch of it is a pass over all in an order of its own."""

  domain_N: np.ndarray
  record_N: np.ndarray
  target_N: np.ndarray
  of_records: Read
  domains = ('proxies',)

  @property
  def digest(self) -> str:
    found = hashlib.sha256()
    for values_N, dtype in ((self.domain_N, '<i8'), (self.record_N, '<i8'), (self.target_N, '<f4')):
      found.update(np.ascontiguousarray(values_N, dtype).tobytes())
    return found.hexdigest()

  def sizes(self, split: str) -> np.ndarray:
    return np.array([len(self.target_N)])

  def read(self, split: str, domain_B: np.ndarray, index_B: np.ndarray) -> Batch:
    return self.of_records(self.domain_N[index_B], self.record_N[index_B]) | {'target_B': self.target_N[index_B]}


class _Fit:
  """One fit: its program, and what of it is on disk."""

  def __init__(self, run: build.Run, section: ml_collections.ConfigDict, scorer: Scorer, held: _Rows, fitted: _Rows):
    self.run, self.section, self.scorer, self.held, self.fitted = run, section, scorer, held, fitted
    self.directory, self.epoch_steps = run.directory / STAGE, -(-len(fitted.target_N) // section.batch_size)
    self.total_steps = section.epochs * self.epoch_steps
    parts, in_pairs = section.microbatches, section.loss == 'rank'
    score = objectives.in_microbatches(scorer.apply, parts) if in_pairs else scorer.apply
    self.program = train.program(
      scorer.init, scorer.logical_axes(), objective=objective(score, section.loss), mesh=run.mesh,
      tx=build.optimizer(section.optimizer, self.total_steps), microbatches=1 if in_pairs else parts,
      rules=build.rules(run.config))
    self.score = evaluate_lib.scorer(scorer.apply, run.mesh, self.program.rules)
    length = fitted.of_records(fitted.domain_N[:1], fitted.record_N[:1])['tokens_BxL'].shape[1]
    self.step_tokens = section.batch_size * length
    self.step_flops = scorer.flops_per_token(length) * self.step_tokens

  def begin(self) -> dict:
    """Writes stage.json, or refuses a folder that holds another fit; returns what makes this one what it is."""
    path, section = self.directory / 'stage.json', self.section
    identity = {
      'stage': STAGE, 'scorer': dataclasses.asdict(self.scorer), 'n_params': self.scorer.n_params,
      'store': self.run.store.digest, 'batch_size': section.batch_size, 'loss': section.loss,
      'proxies': {name: {'records': len(rows.target_N), 'digest': rows.digest}
                  for name, rows in (('fitted', self.fitted), ('held_out', self.held))}}
    identity = json.loads(json.dumps(identity))  # tuples become lists
    if path.exists():
      made = workdir.read_json(path)
      differ = [name for name, value in identity.items() if made.get(name) != value]
      if differ:
        raise ValueError(f'{self.directory} holds the fit of another scorer or of other proxies (other: '
                         f'{", ".join(differ)}); delete it to fit this one')
    else:
      self._describe(identity, self.total_steps, finished=False)
    return identity

  def train(self, backbone: Callable[[], dict] | None) -> list[dict]:
    """Epoch after epoch, until the last or until they no longer get better; what each came to.

    Each is a call of `train.fit`, which goes on from the newest checkpoint, wherever that is.  Where epochs.json was
    lost, that is past the end of an epoch to be listed, whose own last state is then looked at again.
    """
    run, section, config = self.run, self.section, self.run.config
    sampler = sampler_lib.Sampler(
      self.fitted, 'train', [1.0], section.batch_size, seed=build.seed_for(config, STAGE), block=config.data.block,
      rows=sampler_lib.process_rows(sharding.batch_sharding(run.mesh, self.program.rules), section.batch_size))
    path = self.directory / _EPOCHS
    epochs = processes.from_lead('reading the epochs of the scorer',
                                 lambda: workdir.read_json(path) if path.exists() else [])
    counted = 0  # steps that the run's progress knows of
    with (contextlib.closing(sampler_lib.batches(sampler, config.data.prefetch)) as batches,
          Checkpoints(self.directory / 'checkpoints', keep=config.train.keep_checkpoints,
                      keep_every=self.epoch_steps) as checkpoints):
      while len(epochs) < section.epochs and len(epochs) - _best(epochs) < section.patience:
        self._write_metrics(epochs)
        run.progress.skip(-counted * self.step_flops)  # `train.fit` takes off all that is behind its checkpoint
        counted = self._epoch(batches, checkpoints, backbone, (len(epochs) + 1) * self.epoch_steps, epochs)
        if processes.lead():
          workdir.write_json(path, epochs)  # from here on, the epoch is done
        logging.info('%s: epoch %d of %d: held-out Spearman %.3f, the best so far in epoch %d', STAGE, len(epochs),
                     section.epochs, epochs[-1]['spearman'], _best(epochs))
    self._write_metrics(epochs)
    run.progress.skip((self.total_steps - counted) * self.step_flops)
    processes.from_lead('finishing the scorer', lambda: self._describe(
      workdir.read_json(self.directory / 'stage.json') | {'best_epoch': _best(epochs)}, epochs[-1]['step'],
      finished=True))
    return epochs

  def _epoch(self, batches: Any, checkpoints: Checkpoints, backbone: Callable[[], dict] | None, last_step: int,
             epochs: list[dict]) -> int:
    """Trains to `last_step`, scores the held-out proxies, appends what came of it to `epochs`; returns the step of the
    newest checkpoint."""
    run, config, abstract = self.run, self.run.config, self.program.abstract_state.params
    key = jax.random.key(build.seed_for(config, f'init-{STAGE}'))
    rate = jax.vmap(build.learning_rate(self.section.optimizer, self.total_steps))
    rates = np.asarray(rate(np.arange(self.total_steps)))

    def starting_params():
      placed = jax.jit(self.scorer.init, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))
      return placed(key, backbone())

    state = train.fit(
      self.program, batches, key=key, stage=STAGE, total_steps=last_step, checkpoints=checkpoints, writer=run.writer,
      log_every=config.train.log_every, checkpoint_every=config.train.checkpoint_every,
      tokens_per_step=self.step_tokens, flops_per_step=self.step_flops, peak_flops=run.peak_flops,
      progress=run.progress, name_examples=run.example_names, initial_params=starting_params if backbone else None,
      describe=lambda step, values: values | {'learning_rate': rates[step - 1]},
      profile_steps=0 if epochs else config.profile_steps, profile_directory=run.directory / 'profile')
    newest = int(state.step)
    params = state.params if newest == last_step else checkpoints.restore_params(abstract, last_step)
    predicted_N = self._predict(params)
    epochs.append({'step': last_step} | self._judged(predicted_N))
    if _best(epochs) == len(epochs) and processes.lead():
      self._keep(predicted_N)
    return newest

  def ensure_held_out(self, params: dict, epochs: list[dict]) -> None:
    """Makes the best epoch's predictions again where they were lost; params: of that epoch."""
    best = epochs[_best(epochs) - 1]
    if not processes.from_lead('reading the held-out predictions', lambda: self._holds(best)):
      logging.warning('%s is missing, damaged or of another fit; predicting again', self.directory / _HELD_OUT)
      predicted_N = self._predict(params)
      processes.from_lead('keeping the held-out predictions', lambda: self._keep(predicted_N))

  def _holds(self, epoch: dict) -> bool:
    """Whether the kept predictions are whole, and come to what is listed of this epoch."""
    try:
      with open(self.directory / _HELD_OUT, 'rb') as f, np.load(f, allow_pickle=False) as saved:
        kept = dict(saved)
      wanted = (self.held.domain_N, self.held.record_N, self.held.target_N)
      return (all(np.array_equal(kept[name], x) for name, x in zip(('domain', 'record', 'true'), wanted))
              and {'step': epoch['step']} | self._judged(kept['predicted']) == epoch)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
      return False

  def _judged(self, predicted_N: np.ndarray) -> dict[str, float]:
    true_N = self.held.target_N
    return {'spearman': spearman(true_N, predicted_N),
            'mse': float(np.mean(np.square(predicted_N - true_N, dtype=np.float64))),
            'predicted_std': float(np.std(predicted_N, dtype=np.float64))}

  def _keep(self, predicted_N: np.ndarray) -> None:
    with workdir.replacing(self.directory / _HELD_OUT) as f:
      np.savez(f, domain=self.held.domain_N, record=self.held.record_N, true=self.held.target_N, predicted=predicted_N)

  def _predict(self, params: dict) -> np.ndarray:
    """float32: the scores of the held-out proxies, on every process."""
    size, n, rules = self.section.batch_size // self.section.microbatches, len(self.held.target_N), self.program.rules
    rows = sampler_lib.process_rows(sharding.batch_sharding(self.run.mesh, rules), size)
    parts = []
    for start in range(0, n, size):
      index_B = np.minimum(start + rows, n - 1)
      batch = self.held.of_records(self.held.domain_N[index_B], self.held.record_N[index_B])
      parts.append(jax.device_get(self.score(params, sharding.put(self.run.mesh, batch, rules))))
    return np.concatenate(parts)[:n]

  def _write_metrics(self, epochs: list[dict]) -> None:
    """A line for each epoch: not twice, and not none, wherever a process before this one was killed."""
    if processes.lead():
      there = {line['step'] for line in metrics.read(self.run.directory, STAGE, 'held_out')}
      for epoch in epochs:
        if epoch['step'] not in there:
          self.run.writer.write(STAGE, 'held_out', epoch['step'], {k: v for k, v in epoch.items() if k != 'step'})

  def _describe(self, stage: dict, steps: int, *, finished: bool) -> None:
    workdir.write_json(self.directory / 'stage.json',
                       stage | {'steps': steps, 'flops': steps * self.step_flops, 'finished': finished})


def _best(done: list[dict]) -> int:
  """Which epoch, from 1, had the highest Spearman correlation, the first of equal ones; 0 before there is one."""
  return int(np.argmax([epoch['spearman'] for epoch in done])) + 1 if done else 0
