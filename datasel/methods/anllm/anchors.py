"""Anchors (AnLLM, Pang et al. 2024, arXiv 2402.07616, 3.1 and 4.1): one entry to all of them.

  in text      Rule, punctuation_ids, split_sentences, insert, with_anchors     datasel/data/anchors.py
  in tokens    flags, Open, must_close: by one rule in training, prefill and decoding
  in a mask    visible, segments, Segments, compact                             datasel/attention/anchors.py
  in a model   with_anchor_row: the first value of an anchor token's row
"""

import jax
import jax.numpy as jnp

from datasel.attention.anchors import Open, Segments, compact, flags, must_close, segments, visible
from datasel.data.anchors import Rule, insert, punctuation_ids, split_sentences, with_anchors

__all__ = ['ROWS', 'Open', 'Rule', 'Segments', 'compact', 'flags', 'insert', 'must_close', 'punctuation_ids',
           'segments', 'split_sentences', 'visible', 'with_anchor_row', 'with_anchors']

ROWS = {
  'mean': lambda others_VxD, period_D: jnp.mean(others_VxD, axis=0),
  'copy_period': lambda others_VxD, period_D: period_D,
}


def with_anchor_row(kernel_VxD: jax.Array, anchor_id: int, how: str, *, period_id: int | None = None) -> jax.Array:
  """The embedding matrix, or the output head, with a first value for the anchor's row, in its dtype.

  anchor_id: V adds a row; less gives a row that the vocabulary has to spare.  how: 'mean', the mean of the other rows
  (the paper), or 'copy_period', row period_id (its code).
  ValueError for another way, and for an id outside the matrix.
  """
  V = kernel_VxD.shape[0]
  if how not in ROWS:
    raise ValueError(f'unknown first value of the anchor row {how!r}; known: {sorted(ROWS)}')
  if not 0 <= anchor_id <= V:
    raise ValueError(f'anchors: anchor_id {anchor_id}, and {V} rows; want {V}, for a new row, or the id of one of them')
  if how == 'copy_period' and (period_id is None or not 0 <= period_id < V or period_id == anchor_id):
    raise ValueError(f"anchors: 'copy_period' with period_id {period_id}, {V} rows; want the id of another token")
  others_VxD = jnp.concatenate([kernel_VxD[:anchor_id], kernel_VxD[anchor_id + 1:]]).astype(jnp.float32)
  period_D = None if period_id is None else kernel_VxD[period_id]
  row_1xD = ROWS[how](others_VxD, period_D)[None].astype(kernel_VxD.dtype)
  return jnp.concatenate([kernel_VxD[:anchor_id], row_1xD, kernel_VxD[anchor_id + 1:]])
