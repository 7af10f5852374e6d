"""Laws of the token store: the text comes back whole, any row can be read, and no damage passes unnamed."""

import concurrent.futures
import json
import shutil
import time

import numpy as np
import pytest
import real_text

from datasel import prepare, workdir
from datasel.data import packing, shards, tokenizer
from datasel.data import store as stores

ROWS = {'email': real_text.modules('email'), 'json': real_text.modules('json'), 'pydocs': real_text.topics()}
HOLDOUT = 0.3


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """A store of three domains, one of two shards."""
  root = tmp_path_factory.mktemp('store')
  for domain, rows in ROWS.items():
    parts = [rows[:20], rows[20:]] if domain == 'pydocs' else [rows]
    for i, part in enumerate(parts):
      real_text.write(root / f'corpus/train/{domain}-{i}.jsonl', part)
  prepare.train_tokenizer(root / 'corpus', root / 'tokenizer.json', vocab_size=500, max_bytes_per_domain=50_000)
  prepare.prepare(root / 'corpus', root / 'store', root / 'tokenizer.json', length=64, holdout=HOLDOUT)
  return root / 'store'


@pytest.fixture
def copy(made, tmp_path):
  return shutil.copytree(made, tmp_path / 'copy')


def _stream(store, split, domain, records):
  """The (ids, document starts) of consecutive records, from what the model would be given."""
  batch = store.read(split, np.full(len(records), domain), np.array(records))
  real = batch['segment_BxL'] > 0
  ids = batch['tokens_BxL'][real].tolist()
  # A document ends where nothing is to be predicted; the last input of the last row ends one too, or its target does.
  ends = (batch['loss_mask_BxL'][real] == 0).tolist()
  if not ends[-1]:
    ids, ends = ids + [int(batch['targets_BxL'][-1, -1])], ends + [True]
  return ids, ends


@pytest.mark.parametrize('split', ['train', 'validation'])
def test_every_text_comes_back_whole_and_in_order(made, split):
  store = stores.Store(made)
  encoder = tokenizer.load(made)
  for m, domain in enumerate(store.domains):
    texts = [row['text'] for row in ROWS[domain]
             if row['text'].strip() and (shards.holdout_rank(row['id']) < HOLDOUT) == (split == 'validation')]
    got, ids = [], []
    first = 0
    for shard in store.counts(split)[domain]['shards']:
      for i, end in zip(*_stream(store, split, m, range(first, first + shard['records']))):
        ids.append(i)
        if end:
          assert ids[-1] == encoder.eos_id
          got.append(encoder.decode(ids[:-1]))
          ids = []
      first += shard['records']
    assert got == texts
    assert first == store.sizes(split)[m]


@pytest.mark.parametrize('split', ['train', 'validation'])
def test_the_counts_are_what_is_there(made, split):
  store = stores.Store(made)
  encoder = tokenizer.load(made)
  for m, domain in enumerate(store.domains):
    counts = store.counts(split)[domain]
    size = store.sizes(split)[m]
    batch = store.read(split, np.full(size, m), np.arange(size))
    kept = [row['text'] for row in ROWS[domain]
            if (shards.holdout_rank(row['id']) < HOLDOUT) == (split == 'validation')]
    texts = [text for text in kept if text.strip()]
    assert counts['dropped'] == ({'empty': len(kept) - len(texts)} if len(texts) < len(kept) else {})
    assert counts['documents'] == len(texts)
    assert counts['bytes'] == sum(len(text.encode()) for text in texts)
    assert counts['tokens'] == sum(len(ids) + 1 for ids in encoder.encode_batch(texts))
    assert counts['targets'] == batch['loss_mask_BxL'].sum()
    assert counts['sequences'] == size


def test_a_batch_is_its_rows_in_the_order_asked_for(made):
  store = stores.Store(made)
  rng = np.random.default_rng(0)
  domain_B = rng.integers(0, 3, 50).astype(np.int32)
  record_B = (rng.random(50) * store.sizes('train')[domain_B]).astype(np.int64)
  batch = store.read('train', domain_B, record_B)
  np.testing.assert_array_equal(batch['domain_B'], domain_B)
  np.testing.assert_array_equal(batch['example_B'], record_B)
  assert (batch['domain_B'].dtype, batch['example_B'].dtype) == (np.int32, np.int64)
  for b in range(50):
    alone = store.read('train', domain_B[b:b + 1], record_B[b:b + 1])
    for key, array in batch.items():
      np.testing.assert_array_equal(array[b:b + 1], alone[key], err_msg=key)


def test_threads_read_what_one_reads(made, monkeypatch):
  store = stores.Store(made)
  rows = [(np.zeros(4, int), np.arange(4) + i) for i in range(20)]
  want = [store.read('train', *row)['tokens_BxL'] for row in rows]

  class Slow:
    """A reader that lets other threads in between its seek and its read."""

    def __init__(self, reader):
      self.num_records, self.read, self._seek = reader.num_records, reader.read, reader.seek

    def seek(self, record):
      self._seek(record)
      time.sleep(0.001)

  opened = stores._Shards.open
  monkeypatch.setattr(stores._Shards, 'open', lambda *args: Slow(opened(*args)))
  store = stores.Store(made)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    got = list(pool.map(lambda row: store.read('train', *row)['tokens_BxL'], rows))
  np.testing.assert_array_equal(got, want)


def test_more_shards_than_may_be_open_are_read(made, monkeypatch):
  monkeypatch.setattr(stores, '_OPEN_SHARDS', 1)
  want, store = stores.Store(made, verify='size'), stores.Store(made)
  rows = np.arange(12) % 3, np.arange(12)
  np.testing.assert_array_equal(store.read('train', *rows)['tokens_BxL'], want.read('train', *rows)['tokens_BxL'])
  assert store._reader.cache_info().currsize == 1


@pytest.mark.parametrize('domain,record,error', [
    (3, 0, 'row 1: domain 3 is out of range; the store has 3 domains'),
    (-1, 0, 'row 1: domain -1'),
    (0, 10**6, "row 1: record 1000000 is out of range; domain 'email' has"),
    (0, -1, 'row 1: record -1'),
])
def test_a_row_out_of_range_is_named(made, domain, record, error):
  with pytest.raises(IndexError, match=error):
    stores.Store(made, verify='size').read('train', np.array([0, domain]), np.array([0, record]))


def test_a_misuse_is_named(made, tmp_path):
  store = stores.Store(made, verify='size')
  with pytest.raises(ValueError, match=r"unknown split 'test' .* known: \['train', 'validation'\]"):
    store.sizes('test')
  with pytest.raises(ValueError, match='want .B., B >= 1'):
    store.read('train', np.array([], int), np.array([], int))
  with pytest.raises(ValueError, match="verify is 'none'"):
    stores.Store(made, verify='none')
  with pytest.raises(ValueError, match='is no token store'):
    stores.Store(tmp_path)


def _shard(store):
  return next((store / 'train/pydocs').glob('tokens-00001-of-00002.array_record'))


@pytest.mark.parametrize('verify', ['full', 'size'])
def test_a_missing_or_shortened_shard_is_named(copy, verify):
  path = _shard(copy)
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(ValueError, match=f'{path} has .* bytes, want .*; restore it'):
    stores.Store(copy, verify=verify)
  path.unlink()
  with pytest.raises(ValueError, match=f'{path} is missing; restore it'):
    stores.Store(copy, verify=verify)


def test_a_flipped_bit_is_named_when_opened_or_when_read(copy):
  path = _shard(copy)
  content = bytearray(path.read_bytes())
  content[2000] ^= 1
  path.write_bytes(content)
  with pytest.raises(ValueError, match=f'{path} is damaged: its sha256'):
    stores.Store(copy)
  store = stores.Store(copy, verify='size')
  with pytest.raises(ValueError, match=f'{path} is damaged at record|{path} holds 0 records'):
    for record in range(store.sizes('train')[2]):
      store.read('train', np.array([2]), np.array([record]))


def test_a_shard_of_another_store_is_named(copy):
  path = _shard(copy)
  with shards.writing(path) as write:
    write(np.zeros(3, packing.record_dtype(8, 500)))
  manifest = workdir.read_json(copy / 'manifest.json')
  entry = manifest['splits']['train']['pydocs']['shards'][1]
  entry |= {'bytes': path.stat().st_size}
  manifest['digest'] = workdir.digest({key: value for key, value in manifest.items() if key != 'digest'})
  workdir.write_json(copy / 'manifest.json', manifest)
  store = stores.Store(copy, verify='size')
  with pytest.raises(ValueError, match=f'{path} holds 3 records, want {entry["records"]}'):
    store.read('train', np.array([2]), store.sizes('train')[2:] - 1)


def test_a_changed_manifest_is_refused(copy):
  manifest = json.loads((copy / 'manifest.json').read_text())
  for change, error in (({'length': 32}, 'was changed'), ({'format': 99}, 'format 99, want 1')):
    (copy / 'manifest.json').write_text(json.dumps(manifest | change))
    with pytest.raises(ValueError, match=error):
      stores.Store(copy)


def test_a_store_can_be_moved(made, copy):
  assert stores.Store(copy).digest == stores.Store(made).digest
  assert tokenizer.load(copy).digest == stores.Store(copy).tokenizer['digest']
