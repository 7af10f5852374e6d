"""The one train step.  A method differs by its objective and its batch, never by its own trainer."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from datasel.batch import Batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """Everything that an update changes, as arrays."""

  step: jax.Array  # int32 scalar: updates applied so far
  params: Any
  opt_state: Any
  aux: Any = ()  # the objective's own state (DoReMi's domain weights); () when it has none


# (params, aux, batch) -> (loss, (aux, metrics)), pure.  `loss` is differentiated with respect to params.
#
# An objective whose loss is a ratio of sums over examples puts its denominator under metrics['weight'] and makes every
# other metric a mean over the same weight; then gradients add up exactly over micro-batches.
Objective = Callable[[Any, Any, Batch], tuple[jax.Array, tuple[Any, dict]]]


def init_state(params: Any, tx: optax.GradientTransformation, aux: Any = ()) -> State:
  """The state before the first update."""
  return State(jnp.zeros((), jnp.int32), params, tx.init(params), aux)


def train_step(state: State, batch: Batch, *, objective: Objective, tx: optax.GradientTransformation,
               microbatches: int = 1) -> tuple[State, dict]:
  """One update.  Pure: equal (state, batch) give equal bits, and nothing is read from outside.

  microbatches > 1 splits the batch's rows, which it must divide, and sums the parts' gradients weighted by
  metrics['weight'] in one scan: the gradient of the whole batch, also when its masks are ragged, at the memory of a
  part.  Returns the new state and the objective's metrics with `loss` and the norms of gradient,
  update and parameters added.
  """
  loss, aux, metrics, grads = _gradient(objective, state.params, state.aux, batch, microbatches)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics = metrics | {'loss': loss, 'grad_norm': optax.tree.norm(grads), 'update_norm': optax.tree.norm(updates),
                       'param_norm': optax.tree.norm(params)}
  return State(state.step + 1, params, opt_state, aux), metrics


def split_rows(batch: Batch, n: int) -> Batch:
  """B x ... -> n x B/n x ...; part i takes rows i, i + n, ..., so each part lies on all devices of a sharded batch."""
  rows = {x.shape[0] for x in batch.values()}
  if any(B % n for B in rows):
    raise ValueError(f'{n} micro-batches do not divide the batch of {sorted(rows)} rows; choose a divisor of it')
  return {name: x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()}


def _gradient(objective, params, aux, batch, microbatches):
  gradient = jax.value_and_grad(objective, has_aux=True)
  if microbatches == 1:
    (loss, (aux, metrics)), grads = gradient(params, aux, batch)
    return loss, aux, metrics, grads

  def weighted(rows):
    (loss, (part_aux, metrics)), grads = gradient(params, aux, rows)
    if 'weight' not in metrics or jax.tree.leaves(part_aux):
      raise ValueError(
        f"{microbatches} micro-batches: this objective returns no metrics['weight'] or keeps state, so its gradient is "
        "not the sum of its parts'; split inside it instead (objectives.in_microbatches)")
    weight = metrics.pop('weight')
    return weight, jax.tree.map(lambda x: weight * x, (loss, metrics, grads))

  parts = split_rows(batch, microbatches)
  zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(weighted, jax.tree.map(lambda x: x[0], parts)))
  add = lambda total, rows: (jax.tree.map(jnp.add, total, weighted(rows)), None)
  (weight, totals), _ = jax.lax.scan(add, zeros, parts)
  loss, metrics, grads = jax.tree.map(lambda x: x / jnp.where(weight > 0, weight, 1), totals)
  return loss, aux, metrics | {'weight': weight}, grads
