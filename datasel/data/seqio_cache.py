"""The text in what `seqio_cache_tasks` writes, read without TensorFlow.

  CACHE/TASK/{SPLIT.tfrecord-00000-of-00064, info.SPLIT.json, stats.SPLIT.json, COMPLETED}

A TFRecord file is a row of records: length (uint64), masked crc32c of it, data, masked crc32c of them; here each is a
tf.train.Example.  Its token ids are of no use here, for the cache does not say which tokenizer made them; but seqio's
`tokenize` puts the text beside them unless told not to.
"""

import pathlib
import re
import struct
from collections.abc import Iterable, Iterator
from typing import Any

from datasel import workdir

_SHARD = re.compile(r'(.+)\.tfrecord-(\d{5})-of-(\d{5})', re.ASCII)
_COMPLETED = 'COMPLETED'
# Where a task's text is, by preference.
_TEXT = ('text', 'targets_pretokenized')


def is_cache(folder: pathlib.Path) -> bool:
  """Whether the folder holds cached tasks."""
  return any((child / _COMPLETED).is_file() for child in folder.iterdir() if child.is_dir())


def is_shard(file: pathlib.Path) -> bool:
  """Whether the file's name is that of a shard of a cached task."""
  return _SHARD.fullmatch(file.name) is not None


def shards(task: pathlib.Path, splits: Iterable[str]) -> dict[str, list[pathlib.Path]]:
  """{split: files in order} of a cached task, for those of `splits` that it has; the first of them it must have.

  Raises ValueError for a task that was not cached to the end, lacks files, or holds no text.
  """
  if not (task / _COMPLETED).is_file():
    raise ValueError(f'{task} has no file {_COMPLETED}: it is no cached task, or seqio_cache_tasks has not finished it;'
                     ' move it elsewhere, or run that again (a task whose name has a colon: under a name without)')
  found = {}
  for split in splits:
    info_path = task / f'info.{split}.json'
    if not info_path.exists():
      if not found:
        raise ValueError(f'{task} has no {info_path.name}: the cached task has no split {split!r}; cache one that has')
      continue
    info = workdir.read_json(info_path)
    if not info:  # what seqio writes for a split of no examples
      raise ValueError(f'{info_path} is of a split without examples; remove that split from the task')
    if not any(key in info['features'] for key in _TEXT):
      raise ValueError(f'{info_path}: the task keeps no text, only {sorted(info["features"])}; cache it with a '
                       f'feature "{_TEXT[0]}" or "{_TEXT[1]}", which seqio\'s tokenize leaves with copy_pretokenized')
    count = info['num_shards']
    found[split] = [task / f'{split}.tfrecord-{i:05}-of-{count:05}' for i in range(count)]
    missing = [file.name for file in found[split] if not file.is_file()]
    if missing:
      raise ValueError(f'{task} lacks {len(missing)} of {count} files of split {split!r} ({missing[0]}, for one); copy '
                       'it again, or cache it with --output_format=tfrecord')
  return found


def n_examples(shard: pathlib.Path) -> int | None:
  """The examples in all shards of the same task and split by seqio's own count, or None if the cache has none."""
  stats = shard.parent / f'stats.{_SHARD.fullmatch(shard.name)[1]}.json'
  return workdir.read_json(stats).get('examples') if stats.exists() else None


def rows(file: pathlib.Path) -> Iterator[dict[str, Any]]:
  """The examples of one shard in order, as rows {text, id if there is one, other features of text}.

  Raises ValueError for a damaged file and for an example whose text is only one part of it.
  """
  for record in records(file):
    try:
      features = dict(_feature(entry) for _, example in _fields(record) for _, entry in _fields(example))
    except (KeyError, TypeError, AttributeError) as e:  # a number where a message should be, or the reverse
      raise ValueError('a record is no tf.train.Example') from e
    if features.get('inputs_pretokenized', '') != '':
      raise ValueError('the example has a text for inputs and one for targets; want one text, such as a language '
                       'model\'s task has')
    key = next((key for key in _TEXT if key in features), None)
    if key is None:
      raise ValueError(f'no text among the features {sorted(features)}, want "{_TEXT[0]}" or "{_TEXT[1]}"')
    yield {'text': features.pop(key)} | {name: value for name, value in features.items() if value is not None}


def records(file: pathlib.Path) -> Iterator[bytes]:
  """The records of a TFRecord file, each checked against its checksum."""
  try:
    import google_crc32c
  except ImportError as e:
    raise ImportError(f'reading TFRecord files needs google-crc32c ({e}); pip install google-crc32c') from e

  def checked(data: bytes, size: int, crc: bytes) -> bytes:
    if len(data) < size or len(crc) < 4:
      raise ValueError('the file ends in the middle of a record')
    value = google_crc32c.value(data)
    if ((value >> 15 | value << 17) + 0xa282ead8) % 2**32 != int.from_bytes(crc, 'little'):
      raise ValueError('a record is damaged: its checksum is another')
    return data

  with open(file, 'rb') as f:
    while head := f.read(8):
      (size,) = struct.unpack('<Q', checked(head, 8, f.read(4)))
      yield checked(f.read(size), size, f.read(4))


def _feature(entry: bytes) -> tuple[str, Any]:
  """(name, value) of an entry of tf.train.Features: a str, an int for an `id`, a list of str, or None for numbers."""
  parts = dict(_fields(entry))
  name = parts[1].decode()
  for kind, values in _fields(parts.get(2, b'')):
    if kind == 1:
      texts = [value.decode() for _, value in _fields(values)]
      return name, texts[0] if len(texts) == 1 else texts
    if kind == 3 and name == 'id':
      packed = next((value for _, value in _fields(values)), None)
      return name, _varint(packed, 0)[0] if isinstance(packed, bytes) else packed
  return name, None


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
  """(number, value) of each field of a protocol buffer message: bytes, or an int for a varint."""
  i = 0
  while i < len(message):
    key, i = _varint(message, i)
    if key & 7 == 0:
      value, i = _varint(message, i)
    elif key & 7 in (1, 2, 5):
      size, i = _varint(message, i) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], i)
      value, i = message[i:i + size], i + size
      if i > len(message):
        raise ValueError('a record is no tf.train.Example')
    else:
      raise ValueError('a record is no tf.train.Example')
    yield key >> 3, value


def _varint(message: bytes, i: int) -> tuple[int, int]:
  """The number that begins at `i`, and where it ends."""
  value = shift = 0
  while True:
    if i >= len(message):
      raise ValueError('a record is no tf.train.Example')
    byte = message[i]
    i += 1
    value |= (byte & 127) << shift
    shift += 7
    if byte < 128:
      return value, i
