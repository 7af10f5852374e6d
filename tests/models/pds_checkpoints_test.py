"""Random models of the very configs of the authors' checkpoints (Data-Selection/PDS-* and BSL-*), read and evaluated.

The 1.7B one takes minutes and 12 GB of memory: DATASEL_LARGE_TESTS=1 asks for it.
"""

import dataclasses
import os

import jax
import numpy as np
import pytest
import torch
import transformers

from datasel.models import hf, published
from datasel.models.presets import PRESETS
from datasel.models.tensor_files import Safetensors

NAMES = ['Data-Selection/BSL-160M'] + ['Data-Selection/PDS-1.7B'] * bool(os.environ.get('DATASEL_LARGE_TESTS'))


@pytest.mark.parametrize('name', NAMES)
def test_a_random_model_of_a_published_config_gives_transformers_logits(name, tmp_path):
  preset = PRESETS[published.find(name).preset]
  config = transformers.MistralConfig(
    vocab_size=preset.vocab_size, hidden_size=preset.d_model, intermediate_size=preset.d_ff,
    num_hidden_layers=preset.n_layers, num_attention_heads=preset.n_heads, num_key_value_heads=preset.n_heads,
    max_position_embeddings=1024, sliding_window=None, rms_norm_eps=1e-5, dtype='bfloat16')
  with torch.device('meta'):
    theirs = transformers.AutoModelForCausalLM.from_config(config)
  theirs = theirs.to(torch.bfloat16).to_empty(device='cpu')
  drawn = 0.02 * torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
  for n, parameter in enumerate(theirs.parameters()):  # the same numbers again and again, from another place each
    values = (drawn.roll(7919 * n) + (parameter.ndim == 1)).to(torch.bfloat16)
    for part in parameter.data.view(-1).split(len(values)):
      part.copy_(values[:len(part)])
  theirs.save_pretrained(tmp_path)
  del theirs
  tokens = np.random.default_rng(0).integers(0, preset.vocab_size, (2, 24), dtype=np.int32)
  with torch.no_grad():
    wanted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(
      torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
  model = hf.from_config(hf.read_config(tmp_path))
  assert dataclasses.replace(model, dtype=preset.dtype) == preset
  params = hf.load(Safetensors(tmp_path), model, dtype='bfloat16')
  got = jax.jit(dataclasses.replace(model, dtype='float32').apply)(params, tokens)
  np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
