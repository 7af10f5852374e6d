"""Pontryagin's conditions as compiled programs: training forward, co-states backward, scores (see pmp.py)."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from datasel import autodiff
from datasel.methods.pds.batches import checksums

Tree = Any  # nested containers of arrays
PerExampleLoss = Callable[[Tree, Tree], jax.Array]  # (params, batch) -> loss_B, nats


class Costate(NamedTuple):
  """d (sum of J from here on) / d state."""

  params: Tree
  moments: list[jax.Array]  # of the optimiser's floating arrays


@dataclasses.dataclass(frozen=True)
class Problem:
  """What the compiled programs depend on, beside the shapes of their arguments."""

  per_example_loss: PerExampleLoss
  optimizer: Callable[..., optax.GradientTransformation]
  learning_rate: float | tuple[float, ...] | Callable
  score_stride: int
  normalize: bool
  derivatives: str
  microbatches: int
  places: tuple | None  # shardings of params' leaves
  mesh: jax.sharding.Mesh | None  # that arrays lie on

  @property
  def tx(self) -> optax.GradientTransformation:
    rate = self.learning_rate
    return self.optimizer((lambda count: jnp.asarray(rate)[count]) if isinstance(rate, tuple) else rate)

  def pin(self, tree: Tree, stacked: int = 0) -> Tree:
    """A tree like params, laid out like params, with so many axes before theirs."""
    if self.places is None:
      return tree
    leaves, structure = jax.tree.flatten(tree)
    places = [NamedSharding(s.mesh, PartitionSpec(*[None] * stacked, *s.spec)) for s in self.places]
    return structure.unflatten(map(jax.lax.with_sharding_constraint, leaves, places))

  def everywhere(self, tree: Tree) -> Tree:
    """Whole on every device, so that each of several processes can read it."""
    if self.mesh is None:
      return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, PartitionSpec()))

  def grad(self, params: Tree, weights_B: jax.Array, batch: Tree) -> Tree:
    _, grad = autodiff.first_order(self.per_example_loss, params, weights_B, batch, microbatches=self.microbatches)
    return self.pin(optax.tree.cast_like(grad, params))

  def hvp(self, params: Tree, direction: Tree, weights_B: jax.Array, batch: Tree) -> Tree:
    """In float32 or wider."""
    if self.derivatives == 'exact':
      return self.pin(autodiff.second_order(self.per_example_loss, params, direction, weights_B, batch,
                                            microbatches=self.microbatches).hvp)
    return _central_difference(lambda p: self.grad(p, weights_B, batch), params, direction)

  def dev(self, params: Tree, dev: list[Tree]) -> tuple[jax.Array, Tree]:
    """(J, grad J), in float32 or wider."""
    wide = lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32))
    total, count = (jnp.zeros(()), jax.tree.map(wide, params)), 0
    for group in dev:
      n, B = jax.tree.leaves(group)[0].shape[:2]
      count += n * B

      def add(total, batch, B=B):
        losses_B, grad = autodiff.first_order(self.per_example_loss, params, jnp.ones(B), batch)
        return (total[0] + losses_B.sum(dtype=total[0].dtype), self.pin(optax.tree.add(total[1], grad))), None

      total, _ = jax.lax.scan(add, total, group)
    return jax.tree.map(lambda x: x / count, total)

  def step(self, state: tuple[Tree, Any], weights_B: jax.Array, batch: Tree) -> tuple[Tree, Any]:
    """(theta_t, optimiser) -> (theta_{t+1}, optimiser)."""
    params, opt_state = state
    updates, opt_state = self.tx.update(self.grad(params, weights_B, batch), opt_state, params)
    return self.pin(optax.apply_updates(params, updates)), opt_state

  def step_back(self, costate: Costate, state: tuple[Tree, Any], weights_B: jax.Array, batch: Tree,
                dev: list[Tree] | None) -> tuple[Costate, Tree, jax.Array]:
    """(co-state of t, direction, J(theta_t)) from that of t + 1.

    direction = -d (sum of J) / d grad L_t: with SGD, eta lambda_{t+1}.  Without `dev` only that is wanted.
    """
    params, opt_state = state
    moments, rebuild = _split(opt_state)

    def update(params, moments, grad):
      updates, opt_state = self.tx.update(grad, rebuild(moments), params)
      return Costate(optax.apply_updates(params, updates), _split(opt_state)[0])

    _, transpose = jax.vjp(update, params, moments, self.grad(params, weights_B, batch))
    to_params, to_moments, to_grad = transpose(costate)
    direction = self.pin(jax.tree.map(jnp.negative, to_grad))
    if dev is None:
      return costate, direction, jnp.zeros(())
    J, grad_J = self.dev(params, dev)
    product = self.hvp(params, direction, weights_B, batch)
    before = jax.tree.map(lambda through, h, own: through - h + own, to_params, product, grad_J)
    return Costate(self.pin(optax.tree.cast_like(before, params)), to_moments), direction, J


def _states(problem: Problem, T: int, state: tuple, steps_K: jax.Array, train_K: tuple) -> tuple[tuple, tuple]:
  """K steps of training from `state`: (the state after them, the K states before each)."""

  def body(state, x):
    t, (weights_B, batch) = x
    return jax.lax.cond(t < T, lambda s: problem.step(s, weights_B, batch), lambda s: s, state), state

  return jax.lax.scan(body, state, (steps_K, train_K))


@functools.partial(jax.jit, static_argnums=0)
def initial(problem: Problem, params: Tree) -> tuple[Tree, Any]:
  """The state before the first step."""
  return problem.pin(params), problem.tx.init(params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def forward(*arguments) -> tuple:
  """The state after K steps."""
  return _states(*arguments)[0]


@functools.partial(jax.jit, static_argnums=0)
def final_costate(problem: Problem, state: tuple, dev: list[Tree]) -> tuple[Costate, dict]:
  """(that of T, its trace)"""
  params, opt_state = state
  J, grad = problem.dev(params, dev)
  costate = Costate(optax.tree.cast_like(grad, params), optax.tree.zeros_like(_split(opt_state)[0]))
  return costate, problem.everywhere({'dev_loss': J, 'costate_norm': autodiff.tree_norm(costate.params)})


@functools.partial(jax.jit, static_argnums=(0, 1))
def backward(problem: Problem, T: int, start: tuple, costate: Costate, steps_K: jax.Array, train_K: tuple,
             dev: list[Tree]) -> tuple[Costate, tuple, dict]:
  """One segment back: (the co-state of its first step, (taken, theta_t, direction) of its scored steps, its trace).

  Steps are scored where the stride divides them, at most S = ceil(K / stride) of a segment's K; only so many directions
  are kept.  taken_S is False where a segment has one fewer, or beyond T.
  """
  _, states_K = _states(problem, T, start, steps_K, train_K)
  params, stride, (K,) = start[0], problem.score_stride, steps_K.shape
  first = -(-steps_K[0] // stride)  # scored steps before this segment
  scored_S = (first + jnp.arange(-(-K // stride))) * stride
  taken_S = (scored_S <= steps_K[-1]) & (scored_S < T)

  def body(carry, x):
    costate, directions = carry
    t, state, (weights_B, batch) = x
    beyond = lambda: (costate, optax.tree.zeros_like(params), jnp.zeros(()))
    zeroth = lambda: problem.step_back(costate, state, weights_B, batch, None)  # whose co-state nobody asks for
    inside = lambda: problem.step_back(costate, state, weights_B, batch, dev)
    costate, direction, J = jax.lax.cond(t >= T, beyond, lambda: jax.lax.cond(t == 0, zeroth, inside))

    def keep(kept, new):
      slot = jnp.maximum(t // stride - first, 0)
      old = jax.lax.dynamic_index_in_dim(kept, slot, keepdims=False)
      return jax.lax.dynamic_update_index_in_dim(kept, jnp.where(t % stride == 0, new, old), slot, 0)

    directions = problem.pin(jax.tree.map(keep, directions, direction), stacked=1)
    return (costate, directions), {'dev_loss': J, 'costate_norm': autodiff.tree_norm(costate.params)}

  none = problem.pin(jax.tree.map(lambda p: jnp.zeros((len(scored_S), *p.shape), p.dtype), params), stacked=1)
  (costate, directions), trace = jax.lax.scan(body, (costate, none), (steps_K, states_K, train_K), reverse=True)
  places_S = jnp.clip(scored_S - steps_K[0], 0, K - 1)
  thetas = problem.pin(jax.tree.map(lambda x: x[places_S], states_K[0]), stacked=1)
  return costate, (taken_S, thetas, directions), problem.everywhere(trace)


@functools.partial(jax.jit, static_argnums=0)
def score(problem: Problem, scored: tuple, batches: Tree, first_row: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(n x B: the sum over the scored steps of direction . grad l_n, or of its cosine; `checksums` of the batches)."""
  loss = problem.per_example_loss
  if problem.normalize:
    each = _cosines
  elif problem.derivatives == 'exact':
    each = lambda loss, params, direction, batch: autodiff.directional_derivatives(loss, params, direction, batch)[1]
  else:
    each = lambda loss, params, direction, batch: _central_difference(lambda p: loss(p, batch), params, direction)

  def batch_scores(_, batch):
    def add(total_B, x):
      taken, params, direction = x
      more = lambda: total_B + each(loss, params, direction, batch).astype(total_B.dtype)
      return jax.lax.cond(taken, more, lambda: total_B), None

    losses_B = jax.eval_shape(loss, params, batch)
    zeros_B = jnp.zeros(losses_B.shape, jnp.promote_types(losses_B.dtype, jnp.float32))
    return None, jax.lax.scan(add, zeros_B, scored)[0]

  params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), scored[1])
  return problem.everywhere((jax.lax.scan(batch_scores, None, batches)[1], checksums(batches, first_row)))


def _cosines(loss: PerExampleLoss, params: Tree, direction: Tree, batch: Tree) -> jax.Array:
  """cos(direction, grad l_n) of each example, 0 where a gradient is 0."""
  length = autodiff.tree_norm(direction)

  def one(row):
    grad = jax.grad(lambda p: loss(p, jax.tree.map(lambda x: x[None], row))[0])(params)
    scale = length * autodiff.tree_norm(grad)
    return autodiff.tree_vdot(direction, grad) / jnp.where(scale > 0, scale, 1)

  return jax.lax.map(one, batch)


def _central_difference(function: Callable[[Tree], Tree], params: Tree, direction: Tree) -> Tree:
  """The derivative of function(params) along direction, from two values: as exact as third roots of rounding."""
  dtype = float_dtype(params)
  step = jnp.finfo(dtype).eps ** (1 / 3) * jnp.maximum(autodiff.tree_norm(params), 1)
  scale = step / jnp.maximum(autodiff.tree_norm(direction), jnp.finfo(dtype).tiny)
  at = lambda sign: function(jax.tree.map(lambda p, d: p + (sign * scale).astype(p.dtype) * d, params, direction))
  return jax.tree.map(lambda a, b: (a - b) / (2 * scale).astype(a.dtype), at(1), at(-1))


def _split(opt_state: Any) -> tuple[list[jax.Array], Callable[[list], Any]]:
  """An optimiser's floating arrays, and what puts others in their place."""
  leaves, structure = jax.tree.flatten(opt_state)
  floating = [jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in leaves]

  def rebuild(moments):
    moments = iter(moments)
    return structure.unflatten([next(moments) if f else x for f, x in zip(floating, leaves)])

  return [x for f, x in zip(floating, leaves) if f], rebuild


def rate(learning_rate: float | Iterable[float] | optax.Schedule, T: int) -> float | tuple[float, ...] | Callable:
  """The learning rate as a `Problem` has it: a number, T numbers, or a schedule."""
  if callable(learning_rate):
    return learning_rate
  if isinstance(learning_rate, Iterable) and not hasattr(learning_rate, '__array__'):
    learning_rate = list(learning_rate)
  if np.ndim(learning_rate) == 0:
    return float(learning_rate)
  if np.shape(learning_rate) != (T,):
    raise ValueError(f'learning_rate has shape {np.shape(learning_rate)}; want a number, or one for each of {T} steps')
  return tuple(map(float, learning_rate))


def float_dtype(params: Tree) -> np.dtype:
  return jnp.result_type(jnp.float32, *jax.tree.leaves(params))
