"""Devices that are not here: compilation ahead of time for a TPU slice or for GPUs, on any machine.

`devices('v5e:16x16')` needs libtpu, `devices('h200:8')` the CUDA plugin; neither needs its hardware.  Nothing can run
on such devices, and no array can be put there: programs are lowered from shapes with shardings.
"""

import importlib.metadata
import importlib.util
import math
import os
import re

import jax

from datasel.hardware import CHIPS, Chip

NAMES = 'v4:2x2x2, v5e:16x16, v5p:4x4x8, v6e:8x8 (a TPU and its slice), h100, h200, h200:8 (a GPU and how many)'
_TPU_COMPILERS, _GPU_COMPILERS = ('libtpu',), ('jax-cuda13-plugin', 'jax-cuda12-plugin')
_MOST = 10_000  # chips; no slice or cluster that one program runs on has more
# What libtpu would else ask the cloud for, or complain about.
_NO_TPU_HERE = {'TPU_SKIP_MDS_QUERY': '1', 'TPU_ACCELERATOR_TYPE': 'v5litepod-4', 'TPU_WORKER_HOSTNAMES': 'localhost',
                'TPU_WORKER_ID': '0', 'TPU_STDERR_LOG_LEVEL': '3', 'TPU_MIN_LOG_LEVEL': '3',
                # libtpu lets one process of a machine load it, for the sake of the device; a compiler needs no turns.
                'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}

_GPU = '''
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: {bandwidth:.0f} l2_cache_size: {cache} clock_rate_ghz: 1.98
  device_memory_size: {memory:.0f} shared_memory_per_block_optin: 232448 cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{kind}"'''


def devices(name: str) -> tuple[Chip, list[jax.Device]]:
  """The chip and the devices of a topology by its name.

  Raises ValueError for a name that means none, ImportError where the compiler for it is not installed.
  """
  kind, _, size = name.partition(':')
  if kind not in CHIPS:
    raise ValueError(f'unknown topology {name!r}; want one such as {NAMES}')
  chip = CHIPS[kind]
  if chip.neighbours:
    return chip, _gpus(name, chip, size)
  return chip, _tpus(name, chip, size)


def compiler(chip: Chip) -> str:
  """'libtpu 0.0.42', for one: what compiles for this chip, which must be installed."""
  name = _installed(_GPU_COMPILERS if chip.neighbours else _TPU_COMPILERS)[0]
  return f'{name} {importlib.metadata.version(name)}'


def _installed(distributions: tuple[str, ...]) -> list[str]:
  return [name for name in distributions if importlib.util.find_spec(name.replace('-', '_'))]


def _tpus(name: str, chip: Chip, size: str) -> list[jax.Device]:
  axes = 3 if chip.name in ('v4', 'v5p') else 2
  shape = [int(n) for n in size.split('x')] if re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', size) else []
  if len(shape) != axes or math.prod(shape) > _MOST:
    raise ValueError(f'topology {name!r}: a slice of {chip.name} has {axes} sides, such as '
                     f'{chip.name}:{"x".join("444"[:axes])}')
  if not _installed(_TPU_COMPILERS):
    raise ImportError(f'compiling for {name} needs libtpu; install it with: pip install -e .[tpu]')
  for variable, value in _NO_TPU_HERE.items():
    os.environ.setdefault(variable, value)
  host = [min(n, 2) for n in shape[:2]] + [1]
  # A v4 chip is one device, of two cores, only in this mode, which is what Cloud TPUs run in.
  mode = {'chip_config_name': 'megacore'} if chip.name == 'v4' else {}
  return _describe(name, platform='tpu', topology_name=name, chips_per_host_bounds=tuple(host), **mode)


def _gpus(name: str, chip: Chip, size: str) -> list[jax.Device]:
  if name != chip.name and not re.fullmatch(r'[1-9]\d*', size):
    raise ValueError(f'topology {name!r}: want a number of GPUs, such as {chip.name} or {chip.name}:8')
  count = int(size or 1)
  hosts, rest = (1, 0) if count <= chip.neighbours else divmod(count, chip.neighbours)
  if rest or count > _MOST:
    raise ValueError(f'topology {name!r}: {count} GPUs do not fill hosts of {chip.neighbours}')
  if not _installed(_GPU_COMPILERS):
    raise ImportError(f'compiling for {name} needs the CUDA plugin of jax; install it with: pip install -e .[cuda]')
  target = _GPU.format(bandwidth=chip.bandwidth, cache=50 * 2**20 if chip.name == 'h100' else 60 * 2**20,
                       memory=chip.memory, kind=f'NVIDIA {chip.kind}')
  return _describe(name, platform='cuda', topology_name='', target_config=target,
                   topology=f'1x{hosts}x{count // hosts}')


def _describe(name: str, **options) -> list[jax.Device]:
  from jax.experimental import topologies  # in here: it brings in jax's compiler clients
  try:
    return list(topologies.get_topology_desc(**options).devices)
  except jax.errors.JaxRuntimeError as e:
    raise ValueError(f'topology {name!r}: the compiler does not know it: {str(e).splitlines()[0]}') from e
