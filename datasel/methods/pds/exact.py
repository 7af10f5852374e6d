"""The optimal control problem itself, for a pool small enough to train on whole (Gu et al. 2024, algorithm 1).

Each step of the inner training is on all of the pool, weighted by gamma on the simplex; each outer epoch moves gamma
along the exact gradient of the target and projects it back.
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from datasel.methods.pds import costates, pmp
from datasel.methods.pds.costates import PerExampleLoss, Tree


def optimize_weights(per_example_loss: PerExampleLoss, params: Tree, examples: Tree, dev_batches: Tree | Iterable, *,
                     learning_rate: float | Iterable[float] | optax.Schedule, steps: int, epochs: int,
                     outer_rate: float,
                     optimizer: Callable[..., optax.GradientTransformation] = optax.sgd,
                     report: Callable[[dict], None] = lambda trace: None) -> np.ndarray:
  """gamma_N: weights on N examples, >= 0 and summing to 1, that lower the sum over t = 1..steps of J(theta_t).

  examples: a tree of arrays N x ....  The rest is as in `pmp.solve`.  gamma starts uniform and moves by
  outer_rate * score_n, the score being minus the derivative of the target (the paper's alpha is outer_rate * eta).
  report: called for each epoch with {'epoch', 'target': the sum of J in nats before its move, 'weights_N'}.
  """
  if steps < 1 or epochs < 1 or not 0 < outer_rate < float('inf'):
    raise ValueError(f'steps {steps}, epochs {epochs}, outer_rate {outer_rate}: want at least 1, 1, and '
                     'a finite number above 0')
  N = jax.tree.leaves(examples)[0].shape[0]
  # A view of `steps` times the same batch: each segment of the solver copies out what it needs.
  repeated = jax.tree.map(lambda x: np.broadcast_to(np.asarray(x), (steps, *x.shape)), examples)
  gamma_N, learning_rate = jnp.full(N, 1 / N), costates.rate(learning_rate, steps)
  for epoch in range(epochs):
    losses: list[np.ndarray] = []
    scores_N = pmp.solve(per_example_loss, params, repeated, examples, dev_batches, learning_rate=learning_rate,
                         optimizer=optimizer, weights_TxB=np.broadcast_to(gamma_N, (steps, N)),
                         report=lambda trace, losses=losses: losses.append(trace['dev_loss']))
    report({'epoch': epoch, 'target': float(np.concatenate(losses).sum()), 'weights_N': np.asarray(gamma_N)})
    gamma_N = project_simplex(gamma_N + outer_rate * scores_N)
  return np.asarray(gamma_N)


@jax.jit
def project_simplex(x_N: jax.Array) -> jax.Array:
  """The point of {g_n >= 0, sum g_n = 1} nearest to x in the Euclidean norm, exact by one sort (Held et al. 1974)."""
  if x_N.ndim != 1 or x_N.size == 0:
    raise ValueError(f'x_N has shape {x_N.shape}; want a vector of at least one number')
  sorted_N = jnp.sort(x_N, descending=True)
  shift_N = (jnp.cumsum(sorted_N) - 1) / jnp.arange(1, x_N.size + 1)  # if the first n were what stays positive
  n = jnp.sum(sorted_N > shift_N)
  return jnp.maximum(x_N - shift_N[n - 1], 0)
