"""The passes of flash attention as Pallas kernels for TPUs, through Mosaic.

The last grid axis walks over the other side's tiles, in order; the sums live in VMEM scratch between its steps.  The
range of tiles worth meeting is prefetched, so that a tile nobody sees is neither fetched nor computed.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from datasel.attention.tiles import VECTORS, Pass, Visible, pad_to

_LANES = 128


def _block(which: Pass, head_dim: int, dtype: jnp.dtype, length: int) -> int:
  """Rows of a tile: the most whose tiles, twice for prefetching, and score matrices fit 16 MiB of VMEM."""
  second_order = len(which.queries) + len(which.keys) > 8
  block = 512 if dtype == jnp.bfloat16 and head_dim <= 128 else 256
  return min(block // 2 if second_order else block, length + -length % _LANES)


def run(which: Pass, visible: Visible, operands: dict[str, jax.Array], segment_BxL: jax.Array | None, *,
        interpret: bool) -> list[jax.Array]:
  """One pass.  operands: B x L x (H or K) x Dh, or B x H x L for the vectors; gives its outputs, shaped alike."""
  B, L, H, Dh = operands['q'].shape
  K = operands['k'].shape[2]
  G = H // K
  block = _block(which, Dh, operands['q'].dtype, L)
  padded = L + -L % block
  tiles = padded // block
  first, end = visible.ranges(which.owner, block, block, segment_BxL)
  steps = visible.max_steps(block, block)
  heads, turns = (H, 1) if which.owner == 'queries' else (K, G)

  def prepare(name):
    """B x heads x L x Dh, and one row of lanes for each tile of a vector."""
    x = operands[name]
    if name in VECTORS:
      return pad_to(x, 2, block).reshape(B, H, tiles, 1, block)
    return pad_to(x.transpose(0, 2, 1, 3), 2, block)

  def at(b, i):
    """Where a tile's range is in the prefetched vectors: flat, for a matrix's rows would each fill a line of SMEM."""
    return i if first.shape[0] == 1 else b * tiles + i

  def met(b, i, s, first_ref, end_ref):
    """The tile of step s; past the end it stays on the last one, which costs no fetch."""
    return jnp.clip(first_ref[at(b, i)] + s % steps, 0, jnp.maximum(end_ref[at(b, i)] - 1, 0))

  def index(side, vector):
    def block_of(b, h, i, s, first_ref, end_ref):
      tile = i if side == which.owner else met(b, i, s, first_ref, end_ref)
      if side == which.owner:
        head = h
      else:
        head = h // G if side == 'keys' else h * G + s // steps
      return (b, head, tile, 0, 0) if vector else (b, head, tile, 0)
    return block_of

  def spec(name, side):
    if name in VECTORS:
      return pl.BlockSpec((None, None, None, 1, block), index(side, True))
    return pl.BlockSpec((None, None, block, Dh), index(side, False))

  def segment_spec(side):
    def block_of(b, h, i, s, first_ref, end_ref):
      return (b, i if side == which.owner else met(b, i, s, first_ref, end_ref), 0, 0)
    return pl.BlockSpec((None, None, 1, block), block_of)

  segments = ()
  if segment_BxL is not None:
    segments = (pad_to(segment_BxL, 1, block).reshape(B, tiles, 1, block),) * 2
  n_queries, n_keys, n_out = len(which.queries), len(which.keys), len(which.outputs)

  def kernel(first_ref, end_ref, *refs):
    segment_refs, refs = refs[:len(segments)], refs[len(segments):]
    q_refs, k_refs, refs = refs[:n_queries], refs[n_queries:n_queries + n_keys], refs[n_queries + n_keys:]
    out_refs, sums = refs[:n_out], refs[n_out:]
    b, i, s = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    def column(x):
      return x.reshape(1, block).T

    def read(names, refs):
      return {name: column(ref[...]) if name in VECTORS else ref[...] for name, ref in zip(names, refs)}

    @pl.when(s == 0)
    def _():
      for ref, x in zip(sums, which.start(block, Dh)):
        ref[...] = x

    m = first_ref[at(b, i)] + s % steps

    @pl.when(m < end_ref[at(b, i)])
    def _():
      n, c = (i, m) if which.owner == 'queries' else (m, i)
      along = lambda axis: jax.lax.broadcasted_iota(jnp.int32, (block, 1) if axis == 0 else (1, block), axis)
      mine = (column(segment_refs[0][...]), segment_refs[1][...]) if segments else (None, None)
      seen = visible.tile(n * block + along(0), c * block + along(1), *mine)
      carry = which.step(tuple(ref[...] for ref in sums), read(which.queries, q_refs), read(which.keys, k_refs), seen,
                         Dh**-0.5)
      for ref, x in zip(sums, carry):
        ref[...] = x

    @pl.when(s == turns * steps - 1)
    def _():
      own = read(which.queries, q_refs) if which.owner == 'queries' else {}
      for ref, x, (_, like) in zip(out_refs, which.finish(tuple(ref[...] for ref in sums), own), which.outputs):
        ref[...] = x.T if like == 'lse' else x.astype(ref.dtype)

  shape = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(operands['q']).manual_axis_type)
  shapes = [shape((B, H, tiles, 1, block), jnp.float32) if like == 'lse' else
            shape((B, operands[like].shape[2], padded, Dh), operands[like].dtype)
            for _, like in which.outputs]
  results = pl.pallas_call(
    kernel, interpret=interpret, out_shape=shapes,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2, grid=(B, heads, tiles, turns * steps),
      in_specs=[segment_spec('queries'), segment_spec('keys')][:len(segments)]
      + [spec(n, 'queries') for n in which.queries] + [spec(n, 'keys') for n in which.keys],
      out_specs=[spec(like, which.owner) for _, like in which.outputs],
      scratch_shapes=[pltpu.VMEM(x.shape, x.dtype)
                      for x in jax.eval_shape(functools.partial(which.start, block, Dh))]),
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel', 'parallel', 'arbitrary')),
    cost_estimate=which.cost(visible, operands),
    name=f'flash_{"_".join(name for name, _ in which.outputs)}')(
      first.reshape(-1), end.reshape(-1), *segments, *map(prepare, which.queries), *map(prepare, which.keys))
  return [x.reshape(B, H, padded)[:, :, :L] if like == 'lse' else x[:, :, :L].transpose(0, 2, 1, 3)
          for x, (_, like) in zip(results, which.outputs)]
