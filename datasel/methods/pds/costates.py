"""Pontryagin's conditions as compiled programs: training forward, co-states backward, scores (see pmp.py)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from datasel import autodiff

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

  @property
  def tx(self) -> optax.GradientTransformation:
    rate = self.learning_rate
    return self.optimizer((lambda count: jnp.asarray(rate)[count]) if isinstance(rate, tuple) else rate)

  def pin(self, tree: Tree) -> Tree:
    """A tree like params, laid out like params."""
    if self.places is None:
      return tree
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(map(jax.lax.with_sharding_constraint, leaves, self.places))

  def grad(self, params: Tree, weights_B: jax.Array, batch: Tree) -> Tree:
    _, grad = autodiff.first_order(self.per_example_loss, params, weights_B, batch, microbatches=self.microbatches)
    return self.pin(optax.tree.cast_like(grad, params))

  def hvp(self, params: Tree, direction: Tree, weights_B: jax.Array, batch: Tree) -> Tree:
    if self.derivatives == 'exact':
      product = autodiff.second_order(self.per_example_loss, params, direction, weights_B, batch,
                                      microbatches=self.microbatches).hvp
      return self.pin(optax.tree.cast_like(product, params))
    return _central_difference(lambda p: self.grad(p, weights_B, batch), params, direction)

  def dev(self, params: Tree, dev: list[Tree]) -> tuple[jax.Array, Tree]:
    """(J, grad J)."""
    total, count = (jnp.zeros(()), optax.tree.zeros_like(params)), 0
    for group in dev:
      n, B = jax.tree.leaves(group)[0].shape[:2]
      count += n * B

      def add(total, batch, B=B):
        losses_B, grad = autodiff.first_order(self.per_example_loss, params, jnp.ones(B), batch)
        return (total[0] + losses_B.sum(), self.pin(optax.tree.add(total[1], optax.tree.cast_like(grad, params)))), None

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
    return Costate(self.pin(before), to_moments), direction, J


def _states(problem: Problem, T: int, state: tuple, steps_K: jax.Array, train_K: tuple) -> tuple[tuple, tuple]:
  """K steps of training from `state`: (the state after them, the K states before each)."""

  def body(state, x):
    t, (weights_B, batch) = x
    return jax.lax.cond(t < T, lambda s: problem.step(s, weights_B, batch), lambda s: s, state), state

  return jax.lax.scan(body, state, (steps_K, train_K))


@functools.partial(jax.jit, static_argnums=(0, 1))
def forward(*arguments) -> tuple:
  """The state after K steps."""
  return _states(*arguments)[0]


@functools.partial(jax.jit, static_argnums=0)
def final_costate(problem: Problem, state: tuple, dev: list[Tree]) -> tuple[Costate, jax.Array]:
  """(that of T, J(theta_T))"""
  params, opt_state = state
  J, grad = problem.dev(params, dev)
  return Costate(grad, optax.tree.zeros_like(_split(opt_state)[0])), J


@functools.partial(jax.jit, static_argnums=(0, 1))
def backward(problem: Problem, T: int, start: tuple, costate: Costate, steps_K: jax.Array, train_K: tuple,
             dev: list[Tree]) -> tuple[Costate, tuple, dict]:
  """One segment back: (the co-state of its first step, (t, theta_t, direction) of its scored steps, its trace)."""
  _, states_K = _states(problem, T, start, steps_K, train_K)
  directions = problem.pin(optax.tree.zeros_like(start[0]))

  def body(carry, x):
    t, state, (weights_B, batch) = x
    beyond = lambda: (*carry, jnp.zeros(()))
    first = lambda: problem.step_back(carry[0], state, weights_B, batch, None)  # whose co-state nobody asks for
    inside = lambda: problem.step_back(carry[0], state, weights_B, batch, dev)
    *carry, J = jax.lax.cond(t >= T, beyond, lambda: jax.lax.cond(t == 0, first, inside))
    return tuple(carry), {'dev_loss': J, 'costate_norm': autodiff.tree_norm(carry[0].params)}

  def group(costate, x):
    """Of score_stride steps, the first of which is scored."""
    (costate, direction), trace = jax.lax.scan(body, (costate, directions), x, reverse=True)
    return costate, (direction, trace)

  split = lambda x: x.reshape(-1, problem.score_stride, *x.shape[1:])
  steps, states, train = jax.tree.map(split, (steps_K, states_K, train_K))
  costate, (directions, trace) = jax.lax.scan(group, costate, (steps, states, train), reverse=True)
  thetas = jax.tree.map(lambda x: x[:, 0], states[0])
  return costate, (steps[:, 0], thetas, directions), jax.tree.map(jnp.ravel, trace)


@functools.partial(jax.jit, static_argnums=(0, 1))
def score(problem: Problem, T: int, scored: tuple, batches: Tree) -> jax.Array:
  """n x B: the sum over the scored steps of direction . grad l_n, or of its cosine."""
  loss = problem.per_example_loss
  if problem.normalize:
    each = _cosines
  elif problem.derivatives == 'exact':
    each = lambda loss, params, direction, batch: autodiff.directional_derivatives(loss, params, direction, batch)[1]
  else:
    each = lambda loss, params, direction, batch: _central_difference(lambda p: loss(p, batch), params, direction)

  def batch_scores(_, batch):
    def add(total_B, x):
      t, params, direction = x
      return jax.lax.cond(t < T, lambda: total_B + each(loss, params, direction, batch), lambda: total_B), None

    losses_B = jax.eval_shape(loss, params, batch)
    return None, jax.lax.scan(add, jnp.zeros(losses_B.shape, losses_B.dtype), scored)[0]

  params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), scored[1])
  return jax.lax.scan(batch_scores, None, batches)[1]


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


def float_dtype(params: Tree) -> np.dtype:
  return jnp.result_type(jnp.float32, *jax.tree.leaves(params))
