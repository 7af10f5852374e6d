"""The kept reference losses are the model's, for all that the samplers will draw; kills and damage are survived."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_store

from datasel import metrics, row_values, sharding, workdir
from datasel.data.mixture import by_tokens
from datasel.data.sampler import Sampler
from datasel.methods.doremi import reference_losses

STEPS, BATCH, BLOCK = 7, 8, 20  # 56 positions: the last block is cut


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


def samplers(store, seeds=(1, 2)):
  weights_M = by_tokens(store).for_domains(store.domains)
  return [Sampler(store, 'train', weights_M, BATCH, seed=seed, block=BLOCK) for seed in seeds]


def compute(directory, store, params, *, records=None, read_from=None, provenance='seed 0'):
  return reference_losses.compute(
    directory, table_nll, params, read_from or store, sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]),
    reference_losses.visited(samplers(store), STEPS) if records is None else records, batch_size=BATCH,
    provenance={'from': provenance}, stage='reference_nll', progress=metrics.Progress(1.0), flops_per_row=1.0)


class CountedStore:
  """A store that counts the batches read from it, and fails after so many: a kill in the middle."""

  def __init__(self, store, fail_after=None):
    self._store, self._fail_after, self.reads = store, fail_after, 0

  def __getattr__(self, name):
    return getattr(self._store, name)

  def read(self, *args):
    if self.reads == self._fail_after:
      raise KeyboardInterrupt
    self.reads += 1
    return self._store.read(*args)


@pytest.fixture
def often(monkeypatch):
  """A clock by which every batch takes long enough to be recorded as done."""
  seconds = itertools.count(step=6.0)
  monkeypatch.setattr(row_values, 'time', types.SimpleNamespace(perf_counter=lambda: next(seconds)))


def batches(store):
  for sampler in samplers(store):
    yield from itertools.islice(sampler, STEPS)


def test_visited_is_what_the_samplers_deliver(store):
  drawn = {(int(d), int(n)) for batch in batches(store) for d, n in zip(batch['domain_B'], batch['example_B'])}
  records = reference_losses.visited(samplers(store), STEPS)
  assert {(d, int(n)) for d, listed in enumerate(records) for n in listed} == drawn
  assert all((np.diff(listed) > 0).all() for listed in records)


def test_added_losses_are_the_models(store, params, tmp_path):
  losses = compute(tmp_path / 'losses', store, params)
  direct = jax.jit(table_nll)
  for batch in batches(store):
    added = losses(batch)
    assert added.keys() - batch.keys() == {'reference_nll_BxL'} and 'reference_nll_BxL' not in batch
    assert added['reference_nll_BxL'].dtype == np.float32
    np.testing.assert_allclose(added['reference_nll_BxL'], direct(params, batch), rtol=1e-6, atol=1e-6)


def test_four_devices_compute_the_same(store, params, tmp_path):
  records = reference_losses.visited(samplers(store), STEPS)
  alone = compute(tmp_path / 'alone', store, params)
  spread = reference_losses.compute(
    tmp_path / 'spread', table_nll, params, store, sharding.make_mesh(2, 2, 1), records, batch_size=BATCH,
    provenance={}, stage='reference_nll', progress=metrics.Progress(1.0), flops_per_row=1.0)
  for batch in batches(store):
    np.testing.assert_allclose(*(x(batch)['reference_nll_BxL'] for x in (alone, spread)), rtol=1e-6, atol=1e-6)


def test_killed_in_the_middle_and_resumed_gives_the_same_files(store, params, tmp_path, often):
  whole = CountedStore(store)
  compute(tmp_path / 'whole', store, params, read_from=whole)
  with pytest.raises(KeyboardInterrupt):
    compute(tmp_path / 'killed', store, params, read_from=CountedStore(store, fail_after=4))
  assert not (tmp_path / 'killed/manifest.json').exists()
  resumed = CountedStore(store)
  compute(tmp_path / 'killed', store, params, read_from=resumed)
  assert resumed.reads == whole.reads - 4
  contents = lambda name: {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}
  assert contents('killed') == contents('whole')


def test_finished_losses_are_not_computed_again(store, params, tmp_path):
  compute(tmp_path / 'losses', store, params)
  again = CountedStore(store)
  compute(tmp_path / 'losses', store, params, read_from=again)
  assert again.reads == 0


def test_other_parameters_or_records_are_computed_anew(store, params, tmp_path):
  records = reference_losses.visited(samplers(store), STEPS)
  [batch] = itertools.islice(batches(store), 1)
  before = compute(tmp_path / 'losses', store, params)(batch)['reference_nll_BxL']
  after = compute(tmp_path / 'losses', store, 2 * params, provenance='seed 1')(batch)['reference_nll_BxL']
  np.testing.assert_allclose(after, table_nll(2 * params, batch), rtol=1e-5, atol=1e-6)
  assert np.abs(before - after).max() > 0.1
  fewer = CountedStore(store)
  losses = compute(tmp_path / 'losses', store, params, records=[r[:2] for r in records], read_from=fewer)
  assert fewer.reads == 1
  names = store.read('train', np.array([0, 2]), np.array([records[0][1], records[2][0]]))
  np.testing.assert_allclose(losses(names)['reference_nll_BxL'], table_nll(params, names), rtol=1e-5, atol=1e-6)


def test_a_partial_result_of_other_parameters_is_not_continued(store, params, tmp_path, often):
  with pytest.raises(KeyboardInterrupt):
    compute(tmp_path / 'losses', store, params, read_from=CountedStore(store, fail_after=4))
  losses = compute(tmp_path / 'losses', store, 2 * params, provenance='seed 1')
  for batch in batches(store):
    got = losses(batch)['reference_nll_BxL']
    np.testing.assert_allclose(got, table_nll(2 * params, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', ['nll.npy', 'records-email.npy'])
def test_a_flipped_byte_is_refused_by_the_files_name(store, params, tmp_path, name):
  compute(tmp_path / 'losses', store, params)
  file = tmp_path / 'losses' / name
  damaged = bytearray(file.read_bytes())
  damaged[-3] ^= 1
  file.write_bytes(damaged)
  with pytest.raises(ValueError, match=f'{name} is damaged.*delete'):
    compute(tmp_path / 'losses', store, params)
  file.unlink()
  with pytest.raises(ValueError, match=f'{name} is damaged .*no file'):
    row_values.RowValues(tmp_path / 'losses', reference_losses.quantity(store), store)


def test_losses_of_another_store_are_refused(store, params, tmp_path):
  compute(tmp_path / 'losses', store, params)
  other = types.SimpleNamespace(digest='another', path='elsewhere', domains=store.domains)
  with pytest.raises(ValueError, match='another token store than elsewhere'):
    row_values.RowValues(tmp_path / 'losses', reference_losses.quantity(store), other)


def test_an_example_without_a_loss_is_named(store, params, tmp_path):
  records = reference_losses.visited(samplers(store), STEPS)
  losses = compute(tmp_path / 'losses', store, params, records=[records[0], records[1][:1], records[2]])
  missing = int(records[1][1])
  batch = store.read('train', np.array([0, 1]), np.array([records[0][0], missing]))
  with pytest.raises(KeyError, match=rf'no reference loss for all of json records \[{missing}\]'):
    losses(batch)


def test_a_loss_that_is_not_finite_names_its_example(store, params, tmp_path):
  records = reference_losses.visited(samplers(store), STEPS)
  row = store.read('train', np.array([0]), records[0][:1])
  broken = params.at[row['tokens_BxL'][0, 0]].set(jnp.nan)
  with pytest.raises(FloatingPointError, match=f'email/{records[0][0]} is not finite.*peak_lr'):
    compute(tmp_path / 'losses', store, broken)
  assert not (tmp_path / 'losses/manifest.json').exists()


def test_the_files_say_what_they_are_from(store, params, tmp_path):
  compute(tmp_path / 'losses', store, params)
  manifest = workdir.read_json(tmp_path / 'losses/manifest.json')
  assert manifest['store'] == store.digest and manifest['from'] == {'from': 'seed 0'}
  assert manifest['rows'] == sum(map(len, reference_losses.visited(samplers(store), STEPS)))
