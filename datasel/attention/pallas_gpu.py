"""The passes of flash attention as Pallas kernels for GPUs, through Triton.

One program owns a tile and loops over the other side's tiles, read where they lie in B x L x H x Dh.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from datasel.attention.tiles import VECTORS, Pass, Visible, pad_to


def _blocks(which: Pass, head_dim: int, dtype: jnp.dtype) -> tuple[int, int, int]:
  """Rows of an owned tile, rows of a walked one, warps: what fits the registers of an SM."""
  small = dtype == jnp.float32 or head_dim > 128
  if len(which.queries) + len(which.keys) > 8:  # the backward's tangent holds twice the tiles
    return (32, 32, 4) if small else (64, 32, 4)
  if small:
    return (32, 32, 4) if head_dim > 128 else (64, 32, 4)
  return (128, 64, 8) if which.owner == 'queries' else (64, 64, 4)


def run(which: Pass, visible: Visible, operands: dict[str, jax.Array], segment_BxL: jax.Array | None, *,
        interpret: bool) -> list[jax.Array]:
  """One pass.  operands: B x L x (H or K) x Dh, or B x H x L for the vectors; gives its outputs, shaped alike."""
  B, L, H, Dh = operands['q'].shape
  K = operands['k'].shape[2]
  G = H // K
  width = max(16, pl.next_power_of_2(Dh))  # Triton's tiles have powers of two
  owned, walked, warps = _blocks(which, width, operands['q'].dtype)
  padded = L + -L % max(owned, walked)

  def prepare(name):
    x = operands[name]
    return pad_to(x, 2, padded) if name in VECTORS else pad_to(pad_to(x, 1, padded), 3, width)

  names = {'queries': which.queries, 'keys': which.keys}
  first, end = visible.ranges(which.owner, owned, walked, segment_BxL)
  segment = () if segment_BxL is None else (pad_to(segment_BxL, 1, padded),)

  # A program of the key side serves one key head and walks over the tiles of its G query heads.
  heads, turns = (H, 1) if which.owner == 'queries' else (K, G)

  def spec(name, side):
    if side == which.owner:
      if name in VECTORS:
        return pl.BlockSpec((None, None, owned), lambda b, h, i: (b, h, i))
      return pl.BlockSpec((None, owned, None, width), lambda b, h, i: (b, i, h, 0))
    if side == 'keys':
      return pl.BlockSpec((None, padded, None, width), lambda b, h, i: (b, 0, h // G, 0))
    if name in VECTORS:
      return pl.BlockSpec((None, G, padded), lambda b, h, i: (b, h, 0))
    return pl.BlockSpec((None, padded, G, width), lambda b, h, i: (b, 0, h, 0))

  n_own, n_other = len(names[which.owner]), len(names[which.walked])

  def kernel(first_ref, end_ref, *refs):
    refs, segment_ref = (refs[1:], refs[0]) if segment else (refs, None)
    own_refs, other_refs, out_refs = refs[:n_own], refs[n_own:n_own + n_other], refs[n_own + n_other:]
    i = pl.program_id(2)
    own = {name: ref[...] for name, ref in zip(names[which.owner], own_refs)}
    own = {name: x[:, None] if name in VECTORS else x for name, x in own.items()}
    positions = {which.owner: i * owned + jnp.arange(owned, dtype=jnp.int32)}

    def read(ref, name, m, g):
      rows = pl.ds(m * walked, walked)
      if name in VECTORS:
        return ref[g, rows][:, None]
      return ref[rows, :] if which.walked == 'keys' else ref[rows, g, :]

    def seen(m):
      at_walked = m * walked + jnp.arange(walked, dtype=jnp.int32)
      i_Q, j_C = ((positions[which.owner], at_walked) if which.owner == 'queries'
                  else (at_walked, positions[which.owner]))
      if segment_ref is None:
        return visible.tile(i_Q[:, None], j_C[None, :], None, None)
      mine, other = segment_ref[pl.ds(i * owned, owned)], segment_ref[pl.ds(m * walked, walked)]
      segment_Q, segment_C = (mine, other) if which.owner == 'queries' else (other, mine)
      return visible.tile(i_Q[:, None], j_C[None, :], segment_Q[:, None], segment_C[None, :])

    def turn(g, carry):
      def body(m, carry):
        other = {name: read(ref, name, m, g) for name, ref in zip(names[which.walked], other_refs)}
        q, k = (own, other) if which.owner == 'queries' else (other, own)
        return which.step(carry, q, k, seen(m), Dh**-0.5)
      return lax.fori_loop(first_ref[i], end_ref[i], body, carry)

    carry = which.start(owned, width)
    carry = turn(0, carry) if turns == 1 else lax.fori_loop(0, turns, turn, carry)
    for ref, x, (_, like) in zip(out_refs, which.finish(carry, own), which.outputs):
      ref[...] = x[:, 0] if like == 'lse' else x.astype(ref.dtype)

  inputs = [prepare(n) for n in names[which.owner]] + [prepare(n) for n in names[which.walked]]
  shape = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(operands['q']).manual_axis_type)
  shapes = [shape((B, H, padded), jnp.float32) if like == 'lse' else
            shape((B, padded, operands[like].shape[2], width), operands[like].dtype)
            for _, like in which.outputs]
  by_row = pl.BlockSpec((None, first.shape[1]), lambda b, h, i: (b if first.shape[0] > 1 else 0, 0))
  results = pl.pallas_call(
    kernel, grid=(B, heads, first.shape[1]), interpret=interpret, out_shape=shapes,
    in_specs=[by_row, by_row] + [pl.BlockSpec((None, padded), lambda b, h, i: (b, 0))] * len(segment)
    + [spec(n, which.owner) for n in names[which.owner]] + [spec(n, which.walked) for n in names[which.walked]],
    out_specs=[spec(like, which.owner) for _, like in which.outputs],
    # Without these parameters a kernel is lowered through Mosaic GPU, which would stage whole blocks in shared memory.
    compiler_params=triton.CompilerParams(num_warps=warps, num_stages=2),
    cost_estimate=which.cost(visible, operands),
    name=f'flash_{"_".join(name for name, _ in which.outputs)}')(first, end, *segment, *inputs)
  return [x[:, :, :L] if like == 'lse' else x[:, :L, :, :Dh] for x, (_, like) in zip(results, which.outputs)]
