"""Which sequences of a store are kept: a score for each by the fitted scorer, and the highest after seeded noise.

  WORKDIR/scores/          the score of every sequence (`row_values`): resumed after a kill, any number of processes
  WORKDIR/selection.npz    what is kept;  WORKDIR/random.npz    as many at random

`datasel.data.selection` draws, reads and writes them; any run trains on them (--config.data.selection).
"""

import numpy as np

from datasel import build, row_values, workdir
from datasel.data import selection as selections
from datasel.data.selection import Selection, gumbel_top_k
from datasel.methods.pds.fitting import Fitted

_SCORE = row_values.Quantity('score', 'predicted score', (),
                             'the scorer has diverged; lower pds.scorer.optimizer.peak_lr')


def score(run: build.Run, stage: build.Stage, fitted: Fitted) -> row_values.RowValues:
  """The score of every sequence that the store has to train on."""
  sizes_M = run.store.sizes('train')
  return row_values.compute(
    run.directory / stage.name, _SCORE, fitted.score, fitted.params, run.store, run.mesh,
    [np.arange(n) for n in sizes_M], batch_size=stage.batch_size, stage=stage.name, progress=run.progress,
    flops_per_row=stage.flops / int(sizes_M.sum()), rules=build.rules(run.config), read=fitted.read,
    provenance={'scorer': fitted.digest})


def select(run: build.Run, scores: row_values.RowValues) -> dict[str, str]:
  """Writes selection.npz and random.npz; {'selected': path, 'random': path}."""
  section, by_domain = run.config.pds, scores.by_domain()
  provenance = {'store': run.store.digest, 'seed': run.config.seed, 'git': workdir.git_version()}
  chosen = gumbel_top_k(by_domain, ratio=section.ratio, temperature=section.temperature,
                        seed=build.seed_for(run.config, 'selected'), quotas=section.quotas.to_dict())
  part = sum(map(len, chosen.values())) / sum(map(len, by_domain.values()))
  level = {name: np.zeros(len(x), np.float32) for name, x in by_domain.items()}
  at_random = gumbel_top_k(level, ratio=part, temperature=1.0, seed=build.seed_for(run.config, 'random'))
  paths = {name: str(run.directory / f'{file}.npz') for name, file in (('selected', 'selection'), ('random', 'random'))}
  selections.write(paths['selected'], Selection(chosen, provenance | {
    'method': 'pds', 'ratio': section.ratio, 'temperature': section.temperature, 'quotas': section.quotas.to_dict(),
    'scores': scores.digest}))
  selections.write(paths['random'], Selection(at_random, provenance | {'method': 'random', 'ratio': part}))
  return paths
