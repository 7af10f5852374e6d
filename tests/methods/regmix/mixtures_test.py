"""Laws of the mixtures that proxies are trained on: the paper's distribution, caps, the grid, coverage."""

import numpy as np
import pytest
from scipy import integrate, stats

from datasel.methods.regmix import mixtures

PRIOR_5 = np.array([0.7, 0.2, 0.07, 0.02, 0.01])
PILE_17 = np.array([0.11328527, 0.07960865, 0.00391349, 0.1853759, 0.05108136, 0.01596293, 0.10175077, 0.00370752,
                    0.06652935, 0.00175077, 0.02708548, 0.23686921, 0.01184346, 0.00792997, 0.00803296, 0.03882595,
                    0.04644696])
KINDS = ['paper', 'stratified', 'space_filling']


def one_by_one(prior_M, n, *, usage, minimum=2e-4):
  """The definition as it reads, with numpy's own Dirichlet: candidates, caps, small weights, grid, choice."""
  rng = np.random.default_rng(7)
  p = prior_M ** 0.5 / np.sum(prior_M ** 0.5)
  rows = set()
  for strength in rng.choice(np.logspace(np.log10(0.1), np.log10(5), 15), 100 * n):
    w = rng.dirichlet(p * strength)
    if (w <= np.minimum(prior_M * usage, 1)).all():
      w = np.where(w < minimum, 0, w)
      rows.add(tuple(np.rint(w / w.sum() / minimum).astype(int)))
  return np.array(sorted(rows))[rng.choice(len(rows), n, replace=False)] * minimum


@pytest.mark.parametrize('usage', [100.0, 5.0])
def test_the_paper_design_has_the_distribution_of_the_definition(usage):
  n = 1000
  want = one_by_one(PRIOR_5, n, usage=usage)
  got = mixtures.design('paper', PRIOR_5, n, seed=1, upper_M=mixtures.caps(PRIOR_5, usage=usage))
  for a, b in zip([*want.T, want.max(-1), (want > 0).sum(-1)], [*got.T, got.max(-1), (got > 0).sum(-1)]):
    assert stats.ks_2samp(a, b, method='asymp').pvalue > 1e-3


def test_at_a_large_strength_a_mixture_is_the_tempered_prior():
  row_M = mixtures.design('paper', PRIOR_5 * 30, 1, seed=0, strengths=[1e12], grid=1e-3)[0]
  np.testing.assert_allclose(row_M, np.sqrt(PRIOR_5) / np.sqrt(PRIOR_5).sum(), atol=1e-3)
  row_M = mixtures.design('paper', PRIOR_5, 1, seed=0, strengths=[1e12], grid=1e-3, temperature=1.0)[0]
  np.testing.assert_allclose(row_M, PRIOR_5, atol=1e-3)


@pytest.mark.parametrize('prior_M, most, want_M', [
  ([0.5, 0.445, 0.055], 1, [0.5, 0.5, 0]),  # 0.055 is below the grid of 0.1; 5.29 and 4.71 of 10 are left
  ([0.38, 0.37, 0.25], 1, [0.4, 0.4, 0.2]),  # 3.8, 3.7 and 2.5: to the largest remainders first
  ([0.58, 0.22, 0.09, 0.09, 0.02], 0.6, [0.6, 0.4, 0, 0, 0]),  # 7.25 and 2.75 of 10 are left, the first has a cap
])
def test_rounding_by_hand(prior_M, most, want_M):
  row_M = mixtures.design('paper', prior_M, 1, seed=0, strengths=[1e12], grid=0.1, temperature=1.0,
                          upper_M=[most] + [1] * (len(prior_M) - 1))[0]
  np.testing.assert_allclose(row_M, want_M, atol=1e-15)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('prior_M, n, usage, grid', [
  (PILE_17, 128, 15, 2e-4), (PILE_17, 64, 1.2, 1e-3), (np.ones(2), 32, 1.5, 1e-3), (np.ones(1000), 16, 15, 2e-4),
  (np.array([1e-6, 0, 3, 2, 1]), 64, 4, 1e-3)])
def test_rows_are_different_mixtures_on_the_grid_within_the_caps(kind, prior_M, n, usage, grid):
  upper_M = mixtures.caps(prior_M, usage=usage)
  weights_NxM = mixtures.design(kind, prior_M, n, seed=3, upper_M=upper_M, grid=grid)
  counts_NxM = np.rint(weights_NxM / grid).astype(int)
  assert weights_NxM.shape == (n, len(prior_M)) and weights_NxM.dtype == np.float64
  np.testing.assert_array_equal(weights_NxM, counts_NxM / round(1 / grid))
  assert (counts_NxM >= 0).all() and (counts_NxM.sum(-1) == round(1 / grid)).all()
  assert (weights_NxM <= upper_M).all()
  assert len(np.unique(counts_NxM, axis=0)) == n
  assert (weights_NxM[:, prior_M == 0] == 0).all()


@pytest.mark.parametrize('kind', KINDS)
def test_the_seed_decides(kind):
  first = mixtures.design(kind, PILE_17, 32, seed=5)
  np.testing.assert_array_equal(first, mixtures.design(kind, PILE_17, 32, seed=5))
  assert not np.array_equal(first, mixtures.design(kind, PILE_17, 32, seed=6))


def test_stratified_makes_each_domain_the_largest_of_as_many():
  # By chance alone a count of 20 differs by 4.
  weights_NxM = mixtures.design('stratified', [1, 1, 1, 1, 2], 100, seed=0)
  assert set(np.bincount(weights_NxM.argmax(-1), minlength=5)) <= {19, 20, 21}


def test_space_filling_leaves_no_two_mixtures_near():
  def least(kind):
    weights_NxM = mixtures.design(kind, PILE_17, 100, seed=0)
    return (mixtures.distances(weights_NxM, weights_NxM) + np.eye(100)).min()
  assert least('space_filling') > 5 * least('paper')


def test_distance_is_hellinger_by_hand():
  np.testing.assert_allclose(mixtures.distances(np.array([[1, 0], [0.36, 0.64]]), np.array([[1.0, 0], [0, 1]])),
                             [[0, 1], [np.sqrt(0.4), np.sqrt(0.2)]])


def test_draws_within_rare_bounds_have_the_law_of_rejected_ones():
  alpha_M, lower_M, upper_M = np.array([0.5, 0.3, 2.0, 0.05]), [0.3, 0, 0, 0.02], [0.5, 0.25, 0.35, 0.3]
  brute = np.random.default_rng(0).dirichlet(alpha_M, 1_000_000)
  brute = brute[((brute >= lower_M) & (brute <= upper_M)).all(-1)]
  assert 1000 < len(brute) < 10_000  # rarer than draw() rejects
  got = mixtures.draw(np.random.default_rng(1), alpha_M, 2000, lower_M, upper_M)
  assert ((got >= lower_M) & (got <= upper_M)).all()
  np.testing.assert_allclose(got.sum(-1), 1, atol=1e-12)
  for a, b in zip(brute.T, got.T):
    assert stats.ks_2samp(a, b, method='asymp').pvalue > 1e-3


@pytest.mark.parametrize('seed', range(4))  # of two domains either is the first of the pair
def test_draws_within_bounds_that_are_all_but_impossible(seed):
  # The share of the second is at least 0.7, where Beta(1e-3, 50) has a probability of about 1e-29.
  got = mixtures.draw(np.random.default_rng(seed), [50, 1e-3], 500, [0, 0], [0.3, 1])[:, 1]
  density = lambda w: w ** (1e-3 - 1) * (1 - w) ** 49
  mass = integrate.quad(density, 0.7, 1)[0]
  mean = integrate.quad(lambda w: w * density(w), 0.7, 1)[0] / mass
  np.testing.assert_allclose(got.mean(), mean, atol=4 * got.std() / np.sqrt(500))
  assert got.min() >= 0.7


def test_draws_of_tiny_concentrations_have_the_means_of_dirichlet():
  # Of gammas of concentration 1e-3 nearly all are 0 in float64; their sum would be, too.
  got = mixtures.draw(np.random.default_rng(0), [1e-3, 3e-3, 0], 4000, np.zeros(3), np.ones(3))
  np.testing.assert_allclose(got.mean(0), [0.25, 0.75, 0], atol=4 * np.sqrt(0.25 * 0.75 / 4000))


def test_caps_by_usage_and_by_epochs():
  np.testing.assert_allclose(mixtures.caps([1, 9, 90]), [0.15, 1, 1])
  # 4 epochs of 100, 900 and 9,000 tokens in a run of 10,000
  got = mixtures.caps([1, 9, 90], tokens_M=[100, 900, 9000], epochs=4, run_tokens=10_000)
  np.testing.assert_allclose(got, [0.04, 0.36, 1])


def test_caps_that_leave_one_mixture_give_it():
  row_M = mixtures.design('paper', [1, 1, 2], 1, seed=0, upper_M=[0.25, 0.25, 0.5], grid=0.05)[0]
  np.testing.assert_allclose(row_M, [0.25, 0.25, 0.5])


@pytest.mark.parametrize('call, message', [
  (lambda: mixtures.design('latin', PRIOR_5, 4, seed=0), "unknown design 'latin'; known: paper, stratified, space"),
  (lambda: mixtures.design('paper', PRIOR_5, 0, seed=0), 'n is 0'),
  (lambda: mixtures.design('paper', [1, 0], 4, seed=0), 'one domain of positive weight'),
  (lambda: mixtures.design('paper', [1, -1], 4, seed=0), 'want a vector of numbers >= 0'),
  (lambda: mixtures.design('paper', [1, np.nan], 4, seed=0), 'want a vector of numbers >= 0'),
  (lambda: mixtures.design('paper', PRIOR_5, 4, seed=0, grid=0.3), 'grid is 0.3'),
  (lambda: mixtures.design('paper', PRIOR_5, 4, seed=0, temperature=0), 'temperature is 0'),
  (lambda: mixtures.design('paper', PRIOR_5, 4, seed=0, strengths=[1, 0]), 'want positive numbers'),
  (lambda: mixtures.design('paper', PRIOR_5, 4, seed=0, upper_M=[0.1] * 5), 'upper ones to 0.5'),
  (lambda: mixtures.design('paper', PRIOR_5, 4, seed=0, upper_M=[0.1] * 4), 'shapes'),
  (lambda: mixtures.design('paper', [0, 1, 1], 4, seed=0, upper_M=[1, 0.2, 0.2]), 'with a prior sum to 0.4 on a grid'),
  (lambda: mixtures.design('paper', [1, 1], 12, seed=0, grid=0.1), '11 different mixtures of 2 domains'),
  (lambda: mixtures.design('stratified', [1, 1], 12, seed=0, grid=0.1), '11 different mixtures of 2 domains'),
  (lambda: mixtures.design('space_filling', [1, 1], 12, seed=0, grid=0.1), '11 different mixtures of 2 domains'),
  (lambda: mixtures.design('paper', [1, 1, 2], 2, seed=0, upper_M=[0.25, 0.25, 0.5], grid=0.05), '1 different mixt'),
  (lambda: mixtures.caps([1, 1], epochs=2), 'give all three or none'),
  (lambda: mixtures.caps([1, 1], tokens_M=[5, 5], epochs=2, run_tokens=100), '10 tokens at 2 epochs'),
  (lambda: mixtures.caps([1, 1], usage=0), 'usage is 0'),
  (lambda: mixtures.caps([1, 1], tokens_M=[5], epochs=2, run_tokens=1), 'for each of the 2 domains'),
  (lambda: mixtures.box([0.6, 0.6], [1, 1]), 'lower bounds sum to 1.2'),
  (lambda: mixtures.box([0.6, 0], [0.5, 1]), 'domain 0 is bounded by 0.6 and 0.5'),
  (lambda: mixtures.draw(np.random.default_rng(0), [1, 0, 1], 2, [0, 0.1, 0], [1, 1, 1]), 'prior 0 has a lower bound'),
])
def test_what_cannot_be_sampled_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()
