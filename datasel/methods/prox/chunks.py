"""A document as the chunk refiner reads it: numbered lines, filled greedily into chunks of so many tokens."""

import dataclasses
from collections.abc import Callable, Sequence

MAX_TOKENS = 1500


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
  """Lines start..stop-1 of a document, numbered from 0.

  text: the lines as they are, joined by newlines.  tokens: of its numbered lines, each counted by itself.
  skipped: it is one line of more tokens than a chunk may have.  Algorithm 1 flags it so, and no refiner is asked for
  a program; the authors' code asks all the same.    ProX, Zhou et al. 2024, Algorithm 1.
  """
  start: int
  stop: int
  text: str
  tokens: int
  skipped: bool

  def numbered(self) -> str:
    """The lines with their labels, '[007]' and no space; from line 1000 on a label has four digits."""
    return '\n'.join(numbered(self.text, self.start))


def numbered(text: str, first: int = 0) -> list[str]:
  """Each line of `text`, blank ones too, after its label; a newline at the end has an empty line after it."""
  return [f'[{number:03d}]{line}' for number, line in enumerate(text.split('\n'), first)]


def split(texts: Sequence[str], count_tokens: Callable[[list[str]], Sequence[int]], *,
          max_tokens: int = MAX_TOKENS) -> list[list[Chunk]]:
  """Each text's chunks, in order; their texts, joined by newlines, are the text.

  count_tokens: of a list of numbered lines, the number of tokens of each; called once, with the lines of all texts.
  The authors' counts have a bos in every line and nothing for the newlines between them.  max_tokens: of one chunk;
  only a line longer than that is a chunk of more.
  ValueError for max_tokens below 1, and unless there are as many counts as lines, none of them negative.
  """
  if max_tokens < 1:
    raise ValueError(f'max_tokens is {max_tokens}; want at least 1')
  lines_of = [numbered(text) for text in texts]
  lines = [line for lines in lines_of for line in lines]
  counts = [int(count) for count in count_tokens(lines)] if lines else []
  if len(counts) != len(lines) or min(counts, default=0) < 0:
    raise ValueError(f'count_tokens gave {len(counts)} counts, the least {min(counts, default=None)}, for {len(lines)} '
                     'lines; want one for each line, none below 0')
  chunks, at = [], 0
  for text, labelled in zip(texts, lines_of):
    chunks.append(_fill(text.split('\n'), counts[at:at + len(labelled)], max_tokens))
    at += len(labelled)
  return chunks


def _fill(lines: list[str], counts: list[int], max_tokens: int) -> list[Chunk]:
  chunks, start, tokens = [], 0, 0
  for stop, count in enumerate([*counts, max_tokens + 1]):  # the last count closes the last chunk
    if tokens + count > max_tokens and stop > start:
      chunks.append(Chunk(start, stop, '\n'.join(lines[start:stop]), tokens, tokens > max_tokens))
      start, tokens = stop, 0
    tokens += count
  return chunks
