"""Laws of the benchmark of training with anchors: the work it counts is the work of its mask."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from datasel.attention.shapes import CASES
from datasel.bench import anchor_training
from datasel.data.anchors import Rule
from datasel.models.presets import PRESETS


def test_every_contender_runs_and_its_pairs_are_those_of_its_mask():
  result = anchor_training.run(preset='smoke', length=64, batch_size=2, repeats=1)
  rows, text = result['rows'], anchor_training.table(result)
  tokens = anchor_training._text(2, 64, PRESETS['smoke'].vocab_size, 17)[:, :-1]
  model = dataclasses.replace(PRESETS['smoke'], anchors=Rule((0,), 8))
  seen = model.mask(jnp.asarray(tokens)).dense(64)
  assert rows['anchors']['pairs'] == int(np.sum(seen)) < rows['causal']['pairs'] == 2 * 64 * 65 // 2
  assert rows['anchors']['limit'] == 1 < rows['causal']['limit'] < rows['anchors, dense mask']['limit']
  assert all(row['temporary_bytes'] > 0 and name in text for name, row in rows.items())


def test_pairs_of_the_shapes_with_anchors():
  case = CASES['anchors']
  length = case.shape()[1]
  assert case.pairs() == int(case.mask().dense(length).sum())


@pytest.mark.parametrize('options', [{'preset': 'pds'}, {'every': 4}, {'length': 0}])
def test_what_cannot_be_measured_is_refused(options):
  with pytest.raises(ValueError, match='preset|segments of'):
    anchor_training.run(**options)
