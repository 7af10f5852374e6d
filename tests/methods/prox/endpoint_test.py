"""Laws of the questions to an endpoint, asked of a real server on this machine that answers by a script."""

import collections
import contextlib
import http.server
import json
import logging
import random
import threading
import time

import pytest

from datasel.methods.prox import annotate, examples
from datasel.methods.prox import endpoint as endpoints

OK = 'ok'
WORDS = 'apple bridge cloud dance earth flame grain house ivory jewel knife lemon'.split()
NO_PAUSE = {'retry-after-ms': '1'}  # or the client waits for half a second and longer


def completion(text, *, finished='stop', tokens=(7, 3)):
  return {'id': 'x', 'object': 'chat.completion', 'created': 0, 'model': 'm',
          'choices': [{'index': 0, 'finish_reason': finished, 'message': {'role': 'assistant', 'content': text}}],
          'usage': {'prompt_tokens': tokens[0], 'completion_tokens': tokens[1], 'total_tokens': sum(tokens)}}


class Server:
  """answer(request, attempt) -> (status, body as JSON or bytes, seconds to wait); `seen` holds the requests."""

  def __init__(self, answer):
    self.seen, self.keys, attempts, lock = [], [], collections.Counter(), threading.Lock()
    outer = self

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        user = request['messages'][-1]['content']
        with lock:
          outer.seen.append(request)
          outer.keys.append(self.headers['Authorization'])
          attempts[user] += 1
        status, body, wait = answer(user, attempts[user])
        time.sleep(wait)
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        with contextlib.suppress(OSError):  # the client may be gone
          self.send_response(status)
          for name, value in {'Content-Type': 'application/json', 'Content-Length': str(len(body)), **NO_PAUSE}.items():
            self.send_header(name, value)
          self.end_headers()
          self.wfile.write(body)

      def log_message(self, *_):
        pass

    self._server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    self.url = f'http://127.0.0.1:{self._server.server_port}/v1'
    threading.Thread(target=self._server.serve_forever, kwargs={'poll_interval': 0.01}, daemon=True).start()

  def close(self):
    self._server.shutdown()
    self._server.server_close()


@pytest.fixture
def serve(monkeypatch):
  monkeypatch.delenv('OPENAI_API_KEY', raising=False)
  servers = []

  def start(answer):
    servers.append(Server(answer))
    return servers[-1]

  yield start
  for server in servers:
    server.close()


def questions(count):
  return [endpoints.Question('be brief', f'question {n}', 32) for n in range(count)]


def test_answers_are_in_order_and_counted(serve, tmp_path):
  def slow_first(user, attempt):
    return 200, completion(f'to {user}'), 0.1 if user.endswith(' 0') else 0

  server = serve(slow_first)
  endpoint = endpoints.Endpoint(server.url, 'm', tmp_path, workers=4, prices=(2.0, 10.0))
  answers = list(endpoint.ask(questions(10)))
  assert [answer.text for answer in answers] == [f'to question {n}' for n in range(10)]
  assert server.seen[0] | {'messages': None} == {'model': 'm', 'temperature': 0, 'max_tokens': 32, 'messages': None}
  ledger = endpoint.ledger
  assert (ledger.asked, ledger.prompt_tokens, ledger.answer_tokens) == (10, 70, 30)
  assert ledger.cost == pytest.approx((2 * 70 + 10 * 30) / 1e6)


def test_a_second_run_asks_only_what_is_new(serve, tmp_path):
  server = serve(lambda user, attempt: (200, completion(user), 0))
  list(endpoints.Endpoint(server.url, 'm', tmp_path).ask(questions(3)))
  again = endpoints.Endpoint('http://127.0.0.1:9/v1', 'm', tmp_path, retries=0)  # where nothing answers
  answers = list(again.ask(questions(3)))
  assert [(one.text, one.cached) for one in answers] == [(f'question {n}', True) for n in range(3)]
  assert len(server.seen) == 3 and again.ledger.cached == 3 and again.ledger.cost == 0
  list(endpoints.Endpoint(server.url, 'other', tmp_path).ask(questions(1)))
  list(endpoints.Endpoint(server.url, 'm', tmp_path, temperature=0.5).ask(questions(1)))
  assert len(server.seen) == 5


@pytest.mark.parametrize('status', (429, 500, 503))
def test_a_busy_or_failing_server_is_asked_again(serve, tmp_path, status):
  server = serve(lambda user, attempt: (200, completion(OK), 0) if attempt == 3 else (status, {'error': 'no'}, 0))
  endpoint = endpoints.Endpoint(server.url, 'm', tmp_path, retries=2)
  assert [one.text for one in endpoint.ask(questions(1))] == [OK]
  assert len(server.seen) == 3 and endpoint.ledger.retries == 2


def test_retries_are_bounded_and_what_failed_is_asked_by_the_next_run(serve, tmp_path):
  broken = [True]
  server = serve(lambda user, attempt: (500, {}, 0) if broken[0] and user.endswith('1') else (200, completion(OK), 0))
  endpoint = endpoints.Endpoint(server.url, 'm', tmp_path, retries=1)
  assert [one.text for one in endpoint.ask(questions(3))] == [OK, '', OK]
  assert endpoint.ledger.failed == {'InternalServerError 500': 1} and len(server.seen) == 4
  broken[0] = False
  assert [one.text for one in endpoint.ask(questions(3))] == [OK] * 3
  assert len(server.seen) == 5


def test_a_server_that_is_silent_is_given_up(serve, tmp_path):
  server = serve(lambda user, attempt: (200, completion(OK), 0.5))
  endpoint = endpoints.Endpoint(server.url, 'm', tmp_path, retries=0, timeout_s=0.1)
  answer, = endpoint.ask(questions(1))
  assert not answer.text and answer.error == 'APITimeoutError'


@pytest.mark.parametrize('body', (
  b'<html>gateway</html>', b'', b'[]', b'{"choices": []}', b'{"choices": [{"message": {}}]}', b'\xff\xfe',
  json.dumps(completion(None)).encode()))
def test_garbage_is_a_failure_and_not_an_answer(serve, tmp_path, body):
  server = serve(lambda user, attempt: (200, body, 0))
  endpoint = endpoints.Endpoint(server.url, 'm', tmp_path, retries=0)
  answer, = endpoint.ask(questions(1))
  assert not answer.text and answer.error and not list(tmp_path.rglob('*.json'))


def test_half_an_answer_is_none(serve, tmp_path):
  server = serve(lambda user, attempt: (200, completion('keep_chunk()', finished='length'), 0))
  endpoint = endpoints.Endpoint(server.url, 'm', tmp_path)
  first, = endpoint.ask(questions(1))
  again, = endpoint.ask(questions(1))
  assert (first.text, first.error) == (again.text, again.error) == ('', 'cut off')
  assert len(server.seen) == 1


@pytest.mark.parametrize('status', (401, 403, 404))
def test_a_refused_key_or_model_ends_the_run(serve, tmp_path, status):
  server = serve(lambda user, attempt: (status, {'error': {'message': 'no such model'}}, 0))
  with pytest.raises(endpoints.Unusable, match="refuses model 'm'.*no such model"):
    list(endpoints.Endpoint(server.url, 'm', tmp_path, workers=1).ask(questions(50)))
  assert len(server.seen) < 10


def test_an_endpoint_that_only_fails_is_left_alone(serve, tmp_path):
  server = serve(lambda user, attempt: (500, {}, 0))
  with pytest.raises(endpoints.Unusable, match='failed 20 times in a row'):
    list(endpoints.Endpoint(server.url, 'm', tmp_path, retries=0, workers=1).ask(questions(60)))
  assert len(server.seen) == endpoints.MAX_FAILURES


def test_a_dry_run_asks_nothing(serve, tmp_path):
  server = serve(lambda user, attempt: (200, completion(OK), 0))
  endpoint = endpoints.Endpoint(server.url, 'm', tmp_path, prices=(1.0, 4.0))
  list(endpoint.ask(questions(1)))
  plan = endpoint.plan(questions(3))
  tokens = 2 * ((len('be brief') + len('question 0')) // 4)
  assert plan == {'questions': 3, 'cached': 1, 'prompt_tokens': tokens, 'answer_tokens': 64,
                  'cost': pytest.approx((tokens + 4 * 64) / 1e6)}
  assert len(server.seen) == 1


def test_the_key_is_sent_and_kept_nowhere(serve, tmp_path, monkeypatch):
  monkeypatch.setenv('OPENAI_API_KEY', 'sk-secret')
  server = serve(lambda user, attempt: (200, completion(OK), 0))
  list(endpoints.Endpoint(server.url, 'm', tmp_path).ask(questions(1)))
  assert server.keys == ['Bearer sk-secret']
  assert all('secret' not in file.read_text() for file in tmp_path.rglob('*.json'))


def answers(user, attempt):
  """A judge that tells texts apart by the number of their sentences, and sees a menu in each."""
  text = user.partition('<text>')[2] or user.rpartition('The text:')[2]
  if 'Educational score' in user:
    return 200, completion(f'Because.\n**Educational score: {1 + text.count(".") % 3}**'), 0
  if 'Format score' in user:
    return 200, completion('no idea' if text.count('apple') > 9 else 'Fine. Format score: 4/5'), 0
  if 'navigation at its beginning' in user:
    return 200, completion('It has a menu.\n```python\nremove_lines(start=0, end=0)\n```'), 0
  return 200, completion('```\nkeep_chunk()\n```'), 0


def pages(folder):
  """A corpus of 17 documents of 4 sites."""
  rng, file = random.Random(2), folder / 'train' / 'web.jsonl'
  file.parent.mkdir(parents=True)
  rows = [{'id': f'{n}', 'url': f'https://site{n % 4}.example/', 'text': '\n'.join(
    ['Menu', *(f'{" ".join(rng.choices(WORDS, k=9))} and the end of that.' for _ in range(rng.randint(6, 9)))])}
    for n in range(17)]
  file.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def test_what_failed_is_said_and_asked_again_by_the_same_command(serve, tmp_path, caplog):
  pages(tmp_path / 'corpus')
  broken = [True]

  def some(user, attempt):
    chunk = 'navigation at its beginning' in user and 'x' * (len(user) % 2)
    return (500, {}, 0) if broken[0] and chunk else answers(user, attempt)

  server = serve(some)
  flags = ['--out', str(tmp_path / 'sft'), '--corpus', str(tmp_path / 'corpus'), '--endpoint', server.url,
           '--model', 'm', '--retries', '1']
  with caplog.at_level(logging.INFO):
    assert annotate.main(flags) == 0
  failed = examples.manifest(tmp_path / 'sft')['measured']['answers failed']
  assert failed and f'UNFINISHED: {failed} questions failed' in caplog.text
  assert not {record.name.partition('.')[0] for record in caplog.records} & {'httpx', 'openai'}
  broken[0] = False
  asked = len(server.seen)
  assert annotate.main(flags) == 0
  facts = examples.manifest(tmp_path / 'sft')
  assert len(server.seen) == asked + failed and 'answers failed' not in facts['measured']
  assert annotate.main(flags) == 0 and len(server.seen) == asked + failed


def test_a_models_answers_become_examples(serve, tmp_path):
  pages(tmp_path / 'corpus')
  server = serve(answers)
  flags = ['--out', str(tmp_path / 'sft'), '--corpus', str(tmp_path / 'corpus'), '--endpoint', server.url,
           '--model', 'm']
  assert annotate.main([*flags, '--dry_run']) == 0
  assert not server.seen and not (tmp_path / 'sft').exists()
  assert annotate.main(flags) == 0
  facts = examples.manifest(tmp_path / 'sft')
  asked = len(server.seen)
  documents = sum(facts['files'][f'{split}/document']['examples'] for split in examples.SPLITS)
  chunk = [one for split in examples.SPLITS for one in examples.read(tmp_path / 'sft', split, 'chunk')]
  assert 0 < len(chunk) < documents < 17 and {one.id.rpartition('@')[0] for one in chunk} == {
    one.id for split in examples.SPLITS for one in examples.read(tmp_path / 'sft', split, 'document')
    if one.program == 'keep_doc()'}
  assert documents + facts['measured'].get('documents left out: no scores', 0) == 17
  assert asked == 2 * 17 + 3 * len(chunk)
  assert {one.program for one in chunk} == {'remove_lines(start=0, end=0)'}
  (tmp_path / 'sft' / 'manifest.json').unlink()  # as if killed: the answers are kept
  assert annotate.main(flags) == 0
  assert len(server.seen) == asked and examples.manifest(tmp_path / 'sft') == facts
