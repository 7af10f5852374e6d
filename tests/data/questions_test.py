"""Laws of the questions that packages bring: none is lost uncounted, each has one right answer."""

import re

import pytest

from datasel.data import questions, shards


@pytest.mark.needs_demo_data
def test_every_question_of_the_packages_is_kept_or_counted():
  """Numbers counted by hand in the archives; each has one right answer among different ones."""
  kept = {}
  for name in questions.SETS:
    found, dropped = questions.load(name)
    kept[name] = (len(found), len(found) + sum(dropped.values()))
    assert all(0 <= r['gold'] < len(r['choices']) == len(set(r['choices'])) and r['question'] for r in found)
    assert not any(re.search(r'\n\s*(Answer:|[A-E][.)] )', choice) for r in found for choice in r['choices'])
  assert kept == {'cissp': (143, 143), 'crepe': (1520, 1520), 'fcc': (587, 591), 'logiqa': (674, 1354),
                  'medmcqa': (299, 300), 'mmlu': (1329, 1352), 'parable': (1632, 1632), 'quartz': (3844, 3860),
                  'socialiqa': (2198, 2224), 'tort': (340, 340)}
  first = questions.load('socialiqa')[0][0]
  assert first == {'question': 'bailey was a nice person so she called the family together. What will happen to '
                               'Others?', 'choices': ['talk to the family', 'hate bailey', 'thank bailey'], 'gold': 2}


@pytest.mark.needs_demo_data
def test_gsm8k_asks_what_the_demo_corpus_holds_out():
  found, _ = questions.load('gsm8k')
  assert len(found) == 6852
  assert [r['held_out'] for r in found] == [shards.holdout_rank(f'gsm8k:{n}') < 0.05 for n in range(len(found))]
  assert not any('<<' in r['answer'] for r in found) and all('####' in r['answer'] for r in found)
