r"""AnLLM-EP-7B (2402.07616): Llama-2-7B goes on for one pass over RedPajama's sample, its periods the anchors.

Expects:   a folder that `python -m datasel.load` made of the base model; a token store made with its tokenizer, one
           document a record, cut at 4,096 tokens.
Command:   python -m datasel.load meta-llama/Llama-2-7b-hf --out llama2
           python -m datasel.prepare --corpus CORPUS --store STORE --tokenizer llama2/tokenizer --length 4096
             --packing truncate
           python -m datasel.main --config=configs/anllm/llama2_7b_ep.py:llama2 --workdir=DIR --config.data.store=STORE
Hardware:  cost by formula, attention not counted: 1.5e+20 FLOPs.  A micro-batch is of 32 sequences, over all devices.
Paper:     section 4; the released model's card: 1,817 steps of 512 rows, mean training loss 1.9985 nats/token.  Its
           reported average over eight zero-shot tasks is 64.6 with full attention; Llama-2-7B's is 65.8.  Not yet run
           with this code.
"""

import pathlib

from datasel import config as config_lib


def get_config(arg: str = ''):
  config = config_lib.anllm_7b('ep')
  config.anllm.init_from = str(pathlib.Path('llama2' if arg in ('', 'smoke') else arg).absolute())
  return config_lib.finish(config, arg if arg == 'smoke' else '')
