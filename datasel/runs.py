"""`python -m datasel.runs DIR... [--stage='main*'] [--sort=KEY] [--domains | --weights | --config | --json]`

Lists runs, finished or not, and compares them.  A DIR is a workdir, or a folder with workdirs anywhere inside.

A run is 'running' (a process holds its lock, as far as this host sees), 'finished', 'failed' (its last process ended
with an error), 'stopped' (the same command continues it) or 'damaged' (a file of it cannot be read).  What failed and
what is damaged is said below the table.  Losses are those of the last evaluation: nats/token, and bits/byte, the mean
over domains.  Time is that of training, estimated from the median speed.  Sorting is by the last stage shown of a run.

Exit status: 0, or 2 for bad input.
"""

import argparse
import dataclasses
import datetime
import fnmatch
import json
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from datasel import metrics
from datasel.report.runs import Run, Stage, find, load

_NONE = '-'
_WIDTH = 120


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog='python -m datasel.runs', description='Lists and compares runs.')
  parser.add_argument('directory', nargs='+', type=pathlib.Path, help='a workdir, or a folder with workdirs inside')
  parser.add_argument('--stage', default='', help="the stages to show, such as main-tuned or 'main*'")
  parser.add_argument('--sort', choices=list(_KEYS), default='started', help='ascending; what is not known comes last')
  view = parser.add_mutually_exclusive_group()
  view.add_argument('--domains', dest='view', action='store_const', const=domains,
                    help='held-out losses by domain (of main models unless --stage says other), the lowest marked *')
  view.add_argument('--weights', dest='view', action='store_const', const=weights,
                    help='domain weights (mixture.json, or with --stage those that the stages are trained on)')
  view.add_argument('--config', dest='view', action='store_const', const=settings,
                    help='the keys of the config in which the runs differ')
  view.add_argument('--json', dest='view', action='store_const', const=as_json, help='all that is known, unrounded')
  options = parser.parse_args(argv)
  try:
    runs = [load(path, name) for name, path in find(options.directory).items()]
    known = list(dict.fromkeys(stage.name for run in runs for stage in run.stages))
    if options.stage:
      if not fnmatch.filter(known, options.stage):
        raise ValueError(f'--stage={options.stage}: no run has such a stage; known: {", ".join(known) or "none yet"}')
      keep = lambda run: [stage for stage in run.stages if fnmatch.fnmatch(stage.name, options.stage)]
      runs = [dataclasses.replace(run, stages=keep(run)) for run in runs if keep(run)]
  except (ValueError, OSError) as e:
    print(f'error: {e}', file=sys.stderr)
    return 2
  keys = {run.name: _KEYS[options.sort](run, run.stages[-1] if run.stages else Stage('', 0, None)) for run in runs}
  unknown = [run for run in runs if keys[run.name] is None]
  runs = sorted((run for run in runs if keys[run.name] is not None), key=lambda run: (keys[run.name], run.name))
  print((options.view or listing)(runs + unknown, bool(options.stage)))
  return 0


_KEYS: dict[str, Callable[[Run, Stage], Any]] = {
  'started': lambda run, stage: run.started,
  'name': lambda run, stage: run.name,
  'nll': lambda run, stage: stage.uniform_nll,
  'bits': lambda run, stage: stage.bits_per_byte,
  'worst': lambda run, stage: stage.worst_nll,
  'tokens': lambda run, stage: stage.tokens,
  'flops': lambda run, stage: run.flops,
  'speed': lambda run, stage: stage.tokens_per_second,
}


def listing(runs: Sequence[Run], chosen: bool) -> str:
  """A row for each run, and one below it for each of its stages if it has several."""
  rows, said = [], []
  for run in runs:
    about = [run.method or _NONE, run.state, _started(run.started)]
    if len(run.stages) == 1:
      rows.append([_label(run, run.stages[0]), *about, *_cells(run.stages[0])])
    else:
      times = [stage.seconds for stage in run.stages]
      took = metrics.clock(sum(times)) if times and None not in times else _NONE
      rows.append([run.name, *about, *[''] * 5, _flops(run.flops), took, ''])
      rows += [[f'  {stage.name}', '', '', '', *_cells(stage)] for stage in run.stages]
    said += [f'{run.name}: {problem}' for problem in run.problems]
  head = ['run', 'method', 'state', 'started', 'steps', 'tokens', 'nll', 'bits/B', 'worst domain', 'FLOPs', 'time',
          'tok/s']
  return '\n'.join([aligned(head, rows, words=(0, 1, 2, 3, 8)), *(['', *said] if said else [])])


def _cells(stage: Stage) -> list[str]:
  worst = _NONE if stage.worst_domain is None else f'{stage.worst_domain} {stage.worst_nll:.3f}'
  return [f'{stage.step}/{_NONE if stage.steps is None else stage.steps}', _short(stage.tokens),
          _number(stage.uniform_nll), _number(stage.bits_per_byte), worst, _flops(stage.flops),
          _NONE if stage.seconds is None else metrics.clock(stage.seconds), _short(stage.tokens_per_second)]


def domains(runs: Sequence[Run], chosen: bool) -> str:
  """Held-out losses by domain, a column for each stage.  In bits/byte where the tokenizers differ."""
  shown = [(run, stage) for run in runs for stage in _outcomes(run, chosen) if stage.domain_nll]
  if not shown:
    return 'no run was evaluated yet'
  differ = lambda key: len({getattr(stage, key) for _, stage in shown}) > 1
  values = [stage.domain_bits_per_byte if differ('tokenizer') else stage.domain_nll for _, stage in shown]
  names = sorted(set().union(*values), key=lambda name: (_mean(column.get(name) for column in values), name))
  columns = {}
  for (run, stage), column in zip(shown, values):
    cells = {name: _number(column.get(name)) for name in names}
    for name in names:
      best = min(other[name] for other in values if name in other)
      cells[name] += '*' if len(values) > 1 and column.get(name) == best else ' '
    columns[_label(run, stage)] = cells | {'mean': f'{_mean(column.values()):.3f} ', 'after step': f'{stage.step} '}
  unit = 'bits/byte, as the tokenizers differ' if differ('tokenizer') else 'nats/token'
  said = [f'held-out loss, {unit}; *: the lowest']
  if differ('store'):
    said.append('not the same token store: the held-out text may differ, and so may what these losses mean')
  return '\n'.join([side_by_side('domain', [*names, 'mean', 'after step'], columns), '', *said])


def weights(runs: Sequence[Run], chosen: bool) -> str:
  """Domain weights, a column for each run, or with `chosen` for each stage."""
  columns = ({_label(run, stage): stage.weights for run in runs for stage in run.stages} if chosen else
             {run.name: run.weights for run in runs})
  columns = {label: column for label, column in columns.items() if column}
  if not columns:
    return 'no run has domain weights yet'
  names = sorted(set().union(*columns.values()),
                 key=lambda name: (-_mean(column.get(name) for column in columns.values()), name))
  return side_by_side('domain', names, {label: {name: _number(column.get(name), 4) for name in names}
                                        for label, column in columns.items()})


def settings(runs: Sequence[Run], chosen: bool) -> str:
  """The keys of the configs in which runs that have the key differ."""
  if len(runs) < 2:
    return 'one run: nothing to compare its config with'
  keys = list(dict.fromkeys(key for run in runs for key in run.config))
  cells = {run.name: {key: json.dumps(run.config[key]) if key in run.config else _NONE for key in keys} for run in runs}
  values = {key: {column[key] for column in cells.values()} for key in keys}
  differing = [key for key in keys if len(values[key] - {_NONE}) > 1]
  partial = sum(_NONE in values[key] for key in keys if key not in differing)
  said = [f'not shown: {partial} keys that only some of the runs have, with equal values'] if partial else []
  if not differing:
    return '\n'.join(['no key has different values', *said])
  return '\n'.join([side_by_side('key', differing, cells), *(['', *said] if said else [])])


def as_json(runs: Sequence[Run], chosen: bool) -> str:
  return json.dumps([dataclasses.asdict(run) for run in runs], indent=2,
                    default=datetime.datetime.isoformat)


def _outcomes(run: Run, chosen: bool) -> list[Stage]:
  """The stages whose losses a run is judged by."""
  return run.stages if chosen else [s for s in run.stages if s.name.startswith('main')] or run.stages[-1:]


def side_by_side(corner: str, names: Sequence[str], columns: dict[str, dict[str, str]]) -> str:
  """A row for each name, a column for each label; labels that would make it too wide are numbers, told below."""
  table = lambda head: aligned([corner, *head], [[name, *(c[name] for c in columns.values())] for name in names], (0,))
  text = table(columns)
  if len(text.partition('\n')[0]) <= _WIDTH:
    return text
  numbers = [f'[{n}]' for n in range(1, len(columns) + 1)]
  return '\n'.join([table(numbers), '', *(f'{number} {label}' for number, label in zip(numbers, columns))])


def aligned(head: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[int]) -> str:
  """Columns of text; those in `words` flush left, the others right."""
  rows = [list(head), *rows]
  widths = [max(map(len, column)) for column in zip(*rows)]
  pad = lambda n, cell: cell.ljust(widths[n]) if n in words else cell.rjust(widths[n])
  return '\n'.join('  '.join(pad(n, cell) for n, cell in enumerate(row)).rstrip() for row in rows)


def _label(run: Run, stage: Stage) -> str:
  return run.name if stage.name == 'main' else f'{run.name} {stage.name}'


def _mean(values: Iterable[float | None]) -> float:
  return statistics.fmean(x for x in values if x is not None)


def _number(x: float | None, digits: int = 3) -> str:
  return _NONE if x is None else f'{x:.{digits}f}'


def _flops(x: float | None) -> str:
  return _NONE if x is None else f'{x:.2e}'


def _short(n: float | None) -> str:
  """'512', '6.1k', '2.3B'."""
  if n is None:
    return _NONE
  unit = next((unit for unit in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')) if n >= unit[0]), (1, ''))
  return f'{n / unit[0]:.{1 if unit[1] else 0}f}{unit[1]}'


def _started(time: datetime.datetime | None) -> str:
  """As `ls` has it: the time of today, the day of this year, or the month."""
  if time is None:
    return _NONE
  now, then = datetime.datetime.now().astimezone(), time.astimezone()
  form = '%H:%M' if then.date() == now.date() else '%b %d' if then.year == now.year else '%Y-%m'
  return then.strftime(form)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
