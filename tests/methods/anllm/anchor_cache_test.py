"""Laws of the anchor cache: what is read in pieces, and forgotten, is what the whole text is under the dense mask."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from datasel.attention import anchors
from datasel.data.anchors import Rule
from datasel.methods.anllm.cache import AnchorDecoder, Cache, Counts, Room, slot_bytes
from datasel.models.mistral import Mistral

V, L = 32, 90
BASE = Mistral(vocab_size=V, n_layers=3, d_model=24, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=40,
               attention='reference')
EP = dataclasses.replace(BASE, anchors=Rule((3, 9, 17)))
MODELS = {
  'ep': EP,
  'anchors see anchors': dataclasses.replace(EP, anchor_sees_anchors=True),
  'fixed, first token kept': dataclasses.replace(BASE, anchors=Rule(max_length=5), keep_bos=True),
  'lengths, all switches': dataclasses.replace(BASE, anchors=Rule((3, 9, 17), min_length=3, max_length=7),
                                               anchor_sees_anchors=True, keep_bos=True),
  'no anchors': BASE,
}
PROTECTED = {'ep', 'lengths, all switches'}
LENGTHS = (90, 61, 1, 32)


@functools.cache
def params():
  return jax.tree.map(lambda p: p * 5, BASE.init(jax.random.key(0)))  # large enough that every path matters


def texts(name, seed=0):
  """Tokens, and what of them is protected or None; ragged rows: beyond LENGTHS they have none."""
  rng = np.random.default_rng(seed)
  tokens_BxL = rng.integers(0, V, (len(LENGTHS), L)).astype(np.int32)
  protected_BxL = rng.random((len(LENGTHS), L)) < 0.1
  protected_BxL[:, 3:9] = [True]  # a span, over the end of segments
  return tokens_BxL, protected_BxL if name in PROTECTED else None


@functools.cache
def whole(name):
  """The logits of the whole texts under the dense mask."""
  tokens_BxL, protected_BxL = texts(name)
  apply = jax.jit(MODELS[name].apply)
  return np.asarray(apply(params(), tokens_BxL, protected_BxL=protected_BxL))


@functools.cache
def extend(model):
  """The logits, and the cache with huge keys and values wherever nothing is said to be held."""
  def run(params, *given):
    hidden, cache = AnchorDecoder(model).extend(params, *given)
    return model.logits(params, hidden), poisoned(cache)
  return jax.jit(run)


def chunks(lengths, width, seed=0, holes=True):
  """For each chunk int32 B x width, the place in its text of what each column holds: -1, anywhere, for nothing."""
  rng, done = np.random.default_rng(seed), np.zeros(len(lengths), int)
  while (done < lengths).any():
    position_BxC = np.full((len(lengths), width), -1, np.int32)
    for b, length in enumerate(lengths):
      n = min(width - rng.integers(0, width // 2 + 2) * holes, length - done[b])
      at = np.sort(rng.choice(width, max(n, 0), replace=False))
      position_BxC[b, at] = done[b] + np.arange(len(at))
      done[b] += len(at)
    yield position_BxC


def pieces(name, width):
  """(tokens, position, protected) of each chunk."""
  tokens_BxL, protected_BxL = texts(name)
  for position_BxC in chunks(LENGTHS, width):
    take = functools.partial(np.take_along_axis, indices=np.maximum(position_BxC, 0), axis=1)
    yield take(tokens_BxL), position_BxC, None if protected_BxL is None else take(protected_BxL)


def check(logits, position_BxC, name):
  want = whole(name)
  real_BxC = position_BxC >= 0
  want_BxCxV = np.take_along_axis(want, np.maximum(position_BxC, 0)[..., None], axis=1)
  np.testing.assert_allclose(np.asarray(logits)[real_BxC], want_BxCxV[real_BxC], rtol=1e-5,
                             atol=1e-5 * np.abs(want).max())


def ample(name):
  """Room with some left over."""
  return Room(40 if name in PROTECTED else 1, L, L) if MODELS[name].anchors else Room(0, 0, L)


def live(name, upto_B):
  """What is kept of the texts' first tokens, by counting: protected, anchors, open segment."""
  tokens_BxL, protected_BxL = texts(name)
  model = MODELS[name]
  anchor_BxL, _ = anchors.flags(tokens_BxL, model.anchors or Rule())
  counts = []
  for anchor, protected, upto in zip(anchor_BxL, np.zeros_like(anchor_BxL) if protected_BxL is None else protected_BxL,
                                     upto_B):
    kept, last = 0, -1
    for t in range(upto):
      last = t if anchor[t] else last
    for t in range(upto):
      kept += bool(anchor[t] or protected[t] or t > last or (model.keep_bos and t == 0))
    counts.append(kept)
  return counts


@pytest.mark.parametrize('width', [1, 7, 64])
@pytest.mark.parametrize('name', MODELS)
def test_what_is_read_in_pieces_is_the_whole_text_under_the_dense_mask(name, width):
  """And the cache holds anchors, protected tokens and the open segment, as the host counts it too.

  What it does not hold any more is not read: it is overwritten with what would be seen.
  """
  model, decoder = MODELS[name], AnchorDecoder(MODELS[name])
  cache, counts = decoder.empty(len(LENGTHS), ample(name)), Counts.zeros(len(LENGTHS))
  read_B = np.zeros(len(LENGTHS), int)
  for tokens, position, protected in pieces(name, width):
    logits, cache = extend(model)(params(), tokens, position, cache, protected)
    check(logits, position, name)
    _, counts = decoder.follow(counts, tokens, position, protected)
    assert all(isinstance(x, np.ndarray) for x in counts)
    jax.tree.map(np.testing.assert_array_equal, counts, cache.counts)
    read_B += (position >= 0).sum(axis=1)
    assert counts.live_B.tolist() == live(name, read_B)
  assert read_B.tolist() == list(LENGTHS)


def poisoned(cache):
  room, slot_1xT = cache.room, jnp.arange(cache.room.slots)[None]
  starts = (0, room.protected, room.protected + room.anchors)
  held_BxT = jnp.zeros((cache.key.shape[1], room.slots), bool)
  for start, count_B in zip(starts, (cache.counts.protected_B, cache.counts.anchors_B, cache.counts.window_B)):
    held_BxT |= (start <= slot_1xT) & (slot_1xT < start + count_B[:, None])
  hide = lambda x: jnp.where(held_BxT[None, :, None, :, None], x, 1e30)
  return dataclasses.replace(cache, key=hide(cache.key), value=hide(cache.value))


def test_growth_changes_nothing_and_what_has_no_room_is_nan():
  name = 'lengths, all switches'
  model, decoder = MODELS[name], AnchorDecoder(MODELS[name])
  cache = decoder.empty(len(LENGTHS), Room(16, 8, 6))
  for n, (tokens, position, protected) in enumerate(pieces(name, 7)):
    if n == 6:
      assert (np.asarray(cache.counts.protected_B) > 0).all() and cache.counts.anchors_B.max() > 1
      cache = decoder.grow(cache, Room(30, 20, 6))
    logits, cache = extend(model)(params(), tokens, position, cache, protected)
    check(logits, position, name)
  assert cache.counts.anchors_B.max() > 6 and cache.counts.protected_B.max() > 8
  small = decoder.empty(len(LENGTHS), Room(30, 1, 6))
  tokens, position, protected = list(pieces(name, 64))[0]
  logits, small = extend(model)(params(), tokens, position, small, protected)
  over_B = np.asarray(small.counts.anchors_B) > 1
  assert np.isnan(np.asarray(logits)).any(axis=(1, 2)).tolist() == over_B.tolist() and len(set(over_B.tolist())) == 2


def test_rows_repeat_and_their_bytes_are_those_of_the_arrays():
  decoder = AnchorDecoder(EP)
  cache = decoder.empty(2, Room(2, 5, 9))
  tokens = np.arange(16, dtype=np.int32).reshape(2, 8)
  _, cache = extend(EP)(params(), tokens, np.tile(np.arange(8, dtype=np.int32), (2, 1)), cache)
  wide = decoder.spread(cache, 6)
  for got, have in ((wide.key, cache.key), (wide.value, cache.value)):
    np.testing.assert_array_equal(got, np.asarray(have)[:, [0, 0, 0, 1, 1, 1]])
  jax.tree.map(lambda got, have: np.testing.assert_array_equal(got, np.asarray(have)[[0, 0, 0, 1, 1, 1]]),
               wide.counts, cache.counts)
  assert wide.room.slots == 16 and wide.room.nbytes(EP, 6) == wide.key.nbytes + wide.value.nbytes
  assert slot_bytes(EP) * 6 * 16 == wide.room.nbytes(EP, 6)
  assert isinstance(wide, Cache)


@pytest.mark.parametrize(('change', 'message'), [
  ({'window': 4, 'anchors': None}, 'the model has a sliding window of 4'),
  ({'anchors': Rule((3, V))}, rf'has ids \[{V}\], the model knows 0 to {V - 1}'),
])
def test_a_model_that_cannot_be_decoded_is_refused(change, message):
  with pytest.raises(ValueError, match=message):
    AnchorDecoder(dataclasses.replace(EP, **change))


def test_protected_tokens_of_another_shape_or_without_anchors_are_refused():
  tokens = np.zeros((2, 5), np.int32)
  with pytest.raises(ValueError, match=r'protected_BxL is bool \(2, 4\), want bool B x L = \(2, 5\)'):
    AnchorDecoder(EP).follow(Counts.zeros(2), tokens, tokens, np.zeros((2, 4), bool))
  with pytest.raises(ValueError, match='protected tokens are given to a model without anchors'):
    AnchorDecoder(BASE).follow(Counts.zeros(2), tokens, tokens, np.zeros((2, 5), bool))
