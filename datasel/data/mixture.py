"""Mixtures: how much of a training run each domain is.  `mixture.json` is what every method reads and writes.

  {"domains": {"web": 0.7, "code": 0.3}, "method": "doremi", "seed": 0, ...}

Everything beside `domains` is provenance: JSON values that say where the weights come from.
"""

import dataclasses
import difflib
import json
import math
import numbers
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import yaml

from datasel import workdir
from datasel.data import domains as domain_names

# How often the Pile's authors repeat each of its domains (Gao et al. 2020, Table 1), for `by_pile_convention`.
PILE_EPOCHS = {
    'Pile-CC': 1.0, 'PubMed_Central': 2.0, 'Books3': 1.5, 'OpenWebText2': 2.0, 'ArXiv': 2.0, 'Github': 1.0,
    'FreeLaw': 1.5, 'StackExchange': 2.0, 'USPTO_Backgrounds': 2.0, 'PubMed_Abstracts': 2.0, 'Gutenberg_PG-19': 2.5,
    'OpenSubtitles': 1.5, 'Wikipedia_en': 3.0, 'DM_Mathematics': 2.0, 'Ubuntu_IRC': 2.0, 'BookCorpus2': 1.5,
    'EuroParl': 2.0, 'HackerNews': 2.0, 'YoutubeSubtitles': 2.0, 'PhilPapers': 2.0, 'NIH_ExPorter': 2.0,
    'Enron_Emails': 2.0}


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Weights by domain name, finite, >= 0 and summing to 1 within 1e-6 (ValueError otherwise), and their provenance."""
  weights: dict[str, float]
  provenance: dict[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    total = _checked_sum(self.weights)
    if abs(total - 1) > 1e-6:
      listed = ', '.join(f'{name} {weight:.6g}' for name, weight in self.weights.items())
      raise ValueError(f'mixture weights sum to {total:.8g}, want 1 (domains: {listed}); renormalise them, in Python '
                       'with datasel.data.mixture.normalised')
    if 'domains' in self.provenance:
      raise ValueError("the provenance has a key 'domains', which mixture.json uses for the weights; rename it")
    json.dumps(self.provenance, allow_nan=False)  # raises here rather than when a long run comes to write it
    object.__setattr__(self, 'weights', {name: float(weight) for name, weight in self.weights.items()})

  def for_domains(self, domains: Iterable[str]) -> np.ndarray:
    """float64 [M], summing to 1 up to rounding: the weights in the order of `domains`.

    Raises ValueError unless the mixture names exactly these domains; a weight of 0 has to be said.
    """
    domains = tuple(domains)
    unknown = [_with_close_matches(name, domains) for name in self.weights if name not in domains]
    missing = [_with_close_matches(name, self.weights) for name in domains if name not in self.weights]
    if unknown:
      raise ValueError(f'the mixture names domains that the store does not have: {", ".join(unknown)}; rename or '
                       f'remove them (the store has {", ".join(domains)})')
    if missing:
      raise ValueError(f'the store has domains that the mixture does not name: {", ".join(missing)}; give each a '
                       'weight, 0 to leave it out')
    weights_M = np.array([self.weights[name] for name in domains], np.float64)
    return weights_M / math.fsum(weights_M)


def normalised(weights: Mapping[str, float]) -> dict[str, float]:
  """The weights divided by their sum; ValueError if one is negative or not finite, or all are 0."""
  total = _checked_sum(weights)
  return {name: float(weight) / total for name, weight in weights.items()}


def write(path: str | os.PathLike, mixture: Mixture) -> None:
  """Writes mixture.json, atomically."""
  workdir.write_json(path, {'domains': mixture.weights, **mixture.provenance})


def load(path: str | os.PathLike) -> Mixture:
  """Reads a mixture in any of four forms, told apart by content; ValueError names the file and what is wrong in it.

  - mixture.json: {"domains": {name: weight}, ...provenance}
  - DoReMi's JSON: {"train_domain_weights": {label: weight}, "eval_domain_weights": ...}; labels become domain names
    ('Gutenberg (PG-19)' -> 'Gutenberg_PG-19').  Some published files print four digits: a sum within 1e-3 of 1 will do.
  - RegMix's YAML: {"train": {"train_NAME": weight}, "valid": ...}.  Published files do not sum to 1: any sum will do.
  - a plain mapping {name: weight}, JSON or YAML.
  The last three say in their provenance which file they are from; weights that were renormalised say from which sum.
  """
  path = pathlib.Path(path)
  if path.suffix not in _PARSERS:
    raise ValueError(f'{path}: a mixture is one of {", ".join(_PARSERS)}; got {path.suffix!r}')
  value = _PARSERS[path.suffix](path)
  try:
    if not isinstance(value, dict):
      raise ValueError(f'want a mapping of domains to weights, got {type(value).__name__}')
    for key, read in _READERS.items():
      if isinstance(value.get(key), dict):
        return read(value, path.name)
    return Mixture(dict(value), {'method': 'given', 'file': path.name})
  except (ValueError, TypeError) as e:
    raise ValueError(f'{path}: {e}') from e


def write_doremi(path: str | os.PathLike, mixture: Mixture) -> None:
  """Writes DoReMi's JSON, with the labels and evaluation weights of the imported file where the mixture is from one."""
  labels = mixture.provenance.get('labels', {})
  train = {labels.get(name, name): weight for name, weight in mixture.weights.items()}
  workdir.write_json(path, {'train_domain_weights': train,
                            'eval_domain_weights': mixture.provenance.get('eval_domain_weights', train)})


def write_regmix(path: str | os.PathLike, mixture: Mixture) -> None:
  """Writes RegMix's YAML; its `valid` section is the imported one, else the mixture's weights."""
  valid = mixture.provenance.get('valid', {f'valid_{name}': weight for name, weight in mixture.weights.items()})
  value = {'train': {f'train_{name}': weight for name, weight in mixture.weights.items()}, 'valid': valid}
  with workdir.replacing(path, 'w') as f:
    yaml.safe_dump({**value, **mixture.provenance.get('settings', {})}, f, sort_keys=False)


def write_plain(path: str | os.PathLike, mixture: Mixture) -> None:
  """Writes {name: weight} as JSON: the weights without their provenance."""
  workdir.write_json(path, mixture.weights)


def uniform(domains: Iterable[str]) -> Mixture:
  """The same weight for every domain."""
  return Mixture(normalised(dict.fromkeys(domains, 1)), {'method': 'uniform'})


def by_tokens(store: Any, split: str = 'train') -> Mixture:
  """Natural proportions: each domain by its tokens in the store."""
  counts = store.counts(split)
  return _of_store('by_tokens', store, split, {name: counts[name]['tokens'] for name in store.domains})


def by_examples(store: Any, split: str = 'train') -> Mixture:
  """Each domain by its packed sequences in the store, so that one pass reads every sequence once."""
  return _of_store('by_examples', store, split, dict(zip(store.domains, store.sizes(split).tolist())))


def by_pile_convention(store: Any, epochs: Mapping[str, float], split: str = 'train') -> Mixture:
  """Sequences times epochs, normalised: the baseline weights of the Pile as DoReMi computes them (Xie et al. 2023).

  epochs: for every domain of the store, how often the data set's authors repeat it.
  """
  if set(epochs) != set(store.domains):
    raise ValueError(f'epochs are given for {sorted(epochs)}, want exactly the domains of the store, '
                     f'{list(store.domains)}')
  sizes = dict(zip(store.domains, store.sizes(split).tolist()))
  amounts = {name: sizes[name] * epochs[name] for name in store.domains}
  mixture = _of_store('by_pile_convention', store, split, amounts)
  return dataclasses.replace(mixture, provenance={**mixture.provenance, 'epochs': dict(epochs)})


def _of_store(method: str, store: Any, split: str, amounts: Mapping[str, float]) -> Mixture:
  provenance = {'method': method, 'store': store.digest, 'tokenizer': store.tokenizer, 'split': split}
  return Mixture(normalised(amounts), provenance)


def _checked_sum(weights: Mapping[str, float]) -> float:
  """The sum, > 0, of weights whose names and values have been checked."""
  if not weights:
    raise ValueError('the mixture has no domains; name at least one')
  for name, weight in weights.items():
    domain_names.check(name, 'the mixture')
    number = isinstance(weight, numbers.Real) and not isinstance(weight, bool)
    if not number or not math.isfinite(weight) or weight < 0:
      raise ValueError(f'the mixture gives domain {name} the weight {weight!r}, want a finite number >= 0')
  total = math.fsum(weights.values())
  if not total > 0:
    raise ValueError(f'all weights of the mixture are 0 (domains: {", ".join(weights)}); give one a positive weight')
  return total


def _with_close_matches(name: str, known: Iterable[str]) -> str:
  close = difflib.get_close_matches(name, list(known), n=3)
  return f'{name!r} (close: {", ".join(close)})' if close else repr(name)


def _read_native(value: dict[str, Any], file: str) -> Mixture:
  del file  # its provenance is inside
  return Mixture(value['domains'], {key: field for key, field in value.items() if key != 'domains'})


def _read_doremi(value: dict[str, Any], file: str) -> Mixture:
  train = value['train_domain_weights']
  names = domain_names.from_labels(train)
  weights = {names[label]: weight for label, weight in train.items()}
  if abs(_checked_sum(weights) - 1) > 1e-3:
    raise ValueError(f'train_domain_weights sum to {_checked_sum(weights):.6g}, want 1 within 1e-3; renormalise them')
  rest = {key: field for key, field in value.items() if key != 'train_domain_weights'}
  return _renormalised(weights, {'method': 'imported from DoReMi', 'file': file,
                                 'labels': {name: label for label, name in names.items()}, **rest})


def _read_regmix(value: dict[str, Any], file: str) -> Mixture:
  bad = [key for key in value['train'] if not (isinstance(key, str) and key.startswith('train_'))]
  if bad:
    raise ValueError(f"the keys {bad} of 'train' do not start with 'train_', as RegMix's do; rename them")
  weights = {key.removeprefix('train_'): weight for key, weight in value['train'].items()}
  settings = {key: field for key, field in value.items() if key not in ('train', 'valid')}
  provenance = {'method': 'imported from RegMix', 'file': file, 'valid': value.get('valid', {}), 'settings': settings}
  return _renormalised(weights, provenance)


def _renormalised(weights: dict[str, float], provenance: dict[str, Any]) -> Mixture:
  total = _checked_sum(weights)
  if abs(total - 1) <= 1e-12:
    return Mixture(weights, provenance)
  return Mixture(normalised(weights), {**provenance, 'renormalised_from_sum': total})


class _YamlLoader(yaml.SafeLoader):
  """Safe YAML that refuses a key given twice, of which YAML would keep the last, and takes 1e-5 for a number."""

  def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
    keys = [self.construct_object(key, deep=True) for key, _ in node.value]
    twice = sorted({str(key) for key in keys if keys.count(key) > 1})
    if twice:
      raise yaml.constructor.ConstructorError(None, None, f'keys given twice: {", ".join(twice)}', node.start_mark)
    return super().construct_mapping(node, deep)


# YAML 1.1 wants a dot in a float, and would read 1e-5 as text.
_YamlLoader.add_implicit_resolver('tag:yaml.org,2002:float', re.compile(r'[-+]?\d+[eE][-+]?\d+'), list('-+0123456789'))


def _read_yaml(path: pathlib.Path) -> Any:
  try:
    return yaml.load(path.read_text(encoding='utf-8'), _YamlLoader)
  except yaml.YAMLError as e:
    raise ValueError(f'{path} is not a valid mixture file ({e}); correct it, or restore it from a copy') from e


_PARSERS = {'.json': workdir.read_json, '.yaml': _read_yaml, '.yml': _read_yaml}
_READERS = {'domains': _read_native, 'train_domain_weights': _read_doremi, 'train': _read_regmix}
