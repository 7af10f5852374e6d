"""Supervised examples of programs: SFT/{train,validation,test}/{document,chunk}.jsonl and SFT/manifest.json.

A line is {"id", "source", "text", "start", "program"}.  Every example of one page source is in one split, so that the
validation and test splits measure what a refiner does on sites that it has never seen.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from datasel import workdir
from datasel.methods.prox import programs

SPLITS = ('train', 'validation', 'test')
TASKS = ('document', 'chunk')
FRACTIONS = (0.7, 0.15, 0.15)  # of the sources, for SPLITS
FORMAT = 1

_CALLS = {'document': (programs.DropDoc, programs.KeepDoc),
          'chunk': (programs.RemoveLines, programs.RemoveAll, programs.Normalize, programs.KeepChunk)}


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
  """One text and the program for it.

  id: of the example, unique in its task.  source: what its page is from, a site or a domain.  text: the document as it
  is, or a chunk's lines without labels.  start: the number of the chunk's first line in its document, 0 for documents.
  program: in the canonical form of `programs.serialise`.
  """
  id: str
  source: str
  text: str
  start: int
  program: str


def split_of(source: str, *, seed: int = 0, fractions: tuple[float, float, float] = FRACTIONS) -> str:
  """The split that all of a source's examples are in: by hash of its name, whatever other sources there are.

  fractions: the shares of train, validation and test, of the sources and not of their examples.
  ValueError unless they are three numbers of at least 0 that sum to 1.
  """
  if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-9:
    raise ValueError(f'fractions {fractions}; want three numbers of at least 0 that sum to 1, for {", ".join(SPLITS)}')
  place = int.from_bytes(hashlib.sha256(f'{seed}\0{source}'.encode()).digest()[:8], 'big') / 2 ** 64
  if place < fractions[0]:
    return 'train'
  return 'test' if fractions[2] > 0 and place >= 1 - fractions[2] or fractions[1] == 0 else 'validation'


def write(folder: str | os.PathLike, chosen: Mapping[str, Mapping[str, Iterable[Example]]],
          settings: Mapping[str, Any], measured: Mapping[str, Any] | None = None) -> dict[str, Any]:
  """Writes the files of every split and task, then the manifest, and returns it.

  chosen: chosen[split][task].  A split or task that is not there has an empty file.  settings: the annotator's name and
  all that its examples depend on, JSON values.  measured: what there is to say of how they came out.
  ValueError for another split or task, an id used twice in a task, a source in two splits, and a program that is
  not canonical or not of its task.
  """
  folder = pathlib.Path(folder)
  unknown = (set(chosen) - set(SPLITS)) | ({task for tasks in chosen.values() for task in tasks} - set(TASKS))
  if unknown:
    raise ValueError(f'unknown split or task {sorted(unknown)}; want {", ".join(SPLITS)}, each with {", ".join(TASKS)}')
  # A folder without its manifest is not read, so a kill here leaves no mixture of two sets of examples.
  (folder / 'manifest.json').unlink(missing_ok=True)
  files, split_by_source, ids = {}, {}, {task: set() for task in TASKS}
  for split in SPLITS:
    for task in TASKS:
      counts = {'examples': 0, 'characters': 0}
      with workdir.replacing(_file(folder, split, task), 'w') as f:
        for example in chosen.get(split, {}).get(task, ()):
          if split_by_source.setdefault(example.source, split) != split:
            raise ValueError(f'source {example.source!r} is in {split_by_source[example.source]} and in {split}; want '
                             'all of its examples in one split (`split_of`)')
          if example.id in ids[task]:
            raise ValueError(f'two {task} examples have the id {example.id!r}; want one')
          ids[task].add(example.id)
          _check(example, task)
          f.write(json.dumps(dataclasses.asdict(example), ensure_ascii=False) + '\n')
          counts['examples'] += 1
          counts['characters'] += len(example.text)
      files[f'{split}/{task}'] = counts | {'sha256': workdir.digest_file(_file(folder, split, task))}
  sources = {split: sum(one == split for one in split_by_source.values()) for split in SPLITS}
  manifest = {'format': FORMAT, 'settings': dict(settings), 'measured': dict(measured or {}), 'sources': sources,
              'files': files}
  workdir.write_json(folder / 'manifest.json', manifest)
  return manifest


def read(folder: str | os.PathLike, split: str, task: str) -> list[Example]:
  """The examples of a split and task, in their order.

  FileNotFoundError where no examples were written; ValueError for another split or task, and for a file that is not the
  one that the manifest knows, or has a line that is no example.
  """
  if split not in SPLITS or task not in TASKS:
    raise ValueError(f'split {split!r} and task {task!r}; want one of {", ".join(SPLITS)} and of {", ".join(TASKS)}')
  facts, path = manifest(folder)['files'][f'{split}/{task}'], _file(pathlib.Path(folder), split, task)
  if (found := workdir.digest_file(path)) != facts['sha256']:
    raise ValueError(f'{path} has the digest {found[:12]}, and the manifest says {facts["sha256"][:12]}; the file was '
                     'changed since: annotate again')
  examples = []
  with open(path, encoding='utf-8') as f:
    for number, line in enumerate(f, 1):
      try:
        example = Example(**json.loads(line))
        _check(example, task)
      except (ValueError, TypeError) as e:
        raise ValueError(f'{path}, line {number}, is no example of a {task}: {e}') from e
      examples.append(example)
  return examples


def manifest(folder: str | os.PathLike) -> dict[str, Any]:
  """What `write` returned.  FileNotFoundError says what to do; ValueError for a manifest of another format."""
  path = pathlib.Path(folder) / 'manifest.json'
  if not path.exists():
    raise FileNotFoundError(f'{path} is not there, so {folder} holds no whole set of examples; make one with '
                            'python -m datasel.methods.prox.annotate')
  facts = workdir.read_json(path)
  if not isinstance(facts, dict) or facts.get('format') != FORMAT:
    raise ValueError(f'{path} is not of format {FORMAT}; annotate again')
  return facts


def _file(folder: pathlib.Path, split: str, task: str) -> pathlib.Path:
  return folder / split / f'{task}.jsonl'


def _check(example: Example, task: str) -> None:
  calls = programs.parse(example.program)
  if not calls or not all(isinstance(call, _CALLS[task]) for call in calls):
    raise ValueError(f'example {example.id!r} has the program {example.program[:200]!r}; want calls of a {task}')
  if programs.serialise(calls) != example.program:
    raise ValueError(f'example {example.id!r} has the program {example.program[:200]!r}; want it as '
                     f'{programs.serialise(calls)[:200]!r}')
  if not isinstance(example.start, int) or example.start < 0 or task == 'document' and example.start:
    raise ValueError(f'example {example.id!r} starts at line {example.start!r}; want a number of at least 0, and 0 for '
                     'a document')
