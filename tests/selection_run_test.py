"""Laws of a run through a selection (config.data.selection): it trains on the kept records, and on no others."""

import shutil
import signal

import numpy as np
import pytest
import small_run

from datasel import main, train, workdir
from datasel.data import selection
from datasel.data.selection import Selection
from datasel.data.store import Store

# ml_collections loads a config file by it.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """A store, and selections of it: one in 330 of its records, and another."""
  folder = tmp_path_factory.mktemp('made')
  store = Store(small_run.make_store(folder))
  sizes = dict(zip(store.domains, store.sizes('train').tolist()))
  for name, first in (('selection', 3), ('another', 4)):
    records = {domain: np.arange(first, size, 330) for domain, size in sizes.items()}
    selection.write(folder / f'{name}.npz', Selection(records, {'store': store.digest, 'method': 'by hand'}))
  return folder


STEPS = '--config.train.steps=7'


def command(made, directory, *arguments):
  config = small_run.write_config(made / 'config.py', made / 'store')
  return main.main([f'--config={config}', f'--workdir={directory}', '--config.tracking.tensorboard=false', STEPS,
                    *arguments])


@pytest.fixture(scope='module')
def whole(made, tmp_path_factory):
  """(the workdir of a finished run through the selection, the train records that it read: {(domain, record)})"""
  seen, original = set(), Store.read

  def watched(self, split, domain_B, record_B):
    if split == 'train':
      seen.update(zip(np.asarray(domain_B).tolist(), np.asarray(record_B).tolist()))
    return original(self, split, domain_B, record_B)

  directory = tmp_path_factory.mktemp('whole')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Store, 'read', watched)
    assert command(made, directory, f'--config.data.selection={made / "selection.npz"}') == 0
  return directory, seen


@pytest.fixture
def run(made, capsys):
  """run(workdir, *arguments) -> (exit status, everything printed)"""

  def call(directory, *arguments):
    status = command(made, directory, *arguments)
    printed = capsys.readouterr()
    return status, printed.out + printed.err

  return call


def test_a_run_reads_exactly_the_kept_records(whole, made):
  chosen, store = selection.load(made / 'selection.npz'), Store(made / 'store')
  kept = {(domain, n) for domain, name in enumerate(store.domains) for n in chosen.records[name].tolist()}
  assert whole[1] == kept and 12 < len(kept) < 40  # of 56 draws


def test_a_run_says_what_it_was_trained_on(whole, made):
  directory, file = whole[0], made / 'selection.npz'
  chosen, store = selection.load(file), Store(made / 'store')
  made_of = workdir.read_json(directory / 'data.json')
  assert made_of['digest'] == store.digest and made_of['selection']['digest'] == chosen.digest
  assert made_of['selection']['file'] == str(file) and made_of['selection']['provenance'] == chosen.provenance
  for domain, name in enumerate(store.domains):
    assert made_of['domains'][name]['train']['sequences'] == len(chosen.records[name])
    assert made_of['selection']['of_sequences'][name] == store.sizes('train')[domain]
  # The default mixture is by tokens: here those of the selection.
  tokens = {name: made_of['domains'][name]['train']['tokens'] for name in store.domains}
  weights = workdir.read_json(directory / 'mixture.json')['domains']
  assert weights == pytest.approx({name: n / sum(tokens.values()) for name, n in tokens.items()})
  kept, size = sum(map(len, chosen.records.values())), store.sizes('train').sum()
  report = (directory / 'report.html').read_text(encoding='utf-8')
  assert f'Trained on a selection: {kept} of {size:,} sequences ({100 * kept / size:.1f}%)' in report
  assert str(file) in report and 'method by hand' in report


def test_a_run_goes_on_with_the_selection_it_began_with(whole, run, made, tmp_path, monkeypatch):
  original, calls = train.Program.put, iter(range(100))

  def stopping(self, batch):
    if next(calls) == 3:
      signal.raise_signal(signal.SIGTERM)
    return original(self, batch)

  with monkeypatch.context() as patch:
    patch.setattr(train.Program, 'put', stopping)
    status, printed = run(tmp_path / 'run', f'--config.data.selection={made / "selection.npz"}')
  assert status == 128 + signal.SIGTERM and 'stopped after step' in printed
  moved = shutil.copy(made / 'selection.npz', tmp_path / 'moved.npz')
  for argument, message in ((f'--config.data.selection={made / "another.npz"}', 'is not the selection that this run'),
                            (f'--config.data.selection={tmp_path / "gone.npz"}', 'there is no selection')):
    status, printed = run(tmp_path / 'run', argument)
    assert status == 2 and message in printed
  assert run(tmp_path / 'run', f'--config.data.selection={moved}')[0] == 0
  assert workdir.read_json(tmp_path / 'run/data.json')['selection']['file'] == str(moved)
  assert small_run.timeless(tmp_path / 'run') == small_run.timeless(whole[0])
  assert run(tmp_path / 'run')[0] == 0  # nothing is left to do, and the file is where it was last


def test_a_run_that_reads_everything_does_not_take_to_a_selection(whole, run, made, tmp_path):
  shutil.copytree(whole[0], tmp_path / 'run')
  described = workdir.read_json(tmp_path / 'run/data.json')
  workdir.write_json(tmp_path / 'run/data.json', described | {'selection': None})
  status, printed = run(tmp_path / 'run', f'--config.data.selection={made / "selection.npz"}')
  assert status == 2 and 'is not the selection that this run began with (none)' in printed


def test_a_selection_of_another_store_is_refused(run, made, tmp_path):
  other = small_run.make_store(tmp_path / 'other', vocab_size=350)
  status, printed = run(tmp_path / 'run', f'--config.data.selection={made / "selection.npz"}',
                        f'--config.data.store={other}')
  assert status == 2 and f'of another token store (digest {Store(made / "store").digest[:12]}) than {other}' in printed
  assert not (tmp_path / 'run/config.json').exists()
