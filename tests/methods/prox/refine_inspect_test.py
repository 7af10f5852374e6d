"""Laws of looking at a refined corpus: both texts are there to the letter, and neither does anything to the reader."""

import collections
import dataclasses
import html.parser
import random
import subprocess
import sys

import pytest
from refined_corpora import NOISE, Refiner, jsonl, write

from datasel.data import corpus as corpora
from datasel.methods.prox import inspect, inspect_page, refine, refining

HOSTILE = ['\x1b[31mred\x1b[0m <script>alert(1)</script>', '</pre></details><img src=x onerror=alert(1)>',
           '\u202etrojan\u2028 \x07 \x9b2J "quoted" & \'single\'', NOISE[1], *(['plain words here and there'] * 20)]


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp('inspect')
  write(root / 'corpus')
  hostile = {'id': '\x1b]0;title\x07<b onmouseover=alert(1)>', 'text': '\n'.join(HOSTILE)}
  (root / 'corpus/train/web.jsonl').write_bytes(jsonl([hostile]))
  return root, refine.refine(root / 'corpus', root / 'out', Refiner(), rows=10, batch=4)


def _all(root, **chosen):
  return list(inspect.cases(root[1], root[0] / 'corpus', **chosen))


def test_documents_are_chosen_by_decision_domain_reason_and_id(root):
  every = _all(root)
  assert len(every) == 82
  for decision in ('kept', 'edited', 'dropped'):
    chosen = _all(root, decision=decision)
    assert chosen == [case for case in every if case.record['decision'] == decision] != []
    assert all({'kept': case.after == case.before, 'edited': case.after not in ('', case.before),
                'dropped': case.after == ''}[decision] for case in chosen)
  assert [case.domain for case in _all(root, domain='blank')] == ['train/blank'] * 7
  assert {case.domain for case in _all(root, domain='help')} == {'train/help', 'validation/help'}
  assert {case.domain for case in _all(root, domain='validation/help')} == {'validation/help'}
  assert [case.record['reason'] for case in _all(root, reason='blan')] == ['blank'] * 2
  assert [case.record['id'] for case in _all(root, identity='assert')] == ['assert']
  with pytest.raises(ValueError, match="no domain 'helm'"):
    _all(root, domain='helm')


def test_side_by_side_are_both_texts_line_by_line(root):
  for case in _all(root):
    lines = inspect.pairs(case)
    assert '\n'.join(pair.old for pair in lines) == case.before
    assert '\n'.join(pair.new for pair in lines if pair.new is not None) == case.after
    assert [pair.number for pair in lines] == list(range(case.before.count('\n') + 1))
    folded = inspect.folded(lines)
    assert sum(pair if isinstance(pair, int) else 1 for pair in folded) == len(lines)
    assert [pair for pair in folded if not isinstance(pair, int) and pair.old != pair.new] == [
      pair for pair in lines if pair.old != pair.new]


class Given(Refiner):
  """Writes given programs, one for each chunk of so many lines."""
  stages = ('chunk',)

  def __init__(self, programs, size):
    super().__init__(max_tokens=size, count_tokens=lambda lines: [1] * len(lines))
    self._programs = iter(programs)

  def write(self, chunks):
    return [refining.Written(next(self._programs), 'eos') for _ in chunks]


def _case(text, programs, size, compat):
  [one] = refining.refine([corpora.Document('x', text, {})], Given(programs, size), compat=compat)
  return inspect.Case('train/web', one.record, text, one.text, compat=compat)


@pytest.mark.parametrize('compat', [False, True])
def test_what_stands_beside_a_line_is_what_became_of_that_line(compat):
  rng, met = random.Random(5), collections.Counter()
  for _ in range(400):
    # Each line has a sign of its own that no call touches: it tells which lines are left.
    n = rng.randint(1, 30)
    text = '\n'.join(f'{line}\N{DEGREE SIGN} the plants want some water and some light and soil' for line in range(n))
    size, programs = rng.randint(1, 12), []
    for start in range(0, n, size):
      a, b, c, d = (rng.randint(start - 2, start + size) for _ in range(4))
      calls = [f'remove_lines(start={a}, end={b})', 'normalize(source_str="water ", target_str="")',
               f'remove_lines(start={c}, end={d + 3})', 'normalize(source_str="no such words", target_str="a")',
               'remove_lines(all=True)', 'drop_doc()', 'keep_chunk()', ' remove_lines(start=0, end=1)']
      programs.append('\n'.join(rng.choices(calls, [6, 4, 3, 2, 1, 1, 2, 1], k=rng.randint(0, 3))))
    case = _case(text, programs, size, compat)
    left = {line.partition('\N{DEGREE SIGN}')[0]: line for line in case.after.split('\n')}
    assert inspect.pairs(case) == [inspect.Pair(number, line, left.get(str(number)))
                                   for number, line in enumerate(text.split('\n'))]
    met[case.record['decision']] += 1
  assert min(met[decision] for decision in ('kept', 'edited', 'dropped')) > 5


def test_of_lines_alike_just_those_removed_are_shown_as_removed():
  text = '\n'.join(['-- --', '| a | b | some words of a table'] * 150)
  lines = inspect.pairs(_case(text, ['remove_lines(start=2, end=2)'], 1000, False))
  assert [pair.number for pair in lines if pair.new != pair.old] == [2]
  with pytest.raises(ValueError, match='1 lines left, and its programs leave 299'):
    inspect.pairs(dataclasses.replace(_case(text, ['remove_lines(start=2, end=2)'], 1000, False), after='x'))


def test_an_id_is_one_line_and_what_cannot_be_seen_is_written_out():
  case = _case('soft\xadhyphen zero\u200bwidth \ufeff \U000e0041\U000e0042 \u2060', ['keep_chunk()'], 9, False)
  case.record['id'] = 'a\n    1 - faked'
  head, _, *lines = inspect.terminal(case, colour=False).split('\n')
  assert head.startswith(r'a\n    1 - faked  train/web')
  assert r'soft\xadhyphen zero\u200bwidth \ufeff \U000e0041\U000e0042 \u2060' in '\n'.join(lines)
  assert inspect.escaped('\u0645\u06cc\u200c\u0634 e\u0301 \U0001f468\u200d\U0001f373') == (
    '\u0645\u06cc\u200c\u0634 e\u0301 \U0001f468\u200d\U0001f373')


def test_a_terminal_gets_no_control_character_but_our_own_colours(root):
  for case in _all(root):
    plain = inspect.terminal(case, colour=False)
    assert all(letter.isprintable() or letter in '\n\t' for letter in plain)
    coloured = inspect.terminal(case, colour=True)
    for code in ('\x1b[0m', '\x1b[1m', '\x1b[2m', '\x1b[31m', '\x1b[32m'):
      coloured = coloured.replace(code, '')
    assert coloured == plain
  [hostile] = _all(root, domain='web')
  assert r'\x1b[31mred' in inspect.terminal(hostile, colour=False)
  assert f'    3 - {NOISE[1]}\n' in inspect.terminal(hostile, colour=False)


class _Tags(html.parser.HTMLParser):
  def __init__(self):
    super().__init__()
    self.tags, self.attributes, self.text, self.open = [], [], [], []

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    self.attributes += [(tag, *pair) for pair in attributes]
    if tag not in ('meta', 'input', 'col'):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, text):
    if not {'script', 'style'} & set(self.open):
      self.text.append(text)


def test_the_page_is_whole_loads_nothing_and_runs_nothing_of_a_document(root):
  page = inspect_page.page(root[1], _all(root))
  read = _Tags()
  read.feed(page)
  assert not read.open
  assert read.tags.count('script') == 1 and 'img' not in read.tags and 'b' in read.tags
  assert not [one for one in read.attributes if one[1].startswith('on') or one[1] in ('src', 'srcset', 'action')]
  assert all(value.startswith('#') for _, name, value in read.attributes if name == 'href')
  assert 'http' not in page.split('<script>')[1].split('</script>')[0]
  shown = ''.join(read.text)
  assert '<script>alert(1)</script>' in shown and r'\x1b[31mred' in shown and '\x1b' not in page
  assert sum(name == 'data-decision' for _, name, _ in read.attributes) == 82


def test_the_command_prints_and_writes_a_page(root, tmp_path):
  command = [sys.executable, '-m', 'datasel.methods.prox.inspect', root[1].path, '--corpus', root[0] / 'corpus']
  done = subprocess.run([*command, '--decision', 'edited', '-n', '2'], capture_output=True, text=True, check=True)
  assert done.stdout.count('edited: edited') == 2 and '\x1b' not in done.stdout  # a pipe is no terminal
  subprocess.run([*command, '--html', tmp_path / 'page.html'], check=True, capture_output=True)
  assert (tmp_path / 'page.html').read_text().startswith('<!DOCTYPE html>')
  with pytest.raises(SystemExit, match='-n -1; want at least 1'):
    inspect.main([str(root[1].path), '--corpus', str(root[0] / 'corpus'), '-n', '-1'])
  (tmp_path / 'corpus/train').mkdir(parents=True)
  (tmp_path / 'corpus/train/help.jsonl').write_bytes(jsonl([{'text': 'other'}]))
  done = subprocess.run([*command[:-1], tmp_path / 'corpus', '--id', 'assert'], capture_output=True, text=True)
  assert done.returncode == 1 and done.stderr.count('\n') == 1
