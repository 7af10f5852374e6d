"""From two CSV files to a law of the loss, predictions by it, and the mixture that it proposes.

  python -m datasel.methods.regmix.fit --mixtures A.csv --losses B.csv --target COLUMN
      [--predict C.csv --output P.csv] [--propose mixture.json]

A.csv and C.csv have a column `index` and a weight for each domain; B.csv has `index` and losses.  RegMix's published
files are such, and a swarm's folder holds both (--run FOLDER).  Exit status: 0 done, 2 refused, 1 anything else.
"""

import argparse
import dataclasses
import math
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from datasel import workdir
from datasel.data import mixture
from datasel.methods.regmix import mixtures, propose, regression, tables

_WRITERS = {'.json': mixture.write, '.yaml': mixture.write_regmix, '.yml': mixture.write_regmix}


def domain_names(columns: Sequence[str]) -> tuple[str, ...]:
  """The domains that columns are named for: without the 'train_' that RegMix puts before each, if all have it."""
  prefixed = all(name.startswith('train_') for name in columns)
  return tuple(name.removeprefix('train_') if prefixed else name for name in columns)


def main(argv: list[str]) -> int:
  """The command line; returns the exit status."""
  options = _parser().parse_args(argv)
  try:
    for line in run(options):
      print(line, flush=True)
  except (ValueError, OSError, ImportError) as e:
    print(f'error: {e}', file=sys.stderr)
    return 2 if isinstance(e, (ValueError, FileNotFoundError, ImportError)) else 1
  return 0


def run(options: argparse.Namespace) -> Iterator[str]:
  """Does what the options say; yields the lines of the summary as they are known."""
  _check(options)
  files = _swarm_files(options)
  sampled, losses = tables.read_mixtures(files[0]), tables.read(files[1])
  weights = {options.target: 1.0}
  if options.target not in losses.columns:
    weights = tables.target_weights(options.target, '--target')
  weights_NxM, domains = tables.normalised(sampled.values_NxC), domain_names(sampled.columns)
  data = {name: _losses(losses, sampled, name, files[1]) for name in weights}
  asked = _mixtures(options.predict, sampled.columns) if options.predict else None
  stop_on = dict.fromkeys(weights)
  if options.stop_on_mixtures:
    others, their_losses = _mixtures(options.stop_on_mixtures, sampled.columns), tables.read(options.stop_on_losses)
    stop_on = {name: (others.values_NxC, _losses(their_losses, others, name, options.stop_on_losses))
               for name in weights}
  wish = _Wish.read(options, domains, weights_NxM) if options.propose else None
  yield f'{len(weights_NxM)} mixtures of {len(domains)} domains'
  fits = {}
  for name, losses_N in data.items():
    fits[name] = regression.fit(sampled.values_NxC, losses_N, options.model, seed=options.seed, stop_on=stop_on[name])
    yield from _fit_lines(name, fits[name], losses_N)
    if options.learning_curve:
      yield from _curve_lines(fits[name], weights_NxM, losses_N, options.seed)
  if asked:
    _write_predictions(options.output, asked, fits)
    yield f'\n{options.output}: predictions of {len(asked.index_N)} mixtures'
  if wish:
    yield from _proposal_lines(options, wish, fits, weights, sampled, files)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser('datasel.methods.regmix.fit', description='Fits losses of proxies to mixtures.')
  add = parser.add_argument
  add('--mixtures', help='CSV: index, and a weight for each domain')
  add('--losses', help='CSV: index, and losses in nats')
  add('--run', help='folder of mixtures.csv and losses.csv, instead of these two')
  add('--target', required=True, help='column of the losses to lower; several as A,B or A=2,B=1')
  add('--model', default='auto', choices=('auto', *regression.MODELS))
  add('--seed', type=int, default=0, help='of folds, resamples and draws')
  add('--learning_curve', action='store_true', help='show how well fewer proxies would have done')
  add('--predict', help='CSV of mixtures to predict')
  add('--output', help='CSV to write: index, prediction, standard_error')
  add('--stop_on_mixtures', help='lightgbm stops on these and --stop_on_losses, as in the notebook')
  add('--stop_on_losses', help='CSV of their losses')
  add('--propose', help='mixture to write: .json, or .yaml in the form of RegMix')
  add('--prior', help='mixture file (default: the mean of the mixtures); a domain it lacks, or has at 0, stays out')
  add('--max_usage', type=float, help='a domain has at most this many times its prior')
  add('--caps', help='JSON: {domain: the most it may have}')
  add('--compare', nargs='+', default=[], help='mixture files to predict beside the proposal')
  add('--combine', default='sum', choices=propose.COMBINE, help='several targets: their mean, or the worst of them')
  add('--kappa', type=float, default=0.0, help='standard errors added to a prediction')
  add('--kl', type=float, default=0.0, help='nats added for each nat of KL to the prior')
  add('--search', choices=(*propose.SEARCHES, 'notebook'), help='default: ascend where the model has a gradient, '
      "else simulate; notebook: RegMix's own draws (seed 42, the best 128 of 100,000)")
  add('--draws', type=int, default=100_000, help='mixtures that simulate draws')
  add('--top', type=int, default=128, help='of which it averages the best')
  return parser


def _check(options: argparse.Namespace) -> None:
  """Refuses what can be refused before anything is read."""
  if bool(options.run) == bool(options.mixtures or options.losses) or (
      not options.run and not (options.mixtures and options.losses)):
    raise ValueError('give --mixtures and --losses, or --run')
  if bool(options.predict) != bool(options.output):
    raise ValueError('--predict and --output go together: the mixtures to predict, and the file of predictions')
  if bool(options.stop_on_mixtures) != bool(options.stop_on_losses):
    raise ValueError('--stop_on_mixtures and --stop_on_losses go together')
  if options.stop_on_mixtures and options.model != 'lightgbm':
    raise ValueError(f'--stop_on_mixtures is for --model lightgbm; got --model {options.model}')
  if options.search and not options.propose:
    raise ValueError('--search without --propose; name the mixture to write')
  if options.propose and pathlib.Path(options.propose).suffix not in _WRITERS:
    raise ValueError(f'--propose {options.propose}: want a file ending in {", ".join(_WRITERS)}')
  if options.search == 'notebook' and (options.caps or options.max_usage):
    raise ValueError('--search notebook knows no caps; use simulate')
  if not 1 <= options.top <= options.draws:
    raise ValueError(f'--top {options.top} of --draws {options.draws}; want at least 1, and no more than are drawn')
  for name in ('kappa', 'kl', 'seed'):
    if not 0 <= getattr(options, name) < math.inf:
      raise ValueError(f'--{name} is {getattr(options, name)}; want 0 or more')


def _swarm_files(options: argparse.Namespace) -> tuple[pathlib.Path, pathlib.Path]:
  if not options.run:
    return pathlib.Path(options.mixtures), pathlib.Path(options.losses)
  folder = pathlib.Path(options.run)
  # A run keeps them in the folder of its stage.
  folder = next((found for found in (folder, folder / 'swarm') if (found / 'mixtures.csv').exists()), folder)
  return folder / 'mixtures.csv', folder / 'losses.csv'


def _mixtures(file: str, columns: tuple[str, ...]) -> tables.Table:
  """The mixtures of a file, its columns in this order; 'train_' or 'valid_' before every name makes no difference."""
  found = tables.read(file)
  bare = lambda name: re.sub('^(train|valid)_', '', name)
  if not set(found.columns) & set(columns):
    known = {bare(name): name for name in columns}
    found = dataclasses.replace(found, columns=tuple(known.get(bare(name), name) for name in found.columns))
  try:
    found = found.select(columns)
  except ValueError as e:
    raise ValueError(f'{file}: {e}') from e
  tables.check_mixtures(found.values_NxC, lambda n: f'{file}, index {found.index_N[n]!r}', columns)
  return found


def _losses(losses: tables.Table, mixtures: tables.Table, column: str, file: str | os.PathLike) -> np.ndarray:
  """float64 [N]: that column, in the order of the mixtures."""
  try:
    losses.column(column)
    return tables.join(mixtures, losses)[1][:, losses.columns.index(column)]
  except ValueError as e:
    raise ValueError(f'{file}: {e}') from e


def _write_predictions(path: str, asked: tables.Table, fits: Mapping[str, regression.Fit]) -> None:
  columns, values = [], []
  for name, fit in fits.items():
    of_target = f':{name}' if len(fits) > 1 else ''
    columns += [f'prediction{of_target}', f'standard_error{of_target}']
    values += fit.predict(asked.values_NxC)
  tables.write(path, tables.Table(tuple(columns), asked.index_N, np.stack(values, -1)))


def _fit_lines(name: str, fit: regression.Fit, losses_N: np.ndarray) -> Iterator[str]:
  yield f'\n{name}: {losses_N.min():.4f} to {losses_N.max():.4f} nats'
  yield f'model {fit.model}: {fit.reason}'
  if fit.cross_validation:
    yield f'  {"out of fold":14}{"spearman":>10}{"rmse":>10}'
    for model, scores in fit.cross_validation.items():
      yield f'  {model:14}{scores["spearman"]:10.4f}{math.sqrt(scores["mse"]):10.4f}'


def _curve_lines(fit: regression.Fit, weights_NxM: np.ndarray, losses_N: np.ndarray, seed: int) -> Iterator[str]:
  yield f'  {"fitted on":14}{"spearman":>10}{"error":>10}{"rmse":>10}'
  for row in regression.learning_curve(weights_NxM, losses_N, fit.model, seed=seed):
    yield (f'  {row["runs"]:<14}{row["spearman"]:10.4f}{row["spearman_error"]:10.4f}{math.sqrt(row["mse"]):10.4f}')


@dataclasses.dataclass(frozen=True)
class _Wish:
  """What a proposal is held to, by domain; the prior as it is in its file."""
  domains: tuple[str, ...]
  prior_M: np.ndarray
  prior_source: str
  upper_M: np.ndarray
  compared: dict[str, np.ndarray]

  @classmethod
  def read(cls, options: argparse.Namespace, domains: tuple[str, ...], weights_NxM: np.ndarray) -> '_Wish':
    mixture.uniform(domains)  # refuses a name that no mixture may have, before any work
    prior_M, source = weights_NxM.mean(0), 'the mean of the mixtures'
    if options.prior:
      prior_M, source = _weights(options.prior, domains), pathlib.Path(options.prior).name
    upper_M = np.ones(len(domains))
    if options.max_usage is not None:
      upper_M = mixtures.caps(prior_M, usage=options.max_usage)
    if options.caps:
      upper_M = np.minimum(upper_M, _caps(options.caps, domains))
    mixtures.box(np.zeros(len(domains)), np.where(prior_M > 0, upper_M, 0))
    compared = {pathlib.Path(file).name: _weights(file, domains) for file in options.compare}
    return cls(domains, prior_M, source, upper_M, compared)


def _weights(file: str, domains: tuple[str, ...]) -> np.ndarray:
  """float64 [M] of a mixture file; a domain that it does not name has 0."""
  named = mixture.load(file).weights
  if unknown := [name for name in named if name not in domains]:
    raise ValueError(f'{file} names domains that the mixtures do not have: {", ".join(unknown)}; rename or remove them '
                     f'(the mixtures have {", ".join(domains)})')
  return np.array([named.get(name, 0.0) for name in domains])


def _caps(file: str, domains: tuple[str, ...]) -> np.ndarray:
  caps = workdir.read_json(file)
  number = lambda cap: isinstance(cap, (int, float)) and not isinstance(cap, bool) and 0 <= cap <= 1
  if not isinstance(caps, dict) or not all(name in domains and number(cap) for name, cap in caps.items()):
    raise ValueError(f'{file}: want {{domain: a number from 0 to 1}}, of the domains {", ".join(domains)}; got {caps}')
  return np.array([caps.get(name, 1.0) for name in domains])


def _proposal_lines(options: argparse.Namespace, wish: _Wish, fits: Mapping[str, regression.Fit],
                    weights: Mapping[str, float], sampled: tables.Table, files: Sequence[pathlib.Path]
                    ) -> Iterator[str]:
  """Finds the proposal and writes it; the lines say what it is, what it gains and how far to trust that."""
  weights_NxM = tables.normalised(sampled.values_NxC)
  objective = propose.Objective(list(fits.values()), wish.prior_M, target_weights=list(weights.values()),
                                combine=options.combine, kappa=options.kappa, kl=options.kl)
  search = options.search or ('ascend' if objective.smooth else 'simulate')
  if search == 'notebook':
    proposal_M = propose.simulate(objective, wish.prior_M, legacy=True)
  else:
    proposal_M = propose.search(objective, search, weights_NxM, seed=options.seed, draws=options.draws,
                                top=options.top, upper_M=wish.upper_M)
  best = int(np.argmin(objective(weights_NxM)))
  baselines = {f'the prior ({wish.prior_source})': objective.prior_M,
               f'index {sampled.index_N[best]}, of those trained predicted the best': weights_NxM[best],
               **wish.compared}
  gains = {name: propose.gain(objective, proposal_M, baseline_M) for name, baseline_M in baselines.items()}
  _WRITERS[pathlib.Path(options.propose).suffix](options.propose, mixture.Mixture(
    dict(zip(wish.domains, proposal_M.tolist())), {
      'method': 'regmix', 'search': search, 'seed': options.seed, 'targets': dict(weights),
      'models': {name: fit.model for name, fit in fits.items()},
      'combine': options.combine, 'kappa': options.kappa, 'kl': options.kl,
      'prior': dict(zip(wish.domains, objective.prior_M.tolist())),
      'caps': dict(zip(wish.domains, wish.upper_M.tolist())),
      'predicted': {name: float(fit.predict(proposal_M[None])[0][0]) for name, fit in fits.items()},
      'gain_over': {name: {target: {'nats': float(gain), 'standard_error': float(error)}
                           for target, gain, error in zip(fits, *gains[name])} for name in gains},
      'data': [workdir.digest_file(file) for file in files], 'git': workdir.git_version()}))

  yield f'\n{options.propose}: the proposal, by {search}'
  width = max(map(len, wish.domains))
  shown = [m for m in np.argsort(-proposal_M, kind='stable') if proposal_M[m] >= 0.0005]
  yield f'  {"domain":{width}}  weight   prior'
  for m in shown:
    yield f'  {wish.domains[m]:{width}}  {proposal_M[m]:.4f}  {objective.prior_M[m]:.4f}'
  if rest := len(wish.domains) - len(shown):
    yield f'  and {rest} others of {np.delete(proposal_M, shown).sum():.4f} together'
  for k, (target, fit) in enumerate(fits.items()):
    mean, error = (float(one[0]) for one in fit.predict(proposal_M[None]))
    yield f'{target}: {mean:.4f} +- {error:.4f} nats predicted for a run on it; the gain over'
    for name, (gain_K, error_K) in gains.items():
      yield f'  {name}: {gain_K[k]:.4f} +- {error_K[k]:.4f}{_doubt(gain_K[k], error_K[k])}'
  yield from _warnings(wish, proposal_M, weights_NxM)
  yield from _other_lines(options, wish, objective, proposal_M, shown[:4])


def _doubt(gain: float, error: float) -> str:
  if abs(gain) < 2 * error:
    return '; warning: within two standard errors, it may be none'
  return '; warning: it is worse' if gain < 0 else ''


def _warnings(wish: _Wish, proposal_M: np.ndarray, weights_NxM: np.ndarray) -> Iterator[str]:
  capped = [name for name, weight, most in zip(wish.domains, proposal_M, wish.upper_M) if most < 1 and weight >= most]
  if capped:
    yield f'warning: at their caps: {", ".join(capped)}; others would be better'
  nearest, usual = propose.remoteness(proposal_M, weights_NxM)
  if nearest > usual:
    yield (f'warning: far from every mixture trained: {nearest:.3f} (Hellinger) from the nearest, where 95% of those '
           f'are within {usual:.3f} of theirs; train some there')


def _other_lines(options: argparse.Namespace, wish: _Wish, objective: propose.Objective, proposal_M: np.ndarray,
                 shown: Sequence[int]) -> Iterator[str]:
  """What other seeds, other numbers averaged and a more careful objective would have proposed."""
  objectives = {'as asked': objective}
  if objective.smooth:  # of the others the errors are slow
    objectives['one standard error more'] = dataclasses.replace(objective, kappa=objective.kappa + 1)
  rows = propose.sensitivity(objectives, draws=10_000, seeds=(options.seed, options.seed + 1), tops=(1, 128),
                             upper_M=wish.upper_M)
  yield 'other choices, the predictions as asked'
  yield '  ' + ' '.join([f'{"objective":24}{"search":18}{"nats":>8}', *(f'{wish.domains[m][-14:]:>14}' for m in shown)])
  for row in rows:
    search = row['search'] if row['seed'] is None else f'top {row["top"]}, seed {row["seed"]}'
    value = float(objective(row['weights_M'][None])[0])
    yield '  ' + ' '.join([f'{row["objective"]:24}{search:18}{value:8.4f}',
                           *(f'{row["weights_M"][m]:14.4f}' for m in shown)])
  weights_RxM = np.stack([row['weights_M'] for row in rows])
  m = int(np.argmax(np.ptp(weights_RxM, axis=0)))
  yield (f'  least certain: {wish.domains[m]}, {weights_RxM[:, m].min():.3f} to {weights_RxM[:, m].max():.3f}; '
         f'{proposal_M[m]:.3f} is proposed')


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
