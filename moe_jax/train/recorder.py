"""From the metrics of finished steps to the user: files, console, TensorBoard."""

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from moe_jax.errors import RunError
from moe_jax.observe import flops, ledger
from moe_jax.observe.console import Console
from moe_jax.observe.loads import RunLoads
from moe_jax.observe.writers import MetricsFile, TensorBoard, read_metrics
from moe_jax.parallel import distributed
from moe_jax.train import workdir as workdirs
from moe_jax.train.kinds.base import Kind
from moe_jax.train.setup import Parts


class Recorder:
    """Reads a step's metrics when the next step is on its way.

    Args:
      parts: of the run.
      workdir: where metrics.jsonl and TensorBoard files go.
      start_step: steps done before; later lines of an earlier process are dropped.
      kind: of its data.
      of_loss: a step's loss to further figures of it.
      saved: of `loads`, at the checkpoint from which the run goes on.

    Attributes:
      console: for notes.
      loads: what the run remembers of its routing; the same in all processes.
    """

    def __init__(
        self,
        parts: Parts,
        workdir: str,
        start_step: int,
        kind: Kind,
        of_loss: Callable[[float], dict[str, float]],
        saved: dict[str, Any] | None = None,
    ):
        config = parts.config
        self._config = config
        self._primary = distributed.is_primary()
        self.console = Console(
            config.train.steps, self._primary, config.log.every, start_step
        )
        self.loads = RunLoads(saved)
        self._workdir, self._start = workdir, start_step
        self._path = os.path.join(workdir, workdirs.METRICS_FILE)
        self._file = self._board = None
        if self._primary:
            self._file = MetricsFile(self._path)
            self._file.cut_back(start_step)
            if config.log.tensorboard:
                folder = os.path.join(workdir, "tensorboard")
                self._board = TensorBoard(folder, start_step)
        self._of_loss = of_loss
        self._kind = kind
        self._rate_name = f"{self._kind.unit}_per_second"
        peak = flops.peak_flops(parts.mesh.devices.flat[0].device_kind)
        self._peak = peak and peak * parts.mesh.size
        per_row = parts.model.flops_per_row(config.positions())
        self._flops_per_step = config.train.batch_size * per_row
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._since = time.perf_counter()
        self._bad_in_a_row = 0

    def in_ledger(
        self,
        host_batches: Iterator[Any],
        first: int,
        identify: Callable[[Any], dict[str, list]],
    ) -> Iterator[Any]:
        """The batches, each written down as it is taken where `train.ledger` says so.

        All processes must call it, before the first batch.

        Args:
          host_batches: of this process from the first step on, numbered.
          first: place of its first row in the whole batch.
          identify: of the data.
        """
        if not self._config.train.ledger:
            return host_batches
        if self._primary:
            ledger.cut_back(self._workdir, self._start)
        distributed.barrier("ledger")
        process = jax.process_index()
        return ledger.recorded(
            host_batches, self._workdir, process, self._start, first, identify
        )

    def restart_clock(self) -> None:
        """Leaves out what happened since the last step (evaluation, saving)."""
        self._since = time.perf_counter()

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of `step`; reads those of the step before."""
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Waits for the metrics taken last, and records them and what waits for space.

        Raises:
          RunError: too many steps in a row were not finite.
        """
        if self._pending is None:
            if self._file is not None:
                self._file.flush()
            return
        step, metrics = self._pending
        self._pending = None
        values = jax.device_get(metrics)
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self.loads.add(values)
        self._record(step, values, seconds)
        self._guard(step, bool(values["skipped"]))

    def _record(self, step: int, values: dict[str, Any], seconds: float) -> None:
        figures = {
            name: np.asarray(v).item()
            for name, v in values.items()
            if np.ndim(v) == 0 and name not in ("dropped", "scored")
        }
        figures[self._kind.unit] = float(values["scored"])
        figures |= self._of_loss(float(values["loss"]))
        figures |= {
            self._rate_name: self._kind.per_step(self._config) / seconds,
            "step_ms": 1000 * seconds,
        }
        if "dropped" in values:
            figures["drops"] = int(values["dropped"])
        run = self.loads.figures()
        if run:
            figures["max_violation_run"] = run["max_violation_run"]
        if self._peak:
            figures["mfu"] = self._flops_per_step / seconds / self._peak
        if self._file is None:
            return
        shown_step = step % self._config.log.every == 0
        counts = values.get("expert_counts")
        full = figures
        if shown_step and counts is not None:
            full = figures | {"expert_counts": counts}
        self._file.write(step, full)
        shown = ("loss", "bits_per_byte", self._rate_name, "step_ms", "mfu")
        shown += ("grad_norm", "load_max_over_mean", "drops")
        self.console.step(step, {k: figures[k] for k in shown if k in figures})
        if self._board is not None and shown_step:
            self._board.scalars(step, figures)
            if counts is not None:
                self._board.histogram(step, "expert_counts", counts)

    def _guard(self, step: int, bad: bool) -> None:
        self._bad_in_a_row = self._bad_in_a_row + 1 if bad else 0
        if not bad:
            return
        train = self._config.train
        if train.nan_policy == "stop":
            raise RunError(
                f"step {step}: the loss or a gradient is not finite, and "
                "config.train.nan_policy is 'stop'; the parameters are those before "
                "this step. A lower learning rate or 'skip' may help"
            )
        self.console.note(f"step {step}: not finite, skipped; nothing was changed")
        if self._bad_in_a_row >= train.max_skipped:
            raise RunError(
                f"step {step}: {self._bad_in_a_row} steps in a row were not finite "
                "(config.train.max_skipped); the parameters are those before them"
            )

    def held_out(self, step: int, figures: dict[str, float]) -> None:
        """Shows and records an evaluation."""
        if not figures or not self._primary:
            return
        self.console.note(f"step {step}: held-out {self._kind.line(figures)}")
        if self._board is not None:
            scalars = {f"held_out/{name}": v for name, v in _flat(figures).items()}
            self._board.scalars(step, scalars)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Shows a picture in TensorBoard, uint8 (H, W, 1 or 3)."""
        if self._board is not None:
            self._board.image(step, name, pixels)

    def totals(self) -> dict[str, Any]:
        """Figures of the whole run, earlier processes included; primary only."""
        lines = read_metrics(self._path) if self._file is not None else []
        if not lines:
            return {}
        add_up = lambda name: sum(line.get(name) or 0 for line in lines)
        seconds = add_up("step_ms") / 1000
        return {
            "losses": {"first": lines[0]["loss"], "last": lines[-1]["loss"]},
            "seconds": seconds,
            self._rate_name: self._kind.per_step(self._config) * len(lines) / seconds,
            "drops": add_up("drops"),
            "skipped_steps": add_up("skipped"),
            "routing": self.loads.figures(),
        }

    def close(self) -> None:
        self.console.close()
        for sink in (self._file, self._board):
            if sink is not None:
                sink.close()


def _flat(figures: dict[str, Any]) -> dict[str, float]:
    """Lists of figures as one figure an entry."""
    found = {}
    for name, value in figures.items():
        if isinstance(value, list):
            found |= {f"{name}/{i}": entry for i, entry in enumerate(value)}
        else:
            found[name] = value
    return found
