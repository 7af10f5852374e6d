r"""AnLLM on a laptop: SmolLM2-135M goes on with and without anchors, and answers with most of its cache gone (Pang et
al. 2024).

Expects:   nothing: it fetches its text, its model and its questions.
Command:   python -m datasel.main --config=configs/anllm/demo.py --workdir=runs/anllm-demo
Hardware:  2 CPU cores, 6 GB of memory; 12 and 13 minutes for the first two of its three arms.
Outcome:   after 49,000 tokens held-out bits per byte are 1.097 with full attention, 1.522 with periods as anchors and
           1.584 with an anchor token: too few to learn to use them.  Of the cache of three documents 57% and 62% is
           saved, of five demonstrations 89 to 95%.  Right answers to socialiqa after these: 32% and 26% (each +-7) with
           the cache evicted, 36% with full attention, chance 33%.  A question takes 1/1.2 to 1/1.5 of the time with a
           full cache, and 1/2.9 to 1/4.4 of that with none.
"""

from datasel import config as config_lib


def get_config(arg: str = ''):
  config = config_lib.base('anllm')
  config.data.demo, config.data.tokenizer = 'lean', 'demo:smollm2'
  config.data.length = 512

  config.model = config_lib.model('smollm2_135m')
  config.model.dtype = 'float32'
  config.train.steps, config.train.batch_size = 24, 4
  config.train.log_every, config.train.checkpoint_every = 1, 8
  config.train.eval_every, config.train.eval_sequences = 0, 2
  config.optimizer.peak_lr, config.optimizer.end_lr = 2e-4, 2e-5
  config.optimizer.weight_decay, config.optimizer.warmup_fraction = 0.0, 0.1

  config.anllm = config_lib.anllm()
  config.anllm.arms, config.anllm.init_from = 'full,ep,ac', 'demo:smollm2'
  config.anllm.contexts, config.anllm.context_sequences = '64,128,256,512', 2
  config.anllm.sets, config.anllm.shots, config.anllm.questions = 'socialiqa,quartz', '0,1,5', 50
  config.anllm.timed = 4
  return config_lib.finish(config, arg)
