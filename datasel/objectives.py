"""Losses, in nats per token, float32.  Pure functions of (params, aux, batch); see step.Objective."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from datasel.batch import Batch
from datasel.step import Objective, split_rows

# (params, batch) -> nll_BxL, nats: any model's negative log-likelihood of each target, unmasked.
TokenNLL = Callable[[object, Batch], jax.Array]


def token_weights(batch: Batch) -> jax.Array:
  """float32 B x L: what each target counts for; the loss mask times the example's weight, where the batch has one."""
  mask_BxL = batch['loss_mask_BxL']
  return mask_BxL * batch['weights_B'][:, None] if 'weights_B' in batch else mask_BxL


def weighted_mean(value: jax.Array, weight: jax.Array) -> jax.Array:
  """sum(weight * value) / sum(weight), 0 where nothing counts."""
  total = weight.sum()
  return (value * weight).sum() / jnp.where(total > 0, total, 1)


def domain_sums(value_BxL: jax.Array, mask_BxL: jax.Array, domain_B: jax.Array,
                n_domains: int) -> tuple[jax.Array, jax.Array]:
  """(sum_M, count_M) float32: the masked values of each domain's rows added up, and how many there are."""
  member_BxM = jax.nn.one_hot(domain_B, n_domains, dtype=jnp.float32)
  rows = lambda x_B: jnp.einsum('bm,b->m', member_BxM, x_B, precision='highest')
  return rows((value_BxL * mask_BxL).sum(-1)), rows(mask_BxL.sum(-1))


def language_model(token_nll: TokenNLL) -> Objective:
  """Mean negative log-likelihood per token (Radford et al. 2018), weighted by example where the batch says so."""

  def objective(params, aux, batch):
    weight_BxL = token_weights(batch)
    loss = weighted_mean(token_nll(params, batch), weight_BxL)
    return loss, (aux, {'weight': weight_BxL.sum()})

  return objective


def per_example(token_nll: TokenNLL) -> Callable[[object, Batch], jax.Array]:
  """(params, batch) -> loss_B: the mean over each row's counted tokens, nats per token; 0 where none counts."""

  def losses(params, batch):
    mask_BxL = batch['loss_mask_BxL']
    count_B = mask_BxL.sum(-1)
    return (token_nll(params, batch) * mask_BxL).sum(-1) / jnp.where(count_B > 0, count_B, 1)

  return losses


def in_microbatches(token_nll: TokenNLL, n: int) -> TokenNLL:
  """The same function at the memory of a B/n batch: activations of one part exist at a time and are computed again in
  the backward pass.  Any loss built on the result is exact, also one that needs the whole batch before it knows its
  gradient (Group DRO); the price is a second forward pass."""
  if n == 1:
    return token_nll

  def nll(params, batch):
    parts = split_rows(batch, n)
    # `params` is closed over by the rows' function alone, so its cotangent is summed in the scan's carry.
    part = jax.checkpoint(lambda rows: token_nll(params, rows), prevent_cse=False)
    nll_nxBxL = jax.lax.map(part, parts)
    return nll_nxBxL.swapaxes(0, 1).reshape(-1, *nll_nxBxL.shape[2:])

  return nll
