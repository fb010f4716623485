"""Faults for the processes of a test; on PYTHONPATH it is imported before all else.

`FAULT` holds JSON, a fault or a list of them:
  kind: a key of `KINDS`, or "clock" with `secs`, or "none".
  process: index of the one that it strikes; -1: all; "turns": another one each time.
  phase: of `watchdog.PHASES`, or "connect": before the processes meet.
  step: from which on, where the phase has one.
  after: so many steps of an attempt.
  once: a file that is made, with numbers behind its name, when the fault strikes.
  times: how often it may; default: 1.
  coordinator: HOST:PORT that this process takes for it.
"""

import builtins
import ctypes
import errno
import importlib.abc
import importlib.util
import io
import json
import os
import random
import resource
import signal
import sys
import threading
import time

FAULTS = json.loads(os.environ.get("FAULT", "[]"))
FAULTS = FAULTS if isinstance(FAULTS, list) else [FAULTS]
INDEX = int(os.environ.get("MOE_JAX_PROCESS_ID", "0"))
_CONNECT = "moe_jax.parallel.distributed"
_WATCHDOG = "moe_jax.parallel.watchdog"


def boom(fault):
    raise RuntimeError("boom")


def out_of_memory(fault):
    bytearray(1 << 60)


def sleep_with_interpreter(fault):
    ctypes.PyDLL(None).sleep(10_000)  # It keeps the interpreter's lock.


def no_large_files(fault):
    """The disk is full for some seconds: no file grows beyond 64 bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    free = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    threading.Timer(fault.get("secs", 5), free).start()


def read_only(fault):
    """For some seconds nothing can be changed in the folder of checkpoints."""
    until = time.monotonic() + fault.get("secs", 5)

    def refuse(module, name, changes=lambda *_, **__: True):
        kept = getattr(module, name)

        def call(path, *rest, **named):
            inside = not isinstance(path, int) and "/checkpoints" in os.fsdecode(path)
            if inside and time.monotonic() < until and changes(*rest, **named):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
            return kept(path, *rest, **named)

        setattr(module, name, call)

    for name in ("mkdir", "rename", "replace", "remove", "unlink", "rmdir"):
        refuse(os, name)
    for module in (builtins, io):
        refuse(module, "open", lambda mode="r", *_, **__: set(mode) & set("wax+"))


def poison(fault):
    """The next batch of this process weighs its tokens with NaN."""
    from moe_jax.parallel import batches

    put = batches.put

    def with_nan(host_batch, *rest):
        batches.put = put
        host_batch["weights"][:] = float("nan")
        return put(host_batch, *rest)

    batches.put = with_nan


def corrupt(fault):
    """The next comparison finds another bit in the state of this process."""
    from moe_jax.train import agreement

    check = agreement.Agreement.check

    def with_flip(self, step, state):
        agreement.Agreement.check = check
        names = [name for name in self._names if name.startswith("params")]
        leaf = agreement.named_leaves(state)[names[0]]
        shard = leaf.addressable_shards[0].data
        # The bytes of the array itself, as a broken memory would.
        ctypes.c_uint8.from_address(shard.unsafe_buffer_pointer()).value ^= 1
        return check(self, step, state)

    agreement.Agreement.check = with_flip


def kill_in_save(fault):
    """SIGKILL some milliseconds after an unfinished checkpoint is seen."""
    workdir = next(a for a in sys.argv if a.startswith("--workdir="))
    folder = os.path.join(workdir.partition("=")[2], "checkpoints")

    def wait():
        while not any("tmp" in name for name in os.listdir(folder)):
            time.sleep(0.001)
        time.sleep(random.random() * fault["secs"])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def signal_self(number):
    return lambda fault: os.kill(os.getpid(), number)


KINDS = {
    "kill": signal_self(signal.SIGKILL),
    "stop": signal_self(signal.SIGSTOP),
    "term": signal_self(signal.SIGTERM),
    "int": signal_self(signal.SIGINT),
    "abort": signal_self(signal.SIGABRT),
    "exception": boom,
    "memory": out_of_memory,
    "exit": lambda fault: sys.exit(0),
    "hang": lambda fault: time.sleep(10_000),
    "hold": sleep_with_interpreter,
    "slow": lambda fault: time.sleep(fault.get("secs", 1)),
    "full": no_large_files,
    "read_only": read_only,
    "nan": poison,
    "corrupt": corrupt,
    "kill_in_save": kill_in_save,
}


def struck(fault) -> int:
    """How often the fault has struck already, in any process."""
    folder, name = os.path.split(fault["once"])
    return sum(entry.startswith(f"{name}.") for entry in os.listdir(folder))


def is_here(fault) -> bool:
    process = fault["process"]
    if process == "turns":
        process = struck(fault) % int(os.environ.get("MOE_JAX_NUM_PROCESSES", "1"))
    return process in (-1, INDEX)


def strike(fault) -> None:
    times = fault.get("times", 1)
    in_all = fault["process"] == "turns" and struck(fault) >= times
    if fault.get("done") or in_all:
        return
    fault["done"] = True  # Once in a process.
    for number in range(times):
        mark = f"{fault['once']}.{INDEX}.{number}"
        try:
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        KINDS[fault["kind"]](fault)
        return


class First(importlib.abc.MetaPathFinder):
    """Strikes as the module that connects is imported, not here: `site` goes on."""

    def __init__(self, faults):
        self._faults = faults

    def find_spec(self, name, path, target=None):
        if name == _CONNECT:
            sys.meta_path.remove(self)
            for fault in self._faults:
                strike(fault)


class Finder(importlib.abc.MetaPathFinder):
    """Has the watchdog's beats, which name every phase, pass by the faults."""

    def __init__(self, faults):
        self._faults = faults
        self._first = -1  # Step of this attempt.

    def find_spec(self, name, path, target=None):
        if name != _WATCHDOG:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            beat = module.Watchdog.beat

            def with_faults(watchdog, phase, step=-1):
                beat(watchdog, phase, step)
                self._pass(phase, step)

            module.Watchdog.beat = with_faults

        spec.loader.exec_module = exec_module
        return spec

    def _pass(self, phase, step):
        if self._first < 0:
            self._first = step
        for fault in self._faults:
            late = step - self._first >= fault.get("after", 0)
            late = late and step >= fault.get("step", 0)
            if phase == fault["phase"] and (step < 0 or late):
                strike(fault)


def skew_clock(secs: float) -> None:
    kept, kept_ns = time.time, time.time_ns
    time.time = lambda: kept() + secs
    time.time_ns = lambda: kept_ns() + int(secs * 1e9)


def begin() -> None:
    first, waiting = [], []
    for fault in filter(is_here, FAULTS):
        if "coordinator" in fault:  # By way of a proxy.
            os.environ["MOE_JAX_COORDINATOR"] = fault["coordinator"]
        if fault["kind"] == "clock":
            skew_clock(fault["secs"])
        else:
            (first if fault["phase"] == "connect" else waiting).append(fault)
    for kind, faults in ((First, first), (Finder, waiting)):
        if faults:
            sys.meta_path.insert(0, kind(faults))


if "MOE_JAX_PROCESS_ID" in os.environ:  # Not in the launcher.
    begin()
