"""What Group DRO is for, on a corpus whose domains are known: excess loss finds what is left to learn.

Four domains over one alphabet: `easy` repeats a token, `copy_a` and `copy_b` follow fixed random permutations (hard at
first, then learnt), `noise` is random.  The reference is trained where `copy_b` is rare, so at any loss that it reached
the proxy can do better there or worse; noise costs both models log V, and clipping leaves it little excess.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from datasel import objectives, optim
from datasel.methods.doremi import domain_weights
from datasel.models.mistral import Mistral
from datasel.step import init_state, train_step

DOMAINS = ('easy', 'hard', 'noise')
V, L, B, STEPS = 32, 24, 24, 150
MODEL = Mistral(vocab_size=V, n_layers=1, d_model=32, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=64, loss_chunk=L)
TX = optim.adamw(1e-2, b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.0, clip=1.0)


def sample(key, domain_B):
  """easy: a constant row; hard: a walk along a fixed permutation of the alphabet; noise: uniform tokens."""
  permutation = jnp.asarray(np.random.default_rng(0).permutation(V))
  start_key, noise_key = jax.random.split(key)
  start_B = jax.random.randint(start_key, (B,), 0, V)
  walk = jax.lax.scan(lambda t, _: (permutation[t], t), start_B, None, L + 1)[1].T
  choices = jnp.stack([jnp.broadcast_to(start_B[:, None], (B, L + 1)), walk, jax.random.randint(noise_key, (B, L + 1), 0, V)])
  tokens = choices[domain_B, jnp.arange(B)]
  return {'tokens_BxL': tokens[:, :-1], 'targets_BxL': tokens[:, 1:], 'loss_mask_BxL': jnp.ones((B, L)), 'domain_B': domain_B}


def train(objective, state, *, reference=None, seed):
  """Returns the final state.  Batches have a third of each domain."""
  def body(state, key):
    batch = sample(key, jnp.arange(B, dtype=jnp.int32) % 3)
    if reference is not None:
      batch['reference_nll_BxL'] = MODEL.token_nll(reference, batch)
    return train_step(state, batch, objective=objective, tx=TX)[0], None
  keys = jax.random.split(jax.random.key(seed), STEPS)
  return jax.jit(lambda s: jax.lax.scan(body, s, keys)[0])(state)


@functools.cache
def reference_params():
  state = init_state(MODEL.init(jax.random.key(0)), TX)
  return train(objectives.language_model(MODEL.token_nll), state, seed=1).params


@pytest.mark.parametrize('reduction', domain_weights.LOSS_REDUCTIONS)
def test_learnable_domain_rises_and_noise_does_not_win(reduction):
  objective = domain_weights.group_dro(MODEL.token_nll, 3, step_size=0.3, loss_reduction=reduction,
                                       sampling_M=jnp.full(3, 1 / 3))
  aux = domain_weights.initial_aux(3, vocab_size=V)
  state = train(objective, init_state(MODEL.init(jax.random.key(7)), TX, aux), reference=reference_params(), seed=2)
  weights = dict(zip(DOMAINS, np.asarray(domain_weights.average(state.aux)).tolist()))
  assert weights['hard'] == max(weights.values()), weights
  assert weights['noise'] < 1 / 3, weights


def test_plain_loss_would_choose_noise():
  """The ablation that shows what the reference is for ('hardest' in the paper): without it noise takes over."""
  objective = domain_weights.group_dro(MODEL.token_nll, 3, step_size=0.3)
  without = lambda params, aux, batch: objective(params, aux, batch | {'reference_nll_BxL': jnp.zeros((B, L))})
  aux = domain_weights.initial_aux(3, vocab_size=V)
  state = train(without, init_state(MODEL.init(jax.random.key(7)), TX, aux), seed=2)
  weights = dict(zip(DOMAINS, np.asarray(domain_weights.average(state.aux)).tolist()))
  assert weights['noise'] == max(weights.values()) and weights['noise'] > 0.8, weights
