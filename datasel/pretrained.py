"""A trained model, wherever it lies: a stage of a run, a Hugging Face folder or name, a GGUF file, a packaged demo."""

import dataclasses
import logging
import os
import pathlib
import shutil
from collections.abc import Callable

import jax
import jax.numpy as jnp

from datasel import processes, sharding, workdir
from datasel.checkpoint import Checkpoints
from datasel.data import demo_models
from datasel.data import tokenizer as tokenizers
from datasel.data.demo_archives import Unavailable, cache_folder
from datasel.models import hf, published
from datasel.models.gguf_files import Gguf
from datasel.models.mistral import Mistral
from datasel.models.tensor_files import Safetensors
from datasel.step import State

DEMOS = {'demo:smollm2': demo_models.smollm2}


@dataclasses.dataclass(frozen=True)
class Source:
  """A model that was found and whose shape is known, before any parameter is read.

  tokenizer_folder: what `data.tokenizer.load` and transformers read.  max_length: positions it was trained on.
  read: (mesh, rules, dtype) -> parameters.
  """

  name: str
  model: Mistral
  tokenizer_folder: pathlib.Path
  max_length: int
  read: Callable[[jax.sharding.Mesh, sharding.Rules, str], dict]

  def params(self, *, mesh: jax.sharding.Mesh | None = None, rules: sharding.Rules = sharding.RULES,
             dtype: str = 'float32') -> dict:
    """The parameters, born on `mesh` (default: one device); dtype 'float32', or 'bfloat16' to evaluate in half the
    memory.  ValueError names the tensor that is missing, damaged or of another shape."""
    return self.read(sharding.make_mesh(devices=jax.local_devices()[:1]) if mesh is None else mesh, rules, dtype)

  def tokenizer(self) -> tokenizers.Tokenizer:
    return tokenizers.load(self.tokenizer_folder)


def find(source: str | os.PathLike, *, revision: str | None = None,
         tokenizer: str | os.PathLike | None = None) -> Source:
  """Finds a model; downloads it where it is one of the Hugging Face hub.

  source: a stage of a run (WORKDIR/main), a folder that `datasel.load` or `datasel.export` made or any other Hugging
  Face folder, a .gguf file, 'demo:smollm2', or a name of the hub.  revision: of the hub.  tokenizer: a file or folder
  to take instead of the model's own.  ValueError says what is not there or not supported.
  """
  path = pathlib.Path(source)
  own = None if tokenizer is None else _tokenizer_folder(pathlib.Path(tokenizer))
  if revision is not None and (path.exists() or str(source) in DEMOS):
    raise ValueError(f'{source} is no name of the hub: it has no revision {revision!r}')
  if str(source) in DEMOS:
    try:
      path = DEMOS[str(source)]()
    except Unavailable as e:
      raise ValueError(f'{source} cannot be had here: {e}') from e
  if path.is_file() and path.suffix == '.gguf':
    found = _gguf(path, str(source), own)
  elif (path / 'stage.json').is_file():
    found = _stage(path, own)
  elif (path / 'config.json').is_file() and 'method' in workdir.read_json(path / 'config.json'):
    stages = sorted(p.parent.name for p in path.glob('*/stage.json'))
    raise ValueError(f'{path} is a whole run; name one of its models: {", ".join(str(path / s) for s in stages)}')
  elif str(source).startswith('demo:') and str(source) not in DEMOS:
    raise ValueError(f'{source} is not packaged; there is {", ".join(DEMOS)}')
  elif path.exists():
    found = _hugging_face(path, str(source), own)
  else:
    published.check_revision(str(source), revision)
    found = _hugging_face(hf.fetch(str(source), revision), f'{source}@{revision}' if revision else str(source), own)
    for difference in published.differences(str(source), found.model):
      logging.warning('%s: %s', source, difference)
  try:
    size = found.tokenizer().vocab_size
  except ValueError as e:
    raise ValueError(f'{source} has no tokenizer that can be read; give its own with --tokenizer: {e}') from e
  if size > found.model.vocab_size:
    raise ValueError(f'{source}: its tokenizer has {size} ids, but the model '
                     f'{found.model.vocab_size}; give its own with --tokenizer')
  return found


def tokenizer_path(name: str) -> str | pathlib.Path:
  """What `tokenizer.load` is to read for `name`: a demo model's own tokenizer, else just that."""
  return find(name).tokenizer_folder if name in DEMOS else name


def _tokenizer_folder(given: pathlib.Path) -> pathlib.Path:
  if given.is_dir():
    return given
  if given.name == 'tokenizer.model' and (given.parent / 'tokenizer.json').is_file():
    raise ValueError(f'tokenizer {given}: tokenizer.json beside it would be read; move one of them to its own folder')
  if given.is_file() and given.name in ('tokenizer.json', 'tokenizer.model'):
    return given.parent
  raise ValueError(f'tokenizer {given}: want a folder, or a file tokenizer.json or tokenizer.model in one')


def _hugging_face(folder: pathlib.Path, name: str, tokenizer: pathlib.Path | None) -> Source:
  config = hf.read_config(folder)
  model, tensors = hf.from_config(config), Safetensors(folder)
  return Source(name, model, tokenizer or folder, config['max_position_embeddings'],
                lambda mesh, rules, dtype: hf.load(tensors, model, mesh=mesh, rules=rules, dtype=dtype))


def _gguf(path: pathlib.Path, name: str, tokenizer: pathlib.Path | None) -> Source:
  tensors = Gguf(path)
  model = tensors.model()
  if tokenizer is None:
    vocabulary = workdir.digest(tensors.field('tokenizer.ggml.tokens'))
    tokenizer = cache_folder() / 'tokenizers' / f'{path.stem}-{vocabulary[:12]}'
    if not (tokenizer / 'tokenizer_config.json').exists():
      tensors.write_tokenizer(tokenizer)
  return Source(name, model, tokenizer, tensors.field('llama.context_length'),
                lambda mesh, rules, dtype: hf.load(tensors, model, mesh=mesh, rules=rules, dtype=dtype))


def _stage(folder: pathlib.Path, tokenizer: pathlib.Path | None) -> Source:
  """A model that this code trained or loaded: the newest whole checkpoint of a stage."""
  stage, run = workdir.read_json(folder / 'stage.json'), folder.parent
  if missing := {'model', 'tokenizer', 'max_length'} - stage.keys():
    raise ValueError(f'{folder / "stage.json"} says nothing of {", ".join(sorted(missing))}: it is no trained model')
  model = Mistral(**stage['model'])
  kept = tokenizer or next((f / 'tokenizer' for f in (folder, run) if (f / 'tokenizer').is_dir()), None)

  def read(mesh, rules, dtype):
    places = sharding.tree_shardings(mesh, model.abstract(), model.logical_axes(), rules)
    wanted = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), model.abstract(), places)
    with Checkpoints(folder / 'checkpoints', keep=2) as checkpoints:
      params = checkpoints.restore_params(wanted)
    return params if dtype == 'float32' else jax.jit(
      lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree), donate_argnums=0, out_shardings=places)(params)

  if kept is None:
    raise ValueError(f'{run} holds no tokenizer; name the one that it was trained with (--tokenizer): its '
                     'folder, or the token store')
  if tokenizers.load(kept).digest != stage['tokenizer']:
    raise ValueError(f'{kept} is not the tokenizer that {folder} was trained with')
  return Source(str(folder), model, kept, stage['max_length'], read)


def save_stage(found: Source, params: dict, folder: pathlib.Path) -> None:
  """Writes a model as a stage that runs can start from (`init_from`): FOLDER/{stage.json,checkpoints,tokenizer}.

  Of several processes each calls it, with the parameters spread over all of them.
  """
  tokenizer = found.tokenizer()
  identity = {'stage': folder.name, 'source': found.name, 'model': dataclasses.asdict(found.model),
              'n_params': found.model.n_params, 'tokenizer': tokenizer.digest, 'max_length': found.max_length}

  def begin() -> None:
    workdir.write_json(folder / 'stage.json', identity | {'finished': False})
    shutil.rmtree(folder / 'checkpoints', ignore_errors=True)  # left by a kill
    tokenizers.copy(found.tokenizer_folder, folder / 'tokenizer')

  processes.from_lead(f'beginning {folder}', begin)
  with Checkpoints(folder / 'checkpoints', keep=2) as checkpoints:
    checkpoints.save(0, State(step=jnp.zeros((), jnp.int32), params=params, opt_state=(), aux=()), {})
    checkpoints.wait()
  processes.from_lead(f'finishing {folder}',
                      lambda: workdir.write_json(folder / 'stage.json', identity | {'finished': True}))

