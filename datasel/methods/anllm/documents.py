"""Some real documents as each arm sees them: their anchors, and the cache while they are read."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from datasel.attention import anchors
from datasel.data.store import Store
from datasel.data.tokenizer import Tokenizer
from datasel.methods.anllm import usage
from datasel.methods.anllm.cache import Room, slot_bytes
from datasel.models.mistral import Mistral

_DOCUMENTS, _READ = 3, 16  # how many are shown, of different domains; records of a domain that are looked through


def choose(store: Store, tokenizer: Tokenizer) -> dict[str, str]:
  """{'wiki/3': text}: of some domains, the held-out record with the longest piece of one document, and that piece."""
  shown = {}
  for domain in np.argsort(-store.sizes('validation'), kind='stable')[:_DOCUMENTS].tolist():
    record_B = np.arange(min(int(store.sizes('validation')[domain]), _READ))
    batch = store.read('validation', np.full(len(record_B), domain), record_B)
    lengths_BxS = np.stack([np.bincount(row, minlength=batch['segment_BxL'].max() + 1)[1:]
                            for row in batch['segment_BxL']])
    row, segment = np.unravel_index(np.argmax(lengths_BxS), lengths_BxS.shape)
    tokens = batch['tokens_BxL'][row][batch['segment_BxL'][row] == segment + 1]
    special = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
    [name] = store.names([domain], [record_B[row]])
    shown[name] = tokenizer.decode(tokens[~np.isin(tokens, special)])
  return shown


def describe(shown: Mapping[str, str], models: Mapping[str, Mistral],
             tokenizers: Mapping[str, Tokenizer]) -> list[dict[str, Any]]:
  """[{'name', 'arms': {arm: `usage.document` with 'tokens', the spelling of its ids}}], of arms with anchors."""
  def of(arm: str, model: Mistral, text: str) -> dict[str, Any]:
    found = usage.document(_encode(tokenizers[arm], text), model.anchors, keep_bos=model.keep_bos)
    return found | {'tokens': [tokenizers[arm].decode([i], show_anchors=True) for i in found.pop('ids')]}

  return [{'name': name, 'arms': {arm: of(arm, model, text) for arm, model in models.items() if model.anchors}}
          for name, text in shown.items()]


def saved(shown: Mapping[str, str], models: Mapping[str, Mistral],
          tokenizers: Mapping[str, Tokenizer]) -> dict[str, dict[str, float]]:
  """{arm: `usage.reduction` over these documents, 'allocated_bytes', 'full_bytes'}, of arms with anchors.

  Each document is read alone, into buffers of no more slots than it needs; a full cache has one for each token.
  """
  found = {}
  for arm, model in models.items():
    if model.anchors is None:
      continue
    live, allocated, full = [], 0, 0
    for text in shown.values():
      tokens = _encode(tokenizers[arm], text)
      live.append(usage.live(*_flags(model, tokens)))
      allocated += _room(model, tokens).nbytes(model, 1)
      full += len(tokens) * slot_bytes(model)
    found[arm] = usage.reduction(live, allocated_bytes=allocated, full_bytes=full) | {
      'allocated_bytes': allocated, 'full_bytes': full}
  return found


def _encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
  [tokens] = tokenizer.encode_batch([text])
  return tokens if tokenizer.bos_id is None else np.concatenate([[tokenizer.bos_id], tokens]).astype(np.int32)


def _flags(model: Mistral, tokens_L: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """bool L: the anchors, and what is protected."""
  anchor_L = anchors.flags(tokens_L[None], model.anchors)[0][0]
  return anchor_L, (np.arange(len(tokens_L)) == 0) & model.keep_bos


def _room(model: Mistral, tokens_L: np.ndarray) -> Room:
  """The slots that reading this document token by token needs."""
  anchor_L, protected_L = _flags(model, tokens_L)
  live_L = usage.live(anchor_L, protected_L)
  bare = int((anchor_L & ~protected_L).sum())
  kept_L = np.cumsum(anchor_L | protected_L)
  return Room(int(protected_L.sum()), bare, int((live_L - kept_L).max()) if len(live_L) else 0)
