"""Runs as they lie on disk, finished or not, whole or damaged."""

import dataclasses
import datetime
import fcntl
import json
import logging
import os
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from datasel.report.sections import Artefacts

# What files that hold something else than they should lead to.
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError)


@dataclasses.dataclass(frozen=True)
class Stage:
  """What one stage of a run has come to.  None or empty: not known."""

  name: str
  step: int
  steps: int | None
  tokens: int | None = None  # read so far
  uniform_nll: float | None = None  # nats/token
  bits_per_byte: float | None = None  # mean over domains
  worst_domain: str | None = None
  worst_nll: float | None = None
  flops: float | None = None  # so far
  seconds: float | None = None  # so far, of training
  tokens_per_second: float | None = None  # median over the logged intervals
  domain_nll: dict[str, float] = dataclasses.field(default_factory=dict)
  domain_bits_per_byte: dict[str, float] = dataclasses.field(default_factory=dict)
  weights: dict[str, float] = dataclasses.field(default_factory=dict)  # that it is trained on
  tokenizer: str | None = None
  store: str | None = None


@dataclasses.dataclass(frozen=True)
class Run:
  """One workdir."""

  name: str  # its path, without what the paths of all listed runs begin with
  path: str
  state: str
  method: str | None
  started: datetime.datetime | None  # its last process
  flops: float | None  # of all stages, also those that train nothing
  stages: list[Stage]
  weights: dict[str, float]  # mixture.json
  config: dict[str, Any]
  problems: list[str]


def find(directories: Sequence[pathlib.Path]) -> dict[str, pathlib.Path]:
  """{name: workdir} of all runs in `directories`; ValueError for one that is not there or has none."""
  paths = []
  for directory in directories:
    if not directory.is_dir():
      raise ValueError(f'{directory} is not a folder; want a workdir, or a folder with workdirs inside')
    found = []
    for folder, folders, files in os.walk(directory.absolute(), onerror=_unread):
      folders.sort()
      if _is_run(pathlib.Path(folder), files):
        found.append(pathlib.Path(folder))
        folders.clear()  # its stages and checkpoints
    if not found:
      raise ValueError(f'{directory} has no run in it, nor has any folder below: a run has a config.json, written by '
                       '`python -m datasel.main --workdir=DIR`')
    paths += found
  base = os.path.commonpath([path.parent for path in paths])
  return {os.path.relpath(path, base): path for path in paths}


def _unread(e: OSError) -> None:
  logging.warning('not searched: %s', e)


def _is_run(folder: pathlib.Path, files: Sequence[str]) -> bool:
  """Other programs have a config.json too."""
  if 'metrics.jsonl' in files or {'config.json', 'environment.json'} <= set(files):
    return True
  if 'config.json' not in files:
    return False
  try:
    return 'method' in json.loads((folder / 'config.json').read_text(encoding='utf-8'))
  except (OSError, ValueError, TypeError):
    return False


def load(directory: pathlib.Path, name: str) -> Run:
  """Reads a run in whatever condition it is; what cannot be read is in its `problems`."""
  files, problems = Artefacts(directory), []

  def attempt(what: str, read: Callable[[], Any], otherwise: Any) -> Any:
    try:
      return read()
    except _UNREADABLE as e:
      problems.append(str(e) if isinstance(e, (ValueError, OSError)) else f'{what}: {type(e).__name__} {e}')
      return otherwise

  def table(file: str) -> dict:
    return attempt(file, lambda: _table_of(files, file), {})

  config, environment, summary = table('config.json'), table('environment.json'), table('summary.json')
  if not config and not problems:
    problems.append('config.json is missing')
  costs = attempt('summary.json', lambda: _floats(summary.get('cost_flops', {})), {})
  started = attempt('environment.json', lambda: datetime.datetime.fromisoformat(environment['started'])
                    if 'started' in environment else None, None)
  mixture = attempt('mixture.json', lambda: _floats(table('mixture.json').get('domains', {})), {})
  stages = []
  for stage in attempt('metrics.jsonl', lambda: files.stages, []):
    made = table(f'{stage}/stage.json')
    one = attempt(stage, lambda stage=stage, made=made: _stage(files, stage, made, config, costs), None)
    stages += [one] if one else []
  state = attempt('.lock', lambda: _state(directory), 'damaged')
  if state == 'failed':
    problems.append((directory / 'traceback.txt').read_text(errors='replace').strip().rpartition('\n')[2])
  elif problems:
    state = 'damaged'
  spent = [stage.flops for stage in stages]
  flops = sum(costs.values()) or (sum(spent) if spent and None not in spent else None)
  return Run(name, str(directory), state, config.get('method'), started, flops, stages, mixture, config, problems)


def _floats(table: dict) -> dict[str, float]:
  return {name: float(x) for name, x in table.items()}


def _table_of(files: Artefacts, file: str) -> dict:
  found = files.read(file)
  if not isinstance(found, dict):
    raise ValueError(f'{files.directory / file} holds no JSON object; restore it from a copy')
  return found


def _stage(files: Artefacts, name: str, made: dict, config: dict, costs: dict[str, float]) -> Stage:
  train, evaluated = files.of(name, 'train'), files.of(name, 'eval')
  step, steps = max(line['step'] for line in train + evaluated), made.get('steps')
  length = config.get('data.length')
  tokens = step * made['batch_size'] * length if made and length else None
  speeds = [line['time/tokens_per_second'] for line in train if 'time/tokens_per_second' in line]
  speed = statistics.median(speeds) if speeds else None
  cost = made.get('flops', costs.get(name))  # of all its steps
  known = {}
  if evaluated:
    nll, bits = (_floats(evaluated[-1][key]) for key in ('nll', 'bits_per_byte'))
    if not nll or not bits:
      raise ValueError(f'{files.directory / "metrics.jsonl"}: the last evaluation of {name} has no losses; restore a '
                       'copy')
    known = {'uniform_nll': statistics.fmean(nll.values()), 'bits_per_byte': statistics.fmean(bits.values()),
             'worst_domain': max(nll, key=nll.get), 'worst_nll': max(nll.values()), 'domain_nll': nll,
             'domain_bits_per_byte': bits}
  return Stage(name, step, steps, tokens, **known,
               flops=cost * step / steps if cost is not None and steps else None,
               seconds=tokens / speed if tokens is not None and speed else None, tokens_per_second=speed,
               weights=_floats(made.get('weights', {})), tokenizer=made.get('tokenizer'), store=made.get('store'))


def _state(directory: pathlib.Path) -> str:
  lock, traceback, log = (directory / name for name in ('.lock', 'traceback.txt', 'metrics.jsonl'))
  if lock.exists():
    with open(lock, encoding='utf-8') as f:
      try:
        fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back at once
      except BlockingIOError:
        return 'running'
  if (directory / 'summary.json').exists():
    return 'finished'
  # A process that goes on after an error writes metrics.jsonl anew.
  if traceback.exists() and not (log.exists() and log.stat().st_mtime > traceback.stat().st_mtime):
    return 'failed'
  return 'stopped'


