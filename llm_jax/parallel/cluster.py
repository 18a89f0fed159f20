"""Which processes make up a run: from flags, or from what started them.

The first of these that applies:

| who knows it | how |
|---|---|
| flags | `--coordinator --num_processes --process_id`, all three |
| Slurm | `SLURM_STEP_NUM_TASKS` above 1 (srun sets it, a batch script alone does not) |
| Open MPI | `OMPI_COMM_WORLD_SIZE` above 1 |
| a TPU pod on GKE | TPU chips here, and several hosts in `TPU_WORKER_HOSTNAMES`, \
  `TPU_PROCESS_ADDRESSES` or `MEGASCALE_NUM_SLICES` |
| a TPU pod of TPU VMs | TPU chips here, and several workers at the machine's metadata server |

Otherwise there is one process: on a laptop, a GPU box, a single TPU VM, in Colab. The metadata
server is asked only where there are TPU chips, once, for METADATA_SECONDS at most.
"""

import os
import urllib.request
from typing import Any

from jax._src import hardware_utils  # the chip count has no public name

METADATA_SECONDS = 2


def arguments(
  coordinator: str | None, num_processes: int | None, process_id: int | None
) -> dict[str, Any] | None:
  """Arguments of `jax.distributed.initialize`; None where this is the only process.

  Args:
    coordinator: HOST:PORT where process 0 listens.
    num_processes: how many there are.
    process_id: which of them this is, from 0.

  Raises:
    ValueError: arguments that do not agree, or an environment without the address of process 0.
  """
  return _from_flags(coordinator, num_processes, process_id) or _from_environment()


def _from_flags(
  coordinator: str | None, num_processes: int | None, process_id: int | None
) -> dict[str, Any] | None:
  flags = {
    '--coordinator': coordinator,
    '--num_processes': num_processes,
    '--process_id': process_id,
  }
  missing = [name for name, value in flags.items() if value is None]
  if len(missing) == len(flags):
    return None
  if coordinator is None or num_processes is None or process_id is None:
    raise ValueError(
      f'{" and ".join(missing)} must be given too: {", ".join(flags)} go together, or none of them.'
    )
  _check_flags(coordinator, num_processes, process_id)
  if num_processes == 1:
    return None
  return dict(
    coordinator_address=coordinator,
    num_processes=num_processes,
    process_id=process_id,
    cluster_detection_method='deactivate',
  )


def _check_flags(coordinator: str, num_processes: int, process_id: int) -> None:
  host, _, port = coordinator.rpartition(':')
  if not (host and port.isdigit() and 0 < int(port) < 65536):
    raise ValueError(
      f'--coordinator={coordinator} must be HOST:PORT, the same on all processes: the host of '
      'process 0, and a port that is free there.'
    )
  if num_processes < 1:
    raise ValueError(f'--num_processes={num_processes} must be at least 1.')
  if not 0 <= process_id < num_processes:
    raise ValueError(
      f'--process_id={process_id} must be from 0 to {num_processes - 1}, for '
      f'--num_processes={num_processes}.'
    )


def _from_environment() -> dict[str, Any] | None:
  if _number('SLURM_STEP_NUM_TASKS') > 1:
    return dict(cluster_detection_method='slurm')
  if _number('OMPI_COMM_WORLD_SIZE') > 1:
    if 'OMPI_MCA_orte_hnp_uri' not in os.environ:
      raise ValueError(
        'this Open MPI does not say where process 0 is; give it by flags: mpirun ... bash -c '
        "'python -m llm_jax.main ... --coordinator=HOST:PORT "
        "--num_processes=$OMPI_COMM_WORLD_SIZE --process_id=$OMPI_COMM_WORLD_RANK'"
      )
    return dict(cluster_detection_method='ompi')
  return {} if _tpu_hosts() > 1 else None


def _tpu_hosts() -> int:
  """How many hosts the TPU slices have that this machine belongs to; 1 where there is no TPU, or
  nobody to ask.
  """
  if os.environ.get('JAX_PLATFORMS') == 'cpu':
    return 1
  chips, _ = hardware_utils.num_available_tpu_chips_and_device_id()
  if not chips:
    return 1
  slices = _number('MEGASCALE_NUM_SLICES')
  names = os.environ.get('TPU_PROCESS_ADDRESSES') or os.environ.get('TPU_WORKER_HOSTNAMES')
  if names:
    return len(names.split(',')) * max(slices, 1)
  if slices > 1:
    return slices
  return 1 if 'TPU_SKIP_MDS_QUERY' in os.environ else _workers_by_metadata()


def _workers_by_metadata() -> int:
  server = os.environ.get('GCE_METADATA_IP', 'metadata.google.internal')
  request = urllib.request.Request(
    f'http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints',
    headers={'Metadata-Flavor': 'Google'},
  )
  try:
    with urllib.request.urlopen(request, timeout=METADATA_SECONDS) as answer:
      return len(answer.read().decode().split(','))
  except OSError:
    return 1


def _number(variable: str) -> int:
  value = os.environ.get(variable, '')
  return int(value) if value.isdigit() else 0
