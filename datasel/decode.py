"""The compiled part of decoding: one program reads a batch of prompts, one adds tokens, one scores continuations.

What a program is compiled for is its `Program`, its number of rows and its lengths; everything else is an argument.
"""

import contextlib
import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from datasel import sharding


class Constraint(Protocol):
  """What a row may say next: pure functions over a state per row.

  A pytree of arrays (a registered dataclass): they are arguments of the compiled program, never constants in it.
  """

  def begin(self, index_B: np.ndarray) -> Any:
    """The first states, a pytree of arrays with the rows first.  Called on the host with the prompts' numbers."""

  def mask(self, carry: Any) -> jax.Array:
    """bool B x V: the tokens that may come next, end of text among them where the row may end.  Traced."""

  def advance(self, carry: Any, token_B: jax.Array) -> Any:
    """The states after these tokens.  Traced."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Automaton:
  """A deterministic automaton over tokens, as a `Constraint`.

  next_SxV: int32, the state after each token in each state; -1: that token is refused there.  End of text is a token
  like others: allow it where a text may end.  start: int32, the first state of every prompt, or one for each prompt.
  """

  next_SxV: Any
  start: Any = dataclasses.field(default_factory=lambda: np.int32(0))

  def __post_init__(self):
    if not isinstance(self.next_SxV, np.ndarray):
      return  # rebuilt by jax around traced or device arrays
    S = len(self.next_SxV)
    for name, ndims, low in (('next_SxV', (2,), -1), ('start', (0, 1), 0)):
      x = np.asarray(getattr(self, name))
      if x.ndim not in ndims or not np.issubdtype(x.dtype, np.integer) or not x.size:
        raise ValueError(f'automaton {name} is {x.dtype} {x.shape}, want integers of {" or ".join(map(str, ndims))} '
                         'axes, at least one')
      if x.min() < low or x.max() >= S:
        raise ValueError(f'automaton {name} has values from {x.min()} to {x.max()}, want states of 0 to {S - 1}'
                         f'{", or -1 for refused" if low else ""}')
      object.__setattr__(self, name, x.astype(np.int32))

  def begin(self, index_B: np.ndarray) -> np.ndarray:
    if np.ndim(self.start) and index_B.max() >= len(self.start):
      raise ValueError(f'automaton: prompt {index_B.max()} has no first state, start holds {len(self.start)}; give one '
                       'for every prompt')
    return np.broadcast_to(self.start[index_B] if np.ndim(self.start) else self.start, index_B.shape).astype(np.int32)

  def mask(self, carry: jax.Array) -> jax.Array:
    return self.next_SxV[carry] >= 0

  def advance(self, carry: jax.Array, token_B: jax.Array) -> jax.Array:
    return self.next_SxV[carry, token_B]


@dataclasses.dataclass(frozen=True)
class Program:
  """What the programs are compiled for, beside shapes."""

  model: Any
  mesh: jax.sharding.Mesh | None
  rules: tuple  # items of the sharding rules, which must be hashable here
  greedy: bool = True
  top_k: int = 0
  nucleus: bool = False

  def layout(self) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if self.mesh is None else sharding.use(self.mesh, dict(self.rules))

  def whole(self, x: Any) -> Any:
    """On every device, so that every process can read it."""
    return x if self.mesh is None else jax.lax.with_sharding_constraint(x, sharding.replicated(self.mesh))


def warp(logits_BxV: jax.Array, temperature: jax.Array, top_k: int, top_p: jax.Array | None) -> jax.Array:
  """Logits of the distribution to draw from, -inf for what is cut: temperature, then top-k, then top-p.

  top_k: the largest k, and what equals the k-th; 0: all.  top_p: the fewest tokens, most likely first, that hold at
  least this probability; None: all.  The semantics and order of transformers' logits warpers.
  """
  # The largest one at 0: then no temperature, however small, overflows.
  logits_BxV = (logits_BxV - logits_BxV.max(axis=-1, keepdims=True)) / temperature
  if 0 < top_k < logits_BxV.shape[-1]:
    least_Bx1 = jax.lax.top_k(logits_BxV, top_k)[0][:, -1:]
    logits_BxV = jnp.where(logits_BxV < least_Bx1, -jnp.inf, logits_BxV)
  if top_p is not None:
    sorted_BxV = jnp.sort(logits_BxV, axis=-1)
    kept_BxV = jnp.cumsum(jax.nn.softmax(sorted_BxV, axis=-1), axis=-1) > 1 - top_p
    kept_BxV = kept_BxV.at[:, -1].set(True)
    least_Bx1 = jnp.where(kept_BxV, sorted_BxV, jnp.inf).min(axis=-1, keepdims=True)
    logits_BxV = jnp.where(logits_BxV < least_Bx1, -jnp.inf, logits_BxV)
  return logits_BxV


@functools.partial(jax.jit, static_argnames=('length', 'program'))
def read(params: dict, tokens_BxL: jax.Array, length_B: jax.Array, *, length: int,
         program: Program) -> tuple[jax.Array, Any]:
  """Reads prompts padded on the right: (the hidden state of each one's last token, B x 1 x D; their cache of `length`
  slots)."""
  with program.layout():
    hidden_BxLxD, cache = program.model.prefill(params, tokens_BxL, length)
    return jnp.take_along_axis(hidden_BxLxD, length_B[:, None, None] - 1, axis=1), cache


@functools.partial(jax.jit, static_argnames='program')
def begin(params: dict, last_Bx1xD: jax.Array, length_B: jax.Array, index_B: jax.Array, real_B: jax.Array, carry: Any,
          knobs: dict, constraint: Constraint | None, *, program: Program) -> tuple[dict, dict]:
  """Chooses the first token of each row, after texts of length_B tokens.

  Returns the state that, with the 'cache', is to be `add`ed to, and what the host needs: {'tokens_BxN', 'logprobs_BxN',
  'count_B', 'running_B', 'eos_B', 'dead_B'}, here N = 1.
  """
  with program.layout():
    state = {'carry': carry, 'index_B': index_B, 'position_B': length_B - 1, 'count_B': jnp.zeros_like(length_B),
             'token_B': jnp.zeros_like(length_B), 'running_B': real_B, 'eos_B': jnp.zeros_like(real_B),
             'dead_B': jnp.zeros_like(real_B)}
    state, logprob_B = _choose(program, params, last_Bx1xD, state, knobs, constraint)
    return state, _outcome(program, state, state['token_B'][:, None], logprob_B[:, None])


@functools.partial(jax.jit, static_argnames=('steps', 'program'), donate_argnames='state')
def add(params: dict, state: dict, keep_B: jax.Array, knobs: dict, constraint: Constraint | None, *, steps: int,
        program: Program) -> tuple[dict, dict]:
  """`steps` more tokens for the rows that are running and in `keep_B`, fewer when none is left.

  Returns as `begin` does, with N = `steps`; the tokens a row gained are its first ones.
  """
  with program.layout():
    state = state | {'running_B': state['running_B'] & keep_B}
    shape = (len(keep_B), steps)

    def step(carry):
      n, state, tokens_BxN, logprobs_BxN = carry
      # A row that has ended writes nothing.
      position_B = jnp.where(state['running_B'], state['position_B'], -1)
      hidden_Bx1xD, cache = program.model.extend(params, state['token_B'][:, None], position_B[:, None],
                                                 state['cache'])
      state, logprob_B = _choose(program, params, hidden_Bx1xD, state | {'cache': cache}, knobs, constraint)
      return n + 1, state, tokens_BxN.at[:, n].set(state['token_B']), logprobs_BxN.at[:, n].set(logprob_B)

    _, state, tokens_BxN, logprobs_BxN = jax.lax.while_loop(
      lambda carry: (carry[0] < steps) & carry[1]['running_B'].any(), step,
      (0, state, jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)))
    return state, _outcome(program, state, tokens_BxN, logprobs_BxN)


@functools.partial(jax.jit, static_argnames=('length', 'program'))
def grow(cache: Any, *, length: Any, program: Program) -> Any:
  """The same cache with room for `length` positions, or what else its model counts room by."""
  with program.layout():
    return program.model.grow(cache, length)


@functools.partial(jax.jit, static_argnames='program')
def score(params: dict, cache: Any, last_Bx1xD: jax.Array, tokens_BxL: jax.Array, targets_BxT: jax.Array,
          position_BxL: jax.Array, *, program: Program) -> jax.Array:
  """float32 B x T, T = L + 1: the log-probability of the first target after the text in the cache, whose last hidden
  state is given, and of the others after the tokens; the cache stays as it is."""
  with program.layout():
    hidden_BxLxD, _ = program.model.extend(params, tokens_BxL, position_BxL, cache)
    hidden_BxTxD = jnp.concatenate([last_Bx1xD, hidden_BxLxD], axis=1)
    return program.whole(-program.model.nll(params, hidden_BxTxD, targets_BxT))


def _choose(program: Program, params: dict, hidden_Bx1xD: jax.Array, state: dict, knobs: dict,
            constraint: Constraint | None) -> tuple[dict, jax.Array]:
  """The state with the next token of each running row, and that token's log-probability under the model itself."""
  # Whole rows on each device: what follows sorts them, or looks for their largest.
  logits_BxV = sharding.constrain(program.model.logits(params, hidden_Bx1xD)[:, 0], 'batch', None)
  running_B, allowed_BxV = state['running_B'], logits_BxV
  stuck_B = jnp.zeros_like(running_B)
  if constraint is not None:
    mask_BxV = constraint.mask(state['carry'])
    if mask_BxV.shape != logits_BxV.shape:
      raise ValueError(f'the constraint gives a mask of {mask_BxV.shape} for logits of {logits_BxV.shape}; want a '
                       'column for each token of the model, those beyond its tokenizer refused')
    stuck_B = running_B & ~mask_BxV.any(axis=-1)
    allowed_BxV = jnp.where(mask_BxV, logits_BxV, -jnp.inf)
  if program.greedy:
    token_B = jnp.argmax(allowed_BxV, axis=-1)
  else:
    # By prompt and position alone: what else is in the batch changes nothing.
    keys_B = jax.vmap(lambda i, n: jax.random.fold_in(jax.random.fold_in(knobs['key'], i), n))(
      state['index_B'], state['count_B'])
    warped_BxV = warp(allowed_BxV, knobs['temperature'], program.top_k, knobs['top_p'] if program.nucleus else None)
    token_B = jax.vmap(jax.random.categorical)(keys_B, warped_BxV)
  token_B = jnp.where(running_B, token_B, state['token_B']).astype(jnp.int32)
  logit_B = jnp.take_along_axis(logits_BxV, token_B[:, None], axis=-1)[:, 0]
  added_B = running_B & ~stuck_B
  count_B = state['count_B'] + added_B
  eos_B = added_B & (token_B[:, None] == knobs['eos_E'][None]).any(axis=-1)
  state = state | {
    'token_B': token_B, 'count_B': count_B, 'position_B': state['position_B'] + added_B,
    'eos_B': state['eos_B'] | eos_B, 'dead_B': state['dead_B'] | stuck_B,
    'running_B': added_B & ~eos_B & (count_B < knobs['max_new_tokens']),
    'carry': state['carry'] if constraint is None else constraint.advance(state['carry'], token_B)}
  return state, logit_B - jax.nn.logsumexp(logits_BxV, axis=-1)


def _outcome(program: Program, state: dict, tokens_BxN: jax.Array, logprobs_BxN: jax.Array) -> dict:
  status = {name: state[name] for name in ('count_B', 'running_B', 'eos_B', 'dead_B')}
  return program.whole({'tokens_BxN': tokens_BxN, 'logprobs_BxN': logprobs_BxN, **status})
