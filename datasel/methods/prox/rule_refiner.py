"""The rules as a refiner: their verdicts are programs, so that they get the same audit and statistics as a model's."""

import itertools
import re
from collections.abc import Sequence

from datasel import workdir
from datasel.methods.prox import chunks, labels, programs, refining, rules

_LABEL = re.compile(r'\[\d{3,}\]')


class RuleRefiner:
  """Rules of `rules.NAMES`, joined by '+': 'c4', 'gopher', 'fineweb', 'gopher+c4+fineweb'; 'boilerplate' before any.

  They are applied in the order of `rules.NAMES`, each to what the one before leaves; together with fineweb, c4 doesn't
  ask for a mark at the end of lines, as in FineWeb's recipe.  boilerplate and c4 remove lines, and c4 citations too;
  the others only drop documents.  C4's line rules are carried out exactly, but that spaces at a line's ends stay.
  ValueError for another name, or one twice.
  """

  max_tokens = chunks.MAX_TOKENS

  def __init__(self, names: str):
    chosen = names.split('+')
    if not set(chosen) <= set(rules.NAMES) or len(set(chosen)) != len(chosen):
      raise ValueError(f'rules {names!r}; want some of {", ".join(rules.NAMES)}, each once, joined by +')
    self._chosen = [name for name in rules.NAMES if name in chosen]
    self._terminal = 'fineweb' not in chosen
    edits = not {'boilerplate', 'c4'}.isdisjoint(chosen)
    self.stages = (('document',) if chosen != ['boilerplate'] else ()) + (('chunk',) if edits else ())
    self.name = 'rules ' + '+'.join(self._chosen)
    self.fingerprint = workdir.digest([self._chosen, *map(workdir.digest_file, (__file__, rules.__file__))])

  def count_tokens(self, lines: Sequence[str]) -> list[int]:
    """Words and signs, see `rules.words`; a numbered line has at most max_tokens, for to rules no line is too long."""
    return [min(len(rules.words(line)), self.max_tokens) if _LABEL.match(line) and '\n' not in line
            else len(rules.words(line)) for line in lines]

  def decide(self, texts: Sequence[str]) -> list[refining.Decision]:
    """Of each text the verdict of all the rules, on its edited text where a rule comes after one that edits."""
    decisions = []
    for text in texts:
      verdict = self.verdict(text)
      call = programs.KeepDoc() if verdict.keep else programs.DropDoc()
      decisions.append(refining.Decision(program=programs.serialise([call]), reason=verdict.reason))
    return decisions

  def write(self, some: Sequence[chunks.Chunk]) -> list[refining.Written]:
    """Of each chunk the removals and citations; finished is 'length' where they are more than a program holds."""
    written = []
    for chunk in some:
      calls = self.calls(chunk)
      whole = len(calls) <= programs.MAX_CALLS
      program = programs.serialise(calls[-programs.MAX_CALLS:] or [programs.KeepChunk()])
      written.append(refining.Written(program=program, finished='rules' if whole else 'length'))
    return written

  def verdict(self, text: str) -> rules.Verdict:
    """Whether a document stays, and the first rule that it fails."""
    for name in self._chosen:
      if name == 'boilerplate':
        lines = text.split('\n')
        text = '\n'.join(line for line, reason in zip(lines, rules.boilerplate(lines)) if not reason)
        verdict = rules.KEPT
      elif name == 'gopher':
        verdict = rules.gopher_repetition(text)
        verdict = rules.gopher_quality(text) if verdict.keep else verdict
      elif name == 'c4':
        verdict, text = rules.c4(text, terminal=self._terminal)
      else:
        verdict = rules.fineweb(text)
      if not verdict.keep:
        return verdict
    return rules.KEPT

  def calls(self, chunk: chunks.Chunk) -> list[programs.Call]:
    """The lines of a chunk to remove, and before them the citations in those that stay."""
    lines = chunk.text.split('\n')
    reasons = rules.boilerplate(lines) if 'boilerplate' in self._chosen else [''] * len(lines)
    calls: list[programs.Call] = []
    if 'c4' in self._chosen:
      reasons = [reason or rules.c4_line(line, terminal=self._terminal) for line, reason in zip(lines, reasons)]
      kept = '\n'.join(itertools.compress(lines, [not reason for reason in reasons]))
      citations = sorted(set(rules.CITATION.findall(kept)), key=lambda one: (len(one), one))
      # '[]' first: C4 removes them all at once, and '[[1]]' leaves one.
      calls += [programs.Normalize(source) for source in citations]
    return calls + labels.removals([not reason for reason in reasons], chunk.start)
