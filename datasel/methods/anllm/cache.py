"""The anchor cache: keys and values of what later tokens may still see, in buffers of a static size.

The slots of a layer are [protected | anchors | window].  A token is written once, where it can stay: a protected one
and an anchor behind those before it, any other into the window of the segment that is open.  To close a segment sets
the window's counter to 0: eviction copies nothing.  Counters are a row's own, positions the true ones in the text; so
decoding gives what the whole text gives under the mask, in any batch and cut into any chunks (the authors' code lets a
chunk see a segment that it has closed, and counts positions anew after each eviction).
AnLLM, Pang et al. 2024 (arXiv 2402.07616), 3.3.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from datasel import sharding
from datasel.attention import anchors
from datasel.attention.cached import cached_attention
from datasel.data.anchors import Rule
from datasel.models.mistral import Mistral

# All layers' new keys of a token go to one slot of its own row (see models/mistral.py).
_ROW_BY_ROW = jax.lax.ScatterDimensionNumbers(
  update_window_dims=(0, 3, 4), inserted_window_dims=(3,), scatter_dims_to_operand_dims=(3,),
  operand_batching_dims=(1,), scatter_indices_batching_dims=(0,))


@dataclasses.dataclass(frozen=True)
class Room:
  """Slots of each row and layer, static: for protected tokens, for anchors that are not, and for the open segment."""

  protected: int
  anchors: int
  window: int

  @property
  def slots(self) -> int:
    return self.protected + self.anchors + self.window

  def nbytes(self, model: Mistral, rows: int) -> int:
    """Bytes of the buffers of so many rows."""
    return rows * self.slots * slot_bytes(model)


def slot_bytes(model: Mistral) -> int:
  """Bytes that one token takes in the cache: its keys and values of all layers."""
  return 2 * model.n_layers * model.n_kv_heads * model.head_dim * jnp.dtype(model.dtype).itemsize


class Counts(NamedTuple):
  """What the cache of each row holds, int32: jax's arrays in the cache, numpy's on the host, which makes room by them.
  """

  protected_B: jax.Array
  anchors_B: jax.Array  # that are not protected
  window_B: jax.Array  # of the open segment, not protected
  open_B: jax.Array  # tokens of the open segment, protected ones too

  @classmethod
  def zeros(cls, rows: int) -> 'Counts':
    return cls(*(np.zeros(rows, np.int32) for _ in cls._fields))

  @property
  def live_B(self) -> jax.Array:
    return self.protected_B + self.anchors_B + self.window_B


class Marks(NamedTuple):
  """What each token of a chunk is, bool B x L."""

  real_BxL: jax.Array
  anchor_BxL: jax.Array
  protected_BxL: jax.Array
  tail_BxL: jax.Array  # goes to the window: not protected, its segment is open after the chunk


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """key, value: n_layers x B x K x T x Dh in the compute dtype, T = room.slots; beyond the counts nothing is seen."""

  key: jax.Array
  value: jax.Array
  counts: Counts
  room: Room = dataclasses.field(metadata={'static': True})


@dataclasses.dataclass(frozen=True)
class AnchorDecoder:
  """A model as `decode` wants one, with an anchor cache.  A model without anchors keeps all of the text in the window.

  ValueError for a model with a sliding window, and one whose rule has ids that it has not.
  """

  model: Mistral

  def __post_init__(self):
    if self.model.window is not None:
      raise ValueError(f'anchor cache: the model has a sliding window of {self.model.window}; want anchors, or neither '
                       '(datasel.generate.Generator decodes it)')
    unknown = [i for i in self.rule.anchor_ids if i >= self.model.vocab_size]
    if unknown:
      raise ValueError(f'anchor cache: {self.rule} has ids {unknown}, the model knows 0 to '
                       f'{self.model.vocab_size - 1}; give it a row for the anchor (with_anchor_row), or the rule of '
                       'its own tokenizer')

  @property
  def rule(self) -> Rule:
    return Rule() if self.model.anchors is None else self.model.anchors

  def follow(self, counts: Counts, tokens_BxL: jax.Array, position_BxL: jax.Array,
             protected_BxL: jax.Array | None = None) -> tuple[Marks, Counts]:
    """(what the tokens of a chunk are, the counts after it).  The arguments are `extend`'s; arrays of numpy give such.

    ValueError for protected tokens of a model without anchors, where every token sees all before it.
    """
    xp = anchors.namespace(tokens_BxL, position_BxL, *counts)
    real_BxL = position_BxL >= 0
    state = anchors.Open(counts.open_B, xp.ones_like(counts.open_B))
    anchor_BxL, state = anchors.flags(tokens_BxL, self.rule, real_BxL.astype(np.int32), state)
    if protected_BxL is None:
      protected_BxL = xp.zeros_like(real_BxL)
    elif self.model.anchors is None:
      raise ValueError('protected tokens are given to a model without anchors, where every token sees all before it')
    else:
      anchors.check_rows('protected_BxL', protected_BxL, np.bool_, 'bool', tokens_BxL.shape)
    if self.model.keep_bos:
      protected_BxL = protected_BxL | (position_BxL == 0)
    protected_BxL = protected_BxL & real_BxL
    open_BxL = real_BxL & (_before(anchor_BxL) == anchor_BxL.sum(axis=1, dtype=np.int32)[:, None]) & ~anchor_BxL
    marks = Marks(real_BxL, anchor_BxL, protected_BxL, open_BxL & ~protected_BxL)
    count = lambda mark_BxL: mark_BxL.sum(axis=1, dtype=np.int32)
    return marks, Counts(counts.protected_B + count(protected_BxL), counts.anchors_B + count(_bare(marks)),
                         xp.where(anchor_BxL.any(axis=1), 0, counts.window_B) + count(marks.tail_BxL), state.length_B)

  def empty(self, rows: int, room: Room) -> Cache:
    """A cache of nothing, at the beginning of a text."""
    shape = (self.model.n_layers, rows, self.model.n_kv_heads, room.slots, self.model.head_dim)
    key, value = (_constrain(jnp.zeros(shape, self.model.dtype)) for _ in range(2))
    return Cache(key, value, jax.tree.map(jnp.asarray, Counts.zeros(rows)), room)

  def grow(self, cache: Cache, room: Room) -> Cache:
    """The same cache with that room, no less in any part than it has."""
    old = cache.room
    ends = (old.protected, old.protected + old.anchors)
    more = (room.protected - old.protected, room.anchors - old.anchors, room.window - old.window)

    def wide(x):
      parts = zip(jnp.split(x, ends, axis=3), more)
      pad = lambda n: ((0, 0), (0, 0), (0, 0), (0, n), (0, 0))
      return _constrain(jnp.concatenate([jnp.pad(part, pad(n)) for part, n in parts], axis=3))

    return dataclasses.replace(cache, key=wide(cache.key), value=wide(cache.value), room=room)

  def spread(self, cache: Cache, rows: int) -> Cache:
    """The cache with each of its rows repeated, to so many in all."""
    times = rows // cache.key.shape[1]
    key, value = (_constrain(jnp.repeat(x, times, axis=1)) for x in (cache.key, cache.value))
    return Cache(key, value, jax.tree.map(lambda x_B: jnp.repeat(x_B, times), cache.counts), cache.room)

  def extend(self, params: dict, tokens_BxL: jax.Array, position_BxL: jax.Array, cache: Cache,
             protected_BxL: jax.Array | None = None) -> tuple[jax.Array, Cache]:
    """Reads L more tokens of each row (one, when decoding): (hidden_BxLxD, the cache of what stays).

    position_BxL: int32, the place in the text, from 0; -1 for none there: it changes nothing of its row and its hidden
    state means nothing.  protected_BxL: bool, tokens that all later ones see.  O(L (T + L)) memory.
    A row that its room does not hold becomes NaN: `follow` tells before how much is needed.
    """
    room, counts = cache.room, cache.counts
    marks, after = self.follow(counts, tokens_BxL, position_BxL, protected_BxL)
    visible_BxLxT, own_BxLxL = self._visible(marks, cache)
    start = (0, room.protected, room.protected + room.anchors)  # of the slots of each kind
    slot_BxL = jnp.full(tokens_BxL.shape, room.slots)  # out of range: dropped by the scatter
    emptied = counts._replace(window_B=after.window_B - marks.tail_BxL.sum(axis=1, dtype=jnp.int32))
    for first, count_B, mark_BxL in zip(start, emptied, (marks.protected_BxL, _bare(marks), marks.tail_BxL)):
      slot_BxL = jnp.where(mark_BxL, first + count_B[:, None] + _before(mark_BxL), slot_BxL)

    def attend(q, k, v, new, n):
      rows_first = lambda x: x.swapaxes(1, 2)
      out = cached_attention(q, cache.key[n], cache.value[n], visible_BxLxT, (rows_first(k), rows_first(v), own_BxLxL))
      put = lambda name, x: jax.lax.dynamic_update_index_in_dim(new[name], x, n, 0)
      return out, {'key': put('key', k), 'value': put('value', v)}

    # The cache is read in all layers and then written once: it need not be held twice.
    shape = (self.model.n_layers, *tokens_BxL.shape, self.model.n_kv_heads, self.model.head_dim)
    new = {name: jnp.zeros(shape, self.model.dtype) for name in ('key', 'value')}
    hidden_BxLxD, new = self.model.read_on(params, tokens_BxL, jnp.maximum(position_BxL, 0), new, attend)
    write = lambda x, new: _constrain(jax.lax.scatter(x, slot_BxL[..., None], new, _ROW_BY_ROW, mode='drop'))
    over_B = (after.protected_B > room.protected) | (after.anchors_B > room.anchors) | (after.window_B > room.window)
    hidden_BxLxD = jnp.where(over_B[:, None, None], jnp.nan, hidden_BxLxD)
    return hidden_BxLxD, Cache(write(cache.key, new['key']), write(cache.value, new['value']), after, room)

  def logits(self, params: dict, hidden_BxLxD: jax.Array) -> jax.Array:
    return self.model.logits(params, hidden_BxLxD)

  def nll(self, params: dict, hidden_BxLxD: jax.Array, targets_BxL: jax.Array) -> jax.Array:
    return self.model.nll(params, hidden_BxLxD, targets_BxL)

  def _visible(self, marks: Marks, cache: Cache) -> tuple[jax.Array, jax.Array]:
    """bool B x L x T and B x L x L: which slots, as they were, and tokens of the chunk itself each token sees."""
    room, counts, sees = cache.room, cache.counts, self.model.anchor_sees_anchors
    held = lambda count_B, size: (jnp.arange(size)[None] < count_B[:, None])[:, None]
    query = lambda x_BxL: (x_BxL & marks.real_BxL)[:, :, None]
    visible_BxLxT = jnp.concatenate([
      query(jnp.ones_like(marks.real_BxL)) & held(counts.protected_B, room.protected),
      query(~marks.anchor_BxL | sees) & held(counts.anchors_B, room.anchors),
      query(_before(marks.anchor_BxL) == 0) & held(counts.window_B, room.window)], axis=-1)
    own_BxLxL = anchors.visible(marks.anchor_BxL, marks.real_BxL.astype(jnp.int32), anchor_sees_anchors=sees,
                                protected_BxL=marks.protected_BxL)
    return visible_BxLxT, own_BxLxL


def _bare(marks: Marks) -> jax.Array:
  """Anchors that are not protected tokens."""
  return marks.anchor_BxL & ~marks.protected_BxL


def _before(mark_BxL: jax.Array) -> jax.Array:
  """int32, the marks before each token of its row."""
  return mark_BxL.cumsum(axis=1, dtype=np.int32) - mark_BxL


def _constrain(x: jax.Array) -> jax.Array:
  return sharding.constrain(x, 'layers', 'batch', 'kv_heads', 'length', 'head_dim')
