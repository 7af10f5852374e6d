"""What was dropped or changed, and why: documents of a refined corpus side by side with what they were.

  python -m datasel.methods.prox.inspect OUT --corpus CORPUS --decision dropped -n 10
  python -m datasel.methods.prox.inspect OUT --corpus CORPUS --html FILE
"""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import logging
import os
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from datasel import workdir
from datasel.data import corpus as corpora
from datasel.methods.prox import audit, executor, pieces
from datasel.methods.prox import programs as language

_COLOURS = {'-': '31', '+': '32', 'head': '1', 'soft': '2'}
_CONTEXT = 2  # unchanged lines shown beside a changed one
_WIDEST = 400  # characters of a line
# Control characters, marks that turn the direction of text, other separators of lines, and what has neither ink nor
# width: soft hyphens, zero-width spaces, word joiners, byte order marks, tags.
_UNSEEN = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff'
                     '\ud800-\udfff\U000e0000-\U000e007f]')


@dataclasses.dataclass(frozen=True)
class Case:
  """One document.

  domain: 'train/web'.  after: '' where it was dropped.  fields: of its row, beside id and text.  compat: whether its
  programs were carried out by the authors' executor.
  """
  domain: str
  record: dict[str, Any]
  before: str
  after: str
  fields: dict[str, Any] = dataclasses.field(default_factory=dict)
  compat: bool = False


def cases(output: audit.Output, corpus: str | os.PathLike, *, decision: str | None = None, domain: str | None = None,
          reason: str | None = None, identity: str | None = None) -> Iterator[Case]:
  """The documents, in order, of this decision, domain ('web' or 'train/web'), reason (a part of it) and id.

  A document's refined text is that of its programs carried out again.  ValueError for a domain that the output does not
  have, and where the corpus is not the one that was refined.
  """
  sources = pieces.sources_of(corpora.Corpus(corpus))
  names = {f'{source.split}/{source.domain}' for source in sources}
  if domain and domain not in names and domain not in {source.domain for source in sources}:
    raise ValueError(f'no domain {domain!r}; known: {", ".join(sorted(names))}')
  reader = pieces.Reader(sources)
  compat = output.manifest['settings']['compat']
  for piece in map(lambda one: pieces.Piece(**one), output.manifest['pieces']):
    name = piece.name.rpartition('-')[0]
    if domain and domain not in (name, name.partition('/')[2]):
      continue
    for row, record in enumerate(audit.read(output.path / pieces.file_names(piece)[1]), piece.start):
      if (decision in (None, record['decision']) and (reason or '') in record['reason']
          and identity in (None, record['id'])):
        document = next(reader.documents(piece.source, row), None)
        if document is None:
          raise ValueError(f'{corpus} has no row {row} in {piece.source}; give the corpus that was refined')
        left = audit.replay(document.text, record, compat=compat).text
        yield Case(name, record, document.text, left, document.fields, compat)


class Pair(NamedTuple):
  """A line, numbered as in programs, and what it became: the same, another, or None where it was removed."""
  number: int
  old: str
  new: str | None


def pairs(case: Case) -> list[Pair]:
  """A document's lines side by side, in linear time: those that its programs removed, and what the others became.

  ValueError for a text that is not the one that the programs leave.
  """
  old, new = case.before.split('\n'), case.after.split('\n') if case.after else []
  depths = [0] * (len(old) + 1)  # how many more calls remove a line than the one before it
  for start, stop in _removed(case, len(old)):
    depths[min(max(start, 0), len(old))] += 1
    depths[min(stop, len(old))] -= 1
  gone = [depth > 0 for depth in itertools.accumulate(depths[:-1])]
  if (want := gone.count(False)) != len(new):
    raise ValueError(f'{case.record["id"]!r} has {len(new)} lines left, and its programs leave {want}')
  left = iter(new)
  return [Pair(n, line, None if out else next(left)) for n, (line, out) in enumerate(zip(old, gone))]


def _removed(case: Case, n_lines: int) -> Iterator[tuple[int, int]]:
  """The (start, stop) of the lines that each call removed; they may go beyond the text, and overlap."""
  decision = case.record['decision']
  if decision == 'dropped':
    yield 0, n_lines
  if decision != 'edited':
    return
  if case.compat:  # anywhere in the document
    yield from _authors_ranges('\n'.join(chunk['program'] for chunk in case.record['chunks']))
    return
  for chunk in case.record['chunks']:
    kinds = [kind for _, kind in chunk['outcomes']]
    if kinds.count('refused') + kinds.count('out of range') >= executor.MAX_ERRORS:
      continue  # left as it was
    for call in language.parse(chunk['program']):
      if isinstance(call, language.RemoveAll):
        yield chunk['start'], chunk['stop']
      elif isinstance(call, language.RemoveLines) and chunk['start'] <= call.start < chunk['stop']:
        yield call.start, min(call.end + 1, chunk['stop'])


def _authors_ranges(program: str) -> Iterator[tuple[int, int]]:
  """As `executor` reads them in compat, of an edited document: one whose lines were all removed would be dropped."""
  for line in program.strip(' ').split('\n'):
    if line.startswith('remove_lines') and (begin := line.find('(')) >= 0:
      values = [part.split('=', 2)[1:2] for part in line[begin + 1:line.find(')')].split(',')]
      with contextlib.suppress(IndexError, ValueError):
        start, end = int(values[0][0]), int(values[1][0])
        if 0 <= end and start <= end:
          yield start, end + 1


def folded(lines: list[Pair]) -> list[Pair | int]:
  """`pairs`, with a number for so many unchanged lines away from any change; a lone one stays."""
  changed = [n for n, pair in enumerate(lines) if pair.old != pair.new]
  near = {n for at in changed for n in range(at - _CONTEXT, at + _CONTEXT + 1)}
  if not changed:
    near = set(range(2 * _CONTEXT))
  found: list[Pair | int] = []
  for is_near, group in itertools.groupby(range(len(lines)), key=near.__contains__):
    run = list(group)
    found += [lines[n] for n in run] if is_near or len(run) == 1 else [len(run)]
  return found


def headline(case: Case) -> str:
  """One line."""
  record = case.record
  identity = record['id'].replace('\n', r'\n')
  return (f'{identity}  {case.domain}  {record["decision"]}: {record["reason"]}  {record["before"]["words"]:,} -> '
          f'{record["after"]["words"]:,} words')


def programs(case: Case) -> list[str]:
  """What was written of a document, and what came of each call."""
  document, found = case.record['document'], []
  if document:
    score = '' if document['score'] is None else f', score {document["score"]:+.2f}'
    cut = ', not read whole' if document['truncated'] else ''
    found.append(f'document: {document["program"]}{score}{cut}')
  for chunk in case.record['chunks']:
    times = collections.Counter(f'{call} {kind}' for call, kind in chunk['outcomes'])
    outcomes = ', '.join(f'{times[what]} {what}' for what in times)
    found.append(f'lines {chunk["start"]}..{chunk["stop"] - 1} ({chunk["finished"]}): {outcomes or "no call"}')
    found += [f'  {line}' for line in chunk['program'].split('\n') if line.strip()]
  return found


def terminal(case: Case, *, colour: bool) -> str:
  """One document for a terminal: nothing in it can move the cursor or change a colour but our own."""
  paint = lambda name, text: f'\x1b[{_COLOURS[name]}m{text}\x1b[0m' if colour else text
  lines = [paint('head', visible(headline(case))), *(paint('soft', visible(line)) for line in programs(case))]
  for pair in folded(pairs(case)):
    if isinstance(pair, int):
      lines.append(paint('soft', f'    ... {pair} lines as they were'))
      continue
    number, old, new = pair
    if old == new:
      lines.append(f'{number:5d}   {visible(old)}')
    else:
      lines += [paint(mark, f'{number:5d} {mark} {visible(line)}') for mark, line in (('-', old), ('+', new))
                if line is not None]
  return '\n'.join(lines) + '\n'


def visible(text: str) -> str:
  """`escaped`, and a very long line cut, with the number of characters left out."""
  seen = escaped(text)
  return seen if len(seen) <= _WIDEST else f'{seen[:_WIDEST]} ... {len(seen) - _WIDEST} more characters'


def escaped(text: str) -> str:
  r"""The text with every control character but tab and newline written out, and what can't be seen: \x1b."""
  return _UNSEEN.sub(lambda match: match[0].encode('unicode_escape', 'surrogatepass').decode(), text)


def main(argv: list[str]) -> None:
  """The command line."""
  logging.basicConfig(level=logging.INFO, stream=sys.stderr, format='%(message)s')
  parser = argparse.ArgumentParser('datasel.methods.prox.inspect')
  parser.add_argument('out', help='a refined corpus')
  parser.add_argument('--corpus', required=True, help='what it was refined from')
  parser.add_argument('--decision', choices=audit.DECISIONS)
  parser.add_argument('--domain', help='web, or train/web')
  parser.add_argument('--reason', help='a part of it')
  parser.add_argument('--id', dest='identity')
  parser.add_argument('-n', type=int, default=10, help='documents')
  parser.add_argument('--html', type=pathlib.Path, help='writes a page to this file')
  args = parser.parse_args(argv)
  try:
    if args.n < 1:
      raise ValueError(f'-n {args.n}; want at least 1 document')
    output = audit.Output(args.out)
    chosen = itertools.islice(cases(output, args.corpus, decision=args.decision, domain=args.domain,
                                    reason=args.reason, identity=args.identity), args.n)
    if args.html:
      from datasel.methods.prox import inspect_page
      with workdir.replacing(args.html, 'w') as f:
        f.write(inspect_page.page(output, list(chosen)))
      print(args.html)
      return
    for n, case in enumerate(chosen):
      print(('\n' if n else '') + terminal(case, colour=sys.stdout.isatty()))
  except BrokenPipeError:
    sys.stdout = None  # the reader has gone: nothing more to flush
  except (ValueError, OSError) as e:
    sys.exit(f'{parser.prog}: {visible(str(e))}')


if __name__ == '__main__':
  main(sys.argv[1:])
