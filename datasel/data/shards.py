"""One source of text to one or two shards of packed records: the unit of work of `prepare`, and a pure function.

Local worker processes and Beam run the same `pack_file`, so they write the same bytes.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
from array_record.python import array_record_module

from datasel import workdir
from datasel.data import corpus, packing, tokenizer

FORMAT = 1
_FLUSH_BYTES = 1 << 20  # of text at once to the tokenizer: enough to use its threads, little beside a process
_HOLDOUT_SALT = b'datasel.holdout'


@dataclasses.dataclass(frozen=True)
class Settings:
  """What beside the source's bytes determines a shard.  holdout: the fraction of documents kept for validation.

  packing: one of `packing.PACKERS`."""
  tokenizer_digest: str
  length: int
  holdout: float
  format: int = FORMAT
  packing: str = packing.NAMES['concatenate']

  def __post_init__(self):
    if self.length < 1:
      raise ValueError(f'length is {self.length}, want at least 1 token per record')
    if not 0 <= self.holdout < 1:
      raise ValueError(f'holdout is {self.holdout}, want a fraction of the documents in [0, 1)')
    if self.packing not in packing.PACKERS:
      raise ValueError(f'packing is {self.packing!r}, want one of {sorted(packing.PACKERS)}')


def holdout_rank(identity: str) -> float:
  """A number in [0, 1], uniform over ids: a document is for validation where it is below `holdout`.  It depends on the
  id alone, so it is the same in any file, order and domain."""
  return int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8, salt=_HOLDOUT_SALT).digest(), 'big') / 2**64


def pack_file(
    source: corpus.Source,
    folder: str | os.PathLike,
    tokenizer_path: str | os.PathLike,
    settings: Settings,
    progress: Callable[[int, int], None] = lambda documents, tokens: None,
) -> dict:
  """Tokenises and packs one source into `folder`; returns what was done, as JSON.

  A result already there for the same source bytes and settings is returned as it is.  Shards and result appear under
  their names only when whole.  progress: called with the documents and tokens added since the last call.
  Returns {source: {name, sha256, documents}, settings, splits: {split: {documents, tokens, targets, bytes, sequences,
  dropped: {reason: n}, shard: {file, sha256, records, bytes} or None}}}; tokens count bos and eos, bytes are of the
  text in UTF-8.  Packed by truncation, a split has `cut` besides, {documents, tokens, bytes}: what was cut off, and of
  how many documents; the other figures are of what was kept.
  Raises ValueError for bad text (naming file and line), OSError when the disk is full.
  """
  folder = pathlib.Path(folder)
  if done := finished(source, folder, settings):
    return done
  digest = source.digest()
  encoder = _tokenizer(str(tokenizer_path), settings.tokenizer_digest)
  names = (source.split, 'validation') if settings.holdout else (source.split,)
  report = result_path(folder, source)
  paths = {split: folder / f'{report.stem}-{split}.array_record' for split in names}
  with contextlib.ExitStack() as stack:
    splits = {split: _Split(encoder, settings, stack.enter_context(writing(path)), progress)
              for split, path in paths.items()}
    read = 0
    for document in corpus.documents(source):
      read += 1
      held = holdout_rank(document.id) < settings.holdout
      splits['validation' if held else source.split].add(document.text)
    for split in splits.values():
      split.finish()
  accounted = sum(split.counts['documents'] + sum(split.counts['dropped'].values()) for split in splits.values())
  if accounted != read:
    raise RuntimeError(f'{source.name}: {read} documents read but {accounted} written or dropped; a bug of datasel')
  result = {
      'source': {'name': source.name, 'sha256': digest, 'documents': read},
      'settings': dataclasses.asdict(settings),
      'splits': {split: splits[split].counts | {'shard': _describe(path, splits[split].counts['sequences'])}
                 for split, path in paths.items()},
  }
  workdir.write_json(report, result)
  return result


def result_path(folder: pathlib.Path, source: corpus.Source) -> pathlib.Path:
  """Where `pack_file` leaves the result for a source in `folder`; its shards' names begin with the same stem."""
  return folder / f'{workdir.digest(source.name)[:16]}.json'


def read_result(folder: pathlib.Path, source: corpus.Source, settings: Settings) -> dict | None:
  """What `pack_file` left for this source with these settings in `folder`, or None; reads neither text nor shards."""
  path = result_path(folder, source)
  result = workdir.read_json(path) if path.exists() else None
  if result and (result['source']['name'], result['settings']) == (source.name, dataclasses.asdict(settings)):
    return result
  return None


def finished(source: corpus.Source, folder: pathlib.Path, settings: Settings) -> dict | None:
  """The result in `folder` if it is for this source's bytes and these settings and its shards are whole."""
  result = read_result(folder, source, settings)
  if result is None or result['source']['sha256'] != source.digest():
    return None
  written = [split['shard'] for split in result['splits'].values() if split['shard']]
  whole = all((folder / shard['file']).is_file() and workdir.digest_file(folder / shard['file']) == shard['sha256']
              for shard in written)
  return result if whole else None


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[Callable[[np.ndarray], None]]:
  """Yields a function that appends records to a shard; the shard appears at `path` when the block ends well."""
  with workdir.replacing(path) as f:
    try:
      # Records of their own, as they are: the fastest to read at random, and tokens hardly compress.
      writer = array_record_module.ArrayRecordWriter(f.name, 'group_size:1,uncompressed')

      def write(records: np.ndarray) -> None:
        for record in records:
          writer.write(record.tobytes())

      yield write
      writer.close()
    except RuntimeError as e:
      if os.strerror(errno.ENOSPC) in str(e):
        message = 'the disk is full; free some space and start again, finished files are kept'
        raise OSError(errno.ENOSPC, message, str(path)) from e
      raise


class _Split:
  """The documents of one source that go to one split: counts them, and packs them a batch at a time."""

  def __init__(self, encoder: tokenizer.Tokenizer, settings: Settings, write, progress):
    self.counts = {'documents': 0, 'tokens': 0, 'targets': 0, 'bytes': 0, 'sequences': 0, 'dropped': {}}
    self._encoder = encoder
    if settings.packing == packing.NAMES['truncate']:
      self.counts['cut'] = {'documents': 0, 'tokens': 0, 'bytes': 0}
    self._packer = packing.PACKERS[settings.packing](
        length=settings.length, vocab_size=encoder.vocab_size, bos_id=encoder.bos_id, eos_id=encoder.eos_id)
    self._write = write
    self._progress = progress
    self._texts: list[str] = []
    self._characters = 0

  def add(self, text: str) -> None:
    if not text.strip():
      self._drop('empty')
      return
    self._texts.append(text)
    self._characters += len(text)
    if self._characters >= _FLUSH_BYTES:
      self._flush()

  def finish(self) -> None:
    self._flush()
    self._append(self._packer.finish())

  def _flush(self) -> None:
    kept = []
    tokens = 0
    for text, ids in zip(self._texts, self._encoder.encode_batch(self._texts), strict=True):
      if len(ids) == 0:
        self._drop('no tokens')  # the tokenizer normalises all of it away
        continue
      kept.append(ids)
      whole, size = len(ids) + self._packer.extra, len(text.encode())
      n, left = self._cut(ids, whole, size)
      tokens += n
      self.counts['bytes'] += left
    self.counts['documents'] += len(kept)
    self.counts['tokens'] += tokens
    self.counts['targets'] += tokens - len(kept)
    self._append(self._packer.add(kept))
    self._progress(len(kept), tokens)
    self._texts, self._characters = [], 0

  def _cut(self, ids: np.ndarray, tokens: int, size: int) -> tuple[int, int]:
    """(tokens, bytes) that are left of a document of so many, which is counted where it is cut."""
    room = self._packer.length + 1
    if 'cut' not in self.counts or tokens <= room:
      return tokens, size
    # bos is kept, and eos falls first.  The bytes are those of the text that the kept ids spell.
    begin = ids[:room - (self._encoder.bos_id is not None)]
    left = min(size, len(self._encoder.decode(begin).encode()))
    for key, n in (('documents', 1), ('tokens', tokens - room), ('bytes', size - left)):
      self.counts['cut'][key] += n
    return room, left

  def _append(self, records: np.ndarray) -> None:
    self._write(records)
    self.counts['sequences'] += len(records)

  def _drop(self, reason: str) -> None:
    self.counts['dropped'][reason] = self.counts['dropped'].get(reason, 0) + 1


def _describe(path: pathlib.Path, records: int) -> dict | None:
  """A shard's record in the result; a shard of no records is removed."""
  if not records:
    path.unlink()
    return None
  return {'file': path.name, 'sha256': workdir.digest_file(path), 'records': records, 'bytes': path.stat().st_size}


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str, digest: str) -> tokenizer.Tokenizer:
  loaded = tokenizer.load(path)
  if loaded.digest != digest:
    raise ValueError(f'tokenizer {path} has digest {loaded.digest}, want {digest}; it was changed, start again')
  return loaded
