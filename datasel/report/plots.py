"""Figures of a report, as SVG text to be put inside a page.

Each figure is one narrow panel, so that a page shows two side by side and a phone shows one.  Text stays text, and what
is drawn in `INK` takes the colour of the page's text: the same figure reads on light, dark, and paper.  Equal input
gives equal bytes.
"""

import dataclasses
import io
import itertools
import re
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = '#1f2328'  # stands for the page's text colour, see _tidy
GREY = '#8b929b'
ACCENT = '#0072b2'

# Okabe and Ito's colours without the two that vanish on paper or in the dark; they hold for colour-blind readers.
_HUES = ('#0072b2', '#e69f00', '#009e73', '#d55e00', '#56b4e9', '#cc79a7')
_DASHES = ('-', '--', ':', '-.')

_WIDTH = 5.4  # inches of 72 units
_STYLE = {
  'svg.fonttype': 'none', 'text.parse_math': False, 'font.size': 9.5, 'font.family': ['DejaVu Sans'],
  'text.color': INK, 'axes.labelcolor': INK, 'axes.edgecolor': INK, 'xtick.color': INK, 'ytick.color': INK,
  'figure.facecolor': 'none', 'axes.facecolor': 'none', 'axes.spines.top': False, 'axes.spines.right': False,
  'axes.grid': True, 'grid.color': INK, 'grid.alpha': 0.12, 'grid.linewidth': 0.8, 'axes.linewidth': 0.7,
  'axes.axisbelow': True, 'axes.titlesize': 10.5, 'axes.titlelocation': 'left', 'lines.solid_capstyle': 'round',
}


@dataclasses.dataclass(frozen=True)
class Line:
  """A curve.  x and y have one length; `label` is written at the curve's end, outside the axes (empty: no label)."""

  x: Sequence[float]
  y: Sequence[float]
  label: str = ''
  color: str = INK
  dash: str = '-'
  width: float = 1.8
  alpha: float = 1.0
  marker: str = ''


def palette(domains: Sequence[str]) -> dict[str, tuple[str, str]]:
  """{domain: (colour, dash)}, a function of the set of names: a domain looks the same in every figure."""
  looks = [(hue, dash) for dash in _DASHES for hue in _HUES]
  return dict(zip(sorted(domains), itertools.cycle(looks)))


def curves(key: str, title: str, lines: Sequence[Line], *, ylabel: str, ylim: tuple[float, float] | None = None,
           level: float | None = None, most_points: int = 240) -> str:
  """Curves over steps with their names at the right.  `level` is a horizontal dotted line; `key` must be unique."""

  def paint(ax: Axes) -> None:
    for line in lines:
      kept = _thinned(len(line.x), most_points)
      ax.plot(np.asarray(line.x)[kept], np.asarray(line.y)[kept], color=line.color, linestyle=line.dash,
              linewidth=line.width, alpha=line.alpha, marker=line.marker, markersize=3.5)
    if level is not None:
      ax.axhline(level, color=GREY, linewidth=1.2, linestyle=':')
    ax.set(title=title, xlabel='step', ylabel=ylabel)
    ax.margins(x=0.02)
    if ylim is not None:
      ax.set_ylim(*ylim)
    _name_ends(ax, [line for line in lines if line.label])

  named = sum(bool(line.label) for line in lines)
  return _draw(key, max(3.1, 0.175 * named + 0.9), paint)


def bars(key: str, title: str, names: Sequence[str], baseline: Sequence[float], tuned: Sequence[float],
         colors: Sequence[str], *, spread: Sequence[tuple[float, float]] | None = None, xlabel: str) -> str:
  """Two horizontal bars a name, baseline in grey below tuned in colour; `spread` is (lowest, highest) of the tuned."""

  def paint(ax: Axes) -> None:
    at = np.arange(len(names))
    ax.barh(at + 0.19, tuned, height=0.38, color=colors)
    ax.barh(at - 0.19, baseline, height=0.3, color=GREY)
    for y, value, base in zip(at, tuned, baseline):
      end = max(value, spread[y][1] if spread else 0)
      ax.annotate(f'{value:.3f}', (end, y + 0.19), (4, 0), textcoords='offset points', va='center', fontsize=8)
      ax.annotate(f'{base:.3f}', (base, y - 0.19), (4, 0), textcoords='offset points', va='center', fontsize=8, color=GREY)
    if spread:
      low, high = np.transpose(spread)
      ax.hlines(at + 0.19, low, high, color=INK, linewidth=1)
      ax.plot(np.concatenate([low, high]), np.tile(at + 0.19, 2), '|', color=INK, markersize=6)
    _name_rows(ax, names)
    ax.margins(x=0.12)
    ax.set_xlim(left=0)
    ax.set(title=title, xlabel=xlabel)

  return _draw(key, 0.4 * len(names) + 0.9, paint)


def differences(key: str, title: str, names: Sequence[str], values: Sequence[float], colors: Sequence[str], *,
                xlabel: str) -> str:
  """A dot a name on either side of zero, with its value."""

  def paint(ax: Axes) -> None:
    at = np.arange(len(names))
    ax.axvline(0, color=INK, linewidth=1)
    ax.hlines(at, 0, values, color=colors, linewidth=2)
    ax.scatter(values, at, c=colors, s=38, zorder=3)
    for y, value in zip(at, values):
      side = 1 if value >= 0 else -1
      ax.annotate(f'{value:+.3f}', (value, y), (7 * side, 0), textcoords='offset points', va='center',
                  ha='left' if side > 0 else 'right', fontsize=8)
    reach = max(np.abs(values).max(), 1e-3) * 1.35
    ax.set_xlim(-reach, reach)
    _name_rows(ax, names)
    ax.set(title=title, xlabel=xlabel)

  return _draw(key, 0.27 * len(names) + 0.95, paint)


def dots(key: str, title: str, names: Sequence[str], hollow: Sequence[float], filled: Sequence[Sequence[float]],
         colors: Sequence[str], *, xlabel: str) -> str:
  """A row a name: one hollow grey dot, and a filled dot for each of several values (`filled`: lists as long as names)."""

  def paint(ax: Axes) -> None:
    at = np.arange(len(names))
    every = np.array([hollow, *filled])
    ax.hlines(at, every.min(0), every.max(0), color=GREY, linewidth=1)
    ax.scatter(hollow, at, s=44, facecolors='none', edgecolors=GREY, linewidths=1.6, zorder=3)
    for values in filled:
      ax.scatter(values, at, c=colors, s=24, zorder=4, alpha=0.85)
    _name_rows(ax, names)
    ax.margins(x=0.06)
    ax.set(title=title, xlabel=xlabel)

  return _draw(key, 0.27 * len(names) + 0.95, paint)


def short(name: str, most: int = 20) -> str:
  """A name as it can be drawn: printable ASCII, the middle of a long one left out."""
  name = re.sub(r'[^ -~]', '?', name)
  keep = (most - 3) // 2
  return name if len(name) <= most else f'{name[:most - 3 - keep]}...{name[-keep:]}'


def smoothed(values: Sequence[float], weights: Sequence[float], width: int) -> np.ndarray:
  """Weighted mean over a centred window of `width` points (shorter at the ends); NaN where all weights are 0."""
  window = np.ones(max(min(width, len(values)), 1))
  sums = np.convolve(np.multiply(values, weights), window, 'same')
  counts = np.convolve(np.asarray(weights, float), window, 'same')
  return np.where(counts > 0, sums / np.where(counts > 0, counts, 1), np.nan)


def _draw(key: str, height: float, paint: Callable[[Axes], None]) -> str:
  with matplotlib.rc_context(_STYLE | {'svg.hashsalt': key}):
    figure = Figure(figsize=(_WIDTH, height), layout='constrained')
    paint(figure.add_subplot())
    out = io.StringIO()
    figure.savefig(out, format='svg', metadata={'Date': None, 'Creator': None})
  return _tidy(out.getvalue())


def _tidy(svg: str) -> str:
  """An <svg> element for the inside of a page: no prologue, no style of its own, no ids but those it refers to."""
  svg = svg[svg.index('<svg'):].strip()
  svg = re.sub(r'<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->', '', svg, flags=re.DOTALL)
  svg = re.sub(r'<g id="[^"]*"', '<g', svg)
  svg = re.sub(r'^<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1">', svg)
  svg = re.sub(r"""(?<=[\s"(LMQC-])\d+\.\d{2,}(?=[\s"),;])""", lambda m: f'{float(m[0]):.1f}'.removesuffix('.0'), svg)
  svg = re.sub(r'\n\s*', '\n', svg)
  return svg.replace(INK, 'currentColor')


def _thinned(n: int, most: int) -> np.ndarray:
  """At most `most` indices of n, evenly spaced, the first and the last among them."""
  return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int))


def _name_rows(ax: Axes, names: Sequence[str]) -> None:
  ax.set_yticks(range(len(names)), [short(name) for name in names])
  ax.set_ylim(len(names) - 0.4, -0.6)
  ax.grid(False, axis='y')
  ax.tick_params(axis='y', length=0)
  ax.spines['left'].set_visible(False)


def _name_ends(ax: Axes, lines: Sequence[Line]) -> None:
  """Each curve's name beside its last point, moved apart where they would overlap, with a leader to the point."""
  if not lines:
    return
  low, high = ax.get_ylim()
  ax.set_ylim(low, high)
  ends = [(line.y[-1] - low) / (high - low) for line in lines]
  for line, end, at in zip(lines, ends, _apart(ends, gap=min(0.175 / 2.2, 1 / len(lines)))):
    inside = min(max(end, 0), 1)
    ax.plot([1.0, 1.035, 1.075], [inside, at, at], color=line.color, linestyle=line.dash, linewidth=1.3, clip_on=False,
            transform=ax.transAxes)
    ax.text(1.09, at, short(line.label), va='center', transform=ax.transAxes, fontsize=8.5)


def _apart(places: Sequence[float], gap: float) -> list[float]:
  """The places in [0, 1] moved as little as a sweep from either side needs, so that neighbours are `gap` apart."""
  order = np.argsort(places, kind='stable')
  at = np.clip(np.asarray(places, float)[order], 0, 1)
  for i in range(1, len(at)):
    at[i] = max(at[i], at[i - 1] + gap)
  at[-1] = min(at[-1], 1)
  for i in range(len(at) - 2, -1, -1):
    at[i] = min(at[i], at[i + 1] - gap)
  apart = np.empty_like(at)
  apart[order] = at
  return apart.tolist()
