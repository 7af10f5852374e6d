"""Text from a model, asked for and answered as OpenAI's /v1/completions has it."""

import secrets
import time
import uuid
from collections.abc import Hashable, Sequence
from typing import Any

from datasel import pretrained
from datasel.generate import Generated, Generator
from datasel.methods.prox.worker import Asked, Endpoint, Refused

MAX_PROMPTS, MAX_STOPS, MAX_NEW = 64, 4, 1024  # prompts and stop strings of a request, tokens after each prompt
_KNOWN = ('model', 'prompt', 'max_tokens', 'temperature', 'top_p', 'stop', 'n', 'seed', 'stream')


class Completions:
  """source: the model.  batch_size: prompts at a time.  A request may state

    prompt       a string, or a list of them; the tokenizer's bos, where it has one, goes before each
    max_tokens   16 unless stated
    temperature  1 unless stated; 0 takes the likeliest token, and then requests are done together
    top_p        1 unless stated
    stop         a string, or up to four
    seed         for a second request to be answered as the first
    n, stream    1 and false: nothing else is done here
    model        the model's name

  and nothing more.
  """

  def __init__(self, source: pretrained.Source, *, batch_size: int = 8):
    self.name, self._tokenizer, self._max_length = source.name, source.tokenizer(), source.max_length
    # After a letter, for a tokenizer that would drop a space at the beginning of a text.
    [self._before] = self._tokenizer.encode_batch(['a'])
    self._skip = len(self._tokenizer.decode(self._before))
    eos_id = self._tokenizer.eos_id
    self._generator = Generator(
      source.model, source.params(), batch_size=batch_size, eos_ids=() if eos_id is None else (eos_id,),
      detokenize=self._text, max_length=source.max_length)
    self.endpoint = Endpoint(self._read, self._work)

  def _text(self, tokens: Sequence[int]) -> str:
    return self._tokenizer.decode([*self._before, *tokens])[self._skip:]

  def _read(self, body: dict) -> Asked:
    body = {key: value for key, value in body.items() if value is not None}
    if unknown := [key[:40] for key in body if key not in _KNOWN]:
      raise Refused(400, f'{", ".join(unknown)}: not done here; known: {", ".join(_KNOWN)}')
    if body.get('model', self.name) != self.name:
      raise Refused(404, f'the model here is {self.name!r}')
    if _number(body, 'n', 1, 1, 1, int) != 1 or body.get('stream', False) is not False:
      raise Refused(400, 'n is 1 and stream false here')
    texts, stops = _strings(body, 'prompt', MAX_PROMPTS), _strings(body, 'stop', MAX_STOPS) if 'stop' in body else []
    if '' in stops:
      raise Refused(400, 'stop has an empty string, which every text holds')
    new = _number(body, 'max_tokens', 16, 1, MAX_NEW, int)
    settings = {'max_new_tokens': new, 'stop': tuple(stops),
                'temperature': float(_number(body, 'temperature', 1, 0, 2, float))}
    top_p = float(_number(body, 'top_p', 1, 0, 1, float))
    seed = _number(body, 'seed', secrets.randbelow(2**31), 0, 2**31 - 1, int)
    if not top_p:
      raise Refused(400, 'top_p is 0; want more')
    bos = [] if self._tokenizer.bos_id is None else [self._tokenizer.bos_id]
    prompts = [[*bos, *map(int, ids)] for ids in self._tokenizer.encode_batch(texts)]
    for n, prompt in enumerate(prompts):
      if not prompt:
        raise Refused(400, f'prompt {n} is empty, and the tokenizer has nothing to begin a text with')
      if len(prompt) + new > self._max_length:
        raise Refused(400, f'prompt {n} has {len(prompt)} tokens and {new} may follow; want {self._max_length} at most '
                           'together')
    key = tuple(settings.items())
    if settings['temperature']:
      # What is drawn depends on a prompt's place among those that are done together: it must be that in its request.
      key = (*key, ('top_p', top_p), ('seed', seed), ('request', object()))
    return Asked(key, prompts, lambda results: self._answer(prompts, results))

  def _work(self, key: Hashable, prompts: list[list[int]]) -> list[Generated]:
    settings = dict(key)
    settings.pop('request', None)
    return self._generator(prompts, **settings)

  def _answer(self, prompts: list[list[int]], results: list[Generated]) -> dict[str, Any]:
    read, made = sum(map(len, prompts)), sum(len(one.tokens) for one in results)
    return {
      'id': f'cmpl-{uuid.uuid4().hex}', 'object': 'text_completion', 'created': int(time.time()), 'model': self.name,
      'choices': [{'index': n, 'text': one.text, 'logprobs': None,
                   'finish_reason': 'length' if one.finished == 'length' else 'stop'}
                  for n, one in enumerate(results)],
      'usage': {'prompt_tokens': read, 'completion_tokens': made, 'total_tokens': read + made}}


def _strings(body: dict, key: str, most: int) -> list[str]:
  values = [body[key]] if isinstance(body.get(key), str) else body.get(key)
  if not isinstance(values, list) or not 1 <= len(values) <= most or not all(isinstance(one, str) for one in values):
    raise Refused(400, f'{key}: want a string, or a list of 1 to {most}')
  return values


def _number(body: dict, key: str, default: float, low: float, high: float, kind: type) -> Any:
  value = body.get(key, default)
  right = isinstance(value, kind) or kind is float and isinstance(value, int)
  if key in body and (not right or isinstance(value, bool) or not low <= value <= high):
    raise Refused(400, f'{key}: want {"a whole number" if kind is int else "a number"} from {low} to {high}')
  return value
