"""Laws of checkpoints: what comes back is what was saved, and what is damaged is named and never used."""

import errno
import logging
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from datasel import sharding, workdir
from datasel.checkpoint import Checkpoints
from datasel.step import State


def state(step, shape=(4, 6), dtype=jnp.float32, **more):
  values = jax.random.normal(jax.random.key(step), shape).astype(dtype)
  return State(jnp.int32(step), {'w': values, **more}, {'mu': {'w': values * 2}}, {'log_alpha_M': jnp.arange(3.0)})


def abstract(of, place=None):
  place = place or sharding.replicated(sharding.make_mesh(1, devices=jax.devices()[:1]))
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), of)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  directory = tmp_path_factory.mktemp('saved')
  with Checkpoints(directory, keep=2) as checkpoints:
    for step in (4, 8, 12):
      checkpoints.save(step, state(step), {'position': 10 * step})
  return directory


@pytest.fixture
def copy(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / 'checkpoints')


def restored(directory, wanted=None):
  with Checkpoints(directory, keep=2) as checkpoints:
    return checkpoints.restore(abstract(state(0) if wanted is None else wanted))


def assert_is(got, step):
  assert (got[0], got[2]) == (step, {'position': 10 * step})
  jax.tree.map(np.testing.assert_array_equal, got[1], state(step))


def largest_file(directory, step):
  """That of the arrays' bytes."""
  return max((p for p in (directory / 'steps' / str(step)).rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)


def test_what_comes_back_is_what_was_saved(saved):
  assert_is(restored(saved), 12)


def test_it_keeps_the_newest(saved):
  assert sorted(p.name for p in (saved / 'steps').iterdir()) == ['12', '8']
  assert sorted(p.name for p in (saved / 'digests').iterdir()) == ['12.json', '8.json']


def test_to_keep_one_is_refused(tmp_path):
  with pytest.raises(ValueError, match='want at least 2'):
    Checkpoints(tmp_path, keep=1)


def test_another_mesh_reads_the_same_values(saved):
  mesh = sharding.make_mesh(1, 4, 1)
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('fsdp'))
  wanted = abstract(state(0))
  params = {'w': jax.ShapeDtypeStruct((4, 6), jnp.float32, sharding=place)}
  with Checkpoints(saved, keep=2) as checkpoints:
    _, got, _ = checkpoints.restore(State(wanted.step, params, wanted.opt_state, wanted.aux))
  assert len(got.params['w'].addressable_shards) == 4
  np.testing.assert_array_equal(got.params['w'], state(12).params['w'])


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


DAMAGE = {
  'a flipped byte': lambda d: flip(largest_file(d, 12)),
  'a truncated file': lambda d: largest_file(d, 12).write_bytes(largest_file(d, 12).read_bytes()[:-1]),
  'a missing file': lambda d: largest_file(d, 12).unlink(),
  'missing orbax metadata': lambda d: (d / 'steps' / '12' / '_CHECKPOINT_METADATA').unlink(),
  'a file too many': lambda d: (d / 'steps' / '12' / 'params' / 'more').write_text(''),
  'a missing digest (a kill before it was written)': lambda d: (d / 'digests' / '12.json').unlink(),
  'a damaged digest': lambda d: (d / 'digests' / '12.json').write_bytes(b'{"files": \xff'),
  'an empty digest': lambda d: (d / 'digests' / '12.json').write_text(''),
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_step_is_named_set_aside_and_passed_over(copy, caplog, damage):
  DAMAGE[damage](copy)
  with caplog.at_level(logging.WARNING):
    assert_is(restored(copy), 8)
  [warning] = [r.getMessage() for r in caplog.records if r.name == 'root']
  for told in (str(copy / 'steps' / '12'), str(copy / 'damaged' / '12'), 'falling back'):
    assert told in warning
  assert (copy / 'damaged' / '12').is_dir() and not (copy / 'steps' / '12').exists()
  caplog.clear()
  assert_is(restored(copy), 8)
  assert not [r for r in caplog.records if r.name == 'root']


def test_the_damaged_file_is_named(copy, caplog):
  path = largest_file(copy, 12)
  flip(path)
  with caplog.at_level(logging.WARNING):
    restored(copy)
  assert str(path.relative_to(copy / 'steps' / '12')) in caplog.text


def test_a_step_set_aside_can_be_saved_again(copy):
  for _ in range(2):
    flip(largest_file(copy, 12))
    with Checkpoints(copy, keep=2) as checkpoints:
      assert_is(checkpoints.restore(abstract(state(0))), 8)
      checkpoints.save(12, state(12), {'position': 120})
    assert_is(restored(copy), 12)
  assert sorted(p.name for p in (copy / 'damaged').iterdir()) == ['12', '12-1']


def test_without_a_whole_step_there_is_nothing_and_it_is_said(copy, caplog):
  for step in (8, 12):
    flip(largest_file(copy, step))
  with caplog.at_level(logging.WARNING):
    assert restored(copy) is None
  assert 'none of its 2 checkpoints was whole' in caplog.text


def test_an_empty_directory_holds_nothing_and_that_is_no_warning(tmp_path, caplog):
  assert restored(tmp_path / 'new') is None
  assert not [r for r in caplog.records if r.name == 'root']


def test_what_a_kill_in_a_save_left_is_passed_over_and_removed(copy):
  shutil.copytree(copy / 'steps' / '12', copy / 'steps' / '16.orbax-checkpoint-tmp')
  (copy / 'steps' / '16.orbax-checkpoint-tmp' / '_CHECKPOINT_METADATA').write_text('{')
  with Checkpoints(copy, keep=2) as checkpoints:
    assert_is(checkpoints.restore(abstract(state(0))), 12)
    checkpoints.save(16, state(16), {'position': 160})
  assert sorted(p.name for p in (copy / 'steps').iterdir()) == ['12', '16']
  assert_is(restored(copy), 16)


OTHER = {
  'shape': (state(0, shape=(4, 7)), r"\.params\['w'\]: float32 \[4, 6\] there, float32 \[4, 7\] here"),
  'dtype': (state(0, dtype=jnp.bfloat16), r"\.params\['w'\]: float32 \[4, 6\] there, bfloat16"),
  'one more': (state(0, more=jnp.ones(2)), r"\.params\['more'\]: absent there, float32 \[2\] here"),
  'none': (State(jnp.int32(0), {}, {'mu': {}}, ()), r"\.aux\['log_alpha_M'\]: float32 \[3\] there, absent here"),
}


@pytest.mark.parametrize('other', OTHER)
def test_other_arrays_are_refused_by_name(copy, other):
  wanted, message = OTHER[other]
  with pytest.raises(ValueError, match=message):
    restored(copy, wanted)
  assert_is(restored(copy), 12)


def test_parameters_alone_come_back_and_the_directory_is_left_as_it_was(copy):
  flip(largest_file(copy, 12))
  (copy / 'steps' / '16.orbax-checkpoint-tmp').mkdir()  # the other run may be saving just now
  before = {p: p.stat().st_mtime_ns for p in copy.rglob('*')}
  with Checkpoints(copy, keep=2) as reader:
    got = reader.restore_params(abstract(state(0)).params)
  np.testing.assert_array_equal(got['w'], state(8).params['w'])
  assert {p: p.stat().st_mtime_ns for p in copy.rglob('*')} == before


def test_parameters_of_another_shape_are_refused_by_name(copy):
  with Checkpoints(copy, keep=2) as reader, pytest.raises(ValueError, match=r"\['w'\]: float32 \[4, 6\] there"):
    reader.restore_params(abstract(state(0, shape=(3, 6))).params)


def test_no_step_to_start_from_is_an_error(tmp_path):
  reader = Checkpoints(tmp_path / 'none', keep=2)
  with pytest.raises(FileNotFoundError, match='nothing to start from'):
    reader.restore_params(abstract(state(0)).params)
  assert not (tmp_path / 'none').exists()


def test_a_save_that_is_not_taken_is_an_error(copy):
  with Checkpoints(copy, keep=2) as checkpoints, pytest.raises(ValueError, match='did not take step 8'):
    checkpoints.save(8, state(8), {'position': 80})


# What TensorStore says on a full file system, here as recorded on a 300 kB tmpfs.
FULL = ('RESOURCE_EXHAUSTED: Error writing "w/0.0" in OCDBT database at local file "/x/ocdbt.process_0/": Failed '
        "writing: \"/x/d/6c83\": Failed to write 321428 bytes to file 4: No space left on device [os_error_code='28']")


def test_a_disk_full_in_the_background_is_raised_by_the_next_wait(copy, monkeypatch):
  checkpoints = Checkpoints(copy, keep=2)
  assert_is(checkpoints.restore(abstract(state(0))), 12)

  def full(*args):
    raise ValueError(FULL)

  with pytest.raises(OSError) as caught, checkpoints:
    with monkeypatch.context() as patched:
      patched.setattr(checkpoints._manager, 'wait_until_finished', full)
      checkpoints.save(16, state(16), {'position': 160})
      checkpoints.wait()
  assert caught.value.errno == errno.ENOSPC
  assert not (copy / 'digests' / '16.json').exists()


def test_a_disk_full_while_the_digest_is_written_is_raised_too(copy, monkeypatch):
  def full(path, value):
    raise OSError(errno.ENOSPC, 'No space left on device', str(path))

  monkeypatch.setattr(workdir, 'write_json', full)
  with pytest.raises(OSError) as caught, Checkpoints(copy, keep=2) as checkpoints:
    checkpoints.save(16, state(16), {'position': 160})
  assert caught.value.errno == errno.ENOSPC
  monkeypatch.undo()
  assert_is(restored(copy), 12)


def test_a_folder_that_is_no_step_is_ignored(copy):
  pathlib.Path(copy / 'steps' / 'notes').mkdir()
  assert_is(restored(copy), 12)
