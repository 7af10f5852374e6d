"""ProX end to end (Zhou et al. 2024): small models learn to write programs that clean documents, and clean a corpus.

  WORKDIR/examples/                  what the refiners are taught on, where it is made here
  WORKDIR/raw/                       the text to refine, where it is the demo's pages
  WORKDIR/base/                      the model that both refiners start from, trained on the raw text
  WORKDIR/refiner-document/ refiner-chunk/
  WORKDIR/refined/prox/ refined/RULES/    the text as the refiners and as each set of rules leave it, with its audit
  WORKDIR/stores/NAME/               the raw, filtered and refined text as token stores
  WORKDIR/main-raw/ main-prox/ main-RULES/    the main model on each, over as many tokens
  WORKDIR/summary.json report.html   the outcome

All models are judged on the held-out text of the run's own token store, whose tokenizer they share.  A stage whose
artefact is there is not done again; one that was interrupted goes on where it was.
"""

import dataclasses
import logging
import os
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

from datasel import build, evaluate, metrics, objectives, prepare, pretrained, processes, sharding, train, workdir
from datasel import config as config_lib
from datasel.data import corpus as corpora
from datasel.data import demo
from datasel.data import mixture as mixture_lib
from datasel.data import tokenizer as tokenizers
from datasel.data.store import Store
from datasel.methods.prox import (
  annotate,
  audit,
  demo_corpus,
  examples,
  lines,
  local,
  pieces,
  refine,
  rows,
  sft,
  templates,
  web_pages,
)
from datasel.methods.prox.refiner import Refiner, grammar_of
from datasel.methods.prox.report import write_report
from datasel.methods.prox.rule_refiner import RuleRefiner

# As in methods/pds/run.py: what a run may be continued with while its workdir has no such folder.
READ_FROM = {
  'base': ('prox.steps', 'prox.batch_size', 'prox.optimizer.'),
  'refiner-document': ('prox.document.', 'prox.examples'),
  'refiner-chunk': ('prox.chunk.',),
  'refined': ('prox.compat', 'prox.rules'),
  'main-*': ('model.', 'optimizer.', 'train.steps', 'train.batch_size', 'train.init_from', 'prox.target',
             'prox.train_main'),
}
PAGES, PAIRS, RULES = 'demo:pages', 'pairs', 'rules:'
_HOLDOUT = 0.05  # of a demo store, see main; and of the stores made here, which nobody looks at
_DOMAIN = 'text'  # of the stores made here
_FEWEST = 200  # documents that a main model is trained on: of fewer, it could be that none is held out
_WORDS_A_DOCUMENT = 1000  # for the forecast of a corpus that is not there yet


def run(config: ml_collections.ConfigDict, directory: pathlib.Path, store: Store) -> dict:
  """Runs or finishes the whole of it; returns summary.json's contents."""
  plan = {stage.name: stage for stage in stages(config, store)}
  section = config.prox
  with build.begin(config, directory, store, sum(stage.flops for stage in plan.values())) as r:
    raw = processes.from_lead('making the corpus', lambda: str(_raw(config, directory)))
    taught = processes.from_lead('making the examples', lambda: str(_examples(config, directory, raw, store)))
    processes.together('looking at the examples', lambda: _check_examples(config, directory, taught, store))
    stores = {'raw': _store(r, 'raw', raw)}
    init = section.init_from or str(directory / 'base')
    if 'base' in plan:
      _train(r, plan['base'], stores['raw'], role='base', init_role='init-base')
    for task in examples.TASKS:
      sft.train(r, task, taught, section[task], init=init)
    refiners = {'prox': _refiner(r)} | {name: RuleRefiner(rules) for name, rules in _rules(section).items()}
    outputs = {name: _refined(r, refiner, name, raw) for name, refiner in refiners.items()}
    for name in refiners if section.train_main else ():
      if outputs[name].n_train >= _FEWEST:
        stores[name] = _store(r, name, str(directory / 'refined' / name))
    for name, own in stores.items() if section.train_main else ():
      # They share their initialisation and their steps: they differ by the text alone.
      _train(r, plan[f'main-{name}'], own, role='main', init_role='init-main')

  def outcome() -> dict:
    summary = _outcome(config, directory, raw, taught, outputs, store)
    made = {name: directory / name / 'stage.json' for name in plan}
    summary['cost_flops'] = {name: workdir.read_json(path)['flops'] for name, path in made.items() if path.exists()} | {
      'refining': audit.flops(outputs['prox'].statistics['total'], refiners['prox'].flops_per_token)}
    return summary

  return build.conclude(directory, outcome, write_report)


def stages(config: ml_collections.ConfigDict, store: Store) -> list[build.Stage]:
  """Every stage and its cost, by the numbers of examples and documents that the config asks for.

  ValueError for settings that could not be run.
  """
  section = config.prox
  _check(config, store)
  source = pretrained.find(section.init_from) if section.init_from else None
  model = source.model if source else config_lib.to_model(section.model)
  base = [] if source else [_stage('base', model, config, section.steps, section.batch_size, section.microbatches,
                                   store.length, optimizer=section.optimizer)]
  taught = {task: section.documents for task in examples.TASKS}
  if section.examples != PAIRS and not section.examples.startswith(RULES):
    found = examples.manifest(section.examples)['files']
    taught = {task: found[f'train/{task}']['examples'] for task in examples.TASKS}
  refiners = [sft.stage(section[task], task, model, taught[task]) for task in examples.TASKS]
  # Each document is read twice, once of it with line numbers, and little is written.
  read = 2.0 * _WORDS_A_DOCUMENT * section.documents
  refining = build.Stage('refining', model, None, 0, section.refine_batch, 1, section.chunk.length,
                         other_flops=model.flops_per_token(section.chunk.length) / 3 * read)
  main = config_lib.to_model(config.model)
  mains = [_stage(f'main-{name}', main, config, config.train.steps, config.train.batch_size, config.train.microbatches,
                  store.length, init_from=config.train.init_from)
           for name in ('raw', 'prox', *_rules(section)) if section.train_main]
  return [*base, *refiners, refining, *mains]


def _stage(name: str, model: Any, config: ml_collections.ConfigDict, steps: int, batch_size: int, microbatches: int,
           length: int, **more: Any) -> build.Stage:
  return build.Stage(name, model, objectives.language_model(model.token_nll), steps, batch_size, microbatches, length,
                     **more)


def _check(config: ml_collections.ConfigDict, store: Store) -> None:
  section, known = config.prox, (PAGES, *(f'demo:{name}' for name in demo.SETS))
  if not section.corpus or section.corpus.startswith('demo:') and section.corpus not in known:
    raise ValueError(f'config.prox.corpus is {section.corpus!r}; want a folder of text, or one of {", ".join(known)}')
  if not section.corpus.startswith('demo:'):
    corpora.Corpus(section.corpus)
  if section.corpus == PAGES:
    try:
      web_pages.extractor()
    except ImportError as e:
      raise ValueError(f'config.prox.corpus is {PAGES!r}: {e}') from e
  if section.examples == PAIRS and section.corpus != PAGES:
    raise ValueError(f'config.prox.examples is {PAIRS!r}, which are of config.prox.corpus {PAGES!r}, not of '
                     f'{section.corpus!r}; want a folder that datasel.methods.prox.annotate made, or {RULES}NAMES')
  if section.examples.startswith(RULES):
    RuleRefiner(section.examples.removeprefix(RULES))
  elif section.examples != PAIRS:
    try:
      files = examples.manifest(section.examples)['files']
    except FileNotFoundError as e:
      raise ValueError(f'config.prox.examples is {section.examples!r}: {e}') from e
    if empty := [name for name, one in files.items() if not one['examples'] and not name.startswith('test')]:
      raise ValueError(f'config.prox.examples is {section.examples!r}, which has no examples of {", ".join(empty)}')
  tokenizer = _tokenizer(section, store)
  for task in examples.TASKS:
    sft.check(section[task], task, f'config.prox.{task}')
    _prompts(section[task], task, tokenizer)
  if not section.init_from and config_lib.to_model(section.model).vocab_size < store.vocab_size:
    raise ValueError(f'config.prox.model.vocab_size is below the {store.vocab_size} token ids of {store.path}')
  build.optimizer(section.optimizer, section.steps)
  _rules(section)
  _target(config, store)
  shards = sharding.batch_shards(build.mesh(config.mesh), build.rules(config)) if jax.process_count() == 1 else 1
  if section.refine_batch % shards:
    raise ValueError(f'config.prox.refine_batch is {section.refine_batch}; want a multiple of the {shards} parts that '
                     'the mesh splits a batch into')


def _rules(section: ml_collections.ConfigDict) -> dict[str, str]:
  """{the name of a filter's stages and folders: the rules that it is made of}"""
  names = [part.strip() for part in section.rules.split(',') if part.strip()]
  if len({RuleRefiner(name).fingerprint for name in names}) < len(names):
    raise ValueError(f'config.prox.rules {section.rules!r} names one twice')
  return {name.replace('+', '-'): name for name in names}


def _target(config: ml_collections.ConfigDict, store: Store) -> list[str]:
  names = [part.strip() for part in config.prox.target.split(',') if part.strip()] or list(store.domains)
  if unknown := sorted(set(names) - set(store.domains)):
    raise ValueError(f'config.prox.target: {store.path} has no domain {", ".join(unknown)}; it has '
                     f'{", ".join(store.domains)}')
  return names


def _raw(config: ml_collections.ConfigDict, directory: pathlib.Path) -> pathlib.Path:
  """The folder of the corpus to refine; ValueError for one of too few documents."""
  folder = _corpus(config, directory)
  train = corpora.Corpus(folder).sources['train']
  n = sum(pieces.count_rows(source) for sources in train.values() for source in sources)
  if n < _FEWEST:
    raise ValueError(f'config.prox.corpus: {folder} has {n} documents to train on; want at least {_FEWEST}')
  return folder


def _corpus(config: ml_collections.ConfigDict, directory: pathlib.Path) -> pathlib.Path:
  section = config.prox
  if section.corpus == PAGES:
    demo_corpus.build(directory / 'raw', directory / 'examples', documents=section.documents, holdout=_HOLDOUT,
                      seed=config.seed)
    return directory / 'raw'
  if section.corpus.startswith('demo:'):
    return demo.fetch(section.corpus.removeprefix('demo:'))
  return pathlib.Path(section.corpus)


def _examples(config: ml_collections.ConfigDict, directory: pathlib.Path, raw: str, store: Store) -> pathlib.Path:
  """The folder of the examples.  Chunks are as long as the chunk refiner has room for."""
  section, folder = config.prox, directory / 'examples'
  if section.examples != PAIRS and not section.examples.startswith(RULES):
    return pathlib.Path(section.examples)
  counter = annotate.Counter(prompts=_prompts(section.chunk, 'chunk', _tokenizer(section, store)))
  if section.examples == PAIRS:
    pairs = annotate.demo_pairs(folder, synthetic=section.documents, seed=config.seed)
    annotate.from_pairs(pairs, folder, counter=counter, seed=config.seed)
  else:
    seeds = annotate.choose(raw, section.documents, seed=config.seed)
    annotate.from_rules(seeds, folder, section.examples.removeprefix(RULES), counter=counter, seed=config.seed)
  return folder


def _check_examples(config: ml_collections.ConfigDict, directory: pathlib.Path, taught: str, store: Store) -> None:
  """ValueError where a refiner could not be taught, before the model that it starts from is trained."""
  section = config.prox
  tokenizer = _tokenizer(section, store)
  model = pretrained.find(section.init_from).model if section.init_from else config_lib.to_model(section.model)
  for task in examples.TASKS:
    if build.is_finished(directory / sft.name(task)):
      continue
    prompts = _prompts(section[task], task, tokenizer)
    grammar = grammar_of(prompts, model.vocab_size)
    for split in ('train', 'validation'):
      found = rows.encode(examples.read(taught, split, task), prompts, grammar)
      if not len(found):
        raise ValueError(f'{taught} has no {split} example of a {task} that can be used (left out: {found.left_out}); '
                         f'want more of them, from more sources, or a longer config.prox.{task}.length')


def _tokenizer(section: ml_collections.ConfigDict, store: Store) -> tokenizers.Tokenizer:
  """Of the refiners."""
  return pretrained.find(section.init_from).tokenizer() if section.init_from else tokenizers.load(store.path)


def _prompts(section: ml_collections.ConfigDict, task: str, tokenizer: tokenizers.Tokenizer) -> templates.Prompts:
  return templates.Prompts(tokenizer, task, section.template, length=section.length,
                           max_new_tokens=section.max_new_tokens)


def _store(run: build.Run, name: str, corpus: str) -> Store:
  """The token store of a corpus's train text as one domain, with the tokenizer and the length of the run's own.

  One, for of a small domain so little may be left that none of it is held out, which a store asks for.
  """
  path = run.directory / 'stores' / name

  def make() -> str:
    pooled = run.directory / 'stores' / f'{name}-corpus'
    (pooled / 'train').mkdir(parents=True, exist_ok=True)
    sources = corpora.Corpus(corpus).sources['train']
    for n, source in enumerate(source for domain in sorted(sources) for source in sources[domain]):
      link = pooled / 'train' / f'{_DOMAIN}-{n:05d}{corpora.suffix(source.path)}'
      link.unlink(missing_ok=True)
      link.symlink_to(source.path.absolute())
    return str(prepare.prepare(pooled, path, run.store.path, length=run.store.length, holdout=_HOLDOUT,
                               workers=os.cpu_count() or 1).path)

  processes.from_lead(f'preparing {name}', make)
  return processes.together(f'opening {path}', lambda: Store(path, verify='size'))


def _train(run: build.Run, stage: build.Stage, own: Store, *, role: str, init_role: str) -> None:
  """On a store's text as it is, judged on the run's own store."""
  natural_M = mixture_lib.by_examples(own).for_domains(own.domains)
  build.train_stage(dataclasses.replace(run, store=own), stage, role=role, init_role=init_role, weights_M=natural_M,
                    judged_on=run.store)


def _refiner(run: build.Run) -> Refiner:
  alone = jax.process_count() == 1  # of several processes each refines a part of the corpus by itself
  return Refiner.load(*(run.directory / sft.name(task) for task in examples.TASKS),
                      batch_size=run.config.prox.refine_batch, mesh=run.mesh if alone else None,
                      rules=build.rules(run.config))


def _refined(run: build.Run, refiner: Any, name: str, raw: str) -> audit.Output:
  out = run.directory / 'refined' / name
  out.parent.mkdir(exist_ok=True)
  logging.info('refining %s by %s', raw, refiner.name)
  try:
    refine.refine(raw, out, refiner, compat=run.config.prox.compat, tokenizer_path=run.store.path,
                  workers=(os.cpu_count() or 1) if isinstance(refiner, RuleRefiner) else 1,
                  shard=(jax.process_index(), jax.process_count()))
  except local.Interrupted as e:
    raise train.Interrupted(str(e)) from e
  processes.together(f'refining by {refiner.name}', lambda: None)
  return audit.Output(out)


def _outcome(config: ml_collections.ConfigDict, directory: pathlib.Path, raw: str, taught: str,
             outputs: dict[str, audit.Output], store: Store) -> dict[str, Any]:
  """summary.json, but for the cost."""
  judged = {task: workdir.read_json(directory / sft.name(task) / 'test.json') for task in examples.TASKS}
  text = {name: {'statistics': output.statistics['total'],
                 'lines': lines.removed(raw, output)} for name, output in outputs.items()}
  summary: dict[str, Any] = {'corpus': raw, 'examples': examples.manifest(taught) | {'folder': taught},
                             'refiners': judged, 'text': text, 'warnings': _warnings(judged, outputs)}
  if config.prox.train_main:
    read = {name: metrics.read(directory, f'main-{name}', 'eval') for name in ('raw', *outputs)}
    evaluated = {name: found for name, found in read.items() if found}
    target = _target(config, store)
    summary['target'] = {'domains': target, 'nll': {
      name: float(np.mean([each[-1]['nll'][domain] for domain in target])) for name, each in evaluated.items()}}
    if 'prox' in evaluated:
      summary['comparison'] = evaluate.compare(evaluated['prox'], evaluated['raw'])
  return summary


def _warnings(judged: dict[str, dict], outputs: dict[str, audit.Output]) -> list[str]:
  found = []
  for task, result in judged.items():
    if not result:
      found.append(f'there were no test examples of a {task}: how well its refiner works is not known')
  for name, output in outputs.items():
    if output.n_train < _FEWEST:
      found.append(f'{name} leaves {output.n_train} documents to train on: too few')
    if near := output.statistics['total']['finished'].get('length', 0):
      found.append(f'{name}: {near} programs came near the limit of their length, which may have ended them')
  return found
