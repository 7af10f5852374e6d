"""Laws of the benchmarks: every contender reads the same data, and what is printed is what was measured."""

import dataclasses
import itertools
import json
import statistics
import sys

import datasets
import jax
import numpy as np
import pytest
from torch.utils import flop_counter

from datasel.attention.shapes import CASES
from datasel.bench import __main__ as bench
from datasel.bench import anchor_decoding, attention, data, generate, pds, prox, regmix, step
from datasel.data import mixture, sampler

SMALL = dict(length=64, batch_size=4, batches=3, repeats=2, domains=10, max_bytes_per_domain=20_000)


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  return data._store(tmp_path_factory.mktemp('bench'), SMALL['length'], 10, SMALL['max_bytes_per_domain'])


@pytest.fixture
def draws(store):
  return sampler.Sampler(store, 'train', mixture.by_tokens(store).for_domains(store.domains), 4, seed=0)


def test_the_limit_reads_the_batches_of_the_sampler(store, draws, tmp_path):
  tokens = [data._tokens(store, j) for j in range(10)]
  limit = data._gather(tokens, draws, tmp_path / 'tokens.npy', batches=5)
  ours = list(itertools.islice(draws, 5))
  for batch, want in zip(itertools.islice(limit, 10), ours * 2):
    assert batch['tokens_BxL'].shape == (4, 64)
    for key in batch:
      np.testing.assert_array_equal(batch[key], want[key])


@pytest.mark.parametrize('form', [data._streamed, data._map_style])
def test_the_peer_reads_the_sequences_of_the_store_by_the_same_weights(form, store, draws, tmp_path):
  tokens = [data._tokens(store, j) for j in range(10)]
  sources = [data._source(datasets, rows, tmp_path / f'{j}.arrow') for j, rows in enumerate(tokens)]
  domain_of = {row.tobytes(): j for j, rows in enumerate(tokens) for row in rows[:, :-1].astype(np.int32)}
  drawn = [domain_of[row.tobytes()] for batch in itertools.islice(form(datasets, sources, draws), 300)
           for row in batch['tokens_BxL']]
  assert len(drawn) == 1200
  wanted_M = draws.counts_M / draws.block
  error_M = np.abs(np.bincount(drawn, minlength=10) / 1200 - wanted_M)
  assert (error_M < 5 * np.sqrt(wanted_M / 1200)).all()  # five standard deviations of independent draws


def test_figures_follow_from_the_rounds_and_are_printed_and_written(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(data.run, '__kwdefaults__', SMALL)
  bench.main(['data', '--json', str(tmp_path / 'result.json')])
  result = json.loads((tmp_path / 'result.json').read_text())
  assert result['benchmark'] == 'data' and result['command'].startswith('python -m datasel.bench data --json ')
  assert len(result['settings']['sequences']) == 10
  rows = result['contenders']
  medians = {name: statistics.median(row['rounds']) for name, row in rows.items()}
  printed = capsys.readouterr().out
  for name, row in rows.items():
    assert len(row['rounds']) == 2
    np.testing.assert_allclose(row['tokens_per_second'], medians[name])
    np.testing.assert_allclose(row['of_peer'], medians[name] / medians[data._PEER])
    np.testing.assert_allclose(row['of_limit'], medians[name] / medians[data._LIMIT])
    assert f'{name:42}{medians[name] / 1e6:8.1f}' in printed


def test_a_missing_peer_is_named_with_its_remedy(monkeypatch):
  monkeypatch.setitem(sys.modules, 'datasets', None)
  with pytest.raises(SystemExit, match=r"`datasets`, which is not installed; pip install 'datasel\[dev\]'"):
    bench.main(['data'])


def test_an_unknown_benchmark_is_refused(capsys):
  with pytest.raises(SystemExit):
    bench.main(['dta'])
  assert "invalid choice: 'dta'" in capsys.readouterr().err


def test_attention_counts_the_pairs_that_see_each_other():
  for case in CASES.values():
    B, L, *_ = case.shape()
    assert case.pairs() == int(np.broadcast_to(case.mask().dense(L), (B, L, L)).sum())


def test_attention_figures_follow_from_the_times():
  result = attention.run(cases='ragged', size='small', repeats=1, kinds='forward,hessian_product')
  assert [row['kind'] for row in result['rows']] == ['forward', 'hessian_product']
  row, text = result['rows'][0], attention.table(result)
  B, L, H, _, Dh = row['shape']
  assert row['flops'] == 2 * 2 * B * H * Dh * L * (L + 1) / 2  # two products, two operations each, causal pairs
  for name in ('auto', 'reference'):
    share = 100 * row['flops'] / row['seconds'][name] / result['product_flops']
    assert f'  {name:30s} {1e3 * row["seconds"][name]:10.2f} ms' in text and f'{share:7.1f}% of' in text


@pytest.mark.parametrize('argument', ['--size=huge', '--dtype=int8', '--cases=causal,nothing', '--repeats=0'])
def test_attention_options_that_do_not_exist_are_refused(argument):
  with pytest.raises(SystemExit, match='datasel.bench: (unknown|repeats)'):
    bench.main(['attention', argument])


def test_step_figures_follow_from_the_times_and_say_when_the_peer_is_missing(monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  result = step.run(preset='smoke', batch_size=2, length=16, repeats=1)
  row, = result['rows'].values()
  work = step.PRESETS['smoke'].flops_per_token(16) * 32
  np.testing.assert_allclose([row['tokens_per_second'], row['mfu'], row['normalised_mfu']], [
    32 / row['seconds'], work / row['seconds'] / result['peak_flops'], work / row['seconds'] / result['product_flops']])
  assert 'transformers MistralForCausalLM: not here (' in step.table(result)
  with pytest.raises(ValueError, match="unknown preset 'pds'"):
    step.run(preset='pds')


def test_decoding_figures_follow_from_the_times():
  result = generate.run(preset='smoke', batch_size=2, prompt=8, new_tokens=5, repeats=1)
  model, text = generate.PRESETS['smoke'], generate.table(result)
  assert [*result['rows']] == [generate._OURS, generate._PEER] and 'not here' not in text
  # Five times all parameters (tied) and, per row, the keys and values of 8 to 12 positions; float32.
  cache = 2 * 2 * model.n_layers * model.n_kv_heads * model.head_dim * (8 + 9 + 10 + 11 + 12)
  limit = 4 * (5 * model.n_params + cache) / result['bandwidth']
  for row in result['rows'].values():
    got = row['tokens_per_second'], row['of_limit']
    np.testing.assert_allclose(got, [10 / row['seconds'], limit / row['seconds']])
  with pytest.raises(ValueError, match="unknown preset 'pds'"):
    generate.run(preset='pds')


def test_a_cache_of_anchors_is_compared_at_one_batch_and_in_the_same_memory():
  result = anchor_decoding.run(preset='smoke', batch_size=2, prefix=256, segment=16, steps=4, repeats=1)
  rows, text = result['rows'], anchor_decoding.table(result)
  full, same, more = rows['full cache'], rows['anchor cache'], rows['anchor cache, same memory']
  assert full['batch_size'] == same['batch_size'] == 2 < more['batch_size']
  per_row = same['allocated_bytes'] / 2
  assert full['allocated_bytes'] - per_row < more['allocated_bytes'] <= full['allocated_bytes']
  model = anchor_decoding.PRESETS['smoke']
  assert full['allocated_bytes'] == 2 * 260 * 4 * 2 * model.n_layers * model.n_kv_heads * model.head_dim
  for row in rows.values():
    assert row['tokens_per_second'] == row['batch_size'] / row['seconds']
    assert row['ratio_to_full'] == pytest.approx(row['tokens_per_second'] / full['tokens_per_second'])
    assert f'{1e3 * row["seconds"]:12.1f}{row["tokens_per_second"]:12,.1f}' in text


TINY_PDS = dict(preset='smoke', length=16, steps=4, batch_size=4, proxies=8, dev=8, stride=2)
# PyTorch's own, the first time that it takes a derivative in forward mode.
torch_func_warns = pytest.mark.filterwarnings('ignore:.torch.jit.script. is deprecated:DeprecationWarning')


@torch_func_warns
def test_solvers_agree_and_figures_follow_from_the_times():
  result = pds.run(**TINY_PDS, repeats=1)
  text = pds.table(result)
  assert [*result['rows']] == [pds._OURS, pds._PEER] and 'not here' not in text
  for row in result['rows'].values():
    ours = result['rows'][pds._OURS]['core_seconds']
    limit = result['flops'] / result['product_flops']
    got = row['of_limit'], row['ratio_to_ours']
    np.testing.assert_allclose(got, [limit / row['core_seconds'], row['core_seconds'] / ours])
    assert f'{row["core_seconds"]:14.2f}{100 * row["of_limit"]:9.1f}%{row["ratio_to_ours"]:14.2f}' in text
  assert result['agreement']['spearman'] > 1 - 1e-9 and result['agreement']['difference'] < 1e-4  # of their spread


@torch_func_warns
def test_the_work_of_a_solver_is_what_pytorch_counts():
  """But for attention, of which it counts the pairs that see nothing too."""
  model, B, L = pds.PRESETS['smoke'], TINY_PDS['batch_size'], TINY_PDS['length']
  model = dataclasses.replace(model, dtype='float32')
  tokens = np.random.default_rng(0).integers(0, model.vocab_size, (7, B, L + 1))
  sets = {'train': tokens[:4], 'proxy': tokens[4:6], 'dev': tokens[6:]}
  theirs = pds._functional(model, model.init(jax.random.key(0)), L)
  solve = pds._torch_func(*theirs, sets, TINY_PDS['stride'], 0.1)
  with flop_counter.FlopCounterMode(display=False) as counted:
    solve()
  work = pds._flops(model, L, 4, B, 2 * B, B, TINY_PDS['stride'])
  assert work < counted.get_total_flops() < 1.02 * work


def test_other_scores_or_sizes_that_do_not_divide_are_refused():
  scores = np.random.default_rng(0).normal(size=100).astype(np.float32)
  pds._agreement(scores, scores + np.float32(1e-5))
  with pytest.raises(ValueError, match='the peer has other scores'):
    pds._agreement(scores, 1.01 * scores)
  for sizes in ({'proxies': 12}, {'dev': 4}):
    with pytest.raises(ValueError, match='do not divide into batches of 8; choose multiples'):
      pds.run(**sizes)
  with pytest.raises(ValueError, match="unknown preset 'pds'"):
    pds.run(preset='pds')


def test_the_swarms_figures_follow_from_the_times():
  result = regmix.run(preset='smoke', vocab_size=64, batch_size=2, length=16, proxies=4, steps=500, repeats=1)
  text = regmix.table(result)
  assert [*result['rows']] == [regmix._SWARM, regmix._ONE] and result['chunk'] == 1
  for row in result['rows'].values():
    np.testing.assert_allclose([row['proxies_per_hour'], row['of_limit']], [
      3600 / (500 * row['seconds']), result['limit_seconds'] / row['seconds']])
    assert f'{1e3 * row["seconds"]:10.2f}{row["proxies_per_hour"]:14,.1f}' in text
  with pytest.raises(ValueError, match='3 proxies cannot be spread over 4 devices'):
    regmix.run(preset='smoke', proxies=3)


def test_programs_figures_follow_from_the_times():
  result = prox.run(preset='smoke', batch_size=4, prompt=16, new_tokens=16, documents=4, lines=12, repeats=1)
  text = prox.table(result)
  for row in result['decoding'].values():
    np.testing.assert_allclose([row['tokens_per_second'], row['chunks_per_second']],
                               [4 * 16 / row['seconds'], 4 / row['seconds']])
    assert f'{row["tokens_per_second"]:12,.0f}{row["chunks_per_second"]:12,.2f}{row["ratio"]:20.3f}' in text
  for row in result['carrying_out'].values():
    np.testing.assert_allclose(row['documents_per_second'], 4 / row['seconds'])
  assert result['carrying_out'][prox._OURS]['ratio'] == result['decoding'][prox._FREE]['ratio'] == 1
  with pytest.raises(ValueError, match="unknown preset 'pds'"):
    prox.run(preset='pds')
  for sizes in ({'documents': 0}, {'lines': 5}):
    with pytest.raises(ValueError, match='want at least 1, of at least 6'):
      prox.run(preset='smoke', **sizes)
