"""Checkpoints: one orbax step holds the state and the data iterator; a manifest of its files proves it whole.

Orbax makes a step appear only when it is complete, but reads a flipped byte without a word, casts to another dtype
without a word, and never falls back; so a step counts here once `digests/STEP.json` lists the sha256 of its files and
the shapes of its arrays, and a step that fails it is set aside.

  DIRECTORY/steps/STEP/         what orbax writes; STEP.orbax-checkpoint-tmp was left by a kill and is removed
  DIRECTORY/digests/STEP.json   {files: {name: sha256}, arrays: {name: 'float32 [4, 5]'}}, written last
  DIRECTORY/damaged/STEP/       steps that were set aside, for a look; nothing reads them
"""

import contextlib
import dataclasses
import errno
import functools
import logging
import pathlib
import threading
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

from datasel import processes, workdir
from datasel.step import State


class Checkpoints:
  """The checkpoints of one training stage, in `directory`.  Writes nothing there before `restore` or `save`."""

  def __init__(self, directory: pathlib.Path, *, keep: int, keep_every: int | None = None):
    """keep: how many of the newest steps stay; at least 2, so that a damaged newest one has a predecessor.
    keep_every: steps that are multiples of it stay too."""
    if keep < 2:
      raise ValueError(f'checkpoints to keep: {keep}; want at least 2, so that a damaged one leaves another')
    self._directory = pathlib.Path(directory).absolute()
    self._digests = self._directory / 'digests'
    self._steps = self._directory / 'steps'
    self._keep, self._keep_every = keep, keep_every
    self._finisher: threading.Thread | None = None
    self._failure: BaseException | None = None

  @functools.cached_property
  def _manager(self) -> ocp.CheckpointManager:
    self._steps.mkdir(parents=True, exist_ok=True)
    self._digests.mkdir(exist_ok=True)
    return ocp.CheckpointManager(self._steps, options=ocp.CheckpointManagerOptions(
      max_to_keep=self._keep, keep_period=self._keep_every, enable_async_checkpointing=True,
      cleanup_tmp_directories=True))

  def save(self, step: int, state: State, data_state: dict) -> None:
    """Saves in the background; returns as soon as the arrays may be donated.  Waits for an earlier save first.

    Raises OSError (ENOSPC) when the disk is full, here or in the next `wait`.
    """
    self.wait()
    items = ocp.args.Composite(
      params=ocp.args.StandardSave(state.params), rest=ocp.args.StandardSave(dataclasses.replace(state, params=())),
      data=ocp.args.JsonSave(data_state))
    with _disk_full_is_an_os_error():
      if not self._manager.save(step, args=items):
        raise ValueError(f'{self._steps} did not take step {step}: its newest is {self._manager.latest_step()}; '
                         'restore before saving')
    self._finisher = threading.Thread(target=self._finish, args=(step, _arrays(state)), name=f'checkpoint-{step}')
    self._finisher.start()

  def wait(self) -> None:
    """Blocks until the last save is on disk and proven, on every process; raises what went wrong with it."""
    processes.together('saving a checkpoint', self._wait)

  def _wait(self) -> None:
    if self._finisher is not None:
      self._finisher.join()
      self._finisher = None
    if self._failure is not None:
      failure, self._failure = self._failure, None
      raise failure

  def restore(self, abstract_state: State) -> tuple[int, State, dict] | None:
    """(step, state, data_state) of the newest step that is whole, or None.  Damaged steps are named and set aside.

    abstract_state: ShapeDtypeStructs with shardings; the checkpoint may come from another mesh.
    Raises ValueError naming the arrays whose shape or dtype is another.
    """
    step = processes.from_lead('judging the checkpoints', lambda: self._newest_whole(set_aside=True))
    self._manager.reload()
    if step is None:
      return None
    self._check_arrays(step, _arrays(abstract_state))
    restored = self._manager.restore(step, args=ocp.args.Composite(
      params=ocp.args.StandardRestore(abstract_state.params),
      rest=ocp.args.StandardRestore(dataclasses.replace(abstract_state, params=())), data=ocp.args.JsonRestore()))
    return step, dataclasses.replace(restored['rest'], params=restored['params']), restored['data']

  def restore_params(self, abstract_params: Any, step: int | None = None) -> Any:
    """The parameters alone of a step, default the newest whole one, to start another run from.  Changes nothing in the
    directory, which may be another run's, even one still running."""
    found = processes.from_lead('judging the checkpoints', lambda: self._find(step))
    if isinstance(found, str):
      raise FileNotFoundError(found)
    step = found
    self._check_arrays(step, _arrays(State(None, abstract_params, None)), prefix='.params')
    with ocp.StandardCheckpointer() as checkpointer:
      return checkpointer.restore(self._steps / str(step) / 'params', abstract_params)

  def close(self) -> None:
    try:
      self._wait()  # alone: after an error of this process, the others are elsewhere
    finally:
      if '_manager' in vars(self):
        with contextlib.suppress(ValueError, OSError):  # orbax raises once more what `wait` raised
          self._manager.close()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *exception: Any) -> None:
    self.close()

  def _finish(self, step: int, arrays: dict[str, str]) -> None:
    try:
      with _disk_full_is_an_os_error():
        self._manager.wait_until_finished()
      if processes.lead():
        files = _file_digests(self._steps / str(step))
        workdir.write_json(self._digests / f'{step}.json', {'files': files, 'arrays': arrays})
        kept = {str(s) for s in self._manager.all_steps()}
        for old in self._digests.glob('*.json'):
          if old.stem not in kept:
            old.unlink()
    except BaseException as e:  # carried to the training thread, which raises it in wait()
      self._failure = e

  def _find(self, step: int | None) -> int | str:
    """A whole step, or why there is none."""
    if step is None:
      found = self._newest_whole(set_aside=False)
      return f'no whole checkpoint in {self._steps}: nothing to start from' if found is None else found
    damage = self._damage(step)
    return step if damage is None else f'checkpoint {self._steps / str(step)} {damage}'

  def _newest_whole(self, *, set_aside: bool) -> int | None:
    steps = sorted((int(p.name) for p in self._steps.glob('*') if p.name.isdecimal()), reverse=True)
    for step in steps:
      damage = self._damage(step)
      if damage is None:
        return step
      moved = f'; moved to {self._set_aside(step)}, which may be deleted' if set_aside else ''
      logging.warning('checkpoint %s %s%s; falling back to the one before it', self._steps / str(step), damage, moved)
    if steps:
      logging.warning('%s: none of its %d checkpoints was whole; going on without one', self._steps, len(steps))
    return None

  def _damage(self, step: int) -> str | None:
    """What is wrong with a step's files, or None."""
    recorded = self._digests / f'{step}.json'
    if not recorded.exists():
      return f'was interrupted before it was proven whole (no {recorded})'
    try:
      wanted = workdir.read_json(recorded)['files']
    except ValueError as e:
      return f'cannot be proven whole: {e}'
    got = _file_digests(self._steps / str(step))
    bad = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
    return f'file {bad[0]} is missing or does not match its digest ({len(bad)} such files)' if bad else None

  def _set_aside(self, step: int) -> pathlib.Path:
    target = self._directory / 'damaged' / str(step)
    target.parent.mkdir(exist_ok=True)
    n = 0
    while target.exists():
      n += 1
      target = target.with_name(f'{step}-{n}')
    (self._steps / str(step)).rename(target)
    (self._digests / f'{step}.json').unlink(missing_ok=True)
    return target

  def _check_arrays(self, step: int, wanted: dict[str, str], prefix: str = '') -> None:
    recorded = workdir.read_json(self._digests / f'{step}.json')['arrays']
    stored = {name: array for name, array in recorded.items() if name.startswith(prefix)}
    differ = [f'{name}: {stored.get(name, "absent")} there, {wanted.get(name, "absent")} here'
              for name in sorted(stored.keys() | wanted.keys()) if stored.get(name) != wanted.get(name)]
    if differ:
      raise ValueError(f'{self._steps / str(step)} does not hold the arrays that this run trains: '
                       f'{"; ".join(differ[:5])} ({len(differ)} in all); use the model and optimiser it was made with, '
                       'or another workdir')


def _arrays(tree: Any) -> dict[str, str]:
  """{'.params['embed']': 'float32 [64, 32]', ...}"""
  return {jax.tree_util.keystr(path): f'{a.dtype} {list(a.shape)}'
          for path, a in jax.tree_util.tree_leaves_with_path(tree)}


@contextlib.contextmanager
def _disk_full_is_an_os_error() -> Iterator[None]:
  """TensorStore says it in the words of a ValueError."""
  try:
    yield
  except ValueError as e:
    if 'No space left on device' not in str(e):
      raise
    raise OSError(errno.ENOSPC, 'No space left on device while saving a checkpoint') from e


def _file_digests(folder: pathlib.Path) -> dict[str, str]:
  return {str(p.relative_to(folder)): workdir.digest_file(p) for p in sorted(folder.rglob('*')) if p.is_file()}
