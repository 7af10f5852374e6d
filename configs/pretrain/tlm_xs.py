r"""Pre-training ProX's 0.3B Llama (2409.17115): 12,500 steps of 1,024 sequences of 2,048 tokens, 26.2B in all.

Expects:   a token store, Llama-2's tokenizer (32,000), sequences of 2,048 tokens.
Command:   python -m datasel.main --config=configs/pretrain/tlm_xs.py --workdir=DIR --config.data.store=STORE
Hardware:  cost by formula: 5.9e+19 FLOPs.  A micro-batch is of 64 sequences, over all devices.
Paper:     Table 9.  The refiners are SFTs of such a model.
           The runs on raw, rule-filtered and refined text differ in the store alone; a small one is read again.
           Theirs decays the norms too.  Not yet run with this code.
"""

from datasel import config as config_lib


def get_config(arg: str = ''):
  config = config_lib.base('pretrain')
  config.pretrain = config_lib.pretrain()
  config.data.length = 2048
  config.model = config_lib.model('tlm_xs')
  config.train.steps = 12_500
  config.train.batch_size = 1024
  config.train.microbatches = 16
  config.train.log_every = 50
  config.train.checkpoint_every = 500
  config.train.eval_every = 2500
  config.train.eval_sequences = 800

  config.optimizer.peak_lr = 5e-4
  config.optimizer.end_lr = 5e-5
  config.optimizer.schedule = 'cosine'
  config.optimizer.warmup_fraction = 0.04  # 500 steps
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.95
  config.optimizer.weight_decay = 0.1
  config.optimizer.clip = 1.0
  return config_lib.finish(config, arg)
