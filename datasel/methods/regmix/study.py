"""What a swarm's losses say: a regression of each target, judged on runs it has not seen, and what it proposes."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from datasel.methods.regmix import ascent, propose, regression
from datasel.methods.regmix.tables import Table

_DRAWS = 20_000  # mixtures drawn for what other choices give


@dataclasses.dataclass(frozen=True)
class Wish:
  """What is asked of a proposal, by domain.

  targets: weights of the losses to lower.  prior_M: where a domain that is at 0 stays out.  upper_M: the most of each.
  compared: mixtures to predict beside the proposal.  least: a weight below it becomes 0, for it could not be sampled.
  """
  domains: tuple[str, ...]
  targets: Mapping[str, float]
  prior_M: np.ndarray
  upper_M: np.ndarray
  compared: Mapping[str, np.ndarray]
  least: float


def study(mixtures: Table, losses: Table, wish: Wish, section: ml_collections.ConfigDict, seed: int) -> dict[str, Any]:
  """Everything that is found, as JSON; section: that of config.regmix.

  The last section.held_out runs are predicted from the others, and fitted with them afterwards.
  """
  weights_NxM, n_fitted = mixtures.values_NxC, len(mixtures.index_N) - section.held_out
  fits, targets = [], {}
  for name in wish.targets:
    losses_N = losses.column(name)
    fit = regression.fit(weights_NxM[:n_fitted], losses_N[:n_fitted], section.regressor, seed=seed)
    targets[name] = {'weight': wish.targets[name], 'model': fit.model, 'reason': fit.reason,
                     'models': {model: {key: one[key] for key in ('spearman', 'spearman_interval', 'mse')}
                                for model, one in fit.cross_validation.items()},
                     'held_out': _held_out(fit, weights_NxM[n_fitted:], losses_N[n_fitted:], seed)}
    fits.append(regression.fit(weights_NxM, losses_N, fit.model, seed=seed) if section.held_out else fit)
    targets[name] |= {'noise': fits[-1].noise, 'importance': dict(zip(wish.domains, fits[-1].importance.tolist()))}
  objective = propose.Objective(fits, wish.prior_M, target_weights=list(wish.targets.values()),
                                combine=section.combine, kappa=section.kappa, kl=section.kl)
  first = next(iter(wish.targets))
  return {'runs': len(mixtures.index_N), 'domains': list(wish.domains), 'targets': targets,
          'curve': {'target': first, 'rows': regression.learning_curve(weights_NxM, losses.column(first), fits[0].model,
                                                                       seed=seed)},
          'proposal': _proposal(objective, wish, section, weights_NxM, seed),
          'front': _front(objective, wish, seed) if len(fits) > 1 else None}


def _held_out(fit: regression.Fit, weights_NxM: np.ndarray, losses_N: np.ndarray, seed: int) -> dict[str, Any] | None:
  if not len(losses_N):
    return None
  predicted_N, error_N = fit.predict(weights_NxM)
  return {'true': losses_N.tolist(), 'predicted': predicted_N.tolist(), 'standard_error': error_N.tolist(),
          'spearman': regression.spearman(losses_N, predicted_N),
          'spearman_interval': regression.bootstrap_spearman(losses_N, predicted_N, seed),
          'rmse': float(np.sqrt(np.square(predicted_N - losses_N).mean()))}


def _proposal(objective: propose.Objective, wish: Wish, section: ml_collections.ConfigDict, weights_NxM: np.ndarray,
              seed: int) -> dict[str, Any]:
  search = section.search if objective.smooth else 'simulate'
  found_M = propose.search(objective, search, weights_NxM, seed=seed, draws=section.draws, top=section.top,
                           upper_M=wish.upper_M)
  weights_M = ascent.without_dust(found_M, np.zeros_like(found_M), wish.upper_M, least=wish.least)
  known_M = np.where(wish.prior_M > 0)[0]
  single_M = np.eye(len(wish.domains))[known_M[np.argmin(objective(np.eye(len(wish.domains))[known_M]))]]
  compared = {**wish.compared, 'single': single_M, 'best proxy': weights_NxM[np.argmin(objective(weights_NxM))]}
  named = lambda x_M: dict(zip(wish.domains, x_M.tolist()))
  predicted = {}
  for name, other_M in compared.items():
    gain_K, error_K = propose.gain(objective, weights_M, other_M)
    predicted[name] = {'weights': named(other_M), 'value': float(objective(other_M[None])[0]),
                       'gain': gain_K.tolist(), 'gain_error': [float(x) if np.isfinite(x) else None for x in error_K]}
  nearest, usual = propose.remoteness(weights_M, weights_NxM)
  asked = {'as asked': objective}
  if objective.smooth:  # the errors of the others take too long for so many draws
    asked['one standard error more'] = dataclasses.replace(objective, kappa=objective.kappa + 1)
  others = propose.sensitivity(asked, draws=_DRAWS, seeds=(seed, seed + 1), tops=(1, 128), upper_M=wish.upper_M)
  errors = [fit.predict(weights_M[None]) for fit in objective.fits]
  return {
    'search': search, 'weights': named(weights_M), 'value': float(objective(weights_M[None])[0]),
    'predicted': [float(mean_1[0]) for mean_1, _ in errors], 'standard_error': [float(e_1[0]) for _, e_1 in errors],
    'compared': predicted, 'nearest': nearest, 'usual': usual,
    'left_out': float(found_M[weights_M == 0].sum()),
    'at_caps': [d for d, x, most in zip(wish.domains, weights_M, wish.upper_M) if most < 1 and x >= most],
    'others': [row | {'weights_M': row['weights_M'].tolist(),
                      'value': float(objective(row['weights_M'][None])[0])} for row in others]}


def _front(objective: propose.Objective, wish: Wish, seed: int) -> dict[str, Any]:
  mixtures_FxM, values_FxK = propose.pareto_front(objective, seed=seed, upper_M=wish.upper_M)
  return {'weights': mixtures_FxM.tolist(), 'values': values_FxK.tolist()}


def warnings(found: Mapping[str, Any]) -> list[str]:
  """What a reader of the study should know before using the proposal."""
  said, proposal = [], found['proposal']
  for name, target in found['targets'].items():
    held = target['held_out'] or {}
    if held and held['spearman_interval'][0] < 0.5:
      said.append(f'{name}: on runs it has not seen, the regression may order mixtures hardly better than chance '
                  f'(Spearman {held["spearman"]:.2f}, 95% from {held["spearman_interval"][0]:.2f})')
  for other, one in proposal['compared'].items():
    for name, gain, error in zip(found['targets'], one['gain'], one['gain_error']):
      if gain < -(error or 0):
        said.append(f'{name} is predicted to be worse than with the mixture "{other}"')
      elif not gain > 2 * (error or 0):
        said.append(f'{name}: the predicted difference to "{other}" is within two standard errors: it may be none')
  if proposal['at_caps']:
    said.append(f'at their caps: {", ".join(proposal["at_caps"])}; without caps, others would be better')
  if proposal['nearest'] > proposal['usual']:
    said.append(f'the proposal is far from every mixture that was trained: {proposal["nearest"]:.3f} (Hellinger) from '
                f'the nearest, where 95% of those are within {proposal["usual"]:.3f} of theirs')
  return said


def least_certain(others: Sequence[Mapping[str, Any]], domains: Sequence[str]) -> tuple[str, float, float]:
  """The domain whose weight other choices move the most, and its lowest and highest weight among them."""
  weights_RxM = np.array([row['weights_M'] for row in others])
  m = int(np.argmax(np.ptp(weights_RxM, axis=0)))
  return domains[m], float(weights_RxM[:, m].min()), float(weights_RxM[:, m].max())
