"""One process at a time makes a thing that several may want."""

import contextlib
import fcntl
import logging
import pathlib
from collections.abc import Iterator

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(file: pathlib.Path, doing: str) -> Iterator[None]:
  """Holds the lock `file`, made if absent and left there; waits for another process that holds it, and says so.

  doing: what the holder does, for that line.  Look again, once inside, whether it is done.  The kernel frees the lock
  of a killed process, so its leavings may be removed.
  """
  file.parent.mkdir(parents=True, exist_ok=True)
  with open(file, 'w') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      _log.info('another process is %s; waiting for it', doing)
      fcntl.flock(lock, fcntl.LOCK_EX)
    yield
