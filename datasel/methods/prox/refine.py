"""A corpus refined: documents dropped and edited by a refiner's programs, and a record of what became of each.

  python -m datasel.methods.prox.refine --corpus CORPUS --out OUT --rules gopher+c4+fineweb --workers 8
  python -m datasel.methods.prox.refine --corpus CORPUS --out OUT --document_refiner DIR --chunk_refiner DIR

OUT is a corpus, with the same domains, splits, ids and fields; `audit` has what lies beside it.  It may be killed at
any moment: started again, it goes on after the last batch, and ends with the same bytes.  On several hosts that see
the same folders each runs it with its own --shard i/n; the last one to end puts OUT in its place.
"""

import argparse
import functools
import itertools
import logging
import os
import pathlib
import re
import signal
import sys
from collections.abc import Iterator
from typing import Any

from datasel.data import corpus as corpora
from datasel.methods.prox import audit, inspect, local, pieces, refining, refining_job, rule_refiner, tables

_log = logging.getLogger(__name__)
_EXAMPLES = 2  # of each decision, in a dry run


def refine(corpus: str | os.PathLike, out: str | os.PathLike, refiner: refining.Refiner | None = None, *,
           workers: int = 1, shard: tuple[int, int] = (0, 1),
           run_all: local.RunAll | None = None, **options: Any) -> audit.Output | None:
  """Refines a corpus into `out`; the finished output, or None where other shards have still to end.

  refiner: one that can be sent to processes, such as rules, for more than one of workers.  shard: (i, n), the i-th of n
  parts of the work.  options: of `refining_job.make`: programs_of, compat, tokenizer_path, rows, batch.  run_all: does
  pieces elsewhere than in processes of this machine (`beam` has one).
  An output already there by the same settings is returned; another is never touched.
  Raises ValueError for bad rows, settings that can't work, or damaged files; RuntimeError for a worker that was killed;
  local.Interrupted on SIGTERM or Ctrl-C, with all finished batches saved.
  """
  index, count = shard
  if workers < 1 or not 0 <= index < count:
    raise ValueError(f'workers is {workers}, shard {index}/{count}; want at least 1 worker, and a shard 0/n to n-1/n')
  job = refining_job.make(corpus, out, refiner, **options)
  planned = refining_job.plan(job)
  if not (pathlib.Path(job.out) / 'manifest.json').exists():
    every = refining_job.pieces_of(planned)
    mine = every[len(every) * index // count:len(every) * (index + 1) // count]
    run_all = run_all or functools.partial(local.run, workers=workers)
    run_all(refining_job.do, job, refining_job.unfinished(job, mine))
  output = refining_job.finish(job, planned)
  if output is None:
    _log.info('shard %d/%d is done; %s appears when the others are', index, count, out)
  return output


def dry_run(corpus: str | os.PathLike, refiner: refining.Refiner, n: int, *,
            compat: bool = False) -> tuple[list[tuple[corpora.Document, refining.Refined]], dict[str, Any]]:
  """The first n documents refined, as many of each train domain as can be, and their statistics; writes nothing."""
  listed = corpora.Corpus(corpus)
  streams = [itertools.chain.from_iterable(map(corpora.documents, listed.sources['train'][domain]))
             for domain in listed.domains]
  # One of each in turn; a stream that has ended gives None.
  turns = itertools.chain.from_iterable(itertools.zip_longest(*streams))
  documents = list(itertools.islice((document for document in turns if document is not None), n))
  refined = []
  for start in range(0, len(documents), pieces.BATCH):
    refined += refining.refine(documents[start:start + pieces.BATCH], refiner, compat=compat)
  counted: dict[str, Any] = {}
  for one in refined:
    audit.add(counted, audit.counts(one.record))
  return list(zip(documents, refined)), audit.in_order(counted)


def main(argv: list[str]) -> None:
  """The command line."""
  logging.basicConfig(level=logging.INFO, stream=sys.stderr, format='%(message)s')
  parser = argparse.ArgumentParser('datasel.methods.prox.refine', allow_abbrev=False)
  add_flags(parser)
  parser.add_argument('--document_refiner', help='folder of a fine-tuned document refiner')
  parser.add_argument('--chunk_refiner', help='folder of a fine-tuned chunk refiner')
  parser.add_argument('--workers', type=int, default=1, help='processes; for rules and --programs_of')
  parser.add_argument('--shard', type=_shard, default=(0, 1), help='i/n: this is the i-th, from 0, of n processes')
  parser.add_argument('--dry_run', type=int, metavar='N', help='refine N documents, show what became of them, and stop')
  args = parser.parse_args(argv)
  try:
    for text in _run(args):
      print(text, flush=True)
  except local.Interrupted as e:
    _log.warning('%s', e)
    sys.exit(128 + signal.SIGTERM)
  except (ValueError, OSError, RuntimeError, ImportError) as e:
    sys.exit(f'{parser.prog}: {e}')


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags that say what output is made, wherever the work is done, but for a model's."""
  parser.add_argument('--corpus', required=True, help='folder holding {train,validation}/DOMAIN.jsonl')
  parser.add_argument('--out', required=True, help='the corpus to write')
  parser.add_argument('--rules', help='rules joined by +: gopher+c4+fineweb')
  parser.add_argument('--programs_of', help='a finished output: its programs are carried out again')
  parser.add_argument('--compat', action='store_true', help='the authors\' executor')
  parser.add_argument('--tokenizer', help='counts tokens for the statistics')
  parser.add_argument('--rows', type=int, default=pieces.ROWS, help='documents for each output file')
  parser.add_argument('--batch', type=int, default=pieces.BATCH, help='documents at once')


def options(args: argparse.Namespace) -> dict[str, Any]:
  """Of `refining_job.make`, from the flags."""
  return {'programs_of': args.programs_of, 'compat': args.compat, 'tokenizer_path': args.tokenizer, 'rows': args.rows,
          'batch': args.batch}


def _run(args: argparse.Namespace) -> Iterator[str]:
  of_model = args.document_refiner or args.chunk_refiner
  if bool(args.rules) + bool(of_model) + bool(args.programs_of) != 1:
    raise ValueError('want one of --rules, --programs_of, or --document_refiner with or without --chunk_refiner')
  if of_model and args.workers > 1:
    raise ValueError(f'--workers {args.workers} with a model: want one process for each accelerator, with --shard i/n')
  if args.rules:
    refiner = rule_refiner.RuleRefiner(args.rules)
  elif of_model:
    from datasel.methods.prox import refiner as models
    refiner = models.Refiner.load(args.document_refiner, args.chunk_refiner)
  else:
    refiner = None
  if args.dry_run is not None:
    if refiner is None:
      raise ValueError('--dry_run with --programs_of: want --rules or a model')
    if args.dry_run < 1:
      raise ValueError(f'--dry_run {args.dry_run}; want at least 1 document')
    yield _shown(*dry_run(args.corpus, refiner, args.dry_run, compat=args.compat), args.compat)
    return
  output = refine(args.corpus, args.out, refiner, workers=args.workers, shard=args.shard, **options(args))
  if output is None:
    yield f'shard {args.shard[0]}/{args.shard[1]} is done'
    return
  yield tables.statistics(output.statistics, getattr(refiner, 'flops_per_token', {}))
  refining_job.require_train(output)


def _shown(pairs: list[tuple[corpora.Document, refining.Refined]], counted: dict[str, Any], compat: bool) -> str:
  """The statistics, and an example or two of each decision."""
  shown: dict[str, list[str]] = {decision: [] for decision in audit.DECISIONS}
  for document, one in pairs:
    if len(shown[one.record['decision']]) < _EXAMPLES:
      case = inspect.Case('dry run', one.record, document.text, one.text, compat=compat)
      shown[one.record['decision']].append(inspect.terminal(case, colour=sys.stdout.isatty()))
  return '\n'.join([*itertools.chain.from_iterable(shown.values()), tables.total(counted, {})])


def _shard(text: str) -> tuple[int, int]:
  match = re.fullmatch(r'(\d{1,6})/(\d{1,6})', text, re.ASCII)
  if not match:
    raise argparse.ArgumentTypeError(f'{text!r}; want i/n, such as 0/4')
  return int(match[1]), int(match[2])


if __name__ == '__main__':
  from datasel.methods.prox import refine as itself  # workers can import its functions, but not those of __main__
  itself.main(sys.argv[1:])
