r"""RegMix end to end on a laptop: 64 proxies on mixtures of ten domains of real text (Liu et al. 2024).

Expects:   nothing: it fetches its text.
Command:   python -m datasel.main --config=configs/regmix/demo.py --workdir=runs/regmix-demo
Hardware:  made for 2 CPU cores.  Not yet run at this size.
Outcome:   predicted against true losses of proxies that the regression has not seen, the mixture it proposes for word
           problems, code and the wiki together, and whether a model trained on it beats the baselines.
"""

from datasel import config as config_lib


def get_config(arg: str = ''):
  config = config_lib.base('regmix')
  config.data.demo = 'lean'
  config.data.length = 128

  config.model = config_lib.model('laptop')
  config.train.steps = 240
  config.train.batch_size = 16
  config.train.checkpoint_every = 60
  config.train.eval_every = 120
  config.train.eval_sequences = 32
  config.optimizer.peak_lr = 6e-3
  config.optimizer.end_lr = 6e-4

  config.regmix = config_lib.regmix()
  config.regmix.target = 'math,code,wiki'
  config.regmix.model = config_lib.model('laptop_small')
  config.regmix.proxies, config.regmix.held_out = 64, 16
  config.regmix.steps, config.regmix.batch_size = 60, 8
  config.regmix.optimizer.peak_lr = 1e-2
  config.regmix.max_epochs = 4.0
  return config_lib.finish(config, arg)
