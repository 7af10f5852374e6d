r"""Anchors from the first step on, at the size of a laptop: one model and one text with full attention, with periods as
anchors, also such that see one another, with an anchor token, and with an anchor every 32 tokens.

Expects:   nothing: it fetches its text.
Command:   python -m datasel.main --config=configs/anllm/laptop_scratch.py --workdir=runs/anllm-scratch
Hardware:  2 CPU cores, 4 GB of memory.
Outcome:   to be measured.
"""

from datasel import config as config_lib


def get_config(arg: str = ''):
  config = config_lib.base('anllm')
  config.data.demo = 'lean'
  config.data.length = 512

  config.model = config_lib.model('laptop')
  config.train.steps, config.train.batch_size = 240, 8
  config.train.checkpoint_every, config.train.eval_every, config.train.eval_sequences = 60, 60, 16
  config.optimizer.peak_lr, config.optimizer.end_lr = 6e-3, 6e-4

  config.anllm = config_lib.anllm()
  config.anllm.arms = 'full,ep,ep-sees,ac,fixed'
  config.anllm.contexts, config.anllm.context_sequences = '64,128,256,512', 64
  return config_lib.finish(config, arg)
