"""Laws of reading a store's records with another tokenizer: the text is the same, document by document."""

import collections
import json
import logging
import re

import numpy as np
import pytest
import sentencepiece
import tokenizers as hf

from datasel import prepare
from datasel.data import tokenizer as tokenizers
from datasel.methods.pds import texts
from datasel.methods.pds.texts import Retokenized

# Documents of several records, of one record with others, of one character; of characters of one to four bytes.
DOCUMENTS = ['The whole  of it:\n\n\tindented, and </s> spelled out. ' * 3, 'a', ' begins with a space',
             'Grüße, 世界! 🙂 ' * 20,
             'x = {"a": [1, 2]}\n' * 9, 'two\n\nlines', '🙂', 'ends with a space ', 'Straße ' * 12, '1234567890' * 7]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('texts')


def byte_level(path, vocab_size, corpus=DOCUMENTS):
  tokenizers.train_bpe(corpus, vocab_size, path / 'tokenizer.json')
  return tokenizers.load(path)


def sentence_piece(path, corpus=DOCUMENTS):
  """A SentencePiece BPE with bos and eos, of bytes where it has no piece, like Llama's."""
  path.mkdir(parents=True)
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(corpus * 4), model_prefix=str(path / 'tokenizer'), vocab_size=330, model_type='bpe',
    byte_fallback=True, normalization_rule_name='identity', remove_extra_whitespaces=False, minloglevel=2,
    hard_vocab_limit=False)
  return tokenizers.load(path)


@pytest.fixture(scope='module')
def scorers(folder):
  return {'bytes': byte_level(folder / 'wide', 500), 'pieces': sentence_piece(folder / 'pieces'),
          'lower': lower_case(folder / 'lower')}


def lower_case(path):
  model = hf.Tokenizer(hf.models.BPE())
  model.normalizer = hf.normalizers.Lowercase()
  model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = hf.decoders.ByteLevel()
  model.train_from_iterator(DOCUMENTS, hf.trainers.BpeTrainer(
    vocab_size=400, initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
  path.mkdir()
  model.save(str(path / 'tokenizer.json'))
  return tokenizers.load(path)


@pytest.fixture(scope='module', params=['bytes', 'pieces'])
def store(request, folder):
  """A store of records of 24 tokens by either kind of tokenizer: without bos, and with."""
  path = folder / f'store-{request.param}'
  corpus = path / 'corpus/train/all.jsonl'
  corpus.parent.mkdir(parents=True)
  corpus.write_text(''.join(json.dumps({'id': str(n), 'text': text}) + '\n' for n, text in enumerate(DOCUMENTS)))
  (path / 'corpus/validation').mkdir()
  (path / 'corpus/validation/all.jsonl').write_text(json.dumps({'id': 'v', 'text': 'held out, and long enough'}) + '\n')
  own = path / 'tokenizer'
  seen = [text for text in DOCUMENTS if text.isascii()]  # so that other characters are bytes, which a record may cut
  byte_level(own, 300, seen) if request.param == 'bytes' else sentence_piece(own, seen)
  return prepare.prepare(path / 'corpus', path / 'store', own, length=24, holdout=0)


def every_record(store):
  n = store.sizes('train')[0]
  return np.zeros(n, np.int64), np.arange(n)


def pieces(batch, row):
  return [batch['tokens_BxL'][row][batch['segment_BxL'][row] == s].tolist()
          for s in range(1, batch['segment_BxL'][row].max() + 1)]


def without_ends(ids, tokenizer):
  return [i for i in ids if i not in (tokenizer.bos_id, tokenizer.eos_id)]


@pytest.mark.parametrize('kind', ['bytes', 'pieces'])
def test_the_texts_of_all_records_in_their_order_are_the_corpus(store, scorers, kind):
  """But for characters whose bytes lie in two records: each is a run of U+FFFD."""
  tokenizer, mapped = scorers[kind], Retokenized(store, scorers[kind], 200)
  own, packed = tokenizers.load(store.path), store.read('train', *every_record(store))
  rows = mapped.read(*every_record(store))
  joined = ''
  for row in range(len(rows['example_B'])):
    mine = pieces(rows, row)
    assert len(mine) == sum(bool(without_ends(ids, own)) for ids in pieces(packed, row))
    joined += ''.join(tokenizer.decode(without_ends(ids, tokenizer)) for ids in mine)
  assert re.fullmatch('.'.join(map(re.escape, re.split('\ufffd+', joined))), ''.join(DOCUMENTS), re.DOTALL)
  assert mapped.counts['replaced_characters'] == joined.count('\ufffd') > 0
  assert mapped.counts['records'] == len(rows['example_B'])


def test_rows_are_packed_as_the_store_packs_them(store, scorers):
  tokenizer = scorers['pieces']
  read = Retokenized(store, tokenizer, 200).read(*every_record(store))
  counted = collections.Counter(read['tokens_BxL'][read['segment_BxL'] > 0].tolist())
  assert counted[tokenizer.bos_id] == counted[tokenizer.eos_id] == len(DOCUMENTS)
  for row in range(len(read['example_B'])):
    segment, position = read['segment_BxL'][row], read['position_BxL'][row]
    lengths = [len(ids) for ids in pieces(read, row)]
    n = sum(lengths)
    np.testing.assert_array_equal(segment[:n], np.repeat(np.arange(1, len(lengths) + 1), lengths))
    np.testing.assert_array_equal(position[:n], np.concatenate([np.arange(x) for x in lengths]))
    assert not (segment[n:].any() or position[n:].any() or read['tokens_BxL'][row, n:].any())
    for ids in pieces(read, row):
      assert tokenizer.bos_id not in ids[1:] and tokenizer.eos_id not in ids[:-1]
  assert all(read[name].dtype == np.int32 for name in ('tokens_BxL', 'segment_BxL', 'position_BxL', 'domain_B'))
  np.testing.assert_array_equal(read['example_B'], every_record(store)[1])


def test_the_stores_own_tokenizer_gives_the_stores_own_batch(store):
  with pytest.raises(ValueError, match='scorer.length is 7, but the scorer has the tokenizer of .*set it to 0'):
    texts.reader(store, tokenizers.load(store.path), 7)
  read = texts.reader(store, tokenizers.load(store.path), store.length)
  want = store.read('train', *every_record(store))
  assert {name: x.tolist() for name, x in read(*every_record(store)).items()} == {
    name: x.tolist() for name, x in want.items()}


def test_what_is_too_long_is_refused_by_name_or_cut_and_counted(store, scorers, caplog):
  rows, tokenizer = every_record(store), scorers['bytes']
  whole = Retokenized(store, tokenizer, 200).read(*rows)
  lengths = (whole['segment_BxL'] > 0).sum(1)
  short = int(lengths.max()) - 3
  too_long = np.flatnonzero(lengths > short)
  first = rf'^all/{too_long[0]} has {lengths[too_long[0]]} tokens in wide, more than {short}; raise'
  with pytest.raises(ValueError, match=first):
    Retokenized(store, tokenizer, short).read(*rows)
  cutting = Retokenized(store, tokenizer, short, cut=True)
  with caplog.at_level(logging.WARNING):
    cut = cutting.read(*rows)
  said = [re.match(r'(\d+) of (\d+) records read .* cut, by (\d+) tokens .* all/(\d+)$', line)
          for line in caplog.messages]
  assert [int(m[1]) for m in said] == [2**n for n in range(len(too_long).bit_length())]
  assert int(said[0][3]) == lengths[too_long[0]] - short and int(said[0][4]) == too_long[0]
  for name in ('tokens_BxL', 'segment_BxL', 'position_BxL'):
    np.testing.assert_array_equal(cut[name], whole[name][:, :short])
  assert cutting.counts['cut_records'] == len(too_long)
  assert cutting.counts['cut_tokens'] == (lengths[too_long] - short).sum()


@pytest.mark.parametrize('kind', ['bytes', 'pieces'])
def test_the_check_finds_nothing_to_say_of_exact_tokenizers(store, scorers, kind, caplog):
  with caplog.at_level(logging.WARNING):
    found = Retokenized(store, scorers[kind], 200).check()
  assert found['changed'] == found['changed_documents'] == found['too_long'] == 0 and not caplog.records
  assert found['documents'] >= 3 and found['pieces'] >= found['records'] == len(every_record(store)[0])


def test_the_check_finds_what_a_tokenizer_loses(store, scorers, caplog):
  with caplog.at_level(logging.WARNING):
    found = Retokenized(store, scorers['lower'], 200).check(8)
  assert found['records'] == 8 and 0 < found['changed'] <= found['pieces'] and found['changed_documents'] == 0
  assert "in all/0, 'The whole" in caplog.text and "becomes 'the whole" in caplog.text


def test_a_reader_is_checked_before_it_reads(store, scorers):
  tokenizer = scorers['pieces']
  with pytest.raises(ValueError, match='sampled records have more than 9 tokens'):
    texts.reader(store, tokenizer, 9)
  got, want = texts.reader(store, tokenizer, 200)(*every_record(store)), Retokenized(store, tokenizer, 200)
  np.testing.assert_array_equal(got['tokens_BxL'], want.read(*every_record(store))['tokens_BxL'])


def test_the_check_finds_records_that_are_too_long_before_they_are_read(store, scorers):
  with pytest.raises(ValueError, match=r'sampled records have more than 12 tokens in wide \(the longest \d+\); raise'):
    Retokenized(store, scorers['bytes'], 12).check()
  assert Retokenized(store, scorers['bytes'], 12, cut=True).check()['too_long'] > 0
