"""The programs' grammar as a constraint of decoding: whatever the model, what it writes is a valid program.

  document   drop_doc() | keep_doc()
  chunk      keep_chunk() | remove_lines(all=True) | call {line break, call}
  call       remove_lines(start=A, end=B) | normalize(source_str="S", target_str="T")

and then end of text.  It is the canonical form of `programs.serialise`.  A <= B are numbers of the chunk's lines, each
range after the one before; S is not empty and neither has a line break; so the executor finds nothing malformed, and
nothing out of range.  A program always closes within the tokens that are left.

Bytes outside of numbers are an automaton's, composed with the vocabulary to a table of states and tokens.  Numbers are
compared as numbers: a digit is allowed where the value so far can still become a line.  A token that writes digits and
something else is refused in a number.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_DIGITS = 8  # of a line number at most, so that int32 holds what it is compared with
_TENS = np.array([10 ** k for k in range(_DIGITS + 1)], np.int32)
_FAR = 1 << 20  # tokens to the end, where there is no way to it

_TABLES = ('next_SxV', 'number_D', 'length_D', 'bare_D', 'digit_D', 'digit_V', 'tokens_S', 'numbers_S',
           'around_S')


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Grammar:
  """A `decode.Constraint`; `build` makes one, `of_chunks` says which lines each prompt has.

  next_SxV: int16, the state after a token; -1: refused.  tokens_S, numbers_S: int32, on a shortest way from each state
  to the end, the tokens beside digits, and the line numbers.  around_S: the tokens on a way that begins no range.
  number_D, length_D, bare_D, digit_D: int32, of each token of digits alone its value, how many they are, whether it may
  begin a number, its id; digit_V: a token's place among those, or -1.
  doomed: states below it must write a range's first number.  first, last: the states in a range's two numbers; start:
  that before a program.  longest: the most tokens, beside digits, from any state to the end.
  lines_Nx2: int32, first and last line of each prompt, on the host alone.
  """

  next_SxV: Any
  number_D: Any
  length_D: Any
  bare_D: Any
  digit_D: Any
  digit_V: Any
  tokens_S: Any
  numbers_S: Any
  around_S: Any
  doomed: int
  first: int
  last: int
  start: int
  longest: int
  max_new_tokens: int
  lines_Nx2: np.ndarray | None = None

  def tree_flatten(self) -> tuple[tuple, tuple]:
    # Without the lines: they are in the states already, and would make another program of each number of prompts.
    return (tuple(getattr(self, name) for name in _TABLES),
            (self.doomed, self.first, self.last, self.start, self.longest, self.max_new_tokens))

  @classmethod
  def tree_unflatten(cls, static: tuple, tables: tuple) -> 'Grammar':
    return cls(*tables, *static)

  def of_chunks(self, spans: Sequence[tuple[int, int]]) -> 'Grammar':
    """For prompts of chunks with these (start, stop) lines, stop not included, in their order.

    ValueError for no line, a line of more than 8 digits, and a program's tokens that are too few for the shortest.
    """
    lines_Nx2 = np.array([(start, stop - 1) for start, stop in spans], np.int64).reshape(-1, 2)
    bad = (lines_Nx2[:, 0] < 0) | (lines_Nx2[:, 1] < lines_Nx2[:, 0]) | (lines_Nx2[:, 1] >= _TENS[-1])
    if bad.any():
      raise ValueError(f'the lines {spans[int(bad.argmax())]} of prompt {int(bad.argmax())}; want at least one, and '
                       f'none from 10^{_DIGITS} on')
    return dataclasses.replace(self, lines_Nx2=lines_Nx2.astype(np.int32))

  def begin(self, index_B: np.ndarray) -> dict[str, np.ndarray]:
    B = len(index_B)
    lines_Bx2 = np.zeros((B, 2), np.int32) if self.lines_Nx2 is None else self.lines_Nx2[index_B]
    full = lambda value: np.full(B, value, np.int32)
    # value: of the number that is being written, -1 before its first digit.  low: the least line that may be removed
    # next, and within a range its first.
    return {'state_B': full(self.start), 'value_B': full(-1), 'low_B': lines_Bx2[:, 0].copy(),
            'high_B': lines_Bx2[:, 1].copy(), 'left_B': full(self.max_new_tokens)}

  def mask(self, carry: dict) -> jax.Array:
    state_B, value_B, high_B, left_B = (carry[name] for name in ('state_B', 'value_B', 'high_B', 'left_B'))
    low_B, lines_left_B = self._low(carry), self._low(carry, after=True) <= high_B
    next_BxV = self.next_SxV[state_B]
    allowed_BxV = (next_BxV >= 0) & (lines_left_B[:, None] | (next_BxV >= self.doomed))
    digits_B = sum((high_B >= ten).astype(jnp.int32) for ten in _TENS[1:]) + 1
    allowed_BxV &= self._closes(next_BxV, lines_left_B, digits_B, left_B)
    in_number_B = (state_B == self.first) | (state_B == self.last)
    whole_B = ~in_number_B | (value_B >= low_B) & (value_B <= high_B)
    digit_BxD = self._digits(carry, low_B, digits_B)
    others_BxD = allowed_BxV[:, self.digit_D] & ~in_number_B[:, None]
    allowed_BxV &= whole_B[:, None]
    return allowed_BxV.at[:, self.digit_D].set(others_BxD | digit_BxD & in_number_B[:, None])

  def advance(self, carry: dict, token_B: jax.Array) -> dict:
    state_B, value_B = carry['state_B'], carry['value_B']
    in_number_B = (state_B == self.first) | (state_B == self.last)
    place_B = self.digit_V[token_B]
    digit_B = in_number_B & (place_B >= 0)
    longer_B = jnp.maximum(value_B, 0) * jnp.asarray(_TENS)[self.length_D[place_B]] + self.number_D[place_B]
    return carry | {
      'state_B': jnp.maximum(self.next_SxV[state_B, token_B].astype(jnp.int32), 0),
      'value_B': jnp.where(digit_B, longer_B, -1),
      # Left of a range's first number, nothing below it; after its last, nothing up to it.
      'low_B': jnp.where(digit_B | ~in_number_B, carry['low_B'], value_B + (state_B == self.last)),
      'left_B': carry['left_B'] - 1}

  def _low(self, carry: dict, *, after: bool = False) -> jax.Array:
    """The least that the number in hand may be; or, after a token that ends a range, the next range's first line."""
    return jnp.where(after & (carry['state_B'] == self.last), carry['value_B'] + 1, carry['low_B'])

  def _closes(self, next_BxV: jax.Array, lines_left_B: jax.Array, digits_B: jax.Array, left_B: jax.Array) -> jax.Array:
    """Where a program can be ended in the tokens that are left after the one to be chosen."""
    def look(_):
      state_BxV = jnp.maximum(next_BxV, 0)
      need_BxV = self.tokens_S[state_BxV] + self.numbers_S[state_BxV] * digits_B[:, None]
      return jnp.where(lines_left_B[:, None], need_BxV, self.around_S[state_BxV]) < left_B[:, None]

    # Far from the limit, which is nearly always, no table has to be read.
    near = (left_B <= self.longest + 2 * digits_B).any()
    return jax.lax.cond(near, look, lambda _: jnp.ones(next_BxV.shape, bool), None)

  def _digits(self, carry: dict, low_B: jax.Array, digits_B: jax.Array) -> jax.Array:
    """bool B x D: the tokens of digits after which the number in hand can become one from low to high, in time."""
    state_B, value_B, high_B = carry['state_B'], carry['value_B'], carry['high_B']
    tens = jnp.asarray(_TENS)
    ten_D = tens[self.length_D]
    value_Bx1, high_Bx1, low_Bx1 = jnp.maximum(value_B, 0)[:, None], high_B[:, None], low_B[:, None]
    longer_BxD = value_Bx1 * ten_D[None] + self.number_D[None]
    fits_BxD = (value_Bx1 <= high_Bx1 // ten_D[None]) & jnp.where(
      (value_B < 0)[:, None], self.bare_D[None] > 0, (value_B > 0)[:, None])
    more_BxD = jnp.full(longer_BxD.shape, _FAR)
    for k in reversed(range(_DIGITS)):
      reaches_BxD = (longer_BxD <= high_Bx1 // _TENS[k]) & (longer_BxD * _TENS[k] + (_TENS[k] - 1) >= low_Bx1)
      if k:
        reaches_BxD &= longer_BxD > 0  # a number does not begin with 0
      more_BxD = jnp.where(reaches_BxD, k, more_BxD)
    rest_B = self.tokens_S[state_B] + (self.numbers_S[state_B] - 1) * digits_B
    return fits_BxD & (more_BxD + rest_B[:, None] < carry['left_B'][:, None])


def build(bytes_V: Sequence[bytes | None], task: str, *, eos_id: int, vocab_size: int, lead: str = '',
          max_new_tokens: int) -> Grammar:
  """The grammar of a task over a vocabulary.

  bytes_V: what each token writes (`vocabulary.token_bytes`).  vocab_size: the model's, which may be larger.  lead: what
  a program begins with.  max_new_tokens: of a program with its end of text.
  ValueError for an unknown task, a vocabulary that cannot write its programs, and too few tokens for the shortest.
  """
  if task not in _AUTOMATA:
    raise ValueError(f'task {task!r}; want one of {", ".join(_AUTOMATA)}')
  automaton = _Automaton()
  _AUTOMATA[task](automaton, lead)
  tokens = {i: token for i, token in enumerate(bytes_V) if token and i != eos_id}
  next_SxV = _composed(automaton.table(), tokens, vocab_size)
  end = len(next_SxV) - 1
  next_SxV[[*automaton.accepting, end], eos_id] = end
  digits = {i: token for i, token in tokens.items() if token.isdigit() and len(token) <= _DIGITS}
  numbers = [state for state in (automaton.first, automaton.last) if state >= 0]
  next_SxV[np.ix_(numbers, list(digits))] = np.array(numbers, np.int16)[:, None]
  tokens_S, numbers_S = _distances(next_SxV, end, numbers)
  # A way that leads nowhere in this vocabulary is none.
  next_SxV[(next_SxV >= 0) & (tokens_S >= _FAR)[next_SxV]] = -1
  # The states from which no way leads around a range's first number are made the first, to be told by their number.
  around_S, _ = _distances(np.where(next_SxV == automaton.first, -1, next_SxV), end, numbers)
  doomed_S = (around_S >= _FAR) & (tokens_S < _FAR) if numbers else np.zeros(end + 1, bool)
  doomed_S[automaton.first] |= bool(numbers)
  order_S = np.argsort(~doomed_S, kind='stable')
  new_S = np.argsort(order_S)
  next_SxV = np.where(next_SxV < 0, -1, new_S[next_SxV]).astype(np.int16)[order_S]
  tokens_S, numbers_S, around_S = tokens_S[order_S], numbers_S[order_S], around_S[order_S]
  start, first, last = (int(new_S[state]) if state >= 0 else -1
                        for state in (automaton.start, automaton.first, automaton.last))
  if tokens_S[start] >= _FAR or numbers and not {b'%d' % n for n in range(10)} <= set(digits.values()):
    raise ValueError(f'the tokenizer cannot write the programs of a {task}: there is no way through them by its '
                     f'{len(tokens)} tokens, among them {len(digits)} of digits alone')
  if max_new_tokens < tokens_S[start] + _DIGITS * numbers_S[start]:
    raise ValueError(f'max_new_tokens is {max_new_tokens}; the shortest program of a {task} is {tokens_S[start]} '
                     'tokens with its end')
  place_V = np.full(vocab_size, -1, np.int32)
  place_V[list(digits)] = np.arange(len(digits))
  column = lambda values: np.array(list(values) or [0], np.int32)  # a document has no numbers
  return Grammar(
    next_SxV, column(int(token) for token in digits.values()), column(map(len, digits.values())),
    column(token == b'0' or token[:1] != b'0' for token in digits.values()), column(digits), place_V, tokens_S,
    numbers_S, around_S, int(doomed_S.sum()), first, last, start,
    max(int(table_S[table_S < _FAR].max()) for table_S in (tokens_S, around_S)), max_new_tokens)


def accepts(grammar: Grammar, ids: Sequence[int], span: tuple[int, int] = (0, 1)) -> bool:
  """Whether a model under the grammar can write these tokens, end of text included, of a chunk with these lines."""
  state, value, low, high = grammar.start, -1, span[0], span[1] - 1
  if len(ids) > grammar.max_new_tokens:
    return False
  for i in map(int, ids):
    after, in_number = int(grammar.next_SxV[state, i]), state in (grammar.first, grammar.last)
    place = int(grammar.digit_V[i]) if in_number else -1
    if after < 0:
      return False
    if place >= 0:
      if not (grammar.bare_D[place] if value < 0 else value > 0):
        return False
      value = max(value, 0) * int(_TENS[grammar.length_D[place]]) + int(grammar.number_D[place])
    elif in_number:
      if not low <= value <= high:
        return False
      low, value = value + (state == grammar.last), -1
    state = after
  return state == len(grammar.next_SxV) - 1


class _Automaton:
  """States over bytes, and which of them end a program or are in a number."""

  def __init__(self):
    self._rows: list[list[int]] = []
    self.accepting: list[int] = []
    self.start = self.first = self.last = -1

  def state(self) -> int:
    self._rows.append([-1] * 256)
    return len(self._rows) - 1

  def spell(self, at: int, text: str, end: int | None = None) -> int:
    """A path of these bytes, along those that are there, to `end` or to a state of its own; returns the last."""
    for n, byte in enumerate(text.encode(), 1 - len(text)):
      if n == 0 and end is not None:
        self._rows[at][byte] = end
      elif self._rows[at][byte] < 0:
        new = self.state()
        self._rows[at][byte] = new
      at = self._rows[at][byte]
    return at

  def characters(self, entries: Iterable[int], inside: int, plain: Iterable[int], escapes: bytes, *,
                 controls: bool) -> None:
    r"""From each of the entries one character to `inside`: a plain byte below 128, any other of UTF-8, or an escape.

    controls: those from U+0080 to U+009F, and the separators U+2028 and U+2029, too.
    """
    lead, tail = [self.state() for _ in range(3)], range(0x80, 0xc0)
    for n, at in enumerate(lead):  # so many more than one to come
      self._edges(at, tail, lead[n - 1] if n else inside)
    # Neither overlong forms nor surrogates nor what is beyond U+10FFFF.
    narrow = {0xe0: (range(0xa0, 0xc0), lead[0]), 0xed: (range(0x80, 0xa0), lead[0]),
              0xf0: (range(0x90, 0xc0), lead[1]), 0xf4: (range(0x80, 0x90), lead[1])}
    firsts = dict.fromkeys(range(0xc2, 0xe0), lead[0]) | dict.fromkeys(range(0xe1, 0xf0), lead[1])
    firsts |= dict.fromkeys(range(0xf1, 0xf4), lead[2])
    for byte, (seconds, then) in narrow.items():
      firsts[byte] = self.state()
      self._edges(firsts[byte], seconds, then)
    if not controls:
      firsts[0xc2], firsts[0xe2], general = (self.state() for _ in range(3))
      self._edges(firsts[0xc2], range(0xa0, 0xc0), inside)
      self._edges(firsts[0xe2], range(0x81, 0xc0), lead[0])
      self._edges(firsts[0xe2], [0x80], general)
      self._edges(general, set(tail) - {0xa8, 0xa9}, inside)
    escape = self.state()
    self._edges(escape, escapes, inside)
    for at in entries:
      self._edges(at, plain, inside)
      self._rows[at][ord('\\')] = escape
      for byte, then in firsts.items():
        self._rows[at][byte] = then

  def table(self) -> np.ndarray:
    return np.array(self._rows, np.int16)

  def _edges(self, at: int, text: Iterable[int], end: int) -> None:
    for byte in text:
      self._rows[at][byte] = end


def _document(a: _Automaton, lead: str) -> None:
  begin, done = a.state(), a.state()
  at = a.spell(begin, lead)
  for program in ('drop_doc()', 'keep_doc()'):
    a.spell(at, program, done)
  a.start, a.accepting = begin, [done]


def _chunk(a: _Automaton, lead: str) -> None:
  begin, alone, called, again, a.first, a.last = (a.state() for _ in range(6))
  first = a.spell(begin, lead)
  a.spell(first, 'keep_chunk()', alone)
  a.spell(first, 'remove_lines(all=True)', alone)
  a.spell(a.first, ', end=', a.last)
  a.spell(a.last, ')', called)
  a.spell(called, '\n', again)
  empty, source, target = (a.state() for _ in range(3))
  for at in (first, again):
    a.spell(at, 'remove_lines(start=', a.first)
    a.spell(at, 'normalize(source_str="', empty)
  a.spell(source, '", target_str="', target)
  a.spell(target, '")', called)
  printable = set(range(0x20, 0x7f)) - set(b'"\\')
  a.characters([empty, source], source, set(range(0x80)) - set(b'"\\\n\r\t'), b'\\"rt', controls=True)
  # In a target the executor takes no control character but the tab, which has an escape.
  a.characters([target], target, printable, b'\\"t', controls=False)
  a.start, a.accepting = begin, [alone, called]


_AUTOMATA = {'document': _document, 'chunk': _chunk}


def _composed(delta_Sx256: np.ndarray, tokens: dict[int, bytes], vocab_size: int) -> np.ndarray:
  """int16 S+1 x V: the state after each token, one state more for the end, -1 where a byte is refused."""
  S = len(delta_Sx256)
  dead = np.full((1, 256), S, np.int16)
  delta = np.concatenate([np.where(delta_Sx256 < 0, S, delta_Sx256), dead]).astype(np.int16)
  order = sorted(tokens, key=lambda i: -len(tokens[i]))  # those with another byte to come are always the first
  lengths = np.array([len(tokens[i]) for i in order])
  state_VxS = np.tile(np.arange(S, dtype=np.int16), (len(order), 1))
  for n in range(lengths[0]):
    active = int((lengths > n).sum())
    byte_V = np.array([tokens[i][n] for i in order[:active]])
    state_VxS[:active] = delta[state_VxS[:active], byte_V[:, None]]
  next_SxV = np.full((S + 1, vocab_size), -1, np.int16)
  next_SxV[:S, order] = np.where(state_VxS == S, -1, state_VxS).T
  return next_SxV


def _distances(next_SxV: np.ndarray, end: int, numbers: list[int]) -> tuple[np.ndarray, np.ndarray]:
  """int32 S, S: on a shortest way from each state to the end, the tokens that are no digits, and the line numbers.

  The two are of one way, on which each token brings the end one token nearer, however many digits a number has.
  """
  S = len(next_SxV)
  edges_SxS = np.stack([np.bincount(row + 1, minlength=S + 1)[1:] > 0 for row in next_SxV])
  np.fill_diagonal(edges_SxS, False)
  own_S = np.zeros(S, np.int32)
  own_S[numbers] = 1
  weight_S, tokens_S, numbers_S = np.full(S, _FAR, np.int64), np.full(S, _FAR, np.int32), np.zeros(S, np.int32)
  weight_S[end] = tokens_S[end] = 0
  open_S = np.ones(S, bool)
  while (weight_S[open_S] < _FAR).any():  # Dijkstra's, from the end
    at = int(np.where(open_S, weight_S, _FAR).argmin())
    open_S[at] = False
    through_S = weight_S[at] + 1 + _DIGITS * own_S
    nearer_S = edges_SxS[:, at] & open_S & (through_S < weight_S)
    weight_S[nearer_S] = through_S[nearer_S]
    tokens_S[nearer_S] = tokens_S[at] + 1
    numbers_S[nearer_S] = numbers_S[at] + own_S[nearer_S]
  return tokens_S, numbers_S
