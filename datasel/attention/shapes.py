"""Shapes of attention that tests and benchmarks share: what a mask, a head or a length can do differently, once each.

A case has three sizes with the same structure: 'small' for checks on a CPU, interpreted; 'full' as models have it, for
accelerators; and 'medium' between them, for benchmarks on a CPU.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from datasel.attention import anchors
from datasel.attention.masks import Anchors, Mask
from datasel.attention.visible import Visible
from datasel.data.anchors import Rule

_LEAST = 8  # tokens of a segment with an anchor


@dataclasses.dataclass(frozen=True)
class Case:
  """One shape and mask."""

  name: str
  heads: int
  kv_heads: int
  head_dim: int
  full: tuple[int, int]  # B, L
  small: tuple[int, int]
  causal: bool = True
  window_part: float | None = None  # the window, as a part of the length
  documents: str = ''  # '', 'sorted' as packing makes them with padding at the end, or 'scattered': in any order
  anchors: float | None = None  # an anchor mask: the share of tokens that close a segment of _LEAST tokens or more
  full_heads: tuple[int, int] | None = None  # H, K of the full size where a check needs no more than a few

  def shape(self, size: str = 'small') -> tuple[int, int, int, int, int]:
    """B, L, H, K, Dh."""
    batch, length = {'small': self.small, 'medium': (1, min(self.full[1], 2048)), 'full': self.full}[size]
    H, K = self.full_heads if size == 'full' and self.full_heads else (self.heads, self.kv_heads)
    return batch, length, H, K, self.head_dim

  def pairs(self, size: str = 'small') -> int:
    """Query-key pairs of a head that see each other, over the whole batch: what attention must compute at least."""
    batch, length, *_ = self.shape(size)
    mask = self.mask(size)
    if mask.anchors is not None:
      return anchor_pairs(mask.anchors.segments)
    visible = Visible(mask.causal, mask.window, length)
    segment = None if mask.segment_BxL is None else np.asarray(mask.segment_BxL)
    total, at = 0, np.arange(length)
    for b in range(batch):
      for i in range(0, length, 1024):  # a strip at a time: never L x L
        row = slice(i, i + 1024)
        of = () if segment is None else ([segment[b, row, None]], segment[b, None])
        total += int(visible.tile(at[row, None], at[None], *(of or (None, None))).sum())
    return total

  def mask(self, size: str = 'small') -> Mask:
    batch, length, *_ = self.shape(size)
    window = None if self.window_part is None else max(1, int(self.window_part * length))
    segment = self._segments(batch, length)
    if self.anchors is None:
      return Mask(self.causal, window, segment)
    tokens = (np.random.default_rng(length + 1).random((batch, length)) < self.anchors).astype(np.int32)
    anchor, _ = anchors.flags(tokens, Rule((1,), _LEAST), None if segment is None else np.asarray(segment))
    return Mask(anchors=Anchors(jax.jit(anchors.segments)(anchor, segment), length // _LEAST))

  def inputs(self, dtype: str = 'float32', size: str = 'small', seed: int = 0) -> tuple[jax.Array, ...]:
    """Normal q, k, v."""
    B, L, H, K, Dh = self.shape(size)
    keys = jax.random.split(jax.random.key(seed), 3)
    return tuple(jax.random.normal(key, (B, L, n, Dh), dtype) for key, n in zip(keys, (H, K, K)))

  def _segments(self, batch: int, length: int) -> jax.Array | None:
    if not self.documents:
      return None
    rng = np.random.default_rng(length)
    if self.documents == 'scattered':  # 0 among them: rows here and there that see nothing
      return jnp.asarray(rng.integers(0, 4, (batch, length)), jnp.int32)
    ends = np.sort(rng.choice(np.arange(1, length), (batch, 4), replace=False), axis=1)
    segment = 1 + (np.arange(length)[None, :, None] >= ends[:, None, :]).sum(-1)
    segment[segment == 5] = 0
    return jnp.asarray(segment, jnp.int32)


def anchor_pairs(segments: anchors.Segments) -> int:
  """The same of an anchor mask with nothing protected and no padding inside a segment."""
  s = jax.tree.map(np.asarray, segments)
  own = np.where(s.segment_BxL > 0, np.arange(1, s.start_BxL.shape[1] + 1) - s.start_BxL, 0)
  return int(own.sum() + np.maximum(s.stop_BxL - s.first_BxL, 0).sum())


CASES = {case.name: case for case in (
  Case('causal', 4, 4, 64, (8, 2048), (2, 256), full_heads=(16, 16)),
  Case('grouped', 4, 2, 128, (4, 2048), (1, 256), full_heads=(32, 8)),
  Case('multi_query', 3, 1, 64, (8, 2048), (2, 128), full_heads=(16, 1)),
  Case('bidirectional', 2, 2, 64, (8, 2048), (1, 192), causal=False, full_heads=(16, 16)),
  Case('window', 2, 1, 128, (2, 8192), (1, 640), window_part=0.125, full_heads=(32, 8)),
  Case('window_both_ways', 2, 2, 64, (8, 2048), (1, 384), causal=False, window_part=0.1, full_heads=(16, 16)),
  Case('packed', 4, 2, 64, (8, 2048), (2, 384), documents='sorted', full_heads=(16, 4)),
  Case('packed_window', 4, 2, 128, (4, 4096), (2, 300), window_part=0.2, documents='sorted', full_heads=(32, 8)),
  Case('packed_bidirectional', 2, 1, 96, (8, 2048), (2, 200), causal=False, documents='sorted', full_heads=(16, 8)),
  Case('scattered', 2, 1, 64, (8, 1024), (2, 160), documents='scattered', full_heads=(16, 8)),
  Case('ragged', 2, 2, 96, (8, 1000), (2, 77), full_heads=(16, 16)),
  Case('ragged_bidirectional', 2, 1, 64, (8, 1000), (1, 141), causal=False, full_heads=(16, 8)),
  Case('wide_head', 2, 1, 256, (2, 2048), (1, 130), documents='sorted', full_heads=(8, 4)),
  Case('one_token', 2, 1, 64, (8, 1), (2, 1), full_heads=(16, 8)),
  Case('anchors', 4, 2, 64, (1, 8192), (2, 300), anchors=1 / 16, full_heads=(32, 8)),
  Case('anchors_packed', 2, 1, 128, (4, 4096), (2, 384), documents='sorted', anchors=1 / 16, full_heads=(32, 8)),
  Case('long', 2, 1, 128, (1, 16384), (1, 700), full_heads=(32, 8)),
)}
