"""cuDNN's fused attention: gradients only, on NVIDIA GPUs."""

import importlib.util

import jax
import jax.numpy as jnp


def available() -> bool:
  """Whether jax has its CUDA plugin: while tracing, `jax.nn` asks it for cuDNN's version."""
  return any(importlib.util.find_spec(f'jax_cuda{major}_plugin') for major in (12, 13))


def refusal(causal: bool, window: int | None, q_BxLxHxDh: jax.Array, segments: bool, anchors: bool = False) -> str:
  """Why it cannot, or nothing."""
  Dh = q_BxLxHxDh.shape[-1]
  if anchors:
    return 'an anchor mask'
  if segments:
    return 'document segments'
  if q_BxLxHxDh.dtype != jnp.bfloat16:
    return f'{q_BxLxHxDh.dtype} inputs (only bfloat16)'
  if Dh % 8 or Dh > 128:
    return f'head dimension {Dh} (only multiples of 8 up to 128)'
  if window is not None and not causal:
    return 'a window that is not causal'
  return ''


def attend(causal: bool, window: int | None, residual: bool):
  """The library's function: (q, k, v) -> o, or with residuals (o, lse B x L x H)."""
  return lambda q, k, v: jax.nn.dot_product_attention(
    q, k, v, is_causal=causal, implementation='cudnn', return_residual=residual,
    local_window_size=None if window is None else (window - 1, 0))


def forward(causal: bool, window: int | None, x: dict[str, jax.Array], segment_BxL: None, *,
            interpret: bool) -> list[jax.Array]:
  o_BxLxHxDh, lse_BxLxH = attend(causal, window, residual=True)(x['q'], x['k'], x['v'])
  return [o_BxLxHxDh, lse_BxLxH.transpose(0, 2, 1).astype(jnp.float32)]


def backward(causal: bool, window: int | None, x: dict[str, jax.Array], segment_BxL: None, *,
             interpret: bool) -> list[jax.Array]:
  _, pull = jax.vjp(attend(causal, window, residual=False), x['q'], x['k'], x['v'])
  return list(pull(x['do']))
