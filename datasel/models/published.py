"""The checkpoints that the papers' authors published on the Hugging Face hub, and the shape that each should have.

A checkpoint's own config.json has the last word when it is loaded; where it differs from what is expected here, the
loader says so.  Names and revisions are the authors'; shapes are their papers'.
"""

import dataclasses
import re

from datasel.models.mistral import Mistral
from datasel.models.presets import PRESETS

# What makes a shape; the vocabulary may have grown by added tokens, and dtype and the like are the user's.
_SHAPE = ('n_layers', 'd_model', 'n_heads', 'n_kv_heads', 'head_dim', 'd_ff', 'gated', 'norm', 'bias', 'tied')


@dataclasses.dataclass(frozen=True)
class Published:
  """Models of one kind.  name: a pattern of hub names.  revisions: a pattern of those that hold weights."""

  name: str
  preset: str
  about: str
  revisions: str = 'main'


PUBLISHED = (
  *(Published(f'Data-Selection/(PDS|BSL)-{size}', f'pds_{preset}', 'PDS: trained on the selection, or on all data')
    for size, preset in (('160M', '160m'), ('470M', '470m'), ('1B', '1b'), ('1.7B', '1_7b'))),
  Published('sail/data-mixture-(human|doremi|pile-cc|regmix)-1b', 'regmix_1b', 'RegMix: a mixture, five seeds',
            'seed-[1-5]'),
  Published('sail/data-mixture-random-1b', 'regmix_1b', 'RegMix: 64 random mixtures', r'model-index-\d+'),
  Published('gair-prox/(web|math)-(doc|chunk)-refining-lm', 'tlm_xs', 'ProX: the refiners'),
  Published('gair-prox/[A-Za-z0-9]+-ProX-0.3B', 'tlm_xs', 'ProX: TLM-XS, pre-trained'),
  Published('gair-prox/[A-Za-z0-9]+-ProX-0.7B', 'tlm_s', 'ProX: TLM-S, pre-trained'),
  Published('gair-prox/[A-Za-z0-9]+-ProX-1.7B', 'tlm_m', 'ProX: TLM-M, pre-trained'),
  Published('gair-prox/TinyLlama-1.1B-ProXMath', 'tinyllama_1_1b', 'ProX: continued on mathematics'),
  Published('gair-prox/(Llama-2|CodeLlama)-7B-ProXMath', 'llama2_7b', 'ProX: continued on mathematics'),
  Published('gair-prox/Mistral-7B-ProXMath', 'mistral_7b', 'ProX: continued on mathematics'),
  Published(r'pangjh3/AnLLM-[\w-]*7B[\w-]*', 'llama2_7b', 'AnLLM: anchors are punctuation or a token'),
  Published(r'pangjh3/AnLLM-[\w-]*13B[\w-]*', 'llama2_13b', 'AnLLM: anchors are punctuation or a token'),
  Published('HuggingFaceTB/SmolLM2-135M(-Instruct)?', 'smollm2_135m', 'a small strong model to start from'),
  Published('HuggingFaceTB/SmolLM2-360M(-Instruct)?', 'smollm2_360m', 'a small strong model to start from'),
  Published('HuggingFaceTB/SmolLM2-1.7B(-Instruct)?', 'smollm2_1_7b', 'a small strong model to start from'),
)


def find(name: str) -> Published | None:
  """The entry of a hub name, if it is one of these models."""
  return next((entry for entry in PUBLISHED if re.fullmatch(entry.name, name)), None)


def check_revision(name: str, revision: str | None) -> None:
  """Raises ValueError where a name holds several models, one a revision, and none is chosen."""
  entry = find(name)
  if entry and entry.revisions != 'main' and revision is None:
    raise ValueError(f'{name} holds several models, one a revision: choose a --revision matching {entry.revisions!r}')


def differences(name: str, model: Mistral) -> list[str]:
  """How a loaded model differs from the shape that its paper gives: ['n_layers is 20, the paper has 24'].  Empty for
  models that are not listed here."""
  entry = find(name)
  if entry is None:
    return []
  paper = PRESETS[entry.preset]
  return [f'{field} is {getattr(model, field)}, the paper has {getattr(paper, field)}' for field in _SHAPE
          if getattr(model, field) != getattr(paper, field)]


def table() -> str:
  """The list, for reading."""
  rows = [('name', 'revisions', 'preset', 'about'), *((e.name, e.revisions, e.preset, e.about) for e in PUBLISHED)]
  widths = [max(len(row[i]) for row in rows) for i in range(3)]
  return '\n'.join('  '.join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[3]]) for row in rows)
