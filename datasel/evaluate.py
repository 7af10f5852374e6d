"""Held-out loss per domain: nats per token, bits per byte, and what is made of them."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from datasel import sharding
from datasel.batch import Batch
from datasel.data import sampler
from datasel.data.store import Store
from datasel.objectives import TokenNLL, domain_sums


def evaluator(token_nll: TokenNLL, store: Store, mesh: jax.sharding.Mesh, *, batch_size: int, max_sequences: int,
              split: str = 'validation', rules: sharding.Rules = sharding.RULES) -> Callable[[Any], dict]:
  """evaluate(params) -> {'nll': {domain: nats/token}, 'bits_per_byte': {domain: ...}, 'uniform_nll', 'worst_nll'}.

  Reads `max_sequences` sequences of every domain, spread evenly over its split (0: all of them), the same ones each
  time.  The last batch is filled up with rows that count nothing, so nothing is dropped.  Bits per byte are exact for
  the whole split; for a part of it they take the split's bytes per target.
  """
  sizes_M = store.sizes(split)
  wanted_M = np.minimum(sizes_M, max_sequences) if max_sequences else sizes_M
  domain_N = np.repeat(np.arange(len(sizes_M), dtype=np.int32), wanted_M)
  record_N = np.concatenate([np.arange(n, dtype=np.int64) * size // n for n, size in zip(wanted_M, sizes_M)])
  bytes_per_target = {name: c['bytes'] / c['targets'] for name, c in store.counts(split).items()}
  rows = sampler.process_rows(sharding.batch_sharding(mesh, rules), batch_size)

  def sums(params, batch):
    with sharding.use(mesh, rules):
      return domain_sums(token_nll(params, batch), batch['loss_mask_BxL'], batch['domain_B'], len(sizes_M))

  sums = jax.jit(sums, out_shardings=sharding.replicated(mesh))

  def evaluate(params):
    total_M, count_M = np.zeros(len(sizes_M)), np.zeros(len(sizes_M))
    for start in range(0, len(domain_N), batch_size):
      index_B = start + rows
      real_B = index_B < len(domain_N)
      index_B = np.where(real_B, index_B, 0)
      batch = store.read(split, domain_N[index_B], record_N[index_B])
      batch['loss_mask_BxL'] = batch['loss_mask_BxL'] * real_B[:, None].astype(np.float32)
      batch_total_M, batch_count_M = jax.device_get(sums(params, sharding.put(mesh, batch, rules)))
      total_M, count_M = total_M + batch_total_M, count_M + batch_count_M
    nll = {name: float(t / c) for name, t, c in zip(store.domains, total_M, count_M)}
    if not all(map(math.isfinite, nll.values())):
      raise FloatingPointError(f'held-out loss is not finite: {nll}')
    return {
      'nll': nll,
      'bits_per_byte': {name: x / math.log(2) / bytes_per_target[name] for name, x in nll.items()},
      'uniform_nll': float(np.mean(list(nll.values()))),
      'worst_nll': max(nll.values()),
    }

  return evaluate


def scorer(token_nll: TokenNLL, mesh: jax.sharding.Mesh,
           rules: sharding.Rules = sharding.RULES) -> Callable[[Any, Batch], jax.Array]:
  """(params, batch) -> float32 B x L nats per token, jitted; the result is whole on every device."""

  def whole(params, batch):
    with sharding.use(mesh, rules):
      return token_nll(params, batch)

  return jax.jit(whole, out_shardings=sharding.replicated(mesh))


def compare(candidate: list[dict], baseline: list[dict]) -> dict:
  """DoReMi's comparison (section 3) of two runs' evaluations over training, each a list of metrics.jsonl lines.

  `domains_won` counts domains whose final loss is lower than the baseline's; `steps_to_baseline` is the first evaluated
  step at which the candidate's uniform average is at or below the baseline's final one, None if it never is.
  """
  final, target = candidate[-1], baseline[-1]
  reached = [line['step'] for line in candidate if line['uniform_nll'] <= target['uniform_nll']]
  won = sorted(name for name, x in final['nll'].items() if x < target['nll'][name])
  return {
    'uniform_nll': {'candidate': final['uniform_nll'], 'baseline': target['uniform_nll']},
    'worst_nll': {'candidate': final['worst_nll'], 'baseline': target['worst_nll']},
    'uniform_bits_per_byte': {'candidate': _mean(final['bits_per_byte']), 'baseline': _mean(target['bits_per_byte'])},
    'domains_won': won,
    'domains': len(final['nll']),
    'baseline_steps': target['step'],
    'steps_to_baseline': min(reached) if reached else None,
  }


def _mean(values: dict[str, float]) -> float:
  return sum(values.values()) / len(values)
