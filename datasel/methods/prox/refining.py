"""Documents to refined documents, with a record of each: what a refiner is, and the pure function of a batch.

A refiner writes programs: a model's, or rules' verdicts written as such, so that baselines leave the same records.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from datasel.data import corpus
from datasel.methods.prox import chunks, executor, programs
from datasel.methods.prox.chunks import Chunk

STAGES = ('document', 'chunk')
FORMAT = 1  # of the records, and of what chunks and executor make of a text and a program

_NAMES = {programs.DropDoc: 'drop_doc', programs.KeepDoc: 'keep_doc', programs.KeepChunk: 'keep_chunk',
          programs.RemoveLines: 'remove_lines', programs.RemoveAll: 'remove_all', programs.Normalize: 'normalize'}


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
  """What a refiner says of a whole document.

  program: drop_doc() or keep_doc().  score: log p(keep) - log p(drop), nan where there is none.  reason: a rule's; ''
  where there is none.  truncated: the text was longer than what was read.  tokens: that were read and generated.
  """
  program: str
  score: float = math.nan
  reason: str = ''
  truncated: bool = False
  tokens: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Written:
  """The program for one chunk.

  finished: 'eos'; 'length', its last call may be cut off; 'skipped', no program was asked for; 'rules'.
  tokens: generated.  prompt_tokens: read.
  """
  program: str
  finished: str
  tokens: int = 0
  prompt_tokens: int = 0


class Refiner(Protocol):
  """What writes programs, for both stages or one; each answer depends on nothing but its batch and `fingerprint`.

  name: for people.  fingerprint: digest of all that its programs depend on: weights, tokenizer, template, options,
  versions of rules.  stages: those of STAGES that it has; it is not asked for the other.  max_tokens: of a chunk.
  A refiner may also have flops_per_token: {stage: FLOPs to read or generate a token}.
  """
  name: str
  fingerprint: str
  stages: tuple[str, ...]
  max_tokens: int

  def count_tokens(self, lines: list[str]) -> Sequence[int]:
    """The number of tokens of each string; of numbered lines, each by itself, to fill chunks of max_tokens."""

  def decide(self, texts: Sequence[str]) -> list[Decision]:
    """One for each text; none of them is blank."""

  def write(self, chunks: Sequence[Chunk]) -> list[Written]:
    """One for each chunk."""


@dataclasses.dataclass(frozen=True, slots=True)
class Refined:
  """One document refined.  text: '' where it was dropped.  record: JSON, see `refine`."""
  text: str
  record: dict[str, Any]


def refine(documents: Sequence[corpus.Document], refiner: Refiner, *, compat: bool = False,
           count_tokens: Callable[[list[str]], Sequence[int]] | None = None) -> list[Refined]:
  """Refines a batch: the refiner decides on documents, writes a program for each chunk of those kept, and the programs
  are carried out.

  compat: as the authors do, bugs included: their executor, and a program also for a line longer than a chunk.
  count_tokens: of texts, for the statistics; none are counted without.  A blank document is dropped, and the refiner
  not asked.  The record:

    {id, sha256 (of the text), decision ('kept', 'edited', 'dropped'), reason, stage (the last that was asked, or null),
     document: null or {program, score (null where there is none), reason, truncated, tokens, outcomes},
     chunks: [{start, stop, tokens, program, finished, read, generated, outcomes}],
     before, after: {lines, words, characters, and, if counted, tokens}}

  outcomes: [call, kind] of each call, as `executor.Outcome` has them; in compat all stand with the first chunk.  tokens
  of a document: that were read and generated; of a chunk: of its numbered lines; of before and after: of the text.
  """
  texts = [document.text for document in documents]
  left = [n for n, text in enumerate(texts) if not _blank(text)]
  decisions: dict[int, Decision] = {}
  if 'document' in refiner.stages and left:
    decisions = dict(zip(left, refiner.decide([texts[n] for n in left]), strict=True))
    left = [n for n in left if _decide(texts[n], decisions[n], compat).decision != 'dropped']
  written: dict[int, list[tuple[Chunk, Written]]] = {}
  if 'chunk' in refiner.stages and left:
    written = dict(zip(left, _written([texts[n] for n in left], refiner, compat)))
  return _carried_out(documents, decisions, written, compat, count_tokens)


def carry_out(documents: Sequence[corpus.Document], records: Sequence[dict[str, Any]], *, compat: bool = False,
              count_tokens: Callable[[list[str]], Sequence[int]] | None = None) -> list[Refined]:
  """What `refine` makes of a batch, by the programs in its records instead of a refiner's.

  ValueError for a record of another text.
  """
  decisions, written = {}, {}
  for n, (document, record) in enumerate(zip(documents, records, strict=True)):
    check_source(document.text, record)
    if stated := record['document']:
      score = math.nan if stated['score'] is None else stated['score']
      decisions[n] = Decision(stated['program'], score, stated['reason'], stated['truncated'], stated['tokens'])
    lines = document.text.split('\n')
    pairs = [(Chunk(one['start'], one['stop'], '\n'.join(lines[one['start']:one['stop']]), one['tokens'],
                    one['finished'] == 'skipped'),
              Written(one['program'], one['finished'], one['generated'], one['read'])) for one in record['chunks']]
    if pairs:
      written[n] = pairs
  return _carried_out(documents, decisions, written, compat, count_tokens)


def check_source(text: str, record: dict[str, Any]) -> None:
  """ValueError unless the record is of this text."""
  if digest(text) != record['sha256']:
    raise ValueError(f'the record of {record["id"]!r} is of another text (sha256 {record["sha256"][:12]}, got '
                     f'{digest(text)[:12]}); give the corpus that was refined')


def _carried_out(documents: Sequence[corpus.Document], decisions: dict[int, Decision],
                 written: dict[int, list[tuple[Chunk, Written]]], compat: bool,
                 count_tokens: Callable[[list[str]], Sequence[int]] | None) -> list[Refined]:
  results, verdicts, stages = [], {}, []
  for n, document in enumerate(documents):
    result, stage = executor.Result('', 'dropped', 'blank'), None
    if not _blank(document.text):
      result = executor.Result(document.text, 'kept', 'no program')
    if n in decisions:
      verdicts[n], stage = _decide(document.text, decisions[n], compat), 'document'
      result = dataclasses.replace(verdicts[n], reason=decisions[n].reason or verdicts[n].reason)
    if n in written and result.decision != 'dropped':
      spans = [(chunk.start, chunk.stop) for chunk, _ in written[n]]
      theirs = [one.program for _, one in written[n]]
      result, stage = executor.execute(document.text, theirs, spans=spans, compat=compat), 'chunk'
    results.append(result)
    stages.append(stage)
  before = _sizes([document.text for document in documents], count_tokens)
  edited = [n for n, result in enumerate(results) if result.decision == 'edited']
  after = dict(zip(edited, _sizes([results[n].text for n in edited], count_tokens)))
  return [Refined(result.text, {
    'id': document.id,
    'sha256': digest(document.text),
    'decision': result.decision,
    'reason': result.reason,
    'stage': stage,
    'document': _document(decisions[n], verdicts[n]) if n in decisions else None,
    'chunks': _chunks(written[n], result) if stage == 'chunk' else [],
    'before': before[n],
    'after': after.get(n) or (before[n] if result.decision == 'kept' else dict.fromkeys(before[n], 0)),
  }) for n, (document, result, stage) in enumerate(zip(documents, results, stages, strict=True))]


def _blank(text: str) -> bool:
  return not text or text.isspace()


def _decide(text: str, decision: Decision, compat: bool) -> executor.Result:
  return executor.execute(text, decision.program, level='document', compat=compat)


def digest(text: str) -> str:
  """sha256 (hex) of a text in UTF-8."""
  return hashlib.sha256(text.encode()).hexdigest()


def _written(texts: list[str], refiner: Refiner, compat: bool) -> list[list[tuple[Chunk, Written]]]:
  """Each text's chunks and their programs."""
  split = chunks.split(texts, refiner.count_tokens, max_tokens=refiner.max_tokens)
  asked = [chunk for of_text in split for chunk in of_text if compat or not chunk.skipped]
  answers = refiner.write(asked) if asked else []
  if len(answers) != len(asked):
    raise ValueError(f'{refiner.name} wrote {len(answers)} programs for {len(asked)} chunks; want one for each')
  given = iter(answers)
  return [[(chunk, next(given) if compat or not chunk.skipped else Written('', 'skipped')) for chunk in of_text]
          for of_text in split]


def _sizes(texts: list[str], count_tokens: Callable[[list[str]], Sequence[int]] | None) -> list[dict[str, int]]:
  sizes = [{'lines': text.count('\n') + 1, 'words': executor.words(text), 'characters': len(text)} for text in texts]
  if count_tokens and texts:
    return [size | {'tokens': int(n)} for size, n in zip(sizes, count_tokens(texts), strict=True)]
  return sizes


def _document(decision: Decision, result: executor.Result) -> dict[str, Any]:
  return dataclasses.asdict(decision) | {'score': decision.score if math.isfinite(decision.score) else None,
                                         'outcomes': [_outcome(outcome) for outcome in result.outcomes]}


def _chunks(pairs: list[tuple[Chunk, Written]], result: executor.Result) -> list[dict[str, Any]]:
  outcomes: dict[int, list] = {}
  for outcome in result.outcomes:
    outcomes.setdefault(outcome.chunk, []).append(_outcome(outcome))
  return [{'start': chunk.start, 'stop': chunk.stop, 'tokens': chunk.tokens, 'program': written.program,
           'finished': written.finished, 'read': written.prompt_tokens, 'generated': written.tokens,
           'outcomes': outcomes.get(n, [])} for n, (chunk, written) in enumerate(pairs)]


def _outcome(outcome: executor.Outcome) -> list[str]:
  call = outcome.call
  if isinstance(call, str):  # compat's line of a program
    return [call.partition('(')[0][:20], outcome.kind]
  return [call.kind if isinstance(call, programs.Fault) else _NAMES[type(call)], outcome.kind]
