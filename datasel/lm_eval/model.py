"""The model `datasel` of lm-evaluation-harness: `--model datasel --model_args pretrained=...`.

It answers as the harness's own `hf` model does for causal models: the same tokens (transformers' fast tokenizer, its
beginning-of-sequence token, the split of context and continuation, truncation on the left), scored in JAX on all
devices.  A model with anchors generates with its anchor cache; its log-likelihoods are those of its mask, which are the
same numbers.  Where anchors are a token of their own, it stands between the sentences of what is asked.
"""

import dataclasses
import functools
import logging
import os
import pathlib
from typing import Any

import jax
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
  handle_stop_sequences,
  has_bos_prefix,
  normalize_gen_kwargs,
  postprocess_generated_text,
)
from tqdm import tqdm

from datasel import pretrained as trained
from datasel import sharding, workdir
from datasel.generate import Generator
from datasel.lm_eval.answers import Answers, identity
from datasel.lm_eval.scoring import Row, Scorer
from datasel.methods.anllm.generate import AnchorGenerator

_log = logging.getLogger(__name__)
_GENERATION = ('temperature', 'top_k', 'top_p', 'do_sample', 'until', 'max_gen_toks')


@register_model('datasel')
class DataselLM(TemplateLM):
  """A Hugging Face folder or name, a .gguf file, or a stage of a run (WORKDIR/STAGE), as a model of the harness.

  pretrained, revision, tokenizer: as `datasel.pretrained.find` takes them; tokenizer may be the folder or the
  Hugging Face name of another one.  dtype: 'float32' or 'bfloat16', of weights and arithmetic; 'auto' is float32
  weights and the model's own arithmetic.  max_length: tokens of context, by default those that the model was trained
  on.  batch_size: rows, or 'auto'.  max_batch_size: most rows for 'auto'.  add_bos_token,
  prefix_token_id: as in `hf`.  data, fsdp, tensor: sizes of the mesh.  device says nothing: the harness always gives
  one, and JAX uses all that it has.  answers: a JSONL file that keeps every answer, so that an evaluation that was
  killed goes on; it may serve any number of models and tasks.
  """

  def __init__(self, pretrained: str, revision: str | None = None, dtype: str | None = None,
               tokenizer: str | None = None, max_length: int | None = None, batch_size: int | str = 1,
               max_batch_size: int | None = None, device: str | None = None, add_bos_token: bool | None = None,
               prefix_token_id: int | None = None, data: int = -1, fsdp: int = 1, tensor: int = 1,
               answers: str | os.PathLike | None = None):
    super().__init__()
    if jax.process_count() > 1:
      raise ValueError(f'{jax.process_count()} processes: an evaluation runs in one process, on all of its devices')
    self._mesh = sharding.make_mesh(data, fsdp, tensor)
    found = trained.find(pretrained, revision=revision, tokenizer=tokenizer)
    dtype = None if dtype in (None, 'auto') else str(dtype)
    self.model = found.model if dtype is None else dataclasses.replace(found.model, dtype=dtype)
    self._params = found.params(mesh=self._mesh, dtype=dtype or 'float32')
    self.tokenizer = _tokenizer(found.tokenizer_folder, pretrained, add_bos_token)
    self._anchored = found.tokenizer()  # transformers knows an anchor's token, but puts none between sentences
    self._add_bos_token, self._custom_prefix = add_bos_token, prefix_token_id
    self.max_length = found.max_length if max_length is None else max_length
    if not isinstance(self.max_length, int) or self.max_length < 2:
      raise ValueError(f'max_length is {max_length}; want at least 2 tokens')
    if prefix_token_id is not None and prefix_token_id not in range(self.model.vocab_size):
      raise ValueError(f'prefix_token_id is {prefix_token_id}; want a token below {self.model.vocab_size}')
    self._name, self._revision = str(pretrained), revision
    self._rows = _batch_size(batch_size)
    self._scorer = Scorer(self.model, self._params, self._mesh, batch_size=self._rows,
                          most_rows=int(max_batch_size or 256))
    self._answers = Answers(answers, identity(self.model, self._params))
    # The four choices of a question have one context.
    self._encode = functools.lru_cache(maxsize=256)(self._encode)

  @property
  def eot_token_id(self) -> int:
    return self.tokenizer.eos_token_id

  @property
  def prefix_token_id(self) -> int:
    """What stands before a text without context."""
    if self._custom_prefix is not None:
      return self._custom_prefix
    if self.tokenizer.bos_token_id is not None:
      return self.tokenizer.bos_token_id
    if self.tokenizer.eos_token_id is None:
      raise ValueError(f'the tokenizer of {self._name} has neither a bos nor an eos token to stand before a text '
                       'without context; give prefix_token_id=ID in --model_args')
    return self.tokenizer.eos_token_id

  @property
  def max_gen_toks(self) -> int:
    return 256

  @property
  def tokenizer_name(self) -> str:
    return str(self.tokenizer.name_or_path).replace('/', '__')

  def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    return self.tokenizer.apply_chat_template(chat_history, tokenize=False,
                                              add_generation_prompt=add_generation_prompt,
                                              continue_final_message=not add_generation_prompt)

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
    """Token ids; with the tokenizer's own special tokens unless told otherwise, or unless the text begins with them."""
    if add_special_tokens is None:
      starts = has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
      add_special_tokens = False if starts else self._add_bos_token
    return list(self._encode(string, add_special_tokens))

  def _encode(self, string: str, add_special_tokens: bool | None) -> tuple[int, ...]:
    """add_special_tokens None: what the tokenizer itself does."""
    given = {} if add_special_tokens is None else {'add_special_tokens': add_special_tokens}
    ids, anchored = self.tokenizer.encode(string, **given), self._anchored
    if anchored.anchor_id is None:
      return tuple(ids)
    [plain], [own] = (one.encode_batch([string]) for one in (anchored.plain, anchored))
    lead = len(ids) - len(plain)
    if ids[lead:] != plain.tolist():
      raise ValueError(f'{self._name}: transformers reads {string[:80]!r} otherwise than the tokenizer with anchors; '
                       'give its tokenizer.json in --model_args: tokenizer=FOLDER')
    # The last sentence goes on in what is asked.
    return (*ids[:lead], *(own[:-1] if len(own) and own[-1] == anchored.anchor_id else own).tolist())

  def get_model_info(self) -> dict[str, Any]:
    """What the results say of the model."""
    return {'model_num_parameters': self.model.n_params, 'model_dtype': self.model.dtype,
            'model_revision': self._revision, 'model_identity': self._answers.identity,
            'max_length': self.max_length, 'devices': f'{len(jax.devices())} x {jax.devices()[0].device_kind}'}

  def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
    windows = [(n, window) for n, request in enumerate(requests) for window in map(
      utils.make_disjoint_window, utils.get_rolling_token_windows(
        token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id, max_seq_len=self.max_length,
        context_len=1))]
    found = self._loglikelihood_tokens([(None, *window) for _, window in windows], disable_tqdm=disable_tqdm)
    totals = [0.0] * len(requests)
    for (n, _), (total, _) in zip(windows, found):
      totals[n] += total
    return totals

  def _loglikelihood_tokens(self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
                            disable_tqdm: bool = False) -> list[tuple[float, bool]]:
    keys, rows, cut = [], {}, 0
    for text, context, continuation in requests:
      if not context or not 0 < len(continuation) <= self.max_length:
        raise ValueError(f'a continuation of {len(continuation)} tokens after {len(context)} ({str(text)[-200:]!r}): '
                         f'want 1 to max_length={self.max_length} tokens after at least one; more fit with a larger '
                         'max_length in --model_args')
      cut += len(context) + len(continuation) > self.max_length + 1
      tokens = (*context, *continuation)[-(self.max_length + 1):]
      keys.append(self._answers.key('loglikelihood', [tokens, len(continuation)]))
      if keys[-1] not in self._answers:
        # Requests of one input are one row of a batch: they ask for different targets at its end.
        row = rows.setdefault(tokens[:-1], Row(tokens[:-1]))
        question = (keys[-1], len(tokens) - 1 - len(continuation), tuple(continuation))
        if question not in row.asked:
          row.asked.append(question)
    if cut:
      _log.warning('%d of %d requests are longer than max_length=%d: their beginnings are cut off', cut, len(requests),
                   self.max_length)
    asked = sum(len(row.asked) for row in rows.values())
    with tqdm(total=asked, desc='log-likelihoods', unit=' requests', disable=disable_tqdm) as progress:
      for batch in self._scorer(list(rows.values())):
        self._answers.add((key, [total, greedy]) for key, total, greedy in batch)
        progress.update(len(batch))
    return [(total, greedy) for total, greedy in map(self._answers.__getitem__, keys)]

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
    asked = []  # (key, prompt's tokens, settings) of each request
    for n, request in enumerate(requests):
      context, given = request.args
      settings = normalize_gen_kwargs(given, self.max_gen_toks)
      if unknown := sorted(settings.keys() - set(_GENERATION)):
        raise ValueError(f'generation arguments {unknown} of task {request.task_name} are not known here; known: '
                         f'{sorted(_GENERATION)}')
      room = self.max_length - settings['max_gen_toks']
      if room < 1:
        raise ValueError(f'task {request.task_name} wants max_gen_toks={settings["max_gen_toks"]} new tokens, which '
                         f'leaves no room for a prompt in max_length={self.max_length}')
      starts = has_bos_prefix(context, self.tokenizer.bos_token)
      prompt = self._encode(context, False if starts else self._add_bos_token)[-room:]
      sampled = n if settings['do_sample'] else None  # repeats of a sampled request are different requests
      asked.append((self._answers.key('generate', [prompt, settings, sampled]), prompt, settings))
    groups: dict[str, dict[str, tuple]] = {}
    for key, prompt, settings in asked:
      if key not in self._answers:
        groups.setdefault(workdir.digest(settings), {})[key] = (prompt, settings)
    with tqdm(total=sum(map(len, groups.values())), desc='generation', unit=' requests',
              disable=disable_tqdm) as progress:
      for group in groups.values():
        ordered = sorted(group.items(), key=lambda item: (-len(item[1][0]), item[1][0]))
        for start in range(0, len(ordered), self._generated_rows):
          batch = ordered[start:start + self._generated_rows]
          texts = self._generate([prompt for _, (prompt, _) in batch], batch[0][1][1], seed=int(batch[0][0][:7], 16))
          self._answers.add(zip([key for key, _ in batch], texts))
          progress.update(len(batch))
    return [self._answers[key] for key, _, _ in asked]

  def _generate(self, prompts: list[tuple[int, ...]], settings: dict, seed: int) -> list[str]:
    stop = handle_stop_sequences([term for term in settings['until'] if term], eos=self._eos_text)
    sampled = settings['do_sample']
    outputs = self._generator(
      prompts, max_new_tokens=settings['max_gen_toks'], stop=stop, seed=seed,
      temperature=float(settings.get('temperature') or 0.0) if sampled else 0.0,
      top_k=int(settings.get('top_k') or 0) if sampled else 0,
      top_p=float(settings.get('top_p') or 1.0) if sampled else 1.0)
    return [postprocess_generated_text(output.text, stop, None) for output in outputs]

  @functools.cached_property
  def _eos_text(self) -> str | None:
    return None if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)

  @functools.cached_property
  def _generator(self) -> Generator:
    eos = () if self.eot_token_id is None else (self.eot_token_id,)
    detokenize = lambda tokens: self.tokenizer.decode(list(map(int, tokens)), skip_special_tokens=True)
    kind = Generator
    if self.model.anchors is not None:
      kind = functools.partial(AnchorGenerator, anchor_id=self._anchored.anchor_id)
    return kind(self.model, self._params, mesh=self._mesh, batch_size=self._generated_rows, eos_ids=eos,
                detokenize=detokenize, max_length=self.max_length)

  @property
  def _generated_rows(self) -> int:
    shards = sharding.batch_shards(self._mesh)
    return -(-(self._rows or 8 * shards) // shards) * shards


def _batch_size(given: int | str | None) -> int | None:
  """Rows, or None for 'auto' (also 'auto:N')."""
  if given is None or str(given).startswith('auto'):
    return None
  if not str(given).isdigit() or int(given) < 1:
    raise ValueError(f"batch_size is {given!r}; want a positive number of rows, or 'auto'")
  return int(given)


def _tokenizer(folder: pathlib.Path, name: str, add_bos_token: bool | None) -> Any:
  """transformers' fast tokenizer of a folder or of the hub, as `hf` would load it.

  A run keeps a bare tokenizer.json and the names of its special tokens; from those it is made directly.
  """
  import transformers
  stated = workdir.read_json(folder / 'tokenizer_config.json') if (folder / 'tokenizer_config.json').exists() else {}
  given = {} if add_bos_token is None else {'add_bos_token': add_bos_token}
  bare = (folder / 'tokenizer.json').exists() and 'tokenizer_class' not in stated
  try:
    if not bare:
      return transformers.AutoTokenizer.from_pretrained(str(folder), use_fast=True, trust_remote_code=False, **given)
    special = {key: value for key, value in stated.items() if key in ('bos_token', 'eos_token') and value is not None}
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / 'tokenizer.json'), **special, **given)
  except (OSError, ValueError, KeyError) as e:
    raise ValueError(f'transformers cannot load the tokenizer of {name}, {folder} ({e}); give another one in '
                     '--model_args: tokenizer=FOLDER or a Hugging Face name') from e
