"""Attention on a real GPU: every kernel against the float32 reference, compiled, not interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_laws import FIRST, FORWARD, SECOND, assert_close, everything, inputs

from datasel.attention import attention, cudnn
from datasel.attention.shapes import CASES

SIZES = [(name, 'small') for name in CASES] + [('packed', 'medium'), ('window', 'medium'), ('grouped', 'medium')]


def run(implementation, case, operands, size):
  return jax.jit(functools.partial(everything, functools.partial(
    attention, mask=case.mask(size), implementation=implementation)))(*operands)


@pytest.mark.parametrize('implementation', ['pallas', 'blockwise'])
@pytest.mark.parametrize(('name', 'size'), SIZES)
def test_float32_equals_the_reference(name, size, implementation):
  operands = inputs(CASES[name], size=size)
  ours, want = (run(which, CASES[name], operands, size) for which in (implementation, 'reference'))
  for one, other, tolerance in zip((*ours[0], *ours[1]), (*want[0], *want[1]), (FORWARD, FIRST, FIRST, SECOND)):
    assert_close(one, other, tolerance, name)


@pytest.mark.parametrize('implementation', ['pallas', 'auto', 'blockwise'])
@pytest.mark.parametrize(('name', 'size'), SIZES)
def test_bfloat16_errs_no_more_than_the_reference_in_bfloat16(name, size, implementation):
  case = CASES[name]
  exact = run('reference', case, inputs(case, size=size), size)
  coarse = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), x) for x in inputs(case, size=size)]
  results = [run(which, case, coarse, size) for which in (implementation, 'reference')]
  for ours, theirs, want in zip(*map(jax.tree.leaves, (*results, exact)), strict=True):
    our_error, their_error = (np.linalg.norm(np.asarray(x, np.float32) - want) for x in (ours, theirs))
    assert our_error < 1.5 * their_error + 2e-3 * np.linalg.norm(want)


@pytest.mark.parametrize('name', CASES)
def test_cudnn_equals_the_reference_where_it_serves(name):
  case = CASES[name]
  q, k, v = case.inputs('bfloat16')
  mask = case.mask()
  refusal = cudnn.refusal(mask.causal, mask.window, q, mask.segment_BxL is not None)
  if refusal:
    with pytest.raises(ValueError, match='cudnn'):
      attention(q, k, v, mask, implementation='cudnn')
    return

  def gradients(which):
    return jax.jit(jax.value_and_grad(
      lambda *x: jnp.square(attention(*x, mask, implementation=which).astype(jnp.float32)).sum(), (0, 1, 2)))(q, k, v)

  assert_close(gradients('cudnn'), gradients('reference'), 3e-2, name)


def test_the_log_sums_of_cudnn_are_natural_logarithms_of_scaled_scores():
  """Our tangent kernels go on from them."""
  case = CASES['grouped']
  q, k, v = case.inputs('bfloat16')
  _, lse = cudnn.forward(True, None, {'q': q, 'k': k, 'v': v}, None, interpret=False)
  k32 = jnp.repeat(k, q.shape[2] // k.shape[2], 2).astype(jnp.float32)
  scores = jnp.einsum('blhd,bmhd->bhlm', q.astype(jnp.float32), k32, precision='highest') * q.shape[-1]**-0.5
  seen = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None], scores, -jnp.inf)
  np.testing.assert_allclose(lse, jax.nn.logsumexp(seen, -1), atol=2e-2)
