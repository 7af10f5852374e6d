"""Where arrays live: a mesh {data, fsdp, tensor}, one table from logical axis names to mesh axes, nothing else.

Models name the axes of their parameters and activations (`('embed', 'heads', 'head_dim')`); only this table says what a
name means on a machine.  Outside `use(...)` every constraint is the identity, so models run anywhere without a mesh.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import optax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from datasel.batch import HOST_KEYS, Batch

MESH_AXES = ('data', 'fsdp', 'tensor')

Rules = Mapping[str, str | tuple[str, ...] | None]

# Parameters are split over `fsdp` by their width and over `tensor` by heads, feed-forward or vocabulary.
# Activations are split over data and fsdp by the batch; a name missing here is an error, not "replicated".
RULES: Rules = {
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

# The layouts of activations that models ask for: what a table of rules must be able to give.
_ACTIVATIONS = (('batch', 'length', 'residual'), ('batch', 'length', 'heads', 'head_dim'),
                ('batch', 'length', 'kv_heads', 'head_dim'), ('batch', 'length', 'vocab'))

_ACTIVE: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar('layout', default=None)


def rules_from(table: Mapping[str, str]) -> Rules:
  """A table as a config holds it, {'batch': 'data,fsdp', 'embed': 'fsdp', 'norm': '', ...}, checked.

  Raises ValueError for names that are missing or unknown, and for rules that put one mesh axis twice on an array.
  """
  missing, unknown = sorted(RULES.keys() - table.keys()), sorted(table.keys() - RULES.keys())
  if missing or unknown:
    raise ValueError(f'sharding rules: {f"no rule for {missing}" if missing else f"{unknown} are no logical axes"}; '
                     f'want exactly {sorted(RULES)}')
  rules = {}
  for name, places in table.items():
    axes = tuple(axis.strip() for axis in places.split(',') if axis.strip())
    if not set(axes) <= set(MESH_AXES):
      raise ValueError(f'sharding rule {name} is {places!r}: want mesh axes out of {MESH_AXES}, joined by commas, or '
                       'nothing for an axis that is not split')
    rules[name] = _place(axes)
  for axes in _ACTIVATIONS:
    spec(axes, rules)
  return rules


def rules_table(rules: Rules = RULES) -> dict[str, str]:
  """The inverse of `rules_from`."""
  return {name: ','.join(_axes(place)) for name, place in rules.items()}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, *, devices: list | None = None) -> Mesh:
  """A mesh over all devices; one of the sizes may be -1, 'whatever is left'.  The sizes must use every device."""
  devices = jax.devices() if devices is None else devices
  sizes = dict(zip(MESH_AXES, (data, fsdp, tensor)))
  known = math.prod(size for size in sizes.values() if size != -1)
  if list(sizes.values()).count(-1) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise ValueError(f'mesh {sizes}: want positive sizes, at most one of them -1')
  if -1 in sizes.values() and len(devices) % known:
    given = ', '.join(f'{axis}={size}' for axis, size in sizes.items() if size not in (1, -1))
    raise ValueError(f'mesh: {given} does not divide the {len(devices)} devices; set the sizes so that their product '
                     'is the number of devices, or divides it where one of them is -1')
  sizes = {axis: len(devices) // known if size == -1 else size for axis, size in sizes.items()}
  if math.prod(sizes.values()) != len(devices):
    raise ValueError(f'mesh {sizes} has {math.prod(sizes.values())} places for {len(devices)} devices; '
                     'set the sizes so that their product is the number of devices, or one of them to -1')
  shape, types = tuple(sizes.values()), (AxisType.Auto,) * 3
  try:
    return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)
  except NotImplementedError:
    pass  # these sizes are no products of whole sides of the slice
  try:
    places = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(places, MESH_AXES, axis_types=types)
  except NotImplementedError as e:
    raise ValueError(f'mesh {sizes} cannot be laid out over {len(devices)} x {devices[0].device_kind}: {e}') from e


def spec(axes: tuple[str | None, ...], rules: Rules = RULES) -> PartitionSpec:
  """Logical axis names -> PartitionSpec.  Two axes of one array on the same mesh axis are refused."""
  unknown = [axis for axis in axes if axis is not None and axis not in rules]
  if unknown:
    raise ValueError(f'logical axes {unknown} of {axes} are not in the sharding rules; known: {sorted(rules)}')
  places = [None if axis is None else rules[axis] for axis in axes]
  used = [name for place in places for name in _axes(place)]
  if len(used) != len(set(used)):
    raise ValueError(f'axes {axes} collide: {places} uses a mesh axis twice; change the sharding rules')
  return PartitionSpec(*places)


def _axes(place: str | tuple[str, ...] | None) -> tuple[str, ...]:
  return (place,) if isinstance(place, str) else tuple(place or ())


def _place(axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
  """The inverse of `_axes`, in the form of `RULES`."""
  return axes if len(axes) > 1 else axes[0] if axes else None


def tree_shardings(mesh: Mesh, abstract: Any, axes: Any, rules: Rules = RULES) -> Any:
  """NamedShardings for a tree of arrays (or ShapeDtypeStructs), given the same tree of logical axis names."""

  def one(path, array, names):
    if len(names) != array.ndim:
      raise ValueError(f'parameter {jax.tree_util.keystr(path)}: {array.ndim} axes, named {names}')
    sharding = NamedSharding(mesh, spec(names, rules))
    for name, size in zip(names, array.shape):
      places = {axis: mesh.shape[axis] for axis in _axes(rules[name] if name else None)}
      if size % math.prod(places.values()):
        raise ValueError(
          f'parameter {jax.tree_util.keystr(path, simple=True, separator=".")}: its axis {name} of {size} cannot be '
          f'split over {", ".join(f"mesh.{axis}={n}" for axis, n in places.items())}; choose mesh sizes that divide '
          f'it, or leave the axis whole on every device: --config.sharding.{name}=')
    return sharding

  return jax.tree_util.tree_map_with_path(one, abstract, axes)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, rules: Rules = RULES) -> NamedSharding:
  """Rows over the data axes; every array of a batch has its rows first."""
  return NamedSharding(mesh, spec(('batch',), rules))


def batch_shards(mesh: Mesh, rules: Rules = RULES) -> int:
  """How many parts a batch is split into, each of which several devices (`tensor`) may hold."""
  return math.prod(mesh.shape[axis] for axis in _axes(rules['batch']))


def put(mesh: Mesh, batch: Batch, rules: Rules = RULES) -> Batch:
  """This process's rows of a global batch -> global device arrays; what belongs to the host stays behind.

  The rows are those of `data.sampler.process_rows`, in that order.
  """
  rows, shards = batch_sharding(mesh, rules), batch_shards(mesh, rules)
  held = len(set(map(str, rows.addressable_devices_indices_map((shards,)).values())))
  shape = lambda x: (x.shape[0] * shards // held, *x.shape[1:])
  with jax.transfer_guard('allow'):  # with several processes, jax takes this for a transfer that nobody asked for
    return {name: jax.make_array_from_process_local_data(rows, x, shape(x))
            for name, x in batch.items() if name not in HOST_KEYS}


def optimizer_shardings(mesh: Mesh, tx: optax.GradientTransformation, params: Any, param_shardings: Any) -> Any:
  """Optimiser state lies where its parameter lies; what has another shape (counts, factored moments) is replicated."""
  return optax.tree_map_params(
    tx,
    lambda leaf, param, sharding: sharding if leaf.shape == param.shape else replicated(mesh),
    jax.eval_shape(tx.init, params), params, param_shardings,
    transform_non_params=lambda _: replicated(mesh))


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules = RULES) -> Iterator[None]:
  """Inside, `constrain` acts on `mesh` by `rules`.  Trace (call the jitted function first) inside it."""
  token = _ACTIVE.set((mesh, rules))
  try:
    yield
  finally:
    _ACTIVE.reset(token)


def active() -> tuple[Mesh, Rules] | None:
  """The mesh and rules of the innermost `use`; nothing outside of it."""
  return _ACTIVE.get()


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Pins an activation's layout by its logical axis names; the identity outside `use`."""
  layout = active()
  if layout is None:
    return x
  mesh, rules = layout
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes, rules)))


def by_batch_shard(function: Callable[..., jax.Array], weight: jax.Array, axes: tuple[str, ...],
                   *rows: jax.Array) -> jax.Array:
  """function(weight, *rows), each batch shard computed by itself; rows and result have the batch first.

  `weight`, a parameter of these logical axes, is gathered over the batch's mesh axes once before and its gradient
  summed over them once after, also where `function` loops: left to itself, the compiler sums it in every iteration.
  Other mesh axes (`tensor`) split weight and rows inside as they do outside.  The same as a plain call outside `use`.
  """
  layout = active()
  if layout is None or batch_shards(*layout) == 1:
    return function(weight, *rows)
  mesh, rules = layout
  manual = frozenset(_axes(rules['batch']))
  inside = {name: _place(tuple(axis for axis in _axes(place) if axis not in manual)) for name, place in rules.items()}

  def one_shard(weight, *rows):
    with use(jax.sharding.get_abstract_mesh(), inside):
      return function(constrain(weight, *axes), *rows)

  by_row = spec(('batch',), rules)
  return jax.shard_map(one_shard, mesh=mesh, in_specs=(PartitionSpec(), *(by_row for _ in rows)), out_specs=by_row,
                       axis_names=manual, check_vma=False)(weight, *rows)
