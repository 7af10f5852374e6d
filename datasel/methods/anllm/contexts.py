"""Held-out perplexity by the length of the context: the same text, cut into windows of each length."""

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from datasel import sharding
from datasel.batch import Batch
from datasel.data import sampler
from datasel.data.store import Store
from datasel.models.mistral import Mistral
from datasel.objectives import domain_sums

_log = logging.getLogger(__name__)


def unmasked(model: Mistral) -> Mistral:
  """The same model, of the same parameters, where every token sees all before it."""
  return dataclasses.replace(model, anchors=None, anchor_sees_anchors=False, keep_bos=False)


def by_context(model: Mistral, params: Any, store: Store, mesh: jax.sharding.Mesh, *, lengths: Sequence[int],
               sequences: int, batch_size: int, anchor_ids: Sequence[int] = (), split: str = 'validation',
               rules: sharding.Rules = sharding.RULES) -> dict[str, dict[str, float]]:
  """{'256': {'nll', 'ppl', 'bits_per_byte', 'nll_without_anchors'}, ...}, the lengths rising.

  Of the first max(lengths) tokens of each record, every target counts once at every length: the windows of a length lie
  end to end, and each is read afresh from its first token, so that its first targets have little context.  (The
  authors' windows overlap.)  Documents inside a window stay apart.  nll: nats per target of all domains together.
  bits_per_byte: of all targets, by the bytes per target of each domain in the whole split.  nll_without_anchors: nats
  per target that is none of `anchor_ids`, since an anchor token of its own is nearly free to predict.
  sequences: records of each domain, spread evenly over the split; 0: all of them.  batch_size: records read at once, a
  multiple of the parts into which `mesh` splits a batch.
  ValueError for lengths that do not divide the longest, or are longer than the records.
  """
  lengths = sorted(lengths)
  if not lengths or lengths[0] < 1 or lengths[-1] > store.length or any(lengths[-1] % length for length in lengths):
    raise ValueError(f'context lengths {lengths} of a store of records of {store.length} tokens; want at least one, '
                     'none longer than a record, and each a divisor of the longest: then all have the same targets')
  sizes_M = store.sizes(split)
  wanted_M = np.minimum(sizes_M, sequences) if sequences else sizes_M
  domain_N = np.repeat(np.arange(len(sizes_M), dtype=np.int32), wanted_M)
  record_N = np.concatenate([np.arange(n, dtype=np.int64) * size // n for n, size in zip(wanted_M, sizes_M)])
  rows = sampler.process_rows(sharding.batch_sharding(mesh, rules), batch_size)
  forbidden = np.array(sorted(anchor_ids), np.int32)

  def sums(params, batch):
    with sharding.use(mesh, rules):
      nll_BxL, mask_BxL = model.token_nll(params, batch), batch['loss_mask_BxL']
      plain_BxL = mask_BxL * ~jnp.isin(batch['targets_BxL'], forbidden)
      return [domain_sums(nll_BxL, x_BxL, batch['domain_B'], len(sizes_M)) for x_BxL in (mask_BxL, plain_BxL)]

  sums = jax.jit(sums, out_shardings=sharding.replicated(mesh))
  total = {length: np.zeros((2, 2, len(sizes_M))) for length in lengths}  # all or without anchors, sum and count
  for start in range(0, len(domain_N), batch_size):
    index_B = start + rows
    real_B = index_B < len(domain_N)
    index_B = np.where(real_B, index_B, 0)
    batch = store.read(split, domain_N[index_B], record_N[index_B])
    batch['loss_mask_BxL'] = batch['loss_mask_BxL'] * real_B[:, None].astype(np.float32)
    for length in lengths:
      total[length] += jax.device_get(sums(params, sharding.put(mesh, windows(batch, length, lengths[-1]), rules)))
    _log.info('perplexity by context: %d of %d sequences', min(start + batch_size, len(domain_N)), len(domain_N))
  bytes_per_target_M = np.array([counts['bytes'] / counts['targets']
                                 for counts in map(store.counts(split).__getitem__, store.domains)])
  return {str(length): _summary(*sums_2x2xM, bytes_per_target_M, length) for length, sums_2x2xM in total.items()}


def windows(batch: Batch, length: int, longest: int) -> Batch:
  """The first `longest` tokens of each row, as longest / length rows of `length` in their order; numpy.

  Positions begin again with each window: a document cut by its beginning is at 0 there.
  """
  parts = longest // length
  cut = {name: x[:, :longest].reshape(-1, length) for name, x in batch.items() if name.endswith('_BxL')}
  goes_on_BxL = cut['segment_BxL'] == cut['segment_BxL'][:, :1]
  cut['position_BxL'] = cut['position_BxL'] - np.where(goes_on_BxL, cut['position_BxL'][:, :1], 0)
  return cut | {'domain_B': np.repeat(batch['domain_B'], parts)}


def _summary(all_2xM: np.ndarray, plain_2xM: np.ndarray, bytes_per_target_M: np.ndarray,
             length: int) -> dict[str, float]:
  nats_M, count_M = all_2xM
  nll, plain = (float(x_2xM[0].sum() / max(x_2xM[1].sum(), 1)) for x_2xM in (all_2xM, plain_2xM))
  if not math.isfinite(nll):
    raise FloatingPointError(f'held-out loss in windows of {length} tokens is not finite')
  bits = nats_M.sum() / math.log(2)
  return {'nll': nll, 'ppl': math.exp(nll), 'bits_per_byte': float(bits / (count_M @ bytes_per_target_M)),
          'nll_without_anchors': plain}
