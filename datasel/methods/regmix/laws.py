"""The laws with one coefficient for each domain: linear, and log-linear.

  linear       loss = c + t . w               (Liu et al. 2024, section 3.2; a ridge where the data ask for one)
  log-linear   loss = c + exp(t . w)          (Ye et al. 2024, Data Mixing Laws, equation 7)

As weights sum to 1, a constant beside t . w in the exponent would say nothing that t does not.  The linear law takes
the weights as they are given, rounded sums and all, which makes it the published least squares to the last digit.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from datasel.methods.regmix import tables

_RIDGES = 10.0 ** np.arange(-4, 3)
_HUBER = 1.345  # deviations from which on a residual counts as an outlier (Huber 1981: 95% efficient without any)
# Where the fit of the log-linear law starts: c below the least loss by these parts of the losses' range.
_FLOORS = (0.02, 0.1, 0.3, 1.0, 3.0, 10.0)
_LOWEST = 30.0  # c is not looked for further below: the law is linear by then
_DRAWS, _FEWEST, _ENTRIES = 200, 20, 10**7  # resamples; fewer where draws x runs x domains would not fit


@dataclasses.dataclass(frozen=True)
class Law:
  """A fitted law.  floor: c.  coefficient_M: t.  draws: the same of S resamples of the runs.

  noise: nats, the standard deviation of a run's loss about the law, which is also what the law gets wrong.
  """

  exponential: bool
  floor: float
  coefficient_M: np.ndarray
  draw_floor_S: np.ndarray
  draw_coefficient_SxM: np.ndarray
  noise: float
  ridge: float = 0.0

  @property
  def importance(self) -> np.ndarray:
    """float64 [M]: the law's prediction of the loss at the mixture of each domain alone."""
    return self.moments(np.eye(len(self.coefficient_M)), variance=False)[0]

  def moments(self, weights_NxM: np.ndarray, variance: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
    """float64 [N] twice: the law, and its variance over resamples (None if not asked for)."""
    weights_NxM = self._rows(weights_NxM)
    mean_N = self.floor + self._link(weights_NxM @ self.coefficient_M, np)
    if not variance:
      return mean_N, None
    # In parts, as S predictions of a million mixtures do not fit.
    parts = np.array_split(weights_NxM, -(-len(weights_NxM) // 10_000) or 1)
    return mean_N, np.concatenate([self._draws(part_NxM).var(axis=0, ddof=1) for part_NxM in parts])

  def covariance(self, weights_AxM: np.ndarray, weights_BxM: np.ndarray) -> np.ndarray:
    """float64 [A, B]: the covariance over resamples of the law at two sets of mixtures, in nats^2."""
    a_SxA, b_SxB = (self._draws(self._rows(weights)) for weights in (weights_AxM, weights_BxM))
    return (a_SxA - a_SxA.mean(0)).T @ (b_SxB - b_SxB.mean(0)) / (len(a_SxA) - 1)

  def mean(self, weights_M: jax.Array) -> jax.Array:
    """The law at one mixture, for jax to trace."""
    return self.floor + self._link(weights_M @ self.coefficient_M, jnp)

  def standard_error(self, weights_M: jax.Array) -> jax.Array:
    """That of a new run's loss at one mixture, for jax to trace."""
    draws_S = self.draw_floor_S + self._link(self.draw_coefficient_SxM @ weights_M, jnp)
    return jnp.sqrt(jnp.var(draws_S, ddof=1) + self.noise ** 2)

  def _rows(self, weights_NxM):
    return tables.normalised(weights_NxM) if self.exponential else weights_NxM

  def _draws(self, weights_NxM):
    return self.draw_floor_S[:, None] + self._link(self.draw_coefficient_SxM @ weights_NxM.T, np)

  def _link(self, x, np):
    return np.exp(x) if self.exponential else x


def fit_linear(weights_NxM: np.ndarray, losses_N: np.ndarray, seed: int = 0) -> Law:
  """Least squares; a ridge on the slopes where its leave-one-out error is lower by more than chance."""
  ridge, freedom, coefficient_M = _choose_ridge(weights_NxM, losses_N)
  floor = float(losses_N.mean() - weights_NxM.mean(0) @ coefficient_M)
  residual_N = losses_N - floor - weights_NxM @ coefficient_M
  noise = math.sqrt(np.square(residual_N).sum() / max(len(losses_N) - freedom, 1))
  draw_SxM = _least_squares(weights_NxM, losses_N, _resamples(weights_NxM, seed), ridge)
  return Law(False, floor, coefficient_M, *_split(draw_SxM), noise, ridge)


def _choose_ridge(weights_NxM, losses_N) -> tuple[float, float, np.ndarray]:
  """The penalty, 0 for least squares; the degrees of freedom that the fit has with it; the slopes."""
  left_NxR, singular_R, right_RxM = np.linalg.svd(weights_NxM - weights_NxM.mean(0), full_matrices=False)
  known_R = singular_R > 1e-9 * singular_R[0]
  left_NxR, singular_R, right_RxM = left_NxR[:, known_R], singular_R[known_R], right_RxM[known_R]
  projected_R = left_NxR.T @ losses_N
  errors, freedoms = {}, {}
  # Least squares that pass through every run whatever its loss say nothing of how well the others predict it.
  plain = [0.0] * (len(losses_N) > len(singular_R) + 1)
  for ridge in (*plain, *_RIDGES.tolist()):
    shrink_R = singular_R ** 2 / (singular_R ** 2 + ridge)
    fitted_N = losses_N.mean() + left_NxR @ (shrink_R * projected_R)
    lever_N = 1 / len(losses_N) + np.square(left_NxR) @ shrink_R
    errors[ridge] = np.square((losses_N - fitted_N) / np.maximum(1 - lever_N, 1e-6))
    freedoms[ridge] = float(lever_N.sum())
  best = min(errors, key=lambda ridge: errors[ridge].mean())
  if plain:
    better_N = errors[0.0] - errors[best]
    best = best if better_N.mean() > better_N.std() / math.sqrt(len(better_N)) else 0.0
  return best, freedoms[best], (singular_R / (singular_R ** 2 + best) * projected_R) @ right_RxM


def _least_squares(weights_NxM, y_N, counts_SxN, ridge) -> np.ndarray:
  """[S, M + 1]: slopes, then the constant, of a ridge with rows counted counts_SxN times."""
  rows_NxP = np.concatenate([weights_NxM, np.ones((len(y_N), 1))], axis=1)
  # The least penalty decides what the data do not: of weights that sum to 1, how much is the constant's.
  penalty_PxP = np.diag(np.append(np.full(weights_NxM.shape[1], max(ridge, 1e-9 * len(y_N))), 0))
  matrix_SxPxP = rows_NxP.T @ (counts_SxN[:, :, None] * rows_NxP) + penalty_PxP
  return np.linalg.solve(matrix_SxPxP, ((counts_SxN * y_N) @ rows_NxP)[..., None])[..., 0]


def _split(theta_SxP) -> tuple[np.ndarray, np.ndarray]:
  return theta_SxP[:, -1], theta_SxP[:, :-1]


def fit_log_linear(weights_NxM: np.ndarray, losses_N: np.ndarray, seed: int = 0) -> Law:
  """Huber's robust least squares by Levenberg-Marquardt, the best of several starts; all starts at once."""
  weights_NxM = tables.normalised(weights_NxM)
  low, scale = float(losses_N.min()), float(np.ptp(losses_N))
  y_N = (losses_N - low) / scale
  whole_1xN = np.ones((1, len(y_N)))
  starts = []
  for floor in _FLOORS:
    (constant,), (t_M,) = _split(_least_squares(weights_NxM, np.log(y_N + floor), whole_1xN, 1e-3 * len(y_N)))
    starts.append(np.append(constant + t_M, -floor))
  start_SxP, bound = np.stack(starts), np.inf
  for _ in range(3):  # all residuals first, then those within the bound that they set
    found_SxP, cost_S = _levenberg(weights_NxM, y_N, np.tile(whole_1xN, (len(start_SxP), 1)), start_SxP, bound, 200)
    best_P = found_SxP[np.argmin(cost_S)]
    residual_N = y_N - _log_linear(weights_NxM, best_P[None])[0]
    start_SxP, bound = best_P[None], _HUBER * max(1.4826 * float(np.median(np.abs(residual_N))), 1e-6)
  counts_SxN = _resamples(weights_NxM, seed)
  draw_SxP, _ = _levenberg(weights_NxM, y_N, counts_SxN, np.tile(best_P, (len(counts_SxN), 1)), bound, 15)
  noise = scale * math.sqrt(np.square(residual_N).sum() / max(len(y_N) - len(best_P), 1))
  return Law(True, low + scale * best_P[-1], best_P[:-1] + math.log(scale), low + scale * draw_SxP[:, -1],
             draw_SxP[:, :-1] + math.log(scale), noise)


def _log_linear(weights_NxM, theta_SxP):
  return theta_SxP[:, -1:] + np.exp(np.minimum(theta_SxP[:, :-1] @ weights_NxM.T, 50))


def _huber(residual_SxN, bound):
  size_SxN = np.abs(residual_SxN)
  return np.where(size_SxN <= bound, 0.5 * size_SxN ** 2, bound * (size_SxN - 0.5 * bound) if bound < np.inf else 0)


def _levenberg(weights_NxM, y_N, counts_SxN, theta_SxP, bound, steps) -> tuple[np.ndarray, np.ndarray]:
  """S fits of y_N with rows counted counts_SxN times, each from its own start: theta_SxP and their costs [S]."""
  S, P = theta_SxP.shape
  # Decides what the data do not: the coefficients of domains in no mixture.
  prior_PxP = 1e-9 * len(y_N) * np.eye(P)
  prior_PxP[:-1, :-1] -= 1e-9 * len(y_N) / (P - 1)
  cost = lambda theta_SxP: ((counts_SxN * _huber(y_N - _log_linear(weights_NxM, theta_SxP), bound)).sum(-1)
                            + 0.5 * ((theta_SxP @ prior_PxP) * theta_SxP).sum(-1))
  cost_S, damping_S = cost(theta_SxP), np.full(S, 1e-2)
  slope_SxNxP = np.ones((S, len(y_N), P))
  for _ in range(steps):
    value_SxN = _log_linear(weights_NxM, theta_SxP)
    residual_SxN = y_N - value_SxN
    slope_SxNxP[:, :, :-1] = (value_SxN - theta_SxP[:, -1:])[..., None] * weights_NxM
    trust_SxN = counts_SxN * np.minimum(1, bound / np.maximum(np.abs(residual_SxN), 1e-300))
    matrix_SxPxP = (slope_SxNxP * trust_SxN[..., None]).transpose(0, 2, 1) @ slope_SxNxP + prior_PxP
    toward_SxP = ((trust_SxN * residual_SxN)[:, None] @ slope_SxNxP)[:, 0] - theta_SxP @ prior_PxP
    diagonal_SxP = np.diagonal(matrix_SxPxP, axis1=1, axis2=2) + 1e-9 * len(y_N)
    damped_SxPxP = matrix_SxPxP + (damping_S[:, None] * diagonal_SxP)[:, :, None] * np.eye(P)
    next_SxP = theta_SxP + np.linalg.solve(damped_SxPxP, toward_SxP[..., None])[..., 0]
    next_SxP[:, -1] = np.maximum(next_SxP[:, -1], -_LOWEST)
    next_S = cost(next_SxP)
    lower_S = next_S < cost_S
    gained_S = np.where(lower_S, cost_S - next_S, 0)
    theta_SxP = np.where(lower_S[:, None], next_SxP, theta_SxP)
    cost_S, damping_S = np.where(lower_S, next_S, cost_S), np.clip(damping_S * np.where(lower_S, 0.3, 4), 1e-12, 1e12)
    if (lower_S & (gained_S < 1e-12 * cost_S + 1e-300) | (damping_S > 1e9)).all():
      break
  return theta_SxP, cost_S


def _resamples(weights_NxM: np.ndarray, seed: int) -> np.ndarray:
  """float64 [S, N]: how often each row is in each of S bootstrap samples."""
  n, draws = len(weights_NxM), min(max(_ENTRIES // weights_NxM.size, _FEWEST), _DRAWS)
  random = np.random.Generator(np.random.Philox(seed))
  return random.multinomial(n, np.full(n, 1 / n), draws).astype(np.float64)
