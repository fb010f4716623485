"""Times of things that run in turn, and where they were taken."""

import dataclasses
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Times:
    """Repeated times of one thing, in seconds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.seconds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    def shown(self, unit: float = 1e3) -> str:
        """`median (low-high)` in seconds times `unit`."""
        low, high = self.quartiles
        return f"{unit * self.median:.2f} ({unit * low:.2f}-{unit * high:.2f})"

    def figures(self) -> dict[str, Any]:
        """JSON-ready, in seconds."""
        low, high = self.quartiles
        return {
            "median": self.median,
            "quartiles": [low, high],
            "seconds": list(self.seconds),
        }


def seconds_of(call: Callable[[], Any]) -> float:
    """Until what `call` returns is there."""
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin


def in_turn(
    calls: Mapping[str, Callable[[], Any]], repeats: int, warm_up: int = 1
) -> dict[str, Times]:
    """Times of each call; a repeat runs all, so that a slow moment slows all.

    Args:
      calls: by name.
      repeats: timed runs of each.
      warm_up: runs of each before them.
    """
    for _ in range(warm_up):
        for call in calls.values():
            seconds_of(call)
    taken = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            taken[name].append(seconds_of(call))
    return {name: Times(tuple(seconds)) for name, seconds in taken.items()}


def machine() -> dict[str, Any]:
    """Hardware, versions, load and command, JSON-ready."""
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "cpu": _cpu(),
        "cpu_cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "jax": jax.__version__,
        "command": " ".join(sys.argv),
    }


def describe_machine() -> str:
    """The same in a line."""
    m = machine()
    return (
        f"{m['cpu_cores']} CPU cores ({m['cpu']}), load {m['load']:.1f} at the start; "
        f"Python {m['python']}, jax {m['jax']}\n$ {m['command']}"
    )


def _cpu() -> str:
    """The processor's name, where Linux tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            found = [line for line in lines if line.startswith("model name")]
    except OSError:
        found = []
    return found[0].partition(":")[2].strip() if found else platform.machine()
