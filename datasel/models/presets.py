"""The decoders of the papers, by name: `PRESETS['pds_160m']` is a `Mistral`.

The papers' parameter counts are asserted in tests/models/presets_test.py.  DoReMi's text gives no norm, positions or
activation ("vanilla decoder-only Transformer"): its rows here have RMSNorm, RoPE and GELU.
"""

import dataclasses
from typing import Any

from datasel.models.mistral import Mistral


def _pds(n_layers: int, d_model: int, n_heads: int, head_dim: int, d_ff: int) -> Mistral:
  """PDS (arXiv 2410.07064): Mistral architecture, Mistral's tokenizer, untied, full attention over 1,024 tokens."""
  return Mistral(vocab_size=32_000, n_layers=n_layers, d_model=d_model, n_heads=n_heads, n_kv_heads=n_heads,
                 head_dim=head_dim, d_ff=d_ff, dtype='bfloat16')


def _doremi(n_layers: int, n_heads: int, head_dim: int, d_model: int, d_ff: int) -> Mistral:
  """DoReMi (arXiv 2305.10429, Table 9): tied, one GELU layer, SentencePiece vocabulary of 256,000."""
  return Mistral(vocab_size=256_000, n_layers=n_layers, d_model=d_model, n_heads=n_heads, n_kv_heads=n_heads,
                 head_dim=head_dim, d_ff=d_ff, gated=False, activation='gelu_tanh', tied=True, dtype='bfloat16',
                 loss_chunk=32)


def _regmix(n_layers: int, n_heads: int, d_model: int, d_ff: int) -> Mistral:
  """RegMix (arXiv 2407.01492): TinyLlama shapes, GPT-NeoX tokenizer, untied, initialised as lit-gpt does."""
  return Mistral(vocab_size=50_432, n_layers=n_layers, d_model=d_model, n_heads=n_heads, n_kv_heads=n_heads,
                 head_dim=d_model // n_heads, d_ff=d_ff, dtype='bfloat16',
                 init_std=(2 / 5 / d_model) ** 0.5, residual_init_std=d_model**-0.5 / n_layers)


def _llama(vocab_size: int, n_layers: int, d_model: int, n_heads: int, n_kv_heads: int, d_ff: int,
           **more: Any) -> Mistral:
  """A published Llama, under the shape that its config.json states."""
  return Mistral(vocab_size=vocab_size, n_layers=n_layers, d_model=d_model, n_heads=n_heads, n_kv_heads=n_kv_heads,
                 head_dim=d_model // n_heads, d_ff=d_ff, dtype='bfloat16', **more)


def _tlm(d_model: int, n_heads: int, n_kv_heads: int, d_ff: int) -> Mistral:
  """ProX (arXiv 2409.17115): Llama-2's architecture and tokenizer, initialised as lit-gpt does; the refiners are of the
  smallest shape.  The numbers of key heads are those of its repository."""
  return _llama(32_000, 24, d_model, n_heads, n_kv_heads, d_ff, init_std=(2 / 5 / d_model) ** 0.5,
                residual_init_std=d_model**-0.5 / 24)


_DOREMI_REPOSITORY = Mistral(
  # The released 120M proxy: GPT-2 shape with a quarter of each head rotating, vocabulary padded to a multiple of 8.
  # The original has LayerNorm with biases; everything here is bias-free RMSNorm.
  vocab_size=50_280, n_layers=12, d_model=768, n_heads=12, n_kv_heads=12, head_dim=64, d_ff=3072, gated=False,
  activation='gelu_tanh', tied=True, rope_fraction=0.25, dtype='bfloat16')

_LAPTOP = Mistral(vocab_size=4096, n_layers=4, d_model=128, n_heads=4, n_kv_heads=2, head_dim=32, d_ff=384, tied=True,
                  init_std=0.05)  # narrow models learn faster from a wider start than 0.02

PRESETS: dict[str, Mistral] = {
  'pds_160m': _pds(12, 768, 12, 64, 3072),
  'pds_470m': _pds(24, 1024, 16, 64, 4096),
  'pds_1b': _pds(24, 1536, 16, 96, 6144),
  'pds_1_7b': _pds(24, 2048, 16, 128, 8192),
  'doremi_70m': _doremi(3, 4, 64, 256, 1024),
  'doremi_150m': _doremi(6, 8, 64, 512, 2048),
  'doremi_280m': _doremi(12, 12, 64, 768, 3072),
  'doremi_510m': _doremi(12, 16, 64, 1024, 8192),
  'doremi_760m': _doremi(12, 20, 64, 1280, 8192),
  'doremi_1b': _doremi(16, 32, 64, 2048, 8192),
  'doremi_8b': _doremi(32, 32, 128, 4096, 24_576),
  'doremi_120m_repository': _DOREMI_REPOSITORY,
  'regmix_1m': _regmix(2, 8, 256, 512),
  'regmix_60m': _regmix(10, 8, 768, 1536),
  'regmix_1b': _regmix(22, 16, 2048, 5632),
  'smollm2_135m': _llama(49_152, 30, 576, 9, 3, 1536, tied=True, rope_theta=1e5),
  'smollm2_360m': _llama(49_152, 32, 960, 15, 5, 2560, tied=True, rope_theta=1e5),
  'smollm2_1_7b': _llama(49_152, 24, 2048, 32, 32, 8192, tied=True, rope_theta=1.3e5),
  'tinyllama_1_1b': _llama(32_000, 22, 2048, 32, 4, 5632),
  'llama2_7b': _llama(32_000, 32, 4096, 32, 32, 11_008),
  'llama2_13b': _llama(32_000, 40, 5120, 40, 40, 13_824),
  'mistral_7b': _llama(32_000, 32, 4096, 32, 8, 14_336, window=4096),
  'tlm_xs': _tlm(1280, 16, 1, 2048),
  'tlm_s': _tlm(1536, 24, 2, 4864),
  'tlm_m': _tlm(2048, 32, 32, 8192),
  'laptop': _LAPTOP,
  'laptop_small': dataclasses.replace(_LAPTOP, n_layers=2),
  'smoke': dataclasses.replace(_LAPTOP, vocab_size=1024, n_layers=2, d_model=64, n_heads=2, n_kv_heads=1, d_ff=128),
}
