"""Laws of the data scorer: what it computes of hidden states, and what it is trained on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from datasel import objectives, sharding, step
from datasel.methods.pds.scorer import Scorer, objective, targets
from datasel.models.mistral import Mistral

MODEL = Mistral(vocab_size=50, n_layers=2, d_model=8, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=16, remat='none')


def batch(seed=0, rows=4, length=10):
  """Rows of two or three documents and some padding; one row is full."""
  rng = np.random.default_rng(seed)
  segment = np.zeros((rows, length), np.int32)
  position = np.zeros((rows, length), np.int32)
  for row in range(rows):
    lengths = [3, 2, 4] if row % 2 else [6, length - 6 if row == 0 else 2]
    n = sum(lengths)
    segment[row, :n] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    position[row, :n] = np.concatenate([np.arange(x) for x in lengths])
  tokens = np.where(segment > 0, rng.integers(0, 50, (rows, length)), 0).astype(np.int32)
  return {'tokens_BxL': tokens, 'segment_BxL': segment, 'position_BxL': position,
          'target_B': rng.normal(size=rows).astype(np.float32)}


@pytest.fixture(scope='module')
def states():
  """(parameters, hidden states of each document of each row of `batch()`, read alone)."""
  rows, params = batch(), jax.jit(Scorer(MODEL).init)(jax.random.key(0))
  documents = [(b, rows['segment_BxL'][b] == s) for b in range(4) for s in range(1, rows['segment_BxL'][b].max() + 1)]
  alone = np.zeros((len(documents), 10), np.int32)
  for n, (b, of_it) in enumerate(documents):
    alone[n, :of_it.sum()] = rows['tokens_BxL'][b][of_it]
  hidden = np.asarray(jax.jit(MODEL.hidden)(params['backbone'], alone), np.float64)  # causal: what follows is not seen
  return params, [[hidden[n, :of_it.sum()] for n, (b, of_it) in enumerate(documents) if b == row] for row in range(4)]


POOLED_BY_HAND = {
  'mean': lambda documents: np.concatenate(documents).mean(0),
  'last': lambda documents: np.mean([states[-1] for states in documents], 0),
  'first': lambda documents: np.mean([states[0] for states in documents], 0),
}


@pytest.mark.parametrize('pooling', POOLED_BY_HAND)
def test_a_score_is_the_head_on_the_pooled_states_of_documents_that_do_not_see_each_other(pooling, states):
  params, of_rows = states
  params = params | {'head': params['head'] | {'bias': jnp.float32(0.25)}}
  kernel = np.asarray(params['head']['kernel'], np.float64)
  got = jax.jit(Scorer(MODEL, pooling).apply)(params, batch())
  assert got.dtype == jnp.float32
  want = [POOLED_BY_HAND[pooling](documents) @ kernel + 0.25 for documents in of_rows]
  np.testing.assert_allclose(got, want, atol=1e-6)  # rounding of the hidden states


def test_padding_changes_nothing():
  scorer, rows = Scorer(dataclasses.replace(MODEL, dtype='bfloat16')), batch()
  params, apply = jax.jit(scorer.init)(jax.random.key(1)), jax.jit(scorer.apply)
  padding = rows['segment_BxL'] == 0
  other = rows | {'tokens_BxL': np.where(padding, 7, rows['tokens_BxL']),
                  'position_BxL': np.where(padding, 3, rows['position_BxL'])}
  longer = {name: np.pad(x, ((0, 0), (0, 6))) for name, x in rows.items() if name != 'target_B'}
  want = apply(params, rows)
  np.testing.assert_array_equal(apply(params, other), want)
  longer['target_B'] = rows['target_B']
  np.testing.assert_allclose(apply(params, longer), want, atol=1e-6)  # sums in another order


def test_every_parameter_has_a_gradient(states):
  """A fit changes the backbone, not the head alone."""
  grads = jax.jit(jax.grad(lambda p: objective(Scorer(MODEL).apply)(p, (), batch())[0]))(states[0])
  assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize('tied', [False, True])
def test_a_backbone_is_taken_as_it_is_without_its_output_head(tied):
  model = dataclasses.replace(MODEL, tied=tied)
  scorer, trained = Scorer(model), jax.jit(model.init)(jax.random.key(3))
  params = scorer.init(jax.random.key(4), trained)
  assert 'head' not in params['backbone']
  jax.tree.map(np.testing.assert_array_equal, params['backbone'], {k: v for k, v in trained.items() if k != 'head'})
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, scorer.abstract())
  assert jax.tree.structure(params) == jax.tree.structure(scorer.logical_axes(), is_leaf=lambda x: isinstance(x, tuple))
  assert scorer.n_params == sum(x.size for x in jax.tree.leaves(params))
  want = model.flops_per_token(64) - 6 * model.vocab_size * model.d_model
  assert scorer.flops_per_token(64) == pytest.approx(want, rel=1e-12)


def test_a_backbone_of_another_shape_is_refused_by_name():
  with pytest.raises(ValueError, match=r"\['blocks'\]\['down'\]\['kernel'\]: \(2, 24, 8\), want \(2, 16, 8\)"):
    Scorer(MODEL).init(jax.random.key(0), dataclasses.replace(MODEL, d_ff=24).abstract())


def test_targets_are_z_scores_within_three_deviations():
  gamma = np.random.default_rng(0).standard_t(2, 1000) * 1e-4 + 5
  got = targets(gamma)
  np.testing.assert_allclose(got, np.clip(stats.zscore(gamma), -3, 3), atol=1e-6)
  assert got.dtype == np.float32 and got.max() == 3 and got.min() == -3


@pytest.mark.parametrize('gamma', [np.full(9, 0.1), np.array([1.0, np.nan, 2.0]), np.zeros((2, 2)), np.zeros(0)])
def test_scores_that_teach_nothing_are_refused(gamma):
  with pytest.raises(ValueError, match='all equal|not finite'):
    targets(gamma)


def test_the_rank_loss_is_that_of_all_pairs_one_by_one():
  rng = np.random.default_rng(1)
  score, target = rng.normal(size=7).astype(np.float32), rng.normal(size=7).astype(np.float32)
  target[3] = target[5]  # a tie: no pair
  each = [np.log1p(np.exp(score[j] - score[i])) for i in range(7) for j in range(7) if target[i] > target[j]]
  assert len(each) == 20
  loss, (_, values) = objective(lambda params, rows: params, 'rank')(score, (), {'target_B': target})
  np.testing.assert_allclose(loss, np.mean(each), rtol=1e-6)
  np.testing.assert_allclose(values['mse'], np.mean((score - target) ** 2), rtol=1e-6)


def test_both_losses_have_the_same_gradient_in_microbatches():
  """Squared errors add up; ranks need the whole batch, and say so."""
  rng = np.random.default_rng(2)
  params = {'w': rng.normal(size=3).astype(np.float32)}
  rows = {'x_BxD': rng.normal(size=(8, 3)).astype(np.float32), 'target_B': rng.normal(size=8).astype(np.float32)}
  score = lambda params, rows: rows['x_BxD'] @ params['w']
  tx = optax.sgd(1.0)

  def updated(score, loss, n):
    state, values = step.train_step(step.init_state(params, tx), rows, objective=objective(score, loss), tx=tx,
                                    microbatches=n)
    return np.append(state.params['w'], values['mse'])

  for loss, inside, outside in (('mse', 1, 4), ('rank', 4, 1)):
    parts = updated(objectives.in_microbatches(score, inside), loss, outside)
    np.testing.assert_allclose(parts, updated(score, loss, 1), rtol=1e-5)  # sums in another order
  with pytest.raises(ValueError, match='split inside it instead'):
    updated(score, 'rank', 4)


def test_unknown_names_are_refused():
  with pytest.raises(ValueError, match="unknown pooling 'max'"):
    Scorer(MODEL, 'max')
  with pytest.raises(ValueError, match="unknown loss 'hinge'"):
    objective(None, 'hinge')


def test_scores_do_not_depend_on_the_mesh():
  scorer, rows = Scorer(dataclasses.replace(MODEL, n_kv_heads=2)), batch()
  params = jax.jit(scorer.init)(jax.random.key(6))
  mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2)

  def score(params, rows):
    with sharding.use(mesh):
      return scorer.apply(params, rows)

  places = sharding.tree_shardings(mesh, scorer.abstract(), scorer.logical_axes())
  got = jax.jit(score, in_shardings=(places, sharding.batch_sharding(mesh)))(params, rows)
  np.testing.assert_allclose(got, jax.jit(scorer.apply)(params, rows), atol=1e-6)
