r"""Anchors from the first step on, at the size of a laptop: one model and one text with full attention, with periods as
anchors, with such as see one another, and with an anchor token.

Expects:   nothing: it fetches its text.
Command:   python -m datasel.main --config=configs/anllm/laptop_scratch.py --workdir=runs/anllm-scratch
Hardware:  2 CPU cores, 4 GB of memory; about 10 minutes an arm with other programs at work beside it.
Outcome:   held-out bits per byte, mean of ten domains: full attention 2.854, periods 2.911, periods that see one
           another 2.900, an anchor token 2.807. With 64 tokens of context 2.870, 2.908, 2.891, 2.805; with 512 2.819,
           2.881, 2.869, 2.774.  One seed, 1M tokens read by 1.3M parameters: anchors have little yet to sum up.
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
  config.anllm.arms = 'full,ep,ep-sees,ac'
  config.anllm.contexts, config.anllm.context_sequences = '64,128,256,512', 64
  return config_lib.finish(config, arg)
