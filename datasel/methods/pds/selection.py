"""Which sequences of a store are kept: a score for each by the fitted scorer, and the highest after seeded noise.

  WORKDIR/scores/          the score of every sequence (`row_values`): resumed after a kill, any number of processes
  WORKDIR/selection.npz    what is kept;  WORKDIR/random.npz    as many at random

`datasel.data.selection` draws, reads and writes them; any run trains on them (--config.data.selection).  They are of
the whole store, also where the run reads it through a selection itself.
"""

import numpy as np

from datasel import build, row_values, workdir
from datasel.data import selection as selections
from datasel.data.selection import Selected, Selection, gumbel_top_k
from datasel.methods.pds.fitting import Fitted

_SCORE = row_values.Quantity('score', 'predicted score', (),
                             'the scorer has diverged; lower pds.scorer.optimizer.peak_lr')


def score(run: build.Run, stage: build.Stage, fitted: Fitted) -> row_values.RowValues:
  """The score of every sequence that the store has to train on."""
  sizes_M, reads = run.store.sizes('train'), run.config.pds.scorer
  return row_values.compute(
    run.directory / stage.name, _SCORE, fitted.score, fitted.params, run.store, run.mesh,
    [range(n) for n in sizes_M.tolist()], batch_size=stage.batch_size, stage=stage.name, progress=run.progress,
    flops_per_row=stage.flops / int(sizes_M.sum()), rules=build.rules(run.config), read=fitted.read,
    provenance={'scorer': fitted.digest, 'length': reads.length, 'cut': reads.cut})


def select(run: build.Run, scores: row_values.RowValues) -> dict[str, str]:
  """Writes selection.npz and random.npz; {'selected': path, 'random': path}."""
  section, by_domain = run.config.pds, scores.by_domain()
  provenance = {'store': run.store.whole.digest, 'seed': run.config.seed, 'git': workdir.git_version()}
  quotas = selections.quotas_of(section.quotas)
  chosen = gumbel_top_k(by_domain, ratio=section.ratio, temperature=section.temperature,
                        seed=build.seed_for(run.config, 'selected'), quotas=quotas)
  part = sum(map(len, chosen.values())) / sum(map(len, by_domain.values()))
  level = {name: np.broadcast_to(np.float32(0), len(x)) for name, x in by_domain.items()}
  at_random = gumbel_top_k(level, ratio=part, temperature=1.0, seed=build.seed_for(run.config, 'random'))
  if isinstance(run.store, Selected):
    provenance |= {'within': run.store.selection.digest}
    chosen, at_random = map(run.store.records_of_whole, (chosen, at_random))
  paths = {name: str(run.directory / f'{file}.npz') for name, file in (('selected', 'selection'), ('random', 'random'))}
  selections.write(paths['selected'], Selection(chosen, provenance | {
    'method': 'pds', 'ratio': section.ratio, 'temperature': section.temperature, 'quotas': quotas,
    'scores': scores.digest}))
  selections.write(paths['random'], Selection(at_random, provenance | {'method': 'random', 'ratio': part}))
  return paths
