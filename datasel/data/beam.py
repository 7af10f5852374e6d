"""`prepare` on any Apache Beam runner: the same token store, bit for bit, as local workers write.

  python -m datasel.data.beam --corpus CORPUS --store STORE --tokenizer tokenizer.json \\
    --runner=DirectRunner --direct_running_mode=multi_processing --direct_num_workers=8

Flags that are not `prepare`'s are the pipeline's.  CORPUS and STORE lie where this process and all workers see them
under the same path.  It may be killed at any moment: started again, it takes up the files it had not finished.
docs/beam.md has the options for Dataflow, Flink and Spark.
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import json
import logging
import os
import pathlib
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence

from datasel import prepare as preparing
from datasel import workdir
from datasel.data import corpus as corpora
from datasel.data import pools, shards
from datasel.data import store as stores

_SECONDS_BETWEEN_LOOKS = 5


def prepare(
    corpus: str | os.PathLike,
    store: str | os.PathLike,
    tokenizer: str | os.PathLike,
    *,
    length: int = 1024,
    holdout: float = 0.01,
    packing: str = 'concatenate',
    pipeline_options: Sequence[str] = (),
) -> stores.Store:
  """`datasel.prepare.prepare` with a Beam pipeline for its workers: same arguments, same store.

  pipeline_options: flags of Beam, such as '--runner=FlinkRunner'; none runs it in this process.
  Raises besides RuntimeError for a job that failed (what was finished is kept), ImportError without Beam.
  """
  urls = [str(path) for path in (corpus, store) if '://' in str(path)]
  if urls:
    raise ValueError(f'{", ".join(urls)}: want a path on a disk that all workers see, not a URL; see docs/beam.md')
  pack_all = functools.partial(_pack_all, pipeline_options=tuple(pipeline_options))
  return preparing.prepare(corpus, store, tokenizer, length=length, holdout=holdout, packing=packing,
                           pack_all=pack_all)


def main(argv: list[str]) -> None:
  """The command line."""
  logging.basicConfig(stream=sys.stderr, format='%(message)s')
  logging.getLogger('datasel').setLevel(logging.INFO)  # Beam's own say a screenful for every worker
  parser = argparse.ArgumentParser('datasel.data.beam', allow_abbrev=False,
                                   epilog='All other flags are the Beam pipeline\'s: --runner=DirectRunner, for one.')
  preparing.add_flags(parser)
  args, pipeline_options = parser.parse_known_args(argv)
  try:
    _check_flags(pipeline_options, list(vars(args)))
    print(preparing.summary(prepare(**vars(args), pipeline_options=pipeline_options)))
  except (ValueError, OSError, RuntimeError, ImportError) as e:
    sys.exit(f'{parser.prog}: {e}')


def _pack_all(jobs: list[pools.Job], folder: pathlib.Path,
              pipeline_options: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
  """(source name, result) of every job, packed into `folder` by the workers of a pipeline."""
  beam, options = _beam(), _options(pipeline_options)
  folder = folder.absolute()
  refusals = [_refusal(folder, source) for source, _ in jobs]
  for path in refusals:
    path.unlink(missing_ok=True)  # of an earlier run, whose text may have been repaired
  # Largest first, as far as the runner keeps the order.  Work is named in JSON: none of our objects is serialised.
  work = [_to_json(*job) for job in sorted(jobs, key=lambda job: -job[0].size)]
  with _showing_progress(jobs, folder):
    try:
      pipeline = beam.Pipeline(options=options)
      # The reshuffle lets the runner hand out each file by itself; without, all may go to one worker.
      _ = (pipeline | 'files' >> beam.Create(work) | beam.Reshuffle()
           | 'pack' >> beam.Map(functools.partial(_pack, str(folder))))
      state = pipeline.run().wait_until_finish()
    except RuntimeError as e:
      raise RuntimeError(f'the Beam job failed: {_last_line(e)}; start again: finished files are kept') from e
  if state != beam.runners.runner.PipelineState.DONE:
    raise RuntimeError(f'the Beam job ended as {state}, want DONE; start again: finished files are kept')
  refused = [path.read_text(encoding='utf-8') for path in refusals if path.exists()]
  if refused:
    raise ValueError('; '.join(refused))
  for source, settings in jobs:
    result = shards.read_result(folder, source, settings)
    if result is None:
      raise RuntimeError(f'the Beam job is done, but {source.name} was not packed in {folder}: is that folder one and '
                         'the same for all workers and for this process?  Put the store where all see it')
    yield source.name, result


def _pack(folder: str, work: str) -> None:
  """Packs one file into `folder`, on a worker; harmless when done twice, also at the same time.

  Text that can't be packed is reported in a file, not raised: a runner would only try it again.
  """
  source, settings = _from_json(work)
  folder = pathlib.Path(folder)
  if shards.finished(source, folder, settings):
    return
  # A folder of its own: workers on two hosts may have the same process id, and so the same temporary names.
  with tempfile.TemporaryDirectory(prefix='.', dir=folder) as own:
    try:
      shards.pack_file(source, own, folder / 'tokenizer', settings)
    except ValueError as e:
      with workdir.replacing(pathlib.Path(own) / 'refused', 'w') as f:
        f.write(str(e))
      os.replace(f'{own}/refused', _refusal(folder, source))
      return
    report = shards.result_path(pathlib.Path(own), source).name
    for name in sorted(os.listdir(own), key=lambda name: name == report):  # the report last: it vouches for the rest
      os.replace(f'{own}/{name}', folder / name)


def _to_json(source: corpora.Source, settings: shards.Settings) -> str:
  return json.dumps({
      'source': dataclasses.asdict(source) | {'path': str(source.path.absolute()),
                                              'files': [str(file.absolute()) for file in source.files]},
      'settings': dataclasses.asdict(settings)})


def _from_json(work: str) -> pools.Job:
  work = json.loads(work)
  paths = {'path': pathlib.Path(work['source']['path']), 'files': tuple(map(pathlib.Path, work['source']['files']))}
  return corpora.Source(**work['source'] | paths), shards.Settings(**work['settings'])


def _refusal(folder: pathlib.Path, source: corpora.Source) -> pathlib.Path:
  return shards.result_path(folder, source).with_suffix('.refused')


@contextlib.contextmanager
def _showing_progress(jobs: list[pools.Job], folder: pathlib.Path) -> Iterator[None]:
  """Logs, while the block runs, how many files are finished, told by their results in `folder`."""
  progress = pools.Progress([source for source, _ in jobs])
  ended = threading.Event()
  left = dict(enumerate(jobs))

  def look() -> None:
    for i, (source, settings) in list(left.items()):
      if result := shards.read_result(folder, source, settings):
        del left[i]
        counts = result['splits'].values()
        progress.add(sum(c['documents'] for c in counts), sum(c['tokens'] for c in counts))
        progress.finished(source)

  def watch() -> None:
    while not ended.wait(_SECONDS_BETWEEN_LOOKS):
      look()

  watcher = threading.Thread(target=watch, daemon=True)
  watcher.start()
  try:
    yield
  finally:
    ended.set()
    watcher.join()
    look()


def _beam():
  try:
    import apache_beam
  except ImportError as e:
    raise ImportError(f'this needs Apache Beam ({e}); install it with: pip install -e .[seqio]') from e
  return apache_beam


def _options(flags: Sequence[str]):
  _beam()
  from apache_beam.options import pipeline_options
  return pipeline_options.PipelineOptions(list(flags))


def _check_flags(flags: Sequence[str], ours: Sequence[str]) -> None:
  """Raises ValueError for a flag that looks like a misspelt one of ours: Beam would discard it with a warning."""
  theirs = _options(()).get_all_options()
  for flag in flags:
    name = flag.removeprefix('--').partition('=')[0]
    close = difflib.get_close_matches(name, ours, n=1, cutoff=0.75)
    if close and flag.startswith('--') and name not in theirs:
      raise ValueError(f'unknown flag --{name}; did you mean --{close[0]}?')


def _last_line(e: Exception) -> str:
  return next((line for line in reversed(str(e).splitlines()) if line.strip()), type(e).__name__)


if __name__ == '__main__':
  from datasel.data import beam  # workers can import its functions, but not those of __main__
  beam.main(sys.argv[1:])
