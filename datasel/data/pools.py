"""Many sources packed by worker processes on this machine, with progress."""

import concurrent.futures
import functools
import logging
import multiprocessing
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool

from datasel.data import corpus, shards

Job = tuple[corpus.Source, shards.Settings]

_log = logging.getLogger(__name__)
_SECONDS_BETWEEN_LINES = 5


def pack_all(jobs: list[Job], folder: pathlib.Path, workers: int) -> Iterator[tuple[str, dict]]:
  """(source name, result of `shards.pack_file`) of every job, in any order, with the tokenizer in FOLDER/tokenizer.

  workers: processes; 1 does the work in this one.
  Raises what `pack_file` raises, and RuntimeError when a worker was killed; finished results stay in `folder`.
  """
  progress = Progress([source for source, _ in jobs])
  pack = functools.partial(_pack, folder)
  if workers == 1:
    for source, settings in jobs:
      result = pack(source, settings, progress.add)
      progress.finished(source)
      yield source.name, result
    return
  # spawn: the tokenizer's threads would not survive a fork.
  context = multiprocessing.get_context('spawn')
  counters = context.Array('q', 2)
  pool = concurrent.futures.ProcessPoolExecutor(min(workers, len(jobs)), context, _start_worker, (counters,))
  try:
    # Largest first, so that no worker is left alone with a large file at the end.
    futures = {pool.submit(pack, *job): job[0] for job in sorted(jobs, key=lambda job: -job[0].size)}
    pending = set(futures)
    while pending:
      done, pending = concurrent.futures.wait(pending, timeout=1, return_when='FIRST_COMPLETED')
      progress.documents, progress.tokens = counters
      progress.show()
      for future in done:
        result = future.result()
        progress.finished(futures[future])
        yield futures[future].name, result
  except BrokenProcessPool as e:
    raise RuntimeError('a worker process was killed, perhaps for want of memory; start again with fewer workers: '
                       'finished files are kept') from e
  finally:
    pool.shutdown(cancel_futures=True)


class Progress:
  """Counts what is done and logs a line now and then."""

  def __init__(self, sources: list[corpus.Source]):
    self.documents = self.tokens = self.files = self.bytes = 0
    self._all_files = len(sources)
    self._all_bytes = sum(source.size for source in sources)
    self._began = self._last = time.monotonic()

  def add(self, documents: int, tokens: int) -> None:
    self.documents += documents
    self.tokens += tokens
    self.show()

  def finished(self, source: corpus.Source) -> None:
    self.files += 1
    self.bytes += source.size
    self.show(last=self.files == self._all_files)

  def show(self, last: bool = False) -> None:
    now = time.monotonic()
    if not last and now - self._last < _SECONDS_BETWEEN_LINES:
      return
    self._last, seconds = now, now - self._began
    left = f'{seconds * (self._all_bytes / self.bytes - 1):.0f} s left' if self.bytes else 'time left not known yet'
    _log.info('%d of %d files, %d documents, %.1f M tokens (%.2f M/s), %s', self.files, self._all_files, self.documents,
              self.tokens / 1e6, self.tokens / 1e6 / max(seconds, 1e-9), left)


_counters = None  # in a worker process: the documents and tokens of all workers


def _start_worker(counters) -> None:
  global _counters
  _counters = counters
  os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # the processes are the parallelism
  threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
  multiprocessing.parent_process().join()
  os._exit(1)  # the parent was killed: no one waits for this work


def _count(documents: int, tokens: int) -> None:
  with _counters.get_lock():
    _counters[0] += documents
    _counters[1] += tokens


def _pack(folder: pathlib.Path, source: corpus.Source, settings: shards.Settings,
          progress: Callable[[int, int], None] = _count) -> dict:
  return shards.pack_file(source, folder, folder / 'tokenizer', settings, progress)
