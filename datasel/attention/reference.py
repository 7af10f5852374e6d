"""Attention written plainly in float32: the truth that every faster implementation is held to."""

import functools

import jax
import jax.numpy as jnp

from datasel.attention.masks import Mask


def reference(q_BxLxHxDh: jax.Array, k_BxLxKxDh: jax.Array, v_BxLxKxDh: jax.Array, mask: Mask) -> jax.Array:
  """softmax(q k^T / sqrt(Dh)) v over what `mask` shows, O(L^2) memory; a row that sees nothing gives zeros."""
  B, L, H, Dh = q_BxLxHxDh.shape
  K = k_BxLxKxDh.shape[2]
  # Accelerators would round float32 operands to bfloat16 or tf32; bfloat16 products are exact in float32 anyway.
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision='highest')
  q_BxLxKxGxDh = q_BxLxHxDh.reshape(B, L, K, H // K, Dh)
  scores = product('blkgd,bmkd->bkglm', q_BxLxKxGxDh, k_BxLxKxDh) * Dh**-0.5
  visible = mask.dense(L)[:, None, None]
  # A finite floor keeps a row with nothing to see (padding) free of NaN, forward and backward.
  weights = jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(jnp.float32).min), axis=-1)
  weights = jnp.where(visible, weights, 0).astype(v_BxLxKxDh.dtype)
  out = product('bkglm,bmkd->blkgd', weights, v_BxLxKxDh)
  return out.reshape(B, L, H, Dh).astype(q_BxLxHxDh.dtype)
