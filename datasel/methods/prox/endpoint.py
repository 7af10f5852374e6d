"""Questions to a language model behind any OpenAI-compatible endpoint: answers are kept on disk, failures are bounded.

The key is read from OPENAI_API_KEY and goes nowhere else; local servers mostly want none.
"""

import collections
import concurrent.futures
import dataclasses
import logging
import os
import pathlib
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from datasel import workdir

logger = logging.getLogger(__name__)

CUT_OFF = 'cut off'
MAX_FAILURES = 20  # one after the other: then the endpoint is taken to be gone
CHARACTERS_PER_TOKEN = 4  # for what a dry run estimates


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
  """One request.  max_tokens: of the answer."""
  system: str
  user: str
  max_tokens: int = 512


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
  """text: '' where there is none, and then `error` says why.  cached: nothing was asked.

  What failed is asked again by a later run; what was 'cut off' at max_tokens is not, for it would be again.
  """
  text: str
  cached: bool = False
  error: str = ''

  @property
  def failed(self) -> bool:
    """Whether a later run asks again."""
    return self.error not in ('', CUT_OFF)


@dataclasses.dataclass
class Ledger:
  """What was asked and what it took; answers from the cache take nothing.

  prices: per million tokens, read and written.
  """
  prices: tuple[float, float] = (0.0, 0.0)
  asked: int = 0
  cached: int = 0
  retries: int = 0
  prompt_tokens: int = 0
  answer_tokens: int = 0
  failed: collections.Counter = dataclasses.field(default_factory=collections.Counter)

  @property
  def cost(self) -> float:
    """In the unit of the prices."""
    return (self.prices[0] * self.prompt_tokens + self.prices[1] * self.answer_tokens) / 1e6

  def facts(self) -> dict[str, Any]:
    """All of it as JSON."""
    return dataclasses.asdict(self) | {'failed': dict(self.failed), 'cost': self.cost}


class Unusable(RuntimeError):
  """The endpoint refuses every request, or is gone; what it answered before is in the cache."""


class Endpoint:
  """A model behind an endpoint.

  url: up to and with '/v1'.  cache: a folder of answers, each under the digest of model, question and settings; the
  address is no part of it, for the model's name is what counts.  timeout_s: of one attempt.  retries: further attempts,
  after growing pauses or those that the endpoint asks for, where it is busy, fails or does not answer.  workers:
  requests at once.  prices: per million tokens read and written, for `ledger`.
  ImportError without the openai client.
  """

  def __init__(self, url: str, model: str, cache: str | os.PathLike, *, timeout_s: float = 120, retries: int = 4,
               workers: int = 8, temperature: float = 0, prices: tuple[float, float] = (0.0, 0.0)):
    try:
      import openai
    except ImportError as e:
      raise ImportError("asking an endpoint needs the openai client: pip install 'datasel[prox]'") from e
    if workers < 1 or retries < 0 or timeout_s <= 0:
      raise ValueError(f'{workers} workers, {retries} retries, {timeout_s} s; want at least 1, at least 0, over 0')
    self._openai = openai
    self._client = openai.OpenAI(base_url=url, api_key=os.environ.get('OPENAI_API_KEY') or 'none', timeout=timeout_s,
                                 max_retries=retries)
    self._url, self._cache, self._workers = url, pathlib.Path(cache), workers
    self.model, self.temperature = model, temperature
    self.ledger = Ledger(prices)
    self._lock, self._failures = threading.Lock(), 0

  def ask(self, questions: Iterable[Question]) -> Iterator[Answer]:
    """The answers, in the questions' order; few more questions are drawn than are being answered.

    Raises Unusable where the endpoint refuses the key, the model or every request, and after 20 failures in a row.
    """
    told = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(self._workers) as pool:
      waiting: collections.deque[concurrent.futures.Future] = collections.deque()
      try:
        for question in questions:
          waiting.append(pool.submit(self._answer, question))
          if len(waiting) >= 2 * self._workers:
            yield waiting.popleft().result()
          if time.monotonic() - told > 10:
            told = time.monotonic()
            logger.info('%s', self.summary())
        while waiting:
          yield waiting.popleft().result()
      finally:
        for future in waiting:
          future.cancel()

  def plan(self, questions: Iterable[Question]) -> dict[str, float]:
    """What asking would take, and nothing is asked: questions, those in the cache, tokens estimated, and the most that
    it would cost."""
    count = cached = prompt_tokens = answer_tokens = 0
    for question in questions:
      count += 1
      if self._file(question).exists():
        cached += 1
      else:
        prompt_tokens += (len(question.system) + len(question.user)) // CHARACTERS_PER_TOKEN
        answer_tokens += question.max_tokens
    cost = Ledger(self.ledger.prices, prompt_tokens=prompt_tokens, answer_tokens=answer_tokens).cost
    return {'questions': count, 'cached': cached, 'prompt_tokens': prompt_tokens, 'answer_tokens': answer_tokens,
            'cost': cost}

  def summary(self) -> str:
    """One line for people."""
    ledger = self.ledger
    failed = ', '.join(f'{count} {reason}' for reason, count in ledger.failed.items()) or 'none'
    return (f'{self.model}: {ledger.asked} answers and {ledger.cached} from the cache, {ledger.retries} retries, '
            f'failed: {failed}; tokens: {ledger.prompt_tokens} read, {ledger.answer_tokens} written; cost '
            f'{ledger.cost:.4f}')

  def _request(self, question: Question) -> dict[str, Any]:
    return {'model': self.model, 'temperature': self.temperature, 'max_tokens': question.max_tokens,
            'messages': _messages(question)}

  def _file(self, question: Question) -> pathlib.Path:
    digest = workdir.digest(self._request(question))
    return self._cache / digest[:2] / f'{digest}.json'

  def _answer(self, question: Question) -> Answer:
    file = self._file(question)
    if file.exists():
      kept = workdir.read_json(file)
      with self._lock:
        self.ledger.cached += 1
      return _answer(kept, cached=True)
    with self._lock:
      if self._failures >= MAX_FAILURES:
        raise Unusable(f'{self._url} failed {self._failures} times in a row ({dict(self.ledger.failed)}); see to it '
                       'and run the same command again: what was answered is kept')
    try:
      got, retries = self._complete(question)
    except (self._openai.AuthenticationError, self._openai.PermissionDeniedError, self._openai.NotFoundError) as e:
      raise Unusable(f'{self._url} refuses model {self.model!r}: {e}; see to its address, the model\'s name and '
                     'OPENAI_API_KEY') from e
    # A body that is no JSON, or no answer, is as much a failure as a status.
    except (self._openai.OpenAIError, ValueError, TypeError, AttributeError, IndexError) as e:
      with self._lock:
        self._failures += 1
        self.ledger.failed[_reason(e)] += 1
      return Answer('', error=_reason(e))
    workdir.write_json(file, {'request': self._request(question)} | got)
    with self._lock:
      self._failures = 0
      self.ledger.asked += 1
      self.ledger.retries += retries
      self.ledger.prompt_tokens += got['prompt_tokens']
      self.ledger.answer_tokens += got['answer_tokens']
    return _answer(got, cached=False)

  def _complete(self, question: Question) -> tuple[dict[str, Any], int]:
    raw = self._client.chat.completions.with_raw_response.create(**self._request(question))
    completion = raw.parse()
    choice, usage = completion.choices[0], completion.usage  # some servers leave the usage out
    if not isinstance(choice.message.content, str):
      raise ValueError('no text in the answer')
    return {'answer': choice.message.content, 'finished': choice.finish_reason,
            'prompt_tokens': usage.prompt_tokens if usage else 0,
            'answer_tokens': usage.completion_tokens if usage else 0}, raw.retries_taken


def _answer(got: dict[str, Any], cached: bool) -> Answer:
  # Half an answer may read as a whole one that says less.
  return Answer('', cached, CUT_OFF) if got['finished'] == 'length' else Answer(got['answer'], cached)


def _messages(question: Question) -> Sequence[dict[str, str]]:
  return [{'role': 'system', 'content': question.system}, {'role': 'user', 'content': question.user}]


def _reason(error: Exception) -> str:
  status = getattr(error, 'status_code', None)
  return f'{type(error).__name__} {status}' if status else type(error).__name__
