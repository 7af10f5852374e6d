"""What Group DRO adds to a training step: a plain language-model step is the limit.

  ours   the proxy's step with reference losses read from disk
  peer   the same step with the reference model run inside it, as DoReMi's released code does
"""

import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from datasel import objectives, optim
from datasel.bench import timing
from datasel.methods.doremi import domain_weights
from datasel.models.presets import PRESETS
from datasel.step import Objective, init_state, train_step

_LIMIT, _OURS, _PEER = 'plain step (the limit)', 'proxy step, cached losses', 'proxy step, reference inside (the peer)'


def run(*, preset: str = 'laptop_small', batch_size: int = 32, length: int = 128, n_domains: int = 10,
        repeats: int = 7) -> dict[str, Any]:
  """Median seconds per step over `repeats` rounds in which the contenders take turns."""
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
  taken = timing.take_turns({name: _contender(*of, params, batch, tx) for name, of in contenders.items()},
                            repeats=repeats)
  return {
    'device': f'{jax.devices()[0].device_kind}, jax {jax.__version__}',
    'preset': preset, 'batch_size': batch_size, 'length': length, 'domains': n_domains,
    'seconds': {name: statistics.median(s) for name, s in taken.items()},
    'ratio_to_limit': {name: timing.ratio(taken, name, _LIMIT) for name in taken},
  }


def table(result: dict[str, Any]) -> str:
  lines = [f'{result["device"]}: {result["preset"]}, batch {result["batch_size"]} x {result["length"]}, '
           f'{result["domains"]} domains', f'{"":42s} {"ms/step":>9s} {"x limit":>8s}']
  lines += [f'{name:42s} {1e3 * s:9.1f} {result["ratio_to_limit"][name]:8.3f}' for name, s in result['seconds'].items()]
  return '\n'.join(lines)


def _contender(objective: Objective, aux: Any, params: dict, batch: dict, tx: Any) -> Callable[[int], Any]:
  step = jax.jit(functools.partial(train_step, objective=objective, tx=tx))
  begin = init_state(params, tx, aux)

  def run(times: int) -> None:
    state = begin
    for _ in range(times):
      state, _ = step(state, batch)
    jax.block_until_ready(state)

  return run
