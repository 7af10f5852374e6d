"""What an anchor mask lets each token see: as a dense truth, and as a few numbers for each token.

A text is a chain of segments, each closed by an anchor, its last token.  A token sees its own segment up to itself and
the anchors of the segments before; an anchor sees its own segment alone.  No one sees into another document.
AnLLM, Pang et al. 2024 (arXiv 2402.07616), 3.2, and the mask of its code, which shows an anchor itself too.

Documents are told apart as in `batch.py`: segment_BxL, int32, 0 for padding, one run of equal ids for each document
(padding may interrupt it).  There it means the document; here a *segment* is a part of one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Segments(NamedTuple):
  """An anchor mask in O(L): query i sees key j exactly if one of these two, which never hold both.

    its own segment   j <= i and segment[i] == segment[j] > 0
    what was kept     first[i] <= c < stop[i], where j is the c-th kept token of the row (index[j] == c and kept[j]),
                      and, unless narrow is None, protected[j] or not narrow[i]

  So the first is causal attention over documents called segments, the second a range of the row's kept keys, gathered
  once (`compact`).  Everything is of its own row; int32 unless said.
  segment_BxL    a number for each segment, from 1, rising along the row, with gaps; 0 in padding
  start_BxL      where in the row the token's segment begins; 0 in padding
  kept_BxL       bool, what later segments may see: anchors and protected tokens
  index_BxL      how many kept tokens come before; for a kept token, its place among them
  first_BxL, stop_BxL   the range of kept tokens that is seen beyond the own segment; empty in padding
  protected_BxL, narrow_BxL   bool, both None when nothing is protected.  narrow: of the range, only what is protected
  """

  segment_BxL: jax.Array
  start_BxL: jax.Array
  kept_BxL: jax.Array
  index_BxL: jax.Array
  first_BxL: jax.Array
  stop_BxL: jax.Array
  protected_BxL: jax.Array | None
  narrow_BxL: jax.Array | None


def segments(anchor_BxL: jax.Array, segment_BxL: jax.Array | None = None, *, anchor_sees_anchors: bool = False,
             keep_bos: bool = False, protected_BxL: jax.Array | None = None) -> Segments:
  """The mask of `visible`, with the same arguments, in O(L) memory and cumulative sums; for use under jit."""
  anchor_BxL, real_BxL, begins_BxL, protected_BxL = _marks(anchor_BxL, segment_BxL, keep_bos, protected_BxL)
  own_BxL = jnp.where(real_BxL, _before(anchor_BxL) + jnp.cumsum(begins_BxL, axis=1, dtype=jnp.int32), 0)
  opens_BxL = document_starts(own_BxL, jnp.zeros(len(own_BxL), jnp.int32))
  kept_BxL = anchor_BxL if protected_BxL is None else anchor_BxL | protected_BxL
  index_BxL = _before(kept_BxL)
  # Of a number that never falls along the row: its value at the last mark.
  at_last = lambda mark_BxL, x_BxL: jnp.where(real_BxL, cummax(jnp.where(mark_BxL, x_BxL, 0)), 0)
  first_BxL, stop_BxL = at_last(begins_BxL, index_BxL), at_last(opens_BxL, index_BxL)
  narrow_BxL = None
  if not anchor_sees_anchors and protected_BxL is not None:
    narrow_BxL = anchor_BxL
  elif not anchor_sees_anchors:
    stop_BxL = jnp.where(anchor_BxL, first_BxL, stop_BxL)
  elif protected_BxL is not None:
    narrow_BxL = jnp.zeros_like(anchor_BxL)
  row_BxL = jnp.broadcast_to(_positions(own_BxL), own_BxL.shape)
  return Segments(own_BxL, at_last(opens_BxL, row_BxL), kept_BxL, index_BxL, first_BxL, stop_BxL, protected_BxL,
                  narrow_BxL)


def compact(kept_BxL: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
  """Where the kept tokens of each row are: (position_BxC, count_B), int32, in order, C = size.

  Slots from count on hold L - 1, a position like any other: mask them.  A count above `size` tells of kept tokens
  left out.  With anchors by a `Rule` and nothing protected there are at most L // min_length.
  """
  L = kept_BxL.shape[1]
  slot_BxL = jnp.where(kept_BxL, _before(kept_BxL), size)
  fill = lambda slot_L: jnp.full(size, L - 1, jnp.int32).at[slot_L].set(jnp.arange(L, dtype=jnp.int32), mode='drop')
  # Row by row, so that rows on several devices have nothing to exchange.
  return jax.vmap(fill)(slot_BxL), jnp.sum(kept_BxL, axis=1, dtype=jnp.int32)


def visible(anchor_BxL: jax.Array, segment_BxL: jax.Array | None = None, *, anchor_sees_anchors: bool = False,
            keep_bos: bool = False, protected_BxL: jax.Array | None = None) -> jax.Array:
  """bool B x L x L, [b, i, j] = position i sees position j: the truth that tests hold everything else to.

  With s the anchors before a token, of two real tokens of one document
    j <= i and (s_i == s_j  or  j is an anchor and i is not  or  j is protected).
  anchor_BxL: bool, the token closes its segment; in padding it counts for nothing.  segment_BxL: int32, the document
  of each token, 0 = padding, which sees and is seen by nothing; None: one document a row.
  anchor_sees_anchors: anchors see earlier anchors too (the authors' older code).  keep_bos: the first token of each
  document is protected.  protected_BxL: bool, tokens that all later ones of their document see.
  ValueError unless the arrays are B x L and of these types.
  """
  anchor_BxL, real_BxL, begins_BxL, protected_BxL = _marks(anchor_BxL, segment_BxL, keep_bos, protected_BxL)
  document_BxL = jnp.cumsum(begins_BxL, axis=1, dtype=jnp.int32)
  query, key = lambda x: x[:, :, None], lambda x: x[:, None, :]
  equal = lambda x: query(x) == key(x)
  seen = equal(_before(anchor_BxL)) | (key(anchor_BxL) & (query(~anchor_BxL) | anchor_sees_anchors))
  if protected_BxL is not None:
    seen |= key(protected_BxL)
  positions = _positions(anchor_BxL)
  return seen & (key(positions) <= query(positions)) & equal(document_BxL) & query(real_BxL) & key(real_BxL)


def document_starts(segment_BxL: jax.Array, document_B: jax.Array) -> jax.Array:
  """bool B x L, the token is the first of its document: its id is not that of the real token before it.

  document_B: int32, the id before the row, 0 for none.  Arrays of numpy give an array of numpy.
  """
  xp = namespace(segment_BxL, document_B)
  real_BxL = segment_BxL > 0
  last_BxL = cummax(xp.where(real_BxL, _positions(segment_BxL) + 1, 0))
  before_BxL = xp.concatenate([xp.zeros_like(last_BxL[:, :1]), last_BxL[:, :-1]], axis=1)
  ids_BxT = xp.concatenate([document_B[:, None], segment_BxL], axis=1)
  return real_BxL & (xp.take_along_axis(ids_BxT, before_BxL, axis=1) != segment_BxL)


def namespace(*arrays):
  """numpy when all the arrays are numpy's, else jax.numpy."""
  return np if all(isinstance(x, np.ndarray) for x in arrays) else jnp


def cummax(x_BxL):
  return np.maximum.accumulate(x_BxL, axis=1) if namespace(x_BxL) is np else lax.cummax(x_BxL, axis=1)


def check_rows(name: str, x_BxL, kind, want: str, shape: tuple[int, int] | None = None) -> None:
  """ValueError unless x is B x L, or of that shape, of a dtype of this kind (np.integer), and not empty."""
  found, dtype = np.shape(x_BxL), jnp.result_type(x_BxL)
  if len(found) != 2 or not min(found) or (shape or found) != found or not jnp.issubdtype(dtype, kind):
    size = f' = {shape}' if shape else ', not empty'
    raise ValueError(f'anchors: {name} is {dtype} {found}, want {want} B x L{size}')


def _marks(anchor_BxL, segment_BxL, keep_bos, protected_BxL) -> tuple[jax.Array, ...]:
  """What is an anchor, is real, begins a document, and is protected (None: nothing)."""
  check_rows('anchor_BxL', anchor_BxL, np.bool_, 'bool')
  shape = np.shape(anchor_BxL)
  if segment_BxL is not None:
    check_rows('segment_BxL', segment_BxL, np.integer, 'int32', shape)
  if protected_BxL is not None:
    check_rows('protected_BxL', protected_BxL, np.bool_, 'bool', shape)
  segment_BxL = jnp.ones(shape, jnp.int32) if segment_BxL is None else jnp.asarray(segment_BxL)
  real_BxL = segment_BxL > 0
  begins_BxL = document_starts(segment_BxL, jnp.zeros_like(segment_BxL[:, 0]))
  if protected_BxL is not None:
    protected_BxL = protected_BxL & real_BxL
  if keep_bos:
    protected_BxL = begins_BxL if protected_BxL is None else protected_BxL | begins_BxL
  return anchor_BxL & real_BxL, real_BxL, begins_BxL, protected_BxL


def _before(mark_BxL: jax.Array) -> jax.Array:
  """int32, the marks before each token of its row."""
  return jnp.cumsum(mark_BxL, axis=1, dtype=jnp.int32) - mark_BxL


def _positions(x_BxL):
  return namespace(x_BxL).arange(x_BxL.shape[1], dtype=np.int32)[None]
