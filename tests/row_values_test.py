"""Laws of values of a whole store: no list of its records, a digest for each shard of it."""

import hashlib
import json
import pydoc_data.topics
import shutil

import jax
import numpy as np
import pytest

from datasel import metrics, prepare, row_values, sharding, workdir
from datasel.data.store import Store

QUANTITY = row_values.Quantity('score', 'score', (), 'find out why')


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  """Two domains, of two shards and of one."""
  folder = tmp_path_factory.mktemp('store')
  texts = sorted(pydoc_data.topics.topics.items())
  for file, part in (('web-001', texts[:9]), ('web-002', texts[9:14]), ('code', texts[14:20])):
    path = folder / f'corpus/train/{file}.jsonl'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps({'id': id, 'text': text[:1500]}) + '\n' for id, text in part))
  prepare.train_tokenizer(folder / 'corpus', folder / 'tokenizer.json', vocab_size=300, max_bytes_per_domain=10_000)
  return prepare.prepare(folder / 'corpus', folder / 'store', folder / 'tokenizer.json', length=32, holdout=0.1)


def compute(directory, store, records):
  score = lambda params, batch: params * batch['tokens_BxL'].sum(1) + batch['domain_B']
  return row_values.compute(
    directory, QUANTITY, score, np.float32(0.5), store, sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]), records,
    batch_size=16, provenance={}, stage='scores', progress=metrics.Progress(1.0), flops_per_row=1.0)


@pytest.fixture(scope='module')
def computed(store, tmp_path_factory):
  directory = tmp_path_factory.mktemp('computed') / 'all'
  return directory, compute(directory, store, [range(n) for n in store.sizes('train').tolist()])


def test_all_records_have_the_values_of_a_list_of_them(store, computed, tmp_path):
  directory, values = computed
  listed = compute(tmp_path / 'listed', store, [np.arange(n) for n in store.sizes('train')])
  for name, of_domain in values.by_domain().items():
    np.testing.assert_array_equal(of_domain, listed.by_domain()[name])
  rows = np.array([1, 0, 1]), np.array([7, 3, 0])
  np.testing.assert_array_equal(values.of(*rows), listed.of(*rows))
  assert sorted(path.name for path in directory.iterdir()) == ['manifest.json', 'score.npy']
  for record in (-1, int(store.sizes('train')[0])):
    with pytest.raises(KeyError, match='has no score for all of code records'):
      values.of(np.array([0]), np.array([record]))


def test_each_shard_of_the_store_has_its_digest(store, computed, tmp_path):
  directory, values = computed
  manifest, counts = workdir.read_json(directory / 'manifest.json'), store.counts('train')
  of_domain = values.by_domain()
  assert [len(counts[name]['shards']) for name in store.domains] == [1, 2]
  for name in store.domains:
    first, digests = 0, []
    for shard in counts[name]['shards']:
      digests.append(hashlib.sha256(of_domain[name][first:first + shard['records']].tobytes()).hexdigest())
      first += shard['records']
    assert manifest['shards'][name] == digests
  records = [np.zeros(0, np.int64), np.array([1, counts['web']['shards'][0]['records']])]
  some = compute(tmp_path / 'some', store, records)
  two = [hashlib.sha256(some.by_domain()['web'][n:n + 1].tobytes()).hexdigest() for n in range(2)]
  assert workdir.read_json(tmp_path / 'some/manifest.json')['shards']['web'] == two


def test_half_a_file_of_an_interrupted_run_is_not_gone_on_with(store, computed, tmp_path, caplog):
  directory, values = computed
  shutil.copytree(directory, tmp_path / 'cut')
  manifest, path = tmp_path / 'cut/manifest.json', tmp_path / 'cut/score.npy'
  workdir.write_json(tmp_path / 'cut/partial.json', {'identity': workdir.read_json(manifest)['identity'], 'rows': 16})
  manifest.unlink()
  path.write_bytes(path.read_bytes()[:-1])
  again = compute(tmp_path / 'cut', store, [range(n) for n in store.sizes('train').tolist()])
  assert again.digest == values.digest and 'score.npy is damaged' in caplog.text


def test_what_is_damaged_is_named(store, computed):
  directory, _ = computed
  path = directory / 'score.npy'
  whole = path.read_bytes()
  open_again = lambda: row_values.RowValues(directory, QUANTITY, Store(store.path))
  try:
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r'score.npy is damaged: the values of shard 1 of web \(1 such .*; delete'):
      open_again()
    for damaged in (whole[:40], whole[:-1], b''):
      path.write_bytes(damaged)
      with pytest.raises(ValueError, match='score.npy is damaged .*; delete'):
        open_again()
  finally:
    path.write_bytes(whole)
  open_again()
