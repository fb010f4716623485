"""What the user sees while training: lines of figures, and a bar on a terminal."""

import math
import os
import sys
import time
from typing import Any

# Key of a figure -> how it is shown. Keys that are not here are shown by name.
_SHOWN = {
    "loss": lambda v: f"loss {v:.4f}",
    "bits_per_byte": lambda v: f"bpb {v:.3f}",
    "tokens_per_second": lambda v: f"{short(v)} tok/s",
    "images_per_second": lambda v: f"{short(v)} img/s",
    "step_ms": lambda v: f"{v:.3g} ms" if v < 100 else f"{v:.0f} ms",
    "mfu": lambda v: f"mfu {v:.1%}",
    "grad_norm": lambda v: f"grad {v:.3g}",
    "load_max_over_mean": lambda v: f"load {v:.2f}x",
    "drops": lambda v: f"drops {v:.0f}",
}
_REFRESH_SECS = 0.1


def short(value: float) -> str:
    """A number with at most four digits: 950, 12.3k, 4.56M."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


def printable(text: str, encoding: str = "utf-8") -> str:
    """The text with backslash escapes for what a terminal would obey or not show.

    A model's samples may hold any character, escape sequences too.
    """
    safe = "".join(
        c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode()
        for c in text
    )
    return safe.encode(encoding, "backslashreplace").decode(encoding)


def format_line(step: int, total_steps: int, figures: dict[str, Any]) -> str:
    """One line of figures; those that are None or missing are left out."""
    width = len(str(total_steps))
    known = [k for k in _SHOWN if figures.get(k) is not None]
    other = [k for k in figures if k not in _SHOWN and figures[k] is not None]
    parts = [_figure(k, float(figures[k])) for k in known + other]
    return "  ".join([f"step {step:>{width}}/{total_steps}", *parts])


def _figure(key: str, value: float) -> str:
    if key not in _SHOWN or not math.isfinite(value):
        return f"{key} {value:.4g}"
    return _SHOWN[key](value)


class Console:
    """Prints lines of figures, and on a terminal a bar with the time left below.

    Whoever reads the output may go away (`| head`, a closed terminal): then it falls
    silent and training goes on.
    """

    def __init__(
        self, total_steps: int, enabled: bool, every: int = 20, start_step: int = 0
    ):
        """Opens the console.

        Args:
          total_steps: steps of the whole run.
          enabled: False prints nothing (all processes but the first).
          every: steps between lines.
          start_step: steps done before, in a resumed run.
        """
        self._total = total_steps
        self._every = every
        self._enabled = enabled and sys.stdout is not None
        self._bar = None
        self._drawn = 0.0
        if self._enabled and _on_terminal():
            self._bar, self._task = _make_bar(total_steps, start_step)
            self._try(self._bar.start)

    def step(self, step: int, figures: dict[str, Any]) -> None:
        """Shows the figures of a step that is done.

        Args:
          step: number of steps done.
          figures: loss, bits_per_byte, tokens_per_second (or of images), step_ms, mfu,
            grad_norm, load_max_over_mean, drops, and any others.
        """
        if not self._enabled:
            return
        if step % self._every == 0 or step == self._total:
            self.note(format_line(step, self._total, figures))
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
            now = time.monotonic()
            if now - self._drawn > _REFRESH_SECS:
                self._drawn = now
                self._try(self._bar.refresh)

    def note(self, text: str) -> None:
        """Prints a line (or several) as it is, above the bar."""
        if not self._enabled:
            return
        text = printable(text, getattr(sys.stdout, "encoding", None) or "utf-8")
        if self._bar is None:
            self._try(lambda: print(text, flush=True))
        else:
            from rich.text import Text

            # Text, not str: brackets in it must not be read as markup.
            shown = Text(text, overflow="fold")
            self._try(lambda: self._bar.console.print(shown))

    def close(self) -> None:
        """Takes the bar away and leaves the cursor on a fresh line."""
        if self._bar is not None:
            bar, self._bar = self._bar, None
            self._try(bar.stop)

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _try(self, write) -> None:
        try:
            write()
        except (OSError, ValueError):  # broken pipe; closed file
            self._enabled = False
            self._bar = None
            _silence_stdout()


def _on_terminal() -> bool:
    try:
        return sys.stdout.isatty() and os.environ.get("TERM", "") != "dumb"
    except ValueError:
        return False


def _silence_stdout() -> None:
    # Python flushes stdout at exit and would report the broken pipe there again.
    try:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), sys.stdout.fileno())
    except (OSError, ValueError):
        pass


def _make_bar(total_steps: int, start_step: int):
    from rich import console, progress

    bar = progress.Progress(
        progress.BarColumn(bar_width=30),
        progress.MofNCompleteColumn(),
        progress.TaskProgressColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left", markup=False),
        progress.TimeRemainingColumn(),
        console=console.Console(markup=False, highlight=False),
        # A refresh thread of its own would die loudly on a closed terminal.
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    task = bar.add_task("train", total=total_steps, completed=start_step)
    return bar, task
