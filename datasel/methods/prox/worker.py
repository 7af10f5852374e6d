"""One thread that does what many ask: it owns the device, and does waiting requests of a kind together."""

import dataclasses
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any


class Refused(Exception):
  """A request that is answered with an error.  message: for the client."""

  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status, self.message = status, message


@dataclasses.dataclass(frozen=True)
class Asked:
  """What a request asks of the worker.  key: requests of one key may be done together.  items: for `Endpoint.work`."""
  key: Hashable
  items: Sequence[Any]
  answer: Callable[[list], dict]


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """read: the request's object -> what it asks; raises Refused.  work: (key, items) -> what comes of each item, in
  order; only the worker's thread calls it, and a ValueError of it is the client's error."""
  read: Callable[[dict], Asked]
  work: Callable[[Hashable, list], list]


class _Job:

  def __init__(self, endpoint: Endpoint, asked: Asked):
    self.endpoint, self.asked, self.done, self.given_up = endpoint, asked, threading.Event(), False
    self.kind, self.size = (id(endpoint), asked.key), len(asked.items)
    self.results: list = []
    self.error: Exception | None = None


class Worker:
  """The thread that does all work, oldest request first, with those beside it that are of its kind.

  waiting: requests at most.  together: items that are done at a time, unless one request has more.  seconds: that a
  request waits for its answer.
  """

  def __init__(self, *, waiting: int, together: int, seconds: float):
    self._waiting, self._together, self._seconds = waiting, together, seconds
    self._jobs: list[_Job] = []
    self._stopped = False
    self._changed = threading.Condition()
    self._thread = threading.Thread(target=self._run, name='worker', daemon=True)
    self._thread.start()

  def do(self, endpoint: Endpoint, asked: Asked) -> list:
    """What comes of the items.  Refused with 429 or 503 where it does not come, 400 where it cannot."""
    job = _Job(endpoint, asked)
    with self._changed:
      if self._stopped:
        raise Refused(503, 'the server is stopping')
      if len(self._jobs) >= self._waiting:
        raise Refused(429, f'{len(self._jobs)} requests are waiting; try again later')
      self._jobs.append(job)
      self._changed.notify()
    if not job.done.wait(self._seconds):
      job.given_up = True
      raise Refused(503, f'no answer within {self._seconds:g} s; try again later, or ask for less')
    if isinstance(job.error, ValueError):
      raise Refused(400, str(job.error))
    if job.error is not None:
      raise job.error
    return job.results

  def stop(self) -> None:
    """Does what waits, takes no more, and ends."""
    with self._changed:
      self._stopped = True
      self._changed.notify()
    self._thread.join()

  def _run(self) -> None:
    while jobs := self._take():
      self._do(jobs)

  def _take(self) -> list[_Job]:
    """The next jobs to do together; none once the worker has stopped."""
    with self._changed:
      taken: list[_Job] = []
      while not taken:
        self._changed.wait_for(lambda: self._jobs or self._stopped)
        if not self._jobs:
          return []
        self._jobs = [job for job in self._jobs if not job.given_up]
        n_items = 0
        for job in self._jobs:
          if not taken or job.kind == taken[0].kind and n_items + job.size <= self._together:
            taken.append(job)
            n_items += job.size
        self._jobs = [job for job in self._jobs if job not in taken]
      return taken

  def _do(self, jobs: list[_Job]) -> None:
    endpoint, key = jobs[0].endpoint, jobs[0].asked.key
    try:
      results = iter(endpoint.work(key, [item for job in jobs for item in job.asked.items]))
      for job in jobs:
        job.results = [next(results) for _ in range(job.size)]
    except Exception as e:
      if len(jobs) > 1:  # one request's fault is not its neighbours'
        for job in jobs:
          self._do([job])
        return
      jobs[0].error = e
    for job in jobs:
      job.done.set()
