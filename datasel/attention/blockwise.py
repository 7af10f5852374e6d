"""The passes of flash attention in plain jax.numpy: O(L) memory on any backend, partitioned by XLA itself.

The G query heads that share a key head are stacked into the rows of one tile, so keys are never repeated and each
product is as large as the block allows.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from datasel.attention.tiles import VECTORS, Pass, Visible, pad_to

# Scores of one pair of tiles, of all rows and heads, that stay in the cache of a CPU's core with what is made of them.
_CACHED_SCORES = 2**17


def _block(length: int, heads: int) -> int:
  """Positions of a tile, in [64, 256]: a quarter of the row, so that what a causal mask hides is skipped; on a CPU
  fewer, where the scores of all `heads`, those of every row, would not stay in its cache."""
  block = min(256, max(64, pl.next_power_of_2(length) // 4))
  while jax.default_backend() == 'cpu' and block > 64 and heads * block**2 > _CACHED_SCORES:
    block //= 2
  return min(block, -(-length // 8) * 8)


def run(which: Pass, visible: Visible, operands: dict[str, jax.Array],
        segment_BxL: jax.Array | None, *, interpret: bool = False) -> list[jax.Array]:
  """One pass.  operands: B x L x (H or K) x Dh, or B x H x L for the vectors; gives its outputs, shaped alike."""
  B, L, H, Dh = operands['q'].shape
  K = operands['k'].shape[2]
  block = _block(L, B * H)
  group = {'queries': H // K, 'keys': 1}
  padded = L + -L % block

  def tiles(name: str, side: str) -> jax.Array:
    """N x B x K x (G block) x (Dh or 1): the tile is the leading axis, as loops want it."""
    x, G = operands[name], group[side]
    x = x[..., None] if name in VECTORS else x.transpose(0, 2, 1, 3)
    x = pad_to(x, 2, block)
    x = x.reshape(x.shape[0], K, G, padded // block, block, x.shape[-1])
    return x.transpose(3, 0, 1, 2, 4, 5).reshape(padded // block, x.shape[0], K, G * block, x.shape[-1])

  sides = {'queries': {name: tiles(name, 'queries') for name in which.queries},
           'keys': {name: tiles(name, 'keys') for name in which.keys}}
  if 'q_t' in which.queries:
    for side, names in (('queries', ('q_t', 'q')), ('keys', ('k', 'k_t'))):
      sides[side]['both'] = jnp.concatenate([sides[side][name] for name in names], axis=-1)
  segments = None
  if segment_BxL is not None:
    segments = pad_to(segment_BxL, 1, block).reshape(B, -1, block).swapaxes(0, 1)  # N x B x block
  first, end = visible.ranges(which.owner, block, block, segment_BxL)
  first, end = jnp.min(first, axis=0), jnp.max(end, axis=0)  # rows of a batch walk together
  positions = jnp.arange(block, dtype=jnp.int32)

  def seen(i, j):
    """bool (B or 1) x (G block) x block for query tile i and key tile j."""
    at = (None, None) if segments is None else (segments[i][:, :, None], segments[j][:, None, :])
    mask = visible.tile((i * block + positions)[None, :, None], (j * block + positions)[None, None, :], *at)
    return jnp.tile(mask, (1, group['queries'], 1))

  over_heads = jax.vmap(which.step, in_axes=(0, 0, 0, None, None))

  def step(carry, q, k, seen):
    by_row = 0 if segments is not None else None
    return jax.vmap(over_heads, in_axes=(0, 0, 0, by_row, None))(carry, q, k, seen, Dh**-0.5)

  def owned(n):
    own = {name: x[n] for name, x in sides[which.owner].items()}

    def body(m, carry):
      other = {name: lax.dynamic_index_in_dim(x, m, 0, keepdims=False) for name, x in sides[which.walked].items()}
      by_queries = which.owner == 'queries'
      q, k, i, j = (own, other, n, m) if by_queries else (other, own, m, n)
      if segments is not None:
        return step(carry, q, k, seen(i, j))
      return lax.cond(visible.whole(i, j, block),  # as most are
                      lambda: step(carry, q, k, True), lambda: step(carry, q, k, seen(i, j)[0]))

    start = [jnp.broadcast_to(x, (B, K, *x.shape)) for x in which.start(group[which.owner] * block, Dh)]
    return which.finish(lax.fori_loop(first[n], end[n], body, tuple(start)), own)

  results = lax.map(owned, jnp.arange(padded // block))
  outputs = []
  for x, (_, like) in zip(results, which.outputs):
    G = group[which.owner]
    x = x.reshape(padded // block, B, K, G, block, x.shape[-1]).transpose(1, 2, 3, 0, 4, 5)
    x = x.reshape(B, K * G, padded, -1)[:, :, :L]
    outputs.append(x[..., 0] if like == 'lse' else x.transpose(0, 2, 1, 3).astype(operands[like].dtype))
  return outputs
