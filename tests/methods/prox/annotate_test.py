"""Laws of examples and of what makes them: pairs, rules, and a language model's answers (here a real server's)."""

import collections
import dataclasses
import itertools
import json
import pathlib
import random
import string

import pytest

from datasel.methods.prox import annotate, chunks, examples, executor, judge, labels, programs
from datasel.methods.prox import endpoint as endpoints

WORDS = 'apple bridge cloud dance earth flame grain house ivory jewel knife lemon'.split()
EXAMPLE = examples.Example('a', 'site', 'Menu\nText', 3, 'remove_lines(start=3, end=3)')


def one_each(lines):
  return [1] * len(lines)


def pair(noisy, clean, **kwargs):
  return labels.Pair('p', 'site', '\n'.join(noisy), '\n'.join(clean), **kwargs)


def carried_out(labelled, noisy):
  """What the examples' programs make of the text, without the executor's rules for what is nearly empty."""
  lines, out = noisy.split('\n'), []
  for example in labelled.chunks:
    text = example.text
    kept = set(range(example.start, example.start + text.count('\n') + 1))
    for call in programs.parse(example.program):
      if isinstance(call, programs.Normalize):
        assert text.count(call.source) == 1
        text = text.replace(call.source, call.target)
      elif isinstance(call, programs.RemoveLines):
        kept -= set(range(call.start, call.end + 1))
    out += [line for n, line in enumerate(text.split('\n'), example.start) if n in kept]
  assert sum(example.text.count('\n') + 1 for example in labelled.chunks) == len(lines)
  return '\n'.join(out)


def test_examples_come_back_and_a_changed_file_is_refused(tmp_path):
  document = examples.Example('d', 'site', 'text \u2028 "quoted"\n', 0, 'keep_doc()')
  other = examples.Example('e', 'other', 'x', 0, 'drop_doc()')
  facts = examples.write(tmp_path, {'train': {'document': [document], 'chunk': [EXAMPLE]},
                                    'test': {'document': [other]}}, {'annotator': 'hand'})
  assert examples.read(tmp_path, 'train', 'document') == [document]
  assert examples.read(tmp_path, 'train', 'chunk') == [EXAMPLE]
  assert examples.read(tmp_path, 'validation', 'chunk') == []
  assert facts == examples.manifest(tmp_path)
  assert facts['sources'] == {'train': 1, 'validation': 0, 'test': 1}
  file = tmp_path / 'train' / 'chunk.jsonl'
  file.write_text(file.read_text() + '\n')
  with pytest.raises(ValueError, match='changed since: annotate again'):
    examples.read(tmp_path, 'train', 'chunk')
  with pytest.raises(FileNotFoundError, match='no whole set of examples'):
    examples.read(tmp_path / 'nowhere', 'train', 'chunk')


@pytest.mark.parametrize('change, text', [
  ({'program': 'remove_lines(3, 3)'}, 'want it as'), ({'program': 'drop_doc()'}, 'want calls of a chunk'),
  ({'program': ''}, 'want calls of a chunk'), ({'program': 'remove_lines(start=3, en'}, 'want calls of a chunk'),
  ({'start': -1}, 'at least 0')])
def test_what_is_no_example_is_not_written(tmp_path, change, text):
  examples.write(tmp_path, {'train': {'chunk': [EXAMPLE]}}, {})
  with pytest.raises(ValueError, match=text):
    examples.write(tmp_path, {'train': {'chunk': [dataclasses.replace(EXAMPLE, **change)]}}, {})
  # Nor is what was there before, for it may be half replaced.
  with pytest.raises(FileNotFoundError):
    examples.read(tmp_path, 'train', 'chunk')


def test_no_source_is_in_two_splits_and_no_id_twice(tmp_path):
  with pytest.raises(ValueError, match="source 'site' is in train and in test"):
    examples.write(tmp_path, {'train': {'chunk': [EXAMPLE]},
                              'test': {'chunk': [dataclasses.replace(EXAMPLE, id='b')]}}, {})
  with pytest.raises(ValueError, match="id 'a'"):
    examples.write(tmp_path, {'train': {'chunk': [EXAMPLE, EXAMPLE]}}, {})


def test_splits_are_of_sources_by_their_share_and_seed():
  sources = [f'site{n}.example' for n in range(4000)]
  counts = collections.Counter(examples.split_of(one, fractions=(0.7, 0.2, 0.1)) for one in sources)
  assert all(abs(counts[split] / 4000 - share) < 0.03 for split, share in zip(examples.SPLITS, (0.7, 0.2, 0.1)))
  assert any(examples.split_of(one) != examples.split_of(one, seed=1) for one in sources[:50])
  for fractions, split in (((1, 0, 0), 'train'), ((0, 1, 0), 'validation'), ((0, 0, 1), 'test')):
    assert {examples.split_of(one, fractions=fractions) for one in sources[:50]} == {split}
  for fractions in ((0.5, 0.5, 0.5), (1.2, -0.2, 0), (1, 0)):
    with pytest.raises(ValueError, match='sum to 1'):
      examples.split_of('a', fractions=fractions)


@pytest.mark.parametrize('known', [True, False])
def test_deleted_lines_are_restored_exactly(known):
  rng = random.Random(0)
  for _ in range(150):
    noisy = [' '.join(rng.choices(WORDS[:rng.randint(1, 12)], k=rng.randint(0, 3))) for _ in range(rng.randint(1, 60))]
    kept = tuple(rng.random() < rng.choice((0.2, 0.5, 0.9)) for _ in noisy)
    made = pair(noisy, itertools.compress(noisy, kept), kept=kept if known else None)
    labelled = labels.label(made, one_each, max_tokens=rng.randint(1, 20), min_clean=0)
    # An empty clean text may be one blank line; the executor leaves nothing either way.
    assert carried_out(labelled, made.noisy).strip('\n') == made.clean.strip('\n')


def test_words_deleted_inside_lines_are_restored():
  body = [f'This is line {n} of a text that goes on about the {word}.' for n, word in enumerate(WORDS)]
  noisy = ['Menu', *body, '© 2019']
  noisy[3] = 'Share | Tweet ' + noisy[3]
  noisy[5] += ' [Read more: https://a.example/?b=1,2]'
  noisy[6] = noisy[6].replace('a text', 'a ["quoted", too] text')
  made = pair(noisy, body)
  labelled = labels.label(made, one_each, max_tokens=5, min_clean=0)
  assert labelled.exact and carried_out(labelled, made.noisy) == made.clean
  assert sum('normalize(' in example.program for example in labelled.chunks) == 3 - 1  # two are in one chunk


def test_a_source_that_is_there_twice_is_not_deleted():
  body = [f'This is line {n} of a text that goes on about the {word}.' for n, word in enumerate(WORDS)]
  noisy = ['Advert here: ' + body[0], 'Advert here: ' + body[1], *body[2:]]
  labelled = labels.label(pair(noisy, body), one_each, min_clean=0)
  assert [example.program for example in labelled.chunks] == ['keep_chunk()']
  assert not labelled.exact and labelled.missing == 2


def test_rewritten_lines_are_kept_out():
  body = [f'This is line {n} of a text that goes on about the {word}.' for n, word in enumerate(WORDS)]
  clean = [*body[:4], 'A line that the noisy text has not, and that no deletion gives.', *body[4:]]
  labelled = labels.label(pair(body, clean), one_each, min_clean=0)
  assert labelled.missing == 1 and labelled.text == '\n'.join(body)
  reworded = [body[0].replace('goes on about the', 'deals with an'), *body[1:]]
  labelled = labels.label(pair(body, reworded), one_each, min_clean=0)
  assert [example.program for example in labelled.chunks] == ['remove_lines(start=0, end=0)']


def test_a_document_of_little_text_is_dropped():
  body = ['x' * 99] * 4
  for count, program in ((4, 'drop_doc()'), (5, 'keep_doc()')):  # 399 and 499 characters
    noisy = ['Menu', *['x' * 99] * count]
    labelled = labels.label(pair(noisy, noisy[1:]), one_each)
    assert labelled.document.program == program and bool(labelled.chunks) == (count == 5)
  assert labels.label(pair(body, body), one_each, min_clean=399).document.program == 'keep_doc()'


def test_chunks_without_an_example_are_counted():
  body = [f'This is line {n} of a text that goes on about the {word}.' for n, word in enumerate(WORDS)]
  long = labels.label(pair(['Menu', 'long ' * 50, *body], ['long ' * 50, *body]),
                      lambda lines: [len(line.split()) for line in lines], max_tokens=40, min_clean=0)
  assert long.skipped == {'one line too long': 1}
  many = [text for n in range(300) for text in (f'Menu {n}', f'{body[0]} {n}')]
  labelled = labels.label(pair(many, many[1::2], kept=(False, True) * 300), one_each, min_clean=0)
  assert labelled.skipped == {'too many calls': 1} and not labelled.chunks and not labelled.exact


def test_what_a_pair_says_that_it_keeps_is_checked():
  for kept in ((True,), (True, True), (False, True)):
    with pytest.raises(ValueError, match='one for each, and for its clean text just the lines kept'):
      labels.label(pair(['a', 'b'], ['a'], kept=kept), one_each)


def some_pairs(count):
  rng = random.Random(1)
  made = []
  for n in range(count):
    body = [f'{" ".join(rng.choices(WORDS, k=12))}.' for _ in range(12)]
    made.append(labels.Pair(f'p{n}', f'site{n // 3}', '\n'.join(['Menu', *body, 'Contact us']), '\n'.join(body)))
  return made


def test_pairs_become_examples_split_by_source(tmp_path, caplog):
  facts = annotate.from_pairs(some_pairs(60), tmp_path)
  seen = {}
  for split, task in itertools.product(examples.SPLITS, examples.TASKS):
    for example in examples.read(tmp_path, split, task):
      assert seen.setdefault(example.source, split) == split
  assert len(seen) == 20 and facts['measured']['pairs'] == facts['measured']['exact'] == 60
  assert {example.program for example in examples.read(tmp_path, 'train', 'chunk')} == {
    'remove_lines(start=0, end=0)\nremove_lines(start=13, end=13)'}
  again = tmp_path / 'again'
  annotate.from_pairs(some_pairs(60), again)
  assert {path.relative_to(again): path.read_bytes() for path in again.rglob('*.json*')} == {
    path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob('*.json*') if again not in path.parents}


def test_what_is_done_is_not_done_again_but_what_has_changed_is(tmp_path):
  annotate.from_pairs(some_pairs(30), tmp_path)
  file = tmp_path / 'train' / 'chunk.jsonl'
  before = file.stat().st_mtime_ns
  annotate.from_pairs(some_pairs(30), tmp_path)
  assert file.stat().st_mtime_ns == before
  file.write_text('')
  annotate.from_pairs(some_pairs(30), tmp_path)
  assert file.stat().st_size
  before = file.stat().st_mtime_ns
  annotate.from_pairs(some_pairs(30), tmp_path, counter=annotate.Counter(max_tokens=30))
  assert file.stat().st_mtime_ns != before


@pytest.fixture
def corpus(tmp_path):
  """Two domains; one has URLs, and a document in parts."""
  rng = random.Random(2)
  text = lambda n: '\n'.join(['Menu', *(f'{" ".join(rng.choices(WORDS, k=9))} and the end of that.' for _ in range(n))])
  rows = {'web': [{'id': f'{n}', 'url': f'https://www.site{n % 4}.example/{n}', 'text': text(8)} for n in range(12)],
          'books': [{'id': f'book#{n}', 'text': text(3 + n)} for n in range(5)] + [{'id': 'blank', 'text': ' \n'}]}
  for domain, its_rows in rows.items():
    file = tmp_path / 'corpus' / 'train' / f'{domain}.jsonl'
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(''.join(json.dumps(row) + '\n' for row in its_rows))
  return tmp_path / 'corpus'


def test_documents_are_chosen_by_hash_and_their_parts_are_one_source(corpus):
  every = annotate.choose(corpus, 100)
  assert len(every) == 17 and {one.source for one in every} == {
    'books:book', *(f'site{n}.example' for n in range(4))}
  assert annotate.choose(corpus, 5) == every[:5] != annotate.choose(corpus, 5, seed=1)


def test_no_document_is_chosen_twice_and_no_id_used_twice(corpus):
  row = {'text': 'An apple a day.', 'url': 'https://x.example/'}
  rows = [row, row, {'text': 'A bridge.'}, *({'id': 'a', 'text': text} for text in ('one', 'two', 'two', 'three')),
          {'id': 'a#2', 'text': 'four'}]
  (corpus / 'train' / 'web.jsonl').write_text(''.join(json.dumps(one) + '\n' for one in rows))
  chosen = {one.id: one.text for one in annotate.choose(corpus, 100) if one.id.startswith('web/')}
  assert sorted(chosen.values()) == sorted({'An apple a day.', 'A bridge.', 'one', 'two', 'three', 'four'})
  assert {'web/a', 'web/a#2', 'web/a#3', 'web/a#4'} <= set(chosen) and chosen['web/a#2'] == 'four'
  assert len(annotate.choose(corpus, 3)) == 3
  with pytest.raises(ValueError, match='0 documents to annotate'):
    annotate.choose(corpus, 0)


@pytest.mark.parametrize('url', ['http://[invalid', 'http://', 'http://\ud800.example/', 7, None])
def test_a_url_of_no_site_says_nothing_of_the_source(corpus, url):
  (corpus / 'train' / 'web.jsonl').write_text(json.dumps({'id': 'a#1', 'text': 'An apple.', 'url': url}) + '\n')
  assert {one.source for one in annotate.choose(corpus, 100)} == {'web:a', 'books:book'}


def test_rules_become_examples(corpus, tmp_path):
  assert annotate.main(['--out', str(tmp_path / 'sft'), '--corpus', str(corpus), '--rules', 'c4']) == 0
  document = [one for split in examples.SPLITS for one in examples.read(tmp_path / 'sft', split, 'document')]
  chunk = [one for split in examples.SPLITS for one in examples.read(tmp_path / 'sft', split, 'chunk')]
  sentences = {one.id: one.text.count('that.') for one in document}
  assert all((one.program == 'keep_doc()') == (sentences[one.id] >= 5) for one in document)
  assert {one.program for one in document} == {'keep_doc()', 'drop_doc()'}
  assert {one.program for one in chunk} == {'remove_lines(start=0, end=0)'}
  assert {one.id.rpartition('@')[0] for one in chunk} == {one.id for one in document if one.program == 'keep_doc()'}


@pytest.mark.parametrize('content, form, scores', [
  ('Educational score: 3', 'Format score: 4', (3, 4)), ('**Educational Score:** 0', 'format score:\n5/5.', (0, 5)),
  ('Educational score: 3', 'none', None), ('Educational score: 7', 'Format score: 4', None),
  ('Educational score: 3.5', 'Format score: 4', None), ('Educational score: 2 or Educational score: 3', '', None),
  ('Educational score: 2. So, Educational score: 2', 'Format score: 4', (2, 4)), ('', '', None),
  ('Educational score: 12', 'Format score: 4', None)])
def test_scores_are_read_or_refused(content, form, scores):
  assert judge.scores([content, form]) == scores


def test_the_rule_of_the_scores():
  kept = {(content, form) for content in range(6) for form in range(6) if judge.keeps(content, form)}
  assert kept == {(content, form) for content in (3, 4, 5) for form in range(6)} | {(2, 4), (2, 5)}


CHUNK = chunks.split(['\n'.join(['x'] * 10 + ['Home | Shop', 'Menu How bees find home', 'Bees use the sun.',
                                              'See http://a.example/?b=1,2 too.', 'Follow us', '© 2020'])],
                     lambda lines: [10 ** 6] * 10 + [1] * (len(lines) - 10), max_tokens=100)[0][-1]


@pytest.mark.parametrize('written, program, reason', [
  (('keep_chunk()', '```\nkeep_chunk()\n```', 'Nothing to do.'), 'keep_chunk()', ''),
  (('remove_lines(10, 10)', 'normalize(source_str="http://a.example/?b=1,2 ")', 'remove_lines(start=14, end=15)'),
   'normalize(source_str="http://a.example/?b=1,2 ", target_str="")\nremove_lines(start=10, end=10)\n'
   'remove_lines(start=14, end=15)', ''),
  (('remove_lines(start=14, end=14)', 'remove_lines(start=15, end=15)', 'remove_lines(start=14, end=15)'),
   'remove_lines(start=14, end=15)', ''),
  (('remove_lines(start=15, end=15)', 'normalize(source_str="2020")', ''), 'remove_lines(start=15, end=15)', ''),
  (('The header (lines 10) goes.\n```python\n# menu\nremove_lines(start=10, end=10)\n```', '', ''),
   'remove_lines(start=10, end=10)', ''),
  (('Menus (line 10) go.\nremove_lines(start=10, end=10)', '', ''), 'remove_lines(start=10, end=10)', ''),
  (('remove_lines(start=0, end=0)', '', ''), '', 'program out of range'),
  (('remove_lines(start=10, end=16)', '', ''), '', 'program out of range'),
  (('```\nremove_lines(start=10)\n```', '', ''), '', 'program malformed'),
  (('```\ndelete_lines(start=10)\n```', '', ''), '', 'program unknown'),
  (('remove_lines(start=10, en', '', ''), '', 'program truncated'),
  (('normalize(source_str="wasps")', '', ''), '', 'program of words that are not there'),
  (('normalize(source_str="Bees", target_str="Wasps")', '', ''), '', 'program that adds words'),
  (('normalize(source_str="us")', '', ''), '', 'program refused'),
  (('drop_doc()', '', ''), '', 'program of a document'),
  (('remove_lines(start=10, end=14)', '', ''), '', 'program that removes too much'),
  (('remove_lines(all=True)', '', ''), '', 'program that removes too much')])
def test_three_programs_are_merged_and_checked(written, program, reason):
  assert CHUNK.start == 10
  assert judge.merged(CHUNK, written) == (program, reason)


def test_our_own_examples_pass_our_checks():
  for task, shots in judge._NOISE.values():
    assert len(task) > 100
    for text, program in shots:
      start = int(text[1:4])
      plain = '\n'.join(line.partition(']')[2] for line in text.split('\n'))
      chunk = chunks.Chunk(start, start + plain.count('\n') + 1, plain, 1, False)
      assert chunk.numbered() == text
      assert judge.merged(chunk, [program]) == (program, '')


def test_questions_hold_the_text_and_ask_for_what_is_read():
  text = 'Some ' + string.ascii_letters
  both = judge.score_questions(text)
  assert all(text in one.user for one in both)
  assert 'Educational score: <points>' in both[0].user and 'Format score: <points>' in both[1].user
  three = judge.program_questions(CHUNK)
  assert len(three) == 3 and all(one.user.endswith(f'{CHUNK.numbered()}\n[/doc]') for one in three)
  assert all(isinstance(one, endpoints.Question) for one in both + three)


@pytest.mark.parametrize('flags, text', [
  ([], 'want one of --demo'), (['--demo', '--pairs', 'x'], 'want one of --demo'),
  (['--corpus', 'x'], 'with --rules or --endpoint'), (['--corpus', 'x', '--endpoint', 'y'], '--endpoint and --model'),
  (['--pairs', 'nowhere.jsonl'], 'nowhere.jsonl'), (['--demo', '--synthetic', '-1'], '-1 synthetic pairs')])
def test_wrong_flags_are_refused(tmp_path, capsys, flags, text):
  assert annotate.main(['--out', str(tmp_path), *flags]) == 2
  assert text in capsys.readouterr().err
  assert not list(pathlib.Path(tmp_path).iterdir())


def test_examples_that_nothing_could_be_trained_or_validated_on_are_not_written(tmp_path):
  for fractions in ((1, 0, 0), (0, 1, 0)):
    with pytest.raises(ValueError, match=r'to validate on, of 4 sources in all; want at least 1 of each: raise'):
      annotate.from_pairs(some_pairs(10), tmp_path, fractions=fractions)
  with pytest.raises(ValueError, match='0 documents to train on and 0 to validate on'):
    annotate.from_pairs([], tmp_path)
  assert not list(tmp_path.iterdir())


def test_what_would_take_long_to_compare_is_left_out_and_counted():
  rng = random.Random(3)
  body = [f'This is line {n} of a text that goes on about the {word}.' for n, word in enumerate(WORDS)]
  long = rng.choices(WORDS[:8], k=20_000)
  fewer = ' '.join(word for word in long if rng.random() < 0.7)
  labelled = labels.label(pair(['Menu', *body, ' '.join(long)], [*body, fewer]), one_each, max_tokens=7, min_clean=0)
  assert labelled.skipped == {'a line too long to compare': 1}
  assert [one.program for one in labelled.chunks] == ['remove_lines(start=0, end=0)']
  lines = [' '.join(rng.choices(WORDS, k=12)) for _ in range(3000)]
  rewritten = labels.label(pair(lines, [f'{line} !' for line in lines]), one_each, max_tokens=1000, min_clean=0)
  assert rewritten.skipped == {'too many lines to compare': 3} and not rewritten.chunks
  blanks = [line for text in lines for line in (text, '', 'Menu', '')]  # alike, but only removed
  made = pair(blanks, [line for line in blanks if line != 'Menu'])
  assert labels.label(made, one_each, max_tokens=600, min_clean=0).exact


def test_exact_means_what_the_executor_gives():
  body = [f'This is line {n} of a text that goes on about the {word}.' for n, word in enumerate(WORDS)]
  made = pair(['Menu'] * 2000 + body, body)  # 1 of 14 of its words
  labelled = labels.label(made, one_each, max_tokens=100, min_clean=0)
  spans = [(one.start, one.start + one.text.count('\n') + 1) for one in labelled.chunks]
  result = executor.execute(made.noisy, [one.program for one in labelled.chunks], spans=spans)
  assert labelled.exact and result.text == made.clean == labelled.text
  made = pair(['Menu'] * 4000 + body, body)  # 1 of 26: the executor takes that for nothing
  assert not labels.label(made, one_each, max_tokens=100, min_clean=0).exact
