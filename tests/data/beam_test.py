"""Laws of `prepare` on Beam: the store is that of local workers, whatever the runner does with the files."""

import concurrent.futures
import logging
import pathlib
import shutil
import subprocess
import sys
import time

import pytest
import real_text

from datasel import prepare
from datasel.data import beam, corpus, shards, tokenizer
from datasel.data import store as stores

SETTINGS = {'length': 128, 'holdout': 0.3}
TWO_PROCESSES = ['--runner=DirectRunner', '--direct_running_mode=multi_processing', '--direct_num_workers=2']
MODULES = real_text.modules('encodings')[:45]


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """CORPUS of 3 domains in 8 files, tokenizer.json, and the store that one local process makes of them."""
  root = tmp_path_factory.mktemp('beam')
  for i in range(6):
    real_text.write(root / f'corpus/train/encodings-{i}.jsonl', MODULES[i::6])
  real_text.write(root / 'corpus/train/pydocs.jsonl', real_text.topics())
  real_text.write(root / 'corpus/train/json.jsonl', [*real_text.modules('json'), {'id': 'blank', 'text': ' \n'}])
  real_text.write(root / 'corpus/validation/json.jsonl', real_text.modules('email')[:3])
  prepare.train_tokenizer(root / 'corpus', root / 'tokenizer.json', vocab_size=600, max_bytes_per_domain=50_000)
  prepare.prepare(root / 'corpus', root / 'store', root / 'tokenizer.json', **SETTINGS)
  return root


def _bytes(folder):
  return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob('*'))
          if path.is_file()}


def _command(root, store, *flags):
  return [sys.executable, '-m', 'datasel.data.beam', '--corpus', root / 'corpus', '--store', store, '--tokenizer',
          root / 'tokenizer.json', '--length', '128', '--holdout', '0.3', *flags]


def _wait(condition, seconds=60):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, 'waited in vain'
    time.sleep(0.002)


def test_a_pipeline_writes_the_bytes_of_local_workers(root, tmp_path, caplog):
  with caplog.at_level(logging.INFO, 'datasel'):
    store = beam.prepare(root / 'corpus', tmp_path / 'store', root / 'tokenizer.json', **SETTINGS)
  assert _bytes(tmp_path / 'store') == _bytes(root / 'store')
  assert store.digest == stores.Store(root / 'store').digest
  assert '9 of 9 files, ' in caplog.text
  assert not (tmp_path / 'store.partial').exists()


def test_truncated_documents_with_anchors_are_those_of_local_workers(root, tmp_path):
  prepare.anchor_tokenizer(root / 'tokenizer.json', tmp_path / 'tokenizer', max_length=50)
  for make, name in ((beam.prepare, 'store'), (prepare.prepare, 'local')):
    make(root / 'corpus', tmp_path / name, tmp_path / 'tokenizer', packing='truncate', **SETTINGS)
  assert _bytes(tmp_path / 'store') == _bytes(tmp_path / 'local')


def test_killed_in_the_middle_it_goes_on_and_ends_in_the_same_bytes(root, tmp_path):
  partial = tmp_path / 'store.partial'
  # One process, and so one file after the other: some are done when it is killed, and some are not.
  with subprocess.Popen(_command(root, tmp_path / 'store'), stderr=subprocess.DEVNULL) as process:
    _wait(lambda: len(list(partial.glob('*.json'))) >= 2)
    process.kill()
  finished = {path: path.stat().st_ino for path in partial.glob('*.json')}
  assert 2 <= len(finished) < 9 and not (tmp_path / 'store').exists()
  seen = {}
  assemble = stores.assemble

  def look(*args):
    seen.update({path: path.stat().st_ino for path in partial.glob('*.json')})
    assemble(*args)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(stores, 'assemble', look)
    beam.prepare(root / 'corpus', tmp_path / 'store', root / 'tokenizer.json', **SETTINGS)
  assert len(seen) == 9 and seen.items() >= finished.items()  # what was finished was not done again
  assert _bytes(tmp_path / 'store') == _bytes(root / 'store')


def test_worker_processes_killed_with_their_job_lose_nothing_finished(root, tmp_path):
  """The command, from a shell, with the runner's own worker processes; then again, to the end."""
  partial = tmp_path / 'store.partial'
  command = _command(root, tmp_path / 'store', *TWO_PROCESSES)
  with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
    _wait(lambda: list(partial.glob('*.json')))
    process.kill()
  assert not (tmp_path / 'store').exists()
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert done.stdout.strip().endswith(prepare.summary(stores.Store(root / 'store')))
  assert _bytes(tmp_path / 'store') == _bytes(root / 'store')


def test_a_file_handed_out_several_times_at_once_is_packed_as_if_once(root, tmp_path):
  encoder = tokenizer.load(root / 'tokenizer.json')
  source = corpus.Corpus(root / 'corpus').sources['train']['pydocs'][0]
  settings = shards.Settings(encoder.digest, **SETTINGS)
  for name in ('once', 'often'):
    encoder.save(tmp_path / name / 'tokenizer')
  shards.pack_file(source, tmp_path / 'once', tmp_path / 'once/tokenizer', settings)
  work = beam._to_json(source, settings)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda _: beam._pack(str(tmp_path / 'often'), work), range(4)))
  assert _bytes(tmp_path / 'often') == _bytes(tmp_path / 'once')
  assert len(list((tmp_path / 'often').iterdir())) == 4  # the tokenizer, two shards, and the report


def test_text_that_can_not_be_packed_is_named_and_once_repaired_is_packed(root, tmp_path):
  copy = shutil.copytree(root / 'corpus', tmp_path / 'corpus')
  good = (copy / 'train/pydocs.jsonl').read_bytes()
  (copy / 'train/pydocs.jsonl').write_bytes(good + b'{"text": 1}\n')
  make = lambda: beam.prepare(copy, tmp_path / 'store', root / 'tokenizer.json', **SETTINGS)
  with pytest.raises(ValueError, match=f'pydocs.jsonl:{good.count(bytes([10])) + 1}: "text" is of type int'):
    make()
  assert len(list((tmp_path / 'store.partial').glob('*.json'))) == 8  # all others are finished
  (copy / 'train/pydocs.jsonl').write_bytes(good)
  make()
  assert _bytes(tmp_path / 'store') == _bytes(root / 'store')


def test_a_job_that_fails_says_why_and_keeps_what_is_finished(root, tmp_path):
  """Files that no shard of pydocs fits in, as on a disk that is nearly full."""
  limited = ('import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, 250_000)); '
             'os.execv(sys.argv[1], sys.argv[1:])')
  command = [sys.executable, '-c', limited, *map(str, _command(root, tmp_path / 'store'))]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 1
  (said,) = [line for line in done.stderr.splitlines() if line.startswith('datasel.data.beam: the Beam job failed: ')]
  assert said.endswith('start again: finished files are kept')
  assert not (tmp_path / 'store').exists()
  beam.prepare(root / 'corpus', tmp_path / 'store', root / 'tokenizer.json', **SETTINGS)
  assert _bytes(tmp_path / 'store') == _bytes(root / 'store')


def test_workers_that_write_elsewhere_are_noticed(root, tmp_path, monkeypatch):
  pack = beam._pack
  (tmp_path / 'theirs').mkdir()
  tokenizer.load(root / 'tokenizer.json').save(tmp_path / 'theirs/tokenizer')
  # As on a host that has a disk of its own under the same path.
  monkeypatch.setattr(beam, '_pack', lambda folder, work: pack(str(tmp_path / 'theirs'), work))
  with pytest.raises(RuntimeError, match='was not packed in .*store.partial: is that folder one and the same'):
    beam.prepare(root / 'corpus', tmp_path / 'store', root / 'tokenizer.json', **SETTINGS)
  assert not (tmp_path / 'store').exists()


@pytest.mark.parametrize('flags,error', [
    (['--lenght=64'], 'datasel.data.beam: unknown flag --lenght; did you mean --length?'),
    (['--hold_out', '0.5'], 'unknown flag --hold_out; did you mean --holdout?'),
    (['--store', 'gs://bucket/store'], 'gs://bucket/store: want a path on a disk that all workers see'),
    (['--length=0'], 'length is 0, want at least 1'),
])
def test_a_flag_that_can_not_work_is_refused(root, tmp_path, flags, error):
  with pytest.raises(SystemExit, match=error.replace('?', r'\?')):
    beam.main([str(part) for part in _command(root, tmp_path / 'store')[3:]] + flags)
  assert not (tmp_path / 'store').exists()


def test_without_beam_the_error_names_what_to_install(root, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'apache_beam', None)
  with pytest.raises(ImportError, match=r'pip install -e .\[seqio\]'):
    beam.prepare(root / 'corpus', tmp_path / 'store', root / 'tokenizer.json', **SETTINGS)


def test_training_from_the_store_needs_neither_beam_nor_tensorflow(root, tmp_path):
  beam.prepare(root / 'corpus', tmp_path / 'store', root / 'tokenizer.json', **SETTINGS)
  code = f'''
import sys
class Refuse:
  def find_spec(self, name, path=None, target=None):
    if name.split('.')[0] in ('tensorflow', 'tensorflow_datasets', 'seqio', 'apache_beam'):
      raise ImportError(f'{{name}} is not for the training process')
sys.meta_path.insert(0, Refuse())
import numpy as np
from datasel import main, train
from datasel.data import corpus, mixture, sampler, store
from datasel.methods.doremi import run
from datasel.methods.pretrain import run
opened = store.Store({str(tmp_path / 'store')!r}, verify='full')
batch = opened.read('train', np.array([0]), np.array([0]))
assert batch and all(len(rows) == 1 for rows in batch.values())
'''
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False,
                        cwd=pathlib.Path(__file__).parents[2])
  assert done.returncode == 0, done.stderr[-2000:]
