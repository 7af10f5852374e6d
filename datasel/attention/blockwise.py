"""The passes of flash attention in plain jax.numpy: O(L) memory on any backend, partitioned by XLA itself.

The G query heads that share a key head are stacked into the rows of one tile, so keys are never repeated and each
product is as large as the block allows.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from datasel.attention.tiles import VECTORS, Pass
from datasel.attention.visible import Marks, Visible, Walk, cut_keys, pad_keys, pad_to

# Scores of one pair of tiles, of all rows and heads, that stay in the cache of a CPU's core with what is made of them.
_CACHED_SCORES = 2**17


def _block(length: int, heads: int) -> int:
  """Positions of a tile, in [64, 256]: a quarter of the row, so that what a causal mask hides is skipped; on a CPU
  fewer, where the scores of all `heads`, those of every row, would not stay in its cache."""
  block = min(256, max(64, pl.next_power_of_2(length) // 4))
  while jax.default_backend() == 'cpu' and block > 64 and heads * block**2 > _CACHED_SCORES:
    block //= 2
  return min(block, -(-length // 8) * 8)


def run(which: Pass, visible: Visible, operands: dict[str, jax.Array], marks: Marks | None, *,
        interpret: bool = False) -> list[jax.Array]:
  """One pass: its outputs.  operands: queries B x L x H x Dh, keys B x T x K x Dh (T = L without an anchor mask), and
  vectors B x H x L; each output is shaped like one of them."""
  B, L, H, Dh = operands['q'].shape
  K = operands['k'].shape[2]
  block = _block(L, B * H)
  group = {'queries': H // K, 'keys': 1}
  slots = visible.slots
  visible = visible.aligned(block)
  pad = {'queries': lambda x, axis: pad_to(x, axis, block), 'keys': lambda x, axis: pad_keys(x, axis, block, slots)}

  def tiles(name: str, side: str) -> jax.Array:
    """N x B x K x (G block) x (Dh or 1): the tile is the leading axis, as loops want it."""
    x, G = operands[name], group[side]
    x = x[..., None] if name in VECTORS else x.transpose(0, 2, 1, 3)
    x = pad[side](x, 2)
    x = x.reshape(x.shape[0], K, G, -1, block, x.shape[-1])
    return x.transpose(3, 0, 1, 2, 4, 5).reshape(x.shape[3], x.shape[0], K, G * block, x.shape[-1])

  sides = {'queries': {name: tiles(name, 'queries') for name in which.queries},
           'keys': {name: tiles(name, 'keys') for name in which.keys}}
  if 'q_t' in which.queries:
    for side, names in (('queries', ('q_t', 'q')), ('keys', ('k', 'k_t'))):
      sides[side]['both'] = jnp.concatenate([sides[side][name] for name in names], axis=-1)
  walks = visible.walk(which.owner, block, block, marks, together=True)
  if marks is not None:  # N x B x M x block, and N x B x block
    query_marks = pad['queries'](marks.queries, 2).reshape(B, marks.queries.shape[1], -1, block).transpose(2, 0, 1, 3)
    key_marks = pad['keys'](marks.keys, 1).reshape(B, -1, block).swapaxes(0, 1)
  positions = jnp.arange(block, dtype=jnp.int32)

  def seen(i, j):
    """bool (B or 1) x (G block) x block for query tile i and key tile j."""
    at = [(i * block + positions)[None, :, None], (j * block + positions)[None, None, :]]
    if marks is not None:
      at += [query_marks[i].swapaxes(0, 1)[..., None], key_marks[j][:, None, :]]
    mask = visible.tile(*at) if visible.slots is None else visible.anchor_tile(*at, j * block < visible.slots)
    return jnp.tile(mask, (1, group['queries'], 1))

  over_heads = jax.vmap(which.step, in_axes=(0, 0, 0, None, None))

  def step(carry, q, k, seen):
    by_row = 0 if marks is not None else None
    return jax.vmap(over_heads, in_axes=(0, 0, 0, by_row, None))(carry, q, k, seen, Dh**-0.5)

  def owned(n):
    own = {name: x[n] for name, x in sides[which.owner].items()}
    walk = Walk(*(x if x is None else x[0, n] for x in walks))

    def body(s, carry):
      m = walk.tile(s)
      other = {name: lax.dynamic_index_in_dim(x, m, 0, keepdims=False) for name, x in sides[which.walked].items()}
      by_queries = which.owner == 'queries'
      q, k, i, j = (own, other, n, m) if by_queries else (other, own, m, n)
      if marks is not None:
        return step(carry, q, k, seen(i, j))
      return lax.cond(visible.whole(i, j, block),  # as most are
                      lambda: step(carry, q, k, True), lambda: step(carry, q, k, seen(i, j)[0]))

    start = [jnp.broadcast_to(x, (B, K, *x.shape)) for x in which.start(group[which.owner] * block, Dh)]
    return which.finish(lax.fori_loop(0, walk.count, body, tuple(start)), own)

  n_owned = next(iter(sides[which.owner].values())).shape[0]
  results = lax.map(owned, jnp.arange(n_owned))
  outputs = []
  for x, (_, like) in zip(results, which.outputs):
    G = group[which.owner]
    x = x.reshape(n_owned, B, K, G, block, x.shape[-1]).transpose(1, 2, 3, 0, 4, 5)
    x = x.reshape(B, K * G, n_owned * block, -1)
    x = cut_keys(x, 2, block, slots, L) if which.owner == 'keys' else x[:, :, :L]
    outputs.append(x[..., 0] if like == 'lse' else x.transpose(0, 2, 1, 3).astype(operands[like].dtype))
  return outputs
