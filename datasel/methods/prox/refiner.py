"""The refiner: a document model and a chunk model behind `refining.Refiner`.

A folder of a model is a stage that `sft` leaves, or any other that `pretrained.find` knows, such as the published
refiners in the Hugging Face layout.  Of its own, `sft` adds to stage.json how a text is put to the model, and
calibration.json with the score from which a document is kept.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from datasel import pretrained, sharding, workdir
from datasel.data.tokenizer import Tokenizer
from datasel.generate import Generator
from datasel.methods.prox import chunks, grammar
from datasel.methods.prox.chunks import Chunk
from datasel.methods.prox.refining import Decision, Written
from datasel.methods.prox.templates import DECISIONS, MAX_NEW_TOKENS, Prompt, Prompts
from datasel.models.mistral import Mistral

LENGTH = 2048  # tokens of a prompt and its program, for a model that does not say


class Writer:
  """One model that writes the programs of one task.

  model, params: as `Generator` takes them.  The grammar's tables are put on the devices once.
  """

  def __init__(self, model: Mistral, params: Any, prompts: Prompts, *, batch_size: int = 8, constrained: bool = True,
               mesh: jax.sharding.Mesh | None = None, rules: sharding.Rules = sharding.RULES):
    self.model, self.prompts = model, prompts
    tokenizer, place = prompts.tokenizer, None if mesh is None else sharding.replicated(mesh)
    self._options = {'mesh': mesh, 'rules': rules, 'batch_size': batch_size, 'eos_ids': [tokenizer.eos_id],
                     'max_length': prompts.length}
    self._grammar = jax.device_put(grammar_of(prompts, model.vocab_size), place) if constrained else None
    self._generator = Generator(model, params, **self._options)
    self._answers = prompts.answers(DECISIONS) if prompts.task == 'document' else []

  @property
  def flops_per_token(self) -> float:
    """To read or to write one token: twice the parameters of matrices, attention left out."""
    return self.model.flops_per_token(0) / 3

  def scores(self, prompts: Sequence[Prompt]) -> np.ndarray:
    """float64: log p(keep_doc()) - log p(drop_doc()) of each document, both to their end of text."""
    found = self._generator.score([prompt.ids for prompt in prompts], [self._answers] * len(prompts))
    drop_N, keep_N = (np.array([row[n].sum(dtype=np.float64) for row in found]) for n in range(2))
    return keep_N - drop_N

  def programs(self, prompts: Sequence[Prompt], spans: Sequence[tuple[int, int]]) -> list[tuple[str, bool, int]]:
    """(program, whether it surely came to its end by itself, tokens generated), by greedy decoding.

    spans: each prompt's lines, stop not included; of a document any.  Under the grammar a program that runs into the
    limit of tokens is led to an end: it is not cut off, and whether it would have ended there is not known.
    """
    held = None if self._grammar is None else self._grammar.of_chunks(spans)
    generator = Generator(self.model, self._generator.params, constraint=held, **self._options)
    most, results = self.prompts.max_new_tokens, []
    found = generator([prompt.ids for prompt in prompts], max_new_tokens=most)
    for one, (_, stop) in zip(found, spans, strict=True):
      # Where the shortest end had to be begun, at the latest.
      free = most if held is None else most - held.longest - 2 * len(str(stop))
      ended = one.finished == 'eos' and (self.prompts.task == 'document' or len(one.tokens) < free)
      results.append((self.prompts.program(one.tokens), ended, len(one.tokens) + (one.finished == 'eos')))
    return results


class Refiner:
  """A `refining.Refiner`; `load` reads one from folders.

  threshold: a document is kept from this score on.  by_score: compare the two programs' probabilities after one
  reading; False: let the model write one of them.  max_tokens: of a chunk, by default 1500 or what there is room for.
  """

  def __init__(self, document: Writer | None, chunk: Writer | None, *, name: str, fingerprint: str,
               threshold: float = 0.0, by_score: bool = True, max_tokens: int | None = None):
    self.name, self.fingerprint = name, fingerprint
    self.stages = tuple(stage for stage, writer in (('document', document), ('chunk', chunk)) if writer)
    self.threshold, self._by_score, self._document, self._chunk = threshold, by_score, document, chunk
    room = chunk.prompts.max_tokens if chunk else chunks.MAX_TOKENS
    self.max_tokens = min(chunks.MAX_TOKENS, room) if max_tokens is None else max_tokens
    if not 1 <= self.max_tokens <= room:
      raise ValueError(f'max_tokens of a chunk is {max_tokens}; want 1 to {room}, what the model has room for')
    self.flops_per_token = {
      stage: writer.flops_per_token for stage, writer in (('document', document), ('chunk', chunk)) if writer}

  @classmethod
  def load(cls, document: str | os.PathLike | None = None, chunk: str | os.PathLike | None = None, *,
           template: str | None = None, threshold: float | None = None, by_score: bool = True,
           constrained: bool = True, max_tokens: int | None = None, batch_size: int = 8, dtype: str = 'float32',
           mesh: jax.sharding.Mesh | None = None, rules: sharding.Rules = sharding.RULES) -> 'Refiner':
    """From the folders of one model or two.

    template, threshold: by default what the folder says, else 'plain' and 0.  constrained: write by the grammar; False
    for what a model would write by itself.  batch_size: prompts at a time.  dtype: of the parameters.
    ValueError for no folder, one without a model or tokenizer that can be read, and one of the other task.
    """
    if document is None and chunk is None:
      raise ValueError('a refiner needs a document model or a chunk model; name the folder of one')
    writers, facts = {}, {}
    for task, folder in (('document', document), ('chunk', chunk)):
      if folder is None:
        continue
      source = pretrained.find(folder)
      stated = stated_of(pathlib.Path(folder))
      if stated.get('task', task) != task:
        raise ValueError(f'{folder} is the model of {stated["task"]}s; want one that was trained on {task}s')
      prompts = Prompts(
        source.tokenizer(), task, template or stated.get('template', 'plain'),
        length=min(source.max_length, stated.get('length', LENGTH)),
        max_new_tokens=stated.get('max_new_tokens', MAX_NEW_TOKENS))
      params = source.params(mesh=mesh, rules=rules, dtype=dtype)
      writers[task] = Writer(source.model, params, prompts, batch_size=batch_size, constrained=constrained, mesh=mesh,
                             rules=rules)
      facts[task] = {'weights': weights_digest(params), 'model': dataclasses.asdict(source.model),
                     **_described(prompts)}
      if task == 'document' and threshold is None:
        threshold = stated.get('threshold')
    threshold = 0.0 if threshold is None else float(threshold)
    options = {'threshold': threshold, 'by_score': by_score, 'constrained': constrained, 'max_tokens': max_tokens}
    return cls(writers.get('document'), writers.get('chunk'),
               name='refiner ' + ' + '.join(str(folder) for folder in (document, chunk) if folder is not None),
               fingerprint=workdir.digest([facts, options]), threshold=threshold, by_score=by_score,
               max_tokens=max_tokens)

  def count_tokens(self, lines: list[str]) -> Sequence[int]:
    """Of each numbered line with its line break, for the chunk model."""
    writer = self._chunk or self._document
    return writer.prompts.count_tokens(lines)

  def decide(self, texts: Sequence[str]) -> list[Decision]:
    """drop_doc() or keep_doc() for each text, by its beginning where it is longer than the model reads."""
    if self._document is None:
      raise ValueError(f'{self.name} has no document model')
    prompts = self._document.prompts.documents(texts)
    if not self._by_score:
      written = self._document.programs(prompts, [(0, 1)] * len(prompts))
      return [Decision(program, truncated=prompt.truncated, tokens=len(prompt.ids) + tokens)
              for prompt, (program, _, tokens) in zip(prompts, written)]
    added = sum(map(len, self._document.prompts.answers(DECISIONS)))
    return [Decision(DECISIONS[int(score >= self.threshold)], float(score), '', prompt.truncated,
                     len(prompt.ids) + added)
            for prompt, score in zip(prompts, self._document.scores(prompts))]

  def write(self, chunks: Sequence[Chunk]) -> list[Written]:
    """A program for each chunk; keep_chunk() for a skipped one, and for one that is longer than the model reads."""
    if self._chunk is None:
      raise ValueError(f'{self.name} has no chunk model')
    results = [Written('keep_chunk()', 'skipped')] * len(chunks)
    asked = [n for n, chunk in enumerate(chunks) if not chunk.skipped]
    prompts = self._chunk.prompts.chunks([chunks[n].text for n in asked], [chunks[n].start for n in asked])
    fit = [(n, prompt) for n, prompt in zip(asked, prompts) if prompt.tokens <= self._chunk.prompts.max_tokens]
    spans = [(chunks[n].start, chunks[n].stop) for n, _ in fit]
    for (n, prompt), (program, ended, tokens) in zip(fit, self._chunk.programs([prompt for _, prompt in fit], spans)):
      results[n] = Written(program, 'eos' if ended else 'length', tokens, len(prompt.ids))
    return results


def grammar_of(prompts: Prompts, vocab_size: int) -> grammar.Grammar:
  """The grammar of a task's answers, on the host."""
  return grammar.build(prompts.vocabulary.bytes_V, prompts.task, eos_id=prompts.tokenizer.eos_id,
                       vocab_size=vocab_size, lead=prompts.lead, max_new_tokens=prompts.max_new_tokens)


def stated_of(folder: pathlib.Path) -> dict:
  """What `sft` says of its model in `folder`: task, template, length, max_new_tokens, threshold; {} of another's."""
  stated: dict = {}
  if (folder / 'stage.json').is_file():
    stated = workdir.read_json(folder / 'stage.json').get('refiner', {})
  if (folder / 'calibration.json').is_file():
    stated = stated | {'threshold': workdir.read_json(folder / 'calibration.json')['threshold']}
  return stated


def weights_digest(params: Any) -> str:
  """sha256 (hex) of the parameters' names, shapes, dtypes and bytes, wherever they came from."""
  found = hashlib.sha256()
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    found.update(f'{jax.tree_util.keystr(path)} {x.dtype} {x.shape}'.encode())
    found.update(np.ascontiguousarray(jax.device_get(x)).view(np.uint8).tobytes())
  return found.hexdigest()


def _described(prompts: Prompts) -> dict:
  tokenizer: Tokenizer = prompts.tokenizer
  return {'tokenizer': tokenizer.digest, 'template': prompts.template, 'length': prompts.length,
          'max_new_tokens': prompts.max_new_tokens}
