"""Decoding after a long prefix: an anchor cache against all keys and values, at one batch and in the same memory.

Tokens are added to caches that hold a prefix of which segments, of random lengths, are closed by anchors: what is timed
is the compiled step of `generate`, for a batch of rows.  'no cache' reads the prefix anew for a token of one row.
The allocated bytes of the caches stand beside the times; a ratio against no cache says nothing of anchors.
"""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from datasel import decode
from datasel.bench import timing
from datasel.data.anchors import Rule
from datasel.generate import Generator
from datasel.methods.anllm.cache import Counts, Room
from datasel.methods.anllm.generate import AnchorGenerator
from datasel.models.presets import PRESETS

_FULL, _SAME_BATCH, _SAME_MEMORY, _NONE = 'full cache', 'anchor cache', 'anchor cache, same memory', 'no cache'
_ANCHOR = 1  # the token that closes a segment


def run(*, preset: str = '', batch_size: int = 8, prefix: int = 0, segment: int = 25, steps: int = 16,
        repeats: int = 5) -> dict[str, Any]:
  """Median seconds of a step.  preset and prefix (tokens) have defaults by device; segment: mean tokens of one."""
  on_cpu = jax.default_backend() == 'cpu'
  preset, prefix = preset or ('laptop' if on_cpu else 'smollm2_1_7b'), prefix or (4096 if on_cpu else 16_384)
  if preset not in PRESETS:
    raise ValueError(f'unknown preset {preset!r}; known: {", ".join(PRESETS)}')
  if segment < 2:
    raise ValueError(f'segment {segment}: want a mean of at least 2 tokens')
  # A CPU has no fast bfloat16, for neither contender.
  model = dataclasses.replace(PRESETS[preset], window=None, **({'dtype': 'float32'} if on_cpu else {}))
  full = Generator(model, model.init(jax.random.key(0)), batch_size=batch_size, max_length=prefix + steps)
  anchored = AnchorGenerator(dataclasses.replace(model, anchors=Rule((_ANCHOR,))), full.params, batch_size=batch_size,
                             max_length=prefix + steps)
  tokens = np.random.default_rng(0).integers(2, model.vocab_size, prefix).astype(np.int32)
  tokens[np.random.default_rng(1).random(prefix) < 1 / segment] = _ANCHOR
  _, counts = anchored.decoder.follow(Counts.zeros(1), tokens[None], np.arange(prefix, dtype=np.int32)[None])
  most = lambda n: 1 << (int(n.max()) + steps - 1).bit_length()
  rooms = {_SAME_BATCH: Room(0, most(counts.anchors_B), most(counts.window_B))}
  rooms[_SAME_MEMORY] = rooms[_SAME_BATCH]
  full_bytes = Room(0, 0, prefix + steps).nbytes(model, batch_size)
  rows = {_FULL: batch_size, _SAME_BATCH: batch_size,
          _SAME_MEMORY: full_bytes // rooms[_SAME_BATCH].nbytes(model, 1), _NONE: 1}
  allocated = {_FULL: full_bytes, _NONE: 0} | {name: room.nbytes(model, rows[name]) for name, room in rooms.items()}

  contenders = {_FULL: _steps(full, model.empty_cache(batch_size, prefix + steps), lambda cache: cache, rows[_FULL],
                              prefix, steps)}
  for name, room in rooms.items():
    held = Counts(*(np.repeat(count, rows[name]) for count in counts))
    begun = lambda cache, held=held: dataclasses.replace(cache, counts=held)
    contenders[name] = _steps(anchored, anchored.decoder.empty(rows[name], room), begun, rows[name], prefix, steps)
  length_B = np.array([prefix], np.int32)
  once = lambda: decode.read(full.params, tokens[None], length_B, length=prefix, program=full._program())[0]
  contenders[_NONE] = lambda times: [jax.block_until_ready(once()) for _ in range(times)]
  taken = timing.take_turns(contenders, repeats=repeats)
  # A turn is so many steps, but for the one without a cache.
  per_step = {name: [s / (1 if name == _NONE else steps) for s in taken[name]] for name in contenders}
  return {
    'device': f'{jax.devices()[0].device_kind}, jax {jax.__version__}', 'preset': preset, 'dtype': model.dtype,
    'n_params': model.n_params, 'prefix': prefix, 'live': int(counts.live_B[0]), 'steps': steps,
    'segment': float(prefix / max(1, counts.anchors_B[0])),
    'rows': {name: {'batch_size': rows[name], 'seconds': statistics.median(per_step[name]),
                    'tokens_per_second': rows[name] / statistics.median(per_step[name]),
                    'allocated_bytes': allocated[name],
                    'ratio_to_full': rows[name] / batch_size / timing.ratio(per_step, name, _FULL)}
             for name in contenders}}


def table(result: dict[str, Any]) -> str:
  lines = [f'{result["device"]}: {result["preset"]}, {result["n_params"]:,} parameters, {result["dtype"]}; after a '
           f'prefix of {result["prefix"]:,} tokens, of which {result["live"]:,} stay '
           f'(segments of {result["segment"]:.1f} tokens), {result["steps"]} steps at a time',
           f'{"":28s}{"rows":>6s}{"ms a step":>12s}{"tokens/s":>12s}{"x full cache":>14s}{"cache, MiB":>12s}']
  return '\n'.join(lines + [
    f'{name:28s}{r["batch_size"]:6d}{1e3 * r["seconds"]:12.1f}{r["tokens_per_second"]:12,.1f}'
    f'{r["ratio_to_full"]:14.2f}{r["allocated_bytes"] / 2**20:12,.1f}' for name, r in result['rows'].items()])


def _steps(generator: Generator, cache: Any, begun: Callable[[Any], Any], rows: int, prefix: int,
           steps: int) -> Callable[[int], None]:
  """So many steps of all rows after the prefix, each time in the same cache: what it holds changes nothing of the time.
  """
  program = generator._program()
  knobs = {'temperature': np.float32(1), 'top_p': np.float32(1), 'eos_E': np.zeros(0, np.int32),
           'max_new_tokens': np.int32(2 * steps), 'key': jax.random.key(0)}
  no, yes, zero = np.zeros(rows, bool), np.ones(rows, bool), np.zeros(rows, np.int32)

  def run(times: int) -> None:
    nonlocal cache
    for _ in range(times):
      state = {'carry': (), 'index_B': zero, 'position_B': np.full(rows, prefix, np.int32), 'count_B': zero,
               'token_B': zero + 2, 'running_B': yes, 'eos_B': no, 'dead_B': no}
      state = jax.tree.map(jnp.asarray, state) | {'cache': begun(cache)}
      state, outcome = decode.add(generator.params, state, yes, knobs, None, steps=steps, program=program)
      cache = state['cache']
      assert np.asarray(outcome['count_B']).tolist() == [steps] * rows
      assert np.isfinite(outcome['logprobs_BxN']).all()

  return run
