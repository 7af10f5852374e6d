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
from scipy.optimize import isotonic_regression

INK = '#1f2328'  # stands for the page's text colour, see _tidy
GREY = '#8b929b'
ACCENT = '#0072b2'

# Okabe and Ito's colours without the two that vanish on paper or in the dark; they hold for colour-blind readers.
_HUES = ('#0072b2', '#e69f00', '#009e73', '#d55e00', '#56b4e9', '#cc79a7')
_DASHES = ('-', '--', ':', '-.')

_WIDTH = 5.4  # inches of 72 units
_LABEL = 0.175  # inches that a label needs
_DOTS = 50  # points of a curve that may be dots
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
  dots: bool = False  # at its points, if these are few


def palette(domains: Sequence[str]) -> dict[str, tuple[str, str]]:
  """{domain: (colour, dash)}, a function of the set of names: a domain looks the same in every figure."""
  looks = [(hue, dash) for dash in _DASHES for hue in _HUES]
  return dict(zip(sorted(domains), itertools.cycle(looks)))


def curves(key: str, title: str, lines: Sequence[Line], *, ylabel: str, level: float | None = None,
           most_points: int = 240) -> str:
  """Curves over steps with their names at the right.  `level` is a horizontal dotted line; `key` must be unique."""

  def paint(ax: Axes) -> None:
    for line in lines:
      kept = _thinned(len(line.x), most_points)
      marker = 'o' if line.dots and len(kept) <= _DOTS else ''
      ax.plot(np.asarray(line.x)[kept], np.asarray(line.y)[kept], color=line.color, linestyle=line.dash,
              linewidth=line.width, alpha=line.alpha, marker=marker, markersize=3.5)
    if level is not None:
      ax.axhline(level, color=GREY, linewidth=1.2, linestyle=':')
    ax.set(title=title, xlabel='step', ylabel=ylabel)
    ax.margins(x=0.02)
    name_ends(ax, [line for line in lines if line.label])

  named = sum(bool(line.label) for line in lines)
  return draw(key, max(3.1, _LABEL * named + 1), paint)


def bars(key: str, title: str, names: Sequence[str], baseline: Sequence[float], tuned: Sequence[float],
         colors: Sequence[str], *, spread: Sequence[tuple[float, float]] | None = None, xlabel: str) -> str:
  """Two horizontal bars a name, tuned in colour above baseline in grey; `spread` is (lowest, highest) of the tuned."""

  def paint(ax: Axes) -> None:
    upper, lower = np.arange(len(names)) - 0.17, np.arange(len(names)) + 0.2
    ax.barh(upper, tuned, height=0.4, color=colors)
    ax.barh(lower, baseline, height=0.26, color=GREY)
    low, high = np.transpose(spread) if spread else (tuned, tuned)
    if spread:
      ax.hlines(upper, low, high, color=INK, linewidth=1)
      ax.plot(np.concatenate([low, high]), np.tile(upper, 2), '|', color=INK, markersize=6)
    beside = dict(xytext=(4, 0), textcoords='offset points', va='center', fontsize=8)
    for n, (value, base) in enumerate(zip(tuned, baseline)):
      ax.annotate(f'{value:.3f}', (max(value, high[n]), upper[n]), **beside)
      ax.annotate(f'{base:.3f}', (base, lower[n]), color=GREY, **beside)
    _name_rows(ax, names)
    ax.margins(x=0.12)
    ax.set_xlim(left=0)
    ax.set(title=title, xlabel=xlabel)

  return draw(key, 0.4 * len(names) + 0.9, paint)


def differences(key: str, title: str, names: Sequence[str], values: Sequence[float], colors: Sequence[str], *,
                xlabel: str) -> str:
  """A dot a name on either side of zero, with its value."""

  def paint(ax: Axes) -> None:
    at = np.arange(len(names))
    ax.axvline(0, color=INK, linewidth=1)
    ax.hlines(at, 0, values, color=colors, linewidth=2)
    ax.scatter(values, at, c=colors, s=38, zorder=3)
    for y, value in zip(at, values):
      side, ha = (7, 'left') if value >= 0 else (-7, 'right')
      ax.annotate(signed(value), (value, y), (side, 0), textcoords='offset points', va='center', ha=ha, fontsize=8)
    reach = max(np.abs(values).max(), 1e-3) * 1.35
    ax.set_xlim(-reach, reach)
    _name_rows(ax, names)
    ax.set(title=title, xlabel=xlabel)

  return draw(key, 0.27 * len(names) + 0.95, paint)


def dots(key: str, title: str, names: Sequence[str], hollow: Sequence[float], filled: Sequence[Sequence[float]],
         colors: Sequence[str], *, xlabel: str) -> str:
  """A row a name: a hollow grey dot, and a dot for its value in each list of `filled`."""

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

  return draw(key, 0.27 * len(names) + 0.95, paint)


def intervals(key: str, title: str, names: Sequence[str], series: Sequence[tuple[Sequence[float], Sequence[float]]],
              colors: Sequence[str], *, levels: Sequence[float], xlabel: str) -> str:
  """A row a name: a dot with a bar of `error` to either side for each (values, errors), and a tick at its level.

  NaN stands for what is not there.
  """

  def paint(ax: Axes) -> None:
    at = np.arange(len(names))
    ax.plot(levels, at, '|', color=GREY, markersize=11, markeredgewidth=1.8)
    apart = 0.3 / len(series)
    for n, ((values, errors), color) in enumerate(zip(series, colors)):
      y = at + apart * (2 * n + 1 - len(series))
      ax.errorbar(values, y, xerr=np.nan_to_num(errors), fmt='o', color=color, markersize=4.5, elinewidth=1.4, zorder=3)
    _name_rows(ax, names)
    ax.margins(x=0.05)
    ax.set(title=title, xlabel=xlabel)

  return draw(key, (0.2 + 0.1 * len(series)) * len(names) + 0.95, paint)


def scatter(key: str, title: str, x: Sequence[float], y: Sequence[float], *, xlabel: str, ylabel: str) -> str:
  """A dot for each (x, y), and the line on which they would be equal."""

  def paint(ax: Axes) -> None:
    ax.axline((x[0], x[0]), slope=1, color=GREY, linewidth=1, linestyle=':')
    many = len(x) > 200
    ax.scatter(x, y, s=9 if many else 24, color=ACCENT, alpha=0.35 if many else 0.8, linewidths=0)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)

  return draw(key, 3.1, paint)


def front(key: str, title: str, x: Sequence[float], y: Sequence[float], marked: dict[str, tuple[float, float]], *,
          xlabel: str, ylabel: str) -> str:
  """A dot for each (x, y), and `marked` ones by name."""

  def paint(ax: Axes) -> None:
    ax.scatter(x, y, s=12, color=GREY, linewidths=0)
    for name, place in marked.items():
      ax.plot(*place, 'o', color=ACCENT, markersize=6)
      ax.annotate(short(name), place, xytext=(6, 4), textcoords='offset points', fontsize=8)
    ax.margins(x=0.12, y=0.12)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)

  return draw(key, 3.1, paint)


def signed(x: float, digits: int = 3) -> str:
  """'+0.123' or '−0.123', with a true minus."""
  return f'{x:+.{digits}f}'.replace('-', '−')


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


def draw(key: str, height: float, paint: Callable[[Axes], None]) -> str:
  """The SVG of what `paint` draws, `height` inches high.  key: a name of its own, by which its ids are made."""
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
  svg = re.sub(r'<[^>]*>', lambda tag: re.sub(r'\d+\.\d{4,}', lambda x: f'{float(x[0]):.2f}', tag[0]), svg)
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


def name_ends(ax: Axes, lines: Sequence[Line]) -> None:
  """Each curve's name beside its last point, moved apart where they would overlap, with a leader to the point."""
  if not lines:
    return
  low, high = ax.get_ylim()
  ax.set_ylim(low, high)
  ends = [float(np.clip((_last(line.y) - low) / (high - low), 0, 1)) for line in lines]
  height = ax.figure.get_figheight() - 0.85  # of the axes, about
  for line, end, at in zip(lines, ends, _apart(ends, gap=min(_LABEL / height, 1 / len(lines)))):
    look = dict(color=line.color, clip_on=False, transform=ax.transAxes)
    ax.plot([1.0, 1.04], [end, at], linewidth=0.8, alpha=0.7, **look)
    ax.plot([1.045, 1.115], [at, at], linewidth=2, linestyle=line.dash, **look)
    ax.text(1.13, at, short(line.label), va='center', transform=ax.transAxes, fontsize=8.5)


def _last(y: Sequence[float]) -> float:
  """The last value that is a number."""
  return next((value for value in reversed(y) if np.isfinite(value)), 0.0)


def _apart(places: Sequence[float], gap: float) -> list[float]:
  """The places in [0, 1] moved as little as possible (in squares) to have `gap` between neighbours, in their order."""
  order, steps = np.argsort(places, kind='stable'), gap * np.arange(len(places))
  apart = np.empty(len(places))
  apart[order] = np.clip(isotonic_regression(np.asarray(places)[order] - steps).x, 0, 1 - steps[-1]) + steps
  return apart.tolist()
