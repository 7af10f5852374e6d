"""Laws of the regressors: planted laws are recovered, formulas hold against other libraries, no run that is judged on
is fitted on, and the authors' CSVs come out as published."""

import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, special, stats

from datasel.methods.regmix import boosting, gaussian_process, laws, regression, tables

GOLDEN = pathlib.Path(__file__).parents[2] / 'golden' / 'regmix'


@pytest.fixture(scope='module')
def pile():
  """The published mixtures, and the losses on Pile-CC."""
  mixtures = tables.read_mixtures(GOLDEN / 'train_mixture_1m.csv')
  losses = tables.read(GOLDEN / 'train_pile_loss_1m.csv')
  return mixtures.values_NxC, losses.column('metric/the_pile_pile_cc_val_loss')


def draws(n, m=4, seed=0):
  """n mixtures of m domains, and a generator for noise."""
  random = np.random.default_rng(seed)
  return random.dirichlet(np.full(m, 0.6), n), random


SLOPES = np.array([3.0, 2.0, 4.0, 2.5])


def curved(weights):
  """A smooth law that is neither linear nor log-linear."""
  return 3 + np.exp(-4 * weights[:, 0]) + np.sin(3 * weights[:, 1]) * weights[:, 2]


# The planted laws.


def test_a_linear_law_is_recovered():
  weights, random = draws(60)
  fit = regression.fit(weights, weights @ SLOPES, 'linear')
  np.testing.assert_allclose(fit.importance, SLOPES, rtol=1e-9)
  noisy = regression.fit(weights, weights @ SLOPES + 0.05 * random.normal(size=60), 'linear')
  assert noisy.noise == pytest.approx(0.05, rel=0.25)
  off = (noisy.importance - SLOPES) / np.sqrt(np.diag(noisy.covariance(np.eye(4), np.eye(4))))
  assert np.abs(off).max() < 3


def test_a_log_linear_law_is_recovered_past_outliers():
  weights, random = draws(120)
  exact = regression.fit(weights, 2 + np.exp(weights @ -SLOPES), 'loglinear')
  np.testing.assert_allclose(exact.law.coefficient_M, -SLOPES, rtol=1e-4)
  assert exact.law.floor == pytest.approx(2, abs=1e-4)
  losses = 2 + np.exp(weights @ -SLOPES) + 1e-4 * random.normal(size=120)
  losses[::15] += 0.1
  robust = regression.fit(weights, losses, 'loglinear')
  np.testing.assert_allclose(robust.law.coefficient_M, -SLOPES, rtol=0.02)
  assert robust.law.floor == pytest.approx(2, abs=3e-3)  # least squares: 0.007 off at least


def test_least_squares_are_numpy_s(pile):
  weights, losses = pile
  design = np.c_[weights, np.ones(len(weights))]
  expected = design @ np.linalg.lstsq(design, losses, rcond=None)[0]
  fit = regression.fit(weights, losses, 'linear')
  assert fit.law.ridge == 0
  np.testing.assert_allclose(fit.predict(weights)[0], expected, rtol=1e-9)


def test_a_ridge_is_chosen_where_leaving_one_out_says_so():
  weights, random = draws(14, m=12)
  losses = weights @ random.normal(size=12) * 0.2 + 0.1 * random.normal(size=14)
  fit = regression.fit(weights, losses, 'linear')

  def solve(rows, ridge):
    center, mean = weights[rows].mean(0), losses[rows].mean()
    x = weights[rows] - center
    slopes = np.linalg.lstsq(np.r_[x, math.sqrt(ridge) * np.eye(12)], np.r_[losses[rows] - mean, np.zeros(12)],
                             rcond=None)[0]
    return lambda w: mean + (w - center) @ slopes

  errors = {ridge: np.mean([(solve(np.arange(14) != n, ridge)(weights[n]) - losses[n]) ** 2 for n in range(14)])
            for ridge in (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)}
  assert fit.law.ridge == min(errors, key=errors.get) > 0
  np.testing.assert_allclose(fit.predict(weights)[0], solve(np.arange(14), fit.law.ridge)(weights), rtol=1e-9)


def test_the_log_linear_law_is_scipy_s_robust_optimum(pile):
  weights, losses = pile[0][:200], pile[1][:200]
  fit = regression.fit(weights, losses, 'loglinear')
  weights = weights / weights.sum(1, keepdims=True)
  residual = lambda theta: theta[-1] + np.exp(weights @ theta[:-1]) - losses
  ours = np.append(fit.law.coefficient_M, fit.law.floor)
  bound = 1.345 * 1.4826 * np.median(np.abs(residual(ours)))
  cost = lambda theta: special.huber(bound, residual(theta)).sum()
  random = np.random.default_rng(0)
  others = [optimize.least_squares(residual, start, loss='huber', f_scale=bound, max_nfev=300).x
            for start in (ours, *(np.append(random.normal(-1, 0.5, 17), 5 + 0.2 * k) for k in range(3)))]
  assert cost(ours) <= min(map(cost, others)) * 1.01


# The Gaussian process against its textbook.


def test_the_kernel_is_the_matern_of_order_five_halves(x64):
  random = np.random.default_rng(0)
  a, b, log_length = random.normal(size=(5, 3)), random.normal(size=(4, 3)), np.array([0.3, -0.5, 1.0])
  r = np.sqrt((((a[:, None] - b[None]) / np.exp(log_length)) ** 2).sum(-1)) * math.sqrt(5)
  bessel = 2 ** (1 - 2.5) / special.gamma(2.5) * r ** 2.5 * special.kv(2.5, r)
  np.testing.assert_allclose(gaussian_process.kernel(a, b, log_length, 0.7), math.exp(1.4) * bessel, rtol=1e-12)


def dense(weights, theta):
  """The covariance of runs at mixtures and of the law, entry by entry."""
  root = np.sqrt(weights)
  r = np.sqrt(5 * np.square((root[:, None] - root[None]) / np.exp(theta[:-2])).sum(-1))
  law = np.exp(2 * theta[-2]) * (1 + r + r ** 2 / 3) * np.exp(-r)
  return law, law + (np.exp(2 * theta[-1]) + 1e-8) * np.eye(len(weights))


def log_prior(theta):
  prior = gaussian_process.PRIOR
  return (stats.norm(*prior['length']).logpdf(theta[:-2]).sum() + stats.norm(*prior['amplitude']).logpdf(theta[-2])
          + stats.norm(*prior['noise']).logpdf(theta[-1]))


def test_the_likelihood_is_scipy_s_and_its_slope_the_difference(x64):
  weights, random = draws(25)
  y = random.normal(size=25)
  theta = np.array([0.1, -0.4, 0.9, 0.3, 0.2, -1.0])
  ours = jax.jit(lambda theta: gaussian_process.negative_log_posterior(theta, jnp.sqrt(weights), jnp.asarray(y)))
  scipys = lambda theta: (-stats.multivariate_normal(np.zeros(25), dense(weights, theta)[1]).logpdf(y)
                          - log_prior(theta))
  other = theta + np.array([0.5, 0.1, -0.6, 0.2, -0.7, 0.8])
  # Each leaves out its own constant.
  assert float(ours(theta) - ours(other)) == pytest.approx(scipys(theta) - scipys(other), rel=1e-9)
  differences = [(scipys(theta + step) - scipys(theta - step)) / 2e-5 for step in 1e-5 * np.eye(6)]
  np.testing.assert_allclose(jax.jit(jax.grad(ours))(theta), differences, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope='module')
def process():
  weights, random = draws(80, seed=1)
  losses = curved(weights) + 0.02 * random.normal(size=80)
  return weights, losses, regression.fit(weights, losses, 'gp')


def test_the_posterior_is_the_dense_formula(process):
  weights, losses, fit = process
  law = fit.law
  new = draws(6, seed=2)[0]
  theta = np.r_[law.log_length_M, law.log_amplitude, law.log_noise]
  both, runs = dense(np.r_[weights, new], theta)[0], dense(weights, theta)[1]
  gain = np.linalg.solve(runs, both[:80, 80:]).T
  mean = losses.mean() + gain @ (losses - losses.mean())
  covariance = losses.var() * (both[80:, 80:] - gain @ both[:80, 80:])
  run_error = np.sqrt(np.diag(covariance) + losses.var() * np.exp(2 * law.log_noise))
  np.testing.assert_allclose(fit.covariance(new, new), covariance, rtol=1e-5, atol=1e-10)
  np.testing.assert_allclose(fit.covariance(new[:2], new[2:]), covariance[:2, 2:], rtol=1e-5, atol=1e-10)
  np.testing.assert_allclose(fit.predict(new), [mean, run_error], rtol=1e-5)
  np.testing.assert_array_equal(fit.predict_mean(new), fit.predict(new)[0])


def test_the_hyperparameters_are_an_optimum_that_no_other_start_betters(process, x64):
  weights, losses, fit = process
  y = (losses - losses.mean()) / losses.std()
  ours = np.r_[fit.law.log_length_M, fit.law.log_amplitude, fit.law.log_noise]
  objective = jax.jit(jax.value_and_grad(
    lambda theta: gaussian_process.negative_log_posterior(theta, jnp.sqrt(weights), jnp.asarray(y))))
  value, slope = objective(ours)
  assert np.abs(slope).max() < 0.05
  random = np.random.default_rng(0)
  for _ in range(3):
    start = random.normal(size=6) + np.array([0.5] * 4 + [0.7, -2.3])
    found = optimize.minimize(lambda theta: tuple(map(np.asarray, objective(theta))), start, jac=True)
    assert value < found.fun + 1e-2


def test_a_new_run_is_within_the_error_as_often_as_it_says(process):
  _, _, fit = process
  weights, random = draws(2000, seed=3)
  mean, error = fit.predict(weights)
  off = (curved(weights) + 0.02 * random.normal(size=2000) - mean) / error
  assert 0.9 < (np.abs(off) < 1.96).mean() < 0.99
  assert fit.noise == pytest.approx(0.02, rel=0.4)


def test_a_domain_in_no_mixture_makes_unsure():
  weights, random = draws(40)
  losses = curved(weights)
  dead = np.c_[weights, np.zeros(40)]
  for model in ('gp', 'linear', 'loglinear'):
    fit = regression.fit(dead, losses, model)
    mean, error = fit.predict(np.r_[dead, np.eye(5)[4:]])
    assert np.isfinite(mean).all() and np.isfinite(error).all()
    if model == 'gp':
      assert error[-1] > 10 * error[:-1].max()


# What jax can trace.


@pytest.mark.parametrize('model', ['gp', 'loglinear', 'linear'])
def test_the_traceable_law_is_the_predicted_one(model, x64):
  weights, random = draws(40)
  fit = regression.fit(weights, curved(weights) + 0.02 * random.normal(size=40), model)
  new = draws(5, seed=5)[0]
  mean, error = fit.predict(new)
  np.testing.assert_allclose(jax.jit(jax.vmap(fit.mean))(new), mean, rtol=1e-9)
  np.testing.assert_allclose(jax.jit(jax.vmap(fit.standard_error))(new), error, rtol=1e-6)
  # Along the simplex: predict divides a row by its sum.
  toward = np.array([1e-5, -1e-5, 0, 0])
  for function, at in ((fit.mean, 0), (fit.standard_error, 1)):
    slope = jax.grad(function)(new[0]) @ toward
    two = fit.predict(np.stack([new[0] + toward, new[0] - toward]))[at]
    assert float(slope) == pytest.approx((two[0] - two[1]) / 2, rel=1e-3, abs=1e-10)
  assert np.isfinite(jax.grad(fit.mean)(np.eye(4)[1])).all()


def test_no_global_switch_is_left_thrown(process):
  assert jnp.ones(2).dtype == jnp.float32
  assert jax.jit(process[2].mean)(jnp.full(4, 0.25)).dtype == jnp.float32


def test_many_mixtures_are_predicted_as_each_alone(process):
  fit = process[2]
  weights = draws(4200, seed=6)[0]
  mean, error = fit.predict(weights)
  for n in (0, 63, 64, 4095, 4096, 4199):
    np.testing.assert_allclose(fit.predict(weights[n:n + 1]), [mean[n:n + 1], error[n:n + 1]], rtol=1e-9)


# Errors of the laws, by resampling.


def test_the_bootstrap_is_the_textbook_error_where_that_holds():
  weights, random = draws(300)
  fit = regression.fit(weights, weights @ SLOPES + 0.1 * random.normal(size=300), 'linear')
  new = draws(20, seed=7)[0]
  lever = np.einsum('nm,mk,nk->n', new, np.linalg.inv(weights.T @ weights), new)
  np.testing.assert_allclose(np.sqrt(np.diag(fit.covariance(new, new))), fit.noise * np.sqrt(lever), rtol=0.25)
  np.testing.assert_allclose(fit.predict(new)[1] ** 2, np.diag(fit.covariance(new, new)) + fit.noise ** 2, rtol=1e-9)


def test_the_log_linear_bootstrap_agrees_with_other_data():
  weights, random = draws(150)
  new = draws(6, seed=7)[0]
  again = lambda: 2 + np.exp(weights @ -SLOPES) + 0.003 * random.normal(size=150)
  spread = np.std([regression.fit(weights, again(), 'loglinear').predict_mean(new) for _ in range(12)], axis=0, ddof=1)
  error = np.sqrt(np.diag(regression.fit(weights, again(), 'loglinear').covariance(new, new)))
  assert 0.6 < np.exp(np.log(error / spread).mean()) < 1.6


# Cross-validation and the choice.


@pytest.mark.parametrize('model', ['linear', 'loglinear', 'gp'])
def test_a_run_is_never_fitted_on_where_it_is_judged(model):
  weights, random = draws(40)
  losses = np.sort(curved(weights) + 0.2 * random.normal(size=40))
  moved = losses.copy()
  moved[20] = 0.01 * losses[19] + 0.99 * losses[21]  # its rank, and so its fold, stays
  before, after = (regression.cross_validate(weights, y, [model])[model] for y in (losses, moved))
  n = int(np.flatnonzero(before['losses_N'] != after['losses_N']).item())
  assert before['predicted_N'][n] == after['predicted_N'][n]
  assert (before['predicted_N'] != after['predicted_N']).sum() >= 30  # those of the four other folds


def test_noise_is_not_predicted():
  weights, random = draws(60)
  found = regression.cross_validate(weights, random.normal(size=60), ['linear', 'gp'])
  assert all(abs(one['spearman']) < 0.35 for one in found.values())


@pytest.fixture(scope='module')
def automatic(pile):
  return regression.fit(*pile)


def test_of_the_published_runs_the_process_is_chosen(automatic):
  assert automatic.model == 'gp' and 'least error' in automatic.reason and 'lightgbm' in automatic.reason
  found = {model: 100 * one['spearman'] for model, one in automatic.cross_validation.items()}
  assert found['gp'] > 98.9 and found['lightgbm'] > 98.3 and found['loglinear'] > 95.4 and 86 < found['linear'] < 89


def test_the_published_runs_are_within_their_errors(automatic, pile):
  weights, losses = pile
  kept = np.arange(512) % 4 > 0
  mean, error = regression.fit(weights[kept], losses[kept], 'gp').predict(weights[~kept])
  assert 0.88 < (np.abs(losses[~kept] - mean) < 1.96 * error).mean() < 0.99


@pytest.mark.parametrize('law, chosen', [
  (lambda w: w @ SLOPES, 'linear'), (lambda w: 2 + np.exp(w @ -SLOPES), 'loglinear'), (curved, 'gp')])
def test_the_choice_is_the_law_that_was_planted(law, chosen):
  weights, random = draws(60)
  losses = law(weights)
  fit = regression.fit(weights, losses + 0.03 * losses.std() * random.normal(size=60))
  assert fit.model == chosen and fit.reason.startswith(chosen)
  assert np.isfinite(fit.predict(weights)).all()


@pytest.mark.parametrize('spread, chosen', [(0.5, 'gp'), (2.0, 'loglinear'), (9.0, 'linear')])
def test_the_simplest_within_one_error_of_the_best_is_chosen(spread, chosen):
  """The mean of what the squared error is more has the error spread / 10; linear is worse by 0.5, loglinear by 0.15."""
  losses = np.zeros(100)
  either = np.where(np.arange(100) % 2, 1.0, -1.0) * math.sqrt(99 / 100) * spread
  squares = {'linear': 10.5 + either, 'loglinear': 10.15 + either, 'gp': np.full(100, 10.0),
             'lightgbm': np.full(100, 10.0)}
  found, reason = regression._choose(
    {model: {'losses_N': losses, 'predicted_N': np.sqrt(square), 'mse': square.mean(), 'spearman': 0.5}
     for model, square in squares.items()}, ['other (why)'])
  assert found == chosen and reason.startswith(chosen) and 'not tried: other (why)' in reason


def test_few_runs_and_repeated_ones_give_a_sensible_model():
  weights, random = draws(6)
  fit = regression.fit(weights, weights @ SLOPES + 0.01 * random.normal(size=6))
  assert 'not tried: loglinear (4 runs of 4 domains, want at least 6), lightgbm' in fit.reason
  assert np.isfinite(fit.predict(np.eye(4))).all() and np.isfinite(fit.predict(weights)).all()
  twice = np.repeat(weights, 3, axis=0)
  for model in ('linear', 'loglinear', 'gp'):
    assert np.isfinite(regression.fit(twice, twice @ SLOPES, model).predict(weights)).all()
  tied = np.where(np.arange(18) < 17, 2.0, 3.0)  # without its fold all are one
  assert np.isfinite(regression.fit(twice, tied).predict(weights)).all()


def test_the_order_of_rows_and_columns_says_nothing():
  weights, random = draws(40)
  losses = curved(weights) + 0.05 * random.normal(size=40)
  rows, columns = random.permutation(40), np.array([2, 0, 3, 1])
  first, second = regression.fit(weights, losses), regression.fit(weights[rows][:, columns], losses[rows])
  assert first.model == second.model
  new = draws(10, seed=8)[0]
  np.testing.assert_allclose(first.predict(new), second.predict(new[:, columns]), rtol=1e-4)
  for model in first.cross_validation:
    assert first.cross_validation[model]['mse'] == pytest.approx(second.cross_validation[model]['mse'], rel=1e-3)
  for model in ('linear', 'loglinear'):
    one, other = regression.fit(weights, losses, model), regression.fit(weights[rows][:, columns], losses[rows], model)
    np.testing.assert_allclose(one.predict(new), other.predict(new[:, columns]), rtol=1e-6)


# LightGBM.


def test_the_notebook_s_trees_are_repeated(pile):
  import lightgbm
  weights, losses = pile
  kept = np.arange(512) % 5 != 3  # here a patience of 2, 3 and 4 rounds end at 521, 607 and 664 trees
  theirs = lightgbm.train(
    {'task': 'train', 'boosting_type': 'gbdt', 'objective': 'regression', 'metric': ['l1', 'l2'], 'seed': 42,
     'num_threads': 2, 'learning_rate': 1e-2, 'verbosity': -1}, lightgbm.Dataset(weights[kept], losses[kept]), 1000,
    valid_sets=lightgbm.Dataset(weights[~kept], losses[~kept]),
    callbacks=[lightgbm.early_stopping(3, verbose=False)])
  ours = regression.fit(weights[kept], losses[kept], 'lightgbm', stop_on=(weights[~kept], losses[~kept]), folds=2)
  assert ours.law.trees == theirs.best_iteration < 1000
  np.testing.assert_array_equal(ours.predict_mean(weights[~kept]), theirs.predict(weights[~kept]))


def test_the_number_of_trees_is_the_best_out_of_fold():
  import lightgbm
  weights, random = draws(80)
  losses = curved(weights) + 0.8 * random.normal(size=80)
  fold = np.arange(80) % 4
  law = boosting.fit(weights, losses, fold_N=fold)
  squares = np.zeros((4, 300))
  whole = lightgbm.Dataset(weights, losses, params=boosting.PARAMETERS, free_raw_data=False).construct()
  for k in range(4):  # the folds share the bins of the weights, as LightGBM's own cross-validation has it
    one = lightgbm.train(boosting.PARAMETERS, whole.subset(np.flatnonzero(fold != k)), 300)
    for n in range(300):
      squares[k, n] = np.square(one.predict(weights[fold == k], num_iteration=n + 1) - losses[fold == k]).mean()
  assert law.trees == squares.mean(0).argmin() + 1 < 300
  assert law.noise ** 2 == pytest.approx(squares.mean(0).min(), rel=1e-9)


def test_without_lightgbm_the_others_go_on(monkeypatch):
  weights, random = draws(90)
  monkeypatch.setitem(sys.modules, 'lightgbm', None)
  with pytest.raises(ImportError, match=r'pip install -e \.\[regmix\]'):
    regression.fit(weights, weights @ SLOPES, 'lightgbm')
  fit = regression.fit(weights, weights @ SLOPES + 0.01 * random.normal(size=90), folds=3)
  assert fit.model == 'linear' and 'lightgbm (not installed)' not in fit.reason  # too few runs in a fold come first
  assert 'lightgbm (not installed)' in regression.fit(np.tile(weights, (2, 1)), np.tile(weights @ SLOPES, 2)).reason


# Scores.


def test_rank_correlation_is_scipy_s_ties_included():
  random = np.random.default_rng(0)
  a, b = random.integers(6, size=40), random.integers(6, size=40)
  assert regression.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, rel=1e-12)
  assert regression.spearman(a, np.ones(40)) == 0


def test_its_interval_is_as_wide_as_theory_has_it():
  random = np.random.default_rng(0)
  a = random.normal(size=400)
  b = 0.8 * a + 0.6 * random.normal(size=400)
  low, high = regression.bootstrap_spearman(a, b, 0)
  rho = regression.spearman(a, b)
  # Of Fisher's z, with the correction for ranks (Bonett and Wright 2000).
  width = np.ptp(np.tanh(np.arctanh(rho) + 1.96 * np.array([-1, 1]) * math.sqrt((1 + rho ** 2 / 2) / 397)))
  assert low < rho < high and high - low == pytest.approx(width, rel=0.2)
  assert (low, high) == regression.bootstrap_spearman(a, b, 0) != regression.bootstrap_spearman(a, b, 1)
  assert regression.bootstrap_spearman(a, np.exp(a)) == (1, 1)


def test_more_proxies_predict_better():
  weights, random = draws(160)
  losses = curved(weights) + 0.05 * random.normal(size=160)
  curve = regression.learning_curve(weights, losses, 'gp', [8, 32, 128], repeats=3)
  assert curve[0]['mse'] > 2 * curve[1]['mse'] and curve[1]['mse'] > curve[2]['mse'] > 0.05 ** 2 * 0.6
  assert curve[2]['spearman'] > curve[0]['spearman']
  doubled = regression.learning_curve(weights, losses, 'linear')
  assert [row['runs'] for row in doubled] == [8, 16, 32, 64, 128]
  assert regression.learning_curve(weights[:6], losses[:6], 'linear') == []


# What is refused.


@pytest.mark.parametrize('weights, losses, wanted', [
  (np.eye(3), np.arange(3.0), '3 runs of 3 domains; want at least 2 domains and one run more than domains'),
  (np.ones((5, 1)), np.arange(5.0), '5 runs of 1 domains'),
  (draws(8)[0], np.ones(8), 'all 8 losses are 1: there is nothing to fit'),
  (np.full((8, 2), 0.5), np.arange(8.0), 'all 8 mixtures are the same'),
  (draws(8)[0], np.r_[np.arange(7.0), np.nan], 'row 7: the loss nan'),
  (draws(8)[0], np.arange(7.0), r'shape \(8, 4\) and losses of shape \(7,\)'),
  (draws(8)[0], np.ones((8, 2)), r'losses of shape \(8, 2\)'),
  (draws(8)[0] * 1.02, np.arange(8.0), 'row 0: the weights sum to 1.02.*8 of 8'),
  (draws(8)[0] - np.eye(8, 4), np.arange(8.0), 'row 0, column 0: the weight -'),
  (np.where(np.eye(8, 4) > 0, np.inf, draws(8)[0]), np.arange(8.0), 'row 0, column 0: the weight inf')])
def test_runs_that_cannot_be_fitted_are_refused(weights, losses, wanted):
  for model in ('auto', *regression.MODELS):
    with pytest.raises(ValueError, match=wanted):
      regression.fit(weights, losses, model)


@pytest.mark.parametrize('call, wanted', [
  (lambda w, y: regression.fit(w, y, 'ridge'), "unknown model 'ridge'; known: auto, linear, loglinear, gp, lightgbm"),
  (lambda w, y: regression.fit(w, y, 'lightgbm'), 'lightgbm: 40 runs of 4 domains, want at least 64'),
  (lambda w, y: regression.fit(w[:5], y[:5], 'loglinear'), 'loglinear: 5 runs of 4 domains, want at least 6'),
  (lambda w, y: regression.fit(w, y, folds=1), '1 folds; want at least 2'),
  (lambda w, y: regression.fit(w, y, 'gp', stop_on=(w, y)), 'for the model lightgbm, not gp'),
  (lambda w, y: regression.fit(w, y, 'lightgbm', stop_on=(0 * w[:, :2] + 0.5, y)), 'have 2 domains, the others 4'),
  (lambda w, y: regression.fit(w, y, 'lightgbm', stop_on=(w, y[:2])), r'losses of shape \(2,\)'),
  (lambda w, y: regression.learning_curve(w, y, sizes=[3, 8]), 'gp wants sizes from 5 to 32'),
  (lambda w, y: regression.learning_curve(w, y, sizes=[8, 40]), 'gp wants sizes from 5 to 32'),
  (lambda w, y: regression.fit(w, y, 'linear').predict(w[:, :3]), r'shape \(40, 3\); want rows of the 4 weights'),
  (lambda w, y: regression.fit(w, y, 'linear').predict(w[0]), r'shape \(4,\); want rows'),
  (lambda w, y: regression.fit(w, y, 'linear').predict(2 * w), 'row 0: the weights sum to 2')])
def test_calls_that_mean_nothing_are_refused(call, wanted):
  weights, _ = draws(40)
  with pytest.raises(ValueError, match=wanted):
    call(weights, curved(weights))


def test_too_many_runs_for_a_process_are_refused():
  weights, _ = draws(gaussian_process.MOST_ROWS + 1)
  with pytest.raises(ValueError, match='gp: 8193 runs, want at most 8192'):
    regression.fit(weights, curved(weights), 'gp')


def test_resamples_count_every_draw():
  counts = laws._resamples(np.ones((7, 2)), 0)
  assert counts.shape == (200, 7) and (counts.sum(1) == 7).all() and counts.mean(0) == pytest.approx(1, abs=0.3)
  assert len(laws._resamples(np.ones((1000, 200)), 0)) == 50 and len(laws._resamples(np.ones((1000, 900)), 0)) == 20
