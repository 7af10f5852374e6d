"""The authors' checkpoints, by the names and revisions that they have on the hub."""

import dataclasses
import re

import pytest

from datasel.models import published
from datasel.models.presets import PRESETS

SEEDS = [f'seed-{n}' for n in range(1, 6)]
NAMES = {
  **{f'Data-Selection/{kind}-{size}': (preset, ['main']) for kind in ('PDS', 'BSL') for size, preset in (
    ('160M', 'pds_160m'), ('470M', 'pds_470m'), ('1B', 'pds_1b'), ('1.7B', 'pds_1_7b'))},
  **{f'sail/data-mixture-{name}-1b': ('regmix_1b', SEEDS) for name in ('human', 'doremi', 'pile-cc', 'regmix')},
  'sail/data-mixture-random-1b': ('regmix_1b', ['model-index-1', 'model-index-64']),
  'gair-prox/web-doc-refining-lm': ('tlm_xs', ['main']), 'gair-prox/web-chunk-refining-lm': ('tlm_xs', ['main']),
  'gair-prox/RedPJ-ProX-0.3B': ('tlm_xs', ['main']), 'gair-prox/C4-ProX-1.7B': ('tlm_m', ['main']),
  'gair-prox/TinyLlama-1.1B-ProXMath': ('tinyllama_1_1b', ['main']),
}


@pytest.mark.parametrize('name', NAMES)
def test_a_published_name_has_its_papers_shape_and_its_revisions(name):
  preset, revisions = NAMES[name]
  found = published.find(name)
  assert found.preset == preset
  assert all(re.fullmatch(found.revisions, revision) for revision in revisions)
  if revisions != ['main']:
    with pytest.raises(ValueError, match='holds several models, one a revision'):
      published.check_revision(name, None)
  assert published.differences(name, PRESETS[preset]) == []
  other = dataclasses.replace(PRESETS[preset], n_layers=5)
  assert published.differences(name, other) == [f'n_layers is 5, the paper has {PRESETS[preset].n_layers}']


def test_every_entry_names_a_preset():
  assert {entry.preset for entry in published.PUBLISHED} <= PRESETS.keys()
  assert published.find('meta-llama/Llama-2-7b-hf') is None
