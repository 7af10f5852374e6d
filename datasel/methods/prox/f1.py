"""How good programs are: F1 against the wanted ones, what goes wrong in them, and a threshold for decisions.

Documents: F1 of keeping.  Chunks: F1 of the removed lines, all chunks' lines counted together (the paper says neither
this nor the mean over chunks); normalize is not scored.    ProX, Zhou et al. 2024, Table 4 and Table 35.
"""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from datasel.methods.prox import programs

FAILURES = ('empty', 'repeated', 'no match', 'truncated', 'near the limit', 'malformed', 'out of range')
_POINTS = 200  # of a curve that is kept


@dataclasses.dataclass(frozen=True, slots=True)
class F1:
  """Counts of true and false positives and of false negatives; those of two sets add up to those of both."""
  true: int = 0
  false: int = 0
  missed: int = 0

  def __add__(self, other: 'F1') -> 'F1':
    return F1(self.true + other.true, self.false + other.false, self.missed + other.missed)

  @property
  def precision(self) -> float:
    """0 where nothing was found."""
    return self.true / (self.true + self.false) if self.true + self.false else 0.0

  @property
  def recall(self) -> float:
    """0 where nothing was there."""
    return self.true / (self.true + self.missed) if self.true + self.missed else 0.0

  @property
  def f1(self) -> float:
    """2 TP / (2 TP + FP + FN); 1 where nothing was there and nothing was found."""
    all_of = 2 * self.true + self.false + self.missed
    return 2 * self.true / all_of if all_of else 1.0

  def values(self) -> dict[str, float]:
    """JSON: f1, precision, recall and the counts."""
    return {'f1': self.f1, 'precision': self.precision, 'recall': self.recall} | dataclasses.asdict(self)


def of_documents(keep_N: np.ndarray, wanted_N: np.ndarray) -> F1:
  """bool N, bool N: whether each document is kept, and whether it should be."""
  keep_N, wanted_N = np.asarray(keep_N, bool), np.asarray(wanted_N, bool)
  return F1(int((keep_N & wanted_N).sum()), int((keep_N & ~wanted_N).sum()), int((~keep_N & wanted_N).sum()))


def of_chunk(program: str, wanted: str, start: int, stop: int) -> F1:
  """Of the lines of one chunk, start..stop-1, that a program removes and the wanted one does."""
  found, there = removed(program, start, stop), removed(wanted, start, stop)
  return F1(len(found & there), len(found - there), len(there - found))


def removed(program: str, start: int, stop: int) -> set[int]:
  """The lines of a chunk that a program removes."""
  lines: set[int] = set()
  for call in programs.parse(program):
    if isinstance(call, programs.RemoveAll):
      lines.update(range(start, stop))
    elif isinstance(call, programs.RemoveLines):
      lines.update(range(max(call.start, start), min(call.end + 1, stop)))
  return lines


def failures(program: str, text: str, start: int, *, finished: bool = True) -> set[str]:
  """What of FAILURES there is in a program for a chunk's text: nothing but white space; a call for the second time; a
  normalize of what is not there; a last call that was cut off; an end that the limit of tokens may have brought about
  (`finished`: it surely came by itself); a call that is none; and lines outside of the chunk."""
  calls = programs.parse(program)
  stop = start + text.count('\n') + 1
  found = {
    'empty': not program.strip(), 'repeated': len(set(calls)) < len(calls),
    'no match': any(isinstance(call, programs.Normalize) and call.source not in text for call in calls),
    'truncated': any(isinstance(call, programs.Fault) and call.kind == 'truncated' for call in calls),
    'near the limit': not finished,
    'malformed': any(isinstance(call, programs.Fault) and call.kind != 'truncated' for call in calls),
    'out of range': any(isinstance(call, programs.RemoveLines) and not start <= call.start <= call.end < stop
                        for call in calls)}
  return {name for name in FAILURES if found[name]}


def calibrate(score_N: Sequence[float], wanted_N: Sequence[bool]) -> dict:
  """The threshold of the highest F1 of keeping where score >= threshold, the middle one of those equally good.

  Without both documents to keep and to drop no threshold is better than another: it is 0, and a warning says so.

  Returns JSON: threshold; calibrated: whether it was chosen; f1, precision, recall and counts there; `at_zero`, the
  same where the likelier of the two programs is taken; curve: {threshold, f1, kept (a share)}, at most 200 points.
  ValueError for no score, and one that is not finite.
  """
  score_N, wanted_N = np.asarray(score_N, np.float64), np.asarray(wanted_N, bool)
  if not score_N.size or score_N.shape != wanted_N.shape or not np.isfinite(score_N).all():
    raise ValueError(f'{score_N.size} scores, {int((~np.isfinite(score_N)).sum())} of them not finite, for '
                     f'{wanted_N.size} documents; want a finite score for each')
  values_T, order_N = np.unique(score_N), np.argsort(score_N, kind='stable')
  first_T = np.searchsorted(score_N[order_N], values_T)  # documents below each threshold
  wanted_below_T = np.concatenate([[0], np.cumsum(wanted_N[order_N])])[first_T]
  true_T = wanted_N.sum() - wanted_below_T
  f1_T = 2 * true_T / (len(score_N) - first_T + wanted_N.sum())
  # Between two scores any threshold does the same; the middle one is the farthest from both.
  threshold_T = np.concatenate([values_T[:1] - 1, (values_T[1:] + values_T[:-1]) / 2])
  best_T = np.flatnonzero(f1_T == f1_T.max())
  threshold, calibrated = float(threshold_T[best_T[len(best_T) // 2]]), bool(wanted_N.any() and not wanted_N.all())
  if not calibrated:
    logging.warning('of %d documents to choose a threshold by, %d are to keep; want some to keep and some to drop; it '
                    'is 0, where the likelier program is taken', len(wanted_N), wanted_N.sum())
    threshold = 0.0
  shown_T = np.unique(np.linspace(0, len(values_T) - 1, min(_POINTS, len(values_T))).round().astype(int))
  curve = [{'threshold': float(threshold_T[t]), 'f1': float(f1_T[t]), 'kept': float(1 - first_T[t] / len(score_N))}
           for t in shown_T]
  return {'threshold': threshold, 'calibrated': calibrated, **of_documents(score_N >= threshold, wanted_N).values(),
          'at_zero': of_documents(score_N >= 0, wanted_N).values(), 'curve': curve}
