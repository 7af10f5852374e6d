"""Derivatives that choosing data needs, of any loss in plain JAX: Hessian-vector products, and each example's part.

Everything here is forward-mode AD over at most one reverse pass, so it costs a few gradients whatever the number of
examples, and it goes through `jit`, `scan`, `checkpoint`, `vmap` and sharded arrays.  What it can't go through is a
`jax.custom_vjp` (most fused attention kernels are one): choose an attention that has tangents.

`params` is any tree of floating arrays.  A direction is a tree of the same structure, shapes and dtypes; anything else
is a ValueError that names the leaf.  Trees are added and scaled with `optax.tree`; here is only what it has not.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Tree = Any  # nested containers of arrays


class SecondOrder(NamedTuple):
  """What `second_order` finds out about sum_n weights_n * loss_n(params)."""

  losses_B: jax.Array  # loss_n
  grad: Tree  # sum_n weights_n * grad loss_n; as params, in float32 or wider
  hvp: Tree  # (sum_n weights_n * Hessian of loss_n) . direction; likewise
  derivatives_B: jax.Array  # direction . grad loss_n


def hvp(loss: Callable, params: Tree, tangent: Tree, *args: Any, has_aux: bool = False) -> Any:
  """Hessian of `loss(params, *args)` at params, times tangent: a tree of params' structure, shapes and dtypes.

  loss returns a scalar, or (scalar, aux) with has_aux; then the result is (product, aux).  Forward over reverse, which
  keeps the least memory of the three ways and never transposes a tangent.
  """
  _check_direction(params, tangent, 'tangent')
  gradient = lambda p: jax.grad(loss, has_aux=has_aux)(p, *args)
  if has_aux:
    _, product, aux = jax.jvp(gradient, (params,), (tangent,), has_aux=True)
    return product, aux
  return jax.jvp(gradient, (params,), (tangent,))[1]


def directional_derivatives(per_example_loss: Callable, params: Tree, direction: Tree,
                            *args: Any) -> tuple[jax.Array, jax.Array]:
  """(losses_B, derivatives_B): the loss of each example, and direction . grad of it, for all B in one forward pass.

  per_example_loss(params, *args) returns a vector, one loss for each example.  No gradient of an example is ever
  stored: memory is that of a forward pass twice.
  """
  _check_direction(params, direction, 'direction')
  losses = lambda p: _checked(per_example_loss(p, *args))
  return jax.jvp(losses, (params,), (direction,))


def first_order(per_example_loss: Callable, params: Tree, weights_B: jax.Array, batch: Tree, *,
                microbatches: int = 1) -> tuple[jax.Array, Tree]:
  """(losses_B, sum_n weights_n * grad loss_n): what `second_order` gives without a direction, arguments as there."""
  weights_B = jnp.asarray(weights_B)
  _check_rows(weights_B, batch, microbatches)

  def part(rows):
    grad, losses_B = jax.grad(_weighted(per_example_loss, *rows), has_aux=True)(params)
    return _widened(grad), losses_B

  grad, losses_B = _in_parts(part, (weights_B, batch), microbatches)
  return losses_B, grad


def second_order(per_example_loss: Callable, params: Tree, direction: Tree, weights_B: jax.Array, batch: Tree, *,
                 microbatches: int = 1) -> SecondOrder:
  """Losses, weighted gradient, its Hessian-vector product and every example's directional derivative, in one pass.

  per_example_loss(params, batch) -> losses_B.  batch is a tree of arrays of B rows; weights_B multiplies the losses and
  is not normalised.  The same numbers as `jax.grad`, `hvp` and `directional_derivatives` of the parts, but cheaper:
  one forward-mode derivative of a gradient that carries its losses along.

  microbatches > 1 takes the rows in so many parts, one after another (it must divide B), at the memory of one part.
  The parts are added in float32, or in params' dtype where that is wider.  bfloat16 params work, but each part's
  gradient then has their 8 bits: keep parameters in float32 and compute in bfloat16 instead.
  """
  _check_direction(params, direction, 'direction')
  weights_B = jnp.asarray(weights_B)
  _check_rows(weights_B, batch, microbatches)

  def part(rows):
    with_losses = jax.grad(_weighted(per_example_loss, *rows), has_aux=True)
    (grad, losses_B), (product, derivatives_B) = jax.jvp(with_losses, (params,), (direction,))
    return _widened((grad, product)), (losses_B, derivatives_B)

  (grad, product), (losses_B, derivatives_B) = _in_parts(part, (weights_B, batch), microbatches)
  return SecondOrder(losses_B, grad, product, derivatives_B)


def _in_parts(part: Callable[[Tree], tuple[Tree, Tree]], rows: Tree, n: int) -> tuple[Tree, Tree]:
  """part(rows) -> (sums, one entry for each row), of n parts one after another."""
  if n == 1:
    return part(rows)
  # Part i takes rows i, i + n, ...: every part lies on all devices of a sharded batch.
  parts = jax.tree.map(lambda x: x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1), rows)
  zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(part, jax.tree.map(lambda x: x[0], parts))[0])

  def add(total, rows):
    sums, each = part(rows)
    return jax.tree.map(jnp.add, total, sums), each

  total, each = jax.lax.scan(add, zeros, parts)
  return total, jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1), each)


def _weighted(per_example_loss: Callable, weights_B: jax.Array, batch: Tree) -> Callable:
  """params -> (sum_n weights_n * loss_n, losses_B)"""

  def loss(params):
    losses_B = _checked(per_example_loss(params, batch))
    if losses_B.shape != weights_B.shape:
      raise ValueError(f'per_example_loss returned {losses_B.shape[0]} losses for {weights_B.shape[0]} rows; want one '
                       'for each')
    return (weights_B * losses_B).sum(), losses_B

  return loss


def _widened(tree: Tree) -> Tree:
  return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def tree_vdot(a: Tree, b: Tree) -> jax.Array:
  """Inner product of two trees of real arrays of equal structure and shapes: a scalar, float32 or wider.

  Unlike optax.tree.vdot it sums bfloat16 in float32, and it flattens no array, which would gather a sharded one.
  """
  _check_like(a, b, 'b', dtypes=False)

  def dot(x, y):
    dtype = jnp.promote_types(jnp.result_type(x, y), jnp.float32)
    return (jnp.asarray(x, dtype) * jnp.asarray(y, dtype)).sum()

  return sum(jax.tree.leaves(jax.tree.map(dot, a, b)), start=jnp.zeros((), jnp.float32))


def tree_norm(a: Tree) -> jax.Array:
  """Euclidean norm of a tree of real arrays, as `tree_vdot`."""
  return jnp.sqrt(tree_vdot(a, a))


def check_floating(params: Tree) -> None:
  """Raises ValueError naming a leaf that can't be differentiated by."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
      raise ValueError(f'params{jax.tree_util.keystr(path)} is {jnp.result_type(leaf)}; want floating arrays only: '
                       'keep counters out of what is differentiated')


def _check_direction(params: Tree, direction: Tree, name: str) -> None:
  check_floating(params)
  _check_like(params, direction, name, dtypes=True)


def _check_like(tree: Tree, other: Tree, name: str, *, dtypes: bool) -> None:
  """`other` must have tree's structure and shapes, and its dtypes if asked."""
  if jax.tree.structure(tree) != jax.tree.structure(other):
    paths, others = ({jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(t)}
                     for t in (tree, other))
    what = ([f'{name} has no {path}' for path in sorted(paths - others)]
            + [f'{name}{path} has no counterpart' for path in sorted(others - paths)]
            or [f'its containers are {jax.tree.structure(other)}, want {jax.tree.structure(tree)}'])
    raise ValueError(f'{name} is not a tree of the same structure: {"; ".join(what)}')
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(other)):
    where = f'{name}{jax.tree_util.keystr(path)}'
    if jnp.shape(x) != jnp.shape(y):
      raise ValueError(f'{where} has shape {jnp.shape(y)}, want {jnp.shape(x)}')
    if dtypes and jnp.result_type(x) != jnp.result_type(y):
      raise ValueError(f'{where} is {jnp.result_type(y)}, want {jnp.result_type(x)} as the parameter; '
                       'optax.tree.cast_like(direction, params) casts it')


def _check_rows(weights_B: jax.Array, batch: Tree, microbatches: int) -> None:
  if weights_B.ndim != 1:
    raise ValueError(f'weights_B has shape {weights_B.shape}; want a vector, one weight for each row of the batch')
  B = weights_B.shape[0]
  for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
    if jnp.shape(leaf)[:1] != (B,):
      raise ValueError(f'batch{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}; want {B} rows, as in weights_B')
  if not isinstance(microbatches, int) or microbatches < 1 or B % microbatches:
    raise ValueError(f'{microbatches!r} micro-batches do not divide the batch of {B} rows; choose a divisor of it')


def _checked(losses_B: jax.Array) -> jax.Array:
  if jnp.ndim(losses_B) != 1:
    raise ValueError(f'per_example_loss returned shape {jnp.shape(losses_B)}; want a vector, one loss for each '
                     'example, neither summed nor averaged over them')
  return losses_B
