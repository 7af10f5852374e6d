"""What a model answered, kept line by line, so that an evaluation that was killed goes on where it was."""

import json
import logging
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from datasel import workdir

_log = logging.getLogger(__name__)


class Answers:
  """A JSONL file of {"key", "answer"}; a key is the digest of the model and the request, so any run may share a file.

  With no path they are kept for the life of this object.
  """

  def __init__(self, path: str | os.PathLike | None, identity: str):
    self.identity = identity
    self._known: dict[str, Any] = {}
    self._path = None if path is None else pathlib.Path(path)
    if self._path is not None and self._path.exists():
      self._read()

  def key(self, kind: str, request: Any) -> str:
    """kind: 'loglikelihood' or 'generate'.  request: JSON of all that determines the answer beside the model."""
    return workdir.digest([self.identity, kind, request])

  def __contains__(self, key: str) -> bool:
    return key in self._known

  def __getitem__(self, key: str) -> Any:
    return self._known[key]

  def add(self, pairs: Iterable[tuple[str, Any]]) -> None:
    """Keeps (key, answer) pairs, on disk before it returns."""
    pairs = list(pairs)
    self._known.update(pairs)
    if self._path is not None:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      with open(self._path, 'a', encoding='utf-8') as f:
        f.write(''.join(json.dumps({'key': key, 'answer': answer}) + '\n' for key, answer in pairs))

  def _read(self) -> None:
    content = self._path.read_bytes()
    whole = content[:content.rfind(b'\n') + 1]
    for number, line in enumerate(whole.splitlines(), 1):
      try:
        entry = json.loads(line)
        self._known[entry['key']] = entry['answer']
      except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f'{self._path} line {number} is no answer of an evaluation ({e}); delete the file to begin '
                         'the evaluation anew') from e
    if len(whole) < len(content):  # a kill came in the middle of a line
      os.truncate(self._path, len(whole))
    _log.info('%s: %d answers of earlier evaluations', self._path, len(self._known))


def identity(model: Any, params: dict) -> str:
  """sha256 of a model's shape and of a fingerprint of its weights: equal weights have equal ones on every mesh.

  What only says how it is computed (remat, attention, loss_chunk) is left out.
  """
  shape = {name: value for name, value in vars(model).items() if name not in ('remat', 'attention', 'loss_chunk')}
  sums = jax.device_get(jax.tree.map(_fingerprint, params))
  weights = {jax.tree_util.keystr(path): [int(x) for x in leaf] for path, leaf in
             jax.tree_util.tree_leaves_with_path(sums)}
  return workdir.digest({'shape': {name: repr(value) for name, value in shape.items()}, 'weights': weights})


@jax.jit
def _fingerprint(x: jax.Array) -> jax.Array:
  """uint32 x 2: two sums over the bits of each element mixed with its place.  Sums of integers have no order."""
  bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f'uint{8 * x.dtype.itemsize}')).astype(jnp.uint32)
  place = jnp.full(x.shape, 1, jnp.uint32)
  for axis in range(x.ndim):
    place = place * np.uint32(x.shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  mixed = (bits ^ (place * np.uint32(2654435761))) * np.uint32(2246822519)
  mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(3266489917)
  return jnp.stack([jnp.sum(mixed, dtype=jnp.uint32), jnp.sum(mixed ^ (place * bits), dtype=jnp.uint32)])
