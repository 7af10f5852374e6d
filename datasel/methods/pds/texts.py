"""Records of a token store as another tokenizer sees them: ids to text, text to ids, document by document.

A scorer may come from a checkpoint with a tokenizer of its own.  What it reads of a record is the record's own text.
"""

import dataclasses
import logging
import os
from collections.abc import Callable

import numpy as np

from datasel.batch import Batch
from datasel.data import tokenizer as tokenizers
from datasel.data.store import Store
from datasel.data.tokenizer import Tokenizer

_REPLACEMENT = '\N{REPLACEMENT CHARACTER}'


def reader(store: Store, tokenizer: Tokenizer, length: int, *, cut: bool = False, split: str = 'train',
           ) -> Callable[[np.ndarray, np.ndarray], Batch]:
  """(domain_B, record_B) -> the batch of these records in `tokenizer`'s ids: the store's own, where it is the store's
  tokenizer, whose rows are of the store's length alone, else those of a `Retokenized` that was checked."""
  if tokenizer.digest == store.tokenizer['digest']:
    if length != store.length:
      raise ValueError(f'config.pds.scorer.length is {length}, but the scorer has the tokenizer of {store.path}, whose '
                       f'sequences it reads as they are, of {store.length} tokens; set it to 0')
    return lambda domain_B, record_B: store.read(split, domain_B, record_B)
  mapped = Retokenized(store, tokenizer, length, cut=cut, split=split)
  logging.info('text in the tokens of %s, on a sample: %s', tokenizer.name, mapped.check())
  return mapped.read


class Retokenized:
  """A store's records in the ids of another tokenizer, one row each, of `length` tokens.

  Every document, or piece of one, stays a segment of its own, between the other tokenizer's bos and eos where it
  begins and ends; a piece of bos or eos alone is left out.  The text is exact, but for a character whose bytes lie in
  two records: each of them has U+FFFD for its part.

  cut: what doesn't fit in `length` is left out of a row, and counted; else ValueError.
  counts: of all reads so far, {'records', 'cut_records', 'cut_tokens', 'replaced_characters'}; the last are all
  U+FFFD, the text's own among them.
  """

  def __init__(self, store: Store, tokenizer: Tokenizer, length: int, *, cut: bool = False, split: str = 'train'):
    self._store, self._split, self._tokenizer = store, split, tokenizer
    self._own = tokenizers.load(store.path)
    # What goes before text that goes on from another record: a tokenizer may drop a space at the beginning of a text.
    self._before = self._own.encode_batch(['a'])[0].tolist()
    self._before_text = self._own.decode(self._before)
    counts = store.counts(split)
    self._first_records = [np.cumsum([0, *(shard['records'] for shard in counts[name]['shards'])])
                           for name in store.domains]
    self.length, self.cut = length, cut
    self.counts = dict.fromkeys(('records', 'cut_records', 'cut_tokens', 'replaced_characters'), 0)

  def read(self, domain_B: np.ndarray, record_B: np.ndarray) -> Batch:
    """tokens_BxL, segment_BxL, position_BxL int32 with L = `length`, and domain_B, example_B as `Store.read` has
    them."""
    batch = self._store.read(self._split, domain_B, record_B)
    pieces = self._pieces(batch)
    rows = self._encoded(pieces)
    self.counts['records'] += len(rows)
    self.counts['replaced_characters'] += sum(piece.text.count(_REPLACEMENT) for row in pieces for piece in row)
    out = {name: np.zeros((len(rows), self.length), np.int32) for name in ('tokens_BxL', 'segment_BxL', 'position_BxL')}
    for b, segments in enumerate(rows):
      lengths = [len(ids) for ids in segments]
      if sum(lengths) > self.length:
        self._too_long(self._name(batch, b), sum(lengths))
      n = min(sum(lengths), self.length)
      if n:
        out['tokens_BxL'][b, :n] = np.concatenate(segments)[:n]
        out['segment_BxL'][b, :n] = np.repeat(np.arange(1, len(segments) + 1), lengths)[:n]
        out['position_BxL'][b, :n] = np.concatenate([np.arange(x) for x in lengths])[:n]
    return out | {name: batch[name] for name in ('domain_B', 'example_B')}

  def check(self, n: int = 1024) -> dict[str, int]:
    """Maps `n` records, evenly spaced over the store, to text and back; what came of it, counted.

    {'records', 'pieces' of documents in them, 'changed': pieces whose text the other tokenizer's ids don't give back,
    'documents': pieces that are whole documents, 'changed_documents': those whose text doesn't give back the store's
    ids, 'replaced_characters', 'too_long': records of more than `length` tokens, 'longest'}.  Warns of what is lost.
    ValueError for records that are too long, unless they may be cut.
    """
    ends_M = np.cumsum(self._store.sizes(self._split))
    chosen = np.arange(min(n, ends_M[-1])) * ends_M[-1] // min(n, ends_M[-1])
    domain_N = np.searchsorted(ends_M, chosen, side='right')
    batch = self._store.read(self._split, domain_N, chosen - np.append(0, ends_M)[domain_N])
    pieces = self._pieces(batch)
    listed = [(b, piece) for b, row in enumerate(pieces) for piece in row]
    texts, whole = [piece.text for _, piece in listed], [piece for _, piece in listed if piece.begins and piece.ends]
    back = [self._tokenizer.decode(ids) for ids in self._tokenizer.encode_batch(texts)]
    changed = [n for n, (text, again) in enumerate(zip(texts, back)) if text != again]
    lengths = [sum(map(len, row)) for row in self._encoded(pieces)]
    found = {
      'records': len(chosen), 'pieces': len(listed), 'changed': len(changed), 'documents': len(whole),
      'changed_documents': sum(piece.ids != ids.tolist() for piece, ids in
                               zip(whole, self._own.encode_batch([piece.text for piece in whole]))),
      'replaced_characters': sum(text.count(_REPLACEMENT) for text in texts),
      'too_long': sum(x > self.length for x in lengths), 'longest': max(lengths)}
    if changed:
      text, again = texts[changed[0]], back[changed[0]]
      at = len(os.path.commonprefix([text, again]))
      logging.warning('%d of %d pieces of text change in the tokens of %s: in %s, %r becomes %r', len(changed),
                      len(texts), self._tokenizer.name, self._name(batch, listed[changed[0]][0]),
                      text[at:at + 20], again[at:at + 20])
    if found['changed_documents']:
      logging.warning('%d of %d whole documents in %s have other tokens than their text: its tokenizer does not give '
                      'back what it has read', found['changed_documents'], len(whole), self._store.path)
    if found['too_long'] and not self.cut:
      raise ValueError(f'{found["too_long"]} of {len(chosen)} sampled records have more than {self.length} tokens in '
                       f'{self._tokenizer.name} (the longest {max(lengths)}); {_REMEDY}')
    return found

  def _pieces(self, batch: Batch) -> list[list['_Piece']]:
    """Of each row, those that hold text."""
    begins_B, own = self._opens(batch['domain_B'], batch['example_B']), self._own
    rows = []
    for b, segment_L in enumerate(batch['segment_BxL']):
      rows.append([])
      for segment in range(1, int(segment_L.max()) + 1):
        [place] = np.nonzero(segment_L == segment)
        # No text has the ids of bos and eos.
        ids = [i for i in batch['tokens_BxL'][b, place].tolist() if i not in (own.bos_id, own.eos_id)]
        begins = segment > 1 or bool(begins_B[b])
        followed = batch['loss_mask_BxL'][b, place[-1]] > 0 and batch['targets_BxL'][b, place[-1]] != own.eos_id
        ends = not followed or batch['tokens_BxL'][b, place[-1]] == own.eos_id
        if ids:
          text = own.decode(ids if begins else self._before + ids)
          rows[-1].append(_Piece(ids, text if begins else text.removeprefix(self._before_text), begins, bool(ends)))
    return rows

  def _opens(self, domain_B: np.ndarray, record_B: np.ndarray) -> np.ndarray:
    """bool [B]: whether the text of a record begins with that of a document: the record before knows."""
    before = self._store.read(self._split, domain_B, np.maximum(record_B - 1, 0))
    after_bos_B = np.zeros(len(record_B), bool) if self._own.bos_id is None else (
      before['tokens_BxL'][:, -1] == self._own.bos_id)
    first_B = [n in self._first_records[m] for m, n in zip(domain_B, record_B)]
    return (before['loss_mask_BxL'][:, -1] == 0) | after_bos_B | first_B

  def _encoded(self, pieces: list[list['_Piece']]) -> list[list[np.ndarray]]:
    """The other tokenizer's ids of the pieces of each row."""
    ids = iter(self._tokenizer.encode_batch([piece.text for row in pieces for piece in row]))
    special = lambda there, i: [i] if there and i is not None else []
    bos_id, eos_id = self._tokenizer.bos_id, self._tokenizer.eos_id
    return [[np.concatenate([special(piece.begins, bos_id), next(ids), special(piece.ends, eos_id)]).astype(np.int32)
             for piece in row] for row in pieces]

  def _name(self, batch: Batch, b: int) -> str:
    return self._store.names(batch['domain_B'][b:b + 1], batch['example_B'][b:b + 1])[0]

  def _too_long(self, name: str, n_tokens: int) -> None:
    if not self.cut:
      raise ValueError(f'{name} has {n_tokens} tokens in {self._tokenizer.name}, more than {self.length}; {_REMEDY}')
    self.counts['cut_records'] += 1
    self.counts['cut_tokens'] += n_tokens - self.length
    if self.counts['cut_records'].bit_count() == 1:  # 1, 2, 4, ...
      logging.warning('%(cut_records)d of %(records)d records read were longer than the scorer reads and cut, by '
                      '%(cut_tokens)d tokens in all; the last was %(name)s', self.counts | {'name': name})


@dataclasses.dataclass(frozen=True)
class _Piece:
  """What of a document is in a record."""

  ids: list[int]  # the store's, without bos and eos
  text: str
  begins: bool  # the document begins here
  ends: bool


_REMEDY = ('raise pds.scorer.length, or set pds.scorer.cut to leave out what is too long (in a run that has begun, '
           'delete its folder scorer/ first)')
