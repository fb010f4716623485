"""Ends a process that is stuck, whatever it is doing.

JAX notices a process that died or was stopped (its heartbeats end), but not one whose
thread hangs: in a collective that nobody else entered, in a read from a dead file
system. Then all processes wait for ever. So each says what it does next, by `beat`,
and a thread ends it when that takes longer than its limit in the config.
"""

import faulthandler
import math
import os
import socket
import sys
import threading
import time

import jax

from moe_jax.config import Config

# What a run does: in words, and the field of the config with its limit.
PHASES = {
    "start": ("starting", "train.watchdog_secs"),
    "prepare": ("preparing the data", "data.watchdog_secs"),
    "restore": ("restoring", "checkpoint.watchdog_secs"),
    "compile": ("compiling", "train.watchdog_compile_secs"),
    "wait": ("waiting for data", "train.watchdog_secs"),
    "step": ("training", "train.watchdog_secs"),
    "agree": ("comparing replicas", "train.watchdog_compile_secs"),
    "save": ("saving a checkpoint", "checkpoint.watchdog_secs"),
    "evaluate": ("evaluating", "eval.watchdog_secs"),
    "finish": ("the final evaluation", "eval.watchdog_secs"),
    "leave": ("waiting for the others to finish", "eval.watchdog_secs"),
}
_LONGEST_POLL = 1.0
# For the message: a pipe that nobody reads must not keep the process.
_MESSAGE_SECS = 10


def limits(config: Config) -> dict[str, float]:
    """Seconds for each phase; 0 where it is not watched."""
    found = {}
    for phase, (_, field) in PHASES.items():
        node, name = field.split(".")
        found[phase] = getattr(getattr(config, node), name)
    return found


class Watchdog:
    """Ends the process, with status 3, when a phase takes too long.

    It does so at most a second after the limit, or eleven where nobody reads its
    message. Where the interpreter itself is held (a thread in C that keeps its lock),
    a stack trace and status 1 come ten seconds later.

    Args:
      limits: seconds for each of `PHASES`; 0 turns one off.
      where: name of this process; default: host and index.
    """

    def __init__(self, limits: dict[str, float], where: str = ""):
        self._limits = limits
        self._where = where or f"{socket.gethostname()} pid {os.getpid()}"
        self._last: tuple[float, str, int] | None = None
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._armed = math.inf  # The deadline that the thread of C knows.
        watched = [limit for limit in limits.values() if limit > 0]
        if not watched:
            return
        self._poll = min(_LONGEST_POLL, min(watched) / 4)
        self.beat("start")
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        if not where:  # It may start the backend, which may hang.
            self._where = f"{socket.gethostname()} process {jax.process_index()}"

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def beat(self, phase: str, step: int = -1) -> None:
        """Says that the process is alive and which of `PHASES` comes next."""
        with self._lock:
            self._last = (time.monotonic(), phase, step)
            # Not left to the thread of Python: it may never run again.
            if self._deadline() < self._armed:
                self._arm()

    def stop(self) -> None:
        """Ends the watch."""
        with self._lock:
            self._stopped.set()
            faulthandler.cancel_dump_traceback_later()

    def _deadline(self) -> float:
        since, phase, _ = self._last
        limit = self._limits[phase]
        return since + limit if limit else math.inf

    def _watch(self) -> None:
        while not self._stopped.wait(self._poll):
            with self._lock:
                last, late = self._last, time.monotonic() > self._deadline()
                self._arm()
            if late:
                self._end(*last)

    def _arm(self) -> None:
        """Has a thread of C end the process where those of Python cannot run."""
        if self._stopped.is_set():
            return
        self._armed = self._deadline()
        faulthandler.cancel_dump_traceback_later()
        readable = sys.__stderr__ is not None and not sys.__stderr__.closed
        if readable and self._armed < math.inf:
            left = max(0.0, self._armed - time.monotonic())
            faulthandler.dump_traceback_later(
                left + _MESSAGE_SECS, exit=True, file=sys.__stderr__
            )

    def _end(self, since: float, phase: str, step: int) -> None:
        taken = time.monotonic() - since
        last = threading.Timer(_MESSAGE_SECS, os._exit, [3])
        last.daemon = True
        last.start()
        words, field = PHASES[phase]
        at = f" at step {step}" if step >= 0 else ""
        try:
            print(
                f"watchdog: {self._where}: {words}{at} has taken {taken:.0f} s, more "
                f"than {self._limits[phase]:g} s (config.{field}): ending this "
                "process. The stack of each thread follows.",
                file=sys.__stderr__,
                flush=True,
            )
            faulthandler.dump_traceback(sys.__stderr__)
        finally:
            os._exit(3)
