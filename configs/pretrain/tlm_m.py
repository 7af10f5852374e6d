r"""Pre-training ProX's 1.7B Llama (2409.17115): 12,500 steps of 1,024 sequences of 2,048 tokens, 26.2B in all.

Expects:   a token store, Llama-2's tokenizer (32,000), sequences of 2,048 tokens.
Command:   python -m datasel.main --config=configs/pretrain/tlm_m.py --workdir=DIR --config.data.store=STORE
Hardware:  cost by formula: 2.8e+20 FLOPs.  A micro-batch is of 64 sequences, over all devices.
Paper:     Table 9.  Also with twice the steps: --config.train.steps=25000 --config.optimizer.warmup_fraction=0.02.
           The runs on raw, rule-filtered and refined text differ in the store alone; a small one is read again.
           Theirs decays the norms too.  Not yet run with this code.
"""

from datasel import config as config_lib


def get_config(arg: str = ''):
  config = config_lib.tlm('pretrain', 'tlm_m', peak_lr=3e-4, end_lr=3e-5)
  config.pretrain = config_lib.pretrain()
  return config_lib.finish(config, arg)
