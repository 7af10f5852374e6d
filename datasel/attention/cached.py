"""Attention of a few new positions over the keys and values of all earlier ones."""

import functools

import jax
import jax.numpy as jnp


def cached_attention(q_BxLxHxDh: jax.Array, k_BxTxKxDh: jax.Array, v_BxTxKxDh: jax.Array,
                     visible_BxLxT: jax.Array) -> jax.Array:
  """softmax(q k^T / sqrt(Dh)) v over the cache slots that `visible_BxLxT` (bool) shows; float32 statistics.

  O(L T) memory: for prompts use `attention`.  A query that sees nothing gives zeros.  Returns B x L x H x Dh.
  """
  B, L, H, Dh = q_BxLxHxDh.shape
  K = k_BxTxKxDh.shape[2]
  # float32 products in full precision, as the flash kernels compute them; bfloat16 ones are exact in float32 anyway.
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision='highest')
  q_BxLxKxGxDh = q_BxLxHxDh.reshape(B, L, K, H // K, Dh)
  scores = product('blkgd,btkd->bkglt', q_BxLxKxGxDh, k_BxTxKxDh) * Dh**-0.5
  visible = visible_BxLxT[:, None, None]
  weights = jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(jnp.float32).min), axis=-1)
  weights = jnp.where(visible, weights, 0).astype(v_BxTxKxDh.dtype)
  return product('bkglt,btkd->blkgd', weights, v_BxTxKxDh).reshape(B, L, H, Dh).astype(q_BxLxHxDh.dtype)
