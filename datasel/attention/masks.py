"""What a position may see: a small description, never an L x L array on a fast path."""

import dataclasses
import numbers

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
  """Position i sees j when all that is given holds: j <= i (causal), |i - j| < window, segment[i] == segment[j] > 0."""

  causal: bool = dataclasses.field(default=True, metadata={'static': True})
  window: int | None = dataclasses.field(default=None, metadata={'static': True})
  segment_BxL: jax.Array | None = None  # int32 document of each position, 0 = padding, which sees nothing

  def __post_init__(self):
    window = self.window
    if window is not None and (isinstance(window, bool) or not isinstance(window, numbers.Integral) or window < 1):
      raise ValueError(f'attention window {window!r}: want an integer of at least 1 (it sees itself), or None')

  def dense(self, length: int) -> jax.Array:
    """bool (B or 1) x L x L, [b, i, j] = position i sees position j: the truth for tests and the reference."""
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
