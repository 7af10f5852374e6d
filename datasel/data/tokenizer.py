"""Tokenizers, from a file, a folder, or Hugging Face, behind one small interface."""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers

from datasel import workdir

END = '<|endoftext|>'
# A bare tokenizer.json doesn't say which of its added tokens begin and end a document; these are the names in use.
_USUAL = {'bos_token': ('<s>', '<bos>', '<|begin_of_text|>'), 'eos_token': (END, '</s>', '<eos>', '<|end_of_text|>')}


class Tokenizer:
  """Text to ids and back.

  name: what it was loaded as, without its folder.  digest: sha256 (hex) of all that determines the ids.
  vocab_size: largest id + 1, added tokens included.  bos_id, eos_id: None when the tokenizer has none.
  Text that spells a special token ('</s>' in a web page) is encoded as the plain characters it is: no text can end a
  document.
  """

  def __init__(self, backend: '_Json | _SentencePiece', name: str, bos_id: int | None, eos_id: int | None):
    self._backend = backend
    self.name = name
    self.bos_id = bos_id
    self.eos_id = eos_id
    self.vocab_size = backend.vocab_size
    self.digest = workdir.digest({'content': backend.content_digest, 'bos_id': bos_id, 'eos_id': eos_id})

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """int32 ids of each text; no special token is added."""
    return self._backend.encode_batch(texts)

  def decode(self, ids: Iterable[int]) -> str:
    """The text of the ids, special tokens spelled out."""
    return self._backend.decode([int(i) for i in ids])

  def save(self, folder: str | os.PathLike) -> None:
    """Writes the tokenizer into `folder` so that `load(folder)` gives one of equal digest."""
    folder = pathlib.Path(folder)
    with workdir.replacing(folder / self._backend.file_name) as f:
      f.write(self._backend.content)
    # null, not absence: `load` must not guess where this tokenizer has none.
    special = {name: None if i is None else self._backend.token(i)
               for name, i in (('bos_token', self.bos_id), ('eos_token', self.eos_id))}
    workdir.write_json(folder / 'tokenizer_config.json', special)


def load(name_or_path: str | os.PathLike) -> Tokenizer:
  """A tokenizer.json file, a sentencepiece .model file, a folder holding either, or else a Hugging Face name.

  bos and eos are those of a tokenizer_config.json or special_tokens_map.json beside the file, else (for tokenizer.json)
  the added token with one of the usual names.  Code of a Hugging Face repository is never run.
  Raises ValueError when it can't be read or had.
  """
  path = pathlib.Path(name_or_path)
  if path.is_dir():
    inside = [path / name for name in ('tokenizer.json', 'tokenizer.model') if (path / name).is_file()]
    return _from_file(inside[0], path.name) if inside else _from_hub(str(path), path.name)
  if path.is_file():
    return _from_file(path, path.name)
  if path.suffix in ('.json', '.model') or path.is_absolute() or str(name_or_path).startswith('.'):
    raise ValueError(f'tokenizer {path}: no such file or folder')
  return _from_hub(str(name_or_path), str(name_or_path))


def train_bpe(texts: Iterable[str], vocab_size: int, path: str | os.PathLike) -> Tokenizer:
  """Trains a byte-level BPE on `texts`, writes it to `path` (tokenizer.json) atomically and loads it.

  Any text survives encode and decode unchanged.  eos is '<|endoftext|>' (id 0), there is no bos.  Equal texts in equal
  order give equal bytes.  The vocabulary is smaller than `vocab_size` when the texts hold too few different words.
  """
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  if vocab_size < len(alphabet) + 1:
    raise ValueError(f'vocab_size is {vocab_size}, want at least {len(alphabet) + 1}: every byte and {END}')
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  model.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
      vocab_size=vocab_size, special_tokens=[END], initial_alphabet=sorted(alphabet), show_progress=False))
  with workdir.replacing(path) as f:
    f.write(model.to_str(pretty=True).encode())
  return load(path)


def copy(source: str | os.PathLike, folder: str | os.PathLike) -> None:
  """Copies the files of a tokenizer as they are, with what transformers alone reads of them."""
  for name in ('tokenizer.json', 'tokenizer.model', 'special_tokens_map.json', 'chat_template.jinja',
               'generation_config.json', 'tokenizer_config.json'):
    if (pathlib.Path(source) / name).is_file():
      with workdir.replacing(pathlib.Path(folder) / name) as f:
        f.write((pathlib.Path(source) / name).read_bytes())


class _Json:
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

  def guess(self, key):
    """The id of the first usual name for `key` ('bos_token') that is an added token, or None."""
    added = {token.content: i for i, token in self._tokenizer.get_added_tokens_decoder().items()}
    return next((added[name] for name in _USUAL[key] if name in added), None)


class _SentencePiece:
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

  def guess(self, key):
    """The model's own bos or eos, or None."""
    i = {'bos_token': self._processor.bos_id, 'eos_token': self._processor.eos_id}[key]()
    return None if i < 0 else i


def _from_file(path: pathlib.Path, name: str) -> Tokenizer:
  kind = _SentencePiece if path.suffix == '.model' else _Json
  try:
    backend = kind(path.read_bytes())
  except ImportError as e:
    raise ValueError(f'tokenizer {path} needs the package sentencepiece ({e}); pip install sentencepiece') from e
  except Exception as e:  # the tokenizers library raises nothing narrower
    raise ValueError(f'tokenizer {path} is not a valid {kind.file_name} ({e}); get the file again') from e
  stated = _stated(path.parent)
  bos_id, eos_id = (_special_id(backend, stated, key, path) for key in ('bos_token', 'eos_token'))
  return Tokenizer(backend, name, bos_id, eos_id)


def _stated(folder: pathlib.Path) -> dict[str, str | None]:
  """What the files beside a tokenizer say of its special tokens, by key ('bos_token'); {} when there are none."""
  stated = {}
  for name in ('special_tokens_map.json', 'tokenizer_config.json'):
    if (folder / name).is_file():
      stated |= workdir.read_json(folder / name)
  return {key: value['content'] if isinstance(value, dict) else value for key, value in stated.items()
          if key in ('bos_token', 'eos_token')}


def _special_id(backend, stated, key, path) -> int | None:
  if key not in stated:
    return backend.guess(key)
  if stated[key] is None:
    return None
  i = backend.id(stated[key])
  if i is None:
    raise ValueError(f'{key} {stated[key]!r} stated in {path.parent} is not in the vocabulary of {path.name}; correct '
                     'it in tokenizer_config.json')
  return i


def _from_hub(name_or_folder: str, name: str) -> Tokenizer:
  try:
    import transformers
  except ImportError as e:
    raise ValueError(f'tokenizer {name!r} is no file; Hugging Face names need the package transformers ({e})') from e
  try:
    hub = transformers.AutoTokenizer.from_pretrained(name_or_folder, use_fast=True, trust_remote_code=False)
  except (OSError, ValueError, KeyError, ImportError) as e:
    raise ValueError(f'tokenizer {name!r} is neither a file here nor could Hugging Face give it: {e}') from e
  if not hub.is_fast:
    raise ValueError(f'tokenizer {name!r} has no tokenizer.json form; give its sentencepiece .model file instead')
  return Tokenizer(_Json(hub.backend_tokenizer.to_str().encode()), name, hub.bos_token_id, hub.eos_token_id)
