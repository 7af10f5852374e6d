"""Where arrays live: a mesh {data, fsdp, tensor}, one table from logical axis names to mesh axes, nothing else.

Models name the axes of their parameters and activations (`('embed', 'heads', 'head_dim')`); only this table says what a
name means on a machine.  Outside `use(...)` every constraint is the identity, so models run anywhere without a mesh.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from datasel.batch import HOST_KEYS, Batch

MESH_AXES = ('data', 'fsdp', 'tensor')

# Parameters are split over `fsdp` by their width and over `tensor` by heads, feed-forward or vocabulary.
# Activations are split over data and fsdp by the batch; a name missing here is an error, not "replicated".
RULES: Mapping[str, Any] = {
  'layers': None,
  'embed': 'fsdp',
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'head_dim': None,
  'mlp': 'tensor',
  'vocab': 'tensor',
  'norm': None,
  'batch': ('data', 'fsdp'),
  'length': None,
  'residual': None,
}

_ACTIVE: contextvars.ContextVar[tuple[Mesh, Mapping[str, Any]] | None] = contextvars.ContextVar('layout', default=None)


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, *, devices: list | None = None) -> Mesh:
  """A mesh over all devices; one of the sizes may be -1, 'whatever is left'.  The sizes must use every device."""
  devices = jax.devices() if devices is None else devices
  sizes = dict(zip(MESH_AXES, (data, fsdp, tensor)))
  known = math.prod(size for size in sizes.values() if size != -1)
  if list(sizes.values()).count(-1) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise ValueError(f'mesh {sizes}: want positive sizes, at most one of them -1')
  sizes = {axis: len(devices) // known if size == -1 else size for axis, size in sizes.items()}
  if math.prod(sizes.values()) != len(devices):
    raise ValueError(f'mesh {sizes} has {math.prod(sizes.values())} places for {len(devices)} devices; '
                     'set the sizes so that their product is the number of devices, or one of them to -1')
  return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def spec(axes: tuple[str | None, ...], rules: Mapping[str, Any] = RULES) -> PartitionSpec:
  """Logical axis names -> PartitionSpec.  Two axes of one array on the same mesh axis are refused."""
  unknown = [axis for axis in axes if axis is not None and axis not in rules]
  if unknown:
    raise ValueError(f'logical axes {unknown} of {axes} are not in the sharding rules; known: {sorted(rules)}')
  places = [None if axis is None else rules[axis] for axis in axes]
  used = [name for place in places if place for name in ((place,) if isinstance(place, str) else place)]
  if len(used) != len(set(used)):
    raise ValueError(f'axes {axes} collide: {places} uses a mesh axis twice; change the sharding rules')
  return PartitionSpec(*places)


def tree_shardings(mesh: Mesh, abstract: Any, axes: Any, rules: Mapping[str, Any] = RULES) -> Any:
  """NamedShardings for a tree of arrays (or ShapeDtypeStructs), given the same tree of logical axis names."""

  def one(path, array, names):
    if len(names) != array.ndim:
      raise ValueError(f'parameter {jax.tree_util.keystr(path)}: {array.ndim} axes, named {names}')
    sharding = NamedSharding(mesh, spec(names, rules))
    try:
      sharding.shard_shape(array.shape)
    except ValueError as e:
      raise ValueError(f'parameter {jax.tree_util.keystr(path)} of shape {array.shape} cannot be split as {names} over '
                       f'mesh {dict(mesh.shape)}: {e}; choose mesh sizes that divide it') from e
    return sharding

  return jax.tree_util.tree_map_with_path(one, abstract, axes)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, rules: Mapping[str, Any] = RULES) -> NamedSharding:
  """Rows over the data axes; every array of a batch has its rows first."""
  return NamedSharding(mesh, spec(('batch',), rules))


def put(mesh: Mesh, batch: Batch) -> Batch:
  """This process's rows of a global batch -> global device arrays; what belongs to the host stays behind."""
  rows = batch_sharding(mesh)
  return {name: jax.make_array_from_process_local_data(rows, x) for name, x in batch.items() if name not in HOST_KEYS}


def optimizer_shardings(mesh: Mesh, tx: optax.GradientTransformation, params: Any, param_shardings: Any) -> Any:
  """Optimiser state lies where its parameter lies; what has another shape (counts, factored moments) is replicated."""
  return optax.tree_map_params(
    tx,
    lambda leaf, param, sharding: sharding if leaf.shape == param.shape else replicated(mesh),
    jax.eval_shape(tx.init, params), params, param_shardings,
    transform_non_params=lambda _: replicated(mesh))


@contextlib.contextmanager
def use(mesh: Mesh, rules: Mapping[str, Any] = RULES) -> Iterator[None]:
  """Inside, `constrain` acts on `mesh` by `rules`.  Trace (call the jitted function first) inside it."""
  token = _ACTIVE.set((mesh, rules))
  try:
    yield
  finally:
    _ACTIVE.reset(token)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Pins an activation's layout by its logical axis names; the identity outside `use`."""
  active = _ACTIVE.get()
  if active is None:
    return x
  mesh, rules = active
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes, rules)))
