"""Cache entries counted from flags: against what the mask still shows, a set that follows Algorithm 1, and by hand."""

import numpy as np
import pytest
import small_store

from datasel.attention import anchors
from datasel.data.anchors import Rule, punctuation_ids
from datasel.data.tokenizer import load
from datasel.methods.anllm import usage

FIGURE_2 = np.array([0, 0, 0, 1, 0, 0, 1, 0], bool)


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  return small_store.make(tmp_path_factory.mktemp('store'))


def test_figure_2_keeps_three_entries_of_eight():
  assert usage.live(FIGURE_2).tolist() == [1, 2, 3, 1, 2, 3, 2, 3]
  saved = usage.reduction([usage.live(FIGURE_2)], allocated_bytes=6, full_bytes=8)
  assert saved == {'prefix': 0.625, 'peak_live': 0.625, 'allocated': 0.25}


@pytest.mark.parametrize('share', [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize('with_protected', [False, True])
def test_alive_is_what_the_next_token_sees(share, with_protected):
  rng = np.random.default_rng(0)
  for _ in range(3):
    anchor_L = rng.random(24) < share
    protected_L = rng.random(24) < 0.2 if with_protected else None
    # One more token after the 24: with the rest of the row as padding, the beginning is a text of its own.
    more = lambda x_L: None if x_L is None else np.append(x_L, False)
    for length in range(1, 25):
      document_BxL = np.where(np.arange(25) <= length, 1, 0)[None].astype(np.int32)
      next_L = more(anchor_L) & (np.arange(25) < length)
      seen = anchors.visible(next_L[None], document_BxL,
                             protected_BxL=None if protected_L is None else more(protected_L)[None])[0, length]
      assert usage.live(anchor_L, protected_L)[length - 1] == int(seen.sum()) - 1, length


def test_alive_is_what_the_algorithm_of_the_paper_leaves():
  """REDUCTION(C): after an anchor, C keeps what is an anchor or not before it."""
  anchor_L = np.random.default_rng(1).random(200) < 0.15
  cache, sizes = [], []
  for t, is_anchor in enumerate(anchor_L):
    cache.append(t)
    if is_anchor:
      cache = [c for c in cache if c >= t or anchor_L[c]]
    sizes.append(len(cache))
  assert usage.live(anchor_L).tolist() == sizes


def test_reduction_sums_over_texts():
  """Two texts of 8 and 4 tokens: 3 + 4 entries at their ends, at most 4 + 4."""
  texts = [np.array([1, 2, 3, 4, 1, 2, 3, 3]), usage.live(np.zeros(4, bool))]
  assert [x[-1] for x in texts] == [3, 4] and [x.max() for x in texts] == [4, 4]
  saved = usage.reduction(texts, allocated_bytes=1, full_bytes=1)
  assert saved == pytest.approx({'prefix': 1 - 7 / 12, 'peak_live': 1 - 8 / 12, 'allocated': 0.0})


def test_reduction_of_nothing_is_refused():
  for texts, full_bytes in (([], 1), ([np.zeros(0)], 1), ([usage.live(FIGURE_2)], 0)):
    with pytest.raises(ValueError, match='want at least one of each'):
      usage.reduction(texts, allocated_bytes=1, full_bytes=full_bytes)


@pytest.mark.parametrize('keep_bos', [False, True])
def test_a_document_is_thinned_and_ends_where_it_ends(keep_bos):
  tokens_L = np.random.default_rng(2).integers(0, 9, 1000)
  rule = Rule((3, 5), min_length=2, max_length=11)
  drawn = usage.document(tokens_L, rule, keep_bos=keep_bos, shown=20, points=30)
  anchor_L = anchors.flags(tokens_L[None], rule)[0][0]
  whole_L = usage.live(anchor_L, np.arange(1000) < keep_bos)
  assert drawn['ids'] == tokens_L[:20].tolist() and drawn['anchor'] == anchor_L[:20].astype(int).tolist()
  assert drawn['at'][0] == 0 and drawn['at'][-1] == 999 and len(drawn['at']) == 30 == len(set(drawn['at']))
  assert drawn['live'] == whole_L[drawn['at']].tolist()
  assert whole_L[-1] - usage.live(anchor_L)[-1] == keep_bos
  short = usage.document(tokens_L[:5], rule)
  assert short['at'] == [0, 1, 2, 3, 4] and len(short['anchor']) == 5


def test_anchors_of_a_store_are_counted_as_a_reader_would(store):
  rule = Rule(punctuation_ids(load(store.path), '.,'))
  tokens = found = in_closed = 0
  for domain, size in enumerate(store.sizes('validation')):
    for record in (int(size * i / min(size, 40)) for i in range(min(size, 40))):
      row = store.read('validation', np.array([domain]), np.array([record]))
      for document in range(1, row['segment_BxL'].max() + 1):
        ids = row['tokens_BxL'][row['segment_BxL'] == document].tolist()
        tokens, open_tokens = tokens + len(ids), 0
        for i in ids:
          open_tokens += 1
          if i in rule.anchor_ids:
            found, in_closed, open_tokens = found + 1, in_closed + open_tokens, 0
  assert found > 20
  assert usage.in_store(store, rule, sequences=40) == pytest.approx(
    {'anchor_share': found / tokens, 'mean_segment': in_closed / found})
  assert usage.in_store(store, Rule(), sequences=40) == {'anchor_share': 0.0, 'mean_segment': None}
  whole, part = (usage.in_store(store, Rule(max_length=4), sequences=n) for n in (0, 40))
  assert whole['mean_segment'] == part['mean_segment'] == 4.0
  assert usage.in_store(store, rule, sequences=0) != usage.in_store(store, rule, sequences=40)
