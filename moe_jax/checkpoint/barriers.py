"""Barriers at the end of a save that a process whose part failed does not wait at.

Orbax has the processes of a save wait for each other: when all have written, when
process 0 has committed, when the save is over. One whose part fails leaves out the
first two and waits at the last, while the others wait at the first. All stand still
until their timeouts, one after the other, and not even the one that failed hears of it.

Here a process that comes to a barrier because of an exception says so and goes on at
once, and those that wait there, or come later, leave with `ElsewhereError`. (Orbax'
handler of arrays has barriers of its own, before these. A process that has written its
arrays waits there for one that cannot until the timeout, in a thread of its own.)
"""

import dataclasses
import itertools
import sys
import threading
from typing import Any

import jax
from jax._src import distributed  # Its key-value store has no public name.
from orbax.checkpoint import v1 as ocp

_GOOD, _FAILED = "good", "failed"
# Of the folders saved to; all processes begin with them in the same order.
_begun = itertools.count()


class ElsewhereError(Exception):
    """The part of another process failed."""


class Barriers:
    """Orbax' `BarrierSyncFn` of one opened folder.

    Attributes:
      broken: one has failed; nobody waits any more, the folder is to be opened anew.
    """

    def __init__(self):
        self.broken = False
        self._name = ""
        self._number = 0

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Waits for all processes.

        Args:
          key: Orbax' name; that of all is the same unless one has failed.
          timeout_ms: how long.

        Raises:
          ElsewhereError: another process has failed, and not this one.
          jax.errors.JaxRuntimeError: not all have come.
        """
        del key
        if self.broken:
            return
        # A save is begun by the main thread, which may handle an exception of its own;
        # Orbax ends it in threads that do nothing else.
        begins = threading.current_thread() is threading.main_thread()
        failed = not begins and sys.exc_info()[1] is not None
        try:
            self.broken = self._meet(failed, timeout_ms) == _FAILED
        except jax.errors.JaxRuntimeError:
            self.broken = True
            raise
        if self.broken and not failed:
            raise ElsewhereError

    def _meet(self, failed: bool, timeout_ms: int) -> str:
        """The verdict of all, each of which counts its barriers."""
        if not self._name:  # The first save is begun by all together.
            self._name = f"moe_jax.checkpoint/{next(_begun)}"
        self._number += 1
        client = distributed.global_state.client
        here = f"{self._name}/{self._number}"
        if failed:
            return _decide(client, here, _FAILED)
        if client.key_value_increment(f"{here}/came", 1) == jax.process_count():
            _decide(client, here, _GOOD)
        try:
            verdict = client.blocking_key_value_get(f"{here}/verdict", timeout_ms)
        except jax.errors.JaxRuntimeError:
            if _decide(client, here, _FAILED) == _FAILED:
                raise
            return _GOOD
        if verdict == _GOOD and jax.process_index() == 0:
            client.key_value_delete(f"{self._name}/{self._number - 1}")  # All left it.
        return verdict


def _decide(client: Any, here: str, verdict: str) -> str:
    """The verdict of a barrier: this one unless there is one."""
    try:
        client.key_value_set(f"{here}/verdict", verdict)
    except jax.errors.JaxRuntimeError:
        return client.key_value_try_get(f"{here}/verdict")
    return verdict


@dataclasses.dataclass
class _AsyncOptions(ocp.options.AsyncOptions):
    """With the barriers, which Orbax' v1 has no name for."""

    barriers: Barriers | None = None

    def v0(self) -> Any:
        """As Orbax' code below v1 takes them."""
        return dataclasses.replace(super().v0(), barrier_sync_fn=self.barriers)


def in_background(barriers: Barriers, watchdog_secs: float) -> ocp.options.AsyncOptions:
    """How Orbax saves in the background.

    Args:
      barriers: of its processes, where there are several.
      watchdog_secs: for half of it they wait for one that hangs; 0: Orbax' default.
    """
    options = _AsyncOptions(barriers=barriers if jax.process_count() > 1 else None)
    if watchdog_secs:
        options.timeout_secs = max(1, int(watchdog_secs / 2))
    return options
