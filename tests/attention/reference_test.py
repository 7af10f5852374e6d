"""The reference against JAX's own attention, and what every implementation gives in the special cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from datasel.attention import Mask, attention

B, L, H, DH = 2, 10, 4, 8
# Two packed documents and padding; and a row that is one document.
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0, 0], [1] * L], np.int32)


def inputs(K, dtype=jnp.float32):
  r = np.random.default_rng(0)
  return [jnp.asarray(r.normal(size=(B, L, heads, DH)), dtype) for heads in (H, K, K)]


def theirs(q, k, v, causal, window, segments):
  """jax.nn.dot_product_attention, which takes documents as an explicit mask."""
  same = None
  if segments is not None:
    same = jnp.asarray([[[segments[b, i] == segments[b, j] > 0 for j in range(L)] for i in range(L)] for b in range(B)])
  sides = None if window is None else (window - 1, 0 if causal else window - 1)
  return jax.nn.dot_product_attention(q, k, v, mask=None if same is None else same[:, None], is_causal=causal,
                                      local_window_size=sides, implementation='xla')


@pytest.mark.parametrize('K', [4, 2, 1])
@pytest.mark.parametrize(('causal', 'window'), [(True, None), (True, 3), (False, None), (False, 3)])
@pytest.mark.parametrize('segments', [None, SEGMENTS])
def test_equals_jax_attention_with_its_gradients(K, causal, window, segments):
  mask = Mask(causal=causal, window=window, segment_BxL=None if segments is None else jnp.asarray(segments))
  seen = jnp.ones((B, L, 1, 1)) if segments is None else jnp.asarray(segments > 0, jnp.float32)[..., None, None]
  # Rows that see nothing are not compared: theirs give the mean of all values.
  signal = seen * jnp.asarray(np.random.default_rng(1).normal(size=(B, L, H, DH)), jnp.float32)

  def with_gradients(f, *qkv):
    out, pull = jax.vjp(f, *qkv)
    return seen * out, *pull(signal)

  ours, want = jax.jit(lambda *qkv: (
    with_gradients(lambda q, k, v: attention(q, k, v, mask, implementation='reference'), *qkv),
    with_gradients(lambda q, k, v: theirs(q, k, v, causal, window, segments), *qkv)))(*inputs(K))
  for name, a, b in zip(('out', 'dq', 'dk', 'dv'), ours, want):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6, err_msg=name)


EVERY = pytest.mark.parametrize('implementation', ['reference', 'blockwise', 'pallas_tpu', 'pallas_gpu', 'auto'])


@EVERY
def test_a_window_of_one_shows_each_position_itself(implementation):
  q, k, v = inputs(2)
  seen = attention(q, k, v, Mask(window=1), implementation=implementation)
  np.testing.assert_allclose(seen, jnp.repeat(v, 2, axis=2), rtol=1e-6)


@EVERY
def test_queries_of_a_group_share_their_key_and_value(implementation):
  """Head h reads key/value head h // (H / K)."""
  q, k, v = inputs(2)
  run = lambda *qkv: attention(*qkv, implementation=implementation)
  np.testing.assert_allclose(run(q, k, v), run(q, jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)),
                             rtol=1e-5, atol=1e-6)


@EVERY
def test_rows_that_see_nothing_give_zeros_and_finite_gradients(implementation):
  segments = jnp.asarray(SEGMENTS).at[1].set(0)
  q, k, v = inputs(2)
  run = lambda q, k, v: attention(q, k, v, Mask(segment_BxL=segments), implementation=implementation)
  blind = np.asarray(segments == 0)
  out = np.asarray(run(q, k, v))
  assert not out[blind].any() and out[~blind].all()
  gradients = jax.grad(lambda *x: jnp.square(run(*x) + 1).sum(), (0, 1, 2))(q, k, v)
  for gradient in gradients:
    assert np.isfinite(gradient).all()
    assert not np.asarray(gradient)[blind].any()


@EVERY
def test_bfloat16_is_close_and_stays_bfloat16(implementation):
  """Products round to 8 bits of mantissa: 2^-8 of the largest value, a few times over."""
  fine = attention(*inputs(2), implementation='reference')
  coarse = attention(*inputs(2, jnp.bfloat16), implementation=implementation)
  assert coarse.dtype == jnp.bfloat16
  difference = np.abs(np.asarray(coarse, np.float32) - np.asarray(fine)).max() / np.abs(fine).max()
  assert 1e-4 < difference < 0.02


def test_scores_far_apart_stay_finite():
  q, k, v = inputs(1)
  out, gradient = jax.value_and_grad(lambda q: attention(1e4 * q, k, v).sum())(q)
  assert np.isfinite(out) and np.isfinite(gradient).all()


@pytest.mark.parametrize('window', [0, -1, 2.5, True])
def test_windows_without_a_place_are_refused(window):
  with pytest.raises(ValueError, match=f'window {window}.*at least 1'):
    Mask(window=window)


def test_unknown_implementation_is_refused_with_the_known_ones():
  with pytest.raises(ValueError, match="'flash'; known:.*reference"):
    attention(*inputs(2), implementation='flash')


@pytest.mark.parametrize('change', [
  lambda q, k, v: (q[:, :, :3], k, v), lambda q, k, v: (q, k, v[:, :, :1]), lambda q, k, v: (q[:, :5], k, v),
  lambda q, k, v: (q[:1], k, v), lambda q, k, v: (q[..., :4], k, v), lambda q, k, v: (q[0], k[0], v[0])])
def test_shapes_that_do_not_fit_are_refused(change):
  with pytest.raises(ValueError, match='attention: q .* k .* v .*want B x L x H x Dh'):
    attention(*change(*inputs(2)))


def test_segments_of_another_shape_are_refused():
  with pytest.raises(ValueError, match=r'segment_BxL is int32 \(2, 9\), want int32 B x L = \(2, 10\)'):
    attention(*inputs(2), Mask(segment_BxL=jnp.ones((B, L - 1), jnp.int32)))
