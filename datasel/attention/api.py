"""One entry to attention: the caller says what is to be seen, the implementation is chosen here."""

import jax

from datasel.attention.masks import Mask
from datasel.attention.reference import reference

IMPLEMENTATIONS = {'reference': reference}


def attention(q_BxLxHxDh: jax.Array, k_BxLxKxDh: jax.Array, v_BxLxKxDh: jax.Array, mask: Mask | None = None, *,
              implementation: str = 'auto') -> jax.Array:
  """Grouped-query attention.

  q: B x L x H x Dh;  k, v: B x L x K x Dh with H a multiple of K;  float32 or bfloat16.  Scores, softmax and sums are
  float32; the result is B x L x H x Dh in q's dtype.  `mask` defaults to causal.  Differentiable in every mode.
  """
  mask = Mask() if mask is None else mask
  _check_shapes(q_BxLxHxDh.shape, k_BxLxKxDh.shape, v_BxLxKxDh.shape, mask)
  name = 'reference' if implementation == 'auto' else implementation
  if name not in IMPLEMENTATIONS:
    raise ValueError(f'unknown attention implementation {name!r}; known: {sorted(["auto", *IMPLEMENTATIONS])}')
  return IMPLEMENTATIONS[name](q_BxLxHxDh, k_BxLxKxDh, v_BxLxKxDh, mask)


def _check_shapes(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], mask: Mask) -> None:
  if not (len(q) == len(k) == 4 and k == v and (*q[:2], q[3]) == (*k[:2], k[3]) and q[2] % k[2] == 0):
    raise ValueError(f'attention: q {q}, k {k}, v {v}: want B x L x H x Dh, and k and v alike B x L x K x Dh, with H a '
                     'multiple of K')
  if mask.segment_BxL is not None and mask.segment_BxL.shape != q[:2]:
    raise ValueError(f'attention: mask.segment_BxL has shape {mask.segment_BxL.shape}, want B x L = {q[:2]}')
