"""Bad input is refused by the command before anything is computed: what is wrong, where, and what to do.

That the same command without bad input is accepted is seen in main_test.
"""

import json
import shutil
import sys

import jax
import pytest
import small_run

from datasel import main

# ml_collections loads a config file by it.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  folder = tmp_path_factory.mktemp('made')
  small_run.make_store(folder)
  small_run.make_store(folder / 'other', vocab_size=350)
  return folder


@pytest.fixture
def refusal(made, tmp_path, capfd, monkeypatch):
  """refusal(*arguments) -> what the command printed, having refused them; by default all else is right."""

  def call(*arguments, store=None, config=None, directory=tmp_path / 'run', expected=2):
    monkeypatch.delitem(sys.modules, 'config_config', raising=False)  # or a broken file is given the one loaded before
    config = config or small_run.write_config(tmp_path / 'config.py', store or made / 'store')
    status = main.main([f'--config={config}', f'--workdir={directory}', *arguments])
    printed = capfd.readouterr()
    text = printed.out + printed.err
    assert status == expected, text
    assert 'error: ' in text and 'Traceback' not in text
    assert not (directory / 'metrics.jsonl').exists() and not (directory / 'config.json').exists()
    return text

  return call


KEYS = [
  ('--config.train.stepz=3', ['train.stepz', 'did you mean train.steps']),
  ('--config.optimizer.learning_rate=3', ['optimizer.learning_rate', 'did you mean']),
  ('--config.optimizer.peak_lr=nan', ['optimizer.peak_lr is nan', 'want a finite number']),
  ('--config.optimizer.end_lr=inf', ['optimizer.end_lr is inf', 'want a finite number']),
  ('--config.train.steps=many', ['train.steps', "'many'"]),
  ('--config.train.steps=1.5', ['train.steps', "'1.5'"]),
  ('--config.train.steps=0', ['train.steps is 0', 'want at least 1']),
  ('--config.train.steps', ['Missing value', 'train.steps']),
  ('--config.optimizer.name=adamm', ["optimizer.name 'adamm'", 'known:', 'adamw']),
  ('--config.optimizer.warmup_fraction=6', ['optimizer.warmup_fraction is 6']),
  ('--config.model.vocab_size=300', ['token ids up to 399', 'vocab_size is 300', 'at least 400']),
  ('--config.data.length=64', ['data.length is 64', 'sequences of 32 tokens']),
  ('--config.train.microbatches=3', ['train.microbatches 3 does not divide', 'batch_size 8']),
  ('--config.model.d_ff=100000000', ['parameters need', 'GiB', 'a smaller model']),
  ('--config.mesh.fsdp=3', ['mesh: fsdp=3 does not divide the', 'product is the number of devices']),
  ('--config.data.verify=maybe', ["data.verify is 'maybe'", "'full' or 'size'"]),
  ('--config.train.keep_checkpoints=1', ['keep', '1', 'at least 2']),
  ('--config.method=magic', ["config.method is 'magic'", 'known:', 'doremi']),
  ('--nonsense=1', ['nonsense']),
  ('stray', ["['stray']", 'want --config=FILE']),
]


@pytest.mark.parametrize('argument,told', KEYS, ids=[argument for argument, _ in KEYS])
def test_a_bad_key_or_value(refusal, argument, told):
  text = refusal(argument)
  for part in told:
    assert part in text, text


def test_a_batch_that_the_mesh_does_not_divide(refusal):
  text = refusal('--config.train.batch_size=6')
  assert f'a batch of 6 is not a multiple of batch shards x microbatches = {jax.device_count()}' in text


MIXTURES = [
  ({'code': 0.5, 'poetry': 0.5}, ['poetry']),
  ({'code': 1.0}, ['pydocs']),
  ({'code': 0.0, 'pydocs': 0.0}, ['all weights', 'positive weight']),
  ({'code': -0.5, 'pydocs': 1.5}, ['code', '-0.5']),
  ({'code': 'much', 'pydocs': 1.0}, ['code', 'much']),
]


@pytest.mark.parametrize('weights,told', MIXTURES, ids=[json.dumps(weights) for weights, _ in MIXTURES])
def test_a_bad_mixture_file(refusal, tmp_path, weights, told):
  path = tmp_path / 'mixture.json'
  path.write_text(json.dumps({'domains': weights}))
  text = refusal(f'--config.pretrain.mixture={path}')
  for part in told:
    assert part in text, text


def test_a_mixture_that_is_no_file(refusal, tmp_path):
  text = refusal('--config.pretrain.mixture=unifrom')
  assert "pretrain.mixture is 'unifrom'" in text and 'uniform' in text


def test_a_tokenizer_that_is_not_the_stores(refusal, made):
  tokenizer = made / 'other' / 'tokenizer.json'
  text = refusal(f'--config.data.tokenizer={tokenizer}')
  assert str(tokenizer) in text and 'is not the tokenizer that' in text and 'prepare the store again' in text


def shard(store):
  return max((store / 'train' / 'code').iterdir())


DAMAGE = [
  ('truncated', lambda path: path.write_bytes(path.read_bytes()[:-5]), 'bytes, want'),
  ('flipped', lambda path: path.write_bytes(path.read_bytes()[:-40] + b'\x99' + path.read_bytes()[-39:]), 'sha256'),
  ('missing', lambda path: path.unlink(), 'is missing'),
]


@pytest.mark.parametrize('damage,told', [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE])
def test_a_damaged_shard(refusal, made, tmp_path, damage, told):
  store = shutil.copytree(made / 'store', tmp_path / 'store')
  path = shard(store)
  damage(path)
  text = refusal(store=store)
  assert str(path) in text and told in text and 'prepare it again' in text


def test_a_folder_that_is_no_store(refusal, tmp_path):
  assert 'is no token store' in (text := refusal(store=tmp_path)) and 'datasel.prepare' in text


@pytest.mark.parametrize('content', [None, '', 'text'])
def test_a_run_to_start_from_that_is_none(refusal, tmp_path, content):
  path = tmp_path / 'checkpoints'
  if content is not None:
    path.mkdir()
    (path / 'file').write_text(content)
  text = refusal(f'--config.train.init_from={path}')
  assert f'init_from {path}' in text and 'is not the checkpoints/ folder' in text


def test_a_run_to_start_from_of_another_tokenizer(refusal, tmp_path):
  (tmp_path / 'main' / 'checkpoints' / 'steps').mkdir(parents=True)
  (tmp_path / 'main' / 'stage.json').write_text('{"tokenizer": "another"}')
  text = refusal(f'--config.train.init_from={tmp_path / "main" / "checkpoints"}')
  assert 'was trained with another tokenizer' in text and 'prepare the store with that tokenizer' in text


@pytest.mark.parametrize('place', ['a file', '/proc/datasel'])
def test_a_workdir_that_cannot_be_written(refusal, tmp_path, place):
  (tmp_path / 'file').write_text('')
  directory = tmp_path / 'file' / 'run' if place == 'a file' else main.pathlib.Path(place)
  text = refusal(directory=directory)
  assert f'--workdir {directory} cannot be written' in text and 'choose another' in text


def test_a_disk_without_room_for_the_checkpoints(refusal, monkeypatch):
  usage = shutil.disk_usage('/')
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=1000))
  text = refusal(expected=1)
  assert 'the checkpoints of ' in text and 'free some space' in text


FILES = [
  ('raise KeyError("x")', ['KeyError']),
  ('def get_config(arg):\n  raise RuntimeError("no such corpus")', ['RuntimeError: no such corpus']),
  ('def get_config(arg):\n  raise ValueError("no such corpus")', ['ValueError: no such corpus']),
  ('def get_config(arg=""):\n  return undefined', ["name 'undefined' is not defined"]),
  ('def get_config(', ['SyntaxError']),
  ('import no_such_module', ["No module named 'no_such_module'"]),
  ('x = 1', ['get_config']),
  ('def get_config(arg=""):\n  return {"method": "pretrain"}', ['gave dict', 'datasel.config.base']),
  ('import ml_collections\ndef get_config(arg=""):\n  return ml_collections.ConfigDict()', ['datasel.config.base']),
]


@pytest.mark.parametrize('content,told', FILES, ids=[content for content, _ in FILES])
def test_a_config_file_that_fails(refusal, tmp_path, content, told):
  path = tmp_path / 'broken.py'
  path.write_text(content)
  text = refusal(config=f'{path}:1' if '(arg)' in content else path)
  for part in told:
    assert part in text, text


def test_a_config_file_that_is_not_there(refusal, tmp_path):
  assert f'no file {tmp_path / "absent.py"}' in refusal(config=tmp_path / 'absent.py')
