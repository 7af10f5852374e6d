"""The train step: ours, Hugging Face's Mistral in PyTorch on the same work, and the device's ceiling, in one run.

Same decoder (its parameter count is compared), batch, loss, clipping and AdamW; PyTorch only where it is installed.
`normalised MFU` is FLOPs by the formula (6 per matrix parameter and token, and attention's) over the matrix product
measured in the same run; `MFU` is over the data sheet's peak.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from datasel import hardware, objectives, optim
from datasel.bench import timing
from datasel.models.mistral import Mistral
from datasel.models.presets import PRESETS
from datasel.step import init_state, train_step

_OURS, _PEER = 'datasel', 'transformers MistralForCausalLM'
_ADAMW = dict(b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.01)
_RATE, _CLIP = 1e-3, 1.0


def run(*, preset: str = '', batch_size: int = 0, length: int = 0, microbatches: int = 1, remat: str = '',
        attention: str = 'auto', repeats: int = 5, peer: bool = True) -> dict[str, Any]:
  """Median seconds per step.  preset, batch_size, length and remat have defaults by device."""
  on_cpu = jax.default_backend() == 'cpu'
  preset = preset or ('laptop' if on_cpu else 'pds_160m')
  if preset not in PRESETS:
    raise ValueError(f'unknown preset {preset!r}; known: {", ".join(PRESETS)}')
  batch_size, length = batch_size or (16 if on_cpu else 64), length or (256 if on_cpu else 1024)
  model = dataclasses.replace(PRESETS[preset], attention=attention, remat=remat or 'attention')
  if on_cpu:  # which has no fast bfloat16, for neither contender
    model = dataclasses.replace(model, dtype='float32')
  tokens = np.random.default_rng(0).integers(0, model.vocab_size, (batch_size, length + 1)).astype(np.int32)
  product, flops, _, _ = timing.limits(model.dtype)
  contenders = {_OURS: _ours(model, tokens, microbatches), 'matrix product': product}
  absent = {}
  if peer:
    try:
      contenders[_PEER] = _hugging_face(model, tokens, microbatches)
    except ImportError as e:
      absent[_PEER] = str(e)
  taken = timing.take_turns(contenders, repeats=repeats)
  seconds = {name: statistics.median(taken[name]) for name in contenders}
  ceiling = flops / seconds.pop('matrix product')
  peak, source = hardware.peak_flops_per_device()
  work = model.flops_per_token(length) * batch_size * length
  return {
    'device': f'{jax.devices()[0].device_kind}, jax {jax.__version__}', 'preset': preset, 'dtype': model.dtype,
    'n_params': model.n_params, 'batch_size': batch_size, 'length': length, 'microbatches': microbatches,
    'remat': model.remat, 'attention': attention, 'product_flops': ceiling, 'peak_flops': peak, 'peak_source': source,
    'absent': absent,
    'rows': {name: {'seconds': s, 'tokens_per_second': batch_size * length / s, 'mfu': work / s / peak,
                    'normalised_mfu': work / s / ceiling, 'ratio_to_ours': timing.ratio(taken, name, _OURS)}
             for name, s in seconds.items()}}


def table(result: dict[str, Any]) -> str:
  lines = [f'{result["device"]}: {result["preset"]}, {result["n_params"]:,} parameters, {result["dtype"]}, batch '
           f'{result["batch_size"]} x {result["length"]} in {result["microbatches"]} part(s), remat {result["remat"]}',
           f'measured product {result["product_flops"] / 1e12:.3f} TFLOP/s; peak {result["peak_flops"] / 1e12:.3f}'
           f' ({result["peak_source"]})',
           f'{"":34s}{"ms/step":>10s}{"tokens/s":>12s}{"MFU":>7s}{"normalised":>12s}{"time, x ours":>14s}']
  lines += [f'{name:34s}{1e3 * r["seconds"]:10.1f}{r["tokens_per_second"]:12,.0f}{100 * r["mfu"]:6.1f}%'
            f'{100 * r["normalised_mfu"]:11.1f}%{r["ratio_to_ours"]:14.2f}' for name, r in result['rows'].items()]
  return '\n'.join([*lines, *(f'{name}: not here ({why})' for name, why in result['absent'].items())])


def _ours(model: Mistral, tokens: np.ndarray, microbatches: int) -> Callable[[int], Any]:
  tx = optim.adamw(_RATE, **_ADAMW, clip=_CLIP)
  batch = {'tokens_BxL': jnp.asarray(tokens[:, :-1]), 'targets_BxL': jnp.asarray(tokens[:, 1:]),
           'loss_mask_BxL': jnp.ones(tokens[:, 1:].shape, jnp.float32)}
  step = jax.jit(functools.partial(train_step, objective=objectives.language_model(model.token_nll), tx=tx,
                                   microbatches=microbatches), donate_argnums=0)
  state = [jax.jit(lambda key: init_state(model.init(key), tx))(jax.random.key(0))]

  def run(times: int) -> None:
    for _ in range(times):
      state[0], metrics = step(state[0], batch)
    jax.block_until_ready((state[0], metrics))

  return run


def _hugging_face(model: Mistral, tokens: np.ndarray, microbatches: int) -> Callable[[int], Any]:
  import torch
  import transformers
  if not model.gated or model.rope_fraction != 1:
    raise ImportError("the peer has no such layers: choose a preset with SwiGLU and full rotary positions")
  device = 'cuda' if jax.default_backend() == 'gpu' else 'cpu'
  config = transformers.MistralConfig(
    vocab_size=model.vocab_size, hidden_size=model.d_model, intermediate_size=model.d_ff, head_dim=model.head_dim,
    num_hidden_layers=model.n_layers, num_attention_heads=model.n_heads, num_key_value_heads=model.n_kv_heads,
    rms_norm_eps=model.norm_eps, tie_word_embeddings=model.tied, sliding_window=model.window,
    attn_implementation='sdpa', use_cache=False)
  torch.manual_seed(0)
  theirs = transformers.MistralForCausalLM(config).to(device).train()
  n_params = sum(p.numel() for p in theirs.parameters())
  if n_params != model.n_params:
    raise ValueError(f'the peer has {n_params:,} parameters, ours {model.n_params:,}: not the same work')
  optimizer = torch.optim.AdamW(theirs.parameters(), lr=_RATE, betas=(_ADAMW['b1'], _ADAMW['b2']), eps=_ADAMW['eps'],
                                weight_decay=_ADAMW['weight_decay'], fused=True)
  parts = torch.tensor(tokens.astype(np.int64), device=device).chunk(microbatches)
  half = model.dtype == 'bfloat16'

  def run(times: int) -> None:
    for _ in range(times):
      for part in parts:
        with torch.autocast(device, torch.bfloat16, enabled=half):
          logits = theirs(input_ids=part[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten())
        (loss / len(parts)).backward()
      torch.nn.utils.clip_grad_norm_(theirs.parameters(), _CLIP)
      optimizer.step()
      optimizer.zero_grad(set_to_none=True)
    if device == 'cuda':
      torch.cuda.synchronize()

  return run
