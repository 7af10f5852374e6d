"""A trained model as a Hugging Face folder: safetensors, config, tokenizer, generation config.

  python -m datasel.export WORKDIR/main --out FOLDER [--dtype bfloat16] [--max_shard_gb 4]

The source may be anything that datasel.load reads.  transformers, lm-eval, vLLM and llama.cpp open the result.
"""

import argparse
import logging
import math
import os
import pathlib
import shutil
import sys

from datasel import command_line, workdir

# Texts on which transformers must read the exported tokenizer as we do.
_PROBES = ('The quick brown fox.\n\n\tdef f(x):\n    return x**2  # naïve façade, 日本語', ' leading', '12,345.67  8')


def export(source: str, out: str, *, revision: str | None = None, tokenizer: str | None = None,
           dtype: str = 'float32', max_shard_gb: float = 4.0) -> str:
  """Writes SOURCE to the folder `out`, which must not exist; it appears whole.  Returns what was made of it.

  dtype: of the weights.  ValueError for a model that no Hugging Face architecture has, or that is not finite.
  """
  from datasel import pretrained
  from datasel.models import hf
  from datasel.models.tensor_files import Safetensors
  folder = pathlib.Path(out).absolute()
  if dtype not in ('float32', 'bfloat16'):
    raise ValueError(f"--dtype is {dtype!r}; want 'float32' or 'bfloat16'")
  if not 0 < max_shard_gb < math.inf:
    raise ValueError(f'--max_shard_gb is {max_shard_gb}; want a positive number')
  if folder.exists():
    raise ValueError(f'{folder} exists; give another --out, or delete it')
  found = pretrained.find(source, revision=revision, tokenizer=tokenizer)
  tokens = found.tokenizer()
  config = hf.to_config(found.model, max_length=found.max_length, bos_id=tokens.bos_id, eos_id=tokens.eos_id,
                        dtype=dtype)
  if found.model.anchors is not None:
    logging.warning('%s attends by %s; other tools will let each token see all before it', source, found.model.anchors)
  partial = folder.with_name(f'.{folder.name}.partial')
  shutil.rmtree(partial, ignore_errors=True)  # left by a kill
  partial.mkdir(parents=True)
  try:
    _write_tokenizer(found.tokenizer_folder, partial, tokens, found.max_length)  # first, for it may be refused
    hf.save(partial, found.model, found.params(), dtype=dtype, max_shard_bytes=round(max_shard_gb * 1e9))
    Safetensors(partial).verify()
    workdir.write_json(partial / 'config.json', config)
    generation = partial / 'generation_config.json'
    if not generation.exists():  # else it came with the source's tokenizer: several ends, sampling
      workdir.write_json(generation, {'_from_model_config': True, 'bos_token_id': tokens.bos_id,
                                      'eos_token_id': tokens.eos_id, 'use_cache': True})
    os.replace(partial, folder)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return f'{folder}: {config["architectures"][0]}, {found.model.n_params:,} parameters, {dtype}'


def _write_tokenizer(source: pathlib.Path, folder: pathlib.Path, tokens, max_length: int) -> None:
  """The tokenizer's files, completed with what transformers needs to know; checked to be read by it as by us."""
  import transformers

  from datasel.data import tokenizer as tokenizers
  tokens.save(folder)
  stated, probes = folder / 'tokenizer_config.json', list(_PROBES)
  special = workdir.read_json(stated)
  tokenizers.copy(source, folder)
  config = special | workdir.read_json(stated)
  if not (folder / 'tokenizer.json').exists():
    probes += _write_json_form(folder, config['bos_token'] if config.get('add_bos_token') else None)
  # Under the class of a Llama, transformers 5 splits runs of spaces in its own way, whatever tokenizer.json says.
  workdir.write_json(stated, {'model_max_length': max_length, 'clean_up_tokenization_spaces': False} | config
                     | {'tokenizer_class': 'PreTrainedTokenizerFast'})
  theirs = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
  # transformers knows an anchor's token, but puts none between sentences.
  ours = tokens.plain.encode_batch(probes)
  for text, ids, got in zip(probes, ours, theirs(probes, add_special_tokens=False)['input_ids']):
    if got != ids.tolist():
      raise ValueError(f'transformers would read the tokenizer of {source} otherwise: {text!r} is {got} to it, '
                       f'{ids.tolist()} here; give its tokenizer.json with --tokenizer')


def _write_json_form(folder: pathlib.Path, begin: str | None) -> list[str]:
  """tokenizer.json for the sentencepiece BPE that is in `folder`, beginning each text with the token `begin`.

  Returns texts that show whether the two agree: they don't where the model is no BPE, or normalises text.
  """
  import sentencepiece
  import tokenizers
  from tokenizers import decoders, models, normalizers, processors
  model = sentencepiece.SentencePieceProcessor(model_file=str(folder / 'tokenizer.model'))
  pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
  ids = {piece: i for i, piece in enumerate(pieces)}
  control = [piece for i, piece in enumerate(pieces) if model.is_control(i) or model.is_unknown(i)]
  plain = {piece for i, piece in enumerate(pieces) if not (model.is_byte(i) or model.is_unused(i))} - {*control}
  # Of equal scores sentencepiece merges the leftmost pair, so the one whose left part has grown longest.
  ranked = sorted((-model.get_score(ids[piece]), -n, piece[:n], piece[n:]) for piece in plain
                  for n in range(1, len(piece)) if piece[:n] in plain and piece[n:] in plain)
  backend = tokenizers.Tokenizer(models.BPE(
    vocab=ids, merges=[(left, right) for *_, left, right in ranked], unk_token=pieces[model.unk_id()], fuse_unk=True,
    byte_fallback=any(map(model.is_byte, range(len(pieces))))))
  backend.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
  backend.decoder = decoders.Sequence([
    decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
  backend.add_special_tokens(control)
  if begin is not None:
    backend.post_processor = processors.TemplateProcessing(single=[begin, '$A'], special_tokens=[(begin, ids[begin])])
  with workdir.replacing(folder / 'tokenizer.json') as f:
    f.write(backend.to_str().encode())
  return ['ﬁ Ａ', *(piece.replace('▁', ' ') for piece in sorted(plain))]


def main(argv: list[str]) -> None:
  """The command line."""
  command_line.log_to_stderr('%(message)s')
  parser = argparse.ArgumentParser('datasel.export', description='Writes a model as a Hugging Face folder.')
  parser.add_argument('source', help='a stage of a run (WORKDIR/main), or anything that datasel.load reads')
  parser.add_argument('--out', required=True, help='the folder to write')
  parser.add_argument('--revision', help='branch, tag or commit, of a source on the hub')
  parser.add_argument('--tokenizer', help="folder, tokenizer.json or tokenizer.model, instead of the model's own")
  parser.add_argument('--dtype', default='float32', help='float32 or bfloat16')
  parser.add_argument('--max_shard_gb', type=float, default=4.0, help='size of a safetensors file, at most')
  options = vars(parser.parse_args(argv))
  try:
    print(export(options.pop('source'), **options))
  except (ValueError, OSError, ImportError) as e:
    sys.exit(f'datasel.export: {e}')


if __name__ == '__main__':
  main(sys.argv[1:])
