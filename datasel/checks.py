"""What can be known to fail before a run computes anything: the store, the mesh, memory, disk, the starting point."""

import dataclasses
import os
import pathlib
import shutil

import jax
import ml_collections

from datasel import build, pretrained, sharding, workdir
from datasel.data import tokenizer as tokenizer_lib
from datasel.data.store import Store
from datasel.models.mistral import Mistral

# Fields of a model that no parameter's shape shows, and that change what the parameters compute.
_FUNCTION = ('activation', 'norm', 'norm_eps', 'parallel', 'rope_fraction', 'rope_theta', 'rope_scaling')


def check_store(store: Store, config: ml_collections.ConfigDict, models: dict[str, Mistral]) -> None:
  """Refuses a store that these models cannot read, naming the keys to change."""
  if store.length != config.data.length:
    raise ValueError(f'config.data.length is {config.data.length}, but {store.path} holds sequences of {store.length} '
                     'tokens; set the one, or prepare a store with the other')
  for name, m in models.items():
    if store.vocab_size > m.vocab_size:
      raise ValueError(f'{store.path} has token ids up to {store.vocab_size - 1}, but {name}.vocab_size is '
                       f'{m.vocab_size}; set it to at least {store.vocab_size}')
  if config.data.tokenizer:
    wanted = tokenizer_lib.load(pretrained.tokenizer_path(config.data.tokenizer))
    if wanted.digest != store.tokenizer['digest']:
      raise ValueError(
        f'config.data.tokenizer {config.data.tokenizer!r} is not the tokenizer that {store.path} was made with '
        f'({store.tokenizer["name"]}, sha256 {store.tokenizer["digest"][:12]}; given: {wanted.digest[:12]}); prepare '
        'the store again, or name its own')


def check_stages(stages: list[build.Stage], config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, store: Store,
                 directory: pathlib.Path) -> None:
  """Refuses what some stage of the run would stumble over, before the first one computes anything: a batch that does
  not fit the mesh, a state that does not fit the memory, a starting point of another shape, too small a disk."""
  kept_bytes, largest = 0.0, 0.0
  for stage in stages:
    check_split(stage, config, mesh)
    if build.is_finished(directory / stage.name):
      continue
    kept_bytes += stage.other_bytes
    if stage.objective is None:
      continue
    state = build.stage_program(stage, config, mesh).abstract_state
    # The state and its gradients: what no recomputation can save.
    needed, available = build.bytes_on_device(state) + build.bytes_on_device(state.params), device_memory()
    if needed > available:
      raise ValueError(f'{stage.name}: {stage.model.n_params:,} parameters need {needed / 2**30:.1f} GiB on each of '
                       f'{mesh.size} devices for their state, but a device has {available / 2**30:.1f} GiB; take more '
                       'devices (mesh.fsdp) or a smaller model')
    if stage.init_from:
      check_starting_point(stage, store)
    checkpoint = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))
    kept_for_good = stage.steps // stage.keep_every if stage.keep_every else 0
    kept_bytes += (config.train.keep_checkpoints + kept_for_good) * checkpoint
    largest = max(largest, checkpoint)  # one more than are kept: the new one is whole before an old one goes
  unfinished = [directory / stage.name for stage in stages if not build.is_finished(directory / stage.name)]
  there = sum(p.stat().st_blocks * 512 for folder in unfinished for p in folder.rglob('*') if p.is_file())
  needed, free = kept_bytes + largest - there, shutil.disk_usage(directory).free
  if needed > free:
    raise OSError(f'the checkpoints of this run need {needed / 2**30:.2f} GiB more in {directory}, but the disk has '
                  f'{free / 2**30:.2f} GiB free; free some space or choose another workdir')


def check_split(stage: build.Stage, config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> None:
  """Refuses a mesh that does not divide the batch."""
  parts = sharding.batch_shards(mesh, build.rules(config)) * stage.microbatches
  if stage.batch_size % parts:
    raise ValueError(f'{stage.name}: a batch of {stage.batch_size} is not a multiple of batch shards x '
                     f'microbatches = {parts}; change the batch size or the mesh')


def check_starting_point(stage: build.Stage, store: Store) -> None:
  """`init_from` must be a stage of the same shape and tokenizer that has saved something."""
  checkpoints = pathlib.Path(stage.init_from)
  made_by = checkpoints.parent / 'stage.json'
  if not (checkpoints / 'steps').is_dir() or not made_by.is_file():
    raise ValueError(f'{stage.name}: init_from {checkpoints} is not the checkpoints/ folder of a stage')
  made = workdir.read_json(made_by)
  if made['tokenizer'] != store.tokenizer['digest']:
    raise ValueError(f'{stage.name}: init_from {checkpoints} was trained with another tokenizer than {store.path} was '
                     f'made with ({store.tokenizer["name"]}); prepare the store with that tokenizer')
  differ = [f'{name} {getattr(stage.model, name)} (there: {made["model"].get(name)})' for name in _FUNCTION
            if getattr(Mistral(**made['model']), name) != getattr(stage.model, name)]
  if differ:
    raise ValueError(f'{stage.name}: the parameters of init_from {checkpoints} belong to another function: '
                     f'{", ".join(differ)}; set the keys of config.model to what they were trained with')
  shape, theirs = lambda params: jax.tree.map(lambda a: a.shape, params), Mistral(**made['model'])
  if shape(theirs.abstract()) != shape(stage.model.abstract()):
    differ = [f'{k} {v} (there: {getattr(theirs, k)})' for k, v in dataclasses.asdict(stage.model).items()
              if v != getattr(theirs, k)]
    raise ValueError(f'{stage.name}: init_from {checkpoints} holds a model of another shape: {", ".join(differ)}')


def device_memory() -> float:
  """Bytes that one device can give a run."""
  device = jax.local_devices()[0]
  if device.platform == 'cpu':
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / jax.local_device_count()
  return device.memory_stats()['bytes_limit']


def dry_run_table(stages: list[build.Stage], config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> str:
  """Compiles each kind of stage; one line for each: size, cost, memory per device.  Refuses what does not fit."""
  lines = [f'{"stage":24s} {"parameters":>14s} {"steps":>8s} {"tokens":>10s} {"FLOPs":>9s} {"GiB/device":>10s}']
  seen: dict[tuple, int] = {}
  for stage in stages:
    used = ''
    if stage.objective is not None:
      if stage.program_key not in seen:
        program, arguments = build.call(stage, config, mesh)
        seen[stage.program_key] = build.compiled_bytes(program.lower(*arguments).compile().memory_analysis())
      needed = seen[stage.program_key]
      if needed > device_memory():
        raise ValueError(f'{stage.name}: its compiled step needs {needed / 2**30:.1f} GiB on a device of '
                         f'{device_memory() / 2**30:.1f} GiB; raise microbatches, shard further, or take a smaller '
                         'model')
      used = f'{needed / 2**30:.2f}'
    tokens = stage.steps * stage.batch_size * stage.length
    lines.append(f'{stage.name:24s} {stage.model.n_params:14,} {stage.steps:8,} {tokens:10.3g} {stage.flops:9.2e} '
                 f'{used:>10s}')
  return '\n'.join(lines)
