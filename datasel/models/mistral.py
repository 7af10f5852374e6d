"""A Mistral-style decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU or plain GELU, no biases.

Flax (nnx) defines the parameters and the arithmetic of one layer; everything above this file sees plain functions of a
nested dict of float32 arrays, whose layers are stacked on a leading axis, and a table of their logical axis names.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from datasel import sharding
from datasel.attention import Mask, attention
from datasel.batch import Batch

# What the backward pass keeps of a layer.  'full' keeps its input alone and computes the rest again.
REMAT: dict[str, Callable | None] = {
  'none': None,
  'full': jax.checkpoint_policies.nothing_saveable,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'attention': jax.checkpoint_policies.save_only_these_names('attention'),
}


@dataclasses.dataclass(frozen=True)
class Mistral:
  """The shape of a decoder, and its functions `init`, `apply`, `token_nll`."""

  vocab_size: int
  n_layers: int
  d_model: int
  n_heads: int
  n_kv_heads: int
  head_dim: int
  d_ff: int
  gated: bool = True  # SwiGLU; False: one GELU layer
  tied: bool = False  # one matrix for the embedding and the output head
  rope_fraction: float = 1.0  # part of each head that rotates (GPT-NeoX: 0.25)
  rope_theta: float = 1e4
  window: int | None = None  # sliding attention window, tokens
  norm_eps: float = 1e-5
  init_std: float = 0.02
  residual_init_std: float | None = None  # of what writes to the residual stream; default init_std / sqrt(2 n_layers)
  dtype: str = 'float32'  # of activations and matrix products; parameters, norms, softmax and losses are float32
  remat: str = 'full'
  attention: str = 'auto'
  loss_chunk: int = 128  # positions of each row whose logits exist at one time

  def __post_init__(self):
    positive = ('vocab_size', 'n_layers', 'd_model', 'n_heads', 'n_kv_heads', 'head_dim', 'd_ff', 'loss_chunk')
    for name in positive:
      if getattr(self, name) < 1:
        raise ValueError(f'model {name} is {getattr(self, name)}, want a positive integer')
    if self.n_heads % self.n_kv_heads:
      raise ValueError(f'model n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}')
    if not 0 <= self.rope_fraction <= 1:
      raise ValueError(f'model rope_fraction {self.rope_fraction} is not in [0, 1]')
    if self.dtype not in ('float32', 'bfloat16'):
      raise ValueError(f"model dtype {self.dtype!r}: want 'float32' or 'bfloat16' (float16 would need loss scaling)")
    if self.remat not in REMAT:
      raise ValueError(f'unknown remat policy {self.remat!r}; known: {sorted(REMAT)}')

  @property
  def rotary_dim(self) -> int:
    """Channels of a head that rotate, an even number."""
    return int(self.head_dim * self.rope_fraction) // 2 * 2

  @property
  def n_params(self) -> int:
    """Parameters, embeddings included."""
    return sum(leaf.size for leaf in jax.tree.leaves(_abstract(self)))

  def flops_per_token(self, length: int) -> float:
    """Training FLOPs per token: 6 per matrix parameter (the head once, the embedding look-up none) and
    12 n_layers H Dh times the mean number of visible positions, which is L/2 under causal attention and
    W - W^2/2L in a window of W < L (each less than the exact mean by at most half a position)."""
    matrices = self.n_params - (0 if self.tied else self.vocab_size * self.d_model)
    window = min(self.window or length, length)
    visible = window - window**2 / (2 * length) if length else 0.0
    return 6.0 * matrices + 12.0 * self.n_layers * self.n_heads * self.head_dim * visible

  def init(self, key: jax.Array) -> dict:
    """Fresh float32 parameters, a nested dict; equal keys give equal bits."""
    return nnx.to_pure_dict(_split(self, key)[1])

  def logical_axes(self) -> dict:
    """The parameters' tree with a tuple of logical axis names in place of each array."""
    axes = jax.tree.map(lambda v: v.get_metadata()['out_sharding'], _split_abstract(self)[1],
                        is_leaf=lambda v: isinstance(v, nnx.Variable))
    return nnx.to_pure_dict(axes)

  def abstract(self) -> dict:
    """The parameters' tree with ShapeDtypeStructs."""
    return _abstract(self)

  def hidden(self, params: dict, tokens_BxL: jax.Array, segment_BxL: jax.Array | None = None,
             position_BxL: jax.Array | None = None) -> jax.Array:
    """B x L x D activations after the last norm, in the compute dtype."""
    if position_BxL is None:
      position_BxL = jnp.broadcast_to(jnp.arange(tokens_BxL.shape[1]), tokens_BxL.shape)
    mask = Mask(causal=True, window=self.window, segment_BxL=segment_BxL)
    rotation = _rotation(position_BxL, self.rotary_dim, self.rope_theta)
    layer_graph = nnx.graphdef(_abstract_block(self))

    def layer(x_BxLxD, layer_params):
      block = nnx.merge(layer_graph, _state(layer_params))
      return block(x_BxLxD, rotation, mask), None

    if REMAT[self.remat] is not None:
      layer = jax.checkpoint(layer, policy=REMAT[self.remat], prevent_cse=False)
    x_BxLxD = sharding.by_batch_shard(self._look_up, params['embed']['kernel'], ('vocab', 'embed'), tokens_BxL)
    x_BxLxD = sharding.constrain(x_BxLxD, 'batch', 'length', 'residual')
    x_BxLxD, _ = jax.lax.scan(layer, x_BxLxD, params['blocks'])
    return _rms_norm(x_BxLxD, params['norm']['scale'], self.norm_eps)

  def apply(self, params: dict, tokens_BxL: jax.Array, segment_BxL: jax.Array | None = None,
            position_BxL: jax.Array | None = None) -> jax.Array:
    """float32 logits B x L x V.  For losses use `token_nll`, which never builds them whole."""
    return self._logits(self._head(params), self.hidden(params, tokens_BxL, segment_BxL, position_BxL))

  def token_nll(self, params: dict, batch: Batch) -> jax.Array:
    """float32 B x L negative log-likelihood of `targets_BxL`, nats, unmasked.

    The logits of `loss_chunk` positions exist at a time, forward and backward, so memory does not grow with L x V.
    """
    hidden_BxLxD = self.hidden(params, batch['tokens_BxL'], batch.get('segment_BxL'), batch.get('position_BxL'))
    kernel_VxD = self._head(params)
    return sharding.by_batch_shard(self._head_nll, kernel_VxD, ('vocab', 'embed'), hidden_BxLxD, batch['targets_BxL'])

  def _look_up(self, kernel_VxD: jax.Array, tokens_BxL: jax.Array) -> jax.Array:
    return kernel_VxD[tokens_BxL].astype(self.dtype)  # in this order its gradient is summed in float32

  def _head_nll(self, kernel_VxD: jax.Array, hidden_BxLxD: jax.Array, targets_BxL: jax.Array) -> jax.Array:
    B, L, D = hidden_BxLxD.shape
    chunk = min(self.loss_chunk, L)
    n_chunks = -(-L // chunk)
    pad = n_chunks * chunk - L
    hidden_BxNxCxD = jnp.pad(hidden_BxLxD, ((0, 0), (0, pad), (0, 0))).reshape(B, n_chunks, chunk, D)
    targets_BxNxC = jnp.pad(targets_BxL, ((0, 0), (0, pad))).reshape(B, n_chunks, chunk)

    def nll_of(pair):
      hidden_BxCxD, targets_BxC = pair
      logits_BxCxV = self._logits(kernel_VxD, hidden_BxCxD)
      target_BxCx1 = jnp.take_along_axis(logits_BxCxV, targets_BxC[..., None], axis=-1)
      return jax.nn.logsumexp(logits_BxCxV, axis=-1) - target_BxCx1[..., 0]

    nll_NxBxC = jax.lax.map(jax.checkpoint(nll_of, prevent_cse=False),
                            (hidden_BxNxCxD.swapaxes(0, 1), targets_BxNxC.swapaxes(0, 1)))
    return nll_NxBxC.swapaxes(0, 1).reshape(B, n_chunks * chunk)[:, :L]

  def _head(self, params: dict) -> jax.Array:
    return params['embed']['kernel'] if self.tied else params['head']['kernel']

  def _logits(self, kernel_VxD: jax.Array, hidden_BxLxD: jax.Array) -> jax.Array:
    logits_BxLxV = jnp.einsum('bld,vd->blv', hidden_BxLxD, kernel_VxD.astype(self.dtype),
                              preferred_element_type=jnp.float32)
    return sharding.constrain(logits_BxLxV, 'batch', 'length', 'vocab')


class _Kernel(nnx.Module):
  """One matrix (or higher array) and the logical names of its axes."""

  def __init__(self, key: jax.Array, shape: tuple[int, ...], axes: tuple[str, ...], std: float):
    self.kernel = nnx.Param(std * jax.random.normal(key, shape, jnp.float32), out_sharding=axes)


class _Norm(nnx.Module):

  def __init__(self, d_model: int):
    self.scale = nnx.Param(jnp.ones((d_model,), jnp.float32), out_sharding=('norm',))


class _Block(nnx.Module):
  """x + attention(norm(x)), then x + feed-forward(norm(x))."""

  def __init__(self, model: Mistral, key: jax.Array):
    self.model = model
    D, H, K, Dh, F = model.d_model, model.n_heads, model.n_kv_heads, model.head_dim, model.d_ff
    std = model.init_std
    out_std = std / (2 * model.n_layers) ** 0.5 if model.residual_init_std is None else model.residual_init_std
    keys = iter(jax.random.split(key, 7))
    self.attention_norm, self.mlp_norm = _Norm(D), _Norm(D)
    self.query = _Kernel(next(keys), (D, H, Dh), ('embed', 'heads', 'head_dim'), std)
    self.key = _Kernel(next(keys), (D, K, Dh), ('embed', 'kv_heads', 'head_dim'), std)
    self.value = _Kernel(next(keys), (D, K, Dh), ('embed', 'kv_heads', 'head_dim'), std)
    self.out = _Kernel(next(keys), (H, Dh, D), ('heads', 'head_dim', 'embed'), out_std)
    self.up = _Kernel(next(keys), (D, F), ('embed', 'mlp'), std)
    self.down = _Kernel(next(keys), (F, D), ('mlp', 'embed'), out_std)
    if model.gated:
      self.gate = _Kernel(next(keys), (D, F), ('embed', 'mlp'), std)

  def __call__(self, x_BxLxD: jax.Array, rotation: tuple[jax.Array, jax.Array], mask: Mask) -> jax.Array:
    model = self.model
    product = functools.partial(_product, dtype=model.dtype)
    h_BxLxD = _rms_norm(x_BxLxD, self.attention_norm.scale[...], model.norm_eps)
    q_BxLxHxDh = _rotate(product(h_BxLxD, self.query), rotation)
    k_BxLxKxDh = _rotate(product(h_BxLxD, self.key), rotation)
    v_BxLxKxDh = product(h_BxLxD, self.value)
    q_BxLxHxDh = sharding.constrain(q_BxLxHxDh, 'batch', 'length', 'heads', 'head_dim')
    seen_BxLxHxDh = attention(q_BxLxHxDh, k_BxLxKxDh, v_BxLxKxDh, mask, implementation=model.attention)
    x_BxLxD = x_BxLxD + product(seen_BxLxHxDh, self.out, inner=2)
    x_BxLxD = sharding.constrain(x_BxLxD, 'batch', 'length', 'residual')

    h_BxLxD = _rms_norm(x_BxLxD, self.mlp_norm.scale[...], model.norm_eps)
    up_BxLxF = product(h_BxLxD, self.up)
    if model.gated:
      up_BxLxF = jax.nn.silu(product(h_BxLxD, self.gate)) * up_BxLxF
    else:
      up_BxLxF = jax.nn.gelu(up_BxLxF)
    x_BxLxD = x_BxLxD + product(up_BxLxF, self.down)
    return sharding.constrain(x_BxLxD, 'batch', 'length', 'residual')


class _Decoder(nnx.Module):
  """The parameters of the whole model; its forward pass is `Mistral.hidden`, a scan over the stacked layers."""

  def __init__(self, model: Mistral, key: jax.Array):
    embed_key, head_key, blocks_key = jax.random.split(key, 3)
    self.embed = _Kernel(embed_key, (model.vocab_size, model.d_model), ('vocab', 'embed'), model.init_std)
    self.blocks = nnx.vmap(lambda k: _Block(model, k), transform_metadata={nnx.PARTITION_NAME: 'layers'})(
      jax.random.split(blocks_key, model.n_layers))
    self.norm = _Norm(model.d_model)
    if not model.tied:
      self.head = _Kernel(head_key, (model.vocab_size, model.d_model), ('vocab', 'embed'), model.init_std)


def _split(model: Mistral, key: jax.Array) -> tuple[Any, Any]:
  # Parameters are placed by the caller's jit; nnx's own eager sharding would demand a mesh here.
  with nnx.use_eager_sharding(False):
    return nnx.split(_Decoder(model, key), nnx.Param)


def _split_abstract(model: Mistral) -> tuple[Any, Any]:
  with nnx.use_eager_sharding(False):
    return nnx.split(nnx.eval_shape(lambda: _Decoder(model, jax.random.key(0))), nnx.Param)


@functools.cache
def _abstract(model: Mistral) -> dict:
  return jax.eval_shape(model.init, jax.random.key(0))


@functools.cache
def _abstract_block(model: Mistral) -> _Block:
  with nnx.use_eager_sharding(False):
    return nnx.eval_shape(lambda: _Block(model, jax.random.key(0)))


def _state(params: dict) -> nnx.State:
  return nnx.State(jax.tree.map(nnx.Param, params))


def _product(x: jax.Array, module: _Kernel, *, dtype: str, inner: int = 1) -> jax.Array:
  """The last `inner` axes of x times the first of the kernel: as one matrix product, a third faster on CPUs."""
  kernel = module.kernel[...].astype(dtype)
  rows, outer = x.shape[:-inner], kernel.shape[inner:]
  flat = x.reshape(math.prod(rows), -1) @ kernel.reshape(-1, math.prod(outer))
  return flat.reshape(*rows, *outer)


def _rms_norm(x_BxLxD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
  x32 = x_BxLxD.astype(jnp.float32)
  x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
  return (x32 * scale_D[None, None]).astype(x_BxLxD.dtype)


def _rotation(position_BxL: jax.Array, dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
  """cos and sin, B x L x 1 x dim/2 float32: computed once, shared by all layers."""
  frequency = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / max(dim, 1))
  angle_BxLx1xR = position_BxL[:, :, None, None].astype(jnp.float32) * frequency[None, None, None]
  return jnp.cos(angle_BxLx1xR), jnp.sin(angle_BxLx1xR)


def _rotate(x_BxLxHxDh: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotary position embedding on the first channels of each head, halves paired as Hugging Face pairs them."""
  cos, sin = rotation
  half = cos.shape[-1]
  x32 = x_BxLxHxDh.astype(jnp.float32)
  first, second, rest = x32[..., :half], x32[..., half:2 * half], x32[..., 2 * half:]
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1).astype(x_BxLxHxDh.dtype)
