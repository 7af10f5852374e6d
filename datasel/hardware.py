"""What the devices at hand could do at best, for MFU."""

import functools
import math
import time

import jax
import numpy as np

# Dense bf16 FLOP/s per jax device, from the makers' data sheets; the first name found in the device kind counts.
_PEAK_FLOPS = {
  'H200': 989e12, 'H100': 989e12, 'A100': 312e12, 'B200': 2250e12,
  'TPU v6': 918e12, 'TPU v5p': 459e12, 'TPU v5 lite': 197e12, 'TPU v5e': 197e12, 'TPU v5': 459e12, 'TPU v4': 275e12,
}


@functools.cache
def peak_flops_per_device() -> tuple[float, str]:
  """(dense bf16 FLOP/s of one device by its data sheet, source); for a device not listed, a measured matrix product."""
  kind = jax.devices()[0].device_kind
  for name, peak in _PEAK_FLOPS.items():
    if name.lower() in kind.lower():
      return peak, f'{kind} data sheet, dense bf16'
  n, repeats = 1536, 3
  product = jax.jit(lambda a: a @ a)
  a = jax.device_put(np.random.default_rng(0).standard_normal((n, n)).astype(np.float32), jax.devices()[0])
  product(a).block_until_ready()
  best = math.inf
  for _ in range(repeats):
    began = time.perf_counter()
    product(a).block_until_ready()
    best = min(best, time.perf_counter() - began)
  return 2 * n**3 / best / jax.local_device_count(), f'{kind}: best of {repeats} float32 {n}^3 matrix products'
