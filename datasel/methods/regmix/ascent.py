"""Gradient descent over mixtures: on the simplex, within a lower and an upper bound on each domain."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

_LEAST = 1e-15  # of a weight on the way: the root of 0 has no gradient


def project(log_M: jax.Array, lower_M: jax.Array, upper_M: jax.Array) -> jax.Array:
  """The mixture w within the bounds that is nearest to y = exp(log_M) in KL(w || y): y scaled, then clipped.

  Exact: the scale is found by bisection, then from the weights that are at no bound.  Take it in float64.
  """
  log_M = jnp.maximum(log_M - jnp.max(log_M), -700.0)
  clipped = lambda shift: jnp.clip(jnp.exp(log_M + shift), lower_M, upper_M)

  def halve(_, ends):
    low, high = ends
    middle = (low + high) / 2
    over = jnp.sum(clipped(middle)) > 1
    return jnp.where(over, low, middle), jnp.where(over, middle, high)

  low, high = jax.lax.fori_loop(0, 64, halve, (jnp.full((), -710.0), jnp.full((), 705.0)))
  weights_M = clipped((low + high) / 2)
  free_M = (weights_M > lower_M) & (weights_M < upper_M)
  rest = 1 - jnp.sum(jnp.where(free_M, 0, weights_M))
  scale = rest / jnp.where(jnp.any(free_M), jnp.sum(jnp.where(free_M, weights_M, 0)), 1.0)
  return jnp.where(free_M, jnp.clip(weights_M * scale, lower_M, upper_M), weights_M)


def vertex(slope_M: np.ndarray, lower_M: np.ndarray, upper_M: np.ndarray) -> np.ndarray:
  """The mixture within the bounds of least slope . w: domains filled to their bound, the lowest slope first."""
  weights_M = np.array(lower_M, np.float64)
  for m in np.argsort(slope_M, kind='stable'):
    weights_M[m] += np.clip(1 - weights_M.sum(), 0, upper_M[m] - lower_M[m])
  return np.minimum(weights_M, upper_M)


def descend(value: Callable[[jax.Array, jax.Array], jax.Array], starts_SxM: np.ndarray, settings_SxK: np.ndarray,
            lower_M: np.ndarray, upper_M: np.ndarray, *, steps: int = 400) -> tuple[np.ndarray, np.ndarray]:
  """Where exponentiated gradient descent of value(weights_M, settings_K) brings each start, and the gradients there.

  All starts in one program, in float64.  A step multiplies the weights by exp(-rate * gradient) and projects them into
  the bounds (Kivinen and Warmuth 1997); it is kept where it lowers the value, and the rate cut where it does not.
  Returns float64 [S, M] twice; a domain of upper bound 0 has weight and gradient 0.
  """
  known_M = upper_M > 0
  floor = lambda weights: np.log(np.maximum(weights, _LEAST))

  def evaluate(weights_M, settings_K):
    value_of, slope_M = jax.value_and_grad(value)(weights_M, settings_K)
    return value_of, jnp.where(known_M, slope_M, 0.0)

  def move(weights_M, slope_M, rate):
    centered_M = slope_M - jnp.sum(weights_M * slope_M)
    return project(jnp.log(jnp.maximum(weights_M, _LEAST)) - jnp.clip(rate * centered_M, -5, 5), lower_M, upper_M)

  def step(carry):
    i, weights_M, value_of, slope_M, rate, settings_K = carry
    next_M = move(weights_M, slope_M, rate)
    next_value, next_slope_M = evaluate(next_M, settings_K)
    lower = (next_value < value_of) & jnp.all(jnp.isfinite(next_slope_M))
    keep = lambda new, old: jnp.where(lower, new, old)
    return (i + 1, keep(next_M, weights_M), keep(next_value, value_of), keep(next_slope_M, slope_M),
            jnp.where(lower, rate * 1.5, rate * 0.4), settings_K)

  def path(log_M, settings_K):
    weights_M = project(log_M, lower_M, upper_M)
    going = lambda carry: (carry[0] < steps) & (carry[4] > 1e-9)
    start = (0, weights_M, *evaluate(weights_M, settings_K), jnp.ones(()), settings_K)
    _, weights_M, _, slope_M, _, _ = jax.lax.while_loop(going, step, start)
    return weights_M, slope_M

  with jax.enable_x64(True):
    found = jax.jit(jax.vmap(path))(floor(np.asarray(starts_SxM, np.float64)), np.asarray(settings_SxK, np.float64))
    return tuple(np.array(one) for one in found)


def without_dust(weights_M: np.ndarray, lower_M: np.ndarray, upper_M: np.ndarray, least: float = 1e-6) -> np.ndarray:
  """Weights below `least` become 0 where they may; what they had goes to the others, in proportion to their room."""
  kept_M = np.where((weights_M < least) & (lower_M == 0), 0, weights_M)
  room_M = np.where(kept_M > 0, upper_M - kept_M, 0)
  short = max(1 - kept_M.sum(), 0)  # of weights that are nothing but rounding, nothing is missing
  if short > room_M.sum():
    return weights_M
  return np.minimum(kept_M + room_M * (short / room_M.sum()), upper_M) if short else kept_M
