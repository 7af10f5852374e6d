r"""Iterated DoReMi, as the paper runs it on the GLaM data: from uniform weights until they stand still (section 2).

Expects:   a token store of GLaM's 8 domains, SentencePiece vocabulary of 256k; other corpora work alike.
Command:   python -m datasel.main --config=configs/doremi/glam_rounds.py --workdir=DIR --config.data.store=STORE
Hardware:  paper: TPU v3.  Cost by formula: 2.7e20 FLOPs each for the reference and the proxy of a round (280M, 300k
           steps).
Paper:     three rounds, stopping when no weight moves by 1e-3; filtered web .51, conversations .22, books .17,
           Wikipedia .05, forums .04, news .02.  Not yet run with this code.
"""

from datasel import config as config_lib


def get_config(arg: str = ''):
  config = config_lib.base('doremi')
  config.model = config_lib.model('doremi_8b')
  config.train.steps = 300_000
  config.train.batch_size = 512
  config.train.log_every = 100
  config.train.checkpoint_every = 1000
  config.train.eval_every = 5000
  config.train.eval_sequences = 512

  config.optimizer.name = 'adafactor'
  config.optimizer.peak_lr = 1e-3
  config.optimizer.end_lr = 1e-4
  config.optimizer.schedule = 'exponential'
  config.optimizer.warmup_fraction = 0.06
  config.optimizer.weight_decay = 1e-2

  config.doremi = config_lib.doremi()
  config.doremi.model = config_lib.model('doremi_280m')
  config.doremi.steps = 300_000
  config.doremi.batch_size = 512
  config.doremi.baseline = 'uniform'
  config.doremi.rounds = 5
  config.doremi.tolerance = 1e-3
  config.doremi.train_main = False  # the weights are the result; train on them with configs/pretrain/
  return config_lib.finish(config, arg)
