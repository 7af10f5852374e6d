"""A Mistral-style decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU; or GPT-NeoX's variations of it.

Flax (nnx) defines the parameters and the arithmetic of one layer; everything above this file sees plain functions of a
nested dict of float32 arrays, whose layers are stacked on a leading axis, and a table of their logical axis names.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from datasel import sharding
from datasel.attention import Anchors, Mask, anchors, attention
from datasel.attention.cached import cached_attention
from datasel.batch import Batch
from datasel.data.anchors import Rule
from datasel.models import rope
from datasel.models.layers import ACTIVATIONS, NORMS, Attend, Block, Decoder, Norm

# What the backward pass keeps of a layer.  'full' keeps its input alone and computes the rest again.
REMAT: dict[str, Callable | None] = {
  'none': None,
  'full': jax.checkpoint_policies.nothing_saveable,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'attention': jax.checkpoint_policies.save_only_these_names('attention'),
}

# Each row of new keys goes into its own row of the cache, at (layer, slot): unlike in plain indexing, where a row may
# go anywhere, the compiler then sees that devices with different rows have nothing to exchange.
_ROW_BY_ROW = jax.lax.ScatterDimensionNumbers(
  update_window_dims=(2, 3), inserted_window_dims=(0, 3), scatter_dims_to_operand_dims=(0, 3),
  operand_batching_dims=(1,), scatter_indices_batching_dims=(0,))


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
  gated: bool = True  # a gated feed-forward layer (SwiGLU); False: a plain one
  activation: str = 'silu'  # of the feed-forward layer: 'silu', 'gelu', 'gelu_tanh'
  norm: str = 'rms'  # or 'layer'
  bias: bool = False  # in every matrix product of a layer
  parallel: bool = False  # attention and feed-forward read the same input (GPT-NeoX), not one the other's output
  tied: bool = False  # one matrix for the embedding and the output head
  rope_fraction: float = 1.0  # part of each head that rotates (GPT-NeoX: 0.25)
  rope_theta: float = 1e4
  rope_scaling: tuple[tuple[str, Any], ...] = ()  # (('rope_type', 'linear'), ('factor', 2.0)): see models/rope.py
  window: int | None = None  # sliding attention window, tokens
  anchors: Rule | None = None  # anchor attention: which tokens close a segment (AnLLM)
  anchor_sees_anchors: bool = False  # as the authors' older code had it
  keep_bos: bool = False  # all tokens of a document see its first one
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
    # JSON and configs bring lists or a dict; the shape of a compiled program must be hashable.
    object.__setattr__(self, 'rope_scaling', tuple(sorted((str(k), v) for k, v in dict(self.rope_scaling).items())))
    if self.rope_scaling:
      rope.check_scaling(dict(self.rope_scaling))
    if isinstance(self.anchors, Mapping):
      object.__setattr__(self, 'anchors', Rule(**self.anchors))
    if self.anchors is not None and self.window is not None:
      raise ValueError(f'model window {self.window} and anchors {self.anchors}: attention has one or the other')
    if self.anchors is None and (self.anchor_sees_anchors or self.keep_bos):
      raise ValueError('model anchor_sees_anchors and keep_bos go with anchors, and there are none')
    for name, known in (('activation', ACTIVATIONS), ('norm', NORMS)):
      if getattr(self, name) not in known:
        raise ValueError(f'unknown model {name} {getattr(self, name)!r}; known: {sorted(known)}')
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
    W - W^2/2L in a window of W < L (each less than the exact mean by at most half a position).  With anchors it is
    the text's affair how many are visible: none are counted."""
    matrices = self.n_params - (0 if self.tied else self.vocab_size * self.d_model)
    window = min(self.window or length, length)
    visible = window - window**2 / (2 * length) if length and self.anchors is None else 0.0
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

  def mask(self, tokens_BxL: jax.Array, segment_BxL: jax.Array | None = None,
           protected_BxL: jax.Array | None = None) -> Mask:
    """What each token sees; protected_BxL: bool, of a model with anchors, what all later tokens of a document see."""
    if self.anchors is None:
      if protected_BxL is not None:
        raise ValueError('protected_BxL is given to a model without anchors, where every token sees all before it')
      return Mask(causal=True, window=self.window, segment_BxL=segment_BxL)
    anchor_BxL, _ = anchors.flags(tokens_BxL, self.anchors, segment_BxL)
    segments = anchors.segments(anchor_BxL, segment_BxL, anchor_sees_anchors=self.anchor_sees_anchors,
                                keep_bos=self.keep_bos, protected_BxL=protected_BxL)
    L = tokens_BxL.shape[1]
    size = max(1, L // self.anchors.min_length) if segments.protected_BxL is None else L
    return Mask(anchors=Anchors(segments, size))

  def hidden(self, params: dict, tokens_BxL: jax.Array, segment_BxL: jax.Array | None = None,
             position_BxL: jax.Array | None = None, protected_BxL: jax.Array | None = None) -> jax.Array:
    """B x L x D activations after the last norm, in the compute dtype."""
    mask = self.mask(tokens_BxL, segment_BxL, protected_BxL)
    attend = lambda q, k, v: (attention(q, k, v, mask, implementation=self.attention), None)
    return self.read(params, tokens_BxL, position_BxL, attend, remat=self.remat)[0]

  def apply(self, params: dict, tokens_BxL: jax.Array, segment_BxL: jax.Array | None = None,
            position_BxL: jax.Array | None = None, protected_BxL: jax.Array | None = None) -> jax.Array:
    """float32 logits B x L x V.  For losses use `token_nll`, which never builds them whole."""
    return self.logits(params, self.hidden(params, tokens_BxL, segment_BxL, position_BxL, protected_BxL))

  def read(self, params: dict, tokens_BxL: jax.Array, position_BxL: jax.Array | None, attend: Attend, *,
           remat: str = 'none') -> tuple[jax.Array, Any]:
    """(hidden_BxLxD, what `attend` kept of each layer, stacked): all layers, with that attention in each.

    position_BxL: None for 0, 1, ...
    """
    layer = self._layer(attend, _positions(tokens_BxL) if position_BxL is None else position_BxL)
    if REMAT[remat] is not None:
      layer = jax.checkpoint(layer, policy=REMAT[remat], prevent_cse=False)
    x_BxLxD, kept = jax.lax.scan(layer, self._embed(params, tokens_BxL), params['blocks'])
    return self._norm(params, x_BxLxD), kept

  def read_on(self, params: dict, tokens_BxL: jax.Array, position_BxL: jax.Array, cache: Any,
              attend: Callable[..., tuple[jax.Array, Any]]) -> tuple[jax.Array, Any]:
    """(hidden_BxLxD, the cache): all layers, layer n by attend(q, k, v, cache, n) -> (B x L x H x Dh, the cache).

    The cache is carried from layer to layer, not scanned over: so it is updated in place.
    """
    def layer(carry, layer):
      x_BxLxD, cache = carry
      layer_params, n = layer
      own = self._layer(lambda q, k, v: attend(q, k, v, cache, n), position_BxL)
      return own(x_BxLxD, layer_params), None

    (x_BxLxD, cache), _ = jax.lax.scan(
      layer, (self._embed(params, tokens_BxL), cache), (params['blocks'], jnp.arange(self.n_layers)))
    return self._norm(params, x_BxLxD), cache

  def logits(self, params: dict, hidden_BxLxD: jax.Array) -> jax.Array:
    """float32 B x L x V, of what `hidden`, `prefill` or `extend` gave."""
    return self._logits(self._head(params), hidden_BxLxD)

  def empty_cache(self, rows: int, length: int) -> dict:
    """Keys and values of `length` positions, n_layers x B x K x T x Dh each in the compute dtype, none written yet."""
    shape = (self.n_layers, rows, self.n_kv_heads, length, self.head_dim)
    return {name: jnp.zeros(shape, self.dtype) for name in ('key', 'value')}

  def prefill(self, params: dict, tokens_BxL: jax.Array, cache_length: int) -> tuple[jax.Array, dict]:
    """Reads prompts that begin at position 0, padded on the right, by flash attention: (hidden_BxLxD, the cache).

    Slot t of a row's cache, of `cache_length` >= L slots, holds its position t.  What padding wrote there is never
    seen: a position sees only earlier ones, and `extend` writes a slot before it shows it.
    """
    self._check_full_cache()
    mask = Mask(causal=True, window=self.window)
    kept = lambda k, v: {'key': k.swapaxes(1, 2), 'value': v.swapaxes(1, 2)}
    attend = lambda q, k, v: (attention(q, k, v, mask, implementation=self.attention), kept(k, v))
    hidden_BxLxD, cache = self.read(params, tokens_BxL, None, attend)
    return hidden_BxLxD, self.grow(cache, cache_length)

  def grow(self, cache: dict, length: int) -> dict:
    """The same cache with room for `length` positions, no fewer than it has."""
    room = ((0, 0), (0, 0), (0, 0), (0, length - cache['key'].shape[3]), (0, 0))
    return jax.tree.map(lambda x: _constrain_cache(jnp.pad(x, room)), cache)

  def extend(self, params: dict, tokens_BxL: jax.Array, position_BxL: jax.Array,
             cache: dict) -> tuple[jax.Array, dict]:
    """Reads L more tokens of each row (one, when decoding): (hidden_BxLxD, the cache with them in it).

    position_BxL: int32, each token's position and slot; -1 for none there: it is not written and its hidden state
    means nothing.
    """
    self._check_full_cache()
    length = cache['key'].shape[3]
    slot_BxL = jnp.where(position_BxL < 0, length, position_BxL)  # out of range: dropped by the scatter
    age_BxLxT = position_BxL[:, :, None] - jnp.arange(length)[None, None]
    visible_BxLxT = (age_BxLxT >= 0) & (age_BxLxT < (self.window or length))

    def attend(q, k, v, cache, n):
      place_BxLx2 = jnp.stack([jnp.full_like(slot_BxL, n), slot_BxL], axis=-1)
      put = lambda name, x: jax.lax.scatter(cache[name], place_BxLx2, x, _ROW_BY_ROW, mode='drop')
      cache = {'key': put('key', k), 'value': put('value', v)}
      return cached_attention(q, cache['key'][n], cache['value'][n], visible_BxLxT), cache

    return self.read_on(params, tokens_BxL, jnp.maximum(position_BxL, 0), cache, attend)

  def token_nll(self, params: dict, batch: Batch) -> jax.Array:
    """float32 B x L negative log-likelihood of `targets_BxL`, nats, unmasked.

    The logits of `loss_chunk` positions exist at a time, forward and backward, so memory does not grow with L x V.
    """
    hidden_BxLxD = self.hidden(params, batch['tokens_BxL'], batch.get('segment_BxL'), batch.get('position_BxL'),
                               batch.get('protected_BxL'))
    return self.nll(params, hidden_BxLxD, batch['targets_BxL'])

  def nll(self, params: dict, hidden_BxLxD: jax.Array, targets_BxL: jax.Array) -> jax.Array:
    """`token_nll` of what `hidden`, `prefill` or `extend` gave."""
    return sharding.by_batch_shard(self._head_nll, self._head(params), ('vocab', 'embed'), hidden_BxLxD, targets_BxL)

  def _check_full_cache(self) -> None:
    if self.anchors is not None:
      raise ValueError('a model with anchors decodes with its own cache: '
                       'datasel.methods.anllm.generate.AnchorGenerator(model, params)')

  def _layer(self, attend: Attend, position_BxL: jax.Array) -> Callable[[jax.Array, dict], tuple[jax.Array, Any]]:
    """(x_BxLxD, a layer's parameters) -> (x_BxLxD, what `attend` keeps): one turn of the scan over the layers."""
    rotation = rope.rotation(position_BxL, self.rotary_dim, self.rope_theta, dict(self.rope_scaling))
    graph = nnx.graphdef(_abstract_block(self))
    return lambda x_BxLxD, params: nnx.merge(graph, _state(params))(x_BxLxD, rotation, attend)

  def _embed(self, params: dict, tokens_BxL: jax.Array) -> jax.Array:
    x_BxLxD = sharding.by_batch_shard(self._look_up, params['embed']['kernel'], ('vocab', 'embed'), tokens_BxL)
    return sharding.constrain(x_BxLxD, 'batch', 'length', 'residual')

  def _norm(self, params: dict, x_BxLxD: jax.Array) -> jax.Array:
    return nnx.merge(nnx.graphdef(_abstract_norm(self)), _state(params['norm']))(x_BxLxD)

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


def _split(model: Mistral, key: jax.Array) -> tuple[Any, Any]:
  # Parameters are placed by the caller's jit; nnx's own eager sharding would demand a mesh here.
  with nnx.use_eager_sharding(False):
    return nnx.split(Decoder(model, key), nnx.Param)


def _split_abstract(model: Mistral) -> tuple[Any, Any]:
  with nnx.use_eager_sharding(False):
    return nnx.split(nnx.eval_shape(lambda: Decoder(model, jax.random.key(0))), nnx.Param)


@functools.cache
def _abstract(model: Mistral) -> dict:
  return jax.eval_shape(model.init, jax.random.key(0))


@functools.cache
def _abstract_block(model: Mistral) -> Block:
  with nnx.use_eager_sharding(False):
    return nnx.eval_shape(lambda: Block(model, jax.random.key(0)))


@functools.cache
def _abstract_norm(model: Mistral) -> Norm:
  with nnx.use_eager_sharding(False):
    return nnx.eval_shape(lambda: Norm(model.norm, model.d_model, model.norm_eps))


def _state(params: dict) -> nnx.State:
  return nnx.State(jax.tree.map(nnx.Param, params))


def _constrain_cache(x: jax.Array) -> jax.Array:
  return sharding.constrain(x, 'layers', 'batch', 'kv_heads', 'length', 'head_dim')


def _positions(tokens_BxL: jax.Array) -> jax.Array:
  return jnp.broadcast_to(jnp.arange(tokens_BxL.shape[1]), tokens_BxL.shape)
