"""The reference model's loss of every token that the proxies will see, computed once and kept on disk.

A proxy step then costs what a plain step costs: it reads 4 bytes more per token.  Which examples a run will see is
known before it starts, because the sampler is a pure function; only those are computed.  The files are those of
row_values.py, with nll.npy: float32 [rows, L], nats.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from datasel import evaluate, row_values, sharding
from datasel.data import sampler
from datasel.data.store import Store
from datasel.objectives import TokenNLL


def quantity(store: Store) -> row_values.Quantity:
  return row_values.Quantity('nll', 'reference loss', (store.length,),
                             'the reference model has diverged; lower optimizer.peak_lr')


def visited(samplers: list[sampler.Sampler], steps: int) -> list[np.ndarray]:
  """For each domain the sorted record numbers that these samplers draw in `steps` batches."""
  seen: list[list[np.ndarray]] = [[] for _ in samplers[0].sizes_M]
  for one in samplers:
    for first in range(0, steps * one.batch_size, one.block):
      domain_N, record_N = one.plan(first, min(first + one.block, steps * one.batch_size))
      for domain, records in enumerate(seen):
        records.append(np.unique(record_N[domain_N == domain]))
  return [np.unique(np.concatenate(records)) for records in seen]


def compute(directory: pathlib.Path, token_nll: TokenNLL, params: Any, store: Store, mesh: jax.sharding.Mesh,
            records: list[np.ndarray], *, rules: sharding.Rules = sharding.RULES,
            **options: Any) -> Callable[[dict], dict]:
  """Computes what is missing of the losses of `records` (one sorted array for each domain), as row_values.compute.

  Returns a function that adds a batch's losses to it as `reference_nll_BxL`; KeyError names an example without one.
  """
  score = evaluate.scorer(token_nll, mesh, rules)
  losses = row_values.compute(directory, quantity(store), score, params, store, mesh, records, rules=rules, **options)
  return lambda batch: batch | {'reference_nll_BxL': losses.of(batch['domain_B'], batch['example_B'])}
