r"""DoReMi as its paper trains it on the Pile: 280M reference and proxy, 8B main model (2305.10429, Table 9, App. C).

Expects:   a token store of the Pile's 22 domains with a SentencePiece vocabulary of 256k (any up to that size fits).
Command:   python -m datasel.main --config=configs/doremi/pile_280m.py --workdir=DIR --config.data.store=STORE
             --config.mesh.fsdp=-1 --config.mesh.data=1
Hardware:  paper: TPU v3 for the 280M models, TPU v4 for the 8B.  Cost by formula, heads of
           256k tokens included: 1.8e20 FLOPs each for reference and proxy, 6.1e21 for each main model.
Paper:     weights: Pile-CC .61, OpenWebText2 .10, Wikipedia .07 (Table 1); 8B: average log-perplexity 1.64 -> 1.40, all
           22 domains better, the baseline's final accuracy after 75k of 200k steps.  Not yet run with this code.
"""

from datasel import config as config_lib
from datasel.data.mixture import PILE_EPOCHS


def get_config(arg: str = ''):
  config = config_lib.base('doremi')
  config.model = config_lib.model('doremi_8b')
  config.train.steps = 200_000
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
  config.optimizer.clip = 1.0

  config.doremi = config_lib.doremi()
  config.doremi.model = config_lib.model('doremi_280m')
  config.doremi.steps = 200_000
  config.doremi.batch_size = 512
  config.doremi.baseline = 'pile'
  config.doremi.baseline_epochs = PILE_EPOCHS
  return config_lib.finish(config, arg)
