"""Regression of a loss on the mixture: four models behind one interface, judged on runs that they have not seen.

`fit` gives the model asked for, or of all that fit the data the one that cross-validation favours, and says why.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import threadpoolctl
from scipy import stats

from datasel.methods.regmix import boosting, gaussian_process, laws, tables

# In order of preference where the errors do not tell them apart: fewer coefficients first, which extrapolate further.
MODELS = ('linear', 'loglinear', 'gp', 'lightgbm')
_INNER_FOLDS = 3  # for the number of trees while the model itself is being cross-validated
_HELD_OUT = 0.2  # of the runs, in a learning curve


@dataclasses.dataclass(frozen=True)
class Fit:
  """A fitted regression.  Mixtures are rows of weights in the order of the columns it was fitted on.

  model: of MODELS.  reason: in words, why it.  law: the model's own fit, with its coefficients or lengths.
  cross_validation: {model: what `cross_validate` says of it}; empty where the model was asked for by name.
  mean, standard_error: of one mixture weights_M, a scalar that jax can trace, under jax.enable_x64 for full precision;
  None for LightGBM, which has no gradient.
  """

  model: str
  reason: str
  cross_validation: dict[str, dict[str, Any]]
  law: Any
  columns: int

  def predict(self, weights_NxM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64 [N] twice: the mean, and the standard error of a new run's loss about it, in nats.

    The error is of the law (`covariance`) and of a run about the law (`noise`): squares of the two, summed.
    """
    mean_N, variance_N = self.law.moments(self._checked(weights_NxM))
    return mean_N, np.sqrt(variance_N + self.noise ** 2)

  def predict_mean(self, weights_NxM: np.ndarray) -> np.ndarray:
    """The first of `predict`, several times faster: what a search among a million mixtures asks for."""
    return self.law.moments(self._checked(weights_NxM), variance=False)[0]

  def covariance(self, weights_AxM: np.ndarray, weights_BxM: np.ndarray) -> np.ndarray:
    """float64 [A, B], nats^2: of the law itself at two sets of mixtures, without a run's noise.

    The joint posterior of a Gaussian process, the bootstrap's covariance of a law, the jackknife's of LightGBM.
    """
    return self.law.covariance(self._checked(weights_AxM), self._checked(weights_BxM))

  @property
  def noise(self) -> float:
    """Nats: the standard deviation of a run's loss about the law.  All but the Gaussian process count what the law gets
    wrong as noise too: how it errs in one place tells them nothing of another."""
    return self.law.noise

  @property
  def mean(self) -> Callable[[jax.Array], jax.Array] | None:
    return self.law.mean

  @property
  def standard_error(self) -> Callable[[jax.Array], jax.Array] | None:
    return self.law.standard_error

  @property
  def importance(self) -> np.ndarray:
    """float64 [M]: how much each domain matters, in the model's own unit, which `law.importance` explains."""
    return self.law.importance

  def _checked(self, weights_NxM: np.ndarray) -> np.ndarray:
    weights_NxM = np.asarray(weights_NxM, np.float64)
    if weights_NxM.ndim != 2 or weights_NxM.shape[1] != self.columns or not len(weights_NxM):
      raise ValueError(f'mixtures of shape {weights_NxM.shape}; want rows of the {self.columns} weights that the model '
                       'was fitted on')
    tables.check_mixtures(weights_NxM)
    return weights_NxM


def fit(weights_NxM: np.ndarray, losses_N: np.ndarray, model: str = 'auto', *, seed: int = 0, folds: int = 5,
        stop_on: tuple[np.ndarray, np.ndarray] | None = None) -> Fit:
  """Fits one target.

  weights_NxM: rows >= 0 that sum to 1 within 1e-2.  losses_N: nats/token.  seed: of folds and resamples.
  model: of MODELS, or 'auto': of those that the number of runs allows, and that are installed, the one of least squared
  error over `folds` folds, or an earlier one of MODELS that is within one standard error of it.
  stop_on: other runs by which LightGBM alone may end its fit, see `boosting.fit`.
  The order of rows does not matter.  ValueError for bad weights, losses that are all one, and too few rows.
  """
  weights_NxM, losses_N = _ordered(*_checked_runs(weights_NxM, losses_N))
  if model not in ('auto', *MODELS):
    raise ValueError(f'unknown model {model!r}; known: auto, {", ".join(MODELS)}')
  N, M = weights_NxM.shape
  if stop_on is not None:
    if model != 'lightgbm':
      raise ValueError(f'runs to stop by are for the model lightgbm, not {model}')
    stop_on = _checked_rows(*stop_on)
    if stop_on[0].shape[1] != M:
      raise ValueError(f'the runs to stop by have {stop_on[0].shape[1]} domains, the others {M}; want the same')
  validation, reason = {}, 'asked for by name'
  if model == 'auto':
    candidates, left_out = _candidates(N, M, folds)
    validation = cross_validate(weights_NxM, losses_N, candidates, seed=seed, folds=folds)
    model, reason = _choose(validation, left_out)
  elif (why := lacking(model, N, M)) and why != 'not installed':  # which the import itself says better
    raise ValueError(f'{model}: {why}; train more proxies, or merge domains')
  law = _fit_law(model, weights_NxM, losses_N, seed, folds, stop_on)
  return Fit(model, reason, validation, law, M)


def cross_validate(weights_NxM: np.ndarray, losses_N: np.ndarray, models: Sequence[str] = MODELS, *, seed: int = 0,
                   folds: int = 5) -> dict[str, dict[str, Any]]:
  """What each model predicts of runs that it was not fitted on, by K-fold cross-validation; the folds are the same.

  Returns {model: {'spearman', 'spearman_interval': (low, high) at 95%, 'mse': nats^2, 'losses_N', 'predicted_N'}}, the
  last two in an order of their own, equal for all models.
  """
  weights_NxM, losses_N = _ordered(*_checked_runs(weights_NxM, losses_N))
  fold_N = _folds(len(losses_N), folds, seed)
  found = {}
  for model in models:
    predicted_N = np.empty_like(losses_N)
    for k in range(fold_N.max() + 1):
      kept_N = fold_N != k
      law = _fit_law(model, weights_NxM[kept_N], losses_N[kept_N], seed, _INNER_FOLDS)
      predicted_N[~kept_N] = law.moments(weights_NxM[~kept_N], variance=False)[0]
    found[model] = {'spearman': spearman(losses_N, predicted_N),
                    'spearman_interval': bootstrap_spearman(losses_N, predicted_N, seed),
                    'mse': float(np.square(predicted_N - losses_N).mean()),
                    'losses_N': losses_N, 'predicted_N': predicted_N}
  return found


def learning_curve(weights_NxM: np.ndarray, losses_N: np.ndarray, model: str = 'gp',
                   sizes: Sequence[int] | None = None, *, seed: int = 0, repeats: int = 5) -> list[dict[str, Any]]:
  """How well the model fitted to n runs predicts others: were so many proxies needed?

  sizes: of n, by default doubling up to all that there are.  In each of `repeats` a fifth of the runs is held out, and
  n of the others are fitted on, those of smaller n among those of larger.  Empty where so few runs allow no size.
  Returns, for each n, {'runs', 'spearman', 'mse': means over repeats, 'spearman_error', 'mse_error': of these means}.
  """
  weights_NxM, losses_N = _ordered(*_checked_runs(weights_NxM, losses_N))
  N, M = weights_NxM.shape
  most, least = N - max(2, round(_HELD_OUT * N)), _least_rows(model, M)
  if sizes is None:
    sizes = sorted({n for n in (most >> k for k in range(12)) if n >= least})
  if sizes and (min(sizes) < least or max(sizes) > most) or repeats < 2:
    raise ValueError(f'a learning curve at {list(sizes)} of {N} runs with {repeats} repeats; {model} wants sizes from '
                     f'{least} to {most} and at least 2 repeats')
  random = np.random.Generator(np.random.Philox(seed))
  rows: dict[int, list[tuple[float, float]]] = {n: [] for n in sorted(sizes)}
  for _ in range(repeats):
    order_N = random.permutation(N)
    held, rest = order_N[most:], order_N[:most]
    for n, scores in rows.items():
      kept = np.sort(rest[:n])
      predicted_N = _fit_law(model, weights_NxM[kept], losses_N[kept], seed, _INNER_FOLDS).moments(
        weights_NxM[held], variance=False)[0]
      scores.append((spearman(losses_N[held], predicted_N), float(np.square(predicted_N - losses_N[held]).mean())))
  curve = []
  for n, scores in rows.items():
    mean_2, error_2 = np.mean(scores, 0), np.std(scores, 0, ddof=1) / math.sqrt(repeats)
    curve.append({'runs': n, 'spearman': float(mean_2[0]), 'spearman_error': float(error_2[0]),
                  'mse': float(mean_2[1]), 'mse_error': float(error_2[1])})
  return curve


def spearman(true_N: np.ndarray, predicted_N: np.ndarray) -> float:
  """Spearman's rank correlation, ties sharing their ranks; 0 where one side is constant and so orders nothing."""
  return float(_rank_correlation(np.asarray(true_N)[None], np.asarray(predicted_N)[None])[0])


def bootstrap_spearman(true_N: np.ndarray, predicted_N: np.ndarray, seed: int = 0, *, draws: int = 1000
                       ) -> tuple[float, float]:
  """A 95% interval of `spearman` over resamples of the pairs (percentiles; Efron 1979)."""
  random = np.random.Generator(np.random.Philox(seed))
  draws_SxN = random.integers(len(true_N), size=(draws, len(true_N)))
  found_S = _rank_correlation(np.asarray(true_N)[draws_SxN], np.asarray(predicted_N)[draws_SxN])
  low, high = np.quantile(found_S, (0.025, 0.975))
  return float(low), float(high)


def _rank_correlation(a_SxN, b_SxN) -> np.ndarray:
  a_SxN, b_SxN = (stats.rankdata(x_SxN, axis=-1) for x_SxN in (a_SxN, b_SxN))
  a_SxN, b_SxN = (x_SxN - x_SxN.mean(-1, keepdims=True) for x_SxN in (a_SxN, b_SxN))
  size_S = np.sqrt(np.square(a_SxN).sum(-1) * np.square(b_SxN).sum(-1))
  return (a_SxN * b_SxN).sum(-1) / np.where(size_S > 0, size_S, 1)


# LAPACK's threads wait for each other in busy loops: where other work has the cores, that takes many times as long.
@threadpoolctl.threadpool_limits.wrap(limits=1, user_api='blas')
def _fit_law(model, weights_NxM, losses_N, seed, folds, stop_on=None):
  if np.ptp(losses_N) == 0:  # of a fold whose runs all came to one loss
    return laws.fit_linear(weights_NxM, losses_N, seed)
  if model == 'gp':
    return gaussian_process.fit(weights_NxM, losses_N)
  if model == 'lightgbm':
    return boosting.fit(weights_NxM, losses_N, fold_N=_folds(len(losses_N), folds, seed), stop_on=stop_on)
  return {'linear': laws.fit_linear, 'loglinear': laws.fit_log_linear}[model](weights_NxM, losses_N, seed)


def _least_rows(model: str, M: int) -> int:
  # As many as coefficients, the constant included, and one more to tell how wrong they are.
  return {'linear': M + 1, 'loglinear': M + 2, 'gp': M + 1, 'lightgbm': max(M + 1, boosting.LEAST_ROWS)}[model]


def lacking(model: str, N: int, M: int) -> str:
  """Why the model cannot be fitted to N runs of M domains here; '' if it can."""
  if N < _least_rows(model, M):
    return f'{N} runs of {M} domains, want at least {_least_rows(model, M)}'
  if model == 'gp' and N > gaussian_process.MOST_ROWS:
    return f'{N} runs, want at most {gaussian_process.MOST_ROWS}'
  return 'not installed' if model == 'lightgbm' and not boosting.installed() else ''


def _candidates(N: int, M: int, folds: int) -> tuple[list[str], list[str]]:
  """The models that cross-validation may choose from, and why not the others."""
  smallest = N - -(-N // min(folds, N))
  candidates, left_out = [], []
  for model in MODELS:
    # The two that shrink what the data do not tell take any number of rows in a fold.
    if why := lacking(model, smallest if model in ('loglinear', 'lightgbm') else N, M):
      left_out.append(f'{model} ({why})')
    else:
      candidates.append(model)
  return candidates, left_out


def _choose(validation: dict[str, dict[str, Any]], left_out: list[str]) -> tuple[str, str]:
  best = min(validation, key=lambda model: validation[model]['mse'])
  errors = {model: np.square(one['predicted_N'] - one['losses_N']) for model, one in validation.items()}
  chosen = best
  for model in reversed(list(validation)[:list(validation).index(best)]):
    more_N = errors[model] - errors[best]
    if more_N.mean() <= more_N.std(ddof=1) / math.sqrt(len(more_N)):
      chosen = model
  told = ', '.join(f'{model} {math.sqrt(one["mse"]):.4g} nats and {100 * one["spearman"]:.2f}'
                   for model, one in validation.items())
  why = (f'{chosen} has the least error on runs it was not fitted on' if chosen == best else
         f'{chosen}: {best} has the least error on runs it was not fitted on, but by less than one standard error, and '
         f'{chosen} is simpler')
  skipped = f'; not tried: {", ".join(left_out)}' if left_out else ''
  return chosen, f'{why} (root mean square and Spearman x 100 out of fold: {told}{skipped})'


def _checked_rows(weights_NxM, losses_N) -> tuple[np.ndarray, np.ndarray]:
  weights_NxM, losses_N = np.asarray(weights_NxM, np.float64), np.asarray(losses_N, np.float64)
  if weights_NxM.ndim != 2 or losses_N.shape != weights_NxM.shape[:1] or not losses_N.size:
    raise ValueError(f'weights of shape {weights_NxM.shape} and losses of shape {losses_N.shape}; want [N, M] and [N]')
  tables.check_mixtures(weights_NxM)
  if not np.isfinite(losses_N).all():
    n = int(np.argmin(np.isfinite(losses_N)))
    raise ValueError(f'row {n}: the loss {losses_N[n]}, want a finite number')
  return weights_NxM, losses_N


def _checked_runs(weights_NxM, losses_N) -> tuple[np.ndarray, np.ndarray]:
  weights_NxM, losses_N = _checked_rows(weights_NxM, losses_N)
  N, M = weights_NxM.shape
  if M < 2 or N < M + 1:
    raise ValueError(f'{N} runs of {M} domains; want at least 2 domains and one run more than domains: train more '
                     'proxies, or merge domains')
  if np.ptp(losses_N) == 0:
    raise ValueError(f'all {N} losses are {losses_N[0]:g}: there is nothing to fit; is it the right column?')
  if np.ptp(weights_NxM, axis=0).max() == 0:
    raise ValueError(f'all {N} mixtures are the same: there is nothing to fit; is it the right file?')
  return weights_NxM, losses_N


def _ordered(weights_NxM, losses_N) -> tuple[np.ndarray, np.ndarray]:
  """The runs by their losses: whichever order they and their domains come in, folds and resamples are the same."""
  order_N = np.lexsort((np.square(weights_NxM).sum(-1), losses_N))
  return weights_NxM[order_N], losses_N[order_N]


def _folds(n: int, folds: int, seed: int) -> np.ndarray:
  """int [n]: each row's fold, their sizes as equal as they can be."""
  if folds < 2:
    raise ValueError(f'{folds} folds; want at least 2')
  return np.random.Generator(np.random.Philox(seed)).permutation(np.arange(n) % min(folds, n))
