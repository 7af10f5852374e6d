"""Laws of tokenizers: nothing of a text is lost, no text forges a special token, equal digests give equal ids."""

import io
import json
import shutil

import numpy as np
import pytest
import real_text
import tokenizers
import transformers

from datasel.data import tokenizer

TEXTS = [row['text'] for row in real_text.topics()]
HARD = ['', ' ', '\r\n\t\x00', 'naïve café 東京 😀 e\u0301 \u2028', '<|endoftext|> </s>',
        'def f(x):\n    return x  \n\n\n', 'a' * 5000]


@pytest.fixture(scope='module')
def bpe(tmp_path_factory):
  path = tmp_path_factory.mktemp('bpe') / 'tokenizer.json'
  tokenizer.train_bpe(TEXTS, 600, path)
  return path


@pytest.fixture(scope='module')
def piece(tmp_path_factory):
  import sentencepiece
  out = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(''.join(TEXTS).splitlines()), model_writer=out, vocab_size=500, byte_fallback=True,
      minloglevel=2, input_sentence_size=2000)
  path = tmp_path_factory.mktemp('piece') / 'tokenizer.model'
  path.write_bytes(out.getvalue())
  return path


def test_any_text_survives_encode_and_decode(bpe):
  encoder = tokenizer.load(bpe)
  for text, ids in zip(TEXTS + HARD, encoder.encode_batch(TEXTS + HARD), strict=True):
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert encoder.decode(ids) == text


def test_training_twice_gives_equal_bytes(bpe, tmp_path):
  again = tokenizer.train_bpe(TEXTS, 600, tmp_path / 'again.json')
  assert (tmp_path / 'again.json').read_bytes() == bpe.read_bytes()
  assert again.digest == tokenizer.load(bpe).digest
  assert tokenizer.train_bpe(TEXTS[1:], 600, tmp_path / 'other.json').digest != again.digest


def test_a_trained_tokenizer_ends_documents_and_does_not_begin_them(bpe):
  encoder = tokenizer.load(bpe)
  assert (encoder.vocab_size, encoder.bos_id, encoder.decode([encoder.eos_id])) == (600, None, '<|endoftext|>')


def test_text_can_not_forge_a_special_token(bpe, piece):
  for path in (bpe, piece):
    encoder = tokenizer.load(path)
    for ids in encoder.encode_batch([*HARD, '<s></s><|endoftext|>']):
      assert not {encoder.bos_id, encoder.eos_id} & set(ids.tolist())


def test_no_token_is_added_cut_or_padded(bpe, tmp_path):
  model = tokenizers.Tokenizer.from_file(str(bpe))
  model.post_processor = tokenizers.processors.TemplateProcessing(
      single='<|endoftext|> $A', special_tokens=[('<|endoftext|>', 0)])
  model.enable_truncation(4)
  model.enable_padding(length=50)
  model.save(str(tmp_path / 'tokenizer.json'))
  want, got = (tokenizer.load(path).encode_batch(TEXTS) for path in (bpe, tmp_path / 'tokenizer.json'))
  for a, b in zip(want, got, strict=True):
    np.testing.assert_array_equal(a, b)


def test_the_digest_does_not_depend_on_layout_or_place(bpe, tmp_path):
  (tmp_path / 'moved.json').write_text(json.dumps(json.loads(bpe.read_text()), indent=7))
  assert tokenizer.load(tmp_path / 'moved.json').digest == tokenizer.load(bpe).digest


def test_a_saved_tokenizer_loads_as_the_same(bpe, piece, tmp_path):
  for path in (bpe, piece):
    saved, encoder = tmp_path / path.suffix, tokenizer.load(path)
    encoder.save(saved)
    again = tokenizer.load(saved)
    assert (again.digest, again.vocab_size, again.bos_id, again.eos_id) == (
        encoder.digest, encoder.vocab_size, encoder.bos_id, encoder.eos_id)
    for a, b in zip(encoder.encode_batch(TEXTS), again.encode_batch(TEXTS)):
      np.testing.assert_array_equal(a, b)


def test_sentencepiece_ids_are_the_library_s(piece):
  import sentencepiece
  encoder, truth = tokenizer.load(piece), sentencepiece.SentencePieceProcessor(model_file=str(piece))
  assert (encoder.vocab_size, encoder.bos_id, encoder.eos_id) == (500, 1, 2)
  for text, ids in zip(TEXTS, encoder.encode_batch(TEXTS), strict=True):
    assert ids.tolist() == truth.encode(text)
    assert encoder.decode(ids) == truth.decode(ids.tolist())


def test_the_vocabulary_counts_added_tokens(bpe, tmp_path):
  model = tokenizers.Tokenizer.from_file(str(bpe))
  model.add_special_tokens(['<bos>'])
  model.save(str(tmp_path / 'tokenizer.json'))
  encoder = tokenizer.load(tmp_path / 'tokenizer.json')
  assert (encoder.vocab_size, encoder.bos_id, encoder.eos_id) == (601, 600, 0)


def test_what_stands_beside_the_file_has_the_word_on_special_tokens(bpe, tmp_path):
  shutil.copy(bpe, tmp_path / 'tokenizer.json')
  (tmp_path / 'special_tokens_map.json').write_text('{"eos_token": {"content": "a"}, "bos_token": "b"}')
  (tmp_path / 'tokenizer_config.json').write_text('{"bos_token": null}')
  for encoder in (tokenizer.load(tmp_path), tokenizer.load(tmp_path / 'tokenizer.json')):
    assert encoder.bos_id is None
    assert encoder.decode([encoder.eos_id]) == 'a'
    assert encoder.digest != tokenizer.load(bpe).digest
  (tmp_path / 'tokenizer_config.json').write_text('{"bos_token": "<absent>"}')
  with pytest.raises(ValueError, match="bos_token '<absent>'"):
    tokenizer.load(tmp_path)


def test_a_folder_in_another_form_is_read_as_transformers_reads_it(bpe, tmp_path):
  model = json.loads(bpe.read_text())['model']
  (tmp_path / 'vocab.json').write_text(json.dumps(model['vocab']))
  (tmp_path / 'merges.txt').write_text('#version: 0.2\n' + '\n'.join(' '.join(pair) for pair in model['merges']))
  (tmp_path / 'config.json').write_text('{"model_type": "gpt2"}')
  encoder, truth = tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert (encoder.bos_id, encoder.eos_id) == (truth.bos_token_id, truth.eos_token_id)
  for text, ids in zip(TEXTS[:5], encoder.encode_batch(TEXTS[:5])):
    assert ids.tolist() == truth.encode(text, add_special_tokens=False)


@pytest.mark.parametrize('name', ['missing.json', 'missing.model', './missing', '/nowhere/missing'])
def test_a_missing_file_is_not_looked_for_elsewhere(name):
  with pytest.raises(ValueError, match='no such file or folder'):
    tokenizer.load(name)


def test_a_name_that_can_not_be_had_is_refused(monkeypatch):
  import huggingface_hub.constants
  monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
  with pytest.raises(ValueError, match="'nobody/nothing' is neither a file here nor could Hugging Face give it"):
    tokenizer.load('nobody/nothing')


@pytest.mark.parametrize('name', ['tokenizer.json', 'tokenizer.model'])
def test_a_damaged_file_is_named(bpe, piece, tmp_path, name):
  source = bpe if name == bpe.name else piece
  (tmp_path / name).write_bytes(source.read_bytes()[:1000])
  with pytest.raises(ValueError, match=f'{name} is not a valid'):
    tokenizer.load(tmp_path / name)


def test_a_vocabulary_below_the_bytes_is_refused(tmp_path):
  with pytest.raises(ValueError, match='want at least 257'):
    tokenizer.train_bpe(TEXTS, 256, tmp_path / 'tokenizer.json')
