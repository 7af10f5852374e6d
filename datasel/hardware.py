"""What devices could do at best: the chips we know, by their data sheets, and the machine at hand."""

import dataclasses
import functools
import math
import os
import time

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Chip:
  """One jax device.  Bytes and seconds; figures from the maker's data sheet unless said otherwise."""

  name: str
  kind: str  # part of jax's device_kind
  flops: float  # dense bf16 FLOP/s
  memory: float  # bytes of main memory: of a TPU what its compiler gives a program, of a GPU what its driver reports
  bandwidth: float  # bytes/s of main memory
  links: float  # bytes/s that can leave it over all its links to its neighbours
  neighbours: int = 0  # GPUs of a host, joined by these links; 0: the whole slice is
  network: float = math.inf  # bytes/s that can leave it for other hosts

  @property
  def available(self) -> float:
    """Bytes that a program can have: on a GPU the share that jax takes when it starts."""
    share = float(os.environ.get('XLA_PYTHON_CLIENT_MEM_FRACTION', 0.75)) if self.neighbours else 1.0
    return share * self.memory


CHIPS = {chip.name: chip for chip in (
  Chip('v4', 'TPU v4', 275e12, 30.75 * 2**30, 1228e9, 6 * 45e9),
  Chip('v5e', 'TPU v5 lite', 197e12, 15.75 * 2**30, 819e9, 4 * 45e9),
  Chip('v5p', 'TPU v5', 459e12, 95.74 * 2**30, 2765e9, 6 * 90e9),
  Chip('v6e', 'TPU v6', 918e12, 31.25 * 2**30, 1638e9, 4 * 90e9),
  Chip('h100', 'H100', 989e12, 79.6 * 2**30, 3350e9, 450e9, neighbours=8, network=50e9),
  Chip('h200', 'H200', 989e12, 140.4 * 2**30, 4800e9, 450e9, neighbours=8, network=50e9),
)}

# Dense bf16 FLOP/s; the first name found in the device kind counts.
_PEAK_FLOPS = {
  'A100': 312e12, 'B200': 2250e12, 'TPU v5p': 459e12, 'TPU v5e': 197e12,
  **{chip.kind: chip.flops for chip in CHIPS.values()},
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
  a = jax.device_put(np.random.default_rng(0).standard_normal((n, n)).astype(np.float32), jax.local_devices()[0])
  product(a).block_until_ready()
  best = math.inf
  for _ in range(repeats):
    began = time.perf_counter()
    product(a).block_until_ready()
    best = min(best, time.perf_counter() - began)
  # The devices of a CPU are parts of it, and the product ran on all of it.
  parts = jax.local_device_count() if jax.devices()[0].platform == 'cpu' else 1
  return 2 * n**3 / best / parts, f'{kind}: best of {repeats} float32 {n}^3 matrix products'
