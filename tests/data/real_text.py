"""Real text with no download, for the tests of the data pipeline: the interpreter's own files."""

import json
import pathlib
import pydoc_data.topics
import sysconfig


def topics() -> list[dict]:
  """Rows {id, text} of Python's help topics."""
  return [{'id': name, 'text': text} for name, text in sorted(pydoc_data.topics.topics.items())]


def modules(package: str) -> list[dict]:
  """Rows {id, text, lines} of a standard package's modules."""
  folder = pathlib.Path(sysconfig.get_paths()['stdlib']) / package
  rows = [(path.name, path.read_text(encoding='utf-8')) for path in sorted(folder.glob('*.py'))]
  return [{'id': name, 'text': text, 'lines': text.count('\n')} for name, text in rows]


def jsonl(rows: list[dict]) -> bytes:
  return b''.join(json.dumps(row).encode() + b'\n' for row in rows)


def write(path: pathlib.Path, content: bytes | list[dict]) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content if isinstance(content, bytes) else jsonl(content))
  return path
