"""Domain names.  Equal names are equal domains; a name is also a folder name, so what it may contain is fixed."""

import re
from collections.abc import Iterable

_NAME = re.compile(r'[A-Za-z0-9][\w.-]{0,63}', re.ASCII)


def check(name: str, where: str) -> str:
  """Returns `name` if it can name a domain; `where` says in the error where it was found."""
  if not isinstance(name, str) or not _NAME.fullmatch(name) or '..' in name:
    raise ValueError(
        f'domain name {name!r} in {where} is not allowed: want a letter or digit followed by up to 63 letters, digits, '
        "'_', '.' or '-' (and no '..'); rename it")
  return name


def from_label(label: str) -> str:
  """The domain name for a published label: 'Gutenberg (PG-19)' -> 'Gutenberg_PG-19'."""
  return check(re.sub(r'[^\w.-]+', '_', label, flags=re.ASCII).strip('_'), f'label {label!r}')


def from_labels(labels: Iterable[str]) -> dict[str, str]:
  """{label: domain name}; two labels that would become one domain are refused."""
  names: dict[str, str] = {}
  for label in labels:
    name = from_label(label)
    clash = [other for other, taken in names.items() if taken == name]
    if clash:
      raise ValueError(f'labels {clash[0]!r} and {label!r} both become the domain {name!r}; rename one')
    names[label] = name
  return names
