"""What `pmp.solve` is given as batches: a tree of stacked arrays, one batch, or an iterable of batches."""

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any


@jax.jit
def checksums(tree: Tree, first_row: jax.Array) -> jax.Array:
  """A uint32 for each leaf, of its dtype and of the bits and place of every number: exact on any mesh.

  Groups n x B x ... add up: the sum (modulo 2^32) over groups with first_row = rows before it depends on the rows and
  their order alone, not on how they are grouped.
  """

  def one(x):
    kind = np.uint32(zlib.crc32(f'{x.dtype} {x.shape[2:]}'.encode()))
    words = _words(x)
    offset = first_row.astype(jnp.uint32) * np.uint32(math.prod(words.shape[2:]) % 2**32)
    place, size = jnp.full(words.shape, offset), 1
    for axis in reversed(range(words.ndim)):  # by axes: a flattened array would be gathered from its devices
      place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(size % 2**32)
      size *= words.shape[axis]
    return jnp.sum(_mixed(words ^ _mixed(place + kind)), dtype=jnp.uint32)

  return jnp.stack([one(jnp.asarray(x)) for x in jax.tree.leaves(tree)])


def _words(x: jax.Array) -> jax.Array:
  """The bits of each number as uint32, of 8 bytes folded into it."""
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    return _words(x.real) ^ _mixed(_words(x.imag))
  if x.dtype.itemsize == 8:
    halves = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return halves[..., 0] ^ _mixed(halves[..., 1])
  if jnp.issubdtype(x.dtype, jnp.floating):
    return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
  return x.astype(jnp.uint32)


def _mixed(h: jax.Array) -> jax.Array:
  """MurmurHash3's finalizer: each bit of uint32 h changes half the others."""
  h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
  return h ^ (h >> 16)


class Checksum:
  """Of groups n x B x ... in their order: of their rows, however they are grouped, and wherever they lie."""

  def __init__(self, groups: Iterable[Tree] = ()):
    self.rows, self._words = 0, np.zeros((), np.uint32)
    for group in groups:
      self.add(group, checksums(group, self.rows))

  def add(self, group: Tree, words: jax.Array) -> None:
    """words: `checksums(group, self.rows)`."""
    self._words = self._words + np.asarray(words)
    n, B = np.shape(jax.tree.leaves(group)[0])[:2]
    self.rows += n * B

  @property
  def found(self) -> list[int]:
    """Rows, and the sum of each leaf."""
    return [self.rows, *self._words.tolist()]


def check_meshes(tree: Tree, name: str) -> None:
  """Raises ValueError for a leaf on a mesh whose shardings are part of types."""
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    mesh = getattr(getattr(x, 'sharding', None), 'mesh', None)
    if mesh is not None and any(kind != jax.sharding.AxisType.Auto for kind in mesh.axis_types):
      raise ValueError(f'{name}{jax.tree_util.keystr(path)} lies on {mesh}; want axes of AxisType.Auto: '
                       'jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))')


class Groups:
  """Batches as groups n x B x ... of equal batches: one of a stacked tree, one for each batch of an iterable.

  `like` is a stacked tree T x B x ... of the same structure: that of the training batches.  Raises ValueError naming
  the argument for anything else.
  """

  def __init__(self, batches: Tree | Iterable, like: Tree, name: str):
    self._batches, self._like, self._name = batches, like, name
    if isinstance(batches, Iterator):
      raise ValueError(f'{name} is an iterator, which is read once; want something that starts anew each time: a list, '
                       'or an object with __iter__')
    is_tree = isinstance(batches, (Mapping, tuple, list, np.ndarray, jax.Array)) or not hasattr(batches, '__iter__')
    self._stacked = is_tree and jax.tree.structure(batches) == jax.tree.structure(like)
    if is_tree and not self._stacked and not isinstance(batches, (tuple, list)):
      raise ValueError(f'{name} is a tree {jax.tree.structure(batches)}; want that of train_batches, '
                       f'{jax.tree.structure(like)}, or an iterable of such batches')

  def __iter__(self) -> Iterator[Tree]:
    if self._stacked:
      yield self._group(self._batches)
      return
    n = -1
    for n, batch in enumerate(self._batches):
      if jax.tree.structure(batch) != jax.tree.structure(self._like):
        raise ValueError(f'{self._name}: batch {n} is a tree {jax.tree.structure(batch)}; want that of train_batches, '
                         f'{jax.tree.structure(self._like)}')
      yield self._group(batch)
    if n < 0:
      raise ValueError(f'{self._name} is empty; want at least one batch')

  @property
  def shape(self) -> tuple[int, int]:
    """(n, B) of a stacked tree."""
    return np.shape(jax.tree.leaves(self._group(self._batches))[0])[:2]

  def kept(self) -> list[Tree]:
    """All of them, batches of one shape that follow each other as one group."""
    joined: list[list[Tree]] = []
    shapes = lambda group: [x.shape for x in jax.tree.leaves(group)]
    for group in self:
      if joined and shapes(joined[-1][0]) == shapes(group):
        joined[-1].append(group)
      else:
        joined.append([group])
    return [jax.tree.map(lambda *x: jnp.concatenate(x), *groups) for groups in joined]

  def _group(self, batches: Tree) -> Tree:
    check_meshes(batches, self._name)
    axes = {np.ndim(x) - np.ndim(want) for x, want in zip(jax.tree.leaves(batches), jax.tree.leaves(self._like))}
    if axes == {-1}:
      batches = jax.tree.map(lambda x: x[None], batches)
    elif axes != {0}:
      raise ValueError(f'{self._name}: arrays of {[np.shape(x) for x in jax.tree.leaves(batches)]}; want as many axes '
                       'as train_batches have (batches x rows x ...), or one fewer (rows x ...): '
                       f'{[np.shape(x) for x in jax.tree.leaves(self._like)]}')
    sizes = {np.shape(x)[:2] for x in jax.tree.leaves(batches)}
    if len(sizes) != 1 or 0 in next(iter(sizes)):
      raise ValueError(f'{self._name}: arrays of {sorted(sizes)} batches and rows; want the same of each, at least one')
    return batches
