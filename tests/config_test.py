"""Every config file says what it is and has its paper's numbers; what no run can use is refused with what to do."""

import importlib.util
import math
import pathlib

import ml_collections
import numpy as np
import pytest
import small_store

from datasel import build, checks, main, sharding, workdir
from datasel import config as config_lib
from datasel.data import mixture, sampler
from datasel.data.store import Store
from datasel.models.presets import PRESETS

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / 'configs'
FILES = {str(path.relative_to(FOLDER).with_suffix('')): path for path in sorted(FOLDER.rglob('*.py'))}


def module(name):
  spec = importlib.util.spec_from_file_location(name.replace('/', '_'), FILES[name])
  loaded = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(loaded)
  return loaded


def load(name, arg=''):
  return module(name).get_config(arg)


@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('arg', ['', 'smoke'])
def test_every_config_loads_locked_and_can_be_written_down(name, arg, tmp_path):
  config = load(name, arg)
  assert config.is_locked and config.method in (name.split('/')[0], 'pretrain')
  with pytest.raises((KeyError, AttributeError), match='lerning_rate'):
    config.optimizer.lerning_rate = 1.0
  flat = config_lib.flatten(config)
  # What a reader has to hold in mind: a second model or optimiser has the keys of the first, a table is one thing.
  again = ('doremi.model.', 'doremi.baseline_epochs.', 'sharding.', 'pds.model.', 'pds.optimizer.',
           'pds.scorer.optimizer.', 'regmix.model.', 'regmix.optimizer.', 'prox.model.', 'prox.optimizer.',
           'prox.chunk.', 'prox.document.optimizer.')
  assert sum(not key.startswith(again) for key in flat) <= 90
  workdir.write_json(tmp_path / 'config.json', flat)
  assert config_lib.difference(workdir.read_json(tmp_path / 'config.json'), flat) == []
  config_lib.to_model(config.model)


@pytest.mark.parametrize('name', FILES)
def test_every_config_says_its_command_hardware_and_outcome(name):
  said = module(name).__doc__
  assert 'Command:' in said and 'Hardware:' in said and ('Outcome:' in said or 'Paper:' in said or 'Released:' in said)
  if name != 'doremi/demo':
    assert f'--config=configs/{name}.py' in said and 'Expects:' in said


@pytest.mark.parametrize('name', FILES)
def test_a_config_can_run_once_it_has_data(name):
  config = load(name)
  if not config.data.demo:
    with pytest.raises(ValueError, match='no data.*prepare'):
      config_lib.check(config)
    config.data.store = 'somewhere'
  config_lib.check(config)
  config_lib.check(load(name, 'smoke'))


@pytest.fixture(scope='module')
def large_store(tmp_path_factory):
  """A store that says it has as many sequences as a published run reads."""

  class Large(Store):
    def sizes(self, split):
      return super().sizes(split) * (10_000 if split == 'train' else 1)

  return Large(small_store.make(tmp_path_factory.mktemp('store')).path)


@pytest.mark.parametrize('name', [name for name in FILES if name.startswith('pds/')])
def test_a_config_has_stages_that_could_run_at_its_own_size(name, large_store, monkeypatch):
  """Its smoke form has other sizes, so a run of that shows nothing of these."""
  config = load(name)
  config.pds.target = 'validation:json'
  stages = main.methods()[config.method].stages(config, large_store)
  mesh = sharding.make_mesh(data=2, fsdp=2)
  for stage in stages:
    checks.check_split(stage, config, mesh)
    if stage.objective is not None:
      build.stage_program(stage, config, mesh)
  [proxy] = [stage for stage in stages if stage.name == 'proxy']
  assert proxy.optimizer.peak_lr == config.pds.optimizer.peak_lr and stages[-1].optimizer is None


# DoReMi, arXiv 2305.10429, Appendix C; its repository's Pile run; PDS, arXiv 2410.07064, Appendix.
DOREMI = {'train.batch_size': 512, 'doremi.batch_size': 512, 'optimizer.name': 'adafactor', 'optimizer.peak_lr': 1e-3,
          'optimizer.end_lr': 1e-4, 'optimizer.schedule': 'exponential', 'optimizer.warmup_fraction': 0.06,
          'optimizer.weight_decay': 1e-2, 'optimizer.clip': 1.0, 'data.length': 1024, 'doremi.smoothing': 1e-3,
          'doremi.step_size': 1.0, 'doremi.clip': True, 'doremi.loss_reduction': 'domain_mean',
          'doremi.missing_domain': 'zero', 'doremi.average_includes_initial': False,
          'doremi.initial_weights': 'uniform'}
PILE_280M = DOREMI | {'train.steps': 200_000, 'doremi.steps': 200_000, 'doremi.baseline': 'pile', 'doremi.rounds': 1}
GLAM = DOREMI | {'doremi.steps': 300_000, 'doremi.baseline': 'uniform', 'doremi.tolerance': 1e-3}
REPOSITORY = {'train.steps': 200_000, 'doremi.steps': 200_000, 'train.batch_size': 512, 'doremi.batch_size': 512,
              'optimizer.name': 'adamw', 'optimizer.peak_lr': 1e-3, 'optimizer.end_lr': 1e-4, 'optimizer.b1': 0.9,
              'optimizer.b2': 0.99, 'optimizer.eps': 1e-8, 'optimizer.weight_decay': 0.01,
              'optimizer.schedule': 'exponential_gap', 'doremi.smoothing': 1e-3, 'doremi.step_size': 1.0,
              'doremi.loss_reduction': 'token_mean', 'doremi.missing_domain': 'keep',
              'doremi.average_includes_initial': True, 'doremi.initial_weights': 'sampling'}
PDS = {'train.steps': 100_000, 'train.batch_size': 512, 'data.length': 1024, 'optimizer.name': 'adamw',
       'optimizer.schedule': 'cosine', 'optimizer.b1': 0.9, 'optimizer.b2': 0.98, 'optimizer.eps': 1e-6,
       'optimizer.weight_decay': 1e-2, 'optimizer.clip': 1.0, 'optimizer.warmup_fraction': 0.02}

SOLVER = {'pds.optimizer.peak_lr': 6e-4, 'pds.optimizer.end_lr': 6e-5, 'pds.optimizer.warmup_fraction': 0.04,
          'pds.optimizer.b2': 0.98, 'pds.optimizer.eps': 1e-6, 'pds.optimizer.weight_decay': 1e-2,
          'pds.horizon': 100, 'pds.learning_rate': 0.008, 'pds.batch_size': 256, 'pds.proxies': 163_840,
          'pds.stride': 10, 'pds.checkpoints': 5, 'pds.steps': 50_000, 'pds.ratio': 0.4, 'pds.temperature': 0.1,
          'pds.scorer.held_out': 16_384, 'pds.scorer.batch_size': 512, 'pds.scorer.epochs': 5,
          'pds.scorer.optimizer.peak_lr': 1e-4, 'pds.scorer.optimizer.weight_decay': 1e-2,
          'pds.scorer.pooling': 'mean', 'pds.scorer.loss': 'mse'}

# RegMix, arXiv 2407.01492, and its repository's training scripts.
MAIN_1B = {'train.steps': 25_000, 'train.batch_size': 512, 'data.length': 2048, 'optimizer.name': 'adamw',
           'optimizer.schedule': 'cosine', 'optimizer.peak_lr': 4e-4, 'optimizer.end_lr': 1e-5,
           'optimizer.warmup_fraction': 0.04, 'optimizer.b1': 0.9, 'optimizer.b2': 0.95, 'optimizer.weight_decay': 0.1,
           'optimizer.clip': 1.0}
# ProX, arXiv 2409.17115, Table 9.
TLM = {'train.steps': 12_500, 'train.batch_size': 1024, 'data.length': 2048, 'optimizer.name': 'adamw',
       'optimizer.schedule': 'cosine', 'optimizer.warmup_fraction': 0.04, 'optimizer.b1': 0.9, 'optimizer.b2': 0.95,
       'optimizer.weight_decay': 0.1, 'optimizer.clip': 1.0, 'optimizer.peak_lr': 5e-4}
TINYLLAMA = TLM | {'train.steps': 7500, 'optimizer.peak_lr': 8e-5, 'optimizer.end_lr': 8e-6,
                   'optimizer.warmup_fraction': 0.0, 'optimizer.schedule_steps': 0}
# AnLLM, arXiv 2402.07616, 4.1, and the cards of its released models.
LLAMA2_7B = {'train.steps': 1818, 'train.batch_size': 512, 'data.length': 4096, 'optimizer.name': 'adamw',
             'optimizer.schedule': 'constant', 'optimizer.peak_lr': 2e-5, 'optimizer.warmup_fraction': 20 / 1818,
             'optimizer.b1': 0.9, 'optimizer.b2': 0.999, 'optimizer.eps': 1e-8, 'optimizer.weight_decay': 0.0,
             'optimizer.clip': 1.0, 'anllm.symbols': '.', 'anllm.anchor_row': 'mean', 'anllm.min_length': 1,
             'anllm.max_length': 0}
SWARM = {'regmix.proxies': 512, 'regmix.steps': 1000, 'regmix.batch_size': 512, 'regmix.optimizer.peak_lr': 4e-4,
         'regmix.optimizer.schedule': 'constant', 'regmix.optimizer.warmup_fraction': 0.1, 'regmix.optimizer.b2': 0.95,
         'regmix.optimizer.weight_decay': 0.1, 'regmix.temperature': 0.5, 'regmix.max_usage': 15.0,
         'regmix.grid': 2e-4, 'regmix.draws': 1_000_000, 'regmix.top': 100, 'regmix.search': 'simulate',
         'regmix.target': 'the_pile_pile_cc', 'regmix.model.d_model': 256, 'regmix.model.n_layers': 2}


@pytest.mark.parametrize(('name', 'preset', 'paper'), [
  ('doremi/pile_280m', 'doremi_8b', PILE_280M),
  ('doremi/glam_rounds', 'doremi_8b', GLAM),
  ('doremi/pile_120m', 'doremi_120m_repository', REPOSITORY),
  ('pretrain/pds_160m', 'pds_160m', PDS | {'optimizer.peak_lr': 6e-4, 'optimizer.end_lr': 6e-5}),
  ('pretrain/pds_470m', 'pds_470m', PDS | {'optimizer.peak_lr': 3e-4, 'optimizer.end_lr': 3e-5}),
  ('pretrain/pds_1b', 'pds_1b', PDS | {'optimizer.peak_lr': 2.5e-4, 'optimizer.end_lr': 2.5e-5}),
  ('pretrain/pds_1_7b', 'pds_1_7b', PDS),
  ('pds/paper_160m', 'pds_160m', PDS | SOLVER | {'optimizer.peak_lr': 6e-4}),
  ('pds/paper_470m', 'pds_470m', PDS | SOLVER | {'optimizer.peak_lr': 3e-4}),
  ('pds/paper_1b', 'pds_1b', PDS | SOLVER | {'optimizer.peak_lr': 2.5e-4}),
  ('pds/paper_1_7b', 'pds_1_7b', PDS | SOLVER | {'optimizer.peak_lr': 2e-4}),
  ('pretrain/tlm_xs', 'tlm_xs', TLM | {'optimizer.end_lr': 5e-5}),
  ('pretrain/tlm_s', 'tlm_s', TLM | {'optimizer.end_lr': 5e-6}),
  ('pretrain/tlm_m', 'tlm_m', TLM | {'optimizer.peak_lr': 3e-4, 'optimizer.end_lr': 3e-5}),
  ('pretrain/tlm_math', 'tinyllama_1_1b', TINYLLAMA),
  ('anllm/llama2_7b_ep', 'llama2_7b', LLAMA2_7B | {'anllm.arms': 'ep'}),
  ('anllm/llama2_7b_ac', 'llama2_7b', LLAMA2_7B | {'anllm.arms': 'ac'}),
  ('regmix/pile_1m', 'regmix_1b', MAIN_1B | SWARM), ('regmix/pile_1b', 'regmix_1b', MAIN_1B),
])
def test_numbers_are_the_papers(name, preset, paper):
  config = load(name)
  flat = config_lib.flatten(config)
  assert {key: flat[key] for key in paper} == paper
  assert config_lib.to_model(config.model) == PRESETS[preset]


def test_pile_epochs_name_its_22_domains():
  epochs = load('doremi/pile_280m').doremi.baseline_epochs.to_dict()
  assert len(epochs) == 22 and epochs['Wikipedia_en'] == 3.0 and epochs['Pile-CC'] == 1.0


@pytest.mark.parametrize('name', ['human', 'doremi', 'regmix', 'pile_cc_only'])
def test_regmixs_mixtures_can_be_sampled_by_its_1b_runs(name):
  weights = mixture.load(FOLDER / 'regmix' / 'mixtures' / f'{name}.yaml').weights
  assert len(weights) == 17 and max(weights, key=weights.get) == 'the_pile_pile_cc'
  counts_M = sampler.block_counts(list(weights.values()), load('regmix/pile_1b').data.block, list(weights))
  np.testing.assert_allclose(counts_M / counts_M.sum(), list(weights.values()), atol=1e-6)


def test_a_stage_may_stop_before_its_schedule_ends():
  section = config_lib.optimizer()
  section.schedule_steps, section.warmup_fraction = 15_000, 0.0
  rate, peak, end = build.learning_rate(section, 10_000), section.peak_lr, section.end_lr
  assert rate(10_000) == pytest.approx(end + (peak - end) / 4) and rate(15_000) == pytest.approx(end)
  with pytest.raises(ValueError, match='schedule_steps is 15000, but the stage has 20000 steps'):
    build.learning_rate(section, 20_000)


@pytest.mark.parametrize('name', FILES)
def test_smoke_changes_the_size_and_not_the_method(name):
  full, smoke = (config_lib.flatten(load(name, arg)) for arg in ('', 'smoke'))
  may_change = ('data.', 'model.', 'train.', 'mesh.', 'doremi.model.', 'doremi.steps', 'doremi.batch_size',
                'doremi.microbatches', 'doremi.rounds', 'doremi.seeds', 'doremi.baseline_epochs', 'pds.model.',
                'pds.target', 'pds.steps', 'pds.checkpoints', 'pds.train_', 'pds.microbatches', 'pds.horizon',
                'pds.batch_size', 'pds.stride', 'pds.proxies', 'pds.score_batch', 'pds.scorer.held_out',
                'pds.scorer.epochs', 'pds.scorer.batch_size', 'regmix.model.', 'regmix.steps', 'regmix.batch_size',
                'regmix.microbatches', 'regmix.target', 'regmix.baselines', 'regmix.proxies', 'regmix.held_out',
                'regmix.draws', 'regmix.max_epochs', 'pretrain.mixture', 'prox.corpus', 'prox.examples',
                'prox.documents', 'prox.model.', 'prox.steps', 'prox.batch_size', 'prox.microbatches', 'prox.rules',
                'prox.refine_batch', 'prox.target', 'anllm.init_from', 'anllm.contexts', 'anllm.context_sequences',
                'anllm.sets', 'anllm.question_batch',
                *(f'prox.{task}.{key}' for task in ('document', 'chunk')
                  for key in ('epochs', 'batch_size', 'length', 'max_new_tokens', 'validation')))
  assert not [line for line in config_lib.difference(full, smoke) if not line.startswith(may_change)]
  assert smoke['data.demo'] == 'offline' and smoke['train.steps'] <= 20


def test_unknown_argument_after_the_colon_is_refused():
  with pytest.raises(ValueError, match="'smok'.*known: 'smoke'"):
    load('doremi/demo', 'smok')


def test_unknown_preset_is_refused_with_the_known_ones():
  with pytest.raises(ValueError, match="'pds_160'.*pds_160m"):
    config_lib.model('pds_160')


@pytest.mark.parametrize(('argument', 'suggested'), [
  ('--config.optimizer.peak_rl=1', 'optimizer.peak_lr'), ('--config.trian.steps=5', 'train.steps'),
  ('--config.doremi.step_sise=2', 'doremi.step_size'), ('-config.sede=1', 'seed'),
  ('--config.optimizer=adamw', 'optimizer.name'), ('--config.zzzzzzzz=1', 'data.block')])
def test_unknown_key_is_refused_with_the_nearest(argument, suggested):
  with pytest.raises(ValueError, match=f'no such key; did you mean .*{suggested}'):
    config_lib.check_overrides(load('doremi/demo'), ['--workdir=x', argument])


def test_known_keys_and_other_flags_pass():
  config_lib.check_overrides(load('doremi/demo'), ['--workdir=x', '--config.train.steps=5', '--config.model.window=8',
                                                   '--config.doremi.model.n_layers', '3', '--dry_run'])


@pytest.mark.parametrize(('key', 'value', 'message'), [
  ('optimizer.peak_lr', math.nan, 'optimizer.peak_lr is nan; want a finite'),
  ('doremi.tolerance', math.inf, 'doremi.tolerance is inf'),
  ('doremi.model.rope_theta', -math.inf, 'rope_theta is -inf'),
  ('train.steps', 0, 'train.steps is 0; want at least 1'), ('doremi.steps', 0, 'doremi.steps is 0'),
  ('doremi.seeds', 0, 'doremi.seeds is 0'), ('doremi.rounds', -1, 'doremi.rounds is -1'),
  ('data.prefetch', 0, 'data.prefetch is 0'), ('train.log_every', 0, 'train.log_every is 0'),
  ('train.eval_every', -1, 'train.eval_every is -1; want at least 0'),
  ('train.eval_sequences', -5, 'train.eval_sequences is -5'), ('train.keep_checkpoints', 1, 'keep_checkpoints is 1'),
  ('train.microbatches', 7, 'train.microbatches 7 does not divide config.train.batch_size'),
  ('doremi.microbatches', 7, 'doremi.microbatches 7 does not divide config.doremi.batch_size'),
  ('optimizer.warmup_fraction', 1.5, 'warmup_fraction is 1.5'), ('data.verify', 'quick', "'full' or 'size'"),
  ('data.demo', '', 'no data')])
def test_what_no_run_can_use_is_refused_by_its_key(key, value, message):
  config = load('doremi/demo')
  config.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=message):
    config_lib.check(config)


@pytest.mark.parametrize('optimizer', ['optimizer', 'pds.optimizer', 'pds.scorer.optimizer'])
@pytest.mark.parametrize(('key', 'value', 'message'), [
  ('warmup_fraction', 6.0, 'want a part of 1'), ('b2', 1.0, 'below 1'), ('clip', -1.0, 'want 0 or more')])
def test_every_optimizer_is_checked(optimizer, key, value, message):
  config = load('pds/demo')
  config.update_from_flattened_dict({f'{optimizer}.{key}': value})
  with pytest.raises(ValueError, match=f'config.{optimizer}.{key} is {value}; want .*{message.removeprefix("want ")}'):
    config_lib.check(config)


def test_difference_names_every_changed_key():
  old, new = {'a.b': 1, 'c': 'x', 'same': None}, {'a.b': 2, 'd': 0.5, 'same': None}
  assert config_lib.difference(old, new) == ['a.b: 1 -> 2', "c: 'x' -> '(absent)'", "d: '(absent)' -> 0.5"]
  assert config_lib.difference(old, old) == []


def test_an_absent_key_is_not_a_key_without_a_value():
  assert config_lib.difference({'window': None}, {}) == ["window: None -> '(absent)'"]


def test_flatten_and_back():
  nested = {'a': 1, 'b': {'c': 'x', 'd': {'e': 0.5}}}
  assert config_lib.flatten(ml_collections.ConfigDict(nested)) == {'a': 1, 'b.c': 'x', 'b.d.e': 0.5}
