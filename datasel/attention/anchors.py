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

from datasel.data.anchors import Rule


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


class Open(NamedTuple):
  """Where a stream stands, for `flags` to go on from: after a chunk, for each row, both int32."""

  length_B: jax.Array  # tokens of the segment that is open; 0 after an anchor
  document_B: jax.Array  # the document it is in, as segment_BxL numbers them; 0 before the first token


def flags(tokens_BxL: jax.Array, rule: Rule, segment_BxL: jax.Array | None = None,
          state: Open | None = None) -> tuple[jax.Array, Open]:
  """(anchor_BxL, Open): bool, the token closes its segment by `rule`; and the state for the next chunk.

  The same flags for a row in one call and cut into chunks, of any lengths, each call given the state of the last.
  tokens_BxL: int.  segment_BxL: int32, the document of each token; segments begin anew with each.  0 is padding,
  which may be anywhere, is no anchor and leaves the state alone: so rows of a chunk may differ in length.  None: all
  is document 1.  state: None at the beginning.
  Arrays of numpy give arrays of numpy, with nothing on a device; others jax's, for use under jit.
  ValueError for arrays of another type or shape.
  """
  check_rows('tokens_BxL', tokens_BxL, np.integer, 'integers')
  B, L = tokens_BxL.shape
  given = [x for x in (segment_BxL, *(state or ())) if x is not None]
  xp = namespace(tokens_BxL, *given)
  if segment_BxL is None:
    segment_BxL = xp.ones((B, L), np.int32)
  check_rows('segment_BxL', segment_BxL, np.integer, 'int32', (B, L))
  segment_BxL = segment_BxL.astype(np.int32)
  if state is None:
    state = Open(xp.zeros(B, np.int32), xp.zeros(B, np.int32))
  for name, x_B in zip(Open._fields, state):
    if np.shape(x_B) != (B,) or not jnp.issubdtype(x_B.dtype, np.integer):
      raise ValueError(f'anchors: state.{name} is {x_B.dtype} {np.shape(x_B)}, want int32 {(B,)}: one for each row of '
                       'tokens_BxL')

  real_BxL = segment_BxL > 0
  candidate_BxL = real_BxL & xp.isin(tokens_BxL, np.array(rule.anchor_ids, np.int32))
  begins_BxL = document_starts(segment_BxL, state.document_B)
  rank_BxL = xp.cumsum(real_BxL, axis=1, dtype=np.int32) - real_BxL  # among the real tokens: padding takes no room
  first_B = -state.length_B  # the rank at which the segment now open began

  def stretch_start(closes_BxL):
    """The rank after the last of these tokens or at the document's start, whichever is later, for each token; and for
    the one after the row."""
    after_BxL = xp.where(closes_BxL, rank_BxL + 1, first_B[:, None])
    after_BxT = xp.concatenate([first_B[:, None], after_BxL], axis=1)
    begins_BxT = xp.concatenate([xp.where(begins_BxL, rank_BxL, first_B[:, None]), first_B[:, None]], axis=1)
    return cummax(xp.maximum(after_BxT, begins_BxT))

  if rule.min_length == 1:
    anchor_BxL = candidate_BxL
    if rule.max_length is not None:  # every so many tokens after a candidate, all of which close
      length_BxL = rank_BxL - stretch_start(candidate_BxL)[:, :-1] + 1
      anchor_BxL = candidate_BxL | (real_BxL & (length_BxL % rule.max_length == 0))
  else:
    closed_BxT = _chain(rule, candidate_BxL, begins_BxL, rank_BxL, first_B)
    anchor_BxL = real_BxL & xp.take_along_axis(closed_BxT, rank_BxL, axis=1)

  last_B = xp.max(xp.where(real_BxL, xp.arange(1, L + 1, dtype=np.int32)[None], 0), axis=1)
  documents_BxT = xp.concatenate([state.document_B[:, None], segment_BxL], axis=1)
  length_B = xp.sum(real_BxL, axis=1, dtype=np.int32) - stretch_start(anchor_BxL)[:, -1]
  return anchor_BxL, Open(length_B, xp.take_along_axis(documents_BxT, last_B[:, None], axis=1)[:, 0])


def must_close(state: Open, rule: Rule) -> jax.Array:
  """bool B: the next token closes the segment whatever it is.  Where anchors are a token of their own, feed that."""
  xp = namespace(state.length_B)
  if rule.max_length is None:
    return xp.zeros(len(state.length_B), bool)
  return state.length_B == rule.max_length - 1


def _chain(rule, candidate_BxL, begins_BxL, rank_BxL, first_B):
  """bool B x (L + 1), by rank: the anchors, when which candidates count depends on the anchor before.

  From where a segment begins, where it closes is a look-up; so all segments of a row are found by following look-ups
  from the documents' starts, twice as many at a time in each round: O(L log L), in no loop over tokens.
  """
  xp = namespace(candidate_BxL)
  B, L = candidate_BxL.shape
  rank_1xT = xp.arange(L + 1, dtype=np.int32)[None]
  nowhere = np.int32(L)  # no token has this rank; what is marked there, or past the last token, is never read

  def mark(at_BxN):
    """bool B x (L + 1), True at these ranks."""
    if xp is jnp:  # row by row, so that rows on several devices have nothing to exchange
      return jax.vmap(lambda at_N: jnp.zeros(L + 1, bool).at[at_N].set(True))(at_BxN)
    marked_BxT = np.zeros((B, L + 1), bool)
    np.put_along_axis(marked_BxT, at_BxN, True, axis=1)
    return marked_BxT

  def next_at(mark_BxL):
    """The first marked rank from each rank on, or nowhere."""
    at_BxT = xp.where(mark(xp.where(mark_BxL, rank_BxL, nowhere)), rank_1xT, nowhere)
    return np.minimum.accumulate(at_BxT[:, ::-1], axis=1)[:, ::-1] if xp is np else lax.cummin(at_BxT, 1, reverse=True)

  next_candidate_BxT, next_begin_BxT = next_at(candidate_BxL), next_at(begins_BxL)

  def close(start, end):
    """Where a segment that begins at rank `start` closes, its document ending before rank `end`, or nowhere."""
    earliest = xp.clip(start + (rule.min_length - 1), 0, L)
    at = xp.take_along_axis(next_candidate_BxT, earliest, axis=1)
    if rule.max_length is not None:
      at = xp.minimum(at, xp.maximum(start + (rule.max_length - 1), 0))
    return xp.where(at < end, at, nowhere)

  after_BxT = xp.concatenate([next_begin_BxT[:, 1:], xp.full((B, 1), nowhere)], axis=1)
  close_BxT = close(xp.broadcast_to(rank_1xT, (B, L + 1)), after_BxT)
  next_BxT = xp.concatenate([close_BxT[:, 1:], xp.full((B, 1), nowhere)], axis=1)  # from an anchor to the next
  starts_BxL = xp.where(begins_BxL, xp.take_along_axis(close_BxT, rank_BxL, axis=1), nowhere)
  closed_BxT = mark(starts_BxL) | mark(close(first_B[:, None], next_begin_BxT[:, :1]))
  for _ in range((L // rule.min_length + 1).bit_length()):
    closed_BxT = closed_BxT | mark(xp.where(closed_BxT, next_BxT, nowhere))
    next_BxT = xp.take_along_axis(next_BxT, next_BxT, axis=1)
  return closed_BxT


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
