"""A published checkpoint, as a starting point of runs.

  python -m datasel.load SOURCE --out DIR [--revision R] [--tokenizer T]
  python -m datasel.load --list

SOURCE: a name of the Hugging Face hub, a folder, a .gguf file, or demo:smollm2.  DIR becomes a stage as training leaves
them: its parameters sharded and with digests, its tokenizer.  Continue it with
`python -m datasel.main --config=configs/pretrain/continued.py:DIR ...`.
"""

import argparse
import logging
import pathlib
import sys

from datasel import command_line, workdir


def load(source: str, out: str, *, revision: str | None = None, tokenizer: str | None = None) -> str:
  """Writes SOURCE as the stage `out`; a finished one of the same source is left as it is.  Returns what to do next.

  The parameters are float32, spread over all devices by their width where it divides, and read part by part.
  ValueError for what can't be read, or an `out` that holds something else.
  """
  import jax

  from datasel import pretrained, sharding
  folder = pathlib.Path(out).absolute()
  found = pretrained.find(pathlib.Path(source).absolute() if pathlib.Path(source).exists() else source,
                          revision=revision, tokenizer=tokenizer)
  made = folder / 'stage.json'
  stated = workdir.read_json(made) if made.is_file() else {}
  if stated and stated.get('source') != found.name or (not stated and folder.exists() and any(folder.iterdir())):
    raise ValueError(f'{folder} holds {stated.get("source") or "something else"}; give another --out')
  if stated and stated['tokenizer'] != found.tokenizer().digest:
    raise ValueError(f'{folder} holds {found.name} with another tokenizer; give another --out')
  if not stated.get('finished'):
    devices = len(jax.devices())
    mesh = sharding.make_mesh(fsdp=devices if found.model.d_model % devices == 0 else 1,
                              data=1 if found.model.d_model % devices == 0 else devices)
    logging.info('reading %s: %s parameters', found.name, f'{found.model.n_params:,}')
    pretrained.save_stage(found, found.params(mesh=mesh), folder)
  return (f'{folder}: {found.model.n_params:,} parameters, {found.model.vocab_size:,} tokens, trained on '
          f'{found.max_length:,} positions\n'
          f'continue it: python -m datasel.main --config=configs/pretrain/continued.py:{folder} --workdir=WORKDIR\n'
          f'its tokenizer, for a token store: {folder / "tokenizer"}')


def main(argv: list[str]) -> None:
  """The command line."""
  command_line.log_to_stderr('%(message)s')
  parser = argparse.ArgumentParser('datasel.load', description='Makes a published checkpoint a starting point of runs.')
  parser.add_argument('source', nargs='?', help='hub name, folder, .gguf file, or demo:smollm2')
  parser.add_argument('--out', help='the folder to write, for train.init_from')
  parser.add_argument('--revision', help='branch, tag or commit of the hub')
  parser.add_argument('--tokenizer', help="folder, tokenizer.json or tokenizer.model, instead of the model's own")
  parser.add_argument('--list', action='store_true', help="list the papers' published checkpoints")
  options = parser.parse_args(argv)
  if options.list:
    from datasel.models import published
    print(published.table())
    return
  if not (options.source and options.out):
    parser.error('SOURCE and --out are both needed')
  try:
    print(load(options.source, options.out, revision=options.revision, tokenizer=options.tokenizer))
  except (ValueError, OSError, ImportError) as e:
    sys.exit(f'datasel.load: {e}')


if __name__ == '__main__':
  main(sys.argv[1:])
