"""Several processes that run one command together: who writes, what they agree on, what becomes of an error.

Process 0 leads: it alone takes the lock and writes the run's JSON files, metrics and report.  Wherever the others need
what it wrote, they wait for it in one of the functions below, which also carry an error from the process that has it to
all the others: then every process ends, with a message.  An error that the others cannot know of (a host that died, a
damaged shard on one host's disk) ends them too: the process that has it leaves, and after at most _LEAVE_SECONDS jax
ends those that still wait for it; one that could not even leave is missed after _SILENT_SECONDS.

With one process, all of this is a plain call.
"""

import json
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_VARIABLES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
_JOIN_SECONDS = 1800  # until the slowest host has begun
_SILENT_SECONDS = 100  # without a heartbeat, a process counts as dead
_LEAVE_SECONDS = 30  # a process that is done waits so long for the others
_PAD = 512  # bytes; messages of many lengths share few compiled programs


class PeerFailed(Exception):
  """Another process failed, and this one ends with it."""


class PeerRefused(PeerFailed):
  """Another process found the input bad: its error is a ValueError."""


def join() -> None:
  """Finds the other processes of this command; the first thing that jax is asked to do.

  On TPU pods, GKE and Slurm jax knows where they are.  Elsewhere three environment variables say it:
  JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES, JAX_PROCESS_ID.
  Raises ValueError for some but not all of them, or where jax finds no cluster, and RuntimeError where the others do
  not come in time.
  """
  given = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
  arguments: dict[str, Any] = {}
  if given:
    missing = [name for name in _VARIABLES if name not in given]
    if missing:
      raise ValueError(f'--distributed: {", ".join(given)} set, but not {", ".join(missing)}; set all three, or none')
    address, *numbers = given.values()
    if not all(number.isdecimal() for number in numbers) or int(numbers[1]) >= int(numbers[0]):
      raise ValueError(f'--distributed: JAX_NUM_PROCESSES {numbers[0]!r} and JAX_PROCESS_ID {numbers[1]!r}: want a '
                       'number of processes, and one of 0 ... number - 1')
    if not re.fullmatch(r'.+:\d+', address):
      raise ValueError(f'--distributed: JAX_COORDINATOR_ADDRESS {address!r} has no port; want HOST:PORT of process 0, '
                       'such as 10.0.0.1:1234')
    arguments = {'coordinator_address': address, 'num_processes': int(numbers[0]), 'process_id': int(numbers[1])}
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  # The training loop answers SIGTERM itself; jax's own service would take the signal away from it.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(**arguments, initialization_timeout=_JOIN_SECONDS,
                               heartbeat_timeout_seconds=_SILENT_SECONDS, shutdown_timeout_seconds=_LEAVE_SECONDS)
  except ValueError as e:
    raise ValueError(f'--distributed: jax found no cluster here ({e}); set {", ".join(_VARIABLES)}, or leave the flag '
                     'out for a run of one process') from e


def leave() -> None:
  """Waits for the others to be done as well; the last thing that is done."""
  if jax.distributed.is_initialized():
    jax.distributed.shutdown()


def lead() -> bool:
  """Whether this process is the one that writes."""
  return jax.process_index() == 0


def index() -> int:
  """Which of the processes this is, from 0."""
  return jax.process_index()


def together(doing: str, function: Callable[[], Any]) -> Any:
  """function() of each process, when all have done it.  Where it raises on one, the others raise PeerFailed, or
  PeerRefused for a ValueError."""
  if jax.process_count() == 1:
    return function()
  result, failure = None, None
  try:
    result = function()
  except Exception as e:
    failure = e
  kind = 'ValueError' if isinstance(failure, ValueError) else type(failure).__name__
  failures = _gather('' if failure is None else f'{kind}: {failure}')
  if failure is not None:
    raise failure
  for process, message in enumerate(failures):
    if message:
      refused = message.startswith('ValueError: ')
      raise (PeerRefused if refused else PeerFailed)(f'process {process} failed, {doing}: {message}')
  return result


def from_lead(doing: str, function: Callable[[], Any]) -> Any:
  """function() of process 0, a JSON value, on every process; if it raises there, the others raise PeerFailed."""
  if jax.process_count() == 1:
    return function()
  result = together(doing, function if lead() else lambda: None)
  return json.loads(_gather(json.dumps(result) if lead() else '')[0])


def agree(what: str, values: dict[str, Any]) -> None:
  """Raises ValueError on every process, naming what differs, unless all have equal JSON values."""
  if jax.process_count() == 1:
    return
  first, *others = map(json.loads, _gather(json.dumps(values)))
  for process, other in enumerate(others, 1):
    differ = [f'{key} {other.get(key)!r} (process 0: {first.get(key)!r})' for key in sorted(first.keys() | other.keys())
              if other.get(key) != first.get(key)]
    if differ:
      raise ValueError(f'process {process} has another {what}: {", ".join(differ)}; start every process with the same '
                       'command, code and data')


def any_of(flag: bool) -> bool:
  """Whether `flag` is true on any process."""
  if jax.process_count() == 1:
    return flag
  with jax.transfer_guard('allow'):
    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def _gather(text: str) -> list[str]:
  """The text of every process, on every process."""
  data = np.frombuffer(text.encode(), np.uint8)
  with jax.transfer_guard('allow'):
    lengths = multihost_utils.process_allgather(np.asarray(len(data), np.int32))
    padded = np.zeros(-(-max(int(lengths.max()), 1) // _PAD) * _PAD, np.uint8)
    padded[:len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
  return [row[:length].tobytes().decode() for row, length in zip(rows, lengths)]
