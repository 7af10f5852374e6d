"""A tokenizer with an anchor token between sentences: the text is unchanged, the model finds these anchors and no
others, and whatever reads tokenizers reads it."""

import io
import json
import pydoc_data.topics
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import sentencepiece
import tokenizers
import transformers

from datasel import prepare, workdir
from datasel.data import demo, demo_archives
from datasel.data import tokenizer as tokenizer_lib
from datasel.data.store import Store
from datasel.methods.anllm import anchors

TOPICS = [text for _, text in sorted(pydoc_data.topics.topics.items())]
TEXTS = [*TOPICS[:25], 'The cat sat. It slept!\n\nDid it dream?\n\tNo one knows.  Pi is 3.14. "Yes." He left.\n',
         'One.', 'no end', 'Ends. ', ' Leads. Follows.', 'Ünïcode 世界. 🙂 Second.\nThird line. \u2028 Fourth',
         'So <AC>. It </s> is <|endoftext|>. <AC>\n\n<AC>']
LENGTHS = [{}, {'trailing': True}, {'min_length': 6}, {'max_length': 12}, {'min_length': 5, 'max_length': 12}]


@pytest.fixture(scope='module')
def bases(tmp_path_factory):
  """Tokenizers without anchors: a byte-level BPE, with and without bos; sentencepiece ones, with their own bos and eos,
  that keep white space (as Llama's, and as a tokenizer.json of the same) or normalise text."""
  folder = tmp_path_factory.mktemp('bases')
  common = dict(byte_fallback=True, minloglevel=2, hard_vocab_limit=False, vocab_size=600)
  llama = dict(model_type='bpe', normalization_rule_name='identity', remove_extra_whitespaces=False,
               allow_whitespace_only_pieces=True)
  for name, given in (('llama', llama), ('normalising', {})):
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(''.join(TOPICS[:25]).splitlines()),
                                             model_writer=out, **common, **given)
    (folder / f'{name}.model').write_bytes(out.getvalue())
  tokenizer_lib.train_bpe(TOPICS[:25], 600, folder / 'bytes/tokenizer.json')
  tokenizer_lib.train_bpe(TOPICS[:25], 600, folder / 'bos/tokenizer.json').save(folder / 'bos')
  workdir.write_json(folder / 'bos/tokenizer_config.json', {'bos_token': '!', 'eos_token': None})
  prefixed = tokenizers.Tokenizer.from_file(str(folder / 'bytes/tokenizer.json'))
  prefixed.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
  (folder / 'prefixed.json').write_text(prefixed.to_str())
  return {name: tokenizer_lib.load(folder / file) for name, file in (
    ('bytes', 'bytes'), ('bos', 'bos'), ('llama', 'llama.model'), ('normalising', 'normalising.model'),
    ('prefixed', 'prefixed.json'))}


ALL = ('bytes', 'bos', 'llama', 'normalising', 'prefixed')


@pytest.mark.parametrize('given', LENGTHS, ids=str)
@pytest.mark.parametrize('name', ALL)
def test_the_anchors_are_those_that_the_model_finds_and_the_text_is_unchanged(bases, name, given):
  base = bases[name]
  encoder = tokenizer_lib.with_anchor(base, **given)
  assert (encoder.anchor_id, encoder.vocab_size) == (base.vocab_size, base.vocab_size + 1)
  for text, ids, plain in zip(TEXTS, encoder.encode_batch(TEXTS), base.encode_batch(TEXTS), strict=True):
    assert ids.dtype == np.int32
    whole = np.array([*([] if base.bos_id is None else [base.bos_id]), *ids,
                      *([] if base.eos_id is None else [base.eos_id])])
    found, _ = anchors.flags(whole[None], encoder.anchors)
    np.testing.assert_array_equal(found[0], whole == encoder.anchor_id)
    assert encoder.decode(ids) == base.decode(plain)
    if name in ('bytes', 'bos'):
      assert encoder.decode(ids) == text
    if given in ({}, {'trailing': True}):
      assert (ids == encoder.anchor_id).sum() == len(anchors.split_sentences(text)) - (not given)


def test_by_hand(bases):
  encoder = tokenizer_lib.with_anchor(bases['bytes'])
  [ids] = encoder.encode_batch(['One. Two!\n\nIs it <AC>? No'])
  assert encoder.decode(ids) == 'One. Two!\n\nIs it <AC>? No'
  assert encoder.decode(ids, show_anchors=True) == 'One.<AC> Two!<AC>\n\nIs it <AC>?<AC> No'
  assert encoder.decode([600, 600], show_anchors=True) == '<AC><AC>' and encoder.decode([600, 600]) == ''
  assert bases['bytes'].anchor_id is None and bases['bytes'].anchors is None
  assert encoder.anchors == anchors.Rule((600,))


def test_shown_anchors_do_not_eat_the_space_behind_them(bases):
  encoder = tokenizer_lib.with_anchor(bases['llama'])
  [ids] = encoder.encode_batch(['The class. The name.\nThe end.  Two'])
  assert encoder.decode(ids, show_anchors=True) == 'The class.<AC> The name.<AC>\nThe end.<AC>  Two'


@pytest.mark.parametrize('name', ALL)
def test_text_can_not_forge_an_anchor(bases, name):
  encoder = tokenizer_lib.with_anchor(bases[name])
  for ids in encoder.encode_batch(['<AC>', 'a <AC> b', '<AC><AC>', '<AC>\n' * 3]):
    assert encoder.decode(ids).count('<AC>') == encoder.decode(ids, show_anchors=True).count('<AC>') - sum(
      ids == encoder.anchor_id)
    assert sum(ids == encoder.anchor_id) in (0, 2)  # two for the three lines


@pytest.mark.parametrize('name', ALL)
def test_a_saved_one_loads_as_the_same_and_knows_what_it_was_made_of(bases, name, tmp_path):
  base, digests = bases[name], set()
  for n, given in enumerate(LENGTHS):
    encoder = tokenizer_lib.with_anchor(base, **given)
    encoder.save(tmp_path / f'{n}')
    tokenizer_lib.copy(tmp_path / f'{n}', tmp_path / f'{n}-copied')
    for again in (tokenizer_lib.load(tmp_path / f'{n}'), tokenizer_lib.load(tmp_path / f'{n}-copied')):
      assert (again.digest, again.vocab_size, again.anchor_id, again.anchors, again.bos_id, again.eos_id) == (
        encoder.digest, encoder.vocab_size, encoder.anchor_id, encoder.anchors, base.bos_id, base.eos_id)
      for a, b in zip(encoder.encode_batch(TEXTS), again.encode_batch(TEXTS), strict=True):
        np.testing.assert_array_equal(a, b)
      assert (again.plain.digest, again.plain.vocab_size) == (base.digest, base.vocab_size)
      assert again.plain.anchor_id is None and again.plain.plain is not again
    digests.add(encoder.digest)
  assert len(digests | {base.digest}) == len(LENGTHS) + 1
  base.save(tmp_path / '0')  # over one with anchors
  assert tokenizer_lib.load(tmp_path / '0').digest == base.digest


@pytest.mark.parametrize('name', ['bytes', 'llama', 'normalising'])
def test_transformers_reads_the_folder_and_leaves_anchors_out(bases, name, tmp_path):
  """It knows the token, and puts none between sentences."""
  encoder = tokenizer_lib.with_anchor(bases[name])
  encoder.save(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert len(theirs) == encoder.vocab_size
  assert theirs.convert_tokens_to_ids('<AC>') == encoder.anchor_id
  text = 'The class. The name. It is'
  [ids] = encoder.encode_batch([text])
  assert theirs.decode(ids, skip_special_tokens=True).strip() == text
  if name == 'bytes':
    assert theirs(TEXTS[:25])['input_ids'] == [x.tolist() for x in encoder.plain.encode_batch(TEXTS[:25])]


def test_a_special_token_of_that_spelling_is_the_anchor(bases, tmp_path):
  bases['bytes'].save(tmp_path)
  model = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
  model.add_special_tokens(['<AC>', '<after>'])
  model.save(str(tmp_path / 'tokenizer.json'))
  base = tokenizer_lib.load(tmp_path)
  encoder = tokenizer_lib.with_anchor(base)
  assert (encoder.anchor_id, encoder.vocab_size, encoder.plain.digest) == (600, 602, base.digest)
  encoder.save(tmp_path / 'saved')
  again = tokenizer_lib.load(tmp_path / 'saved')
  assert (again.digest, again.anchor_id, again.plain.digest) == (encoder.digest, 600, base.digest)


def test_what_can_not_take_an_anchor_is_refused(bases, tmp_path):
  base = bases['bytes']
  encoder = tokenizer_lib.with_anchor(base)
  with pytest.raises(ValueError, match='has anchors already'):
    tokenizer_lib.with_anchor(encoder)
  with pytest.raises(ValueError, match='max_length 1 leaves no room'):
    tokenizer_lib.with_anchor(base, max_length=1)
  with pytest.raises(ValueError, match='min_length 0'):
    tokenizer_lib.with_anchor(base, min_length=0)
  with pytest.raises(ValueError, match='max_length 3'):
    tokenizer_lib.with_anchor(base, min_length=4, max_length=3)
  base.save(tmp_path)
  parsed = workdir.read_json(tmp_path / 'tokenizer.json')
  for vocabulary in ({'<AC>': 600}, {'gap': 601}):
    model = parsed['model'] | {'vocab': parsed['model']['vocab'] | vocabulary}
    (tmp_path / 'tokenizer.json').write_text(json.dumps(parsed | {'model': model}))
    with pytest.raises(ValueError, match='cannot take <AC> as a token: its ids have gaps, or it has one'):
      tokenizer_lib.with_anchor(tokenizer_lib.load(tmp_path))


@pytest.mark.parametrize('change, message', [
  ({'min_length': 0}, 'anchors.json is damaged .*min_length 0'),
  ({'max_length': '7'}, "anchors.json is damaged .*max_length '7'"),
  ({'trailing': None}, "anchors.json is damaged: it says .*'trailing': None.*want such as"),
  ({'more': 1}, "anchors.json is damaged: it says .*'more': 1"),
  ({'split': 2}, 'anchors.json is of another version: .*split 2, want'),
  ({'token': '<s>'}, "anchors.json is of another version: token '<s>'"),
], ids=str)
def test_a_damaged_file_is_named(bases, tmp_path, change, message):
  tokenizer_lib.with_anchor(bases['bytes']).save(tmp_path)
  file = tmp_path / 'anchors.json'
  workdir.write_json(file, workdir.read_json(file) | change)
  with pytest.raises(ValueError, match=message):
    tokenizer_lib.load(tmp_path)


def test_a_file_beside_another_tokenizer_is_named(bases, tmp_path):
  tokenizer_lib.with_anchor(bases['bytes']).save(tmp_path)
  stated = (tmp_path / 'anchors.json').read_text()
  bases['bytes'].save(tmp_path)
  (tmp_path / 'anchors.json').write_text(stated)
  with pytest.raises(ValueError, match='anchors.json does not fit tokenizer.json beside it, where <AC> is token None'):
    tokenizer_lib.load(tmp_path)
  (tmp_path / 'anchors.json').write_text(stated[:20])
  with pytest.raises(ValueError, match='anchors.json is not valid JSON'):
    tokenizer_lib.load(tmp_path)


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  folder = tmp_path_factory.mktemp('corpus')
  for n in range(3):
    path = folder / f'train/pydocs-{n}.jsonl'
    path.parent.mkdir(exist_ok=True)
    path.write_text(''.join(json.dumps({'id': f'{n}/{i}', 'text': text}) + '\n'
                            for i, text in enumerate(TOPICS[:40][n::3])))
  return folder


def test_prepare_takes_it_as_any_other(bases, corpus, tmp_path):
  """With two worker processes; the records of truncated documents begin where the documents do."""
  base = bases['bytes']
  encoder = tokenizer_lib.with_anchor(base, max_length=40)
  encoder.save(tmp_path / 'tokenizer')
  base.save(tmp_path / 'plain')
  given = dict(length=96, holdout=0.3, packing='truncate')
  store = prepare.prepare(corpus, tmp_path / 'store', tmp_path / 'tokenizer', workers=2, **given)
  prepare.prepare(corpus, tmp_path / 'alone', tmp_path / 'tokenizer', **given)
  plain = prepare.prepare(corpus, tmp_path / 'store-plain', tmp_path / 'plain', **given)
  assert store.digest == Store(tmp_path / 'alone').digest != plain.digest
  assert (store.vocab_size, plain.vocab_size) == (601, 600)
  assert tokenizer_lib.load(store.path).digest == encoder.digest == store.tokenizer['digest']
  rows = np.arange(store.sizes('train')[0])
  batch, without = (one.read('train', np.zeros_like(rows), rows) for one in (store, plain))
  found, _ = anchors.flags(batch['tokens_BxL'], encoder.anchors, batch['segment_BxL'])
  real = batch['segment_BxL'] > 0
  np.testing.assert_array_equal(found, (batch['tokens_BxL'] == encoder.anchor_id) & real)
  assert found.any(axis=1).mean() > 0.9
  for n in rows:
    text, other = (one.decode(row['tokens_BxL'][n][row['segment_BxL'][n] > 0])
                   for one, row in ((encoder, batch), (base, without)))
    assert other.startswith(text[:-1])  # the last character may be cut


def test_the_command_makes_one_once(bases, tmp_path):
  bases['bytes'].save(tmp_path / 'plain')
  command = [sys.executable, '-m', 'datasel.prepare', 'anchor-tokenizer', '--tokenizer', tmp_path / 'plain', '--out',
             tmp_path / 'made', '--max_length', '30', '--trailing']
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert done.stdout == f'{tmp_path / "made"}: token 600 <AC> of 601\n'
  wanted = tokenizer_lib.with_anchor(bases['bytes'], max_length=30, trailing=True)
  assert tokenizer_lib.load(tmp_path / 'made').digest == wanted.digest
  assert prepare.anchor_tokenizer(tmp_path / 'plain', tmp_path / 'made', max_length=30, trailing=True).anchor_id == 600
  for out, given in (('made', {}), ('plain', {'max_length': 30, 'trailing': True})):
    with pytest.raises(ValueError, match=f'{out} holds something else; give another --out'):
      prepare.anchor_tokenizer(tmp_path / 'plain', tmp_path / out, **given)


MISTRAL = demo_archives.Archive('mistral-common', '1.13.1', 'mistral_common-1.13.1-py3-none-any.whl', 6589302,
                                '98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af')


def smollm2(folder):
  from datasel import pretrained
  return pretrained.find('demo:smollm2').tokenizer_folder, {'.': 30, '!': 17, '?': 47, ',': 28}


def gpt2(folder):
  return demo.tokenizer_gpt2(), {'.': 13, '!': 0, '?': 30, ',': 11}


def mistral(folder):
  with demo_archives.locked(demo_archives.cache_folder()):
    wheel = demo_archives.fetch_archive(MISTRAL, demo_archives.cache_folder())
  with zipfile.ZipFile(wheel) as z:
    [name] = [name for name in z.namelist() if name.endswith('/tokenizer.model.v1')]
    (folder / 'tokenizer.model').write_bytes(z.read(name))
  model = sentencepiece.SentencePieceProcessor(model_file=str(folder / 'tokenizer.model'))
  return folder, {symbol: model.piece_to_id(symbol) for symbol in '.!?,'} | {'.': 28723}


@pytest.mark.needs_demo_data
@pytest.mark.parametrize('find', [smollm2, gpt2, mistral], ids=lambda f: f.__name__)
def test_real_tokenizers(find, tmp_path):
  """Ids as they are published; a segment of English ends at its period, and not inside '3.14'."""
  path, ids = find(tmp_path)
  base = tokenizer_lib.load(path)
  assert anchors.punctuation_ids(base, ids) == tuple(ids.values())
  [tokens] = base.encode_batch(['The U.S. has 3.14 cats... It slept.\nNo'])
  found, _ = anchors.flags(tokens[None], anchors.Rule(anchors.punctuation_ids(base)))
  closed = [base.decode(tokens[:at + 1]) for at in np.flatnonzero(found[0])]
  assert 'The U.S. has 3.14 cats... It slept.' in closed and 'The U.S. has 3.14 cats...' not in closed
  encoder = tokenizer_lib.with_anchor(base)
  assert encoder.anchor_id == base.vocab_size == {'smollm2': 49152, 'gpt2': 50257, 'mistral': 32000}[find.__name__]
  for text, with_anchors in zip(TEXTS, encoder.encode_batch(TEXTS), strict=True):
    assert encoder.decode(with_anchors) == text
    assert sum(with_anchors == encoder.anchor_id) == len(anchors.split_sentences(text)) - 1
  encoder.save(tmp_path / 'saved')
  assert tokenizer_lib.load(tmp_path / 'saved').digest == encoder.digest
