"""The mixtures that proxies are trained on: the paper's sampler and two designs that spread further.

A design is n different mixtures of the domains of a prior, within a cap on each domain, on a grid of weights:
  paper          candidates from Dirichlet laws about the prior, those beyond a cap rejected (Liu et al. 2024)
  stratified     the same laws in equal shares, and each domain the largest of about equally many mixtures
  space_filling  candidates of the same laws, chosen one by one as far as can be from those already chosen
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import special

DESIGNS = ('paper', 'stratified', 'space_filling')
STRENGTHS = np.logspace(-1, np.log10(5), 15)
_log = logging.getLogger(__name__)
_CANDIDATES = 100  # for each mixture wanted, as in the paper
_CHUNK = 4_000_000  # weights in memory at a time
_SWEEPS = 60  # of the conditional sampler, before its state is taken for a draw


def design(kind: str, prior_M: Sequence[float], n: int, *, seed: int, upper_M: Sequence[float] | None = None,
           temperature: float = 0.5, strengths: Sequence[float] = STRENGTHS, grid: float = 2e-4) -> np.ndarray:
  """n different mixtures, float64 [n, M]: rows of whole multiples of `grid` that sum to 1, none above `upper_M`.

  kind: 'paper', 'stratified' or 'space_filling'.  prior_M: weights >= 0 in any unit; a domain of weight 0 stays out.
  upper_M: the most each domain may have, `caps(prior_M)` if None.  A candidate is Dirichlet(strength * p), p being the
  prior to the power `temperature`, normalised; what is below `grid` in it becomes 0, the rest is scaled and rounded so
  that it sums to 1 within the caps.  The same arguments give the same mixtures.
  Raises ValueError for arguments that allow no n different mixtures.
  """
  designs: dict[str, Callable] = dict(zip(DESIGNS, (_paper, _stratified, _space_filling)))
  if kind not in designs:
    raise ValueError(f'unknown design {kind!r}; known: {", ".join(DESIGNS)}')
  weights_NxM = _sampled(designs[kind], prior_M, n, seed, upper_M, temperature, strengths, grid)
  if len(weights_NxM) < n:
    raise ValueError(f'{len(weights_NxM)} different mixtures of {np.count_nonzero(prior_M)} domains were found within '
                     f'the caps on a grid of {grid:g}, {n} are wanted; ask for fewer, raise the caps, or use a finer '
                     'grid')
  return weights_NxM


def some(prior_M: Sequence[float], n: int, *, seed: int, upper_M: Sequence[float] | None = None,
         temperature: float = 0.5, strengths: Sequence[float] = STRENGTHS, grid: float = 2e-4) -> np.ndarray:
  """The paper's design as in `design`, but with as many mixtures as are found, at most n."""
  return _sampled(_paper, prior_M, n, seed, upper_M, temperature, strengths, grid)


def _sampled(kind: Callable, prior_M: Sequence[float], n: int, seed: int, upper_M: Sequence[float] | None,
             temperature: float, strengths: Sequence[float], grid: float) -> np.ndarray:
  if n < 1:
    raise ValueError(f'n is {n} mixtures; want at least 1')
  strengths_K = np.asarray(strengths, np.float64)
  if strengths_K.ndim != 1 or not strengths_K.size or not (np.isfinite(strengths_K) & (strengths_K > 0)).all():
    raise ValueError(f'strengths are {strengths_K.tolist()}; want positive numbers')
  if not 0 < temperature <= 1:
    raise ValueError(f'temperature is {temperature}; want above 0 and at most 1, where the prior is used as it is')
  prior_M = _normalised_prior(prior_M)
  known_D = np.flatnonzero(prior_M)
  if known_D.size < 2:
    raise ValueError('the prior has one domain of positive weight; a mixture needs two')
  units = round(1 / grid) if 0 < grid <= 1 else 0
  if units < 1 or abs(units * grid - 1) > 1e-9:
    raise ValueError(f'grid is {grid}; want 1 divided by a whole number, such as 2e-4 or 1e-3')
  upper_M = caps(prior_M) if upper_M is None else upper_M
  _, upper_M = box(np.zeros_like(prior_M), upper_M)
  base_D = prior_M[known_D] ** temperature
  laws = _Laws(base_D / base_D.sum(), strengths_K, upper_M[known_D], units)
  counts_NxD = kind(np.random.Generator(np.random.Philox(seed)), laws, n)
  counts_NxM = np.zeros((len(counts_NxD), len(prior_M)), np.int64)
  counts_NxM[:, known_D] = counts_NxD
  return counts_NxM / units


def caps(prior_M: Sequence[float], *, usage: float = 15.0, tokens_M: Sequence[float] | None = None,
         epochs: float | None = None, run_tokens: float | None = None) -> np.ndarray:
  """upper_M: the most of a run each domain may be: min(usage * prior, 1), the prior normalised to sum to 1.

  With tokens_M (that each domain has), epochs and run_tokens (of the run planned), no domain is repeated more than
  `epochs` times either: the cap is at most epochs * tokens / run_tokens.
  """
  if not usage > 0:
    raise ValueError(f'usage is {usage}; want how many times its prior a domain may have, above 0')
  upper_M = np.minimum(_normalised_prior(prior_M) * usage, 1)
  given = [value is not None for value in (tokens_M, epochs, run_tokens)]
  if not any(given):
    return upper_M
  if not all(given):
    raise ValueError('caps by epochs need tokens_M, epochs and run_tokens; give all three or none')
  tokens_M = np.asarray(tokens_M, np.float64)
  if tokens_M.shape != upper_M.shape or not (np.isfinite(tokens_M) & (tokens_M >= 0)).all():
    raise ValueError(f'tokens_M is {tokens_M.tolist()}; want a number >= 0 for each of the {len(upper_M)} domains')
  if not (epochs > 0 and run_tokens > 0):
    raise ValueError(f'epochs {epochs}, run_tokens {run_tokens}; want both above 0')
  upper_M = np.minimum(upper_M, epochs * tokens_M / run_tokens)
  if upper_M.sum() < 1:
    raise ValueError(f'{tokens_M.sum():,.0f} tokens at {epochs:g} epochs and {usage:g} times the prior fill '
                     f'{upper_M.sum():.4g} of a run of {run_tokens:,.0f} tokens; allow more epochs, or a shorter run')
  return upper_M


def box(lower_M: Sequence[float], upper_M: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
  """The bounds as float64 [M]; ValueError unless 0 <= lower <= upper <= 1 and some mixture is between them."""
  lower_M, upper_M = np.asarray(lower_M, np.float64), np.minimum(np.asarray(upper_M, np.float64), 1)
  if lower_M.ndim != 1 or lower_M.shape != upper_M.shape:
    raise ValueError(f'the bounds have shapes {lower_M.shape} and {upper_M.shape}; want one number for each domain')
  bad_M = ~((lower_M >= 0) & (lower_M <= upper_M))  # also where one is NaN
  if bad_M.any():
    m = int(np.argmax(bad_M))
    raise ValueError(f'domain {m} is bounded by {lower_M[m]:g} and {upper_M[m]:g}; want 0 <= lower <= upper <= 1')
  if lower_M.sum() > 1 + 1e-9 or upper_M.sum() < 1 - 1e-9:
    raise ValueError(f'the lower bounds sum to {lower_M.sum():.6g} and the upper ones to {upper_M.sum():.6g}; no '
                     'mixture is between them: want at most 1 and at least 1')
  return lower_M, upper_M


def draw(rng: np.random.Generator, concentration_M: Sequence[float], n: int, lower_M: Sequence[float],
         upper_M: Sequence[float]) -> np.ndarray:
  """n draws, float64 [n, M], from Dirichlet(concentration) given that they are within the bounds.

  By rejection; where less than one draw in a hundred is within them, by a Markov chain of the same law.  A domain of
  concentration 0 has weight 0.
  """
  concentration_M = np.asarray(concentration_M, np.float64)
  lower_M, upper_M = box(lower_M, upper_M)
  known_D = np.flatnonzero(concentration_M)
  if (np.delete(lower_M, known_D) > 0).any():
    raise ValueError('a domain of prior 0 has a lower bound above 0; give it a prior, or no lower bound')
  lower_D, upper_D = box(lower_M[known_D], upper_M[known_D])
  drawn_NxM = np.zeros((n, len(concentration_M)))
  alpha_D, done, tried = concentration_M[known_D], 0, 0
  while done < n:
    rows = min(max(1, _CHUNK // len(known_D)), max(1000, 2 * (n - done)))
    weights_KxD = _dirichlet(rng, np.broadcast_to(alpha_D, (rows, len(known_D))))
    weights_KxD = weights_KxD[((weights_KxD >= lower_D) & (weights_KxD <= upper_D)).all(-1)][:n - done]
    drawn_NxM[done:done + len(weights_KxD), known_D] = weights_KxD
    done, tried = done + len(weights_KxD), tried + rows
    if done < n and done < tried / 100:
      break
  chains = min(n - done, 2000)
  while done < n:
    if tried:  # the first time
      state_CxD = _feasible(chains, lower_D, upper_D)
    alpha_CxD = np.broadcast_to(alpha_D, state_CxD.shape)
    state_CxD = _sweep(rng, state_CxD, alpha_CxD, lower_D, upper_D, _SWEEPS if tried else 4)
    taken = min(chains, n - done)
    drawn_NxM[done:done + taken, known_D] = state_CxD[:taken]
    done, tried = done + taken, 0
  return drawn_NxM


def distances(a_NxM: np.ndarray, b_KxM: np.ndarray) -> np.ndarray:
  """float64 [N, K]: how far apart mixtures are, from 0 to 1 where they share no domain (Hellinger)."""
  return np.sqrt(np.clip(1 - np.sqrt(a_NxM) @ np.sqrt(b_KxM).T, 0, 1))


class _Laws:
  """The Dirichlet laws of a design, K of them over D domains, and their candidates as counts that sum to `units`."""

  def __init__(self, base_D: np.ndarray, strengths_K: np.ndarray, upper_D: np.ndarray, units: int):
    self.base_D, self.strengths_K, self.upper_D, self.units = base_D, strengths_K, upper_D, units
    self.most_D = np.floor(upper_D * units + 1e-9).astype(np.int64)
    if self.most_D.sum() < units:
      raise ValueError(f'the caps of the domains with a prior sum to {self.most_D.sum() / units:.6g} on a grid of '
                       f'{1 / units:g}; want at least 1: raise them, or use a finer grid')

  def candidates(self, rng: np.random.Generator, rows: int, k: int | None = None) -> np.ndarray:
    """What is left of `rows` candidates: of law k, or each of a law drawn at random.

    Given up where the caps leave less than one in a thousand: too few for any design.
    """
    kept_NxD, tried = np.zeros((0, len(self.base_D)), np.int64), 0
    while tried < rows and len(kept_NxD) >= tried / 1000:
      size = min(max(1, _CHUNK // len(self.base_D)), 10_000, rows - tried)
      strengths_N = self.strengths_K[rng.integers(len(self.strengths_K), size=size) if k is None else [k] * size]
      weights_NxD = _dirichlet(rng, strengths_N[:, None] * self.base_D)
      kept_NxD = np.concatenate([kept_NxD, self.on_grid(weights_NxD[(weights_NxD <= self.upper_D).all(-1)])])
      tried += size
    return kept_NxD

  def conditional(self, rng: np.random.Generator, rows: int, k: int) -> np.ndarray:
    """At most `rows` candidates of law k given that they are within the caps, however rare that is."""
    shape = (rows, len(self.base_D))
    alpha_NxD = np.broadcast_to(self.strengths_K[k] * self.base_D, shape)
    lower_D = np.zeros(shape[1])
    state_NxD = _feasible(rows, lower_D, self.upper_D)
    return self.on_grid(_sweep(rng, state_NxD, alpha_NxD, lower_D, self.upper_D, _SWEEPS))

  def by_strength(self, rng: np.random.Generator, rows: int) -> list[np.ndarray]:
    """For each law different candidates out of `rows`, and a twentieth of that where the caps leave fewer."""
    pools = []
    for k in range(len(self.strengths_K)):
      pool = self.candidates(rng, rows, k)
      few = -(-rows // 20)
      pools.append(np.unique(pool if len(pool) >= few else self.conditional(rng, few, k), axis=0))
    return pools

  def on_grid(self, weights_NxD: np.ndarray) -> np.ndarray:
    """The weights as counts: below one unit 0, the rest by largest remainder; rows that find no room are left out."""
    kept_NxD = np.where(weights_NxD * self.units < 1, 0, weights_NxD)
    total_N = kept_NxD.sum(-1)
    kept_NxD = kept_NxD[total_N > 0] / total_N[total_N > 0, None]
    exact_NxD = kept_NxD * self.units
    counts_NxD = np.minimum(np.floor(exact_NxD + 1e-9).astype(np.int64), self.most_D)
    while True:
      short_N = self.units - counts_NxD.sum(-1)
      room_NxD = (counts_NxD < self.most_D) & (kept_NxD > 0)
      more_N = (short_N > 0) & room_NxD.any(-1)
      if not more_N.any():
        return counts_NxD[short_N == 0]
      missing_NxD = np.where(room_NxD, exact_NxD - counts_NxD, -np.inf)
      rank_NxD = np.argsort(np.argsort(-missing_NxD, axis=-1, kind='stable'), axis=-1)
      counts_NxD += (rank_NxD < short_N[:, None]) & room_NxD


def _paper(rng: np.random.Generator, laws: _Laws, n: int) -> np.ndarray:
  """n of the candidates at random, each of a strength at random, 100 for each that is wanted."""
  counts_NxD = np.unique(laws.candidates(rng, _CANDIDATES * n), axis=0)
  if len(counts_NxD) < n:
    _log.info('%d of %d candidates are within the caps and different, %d are wanted: they are drawn from the same laws '
              'given the caps, each strength in equal shares', len(counts_NxD), _CANDIDATES * n, n)
    counts_NxD = np.unique(np.concatenate(laws.by_strength(rng, 20 * -(-4 * n // len(laws.strengths_K)))), axis=0)
  return counts_NxD[rng.choice(len(counts_NxD), min(n, len(counts_NxD)), replace=False)]


def _stratified(rng: np.random.Generator, laws: _Laws, n: int) -> np.ndarray:
  """Deals out the strengths in turn; of its candidates, one whose largest domain has been the largest of fewest."""
  K = len(laws.strengths_K)
  pools = laws.by_strength(rng, _CANDIDATES * -(-n // K))
  largest: list[dict[Any, list[int]]] = []
  for pool_NxD in pools:
    stacks: dict[Any, list[int]] = {}
    for i in rng.permutation(len(pool_NxD)):
      stacks.setdefault(int(np.argmax(pool_NxD[i])), []).append(int(i))
    largest.append(stacks)
  tie_D = rng.permutation(len(laws.base_D))
  times_D = np.zeros(len(laws.base_D), np.int64)
  chosen: dict[bytes, np.ndarray] = {}
  while len(chosen) < n and any(largest):
    for pool_NxD, stacks in zip(pools, largest):
      while stacks:
        m = min(stacks, key=lambda m: (times_D[m], tie_D[m]))
        row_D = pool_NxD[stacks[m].pop()]
        if not stacks[m]:
          del stacks[m]
        if row_D.tobytes() not in chosen:
          chosen[row_D.tobytes()] = row_D
          times_D[m] += 1
          break
      if len(chosen) == n:
        break
  return np.array(list(chosen.values()), np.int64).reshape(-1, len(laws.base_D))


def _space_filling(rng: np.random.Generator, laws: _Laws, n: int) -> np.ndarray:
  """First the candidate nearest to the laws' mean, then always the one farthest from its nearest chosen one."""
  pool_NxD = np.unique(np.concatenate(laws.by_strength(rng, 40 * -(-n // len(laws.strengths_K)))), axis=0)
  if not len(pool_NxD):
    return pool_NxD
  root_NxD = np.sqrt(pool_NxD / laws.units)
  chosen = [int(np.argmax(root_NxD @ np.sqrt(laws.base_D)))]
  nearest_N = root_NxD @ root_NxD[chosen[0]]  # the cosine to the nearest chosen one
  while len(chosen) < min(n, len(pool_NxD)):
    nearest_N[chosen[-1]] = np.inf
    chosen.append(int(np.argmin(nearest_N)))
    np.maximum(nearest_N, root_NxD @ root_NxD[chosen[-1]], out=nearest_N)
  return pool_NxD[chosen]


def _dirichlet(rng: np.random.Generator, alpha_NxD: np.ndarray) -> np.ndarray:
  """One draw a row, by logarithms of gamma variates: those of a tiny concentration would be 0 as they are."""
  log_NxD = np.log(rng.standard_gamma(alpha_NxD + 1)) - rng.standard_exponential(alpha_NxD.shape) / alpha_NxD
  return special.softmax(log_NxD, axis=-1)


def _feasible(rows: int, lower_D: np.ndarray, upper_D: np.ndarray) -> np.ndarray:
  room_D = upper_D - lower_D
  return np.tile(lower_D + room_D * ((1 - lower_D.sum()) / max(room_D.sum(), 1e-300)), (rows, 1))


def _sweep(rng: np.random.Generator, weights_NxD: np.ndarray, alpha_NxD: np.ndarray, lower_D: np.ndarray,
           upper_D: np.ndarray, sweeps: int) -> np.ndarray:
  """Gibbs sampling of Dirichlet laws within bounds: in turn each of many random pairs of domains is shared anew.

  What a pair has together, s, is kept; the share of the first is Beta(alpha_i, alpha_j) within what the bounds allow.
  """
  weights_NxD = weights_NxD.copy()
  D = weights_NxD.shape[1]
  for _ in range(sweeps):
    order_D = rng.permutation(D)
    i, j = order_D[:D // 2], order_D[D // 2:D // 2 * 2]
    s = weights_NxD[:, i] + weights_NxD[:, j]
    scale = np.maximum(s, 1e-300)
    low = np.clip(np.maximum(lower_D[i] / scale, 1 - upper_D[j] / scale), 0, 1)
    high = np.clip(np.minimum(upper_D[i] / scale, 1 - lower_D[j] / scale), low, 1)
    share = rng.beta(alpha_NxD[:, i], alpha_NxD[:, j])
    outside = ~((share >= low) & (share <= high))
    share[outside] = _truncated_beta(rng, alpha_NxD[:, i][outside], alpha_NxD[:, j][outside], low[outside],
                                     high[outside])
    first = np.clip(s * share, lower_D[i], upper_D[i])  # rounding alone is clipped
    weights_NxD[:, i] = first
    weights_NxD[:, j] = np.clip(s - first, lower_D[j], upper_D[j])
  return weights_NxD


def _truncated_beta(rng: np.random.Generator, a: np.ndarray, b: np.ndarray, low: np.ndarray,
                    high: np.ndarray) -> np.ndarray:
  """Draws of Beta(a, b) given that they are in [low, high], by inverting the distribution function."""
  flip = low + high > 1  # there its complement has the digits
  a, b = np.where(flip, b, a), np.where(flip, a, b)
  low, high = np.where(flip, 1 - high, low), np.where(flip, 1 - low, high)
  below, above = special.betainc(a, b, low), special.betainc(a, b, high)
  share = np.clip(special.betaincinv(a, b, below + (above - below) * rng.random(a.shape)), low, high)
  return np.where(flip, 1 - share, share)


def _normalised_prior(prior_M: Sequence[float]) -> np.ndarray:
  prior_M = np.asarray(prior_M, np.float64)
  if prior_M.ndim != 1 or not (np.isfinite(prior_M) & (prior_M >= 0)).all() or not prior_M.sum() > 0:
    raise ValueError(f'the prior is {prior_M.tolist()}; want a vector of numbers >= 0, not all 0')
  return prior_M / prior_M.sum()
