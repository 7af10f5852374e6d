"""The gate for devices that are not here: what it says of a run is what the run is, and what does not fit is refused.

Compiling for TPUs needs libtpu (`pip install -e .[tpu]`), which launch/test.sh installs on Linux; for GPUs, see
launch/check_cuda.sh.
"""

import dataclasses
import importlib.util
import logging
import math
import pathlib
import runpy
import types

import jax
import pytest

from datasel import absent, build, command_line, forecast, hardware, hlo_costs, sharding, topology, workdir
from datasel.data import mixture
from datasel.methods.anllm import run as anllm
from datasel.methods.doremi import run as doremi
from datasel.models.presets import PRESETS

ROOT = pathlib.Path(__file__).parents[1]
# ml_collections loads config files in Python 3.11's old way.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec('libtpu') is None,
                                  reason="compiling for TPUs needs libtpu: pip install -e '.[tpu]'")
GIB = 2**30


@pytest.fixture(autouse=True)
def same_logging():
  root = logging.getLogger()
  handlers, level = root.handlers[:], root.level
  yield
  root.handlers[:] = handlers
  root.setLevel(level)


def gate(config, *arguments):
  return topology.main([f'--config={ROOT}/configs/{config}', *arguments])


def load(config, *overrides):
  argv = [f'--config={ROOT}/configs/{config}', *(f'--config.{o}' for o in overrides)]
  return command_line.load(argv, lambda flags: None, needs_data=False).config


table = runpy.run_path(str(ROOT / 'docs/make_topologies.py'))


@needs_libtpu
@pytest.mark.parametrize('name', ['v5e:2x2', 'v5p:2x2x1'])
def test_the_table_in_docs_is_what_the_compiler_says(name):
  row = ('pretrain/pds_160m:smoke', name, ())
  made, [kept] = table['make'](*row), workdir.read_json(ROOT / 'docs/topologies.json')[table['key'](*row)]['programs']
  [one] = made['programs']
  assert made['fits'] is one['fits'] is kept['fits'] is True
  assert one['memory']['total'] == pytest.approx(kept['memory']['total'], rel=0.15)  # other versions
  assert one['flops']['formula'] == kept['flops']['formula']
  assert one['flops']['counted'] == pytest.approx(kept['flops']['counted'], rel=0.02)
  assert one['compile_seconds'] > 0 and not one['unknown_loops']

  # And what the stage is, by hand: the smoke model's 8 x 64 tokens on 4 devices, float32, AdamW.
  model, holds = PRESETS['smoke'], one['memory']['holds']
  assert one['parameters'] == model.n_params and holds['parameters'] == 4 * model.n_params
  assert holds['optimiser state'] == pytest.approx(2 * holds['parameters'], rel=0.01)
  assert holds['batch'] == 5 * 4 * (8 // 4) * 64 + 4 * (8 // 4)
  assert one['flops']['formula'] == model.flops_per_token(64) * 8 * 64 / 4
  # Every gradient is summed over the four devices once: a layer's in the loop over layers.
  reduced = sum(c['bytes'] for c in one['collectives'] if c['kind'] == 'all-reduce')
  assert reduced == pytest.approx(4 * model.n_params, rel=0.01)


def test_the_table_shows_what_was_compiled(tmp_path):
  """`python docs/make_topologies.py` writes it again from docs/topologies.json."""
  table['write'](tmp_path / 'topologies.md', workdir.read_json(ROOT / 'docs/topologies.json'))
  assert (tmp_path / 'topologies.md').read_text() == (ROOT / 'docs/topologies.md').read_text()


@needs_libtpu
def test_a_run_that_does_not_fit_is_refused_with_advice(capsys, tmp_path):
  """64 M rows of an embedding 64 wide: 15.3 GiB of parameters and twice that of moments."""
  status = gate('pretrain/pds_160m.py:smoke', '--topology=v5e:2x2', '--config.model.vocab_size=64000000',
                f'--output={tmp_path}/answer.json')
  shown, answer = capsys.readouterr().out, workdir.read_json(tmp_path / 'answer.json')
  assert status == 1 and answer['fits'] is False and answer['programs'][0]['reason'] == 'too little memory'
  assert 'DOES NOT FIT' in shown and '--config.mesh.fsdp=-1' in shown and 'this run does not fit' in shown


@needs_libtpu
@pytest.mark.parametrize('name, n, kind', [('v4:2x2x2', 8, 'TPU v4'), ('v5e:16x16', 256, 'TPU v5 lite'),
                                           ('v5e:1x1', 1, 'TPU v5 lite'), ('v5p:4x4x8', 128, 'TPU v5'),
                                           ('v6e:8x8', 64, 'TPU v6 lite')])
def test_topologies_have_their_devices(name, n, kind):
  chip, devices = absent.devices(name)
  assert len(devices) == n and {d.device_kind for d in devices} == {kind} and chip.kind in kind


@needs_libtpu
@pytest.mark.parametrize('overrides, complaint', [
  (['mesh.data=3'], 'mesh .* has 3 places for 4 devices'),
  (['mesh.data=1', 'mesh.fsdp=2', 'mesh.tensor=2', 'train.batch_size=7'], 'batch of 7 is not a multiple of .* = 2'),
  (['mesh.fsdp=3'], 'mesh: fsdp=3 does not divide the 4 devices'),
  (['mesh.data=1', 'mesh.tensor=4'],
   r'its axis kv_heads of 1 cannot be split over mesh.tensor=4; .*--config.sharding.kv_heads='),
])
def test_a_mesh_that_does_not_divide_the_run_is_bad_input(overrides, complaint):
  with pytest.raises(ValueError, match=complaint):
    topology.examine(load('pretrain/pds_160m.py:smoke', *overrides), 'v5e:2x2')


@needs_libtpu
@pytest.mark.parametrize('name, data, fsdp', [('v6e:4x4', 2, 8), ('v5p:4x4x8', 64, 2)])
def test_a_mesh_may_split_the_sides_of_a_slice(name, data, fsdp):
  """8 is no product of 4 and 4."""
  _, devices = absent.devices(name)
  mesh = sharding.make_mesh(data, fsdp, 1, devices=devices)
  assert mesh.devices.shape == (data, fsdp, 1)
  assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in devices)


@pytest.mark.parametrize('arguments, complaint', [
  ([], '--topology is missing; want one such as v4:2x2x2'),
  (['--topology=v9:2x2'], "unknown topology 'v9:2x2'; want one such as"),
  (['--topology=v5e:2x2x2'], 'a slice of v5e has 2 sides, such as v5e:4x4'),
  (['--topology=v5p:4x0x4'], 'a slice of v5p has 3 sides'),
  (['--topology=h200:eight'], 'want a number of GPUs, such as h200 or h200:8'),
  (['--topology=h100:12'], '12 GPUs do not fill hosts of 8'),
  (['--topology=v5e:2x2', '--config.train.batchsize=3'], 'did you mean train.batch_size'),
  (['--topology=v5e:2x2', '--speed=3'], 'speed'),
])
def test_bad_questions_end_with_2_and_say_why(arguments, complaint, capsys):
  assert gate('pretrain/pds_160m.py:smoke', *arguments) == 2
  assert complaint in capsys.readouterr().err


@pytest.mark.parametrize('where, complaint', [('', 'is a folder'), ('file/answer.json', 'cannot be written')])
def test_an_answer_that_could_not_be_kept_is_refused_before_compiling(where, complaint, tmp_path, capsys, monkeypatch):
  (tmp_path / 'file').touch()
  monkeypatch.setattr(topology, 'examine', None)
  assert gate('pretrain/pds_160m.py:smoke', '--topology=v5e:2x2', f'--output={tmp_path / where}') == 2
  assert f'--output={tmp_path / where} {complaint}' in capsys.readouterr().err


def test_an_unforeseen_error_is_not_taken_for_a_run_that_does_not_fit(capsys, monkeypatch):
  monkeypatch.setattr(topology, 'examine', lambda *_, **__: {}['absent'])
  assert gate('pretrain/pds_160m.py:smoke', '--topology=v5e:2x2') == 2
  assert "error: KeyError: 'absent'" in capsys.readouterr().err


@pytest.mark.parametrize('said, fits', [('Ran out of memory: Used 24.51G of 15.75G hbm.', False),
                                        ('Used 17.00M of 16.00M vmem.', None)])
def test_a_program_that_does_not_compile_does_not_fit_only_for_want_of_memory(said, fits, monkeypatch):
  class Program:
    def lower(self, *arguments):
      raise jax.errors.JaxRuntimeError(said)

  config = load('pretrain/pds_160m.py:smoke')
  mesh = build.mesh(config.mesh, jax.devices()[:4])
  stage = build.Stage('main', PRESETS['smoke'], lambda *_: None, 10, 8, 1, 16)
  arguments = build.call(stage, config, mesh)[1]
  monkeypatch.setattr(build, 'call', lambda *_: (Program(), arguments))
  if fits is None:
    with pytest.raises(ValueError, match='main does not compile for v5e: Used 17.00M'):
      forecast.forecast(stage, config, mesh, hardware.CHIPS['v5e'])
  else:
    assert forecast.forecast(stage, config, mesh, hardware.CHIPS['v5e'])['fits'] is fits


@pytest.mark.parametrize('name, extra', [('v5e:2x2', '.[tpu]'), ('h200:8', '.[cuda]')])
def test_a_missing_compiler_is_named(name, extra, capsys, monkeypatch):
  monkeypatch.setattr(absent, '_installed', lambda distributions: [])
  assert gate('pretrain/pds_160m.py:smoke', f'--topology={name}') == 2
  assert f'pip install -e {extra}' in capsys.readouterr().err


def test_stages_are_planned_without_a_store():
  """The Pile's domains are named by the config: DoReMi's state has one weight for each."""
  config = load('doremi/pile_280m.py')
  store = topology._store(config, 0)
  assert store.domains == tuple(sorted(mixture.PILE_EPOCHS)) and store.length == 1024
  stages = {stage.name: stage for stage in doremi.stages(config, store)}
  assert list(stages) == ['reference', 'reference_nll', 'proxy-0', 'main-baseline', 'main-tuned']
  assert stages['proxy-0'].aux['log_alpha_M'].shape == (22,)
  assert stages['main-baseline'].program_key == stages['main-tuned'].program_key
  assert len({stage.program_key for stage in stages.values()}) == 4
  with pytest.raises(ValueError, match='--domains=7, but the config names 22'):
    topology._store(config, 7)


@pytest.mark.parametrize(('name', 'vocabulary'), [('llama2_7b_ep', 32_000), ('llama2_7b_ac', 32_001)])
def test_anchors_are_planned_without_a_store_and_without_the_model_that_goes_on(name, vocabulary):
  config = topology._with_weights(load(f'anllm/{name}.py'))
  [stage] = anllm.stages(config, topology._store(config, 0))
  assert stage.model.vocab_size == vocabulary and len(stage.model.anchors.anchor_ids) == 1
  answer = topology.examine(load(f'anllm/{name}.py:smoke'), 'v5e:2x2')
  assert answer['fits'] and answer['programs'][0]['stages'] == [stage.name]


def test_domains_are_counted_or_assumed_where_no_one_names_them(tmp_path):
  config = load('doremi/glam_rounds.py')
  assert len(topology._store(config, 8).domains) == 8
  assert len(topology._store(config, 0).domains) == topology._ASSUMED_DOMAINS
  weights = tmp_path / 'mixture.json'
  mixture.write(weights, mixture.uniform(('code', 'web')))
  assert topology._store(load('doremi/glam_rounds.py', f'doremi.baseline={weights}'), 0).domains == ('code', 'web')


def test_weights_of_another_machine_are_planned_as_uniform_ones(caplog):
  for name, key in (('pretrain/pds_160m.py', 'pretrain.mixture'), ('doremi/glam_rounds.py', 'doremi.baseline')):
    config = load(name, f'{key}=/no/such/place/mixture.json')
    with caplog.at_level(logging.INFO):
      planned = topology._with_weights(config)
    section, field = key.split('.')
    assert planned[section][field] == 'uniform' and config[section][field] == '/no/such/place/mixture.json'
    assert f'config.{key}: /no/such/place/mixture.json is not on this machine' in caplog.text
    kept = topology._with_weights(load(name, f'{key}=unifrom'))  # a mistake, of which the run would be told too
    assert kept[section][field] == 'unifrom'


def test_the_roofline_is_its_longest_term():
  """By hand, on a chip of round numbers: 4 devices, 2 x 16 tokens."""
  chip = dataclasses.replace(hardware.CHIPS['v5e'], flops=1e9, bandwidth=1e9, links=1e9)
  mesh = build.mesh(load('pretrain/pds_160m.py:smoke').mesh, jax.devices()[:4])
  stage = build.Stage('main', PRESETS['smoke'], lambda *_: None, 10, 8, 1, 16)
  costs = hlo_costs.Costs(flops=3e9, traffic_bytes=5e9, collectives={
    ('all-gather', True): hlo_costs.Collective('all-gather', True, 2, 1e9, 4e9)})
  answer = forecast._costs(stage, mesh, chip, costs)
  assert answer['bound_by'] == 'memory'
  assert answer['seconds'] == {'arithmetic': 3.0, 'memory': 5.0, 'interconnect': 4.0, 'step': 5.0,
                               'without_overlap': 12.0}
  assert answer['tokens_per_second'] == 8 * 16 / 5
  assert answer['mfu_bound'] == pytest.approx(PRESETS['smoke'].flops_per_token(16) * 8 * 16 / 4 / 1e9 / 5)
  # A kernel that declares nothing counts as the formula's attention: 12 layers x heads x width x visible positions.
  costs.kernels['flash'] = hlo_costs.Kernel('flash', 2, None)
  attention = 12 * 2 * 2 * 32 * (16 / 2) * 8 * 16 / 4
  assert forecast._costs(stage, mesh, chip, costs)['flops']['counted'] == pytest.approx(3e9 + attention)


def test_gpus_of_several_hosts_meet_over_the_network():
  """And those of one host over its links, however many hosts there are."""
  chip, costs = hardware.CHIPS['h200'], hlo_costs.Costs(flops=1.0, traffic_bytes=1.0, collectives={
    ('all-gather', False): hlo_costs.Collective('all-gather', False, 1, 4e9, 4e9),
    ('all-reduce', False): hlo_costs.Collective('all-reduce', False, 1, 1e9, 1e9, network_bytes=1e9)})
  stage = build.Stage('main', PRESETS['smoke'], lambda *_: None, 10, 8, 1, 16)
  mesh = build.mesh(load('pretrain/pds_160m.py:smoke').mesh, jax.devices()[:4])
  seconds = forecast._costs(stage, mesh, chip, costs)['seconds']['interconnect']
  assert seconds == pytest.approx(4e9 / 450e9 + 1e9 / 50e9)
  assert forecast._hosts(mesh, dataclasses.replace(chip, neighbours=2)) == (0, 0, 1, 1)
  assert forecast._hosts(mesh, chip) == (0, 0, 0, 0) and forecast._hosts(mesh, hardware.CHIPS['v5e']) == ()


def test_a_measured_peak_is_shared_by_the_devices_of_a_cpu_only(monkeypatch):
  monkeypatch.setattr(jax, 'local_device_count', lambda: 10**9)
  measured = hardware.peak_flops_per_device.__wrapped__
  assert measured()[0] < 1e6
  monkeypatch.setattr(jax, 'devices', lambda: [types.SimpleNamespace(platform='gpu', device_kind='unheard of')])
  assert measured()[0] > 1e6


@pytest.mark.parametrize('text, needs', [
  ('XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 24.51G of 15.75G hbm.', 24.51),
  ('Ran out of memory on HBM, the total memory required for HLO temporaries (85.71G) exceeds available HBM (30.75G).',
   85.71),
  ('Ran out of memory in memory space vmem. Used 17.00M of 16.00M vmem.', None),
])
def test_what_xla_says_when_there_is_no_room(text, needs):
  assert forecast._needs(text) == (None if needs is None else round(needs * GIB))


def test_gpu_memory_is_the_share_that_jax_takes(monkeypatch):
  monkeypatch.delenv('XLA_PYTHON_CLIENT_MEM_FRACTION', raising=False)
  assert hardware.CHIPS['h200'].available == 0.75 * hardware.CHIPS['h200'].memory
  monkeypatch.setenv('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.9')
  assert math.isclose(hardware.CHIPS['h200'].available, 0.9 * hardware.CHIPS['h200'].memory)
  assert hardware.CHIPS['v5e'].available == hardware.CHIPS['v5e'].memory
