"""Gumbel noise that is the same to the bit on every machine: a pure function of a seed and of what it is added to."""

import hashlib
import json
import math

import numpy as np


def noise(seed: int, domain: str, first: int, last: int) -> np.ndarray:
  """float64 [last - first]: the standard Gumbel variates of records first..last-1 of a domain.

  Each is a pure function of (seed, domain, record): Philox counts the records (numpy promises the same raw words in
  every release), and the logarithms are ours.
  """
  name = json.dumps(['gumbel', seed, domain]).encode()
  key = np.frombuffer(hashlib.blake2b(name, digest_size=16).digest(), '<u8').astype(np.uint64)
  block, skipped = divmod(first, 4)  # one count gives four words
  words_N = np.random.Philox(key=key, counter=block).random_raw(last - first + skipped)[skipped:]
  uniform_N = ((words_N >> 12) + 0.5) * 2.0**-52  # never 0 or 1
  return -_log(-_log(uniform_N))


# Of fdlibm (e_log.c, Sun Microsystems 1993), whose algorithm this is.
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_SERIES = (1.479819860511658591e-01, 1.531383769920937332e-01, 1.818357216161805012e-01, 2.222219843214978396e-01,
           2.857142874366239149e-01, 3.999999999940941908e-01, 6.666666666666735130e-01)


def _log(x_N: np.ndarray) -> np.ndarray:
  """The natural logarithm of positive numbers, to within an ulp.

  Made of operations that IEEE 754 rounds in one way only: numpy's own may differ in the last bit between processors and
  releases, and a selection must not.
  """
  mantissa_N, exponent_N = np.frexp(x_N)
  low_N = mantissa_N < math.sqrt(0.5)
  f_N = np.where(low_N, 2 * mantissa_N, mantissa_N) - 1
  exponent_N = (exponent_N - low_N).astype(np.float64)
  s_N = f_N / (2 + f_N)
  z_N = s_N * s_N
  series_N = np.full_like(z_N, _SERIES[0])
  for coefficient in _SERIES[1:]:
    series_N *= z_N
    series_N += coefficient
  half_N = 0.5 * f_N * f_N
  return exponent_N * _LN2_HIGH - ((half_N - (s_N * (half_N + z_N * series_N) + exponent_N * _LN2_LOW)) - f_N)
