"""Laws of the exact optimal control: projections against brute force, weights against gradient descent by autodiff."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from datasel.methods.pds import exact


def nearest_by_brute_force(x):
  """Of the nearest points on all faces of the simplex, the nearest."""
  best = None
  for n in range(1, len(x) + 1):
    for face in map(list, itertools.combinations(range(len(x)), n)):
      g = np.zeros(len(x))
      g[face] = x[face] - (x[face].sum() - 1) / n
      if (g >= 0).all() and (best is None or np.square(g - x).sum() < np.square(best - x).sum()):
        best = g
  return best


@pytest.mark.parametrize('seed', range(12))
def test_projection_is_the_nearest_point_of_the_simplex(x64, seed):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=rng.integers(1, 9)) * rng.choice([0.1, 1, 10])
  np.testing.assert_allclose(exact.project_simplex(jnp.asarray(x)), nearest_by_brute_force(x), atol=1e-12)


def test_projection_keeps_a_point_of_the_simplex_and_breaks_no_tie(x64):
  inside = jnp.asarray([0.2, 0.3, 0.5, 0.0])
  np.testing.assert_allclose(exact.project_simplex(inside), inside, atol=1e-15)
  np.testing.assert_allclose(exact.project_simplex(jnp.full(5, -3.0)), 0.2, atol=1e-15)


def loss(params, batch):
  return jnp.square(batch['x'] @ params - batch['y'])


def problem():
  """Six examples of one line, two with the wrong sign, and what is to be predicted."""
  rng = np.random.default_rng(0)
  truth = np.array([1.0, -2.0])
  x = rng.normal(size=(8, 2))
  y = x @ truth * np.array([1, 1, 1, 1, 1, 1, -1, -1])
  dev = rng.normal(size=(5, 2))
  return jnp.zeros(2), {'x': x, 'y': y}, {'x': dev, 'y': dev @ truth}


def target(gamma, params, examples, dev, steps=5, rate=0.1):
  total = 0.0
  for _ in range(steps):
    params = params - rate * jax.grad(lambda p: gamma @ loss(p, examples))(params)
    total += loss(params, dev).mean()
  return total


def test_weights_are_projected_gradient_descent_on_the_target(x64):
  params, examples, dev = problem()
  got = exact.optimize_weights(loss, params, examples, dev, learning_rate=(0.1 for _ in range(5)), steps=5, epochs=3,
                               outer_rate=0.05)
  gamma = jnp.full(8, 1 / 8)
  for _ in range(3):
    gamma = exact.project_simplex(gamma - 0.05 * jax.grad(target)(gamma, params, examples, dev))
  np.testing.assert_allclose(got, gamma, rtol=1e-10, atol=1e-12)


def test_examples_that_mislead_lose_their_weight(x64):
  params, examples, dev = problem()
  traces = []
  gamma = exact.optimize_weights(loss, params, examples, dev, learning_rate=0.1, steps=5, epochs=40, outer_rate=0.02,
                                 report=traces.append)
  assert gamma[6:].max() == 0 and abs(gamma.sum() - 1) < 1e-12
  targets = [trace['target'] for trace in traces]
  assert all(b <= a + 1e-12 for a, b in itertools.pairwise(targets)) and targets[-1] < 0.8 * targets[0]
  np.testing.assert_allclose(targets[0], target(jnp.full(8, 1 / 8), params, examples, dev), rtol=1e-12)


def test_bad_input_is_refused():
  params, examples, dev = problem()
  with pytest.raises(ValueError, match='steps 0, epochs 1'):
    exact.optimize_weights(loss, params, examples, dev, learning_rate=0.1, steps=0, epochs=1, outer_rate=1.0)
  with pytest.raises(ValueError, match='outer_rate inf: want at least 1, 1, and a finite number above 0'):
    exact.optimize_weights(loss, params, examples, dev, learning_rate=0.1, steps=1, epochs=1, outer_rate=np.inf)
  with pytest.raises(ValueError, match=r'x_N has shape \(2, 2\)'):
    exact.project_simplex(jnp.zeros((2, 2)))
