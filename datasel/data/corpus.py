"""Text by domain on disk: CORPUS/{train,validation}/DOMAIN[-NNN].{jsonl,jsonl.gz,jsonl.zst,parquet}, or a folder
DOMAIN/ written by Hugging Face `save_to_disk`; or else a folder of tasks written by `seqio_cache_tasks`, each a domain.
A document is a `text`; an `id` and other fields are carried along."""

import dataclasses
import hashlib
import io
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import pyarrow
import pyarrow.parquet

from datasel import workdir
from datasel.data import domains, seqio_cache

SPLITS = ('train', 'validation')
_COMPRESSION = {'.jsonl': None, '.jsonl.gz': 'gzip', '.jsonl.zst': 'zstd'}
_SUFFIXES = (*_COMPRESSION, '.parquet')
_ROWS_AT_ONCE = 256
_ARROW_END = b'\xff\xff\xff\xff\x00\x00\x00\x00'


@dataclasses.dataclass(frozen=True)
class Document:
  """One text; `fields` holds whatever else its row held."""
  id: str
  text: str
  fields: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Source:
  """One file (or `save_to_disk` folder) of one domain.  name: its path inside the corpus, equal on all machines."""
  name: str
  split: str
  domain: str
  path: pathlib.Path
  files: tuple[pathlib.Path, ...]

  @property
  def size(self) -> int:
    """Bytes on disk."""
    return sum(file.stat().st_size for file in self.files)

  def digest(self) -> str:
    """sha256 (hex) of the content; for a folder, of its data files' names and digests."""
    if self.path.is_file():
      return workdir.digest_file(self.path)
    return workdir.digest({file.name: workdir.digest_file(file) for file in self.files})


class Corpus:
  """The sources of a corpus folder, by split and domain; listing reads no text.

  sources: {split: {domain: sources in order of (shard number, name)}}.  domains: the train domains, sorted.
  Raises ValueError for a layout in which a document could be missed or counted twice, naming the path and what to do.
  """

  def __init__(self, path: str | pathlib.Path):
    self.path = pathlib.Path(path)
    if not self.path.is_dir():
      raise ValueError(f'corpus {self.path} is not a folder; want a folder holding train/ and, optionally, validation/')
    _refuse_dataset_dict(self.path)
    for child in self.path.iterdir():
      if child.is_dir() and child.name in ('val', 'valid', 'dev'):
        raise ValueError(f'{child} would not be read: the splits are {", ".join(SPLITS)}; rename it to validation')
    if seqio_cache.is_cache(self.path):
      self.sources = _list_cache(self.path)
      self.domains = tuple(self.sources['train'])
      return
    if not (self.path / 'train').is_dir():
      raise ValueError(f'corpus {self.path} has no train folder; put the files at {self.path}/train/DOMAIN.jsonl')
    self.sources = {split: _list_split(self.path, split) for split in SPLITS}
    if not self.sources['train']:
      raise ValueError(f'{self.path}/train holds no domain; put the files at {self.path}/train/DOMAIN.jsonl')
    self.domains = tuple(sorted(self.sources['train']))


def suffix(path: pathlib.Path) -> str:
  """The ending by which a file's kind is known: '.jsonl.gz', for one; '' for no known kind."""
  return next((suffix for suffix in _SUFFIXES if path.name.endswith(suffix)), '')


def documents(source: Source) -> Iterator[Document]:
  """The documents of one source in order, in a stream.

  A row without an `id` gets the sha256 of its text, so that equal texts stay in one split.  Blank lines are not
  documents.  Raises ValueError naming file and line (or row) for a row without a string `text`, broken JSON, and a file
  that can't be read.
  """
  for file in source.files:
    yield from documents_of(file)


def documents_of(file: pathlib.Path) -> Iterator[Document]:
  """The documents of one file, as `documents` reads it."""
  number = 0
  try:
    for number, row in _rows(file):  # noqa: B007 (the errors below name it)
      yield _document(row)
  except _BadRow as e:
    raise ValueError(f'{file}:{number}: {e}; repair or remove that row') from e
  except (ValueError, OSError, pyarrow.ArrowException) as e:
    raise ValueError(f'{file} can\'t be read after row {number}: {e}; copy it again if it was cut short') from e


class _BadRow(ValueError):
  """A row that was read but isn't a document."""


def _document(row: bytes | dict[str, Any]) -> Document:
  """The document of a line of JSON, or of a row of a table."""
  if isinstance(row, bytes):
    try:
      row = json.loads(row.decode('utf-8-sig'))
    except (ValueError, RecursionError) as e:
      raise _BadRow(f'not valid JSON in UTF-8 ({e})') from e
  if not isinstance(row, dict):
    raise _BadRow(f'got a JSON {type(row).__name__}, want an object with a "text"')
  fields = dict(row)
  text, identity = fields.pop('text', None), fields.pop('id', None)
  if not isinstance(text, str):
    got = f'"text" is of type {type(text).__name__}' if 'text' in row else f'no "text" among the fields {sorted(row)}'
    hint = '; it holds tokens, not text: want the texts they were made from' if 'input_ids' in row else ''
    raise _BadRow(f'{got}, want a string{hint}')
  if not isinstance(identity, str | int | None):
    raise _BadRow(f'"id" is of type {type(identity).__name__}, want a string or an integer')
  try:
    content = text.encode()
    identity = hashlib.sha256(content).hexdigest() if identity is None else str(identity)
    identity.encode()
  except UnicodeEncodeError as e:
    raise _BadRow(f'half of a surrogate pair, which is no character ({e})') from e
  return Document(identity, text, fields)


def _rows(file: pathlib.Path) -> Iterator[tuple[int, bytes | dict[str, Any]]]:
  """(number, row) of one file, numbers from 1."""
  if seqio_cache.is_shard(file):
    return enumerate(seqio_cache.rows(file), 1)
  return _json_rows(file) if suffix(file) in _COMPRESSION else _table_rows(file)


def _json_rows(file: pathlib.Path) -> Iterator[tuple[int, bytes]]:
  # pyarrow's streams, unlike zstandard's, raise when a compressed file ends early.
  with pyarrow.input_stream(str(file), compression=_COMPRESSION[suffix(file)]) as raw:
    for number, line in enumerate(io.BufferedReader(raw, 1 << 20), 1):
      if line.strip():
        yield number, line


def _table_rows(file: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
  number = 0
  for batch in _parquet_batches(file) if file.suffix == '.parquet' else _arrow_batches(file):
    for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
      for row in batch.slice(start, _ROWS_AT_ONCE).to_pylist():
        number += 1
        yield number, row


def _parquet_batches(file: pathlib.Path) -> Iterator[pyarrow.RecordBatch]:
  with pyarrow.parquet.ParquetFile(file, page_checksum_verification=True) as table:
    yield from table.iter_batches(batch_size=_ROWS_AT_ONCE)


def _arrow_batches(file: pathlib.Path) -> Iterator[pyarrow.RecordBatch]:
  with pyarrow.memory_map(str(file)) as raw:
    # A stream cut between two batches reads as a shorter one; only the missing end marker tells.
    if raw.size() < len(_ARROW_END) or raw.read_at(len(_ARROW_END), raw.size() - len(_ARROW_END)) != _ARROW_END:
      raise ValueError('the Arrow stream has no end marker, so it was cut short or is no Arrow stream')
    with pyarrow.ipc.open_stream(raw) as stream:
      yield from stream


def _list_split(root: pathlib.Path, split: str) -> dict[str, tuple[Source, ...]]:
  """{domain: its sources in order}; {} when the split has no folder."""
  folder = root / split
  if not folder.is_dir():
    return {}
  if (folder / 'state.json').exists():
    raise ValueError(f'{folder} is one data set, not a folder of domains; move it to {folder}/DOMAIN/')
  _refuse_dataset_dict(folder)
  found: dict[str, list[tuple[int, str, Source]]] = {}
  for path in sorted(folder.iterdir()):
    if not path.name.startswith('.'):
      domain, number, stem = _domain_of(path)
      found.setdefault(domain, []).extend((number, stem, source) for source in _sources_at(path, root, split, domain))
  listed = {}
  for domain, entries in sorted(found.items()):
    sources = tuple(source for *_, source in sorted(entries, key=lambda entry: (*entry[:2], entry[2].name)))
    _check_domain(domain, sources, [stem for _, stem, source in entries if source.path.is_file()], folder)
    listed[domain] = sources
  return listed


def _list_cache(root: pathlib.Path) -> dict[str, dict[str, tuple[Source, ...]]]:
  """{split: {domain: its sources in order}} of a folder of cached tasks: each task a domain, each shard a source."""
  listed: dict[str, dict[str, tuple[Source, ...]]] = {split: {} for split in SPLITS}
  for task in sorted(child for child in root.iterdir() if not child.name.startswith('.')):
    domain = domains.check(task.name, str(task))
    for split, shards in seqio_cache.shards(task, SPLITS).items():
      listed[split][domain] = tuple(Source(shard.relative_to(root).as_posix(), split, domain, shard, (shard,))
                                    for shard in shards)
  return listed


def _domain_of(path: pathlib.Path) -> tuple[str, int, str]:
  """(domain, shard number or -1, name without suffix): 'web-001.jsonl' -> ('web', 1, 'web-001')."""
  ending = suffix(path)
  if path.is_file() and not ending:
    raise ValueError(f'{path} is of no known kind, want one of {", ".join(_SUFFIXES)}; convert it or move it elsewhere')
  stem = path.name.removesuffix(ending) if path.is_file() else path.name
  domain, number = re.fullmatch(r'(.*?)(?:-(\d+))?', stem, re.DOTALL | re.ASCII).groups()
  return domains.check(domain, str(path)), int(number or -1), stem


def _sources_at(path: pathlib.Path, root: pathlib.Path, split: str, domain: str) -> list[Source]:
  """The file itself, or the `save_to_disk` folder, or each such folder inside it."""
  if path.is_file():
    return [Source(path.relative_to(root).as_posix(), split, domain, path, (path,))]
  _refuse_dataset_dict(path)
  inside = sorted(child for child in path.iterdir() if not child.name.startswith('.'))
  folders = [path] if (path / 'state.json').exists() else inside
  if not folders:
    raise ValueError(f'domain folder {path} is empty; fill it or remove it')
  return [
      Source(folder.relative_to(root).as_posix(), split, domain, folder, _arrow_files(folder)) for folder in folders
  ]


def _arrow_files(folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
  if not (folder / 'state.json').exists():
    raise ValueError(f'{folder} is not a data set written by save_to_disk (it has no state.json); write it anew')
  state = workdir.read_json(folder / 'state.json')
  if state.get('_indices_data_files') or state.get('_indices_files'):
    raise ValueError(f'{folder} selects rows through an index; call flatten_indices() and save_to_disk again')
  names = [entry['filename'] for entry in state.get('_data_files') or ()]
  if any(pathlib.PurePath(name).name != name for name in names):
    raise ValueError(f'{folder}/state.json names files outside the folder ({names}); write the data set anew')
  files = tuple(folder / name for name in names)
  missing = [file.name for file in files if not file.is_file()]
  if missing or not files:
    raise ValueError(f'{folder} lacks data files ({", ".join(missing) or "state.json names none"}); copy it again')
  return files


def _check_domain(domain: str, sources: tuple[Source, ...], file_stems: list[str], folder: pathlib.Path) -> None:
  if 0 < len(file_stems) < len(sources):
    raise ValueError(f'domain {domain!r} of {folder} is there both as files and as folders; keep one')
  twice = sorted({stem for stem in file_stems if file_stems.count(stem) > 1})
  if twice:
    raise ValueError(f'{folder} holds {twice[0]!r} in more than one format; keep one, or number them as shards')
  if not any(source.size for source in sources):
    raise ValueError(f'domain {domain!r} of {folder} is empty (0 bytes); fill it or remove it')


def _refuse_dataset_dict(folder: pathlib.Path) -> None:
  if (folder / 'dataset_dict.json').exists():
    raise ValueError(
        f'{folder} is a DatasetDict, whose splits can\'t be told from domains; save each of its data sets to '
        'CORPUS/{train,validation}/DOMAIN/')
