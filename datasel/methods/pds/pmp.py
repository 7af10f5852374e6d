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
sqrt(T).  Works on any model: params is any tree of floating arrays, sharded as it likes over
axes of AxisType.Auto, of one process or several, each of which gets all scores.  Call it inside `sharding.use` where
the model needs that.  Scores and grad J are added up in float32 or wider; co-states have params' dtypes.
"""

import hashlib
import logging
import math
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from datasel import autodiff
from datasel.checkpoint import Checkpoints
from datasel.methods.pds import costates
from datasel.methods.pds.batches import Checksum, Groups, check_meshes, checksums
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
  directory: progress is kept there at every segment.  A call with the same arguments goes on from it, on any mesh, with
    any number of processes, microbatches and rows in a batch of proxies or dev_batches; with others it is refused.
  report: called after each segment, from the last to the first, with numpy arrays {'step': t, 'dev_loss': J(theta_t),
    'costate_norm': |lambda_t|} of its steps, t from 1 to T in all.

  Raises FloatingPointError as soon as J(theta_T), a co-state or a score is not finite.
  """
  if derivatives not in ('exact', 'finite_difference') or normalize and derivatives != 'exact':
    raise ValueError(f"derivatives {derivatives!r}, normalize {normalize}; want 'exact', or 'finite_difference' "
                     'without normalize')
  autodiff.check_floating(params)
  check_meshes(params, 'params')
  T, B = Groups(train_batches, train_batches, 'train_batches').shape
  if not isinstance(score_stride, int | np.integer) or not 1 <= score_stride <= T:
    raise ValueError(f'score_stride is {score_stride}; want a whole number from 1 to the {T} steps of train_batches')
  places = _places(params)
  mesh = next((s.mesh for s in _places((params, train_batches)) if s), None)
  problem = costates.Problem(per_example_loss, optimizer, costates.rate(learning_rate, T), int(score_stride), normalize,
                             derivatives, microbatches, places if all(places) else None, mesh)
  dtype = costates.float_dtype(params)
  if weights_TxB is None:
    weights_TxB = np.broadcast_to(np.asarray(1 / B, dtype), (T, B))
  elif not isinstance(weights_TxB, jax.Array):
    weights_TxB = np.asarray(weights_TxB, dtype)
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
  T = train[0].shape[0]
  K = max(1, round(math.sqrt(T)))
  segments = [np.arange(first, first + K, dtype=np.int32) for first in range(0, T, K)]
  rows = lambda steps: jax.tree.map(lambda x: x[np.minimum(steps, T - 1)], train)  # those beyond T are not taken

  state = costates.initial(problem, params)
  starts = []
  for steps in segments:
    starts.append(state)
    state = jax.block_until_ready(costates.forward(problem, T, state, steps, rows(steps)))
  costate, trace = costates.final_costate(problem, state, dev)
  del state
  trace = {'step': np.array([T])} | {name: np.asarray(value)[None] for name, value in trace.items()}
  _check_finite(trace)
  identity = {} if directory is None else _identity(problem, params, map(rows, segments), dev, T)
  with _Progress(directory, identity, problem.mesh, trace['dev_loss'].item()) as progress:
    done, costate, scores_N, seen = progress.restore(costate, proxies)
    report(trace)
    del starts[len(starts) - done:]
    while starts:
      steps = segments[len(starts) - 1]
      costate, scored, trace = costates.backward(problem, T, starts.pop(), costate, steps, rows(steps), dev)
      taken = (0 < steps) & (steps < T)
      trace = {'step': steps[taken]} | {name: np.asarray(values)[taken] for name, values in trace.items()}
      _check_finite(trace)
      if np.any((steps % problem.score_stride == 0) & (steps < T)):
        read, parts = Checksum(), []
        for group in proxies:
          part, words = costates.score(problem, scored, group, read.rows)
          read.add(group, words)
          parts.append(np.asarray(part).ravel())
        if seen not in (None, read.found):
          raise ValueError(f'proxy_batches held {seen[0]} examples when last read and {read.found[0]} now, or others; '
                           'want the same ones each time')
        seen = read.found
        scores_N = np.concatenate(parts) + (0 if scores_N is None else scores_N)
        _check_finite({'scores': scores_N} | trace)
      report(trace)
      progress.save(len(segments) - len(starts), costate, scores_N, seen)
  return scores_N


def _check_finite(values: dict[str, np.ndarray]) -> None:
  for name, x in values.items():
    if not np.isfinite(x).all():
      raise FloatingPointError(f'{np.sum(~np.isfinite(x))} of {x.size} {name} are not finite: the training diverges '
                               '(lower learning_rate), or the optimiser has no derivative (Adam needs eps_root)')


def _identity(problem: costates.Problem, params: Tree, train: Iterable[Tree], dev: list[Tree], T: int) -> dict:
  """What scores depend on, as JSON, but for the loss function and the proxies."""
  rate = problem.learning_rate
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), params)
  update = str(jax.make_jaxpr(problem.tx.update)(abstract, jax.eval_shape(problem.tx.init, abstract), abstract))
  return {
    'T': T, 'score_stride': problem.score_stride, 'normalize': problem.normalize, 'derivatives': problem.derivatives,
    'learning_rate': np.broadcast_to(jax.vmap(rate)(np.arange(T)) if callable(rate) else rate, T).tolist(),
    'optimizer': hashlib.sha256(re.sub(' at 0x[0-9a-f]+', '', update).encode()).hexdigest(),
    'params': np.asarray(checksums(params, 0)).tolist(), 'train_batches or weights_TxB': Checksum(train).found,
    'dev_batches': Checksum(dev).found}


class _Progress:
  """What `solve` has done, kept in a folder after each segment; nothing without one."""

  def __init__(self, directory: pathlib.Path | None, identity: dict, mesh: jax.sharding.Mesh | None, dev_loss: float):
    self._checkpoints = None if directory is None else Checkpoints(pathlib.Path(directory), keep=2)
    self._identity, self._mesh, self._dev_loss = identity, mesh, dev_loss

  def __enter__(self) -> '_Progress':
    return self

  def __exit__(self, *exception: Any) -> None:
    if self._checkpoints is not None:
      self._checkpoints.close()

  def restore(self, costate: costates.Costate,
              proxies: Groups) -> tuple[int, costates.Costate, np.ndarray | None, list[int] | None]:
    """(segments that are done, co-state, scores so far, checksum of the proxies they are of); at the beginning
    (0, costate, None, None)."""
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                            self._state(0, costate))
    found = self._checkpoints and self._checkpoints.restore(abstract)
    if not found:
      return 0, costate, None, None
    done, state, kept = found
    there = kept.get('identity', {})
    differ = [name for name, value in self._identity.items() if there.get(name) != value]
    # Another mesh adds up in another order, so this one is near; it stands for the loss function.
    if not differ and not math.isclose(kept['dev_loss'], self._dev_loss, rel_tol=1e-4):
      differ = [f'J(theta_T), {kept["dev_loss"]} there, {self._dev_loss} here']
    if not differ and kept['proxies'] is not None and kept['proxies'] != Checksum(proxies).found:
      differ = ['proxy_batches']
    if differ:
      raise ValueError(f'the directory holds the scores of another problem, which differs in {", ".join(differ)}; give '
                       'another directory, or delete it')
    logging.info('going on after %d segments', done)
    scores_N = None if kept['proxies'] is None else np.asarray(kept['scores'], kept['dtype'])
    return done, costates.Costate(state.params, state.opt_state), scores_N, kept['proxies']

  def save(self, done: int, costate: costates.Costate, scores_N: np.ndarray | None, proxies: list[int] | None) -> None:
    if self._checkpoints is not None:
      scores = {} if scores_N is None else {'dtype': str(scores_N.dtype), 'scores': scores_N.tolist()}
      self._checkpoints.save(done, self._state(done, costate), scores | {
        'identity': self._identity, 'dev_loss': self._dev_loss, 'proxies': proxies})

  def _state(self, done: int, costate: costates.Costate) -> State:
    step = np.int32(done)
    place = self._mesh and jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
    return State(jax.device_put(step, place), costate.params, costate.moments)


def _places(tree: Tree) -> tuple:
  """The shardings of the leaves, None of one that lies on no mesh."""
  shardings = (getattr(x, 'sharding', None) for x in jax.tree.leaves(tree))
  return tuple(s if isinstance(s, jax.sharding.NamedSharding) else None for s in shardings)
