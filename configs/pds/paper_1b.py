r"""PDS with a 1B main model (2410.07064): 40% of a corpus chosen for instruction-like text, against all of it.

Expects:   a token store, Mistral's tokenizer (32,000), sequences of 1,024 tokens; a target: LIMA as JSON lines of
           {"prompt", "response"}.
Command:   python -m datasel.main --config=configs/pds/paper_1b.py --workdir=DIR --config.data.store=STORE
             --config.pds.target=lima.jsonl
Hardware:  paper: 16 GPUs.  Each of three main models costs 3.1e+20 FLOPs by formula.
Paper:     section 3 and the authors' scripts.  Theirs start the proxy at 10k steps alone; the paper averages five.
           Not yet run with this code.
"""

from datasel import config as config_lib


def get_config(arg: str = ''):
  return config_lib.finish(config_lib.pds_paper('pds_1b', peak_lr=2.5e-4), arg)
