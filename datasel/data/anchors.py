"""Anchors in text: which tokens close a segment, and an anchor token of their own between sentences.

  the paper's EP   Rule(punctuation_ids(tokenizer))   the text's own periods
  the paper's AC   Rule((anchor_id,))                 a token of its own, put at the ends of sentences (`with_anchors`)
  fixed length     Rule(max_length=k)                 every k-th token
  none             Rule()                             plain causal attention
AnLLM, Pang et al. 2024 (arXiv 2402.07616), 3.1 and 4.1.
"""

import dataclasses
import numbers
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np


class Encoder(Protocol):
  """What is asked of a tokenizer here; `tokenizer.Tokenizer` is one."""

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """int32 ids of each text, no special token among them."""


@dataclasses.dataclass(frozen=True)
class Rule:
  """When a token closes its segment: it is one of `anchor_ids` and the segment, with it, has `min_length` tokens or
  more; or the segment has `max_length`.  A document's end closes nothing.  Static: hashable, for jit."""

  anchor_ids: tuple[int, ...] = ()
  min_length: int = 1
  max_length: int | None = None

  def __post_init__(self):
    integer = lambda x: isinstance(x, numbers.Integral) and not isinstance(x, bool)
    ids = tuple(self.anchor_ids)
    if not all(integer(i) and i >= 0 for i in ids):
      raise ValueError(f'anchor rule: anchor_ids {self.anchor_ids!r}: want token ids, integers from 0 on')
    object.__setattr__(self, 'anchor_ids', tuple(sorted({int(i) for i in ids})))
    if not integer(self.min_length) or self.min_length < 1:
      raise ValueError(f'anchor rule: min_length {self.min_length!r}: want an integer of at least 1 (any length)')
    if self.max_length is not None and (not integer(self.max_length) or self.max_length < self.min_length):
      raise ValueError(f'anchor rule: max_length {self.max_length!r}: want an integer of at least min_length '
                       f'{self.min_length}, or None for no limit')


def punctuation_ids(tokenizer: Encoder, symbols: Iterable[str] = ('.',)) -> tuple[int, ...]:
  """The id of each symbol, as written right after a word; for EP, where the period alone is the paper's choice.

  A token that is more than the symbol (' .', '...', '."') is another and closes nothing, as in the authors' code.
  ValueError for a symbol that is not one token.
  """
  ids = []
  for symbol in symbols:
    word, both = (encoded.tolist() for encoded in tokenizer.encode_batch(['a', f'a{symbol}']))
    if len(both) != len(word) + 1 or both[:-1] != word:
      raise ValueError(f"anchors: the tokenizer writes 'a' as {word} and {'a' + symbol!r} as {both}; want one more "
                       f'token for {symbol!r}; choose a symbol that is a token of its own')
    ids.append(both[-1])
  return tuple(ids)


# Possessive, and from the first of a run: linear also in a page of dots.
_SENTENCE = re.compile(r'''(?<![.!?])[.!?]++["'”’)\]]*+\s++(?=["'“‘(\[]*+[^\W_a-z])|\n[^\S\n]*+\n\s*+''')


def split_sentences(text: str) -> list[str]:
  """Sentences of English: they end at . ! ? before white space and a capital or digit, and at blank lines.

  An abbreviation before a name ('Dr. No') ends one too.  The paper's are those of NLTK's punkt: nltk.sent_tokenize.
  """
  ends = [match.end() for match in _SENTENCE.finditer(text)]
  sentences = [text[start:stop].strip() for start, stop in zip([0, *ends], [*ends, len(text)])]
  return [sentence for sentence in sentences if sentence]


def insert(parts: Sequence[np.ndarray], anchor_id: int, rule: Rule, *, trailing: bool = False, bos: bool = False,
           eos: bool = False) -> np.ndarray:
  """int32 ids: the parts (sentences, or the demonstrations of a prompt), 1-D ids each, with an anchor between.

  A part too short for rule.min_length gets none and goes on into the next; where a segment of rule.max_length would
  have no room for its anchor, one is put inside the part.  So, from the beginning of a document, `flags` by the same
  rule finds these anchors and no others.
  trailing: also after the last part, as the paper says; its code does not.  bos, eos: such a token, not in the parts,
  is going to stand before, or after, the whole and counts for the lengths.
  ValueError unless the rule's one anchor id is anchor_id, and no part has it.
  """
  if rule.anchor_ids != (anchor_id,) or rule.max_length == 1:
    raise ValueError(f'anchors: {rule} does not fit anchors of a token of their own, id {anchor_id}; want anchor_ids '
                     f'({anchor_id},) and max_length None or at least 2')
  ends = np.cumsum([len(part) for part in parts], dtype=np.int64).tolist()
  tokens = np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)
  if np.any(tokens == anchor_id):
    raise ValueError(f'anchors: the text has token {anchor_id}, the anchor, at {int(np.argmax(tokens == anchor_id))}; '
                     'choose an id that no text has')
  places, start = [], -1 if bos else 0  # an anchor after so many tokens; tokens before the open segment
  for end in ends:
    while rule.max_length is not None and end - start > rule.max_length - 1:
      start += rule.max_length - 1
      places.append(start)
    if end - start + 1 >= rule.min_length and end > max(start, 0) and (trailing or end < len(tokens)):
      places.append(end)
      start = end
  if eos and len(tokens) - start + 1 == rule.max_length:  # it would close the segment in an anchor's stead
    places.append(len(tokens))
  return np.insert(tokens, places, anchor_id)


def with_anchors(texts: Sequence[str], tokenizer: Encoder, anchor_id: int, rule: Rule, *, trailing: bool = False,
                 bos: bool = False, eos: bool = False,
                 split: Callable[[str], Sequence[str]] = split_sentences) -> list[np.ndarray]:
  """int32 ids of each text, with an anchor between its sentences: the paper's AC.  The other arguments are `insert`'s.

  split: a text's sentences, in order, without the white space around them (nltk.sent_tokenize).  White space goes
  with what follows it.  Each sentence is encoded by itself, as tokenizers do around an added token, but for the space
  that some put before every text: so the ids without the anchors spell the text.
  ValueError for a sentence that is not in its text, and as `insert`.
  """
  pieces_of = [_pieces(text, split(text)) for text in texts]
  first = [n == 0 for pieces in pieces_of for n in range(len(pieces))]
  parts = iter(_encoded([piece for pieces in pieces_of for piece in pieces], first, tokenizer))
  return [insert([next(parts) for _ in pieces], anchor_id, rule, trailing=trailing, bos=bos, eos=eos)
          for pieces in pieces_of]


def _encoded(pieces: Sequence[str], first: Sequence[bool], tokenizer: Encoder) -> list[np.ndarray]:
  """ids of each piece of a text; first: those with which a text begins."""
  one, two = (encoded.tolist() for encoded in tokenizer.encode_batch(['a', 'a a']))
  if two != one * 2:
    return tokenizer.encode_batch(pieces)
  # A tokenizer that begins a text with a space: as after a word, the others have those of the text alone.
  given = [piece if begins else f'a{piece}' for piece, begins in zip(pieces, first, strict=True)]
  found = tokenizer.encode_batch(given)
  for n in np.flatnonzero(~np.array(first, bool)):
    word, found[n] = np.split(found[n], [len(one)])
    if word.tolist() != one:  # the two melted into one token
      [found[n]] = tokenizer.encode_batch([pieces[n]])
  return found


def _pieces(text: str, sentences: Sequence[str]) -> list[str]:
  """The text, cut at the ends of its sentences but the last."""
  ends, at = [], 0
  for sentence in sentences:
    found = text.find(sentence, at)
    if found < 0 or text[at:found].strip():
      raise ValueError(f'anchors: the split gave the sentence {sentence[:80]!r}, but at character {at} of the text '
                       f'comes {text[at:at + 80]!r}; it must give all of the text, in order, unchanged')
    at = found + len(sentence)
    ends.append(at)
  if text[at:].strip():
    raise ValueError(f'anchors: the split left out {text[at:at + 80]!r}, the end of a text; it must give all of it')
  return [text[start:stop] for start, stop in zip([0, *ends[:-1]], [*ends[:-1], len(text)])]
