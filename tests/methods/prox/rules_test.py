"""Laws of the rules, on cases worked by hand, and of the rules as a refiner."""

import random

import pytest

from datasel.methods.prox import chunks, executor, programs, rules
from datasel.methods.prox.rule_refiner import RuleRefiner

SENTENCE = 'The cat that sat on the mat had to be fed.'  # 11 words; ends in a mark
LETTERS = 'abcdefghij'


def document(count):
  """So many different words of 5 letters, eight a line, each line a sentence with stop words."""
  names = [''.join(LETTERS[int(digit)] for digit in f'{n:05d}') for n in range(count)]
  return '\n'.join(f'the {" ".join(names[at:at + 4])} and {" ".join(names[at + 4:at + 8])}.'
                   for at in range(0, count, 8))


@pytest.mark.parametrize('line, reason', [
  (SENTENCE, ''), (f'  {SENTENCE}  ', ''), ('Is it so?', ''), ('He said "I am here"', ''),
  ('No mark at the end', 'no_terminal_punctuation'), ('To be continued...', 'no_terminal_punctuation'),
  ('Two words.', 'too_few_words'), ('', 'no_terminal_punctuation'),
  (f'Word {"a" * 1001} is long.', 'too_long_word'), (f'Word {"a" * 1000} is long.', ''),
  ('Please enable Javascript to go on.', 'javascript'), ('We use cookies to serve you.', 'policy'),
  ('See our Privacy Policy for more.', 'policy'), ('Lorem ipsum dolor sit amet.', 'lorem_ipsum'),
  ('if (a) { return b; } now.', 'curly_bracket'), ('This is so.[12]', ''), ('The town [edit].', ''),
  ('Lorem ipsum without a mark', 'no_terminal_punctuation'),
])
def test_c4_lines(line, reason):
  assert rules.c4_line(line) == reason
  if reason == 'no_terminal_punctuation' and len(line.split()) >= 3 and 'ipsum' not in line:
    assert rules.c4_line(line, terminal=False) == ''


def test_c4_pages():
  assert rules.c4('\n'.join([SENTENCE] * 5)) == (rules.KEPT, '\n'.join([SENTENCE] * 5))
  assert rules.c4('\n'.join([SENTENCE] * 4))[0].reason == 'c4 too_few_sentences'
  assert rules.c4(f'Menu\n{SENTENCE * 3} {SENTENCE}\n Bees fly far.[3][citation needed] \nHome') == (
    rules.Verdict(False, 'c4 too_few_sentences'), '')
  text = f'Menu\n{SENTENCE} {SENTENCE} Bees fly. They do!\n Bees fly far.[3][citation needed] \nHome'
  assert rules.c4(text) == (rules.KEPT, f'{SENTENCE} {SENTENCE} Bees fly. They do!\nBees fly far.')
  assert rules.c4(f'{text}\nlorem ipsum is here.')[0].reason == 'c4 lorem_ipsum'
  assert rules.c4(f'{text}\nit is {{ a bracket.')[0].reason == 'c4 curly_bracket'


def test_gopher_quality_at_its_bounds():
  fine = document(80)
  assert rules.gopher_quality(fine).keep
  assert rules.gopher_quality(document(32)).reason == 'gopher short_document'  # 32 + 4 * 2 words
  assert rules.gopher_quality(' '.join(['the and'] * 50_001)).reason == 'gopher long_document'
  assert rules.gopher_quality('a to ' * 60).reason == 'gopher words_too_short'
  assert rules.gopher_quality('the and ' + 'extraordinarily ' * 60).reason == 'gopher words_too_long'
  words = len(rules.words(fine))
  assert rules.gopher_quality(f'{fine} {"# " * (words // 9 + 2)}').reason == 'gopher hashes'
  assert rules.gopher_quality(f'{fine} {"... " * (words // 9 + 2)}').reason == 'gopher ellipses'
  assert rules.gopher_quality('\n'.join('- ' + line for line in fine.split('\n'))).reason == 'gopher bullet_lines'
  lines = [line + ('...' if n < 4 else '') for n, line in enumerate(fine.split('\n'))]
  assert rules.gopher_quality('\n'.join(lines)).reason == 'gopher ellipsis_lines'  # 4 of 10; 3 are allowed
  assert rules.gopher_quality('\n'.join([lines[0].rstrip('.'), *lines[1:]])).keep
  assert rules.gopher_quality(fine + ' 1234' * (words // 4)).reason == 'gopher words_without_letters'
  assert rules.gopher_quality(fine.replace('and', 'und')).reason == 'gopher stop_words'


def test_gopher_repetition_at_its_bounds():
  fine = document(400)
  assert rules.gopher_repetition(fine).keep
  lines = fine.split('\n')
  assert rules.gopher_repetition('').reason == 'gopher empty'
  assert rules.gopher_repetition('\n\n'.join([*lines[:6], *lines[:3]])).reason == 'gopher repeated_paragraphs'
  assert rules.gopher_repetition('\n'.join([*lines[:6], *lines[:3]])).reason == 'gopher repeated_lines'
  long = ' '.join(lines[20:30])
  assert rules.gopher_repetition('\n\n'.join([*lines[:15], long, long])).reason == (
    'gopher characters_in_repeated_paragraphs')
  assert rules.gopher_repetition('\n'.join([*lines[:15], long, long])).reason == 'gopher characters_in_repeated_lines'
  assert rules.gopher_repetition('big cat ' * 20 + fine[:400]).reason == 'gopher top_2_gram'
  # Each line, and its first n words again, so that of n + 1 words none are.
  again = lambda n: ' '.join(f'{line} {" ".join(line.split()[:n])}' for line in lines[:30])
  assert rules.gopher_repetition(again(5)).reason == 'gopher duplicate_5_grams'
  assert rules.gopher_repetition(again(4)).keep
  # Six words of 260 characters again: one 5-gram of 23 characters, for the other shares its words with the first.
  fours = [' '.join(lines[at:at + 4]) for at in range(0, 48, 4)]
  assert rules.gopher_repetition(' '.join(f'{four} {" ".join(four.split()[:6])}' for four in fours)).keep


def test_fineweb_at_its_bounds():
  lines = [f'{SENTENCE} {n}' for n in range(25)]
  ends = lambda count: '\n'.join(line + '.' * (n < count) for n, line in enumerate(lines))
  assert rules.fineweb(ends(3)).keep  # 0.12 of 25
  assert rules.fineweb(ends(2)).reason == 'fineweb lines_without_punctuation'
  short = [f'It is day {n} of it.' for n in range(67)]
  assert rules.fineweb('\n'.join([*short, *(f'{SENTENCE} {n}.' for n in range(33))])).keep
  assert rules.fineweb('\n'.join([*short, *(f'{SENTENCE} {n}.' for n in range(32))])).reason == 'fineweb short_lines'
  assert rules.fineweb('\n'.join(f'{SENTENCE} {n % 24}.' for n in range(25))).reason == (
    'fineweb characters_in_repeated_lines')
  assert rules.fineweb('\n'.join(f'{n} extraordinarilylongwordssofew.' for n in range(20))).reason == 'fineweb list'
  assert rules.fineweb(' \n').reason == 'fineweb empty'


@pytest.mark.parametrize('line, reason', [
  ('Home | About | Contact | Shop', 'separators'), ('https://a.example/b?c=1', 'link'), ('Share on Facebook', 'share'),
  ('© 2019 Bridge News. All rights reserved.', 'copyright'), ('Skip to main content', 'navigation'),
  ('This site uses cookies.', 'cookies'), (SENTENCE, ''), ('', ''), ('See https://a.example for more of it.', ''),
  ('The share of apples grew.', ''), ('Copyright law is old.', ''),
])
def test_boilerplate_lines(line, reason):
  assert rules.boilerplate([line]) == [reason]


def test_a_run_of_short_lines_is_a_menu():
  lines = ['Garden tools', 'Seeds', 'Pots and pans', 'Spring sale']
  assert rules.boilerplate([*lines, SENTENCE, *lines[:3]]) == ['menu'] * 4 + [''] * 4
  assert rules.boilerplate([*lines[:3], 'This ends so.']) == [''] * 4


def noisy_page(rng):
  pool = [SENTENCE, 'Bees fly far.[3]', 'Menu', '', 'The town [edit] grew [1][2] fast.', 'Home | About | Contact',
          'We use cookies to serve you.', '  Indented lines are fine, too.', 'An odd [[1]] case, with [] too.',
          'Line without a mark', 'Is it? It is! So be it.']
  return '\n'.join(rng.choice(pool) for _ in range(rng.randint(1, 40)))


@pytest.mark.parametrize('names, terminal', [('c4', True), ('gopher+c4+fineweb', False)])
def test_the_programs_carry_out_c4s_lines(names, terminal):
  refiner, rng, compared = RuleRefiner(names), random.Random(0), 0
  for _ in range(300):
    text = noisy_page(rng)
    verdict, cleaned = rules.c4(text, terminal=terminal)
    split = chunks.split([text], refiner.count_tokens, max_tokens=60)[0]
    written = [one.program for one in refiner.write(split)]
    result = executor.execute(text, written, spans=[(one.start, one.stop) for one in split])
    assert all(outcome.kind == 'applied' for outcome in result.outcomes)
    if verdict.keep and result.decision != 'dropped':
      assert '\n'.join(line.strip() for line in result.text.split('\n')) == cleaned
      compared += 1
  assert compared > 100


def test_decisions_are_programs_with_their_rules():
  texts = [document(200), f'{SENTENCE}\n' * 4, document(200) + '\nit is { a bracket.']
  kept, short, bracket = RuleRefiner('gopher+c4').decide(texts)
  assert (kept.program, kept.reason) == ('keep_doc()', '')
  assert short.program == 'drop_doc()' and short.reason.startswith('gopher')
  assert (bracket.program, bracket.reason) == ('drop_doc()', 'c4 curly_bracket')
  assert RuleRefiner('fineweb').decide(texts[2:])[0].program == 'keep_doc()'


def test_later_rules_see_what_earlier_ones_leave():
  menu = '\n'.join(f'Item {LETTERS[n % 10]}{LETTERS[n // 10]}' for n in range(100))
  text = f'{menu}\n{document(200)}'
  assert RuleRefiner('fineweb').decide([text])[0].reason == 'fineweb short_lines'
  assert RuleRefiner('boilerplate+fineweb').decide([text])[0].program == 'keep_doc()'
  assert RuleRefiner('c4+fineweb').decide([text])[0].program == 'keep_doc()'  # the items are of two words
  program, = RuleRefiner('boilerplate+fineweb').write(chunks.split([text], lambda lines: [1] * len(lines))[0])
  assert program.program == 'remove_lines(start=0, end=99)' and program.finished == 'rules'


def test_a_program_holds_no_more_than_it_may():
  text = '\n'.join(f'{SENTENCE}\nMenu' for _ in range(400))
  chunk, = chunks.split([text], lambda lines: [1] * len(lines))[0]
  one, = RuleRefiner('c4').write([chunk])
  assert one.finished == 'length' and len(programs.parse(one.program)) == programs.MAX_CALLS
  refiner = RuleRefiner('c4')
  split = chunks.split([text], refiner.count_tokens, max_tokens=refiner.max_tokens)[0]
  assert {one.finished for one in refiner.write(split)} == {'rules'}


def test_no_line_is_too_long_for_rules():
  refiner = RuleRefiner('c4')
  text = f'{SENTENCE}\n{"word " * 5000}\n{SENTENCE}'
  split = chunks.split([text], refiner.count_tokens, max_tokens=refiner.max_tokens)[0]
  assert not any(chunk.skipped for chunk in split)
  assert any(one.program == 'remove_lines(start=1, end=1)' for one in refiner.write(split))


@pytest.mark.parametrize('names', ['', 'c5', 'c4+c4', 'c4,gopher'])
def test_other_names_are_refused(names):
  with pytest.raises(ValueError, match='boilerplate, gopher, c4, fineweb'):
    RuleRefiner(names)


def test_fingerprints_tell_rules_apart():
  assert RuleRefiner('c4').fingerprint != RuleRefiner('c4+gopher').fingerprint
  assert RuleRefiner('gopher+c4').fingerprint == RuleRefiner('c4+gopher').fingerprint


def test_rules_have_the_stages_in_which_they_do_something():
  stages = {names: RuleRefiner(names).stages for names in ('c4', 'gopher', 'boilerplate', 'boilerplate+fineweb')}
  assert stages == {'c4': ('document', 'chunk'), 'gopher': ('document',), 'boilerplate': ('chunk',),
                    'boilerplate+fineweb': ('document', 'chunk')}
