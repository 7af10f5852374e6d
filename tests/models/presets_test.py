"""The papers' tables of sizes, as parameter counts."""

import dataclasses

import jax
import numpy as np
import pytest

from datasel.models.presets import PRESETS

# Millions of parameters: PDS's table; DoReMi's Table 9 with 256,000 tokens tied; RegMix's configuration files; the
# hub's counts of the safetensors of SmolLM2, TinyLlama, Llama-2 and Mistral; ProX's own shapes.
PUBLISHED = {
  'pds_160m': 162.4, 'pds_470m': 468.2, 'pds_1b': 1004, 'pds_1_7b': 1742,
  'doremi_70m': 68, 'doremi_150m': 150, 'doremi_280m': 281, 'doremi_510m': 514, 'doremi_760m': 658, 'doremi_1b': 1330,
  'doremi_8b': 9600, 'doremi_120m_repository': 124,
  'regmix_1m': 27.1, 'regmix_60m': 136, 'regmix_1b': 1340,
  'smollm2_135m': 134.515, 'smollm2_360m': 361.821, 'smollm2_1_7b': 1711.38, 'tinyllama_1_1b': 1100.05,
  'llama2_7b': 6738.42, 'llama2_13b': 13015.9, 'mistral_7b': 7241.73,
  'tlm_xs': 354.285, 'tlm_s': 758.982, 'tlm_m': 1741.79,
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_parameter_count_is_the_papers(name):
  digits = len(f'{PUBLISHED[name]:g}'.replace('.', '').rstrip('0'))
  assert float(f'{PRESETS[name].n_params / 1e6:.{digits}g}') == pytest.approx(PUBLISHED[name], rel=0.005)


def test_every_paper_preset_is_in_the_table():
  assert {name for name in PRESETS if not name.startswith(('laptop', 'smoke'))} == set(PUBLISHED)


def test_count_by_hand():
  m = PRESETS['regmix_1m']
  layer = 4 * 256 * 256 + 3 * 256 * 512 + 2 * 256
  assert m.n_params == 2 * layer + 2 * 50_432 * 256 + 256
  assert m.flops_per_token(2048) == 6 * (m.n_params - 50_432 * 256) + 12 * 2 * 256 * 1024


@pytest.mark.parametrize('window', [1, 7, 63, 64, 100])
def test_attention_is_counted_at_the_mean_of_what_is_visible(window):
  """To half a position, in any window; without one, and in one of the whole length, at half the length."""
  m, length = dataclasses.replace(PRESETS['smoke'], window=window), 64
  counted = (m.flops_per_token(length) - m.flops_per_token(0)) / (12 * m.n_layers * m.n_heads * m.head_dim)
  exact = np.minimum(np.arange(length) + 1, window).mean()
  assert counted == pytest.approx(exact - min(window, length) / (2 * length))
  if window >= length:
    assert counted == length / 2
    assert m.flops_per_token(length) == dataclasses.replace(m, window=None).flops_per_token(length)


@pytest.mark.parametrize('name', ['pds_160m', 'doremi_280m', 'regmix_60m'])
def test_every_parameter_names_its_axes(name):
  m = PRESETS[name]
  named = jax.tree.map(lambda a, axes: len(axes) == a.ndim, m.abstract(), m.logical_axes())
  assert all(jax.tree.leaves(named))
