"""Saving with a store that may fail for a while.

A save that fails is no reason to stop: training goes on, a warning is printed each
time, and the state of a later step is saved when the pause is over. Only after
`config.checkpoint.retries` failures in a row does the run end. The last save is waited
for; it is the same step that is tried again.

In a run of several processes all must leave out the same saves and try again after the
same step. Each asks at every step (`due`); between the beginning of a save and its end
they exchange at some of these steps three bits: still writing, failed, pause not over.
A save has failed when all have ended and one of them in error; the failure of one ends
the others' part (see `barriers.py`).
"""

import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_jax.checkpoint.barriers import ElsewhereError
from moe_jax.checkpoint.failures import SaveError, reason
from moe_jax.checkpoint.store import Checkpoints
from moe_jax.config import CheckpointConfig
from moe_jax.errors import RunError

_LONGEST_PAUSE = 600.0
# Of several processes, between two saves: how often they exchange at most.
_EXCHANGES = 20
# Seconds between two looks at a save that is waited for.
_GLANCE = 0.02
_ELSEWHERE = reason(ElsewhereError())


class Saver:
    """Saves at the steps of the config, and tries again what failed.

    Args:
      checkpoints: where to.
      config: when, and how often to try again.
      beat: called before what may take long.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        config: CheckpointConfig,
        beat: Callable[[], None] = lambda: None,
    ):
        self._checkpoints = checkpoints
        self._config = config
        self._beat = beat
        several = jax.process_count() > 1
        self._exchange_every = max(1, config.every // _EXCHANGES) if several else 1
        self._writing = -1  # The step of the save that has not ended yet.
        self._why = ""  # Why it failed in this process.
        self._newest = max(checkpoints.steps(), default=-1)  # That is whole.
        self._failures = 0  # In a row.
        self._not_before = 0.0  # When the pause is over, on the monotonic clock.

    def due(self, step: int, last: bool) -> bool:
        """Whether to save after `step`; all processes ask at every step.

        Args:
          step: its number.
          last: the run ends with it.

        Raises:
          RunError: too many saves in a row have failed.
        """
        regular = last or step % self._config.every == 0
        unsure = self._writing >= 0 or self._failures > 0
        if not regular and not (unsure and step % self._exchange_every == 0):
            return False
        may_try = self._settle(wait=regular, for_all=last)
        if last:
            return True
        if self._writing >= 0:  # It failed somewhere, and others are in it still.
            return False
        return may_try if self._failures else regular

    def save(self, step: int, state: Any, data: dict, *, last: bool = False) -> None:
        """Begins to save, where `due` said so; the last save is waited for.

        Raises:
          RunError: too many saves in a row have failed; or the save cannot be begun in
            this process, and the others are in it already.
        """
        while True:
            self._begin(step, state, data)
            if not last:
                return
            self._settle(wait=True, for_all=True)
            if not self._failures:
                return
            while time.monotonic() < self._not_before:
                self._beat()
                time.sleep(min(1.0, self._config.retry_secs))

    def _begin(self, step: int, state: Any, data: dict) -> None:
        self._beat()
        why = self._checkpoints.probe()
        if self._exchange(bool(why)).any():
            self._failed(step, why)
            return
        try:
            self._checkpoints.save(step, state, data, force=True)
        except SaveError as error:
            if jax.process_count() > 1:  # In the others Orbax waits for this one.
                raise RunError(str(error)) from error
            self._failed(step, reason(error))
            return
        self._writing = step

    def _settle(self, wait: bool, for_all: bool) -> bool:
        """Takes the end of the last save; whether the pause after a failure is over.

        Args:
          wait: until it has ended, unless one process knows already that it failed.
          for_all: wait then too.
        """
        running, failed, pausing = self._poll()
        while running and wait and (for_all or not failed):
            time.sleep(_GLANCE)
            running, failed, pausing = self._poll()
        if running:
            return False
        step, why = self._writing, self._why
        self._writing, self._why = -1, ""
        if failed:
            self._checkpoints.forget()
            self._failed(step, why)
            return False
        if step >= 0:
            self._newest = step
            if self._failures and jax.process_index() == 0:
                _say(f"step {step} is saved, after {self._failures} failures")
            self._failures, self._not_before = 0, 0.0
        return not pausing

    def _writing_on(self) -> bool:
        return self._writing >= 0 and not self._why and self._checkpoints.is_saving()

    def _poll(self) -> tuple[bool, bool, bool]:
        """Of any process: it still writes, it failed, its pause is not over."""
        running = self._writing_on()
        if self._writing >= 0 and not self._why and not running:
            try:
                self._checkpoints.wait()
            except SaveError as error:
                self._why = reason(error)
        pausing = time.monotonic() < self._not_before
        return tuple(self._exchange(running, bool(self._why), pausing).any(axis=0))

    def _exchange(self, *bits: bool) -> np.ndarray:
        """The bits of all processes, (processes, bits)."""
        mine = np.array(bits)
        if jax.process_count() == 1:
            return mine[None]
        return np.asarray(multihost_utils.process_allgather(mine))

    def _failed(self, step: int, why: str) -> None:
        """Counts a failure of this or another process, and warns.

        Raises:
          RunError: it is one too many.
        """
        self._failures += 1
        newest = "there is no checkpoint yet"
        if self._newest >= 0:
            newest = f"the newest checkpoint is that of step {self._newest}"
        elsewhere = why in ("", _ELSEWHERE)
        text = (
            f"saving step {step} failed: "
            f"{'in another process' if elsewhere else why}; {newest}. "
            f"Failures in a row: {self._failures} (config.checkpoint.retries="
            f"{self._config.retries})"
        )
        if self._failures > self._config.retries:
            raise RunError(f"{text}: the run ends")
        pause = self._config.retry_secs * 2 ** (self._failures - 1)
        pause = min(pause, _LONGEST_PAUSE)
        self._not_before = time.monotonic() + pause
        if not elsewhere or jax.process_index() == 0:
            _say(f"{text}; next try in {pause:g} s")


def _say(text: str) -> None:
    """On standard error of the process that it happens in."""
    where = f"{socket.gethostname()} process {jax.process_index()}"
    try:
        print(f"moe-jax: WARNING: {where}: {text}", file=sys.stderr, flush=True)
    except OSError:
        pass  # Nobody reads any more.
