r"""Pre-training that continues a published model: its shape, its parameters, its tokenizer.

Expects:   a folder that `python -m datasel.load SOURCE --out DIR` made (or the stage of another run).
Command:   python -m datasel.load demo:smollm2 --out smollm2
           python -m datasel.main --config=configs/pretrain/continued.py:smollm2 --workdir=runs/continued
             --config.data.demo=offline --config.train.steps=20
Hardware:  SmolLM2-135M at these sizes: about 20 s a step on 2 CPU cores.
Paper:     none; the settings are mild ones for a model whose training had ended.
"""

import pathlib

from datasel import config as config_lib


def get_config(arg: str = ''):
  config = config_lib.base('pretrain')
  config.pretrain = config_lib.pretrain()
  config.data.length = 512
  config.train.steps = 200
  config.train.batch_size = 8
  config.train.log_every = 1
  config.train.eval_every = 50
  config.train.eval_sequences = 8
  config.optimizer.peak_lr = 2e-5
  config.optimizer.end_lr = 2e-6
  config.optimizer.schedule = 'cosine'
  config.optimizer.warmup_fraction = 0.1
  config.model = config_lib.model('smollm2_135m')
  if arg not in ('', 'smoke'):
    folder = pathlib.Path(arg).absolute()
    config.model = config_lib.model(str(folder))
    config.train.init_from = str(folder / 'checkpoints')
    config.data.tokenizer = str(folder / 'tokenizer')
    arg = ''
  return config_lib.finish(config, arg)
