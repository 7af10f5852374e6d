"""An anchor mask for the fast implementations: the keys that a row keeps, gathered once more before the row's own.

`operands` says it in three int32 arrays, which go with q, k and v, row by row.  `widen` puts keys into slots and `fold`
their gradients back, both by gathering: a scatter-add would be slow and, on GPUs, in no fixed order.
"""

import jax
import jax.numpy as jnp

from datasel.attention.anchors import compact
from datasel.attention.masks import Anchors
from datasel.attention.visible import Marks

# of_queries B x 4 x L: `Marks.queries`.  of_keys B x 2 x L: the mark of each position, and the slot that it is kept in,
# or C.  of_slots B x 2 x C: the position of each slot, and its mark.
OPERANDS = ('of_queries', 'of_keys', 'of_slots')


def operands(anchors: Anchors) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The arrays of `OPERANDS`, of C = `anchors.size` slots."""
  s, C = anchors.segments, anchors.size
  position_BxC, _ = compact(s.kept_BxL, C)
  real_BxL = s.segment_BxL > 0
  mark_BxL = jnp.ones_like(s.segment_BxL) if s.protected_BxL is None else 1 + s.protected_BxL
  least_BxL = jnp.ones_like(s.segment_BxL) if s.narrow_BxL is None else 1 + s.narrow_BxL
  mark_BxC = jnp.take_along_axis(mark_BxL, position_BxC, axis=1)  # also of the empty slots, which no range goes to
  end_1xL = jnp.arange(1, s.start_BxL.shape[1] + 1, dtype=jnp.int32)[None]
  back_BxL = jnp.where(real_BxL, end_1xL - s.start_BxL, 0)
  slot_BxL = jnp.where(s.kept_BxL, jnp.minimum(s.index_BxL, C), C)
  stack = lambda *arrays: jnp.stack([x.astype(jnp.int32) for x in arrays], axis=1)
  return (stack(s.first_BxL, s.stop_BxL, least_BxL, back_BxL), stack(real_BxL, slot_BxL), stack(position_BxC, mark_BxC))


def marks(of_queries: jax.Array, of_keys: jax.Array, of_slots: jax.Array) -> Marks:
  return Marks(of_queries, jnp.concatenate([of_slots[:, 1], of_keys[:, 0]], axis=1))


def widen(x_BxLxKxDh: jax.Array, of_slots: jax.Array) -> jax.Array:
  """B x (C + L) x K x Dh: what the slots hold, then the row."""
  return jnp.concatenate([_rows(x_BxLxKxDh, of_slots[:, 0]), x_BxLxKxDh], axis=1)


def fold(dx_BxTxKxDh: jax.Array, of_keys: jax.Array) -> jax.Array:
  """B x L x K x Dh, the gradient of what was widened: each position's own, and that of its slot."""
  C = dx_BxTxKxDh.shape[1] - of_keys.shape[2]
  slots, own = jnp.split(dx_BxTxKxDh, [C], axis=1)
  slot_BxL = of_keys[:, 1]
  return own + jnp.where((slot_BxL < C)[..., None, None], _rows(slots, jnp.minimum(slot_BxL, C - 1)), 0)


def _rows(x_BxNxKxDh: jax.Array, at_BxM: jax.Array) -> jax.Array:
  """B x M x K x Dh.  Row by row, so that rows on several devices have nothing to exchange."""
  return jax.vmap(lambda x, at: x.at[at].get(mode='promise_in_bounds'))(x_BxNxKxDh, at_BxM)
