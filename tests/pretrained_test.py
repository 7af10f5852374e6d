"""Models from anywhere: a run's exported and loaded again, to the bit; a real one whose figures are known."""

import collections
import io
import json
import math
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
import sentencepiece
import small_run
import torch
import transformers

from datasel import export, load, main, metrics, pretrained, workdir
from datasel.data import demo, demo_archives, tokenizer

pytestmark = pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """FOLDER/{run,exported,loaded}: a finished run, its model as a Hugging Face folder, and that as a stage again."""
  folder = tmp_path_factory.mktemp('made')
  small_run.make_store(folder)
  config = small_run.write_config(folder / 'config.py', folder / 'store')
  assert main.main([f'--config={config}', f'--workdir={folder / "run"}']) == 0
  export.export(str(folder / 'run/main'), str(folder / 'exported'))
  load.load(str(folder / 'exported'), str(folder / 'loaded'))
  return folder


def test_a_run_exported_and_loaded_again_is_the_same_to_the_bit(made):
  stages = [pretrained.find(made / name) for name in ('run/main', 'exported', 'loaded')]
  params = [stage.params() for stage in stages]
  for other in params[1:]:
    jax.tree.map(np.testing.assert_array_equal, other, params[0])
  assert len({stage.tokenizer().digest for stage in stages}) == 1
  assert {stage.max_length for stage in stages} == {small_run.LENGTH}


def test_transformers_reads_an_exported_run_as_we_do(made):
  text = (made / 'corpus/train/pydocs.jsonl').read_text()[:200]
  found = pretrained.find(made / 'run/main')
  ids = found.tokenizer().encode_batch([text])[0]
  theirs = transformers.AutoTokenizer.from_pretrained(made / 'exported')
  assert theirs(text)['input_ids'] == ids.tolist()
  assert theirs.eos_token_id == found.tokenizer().eos_id and theirs.decode(ids) == text
  model = transformers.AutoModelForCausalLM.from_pretrained(made / 'exported').eval()
  with torch.no_grad():
    wanted = model(torch.tensor(ids[None, :32], dtype=torch.int64)).logits.numpy()
  np.testing.assert_allclose(found.model.apply(found.params(), ids[None, :32]), wanted, rtol=1e-5, atol=1e-5)
  assert model.generation_config.eos_token_id == theirs.eos_token_id


def test_a_sentencepiece_tokenizer_is_exported_as_it_is(made, tmp_path):
  text = (made / 'corpus/train/pydocs.jsonl').read_text()
  out = io.BytesIO()
  # As Llama's and Mistral's: nothing normalised, runs of spaces among the pieces.
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(json.loads(line)['text'][:4000] for line in text.splitlines()[:200]), model_writer=out,
    vocab_size=390, model_type='bpe', hard_vocab_limit=False, byte_fallback=True, normalization_rule_name='identity',
    remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2)
  shutil.copytree(made / 'exported', tmp_path / 'model', ignore=shutil.ignore_patterns('*token*'))
  (tmp_path / 'model/tokenizer.model').write_bytes(out.getvalue())
  stated = {'tokenizer_class': 'LlamaTokenizer', 'add_bos_token': True, 'bos_token': '<s>', 'eos_token': '</s>'}
  workdir.write_json(tmp_path / 'model/tokenizer_config.json', stated)
  export.export(str(tmp_path / 'model'), str(tmp_path / 'out'))
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
  truth = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
  for probe in (text[:20_000], '    return  x\n\n\t y ', ' two', ' ', 'naïve 日本語 🎉'):
    ids = theirs(probe)['input_ids']
    assert ids == [truth.bos_id(), *truth.encode(probe)]
    assert theirs.decode(ids[1:]) == probe
  assert theirs.eos_token_id == truth.eos_id()
  export.export(str(tmp_path / 'out'), str(tmp_path / 'again'))  # now from its tokenizer.json
  again = transformers.AutoTokenizer.from_pretrained(tmp_path / 'again')
  assert again(text[:20_000])['input_ids'] == theirs(text[:20_000])['input_ids']


def test_generation_settings_of_the_source_are_kept(made, tmp_path):
  """Through a stage and back: a chat model may end on several tokens."""
  shutil.copytree(made / 'exported', tmp_path / 'model')
  file = tmp_path / 'model/generation_config.json'
  workdir.write_json(file, workdir.read_json(file) | {'eos_token_id': [0, 7], 'temperature': 0.6, 'do_sample': True})
  load.load(str(tmp_path / 'model'), str(tmp_path / 'stage'))
  export.export(str(tmp_path / 'stage'), str(tmp_path / 'out'))
  assert workdir.read_json(tmp_path / 'out/generation_config.json') == workdir.read_json(file)


def test_a_bare_tokenizer_file_is_exported_with_its_end_of_text(made, tmp_path):
  (tmp_path / 'bare').mkdir()
  shutil.copy(made / 'exported/tokenizer.json', tmp_path / 'bare')
  export.export(str(made / 'exported'), str(tmp_path / 'out'), tokenizer=str(tmp_path / 'bare'))
  assert transformers.AutoTokenizer.from_pretrained(tmp_path / 'out').eos_token == tokenizer.END


def test_a_load_that_was_killed_is_done_again(made, tmp_path):
  shutil.copytree(made / 'loaded', tmp_path / 'loaded')
  stage = tmp_path / 'loaded/stage.json'
  workdir.write_json(stage, workdir.read_json(stage) | {'finished': False})
  shutil.rmtree(tmp_path / 'loaded/checkpoints/digests')  # after the parameters were written, before they were proven
  load.load(str(made / 'exported'), str(tmp_path / 'loaded'))
  jax.tree.map(np.testing.assert_array_equal, pretrained.find(tmp_path / 'loaded').params(),
               pretrained.find(made / 'exported').params())
  assert workdir.read_json(stage)['finished']


def test_a_refused_export_leaves_nothing(made, tmp_path):
  shutil.copytree(made / 'exported', tmp_path / 'model')
  tensors = safetensors.numpy.load_file(tmp_path / 'model/model.safetensors')
  next(iter(tensors.values())).flat[0] = np.nan
  safetensors.numpy.save_file(tensors, tmp_path / 'model/model.safetensors')
  with pytest.raises(ValueError, match='not finite'):
    export.export(str(tmp_path / 'model'), str(tmp_path / 'out'))
  assert [path.name for path in tmp_path.iterdir()] == ['model']


def test_training_goes_on_from_a_loaded_model(made):
  arguments = [f'--config=configs/pretrain/continued.py:{made / "loaded"}', f'--workdir={made / "continued"}',
               f'--config.data.store={made / "store"}', f'--config.data.length={small_run.LENGTH}',
               '--config.data.block=4096', '--config.train.steps=2', '--config.train.eval_sequences=4']
  assert main.main(arguments) == 0
  began = metrics.read(made / 'continued', kind='eval')[0]
  ended = metrics.read(made / 'run', kind='eval')[-1]
  assert began['step'] == 0 and began['nll'] == pytest.approx(ended['nll'], rel=1e-5)


def test_a_start_that_would_compute_something_else_is_refused(made, capsys):
  arguments = [f'--config=configs/pretrain/continued.py:{made / "loaded"}', f'--workdir={made / "other"}',
               f'--config.data.store={made / "store"}', f'--config.data.length={small_run.LENGTH}']
  assert main.main([*arguments, '--config.model.rope_theta=5e5', '--dry_run']) == 2
  assert 'belong to another function: rope_theta 500000.0 (there: 10000.0)' in capsys.readouterr().err


@pytest.mark.parametrize(('source', 'message'), [
  ('run', 'is a whole run; name one of its models: .*run/main'),
  ('store', 'has no config.json'),
  ('no such/na me', 'neither a folder here nor a name'),
  ('demo:nothing', 'there is demo:smollm2'),
])
def test_what_is_no_model_is_refused(made, source, message):
  with pytest.raises(ValueError, match=message):
    pretrained.find(made / source if (made / source).exists() else source)


def test_a_name_of_the_hub_that_cannot_be_reached_is_refused_at_once():
  code = 'from datasel import load; load.main(["Data-Selection/PDS-160M", "--out=/nowhere/x"])'
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False,
                        env={'HF_HUB_OFFLINE': '1', 'HF_HOME': '/nowhere', 'JAX_PLATFORMS': 'cpu', 'PATH': '/usr/bin'})
  assert done.returncode == 1
  assert "datasel.load: the Hugging Face hub did not give 'Data-Selection/PDS-160M'" in done.stderr


def test_models_kept_under_revisions_want_one_named():
  with pytest.raises(ValueError, match=r"choose a --revision matching 'seed-\[1-5\]'"):
    pretrained.find('sail/data-mixture-regmix-1b')


def test_nothing_is_overwritten(made, tmp_path):
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine/thesis.txt').write_text('years of work')
  for call in (lambda: export.export(str(made / 'run/main'), str(tmp_path / 'mine')),
               lambda: load.load(str(made / 'exported'), str(tmp_path / 'mine')),
               lambda: load.load(str(made / 'run/main'), str(made / 'loaded'))):
    with pytest.raises(ValueError, match='give another --out'):
      call()
  assert 'parameters' in load.load(str(made / 'exported'), str(made / 'loaded'))  # the same one: nothing to do


def test_another_tokenizer_than_the_models_is_refused(made):
  with pytest.raises(ValueError, match='is not the tokenizer that .* was trained with'):
    other = made / 'other_tokenizer'
    other.mkdir()
    text = json.loads((made / 'tokenizer.json').read_text())
    text['model']['merges'] = text['model']['merges'][:-1]
    text['model']['vocab'].popitem()
    workdir.write_json(other / 'tokenizer.json', text)
    pretrained.find(made / 'run/main', tokenizer=other)
  with pytest.raises(ValueError, match='with another tokenizer; give another --out'):
    load.load(str(made / 'exported'), str(made / 'loaded'), tokenizer=str(made / 'other_tokenizer'))


@pytest.fixture(scope='module')
def smollm2():
  """SmolLM2-135M-Instruct, 4-bit, as a package brings it."""
  found = pretrained.find('demo:smollm2')
  return found, found.params()


# Bits per byte of the first document above 600 characters, its first 255 tokens after <|endoftext|>: what an
# independent forward pass in plain JAX gave for the same file.
BITS_PER_BYTE = {'wiki': 0.765, 'c4': 0.904, 'math': 0.768, 'news': 1.07, 'noisy_web': 2.64}


@pytest.mark.needs_demo_data
def test_smollm2_predicts_every_kind_of_text_as_well_as_is_known(smollm2):
  found, params = smollm2
  tokenizer, nll = found.tokenizer(), jax.jit(found.model.token_nll)
  got = {}
  for source in demo.SETS['lean'].sources:
    if source.domain in BITS_PER_BYTE:
      documents = source.load(demo_archives.archive(source.package), collections.Counter())
      text = next(text for _, text in documents if len(text) > 600)[:2500]
      ids = np.concatenate([[0], tokenizer.encode_batch([text])[0]])[:256].astype(np.int32)
      batch = {'tokens_BxL': ids[None, :-1], 'targets_BxL': ids[None, 1:]}
      got[source.domain] = float(nll(params, batch).sum()) / math.log(2) / len(tokenizer.decode(ids[1:]).encode())
  assert got == pytest.approx(BITS_PER_BYTE, abs=0.005)


@pytest.mark.needs_demo_data
def test_smollm2_answers(smollm2):
  found, params = smollm2
  chat = transformers.AutoTokenizer.from_pretrained(found.tokenizer_folder)
  prompt = '<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n'
  ids = chat(prompt, add_special_tokens=False)['input_ids']
  length, apply = 32, jax.jit(found.model.apply)
  while ids[-1] != chat.eos_token_id and len(ids) < length:
    logits = apply(params, np.array([ids + [0] * (length - len(ids))], np.int32))
    ids.append(int(logits[0, len(ids) - 1].argmax()))
  assert 'The capital of France is Paris.' in chat.decode(ids)
