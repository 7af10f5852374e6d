"""Named tensors in the files of published checkpoints: safetensors, written with digests and read in place."""

import hashlib
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Protocol

import ml_dtypes
import numpy as np

INDEX = 'model.safetensors.index.json'
SINGLE = 'model.safetensors'
_DTYPES = {'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16, 'F64': np.float64}
_DIGEST = 'sha256 '  # our exports keep each tensor's digest under this prefix in a file's metadata
_AGAIN = 'get the file again, or export it again'


class Tensors(Protocol):
  """Tensors by the names that Hugging Face gives them."""

  def shapes(self) -> Mapping[str, tuple[int, ...]]:
    """Every name there is, with the shape of its tensor."""

  def array(self, name: str) -> np.ndarray:
    """The tensor, of some float dtype; where it can be, a view of the file."""

  def verify(self) -> None:
    """Raises ValueError naming a tensor whose bytes are not those that were written."""


class Safetensors:
  """The safetensors of a folder, in one file or several.  ValueError names the file and tensor that is damaged."""

  def __init__(self, folder: str | os.PathLike):
    folder = pathlib.Path(folder)
    index = folder / INDEX
    self._files: dict[str, pathlib.Path] = {}
    self._entries: dict[str, tuple[str, tuple[int, ...], int]] = {}  # dtype, shape, where the bytes begin
    self._digests: dict[str, str] = {}
    if index.is_file():
      listed = _parse(index.read_bytes(), index).get('weight_map')
      if not isinstance(listed, dict):
        raise ValueError(f'{index} is damaged (it has no weight_map); {_AGAIN}')
      strange = [name for name in map(str, listed.values()) if not re.fullmatch(r'[\w.-]+\.safetensors', name)]
      if strange:
        raise ValueError(f'{index} names the file {strange[0]!r}, which is not a safetensors file beside it')
      files = sorted(set(listed.values()))
    elif (folder / SINGLE).is_file():
      files, listed = [SINGLE], None
    else:
      raise ValueError(f'{folder} has neither {SINGLE} nor {INDEX}; pickled weights (pytorch_model.bin) are never '
                       'downloaded or read here: convert them to safetensors first, or take the --revision refs/pr/N '
                       "where the hub's converter did")
    for name in files:
      self._read_header(folder / name)
    if listed is not None:
      wrong = [name for name, file in listed.items() if getattr(self._files.get(name), 'name', None) != file]
      if wrong:
        raise ValueError(f'tensor {wrong[0]} is not in {folder / listed[wrong[0]]}, where {INDEX} has it; {_AGAIN}')

  def _read_header(self, path: pathlib.Path) -> None:
    if not path.is_file():
      raise ValueError(f'{path} is missing; {_AGAIN}')
    size = path.stat().st_size
    with open(path, 'rb') as f:
      length = int.from_bytes(f.read(8), 'little')
      if not 2 <= length <= min(size - 8, 100_000_000):
        raise ValueError(f'{path} is not a safetensors file (its header would have {length} bytes); {_AGAIN}')
      header = _parse(f.read(length), path)
    for key, value in (header.pop('__metadata__', None) or {}).items():
      if key.startswith(_DIGEST):
        self._digests[key.removeprefix(_DIGEST)] = value
    for name, entry in header.items():
      if name in self._files:
        raise ValueError(f'tensor {name} is both in {self._files[name]} and in {path}; {_AGAIN}')
      try:
        kind, shape, (begin, end) = str(entry['dtype']), tuple(entry['shape']), entry['data_offsets']
        sound = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
      except (KeyError, TypeError, ValueError):
        sound = False
      if not sound:
        raise ValueError(f'{path} is damaged (its header says of tensor {name}: {str(entry)[:100]}); {_AGAIN}')
      wanted = math.prod(shape) * np.dtype(_DTYPES[kind]).itemsize if kind in _DTYPES else end - begin
      if end - begin != wanted or 8 + length + end > size:
        raise ValueError(f'{path}: tensor {name}, {kind} {list(shape)}, should fill bytes {begin} to {end}, '
                         f'but the file has {size - 8 - length}; {_AGAIN}')
      self._files[name], self._entries[name] = path, (kind, shape, 8 + length + begin)

  def shapes(self) -> Mapping[str, tuple[int, ...]]:
    return {name: shape for name, (_, shape, _) in self._entries.items()}

  def array(self, name: str) -> np.ndarray:
    kind, shape, begin = self._entries[name]
    if kind not in _DTYPES:  # not said before: buffers that nobody reads are of other kinds
      raise ValueError(f'{self._files[name]}: tensor {name} is {kind}; want one of {sorted(_DTYPES)}')
    dtype = np.dtype(_DTYPES[kind])
    return np.memmap(self._files[name], dtype, 'r', begin, shape) if math.prod(shape) else np.zeros(shape, dtype)

  def verify(self) -> None:
    for name, wanted in self._digests.items():
      if name in self._entries and digest(self.array(name)) != wanted:
        raise ValueError(f'{self._files[name]}: tensor {name} was damaged after it was written; {_AGAIN}')


def digest(array: np.ndarray) -> str:
  """sha256 (hex) of the bytes of a tensor."""
  return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).reshape(-1)).hexdigest()


def write(folder: pathlib.Path, tensors: Mapping[str, Any], max_shard_bytes: int) -> None:
  """Writes {name: (bytes, function that gives the array)} as safetensors of at most `max_shard_bytes` each, one after
  another, so that one file's tensors are in memory at a time; and the index, where there are several."""
  import safetensors.numpy
  shards: list[list[str]] = [[]]
  room = max_shard_bytes
  for name, (size, _) in tensors.items():
    if size > room and shards[-1]:
      shards.append([])
      room = max_shard_bytes
    shards[-1].append(name)
    room -= size
  place = {}
  for n, names in enumerate(shards, 1):
    file = SINGLE if len(shards) == 1 else f'model-{n:05}-of-{len(shards):05}.safetensors'
    arrays = {name: np.ascontiguousarray(tensors[name][1]()) for name in names}
    digests = {_DIGEST + name: digest(array) for name, array in arrays.items()}
    try:
      safetensors.numpy.save_file(arrays, folder / file, metadata={'format': 'pt'} | digests)
    except safetensors.SafetensorError as e:  # a full disk, in words of its own
      raise OSError(f'{folder / file} could not be written: {e}') from e
    (folder / file).chmod(0o644)  # the library lets nobody else read it
    place |= dict.fromkeys(names, file)
  if len(shards) > 1:
    total = sum(size for size, _ in tensors.values())
    text = json.dumps({'metadata': {'total_size': total}, 'weight_map': place}, indent=2, sort_keys=True)
    (folder / INDEX).write_text(text + '\n', encoding='utf-8')


def _parse(content: bytes, path: pathlib.Path) -> dict:
  try:
    parsed = json.loads(content)
  except (ValueError, RecursionError) as e:
    raise ValueError(f'{path} is damaged (its header is not JSON: {e}); {_AGAIN}') from e
  if not isinstance(parsed, dict):
    raise ValueError(f'{path} is damaged (its header is no JSON object); {_AGAIN}')
  return parsed
