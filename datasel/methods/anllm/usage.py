"""How much of a cache anchors save: counted from the flags of a text, without a model.  Pure numpy."""

from collections.abc import Sequence

import numpy as np

from datasel.attention import anchors
from datasel.data.anchors import Rule
from datasel.data.store import Store

_READ = 64  # records of a store whose anchors are looked for at once


def live(anchor_L: np.ndarray, protected_L: np.ndarray | None = None) -> np.ndarray:
  """int64 L: the cache's entries after each token of one document; when an anchor has been read, its segment is gone.

  They are the anchors so far, the tokens of the open segment, and protected tokens of the segments before.
  anchor_L, protected_L: bool.
  """
  anchor_L = np.asarray(anchor_L)
  kept_L = anchor_L if protected_L is None else anchor_L | protected_L
  positions = np.arange(len(anchor_L))
  closed_L = np.maximum.accumulate(np.where(anchor_L, positions, -1))  # the last anchor, itself included
  kept_by_T = np.concatenate([[0], np.cumsum(kept_L)])
  return kept_by_T[closed_L + 1] + positions - closed_L


def reduction(live_by_text: Sequence[np.ndarray], *, allocated_bytes: int, full_bytes: int) -> dict[str, float]:
  """{'prefix', 'peak_live', 'allocated'}: parts of a full cache that are saved.

  A full cache of a text has an entry for each of its tokens.  With sums over texts, each given by `live`,
    prefix     1 - entries after the last token / tokens       of prefixes that are read once and asked about
    peak_live  1 - most entries after any token / tokens       as the authors' scripts for translation count
    allocated  1 - allocated_bytes / full_bytes                of the buffers, theirs and a full cache's
  """
  if not live_by_text or not all(len(live_L) for live_L in live_by_text) or full_bytes < 1:
    raise ValueError(f'the cache of {len(live_by_text)} texts of {[len(live_L) for live_L in live_by_text][:8]} tokens '
                     f'beside one of {full_bytes} bytes: want at least one of each')
  tokens = sum(len(live_L) for live_L in live_by_text)
  saved = lambda entries: float(1 - sum(int(x) for x in entries) / tokens)
  return {'prefix': saved(live_L[-1] for live_L in live_by_text),
          'peak_live': saved(live_L.max() for live_L in live_by_text),
          'allocated': 1 - allocated_bytes / full_bytes}


def document(tokens_L: np.ndarray, rule: Rule, *, keep_bos: bool = False, shown: int = 64, points: int = 400) -> dict:
  """A document as its report draws it: {'ids', 'anchor', 'live', 'at'}, lists of int.

  ids, anchor: its first `shown` tokens, and which of them are anchors.  live: entries after each token of the whole
  document, thinned to at most `points` numbers, the last one among them; at: the numbers of their tokens, from 0.
  """
  anchor_L = anchors.flags(np.asarray(tokens_L, np.int32)[None], rule)[0][0]
  live_L = live(anchor_L, np.arange(len(anchor_L)) == 0 if keep_bos else None)
  at_N = np.unique(np.linspace(0, len(live_L) - 1, min(points, len(live_L))).round().astype(int))
  return {'ids': np.asarray(tokens_L)[:shown].tolist(), 'anchor': anchor_L[:shown].astype(int).tolist(),
          'live': live_L[at_N].tolist(), 'at': at_N.tolist()}


def in_store(store: Store, rule: Rule, *, sequences: int, split: str = 'validation') -> dict[str, float | None]:
  """{'anchor_share', 'mean_segment'}: of the tokens of a split, the part that are anchors; tokens of a closed segment.

  sequences: records of each domain, spread evenly; 0: all of them.  Documents begin anew with each record, as in
  training.  mean_segment is None where there is no anchor.
  """
  tokens = closed = found = 0
  for domain, size in enumerate(store.sizes(split).tolist()):
    n = min(size, sequences or size)
    for start in range(0, n, _READ):
      record_B = np.arange(start, min(start + _READ, n), dtype=np.int64) * size // n
      batch = store.read(split, np.full(len(record_B), domain), record_B)
      segment_BxL = batch['segment_BxL']
      anchor_BxL, _ = anchors.flags(batch['tokens_BxL'], rule, segment_BxL)
      tokens, found = tokens + int((segment_BxL > 0).sum()), found + int(anchor_BxL.sum())
      closed += int(_closed(anchor_BxL, segment_BxL).sum())
  return {'anchor_share': found / tokens, 'mean_segment': closed / found if found else None}


def _closed(anchor_BxL: np.ndarray, segment_BxL: np.ndarray) -> np.ndarray:
  """bool B x L, an anchor of its document is here or later in the row."""
  L = anchor_BxL.shape[1]
  at_BxL = np.where(anchor_BxL, np.arange(L), L)
  next_BxL = np.minimum.accumulate(at_BxL[:, ::-1], axis=1)[:, ::-1]
  document_BxL = np.take_along_axis(segment_BxL, np.minimum(next_BxL, L - 1), axis=1)
  return (next_BxL < L) & (document_BxL == segment_BxL)
