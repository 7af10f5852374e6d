"""The bytes that each token of a vocabulary writes, and text to tokens by these bytes alone."""

import pathlib
import tempfile
from collections.abc import Sequence

import numpy as np

from datasel import workdir
from datasel.data.tokenizer import Tokenizer

_SPACE = '\u2581'  # what sentencepiece writes for a space
_PROBE = '[007]  a "b"\n\\remove_lines(start=0, end=19) drop_doc() keep_chunk()'


def token_bytes(tokenizer: Tokenizer) -> list[bytes | None]:
  """What each id writes, UTF-8 or a part of it; None for special and unused ones, which write nothing here.

  ValueError for a tokenizer that is neither a byte-level one nor one of sentencepiece's kind.
  """
  with tempfile.TemporaryDirectory() as folder:
    tokenizer.save(folder)
    stored = pathlib.Path(folder) / 'tokenizer.json'
    found = _of_json(workdir.read_json(stored)) if stored.exists() else _of_sentencepiece(folder)
  return [found.get(i) or None for i in range(tokenizer.vocab_size)]


class Vocabulary:
  """A tokenizer whose tokens' bytes are known and spell the text: no space is put before it, nothing is normalised.

  bytes_V: as `token_bytes` gives them.  ValueError for a tokenizer that does not give a program back as it is.
  """

  def __init__(self, tokenizer: Tokenizer):
    self.tokenizer, self.bytes_V = tokenizer, token_bytes(tokenizer)
    # Sentencepiece puts a space before a text, unless that begins after a line break that is then taken off.
    self._lead = '' if self._written(tokenizer.encode_batch(['a'])[0]) == b'a' else '\n'
    self._lead_ids = tokenizer.encode_batch([self._lead])[0]
    if self._written(self.encode([_PROBE])[0]) != _PROBE.encode():
      raise ValueError(f'the tokenizer {tokenizer.name} does not give {_PROBE!r} back as it is; want one without '
                       'normalisation, that knows every byte')

  def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
    """int32 ids of each text as it stands after a line break."""
    if not self._lead:
      return self.tokenizer.encode_batch(texts)
    n, found = len(self._lead_ids), self.tokenizer.encode_batch([self._lead + text for text in texts])
    # Where the text's own line breaks melt with ours, it is read with the tokenizer's space before it.
    melted = [i for i, ids in enumerate(found) if not np.array_equal(ids[:n], self._lead_ids)]
    again = dict(zip(melted, self.tokenizer.encode_batch([texts[i] for i in melted])))
    return [again.get(i, ids[n:]) for i, ids in enumerate(found)]

  def spelled(self, texts: Sequence[str]) -> list[np.ndarray | None]:
    """As `encode`; None for a text that the ids do not spell to the byte."""
    return [ids if self._written(ids) == text.encode() else None for text, ids in zip(texts, self.encode(texts))]

  def text(self, ids: Sequence[int]) -> str:
    """What the ids spell; bytes that are no UTF-8 as U+FFFD."""
    return self._written(ids).decode('utf-8', 'replace')

  def _written(self, ids: Sequence[int]) -> bytes:
    return b''.join(self.bytes_V[int(i)] or b'' for i in ids)


def _of_json(stored: dict) -> dict[int, bytes]:
  decoder = stored.get('decoder') or {}
  steps = [one['type'] for one in decoder.get('decoders', [decoder]) if one]
  vocabulary = stored['model'].get('vocab', {})
  pieces = dict(vocabulary) if isinstance(vocabulary, dict) else {piece: i for i, (piece, _) in enumerate(vocabulary)}
  added = {one['id']: b'' if one['special'] else one['content'].encode() for one in stored.get('added_tokens', [])}
  if 'ByteLevel' in steps:
    byte_of = _byte_of_character()
    write = lambda piece: bytes(byte_of[c] for c in piece) if all(c in byte_of for c in piece) else b''
  elif {'ByteFallback', 'Metaspace', 'Replace'} & set(steps):
    write = _sentencepiece_bytes
  else:
    raise ValueError(f'a tokenizer with the decoder {steps}; want a byte-level one, or one of sentencepiece\'s kind')
  return {i: write(piece) for piece, i in pieces.items()} | added  # an added token stands for its text as it is


def _of_sentencepiece(folder: str) -> dict[int, bytes]:
  import sentencepiece  # late: only those who bring such a model need it
  model = sentencepiece.SentencePieceProcessor(model_file=f'{folder}/tokenizer.model')
  silent = lambda i: model.is_control(i) or model.is_unknown(i) or model.is_unused(i)
  return {i: _sentencepiece_bytes(model.id_to_piece(i)) for i in range(model.vocab_size()) if not silent(i)}


def _sentencepiece_bytes(piece: str) -> bytes:
  if len(piece) == 6 and piece.startswith('<0x') and piece.endswith('>'):
    return bytes([int(piece[3:5], 16)])
  return piece.replace(_SPACE, ' ').encode()


def _byte_of_character() -> dict[str, int]:
  """GPT-2's alphabet: printable bytes of Latin-1 are themselves, the others the characters from 256 on, in order."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [b for b in range(256) if b not in printable]
  return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
