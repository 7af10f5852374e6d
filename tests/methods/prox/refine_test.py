"""Laws of refining a corpus: nothing is lost, whoever does it in how many parts, killed or not."""

import datetime
import math
import os
import signal
import subprocess
import sys
import time

import pyarrow
import pyarrow.parquet
import pytest
from refined_corpora import NOISE, Refiner, content, jsonl, rows, write

from datasel import prepare
from datasel.data import corpus as corpora
from datasel.methods.prox import audit, refine, refining, refining_job, rule_refiner

CUT = {'rows': 10, 'batch': 4}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """CORPUS, and OUT refined from it in one go."""
  root = tmp_path_factory.mktemp('refine')
  write(root / 'corpus')
  refine.refine(root / 'corpus', root / 'out', Refiner(), **CUT)
  return root


def _documents(folder):
  listed = corpora.Corpus(folder)
  return {(split, domain): [document for source in sources for document in corpora.documents(source)]
          for split, of_split in listed.sources.items() for domain, sources in of_split.items()}


def _command(corpus, out, *flags):
  return [sys.executable, '-m', 'datasel.methods.prox.refine', '--corpus', corpus, '--out', out, '--rules', 'c4',
          '--rows', '10', '--batch', '4', *flags]


def test_every_document_is_in_the_output_as_refined_alone_with_its_id_and_fields_or_dropped(root):
  before, after = _documents(root / 'corpus'), _documents(root / 'out')
  assert before.keys() == after.keys()
  for key, documents in before.items():
    refined = [(document, refining.refine([document], Refiner())[0].text) for document in documents]
    assert after[key] == [corpora.Document(document.id, text, document.fields) for document, text in refined if text]
  decided = audit.Output(root / 'out').statistics['total']['documents']
  assert set(decided) == set(audit.DECISIONS)  # each was met
  assert sum(decided.values()) == sum(map(len, before.values()))


def test_prepare_takes_the_output_as_it_is(root):
  prepare.train_tokenizer(root / 'out', root / 'tokenizer.json', vocab_size=400, max_bytes_per_domain=30_000)
  store = prepare.prepare(root / 'out', root / 'store', root / 'tokenizer.json', length=64, holdout=0.3)
  assert store.domains == corpora.Corpus(root / 'corpus').domains
  left = {key: len(documents) for key, documents in _documents(root / 'out').items()}
  assert store.counts('validation')['help']['documents'] == left['validation', 'help']
  assert sum(store.counts(split)['anonymous']['documents'] for split in corpora.SPLITS) == left['train', 'anonymous']


def _few(root):
  """A corpus of web, and of bad, whose train documents are too short."""
  web = rows()[:12]
  for name, some in {'train/web': web, 'train/bad': [{'text': f'x {n}'} for n in range(3)], 'validation/web': web[:3],
                     'validation/bad': web[3:6]}.items():
    path = root / f'{name}.jsonl'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jsonl(some))
  return root


def test_a_domain_without_train_documents_leaves_no_validation_documents_behind(tmp_path, caplog):
  output = refine.refine(_few(tmp_path / 'corpus'), tmp_path / 'out', Refiner(), **CUT)
  assert set(_documents(output.path)) == {('train', 'web'), ('validation', 'web')}
  assert 'validation/bad: its 3 documents that are left are not in the output' in caplog.text
  assert not [name for name in output.manifest['files'] if name.startswith('validation/bad')]
  output.verify()
  prepare.train_tokenizer(output.path, tmp_path / 't.json', vocab_size=400, max_bytes_per_domain=30_000)
  assert prepare.prepare(output.path, tmp_path / 'store', tmp_path / 't.json', length=64).domains == ('web',)


def test_an_output_without_any_train_document_is_finished_and_the_command_says_that_it_is_no_corpus(tmp_path):
  (_few(tmp_path / 'corpus') / 'train/web.jsonl').unlink()
  (tmp_path / 'corpus/validation/web.jsonl').unlink()
  for _ in range(2):
    done = subprocess.run(_command(tmp_path / 'corpus', tmp_path / 'out'), capture_output=True, text=True)
    assert done.returncode == 1 and 'every train document was dropped' in done.stderr and 'train/bad' in done.stdout
  assert len(list(audit.Output(tmp_path / 'out').records())) == 6


def test_what_a_kill_leaves_half_written_is_removed(root, tmp_path):
  job = refining_job.make(root / 'corpus', tmp_path / 'out', Refiner(), **CUT)
  planned = refining_job.plan(job)
  refining_job.do(job, refining_job.pieces_of(planned), lambda _: None, lambda: False)
  for name in ('.manifest.json.tmp-7', '.statistics.json.tmp-8', 'audit/train/.help-00000.jsonl.gz.tmp-9'):
    (job.folder / name).write_bytes(b'half')
  refining_job.finish(job, planned)
  assert content(tmp_path / 'out') == content(root / 'out')


def test_an_output_among_the_corpuss_own_files_is_refused(tmp_path):
  corpus = _few(tmp_path / 'corpus')
  for place in ('train/new', 'train/web/new', 'validation'):
    with pytest.raises(ValueError, match='would be read as a part of the corpus'):
      refine.refine(corpus, corpus / place, Refiner())
  assert len(list(corpus.rglob('*'))) == 6


def test_stopped_after_any_batch_with_more_on_disk_than_was_noted_it_ends_with_the_same_bytes(root, tmp_path):
  out = tmp_path / 'out'
  job = refining_job.make(root / 'corpus', out, Refiner(), **CUT)
  planned = refining_job.plan(job)
  every, n, read = refining_job.pieces_of(planned), 0, []
  while True:
    batches = iter([False, True])
    if refining_job.do(job, every, read.append, lambda batches=batches: next(batches)):
      break
    n += 1
    for state in job.folder.glob('pieces/**/*.progress'):  # as if killed while it wrote
      for path in (job.folder / state.relative_to(job.folder / 'pieces').with_suffix('.jsonl.gz'),
                   job.folder / 'audit' / state.relative_to(job.folder / 'pieces').with_suffix('.jsonl.gz')):
        with open(path, 'ab') as f:
          f.write(b'\x1f\x8b' + 100_000 * b'x')
  assert n > 20
  assert sum(map(audit.n_documents, read)) == sum(map(len, _documents(root / 'corpus').values()))  # none done twice
  refining_job.finish(job, planned)
  assert content(out) == content(root / 'out')


def test_killed_again_and_again_it_ends_with_the_same_bytes(root, tmp_path):
  refine.refine(root / 'corpus', tmp_path / 'whole', rule_refiner.RuleRefiner('c4'), **CUT)
  out, kills = tmp_path / 'out', 0
  for patience in (0.0, 0.01, 0.03, 60.0):
    process = subprocess.Popen(_command(root / 'corpus', out, '--workers', '2' if patience == 0.01 else '1'),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    have = len(list(tmp_path.glob('out.partial/**/*.progress')) + list(tmp_path.glob('out.partial/pieces/*/*.json')))
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
      now = len(list(tmp_path.glob('out.partial/**/*.progress'))
                + list(tmp_path.glob('out.partial/pieces/*/*.json')))
      if now > have and patience < 60:
        time.sleep(patience)
        process.kill()
        kills += 1
        break
      time.sleep(0.001)
    process.wait()
    if out.exists():
      break
  assert kills
  assert content(out) == content(tmp_path / 'whole')


def test_sigterm_ends_it_after_a_batch_and_the_next_run_goes_on(root, tmp_path):
  write(tmp_path / 'corpus')
  (tmp_path / 'corpus/train/many.jsonl').write_bytes(jsonl(rows()) * 4)
  command = _command(tmp_path / 'corpus', tmp_path / 'out')
  process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
  end = time.monotonic() + 60
  while not list(tmp_path.glob('out.partial/**/*.progress')) and time.monotonic() < end:
    time.sleep(0.001)
  process.send_signal(signal.SIGTERM)
  assert 'repeat the command to go on' in process.communicate()[1]
  assert process.returncode == 143
  assert not (tmp_path / 'out').exists()
  subprocess.run(command, check=True, capture_output=True)
  assert audit.n_documents(audit.Output(tmp_path / 'out').statistics['total']) == 81 + 4 * len(rows())


def test_processes_and_shards_write_the_same_bytes(root, tmp_path):
  refiner = rule_refiner.RuleRefiner('c4')
  refine.refine(root / 'corpus', tmp_path / 'one', refiner, **CUT)
  refine.refine(root / 'corpus', tmp_path / 'two', refiner, workers=2, **CUT)
  assert content(tmp_path / 'two') == content(tmp_path / 'one')
  outputs = [refine.refine(root / 'corpus', tmp_path / 'three', refiner, shard=(i, 3), **CUT) for i in (2, 0, 1)]
  assert [output is None for output in outputs] == [True, True, False]
  assert content(tmp_path / 'three') == content(tmp_path / 'one')


def test_the_cut_in_files_and_batches_does_not_change_the_documents(root, tmp_path):
  refine.refine(root / 'corpus', tmp_path / 'out', Refiner())
  assert _documents(tmp_path / 'out') == _documents(root / 'out')
  assert audit.Output(tmp_path / 'out').statistics == audit.Output(root / 'out').statistics


def test_a_finished_output_is_returned_untouched_and_another_one_refused(root, tmp_path):
  before = {path: path.stat().st_mtime_ns for path in (root / 'out').rglob('*')}
  refiner = Refiner()
  refine.refine(root / 'corpus', root / 'out', refiner, **CUT)
  assert not refiner.asked
  for different, how in ((Refiner(fingerprint='v2'), 'fingerprint is'), (Refiner(name='other'), 'refiner is')):
    with pytest.raises(ValueError, match=how):
      refine.refine(root / 'corpus', root / 'out', different, **CUT)
  with pytest.raises(ValueError, match='compat is False, want True'):
    refine.refine(root / 'corpus', root / 'out', Refiner(), compat=True, **CUT)
  assert {path: path.stat().st_mtime_ns for path in (root / 'out').rglob('*')} == before
  (tmp_path / 'mine').mkdir()
  with pytest.raises(ValueError, match='was not written by this command'):
    refine.refine(root / 'corpus', tmp_path / 'mine', Refiner(), **CUT)


def test_work_in_progress_is_not_continued_on_another_corpus_or_refiner(tmp_path):
  corpus = write(tmp_path / 'corpus')
  job = refining_job.make(corpus, tmp_path / 'out', Refiner(), **CUT)
  refining_job.do(job, refining_job.pieces_of(refining_job.plan(job))[:2], lambda _: None, lambda: False)
  with pytest.raises(ValueError, match='fingerprint is'):
    refine.refine(corpus, tmp_path / 'out', Refiner(fingerprint='v2'), **CUT)
  os.utime(corpus / 'train/blank.jsonl', ns=(0, 0))  # touched, the same
  refining_job.plan(job)
  with open(corpus / 'train/help-0.jsonl', 'ab') as f:
    f.write(jsonl([{'text': 'one more'}]))
  with pytest.raises(ValueError, match=r'train/help-0\.jsonl has changed'):
    refine.refine(corpus, tmp_path / 'out', Refiner(), **CUT)


def test_a_bad_row_is_named_and_costs_no_finished_piece(tmp_path):
  corpus = write(tmp_path / 'corpus')
  good = (corpus / 'train/help-0.jsonl').read_bytes()
  (corpus / 'train/help-0.jsonl').write_bytes(good.replace(b'"text"', b'"test"', 1))
  with pytest.raises(ValueError, match=r'help-0\.jsonl:1: no "text"'):
    refine.refine(corpus, tmp_path / 'out', Refiner(), **CUT)
  assert list((tmp_path / 'out.partial/pieces').rglob('*.json'))
  assert not (tmp_path / 'out').exists()


def test_a_damaged_piece_is_named_before_anything_is_made_of_it(root, tmp_path):
  for damage in (lambda content: content[:-1], lambda content: content[:40] + b'X' + content[41:]):
    out = tmp_path / f'out{damage(b"0" * 50)[-1]}{len(damage(b"0" * 50))}'
    job = refining_job.make(root / 'corpus', out, Refiner(), **CUT)
    planned = refining_job.plan(job)
    refining_job.do(job, refining_job.pieces_of(planned), lambda _: None, lambda: False)
    path = job.folder / 'audit/train/help-00001.jsonl.gz'
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r'audit/train/help-00001\.jsonl\.gz is damaged'):
      refining_job.finish(job, planned)
    assert not out.exists()


def test_files_shorter_than_when_they_were_counted_or_written_are_refused(tmp_path):
  corpus = write(tmp_path / 'corpus')
  job = refining_job.make(corpus, tmp_path / 'out', Refiner(), **CUT)
  every = refining_job.pieces_of(refining_job.plan(job))
  stops = iter([False, True])
  assert not refining_job.do(job, every, lambda _: None, lambda: next(stops))
  begun = job.folder / f'{every[0].name}.jsonl.gz'
  begun.write_bytes(begun.read_bytes()[:-9])
  with pytest.raises(ValueError, match=r'anonymous-00000\.jsonl\.gz is damaged'):
    refining_job.do(job, every, lambda _: None, lambda: False)
  (corpus / 'train/blank.jsonl').write_bytes(jsonl(rows()[50:54]))
  with pytest.raises(ValueError, match=r'blank\.jsonl ends before row 7'):
    refining_job.do(job, [piece for piece in every if 'blank' in piece.name], lambda _: None, lambda: False)


def test_fields_of_a_table_are_carried_as_json_has_them(tmp_path):
  (tmp_path / 'corpus/train').mkdir(parents=True)
  table = pyarrow.table({'id': [7, 8], 'text': ['One two three. ' * 30] * 2, 'when': [datetime.date(2024, 2, 3)] * 2,
                         'quality': [0.5, math.nan], 'tags': [['a'], None]})
  pyarrow.parquet.write_table(table, tmp_path / 'corpus/train/web.parquet')
  refine.refine(tmp_path / 'corpus', tmp_path / 'out', Refiner())
  one, other = _documents(tmp_path / 'out')['train', 'web']
  assert (one.id, one.fields) == ('7', {'when': '2024-02-03', 'quality': 0.5, 'tags': ['a']})
  assert math.isnan(other.fields.pop('quality')) and other.fields == {'when': '2024-02-03', 'tags': None}
  pyarrow.parquet.write_table(table.append_column('raw', [[b'\x00', b'']]), tmp_path / 'corpus/train/web.parquet')
  with pytest.raises(ValueError, match=r"train/web\.parquet, row 1, column 'raw': a field holds bytes"):
    refine.refine(tmp_path / 'corpus', tmp_path / 'other', Refiner())


def test_a_refiner_of_one_stage_is_asked_for_that_alone(root):
  documents = _documents(root / 'corpus')['train', 'help']
  both = refining.refine(documents, Refiner())
  first = refining.refine(documents, Refiner(stages=('document',), write=None))
  second = refining.refine(documents, Refiner(stages=('chunk',), decide=None))
  for document, of_both, of_first, of_second in zip(documents, both, first, second, strict=True):
    assert of_first.text == (document.text if of_both.record['reason'] != 'short' else '')
    if of_both.record['reason'] != 'short':
      assert of_second.text == of_both.text and of_second.record['document'] is None
  with pytest.raises(ValueError, match='has no stage'):
    refine.refine(root / 'corpus', root / 'none', Refiner(stages=()))


def test_a_line_longer_than_a_chunk_is_asked_about_only_by_the_authors():
  text = 'word ' * 80 + '\n' + NOISE[0]
  document = corpora.Document('x', text, {})
  for compat in (False, True):
    [one] = refining.refine([document], Refiner(), compat=compat)
    assert [chunk['finished'] for chunk in one.record['chunks']] == ['eos' if compat else 'skipped', 'length']


def test_compat_is_the_authors_executor_over_the_whole_document():
  class Menu(Refiner):
    max_tokens = 8

    def write(self, chunks):
      return [refining.Written('normalize(source_str="Menu", target_str="")' if not chunk.start else 'keep_chunk()',
                               'eos') for chunk in chunks]

  text = '\n'.join(['Menu ' + 'one two three'] * 25)
  [fixed], [theirs] = (refining.refine([corpora.Document('x', text, {})], Menu(), compat=compat)
                       for compat in (False, True))
  assert fixed.text.count('Menu') == 24
  assert 'Menu' not in theirs.text

  class Wordy(Refiner):
    def decide(self, texts):
      return [refining.Decision('keep_doc() # do not drop') for _ in texts]

  decided = [refining.refine([corpora.Document('x', text, {})], Wordy(), compat=compat)[0].record['stage']
             for compat in (False, True)]
  assert decided == ['chunk', 'document']


def test_a_dry_run_shows_each_decision_and_writes_nothing(root, tmp_path):
  write(tmp_path / 'corpus')
  done = subprocess.run(_command(tmp_path / 'corpus', tmp_path / 'out', '--dry_run', '40'), capture_output=True,
                        text=True, check=True)
  assert 'documents  40' in done.stdout and 'dropped:' in done.stdout and '\x1b' not in done.stdout
  assert sorted(path.name for path in tmp_path.iterdir()) == ['corpus']
  pairs, counted = refine.dry_run(tmp_path / 'corpus', Refiner(), 9)
  assert [document.fields.get('more') is None for document, _ in pairs] == [False, True, True] * 3  # domains in turn
  assert audit.n_documents(counted) == 9


def test_what_cannot_be_asked_for_is_refused(root, tmp_path):
  with pytest.raises(ValueError, match='shard 3/3'):
    refine.refine(root / 'corpus', tmp_path / 'out', Refiner(), shard=(3, 3))
  done = subprocess.run(_command(root / 'corpus', tmp_path / 'out', '--programs_of', 'x'), capture_output=True,
                        text=True)
  assert done.returncode == 1 and 'want one of --rules' in done.stderr
  for n in ('0', '-3'):
    with pytest.raises(SystemExit, match='want at least 1 document'):
      refine.main(['--corpus', str(root / 'corpus'), '--out', str(tmp_path / 'out'), '--rules', 'c4', '--dry_run', n])
  assert not list(tmp_path.iterdir())
