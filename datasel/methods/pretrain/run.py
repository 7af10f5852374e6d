"""Plain pre-training on a mixture of domains.

  WORKDIR/main/            the model: checkpoints/ and stage.json
  WORKDIR/mixture.json     the weights it was trained on
  WORKDIR/report.html      losses, per domain
"""

import pathlib

import ml_collections

from datasel import build, metrics, objectives, processes
from datasel import config as config_lib
from datasel.data import mixture as mixture_lib
from datasel.data.store import Store
from datasel.methods.pretrain.report import write_report


def run(config: ml_collections.ConfigDict, directory: pathlib.Path, store: Store) -> dict:
  """Runs or finishes it; returns summary.json's contents."""
  [stage] = stages(config, store)
  with build.begin(config, directory, store, stage.flops) as r:
    section = config.pretrain
    mixture = build.mixture(section.mixture, store, section.mixture_epochs.to_dict(), 'pretrain.mixture')
    if processes.lead():
      mixture_lib.write(directory / 'mixture.json', mixture)
    build.train_stage(r, stage, role='main', init_role='init-main', weights_M=mixture.for_domains(store.domains))

  def outcome() -> dict:
    summary = {'final': metrics.read(directory, 'main', 'eval')[-1], 'cost_flops': {'main': stage.flops},
               'warnings': []}
    return summary

  return build.conclude(directory, outcome, write_report)


def stages(config: ml_collections.ConfigDict, store: Store) -> list[build.Stage]:
  """What will be trained; ValueError for a mixture that cannot be sampled from this store."""
  section = config.pretrain
  build.mixture(section.mixture, store, section.mixture_epochs.to_dict(), 'pretrain.mixture')
  model = config_lib.to_model(config.model)
  return [build.Stage('main', model, objectives.language_model(model.token_nll), config.train.steps,
                      config.train.batch_size, config.train.microbatches, store.length,
                      init_from=config.train.init_from)]
