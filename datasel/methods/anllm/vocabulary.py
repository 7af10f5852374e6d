"""A trained model that knows an anchor token besides: one more row of its embedding, and of its output head.

AnLLM's AC, Pang et al. 2024 (arXiv 2402.07616), 4.1.
"""

import dataclasses
import functools
import logging
import pathlib
import tempfile

import jax

from datasel import pretrained, sharding, workdir
from datasel.data import tokenizer as tokenizers
from datasel.data.tokenizer import Tokenizer
from datasel.methods.anllm.anchors import ROWS, punctuation_ids, with_anchor_row


def with_anchor_token(source: pretrained.Source, folder: pathlib.Path, *, how: str, tokenizer: Tokenizer | None = None,
                      mesh: jax.sharding.Mesh | None = None, rules: sharding.Rules = sharding.RULES) -> pathlib.Path:
  """Writes the model as the stage `folder`, with a row for the anchor token and the tokenizer that has it.

  how: the row's first value, 'mean' or 'copy_period' (`with_anchor_row`); a row that the model has to spare after the
  tokenizer's last id is taken, else V grows by one.  tokenizer: the model's own, `with_anchor` (default: with segments
  of any length).  mesh, rules: where the parameters are while they are written; of several processes each calls this.
  A finished stage of the same model, way and tokenizer is left as it is.  Returns the folder.
  ValueError for another tokenizer, a folder that holds something else, or a way that is not known.
  """
  folder, plain = pathlib.Path(folder), source.tokenizer()
  tokenizer = tokenizer or tokenizers.with_anchor(plain)
  if how not in ROWS:
    raise ValueError(f'unknown first value of the anchor row {how!r}; known: {sorted(ROWS)}')
  if tokenizer.anchor_id is None or tokenizer.plain.digest != plain.digest:
    raise ValueError(f'{source.name} and tokenizer {tokenizer.name} do not fit: want that of the model, with an '
                     'anchor, as `python -m datasel.prepare anchor-tokenizer` makes it')
  grown = _grown(source, how, tokenizer)
  made = folder / 'stage.json'
  stated = workdir.read_json(made) if made.is_file() else {}
  if stated.get('source', grown.name) != grown.name or (not stated and folder.exists() and any(folder.iterdir())):
    held = stated.get('source') or 'something else'
    raise ValueError(f'{folder} holds {held}, not {grown.name}; give another folder')
  if stated and stated['tokenizer'] != tokenizer.digest:
    raise ValueError(f'{folder} holds {grown.name} with other anchors; give another folder')
  if not stated.get('finished'):
    logging.info('adding a row for %s to %s', tokenizers.ANCHOR, source.name)
    with tempfile.TemporaryDirectory() as own:
      _write_tokenizer(source, tokenizer, pathlib.Path(own))
      found = dataclasses.replace(grown, tokenizer_folder=pathlib.Path(own))
      pretrained.save_stage(found, found.params(mesh=mesh, rules=rules), folder)
  return folder


def _grown(source: pretrained.Source, how: str, tokenizer: Tokenizer) -> pretrained.Source:
  """The model with the row, but for the folder of its tokenizer."""
  V, anchor_id = source.model.vocab_size, tokenizer.anchor_id
  model = dataclasses.replace(source.model, vocab_size=max(V, anchor_id + 1))
  period_id = punctuation_ids(tokenizer.plain)[0] if how == 'copy_period' else None
  add = functools.partial(with_anchor_row, anchor_id=anchor_id, how=how, period_id=period_id)

  def read(mesh: jax.sharding.Mesh, rules: sharding.Rules, dtype: str) -> dict:
    places = sharding.tree_shardings(mesh, model.abstract(), model.logical_axes(), rules)
    # What V divides by, V + 1 does not: here each device has whole columns.
    params = source.read(mesh, {**rules, 'vocab': None}, dtype)
    return params | {name: {'kernel': jax.jit(add, out_shardings=places[name]['kernel'])(params[name]['kernel'])}
                     for name in ('embed', 'head') if name in params}

  return dataclasses.replace(source, name=f'{source.name} + {tokenizers.ANCHOR} ({how})', model=model, read=read)


def _write_tokenizer(source: pretrained.Source, tokenizer: Tokenizer, folder: pathlib.Path) -> None:
  """The tokenizer, with what else transformers reads of the source's (a chat template, the settings of generation)."""
  tokenizers.copy(source.tokenizer_folder, folder)
  stated = folder / 'tokenizer_config.json'
  theirs = workdir.read_json(stated) if stated.is_file() else {}
  tokenizer.save(folder)
  workdir.write_json(stated, theirs | workdir.read_json(stated))
