"""Questions and answers out of public packages: parsed once into JSONL in the cache, with counts of what was dropped.

The sets of OpenAI's evals are read from its wheel and GSM8K's training problems from dolma's sdist, both as the plain
archives they are: nothing of them is installed.  They carry licences of their own and are never to be trained on.
"""

import collections
import dataclasses
import json
import logging
import os
import pathlib
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator

from datasel import workdir
from datasel.data import demo_archives, shards

_log = logging.getLogger(__name__)
SHOTS = 20  # one in so many questions is kept for demonstrations and never asked
_FORMAT = 1  # raise it when a parser changes: the cached files are made anew
_HELD_OUT = 0.05  # GSM8K problems that the demo corpus keeps for validation: those, and only those, are asked


class _Dropped(Exception):
  """A record that makes no question; the message is the reason to be counted."""


@dataclasses.dataclass(frozen=True)
class Set:
  """files: members of the package's archive, below `folder`.  parse: JSON of a line -> (question, choices, gold).

  after: what follows the question in the prompt."""
  title: str
  files: tuple[str, ...]
  parse: Callable[[dict], tuple[str, list[str], int]]
  after: str = '\nAnswer:'


def load(name: str, *, cache: str | os.PathLike | None = None) -> tuple[list[dict], dict[str, int]]:
  """The questions of a set as {question, choices, gold}, and {reason: records dropped}.

  For 'gsm8k' a record is {question, answer, held_out}.  Raises demo_archives.Unavailable if the package cannot be had.
  """
  package = 'dolma' if name == 'gsm8k' else 'evals'
  archive = demo_archives.archive(package, cache=cache)
  digest = demo_archives.ARCHIVES[package].sha256[:12]
  path = demo_archives.cache_folder(cache) / 'questions' / f'{package}-{digest}-{_FORMAT}' / f'{name}.jsonl'
  counts = path.with_suffix('.dropped.json')
  if not counts.exists():  # written last
    found, dropped = [], collections.Counter()
    for record in _gsm8k(archive) if name == 'gsm8k' else _parsed(SETS[name], archive, dropped):
      found.append(record)
    with workdir.replacing(path, 'w') as f:
      f.write(''.join(json.dumps(record, ensure_ascii=False) + '\n' for record in found))
    workdir.write_json(counts, dict(sorted(dropped.items())))
    _log.info('%s: %d questions; dropped: %s', name, len(found), dict(dropped) or 'none')
  records = [json.loads(line) for line in path.read_bytes().splitlines()]
  return records, workdir.read_json(counts)


def _parsed(questions: Set, archive: pathlib.Path, dropped: collections.Counter) -> Iterator[dict]:
  seen = set()
  with zipfile.ZipFile(archive) as z:
    for file in questions.files:
      for line in z.read(f'evals/registry/data/{file}').splitlines():
        try:
          question, choices, gold = questions.parse(json.loads(line))
          question, choices = question.strip(), [choice.strip() for choice in choices]
          if not question or not all(choices):
            raise _Dropped('an empty question or option')
          if len(set(choices)) < len(choices):
            raise _Dropped('two equal options')
          if (question, *choices) in seen:
            raise _Dropped('the same question again')
        except _Dropped as e:
          dropped[str(e)] += 1
          continue
        seen.add((question, *choices))
        yield {'question': question, 'choices': choices, 'gold': gold}


def _chat(record: dict) -> tuple[str, str]:
  """The user's message and the ideal answer of a record of evals."""
  ideal = record['ideal']
  return record['input'][-1]['content'].strip(), (ideal[0] if isinstance(ideal, list) else ideal).strip()


def _pick(letter: str, letters: str) -> int:
  if letter not in letters:
    raise _Dropped('no such option as its answer')
  return letters.index(letter)


def _match(pattern: str, text: str) -> re.Match:
  found = re.fullmatch(pattern, text, re.DOTALL)
  if not found:
    raise _Dropped('not in the form of its set')
  return found


def _letters(record: dict) -> tuple[str, list[str], int]:
  """Options on lines of their own, 'A. ...' to 'D. ...' or 'a) ...' to 'd) ...', then perhaps 'Answer:'."""
  text, ideal = _chat(record)
  question, *rest = re.split(r'\n\s*\(?([A-Ea-e])[):.]\s*', text.split('\nAnswer:')[0])
  if ''.join(rest[0::2]).upper() != 'ABCD':
    raise _Dropped('its options are not A to D')
  return question, rest[1::2], _pick(ideal.lstrip('(')[:1].upper(), 'ABCD')


def _mmlu(record: dict) -> tuple[str, list[str], int]:
  m = _match(r'(.*)\nA\. (.*)\nB\. (.*)\nC\. (.*)\nD\. (.*)\nAnswer:', record['question'].strip())
  return m[1], list(m.groups()[1:]), _pick(record['answer'], 'ABCD')


def _socialiqa(record: dict) -> tuple[str, list[str], int]:
  text, ideal = _chat(record)
  m = _match(r'(.*?)\s*A: (.*?); B: (.*?); C: (.*?)\.?', text)
  return m[1], list(m.groups()[1:]), _pick(ideal, 'ABC')


def _quartz(record: dict) -> tuple[str, list[str], int]:
  text, ideal = _chat(record)
  m = _match(r'(.*?)\s*\n\s*A: (.*?)\s*\n\s*B: (.*)', text)
  return m[1], [m[2], m[3]], _pick(ideal[:1], 'AB')


def _logiqa(record: dict) -> tuple[str, list[str], int]:
  text, ideal = _chat(record)
  m = _match(r'(.*?)' + ''.join(rf'\n\s*{letter}[.:)]\s*(?:{letter}\.)?(.*?)' for letter in 'ABCD')
             + r'(?:\n\s*Answer:)?', text)
  return re.sub(r'(?<=\S)Question:', '\nQuestion:', m[1]), list(m.groups()[1:]), _pick(ideal[:1], 'ABCD')


def _parable(record: dict) -> tuple[str, list[str], int]:
  text, ideal = _chat(record)
  m = _match(r'(.*?)\nWhich moral.*?\nA\) (.*?) B\) (.*?) C\) (.*?) D\) (.*?) E\) (.*?)\n.*', text)
  return m[1], list(m.groups()[1:]), _pick(_match(r'.*answer is: ([A-E]).*', ideal)[1], 'ABCDE')


def _crepe(record: dict) -> tuple[str, list[str], int]:
  text, ideal = _chat(record)
  choices = ['more likely', 'less likely', 'equally likely']
  if ideal not in choices:
    raise _Dropped('no such option as its answer')
  return text, choices, choices.index(ideal)


SETS = {
  'cissp': Set('CISSP study questions', ('cissp-study-questions/samples.jsonl',), _letters),
  'crepe': Set('CREPE: what becomes more or less likely', ('crepe/samples.jsonl',), _crepe),
  'fcc': Set('FCC amateur radio examination', ('fcc_amateur_extra/samples.jsonl',), _letters),
  'logiqa': Set('LogiQA', ('logiqa/logiqa.jsonl',), _logiqa),
  'medmcqa': Set('MedMCQA, a sample', ('medmcqa/samples.jsonl',), _letters),
  'mmlu': Set('MMLU, a part', tuple(f'sandbagging/samples-{x}.jsonl' for x in ('all-large', 'all', 'ast')), _mmlu),
  'parable': Set('Fables and their morals', ('parable-to-moral-match/parable-to-moral-match-en.jsonl',), _parable,
                 after='\nMoral:'),
  'quartz': Set('QuaRTz', ('quartz/samples.jsonl',), _quartz),
  'socialiqa': Set('SocialIQA, the test split', ('theory_of_mind/socialiqa/test.jsonl',), _socialiqa),
  'tort': Set('US tort law', ('us_tort_law/samples.jsonl',), _letters),
}


def _gsm8k(archive: pathlib.Path) -> Iterator[dict]:
  """GSM8K's training problems without the calculator's marks; `held_out` as the demo corpus's domain math has it."""
  with tarfile.open(archive) as tar:
    member = next(name for name in tar.getnames() if name.endswith('code_reasoning_ablations_gsm8k_code.jsonl'))
    lines = tar.extractfile(member).read().splitlines()
  for n, line in enumerate(lines):
    problem = json.loads(line)
    yield {'question': problem['question'], 'answer': re.sub(r'<<.*?>>', '', problem['answer']),
           'held_out': shards.holdout_rank(f'gsm8k:{n}') < _HELD_OUT}
