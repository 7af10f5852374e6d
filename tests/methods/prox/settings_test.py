"""ProX's own models and runs have the published sizes and schedules."""

import importlib.util
import pathlib

import pytest

from datasel import config as config_lib
from datasel import workdir
from datasel.models.presets import PRESETS

CONFIGS = pathlib.Path(__file__).parents[3] / 'configs' / 'pretrain'


def load(name, arg):
  spec = importlib.util.spec_from_file_location(name, CONFIGS / f'{name}.py')
  loaded = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(loaded)
  return loaded.get_config(arg)


@pytest.mark.parametrize(('name', 'parameters', 'key_heads'), [
  ('tlm_xs', 354_284_800, 1), ('tlm_s', 758_982_144, 2), ('tlm_m', 1_741_785_088, 32)])
def test_shapes_have_the_released_number_of_parameters(name, parameters, key_heads):
  model = PRESETS[name]
  assert (model.n_params, model.n_kv_heads, model.d_model % model.n_heads) == (parameters, key_heads, 0)
  assert model.init_std ** 2 == pytest.approx(2 / (5 * model.d_model))
  assert model.residual_init_std * model.n_layers * model.d_model ** 0.5 == pytest.approx(1)


@pytest.mark.parametrize(('base', 'peak', 'tokens_of_a_step', 'steps', 'cosine'), [
  ('tinyllama_1_1b', 8e-5, 1024 * 2048, 7500, 0), ('llama2_7b', 8e-5, 256 * 4096, 10_000, 15_000),
  ('codellama_7b', 3e-4, 1024 * 4096, 2500, 3750), ('mistral_7b', 2e-5, 256 * 4096, 10_000, 15_000)])
def test_mathematics_goes_on_from_its_base_as_published(base, peak, tokens_of_a_step, steps, cosine, tmp_path):
  model = config_lib.model('smoke').to_dict()
  workdir.write_json(tmp_path / 'stage.json', {'model': model})
  config = load('tlm_math', f'{base}={tmp_path}')
  assert (config.optimizer.peak_lr, config.train.steps, config.optimizer.schedule_steps) == (peak, steps, cosine)
  assert config.train.batch_size * config.data.length == tokens_of_a_step and config.optimizer.warmup_fraction == 0
  assert config.train.init_from == str(tmp_path / 'checkpoints') and config.model.d_model == model['d_model']


@pytest.mark.parametrize('arg', ['llama2_7b', 'llama2_7b=', 'gpt2=folder', 'smok'])
def test_another_base_is_refused_with_the_known_ones(arg):
  with pytest.raises(ValueError, match='NAME=FOLDER.*codellama_7b'):
    load('tlm_math', arg)
