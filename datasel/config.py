"""The common part of every config file, and the checks that a resolved config must pass.

A config file's `get_config(arg)` begins with `base(method)`, sets what its paper sets, and ends with `finish(config,
arg)`, which makes the `:smoke` form.  Every key exists in the file that is run: overrides of other keys are refused.
"""

import dataclasses
import difflib
import math
import pathlib
from typing import Any

import ml_collections
from ml_collections import config_dict

from datasel import sharding, trackers, workdir
from datasel.models.mistral import Mistral
from datasel.models.presets import PRESETS


def base(method: str) -> ml_collections.ConfigDict:
  """The keys that all methods share, with the values of a small run."""
  config = ml_collections.ConfigDict()
  config.method = method
  config.seed = 0
  config.profile_steps = 0  # steps to trace with the JAX profiler, from the sixth of each stage; 0: none

  config.data = ml_collections.ConfigDict()
  config.data.store = ''  # token store made by `python -m datasel.prepare`
  config.data.selection = ''  # a selection.npz of that store, as PDS makes it: train on its records alone; '': on all
  config.data.demo = ''  # without a store: 'lean', 'default' or 'offline', fetched, tokenised and packed first
  config.data.length = 1024  # tokens of a sequence; must be the store's
  config.data.tokenizer = ''  # name or file, or 'demo:smollm2': the store must have been made with it; '': any
  config.data.verify = 'full'  # 'full': sha256 of every shard before the run; 'size': their sizes only
  config.data.prefetch = 2  # batches read ahead
  config.data.block = 65536  # sequences in which the mixture is met exactly

  config.model = model('laptop')

  config.optimizer = optimizer()

  config.train = ml_collections.ConfigDict()
  config.train.steps = 1000
  config.train.batch_size = 16  # sequences, over all devices
  config.train.microbatches = 1  # parts of a batch computed one after another
  config.train.log_every = 10  # steps
  config.train.checkpoint_every = 100  # steps
  config.train.keep_checkpoints = 2
  config.train.eval_every = 100  # steps; 0: at the end only
  config.train.eval_sequences = 0  # held-out sequences per domain; 0: all
  config.train.init_from = ''  # checkpoints/ folder of a finished stage whose parameters to start from; empty: fresh

  config.mesh = ml_collections.ConfigDict()
  config.mesh.data = -1  # -1: whatever devices the others leave
  config.mesh.fsdp = 1
  config.mesh.tensor = 1

  # Which mesh axes split each logical axis of parameters and activations, joined by commas; '': not split.
  config.sharding = ml_collections.ConfigDict(sharding.rules_table())

  config.tracking = ml_collections.ConfigDict()
  config.tracking.csv = False  # WORKDIR/metrics/STAGE-KIND.csv
  config.tracking.tensorboard = True
  config.tracking.wandb_project = ''  # empty: no Weights & Biases
  config.tracking.trackio_project = ''  # empty: no Trackio
  return config


def optimizer() -> ml_collections.ConfigDict:
  """The section of an optimiser and its schedule."""
  section = ml_collections.ConfigDict()
  section.name = 'adamw'  # or 'adafactor'
  section.peak_lr = 1e-3
  section.end_lr = 1e-4
  section.schedule = 'cosine'  # 'constant', 'cosine', 'exponential', 'exponential_gap'
  section.schedule_steps = 0  # at which the schedule ends, where the stage stops before; 0: with the stage
  section.warmup_fraction = 0.06  # of the schedule's steps
  section.b1 = 0.9
  section.b2 = 0.98
  section.eps = 1e-8
  section.weight_decay = 0.01
  section.clip = 1.0  # global gradient norm; 0: none
  return section


def pretrain() -> ml_collections.ConfigDict:
  """The section of plain pre-training."""
  section = ml_collections.ConfigDict()
  section.mixture = 'tokens'  # 'tokens', 'examples', 'pile', 'uniform', or a mixture file such as DoReMi's mixture.json
  section.mixture_epochs = ml_collections.ConfigDict()  # for 'pile': {domain: times its authors repeat it}
  return section


def doremi() -> ml_collections.ConfigDict:
  """The section of DoReMi, as its paper has it; methods/doremi/run.py says what each part does."""
  section = ml_collections.ConfigDict()
  section.model = model('laptop_small')  # of the reference and the proxy
  section.steps = 1000  # of the reference and of each proxy
  section.batch_size = 16
  section.microbatches = 1
  section.init_from = ''  # as train.init_from, for the reference and the proxies
  section.baseline = 'tokens'  # first reference weights: 'tokens', 'examples', 'pile', 'uniform', or a mixture file
  section.baseline_epochs = ml_collections.ConfigDict()  # for 'pile': {domain: times its authors repeat it}
  section.seeds = 1  # proxies, averaged; their spread is reported
  section.rounds = 1  # iterated DoReMi: at most so many
  section.tolerance = 1e-3  # rounds end when no weight moved by more
  section.step_size = 1.0  # eta
  section.smoothing = 1e-3  # c: part of uniform mixed into the weights at each step
  section.clip = True  # excess losses at 0, per token
  section.loss_reduction = 'domain_mean'  # or 'token_mean', as the released code
  section.missing_domain = 'zero'  # or 'keep', as the released code
  section.initial_weights = 'uniform'  # alpha_0; or 'sampling', those of the proxy's batches, as the released code
  section.average_includes_initial = False  # True as the released code
  section.proxy_sampling = 'uniform'  # domains of the proxy's batches; or 'reference': the reference weights
  section.train_main = True  # train the main model on both mixtures and compare
  return section


def pds() -> ml_collections.ConfigDict:
  """The section of PDS, as its repository has it; methods/pds/run.py says what each part does."""
  section = ml_collections.ConfigDict()
  section.target = ''  # J: 'validation:DOMAIN,...', 'demo:alpaca', or a file of {"text"} or {"prompt", "response"}
  section.target_examples = 1024  # of it at most
  section.model = model('laptop_small')  # the proxy language model
  section.steps = 50_000  # of its training
  section.train_batch_size = 512
  section.train_microbatches = 1
  section.init_from = ''  # as train.init_from, for the proxy
  section.optimizer = optimizer()  # of the proxy
  section.optimizer.peak_lr, section.optimizer.end_lr = 6e-4, 6e-5
  section.optimizer.warmup_fraction = 0.04  # 2,000 steps
  section.optimizer.eps = 1e-6
  section.checkpoints = 5  # M: evenly spaced over the proxy's training; scores are averaged over them
  section.horizon = 100  # T: inner steps
  section.learning_rate = 0.008  # eta of the inner steps, plain gradient descent
  section.batch_size = 256  # of an inner step, and of the target
  section.microbatches = 1  # of an inner step
  section.proxies = 163_840  # sequences that are scored by the solver
  section.stride = 10  # inner steps between two that are scored
  section.score_batch = 256  # sequences scored at once
  section.normalize = False  # cosines instead of inner products
  section.scorer = scorer()
  section.ratio = 0.4  # r: part of the sequences that is kept
  section.temperature = 0.1  # tau: of the Gumbel noise, in units of the scorer's output
  section.quotas = ''  # 'DOMAIN=PART,...': part of these domains' sequences to keep, instead of `ratio`
  section.train_main = True  # train the main model on all data, on the selection, and on as much at random
  return section


def scorer() -> ml_collections.ConfigDict:
  """The section of PDS's data scorer, as its repository has it."""
  section = ml_collections.ConfigDict()
  section.source = ''  # what it starts from: anything that datasel.load reads, such as a hub name; '': the run's proxy
  section.pooling = 'mean'  # of hidden states; or 'last', 'first'
  section.length = 0  # tokens of its own tokenizer for one sequence; 0: those of the store
  section.cut = False  # leave out what is longer, and count it; False: refuse it
  section.held_out = 16_384  # proxies that it is judged on
  section.loss = 'mse'  # or 'rank'
  section.epochs = 5  # over the other proxies, at most
  section.patience = 2  # epochs without a higher rank correlation
  section.batch_size = 512
  section.microbatches = 1
  section.optimizer = optimizer()
  section.optimizer.peak_lr, section.optimizer.end_lr = 1e-4, 0.0
  section.optimizer.warmup_fraction = 0.007  # 10 steps
  return section


def pds_paper(main_model: str, peak_lr: float) -> ml_collections.ConfigDict:
  """PDS as published: a 160M proxy whatever the main model, which reads 52.4B tokens."""
  config = base('pds')
  config.model = model(main_model)
  config.train.steps, config.train.batch_size = 100_000, 512
  config.train.log_every, config.train.checkpoint_every = 50, 1000
  config.train.eval_every, config.train.eval_sequences = 5000, 512
  config.optimizer.peak_lr, config.optimizer.end_lr = peak_lr, peak_lr / 10
  config.optimizer.warmup_fraction = 0.02  # 2,000 steps
  config.optimizer.eps = 1e-6
  config.pds = pds()
  config.pds.model = model('pds_160m')
  return config


def regmix() -> ml_collections.ConfigDict:
  """The section of RegMix, as its repository has it; methods/regmix/run.py says what each part does."""
  section = ml_collections.ConfigDict()
  section.target = ''  # domains whose held-out loss to lower: 'web', 'web,code' or 'web=2,code=1'; '': all alike
  section.combine = 'sum'  # of several targets: their mean; or 'worst', the one that is furthest above the prior's
  section.model = model('laptop_small')  # of each proxy
  section.proxies = 512
  section.held_out = 0  # of them predicted from the others first, to see how well
  section.steps = 1000
  section.batch_size = 512
  section.microbatches = 1
  section.optimizer = optimizer()  # of the proxies
  section.optimizer.peak_lr, section.optimizer.schedule, section.optimizer.warmup_fraction = 4e-4, 'constant', 0.1
  section.optimizer.b2, section.optimizer.weight_decay = 0.95, 0.1
  section.chunk = 0  # proxies that a device steps at the same time, and
  section.group = 0  # proxies in memory at the same time, at most; 0: what fits
  section.prior = 'tokens'  # 'tokens', 'examples', 'uniform', or a mixture file
  section.design = 'paper'  # or 'stratified', 'space_filling'
  section.temperature = 0.5  # of the prior, for the design
  section.grid = 2e-4  # mixtures of the design are multiples of it
  section.max_usage = 15.0  # a domain is at most so many times its prior
  section.max_epochs = 0.0  # and no more than repeats it so often in a main model; 0: however often
  section.rounds = 1  # swarms; those after the first where a Gaussian process expects the largest improvement
  section.added = 0  # proxies of each later swarm
  section.regressor = 'auto'  # or 'linear', 'loglinear', 'gp', 'lightgbm'
  section.search = 'ascend'  # where the regressor has a gradient; 'simulate': the mean of the best draws, as the paper
  section.draws, section.top = 1_000_000, 100  # of 'simulate'
  section.kappa = 0.0  # standard errors that are added to a prediction: above 0, the proposal is more careful
  section.kl = 0.0  # nats that are added for each nat of KL(proposal || prior)
  section.baselines = 'prior,uniform,single'  # main models beside the proposal's; also mixture files
  section.train_main = True
  return section


def prox() -> ml_collections.ConfigDict:
  """The section of ProX, as its paper has it; methods/prox/run.py says what each part does."""
  section = ml_collections.ConfigDict()
  section.corpus = ''  # folder of the text to refine; 'demo:pages' (real ones), or 'demo:lean' and other demo corpora
  section.documents = 1000  # of 'demo:pages', clean ones with noise added; and of the examples, where made here
  section.examples = ''  # folder of datasel.methods.prox.annotate; 'pairs' of demo:pages; 'rules:c4+...' of the corpus
  section.init_from = ''  # a trained model that both refiners start from; '': one trained here on the raw text
  section.model = model('laptop')  # of the refiners, where trained here
  section.steps = 12_500  # of its training on raw text
  section.batch_size = 1024
  section.microbatches = 1
  section.optimizer = optimizer()
  section.optimizer.peak_lr, section.optimizer.end_lr = 5e-4, 5e-5
  section.optimizer.warmup_fraction, section.optimizer.b2 = 0.04, 0.95  # 500 steps
  section.optimizer.weight_decay = 0.1
  section.document = refiner()
  section.chunk = refiner()
  section.refine_batch = 8  # prompts that a refiner reads at once
  section.compat = False  # the authors' executor, with its faults
  section.rules = 'c4,gopher,fineweb,c4+gopher+fineweb'  # filters to compare with
  section.target = ''  # domains of the token store whose held-out loss is compared: 'wiki,c4'; '': all alike
  section.train_main = True  # train the main model on the raw, the filtered and the refined text
  return section


def anllm() -> ml_collections.ConfigDict:
  """The section of AnLLM, as its paper has it; methods/anllm/run.py says what each part does."""
  section = ml_collections.ConfigDict()
  section.arms = 'full,ep'  # what is trained: of full, ep, ac, fixed; with -sees, -bos for a mask's switches
  section.init_from = ''  # a trained model that all of them start from, as datasel.load reads; '': fresh parameters
  section.mixture = 'tokens'  # 'tokens', 'examples', 'uniform', or a mixture file
  section.symbols = '.'  # of 'ep': each of these characters is an anchor
  section.anchored_store = ''  # of 'ac': the text with an anchor token between sentences; '': of a demo, made here
  section.anchor_row = 'mean'  # first value of that token's row: 'mean' of the others; 'copy_period' as the code has it
  section.min_length = 1  # of 'ep' and 'ac': tokens of a segment at least, and
  section.max_length = 0  # at most; 0: however many
  section.fixed_length = 32  # of 'fixed'
  section.contexts = '256,512,1024,2048,4096'  # tokens of a window for perplexity, those that the store's rows have
  section.context_sequences = 64  # held-out sequences of each domain that are read for it; 0: all
  section.sets = ''  # of questions: 'socialiqa,quartz', or files of {question, choices, gold} a line; '': none
  section.shots = '0,5'  # demonstrations before a question
  section.questions = 200  # of each set
  section.question_batch = 8  # rows that are decoded at once
  section.timed = 8  # questions that are also answered without a cache, which is slow
  return section


def anllm_7b(arm: str) -> ml_collections.ConfigDict:
  """AnLLM's Llama-2-7B as published: 930,514 documents, each cut to 4,096 tokens, read once."""
  config = base('anllm')
  config.data.length = 4096
  config.model = model('llama2_7b')
  config.train.steps, config.train.batch_size, config.train.microbatches = 1818, 512, 16
  config.train.checkpoint_every, config.train.eval_every, config.train.eval_sequences = 100, 300, 64
  config.optimizer.peak_lr, config.optimizer.schedule = 2e-5, 'constant'
  config.optimizer.warmup_fraction = 20 / 1818
  config.optimizer.b2, config.optimizer.weight_decay, config.optimizer.clip = 0.999, 0.0, 1.0
  config.anllm = anllm()
  config.anllm.arms = arm
  config.anllm.sets = 'socialiqa,quartz,mmlu,logiqa'
  config.anllm.questions, config.anllm.question_batch = 1000, 32
  return config


def tlm(method: str, main_model: str, peak_lr: float, end_lr: float) -> ml_collections.ConfigDict:
  """ProX's own models as published: 26.2B tokens in sequences of 2,048."""
  config = base(method)
  config.data.length = 2048
  config.model = model(main_model)
  config.train.steps, config.train.batch_size, config.train.microbatches = 12_500, 1024, 16
  config.train.log_every, config.train.checkpoint_every = 50, 500
  config.train.eval_every, config.train.eval_sequences = 2500, 800
  config.optimizer.peak_lr, config.optimizer.end_lr = peak_lr, end_lr
  config.optimizer.warmup_fraction = 0.04  # 500 steps
  config.optimizer.b2, config.optimizer.weight_decay = 0.95, 0.1
  return config


def prox_paper(main_model: str, peak_lr: float, end_lr: float) -> ml_collections.ConfigDict:
  """ProX as published: refiners of 0.3B whatever the main model."""
  config = tlm('prox', main_model, peak_lr, end_lr)
  config.prox = prox()
  config.prox.model, config.prox.microbatches = model('tlm_xs'), 16
  return config


def refiner() -> ml_collections.ConfigDict:
  """The section of one of ProX's refiners, as its paper has it."""
  section = ml_collections.ConfigDict()
  section.epochs = 4
  section.batch_size = 64  # examples
  section.microbatches = 1
  section.length = 2048  # tokens of a prompt and its program
  section.template = 'plain'  # or 'llama2', as the released refiners
  section.max_new_tokens = 256  # of a program
  section.validation = 0  # examples that each epoch is judged on; 0: all
  section.optimizer = optimizer()
  section.optimizer.peak_lr, section.optimizer.end_lr, section.optimizer.b2 = 1e-5, 1e-6, 0.95
  return section


def regmix_1b_optimizer() -> ml_collections.ConfigDict:
  """Of the 1B models, as published."""
  section = optimizer()
  section.peak_lr, section.end_lr, section.warmup_fraction = 4e-4, 1e-5, 0.04  # 1,000 steps
  section.b2, section.weight_decay = 0.95, 0.1
  return section


def model(preset: str) -> ml_collections.ConfigDict:
  """The section of a model, every field of it open to overrides: of `models.presets`, or of a stage's folder."""
  made = pathlib.Path(preset) / 'stage.json'
  if preset not in PRESETS and not made.is_file():
    raise ValueError(f'unknown model preset {preset!r}, and no stage of a run either; known: {sorted(PRESETS)}')
  shape = PRESETS[preset] if preset in PRESETS else Mistral(**workdir.read_json(made)['model'])
  section = ml_collections.ConfigDict(dataclasses.asdict(shape) | {'rope_scaling': dict(shape.rope_scaling)})
  if shape.anchors is None:
    for field in ('anchors', 'anchor_sees_anchors', 'keep_bos'):  # they come with the method that trains with anchors
      del section[field]
  for field, kind in (('window', int), ('residual_init_std', float)):
    if section[field] is None:
      section[field] = config_dict.placeholder(kind)
  return section


def finish(config: ml_collections.ConfigDict, arg: str) -> ml_collections.ConfigDict:
  """Applies the part of `--config=FILE:ARG` after the colon: nothing, or 'smoke' for a form that ends in a minute or
  two on a CPU: the offline corpus, a tiny model, a few steps, the method's settings otherwise unchanged."""
  if arg not in ('', 'smoke'):
    raise ValueError(f"unknown config argument {arg!r} after the colon; known: 'smoke', or nothing")
  if arg == 'smoke':
    config.data.store, config.data.demo, config.data.tokenizer = '', 'offline', ''
    config.data.selection = ''
    config.data.length = 64
    config.model = model('smoke')
    config.train.steps, config.train.batch_size = 12, 8
    config.train.microbatches = min(config.train.microbatches, 2)
    config.train.log_every, config.train.checkpoint_every = 2, 4
    config.train.eval_every, config.train.eval_sequences = 4, 16
    if 'pretrain' in config:
      config.pretrain.mixture = 'tokens'
    if 'doremi' in config:
      config.doremi.model = model('smoke')
      config.doremi.steps, config.doremi.batch_size = 12, 8
      config.doremi.microbatches = min(config.doremi.microbatches, 2)
      if config.doremi.baseline == 'pile':
        config.doremi.baseline_epochs = dict.fromkeys(('apidocs', 'code', 'pydocs', 'readmes'), 1.0)
      config.doremi.rounds, config.doremi.seeds = min(config.doremi.rounds, 2), min(config.doremi.seeds, 2)
    if 'pds' in config:
      section = config.pds
      section.target, section.target_examples = 'validation:code', 16
      section.model, section.steps, section.checkpoints = model('smoke'), 12, 3
      section.train_batch_size, section.train_microbatches, section.microbatches = 8, 1, 1
      section.horizon, section.batch_size, section.stride = 4, 8, 2
      section.proxies, section.score_batch = 64, 16
      section.scorer.source, section.scorer.length, section.scorer.microbatches = '', 0, 1
      section.scorer.held_out, section.scorer.epochs, section.scorer.batch_size = 16, 2, 16
    if 'regmix' in config:
      section = config.regmix
      section.model, section.steps, section.batch_size, section.microbatches = model('smoke'), 8, 8, 1
      section.target, section.prior, section.baselines = 'code', 'tokens', 'prior,single'
      section.proxies, section.held_out, section.draws = 12, 4, 2000
      section.rounds, section.added = min(section.rounds, 2), min(section.added, 4)
      section.max_epochs = 0.0
    if 'anllm' in config:
      section = config.anllm
      section.init_from, section.mixture, section.anchored_store = '', 'tokens', ''
      section.contexts, section.context_sequences, section.sets, section.question_batch = '16,64', 4, '', 4
    if 'prox' in config:
      section = config.prox
      section.corpus, section.examples, section.documents = 'demo:offline', 'rules:boilerplate+gopher', 200
      section.init_from, section.model, section.target = '', model('smoke'), 'readmes,pydocs'
      section.steps, section.batch_size, section.microbatches = 12, 8, 1
      section.rules, section.refine_batch = 'boilerplate+gopher', 32
      for task in ('document', 'chunk'):
        section[task].epochs, section[task].batch_size, section[task].microbatches = 1, 8, 1
        section[task].length, section[task].max_new_tokens, section[task].validation = 256, 48, 8
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = -1, 1, 1
  return config.lock()


def check(config: ml_collections.ConfigDict, *, needs_data: bool = True) -> None:
  """Refuses what no run can use, before anything is computed: NaN, infinity, sizes below 1, no data."""
  flat = flatten(config)
  for path, value in flat.items():
    if isinstance(value, float) and not math.isfinite(value):
      raise ValueError(f'config.{path} is {value}; want a finite number')
  least = dict.fromkeys(('data.length', 'data.prefetch', 'data.block', 'train.steps', 'train.batch_size',
                         'train.microbatches', 'train.log_every', 'train.checkpoint_every'), 1)
  least |= {'train.keep_checkpoints': 2, 'train.eval_every': 0, 'train.eval_sequences': 0, 'profile_steps': 0}
  if 'doremi' in config:
    least |= {f'doremi.{key}': 1 for key in ('steps', 'batch_size', 'microbatches', 'seeds', 'rounds')}
  if 'pds' in config:
    least |= {f'pds.{key}': 1 for key in (
      'target_examples', 'steps', 'train_batch_size', 'train_microbatches', 'checkpoints', 'horizon', 'batch_size',
      'microbatches', 'proxies', 'stride', 'score_batch')}
  if 'regmix' in config:
    least |= {f'regmix.{key}': 1 for key in (
      'proxies', 'steps', 'batch_size', 'microbatches', 'rounds', 'draws', 'top')}
    least |= {f'regmix.{key}': 0 for key in ('held_out', 'chunk', 'group', 'added', 'max_epochs', 'kappa', 'kl')}
  if 'prox' in config:
    least |= {f'prox.{key}': 1 for key in ('documents', 'steps', 'batch_size', 'microbatches', 'refine_batch')}
  if 'anllm' in config:
    least |= {f'anllm.{key}': 1 for key in (
      'min_length', 'fixed_length', 'questions', 'question_batch', 'timed')}
    least |= {'anllm.max_length': 0, 'anllm.context_sequences': 0}
  for path, smallest in least.items():
    if flat[path] < smallest:
      raise ValueError(f'config.{path} is {flat[path]}; want at least {smallest}')
  if needs_data and not config.data.store and not config.data.demo:
    raise ValueError('the run has no data: want --config.data.store=DIR, made by `python -m datasel.prepare`, or '
                     '--config.data.demo=lean')
  for name in ('train', 'doremi', 'regmix', 'prox'):
    if name in config and config[name].batch_size % config[name].microbatches:
      raise ValueError(f'config.{name}.microbatches {config[name].microbatches} does not divide '
                       f'config.{name}.batch_size {config[name].batch_size}; choose a divisor of it')
  for optimizer in [path.removesuffix('.name') for path in flat if path.endswith('optimizer.name')]:
    of = lambda key, optimizer=optimizer: (f'config.{optimizer}.{key}', flat[f'{optimizer}.{key}'])
    for path, value in map(of, ('clip', 'weight_decay', 'eps', 'schedule_steps')):
      if value < 0:
        raise ValueError(f'{path} is {value}; want 0 or more')
    for path, value in map(of, ('b1', 'b2')):
      if not 0 <= value < 1:
        raise ValueError(f'{path} is {value}; want at least 0 and below 1')
    path, value = of('warmup_fraction')
    if not 0 <= value <= 1:
      raise ValueError(f'{path} is {value}; want a part of 1')
  sharding.rules_from(config.sharding.to_dict())
  if needs_data:
    try:
      trackers.check(config.tracking.wandb_project, config.tracking.trackio_project)
    except ImportError as e:
      raise ValueError(str(e)) from e
  if config.data.verify not in ('full', 'size'):
    raise ValueError(f"config.data.verify is {config.data.verify!r}; want 'full' or 'size'")


def check_overrides(config: ml_collections.ConfigDict, argv: list[str]) -> None:
  """Refuses `--config.KEY` for a key that the config does not have (or a section), naming those it may have meant."""
  known = flatten(config)
  for argument in argv:
    if argument.startswith(('--config.', '-config.')):
      key = argument.split('=', 1)[0].split('config.', 1)[1]
      if key not in known:
        inside = [path for path in known if path.startswith(f'{key}.')]
        close = inside or difflib.get_close_matches(key, known, n=3, cutoff=0.5) or sorted(known)
        raise ValueError(f'--config.{key}: the config has no such key; did you mean {", ".join(close)}?')


def flatten(config: Any, prefix: str = '') -> dict[str, Any]:
  """{'optimizer.peak_lr': 0.001, ...}"""
  flat = {}
  for key, value in config.items():
    path = f'{prefix}{key}'
    flat |= flatten(value, path + '.') if isinstance(value, ml_collections.ConfigDict) else {path: value}
  return flat


def difference(old: dict, new: dict) -> list[str]:
  """Lines 'key: old -> new' for two flattened configs."""
  values = {key: (old.get(key, '(absent)'), new.get(key, '(absent)')) for key in sorted(old.keys() | new.keys())}
  return [f'{key}: {before!r} -> {after!r}' for key, (before, after) in values.items() if before != after]


def to_model(section: ml_collections.ConfigDict) -> Mistral:
  return Mistral(**section.to_dict())
