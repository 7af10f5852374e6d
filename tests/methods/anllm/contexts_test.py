"""Perplexity by context against a count window by window and document by document, unpacked, under the dense mask."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_store

from datasel import sharding
from datasel.data.anchors import Rule, punctuation_ids
from datasel.data.tokenizer import load
from datasel.evaluate import evaluator
from datasel.methods.anllm import contexts
from datasel.models.mistral import Mistral

LENGTHS = (8, 32)


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  return small_store.make(tmp_path_factory.mktemp('store'))


@pytest.fixture(scope='module')
def model(store):
  """Of periods and commas: short segments, several in a window."""
  return Mistral(vocab_size=store.vocab_size, n_layers=2, d_model=16, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=32,
                 init_std=0.3, anchors=Rule(punctuation_ids(load(store.path), '.,'), max_length=5))


@pytest.fixture(scope='module')
def params(model):
  return model.init(jax.random.key(0))


def run(model, params, store, *, mesh=None, lengths=LENGTHS, sequences=5, batch_size=4, **options):
  mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
  return contexts.by_context(model, params, store, mesh, lengths=lengths, sequences=sequences, batch_size=batch_size,
                             **options)


def pieces(store, length, sequences):
  """(domain, tokens with the last target) of each document in each window of the first 32 tokens of a record."""
  for domain, size in enumerate(store.sizes('validation')):
    for i in range(min(size, sequences)):
      row = store.read('validation', np.array([domain]), np.array([i * size // min(size, sequences)]))
      for start in range(0, 32, length):
        window = {name: x[0, start:start + length] for name, x in row.items() if name.endswith('L')}
        for document in sorted(set(window['segment_BxL']) - {0}):
          inside = window['segment_BxL'] == document
          tokens, targets = window['tokens_BxL'][inside], window['targets_BxL'][inside]
          counted = int(window['loss_mask_BxL'][inside].sum())
          assert window['loss_mask_BxL'][inside][:counted].all()
          if counted:
            yield domain, [*tokens[:counted], targets[counted - 1]]


def slow(model, params, store, length, sequences, anchor_ids):
  """Each piece is a row of its own that nothing else shares, padded behind."""
  found = list(pieces(store, length, sequences))
  tokens_BxT = np.zeros((len(found), 33), np.int32)
  for row, (_, tokens) in zip(tokens_BxT, found):
    row[:len(tokens)] = tokens
  dense = dataclasses.replace(model, attention='reference')
  logp_BxLxV = jax.nn.log_softmax(jax.jit(dense.apply)(params, tokens_BxT[:, :-1]), axis=-1)
  nll_BxL = -np.take_along_axis(np.asarray(logp_BxLxV, np.float64), tokens_BxT[:, 1:, None], axis=-1)[..., 0]
  counts = store.counts('validation')
  nats, plain, size = [], [], 0.0
  for (domain, tokens), nll_L in zip(found, nll_BxL):
    nats += nll_L[:len(tokens) - 1].tolist()
    plain += [x for x, target in zip(nll_L, tokens[1:]) if target not in anchor_ids]
    of_domain = counts[store.domains[domain]]
    size += (len(tokens) - 1) * of_domain['bytes'] / of_domain['targets']
  nll = math.fsum(nats) / len(nats)
  assert len(plain) < len(nats) or not anchor_ids
  return {'nll': nll, 'ppl': math.exp(nll), 'bits_per_byte': math.fsum(nats) / math.log(2) / size,
          'nll_without_anchors': math.fsum(plain) / len(plain)}


@pytest.mark.parametrize('masked', [True, False])
def test_every_window_is_read_afresh_and_every_document_alone(model, params, store, masked):
  anchor_ids = model.anchors.anchor_ids
  model = model if masked else contexts.unmasked(model)
  found = run(model, params, store, anchor_ids=anchor_ids)
  assert list(found) == [str(length) for length in LENGTHS]
  for length in LENGTHS:
    assert found[str(length)] == pytest.approx(slow(model, params, store, length, 5, anchor_ids), rel=2e-5), length
  assert len({x['nll'] for x in found.values()}) == len(LENGTHS)


def test_positions_begin_again_with_each_window_and_document(store):
  """No loss tells: rotations are by distance, but for scalings that go by the longest position."""
  batch = store.read('validation', np.zeros(6, int), np.arange(6))
  cut = contexts.windows(batch, 8, 24)
  assert cut['tokens_BxL'].tolist() == batch['tokens_BxL'][:, :24].reshape(18, 8).tolist()
  assert cut['domain_B'].tolist() == [0] * 18 and (batch['position_BxL'][:, 8] > 0).any()
  for segment_L, position_L in zip(cut['segment_BxL'].tolist(), cut['position_BxL'].tolist()):
    assert position_L == [segment_L[:t].count(segment) if segment else 0 for t, segment in enumerate(segment_L)]


def test_the_mask_is_taken_off_and_nothing_else(model, params, store):
  plain = dataclasses.replace(model, anchors=None)
  for switched in (model, dataclasses.replace(model, anchor_sees_anchors=True, keep_bos=True)):
    assert contexts.unmasked(switched) == plain == contexts.unmasked(plain)
  assert run(plain, params, store, lengths=[32]) != run(model, params, store, lengths=[32])


def test_whole_records_give_what_the_evaluation_of_training_gives(model, params, store):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  want = evaluator(model.token_nll, store, mesh, batch_size=8, max_sequences=0)(params)
  found = run(model, params, store, lengths=[store.length], sequences=0)[str(store.length)]
  counts = store.counts('validation')
  weighted = lambda values, key: sum(x * counts[name][key] for name, x in values.items()) / sum(
    of_domain[key] for of_domain in counts.values())
  assert found['nll'] == pytest.approx(weighted(want['nll'], 'targets'), rel=1e-6)
  assert found['bits_per_byte'] == pytest.approx(weighted(want['bits_per_byte'], 'bytes'), rel=1e-6)


def test_all_lengths_have_the_same_targets(store):
  """A model whose loss is the target's number."""
  class Numbers:
    def token_nll(self, params, batch):
      return batch['targets_BxL'].astype(jnp.float32) * params
  found = run(Numbers(), jnp.float32(0.01), store, lengths=[32, 4, 1], anchor_ids=[46])
  assert list(found) == ['1', '4', '32'] and found['1']['nll'] != found['1']['nll_without_anchors']
  for length in ('1', '4'):
    assert found[length] == pytest.approx(found['32'], rel=1e-6)


def test_batches_and_devices_do_not_matter(model, params, store):
  want = run(model, params, store, lengths=[8, 32], batch_size=16)
  for mesh, batch_size in ((None, 3), (sharding.make_mesh(1, 2, 2), 6)):
    found = run(model, params, store, lengths=[8, 32], mesh=mesh, batch_size=batch_size)
    for length, row in want.items():
      assert found[length] == pytest.approx(row, rel=1e-5), (length, batch_size)


@pytest.mark.parametrize('lengths', [[], [0, 8], [64], [12, 32]])
def test_lengths_that_do_not_fit_are_refused(model, params, store, lengths):
  with pytest.raises(ValueError, match='records of 32 tokens; want at least one, none longer than a record'):
    run(model, params, store, lengths=lengths)


def test_a_loss_that_is_not_finite_is_an_error(model, params, store):
  with pytest.raises(FloatingPointError, match='windows of 8 tokens'):
    run(model, jax.tree.map(lambda x: x * math.nan, params), store, lengths=[8])
