"""Flash attention against the reference: values, gradients, tangents and Hessian-vector products, over all shapes."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_laws import FIRST, FORWARD, SECOND, assert_close, everything, inputs

from datasel.attention import Mask, attention
from datasel.attention.shapes import CASES, Case

OWN = ('blockwise', 'pallas_tpu', 'pallas_gpu')  # the kernels are interpreted here


@functools.cache
def reference(name: str):
  return jax.jit(functools.partial(everything, functools.partial(
    attention, mask=CASES[name].mask(), implementation='reference')))(*inputs(CASES[name]))


@pytest.mark.parametrize('implementation', OWN)
@pytest.mark.parametrize('name', [name for name in CASES if CASES[name].anchors is None])  # those: anchors_test.py
def test_value_gradient_tangent_and_hessian_product_equal_the_reference(name, implementation):
  case = CASES[name]
  f = functools.partial(attention, mask=case.mask(), implementation=implementation)
  (o, gradients), (o_t, products) = jax.jit(functools.partial(everything, f))(*inputs(case))
  (want_o, want_gradients), (want_o_t, want_products) = reference(name)
  assert_close(o, want_o, FORWARD, 'value')
  assert_close(gradients, want_gradients, FIRST, 'gradient')
  assert_close(o_t, want_o_t, FIRST, 'tangent')
  assert_close(products, want_products, SECOND, 'Hessian-vector product')


@pytest.mark.parametrize('name', ['causal', 'packed', 'window', 'bidirectional', 'ragged'])
def test_splash_equals_the_reference(name):
  case = CASES[name]
  qkv, _, do = inputs(case)

  def value_and_gradients(*qkv):
    o, pull = jax.vjp(functools.partial(attention, mask=case.mask(), implementation='splash'), *qkv)
    return o, pull(do * (1 + o))

  (o, gradients), (want_o, want_gradients) = jax.jit(value_and_gradients)(*qkv), reference(name)[0]
  assert_close(o, want_o, FORWARD, 'value')
  assert_close(gradients, want_gradients, FIRST, 'gradient')


@pytest.mark.parametrize('implementation', OWN)
def test_bfloat16_errs_no_more_than_the_reference_in_bfloat16(implementation):
  """Against float32; a third more is allowed for another order of rounding."""
  case = CASES['grouped']
  want = reference('grouped')
  coarse = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), x) for x in inputs(case)]
  run = lambda name: jax.jit(functools.partial(everything, functools.partial(attention, implementation=name)))(*coarse)
  for ours, theirs, exact in zip(*map(jax.tree.leaves, (run(implementation), run('reference'), want)), strict=True):
    assert ours.dtype == jnp.bfloat16
    our_error, their_error = (np.linalg.norm(np.asarray(x, np.float32) - exact) for x in (ours, theirs))
    assert our_error < 1.33 * their_error + 1e-3 * np.linalg.norm(exact)


SMALL = Case('small', 2, 1, 8, (0, 0), (2, 24), documents='sorted')


def small(implementation):
  return functools.partial(attention, mask=SMALL.mask(), implementation=implementation)


def in_layers(f):
  """Three layers in a scan, each recomputed in the backward pass."""
  def stacked(q, k, v):
    layer = jax.checkpoint(lambda x, w: (x + f(x * w, k, v), None), prevent_cse=False)
    return jax.lax.scan(layer, q, jnp.linspace(0.5, 1.5, 3))[0]
  return stacked


TRANSFORMED = {
  'scan_and_remat': in_layers,
  'jit_in_jit': lambda f: jax.jit(lambda *qkv: jax.jit(f)(*qkv)),
  'scan_in_vmap': lambda f: lambda q, k, v: jax.vmap(in_layers(f), (0, None, None))(jnp.stack([q, 2 * q]), k, v),
  'vmap_of_keys_in_the_middle': lambda f: lambda q, k, v: jax.vmap(f, (None, 2, None), 3)(
    q, jnp.stack([k, 2 * k], 2), v),
  'vmap_of_vmap': lambda f: lambda q, k, v: jax.vmap(jax.vmap(f, (0, None, None)), (None, 0, 0))(
    jnp.stack([q, 2 * q]), jnp.stack([k, 2 * k]), jnp.stack([v, v, ])),
}


@pytest.mark.parametrize('implementation', OWN)
@pytest.mark.parametrize('name', TRANSFORMED)
def test_every_derivative_survives_transformations(name, implementation):
  qkv, qkv_t, _ = inputs(SMALL)
  run = lambda which: jax.jit(functools.partial(everything, TRANSFORMED[name](small(which))))(qkv, qkv_t, 0.5)
  assert_close(run(implementation), run('reference'), SECOND, name)


@pytest.mark.parametrize('implementation', OWN)
def test_outside_jit(implementation):
  qkv, qkv_t, do = inputs(SMALL)
  assert_close(everything(small(implementation), qkv, qkv_t, do), everything(small('reference'), qkv, qkv_t, do),
               SECOND, 'eager')


@pytest.mark.parametrize('wanted', [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_operands(wanted):
  qkv, _, do = inputs(SMALL)
  gradient = lambda which: jax.grad(lambda *x: (small(which)(*x) * do).sum(), wanted)(*qkv)
  assert_close(gradient('blockwise'), gradient('reference'), FIRST, str(wanted))


def test_remat_by_name_keeps_the_forward_pass():
  """With the output and its log-sums saved, the backward pass runs no forward kernel; with nothing saved, one."""
  qkv, _, do = inputs(SMALL)

  def forwards(policy):
    f = jax.checkpoint(lambda *x: jnp.sin(small('blockwise')(*x)), policy=policy, prevent_cse=False)
    jaxpr = jax.make_jaxpr(jax.grad(lambda *x: (f(*x) * do).sum(), (0, 1, 2)))(*qkv)
    return str(jaxpr).count('flash_forward')

  assert forwards(jax.checkpoint_policies.save_only_these_names('attention')) == 1
  assert forwards(jax.checkpoint_policies.nothing_saveable) == 2


def memory(implementation: str, length: int) -> float:
  """Bytes of temporaries of one Hessian-vector product, as compiled."""
  q, k, v = Case('', 2, 1, 32, (1, length), (1, length)).inputs()
  f = functools.partial(attention, mask=Mask(), implementation=implementation)
  gradient = jax.grad(lambda *x: jnp.square(f(*x)).sum(), (0, 1, 2))
  product = jax.jit(lambda *x: jax.jvp(gradient, x, x)[1])
  return product.lower(q, k, v).compile().memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_length_not_its_square():
  short, long = memory('blockwise', 1024), memory('blockwise', 4096)
  assert long < 4.5 * short
  assert memory('reference', 4096) > 10 * long  # what the law is about


@pytest.mark.parametrize('implementation', OWN)
@pytest.mark.parametrize('window', [24, 25, 2**31 - 1, 2**40])
def test_windows_as_long_as_the_row_or_longer_are_no_windows(window, implementation):
  q, k, v = SMALL.inputs()
  np.testing.assert_array_equal(attention(q, k, v, Mask(window=window), implementation=implementation),
                                attention(q, k, v, implementation=implementation))


def test_a_second_call_outside_jit_compiles_nothing():
  q, k, v = SMALL.inputs()
  run = lambda: jax.grad(lambda q: attention(q, k, v).sum())(q)
  run()
  with count_compilations() as compilations:
    run()
  assert not compilations


@contextlib.contextmanager
def count_compilations():
  events = []
  listener = lambda event, seconds, **_: events.append(event) if 'backend_compile' in event else None
  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    yield events
  finally:
    jax.monitoring.unregister_event_duration_listener(listener)


@pytest.mark.parametrize(('implementation', 'segments', 'dtype', 'why'), [
  ('cudnn', None, 'float32', 'float32'), ('cudnn', jnp.ones((2, 24), jnp.int32), 'bfloat16', 'document segments'),
  ('cudnn', None, 'bfloat16', 'not on cpu'), ('flash', None, 'float32', 'unknown attention')])
def test_what_an_implementation_cannot_do_names_one_that_can(implementation, segments, dtype, why):
  with pytest.raises(ValueError, match=why) as e:
    attention(*SMALL.inputs(dtype), Mask(segment_BxL=segments), implementation=implementation)
  assert "'blockwise'" in str(e.value)


def test_derivatives_that_flash_does_not_have_name_the_reference():
  (q, k, v), (q_t, *_), _ = inputs(SMALL)
  loss = lambda implementation: lambda q: jnp.square(small(implementation)(q, k, v)).sum()
  forward_twice = lambda f: jax.jvp(lambda q: jax.jvp(f, (q,), (q_t,))[1], (q,), (q_t,))
  reverse_twice = lambda f: jax.grad(lambda q: (jax.grad(f)(q) * q_t).sum())(q)
  for derivative in (forward_twice, reverse_twice):
    derivative(loss('reference'))
    with pytest.raises(NotImplementedError, match="implementation='reference'"):
      derivative(loss('blockwise'))
  with pytest.raises(ValueError, match="'splash' has gradients only.*'auto', 'pallas' or 'blockwise'"):
    jax.jvp(loss('splash'), (q,), (q_t,))
