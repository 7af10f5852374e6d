"""JSON over HTTP in front of one worker: a token, limits on size, number and time; what was sent is not logged.

Threads read requests and wait for the worker.  Errors are answered as {"error": {"message", "type"}}: 400 malformed,
401 token, 404 and 405 no such thing, 408 late, 411 and 413 size, 429 queue full, 503 busy, too slow or stopping.
"""

import dataclasses
import hmac
import http.server
import io
import json
import logging
import socket
import socketserver
import sys
import threading
import time
from typing import Any

from datasel.methods.prox.worker import Endpoint, Refused, Worker

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one client, or all of them, may ask for."""
  body: int = 8 << 20  # bytes of a request
  waiting: int = 64  # requests
  connections: int = 128
  together: int = 256  # items that the worker takes at a time, unless one request alone has more
  reading: float = 15.0  # seconds from the first byte awaited to the last read
  answering: float = 300.0  # seconds from then to the answer


class _Timed(io.RawIOBase):
  """What a socket receives until a deadline, whatever the pace."""

  def __init__(self, connection: socket.socket):
    self._connection, self.deadline = connection, 0.0

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    left = self.deadline - time.monotonic()
    if left <= 0:
      raise TimeoutError('the request came too slowly')
    self._connection.settimeout(left)
    return self._connection.recv_into(buffer)


class Server(http.server.ThreadingHTTPServer):
  """endpoints: {path: Endpoint} for POST.  token: that every POST must bear.  about: what GET /health says, beside that
  the server is up, to who bears it.

  `stop` ends `serve_forever`, answers the requests that have begun, and closes.
  """
  daemon_threads = False  # closing waits for the requests under way
  request_queue_size = 128

  def __init__(self, address: tuple[str, int], endpoints: dict[str, Endpoint], *, token: str, about: dict[str, Any],
               limits: Limits = Limits()):
    if len(token) < 16 or not token.isascii() or not token.isprintable() or ' ' in token:
      raise ValueError(f'a token of {len(token)} characters; want at least 16, printable ASCII without spaces')
    self.endpoints, self.about, self.limits, self.stopping = endpoints, about, limits, False
    self._token = token.encode()
    self._room = threading.BoundedSemaphore(limits.connections)
    self._idle: set[socket.socket] = set()
    self._lock = threading.Lock()
    if ':' in address[0]:
      self.address_family = socket.AF_INET6
    super().__init__(address, _Handler)
    self.worker = Worker(waiting=limits.waiting, together=limits.together, seconds=limits.answering)

  def server_bind(self) -> None:
    socketserver.TCPServer.server_bind(self)  # the base class would ask for the host's name, maybe for long
    self.server_name, self.server_port = self.server_address[:2]

  def authorised(self, header: str | None) -> bool:
    """Whether the header bears the token; the time that takes says nothing of it."""
    scheme, _, given = (header or '').partition(' ')
    return hmac.compare_digest(given.strip().encode('utf-8', 'replace'), self._token) and scheme.lower() == 'bearer'

  def stop(self) -> None:
    """To be called from another thread than that of `serve_forever`."""
    self.shutdown()
    with self._lock:
      self.stopping = True
      for connection in self._idle:  # between two requests: it will read the end
        try:
          connection.shutdown(socket.SHUT_RD)
        except OSError:
          pass  # the client was first
    self.server_close()
    self.worker.stop()

  def idle(self, connection: socket.socket, is_idle: bool) -> None:
    """Notes whether a connection is between two requests.  Once the server stops, none waits for a next one."""
    with self._lock:
      (self._idle.add if is_idle else self._idle.discard)(connection)
      if is_idle and self.stopping:
        connection.shutdown(socket.SHUT_RD)

  def process_request(self, request: Any, client_address: Any) -> None:
    if not self._room.acquire(blocking=False):
      body = _error(503, 'too many connections; try again later')
      try:
        request.settimeout(1)
        request.sendall(b'HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n'
                        b'Connection: close\r\nContent-Length: %d\r\n\r\n%s' % (len(body), body))
      except OSError:
        pass  # whom the answer was for has left
      self.shutdown_request(request)
      return
    try:
      super().process_request(request, client_address)
    except BaseException:
      self._room.release()
      raise

  def process_request_thread(self, request: Any, client_address: Any) -> None:
    try:
      super().process_request_thread(request, client_address)
    finally:
      self.idle(request, False)
      self._room.release()

  def handle_error(self, request: Any, client_address: Any) -> None:
    error = sys.exception()
    if not isinstance(error, OSError):  # a client that leaves is none of ours
      _log.error('a connection ended by %s', type(error).__name__)


class _Handler(http.server.BaseHTTPRequestHandler):
  server: Server
  protocol_version, server_version, sys_version = 'HTTP/1.1', 'datasel', ''

  def setup(self) -> None:
    super().setup()
    self._timed = _Timed(self.connection)
    self.rfile = io.BufferedReader(self._timed)
    self.path, self._began = '', 0.0

  def handle_one_request(self) -> None:
    self._began, self._unread = time.monotonic(), True
    self._timed.deadline = self._began + self.server.limits.reading
    try:
      self.server.idle(self.connection, True)
      super().handle_one_request()
    except OSError:
      self.close_connection = True  # the client has left

  def parse_request(self) -> bool:
    self.server.idle(self.connection, False)
    self._began = time.monotonic()
    self._timed.deadline = self._began + self.server.limits.reading
    try:
      return super().parse_request()
    except TimeoutError:
      self.close_connection = True
      self._refuse(408, self._late)
      return False

  def do_GET(self) -> None:
    self._unread = 'Content-Length' in self.headers or 'Transfer-Encoding' in self.headers
    if self.path == '/health':
      about = self.server.about if self.server.authorised(self.headers.get('Authorization')) else {}
      self._send(200, {'status': 'stopping' if self.server.stopping else 'ok', **about})
    else:
      self._refuse(405 if self.path in self.server.endpoints else 404, 'no such thing to GET; there is /health')

  def do_POST(self) -> None:
    try:
      endpoint = self.server.endpoints.get(self.path)
      if endpoint is None:
        there = ', '.join(self.server.endpoints)
        raise Refused(405 if self.path == '/health' else 404, f'no such thing to POST to; there is {there}')
      if not self.server.authorised(self.headers.get('Authorization')):
        raise Refused(401, "want the header 'Authorization: Bearer TOKEN', with the server's token")
      asked = endpoint.read(self._object())
      self._send(200, asked.answer(self.server.worker.do(endpoint, asked)))
    except Refused as e:
      self._refuse(e.status, e.message)
    except OSError:
      raise
    except Exception as e:
      # Its message may quote a text: the place is enough.
      where = e.__traceback__
      while where.tb_next:
        where = where.tb_next
      _log.error('%s at %s:%d', type(e).__name__, where.tb_frame.f_code.co_filename, where.tb_lineno)
      self._refuse(500, f'internal error ({type(e).__name__}); the server goes on')

  def _object(self) -> dict:
    """The JSON object of the request's body."""
    lengths, most = self.headers.get_all('Content-Length') or [], self.server.limits.body
    if 'Transfer-Encoding' in self.headers or not lengths:
      raise Refused(411, 'want a Content-Length, and no Transfer-Encoding')
    if len(lengths) != 1 or not lengths[0].isascii() or not lengths[0].isdigit() or len(lengths[0]) > 18:
      raise Refused(400, 'Content-Length is no number of bytes')
    if (length := int(lengths[0])) > most:
      raise Refused(413, f'{length} bytes; want at most {most}')
    try:
      body = self.rfile.read(length)
    except TimeoutError as e:
      raise Refused(408, self._late) from e
    if len(body) != length:
      raise Refused(400, f'{len(body)} bytes of {length}')
    self._unread = False
    try:
      # Lone surrogates, which JSON can spell and UTF-8 cannot, are found by encoding again.
      found = json.loads(body.decode(), parse_constant=_no_number)
      json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as e:
      raise Refused(400, 'the body is no JSON in UTF-8') from e
    if not isinstance(found, dict):
      raise Refused(400, f'the body is a JSON {type(found).__name__}; want an object')
    return found

  @property
  def _late(self) -> str:
    return f'the request was not here within {self.server.limits.reading:g} s'

  def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
    """What the base class refuses: a malformed request line or header, a method that is none here."""
    self._refuse(int(code), http.server.BaseHTTPRequestHandler.responses.get(code, ('refused',))[0].lower())

  def _refuse(self, status: int, message: str) -> None:
    self._reply(status, _error(status, message))

  def _send(self, status: int, value: dict) -> None:
    self._reply(status, json.dumps(value, ensure_ascii=False, allow_nan=False).encode())

  def _reply(self, status: int, body: bytes) -> None:
    self.close_connection = self.close_connection or self._unread or self.server.stopping
    self.request_version = 'HTTP/1.1'  # no answer without a status, whatever the request said
    self.connection.settimeout(self.server.limits.reading)
    self.send_response(status)
    self.send_header('Content-Type', 'application/json')
    self.send_header('Content-Length', str(len(body)))
    if status in (429, 503):
      self.send_header('Retry-After', '1')
    if self.close_connection:
      self.send_header('Connection', 'close')
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(body)
    if self._unread:
      self._drain()

  def _drain(self) -> None:
    """Reads on for a second: were the connection closed on what is unread, the answer would be lost with it."""
    self.connection.shutdown(socket.SHUT_WR)
    self._timed.deadline = time.monotonic() + 1
    try:
      while self.rfile.read1(1 << 16):
        pass
    except OSError:
      pass  # slow, or gone

  def log_request(self, code: Any = '-', size: Any = '-') -> None:
    known = self.path if self.path in (*self.server.endpoints, '/health') else 'another path'
    _log.info('%s %s: %s after %.3f s', self.client_address[0], known, int(code), time.monotonic() - self._began)

  def log_message(self, format: str, *args: Any) -> None:
    """Nothing: the base class would quote the request."""


def _error(status: int, message: str) -> bytes:
  kind = 'server_error' if status >= 500 else 'invalid_request_error'
  return json.dumps({'error': {'message': message, 'type': kind}}).encode()


def _no_number(name: str) -> None:
  raise ValueError(name)
