"""Group DRO against a rewrite in NumPy, by hand, and by its laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from datasel import objectives
from datasel.methods.doremi import domain_weights

M, B, L, V = 3, 8, 5, 11


def nll_of(params, batch):
  """A model small enough to differentiate by hand: one logit vector for all positions, scaled by the token."""
  logits_BxLxV = params['w'][None, None] * (1 + batch['tokens_BxL'][..., None])
  logp = jax.nn.log_softmax(logits_BxLxV, -1)
  return -jnp.take_along_axis(logp, batch['targets_BxL'][..., None], -1)[..., 0]


def make_batch(seed=0, domains=(0, 1, 2, 0, 0, 1, 2, 2)):
  r = np.random.default_rng(seed)
  tokens, targets = r.integers(0, 3, (B, L)), r.integers(0, V, (B, L))
  mask = (r.random((B, L)) < np.linspace(0.3, 1, B)[:, None]).astype(np.float32)
  mask[:, 0] = 1
  return {'tokens_BxL': jnp.asarray(tokens), 'targets_BxL': jnp.asarray(targets), 'loss_mask_BxL': jnp.asarray(mask),
          'domain_B': jnp.asarray(domains, jnp.int32),
          'reference_nll_BxL': jnp.asarray(r.normal(2.4, 0.5, (B, L)), jnp.float32)}


PARAMS = {'w': jnp.asarray(np.random.default_rng(5).normal(size=V) * 0.3, jnp.float32)}


def rewritten(nll, batch, log_alpha, last, *, step_size, smoothing, clip, reduction, missing, sampling):
  """Algorithm 1 and the repository's variants, token by token."""
  excess, mean, tokens = {}, {}, {}
  for i in range(M):
    rows = [b for b in range(B) if batch['domain_B'][b] == i]
    tokens[i] = [(b, j) for b in rows for j in range(L) if batch['loss_mask_BxL'][b, j]]
    if tokens[i]:
      d = [nll[b, j] - batch['reference_nll_BxL'][b, j] for b, j in tokens[i]]
      excess[i] = sum(max(x, 0) for x in d) / len(d) if clip else sum(d) / len(d)
      mean[i] = sum(nll[b, j] for b, j in tokens[i]) / len(d)
    else:
      excess[i], mean[i] = (last[i] if missing == 'keep' else 0.0), 0.0
  alpha = np.array([np.exp(log_alpha[i]) * np.exp(step_size * excess[i]) for i in range(M)])
  alpha = (1 - smoothing) * alpha / alpha.sum() + smoothing / M
  if reduction == 'domain_mean':
    loss = sum(alpha[i] * mean[i] for i in range(M))
  else:
    weighted = [(alpha[i] / sampling[i], nll[b, j]) for i in range(M) for b, j in tokens[i]]
    loss = sum(w * x for w, x in weighted) / sum(w for w, _ in weighted)
  return alpha, loss


@pytest.mark.parametrize('clip', [True, False])
@pytest.mark.parametrize('reduction', domain_weights.LOSS_REDUCTIONS)
@pytest.mark.parametrize('missing', domain_weights.MISSING_DOMAIN)
@pytest.mark.parametrize('domains', [(0, 1, 2, 0, 0, 1, 2, 2), (0, 1, 1, 0, 0, 1, 0, 0)])
def test_three_steps_equal_the_rewrite(clip, reduction, missing, domains):
  sampling = np.array([0.5, 0.3, 0.2])
  settings = dict(step_size=0.7, smoothing=0.01, clip=clip)
  objective = jax.jit(domain_weights.group_dro(nll_of, M, loss_reduction=reduction, missing_domain=missing,
                                               sampling_M=jnp.asarray(sampling, jnp.float32), **settings))
  aux = domain_weights.initial_aux(M, vocab_size=V)
  alphas = [np.full(M, 1 / M)]
  last = np.full(M, np.log(V))
  for seed in range(3):
    batch = make_batch(seed, domains)
    nll = np.asarray(nll_of(PARAMS, batch), np.float64)
    host = {name: np.asarray(x, np.float64) for name, x in batch.items()}
    want, want_loss = rewritten(nll, host, np.log(alphas[-1]), last, reduction=reduction, missing=missing,
                                sampling=sampling, **settings)
    loss, (aux, metrics) = objective(PARAMS, aux, batch)
    np.testing.assert_allclose(np.exp(aux['log_alpha_M']), want, rtol=2e-6)
    np.testing.assert_allclose(loss, want_loss, rtol=2e-6)
    last = np.where(np.asarray(metrics['present_M']) > 0, metrics['excess_M'], last)
    alphas.append(want)
  np.testing.assert_allclose(domain_weights.average(aux), np.mean(alphas[1:], 0), rtol=2e-6)
  np.testing.assert_allclose(domain_weights.average(aux, include_initial=True), np.mean(alphas, 0), rtol=2e-6)


def test_two_domains_by_hand():
  """alpha = (1/2, 1/2), excess (log 4, log 2), eta 1, c 0.1: alpha' = (2/3, 1/3), then 0.9 alpha' + 0.05."""
  log_alpha = domain_weights.update(jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([4.0, 2.0])), smoothing=0.1)
  np.testing.assert_allclose(jnp.exp(log_alpha), [0.65, 0.35], rtol=1e-6)


def test_equal_excess_leaves_the_weights():
  log_alpha = jnp.log(jnp.array([0.7, 0.2, 0.1]))
  np.testing.assert_allclose(domain_weights.update(log_alpha, jnp.full(3, 0.9), smoothing=0.0), log_alpha, atol=1e-6)


def test_weights_stay_on_the_simplex_and_off_its_border():
  """10,000 steps of the largest push one way: no weight falls below c / M."""
  def step(log_alpha, _):
    return domain_weights.update(log_alpha, jnp.array([5.0, 0.0, 0.0]), smoothing=1e-3), None
  log_alpha, _ = jax.lax.scan(step, jnp.log(jnp.full(3, 1 / 3)), None, 10_000)
  alpha = np.exp(np.asarray(log_alpha, np.float64))
  assert alpha.sum() == pytest.approx(1, abs=1e-6) and alpha.min() >= 1e-3 / 3 * (1 - 1e-5)


def test_reference_equal_to_proxy_keeps_uniform_weights():
  batch = make_batch() | {'reference_nll_BxL': nll_of(PARAMS, make_batch())}
  _, (aux, metrics) = domain_weights.group_dro(nll_of, M)(PARAMS, domain_weights.initial_aux(M, vocab_size=V), batch)
  np.testing.assert_allclose(jnp.exp(aux['log_alpha_M']), 1 / M, rtol=1e-6)
  assert not metrics['excess_M'].any()


def test_gradient_is_the_weighted_sum_of_domain_gradients():
  """alpha is a constant of the step: the gradient does not run through it, nor through the clip."""
  batch, aux = make_batch(), domain_weights.initial_aux(M, vocab_size=V)
  objective = domain_weights.group_dro(nll_of, M, step_size=2.0)
  grad, (new_aux, _) = jax.grad(objective, has_aux=True)(PARAMS, aux, batch)
  alpha = jnp.exp(new_aux['log_alpha_M'])
  by_domain = [jax.grad(lambda p, i=i: objectives.weighted_mean(
    nll_of(p, batch), batch['loss_mask_BxL'] * (batch['domain_B'] == i)[:, None]))(PARAMS)['w'] for i in range(M)]
  np.testing.assert_allclose(grad['w'], sum(a * g for a, g in zip(alpha, by_domain)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('microbatches', [2, 4])
def test_no_staleness_in_microbatches(microbatches):
  """Weights and gradient of a batch done in parts are those of the batch done at once."""
  aux = domain_weights.initial_aux(M, vocab_size=V)
  run = lambda n: jax.jit(jax.value_and_grad(
    domain_weights.group_dro(objectives.in_microbatches(nll_of, n), M), has_aux=True))(PARAMS, aux, make_batch())
  (whole_loss, (whole_aux, _)), whole_grad = run(1)
  (loss, (parts_aux, _)), grad = run(microbatches)
  np.testing.assert_allclose(loss, whole_loss, rtol=1e-6)
  np.testing.assert_allclose(parts_aux['log_alpha_M'], whole_aux['log_alpha_M'], rtol=1e-6)
  np.testing.assert_allclose(grad['w'], whole_grad['w'], rtol=1e-5, atol=1e-7)


def test_the_average_keeps_small_weights_exact_over_a_long_run():
  """200,000 steps, as the paper takes: plain float32 sums would be off by a percent."""
  small = np.float32(1.1e-5)

  def add(carry, _):
    return domain_weights._compensated_add(*carry, jnp.array([1 - small, small])), None

  (total, _), _ = jax.jit(lambda c: jax.lax.scan(add, c, None, 200_000))((jnp.zeros(2), jnp.zeros(2)))
  np.testing.assert_allclose(total / 200_000, [1 - small, small], rtol=1e-6)


@pytest.mark.parametrize('bad', [{'loss_reduction': 'mean'}, {'missing_domain': 'skip'}, {'smoothing': 1.0},
                                 {'step_size': -1.0}, {'loss_reduction': 'token_mean'}])
def test_unknown_choices_are_refused(bad):
  with pytest.raises(ValueError, match=next(iter(bad)).split('_')[0]):
    domain_weights.group_dro(nll_of, M, **bad)
