"""How benchmarks time: contenders take turns within one run, after a round that is not counted."""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


def take_turns(contenders: Mapping[str, Callable[[int], Any]], *, repeats: int,
               seconds: float = 0.2) -> dict[str, list[float]]:
  """Seconds of one call of each contender in each round.  A contender is called with a number: so many times in a row.

  It returns when all is done.  Fast ones are called often enough in a row to fill `seconds`.
  """
  if repeats < 1:
    raise ValueError(f'repeats is {repeats}, want at least 1')
  taken: dict[str, list[float]] = {name: [] for name in contenders}
  calls = {}
  for name, run in contenders.items():
    run(1)  # compiles
    calls[name] = max(1, round(seconds / _clock(run, 1)))
  for _ in range(repeats):
    for name, run in contenders.items():
      taken[name].append(_clock(run, calls[name]))
  return taken


def repeated(function: Callable, *operands: Any) -> Callable[[int], Any]:
  """A contender that dispatches a jitted function so many times and waits for the last."""
  def run(times: int) -> None:
    for _ in range(times):
      result = function(*operands)
    jax.block_until_ready(result)
  return run


def ratio(taken: Mapping[str, list[float]], name: str, other: str) -> float:
  """Median over the rounds of one contender's time over another's: what is slow about a moment cancels."""
  return statistics.median(a / b for a, b in zip(taken[name], taken[other]))


def limits(dtype: str) -> tuple[Callable[[int], Any], float, Callable[[int], Any], float]:
  """The device's ceilings, to be timed beside the contenders: (matrix product, its FLOPs, copy, bytes it moves)."""
  on_cpu = jax.default_backend() == 'cpu'
  n, elements = (1536, 2**25) if on_cpu else (8192, 2**30)
  a = jax.random.normal(jax.random.key(0), (n, n), dtype)  # zeros or ones would draw less power, and so run faster
  # A product of float32 as float32: accelerators would round it.
  product = jax.jit(functools.partial(jnp.matmul, precision='highest' if dtype == 'float32' else None))
  x = jnp.ones((elements,), jnp.bfloat16)
  return (repeated(product, a, a), 2.0 * n**3, repeated(jax.jit(lambda x: x + 1), x), 4.0 * elements)


def _clock(run: Callable[[int], Any], times: int) -> float:
  began = time.perf_counter()
  run(times)
  return (time.perf_counter() - began) / times
