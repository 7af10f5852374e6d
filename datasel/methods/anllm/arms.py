"""The arms of a run: one model each, which differ by what a token sees.

  full     all before it
  ep       its own segment and the anchors before; a period closes a segment (the paper's EP)
  ac       a token of its own closes it, put between sentences (the paper's AC)
  fixed    every k-th token does
  NAME-sees, NAME-bos, NAME-sees-bos    anchors see earlier anchors; all see the document's first token
"""

import dataclasses

import ml_collections

from datasel.data.anchors import Rule, punctuation_ids
from datasel.data.tokenizer import Tokenizer
from datasel.models.mistral import Mistral

KINDS = ('full', 'ep', 'ac', 'fixed')
_SWITCHES = {'sees': 'anchor_sees_anchors', 'bos': 'keep_bos'}


@dataclasses.dataclass(frozen=True)
class Arm:
  """kind: of KINDS.  switches: the fields of a model that are True."""

  name: str
  kind: str
  switches: tuple[str, ...] = ()

  def model(self, base: Mistral, section: ml_collections.ConfigDict, tokenizer: Tokenizer) -> Mistral:
    """`base` with this arm's anchors.  tokenizer: of the store that the arm reads; 'ac' wants one with anchors."""
    if self.kind == 'full':
      return base
    length = {'min_length': section.min_length, 'max_length': section.max_length or None}
    if self.kind == 'ep':
      rule = Rule(punctuation_ids(tokenizer, section.symbols), **length)
    elif self.kind == 'ac':
      rule = tokenizer.anchors
      base = dataclasses.replace(base, vocab_size=max(base.vocab_size, tokenizer.vocab_size))
    else:
      rule = Rule(max_length=section.fixed_length)
    return dataclasses.replace(base, anchors=rule, **dict.fromkeys(self.switches, True))


def parse(names: str) -> list[Arm]:
  """'full,ep-sees' -> the arms.  ValueError for a name that is none, and for one named twice."""
  found = []
  for name in (part.strip() for part in names.split(',')):
    kind, *switches = name.split('-')
    if kind not in KINDS or set(switches) - set(_SWITCHES) or len(set(switches)) < len(switches) or (
        kind == 'full' and switches):
      raise ValueError(f'config.anllm.arms {names!r}: {name!r} is no arm; want of {", ".join(KINDS)}, all but '
                       'full also with -sees, -bos or -sees-bos behind it')
    found.append(Arm(name, kind, tuple(_SWITCHES[switch] for switch in switches)))
  if len({(arm.kind, frozenset(arm.switches)) for arm in found}) < len(found):
    raise ValueError(f'config.anllm.arms {names!r} names one twice')
  return found
