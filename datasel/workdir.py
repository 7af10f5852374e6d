"""Files of a run, written so that a kill at any moment leaves the old file or the new one, never half of one."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replacing(path: str | os.PathLike, mode: str = 'wb') -> Iterator[Any]:
  """Opens a temporary file beside `path`; on success it is synced to disk and renamed to `path`, else removed."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.name}.tmp-{os.getpid()}')
  try:
    with open(temporary, mode, **({} if 'b' in mode else {'encoding': 'utf-8'})) as f:
      yield f
      f.flush()
      os.fsync(f.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes `value` as readable JSON, atomically.  NaN and infinity are refused: JSON has no word for them."""
  with replacing(path, 'w') as f:
    f.write(json.dumps(value, indent=2, allow_nan=False) + '\n')


def read_json(path: str | os.PathLike) -> Any:
  """Reads JSON; ValueError names a damaged file."""
  try:
    return json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
  except (json.JSONDecodeError, UnicodeDecodeError) as e:
    raise ValueError(f'{path} is not valid JSON ({e}); delete it, or restore it from a copy') from e


def git_version() -> str | None:
  """The commit of the code that runs, '-dirty' if changed since; None outside a checkout."""
  if shutil.which('git') is None:
    return None
  found = subprocess.run(['git', '-C', str(pathlib.Path(__file__).parent), 'describe', '--always', '--dirty'],
                         capture_output=True, text=True, check=False)
  return found.stdout.strip() or None


def digest(value: Any) -> str:
  """sha256 (hex) of a JSON value in canonical form: equal values have equal digests on every machine."""
  return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(',', ':'), allow_nan=False).encode()).hexdigest()


def digest_file(path: str | os.PathLike) -> str:
  """sha256 (hex) of a file's bytes, read in a stream."""
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()
