"""What Group DRO is for, on a corpus whose domains are known: excess loss finds what is left to learn.

Three domains over one alphabet: `easy` repeats a token, `hard` follows a fixed rule of the two tokens before (learnt,
but slowly), `noise` is random.  Noise has by far the highest loss, log V for ever, but the reference has it too.
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
V, L, B, STEPS = 32, 24, 48, 300
MODEL = Mistral(vocab_size=V, n_layers=2, d_model=32, n_heads=4, n_kv_heads=4, head_dim=8, d_ff=64, loss_chunk=L)
TX = optim.adamw(optim.schedule('cosine', peak=3e-3, end=3e-4, warmup_steps=20, total_steps=STEPS),
                 b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.0, clip=1.0)


def sample(key, domain_B):
  """easy: a constant row; hard: t_i = permutation[t_{i-1} + t_{i-2} mod V]; noise: uniform tokens."""
  permutation = jnp.asarray(np.random.default_rng(0).permutation(V))
  first_key, second_key, noise_key = jax.random.split(key, 3)
  first_B, second_B = (jax.random.randint(k, (B,), 0, V) for k in (first_key, second_key))
  follow = lambda pair, _: ((pair[1], permutation[(pair[0] + pair[1]) % V]), pair[0])
  hard_BxL = jax.lax.scan(follow, (first_B, second_B), None, L + 1)[1].T
  easy_BxL = jnp.broadcast_to(first_B[:, None], (B, L + 1))
  tokens = jnp.stack([easy_BxL, hard_BxL, jax.random.randint(noise_key, (B, L + 1), 0, V)])[domain_B, jnp.arange(B)]
  return {'tokens_BxL': tokens[:, :-1], 'targets_BxL': tokens[:, 1:], 'loss_mask_BxL': jnp.ones((B, L)),
          'domain_B': domain_B}


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
  state = init_state(jax.jit(MODEL.init)(jax.random.key(0)), TX)
  return train(objectives.language_model(MODEL.token_nll), state, seed=1).params


@pytest.mark.parametrize('reduction', domain_weights.LOSS_REDUCTIONS)
def test_learnable_domain_rises_and_noise_does_not_win(reduction):
  objective = domain_weights.group_dro(MODEL.token_nll, 3, loss_reduction=reduction,
                                       sampling_M=jnp.full(3, 1 / 3))
  aux = domain_weights.initial_aux(3, vocab_size=V)
  state = train(objective, init_state(MODEL.init(jax.random.key(7)), TX, aux), reference=reference_params(), seed=2)
  weights = dict(zip(DOMAINS, np.asarray(domain_weights.average(state.aux)).tolist()))
  assert weights['hard'] > max(weights['easy'], 1 / 3), weights
  assert weights['noise'] < min(weights['hard'], 1 / 3), weights


def test_plain_loss_would_choose_noise():
  """The ablation that shows what the reference is for ('hardest' in the paper): without it noise takes over."""
  objective = domain_weights.group_dro(MODEL.token_nll, 3)
  without = lambda params, aux, batch: objective(params, aux, batch | {'reference_nll_BxL': jnp.zeros((B, L))})
  aux = domain_weights.initial_aux(3, vocab_size=V)
  state = train(without, init_state(MODEL.init(jax.random.key(7)), TX, aux), seed=2)
  weights = dict(zip(DOMAINS, np.asarray(domain_weights.average(state.aux)).tolist()))
  assert weights['noise'] == max(weights.values()) and weights['noise'] > 0.8, weights
