"""The passes of flash attention as Pallas kernels for TPUs, through Mosaic.

The last grid axis walks over the other side's tiles, in order; the sums live in VMEM scratch between its steps.  The
tiles worth meeting are prefetched, so that a tile nobody sees is neither fetched nor computed.  Under an anchor mask
they are so few that empty steps would cost more: there the axis is as long as the longest walk, found at run time.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from datasel.attention.tiles import VECTORS, Pass
from datasel.attention.visible import Marks, Visible, Walk, cut_keys, pad_keys, pad_to

_LANES = 128


def _block(which: Pass, head_dim: int, dtype: jnp.dtype, length: int) -> int:
  """Rows of a tile: the most whose tiles, twice for prefetching, and score matrices fit 16 MiB of VMEM."""
  second_order = len(which.queries) + len(which.keys) > 8
  block = 512 if dtype == jnp.bfloat16 and head_dim <= 128 else 256
  return min(block // 2 if second_order else block, length + -length % _LANES)


def run(which: Pass, visible: Visible, operands: dict[str, jax.Array], marks: Marks | None, *,
        interpret: bool) -> list[jax.Array]:
  """One pass: its outputs.  operands: queries B x L x H x Dh, keys B x T x K x Dh (T = L without an anchor mask), and
  vectors B x H x L; each output is shaped like one of them."""
  B, L, H, Dh = operands['q'].shape
  K = operands['k'].shape[2]
  G = H // K
  block = _block(which, Dh, operands['q'].dtype, L)
  slots = visible.slots
  visible = visible.aligned(block)
  tiles = {'queries': -(-L // block), 'keys': -(-L // block) + (visible.slots or 0) // block}
  heads, turns = (H, 1) if which.owner == 'queries' else (K, G)

  def prepare(name):
    """B x heads x (L or T) x Dh, and one row of lanes for each tile of a vector."""
    x = operands[name]
    if name in VECTORS:
      return pad_to(x, 2, block).reshape(B, H, tiles['queries'], 1, block)
    x = x.transpose(0, 2, 1, 3)
    return pad_keys(x, 2, block, slots) if name in which.keys else pad_to(x, 2, block)

  inputs = [prepare(name) for name in (*which.queries, *which.keys)]
  marked = ()
  if marks is not None:  # B x tiles x M x block, and B x tiles x 1 x block
    marked = (pad_to(marks.queries, 2, block).reshape(B, -1, tiles['queries'], block).swapaxes(1, 2),
              pad_keys(marks.keys, 1, block, slots).reshape(B, tiles['keys'], 1, block))
  walks = Walk(*(x for x in visible.walk(which.owner, block, block, marks)))

  def part(begin, n_owned):
    """The outputs of n_owned of the owned tiles."""
    own_walks = [x[:, begin:begin + n_owned] for x in walks if x is not None]
    rows, steps, n_used = own_walks[0].shape[0], visible.max_steps(block, block), n_owned
    if visible.slots is not None:
      steps = jnp.maximum(jnp.max(own_walks[1]), 1)
      if which.owner == 'keys':  # slots that no row fills
        n_used = jnp.max(jnp.where(own_walks[1] > 0, jnp.arange(1, n_owned + 1, dtype=jnp.int32), 1))
    prefetched = [x.reshape(-1) for x in own_walks] + [jnp.reshape(steps, 1).astype(jnp.int32)]

    def walk_of(b, i, refs):
      # Flat, for a matrix's rows would each fill a line of SMEM.
      at = i if rows == 1 else b * n_owned + i
      return Walk(*(ref[at] for ref in refs[:-1]), *(None,) * (5 - len(refs)))

    def turn_and_step(s, refs):
      length = steps if isinstance(steps, int) else refs[-1][0]
      return (s // length, s % length) if turns > 1 else (0, s)

    def met(b, i, s, refs):
      """The tile of step s; past the end it stays on the last one, which costs no fetch."""
      walk, (_, step) = walk_of(b, i, refs), turn_and_step(s, refs)
      return jnp.clip(walk.tile(jnp.clip(step, 0, jnp.maximum(walk.count - 1, 0))), 0, tiles[which.walked] - 1)

    def spec(name, side):
      vector = name in VECTORS

      def block_of(b, h, i, s, *refs):
        if side == which.owner:
          head, tile = h, i + begin
        else:
          head, tile = h // G if side == 'keys' else h * G + turn_and_step(s, refs)[0], met(b, i, s, refs)
        return (b, head, tile, 0, 0) if vector else (b, head, tile, 0)

      return pl.BlockSpec((None, None, None, 1, block) if vector else (None, None, block, Dh), block_of)

    def mark_spec(x, side):
      return pl.BlockSpec((None, None, x.shape[2], block), lambda b, h, i, s, *refs: (
        b, i + begin if side == which.owner else met(b, i, s, refs), 0, 0))

    def out_spec(like):
      if like == 'lse':
        return pl.BlockSpec((None, None, None, 1, block), lambda b, h, i, s, *refs: (b, h, i, 0, 0))
      return pl.BlockSpec((None, None, block, Dh), lambda b, h, i, s, *refs: (b, h, i, 0))

    n_queries, n_keys, n_out = len(which.queries), len(which.keys), len(which.outputs)

    def kernel(*refs):
      walk_refs, refs = refs[:len(prefetched)], refs[len(prefetched):]
      mark_refs, refs = refs[:len(marked)], refs[len(marked):]
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

      walk, (_, step) = walk_of(b, i, walk_refs), turn_and_step(s, walk_refs)

      @pl.when(step < walk.count)
      def _():
        own, m = i + begin, walk.tile(step)
        n, c = (own, m) if which.owner == 'queries' else (m, own)
        along = lambda axis: jax.lax.broadcasted_iota(jnp.int32, (block, 1) if axis == 0 else (1, block), axis)
        at = [n * block + along(0), c * block + along(1)]
        if marked:
          at += [[column(mark_refs[0][row]) for row in range(marked[0].shape[2])], mark_refs[1][...]]
        seen = visible.tile(*at) if visible.slots is None else visible.anchor_tile(*at, c * block < visible.slots)
        carry = which.step(tuple(ref[...] for ref in sums), read(which.queries, q_refs), read(which.keys, k_refs), seen,
                           Dh**-0.5)
        for ref, x in zip(sums, carry):
          ref[...] = x

      @pl.when(s == pl.num_programs(3) - 1)
      def _():
        own = read(which.queries, q_refs) if which.owner == 'queries' else {}
        for ref, x, (_, like) in zip(out_refs, which.finish(tuple(ref[...] for ref in sums), own), which.outputs):
          ref[...] = x.T if like == 'lse' else x.astype(ref.dtype)

    shape = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(operands['q']).manual_axis_type)
    shapes = [shape((B, H, n_owned, 1, block), jnp.float32) if like == 'lse' else
              shape((B, operands[like].shape[2], n_owned * block, Dh), operands[like].dtype)
              for _, like in which.outputs]
    results = pl.pallas_call(
      kernel, interpret=interpret, out_shape=shapes,
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(prefetched), grid=(B, heads, n_used, turns * steps),
        in_specs=[mark_spec(x, side) for x, side in zip(marked, ('queries', 'keys'))]
        + [spec(n, 'queries') for n in which.queries] + [spec(n, 'keys') for n in which.keys],
        out_specs=[out_spec(like) for _, like in which.outputs],
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype)
                        for x in jax.eval_shape(functools.partial(which.start, block, Dh))]),
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel', 'parallel', 'arbitrary')),
      cost_estimate=which.cost(visible, operands),
      name=f'flash_{"_".join(name for name, _ in which.outputs)}')(*prefetched, *marked, *inputs)
    if n_used is n_owned:
      return results
    used = jnp.arange(n_owned * block, dtype=jnp.int32) < n_used * block
    return [jnp.where(used[:, None], x, 0) for x in results]  # beyond them nothing was written

  if which.owner == 'queries' or visible.slots is None:
    results = part(0, tiles[which.owner])
  else:  # apart, for most slots are seen by many queries, and most positions by few
    of_slots = visible.slots // block
    results = [jnp.concatenate(pair, axis=2) for pair in zip(part(0, of_slots), part(of_slots, tiles['queries']))]
  cut = lambda x: cut_keys(x, 2, block, slots, L) if which.owner == 'keys' else x[:, :, :L]
  return [x.reshape(B, H, -1)[:, :, :L] if like == 'lse' else cut(x).transpose(0, 2, 1, 3)
          for x, (_, like) in zip(results, which.outputs)]
