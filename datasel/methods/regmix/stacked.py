"""Many models as one program: every array of the state has a leading axis over them, `proxy`, split over the devices.

A device steps its proxies `chunk` at a time, so that beside their states only one chunk's activations and gradients
exist.  Proxies share nothing: the step has no collectives.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from datasel import sharding
from datasel.batch import Batch
from datasel.data.store import Store
from datasel.objectives import TokenNLL, domain_sums
from datasel.step import Objective, State, init_state, train_step

AXIS = 'proxy'
# A batch of all proxies has P x B rows, proxy after proxy: they lie where their proxy does.
RULES: sharding.Rules = {**sharding.RULES, 'batch': AXIS}
_SHARED: sharding.Rules = {**sharding.RULES, 'batch': None}  # of a batch that every proxy reads
_BATCH = {'tokens_BxL': jnp.int32, 'targets_BxL': jnp.int32, 'segment_BxL': jnp.int32, 'position_BxL': jnp.int32,
          'loss_mask_BxL': jnp.float32}


def mesh(devices: np.ndarray) -> Mesh:
  """All of a run's devices along the proxy axis."""
  return Mesh(np.asarray(devices).reshape(-1), (AXIS,), axis_types=(AxisType.Auto,))


def abstract_state(init: Callable[[jax.Array], State], proxies: int, mesh: Mesh) -> State:
  """ShapeDtypeStructs of the stacked state, with shardings."""
  split = NamedSharding(mesh, PartitionSpec(AXIS))
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct((proxies, *a.shape), a.dtype, sharding=split),
                      jax.eval_shape(init, jax.random.key(0)))


def abstract_batch(rows: int, length: int, mesh: Mesh) -> Batch:
  """ShapeDtypeStructs of a batch of that many rows over all proxies, with shardings."""
  split = sharding.batch_sharding(mesh, RULES)
  batch = {name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=split) for name, dtype in _BATCH.items()}
  return batch | {'domain_B': jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=split)}


def initial(init_params: Callable[[jax.Array], Any], tx: optax.GradientTransformation) -> Callable[[jax.Array], State]:
  """key -> the state of one proxy before its first update."""
  return lambda key: init_state(init_params(key), tx)


def init(one: Callable[[jax.Array], State], proxies: int, mesh: Mesh) -> Callable[[jax.Array], State]:
  """key -> the stacked state, jitted: every proxy begins at the same parameters."""
  stack = lambda key: jax.tree.map(lambda a: jnp.broadcast_to(a, (proxies, *a.shape)), one(key))
  return jax.jit(stack, out_shardings=NamedSharding(mesh, PartitionSpec(AXIS)))


def step(objective: Objective, tx: optax.GradientTransformation, mesh: Mesh, *, proxies: int, chunk: int,
         microbatches: int) -> Callable[[State, Batch], tuple[State, dict]]:
  """(stacked state, batch of P x B rows) -> (stacked state, metrics, P of each), jitted, the state donated.

  proxies: P.  chunk: proxies of a device that are stepped at the same time.  With 1, each is stepped by the program of
  `train_step` itself: on a CPU to the same bits, but for micro-batches on several (simulated) devices, whose sums XLA
  fuses otherwise when it partitions a program.
  """
  held = proxies // mesh.size

  def one(given):
    state, batch = given  # of one proxy
    return train_step(state, batch, objective=objective, tx=tx, microbatches=microbatches)

  def on_a_device(state, batch):
    batch = {name: x.reshape(held, x.shape[0] // held, *x.shape[1:]) for name, x in batch.items()}
    return jax.vmap(one)((state, batch)) if 1 < held <= chunk else _in_turn(one, chunk, state, batch)

  each = PartitionSpec(AXIS)
  return jax.jit(jax.shard_map(on_a_device, mesh=mesh, in_specs=each, out_specs=each, check_vma=False),
                 donate_argnums=0)


def _in_turn(one: Callable, chunk: int, state: State, batch: Batch) -> tuple[State, dict]:
  """one((state, batch)) of each, `chunk` at a time and then the rest; new states take the places of the old ones."""
  held = state.step.shape[0]
  rest = held % chunk

  def advance(state, first, n):
    part = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, n), (state, batch))
    single = lambda given: jax.tree.map(lambda x: x[None], one(jax.tree.map(lambda x: x[0], given)))
    step = single if n == 1 else jax.vmap(one)
    idle = lambda given: (given[0], jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(step, given)[1]))
    # Always true, which XLA cannot know: so it fuses the step with nothing around it.  Left to itself it reads the old
    # states once more after the new ones are written, for which it copies all of them in every turn.
    new, metrics = jax.lax.cond(part[0].step[0] >= 0, step, idle, part)
    put = lambda whole, x: jax.lax.dynamic_update_slice_in_dim(whole, x, first, 0)
    return jax.tree.map(put, state, new), metrics

  state, metrics = jax.lax.scan(lambda state, n: advance(state, n * chunk, chunk), state, jnp.arange(held // chunk))
  metrics = jax.tree.map(lambda x: x.reshape(-1), metrics)
  if rest:
    state, others = advance(state, held - rest, rest)
    metrics = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), metrics, others)
  return state, metrics


def evaluator(token_nll: TokenNLL, store: Store, mesh: Mesh, *, chunk: int, batch_size: int,
              max_sequences: int) -> Callable[[Any], np.ndarray]:
  """evaluate(stacked params) -> float64 P x M, nats per token: of each proxy what `evaluate.evaluator` gives.

  The same sequences of the validation split in the same batches; each is read once for all proxies.
  """
  sizes_M = store.sizes('validation')
  wanted_M = np.minimum(sizes_M, max_sequences) if max_sequences else sizes_M
  domain_N = np.repeat(np.arange(len(sizes_M), dtype=np.int32), wanted_M)
  record_N = np.concatenate([np.arange(n, dtype=np.int64) * size // n for n, size in zip(wanted_M, sizes_M)])

  def on_a_device(params, batch):
    def one(params):
      return jnp.stack(domain_sums(token_nll(params, batch), batch['loss_mask_BxL'], batch['domain_B'], len(sizes_M)))

    held = jax.tree.leaves(params)[0].shape[0]
    if 1 < held <= chunk:
      return jax.vmap(one)(params)
    return jax.lax.map(one, params, batch_size=chunk if chunk > 1 else None)

  sums = jax.jit(
    jax.shard_map(on_a_device, mesh=mesh, in_specs=(PartitionSpec(AXIS), PartitionSpec()),
                  out_specs=PartitionSpec(AXIS), check_vma=False), out_shardings=sharding.replicated(mesh))

  def evaluate(params):
    total_Px2xM = 0.0
    for start in range(0, len(domain_N), batch_size):
      index_B = np.arange(start, start + batch_size)
      real_B = index_B < len(domain_N)
      index_B = np.where(real_B, index_B, 0)
      batch = store.read('validation', domain_N[index_B], record_N[index_B])
      batch['loss_mask_BxL'] = batch['loss_mask_BxL'] * real_B[:, None].astype(np.float32)
      part_Px2xM = jax.device_get(sums(params, sharding.put(mesh, batch, _SHARED)))
      total_Px2xM = total_Px2xM + part_Px2xM.astype(np.float64)
    return total_Px2xM[:, 0] / total_Px2xM[:, 1]

  return evaluate
