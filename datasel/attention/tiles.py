"""The arithmetic of flash attention: one tile of queries against one tile of keys, in every fast implementation.

A `Pass` owns a tile of queries (or of keys), walks over the tiles of the other side, and carries float32 sums.  Six
passes make four maps: forward, its tangent, backward, and the backward's tangent.  With P = softmax and its row
logarithm of sums lse known, each needs one walk; a dash is a tangent, S the scaled scores, o the output:

  forward            o = sum P v / sum P,  lse
  tangent            o' = sum P S' v + sum P v' - lse' o,                  lse' = sum P S'
  backward           dS = P (do.v - delta),  dq = dS k,  dk = dS^T q,  dv = P^T do,       delta = do.o
  backward tangent   dS' = P' (do.v - delta) + P (do'.v + do.v' - delta'),                P' = P (S' - lse')

Tiles of the query side are Q x Dh, or Q x 1 for one number a row; tiles of the key side are C x Dh; `seen` is Q x C.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from datasel.attention.visible import Visible

# Stands for minus infinity in running maxima: finite, so that an empty row stays free of NaN.
FLOOR = -1e30
VECTORS = ('lse', 'delta', 'lse_t', 'delta_t')  # one float32 number for each query and head, B x H x L

Tiles = dict[str, jax.Array]
Carry = tuple[jax.Array, ...]


class Pass(NamedTuple):
  """One walk: what it owns, reads, carries and gives."""

  owner: str  # 'queries' or 'keys': the side whose tile a program owns; it walks over the other
  queries: tuple[str, ...]  # operands of the query side
  keys: tuple[str, ...]  # operands of the key side
  carry: tuple[tuple[float, bool], ...]  # each float32 sum: its first value, and whether it is as wide as the head
  outputs: tuple[tuple[str, str], ...]  # name, and the operand whose shape and dtype it has; 'lse' for a vector
  products: int  # of one tile with another
  step: Callable[[Carry, Tiles, Tiles, jax.Array, float], Carry]
  finish: Callable[[Carry, Tiles], Carry]

  @property
  def walked(self) -> str:
    return 'keys' if self.owner == 'queries' else 'queries'

  def cost(self, visible: Visible, operands: Tiles) -> pl.CostEstimate:
    """For XLA, which cannot look into a kernel."""
    B, L, H, Dh = operands['q'].shape
    pairs = B * H * L * visible.mean_visible()
    moved = sum(operands[name].nbytes for name in (*self.queries, *self.keys, *(like for _, like in self.outputs
                                                                               if like in operands)))
    return pl.CostEstimate(flops=int(2 * self.products * pairs * Dh), transcendentals=int(pairs), bytes_accessed=moved)

  def start(self, size: int, head_dim: int) -> Carry:
    return tuple(jnp.full((size, head_dim if wide else 1), first, jnp.float32) for first, wide in self.carry)


def _precision(x: jax.Array) -> lax.Precision:
  # Accelerators would round float32 operands to bfloat16 or tf32.
  return lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
  return lax.dot_general(a.astype(b.dtype), b, (((contract[0],), (contract[1],)), ((), ())),
                         precision=_precision(b), preferred_element_type=jnp.float32)


def _pairs(a: jax.Array, b: jax.Array) -> jax.Array:
  """Q x Dh, C x Dh -> Q x C."""
  return _dot(a, b, (1, 1))


def _to_queries(weights: jax.Array, b: jax.Array) -> jax.Array:
  """Q x C, C x Dh -> Q x Dh."""
  return _dot(weights, b, (1, 0))


def _to_keys(weights: jax.Array, a: jax.Array) -> jax.Array:
  """Q x C, Q x Dh -> C x Dh."""
  return _dot(weights, a, (0, 0))


def _forward(carry: Carry, q: Tiles, k: Tiles, seen: jax.Array, scale: float) -> Carry:
  total, top, count = carry
  scores = jnp.where(seen, _pairs(q['q'], k['k']) * scale, FLOOR)
  new_top = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
  weights = jnp.where(seen, jnp.exp(scores - new_top), 0.0)
  shrink = jnp.exp(top - new_top)
  return (total * shrink + _to_queries(weights, k['v']), new_top,
          count * shrink + jnp.sum(weights, axis=1, keepdims=True))


def _finish_forward(carry: Carry, q: Tiles) -> Carry:
  total, top, count = carry
  count = jnp.maximum(count, 1e-30)  # a row that sees nothing: zeros
  return total / count, top + jnp.log(count)


def _softmax(q: Tiles, k: Tiles, seen: jax.Array, scale: float) -> jax.Array:
  return jnp.where(seen, jnp.exp(_pairs(q['q'], k['k']) * scale - q['lse']), 0.0)


def _scores_t(q: Tiles, k: Tiles, scale: float) -> jax.Array:
  if 'both' in q:  # q_t beside q, and k beside k_t: one product instead of two and their sum
    return _pairs(q['both'], k['both']) * scale
  return (_pairs(q['q_t'], k['k']) + _pairs(q['q'], k['k_t'])) * scale


def _tangent(carry: Carry, q: Tiles, k: Tiles, seen: jax.Array, scale: float) -> Carry:
  total, lse_t = carry
  weights = _softmax(q, k, seen, scale)
  weights_s = weights * _scores_t(q, k, scale)
  return (total + _to_queries(weights_s, k['v']) + _to_queries(weights, k['v_t']),
          lse_t + jnp.sum(weights_s, axis=1, keepdims=True))


def _finish_tangent(carry: Carry, q: Tiles) -> Carry:
  total, lse_t = carry
  return total - lse_t * q['o'].astype(jnp.float32), lse_t


def _backward(q: Tiles, k: Tiles, seen: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
  """P and dS, times the scale that S carries."""
  weights = _softmax(q, k, seen, scale)
  return weights, weights * (_pairs(q['do'], k['v']) - q['delta']) * scale


def _backward_queries(carry: Carry, q: Tiles, k: Tiles, seen: jax.Array, scale: float) -> Carry:
  _, scores_d = _backward(q, k, seen, scale)
  return (carry[0] + _to_queries(scores_d, k['k']),)


def _backward_keys(carry: Carry, q: Tiles, k: Tiles, seen: jax.Array, scale: float) -> Carry:
  weights, scores_d = _backward(q, k, seen, scale)
  return carry[0] + _to_keys(scores_d, q['q']), carry[1] + _to_keys(weights, q['do'])


def _backward_tangent(q: Tiles, k: Tiles, seen: jax.Array, scale: float) -> tuple[jax.Array, ...]:
  """P, dS, P', dS'."""
  weights = _softmax(q, k, seen, scale)
  weights_t = weights * (_scores_t(q, k, scale) - q['lse_t'])
  inner = _pairs(q['do'], k['v']) - q['delta']
  inner_t = _pairs(q['do_t'], k['v']) + _pairs(q['do'], k['v_t']) - q['delta_t']
  return weights, weights * inner * scale, weights_t, (weights_t * inner + weights * inner_t) * scale


def _backward_tangent_queries(carry: Carry, q: Tiles, k: Tiles, seen: jax.Array, scale: float) -> Carry:
  _, scores_d, _, scores_dt = _backward_tangent(q, k, seen, scale)
  return (carry[0] + _to_queries(scores_dt, k['k']) + _to_queries(scores_d, k['k_t']),)


def _backward_tangent_keys(carry: Carry, q: Tiles, k: Tiles, seen: jax.Array, scale: float) -> Carry:
  weights, scores_d, weights_t, scores_dt = _backward_tangent(q, k, seen, scale)
  return (carry[0] + _to_keys(scores_dt, q['q']) + _to_keys(scores_d, q['q_t']),
          carry[1] + _to_keys(weights_t, q['do']) + _to_keys(weights, q['do_t']))


def _as_is(carry: Carry, q: Tiles) -> Carry:
  return carry


_SUM, _ROW_SUM = (0.0, True), (0.0, False)
_SECOND_ORDER = ('q', 'lse', 'delta', 'do', 'q_t', 'lse_t', 'delta_t', 'do_t')

FORWARD = Pass('queries', ('q',), ('k', 'v'), (_SUM, (FLOOR, False), _ROW_SUM), (('o', 'q'), ('lse', 'lse')), 2,
               _forward, _finish_forward)
TANGENT = Pass('queries', ('q', 'lse', 'q_t', 'o'), ('k', 'v', 'k_t', 'v_t'), (_SUM, _ROW_SUM),
               (('o_t', 'q'), ('lse_t', 'lse')), 5, _tangent, _finish_tangent)
BACKWARD_QUERIES = Pass('queries', ('q', 'lse', 'delta', 'do'), ('k', 'v'), (_SUM,), (('dq', 'q'),), 3,
                        _backward_queries, _as_is)
BACKWARD_KEYS = Pass('keys', ('q', 'lse', 'delta', 'do'), ('k', 'v'), (_SUM, _SUM), (('dk', 'k'), ('dv', 'v')), 4,
                     _backward_keys, _as_is)
BACKWARD_TANGENT_QUERIES = Pass('queries', _SECOND_ORDER, ('k', 'v', 'k_t', 'v_t'), (_SUM,), (('dq_t', 'q'),), 8,
                                _backward_tangent_queries, _as_is)
BACKWARD_TANGENT_KEYS = Pass('keys', _SECOND_ORDER, ('k', 'v', 'k_t', 'v_t'), (_SUM, _SUM),
                             (('dk_t', 'k'), ('dv_t', 'v')), 10, _backward_tangent_keys, _as_is)
