"""From a resolved config to the objects of a run.  Only this file and methods/*/run.py read `config.x`."""

import contextlib
import dataclasses
import hashlib
import logging
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
import optax

from datasel import config as config_lib
from datasel import evaluate as evaluate_lib
from datasel import hardware, objectives, optim, processes, sharding, trackers, train, workdir
from datasel import metrics as metrics_lib
from datasel.checkpoint import Checkpoints
from datasel.data import mixture as mixture_lib
from datasel.data import sampler as sampler_lib
from datasel.data.mixture import Mixture
from datasel.data.store import Store
from datasel.models.mistral import Mistral
from datasel.step import Objective, State


@dataclasses.dataclass(frozen=True)
class Run:
  """What every stage of a run shares."""

  config: ml_collections.ConfigDict
  directory: pathlib.Path
  store: Store
  mesh: jax.sharding.Mesh
  writer: metrics_lib.Writer
  progress: metrics_lib.Progress
  peak_flops: float

  def example_names(self, batch: dict) -> str:
    """'code/17, web/3': domain and record number, names that hold for the life of the store."""
    return ', '.join(self.store.names(batch['domain_B'], batch['example_B']))


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage of a run before it runs: what it trains and what it costs."""

  name: str
  model: Mistral
  objective: Objective | None  # None: nothing is trained here
  steps: int
  batch_size: int
  microbatches: int  # parts of a batch whose activations exist at one time
  length: int
  other_flops: float = 0.0  # of a stage that trains nothing
  other_bytes: float = 0.0  # on disk, beside checkpoints
  aux: Any = ()
  extra_columns: tuple[str, ...] = ()  # float32 B x L arrays of its batches beyond the store's
  init_from: str = ''  # a stage's checkpoints/ folder whose parameters to start from; empty: fresh
  keep_every: int | None = None  # checkpoints of steps that are multiples of it stay
  splits_inside: bool = False  # the objective makes the micro-batches itself: it needs the whole batch first
  optimizer: ml_collections.ConfigDict | None = None  # a section of its own; None: config.optimizer

  @property
  def program_key(self) -> tuple:
    """Stages of one key are one compiled program."""
    return (self.model, self.batch_size, self.microbatches, self.extra_columns, self.objective is None,
            str(self.optimizer))

  @property
  def flops(self) -> float:
    return self.other_flops + stage_flops(self.model, self.length, self.batch_size, self.steps)


def seed_for(config: ml_collections.ConfigDict, role: str) -> int:
  """An independent seed for each named role of a run ('main', 'proxy-0'): no role's randomness shifts another's."""
  return int.from_bytes(hashlib.sha256(f'{config.seed}/{role}'.encode()).digest()[:4], 'little')


def learning_rate(section: ml_collections.ConfigDict, total_steps: int) -> optax.Schedule:
  """Of a stage of so many steps, which may stop before its schedule ends."""
  whole = section.schedule_steps or total_steps
  if whole < total_steps:
    raise ValueError(f'optimizer.schedule_steps is {whole}, but the stage has {total_steps} steps; want at least as '
                     "many, or 0 for the stage's")
  return optim.schedule(section.schedule, peak=section.peak_lr, end=section.end_lr,
                        warmup_steps=round(section.warmup_fraction * whole), total_steps=whole)


def optimizer(section: ml_collections.ConfigDict, total_steps: int) -> optax.GradientTransformation:
  rate = learning_rate(section, total_steps)
  transforms = {
    'adamw': lambda: optim.adamw(rate, b1=section.b1, b2=section.b2, eps=section.eps,
                                 weight_decay=section.weight_decay, clip=section.clip),
    'adafactor': lambda: optim.adafactor(rate, weight_decay=section.weight_decay, clip=section.clip),
  }
  if section.name not in transforms:
    raise ValueError(f'unknown optimizer.name {section.name!r}; known: {sorted(transforms)}')
  return transforms[section.name]()


def mesh(section: ml_collections.ConfigDict, devices: list | None = None) -> jax.sharding.Mesh:
  return sharding.make_mesh(section.data, section.fsdp, section.tensor, devices=devices)


def rules(config: ml_collections.ConfigDict) -> sharding.Rules:
  return sharding.rules_from(config.sharding.to_dict())


def mixture(kind: str, store: Store, epochs: dict[str, float], key: str) -> Mixture:
  """Weights by a rule ('tokens', 'examples', 'uniform', 'pile': examples times `epochs`) or from a mixture file."""
  rules = {
    'tokens': lambda: mixture_lib.by_tokens(store),
    'examples': lambda: mixture_lib.by_examples(store),
    'pile': lambda: mixture_lib.by_pile_convention(store, epochs),
    'uniform': lambda: mixture_lib.uniform(store.domains),
  }
  if kind in rules:
    return rules[kind]()
  if not pathlib.Path(kind).is_file():
    raise ValueError(f'config.{key} is {kind!r}: neither one of {sorted(rules)} nor a mixture file')
  loaded = mixture_lib.load(kind)
  loaded.for_domains(store.domains)
  made_with = loaded.provenance.get('tokenizer')
  if isinstance(made_with, dict) and made_with.get('digest') != store.tokenizer['digest']:
    logging.warning('%s was tuned with another tokenizer (%s) than the store has (%s): weights depend on it', kind,
                    made_with.get('name'), store.tokenizer['name'])
  return loaded


def is_finished(folder: pathlib.Path) -> bool:
  """Whether a stage has its artefact: its own stage.json, or the manifest of what it computed."""
  stage, manifest = folder / 'stage.json', folder / 'manifest.json'
  return manifest.exists() or (stage.exists() and workdir.read_json(stage).get('finished', False))


def call(stage: Stage, config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> tuple[Any, tuple]:
  """(a stage's jitted program, the shapes and shardings of what it is called with): of (state, batch) its train step,
  or of (params, batch) the pass of a stage that trains nothing."""
  rows = sharding.batch_sharding(mesh, rules(config))
  array = lambda dtype, *shape: jax.ShapeDtypeStruct((stage.batch_size, *shape), dtype, sharding=rows)
  batch = {name: array(np.int32, stage.length) for name in ('tokens_BxL', 'targets_BxL', 'segment_BxL', 'position_BxL')}
  batch |= {name: array(np.float32, stage.length) for name in ('loss_mask_BxL', *stage.extra_columns)}
  batch['domain_B'] = array(np.int32)
  if stage.objective is not None:
    program = stage_program(stage, config, mesh)
    return program.step, (program.abstract_state, batch)
  params = stage.model.abstract()
  places = sharding.tree_shardings(mesh, params, stage.model.logical_axes(), rules(config))
  params = jax.tree.map(lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), params, places)
  token_nll = objectives.in_microbatches(stage.model.token_nll, stage.microbatches)
  return evaluate_lib.scorer(token_nll, mesh, rules(config)), (params, batch)


def bytes_on_device(tree: Any) -> int:
  """Of one device, for arrays or ShapeDtypeStructs with shardings."""
  return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def compiled_bytes(memory: Any) -> int:
  """What a compiled program (`compiled.memory_analysis()`) needs of a device while it runs, its arguments included."""
  return (memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
          - memory.alias_size_in_bytes + memory.generated_code_size_in_bytes)


def stage_program(stage: Stage, config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> train.Program:
  model = stage.model
  return train.program(model.init, model.logical_axes(), objective=stage.objective, mesh=mesh, aux=stage.aux,
                       rules=rules(config), tx=optimizer(stage.optimizer or config.optimizer, stage.steps),
                       microbatches=1 if stage.splits_inside else stage.microbatches)


def train_stage(run: Run, stage: Stage, *, role: str, weights_M: np.ndarray, init_role: str = 'init',
                judged_on: Store | None = None, add_columns: Callable[[dict], dict] | None = None,
                describe: Callable[[dict], dict] = lambda m: m,
                also_evaluate: Callable[[Any], dict] = lambda params: {}) -> State:
  """Trains one model of a run, or finishes one that was begun: sampler, program, checkpoints and evaluation wired up.

  role and init_role name the seeds of the data order and of the initial parameters; judged_on: the store whose held-out
  sequences it is evaluated on, run.store by default; add_columns adds the stage's `extra_columns` to each batch while
  it is read ahead; describe turns a step's metrics into values for metrics.jsonl;
  also_evaluate(params) adds values to those of each evaluation.
  """
  config, model, batch_size = run.config, stage.model, stage.batch_size
  logging.info('stage %s: %s parameters, %d steps of %d x %d tokens', stage.name, f'{model.n_params:,}', stage.steps,
               batch_size, stage.length)
  program = stage_program(stage, config, run.mesh)
  rows = sampler_lib.process_rows(sharding.batch_sharding(run.mesh, program.rules), batch_size)
  sampler = sampler_lib.Sampler(run.store, 'train', weights_M, batch_size, seed=seed_for(config, role),
                                block=config.data.block, rows=rows)
  batches = sampler_lib.batches(sampler if add_columns is None else sampler.map(add_columns), config.data.prefetch)
  evaluate = evaluate_lib.evaluator(
    objectives.in_microbatches(model.token_nll, stage.microbatches), judged_on or run.store, run.mesh,
    batch_size=batch_size, max_sequences=config.train.eval_sequences, rules=program.rules)
  rate = learning_rate(stage.optimizer or config.optimizer, stage.steps)
  rates = np.asarray(jax.vmap(rate)(np.arange(stage.steps)))
  directory = run.directory / stage.name
  identity = {
    'stage': stage.name, 'steps': stage.steps, 'batch_size': batch_size, 'model': dataclasses.asdict(model),
    'n_params': model.n_params, 'max_length': stage.length, 'flops': stage.flops,
    'tokenizer': run.store.tokenizer['digest'], 'store': run.store.whole.digest,
    'weights': dict(zip(run.store.domains, map(float, weights_M))),
    'epochs': dict(zip(run.store.domains, map(float, sampler.epochs(stage.steps * batch_size))))}
  if processes.lead():
    workdir.write_json(directory / 'stage.json', identity | {'finished': is_finished(directory)})

  def starting_params():
    with Checkpoints(pathlib.Path(stage.init_from), keep=2) as other:
      return other.restore_params(program.abstract_state.params)

  with (contextlib.closing(batches),
        Checkpoints(directory / 'checkpoints', keep=config.train.keep_checkpoints,
                    keep_every=stage.keep_every) as checkpoints):
    state = train.fit(
      program, batches, key=jax.random.key(seed_for(config, init_role)), stage=stage.name, total_steps=stage.steps,
      checkpoints=checkpoints, writer=run.writer, log_every=config.train.log_every,
      checkpoint_every=config.train.checkpoint_every, tokens_per_step=batch_size * stage.length,
      flops_per_step=stage.flops / stage.steps, peak_flops=run.peak_flops, progress=run.progress,
      name_examples=run.example_names, evaluate=lambda params: evaluate(params) | also_evaluate(params),
      eval_every=config.train.eval_every,
      initial_params=starting_params if stage.init_from else None,
      describe=lambda step, values: describe(values) | {'learning_rate': rates[step - 1]},
      profile_steps=config.profile_steps, profile_directory=run.directory / 'profile')
  if processes.lead():
    workdir.write_json(directory / 'stage.json', identity | {'finished': True})
  return state


def stage_flops(model: Mistral, length: int, batch_size: int, steps: int) -> float:
  """Training FLOPs by the formula of `Mistral.flops_per_token`."""
  return model.flops_per_token(length) * length * batch_size * steps


@contextlib.contextmanager
def begin(config: ml_collections.ConfigDict, directory: pathlib.Path, store: Store, total_flops: float):
  """Opens a run: the writer of its metrics and its progress; yields a `Run`."""
  peak, source = hardware.peak_flops_per_device()
  logging.info('MFU is measured against %.3g FLOP/s for each of %d devices (%s)', peak, jax.device_count(), source)
  shown = trackers.chosen(directory, config_lib.flatten(config), **config.tracking)
  with metrics_lib.Writer(directory, shown) as writer:
    yield Run(config, directory, store, mesh(config.mesh), writer, metrics_lib.Progress(total_flops),
              peak * jax.device_count())


def conclude(directory: pathlib.Path, outcome: Callable[[], dict], write_report: Callable[[pathlib.Path], Any]) -> dict:
  """Writes summary.json, which is what `outcome` gives, and the report; returns the summary, on every process."""

  def write() -> dict:
    summary = outcome()
    for warning in summary['warnings']:
      logging.warning(warning)
    workdir.write_json(directory / 'summary.json', summary)
    write_report(directory)
    return summary

  return processes.from_lead('writing the report', write)
