"""Decoding: ours, transformers' `generate` in PyTorch on the same weights and batch, and the device's ceiling.

Every contender reads the same prompts and adds the same number of tokens, the likeliest ones; PyTorch only where it is
installed.  The ceiling is the time in which the device, at the speed of a matrix-vector product measured in the same
run, reads the parameters and the cache of keys and values once for each token.
"""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from datasel.bench import timing
from datasel.generate import Generator
from datasel.models.mistral import Mistral
from datasel.models.presets import PRESETS

_OURS, _PEER = 'datasel', 'transformers generate'


def run(*, preset: str = '', batch_size: int = 8, prompt: int = 128, new_tokens: int = 64, repeats: int = 5,
        peer: bool = True) -> dict[str, Any]:
  """Median seconds for the whole batch.  preset has a default by device; prompt and new_tokens are lengths."""
  on_cpu = jax.default_backend() == 'cpu'
  preset = preset or ('regmix_60m' if on_cpu else 'pds_1_7b')
  if preset not in PRESETS:
    raise ValueError(f'unknown preset {preset!r}; known: {", ".join(PRESETS)}')
  # A CPU has no fast bfloat16, for neither contender.
  model = dataclasses.replace(PRESETS[preset], dtype='float32') if on_cpu else PRESETS[preset]
  generator = Generator(model, model.init(jax.random.key(0)), batch_size=batch_size, max_length=prompt + new_tokens)
  prompts = np.random.default_rng(0).integers(0, model.vocab_size, (batch_size, prompt))
  n = 2**13 if on_cpu else 2**15  # a matrix that no cache holds
  matrix = jax.numpy.ones((n, n), model.dtype)
  contenders: dict[str, Callable[[int], Any]] = {'read': timing.repeated(jax.jit(jax.numpy.matmul), matrix, matrix[0])}
  contenders[_OURS] = lambda times: [generator(prompts, max_new_tokens=new_tokens) for _ in range(times)]
  absent = {}
  if peer:
    try:
      contenders[_PEER] = _hugging_face(model, generator.params, prompts, new_tokens)
    except ImportError as e:
      absent[_PEER] = str(e)
  taken = timing.take_turns(contenders, repeats=repeats)
  seconds = {name: statistics.median(taken[name]) for name in contenders}
  bandwidth = matrix.nbytes / seconds.pop('read')
  size = np.dtype(jax.numpy.dtype(model.dtype)).itemsize
  # Of the embedding a token reads a row; where it is the head too, all of it.
  read = model.n_params - (0 if model.tied else model.vocab_size * model.d_model)
  position = 2 * model.n_layers * model.n_kv_heads * model.head_dim
  moved = size * sum(read + batch_size * position * length for length in range(prompt, prompt + new_tokens))
  tokens = batch_size * new_tokens
  return {
    'device': f'{jax.devices()[0].device_kind}, jax {jax.__version__}', 'preset': preset, 'dtype': model.dtype,
    'n_params': model.n_params, 'batch_size': batch_size, 'prompt': prompt, 'new_tokens': new_tokens,
    'bandwidth': bandwidth, 'limit_tokens_per_second': tokens * bandwidth / moved, 'absent': absent,
    'rows': {name: {'seconds': s, 'tokens_per_second': tokens / s, 'of_limit': moved / bandwidth / s,
                    'ratio_to_ours': timing.ratio(taken, name, _OURS)} for name, s in seconds.items()}}


def table(result: dict[str, Any]) -> str:
  lines = [f'{result["device"]}: {result["preset"]}, {result["n_params"]:,} parameters, {result["dtype"]}, '
           f'{result["batch_size"]} prompts of {result["prompt"]} tokens, {result["new_tokens"]} new ones each',
           f'memory is read at {result["bandwidth"] / 1e9:.1f} GB/s here; at most '
           f'{result["limit_tokens_per_second"]:,.0f} tokens/s if only memory counts',
           f'{"":34s}{"seconds":>10s}{"tokens/s":>12s}{"of limit":>10s}{"time, x ours":>14s}']
  lines += [f'{name:34s}{r["seconds"]:10.2f}{r["tokens_per_second"]:12,.1f}{100 * r["of_limit"]:9.1f}%'
            f'{r["ratio_to_ours"]:14.2f}' for name, r in result['rows'].items()]
  return '\n'.join([*lines, *(f'{name}: not here ({why})' for name, why in result['absent'].items())])


def _hugging_face(model: Mistral, params: dict, prompts: np.ndarray, new_tokens: int) -> Callable[[int], Any]:
  import tempfile

  import torch
  import transformers

  from datasel import workdir
  from datasel.models import hf
  with tempfile.TemporaryDirectory() as folder:
    config = hf.to_config(model, max_length=prompts.shape[1] + new_tokens, bos_id=None, eos_id=None, dtype=model.dtype)
    workdir.write_json(f'{folder}/config.json', config)
    hf.save(folder, model, params, dtype=model.dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, model.dtype)).eval()
  device = 'cuda' if jax.default_backend() == 'gpu' else 'cpu'
  theirs, rows = theirs.to(device), torch.tensor(prompts.astype(np.int64), device=device)

  def run(times: int) -> None:
    for _ in range(times):
      theirs.generate(rows, attention_mask=torch.ones_like(rows), max_new_tokens=new_tokens, do_sample=False,
                      eos_token_id=None, pad_token_id=0)
    if device == 'cuda':
      torch.cuda.synchronize()

  return run
