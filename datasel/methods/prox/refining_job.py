"""A refinement as a folder in the making: planned, done piece by piece by any number of processes, and finished whole.

Each function here is called by any process that has the job and sees its folder; nothing else passes between them.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

from datasel import workdir
from datasel.data import corpus as corpora
from datasel.data import locks, tokenizer
from datasel.methods.prox import audit, pieces, refining
from datasel.methods.prox.pieces import Piece, Settings

_log = logging.getLogger(__name__)


# Refines a batch: its source's name, its documents, the first one's row.
Work = Callable[[str, list[corpora.Document], int], list[refining.Refined]]

# Does pieces of a job; calls back with the statistics of each batch; asks whether to stop, and is False if it did.
Do = Callable[['Job', Sequence[Piece], Callable[[dict[str, Any]], None], Callable[[], bool]], bool]


@dataclasses.dataclass(frozen=True)
class Job:
  """What a process needs to do any piece.

  work: of the job, what a process does with a batch; it can be sent to processes.  tokenizer: counts tokens for the
  statistics.
  """
  corpus: str
  out: str
  settings: Settings
  work: Callable[['Job'], Work]
  tokenizer: str | None = None

  @property
  def folder(self) -> pathlib.Path:
    """Where the work in progress is."""
    return pathlib.Path(f'{self.out}.partial')

  def count_tokens(self) -> Callable[[list[str]], Sequence[int]] | None:
    """Of texts, or None where none are counted."""
    if not self.tokenizer:
      return None
    encoder = tokenizer.load(self.tokenizer)
    if encoder.digest != self.settings.tokenizer:
      raise ValueError(f'tokenizer {self.tokenizer} was changed; start again')
    return lambda texts: list(map(len, encoder.encode_batch(texts)))


def make(corpus: str | os.PathLike, out: str | os.PathLike, refiner: refining.Refiner | None = None, *,
         programs_of: str | os.PathLike | None = None, compat: bool = False,
         tokenizer_path: str | os.PathLike | None = None, rows: int = pieces.ROWS, batch: int = pieces.BATCH) -> Job:
  """The job of refining a corpus, by a refiner or by the programs of a finished output of the same corpus.

  ValueError for both or neither, and for a refiner without stages.
  """
  if (refiner is None) == (programs_of is None):
    raise ValueError('want either a refiner or a finished output to take the programs from')
  if refiner and not set(refiner.stages) & set(refining.STAGES):
    raise ValueError(f'{refiner.name} has no stage of {", ".join(refining.STAGES)}')
  if refiner:
    name, fingerprint, work = refiner.name, refiner.fingerprint, functools.partial(_asked, refiner)
  else:
    name, fingerprint = 'given programs', audit.Output(programs_of).digest
    work = functools.partial(_asked_before, os.path.abspath(programs_of))
  counted = tokenizer.load(tokenizer_path).digest if tokenizer_path else None
  return Job(os.path.abspath(corpus), os.path.abspath(out), Settings(name, fingerprint, compat, counted, rows, batch),
             work, tokenizer_path and str(tokenizer_path))


def plan(job: Job) -> dict[str, Any]:
  """The plan of the job's output, made now if there is none: {settings, sources: [{name, split, domain, rows, sha256,
  state}]}.

  ValueError for an output, finished or begun, of other settings or another corpus, naming what differs, and for one in
  a folder that the corpus's documents are read from.
  """
  listed = corpora.Corpus(job.corpus)
  out = pathlib.Path(job.out)
  for split in corpora.SPLITS:
    if out.resolve().is_relative_to((listed.path / split).resolve()):
      raise ValueError(f'{out} is in {listed.path / split}, where it would be read as a part of the corpus; give '
                       'another --out')
  with locked(job, 'counting documents'):
    for path in (out / 'manifest.json', job.folder / 'plan.json'):
      if path.exists():
        found = workdir.read_json(path)
        _refuse_difference(path.parent, found, job.settings, listed)
        return found
    if out.exists():
      raise ValueError(f'{out} exists and was not written by this command; give another --out')
    with concurrent.futures.ThreadPoolExecutor() as pool:
      sources = list(pool.map(_source, pieces.sources_of(listed)))
    made = {'settings': dataclasses.asdict(job.settings), 'sources': sources}
    workdir.write_json(job.folder / 'plan.json', made)
    return made


def locked(job: Job, doing: str) -> contextlib.AbstractContextManager:
  """Holds the job's lock, beside its folder."""
  out = pathlib.Path(job.out)
  return locks.locked(out.with_name(f'.{out.name}.lock'), f'{doing} for {out}')


def pieces_of(planned: dict[str, Any]) -> list[Piece]:
  """All pieces, in order."""
  return pieces.of_source(planned['sources'], planned['settings']['rows'])


def unfinished(job: Job, some: Sequence[Piece]) -> list[Piece]:
  return [piece for piece in some if not pieces.entry_path(job.folder, piece).exists()]


def do(job: Job, some: Sequence[Piece], progress: Callable[[dict[str, Any]], None],
       stopping: Callable[[], bool]) -> bool:
  """Does pieces one after another; False where it was stopped before the end."""
  sources = pieces.sources_of(corpora.Corpus(job.corpus))
  reader = pieces.Reader(sources)
  work = job.work(job)
  for piece in some:
    documents = functools.partial(reader.documents, piece.source)
    if not pieces.run(piece, documents, job.folder, job.settings, functools.partial(work, piece.source), progress,
                      stopping):
      return False
  return True


def finish(job: Job, planned: dict[str, Any]) -> audit.Output | None:
  """The output, which appears whole when all pieces are done; None where some are not.

  ValueError names a file that is not what its piece left; what a kill leaves of a finished job is tidied up.
  """
  out = pathlib.Path(job.out)
  with locked(job, 'finishing'):
    if not (out / 'manifest.json').exists():
      paths = [pieces.entry_path(job.folder, piece) for piece in pieces_of(planned)]
      if not all(path.exists() for path in paths):
        return None
      _assemble(job.folder, planned, list(map(workdir.read_json, paths)))
      os.replace(job.folder, out)
    for leftover in out.rglob('.*.tmp-*'):  # of a file that was being written at a kill
      leftover.unlink(missing_ok=True)
    for leftover in ('pieces', 'signatures', 'copies'):
      shutil.rmtree(out / leftover, ignore_errors=True)
    (out / 'plan.json').unlink(missing_ok=True)
  return audit.Output(out)


def require_train(output: audit.Output) -> None:
  """ValueError where not one train document is left, for then the output is no corpus."""
  if not output.n_train:
    raise ValueError(f'every train document was dropped: {output.path} is no corpus, and only its audit/ is of use')


def _assemble(folder: pathlib.Path, planned: dict[str, Any], entries: Sequence[dict[str, Any]]) -> None:
  total: dict[str, Any] = {}
  domains: dict[str, Any] = {}
  files: dict[str, Any] = {}
  for entry in entries:
    piece, statistics = Piece(**entry['piece']), entry['statistics']
    if audit.n_documents(statistics) != piece.stop - piece.start:
      raise RuntimeError(f'{piece.name}: {piece.stop - piece.start} documents read, {statistics.get("documents")} '
                         'accounted for; a bug of datasel')
    audit.add(domains.setdefault(_domain(piece), {}), statistics)
    audit.add(total, statistics)
  for domain, statistics in domains.items():
    if not audit.n_left(statistics):
      _log.warning('%s: all of its %d documents were dropped', domain, audit.n_documents(statistics))
    elif _untrained(domain, domains):
      _log.warning('%s: its %d documents that are left are not in the output, for all train documents of this domain '
                   'were dropped', domain, audit.n_left(statistics))
  for entry in entries:
    piece = Piece(**entry['piece'])
    # An empty file would be a domain without documents, and `prepare` wants no validation without train documents.
    if not audit.n_left(entry['statistics']) or _untrained(_domain(piece), domains):
      (folder / pieces.file_names(piece)[0]).unlink(missing_ok=True)
      del entry['files'][pieces.file_names(piece)[0]]
    for name, stated in entry['files'].items():
      audit.check_file(folder / name, stated)
    files |= entry['files']
  workdir.write_json(folder / 'statistics.json', {'total': audit.in_order(total),
                                                  'domains': {name: audit.in_order(domains[name]) for name in domains}})
  files['statistics.json'] = audit.describe(folder / 'statistics.json')
  workdir.write_json(folder / 'manifest.json', planned | {'pieces': [entry['piece'] for entry in entries],
                                                          'files': files})


def _domain(piece: Piece) -> str:
  """'train/web'."""
  return piece.name.rpartition('-')[0]


def _untrained(domain: str, domains: dict[str, Any]) -> bool:
  """Whether it is a validation domain whose train documents were all dropped."""
  split, _, name = domain.partition('/')
  train = domains.get(f'train/{name}')
  return split == 'validation' and train is not None and not audit.n_left(train)


def _source(source: corpora.Source) -> dict[str, Any]:
  return {'name': source.name, 'split': source.split, 'domain': source.domain, 'rows': pieces.count_rows(source),
          'sha256': source.digest(), 'state': pieces.state_of(source)}


def _refuse_difference(folder: pathlib.Path, found: dict[str, Any], settings: Settings,
                       listed: corpora.Corpus) -> None:
  want = dataclasses.asdict(settings)
  differences = [f'{key} is {found["settings"].get(key)!r}, want {want[key]!r}' for key in want
                 if found['settings'].get(key) != want[key]]
  got = {source['name']: source for source in found['sources']}
  now = {source.name: source for source in pieces.sources_of(listed)}
  for name in sorted({*got, *now}):
    if name not in got or name not in now:
      differences.append(f'{name} is {"gone" if name in got else "new"}')
    elif got[name]['state'] != pieces.state_of(now[name]) and got[name]['sha256'] != now[name].digest():
      differences.append(f'{name} has changed')
  if differences:
    raise ValueError(f'{folder} was made otherwise: {"; ".join(differences[:5])}; give another --out, or delete it')


def _asked(refiner: refining.Refiner, job: Job) -> Work:
  count, compat = job.count_tokens(), job.settings.compat
  return lambda source, documents, first: refining.refine(documents, refiner, compat=compat, count_tokens=count)


def _asked_before(programs_of: str, job: Job) -> Work:
  count, compat, records = job.count_tokens(), job.settings.compat, _Records(audit.Output(programs_of))
  return lambda source, documents, first: refining.carry_out(documents, records.of(source, first, len(documents)),
                                                             compat=compat, count_tokens=count)


class _Records:
  """The records of a finished output, by source and row; rows in order are read without going back."""

  def __init__(self, output: audit.Output):
    self._output = output
    self._open: Any = None
    self._source, self._at = '', 0

  def of(self, source: str, first: int, n: int) -> list[dict[str, Any]]:
    if self._source != source or self._at > first:
      self._open = (record for _, record in self._output.records(source))
      self._source, self._at = source, 0
    found = []
    for record in self._open:
      self._at += 1
      if self._at > first:
        found.append(record)
      if self._at >= first + n:
        break
    if len(found) != n:
      raise ValueError(f'{self._output.path} has no records for rows {first}..{first + n - 1} of {source}; want the '
                       'output of this same corpus')
    return found
