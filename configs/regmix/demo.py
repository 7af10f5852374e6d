r"""RegMix end to end on a laptop: 64 proxies on mixtures of ten domains of real text (Liu et al. 2024).

Expects:   nothing: it fetches its text.
Command:   python -m datasel.main --config=configs/regmix/demo.py --workdir=runs/regmix-demo
Hardware:  2 CPU cores, 4 GB of memory; 13 minutes with some other work beside it.
Outcome:   Spearman 0.81 to 0.99 on 16 proxies that the regression has not seen; 54% math, 30% code and 15% wiki are
           proposed.  Trained on that, the mean loss on these three is 5.287 nats/token: 5.772 on the prior, 5.654 on
           uniform weights, 6.725 on the best single domain; over all ten domains it is 6.245 against the prior's 5.754.
           One seed.
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
