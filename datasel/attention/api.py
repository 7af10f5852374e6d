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
  if q_BxLxHxDh.shape[2] % k_BxLxKxDh.shape[2] or k_BxLxKxDh.shape != v_BxLxKxDh.shape:
    raise ValueError(f'attention: q {q_BxLxHxDh.shape}, k {k_BxLxKxDh.shape}, v {v_BxLxKxDh.shape}: want equal k and v '
                     'and a number of query heads that is a multiple of the key/value heads')
  name = 'reference' if implementation == 'auto' else implementation
  if name not in IMPLEMENTATIONS:
    raise ValueError(f'unknown attention implementation {name!r}; known: {sorted(["auto", *IMPLEMENTATIONS])}')
  return IMPLEMENTATIONS[name](q_BxLxHxDh, k_BxLxKxDh, v_BxLxKxDh, Mask() if mask is None else mask)
