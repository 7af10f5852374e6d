"""The one training loop."""

import contextlib
import dataclasses
import logging
import math
import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax

from datasel import metrics as metrics_lib
from datasel import processes, sharding, workdir
from datasel.batch import Batch
from datasel.checkpoint import Checkpoints
from datasel.step import Objective, State, init_state, train_step


class Interrupted(Exception):
  """SIGTERM or Ctrl-C arrived; the state is saved."""


@dataclasses.dataclass(frozen=True)
class Program:
  """A train step compiled for a mesh: where its state lives, how it begins, how a host batch reaches it."""

  mesh: jax.sharding.Mesh
  rules: sharding.Rules
  abstract_state: State  # ShapeDtypeStructs with shardings
  init: Callable[[jax.Array], State]
  step: Callable[[State, Batch], tuple[State, dict]]

  def put(self, batch: Batch) -> Batch:
    """This process's rows of a global batch -> global device arrays."""
    return sharding.put(self.mesh, batch, self.rules)


def program(init_params: Callable[[jax.Array], Any], logical_axes: Any, *, objective: Objective,
            tx: optax.GradientTransformation, mesh: jax.sharding.Mesh, aux: Any = (), microbatches: int = 1,
            rules: sharding.Rules = sharding.RULES) -> Program:
  """Compiles (lazily) `train_step` with the state sharded over `mesh` by its logical axes and donated at each call.

  Places nothing: the devices of the mesh may be absent ones, to compile for.
  """
  init = lambda key: init_state(init_params(key), tx, aux)
  abstract = jax.eval_shape(init, jax.random.key(0))
  params = sharding.tree_shardings(mesh, abstract.params, logical_axes, rules)
  whole = sharding.replicated(mesh)
  shardings = State(
    step=whole, params=params, opt_state=sharding.optimizer_shardings(mesh, tx, abstract.params, params),
    aux=jax.tree.map(lambda _: whole, abstract.aux))
  abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)
  rows = sharding.batch_sharding(mesh, rules)

  def laid_out(state, batch):
    with sharding.use(mesh, rules):
      return train_step(state, batch, objective=objective, tx=tx, microbatches=microbatches)

  return Program(
    mesh=mesh, rules=rules, abstract_state=abstract, init=jax.jit(init, out_shardings=shardings),
    step=jax.jit(laid_out, donate_argnums=0, in_shardings=(shardings, rows), out_shardings=(shardings, whole)))


def fit(program: Program, batches: Any, *, key: jax.Array, stage: str, total_steps: int, checkpoints: Checkpoints,
        writer: metrics_lib.Writer, log_every: int, checkpoint_every: int, tokens_per_step: int, flops_per_step: float,
        peak_flops: float, progress: metrics_lib.Progress, name_examples: Callable[[Batch], str],
        evaluate: Callable[[Any], dict] | None = None, eval_every: int = 0,
        initial_params: Callable[[], Any] | None = None,
        describe: Callable[[int, dict], dict] = lambda step, values: values, profile_steps: int = 0,
        profile_directory: pathlib.Path | None = None) -> State:
  """Trains to `total_steps` from the newest whole checkpoint, or from the start; returns the final state.

  batches: an iterator with get_state/set_state.  evaluate(params) -> values for metrics.jsonl.  describe(step, metrics
  as NumPy) -> values for metrics.jsonl.  initial_params() is called where there is no checkpoint yet.
  name_examples(batch) names its examples in the error when a loss is not finite.
  Raises Interrupted after saving on SIGTERM or Ctrl-C, FloatingPointError on a loss or gradient that is not finite.
  """
  restored = checkpoints.restore(program.abstract_state)
  if restored is None:
    start, state = 0, program.init(key)
    if initial_params is not None:
      state = dataclasses.replace(state, params=initial_params())
  else:
    start, state, data_state = restored
    batches.set_state(data_state)
  writer.rewind(stage, -1 if restored is None else start)  # step 0 is evaluated again when nothing was saved
  progress.skip(start * flops_per_step)
  report = _Reporter(stage, total_steps, writer, log_every, tokens_per_step, flops_per_step, peak_flops, progress,
                     name_examples, describe)

  # From the sixth step, past compilation and first reads, where the stage is long enough.
  trace_first = start + max(0, min(5, total_steps - start - profile_steps))
  trace_end = min(trace_first + profile_steps, total_steps)

  # Without jit every operation moves its own constants, so the guard would forbid them all.
  guard = jax.transfer_guard('allow' if jax.config.jax_disable_jit else 'disallow')

  # THE ORDER BELOW IS A CONTRACT.  A checkpoint holds a state and an iterator that has produced exactly the batches the
  # state has seen, and metrics.jsonl holds exactly the records up to it: so a resumed run repeats an uninterrupted one.
  with stop_requests(log_every) as stop, contextlib.ExitStack() as trace, guard:
    for step in range(start, total_steps + 1):
      last, stopping = step == total_steps, stop.requested(step)  # asked once: a signal may come at any time
      if evaluate is not None and (step > start or step == 0) and (last or (eval_every and step % eval_every == 0)):
        report.flush()
        with report.outside_training():
          writer.write(stage, 'eval', step, evaluate(state.params))
      if step > start and (last or stopping or step % checkpoint_every == 0):
        report.flush()  # a state that is not finite is found here, before it is saved
        checkpoints.save(step, state, batches.get_state())  # before next(): see above
      if stopping:
        checkpoints.wait()
        raise Interrupted(f'{stage}: stopped after step {step} of {total_steps}, with all of them saved')
      if last:
        break
      if profile_steps and step == trace_first and processes.lead():
        trace.enter_context(_trace(profile_directory, stage))
      with report.data_wait:
        batch = next(batches)
      with jax.profiler.StepTraceAnnotation('train', step_num=step):
        state, step_metrics = program.step(state, program.put(batch))
      if program.mesh.size > 1 and jax.default_backend() == 'cpu':
        jax.block_until_ready(step_metrics)  # simulated devices share too few cores to run two steps' collectives
      report.add(step + 1, step_metrics, batch)  # reads the step before: dispatch never waits for its own step
      if profile_steps and step + 1 == trace_end:
        jax.block_until_ready(state)  # with the work of its last step in it
        trace.close()
    checkpoints.wait()
    if stop.requested(0):  # came during the last evaluation or save: the stages after this one must not begin
      raise Interrupted(f'{stage}: done, all of it saved')
  return state


@contextlib.contextmanager
def _trace(directory: pathlib.Path, stage: str) -> Iterator[None]:
  """A trace as xprof and TensorBoard read it, in DIRECTORY/STAGE, and who holds device memory at its end, for pprof."""
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0  # it hooks into all threads, of data and checkpoints too, and slows what it shows
  with jax.profiler.trace(str(directory / stage), profiler_options=options):
    yield
  memory = directory / stage / 'memory.prof'
  with workdir.replacing(memory) as f:
    f.write(jax.profiler.device_memory_profile())
  logging.info('traced %s; see it with: xprof --logdir=%s    device memory: pprof -http=: %s', stage, directory, memory)


class _Reporter:
  """Metrics one step late, speed and remaining time, and the guard against values that are not finite."""

  def __init__(self, stage, total_steps, writer, log_every, tokens_per_step, flops_per_step, peak_flops, progress,
               name_examples, describe):
    self._stage, self._total_steps, self._writer, self._log_every = stage, total_steps, writer, log_every
    self._tokens_per_step, self._flops_per_step, self._peak_flops = tokens_per_step, flops_per_step, peak_flops
    self._progress, self._name_examples, self._describe = progress, name_examples, describe
    self.data_wait = metrics_lib.Stopwatch()
    self._pending: tuple[int, dict, Batch] | None = None
    self._since, self._steps = time.perf_counter(), 0
    self._compiled = False

  def add(self, step: int, metrics: dict, batch: Batch) -> None:
    self.flush()
    self._pending = step, metrics, {name: batch[name] for name in ('domain_B', 'example_B') if name in batch}

  def flush(self) -> None:
    if self._pending is None:
      return
    step, metrics, batch = self._pending
    self._pending = None
    values = jax.device_get(metrics)
    guarded = {name: float(values[name]) for name in ('loss', 'grad_norm', 'update_norm')}
    if not all(map(math.isfinite, guarded.values())):
      raise FloatingPointError(
        f'{self._stage}: step {step} gave {", ".join(f"{name} {x}" for name, x in guarded.items())}; its examples: '
        f'{self._name_examples(batch)}.  Nothing after the last checkpoint is saved: look at these examples, lower '
        'optimizer.peak_lr, or lengthen the warm-up')
    if not self._compiled:  # the first step's time is mostly compilation
      self._compiled, self._since, self._steps = True, time.perf_counter(), 0
      self.data_wait.take()
    else:
      self._steps += 1
    if step % self._log_every == 0 or step == self._total_steps:
      self._write(step, values)

  @contextlib.contextmanager
  def outside_training(self) -> Iterator[None]:
    """Time that shall not count as training speed (evaluation)."""
    began = time.perf_counter()
    yield
    self._since += time.perf_counter() - began

  def _write(self, step: int, values: dict) -> None:
    seconds = time.perf_counter() - self._since
    timing = {}
    if self._steps:
      flops = self._steps * self._flops_per_step
      self._progress.add(flops, seconds)
      timing = {
        'time/tokens_per_second': self._steps * self._tokens_per_step / seconds,
        'time/mfu': flops / seconds / self._peak_flops,
        'time/data_wait_fraction': self.data_wait.take() / seconds,
      }
      each = seconds / self._steps
      logging.info(
        '%-18s %5d/%d  loss %.4f  %.1fk tokens/s  MFU %.0f%%  data wait %.1f%%  stage %s left, run %s left',
        self._stage, step, self._total_steps, values['loss'], timing['time/tokens_per_second'] / 1e3,
        100 * timing['time/mfu'], 100 * timing['time/data_wait_fraction'],
        metrics_lib.clock(each * (self._total_steps - step)),
        metrics_lib.clock(self._progress.seconds_left))
    described = {name: x if isinstance(x, dict) else float(x) for name, x in self._describe(step, values).items()}
    self._writer.write(self._stage, 'train', step, described | timing)
    self._since, self._steps = time.perf_counter(), 0


class Stop:
  """Whether this run was asked to stop; with several processes, they agree on the step."""

  def __init__(self, agree_every: int):
    self.signalled = False
    self._agree_every = agree_every

  def requested(self, step: int) -> bool:
    if jax.process_count() == 1:
      return self.signalled
    # The signal may reach one process only, or each at another step; asking costs a round trip, so not at every step.
    return step % self._agree_every == 0 and processes.any_of(self.signalled)


@contextlib.contextmanager
def stop_requests(agree_every: int) -> Iterator[Stop]:
  """SIGTERM (preemption) and the first Ctrl-C ask a loop to save and stop; a second Ctrl-C ends at once.

  agree_every: steps between two at which several processes ask each other.
  """
  stop = Stop(agree_every)

  def handler(signum, frame):
    if stop.signalled and signum == signal.SIGINT:
      raise KeyboardInterrupt
    logging.warning('%s: saving a checkpoint, then stopping', signal.Signals(signum).name)
    stop.signalled = True

  try:
    previous = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT)}
  except ValueError:  # not the main thread (a notebook's worker): its owner handles signals
    previous = {}
  try:
    yield stop
  finally:
    for s, old in previous.items():
      signal.signal(s, old)
