"""What a refinement takes away, line by line: of what kind, and how much of it is noise where that is known."""

import collections
import itertools
import os
import re
from typing import Any

from datasel.methods.prox import audit, inspect

MOST = 2000  # documents that are looked at
_SHOWN = {'edited': 4, 'dropped': 2}  # documents of each decision that a report shows

# The first that fits a line is its kind.
KINDS = {
  'blank': re.compile(r'\s*'),
  'addresses': re.compile(r'\W*(?:https?://|www\.)\S+\W*|\S+@\S+\.\w+'),
  'rights and footers': re.compile(r'.*(?:copyright|\N{COPYRIGHT SIGN}|all rights reserved|privacy policy|powered by'
                                   r'|terms (?:of|and)).*', re.I),
  'sharing and accounts': re.compile(r'.*\b(?:share|tweet|facebook|twitter|follow us|sign up|sign in|log ?in|register'
                                     r'|subscribe|password)\b.*', re.I),
  'menus and labels': re.compile(r'(?:\S+\s+){0,4}\S+(?<![.!?"\N{RIGHT DOUBLE QUOTATION MARK}])\s*|.*(?:[|»›·].*){2,}'),
  'text': re.compile(r'.*', re.S),
}


def kind(line: str) -> str:
  """One of KINDS, by the line alone: a rough sorting, for people to look at."""
  return next(name for name, pattern in KINDS.items() if pattern.fullmatch(line))


def removed(corpus: str | os.PathLike, output: audit.Output, *, most: int = MOST) -> dict[str, Any]:
  """What an output lacks of the first `most` documents of its corpus; JSON:

    documents: looked at;  kinds: {kind: {'there': lines of documents that stayed, 'gone': those not left as they were}}
    characters: {'text': {'there', 'gone'}, 'noise': likewise}, of all documents whose rows have a string `kept` of a
      '0' or '1' for each line, as those of `demo_corpus`; {} where none has.
  """
  kinds = {name: {'there': 0, 'gone': 0} for name in KINDS}
  characters: dict[str, dict[str, int]] = {}
  documents = 0
  for documents, case in enumerate(itertools.islice(inspect.cases(output, corpus), most), 1):  # noqa: B007
    stays = [(pair.old, pair.new == pair.old) for pair in inspect.pairs(case)]
    if case.after:
      for line, left in stays:
        counted = kinds[kind(line)]
        counted['there'] += 1
        counted['gone'] += not left
    kept = case.fields.get('kept')
    if not (isinstance(kept, str) and len(kept) == len(stays) and set(kept) <= set('01')):
      continue  # another corpus's field
    for (line, left), flag in zip(stays, kept):
      counted = characters.setdefault('text' if flag == '1' else 'noise', {'there': 0, 'gone': 0})
      counted['there'] += len(line)
      counted['gone'] += 0 if left else len(line)
  return {'documents': documents, 'kinds': kinds, 'characters': characters}


def shown(corpus: str | os.PathLike, output: audit.Output) -> list[inspect.Case]:
  """A few documents that were edited or dropped, the first of each reason before others."""
  found: dict[str, list[inspect.Case]] = collections.defaultdict(list)
  for decision, n in _SHOWN.items():
    some = list(itertools.islice(inspect.cases(output, corpus, decision=decision), 200))
    first = {case.record['reason']: case for case in reversed(some)}
    found[decision] = list(itertools.islice(itertools.chain(first.values(), (
      case for case in some if case not in first.values())), n))
  return [case for cases in found.values() for case in cases]
