"""Rotary position embedding (Su et al. 2021) and the ways published models stretch it to longer texts."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# What each kind needs, and what it may have: the names of Hugging Face's `rope_parameters`.
_LENGTH = 'original_max_position_embeddings'
KINDS: dict[str, tuple[set[str], set[str]]] = {
  'linear': ({'factor'}, set()),
  'dynamic': ({'factor', _LENGTH}, set()),
  'llama3': ({'factor', 'low_freq_factor', 'high_freq_factor', _LENGTH}, set()),
  'yarn': ({'factor', _LENGTH}, {'attention_factor', 'beta_fast', 'beta_slow', 'mscale', 'mscale_all_dim', 'truncate'}),
}


def check_scaling(scaling: Mapping[str, Any]) -> None:
  """Raises ValueError for a kind that is not known here, or one that lacks a parameter or has a strange one."""
  kind = scaling.get('rope_type')
  if kind not in KINDS:
    raise ValueError(f'model rope_scaling has rope_type {kind!r}; known: {sorted(KINDS)}, or no scaling at all')
  needed, allowed = KINDS[kind]
  given = scaling.keys() - {'rope_type'}
  if not needed <= given <= needed | allowed:
    raise ValueError(f'model rope_scaling {kind!r} has the parameters {sorted(given)}; it needs {sorted(needed)} and '
                     f'may have {sorted(allowed)}')
  for name in given - {'truncate'}:
    if isinstance(scaling[name], bool) or not isinstance(scaling[name], (int, float)) or not 0 < scaling[name] < 1e9:
      raise ValueError(f'model rope_scaling {kind!r} has {name} {scaling[name]!r}; want a positive number')


def rotation(position_BxL: jax.Array, dim: int, theta: float,
             scaling: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
  """cos and sin, B x L x 1 x dim/2 float32: computed once, shared by all layers.

  scaling: {} or {'rope_type': one of KINDS, and its parameters}.  'dynamic' depends on the largest position given.
  """
  factor = _attention_factor(scaling)
  if scaling.get('rope_type') == 'dynamic':
    stretch, original = scaling['factor'], scaling[_LENGTH]
    length = jnp.maximum(position_BxL.max() + 1, original).astype(jnp.float32)
    base = theta * (stretch * length / original - (stretch - 1)) ** (dim / (dim - 2))
    frequency_R = 1.0 / base ** jnp.asarray(_exponents(dim))
  else:
    frequency_R = jnp.asarray(_frequencies(dim, theta, scaling))
  angle_BxLx1xR = position_BxL[:, :, None, None].astype(jnp.float32) * frequency_R[None, None, None]
  return jnp.cos(angle_BxLx1xR) * factor, jnp.sin(angle_BxLx1xR) * factor


def rotate(x_BxLxHxDh: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Turns the first channels of each head, halves paired as Hugging Face pairs them; the rest stays."""
  cos, sin = rotation
  half = cos.shape[-1]
  x32 = x_BxLxHxDh.astype(jnp.float32)
  first, second, rest = x32[..., :half], x32[..., half:2 * half], x32[..., 2 * half:]
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1).astype(x_BxLxHxDh.dtype)


def _exponents(dim: int) -> np.ndarray:
  return np.arange(0, dim, 2, dtype=np.float32) / np.float32(max(dim, 1))


def _frequencies(dim: int, theta: float, scaling: Mapping[str, Any]) -> np.ndarray:
  """float32 [dim/2] radians per position.  In float32 throughout: at position 10^4, published models were trained with
  its rounding."""
  frequency = (1 / np.float32(theta) ** _exponents(dim)).astype(np.float32)
  kind = scaling.get('rope_type')
  if kind == 'linear':  # kaiokendev 2023: positions squeezed
    return frequency / np.float32(scaling['factor'])
  if kind == 'llama3':  # slow channels squeezed, fast ones left, those between mixed
    low, high, original = scaling['low_freq_factor'], scaling['high_freq_factor'], scaling[_LENGTH]
    turns = original * frequency / np.float32(2 * math.pi)  # of a channel over the original length
    kept = np.clip((turns - low) / (high - low), 0, 1).astype(np.float32)
    return (1 - kept) * frequency / np.float32(scaling['factor']) + kept * frequency
  if kind == 'yarn':  # Peng et al. 2023, eq. 19-23
    first = _channel_of_turns(scaling.get('beta_fast', 32), dim, theta, scaling[_LENGTH])
    last = _channel_of_turns(scaling.get('beta_slow', 1), dim, theta, scaling[_LENGTH])
    if scaling.get('truncate', True):
      first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    last += 0.001 if first == last else 0
    squeezed = np.clip((np.arange(dim // 2, dtype=np.float32) - first) / (last - first), 0, 1).astype(np.float32)
    return squeezed * frequency / np.float32(scaling['factor']) + (1 - squeezed) * frequency
  return frequency


def _channel_of_turns(turns: float, dim: int, theta: float, length: float) -> float:
  """The channel (a real number) that turns so often over `length` positions."""
  return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))


def _attention_factor(scaling: Mapping[str, Any]) -> float:
  """YaRN's temperature: what cos and sin are multiplied by (Peng et al. 2023, section 3.4)."""
  if scaling.get('rope_type') != 'yarn':
    return 1.0
  if 'attention_factor' in scaling:
    return scaling['attention_factor']
  grown = lambda weight: 0.1 * weight * math.log(scaling['factor']) + 1 if scaling['factor'] > 1 else 1.0
  if 'mscale' in scaling and 'mscale_all_dim' in scaling:
    return grown(scaling['mscale']) / grown(scaling['mscale_all_dim'])
  return grown(1)
