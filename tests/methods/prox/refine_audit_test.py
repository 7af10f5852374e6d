"""Laws of the audit: what is stored gives the texts again, and the statistics are sums over documents."""

import collections
import functools

import pytest
from refined_corpora import Refiner, content, write

from datasel.data import corpus as corpora
from datasel.data import tokenizer
from datasel.methods.prox import audit, executor, pieces, refine, tables

CUT = {'rows': 10, 'batch': 4}


@pytest.fixture(scope='module', params=[False, True], ids=['ours', 'compat'])
def refined(request, tmp_path_factory):
  root = tmp_path_factory.mktemp('audit')
  corpus = write(root / 'corpus')
  return corpus, refine.refine(corpus, root / 'out', Refiner(), compat=request.param, **CUT), request.param


def _pairs(corpus, output):
  """(document, its record) of all, in order."""
  documents = [document for source in pieces.sources_of(corpora.Corpus(corpus))
               for document in corpora.documents(source)]
  return list(zip(documents, (record for _, record in output.records()), strict=True))


def test_the_stored_programs_give_the_stored_texts_again(refined):
  corpus, output, compat = refined
  stored = [document for source in pieces.sources_of(corpora.Corpus(output.path))
            for document in corpora.documents(source)]
  replayed = [(document.id, audit.replay(document.text, record, compat=compat).text)
              for document, record in _pairs(corpus, output)]
  assert [pair for pair in replayed if pair[1]] == [(document.id, document.text) for document in stored]
  assert len(replayed) - len(stored) == output.statistics['total']['documents']['dropped']


def test_a_record_is_of_one_text_and_one_outcome(refined):
  corpus, output, compat = refined
  document, record = next(pair for pair in _pairs(corpus, output) if pair[1]['decision'] == 'edited')
  with pytest.raises(ValueError, match='is of another text'):
    audit.replay(document.text + ' ', record, compat=compat)
  with pytest.raises(ValueError, match='is edited when its programs are carried out again, and kept by its record'):
    audit.replay(document.text, record | {'decision': 'kept'}, compat=compat)


def test_statistics_are_what_counting_the_documents_by_hand_gives(refined):
  corpus, output, _ = refined
  pairs, stated = _pairs(corpus, output), output.statistics['total']
  texts = {document.id: document.text for source in pieces.sources_of(corpora.Corpus(output.path))
           for document in corpora.documents(source)}
  before = [document.text for document, _ in pairs]
  assert stated['documents']['dropped'] == len(pairs) - len(texts)
  assert stated['documents']['kept'] == sum(texts.get(document.id) == document.text for document, _ in pairs)
  for when, some in (('before', before), ('after', texts.values())):
    assert stated[when] == {'lines': sum(len(text.split('\n')) for text in some),
                            'words': sum(map(executor.words, some)), 'characters': sum(map(len, some))}
    histogram = collections.Counter(next(2 ** i for i in range(30) if executor.words(text) < 2 ** i) for text in some)
    assert stated['lengths'][when] == {str(most): n for most, n in sorted(histogram.items())}
  assert stated['truncated'] == sum(len(text) > 5000 for text in before if text.strip())
  assert stated['read']['document'] == sum(len(text.split()) + 2 for text in before if text.strip())
  kinds = stated['calls']['remove_lines']
  planted = sum(line in ('Home | Products | Contact', 'Share on Facebook', 'Copyright 2020. All rights reserved')
                for document, record in pairs if record['chunks'] for line in document.text.split('\n'))
  assert kinds['applied'] + kinds.get('reverted', 0) == planted


def test_statistics_of_parts_add_up_to_those_of_the_whole_in_any_order(refined):
  _, output, _ = refined
  counted = [audit.counts(record) for _, record in output.records()]
  forwards, backwards = (functools.reduce(audit.add, some, {}) for some in (counted, counted[::-1]))
  halves = audit.add(functools.reduce(audit.add, counted[::2], {}), functools.reduce(audit.add, counted[1::2], {}))
  for whole in (forwards, backwards, halves):
    assert list(audit.in_order(whole).items()) == list(output.statistics['total'].items())
  assert audit.in_order(functools.reduce(audit.add, output.statistics['domains'].values(), {})) == audit.in_order(
    forwards)


def test_given_programs_are_carried_out_again_to_the_same_output_or_by_the_other_executor(refined, tmp_path):
  corpus, output, compat = refined
  again = refine.refine(corpus, tmp_path / 'again', programs_of=output.path, compat=compat, **CUT)
  names = [name for name in content(output.path) if name != 'manifest.json']
  assert [content(again.path)[name] for name in names] == [content(output.path)[name] for name in names]
  direct = refine.refine(corpus, tmp_path / 'direct', Refiner(), compat=not compat, rows=7, batch=3)
  other = refine.refine(corpus, tmp_path / 'other', programs_of=output.path, compat=not compat, rows=7, batch=3)
  assert other.statistics == direct.statistics != output.statistics


def test_given_programs_are_not_carried_out_on_another_corpus(refined, tmp_path):
  _, output, _ = refined
  path = write(tmp_path / 'corpus') / 'train/help-0.jsonl'
  whole = path.read_bytes()
  path.write_bytes(whole.replace(b'http://example.org/3"', b'http://example.org/x"'))  # no other text
  refine.refine(tmp_path / 'corpus', tmp_path / 'same', programs_of=output.path, **CUT)
  path.write_bytes(whole.replace(b'assert', b'insist'))
  with pytest.raises(ValueError, match='is of another text'):
    refine.refine(tmp_path / 'corpus', tmp_path / 'other', programs_of=output.path, **CUT)
  path.write_bytes(whole + whole[:whole.index(b'\n') + 1])
  with pytest.raises(ValueError, match=r'has no records for rows .* of train/help-0\.jsonl'):
    refine.refine(tmp_path / 'corpus', tmp_path / 'longer', programs_of=output.path, **CUT)


def test_tokens_are_counted_by_the_tokenizer_that_is_asked_for(refined, tmp_path):
  corpus, output, compat = refined
  encoder = tokenizer.train_bpe((document.text for document, _ in _pairs(corpus, output)), 400, tmp_path / 't.json')
  counted = refine.refine(corpus, tmp_path / 'out', Refiner(), compat=compat, tokenizer_path=tmp_path / 't.json', **CUT)
  left = [document.text for source in pieces.sources_of(corpora.Corpus(counted.path))
          for document in corpora.documents(source)]
  assert counted.statistics['total']['after']['tokens'] == sum(map(len, encoder.encode_batch(left)))
  assert counted.statistics['total']['before']['tokens'] == sum(
    map(len, encoder.encode_batch([document.text for document, _ in _pairs(corpus, output)])))


def test_the_cost_is_of_the_tokens_of_each_stage(refined):
  _, output, _ = refined
  records = [record for _, record in output.records()]
  by_hand = sum(10 * (record['document'] or {'tokens': 0})['tokens']
                + sum(3 * (chunk['read'] + chunk['generated']) for chunk in record['chunks']) for record in records)
  assert audit.flops(output.statistics['total'], {'document': 10, 'chunk': 3}) == by_hand > 0
  assert f'{by_hand:.3g}' in tables.statistics(output.statistics, {'document': 10, 'chunk': 3})


def test_a_damaged_or_unfinished_output_is_refused_by_name(refined, tmp_path):
  corpus, _, compat = refined
  output = refine.refine(corpus, tmp_path / 'out', Refiner(), compat=compat, **CUT)
  output.verify()
  path = output.path / 'train/help-00002.jsonl.gz'
  whole = path.read_bytes()
  for damaged in (whole[:-1], whole[:50] + b'\0' + whole[51:]):
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r'train/help-00002\.jsonl\.gz is damaged'):
      output.verify()
  path.write_bytes(whole)
  records = output.path / 'audit/train/help-00002.jsonl.gz'
  records.write_bytes(records.read_bytes()[:-20])
  with pytest.raises(ValueError, match=r'audit/train/help-00002\.jsonl\.gz is damaged after line'):
    list(output.records())
  (tmp_path / 'begun.partial').mkdir()
  with pytest.raises(ValueError, match='is not finished'):
    audit.Output(tmp_path / 'begun')
