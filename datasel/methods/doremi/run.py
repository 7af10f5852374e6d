"""DoReMi end to end (Xie et al. 2023): reference model, proxy model by Group DRO, main model on the tuned weights.

  WORKDIR/[round-R/]reference/        the reference model, trained on the reference weights
  WORKDIR/[round-R/]reference_nll/    its loss of every token the proxies will see
  WORKDIR/[round-R/]proxy-S/          a proxy model for each seed S, and weights.json: its average domain weights
  WORKDIR/mixture.json                the tuned weights (mean over the seeds of the last round)
  WORKDIR/domain_weights.json         the same, in the form that DoReMi's own code reads
  WORKDIR/main-baseline/ main-tuned/  the main model on either mixture
  WORKDIR/summary.json report.html    the outcome

A stage whose artefact is there is not done again; one that was interrupted goes on where it was.
"""

import dataclasses
import logging
import math
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from datasel import build, evaluate, metrics, objectives, processes, workdir
from datasel import config as config_lib
from datasel.data import mixture as mixture_lib
from datasel.data.mixture import Mixture
from datasel.data.sampler import Sampler
from datasel.data.store import Store
from datasel.methods.doremi import domain_weights, reference_losses
from datasel.methods.doremi.report import write_report
from datasel.models.mistral import Mistral

_NEAR_ONE_HOT = 0.9
_OFTEN_ABSENT = 0.5


def run(config: ml_collections.ConfigDict, directory: pathlib.Path, store: Store) -> dict:
  """Runs or finishes the whole of it; returns summary.json's contents."""
  plan = stages(config, store)
  with build.begin(config, directory, store, sum(stage.flops for stage in plan)) as r:
    baseline = build.mixture(config.doremi.baseline, store, config.doremi.baseline_epochs.to_dict(), 'doremi.baseline')
    if processes.lead():
      mixture_lib.write(directory / 'baseline.json', baseline)
    tuned, rounds = tune(r, baseline)
    # Where the weights stood still, the rounds after are neither run nor counted.
    not_run = tuple(_prefix(config, later) for later in range(len(rounds), config.doremi.rounds))
    r.progress.skip(sum(stage.flops for stage in plan if stage.name.startswith(not_run)))
    if processes.lead():
      mixture_lib.write(directory / 'mixture.json', tuned)
      mixture_lib.write_doremi(directory / 'domain_weights.json', tuned)
    if config.doremi.train_main:
      # Both share their initialisation and their reading order: they differ by the mixture alone.
      for name, mixture in (('baseline', baseline), ('tuned', tuned)):
        build.train_stage(r, _main(config, store, name, config_lib.to_model(config.model)), role='main',
                          init_role='init-main', weights_M=mixture.for_domains(store.domains))

  def outcome() -> dict:
    summary = {'baseline': baseline.weights, 'tuned': tuned.weights, 'rounds': rounds}
    if config.doremi.train_main:
      lines = {name: metrics.read(directory, f'main-{name}', 'eval') for name in ('baseline', 'tuned')}
      summary['comparison'] = evaluate.compare(lines['tuned'], lines['baseline'])
    summary['warnings'] = warnings(r, tuned)
    summary['cost_flops'] = {stage.name: stage.flops for stage in plan if not stage.name.startswith(not_run)}
    return summary

  return build.conclude(directory, outcome, write_report)


def stages(config: ml_collections.ConfigDict, store: Store) -> list[build.Stage]:
  """Every stage that may run, with its cost; iterated DoReMi may stop before its last round.

  ValueError for weights that could not be sampled: of the baseline, or, by the smallest they can get, of the result.
  """
  section, main = config.doremi, config_lib.to_model(config.model)
  for key, known in (('proxy_sampling', ('uniform', 'reference')), ('initial_weights', ('uniform', 'sampling'))):
    if section[key] not in known:
      raise ValueError(f'config.doremi.{key} is {section[key]!r}; want one of {known}')
  baseline = build.mixture(section.baseline, store, section.baseline_epochs.to_dict(), 'doremi.baseline')
  smallest = section.smoothing / len(store.domains)
  if smallest * config.data.block < 1 and (section.train_main or section.rounds > 1):
    raise ValueError(
      f'config.doremi.smoothing {section.smoothing} lets the weight of one of {len(store.domains)} domains fall to '
      f'{smallest:.2g}, which config.data.block = {config.data.block} sequences cannot hold; raise one of '
      'them')
  listed = []
  for r in range(section.rounds):
    prefix = _prefix(config, r)
    listed += [_reference(config, store, prefix), _reference_nll(config, store, prefix)]
    listed += [_proxy(config, store, prefix, s, _sampling(config, baseline)) for s in range(section.seeds)]
  return listed + [_main(config, store, name, main) for name in ('baseline', 'tuned') if section.train_main]


def _reference(config: ml_collections.ConfigDict, store: Store, prefix: str) -> build.Stage:
  section = config.doremi
  model = config_lib.to_model(section.model)
  return build.Stage(f'{prefix}reference', model, objectives.language_model(model.token_nll), section.steps,
                     section.batch_size, section.microbatches, store.length, init_from=section.init_from)


def _reference_nll(config: ml_collections.ConfigDict, store: Store, prefix: str) -> build.Stage:
  """A forward pass, a third of training, over at most what the proxies draw."""
  section = config.doremi
  model = config_lib.to_model(section.model)
  rows = min(section.steps * section.batch_size * section.seeds, int(store.sizes('train').sum()))
  return build.Stage(f'{prefix}reference_nll', model, None, 0, section.batch_size, section.microbatches, store.length,
                     other_flops=model.flops_per_token(store.length) / 3 * store.length * rows,
                     other_bytes=4 * store.length * rows)


def _proxy(config: ml_collections.ConfigDict, store: Store, prefix: str, seed: int, sampling: Mixture) -> build.Stage:
  section, n_domains = config.doremi, len(store.domains)
  model = config_lib.to_model(section.model)
  sampling_M = jnp.asarray(sampling.for_domains(store.domains), jnp.float32)
  objective = domain_weights.group_dro(
    objectives.in_microbatches(model.token_nll, section.microbatches), n_domains, step_size=section.step_size,
    smoothing=section.smoothing, clip=section.clip, loss_reduction=section.loss_reduction,
    missing_domain=section.missing_domain, sampling_M=sampling_M)
  initial_M = None if section.initial_weights == 'uniform' else sampling_M
  # The objective splits its batch itself: alpha must have seen all of it before the first gradient.
  return build.Stage(f'{prefix}proxy-{seed}', model, objective, section.steps, section.batch_size, section.microbatches,
                     store.length, aux=domain_weights.initial_aux(n_domains, vocab_size=model.vocab_size,
                                                                  initial_M=initial_M),
                     extra_columns=('reference_nll_BxL',), init_from=section.init_from, splits_inside=True)


def _sampling(config: ml_collections.ConfigDict, reference: Mixture) -> Mixture:
  """What the proxies' batches are drawn by."""
  return reference if config.doremi.proxy_sampling == 'reference' else mixture_lib.uniform(reference.weights)


def _main(config: ml_collections.ConfigDict, store: Store, name: str, model: Mistral) -> build.Stage:
  return build.Stage(f'main-{name}', model, objectives.language_model(model.token_nll), config.train.steps,
                     config.train.batch_size, config.train.microbatches, store.length, init_from=config.train.init_from)


def tune(run: build.Run, baseline: Mixture) -> tuple[Mixture, list[dict]]:
  """Rounds of reference and proxies until the weights stand still (iterated DoReMi): max |change| < tolerance."""
  section, domains = run.config.doremi, run.store.domains
  reference, rounds = baseline, []
  for r in range(section.rounds):
    average = one_round(run, _prefix(run.config, r), reference, f'round-{r + 1}')
    change = float(np.abs(average.for_domains(domains) - reference.for_domains(domains)).max())
    rounds.append({'reference': reference.weights, 'tuned': average.weights, 'largest_change': change,
                   'seeds': average.provenance['seeds']})
    logging.info('round %d: the weights moved by at most %.4f', r + 1, change)
    reference = average
    if change < section.tolerance:
      break
  else:
    if section.rounds > 1:
      logging.warning('after %d rounds the weights still move by %.4f (tolerance %g)', section.rounds, change,
                      section.tolerance)
  return reference, rounds


def one_round(run: build.Run, prefix: str, reference: Mixture, round_name: str) -> Mixture:
  """Steps 1 and 2 of the paper: reference model on the reference weights, proxies against it, their average weights."""
  config, section, store = run.config, run.config.doremi, run.store
  stage = _reference(config, store, prefix)
  sampling = _sampling(config, reference)
  sampling_M = sampling.for_domains(store.domains)
  proxies = [_proxy(config, store, prefix, s, sampling) for s in range(section.seeds)]
  # Only what is still needed of a model is kept: the parameters of the reference while its losses are computed, the
  # weights of a proxy.
  params = build.train_stage(run, stage, role=stage.name, weights_M=reference.for_domains(store.domains)).params
  samplers = [Sampler(store, 'train', sampling_M, section.batch_size, seed=build.seed_for(config, proxy.name),
                      block=config.data.block) for proxy in proxies]
  add_losses = reference_losses.compute(
    run.directory / f'{prefix}reference_nll', objectives.in_microbatches(stage.model.token_nll, stage.microbatches),
    params, store, run.mesh, reference_losses.visited(samplers, section.steps),
    batch_size=section.batch_size, stage=f'{prefix}reference_nll', progress=run.progress, rules=build.rules(config),
    flops_per_row=stage.model.flops_per_token(store.length) / 3 * store.length,
    provenance={'stage': stage.name, 'steps': stage.steps, 'model': dataclasses.asdict(stage.model),
                'weights': reference.weights, 'seed': config.seed})
  del params

  averages = []
  for s, proxy in enumerate(proxies):
    aux = jax.device_get(build.train_stage(
      run, proxy, role=proxy.name, init_role=f'init-{s}', weights_M=sampling_M, add_columns=add_losses,
      describe=lambda values: _by_domain(values, store.domains)).aux)
    named = lambda x_M: dict(zip(store.domains, np.asarray(x_M, np.float64).tolist()))
    averages.append(named(domain_weights.average(aux, include_initial=section.average_includes_initial)))
    if processes.lead():
      workdir.write_json(run.directory / proxy.name / 'weights.json',
                         {'average': averages[-1], 'last': named(np.exp(aux['log_alpha_M']))})
  mean = {name: math.fsum(a[name] for a in averages) / len(averages) for name in store.domains}
  return Mixture(mixture_lib.normalised(mean), {
    'method': 'doremi', 'round': round_name, 'seed': config.seed, 'step': section.steps, 'store': store.digest,
    'git': workdir.git_version(), 'tokenizer': store.tokenizer, 'reference': reference.weights, 'seeds': averages})


def warnings(run: build.Run, tuned: Mixture) -> list[str]:
  """What a user of DoReMi needs to be told about these weights."""
  config, found = run.config, []
  name, largest = max(tuned.weights.items(), key=lambda item: item[1])
  if largest > _NEAR_ONE_HOT:
    found.append(f'the weights are nearly one-hot: {name} has {largest:.3f}; try a larger batch, a smaller '
                 'doremi.step_size, or a reference trained on natural proportions')
  for r in range(config.doremi.rounds):
    prefix = _prefix(config, r)
    reference = metrics.read(run.directory, f'{prefix}reference', 'eval')
    for s in range(config.doremi.seeds):
      stage = f'{prefix}proxy-{s}'
      steps, final = metrics.read(run.directory, stage, 'train'), metrics.read(run.directory, stage, 'eval')
      if not steps:
        continue
      present = {d: np.mean([line['present'][d] for line in steps]) for d in run.store.domains}
      absent = [f'{d} ({100 * (1 - p):.0f}%)' for d, p in present.items() if p < _OFTEN_ABSENT]
      if absent:
        found.append(f'{stage}: domains absent from many batches: {", ".join(absent)}; their excess loss is rarely '
                     'seen: raise doremi.batch_size')
      if final and reference and reference[-1]['uniform_nll'] > final[-1]['uniform_nll']:
        found.append(
          f'{stage}: the reference (held-out {reference[-1]["uniform_nll"]:.3f} nats/token, mean over domains) is '
          f'worse than the proxy ({final[-1]["uniform_nll"]:.3f}): excess losses are mostly clipped to 0 and say '
          'little')
  for stage in ('main-baseline', 'main-tuned'):
    path = run.directory / stage / 'stage.json'
    if path.exists():
      often = {d: e for d, e in workdir.read_json(path)['epochs'].items() if e > 4}
      if often:
        found.append(f'{stage}: domains read more than 4 times: '
                     + ', '.join(f'{d} ({e:.1f})' for d, e in sorted(often.items(), key=lambda item: -item[1])))
  return found


def _prefix(config: ml_collections.ConfigDict, r: int) -> str:
  return f'round-{r + 1}/' if config.doremi.rounds > 1 else ''


def _by_domain(values: dict, domains: tuple[str, ...]) -> dict:
  """metrics['alpha_M'] -> {'alpha': {domain: weight}}, for metrics.jsonl."""
  return {name.removesuffix('_M'): dict(zip(domains, np.asarray(x, np.float64).tolist())) if name.endswith('_M') else x
          for name, x in values.items()}
