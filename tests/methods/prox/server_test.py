"""The server answers as the library does, also many at once, and refuses what is too large, too slow or not for it."""

import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import logging
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import openai
import pytest
import small_refiner

from datasel import pretrained
from datasel.data import tokenizer as tokenizers
from datasel.data.corpus import Document
from datasel.generate import Generator
from datasel.methods.prox import refining, server
from datasel.methods.prox.completions import Completions
from datasel.methods.prox.refiner import Refiner, Writer
from datasel.methods.prox.rule_refiner import RuleRefiner
from datasel.methods.prox.serving import Limits, Server
from datasel.methods.prox.templates import Prompts
from datasel.methods.prox.worker import Asked, Endpoint, Refused, Worker
from datasel.models.presets import PRESETS

TOKEN = 'a-token-of-twenty-and-more'
PAGE = ('Home | Products | About\nPlant the tomatoes in May, when the nights are warm enough for them.[1]\n'
        'Share on Facebook\n«Größe» 文字 🌱: water them well, and often, until the plants have taken root.\n'
        'They want sun, and a wall behind them that keeps the warmth of the day.\nPick them when they are red.\n'
        'Keep the seeds of the best ones for the year that comes.\nAll rights reserved')


@contextlib.contextmanager
def served(endpoints, **limits):
  one = Server(('127.0.0.1', 0), endpoints, token=TOKEN, about={'refiner': 'a'}, limits=Limits(**limits))
  thread = threading.Thread(target=one.serve_forever, kwargs={'poll_interval': 0.01})
  thread.start()
  try:
    yield one
  finally:
    one.stop()
    thread.join(10)
    assert not thread.is_alive()


def post(one, path, body, *, token=TOKEN, headers=()):
  connection = http.client.HTTPConnection(*one.server_address, timeout=20)
  data = body if isinstance(body, bytes) else json.dumps(body).encode()
  connection.request('POST', path, data, {'Authorization': f'Bearer {token}', **dict(headers)})
  response = connection.getresponse()
  answer = json.loads(response.read())
  connection.close()
  return response.status, answer


def raw(one, data):
  """(status, body) of what comes back, to the end of the connection."""
  with socket.create_connection(one.server_address, timeout=20) as s:
    s.sendall(data)
    got = b''
    while piece := s.recv(65536):
      got += piece
  return (int(got.split()[1]), got.partition(b'\r\n\r\n')[2]) if got else (None, b'')


class Gate:
  """An endpoint whose work waits, and notes what was done together."""

  def __init__(self):
    self.open, self.begun, self.batches = threading.Event(), threading.Event(), []
    self.endpoint = Endpoint(lambda body: Asked(body.get('key'), body['items'], lambda results: {'results': results}),
                             self.work)

  def work(self, key, items):
    self.begun.set()
    assert self.open.wait(20)
    self.batches.append(items)
    if 'bad' in items:
      raise ValueError('bad is none of mine')
    if 'broken' in items:
      raise RuntimeError('a secret text')
    return [item * 2 for item in items]


@pytest.fixture(scope='module')
def rules():
  with served({'/refine': server.refinement(RuleRefiner('c4'))}, body=100_000) as one:
    yield one


def test_an_answer_is_what_the_library_makes_of_the_text(rules):
  [direct] = refining.refine([Document('x', PAGE, {})], RuleRefiner('c4'))
  status, answer = post(rules, '/refine', {'text': PAGE})
  assert status == 200 and answer['text'] == direct.text != '' and answer['refiner']['name'] == 'rules c4'
  record = {key: value for key, value in direct.record.items() if key != 'id'}
  assert {key: answer[key] for key in record} == record
  status, several = post(rules, '/refine', {'texts': [PAGE, '', 'short']})
  assert status == 200 and several['results'][0] == {key: answer[key] for key in ('text', *record)}
  assert [one['decision'] for one in several['results'][1:]] == ['dropped', 'dropped']


def test_many_at_once_are_answered_as_one_by_one_by_a_model_too(tmp_path):
  tokenizer = small_refiner.tokenizer(small_refiner.write(tmp_path, 40, 4))
  writer = Writer(small_refiner.MODEL, small_refiner.MODEL.init(jax.random.key(0)),
                  Prompts(tokenizer, 'chunk', 'plain', length=160, max_new_tokens=24), batch_size=4)
  refiner = Refiner(None, writer, name='untrained', fingerprint='none', max_tokens=60)
  texts = ['\n'.join(small_refiner.chunk(random.Random(n), 'site')[0]) for n in range(12)]
  with served({'/refine': server.refinement(refiner)}) as one:
    alone = [post(one, '/refine', {'text': text}) for text in texts]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
      assert list(pool.map(lambda text: post(one, '/refine', {'text': text}), texts)) == alone
  assert {status for status, _ in alone} == {200} and len({answer['text'] for _, answer in alone}) > 1
  assert all(part['finished'] in ('eos', 'length') for _, answer in alone for part in answer['chunks'])


def test_many_at_once_are_answered_as_one_by_one(rules):
  texts = [PAGE.replace('tomatoes', f'tomatoes of kind {n}') for n in range(40)]
  alone = [post(rules, '/refine', {'text': text}) for text in texts]
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    assert list(pool.map(lambda text: post(rules, '/refine', {'text': text}), texts)) == alone


@pytest.mark.parametrize('body', [
  b'', b'{', b'[]', b'"x"', b'{"text": 3}', b'{"texts": []}', b'{"texts": "x"}', b'{"texts": ["x", null]}',
  b'{"text": NaN}', b'{"text": "x", "more": 1}', b'{"text": "\xff"}', b'{"text": "\\ud800"}', b'[' * 50_000,
  b'{"a":' * 20_000, b'{"text": ' + b'9' * 10_000 + b'}', json.dumps({'texts': ['x'] * 257}).encode()])
def test_what_is_no_request_is_refused(rules, body):
  status, answer = post(rules, '/refine', body)
  assert status == 400 and set(answer['error']) == {'message', 'type'} and len(answer['error']['message']) < 200
  assert post(rules, '/refine', {'text': PAGE})[0] == 200


@pytest.mark.parametrize('body', [b'{"items": ["\\ud800"]}', b'{"items": [NaN]}', b'{"items": [-Infinity]}'])
def test_what_no_answer_could_hold_does_not_reach_the_worker(body):
  gate = Gate()
  gate.open.set()
  with served({'/g': gate.endpoint}) as one:
    assert post(one, '/g', body)[0] == 400 and not gate.batches


@pytest.mark.parametrize('path', ['/', '/refine/', '/refine?x=1', '/refine/../refine', '/%72efine', '/../../etc/passwd',
                                  '/v1/completions', 'http://127.0.0.1/refine', '/refine%00', '/' + 'x' * 3000])
def test_there_are_no_other_paths(rules, path):
  status, answer = post(rules, path, {'text': PAGE})
  assert status == 404 and path not in json.dumps(answer).replace('/refine"', '')


@pytest.mark.parametrize('header', ['', 'Bearer', 'Bearer ', f'Basic {TOKEN}', TOKEN, f'Bearer {TOKEN}x',
                                    f'Bearer {TOKEN[:-1]}', 'Bearer ' + 'x' * 10_000, 'Bearer \xfc\xdf'])
def test_the_token_opens_and_nothing_else(rules, header):
  status, answer = post(rules, '/refine', {'text': PAGE}, headers=[('Authorization', header)])
  assert status == 401 and TOKEN not in json.dumps(answer)


def test_the_scheme_may_be_in_any_case_and_health_is_open(rules):
  assert post(rules, '/refine', {'text': PAGE}, headers=[('Authorization', f'bearer {TOKEN}')])[0] == 200
  health = b'GET /health HTTP/1.1\r\nConnection: close\r\n%s\r\n'
  assert raw(rules, health % b'') == (200, b'{"status": "ok"}')
  status, body = raw(rules, health % f'Authorization: Bearer {TOKEN}\r\n'.encode())
  assert status == 200 and json.loads(body) == {'status': 'ok', 'refiner': 'a'}


HEAD = f'POST /refine HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\n'.encode()


SLOWLY = b'x' * 40


@pytest.mark.parametrize(('data', 'status'), [
  (HEAD + b'Content-Length: 53\r\n\r\n{"text": "' + SLOWLY + b'x"}', 408),
  (HEAD + b'Content-Length: 13\r\nX-Slow: ' + SLOWLY + b'\r\n\r\n{"text": "x"}', 408),
  (b'GET /' + SLOWLY + b' HTTP/1.1\r\nConnection: close\r\n\r\n', None)])
def test_a_slow_client_is_left_whatever_its_pace(data, status):
  before, after = data.split(SLOWLY)
  with (served({'/refine': server.refinement(RuleRefiner('c4'))}, reading=0.4) as one,
        socket.create_connection(one.server_address, timeout=20) as s, contextlib.suppress(ConnectionError)):
    s.sendall(before)
    for n in range(len(SLOWLY)):  # about a second
      s.sendall(SLOWLY[n:n + 1])
      time.sleep(0.03)
    s.sendall(after)
    got = s.recv(65536)
    assert (int(got.split()[1]) if got else None) == status


def test_a_silent_client_is_told_that_it_is_late():
  with (served({'/refine': server.refinement(RuleRefiner('c4'))}, reading=0.3) as one,
        socket.create_connection(one.server_address, timeout=5) as s):
    s.sendall(HEAD + b'Content-Length: 100\r\n\r\n{"text')
    assert s.recv(65536).startswith(b'HTTP/1.1 408')


def test_one_connection_serves_many_requests_and_errors(rules):
  connection = http.client.HTTPConnection(*rules.server_address, timeout=20)
  for body, status in ((b'{}', 400), (json.dumps({'text': PAGE}), 200)) * 3:
    connection.request('POST', '/refine', body, {'Authorization': f'Bearer {TOKEN}'})
    response = connection.getresponse()
    response.read()
    assert response.status == status and not response.will_close
  connection.close()


def test_waiting_requests_of_a_kind_are_done_together_and_fail_alone():
  gate = Gate()
  with served({'/g': gate.endpoint}, together=4) as one, concurrent.futures.ThreadPoolExecutor(8) as pool:
    first = pool.submit(post, one, '/g', {'items': ['first']})
    gate.begun.wait(10)
    later = []
    for items, key in ((['a', 'b'], 1), (['other'], 2), (['bad'], 1), (['c', 'd'], 1), (['e'], 1), (['broken'], 3)):
      later.append(pool.submit(post, one, '/g', {'items': items, 'key': key}))
      waiting_for(lambda: len(one.worker._jobs) == len(later))
    gate.open.set()
    answers = [job.result() for job in later]
  assert first.result() == (200, {'results': ['firstfirst']}) and gate.batches[1] == ['a', 'b', 'bad', 'e']
  assert [status for status, _ in answers] == [200, 200, 400, 200, 200, 500]
  assert answers[0][1] == {'results': ['aa', 'bb']} and answers[4][1] == {'results': ['ee']}
  assert answers[2][1]['error']['message'] == 'bad is none of mine' and 'secret' not in json.dumps(answers[5])


def waiting_for(condition, seconds=10):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.005)


def test_a_full_queue_and_a_late_answer():
  gate = Gate()
  with served({'/g': gate.endpoint}, waiting=1, answering=1.5) as one:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
      first = pool.submit(post, one, '/g', {'items': ['x']})
      gate.begun.wait(10)
      second = pool.submit(post, one, '/g', {'items': ['late']})
      waiting_for(lambda: one.worker._jobs)
      assert post(one, '/g', {'items': ['y']})[0] == 429
      assert first.result()[0] == second.result()[0] == 503
    gate.open.set()
    waiting_for(lambda: not one.worker._jobs)  # the late one's place is free again
    assert post(one, '/g', {'items': ['z']}) == (200, {'results': ['zz']})
  assert ['late'] not in gate.batches  # nobody waited for it any more


def test_a_connection_too_many_is_told_so_and_the_next_finds_room():
  with served({}, connections=2) as one:
    health = b'GET /health HTTP/1.1\r\n\r\n'
    with contextlib.ExitStack() as held:
      for _ in range(2):
        s = held.enter_context(socket.create_connection(one.server_address, timeout=20))
        s.sendall(health)
        assert s.recv(1000).startswith(b'HTTP/1.1 200')
      assert raw(one, b'')[0] == 503
    waiting_for(lambda: raw(one, health.replace(b'1.1\r\n', b'1.1\r\nConnection: close\r\n'))[0] == 200)


def test_stopping_answers_what_has_begun_and_leaves_the_idle():
  gate = Gate()
  with (served({'/g': gate.endpoint}) as one, concurrent.futures.ThreadPoolExecutor(3) as pool,
        contextlib.closing(http.client.HTTPConnection(*one.server_address, timeout=5)) as idle):
    idle.request('GET', '/health')
    assert idle.getresponse().read()
    begun = pool.submit(post, one, '/g', {'items': ['x']})
    gate.begun.wait(10)
    stopping = pool.submit(one.stop)
    assert idle.sock.recv(1) == b''  # long before it would have been late
    assert not stopping.done() and not begun.done()
    gate.open.set()
    assert begun.result() == (200, {'results': ['xx']})
    stopping.result()
    with pytest.raises(OSError):
      post(one, '/g', {'items': ['x']})
    one.stop = lambda: None


def test_a_worker_that_stops_does_what_waits_and_takes_no_more():
  gate, one = Gate(), Worker(waiting=9, together=1, seconds=20)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    done = [pool.submit(one.do, gate.endpoint, gate.endpoint.read({'items': [n]})) for n in range(3)]
    waiting_for(lambda: gate.begun.is_set() and len(one._jobs) == 2)
    stopping = pool.submit(one.stop)
    waiting_for(lambda: one._stopped)
    gate.open.set()
    assert [job.result() for job in done] == [[0], [2], [4]]
    stopping.result()
  with pytest.raises(Refused, match='stopping'):
    one.do(gate.endpoint, gate.endpoint.read({'items': [1]}))


def test_nothing_that_was_sent_is_logged(caplog):
  caplog.set_level(logging.DEBUG)
  gate = Gate()
  gate.open.set()
  with served({'/g': gate.endpoint}) as one:
    for path, body in (('/g', {'items': ['broken', 'secretive']}), ('/g', {'items': 3}), ('/secretive', {}),
                       ('/g', b'secretive')):
      post(one, path, body)
  assert '/g: 500' in caplog.text and 'RuntimeError' in caplog.text and 'another path: 404' in caplog.text
  assert 'secret' not in caplog.text and TOKEN not in caplog.text


@pytest.mark.parametrize('token', ['', 'short', 'with a space in it, but long', 'größer-als-sechzehn-zeichen'])
def test_a_token_that_is_none_is_refused(token):
  with pytest.raises(ValueError, match='want at least 16, printable ASCII'):
    Server(('127.0.0.1', 0), {}, token=token, about={})


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tokenizer')
  tokenizers.train_bpe([PAGE] * 20, 400, folder / 'tokenizer.json')
  shape = dataclasses.replace(PRESETS['smoke'], vocab_size=400, init_std=0.3)
  return pretrained.Source('tiny', shape, folder, 128, lambda *_: shape.init(jax.random.key(0)))


@pytest.fixture(scope='module')
def client(model):
  with served({'/v1/completions': Completions(model, batch_size=4).endpoint}) as one:
    host, port = one.server_address
    with openai.OpenAI(base_url=f'http://{host}:{port}/v1', api_key=TOKEN, max_retries=0, timeout=60) as client:
      yield client


def test_openais_own_client_gets_what_the_generator_makes(client, model):
  prompts, tokenizer = ['Plant the', 'Share on'], model.tokenizer()
  generator = Generator(model.model, model.params(), batch_size=4, eos_ids=[tokenizer.eos_id],
                        detokenize=tokenizer.decode, max_length=128)
  encoded = [[tokenizer.bos_id] * (tokenizer.bos_id is not None) + ids.tolist()
             for ids in tokenizer.encode_batch(prompts)]
  expected = generator(encoded, max_new_tokens=12)
  answer = client.completions.create(model='tiny', prompt=prompts, max_tokens=12, temperature=0)
  assert [choice.text for choice in answer.choices] == [one.text for one in expected]
  assert [choice.finish_reason for choice in answer.choices] == ['length', 'length']
  assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (sum(map(len, encoded)), 24)
  stop = expected[0].text[3:5]
  assert len(stop) == 2
  [choice] = client.completions.create(model='tiny', prompt=prompts[0], max_tokens=12, temperature=0, stop=stop).choices
  assert choice.text == expected[0].text[:expected[0].text.index(stop)] and choice.finish_reason == 'stop'


def test_a_seed_is_answered_alike_alone_and_among_others(client):
  ask = lambda prompt: client.completions.create(
    model='tiny', prompt=prompt, max_tokens=8, temperature=1.5, top_p=0.9, seed=3).choices[0].text
  prompts = ['Plant', 'Pick', 'They'] * 2
  alone = [ask(prompt) for prompt in prompts]
  with concurrent.futures.ThreadPoolExecutor(6) as pool:
    assert list(pool.map(ask, prompts)) == alone and alone[:3] == alone[3:] and len(set(alone)) > 1


@pytest.mark.parametrize('settings', [
  {'n': 2}, {'temperature': -1}, {'temperature': 3}, {'top_p': 0}, {'max_tokens': 0}, {'max_tokens': 100_000},
  {'stop': ''}, {'stop': ['a'] * 5}, {'seed': -1}, {'prompt': []}, {'prompt': [1, 2]}, {'prompt': 'x ' * 200},
  {'echo': True}, {'stream': True}, {'max_tokens': True}, {'logprobs': 3}])
def test_what_is_not_done_is_refused(client, settings):
  with pytest.raises(openai.BadRequestError):
    client.completions.create(**{'model': 'tiny', 'prompt': 'Plant', 'temperature': 0} | settings)


def test_openais_client_knows_our_errors(client):
  with pytest.raises(openai.NotFoundError, match="the model here is 'tiny'"):
    client.completions.create(model='gpt', prompt='Plant')
  with pytest.raises(openai.AuthenticationError):
    client.with_options(api_key='another-token-of-some-length').completions.create(model='tiny', prompt='Plant')


def start(*arguments, folder):
  return subprocess.Popen(
    [sys.executable, '-m', 'datasel.methods.prox.server', *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    text=True, env=os.environ | {'TMPDIR': str(folder), 'JAX_PLATFORMS': 'cpu'})


def test_the_command_serves_until_sigterm_and_takes_its_token_with_it(tmp_path):
  with start('--rules', 'c4', '--port', '0', folder=tmp_path) as process:
    try:
      line = process.stdout.readline()
      url, path = line.split()[0], pathlib.Path(line.split()[-1])
      assert path.parent == tmp_path and path.stat().st_mode & 0o777 == 0o600
      host, port = url.removeprefix('http://').split(':')
      with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=20)) as connection:
        connection.request('POST', '/refine', json.dumps({'text': PAGE}),
                           {'Authorization': f'Bearer {path.read_text().strip()}'})
        assert json.loads(connection.getresponse().read())['decision'] == 'edited' and host == '127.0.0.1'
      process.send_signal(signal.SIGTERM)
      assert process.wait(20) == 0 and not path.exists()
      assert 'Plant' not in process.stderr.read()
    finally:
      process.kill()


def test_a_token_file_is_made_once_and_refused_where_others_may_read_it(tmp_path):
  file = tmp_path / 'token'
  with server.token(str(file)) as (made, _):
    assert file.stat().st_mode & 0o777 == 0o600 and len(made) > 40
  with server.token(str(file)) as (again, _):
    assert again == made
  file.chmod(0o640)
  with pytest.raises(ValueError, match='chmod 600'), server.token(str(file)):
    pass


@pytest.mark.parametrize(('arguments', 'message'), [
  (['--rules', 'c4', '--port', '99999'], 'want 0 to 65535'),
  (['--rules', 'c4', '--host', '0.0.0.0'], 'open to others; want --token_file'), ([], 'nothing to serve'),
  (['--rules', 'c5'], "rules 'c5'"), (['--rules', 'c4', '--chunk_refiner', 'x'], 'want one of them')])
def test_what_cannot_be_served_is_refused(arguments, message, capsys):
  assert server.main(arguments) == 2
  assert message in capsys.readouterr().err
