"""The rules that ProX is compared with: C4's, Gopher's and FineWeb's, and a detector of boilerplate lines.

Their constants are those of datatrove, which are the published ones; they are for English.  Words and sentences
are found by a pattern, where datatrove asks spaCy.
Raffel et al. 2020, JMLR 21 (C4); Rae et al. 2021, arXiv 2112.11446, Table A1 (Gopher); Penedo et al. 2024,
arXiv 2406.17557 (FineWeb); Zhou et al. 2024, arXiv 2409.17115, Appendix A (the comparison).  All take linear time.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

NAMES = ('boilerplate', 'gopher', 'c4', 'fineweb')  # in the order they are applied; FineWeb's recipe is the last three

CITATION = re.compile(r'\[\d*\]|\[edit\]|\[citation needed\]')
_POLICY = ('terms of use', 'privacy policy', 'cookie policy', 'uses cookies', 'use of cookies', 'use cookies')
_STOP_WORDS = frozenset(('the', 'be', 'to', 'of', 'and', 'that', 'have', 'with'))
_TOP_NGRAMS = ((2, 0.20), (3, 0.18), (4, 0.16))
_DUPLICATE_NGRAMS = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
# Sentence ends of the scripts in use; no quotes, which C4 has and FineWeb has not.
_TERMINAL = tuple('.!?։؟؞۔॥।၊။።፧፨᙮។៕᠃᠉‼‽⁇⁈⁉⸮。꓿꘎꘏﹒﹖﹗！．？｡')

_ENDING = r"['\u2019](?:s|t|re|ve|ll|m)\b"  # of a word, and a word by itself
_WORD = re.compile(rf"https?://\S++|www\.\S++|@\w++|(?:[a-z]\.){{2,}}+|\d++(?:[.,:]\d++)*+\w*+|{_ENDING}"
                   rf"|\w++(?:(?!{_ENDING})['\u2019]\w++|\.(?=[a-z_\d])\w++)*+|\.++|-++|[^\w\s]", re.I)
_LETTER_OR_DIGIT = re.compile(r'[^\W_]')
_LETTER = re.compile(r'[^\W\d_]')
_SENTENCE = re.compile(r"""[.!?\u2026\u3002\uff01\uff1f]++["'\u201d\u2019)\]]*+(?=\s|$)""")


class Verdict(NamedTuple):
  """Whether a document stays, and the rule that it fails, '' where it stays."""
  keep: bool
  reason: str = ''


KEPT = Verdict(True)


def words(text: str) -> list[str]:
  """Words, numbers, addresses, and every other sign that is no space, in order."""
  return _WORD.findall(text)


def c4_line(line: str, *, terminal: bool = True) -> str:
  """Why C4 removes a line, '' where it stays; 'lorem_ipsum' and 'curly_bracket' remove its document.

  terminal: lines must end in a mark.  FineWeb's recipe is without.
  """
  line = line.strip()
  parts = line.split()
  if any(len(part) > 1000 for part in parts):
    return 'too_long_word'
  line = CITATION.sub('', line)
  if terminal and (not line.endswith(('.', '?', '!', '"', "'")) or line.endswith('...')):
    return 'no_terminal_punctuation'
  if len(parts) < 3:
    return 'too_few_words'
  lower = line.lower()
  if 'lorem ipsum' in lower:
    return 'lorem_ipsum'
  if 'javascript' in lower:
    return 'javascript'
  if '{' in line:
    return 'curly_bracket'
  return 'policy' if any(phrase in lower for phrase in _POLICY) else ''


def c4(text: str, *, terminal: bool = True) -> tuple[Verdict, str]:
  """The verdict on a page, and its lines that stay, without citations; the text is '' where the page doesn't.

  Without C4's list of bad words, which is no part of datatrove's filter either.
  """
  kept, sentences = [], 0
  for line in text.split('\n'):
    reason = c4_line(line, terminal=terminal)
    if reason in ('lorem_ipsum', 'curly_bracket'):
      return Verdict(False, f'c4 {reason}'), ''
    if not reason:
      line = CITATION.sub('', line.strip())
      kept.append(line)
      sentences += _sentences(line)
  if sentences < 5:
    return Verdict(False, 'c4 too_few_sentences'), ''
  return KEPT, '\n'.join(kept).strip()


def gopher_quality(text: str) -> Verdict:
  """Gopher's rules on a document's words and lines."""
  all_words = words(text)
  real = [word for word in all_words if _LETTER_OR_DIGIT.search(word)]
  if len(real) < 50:
    return Verdict(False, 'gopher short_document')
  if len(real) > 100_000:
    return Verdict(False, 'gopher long_document')
  mean_length = sum(map(len, real)) / len(real)
  if not 3 <= mean_length <= 10:
    return Verdict(False, f'gopher words_too_{"short" if mean_length < 3 else "long"}')
  if text.count('#') > 0.1 * len(all_words):
    return Verdict(False, 'gopher hashes')
  if text.count('...') + text.count('…') > 0.1 * len(all_words):
    return Verdict(False, 'gopher ellipses')
  lines = text.splitlines()
  if sum(line.lstrip().startswith(('•', '-')) for line in lines) > 0.9 * len(lines):
    return Verdict(False, 'gopher bullet_lines')
  if sum(line.rstrip().endswith(('...', '…')) for line in lines) > 0.3 * len(lines):
    return Verdict(False, 'gopher ellipsis_lines')
  if sum(1 for word in all_words if _LETTER.search(word)) < 0.8 * len(all_words):
    return Verdict(False, 'gopher words_without_letters')
  if len(_STOP_WORDS.intersection(all_words)) < 2:
    return Verdict(False, 'gopher stop_words')
  return KEPT


def gopher_repetition(text: str) -> Verdict:
  """Gopher's rules on repeated paragraphs, lines and n-grams; shares are of the text's characters where they say so."""
  if not text:
    return Verdict(False, 'gopher empty')
  for unit, pieces in (('paragraphs', re.split(r'\n{2,}', text.strip())), ('lines', re.split(r'\n+', text))):
    repeated, characters = _repeated(pieces)
    if repeated > 0.30 * len(pieces):
      return Verdict(False, f'gopher repeated_{unit}')
    if characters > 0.20 * len(text):
      return Verdict(False, f'gopher characters_in_repeated_{unit}')
  all_words = words(text)
  for n, share in _TOP_NGRAMS:
    if counts := Counter(_ngrams(all_words, n)):
      (ngram, count), = counts.most_common(1)
      if len(' '.join(ngram)) * count > share * len(text):
        return Verdict(False, f'gopher top_{n}_gram')
  for n, share in _DUPLICATE_NGRAMS:
    characters = _characters_in_duplicates(_ngrams(all_words, n))
    if not characters:
      break  # where none is there twice, no longer one is
    if characters > share * len(text):
      return Verdict(False, f'gopher duplicate_{n}_grams')
  return KEPT


def fineweb(text: str) -> Verdict:
  """The rules that FineWeb adds."""
  lines = [line for line in text.split('\n') if line.strip()]
  if not lines:
    return Verdict(False, 'fineweb empty')
  if sum(line.endswith(_TERMINAL) for line in lines) < 0.12 * len(lines):
    return Verdict(False, 'fineweb lines_without_punctuation')
  if sum(len(line) <= 30 for line in lines) > 0.67 * len(lines):
    return Verdict(False, 'fineweb short_lines')
  if _repeated(lines)[1] > 0.01 * len(text.replace('\n', '')):
    return Verdict(False, 'fineweb characters_in_repeated_lines')
  if text.count('\n') > 0.3 * len(words(text)):
    return Verdict(False, 'fineweb list')
  return KEPT


def _sentences(line: str) -> int:
  ends = list(_SENTENCE.finditer(line))
  return len(ends) + bool(line[ends[-1].end():].strip() if ends else line.strip())


def _repeated(pieces: Iterable[str]) -> tuple[int, int]:
  """How many pieces were there before, and their characters."""
  seen, count, characters = set(), 0, 0
  for piece in pieces:
    if piece in seen:
      count += 1
      characters += len(piece)
    seen.add(piece)
  return count, characters


def _ngrams(all_words: Sequence[str], n: int) -> list[tuple[str, ...]]:
  return list(zip(*(all_words[i:] for i in range(n))))


def _characters_in_duplicates(ngrams: Sequence[tuple[str, ...]]) -> int:
  """Of n-grams that were there before; after one of them, the next is looked at that shares no word with it."""
  seen, characters, i = set(), 0, 0
  if len(set(ngrams)) == len(ngrams):
    return 0
  while i < len(ngrams):
    ngram = ngrams[i]
    if ngram in seen:
      characters += sum(map(len, ngram))
      i += len(ngram)
    else:
      seen.add(ngram)
      i += 1
  return characters


_BOILERPLATE = tuple((reason, re.compile(pattern, re.I)) for reason, pattern in (
  ('link', r'<?(?:https?://|www\.)\S+>?'),
  ('copyright', r'.{0,80}(?:©|\(c\)|copyright\b).{0,20}\d{4}.{0,120}|.{0,120}\ball rights reserved\b.{0,80}'),
  ('share', r'(?:share|tweet|pin|like|follow|e-?mail|print)(?: (?:this|us|on|via|to|it|by|me|a|friend|page|post|'
            r'article|facebook|twitter|pinterest|linkedin|google\+?|reddit|whatsapp|e-?mail))*[ |:!.]*'),
  ('navigation', r'(?:skip to (?:main )?(?:content|navigation)|back to top|read more|learn more|click here|home|menu|'
                 r'search|next|previous|log ?in|log ?out|sign ?(?:in|up|out)|register|subscribe|site ?map|'
                 r'contact(?: us)?|about(?: us)?|help|faqs?|privacy(?: policy)?|terms(?: (?:of|and|&) \w+)?|'
                 r'cookie policy|(?:your |my )?(?:cart|account|basket)|\d+ items? in (?:your )?cart|'
                 r'leave a (?:reply|comment)|\d* ?comments?|view all|see (?:all|more)|load more|close|'
                 r'advertise(?:ment)?)[ .»>:…]*'),
  ('cookies', r'.{0,200}\b(?:uses? cookies|use of cookies|cookie policy|enable javascript|javascript is disabled)\b.*'),
))
_SEPARATOR = re.compile(r'\s[|»·•>/]\s')
_RUN = 4  # so many short lines without a mark at the end, one after the other, are a menu


def boilerplate(lines: Sequence[str]) -> list[str]:
  """Of each line why it is no part of the page's text, '' where it is; for a blank line always ''.

  Links, copyrights, buttons, rows of menu items with separators between them, and runs of 4 or more lines of at most
  3 words that end in no mark.  Ours: no paper has these.
  """
  reasons = [_boilerplate(line.strip()) for line in lines]
  at = 0
  for short, group in itertools.groupby(map(_is_short, lines)):
    size = len(list(group))
    if short and size >= _RUN:
      reasons[at:at + size] = [reason or 'menu' for reason in reasons[at:at + size]]
    at += size
  return reasons


def _boilerplate(line: str) -> str:
  for reason, pattern in _BOILERPLATE:
    if pattern.fullmatch(line):
      return reason
  separators = len(_SEPARATOR.findall(line))
  return 'separators' if separators >= 2 and len(line) <= 15 * (separators + 2) else ''


def _is_short(line: str) -> bool:
  return 1 <= len(line.split(None, 3)) <= 3 and not line.rstrip().endswith(('.', '?', '!', '"', "'", ':', ';', ','))
