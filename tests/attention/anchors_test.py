"""Anchor masks on the fast implementations: against the reference, under every derivative, and what they cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_laws import FIRST, FORWARD, SECOND, assert_close, everything

from datasel import sharding
from datasel.attention import Anchors, Mask, anchors, attention
from datasel.attention.visible import Marks, Visible

OWN = ('blockwise', 'pallas_tpu', 'pallas_gpu')  # the kernels are interpreted here
B, L, H, K, DH = 2, 300, 2, 1, 16
visible, segments = (jax.jit(f, static_argnames=('anchor_sees_anchors', 'keep_bos')) for f in (anchors.visible,
                                                                                               anchors.segments))


def documents(rng, length=L):
  """Packed: documents of some 40 tokens, padding among them and at the end."""
  segment = 1 + np.cumsum(rng.random((B, length)) < 0.025, axis=1)
  return np.where((rng.random((B, length)) < 0.1) | (np.arange(length) > length - 9), 0, segment).astype(np.int32)


def text(seed=0, *, share, packed=False, protects=False, length=L, **what):
  """The arguments of `visible` and `segments` for random anchors."""
  rng = np.random.default_rng(seed)
  anchor, segment = rng.random((B, length)) < share, documents(rng, length)
  protected = rng.random((B, length)) < 0.05 if protects else None
  return (anchor, segment if packed else None), {'protected_BxL': protected, **what}


TEXTS = {
  'one document': text(share=0.06),
  'no anchors': text(share=0.0),
  'anchors alone': text(share=1.0),
  'packed, with neighbouring anchors': text(share=0.3, packed=True),
  'anchors see anchors': text(share=0.1, packed=True, anchor_sees_anchors=True),
  'first tokens kept': text(share=0.1, packed=True, keep_bos=True),
  'protected': text(share=0.1, packed=True, protects=True),
  'all of it': text(share=0.2, packed=True, protects=True, anchor_sees_anchors=True, keep_bos=True),
}


def operands(seed, length=L):
  keys = jax.random.split(jax.random.key(seed), 3)
  return tuple(jax.random.normal(key, (B, length, heads, DH)) for key, heads in zip(keys, (H, K, K)))


@functools.cache
def program(implementation):
  """`everything` of attention, compiled once for all masks."""
  def run(segments, qkv, qkv_t, do):
    f = functools.partial(attention, mask=Mask(anchors=Anchors(segments, L)), implementation=implementation)
    return everything(f, qkv, qkv_t, do)
  return jax.jit(run)


def of_one_form(found):
  """With nothing protected said in full: the same mask."""
  nothing = jnp.zeros(found.kept_BxL.shape, bool)
  return found if found.protected_BxL is not None else found._replace(protected_BxL=nothing, narrow_BxL=nothing)


@functools.cache
def expected(name):
  given, what = TEXTS[name]
  found = of_one_form(segments(*given, **what))
  np.testing.assert_array_equal(Mask(anchors=Anchors(found, L)).dense(L), visible(*given, **what))
  return found, program('reference')(found, operands(0), operands(1), operands(2)[0])


@pytest.mark.parametrize('implementation', OWN)
@pytest.mark.parametrize('name', TEXTS)
def test_every_derivative_equals_the_reference(name, implementation):
  found, want = expected(name)
  ours = program(implementation)(found, operands(0), operands(1), operands(2)[0])
  for one, other, tolerance in zip((*ours[0], *ours[1]), (*want[0], *want[1]), (FORWARD, FIRST, FIRST, SECOND)):
    assert_close(one, other, tolerance, name)


@pytest.mark.parametrize('implementation', OWN)
def test_nothing_leaks_out_of_a_closed_segment(implementation):
  """Of what rows after an anchor give, the keys and values before it have a gradient of zero: to the bit."""
  (anchor, _), _ = TEXTS['one document']
  found, _ = expected('one document')
  close = int(np.flatnonzero(anchor[0])[3])
  do = jnp.where(jnp.arange(L)[:, None, None] > close, operands(2)[0], 0)
  (_, (_, dk, dv)), (_, (_, dk_t, dv_t)) = program(implementation)(found, operands(0), operands(1), do)
  for gradient in (dk, dv, dk_t, dv_t):
    before = np.asarray(gradient[0, :close + 1]).any(axis=(1, 2))
    np.testing.assert_array_equal(before, anchor[0, :close + 1])


def test_without_anchors_it_is_causal_attention():
  found, _ = expected('no anchors')
  qkv = operands(0)
  (o, gradients), _ = program('blockwise')(found, qkv, operands(1), operands(2)[0])
  causal = jax.jit(functools.partial(everything, functools.partial(attention, implementation='reference')))
  (want, want_gradients), _ = causal(qkv, operands(1), operands(2)[0])
  assert_close(o, want, FORWARD, 'value')
  assert_close(gradients, want_gradients, FIRST, 'gradient')


@pytest.mark.parametrize('implementation', ['reference', 'blockwise'])
def test_what_has_no_slot_is_not_seen(implementation):
  (anchor, _), _ = TEXTS['one document']
  first = anchor & (np.cumsum(anchor, axis=1) <= 5)
  run = lambda seen: jax.jit(functools.partial(attention, mask=Mask(anchors=Anchors(seen, 5)),
                                               implementation=implementation))(*operands(0))
  found = segments(anchor)
  want = attention(*operands(0), Mask(anchors=Anchors(found._replace(kept_BxL=jnp.asarray(first)), L)),
                   implementation='reference')
  assert_close(run(found), want, FORWARD, 'five slots')


@pytest.mark.parametrize(('owner', 'owned', 'walked'), [('queries', 16, 8), ('queries', 8, 8), ('keys', 8, 16)])
def test_the_tiles_met_are_those_with_something_to_see(owner, owned, walked):
  """All of them; and no others where nothing is protected and no padding comes in between."""
  length, of = 96, {owner: owned, {'queries': 'keys', 'keys': 'queries'}[owner]: walked}
  walk = jax.jit(lambda queries, keys: Visible(True, None, length, length).walk(owner, owned, walked,
                                                                                Marks(queries, keys)))
  for seed, (share, packed, protects) in enumerate([(0.1, False, False), (0, False, False), (0.4, False, False),
                                                    (0.1, True, False), (0.1, True, True)]):
    given, what = text(seed, share=share, packed=packed, protects=protects, length=length)
    s = jax.tree.map(np.asarray, of_one_form(segments(*given, **what)))
    at = np.arange(length)
    own = (s.segment_BxL[:, :, None] == s.segment_BxL[:, None]) & (s.segment_BxL > 0)[:, None] & (at <= at[:, None])
    slot = np.where(s.kept_BxL, s.index_BxL, length)
    held = np.zeros((B, length + 1, length), bool)  # what is in each slot
    held[np.arange(B)[:, None], slot, at] = True
    kept = np.einsum('bij,bcj->bic', visible(*given, **what) & ~own, held[:, :length])
    seen = np.concatenate([kept, own], axis=2)
    tiles = seen.reshape(B, -1, of['queries'], 2 * length // of['keys'], of['keys']).any(axis=(2, 4))

    least, back = 1 + s.narrow_BxL, np.where(s.segment_BxL > 0, at + 1 - s.start_BxL, 0)
    mark = np.concatenate([np.zeros((B, length)), s.segment_BxL > 0], axis=1)  # those of slots are not asked for
    found = walk(np.stack([s.first_BxL, s.stop_BxL, least, back], 1).astype(np.int32), mark.astype(np.int32))
    met = np.zeros_like(tiles if owner == 'queries' else tiles.swapaxes(1, 2))
    for step in range(met.shape[2]):
      b, n = np.nonzero(step < np.asarray(found.count))
      met[b, n, np.asarray(found.tile(step))[b, n]] = True
    met = met if owner == 'queries' else met.swapaxes(1, 2)
    assert not (tiles & ~met).any()
    if not packed:
      np.testing.assert_array_equal(met, tiles)


def test_scan_remat_and_vmap_over_masks():
  """Three layers, each recomputed in the backward pass; two masks of one shape side by side."""
  found = [segments(*text(seed, share=0.1, packed=True, length=40)[0]) for seed in range(2)]
  qkv, do = operands(0, 40), operands(1, 40)[0]

  def gradients(implementation, found):
    def layers(q, k, v):
      f = functools.partial(attention, mask=Mask(anchors=Anchors(found, 40)), implementation=implementation)
      layer = jax.checkpoint(lambda x, w: (x + f(x * w, k, v), None), prevent_cse=False)
      return (jax.lax.scan(layer, q, jnp.linspace(0.5, 1.5, 3))[0] * do).sum()
    return jax.jvp(jax.grad(layers, (0, 1, 2)), qkv, qkv)

  together = jax.jit(jax.vmap(functools.partial(gradients, 'blockwise')))(jax.tree.map(lambda *x: jnp.stack(x), *found))
  one_by_one = [jax.jit(gradients, static_argnums=0)('reference', one) for one in found]
  assert_close(together, jax.tree.map(lambda *x: jnp.stack(x), *one_by_one), SECOND, 'layers')


@pytest.mark.parametrize('implementation', ['blockwise', 'pallas_gpu'])
def test_rows_and_heads_on_several_devices_exchange_nothing(implementation):
  mesh = sharding.make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
  qkv, (given, _) = operands(0, 40), text(share=0.1, packed=True, length=40)
  qkv = tuple(jnp.concatenate([x, x], axis=2) for x in qkv)

  def gradients(implementation, anchor, segment, *qkv):
    found = anchors.segments(anchor, segment)
    f = functools.partial(attention, mask=Mask(anchors=Anchors(found, 40)), implementation=implementation)
    return jax.grad(lambda *x: jnp.square(f(*x)).sum(), (0, 1, 2))(*qkv)

  def laid_out(*x):
    with sharding.use(mesh):
      return gradients(implementation, *x)

  rows, heads = (jax.NamedSharding(mesh, jax.P(('data', 'fsdp'), None, *more)) for more in ((), ('tensor', None)))
  placed = (*jax.device_put(given, rows), *jax.device_put(qkv, heads))
  compiled = jax.jit(laid_out).lower(*placed).compile()
  ours = jax.block_until_ready(compiled(*placed))
  assert_close(ours, jax.jit(functools.partial(gradients, 'reference'))(*given, *qkv), FIRST, implementation)
  assert not any(f' {collective}(' in compiled.as_text()
                 for collective in ('all-gather', 'all-to-all', 'collective-permute'))


def memory(implementation, length):
  """Bytes of temporaries of a gradient, as compiled, with an anchor every 8 tokens at most."""
  given = jax.eval_shape(lambda: (jnp.zeros((1, length), bool), *(jnp.zeros((1, length, 1, 32)),) * 3))

  def gradient(anchor, *qkv):
    mask = Mask(anchors=Anchors(anchors.segments(anchor), length // 8))
    return jax.grad(lambda *x: jnp.square(attention(*x, mask, implementation=implementation)).sum(), (0, 1, 2))(*qkv)

  return jax.jit(gradient).lower(*given).compile().memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_length_not_its_square():
  short, long = memory('blockwise', 2048), memory('blockwise', 4096)
  assert long < 2.2 * short
  assert memory('reference', 4096) > 10 * long  # what the law is about


@pytest.mark.parametrize(('platform', 'mark', 'kernels'), [('tpu', 'tpu_custom_call', 5), ('cuda', 'triton', 4)])
def test_kernels_lower_for_a_device_that_is_not_here(platform, mark, kernels):
  """The forward, its tangent, and the parts of the backward's tangent: three on TPUs, where slots go apart."""
  given = [jax.ShapeDtypeStruct((2, 256, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]

  def product(anchor, *qkv):
    mask = Mask(anchors=Anchors(anchors.segments(anchor), 32))
    gradients = jax.grad(lambda *x: attention(*x, mask).astype(jnp.float32).sum(), (0, 1, 2))
    return jax.jvp(gradients, qkv, qkv)[1]

  traced = jax.jit(product).trace(jax.ShapeDtypeStruct((2, 256), bool), *given)
  assert traced.lower(lowering_platforms=(platform,)).as_text().count(mark) == kernels


@pytest.mark.parametrize('implementation', ['cudnn', 'splash'])
def test_stock_kernels_refuse_by_name(implementation):
  q, k, v = (x.astype(jnp.bfloat16) for x in operands(0))
  with pytest.raises(ValueError, match=f"'{implementation}' cannot do an anchor mask; use .*'blockwise'"):
    attention(q, k, v, Mask(anchors=Anchors(expected('no anchors')[0], L)), implementation=implementation)


def test_a_mask_of_another_length_is_refused():
  with pytest.raises(ValueError, match=r'anchors.segments is int32 \(2, 300\), want int32 B x L = \(2, 299\)'):
    attention(*(x[:, 1:] for x in operands(0)), Mask(anchors=Anchors(expected('no anchors')[0], L)))
