"""Compiles attention for an H200 that is not here: `bash launch/check_cuda.sh` runs it.

The kernels for every head dimension, and cuDNN's where it serves, on one device and nothing said about a mesh.
"""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from datasel import absent  # noqa: E402
from datasel.attention import Anchors, Mask, anchors, attention  # noqa: E402

place = jax.sharding.SingleDeviceSharding(absent.devices('h200')[1][0])


MASKS = {
  'plain': lambda segment: Mask(),
  'packed': lambda segment: Mask(segment_BxL=segment),
  'anchors': lambda segment: Mask(anchors=Anchors(anchors.segments(segment % 8 == 0, segment, keep_bos=True), 1024)),
}


def check(head_dim: int, dtype: str, mask: str, kernels: dict[str, int]) -> None:
  abstract = lambda heads: jax.ShapeDtypeStruct((4, 1024, heads, head_dim), dtype, sharding=place)
  segment = jax.ShapeDtypeStruct((4, 1024), jnp.int32, sharding=place)

  def product(q, k, v, segment):
    attend = lambda *x: attention(*x, MASKS[mask](segment)).astype(jnp.float32).sum()
    return jax.jvp(jax.grad(attend, (0, 1, 2)), (q, k, v), (q, k, v))

  lowered = jax.jit(product).trace(abstract(8), abstract(2), abstract(2), segment).lower(lowering_platforms=('cuda',))
  text = lowered.compile().as_text()
  found = {name: text.count(name) for name in kernels}
  print(f'head dimension {head_dim}, {dtype}, {mask}: {found}', flush=True)
  if found != kernels:
    raise SystemExit(f'error: want {kernels}')


TRITON, CUDNN = '__gpu$xla.gpu.triton', '__cudnn$fmha'
for head_dim in (64, 96, 128, 256):
  for mask in ('packed', 'anchors'):
    check(head_dim, 'bfloat16', mask, {TRITON: 6, CUDNN: 0})
check(64, 'float32', 'packed', {TRITON: 6, CUDNN: 0})
check(64, 'float32', 'anchors', {TRITON: 6, CUDNN: 0})
# cuDNN's forward and backward, our tangents of both.
check(128, 'bfloat16', 'plain', {TRITON: 3, CUDNN: 2})
