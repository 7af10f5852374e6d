"""DoReMi's domain weights: Group DRO over excess losses (Xie et al. 2023, arXiv 2305.10429, Algorithm 1).

The released repository differs from the paper in the switches of `group_dro`; its staleness under data parallelism and
gradient accumulation is not offered: here every update sees the whole global batch.
"""

import jax
import jax.numpy as jnp

from datasel.batch import Batch
from datasel.objectives import TokenNLL, domain_sums
from datasel.step import Objective

LOSS_REDUCTIONS = ('domain_mean', 'token_mean')
MISSING_DOMAIN = ('zero', 'keep')


def update(log_alpha_M: jax.Array, excess_nll_M: jax.Array, *, step_size: float = 1.0,
           smoothing: float = 1e-3) -> jax.Array:
  """One exponentiated-gradient step on the domain weights.

  log_alpha_M: float32, log of weights on the simplex.  excess_nll_M: nats per token, 0 for a domain that shall not
  move by itself.  Returns log_alpha_M: alpha' ~ alpha exp(step_size * excess), then mixed with `smoothing` of uniform.
  Law: equal excess leaves alpha unchanged up to smoothing.  Algorithm 1.
  """
  log_alpha_M = jax.nn.log_softmax(log_alpha_M + step_size * excess_nll_M)
  return jnp.log((1 - smoothing) * jnp.exp(log_alpha_M) + smoothing / log_alpha_M.shape[0])


def initial_aux(n_domains: int, *, vocab_size: int, initial_M: jax.Array | None = None) -> dict:
  """The objective's state before the first step: alpha_0, uniform (paper) unless given, and an empty average.

  excess_M is what the 'keep' policy repeats for a domain that has not been seen yet: log V, as the repository has it.
  """
  if initial_M is None:
    initial_M = jnp.full((n_domains,), 1 / n_domains)
  initial_M = jnp.asarray(initial_M, jnp.float32)
  return {
    'initial_M': initial_M,
    'log_alpha_M': jnp.log(initial_M),
    'alpha_sum_M': jnp.zeros((n_domains,), jnp.float32),
    'alpha_sum_error_M': jnp.zeros((n_domains,), jnp.float32),
    'updates': jnp.zeros((), jnp.int32),
    'excess_M': jnp.full((n_domains,), jnp.log(float(vocab_size)), jnp.float32),
  }


def average(aux: dict, *, include_initial: bool = False) -> jax.Array:
  """The output of DoReMi, mean of alpha_t over t = 1..T (paper) or t = 0..T (repository): float32 M on the simplex."""
  total_M = aux['alpha_sum_M'] + (aux['initial_M'] if include_initial else 0)
  count = aux['updates'] + (1 if include_initial else 0)
  return jnp.where(count > 0, total_M / jnp.maximum(count, 1), aux['initial_M'])


def group_dro(token_nll: TokenNLL, n_domains: int, *, step_size: float = 1.0, smoothing: float = 1e-3,
              clip: bool = True, loss_reduction: str = 'domain_mean', missing_domain: str = 'zero',
              sampling_M: jax.Array | None = None) -> Objective:
  """The proxy model's objective.  The batch carries `reference_nll_BxL` and `domain_B`.

  excess   max(nll - reference_nll, 0) per token (clip=False: unclipped), averaged over each domain's tokens.
  alpha_t  from `update`, seen at once by the loss of the same batch.
  loss     'domain_mean': sum_i alpha_i * mean nll of domain i (paper); 'token_mean': the mean over all tokens, a token
           of domain i weighing alpha_i / sampling_i (repository; equal only if every domain has its share of tokens).
  missing  a domain absent from the batch counts as excess 0 ('zero') or as its last seen excess ('keep', repository).
  """
  if loss_reduction not in LOSS_REDUCTIONS:
    raise ValueError(f'unknown loss_reduction {loss_reduction!r}; known: {LOSS_REDUCTIONS}')
  if missing_domain not in MISSING_DOMAIN:
    raise ValueError(f'unknown missing_domain {missing_domain!r}; known: {MISSING_DOMAIN}')
  if not 0 <= smoothing < 1 or step_size < 0:
    raise ValueError(f'step_size {step_size}, smoothing {smoothing}: want step_size >= 0 and 0 <= smoothing < 1')
  if loss_reduction == 'token_mean' and sampling_M is None:
    raise ValueError("loss_reduction 'token_mean' divides by the weights that the batches were sampled with: "
                     'pass sampling_M')

  def objective(params, aux, batch: Batch):
    nll_BxL, mask_BxL, domain_B = token_nll(params, batch), batch['loss_mask_BxL'], batch['domain_B']
    difference_BxL = jax.lax.stop_gradient(nll_BxL) - batch['reference_nll_BxL']
    excess_BxL = jnp.maximum(difference_BxL, 0) if clip else difference_BxL
    means = lambda x_BxL: domain_sums(x_BxL, mask_BxL, domain_B, n_domains)[0] / jnp.maximum(count_M, 1)
    _, count_M = domain_sums(mask_BxL, mask_BxL, domain_B, n_domains)
    excess_M = means(excess_BxL)
    present_M = count_M > 0
    excess_M = jnp.where(present_M, excess_M, aux['excess_M'] if missing_domain == 'keep' else 0)
    log_alpha_M = update(aux['log_alpha_M'], excess_M, step_size=step_size, smoothing=smoothing)
    alpha_M = jnp.exp(log_alpha_M)

    nll_M = means(nll_BxL)
    if loss_reduction == 'domain_mean':
      loss = (alpha_M * nll_M).sum()
    else:
      weight_M = alpha_M / jnp.where(sampling_M > 0, sampling_M, 1) * count_M
      loss = (weight_M * nll_M).sum() / jnp.where(weight_M.sum() > 0, weight_M.sum(), 1)

    alpha_sum_M, error_M = _compensated_add(aux['alpha_sum_M'], aux['alpha_sum_error_M'], alpha_M)
    new_aux = {
      'initial_M': aux['initial_M'], 'log_alpha_M': log_alpha_M,
      'alpha_sum_M': alpha_sum_M, 'alpha_sum_error_M': error_M,
      'updates': aux['updates'] + 1, 'excess_M': jnp.where(present_M, excess_M, aux['excess_M']),
    }
    metrics = {
      'alpha_M': alpha_M, 'average_M': average(new_aux), 'excess_M': excess_M, 'difference_M': means(difference_BxL),
      'nll_M': nll_M, 'present_M': present_M.astype(jnp.float32), 'tokens': count_M.sum(),
    }
    return loss, (new_aux, metrics)

  return objective


def _compensated_add(total, error, x):
  """Kahan's sum: 200,000 float32 additions of small weights would lose the small domains' digits."""
  y = x - error
  t = total + y
  return t, (t - total) - y
