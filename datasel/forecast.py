"""What a stage will need and cost on devices that are not here: its real program, compiled ahead of time and read.

The expected time of a step is a roofline: the longest of arithmetic at the data sheet's peak, main-memory traffic at
full bandwidth, and collectives round rings over all links at once (those among GPUs of several hosts over the network),
as if the three overlapped perfectly.  Nothing of it was measured; `seconds['without_overlap']`, the sum of the three,
is what no overlap at all would make of it.
"""

import dataclasses
import re
import time
from typing import Any

import jax
import ml_collections

from datasel import build, checks, hlo, hlo_costs, sharding
from datasel.hardware import Chip

_UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
_SIZE = r'([\d.]+)([KMGT])'
# How XLA says that a program does not fit: (what it needs), (what there is).
_NO_ROOM = (re.compile(rf'Used {_SIZE} of {_SIZE} hbm'), re.compile(rf'\({_SIZE}\) exceeds available HBM \({_SIZE}\)'))


def forecast(stage: build.Stage, config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, chip: Chip) -> dict:
  """JSON values: whether it fits, memory and what takes it, FLOPs, collectives, expected time.

  Bytes, FLOPs and seconds are those of one device and one step; of a stage that trains nothing, one batch.
  Raises ValueError for a mesh that the stage cannot be split over, and for a program that does not compile for another
  reason than memory.
  """
  checks.check_split(stage, config, mesh)
  began = time.perf_counter()
  result = {'stage': stage.name, 'parameters': stage.model.n_params, 'batch_size': stage.batch_size,
            'microbatches': stage.microbatches, 'length': stage.length, 'trains': stage.objective is not None}
  program, arguments = build.call(stage, config, mesh)
  holds = _holds(stage, arguments)
  try:
    compiled = program.lower(*arguments).compile()
  except jax.errors.JaxRuntimeError as e:
    needs = _needs(str(e))
    if needs is None:
      raise ValueError(f'{stage.name} does not compile for {chip.name}: {str(e).strip()[:2000]}') from e
    return result | {'fits': False, 'reason': 'too little memory',
                     'memory': {'total': needs, 'available': chip.available, 'holds': holds},
                     'advice': _advice(stage, config, mesh, chip, holds),
                     'compile_seconds': time.perf_counter() - began}
  stats = compiled.memory_analysis()
  holds['gradients and activations'] = stats.temp_size_in_bytes
  memory = {'total': build.compiled_bytes(stats), 'available': chip.available,
            'arguments': stats.argument_size_in_bytes, 'outputs': stats.output_size_in_bytes,
            'aliased': stats.alias_size_in_bytes, 'temporary': stats.temp_size_in_bytes,
            'code': stats.generated_code_size_in_bytes, 'holds': holds}
  fits = memory['total'] <= memory['available']
  return result | {
    'fits': fits, 'reason': '' if fits else 'too little memory', 'memory': memory,
    'advice': '' if fits else _advice(stage, config, mesh, chip, holds),
    **_costs(stage, mesh, chip, hlo_costs.count(hlo.parse(compiled.as_text()), _hosts(mesh, chip))),
    'compile_seconds': time.perf_counter() - began}


def _holds(stage: build.Stage, arguments: tuple) -> dict[str, int]:
  """Bytes of a device that the program's arguments take, by kind, without the padding of the device's layouts."""
  given, batch = arguments
  sizes = {'parameters': given} if stage.objective is None else {
    'parameters': given.params, 'optimiser state': given.opt_state, "objective's state": given.aux}
  return {name: build.bytes_on_device(tree) for name, tree in (sizes | {'batch': batch}).items()}


def _needs(error: str) -> int | None:
  """Bytes that a program needs for which XLA finds no room; None for another error."""
  for pattern in _NO_ROOM:
    if found := pattern.search(error):
      return round(float(found[1]) * _UNITS[found[2]])
  return None


def _advice(stage: build.Stage, config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, chip: Chip,
            holds: dict[str, int]) -> str:
  """What to change of a stage that does not fit, as far as shapes tell without compiling again."""
  split_further = '--config.mesh.data=1 --config.mesh.fsdp=-1'
  # The state and its gradients: what no recomputation can save.
  state = sum(size for name, size in holds.items() if name != 'batch') - holds.get('gradients and activations', 0)
  state += holds['parameters'] if stage.objective is not None else 0
  if state > chip.available:
    known = f'the state and its gradients alone take {state / 2**30:.1f} GiB of a device'
    if state / mesh.shape['data'] <= chip.available:
      return f'{known}; try {split_further}'
    return f'{known}; take more devices or larger ones, with {split_further}'
  rows = stage.batch_size // (sharding.batch_shards(mesh, build.rules(config)) * stage.microbatches)
  proposals = [f'more microbatches (now {stage.microbatches}, each of {rows} rows on a device)'] if rows > 1 else []
  proposals += [split_further] if mesh.shape['data'] > 1 else []
  proposals += ["model.remat 'full'"] if stage.model.remat != 'full' and stage.objective is not None else []
  return f'try {", or ".join(proposals)}' if proposals else 'take larger devices, or more with mesh.tensor above 1'


def _hosts(mesh: jax.sharding.Mesh, chip: Chip) -> tuple[int, ...]:
  """The host of each device of a program over this mesh; empty where the slice's links join all of them."""
  return tuple(device.id // chip.neighbours for device in mesh.devices.flat) if chip.neighbours else ()


def _costs(stage: build.Stage, mesh: jax.sharding.Mesh, chip: Chip, costs: hlo_costs.Costs) -> dict[str, Any]:
  """FLOPs, collectives and the roofline."""
  model, length, tokens = stage.model, stage.length, stage.batch_size * stage.length
  share = (1 if stage.objective is not None else 1 / 3) * tokens / mesh.size  # a forward pass is a third of training
  formula = share * model.flops_per_token(length)
  undeclared = sorted(kernel.name for kernel in costs.kernels.values() if kernel.flops is None)
  counted = costs.flops + (share * (model.flops_per_token(length) - model.flops_per_token(0)) if undeclared else 0.0)
  interconnect = (costs.sent_bytes - costs.network_bytes) / chip.links + costs.network_bytes / chip.network
  seconds = {'arithmetic': counted / chip.flops, 'memory': costs.traffic_bytes / chip.bandwidth,
             'interconnect': interconnect}
  bound_by = max(seconds, key=seconds.get)
  step = seconds[bound_by]
  return {
    'flops': {'counted': counted, 'formula': formula, 'kernels': {k.name: k.count for k in costs.kernels.values()},
              'kernels counted by the formula': undeclared},
    'traffic_bytes': costs.traffic_bytes,
    'collectives': [dataclasses.asdict(one) for _, one in sorted(costs.collectives.items())],
    'unknown_loops': costs.unknown_loops,
    'seconds': seconds | {'step': step, 'without_overlap': sum(seconds.values())}, 'bound_by': bound_by,
    'tokens_per_second': tokens / step, 'mfu_bound': formula / chip.flops / step}
