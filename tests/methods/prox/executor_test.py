"""Both executors on the authors' cases, on cases by hand, against brute force, and on hostile programs."""

import json
import pathlib
import random

import pytest

from datasel.methods.prox import executor, programs
from datasel.methods.prox.executor import Result, execute, words

GOLDEN = json.loads((pathlib.Path(__file__).parents[2] / 'golden/prox/cases.json').read_text(encoding='utf-8'))
CASES = GOLDEN['cases']
T = GOLDEN['texts']['garden']
L = T.split('\n')


def expected(case, key):
  lines = GOLDEN['texts'][case['text']].split('\n')
  return '\n'.join(lines[line] if isinstance(line, int) else line for line in case[key])


def run(case, **kwargs):
  spans = {'spans': case['spans']} if 'spans' in case else {}
  return execute(GOLDEN['texts'][case['text']], case['programs'], level=case['level'], **spans, **kwargs)


@pytest.mark.parametrize('case', CASES, ids=lambda case: case['name'])
def test_compat_is_the_authors(case):
  result = run(case, compat=True)
  if 'raises' in case:
    assert (result.text, result.reason) == ('', case['raises'])
  else:
    assert result.text == expected(case, 'authors')
  assert 'errors' not in case or result.errors == case['errors']


@pytest.mark.parametrize('case', CASES, ids=lambda case: case['name'])
def test_the_better_outcome_of_the_authors_cases(case):
  assert run(case).text == expected(case, 'better')


def without(*lines):
  return '\n'.join(line for n, line in enumerate(L) if n not in lines)


# program: the authors' text and errors, and the default's text, outcomes and errors; by hand.
BY_HAND = {
  'remove_lines(start=0, end=0)': (without(0), 0, without(0), ['applied'], 0),
  'remove_lines(start=5, end=6)\nremove_lines(start=5, end=6)\nremove_lines(start=6, end=6)':
    (without(5, 6), 0, without(5, 6), ['applied'] * 3, 0),
  'normalize(source_str="Welcome to the ", target_str="")\nremove_lines(start=0, end=0)':
    (without(0).replace('Welcome to the ', ''), 0, without(0).replace('Welcome to the ', ''), ['applied'] * 2, 0),
  'remove_lines(start=0, end=0)\nnormalize(source_str="Home", target_str="HOME")':
    (without(0), 0, without(0), ['applied'] * 2, 0),
  '```python\n# the footer\nremove_lines(start=5, end=6)\n```': (without(5, 6), 0, without(5, 6), ['applied'], 0),
  'normalize(source_str="sun, water")': (T, 1, T.replace('sun, water', ''), ['applied'], 0),
  'normalize(source_str="sun, x=water")': (T.replace('sun', 'water'), 0, T, ['no match'], 0),
  'remove_lines(start=[005], end=[006])': (T, 1, without(5, 6), ['applied'], 0),
  'remove_lines(start=5)': (T, 1, T, ['refused'], 1),
  'remove_lines(start=-3, end=0)': (without(0), 0, T, ['refused'], 1),
  'remove_lines(start=5, end=1)\nremove_lines(start=6, end=6)': (without(6), 0, without(6), ['refused', 'applied'], 1),
  'remove_lines(start=0, end=0)\nremove_lines(start=70, end=70)\nremove_lines(start=90, end=95)':
    (T, 2, T, ['reverted', 'out of range', 'out of range'], 2),
  'remove_lines(start=5, end=1000000000)': (without(5, 6), 1, without(5, 6), ['out of range'], 1),
  'remove_lines(start=0, end=0)\nremove_lines(start=6, end': (T, 2, without(0), ['applied', 'truncated'], 0),
  'normalize(source_str=" ")': ('', 0, T, ['refused'], 1),
  'normalize(source_str=" ", target_str="-")': (T, 0, T, ['refused'], 1),
  'normalize(source_str="the")': (T.replace('the', ''), 0, T.replace('the', ''), ['applied'], 0),
  'normalize(source_str=" a ")': (T.replace(' a ', ''), 0, T, ['refused'], 1),
  'normalize(source_str="| ", target_str="")': (T.replace('| ', ''), 0, T.replace('| ', ''), ['applied'], 0),
  'normalize(source_str="Home", target_str="Ho\tme")': (T.replace('Home', 'Ho\tme'), 0, T.replace('Home', 'Ho\tme'),
                                                      ['applied'], 0),
  'normalize(source_str="Home", target_str="Ho\0me")': (T.replace('Home', 'Ho\0me'), 0, T, ['refused'], 1),
  r'normalize(source_str="Contact\nWelcome")': (T, 0, T, ['refused'], 1),
  'normalize(source_str="[005]Share", target_str="[005]Show")':
    (T, 0, T.replace('Share', 'Show'), ['applied'], 0),
  'drop_doc()': (T, 0, T, ['refused'], 1),
  'print("a")\nremove_lines(start=0, end=0)': (without(0), 0, without(0), ['unknown', 'applied'], 0),
  'print("a")\nprint("b")\nremove_lines(start=0, end=0)': (without(0), 0, without(0), ['unknown'] * 2 + ['applied'], 0),
  'remove_lines start=0\nnormalize': (T, 2, T, ['truncated'], 0),
  'remove_lines(start=1, end=6)': ('', 0, '', ['applied'], 0),
}


@pytest.mark.parametrize('program', BY_HAND)
def test_a_program_by_hand(program):
  compat, compat_errors, text, outcomes, errors = BY_HAND[program]
  theirs, ours = execute(T, program, compat=True), execute(T, program)
  assert (theirs.text, theirs.errors) == (compat, compat_errors)
  assert (ours.text, [outcome.kind for outcome in ours.outcomes], ours.errors) == (text, outcomes, errors)


@pytest.mark.parametrize('program, text, reason, compat', [
  ('drop_doc()', '', 'drop_doc', ''), ('  drop_doc()\n', '', 'drop_doc', ''), ('DROP_DOC()', '', 'drop_doc', T),
  ('keep_doc()', T, 'keep_doc', T), ('keep_doc() # do not drop', T, 'keep_doc', ''), ('', T, 'no decision', T),
  ('drop_doc()\nkeep_doc()', T, 'both drop and keep', ''), ('I would drop it', T, 'no decision', ''),
  ('drop_doc(', T, 'no decision', ''), ('remove_lines(all=True)', T, 'no decision', T)])
def test_a_documents_decision(program, text, reason, compat):
  result = execute(T, program, level='document')
  assert (result.text, result.reason) == (text, reason)
  assert execute(T, program, level='document', compat=True).text == compat


@pytest.mark.parametrize('program, text, reason', [
  ('keep_chunk()', ' \n\t\u3000', 'blank'), ('', '', 'blank'),
  ('remove_lines(0, 0)', 'gone\n' + 'w ' * 10, 'fewer than'),
  ('remove_lines(0, 0)', 'g ' * 398 + 'g\n' + 'w ' * 21, 'at most 1'), ('remove_lines(all=True)', T, 'at most 1'),
  ('normalize(source_str="spam, ")', 'spam, ' * 381 + 'w ' * 20, 'at most 1')])
def test_what_is_dropped(program, text, reason):
  result = execute(text, program)
  assert result.text == '' and result.decision == 'dropped' and result.reason.startswith(reason)


@pytest.mark.parametrize('program, text', [
  ('remove_lines(0, 0)', 'gone\n' + 'w ' * 11), ('remove_lines(0, 0)', 'g ' * 397 + 'g\n' + 'w ' * 21),
  ('remove_lines(0, 0)', 'ไป\nสวัสดีชาวโลกทุกคน'), ('remove_lines(0, 0)', 'ナビ\nこれは本文です。とても短い。')])
def test_what_is_kept(program, text):
  assert execute(text, program) == Result(text.split('\n')[1], 'edited', 'edited', execute(text, program).outcomes)
  assert execute('w w', 'keep_chunk()').decision == 'kept'


@pytest.mark.parametrize('compat', [False, True])
def test_one_word_of_twenty_is_not_enough(compat):
  for n, left in ((399, ''), (398, 'w ' * 21)):
    text = ' '.join('g' * n) + '\n' + 'w ' * 21
    assert execute(text, 'remove_lines(start=0, end=0)', compat=compat).text == left


def test_a_text_grows_by_its_programs_length_at_most():
  program = 'normalize(source_str="word", target_str="wordword")'  # of 51 characters
  for n, grown in ((12, 'wordword some\n' * 12), (13, 'word some\n' * 13)):
    assert execute('word some\n' * n, program).text == grown
  twice = execute('word some\n' * 9, f'{program}\n{program}')
  assert [outcome.kind for outcome in twice.outcomes] == ['applied', 'refused'] and twice.errors == 1


@pytest.mark.parametrize('text, count', [
  ('The café\'s menu: 3.5 euros', 6), ("Don't stop", 2), ('机器学习，很好', 6),
  ('これはペン', 5), ('한국어 단어', 2), ('हिन्दी शब्द', 2),
  ('สวัสดี', 4), ('| - ... _', 0), ('naïve nai\u0308ve', 2), ('mixed 漢字text', 4), ('', 0)])
def test_words_of_a_language(text, count):
  assert words(text) == count


# What stands in a text, a call as a model writes it, and what is left of the text or the outcome.
TEX = r'The gradient $\nabla f$ and the time $\tau$ are of a page, [005] of a book, with more than ten words.'


@pytest.mark.parametrize('source, target, text, left', [
  (r'$\nabla f$', '', TEX, TEX.replace(r'$\nabla f$', '')),
  (r'$\\nabla f$', '', TEX, TEX.replace(r'$\nabla f$', '')),
  (r'$\tau$', r'$\rho$', TEX, TEX.replace(r'$\tau$', r'$\rho$')),
  (r'[007] $\nabla f$', '', TEX, TEX.replace(r' $\nabla f$', '')),
  ('time\t$', 'time', TEX.replace('time ', 'time\t') + r'time\t$', TEX.replace('time $', 'time') + r'time\t$'),
  (r'time\t$', 'time', TEX.replace('time ', 'time\t') + r'time\t$', TEX.replace('time $', 'time') + r'time\t$'),
  ('The', r'\nu', TEX, 'refused'), (r'\newpage', '', TEX, 'refused'), (r'\tilde', '', TEX, 'no match'),
  ('[000] The gradient', '[000] A slope', TEX, TEX.replace('The gradient', 'A slope')),
  ('[005] of a book', '', TEX, TEX.replace('[005] of a book', '')),
  ('[000]  The gradient', '', TEX, 'no match')])
def test_other_spellings_of_a_source_are_looked_for_after_its_own(source, target, text, left):
  result = execute(text, f'normalize(source_str="{source}", target_str="{target}")')
  assert [outcome.kind for outcome in result.outcomes] == [left if left in ('refused', 'no match') else 'applied']
  assert result.text == (left if result.decision == 'edited' else text)


def test_what_counts_and_bounds_words_agrees_with_the_definition():
  rng = random.Random(0)
  signs = "aB1'._- \n\t\x1c|\u2019\u0301\u00e9\u6f22\u0e44\u0663\ud800"
  count = lambda text: len(executor._WORD.findall(text))
  for n in range(4000):
    text = ''.join(rng.choices(signs[:12] if n % 2 else signs, k=rng.randrange(40)))
    assert words(text) == count(text) >= executor._ascii_words(text)
    n_words = rng.randrange(12)
    assert executor._has_words(text, n_words) == (count(text) >= n_words)
    a, b = sorted(rng.choices(range(len(text) + 1), k=2))
    first, last = sorted(rng.choices(range(text.count('\n') + 1), k=2))
    calls = [programs.Normalize(text[a:b], ''.join(rng.choices(signs, k=n % 3)))] if a < b else []
    calls += [programs.RemoveLines(first, last)] if n % 4 else []
    left, _, lost = executor._chunk(0, text, 0, text.count('\n') + 1, programs.serialise(calls))
    assert count(text) - count(left or '') <= lost


def brute_force(lines, chunks):
  """The text that is left, on lines of letters alone, of [(start, stop, calls)], by definition."""
  left = []
  for start, stop, calls in chunks:
    its = {n: lines[n] for n in range(start, stop)}
    errors = 0
    for call in calls:
      if len(call) == 1:
        its = {n: line.replace(call[0], '') for n, line in its.items()}
    for call in calls:
      if len(call) == 2:
        errors += not (start <= call[0] and call[1] < stop)
        its = {n: line for n, line in its.items() if not (start <= call[0] and call[0] <= n <= call[1])}
    left += [lines[n] for n in range(start, stop)] if errors >= 2 else its.values()
  if '\n'.join(left) == '\n'.join(lines):
    return '\n'.join(lines)
  n_words, n_before = len('\n'.join(left).split()), len('\n'.join(lines).split())
  return '' if n_words <= 10 or n_words / n_before <= 0.05 else '\n'.join(left)


def test_edits_stay_in_their_chunks_by_brute_force():
  rng = random.Random(0)
  seen = set()
  for _ in range(3000):
    lines = [' '.join(rng.choice(['the', 'cat', 'sat', 'upon', 'é']) for _ in range(rng.choice([0, 2, 5, 40])))
             for _ in range(rng.randrange(1, 12))]
    ends = sorted({len(lines), *(rng.randrange(1, len(lines) + 1) for _ in range(2))})
    chunks = []
    for start, stop in zip([0, *ends], ends):
      calls = []
      for _ in range(rng.randrange(4)):
        first = rng.randrange(max(0, start - 1), stop + 1)
        calls.append(rng.choice([(first, first + rng.choice([0, 1, 2, 9])),
                                 (rng.choice(['the', 'cat sat', 'upon ']),)]))
      chunks.append((start, stop, calls))
    programs = ['\n'.join(f'normalize(source_str="{call[0]}")' if len(call) == 1 else f'remove_lines{call}'
                          for call in calls) for _, _, calls in chunks]
    text = '\n'.join(lines)
    result = execute(text, programs, spans=[chunk[:2] for chunk in chunks])
    assert result.text == (brute_force(lines, chunks) if text.strip() else ''), (text, programs)
    seen.add(result.reason)
  assert len(seen) >= 5


PARTS = [
  'remove_lines', 'normalize', 'drop_doc()', 'keep_chunk()', '(', ')', 'start=', 'end=', 'source_str=', '"', "'", ',',
  '=', ' ', '\n', '\n', 'all=True', '0', '12', '-', '9' * 30, '[001]', '#', '\\', '\t', '\0', '\ud800', '٣', 'word',
  'é漢', 'remove_lines(start=0, end=1)\n', 'normalize(source_str="word", target_str="', 'normalize(source_str="']
TEXT_PARTS = ['word ', '\n', 'é漢 ', 'a', '\0', '\ud800', '[001]', '"', ' \t']


def test_nothing_raises_or_grows():
  rng = random.Random(0)
  for _ in range(3000):
    text = ''.join(rng.choice(TEXT_PARTS) for _ in range(rng.randrange(60)))
    program = ''.join(rng.choice(PARTS) for _ in range(rng.randrange(25)))
    result = execute(text, program)
    assert len(result.text) <= len(text) + len(program)
    assert set(result.text) <= set(text) | set(program) and result.text.count('\n') <= text.count('\n')
    if 'normalize' not in program:
      rest = iter(text.split('\n'))
      assert not result.text or all(line in rest for line in result.text.split('\n'))
    execute(text, program, compat=True)
    assert execute(text, program, level='document').text in ('', text)


class Counted(str):
  """A text that counts the characters its searches go through."""
  read = 0

  def _search(self, name, *args):
    Counted.read += len(self)
    found = getattr(str, name)(self, *args)
    return Counted(found) if isinstance(found, str) else found


for _name in ('replace', 'count', 'find', 'split'):
  setattr(Counted, _name, lambda self, *args, _name=_name: self._search(_name, *args))


@pytest.mark.parametrize('compat', [False, True])
@pytest.mark.parametrize('program', [
  'normalize(source_str="word", target_str="wordword")\n' * 1200, 'normalize(source_str="xyz")\n' * 2000,
  'remove_lines(start=0, end=1000000000)\n' * 1600,
  'remove_lines(start=7, end=7)\nremove_lines(start=9, end=9)\n' * 1000,
  'remove_lines(all=True)\n' * 2800, 'normalize(source_str="' + 'word ' * 6000 + '")'])
def test_hostile_programs_read_a_text_a_bounded_number_of_times(program, compat):
  for n in (100, 400):
    text = Counted('word some words\n' * n)
    Counted.read = 0
    result = execute(text, program, compat=compat)
    assert len(result.text) <= (16 * (len(text) + len(program)) + 10 ** 6 if compat else len(text) + len(program))
    assert Counted.read <= (8192 if compat else 2 * 256 + 8) * (len(text) + len(program))


def test_the_authors_doubling_stops_at_a_limit():
  result = execute(T, 'normalize(source_str="a", target_str="aa")\n' * 60, compat=True)
  assert (result.text, result.reason) == (T, 'limit')
  result = execute(T, 'normalize(source_str="the", target_str="thethe")\n' * 60)
  assert result.text == T and result.errors >= 2


@pytest.mark.parametrize('program, kwargs, message', [
  ('', {'level': 'doc'}, "level is 'doc'; want one of chunk, document"), (['', ''], {}, '2 programs without spans'),
  ([''], {'spans': [(0, 6)]}, 'and 7 lines'), (['', ''], {'spans': [(0, 7)]}, 'for 2 programs'),
  (['', ''], {'spans': [(0, 3), (4, 7)]}, 'where the one before stops'),
  (['', ''], {'spans': [(0, 7), (7, 7)]}, 'spans')])
def test_arguments_that_cannot_be(program, kwargs, message):
  with pytest.raises(ValueError, match=message):
    execute(T, program, **kwargs)
