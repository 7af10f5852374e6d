"""Programs from pairs: a noisy text and the clean one that it should become, and the calls that lead there.

Lines that went are removed in runs; what went inside a line is a normalize, where the executor can carry it out and its
source is in the chunk once.  Only deletions are expressed, so no label teaches a refiner to write text of its own.
Cf. RefineX, which takes its labels from the differences to a cleaned text too; Zhou et al. 2024 ask a model for calls.
"""

import collections
import dataclasses
import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Sequence

from datasel.methods.prox import chunks, executor, programs
from datasel.methods.prox.examples import Example

MIN_CLEAN = 400  # characters; a document whose clean text has fewer is dropped
_MIN_SHARED = 0.5  # of a line's characters: what a within-line deletion must leave
_MAX_EQUAL = 200_000  # pairs of equal lines, or of equal words of two lines: the time of a comparison grows with them
_MAX_TRIED = 10_000_000  # characters read to find which line another one might be after deletions

_KEEP = programs.serialise([programs.KeepChunk()])
_TOKEN = re.compile(r'\s+|\w+|[^\w\s]')


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
  """One document, noisy and clean.

  source: the site or domain that it is from, by which it is put in a split.  kept: of each noisy line whether the clean
  text has it, where that is known; else it is found out by comparing the two.  With `kept`, `clean` is those lines.
  """
  id: str
  source: str
  noisy: str
  clean: str
  kept: tuple[bool, ...] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Labelled:
  """A pair's examples, and how well they do.

  document: always there.  chunks: none where the document is dropped.  skipped: chunks without an example, by reason.
  exact: carrying out every program on the noisy text gives the clean one, or nothing for a document to drop.
  lines, kept_lines: of the noisy text, and of what the programs leave.  missing: clean lines that no deletion gives.
  text: what the programs leave.
  """
  document: Example
  chunks: tuple[Example, ...]
  skipped: collections.Counter
  exact: bool
  lines: int
  kept_lines: int
  missing: int
  text: str


def label(pair: Pair, count_tokens: Callable[[list[str]], Sequence[int]], *, max_tokens: int = chunks.MAX_TOKENS,
          min_clean: int = MIN_CLEAN) -> Labelled:
  """A pair's examples; count_tokens and max_tokens as in `chunks.split`.

  ValueError where `kept` is not one for each noisy line, or `clean` is not the kept lines.
  """
  noisy, clean = pair.noisy.split('\n'), pair.clean.split('\n') if pair.clean else []
  aligned: list[str | None] | None
  if pair.kept is None:
    aligned = align(noisy, clean)
  else:
    if len(pair.kept) != len(noisy) or '\n'.join(itertools.compress(noisy, pair.kept)) != pair.clean:
      raise ValueError(f'pair {pair.id!r} has {len(pair.kept)} values of `kept` for {len(noisy)} noisy lines; want one '
                       'for each, and for its clean text just the lines kept')
    aligned = [line if kept else None for line, kept in zip(noisy, pair.kept)]
  keep = len(pair.clean) >= min_clean
  decision = programs.KeepDoc() if keep else programs.DropDoc()
  document = Example(pair.id, pair.source, pair.noisy, 0, programs.serialise([decision]))
  if not keep:
    return Labelled(document, (), collections.Counter(), True, len(noisy), 0, 0, '')
  made, skipped, spans, written = [], collections.Counter(), [], []
  for chunk in chunks.split([pair.noisy], count_tokens, max_tokens=max_tokens)[0]:
    program, reason = _KEEP, 'too many lines to compare'
    if aligned is not None:
      program, reason = chunk_program(chunk, aligned[chunk.start:chunk.stop])
    spans.append((chunk.start, chunk.stop))
    written.append(program)
    if reason:
      skipped[reason] += 1
    else:
      made.append(Example(f'{pair.id}@{chunk.start}', pair.source, chunk.text, chunk.start, program))
  text = executor.execute(pair.noisy, written, spans=spans).text
  missing = sum((collections.Counter(clean) - collections.Counter(text.split('\n'))).values())
  kept_lines = text.count('\n') + bool(text)
  return Labelled(document, tuple(made), skipped, text == pair.clean, len(noisy), kept_lines, missing, text)


def chunk_program(chunk: chunks.Chunk, wanted: Sequence[str | None]) -> tuple[str, str]:
  """The program that makes a chunk's lines the wanted ones, None for a line to remove; and why it is no example, or ''.

  A chunk without an example is kept as it is: 'one line too long' for its refiner, of 'too many calls', or with 'a line
  too long to compare'.
  """
  if chunk.skipped:
    return _KEEP, 'one line too long'
  calls: list[programs.Call] = [*removals([line is not None for line in wanted], chunk.start)]
  for before, after in zip(chunk.text.split('\n'), wanted):
    if after is not None and after != before:
      if (spans := spans_deleted(before, after)) == []:
        return _KEEP, 'a line too long to compare'
      calls += _deletions(before, spans or (), chunk.text)
  try:
    return (programs.serialise(calls) if calls else _KEEP), ''
  except ValueError:
    return _KEEP, 'too many calls'


def removals(kept: Sequence[bool], start: int) -> list[programs.RemoveLines]:
  """The runs of lines that are not kept; `start` is the number of the first."""
  calls, at = [], start
  for keeps, run in itertools.groupby(kept):
    size = len(list(run))
    if not keeps:
      calls.append(programs.RemoveLines(at, at + size - 1))
    at += size
  return calls


def align(noisy: Sequence[str], clean: Sequence[str]) -> list[str | None] | None:
  """What each noisy line should become: itself, a clean line that deletions in it give, or None, to be removed.

  Where the clean lines are among the noisy ones in order, they are all found.  Else None instead of the list for texts
  of so many lines alike, or so many rewritten ones, that comparing them would take too long.
  """
  if not _comparable(noisy, clean):
    whole = _subsequence(noisy, clean)
    return whole and [line if kept else None for line, kept in zip(noisy, whole)]
  aligned: list[str | None] = [None] * len(noisy)
  unmatched: list[tuple[range, range]] = []
  i = j = 0
  for block in difflib.SequenceMatcher(None, noisy, clean, autojunk=False).get_matching_blocks():
    aligned[block.a:block.a + block.size] = noisy[block.a:block.a + block.size]
    unmatched.append((range(i, block.a), range(j, block.b)))
    i, j = block.a + block.size, block.b + block.size
  if any(clean_lines for _, clean_lines in unmatched):
    # The longest common runs are not always part of the longest common sequence.
    if (whole := _subsequence(noisy, clean)) is not None:
      return [line if kept else None for line, kept in zip(noisy, whole)]
    tried = sum(len(clean_lines) * sum(len(noisy[k]) for k in noisy_lines) for noisy_lines, clean_lines in unmatched)
    if tried > _MAX_TRIED:
      return None
    for noisy_lines, clean_lines in unmatched:
      _align_inside(noisy, clean, noisy_lines, clean_lines, aligned)
  return aligned


def _subsequence(noisy: Sequence[str], clean: Sequence[str]) -> list[bool] | None:
  """Which noisy lines (or words) are the clean ones, the last that will do; None where not all of these are there."""
  kept, j = [False] * len(noisy), len(clean)
  for i in reversed(range(len(noisy))):
    if j and noisy[i] == clean[j - 1]:
      kept[i], j = True, j - 1
  return None if j else kept


def _align_inside(noisy: Sequence[str], clean: Sequence[str], noisy_lines: range, clean_lines: range,
                  aligned: list[str | None]) -> None:
  """Between two matches: each clean line with the next noisy one that deletions turn into it."""
  i = noisy_lines.start
  for j in clean_lines:
    for k in range(i, noisy_lines.stop):
      if len(clean[j]) >= _MIN_SHARED * len(noisy[k]) and spans_deleted(noisy[k], clean[j]) is not None:
        aligned[k], i = clean[j], k + 1
        break


def spans_deleted(before: str, after: str) -> list[tuple[int, int]] | None:
  """The (start, stop) of what was deleted from `before`, whole words and signs; None where more than that was done.

  [] for lines of so many words alike that comparing them would take too long.
  """
  if not 0 < len(after) < len(before):
    return None
  old, new = _TOKEN.findall(before), _TOKEN.findall(after)
  if _subsequence(old, new) is None:
    return None
  if not _comparable(old, new):
    return []
  spans, offsets = [], [0, *itertools.accumulate(map(len, old))]
  for kind, i1, i2, _, _ in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
    if kind == 'delete':
      spans.append((offsets[i1], offsets[i2]))
    elif kind != 'equal':
      return None
  return spans


def _comparable(old: Sequence[str], new: Sequence[str]) -> bool:
  counts = collections.Counter(new)
  return sum(counts[one] for one in old) <= _MAX_EQUAL


def _deletions(before: str, spans: Iterable[tuple[int, int]], text: str) -> list[programs.Normalize]:
  """Calls for what is deleted from a line, where each source is in the chunk's text once and the executor takes it."""
  calls = []
  for start, stop in spans:
    source = before[start:stop]
    # The executor refuses sources of white space or one or two letters, and only it knows which.
    if text.count(source) == 1 and executor.execute(text, programs.serialise([programs.Normalize(source)])).errors == 0:
      calls.append(programs.Normalize(source))
  return calls
