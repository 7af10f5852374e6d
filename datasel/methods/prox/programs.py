r"""The programs that clean a text: their calls, the grammar they are written in, a parser and a canonical writer.

  drop_doc()  keep_doc()                                         of a document
  remove_lines(start=3, end=5)  remove_lines(all=True)           of a chunk: both ends included, counted from 0,
  normalize(source_str="a \"b\"", target_str="")  keep_chunk()   over the whole document

One line holds any number of calls, and then anything; blank lines, comments, code fences and prose are no calls.

  call     = name '(' [argument {',' argument} [',']] ')'
  argument = [name '='] (string | number | '[' number ']' | 'True' | 'False')
  string   = '"' ... '"' | "'" ... "'"    with the escapes \\ \" \' \n \r \t; any other backslash is one

Arguments are literal, by position or by name: start or line_start, end or line_end, source_str, target_str, all.
untouch_doc() is keep_chunk(); a name's case does not matter.  Two things beside the grammar are read: a call without
arguments alone on its line without its brackets, and a normalize alone on its line with quotes that should have been
escaped.  Text is matched, never evaluated.  ProX, Zhou et al. 2024, Table 1; the aliases are those that its prompts and
models write.
"""

import dataclasses
import re
from collections.abc import Iterable

MAX_CHARACTERS = 1 << 16  # of one program; the published ones are of 256 tokens
MAX_CALLS = 256  # of one program
MAX_DIGITS = 18  # of one line number


@dataclasses.dataclass(frozen=True, slots=True)
class DropDoc:
  """Leaves nothing of the document."""


@dataclasses.dataclass(frozen=True, slots=True)
class KeepDoc:
  """Leaves the document to the chunks' programs."""


@dataclasses.dataclass(frozen=True, slots=True)
class KeepChunk:
  """Leaves the chunk as it is."""


@dataclasses.dataclass(frozen=True, slots=True)
class RemoveLines:
  """Lines start..end, both included, numbered from 0 over the document; ValueError unless 0 <= start <= end < 10^18."""
  start: int
  end: int

  def __post_init__(self):
    if not 0 <= self.start <= self.end < 10 ** MAX_DIGITS:
      raise ValueError(f'lines {self.start}..{self.end}; want 0 <= start <= end, of at most {MAX_DIGITS} digits')


@dataclasses.dataclass(frozen=True, slots=True)
class RemoveAll:
  """Every line of the chunk."""


@dataclasses.dataclass(frozen=True, slots=True)
class Normalize:
  """`target` in place of every `source` in the chunk."""
  source: str
  target: str = ''


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
  """What stands where a call should.  text: its first 200 characters.

  kind: 'truncated', the program's end cut off in a call; 'unknown', a call by another name; 'malformed'; 'range', a
  negative line number or an end before its start; 'limit', more than MAX_CHARACTERS, MAX_CALLS, or MAX_DIGITS.
  """
  kind: str
  text: str


Call = DropDoc | KeepDoc | KeepChunk | RemoveLines | RemoveAll | Normalize

_PLAIN = {'drop_doc': DropDoc(), 'keep_doc': KeepDoc(), 'keep_chunk': KeepChunk(), 'untouch_doc': KeepChunk()}
_ARGUMENTS = {  # by position; then by name
  'remove_lines': (('start', 'end'), {'start': 'start', 'line_start': 'start', 'end': 'end', 'line_end': 'end',
                                      'all': 'all'}),
  'normalize': (('source', 'target'), {'source_str': 'source', 'target_str': 'target'}),
}
_NAMES = (*_PLAIN, *_ARGUMENTS)

# Possessive throughout: what a program is made of must not make a match go back over it.
_NAME, _SPACE = r'[A-Za-z_][A-Za-z0-9_]*+', r'\s*+'
_DOUBLE, _SINGLE = r'"[^"\\]*+(?:\\.[^"\\]*+)*+', r"'[^'\\]*+(?:\\.[^'\\]*+)*+"
_COMMON = re.compile(r'remove_lines\((?:line_)?start=([0-9]{1,18}), ?(?:line_)?end=([0-9]{1,18})\)')
_COMMON_NORMALIZE = re.compile(r'normalize\(source_str="([^"\\]*+)", target_str="([^"\\]*+)"\)')
_BEGIN = re.compile(rf'[\s;,]*+({_NAME}){_SPACE}\(')
_ARGUMENT = re.compile(rf"""{_SPACE}(?:({_NAME}){_SPACE}={_SPACE})?+
                            (?:({_DOUBLE}"|{_SINGLE}')|(-?[0-9]++)|\[([0-9]++)\]|(True|False)){_SPACE}(?:,|(?=\)))""",
                       re.X)
_END = re.compile(rf'{_SPACE}\)')
# What may be left of an argument where a program was cut off.
_PARTIAL = re.compile(rf"""{_SPACE}(?:{_NAME}{_SPACE}(?:={_SPACE})?+)?+(?:{_DOUBLE}(?:"|\\)?+|{_SINGLE}(?:'|\\)?+|
                           \[[0-9]*+\]?+|[A-Za-z]++|-?+[0-9]*+){_SPACE}""", re.X)
_BARE_QUOTES = re.compile(r'normalize\s*+\(\s*+source_str\s*+=\s*+"(.*)(?<!\\)"\s*+\)', re.I)
_BARE_TARGET = re.compile(r'"\s*+,\s*+target_str\s*+=\s*+"')
_ESCAPE = re.compile(r'\\(.)')
_ESCAPES = {'\\': '\\', '"': '"', "'": "'", 'n': '\n', 'r': '\r', 't': '\t'}
_ESCAPED = str.maketrans({'\\': r'\\', '"': r'\"', '\n': r'\n', '\r': r'\r', '\t': r'\t'})


def parse(program: str) -> tuple[Call | Fault, ...]:
  """A program's calls, and what is wrong with it, in order; never raises, in time linear in its length.

  A fault ends its line, and one of 'limit' for size the program.  Only the last line can be truncated.
  """
  if len(program) > MAX_CHARACTERS:
    return (Fault('limit', program[:200]),)
  found: list[Call | Fault] = []
  lines = program.strip().split('\n')
  for number, line in enumerate(lines):
    if len(found) >= MAX_CALLS:
      if any(_BEGIN.match(rest) for rest in lines[number:]):
        found.append(Fault('limit', line[:200]))
      break
    line = line.strip()
    if match := _COMMON.fullmatch(line):
      start, end = int(match[1]), int(match[2])
      found.append(RemoveLines(start, end) if start <= end else Fault('range', line[:200]))
    elif match := _COMMON_NORMALIZE.fullmatch(line):
      found.append(Normalize(match[1], match[2]))
    else:
      _parse_line(line, number == len(lines) - 1, found)
  return tuple(found)


def serialise(calls: Iterable[Call]) -> str:
  """The program in its one canonical form, a call a line; `parse` gives the calls back.

  ValueError for what is not a call, and for more calls or characters than `parse` takes.
  """
  lines = [_written(call) for call in calls]
  program = '\n'.join(lines)
  if len(lines) > MAX_CALLS or len(program) > MAX_CHARACTERS:
    raise ValueError(f'a program of {len(lines)} calls and {len(program)} characters; want at most {MAX_CALLS} and '
                     f'{MAX_CHARACTERS}')
  return program


def _written(call: Call) -> str:
  match call:
    case DropDoc():
      return 'drop_doc()'
    case KeepDoc():
      return 'keep_doc()'
    case KeepChunk():
      return 'keep_chunk()'
    case RemoveAll():
      return 'remove_lines(all=True)'
    case RemoveLines(start, end):
      return f'remove_lines(start={start}, end={end})'
    case Normalize(source, target):
      return f'normalize(source_str="{source.translate(_ESCAPED)}", target_str="{target.translate(_ESCAPED)}")'
  raise ValueError(f'{call!r} is no call of a program; leave out the faults that parse found')


def _parse_line(line: str, last: bool, found: list[Call | Fault]) -> None:
  at = 0
  while at < len(line):
    begin = _BEGIN.match(line, at)
    if begin is None:
      rest = line[at:].strip(' \t;,').lower()
      if at == 0 and rest in _PLAIN:
        found.append(_PLAIN[rest])
      elif last and rest and any(name.startswith(rest) for name in _NAMES):
        found.append(Fault('truncated', rest))
      return
    if len(found) >= MAX_CALLS:
      found.append(Fault('limit', line[at:at + 200]))
      return
    name, arguments, inside = begin[1].lower(), [], begin.end()
    while argument := _ARGUMENT.match(line, inside):
      arguments.append(argument.groups())
      inside = argument.end()
    text = line[begin.start(1):begin.start(1) + 200]
    if end := _END.match(line, inside):
      found.append(_call(name, arguments, text))
      at = end.end()
    else:
      found.append(_broken(name, line, at, inside, last, text))
      return


def _broken(name: str, line: str, at: int, inside: int, last: bool, text: str) -> Call | Fault:
  if name == 'normalize' and at == 0 and (bare := _BARE_QUOTES.fullmatch(line)):
    parts = _BARE_TARGET.split(bare[1])
    # With the last quote one part more: that opens a target, which was cut off after a bracket.
    if len(_BARE_TARGET.split(bare[1] + '"')) == len(parts) <= 2:
      return Normalize(*map(_unescaped, parts))
  if last and _PARTIAL.fullmatch(line, inside):
    return Fault('truncated', text)
  return Fault('malformed' if name in _NAMES else 'unknown', text)


def _call(name: str, arguments: list[tuple], text: str) -> Call | Fault:
  if name in _PLAIN:
    return Fault('malformed', text) if arguments else _PLAIN[name]
  if name not in _ARGUMENTS:
    return Fault('unknown', text)
  positions, keywords = _ARGUMENTS[name]
  values: dict[str, str | int | bool] = {}
  for n, (keyword, string, number, label, flag) in enumerate(arguments):
    by_position = keyword is None and n < len(positions) and (n == 0 or arguments[n - 1][0] is None)
    key = positions[n] if by_position else keywords.get(keyword)
    if key is None or key in values:
      return Fault('malformed', text)
    digits = number or label
    if digits and len(digits.lstrip('-')) > MAX_DIGITS:
      return Fault('limit', text)
    values[key] = int(digits) if digits else _unescaped(string[1:-1]) if string else flag == 'True'
  kinds = {key: type(value) for key, value in values.items()}
  if name == 'normalize':
    if kinds in ({'source': str}, {'source': str, 'target': str}):
      return Normalize(values['source'], values.get('target', ''))
  elif values == {'all': True} and kinds['all'] is bool:
    return RemoveAll()
  elif kinds == {'start': int, 'end': int}:
    start, end = values['start'], values['end']
    return RemoveLines(start, end) if 0 <= start <= end else Fault('range', text)
  return Fault('malformed', text)


def _unescaped(literal: str) -> str:
  return _ESCAPE.sub(lambda match: _ESCAPES.get(match[1], match[0]), literal) if '\\' in literal else literal
