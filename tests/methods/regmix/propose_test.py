"""Laws of proposals: they are optima, exactly within their bounds, and what is said of their error is so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, optimize, stats

from datasel.methods.regmix import adaptive, ascent, mixtures, propose

PILE_17 = np.array([0.11328527, 0.07960865, 0.00391349, 0.1853759, 0.05108136, 0.01596293, 0.10175077, 0.00370752,
                    0.06652935, 0.00175077, 0.02708548, 0.23686921, 0.01184346, 0.00792997, 0.00803296, 0.03882595,
                    0.04644696])


class LogLinear:
  """c + exp(t . w + b), with an error of 0.1 everywhere and no gradient of it."""
  model, standard_error = 'loglinear', None

  def __init__(self, t_M, c=2.0, b=0.5):
    self.t_M, self.c, self.b = np.array(t_M, np.float64), c, b

  def mean(self, weights_M):
    return self.c + jnp.exp(jnp.sum(self.t_M * weights_M) + self.b)

  def predict_mean(self, weights_NxM):
    return self.c + np.exp(weights_NxM @ self.t_M + self.b)

  def predict(self, weights_NxM):
    return self.predict_mean(weights_NxM), np.full(len(weights_NxM), 0.1)


class Posterior:
  """A Gaussian process on square roots of weights, in dense linear algebra, its kernel exp(-|x - y|^2 / 2 l^2)."""
  model, length, noise = 'gp', 0.7, 0.05

  def __init__(self, weights_NxM, losses_N, noise_N=None):
    self.x, self.y = np.sqrt(weights_NxM), losses_N
    noise_N = np.full(len(self.x), self.noise ** 2) if noise_N is None else noise_N
    self.inverse = np.linalg.inv(self.kernel(self.x, self.x) + np.diag(noise_N))
    self.alpha = self.inverse @ losses_N

  def kernel(self, x, y):
    return np.exp(-((x[:, None] - y[None]) ** 2).sum(-1) / (2 * self.length ** 2))

  def covariance(self, a, b):
    a, b = np.sqrt(a), np.sqrt(b)
    return self.kernel(a, b) - self.kernel(a, self.x) @ self.inverse @ self.kernel(b, self.x).T

  def predict_mean(self, weights_NxM):
    return self.kernel(np.sqrt(weights_NxM), self.x) @ self.alpha

  def predict(self, weights_NxM):
    variance_N = np.diagonal(self.covariance(weights_NxM, weights_NxM))
    return self.predict_mean(weights_NxM), np.sqrt(np.maximum(variance_N, 0) + self.noise ** 2)

  def _row(self, weights_M):
    return jnp.exp(-jnp.sum((jnp.sqrt(weights_M)[None] - self.x) ** 2, -1) / (2 * self.length ** 2))

  def mean(self, weights_M):
    return jnp.sum(self._row(weights_M) * self.alpha)

  def standard_error(self, weights_M):
    row_N = self._row(weights_M)
    return jnp.sqrt(1 - row_N @ jnp.asarray(self.inverse) @ row_N + self.noise ** 2)


class Steps:
  """A model without a gradient, many of whose predictions are equal."""
  model, mean, standard_error = 'lightgbm', None, None

  def predict_mean(self, weights_NxM):
    return np.round(weights_NxM @ np.arange(weights_NxM.shape[1]), 1)


def a_posterior(seed=0, M=5, N=60):
  rng = np.random.default_rng(seed)
  weights_NxM = rng.dirichlet(np.ones(M), N)
  return Posterior(weights_NxM, np.sin(5 * weights_NxM).sum(-1) + 0.05 * rng.normal(size=N)), weights_NxM


def by_slsqp(value, M, lower_M, upper_M, tries=20):
  """The least value of scipy's own constrained search, from many starts."""
  rng = np.random.default_rng(0)
  found = []
  for _ in range(tries):
    start_M = np.clip(rng.dirichlet(np.ones(M)), np.maximum(lower_M, 1e-9), upper_M)
    result = optimize.minimize(value, start_M, method='SLSQP', bounds=list(zip(np.maximum(lower_M, 1e-12), upper_M)),
                               constraints=[{'type': 'eq', 'fun': lambda w: w.sum() - 1}],
                               options={'maxiter': 500, 'ftol': 1e-12})
    if abs(result.x.sum() - 1) < 1e-8:
      found.append(result.fun)
  return min(found)


BOUNDS = [(np.zeros(5), np.ones(5)), (np.array([0, 0.1, 0, 0, 0]), np.array([0.3, 0.5, 0.25, 1, 0.05]))]


@pytest.mark.parametrize('lower_M, upper_M', BOUNDS)
@pytest.mark.parametrize('scale', [0.3, 3.0])
def test_projection_is_the_nearest_mixture_within_the_bounds(scale, lower_M, upper_M, x64):
  log_M = scale * np.random.default_rng(1).normal(size=5)
  divergence = lambda w: np.sum(w * (np.log(np.maximum(w, 1e-300)) - log_M) - w + np.exp(log_M))
  got_M = np.asarray(ascent.project(jnp.asarray(log_M), lower_M, upper_M))
  assert (got_M >= lower_M).all() and (got_M <= upper_M).all() and abs(got_M.sum() - 1) < 1e-14
  assert abs(divergence(got_M) - by_slsqp(divergence, 5, lower_M, upper_M)) < 1e-7
  again_M = ascent.project(jnp.log(jnp.maximum(got_M, 1e-300)), lower_M, upper_M)
  np.testing.assert_allclose(again_M, got_M, atol=1e-14)


def test_projection_where_the_bounds_leave_one_mixture(x64):
  upper_M = np.array([0.25, 0.75, 0.0])
  np.testing.assert_array_equal(ascent.project(jnp.asarray([600.0, -300.0, 5.0]), np.zeros(3), upper_M), upper_M)


@pytest.mark.parametrize('seed', range(4))
def test_vertex_is_the_linear_program(seed):
  rng = np.random.default_rng(seed)
  slope_M, lower_M = rng.normal(size=9), rng.uniform(0, 0.05, 9)
  upper_M = lower_M + rng.uniform(0.05, 0.5, 9)
  want = optimize.linprog(slope_M, A_eq=np.ones((1, 9)), b_eq=[1], bounds=list(zip(lower_M, upper_M)))
  np.testing.assert_allclose(ascent.vertex(slope_M, lower_M, upper_M), want.x, atol=1e-9)


@pytest.mark.parametrize('lower_M, upper_M', BOUNDS)
@pytest.mark.parametrize('options', [{}, {'kappa': 1.0}, {'kl': 0.3}])
def test_ascent_finds_the_optimum_of_a_gaussian_process(options, lower_M, upper_M):
  fit, _ = a_posterior()
  objective = propose.Objective([fit], np.array([1, 2, 3, 4, 5]), **options)
  starts_SxM = np.random.default_rng(0).dirichlet(np.ones(5), 16)
  got_M, reached_S = propose.ascend(objective, starts_SxM, lower_M=lower_M, upper_M=upper_M)
  want = by_slsqp(lambda w: float(objective(np.maximum(w, 0)[None])[0]), 5, lower_M, upper_M)
  assert float(objective(got_M[None])[0]) <= want + 1e-6
  assert reached_S.shape == (16,) and reached_S.min() <= want + 1e-6
  assert (got_M >= lower_M).all() and (got_M <= upper_M).all() and abs(got_M.sum() - 1) < 1e-12


@pytest.mark.parametrize('lower_M, upper_M', BOUNDS)
def test_the_optimum_of_a_log_linear_law_is_its_vertex(lower_M, upper_M):
  t_M = np.array([-1.0, 0.3, -1.01, 0.2, -3.0])
  objective = propose.Objective([LogLinear(t_M)], np.ones(5))
  got_M, _ = propose.ascend(objective, np.ones((1, 5)) / 5, lower_M=lower_M, upper_M=upper_M)
  np.testing.assert_array_equal(got_M, ascent.vertex(t_M, lower_M, upper_M))


@pytest.mark.parametrize('scale', [1, 1e-3])
def test_also_of_a_law_of_many_domains_most_alike(scale):
  t_M, upper_M = scale * np.random.default_rng(0).normal(size=200), np.full(200, 0.05)
  got_M, _ = propose.ascend(propose.Objective([LogLinear(t_M)], np.ones(200)), np.ones((1, 200)) / 200, upper_M=upper_M)
  np.testing.assert_allclose(got_M, ascent.vertex(t_M, np.zeros(200), upper_M), atol=1e-12)


def test_a_domain_of_prior_0_stays_out():
  objective = propose.Objective([LogLinear([-9.0, -1, 0])], np.array([0, 1, 1]), kl=0.01)
  got_M, _ = propose.ascend(objective, np.array([[0.2, 0.4, 0.4]]))
  assert got_M[0] == 0 and got_M[1] > 0.99


def test_kl_holds_the_proposal_to_the_prior():
  prior_M = np.array([0.5, 0.3, 0.2])
  objective = propose.Objective([LogLinear([-1.0, 0, 1])], prior_M, kl=1e6)
  got_M, _ = propose.ascend(objective, np.ones((1, 3)) / 3)
  np.testing.assert_allclose(got_M, prior_M, atol=1e-4)


def test_worst_case_is_the_epigraph_optimum():
  fits = [LogLinear([-1.0, 0.5, 0.0]), LogLinear([0.5, -1.0, 0.0], c=5.0), LogLinear([0.2, 0.2, -0.5], c=1.0)]
  prior_M = np.array([0.2, 0.3, 0.5])
  objective = propose.Objective(fits, prior_M, combine='worst', target_weights=[1, 1, 2])
  got_M, _ = propose.ascend(objective, np.ones((2, 3)) / 3)
  # min z subject to weight_k (loss_k(w) - loss_k(prior)) <= z
  excess = lambda w: [weight * (fit.predict_mean(np.stack([w, prior_M])) @ [1, -1])
                      for weight, fit in zip(objective.target_weights, fits)]
  result = optimize.minimize(lambda v: v[3], [*prior_M, 1.0], method='SLSQP', bounds=[(0, 1)] * 3 + [(-9, 9)],
                             constraints=[{'type': 'eq', 'fun': lambda v: v[:3].sum() - 1},
                                          {'type': 'ineq', 'fun': lambda v: v[3] - excess(v[:3])}])
  np.testing.assert_allclose(objective(got_M[None])[0], max(excess(got_M)), rtol=1e-12)
  assert abs(objective(got_M[None])[0] - result.x[3]) < 2e-3  # the softened maximum: 0.001 log 3


def test_several_targets_are_their_weighted_mean():
  fits = [LogLinear([1.0, 0]), LogLinear([0.0, 2], c=7)]
  objective = propose.Objective(fits, [1, 1], target_weights=[3, 1], kappa=2.0)
  weights_NxM = np.array([[0.2, 0.8], [1, 0]])
  one, two = (fit.predict_mean(weights_NxM) + 0.2 for fit in fits)
  np.testing.assert_allclose(objective(weights_NxM), 0.75 * one + 0.25 * two)


@pytest.mark.parametrize('zero', [False, True])
def test_legacy_simulation_is_numpys_to_the_bit(zero, monkeypatch):
  monkeypatch.setattr(propose, '_ROWS', 700)  # the draws must not depend on it
  prior_M, fit = PILE_17.copy(), LogLinear(np.linspace(-2, 2, 17))
  prior_M[3] *= not zero
  np.random.seed(42)
  draws_NxM = np.zeros((5000, 17))
  draws_NxM[:, prior_M > 0] = np.random.dirichlet(prior_M[prior_M > 0] * 1, 5000)
  want_M = np.mean(draws_NxM[np.argsort(fit.predict_mean(draws_NxM))[0:128]], axis=0)
  objective = propose.Objective([fit], prior_M)
  got_M = propose.simulate(objective, prior_M, draws=5000, top=128, seed=42, legacy=True)
  np.testing.assert_array_equal(got_M, want_M)


def test_best_draws_are_the_first_of_the_lowest(monkeypatch):
  objective = propose.Objective([Steps()], np.ones(4))
  whole, values_K = propose.best_draws(objective, [2, 1, 0.5, 0.1], draws=3000, keep=50, seed=0, legacy=True)
  drawn_NxM = np.random.RandomState(0).dirichlet([2, 1, 0.5, 0.1], 3000)
  order = sorted(range(3000), key=lambda n: (Steps().predict_mean(drawn_NxM)[n], n))[:50]
  np.testing.assert_array_equal(whole, drawn_NxM[order])
  np.testing.assert_array_equal(values_K, Steps().predict_mean(whole))
  monkeypatch.setattr(propose, '_ROWS', 64)
  np.testing.assert_array_equal(
    propose.best_draws(objective, [2, 1, 0.5, 0.1], draws=3000, keep=50, seed=0, legacy=True)[0], whole)


def test_simulation_stays_within_bounds_however_tight():
  upper_M = PILE_17 / PILE_17.sum() * 1.5
  objective = propose.Objective([LogLinear(np.linspace(-2, 2, 17))], PILE_17)
  got_M = propose.simulate(objective, PILE_17, draws=2000, top=10, upper_M=upper_M)
  assert (got_M <= upper_M).all() and abs(got_M.sum() - 1) < 1e-12


def test_error_of_a_gain_is_that_of_the_difference():
  fit, weights_NxM = a_posterior()
  a_M, b_M = weights_NxM[0], 0.9 * weights_NxM[0] + 0.1 * weights_NxM[1]
  gains, errors = propose.gain(propose.Objective([fit], np.ones(5)), a_M, b_M)
  pair = np.stack([b_M, a_M])
  samples = np.random.default_rng(0).multivariate_normal(fit.predict_mean(pair), fit.covariance(pair, pair), 200_000)
  difference = samples[:, 0] - samples[:, 1]
  np.testing.assert_allclose([gains[0], errors[0]], [difference.mean(), difference.std()], rtol=0.02, atol=1e-4)
  assert errors[0] < 0.8 * np.sqrt(np.trace(fit.covariance(pair, pair)))  # they err together


@pytest.mark.parametrize('K', [1, 2, 3])
def test_pareto_set_is_that_of_brute_force(K):
  values_NxK = np.random.default_rng(K).integers(0, 12, (120, K)).astype(float)  # with ties and equal rows
  below = lambda a, b: (a <= b).all() and (a < b).any()
  want = {n for n, row in enumerate(values_NxK) if not any(below(other, row) for other in values_NxK)}
  got = propose.pareto(values_NxK)
  assert set(got.tolist()) == want and len(got) == len(want)
  assert (np.diff(values_NxK[got, 0]) >= 0).all()


@pytest.mark.parametrize('K', [2, 3])
def test_pareto_front_holds_each_targets_own_optimum(K):
  t_KxM = np.array([[-1.0, 0.5, 0.0], [0.5, -1.0, 0.1], [0.2, 0.2, -0.5]])[:K]
  objective = propose.Objective([LogLinear(t_M) for t_M in t_KxM], np.ones(3))
  mixtures_FxM, values_FxK = propose.pareto_front(objective, draws=300)
  np.testing.assert_allclose(values_FxK, objective.targets(mixtures_FxM).T)
  np.testing.assert_allclose(values_FxK.min(0), 2 + np.exp(t_KxM.min(-1) + 0.5), rtol=1e-12)
  assert set(propose.pareto(values_FxK).tolist()) == set(range(len(values_FxK)))
  best_M, _ = propose.ascend(objective, np.ones((1, 3)) / 3)  # of all alike, which is no vertex
  assert objective(mixtures_FxM).min() <= objective(best_M[None])[0] + 1e-7


def test_remoteness_by_hand():
  sampled_NxM = np.array([[1, 0, 0], [0.36, 0.64, 0], [0, 1, 0.0]])
  nearest, usual = propose.remoteness(np.array([0, 0, 1.0]), sampled_NxM)
  assert nearest == 1
  np.testing.assert_allclose(usual, np.quantile(np.sqrt([0.4, 0.2, 0.2]), 0.95))


def test_sensitivity_names_each_choice():
  fit, _ = a_posterior()
  objectives = {'gp': propose.Objective([fit], np.ones(5)), 'careful': propose.Objective([fit], np.ones(5), kappa=1),
                'steps': propose.Objective([Steps()], np.ones(5))}
  rows = propose.sensitivity(objectives, seeds=(3, 4), tops=(1, 20), draws=500)
  simulated = [('simulate', 3, 1), ('simulate', 3, 20), ('simulate', 4, 1), ('simulate', 4, 20)]
  ascended = [('ascend', None, None)]
  assert [(row['search'], row['seed'], row['top']) for row in rows] == 2 * (simulated + ascended) + simulated
  assert [row['objective'] for row in rows] == 5 * ['gp'] + 5 * ['careful'] + 4 * ['steps']
  for row in rows:
    objective = objectives[row['objective']]
    assert row['value'] == pytest.approx(objective(row['weights_M'][None])[0])
    if row['search'] == 'simulate':
      want_M = propose.simulate(objective, np.ones(5) / 5, draws=500, top=row['top'], seed=row['seed'])
      np.testing.assert_array_equal(row['weights_M'], want_M)
    else:
      assert row['value'] <= min(one['value'] for one in rows if one['objective'] == row['objective'])


def test_a_search_is_the_one_named():
  fit, weights_NxM = a_posterior()
  objective, upper_M = propose.Objective([fit], np.ones(5)), [0.3, 0.5, 0.25, 1, 0.05]
  drawn_M = propose.search(objective, 'simulate', weights_NxM, seed=2, draws=700, top=9, upper_M=upper_M)
  np.testing.assert_array_equal(
    drawn_M, propose.simulate(objective, np.ones(5) / 5, seed=2, draws=700, top=9, upper_M=upper_M))
  found_M = propose.search(objective, 'ascend', weights_NxM, seed=2, upper_M=upper_M)
  want = by_slsqp(lambda w: float(objective(np.maximum(w, 0)[None])[0]), 5, np.zeros(5), np.array(upper_M))
  assert objective(found_M[None])[0] <= want + 1e-6 and (found_M <= upper_M).all()


def test_small_weights_give_way_within_the_caps():
  got_M = ascent.without_dust(np.array([0.5, 0.3, 0.15, 0.05]), np.zeros(4), np.array([0.5, 0.35, 1, 1]), least=0.1)
  np.testing.assert_allclose(got_M, [0.5, 0.3 + 0.05 * 0.05 / 0.9, 0.15 + 0.05 * 0.85 / 0.9, 0], atol=1e-15)
  # So little that nothing is missing without it.
  got_M = ascent.without_dust(np.array([0.7, 0.3, 7e-18]), np.zeros(3), np.array([1, 0.3, 1]), least=1e-5)
  np.testing.assert_array_equal(got_M, [0.7, 0.3, 0])


@pytest.mark.parametrize('mean, deviation, best', [(1, 0.5, 1.2), (1, 0.5, -0.5), (2, 1e-3, 2), (0, 2, 7)])
def test_expected_improvement_is_its_integral(mean, deviation, best):
  want, _ = integrate.quad(lambda y: (best - y) * stats.norm.pdf(y, mean, deviation), mean - 12 * deviation, best,
                           points=[min(mean, best)], epsabs=1e-13)
  np.testing.assert_allclose(adaptive.expected_improvement(np.array([mean]), np.array([deviation]), best), [want],
                             atol=1e-10)


def test_expected_improvement_where_nothing_is_uncertain():
  np.testing.assert_array_equal(adaptive.expected_improvement(np.array([1.0, 3.0]), np.zeros(2), 2.0), [1, 0])


def test_the_next_mixtures_are_each_of_largest_improvement_given_those_before():
  fit, weights_NxM = a_posterior(N=12)
  prior_M = np.array([1, 2, 3, 4, 5]) / 15
  upper_M = np.array([1, 0.5, 0.4, 0.4, 0.6])
  got_QxM = adaptive.next_batch(fit, weights_NxM, 12, prior_M, seed=0, upper_M=upper_M, grid=1e-3, pool=200)
  assert (got_QxM <= upper_M).all() and len(np.unique(got_QxM, axis=0)) == 12
  np.testing.assert_array_equal(np.rint(got_QxM * 1000) / 1000, got_QxM)
  best = fit.predict_mean(weights_NxM).min()
  for q in range(12):  # the model fitted anew, in full, with what it believed of the earlier choices
    sure = Posterior(np.concatenate([weights_NxM, got_QxM[:q]]), np.append(fit.y, fit.predict_mean(got_QxM[:q])),
                     np.append(np.full(12, fit.noise ** 2), np.full(q, 1e-12)))
    mean_R = sure.predict(got_QxM[q:])[0]
    np.testing.assert_allclose(mean_R, fit.predict_mean(got_QxM[q:]), atol=1e-5)
    deviation_R = np.sqrt(np.maximum(np.diagonal(sure.covariance(got_QxM[q:], got_QxM[q:])), 0))
    assert np.argmax(adaptive.expected_improvement(mean_R, deviation_R, best)) == 0
    best = min(best, mean_R[0])


def test_the_next_mixtures_are_new():
  fit, weights_NxM = a_posterior(N=25)
  first_QxM = adaptive.next_batch(fit, weights_NxM, 4, np.ones(5), seed=0, pool=50)
  again_QxM = adaptive.next_batch(fit, first_QxM, 4, np.ones(5), seed=0, pool=50)
  assert (mixtures.distances(first_QxM, again_QxM) > 1e-6).all()


def test_all_that_there_are_can_be_next():
  fit, _ = a_posterior(M=2)
  got_QxM = adaptive.next_batch(fit, np.array([[0.5, 0.5]]), 10, [1, 1], seed=0, grid=0.1, pool=20)
  np.testing.assert_allclose(np.sort(got_QxM[:, 0]), [0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9, 1])


def _objective(**options):
  return propose.Objective([LogLinear([-1.0, 1])], [1, 1], **options)


@pytest.mark.parametrize('call, message', [
  (lambda: propose.Objective([], [1, 1]), '0 fitted targets'),
  (lambda: _objective(target_weights=[1, 2]), '2 target weights for 1 fitted'),
  (lambda: _objective(target_weights=[-1]), 'target weights are'),
  (lambda: _objective(combine='best'), "unknown combine 'best'; known: sum, worst"),
  (lambda: _objective(kappa=-1), 'kappa is -1'),
  (lambda: _objective(kl=np.nan), 'kl is nan'),
  (lambda: propose.Objective([Steps()], [0, 0]), 'not all 0'),
  (lambda: propose.ascend(propose.Objective([Steps()], [1, 1]), np.ones((1, 2)) / 2), 'lightgbm.*use simulate'),
  (lambda: propose.ascend(_objective(kappa=1), np.ones((1, 2)) / 2), 'loglinear with kappa 1; use simulate'),
  (lambda: propose.ascend(_objective(), np.ones((1, 3)) / 3), 'want rows of 2 weights'),
  (lambda: propose.ascend(_objective(), np.ones((1, 2)) / 2, upper_M=[0.4, 0.4]), 'upper ones to 0.8'),
  (lambda: propose.simulate(_objective(), [1, 1], draws=5, top=6), 'the best 6 of 5 draws'),
  (lambda: propose.simulate(_objective(), [1, -1]), 'numbers >= 0'),
  (lambda: propose.simulate(_objective(), [0, 0]), 'the concentration is 0 for all'),
  (lambda: propose.simulate(_objective(), [1, 1], legacy=True, upper_M=[1, 1]), 'know no bounds'),
  (lambda: propose.search(_objective(), 'guess', np.ones((1, 2)) / 2, seed=0), "unknown search 'guess'"),
  (lambda: propose.pareto(np.array([[1, np.nan]])), 'not all finite'),
  (lambda: propose.pareto_front(_objective()), 'of 1 target'),
  (lambda: adaptive.next_batch(a_posterior(M=2)[0], np.array([[0.5, 0.5]]), 11, [1, 1], seed=0, grid=0.1, pool=8),
   '10 mixtures that w'),
])
def test_what_cannot_be_proposed_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_the_global_precision_is_left_alone():
  propose.ascend(_objective(), np.ones((1, 2)) / 2)
  assert not jax.config.jax_enable_x64
