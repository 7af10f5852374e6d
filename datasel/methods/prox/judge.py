"""What a language model is asked for labels, in our words, and what is made of its answers.

Two scores of a document, for its content and for its form, and three programs of a chunk, each for one kind of noise.
Zhou et al. 2024, arXiv 2409.17115, Section 2.3 and Appendix A: their scales, their rule and their kinds of noise; the
texts of the questions are ours.
"""

import itertools
import re
from collections.abc import Sequence

from datasel.methods.prox import chunks, executor, labels, programs
from datasel.methods.prox.endpoint import Question

MAX_REMOVED = 0.9  # of a chunk's characters; a program that removes more is taken for a mistake

_SYSTEM = 'You judge and clean web text that language models are trained on. Follow the asked form of answer exactly.'

_SCORES = {
  'educational score': """\
Below is a text from the web. How much would a pupil or student learn from it? Start at 0 and add a point for each \
statement that holds:
- It has some facts about a subject that is taught, whatever else it has, such as advertising.
- It deals with such a subject, though in passing, without order, or mixed with other matters.
- A teacher could use it: it explains ideas of a school subject coherently, even if not completely.
- It serves a course well: clear, in order, close to a chapter or a lesson, with little that is beside the point.
- It is excellent to learn from: it reasons in detail, is easy to follow, and nothing in it is out of place.""",
  'format score': """\
Below is the text that was extracted from a web page. How well was it extracted? Start at 0 and add a point for each \
statement that holds:
- Some of it can be read, though much may be menus, markup or scraps.
- The worst has been cleaned away and an order can be seen, though parts may be foreign to the text or out of joint.
- The body is whole and reads on; a link, a date or a picture's caption may have been left here and there.
- It is close to what would be printed: clear paragraphs, hardly anything that does not belong.
- It is flawless: its structure is as the author meant it, with no trace of the page that it was on.""",
}

_FORM = """\
Each line of the text begins with its number in brackets, such as [007]; the number is no part of the line. Write a \
program of these calls, one a line:
remove_lines(start=FIRST, end=LAST)   removes whole lines, from FIRST to LAST, both included
normalize(source_str="WORDS", target_str="")   removes WORDS, which must stand in the text exactly so
keep_chunk()   changes nothing
Use no other call, and touch nothing but this kind of noise: when in doubt, keep. Put the program, alone, between \
lines of ``` at the end of your answer, after at most one sentence about it."""

_NOISE = {
  'navigation': ("""\
The text below was extracted from a web page. Remove the navigation at its beginning: menus, breadcrumbs, buttons to \
sign in or to search. Keep the title of the page. Remove whole lines where all of a line is navigation, and only the \
words where a line has other text too.""",
                 (('[000]Start | Shop | Blog\n[001]Sign in\n[002]How bees find their way\n[003]Bees use the sun.',
                   'remove_lines(start=0, end=1)'),
                  ('[000]Menu How bees find their way\n[001]Bees use the sun, even behind clouds.',
                   'normalize(source_str="Menu ", target_str="")'),
                  ('[012]A dance tells the others where to fly.\n[013]It is the longer the farther.',
                   'keep_chunk()'))),
  'links': ("""\
The text below was extracted from a web page. Remove web addresses. Remove whole lines where a line is nothing but \
addresses, and only the address where a line has other text too.""",
            (('[004]Soap is made of fat and lye.\n[005]https://soap.example/shop?id=7\n[006]Lye burns the skin.',
              'remove_lines(start=5, end=5)'),
             ('[000]Read on at http://soap.example/lye before you begin.',
              'normalize(source_str="http://soap.example/lye", target_str="")'),
             ('[000]Soap is made of fat and lye.', 'keep_chunk()'))),
  'footers': ("""\
The text below was extracted from a web page. Remove what stands at its end and is no part of its text: copyrights, \
addresses of the publisher, buttons to share or subscribe, lists of references or of other pages.""",
              (('[020]So the bridge was closed.\n[021]Share this\n[022]© 2019 Bridge News. All rights reserved.',
                'remove_lines(start=21, end=22)'),
               ('[000]The bridge was built in 1880.\n[001]It is made of iron.', 'keep_chunk()'))),
}
KINDS = tuple(_NOISE)

_FENCED = re.compile(r'^[ \t]*```[^\n]*\n(.*?)^[ \t]*```', re.DOTALL | re.MULTILINE)


def score_questions(text: str) -> list[Question]:
  """The questions for a document's two scores, content first."""
  return [Question(_SYSTEM, f'{scale}\n\nGive your reasons in at most 100 words, and then, on a line of its own:\n'
                            f'{name.capitalize()}: <points>\n\nThe text:\n<text>\n{text}\n</text>', 256)
          for name, scale in _SCORES.items()]


def program_questions(chunk: chunks.Chunk) -> list[Question]:
  """The questions for a chunk's programs, one for each of KINDS."""
  questions = []
  for task, shots in _NOISE.values():
    examples = '\n\n'.join(f'[doc]\n{text}\n[/doc]\n```\n{program}\n```' for text, program in shots)
    questions.append(Question(_SYSTEM, f'{task}\n\n{_FORM}\n\nExamples:\n\n{examples}\n\nThe text:\n\n[doc]\n'
                                       f'{chunk.numbered()}\n[/doc]', 512))
  return questions


def scores(answers: Sequence[str]) -> tuple[int, int] | None:
  """The two scores of the answers to `score_questions`; None where one has no score of 0 to 5, or two that differ."""
  found = []
  for name, answer in zip(_SCORES, answers, strict=True):
    points = set(re.findall(rf'{name}[\s:*_]{{0,12}}([0-9][0-9./]*)', answer.lower()))
    points = {one.rstrip('.').removesuffix('/5') for one in points}
    if len(points) != 1 or not re.fullmatch('[0-5]', next(iter(points))):
      return None
    found.append(int(points.pop()))
  return found[0], found[1]


def keeps(content: int, form: int) -> bool:
  """The rule: a document stays for its content, or for its form where its content is nearly enough."""
  return content >= 3 or content == 2 and form >= 4


def merged(chunk: chunks.Chunk, answers: Sequence[str], *, max_removed: float = MAX_REMOVED) -> tuple[str, str]:
  """One canonical program of the answers to `program_questions`, and '', or '' and why there is none.

  None that is malformed, cut off, out of the chunk, looks for what is not there, adds a word, is refused by the
  executor, or removes more than max_removed of the characters.  Programs that change nothing are keep_chunk().
  """
  removed, normalizes = set(), {}
  for answer in answers:
    fenced = _FENCED.findall(answer)
    for call in programs.parse('\n'.join(fenced) if fenced else answer):
      match call:
        case programs.Fault(kind, _) if kind != 'unknown' or fenced:
          return '', f'program {kind}'
        case programs.DropDoc() | programs.KeepDoc():
          return '', 'program of a document'
        case programs.RemoveAll():
          removed.update(range(chunk.start, chunk.stop))
        case programs.RemoveLines(start, end):
          if start < chunk.start or end >= chunk.stop:
            return '', 'program out of range'
          removed.update(range(start, end + 1))
        case programs.Normalize(source, target):
          if source not in chunk.text:
            return '', 'program of words that are not there'
          if not set(target.split()) <= set(source.split()):
            return '', 'program that adds words'
          normalizes[call] = None
  lines = chunk.text.split('\n')
  kept = [number not in removed for number in range(chunk.start, chunk.stop)]
  # What is only in lines that go anyway needs no call of its own.
  calls: list[programs.Call] = [call for call in normalizes
                                if any(call.source in line for line, stays in zip(lines, kept) if stays)]
  local = [*calls, *labels.removals(kept, 0)]
  if not local:
    return programs.serialise([programs.KeepChunk()]), ''
  if len(local) > programs.MAX_CALLS:
    return '', 'program of too many calls'
  result = executor.execute(chunk.text, programs.serialise(local))
  if result.errors:
    return '', 'program refused'
  left = '\n'.join(itertools.compress(lines, kept))
  for call in calls:
    left = left.replace(call.source, call.target)
  if len(left) < (1 - max_removed) * len(chunk.text):
    return '', 'program that removes too much'
  return programs.serialise([*calls, *labels.removals(kept, chunk.start)]), ''
