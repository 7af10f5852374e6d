"""Checkpoints: one orbax step holds the state and the data iterator; a digest of its files proves it whole.

Orbax makes a step appear only when it is complete, but reads a flipped byte without a word and never falls back; so a
step counts here once `digests/STEP.json` lists the sha256 of its files, and a step that fails it is set aside.
"""

import dataclasses
import logging
import pathlib
import threading
from typing import Any

import jax
import orbax.checkpoint as ocp

from datasel import workdir
from datasel.step import State


class Checkpoints:
  """The checkpoints of one training stage, in `directory`."""

  def __init__(self, directory: pathlib.Path, *, keep: int):
    """keep: how many of the newest steps stay; at least 2, so that a damaged newest one has a predecessor."""
    if keep < 2:
      raise ValueError(f'checkpoints to keep: {keep}; want at least 2, so that a damaged one leaves another')
    self._directory = pathlib.Path(directory).absolute()
    self._digests = self._directory / 'digests'
    self._steps = self._directory / 'steps'
    self._steps.mkdir(parents=True, exist_ok=True)
    self._digests.mkdir(exist_ok=True)
    self._manager = ocp.CheckpointManager(self._steps, options=ocp.CheckpointManagerOptions(
      max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True))
    self._finisher: threading.Thread | None = None
    self._failure: BaseException | None = None

  def save(self, step: int, state: State, data_state: dict) -> None:
    """Saves in the background; returns as soon as the arrays may be donated.  Waits for an earlier save first."""
    self.wait()
    rest = dataclasses.replace(state, params=())
    self._manager.save(step, args=ocp.args.Composite(
      params=ocp.args.StandardSave(state.params), rest=ocp.args.StandardSave(rest), data=ocp.args.JsonSave(data_state)))
    self._finisher = threading.Thread(target=self._finish, args=(step,), name=f'checkpoint-{step}')
    self._finisher.start()

  def wait(self) -> None:
    """Blocks until the last save is on disk and proven; raises what went wrong with it."""
    if self._finisher is not None:
      self._finisher.join()
      self._finisher = None
    if self._failure is not None:
      failure, self._failure = self._failure, None
      raise failure

  def restore(self, abstract_state: State) -> tuple[int, State, dict] | None:
    """(step, state, data_state) of the newest step that is whole, or None.  Damaged steps are named and set aside.

    abstract_state: ShapeDtypeStructs with shardings; the checkpoint may come from another mesh.
    """
    step = self._newest_whole()
    if step is None:
      return None
    rest = dataclasses.replace(abstract_state, params=())
    restored = self._read(step, params=ocp.args.StandardRestore(abstract_state.params),
                          rest=ocp.args.StandardRestore(rest), data=ocp.args.JsonRestore())
    return step, dataclasses.replace(restored['rest'], params=restored['params']), restored['data']

  def restore_params(self, abstract_params: Any) -> Any:
    """The parameters alone of the newest whole step, to start another run from."""
    step = self._newest_whole()
    if step is None:
      raise FileNotFoundError(f'no whole checkpoint in {self._steps}: nothing to start from')
    return self._read(step, params=ocp.args.StandardRestore(abstract_params))['params']

  def close(self) -> None:
    self.wait()
    self._manager.close()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *exception: Any) -> None:
    self.close()

  def _finish(self, step: int) -> None:
    try:
      self._manager.wait_until_finished()
      if jax.process_index() == 0:
        workdir.write_json(self._digests / f'{step}.json', _file_digests(self._steps / str(step)))
        kept = {str(s) for s in self._manager.all_steps()}
        for old in self._digests.glob('*.json'):
          if old.stem not in kept:
            old.unlink()
    except BaseException as e:  # carried to the training thread, which raises it in wait()
      self._failure = e

  def _newest_whole(self) -> int | None:
    for step in sorted(self._manager.all_steps(), reverse=True):
      damage = self._damage(step)
      if damage is None:
        return step
      logging.warning('checkpoint %s %s; falling back to the one before it', self._steps / str(step), damage)
      self._set_aside(step)
    return None

  def _read(self, step: int, **items: Any) -> Any:
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**items))
    except (ValueError, KeyError) as e:
      raise ValueError(f'{self._steps / str(step)} does not hold the arrays that this run trains ({e}); use the model and '
                       'optimiser it was made with, or another workdir') from e

  def _damage(self, step: int) -> str | None:
    """What is wrong with a step's files, or None."""
    recorded = self._digests / f'{step}.json'
    if not recorded.exists():
      return 'was interrupted before it was proven whole'
    wanted, got = workdir.read_json(recorded), _file_digests(self._steps / str(step))
    bad = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
    return f'file {bad[0]} is missing or does not match its digest ({len(bad)} such files)' if bad else None

  def _set_aside(self, step: int) -> None:
    if jax.process_index() == 0:
      target = self._directory / 'damaged' / str(step)
      target.parent.mkdir(exist_ok=True)
      n = 0
      while target.exists():
        n += 1
        target = target.with_name(f'{step}-{n}')
      (self._steps / str(step)).rename(target)
    self._manager.reload()


def _file_digests(folder: pathlib.Path) -> dict[str, str]:
  return {str(p.relative_to(folder)): workdir.digest_file(p) for p in sorted(folder.rglob('*')) if p.is_file()}
