"""Rows of one file of a corpus, refined to one file: the unit of work, and a pure function of rows and refiner.

A folder in the making, OUT.partial, is laid out as `audit` says, and has besides
  plan.json            settings and sources; a folder of another plan is not continued
  pieces/NAME.json     of a piece that is finished: its counts, and the digests of its files; written last
  pieces/NAME.progress of one that is not: how far its files are good, after each batch
so that a kill at any moment costs one batch, and the bytes are those of a run that was not killed.
"""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet

from datasel import workdir
from datasel.data import corpus, locks
from datasel.methods.prox import audit, refining

ROWS = 8192  # of a piece
BATCH = 256  # documents at once


@dataclasses.dataclass(frozen=True)
class Settings:
  """What determines the output of given rows.  rows: of a piece; batch: documents given to the refiner at once."""
  refiner: str
  fingerprint: str
  compat: bool = False
  tokenizer: str | None = None  # digest of that which counts tokens
  rows: int = ROWS
  batch: int = BATCH
  format: int = refining.FORMAT

  def __post_init__(self):
    if self.rows < 1 or self.batch < 1:
      raise ValueError(f'rows is {self.rows} and batch {self.batch}; want at least 1')


@dataclasses.dataclass(frozen=True)
class Piece:
  """Rows start..stop-1 of a source.  name: 'train/web-00003', of the files that become of it."""
  name: str
  source: str
  start: int
  stop: int


Work = Callable[[list[corpus.Document], int], list[refining.Refined]]  # of a batch, and its first row in the source


def of_source(sources: list[dict[str, Any]], rows: int) -> list[Piece]:
  """The pieces of a plan's sources, in order; those of a domain are numbered through, at least one for each source."""
  pieces, numbers = [], {}
  for source in sources:
    for start in range(0, max(source['rows'], 1), rows):
      key = f'{source["split"]}/{source["domain"]}'
      numbers[key] = numbers.get(key, -1) + 1
      pieces.append(Piece(f'{key}-{numbers[key]:05d}', source['name'], start, min(start + rows, source['rows'])))
  return pieces


def sources_of(listed: corpus.Corpus) -> list[corpus.Source]:
  """Every source of a corpus, in corpus order: split, domain, number."""
  return [source for split in corpus.SPLITS for domain in sorted(listed.sources[split])
          for source in listed.sources[split][domain]]


def state_of(source: corpus.Source) -> list[list[int]]:
  """[bytes, time of the last change] of a source's files: while they are the same, its content is taken to be."""
  return [[stat.st_size, stat.st_mtime_ns] for stat in map(os.stat, source.files)]


def count_rows(source: corpus.Source) -> int:
  """The number of its documents; whether each is one is seen when it is read.  ValueError names a damaged file."""
  total = 0
  for file in source.files:
    try:
      if file.suffix == '.parquet':
        total += pyarrow.parquet.ParquetFile(file).metadata.num_rows
      elif '.jsonl' in corpus.suffix(file):
        with pyarrow.input_stream(str(file), compression='detect') as raw:
          total += _count_lines(raw)
      else:
        total += sum(1 for _ in corpus.documents_of(file))
    except (OSError, pyarrow.ArrowException) as e:
      raise ValueError(f'{file} can\'t be read: {e}; copy it again if it was cut short') from e
  return total


def run(piece: Piece, documents: Callable[[int], Iterator[corpus.Document]], folder: pathlib.Path, settings: Settings,
        work: Work, progress: Callable[[dict[str, Any]], None], stopping: Callable[[], bool]) -> bool:
  """Refines what is missing of a piece into `folder`; False where it was stopped before the end.

  documents: of its source, from a given row on.  progress: called with the statistics of what was done, batch by batch.
  Raises ValueError for bad rows, for files shorter than their progress says, and for a source of fewer rows.
  """
  entry = entry_path(folder, piece)
  # Beam may hand out a piece twice, and so may who starts a shard twice.
  with locks.locked(entry.with_suffix('.lock'), f'refining {piece.name}'):
    return entry.exists() or _run(piece, documents, folder, settings, work, progress, stopping)


def file_names(piece: Piece) -> tuple[str, str]:
  """Of its texts, and of its records, inside the folder."""
  return f'{piece.name}.jsonl.gz', f'audit/{piece.name}.jsonl.gz'


def entry_path(folder: pathlib.Path, piece: Piece) -> pathlib.Path:
  return folder / f'pieces/{piece.name}.json'


class Reader:
  """The documents of sources from a row on, without reading a file again from its beginning where it goes on."""

  def __init__(self, sources: Sequence[corpus.Source]):
    self._sources = {source.name: source for source in sources}
    self._open: tuple[str, Iterator[corpus.Document]] | None = None
    self._at = 0

  def documents(self, source: str, row: int) -> Iterator[corpus.Document]:
    """From `row` on; ends any iterator that it gave before.  ValueError for no such source."""
    if source not in self._sources:
      raise ValueError(f'the corpus has no {source}; give the one that was refined')
    if self._open is None or self._open[0] != source or self._at > row:
      self._open, self._at = (source, corpus.documents(self._sources[source])), 0
    rows = self._open[1]
    for _ in itertools.islice(rows, row - self._at):
      self._at += 1
    for document in rows:
      self._at += 1
      yield document


def _run(piece: Piece, documents: Callable[[int], Iterator[corpus.Document]], folder: pathlib.Path, settings: Settings,
         work: Work, progress: Callable[[dict[str, Any]], None], stopping: Callable[[], bool]) -> bool:
  text, records = (folder / name for name in file_names(piece))
  state_path = entry_path(folder, piece).with_suffix('.progress')
  state = workdir.read_json(state_path) if state_path.exists() else _nothing_done()
  rows = documents(piece.start + state['rows'])
  for path in (text, records, state_path):
    path.parent.mkdir(parents=True, exist_ok=True)
  with _appending(text, state['text']) as text_file, _appending(records, state['audit']) as audit_file:
    while state['rows'] < piece.stop - piece.start or not state['begun']:
      if stopping():
        return False
      first = piece.start + state['rows']
      batch = list(itertools.islice(rows, min(settings.batch, piece.stop - first)))
      if len(batch) != min(settings.batch, piece.stop - first):
        raise ValueError(f'{piece.source} ends before row {piece.stop}, which it had when it was counted; want files '
                         'that do not change')
      refined = work(batch, first) if batch else []
      counted = _checked(piece, refined)
      text_file.write(_text(piece, first, batch, refined))
      audit_file.write(audit.member(one.record for one in refined))
      for file in (text_file, audit_file):
        file.flush()
        os.fsync(file.fileno())
      state = {'begun': True, 'rows': state['rows'] + len(batch), 'text': text_file.tell(), 'audit': audit_file.tell(),
               'statistics': audit.add(state['statistics'], counted)}
      workdir.write_json(state_path, state)
      progress(counted)
  workdir.write_json(entry_path(folder, piece), {
    'piece': dataclasses.asdict(piece), 'statistics': audit.in_order(state['statistics']),
    'files': dict(zip(file_names(piece), map(audit.describe, (text, records))))})
  state_path.unlink()
  return True


def _nothing_done() -> dict[str, Any]:
  return {'begun': False, 'rows': 0, 'text': 0, 'audit': 0, 'statistics': {}}


def _appending(path: pathlib.Path, size: int):
  """The file, open after its first `size` bytes, the rest cut off."""
  path.touch()
  if path.stat().st_size < size:
    raise ValueError(f'{path} is damaged ({path.stat().st_size} bytes, want at least {size}); delete its folder '
                     'and refine again')
  file = open(path, 'r+b')
  file.truncate(size)
  file.seek(size)
  return file


def _checked(piece: Piece, refined: list[refining.Refined]) -> dict[str, Any]:
  """The statistics of a batch; every document must be in them as one of the three decisions, as its text is."""
  counted: dict[str, Any] = {}
  for one in refined:
    audit.add(counted, audit.counts(one.record))
    if one.record['decision'] not in audit.DECISIONS or bool(one.text) != (one.record['decision'] != 'dropped'):
      raise RuntimeError(f'{piece.name}: {one.record["id"]!r} is {one.record["decision"]}, with a text of '
                         f'{len(one.text)} characters; a bug of datasel')
  if audit.n_documents(counted) != len(refined):
    raise RuntimeError(f'{piece.name}: {len(refined)} documents, {counted["documents"]}; a bug of datasel')
  return counted


def _text(piece: Piece, first: int, batch: list[corpus.Document], refined: list[refining.Refined]) -> bytes:
  """What the batch adds to the file of documents; ValueError names a field that JSON has no word for."""
  try:
    return audit.member(row for document, one in zip(batch, refined) if (row := _row(document, one)))
  except ValueError:
    for number, document in enumerate(batch, first + 1):
      for name, value in document.fields.items():
        try:
          audit.member([{name: value}])
        except ValueError as e:
          raise ValueError(f'{piece.source}, row {number}, column {name!r}: {e}') from e
    raise


def _row(document: corpus.Document, one: refining.Refined) -> dict[str, Any] | None:
  return {'id': document.id, 'text': one.text, **document.fields} if one.text else None


def _count_lines(raw: pyarrow.NativeFile) -> int:
  """Lines that are not blank."""
  total, rest = 0, b''
  while block := raw.read(1 << 22):
    lines = (rest + block).split(b'\n')
    rest = lines.pop()
    total += sum(1 for line in lines if line.strip())
  return total + bool(rest.strip())
