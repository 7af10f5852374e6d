"""Hugging Face checkpoints both ways, against transformers itself on the same files."""

import json
import os

import huggingface_hub
import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from datasel import sharding
from datasel.models import hf
from datasel.models.tensor_files import Safetensors, write

SMALL = {'vocab_size': 97, 'hidden_size': 48, 'intermediate_size': 80, 'num_hidden_layers': 2, 'num_attention_heads': 6,
         'num_key_value_heads': 2, 'max_position_embeddings': 64, 'initializer_range': 0.2}
NEOX = {name: value for name, value in SMALL.items() if name != 'num_key_value_heads'}
LLAMA3 = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
          'original_max_position_embeddings': 16}
CONFIGS = {
  'grouped queries': lambda: transformers.LlamaConfig(**SMALL),
  'tied': lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
  'one key head': lambda: transformers.LlamaConfig(**SMALL | {'num_key_value_heads': 1}),
  'own head size': lambda: transformers.LlamaConfig(**SMALL | {'num_key_value_heads': 6}, head_dim=16),
  'window': lambda: transformers.MistralConfig(**SMALL, sliding_window=7),
  'no window': lambda: transformers.MistralConfig(**SMALL, sliding_window=None, rms_norm_eps=1e-3),
  'linear': lambda: transformers.LlamaConfig(**SMALL, rope_scaling={'rope_type': 'linear', 'factor': 3.0},
                                             rope_theta=5e5),
  'dynamic': lambda: transformers.LlamaConfig(**SMALL | {'max_position_embeddings': 16},
                                              rope_scaling={'rope_type': 'dynamic', 'factor': 2.0}),
  'llama3': lambda: transformers.LlamaConfig(**SMALL, rope_scaling=LLAMA3),
  'yarn': lambda: transformers.LlamaConfig(**SMALL, rope_scaling={
    'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 16}),
  'ungated': lambda: transformers.ArceeConfig(**SMALL, hidden_act='gelu'),
  'parallel': lambda: transformers.GPTNeoXConfig(**NEOX, rotary_pct=0.5),
  'serial, all of a head turns': lambda: transformers.GPTNeoXConfig(
    **NEOX, rotary_pct=1.0, use_parallel_residual=False, hidden_act='gelu_new'),
}
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 40)).astype(np.int32)


def published(folder, config, **kwargs):
  """A random model of transformers, saved; every bias and scale differs from what it starts as."""
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  for parameter in model.parameters():
    if parameter.ndim == 1:
      torch.nn.init.normal_(parameter, 1.0, 0.3)
  model.save_pretrained(folder, **kwargs)
  return model


def logits(model):
  with torch.no_grad():
    return model(torch.from_numpy(TOKENS.astype(np.int64))).logits.numpy()


def loaded(folder, **kwargs):
  model = hf.from_config(hf.read_config(folder))
  return model, hf.load(Safetensors(folder), model, **kwargs)


def exported(folder, model, params, **kwargs):
  folder.mkdir()
  hf.save(folder, model, params, **kwargs)
  config = hf.to_config(model, max_length=64, bos_id=None, eos_id=0, dtype=kwargs.get('dtype', 'float32'))
  (folder / 'config.json').write_text(json.dumps(config))
  return folder


@pytest.mark.parametrize('name', CONFIGS)
def test_logits_are_transformers_own_both_ways(name, tmp_path):
  theirs = published(tmp_path / 'in', CONFIGS[name]())
  model, params = loaded(tmp_path / 'in')
  wanted = logits(theirs)
  close = {'rtol': 1e-5, 'atol': 1e-5 * np.abs(wanted).max()}
  np.testing.assert_allclose(jax.jit(model.apply)(params, TOKENS), wanted, **close)
  back = transformers.AutoModelForCausalLM.from_pretrained(exported(tmp_path / 'out', model, params)).eval()
  for key, value in theirs.state_dict().items():
    assert torch.equal(value, back.state_dict()[key]), key
  np.testing.assert_allclose(logits(back), wanted, **close)
  assert hf.from_config(hf.read_config(tmp_path / 'out')) == model


def test_several_files_and_a_mesh_give_the_same_parameters(tmp_path):
  theirs = published(tmp_path / 'in', transformers.LlamaConfig(**SMALL | {'num_attention_heads': 4, 'vocab_size': 96}),
                     max_shard_size='40KB')
  assert len(list((tmp_path / 'in').glob('*.safetensors'))) > 2
  model, alone = loaded(tmp_path / 'in')
  _, spread = loaded(tmp_path / 'in', mesh=sharding.make_mesh(fsdp=2, tensor=2))
  assert len(spread['blocks']['query']['kernel'].sharding.device_set) == 4
  jax.tree.map(np.testing.assert_array_equal, spread, alone)
  exported(tmp_path / 'out', model, spread, max_shard_bytes=40_000)
  assert len(list((tmp_path / 'out').glob('*.safetensors'))) > 2
  back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out')
  assert all(torch.equal(value, back.state_dict()[key]) for key, value in theirs.state_dict().items())


def test_bfloat16_both_ways(tmp_path):
  theirs = published(tmp_path / 'in', transformers.LlamaConfig(**SMALL)).to(torch.bfloat16)
  theirs.save_pretrained(tmp_path / 'half')
  model, params = loaded(tmp_path / 'half')
  assert params['embed']['kernel'].dtype == np.float32
  back = transformers.AutoModelForCausalLM.from_pretrained(
    exported(tmp_path / 'out', model, params, dtype='bfloat16'), dtype='auto')
  assert back.dtype == torch.bfloat16
  assert all(torch.equal(value, back.state_dict()[key]) for key, value in theirs.state_dict().items())
  _, halved = loaded(tmp_path / 'half', dtype='bfloat16')
  assert halved['embed']['kernel'].dtype == jax.numpy.bfloat16


@pytest.fixture
def checkpoint(tmp_path):
  """A small export, and its one file as bytes: (folder, rewrite(tensors) that saves other ones in their place)."""
  published(tmp_path / 'in', transformers.LlamaConfig(**SMALL))
  folder = exported(tmp_path / 'out', *loaded(tmp_path / 'in'))
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  rewrite = lambda tensors: safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
  return folder, tensors, rewrite


Q0 = 'model.layers.0.self_attn.q_proj.weight'


def test_a_flipped_bit_is_refused_by_the_tensors_name(checkpoint):
  folder, tensors, _ = checkpoint
  content = bytearray((folder / 'model.safetensors').read_bytes())
  at = content.index(tensors[Q0].tobytes())
  content[at + 5] ^= 1
  (folder / 'model.safetensors').write_bytes(content)
  with pytest.raises(ValueError, match=f'tensor {Q0} was damaged'):
    loaded(folder)


def test_a_cut_file_is_refused_by_a_tensors_name(checkpoint):
  folder, *_ = checkpoint
  content = (folder / 'model.safetensors').read_bytes()
  (folder / 'model.safetensors').write_bytes(content[:-100])
  with pytest.raises(ValueError, match=r'tensor [\w.]+, F32 .* should fill bytes \d+ to \d+, but the file has'):
    loaded(folder)


@pytest.mark.parametrize(('change', 'message'), [
  (lambda t: t.pop(Q0), f'tensor {Q0} is missing'),
  (lambda t: t.update(extra=np.zeros(3, np.float32)), 'tensor extra is not one of this model'),
  (lambda t: t.update({Q0: t[Q0][:-1]}), rf'tensor {Q0} has the shape \[47, 48\].*\[48, 48\]'),
  (lambda t: t[Q0].__setitem__((3, 4), np.nan), f'tensor {Q0} holds values that are not finite'),
  (lambda t: t.update({Q0: t[Q0].astype(np.int32)}), f'tensor {Q0} is I32'),
])
def test_another_checkpoint_than_the_config_says_is_refused_by_the_tensors_name(checkpoint, change, message):
  folder, tensors, rewrite = checkpoint
  change(tensors)
  rewrite(tensors)
  with pytest.raises(ValueError, match=message):
    loaded(folder)


def test_a_head_of_its_own_contradicts_tied_embeddings(checkpoint):
  folder, *_ = checkpoint
  config = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(config | {'tie_word_embeddings': True}))
  with pytest.raises(ValueError, match=r'tensor lm_head.weight differs from model.embed_tokens.weight'):
    loaded(folder)


def test_a_tensor_in_two_files_is_refused(checkpoint):
  folder, tensors, _ = checkpoint
  for n in (1, 2):
    safetensors.numpy.save_file(tensors if n == 1 else {Q0: tensors[Q0] + 1}, folder / f'model-{n}.safetensors')
  index = {'weight_map': dict.fromkeys(tensors, 'model-1.safetensors') | {Q0: 'model-2.safetensors'}}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  with pytest.raises(ValueError, match=f'tensor {Q0} is both in .*model-1.safetensors and in .*model-2.safetensors'):
    loaded(folder)


@pytest.mark.parametrize('header', [
  b'[]', b'[' * 100_000, b'{"a": 3}', b'{"a": {"dtype": "F32"}}', b'{"a": {"dtype": "F32", "shape": "b"}}',
  b'{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
  b'{"a": {"dtype": ["F32"], "shape": [1.0], "data_offsets": [0, 4]}}',
  b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}'])
def test_a_header_of_nonsense_is_damage(checkpoint, header):
  folder, *_ = checkpoint
  (folder / 'model.safetensors').write_bytes(len(header).to_bytes(8, 'little') + header + bytes(4))
  with pytest.raises(ValueError, match=r'model.safetensors is damaged \(its header'):
    loaded(folder)


@pytest.mark.parametrize('index', ['[]', '{}', '{"weight_map": null}', '{"weight_map": {"a": 3}}'])
def test_an_index_of_nonsense_is_refused(checkpoint, index):
  folder, *_ = checkpoint
  (folder / 'model.safetensors.index.json').write_text(index)
  with pytest.raises(ValueError, match=r'model.safetensors.index.json (is damaged|names the file)'):
    loaded(folder)


@pytest.mark.parametrize('dtype', [np.bool_, np.uint8])
def test_buffers_of_older_checkpoints_are_passed_over(dtype, tmp_path):
  """Pythia's files hold each layer's causal mask."""
  theirs = published(tmp_path / 'in', CONFIGS['parallel']())
  file = tmp_path / 'in/model.safetensors'
  masks = {f'gpt_neox.layers.{n}.attention.bias': np.tri(64, dtype=dtype)[None, None] for n in range(2)}
  safetensors.numpy.save_file(safetensors.numpy.load_file(file) | masks, file, metadata={'format': 'pt'})
  model, params = loaded(tmp_path / 'in')
  np.testing.assert_allclose(model.apply(params, TOKENS), logits(theirs), rtol=1e-5, atol=1e-4)


def test_a_window_in_a_llamas_config_means_nothing(tmp_path):
  config = CONFIGS['grouped queries']().to_dict()
  assert hf.from_config(config | {'sliding_window': 7}) == hf.from_config(config)


def test_half_a_rotary_pair_is_refused():
  config = transformers.GPTNeoXConfig(**NEOX | {'num_attention_heads': 4}, rotary_pct=0.25)
  with pytest.raises(ValueError, match='rotary channels come in pairs, but 0.25 of 12 is odd'):
    hf.from_config(config.to_dict())


def test_of_a_repository_what_is_read_is_downloaded():
  wanted = ['config.json', 'chat_template.jinja', 'model-00001-of-00002.safetensors', 'model.safetensors.index.json',
            'tokenizer.json', 'tokenizer.model', 'tokenizer_config.json']
  others = ['consolidated.safetensors', 'pytorch_model.bin', 'modeling_x.py', 'README.md']
  kept = huggingface_hub.utils.filter_repo_objects([*wanted, *others], allow_patterns=hf._PATTERNS)
  assert list(kept) == wanted


@pytest.mark.parametrize(('change', 'message'), [
  ({'model_type': 'gpt2'}, "type 'gpt2'"), ({'attention_bias': True}, 'attention_bias'),
  ({'hidden_act': 'relu'}, 'hidden_act'), ({'quantization_config': {'bits': 4}}, 'quantization_config'),
  ({'rope_parameters': {'rope_type': 'longrope', 'rope_theta': 1e4, 'short_factor': [1.0] * 4, 'factor': 2.0,
                        'long_factor': [1.0] * 4, 'original_max_position_embeddings': 32}}, 'longrope'),
  ({'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e4, 'partial_rotary_factor': 0.5}},
   'partial_rotary_factor is 0.5'),
])
def test_what_the_model_has_not_is_refused_by_name(checkpoint, change, message):
  folder, *_ = checkpoint
  config = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(config | change))
  with pytest.raises(ValueError, match=message):
    loaded(folder)


@pytest.mark.parametrize('downloaded', [True, False])
def test_pickled_weights_are_never_opened(checkpoint, downloaded):
  """Of a repository of the hub they don't even arrive: the message must still say why nothing is there."""
  folder, *_ = checkpoint
  os.rename(folder / 'model.safetensors', (folder if downloaded else folder.parent) / 'pytorch_model.bin')
  with pytest.raises(ValueError, match=r'pickled weights \(pytorch_model.bin\) are never downloaded or read here'):
    loaded(folder)


def test_a_file_outside_the_folder_is_not_followed(checkpoint):
  folder, *_ = checkpoint
  os.rename(folder / 'model.safetensors', folder.parent / 'elsewhere.safetensors')
  index = {'weight_map': {Q0: '../elsewhere.safetensors'}}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  with pytest.raises(ValueError, match=r"'../elsewhere.safetensors', which is not a safetensors file beside it"):
    loaded(folder)


def test_a_file_that_cannot_be_written_is_an_os_error(tmp_path):
  with pytest.raises(OSError, match='model.safetensors could not be written'):
    write(tmp_path / 'nowhere', {'a': (4, lambda: np.zeros(1, np.float32))}, 100)


def test_a_model_that_no_architecture_has_is_refused():
  from datasel.models.presets import PRESETS
  with pytest.raises(ValueError, match=r'no Hugging Face architecture.*rope_fraction'):
    hf.family(PRESETS['doremi_120m_repository'])
  writable = {name: hf.family(m) for name, m in PRESETS.items() if name != 'doremi_120m_repository'}
  assert set(writable.values()) == {'llama', 'mistral', 'arcee'}
