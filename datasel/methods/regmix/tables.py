"""CSV tables of a swarm: which mixture each proxy was trained on, and the losses that it came to.

  index,web,code             index,web,code
  1,0.7,0.3                  1,3.25,1.5

One row a proxy, told by its `index`; every other column is a domain's weight, or a loss.  RegMix's files are such.
"""

import csv
import dataclasses
import difflib
import math
import os
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from datasel import workdir

INDEX = 'index'
SUM_TOLERANCE = 1e-2  # published mixtures are rounded to a grid of 1e-3
_NUMBER = re.compile(r'[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?')


@dataclasses.dataclass(frozen=True)
class Table:
  """index_N: each row's id, text, as a tuple.  columns: a name for each of the C columns.  values_NxC: float64, finite.

  ValueError for a size that does not fit, an id or a column given twice, and a value that is not finite.
  """
  columns: tuple[str, ...]
  index_N: tuple[str, ...]
  values_NxC: np.ndarray

  def __post_init__(self):
    columns, index_N = tuple(self.columns), tuple(str(one) for one in self.index_N)
    values_NxC = np.asarray(self.values_NxC, np.float64)
    if values_NxC.shape != (len(index_N), len(columns)):
      raise ValueError(f'values of shape {values_NxC.shape} for {len(index_N)} rows of {len(columns)} columns')
    for what, names in (('column', columns), ('index', index_N)):
      if twice := _twice(names):
        raise ValueError(f'{what} {twice!r} is there more than once; want each once')
    if bad := np.argwhere(~np.isfinite(values_NxC)).tolist():
      row, column = bad[0]
      raise ValueError(f'index {index_N[row]!r}, column {columns[column]!r}: got {values_NxC[row, column]}, want a '
                       'finite number')
    object.__setattr__(self, 'columns', columns)
    object.__setattr__(self, 'index_N', index_N)
    object.__setattr__(self, 'values_NxC', values_NxC)

  def column(self, name: str) -> np.ndarray:
    """float64 [N]; ValueError names the columns that there are."""
    return self.values_NxC[:, self._position(name)]

  def select(self, columns: Sequence[str]) -> 'Table':
    """The table with exactly these columns in this order; ValueError where it lacks one or has another."""
    positions = [self._position(name) for name in columns]
    if unknown := [name for name in self.columns if name not in columns]:
      raise ValueError(f'unknown column {unknown[0]!r}{_close(unknown[0], columns)}; want only {", ".join(columns)}')
    return Table(tuple(columns), self.index_N, self.values_NxC[:, positions])

  def _position(self, name: str) -> int:
    if name not in self.columns:
      raise ValueError(f'no column {name!r}{_close(name, self.columns)}; the columns are {", ".join(self.columns)}')
    return self.columns.index(name)


def read(path: str | os.PathLike) -> Table:
  """Reads a CSV file with a column `index`; ValueError says in which file, line and column what is wrong."""
  path = pathlib.Path(path)
  try:
    with open(path, newline='', encoding='utf-8-sig') as f:
      reader = csv.reader(f, strict=True)
      rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(cell.strip() for cell in row)]
  except (csv.Error, UnicodeDecodeError) as e:
    raise ValueError(f'{path} is not a CSV file in UTF-8 ({e}); export it again') from e
  if not rows:
    raise ValueError(f'{path} is empty; want a first line of column names, {INDEX!r} among them')
  (_, names), *rows = rows
  if INDEX not in names:
    raise ValueError(f'{path}, line 1: no column {INDEX!r}; want one that tells the rows apart (the columns are '
                     f'{", ".join(names)})')
  if twice := _twice(names):
    raise ValueError(f'{path}, line 1: column {twice!r} is there more than once; rename or remove one')
  if '' in names:
    raise ValueError(f'{path}, line 1: column {names.index("") + 1} has no name; want one for each column')
  if len(names) < 2 or not rows:
    raise ValueError(f'{path} has {len(rows)} rows of {len(names) - 1} columns beside {INDEX!r}; want at least one '
                     'of each')
  at = names.index(INDEX)
  seen: dict[str, int] = {}
  values = []
  for line, row in rows:
    if len(row) != len(names):
      raise ValueError(f'{path}, line {line}: {len(row)} values, want {len(names)}, one for each column')
    if not row[at]:
      raise ValueError(f'{path}, line {line}, column {INDEX!r}: got nothing, want an id')
    if row[at] in seen:
      raise ValueError(f'{path}, line {line}, column {INDEX!r}: {row[at]!r} is the id of line {seen[row[at]]} too; '
                       'want each once')
    seen[row[at]] = line
    values.append([_number(cell, path, line, name) for name, cell in zip(names, row) if name != INDEX])
  return Table(tuple(name for name in names if name != INDEX), tuple(seen), np.array(values))


def read_mixtures(path: str | os.PathLike) -> Table:
  """`read` of a file of mixtures: rows of weights >= 0 that sum to 1 within 1e-2, ValueError otherwise.

  The weights are as they are in the file; `normalised` divides them by their sums.
  """
  table = read(path)
  check_mixtures(table.values_NxC, lambda n: f'{path}, index {table.index_N[n]!r}', table.columns)
  return table


def check_mixtures(weights_NxM: np.ndarray, where=lambda n: f'row {n}', names: Sequence[str] = ()) -> None:
  """ValueError unless the rows are finite, >= 0 and sum to 1 within 1e-2.

  where: of a row, what an error calls it.  names: of the columns, for the same.
  """
  bad_NxM = ~(np.isfinite(weights_NxM) & (weights_NxM >= 0))
  if bad_NxM.any():
    n, m = np.argwhere(bad_NxM)[0]
    raise ValueError(f'{where(n)}, column {(names[m] if names else int(m))!r}: the weight {weights_NxM[n, m]:g}, want '
                     'a finite number >= 0')
  sums_N = weights_NxM.sum(-1)
  off_N = np.abs(sums_N - 1) > SUM_TOLERANCE
  if off_N.any():
    n = int(np.argmax(off_N))
    raise ValueError(f'{where(n)}: the weights sum to {sums_N[n]:.6g}, want 1 within {SUM_TOLERANCE:g}; renormalise '
                     f'them ({off_N.sum()} of {len(sums_N)} rows are so)')


def normalised(weights_NxM: np.ndarray) -> np.ndarray:
  """Rows divided by their sums."""
  return weights_NxM / weights_NxM.sum(-1, keepdims=True)


def write(path: str | os.PathLike, table: Table) -> None:
  """Writes the table, atomically; `read` gives it back to the last bit."""
  with workdir.replacing(path, 'w') as f:
    writer = csv.writer(f, lineterminator='\n')
    writer.writerow([INDEX, *table.columns])
    writer.writerows([one, *map(repr, row)] for one, row in zip(table.index_N, table.values_NxC.tolist()))


def join(mixtures: Table, losses: Table) -> tuple[np.ndarray, np.ndarray]:
  """weights_NxM and losses_NxC of the same proxies, in the order of `mixtures`; ValueError for ids of one side only."""
  for one, other, has, lacks in ((mixtures, losses, 'a mixture', 'losses'), (losses, mixtures, 'losses', 'a mixture')):
    there = set(other.index_N)
    if alone := [i for i in one.index_N if i not in there]:
      raise ValueError(f'{len(alone)} ids have {has} but not {lacks}: {", ".join(alone[:5])}'
                       f'{", ..." if len(alone) > 5 else ""}; give them, or remove these rows')
  position = {i: n for n, i in enumerate(losses.index_N)}
  return mixtures.values_NxC, losses.values_NxC[[position[i] for i in mixtures.index_N]]


def target_weights(text: str, option: str) -> dict[str, float]:
  """Weights of targets by name: of 'A', 'A,B' or 'A=2,B=1'.  option: what an error calls the text."""
  weights: dict[str, float] = {}
  for part in text.split(','):
    name, _, number = part.strip().partition('=')
    try:
      weight = float(number or 1)
    except ValueError:
      weight = math.nan
    if not 0 <= weight < math.inf:
      raise ValueError(f'{option} has {part!r}; want NAME or NAME=WEIGHT, of a weight >= 0')
    if not name or name in weights:
      raise ValueError(f'{option} has {part!r}; want every target named, and once')
    weights[name] = weight
  if not sum(weights.values()):
    raise ValueError(f'{option} is {text!r}: all weights are 0; want one above 0')
  return weights


def _number(cell: str, path: pathlib.Path, line: int, column: str) -> float:
  if _NUMBER.fullmatch(cell) and math.isfinite(float(cell)):
    return float(cell)
  raise ValueError(f'{path}, line {line}, column {column!r}: got {cell!r}, want a finite number')


def _twice(names: Sequence[str]) -> str | None:
  seen: set[str] = set()
  return next((name for name in names if name in seen or seen.add(name)), None)


def _close(name: str, known: Sequence[str]) -> str:
  close = difflib.get_close_matches(name, list(known), n=3)
  return f' (close: {", ".join(close)})' if close else ''
