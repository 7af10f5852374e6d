"""Training with an anchor mask: our attention, the dense mask that the authors train with, and plain causal attention.

The same decoder, batch, loss, clipping and AdamW; the text is random, with a period every so many tokens.  `limit` is
how many times the FLOPs of ours a step has, by the formula of `bench step` with the pairs of tokens that its attention
computes at least: the ratio that the mask brings where all else is as fast.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from datasel import objectives, optim
from datasel.attention.shapes import anchor_pairs
from datasel.bench import timing
from datasel.data.anchors import Rule
from datasel.models.mistral import Mistral
from datasel.models.presets import PRESETS
from datasel.step import init_state, train_step

_OURS, _DENSE, _CAUSAL = 'anchors', 'anchors, dense mask', 'causal'
_PERIOD = 0


def run(*, preset: str = '', length: int = 8192, batch_size: int = 0, every: int = 24, min_length: int = 8,
        dense: bool = True, repeats: int = 0) -> dict[str, Any]:
  """Median seconds per step.  preset, batch_size and repeats have defaults by device; every: tokens of a segment, on
  average; min_length: at least; --no-dense where L x L scores do not fit."""
  on_cpu = jax.default_backend() == 'cpu'
  preset = preset or ('smoke' if on_cpu else 'pds_160m')
  if preset not in PRESETS:
    raise ValueError(f'unknown preset {preset!r}; known: {", ".join(PRESETS)}')
  if not 1 <= min_length <= every or length < 1:
    raise ValueError(f'segments of {every} tokens on average and at least {min_length}, rows of {length}; want 1 <= '
                     'min_length <= every, and a length of at least 1')
  batch_size, repeats = batch_size or (1 if on_cpu else 4), repeats or (1 if on_cpu else 5)
  causal = dataclasses.replace(PRESETS[preset], remat='attention')
  if on_cpu:  # which has no fast bfloat16
    causal = dataclasses.replace(causal, dtype='float32')
  ours = dataclasses.replace(causal, anchors=Rule((_PERIOD,), min_length))
  models = {_OURS: ours, _CAUSAL: causal}
  if dense:
    models[_DENSE] = dataclasses.replace(ours, attention='reference')
  tokens = _text(batch_size, length, causal.vocab_size, every - min_length + 1)
  segments = ours.mask(jnp.asarray(tokens[:, :-1])).anchors.segments
  pairs = {_OURS: anchor_pairs(segments), _CAUSAL: batch_size * length * (length + 1) // 2,
           _DENSE: batch_size * length**2}
  contenders, temporaries = {}, {}
  for name, model in models.items():
    contenders[name], temporaries[name] = _steps(model, tokens)
  taken = timing.take_turns(contenders, repeats=repeats)
  least = _flops(ours, batch_size * length, pairs[_OURS])
  return {
    'device': f'{jax.devices()[0].device_kind}, jax {jax.__version__}', 'preset': preset, 'dtype': causal.dtype,
    'n_params': causal.n_params, 'batch_size': batch_size, 'length': length, 'min_length': min_length,
    'anchor_share': float(np.mean(segments.kept_BxL)),
    'rows': {name: {'seconds': statistics.median(s), 'tokens_per_second': batch_size * length / statistics.median(s),
                    'ratio_to_ours': timing.ratio(taken, name, _OURS), 'pairs': pairs[name],
                    'limit': _flops(ours, batch_size * length, pairs[name]) / least,
                    'temporary_bytes': temporaries[name]}
             for name, s in taken.items()}}


def table(result: dict[str, Any]) -> str:
  lines = [f'{result["device"]}: {result["preset"]}, {result["n_params"]:,} parameters, {result["dtype"]}, batch '
           f'{result["batch_size"]} x {result["length"]}, {100 * result["anchor_share"]:.1f}% of the tokens anchors',
           f'{"":24s}{"ms/step":>10s}{"tokens/s":>12s}{"time, x ours":>14s}{"limit":>8s}{"pairs a token":>15s}'
           f'{"temporaries":>14s}']
  tokens = result['batch_size'] * result['length']
  return '\n'.join(lines + [
    f'{name:24s}{1e3 * r["seconds"]:10.1f}{r["tokens_per_second"]:12,.0f}{r["ratio_to_ours"]:14.2f}{r["limit"]:8.2f}'
    f'{r["pairs"] / tokens:15,.0f}{r["temporary_bytes"] / 2**20:10,.0f} MiB' for name, r in result['rows'].items()])


def _text(rows: int, length: int, vocab_size: int, every: int) -> np.ndarray:
  """Random tokens, rows x (length + 1), one in `every` a period."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, vocab_size, (rows, length + 1))
  return np.where(rng.random(tokens.shape) < 1 / every, _PERIOD, tokens).astype(np.int32)


def _flops(model: Mistral, tokens: int, pairs: int) -> float:
  """Of one step: `flops_per_token`, which counts no attention where there are anchors, and this one's."""
  return model.flops_per_token(1) * tokens + 12.0 * model.n_layers * model.n_heads * model.head_dim * pairs


def _steps(model: Mistral, tokens: np.ndarray) -> tuple[Callable[[int], Any], int]:
  """A contender, and the bytes of temporaries of its step as compiled."""
  tx = optim.adamw(1e-3, b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.01, clip=1.0)
  batch = {'tokens_BxL': jnp.asarray(tokens[:, :-1]), 'targets_BxL': jnp.asarray(tokens[:, 1:]),
           'loss_mask_BxL': jnp.ones(tokens[:, 1:].shape, jnp.float32)}
  step = jax.jit(functools.partial(train_step, objective=objectives.language_model(model.token_nll), tx=tx),
                 donate_argnums=0)
  state = [jax.jit(lambda key: init_state(model.init(key), tx))(jax.random.key(0))]
  compiled = step.lower(state[0], batch).compile()

  def run(times: int) -> None:
    for _ in range(times):
      state[0], metrics = compiled(state[0], batch)
    jax.block_until_ready((state[0], metrics))

  return run, compiled.memory_analysis().temp_size_in_bytes
