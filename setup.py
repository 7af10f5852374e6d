"""datasel: `pip install -e .[demo]`.  The core install and the core import stay free of TensorFlow and torch."""

import pathlib

import setuptools

HERE = pathlib.Path(__file__).parent

CORE = [
  'absl-py>=2.1',
  'array_record>=0.8',
  'flax>=0.12.8,<0.13',
  'grain>=0.2.18',
  'huggingface_hub>=0.30',
  'jax>=0.10.2,<0.12',
  'matplotlib>=3.9',
  'ml_collections>=1.1',
  'ml_dtypes>=0.4',
  'numpy>=2.0',
  'optax>=0.2.8',
  'orbax-checkpoint>=0.12,<0.13',
  'pyarrow>=17',
  'pyyaml>=6',
  'safetensors>=0.5',
  'scipy>=1.12',
  'sentencepiece>=0.2.1',
  'tensorboardX>=2.6',
  'threadpoolctl>=3.5',
  'tokenizers>=0.21',
  'transformers>=5.0',
]

EXTRAS = {
  'cuda': ['jax[cuda13]>=0.10.2,<0.12'],
  'tpu': ['jax[tpu]>=0.10.2,<0.12'],
  'seqio': ['seqio>=0.0.20', 'apache-beam>=2.60', 'google-crc32c>=1.5', 'importlib_resources>=6',
            'sentencepiece>=0.2.1,<0.2.3', 'tensorflow>=2.18'],
  'eval': ['datasets>=4', 'lm-eval>=0.4.13', 'tqdm>=4'],
  'track': ['tensorboard>=2.20', 'trackio>=0.43', 'wandb>=0.31', 'xprof>=2.24'],
  'bench': ['torch>=2.5'],  # the peer of `datasel.bench step`, `attention` and `generate`
  'demo': ['gguf>=0.17', 'unearth>=0.17'],
  # Some versions that jusText, a part of trafilatura, is satisfied with do not bring lxml_html_clean.
  'prox': ['datasketch>=2.0', 'lxml_html_clean>=0.4', 'openai>=2', 'trafilatura>=2.0'],
  'regmix': ['lightgbm>=4.6'],
  'test': ['accelerate>=1.0', 'pytest>=8', 'pytest-xdist>=3.6', 'ruff>=0.9',
           'torch>=2.5,<2.14',  # later wheels bring several GB of CUDA libraries
           'zstandard>=0.22'],
  'dev': ['jupyterlab>=4'],
}
# Our tests hold everything against the real thing: transformers, lm-eval, LightGBM, seqio, Beam, the trackers.
EXTRAS['test'] += [one for name in ('demo', 'eval', 'prox', 'regmix', 'seqio', 'track') for one in EXTRAS[name]]
EXTRAS['dev'] += EXTRAS['test']
EXTRAS['all'] = EXTRAS['dev']

setuptools.setup(
  name='datasel',
  version='0.1.0',
  description='Choosing what language models are pre-trained on: data-selection systems on one JAX train step',
  long_description=(HERE / 'README.md').read_text(encoding='utf-8') if (HERE / 'README.md').exists() else '',
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.11',
  packages=setuptools.find_packages(include=['datasel', 'datasel.*']),
  package_data={'datasel': ['py.typed']},
  install_requires=CORE,
  extras_require=EXTRAS,
)
