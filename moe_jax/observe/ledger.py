"""A ledger of the rows that a run was trained on: which process read which, and when.

`WORKDIR/ledger/<process>.jsonl` has a line a step, written when the batch is taken for
training, of the numbers that it was read by:

  {"step": 7, "first": 4, "row": [12, 3], ...}

Rows 4 and 5 of the batch of step 7 were rows 12 and 3 of the training data. Steps are
those of metrics.jsonl. All processes of a run, and those that go on with it, must see
one workdir.
"""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from moe_jax.errors import UserError
from moe_jax.observe.writers import MetricsFile, read_metrics

FOLDER = "ledger"
Batch = dict[str, np.ndarray]


def cut_back(workdir: str | os.PathLike, step: int) -> None:
    """Drops what was read after `step`, which a resumed run reads again.

    To be called by one process, before any of them records.
    """
    for path in _files(workdir):
        with MetricsFile(path) as file:
            file.cut_back(step)


def recorded(
    batches: Iterable[Batch],
    workdir: str | os.PathLike,
    process: int,
    step: int,
    first: int,
    identify: Callable[[np.ndarray], dict[str, list]],
) -> Iterator[Batch]:
    """The batches without `row`, each written down when it is asked for.

    Args:
      batches: of this process, with `row`: the numbers of its rows, int64 (b,).
      workdir: of the run.
      process: index of this process.
      step: steps done before the first batch.
      first: place of this process's first row in the whole batch.
      identify: of the data, from numbers to what is written of them.
    """
    path = pathlib.Path(workdir, FOLDER, f"{process}.jsonl")
    with MetricsFile(path) as file:
        for number, batch in enumerate(batches, step + 1):
            rows = batch.pop("row")
            file.write(number, {"first": first} | identify(rows))
            yield batch


def read(workdir: str | os.PathLike) -> dict[int, list[dict[str, Any]]]:
    """What was read, by step: one entry a row of the whole batch, in its order.

    Raises:
      UserError: there is no ledger, or processes disagree on a row.
    """
    steps: dict[int, dict[int, dict[str, Any]]] = {}
    for path in _files(workdir):
        for line in read_metrics(path):
            step, first = line.pop("step"), line.pop("first")
            found = steps.setdefault(step, {})
            for number, values in enumerate(zip(*line.values(), strict=True), first):
                entry = dict(zip(line, values, strict=True))
                # Devices that split a row over tensor or context read the same one.
                if found.setdefault(number, entry) != entry:
                    raise UserError(
                        f"{path}: step {step} has {entry} as row {number} of the "
                        f"batch, and another process has {found[number]}"
                    )
    if not steps:
        raise UserError(
            f"{workdir} has no ledger: train with --config.train.ledger=true"
        )
    return {
        step: [found[number] for number in sorted(found)]
        for step, found in sorted(steps.items())
    }


def gaps(steps: dict[int, list[dict[str, Any]]], batch_size: int) -> list[str]:
    """Lines on steps that are missing or not whole, up to the last."""
    missing = sorted(set(range(1, max(steps) + 1)) - set(steps))
    lines = [f"step {missing[0]} is missing, of {len(missing)}"] if missing else []
    short = [step for step, rows in steps.items() if len(rows) != batch_size]
    if short:
        count = len(steps[short[0]])
        lines.append(f"step {short[0]} has {count} rows of {batch_size}")
    return lines


@dataclasses.dataclass(frozen=True)
class Passes:
    """How a source's rows came.

    Attributes:
      rows: read in all.
      whole: passes that are complete.
      problems: lines on rows that came twice or never within a pass.
    """

    rows: int
    whole: int
    problems: list[str]


def passes(steps: dict[int, list[dict[str, Any]]], source: int, size: int) -> Passes:
    """Counts the rows of one source, in passes of `size` rows in the order read."""
    seen = [
        entry["row"]
        for step in sorted(steps)
        for entry in steps[step]
        if entry.get("source", 0) == source
    ]
    problems = []
    for number, begin in enumerate(range(0, len(seen), size), 1):
        counts = collections.Counter(seen[begin : begin + size])
        twice = sorted(row for row, count in counts.items() if count > 1)
        strange = sorted(row for row in counts if not 0 <= row < size)
        if twice:
            problems.append(
                f"pass {number}: row {twice[0]} came {counts[twice[0]]} times"
            )
        if strange:
            problems.append(f"pass {number}: row {strange[0]} of {size} is none")
    return Passes(rows=len(seen), whole=len(seen) // size, problems=problems)


def _files(workdir: str | os.PathLike) -> list[pathlib.Path]:
    return sorted(pathlib.Path(workdir, FOLDER).glob("*.jsonl"))
