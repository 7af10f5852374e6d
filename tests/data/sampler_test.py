"""Laws of the sampler: exact counts per block, no repeat within an epoch, an order that depends on (seed, p) only."""

import contextlib
import itertools
import json
import pydoc_data.topics
import threading

import grain
import jax
import numpy as np
import pytest

from datasel import prepare
from datasel.data import mixture, sampler

SIZES = {'arxiv': 97, 'books': 1, 'code': 1000, 'mail': 3, 'web': 40}
WEIGHTS = {'arxiv': 0.23, 'books': 0.011, 'code': 0.409, 'mail': 0.0, 'web': 0.35}


class Store:
  """Sequences that say which record of which domain they are."""
  length = 4

  def __init__(self, sizes=SIZES, digest='d' * 64):
    self.domains, self.digest, self._sizes_M = tuple(sorted(sizes)), digest, np.array([sizes[d] for d in sorted(sizes)])
    self.reads = 0

  def sizes(self, split):
    return {'train': self._sizes_M, 'validation': self._sizes_M // 2}[split]

  def read(self, split, domain_B, record_B):
    assert (record_B < self.sizes(split)[domain_B]).all() and (record_B >= 0).all()
    self.reads += 1
    tokens_BxL = (record_B[:, None] * 100 + domain_B[:, None] * 10 + np.arange(self.length)).astype(np.int32)
    return {'tokens_BxL': tokens_BxL, 'domain_B': domain_B, 'example_B': record_B}


def _sampler(store=None, weights=WEIGHTS, batch_size=12, seed=5, block=200, **options):
  store = store or Store()
  weights_M = [weights[name] for name in store.domains]
  return sampler.Sampler(store, options.pop('split', 'train'), weights_M, batch_size, seed=seed, block=block, **options)


def _assert_equal(batch, wanted):
  assert batch.keys() == wanted.keys()
  for key in wanted:
    np.testing.assert_array_equal(batch[key], wanted[key], err_msg=key)


def _joined(batches):
  return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def _take(iterator, n):
  return [next(iterator) for _ in range(n)]


@pytest.mark.parametrize('weights, block, wanted', [
    ((0.5, 1 / 3, 1 / 6, 0), 1000, (500, 333, 167, 0)),
    ((0.25, 0.25, 0.25, 0.25), 6, (2, 2, 1, 1)),  # ties go to the earlier domain
    ((0.29, 0.71), 100, (29, 71)),  # 100 * 0.29 is below 29 in floating point
    ((1 / 3, 1 / 3, 1 / 3), 10, (4, 3, 3)),
    ((0.05, 0.4, 0.55), 50, (3, 20, 27)),  # 2.5 and 27.5 tie; in floating point the second is a little more
])
def test_counts_are_those_of_largest_remainder(weights, block, wanted):
  assert sampler.block_counts(weights, block, [f'd{j}' for j in range(len(weights))]).tolist() == list(wanted)


def test_a_positive_weight_without_a_draw_is_refused():
  with pytest.raises(ValueError, match=r'never be drawn: rare 0\.002; raise `block` to 500, or set'):
    sampler.block_counts((0.998, 0.002), 100, ('web', 'rare'))


def test_counts_sum_to_the_block_and_are_within_one_of_the_weights():
  rng = np.random.default_rng(0)
  for _ in range(300):
    weights_M = rng.dirichlet(np.full(22, 0.5))
    weights_M[rng.integers(22)] = 0
    weights_M /= weights_M.sum()
    block = int(np.ceil(1 / weights_M[weights_M > 0].min()))  # what the error for a smaller block advises
    counts_M = sampler.block_counts(weights_M, block, [f'd{j}' for j in range(22)])
    assert counts_M.sum() == block
    assert (np.abs(counts_M - block * weights_M) < 1).all()
    assert (counts_M[weights_M == 0] == 0).all() and (counts_M[weights_M > 0] > 0).all()


def test_every_block_has_exactly_the_counts_and_weight_0_is_never_drawn():
  s = _sampler()
  counts_M = [46, 2, 82, 0, 70]  # 46, 2.2, 81.8, 0, 70
  for block in (0, 1, 2, 977):
    domain_N, _ = s.plan(200 * block, 200 * (block + 1))
    assert np.bincount(domain_N, minlength=5).tolist() == counts_M


def test_every_prefix_is_close_to_the_mixture():
  weights_M = np.random.default_rng(1).dirichlet(np.ones(22))
  domains = [f'd{j:02}' for j in range(22)]
  s = _sampler(Store(dict.fromkeys(domains, 50)), dict(zip(domains, weights_M)), block=4096)
  domain_N, _ = s.plan(0, 3 * 4096)
  drawn_NxM = np.cumsum(domain_N[:, None] == np.arange(22), axis=0)
  wanted_NxM = np.arange(1, len(domain_N) + 1)[:, None] * s.counts_M / 4096
  excess_NxM = np.abs(drawn_NxM - wanted_NxM)
  assert (excess_NxM < 1 + 22 * weights_M).all()  # always: |draws(t) - n_j t| < 1 for every domain at every time t
  assert excess_NxM.max() < 4  # an unstratified shuffle of 4096 reaches about 30
  assert len({tuple(domain_N[4096 * b:4096 * b + 30]) for b in range(3)}) == 3  # blocks are no copies of each other


@pytest.mark.parametrize('size', [*range(1, 70), 255, 256, 257, 1000, 65536, 99991])
def test_permutation_is_a_bijection(size):
  for key in (0, 1, 2**64 - 1):
    out_N = sampler.permuted(np.arange(size), size, np.full(size, key, np.uint64))
    np.testing.assert_array_equal(np.sort(out_N), np.arange(size))


def test_permutation_of_one_index_needs_no_other():
  size = 2**40 + 12345
  index_N = np.array([0, 1, size - 1, 77])
  together_N = sampler.permuted(index_N, size, np.full(4, 9, np.uint64))
  alone_N = [sampler.permuted(index_N[i:i + 1], size, np.full(1, 9, np.uint64))[0] for i in range(4)]
  assert together_N.tolist() == alone_N and (together_N < size).all()


@pytest.mark.parametrize('size', [2, 3, 4, 5])
def test_every_order_of_a_small_domain_is_as_likely(size):
  n_keys = 24000
  key_N = np.random.default_rng(2).integers(2**64, size=n_keys, dtype=np.uint64)
  orders = np.stack([sampler.permuted(np.full(n_keys, i), size, key_N) for i in range(size)], axis=1).tolist()
  every = list(itertools.permutations(range(size)))
  counts = {order: 0 for order in every}
  for order in orders:
    counts[tuple(order)] += 1
  chi2 = sum((n - n_keys / len(every))**2 for n in counts.values()) / (n_keys / len(every))
  free = len(every) - 1
  assert abs(chi2 - free) < 4 * np.sqrt(2 * free) + 4


def test_order_of_a_large_domain_looks_shuffled():
  size = 100_000
  out_N = sampler.permuted(np.arange(size), size, np.full(size, 3, np.uint64))
  # Where a hundredth of the indices goes, in hundredths; what follows what; and correlation with the index itself.
  for first_N, second_N in ((np.arange(size), out_N), (out_N[:-1], out_N[1:])):
    cells = np.histogram2d(first_N, second_N, bins=100)[0]
    chi2 = ((cells - cells.mean())**2 / cells.mean()).sum()
    assert abs(chi2 - 99**2) < 5 * np.sqrt(2 * 99**2)
  assert abs(np.corrcoef(np.arange(size), out_N)[0, 1]) < 5 / np.sqrt(size)


def test_each_epoch_reads_every_record_once_in_another_order():
  s = _sampler()
  domain_N, record_N = s.plan(0, 200 * 60)
  for j, name in enumerate(s.store.domains):
    records = record_N[domain_N == j]
    full = len(records) // SIZES[name]
    epochs = records[:full * SIZES[name]].reshape(full, SIZES[name])
    assert (np.sort(epochs, axis=1) == np.arange(SIZES[name])).all()
    if SIZES[name] > 10:
      assert full >= 4 and len({tuple(epoch) for epoch in epochs.tolist()}) == full
    if full:
      assert set(records[full * SIZES[name]:]) <= set(epochs[0])


def test_plan_does_not_depend_on_how_it_is_asked():
  domain_N, record_N = _sampler().plan(0, 1000)
  s = _sampler()
  for first, last in ((990, 1000), (0, 1), (150, 650), (199, 201), (400, 400)):
    domains, records = s.plan(first, last)
    assert domains.dtype == np.int32 and records.dtype == np.int64
    np.testing.assert_array_equal(domains, domain_N[first:last])
    np.testing.assert_array_equal(records, record_N[first:last])


def test_order_is_the_same_in_every_release():
  # Frozen: a checkpoint of an older release must go on with the examples it would have seen.
  domain_N, record_N = _sampler().plan(198, 210)
  assert domain_N.tolist() == [4, 2, 2, 0, 4, 2, 4, 2, 0, 4, 2, 4]
  assert record_N.tolist() == [10, 623, 389, 60, 22, 32, 14, 410, 13, 39, 321, 21]


def test_seed_changes_domains_and_records():
  plans = [_sampler(seed=seed).plan(0, 200) for seed in (0, 1, 2**63)]
  for (domain_N, record_N), (other_domain_N, other_record_N) in itertools.combinations(plans, 2):
    assert (domain_N != other_domain_N).mean() > 0.3
    assert (record_N[domain_N == 2] != other_record_N[other_domain_N == 2]).mean() > 0.9


def test_adding_a_domain_leaves_the_reading_order_of_the_others():
  domain_N, record_N = _sampler().plan(0, 2000)
  more = _sampler(Store(SIZES | {'aaa': 50}), {name: 0.9 * weight for name, weight in WEIGHTS.items()} | {'aaa': 0.1})
  more_domain_N, more_record_N = more.plan(0, 2000)
  for j, name in enumerate(_sampler().store.domains):
    before, after = record_N[domain_N == j], more_record_N[more_domain_N == more.store.domains.index(name)]
    n = min(len(before), len(after))
    np.testing.assert_array_equal(before[:n], after[:n])


def test_a_batch_is_one_read_of_the_planned_records():
  s = _sampler()
  batches = _take(iter(s), 40)
  assert s.store.reads == 40
  domain_N, record_N = s.plan(0, 480)
  np.testing.assert_array_equal(np.concatenate([b['domain_B'] for b in batches]), domain_N)
  np.testing.assert_array_equal(np.concatenate([b['example_B'] for b in batches]), record_N)


@pytest.mark.parametrize('prefetch', [0, 1, 5])
def test_resume_is_exact_and_state_is_the_position_of_the_consumer(prefetch):
  wanted = _take(iter(_sampler()), 40)
  with contextlib.closing(sampler.batches(_sampler(), prefetch)) as it:
    for _ in range(2):  # also back from a later state to an earlier one
      _take(it, 30)
      state = json.loads(json.dumps(it.get_state()))
      it.set_state(it.get_state() | {'position': 0})
    assert state['position'] == 360
  s = _sampler()
  with contextlib.closing(sampler.batches(s, prefetch)) as it:
    it.set_state(state)
    assert it.get_state() == state and s.store.reads == 0
    for batch, want in zip(_take(it, 10), wanted[30:]):
      _assert_equal(batch, want)


def test_grain_finds_the_iterator_checkpointable():
  grain.experimental.assert_equal_output_after_checkpoint(grain.experimental.LimitIterDataset(_sampler(), 9))


@pytest.mark.parametrize('splits', [(0, 6, 12), (0, 1, 5, 12), (0, 3, 6, 9, 12)])
def test_rows_of_the_processes_make_up_the_batch_and_states_agree(splits):
  whole = iter(_sampler())
  parts = [iter(_sampler(rows=np.arange(*rows))) for rows in itertools.pairwise(splits)]
  for _ in range(35):
    _assert_equal(_joined([next(part) for part in parts]), next(whole))
  assert all(part.get_state() == whole.get_state() for part in parts)


def test_a_token_store_is_sampled_and_resumed_exactly(tmp_path):
  topics = sorted(pydoc_data.topics.topics.values())
  for domain, texts in {'even': topics[0:60:2], 'odd': topics[1:60:2], 'rest': topics[60:75]}.items():
    for split, part in (('train', texts[1:]), ('validation', texts[:1])):
      (tmp_path / 'corpus' / split).mkdir(parents=True, exist_ok=True)
      lines = [json.dumps({'text': text}) + '\n' for text in part]
      (tmp_path / 'corpus' / split / f'{domain}.jsonl').write_text(''.join(lines))
  prepare.train_tokenizer(tmp_path / 'corpus', tmp_path / 'tokenizer.json', vocab_size=400)
  store = prepare.prepare(tmp_path / 'corpus', tmp_path / 'store', tmp_path / 'tokenizer.json', length=64)
  weights_M = mixture.by_tokens(store).for_domains(store.domains)
  new = lambda rows=None: sampler.Sampler(store, 'train', weights_M, 8, seed=1, block=128, rows=rows)
  with contextlib.closing(sampler.batches(new())) as it:
    taken = _take(it, 50)
    state = json.loads(json.dumps(it.get_state()))
    wanted = _take(it, 3)
  domain_N, record_N = new().plan(0, 400)
  np.testing.assert_array_equal(_joined(taken)['domain_B'], domain_N)
  np.testing.assert_array_equal(_joined(taken)['example_B'], record_N)
  _assert_equal(_joined(taken), store.read('train', domain_N, record_N))
  parts = [iter(new(np.arange(*rows))) for rows in ((0, 3), (3, 8))]
  for part in parts:
    part.set_state(state)
  for want in wanted:
    _assert_equal(_joined([next(part) for part in parts]), want)


def test_batch_size_may_change_at_a_restart():
  it = iter(_sampler(batch_size=12))
  _take(it, 5)
  smaller = iter(_sampler(batch_size=4))
  smaller.set_state(it.get_state())
  _assert_equal(_joined(_take(smaller, 3)), next(it))


@pytest.mark.parametrize('other, named', [
    (dict(seed=6), 'seed 5 .this run: 6.'),
    (dict(block=400), 'block 200 .this run: 400.'),
    (dict(split='validation', weights=WEIGHTS | {'books': 0, 'code': 0.42}), "split 'train'"),
    (dict(weights=WEIGHTS | {'arxiv': 0.35, 'web': 0.23}), 'mixture'),
    (dict(store=Store(digest='e' * 64)), 'store'),
    (dict(store=Store({{'web': 'www'}.get(name, name): size for name, size in SIZES.items()}),
          weights=WEIGHTS | {'www': 0.35}), 'mixture'),
])
def test_state_of_another_run_is_refused(other, named):
  state = iter(_sampler()).get_state()
  with pytest.raises(ValueError, match=f'is of another run: .*{named}'):
    iter(_sampler(**other)).set_state(state)


@pytest.mark.parametrize('position', [-1, 1.5, None, '3'])
def test_a_broken_state_is_refused(position):
  it = iter(_sampler())
  with pytest.raises(ValueError, match='want an integer >= 0'):
    it.set_state(it.get_state() | {'position': position})


def test_epochs_count_what_the_plan_reads():
  s = _sampler()
  for position in (0, 1, 199, 200, 201, 5 * 200 + 77):
    drawn_M = np.bincount(s.plan(0, position)[0], minlength=5)
    np.testing.assert_allclose(s.epochs(position), drawn_M / list(SIZES.values()), rtol=1e-15)


@pytest.mark.parametrize('options, message', [
    (dict(weights=WEIGHTS | {'web': 0.34}), 'sum to 1'),
    (dict(weights=WEIGHTS | {'web': 0.36, 'mail': -0.01}), '>= 0'),
    (dict(weights=WEIGHTS | {'web': float('nan')}), 'finite'),
    (dict(block=20), 'never be drawn: books 0.011; raise `block` to 91'),
    (dict(store=Store(SIZES | {'web': 0})), r"\['web'\] have a positive weight but no sequence in split 'train'"),
    (dict(rows=[6, 12]), 'rows .* of a batch of 12'),
    (dict(rows=[6, 6]), 'rows'),
    (dict(rows=[]), 'rows'),
    (dict(batch_size=0), 'at least 1'),
    (dict(seed=-1), 'at least 0'),
])
def test_what_cannot_be_sampled_is_refused_at_once(options, message):
  with pytest.raises(ValueError, match=message):
    _sampler(**options)
  with pytest.raises(ValueError, match='want one for each of the 5 domains'):
    sampler.Sampler(Store(), 'train', [0.5, 0.5], 4, seed=0)


def test_an_error_of_the_store_reaches_the_consumer_and_close_ends_the_thread():
  store = Store()
  before = threading.active_count()
  with contextlib.closing(sampler.batches(_sampler(store), prefetch=2)) as it:
    next(it)
    assert threading.active_count() == before + 1
    store.read = lambda *_: (_ for _ in ()).throw(OSError('disk gone'))
    with pytest.raises(OSError, match='disk gone'):
      _take(it, 9)
  assert threading.active_count() == before


def test_rows_come_from_the_sharding():
  mesh = jax.make_mesh((2, 2), ('data', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  spec = lambda *axes: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))

  class Process:
    """The part of a sharding that one process of several sees: some of its devices."""

    def __init__(self, sharding, devices):
      self._sharding, self._devices = sharding, devices

    def addressable_devices_indices_map(self, shape):
      held = self._sharding.addressable_devices_indices_map(shape)
      return {device: held[device] for device in self._devices}

  rows = lambda sharding, devices=tuple(mesh.devices.flat): sampler.process_rows(Process(sharding, devices), 8).tolist()
  first, last, every = [0, 1, 2, 3], [4, 5, 6, 7], [*range(8)]
  assert rows(spec('data')) == rows(spec(None)) == every
  by_host, by_column = mesh.devices, mesh.devices.T
  assert [rows(spec('data'), devices) for devices in by_host] == [first, last]
  # Two processes share each batch shard: both must be fed all the rows that either holds.
  assert [rows(spec('data'), devices) for devices in by_column] == [every, every]
  assert [rows(spec('data'), [d]) for d in mesh.devices.flat] == [first] * 2 + [last] * 2
  both = spec(('data', 'tensor'))
  assert [rows(both, devices) for devices in by_host] == [first, last]
  # On a pod, the shards of a process need not be neighbours.
  assert [rows(both, devices) for devices in by_column] == [[0, 1, 4, 5], [2, 3, 6, 7]]
