"""What attention's implementations are held to: everything that can be derived of them, against the reference."""

import jax
import numpy as np

from datasel.attention.shapes import Case

# Of the largest value of the reference, float32.
FORWARD, FIRST, SECOND = 2e-6, 2e-5, 1e-4


def everything(f, qkv, qkv_t, do):
  """f's value and gradients, and how both change along qkv_t: the tangent of f, and the Hessian-vector product."""
  def value_and_gradients(*qkv):
    o, pull = jax.vjp(f, *qkv)
    # A pull-back that depends on o, so that the second derivative meets every term.
    return o, pull((do * (1 + o)).astype(o.dtype))
  return jax.jvp(value_and_gradients, qkv, qkv_t)


def inputs(case: Case, dtype: str = 'float32', size: str = 'small'):
  """(q, k, v), their tangents, and a cotangent of the output."""
  return tuple(case.inputs(dtype, size, seed) for seed in (0, 1)) + (case.inputs(dtype, size, 2)[0],)


def assert_close(ours, want, tolerance, name):
  largest = max(np.abs(x).max() for x in jax.tree.leaves(want))
  for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    # A gradient may be exactly zero (a position that sees itself alone): then the others say what is large.
    error = np.abs(one - other).max() / max(np.abs(other).max(), 0.1 * largest)
    assert error <= tolerance, f'{name}: {error:.2e} of the largest value, want {tolerance:.0e}'
