"""Held-out losses against a slow count, token by token, on a real store; and the comparison of two runs, by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_store

from datasel import sharding
from datasel.evaluate import compare, evaluator


def table_nll(params, batch):
  """A model that is a table: its next-token logits depend on the token alone."""
  logp_BxLxV = jax.nn.log_softmax(params, -1)[batch['tokens_BxL']]
  return -jnp.take_along_axis(logp_BxLxV, batch['targets_BxL'][..., None], -1)[..., 0]


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  return small_store.make(tmp_path_factory.mktemp('store'))


@pytest.fixture(scope='module')
def params(store):
  return jax.random.normal(jax.random.key(0), (store.vocab_size, store.vocab_size))


def one_device():
  return sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])


def run(store, params, *, batch_size=16, max_sequences=0, split='validation', mesh=None):
  return evaluator(table_nll, store, mesh or one_device(), batch_size=batch_size, max_sequences=max_sequences,
                   split=split)(params)


def slow(store, params, max_sequences):
  """{domain: nats per token}: row by row and token by token, in float64, of all rows or of some evenly spread."""
  table = np.asarray(params, np.float64)
  log_norm = np.log(np.exp(table).sum(-1))
  result = {}
  for domain, name in enumerate(store.domains):
    total = count = 0
    size = int(store.sizes('validation')[domain])
    n = min(size, max_sequences or size)
    for record in (int(size * i / n) for i in range(n)):
      row = store.read('validation', np.array([domain]), np.array([record]))
      for token, target, counts in zip(row['tokens_BxL'][0], row['targets_BxL'][0], row['loss_mask_BxL'][0]):
        if counts:
          total += log_norm[token] - table[token, target]
          count += 1
    result[name] = total / count
  return result


@pytest.mark.parametrize('max_sequences', [0, 3])
@pytest.mark.parametrize('about', [5, 64])
def test_loss_of_a_domain_is_the_mean_over_its_tokens(store, params, max_sequences, about):
  """In batches that do not divide the sequences: the last one counts nothing twice and drops nothing."""
  sizes = store.sizes('validation')
  counted = int(np.minimum(sizes, max_sequences or sizes.max()).sum())
  batch_size = next(size for size in range(about, about + 100) if counted % size)
  got, want = run(store, params, batch_size=batch_size, max_sequences=max_sequences), slow(store, params, max_sequences)
  assert list(got['nll']) == list(store.domains)
  for name in store.domains:
    assert got['nll'][name] == pytest.approx(want[name], rel=2e-6), name
  assert got['uniform_nll'] == pytest.approx(sum(want.values()) / 3, rel=2e-6)
  assert got['worst_nll'] == pytest.approx(max(want.values()), rel=2e-6)


def test_batch_size_does_not_matter(store, params):
  """Up to float32 rounding inside a batch."""
  whole = run(store, params, batch_size=16)
  for batch_size in (3, 128):
    for name, nll in run(store, params, batch_size=batch_size)['nll'].items():
      assert nll == pytest.approx(whole['nll'][name], rel=1e-6)


def test_four_devices_equal_one(store, params):
  alone = run(store, params)
  for shape in ((4, 1, 1), (2, 2, 1), (1, 1, 4)):
    for name, nll in run(store, params, mesh=sharding.make_mesh(*shape))['nll'].items():
      assert nll == pytest.approx(alone['nll'][name], rel=1e-6), shape


def test_bits_per_byte_by_hand(store):
  """A model that knows nothing spends log2 V bits on each token, over all of a domain's bytes."""
  V = store.vocab_size
  result = run(store, jnp.zeros((V, V)))
  for name, counts in store.counts('validation').items():
    assert result['nll'][name] == pytest.approx(math.log(V), rel=1e-6)
    assert result['bits_per_byte'][name] == pytest.approx(math.log2(V) * counts['targets'] / counts['bytes'], rel=1e-6)


def test_the_split_asked_for_is_read(store, params):
  assert run(store, params, split='train')['nll'] != run(store, params)['nll']


def test_a_loss_that_is_not_finite_is_an_error_that_names_the_domains(store, params):
  with pytest.raises(FloatingPointError, match='email.*nan'):
    run(store, params * math.nan)


def line(step, **nll):
  return {'step': step, 'nll': nll, 'bits_per_byte': {name: x / 2 for name, x in nll.items()},
          'uniform_nll': sum(nll.values()) / len(nll), 'worst_nll': max(nll.values())}


BASELINE = [line(0, code=9.0, web=9.0), line(50, code=5.0, web=4.0), line(100, code=4.0, web=3.0)]


def test_comparison_by_hand():
  candidate = [line(0, code=9.0, web=9.0), line(50, code=3.0, web=3.5), line(100, code=2.0, web=3.25)]
  assert compare(candidate, BASELINE) == {
    'uniform_nll': {'candidate': 2.625, 'baseline': 3.5}, 'worst_nll': {'candidate': 3.25, 'baseline': 4.0},
    'uniform_bits_per_byte': {'candidate': 1.3125, 'baseline': 1.75}, 'domains_won': ['code'], 'domains': 2,
    'baseline_steps': 100, 'steps_to_baseline': 50}


@pytest.mark.parametrize(('uniform', 'steps'), [
  ([9.0, 4.0, 3.5], 100),  # as good as the baseline at its end
  ([9.0, 4.0, 3.6], None),  # never
  ([3.5, 4.0, 5.0], 0),  # before the first update, and worse later
  ([9.0, 3.4, 3.6], 50)])
def test_steps_to_baseline(uniform, steps):
  result = compare([line(step, code=x, web=x) for step, x in zip((0, 50, 100), uniform)], BASELINE)
  assert result['steps_to_baseline'] == steps


def test_a_tie_wins_no_domain():
  assert compare(BASELINE, BASELINE)['domains_won'] == []
