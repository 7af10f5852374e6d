"""A model with one more row: nothing that it knew is changed, and the row is what the paper, or its code, says."""

import dataclasses
import json
import pydoc_data.topics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from datasel import pretrained, sharding, workdir
from datasel.data import tokenizer as tokenizers
from datasel.methods.anllm import anchors, vocabulary
from datasel.models.mistral import Mistral

TEXT = pydoc_data.topics.topics['assert']
MODEL = Mistral(vocab_size=399, n_layers=1, d_model=16, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=32)
MODELS = {'untied': MODEL, 'tied': dataclasses.replace(MODEL, tied=True),
          'with rows to spare': dataclasses.replace(MODEL, vocab_size=410)}


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
  """FOLDER of a tokenizer of 399 tokens, with what transformers alone reads of it."""
  folder = tmp_path_factory.mktemp('plain')
  texts = [text for _, text in sorted(pydoc_data.topics.topics.items())][:20]
  tokenizers.train_bpe(texts, 399, folder / 'made.json').save(folder)
  stated = workdir.read_json(folder / 'tokenizer_config.json')
  workdir.write_json(folder / 'tokenizer_config.json', stated | {'chat_template': '{{ messages }}'})
  workdir.write_json(folder / 'generation_config.json', {'eos_token_id': [0, 7]})
  return folder


@pytest.fixture(scope='module')
def stages(tmp_path_factory, plain):
  """{name: the folder of a stage} of fresh models."""
  def read(model):
    def params(mesh, rules, dtype):
      places = sharding.tree_shardings(mesh, model.abstract(), model.logical_axes(), rules)
      return jax.jit(model.init, out_shardings=places)(jax.random.key(1))
    return params

  folder = tmp_path_factory.mktemp('stages')
  for name, model in MODELS.items():
    source = pretrained.Source(name, model, plain, 64, read(model))
    pretrained.save_stage(source, source.params(), folder / name)
  return folder


@pytest.mark.parametrize('how', ['mean', 'copy_period'])
@pytest.mark.parametrize('name', MODELS)
def test_one_row_is_new_and_all_else_is_as_it_was(stages, tmp_path, name, how):
  source = pretrained.find(stages / name)
  folder = vocabulary.with_anchor_token(source, tmp_path / 'grown', how=how)
  grown = pretrained.find(folder)
  before, after = source.params(), grown.params()
  V = 410 if name == 'with rows to spare' else 399
  assert grown.model == dataclasses.replace(source.model, vocab_size=max(V, 400))
  [period] = anchors.punctuation_ids(source.tokenizer())
  for matrix in ('embed',) if name == 'tied' else ('embed', 'head'):
    old, new = np.asarray(before[matrix].pop('kernel')), np.asarray(after[matrix].pop('kernel'))
    assert new.dtype == np.float32
    others = np.delete(old, 399, axis=0) if V > 399 else old
    wanted = others.mean(axis=0, dtype=np.float64) if how == 'mean' else old[period]
    np.testing.assert_allclose(new[399], wanted, rtol=0, atol=1e-8 if how == 'mean' else 0)
    np.testing.assert_array_equal(np.delete(new, 399, axis=0), others)
  jax.tree.map(np.testing.assert_array_equal, after, before)


def test_text_without_anchors_is_read_as_before_and_anchors_can_be_read(stages, tmp_path):
  source = pretrained.find(stages / 'tied')
  grown = pretrained.find(vocabulary.with_anchor_token(source, tmp_path / 'grown', how='mean'))
  tokenizer = grown.tokenizer()
  assert (tokenizer.anchor_id, tokenizer.plain.digest) == (399, source.tokenizer().digest)
  [ids], [without] = (one.encode_batch([TEXT[:300]]) for one in (tokenizer, source.tokenizer()))
  assert tokenizer.decode(ids) == TEXT[:300] and 399 in ids
  run = lambda found, tokens: jax.jit(found.model.apply)(found.params(), tokens[None])
  np.testing.assert_allclose(run(grown, without)[..., :399], run(source, without), rtol=1e-5, atol=1e-6)
  model = dataclasses.replace(grown.model, anchors=tokenizer.anchors)
  assert jnp.isfinite(run(dataclasses.replace(grown, model=model), ids)).all()


def test_what_transformers_reads_goes_along(stages, tmp_path):
  import transformers
  grown = pretrained.find(vocabulary.with_anchor_token(pretrained.find(stages / 'tied'), tmp_path / 'a', how='mean'))
  assert workdir.read_json(grown.tokenizer_folder / 'generation_config.json') == {'eos_token_id': [0, 7]}
  theirs = transformers.AutoTokenizer.from_pretrained(grown.tokenizer_folder)
  assert theirs.chat_template == '{{ messages }}' and theirs.convert_tokens_to_ids('<AC>') == 399


@pytest.mark.parametrize('sizes', [dict(data=4), dict(fsdp=4), dict(fsdp=2, tensor=2)], ids=str)
def test_any_mesh_writes_the_same(stages, tmp_path, sizes):
  """399 rows divide by no mesh, 400 by these."""
  source, mesh = pretrained.find(stages / 'untied'), sharding.make_mesh(**sizes)
  alone = vocabulary.with_anchor_token(source, tmp_path / 'alone', how='mean')
  other = vocabulary.with_anchor_token(source, tmp_path / 'other', how='mean', mesh=mesh)
  params = pretrained.find(other).params(mesh=mesh)
  assert params['embed']['kernel'].sharding.shard_shape((400, 16)) == (
    400 // sizes.get('tensor', 1), 16 // sizes.get('fsdp', 1))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-8), params,
               pretrained.find(alone).params())


def test_rows_that_can_not_be_split_are_refused_before_anything_is_read(stages, tmp_path):
  source = dataclasses.replace(pretrained.find(stages / 'with rows to spare'), read=None)
  source = dataclasses.replace(source, model=dataclasses.replace(source.model, vocab_size=401))
  with pytest.raises(ValueError, match='its axis vocab of 401 cannot be split over mesh.tensor=2'):
    vocabulary.with_anchor_token(source, tmp_path / 'grown', how='mean', mesh=sharding.make_mesh(data=2, tensor=2))
  assert not (tmp_path / 'grown').exists()


def test_in_bfloat16_to_evaluate_in_half_the_memory(stages, tmp_path):
  found = pretrained.find(vocabulary.with_anchor_token(pretrained.find(stages / 'tied'), tmp_path / 'a', how='mean'))
  half, whole = found.params(dtype='bfloat16'), found.params()
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), half, whole)


def test_what_is_finished_is_left_and_what_was_interrupted_is_done_again(stages, tmp_path):
  source = pretrained.find(stages / 'tied')
  make = lambda: vocabulary.with_anchor_token(source, tmp_path / 'grown', how='mean')
  written = lambda: {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*') if path.is_file()}
  make()
  first, params = written(), pretrained.find(tmp_path / 'grown').params()
  make()
  assert written() == first
  stage = tmp_path / 'grown/stage.json'
  workdir.write_json(stage, workdir.read_json(stage) | {'finished': False})
  for digest in (tmp_path / 'grown/checkpoints/digests').iterdir():
    digest.unlink()
  make()
  assert workdir.read_json(stage)['finished']
  jax.tree.map(np.testing.assert_array_equal, pretrained.find(tmp_path / 'grown').params(), params)


def test_what_does_not_fit_is_refused(stages, tmp_path):
  source = pretrained.find(stages / 'tied')
  make = lambda folder='grown', how='mean', tokenizer=None, source=source: vocabulary.with_anchor_token(
    source, tmp_path / folder, how=how, tokenizer=tokenizer)
  make()
  with pytest.raises(ValueError, match="unknown first value of the anchor row 'median'"):
    make('other', how='median')
  with pytest.raises(ValueError, match=r'holds .*tied \+ <AC> \(mean\), not .*tied \+ <AC> \(copy_period\)'):
    make(how='copy_period')
  with pytest.raises(ValueError, match='with other anchors; give another folder'):
    make(tokenizer=tokenizers.with_anchor(source.tokenizer(), max_length=9))
  with pytest.raises(ValueError, match='do not fit: want that of the model, with an anchor'):
    make('other', tokenizer=source.tokenizer())
  text = json.loads((source.tokenizer_folder / 'tokenizer.json').read_text())
  text['model']['merges'].pop()
  (tmp_path / 'merges').mkdir()
  (tmp_path / 'merges/tokenizer.json').write_text(json.dumps(text))
  with pytest.raises(ValueError, match='do not fit: want that of the model, with an anchor'):
    make('other', tokenizer=tokenizers.with_anchor(tokenizers.load(tmp_path / 'merges')))
  with pytest.raises(ValueError, match='has anchors already'):
    make('other', source=pretrained.find(tmp_path / 'grown'))
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine/thesis.txt').write_text('years of work')
  with pytest.raises(ValueError, match='mine holds something else, not .*; give another folder'):
    make('mine')
  assert not (tmp_path / 'other').exists()
