"""Supervised fine-tuning of a refiner on annotated programs (ProX, Zhou et al. 2024, section 2.3 and appendix A).

  WORKDIR/refiner-TASK/stage.json       the model and what it was trained on; how a text is put to it (`refiner`)
  WORKDIR/refiner-TASK/epochs.json      what each epoch came to on the validation examples; written last of an epoch
  WORKDIR/refiner-TASK/calibration.json of documents: the score from which one is kept, and the curve around it
  WORKDIR/refiner-TASK/test.json        the best epoch on the test examples, which chose nothing
  WORKDIR/refiner-TASK/checkpoints/     the parameters of the best epoch, by validation F1; tokenizer/ its tokenizer
  WORKDIR/refiner-TASK/training/        the states of the training, until it is done

TASK is 'document' or 'chunk'.  The folder is a stage like others: `pretrained.find`, `datasel.export` and
`refiner.Refiner.load` read it.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from datasel import build, metrics, objectives, pretrained, processes, sharding, workdir
from datasel import evaluate as evaluate_lib
from datasel import train as train_lib
from datasel.checkpoint import Checkpoints
from datasel.data import sampler as sampler_lib
from datasel.data import tokenizer as tokenizers
from datasel.methods.prox import examples as examples_lib
from datasel.methods.prox import f1, refiner
from datasel.methods.prox.rows import Encoded, Rows, encode
from datasel.methods.prox.templates import Prompts
from datasel.models.mistral import Mistral
from datasel.step import State

_EPOCHS, _CALIBRATION, _TEST = 'epochs.json', 'calibration.json', 'test.json'


def name(task: str) -> str:
  """Of the stage of a task, and of its folder."""
  return f'refiner-{task}'


def check(section: ml_collections.ConfigDict, task: str, key: str = 'config.prox.refiner') -> None:
  """ValueError for settings that `train` cannot use; the mesh is seen to where the stage is.  key: the section's."""
  for setting in ('epochs', 'batch_size', 'microbatches', 'length', 'max_new_tokens'):
    if section[setting] < 1:
      raise ValueError(f'{key}.{setting} is {section[setting]}; want at least 1')
  if section.validation < 0:
    raise ValueError(f'{key}.validation is {section.validation}; want at least 0, for all')
  if task not in examples_lib.TASKS:
    raise ValueError(f'task {task!r}; want one of {", ".join(examples_lib.TASKS)}')
  try:
    build.optimizer(section.optimizer, section.epochs)
  except ValueError as e:
    raise ValueError(f'{key}.optimizer: {e}') from e


def stage(section: ml_collections.ConfigDict, task: str, model: Mistral, n_examples: int, *, rows: int | None = None,
          n_rows: int | None = None) -> build.Stage:
  """What the training costs.  rows: of a batch, n_rows: of an epoch; by default those of one example each, the most."""
  rows, n_rows = rows or section.batch_size, n_rows or n_examples
  epoch_steps = -(-n_rows // rows)
  return build.Stage(
    name(task), model, objectives.language_model(model.token_nll), steps=section.epochs * epoch_steps, batch_size=rows,
    microbatches=section.microbatches, length=section.length, keep_every=epoch_steps, optimizer=section.optimizer)


def train(run: build.Run, task: str, examples_folder: str | os.PathLike, section: ml_collections.ConfigDict,
          model: Mistral | None = None, *, tokenizer: tokenizers.Tokenizer | None = None,
          init: str | os.PathLike = '') -> pathlib.Path:
  """Trains the refiner of a task, or finishes one that was begun; returns its folder, WORKDIR/refiner-TASK.

  section: epochs; batch_size, examples of a step on average (as many rows as hold so many); microbatches; length,
  tokens of a row and the most of an example; template; max_new_tokens; validation, at most so many examples after each
  epoch (0: all); optimizer (keys as of config.optimizer).
  init: a trained model to start from, whatever `pretrained.find` knows; without one a fresh `model` with `tokenizer`.

  The loss is that of programs and their ends of text, the mean over a batch's.  The epoch of the highest F1 on the
  validation examples is taken: of documents by the likelier program, of chunks as the refiner writes them.
  Raises as `train.fit` does, and ValueError for settings or examples that can't be used, and a folder of another
  training.
  """
  check(section, task)
  source = pretrained.find(init) if init else None
  if source is None and (model is None or tokenizer is None):
    raise ValueError(f'{name(task)}: want a model to start from, or the shape of a fresh one with its tokenizer')
  model, tokenizer = (source.model, source.tokenizer()) if source else (model, tokenizer)
  if tokenizer.vocab_size > model.vocab_size:
    raise ValueError(f'{name(task)}: the tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, the model '
                     f'{model.vocab_size}; want a model of at least as many')
  prompts = Prompts(tokenizer, task, section.template, length=section.length, max_new_tokens=section.max_new_tokens)
  grammar = refiner.grammar_of(prompts, model.vocab_size)
  splits = {}
  for split in examples_lib.SPLITS:
    splits[split] = encode(examples_lib.read(examples_folder, split, task), prompts, grammar)
    logging.info('%s: %d examples of %s, %d of them of longer documents; left out: %s', name(task),
                 len(splits[split]), split, splits[split].truncated, splits[split].left_out)
  for split in ('train', 'validation'):
    if not len(splits[split]):
      raise ValueError(f'{examples_folder} has no {split} example of a {task} that {name(task)} can use (left out: '
                       f'{splits[split].left_out}); want more, or a longer config length')
  whole = _Training(run, task, section, model, prompts, splits, source)
  return whole.finish(processes.from_lead(f'beginning {name(task)}', whole.begin))


class _Training:
  """One training: its program, and what of it is on disk."""

  def __init__(self, run: build.Run, task: str, section: ml_collections.ConfigDict, model: Mistral, prompts: Prompts,
               splits: dict[str, Encoded], source: pretrained.Source | None):
    self.run, self.task, self.section, self.model, self.prompts = run, task, section, model, prompts
    self.splits, self.source = splits, source
    self.stage_name, self.directory = name(task), run.directory / name(task)
    self.rules = build.rules(run.config)
    seed = build.seed_for(run.config, f'{self.stage_name}-rows')
    self.rows = {split: Rows(splits[split], section.length, seed=seed) for split in ('train', 'validation')}
    # As many rows as hold batch_size examples on average, in whole parts for devices and micro-batches.
    parts = sharding.batch_shards(run.mesh, self.rules) * section.microbatches
    wanted = section.batch_size * len(self.rows['train']) / len(splits['train'])
    self.batch_rows = max(1, round(wanted / parts)) * parts
    self.stage = stage(section, task, model, len(splits['train']), rows=self.batch_rows, n_rows=len(self.rows['train']))
    self.epoch_steps = self.stage.keep_every
    self.program = build.stage_program(self.stage, run.config, run.mesh)
    self.nll = evaluate_lib.scorer(model.token_nll, run.mesh, self.rules)

  def begin(self) -> dict:
    """Writes stage.json and the tokenizer, or refuses a folder that holds another training."""
    path, section, prompts = self.directory / 'stage.json', self.section, self.prompts
    identity = {
      'stage': self.stage_name, 'model': dataclasses.asdict(self.model), 'n_params': self.model.n_params,
      'tokenizer': prompts.tokenizer.digest, 'max_length': section.length,
      'init': self.source.name if self.source else '', 'batch_size': self.batch_rows, 'epochs': section.epochs,
      'validation': section.validation, 'steps': self.stage.steps, 'flops': self.stage.flops,
      'optimizer': section.optimizer.to_dict(),
      'refiner': {'task': self.task, 'template': prompts.template, 'length': prompts.length,
                  'max_new_tokens': section.max_new_tokens},
      'examples': {split: {'examples': len(found), 'truncated': found.truncated, 'left_out': found.left_out}
                   for split, found in self.splits.items()},
      'rows': {split: {'rows': len(rows), 'digest': rows.digest} for split, rows in self.rows.items()}}
    identity = json.loads(json.dumps(identity))  # tuples become lists
    if path.exists():
      made = workdir.read_json(path)
      differ = [key for key, value in identity.items() if made.get(key) != value]
      if differ:
        raise ValueError(f'{self.directory} holds another training (other: {", ".join(differ)}); delete it to train '
                         'this one')
      return made
    prompts.tokenizer.save(self.directory / 'tokenizer')
    workdir.write_json(path, identity | {'finished': False})
    return identity

  def finish(self, stated: dict) -> pathlib.Path:
    """Trains, then leaves the best epoch as the folder's model."""
    if stated.get('finished'):
      self.run.progress.skip(self.stage.flops)
      if processes.lead():
        shutil.rmtree(self.directory / 'training', ignore_errors=True)  # left by a kill
      return self.directory
    epochs = self._train()
    best = epochs[_best(epochs) - 1]
    with Checkpoints(self.directory / 'training', keep=2) as checkpoints:
      params = checkpoints.restore_params(self.program.abstract_state.params, best['step'])
    threshold = 0.0
    if self.task == 'document':
      calibrated = f1.calibrate(*self._scores(params, 'validation'))
      threshold = calibrated['threshold']
    tested = self._judged(params, 'test', threshold) if len(self.splits['test']) else {}
    if processes.lead():
      shutil.rmtree(self.directory / 'checkpoints', ignore_errors=True)  # left by a kill
      if self.task == 'document':
        workdir.write_json(self.directory / _CALIBRATION, calibrated)
      workdir.write_json(self.directory / _TEST, tested)
    processes.together(f'finishing {self.stage_name}', lambda: None)
    with Checkpoints(self.directory / 'checkpoints', keep=2) as checkpoints:
      checkpoints.save(0, State(step=jnp.zeros((), jnp.int32), params=params, opt_state=(), aux=()), {})
      checkpoints.wait()
    if processes.lead():
      workdir.write_json(self.directory / 'stage.json', stated | {'best_epoch': _best(epochs), 'finished': True})
      shutil.rmtree(self.directory / 'training')
    return self.directory

  def _train(self) -> list[dict]:
    """Epoch after epoch; what each came to.  Each is a call of `train.fit`, which goes on wherever the last one was."""
    run, config = self.run, self.run.config
    rows = sampler_lib.process_rows(sharding.batch_sharding(run.mesh, self.rules), self.batch_rows)
    sampler = sampler_lib.Sampler(self.rows['train'], 'train', [1.0], self.batch_rows,
                                  seed=build.seed_for(config, self.stage_name), block=config.data.block, rows=rows)
    path = self.directory / _EPOCHS
    epochs = processes.from_lead(f'reading the epochs of {self.stage_name}',
                                 lambda: workdir.read_json(path) if path.exists() else [])
    counted = 0  # steps that the run's progress knows of
    step_flops = self.stage.flops / self.stage.steps
    with (contextlib.closing(sampler_lib.batches(sampler, config.data.prefetch)) as batches,
          Checkpoints(self.directory / 'training', keep=config.train.keep_checkpoints,
                      keep_every=self.epoch_steps) as checkpoints):
      while len(epochs) < self.section.epochs:
        self._write_metrics(epochs)
        run.progress.skip(-counted * step_flops)  # `train.fit` takes off all that is behind its checkpoint
        counted, params = self._epoch(batches, checkpoints, (len(epochs) + 1) * self.epoch_steps, not epochs)
        epochs.append({'step': (len(epochs) + 1) * self.epoch_steps} | self._judged(params, 'validation'))
        if processes.lead():
          workdir.write_json(path, epochs)  # from here on, the epoch is done
        logging.info('%s: epoch %d of %d: validation loss %.4f, F1 %.3f; the best so far is epoch %d', self.stage_name,
                     len(epochs), self.section.epochs, epochs[-1]['loss'], epochs[-1]['f1'], _best(epochs))
    self._write_metrics(epochs)
    run.progress.skip((self.stage.steps - counted) * step_flops)
    return epochs

  def _epoch(self, batches: Any, checkpoints: Checkpoints, last_step: int, first: bool) -> tuple[int, Any]:
    """Trains to `last_step`; the step of the newest checkpoint, and the parameters at `last_step`."""
    run, config, abstract = self.run, self.run.config, self.program.abstract_state.params
    rate = build.learning_rate(self.section.optimizer, self.stage.steps)
    rates = np.asarray(jax.vmap(rate)(np.arange(self.stage.steps)))
    starting = None if self.source is None else lambda: self.source.params(mesh=run.mesh, rules=self.rules)
    state = train_lib.fit(
      self.program, batches, key=jax.random.key(build.seed_for(config, f'init-{self.stage_name}')),
      stage=self.stage_name, total_steps=last_step, checkpoints=checkpoints, writer=run.writer,
      log_every=config.train.log_every, checkpoint_every=config.train.checkpoint_every,
      tokens_per_step=self.batch_rows * self.section.length, flops_per_step=self.stage.flops / self.stage.steps,
      peak_flops=run.peak_flops, progress=run.progress,
      name_examples=lambda batch: self.rows['train'].names(batch['example_B']), initial_params=starting,
      describe=lambda step, values: values | {'learning_rate': rates[step - 1]},
      profile_steps=config.profile_steps if first else 0, profile_directory=run.directory / 'profile')
    newest = int(state.step)
    return newest, state.params if newest == last_step else checkpoints.restore_params(abstract, last_step)

  def _judged(self, params: Any, split: str, threshold: float = 0.0) -> dict:
    """JSON: examples, loss (nats per token of a program), F1 and what goes with it, failures (a share of programs)."""
    if self.task == 'document':
      score_N, wanted_N = self._scores(params, split)
      values = f1.of_documents(score_N >= threshold, wanted_N).values()
    else:
      values = self._chunks(params, split)
    return {'loss': self._loss(params)} | values if split == 'validation' else values

  def _scores(self, params: Any, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Of each document: log p(keep) - log p(drop), and whether it should be kept."""
    chosen, found = self._chosen(split), self.splits[split]
    score_N = self._writer(params).scores([found.prompts[n] for n in chosen])
    return score_N, np.array([found.examples[n].program == 'keep_doc()' for n in chosen])

  def _chunks(self, params: Any, split: str) -> dict:
    found, total, failed = self.splits[split], f1.F1(), dict.fromkeys(f1.FAILURES, 0)
    chosen = [found.examples[n] for n in self._chosen(split)]
    spans = [(one.start, one.start + one.text.count('\n') + 1) for one in chosen]
    written = self._writer(params).programs([found.prompts[n] for n in self._chosen(split)], spans)
    for one, span, (program, ended, _) in zip(chosen, spans, written):
      total += f1.of_chunk(program, one.program, *span)
      for failure in f1.failures(program, one.text, one.start, finished=ended):
        failed[failure] += 1
    exact = sum(program == one.program for one, (program, *_) in zip(chosen, written))
    return total.values() | {'exact': exact / len(chosen), 'failures': {k: n / len(chosen) for k, n in failed.items()}}

  def _writer(self, params: Any) -> refiner.Writer:
    return refiner.Writer(self.model, params, self.prompts, batch_size=self.batch_rows, mesh=self.run.mesh,
                          rules=self.rules)

  def _chosen(self, split: str) -> list[int]:
    """Which examples of a split are looked at: all of the test split, `validation` of the validation split, spread
    evenly, and of documents both kinds."""
    programs = [one.program for one in self.splits[split].examples]
    size = len(programs)
    n = size if split == 'test' else min(size, self.section.validation or size)
    chosen = [i * size // n for i in range(n)]
    if self.task == 'document' and n > 1 and len({programs[i] for i in chosen}) == 1:
      chosen[-1] = next((i for i in range(size) if programs[i] != programs[0]), chosen[-1])
    return chosen

  def _loss(self, params: Any) -> float:
    """Nats per token of the validation programs; filled up with rows that count nothing."""
    rows, total, count = self.rows['validation'], 0.0, 0.0
    mine = sampler_lib.process_rows(sharding.batch_sharding(self.run.mesh, self.rules), self.batch_rows)
    for first in range(0, len(rows), self.batch_rows):
      whole = np.arange(first, first + self.batch_rows)
      full = rows.read('validation', np.zeros(len(whole), np.int32), np.minimum(whole, len(rows) - 1))
      nll_BxL = jax.device_get(self.nll(params, sharding.put(
        self.run.mesh, {key: values[mine] for key, values in full.items()}, self.rules)))
      mask_BxL = full['loss_mask_BxL'] * (whole < len(rows))[:, None]
      total, count = total + float((nll_BxL * mask_BxL).sum(dtype=np.float64)), count + float(mask_BxL.sum())
    return total / count

  def _write_metrics(self, epochs: list[dict]) -> None:
    """A line for each epoch: not twice, and not none, wherever a process before this one was killed."""
    if processes.lead():
      there = {line['step'] for line in metrics.read(self.run.directory, self.stage_name, 'held_out')}
      for epoch in epochs:
        if epoch['step'] not in there:
          values = {key: value for key, value in epoch.items() if key not in ('step', 'failures')}
          failures = {key.replace(' ', '_'): part for key, part in epoch.get('failures', {}).items()}
          self.run.writer.write(self.stage_name, 'held_out', epoch['step'],
                                values | ({'failures': failures} if failures else {}))


def _best(epochs: list[dict]) -> int:
  """Which epoch, from 1, had the highest F1 on the validation examples, the first of equal ones."""
  return int(np.argmax([epoch['f1'] for epoch in epochs])) + 1 if epochs else 0
