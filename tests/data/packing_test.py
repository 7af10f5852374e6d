"""Laws of packing, against a rewrite that looks at one token at a time."""

import collections

import numpy as np
import pytest

from datasel.data import packing

SHAPES = [(1, None, None), (2, None, 0), (7, 5, None), (8, 5, 0), (16, None, 0), (64, 5, 0)]


def _documents(rng, n, shortest=1, vocab_size=300):
  return [rng.integers(6, vocab_size, rng.integers(shortest, 40)).astype(np.int32) for _ in range(n)]


def _pack(documents, length, bos_id=None, eos_id=0, vocab_size=300, at_once=5, packer=packing.Packer):
  packer = packer(length=length, vocab_size=vocab_size, bos_id=bos_id, eos_id=eos_id)
  parts = [packer.add(documents[i:i + at_once]) for i in range(0, len(documents), at_once)]
  return np.concatenate([*parts, packer.finish()])


def _stream(documents, bos_id, eos_id):
  """[(document number, position in document, id)] of every token."""
  out = []
  for number, document in enumerate(documents):
    ids = [i for i in (bos_id,) if i is not None] + document.tolist() + [i for i in (eos_id,) if i is not None]
    out += [(number, position, i) for position, i in enumerate(ids)]
  return out


@pytest.mark.parametrize('length,bos_id,eos_id', SHAPES)
def test_unpack_equals_a_loop_over_tokens(length, bos_id, eos_id):
  documents = _documents(np.random.default_rng(length), 50)
  batch = packing.unpack(_pack(documents, length, bos_id, eos_id))
  stream = _stream(documents, bos_id, eos_id)
  rows = range(0, max(len(stream) - 1, 1), length)
  assert len(batch['tokens_BxL']) == len(rows)
  for row, first in enumerate(rows):
    segment, position = 1, 0
    for column in range(length):
      at = first + column
      want = dict.fromkeys(batch, 0)
      if at < len(stream):
        if column and stream[at][1] == 0:
          segment, position = segment + 1, 0
        want |= {'tokens_BxL': stream[at][2], 'segment_BxL': segment, 'position_BxL': position}
        position += 1
      if at + 1 < len(stream):
        want |= {'targets_BxL': stream[at + 1][2], 'loss_mask_BxL': float(stream[at + 1][0] == stream[at][0])}
      assert {key: array[row, column] for key, array in batch.items()} == want, (row, column)


@pytest.mark.parametrize('length,bos_id,eos_id', SHAPES)
def test_every_transition_inside_a_document_is_a_target_exactly_once(length, bos_id, eos_id):
  # Ids that never repeat: a pair of neighbours then names its place.
  lengths = np.random.default_rng(1).integers(1, 30, 40)
  documents = np.split(np.arange(10, 10 + lengths.sum(), dtype=np.int32), np.cumsum(lengths)[:-1])
  batch = packing.unpack(_pack(documents, length, bos_id, eos_id, vocab_size=2000))
  on = batch['loss_mask_BxL'] == 1
  got = collections.Counter(zip(batch['tokens_BxL'][on].tolist(), batch['targets_BxL'][on].tolist()))
  stream = _stream(documents, bos_id, eos_id)
  want = collections.Counter((a[2], b[2]) for a, b in zip(stream, stream[1:]) if a[0] == b[0])
  assert got == want


def test_records_do_not_depend_on_how_documents_arrive():
  documents = _documents(np.random.default_rng(0), 60)
  whole = _pack(documents, 16, at_once=60)
  assert whole.tobytes() == _pack(documents, 16, at_once=1).tobytes()
  assert whole.tobytes() == _pack(documents, 16, at_once=7).tobytes()


@pytest.mark.parametrize('tokens,records,valid', [(1, 1, 1), (8, 1, 8), (9, 1, 9), (10, 2, 2), (17, 2, 9), (18, 3, 2)])
def test_the_last_record_holds_what_is_left(tokens, records, valid):
  packed = _pack([np.arange(1, tokens + 1, dtype=np.int32)], 8, eos_id=None)
  assert (len(packed), packed['valid'][-1]) == (records, valid)
  assert not packed['tokens'][-1][valid:].any()


def test_no_documents_make_no_records():
  assert len(_pack([], 8)) == len(_pack([], 8, packer=packing.Truncator)) == 0


@pytest.mark.parametrize('length,bos_id,eos_id', SHAPES)
def test_a_truncated_document_is_one_record_of_its_first_tokens(length, bos_id, eos_id):
  documents = _documents(np.random.default_rng(length), 50)
  packed = _pack(documents, length, bos_id, eos_id, packer=packing.Truncator)
  batch = packing.unpack(packed)
  assert len(packed) == 50
  for row, document in enumerate(documents):
    kept = [i for _, _, i in _stream([document], bos_id, eos_id)][:length + 1]
    n = min(len(kept), length)
    assert packed['valid'][row] == len(kept)
    want = {'tokens_BxL': kept[:n], 'targets_BxL': kept[1:], 'segment_BxL': [1] * n, 'position_BxL': list(range(n)),
            'loss_mask_BxL': [1.0] * (len(kept) - 1)}
    for key, values in want.items():
      assert batch[key][row].tolist() == values + [0] * (length - len(values)), key


def test_truncated_records_do_not_depend_on_how_documents_arrive():
  documents = _documents(np.random.default_rng(0), 60)
  whole = _pack(documents, 16, at_once=60, packer=packing.Truncator)
  assert whole.tobytes() == _pack(documents, 16, at_once=7, packer=packing.Truncator).tobytes()


@pytest.mark.parametrize('vocab_size,name', [(65536, 'uint16'), (65537, 'uint32')])
def test_tokens_are_16_bits_exactly_while_ids_fit(vocab_size, name):
  largest = np.array([vocab_size - 1, 0, vocab_size - 1], np.int32)
  packed = _pack([largest], 2, eos_id=None, vocab_size=vocab_size)
  assert packed['tokens'].dtype.name == name
  np.testing.assert_array_equal(packing.unpack(packed)['targets_BxL'], [largest[1:]])


def test_a_batch_has_the_types_the_model_expects():
  batch = packing.unpack(_pack(_documents(np.random.default_rng(0), 9), 8))
  assert {key: array.dtype.name for key, array in batch.items()} == {
      'tokens_BxL': 'int32', 'targets_BxL': 'int32', 'segment_BxL': 'int32', 'position_BxL': 'int32',
      'loss_mask_BxL': 'float32'}
  assert all(array.flags.c_contiguous and array.flags.writeable for array in batch.values())


PACKERS = pytest.mark.parametrize('packer', [packing.Packer, packing.Truncator])


@PACKERS
def test_an_id_outside_the_vocabulary_is_refused(packer):
  with pytest.raises(ValueError, match='300 are outside the vocabulary of 300'):
    _pack([np.array([1, 2, 300], np.int32)], 1, packer=packer)


@PACKERS
def test_a_document_without_tokens_is_refused(packer):
  with pytest.raises(ValueError, match='document 1 of this call has no tokens'):
    _pack([np.array([1], np.int32), np.array([], np.int32)], 8, eos_id=None, packer=packer)
