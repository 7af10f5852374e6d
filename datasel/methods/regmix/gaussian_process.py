"""Gaussian process: the loss is a smooth function of the square roots of the weights, Matern 5/2 in each.

  loss = offset + scale * (f(sqrt(w)) + noise),   f ~ GP(0, a^2 k(r)),   r^2 = sum_m (sqrt(w_m) - sqrt(w'_m))^2 / l_m^2

Square roots, because the first percent of a domain changes more than the last.  Rasmussen and Williams 2006, 2.2, 5.4.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from scipy import linalg, optimize

from datasel.methods.regmix import tables

MOST_ROWS = 8192  # the kernel of more does not fit a small machine
# Log-normal priors, (mean, deviation) of the log, of what is fitted to losses of deviation 1: length scales where a
# weight's square root runs from 0 to 1, the deviation of f, the deviation of a run's noise.
PRIOR = {'length': (0.5, 0.7), 'amplitude': (math.log(2), 1.0), 'noise': (math.log(0.1), 1.0)}
_BOUNDS = {'length': (-3.0, 5.0), 'amplitude': (-4.0, 5.0), 'noise': (-7.0, 1.0)}
_STARTS = ((0.5, math.log(2), math.log(0.1)), (-0.5, 0.0, math.log(0.3)), (1.5, math.log(4), math.log(0.03)))
_SMALLEST = 1e-12  # added to a weight: its square root then has a slope at 0
_FEW = 128
_ROWS = 4096  # predicted at a time


@jax.custom_jvp
def matern(squared: jax.Array) -> jax.Array:
  """(1 + r + r^2 / 3) exp(-r) of squared = r^2 / 5; its slope at 0 is finite."""
  r = jnp.sqrt(5 * squared)
  return (1 + r + r * r / 3) * jnp.exp(-r)


@matern.defjvp
def _matern_slope(primals, tangents):
  r = jnp.sqrt(5 * primals[0])
  return matern(primals[0]), -5 / 6 * (1 + r) * jnp.exp(-r) * tangents[0]


def kernel(inputs_AxM: jax.Array, inputs_BxM: jax.Array, log_length_M: jax.Array, log_amplitude: jax.Array):
  """The covariance [A, B] of f between two sets of inputs, which are square roots of weights."""
  a_AxM, b_BxM = inputs_AxM * jnp.exp(-log_length_M)[None], inputs_BxM * jnp.exp(-log_length_M)[None]
  squared_AxB = jnp.square(a_AxM).sum(-1)[:, None] + jnp.square(b_BxM).sum(-1)[None] - 2 * a_AxM @ b_BxM.T
  return jnp.exp(2 * log_amplitude) * matern(jnp.maximum(squared_AxB, 0))


@jax.custom_vjp
def negative_log_likelihood(covariance_NxN: jax.Array, y_N: jax.Array) -> jax.Array:
  """-log N(y; 0, covariance), without its constant N/2 log(2 pi)."""
  return _likelihood_forward(covariance_NxN, y_N)[0]


def _likelihood_forward(covariance_NxN, y_N):
  cholesky_NxN = jnp.linalg.cholesky(covariance_NxN)
  alpha_N = jax.scipy.linalg.cho_solve((cholesky_NxN, True), y_N)
  value = 0.5 * jnp.sum(y_N * alpha_N) + jnp.log(jnp.diagonal(cholesky_NxN)).sum()
  return value, (cholesky_NxN, alpha_N)


def _likelihood_backward(saved, slope):
  # In closed form: differentiating through the Cholesky factor would cost several times as much.
  cholesky_NxN, alpha_N = saved
  inverse_NxN = jax.scipy.linalg.cho_solve((cholesky_NxN, True), jnp.eye(len(alpha_N), dtype=alpha_N.dtype))
  return slope * 0.5 * (inverse_NxN - alpha_N[:, None] * alpha_N[None]), slope * alpha_N


negative_log_likelihood.defvjp(_likelihood_forward, _likelihood_backward)


def negative_log_posterior(theta_P: jax.Array, inputs_NxM: jax.Array, y_N: jax.Array) -> jax.Array:
  """What is minimised over theta = log lengths [M], log amplitude, log noise; y of mean 0 and deviation 1."""
  log_length_M, log_amplitude, log_noise = theta_P[:-2], theta_P[-2], theta_P[-1]
  covariance_NxN = kernel(inputs_NxM, inputs_NxM, log_length_M, log_amplitude)
  covariance_NxN += _noise_variance(log_noise, jnp) * jnp.eye(len(y_N), dtype=y_N.dtype)
  value = negative_log_likelihood(covariance_NxN, y_N)
  for name, logs in (('length', log_length_M), ('amplitude', log_amplitude), ('noise', log_noise)):
    value += 0.5 * jnp.square((logs - PRIOR[name][0]) / PRIOR[name][1]).sum()
  return value


def _noise_variance(log_noise, np=np):
  return np.exp(2 * log_noise) + 1e-8  # which keeps the factorisation in range where runs repeat to the bit


_value_and_slope = jax.jit(jax.value_and_grad(negative_log_posterior))
_kernel = jax.jit(kernel)


@dataclasses.dataclass(frozen=True)
class GaussianProcess:
  """A fitted process.  All float64; lengths and the amplitude in units of square roots and of `scale`."""

  inputs_NxM: np.ndarray
  offset: float
  scale: float
  log_length_M: np.ndarray
  log_amplitude: float
  log_noise: float
  inverse_NxN: np.ndarray  # of the Cholesky factor of the runs' covariance, lower triangular
  alpha_N: np.ndarray

  @property
  def noise(self) -> float:
    """Nats: the standard deviation of a run's loss about the law."""
    return self.scale * math.sqrt(_noise_variance(self.log_noise))

  @property
  def importance(self) -> np.ndarray:
    """float64 [M]: 1 / length scale, how fast the loss changes with the square root of each weight."""
    return np.exp(-self.log_length_M)

  def moments(self, weights_NxM: np.ndarray, variance: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
    """float64 [N] twice: the law's posterior mean, and variance (None if not asked for, which is much faster)."""
    means, variances = [], []
    with _precise():
      state = jax.tree.map(jnp.asarray, self._state)
      for first in range(0, len(weights_NxM), _ROWS):
        some_NxM = tables.normalised(np.asarray(weights_NxM[first:first + _ROWS], np.float64))
        # Few shapes, so that few programs are compiled.
        rows = next(size for size in (1, 64, _ROWS) if size >= len(some_NxM))
        padded_NxM = np.concatenate([some_NxM, np.tile(some_NxM[-1:], (rows - len(some_NxM), 1))])
        mean_N, variance_N = _moments(state, padded_NxM, variance)
        means.append(np.asarray(mean_N)[:len(some_NxM)])
        variances.append(np.asarray(variance_N)[:len(some_NxM)] if variance else None)
    return np.concatenate(means), np.concatenate(variances) if variance else None

  def covariance(self, weights_AxM: np.ndarray, weights_BxM: np.ndarray) -> np.ndarray:
    """float64 [A, B]: the joint posterior covariance of the law at two sets of mixtures, in nats^2."""
    inputs = [_inputs(tables.normalised(np.asarray(weights, np.float64))) for weights in (weights_AxM, weights_BxM)]
    between = lambda *pair: np.asarray(_kernel(*pair, self.log_length_M, self.log_amplitude))
    with _precise():
      a_AxN, b_BxN = (between(some, self.inputs_NxM) @ self.inverse_NxN.T for some in inputs)
      return self.scale ** 2 * (between(*inputs) - a_AxN @ b_BxN.T)

  def mean(self, weights_M: jax.Array) -> jax.Array:
    """The law at one mixture, for jax to trace: take it under jax.enable_x64, in float32 it is good to about 1e-3."""
    return _moments(self._state, weights_M[None], False)[0][0]

  def standard_error(self, weights_M: jax.Array) -> jax.Array:
    """That of a new run's loss at one mixture, for jax to trace: take it under jax.enable_x64."""
    return jnp.sqrt(_moments(self._state, weights_M[None], True)[1][0] + self.noise ** 2)

  @property
  def _state(self):
    return (self.inputs_NxM, self.offset, self.scale, self.log_length_M, self.log_amplitude, self.inverse_NxN,
            self.alpha_N)


def fit(weights_NxM: np.ndarray, losses_N: np.ndarray) -> GaussianProcess:
  """The process of the hyperparameters of highest posterior density, from several starts (L-BFGS-B, float64)."""
  if len(losses_N) > MOST_ROWS:
    raise ValueError(f'a Gaussian process of {len(losses_N)} runs; want at most {MOST_ROWS}, or another model')
  inputs_NxM = _inputs(tables.normalised(weights_NxM))
  offset, scale = float(losses_N.mean()), float(losses_N.std())
  y_N = (losses_N - offset) / scale
  with _precise():
    theta_P = _fit_theta(inputs_NxM, y_N)
    log_length_M, log_amplitude, log_noise = theta_P[:-2], float(theta_P[-2]), float(theta_P[-1])
    covariance_NxN = np.array(_kernel(inputs_NxM, inputs_NxM, log_length_M, log_amplitude))
    covariance_NxN[np.diag_indices(len(y_N))] += _noise_variance(log_noise)
    cholesky_NxN = linalg.cholesky(covariance_NxN, lower=True)
    alpha_N = linalg.cho_solve((cholesky_NxN, True), y_N)
    inverse_NxN = linalg.solve_triangular(cholesky_NxN, np.eye(len(y_N)), lower=True)
  return GaussianProcess(inputs_NxM, offset, scale, log_length_M, log_amplitude, log_noise, inverse_NxN, alpha_N)


def _fit_theta(inputs_NxM: np.ndarray, y_N: np.ndarray) -> np.ndarray:
  def minimise(theta_P, rows):
    some_NxM, some_N = jnp.asarray(inputs_NxM[rows]), jnp.asarray(y_N[rows])

    def objective(theta_P):
      value, slope_P = _value_and_slope(theta_P, some_NxM, some_N)
      return float(value), np.asarray(slope_P)

    M = inputs_NxM.shape[1]
    bounds = [_BOUNDS['length']] * M + [_BOUNDS['amplitude'], _BOUNDS['noise']]
    return optimize.minimize(objective, theta_P, jac=True, method='L-BFGS-B', bounds=bounds, options={'maxiter': 200})

  # Which start leads to the best optimum is told from some of the rows, evenly spread over the order they are in.
  some = np.unique(np.linspace(0, len(y_N) - 1, _FEW).astype(int))
  starts = [np.array([length] * inputs_NxM.shape[1] + [amplitude, noise]) for length, amplitude, noise in _STARTS]
  best = min((minimise(theta_P, some) for theta_P in starts), key=lambda found: found.fun)
  return minimise(best.x, np.arange(len(y_N))).x


def _inputs(weights_NxM):
  return (weights_NxM + _SMALLEST) ** 0.5


def _posterior(state, weights_NxM, variance):
  inputs_NxM, offset, scale, log_length_M, log_amplitude, inverse_NxN, alpha_N = map(jnp.asarray, state)
  cross_RxN = kernel(_inputs(weights_NxM), inputs_NxM, log_length_M, log_amplitude)
  mean_R = offset + scale * (cross_RxN @ alpha_N)
  if not variance:
    return mean_R, None
  explained_R = jnp.square(cross_RxN @ inverse_NxN.T).sum(-1)
  return mean_R, scale ** 2 * jnp.maximum(jnp.exp(2 * log_amplitude) - explained_R, 0)


_moments = jax.jit(_posterior, static_argnums=2)


@contextlib.contextmanager
def _precise() -> Iterator[None]:
  """In float64, and on the CPU where jax has one beside its accelerator: TPUs have no such arithmetic."""
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.enable_x64(True))
    with contextlib.suppress(RuntimeError):
      stack.enter_context(jax.default_device(jax.local_devices(backend='cpu')[0]))
    yield
