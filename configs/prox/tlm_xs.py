r"""ProX with a 0.3B main model (2409.17115): refined text against raw and rule-filtered, 26.2B tokens each.

Expects:   a corpus (--config.prox.corpus), such as RedPajama-V2; examples of `datasel.methods.prox.annotate` made by a
           large model (--config.prox.examples); a token store, Llama-2's tokenizer, sequences of 2,048 tokens, whose
           held-out text judges.
Command:   python -m datasel.main --config=configs/prox/tlm_xs.py --workdir=DIR --config.data.store=STORE
             --config.prox.corpus=CORPUS --config.prox.examples=SFT
Hardware:  paper: 64 A100s to refine.  A micro-batch is of 64 sequences, over all devices.
Paper:     Tables 2 and 9.  Theirs decays the norms too.  Not yet run with this code.
"""

from datasel import config as config_lib


def get_config(arg: str = ''):
  return config_lib.finish(config_lib.prox_paper('tlm_xs', peak_lr=5e-4, end_lr=5e-5), arg)
