"""Starting JAX on one or many hosts, and ending without leaving a host behind.

A process of a run on many hosts cannot end like any other: a normal exit waits for
the others, and the others wait in a collective for it. So a failure leaves by
`exit_now`, a stuck step is ended by `Watchdog`, and a request to stop is agreed upon
by all processes through `StopSignals`.
"""

import faulthandler
import glob
import importlib.util
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from importlib import metadata
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from moe_jax.config import MeshConfig
from moe_jax.errors import UserError

_HEARTBEAT_SECS = 30
# Of a process that ends while others work on; `finish` waits for them before this.
_SHUTDOWN_SECS = 10
_SLURM = ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")


def start(
    mesh: MeshConfig,
    *,
    coordinator: str = "",
    num_processes: int = 0,
    process_id: int = -1,
) -> None:
    """Connects this process with the others of the run; call before any device use.

    Without arguments it takes `MOE_JAX_COORDINATOR`, `MOE_JAX_NUM_PROCESSES` and
    `MOE_JAX_PROCESS_ID` (set by launch/local.py), then what SLURM, Open MPI or a TPU
    pod say, and else runs alone. On CPU it also makes as many devices as the mesh
    needs, or `MOE_JAX_LOCAL_DEVICES` per process.

    Args:
      mesh: how many devices the run needs.
      coordinator: HOST:PORT of process 0.
      num_processes: processes of the run.
      process_id: which of them this one is, from 0.

    Raises:
      UserError: only some of the three are given, or they make no sense.
    """
    if jax.distributed.is_initialized():
        return
    coordinator = coordinator or os.environ.get("MOE_JAX_COORDINATOR", "")
    num_processes = num_processes or _env_int("MOE_JAX_NUM_PROCESSES", 0)
    if process_id < 0:
        process_id = _env_int("MOE_JAX_PROCESS_ID", -1)
    explicit = _explicit(coordinator, num_processes, process_id)
    cluster = "" if explicit else _cluster()
    accelerator = _accelerator()
    if not accelerator:
        _make_cpu_devices(mesh, num_processes if explicit else _cluster_size(cluster))
    if explicit:
        _connect(
            coordinator_address=coordinator,
            num_processes=num_processes,
            process_id=process_id,
            cluster_detection_method="deactivate",
        )
    elif cluster:
        _connect(cluster_detection_method="mpi4py" if cluster == "mpi" else None)
    elif accelerator == "tpu":
        # A pod is known from the metadata server only, which JAX asks.
        try:
            _connect()
        except ValueError:
            pass  # no pod: one host


def _connect(**arguments) -> None:
    jax.distributed.initialize(
        heartbeat_timeout_seconds=_HEARTBEAT_SECS,
        shutdown_timeout_seconds=_SHUTDOWN_SECS,
        **arguments,
    )


def _env_int(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    try:
        return int(text) if text else default
    except ValueError:
        raise UserError(f"{name}={text!r} in the environment: not a number") from None


def _explicit(coordinator: str, num_processes: int, process_id: int) -> bool:
    given = {
        "--coordinator": bool(coordinator),
        "--num_processes": num_processes > 0,
        "--process_id": process_id >= 0,
    }
    if not any(given.values()):
        return False
    missing = [name for name, there in given.items() if not there]
    if missing:
        raise UserError(
            f"{', '.join(missing)} missing: a run on many hosts needs all of "
            f"{', '.join(given)} (or the MOE_JAX_... variables of the same names)"
        )
    if process_id >= num_processes:
        raise UserError(
            f"--process_id={process_id}: must be below --num_processes={num_processes}"
        )
    if not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(f"--coordinator={coordinator!r}: must be HOST:PORT")
    return True


def _cluster() -> str:
    """Name of the scheduler that started several processes, or ""."""
    env = os.environ
    if _env_int("SLURM_NTASKS", 1) > 1 and all(f"SLURM_{n}" in env for n in _SLURM):
        return "slurm"
    if _env_int("OMPI_COMM_WORLD_SIZE", 1) > 1:
        if "OMPI_MCA_orte_hnp_uri" in env:
            return "openmpi"
        # Open MPI 5 no longer tells where its head node is.
        if importlib.util.find_spec("mpi4py"):
            return "mpi"
        raise UserError(
            "started by mpirun, but this Open MPI does not tell the address of its "
            "head node: install mpi4py, or give --coordinator, --num_processes and "
            "--process_id"
        )
    return ""


def _cluster_size(cluster: str) -> int:
    names = {"slurm": "SLURM_NTASKS", "openmpi": "OMPI_COMM_WORLD_SIZE"}
    names["mpi"] = names["openmpi"]
    return _env_int(names[cluster], 1) if cluster else 1


def _accelerator() -> str:
    """Which kind is here: "tpu", "gpu" or "".

    It starts no backend: that would fix the number of CPU devices and forbid
    `initialize`.
    """
    platforms = jax.config.jax_platforms or os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        first = platforms.split(",")[0]
        return {"cpu": "", "tpu": "tpu"}.get(first, "gpu")
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    if chips and importlib.util.find_spec("libtpu"):
        return "tpu"
    plugins = metadata.entry_points(group="jax_plugins")
    devices = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
    return "gpu" if plugins and any(map(os.path.exists, devices)) else ""


def _make_cpu_devices(mesh: MeshConfig, num_processes: int) -> None:
    forced = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if forced or jax.config.jax_num_cpu_devices > 0:
        return
    wanted = max(1, mesh.fixed_devices() // max(1, num_processes))
    wanted = _env_int("MOE_JAX_LOCAL_DEVICES", wanted)
    if wanted == 1:
        return
    try:
        jax.config.update("jax_num_cpu_devices", wanted)
    except RuntimeError:
        pass  # devices are in use already; the mesh says so where it matters


def is_started() -> bool:
    """Whether this process is connected as one of several.

    It asks nobody and starts no backend, so it is safe while others are down.
    """
    return jax.distributed.is_initialized()


def is_primary() -> bool:
    """Whether this process writes files and speaks to the user."""
    return jax.process_index() == 0


def describe() -> str:
    """One line: processes, devices and their kind."""
    hosts, devices = jax.process_count(), jax.devices()
    kind = f"{devices[0].platform} ({devices[0].device_kind})"
    if kind == "cpu (cpu)":
        kind = "cpu"
    return (
        f"{hosts} process{'es' * (hosts > 1)}, {len(devices)} "
        f"device{'s' * (len(devices) > 1)} of kind {kind}"
    )


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    if is_started():
        multihost_utils.sync_global_devices(name)


def finish() -> None:
    """Waits for all processes, then leaves the run. Call at a normal end.

    Without the wait, a process that ends more than ten seconds before the others
    takes them down.
    """
    if is_started():
        barrier("finish")
        jax.distributed.shutdown()


def exit_now(code: int) -> NoReturn:
    """Ends this process at once; the others see its connection close and fail."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
    os._exit(code)


class Watchdog:
    """Ends the process when a step takes too long.

    JAX notices a process that died, but not one that is stuck, and then all wait
    for ever. Pause it around work of unknown length (compiling, final evaluation).
    """

    def __init__(self, seconds: float, where: str = ""):
        """Begins to watch at the first `beat`.

        Args:
          seconds: longest time between beats; 0 turns it off.
          where: name of this process; default: host and index.
        """
        self._seconds = seconds
        self._where = where or f"{socket.gethostname()} process {jax.process_index()}"
        self._last: tuple[float, str, int] | None = None
        self._stopped = threading.Event()
        if seconds > 0:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def beat(self, phase: str, step: int = -1) -> None:
        """Says that the process is alive and what it does next."""
        self._last = (time.monotonic(), phase, step)

    def pause(self) -> None:
        """Stops the clock until the next beat."""
        self._last = None

    def stop(self) -> None:
        """Ends the watch."""
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self._seconds / 4)):
            last = self._last
            if last and time.monotonic() - last[0] > self._seconds:
                self._end(*last)

    def _end(self, since: float, phase: str, step: int) -> None:
        # A pipe of a dead parent or a captured stream must not keep the process.
        try:
            at = f" at step {step}" if step >= 0 else ""
            print(
                f"watchdog: {self._where}: {phase}{at} has taken "
                f"{time.monotonic() - since:.0f} s, more than {self._seconds:g} s "
                "(config.train.watchdog_secs): ending this process. The stack of "
                "each thread follows.",
                file=sys.__stderr__,
                flush=True,
            )
            faulthandler.dump_traceback(sys.__stderr__)
        finally:
            os._exit(3)


class StopSignals:
    """Turns Ctrl-C and SIGTERM into a request to stop after a step.

    A second Ctrl-C raises KeyboardInterrupt. In a run of several processes JAX's
    preemption service listens for SIGTERM and makes all of them stop after the same
    step; a Ctrl-C is handed to it.

    Attributes:
      requested: name of the signal, or None.
    """

    def __init__(self):
        self.requested: str | None = None
        self._old: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            signals = [signal.SIGINT]
            if not is_started():
                # JAX's own handler must stay in place there.
                signals.append(signal.SIGTERM)
            self._old = {s: signal.signal(s, self._handle) for s in signals}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}

    def _handle(self, number: int, frame) -> None:
        name = signal.Signals(number).name
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = name
        if is_started():
            os.kill(os.getpid(), signal.SIGTERM)
        # A print could re-enter a buffered write that this handler interrupted.
        os.write(2, f"{name}: stopping; Ctrl-C stops at once\n".encode())

    def should_stop(self, step: int) -> bool:
        """Whether to stop after `step`; all processes must ask at every step."""
        if not is_started():
            return self.requested is not None
        if not multihost_utils.reached_preemption_sync_point(step):
            return False
        self.requested = self.requested or "SIGTERM"
        return True
