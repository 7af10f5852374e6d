"""Laws of `prepare`: the store depends on text and settings alone, whatever the form of files, workers and kills."""

import contextlib
import fcntl
import gzip
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import real_text
import zstandard

from datasel import prepare
from datasel.data import store as stores
from datasel.data import tokenizer

DOMAINS = {
    'email': [*real_text.modules('email')[:12], {'id': 'blank', 'text': ' \n', 'lines': 1}],
    'encodings': real_text.modules('encodings')[:45],
    'json': real_text.modules('json'),
    'pydocs': real_text.topics(),
}
SETTINGS = {'length': 128, 'holdout': 0.3}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """CORPUS of 4 domains in 9 files, tokenizer.json, and the store made from them by one process."""
  root = tmp_path_factory.mktemp('prepare')
  for domain, rows in DOMAINS.items():
    parts = [rows[i::3] for i in range(3)] if domain in ('encodings', 'pydocs') else [rows]
    for i, part in enumerate(parts):
      real_text.write(root / f'corpus/train/{domain}-{i}.jsonl', part)
  real_text.write(root / 'corpus/validation/email.jsonl', DOMAINS['json'])
  prepare.train_tokenizer(root / 'corpus', root / 'tokenizer.json', vocab_size=600, max_bytes_per_domain=50_000)
  prepare.prepare(root / 'corpus', root / 'store', root / 'tokenizer.json', **SETTINGS)
  return root


def _bytes(store, *, shards_only=False):
  return {path.relative_to(store).as_posix(): path.read_bytes() for path in sorted(store.rglob('*'))
          if path.is_file() and (path.suffix == '.array_record' or not shards_only)}


def _command(root, store, workers):
  return [sys.executable, '-m', 'datasel.prepare', '--corpus', root / 'corpus', '--store', store,
          '--tokenizer', root / 'tokenizer.json', '--length', '128', '--holdout', '0.3', '--workers', str(workers)]


def _children(pid):
  """Process ids of the workers that `pid` started."""
  children = pathlib.Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
  return [int(c) for c in children if b'spawn_main' in pathlib.Path(f'/proc/{c}/cmdline').read_bytes()]


def _alive(pid):
  try:
    return pathlib.Path(f'/proc/{pid}/stat').read_text().split()[2] != 'Z'
  except OSError:
    return False


def _wait(condition, seconds=20):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, 'waited in vain'
    time.sleep(0.002)


def test_any_number_of_workers_writes_the_same_bytes(root, tmp_path):
  done = subprocess.run(_command(root, tmp_path / 'store', 2), capture_output=True, text=True, check=True)
  assert _bytes(tmp_path / 'store') == _bytes(root / 'store')
  assert '9 of 9 files, ' in done.stderr.splitlines()[-1]
  assert done.stdout.strip() == prepare.summary(stores.Store(root / 'store'))


def test_a_killed_prepare_goes_on_and_ends_in_the_same_bytes(root, tmp_path):
  partial = tmp_path / 'store.partial'
  with subprocess.Popen(_command(root, tmp_path / 'store', 2), stderr=subprocess.DEVNULL) as process:
    _wait(lambda: list(partial.glob('*.json')))
    workers = _children(process.pid)
    process.kill()
  assert workers and not (tmp_path / 'store').exists()
  _wait(lambda: not any(map(_alive, workers)))  # no orphan goes on working
  finished = {path: path.stat().st_mtime_ns for path in partial.glob('*.json')}
  assert 0 < len(finished) < 9
  seen = {}
  assemble = stores.assemble

  def look(*args):
    seen.update({path: path.stat().st_mtime_ns for path in partial.glob('*.json')})
    assemble(*args)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(stores, 'assemble', look)
    prepare.prepare(root / 'corpus', tmp_path / 'store', root / 'tokenizer.json', **SETTINGS)
  assert seen.items() >= finished.items()  # what was finished was not done again
  assert _bytes(tmp_path / 'store') == _bytes(root / 'store')
  assert not partial.exists()


def test_a_killed_worker_is_said_so_and_loses_nothing_finished(root, tmp_path):
  with subprocess.Popen(_command(root, tmp_path / 'store', 2), stderr=subprocess.PIPE, text=True) as process:
    _wait(lambda: list((tmp_path / 'store.partial').glob('*.json')))
    os.kill(_children(process.pid)[0], signal.SIGKILL)
    error = process.stderr.read()
  assert process.returncode == 1
  assert 'a worker process was killed' in error and 'finished files are kept' in error
  prepare.prepare(root / 'corpus', tmp_path / 'store', root / 'tokenizer.json', **SETTINGS)
  assert _bytes(tmp_path / 'store') == _bytes(root / 'store')


def _rewrite(form, source, folder):
  raw, stem = source.read_bytes(), source.stem
  rows = [json.loads(line) for line in raw.splitlines()]
  if form == 'folder':
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(folder / stem)
  elif form == 'parquet':
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f'{stem}.parquet')
  else:
    press = {'gz': gzip.compress, 'zst': zstandard.ZstdCompressor().compress}[form]
    (folder / f'{stem}.jsonl.{form}').write_bytes(press(raw))


@pytest.mark.parametrize('form', ['gz', 'zst', 'parquet', 'folder'])
def test_every_form_of_the_text_gives_the_same_shards(root, tmp_path, form):
  for split in ('train', 'validation'):
    (tmp_path / 'corpus' / split).mkdir(parents=True)
    for source in (root / 'corpus' / split).iterdir():
      _rewrite(form, source, tmp_path / 'corpus' / split)
  prepare.prepare(tmp_path / 'corpus', tmp_path / 'store', root / 'tokenizer.json', **SETTINGS)
  assert _bytes(tmp_path / 'store', shards_only=True) == _bytes(root / 'store', shards_only=True)


# What a first run does with a demo corpus.
FIRST_RUN = '''
import logging, sys
from datasel import prepare
logging.basicConfig(level=logging.INFO, format='%(message)s')
corpus, folder = sys.argv[1:]
tokenizer = f'{folder}/tokenizer.json'
prepare.train_tokenizer(corpus, tokenizer, vocab_size=600, max_bytes_per_domain=50_000, reuse=True)
prepare.prepare(corpus, f'{folder}/store', tokenizer, length=128, holdout=0.3)
'''


def test_of_two_first_runs_one_works_and_the_other_waits(root, tmp_path):
  command = [sys.executable, '-c', FIRST_RUN, root / 'corpus', tmp_path]
  logs = [tmp_path / '0.log', tmp_path / '1.log']
  with contextlib.ExitStack() as stack:
    locks = {}
    for name in ('tokenizer.json', 'store'):  # held here until both stand before it
      locks[name] = stack.enter_context(open(tmp_path / f'.{name}.lock', 'w'))
      fcntl.flock(locks[name], fcntl.LOCK_EX)
    runs = [stack.enter_context(subprocess.Popen(command, stderr=stack.enter_context(open(log, 'w')))) for log in logs]
    for run in runs:
      stack.callback(run.kill)
    for doing in ('training tokenizer.json', 'making store'):
      verb, name = doing.split()
      line = f'another process is {verb} {tmp_path / name}; waiting for it'
      _wait(lambda line=line: all(line in log.read_text() for log in logs))
      assert not (tmp_path / name).exists()
      locks[name].close()
    for run in runs:
      run.wait()
  assert [run.returncode for run in runs] == [0, 0], [log.read_text() for log in logs]
  lines = '\n'.join(log.read_text() for log in logs)
  assert lines.count('training a tokenizer of 600 tokens') == 1
  assert lines.count('9 of 9 files, ') == lines.count('store is up to date') == 1
  assert (tmp_path / 'tokenizer.json').read_bytes() == (root / 'tokenizer.json').read_bytes()
  assert _bytes(tmp_path / 'store') == _bytes(root / 'store')
  assert not (tmp_path / 'store.partial').exists()


def test_what_a_process_killed_at_the_very_end_left_is_removed(root, tmp_path):
  shutil.copytree(root / 'store', tmp_path / 'store')
  (tmp_path / 'store.partial').mkdir()
  prepare.prepare(root / 'corpus', tmp_path / 'store', root / 'tokenizer.json', **SETTINGS)
  assert not (tmp_path / 'store.partial').exists()
  assert _bytes(tmp_path / 'store') == _bytes(root / 'store')


def test_a_tokenizer_already_there_is_trained_again_unless_reuse_is_asked_for(root, tmp_path):
  path = tmp_path / 'tokenizer.json'
  train = lambda **reuse: prepare.train_tokenizer(root / 'corpus', path, vocab_size=300, **reuse).vocab_size
  shutil.copy(root / 'tokenizer.json', path)
  assert [train(reuse=True), train()] == [600, 300]


def test_a_finished_store_is_left_as_it_is(root):
  before = {path: path.stat().st_mtime_ns for path in (root / 'store').rglob('*')}
  again = prepare.prepare(root / 'corpus', root / 'store', root / 'tokenizer.json', **SETTINGS, workers=2)
  assert again.digest == stores.Store(root / 'store').digest
  assert {path: path.stat().st_mtime_ns for path in (root / 'store').rglob('*')} == before


def test_a_store_of_something_else_is_refused_and_left_as_it_is(root, tmp_path):
  before = _bytes(root / 'store')
  corpus = shutil.copytree(root / 'corpus', tmp_path / 'corpus')
  other = tokenizer.train_bpe(['some text'], 300, tmp_path / 'other.json')

  def refused(error, corpus=corpus, tokenizer=root / 'tokenizer.json', **changed):
    with pytest.raises(ValueError, match=error):
      prepare.prepare(corpus, root / 'store', tokenizer, **(SETTINGS | changed))

  refused('length is 128, want 64; give another --store', length=64)
  refused('holdout is 0.3, want 0.1', holdout=0.1)
  refused(f"tokenizer is .*, want .*{other.digest}", tokenizer=tmp_path / 'other.json')
  real_text.write(corpus / 'train/email-0.jsonl', DOMAINS['email'][1:])
  (corpus / 'train/pydocs-2.jsonl').rename(corpus / 'train/pydocs-7.jsonl')
  refused('train/email-0.jsonl has changed; train/pydocs-2.jsonl is gone; train/pydocs-7.jsonl is new')
  assert _bytes(root / 'store') == before


def test_a_domain_with_validation_files_keeps_all_its_train_text(root):
  store = stores.Store(root / 'store')
  assert store.counts('train')['email']['documents'] == sum(bool(row['text'].strip()) for row in DOMAINS['email'])
  assert store.counts('validation')['email']['documents'] == len(DOMAINS['json'])


def test_every_document_is_written_or_dropped_for_a_reason(root):
  store = stores.Store(root / 'store')
  for domain, rows in DOMAINS.items():
    split = [store.counts(split)[domain] for split in ('train', 'validation')]
    read = len(rows) + (len(DOMAINS['json']) if domain == 'email' else 0)
    assert sum(c['documents'] + sum(c['dropped'].values()) for c in split) == read
    assert sum(source['documents'] for source in store.manifest['sources'][domain]) == read


def test_the_summary_shows_the_counts(root):
  store = stores.Store(root / 'store')
  head, *lines = prepare.summary(store).splitlines()
  assert head.split() == ['domain', 'split', 'documents', 'MB', 'tokens', 'targets', 'sequences', 'dropped']
  cells = {tuple(line.split()[:2]): line.split()[2:] for line in lines}
  assert set(cells) == {(d, s) for d in (*store.domains, 'total') for s in ('train', 'validation')}
  counts = store.counts('train')['email']
  assert cells['email', 'train'] == [f'{counts["documents"]}', f'{counts["bytes"] / 1e6:.2f}', f'{counts["tokens"]:,}',
                                     f'{counts["targets"]:,}', f'{counts["sequences"]:,}', '1', 'empty']
  assert cells['total', 'train'][4] == f'{store.sizes("train").sum():,}'


def _prepare(tmp_path, root, files, **settings):
  for name, rows in files.items():
    real_text.write(tmp_path / 'corpus' / name, rows)
  return prepare.prepare(tmp_path / 'corpus', tmp_path / 'store', root / 'tokenizer.json', **(SETTINGS | settings))


ROWS = DOMAINS['pydocs']
BLANK = [{'text': ' \n', 'id': str(i)} for i in range(50)]


@pytest.mark.parametrize('files,settings,error', [
    ({'train/web.jsonl': ROWS, 'validation/news.jsonl': ROWS}, {}, r"domains \['news'\] .* have no train files"),
    ({'train/web.jsonl': ROWS}, {'holdout': 0}, r"domains \['web'\] have no files .* and holdout is 0"),
    ({'train/web.jsonl': ROWS[:2]}, {'holdout': 0.0001}, "'web' has no document .* holdout above 0.[0-9]"),
    ({'train/web.jsonl': ROWS, 'train/news.jsonl': BLANK}, {}, "'news' has no document for validation"),
    ({'train/web.jsonl': BLANK, 'validation/web.jsonl': ROWS}, {}, "'web' has no train document"),
    ({'train/web.jsonl': ROWS, 'validation/web.jsonl': BLANK}, {}, "'web' has no validation document .*'empty': 50"),
    ({'train/web.jsonl': ROWS}, {'length': 0}, 'length is 0'),
    ({'train/web.jsonl': ROWS}, {'workers': 0}, 'workers is 0'),
])
def test_what_could_not_train_or_validate_is_refused(root, tmp_path, files, settings, error):
  with pytest.raises(ValueError, match=error):
    _prepare(tmp_path, root, files, **settings)
  assert not (tmp_path / 'store').exists()


def test_a_broken_file_is_named_by_any_number_of_workers(root, tmp_path):
  files = {'train/web.jsonl': ROWS, 'train/news.jsonl': [*ROWS, {'text': 1}]}
  for workers in (1, 2):
    with pytest.raises(ValueError, match=f'news.jsonl:{len(ROWS) + 1}: "text" is of type int'):
      _prepare(tmp_path, root, files, workers=workers)


def test_a_disk_too_small_is_refused_before_work(root, tmp_path, monkeypatch):
  monkeypatch.setattr(prepare.shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
  with pytest.raises(OSError, match='GB free, the store needs about'):
    _prepare(tmp_path, root, {'train/web.jsonl': ROWS})
  assert not (tmp_path / 'store.partial').exists()


def test_the_tokenizer_s_sample_is_the_first_bytes_of_each_domain(root, tmp_path):
  corpus = prepare.corpora.Corpus(root / 'corpus')
  sample = list(prepare._sample(corpus, 1000))
  assert sum(len(text.encode()) for text in sample) <= 1000 * len(DOMAINS)
  assert ''.join(sample).startswith(''.join(row['text'] for row in DOMAINS['email'])[:1000])


def test_the_command_line_trains_a_tokenizer(root, tmp_path, capsys):
  out = tmp_path / 'tokenizer.json'
  prepare.main(['train-tokenizer', '--corpus', str(root / 'corpus'), '--out', str(out), '--vocab_size', '600',
                '--max_bytes_per_domain', '50000'])
  assert capsys.readouterr().out == f'{out}: 600 tokens\n'
  assert out.read_bytes() == (root / 'tokenizer.json').read_bytes()


def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path):
  with pytest.raises(SystemExit, match=r'^datasel.prepare: corpus .* is not a folder'):
    prepare.main(['--corpus', str(tmp_path / 'nothing'), '--store', str(tmp_path / 's'), '--tokenizer', 'x.json'])


@pytest.fixture(scope='module')
def truncated(root):
  return prepare.prepare(root / 'corpus', root / 'truncated', root / 'tokenizer.json', packing='truncate', workers=2,
                         **SETTINGS)


def test_a_truncated_store_holds_the_beginning_of_every_document(root, truncated):
  encoder = tokenizer.load(root / 'tokenizer.json')
  rows = {row['id']: row['text'] for row in DOMAINS['pydocs']}
  want = sorted(encoder.encode_batch([text])[0][:SETTINGS['length'] + 1].tolist() for text in rows.values())
  got, m = [], truncated.domains.index('pydocs')
  for split in ('train', 'validation'):
    n = np.arange(truncated.sizes(split)[m])
    batch = truncated.read(split, np.full_like(n, m), n)
    assert batch['segment_BxL'].max() == 1
    for tokens, targets, on in zip(batch['tokens_BxL'], batch['targets_BxL'], batch['loss_mask_BxL'] > 0):
      got.append([tokens[0], *targets[on]])
      assert got[-1][:-1] == tokens[on].tolist()
  ended = [ids[:-1] if ids[-1] == encoder.eos_id else ids for ids in got]
  assert sorted(map(list, ended)) == want
  assert [ids[-1] == encoder.eos_id for ids in got] == [len(ids) <= SETTINGS['length'] for ids in ended]


def test_what_is_cut_off_is_counted(root, truncated):
  """What is kept and what is cut off is what a store that leaves nothing out has."""
  whole = stores.Store(root / 'store')
  for split in ('train', 'validation'):
    sizes = truncated.sizes(split)
    for m, domain in enumerate(truncated.domains):
      a, b = truncated.counts(split)[domain], whole.counts(split)[domain]
      assert (a['documents'], a['dropped'], a['sequences']) == (b['documents'], b['dropped'], b['documents'])
      assert a['tokens'] + a['cut']['tokens'] == b['tokens'] and a['bytes'] + a['cut']['bytes'] == b['bytes']
      batch = truncated.read(split, np.full(sizes[m], m), np.arange(sizes[m]))
      assert a['targets'] == batch['loss_mask_BxL'].sum() == a['tokens'] - a['documents']
      assert 0 < a['cut']['documents'] <= ((batch['segment_BxL'] > 0).all(axis=1)).sum()
  line = next(line for line in prepare.summary(truncated).splitlines() if line.split()[:2] == ['total', 'validation'])
  cut = [counts['cut'] for counts in truncated.counts('validation').values()]
  assert line.endswith(f'{sum(c["documents"] for c in cut):,} documents, by {sum(c["tokens"] for c in cut):,} tokens, '
                       f'{sum(c["bytes"] for c in cut) / 1e6:,.2f} MB')
  assert 'cut off' not in prepare.summary(whole) and 'cut' not in whole.counts('train')['json']


def test_the_bytes_of_a_truncated_store_are_those_of_the_text_in_it(root, truncated):
  encoder = tokenizer.load(root / 'tokenizer.json')
  for m, domain in enumerate(truncated.domains):
    n = np.arange(truncated.sizes('validation')[m])
    batch, counts = truncated.read('validation', np.full_like(n, m), n), truncated.counts('validation')[domain]
    texts = [encoder.decode([tokens[0], *targets[on]]).removesuffix(tokenizer.END) for tokens, targets, on in
             zip(batch['tokens_BxL'], batch['targets_BxL'], batch['loss_mask_BxL'] > 0)]
    # A character that is cut in two is decoded as one of three bytes.
    assert abs(sum(len(text.encode()) for text in texts) - counts['bytes']) <= 2 * counts['cut']['documents']


def test_a_truncated_store_has_the_same_bytes_from_any_number_of_workers(root, truncated, tmp_path):
  prepare.prepare(root / 'corpus', tmp_path / 'store', root / 'tokenizer.json', packing='truncate', **SETTINGS)
  assert _bytes(tmp_path / 'store') == _bytes(truncated.path)


def test_a_store_of_another_packing_is_refused(root, truncated):
  with pytest.raises(ValueError, match='packing is truncate-right-1, want concatenate-overlap-1; give another --store'):
    prepare.prepare(root / 'corpus', truncated.path, root / 'tokenizer.json', **SETTINGS)
  with pytest.raises(ValueError, match=r"packing is 'cut', want one of \['concatenate', 'truncate'\]"):
    prepare.prepare(root / 'corpus', root / 'other', root / 'tokenizer.json', packing='cut', **SETTINGS)
