"""Which tiles of keys a tile of queries can see, and what in them: the masks of the fast implementations.

Under an anchor mask the kept keys of a row stand once more before the row's own, in slots: T = slots + L keys, and each
tile is of slots or of positions.  A tile of queries walks over a range of both, in one softmax.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_NOWHERE = jnp.iinfo(jnp.int32).max


class Marks(NamedTuple):
  """What a mask says of each position, int32; zeros where something is appended, which neither sees nor is seen.

  documents   queries B x 1 x L, keys B x L: the document of each, 0 = padding
  anchors     queries B x 4 x L: the first slot that each sees and the one past the last; the least mark that a key must
              have there; and how many positions back its segment goes, itself counted, 0 = padding
              keys B x T: of a slot 2 where what it holds is protected, else 1; of a position 1, 0 = padding
  """

  queries: jax.Array
  keys: jax.Array


class Walk(NamedTuple):
  """The tiles that each owned tile meets, int32 (B or 1) x N: step s < count meets tile first + s, and from step `turn`
  on the one `jump` further.  turn and jump: None where there is one range."""

  first: jax.Array
  count: jax.Array
  turn: jax.Array | None
  jump: jax.Array | None

  def tile(self, s: jax.Array) -> jax.Array:
    return self.first + s if self.turn is None else self.first + s + jnp.where(s >= self.turn, self.jump, 0)


@dataclasses.dataclass(frozen=True)
class Visible:
  """What is static of a mask: causal or not, the window, and the length beyond which all is padding; of an anchor mask
  the number of slots before the positions, else None."""

  causal: bool
  window: int | None
  length: int
  slots: int | None = None

  def aligned(self, multiple: int) -> 'Visible':
    """With as many slots as `pad_keys` makes them."""
    return self if self.slots is None else dataclasses.replace(self, slots=self.slots + -self.slots % multiple)

  def tile(self, i_Qx1: jax.Array, j_1xC: jax.Array, queries_MxQx1: Sequence[jax.Array] | None = None,
           keys_1xC: jax.Array | None = None) -> jax.Array:
    """bool Q x C for queries at positions i and keys at positions j, with their marks; without an anchor mask."""
    seen = (j_1xC < self.length) & (i_Qx1 < self.length)
    if self.causal:
      seen &= j_1xC <= i_Qx1
    if self.window is not None:
      seen &= (j_1xC > i_Qx1 - self.window) & (j_1xC < i_Qx1 + self.window)
    if queries_MxQx1 is not None:
      segment_Qx1, = queries_MxQx1
      seen &= (segment_Qx1 == keys_1xC) & (segment_Qx1 > 0)
    return seen

  def anchor_tile(self, i_Qx1: jax.Array, t_1xC: jax.Array, queries_MxQx1: Sequence[jax.Array], keys_1xC: jax.Array,
                  of_slots: jax.Array) -> jax.Array:
    """bool Q x C for queries at positions i and keys t of all T, under an anchor mask; of_slots: what the keys are."""
    first, stop, least, back = queries_MxQx1
    end = i_Qx1 + (self.slots + 1)
    first, stop, least = (jnp.where(of_slots, x, y) for x, y in ((first, end - back), (stop, end), (least, 1)))
    return (t_1xC >= first) & (t_1xC < stop) & (keys_1xC >= least)

  def whole(self, i: jax.Array, j: jax.Array, size: int) -> jax.Array:
    """bool: whether all queries of tile i see all keys of tile j, of `size` positions each, documents aside."""
    first_i, last_i, first_j, last_j = i * size, (i + 1) * size - 1, j * size, (j + 1) * size - 1
    seen = (last_i < self.length) & (last_j < self.length)
    if self.causal:
      seen &= last_j <= first_i
    if self.window is not None:
      seen &= (first_j > last_i - self.window) & (last_j < first_i + self.window)
    return seen

  def mean_visible(self) -> float:
    """Keys that a query sees on average, documents aside; under an anchor mask, where the text decides, what it is with
    an anchor every 32 tokens."""
    if self.slots is not None:
      return min(self.length / 64, self.slots / 2) + 16
    reach = min(self.window or self.length, self.length)
    return reach / 2 if self.causal and reach == self.length else reach * (1 if self.causal else 2)

  def max_steps(self, owned: int, walked: int) -> int:
    """The most tiles of size `walked` that one tile of size `owned` can meet, without an anchor mask."""
    tiles = -(-self.length // walked)
    if self.window is None:
      return tiles
    reach = (self.window - 1) * (1 if self.causal else 2)
    return min(tiles, (owned - 1 + reach) // walked + 2)

  def walk(self, owner: str, owned: int, walked: int, marks: Marks | None, *, together: bool = False) -> Walk:
    """The tiles of the other side, of size `walked`, that each owned tile can meet; the rest is skipped.

    No visible tile is left out.  Exact for documents whose ids rise along the row, and for anchor masks unless a whole
    tile of kept or padding tokens comes in between; for others fewer are skipped.
    together: the rows of the batch meet what any of them must.
    """
    if self.slots is None:
      ranges = [self._range(owner, owned, walked, marks)]
    elif owner == 'queries':
      ranges = self._anchor_ranges(owned, walked, marks)
    else:
      ranges = [_turned(self._anchor_ranges(walked, owned, marks), (self.slots + self.length + owned - 1) // owned)]
    if together:
      ranges = [(jnp.min(first, axis=0, keepdims=True), jnp.max(end, axis=0, keepdims=True)) for first, end in ranges]
    (first, end), *second = ranges
    count = jnp.maximum(end - first, 0)
    if not second:
      return Walk(first, count, None, None)
    (other, other_end), = second
    begin = jnp.where(count > 0, first, other)
    return Walk(begin, count + jnp.maximum(other_end - other, 0), count, other - begin - count)

  def _range(self, owner: str, owned: int, walked: int, marks: Marks | None) -> tuple[jax.Array, jax.Array]:
    """int32 (B or 1) x N, first and last+1 tile of the other side, without an anchor mask."""
    n_owned, n_walked = -(-self.length // owned), -(-self.length // walked)
    first_row = jnp.arange(n_owned, dtype=jnp.int32)[None] * owned
    last_row = first_row + owned - 1
    far = None if self.window is None else self.window - 1
    back, ahead = (far, 0 if self.causal else far) if owner == 'queries' else (0 if self.causal else far, far)
    first = jnp.zeros_like(first_row) if back is None else jnp.maximum((first_row - back) // walked, 0)
    end = jnp.full_like(first_row, n_walked)
    if ahead is not None:
      end = jnp.minimum((last_row + ahead) // walked + 1, n_walked)
    if marks is not None:
      lowest = lambda x: jnp.min(jnp.where(x > 0, x, _NOWHERE), axis=-1)
      highest = lambda x: jnp.max(x, axis=-1)
      own, other = _in_tiles(marks.keys, owned), _in_tiles(marks.keys, walked)
      # Before the first tile whose running maximum reaches our lowest segment all are smaller; likewise the end.
      before = lax.cummax(highest(other), axis=1)[:, None, :] < lowest(own)[:, :, None]
      after = lax.cummin(lowest(other), axis=1, reverse=True)[:, None, :] > highest(own)[:, :, None]
      first = jnp.maximum(first, jnp.sum(before, axis=-1, dtype=jnp.int32))
      end = jnp.minimum(end, n_walked - jnp.sum(after, axis=-1, dtype=jnp.int32))
    return first, end

  def _anchor_ranges(self, queries: int, keys: int, marks: Marks) -> list[tuple[jax.Array, jax.Array]]:
    """Of each tile of queries the range of tiles of slots, and that of positions; int32 B x N, and an empty range does
    not end after its first tile."""
    first, stop, _, back = (marks.queries[:, n] for n in range(4))
    end = jnp.arange(1, self.length + 1, dtype=jnp.int32)[None]

    def tiles(first, stop, before, count):
      first, stop = _in_tiles(first, queries), _in_tiles(stop, queries)
      lowest = jnp.min(jnp.where(first < stop, first, _NOWHERE), axis=-1)
      highest = jnp.max(jnp.where(first < stop, stop, 0), axis=-1)
      return before + jnp.minimum(lowest // keys, count), before + jnp.minimum(-(-highest // keys), count)

    of_slots = self.slots // keys
    return [tiles(first, stop, 0, of_slots),
            tiles(end - back, jnp.broadcast_to(end, back.shape), of_slots, -(-self.length // keys))]


def _turned(ranges: list[tuple[jax.Array, jax.Array]], n_keys: int) -> tuple[jax.Array, jax.Array]:
  """Of each of n_keys tiles of keys the range of tiles of queries that meet it."""
  at = jnp.arange(n_keys, dtype=jnp.int32)[None, None]
  meets = functools.reduce(jnp.logical_or, [(first[..., None] <= at) & (at < end[..., None]) for first, end in ranges])
  n_queries = meets.shape[1]
  query = jnp.arange(n_queries, dtype=jnp.int32)[None, :, None]
  return (jnp.min(jnp.where(meets, query, n_queries), axis=1), jnp.max(jnp.where(meets, query + 1, 0), axis=1))


def _in_tiles(x_BxL: jax.Array, size: int) -> jax.Array:
  """B x N x size."""
  return pad_to(x_BxL, 1, size).reshape(x_BxL.shape[0], -1, size)


def pad_to(x: jax.Array, axis: int, multiple: int) -> jax.Array:
  """x with zeros appended along `axis` up to a multiple."""
  short = -x.shape[axis] % multiple
  if not short:
    return x
  return jnp.pad(x, [(0, short if a == axis else 0) for a in range(x.ndim)])


def pad_keys(x: jax.Array, axis: int, multiple: int, slots: int | None) -> jax.Array:
  """The same for all keys: zeros behind the slots, up to a multiple, and behind the positions."""
  if not (slots or 0) % multiple:
    return pad_to(x, axis, multiple)
  return jnp.concatenate([pad_to(part, axis, multiple) for part in jnp.split(x, [slots], axis)], axis)


def cut_keys(x: jax.Array, axis: int, multiple: int, slots: int | None, length: int) -> jax.Array:
  """What `pad_keys` was given, of what it gave."""
  padded = (slots or 0) + -(slots or 0) % multiple
  own = lax.slice_in_dim(x, padded, padded + length, axis=axis)
  return own if not slots else jnp.concatenate([lax.slice_in_dim(x, 0, slots, axis=axis), own], axis)
