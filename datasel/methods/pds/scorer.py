"""The data scorer: a decoder read as an encoder, with a linear head, that predicts the solver's score of a record from
its text (PDS; Gu et al. 2024, section 2.3).  `fitting.fit` fits it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from datasel.batch import Batch
from datasel.models.mistral import Mistral
from datasel.objectives import weighted_mean
from datasel.step import Objective


@dataclasses.dataclass(frozen=True)
class Scorer:
  """A decoder without its output head, and what is made of its last hidden states.

  pooling: which tokens' states are averaged.  'mean': all real ones; 'last', 'first': of each document in the record
  the last one, or the first (which, under causal attention, has seen itself alone).
  """

  model: Mistral
  pooling: str = 'mean'

  def __post_init__(self):
    if self.pooling not in _POOLED:
      raise ValueError(f'unknown pooling {self.pooling!r}; known: {sorted(_POOLED)}')

  @property
  def encoder(self) -> Mistral:
    """The decoder as it is used here: a tied one has no output head of its own."""
    return dataclasses.replace(self.model, tied=True)

  @property
  def n_params(self) -> int:
    return self.encoder.n_params + self.model.d_model + 1

  def flops_per_token(self, length: int) -> float:
    """Training FLOPs per token by `Mistral.flops_per_token`, without the product with the output head."""
    return self.encoder.flops_per_token(length) - 6.0 * self.model.vocab_size * self.model.d_model

  def init(self, key: jax.Array, backbone: dict | None = None) -> dict:
    """{'backbone': ..., 'head': {'kernel': float32 [D], 'bias': float32 []}}; equal keys give equal bits.

    backbone: the parameters of a trained `model`, whose output head is left out; None: fresh ones.
    Raises ValueError for parameters of another shape.
    """
    backbone_key, head_key = jax.random.split(key)
    if backbone is None:
      backbone = self.encoder.init(backbone_key)
    else:
      backbone = {name: tree for name, tree in backbone.items() if name != 'head'}
      got, want = _shapes(backbone), _shapes(self.encoder.abstract())
      differ = [f'{name}: {got.get(name, "absent")}, want {want.get(name, "absent")}'
                for name in sorted(got.keys() | want.keys()) if got.get(name) != want.get(name)]
      if differ:
        raise ValueError(f"the backbone is not of the scorer's model: {'; '.join(differ[:5])} ({len(differ)} in all)")
    D = self.model.d_model
    kernel_D = jax.random.uniform(head_key, (D,), jnp.float32, -D**-0.5, D**-0.5)  # as torch's Linear, the authors'
    return {'backbone': backbone, 'head': {'kernel': kernel_D, 'bias': jnp.zeros((), jnp.float32)}}

  def abstract(self) -> dict:
    """The parameters' tree with ShapeDtypeStructs."""
    return jax.eval_shape(self.init, jax.random.key(0))

  def logical_axes(self) -> dict:
    """The parameters' tree with a tuple of logical axis names in place of each array."""
    return {'backbone': self.encoder.logical_axes(), 'head': {'kernel': ('residual',), 'bias': ()}}

  def apply(self, params: dict, batch: Batch) -> jax.Array:
    """float32 B: the score of each record, from its tokens_BxL, segment_BxL and position_BxL.

    A record is a packed row, whose documents don't see each other; the pooling runs over all of them, in float32.
    """
    segment_BxL = batch['segment_BxL']
    hidden_BxLxD = self.encoder.hidden(params['backbone'], batch['tokens_BxL'], segment_BxL, batch['position_BxL'])
    weight_BxL = _POOLED[self.pooling](segment_BxL).astype(jnp.float32)
    total_BxD = (hidden_BxLxD.astype(jnp.float32) * weight_BxL[:, :, None]).sum(1)
    pooled_BxD = total_BxD / jnp.maximum(weight_BxL.sum(1), 1)[:, None]
    return (pooled_BxD * params['head']['kernel'][None]).sum(1) + params['head']['bias']


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  return {jax.tree_util.keystr(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _ends(segment_BxL: jax.Array, before: int) -> jax.Array:
  """Where a document ends (before = 0), or begins (1)."""
  padded = jnp.pad(segment_BxL, ((0, 0), (before, 1 - before)))
  return (segment_BxL > 0) & (padded[:, 1:] != padded[:, :-1])


_POOLED: dict[str, Callable[[jax.Array], jax.Array]] = {
  'mean': lambda segment_BxL: segment_BxL > 0,
  'last': lambda segment_BxL: _ends(segment_BxL, before=0),
  'first': lambda segment_BxL: _ends(segment_BxL, before=1),
}


def targets(gamma_N: np.ndarray) -> np.ndarray:
  """float32 [N] from the solver's scores: z-scored over all of them, then clipped to +-3, as the authors do."""
  gamma_N = np.asarray(gamma_N, np.float64)
  if gamma_N.ndim != 1 or not np.isfinite(gamma_N).all():
    raise ValueError(f'scores of shape {gamma_N.shape}, {np.sum(~np.isfinite(gamma_N))} of them not finite; want a '
                     'vector of finite numbers')
  if not gamma_N.size or gamma_N.min() == gamma_N.max():
    raise ValueError(f'the {gamma_N.size} scores are all equal: there is nothing to learn from them; want proxies and '
                     'a target set whose gradients are not 0')
  return np.clip((gamma_N - gamma_N.mean()) / gamma_N.std(), -3, 3).astype(np.float32)


def objective(score: Callable[[Any, Batch], jax.Array], loss: str = 'mse') -> Objective:
  """What a scorer is trained on, from (params, batch) -> score_B and batches with target_B, float32.

  loss 'mse': the mean squared error.  'rank': the mean of log(1 + exp(s_j - s_i)) over all pairs of the batch with
  target_i > target_j (RankNet; Burges et al. 2005); scores then have an order but no scale.  It needs the whole batch
  at once: for micro-batches, give it `objectives.in_microbatches(score, n)`.
  The metrics have `mse` for both.
  """
  if loss not in ('mse', 'rank'):
    raise ValueError(f"unknown loss {loss!r}; known: 'mse', 'rank'")

  def squared_error(params, aux, batch):
    mse = jnp.mean(jnp.square(score(params, batch) - batch['target_B']))
    return mse, (aux, {'mse': mse, 'weight': jnp.float32(batch['target_B'].shape[0])})

  def pairwise(params, aux, batch):
    score_B, target_B = score(params, batch), batch['target_B']
    better_BxB = target_B[:, None] > target_B[None, :]
    each_BxB = jax.nn.softplus(score_B[None, :] - score_B[:, None])
    mse = jnp.mean(jnp.square(score_B - target_B))
    return weighted_mean(each_BxB, better_BxB.astype(jnp.float32)), (aux, {'mse': mse})

  return squared_error if loss == 'mse' else pairwise
