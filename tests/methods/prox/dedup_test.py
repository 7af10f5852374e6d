"""Laws of dropping copies: planted ones go, nothing else does, and the first stays, whoever does the work."""

import collections
import itertools
import random
import re

import pytest
from refined_corpora import content, jsonl, rows

from datasel.data import corpus as corpora
from datasel.methods.prox import audit, dedup, local, refining_job, signatures
from datasel.methods.prox.signatures import Signing

SIGNING = Signing(threshold=0.7)
RNG = random.Random(0)
CHINESE = '我们的花园里有很多花' * 9
# 'execmodel' is 'naming' with a chapter more.
ORIGINALS = [row for row in rows() if len(row['text']) > 1500 and row['id'] != 'naming'][:40]
ERROR = 4 * (0.21 / 128) ** 0.5  # of an estimate near 0.7


def _near(row, edits):
  words = row['text'].split(' ')
  for _ in range(edits):
    words[RNG.randrange(len(words))] = RNG.choice(['zebra', 'quagga', 'okapi'])
  return {'id': f'{row["id"]}~{edits}', 'text': ' '.join(words)}


def _same_words(row):
  return {'id': f'{row["id"]}=', 'text': re.sub(r'[ \n]+', ' \n ', row['text'].upper())}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp('dedup')
  files = {
    'train/a-0.jsonl': ORIGINALS[:20],
    'train/a-1.jsonl': [*ORIGINALS[20:], *(_same_words(row) for row in ORIGINALS[5:10]),
                        {'id': 'short', 'text': 'Too short.'}, {'id': 'short=', 'text': 'too  SHORT'},
                        {'id': 'short~', 'text': 'too short, but'}],
    'train/b.jsonl': [*(_near(row, 1) for row in ORIGINALS[10:30]), *(_near(row, len(row['text']) // 8)
                                                                      for row in ORIGINALS[10:20]),
                      {'id': 'signs', 'text': '-- ** --'}, {'id': 'other signs', 'text': '++ ** ++'}],
    'validation/b.jsonl': [{'id': 'held', 'text': ORIGINALS[0]['text']}, {'id': 'chinese', 'text': CHINESE},
                           {'id': 'chinese~', 'text': CHINESE + '吗'}],
  }
  for name, some in files.items():
    (root / 'corpus' / name).parent.mkdir(parents=True, exist_ok=True)
    (root / 'corpus' / name).write_bytes(jsonl(some))
  dedup.dedup(root / 'corpus', root / 'out', signing=SIGNING, rows=12, batch=5)
  return root


def _ids(folder):
  listed = corpora.Corpus(folder)
  return [document.id for split in corpora.SPLITS for of_domain in listed.sources[split].values()
          for source in of_domain for document in corpora.documents(source)]


def _copies(folder):
  return {record['id']: record for _, record in audit.Output(folder).records() if 'copy_of' in record}


def test_planted_copies_go_and_everything_else_stays_in_order(root):
  dropped = [ORIGINALS[0]['id'], *(f'{row["id"]}=' for row in ORIGINALS[5:10]), 'short=',
             *(f'{row["id"]}~1' for row in ORIGINALS[10:30]), 'chinese~']
  copies = _copies(root / 'out')
  assert sorted(copies) == sorted(dropped)
  assert _ids(root / 'out') == [one for one in _ids(root / 'corpus') if one not in copies]
  assert copies['short=']['reason'] == copies[f'{ORIGINALS[5]["id"]}=']['reason'] == 'exact copy'
  assert copies[f'{ORIGINALS[12]["id"]}~1']['reason'] == copies['chinese~']['reason'] == 'near copy'


def test_the_kept_copy_is_named_is_kept_and_comes_first_validation_before_train(root):
  order = sorted(_ids(root / 'corpus'), key=lambda one: one not in ('held', 'chinese', 'chinese~'))
  kept = set(_ids(root / 'out'))
  for identity, record in _copies(root / 'out').items():
    of = record['copy_of']['id']
    assert of in kept and order.index(of) < order.index(identity)
    assert identity.rstrip('=~1') == of or identity in (ORIGINALS[0]['id'], 'short=', 'chinese~')
  assert _copies(root / 'out')[ORIGINALS[0]['id']]['copy_of'] == {'id': 'held', 'domain': 'validation/b',
                                                                  'similarity': 1.0}


def test_the_similarity_is_that_of_the_sets_of_ngrams_and_no_kept_pair_is_above_the_threshold(root):
  texts = {document.id: document.text for of_split in corpora.Corpus(root / 'corpus').sources.values()
           for of_domain in of_split.values() for source in of_domain for document in corpora.documents(source)}

  def grams(text):  # one letter of Chinese is a word
    words = re.findall(r'[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+', text.lower())
    return {tuple(words[i:i + 5]) for i in range(max(len(words) - 4, 1))}

  sets = {identity: grams(text) for identity, text in texts.items()}
  jaccard = lambda a, b: len(sets[a] & sets[b]) / len(sets[a] | sets[b])
  for identity, record in _copies(root / 'out').items():
    assert abs(jaccard(identity, record['copy_of']['id']) - record['copy_of']['similarity']) < ERROR
  kept = [identity for identity in _ids(root / 'out') if sets[identity] != {()}]  # of signs alone there are no n-grams
  assert all(jaccard(a, b) < SIGNING.threshold + ERROR for a, b in itertools.combinations(kept, 2))


def test_ngrams_are_of_lower_case_words_and_of_fewer_words_all_of_them():
  assert signatures.words("It's 2 \u00c9t\u00e9s, \u82b1\u56ed!") == 'it s 2 \u00e9t\u00e9s \u82b1 \u56ed'.split()
  assert signatures.shingles(list('abcdef'), 5) == {'a b c d e', 'b c d e f'}
  assert signatures.shingles(list('ab'), 5) == {'a b'}
  by_hand = signatures.minhash(SIGNING)
  by_hand.update_batch([b'a b c d e', b'b c d e f'])
  [made] = signatures.signed([corpora.Document('x', 'A, b c d e f', {})], SIGNING).hashes_NxP
  assert made.tolist() == by_hand.hashvalues.tolist()


def test_a_document_is_compared_with_kept_ones_and_not_with_other_copies(tmp_path):
  words = [f'w{n}' for n in range(400)]
  chain = [{'id': str(n), 'text': ' '.join(words[20 * n:20 * n + 200])} for n in range(8)]  # each like its neighbours
  (tmp_path / 'corpus/train').mkdir(parents=True)
  (tmp_path / 'corpus/train/web.jsonl').write_bytes(jsonl(chain))
  signing = Signing(threshold=0.75, num_perm=256)
  dedup.dedup(tmp_path / 'corpus', tmp_path / 'out', signing=signing)
  of = {identity: record['copy_of']['id'] for identity, record in _copies(tmp_path / 'out').items()}
  assert of == {'1': '0', '3': '2', '5': '4', '7': '6'}


def test_processes_and_the_cut_in_files_change_no_document(root, tmp_path):
  dedup.dedup(root / 'corpus', tmp_path / 'two', signing=SIGNING, rows=12, batch=5, workers=2)
  two, one = (content(folder) for folder in (tmp_path / 'two', root / 'out'))
  assert {name: two[name] for name in two} == one
  dedup.dedup(root / 'corpus', tmp_path / 'whole', signing=SIGNING)
  assert _copies(tmp_path / 'whole') == _copies(root / 'out')


def test_a_corpus_that_is_all_copies_of_its_validation_documents_is_said_to_be_none(tmp_path):
  for split in ('train', 'validation'):
    (tmp_path / 'corpus' / split).mkdir(parents=True)
    (tmp_path / 'corpus' / split / 'a.jsonl').write_bytes(jsonl(ORIGINALS[:3]))
  with pytest.raises(SystemExit, match='every train document was dropped'):
    dedup.main(['--corpus', str(tmp_path / 'corpus'), '--out', str(tmp_path / 'out')])


def test_stopped_at_any_batch_it_ends_with_the_same_bytes(root, tmp_path):
  stops = collections.Counter()

  def run(do, job, left):
    after = iter([False, False, True])
    stops[job.folder.name] += 1
    if not do(job, left, lambda _: None, lambda: next(after)):
      raise local.Interrupted

  while True:
    try:
      dedup.dedup(root / 'corpus', tmp_path / 'out', signing=SIGNING, rows=6, batch=5, run_all=run)
      break
    except local.Interrupted:
      continue
  dedup.dedup(root / 'corpus', tmp_path / 'whole', signing=SIGNING, rows=6, batch=5)
  assert stops['out.partial'] > 15
  assert content(tmp_path / 'out') == content(tmp_path / 'whole')


def test_an_output_of_other_settings_and_damaged_signatures_are_refused(root, tmp_path):
  with pytest.raises(ValueError, match='copies at 0.8'):
    dedup.dedup(root / 'corpus', root / 'out', rows=12, batch=5)
  with pytest.raises(ValueError, match='want a threshold'):
    Signing(threshold=1.2)

  def damage(do, job, left):
    if do is refining_job.do:
      raise AssertionError('damaged signatures were used')
    local.run(do, job, left)
    path = signatures.path(job.folder, left[0])
    path.write_bytes(path.read_bytes()[:-30])

  with pytest.raises(ValueError, match=r'a-00000\.npz is damaged'):
    dedup.dedup(root / 'corpus', tmp_path / 'out', signing=SIGNING, rows=12, batch=5, run_all=damage)
