"""Pages of synthetic sites with exact programs, their tokenizer, and a refiner trained in a run of its own."""

import dataclasses
import random

import jax

from datasel import build, sharding
from datasel import config as config_lib
from datasel.data import tokenizer as tokenizers
from datasel.methods.prox import examples, programs, sft
from datasel.methods.prox.examples import Example
from datasel.models.mistral import Mistral

_WORDS = 'tall river moss stone light grain early walked under garden slow wind carried paper old harbour'.split()
_NAV = ['Home | {s} | About', 'Menu | {s} | Contact', 'Login | {s} | Search']
_URL = ['http://{s}.org/{w}', 'http://www.{s}.net/{w}']
_FOOTER = ['Copyright {s} 2020', 'Share {s} on Facebook', 'Powered by {s}']


def sentence(rng, site):
  return ' '.join(rng.choice([*_WORDS, site]) for _ in range(3)) + '.'


def chunk(rng, site):
  """Lines, and whether each is noise: a menu before, a link and a footer after."""
  lines = [(sentence(rng, site), False) for _ in range(rng.randint(1, 3))]
  for place, templates in ((0, _NAV), (len(lines) + 1, _URL), (len(lines) + 2, _FOOTER)):
    if rng.random() < 0.4:
      lines.insert(place, (rng.choice(templates).format(s=site, w=rng.choice(_WORDS)), True))
  return [line for line, _ in lines], [noise for _, noise in lines]


def program(noise, start):
  """Removes the lines marked as noise."""
  calls, n = [], 0
  while n < len(noise):
    stop = n
    while stop < len(noise) and noise[stop]:
      stop += 1
    if stop > n:
      calls.append(programs.RemoveLines(start + n, start + stop - 1))
    n = max(stop, n + 1)
  return programs.serialise(calls or [programs.KeepChunk()])


def write(folder, n_train, n_other, *, seed=0):
  """Examples of both tasks; every site is in one split."""
  rng, chosen = random.Random(seed), {}
  for split, n in (('train', n_train), ('validation', n_other), ('test', n_other)):
    rows = {'document': [], 'chunk': []}
    for i in range(n):
      site = f'{split[:2]}{rng.choice("bdfgkl")}{rng.choice("aeiou")}{rng.choice("mnprst")}'
      lines, noise = chunk(rng, site)
      rows['chunk'].append(Example(f'{split}-{i}', site, '\n'.join(lines), 0, program(noise, 0)))
      keep = rng.random() < 0.5
      body = [sentence(rng, site) for _ in range(3)] if keep else [
        rng.choice(rng.choice([_NAV, _URL, _FOOTER])).format(s=site, w=rng.choice(_WORDS)) for _ in range(3)]
      rows['document'].append(Example(f'{split}-d{i}', site, '\n'.join(body), 0,
                                      'keep_doc()' if keep else 'drop_doc()'))
    chosen[split] = rows
  examples.write(folder, chosen, {'annotator': 'synthetic'})
  return folder


def tokenizer(folder):
  """Byte-level, of the examples' texts, labels and programs."""
  found = [one for task in examples.TASKS for one in examples.read(folder, 'train', task)]
  texts = [one.text for one in found] + [one.program for one in found] + [
    '[doc]\n' + '\n'.join(f'[{n:03d}]' for n in range(12)) + '\n[/doc]\n'] * 20
  return tokenizers.train_bpe(texts, 420, folder / 'tokenizer.json')


MODEL = Mistral(vocab_size=420, n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=128, tied=True,
                init_std=0.05, remat='none', attention='reference')


def config(**changed):
  """(config of a run, section of the refiner)."""
  whole = config_lib.base('pretrain')
  whole.data.block, whole.tracking.tensorboard = 4096, False
  whole.train.log_every, whole.train.checkpoint_every = 20, 1000
  optimizer = whole.optimizer.to_dict() | {'peak_lr': 3e-3, 'end_lr': 3e-4}
  whole.prox = {'epochs': 2, 'batch_size': 16, 'microbatches': 1, 'length': 160, 'template': 'plain',
                'max_new_tokens': 64, 'validation': 0, 'optimizer': optimizer}
  whole.update_from_flattened_dict({f'prox.{key}': value for key, value in changed.items()})
  return whole, whole.prox


def train(directory, task, folder, *, model=MODEL, init='', checkpoint_every=1000, devices=1, **changed):
  """`sft.train` in a run of its own."""
  whole, section = config(**changed)
  whole.train.checkpoint_every = checkpoint_every
  whole.mesh.fsdp = 2 if devices > 1 else 1
  with build.begin(whole, directory, None, 1e9) as run:
    run = dataclasses.replace(run, mesh=sharding.make_mesh(fsdp=min(devices, 2), devices=jax.devices()[:devices]))
    return sft.train(run, task, folder, section, None if init else model,
                     tokenizer=None if init else tokenizers.load(folder / 'tokenizer.json'), init=init)
