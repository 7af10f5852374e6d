"""Rules, the carrying out of given programs, statistics and the search for copies on any Apache Beam runner: the same
output, bit for bit, as of local workers.

  python -m datasel.methods.prox.beam refine --corpus CORPUS --out OUT --rules gopher+c4+fineweb \\
    --runner=DirectRunner --direct_running_mode=multi_processing --direct_num_workers=8
  python -m datasel.methods.prox.beam refine --corpus CORPUS --out OUT2 --programs_of OUT --compat ...
  python -m datasel.methods.prox.beam dedup --corpus CORPUS --out OUT --threshold 0.8 ...

Flags that are not those of `refine` or `dedup` are the pipeline's.  CORPUS and OUT lie where this process and all
workers see them under the same path, on a file system with locks.  It may be killed at any moment and started again.
"""

import argparse
import dataclasses
import functools
import json
import logging
import sys
from collections.abc import Sequence

from datasel.methods.prox import dedup, pieces, refine, refining_job, rule_refiner, tables
from datasel.methods.prox.refining_job import Job


def run(do: refining_job.Do, job: Job, left: list[pieces.Piece], pipeline_options: Sequence[str] = ()) -> None:
  """Does pieces by the workers of a pipeline; a `local.RunAll` for `refine.refine` and `dedup.dedup`.

  pipeline_options: flags of Beam; none runs it in this process.  Raises ValueError for bad rows, RuntimeError for a job
  that failed otherwise (finished batches are kept), ImportError without Beam.
  """
  beam, options = _beam(pipeline_options)
  refused = job.folder / 'refused'
  refused.unlink(missing_ok=True)
  # Pieces are named in JSON.  The reshuffle lets the runner hand out each by itself; without, all may go to one worker.
  work = [json.dumps(dataclasses.asdict(piece)) for piece in left]
  try:
    pipeline = beam.Pipeline(options=options)
    _ = (pipeline | 'pieces' >> beam.Create(work) | beam.Reshuffle()
         | 'do' >> beam.Map(functools.partial(_do, do, job)))
    state = pipeline.run().wait_until_finish()
  except RuntimeError as e:
    last = next((line for line in reversed(str(e).splitlines()) if line.strip()), '')
    raise RuntimeError(f'the Beam job failed: {last}; start again: finished batches are kept') from e
  if refused.exists():
    raise ValueError(refused.read_text(encoding='utf-8').strip())
  if state != beam.runners.runner.PipelineState.DONE:
    raise RuntimeError(f'the Beam job ended as {state}, want DONE; start again: finished batches are kept')


def main(argv: list[str]) -> None:
  """The command line."""
  logging.basicConfig(stream=sys.stderr, format='%(message)s')
  logging.getLogger('datasel').setLevel(logging.INFO)  # Beam's own say a screenful for every worker
  commands = {'refine': (refine.add_flags, _refine), 'dedup': (dedup.add_flags, _dedup)}
  if argv[:1] not in ([name] for name in commands):
    sys.exit(f'datasel.methods.prox.beam: want a command first: {" or ".join(commands)}')
  add_flags, command = commands[argv[0]]
  parser = argparse.ArgumentParser(f'datasel.methods.prox.beam {argv[0]}', allow_abbrev=False,
                                   epilog='All other flags are the Beam pipeline\'s: --runner=DirectRunner, for one.')
  add_flags(parser)
  args, pipeline_options = parser.parse_known_args(argv[1:])
  try:
    output = command(args, functools.partial(run, pipeline_options=pipeline_options))
    if output is None:
      raise RuntimeError(f'the Beam job is done, but {args.out}.partial lacks pieces: is that folder one and the same '
                         'for all workers and for this process?  Put it where all see it')
    print(tables.statistics(output.statistics, {}), flush=True)
    refining_job.require_train(output)
  except (ValueError, OSError, RuntimeError, ImportError) as e:
    sys.exit(f'{parser.prog}: {e}')


def _refine(args: argparse.Namespace, run_all):
  if bool(args.rules) == bool(args.programs_of):
    raise ValueError('want one of --rules and --programs_of; a model runs with datasel.methods.prox.refine')
  refiner = rule_refiner.RuleRefiner(args.rules) if args.rules else None
  return refine.refine(args.corpus, args.out, refiner, run_all=run_all, **refine.options(args))


def _dedup(args: argparse.Namespace, run_all):
  return dedup.dedup(args.corpus, args.out, run_all=run_all, **dedup.options(args))


def _do(do: refining_job.Do, job: Job, piece: str) -> None:
  """Does one piece, on a worker; bad rows are reported in a file, not raised: a runner would only try again."""
  try:
    do(job, [pieces.Piece(**json.loads(piece))], lambda counted: None, lambda: False)
  except ValueError as e:
    with open(job.folder / 'refused', 'a', encoding='utf-8') as f:
      f.write(f'{e}\n')


def _beam(flags: Sequence[str]):
  """Beam and its options of these flags; ValueError for one that it does not know, and would only warn of."""
  try:
    import apache_beam
    from apache_beam.options import pipeline_options
  except ImportError as e:
    raise ImportError(f'this needs Apache Beam ({e}); install it with: pip install \'datasel[seqio]\'') from e
  options = pipeline_options.PipelineOptions(list(flags))
  known = options.get_all_options()
  for flag in flags:
    name = flag.removeprefix('--').partition('=')[0]
    if flag.startswith('--') and name not in known and name.removeprefix('no_') not in known:
      raise ValueError(f'unknown flag --{name}, of this command or of Beam')
  return apache_beam, options


if __name__ == '__main__':
  from datasel.methods.prox import beam as itself  # workers can import its functions, but not those of __main__
  itself.main(sys.argv[1:])
