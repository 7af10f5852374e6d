"""Runs a config on a GKE cluster as a JobSet, which restarts it where it was after each preemption.

  python launch/gke_jobset.py --name=NAME --image=IMAGE --topology=v5p:4x4x8 --claim=PVC [--mount=/shared] [--spot]
    [--max_restarts=50] [--xpk=CLUSTER] [--dry-run]
    -- --config=configs/X.py --workdir=/shared/DIR [--config.KEY=VALUE ...]

IMAGE holds this checkout in /datasel (launch/Dockerfile makes one).  The volume claim, which must be ReadWriteMany
(Filestore, or a bucket by the GCS FUSE driver), is mounted on every host and holds the workdir and the token store.
--xpk hands the same command to xpk instead of kubectl.  --dry-run prints what would be applied.
"""

import argparse
import math
import pathlib
import re
import shlex
import subprocess
import sys

import yaml

REPO = pathlib.Path(__file__).resolve().parents[1]
# Of each kind: GKE's name for it, and xpk's with the units that it counts for each chip.
TPUS = {'v4': ('tpu-v4-podslice', 'v4', 2), 'v5e': ('tpu-v5-lite-podslice', 'v5litepod', 1),
        'v5p': ('tpu-v5p-slice', 'v5p', 2), 'v6e': ('tpu-v6e-slice', 'v6e', 1)}
GPUS = {'h100': 'nvidia-h100-80gb', 'h200': 'nvidia-h200-141gb'}
REFUSED = 2  # datasel.main's exit status for bad input, which no restart mends


def main(argv: list[str]) -> None:
  options, run_flags = parse(argv)
  run = ['python', '-m', 'datasel.main', *run_flags, '--distributed']
  if options.xpk:
    command = xpk(options, run)
    manifest, shown = None, shlex.join(command) + '\n'
  else:
    command = ['kubectl', 'apply', '--filename=-']
    manifest = shown = yaml.safe_dump(jobset(options, run), sort_keys=False)
  gate = ['-m', 'datasel.topology', f'--topology={options.topology}',
          *(flag for flag in run_flags if flag.startswith(('--config=', '--config.')))]
  if options.dry_run:
    print(f'# {shlex.join(["python", *gate])}\n# {shlex.join(command)}\n{shown}', end='')
    return
  status = subprocess.run([sys.executable, *gate], cwd=REPO, check=False).returncode
  if status:
    print(f'error: the gate refuses (exit status {status}, see above): nothing was started', file=sys.stderr)
    sys.exit(status)
  try:
    sys.exit(subprocess.run(command, input=manifest, text=True, check=False).returncode)
  except FileNotFoundError:
    fail(f'{command[0]} is not installed')


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
  """The launcher's own flags, and datasel.main's, checked."""
  own, run_flags = (argv[:argv.index('--')], argv[argv.index('--') + 1:]) if '--' in argv else (argv, [])
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                   allow_abbrev=False, usage='%(prog)s FLAGS -- FLAGS OF datasel.main')
  for flag in ('--name', '--image', '--topology'):
    parser.add_argument(flag, required=True)
  parser.add_argument('--claim', default='', help='volume claim with the workdir and the store')
  parser.add_argument('--mount', default='/shared', help='where it is mounted')
  parser.add_argument('--spot', action='store_true')
  parser.add_argument('--max_restarts', type=int, default=50)
  parser.add_argument('--xpk', default='', metavar='CLUSTER')
  parser.add_argument('--dry-run', action='store_true')
  options = parser.parse_args(own)
  if not re.fullmatch(r'[a-z]([a-z0-9-]{0,38}[a-z0-9])?', options.name):
    fail(f'--name={options.name}: want up to 40 letters, digits and dashes, a letter first')
  if not options.claim and not options.xpk:
    fail('--claim is missing: a ReadWriteMany volume claim, which every host mounts')
  if stray := [flag for flag in run_flags if not flag.startswith('--')]:
    fail(f'{stray} are not flags of datasel.main; want --FLAG=VALUE, all of them after --')
  values = dict(flag[2:].split('=', 1) for flag in run_flags if '=' in flag)
  config, workdir = values.get('config', ''), values.get('workdir', '')
  config = config.rsplit(':', 1)[0]  # X.py:smoke is the file X.py, called with smoke
  if not config or pathlib.PurePath(config).is_absolute() or not (REPO / config).is_file():
    fail(f'--config={config}: want, after --, a config file in {REPO}, by its path in there: the image has the same')
  if not pathlib.PurePosixPath(workdir).is_relative_to(options.mount) or not workdir.startswith('/'):
    fail(f'--workdir={workdir}: want, after --, a folder under {options.mount}, which every host sees')
  hosts(options.topology)
  return options, run_flags


def hosts(topology: str) -> tuple[str, str, int, int]:
  """'v5p:4x4x8' -> (kind, shape, hosts, chips on each); plain 'h200' is one GPU."""
  kind, _, shape = topology.partition(':')
  if topology in GPUS:
    shape = '1'
  if kind not in TPUS | GPUS or not re.fullmatch(r'\d+(x\d+)*', shape):
    fail(f'--topology={topology}: want KIND:SHAPE, such as v5p:4x4x8, h200 or h200:16; known kinds: '
         f'{sorted(TPUS | GPUS)}')
  chips = math.prod(map(int, shape.split('x')))
  single = {'v5e': 8, 'v6e': 8, 'h100': 8, 'h200': 8}.get(kind, 4)  # the largest host that stands alone
  each = chips if chips <= single else 8 if kind in GPUS else 4
  if chips < 1 or chips % each:
    fail(f'--topology={topology}: {chips} chips do not fill hosts of {each}')
  return kind, shape, chips // each, each


def jobset(options: argparse.Namespace, run: list[str]) -> dict:
  """The manifest: one indexed job, a pod on every host, restarted whole."""
  kind, shape, n_hosts, each = hosts(options.topology)
  volumes, mounts, environment = [], [], []
  if kind in TPUS:
    resource = 'google.com/tpu'
    selector = {'cloud.google.com/gke-tpu-accelerator': TPUS[kind][0], 'cloud.google.com/gke-tpu-topology': shape}
    # All pods on one node pool, which is one slice.
    annotations = {'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'}
  else:
    resource, annotations = 'nvidia.com/gpu', {}
    selector = {'cloud.google.com/gke-accelerator': GPUS[kind]}
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    environment = [
      {'name': 'JAX_COORDINATOR_ADDRESS', 'value': f'{options.name}-hosts-0-0.{options.name}:8476'},
      {'name': 'JAX_NUM_PROCESSES', 'value': str(n_hosts)},
      {'name': 'JAX_PROCESS_ID', 'valueFrom': {'fieldRef': {'fieldPath': index}}}]
    volumes.append({'name': 'shm', 'emptyDir': {'medium': 'Memory'}})  # NCCL's, beyond a container's 64 MB
    mounts.append({'name': 'shm', 'mountPath': '/dev/shm'})
  if options.spot:
    selector['cloud.google.com/gke-spot'] = 'true'
  volumes.append({'name': 'shared', 'persistentVolumeClaim': {'claimName': options.claim}})
  mounts.append({'name': 'shared', 'mountPath': options.mount})
  container = {
    'name': 'datasel', 'image': options.image, 'workingDir': '/datasel',
    'command': [word.replace('$(', '$$(') for word in run],  # else Kubernetes would expand $(NAME)
    'env': environment, 'resources': {'limits': {resource: each}}, 'volumeMounts': mounts}
  pod = {'restartPolicy': 'Never', 'terminationGracePeriodSeconds': 120, 'nodeSelector': selector,
         'containers': [container], 'volumes': volumes}
  job = {
    'parallelism': n_hosts, 'completions': n_hosts, 'backoffLimit': 0,  # one pod lost is all of them restarted
    'podFailurePolicy': {'rules': [{'action': 'FailJob', 'onExitCodes': {
      'containerName': 'datasel', 'operator': 'In', 'values': [REFUSED]}}]},
    'template': {'spec': pod}}
  return {
    'apiVersion': 'jobset.x-k8s.io/v1alpha2', 'kind': 'JobSet',
    'metadata': {'name': options.name, 'annotations': annotations},
    'spec': {
      'failurePolicy': {'maxRestarts': options.max_restarts,
                        'rules': [{'action': 'FailJobSet', 'onJobFailureReasons': ['PodFailurePolicy']}]},
      'replicatedJobs': [{'name': 'hosts', 'replicas': 1, 'template': {'spec': job}}]}}


def xpk(options: argparse.Namespace, run: list[str]) -> list[str]:
  """xpk's command for the same workload; what is mounted is set with `xpk storage`."""
  kind, _, n_hosts, each = hosts(options.topology)
  if kind not in TPUS:
    fail('--xpk is for TPUs; leave it out for GPUs')
  _, name, units = TPUS[kind]
  return ['xpk', 'workload', 'create', f'--cluster={options.xpk}', f'--workload={options.name}',
          f'--tpu-type={name}-{units * n_hosts * each}', '--num-slices=1', f'--docker-image={options.image}',
          f'--max-restarts={options.max_restarts}',
          '--restart-on-exit-codes=1',  # by itself it restarts only what a signal or a lost node has ended
          f'--command=cd /datasel && exec {shlex.join(run)}']


def fail(message: str) -> None:
  print(f'error: {message}', file=sys.stderr)
  sys.exit(2)


if __name__ == '__main__':
  main(sys.argv[1:])
