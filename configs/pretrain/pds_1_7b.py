r"""Pre-training a 1.7B Mistral as the PDS paper does (2410.07064): 100k steps of 512 x 1,024 tokens, 52.4B in all.

Expects:   a token store, Mistral's tokenizer (32,000), sequences of 1,024 tokens.
Command:   python -m datasel.main --config=configs/pretrain/pds_1_7b.py --workdir=DIR --config.data.store=STORE
             --config.pretrain.mixture=mixture.json
Hardware:  paper: 16 GPUs.  Cost by formula: 5.4e+20 FLOPs.  The paper gives no script for this size;
           its peak rate here follows the others.
Paper:     the conventional baseline and the PDS-selected run differ in config.data.selection alone.
           Not yet run with this code.
"""

from datasel import config as config_lib


def get_config(arg: str = ''):
  config = config_lib.base('pretrain')
  config.pretrain = config_lib.pretrain()
  config.model = config_lib.model('pds_1_7b')
  config.train.steps = 100_000
  config.train.batch_size = 512
  config.train.log_every = 50
  config.train.checkpoint_every = 1000
  config.train.eval_every = 5000
  config.train.eval_sequences = 512

  config.optimizer.peak_lr = 2e-4
  config.optimizer.end_lr = 2e-5
  config.optimizer.schedule = 'cosine'
  config.optimizer.warmup_fraction = 0.02  # 2,000 steps
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.98
  config.optimizer.eps = 1e-6
  config.optimizer.weight_decay = 1e-2
  config.optimizer.clip = 1.0
  return config_lib.finish(config, arg)
