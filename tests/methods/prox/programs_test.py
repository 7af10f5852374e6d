"""The grammar of programs: every published form by hand, the canonical form and its prefixes, hostile text."""

import random
import re
import sys

import pytest

from datasel.methods.prox import programs
from datasel.methods.prox.programs import DropDoc, Fault, KeepChunk, KeepDoc, Normalize, RemoveAll, RemoveLines, parse

PUBLISHED = {
  'drop_doc()': [DropDoc()],
  'keep_doc()': [KeepDoc()],
  'keep_chunk()': [KeepChunk()],
  'untouch_doc()': [KeepChunk()],
  'remove_lines(start=0, end=74)': [RemoveLines(0, 74)],
  'remove_lines(line_start=0, line_end=5)': [RemoveLines(0, 5)],
  'remove_lines(0, 0)': [RemoveLines(0, 0)],
  'remove_lines(all=True)': [RemoveAll()],
  'normalize(source_str="Share", target_str="")': [Normalize('Share', '')],
  'normalize(source_str="Share")': [Normalize('Share', '')],
  "normalize('Share', 'Show')": [Normalize('Share', 'Show')],
}
READ = {
  'remove_lines(3, end=4)': [RemoveLines(3, 4)],
  'remove_lines(end=4, line_start=3,)': [RemoveLines(3, 4)],
  'remove_lines(start=005, end=[006])': [RemoveLines(5, 6)],
  'remove_lines ( start = 5 , end = 6 )': [RemoveLines(5, 6)],
  '  remove_lines(start=0, end=0);remove_lines(start=5, end=6)  # both': [RemoveLines(0, 0), RemoveLines(5, 6)],
  'DROP_DOC()': [DropDoc()],
  'drop_doc': [DropDoc()], 'keep_chunk': [KeepChunk()], 'Untouch_doc\n': [KeepChunk()],
  'keep_doc() # do not drop_doc()': [KeepDoc()],
  'normalize(target_str="b", source_str="a")': [Normalize('a', 'b')],
  'normalize(source_str= "a, b=(c)", target_str= "d)")': [Normalize('a, b=(c)', 'd)')],
  r'normalize(source_str="\"a\\", target_str="\'\n\t\r\d")': [Normalize('"a\\', "'\n\t\r\\d")],
  "normalize(source_str='say \"a\"')": [Normalize('say "a"')],
  'normalize(source_str="say "a, b", ok", target_str="c "d"")': [Normalize('say "a, b", ok', 'c "d"')],
  'Here is the program:\n```python\n# remove_lines(start=9, end=9)\nkeep_chunk()\n```\n': [KeepChunk()],
  '': [], ' \n\n': [], 'No noise, nothing to do.': [],
}
FAULTS = {
  'remove_lines(start=5)': 'malformed', 'remove_lines()': 'malformed', 'remove_lines(1, 2, 3)': 'malformed',
  'remove_lines(start=5.0, end=6.0)': 'malformed', 'remove_lines(start="5", end=6)': 'malformed',
  'remove_lines(start=1_0, end=20)': 'malformed', 'remove_lines(start=٣, end=٤)': 'malformed',
  'remove_lines(start=1+1, end=6)': 'malformed', 'remove_lines(start=0, start=1)': 'malformed',
  'remove_lines(start=0, 4)': 'malformed', 'remove_lines(begin=0, end=4)': 'malformed',
  'remove_lines(all=False)': 'malformed', 'remove_lines(all=1)': 'malformed', 'remove_lines(0, all=True)': 'malformed',
  'remove_lines(start=keep_chunk(), end=3)': 'malformed', 'remove_lines(start=True, end=True)': 'malformed',
  'normalize()': 'malformed', 'normalize(target_str="a")': 'malformed', 'normalize(source_str=a)': 'malformed',
  'normalize(source_str=f"{1}", target_str="")': 'malformed', 'normalize("a" "b")': 'malformed',
  'normalize("a", "b", "c")': 'malformed', 'normalize(source_str="a")\nnormalize("b"': 'truncated',
  'drop_doc(1)': 'malformed', 'remove_lines(start=0, end=12\nkeep_chunk()': 'malformed',
  'remove_lines(start=-3, end=0)': 'range', 'remove_lines(start=6, end=5)': 'range', 'remove_lines(6, 5)': 'range',
  'remove_lines(start=0, end=1000000000000000000)': 'limit', 'delete_lines(start=0, end=6)': 'unknown',
  'remove_lines_maybe(start=0, end=0)': 'unknown', '__import__("os").system("ls")': 'unknown',
  'remove_lines(start=6, end': 'truncated', 'remove_lines(start=0, end=12': 'truncated', 'normal': 'truncated',
  r'normalize(source_str="say \"a\")': 'truncated', 'normalize(source_str="a, (b) c': 'truncated',
  'normalize(source_str="a", target_str="b)': 'truncated',
}


@pytest.mark.parametrize('program', [*PUBLISHED, *READ])
def test_a_form_that_is_read(program):
  assert list(parse(program)) == {**PUBLISHED, **READ}[program]


@pytest.mark.parametrize('program', FAULTS)
def test_a_fault(program):
  assert [found.kind for found in parse(program) if isinstance(found, Fault)] == [FAULTS[program]]


def some_calls(rng):
  def text():
    return ''.join(rng.choice('ab "\'\\,()=[]\n\r\t\v\0\x1c\x85\u2028\ud800é漢🙂') for _ in range(rng.randrange(9)))

  def call():
    start = rng.choice([0, rng.randrange(100), 10 ** rng.randrange(18)])
    return rng.choice([DropDoc(), KeepDoc(), KeepChunk(), RemoveAll(), RemoveLines(start, start + rng.randrange(50)),
                       Normalize(text(), text()), Normalize(text(), text())])
  return tuple(call() for _ in range(rng.randrange(6)))


def test_what_is_written_is_read_back():
  rng = random.Random(0)
  for _ in range(2000):
    calls = some_calls(rng)
    assert parse(programs.serialise(calls)) == calls


def test_the_canonical_form_is_the_published_one():
  program = ('drop_doc()\nkeep_doc()\nkeep_chunk()\nremove_lines(all=True)\nremove_lines(start=3, end=12)\n'
             r'normalize(source_str="a\\ \"b\"\t", target_str="")')
  assert programs.serialise(parse(program)) == program


def test_a_program_cut_anywhere_loses_its_last_call_and_no_other():
  rng = random.Random(1)
  for _ in range(150):
    calls = some_calls(rng)
    program = programs.serialise(calls)
    for size in range(len(program)):
      whole = calls[:sum(len(programs.serialise(calls[:n + 1])) <= size for n in range(len(calls)))]
      found = parse(program[:size])
      assert found[:len(whole)] == whole, program[:size]
      rest = found[len(whole):]
      assert rest in ((), (DropDoc(),), (KeepDoc(),), (KeepChunk(),)) or [fault.kind for fault in rest] == ['truncated']


def test_a_program_has_so_many_calls_and_characters():
  some = 'remove_lines(start=1, end=1)\n' * 300
  assert [type(found) for found in parse(some)] == [RemoveLines] * 256 + [Fault]
  assert [type(found) for found in parse(some.replace('\n', ';'))] == [RemoveLines] * 256 + [Fault]
  assert len(parse('keep_chunk()\n' * 256 + '```\n')) == 256
  assert [found.kind for found in parse('keep_chunk()' + ' ' * 65536)] == ['limit']
  for calls in ([KeepChunk()] * 257, [Normalize('a' * 65536)]):
    with pytest.raises(ValueError, match='want at most 256 and 65536'):
      programs.serialise(calls)
  with pytest.raises(ValueError, match='no call of a program'):
    programs.serialise(parse('remove_lines('))


@pytest.mark.parametrize('lines', [(-1, 3), (4, 3), (0, 10 ** 18)])
def test_a_range_that_cannot_be(lines):
  with pytest.raises(ValueError, match=f'lines {lines[0]}..{lines[1]}; want'):
    RemoveLines(*lines)


# Each is as long as a program may be: seconds to hours of work where matching went back over what it had read.
HOSTILE = ['normalize(' * 6553, '(' * 65000, 'normalize(source_str="' + '\\' * 65000, 'normalize(a' + '1' * 65000 + '!',
           'normalize(a' + ' ' * 65000 + '!', 'normalize(' + ' ' * 65000 + '!',
           'normalize("' + '" ' * 32000, 'a' * 65000 + '!', ' ;,' * 21000 + '!',
           'normalize(source_str="' + '", target_str="' * 4300 + '")', 'remove_lines(' + '1,' * 32000,
           'remove_lines(' + '[1' * 32000, 'remove_lines(start=' + '9' * 65000 + ')', "normalize('" + "\\'" * 32000,
           'normalize(-' + '1' * 65000 + ' ', 'x()' * 21000, '\n' * 65000 + 'x', 'drop_doc(' + '\0' * 60000]


@pytest.mark.parametrize('n', range(len(HOSTILE)))
def test_hostile_programs_are_read_without_going_back(n):
  assert all(isinstance(found, Fault) for found in parse(HOSTILE[n]))


@pytest.mark.parametrize('name', [name for name, value in vars(programs).items() if isinstance(value, re.Pattern)])
def test_no_pattern_goes_back_over_what_it_matched(name):
  plain = re.sub(r'\\.|\[(?:\\.|[^\]\\])*\]', 'x', getattr(programs, name).pattern)
  loops = [loop for loop in re.findall(r'[*+?]\+?', plain) if loop[0] != '?']
  assert loops.count('*') == (name == '_BARE_QUOTES') and '+' not in loops  # (.*) alone, up to a line's last quote


def steps(run):
  """The number of lines of Python that `run` went through."""
  count = 0

  def trace(frame, event, _):
    nonlocal count
    count += event == 'line'
    return trace
  before = sys.gettrace()
  sys.settrace(trace)
  try:
    run()
  finally:
    sys.settrace(before)
  return count


@pytest.mark.parametrize('part', ['\n', 'x(1)\n', 'x(1);', '"', '1,', 'normalize("a", ',
                                  'remove_lines(start=1, end=2)\n'])
def test_the_steps_are_linear_in_the_length(part):
  few, many = (steps(lambda n=n: parse('remove_lines(' + part * n)) for n in (50, 200))
  assert many <= 4 * few + 50
