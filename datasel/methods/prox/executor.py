"""Programs carried out on a text: each call within its chunk's lines, with what came of it, and of the document.

Two executors.  The default one confines a program to the lines that it was written for, costs a bad call no more than
its chunk's other edits, and drops only what is nearly empty once edited.  `compat` is the authors', to the byte: theirs
searches a line for brackets, commas and equals signs, edits the whole document, and knows words by their spaces.
Zhou et al. 2024, arXiv 2409.17115, and its released code.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from datasel.methods.prox.programs import (
  Call,
  DropDoc,
  Fault,
  KeepChunk,
  KeepDoc,
  Normalize,
  RemoveAll,
  RemoveLines,
  parse,
)

MAX_ERRORS = 2  # a chunk (the authors: a document) of so many is left as it was
MIN_WORDS = 11  # an edited document of fewer is dropped
MIN_KEPT = 20  # one with at most 1 in so many of its words left is dropped
COMPAT_SCANS, COMPAT_SLACK = 4096, 10 ** 6  # how far the authors' unbounded replacements may go, see `execute`

LEVELS = ('chunk', 'document')
_LABEL = re.compile(r'\[[0-9]{3,}\]')
_ESCAPED = str.maketrans({'\n': r'\n', '\r': r'\r', '\t': r'\t'})


class Outcome(NamedTuple):
  """What came of one call.  call: as parsed; in compat, its line of the program.  chunk: its program, from 0.

  kind: 'applied'; 'no match', a source that isn't there; 'out of range', a range that begins outside the chunk, or goes
  on after its end, to which it was removed; 'refused', for the reason in `detail`; 'reverted', applied but for its
  chunk's errors; 'truncated'; 'unknown', a call by another name.  'out of range' and 'refused' are errors.
  """
  chunk: int
  call: Call | Fault | str
  kind: str
  detail: str = ''


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
  """text: what is left, '' where nothing is.  decision: 'kept' as it was, 'edited' or 'dropped'; reason: why.

  errors: the calls that were refused or out of range; in compat, the authors' count.  reverted: the chunks left as
  they were because of theirs.
  """
  text: str
  decision: str
  reason: str
  outcomes: tuple[Outcome, ...] = ()
  errors: int = 0
  reverted: tuple[int, ...] = ()


def execute(text: str, program: str | Sequence[str], *, level: str = 'chunk', compat: bool = False,
            spans: Sequence[tuple[int, int]] | None = None) -> Result:
  """Carries out a program on a text, without an exception whatever the two are.

  level: 'document', drop or keep, where nothing but drop_doc() alone drops; 'chunk', edits.  program: of the document;
  with spans, one of each chunk.  spans: the chunks' (start, stop), lines from 0, stop not included; they are all of the
  document's lines, in order.  Line numbers are the document's, as they were before any edit.

  A chunk's normalizes come first, in order, then its removals.  A source must be more than white space and two
  letters or digits, without a line break, and its target without control characters.  One that isn't there is looked
  for in other spellings: without its line's label and a space after that; and, with a line break or tab of a
  backslash that was not doubled, as `\\nabla`, with the backslash.  A chunk of two errors or more is left as it was.
  An edited document is dropped if at most 1 of 20 of its words or 10 words in all are left, a blank one always; one
  that no call changed is kept.  A chunk never grows by more than its program's length.  The time is linear in the
  lengths of text and programs, for a program has at most 256 calls.

  compat: the authors' text; the programs of `spans` are joined, as they do.  Where they raise, on a blank text, it is
  dropped with the error's name as the reason.  What they would do without bound is not done: replacements that read
  more than 4096 times the text's and the program's length, or that grow the text to over 16 times that and a million
  characters; the text is then kept, for 'limit'.

  ValueError for another level, and for spans that are not the text's lines or not one for each program.
  """
  if level not in LEVELS:
    raise ValueError(f'level is {level!r}; want one of {", ".join(LEVELS)}')
  programs = [program] if isinstance(program, str) else list(program)
  if spans is None and len(programs) != 1:
    raise ValueError(f'{len(programs)} programs without spans; want one, or the lines that each is of')
  if spans is not None:
    _check(text, programs, spans)
  if compat:
    return (_compat_chunk if level == 'chunk' else _compat_document)(text, '\n'.join(programs))
  if not text or text.isspace():
    return Result('', 'dropped', 'blank')
  if level == 'document':
    return _document(text, programs)
  return _chunks(text, programs, spans)


def words(text: str) -> int:
  """The number of words: runs of letters, digits and their marks; in scripts without spaces, every letter is one."""
  return _ascii_words(text) if text.isascii() else len(_WORD.findall(text))


def _check(text: str, programs: list[str], spans: Sequence[tuple[int, int]]) -> None:
  ends = [0, *(stop for _, stop in spans)]
  n_lines = text.count('\n') + 1
  if (len(spans) != len(programs) or ends[-1] != n_lines
      or any(start != end or stop <= start for (start, stop), end in zip(spans, ends))):
    raise ValueError(f'spans {list(spans)[:8]} for {len(programs)} programs and {n_lines} lines; want one for each '
                     f'program, and each to start where the one before stops, from 0 to {n_lines}')


def _document(text: str, programs: list[str]) -> Result:
  outcomes, drop, keep = [], False, False
  for n, program in enumerate(programs):
    for call in parse(program):
      drop |= isinstance(call, DropDoc)
      keep |= isinstance(call, KeepDoc | KeepChunk)
      if isinstance(call, Fault):
        outcomes.append(_fault(n, call))
      elif isinstance(call, DropDoc | KeepDoc | KeepChunk):
        outcomes.append(Outcome(n, call, 'applied'))
      else:
        outcomes.append(Outcome(n, call, 'refused', 'a call of a chunk'))
  errors = _errors(outcomes)
  if drop and not keep:
    return Result('', 'dropped', 'drop_doc', tuple(outcomes), errors)
  reason = 'both drop and keep' if drop else 'keep_doc' if keep else 'no decision'
  return Result(text, 'kept', reason, tuple(outcomes), errors)


def _chunks(text: str, programs: list[str], spans: Sequence[tuple[int, int]] | None) -> Result:
  lines = text.split('\n') if len(programs) > 1 else None
  kept, outcomes, errors, reverted, lost = [], [], 0, [], 0
  for n, program in enumerate(programs):
    start, stop = spans[n] if spans else (0, text.count('\n') + 1)
    before = '\n'.join(lines[start:stop]) if lines else text
    after, its_outcomes, its_lost = _chunk(n, before, start, stop, program)
    its_errors = _errors(its_outcomes)
    if its_errors >= MAX_ERRORS:
      after, its_outcomes, its_lost = before, _reverted(its_outcomes), 0
      reverted.append(n)
    if after is not None:
      kept.append(after)
    outcomes += its_outcomes
    errors += its_errors
    lost += its_lost
  after = '\n'.join(kept)
  audit = (tuple(outcomes), errors, tuple(reverted))
  if after == text:
    return Result(text, 'kept', 'too many errors' if reverted else 'unchanged', *audit)
  # At least `need` words left are too many for either rule, whatever the words lost, and are soon counted.
  need = max(MIN_WORDS, lost // (MIN_KEPT - 1) + 1)
  if not _has_words(after, need):
    left = words(after)
    if _has_words(text, left * MIN_KEPT):
      return Result('', 'dropped', f'at most 1 of {MIN_KEPT} words left', *audit)
    if left < MIN_WORDS:
      return Result('', 'dropped', f'fewer than {MIN_WORDS} words left', *audit)
  return Result(after, 'edited', 'edited', *audit)


def _chunk(n: int, text: str, start: int, stop: int, program: str) -> tuple[str | None, list[Outcome], int]:
  """What is left of a chunk, None where no line is; the outcomes; and a bound on the words that are gone."""
  outcomes, ranges, lost = [], [], 0
  longest = len(text) + len(program)
  for call in parse(program):
    if isinstance(call, RemoveLines):
      if start <= call.start and call.end < stop:
        outcomes.append(Outcome(n, call, 'applied'))
      else:
        outcomes.append(Outcome(n, call, 'out of range', f'the chunk has lines {start}..{stop - 1}'))
      if start <= call.start < stop:
        ranges.append((call.start - start, call.end - start))
    elif isinstance(call, Normalize):
      text, outcome, its_lost = _normalized(n, text, call, longest)
      outcomes.append(outcome)
      lost += its_lost
    elif isinstance(call, RemoveAll):
      ranges.append((0, stop - start - 1))
      outcomes.append(Outcome(n, call, 'applied'))
    elif isinstance(call, Fault):
      outcomes.append(_fault(n, call))
    elif isinstance(call, DropDoc):
      outcomes.append(Outcome(n, call, 'refused', 'a call of a document'))
    else:
      outcomes.append(Outcome(n, call, 'applied'))
  if ranges:
    kept = _without(text.split('\n'), ranges)
    left = '\n'.join(kept)
    return left if kept else None, outcomes, lost + _most_words(len(text) - len(left), text)
  return text, outcomes, lost


def _errors(outcomes: list[Outcome]) -> int:
  kinds = [outcome.kind for outcome in outcomes]
  return kinds.count('refused') + kinds.count('out of range')


def _reverted(outcomes: Iterable[Outcome]) -> list[Outcome]:
  return [outcome._replace(kind='reverted') if outcome.kind == 'applied' else outcome for outcome in outcomes]


def _fault(n: int, fault: Fault) -> Outcome:
  return Outcome(n, fault, fault.kind if fault.kind in ('truncated', 'unknown') else 'refused', fault.kind)


def _normalized(n: int, text: str, call: Normalize, longest: int) -> tuple[str, Outcome, int]:
  refused = ''
  for source, target in _spellings(call):
    core = source.strip()
    if not core or len(core) <= 2 and core.isalnum():
      refused = refused or 'a source of white space, or of two letters or digits'
      continue
    if '\n' in source or _CONTROL.search(target):
      refused = refused or 'a line break, or a control character in the target'
      continue
    if len(target) < len(source):
      after = text.replace(source, target)
      count = (len(text) - len(after)) // (len(source) - len(target))
    else:
      count = text.count(source)
      if len(text) + count * (len(target) - len(source)) > longest:
        return text, Outcome(n, call, 'refused', 'the text would grow by more than the program'), 0
      after = text.replace(source, target) if count else text
    if count:
      # Each occurrence may have been all words, and have parted two.
      return after, Outcome(n, call, 'applied'), count * (_most_words(len(source), text) + 1)
  return text, Outcome(n, call, 'refused' if refused else 'no match', refused), 0


def _spellings(call: Normalize) -> Iterator[tuple[str, str]]:
  """The sources and targets that a call may mean, the likeliest first."""
  pairs = [(call.source, call.target)]
  if not call.source.isprintable() and (source := call.source.translate(_ESCAPED)) != call.source:
    pairs.append((source, call.target.translate(_ESCAPED)))
  for source, target in pairs:
    yield source, target
    if label := _LABEL.match(source):
      source, target = source[label.end():], target.removeprefix(label[0])
      yield source, target
      if source.startswith(' '):
        yield source[1:], target.removeprefix(' ')


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
  """Ranges with both ends, in order of their starts, those that overlap or touch in one."""
  merged: list[tuple[int, int]] = []
  for start, end in sorted(ranges, key=lambda one: one[0]):
    if merged and start <= merged[-1][1] + 1:
      merged[-1] = (merged[-1][0], max(merged[-1][1], end))
    else:
      merged.append((start, end))
  return merged


def _without(lines: list[str], ranges: Iterable[tuple[int, int]]) -> list[str]:
  kept, at = [], 0
  for start, end in _merged(ranges):
    kept += lines[at:max(start, 0)]
    at = max(at, start, end + 1)
  return kept + lines[at:]


def _compat_document(text: str, program: str) -> Result:
  if 'drop' in program:
    return Result('', 'dropped', 'drop')
  return Result(text, 'kept', 'no drop')


def _compat_chunk(text: str, program: str) -> Result:
  longest = 16 * (len(text) + len(program)) + COMPAT_SLACK
  scans = COMPAT_SCANS * (len(text) + len(program))
  before, outcomes, ranges, errors, everything = text, [], [], 0, False
  n_lines = text.count('\n') + 1
  for line in program.strip(' ').split('\n'):
    removes = line.startswith('remove_lines')
    if not removes and not line.startswith('normalize'):
      continue
    if removes and 'all=True' in line:
      everything = True
      outcomes.append(Outcome(0, line, 'applied'))
      continue
    begin, end = line.find('('), line.find(')')
    # Without a '(' the call is one error; without a ')' it is one too, and goes on less its last character.
    errors += begin < 0 or end < 0
    values = [part.split('=', 2)[1:2] for part in line[begin + 1:end].split(',')]
    kind = 'refused'
    if begin < 0:
      pass
    elif removes:
      try:
        ranges.append((int(values[0][0]), int(values[1][0])))
        kind = 'out of range' if ranges[-1][1] >= n_lines else 'applied'
      except (IndexError, ValueError):
        errors += 1
    elif len(values) < 3:
      if not all(values):
        errors += 1
      else:
        source, target = values[0][0].strip('"'), values[1][0].strip('"') if len(values) == 2 else ''
        scans -= len(text)
        count = 0 if not source or len(values) == 2 and source == ' ' else text.count(source)
        if scans < 0 or len(text) + count * (len(target) - len(source)) > longest:
          return Result(before, 'kept', 'limit', tuple(outcomes), errors)
        text = text.replace(source, target) if count else text
        kind = 'applied' if count else 'no match'
    outcomes.append(Outcome(0, line, kind))
  left = '' if everything else '\n'.join(_without(text.split('\n'), ranges))
  errors += sum(max(span) >= n_lines for span in _merged(ranges))
  return _compat_decision(before, left, tuple(outcomes), errors)


def _compat_decision(before: str, after: str, outcomes: tuple[Outcome, ...], errors: int) -> Result:
  # With `need` words left, of at most every other character, neither rule holds, and counting on is of no use.
  need = max(MIN_WORDS, (len(before) + 1) // (2 * MIN_KEPT) + 1)
  n_after = len(after.split(None, need))
  if n_after < need:
    n_before = len(before.split())
    if not n_before:
      return Result('', 'dropped', 'ZeroDivisionError', outcomes, errors)
    if n_after / n_before <= 1 - 0.95 and errors < MAX_ERRORS:
      return Result('', 'dropped', f'at most 1 of {MIN_KEPT} words left', outcomes, errors)
    if n_after < MIN_WORDS:
      return Result('', 'dropped', f'fewer than {MIN_WORDS} words left', outcomes, errors)
  if errors >= MAX_ERRORS:
    return Result(before, 'kept', 'too many errors', tuple(_reverted(outcomes)), errors, (0,))
  if after == before:
    return Result(before, 'kept', 'unchanged', outcomes, errors)
  return Result(after, 'edited', 'edited', outcomes, errors)


def _class(characters: Iterable[int]) -> str:
  """The inside of a regular expression's brackets for these code points, which are in order."""
  runs: list[list[int]] = []
  for one in characters:
    if runs and runs[-1][1] == one - 1:
      runs[-1][1] = one
    else:
      runs.append([one, one])
  return ''.join(f'\\U{first:08x}-\\U{last:08x}' for first, last in runs)


# Thai, Lao, Burmese, Khmer, kana, and Han with its extensions.
_UNSPACED = [*range(0xe00, 0xf00), *range(0x1000, 0x10a0), *range(0x1780, 0x1800), *range(0x3040, 0x3100),
             *range(0x31f0, 0x3200), *range(0x3400, 0x4dc0), *range(0x4e00, 0xa000), *range(0xf900, 0xfb00),
             *range(0x20000, 0x32000)]
_UNSPACED_LETTERS = _class(one for one in _UNSPACED if chr(one).isalnum())
_MARKS = _class(sorted({one for one in range(0x20000) if unicodedata.category(chr(one))[0] == 'M'}
                       - set(_UNSPACED)))
_SPACED_LETTER = rf'[^\W_{_class(_UNSPACED)}]'
_WORD = re.compile(rf"[{_UNSPACED_LETTERS}]|{_SPACED_LETTER}+(?:['\u2019{_MARKS}]+{_SPACED_LETTER}+)*")
_CONTROL = re.compile(r'[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]')


_NO_WORD = bytes(b if chr(b).isalnum() else ord(' ') for b in range(128)) + b' ' * 128


def _ascii_words(text: str) -> int:
  """`words` of what is ASCII in a text.  Of any text at most that, for what stands between two of them stays there."""
  return len(text.encode('ascii', 'ignore').translate(_NO_WORD, b"'").split())


def _most_words(characters: int, text: str) -> int:
  """The most words in so many characters of a text: in ASCII there is a character between any two."""
  return (characters + 1) // 2 if text.isascii() else characters


def _has_words(text: str, n: int) -> bool:
  """words(text) >= n, mostly from the text's beginning."""
  return (_ascii_words(text[:10 * n]) >= n or _ascii_words(text) >= n
          or not text.isascii() and len(_WORD.findall(text)) >= n)
