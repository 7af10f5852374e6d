"""Laws of the launchers for machines elsewhere: the run's flags arrive exactly, nothing starts that the gate refuses or
that is not whole, and a preempted run goes on.  The clusters' commands are played by scripts that note their calls."""

import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import types

import pytest
import yaml
from launch_test import BASH, ROOT, _script, _stamp

CONFIG = '--config=configs/pretrain/pds_1b.py'
# What a shell, YAML, ssh, or Kubernetes could take apart.
AWKWARD = [CONFIG, '--workdir=/shared/a b', "--config.data.store=/it's \"here\"", '--config.seed=1',
           '--config.tracking.wandb_project=$(HOME) $HOME `x` * \\ é;&', '--config.train.init_from=']
RUN = ['-m', 'datasel.main', *AWKWARD]
GATE = ['-m', 'datasel.topology', CONFIG, None, AWKWARD[2], AWKWARD[3], AWKWARD[4], AWKWARD[5]]
# Notes its name and arguments as a line of JSON, then does what $PLAY says of it: {name: shell script}.
PLAYER = f"""#!{sys.executable}
import json, os, subprocess, sys
name = os.path.basename(sys.argv[0])
with open(os.environ['NOTES'], 'a') as f:
  f.write(json.dumps([name, *sys.argv[1:]]) + '\\n')
script = json.loads(os.environ['PLAY']).get(name, '')
sys.exit(subprocess.run(['{BASH}', '-c', script, name, *sys.argv[1:]]).returncode)
"""
PLAYED = ('gcloud', 'kubectl', 'xpk', 'sbatch', 'srun', 'squeue', 'scontrol')


class Stage:
  """A checkout, and a PATH on which the commands of every cluster are played."""

  def __init__(self, folder):
    self.folder, self.checkout, self.notes = folder, folder / 'check out', folder / 'notes'
    shutil.copytree(ROOT / 'launch', self.checkout / 'launch', ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copytree(ROOT / 'configs', self.checkout / 'configs', ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(ROOT / 'setup.py', self.checkout)
    for name, extra in (('tpu', 'tpu'), ('cuda', 'cuda'), ('colab', 'tpu,demo')):
      self.environment(self.checkout, name, extra)
    for name in PLAYED:
      _script(folder / 'bin' / name, PLAYER)
    (folder / 'elsewhere').mkdir()

  def environment(self, checkout, name, extra):
    """A current one, whose Python is played too."""
    _script(checkout / f'.venv-{name}/bin/python', PLAYER)
    (checkout / f'.venv-{name}/.datasel-stamp').write_text(_stamp(checkout).replace(' demo ', f' {extra} '))

  def run(self, launcher, *arguments, play=None, path=None, **variables):
    self.notes.unlink(missing_ok=True)
    command = [sys.executable if launcher.endswith('.py') else BASH, str(self.checkout / 'launch' / launcher)]
    path = f'{self.folder / "bin"}:/usr/bin:/bin' if path is None else path
    environment = {'PATH': path, 'PYTHON': sys.executable, 'NOTES': str(self.notes), 'PLAY': json.dumps(play or {}),
                   'HOME': str(self.folder / 'elsewhere'), 'TMPDIR': str(self.folder), 'LANG': 'C.UTF-8', **variables}
    done = subprocess.run([*command, *arguments], cwd=self.folder / 'elsewhere', env=environment, capture_output=True,
                          text=True, check=False, timeout=60)
    lines = self.notes.read_text().splitlines() if self.notes.exists() else []
    return done, [json.loads(line) for line in lines]


@pytest.fixture
def stage(tmp_path):
  return Stage(tmp_path)


POD = ['--name=pod', '--zone=z', '--topology=v5p:4x4x8', '--poll=0']
SLURM = ['--topology=h200:32', '--nodes=4']
GKE = ['--name=set', '--image=image', '--topology=v5p:4x4x8', '--claim=disk']
COLAB = ['--topology=v5e:1x1', '--drive=/shared']
LAUNCHERS = {'tpu_pod.sh': POD, 'slurm.sh': SLURM, 'gpu_host.sh': ['--topology=h200:8'], 'gke_jobset.py': GKE,
             'colab.sh': COLAB}


def topology(own):
  return next(flag for flag in own if flag.startswith('--topology='))


def gate_of(own, flags=GATE):
  return [topology(own) if flag is None else flag for flag in flags]


@pytest.mark.parametrize('launcher', LAUNCHERS)
def test_a_dry_run_says_everything_and_does_nothing(stage, launcher):
  """From another folder, with neither gcloud nor an environment there; what it prints reads back as it was given."""
  for environment in stage.checkout.glob('.venv-*'):
    shutil.rmtree(environment)
  before = sorted(stage.folder.rglob('*'))
  done, calls = stage.run(launcher, *LAUNCHERS[launcher], '--dry-run', '--', *AWKWARD, path='/usr/bin:/bin')
  assert done.returncode == 0, done.stderr
  assert calls == [] and done.stderr == ''
  assert sorted(stage.folder.rglob('*')) == before
  gate = shlex.split(done.stdout.splitlines()[0].removeprefix('# '))
  assert gate[0] == 'python' and sorted(gate[1:]) == sorted(gate_of(LAUNCHERS[launcher]))


@pytest.mark.parametrize('launcher', LAUNCHERS)
def test_a_config_file_may_be_called_with_an_argument(stage, launcher):
  smoke = f'{CONFIG}:smoke'
  done, _ = stage.run(launcher, *LAUNCHERS[launcher], '--dry-run', '--', smoke, '--workdir=/shared/x')
  assert done.returncode == 0, done.stderr
  assert smoke in shlex.split(done.stdout.splitlines()[0]) and done.stdout.count(smoke) >= 2
  done, _ = stage.run(launcher, *LAUNCHERS[launcher], '--dry-run', '--', f'{CONFIG}x:smoke', '--workdir=/shared/x')
  assert done.returncode == 2 and f'{CONFIG}x'.split('=')[1] in done.stderr


@pytest.mark.parametrize('launcher,own', [
  ('gpu_host.sh', ['--topology=h200']), ('slurm.sh', ['--topology=h100', '--nodes=1']),
  ('gke_jobset.py', [*GKE[:2], '--topology=h200', GKE[3]]), ('colab.sh', ['--topology=h100', '--drive=/shared'])])
def test_a_plain_gpu_is_one(stage, launcher, own):
  done, _ = stage.run(launcher, *own, '--dry-run', '--', *AWKWARD)
  assert done.returncode == 0, done.stderr
  assert topology(own) in shlex.split(done.stdout.splitlines()[0])
  one = {'slurm.sh': '--nodes=1 --gpus-per-node=1 --ntasks-per-node=1', 'gke_jobset.py': 'nvidia.com/gpu: 1'}
  assert one.get(launcher, '') in done.stdout


@pytest.mark.parametrize('status', [1, 2])
@pytest.mark.parametrize('launcher', ['tpu_pod.sh', 'slurm.sh', 'gpu_host.sh', 'colab.sh'])
def test_nothing_starts_that_the_gate_refuses(stage, launcher, status):
  done, calls = stage.run(launcher, *LAUNCHERS[launcher], '--', *AWKWARD, play={'python': f'exit {status}'})
  assert done.returncode == status and 'the gate refuses' in done.stderr
  assert [call[0] for call in calls] == ['python'] and sorted(calls[0][1:]) == sorted(gate_of(LAUNCHERS[launcher]))


def gke_gate(stage, status):
  """gke_jobset.py asks with its own Python, in the checkout."""
  package = stage.checkout / 'datasel'
  package.mkdir()
  (package / '__init__.py').touch()
  (package / 'topology.py').write_text(f'import sys; print("gate", sys.argv[1:]); sys.exit({status})')


@pytest.mark.parametrize('status', [1, 2])
def test_nothing_is_applied_that_the_gate_refuses(stage, status):
  gke_gate(stage, status)
  done, calls = stage.run('gke_jobset.py', *GKE, '--', *AWKWARD)
  assert done.returncode == status and calls == [] and 'the gate refuses' in done.stderr
  assert done.stdout == f'gate {[topology(GKE), *AWKWARD[:1], *AWKWARD[2:]]}\n'


@pytest.mark.parametrize('launcher', LAUNCHERS)
@pytest.mark.parametrize('flags,message', [
  ([], 'config'),
  ([CONFIG], '--workdir'),
  ([CONFIG, '--workdir=runs/x'], '--workdir=runs/x'),
  (['--config=configs/none.py', '--workdir=/shared/x'], 'configs/none.py'),
  ([CONFIG, '--workdir', '/shared/x'], 'want --'),
  ([CONFIG, '--workdir=/shared/x', 'stray'], 'stray'),
])
def test_a_run_that_is_not_whole_is_refused_before_the_gate(stage, launcher, flags, message):
  done, calls = stage.run(launcher, *LAUNCHERS[launcher], '--', *flags)
  assert done.returncode == 2 and message in done.stderr, done.stderr
  assert done.stderr.startswith('error: ') and calls == []


@pytest.mark.parametrize('launcher,own,message', [
  ('tpu_pod.sh', POD[1:], '--name'),
  ('tpu_pod.sh', ['--name=a_b', *POD[1:]], '--name=a_b'),
  ('tpu_pod.sh', [POD[0], POD[2]], '--zone is missing'),
  ('tpu_pod.sh', [*POD[:2], '--topology=v5p'], 'want KIND:SHAPE'),
  ('tpu_pod.sh', [*POD[:2], '--topology=v5p:a[$(touch x)]'], 'want KIND:SHAPE'),
  ('tpu_pod.sh', [*POD[:2], '--topology=h200:8'], 'known: v4, v5e, v5p, v6e'),
  ('tpu_pod.sh', [*POD, '--setup=none.sh'], '--setup: no file'),
  ('tpu_pod.sh', [*POD, '--spott'], "unknown flag '--spott'"),
  ('slurm.sh', ['--topology=v5p:2x2x1', '--nodes=1'], 'known: h100, h200, h100:N'),
  ('slurm.sh', ['--topology=h200:12', '--nodes=3'], 'do not fill hosts of 8'),
  ('slurm.sh', ['--topology=h200:32'], '--nodes='),
  ('slurm.sh', ['--topology=h200:32', '--nodes=5'], 'not equally many'),
  ('slurm.sh', [*SLURM, '--gpus-per-node=4'], 'follows from'),
  ('gpu_host.sh', [], 'want KIND:SHAPE'),
  ('gpu_host.sh', ['--topology=h200:16'], 'at most 8 GPUs'),
  ('colab.sh', ['--topology=v5e:2x2', '--drive=/shared'], 'one chip'),
  ('colab.sh', ['--topology=v5e:1x1'], 'is lost with the runtime'),
  ('colab.sh', ['--topology=v5e:1x1', '--drive=/shared/a'], 'is lost with the runtime'),
  ('gke_jobset.py', GKE[:3], '--claim is missing'),
  ('gke_jobset.py', ['--name=Set', *GKE[1:]], '--name=Set'),
  ('gke_jobset.py', [*GKE[:2], '--topology=v9:2x2', GKE[3]], 'known kinds'),
  ('gke_jobset.py', [*GKE[:2], '--topology=h200:12', GKE[3]], 'do not fill hosts of 8'),
  ('gke_jobset.py', [*GKE, '--mount=/data'], 'a folder under /data'),
  ('gke_jobset.py', [*GKE[:2], '--topology=h200:8', '--xpk=c'], '--xpk is for TPUs'),
])
def test_a_launcher_refuses_settings_it_cannot_use(stage, launcher, own, message):
  done, calls = stage.run(launcher, *own, '--', *AWKWARD)
  assert done.returncode == 2 and message in done.stderr and calls == [], done.stderr


def test_one_gpu_host_runs_it_in_one_process(stage):
  own = LAUNCHERS['gpu_host.sh']
  done, calls = stage.run('gpu_host.sh', *own, '--', *AWKWARD, play={'python': '[ "$2" = datasel.topology ]'})
  assert done.returncode == 1, 'the status of the run'
  assert calls == [['python', *gate_of(own)], ['python', *RUN]]


# ---- Colab


def test_colab_keeps_the_corpora_on_drive_too_and_takes_no_cpu_for_a_tpu(stage):
  kept = 'printf "%s %s\\n" "$DATASEL_CACHE" "$JAX_PLATFORMS" >> "$NOTES.env"; [ "$2" = datasel.topology ]'
  drive = stage.folder / 'My Drive'
  run = [CONFIG, f'--workdir={drive}/datasel/x']
  own = ['--topology=v6e:1x1', f'--drive={drive}/datasel']
  done, calls = stage.run('colab.sh', *own, '--', *run, play={'python': kept})
  assert done.returncode == 2 and "drive.mount('/content/drive')" in done.stderr and calls == []
  assert not drive.exists()
  drive.mkdir()
  done, calls = stage.run('colab.sh', *own, '--', *run, play={'python': kept}, DATASEL_CACHE='/x', JAX_PLATFORMS='y')
  assert done.returncode == 1, 'the status of the run'
  assert calls == [['python', '-m', 'datasel.topology', CONFIG, own[0]], ['python', '-m', 'datasel.main', *run]]
  assert pathlib.Path(f'{stage.notes}.env').read_text().splitlines()[1] == f'{drive}/datasel/cache tpu,cpu'


@pytest.mark.parametrize('smi,platforms,extra', [(0, 'cuda,cpu', 'cuda,demo'), (1, 'cpu', 'demo')])
def test_colab_asks_the_device_itself_where_the_gate_does_not_know_it(stage, smi, platforms, extra):
  _script(stage.folder / 'bin/nvidia-smi', f'#!/bin/sh\nexit {smi}\n')
  stage.environment(stage.checkout, 'colab', extra)
  done, _ = stage.run('colab.sh', '--drive=/shared', '--dry-run', '--', *AWKWARD)
  shown = [shlex.split(line) for line in done.stdout.splitlines()]
  python = str(stage.checkout / '.venv-colab/bin/python')
  want = ['env', 'DATASEL_CACHE=/shared/cache', f'JAX_PLATFORMS={platforms}', python, *RUN]
  assert shown == [[*want, '--dry_run'], want], done.stderr
  drive = ['--drive=' + str(stage.folder / 'datasel'), '--', CONFIG, f'--workdir={stage.folder}/datasel/x']
  done, calls = stage.run('colab.sh', *drive, play={'python': 'exit 2'})
  assert done.returncode == 2 and 'nothing was started' in done.stderr
  assert calls == [['python', '-m', 'datasel.main', *drive[2:], '--dry_run']]
  done, calls = stage.run('colab.sh', *drive)
  assert done.returncode == 0 and calls[1] == calls[0][:-1]


def test_what_the_tour_runs_on_colab_is_taken(stage, monkeypatch):
  cell = json.loads((ROOT / 'notebooks/tour.ipynb').read_text(encoding='utf-8'))['cells'][-1]
  mounted, commands = [], []
  colab = types.SimpleNamespace(drive=types.SimpleNamespace(mount=mounted.append))
  monkeypatch.setitem(sys.modules, 'google.colab', colab)
  exec(''.join(cell['source']), {'ON_COLAB': True, 'execute': lambda *command: commands.append(command)})
  [(bash, script, *flags)] = commands
  assert (mounted, bash, script) == (['/content/drive'], 'bash', 'launch/colab.sh')
  done, _ = stage.run('colab.sh', '--dry-run', *flags)
  assert done.returncode == 0, done.stderr


# ---- TPU pods

# A cloud of one slice, its state in two files, and one host, whose home is $HOME/host.
CLOUD = r'''
state() { cat "$HOME/$1" 2>/dev/null; }
case "$3 $4" in
  'queued-resources create') echo ACTIVE > "$HOME/queue"; echo READY > "$HOME/node" ;;
  'queued-resources delete') rm -f "$HOME/queue" "$HOME/node" ;;
  'queued-resources list') printf 'other\tACTIVE\n'; [ -z "$(state queue)" ] || printf 'pod\t%s\n' "$(state queue)" ;;
  'tpu-vm describe') state node ;;
  'tpu-vm scp') for file in "${@:5}"; do case "$file" in /*) cp "$file" "$HOME/host/" ;; esac; done ;;
  'tpu-vm ssh')
    cd "$HOME/host"
    for flag in "$@"; do case "$flag" in --command=*) HOME="$PWD" bash -c "${flag#*=}"; exit ;; esac; done ;;
esac
'''


@pytest.fixture
def cloud(stage):
  """The host's environment is there already; the checkout is a git one."""
  host = stage.folder / 'elsewhere/host'
  (host / 'datasel').mkdir(parents=True)
  (host / 'datasel/left-over.py').touch()
  shutil.copy(stage.checkout / 'setup.py', host / 'datasel')
  stage.environment(host / 'datasel', 'tpu', 'tpu')
  (stage.checkout / '.gitignore').write_text('.venv-*/\n')
  subprocess.run(['git', 'init', '--quiet', stage.checkout], check=True)
  return stage


def verbs(calls):
  return [' '.join(call[3:5]) if call[0] == 'gcloud' else call[2] for call in calls
          if call[4:5] not in (['list'], ['describe'])]


ONCE = ['tpu-vm scp', 'tpu-vm ssh', 'datasel.main']


def test_a_pod_is_made_used_and_deleted(cloud):
  done, calls = cloud.run('tpu_pod.sh', *POD, '--spot', '--project=p', '--', *AWKWARD, play={'gcloud': CLOUD})
  assert done.returncode == 0, done.stderr
  assert verbs(calls) == ['datasel.topology', 'queued-resources create', *ONCE, 'queued-resources delete']
  create = next(call for call in calls if call[4:5] == ['create'])
  assert create == ['gcloud', 'compute', 'tpus', 'queued-resources', 'create', 'pod', '--node-id=pod',
                    '--accelerator-type=v5p-256', '--runtime-version=v2-alpha-tpuv5', '--spot', '--project=p',
                    '--zone=z']
  assert all('--zone=z' in call and '--project=p' in call for call in calls if call[0] == 'gcloud')
  assert [call for call in calls if 'datasel.main' in call] == [['python', *RUN, '--distributed']]
  home = cloud.folder / 'elsewhere/host/datasel'
  assert (home / CONFIG.split('=')[1]).is_file() and not (home / 'left-over.py').exists()
  assert not list(cloud.folder.glob('datasel-pod-*'))


PREEMPT = '''
if [ "$2" = datasel.main ] && [ ! -e "$NOTES.once" ]; then
  touch "$NOTES.once"
  echo PREEMPTED > "$HOME/../node"
  exit 1
fi
'''


def test_a_preempted_pod_is_queued_again_and_the_run_goes_on(cloud):
  done, calls = cloud.run('tpu_pod.sh', *POD, '--', *AWKWARD, play={'gcloud': CLOUD, 'python': PREEMPT})
  assert done.returncode == 0, done.stderr
  again = ['queued-resources delete', 'queued-resources create', *ONCE, 'queued-resources delete']
  assert verbs(calls) == ['datasel.topology', 'queued-resources create', *ONCE, *again]
  assert 'was preempted' in done.stderr


@pytest.mark.parametrize('status', [1, 134, 143, 255])
def test_a_run_that_ended_without_a_preemption_goes_on_in_the_same_pod(cloud, status):
  once = PREEMPT.replace('echo PREEMPTED > "$HOME/../node"\n  exit 1', f'exit {status}')
  done, calls = cloud.run('tpu_pod.sh', *POD, '--keep', '--', *AWKWARD, play={'gcloud': CLOUD, 'python': once})
  assert done.returncode == 0, done.stderr
  assert verbs(calls) == ['datasel.topology', 'queued-resources create', *ONCE, *ONCE]
  assert 'pod is kept' in done.stderr


def test_a_run_that_refuses_its_input_is_not_repeated_and_its_pod_not_paid_for(cloud):
  play = {'gcloud': CLOUD, 'python': '[ "$2" != datasel.main ] || exit 2'}
  done, calls = cloud.run('tpu_pod.sh', *POD, '--', *AWKWARD, play=play)
  assert done.returncode == 2 and 'the run refuses its input' in done.stderr
  assert verbs(calls) == ['datasel.topology', 'queued-resources create', *ONCE, 'queued-resources delete']


@pytest.mark.parametrize('status', [1, 143])
def test_a_run_that_stops_again_and_again_at_once_is_given_up_and_its_pod_not_paid_for(cloud, status):
  play = {'gcloud': CLOUD, 'python': f'[ "$2" != datasel.main ] || exit {status}'}
  done, calls = cloud.run('tpu_pod.sh', *POD, '--', *AWKWARD, play=play)
  assert done.returncode == status and 'five attempts' in done.stderr
  assert verbs(calls).count('datasel.main') == 5 and verbs(calls)[-1] == 'queued-resources delete'


def test_a_pod_that_is_there_is_used_and_one_that_cannot_be_had_is_reported(cloud):
  home = cloud.folder / 'elsewhere'
  (home / 'queue').write_text('ACTIVE')
  (home / 'node').write_text('READY')
  done, calls = cloud.run('tpu_pod.sh', *POD, '--', *AWKWARD, play={'gcloud': CLOUD})
  assert done.returncode == 0 and verbs(calls) == ['datasel.topology', *ONCE, 'queued-resources delete']
  (home / 'queue').write_text('FAILED')
  done, calls = cloud.run('tpu_pod.sh', *POD, '--', *AWKWARD, play={'gcloud': CLOUD})
  assert done.returncode == 1 and 'could not serve' in done.stderr
  assert verbs(calls) == ['datasel.topology', 'queued-resources delete']


def test_a_setup_script_runs_on_the_host_before_all_else(cloud):
  (cloud.folder / 'elsewhere/mount.sh').write_text('echo mounted > "$HOME/mounted"; exit 7\n')
  done, calls = cloud.run('tpu_pod.sh', *POD, '--setup=mount.sh', '--', *AWKWARD, play={'gcloud': CLOUD})
  assert done.returncode == 7 and 'datasel.main' not in verbs(calls)
  assert (cloud.folder / 'elsewhere/host/mounted').exists()


def test_a_process_whose_line_was_lost_saves_and_ends_before_the_next_begins(cloud):
  with subprocess.Popen([sys.executable, '-c', 'input()', 'datasel.main'], stdin=subprocess.PIPE) as lost:
    (cloud.folder / 'elsewhere/host/datasel.pid').write_text(f'{lost.pid}\n')
    done, calls = cloud.run('tpu_pod.sh', *POD, '--', *AWKWARD, play={'gcloud': CLOUD})
    assert done.returncode == 0 and verbs(calls)[2:5] == ONCE
    assert lost.wait(timeout=5) == -signal.SIGTERM


# ---- Slurm


def test_slurm_gets_a_process_for_each_gpu_and_its_own_options(stage):
  done, calls = stage.run('slurm.sh', *SLURM, '--partition=gpu x', '--time=1-0', '--', *AWKWARD)
  assert done.returncode == 0, done.stderr
  script = str(stage.checkout / 'launch/slurm.sbatch')
  assert calls[1] == ['sbatch', '--nodes=4', '--gpus-per-node=8', '--ntasks-per-node=8', '--partition=gpu x',
                      '--time=1-0', script, str(stage.checkout), *AWKWARD]
  directives = [line for line in pathlib.Path(script).read_text().splitlines() if line.startswith('#SBATCH')]
  assert '#SBATCH --requeue' in directives and '#SBATCH --signal=TERM@180' in directives


@pytest.mark.parametrize('status,state,before,requeued', [
  (0, 'RUNNING', 0, False), (2, 'RUNNING', 0, False), (143, 'RUNNING', 0, True), (143, 'RUNNING', 99, True),
  (143, 'COMPLETING', 0, False), (1, 'RUNNING', 0, True), (134, 'RUNNING', 4, True), (134, 'RUNNING', 5, False),
  (1, 'COMPLETING', 0, False)])
def test_a_slurm_job_is_queued_again_unless_it_is_done_refused_ended_or_failed_often(
    stage, status, state, before, requeued):
  play = {'srun': f'exit {status}', 'squeue': f'echo {state}'}
  restarts = {'SLURM_RESTART_COUNT': str(before)} if before else {}
  done, calls = stage.run('slurm.sbatch', str(stage.checkout), *AWKWARD, play=play, SLURM_JOB_ID='7', **restarts)
  assert done.returncode == status
  assert calls[0] == ['srun', '--kill-on-bad-exit=0', '.venv-cuda/bin/python', *RUN, '--distributed']
  assert (['scontrol', 'requeue', '7'] in calls) == requeued


# ---- GKE


def rendered(stage, *own):
  done, _ = stage.run('gke_jobset.py', *own, '--dry-run', '--', *AWKWARD)
  assert done.returncode == 0, done.stderr
  return yaml.safe_load(done.stdout)


def expanded(word, environment):
  """What Kubernetes makes of a word of a command: $(NAME) is replaced where NAME is known, and $$ is a dollar."""
  parts = word.split('$$')
  for name, value in environment.items():
    parts = [part.replace(f'$({name})', value) for part in parts]
  return '$'.join(parts)


@pytest.mark.parametrize('shape,kind,hosts,each', [
  ('v4:2x2x2', 'tpu-v4-podslice', 2, 4), ('v5e:1x1', 'tpu-v5-lite-podslice', 1, 1),
  ('v5e:16x16', 'tpu-v5-lite-podslice', 64, 4), ('v5p:4x4x8', 'tpu-v5p-slice', 32, 4),
  ('v6e:2x4', 'tpu-v6e-slice', 1, 8)])
def test_a_jobset_for_tpus_fills_one_slice(stage, shape, kind, hosts, each):
  manifest = rendered(stage, '--name=set', '--image=image', f'--topology={shape}', '--claim=disk', '--spot')
  job = manifest['spec']['replicatedJobs'][0]['template']['spec']
  pod = job['template']['spec']
  assert (manifest['apiVersion'], manifest['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
  assert (job['parallelism'], job['completions'], job['backoffLimit']) == (hosts, hosts, 0)
  assert pod['nodeSelector'] == {'cloud.google.com/gke-tpu-accelerator': kind, 'cloud.google.com/gke-spot': 'true',
                                 'cloud.google.com/gke-tpu-topology': shape.split(':')[1]}
  [container] = pod['containers']
  assert container['resources'] == {'limits': {'google.com/tpu': each}} and container['env'] == []
  assert [expanded(word, {'HOME': '/root'}) for word in container['command']] == ['python', *RUN, '--distributed']
  assert {'name': 'shared', 'persistentVolumeClaim': {'claimName': 'disk'}} in pod['volumes']
  assert {'name': 'shared', 'mountPath': '/shared'} in container['volumeMounts']


def test_a_jobset_restarts_whole_unless_the_input_was_refused(stage):
  spec = rendered(stage, *GKE, '--max_restarts=9')['spec']
  assert spec['failurePolicy'] == {'maxRestarts': 9, 'rules': [
    {'action': 'FailJobSet', 'onJobFailureReasons': ['PodFailurePolicy']}]}
  job = spec['replicatedJobs'][0]['template']['spec']
  assert job['template']['spec']['restartPolicy'] == 'Never'  # else a pod failure policy is not allowed
  [rule] = job['podFailurePolicy']['rules']
  assert rule == {'action': 'FailJob', 'onExitCodes': {'containerName': 'datasel', 'operator': 'In', 'values': [2]}}


def test_a_jobset_for_gpus_tells_each_process_its_place(stage):
  manifest = rendered(stage, '--name=set', '--image=image', '--topology=h200:16', '--claim=disk')
  job = manifest['spec']['replicatedJobs'][0]['template']['spec']
  [container] = job['template']['spec']['containers']
  assert job['completions'] == 2 and container['resources'] == {'limits': {'nvidia.com/gpu': 8}}
  environment = {variable['name']: variable for variable in container['env']}
  assert environment['JAX_COORDINATOR_ADDRESS']['value'] == 'set-hosts-0-0.set:8476'
  assert environment['JAX_NUM_PROCESSES']['value'] == '2'
  assert environment['JAX_PROCESS_ID']['valueFrom'] == {
    'fieldRef': {'fieldPath': "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}


def test_the_manifest_is_applied_and_xpk_gets_the_same_command(stage):
  gke_gate(stage, 0)
  kept = str(stage.folder / 'applied.yaml')
  done, calls = stage.run('gke_jobset.py', *GKE, '--', *AWKWARD, play={'kubectl': f'cat > {shlex.quote(kept)}'})
  assert done.returncode == 0 and calls == [['kubectl', 'apply', '--filename=-']]
  assert yaml.safe_load(pathlib.Path(kept).read_text()) == rendered(stage, *GKE)
  done, [call] = stage.run('gke_jobset.py', *GKE, '--xpk=cluster', '--', *AWKWARD)
  assert call[:-1] == ['xpk', 'workload', 'create', '--cluster=cluster', '--workload=set', '--tpu-type=v5p-256',
                       '--num-slices=1', '--docker-image=image', '--max-restarts=50', '--restart-on-exit-codes=1']
  assert shlex.split(call[-1]) == ['--command=cd', '/datasel', '&&', 'exec', 'python', *RUN, '--distributed']


def test_a_missing_command_is_named(stage):
  gke_gate(stage, 0)
  done, _ = stage.run('gke_jobset.py', *GKE, '--', *AWKWARD, path=str(stage.folder / 'elsewhere'))
  assert done.returncode == 2 and 'kubectl is not installed' in done.stderr
  assert os.listdir(stage.folder / 'elsewhere') == []
