"""How many proxies are trained at the same time, from what a device can hold, before anything is trained."""

import dataclasses
import math
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax

from datasel import build, checks, processes

# Proxies that a device steps at the same time, at most: one fills a CPU, an accelerator waits for work that small.
CHUNK = {'cpu': 1, 'gpu': 64, 'tpu': 64}
_USABLE = 0.9  # of a device's memory: the rest is for batches on their way and for what an allocator cannot use


@dataclasses.dataclass(frozen=True)
class Plan:
  """Proxies in groups of nearly equal sizes, all trained by one compiled program.  Bytes are those of one device."""

  proxies: int
  groups: int
  devices: int
  chunk: int  # proxies of a device that are stepped at the same time
  state_bytes: int  # of one proxy
  needed: int
  available: int

  @property
  def padded(self) -> int:
    """Proxies of the program: those of the largest group and so many more that all devices have as many."""
    return -(-self.proxies // (self.groups * self.devices)) * self.devices

  def group(self, number: int) -> slice:
    return slice(self.proxies * number // self.groups, self.proxies * (number + 1) // self.groups)

  def words(self) -> str:
    """Two lines for the log."""
    empty = self.groups * self.padded - self.proxies
    groups = 'in one group' if self.groups == 1 else f'in {self.groups} groups, one after another,'
    return (f'{self.proxies} proxies {groups} of {self.padded // self.devices} on each of {self.devices} device(s), '
            f'{self.chunk} of them at a time{f" ({empty} of all places stay empty)" if empty else ""}\n'
            f'memory: {self.needed / 2**30:.2f} of {self.available / 2**30:.2f} GiB of a device; '
            f'{self.state_bytes / 2**20:.1f} MiB are the state of one proxy')


def plan(compiled: Callable[[int, int], Any], proxies: int, devices: int, *, state_bytes: int, chunk: int = 0,
         group: int = 0, groups: int = 0, available: int | None = None) -> tuple[Plan, Any]:
  """The fastest plan that fits, and its compiled step: as many at a time as fit, and no more in a group, for that would
  bring larger checkpoints and no speed; one at a time, as on a CPU, all together where their states fit.

  compiled(proxies of the program, chunk) -> the compiled step.  state_bytes: of one proxy.  chunk: at most, and group:
  proxies trained at the same time, at most; 0: as many as fit.  groups: exactly so many, as a swarm began with.
  available: bytes of a device; default what a run may have of it.
  Raises ValueError where not even one proxy fits.
  """
  if chunk < 0 or group < 0:
    raise ValueError(f'a chunk of {chunk} and a group of {group} proxies: want at least 1 each, or 0 for what fits')
  if available is None:
    available = int(_USABLE * processes.from_lead('reading the memory', checks.device_memory))
  steps = {}

  def needs(local: int, chunk: int) -> float:
    if local * state_bytes > available:
      return local * state_bytes  # not worth compiling
    if (local, chunk) not in steps:
      steps[local, chunk] = _attempt(compiled, local * devices, chunk)
    return math.inf if steps[local, chunk] is None else build.compiled_bytes(steps[local, chunk].memory_analysis())

  chunk = chunk or CHUNK[jax.default_backend()]
  groups = groups or (-(-proxies // group) if group else 1)
  most = -(-proxies // (groups * devices))
  local, chunk = _fitting(needs, most, min(chunk, most), available)
  groups = max(groups, -(-proxies // (local * devices)))
  local = -(-proxies // (groups * devices))  # groups of nearly equal sizes are no larger than they must be
  found = Plan(proxies, groups, devices, min(chunk, local), state_bytes, 0, available)
  return dataclasses.replace(found, needed=int(needs(local, found.chunk))), steps[local, found.chunk]


def _fitting(needs: Callable[[int, int], float], most: int, chunk: int, available: int) -> tuple[int, int]:
  """(proxies of a device, of which so many at a time) that fit."""
  while chunk > 1:
    if needs(chunk, chunk) <= available:
      return chunk, chunk
    chunk //= 2
  local = most
  while (needed := needs(local, 1)) > available:
    if local == 1:
      size = 'more than all of it' if math.isinf(needed) else f'{needed / 2**30:.2f} GiB'
      raise ValueError(f'one proxy needs {size} of a device that has {available / 2**30:.2f} GiB for it; raise '
                       'microbatches, or take a smaller model, batch or sequence')
    local = max(1, min(local - 1, int(local * available / needed)))
  return local, 1


def _attempt(compiled: Callable[[int, int], Any], proxies: int, chunk: int) -> Any:
  """The compiled step; None where the compiler itself finds that it does not fit."""
  try:
    return compiled(proxies, chunk)
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    return None


def check_disk(plan: Plan, directory: pathlib.Path, folder: pathlib.Path, copies: int) -> None:
  """Refuses a disk that cannot hold so many checkpoints of a group; what is in `folder` already is counted."""
  there = sum(p.stat().st_blocks * 512 for p in folder.rglob('*') if p.is_file())
  needed, free = copies * plan.padded * plan.state_bytes - there, shutil.disk_usage(directory).free
  if needed > free:
    raise OSError(f'the checkpoints of {plan.padded} proxies need {needed / 2**30:.2f} GiB more in {directory}, but '
                  f'the disk has {free / 2**30:.2f} GiB free; train fewer at the same time (group), free some space '
                  'or choose another workdir')
