"""Tokenizers, from a file, a folder, or Hugging Face, behind one small interface."""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers

from datasel import workdir
from datasel.data import anchors
from datasel.data.vocabulary_files import END, Json, SentencePiece

ANCHOR = '<AC>'
_ANCHORS = 'anchors.json'  # beside the tokenizer: how it puts anchors into text
_SPLIT = 1  # raise it when `anchors.split_sentences` or `anchors.insert` changes what is written


class Tokenizer:
  """Text to ids and back.

  name: what it was loaded as, without its folder.  digest: sha256 (hex) of all that determines the ids.
  vocab_size: largest id + 1, added tokens included.  bos_id, eos_id: None when the tokenizer has none.
  anchor_id: the token that it puts between sentences, None when it puts none; anchors: the rule by which
  `attention.anchors.flags` finds these tokens, for documents read from their beginning, bos and eos included.
  Text that spells a special token ('</s>' in a web page) is encoded as the plain characters it is: no text can end a
  document, nor close a segment.
  """

  def __init__(self, backend: Json | SentencePiece, name: str, bos_id: int | None, eos_id: int | None,
               anchoring: '_Anchoring | None' = None):
    self._backend = backend
    self._anchoring = anchoring
    self.name = name
    self.bos_id = bos_id
    self.eos_id = eos_id
    self.vocab_size = backend.vocab_size
    self.anchor_id = None if anchoring is None else backend.id(ANCHOR)
    self.anchors = None if anchoring is None else anchors.Rule(
      (self.anchor_id,), anchoring.min_length, anchoring.max_length)
    self.digest = workdir.digest({'content': backend.content_digest, 'bos_id': bos_id, 'eos_id': eos_id} | (
      {} if anchoring is None else {'anchors': dataclasses.asdict(anchoring)}))

  @property
  def plain(self) -> 'Tokenizer':
    """The tokenizer that puts no anchors into text, of which this one was made; itself where it puts none."""
    if self._anchoring is None:
      return self
    backend = self._backend.without_special(ANCHOR) if self._anchoring.added else self._backend
    return Tokenizer(backend, self.name, self.bos_id, self.eos_id)

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """int32 ids of each text; no special token is added but the anchors between sentences, where it has them."""
    if self._anchoring is None:
      return self._backend.encode_batch(texts)
    return anchors.with_anchors(texts, self._backend, self.anchor_id, self.anchors, trailing=self._anchoring.trailing,
                                bos=self.bos_id is not None, eos=self.eos_id is not None)

  def decode(self, ids: Iterable[int], *, show_anchors: bool = False) -> str:
    """The text of the ids, special tokens spelled out, but anchors only where show_anchors asks for them."""
    ids = [int(i) for i in ids]
    if self._anchoring is None or not show_anchors:
      return self._backend.decode([i for i in ids if i != self.anchor_id])
    runs = [list(run) for is_anchor, run in itertools.groupby(ids, lambda i: i == self.anchor_id)]
    lead = self._backend.encode_batch(['a'])[0].tolist()  # a tokenizer may drop a space at the beginning of a text
    text = lambda run: self._backend.decode([*lead, *run])[len(self._backend.decode(lead)):]
    return ''.join(ANCHOR * len(run) if run[0] == self.anchor_id else text(run) if n else self._backend.decode(run)
                   for n, run in enumerate(runs))

  def save(self, folder: str | os.PathLike) -> None:
    """Writes the tokenizer into `folder` so that `load(folder)` gives one of equal digest.

    One with anchors has its token in the vocabulary file itself: other readers know the id, but put none into text.
    """
    folder = pathlib.Path(folder)
    (folder / _ANCHORS).unlink(missing_ok=True)  # of another one that was here
    with workdir.replacing(folder / self._backend.file_name) as f:
      f.write(self._backend.content)
    # null, not absence: `load` must not guess where this tokenizer has none.
    special = {name: None if i is None else self._backend.token(i)
               for name, i in (('bos_token', self.bos_id), ('eos_token', self.eos_id))}
    workdir.write_json(folder / 'tokenizer_config.json', special)
    if self._anchoring is not None:
      workdir.write_json(folder / _ANCHORS, dataclasses.asdict(self._anchoring))


@dataclasses.dataclass(frozen=True)
class _Anchoring:
  """How anchors are put into text; with the vocabulary it determines the ids."""
  min_length: int
  max_length: int | None
  trailing: bool
  added: bool  # the token is the last of the ids, and was none of the tokenizer that this one was made of
  token: str = ANCHOR
  split: int = _SPLIT


def with_anchor(tokenizer: Tokenizer, *, min_length: int = 1, max_length: int | None = None,
                trailing: bool = False) -> Tokenizer:
  """The tokenizer, with an anchor token between the sentences of every text that it encodes (the paper's AC).

  The token is ANCHOR, a new id after all others, or the tokenizer's own special token of that spelling.
  min_length, max_length: tokens of a segment, its anchor and the tokenizer's bos and eos included, as `anchors.Rule`
  has them.  trailing: an anchor also after the last sentence, as the paper says; its code does not.
  ValueError for lengths that make no sense, and for a tokenizer that can't take the token, or has anchors.
  """
  if max_length == 1:
    raise ValueError('max_length 1 leaves no room for text beside an anchor of its own; want at least 2, or None')
  anchors.Rule((), min_length, max_length)
  if tokenizer.anchor_id is not None:
    raise ValueError(f'tokenizer {tokenizer.name} has anchors already; start from the one that it was made of')
  backend = tokenizer._backend.with_special(ANCHOR)
  if backend is None:
    raise ValueError(f'tokenizer {tokenizer.name} cannot take {ANCHOR} as a token: its ids have gaps, or it has one of '
                     'that spelling for text')
  anchoring = _Anchoring(min_length, max_length, trailing, added=backend is not tokenizer._backend)
  return Tokenizer(backend, tokenizer.name, tokenizer.bos_id, tokenizer.eos_id, anchoring)


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
               'generation_config.json', _ANCHORS, 'tokenizer_config.json'):
    if (pathlib.Path(source) / name).is_file():
      with workdir.replacing(pathlib.Path(folder) / name) as f:
        f.write((pathlib.Path(source) / name).read_bytes())


def _from_file(path: pathlib.Path, name: str) -> Tokenizer:
  kind = SentencePiece if path.suffix == '.model' else Json
  try:
    backend = kind(path.read_bytes())
  except ImportError as e:
    raise ValueError(f'tokenizer {path} needs the package sentencepiece ({e}); pip install sentencepiece') from e
  except Exception as e:  # the tokenizers library raises nothing narrower
    raise ValueError(f'tokenizer {path} is not a valid {kind.file_name} ({e}); get the file again') from e
  stated = _stated(path.parent)
  bos_id, eos_id = (_special_id(backend, stated, key, path) for key in ('bos_token', 'eos_token'))
  return Tokenizer(backend, name, bos_id, eos_id, _anchoring(path, backend))


def _anchoring(path: pathlib.Path, backend: Json | SentencePiece) -> _Anchoring | None:
  """What the file beside a tokenizer says of its anchors; None when there is none."""
  file = path.parent / _ANCHORS
  if not file.is_file():
    return None
  stated = workdir.read_json(file)
  remedy = 'make the folder again: python -m datasel.prepare anchor-tokenizer'
  wanted = dataclasses.asdict(_Anchoring(1, None, trailing=False, added=True))
  if not isinstance(stated, dict) or stated.keys() != wanted.keys() or not (
      isinstance(stated['trailing'], bool) and isinstance(stated['added'], bool)):
    raise ValueError(f'{file} is damaged: it says {stated}, want such as {wanted}; {remedy}')
  if (stated['token'], stated['split']) != (ANCHOR, _SPLIT):
    raise ValueError(f'{file} is of another version: token {stated["token"]!r} and split {stated["split"]}, want '
                     f'{ANCHOR!r} and {_SPLIT}; {remedy}')
  if not backend.is_special(ANCHOR) or (stated['added'] and backend.id(ANCHOR) != backend.vocab_size - 1):
    raise ValueError(f'{file} does not fit {path.name} beside it, where {ANCHOR} is token {backend.id(ANCHOR)} of '
                     f'{backend.vocab_size}: want it to be a special one, the last if it was added; {remedy}')
  try:
    anchors.Rule((), stated['min_length'], stated['max_length'])
  except ValueError as e:
    raise ValueError(f'{file} is damaged ({e}); {remedy}') from e
  return _Anchoring(**stated)


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
  return Tokenizer(Json(hub.backend_tokenizer.to_str().encode()), name, hub.bos_token_id, hub.eos_token_id)
