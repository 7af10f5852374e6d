"""Losses are means over tokens, whatever the masks, weights and domains; by loops and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from datasel import objectives

B, L, V = 6, 5, 7


def table_nll(params, batch):
  """A model that is a table: its next-token logits depend on the token alone."""
  logp_BxLxV = jax.nn.log_softmax(params, -1)[batch['tokens_BxL']]
  return -jnp.take_along_axis(logp_BxLxV, batch['targets_BxL'][..., None], -1)[..., 0]


def make_batch(seed=0):
  r = np.random.default_rng(seed)
  return {'tokens_BxL': jnp.asarray(r.integers(0, V, (B, L))), 'targets_BxL': jnp.asarray(r.integers(0, V, (B, L))),
          'loss_mask_BxL': jnp.asarray(r.random((B, L)) < np.linspace(0.1, 1, B)[:, None], jnp.float32),
          'domain_B': jnp.asarray([2, 0, 2, 2, 0, 0], jnp.int32)}


PARAMS = jnp.asarray(np.random.default_rng(9).normal(size=(V, V)), jnp.float32)


def counted(batch):
  """(row, position, nll) of each target that counts, in Python."""
  p = np.asarray(PARAMS, np.float64)
  for b, j in zip(*np.nonzero(np.asarray(batch['loss_mask_BxL']))):
    logits = p[batch['tokens_BxL'][b, j]]
    yield int(b), int(j), float(np.log(np.exp(logits).sum()) - logits[batch['targets_BxL'][b, j]])


@pytest.mark.parametrize('weights', [None, [1, 0, 0.5, 2, 1, 3]])
def test_language_model_loss_is_the_weighted_mean_over_tokens(weights):
  batch = make_batch()
  if weights:
    batch['weights_B'] = jnp.asarray(weights, jnp.float32)
  of = lambda b: weights[b] if weights else 1
  total = sum(of(b) for b, _, _ in counted(batch))
  loss, (aux, metrics) = objectives.language_model(table_nll)(PARAMS, 'anything', batch)
  assert float(loss) == pytest.approx(sum(of(b) * nll for b, _, nll in counted(batch)) / total, rel=1e-6)
  assert float(metrics['weight']) == pytest.approx(total, rel=1e-6)
  assert aux == 'anything'


def test_loss_of_nothing_is_zero_with_zero_gradient():
  batch = make_batch() | {'loss_mask_BxL': jnp.zeros((B, L))}
  loss, gradient = jax.value_and_grad(lambda p: objectives.language_model(table_nll)(p, (), batch)[0])(PARAMS)
  assert float(loss) == 0 and not gradient.any()


def test_weighted_mean_does_not_know_the_scale_of_its_weights():
  value, weight = jnp.asarray([1.0, 2.0, 4.0]), jnp.asarray([1.0, 0.0, 3.0])
  for scale in (1.0, 1e-20, 1e20):
    assert float(objectives.weighted_mean(value, scale * weight)) == pytest.approx(3.25, rel=1e-6)


def test_domain_sums_by_loops():
  batch = make_batch()
  sums, counts = objectives.domain_sums(table_nll(PARAMS, batch), batch['loss_mask_BxL'], batch['domain_B'], 4)
  want_sums, want_counts = np.zeros(4), np.zeros(4)
  for b, _, nll in counted(batch):
    want_sums[batch['domain_B'][b]] += nll
    want_counts[batch['domain_B'][b]] += 1
  np.testing.assert_allclose(sums, want_sums, rtol=1e-6)
  np.testing.assert_array_equal(counts, want_counts)
  assert sums[1] == counts[1] == sums[3] == counts[3] == 0
  assert sums.dtype == counts.dtype == jnp.float32


@pytest.mark.parametrize('n', [1, 2, 3, 6])
def test_microbatches_keep_every_value_in_its_place(n):
  batch = make_batch()
  got = objectives.in_microbatches(table_nll, n)(PARAMS, batch)
  np.testing.assert_allclose(got, table_nll(PARAMS, batch), rtol=1e-6)


def test_microbatches_must_divide_the_batch():
  with pytest.raises(ValueError, match='4 micro-batches do not divide the batch of .6. rows'):
    objectives.in_microbatches(table_nll, 4)(PARAMS, make_batch())
