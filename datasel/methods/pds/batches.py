"""What `pmp.solve` is given as batches: a tree of stacked arrays, one batch, or an iterable of batches."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any


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
