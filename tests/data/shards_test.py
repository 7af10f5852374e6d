"""Laws of packing one source: nothing lost, nothing half written, nothing done twice."""

import os
import pathlib

import pytest
import real_text

from datasel.data import corpus, shards, tokenizer

ROWS = real_text.topics()


@pytest.fixture(scope='module')
def encoder(tmp_path_factory):
  path = tmp_path_factory.mktemp('tokenizer') / 'tokenizer.json'
  return path, tokenizer.train_bpe([row['text'] for row in ROWS], 400, path)


@pytest.fixture
def pack(tmp_path, encoder):
  """Packs rows as one file of a domain; returns the result and the files' times of writing."""
  path, loaded = encoder

  def run(rows, **settings):
    real_text.write(tmp_path / 'corpus/train/web.jsonl', rows)
    (source,) = corpus.Corpus(tmp_path / 'corpus').sources['train']['web']
    settings = shards.Settings(loaded.digest, **({'length': 64, 'holdout': 0.2} | settings))
    (tmp_path / 'work').mkdir(exist_ok=True)
    result = shards.pack_file(source, tmp_path / 'work', path, settings)
    return result, {file.name: file.stat().st_mtime_ns for file in (tmp_path / 'work').iterdir()}

  return run


def test_every_document_read_is_written_or_dropped_for_a_reason(pack):
  rows = ROWS + [{'text': blank, 'id': str(i)} for i, blank in enumerate(['', ' \n', '\t\u2003'] * 20)]
  result, _ = pack(rows)
  splits = result['splits'].values()
  assert result['source']['documents'] == len(rows)
  assert sum(split['documents'] for split in splits) == len(ROWS)
  assert sum(split['dropped'].get('empty', 0) for split in splits) == 60
  assert all(split['dropped'] for split in splits)  # held out or not, a drop is counted where it would have gone


def test_a_text_the_tokenizer_makes_nothing_of_is_counted(tmp_path, encoder):
  import tokenizers
  model = tokenizers.Tokenizer.from_file(str(encoder[0]))
  model.normalizer = tokenizers.normalizers.Replace('\u00ad', '')
  model.save(str(tmp_path / 'tokenizer.json'))
  real_text.write(tmp_path / 'corpus/train/web.jsonl', [{'text': '\u00ad'}, {'text': 'word'}])
  (source,) = corpus.Corpus(tmp_path / 'corpus').sources['train']['web']
  settings = shards.Settings(tokenizer.load(tmp_path / 'tokenizer.json').digest, 8, 0)
  (split,) = shards.pack_file(source, tmp_path, tmp_path / 'tokenizer.json', settings)['splits'].values()
  assert (split['documents'], split['dropped']) == (1, {'no tokens': 1})


def test_holdout_keeps_its_fraction_by_id_alone():
  ids = [f'document {i}' for i in range(20_000)]
  rank = [shards.holdout_rank(i) for i in ids]
  for fraction in (0.01, 0.1, 0.5):
    held = sum(r < fraction for r in rank)
    assert abs(held - fraction * len(ids)) < 5 * (fraction * (1 - fraction) * len(ids)) ** 0.5
  assert rank == [shards.holdout_rank(i) for i in ids]


def test_finished_work_is_not_done_again(pack):
  first, times = pack(ROWS)
  assert pack(ROWS) == (first, times)


@pytest.mark.parametrize('change', [{'length': 32}, {'holdout': 0.3}])
def test_other_settings_are_other_work(pack, change):
  first, times = pack(ROWS)
  again, later = pack(ROWS, **change)
  assert again != first
  assert all(later[name] > times[name] for name in times)


def test_other_text_is_other_work(pack):
  first, _ = pack(ROWS)
  again, _ = pack(ROWS[1:])
  assert again['source'] != first['source']
  assert again['splits'] != first['splits']


def test_a_damaged_shard_is_made_again(pack, tmp_path):
  first, _ = pack(ROWS)
  shard = tmp_path / 'work' / first['splits']['train']['shard']['file']
  for damage in (lambda: shard.write_bytes(shard.read_bytes()[:-9]), shard.unlink):
    damage()
    again, _ = pack(ROWS)
    assert again == first
    assert shard.stat().st_size == first['splits']['train']['shard']['bytes']


def test_a_failure_leaves_no_result(pack, tmp_path):
  with pytest.raises(ValueError, match=f'web.jsonl:{len(ROWS) + 1}'):
    pack([*ROWS, {'text': 3}])
  assert not list((tmp_path / 'work').iterdir())


def test_a_full_disk_is_said_so(pack, tmp_path):
  result, _ = pack(ROWS)
  shard = pathlib.Path(tmp_path / 'work' / result['splits']['train']['shard']['file'])
  shard.unlink()
  # The shard is first written under this name; through it, to a disk that is always full.
  shard.with_name(f'.{shard.name}.tmp-{os.getpid()}').symlink_to('/dev/full')
  with pytest.raises(OSError, match='the disk is full; free some space') as e:
    pack(ROWS)
  assert e.value.filename == str(shard)


def test_a_tokenizer_that_changed_is_refused(tmp_path, encoder):
  real_text.write(tmp_path / 'corpus/train/web.jsonl', ROWS)
  (source,) = corpus.Corpus(tmp_path / 'corpus').sources['train']['web']
  with pytest.raises(ValueError, match='it was changed'):
    shards.pack_file(source, tmp_path, encoder[0], shards.Settings('another', 64, 0))


@pytest.mark.parametrize('settings,error', [({'length': 0}, 'length is 0'), ({'holdout': 1}, 'holdout is 1'),
                                            ({'holdout': -0.1}, 'holdout is -0.1')])
def test_a_setting_that_can_not_work_is_refused(pack, settings, error):
  with pytest.raises(ValueError, match=error):
    pack(ROWS, **settings)
