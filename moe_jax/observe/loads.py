"""What a run remembers of its routing: loads from its first step on, recent buckets."""

import collections
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from moe_jax.moe.dispatch.plan import bucket_rows

# Steps that the advice on the capacity looks back on.
RECENT = 100


class RunLoads:
    """Sums on the host; the counts of a run that goes on begin at those it saved.

    Args:
      saved: what `saved` gave at the checkpoint from which the run goes on.
    """

    def __init__(self, saved: Mapping[str, Any] | None = None):
        counts = (saved or {}).get("expert_counts")
        self._counts_le = None if counts is None else np.array(counts, np.int64)
        self._last_le: np.ndarray | None = None
        self._fills: collections.deque = collections.deque(maxlen=RECENT)

    def add(self, values: Mapping[str, Any]) -> None:
        """Takes the metrics of a step; one that was skipped does not count."""
        if "expert_counts" not in values or bool(values["skipped"]):
            return
        self._last_le = np.asarray(values["expert_counts"], np.int64)
        before = 0 if self._counts_le is None else self._counts_le
        self._counts_le = before + self._last_le
        if "mean_fill" in values:
            names = ("peak_fill", "mean_fill", "buffer_fill")
            self._fills.append(tuple(float(values[name]) for name in names))

    def saved(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        if self._counts_le is None:
            return {}
        return {"expert_counts": self._counts_le.tolist()}

    def figures(self) -> dict[str, Any]:
        """Of the run so far.

        Returns:
          max_violation_run: MaxVio of the summed counts, mean over layers.
          never_used: experts that served nobody, over all layers.
          recent_steps, overflowed_steps: steps of this process that are looked back
            on, and those of them in which a bucket was too small.
          needed_capacity_factor: the smallest, in hundredths, whose buckets would have
            been large enough in all of them.
        """
        if self._counts_le is None:
            return {}
        found = {
            "max_violation_run": violation(self._counts_le),
            "never_used": int(np.sum(self._counts_le == 0)),
        }
        if self._fills:
            peak, mean, fill = np.array(self._fills).T
            found |= {
                "recent_steps": len(fill),
                "overflowed_steps": int(np.sum(fill > 1)),
                "needed_capacity_factor": needed_factor(int(peak.max()), mean[-1]),
            }
        return found

    def lines(self) -> Iterator[str]:
        """The figures for people, at the end of a run."""
        found = self.figures()
        if not found:
            return
        last = ""
        if self._last_le is not None:
            last = f"{violation(self._last_le):.2f} in the last step, "
        unused = found["never_used"]
        yield (
            f"MaxVio (fullest expert over the mean, less 1): {last}"
            f"{found['max_violation_run']:.2f} over the run; "
            + (f"experts never used: {unused}" if unused else "every expert was used")
        )
        if "recent_steps" in found:
            missed = found["overflowed_steps"] or "none"
            yield (
                f"buckets: too small in {missed} of the last {found['recent_steps']} "
                f"steps; capacity_factor={found['needed_capacity_factor']:.2f} is the "
                "smallest that serves each of them in one round"
            )


def violation(counts_le: np.ndarray) -> float:
    """MaxVio: `(max_e c_e - mean) / mean`, mean over layers (Wang et al. 2024)."""
    mean_l = np.maximum(counts_le.mean(axis=-1), 1e-9)
    return float(np.mean(np.maximum(counts_le.max(axis=-1) / mean_l - 1, 0)))


def needed_factor(peak: int, mean: float) -> float:
    """The smallest capacity factor, in hundredths, whose buckets hold `peak` rows."""
    hundredths = max(1, int(100 * (peak - 8) / mean)) if mean else 1
    while bucket_rows(mean, hundredths / 100, peak) < peak and mean:
        hundredths += 1
    return hundredths / 100
