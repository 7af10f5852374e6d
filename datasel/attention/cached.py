"""Attention of a few new positions over the keys and values of all earlier ones."""

import itertools

import jax
import jax.numpy as jnp


def cached_attention(q_BxLxHxDh: jax.Array, k_BxKxTxDh: jax.Array, v_BxKxTxDh: jax.Array, visible_BxLxT: jax.Array,
                     *more: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
  """softmax(q k^T / sqrt(Dh)) v over the cache slots that `visible_BxLxT` (bool) shows; float32 statistics.

  more: keys, values and what is visible of them, as for the cache, each of its own T: one softmax over all, and nothing
  is copied to stand beside the cache.  O(L T) memory: for prompts use `attention`.  A query that sees nothing gives
  zeros.  Returns B x L x H x Dh.
  """
  B, L, H, Dh = q_BxLxHxDh.shape
  K = k_BxKxTxDh.shape[1]
  q_BxLxKxGxDh = q_BxLxHxDh.reshape(B, L, K, H // K, Dh)
  parts = [(k_BxKxTxDh, v_BxKxTxDh, visible_BxLxT), *more]
  visible = jnp.concatenate([shown_BxLxT for _, _, shown_BxLxT in parts], axis=-1)[:, None, None]
  scores = jnp.concatenate([_product('blkgd,bktd->bkglt', q_BxLxKxGxDh, k_BxKxTxDh) for k_BxKxTxDh, _, _ in parts], -1)
  weights = jax.nn.softmax(jnp.where(visible, scores * Dh**-0.5, jnp.finfo(jnp.float32).min), axis=-1)
  weights = jnp.where(visible, weights, 0).astype(v_BxKxTxDh.dtype)
  ends = itertools.accumulate(k_BxKxTxDh.shape[2] for k_BxKxTxDh, _, _ in parts[:-1])
  out_BxLxKxGxDh = sum(_product('bkglt,bktd->blkgd', weights, v_BxKxTxDh) for weights, (_, v_BxKxTxDh, _) in zip(
    jnp.split(weights, list(ends), axis=-1), parts))
  return out_BxLxKxGxDh.reshape(B, L, H, Dh).astype(q_BxLxHxDh.dtype)


def _product(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """In float32 at full precision, as the flash kernels compute it; bfloat16 products are exact there anyway."""
  wide = lambda a, b: jnp.einsum(axes, a, b, preferred_element_type=jnp.float32, precision='highest')
  # XLA's CPU backend has no such product of bfloat16 itself.
  return jax.lax.platform_dependent(a, b, cpu=lambda a, b: wide(a.astype(jnp.float32), b.astype(jnp.float32)),
                                    default=wide)
