"""Figures of an AnLLM report, as SVG text: what a token sees, what a cache holds, what its entries are worth."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from datasel.attention import anchors
from datasel.report import plots
from datasel.report.html import element
from datasel.report.plots import ACCENT, GREY, Line

OWN, KEPT, PROTECTED = ACCENT, '#d55e00', '#009e73'  # why a token is seen
MOST_TOKENS = 48  # of a text that is drawn; more cannot be read
_CELL, _LABEL, _SPELT = 12, 68, 10  # units of a cell, room for a label, characters in it
_APART = 0.05  # of their x: points that would hide one another


@dataclasses.dataclass(frozen=True)
class Series:
  """Points with a bar of one error to either side, joined in the order of x.  hollow: drawn as rings."""

  x: Sequence[float]
  y: Sequence[float]
  error: Sequence[float]
  label: str
  color: str
  hollow: bool = False


def over(key: str, title: str, lines: Sequence[Line], *, xlabel: str, ylabel: str, log: bool = False) -> str:
  """Curves with their names at the right, every point of them drawn.  log: x doubles from tick to tick, y too."""

  def paint(ax: Axes) -> None:
    for line in lines:
      ax.plot(line.x, line.y, color=line.color, linestyle=line.dash, linewidth=line.width, alpha=line.alpha,
              marker='o' if line.dots else '', markersize=3.5)
    if log:
      _doubling(ax, sorted({x for line in lines for x in line.x}))
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    ax.margins(x=0.02)
    plots.name_ends(ax, [line for line in lines if line.label])

  return plots.draw(key, max(3.1, 0.175 * len(lines) + 1), paint)


def points(key: str, title: str, series: Sequence[Series], *, xlabel: str, ylabel: str,
           level: float) -> str:
  """Points with error bars over x >= 0, which doubles from tick to tick, each series a little beside the last.

  level: a horizontal dotted line.
  """

  def paint(ax: Axes) -> None:
    for n, one in enumerate(series):
      order = np.argsort(one.x, kind='stable')
      x, y, error = (np.asarray(values, float)[order] for values in (one.x, one.y, one.error))
      beside = _APART * (n - (len(series) - 1) / 2)
      ax.errorbar(x + beside * np.maximum(x, 1), y, yerr=error, color=one.color, marker='o', markersize=5,
                  linestyle='--' if one.hollow else '-', markerfacecolor='none' if one.hollow else one.color,
                  linewidth=1.2, elinewidth=1, capsize=2.5, label=one.label)
    ax.axhline(level, color=GREY, linewidth=1.2, linestyle=':')
    ax.set_xscale('symlog', base=2, linthresh=1, linscale=0.5)
    most = max((x for one in series for x in one.x), default=1)
    ticks = [0, *(2**n for n in range(0, int(np.log2(max(most, 1))) + 2, 2 if most > 64 else 1))]
    ax.set_xticks(ticks, [f'{tick:,}' for tick in ticks])
    ax.minorticks_off()
    ax.set_xlim(-0.4, max(most, 1) * 1.5)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    ax.legend(fontsize=8, frameon=False, loc='upper left', bbox_to_anchor=(1.01, 1), borderaxespad=0)

  return plots.draw(key, max(3.1, 0.2 * len(series) + 1), paint)


def mask(tokens: Sequence[str], anchor: Sequence[bool], *, anchor_sees_anchors: bool = False,
         keep_bos: bool = False) -> str:
  """A square for each pair of tokens, the one that looks below, the one that is seen to the right.

  anchor: whether each token closes its segment.  Colours say why a token is seen: OWN its own segment, KEPT an anchor
  of an earlier one, PROTECTED; grey: it was read before, and is hidden.
  """
  tokens, anchor_L = list(tokens)[:MOST_TOKENS], np.array(anchor, bool)[:MOST_TOKENS]
  L = len(tokens)
  visible_LxL = np.asarray(anchors.visible(anchor_L[None], anchor_sees_anchors=anchor_sees_anchors,
                                           keep_bos=keep_bos))[0]
  segment_L = np.cumsum(anchor_L) - anchor_L
  own_LxL = segment_L[:, None] == segment_L[None]
  kinds = {'hidden': (np.tri(L, dtype=bool) & ~visible_LxL, 'currentColor', '0.1'),
           'own': (visible_LxL & own_LxL, OWN, '0.85'), 'kept': (visible_LxL & ~own_LxL & anchor_L, KEPT, '0.9'),
           'protected': (visible_LxL & ~own_LxL & ~anchor_L, PROTECTED, '0.9')}
  cells = [element('path', d=''.join(
    f'M{_LABEL + _CELL * j} {_LABEL + _CELL * i}h{_CELL - 1}v{_CELL - 1}h-{_CELL - 1}z' for i, j in np.argwhere(which)),
    fill=color, fill_opacity=alpha, data_kind=kind) for kind, (which, color, alpha) in kinds.items()]
  labels = []
  for n, token in enumerate(tokens):
    look = {'font_size': '9', 'fill': KEPT if anchor_L[n] else 'currentColor'}
    if anchor_L[n]:
      look['font_weight'] = 'bold'
    at, spelt = _LABEL + _CELL * n + _CELL - 3, _spelt(token)
    labels += [element('text', spelt, x=str(_LABEL - 4), y=str(at), text_anchor='end', **look),
               element('text', spelt, transform=f'translate({at} {_LABEL - 4}) rotate(-90)', **look)]
  size = _LABEL + _CELL * L
  return element('svg', *cells, *labels, viewBox=f'0 0 {size} {size}')


def _spelt(token: str) -> str:
  """A token as a label: what is white space can be seen, what is long is cut."""
  shown = token.strip(' ').replace('\n', '⏎').replace('\t', '⇥') or '␣'
  return shown if len(shown) <= _SPELT else shown[:_SPELT - 1] + '…'


def _doubling(ax: Axes, x: Sequence[float]) -> None:
  ax.set_xscale('log', base=2)
  ax.set_xticks(x, [f'{value:,}' for value in x])
  ax.minorticks_off()
