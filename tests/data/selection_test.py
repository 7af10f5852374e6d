"""Laws of selections: exactly the largest keys, the same to the bit everywhere, and a store seen through one."""

import decimal
import json
import math

import jax
import numpy as np
import pytest
import scipy.stats
import small_store

from datasel import metrics, sharding
from datasel.data import gumbel, mixture, selection
from datasel.data.sampler import Sampler
from datasel.data.selection import Selected, Selection, gumbel_top_k
from datasel.methods.doremi import reference_losses


def some_scores(seed=0, sizes=(700, 1, 0, 1300)):
  rng = np.random.default_rng(seed)
  return {name: rng.standard_normal(n).astype(np.float32) for name, n in zip(('code', 'mail', 'none', 'web'), sizes)}


def brute_force(scores, k, temperature, seed):
  """Every key in one sorted list; among equal ones the first by domain and record come first."""
  keys = []
  for name in sorted(scores):
    noise_N = gumbel.noise(seed, name, 0, len(scores[name]))
    keys += [(-(float(s) + temperature * g), name, n) for n, (s, g) in enumerate(zip(scores[name], noise_N))]
  kept = {name: [] for name in scores}
  for _, name, n in sorted(keys)[:k]:
    kept[name].append(n)
  return {name: sorted(numbers) for name, numbers in kept.items()}


def lists(kept):
  return {name: numbers.tolist() for name, numbers in kept.items()}


@pytest.mark.parametrize(('chunk', 'held'), [(1 << 16, 1 << 22), (64, 300), (100, 1), (7, 0)])
@pytest.mark.parametrize(('ratio', 'temperature'), [(0.4, 0.1), (0.001, 1.0), (1.0, 0.5), (0.25, 0.0)])
def test_the_largest_keys_are_kept_however_they_are_found(monkeypatch, chunk, held, ratio, temperature):
  monkeypatch.setattr(selection, '_CHUNK', chunk)
  monkeypatch.setattr(selection, '_HELD', held)
  scores = some_scores()
  kept = gumbel_top_k(scores, ratio=ratio, temperature=temperature, seed=3)
  assert lists(kept) == brute_force(scores, round(ratio * 2001), temperature, 3)
  assert all(numbers.dtype == np.int64 for numbers in kept.values()) and list(kept) == sorted(scores)


@pytest.mark.parametrize('held', [1 << 22, 5, 0])
@pytest.mark.parametrize('values', [(0.0,), (0.0, -0.0), (-2.0, -0.5, 0.0, -0.0, 0.5, 1.5)])
def test_among_equal_keys_the_first_stay(monkeypatch, held, values):
  monkeypatch.setattr(selection, '_CHUNK', 16)
  monkeypatch.setattr(selection, '_HELD', held)
  scores = {name: np.random.default_rng(len(name)).choice(np.array(values), 50) for name in ('web', 'code')}
  for ratio in (0.1, 0.5, 0.93):
    kept = gumbel_top_k(scores, ratio=ratio, temperature=0.0, seed=0)
    assert lists(kept) == brute_force(scores, round(100 * ratio), 0.0, 0)


def test_any_float_has_its_place_in_the_order():
  keys_N = np.array([-1.7e308, -1e300, -1.0, -1e-300, -5e-324, 0.0, 5e-324, 2e-300, 1.0, 1 + 2**-52, 1e300])
  image_N = selection._ordered(keys_N)
  assert image_N.dtype == np.uint64 and (image_N[1:] > image_N[:-1]).all()


def test_a_memory_map_is_selected_from_as_an_array(tmp_path):
  scores = some_scores()
  np.save(tmp_path / 'scores.npy', scores['web'])
  mapped = scores | {'web': np.load(tmp_path / 'scores.npy', mmap_mode='r')}
  options = {'ratio': 0.3, 'temperature': 0.2, 'seed': 1}
  assert lists(gumbel_top_k(mapped, **options)) == lists(gumbel_top_k(scores, **options))


def test_a_quota_is_a_selection_of_its_own():
  scores, options = some_scores(), {'temperature': 0.3, 'seed': 5}
  kept = gumbel_top_k(scores, ratio=0.4, quotas={'web': 0.25, 'none': 1.0, 'mail': 0}, **options)
  for names, ratio in ((['web'], 0.25), (['code'], 0.4)):
    alone = gumbel_top_k({name: scores[name] for name in names}, ratio=ratio, **options)
    assert {name: kept[name].tolist() for name in names} == lists(alone)
  assert len(kept['web']) == 325 and len(kept['code']) == 280 and not len(kept['mail']) and not len(kept['none'])


def test_noise_is_a_function_of_seed_domain_and_record_alone():
  whole = gumbel.noise(4, 'web', 0, 1000)
  for first, last in ((0, 1), (3, 4), (5, 17), (1, 999), (996, 1000), (7, 7)):
    assert gumbel.noise(4, 'web', first, last).tolist() == whole[first:last].tolist()
  far = gumbel.noise(4, 'web', 10**12 - 2, 10**12 + 2)
  assert far[2:].tolist() == gumbel.noise(4, 'web', 10**12, 10**12 + 2).tolist()


def test_noise_is_the_same_in_every_release():
  # Frozen to the bit: a selection can be repeated from its scores and seed.
  assert [x.hex() for x in gumbel.noise(0, 'web', 6, 10).tolist()] == [
      '0x1.3520b98dd57a3p+0', '0x1.a0279580b1039p+0', '0x1.b85b615838588p-1', '-0x1.a029e46b889d2p-1']


def test_noise_is_gumbel_and_independent_between_seeds_and_domains():
  draws = [gumbel.noise(seed, name, 0, 40_000) for seed, name in ((0, 'web'), (1, 'web'), (0, 'code'))]
  for noise_N in draws:
    assert scipy.stats.kstest(noise_N, scipy.stats.gumbel_r.cdf).pvalue > 1e-3
    assert abs(np.corrcoef(noise_N[1:], noise_N[:-1])[0, 1]) < 5 / math.sqrt(40_000)
  correlation = np.corrcoef(draws) - np.eye(3)
  assert np.abs(correlation).max() < 5 / math.sqrt(40_000)


def test_the_logarithm_is_within_an_ulp():
  rng = np.random.default_rng(0)
  kinds = [rng.random(300), 1 - rng.random(300) * 1e-6, 40 * rng.random(300), np.exp(-36 * rng.random(300))]
  x_N = np.concatenate([*kinds, [1.0, 2.0**-53, 1 - 2.0**-53, math.sqrt(0.5), np.nextafter(math.sqrt(0.5), 0)]])
  with decimal.localcontext(prec=60):
    for x, got in zip(x_N.tolist(), gumbel._log(x_N).tolist()):
      true = decimal.Decimal(x).ln()
      assert abs(decimal.Decimal(got) - true) <= decimal.Decimal(math.ulp(float(true))), x


def test_records_are_included_as_often_as_drawing_without_replacement_would():
  """Gumbel-top-k is Plackett-Luce: the first in proportion to exp(s/t), the second in proportion among the others."""
  scores = {'a': np.array([0.0, 0.7, -0.4], np.float32), 'b': np.array([0.3, 1.1], np.float32)}
  weights_N = np.exp(np.concatenate(list(scores.values())).astype(np.float64) / 0.5)
  total = weights_N.sum()
  wanted_N = np.array([w / total + sum(v / total * w / (total - v) for j, v in enumerate(weights_N) if j != i)
                       for i, w in enumerate(weights_N)])
  n, included_N = 2000, np.zeros(5)
  for seed in range(n):
    kept = gumbel_top_k(scores, ratio=0.4, temperature=0.5, seed=seed)
    included_N[np.concatenate([kept['a'], 3 + kept['b']])] += 1
  assert included_N.sum() == 2 * n and wanted_N.sum() == pytest.approx(2)
  assert (np.abs(included_N / n - wanted_N) < 4 * np.sqrt(wanted_N * (1 - wanted_N) / n)).all()


def test_equal_scores_are_selected_at_random():
  zeros = {'a': np.zeros(3000, np.float32)}
  one, two = (gumbel_top_k(zeros, ratio=0.4, temperature=1.0, seed=seed)['a'] for seed in (0, 1))
  assert len(one) == len(two) == 1200
  assert abs(len(np.intersect1d(one, two)) - 480) < 5 * math.sqrt(480 * 0.6)
  assert scipy.stats.kstest(one / 3000, 'uniform').pvalue > 1e-3


@pytest.mark.parametrize(('change', 'message'), [
  ({'ratio': 0.0}, 'ratio is 0'), ({'ratio': 1.1}, 'ratio is 1.1'), ({'ratio': math.nan}, 'ratio is nan'),
  ({'temperature': -0.1}, 'temperature is -0.1'), ({'temperature': math.inf}, 'temperature is inf'),
  ({'seed': -1}, 'seed is -1'), ({'quotas': {'wed': 0.5}}, "'wed', which is not there; the domains are code"),
  ({'quotas': {'web': 2.0}}, "quota of domain 'web' is 2"), ({'ratio': 1e-4}, 'less than half a record'),
  ({'quotas': {'mail': 0.3}}, '0.3 of the 1 records of mail'), ({'scores': {}}, 'no scores'),
  ({'quotas': dict.fromkeys(some_scores(), 0)}, 'nothing would be kept of any domain'),
  ({'scores': {'web': [1.0]}}, "of domain 'web' are list"),
  ({'scores': {'web': np.zeros((2, 2))}}, r'float64 \[2, 2\]'),
  ({'scores': {'web': np.zeros(2, int)}}, r'int64 \[2\]'), ({'scores': {'../web': np.zeros(2)}}, 'not allowed'),
  ({'scores': {'web': np.array([0, 1, math.nan])}}, 'record web/2 is nan'),
  ({'scores': {'a': np.ones(5), 'web': np.array([0, -math.inf])}}, 'record web/1 is -inf')])
def test_what_cannot_be_selected_by_is_refused(change, message):
  arguments = {'scores': some_scores(), 'ratio': 0.5, 'temperature': 0.1, 'seed': 0} | change
  with pytest.raises(ValueError, match=message):
    gumbel_top_k(arguments.pop('scores'), **arguments)


@pytest.mark.parametrize('text, quotas', [('', {}), ('code=0.5,web=0', {'code': 0.5, 'web': 0.0}),
                                          ('code = 1e-2 ', {'code': 0.01})])
def test_quotas_are_read_from_a_setting(text, quotas):
  assert selection.quotas_of(text) == quotas


@pytest.mark.parametrize('text', ['code', 'code=half', 'code=0.5,', 'code=0.5=web', 'code=1,code=1', 'code=1;web=1'])
def test_what_is_no_quota_is_refused(text):
  with pytest.raises(ValueError, match=r"quotas are .* want DOMAIN=PART,..., such as 'code=0.5,web=0'"):
    selection.quotas_of(text)


# The file.

def a_selection(**records):
  records = {name: np.array(numbers, np.int64) for name, numbers in records.items()}
  return Selection(records, {'store': 'd' * 64, 'method': 'pds', 'ratio': 0.4, 'seed': 0})


def test_a_selection_comes_back_from_its_file(tmp_path):
  # 'file' is also what numpy calls its own argument.
  chosen = a_selection(web=[0, 5, 10**12], file=[3], none=[])
  selection.write(tmp_path / 'a.npz', chosen)
  read = selection.load(tmp_path / 'a.npz')
  assert lists(read.records) == lists(chosen.records) and read.provenance == chosen.provenance
  assert read.digest == chosen.digest and all(r.dtype == np.int64 for r in read.records.values())
  selection.write(tmp_path / 'b.npz', a_selection(none=[], file=[3], web=[0, 5, 10**12]))
  assert (tmp_path / 'a.npz').read_bytes() == (tmp_path / 'b.npz').read_bytes()


def test_the_digest_is_of_what_is_selected():
  one = a_selection(web=[1, 2], code=[])
  assert Selection(one.records, {'store': 'other', 'git': 'x'}).digest == one.digest
  others = [a_selection(web=[1, 3], code=[]), a_selection(web=[1], code=[2]), a_selection(code=[1, 2], web=[])]
  assert len({one.digest, *(other.digest for other in others)}) == 4


def test_no_damage_passes(tmp_path):
  path = tmp_path / 'selection.npz'
  selection.write(path, a_selection(web=[2, 5, 9], code=[]))
  whole = path.read_bytes()
  rng = np.random.default_rng(0)
  for at in rng.choice(len(whole), 150, replace=False):
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1:])
    try:
      read = selection.load(path)
    except ValueError as e:
      assert str(path) in str(e)
    else:  # a byte that says nothing, such as a file date
      assert lists(read.records) == {'web': [2, 5, 9], 'code': []} and read.provenance['ratio'] == 0.4
  for length in (0, 10, len(whole) // 2, len(whole) - 1):
    path.write_bytes(whole[:length])
    with pytest.raises(ValueError, match='no selection.npz, or was cut short'):
      selection.load(path)


def test_what_was_changed_or_is_something_else_is_refused(tmp_path):
  path = tmp_path / 'selection.npz'
  selection.write(path, a_selection(web=[2, 5, 9]))
  with np.load(path) as file:
    members = dict(file)
  described = json.loads(members['manifest'].tobytes())
  described['provenance']['ratio'] = 0.9
  encoded = np.frombuffer(json.dumps(described).encode(), np.uint8)
  for changed in ({'records/web': np.array([2, 5])}, {'records/more': np.array([1])}, {'manifest': encoded},
                  {'records/web': np.array([None], object)}):
    np.savez(path, **members | changed)
    with pytest.raises(ValueError, match='restore it from a copy'):
      selection.load(path)
  np.savez(path, something=np.arange(3))
  with pytest.raises(ValueError, match='is damaged, or no selection.npz'):
    selection.load(path)
  with pytest.raises(ValueError, match='there is no selection'):
    selection.load(tmp_path / 'gone.npz')


@pytest.mark.parametrize(('records', 'provenance', 'message'), [
  ({'web': [2, 1]}, {'store': ''}, "'web' are not rising"), ({'web': [1, 1]}, {'store': ''}, 'not rising'),
  ({'web': [-1, 1]}, {'store': ''}, 'not rising'), ({'web': [0.5]}, {'store': ''}, 'float64'),
  ({'a b': [1]}, {'store': ''}, 'not allowed'), ({'web': [1]}, {}, "no 'store'"),
  ({'web': [1]}, {'store': '', 'ratio': math.nan}, 'JSON')])
def test_what_is_no_selection_is_refused(records, provenance, message):
  with pytest.raises(ValueError, match=message):
    Selection({name: np.array(numbers) for name, numbers in records.items()}, provenance)


# The store seen through it.

@pytest.fixture(scope='module')
def store(tmp_path_factory):
  return small_store.make(tmp_path_factory.mktemp('store'))


def choose(store, keep):
  """The selection of those records of which keep(domain, numbers) is true."""
  sizes = dict(zip(store.domains, store.sizes('train').tolist()))
  return Selection({name: np.flatnonzero(keep(name, np.arange(size))) for name, size in sizes.items()},
                   {'store': store.digest})


def thirds(name, numbers):
  return (numbers % 3 == 1) & (name != 'json') | (numbers == len(numbers) - 1) & (name == 'email')


def assert_same_rows(got, wanted):
  assert got.keys() == wanted.keys()
  for key in wanted.keys() - {'example_B'}:
    np.testing.assert_array_equal(got[key], wanted[key], err_msg=key)


def test_train_is_the_kept_records_in_order_and_all_else_is_the_stores(store):
  chosen = choose(store, thirds)
  view = Selected(store, chosen)
  assert (view.domains, view.length, view.tokenizer, view.vocab_size, view.path) == (
      store.domains, store.length, store.tokenizer, store.vocab_size, store.path)
  assert view.sizes('train').tolist() == [len(chosen.records[name]) for name in store.domains]
  assert view.sizes('train')[1] == 0 < view.sizes('train')[0]
  for domain, name in enumerate(store.domains):
    kept = chosen.records[name]
    if len(kept):
      order = np.random.default_rng(0).permutation(len(kept))
      batch = view.read('train', np.full(len(kept), domain), order)
      assert_same_rows(batch, store.read('train', np.full(len(kept), domain), kept[order]))
      assert batch['example_B'].tolist() == order.tolist() and batch['example_B'].dtype == np.int64
      assert view.names(batch['domain_B'], batch['example_B']) == [f'{name}/{n}' for n in kept[order]]
  np.testing.assert_array_equal(view.sizes('validation'), store.sizes('validation'))
  assert view.counts('validation') == store.counts('validation')
  one = np.array([1]), np.array([2])
  assert_same_rows(view.read('validation', *one), store.read('validation', *one))
  assert view.digest not in (store.digest, chosen.digest)
  assert view.digest != Selected(store, choose(store, lambda name, n: n % 3 == 0)).digest


@pytest.mark.parametrize('keep', [thirds, lambda name, n: n >= 0, lambda name, n: n < len(n) - 1])
def test_counted_tokens_are_those_of_the_kept_records(store, keep):
  view = Selected(store, choose(store, keep))
  for domain, name in enumerate(store.domains):
    size = int(view.sizes('train')[domain])
    rows = np.full(size, domain), np.arange(size)
    tokens = int((view.read('train', *rows)['segment_BxL'] > 0).sum()) if size else 0
    assert view.counts('train')[name] == {'sequences': size, 'tokens': tokens}
    if size == store.sizes('train')[domain]:
      assert 0 <= store.counts('train')[name]['tokens'] - tokens <= 1


def test_mixtures_count_the_selection(store):
  view = Selected(store, choose(store, thirds))
  by_examples, by_tokens = mixture.by_examples(view), mixture.by_tokens(view)
  assert by_examples.weights['json'] == by_tokens.weights['json'] == 0
  sizes_M = view.sizes('train')
  np.testing.assert_allclose(by_examples.for_domains(view.domains), sizes_M / sizes_M.sum(), rtol=1e-12)
  assert by_tokens.provenance['store'] == view.digest
  with pytest.raises(ValueError, match=r"\['json'\] have a positive weight but no sequence"):
    Sampler(view, 'train', np.full(3, 1 / 3), 4, seed=0)


def test_a_row_out_of_range_is_named(store):
  view = Selected(store, choose(store, thirds))
  size = int(view.sizes('train')[0])
  for record in (size, -1):
    with pytest.raises(IndexError, match=f"record {record} is out of range; the selection keeps {size} of .*'email'"):
      view.read('train', np.array([2, 0]), np.array([0, record]))
  with pytest.raises(IndexError, match='domain 3 is out of range'):
    view.read('train', np.array([3]), np.array([0]))
  with pytest.raises(IndexError, match="keeps 0 of domain 'json'"):
    view.read('train', np.array([1]), np.array([0]))
  with pytest.raises(ValueError, match='unknown split'):
    view.sizes('test')


def test_a_selection_that_is_not_of_the_store_is_refused(store):
  records = dict(choose(store, thirds).records)
  size = int(store.sizes('train')[0])
  for changed, provenance, message in (
      (records, {'store': 'f' * 64}, 'of another token store'),
      (records | {'more': np.array([1])}, {'store': store.digest}, r"does not have: \['more'\]"),
      ({'email': records['email']}, {'store': store.digest}, r"does not name: \['json', 'pydocs'\]"),
      (records | {'email': np.array([size])}, {'store': store.digest}, f'record email/{size}, but .* has {size}')):
    with pytest.raises(ValueError, match=message):
      Selected(store, Selection(changed, provenance))


def test_a_selection_of_a_selection(store):
  outer = Selected(store, choose(store, lambda name, n: n % 2 == 1))
  inner = Selected(outer, choose(outer, lambda name, n: n % 3 == 2))
  once = Selected(store, choose(store, lambda name, n: n % 6 == 5))
  assert inner.whole is store and inner.sizes('train').tolist() == once.sizes('train').tolist()
  assert inner.counts('train') == once.counts('train')
  rows = np.array([2, 0]), np.array([4, 1])
  assert_same_rows(inner.read('train', *rows), once.read('train', *rows))
  assert inner.names(*rows) == once.names(*rows) == ['pydocs/29', 'email/11']
  numbers = lambda view: {name: np.arange(n) for name, n in zip(view.domains, view.sizes('train').tolist())}
  for view in (inner, once):
    assert lists(view.records_of_whole(numbers(view))) == lists(once.selection.records)


def test_one_epoch_through_a_selection_reads_each_kept_record_once(store):
  chosen = choose(store, thirds)
  view = Selected(store, chosen)
  n = int(view.sizes('train').sum())
  sampler = Sampler(view, 'train', mixture.by_examples(view).for_domains(view.domains), n, seed=3, block=n)
  batch = next(iter(sampler))
  seen = sorted(view.names(batch['domain_B'], batch['example_B']))
  assert seen == sorted(f'{name}/{number}' for name, numbers in chosen.records.items() for number in numbers)


def test_what_was_computed_of_a_record_is_found_by_its_batch(store, tmp_path):
  """Reference losses are looked up by example_B: of the very rows, though these have other numbers in the store."""
  view = Selected(store, choose(store, lambda name, n: n % 3 == 1))
  sampler = Sampler(view, 'train', mixture.by_tokens(view).for_domains(view.domains), 8, seed=0, block=40)
  token_nll = lambda params, batch: params * (batch['tokens_BxL'] + 1.0) + batch['position_BxL']
  add = reference_losses.compute(
    tmp_path / 'nll', token_nll, np.float32(0.5), view, sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]),
    reference_losses.visited([sampler], 5), batch_size=8, provenance={}, stage='nll', progress=metrics.Progress(1.0),
    flops_per_row=1.0)
  for _, batch in zip(range(5), sampler):
    np.testing.assert_array_equal(add(batch)['reference_nll_BxL'], token_nll(0.5, batch))
