"""Data selection as optimal control: what each example does to the loss on a target set over T steps of training
(PDS; Gu et al. 2024, theorem 2.1 and algorithm 1).

Training is the state equation theta_{t+1} = theta_t - eta grad L_t(theta_t), the target is the sum over t = 1..T of
J(theta_t), and Pontryagin's maximum principle gives a co-state for every step, back from lambda_T = grad J(theta_T):

  lambda_t = lambda_{t+1} + grad J(theta_t) - eta Hess L_t(theta_t) lambda_{t+1}
  score_n  = sum over scored t of eta lambda_{t+1} . grad l_n(theta_t)

Exactly: score_n is minus the derivative of the target with respect to a weight on example n in the loss of every
scored step.  Optimisers other than SGD have co-states of their moments too (appendix C), found here by the transpose
of optax's own update.

States are kept at the start of each of about sqrt(T) segments and computed again inside one, so memory grows as
sqrt(T).  Works on any model: params is any tree of floating arrays, sharded as it likes.  Call it inside
`sharding.use` where the model needs that.
"""

import logging
import math
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from datasel import autodiff
from datasel.checkpoint import Checkpoints
from datasel.methods.pds import costates
from datasel.methods.pds.batches import Groups
from datasel.methods.pds.costates import PerExampleLoss, Tree
from datasel.step import State


def solve(per_example_loss: PerExampleLoss, params: Tree, train_batches: Tree, proxy_batches: Tree | Iterable,
          dev_batches: Tree | Iterable, *, learning_rate: float | Iterable[float] | optax.Schedule,
          score_stride: int = 1,
          optimizer: Callable[..., optax.GradientTransformation] = optax.sgd,
          weights_TxB: np.ndarray | None = None, normalize: bool = False, derivatives: str = 'exact',
          microbatches: int = 1,
          directory: pathlib.Path | None = None, report: Callable[[dict], None] = lambda trace: None) -> np.ndarray:
  """The score of each proxy example, in their order: a vector of N, float32 or wider.  Greater is better to train on.

  per_example_loss(params, batch) -> loss_B in nats.  Training minimises its mean over each batch, J is its mean over
  all of dev_batches.

  train_batches: a tree of arrays T x B x ..., one batch for each step.
  proxy_batches, dev_batches: such a tree of batches n x B x ..., one batch B x ..., or, where they do not fit in memory
    or differ in size, an iterable of batches.  Proxies are read once for each segment, so theirs must start anew each
    time it is iterated, with the same batches; dev_batches are kept.
  learning_rate: a number, T numbers, or a schedule; optimizer(learning_rate) is the transformation.  Adam needs an
    eps_root > 0 (functools.partial(optax.adam, eps_root=1e-12)): else it has no derivative where a gradient is 0.
  score_stride: score at steps 0, stride, 2 stride, ... (the authors': 10 of T = 100).
  weights_TxB: what each training example counts for in the sum that a step minimises; default 1/B, the mean.
  normalize: add up the cosines of lambda_{t+1} and grad l_n instead of inner products, so that an example does not
    score high by the size of its gradient alone; one reverse pass for each example.
  derivatives: 'exact' by forward-mode AD, or 'finite_difference' (central), which asks of the model gradients only.
  microbatches: parts that a training batch's gradient and Hessian-vector product are computed in.
  directory: progress is kept there at every segment; a call with the same arguments goes on from it.
  report: called after each segment, from the last to the first, with numpy arrays {'step': t, 'dev_loss': J(theta_t),
    'costate_norm': |lambda_t|} of its steps, t from 1 to T in all.

  Raises FloatingPointError where a score is not finite.
  """
  if derivatives not in ('exact', 'finite_difference') or normalize and derivatives != 'exact':
    raise ValueError(f"derivatives {derivatives!r}, normalize {normalize}; want 'exact', or 'finite_difference' "
                     'without normalize')
  T, B = Groups(train_batches, train_batches, 'train_batches').shape
  if not isinstance(score_stride, int) or not 1 <= score_stride <= T:
    raise ValueError(f'score_stride is {score_stride}; want a whole number from 1 to the {T} steps of train_batches')
  problem = costates.Problem(per_example_loss, optimizer, _rate(learning_rate, T), score_stride, normalize, derivatives,
                             microbatches, _places(params))
  if weights_TxB is None:
    weights_TxB = np.broadcast_to(np.asarray(1 / B, costates.float_dtype(params)), (T, B))
  if np.shape(weights_TxB) != (T, B):
    raise ValueError(f'weights_TxB has shape {np.shape(weights_TxB)}; want {(T, B)} as train_batches')
  return _solve(problem, params, (weights_TxB, train_batches), Groups(proxy_batches, train_batches, 'proxy_batches'),
                Groups(dev_batches, train_batches, 'dev_batches').kept(), directory, report)


def solve_checkpoints(per_example_loss: PerExampleLoss, checkpoints: Iterable[Tree], *batches: Any,
                      directory: pathlib.Path | None = None, **options: Any) -> np.ndarray:
  """The mean of `solve`'s scores from each of several initial params (the paper's M = 5), held one at a time."""
  total, n = 0.0, 0
  for n, params in enumerate(checkpoints, 1):
    inside = directory and pathlib.Path(directory) / f'checkpoint-{n - 1}'
    total = total + solve(per_example_loss, params, *batches, directory=inside, **options)
  if not n:
    raise ValueError('checkpoints is empty; want the params of at least one')
  return total / n


def _solve(problem: costates.Problem, params: Tree, train: tuple, proxies: Groups, dev: list[Tree],
           directory: pathlib.Path | None, report: Callable[[dict], None]) -> np.ndarray:
  T, stride = train[0].shape[0], problem.score_stride
  K = stride * max(1, round(math.sqrt(T) / stride))
  segments = [np.arange(first, first + K, dtype=np.int32) for first in range(0, T, K)]
  rows = lambda steps: jax.tree.map(lambda x: x[np.minimum(steps, T - 1)], train)  # those beyond T are not taken

  state = jax.jit(lambda params: (problem.pin(params), problem.tx.init(params)))(params)
  starts = []
  for steps in segments:
    starts.append(state)
    state = jax.block_until_ready(costates.forward(problem, T, state, steps, rows(steps)))
  costate, J = costates.final_costate(problem, state, dev)
  del state
  report({'step': np.array([T]), 'dev_loss': np.array([J]),
          'costate_norm': np.array([autodiff.tree_norm(costate.params)])})
  with _Progress(directory, {'T': T, 'score_stride': stride, 'normalize': problem.normalize}, J) as progress:
    done, costate, scores = progress.restore(costate)
    del starts[len(starts) - done:]
    while starts:
      steps = segments[len(starts) - 1]
      costate, scored, trace = costates.backward(problem, T, starts.pop(), costate, steps, rows(steps), dev)
      parts = [np.asarray(costates.score(problem, T, scored, group)) for group in proxies]
      if scores and [x.shape for x in scores] != [x.shape for x in parts]:
        raise ValueError(f'proxy_batches held {sum(x.size for x in scores)} examples when last read and '
                         f'{sum(x.size for x in parts)} now; want the same batches each time')
      scores = [np.add(*pair) for pair in zip(scores, parts)] if scores else parts
      taken = (0 < steps) & (steps < T)
      report({'step': steps[taken]} | {name: np.asarray(values)[taken] for name, values in trace.items()})
      progress.save(len(segments) - len(starts), costate, scores)
  scores_N = np.concatenate([part.ravel() for part in scores])
  if not np.isfinite(scores_N).all():
    raise FloatingPointError(f'{np.sum(~np.isfinite(scores_N))} of {len(scores_N)} scores are not finite: the training '
                             'diverges (lower learning_rate), or the optimiser has no derivative (Adam needs eps_root)')
  return scores_N


class _Progress:
  """What `solve` has done, kept in a folder after each segment; nothing without one."""

  def __init__(self, directory: pathlib.Path | None, settings: dict, J: jax.Array):
    self._checkpoints = None if directory is None else Checkpoints(pathlib.Path(directory), keep=2)
    self._problem = settings if directory is None else settings | {'final_dev_loss': float(J)}

  def __enter__(self) -> '_Progress':
    return self

  def __exit__(self, *exception: Any) -> None:
    if self._checkpoints is not None:
      self._checkpoints.close()

  def restore(self, costate: costates.Costate) -> tuple[int, costates.Costate, list[np.ndarray]]:
    """(segments that are done, co-state, scores so far); (0, costate, []) at the beginning."""
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                            _as_state(0, costate))
    found = self._checkpoints and self._checkpoints.restore(abstract)
    if not found:
      return 0, costate, []
    done, state, kept = found
    there, here = kept['problem'], self._problem
    if any(there[name] != here[name] and not math.isclose(there[name], here[name], rel_tol=1e-3) for name in here):
      raise ValueError(f'the directory holds the scores of another problem: {there} there, {here} here; give another')
    logging.info('going on after %d segments', done)
    scores = [np.asarray(x, kept['dtype']).reshape(shape) for x, shape in zip(kept['scores'], kept['shapes'])]
    return done, costates.Costate(state.params, state.opt_state), scores

  def save(self, done: int, costate: costates.Costate, scores: list[np.ndarray]) -> None:
    if self._checkpoints is not None:
      self._checkpoints.save(done, _as_state(done, costate), {
        'problem': self._problem, 'dtype': str(scores[0].dtype), 'shapes': [x.shape for x in scores],
        'scores': [x.ravel().tolist() for x in scores]})


def _as_state(done: int, costate: costates.Costate) -> State:
  return State(jnp.asarray(done, jnp.int32), costate.params, costate.moments)


def _places(params: Tree) -> tuple | None:
  """The shardings of params' leaves, where they lie on a mesh."""
  shardings = tuple(getattr(x, 'sharding', None) for x in jax.tree.leaves(params))
  return shardings if all(isinstance(s, jax.sharding.NamedSharding) for s in shardings) else None


def _rate(learning_rate: float | Iterable[float] | optax.Schedule, T: int) -> float | tuple[float, ...] | Callable:
  if callable(learning_rate) or np.ndim(learning_rate) == 0:
    return learning_rate if callable(learning_rate) else float(learning_rate)
  if np.shape(learning_rate) != (T,):
    raise ValueError(f'learning_rate has shape {np.shape(learning_rate)}; want a number, or one for each of {T} steps')
  return tuple(map(float, learning_rate))
