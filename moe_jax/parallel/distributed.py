"""Starting JAX on one or many hosts, and ending without leaving a host behind.

A process of a run on many hosts cannot end like any other: a normal exit waits for
the others, and the others wait in a collective for it. So a failure leaves by
`exit_now`, a stuck process is ended by `watchdog.Watchdog`, and a request to stop is
agreed upon by all processes through `StopSignals`.
"""

import glob
import importlib.util
import logging
import os
import signal
import socket
import sys
import threading
import zlib
from importlib import metadata
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_jax.config import MeshConfig
from moe_jax.errors import RunError, UserError
from moe_jax.parallel import cluster
from moe_jax.parallel import mesh as mesh_lib

_HEARTBEAT_SECS = 100  # without a sign of life; MOE_JAX_HEARTBEAT_SECS changes it
# Of a process that ends while others work on; `finish` waits for them before this.
_SHUTDOWN_SECS = 10
_START_SECS = 300  # for all processes to come; MOE_JAX_START_SECS changes it
_found_by = ""  # what `start` found; for `describe`


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
    pod say (`cluster.find`), and else runs alone. On CPU it also makes as many devices
    as the mesh needs, or `MOE_JAX_LOCAL_DEVICES` per process.

    Args:
      mesh: how many devices the run needs.
      coordinator: HOST:PORT of process 0.
      num_processes: processes of the run.
      process_id: which of them this one is, from 0.

    Raises:
      UserError: only some of the three are given, or they make no sense.
      RunError: the processes cannot connect.
    """
    if jax.distributed.is_initialized():
        return
    accelerator = _accelerator()
    found = cluster.find(coordinator, num_processes, process_id, accelerator)
    if not accelerator:
        _make_cpu_devices(mesh, found.num_processes if found else 1)
    if found and _connect(found):
        global _found_by
        _found_by = found.found_by
    elif (hosts := cluster.expected_tpu_hosts()) > 1 and accelerator == "tpu":
        raise UserError(
            f"the environment names {hosts} TPU hosts (TPU_WORKER_HOSTNAMES, "
            "MEGASCALE_NUM_SLICES), but JAX did not find them: give --coordinator, "
            "--num_processes and --process_id"
        )


def _connect(found: cluster.Cluster) -> bool:
    """Whether there is a cluster; ends the process where the others do not come.

    Raises:
      UserError: a time of the environment is none.
      RunError: JAX cannot connect, or the port is taken.
    """
    _check_port(found)
    seconds = _seconds("MOE_JAX_START_SECS", _START_SECS)
    heartbeat = _seconds("MOE_JAX_HEARTBEAT_SECS", _HEARTBEAT_SECS)
    # Before JAX's own limit, which aborts with a stack trace of C++.
    timer = threading.Timer(seconds, _give_up, [found, seconds])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            initialization_timeout=seconds + 30,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=_SHUTDOWN_SECS,
            **found.arguments,
        )
    except ValueError:
        if found.arguments:
            raise
        return False  # a TPU without a pod: one host
    except jax.errors.JaxRuntimeError as error:
        raise RunError(
            f"{_where(found)}: no connection with the others: {error}"
        ) from None
    finally:
        timer.cancel()
    return True


def _seconds(name: str, default: int) -> int:
    """Of the environment; at least 1."""
    found = cluster.number(name, default)
    if found < 1:
        raise UserError(f"{name}={found} in the environment: must be at least 1")
    return found


def _check_port(found: cluster.Cluster) -> None:
    """Whether process 0 may listen; JAX ends by a segmentation fault where not."""
    bound = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")
    if found.arguments.get("process_id") != 0 or bound:
        return
    port = int(found.arguments["coordinator_address"].rpartition(":")[2])
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
    except OSError as error:
        raise RunError(
            f"{_where(found)}: this process cannot listen on port {port}: "
            f"{error.strerror}; give another, or end what holds it"
        ) from None


def _where(found: cluster.Cluster) -> str:
    index = found.arguments.get("process_id", "?")
    address = found.arguments.get("coordinator_address", "an address that JAX found")
    return (
        f"{socket.gethostname()} process {index} of {found.num_processes or '?'} "
        f"(found by {found.found_by}), coordinator {address}"
    )


def _give_up(found: cluster.Cluster, seconds: int) -> None:
    text = (
        f"moe-jax: {_where(found)}: not all processes met there within {seconds} s "
        "(MOE_JAX_START_SECS): ending this one. Are all of them started, and does "
        "nothing keep them from that port?\n"
    )
    try:
        os.write(2, text.encode())
    finally:
        os._exit(3)


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
    wanted = cluster.number("MOE_JAX_LOCAL_DEVICES", wanted)
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
    """One line: processes, hosts, who named them, devices, their kind, slices.

    All processes must call it: they compare their hosts' names.
    """
    count, devices = jax.process_count(), jax.devices()
    line = f"{count} process{'es' * (count > 1)}"
    if is_started():
        name = np.uint32(zlib.crc32(socket.gethostname().encode()))
        hosts = len(np.unique(multihost_utils.process_allgather(name)))
        line += f" on {hosts} host{'s' * (hosts > 1)} (found by {_found_by})"
    elif tasks := cluster.alone_in_slurm():
        line += f" (alone: SLURM has {tasks} tasks, but srun did not start this one)"
    kind = f"{devices[0].platform} ({devices[0].device_kind})"
    kind = "cpu" if kind == "cpu (cpu)" else kind
    line += f", {len(devices)} device{'s' * (len(devices) > 1)} of kind {kind}"
    slices = mesh_lib.count_slices(devices)
    return line + (f" in {slices} slices" if slices > 1 else "")


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
