"""From fitted regressions to a mixture: the one of least predicted loss, what it gains and how sure that is.

`Objective` says what is minimised; `simulate` is the paper's search by random mixtures, `ascend` follows the gradient
of a smooth model; `gain`, `sensitivity` and `remoteness` tell how much to trust the result.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from datasel.methods.regmix import ascent, mixtures, regression

_ROWS = 20_000  # mixtures drawn and predicted at a time
_FEW = 10_000  # draws to start an ascent from
COMBINE = ('sum', 'worst')
SEARCHES = ('ascend', 'simulate')


@dataclasses.dataclass(frozen=True)
class Objective:
  """What a proposal minimises, in nats: of each target, its predicted loss plus kappa standard errors.

  fits: of each target its regression.  prior_M: weights >= 0; a domain of weight 0 stays out.
  target_weights: one for each target, >= 0, normalised to sum to 1; equal if None.
  combine: 'sum', the weighted mean over targets; 'worst', the largest weighted excess over the prediction at the prior.
  kl: nats added for each nat of KL(mixture || prior), which keeps the proposal near the prior.
  """
  fits: Sequence[regression.Fit]
  prior_M: np.ndarray
  target_weights: Sequence[float] | None = None
  combine: str = 'sum'
  kappa: float = 0.0
  kl: float = 0.0

  def __post_init__(self):
    prior_M = np.asarray(self.prior_M, np.float64)
    weights = np.ones(len(self.fits)) if self.target_weights is None else np.asarray(self.target_weights, np.float64)
    if not self.fits or weights.shape != (len(self.fits),):
      raise ValueError(f'{weights.size} target weights for {len(self.fits)} fitted targets; want one for each')
    if not (np.isfinite(weights) & (weights >= 0)).all() or not weights.sum() > 0:
      raise ValueError(f'target weights are {weights.tolist()}; want numbers >= 0, not all 0')
    if self.combine not in COMBINE:
      raise ValueError(f'unknown combine {self.combine!r}; known: {", ".join(COMBINE)}')
    if not (0 <= self.kappa < math.inf and 0 <= self.kl < math.inf):
      raise ValueError(f'kappa is {self.kappa}, kl is {self.kl}; want numbers >= 0')
    if prior_M.ndim != 1 or not (np.isfinite(prior_M) & (prior_M >= 0)).all() or not prior_M.sum() > 0:
      raise ValueError(f'the prior is {prior_M.tolist()}; want a vector of numbers >= 0, not all 0')
    object.__setattr__(self, 'fits', tuple(self.fits))
    object.__setattr__(self, 'prior_M', prior_M / prior_M.sum())
    object.__setattr__(self, 'target_weights', weights / weights.sum())

  @property
  def smooth(self) -> bool:
    """Whether there is a gradient for `ascend`."""
    return all(fit.mean is not None and not (self.kappa and fit.standard_error is None) for fit in self.fits)

  def targets(self, weights_NxM: np.ndarray) -> np.ndarray:
    """float64 [K, N]: of each target, the predicted loss plus kappa standard errors."""
    if not self.kappa:
      return np.stack([fit.predict_mean(weights_NxM) for fit in self.fits])
    predictions = [fit.predict(weights_NxM) for fit in self.fits]
    return np.stack([mean_N + self.kappa * error_N for mean_N, error_N in predictions])

  def __call__(self, weights_NxM: np.ndarray) -> np.ndarray:
    """float64 [N]: the objective at each mixture; infinite where KL to the prior is asked for and is."""
    values_KxN = self.targets(weights_NxM)
    if self.combine == 'sum':
      value_N = self.target_weights @ values_KxN
    else:
      excess_KxN = values_KxN - self.targets(self.prior_M[None])
      value_N = (self.target_weights[:, None] * excess_KxN).max(0)
    if self.kl:
      value_N = value_N + self.kl * special.rel_entr(weights_NxM, self.prior_M).sum(-1)
    return value_N

  def traceable(self, temperature: float) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """(weights_M, target_weights_K) -> the objective, for jax to differentiate where only domains of prior 0 are at 0.

    temperature: in nats; 'worst' is a softened maximum, at most temperature * log K above it.
    """
    at_prior_K = self.targets(self.prior_M[None])[:, 0]
    known_M = self.prior_M > 0
    log_prior_M = np.log(np.where(known_M, self.prior_M, 1))

    def value(weights_M, target_weights_K):
      value_K = jnp.stack([fit.mean(weights_M) + (self.kappa * fit.standard_error(weights_M) if self.kappa else 0.0)
                           for fit in self.fits])
      if self.combine == 'sum':
        total = jnp.sum(target_weights_K * value_K)
      else:
        total = temperature * jax.nn.logsumexp(target_weights_K * (value_K - at_prior_K) / temperature)
      if self.kl:
        log_M = jnp.log(jnp.where(known_M, weights_M, 1.0))
        total += self.kl * jnp.sum(jnp.where(known_M, weights_M * (log_M - log_prior_M), 0.0))
      return total

    return value


def best_draws(objective: Callable[[np.ndarray], np.ndarray], concentration_M: Sequence[float], *, draws: int,
               keep: int, seed: int, lower_M: Sequence[float] | None = None, upper_M: Sequence[float] | None = None,
               legacy: bool = False) -> tuple[np.ndarray, np.ndarray]:
  """Of `draws` mixtures from Dirichlet(concentration) within the bounds, the `keep` lowest, lowest first.

  Returns float64 [keep, M] and their values [keep]; of equal values the earlier draw is the lower.
  legacy: draws as numpy.random.seed(seed) and numpy.random.dirichlet make them, to the bit; they know no bounds.
  """
  if not 1 <= keep <= draws:
    raise ValueError(f'the best {keep} of {draws} draws are wanted; want at least 1, and no more than are drawn')
  concentration_M = np.asarray(concentration_M, np.float64)
  if concentration_M.ndim != 1 or not (np.isfinite(concentration_M) & (concentration_M >= 0)).all():
    raise ValueError(f'the concentration is {concentration_M.tolist()}; want a vector of numbers >= 0')
  if legacy and not (lower_M is None and upper_M is None):
    raise ValueError("numpy's legacy draws know no bounds; leave out the bounds, or legacy")
  known_D = np.flatnonzero(concentration_M)
  if not known_D.size:
    raise ValueError('the concentration is 0 for all domains; want one above 0')
  M = len(concentration_M)
  lower_M = np.zeros(M) if lower_M is None else lower_M
  upper_M = np.ones(M) if upper_M is None else upper_M
  random = np.random.RandomState(seed) if legacy else np.random.Generator(np.random.Philox(seed))
  best_KxM, values_K = np.zeros((0, M)), np.zeros(0)
  for first in range(0, draws, _ROWS):
    rows = min(_ROWS, draws - first)
    if legacy:
      drawn_NxM = np.zeros((rows, M))
      drawn_NxM[:, known_D] = random.dirichlet(concentration_M[known_D], rows)
    else:
      drawn_NxM = mixtures.draw(random, concentration_M, rows, lower_M, upper_M)
    values_N = np.concatenate([values_K, objective(drawn_NxM)])
    order_K = np.argsort(values_N, kind='stable')[:keep]
    best_KxM, values_K = np.concatenate([best_KxM, drawn_NxM])[order_K], values_N[order_K]
  return best_KxM, values_K


def simulate(objective: Callable[[np.ndarray], np.ndarray], concentration_M: Sequence[float], *, draws: int = 100_000,
             top: int = 128, seed: int = 42, lower_M: Sequence[float] | None = None,
             upper_M: Sequence[float] | None = None, legacy: bool = False) -> np.ndarray:
  """The paper's proposal, float64 [M]: the mean of the `top` best of `draws` mixtures.  Liu et al. 2024, section 3.3.

  The paper takes the best 100 of 1,000,000; the authors' notebook the best 128 of 100,000 with seed 42, which legacy
  repeats to the bit given its prior as it is printed there.  The rest is as in `best_draws`.
  """
  best_KxM, _ = best_draws(objective, concentration_M, draws=draws, keep=top, seed=seed, lower_M=lower_M,
                           upper_M=upper_M, legacy=legacy)
  mean_M = np.mean(best_KxM, axis=0)
  return mean_M if upper_M is None else np.minimum(mean_M, upper_M)  # a mean of equals may round up


def ascend(objective: Objective, starts_SxM: np.ndarray, *, lower_M: Sequence[float] | None = None,
           upper_M: Sequence[float] | None = None) -> tuple[np.ndarray, np.ndarray]:
  """The best mixture that exponentiated gradient descent finds, exactly within the bounds.

  starts_SxM: mixtures to begin from, moved into the bounds.  The vertex of the bounds that the gradient at the best
  points to is tried as well: it is the optimum of a linear or log-linear law.
  Returns weights_M and the objective [S] that each start reached.  ValueError for a model without a gradient.
  """
  lower_M, upper_M = _bounds(objective, lower_M, upper_M)
  weighting_SxK = np.tile(objective.target_weights, (len(starts_SxM), 1))
  weights_SxM, slope_SxM = _descended(objective, starts_SxM, weighting_SxK, lower_M, upper_M)
  reached_S = objective(weights_SxM)
  best = int(np.nanargmin(reached_S))
  tried_3xM = np.stack([ascent.without_dust(weights_SxM[best], lower_M, upper_M), weights_SxM[best],
                        ascent.vertex(slope_SxM[best], lower_M, upper_M)])
  value_3 = objective(tried_3xM)
  value_3[1] += 1e-9  # of equals, not the one whose weights are all but at their bounds
  return tried_3xM[np.nanargmin(value_3)], reached_S


def search(objective: Objective, how: str, sampled_NxM: np.ndarray, *, seed: int, draws: int = 100_000, top: int = 128,
           upper_M: Sequence[float] | None = None) -> np.ndarray:
  """weights_M of the proposal.  how: 'simulate', of Dirichlet(prior), or 'ascend', from the best of a few such draws,
  the prior and the best of the mixtures sampled."""
  if how not in SEARCHES:
    raise ValueError(f'unknown search {how!r}; known: {", ".join(SEARCHES)}')
  if how == 'simulate':
    return simulate(objective, objective.prior_M, draws=draws, top=top, seed=seed, upper_M=upper_M)
  best_KxM, _ = best_draws(objective, objective.prior_M, draws=_FEW, keep=8, seed=seed, upper_M=upper_M)
  trained_M = sampled_NxM[np.argmin(objective(sampled_NxM))]
  return ascend(objective, np.stack([*best_KxM, objective.prior_M, trained_M]), upper_M=upper_M)[0]


def _bounds(objective: Objective, lower_M: Sequence[float] | None, upper_M: Sequence[float] | None
            ) -> tuple[np.ndarray, np.ndarray]:
  """The bounds with what is meant by None, and no room for a domain of prior 0."""
  M = len(objective.prior_M)
  lower_M, upper_M = mixtures.box(np.zeros(M) if lower_M is None else lower_M,
                                  np.ones(M) if upper_M is None else upper_M)
  return mixtures.box(lower_M, np.where(objective.prior_M > 0, upper_M, 0))


def _descended(objective: Objective, starts_SxM: np.ndarray, weighting_SxK: np.ndarray, lower_M: np.ndarray,
               upper_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Where each start comes to under its own weighting of the targets, and the gradients there."""
  if not objective.smooth:
    names = ', '.join(fit.model for fit in objective.fits)
    raise ValueError(f'no gradient is known of the models {names} with kappa {objective.kappa:g}; use simulate')
  starts_SxM = np.asarray(starts_SxM, np.float64)
  if starts_SxM.ndim != 2 or starts_SxM.shape[1] != len(objective.prior_M) or not len(starts_SxM):
    raise ValueError(f'the starts have shape {starts_SxM.shape}; want rows of {len(objective.prior_M)} weights')
  weights_SxM = 0.99 * starts_SxM + 0.01 * objective.prior_M  # a weight of 0 would stay 0
  for temperature in (0.1, 0.01, 0.001) if objective.combine == 'worst' else (1.0,):
    weights_SxM, slope_SxM = ascent.descend(objective.traceable(temperature), weights_SxM, weighting_SxK, lower_M,
                                            upper_M)
  return weights_SxM, slope_SxM


def gain(objective: Objective, weights_M: np.ndarray, baseline_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Of each target, the nats by which its predicted loss is lower than at the baseline, and that difference's error.

  Returns two float64 [K].  The standard error is of the difference of the law between the two mixtures, from their
  covariance: two mixtures that are alike err alike.
  """
  pair_2xM = np.stack([baseline_M, weights_M])
  means_Kx2 = np.stack([fit.predict_mean(pair_2xM) for fit in objective.fits])
  joint_Kx2x2 = np.stack([fit.covariance(pair_2xM, pair_2xM) for fit in objective.fits])
  variance_K = joint_Kx2x2[:, 0, 0] + joint_Kx2x2[:, 1, 1] - 2 * joint_Kx2x2[:, 0, 1]
  return means_Kx2[:, 0] - means_Kx2[:, 1], np.sqrt(np.maximum(variance_K, 0))


def remoteness(weights_M: np.ndarray, sampled_NxM: np.ndarray) -> tuple[float, float]:
  """How far the mixture is from the nearest sampled one, and how far 95% of those are from theirs at most."""
  between_NxN = mixtures.distances(sampled_NxM, sampled_NxM)
  np.fill_diagonal(between_NxN, np.inf)
  usual = float(np.quantile(between_NxN.min(-1), 0.95)) if len(sampled_NxM) > 1 else 0.0
  return float(mixtures.distances(np.asarray(weights_M)[None], sampled_NxM).min()), usual


def sensitivity(objectives: Mapping[str, Objective], *, seeds: Sequence[int] = (0, 1, 2),
                tops: Sequence[int] = (1, 128, 1024), draws: int = 50_000,
                upper_M: Sequence[float] | None = None) -> list[dict[str, Any]]:
  """The proposals of other choices: of every objective, by simulation of every seed and top, and by ascent.

  objectives: by what they are called in the table, such as the model.  Each row: {'objective', 'search': 'simulate' or
  'ascend', 'seed' and 'top' (None for ascent), 'weights_M', 'value': nats, of the row's own objective}.
  """
  rows: list[dict[str, Any]] = []
  for name, objective in objectives.items():
    starts = []
    for seed in seeds:
      best_KxM, _ = best_draws(objective, objective.prior_M, draws=draws, keep=max(tops), seed=seed, upper_M=upper_M)
      means_TxM = np.stack([best_KxM[:top].mean(0) for top in tops])
      means_TxM = means_TxM if upper_M is None else np.minimum(means_TxM, upper_M)
      rows += [{'objective': name, 'search': 'simulate', 'seed': seed, 'top': top, 'weights_M': weights_M,
                'value': float(value)} for top, weights_M, value in zip(tops, means_TxM, objective(means_TxM))]
      starts += [best_KxM[0], means_TxM[-1]]
    if objective.smooth:
      weights_M, _ = ascend(objective, np.stack(starts), upper_M=upper_M)
      rows.append({'objective': name, 'search': 'ascend', 'seed': None, 'top': None, 'weights_M': weights_M,
                   'value': float(objective(weights_M[None])[0])})
  return rows


def pareto(values_NxK: np.ndarray) -> np.ndarray:
  """int64: which rows no other row is below or level with in all K values and below in one, by their first value.

  Exact; O(N log N) for two values.  Of equal rows all are kept or none.
  """
  values_NxK = np.asarray(values_NxK, np.float64)
  if values_NxK.ndim != 2 or not np.isfinite(values_NxK).all():
    raise ValueError(f'values of shape {values_NxK.shape} are not all finite, or no table; want N rows of K numbers')
  rows_UxK, group_N = np.unique(values_NxK, axis=0, return_inverse=True)  # in lexical order: none is below an earlier
  if values_NxK.shape[1] <= 2:
    before_U = np.minimum.accumulate(rows_UxK[:, -1])
    kept_U = np.append(True, rows_UxK[1:, -1] < before_U[:-1])
  else:
    kept_U = np.zeros(len(rows_UxK), bool)
    front_FxK = rows_UxK[:0]
    for u, row_K in enumerate(rows_UxK):
      kept_U[u] = not (front_FxK <= row_K).all(-1).any()
      if kept_U[u]:
        front_FxK = np.concatenate([front_FxK, row_K[None]])
  kept_N = np.flatnonzero(kept_U[group_N.ravel()])
  return kept_N[np.lexsort(values_NxK[kept_N].T[::-1])]


def pareto_front(objective: Objective, *, draws: int = 20_000, sweeps: int = 33, seed: int = 0,
                 lower_M: Sequence[float] | None = None, upper_M: Sequence[float] | None = None
                 ) -> tuple[np.ndarray, np.ndarray]:
  """Mixtures of which none is predicted better in one target but by being worse in another: [F, M], and [F, K] nats.

  From `draws` about the prior and, for smooth models, the optimum of each of `sweeps` weightings of the targets: even
  steps between two; of more, each alone, all alike, and weightings at random.
  """
  K = len(objective.fits)
  if K < 2:
    raise ValueError(f'a Pareto front of {K} target; want two targets or more')
  rng = np.random.Generator(np.random.Philox(seed))
  bounds = _bounds(objective, lower_M, upper_M)
  drawn_NxM = mixtures.draw(rng, objective.prior_M, draws, *bounds)
  values_KxN = objective.targets(drawn_NxM)
  found = [drawn_NxM]
  if objective.smooth:
    share_S = np.linspace(0, 1, max(sweeps, 2))
    random_SxK = rng.dirichlet(np.ones(K), max(sweeps - K - 1, 0))
    weighting_SxK = (np.stack([share_S, 1 - share_S], -1) if K == 2 else
                     np.concatenate([np.eye(K), np.full((1, K), 1 / K), random_SxK]))
    starts_SxM = drawn_NxM[np.argmin(weighting_SxK @ values_KxN, axis=-1)]
    summed = dataclasses.replace(objective, combine='sum', kl=0.0)
    weights_SxM, slope_SxM = _descended(summed, starts_SxM, weighting_SxK, *bounds)
    found += [weights_SxM, np.stack([ascent.vertex(slope_M, *bounds) for slope_M in slope_SxM])]
  mixtures_NxM = np.concatenate(found)
  values_NxK = objective.targets(mixtures_NxM).T
  front_F = pareto(values_NxK)
  return mixtures_NxM[front_F], values_NxK[front_F]
