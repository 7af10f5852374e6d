"""Optimisers and learning-rate schedules of the papers, as optax transforms of plain values."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax


def schedule(name: str, *, peak: float, end: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
  """Learning rate by update: linear up to `peak` in `warmup_steps`, then the named decay to `end` at `total_steps`.

  'constant'         stays at `peak`
  'cosine'           half a cosine down to `end`                                         (PDS, RegMix 1B)
  'exponential'      by a constant factor per step down to `end`                         (DoReMi, App. C)
  'exponential_gap'  the gap to `end` shrinks by a constant factor per step, to 1e-10    (DoReMi's repository)
  """
  if peak <= 0 or end < 0:
    raise ValueError(f'learning rates peak {peak}, end {end}: want peak > 0 and end >= 0')
  if not 0 <= warmup_steps <= total_steps:
    raise ValueError(f'warm-up of {warmup_steps} steps does not fit in {total_steps} steps')
  span = max(total_steps - warmup_steps, 1)
  if name == 'exponential' and end == 0:
    raise ValueError("an 'exponential' decay never reaches an end rate of 0; set a positive end or take 'cosine'")
  if name == 'exponential_gap' and peak - end <= 1e-10:
    raise ValueError(f"an 'exponential_gap' decay needs peak {peak} above end {end}")
  decays = {
    'constant': lambda x: peak + 0 * x,
    'cosine': lambda x: end + (peak - end) * 0.5 * (1 + jnp.cos(jnp.pi * x)),
    'exponential': lambda x: peak * (end / peak) ** x,
    'exponential_gap': lambda x: end + (peak - end) * (1e-10 / (peak - end)) ** x,
  }
  if name not in decays:
    raise ValueError(f'unknown learning-rate schedule {name!r}; known: {sorted(decays)}')

  def rate(step):
    warm = peak * (step + 1) / max(warmup_steps, 1)
    return jnp.where(step < warmup_steps, warm, decays[name](jnp.clip((step - warmup_steps) / span, 0, 1)))

  return rate


def decayed(params: Any) -> Any:
  """True for each parameter that weight decay applies to: all but the norms' scales."""
  return jax.tree_util.tree_map_with_path(lambda path, _: not re.search(r'norm', jax.tree_util.keystr(path)), params)


def clipping(norm: float) -> optax.GradientTransformation:
  """Scales gradients down to this global norm; 0: as they are."""
  return optax.clip_by_global_norm(norm) if norm else optax.identity()


def adamw(learning_rate: optax.ScalarOrSchedule, *, b1: float, b2: float, eps: float, weight_decay: float,
          clip: float) -> optax.GradientTransformation:
  """AdamW (Loshchilov & Hutter 2019) after clipping the gradient's global norm to `clip`."""
  return optax.chain(clipping(clip),
                     optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed))


def adafactor(learning_rate: optax.ScalarOrSchedule, *, weight_decay: float,
              clip: float) -> optax.GradientTransformation:
  """Adafactor (Shazeer & Stern 2018) with an absolute rate and decoupled decay, as DoReMi trains: of the second
  moment only rows and columns are kept, for arrays with two axes of 128 or more, and no first moment at all."""
  return optax.chain(
    clipping(clip),
    optax.scale_by_factored_rms(),
    optax.clip_by_block_rms(1.0),
    optax.add_decayed_weights(weight_decay, mask=decayed),
    optax.scale_by_learning_rate(learning_rate))
