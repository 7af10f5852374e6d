"""Where the records of a run are shown besides metrics.jsonl: CSV, TensorBoard, Weights & Biases, Trackio.

Each tracker has three methods.  `rewind(stage, step)`: a process begins or continues the stage from `step`, and what an
interrupted one wrote after it no longer counts.  `write(stage, kind, step, values)`: one record, as in metrics.jsonl.
`close()`.  None may be needed to repeat or continue a run: metrics.jsonl alone is read again.
"""

import csv
import io
import logging
import pathlib
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from datasel import processes, workdir

Value = float | int | dict[str, float]
_FINISH_SECONDS = 300  # for what Weights & Biases has not sent when the run ends


class Tracker(Protocol):
  def rewind(self, stage: str, step: int) -> None: ...

  def write(self, stage: str, kind: str, step: int, values: dict[str, Value]) -> None: ...

  def close(self) -> None: ...


def flat(values: dict[str, Value]) -> Iterator[tuple[str, float]]:
  """('loss', 1.5), ('nll/code', 2.5), ..."""
  for name, value in values.items():
    if isinstance(value, dict):
      yield from ((f'{name}/{key}', x) for key, x in value.items())
    else:
      yield name, value


def check(wandb_project: str, trackio_project: str) -> None:
  """ImportError for a tracker that has a project but no package."""
  if wandb_project:
    _wandb()
  if trackio_project:
    _trackio()


def chosen(directory: pathlib.Path, config: dict, *, csv: bool = False, tensorboard: bool = False,
           wandb_project: str = '', trackio_project: str = '') -> list[Tracker]:
  """Opens the trackers that a run in `directory` asks for; in processes other than the first, none.

  config: flat, shown beside the run.  Raises ImportError for a package that is not installed, and whatever a service
  has against a run that is new to it.  A service that does not answer when a run goes on is left out with a warning.
  """
  opened: list[Tracker] = []
  if not processes.lead():
    return opened
  check(wandb_project, trackio_project)
  if csv:
    opened.append(Csv(directory))
  if tensorboard:
    opened.append(TensorBoard(directory))
  services = [(WeightsAndBiases, wandb_project, 'wandb_id.txt'), (Trackio, trackio_project, 'trackio_run.txt')]
  for service, project, file in services:
    if project:
      opened += _begun(service, directory, project, file, config)
  return opened


def _begun(service: Callable[..., Tracker], directory: pathlib.Path, project: str, file: str,
           config: dict) -> list[Tracker]:
  """A service's tracker, if it can be had.  The name it knows the run by is kept in `file`, from the first success.

  So a mistake in the project or the account stops a new run before it computes anything, and nothing stops an old one.
  """
  path = pathlib.Path(directory) / file
  known = path.exists()
  name = path.read_text(encoding='utf-8').strip() if known else uuid.uuid4().hex
  try:
    tracker = service(directory, project, name, config)
  except Exception as e:  # a service's client raises what it likes
    if not known:
      raise
    warn(service.__name__, e)
    return []
  if not known:
    with workdir.replacing(path, 'w') as f:
      f.write(name)
  return [tracker]


def warn(name: str, e: Exception) -> None:
  logging.warning('tracking by %s has ended (%s: %s); the run goes on, and metrics.jsonl has all of it', name,
                  type(e).__name__, e)


class Csv:
  """WORKDIR/metrics/STAGE-KIND.csv: a header, then a row for each record; a column for each flat name, `step` first.

  A name that a record lacks is an empty cell.
  """

  def __init__(self, directory: pathlib.Path):
    self._folder = pathlib.Path(directory) / 'metrics'
    self._columns: dict[pathlib.Path, list[str]] = {}

  def rewind(self, stage: str, step: int) -> None:
    stem = self._folder / stage
    for path in stem.parent.glob('*.csv'):
      if path.stem.rpartition('-')[0] == stem.name:
        columns, rows = _table(path)
        kept = [row for row in rows if int(row['step']) <= step]
        if kept:
          self._replace(path, columns, kept)
        else:
          path.unlink()
          self._columns.pop(path, None)

  def write(self, stage: str, kind: str, step: int, values: dict[str, Value]) -> None:
    path, row = self._folder / f'{stage}-{kind}.csv', {'step': step, **dict(flat(values))}
    if path not in self._columns and path.exists():
      self._replace(path, *_table(path))
    columns = self._columns.get(path, [])
    if new := [name for name in row if name not in columns]:
      self._replace(path, columns + new, _table(path)[1] if columns else [])
    with open(path, 'a', encoding='utf-8', newline='') as f:
      csv.DictWriter(f, self._columns[path], lineterminator='\n').writerow(row)

  def close(self) -> None:
    pass

  def _replace(self, path: pathlib.Path, columns: list[str], rows: list[dict]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator='\n')
    table.writeheader()
    table.writerows(rows)
    with workdir.replacing(path) as f:
      f.write(text.getvalue().encode())
    self._columns[path] = columns


def _table(path: pathlib.Path) -> tuple[list[str], list[dict[str, str]]]:
  """(columns, rows) of a file whose last row a kill may have cut."""
  text = path.read_bytes()
  table = csv.DictReader(io.StringIO(text[:text.rfind(b'\n') + 1].decode()))
  return list(table.fieldnames or []), list(table)


class TensorBoard:
  """A run for each stage, in WORKDIR/tensorboard/STAGE, with tags KIND/NAME."""

  def __init__(self, directory: pathlib.Path):
    self._folder = pathlib.Path(directory) / 'tensorboard'
    self._boards: dict[str, Any] = {}  # by stage, opened when needed

  def rewind(self, stage: str, step: int) -> None:
    self._open(stage, purge_step=step + 1)

  def write(self, stage: str, kind: str, step: int, values: dict[str, Value]) -> None:
    board = self._boards.get(stage) or self._open(stage)
    for name, value in flat(values):
      board.add_scalar(f'{kind}/{name}', value, step)

  def close(self) -> None:
    for board in self._boards.values():
      board.close()

  def _open(self, stage: str, purge_step: int | None = None) -> Any:
    """A writer that hides what earlier ones wrote for the stage from `purge_step` on."""
    import tensorboardX
    if stage in self._boards:
      self._boards[stage].close()
    # A folder of its own: a purge is of all tags in a folder.
    # The suffix: two writers of one second would have one file, and files are read in the order of their names.
    self._boards[stage] = tensorboardX.SummaryWriter(
        str(self._folder / stage), purge_step=purge_step, flush_secs=10, filename_suffix=f'.{time.time_ns()}')
    return self._boards[stage]


class WeightsAndBiases:
  """One run, named as the workdir, with an axis of steps for each stage.  A restart sends again what follows the last
  checkpoint: the same values at the same steps."""

  def __init__(self, directory: pathlib.Path, project: str, name: str, config: dict):
    directory, wandb = pathlib.Path(directory), _wandb()
    directory.mkdir(parents=True, exist_ok=True)
    # Its own process sends: a network that is gone holds up nothing until the end, and there not for ever.
    self._run = wandb.init(project=project, config=config, dir=str(directory), id=name, name=directory.name,
                           resume='allow', settings=wandb.Settings(finish_timeout=_FINISH_SECONDS))
    self._stages: set[str] = set()

  def rewind(self, stage: str, step: int) -> None:
    pass  # the service has no way back

  def write(self, stage: str, kind: str, step: int, values: dict[str, Value]) -> None:
    if stage not in self._stages:
      self._run.define_metric(f'{stage}/*', step_metric=f'{stage}/step')
      self._stages.add(stage)
    self._run.log({f'{stage}/{kind}/{name}': value for name, value in flat(values)} | {f'{stage}/step': step})

  def close(self) -> None:
    self._run.finish()


class Trackio:
  """One run, WORKDIR-ID, where Trackio keeps its own: $TRACKIO_DIR, or a Space or server named in its variables.  A
  restart sends again what follows the last checkpoint: the same values at the same steps."""

  def __init__(self, directory: pathlib.Path, project: str, name: str, config: dict):
    # Trackio finds a run again by its name alone.
    self._run = _trackio().init(project=project, name=f'{pathlib.Path(directory).name}-{name[:8]}', config=config,
                                resume='allow', embed=False)

  def rewind(self, stage: str, step: int) -> None:
    pass  # nothing can be taken back

  def write(self, stage: str, kind: str, step: int, values: dict[str, Value]) -> None:
    self._run.log({f'{stage}/{kind}/{name}': value for name, value in flat(values)}, step=step)

  def close(self) -> None:
    self._run.finish()


def _wandb() -> Any:
  try:
    import wandb
  except ImportError as e:
    raise _absent('wandb') from e
  return wandb


def _trackio() -> Any:
  try:
    import trackio
  except ImportError as e:
    raise _absent('trackio') from e
  return trackio


def _absent(package: str) -> ImportError:
  return ImportError(f'tracking.{package}_project is set, but {package} is not installed: '
                     "pip install 'datasel[track]', or leave it empty")
