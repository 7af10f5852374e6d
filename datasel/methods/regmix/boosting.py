"""Gradient-boosted trees, as RegMix fits them: LightGBM with the settings of the authors' notebook.  Extra `regmix`."""

import dataclasses
import math
from typing import Any

import numpy as np

# Everything else is LightGBM's default.  No row or column is sampled: the seed decides nothing.  One thread: a tree of
# some hundred runs is too little work for two, which wait for each other in busy loops where other work has the cores.
PARAMETERS = {'objective': 'regression', 'boosting': 'gbdt', 'metric': ['l1', 'l2'], 'learning_rate': 0.01, 'seed': 42,
              'num_threads': 1, 'verbosity': -1}
ROUNDS = 1000  # at most, where a validation set ends the fit
LEAST_ROWS = 64  # a leaf has 20 runs at least: of fewer runs there would be no tree to speak of
_MOST_ROUNDS, _PATIENCE = 3000, 50  # where cross-validation does


@dataclasses.dataclass(frozen=True)
class Boosted:
  """Fitted trees.  booster: the fit to all runs; group_boosters: those to all but one of G groups, whose spread is the
  law's variance (the delete-a-group jackknife).  noise: nats, out of fold: what the law gets wrong is in it.
  """

  booster: Any
  group_boosters: tuple[Any, ...]
  noise: float
  trees: int
  mean = standard_error = None  # a step function has no gradient

  @property
  def importance(self) -> np.ndarray:
    """float64 [M]: by how much the splits on each weight lowered the squared error."""
    return np.asarray(self.booster.feature_importance('gain'), np.float64)

  def moments(self, weights_NxM: np.ndarray, variance: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
    """float64 [N] twice: the law, and its variance (None if not asked for)."""
    mean_N = self._predict(self.booster, weights_NxM)
    return mean_N, np.square(self._spread(weights_NxM)).sum(0) if variance else None

  def covariance(self, weights_AxM: np.ndarray, weights_BxM: np.ndarray) -> np.ndarray:
    """float64 [A, B]: the covariance of the law at two sets of mixtures, in nats^2."""
    return self._spread(weights_AxM).T @ self._spread(weights_BxM)

  def _spread(self, weights_NxM):
    """float64 [G, N], whose squares sum to the jackknife's variance."""
    G = len(self.group_boosters)
    values_GxN = np.stack([self._predict(one, weights_NxM) for one in self.group_boosters])
    return (values_GxN - values_GxN.mean(0)) * math.sqrt((G - 1) / G)

  def _predict(self, booster, weights_NxM):
    threads = 0 if len(weights_NxM) > 10_000 else 1  # 0: as many as there are cores
    return booster.predict(weights_NxM, num_iteration=self.trees, num_threads=threads)


def installed() -> bool:
  try:
    _lightgbm()
  except ImportError:
    return False
  return True


def fit(weights_NxM: np.ndarray, losses_N: np.ndarray, *, fold_N: np.ndarray,
        stop_on: tuple[np.ndarray, np.ndarray] | None = None) -> Boosted:
  """Trees whose number is that of the least squared error out of fold.

  fold_N: int, each run's fold, 0 .. K-1; they are the jackknife's groups too.
  stop_on: weights and losses to stop by instead, as the authors' notebook does with its test set: 3 rounds without a
  lower l1, or without a lower l2.  The scores on these runs are no longer those of unseen ones.
  Raises ImportError without LightGBM, ValueError for fewer than 64 runs.
  """
  lightgbm = _lightgbm()
  if len(losses_N) < LEAST_ROWS:
    raise ValueError(f'LightGBM on {len(losses_N)} runs; want at least {LEAST_ROWS}, or the model gp, loglinear or '
                     'linear')
  data = lambda weights_NxM, losses_N: lightgbm.Dataset(weights_NxM, losses_N, free_raw_data=False)
  whole = data(weights_NxM, losses_N)
  pairs = [(np.flatnonzero(fold_N != k), np.flatnonzero(fold_N == k)) for k in range(int(fold_N.max()) + 1)]
  if stop_on is None:
    watched = lightgbm.cv(PARAMETERS | {'metric': 'l2'}, whole, _MOST_ROUNDS, folds=pairs, return_cvbooster=True,
                          callbacks=[lightgbm.early_stopping(_PATIENCE, verbose=False)])
    trees, groups = watched['cvbooster'].best_iteration, watched['cvbooster'].boosters
    booster = lightgbm.train(PARAMETERS, whole, trees)
  else:
    booster = lightgbm.train(PARAMETERS, whole, ROUNDS, valid_sets=[data(*stop_on)],
                             callbacks=[lightgbm.early_stopping(3, verbose=False)])
    trees = booster.best_iteration
    groups = [lightgbm.train(PARAMETERS, data(weights_NxM[kept], losses_N[kept]), trees) for kept, _ in pairs]
  error_N = np.empty(len(losses_N))
  for group, (_, left_out) in zip(groups, pairs):
    error_N[left_out] = group.predict(weights_NxM[left_out], num_iteration=trees) - losses_N[left_out]
  return Boosted(booster, tuple(groups), math.sqrt(np.square(error_N).mean()), trees)


def _lightgbm():
  try:
    import lightgbm
  except (ImportError, OSError) as e:  # OSError: without the OpenMP library of the system, libgomp
    raise ImportError(f'the model lightgbm needs LightGBM ({e}); install it with: pip install -e .[regmix]') from e
  return lightgbm
