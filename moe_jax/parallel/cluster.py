"""Who started this process, and where the others are: flags, environment, scheduler.

Nothing here uses a device or connects. `find` reads the environment and gives the
arguments of `jax.distributed.initialize`; `distributed.start` calls it.

JAX's own detection is used where it is right: in Open MPI 4, and on TPU pods. For
SLURM it gives each task one GPU whatever the tasks per node, and fails where SLURM has
bound the GPUs; Open MPI 5 no longer says where its head is; of other MPIs and of
Kubernetes it knows nothing without further packages.
"""

import dataclasses
import importlib.util
import os
import re
from typing import Any

from moe_jax.errors import UserError

_FLAGS = {
    "--coordinator": "MOE_JAX_COORDINATOR",
    "--num_processes": "MOE_JAX_NUM_PROCESSES",
    "--process_id": "MOE_JAX_PROCESS_ID",
}
_SLURM_STEP = ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of a run, as one of them sees them.

    Attributes:
      found_by: what named them, in words.
      num_processes: how many; 0 where only JAX can tell.
      arguments: of `jax.distributed.initialize`.
    """

    found_by: str
    num_processes: int = 0
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)


def find(
    coordinator: str = "",
    num_processes: int = 0,
    process_id: int = -1,
    accelerator: str = "",
) -> Cluster | None:
    """The processes that this one belongs to, or None: it is alone.

    Args:
      coordinator: HOST:PORT of process 0, as a flag; or "".
      num_processes: processes of the run, as a flag; or 0.
      process_id: which of them this one is, as a flag; or -1.
      accelerator: "tpu", "gpu" or "".

    Raises:
      UserError: half an address, or a scheduler whose head cannot be found.
    """
    given = (
        coordinator or os.environ.get("MOE_JAX_COORDINATOR", ""),
        num_processes or number("MOE_JAX_NUM_PROCESSES", 0),
        process_id if process_id != -1 else number("MOE_JAX_PROCESS_ID", -1),
    )
    if given != ("", 0, -1):
        return _by_hand(*given, accelerator)
    # Before SLURM: inside an allocation mpirun starts its daemons by srun, and what
    # they start inherits the numbers of the daemons.
    if (size := number("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return _open_mpi(size)
    if _slurm_tasks() > 1 and in_slurm_step():
        return _slurm(accelerator)
    if (size := number("PMI_SIZE", 1)) > 1:
        raise UserError(
            f"started by MPI as one of {size} processes (PMI_SIZE), but nothing says "
            "where process 0 is: set MOE_JAX_COORDINATOR=HOST:PORT, as launch/mpi.sh "
            "does, or give --coordinator"
        )
    # A pod is known from its metadata server, which JAX asks.
    return Cluster("TPU metadata") if accelerator == "tpu" else None


def number(name: str, default: int) -> int:
    """A whole number of the environment.

    Raises:
      UserError: it is none.
    """
    text = os.environ.get(name, "")
    try:
        return int(text) if text else default
    except ValueError:
        raise UserError(f"{name}={text!r} in the environment: not a number") from None


def alone_in_slurm() -> int:
    """Tasks of the SLURM allocation that this process is no task of, or 0."""
    tasks = _slurm_tasks()
    return tasks if tasks > 1 and not in_slurm_step() else 0


def expected_tpu_hosts() -> int:
    """Hosts that a TPU's environment names; 1 where it names none."""
    names = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return max(1, len([name for name in names.split(",") if name])) * max(
        1, number("MEGASCALE_NUM_SLICES", 1)
    )


def _by_hand(
    coordinator: str, num_processes: int, process_id: int, accelerator: str
) -> Cluster:
    by, local = "flags", (0, 1)
    if coordinator and num_processes == 0 and process_id == -1:
        by, num_processes, process_id, local = _ranks()
    _check_by_hand(coordinator, num_processes, process_id)
    return Cluster(
        by,
        num_processes,
        _arguments(coordinator, num_processes, process_id, *local, accelerator),
    )


def _ranks() -> tuple[str, int, int, tuple[int, int]]:
    """Number and index of this process by a scheduler, in all and on this host."""
    if size := number("OMPI_COMM_WORLD_SIZE", 0):
        local = "OMPI_COMM_WORLD_LOCAL_"
        here = number(f"{local}RANK", 0), number(f"{local}SIZE", 1)
        return "Open MPI", size, number("OMPI_COMM_WORLD_RANK", -1), here
    if in_slurm_step():
        here = number("SLURM_LOCALID", 0), _slurm_tasks_here()
        return "SLURM", _slurm_tasks(), number("SLURM_PROCID", -1), here
    if size := number("PMI_SIZE", 0):
        here = number("MPI_LOCALRANKID", 0), number("MPI_LOCALNRANKS", 1)
        return "MPI", size, number("PMI_RANK", -1), here
    return "flags", 0, -1, (0, 1)


def _check_by_hand(coordinator: str, num_processes: int, process_id: int) -> None:
    there = (bool(coordinator), num_processes != 0, process_id != -1)
    if not all(there):
        missing = [flag for flag, has in zip(_FLAGS, there, strict=True) if not has]
        raise UserError(
            f"{', '.join(missing)} missing: a run on many hosts needs all of "
            f"{', '.join(_FLAGS)} (or {', '.join(_FLAGS.values())}); the coordinator "
            "alone is enough under srun and mpirun"
        )
    if num_processes < 1:
        raise UserError(f"--num_processes={num_processes}: must be at least 1")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id}: must be below --num_processes="
            f"{num_processes}, and not negative"
        )
    match = re.fullmatch(r"[^\s/]+:(\d+)", coordinator)
    if not match or not 1 <= int(match[1]) <= 65535:
        raise UserError(
            f"--coordinator={coordinator!r}: must be HOST:PORT, the port from 1 to "
            "65535"
        )


def _arguments(
    coordinator: str,
    num_processes: int,
    process_id: int,
    local_rank: int,
    local_size: int,
    accelerator: str,
) -> dict[str, Any]:
    found = {
        "coordinator_address": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
        "cluster_detection_method": "deactivate",
    }
    if accelerator == "gpu":
        found["local_device_ids"] = _gpus(local_rank, local_size)
    return found


def _gpus(local_rank: int, local_size: int) -> list[int] | None:
    """Which of the GPUs that a process sees are its own; None: all of them.

    Raises:
      UserError: they cannot be shared out.
    """
    if local_size <= 1 or os.environ.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not seen:
        return [local_rank]
    count = len(seen.split(","))
    if count == 1:
        return None  # the scheduler has given this process its own
    if count % local_size:
        raise UserError(
            f"{local_size} processes on this host cannot share {count} GPUs "
            f"(CUDA_VISIBLE_DEVICES={seen}): start as many as divide them, or one a "
            "host, or set JAX_LOCAL_DEVICE_IDS"
        )
    share = count // local_size
    return list(range(local_rank * share, (local_rank + 1) * share))


def _open_mpi(size: int) -> Cluster:
    if "OMPI_MCA_orte_hnp_uri" in os.environ:
        return Cluster("Open MPI", size, {"cluster_detection_method": "ompi"})
    if importlib.util.find_spec("mpi4py"):
        return Cluster("mpi4py", size, {"cluster_detection_method": "mpi4py"})
    raise UserError(
        f"started by mpirun as one of {size} processes, but Open MPI 5 does not tell "
        "where process 0 is: start with launch/mpi.sh, or set "
        "MOE_JAX_COORDINATOR=HOST:PORT, or install mpi4py"
    )


def _slurm_tasks() -> int:
    return number("SLURM_NTASKS", 1)


def in_slurm_step() -> bool:
    """Whether srun started this process; a batch script or a shell is no step."""
    return all(f"SLURM_{name}" in os.environ for name in _SLURM_STEP)


def _slurm(accelerator: str) -> Cluster:
    size, local = _slurm_tasks(), (number("SLURM_LOCALID", 0), _slurm_tasks_here())
    host = _first_host(os.environ["SLURM_STEP_NODELIST"])
    # Of the last 4096 ports, by the job and its step: two steps may run at a time.
    place = number("SLURM_JOB_ID", 0) * 16 + number("SLURM_STEP_ID", 0)
    port = number("JAX_COORDINATOR_PORT", 61440 + place % 4096)
    arguments = _arguments(
        f"{host}:{port}", size, number("SLURM_PROCID", 0), *local, accelerator
    )
    return Cluster("SLURM", size, arguments)


def _first_host(nodes: str) -> str:
    """Of `node[007-9,12],other`: node007."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodes)
    if not match:
        raise UserError(f"SLURM_STEP_NODELIST={nodes!r} in the environment: no hosts")
    return match[1] + (match[2] or "") + match[3]


def _slurm_tasks_here() -> int:
    """Tasks of this step on this host; 1 where SLURM does not say.

    `SLURM_STEP_TASKS_PER_NODE` is like `8(x2),4`: two hosts with 8, one with 4.
    """
    counts: list[int] = []
    for part in os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            counts += [int(match[1])] * int(match[2] or 1)
    index = number("SLURM_NODEID", 0)
    return counts[index] if index < len(counts) else 1
