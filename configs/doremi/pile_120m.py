r"""DoReMi as the released code trains it on the Pile: 120M reference, proxy and main model, every switch as there.

Expects:   a token store of the Pile's 22 domains, GPT-NeoX tokenizer (vocabulary padded to 50,280).
Command:   python -m datasel.main --config=configs/doremi/pile_120m.py --workdir=DIR --config.data.store=STORE
Hardware:  released: 8 A100 GPUs.  Cost by formula: 8.4e19 FLOPs for each of the four models.
Released:  weights of round 1: OpenWebText2 .19, Pile-CC .14, Wikipedia .11; 15 of 22 domains better, the baseline's
           final loss after 70k of 200k steps.  Not yet run with this code.

What differs from the released code: RMSNorm without biases for LayerNorm; baseline weights count packed sequences,
where its default counts padded ones; and its staleness is not copied (with several devices or accumulation its losses
used the weights of the step before).
"""

from datasel import config as config_lib
from datasel.data.mixture import PILE_EPOCHS


def get_config(arg: str = ''):
  config = config_lib.base('doremi')
  config.model = config_lib.model('doremi_120m_repository')
  config.train.steps = 200_000
  config.train.batch_size = 512  # 64 on each of 8 devices
  config.train.log_every = 100
  config.train.checkpoint_every = 1000
  config.train.eval_every = 5000
  config.train.eval_sequences = 512

  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.99
  config.optimizer.eps = 1e-8
  config.optimizer.weight_decay = 0.01
  config.optimizer.peak_lr = 1e-3
  config.optimizer.end_lr = 1e-4
  config.optimizer.schedule = 'exponential_gap'
  config.optimizer.warmup_fraction = 0.06

  config.doremi = config_lib.doremi()
  config.doremi.model = config_lib.model('doremi_120m_repository')
  config.doremi.steps = 200_000
  config.doremi.batch_size = 512
  config.doremi.baseline = 'pile'
  config.doremi.baseline_epochs = PILE_EPOCHS
  config.doremi.loss_reduction = 'token_mean'
  config.doremi.missing_domain = 'keep'
  config.doremi.initial_weights = 'sampling'
  config.doremi.average_includes_initial = True
  return config_lib.finish(config, arg)
