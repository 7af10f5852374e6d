"""Chunks of numbered lines: the published cases, and the laws of a greedy filling."""

import json
import pathlib
import random

import pytest

from datasel.methods.prox import chunks

CASES = json.loads((pathlib.Path(__file__).parents[2] / 'golden/prox/chunks.json').read_text(encoding='utf-8'))


def a_word_and_bos(lines):
  return [1 + len(line.split()) for line in lines]


@pytest.mark.parametrize('case', CASES, ids=lambda case: case['name'])
def test_the_published_chunks(case):
  [found] = chunks.split([case['text']], a_word_and_bos, max_tokens=case['max_tokens'])
  assert [chunk.numbered() for chunk in found] == case['chunks']


def test_labels_have_four_digits_from_line_1000_on():
  [[chunk]] = chunks.split(['\n'.join('r' * 1002)], a_word_and_bos, max_tokens=10 ** 6)
  assert chunk.numbered().split('\n')[-3:] == ['[999]r', '[1000]r', '[1001]r']


def some_texts(rng):
  return [''.join(rng.choice('ab  \n\n\r\x0b\u2028é') for _ in range(rng.randrange(60)))
          for _ in range(rng.randrange(5))]


def test_chunks_are_the_text_and_as_full_as_can_be():
  rng = random.Random(0)
  for _ in range(500):
    texts, limit = some_texts(rng), rng.randrange(1, 12)
    for text, its_chunks in zip(texts, chunks.split(texts, a_word_and_bos, max_tokens=limit), strict=True):
      assert '\n'.join(chunk.text for chunk in its_chunks) == text
      lines = text.split('\n')
      cost = [1 + len(f'[{n:03d}]{line}'.split()) for n, line in enumerate(lines)]
      assert [chunk.start for chunk in its_chunks] + [len(lines)] == [0] + [chunk.stop for chunk in its_chunks]
      for chunk in its_chunks:
        assert chunk.text == '\n'.join(lines[chunk.start:chunk.stop])
        assert chunk.tokens == sum(cost[chunk.start:chunk.stop])
        assert chunk.tokens <= limit or chunk.stop == chunk.start + 1
        assert chunk.skipped == (chunk.tokens > limit)
        assert chunk.stop == len(lines) or chunk.tokens + cost[chunk.stop] > limit


def test_the_tokens_of_all_texts_are_counted_at_once():
  asked = []

  def count(lines):
    asked.append(lines)
    return a_word_and_bos(lines)
  assert len(chunks.split(['a\nb', '', 'c'], count)) == 3
  assert asked == [['[000]a', '[001]b', '[000]', '[000]c']]
  assert chunks.split([], count) == [] and len(asked) == 1


def test_counts_that_cannot_be():
  for counts in ([1], [1, 2, 3], [1, -1]):
    with pytest.raises(ValueError, match='for 2 lines; want one for each line'):
      chunks.split(['a\nb'], lambda _, counts=counts: counts)
  with pytest.raises(ValueError, match='max_tokens is 0'):
    chunks.split(['a'], a_word_and_bos, max_tokens=0)
