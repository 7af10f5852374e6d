"""Metrics of a run: one JSON line per record in metrics.jsonl, and the trackers that show them elsewhere too.

Every line has `stage`, `step` (updates applied) and `kind` ('train' or 'eval').  What a clock measured starts with
`time/`: all the rest is equal, to the last digit, whenever the run is repeated or resumed.
"""

import json
import math
import pathlib
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from datasel import processes, trackers, workdir
from datasel.trackers import Tracker, Value

_STAGE = re.compile(r'\w[\w.-]*(/\w[\w.-]*)*')


class Writer:
  """Appends to WORKDIR/metrics.jsonl, and tells the trackers.  A context manager.

  Of several processes only the first writes.  A tracker that fails is left out from then on, with a warning: what it
  shows is in metrics.jsonl.
  """

  def __init__(self, directory: pathlib.Path, trackers: Sequence[Tracker] = ()):
    self._path = pathlib.Path(directory) / 'metrics.jsonl'
    self._trackers = list(trackers)
    self._writes = processes.lead()
    if self._writes:
      self._path.parent.mkdir(parents=True, exist_ok=True)

  def rewind(self, stage: str, step: int) -> None:
    """Drops what an interrupted process wrote for `stage` after `step`, and a half-written last line."""
    if not self._writes:
      return
    if self._path.exists():
      kept = [line for line in _lines(self._path) if line['stage'] != stage or line['step'] <= step]
      with workdir.replacing(self._path, 'w') as f:
        f.writelines(json.dumps(line) + '\n' for line in kept)
    self._tell(lambda tracker: tracker.rewind(stage, step))

  def write(self, stage: str, kind: str, step: int, values: dict[str, Value]) -> None:
    if not self._writes:
      return
    line = {'stage': stage, 'kind': kind, 'step': step, **values}
    with open(self._path, 'a', encoding='utf-8') as f:
      f.write(json.dumps(line, allow_nan=False) + '\n')
    self._tell(lambda tracker: tracker.write(stage, kind, step, values))

  def __enter__(self) -> 'Writer':
    return self

  def __exit__(self, *exception: Any) -> None:
    self._tell(lambda tracker: tracker.close())

  def _tell(self, message: Callable[[Tracker], None]) -> None:
    for tracker in tuple(self._trackers):
      try:
        message(tracker)
      except Exception as e:  # weeks of training do not end because a service's client raised something
        trackers.warn(type(tracker).__name__, e)
        self._trackers.remove(tracker)


def read(directory: pathlib.Path, stage: str | None = None, kind: str | None = None) -> list[dict]:
  """The lines of a run's metrics.jsonl, in order, of one stage and kind if named."""
  path = pathlib.Path(directory) / 'metrics.jsonl'
  lines = _lines(path) if path.exists() else []
  return [line for line in lines if stage in (None, line['stage']) and kind in (None, line['kind'])]


class Progress:
  """Remaining time of a whole run from the FLOPs still to do, at the speed seen so far."""

  def __init__(self, total_flops: float):
    self._left = total_flops
    self._done = 0.0
    self._busy = 0.0

  def skip(self, flops: float) -> None:
    """Work that an earlier process already did."""
    self._left -= flops

  def add(self, flops: float, seconds: float) -> None:
    self._left -= flops
    self._done += flops
    self._busy += seconds

  @property
  def seconds_left(self) -> float:
    return max(self._left, 0.0) * self._busy / self._done if self._done else math.nan


class Stopwatch:
  """Seconds spent inside `with stopwatch:` blocks since the last `take()`."""

  def __init__(self):
    self._seconds = 0.0

  def __enter__(self) -> None:
    self._since = time.perf_counter()

  def __exit__(self, *exception: Any) -> None:
    self._seconds += time.perf_counter() - self._since

  def take(self) -> float:
    seconds, self._seconds = self._seconds, 0.0
    return seconds


def clock(seconds: float) -> str:
  """'1:02:03', or '?' when not known yet."""
  if not math.isfinite(seconds):
    return '?'
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


def _lines(path: pathlib.Path) -> list[dict]:
  text = path.read_bytes()
  whole = text[:text.rfind(b'\n') + 1]  # a kill may leave half a line at the end
  lines = []
  for number, line in enumerate(whole.splitlines(), 1):
    try:
      lines.append(json.loads(line))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
      raise ValueError(f'{path}, line {number} is not valid JSON ({e}); remove it, or restore a copy') from e
    record = lines[-1] if isinstance(lines[-1], dict) else {}
    # A stage names a folder of the run: nothing outside it.
    if not (_STAGE.fullmatch(str(record.get('stage', ''))) and 'kind' in record
            and isinstance(record.get('step'), int)):
      raise ValueError(f'{path}, line {number} is no record: want an object with stage, kind and a whole step; remove '
                       'it, or restore a copy')
  return lines
