"""The decoder's laws: what a position may see, to the bit; equality with the published model; memory of the loss."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from datasel.models.mistral import REMAT, Mistral

TINY = Mistral(vocab_size=61, n_layers=2, d_model=24, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=40, loss_chunk=5)
L = 16


@pytest.fixture(scope='module')
def params():
  return jax.tree.map(lambda p: p * 5, TINY.init(jax.random.key(0)))  # large enough that every path matters


def tokens(seed=1, B=3):
  return jax.random.randint(jax.random.key(seed), (B, L), 0, TINY.vocab_size)


def changed(model, params, position, **kwargs):
  """bool L: where the logits move, in any bit, when the token at `position` changes."""
  apply = jax.jit(lambda t: model.apply(params, t, **kwargs))
  before = tokens()
  after = before.at[:, position].set((before[:, position] + 1) % model.vocab_size)
  return np.asarray((apply(before) != apply(after)).any((0, 2)))


def test_causal(params):
  moved = changed(TINY, params, 7)
  assert not moved[:7].any()
  assert moved[7:].all()


def test_sliding_window(params):
  # One layer: with more, information travels further than a window.
  model = dataclasses.replace(TINY, n_layers=1, window=4)
  one_layer = params | {'blocks': jax.tree.map(lambda p: p[:1], params['blocks'])}
  assert changed(model, one_layer, 5).nonzero()[0].tolist() == [5, 6, 7, 8]


def test_packed_documents_do_not_see_each_other(params):
  segment_BxL = jnp.broadcast_to(jnp.repeat(jnp.array([1, 2, 3, 0]), 4), (3, L))
  assert changed(TINY, params, 5, segment_BxL=segment_BxL).nonzero()[0].tolist() == [5, 6, 7]


def test_packed_document_equals_document_alone(params):
  t = tokens()
  segment_BxL = jnp.broadcast_to(jnp.repeat(jnp.array([1, 2]), 8), (3, L))
  position_BxL = jnp.broadcast_to(jnp.tile(jnp.arange(8), 2), (3, L))
  packed = TINY.apply(params, t, segment_BxL, position_BxL)
  alone = jnp.concatenate([TINY.apply(params, t[:, :8]), TINY.apply(params, t[:, 8:])], axis=1)
  np.testing.assert_allclose(packed, alone, rtol=1e-5, atol=1e-5)


def test_padding_stays_finite_and_trains(params):
  t, segment_BxL = tokens(), jnp.zeros((3, L), jnp.int32)
  batch = {'tokens_BxL': t, 'targets_BxL': t, 'segment_BxL': segment_BxL}
  grads = jax.grad(lambda p: TINY.token_nll(p, batch).sum())(params)
  assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def test_logits_equal_hugging_face():
  golden = np.load(pathlib.Path(__file__).parents[1] / 'golden' / 'mistral_tiny.npz')
  model = Mistral(vocab_size=96, n_layers=3, d_model=32, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48, window=6,
                  rope_theta=float(golden['rope_theta']))
  layers = lambda name, shape: jnp.stack([golden[f'model.layers.{i}.{name}.weight'].T.reshape(shape) for i in range(3)])
  published = {
    'embed': {'kernel': jnp.asarray(golden['model.embed_tokens.weight'])},
    'head': {'kernel': jnp.asarray(golden['lm_head.weight'])},
    'norm': {'scale': jnp.asarray(golden['model.norm.weight'])},
    'blocks': {
      'attention_norm': {'scale': layers('input_layernorm', (32,))},
      'mlp_norm': {'scale': layers('post_attention_layernorm', (32,))},
      'query': {'kernel': layers('self_attn.q_proj', (32, 4, 8))},
      'key': {'kernel': layers('self_attn.k_proj', (32, 2, 8))},
      'value': {'kernel': layers('self_attn.v_proj', (32, 2, 8))},
      'out': {'kernel': layers('self_attn.o_proj', (4, 8, 32))},
      'gate': {'kernel': layers('mlp.gate_proj', (32, 48))}, 'up': {'kernel': layers('mlp.up_proj', (32, 48))},
      'down': {'kernel': layers('mlp.down_proj', (48, 32))},
    },
  }
  logits = model.apply(published, jnp.asarray(golden['tokens'], jnp.int32))
  np.testing.assert_allclose(logits, golden['logits'], rtol=1e-5, atol=1e-5 * np.abs(golden['logits']).max())


@pytest.mark.parametrize('loss_chunk', [1, 5, 128])
@pytest.mark.parametrize('tied', [False, True])
def test_chunked_loss_equals_log_softmax_of_logits(loss_chunk, tied):
  model = dataclasses.replace(TINY, loss_chunk=loss_chunk, tied=tied)
  params = model.init(jax.random.key(2))
  batch = {'tokens_BxL': tokens(1), 'targets_BxL': tokens(2)}

  def whole(p):
    logp = jax.nn.log_softmax(model.apply(p, batch['tokens_BxL']), axis=-1)
    return -jnp.take_along_axis(logp, batch['targets_BxL'][..., None], -1)[..., 0]

  np.testing.assert_allclose(model.token_nll(params, batch), whole(params), rtol=2e-6, atol=2e-6)
  chunked, full = (jax.grad(lambda p, f=f: f(p).mean())(params) for f in (lambda p: model.token_nll(p, batch), whole))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), chunked, full)


def test_loss_never_builds_the_logits_whole():
  model = dataclasses.replace(TINY, vocab_size=977, loss_chunk=2)  # a size that nothing else has
  shape = jax.ShapeDtypeStruct((3, L), jnp.int32)
  gradient = jax.grad(lambda p, b: model.token_nll(p, b).sum())
  compiled = jax.jit(gradient).lower(model.abstract(), {'tokens_BxL': shape, 'targets_BxL': shape}).compile().as_text()
  largest = max(int(np.prod([int(n) for n in dims.split(',')])) for dims in _shapes_with(compiled, '977'))
  assert largest <= max(3 * 2 * 977, 977 * model.d_model)  # a chunk's logits, or the head's own matrix


def _shapes_with(hlo, size):
  import re
  return [dims for dims in re.findall(r'f32\[([\d,]+)\]', hlo) if size in dims.split(',')]


@pytest.mark.parametrize('remat', sorted(REMAT))
@pytest.mark.parametrize('gated', [True, False])
def test_recomputation_changes_nothing(remat, gated):
  batch = {'tokens_BxL': tokens(1), 'targets_BxL': tokens(2)}
  model = dataclasses.replace(TINY, gated=gated)
  params = model.init(jax.random.key(0))
  grad = lambda m: jax.jit(jax.grad(lambda p: m.token_nll(p, batch).mean()))(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
               grad(dataclasses.replace(model, remat=remat)), grad(dataclasses.replace(model, remat='none')))


def test_rope_fraction_leaves_the_rest_of_a_head_alone():
  """A model that cannot rotate (fraction 0) does not know the order of what it sees; a rotating one does."""
  t = tokens()
  reordered = t.at[:, 0].set(t[:, 1]).at[:, 1].set(t[:, 0])
  for fraction, differs in ((0.0, False), (0.34, True), (1.0, True)):
    model = dataclasses.replace(TINY, rope_fraction=fraction, n_layers=1)
    params = jax.tree.map(lambda p: p * 8, model.init(jax.random.key(0)))
    last = [model.apply(params, x)[:, -1] for x in (t, reordered)]
    assert (float(jnp.abs(last[0] - last[1]).max()) > 1e-3) == differs, fraction


def test_bfloat16_is_close():
  """bf16 has 8 bits of mantissa: 2^-8 relative per product, a few of them in a row."""
  params = TINY.init(jax.random.key(0))
  fine = TINY.apply(params, tokens())
  coarse = dataclasses.replace(TINY, dtype='bfloat16').apply(params, tokens())
  assert coarse.dtype == jnp.float32
  assert 1e-4 < float(jnp.abs(fine - coarse).max() / jnp.abs(fine).max()) < 0.02


@pytest.mark.parametrize('change', [{'n_heads': 3}, {'dtype': 'float16'}, {'remat': 'some'}, {'rope_fraction': 1.5},
                                    {'vocab_size': 0}, {'window': 0}])
def test_impossible_shapes_are_refused(change):
  with pytest.raises(ValueError, match=next(iter(change))):
    model = dataclasses.replace(TINY, **change)
    model.apply(model.init(jax.random.key(0)), tokens())
