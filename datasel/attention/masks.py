"""What a position may see: a small description, never an L x L array on a fast path."""

import dataclasses
import numbers

import jax
import jax.numpy as jnp

from datasel.attention.anchors import Segments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Anchors:
  """An anchor mask (`anchors.segments`), and the room for the kept tokens of a row.

  size: at least as many as any row keeps; more than that are not seen.  A row's length always suffices; with anchors
  by a `Rule` and nothing protected, L // min_length.
  """

  segments: Segments
  size: int = dataclasses.field(metadata={'static': True})

  def __post_init__(self):
    if self.size < 1:
      raise ValueError(f'attention mask: room for {self.size} kept tokens; want at least 1')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
  """Position i sees j when all that is given holds: j <= i (causal), |i - j| < window, segment[i] == segment[j] > 0.

  anchors: an anchor mask instead, which is causal and knows its documents: it goes with no window and no segment_BxL.
  """

  causal: bool = dataclasses.field(default=True, metadata={'static': True})
  window: int | None = dataclasses.field(default=None, metadata={'static': True})
  segment_BxL: jax.Array | None = None  # int32 document of each position, 0 = padding, which sees nothing
  anchors: Anchors | None = None

  def __post_init__(self):
    window = self.window
    if window is not None and (isinstance(window, bool) or not isinstance(window, numbers.Integral) or window < 1):
      raise ValueError(f'attention window {window!r}: want an integer of at least 1 (it sees itself), or None')
    if self.anchors is not None and not (self.causal and window is None and self.segment_BxL is None):
      raise ValueError('attention mask: anchors go with causal=True, no window and no segment_BxL; give the documents '
                       'to anchors.segments')

  def dense(self, length: int) -> jax.Array:
    """bool (B or 1) x L x L, [b, i, j] = position i sees position j: the truth for tests and the reference."""
    if self.anchors is not None:
      return self._dense_anchors(length)
    i, j = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    visible = jnp.ones((length, length), bool)
    if self.causal:
      visible &= j <= i
    if self.window is not None:
      visible &= jnp.abs(i - j) < self.window
    visible = visible[None]
    if self.segment_BxL is not None:
      segment = self.segment_BxL
      visible = visible & (segment[:, :, None] == segment[:, None, :]) & (segment > 0)[:, :, None]
    return visible

  def _dense_anchors(self, length: int) -> jax.Array:
    s, at = self.anchors.segments, jnp.arange(length)
    query, key = lambda x: x[:, :, None], lambda x: x[:, None, :]
    own = (query(s.segment_BxL) == key(s.segment_BxL)) & (query(s.segment_BxL) > 0) & (at[None] <= at[:, None])[None]
    kept = key(s.kept_BxL & (s.index_BxL < self.anchors.size))
    kept &= (query(s.first_BxL) <= key(s.index_BxL)) & (key(s.index_BxL) < query(s.stop_BxL))
    if s.narrow_BxL is not None:
      kept &= key(s.protected_BxL) | ~query(s.narrow_BxL)
    return own | kept
