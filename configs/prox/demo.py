r"""ProX end to end on a laptop: two small refiners clean real web pages and noisy documents (Zhou et al. 2024).

Expects:   nothing: it fetches its text.
Command:   python -m datasel.main --config=configs/prox/demo.py --workdir=runs/prox-demo
Hardware:  2 CPU cores, 4 GB of memory; 55 minutes with four other programs at work beside it.
Outcome:   F1 on sites whose programs were not taught: 0.84 of documents, 0.50 of chunks (precision 0.84, recall 0.35).
           Of 697 noisy documents 71% of the tokens are left; 41% of the noise is gone and 13% of the text.  The mean
           loss on held-out c4, news and wiki is 6.145 nats/token against 6.281 of the raw text and 6.210 of Gopher's
           rules; C4's rules, 6.099, and all published rules together, 5.979, do better than refiners of 1.3M
           parameters.  One seed.
"""

from datasel import config as config_lib


def get_config(arg: str = ''):
  config = config_lib.base('prox')
  config.data.demo = 'lean'
  config.data.length = 256

  config.model = config_lib.model('laptop')
  config.train.steps = 240
  config.train.batch_size = 8
  config.train.checkpoint_every = 60
  config.train.eval_every = 60
  config.train.eval_sequences = 32
  config.optimizer.peak_lr = 6e-3
  config.optimizer.end_lr = 6e-4

  config.prox = config_lib.prox()
  config.prox.corpus, config.prox.examples, config.prox.documents = 'demo:pages', 'pairs', 580
  config.prox.target = 'c4,news,wiki'
  config.prox.model = config_lib.model('laptop')
  config.prox.steps, config.prox.batch_size = 200, 8
  config.prox.optimizer.peak_lr, config.prox.optimizer.end_lr = 6e-3, 6e-4
  for section in (config.prox.document, config.prox.chunk):
    section.epochs, section.batch_size, section.length = 3, 16, 512
    section.optimizer.peak_lr, section.optimizer.end_lr = 2e-3, 2e-4
  config.prox.chunk.max_new_tokens = 128
  config.prox.refine_batch = 16
  return config_lib.finish(config, arg)
