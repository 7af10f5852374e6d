r"""AnLLM's comparison from scratch (2402.07616's repository): WikiText-103, full attention against periods as anchors.

Expects:   a token store of WikiText-103, one article a record, cut at 4,096 tokens of Llama-2's tokenizer (32,000).
Command:   python -m datasel.prepare --corpus CORPUS --store STORE --tokenizer LLAMA2 --length 4096 --packing truncate
           python -m datasel.main --config=configs/anllm/wikitext103_scratch.py --workdir=DIR --config.data.store=STORE
Hardware:  cost by formula: 2.0e+18 FLOPs with full attention, 1.4e+18 without it.
           A micro-batch is of 32 sequences, over all devices.
Released:  logs: perplexity of a token on the test split, dense mask: full attention 36.57 at best (step 664 of 840),
           periods as anchors 32.27 (step 606); at step 346, 49.8 against 45.5.  Both overfit towards the end: 44.8 and
           41.2.  By length of context, of a second run: 256 50.74, 1,024 35.73, 4,096 32.81.  The model's sizes are not
           published: "llama2-size-txlbase"; here 16 layers and the widths of Transformer-XL's base model, heads of 42
           where it has 41, which cannot rotate.  Not yet run with this code.
"""

from datasel import config as config_lib


def get_config(arg: str = ''):
  config = config_lib.anllm_7b('full,ep')
  config.model.n_layers, config.model.d_model, config.model.d_ff = 16, 420, 2100
  config.model.n_heads = config.model.n_kv_heads = 10
  config.model.head_dim = 42
  config.train.steps, config.train.batch_size, config.train.microbatches = 840, 1024, 32
  config.train.checkpoint_every, config.train.eval_every = 28, 28
  config.optimizer.peak_lr, config.optimizer.warmup_fraction = 2.5e-4, 20 / 840
  config.anllm.sets = ''
  return config_lib.finish(config, arg)
