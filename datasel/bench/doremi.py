"""What Group DRO adds to a training step: a plain language-model step is the limit.

  ours   the proxy's step with reference losses read from disk
  peer   the same step with the reference model run inside it, as DoReMi's released code does
"""

import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from datasel import objectives, optim
from datasel.methods.doremi import domain_weights
from datasel.models.presets import PRESETS
from datasel.step import State, init_state, train_step

_LIMIT, _OURS, _PEER = 'plain step (the limit)', 'proxy step, cached losses', 'proxy step, reference inside (the peer)'


def run(*, preset: str = 'laptop_small', batch_size: int = 32, length: int = 128, n_domains: int = 10, steps: int = 5,
        repeats: int = 7) -> dict[str, Any]:
  """Median seconds per step over `repeats` rounds in which the contenders take turns, after a round to compile."""
  model = PRESETS[preset]
  tx = optim.adamw(1e-3, b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.01, clip=1.0)
  params = jax.jit(model.init)(jax.random.key(0))
  reference = jax.jit(model.init)(jax.random.key(1))
  tokens = jax.random.randint(jax.random.key(2), (batch_size, length + 1), 0, model.vocab_size)
  batch = {
    'tokens_BxL': tokens[:, :-1], 'targets_BxL': tokens[:, 1:], 'loss_mask_BxL': jnp.ones((batch_size, length)),
    'domain_B': jnp.arange(batch_size, dtype=jnp.int32) % n_domains,
    'reference_nll_BxL': jnp.full((batch_size, length), 8.0),
  }
  group_dro = domain_weights.group_dro(model.token_nll, n_domains)

  def with_reference(params, aux, batch):
    return group_dro(params, aux, batch | {'reference_nll_BxL': model.token_nll(reference, batch)})

  aux = domain_weights.initial_aux(n_domains, vocab_size=model.vocab_size)
  contenders = {
    _LIMIT: (objectives.language_model(model.token_nll), ()),
    _OURS: (group_dro, aux),
    _PEER: (with_reference, aux),
  }
  compiled = {name: (jax.jit(functools.partial(train_step, objective=objective, tx=tx)), init_state(params, tx, aux))
              for name, (objective, aux) in contenders.items()}
  seconds: dict[str, list[float]] = {name: [] for name in contenders}
  for repeat in range(repeats + 1):
    for name, (step, state) in compiled.items():
      took = _seconds(step, state, batch, steps)
      if repeat:
        seconds[name].append(took)
  paired = lambda name: statistics.median(x / y for x, y in zip(seconds[name], seconds[_LIMIT]))
  return {
    'device': f'{jax.devices()[0].device_kind}, jax {jax.__version__}',
    'preset': preset, 'batch_size': batch_size, 'length': length, 'domains': n_domains,
    'seconds': {name: statistics.median(s) for name, s in seconds.items()},
    'ratio_to_limit': {name: paired(name) for name in seconds},
  }


def table(result: dict[str, Any]) -> str:
  lines = [f'{result["device"]}: {result["preset"]}, batch {result["batch_size"]} x {result["length"]}, '
           f'{result["domains"]} domains', f'{"":42s} {"ms/step":>9s} {"x limit":>8s}']
  lines += [f'{name:42s} {1e3 * s:9.1f} {result["ratio_to_limit"][name]:8.3f}' for name, s in result['seconds'].items()]
  return '\n'.join(lines)


def _seconds(step: Any, state: State, batch: dict, steps: int) -> float:
  began = time.perf_counter()
  for _ in range(steps):
    state, _ = step(state, batch)
  jax.block_until_ready(state)
  return (time.perf_counter() - began) / steps
