"""A refinement's pieces done by processes of this machine, with progress."""

import concurrent.futures
import contextlib
import itertools
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from datasel.methods.prox import audit, pieces, refining_job
from datasel.methods.prox.refining_job import Job

_log = logging.getLogger(__name__)
_SECONDS_BETWEEN_LINES = 5
_RUNS = 4  # of pieces, for each worker: more are fairer, and each reads its first file up to its first row

RunAll = Callable[[refining_job.Do, Job, list[pieces.Piece]], None]


class Interrupted(Exception):
  """SIGTERM or Ctrl-C arrived; all finished batches are saved."""


def run(do: refining_job.Do, job: Job, left: list[pieces.Piece], workers: int = 1) -> None:
  """Does pieces, by a function of a module, in processes of this machine; 1: in this one."""
  progress = Progress(sum(piece.stop - piece.start for piece in left))
  with _stop_requests() as stopping:
    if min(workers, len(left)) <= 1:
      done = do(job, left, lambda counted: progress.add(*_figures(counted)), stopping)
    else:
      done = _run_pool(do, job, left, workers, progress, stopping)
  if not done:
    raise Interrupted(f'stopped; {job.folder} holds all finished batches: repeat the command to go on')
  progress.show(last=True)


class Progress:
  """Counts what is done and logs a line now and then."""

  def __init__(self, n_documents: int):
    self.documents = self.words = self.left = 0
    self._all = n_documents
    self._began = self._last = time.monotonic()

  def add(self, documents: int, words: int, left: int) -> None:
    self.documents += documents
    self.words += words
    self.left += left
    self.show()

  def show(self, last: bool = False) -> None:
    now = time.monotonic()
    if not self.documents or not last and now - self._last < _SECONDS_BETWEEN_LINES:
      return
    self._last, seconds = now, max(now - self._began, 1e-9)
    _log.info('%d of %d documents, %.0f documents/s, %.0fk words/s, %.1f %% of words left, %.0f s left', self.documents,
              self._all, self.documents / seconds, self.words / seconds / 1e3, 100 * self.left / max(self.words, 1),
              seconds * (self._all / self.documents - 1))


@contextlib.contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
  """Whether SIGTERM or a first Ctrl-C has come; a second Ctrl-C ends at once."""
  asked: list[int] = []

  def handler(signum, frame):
    if asked and signum == signal.SIGINT:
      raise KeyboardInterrupt
    asked.append(signum)
    _log.warning('%s: stopping after this batch', signal.Signals(signum).name)

  try:
    previous = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT)}
  except ValueError:  # not the main thread: its owner handles signals
    previous = {}
  try:
    yield lambda: bool(asked)
  finally:
    for s, old in previous.items():
      signal.signal(s, old)


def _run_pool(do: refining_job.Do, job: Job, left: list[pieces.Piece], workers: int, progress: Progress,
              stopping: Callable[[], bool]) -> bool:
  # spawn: the threads of jax and of tokenizers would not survive a fork.
  context = multiprocessing.get_context('spawn')
  counters, stop = context.Array('q', 3), context.Event()
  n_runs = min(len(left), workers * _RUNS)
  ends = [len(left) * i // n_runs for i in range(n_runs + 1)]
  pool = concurrent.futures.ProcessPoolExecutor(min(workers, n_runs), context, _start_worker, (counters, stop))
  try:
    pending = {pool.submit(_do, do, job, left[first:last]) for first, last in itertools.pairwise(ends)}
    done = True
    while pending:
      ended, pending = concurrent.futures.wait(pending, timeout=0.5, return_when='FIRST_COMPLETED')
      progress.documents, progress.words, progress.left = counters
      progress.show()
      done &= all([future.result() for future in ended])
      if stopping():
        stop.set()
    return done
  except BrokenProcessPool as e:
    raise RuntimeError('a worker process was killed, perhaps for want of memory; start again with fewer workers: '
                       'finished batches are kept') from e
  finally:
    stop.set()
    pool.shutdown(cancel_futures=True)


_counters = _stop = None  # in a worker process: what all workers have done; whether to stop


def _start_worker(counters, stop) -> None:
  global _counters, _stop
  _counters, _stop = counters, stop
  os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # the processes are the parallelism
  for s in (signal.SIGTERM, signal.SIGINT):  # the first process says when to stop, also where all are signalled
    signal.signal(s, signal.SIG_IGN)
  threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
  multiprocessing.parent_process().join()
  os._exit(1)  # the parent was killed: no one waits for this work


def _do(do: refining_job.Do, job: Job, some: list[pieces.Piece]) -> bool:
  def count(counted: dict[str, Any]) -> None:
    with _counters.get_lock():
      for n, figure in enumerate(_figures(counted)):
        _counters[n] += figure

  return do(job, some, count, _stop.is_set)


def _figures(counted: dict[str, Any]) -> tuple[int, int, int]:
  """Documents, words, and words left, of statistics."""
  return (audit.n_documents(counted), *(counted.get(when, {}).get('words', 0) for when in ('before', 'after')))
