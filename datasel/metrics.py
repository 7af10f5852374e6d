"""Metrics of a run: one JSON line per record, and TensorBoard or Weights & Biases when asked.

Every line has `stage`, `step` (updates applied) and `kind` ('train' or 'eval').  What a clock measured starts with
`time/`: all the rest is equal, to the last digit, whenever the run is repeated or resumed.
"""

import json
import math
import pathlib
import time
import uuid
from collections.abc import Iterator
from typing import Any

from datasel import processes, workdir

Value = float | int | dict[str, float]


class Writer:
  """Appends to WORKDIR/metrics.jsonl.  A context manager.  Of several processes only the first writes.

  TensorBoard finds a run for each stage in WORKDIR/tensorboard/STAGE, with tags KIND/NAME.  Weights & Biases sees one
  run, whose id is in WORKDIR/wandb_id.txt; what follows the last checkpoint is sent again after a restart.
  """

  def __init__(self, directory: pathlib.Path, *, tensorboard: bool = False, wandb_project: str = '',
               config: dict | None = None):
    self._path = pathlib.Path(directory) / 'metrics.jsonl'
    self._boards: dict[str, Any] | None = {} if tensorboard else None  # by stage, opened when needed
    self._wandb = None
    self._wandb_stages: set[str] = set()
    self._writes = processes.lead()
    if not self._writes:
      return
    self._path.parent.mkdir(parents=True, exist_ok=True)
    if wandb_project:
      try:
        import wandb
      except ImportError as e:
        raise ImportError("tracking.wandb_project is set, but wandb is not installed: pip install 'datasel[dev]', or "
                          'leave it empty') from e
      id_file = self._path.parent / 'wandb_id.txt'
      if not id_file.exists():
        with workdir.replacing(id_file, 'w') as f:
          f.write(uuid.uuid4().hex)
      self._wandb = wandb.init(project=wandb_project, config=config, dir=str(self._path.parent),
                               id=id_file.read_text().strip(), resume='allow')

  def rewind(self, stage: str, step: int) -> None:
    """Drops what an interrupted process wrote for `stage` after `step`, and a half-written last line."""
    if not self._writes:
      return
    if self._boards is not None:
      self._open_board(stage, purge_step=step + 1)
    if self._path.exists():
      kept = [line for line in _lines(self._path) if line['stage'] != stage or line['step'] <= step]
      with workdir.replacing(self._path, 'w') as f:
        f.writelines(json.dumps(line) + '\n' for line in kept)

  def write(self, stage: str, kind: str, step: int, values: dict[str, Value]) -> None:
    if not self._writes:
      return
    line = {'stage': stage, 'kind': kind, 'step': step, **values}
    with open(self._path, 'a', encoding='utf-8') as f:
      f.write(json.dumps(line, allow_nan=False) + '\n')
    if self._boards is not None:
      board = self._boards.get(stage) or self._open_board(stage)
      for name, value in _flat(values):
        board.add_scalar(f'{kind}/{name}', value, step)
    if self._wandb is not None:
      if stage not in self._wandb_stages:
        self._wandb.define_metric(f'{stage}/*', step_metric=f'{stage}/step')
        self._wandb_stages.add(stage)
      self._wandb.log({f'{stage}/{kind}/{name}': value for name, value in _flat(values)} | {f'{stage}/step': step})

  def __enter__(self) -> 'Writer':
    return self

  def __exit__(self, *exception: Any) -> None:
    for board in (self._boards or {}).values():
      board.close()
    if self._wandb is not None:
      self._wandb.finish()

  def _open_board(self, stage: str, purge_step: int | None = None) -> Any:
    """A TensorBoard writer that hides what earlier ones wrote for the stage from `purge_step` on."""
    import tensorboardX
    if stage in self._boards:
      self._boards[stage].close()
    folder = self._path.parent / 'tensorboard' / stage  # of its own: a purge is of all tags in a folder
    # TensorBoard takes the first start in a folder for no restart, so there has to be one from the outset.
    purge_step = purge_step if folder.exists() else 0
    # The suffix: two writers of one second would have one file, and files are read in the order of their names.
    self._boards[stage] = tensorboardX.SummaryWriter(
        str(folder), purge_step=purge_step, flush_secs=10, filename_suffix=f'.{time.time_ns()}')
    return self._boards[stage]


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
  text = path.read_text(encoding='utf-8')
  whole = text[:text.rfind('\n') + 1]  # a kill may leave half a line at the end
  lines = []
  for number, line in enumerate(whole.splitlines(), 1):
    try:
      lines.append(json.loads(line))
    except json.JSONDecodeError as e:
      raise ValueError(f'{path}, line {number} is not valid JSON ({e}); remove it, or restore a copy') from e
  return lines


def _flat(values: dict[str, Value]) -> Iterator[tuple[str, float]]:
  for name, value in values.items():
    if isinstance(value, dict):
      yield from ((f'{name}/{key}', x) for key, x in value.items())
    else:
      yield name, value
