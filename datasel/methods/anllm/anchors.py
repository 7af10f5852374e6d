"""Anchors: which tokens close a segment, by one rule alike in training, prefill and decoding.

  the paper's EP   Rule(punctuation_ids(tokenizer))   the text's own periods
  the paper's AC   Rule((anchor_id,))                 a token of its own, put at the ends of sentences (`with_anchors`)
  fixed length     Rule(max_length=k)                 every k-th token
  none             Rule()                             plain causal attention
AnLLM, Pang et al. 2024 (arXiv 2402.07616), 3.1 and 4.1.  What the anchors let a token see: `visible`, `segments`.
"""

import dataclasses
import numbers
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from datasel.data.tokenizer import Tokenizer
from datasel.methods.anllm import visibility
from datasel.methods.anllm.visibility import Segments, compact, namespace, segments, visible

__all__ = ['ROWS', 'Open', 'Rule', 'Segments', 'compact', 'flags', 'insert', 'must_close', 'punctuation_ids',
           'segments', 'split_sentences', 'visible', 'with_anchor_row', 'with_anchors']


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


class Open(NamedTuple):
  """Where a stream stands, for `flags` to go on from: after a chunk, for each row, both int32."""

  length_B: jax.Array  # tokens of the segment that is open; 0 after an anchor
  document_B: jax.Array  # the document it is in, as segment_BxL numbers them; 0 before the first token


def flags(tokens_BxL: jax.Array, rule: Rule, segment_BxL: jax.Array | None = None,
          state: Open | None = None) -> tuple[jax.Array, Open]:
  """(anchor_BxL, Open): bool, the token closes its segment by `rule`; and the state for the next chunk.

  The same flags for a row in one call and cut into chunks, of any lengths, each call given the state of the last.
  tokens_BxL: int.  segment_BxL: int32, the document of each token; segments begin anew with each.  0 is padding,
  which may be anywhere, is no anchor and leaves the state alone: so rows of a chunk may differ in length.  None: all
  is document 1.  state: None at the beginning.
  Arrays of numpy give arrays of numpy, with nothing on a device; others jax's, for use under jit.
  ValueError for arrays of another type or shape.
  """
  visibility.check_rows('tokens_BxL', tokens_BxL, np.integer, 'integers')
  B, L = tokens_BxL.shape
  given = [x for x in (segment_BxL, *(state or ())) if x is not None]
  xp = namespace(tokens_BxL, *given)
  if segment_BxL is None:
    segment_BxL = xp.ones((B, L), np.int32)
  visibility.check_rows('segment_BxL', segment_BxL, np.integer, 'int32', (B, L))
  segment_BxL = segment_BxL.astype(np.int32)
  if state is None:
    state = Open(xp.zeros(B, np.int32), xp.zeros(B, np.int32))
  for name, x_B in zip(Open._fields, state):
    if np.shape(x_B) != (B,) or not jnp.issubdtype(x_B.dtype, np.integer):
      raise ValueError(f'anchors: state.{name} is {x_B.dtype} {np.shape(x_B)}, want int32 {(B,)}: one for each row of '
                       'tokens_BxL')

  real_BxL = segment_BxL > 0
  candidate_BxL = real_BxL & xp.isin(tokens_BxL, np.array(rule.anchor_ids, np.int32))
  begins_BxL = visibility.document_starts(segment_BxL, state.document_B)
  rank_BxL = xp.cumsum(real_BxL, axis=1, dtype=np.int32) - real_BxL  # among the real tokens: padding takes no room
  first_B = -state.length_B  # the rank at which the segment now open began

  def stretch_start(closes_BxL):
    """The rank after the last of these tokens or at the document's start, whichever is later, for each token; and for
    the one after the row."""
    after_BxL = xp.where(closes_BxL, rank_BxL + 1, first_B[:, None])
    after_BxT = xp.concatenate([first_B[:, None], after_BxL], axis=1)
    begins_BxT = xp.concatenate([xp.where(begins_BxL, rank_BxL, first_B[:, None]), first_B[:, None]], axis=1)
    return visibility.cummax(xp.maximum(after_BxT, begins_BxT))

  if rule.min_length == 1:
    anchor_BxL = candidate_BxL
    if rule.max_length is not None:  # every so many tokens after a candidate, all of which close
      length_BxL = rank_BxL - stretch_start(candidate_BxL)[:, :-1] + 1
      anchor_BxL = candidate_BxL | (real_BxL & (length_BxL % rule.max_length == 0))
  else:
    closed_BxT = _chain(rule, candidate_BxL, begins_BxL, rank_BxL, first_B)
    anchor_BxL = real_BxL & xp.take_along_axis(closed_BxT, rank_BxL, axis=1)

  last_B = xp.max(xp.where(real_BxL, xp.arange(1, L + 1, dtype=np.int32)[None], 0), axis=1)
  documents_BxT = xp.concatenate([state.document_B[:, None], segment_BxL], axis=1)
  length_B = xp.sum(real_BxL, axis=1, dtype=np.int32) - stretch_start(anchor_BxL)[:, -1]
  return anchor_BxL, Open(length_B, xp.take_along_axis(documents_BxT, last_B[:, None], axis=1)[:, 0])


def must_close(state: Open, rule: Rule) -> jax.Array:
  """bool B: the next token closes the segment whatever it is.  Where anchors are a token of their own, feed that."""
  xp = namespace(state.length_B)
  if rule.max_length is None:
    return xp.zeros(len(state.length_B), bool)
  return state.length_B == rule.max_length - 1


def _chain(rule, candidate_BxL, begins_BxL, rank_BxL, first_B):
  """bool B x (L + 1), by rank: the anchors, when which candidates count depends on the anchor before.

  From where a segment begins, where it closes is a look-up; so all segments of a row are found by following look-ups
  from the documents' starts, twice as many at a time in each round: O(L log L), in no loop over tokens.
  """
  xp = namespace(candidate_BxL)
  B, L = candidate_BxL.shape
  rank_1xT = xp.arange(L + 1, dtype=np.int32)[None]
  nowhere = np.int32(L)  # no token has this rank; what is marked there, or past the last token, is never read

  def mark(at_BxN):
    """bool B x (L + 1), True at these ranks."""
    if xp is jnp:  # row by row, so that rows on several devices have nothing to exchange
      return jax.vmap(lambda at_N: jnp.zeros(L + 1, bool).at[at_N].set(True))(at_BxN)
    marked_BxT = np.zeros((B, L + 1), bool)
    np.put_along_axis(marked_BxT, at_BxN, True, axis=1)
    return marked_BxT

  def next_at(mark_BxL):
    """The first marked rank from each rank on, or nowhere."""
    at_BxT = xp.where(mark(xp.where(mark_BxL, rank_BxL, nowhere)), rank_1xT, nowhere)
    return np.minimum.accumulate(at_BxT[:, ::-1], axis=1)[:, ::-1] if xp is np else lax.cummin(at_BxT, 1, reverse=True)

  next_candidate_BxT, next_begin_BxT = next_at(candidate_BxL), next_at(begins_BxL)

  def close(start, end):
    """Where a segment that begins at rank `start` closes, its document ending before rank `end`, or nowhere."""
    earliest = xp.clip(start + (rule.min_length - 1), 0, L)
    at = xp.take_along_axis(next_candidate_BxT, earliest, axis=1)
    if rule.max_length is not None:
      at = xp.minimum(at, xp.maximum(start + (rule.max_length - 1), 0))
    return xp.where(at < end, at, nowhere)

  after_BxT = xp.concatenate([next_begin_BxT[:, 1:], xp.full((B, 1), nowhere)], axis=1)
  close_BxT = close(xp.broadcast_to(rank_1xT, (B, L + 1)), after_BxT)
  next_BxT = xp.concatenate([close_BxT[:, 1:], xp.full((B, 1), nowhere)], axis=1)  # from an anchor to the next
  starts_BxL = xp.where(begins_BxL, xp.take_along_axis(close_BxT, rank_BxL, axis=1), nowhere)
  closed_BxT = mark(starts_BxL) | mark(close(first_B[:, None], next_begin_BxT[:, :1]))
  for _ in range((L // rule.min_length + 1).bit_length()):
    closed_BxT = closed_BxT | mark(xp.where(closed_BxT, next_BxT, nowhere))
    next_BxT = xp.take_along_axis(next_BxT, next_BxT, axis=1)
  return closed_BxT


def punctuation_ids(tokenizer: Tokenizer, symbols: Iterable[str] = ('.',)) -> tuple[int, ...]:
  """The id of each symbol, as written right after a word; for EP, where the period alone is the paper's choice.

  A token that is more than the symbol (' .', '...', '."') is another and closes nothing, as in the authors' code.
  ValueError for a symbol that is not one token.
  """
  ids = []
  for symbol in symbols:
    word, both = (encoded.tolist() for encoded in tokenizer.encode_batch(['a', f'a{symbol}']))
    if len(both) != len(word) + 1 or both[:-1] != word:
      raise ValueError(f"anchors: tokenizer {tokenizer.name} writes 'a' as {word} and {'a' + symbol!r} as {both}; want "
                       f'one more token for {symbol!r}; choose a symbol that is a token of its own')
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


def with_anchors(texts: Sequence[str], tokenizer: Tokenizer, anchor_id: int, rule: Rule, *, trailing: bool = False,
                 bos: bool = False, eos: bool = False,
                 split: Callable[[str], Sequence[str]] = split_sentences) -> list[np.ndarray]:
  """int32 ids of each text, with an anchor between its sentences: the paper's AC.  The other arguments are `insert`'s.

  split: a text's sentences, in order, without the white space around them (nltk.sent_tokenize).  White space goes
  with what follows it.  Each sentence is encoded by itself, as tokenizers do around an added token; one that begins
  every text with a space is not given that space as well.
  ValueError for a sentence that is not in its text, and as `insert`.
  """
  one, two = (encoded.tolist() for encoded in tokenizer.encode_batch(['a', 'a a']))
  begins_with_space = two == one * 2
  pieces_of = [_pieces(text, split(text)) for text in texts]
  if begins_with_space:
    pieces_of = [[*pieces[:1], *(piece.removeprefix(' ') for piece in pieces[1:])] for pieces in pieces_of]
  parts = iter(tokenizer.encode_batch([piece for pieces in pieces_of for piece in pieces]))
  return [insert([next(parts) for _ in pieces], anchor_id, rule, trailing=trailing, bos=bos, eos=eos)
          for pieces in pieces_of]


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


ROWS = {
  'mean': lambda others_VxD, period_D: jnp.mean(others_VxD, axis=0),
  'copy_period': lambda others_VxD, period_D: period_D,
}


def with_anchor_row(kernel_VxD: jax.Array, anchor_id: int, how: str, *, period_id: int | None = None) -> jax.Array:
  """The embedding matrix, or the output head, with a first value for the anchor's row, in its dtype.

  anchor_id: V adds a row; less gives a row that the vocabulary has to spare.  how: 'mean', the mean of the other rows
  (the paper), or 'copy_period', row period_id (its code).
  ValueError for another way, and for an id outside the matrix.
  """
  V = kernel_VxD.shape[0]
  if how not in ROWS:
    raise ValueError(f'unknown first value of the anchor row {how!r}; known: {sorted(ROWS)}')
  if not 0 <= anchor_id <= V:
    raise ValueError(f'anchors: anchor_id {anchor_id}, and {V} rows; want {V}, for a new row, or the id of one of them')
  if how == 'copy_period' and (period_id is None or not 0 <= period_id < V or period_id == anchor_id):
    raise ValueError(f"anchors: 'copy_period' with period_id {period_id}, {V} rows; want the id of another token")
  others_VxD = jnp.concatenate([kernel_VxD[:anchor_id], kernel_VxD[anchor_id + 1:]]).astype(jnp.float32)
  period_D = None if period_id is None else kernel_VxD[period_id]
  row_1xD = ROWS[how](others_VxD, period_D)[None].astype(kernel_VxD.dtype)
  return jnp.concatenate([kernel_VxD[:anchor_id], row_1xD, kernel_VxD[anchor_id + 1:]])
