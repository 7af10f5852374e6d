"""Hugging Face checkpoints, both ways: Mistral, Llama, Arcee and GPT-NeoX shapes, as safetensors with a config.

Reading goes leaf by leaf and device by device, each device's part straight from the mapped file, so a model is never in
host memory beside itself.  Nothing pickled is opened and no code of a repository is run.
"""

import dataclasses
import functools
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from datasel import sharding, workdir
from datasel.models.mistral import Mistral
from datasel.models.tensor_files import Tensors, write

FAMILIES = ('mistral', 'llama', 'arcee', 'gpt_neox')
_ACTIVATIONS = {'silu': 'silu', 'gelu': 'gelu', 'gelu_pytorch_tanh': 'gelu_tanh'}  # also of 'swish', 'gelu_new'
_SYNONYMS = {'swish': 'silu', 'gelu_new': 'gelu_pytorch_tanh', 'gelu_fast': 'gelu_pytorch_tanh'}
# Buffers that older checkpoints hold beside their parameters.
_BUFFERS = re.compile(r'.*\.(rotary_emb\.inv_freq|attention\.(bias|masked_bias))')
_PATTERNS = ['*.json', 'model*.safetensors', 'tokenizer.model', 'chat_template.jinja']  # not consolidated.safetensors


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of a checkpoint, and the parameters of ours that it holds.

  layer: which one of the stacked leaves; None for leaves that have no layers.
  split: the tensor -> its leaves, as views of it.  join: the leaves -> the tensor.
  """

  name: str
  shape: tuple[int, ...]
  layer: int | None
  leaves: tuple[tuple[str, ...], ...]
  split: Callable[[np.ndarray], tuple[np.ndarray, ...]]
  join: Callable[..., np.ndarray]


def fetch(name: str, revision: str | None = None) -> pathlib.Path:
  """The folder of a model of the Hugging Face hub, downloaded into its cache: config, tokenizer, safetensors.

  Raises ValueError for a name or revision that the hub does not have, or when it can't be reached.
  """
  import huggingface_hub
  if not re.fullmatch(r'[\w.-]+(/[\w.-]+)?', name):
    raise ValueError(f'{name!r} is neither a folder here nor a name of the Hugging Face hub (OWNER/MODEL)')
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=_PATTERNS))
  except Exception as e:  # of several libraries: the hub's, the network's
    at = f' at revision {revision!r}' if revision else ''
    raise ValueError(f'the Hugging Face hub did not give {name!r}{at}, and nothing here has that name: {e}') from e


def read_config(folder: str | os.PathLike) -> dict:
  """A folder's config.json with transformers' defaults filled in.  ValueError where transformers can't read it."""
  import transformers
  folder = pathlib.Path(folder)
  if not (folder / 'config.json').is_file():
    raise ValueError(f'{folder} has no config.json: it is no Hugging Face model')
  stated = workdir.read_json(folder / 'config.json')
  kind = stated.get('model_type') if isinstance(stated, dict) else None
  if kind not in FAMILIES:
    raise ValueError(f'{folder} holds a model of type {kind!r}; this code reads {FAMILIES}')
  try:
    return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
  except Exception as e:  # transformers' validation has no exception of its own
    raise ValueError(f'{folder / "config.json"} is refused by transformers: {e}') from e


def from_config(config: dict) -> Mistral:
  """The model that a Hugging Face config describes.  ValueError names what it has and this code has not."""
  kind = config['model_type']
  _refuse(config, 'quantization_config', None, 'quantised weights')
  if kind not in FAMILIES:
    raise ValueError(f'config.json: model_type is {kind!r}; this code reads {FAMILIES}')
  neox = kind == 'gpt_neox'
  if neox:
    _refuse(config, 'attention_bias', True, 'GPT-NeoX without biases in attention')
  else:
    for name in ('attention_bias', 'mlp_bias'):
      _refuse(config, name, False, 'a Llama with biases')
  activation = _SYNONYMS.get(config['hidden_act'], config['hidden_act'])
  if activation not in _ACTIVATIONS:
    raise ValueError(f'config.json: hidden_act is {config["hidden_act"]!r}; this code has {sorted(_ACTIVATIONS)}')
  rope = dict(config.get('rope_parameters') or {})
  theta, fraction = rope.pop('rope_theta', 1e4), rope.pop('partial_rotary_factor', 1.0)
  if fraction != 1 and not neox:
    raise ValueError(f'config.json: partial_rotary_factor is {fraction}; of the models this code reads only GPT-NeoX '
                     'rotates part of a head')
  rope = {k: v for k, v in rope.items() if v is not None and k != 'type'}
  if rope.get('rope_type', 'default') == 'default':
    rope = {}
  elif rope['rope_type'] == 'linear':
    rope = {k: rope[k] for k in ('rope_type', 'factor') if k in rope}
  elif rope['rope_type'] == 'dynamic':  # transformers stretches past max_position_embeddings, whatever else it says
    rope = {'rope_type': 'dynamic', 'factor': rope.get('factor'),
            'original_max_position_embeddings': config['max_position_embeddings']}
  heads, width = config['num_attention_heads'], config['hidden_size']
  if neox and int(width // heads * fraction) % 2:
    raise ValueError(f'config.json: rotary channels come in pairs, but {fraction} of {width // heads} is odd')
  return Mistral(
    vocab_size=config['vocab_size'], n_layers=config['num_hidden_layers'], d_model=width, n_heads=heads,
    n_kv_heads=config.get('num_key_value_heads') or heads, head_dim=config.get('head_dim') or width // heads,
    d_ff=config['intermediate_size'], gated=kind in ('mistral', 'llama'), activation=_ACTIVATIONS[activation],
    norm='layer' if neox else 'rms', bias=neox, parallel=neox and config['use_parallel_residual'],
    tied=bool(config['tie_word_embeddings']), rope_fraction=fraction, rope_theta=theta,
    rope_scaling=tuple(rope.items()), window=config['sliding_window'] if kind == 'mistral' else None,
    norm_eps=config['layer_norm_eps' if neox else 'rms_norm_eps'])


def family(model: Mistral) -> str:
  """The Hugging Face architecture that has a model's layers.  ValueError says why none has."""
  llama = model.norm == 'rms' and not model.bias and not model.parallel and model.rope_fraction == 1
  if llama and model.gated:
    return 'llama' if model.window is None else 'mistral'
  if llama and model.window is None:
    return 'arcee'
  if (model.norm == 'layer' and model.bias and not model.gated and model.window is None
      and model.n_kv_heads == model.n_heads and model.n_heads * model.head_dim == model.d_model):
    return 'gpt_neox'
  distinctive = ('norm', 'bias', 'gated', 'parallel', 'rope_fraction', 'window', 'n_kv_heads')
  have = {field: getattr(model, field) for field in distinctive}
  raise ValueError(f'no Hugging Face architecture that this code writes has {have} together; Llama and Mistral have '
                   'RMSNorm, gated layers, full rotary heads and no biases, Arcee the same ungated and windowless, '
                   'GPT-NeoX LayerNorm, biases, ungated layers and as many key heads as query heads')


def to_config(model: Mistral, *, max_length: int, bos_id: int | None, eos_id: int | None, dtype: str) -> dict:
  """config.json of a model.  max_length: positions it was trained on.  dtype: of the weights beside it."""
  kind = family(model)
  classes = {'llama': 'Llama', 'mistral': 'Mistral', 'arcee': 'Arcee', 'gpt_neox': 'GPTNeoX'}
  rope = dict(model.rope_scaling)
  if rope.get('rope_type') == 'dynamic':
    max_length = rope.pop('original_max_position_embeddings')
  rope = {'rope_type': 'default', 'rope_theta': model.rope_theta} | rope
  config = {
    'model_type': kind, 'architectures': [f'{classes[kind]}ForCausalLM'], 'vocab_size': model.vocab_size,
    'hidden_size': model.d_model, 'intermediate_size': model.d_ff, 'num_hidden_layers': model.n_layers,
    'num_attention_heads': model.n_heads, 'max_position_embeddings': max_length,
    'hidden_act': {ours: theirs for theirs, ours in _ACTIVATIONS.items()}[model.activation],
    'tie_word_embeddings': model.tied, 'initializer_range': model.init_std, 'bos_token_id': bos_id,
    'eos_token_id': eos_id, 'pad_token_id': None, 'use_cache': True, 'dtype': dtype, 'rope_parameters': rope}
  if kind == 'gpt_neox':
    rope['partial_rotary_factor'] = model.rope_fraction
    return config | {'layer_norm_eps': model.norm_eps, 'use_parallel_residual': model.parallel, 'attention_bias': True,
                     'attention_dropout': 0.0, 'hidden_dropout': 0.0}
  # Also in the words of transformers before version 5, which other programs still read.
  config |= {'rms_norm_eps': model.norm_eps, 'num_key_value_heads': model.n_kv_heads, 'head_dim': model.head_dim,
             'attention_dropout': 0.0, 'rope_theta': model.rope_theta, 'rope_scaling': dict(model.rope_scaling) or None}
  return config | ({'sliding_window': model.window} if kind == 'mistral' else
                   {'attention_bias': False, 'mlp_bias': False})


def load(tensors: Tensors, model: Mistral, *, mesh: jax.sharding.Mesh | None = None,
         rules: sharding.Rules = sharding.RULES, dtype: str = 'float32') -> dict:
  """The parameters of `model` out of a checkpoint, born where the mesh wants them.

  dtype: of the parameters: 'float32' to train, 'bfloat16' to evaluate in half the memory.
  Raises ValueError naming the tensor that is missing, not expected, of another shape, damaged or not finite.
  """
  wanted = {t.name: t for t in tensor_map(model)}
  shapes = {name: shape for name, shape in tensors.shapes().items() if not _BUFFERS.fullmatch(name)}
  head = 'lm_head.weight' if family(model) != 'gpt_neox' else 'embed_out.weight'
  if model.tied and head in shapes:
    embed = next(t.name for t in wanted.values() if t.leaves == (('embed', 'kernel'),))
    if not (embed in shapes and np.array_equal(tensors.array(head), tensors.array(embed))):
      raise ValueError(f'tensor {head} differs from {embed}, but config.json has tie_word_embeddings: correct the one '
                       'or the other')
    del shapes[head]
  missing, strange = wanted.keys() - shapes.keys(), shapes.keys() - wanted.keys()
  if missing or strange:
    raise ValueError('; '.join(
      f'tensor {min(names)} is {what} ({len(names)} such tensors)'
      for names, what in ((missing, 'missing'), (strange, 'not one of this model')) if names)
      + ': the checkpoint is not of the architecture that its config.json states')
  for name, tensor in wanted.items():
    if shapes[name] != tensor.shape:
      raise ValueError(f'tensor {name} has the shape {list(shapes[name])}, but config.json makes it '
                       f'{list(tensor.shape)}')
  tensors.verify()
  parts: dict[tuple[str, ...], list[tuple[Tensor, int]]] = {}
  for tensor in wanted.values():  # in the order of the layers
    for n, leaf in enumerate(tensor.leaves):
      parts.setdefault(leaf, []).append((tensor, n))
  mesh = sharding.make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
  abstract = model.abstract()
  places = sharding.tree_shardings(mesh, abstract, model.logical_axes(), rules)

  def one(path, array, place):
    leaf = tuple(key.key for key in path)
    return jax.make_array_from_callback(array.shape, place, functools.partial(
      _part, tensors, parts[leaf], np.dtype(jax.numpy.dtype(dtype))))

  return jax.tree_util.tree_map_with_path(one, abstract, places)


def save(folder: str | os.PathLike, model: Mistral, params: dict, *, dtype: str = 'float32',
         max_shard_bytes: int = 4_000_000_000) -> None:
  """Writes the safetensors of a model into `folder`, with a digest of each tensor, at most so many bytes a file."""
  target = np.dtype(jax.numpy.dtype(dtype))

  def leaf(path: tuple[str, ...], layer: int | None) -> np.ndarray:
    array = functools.reduce(lambda tree, key: tree[key], path, params)
    array = np.asarray(array if layer is None else array[layer])
    if not np.isfinite(array.astype(np.float32).astype(target)).all():
      where = '.'.join(path) if layer is None else f'{".".join(path)}, layer {layer},'
      raise ValueError(f'parameter {where} is not finite in {dtype}; this model cannot be exported so')
    return array.astype(target)

  given = lambda t: lambda: t.join(*(leaf(path, t.layer) for path in t.leaves))
  write(pathlib.Path(folder), {t.name: (math.prod(t.shape) * target.itemsize, given(t)) for t in tensor_map(model)},
        max_shard_bytes)


def tensor_map(model: Mistral) -> list[Tensor]:
  """Every tensor of a model's checkpoint, layer by layer."""
  return list(_neox(model) if family(model) == 'gpt_neox' else _llama(model))


def _llama(model: Mistral) -> Iterator[Tensor]:
  D, H, K, Dh, F = model.d_model, model.n_heads, model.n_kv_heads, model.head_dim, model.d_ff
  yield _same('model.embed_tokens.weight', (model.vocab_size, D), ('embed', 'kernel'))
  for i in range(model.n_layers):
    at = f'model.layers.{i}.'
    yield _same(at + 'input_layernorm.weight', (D,), ('blocks', 'attention_norm', 'scale'), i)
    yield _matrix(at + 'self_attn.q_proj.weight', (D,), (H, Dh), 'query', i)
    yield _matrix(at + 'self_attn.k_proj.weight', (D,), (K, Dh), 'key', i)
    yield _matrix(at + 'self_attn.v_proj.weight', (D,), (K, Dh), 'value', i)
    yield _matrix(at + 'self_attn.o_proj.weight', (H, Dh), (D,), 'out', i)
    yield _same(at + 'post_attention_layernorm.weight', (D,), ('blocks', 'mlp_norm', 'scale'), i)
    if model.gated:
      yield _matrix(at + 'mlp.gate_proj.weight', (D,), (F,), 'gate', i)
    yield _matrix(at + 'mlp.up_proj.weight', (D,), (F,), 'up', i)
    yield _matrix(at + 'mlp.down_proj.weight', (F,), (D,), 'down', i)
  yield _same('model.norm.weight', (D,), ('norm', 'scale'))
  if not model.tied:
    yield _same('lm_head.weight', (model.vocab_size, D), ('head', 'kernel'))


def _neox(model: Mistral) -> Iterator[Tensor]:
  D, H, Dh, F = model.d_model, model.n_heads, model.head_dim, model.d_ff
  yield _same('gpt_neox.embed_in.weight', (model.vocab_size, D), ('embed', 'kernel'))
  for i in range(model.n_layers):
    at = f'gpt_neox.layers.{i}.'
    for theirs, ours in (('input_layernorm', 'attention_norm'), ('post_attention_layernorm', 'mlp_norm')):
      yield _same(f'{at}{theirs}.weight', (D,), ('blocks', ours, 'scale'), i)
      yield _same(f'{at}{theirs}.bias', (D,), ('blocks', ours, 'bias'), i)
    three = ('query', 'key', 'value')  # of each head one after another
    yield Tensor(
      at + 'attention.query_key_value.weight', (3 * D, D), i, tuple(('blocks', name, 'kernel') for name in three),
      lambda w: tuple(w.reshape(H, 3, Dh, D)[:, n].transpose(2, 0, 1) for n in range(3)),
      lambda *kernels: np.stack([kernel.transpose(1, 2, 0) for kernel in kernels], axis=1).reshape(3 * D, D))
    yield Tensor(
      at + 'attention.query_key_value.bias', (3 * D,), i, tuple(('blocks', name, 'bias') for name in three),
      lambda b: tuple(b.reshape(H, 3, Dh)[:, n] for n in range(3)),
      lambda *biases: np.stack(biases, axis=1).reshape(3 * D))
    for theirs, ours, inner, outer in (
        ('attention.dense', 'out', (H, Dh), (D,)), ('mlp.dense_h_to_4h', 'up', (D,), (F,)),
        ('mlp.dense_4h_to_h', 'down', (F,), (D,))):
      yield _matrix(f'{at}{theirs}.weight', inner, outer, ours, i)
      yield _same(f'{at}{theirs}.bias', outer, ('blocks', ours, 'bias'), i)
  yield _same('gpt_neox.final_layer_norm.weight', (D,), ('norm', 'scale'))
  yield _same('gpt_neox.final_layer_norm.bias', (D,), ('norm', 'bias'))
  if not model.tied:
    yield _same('embed_out.weight', (model.vocab_size, D), ('head', 'kernel'))


def _same(name: str, shape: tuple[int, ...], leaf: tuple[str, ...], layer: int | None = None) -> Tensor:
  return Tensor(name, shape, layer, (leaf,), lambda x: (x,), lambda x: x)


def _matrix(name: str, inner: tuple[int, ...], outer: tuple[int, ...], module: str, layer: int) -> Tensor:
  """A torch Linear, [out, in], as our kernel of shape inner + outer."""
  return Tensor(name, (math.prod(outer), math.prod(inner)), layer, (('blocks', module, 'kernel'),),
                lambda w: (w.T.reshape(*inner, *outer),),
                lambda kernel: kernel.reshape(math.prod(inner), math.prod(outer)).T)


def _part(tensors: Tensors, parts: list[tuple[Tensor, int]], dtype: np.dtype, index: tuple[slice, ...]) -> np.ndarray:
  """A device's part of a leaf."""

  def read(tensor: Tensor, n: int, inside: tuple[slice, ...]) -> np.ndarray:
    array = tensor.split(tensors.array(tensor.name))[n][inside].astype(dtype)
    if not np.isfinite(array.astype(np.float32)).all():
      raise ValueError(f'tensor {tensor.name} holds values that are not finite; get the checkpoint again')
    return array

  if parts[0][0].layer is None:
    return read(*parts[0], index)
  return np.stack([read(*part, index[1:]) for part in parts[index[0]]])


def _refuse(config: dict, name: str, supported: Any, what: str) -> None:
  if config.get(name, supported) != supported:
    raise ValueError(f'config.json: {name} is {config[name]!r}: {what} is not supported here')
