r"""Refinement, and a model's text, for other programs on this machine.

  python -m datasel.methods.prox.server --rules c4+gopher
  python -m datasel.methods.prox.server --document_refiner DIR --chunk_refiner DIR --model demo:smollm2 --port 8000
  curl -H "Authorization: Bearer $(cat TOKEN_FILE)" -d '{"text": "..."}' http://127.0.0.1:8000/refine

POST /refine          {"text": TEXT} or {"texts": [TEXT, ...]}: what is left of each, and its record
POST /v1/completions  as OpenAI's, of --model; any client of theirs will do: base_url http://127.0.0.1:8000/v1
GET  /health          that it is up; with the token, what is served

Every POST bears the token.  It answers on 127.0.0.1 unless told otherwise; it speaks plain HTTP, so a server for others
belongs behind one that speaks TLS.  SIGTERM: requests under way are answered, then it ends.
"""

import argparse
import contextlib
import ipaddress
import logging
import os
import pathlib
import secrets
import signal
import sys
import tempfile
import threading
from collections.abc import Hashable, Iterator
from typing import Any

from datasel.data.corpus import Document
from datasel.methods.prox import refining
from datasel.methods.prox.serving import Limits, Server
from datasel.methods.prox.worker import Asked, Endpoint, Refused

MAX_TEXTS = 256  # of a request


def refinement(refiner: refining.Refiner) -> Endpoint:
  """{"text": T} -> {"text": what is left, ''  where it was dropped, and the rest of `refining.refine`'s record};
  {"texts": [T, ...]} -> {"results": [one such for each]}; both with {"refiner": {name, fingerprint}}."""
  about = {'refiner': {'name': refiner.name, 'fingerprint': refiner.fingerprint}}

  def read(body: dict) -> Asked:
    alone = list(body) == ['text']
    texts = [body['text']] if alone else body.get('texts')
    if (not alone and list(body) != ['texts'] or not isinstance(texts, list) or not 1 <= len(texts) <= MAX_TEXTS
        or not all(isinstance(text, str) for text in texts)):
      raise Refused(400, f'want {{"text": a string}}, or {{"texts": a list of 1 to {MAX_TEXTS}}}, and nothing else')
    return Asked('refine', texts, lambda results: (results[0] if alone else {'results': results}) | about)

  def work(_: Hashable, texts: list[str]) -> list[dict[str, Any]]:
    refined = refining.refine([Document(str(n), text, {}) for n, text in enumerate(texts)], refiner)
    return [{'text': one.text} | {key: value for key, value in one.record.items() if key != 'id'} for one in refined]

  return Endpoint(read, work)


@contextlib.contextmanager
def token(file: str | None) -> Iterator[tuple[str, pathlib.Path]]:
  """The token and the file that holds it, for its owner's eyes only: made if it is not there; without a name, a
  temporary one, gone afterwards.  ValueError for one that others may read."""
  if file is not None and (path := pathlib.Path(file)).exists():
    if path.stat().st_mode & 0o077:
      raise ValueError(f'others may read {path}: chmod 600 {path}, and take another token if they have')
    yield path.read_text(encoding='utf-8').strip(), path
    return
  made = secrets.token_urlsafe(32)
  if file is None:
    descriptor, name = tempfile.mkstemp(prefix='datasel-token-')
  else:
    descriptor, name = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), file
  with open(descriptor, 'w', encoding='utf-8') as f:
    print(made, file=f)
  try:
    yield made, pathlib.Path(name)
  finally:
    if file is None:
      pathlib.Path(name).unlink(missing_ok=True)


def serve(options: argparse.Namespace) -> None:
  """Serves until SIGTERM or SIGINT."""
  if not 0 <= options.port <= 65535:
    raise ValueError(f'--port {options.port}; want 0 to 65535')
  if not (options.host == 'localhost' or ipaddress.ip_address(options.host).is_loopback) and not options.token_file:
    raise ValueError(f'--host {options.host} is open to others; want --token_file, with the token they are to have')
  endpoints, about = {}, {}
  if (refiner := _refiner(options)) is not None:
    endpoints['/refine'], about['refiner'] = refinement(refiner), refiner.name
  if options.model:
    from datasel import pretrained
    from datasel.methods.prox.completions import Completions
    model = Completions(pretrained.find(options.model), batch_size=options.batch_size)
    endpoints['/v1/completions'], about['model'] = model.endpoint, model.name
  if not endpoints:
    raise ValueError('nothing to serve; want --rules, --document_refiner, --chunk_refiner or --model')
  stop = threading.Event()
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: stop.set())
  with token(options.token_file) as (secret, path):
    server = Server((options.host, options.port), endpoints, token=secret, about=about, limits=Limits())
    thread = threading.Thread(target=server.serve_forever, name='accept')
    thread.start()
    host, port = server.server_address[:2]
    host = f'[{host}]' if ':' in host else host
    print(f'http://{host}:{port} serves {", ".join(endpoints)}; the token is in {path}', flush=True)
    stop.wait()
    logging.info('stopping: requests under way are answered')
    server.stop()
    thread.join()


def _refiner(options: argparse.Namespace) -> refining.Refiner | None:
  if options.rules:
    if options.document_refiner or options.chunk_refiner:
      raise ValueError('--rules and a refiner: want one of them')
    from datasel.methods.prox.rule_refiner import RuleRefiner
    return RuleRefiner(options.rules)
  if not (options.document_refiner or options.chunk_refiner):
    return None
  from datasel.methods.prox.refiner import Refiner
  return Refiner.load(options.document_refiner, options.chunk_refiner, batch_size=options.batch_size)


def main(argv: list[str]) -> int:
  """The command line; returns the exit status."""
  parser = argparse.ArgumentParser('datasel.methods.prox.server', description='Refinement over HTTP.')
  parser.add_argument('--document_refiner', metavar='DIR', help='decides which documents stay')
  parser.add_argument('--chunk_refiner', metavar='DIR', help='edits those that stay')
  parser.add_argument('--rules', metavar='NAMES', help='instead of refiners, such as gopher+c4+fineweb')
  parser.add_argument('--model', metavar='SOURCE', help='to write text: a stage, a folder, demo:smollm2, a hub name')
  parser.add_argument('--batch_size', type=int, default=8, help='texts that a model reads at a time')
  parser.add_argument('--host', default='127.0.0.1', help='address to answer on')
  parser.add_argument('--port', type=int, default=8000, help='0: any that is free')
  parser.add_argument('--token_file', metavar='FILE', help='holds the token, or will; default: a temporary file')
  options = parser.parse_args(argv)
  logging.basicConfig(level=logging.INFO, format='%(asctime)s  %(message)s', datefmt='%H:%M:%S', stream=sys.stderr)
  try:
    serve(options)
  except (ValueError, OSError, ImportError) as e:
    print(f'error: {e}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
