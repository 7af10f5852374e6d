"""The files of tokenizers: tokenizer.json and sentencepiece's .model, as one sees them who encodes and decodes."""

import hashlib
import json
import struct

import numpy as np
import tokenizers

from datasel import workdir

END = '<|endoftext|>'
# A bare tokenizer.json doesn't say which of its added tokens begin and end a document; these are the names in use.
_USUAL = {'bos_token': ('<s>', '<bos>', '<|begin_of_text|>'), 'eos_token': (END, '</s>', '<eos>', '<|end_of_text|>')}


class Json:
  """A tokenizer.json, run by the `tokenizers` library."""

  file_name = 'tokenizer.json'

  def __init__(self, content: bytes):
    # Truncation and padding belong to whoever wrote the file; here every token of every document counts.
    parsed = json.loads(content) | {'truncation': None, 'padding': None}
    self.content = json.dumps(parsed, ensure_ascii=False).encode()
    self.content_digest = workdir.digest(parsed)
    self._tokenizer = tokenizers.Tokenizer.from_str(self.content.decode())
    self._tokenizer.encode_special_tokens = True
    self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    self.id = self._tokenizer.token_to_id
    self.token = self._tokenizer.id_to_token

  def encode_batch(self, texts):
    return [np.array(e.ids, np.int32) for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

  def decode(self, ids):
    return self._tokenizer.decode(ids, skip_special_tokens=False)

  def with_special(self, token):
    """One that has this special token besides, after all others, or has it already; None where that can't be."""
    if self.is_special(token):
      return self
    if self.id(token) is not None:
      return None
    parsed = json.loads(self.content)
    entry = {'id': self.vocab_size, 'content': token, 'single_word': False, 'lstrip': False, 'rstrip': False,
             'normalized': False, 'special': True}
    made = Json(json.dumps(parsed | {'added_tokens': [*parsed['added_tokens'], entry]}).encode())
    return made if made.id(token) == self.vocab_size else None

  def without_special(self, token):
    """What `with_special` added it to."""
    parsed = json.loads(self.content)
    kept = [added for added in parsed['added_tokens'] if added['content'] != token]
    return Json(json.dumps(parsed | {'added_tokens': kept}).encode())

  def is_special(self, token):
    """Whether it is a token that no text has."""
    added = self._tokenizer.get_added_tokens_decoder().values()
    return any(one.content == token and one.special for one in added)

  def guess(self, key):
    """The id of the first usual name for `key` ('bos_token') that is an added token, or None."""
    added = {token.content: i for i, token in self._tokenizer.get_added_tokens_decoder().items()}
    return next((added[name] for name in _USUAL[key] if name in added), None)


class SentencePiece:
  """A sentencepiece .model file."""

  file_name = 'tokenizer.model'

  def __init__(self, content: bytes):
    import sentencepiece  # late: only those who bring such a model need it
    self.content = content
    self.content_digest = hashlib.sha256(content).hexdigest()
    self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    self.vocab_size = self._processor.vocab_size()
    self.token = self._processor.id_to_piece

  def id(self, token):
    i = self._processor.piece_to_id(token)
    return None if i == self._processor.unk_id() else i

  def encode_batch(self, texts):
    return [np.array(ids, np.int32) for ids in self._processor.encode(list(texts))]

  def decode(self, ids):
    return self._processor.decode(ids)

  def with_special(self, token):
    """One that has this special token besides, after all others, or has it already; None where that can't be."""
    if self.id(token) is not None:
      return self if self.is_special(token) else None
    return SentencePiece(self.content + _control_piece(token))

  def without_special(self, token):
    """What `with_special` added it to."""
    return SentencePiece(self.content.removesuffix(_control_piece(token)))

  def is_special(self, token):
    """Whether it is a token that no text has."""
    i = self.id(token)
    return i is not None and self._processor.is_control(i)

  def guess(self, key):
    """The model's own bos or eos, or None."""
    i = {'bos_token': self._processor.bos_id, 'eos_token': self._processor.eos_id}[key]()
    return None if i < 0 else i


def _control_piece(token: str) -> bytes:
  """What, after the bytes of a sentencepiece model, adds a control symbol to it.

  Protocol buffers end to end are one, merged.  Field 1 of the model is its list of {1: piece, 2: score, 3: type}.
  """
  field = lambda number, content: bytes([number << 3 | 2, len(content)]) + content  # of up to 127 bytes
  return field(1, field(1, token.encode()) + b'\x15' + struct.pack('<f', 0) + b'\x18\x03')
