"""RegMix end to end (Liu et al. 2024): proxies on many mixtures, a regression of their losses, the mixture it proposes.

  WORKDIR/swarm/ swarm-2/ ...         the proxies of each round
  WORKDIR/mixtures.csv losses.csv     all of them: what each was trained on, and what it came to in each domain
  WORKDIR/regression.json             the models of the targets, how well they predict, the proposal beside others
  WORKDIR/mixture.json mixture.yaml   the proposal, as any run and as RegMix's own code read it
  WORKDIR/main-proposal/ main-prior/ main-uniform/ main-single/ ...    the main model on it and on baselines
  WORKDIR/summary.json report.html    the outcome

A stage whose artefact is there is not done again; one that was interrupted goes on where it was.
"""

import functools
import pathlib
from typing import Any

import ml_collections
import numpy as np

from datasel import build, evaluate, metrics, objectives, processes, workdir
from datasel import config as config_lib
from datasel.data import mixture as mixture_lib
from datasel.data.mixture import Mixture
from datasel.data.sampler import block_counts
from datasel.data.store import Store
from datasel.methods.regmix import adaptive, mixtures, propose, regression, study, swarm, tables
from datasel.methods.regmix.report import write_report
from datasel.methods.regmix.study import Wish
from datasel.methods.regmix.tables import Table

# As in methods/pds/run.py: what a run may be continued with while its workdir has no such folder.
READ_FROM = {
  'swarm-*': ('regmix.target', 'regmix.added', 'regmix.rounds'),
  'main-*': ('model.', 'optimizer.', 'train.steps', 'train.batch_size', 'train.init_from', 'regmix.combine',
             'regmix.held_out', 'regmix.regressor', 'regmix.search', 'regmix.draws', 'regmix.top', 'regmix.kappa',
             'regmix.kl', 'regmix.baselines', 'regmix.train_main'),
}
_OWN = ('prior', 'uniform', 'single')


def run(config: ml_collections.ConfigDict, directory: pathlib.Path, store: Store) -> dict:
  """Runs or finishes the whole of it; returns summary.json's contents."""
  plan = stages(config, store)
  wish = _wish(config, store)
  with build.begin(config, directory, store, sum(stage.flops for stage in plan)) as r:
    sampled, losses = _swarms(r, wish)
    found = processes.from_lead('fitting the losses', lambda: _studied(r, sampled, losses, wish))
    proposal = found['proposal']
    trained = {'proposal': proposal['weights']} | {
      name: proposal['compared'][name]['weights'] for name in _baselines(config)}
    for name, weights in trained.items() if config.regmix.train_main else ():
      # They share their initialisation and their reading order: they differ by the mixture alone.
      build.train_stage(r, _main(config, store, name), role='main', init_role='init-main',
                        weights_M=Mixture(weights).for_domains(store.domains))

  def outcome() -> dict:
    summary = {'wish': dict(wish.targets), 'tuned': proposal['weights'],
               'baseline': proposal['compared']['prior']['weights'], 'weights': trained,
               'warnings': study.warnings(found)}
    if config.regmix.train_main:
      summary |= _outcome(directory, trained, wish)
    summary['cost_flops'] = {stage.name: stage.flops for stage in plan}
    return summary

  return build.conclude(directory, outcome, write_report)


def stages(config: ml_collections.ConfigDict, store: Store) -> list[build.Stage]:
  """Every stage and its cost.  ValueError for settings that could not be run."""
  section = config.regmix
  _check(config, store)
  _chosen(config, _wish(config, store), np.zeros(0), np.zeros(0), section.proxies, 0)  # refuses what has no design
  swarms = [swarm.cost(_proxy(config, store, number), n) for number, n in enumerate(_sizes(section))]
  mains = ['proposal', *_baselines(config)] if section.train_main else []
  return [*swarms, *(_main(config, store, name) for name in mains)]


def _sizes(section: ml_collections.ConfigDict) -> list[int]:
  """Proxies of each round."""
  return [section.proxies] + [section.added] * (section.rounds - 1)


def _check(config: ml_collections.ConfigDict, store: Store) -> None:
  section = config.regmix
  swarm.check_domains(store)
  if len(store.domains) < 2:
    raise ValueError(f'{store.path} has one domain: there is nothing to mix')
  known = {'regressor': ('auto', *regression.MODELS), 'search': propose.SEARCHES, 'combine': propose.COMBINE,
           'design': mixtures.DESIGNS}
  for key, values in known.items():
    if section[key] not in values:
      raise ValueError(f'config.regmix.{key} is {section[key]!r}; want one of {", ".join(values)}')
  fitted, least = section.proxies - section.held_out, len(store.domains) + 2
  if 0 < section.held_out < 3:
    raise ValueError(f'config.regmix.held_out is {section.held_out}; want 0, or at least 3, to speak of a correlation')
  if section.held_out < 0 or fitted < least:
    raise ValueError(f'config.regmix.proxies {section.proxies} less config.regmix.held_out {section.held_out} leave '
                     f'{fitted} to fit on; {len(store.domains)} domains want at least {least}')
  if section.regressor != 'auto' and (why := regression.lacking(section.regressor, fitted, len(store.domains))):
    raise ValueError(f'config.regmix.regressor {section.regressor}: {why}')
  if section.rounds > 1 and (section.added < 1 or section.regressor not in ('auto', 'gp')):
    raise ValueError(f'config.regmix.rounds {section.rounds}: later rounds want config.regmix.added of at least 1 '
                     f"(got {section.added}) and the regressor 'gp' or 'auto' (got {section.regressor!r})")
  if section.rounds > 1 and (why := regression.lacking('gp', sum(_sizes(section)), len(store.domains))):
    raise ValueError(f'config.regmix.rounds {section.rounds}: {why}')
  if section.top > section.draws:
    raise ValueError(f'config.regmix.top {section.top} is above config.regmix.draws {section.draws}')
  build.optimizer(section.optimizer, section.steps)
  if section.grid * config.data.block < 1:
    raise ValueError(f'config.regmix.grid {section.grid:g} is less than one of config.data.block {config.data.block} '
                     'sequences; raise one of them')


def _baselines(config: ml_collections.ConfigDict) -> dict[str, str]:
  """{name: 'prior', 'uniform', 'single' or a mixture file}"""
  named = [part.strip() for part in config.regmix.baselines.split(',') if part.strip()]
  found = {part if part in _OWN else pathlib.Path(part).stem: part for part in named}
  if len(found) < len(named) or {'proposal', 'best proxy'} & found.keys():
    raise ValueError(f'config.regmix.baselines {config.regmix.baselines!r}: two of one name, or one called as what the '
                     'run makes itself; rename the files')
  return found


def _wish(config: ml_collections.ConfigDict, store: Store) -> Wish:
  section, domains = config.regmix, tuple(store.domains)
  targets = tables.target_weights(section.target or ','.join(domains), 'config.regmix.target')
  if unknown := sorted(targets.keys() - set(domains)):
    raise ValueError(f'config.regmix.target: {store.path} has no domain {", ".join(unknown)}; it has '
                     f'{", ".join(domains)}')
  weights = lambda kind, key: build.mixture(kind, store, {}, key).for_domains(domains)
  prior_M = weights(section.prior, 'regmix.prior')
  limits = {}
  if section.max_epochs:
    main_tokens = config.train.steps * config.train.batch_size * store.length
    limits = {'tokens_M': store.sizes('train') * store.length, 'epochs': section.max_epochs, 'run_tokens': main_tokens}
  upper_M = mixtures.caps(prior_M, usage=section.max_usage, **limits)
  mixtures.box(np.zeros_like(upper_M), upper_M)  # refuses caps that no mixture meets
  compared = {'prior': prior_M, 'uniform': weights('uniform', 'regmix.baselines')} | {
    name: weights(kind, 'regmix.baselines') for name, kind in _baselines(config).items() if kind not in _OWN}
  for weights_M in compared.values():
    block_counts(weights_M, config.data.block, domains)  # refuses what a main model could not sample
  return Wish(domains, targets, prior_M, upper_M, compared, 1 / config.data.block)


def _proxy(config: ml_collections.ConfigDict, store: Store, number: int) -> build.Stage:
  section = config.regmix
  model = config_lib.to_model(section.model)
  return build.Stage('swarm' if number == 0 else f'swarm-{number + 1}', model,
                     objectives.language_model(model.token_nll), section.steps, section.batch_size,
                     section.microbatches, store.length)


def _main(config: ml_collections.ConfigDict, store: Store, name: str) -> build.Stage:
  model = config_lib.to_model(config.model)
  return build.Stage(f'main-{name}', model, objectives.language_model(model.token_nll), config.train.steps,
                     config.train.batch_size, config.train.microbatches, store.length, init_from=config.train.init_from)


def _swarms(run: build.Run, wish: Wish) -> tuple[Table, Table]:
  """The mixtures of all proxies and their losses: of the design, then of what each round expects the most of."""
  config, section = run.config, run.config.regmix
  weights_NxM, losses_NxM = np.zeros((0, len(wish.domains))), np.zeros((0, len(wish.domains)))
  for number, n in enumerate(_sizes(section)):
    choose = functools.partial(_chosen, config, wish, weights_NxM, losses_NxM, n, number)
    added_NxM = np.array(processes.from_lead('choosing mixtures', choose))
    index = tuple(str(len(weights_NxM) + i + 1) for i in range(n))
    losses = swarm.train(run, _proxy(config, run.store, number), Table(wish.domains, index, added_NxM),
                         section.optimizer, role='proxies', init_role='init-proxies', chunk=section.chunk,
                         group=section.group)
    weights_NxM = np.concatenate([weights_NxM, added_NxM])
    losses_NxM = np.concatenate([losses_NxM, losses.select(wish.domains).values_NxC])
  everyone = tuple(str(i + 1) for i in range(len(weights_NxM)))
  return Table(wish.domains, everyone, weights_NxM), Table(wish.domains, everyone, losses_NxM)


def _chosen(config: ml_collections.ConfigDict, wish: Wish, weights_NxM: np.ndarray, losses_NxM: np.ndarray, n: int,
            number: int) -> list[list[float]]:
  """n mixtures: by the design, or those from which a Gaussian process of the target expects the largest improvement."""
  section, seed = config.regmix, build.seed_for(config, f'mixtures-{number}')
  if number == 0:
    return mixtures.design(section.design, wish.prior_M, n, seed=seed, upper_M=wish.upper_M, grid=section.grid,
                           temperature=section.temperature).tolist()
  share_K = np.array(list(wish.targets.values())) / sum(wish.targets.values())
  columns = [wish.domains.index(name) for name in wish.targets]
  process = regression.fit(weights_NxM, losses_NxM[:, columns] @ share_K, 'gp', seed=seed)
  return adaptive.next_batch(process, weights_NxM, n, wish.prior_M, seed=seed, upper_M=wish.upper_M,
                             grid=section.grid).tolist()


def _studied(run: build.Run, sampled: Table, losses: Table, wish: Wish) -> dict[str, Any]:
  """The study, and the files of its proposal; read where it was made before of the same losses and settings."""
  directory, section = run.directory, run.config.regmix
  for name, table in (('mixtures.csv', sampled), ('losses.csv', losses)):
    tables.write(directory / name, table)
  made_from = [*(workdir.digest_file(directory / name) for name in ('mixtures.csv', 'losses.csv')),
               workdir.digest(section.to_dict())]
  path = directory / 'regression.json'
  if path.exists() and workdir.read_json(path)['made_from'] == made_from:
    return workdir.read_json(path)
  seed = build.seed_for(run.config, 'regression')
  found = {'seed': seed, 'made_from': made_from} | study.study(sampled, losses, wish, section, seed)
  proposed = Mixture(found['proposal']['weights'], {
    'method': 'regmix', 'seed': run.config.seed, 'targets': dict(wish.targets), 'store': run.store.digest,
    'tokenizer': run.store.tokenizer, 'models': {name: one['model'] for name, one in found['targets'].items()},
    'search': found['proposal']['search'], 'git': workdir.git_version()})
  mixture_lib.write(directory / 'mixture.json', proposed)
  mixture_lib.write_regmix(directory / 'mixture.yaml', proposed)
  workdir.write_json(path, found)
  return found


def _outcome(directory: pathlib.Path, trained: dict[str, dict], wish: Wish) -> dict[str, Any]:
  """What the main models came to: {'target': {name: the weighted target at the end}, 'comparison', 'beaten'}."""
  lines = {name: metrics.read(directory, f'main-{name}', 'eval') for name in trained}
  share = {name: weight / sum(wish.targets.values()) for name, weight in wish.targets.items()}
  target = {name: sum(share[d] * each[-1]['nll'][d] for d in share) for name, each in lines.items()}
  baselines = [name for name in target if name != 'proposal']
  outcome: dict[str, Any] = {'target': target,
                             'beaten': [name for name in baselines if target['proposal'] < target[name]]}
  if 'prior' in lines:
    outcome['comparison'] = evaluate.compare(lines['proposal'], lines['prior'])
  return outcome
