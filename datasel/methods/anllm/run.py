"""AnLLM end to end (Pang et al. 2024): the same model trained on with and without anchors, and what its cache is worth.

  WORKDIR/base/ base-ac/        the model that all arms start from, where they start from one; with an anchor token
  WORKDIR/stores/ac/            the text with that token between sentences, where it is made here
  WORKDIR/main-ARM/             each arm's model
  WORKDIR/evaluation/ARM.json   what it came to: perplexity by context, questions with a cache that is really evicted
  WORKDIR/evaluation.json       all of them, the masks and caches of some documents
  WORKDIR/summary.json report.html

A stage whose artefact is there is not done again; one that was interrupted goes on where it was.
"""

import dataclasses
import functools
import os
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

from datasel import build, metrics, objectives, prepare, pretrained, processes, sharding, workdir
from datasel import config as config_lib
from datasel.data import demo
from datasel.data import mixture as mixture_lib
from datasel.data import tokenizer as tokenizers
from datasel.data.store import Store, read_manifest
from datasel.data.tokenizer import Tokenizer
from datasel.methods.anllm import arms, contexts, documents, questions, speed, usage, vocabulary
from datasel.methods.anllm.anchors import ROWS
from datasel.methods.anllm.arms import Arm
from datasel.methods.anllm.report import write_report
from datasel.models.mistral import Mistral

# As in methods/pds/run.py: what a run may be continued with while its workdir has no such folder.
READ_FROM = {
  'evaluation': ('anllm.contexts', 'anllm.context_sequences', 'anllm.sets', 'anllm.shots', 'anllm.questions',
                 'anllm.question_batch', 'anllm.timed'),
}
_HOLDOUT = 0.05  # of a demo store, see main


def run(config: ml_collections.ConfigDict, directory: pathlib.Path, store: Store) -> dict:
  """Runs or finishes the whole of it; returns summary.json's contents."""
  plan = {stage.name: stage for stage in stages(config, store)}
  section, found = config.anllm, arms.parse(config.anllm.arms)
  with build.begin(config, directory, store, sum(stage.flops for stage in plan.values())) as r:
    stores = {arm.name: _store(r, arm) for arm in found}
    for arm in found:
      own = stores[arm.name]
      mixture = build.mixture(section.mixture, own, {}, 'anllm.mixture')
      stage = dataclasses.replace(plan[f'main-{arm.name}'], init_from=_start(r, arm, own))
      # They share their initialisation and their reading order: they differ by what they see.
      params = build.train_stage(dataclasses.replace(r, store=own), stage, role='main', init_role='init-main',
                                 weights_M=mixture.for_domains(own.domains)).params
      if processes.lead() and own.tokenizer['digest'] != store.tokenizer['digest']:
        tokenizers.copy(own.path, directory / stage.name / 'tokenizer')  # the run's own is of the others
      _evaluated(r, arm, stage.model, params, own)
      del params  # before the next arm has its own
    if processes.lead():
      mixture_lib.write(directory / 'mixture.json', build.mixture(section.mixture, store, {}, 'anllm.mixture'))

  def outcome() -> dict:
    evaluation = _collected(config, directory, found, stores)
    workdir.write_json(directory / 'evaluation.json', evaluation)
    summary = {'arms': {arm.name: _outcome(directory, arm, evaluation) for arm in found},
               'cost_flops': {stage.name: stage.flops for stage in plan.values()},
               'warnings': _warnings(found, evaluation)}
    return summary

  return build.conclude(directory, outcome, write_report)


def stages(config: ml_collections.ConfigDict, store: Store) -> list[build.Stage]:
  """Every arm's training and its cost, attention over anchors not counted.  ValueError for settings that could not be
  run."""
  found = arms.parse(config.anllm.arms)
  _check(config, store, found)
  made = []
  for arm in found:
    model = _model(config, arm, _tokenizer(config, store, arm))
    made.append(build.Stage(f'main-{arm.name}', model, objectives.language_model(model.token_nll), config.train.steps,
                            config.train.batch_size, config.train.microbatches, store.length))
  return made


def _check(config: ml_collections.ConfigDict, store: Store, found: list[Arm]) -> None:
  section, anchored = config.anllm, store.encoder().anchor_id is not None
  if config.train.init_from:
    raise ValueError('config.train.init_from: the arms of AnLLM start from config.anllm.init_from, a model as '
                     'datasel.load reads it; name it there')
  if section.anchor_row not in ROWS:
    raise ValueError(f'config.anllm.anchor_row is {section.anchor_row!r}; want one of {", ".join(ROWS)}')
  if section.max_length and section.max_length < section.min_length:
    raise ValueError(f'config.anllm.max_length {section.max_length} is below config.anllm.min_length '
                     f'{section.min_length}; want 0, for no limit, or at least as much')
  kinds = {arm.kind for arm in found}
  if anchored and kinds != {'ac'}:
    raise ValueError(f'{store.path} has anchor tokens in its text, which is for the arm ac alone, not for '
                     f'{section.arms}; name a store without, and this one as config.anllm.anchored_store')
  if 'ep' in kinds and (not section.symbols or any(map(str.isspace, section.symbols))):
    raise ValueError(f"config.anllm.symbols is {section.symbols!r}; want the characters that close a segment of the "
                     "arm ep, such as '.' or '.?!', with nothing between them")
  if 'ac' in kinds and not anchored and config.data.selection:
    raise ValueError('config.data.selection is of the records of another store than the arm ac reads: it would be '
                     'trained on other text than the others; train it alone, from a store with anchor tokens, or '
                     'without a selection')
  if 'ac' in kinds and not anchored and not section.anchored_store and (config.data.store or not config.data.demo):
    raise ValueError('the arm ac reads text with an anchor token between sentences: name its store, '
                     '--config.anllm.anchored_store=DIR, made by `python -m datasel.prepare` of the same corpus with a '
                     'tokenizer of `python -m datasel.prepare anchor-tokenizer`')
  build.mixture(section.mixture, store, {}, 'anllm.mixture')
  _contexts(config)
  questions.load(_names(section.sets), _numbers(config, 'shots'))
  shards = sharding.batch_shards(build.mesh(config.mesh), build.rules(config))
  if section.question_batch % shards:
    raise ValueError(f'config.anllm.question_batch is {section.question_batch}; want a multiple of the {shards} parts '
                     'that the mesh splits a batch into')
  if section.init_from:
    source = pretrained.find(section.init_from)
    shape = lambda model: jax.tree.map(lambda a: a.shape, model.abstract())
    if shape(config_lib.to_model(config.model)) != shape(source.model):
      raise ValueError(f'config.anllm.init_from {section.init_from} has another shape than config.model: '
                       f'{dataclasses.asdict(source.model)}; want config.model to be its')
    theirs, ours = source.tokenizer(), store.encoder()
    # An anchored store may be of a model that knows its anchors, or does not yet.
    if theirs.digest not in (ours.digest, ours.plain.digest):
      raise ValueError(f'config.anllm.init_from {section.init_from} has another tokenizer than {store.path} was made '
                       "with; prepare the store with that model's")


def _names(listed: str) -> list[str]:
  return [part.strip() for part in listed.split(',') if part.strip()]


def _numbers(config: ml_collections.ConfigDict, key: str) -> list[int]:
  listed = config.anllm[key]
  if not all(part.isdecimal() for part in _names(listed)):
    raise ValueError(f'config.anllm.{key} is {listed!r}; want whole numbers, joined by commas')
  return sorted({int(part) for part in _names(listed)})


def _contexts(config: ml_collections.ConfigDict) -> list[int]:
  lengths = [n for n in _numbers(config, 'contexts') if n <= config.data.length]
  if not lengths or not lengths[0] or any(lengths[-1] % n for n in lengths):
    raise ValueError(f'config.anllm.contexts is {config.anllm.contexts!r}; want lengths up to config.data.length '
                     f'{config.data.length}, each a divisor of the longest')
  return lengths


def _model(config: ml_collections.ConfigDict, arm: Arm, tokenizer: Tokenizer) -> Mistral:
  return arm.model(config_lib.to_model(config.model), config.anllm, tokenizer)


def _tokenizer(config: ml_collections.ConfigDict, store: Store, arm: Arm) -> Tokenizer:
  """Of the store that the arm reads, which need not be made yet."""
  section = config.anllm
  plain = store.encoder()
  if arm.kind != 'ac':
    return plain
  if plain.anchor_id is not None:
    _check_lengths(section, plain)
    return plain
  if section.anchored_store:
    found = tokenizers.load(section.anchored_store)
    if found.anchor_id is None or found.plain.digest != plain.digest:
      raise ValueError(f'config.anllm.anchored_store {section.anchored_store} was made with {found.name}; want the '
                       f'tokenizer of {store.path} with an anchor, of `python -m datasel.prepare anchor-tokenizer`')
    _check_lengths(section, found)
    ours, theirs = read_manifest(store.path), read_manifest(pathlib.Path(section.anchored_store))
    if differs := [key for key in ('length', 'packing', 'holdout', 'sources') if ours[key] != theirs[key]]:
      raise ValueError(f'config.anllm.anchored_store {section.anchored_store} differs from {store.path} by its '
                       f'{", ".join(differs)}; want it prepared of the same corpus with the same settings')
    return found
  return tokenizers.with_anchor(plain, min_length=section.min_length, max_length=section.max_length or None)


def _check_lengths(section: ml_collections.ConfigDict, tokenizer: Tokenizer) -> None:
  """Text that was prepared has its anchors by the tokenizer's rule."""
  rule = tokenizer.anchors
  if (section.min_length, section.max_length) not in ((1, 0), (rule.min_length, rule.max_length or 0)):
    raise ValueError(f'config.anllm.min_length {section.min_length} and max_length {section.max_length}, but the text '
                     f'of the arm ac was prepared with {rule.min_length} and {rule.max_length or 0}; prepare it with a '
                     'tokenizer of those lengths, or leave the keys at 1 and 0')


def _store(run: build.Run, arm: Arm) -> Store:
  """The store that the arm reads: the run's, or with anchor tokens in the text."""
  config, section = run.config, run.config.anllm
  if arm.kind != 'ac' or run.store.encoder().anchor_id is not None:
    return run.store
  path = pathlib.Path(section.anchored_store).absolute()
  if not section.anchored_store:
    path = run.directory / 'stores' / 'ac'

    def make() -> None:
      tokenizer = run.directory / 'tokenizer-ac'
      _tokenizer(config, run.store, arm).save(tokenizer)
      prepare.prepare(demo.fetch(config.data.demo), path, tokenizer, length=run.store.length, holdout=_HOLDOUT,
                      workers=os.cpu_count() or 1)

    processes.from_lead('preparing the text with anchors', make)
  return processes.together(f'opening {path}', lambda: Store(path, verify='size'))


def _start(run: build.Run, arm: Arm, store: Store) -> str:
  """The checkpoints to start from; '' for fresh parameters."""
  section = run.config.anllm
  if not section.init_from:
    return ''
  folder = run.directory / ('base-ac' if arm.kind == 'ac' else 'base')

  def make() -> None:
    if build.is_finished(folder):
      return
    source = pretrained.find(section.init_from)
    if arm.kind == 'ac' and source.tokenizer().anchor_id is None:
      vocabulary.with_anchor_token(source, folder, how=section.anchor_row, tokenizer=store.encoder(),
                                   mesh=run.mesh, rules=build.rules(run.config))
    else:
      pretrained.save_stage(source, source.params(mesh=run.mesh, rules=build.rules(run.config)), folder)

  processes.together(f'reading {section.init_from}', make)
  return str(folder / 'checkpoints')


def _evaluated(run: build.Run, arm: Arm, model: Mistral, params: Any, store: Store) -> None:
  """Writes evaluation/ARM.json, where it is not there."""
  config, section, path = run.config, run.config.anllm, run.directory / 'evaluation' / f'{arm.name}.json'
  if processes.together('looking for the evaluation', path.exists):
    return
  rules, tokenizer = build.rules(config), store.encoder()
  read = functools.partial(
    contexts.by_context, params=params, store=store, mesh=run.mesh, lengths=_contexts(config),
    sequences=section.context_sequences, batch_size=config.train.batch_size // config.train.microbatches,
    anchor_ids=model.anchors.anchor_ids if arm.kind == 'ac' else (), rules=rules)
  found = {'context': {'full': read(contexts.unmasked(model))}}
  if model.anchors is not None:
    found['context'] |= {'masked': read(model)}
  asked = {'sets': _names(section.sets), 'shots': _numbers(config, 'shots'), 'batch_size': section.question_batch,
           'seed': config.seed, 'mesh': run.mesh, 'rules': rules}
  found['questions'] = questions.evaluate(arm.name, model, params, tokenizer, limit=section.questions, **asked)
  found['speed'] = [] if model.anchors is None else speed.measure(
    arm.name, model, params, tokenizer, timed=section.timed, **asked)
  if processes.lead():
    workdir.write_json(path, found)
  processes.together('writing the evaluation', lambda: None)


def _collected(config: ml_collections.ConfigDict, directory: pathlib.Path, found: list[Arm],
               stores: dict[str, Store]) -> dict[str, Any]:
  """evaluation.json: what the arms came to, and what their anchors are in real documents."""
  models, readers = {}, {}
  for arm in found:
    readers[arm.name] = stores[arm.name].encoder()
    models[arm.name] = _model(config, arm, readers[arm.name])
  parts = {arm.name: workdir.read_json(directory / 'evaluation' / f'{arm.name}.json') for arm in found}
  shown = documents.choose(stores[found[0].name], readers[found[0].name])
  return {
    'arms': {name: _facts(model, stores[name], config.anllm.context_sequences) for name, model in models.items()},
    'context': {name: part['context'] for name, part in parts.items()},
    'questions': [row for part in parts.values() for row in part['questions']],
    'speed': [row for part in parts.values() for row in part['speed']],
    'documents': documents.describe(shown, models, readers),
    'cache': documents.saved(shown, models, readers),
  }


def _facts(model: Mistral, store: Store, sequences: int) -> dict[str, Any]:
  rule = model.anchors
  found = {'anchor_share': 0.0, 'mean_segment': None} if rule is None else usage.in_store(
    store, rule, sequences=sequences)
  return found | {'rule': None if rule is None else dataclasses.asdict(rule), 'vocab_size': model.vocab_size,
                  'anchor_sees_anchors': model.anchor_sees_anchors, 'keep_bos': model.keep_bos}


def _outcome(directory: pathlib.Path, arm: Arm, evaluation: dict[str, Any]) -> dict[str, Any]:
  """Of summary.json: the end of an arm's training, and how much of a cache it saves."""
  last = metrics.read(directory, f'main-{arm.name}', 'eval')[-1]
  return {'uniform_nll': last['uniform_nll'],
          'uniform_bits_per_byte': float(np.mean(list(last['bits_per_byte'].values()))),
          'cache_saved': evaluation['cache'].get(arm.name, {}).get('prefix', 0.0)}


def _warnings(found: list[Arm], evaluation: dict[str, Any]) -> list[str]:
  few = [arm.name for arm in found if arm.kind != 'full' and not evaluation['arms'][arm.name]['anchor_share']]
  return [f'{name}: the held-out text has no anchor: it attends to all and saves nothing' for name in few]
