"""What became of every document: records, the statistics that they sum to, and the texts again from them.

  OUT/{train,validation}/DOMAIN-NNNNN.jsonl.gz         the refined documents, a corpus
  OUT/audit/{train,validation}/DOMAIN-NNNNN.jsonl.gz   a record of each document read, in order (`refining.refine`)
  OUT/statistics.json                                  {total, domains: {'train/web': ...}}, see `counts`
  OUT/manifest.json                                    settings, sources, and the digest of every file above
"""

import gzip
import io
import json
import os
import pathlib
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from datasel import workdir
from datasel.methods.prox import executor, refining

DECISIONS = ('kept', 'edited', 'dropped')
_Counts = dict[str, Any]  # a tree of integers


def counts(record: dict[str, Any]) -> _Counts:
  """The statistics of one document: a tree of integers, so that those of any documents are summed exactly by `add`.

    documents: {decision: n}, reasons: {decision: {reason: n}}, before, after: {lines, words, ...},
    lengths: {before, after: {smallest power of 2 above the words: n}} (after: of those not dropped),
    calls: {call: {what came of it: n}}, finished: {how a chunk's program ended: n},
    truncated: documents that were not read whole,
    read, generated: {stage: tokens}
  """
  document, decision = record['document'], record['decision']
  counted: _Counts = {
    'documents': {decision: 1},
    'reasons': {decision: {record['reason']: 1}},
    'before': record['before'],
    'after': record['after'],
    'lengths': {'before': {_bin(record['before']['words']): 1},
                'after': {} if decision == 'dropped' else {_bin(record['after']['words']): 1}},
    'calls': {},
    'finished': {},
    'truncated': int(bool(document and document['truncated'])),
    'read': {'document': document['tokens'] if document else 0, 'chunk': 0},
    'generated': {'chunk': 0},
  }
  outcomes = list(document['outcomes']) if document else []
  for chunk in record['chunks']:
    outcomes += chunk['outcomes']
    counted['finished'][chunk['finished']] = counted['finished'].get(chunk['finished'], 0) + 1
    counted['read']['chunk'] += chunk['read']
    counted['generated']['chunk'] += chunk['generated']
  for call, kind in outcomes:
    kinds = counted['calls'].setdefault(call, {})
    kinds[kind] = kinds.get(kind, 0) + 1
  return counted


def add(total: _Counts, more: _Counts) -> _Counts:
  """Adds `more` to `total`, in place, and returns it."""
  for key, value in more.items():
    if isinstance(value, dict):
      add(total.setdefault(key, {}), value)
    else:
      total[key] = total.get(key, 0) + value
  return total


def in_order(counted: _Counts) -> _Counts:
  """The same statistics with sorted keys, numbers by value: equal ones are then equal as JSON text."""
  key = lambda item: (int(item[0]), '') if item[0].isdecimal() else (-1, item[0])
  return {name: in_order(value) if isinstance(value, dict) else value
          for name, value in sorted(counted.items(), key=key)}


def n_documents(counted: _Counts) -> int:
  return sum(counted.get('documents', {}).values())


def n_left(counted: _Counts) -> int:
  """Documents that were not dropped."""
  return n_documents(counted) - counted.get('documents', {}).get('dropped', 0)


def flops(counted: _Counts, flops_per_token: dict[str, float]) -> float:
  """What the refiner has cost, of its FLOPs for a token read or generated in each stage."""
  return sum(n * flops_per_token.get(stage, 0.0) for kind in ('read', 'generated')
             for stage, n in counted.get(kind, {}).items())


def replay(text: str, record: dict[str, Any], *, compat: bool = False) -> executor.Result:
  """Carries out a record's programs on the text that it is of: its `text` is what the corpus holds, '' where dropped.

  ValueError for another text, and where the outcome is another than the record's.
  """
  refining.check_source(text, record)
  if record['stage'] == 'chunk':
    result = executor.execute(text, [chunk['program'] for chunk in record['chunks']], compat=compat,
                              spans=[(chunk['start'], chunk['stop']) for chunk in record['chunks']])
  elif record['stage'] == 'document':
    result = executor.execute(text, record['document']['program'], level='document', compat=compat)
  else:
    result = executor.Result('' if record['decision'] == 'dropped' else text, record['decision'], record['reason'])
  if result.decision != record['decision']:
    raise ValueError(f'{record["id"]!r} is {result.decision} when its programs are carried out again, and '
                     f'{record["decision"]} by its record; it was refined by another version: refine it anew')
  return result


class Output:
  """A finished output folder.  ValueError for one that is not finished; reads nothing but the manifest."""

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    if not (self.path / 'manifest.json').exists():
      begun = self.path.with_name(f'{self.path.name}.partial').exists()
      raise ValueError(f'{self.path} {"is not finished: repeat its command" if begun else "has no manifest.json"}; '
                       'want a folder written by datasel.methods.prox.refine')
    self.manifest: dict[str, Any] = workdir.read_json(self.path / 'manifest.json')

  @property
  def digest(self) -> str:
    """sha256 (hex) of the manifest, which has the digests of all files."""
    return workdir.digest_file(self.path / 'manifest.json')

  @property
  def statistics(self) -> dict[str, Any]:
    return workdir.read_json(self.path / 'statistics.json')

  @property
  def n_train(self) -> int:
    """Train documents that were not dropped."""
    return sum(n_left(counted) for name, counted in self.statistics['domains'].items() if name.startswith('train/'))

  def verify(self) -> None:
    """ValueError names a file that is damaged or missing."""
    for name, stated in self.manifest['files'].items():
      check_file(self.path / name, stated)

  def records(self, source: str | None = None) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(piece of the manifest, record) of every document read, in order; source: of that file alone."""
    for piece in self.manifest['pieces']:
      if source in (None, piece['source']):
        for record in read(self.path / f'audit/{piece["name"]}.jsonl.gz'):
          yield piece, record


def read(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  """The JSON lines of one file, in a stream; ValueError names a damaged one."""
  number = 0
  try:
    with gzip.open(path, 'rb') as f:
      for number, line in enumerate(f, 1):  # noqa: B007 (the error below names it)
        yield json.loads(line)
  except (OSError, EOFError, zlib.error, ValueError) as e:
    raise ValueError(f'{path} is damaged after line {number} ({e}); delete the folder and refine again') from e


def member(rows: Iterable[dict[str, Any]]) -> bytes:
  """Rows as JSON lines in one gzip member, the same bytes at any time; members one after another are a file."""
  held = io.BytesIO()
  with gzip.GzipFile(filename='', fileobj=held, mode='wb', compresslevel=6, mtime=0) as f:
    for row in rows:
      f.write(_line(row))
  return held.getvalue()


def describe(path: pathlib.Path) -> dict[str, Any]:
  """A file's line in the manifest."""
  return {'bytes': path.stat().st_size, 'sha256': workdir.digest_file(path)}


def check_file(path: pathlib.Path, stated: dict[str, Any]) -> None:
  """ValueError unless the file is what the manifest states."""
  got = describe(path) if path.exists() else {'bytes': 'no file', 'sha256': ''}
  if got != stated:
    raise ValueError(f'{path} is damaged ({got["bytes"]} bytes, sha256 {got["sha256"][:12]}; want {stated["bytes"]}, '
                     f'{stated["sha256"][:12]}); delete the folder and refine again')


def _line(row: dict[str, Any]) -> bytes:
  try:
    return json.dumps(row, ensure_ascii=False, default=_json).encode() + b'\n'
  except UnicodeEncodeError:  # half of a surrogate pair in a field
    return json.dumps(row, default=_json).encode() + b'\n'


def _json(value: Any) -> Any:
  """What JSON has no word for, as tables may hold it: dates in ISO 8601, exact decimals as text."""
  if hasattr(value, 'isoformat'):
    return value.isoformat()
  if type(value).__name__ == 'Decimal':
    return str(value)
  raise ValueError(f'a field holds {type(value).__name__}, which JSON has no word for; convert it to text, or leave it '
                   'out of the corpus')


def _bin(n: int) -> str:
  return str(1 << n.bit_length())
