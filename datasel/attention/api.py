"""One entry to attention: the caller says what is to be seen, the implementation is chosen here."""

import jax
import jax.numpy as jnp

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
  in your own `shard_map`.  ValueError for what an implementation cannot do, naming one that can.
  """
  mask = Mask() if mask is None else mask
  _check(q_BxLxHxDh, k_BxLxKxDh, v_BxLxKxDh, mask)
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f'unknown attention implementation {implementation!r}; known: {sorted(IMPLEMENTATIONS)}')
  if implementation == 'reference':
    return reference(q_BxLxHxDh, k_BxLxKxDh, v_BxLxKxDh, mask)
  if implementation == 'cudnn':
    refusal = cudnn.refusal(mask.causal, mask.window, q_BxLxHxDh, mask.segment_BxL is not None)
    if refusal:
      raise ValueError(f"attention 'cudnn' cannot do {refusal}; use implementation='auto', 'pallas' or 'blockwise'")
  layout = _layout() if implementation != 'blockwise' else None
  call = primitives.Call(mask.causal, mask.window, implementation, layout)
  return primitives.flash(q_BxLxHxDh, k_BxLxKxDh, v_BxLxKxDh, mask.segment_BxL, call)


def _layout() -> primitives.Layout | None:
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
  return primitives.Layout(mesh, batch, heads)


def _check(q_BxLxHxDh: jax.Array, k_BxLxKxDh: jax.Array, v_BxLxKxDh: jax.Array, mask: Mask) -> None:
  q, k, v = q_BxLxHxDh.shape, k_BxLxKxDh.shape, v_BxLxKxDh.shape
  if not (len(q) == len(k) == 4 and k == v and (*q[:2], q[3]) == (*k[:2], k[3]) and q[2] % k[2] == 0):
    raise ValueError(f'attention: q {q}, k {k}, v {v}: want B x L x H x Dh, and k and v alike B x L x K x Dh, with H a '
                     'multiple of K')
  dtypes = [x.dtype for x in (q_BxLxHxDh, k_BxLxKxDh, v_BxLxKxDh)]
  if len(set(dtypes)) > 1 or not jnp.issubdtype(dtypes[0], jnp.floating):
    raise ValueError(f'attention: q, k, v are {", ".join(map(str, dtypes))}; want one type, float32 or bfloat16')
  segment = mask.segment_BxL
  if segment is not None and (segment.shape != q[:2] or not jnp.issubdtype(segment.dtype, jnp.integer)):
    raise ValueError(f'attention: mask.segment_BxL is {segment.dtype} {segment.shape}, want int32 B x L = {q[:2]}')
