r"""DoReMi end to end on a laptop: ten domains of real text, reference, proxy, and two main models (Xie et al. 2023).

Command:   bash launch/local.sh
Hardware:  2 CPU cores, 4 GB of memory; under 12 minutes.
Outcome:   tuned weights, and whether they beat the corpus's own proportions at this size; see README.md.
"""

from datasel import config as config_lib


def get_config(arg: str = ''):
  config = config_lib.base('doremi')
  config.data.demo = 'lean'
  config.data.length = 128

  # The main model, trained twice: on the baseline's and on the tuned weights.
  config.model = config_lib.model('laptop')
  config.train.steps = 360
  config.train.batch_size = 16
  config.train.checkpoint_every = 60
  config.train.eval_every = 90
  config.train.eval_sequences = 48
  config.optimizer.peak_lr = 6e-3
  config.optimizer.end_lr = 6e-4
  config.optimizer.schedule = 'exponential'

  config.doremi = config_lib.doremi()
  config.doremi.model = config_lib.model('laptop_small')
  config.doremi.steps = 280
  config.doremi.batch_size = 20  # two sequences of each domain
  return config_lib.finish(config, arg)
