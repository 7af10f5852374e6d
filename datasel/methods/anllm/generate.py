"""Text from a model with anchors, and log-probabilities of continuations, with a cache that really forgets.

`AnchorGenerator` is `Generator` with the anchor cache: the same sampling, stops, constraints and placement.  The host
knows which tokens are anchors, so the buffers are as long as what they hold, in powers of two.  A prefix (the
demonstrations of a task) is read once and then stands before any number of questions.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from datasel import decode, sharding
from datasel.attention import anchors
from datasel.data.anchors import Rule
from datasel.generate import Generated, Generator, Row, Stop
from datasel.methods.anllm.cache import AnchorDecoder, Cache, Counts, Room, slot_bytes
from datasel.models.mistral import Mistral

# The shortest buffer but that of protected tokens, and the shortest chunk.
_SHORTEST = 16


@dataclasses.dataclass(frozen=True)
class Prefix:
  """A text that was read once and evicted, to stand before prompts of the generator that read it.

  length: its tokens.  live: those of them that are still in the cache.
  """

  generator: 'AnchorGenerator'
  length: int
  live: int
  counts: Counts  # numpy's, of one row
  last_Sx1xD: jax.Array  # the hidden state of its last token, for each of the S parts that a batch is split into
  cache: Cache  # of S rows

  @property
  def live_bytes(self) -> int:
    """Of the keys and values that are still in use."""
    return self.live * slot_bytes(self.generator.model)

  @property
  def allocated_bytes(self) -> int:
    """Of the buffers that hold them, of one row."""
    return self.cache.room.nbytes(self.generator.model, 1)


class AnchorGenerator(Generator):
  """A `Generator` that keeps of a text its anchors, its protected tokens and the segment that is open.

  A model without anchors keeps everything.  anchor_id: where anchors are a token of their own (the paper's AC), that
  token: a row says it where rule.max_length wants its segment closed, whatever the model or the constraint would say.
  None: any token closes such a segment.  chunk: tokens of a row that are read at one time, at most; memory is theirs
  times what the cache holds.  The other arguments are `Generator`'s.
  ValueError also for a rule with ids that the model has not, and for another anchor_id than the rule's only one.
  """

  def __init__(self, model: Mistral, params: Any, *, mesh: jax.sharding.Mesh | None = None,
               rules: sharding.Rules = sharding.RULES, batch_size: int = 8, eos_ids: Sequence[int] = (),
               pad_id: int = 0, detokenize: Callable[[Sequence[int]], str] | None = None,
               constraint: decode.Constraint | None = None, max_length: int | None = None, chunk: int = 512,
               anchor_id: int | None = None):
    self.decoder = AnchorDecoder(model)
    rule = self.decoder.rule
    if chunk < 1:
      raise ValueError(f'chunk {chunk}, want at least 1 token')
    if anchor_id is not None and rule.anchor_ids != (anchor_id,):
      raise ValueError(f'anchor_id {anchor_id}: the model has {rule}; want the one id of its rule')
    self._inner = constraint
    if anchor_id is not None and rule.max_length is not None:
      constraint = _Closing(constraint, rule, model.vocab_size)
    super().__init__(model, params, mesh=mesh, rules=rules, batch_size=batch_size, eos_ids=eos_ids, pad_id=pad_id,
                     detokenize=detokenize, constraint=constraint, max_length=max_length)
    self._chunk = chunk
    self._prefix: Prefix | None = None
    self._protected: Sequence[Any] | None = None

  def read(self, tokens: Sequence[int], *, protected: Sequence[bool] | None = None) -> Prefix:
    """Reads a prefix, once for all prompts that will follow it.

    protected: bool for each token, those that all later ones see.
    """
    rows = 1 if self._mesh is None else sharding.batch_shards(self._mesh, self._rules)
    tokens = self._check_tokens('prefix', tokens)
    if self.max_length is not None and len(tokens) + 2 > self.max_length:
      raise ValueError(f'prefix has {len(tokens)} tokens, and a prompt and what follows it need 2 more: more than '
                       f'max_length {self.max_length}; cut the prefix')
    given = None if protected is None else [self._check_protected('prefix', tokens, protected)] * rows
    last_Sx1xD, cache, slots = self._read_rows([tokens] * rows, given, [0] * rows, rows, self._program())
    counts = Counts(*(count_B[:1] for count_B in slots.counts))
    return Prefix(self, len(tokens), int(counts.live_B[0]), counts, last_Sx1xD, cache)

  def __call__(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float = 0.0,
               top_k: int = 0, top_p: float = 1.0, stop: Sequence[Stop] = (), seed: int = 0,
               prefix: Prefix | None = None, protected: Sequence[Sequence[bool]] | None = None) -> list[Generated]:
    """What follows each prompt (int32 tokens, at least one), which stands after `prefix`, in their order.

    protected: for each prompt bool for each of its tokens, those that all later ones see.
    """
    settings = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, stop=stop,
                    seed=seed)
    prompts = list(prompts)
    if protected is not None and len(protected) != len(prompts):
      raise ValueError(f'{len(prompts)} prompts and protected tokens of {len(protected)}; want them for each prompt')
    for n, prompt in enumerate(prompts if protected is not None else ()):
      self._check_protected(f'prompt {n}', np.asarray(prompt), protected[n])
    return Generator.__call__(self._after(prefix, protected), prompts, **settings)

  def stream(self, prompts: Iterable[Sequence[int]], *, prefix: Prefix | None = None,
             **settings: Any) -> Iterator[tuple[int, Generated]]:
    """As `Generator.stream`, of prompts after `prefix`."""
    return Generator.stream(self if prefix is None else self._after(prefix, None), prompts, **settings)

  def score(self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[Sequence[int]]], *,
            prefix: Prefix | None = None) -> list[list[np.ndarray]]:
    """As `Generator.score`, of prompts after `prefix`."""
    return Generator.score(self._after(prefix, None), prompts, continuations)

  def _after(self, prefix: Prefix | None, protected: Sequence[Any] | None) -> 'AnchorGenerator':
    """This generator, its prompts after that prefix and with these tokens protected."""
    if prefix is not None and prefix.generator is not self:
      raise ValueError('the prefix was read by another generator; read it with this one')
    after = copy.copy(self)
    after._prefix, after._protected = prefix, protected
    after._start = 0 if prefix is None else prefix.length
    return after

  def _program(self, **sampling: Any) -> decode.Program:
    return dataclasses.replace(super()._program(**sampling), model=self.decoder)

  def _read(self, batch: list[tuple[int, np.ndarray]], more: list[int],
            program: decode.Program) -> tuple[jax.Array, Cache, '_Slots']:
    protected = self._protected
    if protected is not None:
      protected = [self._check_protected(f'prompt {n}', prompt, protected[n]) for n, prompt in batch]
    return self._read_rows([prompt for _, prompt in batch], protected, more, self.batch_size, program)

  def _read_rows(self, prompts: list[np.ndarray], protected: list[np.ndarray] | None, more: list[int], rows: int,
                 program: decode.Program) -> tuple[jax.Array, Cache, '_Slots']:
    """Reads prompts in chunks; what is left of `rows` reads nothing."""
    longest = max(map(len, prompts))
    widths = [self._chunk] * (longest // self._chunk)
    if rest := longest % self._chunk:
      widths.append(min(_bucket(rest), self._chunk))
    tokens_BxL, position_BxL = (np.full((rows, sum(widths)), fill, np.int32) for fill in (self._pad, -1))
    protected_BxL = None if protected is None else np.zeros(tokens_BxL.shape, bool)
    for b, prompt in enumerate(prompts):
      tokens_BxL[b, :len(prompt)] = prompt
      position_BxL[b, :len(prompt)] = self._start + np.arange(len(prompt))
      if protected is not None:
        protected_BxL[b, :len(prompt)] = protected[b]
    stops = np.cumsum(widths)
    chunks = [tuple(None if x is None else x[:, stop - width:stop] for x in (tokens_BxL, position_BxL, protected_BxL))
              for stop, width in zip(stops, widths)]

    slots = _Slots(self.decoder, rows, self._prefix, self.max_length)
    for chunk in chunks:
      slots.feed(*chunk)
    slots.length = slots.room(np.array([*more, *[0] * (rows - len(more))]))
    begun = None if self._prefix is None else (self._prefix.last_Sx1xD, self._prefix.cache)
    last_Bx1xD, cache = _begin(begun, rows=rows, room=slots.length, program=program)
    for chunk in chunks:
      last_Bx1xD, cache = _extend(self.params, last_Bx1xD, cache, *self._put_rows(chunk), program=program)
    return last_Bx1xD, cache, slots

  def _carry(self, index_B: np.ndarray, slots: '_Slots') -> Any:
    if not isinstance(self._constraint, _Closing):
      return super()._carry(index_B, slots)
    return slots.counts.open_B, () if self._inner is None else self._inner.begin(index_B)

  def _check_protected(self, what: str, tokens: np.ndarray, protected: Sequence[bool]) -> np.ndarray:
    x = np.asarray(protected)
    if x.shape != tokens.shape or x.dtype != bool:
      raise ValueError(f'{what}: protected is {x.dtype} {x.shape}, want bool {tokens.shape}, one for each token')
    return x


class _Slots:
  """The anchor cache of a batch as the host knows it: what each row holds, and the room that its buffers have."""

  def __init__(self, decoder: AnchorDecoder, rows: int, prefix: Prefix | None, max_length: int | None):
    self._decoder, self._max_length = decoder, max_length
    self.length = Room(0, 0, 0) if prefix is None else prefix.cache.room
    self.counts = Counts.zeros(rows) if prefix is None else Counts(*(np.repeat(x, rows) for x in prefix.counts))
    self._widest = 0  # the fullest window at the end of a chunk
    self._fed = [0] * rows  # tokens of each row's continuation that are in the counts

  def feed(self, tokens_BxL: np.ndarray, position_BxL: np.ndarray, protected_BxL: np.ndarray | None = None) -> None:
    """Counts what one call of `extend` will keep."""
    _, self.counts = self._decoder.follow(self.counts, tokens_BxL, position_BxL, protected_BxL)
    self._widest = max(self._widest, int(self.counts.window_B.max()))

  def room(self, more_B: np.ndarray) -> Room:
    """The room for what was fed and for so many tokens more, whatever they are; in no part less than there is."""
    rule, counts, now = self._decoder.rule, self.counts, self.length
    least = rule.min_length if rule.anchor_ids else rule.max_length  # tokens of a segment that closes; None: none does
    if least is None:
      anchors_B = counts.anchors_B
    else:
      soonest_B = np.maximum(least - counts.open_B, 1)
      anchors_B = counts.anchors_B + np.where(more_B < soonest_B, 0, 1 + (more_B - soonest_B) // least)
    most = [n for n in (self._max_length, rule.max_length and rule.max_length - 1) if n is not None]
    window = min([max(self._widest, int((counts.window_B + more_B).max())), *most])
    fit = lambda size, need, least, most: size if need <= size else min([_bucket(need, least), *most])
    held = [] if self._max_length is None else [self._max_length]
    return Room(fit(now.protected, int(counts.protected_B.max()), 1, held),
                fit(now.anchors, int(anchors_B.max()), _SHORTEST, held), fit(now.window, window, _SHORTEST, most))

  def wanted(self, rows: list[Row], steps: int) -> Room:
    """The room that holds what so many steps may keep."""
    # The last token of a row is not read yet.
    news = [row.tokens[self._fed[b]:-1] if row.running else [] for b, row in enumerate(rows)]
    tokens_BxL, position_BxL = (np.full((len(self._fed), max(1, *map(len, news))), fill, np.int32) for fill in (0, -1))
    more_B = np.zeros(len(self._fed), np.int32)
    for b, (row, new) in enumerate(zip(rows, news)):
      tokens_BxL[b, :len(new)] = new
      position_BxL[b, :len(new)] = row.length + self._fed[b] + np.arange(len(new))
      self._fed[b] += len(new)
      more_B[b] = min(steps, row.limit - len(row.tokens)) if row.running else 0
    self.feed(tokens_BxL, position_BxL)
    return self.room(more_B)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Closing:
  """Where a segment must close, only its anchor may come; elsewhere what `inner` allows, which sees no such anchor."""

  inner: decode.Constraint | None
  rule: Rule = dataclasses.field(metadata={'static': True})
  vocab_size: int = dataclasses.field(metadata={'static': True})

  def mask(self, carry: tuple[jax.Array, Any]) -> jax.Array:
    open_B, inner = carry
    anchor_BxV = (jnp.arange(self.vocab_size) == self.rule.anchor_ids[0])[None]
    free_BxV = jnp.ones_like(anchor_BxV) if self.inner is None else self.inner.mask(inner)
    return jnp.where(self._must(open_B)[:, None], anchor_BxV, free_BxV)

  def advance(self, carry: tuple[jax.Array, Any], token_B: jax.Array) -> tuple[jax.Array, Any]:
    open_B, inner = carry
    _, state = anchors.flags(token_B[:, None], self.rule, state=anchors.Open(open_B, jnp.ones_like(open_B)))
    if self.inner is not None:
      must_B = self._must(open_B)
      keep = lambda old, new: jnp.where(must_B.reshape(-1, *[1] * (new.ndim - 1)), old, new)
      inner = jax.tree.map(keep, inner, self.inner.advance(inner, token_B))
    return state.length_B, inner

  def _must(self, open_B: jax.Array) -> jax.Array:
    return anchors.must_close(anchors.Open(open_B, jnp.ones_like(open_B)), self.rule)


@functools.partial(jax.jit, static_argnames=('rows', 'room', 'program'))
def _begin(begun: tuple[jax.Array, Cache] | None, *, rows: int, room: Room,
           program: decode.Program) -> tuple[jax.Array, Cache]:
  """(last_Bx1xD, the cache) of so many rows, with that room: of nothing, or of the prefix that begins them."""
  with program.layout():
    model = program.model.model
    if begun is None:
      return (sharding.constrain(jnp.zeros((rows, 1, model.d_model), model.dtype), 'batch', None, None),
              program.model.empty(rows, room))
    last_Sx1xD, cache = begun
    last_Bx1xD = sharding.constrain(jnp.repeat(last_Sx1xD, rows // len(last_Sx1xD), axis=0), 'batch', None, None)
    return last_Bx1xD, program.model.grow(program.model.spread(cache, rows), room)


@functools.partial(jax.jit, static_argnames='program', donate_argnames=('last_Bx1xD', 'cache'))
def _extend(params: dict, last_Bx1xD: jax.Array, cache: Cache, tokens_BxL: jax.Array, position_BxL: jax.Array,
            protected_BxL: jax.Array | None, *, program: decode.Program) -> tuple[jax.Array, Cache]:
  """The cache with a chunk read, and the hidden state of each row's last token so far; tokens stand on the left."""
  with program.layout():
    hidden_BxLxD, cache = program.model.extend(params, tokens_BxL, position_BxL, cache, protected_BxL)
    count_B = jnp.sum(position_BxL >= 0, axis=1)
    new_Bx1xD = jnp.take_along_axis(hidden_BxLxD, jnp.maximum(count_B - 1, 0)[:, None, None], axis=1)
    return jnp.where((count_B > 0)[:, None, None], new_Bx1xD, last_Bx1xD), cache


def _bucket(length: int, least: int = _SHORTEST) -> int:
  """The padded length, of a positive one: a power of two."""
  return max(least, 1 << (length - 1).bit_length())
