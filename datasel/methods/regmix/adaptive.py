"""Which mixtures to train next: those from which a regression, best a Gaussian process, expects to improve most."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import special

from datasel.methods.regmix import mixtures, regression


def expected_improvement(mean_N: np.ndarray, deviation_N: np.ndarray, best: float) -> np.ndarray:
  """float64 [N]: the expectation of max(best - y, 0) for y normal with that mean and standard deviation."""
  below_N = best - mean_N
  z_N = np.clip(below_N / np.maximum(deviation_N, 1e-300), -38, 38)  # beyond, the density is 0
  density_N = np.exp(-0.5 * z_N * z_N) / math.sqrt(2 * math.pi)
  return np.where(deviation_N > 0, below_N * special.ndtr(z_N) + deviation_N * density_N, np.maximum(below_N, 0))


def next_batch(fit: regression.Fit, sampled_NxM: np.ndarray, q: int, prior_M: Sequence[float], *, seed: int,
               upper_M: Sequence[float] | None = None, grid: float = 2e-4, pool: int = 1024) -> np.ndarray:
  """float64 [q, M]: the mixtures to train next, each of largest expected improvement, on the grid and within the caps.

  After each choice the model believes its own prediction there (kriging believer, Ginsbourger et al. 2010): the means
  stay, the errors near it shrink.  Chosen from `pool` mixtures of the paper's sampler and as many about the one of
  lowest prediction; none that was sampled, none twice.  ValueError where there are not so many.
  """
  prior_M = np.asarray(prior_M, np.float64) / np.sum(prior_M)
  upper_M = mixtures.caps(prior_M) if upper_M is None else upper_M
  about_prior_NxM = mixtures.some(prior_M, max(pool, q), seed=seed, upper_M=upper_M, grid=grid)
  mean_N = fit.predict_mean(about_prior_NxM)
  center_M = 0.9 * about_prior_NxM[np.argmin(mean_N)] + 0.1 * prior_M
  about_best_NxM = mixtures.some(center_M, max(pool, q), seed=seed, upper_M=upper_M, grid=grid,
                                 temperature=1.0, strengths=(10.0, 100.0, 1000.0))
  units = round(1 / grid)
  sampled = {row.tobytes() for row in np.rint(np.asarray(sampled_NxM) * units).astype(np.int64)}
  counts_NxM = np.unique(np.rint(np.concatenate([about_prior_NxM, about_best_NxM]) * units).astype(np.int64), axis=0)
  counts_NxM = counts_NxM[[row.tobytes() not in sampled for row in counts_NxM]]
  if len(counts_NxM) < q:
    raise ValueError(f'{len(counts_NxM)} mixtures that were not sampled were found, {q} are wanted; ask for fewer')
  pool_NxM = counts_NxM / units
  mean_N = fit.predict_mean(pool_NxM)
  variance_N = np.concatenate([np.diagonal(fit.covariance(some, some))
                               for some in np.array_split(pool_NxM, -(-len(pool_NxM) // 256))]).copy()
  certain = 1e-9 * float(variance_N.max())  # what is left of a variance by rounding alone
  best = float(fit.predict_mean(sampled_NxM).min())
  chosen: list[int] = []
  explained_RxN = np.zeros((0, len(pool_NxM)))
  free_N = np.ones(len(pool_NxM), bool)
  for _ in range(q):
    value_N = expected_improvement(mean_N, np.sqrt(np.maximum(variance_N, 0)), best)
    # Where all improvements underflow, the lower bound of the prediction still tells them apart.
    hope_N = value_N if (value_N[free_N] > 0).any() else np.sqrt(np.maximum(variance_N, 0)) - mean_N
    pick = int(np.argmax(np.where(free_N, hope_N, -np.inf)))
    column_N = fit.covariance(pool_NxM, pool_NxM[pick:pick + 1])[:, 0] - explained_RxN.T @ explained_RxN[:, pick]
    if column_N[pick] > certain:  # else it is known from the others, and tells of none
      explained_RxN = np.concatenate([explained_RxN, column_N[None] / math.sqrt(column_N[pick])])
      variance_N -= explained_RxN[-1] ** 2
    best = min(best, float(mean_N[pick]))
    free_N[pick] = False
    chosen.append(pick)
  return pool_NxM[chosen]
