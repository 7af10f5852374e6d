"""Documents to fixed-length records, and records to the model's batch.  Pure numpy.

A document is [bos?] + tokens + [eos?].

  concatenate   the documents of one source are laid end to end; record k holds stream[k*L : k*L + L + 1].  Neighbouring
                records share one token, so every token but the first of its document is a target exactly once.  The
                last record is padded.
  truncate      a document is a record: its first L + 1 tokens, padded.  What is behind them is cut off, and counted.
"""

from collections.abc import Sequence

import numpy as np

# As a store's manifest has them.
NAMES = {'concatenate': 'concatenate-overlap-1', 'truncate': 'truncate-right-1'}


def record_dtype(length: int, vocab_size: int) -> np.dtype:
  """One record: tokens (L+1,) uint16, or uint32 when an id needs it; starts: a bit for each token, set where it begins
  a document (little bit order); valid: how many tokens are real."""
  token = '<u2' if vocab_size <= 1 << 16 else '<u4'
  bits = (length + 8) // 8
  # Whole words by zero bits of our own: numpy's alignment would leave bytes between the fields that no one sets.
  fill = -((length + 1) * np.dtype(token).itemsize + bits) % 4
  return np.dtype([('tokens', token, (length + 1,)), ('starts', 'u1', (bits + fill,)), ('valid', '<u4')])


class Packer:
  """Turns documents into records as they come, concatenated; holds less than one record of tokens between calls.

  length: L, the input tokens of a record.  bos_id, eos_id: put before and after each document, None for nothing.
  """

  def __init__(self, *, length: int, vocab_size: int, bos_id: int | None, eos_id: int | None):
    self.length = length
    self.vocab_size = vocab_size
    self.dtype = record_dtype(length, vocab_size)
    self._before = [] if bos_id is None else [np.array([bos_id], np.int32)]
    self._after = [] if eos_id is None else [np.array([eos_id], np.int32)]
    self.extra = len(self._before) + len(self._after)
    self._tokens = np.zeros(0, np.int32)
    self._starts = np.zeros(0, bool)
    self._full = 0

  def add(self, documents: Sequence[np.ndarray]) -> np.ndarray:
    """Records completed by these documents, each a 1-D int array; empty ones only where bos or eos is added."""
    if not documents:
      return np.zeros(0, self.dtype)
    tokens, lengths = self._laid_out(documents)
    starts = np.zeros(len(tokens), bool)
    starts[np.cumsum(lengths) - lengths] = True
    self._tokens = np.concatenate([self._tokens, tokens])
    self._starts = np.concatenate([self._starts, starts])
    return self._take((len(self._tokens) - 1) // self.length)

  def finish(self) -> np.ndarray:
    """The last record, padded with zeros, or none when every token is already in a record."""
    valid = len(self._tokens)
    if valid == 0 or (valid == 1 and self._full):  # that one token is the last of the record before
      return np.zeros(0, self.dtype)
    padding = self.length + 1 - valid
    self._tokens = np.pad(self._tokens, (0, padding))
    self._starts = np.pad(self._starts, (0, padding))
    records = self._take(1)
    records['valid'] = valid
    return records

  def _laid_out(self, documents: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(the documents end to end, the length of each), with bos and eos."""
    lengths = np.array([len(document) for document in documents]) + self.extra
    if lengths.min() < 1:
      raise ValueError(f'document {int(lengths.argmin())} of this call has no tokens; leave it out and count it')
    tokens = np.concatenate([part for document in documents for part in (*self._before, document, *self._after)])
    if tokens.min() < 0 or tokens.max() >= self.vocab_size:
      raise ValueError(f'token ids {tokens.min()}..{tokens.max()} are outside the vocabulary of {self.vocab_size}')
    return tokens, lengths

  def _take(self, n: int) -> np.ndarray:
    records = np.zeros(n, self.dtype)
    if n:
      window = (np.arange(n) * self.length)[:, None] + np.arange(self.length + 1)
      records['tokens'] = self._tokens[window]
      bits = np.packbits(self._starts[window], axis=1, bitorder='little')
      records['starts'][:, :bits.shape[1]] = bits
      records['valid'] = self.length + 1
      self._tokens = self._tokens[n * self.length:]
      self._starts = self._starts[n * self.length:]
      self._full += n
    return records


class Truncator(Packer):
  """Turns each document into one record, and cuts off what goes beyond it."""

  def add(self, documents: Sequence[np.ndarray]) -> np.ndarray:
    """A record of each document, a 1-D int array; empty ones only where bos or eos is added."""
    records = np.zeros(len(documents), self.dtype)
    if documents:
      tokens, lengths = self._laid_out(documents)
      place = np.arange(self.length + 1)
      records['valid'] = np.minimum(lengths, self.length + 1)
      here = place < records['valid'][:, None]
      records['tokens'][here] = tokens[((np.cumsum(lengths) - lengths)[:, None] + place)[here]]
      records['starts'][:, 0] = 1
    return records


PACKERS = {NAMES['concatenate']: Packer, NAMES['truncate']: Truncator}


def unpack(records_B: np.ndarray) -> dict[str, np.ndarray]:
  """The model's batch of B records of `record_dtype`.

  tokens_BxL, targets_BxL: int32, the record without its last and without its first token; 0 in padding.
  segment_BxL: int32, 1, 2, ... for the pieces of documents in the row in order, 0 for padding.
  position_BxL: int32, counts from 0 in each piece.
  loss_mask_BxL: float32, 1 where the target is a real token of the same document as the input, else 0.
  """
  B, L = len(records_B), records_B['tokens'].shape[1] - 1
  stream_BxT = records_B['tokens'].astype(np.int32)
  starts_BxT = np.unpackbits(records_B['starts'], axis=1, count=L + 1, bitorder='little').view(bool)
  starts_BxT[:, 0] = True  # the first piece of a row is segment 1 even when its document began earlier
  # Documents are few beside tokens: find where they begin, then write whole runs.
  row_P, column_P = np.divmod(np.flatnonzero(starts_BxT), L + 1)
  loss_mask_BxL = np.ones((B, L), np.float32)
  crossing = column_P > 0
  loss_mask_BxL[row_P[crossing], column_P[crossing] - 1] = 0
  begin_P = row_P * L + column_P
  run_P = np.diff(begin_P, append=B * L)  # 0 for a document that begins at the last token: it is a target only
  piece_P = np.arange(1, len(row_P) + 1)
  piece_P -= np.maximum.accumulate(np.where(column_P == 0, piece_P - 1, 0))
  segment_BxL = np.repeat(piece_P.astype(np.int32), run_P).reshape(B, L)
  position_BxL = (np.arange(B * L, dtype=np.int32) - np.repeat(begin_P.astype(np.int32), run_P)).reshape(B, L)
  for row in np.flatnonzero(records_B['valid'] <= L):
    valid = int(records_B['valid'][row])
    segment_BxL[row, valid:] = 0
    position_BxL[row, valid:] = 0
    loss_mask_BxL[row, max(valid - 1, 0):] = 0
  return {
      'tokens_BxL': np.ascontiguousarray(stream_BxT[:, :-1]),
      'targets_BxL': np.ascontiguousarray(stream_BxT[:, 1:]),
      'segment_BxL': segment_BxL,
      'position_BxL': position_BxL,
      'loss_mask_BxL': loss_mask_BxL,
  }
