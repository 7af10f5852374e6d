"""ProX's refinement: programs decoded under the grammar and without it, and programs carried out.

Decoding: the same random model reads the same chunks and writes the same number of tokens, once free and once under
the grammar; the ratio is what the grammar costs.  Carrying out: the executor, the authors' algorithm, and the ceiling:
splitting a document into lines and joining them again.
"""

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from datasel.bench import timing
from datasel.data import tokenizer as tokenizers
from datasel.generate import Generator
from datasel.methods.prox import executor, grammar, vocabulary
from datasel.models.mistral import Mistral
from datasel.models.presets import PRESETS

_LINES = 6  # what the program that is carried out speaks of
_FREE, _BOUND = 'no grammar', 'grammar'
_OURS, _THEIRS, _LIMIT = 'executor', "executor, the authors' algorithm", 'lines split and joined'


def run(*, preset: str = '', batch_size: int = 8, prompt: int = 128, new_tokens: int = 64, documents: int = 200,
        lines: int = 60, tokenizer: str = '', repeats: int = 5) -> dict[str, Any]:
  """Medians.  preset has a default by device; prompt and new_tokens are lengths; lines: of each document; tokenizer: a
  folder or file, by default a vocabulary of bytes and pairs as large as the preset's."""
  if documents < 1 or lines < _LINES:
    raise ValueError(f'{documents} documents of {lines} lines; want at least 1, of at least {_LINES}')
  on_cpu = jax.default_backend() == 'cpu'
  preset = preset or ('regmix_1m' if on_cpu else 'tlm_xs')
  if preset not in PRESETS:
    raise ValueError(f'unknown preset {preset!r}; known: {", ".join(PRESETS)}')
  model = PRESETS[preset]
  decoded = _decoding(model, _vocabulary(model, tokenizer), batch_size, prompt, new_tokens, repeats)
  carried = _carrying_out(documents, lines, repeats)
  return {'device': f'{jax.devices()[0].device_kind}, jax {jax.__version__}', 'preset': preset, 'dtype': model.dtype,
          'n_params': model.n_params, 'batch_size': batch_size, 'prompt': prompt, 'new_tokens': new_tokens,
          'documents': documents, 'lines': lines, **decoded, **carried}


def table(result: dict[str, Any]) -> str:
  built = result['grammar']
  rows = [f'{result["device"]}: {result["preset"]}, {result["n_params"]:,} parameters, {result["dtype"]}, '
          f'{result["batch_size"]} chunks of {result["prompt"]} tokens, programs of {result["new_tokens"]} tokens',
          f'the grammar: {built["states"]} states, {built["bytes"] / 1e6:.1f} MB, made in {built["seconds"]:.2f} s for '
          f'{built["vocabulary"]:,} tokens',
          f'{"":34s}{"tokens/s":>12s}{"chunks/s":>12s}{"time, x no grammar":>20s}']
  rows += [f'{name:34s}{r["tokens_per_second"]:12,.0f}{r["chunks_per_second"]:12,.2f}{r["ratio"]:20.3f}'
           for name, r in result['decoding'].items()]
  rows += [f'{result["documents"]} documents of {result["lines"]} lines, a program of 4 calls each, one core',
           f'{"":34s}{"documents/s":>12s}{"MB/s":>12s}{"time, x executor":>20s}']
  rows += [f'{name:34s}{r["documents_per_second"]:12,.0f}{r["bytes_per_second"] / 1e6:12,.1f}{r["ratio"]:20.3f}'
           for name, r in result['carrying_out'].items()]
  return '\n'.join(rows)


def _decoding(model: Mistral, bytes_V: list[bytes | None], batch_size: int, prompt: int, new_tokens: int,
              repeats: int) -> dict[str, Any]:
  began, eos_id = time.perf_counter(), len(bytes_V) - 1
  bound = grammar.build(bytes_V, 'chunk', eos_id=eos_id, vocab_size=model.vocab_size, max_new_tokens=1 << 14)
  seconds = time.perf_counter() - began
  facts = {'states': len(bound.next_SxV), 'bytes': bound.next_SxV.nbytes, 'seconds': seconds,
           'vocabulary': len(bytes_V)}
  params = jax.jit(model.init)(jax.random.key(0))
  options = {'batch_size': batch_size, 'max_length': prompt + new_tokens}
  held = jax.device_put(bound).of_chunks([(0, 400)] * batch_size)
  # Neither is told of an end of text, so that both write as many tokens.
  generators = {_FREE: Generator(model, params, **options)}
  generators[_BOUND] = Generator(model, generators[_FREE].params, constraint=held, **options)
  prompts = np.random.default_rng(0).integers(0, model.vocab_size, (batch_size, prompt))
  repeated = lambda own: lambda times: [own(prompts, max_new_tokens=new_tokens) for _ in range(times)]
  taken = timing.take_turns({name: repeated(own) for name, own in generators.items()}, repeats=repeats)
  medians = {name: statistics.median(taken[name]) for name in taken}
  return {'grammar': facts, 'decoding': {
    name: {'seconds': s, 'tokens_per_second': batch_size * new_tokens / s, 'chunks_per_second': batch_size / s,
           'ratio': timing.ratio(taken, name, _FREE)} for name, s in medians.items()}}


def _carrying_out(documents: int, lines: int, repeats: int) -> dict[str, Any]:
  rng = random.Random(0)
  words = ['of', 'garden', 'the', 'patience', 'water', '(deep)', 'sun,', 'http://x.org/a?b=1']
  texts = ['\n'.join(' '.join(rng.choices(words, k=rng.randint(3, 25))) for _ in range(lines))
           for _ in range(documents)]
  program = (f'remove_lines(start=0, end=2)\nremove_lines(start={lines - 3}, end={lines - 2})\n'
             'normalize(source_str="http://x.org/a", target_str="")\nnormalize(source_str="garden", target_str="yard")')
  contenders: dict[str, Callable[[str], Any]] = {
    _OURS: lambda text: executor.execute(text, program),
    _THEIRS: lambda text: executor.execute(text, program, compat=True),
    _LIMIT: lambda text: '\n'.join(text.split('\n'))}
  over_all = lambda one: lambda times: [one(text) for _ in range(times) for text in texts]
  taken = timing.take_turns({name: over_all(one) for name, one in contenders.items()}, repeats=repeats)
  size = sum(len(text.encode()) for text in texts)
  medians = {name: statistics.median(taken[name]) for name in taken}
  return {'carrying_out': {
    name: {'seconds': s, 'documents_per_second': documents / s, 'bytes_per_second': size / s,
           'ratio': timing.ratio(taken, name, _OURS)} for name, s in medians.items()}}


def _vocabulary(model: Mistral, tokenizer: str) -> list[bytes | None]:
  """What the model's tokens write; the last one is end of text."""
  if tokenizer:
    found = vocabulary.token_bytes(tokenizers.load(tokenizer))
    if len(found) > model.vocab_size:
      raise ValueError(f'the tokenizer {tokenizer} has {len(found)} tokens, the model {model.vocab_size}; choose '
                       'another preset')
    return [*found[:model.vocab_size - 1], None]
  pairs = (bytes([a, b]) for a in range(256) for b in range(256))
  singles = [bytes([b]) for b in range(256)]
  return [*singles, *(next(pairs) for _ in range(min(model.vocab_size - 257, 1 << 16))), None]
