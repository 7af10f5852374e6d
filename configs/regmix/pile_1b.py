r"""The 1B models of RegMix (2407.01492): 26.2B tokens by human, DoReMi's or RegMix's weights, or of Pile-CC alone.

Expects:   a token store of the Pile's 17 copyright-free domains, named as in configs/regmix/mixtures, GPT-NeoX's
           tokenizer, sequences of 2,048 tokens.
Command:   python -m datasel.main --config=configs/regmix/pile_1b.py --workdir=DIR --config.data.store=STORE
             --config.pretrain.mixture=configs/regmix/mixtures/human.yaml
           or doremi.yaml, regmix.yaml (the default), pile_cc_only.yaml, each with five seeds (--config.seed).
Hardware:  paper: 8 A100 for two days.  Cost by formula: 2.1e+20 FLOPs.
Paper:     section 4.  Not yet run with this code.
"""

import pathlib

from datasel import config as config_lib


def get_config(arg: str = ''):
  config = config_lib.base('pretrain')
  config.pretrain = config_lib.pretrain()
  config.pretrain.mixture = str(pathlib.Path(__file__).parent / 'mixtures' / 'regmix.yaml')
  config.data.length = 2048
  config.data.block = 2**20  # RegMix's weights go down to 3e-6
  config.model = config_lib.model('regmix_1b')
  config.train.steps, config.train.batch_size, config.train.microbatches = 25_000, 512, 4
  config.train.log_every, config.train.checkpoint_every = 50, 500
  config.train.eval_every, config.train.eval_sequences = 2500, 800
  config.optimizer = config_lib.regmix_1b_optimizer()
  return config_lib.finish(config, arg)
