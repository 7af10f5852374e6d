r"""RegMix as published (2407.01492): 512 proxies of 1M non-embedding parameters on 17 domains of the Pile, 1.05B tokens
each, a regression of the loss on Pile-CC, and a 1B model on what it proposes, on the prior and on Pile-CC alone.

Expects:   a token store of the Pile's 17 copyright-free domains, named as in configs/regmix/mixtures, GPT-NeoX's
           tokenizer, sequences of 2,048 tokens.
Command:   python -m datasel.main --config=configs/regmix/pile_1m.py --workdir=DIR --config.data.store=STORE
Hardware:  paper: one A100 for 20 minutes a proxy.  Cost by formula, output head and attention counted: 4.9e+19
           FLOPs for the proxies (3.5e+18 in the paper, which leaves the head out) and 2.1e+20 for each 1B model.
Paper:     sections 3 and 4 and the authors' scripts.  Their proposal is the mean of the best 100 of a million draws
           (`search`); their regression is LightGBM, ours is chosen by cross-validation.  Not yet run with this code.
"""

from datasel import config as config_lib


def get_config(arg: str = ''):
  config = config_lib.base('regmix')
  config.data.length = 2048
  config.model = config_lib.model('regmix_1b')
  config.train.steps, config.train.batch_size = 25_000, 512
  config.train.log_every, config.train.checkpoint_every = 50, 500
  config.train.eval_every, config.train.eval_sequences = 2500, 800
  config.optimizer = config_lib.regmix_1b_optimizer()

  config.regmix = config_lib.regmix()
  config.regmix.model = config_lib.model('regmix_1m')
  config.regmix.target = 'the_pile_pile_cc'
  config.regmix.held_out = 64
  config.regmix.microbatches = 32  # of 16 sequences, as theirs
  config.regmix.search = 'simulate'
  config.train.microbatches = 4
  return config_lib.finish(config, arg)
