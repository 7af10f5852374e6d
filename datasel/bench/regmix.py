"""RegMix's proxies: many trained as one program, or one after another; a plain matrix product is the limit.

  swarm        a step of all proxies in one call, each with its own batch (methods/regmix/stacked.py)
  one by one   the same step compiled for one proxy, called for each in turn without waiting in between

Neither waits for data; what starting many runs costs besides (compilation, opening files) is counted for neither.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from datasel import objectives, optim, sharding
from datasel.batch import Batch
from datasel.bench import timing
from datasel.methods.regmix import planning, stacked
from datasel.models.mistral import Mistral
from datasel.models.presets import PRESETS
from datasel.step import train_step

_SWARM, _ONE, _LIMIT = 'swarm', 'one by one', 'matrix product'


def run(*, preset: str = 'regmix_1m', vocab_size: int = 4096, batch_size: int = 8, length: int = 128, proxies: int = 0,
        chunk: int = 0, steps: int = 1000, repeats: int = 5) -> dict[str, Any]:
  """Median seconds per step of one proxy, and proxies per hour at so many steps each.

  vocab_size: 0 for the preset's own.  proxies: in all, default 8 on a CPU and 64 elsewhere.  chunk: of them at a time;
  default what `planning` begins with on this device.
  """
  if preset not in PRESETS:
    raise ValueError(f'unknown preset {preset!r}; known: {", ".join(PRESETS)}')
  on_cpu = jax.default_backend() == 'cpu'
  model = dataclasses.replace(PRESETS[preset], vocab_size=vocab_size or PRESETS[preset].vocab_size)
  if on_cpu:  # which has no fast bfloat16
    model = dataclasses.replace(model, dtype='float32')
  mesh = stacked.mesh(jax.devices())
  proxies = proxies or (8 if on_cpu else 64)
  if proxies < 1 or proxies % mesh.size:
    raise ValueError(f'{proxies} proxies cannot be spread over {mesh.size} devices; choose a multiple')
  chunk = min(chunk or planning.CHUNK[jax.default_backend()], proxies // mesh.size)
  tokens = np.random.default_rng(0).integers(0, model.vocab_size, (proxies * batch_size, length + 1)).astype(np.int32)
  batch = {'tokens_BxL': tokens[:, :-1], 'targets_BxL': tokens[:, 1:],
           'loss_mask_BxL': np.ones((proxies * batch_size, length), np.float32)}
  product, flops, _, _ = timing.limits(model.dtype)
  taken = timing.take_turns({
    _SWARM: _swarm(model, mesh, batch, proxies, chunk), _ONE: _one_by_one(model, batch, proxies), _LIMIT: product,
  }, repeats=repeats)
  seconds = {name: statistics.median(taken[name]) / proxies for name in (_SWARM, _ONE)}
  limit = model.flops_per_token(length) * batch_size * length * statistics.median(taken[_LIMIT]) / flops / mesh.size
  return {
    'device': f'{mesh.size} x {jax.devices()[0].device_kind}, jax {jax.__version__}', 'preset': preset,
    'dtype': model.dtype, 'n_params': model.n_params, 'vocab_size': model.vocab_size, 'batch_size': batch_size,
    'length': length, 'proxies': proxies, 'chunk': chunk, 'steps': steps, 'limit_seconds': limit,
    'rows': {name: {'seconds': s, 'proxies_per_hour': 3600 / (s * steps), 'of_limit': limit / s,
                    'speed_of_one_by_one': timing.ratio(taken, _ONE, name)} for name, s in seconds.items()}}


def table(result: dict[str, Any]) -> str:
  lines = [f'{result["device"]}: {result["proxies"]} proxies of {result["preset"]} with a vocabulary of '
           f'{result["vocab_size"]}, {result["n_params"]:,} parameters, {result["dtype"]}, batch '
           f'{result["batch_size"]} x {result["length"]}, {result["chunk"]} at a time; proxies of {result["steps"]} '
           'steps',
           f'{"":14s}{"ms/step":>10s}{"proxies/hour":>14s}{"of the limit":>14s}{"speed, x one by one":>21s}']
  lines += [f'{name:14s}{1e3 * row["seconds"]:10.2f}{row["proxies_per_hour"]:14,.1f}{100 * row["of_limit"]:13.1f}%'
            f'{row["speed_of_one_by_one"]:21.2f}' for name, row in result['rows'].items()]
  return '\n'.join(lines)


def _optimizer() -> Any:
  return optim.adamw(4e-4, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0)


def _swarm(model: Mistral, mesh: jax.sharding.Mesh, batch: Batch, proxies: int, chunk: int) -> Callable[[int], Any]:
  tx = _optimizer()
  step = stacked.step(objectives.language_model(model.token_nll), tx, mesh, proxies=proxies, chunk=chunk,
                      microbatches=1)
  state = [stacked.init(stacked.initial(model.init, tx), proxies, mesh)(jax.random.key(0))]
  batch = sharding.put(mesh, batch, stacked.RULES)

  def run(times: int) -> None:
    for _ in range(times):
      state[0], _ = step(state[0], batch)
    jax.block_until_ready(state)

  return run


def _one_by_one(model: Mistral, batch: Batch, proxies: int) -> Callable[[int], Any]:
  tx = _optimizer()
  step = jax.jit(functools.partial(train_step, objective=objectives.language_model(model.token_nll), tx=tx),
                 donate_argnums=0)
  initial = jax.jit(stacked.initial(model.init, tx))
  states = [initial(jax.random.key(0)) for _ in range(proxies)]
  parts = [jax.device_put({name: np.split(x, proxies)[p] for name, x in batch.items()}) for p in range(proxies)]

  def run(times: int) -> None:
    for _ in range(times):
      for p in range(proxies):
        states[p], _ = step(states[p], parts[p])
      jax.block_until_ready(states)

  return run
