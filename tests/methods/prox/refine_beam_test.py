"""Laws of refining on Beam: the output is that of local workers, also of several processes, and bad rows are named."""

import functools
import subprocess
import sys

import pytest
from refined_corpora import Refiner, content, jsonl, write

from datasel.methods.prox import beam, dedup, refine, rule_refiner

CUT = {'rows': 10, 'batch': 4}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp('beam')
  write(root / 'corpus')
  refine.refine(root / 'corpus', root / 'out', rule_refiner.RuleRefiner('gopher+c4'), **CUT)
  return root


def test_a_pipeline_writes_the_bytes_of_local_workers(root, tmp_path):
  refine.refine(root / 'corpus', tmp_path / 'out', rule_refiner.RuleRefiner('gopher+c4'), run_all=beam.run, **CUT)
  assert content(tmp_path / 'out') == content(root / 'out')


def test_given_programs_and_the_search_for_copies_too(root, tmp_path):
  of_model = refine.refine(root / 'corpus', tmp_path / 'model', Refiner(), **CUT)
  for name, run_all in (('beam', {'run_all': beam.run}), ('local', {})):
    refine.refine(root / 'corpus', tmp_path / name, programs_of=of_model.path, compat=True, **run_all, **CUT)
    dedup.dedup(root / 'corpus', tmp_path / f'{name}-dedup', **run_all, **CUT)
  assert content(tmp_path / 'beam') == content(tmp_path / 'local')
  assert content(tmp_path / 'beam-dedup') == content(tmp_path / 'local-dedup')


def test_the_command_with_two_processes(root, tmp_path):
  command = [sys.executable, '-m', 'datasel.methods.prox.beam', 'refine', '--corpus', root / 'corpus', '--rules',
             'gopher+c4', '--rows', '10', '--batch', '4', '--runner=DirectRunner']
  done = subprocess.run([*command, '--out', tmp_path / 'out', '--direct_running_mode=multi_processing',
                         '--direct_num_workers=2'], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-3000:]
  assert content(tmp_path / 'out') == content(root / 'out')
  done = subprocess.run([*command, '--out', tmp_path / 'other', '--direct_num_worker=2'], capture_output=True,
                        text=True)
  assert done.returncode == 1 and 'unknown flag --direct_num_worker,' in done.stderr


def test_bad_rows_are_named_and_tried_again_when_repaired(root, tmp_path):
  corpus = write(tmp_path / 'corpus')
  run = functools.partial(refine.refine, corpus, tmp_path / 'out', rule_refiner.RuleRefiner('gopher+c4'),
                          run_all=beam.run, **CUT)
  whole = (corpus / 'train/help-0.jsonl').read_bytes()
  (corpus / 'train/help-0.jsonl').write_bytes(whole.replace(b'"text"', b'"test"', 1))
  with pytest.raises(ValueError, match=r'help-0\.jsonl:1: no "text"'):
    run()
  with pytest.raises(ValueError, match=r'help-0\.jsonl:1: no "text"'):
    run()
  with open(corpus / 'train/help-0.jsonl', 'wb') as f:
    f.write(whole + jsonl([]))
  with pytest.raises(ValueError, match='has changed'):  # the plan is of the corpus as it was
    run()
