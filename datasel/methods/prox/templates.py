"""What a refiner reads and answers, token by token; training and refinement ask the same functions.

  plain    bos [doc] ⏎ the text ⏎ [/doc] ⏎ and then the program            for both tasks
  llama2   bos [INST] <<SYS>> ... <</SYS>> ... [/INST] and then a space and the program: the chat string that the
           released refiners were trained with (a chunk between [doc] and [/doc], a document bare), with one bos

A document is read from its beginning, and cut where the model's length ends; what stands after it stays.  A chunk has
its lines numbered (`chunks.numbered`), and is never cut.    ProX, Zhou et al. 2024.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from datasel.data.tokenizer import Tokenizer
from datasel.methods.prox import chunks
from datasel.methods.prox.vocabulary import Vocabulary

MAX_NEW_TOKENS = 256  # of a program with its end of text
DECISIONS = ('drop_doc()', 'keep_doc()')

_SYSTEM = '[INST] <<SYS>>\nYou are a helpful, respectful and honest assistant.\n<</SYS>>\n\n'
# By template and task: what stands before the text, after it (a chunk ends with a line break), and before the program.
_FRAMES = {
  'plain': {'document': ('[doc]\n', '\n[/doc]\n', ''), 'chunk': ('[doc]\n', '[/doc]\n', '')},
  'llama2': {'document': (_SYSTEM, ' [/INST]', ' '), 'chunk': (_SYSTEM + '[doc]\n', '[/doc] [/INST]', ' ')},
}
_NUMBER = re.compile(r'((?:(?<=start=)|(?<=end=))[0-9]+)')
_CHARACTERS = 32  # a token, of a document: of what is longer no more is looked at


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
  """ids: int32, what the model reads.  tokens: of the text in it.  truncated: the text was longer."""
  ids: np.ndarray
  tokens: int
  truncated: bool = False


class Prompts:
  """The prompts and answers of one task.

  length: the most tokens of a prompt with its answer.  ValueError for an unknown template or task, a tokenizer without
  an end of text or that changes text, and a length that leaves no room for any.
  """

  def __init__(self, tokenizer: Tokenizer, task: str, template: str = 'plain', *, length: int,
               max_new_tokens: int = MAX_NEW_TOKENS):
    if template not in _FRAMES or task not in _FRAMES[template]:
      raise ValueError(f'template {template!r} and task {task!r}; want one of {", ".join(_FRAMES)}, and document or '
                       'chunk')
    if tokenizer.eos_id is None:
      raise ValueError(f'the tokenizer {tokenizer.name} has no end of text, with which a program ends; name one in its '
                       'tokenizer_config.json (eos_token)')
    self.tokenizer, self.task, self.template, self.length = tokenizer, task, template, length
    self.vocabulary = Vocabulary(tokenizer)
    before, after, self.lead = _FRAMES[template][task]
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    self._before, self._after = self.vocabulary.encode([before, after])
    self._before = np.concatenate([np.array(bos, np.int32), self._before])
    self.max_new_tokens = max(map(len, self.answers(DECISIONS))) if task == 'document' else max_new_tokens
    self.max_tokens = length - len(self._before) - len(self._after) - self.max_new_tokens
    if self.max_tokens < 1:
      raise ValueError(f'a length of {length} tokens leaves none for the text of a {task}, beside '
                       f'{len(self._before) + len(self._after)} around it and {self.max_new_tokens} for its program; '
                       'want a longer one')

  def documents(self, texts: Sequence[str]) -> list[Prompt]:
    """The prompts of whole texts, each cut to the tokens that there is room for."""
    most = self.max_tokens
    found = self.vocabulary.encode([text[:_CHARACTERS * most] for text in texts])
    return [Prompt(self._framed(ids[:most]), min(len(ids), most), len(ids) > most or len(text) > _CHARACTERS * most)
            for text, ids in zip(texts, found)]

  def chunks(self, texts: Sequence[str], starts: Sequence[int]) -> list[Prompt]:
    """The prompts of chunks: their lines' text, and the number of the first; whole, however long."""
    lines = [chunks.numbered(text, start) for text, start in zip(texts, starts, strict=True)]
    found = iter(self._lines([line for own in lines for line in own]))
    prompts = []
    for own in lines:
      ids = np.concatenate([next(found) for _ in own])
      prompts.append(Prompt(self._framed(ids), len(ids)))
    return prompts

  def count_tokens(self, lines: Sequence[str]) -> list[int]:
    """Tokens of each numbered line with its line break: those of a chunk's lines add up to those of its prompt."""
    return [len(ids) for ids in self._lines(lines)]

  def answers(self, programs: Sequence[str]) -> list[np.ndarray | None]:
    """int32: what the model shall write, end of text included; None for a program that the tokenizer changes.

    A line number's digits are tokens of their own, as the grammar wants them, whatever the tokenizer joins them with.
    """
    spelled, end = self.vocabulary.spelled, [self.tokenizer.eos_id]
    texts = [self.lead + one for one in programs]
    parts = [_NUMBER.split(text) for text in texts]
    found, answers = iter(spelled([part for own in parts for part in own])), []
    for text, own in zip(texts, parts):
      ids = [next(found) for _ in own]
      if any(part is None for part in ids):
        ids = spelled([text])  # a part may be changed where it stands alone
      answers.append(None if ids[0] is None else np.concatenate([*ids, end]).astype(np.int32))
    return answers

  def program(self, ids: Sequence[int]) -> str:
    """The program in what a model wrote."""
    return self.vocabulary.text(ids).strip(' ')

  def _lines(self, lines: Sequence[str]) -> list[np.ndarray]:
    return self.vocabulary.encode([line + '\n' for line in lines])

  def _framed(self, ids: np.ndarray) -> np.ndarray:
    return np.concatenate([self._before, ids, self._after]).astype(np.int32)
