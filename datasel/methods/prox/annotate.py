"""Examples of programs to train a refiner on, from noisy and clean pairs, from rules, or from a language model.

  python -m datasel.methods.prox.annotate --out SFT --demo
  python -m datasel.methods.prox.annotate --out SFT --pairs PAIRS.jsonl
  python -m datasel.methods.prox.annotate --out SFT --corpus CORPUS --rules gopher+c4+fineweb
  python -m datasel.methods.prox.annotate --out SFT --corpus CORPUS --endpoint http://localhost:8000/v1 --model NAME

writes the files of `examples`.  The demo's pairs are real web pages, and clean documents with noise from such pages.
Run again, it goes on where it was stopped, and does nothing where the examples are there; but questions that failed are
asked again.  --dry_run only counts.
Exit status: 0 done, 2 refused, 1 anything else.
"""

import argparse
import collections
import hashlib
import itertools
import logging
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from datasel import workdir
from datasel.data import demo_archives
from datasel.data import tokenizer as tokenizers
from datasel.methods.prox import chunks, examples, executor, judge, labels, programs, rule_refiner, rules, web_pages
from datasel.methods.prox import endpoint as endpoints
from datasel.methods.prox.seeds import Seed, choose, demo_pairs
from datasel.methods.prox.templates import Prompts

logger = logging.getLogger(__name__)

MAX_CHARACTERS = 24_000  # of a document that a language model is asked about
_FAILED = 'answers failed'
_CODE = [workdir.digest_file(one.__file__) for one in (chunks, executor, judge, labels, programs, rules)]


class Counter:
  """Counts tokens of numbered lines for `chunks.split`, and what the chunks are recorded to depend on.

  tokenizer: None counts words and signs, see `rules.words`.  max_tokens: of a chunk.  prompts: a refiner's, whose
  chunks they shall be; then these two are its own.
  """

  def __init__(self, tokenizer: tokenizers.Tokenizer | None = None, max_tokens: int = chunks.MAX_TOKENS, *,
               prompts: Prompts | None = None):
    if prompts is not None:
      tokenizer, max_tokens = prompts.tokenizer, min(prompts.max_tokens, max_tokens)
    self._tokenizer, self.max_tokens, self._prompts = tokenizer, max_tokens, prompts
    self.facts = {'tokenizer': tokenizer.digest if tokenizer else 'words', 'max_tokens': max_tokens}

  def count(self, lines: list[str]) -> list[int]:
    """Of each line."""
    if self._prompts is not None:
      return self._prompts.count_tokens(lines)
    if self._tokenizer is None:
      return [len(rules.words(line)) for line in lines]
    return [len(ids) for ids in self._tokenizer.encode_batch(lines)]


def from_pairs(pairs: Iterable[labels.Pair], out: str | pathlib.Path, *, counter: Counter | None = None, seed: int = 0,
               fractions: Sequence[float] = examples.FRACTIONS, min_clean: int = labels.MIN_CLEAN) -> dict[str, Any]:
  """Examples of pairs, see `labels`; returns the manifest, whose `settings` and `measured` say what they are of.

  Nothing is done where the same examples are there.
  """
  counter, pairs = counter or Counter(), list(pairs)
  digest = hashlib.sha256()
  for pair in pairs:
    digest.update(workdir.digest([pair.id, pair.source, pair.noisy, pair.clean, pair.kept]).encode())
  settings = {'annotator': 'pairs', 'pairs': digest.hexdigest(), 'min_clean': min_clean}

  def made(measured):
    for pair in pairs:
      one = labels.label(pair, counter.count, max_tokens=counter.max_tokens, min_clean=min_clean)
      measured.update(pairs=1, exact=one.exact, missing_lines=one.missing, lines=one.lines, kept_lines=one.kept_lines,
                      characters=len(pair.noisy), kept_characters=len(one.text))
      measured.update({f'chunks left out: {reason}': count for reason, count in one.skipped.items()})
      yield one.document, one.chunks

  return _write(out, made, settings, counter, seed, fractions)


def from_rules(seeds: Iterable[Seed], out: str | pathlib.Path, names: str, *, counter: Counter | None = None,
               seed: int = 0, fractions: Sequence[float] = examples.FRACTIONS) -> dict[str, Any]:
  """Examples of what the rules do with documents; names: as of `rule_refiner.RuleRefiner`."""
  counter, seeds, refiner = counter or Counter(), list(seeds), rule_refiner.RuleRefiner(names)

  def made(measured):
    for one in seeds:
      verdict = refiner.verdict(one.text)
      measured.update({'documents': 1, f'dropped: {verdict.reason}' if verdict.reason else 'kept': 1})
      found = []
      for chunk in _chunks(one, counter, measured) if verdict.keep else ():
        calls = refiner.calls(chunk)
        if len(calls) > programs.MAX_CALLS:
          measured['chunks left out: too many calls'] += 1
        else:
          found.append(_chunk_example(one, chunk, programs.serialise(calls or [programs.KeepChunk()])))
      yield _document_example(one, verdict.keep), found

  settings = {'annotator': refiner.name, 'refiner': refiner.fingerprint, 'documents': workdir.digest(seeds)}
  return _write(out, made, settings, counter, seed, fractions)


def from_endpoint(seeds: Iterable[Seed], out: str | pathlib.Path, endpoint: endpoints.Endpoint, *,
                  counter: Counter | None = None, seed: int = 0, fractions: Sequence[float] = examples.FRACTIONS,
                  max_removed: float = judge.MAX_REMOVED) -> dict[str, Any]:
  """Examples of a language model's answers; those that can't be used are left out, and counted in `measured`.

  Documents of over 24,000 characters are not asked about.  Where questions failed, `measured` has how many 'answers
  failed', and the next run asks them again.  Raises endpoint.Unusable.
  """
  counter, seeds = counter or Counter(), list(seeds)

  def made(measured):
    short = [one for one in seeds if len(one.text) <= MAX_CHARACTERS]
    measured.update({'documents': len(seeds), 'documents left out: too long': len(seeds) - len(short)})
    answers = endpoint.ask(question for one in short for question in judge.score_questions(one.text))
    kept = []
    for one in short:
      two = list(itertools.islice(answers, 2))
      measured[_FAILED] += sum(answer.failed for answer in two)
      points = judge.scores([answer.text for answer in two])
      if points is None:
        reason = next((answer.error for answer in two if answer.error), 'no scores')
        measured[f'documents left out: {reason}'] += 1
        continue
      measured.update({f'scores {points[0]} {points[1]}': 1})
      yield _document_example(one, judge.keeps(*points)), ()
      if judge.keeps(*points):
        kept.append(one)
    parts = [(one, chunk) for one in kept for chunk in _chunks(one, counter, measured)]
    answers = endpoint.ask(question for _, chunk in parts for question in judge.program_questions(chunk))
    for one, chunk in parts:
      three = list(itertools.islice(answers, len(judge.KINDS)))
      measured[_FAILED] += sum(answer.failed for answer in three)
      reason = next((answer.error for answer in three if answer.error), '')
      if not reason:
        program, reason = judge.merged(chunk, [answer.text for answer in three], max_removed=max_removed)
      if reason:
        measured[f'chunks left out: {reason}'] += 1
      else:
        yield None, [_chunk_example(one, chunk, program)]
    logger.info('%s', endpoint.summary())
    if measured[_FAILED]:
      logger.warning('UNFINISHED: %d questions failed, and what they were about is left out; the same command asks '
                     'them again', measured[_FAILED])

  settings = {'annotator': f'endpoint {endpoint.model}', 'temperature': endpoint.temperature,
              'max_removed': max_removed, 'max_characters': MAX_CHARACTERS, 'documents': workdir.digest(seeds)}
  return _write(out, made, settings, counter, seed, fractions)


def plan(seeds: Iterable[Seed], endpoint: endpoints.Endpoint, counter: Counter) -> dict[str, float]:
  """What `from_endpoint` would ask at most, were every document kept; nothing is asked."""
  short = [one for one in seeds if len(one.text) <= MAX_CHARACTERS]
  return endpoint.plan(itertools.chain(
    (question for one in short for question in judge.score_questions(one.text)),
    (question for one in short for chunk in _chunks(one, counter, collections.Counter())
     for question in judge.program_questions(chunk))))


def _chunks(one: Seed, counter: Counter, measured: collections.Counter) -> list[chunks.Chunk]:
  split = chunks.split([one.text], counter.count, max_tokens=counter.max_tokens)[0]
  whole = [chunk for chunk in split if not chunk.skipped]
  measured['chunks left out: one line too long'] += len(split) - len(whole)
  return whole


def _document_example(one: Seed, keep: bool) -> examples.Example:
  call = programs.KeepDoc() if keep else programs.DropDoc()
  return examples.Example(one.id, one.source, one.text, 0, programs.serialise([call]))


def _chunk_example(one: Seed, chunk: chunks.Chunk, program: str) -> examples.Example:
  return examples.Example(f'{one.id}@{chunk.start}', one.source, chunk.text, chunk.start, program)


def _write(out: str | pathlib.Path, made: Callable, settings: dict[str, Any], counter: Counter, seed: int,
           fractions: Sequence[float]) -> dict[str, Any]:
  settings = settings | counter.facts | {'seed': seed, 'fractions': list(fractions), 'code': workdir.digest(_CODE)}
  if (facts := _done(out, settings)) is not None:
    logger.info('the examples are in %s', out)
    return facts
  started, measured = time.monotonic(), collections.Counter()
  chosen = {split: {task: [] for task in examples.TASKS} for split in examples.SPLITS}
  told = started
  for n, (document, its_chunks) in enumerate(made(measured)):
    for task, found in (('document', [document] if document else ()), ('chunk', its_chunks)):
      for example in found:
        chosen[examples.split_of(example.source, seed=seed, fractions=tuple(fractions))][task].append(example)
    if time.monotonic() - told > 5:
      told = time.monotonic()
      logger.info('%d annotated', n + 1)
  logger.info('annotated in %.1f s', time.monotonic() - started)
  _refuse_empty(chosen)
  return examples.write(out, chosen, settings, measured={key: count for key, count in measured.items() if count})


def _refuse_empty(chosen: dict[str, dict[str, list[examples.Example]]]) -> None:
  """ValueError unless there is something to train on and something to validate on."""
  counts = {split: len(chosen[split]['document']) for split in ('train', 'validation')}
  if not all(counts.values()):
    sources = {one.source for split in examples.SPLITS for one in chosen[split]['document']}
    raise ValueError(f'{counts["train"]} documents to train on and {counts["validation"]} to validate on, of '
                     f'{len(sources)} sources in all; want at least 1 of each: raise --documents, or the number of '
                     'pairs and of their sources, or the shares in --fractions')


def _done(out: str | pathlib.Path, settings: dict[str, Any]) -> dict[str, Any] | None:
  """The manifest, where whole examples of these settings are there, and no question failed."""
  try:
    facts = examples.manifest(out)
    for split, task in itertools.product(examples.SPLITS, examples.TASKS):
      examples.read(out, split, task)
  except FileNotFoundError:
    return None
  except ValueError as e:
    logger.warning('%s', e)
    return None
  return facts if facts['settings'] == settings and not facts['measured'].get(_FAILED) else None


def main(argv: list[str]) -> int:
  """The command line; returns the exit status."""
  options = _parser().parse_args(argv)
  logging.basicConfig(level=logging.INFO, stream=sys.stderr, format='%(asctime)s %(message)s', datefmt='%H:%M:%S')
  for name in ('httpx', 'openai'):  # they tell of every request
    logging.getLogger(name).setLevel(logging.WARNING)
  try:
    for line in run(options):
      print(line, flush=True)
  except (ValueError, OSError, ImportError, endpoints.Unusable, demo_archives.Unavailable) as e:
    print(f'error: {e}', file=sys.stderr)
    return 2 if isinstance(e, (ValueError, FileNotFoundError, ImportError)) else 1
  return 0


def run(options: argparse.Namespace) -> Iterator[str]:
  """Does what the options say; yields the lines of the summary."""
  ways = {'--demo': options.demo, '--pairs': options.pairs, '--corpus': options.corpus}
  if sum(map(bool, ways.values())) != 1 or bool(options.corpus) != bool(options.rules or options.endpoint):
    raise ValueError('want one of --demo, --pairs, and --corpus with --rules or --endpoint')
  if options.rules and options.endpoint or bool(options.endpoint) != bool(options.model):
    raise ValueError('want either --rules, or --endpoint and --model')
  tokenizer = tokenizers.load(options.tokenizer) if options.tokenizer else None
  counter = Counter(tokenizer, options.max_tokens)
  common = {'counter': counter, 'seed': options.seed, 'fractions': tuple(options.fractions)}
  out = pathlib.Path(options.out)
  if options.corpus:
    seeds = choose(options.corpus, options.documents, seed=options.seed)
    if options.endpoint:
      endpoint = endpoints.Endpoint(options.endpoint, options.model, out / 'answers', timeout_s=options.timeout,
                                    retries=options.retries, workers=options.workers, prices=tuple(options.prices))
      if options.dry_run:
        yield '  '.join(f'{key} {value:,.4g}' for key, value in plan(seeds, endpoint, counter).items())
        return
      facts = from_endpoint(seeds, out, endpoint, max_removed=options.max_removed, **common)
    elif options.dry_run:
      yield f'{len(seeds)} documents, {sum(len(one.text) for one in seeds)} characters'
      return
    else:
      facts = from_rules(seeds, out, options.rules, **common)
  else:
    pairs = list(web_pages.read(options.pairs)) if options.pairs else demo_pairs(
      out, synthetic=options.synthetic, seed=options.seed, fractions=options.fractions)
    if options.dry_run:
      yield f'{len(pairs)} pairs, {sum(len(pair.noisy) for pair in pairs)} characters'
      return
    facts = from_pairs(pairs, out, min_clean=options.min_clean, **common)
  yield from summary(facts)


def summary(facts: dict[str, Any]) -> Iterator[str]:
  """A manifest as a table."""
  yield f'{"":12}' + ''.join(f'{name:>14}' for name in ('sources', *examples.TASKS, 'characters'))
  for split in examples.SPLITS:
    files = [facts['files'][f'{split}/{task}'] for task in examples.TASKS]
    yield f'{split:12}' + ''.join(f'{count:14,}' for count in (
      facts['sources'][split], *(file['examples'] for file in files), sum(file['characters'] for file in files)))
  for key, count in sorted(facts['measured'].items()):
    yield f'{key:40}{count:14,}'


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser('datasel.methods.prox.annotate', description='Makes examples of programs.')
  add = parser.add_argument
  add('--out', required=True, help='folder of the examples')
  add('--demo', action='store_true', help='pairs of real web pages and of clean documents with noise')
  add('--synthetic', type=int, default=1000, help='of these so many')
  add('--pairs', help='JSON lines: id, source, noisy, clean')
  add('--min_clean', type=int, default=labels.MIN_CLEAN, help='a pair of fewer clean characters is dropped')
  add('--corpus', help='folder of documents to annotate')
  add('--documents', type=int, default=5000, help='of the corpus so many')
  add('--rules', help=f'some of {", ".join(rules.NAMES)}, joined by +')
  add('--endpoint', help='address of an OpenAI-compatible endpoint, with /v1; its key is read from OPENAI_API_KEY')
  add('--model', help='its name there')
  add('--timeout', type=float, default=120.0, help='seconds, of one attempt')
  add('--retries', type=int, default=4, help='further attempts')
  add('--workers', type=int, default=8, help='requests at once')
  add('--prices', type=float, nargs=2, default=(0.0, 0.0), metavar=('IN', 'OUT'), help='of a million tokens')
  add('--max_removed', type=float, default=judge.MAX_REMOVED, help="of a chunk's characters, else it is left out")
  add('--tokenizer', help='counts the tokens of a chunk (default: words and signs)')
  add('--max_tokens', type=int, default=chunks.MAX_TOKENS, help='of a chunk')
  add('--seed', type=int, default=0, help='of the choice, the splits and the noise')
  add('--fractions', type=float, nargs=3, default=examples.FRACTIONS, help='train, validation, test; of the sources')
  add('--dry_run', action='store_true', help='count, and annotate nothing')
  return parser


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
