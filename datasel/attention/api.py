"""One entry to attention: the caller says what is to be seen, the implementation is chosen here."""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from datasel import sharding
from datasel.attention import cudnn, primitives
from datasel.attention.masks import Mask
from datasel.attention.reference import reference

IMPLEMENTATIONS = ('reference', *primitives.IMPLEMENTATIONS)


def attention(q_BxLxHxDh: jax.Array, k_BxLxKxDh: jax.Array, v_BxLxKxDh: jax.Array, mask: Mask | None = None, *,
              implementation: str = 'auto') -> jax.Array:
  """Grouped-query attention, softmax(q k^T / sqrt(Dh)) v over what `mask` shows; a row that sees nothing gives zeros.

  q: B x L x H x Dh;  k, v: B x L x K x Dh with H a multiple of K;  all float32 or all bfloat16.  Softmax statistics and
  sums are float32; the result is B x L x H x Dh in q's dtype.  `mask` defaults to causal.

  implementation            runs on             derivatives
    'auto'                  everywhere          as the fastest below; of a GPU's gradients cuDNN's where it can
    'blockwise'             everywhere          gradient, forward mode, forward over reverse; O(L) memory, as all below
    'pallas'                TPU, GPU            the same.  On a CPU it is interpreted: for checks, slow
    'pallas_tpu' / '_gpu'   that one, or a CPU  the same; one of the two by name
    'cudnn'                 GPU, bfloat16       gradient
    'splash'                TPU                 gradient
    'reference'             everywhere          every kind, to any order; O(L^2) memory

  On several devices the kernels run on each device's own rows and heads: inside `sharding.use(mesh)` by its rules, or
  in your own `shard_map`.  Elsewhere the compiler must split the work, which it can do for 'blockwise' alone: 'auto'
  takes that.  ValueError for what an implementation cannot do, naming one that can.
  """
  mask = Mask() if mask is None else mask
  _check(q_BxLxHxDh, k_BxLxKxDh, v_BxLxKxDh, mask)
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f'unknown attention implementation {implementation!r}; known: {sorted(IMPLEMENTATIONS)}')
  if implementation == 'reference':
    return checkpoint_name(reference(q_BxLxHxDh, k_BxLxKxDh, v_BxLxKxDh, mask), primitives.SAVED)
  refusal = ''
  if implementation == 'cudnn':
    refusal = cudnn.refusal(mask.causal, mask.window, q_BxLxHxDh, mask.segment_BxL is not None,
                            mask.anchors is not None)
  elif implementation == 'splash' and mask.anchors is not None:
    refusal = 'an anchor mask'
  if refusal:
    raise ValueError(f"attention {implementation!r} cannot do {refusal}; use implementation='auto', 'pallas' or "
                     "'blockwise'")
  layout = _layout(q_BxLxHxDh.shape, k_BxLxKxDh.shape) if implementation != 'blockwise' else None
  window = None if mask.window is None or mask.window >= q_BxLxHxDh.shape[1] else int(mask.window)
  call = primitives.Call(mask.causal, window, implementation, layout)
  return primitives.flash(q_BxLxHxDh, k_BxLxKxDh, v_BxLxKxDh, mask.segment_BxL, mask.anchors, call)


def _layout(q: tuple[int, ...], k: tuple[int, ...]) -> primitives.Layout | None:
  """How the kernels are spread over the mesh in use, if there is one that is not already manual (`shard_map`)."""
  active = sharding.active()
  if active is None or jax.sharding.get_abstract_mesh().manual_axes:
    return None
  mesh, rules = active
  batch, _, heads, _ = sharding.spec(('batch', 'length', 'heads', 'head_dim'), rules)
  if rules['heads'] != rules['kv_heads']:
    raise ValueError(f"attention: the sharding rules put 'heads' on {rules['heads']!r} and 'kv_heads' on "
                     f"{rules['kv_heads']!r}; a kernel needs each query head beside its key head: give both the same "
                     "rule, or use implementation='blockwise'")
  for what, size, axes in (('rows', q[0], batch), ('query heads', q[2], heads), ('key heads', k[2], heads)):
    parts = math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
    if size % parts:
      raise ValueError(f'attention: {size} {what} do not divide into {parts} parts over {axes!r} of mesh '
                       f"{dict(mesh.shape)}; choose sizes that do, or use implementation='blockwise'")
  return primitives.Layout(mesh, batch, heads)


def _check(q_BxLxHxDh: jax.Array, k_BxLxKxDh: jax.Array, v_BxLxKxDh: jax.Array, mask: Mask) -> None:
  q, k, v = q_BxLxHxDh.shape, k_BxLxKxDh.shape, v_BxLxKxDh.shape
  if not (len(q) == len(k) == 4 and k == v and (*q[:2], q[3]) == (*k[:2], k[3]) and min(*q, *k) > 0
          and q[2] % k[2] == 0):
    raise ValueError(f'attention: q {q}, k {k}, v {v}: want B x L x H x Dh, and k and v alike B x L x K x Dh, with H a '
                     'multiple of K and nothing empty')
  dtypes = [x.dtype for x in (q_BxLxHxDh, k_BxLxKxDh, v_BxLxKxDh)]
  if len(set(dtypes)) > 1 or dtypes[0] not in (jnp.float32, jnp.bfloat16):
    raise ValueError(f'attention: q, k, v are {", ".join(map(str, dtypes))}; want one type, float32 or bfloat16')
  name, segment = 'segment_BxL', mask.segment_BxL
  if mask.anchors is not None:
    name, segment = 'anchors.segments', mask.anchors.segments.segment_BxL
  if segment is not None and (jnp.shape(segment) != q[:2] or not jnp.issubdtype(jnp.result_type(segment), jnp.integer)):
    raise ValueError(f'attention: mask.{name} is {jnp.result_type(segment)} {jnp.shape(segment)}, want int32 '
                     f'B x L = {q[:2]}')
