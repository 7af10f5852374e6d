"""A Llama in a GGUF file (llama.cpp): its tensors under Hugging Face's names, its shape, its tokenizer."""

import functools
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from datasel import workdir
from datasel.models.mistral import Mistral


class Gguf:
  """The tensors of a file (`tensor_files.Tensors`); quantised ones are dequantised to float32 when asked for."""

  _NAMES = {'token_embd.weight': 'model.embed_tokens.weight', 'output_norm.weight': 'model.norm.weight',
            'output.weight': 'lm_head.weight'}
  _LAYER = {'attn_norm': 'input_layernorm', 'ffn_norm': 'post_attention_layernorm', 'attn_q': 'self_attn.q_proj',
            'attn_k': 'self_attn.k_proj', 'attn_v': 'self_attn.v_proj', 'attn_output': 'self_attn.o_proj',
            'ffn_gate': 'mlp.gate_proj', 'ffn_up': 'mlp.up_proj', 'ffn_down': 'mlp.down_proj'}

  def __init__(self, path: str | os.PathLike):
    try:
      import gguf
    except ImportError as e:
      raise ImportError("reading a .gguf file needs the package gguf: pip install 'datasel[demo]'") from e
    self._path = pathlib.Path(path)
    try:
      self._reader = gguf.GGUFReader(self._path)
    except (OSError, ValueError, KeyError, IndexError) as e:
      raise ValueError(f'{self._path} is not a whole GGUF file ({e}); get it again') from e
    self._tensors = {self._name(t.name): t for t in self._reader.tensors}
    self.array = functools.lru_cache(maxsize=2)(self._dequantised)  # devices ask for parts of one tensor

  def field(self, name: str) -> Any:
    """A value of the file's metadata, None where it has none of that name."""
    found = self._reader.fields.get(name)
    return None if found is None else found.contents()

  def _name(self, name: str) -> str:
    layer = re.fullmatch(r'blk\.(\d+)\.(\w+)\.weight', name)
    if layer and layer[2] in self._LAYER:
      return f'model.layers.{layer[1]}.{self._LAYER[layer[2]]}.weight'
    return self._NAMES.get(name, name)

  def shapes(self) -> Mapping[str, tuple[int, ...]]:
    return {name: tuple(int(n) for n in t.shape[::-1]) for name, t in self._tensors.items()}

  def _dequantised(self, name: str) -> np.ndarray:
    import gguf
    tensor = self._tensors[name]
    array = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    array = array.reshape(self.shapes()[name])
    heads = {'q_proj': 'head_count', 'k_proj': 'head_count_kv'}.get(name.split('.')[-2])
    if heads is None:
      return array
    # llama.cpp pairs neighbouring channels in its rotary embedding, and its converter reorders these rows for that.
    n = self.field(f'llama.attention.{heads}')
    return array.reshape(n, -1, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)

  def verify(self) -> None:
    """GGUF holds no digests."""

  def model(self) -> Mistral:
    """The shape of the model.  ValueError for what is no Llama, or one with something that this code has not."""
    kind = self.field('general.architecture')
    if kind != 'llama':
      raise ValueError(f"{self._path} holds a model of architecture {kind!r}; this code reads 'llama' alone")
    shapes, field = self.shapes(), lambda name: self.field(f'llama.{name}')
    scaled = next((name for name in self._reader.fields if name.startswith('llama.rope.scaling')), None)
    if scaled or 'rope_freqs.weight' in shapes:
      raise ValueError(f'{self._path} scales its rotary positions ({scaled or "rope_freqs.weight"}), which is not read '
                       'from GGUF; use the safetensors of this model')
    head_dim = field('rope.dimension_count') or field('embedding_length') // field('attention.head_count')
    return Mistral(
      vocab_size=shapes['model.embed_tokens.weight'][0], n_layers=field('block_count'),
      d_model=field('embedding_length'), n_heads=field('attention.head_count'),
      n_kv_heads=field('attention.head_count_kv') or field('attention.head_count'), head_dim=head_dim,
      d_ff=field('feed_forward_length'), tied='lm_head.weight' not in shapes,
      rope_theta=float(field('rope.freq_base') or 1e4),
      norm_eps=float(np.format_float_positional(np.float32(field('attention.layer_norm_rms_epsilon')))))

  def write_tokenizer(self, folder: pathlib.Path) -> None:
    """tokenizer.json and tokenizer_config.json, as both datasel and transformers read them."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers
    kind = self.field('tokenizer.ggml.model'), self.field('tokenizer.ggml.pre')
    first = {'smollm': [pre_tokenizers.Digits(individual_digits=True)], 'gpt-2': []}.get(kind[1])
    if kind[0] != 'gpt2' or first is None:
      raise ValueError(f'{self._path} has a tokenizer of kind {kind}; of GGUF files those of GPT-2 and SmolLM are '
                       "read: give the model's own tokenizer.json with --tokenizer")
    tokens = self.field('tokenizer.ggml.tokens')
    merges = [tuple(pair.split(' ')) for pair in self.field('tokenizer.ggml.merges')]
    backend = tokenizers.Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence([*first, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    control = 3  # among llama.cpp's token types
    types = self.field('tokenizer.ggml.token_type')
    backend.add_special_tokens([token for token, kind in zip(tokens, types) if kind == control])
    ids = {name: self.field(f'tokenizer.ggml.{key}_token_id')
           for name, key in (('bos_token', 'bos'), ('eos_token', 'eos'), ('pad_token', 'padding'))}
    special = {name: None if i is None else tokens[i] for name, i in ids.items()}
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False,
              'model_max_length': self.field('llama.context_length'),
              'chat_template': self.field('tokenizer.chat_template')} | special
    with workdir.replacing(folder / 'tokenizer.json') as f:
      f.write(backend.to_str().encode())
    workdir.write_json(folder / 'tokenizer_config.json', config)
