"""Metrics on disk: metrics.jsonl with every step, and TensorBoard event files.

JSON has no NaN and no infinity, and most readers refuse Python's spelling of them.
They are written as null, which table readers turn back into "missing".
"""

import json
import math
import os
import sys
import time
from typing import Any

import numpy as np


def jsonable(value: Any) -> Any:
    """A value as JSON data: arrays become lists, NaN and infinities None."""
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        # bfloat16 and its kin are of kind V for numpy.
        array = array.astype(np.float64)
    return jsonable(array.tolist())


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Writes a file so that a reader, or a crash, never sees half of it."""
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The steps in a metrics file; a torn line (from a crash) is left out."""
    found = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                found.append(entry)
    return found


class MetricsFile:
    """metrics.jsonl: one JSON object a step, on disk as soon as it is written.

    While nothing can be written (a full disk), lines wait in memory, and a warning is
    printed once; they are written, whole and in order, when there is space again.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = os.fspath(path)
        os.makedirs(os.path.dirname(self._path) or ".", exist_ok=True)
        self._waiting = b""
        self._warned = False
        self._file = self._open()

    def _open(self):
        torn = False
        if os.path.exists(self._path) and os.path.getsize(self._path):
            with open(self._path, "rb") as file:
                file.seek(-1, os.SEEK_END)
                torn = file.read() != b"\n"
        self._waiting = b"\n" * torn + self._waiting
        return open(self._path, "ab", buffering=0)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Appends the figures of one step."""
        entry = {"step": int(step)} | jsonable(metrics)
        self._waiting += json.dumps(entry, allow_nan=False).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Writes what waits, if that is possible."""
        try:
            self._flush()
        except OSError as error:
            if not self._warned:
                print(
                    f"moe-jax: WARNING: {self._path} cannot be written: "
                    f"{error.strerror}; its lines wait in memory",
                    file=sys.stderr,
                    flush=True,
                )
            self._warned = True

    def _flush(self) -> None:
        """Raises OSError where not all could be written; the rest waits on."""
        while self._waiting:
            written = self._file.write(self._waiting)
            self._waiting = self._waiting[written:]
        self._warned = False

    def cut_back(self, step: int) -> int:
        """Drops all lines after `step`, which a resumed run will write again.

        Returns:
          How many lines were dropped.
        """
        self.close()
        entries = read_metrics(self._path)
        kept = [e for e in entries if e["step"] <= step]
        text = "".join(json.dumps(jsonable(e)) + "\n" for e in kept)
        write_atomically(self._path, text)
        self._file = self._open()
        return len(entries) - len(kept)

    def close(self) -> None:
        """Raises OSError where lines wait that still cannot be written."""
        with self._file:
            self._flush()

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class TensorBoard:
    """TensorBoard event files in a folder.

    tensorboardX is imported and the folder made at the first write. What cannot be
    written (a full disk) is left out: its thread ends then, and would be waited for.
    """

    def __init__(self, folder: str | os.PathLike, resume_step: int | None = None):
        """Opens the folder.

        Args:
          folder: where the event files go.
          resume_step: last step that a resumed run keeps; TensorBoard hides what an
            earlier process wrote after it.
        """
        self._folder = os.fspath(folder)
        self._purge = None if resume_step is None else resume_step + 1
        self._writer = None

    def _add(self, method: str, *values: Any, **options: Any) -> None:
        try:
            getattr(self._get(), method)(*values, **options)
        except OSError:
            self._writer = None

    def _writes(self) -> bool:
        return self._writer.file_writer.event_writer._worker.is_alive()

    def _get(self):
        if self._writer is None or not self._writes():
            from tensorboardX import SummaryWriter

            # The name of an event file has whole seconds only: a run that begins
            # within one of the last would overwrite its file.
            self._writer = SummaryWriter(
                self._folder,
                purge_step=self._purge,
                filename_suffix=f".{time.time_ns()}",
            )
        return self._writer

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """Writes every value that is one number; leaves out arrays and text."""
        for name, value in values.items():
            if isinstance(value, str) or value is None or np.ndim(value):
                continue
            self._add("add_scalar", name, float(value), step)

    def histogram(self, step: int, name: str, values: Any) -> None:
        """Writes the distribution of an array, such as the load of each expert."""
        array = np.asarray(values, np.float64).ravel()
        if array.size and np.isfinite(array).all():
            self._add("add_histogram", name, array, step)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Writes a picture, uint8 (H, W, 1 or 3)."""
        self._add("add_image", name, np.asarray(pixels), step, dataformats="HWC")

    def flush(self) -> None:
        if self._writer is not None and self._writes():
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None and self._writes():
            try:
                self._writer.close()
            except OSError:
                pass
        self._writer = None
