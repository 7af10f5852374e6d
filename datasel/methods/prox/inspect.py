"""What was dropped or changed, and why: documents of a refined corpus side by side with what they were.

  python -m datasel.methods.prox.inspect OUT --corpus CORPUS --decision dropped -n 10
  python -m datasel.methods.prox.inspect OUT --corpus CORPUS --html FILE
"""

import argparse
import collections
import dataclasses
import difflib
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
from datasel.methods.prox import audit, pieces

_COLOURS = {'-': '31', '+': '32', 'head': '1', 'soft': '2'}
_CONTEXT = 2  # unchanged lines shown beside a changed one
_WIDEST = 400  # characters of a line
# Control characters, marks that turn the direction of text, and other separators of lines.
_UNSEEN = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]')


@dataclasses.dataclass(frozen=True)
class Case:
  """One document.  domain: 'train/web'.  after: '' where it was dropped.  fields: of its row, beside id and text."""
  domain: str
  record: dict[str, Any]
  before: str
  after: str
  fields: dict[str, Any] = dataclasses.field(default_factory=dict)


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
        yield Case(name, record, document.text, left, document.fields)


class Pair(NamedTuple):
  """A line, numbered as in programs, and what it became: the same, another, or None where it was removed."""
  number: int | None
  old: str | None
  new: str | None


def pairs(before: str, after: str) -> list[Pair]:
  """A document's lines side by side."""
  old, new = before.split('\n'), after.split('\n') if after else []
  found: list[Pair] = []
  for _, i, j, k, m in difflib.SequenceMatcher(None, old, new).get_opcodes():
    found += itertools.starmap(Pair, itertools.zip_longest(range(i, j), old[i:j], new[k:m]))
  return found


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
  record = case.record
  return (f'{record["id"]}  {case.domain}  {record["decision"]}: {record["reason"]}  {record["before"]["words"]:,} -> '
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
  for pair in folded(pairs(case.before, case.after)):
    if isinstance(pair, int):
      lines.append(paint('soft', f'    ... {pair} lines as they were'))
      continue
    _, old, new = pair
    number = '     ' if pair.number is None else f'{pair.number:5d}'
    if old == new:
      lines.append(f'{number}   {visible(old)}')
    else:
      lines += [paint(mark, f'{number} {mark} {visible(line)}') for mark, line in (('-', old), ('+', new))
                if line is not None]
  return '\n'.join(lines) + '\n'


def visible(text: str) -> str:
  """`escaped`, and a very long line cut, with the number of characters left out."""
  seen = escaped(text)
  return seen if len(seen) <= _WIDEST else f'{seen[:_WIDEST]} ... {len(seen) - _WIDEST} more characters'


def escaped(text: str) -> str:
  r"""The text with every control character but tab and newline written out: \x1b."""
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
