"""The ledger: what is written when, cut back on resuming, and judged."""

import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.observe import ledger

SIZE, BATCH = 6, 4


def order(n):
    """Two passes over six rows, each in its own order, and again."""
    return [[3, 1, 5, 0, 2, 4], [4, 0, 1, 2, 5, 3]][n // SIZE % 2][n % SIZE]


def part(step, first, count):
    begin = step * BATCH + first
    return {"row": np.array([order(n) for n in range(begin, begin + count)])}


def train(folder, processes, begin, end, *, taken=None):
    """Steps begin+1 .. end on so many processes, which read ahead."""
    count = BATCH // processes
    ledger.cut_back(folder, begin)
    for process in range(processes):
        first = process * count
        batches = (part(step, first, count) for step in range(begin, end + 5))
        recorded = ledger.recorded(
            batches, folder, process, begin, first, lambda rows: {"row": list(rows)}
        )
        for _ in range(begin, taken or end):
            assert "row" not in next(recorded)
        recorded.close()


def judged(folder):
    steps = ledger.read(folder)
    found = ledger.passes(steps, 0, SIZE)
    return ledger.gaps(steps, BATCH) + found.problems, found


def test_resumed_on_other_numbers_of_processes(tmp_path):
    train(tmp_path, 4, 0, 3)
    train(tmp_path, 2, 3, 5)
    train(tmp_path, 1, 5, 6)
    train(tmp_path, 4, 6, 9)
    problems, found = judged(tmp_path)
    assert problems == []
    assert (found.rows, found.whole) == (9 * BATCH, 9 * BATCH // SIZE)
    steps = ledger.read(tmp_path)
    got = [entry["row"] for step in steps.values() for entry in step]
    assert got == [order(n) for n in range(9 * BATCH)]


def test_steps_that_are_done_again_count_once(tmp_path):
    train(tmp_path, 4, 0, 5)  # the checkpoint was of step 3
    train(tmp_path, 2, 3, 6)
    assert judged(tmp_path)[0] == []
    train(tmp_path, 1, 0, 2)  # from the beginning
    assert judged(tmp_path)[0] == [] and max(ledger.read(tmp_path)) == 2


def test_a_process_killed_while_it_wrote(tmp_path):
    train(tmp_path, 2, 0, 4)
    path = tmp_path / "ledger" / "1.jsonl"
    path.write_bytes(path.read_bytes()[:-4])
    assert judged(tmp_path)[0] == ["step 4 has 2 rows of 4"]
    train(tmp_path, 2, 3, 4)
    assert judged(tmp_path)[0] == []


def test_processes_that_share_rows_write_the_same(tmp_path):
    train(tmp_path, 1, 0, 3)
    one = tmp_path / "ledger" / "0.jsonl"
    (tmp_path / "ledger" / "1.jsonl").write_text(one.read_text())
    assert judged(tmp_path)[0] == []
    (tmp_path / "ledger" / "1.jsonl").write_text(one.read_text().replace("5", "4"))
    with pytest.raises(UserError, match="as row 2 of the batch, and another process"):
        ledger.read(tmp_path)


@pytest.mark.parametrize(
    "rows, words",
    [
        ([0, 1, 2, 3, 4, 0], "pass 1: row 0 came 2 times"),
        ([0, 1, 2, 3, 4, 5, 2, 2], "pass 2: row 2 came 2 times"),
        ([0, 1, 2, 3, 4, 6], "pass 1: row 6 of 6 is none"),
    ],
)
def test_what_is_wrong_is_named(rows, words):
    steps = {i + 1: [{"row": row}] for i, row in enumerate(rows)}
    assert ledger.passes(steps, 0, SIZE).problems == [words]


def test_sources_are_judged_each(tmp_path):
    entries = [(0, 1), (1, 0), (0, 0), (0, 1), (1, 0), (0, 0)]
    steps = {1: [{"source": source, "row": row} for source, row in entries]}
    assert ledger.passes(steps, 0, 2) == ledger.Passes(4, 2, [])
    assert ledger.passes(steps, 1, 1) == ledger.Passes(2, 2, [])


def test_gaps():
    row = [{"row": 0}] * BATCH
    assert ledger.gaps({1: row, 2: row}, BATCH) == []
    assert ledger.gaps({2: row, 5: row}, BATCH) == ["step 1 is missing, of 3"]


def test_without_a_ledger(tmp_path):
    with pytest.raises(UserError, match="has no ledger: train with"):
        ledger.read(tmp_path)
