"""A corpus without the copies in it: of documents with the same words, or nearly so, the first is kept.

  python -m datasel.methods.prox.dedup --corpus CORPUS --out OUT --threshold 0.8 --workers 8

First is validation before train, so that no copy of a validation document is trained on; then domain by domain, file by
file, row by row.  A document is dropped if it is a copy of one that is kept, never for being like another copy.  The
output is that of `refine`: each dropped document's record has {copy_of: {id, domain, similarity}}.  Signatures are made
by many processes, 4 num_perm bytes a document; one process then compares them in memory, about 5 kB for each kept one.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import itertools
import logging
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from datasel import workdir
from datasel.data import corpus as corpora
from datasel.methods.prox import audit, local, pieces, refining, refining_job, signatures, tables
from datasel.methods.prox.refining_job import Job
from datasel.methods.prox.signatures import Signing

_log = logging.getLogger(__name__)
_USUAL = Signing()


@dataclasses.dataclass(frozen=True)
class Copy:
  """A document to drop, by its place, and the one it is a copy of.  similarity: 1.0 for the same words, else the
  estimated Jaccard similarity."""
  source: str
  row: int
  of: str
  domain: str
  similarity: float
  reason: str  # 'exact copy' or 'near copy'


def dedup(corpus: str | os.PathLike, out: str | os.PathLike, *, signing: Signing = _USUAL, workers: int = 1,
          rows: int = pieces.ROWS, batch: int = pieces.BATCH, run_all: local.RunAll | None = None) -> audit.Output:
  """Writes the corpus without copies; the finished output.

  run_all: does pieces elsewhere than in processes of this machine.  It may be killed at any moment and started again.
  Raises as `refine.refine` does, and ImportError without datasketch.
  """
  signatures.library()
  identity = {'signing': dataclasses.asdict(signing), 'datasketch': importlib.metadata.version('datasketch')}
  settings = pieces.Settings(f'copies at {signing.threshold}, {signing.num_perm} hashes, {signing.ngram}-grams',
                             workdir.digest(identity), rows=rows, batch=batch)
  job = Job(os.path.abspath(corpus), os.path.abspath(out), settings, _work)
  planned = refining_job.plan(job)
  if not (pathlib.Path(job.out) / 'manifest.json').exists():
    run_all = run_all or functools.partial(local.run, workers=workers)
    every = refining_job.pieces_of(planned)
    if not _done(job.folder).exists():
      unsigned = [piece for piece in every if not signatures.path(job.folder, piece).exists()]
      if unsigned:
        _log.info('signing documents')
        run_all(functools.partial(signatures.do, signing), job, unsigned)
      _log.info('comparing signatures')
      _write(job.folder, planned, copies(job.folder, every, signing))
    _log.info('writing what is kept')
    run_all(refining_job.do, job, refining_job.unfinished(job, every))
  return refining_job.finish(job, planned)


def copies(folder: pathlib.Path, every: Sequence[pieces.Piece], signing: Signing) -> Iterator[Copy]:
  """The documents to drop, by the signatures in `folder`."""
  index = signatures.library().MinHashLSH(threshold=signing.threshold, num_perm=signing.num_perm)
  kept: list[tuple[str, str]] = []  # (id, domain)
  by_digest: dict[bytes, int] = {}
  hashes_by_number: dict[int, np.ndarray] = {}
  for piece in sorted(every, key=lambda piece: piece.name.startswith('train/')):  # stable: else in order
    domain = piece.name.rpartition('-')[0]
    for row, (identity, digest, hashes_P, shingled) in enumerate(
        signatures.each(signatures.read(signatures.path(folder, piece))), piece.start):
      number, similarity = by_digest.get(digest), 1.0
      if number is None and shingled:
        query = signatures.minhash(signing, hashes_P)
        for candidate in sorted(index.query(query)):
          similarity = float(np.mean(hashes_by_number[candidate] == hashes_P))
          if similarity >= signing.threshold:
            number = candidate
            break
      if number is not None:
        yield Copy(piece.source, row, *kept[number], similarity, 'exact copy' if digest in by_digest else 'near copy')
        continue
      number = len(kept)
      kept.append((identity, domain))
      by_digest[digest] = number
      if shingled:
        hashes_by_number[number] = hashes_P.copy()  # not a view: the piece's array is let go
        index.insert(number, query)


def main(argv: list[str]) -> None:
  """The command line."""
  logging.basicConfig(level=logging.INFO, stream=sys.stderr, format='%(message)s')
  parser = argparse.ArgumentParser('datasel.methods.prox.dedup', allow_abbrev=False)
  add_flags(parser)
  parser.add_argument('--workers', type=int, default=1, help='processes')
  args = parser.parse_args(argv)
  try:
    output = dedup(args.corpus, args.out, workers=args.workers, **options(args))
    print(tables.statistics(output.statistics, {}), flush=True)
    refining_job.require_train(output)
  except local.Interrupted as e:
    _log.warning('%s', e)
    sys.exit(143)
  except (ValueError, OSError, RuntimeError, ImportError) as e:
    sys.exit(f'{parser.prog}: {e}')


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags that say what output is made, wherever the work is done."""
  parser.add_argument('--corpus', required=True, help='folder holding {train,validation}/DOMAIN.jsonl')
  parser.add_argument('--out', required=True, help='the corpus to write')
  parser.add_argument('--threshold', type=float, default=Signing.threshold, help='similarity of near copies')
  parser.add_argument('--num_perm', type=int, default=Signing.num_perm, help='hashes of a signature')
  parser.add_argument('--ngram', type=int, default=Signing.ngram, help='words')
  parser.add_argument('--rows', type=int, default=pieces.ROWS, help='documents for each output file')


def options(args: argparse.Namespace) -> dict[str, Any]:
  """Of `dedup`, from the flags."""
  return {'signing': Signing(args.threshold, args.num_perm, args.ngram), 'rows': args.rows}


def _done(folder: pathlib.Path) -> pathlib.Path:
  return folder / 'copies/done'


def _file(folder: pathlib.Path, source: str) -> pathlib.Path:
  return folder / f'copies/{workdir.digest(source)[:16]}.json'


def _write(folder: pathlib.Path, planned: dict[str, Any], found: Iterator[Copy]) -> None:
  """{row: copy} of each source in a file of its own, then the mark that all are there."""
  for source, group in itertools.groupby(found, lambda copy: copy.source):
    workdir.write_json(_file(folder, source), {str(copy.row): dataclasses.asdict(copy) for copy in group})
  workdir.write_json(_done(folder), True)


def _work(job: Job) -> refining_job.Work:
  held: dict[str, dict[str, Any]] = {}

  def without_copies(source: str, documents: list[corpora.Document], first: int) -> list[refining.Refined]:
    if source not in held:
      held.clear()
      file = _file(job.folder, source)
      held[source] = workdir.read_json(file) if file.exists() else {}
    copies_of = [held[source].get(str(row)) for row in range(first, first + len(documents))]
    refined = refining.carry_out(documents, [
      {'id': document.id, 'sha256': refining.digest(document.text), 'chunks': [],
       'document': {'program': 'drop_doc()' if copy else 'keep_doc()', 'score': None,
                    'reason': copy['reason'] if copy else '', 'truncated': False, 'tokens': 0}}
      for document, copy in zip(documents, copies_of)])
    for one, copy in zip(refined, copies_of):
      if copy:
        one.record['copy_of'] = {'id': copy['of'], 'domain': copy['domain'], 'similarity': copy['similarity']}
    return refined

  return without_copies


if __name__ == '__main__':
  from datasel.methods.prox import dedup as itself  # workers can import its functions, but not those of __main__
  itself.main(sys.argv[1:])
