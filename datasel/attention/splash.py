"""JAX's own splash attention: gradients only, on TPUs."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from datasel.attention.visible import pad_to

_LANES = 128


@functools.cache
def _kernel(causal: bool, window: int | None, length: int, heads: int, residuals: bool, interpret: bool):
  shape = (length, length)
  if window is not None:
    one = splash_attention.LocalMask(shape, (window - 1, 0 if causal else window - 1), offset=0)
  else:
    one = splash_attention.CausalMask(shape) if causal else splash_attention.FullMask(shape)
  # Its mask tables are constants: made here, outside whatever is being traced.
  with jax.ensure_compile_time_eval():
    return splash_attention.make_splash_mqa_single_device(
      mask=splash_attention.MultiHeadMask([one] * heads), save_residuals=residuals, interpret=interpret)


def attend(causal: bool, window: int | None, segment_BxL: jax.Array | None, residuals: bool, interpret: bool):
  """The library's function: (q, k, v) B x L x H x Dh -> o, or with residuals (o, lse B x H x L)."""

  def kernel_of(q_BxLxHxDh, k_BxLxKxDh, v_BxLxKxDh):
    B, L, H, Dh = q_BxLxHxDh.shape
    K = k_BxLxKxDh.shape[2]
    # A segment of its own for what is appended, as for padding; both are zeroed by the caller.
    segment = jnp.ones((B, L), jnp.int32) if segment_BxL is None else segment_BxL
    segment = pad_to(segment, 1, _LANES)
    by_head = lambda x, n: pad_to(x.transpose(0, 2, 1, 3), 2, _LANES).reshape(B, K, n, -1, Dh)
    q = by_head((q_BxLxHxDh.astype(jnp.float32) * Dh**-0.5).astype(q_BxLxHxDh.dtype), H // K)
    k, v = by_head(k_BxLxKxDh, 1)[:, :, 0], by_head(v_BxLxKxDh, 1)[:, :, 0]
    kernel = _kernel(causal, window, q.shape[3], H // K, residuals, interpret)
    ids = splash_attention.SegmentIds(segment, segment)
    out = jax.vmap(jax.vmap(kernel, in_axes=(0, 0, 0, None)))(q, k, v, ids)
    back = lambda x: x.reshape(B, H, -1, Dh)[:, :, :L].transpose(0, 2, 1, 3)
    if not residuals:
      return back(out)
    o, (lse,) = out
    return back(o), lse.reshape(B, H, -1)[:, :, :L]

  return kernel_of


def _real(segment_BxL: jax.Array | None, x_BxLxHxDh: jax.Array) -> jax.Array:
  """Zeros where there is only padding, which splash lets see itself."""
  if segment_BxL is None:
    return x_BxLxHxDh
  return jnp.where((segment_BxL > 0)[:, :, None, None], x_BxLxHxDh, 0)


def forward(causal: bool, window: int | None, x: dict[str, jax.Array], segment_BxL: jax.Array | None, *,
            interpret: bool) -> list[jax.Array]:
  o_BxLxHxDh, lse_BxHxL = attend(causal, window, segment_BxL, True, interpret)(x['q'], x['k'], x['v'])
  return [_real(segment_BxL, o_BxLxHxDh), lse_BxHxL]


def backward(causal: bool, window: int | None, x: dict[str, jax.Array], segment_BxL: jax.Array | None, *,
             interpret: bool) -> list[jax.Array]:
  _, pull = jax.vjp(attend(causal, window, segment_BxL, False, interpret), x['q'], x['k'], x['v'])
  return list(pull(_real(segment_BxL, x['do'])))
