"""Laws of the profile: xprof's own readers open it and find the steps that were traced."""

import gzip
import json

import jax
import pytest
import small_run
from xprof.convert import raw_to_tool_data

from datasel import main

# ml_collections loads a config file by it.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')

STEPS = 3


@pytest.fixture(scope='module')
def profiled(tmp_path_factory):
  """(a finished run of 6 steps, what it logged)"""
  folder, said = tmp_path_factory.mktemp('profiled'), []
  config = small_run.write_config(folder / 'config.py', small_run.make_store(folder))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('datasel.train.logging.info', lambda text, *values: said.append(text % values))
    assert main.main([f'--config={config}', f'--workdir={folder / "run"}', f'--config.profile_steps={STEPS}']) == 0
  return folder / 'run', said


def test_xprof_finds_the_traced_steps_and_the_program_they_ran(profiled):
  [path] = (profiled[0] / 'profile' / 'main').glob('plugins/profile/*/*.xplane.pb')  # where xprof looks for a session
  text, kind = raw_to_tool_data.xspace_to_tool_data([str(path)], 'trace_viewer', {})
  events = json.loads(text)['traceEvents']
  steps = sorted(event['name'] for event in events if 'step_num' in event.get('args', {}))
  # Of 6 steps the last 3: the first ones compile.
  assert kind == 'application/json' and steps == ['train 3', 'train 4', 'train 5']
  assert any('laid_out' in event.get('name', '') for event in events)
  overview, _ = raw_to_tool_data.xspace_to_tool_data([str(path)], 'overview_page', {})
  assert json.loads(overview)


def test_the_log_says_how_to_open_the_trace(profiled):
  directory, said = profiled
  [line] = [line for line in said if 'xprof' in line]
  assert f'xprof --logdir={directory / "profile"} ' in line and str(directory / 'profile/main/memory.prof') in line


def test_the_memory_profile_is_pprofs_and_names_who_allocated(profiled):
  content = gzip.decompress((profiled[0] / 'profile/main/memory.prof').read_bytes())
  assert b'main.py' in content and b'train.py' in content and jax.default_backend().encode() in content
