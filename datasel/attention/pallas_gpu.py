"""The passes of flash attention as Pallas kernels for GPUs, through Triton.

One program owns a tile and loops over the other side's tiles, read where they lie in B x L x H x Dh.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from datasel.attention.tiles import VECTORS, Pass
from datasel.attention.visible import Marks, Visible, Walk, cut_keys, pad_keys, pad_to


def _blocks(which: Pass, head_dim: int, dtype: jnp.dtype) -> tuple[int, int, int]:
  """Rows of an owned tile, rows of a walked one, warps: what fits the registers of an SM."""
  small = dtype == jnp.float32 or head_dim > 128
  if len(which.queries) + len(which.keys) > 8:  # the backward's tangent holds twice the tiles
    return (32, 32, 4) if small else (64, 32, 4)
  if small:
    return (32, 32, 4) if head_dim > 128 else (64, 32, 4)
  return (128, 64, 8) if which.owner == 'queries' else (64, 64, 4)


def run(which: Pass, visible: Visible, operands: dict[str, jax.Array], marks: Marks | None, *,
        interpret: bool) -> list[jax.Array]:
  """One pass: its outputs.  operands: queries B x L x H x Dh, keys B x T x K x Dh (T = L without an anchor mask), and
  vectors B x H x L; each output is shaped like one of them."""
  B, L, H, Dh = operands['q'].shape
  K = operands['k'].shape[2]
  G = H // K
  width = max(16, pl.next_power_of_2(Dh))  # Triton's tiles have powers of two
  owned, walked, warps = _blocks(which, width, operands['q'].dtype)
  largest = max(owned, walked)
  slots = visible.slots
  visible = visible.aligned(largest)
  length = L + -L % largest
  padded = {'queries': length, 'keys': (visible.slots or 0) + length}

  def prepare(name):
    x = operands[name]
    if name in VECTORS:
      return pad_to(x, 2, largest)
    return pad_to(pad_keys(x, 1, largest, slots) if name in which.keys else pad_to(x, 1, largest), 3, width)

  names = {'queries': which.queries, 'keys': which.keys}
  walks = visible.walk(which.owner, owned, walked, marks)
  marked = () if marks is None else (pad_to(marks.queries, 2, largest), pad_keys(marks.keys, 1, largest, slots))

  # A program of the key side serves one key head and walks over the tiles of its G query heads.
  heads, turns = (H, 1) if which.owner == 'queries' else (K, G)

  def spec(name, side):
    if side == which.owner:
      if name in VECTORS:
        return pl.BlockSpec((None, None, owned), lambda b, h, i: (b, h, i))
      return pl.BlockSpec((None, owned, None, width), lambda b, h, i: (b, i, h, 0))
    if side == 'keys':
      return pl.BlockSpec((None, padded['keys'], None, width), lambda b, h, i: (b, 0, h // G, 0))
    if name in VECTORS:
      return pl.BlockSpec((None, G, padded['queries']), lambda b, h, i: (b, h, 0))
    return pl.BlockSpec((None, padded['queries'], G, width), lambda b, h, i: (b, 0, h, 0))

  n_own, n_other = len(names[which.owner]), len(names[which.walked])
  n_walks = sum(x is not None for x in walks)

  def kernel(*refs):
    walk_refs, mark_refs, refs = refs[:n_walks], refs[n_walks:n_walks + len(marked)], refs[n_walks + len(marked):]
    own_refs, other_refs, out_refs = refs[:n_own], refs[n_own:n_own + n_other], refs[n_own + n_other:]
    i = pl.program_id(2)
    own = {name: ref[...] for name, ref in zip(names[which.owner], own_refs)}
    own = {name: x[:, None] if name in VECTORS else x for name, x in own.items()}
    walk = Walk(*(ref[i] for ref in walk_refs), *(None,) * (4 - n_walks))

    def at(side, n, size):
      """The positions of a tile, and its marks: Q x 1, or 1 x C."""
      rows = pl.ds(n * size, size)
      positions = n * size + jnp.arange(size, dtype=jnp.int32)
      if side == 'keys':
        return positions[None, :], *(ref[rows][None, :] for ref in mark_refs[1:])
      return positions[:, None], *([ref[row, rows][:, None] for row in range(marks.queries.shape[1])]
                                   for ref in mark_refs[:1])

    mine = at(which.owner, i, owned)

    def read(ref, name, m, g):
      rows = pl.ds(m * walked, walked)
      if name in VECTORS:
        return ref[g, rows][:, None]
      return ref[rows, :] if which.walked == 'keys' else ref[rows, g, :]

    def seen(m):
      other = at(which.walked, m, walked)
      queries, keys = (mine, other) if which.owner == 'queries' else (other, mine)
      both = [x for pair in zip(queries, keys) for x in pair]
      if visible.slots is None:
        return visible.tile(*both)
      of_slots = m * walked < visible.slots if which.owner == 'queries' else i * owned < visible.slots
      return visible.anchor_tile(*both, of_slots)

    def turn(g, carry):
      def body(s, carry):
        m = walk.tile(s)
        other = {name: read(ref, name, m, g) for name, ref in zip(names[which.walked], other_refs)}
        q, k = (own, other) if which.owner == 'queries' else (other, own)
        return which.step(carry, q, k, seen(m), Dh**-0.5)
      return lax.fori_loop(0, walk.count, body, carry)

    carry = which.start(owned, width)
    carry = turn(0, carry) if turns == 1 else lax.fori_loop(0, turns, turn, carry)
    for ref, x, (_, like) in zip(out_refs, which.finish(carry, own), which.outputs):
      ref[...] = x[:, 0] if like == 'lse' else x.astype(ref.dtype)

  inputs = [prepare(n) for n in names[which.owner]] + [prepare(n) for n in names[which.walked]]
  shape = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(operands['q']).manual_axis_type)
  shapes = [shape((B, H, length), jnp.float32) if like == 'lse' else
            shape((B, padded[which.owner], operands[like].shape[2], width), operands[like].dtype)
            for _, like in which.outputs]
  rows, n_owned = walks.first.shape
  by_row = pl.BlockSpec((None, n_owned), lambda b, h, i: (b if rows > 1 else 0, 0))
  whole_row = lambda x: pl.BlockSpec((None, *x.shape[1:]), lambda b, h, i: (b, *(0,) * (x.ndim - 1)))
  results = pl.pallas_call(
    kernel, grid=(B, heads, n_owned), interpret=interpret, out_shape=shapes,
    in_specs=[by_row] * n_walks + [whole_row(x) for x in marked]
    + [spec(n, which.owner) for n in names[which.owner]] + [spec(n, which.walked) for n in names[which.walked]],
    out_specs=[spec(like, which.owner) for _, like in which.outputs],
    # Without these parameters a kernel is lowered through Mosaic GPU, which would stage whole blocks in shared memory.
    compiler_params=triton.CompilerParams(num_warps=warps, num_stages=2),
    cost_estimate=which.cost(visible, operands),
    name=f'flash_{"_".join(name for name, _ in which.outputs)}')(*walks[:n_walks], *marked, *inputs)
  cut = lambda x: cut_keys(x, 1, largest, slots, L) if which.owner == 'keys' else x[:, :L]
  return [x[:, :, :L] if like == 'lse' else cut(x)[..., :Dh] for x, (_, like) in zip(results, which.outputs)]
