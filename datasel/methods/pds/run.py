"""PDS end to end (Gu et al. 2024): a proxy model, scores by optimal control, a scorer, a selection, what it is worth.

  WORKDIR/proxy/                   the proxy model, with the checkpoints that are solved from
  WORKDIR/pmp/                     scores of some sequences by the solver (gammas.npz)
  WORKDIR/scorer/                  a model that predicts them from the text
  WORKDIR/scores/                  its prediction for every sequence of the store
  WORKDIR/selection.npz            what is kept: any run reads the store through it (--config.data.selection)
  WORKDIR/random.npz               as many sequences at random
  WORKDIR/main-all/ main-random/ main-selected/    the main model on all data and on either
  WORKDIR/summary.json report.html the outcome

A stage whose artefact is there is not done again; one that was interrupted goes on where it was.  The selections are
drawn again from the scores, to the same bits.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np

from datasel import build, evaluate, metrics, objectives, pretrained, processes, row_values, sharding
from datasel import config as config_lib
from datasel.data import mixture as mixture_lib
from datasel.data import selection as selections
from datasel.data import tokenizer as tokenizers
from datasel.data.selection import Selected, gumbel_top_k
from datasel.data.store import Store
from datasel.methods.pds import fitting, gammas, scorer, selection, texts
from datasel.methods.pds import target as targets
from datasel.methods.pds.report import write_report
from datasel.methods.pds.target import Target

# Settings that no earlier stage reads: a run may be continued with others while its workdir has no folder of that stage
# or of one after it.
READ_FROM = {
  'pmp': ('pds.target', 'pds.horizon', 'pds.learning_rate', 'pds.batch_size', 'pds.proxies', 'pds.stride',
          'pds.normalize'),
  'scorer': ('pds.scorer.',),
  'main-all': ('model.', 'optimizer.', 'train.steps', 'train.batch_size', 'train.init_from', 'pds.train_main'),
  'main-[rs]*': ('pds.ratio', 'pds.temperature', 'pds.quotas'),
}
_MAINS = ('all', 'random', 'selected')
_QUANTILES = (5, 25, 50, 75, 95)
_SHOWN, _SHOWN_CHARS = 8, 400  # sequences at either end of the scores that the report shows, and how much of them
_CHUNK = 1 << 20  # scores looked at together


def run(config: ml_collections.ConfigDict, directory: pathlib.Path, store: Store) -> dict:
  """Runs or finishes the whole of it; returns summary.json's contents."""
  plan = {stage.name: stage for stage in stages(config, store)}
  target = _target(config, store)
  source = _source(config)
  read = _reader(config, store, source)
  with build.begin(config, directory, store, sum(stage.flops for stage in plan.values())) as r:
    proxy = build.train_stage(r, plan['proxy'], role='proxy', init_role='init-proxy', weights_M=_natural(store)).params
    scored = gammas.compute(r, plan['proxy'], target, plan['pmp'])
    fitted = _fit_scorer(r, source, read, proxy, scored)
    del proxy
    scores = selection.score(r, plan['scores'], fitted)
    kept = processes.from_lead('selecting', lambda: selection.select(r, scores))
    for name in _MAINS if config.pds.train_main else ():
      view = store if name == 'all' else Selected(store.whole, selections.load(kept[name]))
      # They share their initialisation and their steps: they differ by the data alone.
      build.train_stage(dataclasses.replace(r, store=view), plan[f'main-{name}'], role='main', init_role='init-main',
                        weights_M=_natural(view), also_evaluate=_target_loss(r, plan[f'main-{name}'], target))

  def outcome() -> dict:
    summary = _outcome(config, directory, store, target, scored, fitted.held_out, scores)
    summary['cost_flops'] = {stage.name: stage.flops for stage in plan.values()}
    return summary

  return build.conclude(directory, outcome, write_report)


def stages(config: ml_collections.ConfigDict, store: Store) -> list[build.Stage]:
  """Every stage and its cost.  ValueError for settings that could not be run."""
  section = config.pds
  _check(config, store)
  _target(config, store)
  proxy = config_lib.to_model(section.model)
  made = lambda name, model, steps, batch_size, microbatches, **more: build.Stage(
    name, model, objectives.language_model(model.token_nll), steps, batch_size, microbatches, store.length, **more)
  per_token = proxy.flops_per_token(store.length)  # of a gradient: three forward passes
  T, inner = section.horizon, section.batch_size
  # Two passes of training, a Hessian-vector product of about twice a gradient, the target's gradient at each step; and
  # at each scored step the forward pass with its tangent, about twice a forward pass.
  solving = T * (4 * inner + section.target_examples) + -(-T // section.stride) * section.proxies * 2 / 3
  passing = lambda name, model, batch_size, microbatches, flops, size: build.Stage(
    name, model, None, 0, batch_size, microbatches, store.length, other_flops=flops, other_bytes=size)
  total = int(store.sizes('train').sum())
  encoder = _scorer(config, _source(config))
  of_scorer = encoder.flops_per_token(section.scorer.length or store.length) * store.length
  fitted = section.proxies - section.scorer.held_out
  # Every epoch's last state, the newest and one more, each with two moments.
  of_fit = 12 * encoder.n_params * (section.scorer.epochs + config.train.keep_checkpoints)
  mains = [made(f'main-{name}', config_lib.to_model(config.model), config.train.steps, config.train.batch_size,
                config.train.microbatches, init_from=config.train.init_from) for name in _MAINS if section.train_main]
  return [
    made('proxy', proxy, section.steps, section.train_batch_size, section.train_microbatches,
         init_from=section.init_from, keep_every=section.steps // section.checkpoints, optimizer=section.optimizer),
    passing('pmp', proxy, section.score_batch, 1, section.checkpoints * solving * per_token * store.length,
            3 * 4 * proxy.n_params),
    passing('scorer', encoder.model, section.scorer.batch_size, section.scorer.microbatches,
            section.scorer.epochs * fitted * of_scorer, of_fit),
    passing('scores', encoder.model, section.score_batch, 1, total * of_scorer / 3, 4 * total), *mains]


def _check(config: ml_collections.ConfigDict, store: Store) -> None:
  section = config.pds
  if section.steps % section.checkpoints or (section.steps // section.checkpoints) % config.train.checkpoint_every:
    raise ValueError(f'config.pds.steps {section.steps} over config.pds.checkpoints {section.checkpoints} must be a '
                     f'multiple of config.train.checkpoint_every {config.train.checkpoint_every}: only then is each '
                     'checkpoint that is solved from saved')
  if section.stride > section.horizon:
    raise ValueError(f'config.pds.stride {section.stride} is above config.pds.horizon {section.horizon}')
  if section.proxies % section.score_batch:
    raise ValueError(f'config.pds.proxies {section.proxies} is not a multiple of config.pds.score_batch '
                     f'{section.score_batch}')
  if section.batch_size % section.microbatches:
    raise ValueError(f'config.pds.microbatches {section.microbatches} does not divide config.pds.batch_size '
                     f'{section.batch_size}; choose a divisor of it')
  if section.proxies > store.sizes('train').sum():
    raise ValueError(f'config.pds.proxies is {section.proxies}, but {store.path} has {store.sizes("train").sum()} '
                     'sequences to train on')
  fitting.check(section.scorer, section.proxies)
  selections.check_options(dict(zip(store.domains, store.sizes('train').tolist())), ratio=section.ratio,
                           temperature=section.temperature, quotas=selections.quotas_of(section.quotas))


def _natural(store: Any) -> np.ndarray:
  """Domains as they are: every sequence as likely."""
  return mixture_lib.by_examples(store).for_domains(store.domains)


def _target(config: ml_collections.ConfigDict, store: Store) -> Target:
  return targets.load(config.pds.target, store, tokenizers.load(store.path), most=config.pds.target_examples)


def _source(config: ml_collections.ConfigDict) -> pretrained.Source | None:
  """Where the scorer starts from; None: the proxy model."""
  return pretrained.find(config.pds.scorer.source) if config.pds.scorer.source else None


def _scorer(config: ml_collections.ConfigDict, source: pretrained.Source | None) -> scorer.Scorer:
  model = config_lib.to_model(config.pds.model) if source is None else source.model
  return scorer.Scorer(model, config.pds.scorer.pooling)


def _reader(config: ml_collections.ConfigDict, store: Store, source: pretrained.Source | None) -> fitting.Read:
  """What the scorer sees of a record."""
  section = config.pds.scorer
  tokenizer = tokenizers.load(store.path) if source is None else source.tokenizer()
  return texts.reader(store, tokenizer, section.length or store.length, cut=section.cut)


def _fit_scorer(run: build.Run, source: pretrained.Source | None, read: fitting.Read, proxy: Any,
                scored: dict[str, np.ndarray]) -> fitting.Fitted:
  backbone = (lambda: proxy) if source is None else lambda: source.params(mesh=run.mesh, rules=build.rules(run.config))
  return fitting.fit(run, run.config.pds.scorer, _scorer(run.config, source), backbone,
                     (scored['domain_N'], scored['record_N']), scorer.targets(scored['gamma_N']), read)


def _target_loss(run: build.Run, stage: build.Stage, target: Target) -> Callable[[Any], dict]:
  """params -> {'target_nll': J}"""
  losses, rules = objectives.per_example(stage.model.token_nll), build.rules(run.config)

  def whole(params, batch):
    with sharding.use(run.mesh, rules):
      return losses(params, batch).sum()

  total = jax.jit(whole, out_shardings=sharding.replicated(run.mesh))
  batches = [gammas.put(run.mesh, rules, {k: x[first:first + stage.batch_size] for k, x in target.batch.items()})
             for first in range(0, len(target), stage.batch_size)]
  return lambda params: {'target_nll': sum(float(jax.device_get(total(params, b))) for b in batches) / len(target)}


def _outcome(config: ml_collections.ConfigDict, directory: pathlib.Path, store: Store, target: Target,
             scored: dict[str, np.ndarray], held_out: dict, scores: row_values.RowValues) -> dict:
  """summary.json, but for the cost."""
  section, by_domain = config.pds, scores.by_domain()
  kept = {name: selections.load(directory / f'{file}.npz').records
          for name, file in (('selected', 'selection'), ('random', 'random'))}
  gamma_N = scored['gamma_N']
  of_domain = {name: gamma_N[scored['domain_N'] == m] for m, name in enumerate(store.domains)}
  without = gumbel_top_k(by_domain, ratio=section.ratio, temperature=0.0, seed=0,
                         quotas=selections.quotas_of(section.quotas))
  if isinstance(store, Selected):
    without = store.records_of_whole(without)
  n_kept = sum(map(len, kept['selected'].values()))
  few = np.random.Generator(np.random.Philox(0)).choice(len(held_out['true']), min(1000, len(held_out['true'])), False)
  summary = {
    'target': {'name': section.target, 'examples': len(target), 'cut': target.cut, 'left_out': target.left_out},
    'kept': {name: {'of': len(x), **{which: len(records[name]) for which, records in kept.items()}}
             for name, x in by_domain.items()},
    'scores': {name: _quantiles(x) for name, x in by_domain.items() if len(x)},
    'gammas': {name: _quantiles(x) for name, x in of_domain.items() if len(x)},
    'noise': {'temperature': section.temperature, 'noise_std': section.temperature * np.pi / 6**0.5,
              'score_std': _std(by_domain),
              'same_without': sum(len(np.intersect1d(x, without[name])) for name, x in kept['selected'].items())
                              / n_kept},
    'scorer': {'spearman': held_out['spearman'], 'proxies': len(gamma_N), 'held_out': len(held_out['true']),
               'points': {key: np.asarray(held_out[key])[few].tolist() for key in ('true', 'predicted')}},
    'extremes': _extremes(store, by_domain), 'warnings': []}
  if section.train_main:
    lines = {name: metrics.read(directory, f'main-{name}', 'eval') for name in _MAINS}
    summary['comparison'] = evaluate.compare(lines['selected'], lines['all'])
    goal = lines['all'][-1]['target_nll']
    reached = [line['step'] for line in lines['selected'] if line['target_nll'] <= goal]
    summary['target']['loss'] = {name: each[-1]['target_nll'] for name, each in lines.items()}
    summary['steps_to_target'] = min(reached) if reached else None
  summary['warnings'] = _warnings(section, summary)
  return summary


def _warnings(section: ml_collections.ConfigDict, summary: dict) -> list[str]:
  found, noise = [], summary['noise']
  if summary['scorer']['spearman'] < 0.2:
    found.append(f'the scorer hardly predicts the computed scores (Spearman {summary["scorer"]["spearman"]:.2f}): the '
                 'selection is near random; want more proxies, more epochs or a better starting point')
  if section.scorer.loss == 'rank':
    found.append('scores fitted by rank have an order but no scale: pds.temperature is in no unit that can be compared')
  if noise['noise_std'] > noise['score_std']:
    found.append(f'the noise (standard deviation {noise["noise_std"]:.2g}) is larger than the differences between '
                 f'scores ({noise["score_std"]:.2g}): lower pds.temperature')
  if summary['target']['cut'] > 0.1 * summary['target']['examples']:
    found.append(f'{summary["target"]["cut"]} of {summary["target"]["examples"]} target examples are longer than a '
                 'sequence: their ends count for nothing')
  empty = [name for name, counts in summary['kept'].items() if counts['of'] and not counts['selected']]
  if empty:
    found.append(f'nothing of {", ".join(empty)} was kept: pds.quotas keeps a part of a domain')
  return found


def _quantiles(values: np.ndarray) -> dict[str, float]:
  return {str(q): float(x) for q, x in zip(_QUANTILES, np.percentile(values, _QUANTILES))}


def _std(by_domain: dict[str, np.ndarray]) -> float:
  """The standard deviation of all of them, a chunk in memory at a time."""
  chunks = [x[first:first + _CHUNK] for x in by_domain.values() for first in range(0, len(x), _CHUNK)]
  n = sum(map(len, chunks))
  mean = sum(float(x.sum(dtype=np.float64)) for x in chunks) / n
  return (sum(float(np.square(x.astype(np.float64) - mean).sum()) for x in chunks) / n)**0.5


def _largest(values: np.ndarray, k: int) -> np.ndarray:
  """Where the k largest are, the first of equal ones; without sorting them."""
  k = min(k, len(values))
  if not k:
    return np.zeros(0, np.int64)
  threshold = np.partition(values, len(values) - k)[len(values) - k]
  above = np.flatnonzero(values > threshold)
  return np.append(above, np.flatnonzero(values == threshold)[:k - len(above)])


def _extremes(store: Store, by_domain: dict[str, np.ndarray]) -> dict[str, list[dict]]:
  """The sequences of highest and lowest scores, with the beginnings of their text."""
  tokenizer = tokenizers.load(store.path)

  def shown(sign: int) -> list[dict]:
    ends = []
    for m, values in enumerate(by_domain.values()):
      ends += [(float(values[n]), m, int(n)) for n in _largest(sign * values, _SHOWN)]
    ends = sorted(ends, key=lambda end: (-sign * end[0], *end[1:]))[:_SHOWN]
    batch = store.read('train', np.array([m for _, m, _ in ends]), np.array([n for *_, n in ends]))
    names = store.names(batch['domain_B'], batch['example_B'])
    text = lambda row: tokenizer.decode(batch['tokens_BxL'][row][batch['segment_BxL'][row] > 0])
    return [{'name': name, 'score': ends[i][0], 'text': text(i)[:_SHOWN_CHARS]} for i, name in enumerate(names)]

  return {'highest': shown(1), 'lowest': shown(-1)}
