"""Noise for clean documents: what pages had around their text, put around and into other texts.

The labels are exact by construction, and there can be as many as there are clean documents.  The noise is of the pages
of the train split alone, so that no line of the other splits' sites is ever seen.
"""

import dataclasses
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence

from datasel import workdir
from datasel.methods.prox.labels import Pair

MAX_LINES = 60  # of a head or a tail
MAX_INSIDE = 6  # of what comes between paragraphs
ONLY_NOISE = 0.2  # the share of documents without any text, to be dropped


@dataclasses.dataclass(frozen=True)
class Boilerplate:
  """Runs of removed lines: the beginnings of pages, their ends, and short ones from between."""
  heads: tuple[tuple[str, ...], ...]
  tails: tuple[tuple[str, ...], ...]
  inside: tuple[tuple[str, ...], ...]


def boilerplate(pairs: Iterable[Pair]) -> Boilerplate:
  """What was removed from pages, each run once.

  ValueError for a pair without `kept`, and where there is no noise of a kind.
  """
  heads, tails, inside = {}, {}, {}
  for pair in pairs:
    if pair.kept is None:
      raise ValueError(f'pair {pair.id!r} does not say which lines it keeps')
    if not any(pair.kept):
      continue
    lines, at = pair.noisy.split('\n'), 0
    for keeps, run in itertools.groupby(pair.kept):
      size = len(list(run))
      removed, at = tuple(lines[at:at + size]), at + size
      if keeps:
        continue
      if at == size:
        heads[removed[:MAX_LINES]] = None
      elif at == len(lines):
        tails[removed[-MAX_LINES:]] = None
      elif size <= MAX_INSIDE:
        inside[removed] = None
  if not (heads and tails and inside):
    raise ValueError(f'{len(heads)} heads, {len(tails)} tails and {len(inside)} runs of noise between; want some '
                     'of each: more pages')
  return Boilerplate(tuple(heads), tuple(tails), tuple(inside))


def add(documents: Iterable[tuple[str, str, str]], noise: Boilerplate, *, seed: int = 0) -> Iterator[Pair]:
  """A pair for each clean (id, source, text), a pure function of these, the noise and the seed."""
  for id, source, text in documents:
    rng = random.Random(workdir.digest([seed, id, source]))
    only_noise = rng.random() < ONLY_NOISE
    lines: list[tuple[str, bool]] = []
    _take(lines, rng, noise.heads, 0.8)
    clean = [] if only_noise else text.split('\n')
    for n, line in enumerate(clean):
      if n:
        _take(lines, rng, noise.inside, min(0.3, 3 / len(clean)))
      lines.append((line, True))
    if only_noise:
      for _ in range(rng.randint(1, 4)):
        _take(lines, rng, noise.inside, 1)
    _take(lines, rng, noise.tails, 0.8)
    kept = tuple(keeps for _, keeps in lines)
    yield Pair(f'noise:{id}', source, '\n'.join(line for line, _ in lines), '\n'.join(clean), kept)


def _take(lines: list[tuple[str, bool]], rng: random.Random, runs: Sequence[tuple[str, ...]], share: float) -> None:
  if rng.random() < share:
    lines += [(line, False) for line in rng.choice(runs)]
