"""Text from a model: batched decoding with a static-shape KV cache, and the log-probabilities of given continuations.

A few compiled programs serve all lengths: prompts are padded to a power of two, and so is the cache, which grows as a
batch needs it.  Any model with `prefill`, `extend`, `grow`, `logits`, `nll` as models/mistral.py has them will do.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from datasel import decode, sharding

# Tokens decoded between two looks at what came out: a look costs a stop of the device, a late one wasted steps.
_STEPS = 16
# The shortest padded length, and how many batches of prompts are read ahead to be sorted by length.
_SHORTEST, _AHEAD = 16, 32

Stop = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Generated:
  """What followed one prompt.

  tokens: int32, without the token or sequence that ended it; where a stop string begins inside a token, without that
  token.  text: of the tokens, up to the stop string to the character; None without `detokenize`.  logprobs: float32 of
  each token, under the model itself: no temperature, cut or constraint.  finished: 'eos', 'stop' or 'length'.
  """

  tokens: np.ndarray
  text: str | None
  logprobs: np.ndarray
  finished: str


class Generator:
  """Batched decoding with a static-shape KV cache.

  model: a `Mistral`, or what has its functions; params: its parameters, in any float dtype.  They are kept in
  model.dtype (norms in float32) and placed by their logical axes on `mesh`: given that way, they are not copied.
  `rules` that split no parameter over the batch's mesh axes ('embed': None) spare gathering them for each token.
  detokenize: token ids -> text; the text of a beginning must be the beginning of the text, but for a last character
  that is not complete.  max_length: the longest prompt with its continuation, tokens.
  """

  def __init__(self, model: Any, params: Any, *, mesh: jax.sharding.Mesh | None = None,
               rules: sharding.Rules = sharding.RULES, batch_size: int = 8, eos_ids: Sequence[int] = (),
               pad_id: int = 0, detokenize: Callable[[Sequence[int]], str] | None = None,
               constraint: decode.Constraint | None = None, max_length: int | None = None):
    shards = 1 if mesh is None else sharding.batch_shards(mesh, rules)
    if batch_size < 1 or batch_size % shards:
      raise ValueError(f'batch_size {batch_size}: want a positive multiple of the {shards} parts that the mesh splits '
                       'a batch into')
    scaling = dict(getattr(model, 'rope_scaling', ()))
    if scaling.get('rope_type') == 'dynamic':
      # Beyond it, every new token would turn all earlier keys anew, and each row by what others are in the batch.
      original = scaling['original_max_position_embeddings']
      max_length = original if max_length is None else max_length
      if max_length > original:
        raise ValueError(f'max_length {max_length}: with rope_type dynamic a cache holds to {original} positions; '
                         'want no more, or another rope_scaling')
    if max_length is not None and max_length < 2:
      raise ValueError(f'max_length {max_length}, want at least 2: a prompt and what follows it')
    self.model, self.batch_size, self.max_length = model, batch_size, max_length
    self._start = 0  # tokens that stand before every prompt
    self._mesh, self._rules, self._pad, self._detokenize = mesh, rules, pad_id, detokenize
    self._check_tokens('pad_id', [pad_id])
    self._eos = self._check_tokens('eos_ids', eos_ids) if len(eos_ids) else np.zeros(0, np.int32)
    self.params = _placed(model, params, mesh, rules)
    self._constraint = constraint
    self._held = constraint if constraint is None else self._put_whole(constraint)

  def __call__(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float = 0.0,
               top_k: int = 0, top_p: float = 1.0, stop: Sequence[Stop] = (), seed: int = 0) -> list[Generated]:
    """What follows each prompt (int32 tokens, at least one), in their order.

    temperature: 0 takes the likeliest token; otherwise tokens are drawn after temperature, then top_k (0: all), then
    top_p, by (seed, number of the prompt, position) alone.  stop: strings or token sequences; a row ends with the first
    token that completes one.  Raises ValueError for what cannot be done, before any work.
    """
    prompts = [self._prompt(n, prompt, max_new_tokens) for n, prompt in enumerate(prompts)]
    results = dict(self.stream(prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
                               top_p=top_p, stop=stop, seed=seed))
    return [results[n] for n in range(len(prompts))]

  def stream(self, prompts: Iterable[Sequence[int]], *, max_new_tokens: int, temperature: float = 0.0, top_k: int = 0,
             top_p: float = 1.0, stop: Sequence[Stop] = (), seed: int = 0) -> Iterator[tuple[int, Generated]]:
    """(number of the prompt, what follows it), as batches are done; `prompts` is read some batches ahead.

    Batches are made of prompts of like lengths, so results come out of order.  Otherwise as a call.
    """
    if not isinstance(max_new_tokens, (int, np.integer)) or max_new_tokens < 1:
      raise ValueError(f'max_new_tokens {max_new_tokens}, want a whole number of at least 1')
    max_new_tokens = int(max_new_tokens)  # numpy's lack what `_bucket` asks of a length
    if not (0 <= temperature < math.inf and top_k >= 0 and 0 < top_p <= 1):
      raise ValueError(f'temperature {temperature}, top_k {top_k}, top_p {top_p}: want a temperature of 0 or more, '
                       'top_k 0 (all) or more, top_p in (0, 1]')
    greedy = temperature == 0
    program = self._program(greedy=greedy, top_k=0 if greedy else top_k, nucleus=not greedy and top_p < 1)
    knobs = self._put_whole({
      'temperature': np.float32(temperature), 'top_p': np.float32(top_p), 'eos_E': self._eos,
      'max_new_tokens': np.int32(max_new_tokens), 'key': jax.random.key(seed)})
    stops = self._stops(stop)
    checked = ((n, self._prompt(n, prompt, max_new_tokens)) for n, prompt in enumerate(prompts))
    return (pair for batch in self._batches(checked, lambda pair: len(pair[1]))
            for pair in self._generate(batch, max_new_tokens, stops, knobs, program))

  def score(self, prompts: Sequence[Sequence[int]],
            continuations: Sequence[Sequence[Sequence[int]]]) -> list[list[np.ndarray]]:
    """Log-probabilities (float32, nats) of the tokens of each continuation after its prompt.

    continuations: for each prompt any number of them, at least one token each; a prompt is read once for all of its
    own.  They are meant to be short: memory is their length times the prompt's.
    """
    prompts, items = list(prompts), []
    if len(prompts) != len(continuations):
      raise ValueError(f'{len(prompts)} prompts and continuations of {len(continuations)}; want a list of them for '
                       'each prompt')
    for n, (prompt, given) in enumerate(zip(prompts, continuations)):
      given = [self._check_tokens(f'prompt {n}, continuation {c}', tokens) for c, tokens in enumerate(given)]
      if given:
        items.append((n, self._prompt(n, prompt, max(map(len, given))), given))
    results = [[] for _ in prompts]
    for batch in self._batches(iter(items), lambda item: len(item[1])):
      for (n, *_), scores in zip(batch, self._score(batch)):
        results[n] = scores
    return results

  def _score(self, batch: list) -> list[list[np.ndarray]]:
    program, B = self._program(), self.batch_size
    last_Bx1xD, cache, _ = self._read([(n, prompt) for n, prompt, _ in batch],
                                      [max(map(len, given)) for *_, given in batch], program)
    width = self._bucket(max(len(tokens) for *_, given in batch for tokens in given))
    scores = [[] for _ in batch]
    for c in range(max(len(given) for *_, given in batch)):
      fed_BxL, position_BxL = (np.full((B, width), fill, np.int32) for fill in (0, -1))
      targets_BxT = np.zeros((B, width + 1), np.int32)
      for b, (_, prompt, given) in enumerate(batch):
        if c < len(given):
          N = len(given[c])
          # After the prompt's last token comes the first target; the last target is not read.
          fed_BxL[b, :N - 1] = given[c][:-1]
          targets_BxT[b, :N] = given[c]
          position_BxL[b, :N - 1] = self._start + len(prompt) + np.arange(N - 1)
      arrays = self._put_rows((fed_BxL, targets_BxT, position_BxL))
      logprobs_BxT = np.asarray(decode.score(self.params, cache, last_Bx1xD, *arrays, program=program))
      for b, (*_, given) in enumerate(batch):
        if c < len(given):
          scores[b].append(logprobs_BxT[b, :len(given[c])])
    return scores

  def _generate(self, batch: list[tuple[int, np.ndarray]], max_new_tokens: int, stops: '_Stops', knobs: dict,
                program: decode.Program) -> list[tuple[int, Generated]]:
    rows = [Row(n, self._start + len(prompt), max_new_tokens) for n, prompt in batch]
    last_Bx1xD, cache, slots = self._read(batch, [min(_STEPS, max_new_tokens)] * len(batch), program)
    unused = self.batch_size - len(rows)
    real_B = np.arange(self.batch_size) < len(rows)
    index_B = np.array([row.index for row in rows] + [rows[0].index] * unused, np.int32)
    length_B = np.array([row.length for row in rows] + [1] * unused, np.int32)
    arrays = self._put_rows((length_B, index_B, real_B, self._carry(index_B, slots)))
    state, outcome = decode.begin(self.params, last_Bx1xD, *arrays, knobs, self._held, program=program)
    state['cache'] = cache
    while True:
      outcome = jax.device_get(outcome)
      for b, row in enumerate(rows):
        if row.running:
          row.take({name: x[b] for name, x in outcome.items()}, stops)
      if not any(row.running for row in rows):
        return [(row.index, row.result(self._detokenize)) for row in rows]
      length = slots.wanted(rows, _STEPS)
      if length != slots.length:
        slots.length = length
        state['cache'] = decode.grow(state['cache'], length=length, program=program)
      keep_B = self._put_rows(np.array([b < len(rows) and rows[b].running for b in range(self.batch_size)]))
      state, outcome = decode.add(self.params, state, keep_B, knobs, self._held, steps=_STEPS, program=program)

  def _read(self, batch: list[tuple[int, np.ndarray]], more: list[int],
            program: decode.Program) -> tuple[jax.Array, Any, '_Slots']:
    """Reads a batch of prompts, with room for so many more tokens after each: (last_Bx1xD, the cache, its slots)."""
    prompts = [prompt for _, prompt in batch]
    tokens_BxL = np.full((self.batch_size, self._bucket(max(map(len, prompts)))), self._pad, np.int32)
    for b, prompt in enumerate(prompts):
      tokens_BxL[b, :len(prompt)] = prompt
    length_B = np.array([*map(len, prompts)] + [1] * (self.batch_size - len(prompts)), np.int32)
    length = self._bucket(max(len(prompt) + n for prompt, n in zip(prompts, more)))
    slots = _Slots(max(length, tokens_BxL.shape[1]), self._bucket)
    return *decode.read(self.params, *self._put_rows((tokens_BxL, length_B)), length=slots.length,
                        program=program), slots

  def _carry(self, index_B: np.ndarray, slots: '_Slots') -> Any:
    """The constraint's first states of a batch, rows first."""
    return () if self._constraint is None else self._constraint.begin(index_B)

  def _program(self, **sampling: Any) -> decode.Program:
    return decode.Program(self.model, self._mesh, tuple(sorted(self._rules.items())), **sampling)

  def _batches(self, items: Iterator, length: Callable[[Any], int]) -> Iterator[list]:
    """Lists of up to batch_size items of like lengths, longest first in each stretch that is read ahead."""
    while ahead := list(itertools.islice(items, _AHEAD * self.batch_size)):
      ahead.sort(key=length, reverse=True)
      yield from (ahead[n:n + self.batch_size] for n in range(0, len(ahead), self.batch_size))

  def _bucket(self, length: int) -> int:
    """The padded length: a power of two, or max_length."""
    return min(max(_SHORTEST, 1 << (length - 1).bit_length()), self.max_length or length * 2 + _SHORTEST)

  def _put_rows(self, tree: Any) -> Any:
    return jax.device_put(tree, None if self._mesh is None else sharding.batch_sharding(self._mesh, self._rules))

  def _put_whole(self, tree: Any) -> Any:
    return jax.device_put(tree, None if self._mesh is None else sharding.replicated(self._mesh))

  def _prompt(self, n: int, prompt: Sequence[int], new: int) -> np.ndarray:
    tokens = self._check_tokens(f'prompt {n}', prompt)
    length = self._start + len(tokens)
    if self.max_length is not None and length + new > self.max_length:
      raise ValueError(f'prompt {n} has {length} tokens and {new} may follow: more than max_length '
                       f'{self.max_length}; cut the prompt, or ask for fewer')
    return tokens

  def _check_tokens(self, what: str, tokens: Sequence[int]) -> np.ndarray:
    x = np.asarray(tokens)
    if x.ndim != 1 or not x.size or not np.issubdtype(x.dtype, np.integer):
      raise ValueError(f'{what} is {"empty" if not x.size else f"{x.dtype} {x.shape}"}; want token ids in one row, '
                       'at least one')
    if x.min() < 0 or x.max() >= self.model.vocab_size:
      raise ValueError(f'{what} has token ids from {x.min()} to {x.max()}; the model knows 0 to '
                       f'{self.model.vocab_size - 1}')
    return x.astype(np.int32)

  def _stops(self, stop: Sequence[Stop]) -> '_Stops':
    if isinstance(stop, str):
      raise ValueError(f'stop is the string {stop!r}; want a list of strings or token sequences')
    strings = [s for s in stop if isinstance(s, str)]
    if '' in strings:
      raise ValueError('stop has an empty string, which every text holds')
    if strings and self._detokenize is None:
      raise ValueError(f'stop has strings, {strings}, and the generator no detokenize to find them with')
    sequences = [self._check_tokens(f'stop {n}', s).tolist() for n, s in enumerate(stop) if not isinstance(s, str)]
    return _Stops(strings, sequences, self._detokenize)


@dataclasses.dataclass(frozen=True)
class _Stops:
  """Where a text ends, and how much of it is kept."""

  strings: list[str]
  sequences: list[list[int]]
  detokenize: Callable[[Sequence[int]], str] | None

  def find(self, tokens: list[int], seen: int) -> tuple[int, str | None] | None:
    """(tokens kept, the text kept) at the first token from number `seen` on that completes a stop; None: none does."""
    whole = self.detokenize(tokens) if self.strings else ''
    if not self.sequences and not any(stop in whole for stop in self.strings):
      return None
    for end in range(seen + 1, len(tokens) + 1):
      head, found = tokens[:end], []
      text = self.detokenize(head) if self.detokenize else None
      for stop in self.sequences:
        if head[-len(stop):] == stop:
          kept = end - len(stop)
          found.append((kept, self.detokenize(head[:kept]) if self.detokenize else None))
      starts = [text.find(stop) for stop in self.strings if stop in text]
      if starts:
        kept = max(n for n in range(end) if len(self.detokenize(head[:n])) <= min(starts))
        found.append((kept, text[:min(starts)]))
      if found:
        return min(found, key=lambda pair: (pair[0], len(pair[1] or '')))
    return None


@dataclasses.dataclass
class _Slots:
  """A cache in which slot t holds position t, as the host knows it: how long it is, and how long it must be."""

  length: int
  bucket: Callable[[int], int]

  def wanted(self, rows: list['Row'], steps: int) -> int:
    """The length that holds what so many steps may write, no less than it is."""
    slots = max(row.length + min(len(row.tokens) + steps, row.limit) for row in rows if row.running)
    return self.length if slots <= self.length else self.bucket(slots)


class Row:
  """A prompt of `length` tokens, and what has followed it so far, `limit` tokens at most."""

  def __init__(self, index: int, length: int, limit: int):
    self.index, self.length, self.limit, self.running = index, length, limit, True
    self.tokens: list[int] = []
    self.logprobs: list[np.ndarray] = []
    self.text, self.finished = None, 'length'

  def take(self, outcome: dict, stops: _Stops) -> None:
    """The row's part of what `decode` reports.  ValueError where its constraint allows nothing."""
    seen = len(self.tokens)
    gained = int(outcome['count_B']) - seen
    self.tokens += outcome['tokens_BxN'][:gained].tolist()
    self.logprobs += [*outcome['logprobs_BxN'][:gained]]
    self.running = bool(outcome['running_B'])
    if not np.isfinite(self.logprobs[seen:]).all():
      raise FloatingPointError(f'prompt {self.index}: the model gives no finite log-probability after {seen} tokens')
    if outcome['eos_B']:
      self.finished = 'eos'
      self._keep(len(self.tokens) - 1)
    cut = stops.find(self.tokens, seen) if stops.strings or stops.sequences else None
    if cut is not None:
      self.finished, self.text, self.running = 'stop', cut[1], False
      self._keep(cut[0])
    elif outcome['dead_B']:
      raise ValueError(f'prompt {self.index}: the constraint allows no token after {len(self.tokens)} new ones '
                       f'({self.tokens[-8:]} at the end); allow end of text where a text may end, and give its id in '
                       'eos_ids')

  def result(self, detokenize: Callable[[Sequence[int]], str] | None) -> Generated:
    text = detokenize(self.tokens) if self.text is None and detokenize else self.text
    return Generated(np.array(self.tokens, np.int32), text, np.array(self.logprobs, np.float32), self.finished)

  def _keep(self, n: int) -> None:
    del self.tokens[n:], self.logprobs[n:]


def _placed(model: Any, params: Any, mesh: jax.sharding.Mesh | None, rules: sharding.Rules) -> Any:
  """The parameters in the dtypes and places of computing; one that is there already stays itself."""
  want, axes = model.abstract(), model.logical_axes()
  if jax.tree.structure(params) != jax.tree.structure(want):
    raise ValueError(f'the parameters are {jax.tree.structure(params)}, the model has {jax.tree.structure(want)}')
  places = jax.tree.map(lambda _: None, want) if mesh is None else sharding.tree_shardings(mesh, want, axes, rules)

  def one(path, given, wanted, names, place):
    if given.shape != wanted.shape or not jnp.issubdtype(given.dtype, jnp.floating):
      raise ValueError(f'parameter {jax.tree_util.keystr(path, simple=True, separator=".")} is {given.dtype} '
                       f'{given.shape}, want floating point {wanted.shape}')
    return jax.device_put(given.astype(jnp.float32 if 'norm' in names else model.dtype), place)

  flat, structure = jax.tree_util.tree_flatten_with_path(params)
  others = (structure.flatten_up_to(tree) for tree in (want, axes, places))
  return structure.unflatten([one(path, x, *rest) for (path, x), *rest in zip(flat, *others)])
