r"""ProX's continual pre-training on mathematics (2409.17115): a published model goes on, on OpenWebMath or what is left
of it once refined.  TinyLlama-1.1B reads 15.7B tokens, the models of 7B 10.5B.

Expects:   a folder that `python -m datasel.load` made of the base model; a token store made with its tokenizer,
           sequences of 2,048 tokens for TinyLlama and of 4,096 for the others.
Command:   python -m datasel.load TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T --out tinyllama
           python -m datasel.prepare --corpus CORPUS --store STORE --tokenizer tinyllama/tokenizer --length 2048
           python -m datasel.main --config=configs/pretrain/tlm_math.py:tinyllama_1_1b=tinyllama --workdir=DIR
             --config.data.store=STORE
           or llama2_7b=FOLDER, codellama_7b=FOLDER, mistral_7b=FOLDER.
Hardware:  cost by formula: 1.1e+20 FLOPs for TinyLlama, 4.5e+20 to 4.8e+20 for the others.
Paper:     section 4.1 and Appendix.  The 7B models stop at two thirds of a cosine whose end, not published, is here
           a tenth of its peak.  Theirs decays the norms too.  Not yet run with this code.
"""

import pathlib

from datasel import config as config_lib

SETTINGS = {  # peak and last rate, sequences of a step, tokens of one, steps, those of the cosine where it stops before
  'tinyllama_1_1b': (8e-5, 8e-6, 1024, 2048, 7500, 0),
  'llama2_7b': (8e-5, 8e-6, 256, 4096, 10_000, 15_000),
  'codellama_7b': (3e-4, 3e-5, 1024, 4096, 2500, 3750),
  'mistral_7b': (2e-5, 2e-6, 256, 4096, 10_000, 15_000),
}


def get_config(arg: str = ''):
  base, _, folder = ('tinyllama_1_1b', '', 'tinyllama') if arg in ('', 'smoke') else arg.partition('=')
  if base not in SETTINGS or not folder:
    raise ValueError(f'{arg!r} after the colon; want NAME=FOLDER, NAME one of {", ".join(SETTINGS)} and FOLDER made '
                     "by `python -m datasel.load`, or 'smoke'")
  peak, end, batch_size, length, steps, cosine = SETTINGS[base]
  started = pathlib.Path(folder).absolute()
  config = config_lib.base('pretrain')
  config.pretrain = config_lib.pretrain()
  config.data.length = length
  config.data.tokenizer = str(started / 'tokenizer')
  config.model = config_lib.model('tinyllama_1_1b' if arg in ('', 'smoke') else str(started))
  config.train.init_from = '' if arg == 'smoke' else str(started / 'checkpoints')
  config.train.steps, config.train.batch_size = steps, batch_size
  config.train.microbatches = 16
  config.train.log_every = 50
  config.train.checkpoint_every = 500
  config.train.eval_every = 2500
  config.train.eval_sequences = 800

  config.optimizer.peak_lr = peak
  config.optimizer.end_lr = end
  config.optimizer.schedule = 'cosine'
  config.optimizer.schedule_steps = cosine
  config.optimizer.warmup_fraction = 0.0
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.95
  config.optimizer.weight_decay = 0.1
  config.optimizer.clip = 1.0
  return config_lib.finish(config, arg if arg == 'smoke' else '')
